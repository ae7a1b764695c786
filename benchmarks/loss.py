"""The joint cross-entropy against all logits at once, forward and backward: `python -m benchmarks.loss --json`.

4,096 positions of width 512 over 152,064 text rows and 32,768 codes, as in the paper. Extra memory is the most that a
fresh process held beyond its inputs: logits, what is kept for the backward, and the gradients of hidden states and
rows. Times alternate within one process.
"""

import argparse
import multiprocessing
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from transformers_nextflow.losses import joint_cross_entropy

from .harness import interleaved_seconds, machine, median, report


def naive(hidden, text_rows, code_rows, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, by torch's own cross-entropy."""
    logits = torch.cat([F.linear(hidden, text_rows), F.linear(hidden, code_rows)], dim=-1)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()


def chunked(hidden, text_rows, code_rows, targets, weights) -> tuple[torch.Tensor, torch.Tensor]:
    heads = [partial(F.linear, weight=rows) for rows in (text_rows, code_rows)]
    return joint_cross_entropy(hidden, heads, len(text_rows) + len(code_rows), targets, weights)


LOSSES = {"naive": naive, "chunked": chunked}


def new_inputs(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, rows, targets and weights. Drawn in place, so that the inputs are all that is held."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for rows in (sizes["positions"], sizes["text_rows"], sizes["codes"]):
        tensor = torch.empty(rows, sizes["width"], device=device, dtype=dtype).normal_(generator=generator)
        tensors.append(tensor.mul_(sizes["width"] ** -0.25).requires_grad_())  # logits of variance 1
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


def held_bytes(field: str) -> int:
    """`VmRSS`, what this process holds now, or `VmHWM`, the most it ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def extra_bytes(name: str, sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> int:
    """Run in a fresh process."""
    step(name, new_inputs(dict.fromkeys(sizes, 64), device, dtype))  # libraries take their own memory
    inputs = new_inputs(sizes, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(name, inputs)
        return torch.cuda.max_memory_allocated(device) - before
    before = held_bytes("VmRSS")
    step(name, inputs)
    return held_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--text-rows", type=int, default=152_064, metavar="N", help="default: %(default)s")
    parser.add_argument("--codes", type=int, default=32_768, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("positions", "width", "text_rows", "codes")}
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    memory = {}
    for name in LOSSES:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory[name] = process.apply(extra_bytes, (name, sizes, device, dtype))

    inputs = new_inputs(sizes, device, dtype)
    expected, ours = step("naive", inputs), step("chunked", inputs)
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected)]
    del expected, ours
    seconds = interleaved_seconds(
        {name: lambda name=name: step(name, inputs) for name in LOSSES}, arguments.repeats, device
    )
    medians = {name: median(values) for name, values in seconds.items()}
    result = {
        "sizes": sizes | {"dtype": arguments.dtype},
        "extra_bytes": memory,
        "seconds": medians,
        "memory_ratio": round(memory["chunked"] / memory["naive"], 4),
        "time_ratio": round(medians["chunked"] / medians["naive"], 4),
        "relative_differences": dict(zip(("loss", "hidden", "text_rows", "codes"), differences)),
        "machine": machine(device),
        "seed": 0,
    }
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
