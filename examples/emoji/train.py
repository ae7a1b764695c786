"""Train the emoji checkpoint: `torchrun --nproc-per-node 2 -m examples.emoji.train --output runs/emoji`.

Stages run in order and each resumes from its last checkpoint, so the same command continues a stopped run. One process
works too; two with `OMP_NUM_THREADS=1` use two cores best.
"""

import argparse
from pathlib import Path

from .tasks import Tasks
from .teacher import train_teacher
from .text import VOCABULARY, train_text_tokenizer, training_texts
from .tokenizer import train_decoder, train_joint, train_pixel
from .transformer import TRAININGS, train_stage, train_transformer
from .world import World

STAGES = ("pixel", "teacher", "joint", "transformer", "decoder")
LAST = list(TRAININGS)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"), help="folder of checkpoints and log")
    parser.add_argument("--data", type=Path, help="of `examples.emoji.data` (default: data in the output)")
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    until.add_argument("--model", type=Path, help=f"run {LAST} alone, from the model in this folder")
    arguments = parser.parse_args()
    folder, data = arguments.output, arguments.data or arguments.output / "data"
    if arguments.model is not None:
        train_stage(folder, LAST, arguments.model, data)
        return
    last, world = STAGES.index(arguments.until), World(data)
    vq_model = train_pixel(folder, world)
    if last >= 1:
        teacher = train_teacher(folder, world)
    if last >= 2:
        vq_model = train_joint(folder, vq_model, teacher, world)
    if last >= 3:
        train_transformer(folder, train_text_tokenizer(training_texts(Tasks.of(world)), VOCABULARY), vq_model, data)
    if last >= 4:  # the codes do not depend on it
        train_decoder(folder, vq_model, world)


if __name__ == "__main__":
    main()
