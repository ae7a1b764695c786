"""Checks of the vision tokenizer, on pictures: whether it says more of them than what is said of any picture."""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..training.metrics import psnr
from .alterations import judge
from .case import ROWS, Case
from .findings import ENOUGH, SIGNIFICANT, Finding, z_score


def reconstruction(check: Finding, case: Case) -> Finding:
    """Decoded codes come nearer to the picture than its mean colour does, and nearer than to the picture mirrored,
    with colours exchanged, or darker."""
    gains, others, by_scale, rows = [], defaultdict(list), [], {}
    plain = lambda pixels: _psnr(pixels.mean(dim=(2, 3), keepdim=True), pixels)  # noqa: E731
    for picture, (pixels, schedule, output) in zip(case.pictures, case.coded):
        codes, scales = output.quantization.target_codes, range(1, len(schedule) + 1)
        prefixes = [case.vq_model.decode_prefix(codes, schedule.final_grid, scale) for scale in scales]
        by_scale.append([_psnr(prefix, pixels) for prefix in prefixes])
        own = by_scale[-1][-1]
        gains.append(own - plain(pixels))
        for name, way in {**turned(pixels), "of half the contrast": pixels / 2}.items():
            others[name].append(_psnr(prefixes[-1], way) - max(own, plain(way)))
        rebuilt = case.processor.image_processor.postprocess(prefixes[-1].cpu())
        rows[schedule.final_grid] = [picture.image, *rebuilt]
    gain, means = torch.tensor(gains), np.mean([*zip(*by_scale)], axis=1).tolist()
    case.curves["picture after each scale, PSNR in dB"] = {"PSNR": means}
    case.images["picture, and what its codes keep of it"] = [*rows.values()]
    measured = f"{float(gain.mean()):.1f} dB above the mean colour's; by scale " + ", ".join(f"{x:.1f}" for x in means)
    scores = {name: z_score(torch.tensor(values)) for name, values in others.items()}
    worst = max(scores, key=lambda name: scores[name])
    faults = {
        f"pictures come back {worst}": scores[worst] > SIGNIFICANT,
        "damaged vision tokenizer": len(gain) >= ENOUGH and z_score(gain) < SIGNIFICANT,
    }
    return check.verdict(measured, faults)


def turned(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B, 3, H, W) pixels in ways that code may take them by mistake; each undoes itself."""
    ways = {"mirrored": pixels.flip(-1), "upside down": pixels.flip(-2), "with colours exchanged": pixels.flip(1)}
    ways["in negative"] = -pixels
    if pixels.shape[-1] == pixels.shape[-2]:
        ways["transposed"] = pixels.transpose(-1, -2)
    return ways


def _psnr(rebuilt: torch.Tensor, pixels: torch.Tensor) -> float:
    """Of one picture, in dB, 60 at most."""
    return min(float(psnr(rebuilt, pixels)), 60.0)


def codes(check: Finding, case: Case) -> Finding:
    """Every scale but the first, which is of one code, has more different codes than a quarter of the pictures."""
    used = defaultdict(list)
    for _, schedule, output in case.coded:
        for scale in range(len(schedule)):
            used[scale].append(output.quantization.target_codes[0, schedule.slice(scale)])
    usage = [len(torch.cat(each).unique()) for each in used.values()]
    measured = f"{', '.join(map(str, usage))} different codes at the scales over {len(case.coded)} pictures"
    faults = {"collapsed codes": len(case.coded) >= ENOUGH and any(4 * each <= len(case.coded) for each in usage[1:])}
    return check.verdict(measured, faults)


def semantics(check: Finding, case: Case) -> Finding:
    """What the semantic decoder makes of the codes is nearer to the semantic encoder's features than the mean of these
    is (cosine)."""
    wanted = torch.cat([case.vq_model.semantic_features(pixels)[0] for pixels, _, _ in case.coded]).float()
    made = torch.cat([output.semantic_features[0] for _, _, output in case.coded]).float()
    if made.shape != wanted.shape:
        return check.unchecked("its teacher is another model than its encoder")
    lengths = [schedule.lengths[-1] for _, schedule, _ in case.coded]
    cosine = lambda other: F.cosine_similarity(wanted, other, dim=-1).split(lengths)  # noqa: E731
    mean = wanted.mean(0, keepdim=True)
    own, plain = (torch.stack([each.mean() for each in cosine(other)]) for other in (made, mean))
    measured = f"cosine {float(own.mean()):.2f}, of the mean {float(plain.mean()):.2f}"
    is_lost = len(own) >= ENOUGH and z_score(own - plain) <= SIGNIFICANT
    return check.verdict(measured, {"semantic branch lost": is_lost})


def parts(check: Finding, case: Case) -> Finding:
    """No part of the pixel branch reconstructs better at half or twice its size; and, of pictures that shards hold,
    none of the encoder can have its channels in another order without loss. (Blocks that enlarge a decoder begin as
    nothing, and may end as little.)"""
    named = {name: module for name, module in case.vq_model.named_modules() if name.startswith("pixel_")}
    modules = {name: module for name, module in named.items() if isinstance(module, (nn.Conv2d, nn.Linear))}
    movable = {}
    rows = [case.coded[at][0] for at in np.random.default_rng(case.seed).permutation(len(case.coded))[:ROWS]]
    if case.packs is not None:  # of plain shapes some channels say nothing
        shown = [(case.codes_of(targets, inputs), grid) for grid, targets, inputs in case.stored[:ROWS]]
        rows = [case.vq_model.decode(*each) for each in shown]
        movable = {name: module for name, module in modules.items() if name.startswith("pixel_encoder")}
    measure = lambda rows: -torch.tensor([_psnr(case.vq_model(pixels).reconstruction, pixels) for pixels in rows])  # noqa: E731
    return judge(check, measure, rows, [], modules, movable, case.seed)
