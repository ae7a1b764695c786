"""Checks of the transformer by its losses, on rows of shards, which it should know, or on described pictures."""

from collections.abc import Iterator
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from .alterations import FEW, Alteration, exchanged, hooked, judge, setting
from .case import TEMPERATURES, Case, Reading
from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Check, Finding, z_score

COMPARE = "compare weights and config.json with the training's own checkpoint"
MOST_LAYERS = 8  # that are exchanged with each other, the least needed


def scales(check: Check, case: Case) -> Finding:
    """Codes of every scale, and texts, cost less than codes and words drawn by their frequency in other rows
    (unigram) would."""
    readings = [case.read(row) for row in case.rows]
    size, most = case.config.vq_config.codebook_size, 1 + max(int(each.scales.max()) for each in readings)
    names = [*(f"scale {scale + 1}" for scale in range(most))]
    loss, unigram = {}, {}
    for scale, name in enumerate(names):
        codes = [reading.codes[reading.scales == scale].cpu() for reading in readings]
        costs = [F.nll_loss(r.log_probs[r.scales == scale], r.codes[r.scales == scale]) for r in readings]
        loss[name], unigram[name] = torch.stack(costs).cpu(), _unigram(codes, size)
    texts = [_text_targets(case, row) for row in case.rows]
    if sum(len(each) > 0 for each in texts) >= ENOUGH:
        loss["text"] = torch.stack([reading.text_losses.mean().cpu() for reading in readings])
        unigram["text"] = _unigram(texts, case.config.text_vocab_size)
    means = {name: (float(values.nanmean()), float(unigram[name].nanmean())) for name, values in loss.items()}
    case.curves["loss of each scale, nats a code"] = {
        "loss": [means[name][0] for name in names],
        "unigram": [means[name][1] for name in names],
    }
    measured = ", ".join(f"{name} {a:.2f} ({b:.2f})" for name, (a, b) in means.items())
    measured = f"loss (unigram) over {len(readings)} rows: {measured}"
    if case.packs is None:
        return check.noted(f"{measured}; without shards these pictures need not be like the training's", losses=means)
    scores = {name: z_score((loss[name] - unigram[name])[~loss[name].isnan()]) for name in loss}
    above = [name for name, score in scores.items() if score > SIGNIFICANT]
    if not above:
        return check.passed(measured, losses=means)
    return check.warned(
        f"{measured}; above it: {', '.join(above)}",
        "worse than the unigram",
        "not trained, trained on other codes or texts, or inputs are not those of the training",
        "train longer, or compare codes, texts, inputs and positions with the training's",
        losses=means,
    )


def _unigram(rows: list[torch.Tensor], size: int) -> torch.Tensor:
    """(R,) mean cost of each row's values by their frequency in the others."""
    counts = torch.stack([row.bincount(minlength=size).float() for row in rows])
    rest = counts.sum(0) - counts
    log_probs = ((rest + 0.5) / (rest.sum(1, keepdim=True) + 0.5 * size)).log()
    return -(counts * log_probs).sum(1) / counts.sum(1)  # not a number for rows without


def _text_targets(case: Case, row: dict[str, torch.Tensor]) -> torch.Tensor:
    layout, _ = case.model.model.lay_out(**row)
    return layout.targets[layout.target_codes < 0].cpu()


def confidence(check: Check, case: Case) -> Finding:
    """Logits are of the right size: no factor of 2 or 1/2 on them makes the codes of the shards likelier."""
    if case.packs is None:
        return check.unchecked("no shards were given")
    readings = [case.read(row) for row in case.rows]
    losses = torch.stack([torch.stack([_cost(r, t) for r in readings]) for t in TEMPERATURES.tolist()])
    best = int(losses.mean(1).argmin())
    own, then, temperature = losses[len(TEMPERATURES) // 2], losses[best], float(TEMPERATURES[best])
    expected = float(torch.stack([-(r.log_probs.exp() * r.log_probs).sum(-1).mean() for r in readings]).mean())
    measured = f"codes cost {float(own.mean()):.2f} nats, the model expects {expected:.2f}; likeliest with logits "
    measured += f"divided by {temperature:.2f}"
    off = max(temperature, 1 / temperature) >= 2 and float((own - then).mean()) > MATERIAL * float(own.mean())
    if not off or z_score(own - then) <= SIGNIFICANT:
        return check.passed(measured, temperature=temperature)
    fault = "logits too large" if temperature > 1 else "logits too small"
    cause = "the final normalisation or the code head was scaled, or these are other codes than in training"
    return check.warned(measured, fault, cause, COMPARE, temperature=temperature)


def _cost(reading: Reading, temperature: float) -> torch.Tensor:
    return F.cross_entropy(reading.log_probs / temperature, reading.codes).cpu()


def targets(check: Check, case: Case) -> Finding:
    """The codes are likelier than their neighbours in number, in place, or of the same place in another row."""
    readings, size = [case.read(row) for row in case.rows], case.config.vq_config.codebook_size
    others = {f"numbered {shift:+d}": [(r.codes + shift) % size for r in readings] for shift in (-2, -1, 1, 2)}
    others |= {f"of the position {shift:+d}": [r.codes.roll(-shift) for r in readings] for shift in (-1, 1)}
    others["of another row"] = [_of_another(r, readings[at - 1]) for at, r in enumerate(readings)]
    own = torch.stack([_cost(reading, 1.0) for reading in readings])
    costs = {
        name: torch.stack([F.nll_loss(r.log_probs, c).cpu() for r, c in zip(readings, codes)])
        for name, codes in others.items()
    }
    best = min(costs, key=lambda name: float(costs[name].mean()))
    measured = f"{float(own.mean()):.2f} nats a code, {float(costs[best].mean()):.2f} for codes {best}"
    if z_score(own - costs[best]) > SIGNIFICANT:
        fault = {"n": "wrong code offset", "of the": "shifted targets"}.get(best[:1] if best[0] == "n" else best[:6])
        cause = f"the model finds codes {best} likelier"
        step = "compare the numbering of codes, and the targets' places, with the training's"
        return check.warned(measured, fault or "pictures exchanged", cause, step)
    if len(own) >= ENOUGH and z_score(costs["of another row"] - own) < SIGNIFICANT:
        measured = f"{float(own.mean()):.2f} nats a code, {float(costs['of another row'].mean()):.2f} for another's"
        cause = "what is before a code tells the model nothing of it: it is not trained, or its inputs are others"
        return check.warned(measured, "codes not predicted", cause, COMPARE)
    return check.passed(measured)


def _of_another(reading: Reading, other: Reading) -> torch.Tensor:
    """Codes of the other row's same scales, repeated or cut where it has another number of them."""
    codes = reading.codes.clone()
    for scale in reading.scales.unique().tolist():
        at, theirs = reading.scales == scale, other.codes[other.scales == scale]
        if len(theirs):
            codes[at] = theirs.repeat(int(at.sum()) // len(theirs) + 1)[: int(at.sum())]
    return codes


def other_settings(case: Case) -> Iterator[Alteration]:
    """Settings of config.json that weights do not show."""
    rotary = case.model.model.language_model.rotary_emb
    mode = "residual" if case.config.feature_mode == "accumulated" else "accumulated"
    listed = [("feature mode", case.config, "feature_mode", mode)]
    if case.config.position_scale is not None:
        listed.append(("position scale", case.config, "position_scale", None))
    half = len(rotary.inv_freq)
    for sections in ([1] * half, [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]):
        if sections != list(rotary.mrope_section):
            listed.append(("rotary sections", rotary, "mrope_section", sections))
    if rotary.rope_type == "default":
        places = torch.arange(half, device=rotary.inv_freq.device) / half
        for factor in (1e-3, 1e-2, 0.1, 10, 100, 1e3):
            listed.append(("rotary base", rotary, "inv_freq", rotary.inv_freq * factor**-places))
    for name, owner, attribute, value in listed:
        cause = f"the weights were trained with another {name} than config.json says"
        apply = lambda owner=owner, attribute=attribute, value=value: setting(owner, attribute, value)  # noqa: E731
        yield Alteration(f"with another {name}", f"wrong {name}", cause, apply)


def parts(check: Check, case: Case) -> Finding:
    """No part predicts better at half, twice or no size, no two layers exchanged, no setting of config.json otherwise;
    and no matrix can have its outputs in another order without loss."""
    inner = case.model.model
    resizable = {name: getattr(inner, name) for name in ("connector", "code_embeddings", "scale_embedding")}
    ends = ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm")
    named = {f"layers.{name}": module for name, module in inner.language_model.layers.named_modules()}
    resizable |= {name: module for name, module in named.items() if name.endswith(ends)}
    movable = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
    whole = [*other_settings(case), *_exchanges(case)]
    return judge(check, case.losses, case.rows, whole, resizable, movable, case.seed)


def _exchanges(case: Case) -> list[Alteration]:
    """Every two layers in each other's place, of the least needed ones where there are many."""
    layers, needed = case.model.model.language_model.layers, {}
    for number, layer in enumerate(layers):
        needed[number] = 0.0
        if len(layers) > MOST_LAYERS:
            nothing = torch.zeros_like
            with hooked(layer.self_attn.o_proj, nothing), hooked(layer.mlp.down_proj, nothing):
                needed[number] = float(case.losses(case.rows[:FEW]).mean())
    chosen = sorted(sorted(needed, key=needed.__getitem__)[:MOST_LAYERS])
    return [
        Alteration(
            f"with layers {a} and {b} exchanged",
            "layers exchanged",
            f"layers {a} and {b} are in each other's place",
            lambda a=a, b=b: exchanged(layers, a, b),
        )
        for a, b in combinations(chosen, 2)
    ]
