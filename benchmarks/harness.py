"""What benchmarks share: interleaved timing of alternatives, the machine's description, and JSON output."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers
from scipy.stats import t

from transformers_nextflow.utils.files import write_atomically


def interleaved_seconds(
    jobs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each job, `repeats` times in turn after one warm-up each, so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            wait(device)
            started = time.perf_counter()
            job()
            wait(device)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def in_processes(function: Callable, jobs: list[tuple]) -> Iterator[tuple[tuple, object]]:
    """Results of `function(*job)`, with the job, as they come. As many run at once as there are cores, each in a
    process of its own with one thread; what one of them raises is raised here."""
    context = torch.multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,), max_tasks_per_child=1) as pool:
        futures = {pool.submit(function, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 5)


def interval(values: Sequence[float]) -> dict:
    """Mean and half of the 95% interval of a t distribution, which one value has not."""
    half = None
    if len(values) > 1:
        half = round(float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5, 5)
    return {"mean": round(statistics.mean(values), 5), "half_interval": half, "seeds": list(values)}


def machine(device: torch.device) -> dict:
    """Hardware and versions behind a figure."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def report(result: dict, as_json: bool, output: Path | None = None) -> None:
    """Print a result, as JSON or line by line, and write it as JSON to `output` if given."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if output is not None:
        save(result, output)


def save(result: dict, output: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    write_atomically(output, lambda partial: partial.write_text(json.dumps(result, indent=2) + "\n"))


def names_in(result):
    """What a result holds, without its figures."""
    if isinstance(result, dict):
        return {name: names_in(value) for name, value in result.items()}
    return result if isinstance(result, str | bool) else "measured"
