"""Train a vision tokenizer on pictures, in one of the paper's three stages (sec. 3.1).

A tokenizer to begin with comes from `transformers-nextflow convert tokenflow`, around a SigLIP2 or with TokenFlow's
weights; a stage begins with what the stage before it wrote. On one device or under `accelerate launch -m`:

    transformers_nextflow train tokenizer --model tokenizer --images photos --stage pixel --output runs/pixel
    transformers_nextflow train tokenizer --model runs/pixel --images photos --stage joint --output runs/joint
    transformers_nextflow train tokenizer --model runs/joint --images photos --stage decoder --output runs/vq

The teacher of a first joint stage is the semantic encoder as the stage finds it: earlier stages leave it alone. It is
kept in the output folder, where another joint stage finds it; `--teacher` names another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ...data import Pictures, Source
from ...utils.loading import load_image_processor, load_vq_model, model_name
from .. import (
    EMACallback,
    ImageBatches,
    NextFlowVQTrainer,
    NextFlowVQTrainingArguments,
    load_teacher,
    prepare_vq_stage,
)


@dataclass
class TokenizerOptions:
    images: str = field(metadata={"help": "pictures: folder or file of rows, or id of a dataset on the Hub"})
    eval_images: str | None = field(default=None, metadata={"help": "the same, for PSNR, SSIM and a sheet"})
    model: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a vision tokenizer or a NextFlow; default: the repository's checkpoint"
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "vision model whose features the joint stage distils; default: see above"}
    )
    level: str | None = field(
        default=None, metadata={"help": "of the pictures; default: the model's own, or the highest"}
    )
    images_per_batch: int = field(default=16, metadata={"help": "pictures of one size in a batch"})
    ema_decay: float | None = field(default=None, metadata={"help": "keep a moving average of the trained weights"})


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the options of a command line; without `argv` the process's own."""
    parser = HfArgumentParser(
        (TokenizerOptions, NextFlowVQTrainingArguments),
        prog="transformers-nextflow train tokenizer",
        description=__doc__.split("\n")[0],
    )
    script, arguments = parser.parse_args_into_dataclasses(argv)
    if script.teacher is not None and arguments.stage != "joint":
        parser.error(f"--teacher is for the joint stage, not for {arguments.stage}")
    name = model_name(script.model)
    model = load_vq_model(name)
    teacher = load_teacher(model, name, script.teacher) if arguments.stage == "joint" else None
    model = prepare_vq_stage(model, arguments.stage)
    image_processor = load_image_processor(name, model.config)

    def batches(name: str) -> ImageBatches:
        return ImageBatches(
            Pictures(Source(name)), image_processor, script.images_per_batch, script.level, arguments.seed
        )

    trainer = NextFlowVQTrainer(
        model,
        arguments,
        train_dataset=batches(script.images),
        eval_dataset=batches(script.eval_images) if script.eval_images is not None else None,
        teacher=teacher,
        processing_class=image_processor,
    )
    if script.ema_decay is not None:
        trainer.add_callback(EMACallback(script.ema_decay))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if script.eval_images is not None:
        print(trainer.evaluate())
