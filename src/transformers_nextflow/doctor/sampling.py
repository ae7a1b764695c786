"""Checks of next-scale decoding: the same steps as in training, guidance, draws, and where quality is lost."""

from dataclasses import replace
from statistics import fmean

import torch

from .case import Case, Sequence, captured
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, difference, tolerance, z_score
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
                "look at `generate` and at whoever reads its ids",
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
    return Verdict("wrong cache", cause, "look at `contexts.py`")


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
        logits.append(case.code_logits(replace(sequence, inputs=inputs, start=prompt.shape[1] - 1)))
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
        "entropy, and likely and unlikely ones mix as in independent draws",
    )
    cost, variance, count, excluded = 0.0, 0.0, 0, 0
    # sums of places in the distribution, their variances, sums of fourth moments: of each picture's positions of a
    # scale, and of all pictures'
    of_pictures, of_calls = [], []
    null = case.example.prompt["negative_input_ids"]  # leaves most open, and a high temperature everything
    open_prompt = {"input_ids": null, "attention_mask": torch.ones_like(null), "negative_input_ids": null}
    open_ended = case.answered(open_prompt, case.example.codes, case.example.schedule)
    for number, sequence in enumerate([open_ended, open_ended, *case.drawn_for[:2]]):
        scales, plain = len(sequence.schedule), number % 2 == 0
        temperature = [10.0 if number == 0 else 1.0 if plain else 1.5 - scale / scales for scale in range(scales)]
        top_k = [0 if plain else 3 + scale for scale in range(scales)]
        top_p = [1.0 if plain else 0.95 - 0.3 * scale / scales for scale in range(scales)]
        output = generate(
            case,
            sequence,
            seed=case.seed * 1000 + number,
            num_images_per_prompt=12 if sequence is open_ended else 4,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        drawn = output.sequences - case.config.text_vocab_size
        for scale, logits in enumerate(output.logits):
            codes_Bl = drawn[:, sequence.schedule.slice(scale)]
            settings = temperature[scale], top_k[scale], top_p[scale]
            pictures = [_moments(*each, *settings) for each in zip(logits, codes_Bl)]
            of_pictures += [moments[3:].tolist() for moments in pictures]
            total = torch.stack(pictures).sum(0)
            of_calls.append(total[3:].tolist())
            excluded += int(total[0])
            cost, variance = cost + float(total[1]), variance + float(total[2])
            count += codes_Bl.numel()
    score = cost / max(variance, 1e-12) ** 0.5
    spread = max(_spread_score(of_pictures), _spread_score(of_calls))
    measured = (
        f"of {count} codes {excluded} are excluded ones; they cost {cost / count:+.3f} nats beyond the entropy "
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


def _moments(
    logits_lV: torch.Tensor, codes_l: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """(6,) float64 sums over the codes drawn for a picture's scale: how many the settings exclude; -log p beyond the
    entropy, its variance; places in the distribution (-1/2 the likeliest, 1/2 the least), their variance, their fourth
    moment."""
    probs = kept_probabilities(logits_lV, temperature, top_k, top_p)
    codes = codes_l[:, None].clamp(0, probs.shape[-1] - 1)
    least = logits_lV.masked_fill(probs == 0, torch.inf).amin(-1, keepdim=True)  # in narrow dtypes many tie
    excluded = logits_lV.gather(-1, codes) < least
    beyond = (-probs.log() - torch.special.entr(probs).sum(-1, keepdim=True)).masked_fill(probs == 0, 0)
    ordered, order = probs.sort(dim=-1, descending=True)
    place = torch.zeros_like(probs).scatter(-1, order, ordered.cumsum(-1) - ordered / 2 - 0.5)
    of_costs = beyond.gather(-1, codes), probs * beyond**2
    of_places = place.gather(-1, codes), probs * place**2, probs * place**4
    return torch.stack([each.double().sum() for each in (excluded, *of_costs, *of_places)]).cpu()


def _spread_score(sums: list[list[float]]) -> float:
    """How far squares of sums of independent deviations lie above their variances, in deviations (Wilson and
    Hilferty's cube root of a chi-square); sums that one term may dominate are left out."""
    squares = [total**2 / variance for total, variance, fourth in sums if 0 < fourth <= variance**2]
    if not squares:
        return 0.0
    width = 2 / (9 * len(squares))
    return ((sum(squares) / len(squares)) ** (1 / 3) - (1 - width)) / width**0.5


def check_ladder(case: Case) -> Finding:
    """True codes for the first m scales, the rest sampled as by default: where the picture is lost, and by what."""
    check = Check(
        "teacher-forcing ladder",
        "sampling",
        "with all scales given it is the tokenizer's picture; codes drawn with the checkpoint's settings are no less "
        "likely to the model than plain draws (temperature 1, no guidance)",
    )
    sequences = case.drawn_for[:ENOUGH]
    most = max(len(sequence.schedule) for sequence in sequences)
    errors, likeness = [], []  # of each picture, with 0, 1, .. scales given
    costs: dict[str, list[list[float]]] = {name: [] for name in COSTS}
    likeness_of = Likeness(case, sequences)
    for number, sequence in enumerate(sequences):
        codes, schedule, seed = sequence.codes, sequence.schedule, case.seed + number
        drawn = [_drawn(case, sequence, given, seed) for given in range(len(schedule) + 1)]
        truth, *pictures = (case.vq_model.decode(each, schedule.final_grid) for each in (codes, *drawn))
        errors.append([float((each - truth).square().mean().sqrt() * 127.5) for each in pictures])
        likeness.append([likeness_of(each, truth) for each in pictures])
        if number < 4:
            shown = case.processor.image_processor.postprocess(torch.cat([truth, *pictures]).cpu())
            case.images.setdefault(LADDER, []).append(shown)

        after_truth = case.code_logits(sequence).log_softmax(-1)
        after_own = torch.cat(generate(case, sequence, seed=seed).logits, dim=1)[0].float().log_softmax(-1)
        own = case.answered(sequence.prompt, drawn[0], schedule)
        after_drawn = case.code_logits(own).log_softmax(-1)
        values = (_cost(after_truth, sequence.targets), _entropy(after_truth), _entropy(after_own))
        for name, each in zip(COSTS, (*values, _cost(after_drawn, drawn[0][0]))):
            costs[name].append([float(each[schedule.slice(scale)].mean()) for scale in range(len(schedule))])
    means = {"error": _by_scale(errors), "likeness": _by_scale(likeness)}
    means |= {name: _by_scale(rows) for name, rows in costs.items()}
    case.curves["ladder: error against the tokenizer's picture, grey levels (RMS)"] = {"scales given": means["error"]}
    case.curves["ladder: likeness to the tokenizer's picture, 1 = the same"] = {"scales given": means["likeness"]}
    case.curves["what codes cost, nats a code"] = {name: means[name] for name in COSTS}
    drops = [before - after for before, after in zip(means["error"], means["error"][1:])]
    worst = max(range(most), key=drops.__getitem__)
    of_picture = {name: torch.tensor([fmean(row) for row in rows]) for name, rows in costs.items()}
    guilty, reason = _guilty(likeness_of.of_tokenizer(), means["likeness"][0], *of_picture.values())
    measured = (
        f"over {len(sequences)} pictures, with 0, 1, .. {most} scales given the error is "
        f"{', '.join(f'{error:.0f}' for error in means['error'])} grey levels (RMS) and the likeness "
        f"{', '.join(f'{value:.2f}' for value in means['likeness'])}; giving scale {worst + 1} helps most. "
        f"Most is lost by {guilty}: {reason}"
    )
    figures = means | {"most": worst + 1, "guilty": guilty}
    if max(row[-1] for row in errors) > 1.0:
        cause = "codes that were given are not those that are decoded"
        return check.failed(measured, Verdict("lost codes", cause, "look at `draw_scales`"), **figures)
    if guilty == SETTINGS:
        verdict = Verdict(
            "harmful sampling settings",
            "the checkpoint's guidance, temperature, top-k and top-p draw codes that the model itself holds unlikely",
            "set `image_generation` in config.json back to temperature 1 and guidance 1, then raise guidance slowly",
        )
        return check.failed(measured, verdict, WARNING, **figures)
    return check.noted(measured, **figures)


LADDER = "ladder: the true codes decoded; then with 0, 1, .. scales of true codes given, the rest sampled"
COSTS = ("true codes", "expected after true codes", "expected after plain draws", "codes drawn by default")
"""What codes cost, -log p: true ones; what the model expects of its next draws (entropy), after true codes and after
plain draws of its own; and codes drawn with the checkpoint's settings. The first three are equal in a model that knows
its data and itself."""
SETTINGS = "the settings of sampling"


def _by_scale(rows: list[list[float]]) -> list[float]:
    return [fmean([row[at] for row in rows if at < len(row)]) for at in range(max(map(len, rows)))]


def _cost(log_probs: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return -log_probs.gather(-1, codes[:, None])[:, 0]


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def _drawn(case: Case, sequence: Sequence, given: int, seed: int) -> torch.Tensor:
    """(1, L) codes of the sequence's picture, the first scales given, the rest sampled with the checkpoint's
    settings."""
    height, width = case.vq_model.schedules.image_size(sequence.schedule)
    output = case.model.generate(
        **sequence.prompt,
        generation_mode="image",
        height=height,
        width=width,
        seed=seed,
        num_images_per_prompt=1,
        return_dict_in_generate=True,
        forced_codes=sequence.codes[:, : sequence.schedule.prefix(given).num_codes] if given else None,
    )
    return output.sequences - case.config.text_vocab_size


class Likeness:
    """How alike pictures are to the semantic encoder: cosine, place by place, of its features beyond their mean."""

    def __init__(self, case: Case, sequences: list[Sequence]):
        self.case = case
        truths = [case.vq_model.decode(each.codes, each.schedule.final_grid) for each in sequences]
        self.mean = torch.cat([self._features(pixels).flatten(0, 1) for pixels in truths]).mean(0)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.case.vq_model.semantic_features(pixels.to(self.case.vq_model.dtype)).float()

    def __call__(self, pixels: torch.Tensor, others: torch.Tensor) -> float:
        a, b = (self._features(each) - self.mean for each in (pixels, others))
        return float(torch.cosine_similarity(a, b, dim=-1).mean())

    def of_tokenizer(self) -> float:
        """Of pictures to what their codes keep of them."""
        groups = self.case.groups
        values = [
            self(self.case.vq_model.decode(each.codes, each.schedule.final_grid), each.pixels) for each in groups
        ]
        return fmean(values)


def _guilty(
    kept: float, sampled: float, true: torch.Tensor, expected: torch.Tensor, own: torch.Tensor, drawn: torch.Tensor
) -> tuple[str, str]:
    """What loses most of the likeness, and the figures that say so.

    Args:
        kept, sampled: likeness of the tokenizer's pictures to the given ones, and of sampled ones to the tokenizer's.
        true, expected, own, drawn: [`COSTS`] of each picture.
    """
    if z_score(drawn - own) > SIGNIFICANT:
        return SETTINGS, f"codes drawn cost {float(drawn.mean()):.2f} nats, plain draws {float(own.mean()):.2f}"
    if kept < sampled:
        return "the vision tokenizer", f"its codes keep a likeness of {kept:.2f}, sampling one of {sampled:.2f}"
    figures = (
        f"codes cost {float(true.mean()):.2f} nats; expected are {float(expected.mean()):.2f} after true codes and "
        f"{float(own.mean()):.2f} after plain draws"
    )
    if z_score(true - expected) > SIGNIFICANT:
        return "the transformer", f"it is surer of its predictions than they are right ({figures})"
    if z_score(own - expected) > SIGNIFICANT:
        return "exposure", f"its own draws lead it to where it is less sure than after true codes ({figures})"
    return "what the prompt leaves open", f"the model is as often right as it expects ({figures})"
