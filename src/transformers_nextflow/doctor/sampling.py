"""Checks of next-scale decoding: the same steps as in training, guidance, draws, and the settings of a checkpoint."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .case import Answer, Case
from .findings import SIGNIFICANT, Check, Finding, difference, tolerance, z_score

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "refine_top_k": []}
UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
DRAWN, SHOWN = 8, 4  # prompts that are drawn for, and those in the report


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
    """Plain draws (temperature 1, no guidance) cost what the model expects of them, the entropy; draws with the
    checkpoint's settings cost no more, at the level that these are for, and no less after the null prompt."""
    cost, expected, by_default, without, rows = [], [], [], [], []
    schedules = case.vq_model.schedules
    level = case.config.image_generation["level"] or list(schedules.levels)[-1]
    of_level = [each for each in case.answers if schedules.level_of(each.schedule.final_grid) == level]
    for number, answer in enumerate((of_level or case.answers)[:DRAWN]):
        controls = {"seed": case.seed * 1000 + number, "num_images_per_prompt": 2}
        output = generate(case, answer, **controls, **PLAIN, **UNGUIDED)
        log_probs = torch.cat(output.logits, dim=1).float().log_softmax(-1)
        cost += _cost(log_probs, _codes(case, output))
        expected += (-(log_probs.exp() * log_probs).sum(-1)).mean(1).tolist()
        drawn = _codes(case, generate(case, answer, **controls))
        for codes in drawn:
            again = replace(answer, row=answer.row | {"image_codes": codes})
            by_default += _cost(case.code_logits(again).log_softmax(-1)[None], codes[None])
            null = case.code_logits(again.after(answer.prompt["negative_input_ids"]))
            without += _cost(null.log_softmax(-1)[None], codes[None])
        if number < SHOWN:
            shown = torch.cat([answer.codes, drawn])
            pixels = case.vq_model.decode(shown, answer.schedule.final_grid)
            rows.append(case.processor.image_processor.postprocess(pixels.cpu()))
    case.images["a described picture as its codes keep it, and two drawn for its text"] = rows
    cost, expected, by_default, without = map(torch.tensor, (cost, expected, by_default, without))
    score, harm, astray = z_score(cost - expected), z_score(by_default - cost), z_score(by_default - without)
    measured = f"plain draws cost {float(cost.mean()):.2f} nats a code, expected are {float(expected.mean()):.2f}; "
    measured += f"draws with the checkpoint's settings {float(by_default.mean()):.2f} ({len(cost)} pictures)"
    measured += f", after the null prompt {float(without.mean()):.2f}"
    measured += "" if of_level else f", none of the level {level}, which they are for"
    figures = {"plain": float(cost.mean()), "expected": float(expected.mean()), "default": float(by_default.mean())}
    if abs(score) > SIGNIFICANT:
        cause = "codes are drawn more often from the unlikely or the likely than the logits say"
        return check.failed(measured, "wrong draws", cause, "look at `sampling.sample` and who calls it", **figures)
    if astray > SIGNIFICANT:
        cause = (
            "with the checkpoint's settings pictures are drawn away from their prompt: guidance below 1, or its sign"
        )
        step = "look at `guidance_scale` of `image_generation` in config.json"
        return check.warned(measured, "drawn against the prompt", cause, step, **figures)
    if of_level and harm > SIGNIFICANT:
        cause = "guidance, temperature, top-k and top-p draw codes that the model itself holds unlikely"
        step = "set `image_generation` in config.json back to temperature 1 and guidance 1, then raise guidance slowly"
        return check.warned(measured, "harmful sampling settings", cause, step, **figures)
    return check.passed(measured, **figures)


def _cost(log_probs_BLV: torch.Tensor, codes_BL: torch.Tensor) -> list[float]:
    return F.nll_loss(log_probs_BLV.transpose(1, 2), codes_BL, reduction="none").clamp(max=30).mean(1).tolist()
