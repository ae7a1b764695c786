"""Checks of the vision tokenizer, on pictures."""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.shards import decodable_codes
from ..training.metrics import psnr
from .alterations import judge
from .case import ROWS, Case, as_codes
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score
from .shards import stored_pictures

DAMAGED = "damaged vision tokenizer"


def reconstruction(check: Check, case: Case) -> Finding:
    """Decoded codes come nearer to the picture than its mean colour does, and nearer than to the picture mirrored,
    with colours exchanged, or darker."""
    gains, own, others, by_scale, rows = [], [], defaultdict(list), [], []
    for group in case.groups:
        pixels = group.pixels
        decoded = case.vq_model.decode(group.codes, group.schedule.final_grid)
        own.append(_psnr(decoded, pixels))
        gains.append(own[-1] - _psnr(_plain(pixels), pixels))
        for name, way in {**turned(pixels), "of half the contrast": pixels / 2}.items():
            others[name].append(_psnr(decoded, way) - torch.maximum(own[-1], _psnr(_plain(way), way)))
        scales = range(1, len(group.schedule) + 1)
        prefixes = [case.vq_model.decode_prefix(group.codes, group.schedule.final_grid, scale) for scale in scales]
        by_scale.append([float(_psnr(prefix, pixels).mean()) for prefix in prefixes])
        rows.append([group.pictures[0].image, *case.processor.image_processor.postprocess(decoded[:1].cpu())])
    gain, value = torch.cat(gains), float(torch.cat(own).mean())
    count = min(map(len, by_scale))
    means = np.mean([each[:count] for each in by_scale], axis=0).tolist()
    case.curves["picture after each scale, PSNR in dB"] = {"PSNR": means}
    case.images["picture, and what its codes keep of it"] = rows
    measured = f"PSNR {value:.1f} dB, {float(gain.mean()):.1f} dB above the mean colour's; by scale "
    measured += ", ".join(f"{each:.1f}" for each in means)
    step = "reconstruct a picture with the tokenizer's own checkpoint (`transformers-nextflow reconstruct`)"
    scores = {name: z_score(torch.cat(values)) for name, values in others.items()}
    worst = max(scores, key=lambda name: scores[name])
    if scores[worst] > SIGNIFICANT:
        cause = f"decoded pictures are nearer to the picture {worst} than to the picture itself"
        return check.failed(measured, f"pictures come back {worst}", cause, step, psnr=value)
    if len(gain) >= ENOUGH and z_score(gain) < SIGNIFICANT:
        cause = "encoder, table and decoder do not belong together, are damaged, or not trained"
        return check.warned(measured, DAMAGED, cause, step, psnr=value, scales=means)
    return check.passed(measured, psnr=value, scales=means)


def turned(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B, 3, H, W) pixels in ways that code may take them by mistake; each undoes itself."""
    ways = {"mirrored": pixels.flip(-1), "upside down": pixels.flip(-2), "with colours exchanged": pixels.flip(1)}
    ways["in negative"] = -pixels
    if pixels.shape[-1] == pixels.shape[-2]:
        ways["transposed"] = pixels.transpose(-1, -2)
    return ways


def _plain(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)


def _psnr(rebuilt: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(B,) dB, 60 at most."""
    return psnr(rebuilt, pixels).clamp(max=60).cpu()


def codes(check: Check, case: Case) -> Finding:
    """A scale's own codes fit the residuals better than any one code for all would."""
    codebook, most = case.vq_model.quantizer(), max(len(group.schedule) for group in case.groups)
    used, gains = [[] for _ in range(most)], [[] for _ in range(most)]
    for group in case.groups:
        for scale, queries_NC in enumerate(group.output.quantization.queries):
            codes_Bl = group.codes[:, group.schedule.slice(scale)]
            distances = case.vq_model.quantizer.distances(queries_NC, codebook)
            own = distances.gather(-1, codes_Bl.reshape(-1, 1))[:, 0]
            alone = distances[:, distances.mean(dim=0).argmin()]
            gains[scale] += (alone - own).view(codes_Bl.shape).mean(1).tolist()
            used[scale] += codes_Bl.flatten().tolist()
    shares = [torch.tensor(codes).bincount(minlength=len(codebook)) / len(codes) for codes in used]
    perplexities = [float(torch.special.entr(share).sum().exp()) for share in shares]
    usage = [int((share > 0).sum()) for share in shares]
    scores = [z_score(torch.tensor(values)) for values in gains]
    case.curves["codes of each scale"] = {"different codes used": list(map(float, usage)), "perplexity": perplexities}
    pictures = sum(len(group.pixels) for group in case.groups)
    measured = f"{', '.join(map(str, usage))} different codes at the scales over {pictures} pictures"
    collapsed = [scale for scale, score in enumerate(scores) if score < SIGNIFICANT]
    figures = {"used": usage, "perplexity": perplexities, "scores": scores}
    if not collapsed or pictures < ENOUGH:
        return check.passed(measured, **figures)
    measured += f"; at scale {collapsed[0] + 1} {scores[collapsed[0]]:.1f} standard errors better than one for all"
    cause = "there the codes say next to nothing of the picture: entries are alike, or features do not reach them"
    step = "look at the use of codes in the tokenizer's training; train with restarts of unused entries"
    return check.warned(measured, "collapsed codes", cause, step, **figures)


def semantics(check: Check, case: Case) -> Finding:
    """What the semantic decoder makes of the codes is nearer to the semantic encoder's features than the mean of these
    is (cosine)."""
    wanted = [case.vq_model.semantic_features(group.pixels).float() for group in case.groups]
    made = [group.output.semantic_features.float() for group in case.groups]
    if made[0].shape != wanted[0].shape:
        return check.unchecked("its teacher is another model than its encoder")
    mean = torch.cat([features.flatten(0, 1) for features in wanted]).mean(0)
    cosine = lambda pair: F.cosine_similarity(*pair, dim=-1).mean(1).cpu()  # noqa: E731
    near = lambda features: torch.cat([*map(cosine, zip(wanted, features))])  # noqa: E731
    own, plain = near(made), near([mean.expand_as(features) for features in wanted])
    measured = f"cosine {float(own.mean()):.2f}, of the mean {float(plain.mean()):.2f}"
    if len(own) < ENOUGH or z_score(own - plain) > SIGNIFICANT:
        return check.passed(measured)
    cause = "the semantic half of the codes says nothing of the picture: the branch is damaged, or not trained"
    return check.warned(measured, "semantic branch lost", cause, "were semantic encoder or decoder reset?")


def parts(check: Check, case: Case) -> Finding:
    """No part of the pixel branch reconstructs better at half or twice its size; and, of pictures that shards hold,
    none of the encoder can have its channels in another order without loss. (Blocks that enlarge a decoder begin as
    nothing, and may end as little.)"""
    pictures = [pixels[None] for group in case.groups for pixels in group.pixels]
    rows = [pictures[at] for at in np.random.default_rng(case.seed).permutation(len(pictures))[:ROWS]]
    modules = {
        f"{branch}.{name}": module
        for branch in ("pixel_encoder", "pixel_decoder")
        for name, module in getattr(case.vq_model, branch).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    movable = {}
    if case.packs is not None:  # of plain shapes some channels say nothing
        stored = [(grid, as_codes(case, decodable_codes(*each))) for grid, *each in stored_pictures(case, ROWS)]
        rows = [case.vq_model.decode(codes, grid) for grid, codes in stored]
        movable = {name: module for name, module in modules.items() if name.startswith("pixel_encoder")}
    measure = lambda rows: -torch.cat([_rebuilt(case, pixels) for pixels in rows])  # noqa: E731
    return judge(check, measure, rows, [], modules, movable, case.seed)


def _rebuilt(case: Case, pixels: torch.Tensor) -> torch.Tensor:
    grid = case.vq_model.schedules.by_size(*pixels.shape[-2:]).final_grid
    return _psnr(case.vq_model.decode(case.vq_model.encode(pixels), grid), pixels)
