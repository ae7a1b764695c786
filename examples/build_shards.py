"""The shapes world as packed training shards: `python -m examples.build_shards --output runs/shapes-packs`.

Documents of every task are drawn into a Parquet file of the one schema, then extracted, packed and verified as any
other source is.
"""

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from transformers_nextflow import SelfCorrection
from transformers_nextflow.cli import model_name
from transformers_nextflow.data import ComputeBudget, ExtractionSettings, verify

from .shapes.documents import build_packs

MIXTURE = {"t2i": 0.4, "caption": 0.12, "vqa": 0.08, "edit": 0.2, "story": 0.1, "text": 0.1}
CORRECTION = SelfCorrection(probability=0.5, token_share=(0.0, 0.6), top_k=4)


def build(output: Path, model: str, count: int, length: int, multiple_of: int = 1, seed: int = 0) -> dict:
    """Draw, extract, pack and verify; returns the report of `verify`."""
    settings = ExtractionSettings("chat", drop_text=0.1, self_correction=CORRECTION, variants=2, seed=seed)
    packs = build_packs(output, model, count, MIXTURE, settings, ComputeBudget(length), multiple_of)
    return verify(packs, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes-packs"), help="default: %(default)s")
    parser.add_argument("--model", help="local folder or Hub id (default: the repository's checkpoint)")
    parser.add_argument("--documents", type=int, default=2_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=2_048, metavar="N", help="of a pack (default: %(default)s)")
    parser.add_argument("--multiple-of", type=int, default=1, metavar="N", help="ranks x accumulation steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    report = build(
        arguments.output,
        model_name(arguments.model),
        arguments.documents,
        arguments.length,
        arguments.multiple_of,
        arguments.seed,
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
