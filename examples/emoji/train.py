"""Train the emoji checkpoint: `torchrun --nproc-per-node 2 -m examples.emoji.train --output runs/emoji`."""

import argparse
from pathlib import Path

from .teacher import train_teacher
from .world import World

STAGES = ("teacher",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"), help="folder of checkpoints and log")
    parser.add_argument("--data", type=Path, help="of `examples.emoji.data` (default: data in the output)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    arguments = parser.parse_args()
    world = World(arguments.data or arguments.output / "data")
    train_teacher(arguments.output, world)


if __name__ == "__main__":
    main()
