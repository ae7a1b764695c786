"""What the model does, on the command line: `python -m examples.demo --output demo`.

Prints each command, then runs it: a picture for a prompt, its description read back, an edit of it, and a photograph
beside what its codes keep of it.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import skimage
from PIL import Image

PROMPT = "red heart, fluent"
INSTRUCTION = "make it blue"
PHOTO = "chelsea.png"  # scikit-image's cat, which no training stage sees
PHOTO_BOX = (75, 0, 375, 300)  # left, top, right, bottom


def run(*arguments: str) -> None:
    """Print a command and run it."""
    print("$", shlex.join(["transformers-nextflow", *arguments]), flush=True)
    subprocess.run([sys.executable, "-m", "transformers_nextflow", *arguments], check=True)
    print(flush=True)


def demo(output: Path, model: str | None = None) -> None:
    """Write `picture.png`, `edit.png`, `photo.png` and `reconstruction.png` into the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    picture, edited, photograph, pair = (
        str(output / f"{name}.png") for name in ("picture", "edit", "photo", "reconstruction")
    )
    Image.open(Path(skimage.__file__).parent / "data" / PHOTO).crop(PHOTO_BOX).save(photograph)
    chosen = ["--model", model] if model else []
    run("generate", PROMPT, "--output", picture, "--seed", "0", *chosen)
    run("describe", picture, *chosen)
    run("edit", picture, INSTRUCTION, "--output", edited, "--seed", "0", *chosen)
    run("reconstruct", photograph, "--output", pair, *chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--model", metavar="NAME", help="local folder or Hub id (default: the repository's checkpoint)"
    )
    args = parser.parse_args()
    try:
        demo(args.output, args.model)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the command has said what is wrong


if __name__ == "__main__":
    main()
