"""Checks of training shards: files, whose they are, what their codes show, self-correction."""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from ..data.shards import check_identity, identity_of, verify
from ..quantizer import resize_features, to_map, to_sequence
from .case import Case
from .findings import ENOUGH, SIGNIFICANT, Finding, z_score

UNRELATED = 0.6  # share of substitutes that are nearer than any code; by chance one half
SAMPLED, CORRECTED = 16, 64  # pictures that are encoded again, and whose self-correction is counted


def files(check: Finding, case: Case) -> Finding:
    """Every shard is there, has its sha256, and its rows unfold."""
    try:
        report = verify(case.packs)
    except (ValueError, OSError) as error:
        return check.verdict(str(error), {"damaged shards": True})
    return check.verdict(f"{report['rows']} rows, {report['tokens']} tokens, files: {report['shards']}", {})


def whose(check: Finding, case: Case) -> Finding:
    """The shards' manifest names this model's vision and text tokenizers (by hash), scale schedules, special ids and
    first id of the codes."""
    try:
        check_identity(case.shards[1], identity_of(case.config, case.processor, case.vq_model))
    except ValueError as error:
        fault = "vision tokenizer and shards differ" if "vision tokenizer" in str(error) else "shards of another model"
        return check.verdict(str(error), {fault: True})
    return check.verdict("shards and model agree in all of them", {})


def codes(check: Finding, case: Case) -> Finding:
    """Codes of the decoded picture, looked up anew behind the stored inputs, agree with the stored targets as often
    as those of pictures that were decoded and coded twice; and no part of the table's ids is without use."""
    pictures = case.stored[:SAMPLED]
    if len(pictures) < ENOUGH:
        return check.unchecked(f"the shards hold {len(pictures)} pictures, too few")
    size = case.config.vq_config.codebook_size
    stored = np.concatenate([targets.ravel() for _, targets, _ in case.stored])
    used = np.unique(np.append(stored, (-1, size)))  # with the bounds
    missing, first = int(np.diff(used).max()) - 1, int(used[np.diff(used).argmax()]) + 1
    is_missing = missing > size / 8 and len(used) - 2 > (size - missing) / 2 and len(stored) > 8 * size
    coded = [(case.codes_of(own, fed), case.codes_of(own, fed[:0]), grid) for grid, own, fed in pictures]
    again = [(case.vq_model.encode(case.vq_model.decode(codes, grid)), grid) for codes, _, grid in coded]
    agreement = lambda them: torch.tensor([_agreement(case, *each) for each in them])  # noqa: E731
    twice, own = agreement((codes, codes, grid) for codes, grid in again), agreement(coded)
    expected, share, ways = float(twice.mean()), float(own.mean()), {}
    means, is_less = {"as they are": share}, share < expected / 2 and z_score(twice - own) > SIGNIFICANT
    for step, place, number in ((-1, "earlier", "less"), (1, "later", "more")):
        ways[f"one position {place}"] = lambda codes, step=step: codes.roll(step, 1)
        ways[f"numbered one {number}"] = lambda codes, step=step: (codes + step) % size
    for name, way in ways.items() if is_less else ():
        means[name] = float(agreement((way(codes), way(targets), grid) for codes, targets, grid in coded).mean())
    best = max(means, key=lambda name: means[name])
    is_so = means[best] > max(4 * share, expected / 4)
    faults = {
        "codes missing": is_missing,
        "shifted targets": is_less and is_so and "position" in best,
        "wrong code offset": is_less and is_so,
        "stored codes in disorder": is_less,
    }
    measured = f"{share:.1%} agree over {len(pictures)} pictures, {expected:.1%} of codes made twice; read {best} "
    measured += f"{means[best]:.1%}; the longest gap in the ids of {len(stored)} codes is {missing} from {first} on"
    return check.verdict(measured, faults)


def _agreement(case: Case, codes: torch.Tensor, targets: torch.Tensor, grid: tuple[int, int]) -> float:
    """How many of (1, L) `targets` are nearest to the residuals of the picture of (1, L) `codes`, when these go on
    from `codes`; every scale counts the same."""
    schedule, quantizer = case.schedules.by_grid(grid), case.vq_model.quantizer
    residual, table, shares = case.vq_model.features(case.vq_model.decode(codes, grid)), quantizer(), []
    for scale, size in enumerate(schedule):
        at = schedule.slice(scale)
        queries_lC = quantizer.normalized(to_sequence(F.interpolate(residual, size=size, mode="area")))[0]
        shares.append(float((quantizer.distances(queries_lC, table).argmin(-1) == targets[0, at]).float().mean()))
        residual = residual - resize_features(to_map(table[codes[:, at]], size), schedule.final_grid)
    return float(np.mean(shares))


def correction(check: Finding, case: Case) -> Finding:
    """Inputs differ from targets in the share that the settings name, by near codes, and otherwise in every coding of
    a picture; the first scale's target is the same in all, whatever was disturbed."""
    manifest = case.shards[1]
    settings = manifest["documents"]["settings"] if "documents" in manifest else [manifest["settings"]]
    corrections = [each["self_correction"] for each in settings]
    pictures, correction = [image for image in case.stored if len(image[2])][:CORRECTED], corrections[0]
    if not pictures or not correction or any(each != correction for each in corrections):
        return check.unchecked("the shards hold no self-corrected inputs, or of several settings")
    shares = defaultdict(list)
    for grid, targets, inputs in pictures:
        for scale in range(len(schedule := case.schedules.by_grid(grid)) - 1):
            at = schedule.slice(scale)
            shares[scale].append(float((inputs[:, at] != targets[:, at]).mean()))
    means = [float(np.mean(values)) for values in shares.values()]
    case.curves["disturbed inputs of each scale, share"] = {"share": means}
    last, wrong = correction["last_scale"], []
    for scale, values in shares.items():
        takes_part = correction["first_scale"] <= scale and (last is None or scale <= last)
        most = takes_part * correction["probability"] * float(np.mean(correction["token_share"]))
        is_more = z_score(torch.tensor(values) - most) > SIGNIFICANT  # a draw may give the nearest, so it may be less
        wrong += [scale + 1] if is_more or (most > 0 and len(values) >= ENOUGH and max(values) == 0) else []
    near, several = _nearness(case, pictures), [inputs for _, _, inputs in pictures if len(inputs) > 1]
    unlike = sum(bool((targets[:, :1] != targets[:1, :1]).any()) for _, targets, _ in pictures)
    alike = sum(bool((inputs == inputs[0]).all()) for inputs in several)
    measured = f"{', '.join(f'{share:.0%}' for share in means)} of the inputs are disturbed at the scales, wrong at "
    measured += f"{wrong}, {near:.0%} by nearer codes than any; of {len(pictures)} pictures {unlike} have several "
    measured += f"first targets, {alike} codings all alike"
    faults = {
        "self-correction written into targets": unlike,
        "wrong share of self-correction": wrong,
        "variants all alike": alike == len(several) >= ENOUGH and max(means) > 0,
        "self-correction by any codes": near < UNRELATED,
    }
    return check.verdict(measured, faults)


def _nearness(case: Case, pictures: list[tuple]) -> float:
    """Share of disturbed inputs that are nearer to their targets than any code is, one half by chance."""
    pairs = [np.stack([inputs, targets[:, : inputs.shape[1]]]).reshape(2, -1) for _, targets, inputs in pictures]
    inputs, targets = torch.from_numpy(np.concatenate(pairs, axis=1).astype(np.int64))
    table, changed = case.vq_model.quantizer().float().cpu(), inputs != targets
    apart = lambda others: (table[others] - table[targets]).square().sum(-1)[changed]  # noqa: E731
    others = torch.from_numpy(np.random.default_rng(case.seed).integers(len(table), size=len(targets)))
    return float((apart(inputs) < apart(others)).float().mean()) if changed.any() else 1.0
