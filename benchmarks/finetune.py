"""Own pictures by one command: `python -m benchmarks.finetune --data runs/emoji/data --json`.

`transformers-nextflow finetune` as a user calls it, with nothing but a folder of `examples/openmoji.py`, a style that
the checkpoint has not seen, of 60 pictures and of 5. Counted are the CPU seconds of the command. Then, for the
checkpoint and what each run made of it, one drawing a prompt, none chosen:

- `old`: the emoji world's test prompts, seen and held out: what the model can do must stay;
- `new`: names in the new style that no run was tuned to, judged among all pictures of both worlds.

Runs that are in `--runs` are not made again. `--sheet` draws some of the new names: the truth, before, after each run.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples.emoji.artist import Artist
from examples.emoji.data import pixels_of
from examples.emoji.intervals import paired_difference, proportion
from examples.emoji.judge import Judge
from examples.emoji.scoring import DRAWING, Exam, judged
from examples.emoji.splits import COMBINATION, PAIR, SEEN
from examples.emoji.tasks import Item, Picture, Tasks
from examples.emoji.world import World
from examples.openmoji import STYLE, pictures, write_folder
from transformers_nextflow.data.inspection import draw_sheet
from transformers_nextflow.utils.files import read_json, write_atomically
from transformers_nextflow.utils.loading import DEFAULT_MODEL, load_model

from .harness import machine, report, save

OUTPUT = Path(__file__).parent / "results" / "finetune.json"
SHOWN = 9


def tune(photos: Path, output: Path) -> dict:
    """The command's figures and its CPU seconds, kept beside its output."""
    kept = output.with_suffix(".json")
    if not kept.is_file():
        before = os.times()
        command = [sys.executable, "-m", "transformers_nextflow", "finetune", str(photos), "--output", str(output)]
        subprocess.run(command, check=True)
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        save(read_json(output / "finetune.json") | {"CPU seconds": round(seconds, 1)}, kept)
    return read_json(kept)


class Questions:
    """Prompts of the old world and of the new style, with the judges of what is drawn for them.

    Args:
        new: PNGs of the new style by their captions.
        tuned: captions that a run is tuned to, which are asked nothing about.
        prompts: of each part of the old world's test split.
    """

    def __init__(self, world: World, new: dict[str, bytes], tuned: int, prompts: int):
        self.world, self.new = world, list(new)[tuned:]
        names = [caption.removesuffix(f", {STYLE}") for caption in new]
        self.truths = np.stack([pixels_of(png) for png in new.values()])
        both = World.from_arrays(
            np.concatenate([world.pictures, self.truths]), world.names + names, world.styles + [STYLE] * len(new)
        )
        self.judge, self.prompts, self.first = Judge(both), prompts, len(world) + tuned
        self.tasks = Tasks.of(world)

    def answers(self, folder: Path) -> tuple[dict, list[np.ndarray]]:
        """Verdicts on the model in a folder, and its drawings of the new style."""
        model, processor = load_model(str(folder))
        artist = Artist(model, processor, self.world)
        exam = Exam(artist, self.tasks, "test", self.prompts)
        old = [item for part in (SEEN, PAIR, COMBINATION) for item in exam.items("text-to-image", "", (part,))]
        verdicts = {"old": judged(exam, artist.draw(old), [item.targets[0] for item in old], DRAWING)}
        rows = range(self.first, self.first + len(self.new))
        asked = [Item("text-to-image", "", (row,), (text,), (Picture((row,)),)) for row, text in zip(rows, self.new)]
        drawn = artist.draw(asked)
        right = self.judge.right(drawn, rows)
        return verdicts | {"new": {measure: right[measure] for measure in DRAWING}}, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"), help="default: %(default)s")
    parser.add_argument("--pictures", type=int, nargs="+", default=[60, 5], metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--prompts", type=int, default=200, metavar="N", help="of each of three parts of the old world (%(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="PNG of drawings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    arguments = parser.parse_args()
    new, runs = pictures(arguments.runs / "packages"), {}
    for count in arguments.pictures:
        photos = arguments.runs / f"openmoji-{count}"
        write_folder(dict(list(new.items())[:count]), photos)
        runs[f"{count} pictures"] = tune(photos, arguments.runs / f"tuned-{count}")
    questions = Questions(World(arguments.data), new, max(arguments.pictures), arguments.prompts)
    before, drawn = questions.answers(DEFAULT_MODEL)
    drawings = [questions.truths[max(arguments.pictures) :], drawn]
    share = lambda verdicts: {  # noqa: E731
        who: {measure: proportion(right) for measure, right in each.items()} for who, each in verdicts.items()
    }
    result = {"machine": machine(torch.device("cpu")), "before": share(before)}
    for count, (name, figures) in zip(arguments.pictures, runs.items()):
        after, drawn = questions.answers(arguments.runs / f"tuned-{count}")
        drawings.append(drawn)
        change = {
            who: {measure: paired_difference(right, before[who][measure]) for measure, right in each.items()}
            for who, each in after.items()
        }
        result[name] = {"command": figures, "after": share(after), "after - before": change}
    report(result, arguments.json, arguments.output)
    if arguments.sheet:
        rows = [list(map(Image.fromarray, row)) for row in list(zip(*drawings))[:SHOWN]]
        sheet = draw_sheet(list(zip(questions.new, rows)), edge=64)
        write_atomically(arguments.sheet, lambda partial: sheet.save(partial, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
