"""Dual against single codebook (fig. 8): `python -m benchmarks.paper.codebook RUN --json`.

`dual` is the tokenizer of RUN's joint stage, `single` that of its pixel stage, whose semantic half is 0 everywhere.
Each codes the same text-to-image documents, and a transformer trains on each. Vision loss is over the tokenizer's own
codes, as in the paper.
"""

from pathlib import Path

from torch import nn

from examples.shapes.assemble import IMAGE_GENERATION
from examples.shapes.evaluate import Evaluator, text_to_image
from examples.shapes.transformer import EXTRACTION, PACKS, code_documents
from transformers_nextflow import NextFlowVQModel
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

ARMS = ("dual", "single")
MIXTURE = {"t2i": 1.0}
PROMPTS = 10  # of each category
SAYS = "a single-branch tokenizer generates worse"
LOSS = Claim(f"{SAYS}: its vision loss is higher", "fig. 8", "dual", "single", "vision", "-")
SCORE = Claim(f"{SAYS}: its GenEval score is lower", "fig. 8", "dual", "single", "text_to_image", "+")


def tokenizer_of(run: Path, arm: str) -> NextFlowVQModel:
    """The joint stage's, or the pixel stage's with its semantic half, which nothing has trained, set to 0."""
    if arm == "dual":
        return NextFlowVQModel.from_pretrained(run / "joint")
    vq_model = NextFlowVQModel.from_pretrained(run / "pixel")
    nn.init.zeros_(vq_model.quantizer.semantic_codebook)  # then the semantic features decide nothing
    return vq_model


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "codebook"
    model, processor = untrained(options.run, seed, tokenizer_of(options.run, arm))
    held_out = HeldOut({"": PackedDataset(folder / f"{arm}-held-out" / "packs", model, processor)})
    result = train_arm(folder, model, processor, folder / arm / "packs", held_out, options.steps, seed)
    evaluator = Evaluator(model.eval(), processor, 0, **IMAGE_GENERATION)
    result["final"]["text_to_image"] = text_to_image(evaluator, PROMPTS, 1, "dev")["overall"]["score"]
    return result


def main() -> None:
    options = parse(__doc__, ("joint", "pixel", "start"), steps=250, documents=10_000)
    folder = begin("codebook", options)
    for arm in ARMS:
        parts = untrained(options.run, 1, tokenizer_of(options.run, arm))
        code_documents(folder / arm, *parts, options.documents, MIXTURE, EXTRACTION, PACKS)
        code_documents(folder / f"{arm}-held-out", *parts, options.held_out, MIXTURE, HELD_OUT)
    runs = run_arms(folder, run_arm, ARMS, options)
    weight = NextFlowVQModel.from_pretrained(options.run / "joint").config.semantic_weight
    notes = [f"Both share the pixel half; in the lookup of `dual` the semantic half weighs {weight}."]
    claims = [LOSS]
    if any(run["final"]["text_to_image"] for by_seed in runs.values() for run in by_seed.values()):
        claims.append(SCORE)
    else:
        notes.append("No picture of any arm shows what its prompt asks at these steps: no difference of scores.")
    conclude("codebook", claims, runs, options, notes)


if __name__ == "__main__":
    main()
