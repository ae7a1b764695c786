"""Whether an image that is only read should carry its last scale as one more input block, which the paper leaves open:
`python -m benchmarks.paper.condition_images RUN --json`.

Next-scale inputs stop before the last scale, so without that block a picture to describe or to edit lacks its finest
codes. Arms `with` and `without` train from new weights on equally many of the same captions and edits; text-to-image
shows no condition and is left out. Packs of the first arm hold fewer documents, so it takes more steps and costs more.
Beside held-out losses, `captions` and `edits` are the judge's scores on the dev split.
"""

import random
from pathlib import Path

from examples.shapes.assemble import IMAGE_GENERATION
from examples.shapes.evaluate import Evaluator, captions, draw_edits, edits
from examples.shapes.transformer import EXTRACTION, PACKS, code_documents, new_processor
from examples.shapes.world import sample_scene
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.data.shards import read_manifest

from .arms import HELD_OUT, Claim, HeldOut, begin, conclude, parse, run_arms, train_arm, untrained

ARMS = ("with", "without")
CLAIMS = tuple(Claim(None, None, *ARMS, measure, None) for measure in ("captions", "edits", "text", "vision", "fine"))
MIXTURE = {"caption": 0.3, "edit": 0.7}
EDITS, CAPTIONS = 50, 250  # edits for each operation


def start_of(arm: str, seed: int, options):
    model, processor = untrained(options.run, seed, condition_last_scale=arm == "with")
    return model, new_processor(model, processor.tokenizer)


def packs_of(folder: Path, arm: str) -> Path:
    return folder / arm / "packs"


def run_arm(arm: str, seed: int, options) -> dict:
    folder: Path = options.folder / "condition_images"
    model, processor = start_of(arm, seed, options)
    counts = {name: sum(e["rows"] for e in read_manifest(packs_of(folder, name))["shards"]) for name in ARMS}
    steps = round(options.steps * counts[arm] / counts["with"])
    held_out = HeldOut({"": PackedDataset(packs_of(folder / "held_out", arm), model, processor)})
    result = train_arm(folder, model, processor, packs_of(folder, arm), held_out, steps, seed)
    model.config.image_generation |= IMAGE_GENERATION
    evaluator = Evaluator(model.eval(), processor, seed=0)
    rng = random.Random("condition images, dev")
    scenes = [sample_scene(rng, training=False) for _ in range(CAPTIONS)]
    scores = {"captions": captions(evaluator, scenes), "edits": edits(draw_edits(evaluator, EDITS, "dev"))["overall"]}
    return result | {"final": result["final"] | {name: interval["score"] for name, interval in scores.items()}}


def main() -> None:
    options = parse(__doc__, ("joint", "start"), steps=1500, documents=27_000)
    folder = begin("condition_images", options)
    for arm in ARMS:
        model, processor = start_of(arm, 1, options)
        code_documents(folder / arm, model, processor, options.documents, MIXTURE, EXTRACTION, PACKS)
        code_documents(folder / "held_out" / arm, model, processor, options.held_out, MIXTURE, HELD_OUT)
    conclude("condition_images", CLAIMS, run_arms(folder, run_arm, ARMS, options), options)


if __name__ == "__main__":
    main()
