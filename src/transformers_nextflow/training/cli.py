"""`transformers-nextflow train`, `finetune` and `merge`."""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option, Typer

from ..utils import export
from ..utils.commands import Dtype, Json, Model, command, forward, print_figures
from ..utils.files import read_text
from ..utils.lazy import needing_extra
from ..utils.loading import model_name
from .finetune_settings import RATE_OF_ADAPTERS, RATE_OF_ALL, FinetuneSettings

TRAININGS_GROUP = "transformers_nextflow.trainings"  # of entry points: the command line of each training elsewhere

train = Typer(no_args_is_help=True)
app = Typer()


def _main(module: str):
    return lambda: import_module(f".commands.{module}", __package__).main


def _decoder_main():
    (found,) = entry_points(group=TRAININGS_GROUP, name="decoder")
    return found.load()


for name, about, load in (
    ("transformer", "The transformer on packs: a stage of the paper, fine-tuning, LoRA.", _main("transformer")),
    ("tokenizer", "The vision tokenizer on pictures, in one of its three stages.", _main("tokenizer")),
    ("grpo", "The coarse scales of pictures by reinforcement learning.", _main("grpo")),
    ("decoder", "A diffusion decoder that draws the codes.", _decoder_main),
):
    forward(train, name, about, load)


@dataclass
class Pictures:
    """Pictures."""

    image_column: Annotated[str | None, Option(metavar="COLUMN", help="Default: the one of pictures.")] = None
    caption_column: Annotated[str | None, Option(metavar="COLUMN", help="Default: text, caption, prompt or txt.")] = (
        None
    )
    split: Annotated[str, Option(help="Of the dataset.")] = "train"
    config: Annotated[str | None, Option(help="Configuration of a dataset on the Hub.")] = None
    level: Annotated[str | None, Option(help="Level of the scale schedules; default: the model's.")] = (
        FinetuneSettings.level
    )
    held_out: Annotated[float, Option(metavar="P", help="Of the pictures, at least one.")] = FinetuneSettings.held_out
    drop_captions: Annotated[float, Option(metavar="P", help="Of the pictures, for guidance.")] = (
        FinetuneSettings.drop_captions
    )


@dataclass
class Tuning:
    """Training."""

    full: Annotated[bool, Option("--full", help="All weights, instead of adapters (LoRA).")] = FinetuneSettings.full
    lora_r: Annotated[int, Option(metavar="R", help="Rank of the adapters.")] = FinetuneSettings.lora_r
    learning_rate: Annotated[
        float | None, Option(metavar="RATE", help=f"Default: {RATE_OF_ADAPTERS}, with --full {RATE_OF_ALL}.")
    ] = FinetuneSettings.learning_rate
    steps: Annotated[int, Option(metavar="N", help="At most.")] = FinetuneSettings.steps
    batch_size: Annotated[int, Option(metavar="N", help="Pictures of a step.")] = FinetuneSettings.batch_size
    evaluations: Annotated[int, Option(metavar="N", help="Of the held-out loss, with drawings.")] = (
        FinetuneSettings.evaluations
    )
    patience: Annotated[int, Option(metavar="N", help="Evaluations without a gain, then it ends.")] = (
        FinetuneSettings.patience
    )
    prior: Annotated[
        str | None, Option(metavar="FILE", help="Prompts, a line each, whose drawings are to stay as they are.")
    ] = None
    samples: Annotated[int, Option(metavar="N", help="Pictures drawn at each evaluation.")] = FinetuneSettings.samples
    seed: Annotated[int, Option(metavar="N", help="Of everything drawn.")] = FinetuneSettings.seed


@command(app)
def finetune(
    photos: Annotated[
        str,
        Argument(metavar="PHOTOS", help="Folder with metadata.jsonl, Parquet, tars, or dataset's id on the Hub."),
    ],
    output: Annotated[str, Option(metavar="FOLDER", help="Of the result, all drawings and sheet.png.")],
    pictures: Pictures,
    tuning: Tuning,
    model: Model = None,
    json: Json = False,
) -> None:
    """Pictures and their captions to a model that draws them; resumes."""
    with needing_extra("train", "finetune"):
        from ..data import Source
        from . import finetune as run

    of_pictures = {name: getattr(pictures, name) for name in ("level", "held_out", "drop_captions")}
    prior = [] if tuning.prior is None else read_text(Path(tuning.prior)).splitlines()
    given = vars(tuning) | of_pictures | {"prior": tuple(filter(str.strip, prior))}
    settings = FinetuneSettings(**given)
    source = Source(photos, pictures.split, pictures.config)
    figures = run(source, model_name(model), output, settings, pictures.image_column, pictures.caption_column)
    print_figures(figures, json)


@command(app)
def merge(
    adapters: Annotated[str, Argument(metavar="ADAPTERS", help="Folder or Hub id.")],
    output: Annotated[str, Option(metavar="FOLDER", help="New folder of a whole model.")],
    dtype: Dtype = None,
) -> None:
    """Adapters and the model that they are for, as one model."""
    export.merge(model_name(adapters), output, dtype and getattr(torch, dtype))
    print(output)
