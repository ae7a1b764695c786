"""Checks of documents of shards: what they hold, and what they cost, against what the model expects and the simple."""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from ..data.shards import decodable_codes
from .case import AS_IT_IS, CODES, READ, ROWS, Case, Reading, by_part, redrawn
from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Finding, z_score
from .tokenizer import turned

ALLOWED, FEW = 0.2, 0.05  # share of documents that may be otherwise, and where none should be
COMPARED = 512  # pictures that are compared with each other
LONG = 10  # letters of an answer that is found again by no chance
EXCHANGED = "shown and drawn pictures in each other's place"
COARSE = 2  # scales, in which what texts say shows
SURPRISING = 0.6  # nats above the expected: what the model drew itself and is coded anew may cost 0.5 more


def frames(check: Finding, case: Case) -> Finding:
    """Chats of the shards open, and turn to the answer, as a prompt of the processor does, and what the user says is
    no target."""
    tokenizer, special = case.processor.tokenizer, case.spec.special
    control = {*tokenizer.added_tokens_decoder} - {special.boi, special.eoi, special.image, special.eos, special.pad}
    chats = [(ids, each.flags) for each in case.documents if control & {*(ids := each.ids.tolist())}]
    if len(chats) < ENOUGH:
        return check.unchecked(f"{len(chats)} documents are chats")
    head, tail = case.frame
    answer = tail[len(tail) - 1 - tail[::-1].index(head[0]) :] if head[0] in tail else tail
    asked = head[len(head) - 1 - head[::-1].index(head[0]) :]
    name, frame, unlike = "open", head, [ids for ids, _ in chats if ids[: len(head)] != head]
    if len(unlike) <= ALLOWED * len(chats):
        name, frame, unlike = "turn to the answer", tail, [ids for ids, _ in chats if not _starts(ids, tail)]
    names = tokenizer.convert_ids_to_tokens([*control])
    plain = [tokenizer.decode([token for token in ids if token not in control]) for ids, _ in chats]
    twice = sum(any(token in text for token in names) for text in plain)
    supervised = [
        flags[at : next((end for end in _starts(ids, answer) if end > at), None)].any()
        for ids, flags in chats
        for at in _starts(ids, asked)
    ]
    measured = f"{len(unlike)} of {len(chats)} chats do not {name} with {tokenizer.decode(frame)!r}"
    measured += f", as {tokenizer.decode(unlike[0][:24])!r}" if unlike else ""
    is_other, answers_first = len(unlike) > ALLOWED * len(chats), sum(ids[: len(answer)] == answer for ids, _ in chats)
    faults = {
        "roles exchanged": is_other and answers_first > ALLOWED * len(chats),
        "another chat template": is_other or twice > FEW * len(chats),
        "questions supervised": sum(supervised) > FEW * len(chats),
    }
    return check.verdict(f"{measured}; {twice} have it as text, {sum(supervised)} turns of users are targets", faults)


def _starts(ids: list[int], frame: list[int]) -> list[int]:
    """Where a list begins in another."""
    return [at for at in range(len(ids) - len(frame) + 1) if ids[at : at + len(frame)] == frame]


def varied(check: Finding, case: Case) -> Finding:
    """No picture stands for a twentieth of all and four times as often as others, few documents are copies of others,
    answers do not stand in what comes before them, and most of what is drawn is asked for by more than the null
    prompt."""
    show = partial(case.processor.tokenizer.decode, skip_special_tokens=True)
    pictures, wholes, total = defaultdict(list), set(), len(case.documents)
    given, bare, times, null = [], [], [0], case.compact(case.null_prompt)
    for document in case.documents:
        ids, flags, images, draws = document
        wholes.add((ids.tobytes(), *(targets.tobytes() for _, targets, _ in images)))
        for grid, targets, inputs in images:
            pictures[grid].append(decodable_codes(targets, inputs))
        if any(draws):
            bare.append(np.array_equal(document.prompt, null))
        elif flags.any() and len(answer := show(ids[flags]).strip()) >= LONG:
            given.append(answer in show(document.prompt))
    for of_grid in pictures.values():
        first = np.stack(of_grid[:COMPARED])
        same = np.stack([(first == each).mean(1) for each in first])
        # one picture in several codings is alike in more than half of what is not so in any two
        times += (same > (1 + np.median(same)) / 2).sum(1).tolist()
    most, usual, repeated = max(times), float(np.quantile(times, 0.25)), total - len(wholes)
    measured = f"of {len(times) - 1} pictures one stands {most} times; {repeated} of {total} documents are copies of "
    measured += f"others; {sum(given)} of {len(given)} answers stand in what comes before; {sum(bare)} of {len(bare)} "
    measured += "prompts of drawings are the null prompt"
    faults = {
        "one picture many times": most > max(FEW * len(times), 4 * usual, ENOUGH),
        "documents repeated": repeated > ALLOWED * total,
        "prompts without text": len(bare) >= ENOUGH and 2 * sum(bare) > len(bare),
        "answers given away": len(given) >= ENOUGH and sum(given) > ALLOWED * len(given),
    }
    return check.verdict(measured, faults)


def ends(check: Finding, case: Case) -> Finding:
    """The end of a supervised text is supervised, and costs less than by how often texts end."""
    end, supervised = case.processor.tokenizer.eos_token_id, []
    answers = [document.flags.any() and not any(document.draws) for document in case.documents]
    for (ids, flags, _, _), is_text in zip(case.documents, answers):
        is_end = np.append(False, flags[:-1] & (ids[:-1] != end)) & (ids == end)
        supervised += flags[is_end].tolist() if is_text else []
    texts = [reading for reading, is_text in zip(case.readings, answers) if is_text]
    at_ends = [text.where(text.targets_N == end) for text in texts]
    own = torch.tensor([each.cost for each in at_ends if len(each.targets_N)])
    if not supervised:
        return check.unchecked("no document ends in a text")
    usual = math.log(max(sum(len(text.targets_N) for text in texts), 1) / max(len(own), 1))
    measured = f"{sum(supervised)} of {len(supervised)} are supervised; {len(own)} cost {float(own.mean()):.2f} nats, "
    faults = {
        "ends not supervised": sum(supervised) < (1 - ALLOWED) * len(supervised),
        "texts cut short": z_score(own - usual) >= SIGNIFICANT,
    }
    return check.verdict(f"{measured}by their frequency {usual:.2f}", faults)


def conditions(check: Finding, case: Case) -> Finding:
    """What is supervised is likelier after its own prompt, and its own pictures, than after another document's; what
    documents draw is another picture than what they show, and likelier after it than the other way round."""
    rises, last, same = defaultdict(list), {}, []
    for document, reading in zip(case.documents, case.readings):
        images, draws = document.images, document.draws
        shown, answer = draws.count(False), "pictures" if any(draws) else "texts"
        if not document.flags.any() or any(draws[:shown]):
            continue
        key = answer, *(grid for grid, _, _ in images[:shown])
        other, last[key], changed = last.get(key, document), document, {}
        if other.prompt.tolist() != document.prompt.tolist():
            changed[f"prompt ({shown} shown) before {answer}"] = case.row_of(document.after(other.prompt))
        if shown and other is not document:
            exchanged = document._replace(images=[*other.images[:shown], *images[shown:]])
            changed[f"pictures before {answer}"] = case.row_of(exchanged)
        if draws == [False, True] and images[0][0] == images[1][0]:
            same.append(float((images[0][1][0] == images[1][1][0]).mean()) > 0.5)  # codings differ by self-correction
            row = case.row_of(document)
            changed[EXCHANGED] = row | {name: row[name].roll(len(row[name]) // 2) for name in CODES}
        for name, row in changed.items():
            if len(rises[name]) < 2 * ROWS:
                own, others = ((it.codes if any(draws) else it).cost for it in (reading, case.read(row)))
                rises[name].append(float(others - own))
    scores = {name: z_score(torch.tensor(each)) for name, each in rises.items() if len(each) >= ENOUGH}
    if not scores:
        return check.unchecked(f"fewer than {ENOUGH} documents of a kind answer something")
    measured = ", ".join(f"{name} {np.mean(rises[name]):+.3f}" for name in scores)
    ignored = {name.partition(" ")[0] for name, z in scores.items() if z < SIGNIFICANT / 2}  # some say little
    faults = {
        "pictures repeated": len(same) >= ENOUGH and sum(same) > ALLOWED * len(same),
        "pictures exchanged": scores.get(EXCHANGED, 0.0) < -SIGNIFICANT,
        **{f"{what} ignored": what in ignored for what in ("prompt", "pictures")},
    }
    return check.verdict(f"others cost so many nats more: {measured}; {sum(same)} draw what they show", faults)


def confidence(check: Finding, case: Case) -> Finding:
    """Codes are not likelier with half or twice the logits, at every scale."""
    of_scales = [torch.cat([*zip(*each)][2], dim=1) for name, each in by_part(case.readings).items() if name != "text"]
    if not of_scales:
        return check.unchecked("the shards draw no pictures")
    costs_TS = torch.stack([costs_TN.mean(dim=1) for costs_TN in of_scales], dim=1)
    twice, own, half = (costs_TS[at] for at in (0, AS_IT_IS, -1))
    measured = f"{float(own.mean()):.2f} nats a code, mean of scales, with half the logits {float(half.mean()):.2f}"
    better = [bool((other < own * (1 - MATERIAL)).all()) for other in (half, twice)]
    faults = dict(zip(("logits too large", "logits too small"), better))
    return check.verdict(f"{measured}, with twice {float(twice.mean()):.2f}", faults)


def scales(check: Finding, case: Case) -> Finding:
    """Codes of every scale, and texts, cost less than codes and words drawn by their frequency in other documents
    (unigram) would."""
    costs = {}
    for name, readings in by_part(case.readings).items():
        size = case.config.text_vocab_size if name == "text" else case.config.vq_config.codebook_size
        costs[name] = torch.stack([each.cost for each in readings]), _unigram(readings, size)
    means = {name: [float(each.mean()) for each in pair] for name, pair in costs.items()}
    of_scales = [pair for name, pair in means.items() if name != "text"]
    case.curves["loss of each scale, nats a code"] = dict(zip(("loss", "unigram"), map(list, zip(*of_scales))))
    above = [name for name, (loss, unigram) in costs.items() if z_score(loss - unigram) > SIGNIFICANT]
    measured = ", ".join(f"{name} {loss:.2f} ({unigram:.2f})" for name, (loss, unigram) in means.items())
    return check.verdict(f"loss (unigram): {measured}; above it: {above}", {"worse than the unigram": above})


def _unigram(readings: list[Reading], size: int) -> torch.Tensor:
    """(R,) mean cost of each document's targets by their frequency in the others."""
    counts = torch.stack([each.targets_N.bincount(minlength=size).float() for each in readings])
    rest = counts.sum(0) - counts
    log_probs = ((rest + 0.5) / (rest.sum(1, keepdim=True) + 0.5 * size)).log()
    return -(counts * log_probs).sum(1) / counts.sum(1)


def familiar(check: Finding, case: Case) -> Finding:
    """Codes of every scale, and texts, cost what the model itself expects (its entropy) or less, as those do that it
    was trained on; of all documents, not the most alone."""
    parts = by_part(case.readings)
    of_parts = {name: _surprises(readings) for name, readings in parts.items()}
    means = {name: float(surprises.mean()) for name, surprises in of_parts.items()}
    strange = [name for name in means if means[name] > SURPRISING and z_score(of_parts[name]) > SIGNIFICANT]
    whole = _surprises(each.codes for each in case.readings)
    coarse = _surprises(it.where((it.scales_N >= 0) & (it.scales_N < COARSE)) for it in case.readings)
    fine = _surprises(it.where(it.scales_N >= COARSE) for it in case.readings)
    apart = coarse - fine if len(coarse) == len(fine) else coarse[:0]  # none where there are fewer scales
    outliers, mean = int((whole > 2 * SURPRISING).sum()), float(whole.mean())
    measured = f"nats above the expected: {', '.join(f'{name} {x:+.2f}' for name, x in means.items())}; pictures "
    measured += f"{mean:+.2f}, above {2 * SURPRISING:g} {outliers} of {len(whole)}; the first {COARSE} scales "
    measured += f"{float(apart.mean()):+.2f} above the others{_strangest(case, parts.get('text', []))}"
    by_pictures = mean > SURPRISING / 2 and z_score(whole) > SIGNIFICANT or outliers > FEW * len(whole)
    is_strange, first = bool(strange or by_pictures), next(iter(strange), "")
    usual = max((mean for name, mean in means.items() if name != first), default=0.0)
    is_one_scale = len(strange) == 1 and first != "text" and usual < SURPRISING / 2 and means[first] > 2
    what = "pictures" if "text" not in strange else "texts" if len(strange) == 1 else "documents"
    way = _likelier(case, mean) if is_strange and what == "pictures" and not is_one_scale else None
    is_of_texts = not by_pictures and z_score(apart) > SIGNIFICANT and float(apart.mean()) > SURPRISING
    faults = {
        "texts do not fit their pictures": is_of_texts,
        f"codes of {first} in disorder": is_one_scale,
        f"pictures {way}": way,
        f"unfamiliar {what}": is_strange,
    }
    return check.verdict(measured, faults)


def _strangest(case: Case, texts: list[Reading]) -> str:
    """The token that costs most above the expected, in all texts together."""
    costs = defaultdict(list)
    for text in texts:
        for token, surprise in zip(text.targets_N.tolist(), (text.costs_TN[AS_IT_IS] - text.expected_N).tolist()):
            costs[token].append(surprise)
    most = max(costs, key=lambda token: sum(costs[token]), default=None)
    return f"; most of all {case.processor.tokenizer.decode([most])!r} {np.mean(costs[most]):+.2f}" if costs else ""


def _surprises(readings: Iterable[Reading]) -> torch.Tensor:
    return torch.tensor([float(each.surprise) for each in readings if len(each.targets_N)])  # a mean of none is NaN


def _likelier(case: Case, excess: float) -> str | None:
    """What, done to all pictures, makes drawn ones likelier, by half of the nats that they cost too much."""
    costs = defaultdict(list)
    for document in case.documents[:READ]:
        if document.draws == [True]:
            row = case.row_of(document)
            pixels = case.vq_model.decode(case.decoded(row), document.images[0][0])
            for way, seen in {"as they are": pixels, **turned(pixels)}.items():
                costs[way].append(float(case.read(redrawn(row, case.vq_model.encode(seen)[0])).codes.cost))
    own = torch.tensor(costs["as they are"])
    gains = {way: own - torch.tensor(each) for way, each in costs.items() if len(each) == len(own)}
    best = max(gains, key=lambda way: float(gains[way].mean()))
    return best if float(gains[best].mean()) > excess / 2 and z_score(gains[best]) > SIGNIFICANT / 2 else None
