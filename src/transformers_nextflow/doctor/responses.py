"""Checks of what the transformer reads: special ids, prompts, condition pictures, the scales before."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .case import Case
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score
from .weights import COMPARE

NOTHING = 10 * torch.finfo(torch.float32).eps


def prompts(check: Check, case: Case) -> Finding:
    """Processor and config.json agree on special ids and on what a read picture carries; the null prompt is
    the prompt without the user's text, and ends in `<boi>`."""
    config, processor = case.config, case.processor
    step = "compare tokenizer.json, processor_config.json and the chat template with the training's"
    for name in ("boi_token_id", "eoi_token_id", "image_token_id", "condition_last_scale"):
        theirs, ours = getattr(processor, name), getattr(config, name)
        if theirs != ours:
            cause = "processor and model were saved with different settings"
            measured = f"{name} is {theirs} to the processor, {ours} to config.json"
            return check.failed(measured, f"wrong {name}", cause, step)
    answer = case.answers[0]
    null = answer.prompt["negative_input_ids"][0]
    if int(null[-1]) != config.boi_token_id or len(null) >= answer.prompt["input_ids"].shape[1]:
        cause = "the null prompt keeps the user's text, or has another form than the prompt"
        measured = f"the null prompt is {processor.tokenizer.decode(null)!r}"
        return check.failed(measured, "wrong null prompt", cause, step)
    return check.passed("ids and null prompt are right")


def responses(check: Check, case: Case) -> Finding:
    """Logits of codes move with the prompt, a condition picture and the last scale of it, the codes of the scale
    before, the scale embedding, and the position along each axis."""
    answer, others = case.answers[0], case.answers[1:]
    plain, last = case.code_logits(answer), answer.schedule.slice(len(answer.schedule) - 1)
    other = next((each for each in others if each.row["input_ids"].tolist() != answer.row["input_ids"].tolist()), None)
    moves = {}
    if other is not None:
        moves["the prompt"] = _moves(case.code_logits(answer.after(other.prompt["input_ids"])), plain)
    codes = answer.codes.clone()
    codes[:, answer.schedule.slice(max(len(answer.schedule) - 2, 0))] += 1
    codes %= case.config.vq_config.codebook_size
    changed = replace(answer, row=answer.row | {"image_codes": codes[0]})
    moves["the codes before"] = _moves(case.code_logits(changed)[last], plain[last])
    read = case.answer("draw it again", answer.codes, answer.schedule, [case.pictures[0].image])
    of_read, given = case.code_logits(read), read.row["image_codes"][: -answer.codes.shape[1]]
    for name, start in (("a condition picture", 0), ("its last scale", -answer.schedule.lengths[-1])):
        if name == "a condition picture" or case.config.condition_last_scale:
            altered = read.row["image_codes"].clone()
            altered[: len(given)][start:] = (given[start:] + 1) % case.config.vq_config.codebook_size
            moves[name] = _moves(case.code_logits(replace(read, row=read.row | {"image_codes": altered})), of_read)
    embedding = case.model.model.scale_embedding
    sizes = [float(each.weight.detach().abs().max()) for each in (embedding.index, embedding.length)]
    moves["the scale embedding"] = sum(sizes)
    positions = case.model.model.lay_out(**answer.row)[0].position_ids
    for axis, name in enumerate(("counter", "row", "column")):
        moved = positions.clone()
        moved[axis, :, answer.start : answer.start + answer.schedule.num_codes][:, last] += 1
        shifted = replace(answer, row=answer.row | {"position_ids": moved})
        moves[f"the {name} axis"] = _moves(case.code_logits(shifted)[last], plain[last])
    measured = "; ".join(f"{name} {value:.2g}" for name, value in moves.items())
    still = [name for name, value in moves.items() if value <= NOTHING]
    if not still:
        return check.passed(f"relative change by {measured}", moves=moves)
    cause = f"{', '.join(still)} never reached the answer: weights are zero, as before training, or were cut off"
    fault = f"{still[0].removeprefix('the ')} ignored"
    return check.failed(f"relative change by {measured}", fault, cause, COMPARE, moves=moves)


def _moves(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far logits move, RMS, in their own deviation."""
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-12))


def worth(check: Check, case: Case) -> Finding:
    """Pictures are likelier after their own words than after another row's."""
    if case.packs is None:
        return check.unchecked("no shards were given")
    template = case.answers[0].prompt["negative_input_ids"].flatten()
    own, words = [], []
    for row in case.rows:
        ids, labels = row["input_ids"], row["shift_labels"]
        known = torch.cat([template, ids.new_tensor([case.config.image_token_id, case.config.eoi_token_id])])
        is_answer = (labels.roll(1, dims=1) == ids) & (ids != case.config.boi_token_id)
        own.append(~torch.isin(ids, known) & ~is_answer)
        words.append(ids[own[-1]])
    gains = []
    for at, row in enumerate(case.rows):
        others = words[at - 1]
        if len(words[at]) and len(others) and words[at].tolist() != others.tolist():
            ids = row["input_ids"].clone()
            ids[own[at]] = others.repeat(len(words[at]) // len(others) + 1)[: len(words[at])]
            readings = [case.read(each, with_text=False) for each in (row, row | {"input_ids": ids})]
            costs = [F.nll_loss(each.log_probs, each.codes) for each in readings]
            gains.append(float(costs[1] - costs[0]))
    if len(gains) < ENOUGH:
        return check.unchecked(f"{len(gains)} rows with texts are too few")
    gain, score = float(np.mean(gains)), z_score(torch.tensor(gains))
    measured = f"own words save {gain:.3f} nats a code over {len(gains)} rows, {score:.1f} standard errors"
    if score > SIGNIFICANT / 2:  # some texts say little of the picture
        return check.passed(measured, gain=gain)
    cause = "the texts are not these pictures', their ids are others than in training, or the model did not learn them"
    step = "read some texts beside their pictures (`transformers-nextflow data inspect`)"
    return check.warned(measured, "prompt ignored", cause, step, gain=gain)
