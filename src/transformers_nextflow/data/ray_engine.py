"""Extraction as a Ray Data pipeline: the same shards, made by actors on the machines of a cluster."""

from collections.abc import Sequence
from pathlib import Path

import ray
import ray.data

from .extraction import ExtractionSettings, Extractor
from .sources import Source


class ShardExtractor:
    """An actor with its own vision tokenizer; each row of a batch is the index of a shard to write."""

    def __init__(self, source: Source, model: str, settings: ExtractionSettings, device: str, output: Path):
        self.extractor, self.output = Extractor(source, model, settings, device), output

    def __call__(self, batch: dict) -> dict:
        for index in batch["shard"]:
            self.extractor.extract_shard(int(index), self.output)
        return batch


def run_on_ray(
    source: Source,
    model: str,
    settings: ExtractionSettings,
    devices: Sequence[str],
    num_proc: int,
    output: Path,
    shards: list[int],
) -> None:
    """Write the named shards with `num_proc` actors; on GPUs each takes one, which Ray chooses."""
    if not shards:
        return
    on_gpu = devices[0].startswith("cuda")
    pipeline = ray.data.from_items([{"shard": index} for index in shards]).map_batches(
        ShardExtractor,
        fn_constructor_args=(source, model, settings, "cuda" if on_gpu else devices[0], output.resolve()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_proc),
        num_gpus=1 if on_gpu else None,
    )
    for _ in pipeline.iter_batches(batch_size=1):
        pass
