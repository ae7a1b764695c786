"""Train a diffusion decoder (NextFlow sec. 2.3 and 3.3): a whole UNet, or LoRA adapters, and the conditioner.

The backbone is a stock checkpoint of Stable Diffusion 1, 2 or XL, Flux.1 or Qwen-Image, or a decoder saved before.
From packed shards (codes from these, pictures and captions from their source, no encoder on the device), then 2x:

    transformers-nextflow train decoder --model stabilityai/stable-diffusion-2-1 \
        --vision_tokenizer nextflow --shards packs --dataset_name source.parquet --use_ema --output runs/base
    transformers-nextflow train decoder --model runs/base --stage x2 \
        --shards packs --dataset_name source.parquet --use_ema --output runs/x2

A transformer, from a folder of images that are coded in training (`--stage x2` then takes `--adapter runs/flux`):

    accelerate launch -m transformers_nextflow train decoder --vision_tokenizer nextflow --dataset_name images \
        --model black-forest-labs/FLUX.1-dev --rank 16 --bf16 \
        --gradient_checkpointing --output runs/flux

A stopped training goes on exactly with `--resume_from_checkpoint True`. `samples/` in the output folder holds
pictures. A whole UNet ends as a pipeline's folder, adapters as one for `load_lora_weights`, with `conditioner/` in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from transformers_nextflow import NextFlowImageProcessor
from transformers_nextflow.data import DocumentReader, Source
from transformers_nextflow.utils.loading import load_image_processor, load_vq_model

from .training import DecoderTrainingArguments, NextFlowDecoderTrainer, load_decoder
from .training_data import PictureBatches, shard_pictures, source_pictures

STAGES = {"base": 1, "x2": 2}


@dataclass
class DecoderOptions:
    pretrained_model_name_or_path: str = field(
        metadata={"help": "folder or Hub id of a stock pipeline or a decoder", "aliases": ["--model"]}
    )
    dataset_name: str = field(metadata={"help": "folder of images, Parquet, JSON lines, tars or Hub dataset"})
    vision_tokenizer: str | None = field(
        default=None, metadata={"help": "NextFlow model, or its vision tokenizer; default: the decoder's own"}
    )
    stage: str = field(default="base", metadata={"help": "base, at the resolution of the codes, or x2"})
    adapter: str | None = field(default=None, metadata={"help": "output of a LoRA training to start from"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "of the dataset"})
    shards: str | None = field(
        default=None, metadata={"help": "shards extracted from the dataset, whose codes are the condition"}
    )
    image_column: str = "image"
    caption_column: str = "text"
    level: str | None = field(
        default=None, metadata={"help": "of the scale schedules; default: the vision tokenizer's, or the highest"}
    )
    train_batch_size: int = field(default=16, metadata={"help": "pictures of one device and accumulation step"})
    proportion_empty_prompts: float = field(default=0.0, metadata={"help": "for guidance by the caption"})


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the options of a command line; without `argv` the process's own."""
    parser = HfArgumentParser(
        (DecoderOptions, DecoderTrainingArguments),
        prog="transformers-nextflow train decoder",
        description=__doc__.split("\n")[0],
    )
    script, arguments = parser.parse_args_into_dataclasses(argv)
    if script.stage not in STAGES:
        parser.error(f"--stage must be one of {', '.join(STAGES)}, got {script.stage}")
    if script.adapter is not None and arguments.rank is None:
        parser.error("--adapter continues adapters: give their --rank")
    upscale = STAGES[script.stage]
    vq_model = None if script.vision_tokenizer is None else load_vq_model(script.vision_tokenizer)
    name = script.pretrained_model_name_or_path
    pipe = load_decoder(name, vq_model, upscale, script.adapter, arguments.weight_dtype)
    batches = make_batches(script, pipe.vq_model, upscale, arguments.seed)
    trainer = NextFlowDecoderTrainer(pipe, arguments, batches, samples=batches[0])
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


def make_batches(script: DecoderOptions, vq_model, upscale: int, seed: int):
    source = Source(script.dataset_name, script.dataset_split, script.dataset_config_name)
    table = source.load()
    name = script.vision_tokenizer
    of_config = NextFlowImageProcessor.from_vq_config
    image_processor = of_config(vq_model.config) if name is None else load_image_processor(name, vq_model.config)
    if script.shards is not None:
        pictures, read = shard_pictures(script.shards, source, table, vq_model)
    else:
        columns = {"image": script.image_column, "text": script.caption_column}
        reader = DocumentReader("text-to-image", columns, root=source.root)
        reader.check_columns(table.column_names)
        pictures, read = source_pictures(table, reader, image_processor, script.level), reader.read
    share = script.proportion_empty_prompts
    return PictureBatches(table, read, pictures, image_processor, script.train_batch_size, upscale, share, seed)
