"""The joint cross-entropy against all logits at once, forward and backward: `python -m benchmarks.loss --json`.

Three sizes, of width 512: 4,096 positions over 152,064 text rows and 32,768 codes, as in the paper; 1,024 over 30,000
and 16,384; 1,024 over 3,000 and 1,024. Extra memory is the most that tensors took at once beyond the inputs and the
gradients of hidden states and rows, which every way of computing them needs, by torch's own count. Times alternate.
"""

import argparse
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from transformers_nextflow.losses import joint_cross_entropy

from .harness import interleaved_seconds, machine, median, report


def naive(hidden, text_rows, code_rows, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, by torch's own cross-entropy."""
    logits = torch.cat([F.linear(hidden, text_rows), F.linear(hidden, code_rows)], dim=-1)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()


def chunked(hidden, text_rows, code_rows, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    heads = [head_of(rows) for rows in (text_rows, code_rows)]
    return joint_cross_entropy(hidden, heads, len(text_rows) + len(code_rows), targets, weights)


def head_of(rows: nn.Parameter) -> nn.Linear:
    """As of the model."""
    with torch.device("meta"):
        head = nn.Linear(rows.shape[1], len(rows), bias=False)
    head.weight = rows
    return head


MEMORY = "[memory]"  # the profiler's name of an allocation, and of its end
LOSSES = {"naive": naive, "chunked": chunked}
SIZES = {
    "paper": {"positions": 4096, "width": 512, "text_rows": 152_064, "codes": 32_768},
    "46k rows": {"positions": 1024, "width": 512, "text_rows": 30_000, "codes": 16_384},
    "4k rows": {"positions": 1024, "width": 512, "text_rows": 3_000, "codes": 1_024},
}


def new_inputs(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, rows, targets and weights. Drawn in place, so that the inputs are all that is held."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for rows in (sizes["positions"], sizes["text_rows"], sizes["codes"]):
        tensor = torch.empty(rows, sizes["width"], device=device, dtype=dtype).normal_(generator=generator)
        tensors.append(nn.Parameter(tensor.mul_(sizes["width"] ** -0.25)))  # logits of variance 1
    total = sizes["text_rows"] + sizes["codes"]
    targets = torch.randint(total, (sizes["positions"],), device=device, generator=generator)
    return *tensors, targets, torch.rand(sizes["positions"], device=device, generator=generator)


def step(name: str, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Loss and gradients, which replace those of the step before."""
    for tensor in inputs:
        tensor.grad = None
    total, _ = LOSSES[name](*inputs)
    (total / inputs[-1].sum()).backward()
    return [total.detach(), *(tensor.grad for tensor in inputs[:3])]


def extra_bytes(name: str, inputs: tuple[torch.Tensor, ...], device: torch.device) -> int:
    """The most that tensors took at once, but for inputs and gradients."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradients = step(name, inputs)[1:]
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            gradients = step(name, inputs)[1:]
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == MEMORY]
        events.sort(key=lambda event: event.start_ns())
        peak = max(accumulate(event.nbytes() for event in events))
    return peak - sum(gradient.nbytes for gradient in gradients)


def measure(sizes: dict[str, int], repeats: int, device: torch.device, dtype: torch.dtype) -> dict:
    inputs = new_inputs(sizes, device, dtype)
    memory = {}
    for name in LOSSES:
        for tensor in inputs:
            tensor.grad = None
        memory[name] = extra_bytes(name, inputs, device)
    expected, ours = step("naive", inputs), step("chunked", inputs)
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected)]
    del expected, ours
    seconds = interleaved_seconds({name: lambda name=name: step(name, inputs) for name in LOSSES}, repeats, device)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "sizes": sizes,
        "extra_bytes": memory,
        "seconds": medians,
        "memory_ratio": round(memory["chunked"] / memory["naive"], 4),
        "time_ratio": round(medians["chunked"] / medians["naive"], 4),
        "relative_differences": dict(zip(("loss", "hidden", "text_rows", "codes"), differences)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, nargs="+", default=list(SIZES), help="of the sizes")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    result = {name: measure(SIZES[name], arguments.repeats, arguments.device, dtype) for name in arguments.only}
    result |= {"dtype": arguments.dtype, "machine": machine(arguments.device), "seed": 0}
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
