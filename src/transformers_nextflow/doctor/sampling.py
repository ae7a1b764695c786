"""Checks of next-scale decoding: the same steps as in training, guidance, draws, and where quality is lost."""

import torch

from .case import Case, Sequence, captured
from .findings import ERROR, SIGNIFICANT, Check, Finding, Verdict, difference, tolerance
from .transformer import condition_example, input_verdict, parts_of, position_verdict

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "refine_top_k": []}


def generate(case: Case, sequence: Sequence, **controls):
    """`generate` of the sequence's picture, without truncation; returns sequences and logits of each scale."""
    height, width = case.vq_model.schedules.image_size(sequence.schedule)
    controls = PLAIN | {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "seed": case.seed} | controls
    return case.model.generate(
        **sequence.prompt,
        generation_mode="image",
        height=height,
        width=width,
        output_logits=True,
        return_dict_in_generate=True,
        **controls,
    )


def check_sampling(case: Case) -> Finding:
    """Sampling a picture's own codes gives the teacher-forced logits, step by step."""
    check = Check(
        "sampling against teacher forcing",
        "sampling",
        "with a picture's own codes forced, every scale's logits while sampling equal those of one teacher-forced "
        "forward, and the ids that come out are the codes'",
    )
    worst = 0.0
    for sequence in (case.example, condition_example(case)):
        wanted = case.code_logits(sequence)
        with captured(case.model.model.language_model) as calls:
            output = generate(case, sequence, forced_codes=sequence.codes)
        base = case.config.text_vocab_size
        if not torch.equal(output.sequences, sequence.codes + base):
            offset = (output.sequences - base - sequence.codes).flatten().mode().values
            verdict = Verdict(
                "wrong code offset",
                f"ids of codes are off by {int(offset):+d}",
                "look at `generate_image` and at whoever reads its ids",
            )
            return check.failed("the ids that come out are not text rows + the forced codes", verdict)
        pixels = case.model.decode_image_tokens(output.sequences, sequence.schedule.final_grid)
        decoded = case.vq_model.decode(sequence.codes, sequence.schedule.final_grid)
        if difference(pixels, decoded) > tolerance(pixels.dtype):
            verdict = Verdict(
                "wrong code offset", "ids become other codes on the way to pixels", "look at `decode_image_tokens`"
            )
            return check.failed("ids do not decode to the picture of their codes", verdict)
        error = difference(torch.cat(output.logits, dim=1)[0].float(), wanted)
        if error > tolerance(case.model.dtype):
            ids, schedules, codes = parts_of(case, sequence)
            verdict = _step_verdict(case, calls, sequence, ids, schedules, codes)
            return check.failed(f"logits differ by {error:.2g} of the largest", verdict, difference=error)
        worst = max(worst, error)
    return check.passed(f"logits differ by at most {worst:.1e} of the largest", difference=worst)


def _step_verdict(case: Case, calls: list[dict], sequence: Sequence, ids, schedules, codes) -> Verdict:
    """The first step whose positions or inputs are others than in one forward."""
    where, done = case.places(ids, schedules), 0
    for call in calls:
        embeds, positions = call["inputs_embeds"][:1], call["position_ids"][:, :1]
        at = slice(done, done + embeds.shape[1])
        verdict = position_verdict(positions, where.positions[:, None, at])
        if verdict is not None:
            return verdict
        expected = case.reference_inputs(ids, schedules, codes, where)[at]
        if difference(embeds[0], expected) > tolerance(embeds.dtype):
            return input_verdict(case, embeds[0], ids, schedules, codes, where, at)
        done = at.stop
    cause = "inputs and positions of every step are right; the cache or its mask are not"
    return Verdict("wrong cache", cause, "look at `row_cache.py` and `row_mask`")


def check_guidance(case: Case) -> Finding:
    """Guided logits are uncond + s (cond - uncond), the prompt's rows first."""
    check = Check(
        "guidance", "sampling", "guided logits are uncond + s (cond - uncond), and differ from unguided ones"
    )
    sequence, scale = case.example, 2.0
    conditional = case.code_logits(sequence)
    null = sequence.prompt["negative_input_ids"]
    rest = sequence.inputs["input_ids"][:, sequence.start + 1 :]
    inputs = sequence.inputs | {"input_ids": torch.cat([null, rest], dim=1)}
    unconditional = case.code_logits(
        Sequence(inputs, sequence.prompt, sequence.codes, sequence.schedule, null.shape[1] - 1)
    )
    output = generate(case, sequence, forced_codes=sequence.codes, guidance_scale=scale)
    guided = torch.cat(output.logits, dim=1)[0].float()
    expected = unconditional + scale * (conditional - unconditional)
    limit = 10 * tolerance(case.model.dtype)  # guidance magnifies rounding
    effect = difference(conditional, unconditional)
    figures = {"effect": effect, "difference": difference(guided, expected)}
    step = "look at `sampling.guide`, at the order of the rows, and at the null prompt of the processor"
    if effect <= tolerance(case.model.dtype):
        verdict = Verdict("guidance without effect", "with and without the prompt the logits are the same", step)
        return check.failed(f"prompt and null prompt differ by {effect:.1e}", verdict, **figures)
    if figures["difference"] <= limit:
        measured = (
            f"they differ from the formula by {figures['difference']:.1e} of the largest; unguided: {effect:.2g}"
        )
        return check.passed(measured, **figures)
    verdict = Verdict("wrong guidance", "another formula, or another null prompt", step)
    if difference(guided, conditional + scale * (unconditional - conditional)) <= limit:
        verdict = Verdict(
            "guidance rows swapped", "the null prompt is taken for the prompt: guidance leads away from it", step
        )
    elif difference(guided, conditional) <= limit:
        verdict = Verdict("guidance without effect", "the logits are those of the prompt alone", step)
    elif difference(guided, conditional + scale * (conditional - unconditional)) <= limit:
        verdict = Verdict("wrong guidance", "the formula is cond + s (cond - uncond): one more than s says", step)
    return check.failed(
        f"they differ from the formula by {figures['difference']:.2g} of the largest", verdict, **figures
    )


def check_draws(case: Case) -> Finding:
    """Codes are drawn from the logits: what they cost is the entropy, up to chance."""
    check = Check(
        "draws",
        "sampling",
        "at temperature 1 the mean of -log p of the codes drawn is the entropy of what they are drawn from",
    )
    total, variance, count = 0.0, 0.0, 0
    null = case.example.prompt["negative_input_ids"]  # leaves most open
    open_prompt = {"input_ids": null, "attention_mask": torch.ones_like(null), "negative_input_ids": null}
    prompts = [case.answered(open_prompt, case.example.codes, case.example.schedule), *case.drawn_for[:3]]
    for number, sequence in enumerate(prompts):
        output = generate(case, sequence, seed=case.seed * 1000 + number, num_images_per_prompt=8 if number else 24)
        log_probs = torch.cat(output.logits, dim=1).float().log_softmax(-1)
        drawn = output.sequences - case.config.text_vocab_size
        surprise = -log_probs.gather(-1, drawn[..., None].clamp(0, log_probs.shape[-1] - 1))[..., 0]
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1)
        total += float((surprise - entropy).double().sum())
        variance += float(((probs * log_probs.square()).sum(-1) - entropy.square()).double().clamp(min=0).sum())
        count += drawn.numel()
    score = total / max(variance, 1e-12) ** 0.5
    measured = f"{count} codes cost {total / count:+.3f} nats beyond the entropy ({score:+.1f} standard errors)"
    if abs(score) <= SIGNIFICANT:
        return check.passed(measured, score=score)
    cause = "codes are drawn more often from the " + ("unlikely" if score > 0 else "likely") + " than the logits say"
    step = "look at `sampling.sample`: the order of codes, temperature, top-k and top-p"
    return check.failed(measured, Verdict("wrong draws", cause, step), ERROR, score=score)


def check_ladder(case: Case) -> Finding:
    """True codes for the first m scales, the rest sampled as by default: where the picture is lost."""
    check = Check(
        "teacher-forcing ladder",
        "sampling",
        "forced to the end it is the tokenizer's picture; the scale from which forcing helps most is the one that "
        "sampling loses",
    )
    sequence = case.drawn_for[0]
    codes, schedule = sequence.codes, sequence.schedule
    truth = case.vq_model.decode(codes, schedule.final_grid)
    height, width = case.vq_model.schedules.image_size(schedule)
    errors, shown = [], case.processor.image_processor.postprocess(truth.cpu())
    repeats = 4
    for forced in range(len(schedule) + 1):
        extra = {"forced_codes": codes[:, : schedule.prefix(forced).num_codes]} if forced else {}
        tokens = case.model.generate(
            **sequence.prompt,
            generation_mode="image",
            height=height,
            width=width,
            seed=case.seed,
            num_images_per_prompt=repeats,
            **extra,
        )
        pixels = case.model.decode_image_tokens(tokens, schedule.final_grid)
        errors.append(float((pixels - truth).square().mean().sqrt() * 127.5))
        shown += case.processor.image_processor.postprocess(pixels[:1].cpu())
    case.images["the picture's codes decoded; then 0, 1, .. of its scales forced and the rest sampled"] = [shown]
    case.curves["ladder: error against the tokenizer's picture, grey levels"] = {"scales forced": errors}
    losses = torch.nn.functional.cross_entropy(case.code_logits(sequence), codes[0], reduction="none")
    per_scale = [float(losses[schedule.slice(scale)].mean()) for scale in range(len(schedule))]
    drops = [before - after for before, after in zip(errors, errors[1:])]
    worst = max(range(len(drops)), key=drops.__getitem__)
    measured = (
        f"RMS error {', '.join(f'{error:.0f}' for error in errors)} grey levels with 0, 1, .. scales forced; forcing "
        f"scale {worst + 1} helps most ({drops[worst]:.0f})"
    )
    figures = {"error": errors, "loss": per_scale, "most": worst + 1}
    if errors[-1] > 1.0:
        verdict = Verdict(
            "lost codes", "codes that were forced are not those that are decoded", "look at `draw_images`"
        )
        return check.failed(measured, verdict, **figures)
    return check.noted(measured, **figures)
