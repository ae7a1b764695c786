"""Checks of the transformer on pictures that it should know: of the shards, or the user's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..scales import ScaleSchedule
from .case import LOOKED_AT, Case
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, z_score


def check_losses(case: Case) -> Finding:
    """The loss of each scale is below the entropy of its codes, and the right codes are the likeliest reading."""
    check = Check(
        "loss of each scale",
        "transformer",
        "a picture's codes cost less than codes drawn by their frequency in other pictures would (unigram), less than "
        "their neighbours in number or place, and less than with other settings of config.json",
    )
    pictures = supervised_pictures(case)
    if len(pictures) < ENOUGH:
        return check.noted(f"{len(pictures)} pictures to predict are too few to say")
    known = case.packs is not None
    return (_misread(case, check, pictures) if known else None) or _judge_losses(case, check, pictures, known)


def other_settings(case: Case) -> list[tuple[str, object, str, object]]:
    """Settings that weights do not show: the fault's name, what holds the setting, its name, another value."""
    mode = "residual" if case.config.feature_mode == "accumulated" else "accumulated"
    others = [("wrong feature mode", case.config, "feature_mode", mode)]
    if case.config.position_scale is not None:
        others.append(("wrong position scale", case.config, "position_scale", None))
    rotary = case.model.model.language_model.rotary_emb
    half = len(rotary.inv_freq)
    for sections in ([1] * half, [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]):
        if sections != list(rotary.mrope_section):
            others.append(("wrong rotary sections", rotary, "mrope_section", sections))
    for base in (1e4, 1e6):
        frequencies = base ** (-torch.arange(half, device=rotary.inv_freq.device) / half)
        if rotary.rope_type == "default" and not torch.allclose(frequencies, rotary.inv_freq):
            others.append(("wrong rotary base", rotary, "inv_freq", frequencies))
    return others


@contextmanager
def other_setting(owner, name: str, value) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@dataclass(frozen=True)
class Supervised:
    """A picture that the model is to predict, as it sees it.

    Attributes:
        codes: (L,) targets.
        log_probs: (L, V).
    """

    schedule: ScaleSchedule
    codes: torch.Tensor
    log_probs: torch.Tensor

    def loss_of(self, codes: torch.Tensor) -> float:
        """Mean cost of (L,) codes; one that is all but impossible counts no more than 30 nats."""
        return float(F.nll_loss(self.log_probs, codes, reduction="none").clamp(max=30).mean())


def supervised_pictures(case: Case) -> list[Supervised]:
    """Those of packs drawn at random, run as in training; without packs, prompts and their answers."""
    if case.packs is not None:
        from .shards import packed_pictures

        if pictures := [Supervised(*picture) for picture in packed_pictures(case)]:
            return pictures
    return [
        Supervised(sequence.schedule, sequence.targets, case.code_logits(sequence).log_softmax(-1))
        for sequence in case.drawn_for
    ]


def _misread(case: Case, check: Check, pictures: list[Supervised]) -> Finding | None:
    """Whether the weights find other codes, or the same under another setting, likelier than what is stored."""
    size, step = case.config.vq_config.codebook_size, "the model was trained on codes of another numbering or order"
    readings: dict[str, tuple[Verdict, list[float]]] = {}
    for shift in (-2, -1, 1, 2):
        name = f"codes numbered {shift:+d}"
        verdict = Verdict("wrong code offset", f"the model finds {name} likelier", f"{step}: compare the offsets")
        readings[name] = verdict, [picture.loss_of((picture.codes + shift) % size) for picture in pictures]
    for shift in (-1, 1):
        name = f"codes {shift:+d} position"
        verdict = Verdict("shifted targets", f"the model finds {name} likelier", f"{step}: compare the targets")
        readings[name] = verdict, [picture.loss_of(picture.codes.roll(shift)) for picture in pictures]
    for fault, owner, name, value in other_settings(case):
        cause = f"the weights were trained with another {name} than config.json says"
        with other_setting(owner, name, value):
            then = [picture.loss_of(picture.codes) for picture in supervised_pictures(case)]
        shown = value if isinstance(value, (str, float, int)) or value is None else f"{str(value)[:30]}..."
        readings[f"{name} = {shown}"] = Verdict(fault, cause, f"compare {name} with the training's"), then
    own = torch.tensor([picture.loss_of(picture.codes) for picture in pictures])
    best = min(readings, key=lambda name: sum(readings[name][1]))
    verdict, values = readings[best]
    if z_score(own - torch.tensor(values)) <= SIGNIFICANT:
        return None
    then = sum(values) / len(values)
    measured = f"{float(own.mean()):.2f} nats a code over {len(own)} pictures, {then:.2f} with {best}"
    return check.failed(measured, verdict, WARNING)


def _judge_losses(case: Case, check: Check, pictures: list[Supervised], known: bool) -> Finding:
    config = case.config.vq_config
    most = max(len(picture.schedule) for picture in pictures)
    loss = [[] for _ in range(most)]
    unigram = [[] for _ in range(most)]
    counts = torch.zeros(most, config.codebook_size)
    for picture in pictures:
        for scale in range(len(picture.schedule)):
            counts[scale] += (
                picture.codes[picture.schedule.slice(scale)].bincount(minlength=config.codebook_size).cpu()
            )
    for picture in pictures:
        schedule, codes, log_probs = picture.schedule, picture.codes, picture.log_probs
        losses = F.nll_loss(log_probs, codes, reduction="none")
        for scale in range(len(schedule)):
            own = codes[schedule.slice(scale)].cpu()
            rest = counts[scale] - own.bincount(minlength=config.codebook_size)
            probability = (rest + 0.5) / (rest.sum() + 0.5 * config.codebook_size)
            loss[scale].append(float(losses[schedule.slice(scale)].mean()))
            unigram[scale].append(float(-probability[own].log().mean()))
    means = {"loss": [float(np.mean(each)) for each in loss], "unigram": [float(np.mean(each)) for each in unigram]}
    case.curves["loss of each scale, nats per code"] = means
    shown = ", ".join(f"{a:.2f} ({b:.2f})" for a, b in zip(means["loss"], means["unigram"]))
    measured = f"loss (unigram) of the scales over {len(pictures)} pictures: {shown}"
    if not known:
        return check.noted(f"{measured}, which it need not have been trained on", **means)
    scores = [z_score(torch.tensor(ours) - torch.tensor(theirs)) for ours, theirs in zip(loss, unigram)]
    above = ", ".join(str(scale + 1) for scale, score in enumerate(scores) if score > SIGNIFICANT)
    if above:
        verdict = Verdict(
            "worse than the unigram",
            f"predicted worse than by the frequencies of codes, at scale {above}: not trained, on other codes, "
            "or inputs are not those of the training",
            "train longer, or compare codes, inputs and positions with the training's",
        )
        measured += f"; above it at scale {above}, by up to {max(scores):.1f} standard errors"
        return check.failed(measured, verdict, WARNING, **means)
    return check.passed(measured, **means)


def check_copying(case: Case) -> Finding:
    """Where an edit changes codes, the model gives the target's more than the source's."""
    check = Check(
        "copying the source",
        "transformer",
        "where the target's codes differ from the condition picture's, the target's are likelier",
    )
    gains, shares = [], []
    from .stored import stored_sequences

    for sequence in stored_sequences(case, LOOKED_AT, edits=True):
        codes = sequence.targets
        source = sequence.inputs["image_codes"][-2 * len(codes) : -len(codes)]
        differ = codes != source
        shares.append(float((~differ).float().mean()))
        if differ.any():
            logits = case.code_logits(sequence)[differ]
            own, copied = (float(F.cross_entropy(logits, each[differ])) for each in (codes, source))
            gains.append(copied - own)
    if len(gains) < ENOUGH:
        return check.noted(f"{len(gains)} edits of a picture of the same size are too few to say", gains=gains)
    gain, score = sum(gains) / len(gains), z_score(torch.tensor(gains))
    measured = (
        f"over {len(gains)} edits, {sum(shares) / len(shares):.0%} of the codes are the source's; at the others the "
        f"target is {gain:.1f} nats likelier ({score:.1f} standard errors)"
    )
    if score > -SIGNIFICANT:
        return check.passed(measured, gain=gain, score=score)
    cause = "handing the source back scores well where most of a picture stays, and the model has learned no more"
    verdict = Verdict("copies the source", cause, "weigh changed regions more, or show more edits that change much")
    return check.failed(measured, verdict, WARNING, gain=gain, score=score)
