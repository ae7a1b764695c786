"""One softmax over text and codes against one for each (fig. 9): `python -m benchmarks.paper.heads RUN --json`.

Arms train on RUN/packs and differ in the cross-entropy alone: `joint` normalises over text rows and code rows
together, `separate` each target over the rows of its own kind. Held-out losses of both arms are of the second kind,
because it is what a step of generation draws from, and because a sum over more rows is never smaller.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from examples.shapes.transformer import MIXTURE, code_documents
from transformers_nextflow import modeling_nextflow
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.losses import IGNORE, joint_cross_entropy

from .arms import HELD_OUT, Claim, HeldOut, begin, conclude, parse, run_arms, train_arm, untrained

ARMS = ("joint", "separate")
SAYS = "one head over one vocabulary is chosen over separate ones"
CLAIMS = (
    Claim(SAYS, "fig. 9", "joint", "separate", "vision", "0 or -"),
    Claim(SAYS, "fig. 9", "joint", "separate", "text", "0 or -"),
)


def separate_cross_entropy(
    hidden: torch.Tensor,
    text_rows: torch.Tensor,
    code_rows: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`joint_cross_entropy`], but under a softmax over the rows of the target's own kind."""
    is_code = targets >= len(text_rows)
    text_targets, code_targets = targets.clone(), targets - len(text_rows)
    text_targets[is_code], code_targets[~is_code] = IGNORE, IGNORE
    text_total, text_losses = joint_cross_entropy(hidden, text_rows, code_rows[:0], text_targets, weights, z_loss)
    code_total, code_losses = joint_cross_entropy(hidden, text_rows[:0], code_rows, code_targets, weights, z_loss)
    return text_total + code_total, text_losses + code_losses


@contextmanager
def separate_heads() -> Iterator[None]:
    """Inside, models of this process compute [`separate_cross_entropy`]."""
    before = modeling_nextflow.joint_cross_entropy
    modeling_nextflow.joint_cross_entropy = separate_cross_entropy
    try:
        yield
    finally:
        modeling_nextflow.joint_cross_entropy = before


class HeldOutByKind(HeldOut):
    """Held-out losses under separate heads, however the model is trained."""

    def losses(self, model, batches):
        with separate_heads():
            return super().losses(model, batches)


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "heads"
    model, processor = untrained(options.run, seed)
    held_out = HeldOutByKind({"": PackedDataset(folder / "held_out" / "packs", model, processor)})
    with separate_heads() if arm == "separate" else nullcontext():
        return train_arm(folder, model, processor, options.run / "packs", held_out, options.steps, seed)


def main() -> None:
    options = parse(__doc__, ("joint", "start", "packs"), steps=250)
    folder = begin("heads", options)
    code_documents(folder / "held_out", *untrained(options.run, seed=1), options.held_out, MIXTURE, HELD_OUT)
    conclude("heads", CLAIMS, run_arms(folder, run_arm, ARMS, options), options)


if __name__ == "__main__":
    main()
