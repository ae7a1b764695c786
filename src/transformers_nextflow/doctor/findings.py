"""What a check returns, and when figures differ by more than chance or rounding.

Two rules decide everything; no check has a threshold of its own.

- Equalities hold to half of the digits of the dtype (`tolerance`): rounding in a forward stays below by orders of
  magnitude, and a wrong formula lies above by orders.
- Means over pictures are compared in their own standard errors (`z_score`), pictures being the independent draws.
"""

import math
from dataclasses import dataclass, field

import torch

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
SIGNIFICANT = 4.0
"""Standard errors that count as more than chance: one in 30,000 for many pictures, one in 1,000 for 12."""
ENOUGH = 12
"""Pictures below which a mean says nothing."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: name of the check.
        part: `"tokenizer"`, `"shards"`, `"transformer"` or `"sampling"`.
        severity: `"ok"`; `"note"`, a figure without a verdict; `"warning"`, a figure that chance hardly explains;
            `"error"`, a formula of the model that does not hold, or a file that is not what was written.
        fault: name of what is wrong, `None` where nothing is.
        measured, expected: sentences with figures.
        cause, next_step: sentences, empty where nothing is wrong.
        figures: the numbers behind `measured`, for JSON.
    """

    check: str
    part: str
    severity: str
    measured: str
    expected: str
    fault: str | None = None
    cause: str = ""
    next_step: str = ""
    figures: dict = field(default_factory=dict)

    @property
    def is_alarm(self) -> bool:
        return self.severity in (WARNING, ERROR)


@dataclass(frozen=True)
class Verdict:
    """A fault's name, its likely cause, and what to do next."""

    fault: str
    cause: str
    next_step: str


class Check:
    """Findings of one check, which say in common what was expected."""

    def __init__(self, name: str, part: str, expected: str):
        self.name, self.part, self.expected = name, part, expected

    def passed(self, measured: str, **figures) -> Finding:
        return Finding(self.name, self.part, OK, measured, self.expected, figures=figures)

    def noted(self, measured: str, **figures) -> Finding:
        return Finding(self.name, self.part, NOTE, measured, self.expected, figures=figures)

    def failed(self, measured: str, verdict: Verdict, severity: str = ERROR, **figures) -> Finding:
        fault, cause, step = verdict.fault, verdict.cause, verdict.next_step
        return Finding(self.name, self.part, severity, measured, self.expected, fault, cause, step, figures)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference up to which two computations of one quantity count as equal: 3e-4 in float32."""
    return math.sqrt(torch.finfo(dtype).eps)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, infinite for other shapes or values that are not finite."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if a.numel() == 0:
        return 0.0
    value = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
    return value if math.isfinite(value) else math.inf


def z_score(values: torch.Tensor) -> float:
    """Mean of independent (N,) values in its standard error; 0 for fewer than [`ENOUGH`]."""
    values = values.detach().double().cpu()
    if len(values) < ENOUGH:
        return 0.0
    error = float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def alignment(a_ND: torch.Tensor, b_NE: torch.Tensor, seed: int, draws: int = 300) -> tuple[float, float]:
    """Linear centred kernel alignment of two sets of features, and its standard deviations above shuffled rows."""
    kernels = [(rows - rows.mean(0)) @ (rows - rows.mean(0)).T for rows in (a_ND.double(), b_NE.double())]
    a, b = (kernel / kernel.norm().clamp(min=1e-12) for kernel in kernels)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(a), generator=generator) for _ in range(draws)]
    chance = torch.stack([(a[order][:, order] * b).sum() for order in orders])
    value = float((a * b).sum())
    return value, (value - float(chance.mean())) / max(float(chance.std()), 1e-12)
