"""What the recipe's stages share: batches drawn by number, the trainers' settings, resuming, the log."""

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from transformers_nextflow.training.checkpoints import newest_checkpoint
from transformers_nextflow.utils.files import write_atomically

FINISHED = "finished"
LOGGING_STEPS = 25
TRIM_STEPS = 50
WAITING = timedelta(hours=12)


def processes() -> int:
    """Of torchrun; 1 outside of it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_share(items: int) -> int:
    """How many of a step's items each of the processes takes.

    Raises:
        ValueError: if they cannot be shared evenly, as the steps would not be the recipe's.
    """
    if items % processes():
        raise ValueError(f"the {items} items of a step cannot be shared by {processes()} processes evenly")
    return items // processes()


def gloo_of_cpus() -> str | None:
    """What torchrun's processes talk by where there is no GPU; theirs talk as torch has it."""
    return "gloo" if processes() > 1 and not torch.cuda.is_available() else None


def process_state() -> PartialState:
    """Which of torchrun's processes this is. They wait for each other for hours, in which one codes documents."""
    return PartialState(cpu=not torch.cuda.is_available(), backend=gloo_of_cpus(), timeout=WAITING)


def bfloat16_is_fast() -> bool:
    """Whether there is a GPU or a CPU with AMX; on any other CPU products in float32 take a fifth of the time."""
    return torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16", False)


def settings(steps: int, peak: float, decay_share: float = 1.0) -> dict:
    """Training arguments of every stage: AdamW, bfloat16 where it is fast; the rate stays at its peak and falls to a
    fiftieth of it along a cosine over the last share of the steps."""
    warmup = min(100, steps // 10)
    decay = min(int(decay_share * steps), steps - warmup)
    return {
        "max_steps": steps,
        "learning_rate": peak,
        "warmup_steps": warmup,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": decay, "min_lr_ratio": 0.02},
        "weight_decay": 0.05,
        "adam_beta2": 0.95,
        "bf16": bfloat16_is_fast(),
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": gloo_of_cpus(),
        "ddp_find_unused_parameters": False,
        "logging_steps": LOGGING_STEPS,
        "save_steps": 200,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }


class Drawn(Dataset):
    """`count` items, each drawn from a generator of its own name and number."""

    def __init__(self, name: str, count: int, draw: Callable[[random.Random], dict]):
        self.name, self.count, self.draw = name, count, draw

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.draw(random.Random(f"{self.name} {index}"))


class Log(TrainerCallback):
    """A JSON line for everything that is logged, with the seconds that a stage has taken over all its runs."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter() - self._seconds_until(state.global_step)

    def _seconds_until(self, step: int) -> float:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [row for row in map(json.loads, lines) if row["stage"] == self.stage and row["step"] <= step]
        return rows[-1]["seconds"] if rows else 0.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        row = {"stage": self.stage, "step": state.global_step}
        row["seconds"] = round(time.perf_counter() - self.started, 1)
        row |= {name: round(value, 4) for name, value in logs.items()}
        text = self.path.read_text() if self.path.exists() else ""
        write_atomically(self.path, lambda partial: partial.write_text(text + json.dumps(row) + "\n"))


class Trim(TrainerCallback):
    """Gives freed memory back to the system now and then: where glibc is told to keep it for speed (`README.md`), a
    process grows by gigabytes in some hundred steps."""

    def on_step_end(self, args, state, control, **kwargs):
        if sys.platform == "linux" and state.global_step % TRIM_STEPS == 0:
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_finished(folder: Path) -> bool:
    """Whether a stage has saved all of its model."""
    return (folder / FINISHED).exists()


def finish(trainer: Trainer, before_saving: Callable[[], None] | None = None) -> None:
    """Train from the newest whole checkpoint if there is one, and save the model, after `before_saving`."""
    folder = Path(trainer.args.output_dir)
    trainer.add_callback(Log(folder.parent / "log.jsonl", folder.name))
    trainer.add_callback(Trim())
    # fused attention has a slow backward at these lengths on a CPU
    with sdpa_kernel(SDPBackend.MATH) if trainer.args.use_cpu else nullcontext():
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    if before_saving is not None:
        before_saving()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (folder / FINISHED).touch()
    trainer.accelerator.wait_for_everyone()
