"""`transformers-nextflow train`, `evaluate` and `merge`."""

import tempfile
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Literal

import torch
from typer import Argument, Option, Typer

from ..utils import merging
from ..utils.commands import Json, Model, command, forward, print_figures
from ..utils.loading import load_model, model_name

TRAININGS_GROUP = "transformers_nextflow.trainings"  # of entry points: the command line of each training elsewhere

train = Typer(no_args_is_help=True)
app = Typer()

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, Option(help="Of the weights; default: as they are stored.")
]


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


@command(app)
def evaluate(
    packs: Annotated[str, Argument(metavar="PACKS", help="Folder or Hub dataset of packs.")],
    model: Model = None,
    batch_size: Annotated[int, Option(metavar="N", help="Packs of a forward.")] = 1,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """The loss of packs: over all targets, of text, of pictures, and of each scale."""
    from ..data import PackCollator, PackedDataset
    from . import NextFlowTrainer, NextFlowTrainingArguments

    loaded, processor = load_model(model, dtype and getattr(torch, dtype))
    dataset = PackedDataset(packs, loaded, processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = NextFlowTrainingArguments(folder, per_device_eval_batch_size=batch_size, report_to="none")
        trainer = NextFlowTrainer(loaded, arguments, PackCollator(dataset), eval_dataset=dataset)
        metrics = trainer.evaluate()
    losses = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
    print_figures({name.removeprefix("eval_"): value for name, value in losses.items()}, json)


@command(app)
def merge(
    adapters: Annotated[str, Argument(metavar="ADAPTERS", help="Folder or Hub id.")],
    output: Annotated[str, Option(metavar="FOLDER", help="New folder of a whole model.")],
    dtype: Dtype = None,
) -> None:
    """Adapters and the model that they are for, as one model."""
    merging.merge(model_name(adapters), output, dtype and getattr(torch, dtype))
    print(output)
