"""Residual against accumulated features under the paper's self-correction (fig. 10), as curves over steps:
`python -m benchmarks.paper.features RUN --json`.

Arms train on the same text-to-image packs, whose inputs are corrected as the paper found best (all samples, 60% of the
tokens of each scale), and differ in `feature_mode` alone. Held-out loss with the same correction, which training
minimises, and without (`clean_`). The paper's curves are of long training; ours are its beginning.
"""

import dataclasses
from pathlib import Path

from examples.emoji.documents import EXTRACTION

from .arms import HELD_OUT, T2I, Claim, code, conduct, dev, train_arm, untrained

ARMS = ("residual", "accumulated")
SAYS = "with self-correction residual features end ahead of accumulated ones"
CLAIMS = [Claim(SAYS, "fig. 10", *ARMS, measure, "-") for measure in ("vision", "clean_vision")]


def prepare(folder: Path, options) -> None:
    code(folder / "training", options, T2I, EXTRACTION)
    code(
        folder / "corrected",
        options,
        dev(T2I),
        dataclasses.replace(HELD_OUT, self_correction=EXTRACTION.self_correction),
    )
    code(folder / "clean", options, dev(T2I), HELD_OUT)


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    parts = untrained(options.run, seed, feature_mode=arm)
    held_out = {"": folder / "corrected" / "packs", "clean_": folder / "clean" / "packs"}
    return train_arm(folder, parts, folder / "training" / "packs", held_out, options.steps, seed)


if __name__ == "__main__":
    conduct("features", __doc__, CLAIMS, ARMS, run_arm, prepare)
