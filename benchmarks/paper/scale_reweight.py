"""Scale reweighting (eq. 2): held-out loss of coarse and fine scales for three exponents:
`python -m benchmarks.paper.scale_reweight RUN --json`.

Arms train on RUN/packs and differ in `scale_loss_alpha` alone. The paper reweights from the 512-level on, whose later
scales hold most codes; the shapes world has one level, of 64 pixels, so what is measured is where the weights move the
loss within it, not the entry into a level.
"""

from pathlib import Path

from examples.shapes.transformer import MIXTURE, code_documents
from transformers_nextflow.data import PackedDataset

from .arms import HELD_OUT, Claim, HeldOut, begin, conclude, parse, run_arms, train_arm, untrained

ALPHAS = {"alpha-0.9": 0.9, "alpha-0.5": 0.5, "alpha-0": 0.0}
SAYS = (
    "without reweighting GenEval fell from .67 to .57 on entering the 512-level: coarse scales carry too little loss"
)
CLAIMS = (
    Claim(SAYS, "eq. 2, sec. 3.1", "alpha-0.9", "alpha-0", "coarse", "-"),
    Claim(None, None, "alpha-0.9", "alpha-0", "fine", None),
    Claim(None, None, "alpha-0.5", "alpha-0", "coarse", None),
    Claim(None, None, "alpha-0.5", "alpha-0", "fine", None),
)
NOTES = (
    "One level of six scales and 90 codes for a square picture; the paper's loss of quality is on entering a second.",
    "Coarse: the first four scales, 10 codes of a square picture. Fine: the last two, 80 codes.",
)


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "scale_reweight"
    model, processor = untrained(options.run, seed, scale_loss_alpha=ALPHAS[arm])
    held_out = HeldOut({"": PackedDataset(folder / "held_out" / "packs", model, processor)})
    return train_arm(folder, model, processor, options.run / "packs", held_out, options.steps, seed)


def main() -> None:
    options = parse(__doc__, ("joint", "start", "packs"), steps=250)
    folder = begin("scale_reweight", options)
    code_documents(folder / "held_out", *untrained(options.run, seed=1), options.held_out, MIXTURE, HELD_OUT)
    conclude("scale_reweight", CLAIMS, run_arms(folder, run_arm, list(ALPHAS), options), options, NOTES)


if __name__ == "__main__":
    main()
