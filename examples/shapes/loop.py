"""What the training stages share: the learning-rate schedule, atomic checkpoints, and the log."""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel


def world() -> tuple[int, int]:
    """(rank, processes); (0, 1) outside of torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine to `floor * peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def save_atomically(state: dict, path: Path) -> None:
    """A kill while writing leaves the previous file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Run:
    """One stage's step counter, optimizer and log, resumed from its last checkpoint if there is one.

    Every batch is drawn from a generator seeded by (stage, step, rank), so a resumed run sees what an undisturbed one
    sees. Under torchrun every process computes its own batch and gradients are averaged. Parameters of lower precision
    are updated through float32 masters. Matrices whose names start with `muon` are updated by Muon, at the step size
    that matches AdamW's, everything else by AdamW.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        modules: torch.nn.Module,
        steps: int,
        peak: float,
        decay: float = 0.05,
        muon: str | None = None,
    ):
        self.stage, self.steps, self.peak, self.modules = stage, steps, peak, modules
        self.path, self.log_path = folder / f"{stage}.pt", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
        self.names, self.parameters = map(list, zip(*named))
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        groups: dict[str, list] = {"muon": [], "matrices": [], "others": []}
        for name, master in zip(self.names, self.masters):
            by_muon = muon is not None and name.startswith(muon) and master.ndim == 2
            groups["muon" if by_muon else "matrices" if master.ndim > 1 else "others"].append(master)
        adamw = [
            {"params": groups["matrices"], "weight_decay": decay},
            {"params": groups["others"], "weight_decay": 0.0},
        ]
        self.optimizers = [torch.optim.AdamW(adamw, lr=peak, betas=(0.9, 0.95))]
        if groups["muon"]:
            self.optimizers.append(
                torch.optim.Muon(groups["muon"], lr=peak, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.step, self.seconds = 0, 0.0
        self.rank, self.processes = world()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            for name, master in zip(self.names, self.masters):
                master.data.copy_(state["modules"][name])
            self.step, self.seconds = state["step"], state["seconds"]
            if not self.done:
                for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def update(self, loss: torch.Tensor, clip: float = 1.0) -> float:
        """Backward and one optimizer step; returns the gradient norm before clipping."""
        loss.backward()
        self._collect_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.peak)
            optimizer.step()
        for parameter, master in zip(self.parameters, self.masters):
            if parameter is not master:
                parameter.data.copy_(master)
            parameter.grad = None
        self.step += 1
        return float(norm)

    def _collect_gradients(self) -> None:
        """Float32 gradients of the masters, averaged over processes."""
        zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad  # noqa: E731, unused on this rank alone
        flat = torch.cat([zero(parameter).flatten().float() for parameter in self.parameters])
        if self.processes > 1:
            dist.all_reduce(flat)
            flat /= self.processes
        for master, gradient in zip(self.masters, flat.split([p.numel() for p in self.masters])):
            master.grad = gradient.view_as(master)

    def save(self) -> None:
        if self.rank != 0:
            return
        modules = self.modules.state_dict()
        modules |= {name: master.detach() for name, master in zip(self.names, self.masters)}
        optimizers = [] if self.done else [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"modules": modules, "optimizers": optimizers, "step": self.step}
        save_atomically({**state, "seconds": self.seconds}, self.path)

    def train(self, step_fn, log_every: int = 50, save_every: int = 500) -> None:
        """Run `step_fn(step) -> dict of floats` to the last step, logging means and saving on the way."""
        started, sums, counts = time.perf_counter() - self.seconds, {}, {}
        while not self.done:
            # fused attention has a slow backward at these lengths on a CPU
            with sdpa_kernel(SDPBackend.MATH):
                row = step_fn(self.step)
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
            self.seconds = time.perf_counter() - started
            if self.rank == 0 and (self.step % log_every == 0 or self.done):
                row = {"stage": self.stage, "step": self.step, "seconds": round(self.seconds, 1)}
                row |= {name: round(value / counts[name], 4) for name, value in sums.items()}
                with open(self.log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                sums, counts = {}, {}
            if self.step % save_every == 0 or self.done:
                self.save()
