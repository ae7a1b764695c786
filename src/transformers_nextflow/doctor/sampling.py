"""Checks of next-scale decoding: the same steps as in training, guidance, draws, and the settings of a checkpoint."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .case import Answer, Case
from .findings import SIGNIFICANT, Check, Finding, difference, tolerance, z_score

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "refine_top_k": []}
UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
DRAWN, SHOWN = 12, 4  # prompts that are drawn for, and those in the report


def generate(case: Case, answer: Answer, **controls):
    """`generate` for the answer's prompt, with the checkpoint's settings but for `controls`; returns sequences, and
    logits of each scale."""
    height, width = case.vq_model.schedules.image_size(answer.schedule)
    controls = {"height": height, "width": width, "seed": case.seed, "num_images_per_prompt": 1} | controls
    return case.model.generate(
        **answer.prompt, generation_mode="image", output_logits=True, return_dict_in_generate=True, **controls
    )


def _codes(case: Case, output) -> torch.Tensor:
    return output.sequences - case.config.text_vocab_size


def forced(check: Check, case: Case) -> Finding:
    """With a picture's own codes forced, every scale's logits while sampling equal those of one teacher-forced
    forward, and the ids that come out are the codes'."""
    first, worst = case.answers[0], 0.0
    for answer in (first, case.answer("draw it again", first.codes, first.schedule, [case.pictures[0].image])):
        output = generate(case, answer, forced_codes=answer.codes, **PLAIN, **UNGUIDED)
        step = "try another `attn_implementation`, and the model without adapters, quantisation or compilation"
        if not torch.equal(_codes(case, output), answer.codes):
            measured = "the ids that come out are not text rows + the forced codes"
            return check.failed(measured, "wrong code offset", "ids of codes are off", step)
        error = difference(torch.cat(output.logits, dim=1)[0].float(), case.code_logits(answer))
        if error > tolerance(case.model.dtype):
            cause = "positions, inputs, mask or cache of a step are others than in one forward"
            measured = f"logits differ by {error:.2g} of the largest"
            return check.failed(measured, "sampling unlike training", cause, step)
        worst = max(worst, error)
    return check.passed(f"logits differ by at most {worst:.1e} of the largest", difference=worst)


def guidance(check: Check, case: Case) -> Finding:
    """Guided logits are uncond + s (cond - uncond), s of each scale its own, and differ from unguided ones."""
    answer = case.answers[0]
    count = len(answer.schedule)
    scales = [2.0 + scale / count for scale in range(count)]
    of_call = PLAIN | UNGUIDED | {"guidance_scale": scales}
    output = generate(case, answer, forced_codes=answer.codes, **of_call)
    guided, conditional = torch.cat(output.logits, dim=1)[0].float(), case.code_logits(answer)
    unconditional = case.code_logits(answer.after(answer.prompt["negative_input_ids"]))
    s = torch.tensor(scales).repeat_interleave(torch.tensor(answer.schedule.lengths))[:, None].to(guided)
    effect = difference(conditional, unconditional)
    error = difference(guided, unconditional + s * (conditional - unconditional))
    measured = f"they differ from the formula by {error:.1e} of the largest; the text moves them by {effect:.2g}"
    figures = {"effect": effect, "difference": error}
    step = "look at the null prompt of the processor, and at the checkpoint's weights"
    if effect <= tolerance(case.model.dtype):
        cause = "with and without the prompt the logits are the same"
        return check.failed(measured, "guidance without effect", cause, step, **figures)
    if error > 10 * tolerance(case.model.dtype):  # guidance magnifies rounding
        return check.failed(measured, "wrong guidance", "another formula, or another null prompt", step, **figures)
    return check.passed(measured, **figures)


def draws(check: Check, case: Case) -> Finding:
    """Draws with the checkpoint's settings, at the level that these are for, cost no more than the model expects of
    plain ones (their entropy), and no less after the null prompt."""
    expected, cost, without, rows = [], [], [], []
    schedules = case.vq_model.schedules
    level = schedules.level_name(case.config.image_generation["level"])
    of_level = [each for each in case.answers if schedules.level_of(each.schedule.final_grid) == level]
    for number, answer in enumerate((of_level or case.answers)[:DRAWN]):
        controls = {"seed": case.seed * 1000 + number, "num_images_per_prompt": 2}
        drawn = _codes(case, generate(case, answer, **controls))
        for codes in drawn:
            again = replace(answer, row=answer.row | {"image_codes": codes})
            log_probs = case.code_logits(again).log_softmax(-1)
            expected.append(float(torch.special.entr(log_probs.exp()).sum(-1).mean()))
            null = case.code_logits(again.after(answer.prompt["negative_input_ids"])).log_softmax(-1)
            cost.append(_cost(log_probs, codes))
            without.append(_cost(null, codes))
        if number < SHOWN:
            shown = torch.cat([answer.codes, drawn])
            pixels = case.vq_model.decode(shown, answer.schedule.final_grid)
            rows.append(case.processor.image_processor.postprocess(pixels.cpu()))
    case.images["a described picture as its codes keep it, and two drawn for its text"] = rows
    expected, cost, without = map(torch.tensor, (expected, cost, without))
    harm, astray = z_score(cost - expected), z_score(cost - without)
    measured = f"draws cost {float(cost.mean()):.2f} nats a code over {len(cost)} pictures, plain ones would "
    measured += f"{float(expected.mean()):.2f}, after the null prompt these {float(without.mean()):.2f}"
    measured += "" if of_level else f"; none of the level {level}, which the settings are for"
    figures = {"drawn": float(cost.mean()), "expected": float(expected.mean()), "null": float(without.mean())}
    if astray > SIGNIFICANT:
        cause = "the checkpoint's settings draw pictures away from their prompt: guidance below 1, or its sign"
        step = "look at `guidance_scale` of `image_generation` in config.json"
        return check.warned(measured, "drawn against the prompt", cause, step, **figures)
    if of_level and harm > SIGNIFICANT:
        cause = "guidance, temperature, top-k and top-p draw codes that the model itself holds unlikely"
        step = "set `image_generation` in config.json back to temperature 1 and guidance 1, then raise guidance slowly"
        return check.warned(measured, "harmful sampling settings", cause, step, **figures)
    return check.passed(measured, **figures)


def _cost(log_probs_LV: torch.Tensor, codes_L: torch.Tensor) -> float:
    return float(F.nll_loss(log_probs_LV, codes_L, reduction="none").clamp(max=30).mean())
