"""Checks of the text side of the processor: special ids, the form of prompts and null prompts."""

from .case import Case
from .findings import Check, Finding, Verdict


def check_prompts(case: Case) -> Finding:
    """Processor and model mean the same by an id, and a null prompt is its prompt without the text."""
    check = Check(
        "prompts",
        "transformer",
        "processor and config.json agree on special ids and on what a read picture carries; texts come back from "
        "their ids; the null prompt is the prompt without the user's text, its pictures kept, and ends in `<boi>`",
    )
    config, processor = case.config, case.processor
    step = "compare tokenizer.json, processor_config.json and the chat template with the training's"
    for name in ("boi_token_id", "eoi_token_id", "image_token_id", "condition_last_scale"):
        theirs, ours = getattr(processor, name), getattr(config, name)
        if theirs != ours:
            fault = "wrong special ids" if name.endswith("id") else "last scale of condition pictures dropped"
            cause = "processor and model were saved with different settings"
            return check.failed(
                f"{name} is {theirs} to the processor, {ours} to config.json", Verdict(fault, cause, step)
            )
    for picture, _, _ in case.described[:8]:
        ids = processor.tokenizer(picture.caption, add_special_tokens=False).input_ids
        if not ids or max(ids) >= config.text_vocab_size:
            verdict = Verdict(
                "wrong text tokenizer", f"it has ids beyond the {config.text_vocab_size} text rows", step
            )
            return check.failed(f"{picture.caption!r} has the ids {ids}", verdict)
        back = processor.tokenizer.decode(ids)
        if back.split() != picture.caption.split():
            cause = "the vocabulary does not cover the text, or its ids are not the ones it decodes by"
            return check.failed(
                f"{picture.caption!r} comes back as {back!r}", Verdict("wrong text tokenizer", cause, step)
            )
    for conditions in ([], [case.described[0][0].image]):
        picture, codes, schedule = case.described[-1]
        prompt = case.sequence(picture.caption, codes, schedule, conditions).prompt
        full, null = (prompt[name][0] for name in ("input_ids", "negative_input_ids"))
        full_text, null_text = (processor.tokenizer.decode(ids) for ids in (full, null))
        cause = "the null prompt has another form than the training's, so guidance leads elsewhere"
        if picture.caption in null_text:
            cause = "the null prompt keeps the user's text, so guidance has nothing to lead away from"
        elif int((null == config.image_token_id).sum()) < int((full == config.image_token_id).sum()):
            cause = "the null prompt drops the pictures too, so guidance leads away from them"
        if full_text.replace(picture.caption, "") != null_text or int(null[-1]) != config.boi_token_id:
            return check.failed(
                f"the null prompt of {_short(full_text)!r} is {_short(null_text)!r}",
                Verdict("wrong null prompt", cause, step),
            )
    return check.passed("ids, texts and null prompts are right, for a text alone and after a picture")


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
