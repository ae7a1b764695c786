"""What a check returns, why what it names comes about, and when figures differ by more than chance.

Equalities hold to half of the digits of the dtype ([`tolerance`]). Means over independent rows are compared in their
own standard errors ([`z_score`]), and what is better must also save `MATERIAL` of the loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

OK, UNCHECKED, WARNING, ERROR = "ok", "unchecked", "warning", "error"
SIGNIFICANT = 4.0  # standard errors that chance hardly explains: one in 30,000 for many rows, one in 1,000 for 12
ENOUGH = 12  # rows, below which a mean says nothing
MATERIAL = 0.02  # share of a loss that an alteration must save to be called better
CAUSES = {  # by how names of faults begin, the longest that fits; most names say what is wrong themselves
    "": "damaged, or made otherwise than in training",
    "weights": "trained badly, or cut, rounded, clipped, reset or left out in loading, merging or conversion",
    "weights without effect": "reset, rows in disorder, or of another model",
    "weights too": "these, or those before them, were scaled, reset, or come from elsewhere",
    "re-initialised weights": "not loaded, merged or converted but initialised anew, or entries are in disorder",
    "code": "reset or in another order, or of another table; in part: entries of the table were restarted later",
    "codes of scale": "in another order there, or of another table, or no codes at all",
    "codes missing": "ids went through a number too narrow for them, or part of the table is not searched",
    "damaged": "they do harm: split, joined or ordered otherwise than in training; or parts of several models",
    "wrong": "of a training with another setting, order or scale",
    "transposed weights": "a converter transposed matrices by their shapes, and so no square ones, or all of them",
    "logits too": "the head or the norm before it was scaled",
    "text tokenizer at random": "pieces of words are drawn: `dropout` of tokenizer.json must be null",
    "control tokens reset": "rows were reset or filled with the mean of all, as when a table is resized",
    "wrong null prompt": "it keeps the user's text, or has another form than the prompt",
    "collapsed codes": "entries are alike, or features do not reach them: train with restarts of unused entries",
    "vision tokenizer and shards differ": "they were made by another one, or it was trained on or damaged since",
    "self-correction": "what was disturbed is the target, or inputs hold any codes, where near ones were to be drawn",
    "another chat template": "shards were made with another template, or a system message that prompts have not",
    "one picture many times": "a placeholder, or the last of a buffer, stands in the place of many",
    "prompts without text": "captions were lost, or the share to drop for guidance was taken for that to keep",
    "ends not supervised": "padding was masked, and the ends of texts with it, so the model never learns to end",
    "texts cut short": "texts end where those of training went on: cut, or of another form",
    "texts do not fit": "texts were cut, or joined to other pictures in part, or are of things never seen in training",
    "pictures": "what read, drew or joined them turned them, or took some for others",
    "prompt ignored": "texts are not those of what follows, have other ids than in training, or were not learned",
    "unfamiliar": "changed on the way here (pixels, words, coding), of another set, held out; or weights are damaged",
    "sampling unlike training": "positions, inputs, mask or cache of a step are others than in one forward",
    "harmful sampling settings": "temperature, top-k, top-p or guidance draw what the model itself holds unlikely",
    "the code raises": "code, checkpoint and shards do not fit each other: run this part alone",
}


@dataclass(frozen=True)
class Finding:
    """What one check found, or is to find.

    Attributes:
        severity: `"ok"`; `"unchecked"`, for the reason in `measured`; `"warning"`, a figure that chance hardly
            explains; `"error"`, something exact that does not hold.
        fault: name of what is wrong, `None` where nothing is; `cause` is empty then.
    """

    check: str
    part: str
    expected: str
    severity: str = WARNING
    next_step: str = ""
    measured: str = ""
    fault: str | None = None
    cause: str = ""

    def verdict(self, measured: str, faults: Mapping[str, object]) -> "Finding":
        """The first of some faults that is there, by name whether it is; or that there is none."""
        for fault in (fault for fault, is_there in faults.items() if is_there):
            cause = CAUSES[max(filter(fault.startswith, CAUSES), key=len)]
            return replace(self, measured=measured, fault=fault, cause=cause)
        return replace(self, measured=measured, severity=OK)

    def unchecked(self, reason: str) -> "Finding":
        return replace(self, measured=reason, severity=UNCHECKED)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference up to which two computations of one quantity count as equal: 3e-4 in float32."""
    return math.sqrt(torch.finfo(dtype).eps)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, infinite for other shapes or values that are not finite."""
    if a.shape != b.shape:
        return math.inf
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).nan_to_num(math.inf))


def z_score(values: torch.Tensor) -> float:
    """Mean of independent (N,) values in its standard error; 0 for fewer than [`ENOUGH`]."""
    if len(values) < ENOUGH:
        return 0.0
    error, mean = float(values.double().std()) / math.sqrt(len(values)), float(values.double().mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
