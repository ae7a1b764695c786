"""Checks of prompts, and of what is drawn for them: steps as in training, guidance, settings of a checkpoint."""

import torch
import torch.nn.functional as F

from .case import Case, Document, Row, redrawn
from .findings import SIGNIFICANT, Finding, difference, tolerance, z_score
from .weights import SAME

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "refine_top_k": []}
UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
DRAWN, SHOWN = 12, 4  # prompts that are drawn for, and those in the report
TIMES = 8  # that texts are tokenized, twice


def prompts(check: Finding, case: Case) -> Finding:
    """Processor, config.json and generation_config.json agree on special ids, pixels, sizes and what a read picture
    carries; a text has the same ids every time, and control tokens have rows of their own; the null prompt is the
    prompt without the user's text, and ends in `<boi>`."""
    config, tokenizer = case.config, case.processor.tokenizer
    try:
        case.processor.check_fits(config)
    except ValueError as error:
        return check.verdict(str(error), {"processor of another model": True})
    texts = [picture.caption for picture in case.pictures if picture.caption] or ["a text of some words, twice"]
    once, twice = (tokenizer(texts * TIMES)["input_ids"] for _ in range(2))
    prompt, null = sum(case.frame, []), case.null_prompt[0].tolist()
    control = sorted({*tokenizer.added_tokens_decoder} & {*prompt, config.boi_token_id, config.eoi_token_id})
    rows = F.normalize(case.model.get_input_embeddings().weight[control].float(), dim=-1)
    alike = (rows @ rows.T).triu(1).gt(SAME).any(dim=0).tolist()
    tokens = [token for token, is_alike in zip(tokenizer.convert_ids_to_tokens(control), alike) if is_alike]
    ends, end = case.model.generation_config.eos_token_id, tokenizer.eos_token_id
    differ = sum(a != b for a, b in zip(once, twice))
    measured = f"{differ} of {len(once)} texts have other ids the second time; tokens with one row: {tokens}; "
    measured += f"null prompt {tokenizer.decode(null)!r}; generation ends at {ends}, a text at {end}"
    faults = {
        "wrong end of text": end not in (ends if isinstance(ends, list) else [ends]),
        "text tokenizer at random": differ,
        "control tokens reset": tokens,
        "wrong null prompt": null[-1] != config.boi_token_id or len(null) > len(prompt) + 1,
    }
    return check.verdict(measured, faults)


def generate(case: Case, row: Row, **controls) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) codes that `generate` draws in the place of a row's last picture, with the checkpoint's settings but for
    `controls`, and (L, V) logits that the first are drawn from, around 0."""
    grids, ids = row["image_grid_hw"], row["input_ids"]
    schedule = case.schedules.by_grid(grids[-1])
    height, width = case.schedules.image_size(schedule)
    prompt = {"input_ids": ids[:, : (ids == case.config.boi_token_id).nonzero()[-1, 1] + 1]}
    if len(grids) > 1:
        prompt |= {"image_grid_hw": grids[:-1], "image_codes": row["image_codes"][: -schedule.num_codes]}
    settings = {"height": height, "width": width, "seed": case.seed, "num_images_per_prompt": 1} | controls
    settings |= {"generation_mode": "image", "output_logits": True, "return_dict_in_generate": True}
    output = case.model.generate(**prompt, negative_input_ids=case.null_prompt, **settings)
    logits = torch.cat(output.logits, dim=1)[0].float()
    return output.sequences - case.config.text_vocab_size, logits - logits.mean(dim=-1, keepdim=True)


def forced(check: Finding, case: Case) -> Finding:
    """With a picture's own codes forced, every scale's logits while sampling equal those of one teacher-forced
    forward, and the ids that come out are the codes'."""
    image, worst, is_same = case.pictures[0].image, 0.0, True
    for document in (case.asked[0], case.document("draw it again", image, image)):
        row = case.row_of(document)
        own = case.decoded(row)
        codes, logits = generate(case, row, forced_codes=own, **PLAIN, **UNGUIDED)
        is_same &= torch.equal(codes, own)
        worst = max(worst, difference(logits, case.logits(row)[0][0]))
    faults = {"wrong code offset": not is_same, "sampling unlike training": worst > tolerance(case.model.dtype)}
    return check.verdict(f"logits differ by at most {worst:.1e} of the largest", faults)


def guidance(check: Finding, case: Case) -> Finding:
    """Guided logits are uncond + s (cond - uncond), s of each scale its own, and differ from unguided ones."""
    row, null = _with_null(case, case.asked[0])
    conditional, unconditional = (case.logits(each)[0][0] for each in (row, null))
    lengths = case.schedules.by_grid(row["image_grid_hw"][0]).lengths
    scales = [2.0 + scale / len(lengths) for scale in range(len(lengths))]
    controls = PLAIN | UNGUIDED | {"guidance_scale": scales, "forced_codes": case.decoded(row)}
    _, guided = generate(case, row, **controls)
    s = torch.tensor(scales).repeat_interleave(torch.tensor(lengths))[:, None].to(guided)
    effect = difference(conditional, unconditional)
    error = difference(guided, unconditional + s * (conditional - unconditional))
    measured = f"they differ from the formula by {error:.1e} of the largest; the text moves them by {effect:.2g}"
    faults = {
        "guidance without effect": effect <= tolerance(case.model.dtype),
        "wrong guidance": error > 10 * tolerance(case.model.dtype),  # guidance magnifies rounding
    }
    return check.verdict(measured, faults)


def _with_null(case: Case, document: Document) -> tuple[Row, Row]:
    """A document, and with the null prompt in the place of its own, as rows."""
    return case.row_of(document), case.row_of(document.after(case.compact(case.null_prompt)))


def draws(check: Finding, case: Case) -> Finding:
    """Draws with the checkpoint's settings, at the level that these are for, cost no more than the model expects of
    plain ones (their entropy), and no less after the null prompt."""
    level, rows, costs = case.schedules.level_name(case.config.image_generation["level"]), [], []
    of_level = [each for each in case.asked if case.schedules.level_of(each.images[0][0]) == level]
    for number, document in enumerate((of_level or case.asked)[:DRAWN]):
        own, null = _with_null(case, document)
        drawn, _ = generate(case, own, seed=case.seed * 1000 + number, num_images_per_prompt=2)
        for codes in drawn:
            with_prompt, without = (case.read(redrawn(row, codes)).codes for row in (own, null))
            costs.append(torch.stack([with_prompt.cost, with_prompt.expected_N.mean(), without.cost]))
        if number < SHOWN:
            pixels = case.vq_model.decode(torch.cat([case.decoded(own), drawn]), document.images[0][0])
            rows.append(case.processor.image_processor.postprocess(pixels.cpu()))
    case.images["a described picture as its codes keep it, and two drawn for its text"] = rows
    cost, expected, after_null = torch.stack(costs).T
    measured = f"draws cost {float(cost.mean()):.2f} nats a code over {len(cost)} pictures, plain ones would "
    measured += f"{float(expected.mean()):.2f}, after the null prompt these {float(after_null.mean()):.2f}"
    faults = {
        "drawn against the prompt": z_score(cost - after_null) > SIGNIFICANT,
        "harmful sampling settings": of_level and z_score(cost - expected) > SIGNIFICANT,
    }
    return check.verdict(measured, faults)
