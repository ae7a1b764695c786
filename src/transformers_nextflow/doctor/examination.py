"""The checks in order, and the diagnosis they make.

What must hold exactly comes first, on the picture's way through weights, tokenizer, shards, transformer and sampling;
what is told from means comes after it. So the first alarm is the likely cause, and later ones may be its consequences.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from . import documents, losses, prompts, sampling, shards, tokenizer, transformer, weights
from .case import Case
from .findings import UNCHECKED, Check, Finding
from .pictures import Picture, default_pictures

CHECKS = (
    *(weights.finite, prompts.prompts, shards.files, shards.whose),
    *(documents.frames, documents.varied),
    *(sampling.forced, sampling.guidance),
    *(tokenizer.reconstruction, tokenizer.parts, tokenizer.codes, tokenizer.semantics),
    *(shards.codes, shards.correction, weights.values, weights.copies, weights.spectra, weights.code_rows),
    *(transformer.parts, losses.confidence, losses.familiar, losses.scales),
    *(documents.ends, documents.conditions, documents.worth, sampling.draws),
)
ON_SHARDS = ("shards", "documents", "losses")
PARTS = {"losses": "transformer", "prompts": "transformer", "documents": "transformer"}


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the likely cause of trouble first among the alarms.

    Attributes:
        findings: one of every check, in the order of [`CHECKS`].
        curves: per-scale figures by title and line.
        images: rows of pictures by title.
        seconds: what the examination took.
    """

    findings: list[Finding]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    images: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_alarm]

    @property
    def first(self) -> Finding | None:
        """The first alarm, or `None`."""
        return next(iter(self.alarms), None)

    @property
    def headline(self) -> str:
        """The outcome, and what could not be checked, and why."""
        reasons: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.severity == UNCHECKED:
                reasons.setdefault(finding.measured, []).append(finding.check)
        outcome = f"Nothing wrong was found in {len(self.findings) - sum(map(len, reasons.values()))} checks."
        if self.first is not None:
            others = len(self.alarms) - 1
            outcome = f"Most likely: {self.first.fault} ({self.first.check})."
            outcome += f" {others} further alarm{'s' * (others > 1)} may follow from it." if others else ""
        unchecked = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        return outcome + (f" Not checked: {unchecked}." if unchecked else "")

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "fault": self.first.fault if self.first else None,
            "headline": self.headline,
            "findings": [asdict(finding) for finding in self.findings],
            "curves": self.curves,
            "seconds": round(self.seconds, 2),
        }


@torch.no_grad()
def examine(
    model,
    processor,
    packs: str | Path | None = None,
    pictures: Sequence[Picture] | None = None,
    seed: int = 0,
    on_check: Callable[[Finding], object] | None = None,
) -> Diagnosis:
    """Examine a NextFlow model, and the shards it is trained on.

    Args:
        model: [`NextFlowForConditionalGeneration`]; whether it trains, and the random state, are as before afterwards.
        processor: its [`NextFlowProcessor`].
        packs: folder of shards.
        pictures: see [`~transformers_nextflow.doctor.pictures.read_pictures`]; by default drawn ones.
        seed: of all draws.
        on_check: called with each finding.
    """
    start, training = time.perf_counter(), model.training
    findings = []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            pictures = default_pictures(model.model.vq_model.schedules, seed) if pictures is None else list(pictures)
            case = Case(model, processor, pictures, None if packs is None else Path(packs), seed)
            for run in CHECKS:
                findings.append(_run(run, case))
                if on_check is not None:
                    on_check(findings[-1])
    finally:
        model.train(training)
    return Diagnosis(findings, case.curves, case.images, time.perf_counter() - start)


def _run(run: Callable[[Check, Case], Finding], case: Case) -> Finding:
    """A check's finding; a model that raises is a finding too."""
    part = run.__module__.rpartition(".")[2]
    check = Check(run.__name__.replace("_", " "), PARTS.get(part, part), " ".join(run.__doc__.split()))
    if part in ON_SHARDS and case.packs is None:
        return check.unchecked("no shards were given")
    try:
        return run(check, case)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError, OSError) as error:
        cause = "code, checkpoint and shards do not fit each other"
        return check.failed(f"{type(error).__name__}: {error}", "the code raises", cause, "run this part alone")
