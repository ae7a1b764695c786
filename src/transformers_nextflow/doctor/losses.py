"""Checks of the transformer by its losses, on rows of shards, which it should know, or on described pictures."""

from collections.abc import Iterator
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from .alterations import FEW, Alteration, exchanged, hooked, judge, levelled, setting
from .case import Case, Reading
from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Check, Finding, z_score
from .weights import COMPARE

MOST_LAYERS = 8  # that are exchanged with each other, the least needed


def scales(check: Check, case: Case) -> Finding:
    """Codes of every scale, and texts, cost less than codes and words drawn by their frequency in other rows
    (unigram) would."""
    if case.packs is None:
        return check.unchecked("no shards were given")
    readings = [case.read(row) for row in case.rows]
    size, most = case.config.vq_config.codebook_size, 1 + max(int(each.scales.max()) for each in readings)
    names = [*(f"scale {scale + 1}" for scale in range(most))]
    loss, unigram = {}, {}
    for scale, name in enumerate(names):
        codes = [reading.codes[reading.scales == scale].cpu() for reading in readings]
        costs = [F.nll_loss(r.log_probs[r.scales == scale], r.codes[r.scales == scale]) for r in readings]
        loss[name], unigram[name] = torch.stack(costs).cpu(), _unigram(codes, size)
    layouts = [case.model.model.lay_out(**row)[0] for row in case.rows]
    texts = [layout.targets[layout.target_codes < 0].cpu() for layout in layouts]
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
    scores = {name: z_score((loss[name] - unigram[name])[~loss[name].isnan()]) for name in loss}
    above = [name for name, score in scores.items() if score > SIGNIFICANT]
    if not above:
        return check.passed(measured, losses=means)
    measured = f"{measured}; above it: {', '.join(above)}"
    cause = "not trained, trained on other codes or texts, or inputs are not those of the training"
    return check.warned(measured, "worse than the unigram", cause, COMPARE, losses=means)


def _unigram(rows: list[torch.Tensor], size: int) -> torch.Tensor:
    """(R,) mean cost of each row's values by their frequency in the others."""
    counts = torch.stack([row.bincount(minlength=size).float() for row in rows])
    rest = counts.sum(0) - counts
    log_probs = ((rest + 0.5) / (rest.sum(1, keepdim=True) + 0.5 * size)).log()
    return -(counts * log_probs).sum(1) / counts.sum(1)  # not a number for rows without


def targets(check: Check, case: Case) -> Finding:
    """No codes next to the stored ones in number or place are likelier, nor would these be with half or twice the
    logits; those of another row are less likely."""
    readings, size = [case.read(row) for row in case.rows], case.config.vq_config.codebook_size
    others: dict = {}
    for n in (-2, -1, 1, 2):
        others["wrong code offset", f"codes {n:+d}"] = lambda r, n=n: _cost(r, (r.codes + n) % size)
        others["shifted targets", f"places {n:+d}"] = lambda r, n=n: _cost(r, r.codes.roll(-n))
    if case.packs is not None:  # of other pictures the model may be too sure
        others["logits too large", "half the logits"] = lambda r: _cost(r, r.codes, 2)
        others["logits too small", "twice the logits"] = lambda r: _cost(r, r.codes, 0.5)
    costs = {key: torch.stack([cost(reading) for reading in readings]) for key, cost in others.items()}
    own = torch.stack([_cost(reading, reading.codes) for reading in readings])
    strange = torch.stack([_cost(r, _of_another(r, readings[at - 1])) for at, r in enumerate(readings)])
    fault, what = best = min(costs, key=lambda key: float(costs[key].mean()))
    gain, means = own - costs[best], [float(each.mean()) for each in (own, costs[best], strange)]
    measured = "{:.2f} nats a code, {:.2f} with {what}, {:.2f} for another row's".format(*means, what=what)
    if z_score(gain) > SIGNIFICANT and float(gain.mean()) > MATERIAL * means[0]:
        cause = f"the model finds {what} likelier: codes, places or weights are others than in training"
        return check.warned(measured, fault, cause, COMPARE)
    if len(own) >= ENOUGH and z_score(strange - own) < SIGNIFICANT:
        cause = "what is before a code tells the model nothing of it: it is not trained, or its inputs are others"
        return check.warned(measured, "codes not predicted", cause, COMPARE)
    return check.passed(measured)


def _cost(reading: Reading, codes: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return F.cross_entropy(reading.log_probs / temperature, codes).cpu()


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
    listed: list[tuple] = [("feature mode", case.config, "feature_mode", mode)]
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
    """No part predicts better at half or twice its size, no norm or scale at its mean, no two layers exchanged, no
    setting of config.json otherwise; and no matrix can have its outputs in another order without loss."""
    inner = case.model.model
    resizable = {name: getattr(inner, name) for name in ("connector", "code_embeddings", "scale_embedding")}
    ends = ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm")
    named = {f"layers.{name}": module for name, module in inner.language_model.layers.named_modules()}
    resizable |= {name: module for name, module in named.items() if name.endswith(ends)}
    movable = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
    level = {"scale_embedding.index": inner.scale_embedding.index, "norm": inner.language_model.norm}
    level |= {name: module for name, module in named.items() if name.endswith("layernorm")}
    whole = [*other_settings(case), *_exchanges(case), *(levelled(*each) for each in level.items())]
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
