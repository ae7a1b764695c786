"""Train the shapes checkpoint: `torchrun --nproc-per-node 2 -m examples.shapes.train --output runs/shapes`.

Stages run in order and each resumes from its last checkpoint, so the same command continues a stopped run. One process
works too; two with `OMP_NUM_THREADS=1` use two cores best.
"""

import argparse
from pathlib import Path

from . import transformer
from .text import train_text_tokenizer
from .tokenizer import train_decoder, train_joint, train_pixel, train_teacher

STAGES = ("pixel", "teacher", "joint", "transformer", "tuning", "decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"), help="folder of checkpoints and log")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="end with this checkpoint of the transformer")
    arguments = parser.parse_args()
    last, folder = STAGES.index(arguments.until), arguments.output
    if arguments.stop_at is not None:
        if not 0 < arguments.stop_at < transformer.STEPS:
            parser.error(f"--stop-at must be in [1, {transformer.STEPS - 1}], got {arguments.stop_at}")
        last = min(last, STAGES.index("transformer"))

    text_tokenizer = train_text_tokenizer()
    vq_model = train_pixel(folder)
    if last >= 1:
        teacher = train_teacher(folder, text_tokenizer)
    if last >= 2:
        vq_model = train_joint(folder, vq_model, teacher)
    if last >= 3:
        transformer.train_transformer(folder, text_tokenizer, vq_model, arguments.stop_at)
    if last >= 4:
        transformer.tune_transformer(folder)
    if last >= 5:  # the codes do not depend on it
        train_decoder(folder, vq_model)


if __name__ == "__main__":
    main()
