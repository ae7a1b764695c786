"""The checks in order, and the diagnosis they make: what must hold exactly first, what is told from means after it, so
that the first alarm is the likely cause, and later ones may be its consequences."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from . import alterations, documents, sampling, shards, tokenizer, weights
from .case import Case
from .findings import ERROR, UNCHECKED, WARNING, Finding
from .pictures import Picture, default_pictures

EXACT: tuple = (weights.finite, sampling.prompts, shards.files, shards.whose, documents.frames, documents.varied)
EXACT += (sampling.forced, sampling.guidance)
MEANS: tuple = (tokenizer.reconstruction, tokenizer.parts, tokenizer.codes, tokenizer.semantics, shards.codes)
MEANS += (shards.correction, weights.values, weights.copies, weights.spectra, weights.code_rows, alterations.parts)
MEANS += (documents.confidence, documents.familiar, documents.scales, documents.ends, documents.conditions)
MEANS += (sampling.draws,)
COMPARE = "compare weights and config.json with the training's own checkpoint"
MODULES = {  # of checks: the part that they examine, and what to do
    "weights": ("weights", COMPARE),
    "tokenizer": ("tokenizer", "reconstruct pictures (`transformers-nextflow reconstruct`) with its own checkpoint"),
    "shards": ("shards", "compare the tokenizer with the one that made the shards, and extract them anew"),
    "alterations": ("transformer", COMPARE),
    "documents": ("transformer", "read documents beside their pictures (`transformers-nextflow data inspect`)"),
    "sampling": ("sampling", "compare config.json, tokenizer.json and the chat template with the training's own"),
}


@dataclass(frozen=True)
class Diagnosis:
    """One finding of every check, in their order; per-scale figures by title and line, rows of pictures by title, and
    the seconds that the examination took."""

    findings: list[Finding]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    images: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fault]

    @property
    def first(self) -> Finding | None:
        """The first alarm, or `None`."""
        return next(iter(self.alarms), None)

    @property
    def headline(self) -> str:
        """The outcome, and what could not be checked, and why."""
        unchecked = defaultdict(list)
        for finding in self.findings:
            if finding.severity == UNCHECKED:
                unchecked[finding.measured].append(finding.check)
        outcome = f"Nothing wrong was found in {len(self.findings) - sum(map(len, unchecked.values()))} checks."
        if self.first is not None:
            others = len(self.alarms) - 1
            outcome = f"Most likely: {self.first.fault} ({self.first.check})."
            outcome += f" {others} further alarm{'s' * (others > 1)} may follow from it." if others else ""
        reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in unchecked.items())
        return outcome + (f" Not checked: {reasons}." if reasons else "")

    def to_dict(self) -> dict:
        """For JSON."""
        outcome = {"fault": self.first and self.first.fault, "headline": self.headline}
        findings, seconds = [asdict(finding) for finding in self.findings], round(self.seconds, 2)
        return outcome | {"findings": findings, "curves": self.curves, "seconds": seconds}


@torch.no_grad()
def examine(
    model,
    processor,
    packs: str | Path | None = None,
    pictures: Sequence[Picture] | None = None,
    seed: int = 0,
    on_check: Callable[[Finding], object] = lambda finding: None,
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
    start, training, findings = time.perf_counter(), model.training, []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            pictures = default_pictures(model.model.vq_model.schedules, seed) if pictures is None else list(pictures)
            case = Case(model, processor, pictures, None if packs is None else Path(packs), seed)
            for run in (*EXACT, *MEANS):
                findings.append(_run(run, case))
                on_check(findings[-1])
    finally:
        model.train(training)
    return Diagnosis(findings, case.curves, case.images, time.perf_counter() - start)


def _run(run: Callable[[Finding, Case], Finding], case: Case) -> Finding:
    """A check's finding; a model that raises is a finding too."""
    module, severity = run.__module__.rpartition(".")[2], ERROR if run in EXACT else WARNING
    part, next_step = MODULES[module]
    check = Finding(run.__name__.replace("_", " "), part, " ".join(run.__doc__.split()), severity, next_step)
    if module in ("shards", "documents") and case.packs is None:
        return check.unchecked("no shards were given")
    try:
        return run(check, case)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError, OSError) as error:
        return check.verdict(f"{type(error).__name__}: {error}", {"the code raises": True})
