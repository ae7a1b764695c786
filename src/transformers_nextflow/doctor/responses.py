"""Checks of what the transformer reads: special ids, prompts, condition pictures, the scales before."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..data.loading import collate, unfold
from ..data.shards import sequence_spec
from .case import ROWS, Answer, Case, stored_documents
from .findings import ENOUGH, Check, Finding

NOTHING = 10 * torch.finfo(torch.float32).eps


def prompts(check: Check, case: Case) -> Finding:
    """Processor and config.json agree on special ids and on what a read picture carries; texts come back from their
    ids; the null prompt is the prompt without the user's text, and ends in `<boi>`."""
    config, processor = case.config, case.processor
    step = "compare tokenizer.json, processor_config.json and the chat template with the training's"
    for name in ("boi_token_id", "eoi_token_id", "image_token_id", "condition_last_scale"):
        theirs, ours = getattr(processor, name), getattr(config, name)
        if theirs != ours:
            cause = "processor and model were saved with different settings"
            measured = f"{name} is {theirs} to the processor, {ours} to config.json"
            return check.failed(measured, f"wrong {name}", cause, step)
    captions = {picture.caption for picture in case.pictures if picture.caption}
    for caption in sorted(captions):
        ids = processor.tokenizer(caption, add_special_tokens=False).input_ids
        back = processor.tokenizer.decode(ids)
        if not ids or max(ids) >= config.text_vocab_size or back.split() != caption.split():
            cause = "the vocabulary does not cover the text, or its ids are not the model's"
            return check.failed(f"{caption!r} comes back as {back!r}", "wrong text tokenizer", cause, step)
    answer = case.answers[0]
    null = answer.prompt["negative_input_ids"][0]
    if int(null[-1]) != config.boi_token_id or len(null) >= answer.prompt["input_ids"].shape[1]:
        cause = "the null prompt keeps the user's text, or has another form than the prompt"
        measured = f"the null prompt is {processor.tokenizer.decode(null)!r}"
        return check.failed(measured, "wrong null prompt", cause, step)
    return check.passed(f"ids, null prompt and {len(captions)} texts are right")


def responses(check: Check, case: Case) -> Finding:
    """Logits of codes move with the prompt, a condition picture and the last scale of it, the codes of the scale
    before, the scale embedding, and the position along each axis."""
    answer, others = case.answers[0], case.answers[1:]
    plain, last = case.code_logits(answer), answer.schedule.slice(len(answer.schedule) - 1)
    other = next((each for each in others if each.row["input_ids"].tolist() != answer.row["input_ids"].tolist()), None)
    moves = {}
    if other is not None:
        moves["the prompt"] = _moves(case.code_logits(_answered(case, other, answer)), plain)
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
    return check.failed(
        f"relative change by {measured}",
        f"{still[0].removeprefix('the ')} ignored",
        f"{', '.join(still)} never reached the answer: weights are zero, as before training, or were cut off",
        "look at the checkpoint's weights: were these ever trained, and were all of them loaded?",
        moves=moves,
    )


def _moves(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far logits move, RMS, in their own deviation."""
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-12))


def _answered(case: Case, other: Answer, answer: Answer) -> Answer:
    """The answer's picture after another answer's prompt."""
    ids = torch.cat([other.prompt["input_ids"], answer.row["input_ids"][:, answer.start + 1 :]], dim=1)
    return replace(answer, row=answer.row | {"input_ids": ids}, start=other.start)


def worth(check: Check, case: Case) -> Finding:
    """A picture's codes are likelier after its own text than after another's: always where the text is read, for
    half of the pictures where it is not."""
    if case.packs is None:
        return check.unchecked("no shards were given")
    documents = _text_to_image(case, ROWS)
    gains = []
    for index, (ids, image) in enumerate(documents):
        other = next((o for o, _ in documents[index + 1 :] + documents[:index] if o.tolist() != ids.tolist()), None)
        if other is not None:
            own, wrong = (case.read(_row(case, each, image)) for each in (ids, other))
            costs = [F.nll_loss(each.log_probs, each.codes, reduction="sum") for each in (own, wrong)]
            gains.append(float(costs[1] - costs[0]))
    if len(gains) < ENOUGH:
        return check.unchecked(f"the shards hold {len(gains)} pictures after different texts alone, too few")
    gain, share = float(np.mean(gains)), float(np.mean([value > 0 for value in gains]))
    measured = f"{share:.0%} of {len(gains)} pictures are likelier after their own text, worth {gain:.1f} nats each"
    if share >= 0.75:
        return check.passed(measured, gain=gain, share=share)
    return check.warned(
        measured,
        "prompt ignored",
        "the texts do not describe these pictures, their ids are others than in training, or the model has not learnt "
        "to read them",
        "read some texts beside their pictures (`transformers-nextflow data inspect`); drop fewer texts in training",
        gain=gain,
        share=share,
    )


def _text_to_image(case: Case, limit: int) -> list[tuple[np.ndarray, tuple]]:
    """Compact ids and the picture of documents whose one picture is supervised, and whose text was not dropped."""
    empty = case.processor.apply_chat_template([{"role": "user", "content": ""}], generation_mode="image")
    found = []
    for document in stored_documents(case):
        at = np.flatnonzero(document.ids == case.config.image_token_id)
        if len(at) == 1 and document.supervised[at[0]] and at[0] + 1 > empty["input_ids"].shape[1]:
            found.append((document.ids[: at[0] + 1], document.images[0]))
        if len(found) == limit:
            break
    return found


def _row(case: Case, ids: np.ndarray, image: tuple) -> dict[str, torch.Tensor]:
    """A text, as compact ids that end in `<image>`, answered by a stored picture, as the model's forward takes it."""
    grid, targets, inputs = image
    supervised = np.zeros(len(ids), dtype=np.uint8)
    supervised[-1] = 1
    stored = {"input_ids": ids, "supervised": supervised, "image_grid_hw": np.array(grid)}
    stored |= {"image_codes": targets[:1].flatten(), "image_input_codes": inputs[:1].flatten()}
    spec = sequence_spec(case.shards[1]["identity"])
    batch = collate([unfold(stored, np.array([len(ids)]), spec, 1, [0])], 0, False)
    return {name: values.to(case.model.device) for name, values in batch.items()}
