"""Residual against accumulated features under the paper's self-correction (fig. 10), as curves over samples:
`python -m benchmarks.paper.features RUN --json`.

Arms train on the same text-to-image packs, whose inputs are corrected as the paper found best (all samples, 60% of the
tokens of each scale), and differ in `feature_mode` alone. Held-out loss with the same correction, which training
minimises, and without (`clean_`). The paper's curves are of long training; ours are its beginning.
"""

import dataclasses
from pathlib import Path

from examples.shapes.transformer import EXTRACTION, PACKS, code_documents
from transformers_nextflow import SelfCorrection
from transformers_nextflow.data import PackedDataset

from .arms import (
    HELD_OUT,
    Claim,
    HeldOut,
    begin,
    conclude,
    parse,
    run_arms,
    train_arm,
    untrained,
)

MODES = ("residual", "accumulated")
MIXTURE = {"t2i": 1.0}
CORRECTION = SelfCorrection(probability=1.0, token_share=0.6)
SAYS = "with self-correction residual features end ahead of accumulated ones"
CLAIMS = (
    Claim(SAYS, "fig. 10", "residual", "accumulated", "vision", "-"),
    Claim(SAYS, "fig. 10", "residual", "accumulated", "clean_vision", "-"),
)
NOTES = ("A verdict is of the last point; `along_the_way` shows which way the difference moves with more samples.",)


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "features"
    model, processor = untrained(options.run, seed, feature_mode=arm)
    sets = {"": "corrected", "clean_": "clean"}
    held_out = HeldOut(
        {prefix: PackedDataset(folder / name / "packs", model, processor) for prefix, name in sets.items()}
    )
    return train_arm(folder, model, processor, folder / "training" / "packs", held_out, options.steps, seed)


def main() -> None:
    options = parse(__doc__, ("joint", "start"), steps=250, documents=20_000)
    folder = begin("features", options)
    parts = untrained(options.run, seed=1)
    training = dataclasses.replace(EXTRACTION, self_correction=CORRECTION, variants=1)
    corrected = dataclasses.replace(HELD_OUT, self_correction=CORRECTION)
    code_documents(folder / "training", *parts, options.documents, MIXTURE, training, PACKS)
    code_documents(folder / "corrected", *parts, options.held_out, MIXTURE, corrected)
    code_documents(folder / "clean", *parts, options.held_out, MIXTURE, HELD_OUT)
    conclude("features", CLAIMS, run_arms(folder, run_arm, MODES, options), options, NOTES)


if __name__ == "__main__":
    main()
