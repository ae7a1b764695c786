"""Dual against single codebook (fig. 8): `python -m benchmarks.paper.codebook RUN --json`.

`dual` is the tokenizer of RUN's joint stage, `single` that of its pixel stage, trained alone for as many steps more on
the same pictures, with a semantic half that is 0 everywhere. Each codes the same text-to-image documents, and a
transformer trains on each. Vision loss is over the tokenizer's own codes, as in the paper; `right` is R@1 of drawings
for pairs of name and style that no training saw.
"""

from pathlib import Path

import torch
from torch import nn

from examples.emoji.artist import Artist
from examples.emoji.judge import Judge
from examples.emoji.splits import PAIR
from examples.emoji.tasks import Tasks
from examples.emoji.tokenizer import train_stage
from examples.emoji.world import World
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training import prepare_vq_stage

from .arms import HELD_OUT, T2I, Claim, code, conduct, dev, save_start, share_right, train_arm, untrained

ARMS = ("dual", "single")
SAYS = "a single-branch tokenizer generates worse"
CLAIMS = [
    Claim(f"{SAYS}: its vision loss is higher", "fig. 8", *ARMS, "vision", "-"),
    Claim(f"{SAYS}: its GenEval score is lower", "fig. 8", *ARMS, "right", "+"),
]


def tokenizer_of(folder: Path, arm: str, options) -> NextFlowVQModel:
    """The joint stage's, or the pixel stage's, trained on, with its semantic half, which nothing has trained, at 0."""
    if arm == "dual":
        return NextFlowVQModel.from_pretrained(options.run / "joint")
    vq_model = prepare_vq_stage(NextFlowVQModel.from_pretrained(options.run / "pixel"), "pixel")
    torch.manual_seed(2)
    vq_model = train_stage(folder / "single", "pixel", vq_model, World(options.data), like="joint")
    nn.init.zeros_(vq_model.quantizer.semantic_codebook)  # then the semantic features decide nothing
    return vq_model


def prepare(folder: Path, options) -> None:
    for arm in ARMS:
        parts = untrained(options.run, 1, tokenizer_of(folder, arm, options))
        start = save_start(folder / f"{arm}-start", *parts)
        code(folder / f"{arm}-training", options, T2I, start=start)
        code(folder / f"{arm}-held_out", options, dev(T2I), HELD_OUT, start)


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    parts = untrained(options.run, seed, tokenizer_of(folder, arm, options))
    training, held_out = (folder / f"{arm}-{name}" / "packs" for name in ("training", "held_out"))
    result = train_arm(folder, parts, training, {"": held_out}, options.steps, seed)
    world = World(options.data)
    tasks = Tasks.of(world)
    items = [tasks.draw("text-to-image", "dev", number, part=PAIR) for number in range(options.held_out)]
    result["final"]["right"] = share_right(Judge(world), Artist(*parts, world).draw(items), items)
    return result


if __name__ == "__main__":
    conduct("codebook", __doc__, CLAIMS, ARMS, run_arm, prepare, ("start", "joint", "pixel"))
