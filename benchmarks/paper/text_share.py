"""A quarter of text-only positions against none, at equal text-to-image data (table 1):
`python -m benchmarks.paper.text_share RUN --json`.

Both arms pack the same text-to-image documents and take as many steps; a step of `text-0.25` holds four packs where
one of `text-0` holds three, so that both see as many positions of text-to-image.
"""

from pathlib import Path

from examples.shapes.transformer import EXTRACTION, PACK_LENGTH, code_documents
from transformers_nextflow.data import CostModel, FixedLength, PackedDataset, pack

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

SHARES = {"text-0.25": 0.25, "text-0": 0.0}
PACKS_OF_A_STEP = {"text-0.25": 12, "text-0": 9}
MIXTURE = {"t2i": 0.4, "text": 0.6}
SAYS = "25% of text-only data does not hurt text-to-image"
CLAIMS = (Claim(SAYS, "table 1", "text-0.25", "text-0", "vision", "0 or -"),)


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "text_share"
    model, processor = untrained(options.run, seed)
    held_out = HeldOut({"": PackedDataset(folder / "held_out" / "packs", model, processor)})
    packs = folder / "training" / arm
    return train_arm(folder, model, processor, packs, held_out, options.steps, seed, PACKS_OF_A_STEP[arm])


def main() -> None:
    options = parse(__doc__, ("joint", "start"), steps=250, documents=20_000)
    folder = begin("text_share", options)
    model, processor = untrained(options.run, seed=1)
    code_documents(folder / "held_out", model, processor, options.held_out, MIXTURE, HELD_OUT)
    training = folder / "training"
    code_documents(training, model, processor, options.documents, MIXTURE, EXTRACTION)
    strategy, costs = FixedLength(PACK_LENGTH), CostModel.from_config(model.config)
    for arm, share in SHARES.items():
        pack([training / "documents"], training / arm, strategy, costs, PACKS_OF_A_STEP[arm], text_share=share)
    conclude("text_share", CLAIMS, run_arms(folder, run_arm, list(SHARES), options), options)


if __name__ == "__main__":
    main()
