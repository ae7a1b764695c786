"""Operations of a training forward, and graphs that compiling takes: `python -m benchmarks.forward --json`.

Counted are ATen operations that compute, views left out, of what puts pictures into the decoder's inputs, forward and
backward, and of the whole forward; those whose result the host waits for are named. Pictures are table 14's, of as
many grids as there are pictures; the decoder is tiny, as its width changes no count.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.layout import build_layout, num_image_slots

from .harness import machine, report

BOI, EOI, IMAGE, CODES = 1, 2, 3, 512
VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "split"}
VIEWS |= {"detach", "alias", "as_strided", "permute", "split_with_sizes", "unbind"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class Operations(TorchDispatchMode):
    """Counts those that compute, and those that the host waits for."""

    def __init__(self):
        super().__init__()
        self.counts, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith(("index.", "index_put", "_index_put")) or name == "index" else ()
        if name not in VIEWS:
            self.counts[name] += 1
        if name in WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def tiny_model() -> NextFlowForConditionalGeneration:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 65536}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vq = {"codebook_size": CODES, "semantic_config": vision, "base_channels": 8, "latent_channels": 8}
    torch.manual_seed(0)
    ids = {"boi_token_id": BOI, "eoi_token_id": EOI, "image_token_id": IMAGE}
    return NextFlowForConditionalGeneration(NextFlowConfig(text_config=text, vq_config=vq, **ids)).train()


def batch_of(model, level: str, pictures: int, rng: np.random.Generator) -> dict:
    """A packed row of texts of random length with a picture after each, supervised."""
    schedules = model.model.schedules.of_level(level)
    chosen = [schedules[index] for index in rng.permutation(len(schedules))[:pictures]]
    rows = [
        [*rng.integers(4, 64, rng.integers(3, 40)), BOI, *[IMAGE] * num_image_slots(schedule), EOI]
        for schedule in chosen
    ]
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(rows))[None],
        "document_ids": torch.from_numpy(np.repeat(np.arange(pictures), [len(row) for row in rows]))[None],
        "image_grid_hw": torch.tensor([schedule.final_grid for schedule in chosen]),
        "image_codes": torch.from_numpy(rng.integers(0, CODES, sum(schedule.num_codes for schedule in chosen))),
    }
    layout = build_layout(model.config, **inputs, labels=inputs["input_ids"])
    return inputs | {"layout": layout, "logits_over": "none", "use_cache": False}


def count(model, batch: dict) -> dict:
    """Operations of each part."""
    inner, counted = model.model, {}
    embeds = inner.get_input_embeddings()(batch["input_ids"])
    parts = (inner.code_embeddings, inner.connector, inner.scale_embedding)
    weights = [weight for part in parts for weight in part.parameters()]
    with Operations() as counted["pictures_forward"]:
        inputs = inner.embed_images(embeds, batch["layout"], batch["image_codes"])
    with Operations() as counted["pictures_backward"]:
        torch.autograd.grad(inputs, [embeds, *weights], torch.ones_like(inputs))
    with torch.no_grad(), Operations() as counted["forward"]:
        model(**batch)
    return {
        name: {"operations": operations.counts.total(), "waits": dict(operations.waits)}
        for name, operations in counted.items()
    }


def graphs(model, batches: list[dict]) -> list[int]:
    """How many graphs have been compiled after each batch, by a forward that must be one."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    numbers = []
    for batch in batches:
        compiled(**batch).loss.backward()
        numbers.append(counter.frame_count)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="256", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="compiled for (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    model, rng = tiny_model(), np.random.default_rng(0)
    batches = [batch_of(model, arguments.level, arguments.pictures, rng) for _ in range(arguments.batches)]
    result = {
        "level": arguments.level,
        "pictures": arguments.pictures,
        "positions": [batch["input_ids"].shape[1] for batch in batches],
        **count(model, batches[0]),
        "graphs_after_each_batch": graphs(model, batches),
        "machine": machine(torch.device("cpu")),
        "seed": 0,
    }
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
