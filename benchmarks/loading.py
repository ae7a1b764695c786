"""Tokens that one process loads in a second, and a plan of a million documents: `python -m benchmarks.loading --json`.

Packs of random codes in the paper's schedules are written to a temporary folder and read in a random order, with the
collator, as training reads them.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from transformers_nextflow import NextFlowVQConfig
from transformers_nextflow.data import ComputeBudget, CostModel
from transformers_nextflow.data.loading import PackReader, PackSampler, collate
from transformers_nextflow.data.packing import Extents
from transformers_nextflow.data.sequences import SequenceSpec
from transformers_nextflow.data.shards import list_schema, write_shard

from .harness import machine, report
from .packing import CODES, SPECIAL, Corpus

PER_PAIR = 1 / (6 * 3584)  # of a position's cost, at the 7B model's width


def write_packs(folder: Path, spec: SequenceSpec, level: str, packs: int, documents: int) -> dict:
    """A manifest of one shard of `packs` packs of `documents` documents each."""
    rows = []
    for number in range(packs):
        corpus = Corpus(spec, level, documents, seed=number)
        ids, flags, grids = zip(*corpus.documents)
        pack = corpus.expand(range(documents))
        rows.append(
            {
                "keys": [f"{number}-{place}" for place in range(documents)],
                "kinds": ["synthetic"] * documents,
                "input_ids": np.concatenate(ids),
                "supervised": np.concatenate(flags),
                "image_grid_hw": np.concatenate(grids).ravel(),
                "image_codes": pack["image_codes"],
                "image_input_codes": np.empty(0),
                "document_lengths": [len(tokens) for tokens in ids],
                "document_tokens": np.bincount(pack["document_ids"]),
                "num_tokens": len(pack["input_ids"]),
                "cost": 1.0,
            }
        )
    shard = write_shard(folder / "data" / "packs.arrow", rows, list_schema(CODES, packs=True))
    return {"shards": [shard], "variants": 0}


def loading_speed(level: str, packs: int, documents: int, seconds: float) -> dict:
    """Read, expand and collate packs in random order for `seconds`."""
    spec = SequenceSpec(NextFlowVQConfig().schedule_table(), SPECIAL, condition_last_scale=False)
    with tempfile.TemporaryDirectory() as folder:
        reader = PackReader(Path(folder), write_packs(Path(folder), spec, level, packs, documents), spec)
        tokens = batches = epoch = 0
        start = time.process_time()
        while time.process_time() - start < seconds:
            for members in PackSampler(packs, epoch=epoch):
                tokens += collate([reader[pack] for pack in members], SPECIAL.pad, False)["input_ids"].numel()
                batches += 1
            epoch += 1
        spent = time.process_time() - start
    return {"tokens_per_cpu_second": tokens / spent, "tokens_per_pack": tokens / batches, "cpu_seconds": spent}


def planning(documents: int, length: int) -> dict:
    """Plan packs of many documents of the mixture's lengths."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.lognormal(np.log(400) - 0.5, 1, documents), 4000).astype(np.int64) + 1
    is_image = rng.random(documents) < 0.35
    tokens[is_image] = 3700 + rng.integers(20, 200, is_image.sum())
    extents = Extents(tokens, tokens * (tokens + 1) // 2 + is_image * 800_000, tokens)
    start = time.process_time()
    packs = ComputeBudget(length).plan(extents, CostModel("blocks", 1.0, PER_PAIR), multiple_of=1024, seed=0)
    return {
        "documents": documents,
        "packs": len(packs),
        "cpu_seconds": time.process_time() - start,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="512", help="of the pictures (default: %(default)s)")
    parser.add_argument("--packs", type=int, default=64, metavar="N", help="on disk (default: %(default)s)")
    parser.add_argument("--documents-per-pack", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of loading (default: %(default)s)")
    parser.add_argument("--planned", type=int, default=1_000_000, metavar="N", help="documents (default: %(default)s)")
    parser.add_argument("--length", type=int, default=32_768, metavar="N", help="most positions of a planned pack")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    arguments = parser.parse_args()
    figures = {
        "plan": planning(arguments.planned, arguments.length),
        "loader": loading_speed(arguments.level, arguments.packs, arguments.documents_per_pack, arguments.seconds),
    }
    figures |= {"machine": machine(torch.device("cpu")), "seed": 0}
    report(figures, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
