"""Checks of the transformer on shards, which it should know: pictures, texts, and one after the other."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .case import ROWS, Case
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score
from .losses import cost, likeliest
from .weights import COMPARE

CODES = {"image_codes", "image_input_codes"}
ALLOWED = 0.2  # share of documents that may be otherwise


def confidence(check: Check, case: Case) -> Finding:
    """Codes are not likelier with half or twice the logits."""
    others = {
        ("logits too large", "half the logits"): lambda r: cost(r, r.codes, 2),
        ("logits too small", "twice the logits"): lambda r: cost(r, r.codes, 0.5),
    }
    return likeliest(check, [case.read(row, with_text=False) for row in case.rows], others)


def scales(check: Check, case: Case) -> Finding:
    """Codes of every scale, and texts, cost less than codes and words drawn by their frequency in other rows
    (unigram) would."""
    readings = [case.read(row) for row in case.rows]
    size, most = case.config.vq_config.codebook_size, 1 + max(int(each.scales.max()) for each in readings)
    names = [*(f"scale {scale + 1}" for scale in range(most))]
    loss, unigram = {}, {}
    for scale, name in enumerate(names):
        codes = [reading.codes[reading.scales == scale].cpu() for reading in readings]
        costs = [F.nll_loss(r.log_probs[r.scales == scale], r.codes[r.scales == scale]) for r in readings]
        loss[name], unigram[name] = torch.stack(costs).cpu(), _unigram(codes, size)
    layouts = [case.model.model.lay_out(**row)[0] for row in case.rows]
    texts = [layout.targets[layout.target_codes < 0].cpu() for layout in layouts]
    if sum(len(each) > 0 for each in texts) >= ENOUGH:
        loss["text"] = torch.stack([reading.text_losses.mean().cpu() for reading in readings])
        unigram["text"] = _unigram(texts, case.config.text_vocab_size)
    means = {name: (float(values.nanmean()), float(unigram[name].nanmean())) for name, values in loss.items()}
    case.curves["loss of each scale, nats a code"] = {
        "loss": [means[name][0] for name in names],
        "unigram": [means[name][1] for name in names],
    }
    measured = ", ".join(f"{name} {a:.2f} ({b:.2f})" for name, (a, b) in means.items())
    measured = f"loss (unigram) over {len(readings)} rows: {measured}"
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


def ends(check: Check, case: Case) -> Finding:
    """The end of a supervised text is supervised, and costs less than by how often texts end."""
    end, ended, unsupervised, tokens, costs = case.processor.tokenizer.eos_token_id, 0, 0, 0, []
    for document in case.documents:
        ids, flags = document["input_ids"], document["supervised"].astype(bool)
        if not flags.any() or flags[ids == case.config.image_token_id].any():
            continue  # whose end follows from a picture
        is_end = np.append(False, flags[:-1] & (ids[:-1] != end)) & (ids == end)
        ended, unsupervised = ended + int(is_end.sum()), unsupervised + int((is_end & ~flags).sum())
        if (is_end & flags).any() and len(costs) < 2 * ROWS:
            row = case.row_of([document])
            layout, losses = case.model.model.lay_out(**row)[0], case.read(row).text_losses
            tokens += len(losses)
            costs.append(losses[layout.targets[layout.target_codes < 0] == end].mean().cpu())
    measured = f"{unsupervised} of {ended} are not supervised"
    if unsupervised > ALLOWED * ended:
        cause = "a model learns what to say and never that an answer ends: padding was masked, and the end with it"
        return check.warned(measured, "ends not supervised", cause, "look at what sets `supervised`, and extract anew")
    if len(costs) < ENOUGH:
        return check.unchecked(f"{len(costs)} documents end in a text")
    usual, own = math.log(tokens / len(costs)), torch.stack(costs)
    measured += f"; they cost {float(own.mean()):.2f} nats, by their frequency {usual:.2f}"
    if z_score(own - usual) < SIGNIFICANT:
        return check.passed(measured)
    cause = "texts end where those of training went on: they were cut, or are of another form"
    return check.warned(measured, "texts cut short", cause, "read some of them (`transformers-nextflow data inspect`)")


def conditions(check: Check, case: Case) -> Finding:
    """What documents draw is another picture than what they show, and likelier after it than the other way round."""
    gains, same = [], []
    for document in case.documents:
        grids = document["image_grid_hw"].reshape(-1, 2).tolist()
        draws = document["supervised"][document["input_ids"] == case.config.image_token_id]
        if len(gains) < 2 * ROWS and len(grids) == 2 and grids[0] == grids[1] and draws.tolist() == [False, True]:
            row = case.row_of([document])
            shown, drawn = row["image_codes"].chunk(2)
            same.append(float((shown == drawn).float().mean()) > 0.5)  # codings differ by self-correction
            codes = {name: row[name].roll(len(row[name]) // 2) for name in row.keys() & CODES}
            gains.append(_rise(case, row, row | codes))
    if len(gains) < ENOUGH:
        return check.unchecked(f"{len(gains)} documents draw a picture after one of its size")
    gain, score = float(np.mean(gains)), z_score(torch.tensor(gains))
    measured = f"it saves {gain:.3f} nats a code over {len(gains)} documents"
    if np.mean(same) > ALLOWED:
        cause = "a buffer, a column or a file name served for several pictures"
        measured = f"{sum(same)} of {len(same)} documents draw what they show"
        return check.warned(measured, "pictures repeated", cause, "look at the documents' pictures side by side")
    if score > -SIGNIFICANT:
        return check.passed(measured, gain=gain)
    cause = "the pictures that instructions are about and those that they ask for are in each other's place"
    return check.warned(measured, "pictures exchanged", cause, "look at the columns that the documents were made of")


def worth(check: Check, case: Case) -> Finding:
    """Pictures are likelier after their own prompt than after another document's."""
    drawn, gains = [], []
    for document in case.documents:
        at = np.flatnonzero(document["input_ids"] == case.config.image_token_id)
        if len(at) == 1 and document["supervised"][at[0]] and len(drawn) <= 2 * ROWS:
            drawn.append((at[0], document))
    for (at, own), (other_at, other) in zip(drawn, drawn[1:]):
        names = ("input_ids", "supervised")
        changed = {name: np.concatenate([other[name][:other_at], own[name][at:]]) for name in names}
        if own["input_ids"].tolist() != changed["input_ids"].tolist():
            gains.append(_rise(case, case.row_of([own]), case.row_of([own | changed])))
    if len(gains) < ENOUGH:
        return check.unchecked(f"{len(gains)} documents answer a text by a picture")
    gain, score = float(np.mean(gains)), z_score(torch.tensor(gains))
    measured = f"own prompts save {gain:.3f} nats a code over {len(gains)} documents, {score:.1f} standard errors"
    if score > SIGNIFICANT / 2:  # some texts say little of the picture
        return check.passed(measured, gain=gain)
    cause = "the texts are not these pictures', their ids are others than in training, or the model did not learn them"
    step = "read some texts beside their pictures (`transformers-nextflow data inspect`)"
    return check.warned(measured, "prompt ignored", cause, step, gain=gain)


def _rise(case: Case, *rows: dict[str, torch.Tensor]) -> float:
    """By how many nats a code the second of two rows costs more than the first."""
    own, changed = (cost(reading, reading.codes) for reading in (case.read(row, with_text=False) for row in rows))
    return float(changed - own)
