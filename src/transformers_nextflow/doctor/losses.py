"""Checks of what documents of shards cost: by scale, against what the model expects, and against the unigram."""

from collections import defaultdict

import torch
import torch.nn.functional as F

from .case import CODES, LOOK, Case
from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Check, Finding, z_score
from .tokenizer import turned
from .weights import COMPARE

FAMILIAR, FEW = 192, 0.04  # documents that are read, and the share of them that may be strange
COARSE = 2  # scales, in which what texts say shows
SURPRISING = 0.6  # nats above the expected: what the model drew itself and is coded anew may cost 0.5 more


def confidence(check: Check, case: Case) -> Finding:
    """Codes are not likelier with half or twice the logits, at every scale."""
    if not case.rows:
        return check.unchecked("the shards draw no pictures")
    factors, costs, scales = {"half": 0.5, "twice": 2.0}, defaultdict(list), []
    for row in case.rows:
        reading = case.read(row, with_text=False)
        scales.append(reading.scales)
        for name, factor in {"as they are": 1.0, **factors}.items():
            costs[name].append(F.cross_entropy(reading.log_probs * factor, reading.codes, reduction="none"))
    of_scale = torch.cat(scales)
    means = {
        name: torch.stack([torch.cat(values)[of_scale == scale].mean() for scale in of_scale.unique()])
        for name, values in costs.items()
    }
    own = means["as they are"]
    measured = ", ".join(f"{float(values.mean()):.2f} {name}" for name, values in means.items())
    measured = f"nats a code, the mean of scales, with the logits {measured}"
    better = [name for name in factors if bool((means[name] < own * (1 - MATERIAL)).all())]
    if not better:
        return check.passed(measured)
    cause = f"{better[0]} the logits suits every scale better: the head or the norm before it was scaled"
    return check.warned(measured, f"logits too {'large' if better == ['half'] else 'small'}", cause, COMPARE)


def scales(check: Check, case: Case) -> Finding:
    """Codes of every scale, and texts, cost less than codes and words drawn by their frequency in other rows
    (unigram) would."""
    if not case.rows:
        return check.unchecked("the shards draw no pictures")
    size, values, costs = case.config.vq_config.codebook_size, defaultdict(list), defaultdict(list)
    for row in case.rows:
        reading = case.read(row)
        of_codes = F.nll_loss(reading.log_probs, reading.codes, reduction="none")
        for scale in range(max(map(len, case.vq_model.schedules))):
            at = reading.scales == scale
            values[f"scale {scale + 1}"].append(reading.codes[at].cpu())
            costs[f"scale {scale + 1}"].append(of_codes[at].mean().cpu())  # not a number where a row has none
        values["text"].append(reading.tokens.cpu())
        costs["text"].append(F.nll_loss(reading.text_log_probs, reading.tokens).cpu())
    loss, unigram = {}, {}
    for name, rows in values.items():
        if sum(len(each) > 0 for each in rows) >= (ENOUGH if name == "text" else 1):
            unigram[name] = _unigram(rows, case.config.text_vocab_size if name == "text" else size)
            loss[name] = torch.stack(costs[name])
    means = {name: (float(each.nanmean()), float(unigram[name].nanmean())) for name, each in loss.items()}
    curves = zip(("loss", "unigram"), zip(*(pair for name, pair in means.items() if name != "text")))
    case.curves["loss of each scale, nats a code"] = {name: list(curve) for name, curve in curves}
    measured = ", ".join(f"{name} {a:.2f} ({b:.2f})" for name, (a, b) in means.items())
    measured = f"loss (unigram) over {len(case.rows)} rows: {measured}"
    scores = {name: z_score((loss[name] - unigram[name])[~loss[name].isnan()]) for name in loss}
    above = [name for name, score in scores.items() if score > SIGNIFICANT]
    if not above:
        return check.passed(measured, losses=means)
    measured = f"{measured}; above it: {', '.join(above)}"
    cause = "not trained, trained on other codes or texts, or inputs are not those of the training"
    return check.warned(measured, "worse than the unigram", cause, COMPARE, losses=means)


def _unigram(rows: list[torch.Tensor], size: int) -> torch.Tensor:
    """(R,) mean cost of each row's values by their frequency in the others."""
    counts = torch.stack([row.bincount(minlength=size).float() for row in rows])
    rest = counts.sum(0) - counts
    log_probs = ((rest + 0.5) / (rest.sum(1, keepdim=True) + 0.5 * size)).log()
    return -(counts * log_probs).sum(1) / counts.sum(1)  # not a number for rows without


def familiar(check: Check, case: Case) -> Finding:
    """Codes of every scale, and texts, cost what the model itself expects (its entropy) or less, as those do that it
    was trained on; of all documents, not the most alone."""
    surprises: dict[str, list[torch.Tensor]] = defaultdict(list)
    wholes, coarser = [], []
    for document in case.documents[:FAMILIAR]:
        reading = case.read(case.row_of([document]))
        wholes += [float(_surprise(reading.log_probs, reading.codes))] if len(reading.codes) else []
        own = []
        for scale in reading.scales.unique().tolist():
            at = reading.scales == scale
            own.append(_surprise(reading.log_probs[at], reading.codes[at]))
            surprises[f"scale {scale + 1}"].append(own[-1])
        if len(own) > 2 * COARSE:
            coarser.append(torch.stack(own[:COARSE]).mean() - torch.stack(own[COARSE:]).mean())
        if len(reading.tokens):
            surprises["texts"].append(_surprise(reading.text_log_probs, reading.tokens))
    values = {name: torch.stack(each) for name, each in sorted(surprises.items())}
    means = {name: round(float(each.mean()), 3) for name, each in values.items()}
    measured = ", ".join(f"{name} {mean:+.2f}" for name, mean in means.items())
    measured = f"nats above the expected: {measured}"
    strange = [name for name in means if means[name] > SURPRISING and z_score(values[name]) > SIGNIFICANT]
    whole = torch.tensor(wholes)
    outliers, mean = int((whole > 2 * SURPRISING).sum()), float(whole.mean()) if len(whole) else 0.0
    by_pictures = mean > SURPRISING / 2 and z_score(whole) > SIGNIFICANT or outliers > FEW * len(whole)
    apart = torch.stack(coarser) if coarser else torch.zeros(1)
    if not by_pictures and float(apart.mean()) > SURPRISING and z_score(apart) > SIGNIFICANT:
        measured += f"; the first {COARSE} scales {float(apart.mean()):+.2f} above the others"
        cause = "what texts say shows in the first scales, and they say other things than their pictures show: they "
        cause += "were cut, or joined to other pictures in part, or are of things that training never saw"
        return check.warned(measured, "texts do not fit their pictures", cause, LOOK, surprise=means)
    if by_pictures:
        strange = strange or ["whole pictures"]
    if not strange:
        return check.passed(measured, surprise=means)
    measured += f"; whole pictures {mean:+.2f}, above {2 * SURPRISING:g} {outliers} of {len(whole)}"
    usual = max((mean for name, mean in means.items() if name not in strange[:1]), default=0.0)
    if len(strange) == 1 and strange[0].startswith("scale") and usual < SURPRISING / 2 < 2 < means[strange[0]]:
        cause = f"the codes of {strange[0]} are in another order there, or of another table, or no codes at all"
        return check.warned(measured, f"codes of {strange[0]} in disorder", cause, LOOK, surprise=means)
    what = "pictures" if "texts" not in strange else "texts" if len(strange) == 1 else "documents"
    if what == "pictures" and (way := _likelier(case, mean)):
        cause = f"the model finds the pictures likelier {way}: what read or drew them turned them so"
        return check.warned(measured, f"pictures {way}", cause, LOOK, surprise=means)
    cause = f"{what} are unlike those of training: they were changed on the way here (pixels, words, or how they are "
    cause += "coded), are of another set, or held out; or the weights are damaged"
    return check.warned(measured, f"unfamiliar {what}", cause, LOOK, surprise=means)


def _likelier(case: Case, excess: float) -> str | None:
    """What, done to all pictures, makes drawn ones likelier, by half of the nats that they cost too much."""
    costs: dict[str, list[torch.Tensor]] = defaultdict(list)
    for document in case.documents[:FAMILIAR]:
        if document["supervised"][document["input_ids"] == case.config.image_token_id].tolist() != [True]:
            continue
        row, grid = case.row_of([document]), tuple(document["image_grid_hw"].tolist())
        targets, inputs = row["image_codes"], row.get("image_input_codes", row["image_codes"])
        pixels = case.vq_model.decode(torch.cat([inputs, targets[len(inputs) :]])[None], grid)
        for way, seen in {"as they are": pixels, **turned(pixels)}.items():
            codes = case.vq_model.encode(seen)[0]
            seen_codes = {name: codes[: len(row[name])] for name in row.keys() & CODES}  # inputs lack the last scale
            reading = case.read(row | seen_codes, with_text=False)
            costs[way].append(F.nll_loss(reading.log_probs, reading.codes).cpu())
    own = costs.pop("as they are", [])
    gains = {way: torch.stack(own) - torch.stack(values) for way, values in costs.items() if len(values) == len(own)}
    best = max(gains, key=lambda way: float(gains[way].mean()), default=None)
    if best is None or float(gains[best].mean()) < excess / 2 or z_score(gains[best]) < SIGNIFICANT / 2:
        return None
    return best


def _surprise(log_probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What (N,) values cost above the model's entropy, in nats."""
    return (F.nll_loss(log_probs, values) - torch.special.entr(log_probs.exp()).sum(-1).mean()).cpu()
