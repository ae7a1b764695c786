"""One softmax over text and codes against one for each (fig. 9): `python -m benchmarks.paper.heads RUN --json`.

`joint` normalises over text rows and code rows together, `separate` each target over the rows of its own kind.
Held-out losses of both are of the second kind, because it is what a step of generation draws from, and because a sum
over more rows is never smaller.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from transformers_nextflow import modeling_nextflow
from transformers_nextflow.losses import joint_cross_entropy

from .arms import HELD_OUT, MIXTURE, Claim, HeldOut, code, conduct, dev, train_arm, untrained

ARMS = ("joint", "separate")
SAYS = "one head over one vocabulary is chosen over separate ones"
CLAIMS = [Claim(SAYS, "fig. 9", *ARMS, measure, "0 or -") for measure in ("vision", "text")]


def separate_cross_entropy(
    hidden_ND: torch.Tensor,
    heads: Sequence[nn.Linear],
    num_rows: int,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`joint_cross_entropy`], but under a softmax over the rows of the target's own kind."""
    text_rows = heads[0].out_features
    total, losses_N = 0.0, torch.zeros_like(weights_N)
    for head, at_N, first in ((heads[0], targets_N < text_rows, 0), (heads[1], targets_N >= text_rows, text_rows)):
        of_kind, losses_N[at_N] = joint_cross_entropy(
            hidden_ND[at_N], [head], head.out_features, targets_N[at_N] - first, weights_N[at_N], z_loss
        )
        total = total + of_kind
    return total, losses_N


@contextmanager
def separate_heads() -> Iterator[None]:
    """Inside, models of this process compute [`separate_cross_entropy`]."""
    with patch.object(modeling_nextflow, "joint_cross_entropy", separate_cross_entropy):
        yield


class HeldOutByKind(HeldOut):
    """Held-out losses under separate heads, however the model is trained."""

    def losses(self, model, batches):
        with separate_heads():
            return super().losses(model, batches)


def prepare(folder: Path, options) -> None:
    code(folder / "training", options, MIXTURE)
    code(folder / "held_out", options, dev(MIXTURE), HELD_OUT)


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    parts, held_out = untrained(options.run, seed), {"": folder / "held_out" / "packs"}
    with separate_heads() if arm == "separate" else nullcontext():
        return train_arm(
            folder, parts, folder / "training" / "packs", held_out, options.steps, seed, losses_class=HeldOutByKind
        )


if __name__ == "__main__":
    conduct("heads", __doc__, CLAIMS, ARMS, run_arm, prepare)
