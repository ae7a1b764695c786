"""A folder of captioned pictures to tune a model to: `python -m examples.openmoji --output runs/openmoji`.

Sixty pictures in a style that the emoji checkpoint has never seen, captioned as it was taught: "pear, openmoji". They
are the things of `emoji/wordings.py` in the order of their names' hashes, so that fewer are the first of more. Then

    transformers-nextflow finetune runs/openmoji --output runs/tuned
    transformers-nextflow generate "rocket, openmoji" --model runs/tuned --output rocket.png
"""

import argparse
import hashlib
import json
from pathlib import Path

from .emoji.data import SIZE, render
from .emoji.names import names_of
from .emoji.packages import Package, fetch, read_icons
from .emoji.wordings import CAPTION, NOUNS

STYLE = "openmoji"
PACKAGE = Package(
    "@iconify-json/openmoji",
    "1.2.29",
    "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    "CC-BY-SA-4.0",
    "OpenMoji, the open-source emoji and icon project",
)
CREDIT = f"""Pictures of [OpenMoji](https://openmoji.org), licensed under
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/), rendered to {SIZE} x {SIZE} pixels on white from the
npm package {PACKAGE.name} {PACKAGE.version}.
"""


def pictures(cache: Path) -> dict[str, bytes]:
    """Captions and PNGs of all those things, in the order of their names' hashes."""
    icons = read_icons(fetch(PACKAGE, cache))
    keys = {name: key for key, name in names_of(icons).items() if name in NOUNS}
    ordered = sorted(keys, key=lambda name: hashlib.sha256(name.encode()).digest())
    return {CAPTION.format(name=name, style=STYLE): render(icons[keys[name]], SIZE) for name in ordered}


def write_folder(pictures: dict[str, bytes], folder: Path) -> None:
    """Pictures by their captions, with whom to credit."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (caption, png) in enumerate(pictures.items()):
        (folder / f"{number:02}.png").write_bytes(png)
        lines.append(json.dumps({"file_name": f"{number:02}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    (folder / "README.md").write_text(CREDIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/openmoji"), help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path("runs/packages"), help="default: %(default)s")
    arguments = parser.parse_args()
    chosen = dict(list(pictures(arguments.cache).items())[: arguments.pictures])
    write_folder(chosen, arguments.output)
    print(f"{arguments.output}: {len(chosen)} pictures")


if __name__ == "__main__":
    main()
