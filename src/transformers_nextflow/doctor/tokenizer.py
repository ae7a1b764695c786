"""Checks of the image processor and of the vision tokenizer."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..quantizer import SelfCorrection
from . import reference
from .case import Case
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, alignment, difference, tolerance, z_score

SWAPPED = "swapped height and width"
INTERPOLATION = "wrong interpolation"
NOTICEABLE = 0.01
"""Share of an error whose loss nobody sees: 0.04 dB."""


def check_processor(case: Case) -> Finding:
    """Pictures become pixels in [-1, 1] at their places, and pixels pictures."""
    check = Check(
        "pictures to pixels",
        "tokenizer",
        "a picture of a schedule's size reaches the tokenizer as pixel / 127.5 - 1, every pixel at its place, and "
        "comes back the same",
    )
    image = case.oblong.pictures[0].image
    if image.size != case.oblong.pixels.shape[-1:-3:-1]:  # the user's picture is resampled
        image = case.processor.image_processor.postprocess(case.oblong.pixels[:1].cpu())[0]
    noise = np.random.default_rng(case.seed).integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
    grid, pixels = case.pixels_of(Image.fromarray(noise))
    expected = torch.from_numpy(noise).permute(2, 0, 1)[None].to(pixels) / 127.5 - 1
    error = difference(pixels, expected)
    inputs = case.processor.image_processor(Image.fromarray(noise), return_tensors="pt").to(case.model.device)
    codes = torch.cat([each.flatten() for each in case.model.model.encode_images(**inputs)])
    alike = float((codes == case.vq_forward(pixels).quantization.target_codes[0]).float().mean())
    back = np.asarray(case.processor.image_processor.postprocess(expected.cpu())[0])
    if error <= tolerance(pixels.dtype) and np.array_equal(back, noise):
        if alike >= 1 - NOTICEABLE:
            return check.passed(f"the largest difference is {error:.1e}, and the way back gives the same picture")
        verdict = Verdict(
            "patches misplaced",
            "the model puts the patches, which the processor gives rightly, together to another picture",
            "look at `unpatchify` and `encode_images`",
        )
        return check.failed(f"{alike:.0%} of the codes are those of the picture put together here", verdict)
    step = "compare processor_config.json with the one the model was trained with, and the processor's code"
    fault, cause = "pixels differ", "the processor changes pixels in another way than it was trained with"
    if pixels.shape != expected.shape or difference(pixels, _transposed(expected, grid)) < 1e-3:
        fault, cause = SWAPPED, "the image processor confuses height and width, so pictures arrive transposed"
    elif difference(pixels, expected.flip(1)) < 1e-3 or np.array_equal(back, noise[..., ::-1]):
        fault, cause = "swapped colour channels", "red and blue are exchanged (BGR for RGB)"
    else:
        wrong = (pixels - expected).abs() > 1e-3
        share = float(wrong.float().mean())
        if share < 0.95:
            fault, cause = "dropped pixels", f"{share:.0%} of the pixels do not arrive"
        elif abs(float(torch.corrcoef(torch.stack([pixels.flatten(), expected.flatten()]))[0, 1])) > 0.999:
            low, high = float(pixels.min()), float(pixels.max())
            fault = "wrong pixel range"
            cause = f"pixels arrive in [{low:.2f}, {high:.2f}]: mean, deviation or rescaling are others"
    return check.failed(f"pixels differ by up to {error:.2g} from their places", Verdict(fault, cause, step))


def _transposed(pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What arrives where the transposed picture is cut into patches and put together on the grid."""
    (h, w), size = grid, pixels.shape[-2] // grid[0]
    patches = pixels.transpose(-1, -2).reshape(1, 3, w, size, h, size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(1, h, w, 3, size, size)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)


def check_quantizer(case: Case) -> Finding:
    """Codes are the nearest entries of the residual; what is decoded is the sum of the entries."""
    check = Check(
        "residual quantisation",
        "tokenizer",
        "every code is the nearest entry of its residual, and the codes' entries, bicubic to the final grid, sum up "
        "to what is decoded (NextFlow sec. 2.1)",
    )
    worst, worst_lookup = 0.0, 0.0
    config = case.config.vq_config
    rounded = difference(case.codebook, reference.codebook(case.vq_model.quantizer, config))
    if rounded > 4 * torch.finfo(torch.float32).eps:
        verdict = Verdict(
            "rounded codebook",
            "entries are looked up and summed with fewer digits than float32, or are not those of the weights",
            "keep the quantizer in float32 whatever the autocast, see `DualCodebookQuantizer.codebook`",
        )
        return check.failed(f"entries differ from the weights by {rounded:.1e} of the largest", verdict)
    for group in case.groups:
        schedule, codes = group.schedule, group.codes
        made = group.output.quantization.quantized
        decoded = case.vq_model.quantizer.decode(codes, schedule)
        expected = reference.sum_of_entries(codes, case.codebook, schedule)
        error = max(difference(made, expected), difference(decoded, expected))
        if error > tolerance(torch.float32):
            return check.failed(
                f"the sum of entries differs by {error:.2g} of its largest value on the grid {schedule.final_grid}",
                _sum_verdict(case, group, made if difference(made, expected) > error / 2 else decoded),
                error=error,
            )
        worst = max(worst, error)
        asked = reference.queries(group.output.features, codes, case.codebook, schedule)
        for scale, asked_BlC in enumerate(asked):
            distances = reference.distances(asked_BlC, case.codebook, config)
            chosen = distances.gather(-1, codes[:, schedule.slice(scale), None]).squeeze(-1)
            nearest = distances.amin(-1)
            scale_of_distance = distances.mean().clamp(min=1e-12)
            gap = float((chosen - nearest).max() / scale_of_distance)
            if gap > tolerance(torch.float32):
                return check.failed(
                    f"at scale {scale + 1} a chosen entry lies {gap:.2g} mean distances farther than the nearest",
                    _lookup_verdict(distances.argmin(-1), codes[:, schedule.slice(scale)]),
                    scale=scale + 1,
                )
            worst_lookup = max(worst_lookup, gap)
    return check.passed(
        f"sums differ by at most {worst:.1e}, no nearer entry exists beyond rounding", error=worst, gap=worst_lookup
    )


def _sum_verdict(case: Case, group, actual: torch.Tensor) -> Verdict:
    step = "compare `resize_features`, `to_map` and `DualCodebookQuantizer` with the formula, and train anew after it"
    matches = lambda expected: difference(actual, expected) < tolerance(torch.float32)  # noqa: E731
    for name, resize in reference.OTHER_RESIZES.items():
        if matches(reference.sum_of_entries(group.codes, case.codebook, group.schedule, resize)):
            return Verdict(INTERPOLATION, f"codes are brought to the final grid by {name}, not bicubic", step)
    swapped = reference.sum_of_entries(group.codes, case.codebook, group.schedule, to_map=reference.as_transposed_map)
    if matches(swapped):
        return Verdict(SWAPPED, "codes are laid out column by column in place of row by row", step)
    for shift in (-1, 1):
        shifted = (group.codes + shift).clamp(0, len(case.codebook) - 1)
        if matches(reference.sum_of_entries(shifted, case.codebook, group.schedule)):
            return Verdict("wrong code offset", f"code c is decoded as entry c{shift:+d}", step)
    return Verdict("quantiser differs", "codes are summed by another formula than the paper's", step)


def _lookup_verdict(nearest: torch.Tensor, codes: torch.Tensor) -> Verdict:
    step = "look at `DualCodebookQuantizer.forward` and `distances`"
    offsets = (codes - nearest).flatten()
    most = int(offsets.mode().values)
    if most and float((offsets == most).float().mean()) > 0.9:
        return Verdict("wrong code offset", f"the code is the nearest entry's index {most:+d}", step)
    return Verdict("wrong lookup", "the distance, its weights, or the residual that is looked up are others", step)


def check_self_correction(case: Case) -> Finding:
    """With self-correction the inputs are disturbed and the targets are not."""
    check = Check(
        "self-correction",
        "tokenizer",
        "disturbed codes are inputs only: targets stay the nearest entries (NextFlow sec. 3.1)",
    )
    group = case.oblong
    keys = [f"doctor {case.seed} {index}" for index in range(len(group.pixels))]
    inputs, targets = case.vq_model.encode(group.pixels, SelfCorrection(), seed=case.seed, keys=keys)
    config, asked = (
        case.config.vq_config,
        reference.queries(group.output.features, inputs, case.codebook, group.schedule),
    )
    right = []
    for scale, asked_BlC in enumerate(asked):
        distances = reference.distances(asked_BlC, case.codebook, config)
        chosen = distances.gather(-1, targets[:, group.schedule.slice(scale), None])
        right.append((chosen[..., 0] - distances.amin(-1)) <= tolerance(torch.float32) * distances.mean())
    wrong = 1 - float(torch.cat(right, dim=1).float().mean())
    share = float((inputs != targets).float().mean())
    if wrong == 0 and share > 0:
        return check.passed(f"{share:.0%} of the inputs are disturbed, every target is the nearest entry", share=share)
    if wrong == 0 or torch.equal(inputs, group.codes):
        fault = "self-correction without effect" if wrong == 0 else "self-correction written into targets"
    else:
        fault = "self-correction written into targets" if share == 0 else "wrong targets"
    verdict = Verdict(
        fault,
        "`encode` gives its two results in the wrong order, twice the same, or disturbs the targets",
        "look at `QuantizerOutput` and `NextFlowVQModel.encode`; shards made with it must be made anew",
    )
    return check.failed(
        f"{wrong:.1%} of the targets are not the nearest entry, {share:.1%} of the inputs differ from them", verdict
    )


def check_reconstruction(case: Case) -> Finding:
    """Pictures come back, nearer than a plain colour and the right way round."""
    check = Check(
        "reconstruction",
        "tokenizer",
        "decoded codes come nearer to the picture than its mean colour does, and nearer than to the picture mirrored "
        "or transposed",
    )
    gains, errors, worst_other = [], [], ("", -1.0)
    rows, by_scale = [], []
    others: dict[str, list[torch.Tensor]] = {}
    for group in case.groups:
        pixels = group.pixels.float()
        decoded = case.vq_model.decode(group.codes, group.schedule.final_grid)
        error = _mse(decoded, pixels)
        gains.append(_mse(pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels), pixels) / error)
        errors.append(error)
        ways = {"mirrored": pixels.flip(-1), "upside down": pixels.flip(-2), "swapped colours": pixels.flip(1)}
        if pixels.shape[-1] == pixels.shape[-2]:
            ways["transposed"] = pixels.transpose(-1, -2)
        for name, way in ways.items():
            others.setdefault(name, []).append((error / _mse(decoded, way)).log())
        by_scale.append(_errors_by_scale(case, group))
        rows.append([group.pictures[0].image, *case.processor.image_processor.postprocess(decoded[:1].cpu())])
    gain, error = torch.cat(gains).log(), torch.cat(errors)
    psnr = float((10 * (4 / error).log10()).mean())
    count = min(map(len, by_scale))
    case.curves["picture after each scale, PSNR in dB"] = {
        "PSNR": torch.stack([each[:count] for each in by_scale]).mean(0).tolist()
    }
    case.images["picture, and what its codes keep of it"] = rows
    for name, logs in others.items():
        score = z_score(torch.cat(logs))
        if score > worst_other[1]:
            worst_other = (name, score)
    if worst_other[1] > SIGNIFICANT:
        name = worst_other[0]
        fault = {"transposed": SWAPPED, "swapped colours": "swapped colour channels"}.get(name, "mirrored pictures")
        return check.failed(
            f"decoded pictures are nearer to the {name} picture than to the picture itself",
            Verdict(fault, f"the decoder's pictures come out {name}", "look at the decoder's and the codes' layout"),
        )
    score = z_score(gain)
    measured = (
        f"PSNR {psnr:.1f} dB; the squared error is {float(gain.exp().median()):.1f} times smaller than the mean's"
    )
    if len(gain) >= ENOUGH and score < SIGNIFICANT:
        verdict = Verdict(
            "damaged vision tokenizer",
            "encoder, codebook and decoder do not belong together, or the tokenizer is not trained",
            "reconstruct a picture with the tokenizer's own checkpoint (`transformers-nextflow reconstruct`)",
        )
        return check.failed(measured, verdict, WARNING, psnr=psnr)
    return check.passed(measured, psnr=psnr)


def _mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean(dim=(1, 2, 3)).clamp(min=1e-6)


def _errors_by_scale(case: Case, group) -> torch.Tensor:
    """PSNR of the picture of the first 1, 2, .. scales."""
    values = []
    for scales in range(1, len(group.schedule) + 1):
        decoded = case.vq_model.decode_prefix(group.codes, group.schedule.final_grid, scales)
        values.append((10 * (4 / _mse(decoded, group.pixels.float())).log10()).mean())
    return torch.stack(values).cpu()


def check_codebook(case: Case) -> Finding:
    """Every scale tells pictures apart: its codes fit them better than any one code for all would."""
    check = Check(
        "codes of each scale",
        "tokenizer",
        "where residuals differ between pictures, a scale's own codes fit them better than any one code for all would",
    )
    config = case.config.vq_config
    most = max(len(group.schedule) for group in case.groups)
    used: list[list[int]] = [[] for _ in range(most)]
    gains: list[list[float]] = [[] for _ in range(most)]
    energies = [0.0] * most
    for group in case.groups:
        asked = reference.queries(group.output.features, group.codes, case.codebook, group.schedule)
        for scale, asked_BlC in enumerate(asked):
            at = group.schedule.slice(scale)
            distances = reference.distances(asked_BlC, case.codebook, config)
            own = distances.gather(-1, group.codes[:, at, None])[..., 0]
            alone = distances[..., distances.mean(dim=(0, 1)).argmin()]
            gains[scale] += (alone - own).mean(1).tolist()
            energies[scale] += float(alone.mean(1).sum())
            used[scale] += group.codes[:, at].flatten().tolist()
    counts = [torch.tensor(codes).bincount(minlength=len(case.codebook)).float() for codes in used]
    entropies = [float(torch.special.entr(count / count.sum()).sum()) for count in counts]
    perplexities = [float(torch.tensor(entropy).exp()) for entropy in entropies]
    usage = [int((count > 0).sum()) for count in counts]
    scores = [z_score(torch.tensor(values)) for values in gains]
    shares = [sum(values) / max(energy, 1e-12) for values, energy in zip(gains, energies)]
    case.curves["codes of each scale"] = {"different codes used": usage, "perplexity": perplexities}
    figures = {"used": usage, "perplexity": perplexities, "standard errors of the gain": scores, "gain": shares}
    pictures = sum(len(group.pixels) for group in case.groups)
    measured = f"{', '.join(map(str, usage))} different codes at the scales over {pictures} pictures, which "
    measured += f"take away {', '.join(f'{share:.0%}' for share in shares)} of what one code for all would leave"
    collapsed = [
        scale + 1
        for scale, (score, share) in enumerate(zip(scores, shares))
        if score < SIGNIFICANT or share < NOTICEABLE
    ]
    if not collapsed or pictures < ENOUGH:
        return check.passed(measured, **figures)
    first = collapsed[0]
    place = "coarse" if first <= most / 2 else "fine"
    verdict = Verdict(
        f"collapsed {place} codebook",
        f"at scale {first} the codes say next to nothing of the picture: the entries have become alike, or the "
        "scale's residual is empty",
        f"look at the usage of scale {first} in the tokenizer's training; train with restarts of unused entries",
    )
    measured += f"; at scale {first} the gain is {shares[first - 1]:.2%}, {scores[first - 1]:.1f} standard errors"
    return check.failed(measured, verdict, WARNING, **figures)


def check_residuals(case: Case) -> Finding:
    """The residual that is left shrinks."""
    check = Check(
        "residual norms",
        "tokenizer",
        "after all scales less is left of the features than there was before the first",
    )
    before, after = [], []
    norms = torch.zeros(max(len(group.schedule) for group in case.groups))
    for group in case.groups:
        features = group.output.features.float()
        left = features - reference.sum_of_entries(group.codes, case.codebook, group.schedule)
        before.append(features.square().mean(dim=(1, 2, 3)))
        after.append(left.square().mean(dim=(1, 2, 3)))
        own = group.output.quantization.residual_norms.cpu()
        norms[: len(own)] += own * len(group.pixels) / sum(len(each.pixels) for each in case.groups)
    before, after = torch.cat(before), torch.cat(after)
    kept = float((after / before.clamp(min=1e-12)).median())
    case.curves["residual before each scale (RMS)"] = {"residual": norms.tolist()}
    measured = f"{kept:.1%} of the features' energy is left after all scales"
    score = z_score(before - after)
    if score > -SIGNIFICANT or case.config.vq_config.normalize_entries:
        report = check.noted if score < 0 else check.passed
        return report(measured, left=kept, norms=norms.tolist())
    verdict = Verdict(
        "growing residuals",
        "the entries are larger than, or belong to others than, the features that they stand for",
        "compare the codebook with the encoder's features; were both loaded from one checkpoint?",
    )
    return check.failed(measured, verdict, WARNING, left=kept, norms=norms.tolist())


def check_semantics(case: Case) -> Finding:
    """Pictures that are alike to the semantic encoder are alike in the features decoded from their codes."""
    check = Check(
        "semantic features",
        "tokenizer",
        "pictures that the semantic encoder finds alike have codes whose decoded features are alike, more than chance "
        "(alignment of both similarity matrices, against pictures in random order)",
    )
    wanted, made, agreement = [], [], []
    for group in case.groups:
        with torch.no_grad():
            features = case.vq_model.semantic_features(group.pixels.float())
        decoded = group.output.semantic_features.float()
        if decoded.shape == features.shape:
            agreement += F.cosine_similarity(decoded, features, dim=-1).mean(1).tolist()
        wanted.append(features.mean(1))
        made.append(decoded.mean(1))
    likeness, score = alignment(torch.cat(made).cpu(), torch.cat(wanted).cpu(), case.seed)
    cosine = sum(agreement) / len(agreement) if agreement else None
    measured = f"alignment {likeness:.2f}, {score:.1f} standard deviations above chance"
    if cosine is not None:
        measured += f"; cosine of the features themselves {cosine:.2f}"
    figures = {"alignment": likeness, "deviations": score, "cosine": cosine}
    if sum(map(len, made)) < ENOUGH or score > SIGNIFICANT:
        return check.passed(measured, **figures)
    verdict = Verdict(
        "semantic branch lost",
        "the semantic half of the codes says nothing of the picture: encoder, entries or semantic decoder are "
        "damaged, or not trained",
        "measure the agreement with the semantic teacher; was the semantic encoder reset?",
    )
    return check.failed(measured, verdict, WARNING, **figures)
