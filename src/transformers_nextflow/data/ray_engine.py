"""Extraction as a Ray Data pipeline: the same shards, made by actors on the machines of a cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.data

if TYPE_CHECKING:
    from .extraction import Extractor


class ShardExtractor:
    """An actor with its own vision tokenizer; each row of a batch is the index of a shard to write."""

    def __init__(self, make_extractor: "Callable[[str], Extractor]", device: str, output: Path):
        self.extractor, self.output = make_extractor(device), output

    def __call__(self, batch: dict) -> dict:
        for index in batch["shard"]:
            self.extractor.extract_shard(int(index), self.output)
        return batch


def run_on_ray(
    make_extractor: "Callable[[str], Extractor]", device: str, num_proc: int, output: Path, shards: list[int]
) -> None:
    """Write the named shards with `num_proc` actors, each with an extractor on `device`; of GPUs each takes one, which
    Ray chooses."""
    if not shards:
        return
    on_gpu = device.startswith("cuda")
    pipeline = ray.data.from_items([{"shard": index} for index in shards]).map_batches(
        ShardExtractor,
        fn_constructor_args=(make_extractor, "cuda" if on_gpu else device, output.resolve()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_proc),
        num_gpus=1 if on_gpu else None,
    )
    for _ in pipeline.iter_batches(batch_size=1):
        pass
