"""Checks of next-scale decoding: the same steps as in training, guidance, draws, and where quality is lost."""

import torch

from .case import Case, Sequence, captured
from .findings import SIGNIFICANT, Check, Finding, Verdict, difference, tolerance
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
    """Guided logits are uncond + s (cond - uncond), the prompt's rows first, every scale with its own s."""
    check = Check(
        "guidance",
        "sampling",
        "guided logits are uncond + s (cond - uncond), and with a condition picture none + s_image (uncond - none) + "
        "s (cond - uncond), s and s_image of each scale its own; they differ from unguided ones",
    )
    limit = 10 * tolerance(case.model.dtype)  # guidance magnifies rounding
    figures = {}
    for kind, sequence in (("text", case.example), ("picture", condition_example(case))):
        count = len(sequence.schedule)
        scales = [2.0 + scale / count for scale in range(count)]
        image_scales = [1.5 + scale / count for scale in range(count)] if kind == "picture" else [1.0] * count
        output = generate(
            case,
            sequence,
            forced_codes=sequence.codes,
            guidance_scale=scales,
            image_guidance_scale=image_scales,
        )
        guided = torch.cat(output.logits, dim=1)[0].float()
        conditional, null, none = _contexts(case, sequence)
        lengths = torch.tensor(sequence.schedule.lengths)
        s, reversed_s, t = (
            torch.tensor(values).repeat_interleave(lengths)[:, None].to(guided)
            for values in (scales, scales[::-1], image_scales)
        )
        formula = lambda a, b, c, s=s, t=t: c + t * (b - c) + s * (a - b)  # noqa: E731
        effect, error = difference(conditional, null), difference(guided, formula(conditional, null, none))
        figures |= {f"effect of the {kind}": effect, f"difference, {kind}": error}
        step = "look at `sampling.guide`, at the order of the rows, and at the null prompt of the processor"
        if effect <= tolerance(case.model.dtype):
            verdict = Verdict("guidance without effect", "with and without the prompt the logits are the same", step)
            return check.failed(f"prompt and null prompt differ by {effect:.1e}", verdict, **figures)
        if error <= limit:
            continue
        mistakes = {
            "guidance rows swapped: the null prompt is taken for the prompt": formula(null, conditional, none),
            "guidance without effect: the logits are those of the prompt alone": conditional,
            "wrong guidance: the formula is cond + s (cond - uncond), one more than s says": conditional
            + s * (conditional - null),
            "wrong guidance: scales take each other's s": formula(conditional, null, none, reversed_s),
            "wrong guidance: s and s_image are exchanged": formula(conditional, null, none, t, s),
        }
        found = next((name for name, other in mistakes.items() if difference(guided, other) <= limit), None)
        fault, cause = (found or "wrong guidance: another formula, or another null prompt").split(": ")
        measured = f"logits differ from the formula by {error:.2g} of the largest"
        return check.failed(measured, Verdict(fault, cause, step), **figures)
    return check.passed(
        f"they differ from the formula by {figures['difference, text']:.1e} and, with a condition picture, by "
        f"{figures['difference, picture']:.1e} of the largest; the text moves them by "
        f"{figures['effect of the text']:.2g}",
        **figures,
    )


def _contexts(case: Case, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher-forced logits after the prompt, the null prompt, and the null prompt without its pictures."""
    boi, eoi = case.config.boi_token_id, case.config.eoi_token_id
    null = sequence.prompt["negative_input_ids"]
    ids = null[0].tolist()
    while ids.index(boi) < len(ids) - 1:
        del ids[ids.index(boi) : ids.index(eoi) + 1]
    none = null.new_tensor([ids])
    rest = sequence.inputs["input_ids"][:, sequence.start + 1 :]
    logits = [case.code_logits(sequence)]
    alone = {"image_grid_hw": sequence.inputs["image_grid_hw"][-1:], "image_codes": sequence.codes[0]}
    for prompt, changed in ((null, {}), (none, alone)):
        inputs = sequence.inputs | changed | {"input_ids": torch.cat([prompt, rest], dim=1)}
        other = Sequence(inputs, sequence.prompt, sequence.codes, sequence.schedule, prompt.shape[1] - 1)
        logits.append(case.code_logits(other))
    return tuple(logits)


def kept_probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """(..., V) float64 what codes are drawn from: softmax at a temperature, of the `top_k` most likely codes, of these
    the fewest that make up `top_p`."""
    probs = (logits.double() / temperature).softmax(-1)
    ordered, order = probs.sort(dim=-1, descending=True)
    if top_k:
        ordered[..., top_k:] = 0
        ordered /= ordered.sum(-1, keepdim=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def check_draws(case: Case) -> Finding:
    """Codes are drawn from the logits as temperature, top-k and top-p say, each on its own."""
    check = Check(
        "draws",
        "sampling",
        "codes are drawn as temperature, top-k and top-p say: none that they exclude, the mean of -log p is the "
        "entropy, and it varies as independent draws do",
    )
    excess, variances, fourths, count, excluded = [], [], [], 0, 0
    null = case.example.prompt["negative_input_ids"]  # leaves most open
    open_prompt = {"input_ids": null, "attention_mask": torch.ones_like(null), "negative_input_ids": null}
    prompts = [case.answered(open_prompt, case.example.codes, case.example.schedule), *case.drawn_for[:3]]
    for number, sequence in enumerate(prompts):
        scales = len(sequence.schedule)
        temperature = [1.0 if number < 2 else 1.5 - scale / scales for scale in range(scales)]
        top_k = [0 if number < 2 else 3 + scale for scale in range(scales)]
        top_p = [1.0 if number < 2 else 0.95 - 0.3 * scale / scales for scale in range(scales)]
        output = generate(
            case,
            sequence,
            seed=case.seed * 1000 + number,
            num_images_per_prompt=8 if number else 24,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        drawn = output.sequences - case.config.text_vocab_size
        for scale, logits in enumerate(output.logits):
            moments = torch.zeros(3, dtype=torch.float64)
            for logits_lV, codes_l in zip(logits, drawn[:, sequence.schedule.slice(scale)]):
                probs = kept_probabilities(logits_lV, temperature[scale], top_k[scale], top_p[scale])
                codes = codes_l[:, None].clamp(0, probs.shape[-1] - 1)
                beyond = (-probs.log() - torch.special.entr(probs).sum(-1, keepdim=True)).masked_fill(probs == 0, 0)
                excluded += int((probs.gather(-1, codes) == 0).sum())
                sums = (beyond.gather(-1, codes), probs * beyond**2, probs * beyond**4)
                moments += torch.stack([each.sum() for each in sums]).cpu()
            excess, variances, fourths = (
                [*values, float(value)] for values, value in zip((excess, variances, fourths), moments)
            )
            count += drawn[:, sequence.schedule.slice(scale)].numel()
    score = sum(excess) / max(sum(variances), 1e-12) ** 0.5
    spread = _spread_score(excess, variances, fourths)
    measured = (
        f"of {count} codes {excluded} are excluded ones; they cost {sum(excess) / count:+.3f} nats beyond the entropy "
        f"({score:+.1f} standard errors), and vary {spread:+.1f} deviations more than independent draws"
    )
    figures = {"score": score, "spread": spread, "excluded": excluded}
    step = "look at `sampling.sample`, `RowGenerators`, and who passes each scale its temperature, top-k and top-p"
    if excluded:
        cause = "top-k, top-p or a temperature of 0 are not applied, or to other scales than they are given for"
        return check.failed(measured, Verdict("wrong draws", cause, step), **figures)
    if abs(score) > SIGNIFICANT:
        cause = (
            "codes are drawn more often from the " + ("unlikely" if score > 0 else "likely") + " than the logits say"
        )
        return check.failed(measured, Verdict("wrong draws", cause, step), **figures)
    if spread > SIGNIFICANT:
        cause = "positions or pictures share their random numbers, so they come out alike"
        return check.failed(measured, Verdict("draws not independent", cause, step), **figures)
    return check.passed(measured, **figures)


def _spread_score(excess: list[float], variances: list[float], fourths: list[float]) -> float:
    """How far the squares of sums of independent deviations lie above their variances, in deviations (Wilson and
    Hilferty's cube root of a chi-square); sums that one term may dominate are left out."""
    squares = [a * a / v for a, v, m in zip(excess, variances, fourths) if 0 < m <= v * v]
    if not squares:
        return 0.0
    width = 2 / (9 * len(squares))
    return ((sum(squares) / len(squares)) ** (1 / 3) - (1 - width)) / width**0.5


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
