"""Checks of training shards: files, whose they are, what their codes show, self-correction."""

from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from ..data.shards import check_identity, decodable_codes, identity_of, images_of, verify
from ..quantizer import resize_features, to_map, to_sequence
from .case import Case, as_codes
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score

ANEW = "extract the shards anew, and look at whatever wrote or changed them"
UNRELATED = 0.6  # share of substitutes that are nearer than any code; by chance one half
SAMPLED, CORRECTED = 16, 64  # pictures that are encoded again, and whose self-correction is counted


def files(check: Check, case: Case) -> Finding:
    """Every shard is there, has its sha256, and its rows unfold."""
    try:
        report = verify(case.packs)
    except (ValueError, OSError) as error:
        cause = "a file was cut, changed or lost after it was written"
        return check.failed(str(error), "damaged shards", cause, "copy or extract the shards anew")
    return check.passed(f"{report['rows']} rows, {report['tokens']} tokens, files: {report['shards']}", **report)


def whose(check: Check, case: Case) -> Finding:
    """The shards' manifest names this model's vision and text tokenizers (by hash), scale schedules, special ids and
    first id of the codes."""
    try:
        check_identity(case.shards[1], identity_of(case.config, case.processor, case.vq_model))
    except ValueError as error:
        is_drift = "another vision tokenizer" in str(error)
        fault = "vision tokenizer and shards differ" if is_drift else "shards of another model"
        cause = (
            "either the shards were made by another one, or with other settings, or the tokenizer was trained on or "
        )
        cause += "damaged since"
        step = "compare the tokenizer with the one that made them, before anything is extracted anew"
        return check.failed(str(error), fault, cause, step)
    return check.passed("shards and model agree in all of them")


def stored_pictures(case: Case, limit: int, corrected: bool = False) -> list[tuple]:
    """Grid, (variants, L) targets and (variants or 0, coarse) inputs of pictures of rows drawn at random; `corrected`,
    of those alone that have inputs of their own."""
    images = (image for document in case.documents for image in images_of(document, case.spec, case.variants))
    return list(islice((image for image in images if len(image[2]) or not corrected), limit))


def codes(check: Check, case: Case) -> Finding:
    """Codes of the decoded picture, looked up anew behind the stored inputs, agree with the stored targets as often
    as those of pictures that were decoded and coded twice; and no part of the table's ids is without use."""
    pictures = stored_pictures(case, SAMPLED)
    if len(pictures) < ENOUGH:
        return check.unchecked(f"the shards hold {len(pictures)} pictures, too few")
    size = case.config.vq_config.codebook_size
    counts = np.bincount(np.concatenate([each["image_codes"] for each in case.documents]), minlength=size)
    used = np.concatenate([[-1], np.flatnonzero(counts), [size]])
    missing, outside = int(np.diff(used).max()) - 1, len(used) - 2
    if missing > size / 8 and outside > (size - missing) / 2 and counts.sum() > 8 * size:
        first = int(used[np.diff(used).argmax()]) + 1
        measured = f"none of the {missing} codes from {first} on occurs among {counts.sum()}, of the others {outside}"
        cause = "ids went through a number too narrow for them, or a mask, or part of the table is not searched"
        return check.failed(measured, "codes missing", cause, ANEW)
    readings = {
        "as they are": lambda codes: codes,
        "one position earlier": lambda codes: codes.roll(-1, 1),
        "one position later": lambda codes: codes.roll(1, 1),
        "numbered one less": lambda codes: (codes - 1) % size,
        "numbered one more": lambda codes: (codes + 1) % size,
    }
    agreed: dict[str, list[float]] = {name: [] for name in readings}
    twice = []
    for grid, targets, inputs in pictures:
        stored, codes = (as_codes(case, each) for each in (targets[0], decodable_codes(targets, inputs)))
        for name, read in readings.items():
            agreed[name].append(_agreement(case, read(codes), read(stored), grid))
        again = case.vq_model.encode(case.vq_model.decode(codes, grid))
        twice.append(_agreement(case, again, again, grid))
    means = {name: float(np.mean(values)) for name, values in agreed.items()}
    own, expected = means["as they are"], float(np.mean(twice))
    measured = f"{own:.1%} agree over {len(pictures)} pictures, {expected:.1%} of codes made twice"
    if z_score(torch.tensor(twice) - torch.tensor(agreed["as they are"])) <= SIGNIFICANT or own >= expected / 2:
        return check.passed(measured, agreement=means, twice=expected)
    best = max(means, key=lambda name: means[name])
    if means[best] > max(2 * own, expected / 2):
        measured += f"; read {best} {means[best]:.1%}"
        fault = "shifted targets" if "position" in best else "wrong code offset"
        return check.failed(measured, fault, f"the stored codes are right when read {best}", ANEW, agreement=means)
    cause = "the stored codes are not this tokenizer's, or were damaged"
    return check.failed(measured, "stored codes in disorder", cause, ANEW, agreement=means)


def _agreement(case: Case, codes: torch.Tensor, targets: torch.Tensor, grid: tuple[int, int]) -> float:
    """How many of (1, L) `targets` are nearest to the residuals of the picture of (1, L) `codes`, when these go on
    from `codes`; every scale counts the same."""
    schedule, quantizer = case.vq_model.schedules.by_grid(grid), case.vq_model.quantizer
    residual, table, shares = case.vq_model.features(case.vq_model.decode(codes, grid)), quantizer(), []
    for scale, size in enumerate(schedule):
        at = schedule.slice(scale)
        queries_lC = quantizer.normalized(to_sequence(F.interpolate(residual, size=size, mode="area")))[0]
        shares.append(float((quantizer.distances(queries_lC, table).argmin(-1) == targets[0, at]).float().mean()))
        residual = residual - resize_features(to_map(table[codes[:, at]], size), schedule.final_grid)
    return float(np.mean(shares))


def correction(check: Check, case: Case) -> Finding:
    """Inputs differ from targets in the share that the settings name, and the first scale's target is the same in
    every stored coding of a picture, whatever was disturbed."""
    manifest = case.shards[1]
    settings = manifest["documents"]["settings"] if "documents" in manifest else [manifest["settings"]]
    settings = [each["self_correction"] for each in settings]
    pictures = stored_pictures(case, CORRECTED, corrected=True)
    if not pictures or not settings[0] or any(each != settings[0] for each in settings):
        return check.unchecked("the shards hold no self-corrected inputs, or of several settings")
    most = max(len(case.vq_model.schedules.by_grid(grid)) for grid, _, _ in pictures) - 1
    shares: list[list[float]] = [[] for _ in range(most)]
    for grid, targets, inputs in pictures:
        schedule = case.vq_model.schedules.by_grid(grid)
        for scale in range(len(schedule) - 1):
            at = schedule.slice(scale)
            shares[scale].append(float((inputs[:, at] != targets[:, at]).mean()))
    means = [float(np.mean(values)) for values in shares]
    measured = f"{', '.join(f'{share:.0%}' for share in means)} of the inputs are disturbed at the scales"
    case.curves["disturbed inputs of each scale, share"] = {"share": means}
    substitutes = _nearness(case, pictures)
    measured += f"; {substitutes:.0%} of them by nearer codes than any"
    unlike = sum(bool((targets[:, :1] != targets[:1, :1]).any()) for _, targets, _ in pictures)
    if unlike:
        measured += f"; {unlike} of {len(pictures)} pictures have several first targets"
        cause = "what was disturbed for the input became the target, so the model learns the disturbance"
        return check.failed(measured, "self-correction written into targets", cause, ANEW, shares=means)
    most = settings[0]["probability"] * float(np.mean(settings[0]["token_share"]))  # a draw may give the nearest
    for scale, values in enumerate(shares):
        last = settings[0]["last_scale"]
        takes_part = settings[0]["first_scale"] <= scale and (last is None or scale <= last)
        excess = z_score(torch.tensor(values) - takes_part * most)
        if excess > SIGNIFICANT or (takes_part * most > 0 and len(values) >= ENOUGH and max(values) == 0):
            measured += f"; scale {scale + 1} should have {takes_part * most:.0%} at most, and not none"
            cause = "the inputs were not made with these settings, or lost, or changed"
            return check.warned(measured, "wrong share of self-correction", cause, ANEW, shares=means)
    several = [inputs for _, _, inputs in pictures if len(inputs) > 1]
    if means and max(means) > 0 and len(several) >= ENOUGH and all((inputs == inputs[0]).all() for inputs in several):
        cause = "all codings of a picture are the same: every one was drawn with the same seed, or copied"
        return check.warned(measured, "variants all alike", cause, ANEW, shares=means)
    if substitutes < UNRELATED:
        cause = "the inputs hold codes that have nothing to do with the targets, where near ones were to be drawn"
        return check.warned(measured, "self-correction by any codes", cause, ANEW, shares=means)
    return check.passed(measured, shares=means)


def _nearness(case: Case, pictures: list[tuple]) -> float:
    """Share of disturbed inputs that are nearer to their targets than any code is, one half by chance."""
    pairs = [np.stack([inputs, targets[:, : inputs.shape[1]]]).reshape(2, -1) for _, targets, inputs in pictures]
    inputs, targets = (torch.from_numpy(each.astype(np.int64)) for each in np.concatenate(pairs, axis=1))
    table, changed = case.vq_model.quantizer().float().cpu(), inputs != targets
    apart = lambda others: (table[others] - table[targets]).square().sum(-1)[changed]  # noqa: E731
    others = torch.from_numpy(np.random.default_rng(case.seed).integers(len(table), size=len(targets)))
    return float((apart(inputs) < apart(others)).float().mean()) if changed.any() else 1.0
