"""Checks of what documents of shards hold: frames of chats, ends of texts, pictures and what asks for them."""

import math
from collections import defaultdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ..data.shards import decodable_codes, images_of
from .case import CODES, LOOK, ROWS, Case
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score

ALLOWED, FEW = 0.2, 0.05  # share of documents that may be otherwise, and where none should be
COMPARED = 512  # pictures that are compared with each other
LONG = 10  # letters of an answer that is found again by no chance


def frames(check: Check, case: Case) -> Finding:
    """Chats of the shards open, and turn to the answer, as a prompt of the processor does, and what the user says is
    no target."""
    tokenizer, special = case.processor.tokenizer, case.spec.special
    control = {*tokenizer.added_tokens_decoder} - {special.boi, special.eoi, special.image, special.eos, special.pad}
    chats = [document for document in case.documents if control & {*document["input_ids"].tolist()}]
    if len(chats) < ENOUGH:
        return check.unchecked(f"{len(chats)} documents are chats")
    head, tail = case.frame
    answer = tail[len(tail) - 1 - tail[::-1].index(head[0]) :] if head[0] in tail else tail
    all_ids = [document["input_ids"].tolist() for document in chats]
    for name, frame in (("open", head), ("turn to the answer", tail)):
        others = [ids for ids in all_ids if not any(at == 0 or frame is tail for at in _starts(ids, frame))]
        if len(others) > ALLOWED * len(chats):
            measured = f"{len(others)} of {len(chats)} chats do not {name} with {tokenizer.decode(frame)!r}, as "
            measured += repr(tokenizer.decode(others[0][:24]))
            if sum(ids[: len(answer)] == answer for ids in all_ids) > ALLOWED * len(chats):
                cause = "the roles of user and assistant were exchanged, so the model learns to ask"
                return check.warned(measured, "roles exchanged", cause, "look at the roles in the documents' source")
            cause = "shards were made with another chat template, or a system message that prompts have not"
            step = "extract the shards with this processor, or save the one that made them with the model"
            return check.warned(measured, "another chat template", cause, step)
    measured = f"{len(chats)} chats, with {tokenizer.decode(head)!r} and {tokenizer.decode(tail)!r}"
    asked = head[len(head) - 1 - head[::-1].index(head[0]) :]
    wrong = sum(
        document["supervised"][at : next((end for end in _starts(ids, answer) if end > at), None)].any()
        for document, ids in zip(chats, all_ids)
        for at in _starts(ids, asked)
    )
    if wrong <= FEW * len(chats):
        return check.passed(measured)
    cause = "what the user says is a target too, in all turns or the later ones, so the model learns to ask"
    step = "look at what sets `supervised`, and extract anew"
    return check.warned(f"{measured}; {wrong} turns of users are supervised", "questions supervised", cause, step)


def _starts(ids: list[int], frame: list[int]) -> list[int]:
    """Where a list begins in another."""
    return [at for at in range(len(ids) - len(frame) + 1) if ids[at : at + len(frame)] == frame]


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
            reading = case.read(case.row_of([document]))
            tokens += len(reading.tokens)
            at_end = reading.tokens == end
            costs.append(F.nll_loss(reading.text_log_probs[at_end], reading.tokens[at_end]).cpu())
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
    return check.warned(measured, "texts cut short", cause, LOOK)


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


def varied(check: Check, case: Case) -> Finding:
    """No picture stands for a twentieth of all and four times as often as others, few documents are copies of others,
    and answers do not stand in what comes before them."""
    show = partial(case.processor.tokenizer.decode, skip_special_tokens=True)
    pictures: dict[tuple, list[np.ndarray]] = defaultdict(list)
    whole: set[bytes] = set()
    given = answered = 0
    for document in case.documents:
        ids, flags = document["input_ids"], document["supervised"].astype(bool)
        images = images_of(document, case.spec, case.variants)
        whole.add(b"".join(values.tobytes() for values in document.values()))
        for grid, targets, inputs in images:
            pictures[grid].append(decodable_codes(targets, inputs))
        if flags.any() and not (ids[flags] == case.spec.special.image).any():
            answer = show(ids[flags]).strip()
            if len(answer) >= LONG:
                answered, given = answered + 1, given + (answer in show(ids[: flags.argmax()]))
    repeated, times = len(case.documents) - len(whole), [0]
    for of_grid in pictures.values():
        first = np.stack(of_grid[:COMPARED])
        same = np.stack([(first == each).mean(1) for each in first])
        # one picture in several codings is alike in more than half of what is not so in any two
        times += (same > (1 + np.median(same)) / 2).sum(1).tolist()
    shown, most, usual = len(times) - 1, max(times), float(np.quantile(times, 0.25))
    measured = f"of {shown} pictures one stands {most} times; {repeated} of {len(case.documents)} documents are "
    measured += f"copies of others; {given} of {answered} answers stand in what comes before"
    if most > max(FEW * shown, 4 * usual, ENOUGH):
        cause = "one picture, as a placeholder or the last of a buffer, stands in the place of many"
        return check.warned(measured, "one picture many times", cause, LOOK)
    if repeated > ALLOWED * len(case.documents):
        cause = "a source that had ended began anew, or was written several times"
        return check.warned(measured, "documents repeated", cause, "count the rows of every source, and extract anew")
    if answered >= ENOUGH and given > ALLOWED * answered:
        cause = "the answer is given away, so the model learns to copy it"
        return check.warned(measured, "answers given away", cause, LOOK)
    return check.passed(measured)


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
    return check.warned(measured, "prompt ignored", cause, LOOK, gain=gain)


def _rise(case: Case, *rows: dict[str, torch.Tensor]) -> float:
    """By how many nats a code the second of two rows costs more than the first."""
    readings = [case.read(row, with_text=False) for row in rows]
    own, changed = (float(F.nll_loss(reading.log_probs, reading.codes)) for reading in readings)
    return changed - own
