"""A check of what the transformer is asked with: special ids and prompts."""

from .case import Case
from .findings import Check, Finding


def prompts(check: Check, case: Case) -> Finding:
    """Processor, config.json and generation_config.json agree on special ids and on what a read picture carries; the
    null prompt is the prompt without the user's text, and ends in `<boi>`."""
    config, processor = case.config, case.processor
    step = "compare tokenizer.json, processor_config.json and the chat template with the training's"
    for name in ("boi_token_id", "eoi_token_id", "image_token_id", "condition_last_scale"):
        theirs, ours = getattr(processor, name), getattr(config, name)
        if theirs != ours:
            cause = "processor and model were saved with different settings"
            measured = f"{name} is {theirs} to the processor, {ours} to config.json"
            return check.failed(measured, f"wrong {name}", cause, step)
    ends = case.model.generation_config.eos_token_id
    if processor.tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        measured = f"generation ends at {ends}, a text of the tokenizer at {processor.tokenizer.eos_token_id}"
        cause = "generation_config.json is another model's, so no answer in text ends by itself"
        return check.failed(measured, "wrong end of text", cause, step)
    answer = case.answers[0]
    null = answer.prompt["negative_input_ids"][0]
    if int(null[-1]) != config.boi_token_id or len(null) >= answer.prompt["input_ids"].shape[1]:
        cause = "the null prompt keeps the user's text, or has another form than the prompt"
        measured = f"the null prompt is {processor.tokenizer.decode(null)!r}"
        return check.failed(measured, "wrong null prompt", cause, step)
    return check.passed("ids and null prompt are right")
