"""A check of what the model is asked with: processor, special ids and prompts."""

import torch.nn.functional as F

from .case import Case
from .findings import Check, Finding
from .weights import SAME

TIMES = 8  # that texts are tokenized, twice


def prompts(check: Check, case: Case) -> Finding:
    """Processor, config.json and generation_config.json agree on special ids, pixels, sizes and what a read picture
    carries; a text has the same ids every time, and control tokens have rows of their own; the null prompt is the
    prompt without the user's text, and ends in `<boi>`."""
    config, processor = case.config, case.processor
    step = "compare tokenizer.json, processor_config.json and the chat template with the training's"
    try:
        processor.check_fits(config)
    except ValueError as error:
        cause = "processor and model were saved with different settings"
        return check.failed(str(error), "processor of another model", cause, step)
    ends = case.model.generation_config.eos_token_id
    if processor.tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        measured = f"generation ends at {ends}, a text of the tokenizer at {processor.tokenizer.eos_token_id}"
        cause = "generation_config.json is another model's, so no answer in text ends by itself"
        return check.failed(measured, "wrong end of text", cause, step)
    texts = [picture.caption for picture in case.pictures if picture.caption] or ["a text of some words, twice"]
    once, twice = (processor.tokenizer(texts * TIMES)["input_ids"] for _ in range(2))
    if once != twice:
        differ = sum(a != b for a, b in zip(once, twice))
        cause = "pieces of words are drawn, as for regularisation (dropout in tokenizer.json)"
        measured = f"{differ} of {len(once)} texts have other ids the second time"
        return check.failed(measured, "text tokenizer at random", cause, "set `dropout` of tokenizer.json to null")
    answer = case.answers[0]
    added = {*processor.tokenizer.added_tokens_decoder}
    control = sorted(added & {*answer.prompt["input_ids"][0].tolist(), config.eoi_token_id})
    rows = F.normalize(case.model.get_input_embeddings().weight[control].float(), dim=-1)
    alike = (rows @ rows.T).triu(1) > SAME
    if alike.any():
        tokens = processor.tokenizer.convert_ids_to_tokens(control)
        measured = (
            "; ".join(f"{tokens[a]} and {tokens[b]}" for a, b in alike.nonzero().tolist()) + " have the same row"
        )
        cause = "rows of control tokens were reset or filled with the mean of all, as when a table is resized"
        return check.warned(measured, "control tokens reset", cause, "take them from the training's own checkpoint")
    null = answer.prompt["negative_input_ids"][0]
    if int(null[-1]) != config.boi_token_id or len(null) >= answer.prompt["input_ids"].shape[1]:
        cause = "the null prompt keeps the user's text, or has another form than the prompt"
        measured = f"the null prompt is {processor.tokenizer.decode(null)!r}"
        return check.failed(measured, "wrong null prompt", cause, step)
    return check.passed("ids and null prompt are right")
