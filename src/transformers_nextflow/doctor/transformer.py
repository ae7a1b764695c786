"""Checks of the transformer: its code against the formulas, and what its weights respond to."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..scales import ScaleSchedule
from . import reference
from .case import Case, Sequence, captured, changed
from .findings import ENOUGH, WARNING, Check, Finding, Verdict, difference, tolerance
from .tokenizer import INTERPOLATION, SWAPPED

COORDINATES, AXIS = "bf16 coordinates", "blind position axis"
SCALES, PIXELS = "missing scale embedding", "dropped pixels"
AXES = ("counter", "row", "column")


def check_positions(case: Case) -> Finding:
    """Positions are eq. 1's in float32, and documents of a pack begin at 0."""
    check = Check(
        "positions",
        "transformer",
        "float32 positions (counter, row, column): text counts on, cells lie at C / sqrt(h w) (i + 1/2, j + 1/2) "
        "(eq. 1), and every document of a pack begins at 0",
    )
    inputs, schedules, documents = packed_example(case)
    with captured(case.model.model.language_model) as calls:
        case.model(**inputs, logits_over="none", use_cache=False)
    actual = calls[0]["position_ids"]
    wanted = case.places(inputs["input_ids"][0], schedules, documents).positions[:, None]
    verdict = position_verdict(actual, wanted)
    if verdict is None:
        verdict = _rotary_verdict(case, actual)
    if verdict is not None:
        return check.failed(f"positions differ by up to {_largest(actual, wanted):.2g}", verdict)
    return check.passed(f"positions differ by at most {_largest(actual, wanted):.1e}")


def _largest(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    if actual.shape != wanted.shape:
        return float("inf")
    return float((actual.double().cpu() - wanted).abs().max())


def position_verdict(actual: torch.Tensor, wanted: torch.Tensor) -> Verdict | None:
    """What is wrong with (3, B, L) positions, if anything."""
    step = "look at `layout.py` (teacher forcing) and `Contexts.read_scale` (sampling)"
    if actual.shape != wanted.shape:
        return Verdict(
            "wrong positions", f"they have the shape {tuple(actual.shape)}, not {tuple(wanted.shape)}", step
        )
    values = actual.double().cpu()
    limit = 1e-5 * float(wanted.abs().max().clamp(min=1))
    is_near = lambda other: float((values - other).abs().max()) <= limit  # noqa: E731
    coarse = Verdict(
        COORDINATES,
        "coordinates went through a dtype of fewer digits than float32, so neighbouring cells fall together",
        "compute positions, frequencies, sines and cosines in float32 whatever the model's dtype",
    )
    if is_near(wanted):
        return None if actual.dtype in (torch.float32, torch.float64) else coarse
    if is_near(wanted.bfloat16().double()) or is_near(wanted.half().double()):
        return coarse
    if is_near(wanted[[0, 2, 1]]):
        return Verdict(SWAPPED, "rows and columns of the coordinates are exchanged", step)
    off = [float((values[axis] - wanted[axis]).abs().max()) > limit for axis in range(3)]
    inside = wanted[1] != wanted[0]
    inside |= wanted[2] != wanted[0]
    for axis in (1, 2):
        if (
            off[axis]
            and not off[3 - axis]
            and inside.any()
            and len(values[axis][inside].unique()) < len(wanted[axis][inside].unique())
        ):
            cause = f"the {AXES[axis]} of a cell hardly enters its position, so the model cannot tell cells along it"
            return Verdict(AXIS, cause, step)
    if off[0]:
        cause = "the counter of the first axis runs differently, within a picture or from document to document"
        return Verdict("wrong position counter", cause, step)
    return Verdict("wrong coordinates", "cells do not lie where eq. 1 puts them", step)


def _rotary_verdict(case: Case, positions: torch.Tensor) -> Verdict | None:
    """Whether sines and cosines have float32's digits, and frequencies stay float32 when the model is cast."""
    rotary = case.model.model.language_model.rotary_emb
    verdict = Verdict(
        COORDINATES,
        "rotary frequencies or angles are computed with fewer digits than float32",
        "keep `inv_freq` float32 when the model is cast, and switch autocast off around the angles",
    )
    if copy.deepcopy(rotary).to(torch.bfloat16).inv_freq.dtype != torch.float32:
        return verdict
    for row in positions:
        cosines, sines = rotary(positions.new_zeros(1, 1, 1, dtype=torch.float32), row.expand(3, -1, -1))
        angles = row.double()[..., None] * rotary.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        factor = rotary.attention_scaling
        error = max(
            float((cosines.double() - angles.cos() * factor).abs().max()),
            float((sines.double() - angles.sin() * factor).abs().max()),
        )
        # an angle in float32 is off by half a digit of its size
        if error > 4 * torch.finfo(torch.float32).eps * max(float(row.abs().max()), 16):
            return verdict
    return None


def packed_example(case: Case) -> tuple[dict, list[ScaleSchedule], list[int]]:
    """The example and another described picture as two documents of one row."""
    picture, codes, schedule = case.described[0]
    first, second = case.example, case.sequence(picture.caption, codes, schedule)
    inputs = {
        name: torch.cat([first.inputs[name], second.inputs[name]], dim=1 if name == "input_ids" else 0)
        for name in first.inputs
    }
    lengths = [each.inputs["input_ids"].shape[1] for each in (first, second)]
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    inputs["document_ids"] = torch.tensor([documents], device=inputs["input_ids"].device)
    return inputs, [first.schedule, second.schedule], documents


def check_inputs(case: Case) -> Finding:
    """What enters the decoder: text embeddings, features of the scale before, and the scale's embedding."""
    check = Check(
        "inputs of the decoder",
        "transformer",
        "text embeddings; in a scale's block the entries of the scale before, bicubic, through the connector; and the "
        "scale's embedding on `<boi>` and blocks (NextFlow sec. 2.2)",
    )
    for sequence in (case.example, condition_example(case)):
        ids, schedules, codes = parts_of(case, sequence)
        with captured(case.model.model.language_model) as calls:
            case.model(**sequence.inputs, logits_over="none", use_cache=False)
        actual = calls[0]["inputs_embeds"][0]
        where = case.places(ids, schedules)
        error = difference(actual, case.reference_inputs(ids, schedules, codes, where))
        if error > tolerance(actual.dtype):
            verdict = input_verdict(case, actual, ids, schedules, codes, where)
            return check.failed(f"inputs differ by {error:.2g} of the largest value", verdict, error=error)
    return check.passed(f"inputs differ by at most {error:.1e} of the largest value", error=error)


def condition_example(case: Case) -> Sequence:
    """The example after another picture."""
    picture, codes, schedule = case.described[-1]
    return case.sequence(picture.caption, codes, schedule, [case.described[0][0].image])


def parts_of(case: Case, sequence: Sequence) -> tuple[torch.Tensor, list[ScaleSchedule], list[torch.Tensor]]:
    """Ids, schedules and codes of the pictures of a sequence."""
    grids = [tuple(grid) for grid in sequence.inputs["image_grid_hw"].tolist()]
    schedules = [case.vq_model.schedules.by_grid(grid) for grid in grids]
    codes = sequence.inputs["image_codes"].split([schedule.num_codes for schedule in schedules])
    return sequence.inputs["input_ids"][0], schedules, list(codes)


def input_verdict(case: Case, actual: torch.Tensor, ids, schedules, codes, where, at=slice(None)) -> Verdict:
    """Which mistake gives these inputs; `at` are the positions they stand at."""

    def matches(**mistake) -> bool:
        expected = case.reference_inputs(ids, schedules, codes, where, **mistake)[at]
        return difference(actual, expected) <= tolerance(actual.dtype)

    step = "look at `NextFlowModel.embed_images` (teacher forcing) and `read_prompts` (sampling)"
    if matches(scales=False):
        return Verdict(SCALES, "blocks and `<boi>` come without the embedding of their scale", step)
    if matches(visual=False) or matches(visual=False, scales=False):
        return Verdict(PIXELS, "picture positions hold the placeholder's embedding: the picture never arrives", step)
    for name, resize in reference.OTHER_RESIZES.items():
        if matches(resize=resize):
            return Verdict(INTERPOLATION, f"a scale's entries reach the next grid by {name}, not bicubic", step)
    if matches(to_map=reference.as_transposed_map):
        return Verdict(SWAPPED, "entries are laid out column by column in place of row by row", step)
    if matches(accumulate=case.config.feature_mode != "accumulated"):
        cause = f"the features are not {case.config.feature_mode}, which config.json names"
        return Verdict("wrong feature mode", cause, step)
    for shift in (-1, 1):
        moved = [(code + shift).clamp(0, len(case.codebook) - 1) for code in codes]
        expected = case.reference_inputs(ids, schedules, moved, where)[at]
        if difference(actual, expected) <= tolerance(actual.dtype):
            return Verdict("wrong code offset", f"code c enters as the entry of code c{shift:+d}", step)
    expected = case.reference_inputs(ids, schedules, codes, where)[at]
    wrong = (actual.double() - expected.double()).abs().amax(-1) > tolerance(actual.dtype) * float(
        expected.abs().max()
    )
    scales = torch.tensor(where.scales)[at].to(wrong.device)
    named = sorted(set(scales[wrong].tolist()))
    if float(wrong[scales > 1].float().mean()) < 0.95 and len(named) and 0 not in named:
        plain = case.reference_inputs(ids, schedules, codes, where, visual=False)[at]
        near = (actual.double() - plain.double()).abs().amax(-1) <= tolerance(actual.dtype) * float(plain.abs().max())
        if bool(near[wrong].all()):
            return Verdict(
                PIXELS, "some picture positions hold the placeholder's embedding in place of features", step
            )
    places = ", ".join("text" if scale == 0 else f"scale {scale}" for scale in named)
    return Verdict("wrong inputs", f"what enters the decoder differs at {places}", step)


def check_attention(case: Case) -> Finding:
    """Who sees whom, by what a change at one position changes elsewhere."""
    check = Check(
        "attention",
        "transformer",
        "a position sees everything before it in its document and all of its own scale block, and nothing else",
    )
    inputs, schedules, documents = packed_example(case)
    where = case.places(inputs["input_ids"][0], schedules, documents)
    length = len(documents)
    boundary = documents.index(1)
    boi = where.scales.index(1)
    block = where.blocks[boi + 1 + sum(schedules[0].lengths[1:-1])]  # the last scale's
    coarse = where.blocks[max(boi + 1, block[0] - 1)]
    probes = sorted({1, boi, coarse[0], coarse[1], block[0], block[1], boundary - 1, boundary + 1})
    generator = torch.Generator().manual_seed(case.seed)

    def disturb(kwargs: dict) -> dict:
        embeds = kwargs["inputs_embeds"].clone()
        noise = torch.randn(len(probes), embeds.shape[-1], generator=generator).to(embeds)
        for row, place in enumerate(probes, start=1):
            embeds[row, place] += noise[row - 1] * embeds[0].norm(dim=-1).mean() / embeds.shape[-1] ** 0.5
        return kwargs | {"inputs_embeds": embeds}

    rows = 1 + len(probes)
    batch = {
        name: value.repeat(rows, 1) if name in ("input_ids", "document_ids", "image_grid_hw") else value.repeat(rows)
        for name, value in inputs.items()
    }
    with torch.no_grad(), changed(case.model.model.language_model, disturb):
        hidden = case.model.model(**batch, use_cache=False).last_hidden_state.float()
    moved = (hidden[1:] - hidden[:1]).abs().amax(-1) / hidden[:1].abs().max()
    limit = tolerance(hidden.dtype) if case.model.dtype == torch.float32 else tolerance(case.model.dtype)
    leaks, gaps, worst = {}, {}, 0.0
    for row, place in enumerate(probes):
        for other in range(length):
            same = documents[other] == documents[place]
            sees = same and (where.blocks[other][1] >= place)
            response = float(moved[row, other])
            if not sees:
                worst = max(worst, response)
                if response > limit:
                    leaks.setdefault("document" if not same else "later", (place, other, response))
            elif response == 0.0:
                gaps.setdefault("block" if other < place else "earlier", (place, other, response))
    step = "look at `attention.py`, or at the attention backend (`attn_implementation`)"
    if "document" in leaks:
        verdict = Verdict("leaking documents", "documents packed in one row see each other", step)
    elif "later" in leaks:
        verdict = Verdict(
            "scales see later ones", "positions see what they have to predict, so the loss is a trap", step
        )
    elif "block" in gaps:
        verdict = Verdict("causal blocks", "positions of one scale do not see those after them in their block", step)
    elif "earlier" in gaps:
        verdict = Verdict("lost context", "positions do not see all that comes before them", step)
    else:
        return check.passed(f"what must not be seen moves outputs by at most {worst:.1e} of the largest value")
    place, other, response = next(iter((leaks or gaps).values()))
    return check.failed(f"a change at position {place} moves position {other} by {response:.2g}", verdict)


def check_decoder(case: Case) -> Finding:
    """The decoder's layers compute what they are defined to compute."""
    check = Check(
        "layers of the decoder",
        "transformer",
        "hidden states equal those of Qwen2.5's formulas, written once more: normalisation, rotary sections and base "
        "as config.json names them, attention, residual sums, final normalisation",
    )
    text, config = case.model.model.language_model, case.config.text_config
    if config.rope_parameters["rope_type"] != "default" or config.use_sliding_window:
        return check.noted("the formulas are written for plain rotary positions and full attention only")
    inputs, schedules, documents = packed_example(case)
    with captured(text) as calls, torch.no_grad():
        output = case.model.model(**inputs, use_cache=False, output_hidden_states=True)
    where = case.places(inputs["input_ids"][0], schedules, documents)
    own, last = torch.tensor(documents), torch.tensor([block[1] for block in where.blocks])
    order = torch.arange(len(documents))
    seen = (own[:, None] == own) & (order <= last[:, None])
    embeds = calls[0]["inputs_embeds"][0]
    with torch.no_grad():
        states = reference.decoder_states(text.layers, config, embeds, where.positions, seen.to(embeds.device))
    weight = text.norm.weight if hasattr(text.norm, "weight") else torch.ones_like(embeds[0])
    final = reference.normalised(states[-1], weight, config.rms_norm_eps)
    limit = tolerance(embeds.dtype)
    error = difference(output.last_hidden_state[0], final)
    if error <= limit:
        return check.passed(f"hidden states differ by at most {error:.1e} of the largest value", difference=error)
    wrong = (
        number for number, (a, b) in enumerate(zip(output.hidden_states[1:-1], states)) if difference(a[0], b) > limit
    )
    first = next(wrong, None)
    if first is None and difference(output.last_hidden_state[0], states[-1]) <= limit:
        place, cause = "behind the last layer", "the final normalisation is left out"
    elif first is None:
        place, cause = "from the last layer on", "the last layer or the final normalisation are computed otherwise"
    else:
        place, cause = f"from layer {first + 1} of {len(states)} on", "this layer is computed otherwise"
    if first == 0 and list(text.rotary_emb.mrope_section) != list(config.rope_parameters["mrope_section"]):
        cause = "the rotary sections in use are not those of config.json"
    verdict = Verdict(
        "wrong decoder layers",
        cause,
        "compare the code and `rope_parameters` with the training's; try another "
        "`attn_implementation`, and the model without adapters, quantisation or compilation",
    )
    return check.failed(f"hidden states differ by {error:.2g} of the largest value {place}", verdict, difference=error)


def check_targets(case: Case) -> Finding:
    """The loss is that of the right targets, weighted as eq. 2 says."""
    check = Check(
        "targets",
        "transformer",
        "block k is to predict scale k's codes position by position, as id text rows + code, text its next token; "
        "scales weigh 1 / (h w)^alpha, normalised for each image (eq. 2)",
    )
    sequence = case.example
    ids, codes, base = sequence.inputs["input_ids"], sequence.codes[0], case.config.text_vocab_size
    with torch.no_grad():
        output = case.model(**sequence.inputs, labels=ids.clone(), logits_over="all", use_cache=False)
    log_probs = output.logits[0].float().log_softmax(-1)
    losses = output.token_losses[0].float()
    at = torch.arange(sequence.start, sequence.start + len(codes), device=ids.device)
    text = torch.arange(sequence.start, device=ids.device)
    loss_of = lambda places, targets: -log_probs[places, targets.clamp(0, log_probs.shape[-1] - 1)]  # noqa: E731
    limit = tolerance(log_probs.dtype) if case.model.dtype == torch.float32 else tolerance(case.model.dtype)
    is_near = lambda a, b: difference(a, b) <= limit  # noqa: E731
    step = "look at `layout.py`: `shift_labels_of` and `_targets`; train anew after it"
    if not is_near(losses[at], loss_of(at, base + codes)):
        verdict = Verdict("wrong targets", "the targets of the codes are others", step)
        size = case.config.vq_config.codebook_size
        for shift in (-base, -2, -1, 1, 2, case.config.image_token_id):
            for wrapped in (base + codes + shift, base + (codes + shift) % size):
                if is_near(losses[at], loss_of(at, wrapped)):
                    verdict = Verdict(
                        "wrong code offset", f"codes are numbered {shift:+d} from the text rows on", step
                    )
        for shift in (-1, 1):
            if is_near(losses[at], loss_of(at, base + codes.roll(shift))):
                verdict = Verdict("shifted targets", "each position is to predict its neighbour's code", step)
            inner = losses[at][1:-1]
            if is_near(inner, loss_of(at, base + codes.roll(shift))[1:-1]):
                verdict = Verdict("shifted targets", "each position is to predict its neighbour's code", step)
        error = difference(losses[at], loss_of(at, base + codes))
        return check.failed(f"the codes' losses differ by {error:.2g} of the largest", verdict)
    if not is_near(losses[text], loss_of(text, ids[0, 1 : sequence.start + 1])):
        cause = "text positions predict another than the next token"
        return check.failed("the losses of text are not the next token's", Verdict("shifted targets", cause, step))
    behind = losses[sequence.start + len(codes) :]
    if bool(behind.any()):
        cause = "<eoi>, which is inserted and never predicted, or what follows it is supervised"
        return check.failed(
            f"{int((behind != 0).sum())} positions behind the picture have a loss",
            Verdict("boundary tokens supervised", cause, step),
        )
    weights = torch.ones_like(losses)
    raw = torch.tensor([length**-case.config.scale_loss_alpha for length in sequence.schedule.lengths])
    raw = raw.repeat_interleave(torch.tensor(sequence.schedule.lengths))
    weights[at] = (raw * len(raw) / raw.sum()).to(weights)
    weights[sequence.start + len(codes) :] = 0
    expected = float((weights * losses).sum() / weights.sum())
    if abs(float(output.loss) - expected) > limit * abs(expected):
        verdict = Verdict("wrong scale weights", "the scales' losses are not weighted as eq. 2 says", step)
        return check.failed(f"the loss is {float(output.loss):.4f}, eq. 2 gives {expected:.4f}", verdict)
    return check.passed(f"the loss is {float(output.loss):.4f}, eq. 2 over the right targets gives {expected:.4f}")


def _moves(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far logits move, RMS, in their own deviation."""
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-12))


def check_responses(case: Case) -> Finding:
    """The logits move when an axis, the scale, the prompt, or the pictures before do."""
    check = Check(
        "responses",
        "transformer",
        "logits of codes move with the prompt, the condition picture, the codes of the scale before, the scale's "
        "embedding, and the position along each axis",
    )
    model, example = case.model.model, case.example
    plain = case.code_logits(example)
    last = example.schedule.slice(len(example.schedule) - 1)
    moves = {}
    for axis, name in enumerate(AXES):

        def move(kwargs: dict, axis: int = axis) -> dict:
            positions = kwargs["position_ids"].clone()
            positions[axis, :, example.outputs][:, last] += 1
            return kwargs | {"position_ids": positions}

        with changed(model.language_model, move):
            moves[f"the {name} axis"] = _moves(case.code_logits(example)[last], plain[last])
    moves["the prompt"] = _prompt_moves(case)
    codes = example.codes.clone()
    before = example.schedule.slice(max(len(example.schedule) - 2, 0))
    codes[:, before] = (codes[:, before] + 1) % case.config.vq_config.codebook_size
    changed_codes = replace(example, inputs=example.inputs | {"image_codes": codes[0]}, codes=codes)
    moves["the codes before"] = _moves(case.code_logits(changed_codes)[last], plain[last])
    moves["the condition picture"] = _condition_moves(case)
    embedding = model.scale_embedding
    scale = float(embedding.index.weight.detach().abs().max() + embedding.length.weight.detach().abs().max())
    size = float(model.language_model.embed_tokens.weight.detach().abs().max())
    moves["the scale embedding"] = scale / size
    step = "look at the checkpoint's weights: were these ever trained, and were all of them loaded?"
    verdicts = {
        "the prompt": Verdict("prompt ignored", "the picture is drawn the same whatever the prompt says", step),
        "the condition picture": Verdict(PIXELS, "the picture that is to be read never reaches the answer", step),
        "the codes before": Verdict("earlier scales ignored", "scales are drawn without those before them", step),
        "the scale embedding": Verdict(SCALES, "its weights are zero, as before any training", step),
    }
    for name in AXES:
        cause = f"attention gives the {name} no rotary channel (`mrope_section`), or they were cut"
        verdicts[f"the {name} axis"] = Verdict(AXIS, cause, "compare `rope_parameters` with the training's")
    measured = "; ".join(f"{name}: {value:.2g}" for name, value in moves.items())
    for name, value in moves.items():
        if value <= 10 * torch.finfo(torch.float32).eps:
            return check.failed(f"relative change by {measured}", verdicts[name], moves=moves)
    return check.passed(f"relative change by {measured}", moves=moves)


def _prompt_moves(case: Case) -> float:
    """How far a picture's logits move with the text before it."""
    picture, codes, schedule = case.described[0]
    other = next((each.caption for each, _, _ in case.described if each.caption != picture.caption), "something else")
    return _moves(*(case.code_logits(case.sequence(text, codes, schedule)) for text in (picture.caption, other)))


def _condition_moves(case: Case) -> float:
    """How far the answer's logits move with the picture before it, through the forward on pixels."""
    picture, codes, schedule = case.described[-1]
    others = [p for p, _, s in case.described if s.final_grid == case.described[0][2].final_grid]
    logits = []
    for image in (others[0].image, others[1 % len(others)].image):
        sequence = case.sequence(picture.caption, codes, schedule, [image])
        logits.append(case.code_logits(sequence))
    return _moves(*logits)


def check_text(case: Case) -> Finding:
    """Text logits are still those of the model it came from."""
    check = Check("text parity", "transformer", "text logits equal the source model's up to rounding")
    if case.text_source is None:
        return check.noted("no source model was given to compare with (`--text-source`)")
    worst = 0.0
    for picture, _, _ in case.described[:4]:
        ids = case.processor.tokenizer(picture.caption, return_tensors="pt").input_ids.to(case.model.device)
        rows = case.config.text_vocab_size
        with torch.no_grad():
            ours = case.model(input_ids=ids, logits_over="text").logits.float()
            theirs = case.text_source(input_ids=ids).logits.float()[..., :rows]
        worst = max(worst, difference(ours, theirs))
    if worst <= tolerance(case.model.dtype):
        return check.passed(f"they differ by at most {worst:.1e} of the largest", difference=worst)
    verdict = Verdict(
        "text drifted",
        "the text decoder or its head are not the source's any more: trained on, or not all converted",
        "expected after training that moves the decoder; after a conversion alone, convert again",
    )
    return check.failed(f"they differ by {worst:.2g} of the largest", verdict, WARNING, difference=worst)


def check_prompt_gain(case: Case) -> Finding:
    """A picture is likelier after its own text than after another's."""
    check = Check(
        "worth of the prompt",
        "transformer",
        "a picture's codes are likelier after its own text than after another's: always where the text is read, for "
        "half of the pictures where it is not",
    )
    gains = []
    for index, sequence in enumerate(case.drawn_for):
        others = [*case.drawn_for[index + 1 :], *case.drawn_for[:index]]
        is_other = lambda each, own=sequence: not torch.equal(each.prompt["input_ids"], own.prompt["input_ids"])  # noqa: E731
        other = next(filter(is_other, others), None)
        if other is None:
            return check.noted("all pictures have the same text")
        wrong = case.answered(other.prompt, sequence.codes, sequence.schedule)
        own, after_other = (
            F.cross_entropy(case.code_logits(each), sequence.targets, reduction="sum") for each in (sequence, wrong)
        )
        gains.append(float(after_other - own))
    gain, share = sum(gains) / len(gains), sum(value > 0 for value in gains) / len(gains)
    measured = (
        f"{share:.0%} of {len(gains)} pictures are likelier after their own text, worth {gain:.1f} nats a picture"
    )
    if share >= 0.75:
        return check.passed(measured, gain=gain, share=share)
    if case.packs is None or len(gains) < ENOUGH:
        return check.noted(measured + ", which it need not have been trained on", gain=gain, share=share)
    verdict = Verdict(
        "prompt ignored",
        "the texts do not describe these pictures, their ids are others than in training, or the model has not learnt "
        "to read them",
        "read some texts beside their pictures (`transformers-nextflow data inspect`); drop fewer texts in training",
    )
    return check.failed(measured, verdict, WARNING, gain=gain, share=share)
