"""What a check returns, and when figures differ by more than chance.

Equalities hold to half of the digits of the dtype ([`tolerance`]). Means over independent rows are compared in their
own standard errors ([`z_score`]), and what is better must also save `MATERIAL` of the loss.
"""

import math
from dataclasses import dataclass, field
from functools import partialmethod

import torch

OK, UNCHECKED, WARNING, ERROR = "ok", "unchecked", "warning", "error"
SIGNIFICANT = 4.0
"""Standard errors that count as more than chance: one in 30,000 for many rows, one in 1,000 for 12."""
ENOUGH = 12  # rows, below which a mean says nothing
MATERIAL = 0.02  # share of a loss that an alteration must save to be called better


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        severity: `"ok"`; `"unchecked"`, for the reason in `measured`; `"warning"`, a figure that chance hardly
            explains; `"error"`, something exact that does not hold.
        fault: name of what is wrong, `None` where nothing is; `cause` and `next_step` are empty then.
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
class Check:
    """Makes the findings of one check, which have in common what was expected."""

    name: str
    part: str
    expected: str

    def _found(self, severity: str, measured: str, fault: str | None = None, cause="", next_step="", **figures):
        return Finding(self.name, self.part, severity, measured, self.expected, fault, cause, next_step, figures)

    passed = partialmethod(_found, OK)
    unchecked = partialmethod(_found, UNCHECKED)
    warned = partialmethod(_found, WARNING)
    failed = partialmethod(_found, ERROR)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference up to which two computations of one quantity count as equal: 3e-4 in float32."""
    return math.sqrt(torch.finfo(dtype).eps)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, infinite for other shapes or values that are not finite."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    value = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if a.numel() else 0.0
    return value if math.isfinite(value) else math.inf


def z_score(values: torch.Tensor) -> float:
    """Mean of independent (N,) values in its standard error; 0 for fewer than [`ENOUGH`]."""
    values = values.detach().double().cpu()
    if len(values) < ENOUGH:
        return 0.0
    error, mean = float(values.std()) / math.sqrt(len(values)), float(values.mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
