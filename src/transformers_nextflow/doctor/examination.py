"""The checks in order, and the diagnosis they make.

What must hold exactly comes first, on the picture's way through tokenizer, shards, transformer and sampling; what is
told from means comes after it. So the first alarm is the likely cause, and later ones may be its consequences.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from . import losses, prompts, sampling, tokenizer, transformer, weights
from .case import Case
from .findings import ERROR, Check, Finding, Verdict
from .pictures import Picture, default_pictures


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the likely cause of trouble first among the alarms.

    Attributes:
        findings: one of every check, in the order of [`checks`].
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

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "fault": self.first.fault if self.first else None,
            "findings": [asdict(finding) for finding in self.findings],
            "curves": self.curves,
            "seconds": round(self.seconds, 2),
        }


def checks(case: Case) -> list[tuple[Callable[[Case], Finding], str]]:
    """All checks that a case has the material for, with their parts, in order."""
    listed = [
        (weights.check_finite, "transformer"),
        (tokenizer.check_processor, "tokenizer"),
        (tokenizer.check_quantizer, "tokenizer"),
        (tokenizer.check_self_correction, "tokenizer"),
    ]
    if case.packs is not None:
        from . import shards

        listed += [
            (shards.check_files, "shards"),
            (shards.check_whose, "shards"),
            (shards.check_round_trip, "shards"),
            (shards.check_correction_shares, "shards"),
            (shards.check_targets_again, "shards"),
            (shards.check_correction_strength, "shards"),
        ]
    listed += [
        (prompts.check_prompts, "transformer"),
        (transformer.check_positions, "transformer"),
        (transformer.check_inputs, "transformer"),
        (transformer.check_attention, "transformer"),
        (transformer.check_responses, "transformer"),
        (transformer.check_decoder, "transformer"),
        (transformer.check_targets, "transformer"),
        (sampling.check_sampling, "sampling"),
        (sampling.check_guidance, "sampling"),
        (sampling.check_draws, "sampling"),
        (tokenizer.check_codebook, "tokenizer"),
        (tokenizer.check_residuals, "tokenizer"),
        (tokenizer.check_reconstruction, "tokenizer"),
        (tokenizer.check_semantics, "tokenizer"),
        (weights.check_code_embeddings, "transformer"),
        (weights.check_trained, "transformer"),
        (transformer.check_text, "transformer"),
    ]
    listed.append((losses.check_losses, "transformer"))
    if case.packs is not None:
        listed.append((losses.check_copying, "transformer"))
    return listed + [(transformer.check_prompt_gain, "transformer"), (sampling.check_ladder, "sampling")]


@torch.no_grad()
def examine(
    model,
    processor,
    packs: str | Path | None = None,
    pictures: Sequence[Picture] | None = None,
    text_source=None,
    seed: int = 0,
    stop_at_first: bool = False,
    on_check: Callable[[Finding], None] | None = None,
) -> Diagnosis:
    """Examine a NextFlow model, and the shards it is trained on.

    Args:
        model: [`NextFlowForConditionalGeneration`]; whether it trains, and the random state, are as before afterwards.
        processor: its [`NextFlowProcessor`].
        packs: folder of packed shards.
        pictures: see [`~transformers_nextflow.doctor.pictures.read_pictures`]; by default drawn ones and photographs.
        text_source: a model whose text logits the checkpoint must have kept.
        seed: of all draws.
        stop_at_first: leave out what comes after the first alarm.
        on_check: called with each finding.
    """
    start, training = time.perf_counter(), model.training
    findings = []
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        pictures = default_pictures(model.model.vq_model.schedules, seed) if pictures is None else list(pictures)
        case = Case(model, processor, pictures, None if packs is None else Path(packs), text_source, seed)
        for run, part in checks(case):
            finding = _run(run, part, case)
            findings.append(finding)
            if on_check is not None:
                on_check(finding)
            if stop_at_first and finding.is_alarm:
                break
    model.train(training)
    return Diagnosis(findings, case.curves, case.images, time.perf_counter() - start)


def _run(run: Callable[[Case], Finding], part: str, case: Case) -> Finding:
    """A check's finding; a model that raises is a finding too."""
    try:
        return run(case)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        check = Check(run.__name__.removeprefix("check_").replace("_", " "), part, "the code runs")
        verdict = Verdict("the code raises", "code and checkpoint do not fit each other", "run this part alone")
        return check.failed(f"{type(error).__name__}: {error}", verdict, ERROR)
