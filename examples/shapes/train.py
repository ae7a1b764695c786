"""Train the shapes checkpoint from nothing: `python -m examples.shapes.train --output runs/shapes`.

Stages run in order and each resumes from its last checkpoint, so the same command continues a stopped run.
"""

import argparse
from pathlib import Path

from .text import train_text_tokenizer
from .transformer import train_transformer
from .tokenizer import train_decoder, train_joint, train_pixel, train_teacher

STAGES = ("pixel", "teacher", "joint", "decoder", "transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"), help="folder of checkpoints and log")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    arguments = parser.parse_args()
    last = STAGES.index(arguments.until)

    vq_model = train_pixel(arguments.output)
    if last >= 1:
        text_tokenizer = train_text_tokenizer()
        teacher = train_teacher(arguments.output, text_tokenizer)
    if last >= 2:
        vq_model = train_joint(arguments.output, vq_model, teacher)
    if last >= 3:
        vq_model = train_decoder(arguments.output, vq_model)
    if last >= 4:
        train_transformer(arguments.output, text_tokenizer, vq_model)


if __name__ == "__main__":
    main()
