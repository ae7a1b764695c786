"""Checks of training shards, and of the transformer on what they hold."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ..data.loading import PackReader, collate
from ..data.shards import (
    Shard,
    check_identity,
    decodable_codes,
    identity_of,
    images_of,
    open_shards,
    sequence_spec,
    thumbnail,
    thumbnail_error,
    verify,
)
from ..layout import find_images
from ..scales import ScaleSchedule
from . import reference
from .case import Case
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, z_score
from .stored import stored_pictures
from .tokenizer import SWAPPED

DRIFTED, MIXED = "drifted tokenizer", "self-correction written into targets"
SAMPLED = 16  # pictures that are looked at


def check_files(case: Case) -> Finding:
    """Every shard is what was written, and every row unfolds."""
    check = Check(
        "files of the shards",
        "shards",
        "every shard is there, has its sha256, and its rows unfold",
    )
    try:
        report = verify(case.packs)
    except (ValueError, OSError) as error:
        verdict = Verdict(
            "damaged shards", "a file was cut, changed or lost after it was written", "copy or extract the shards anew"
        )
        return check.failed(str(error), verdict)
    return check.passed(f"{report['rows']} rows, {report['tokens']} tokens, files: {report['shards']}", **report)


def check_whose(case: Case) -> Finding:
    """The shards were made with this model's tokenizers, schedules and ids."""
    check = Check(
        "whose shards",
        "shards",
        "the shards' manifest names this model's vision and text tokenizers (by hash), scale schedules, special ids "
        "and first id of the codes",
    )
    _, manifest = open_shards(case.packs, hashes=False)
    try:
        check_identity(manifest, identity_of(case.config, case.processor, case.vq_model))
    except ValueError as error:
        names = {"vision tokenizer": DRIFTED, "code offset": "wrong code offset"}
        fault = next(
            (fault for name, fault in names.items() if f"another {name}" in str(error)), "shards of another model"
        )
        cause = "the codes were made before the tokenizer was trained on, or by another one"
        if fault != DRIFTED:
            cause = "shards and model were made with different settings"
        step = "extract the shards anew with this checkpoint, or train with the tokenizer that made them"
        return check.failed(str(error), Verdict(fault, cause, step))
    return check.passed("shards and model agree in all of them")


def check_round_trip(case: Case) -> Finding:
    """Stored codes decode to the pictures that were coded, by their thumbnails."""
    check = Check(
        "round trip",
        "shards",
        "stored codes decode to the thumbnails taken when they were coded, up to 2 grey levels: both are rounded to "
        "whole ones, and devices round differently",
    )
    folder, manifest = open_shards(case.packs, hashes=False)
    spec, worst = sequence_spec(manifest["identity"]), 0.0
    for sample in manifest["samples"][:SAMPLED]:
        shard = Shard(folder / "data" / manifest["shards"][sample["shard"]]["file"])
        images = images_of(shard.row(sample["row"]), spec, manifest["variants"])
        grid, targets, inputs = images[sample["image"]]
        codes = torch.from_numpy(decodable_codes(targets, inputs)[None]).to(case.model.device)
        shown = thumbnail(case.vq_model.decode(codes, grid)[0])
        error = thumbnail_error(shown, sample)
        worst = max(worst, error - sample["error"])
        if error <= sample["error"] + 2:
            continue
        fault, cause = DRIFTED, "the decoder is another than the one that was there when the shards were made"
        if thumbnail_error(shown.transpose(1, 0, 2), sample) <= sample["error"] + 2:
            fault, cause = SWAPPED, "stored codes lie column by column in place of row by row"
        measured = f"a stored picture is {error:.1f} grey levels from its thumbnail, {sample['error']:.1f} when coded"
        step = "decode some rows with `transformers-nextflow data inspect` and look at them"
        return check.failed(measured, _or_changed(case, Verdict(fault, cause, step)))
    return check.passed(
        f"{len(manifest['samples'][:SAMPLED])} stored pictures, at most {worst:+.1f} grey levels more than then"
    )


def _or_changed(case: Case, verdict: Verdict) -> Verdict:
    """The verdict that the stored codes themselves give, where they are not as a tokenizer makes them."""
    again = check_targets_again(case)
    if again.fault is not None and again.fault != DRIFTED:
        return Verdict(again.fault, again.cause, again.next_step)
    return verdict


def check_targets_again(case: Case) -> Finding:
    """Stored targets are what a fresh encoding of the decoded pictures gives."""
    check = Check(
        "targets against a fresh encoding",
        "shards",
        "codes of the decoded picture, looked up anew behind the stored inputs, agree with the stored targets as "
        "often as those of pictures that were decoded and coded twice",
    )
    stored, again, pictures = [], [], []
    for grid, targets, inputs in stored_pictures(case, SAMPLED):
        picture = StoredCodes(case, grid, targets, inputs)
        pictures.append(picture)
        stored.append(picture.agreement())
        plain = case.vq_model.encode(case.vq_model.decode(picture.codes(), grid))
        again.append(_agreement(_recoded(case, plain, picture.schedule), plain, picture.schedule))
    if len(pictures) < ENOUGH:
        return check.noted("the shards hold too few pictures to say")
    own, twice = sum(stored) / len(stored), sum(again) / len(again)
    measured = f"{own:.1%} agree over {len(pictures)} pictures, {twice:.1%} of codes made twice"
    if z_score(torch.tensor(again) - torch.tensor(stored)) <= SIGNIFICANT or own >= twice / 2:
        return check.passed(measured, stored=own, again=twice)
    mended = {
        (name, inputs_too): sum(picture.agreement(undo, inputs_too) for picture in pictures) / len(pictures)
        for name, undo in _MISTAKES.items()
        for inputs_too in (False, True)
    }
    best = max(mended, key=lambda key: mended[key])
    step = "extract the shards anew, and look at whatever wrote or changed them"
    verdict = Verdict(DRIFTED, "the stored codes are not this tokenizer's", step)
    if mended[best] > (own + twice) / 2:
        verdict = Verdict(_FAULTS[best[0]], f"with {best[0]} undone, {mended[best]:.1%} agree", step)
    return check.failed(measured, verdict, stored=own, again=twice, mended=mended[best])


class StoredCodes:
    """One stored coding of a picture."""

    def __init__(self, case: Case, grid: tuple[int, int], targets: np.ndarray, inputs: np.ndarray):
        self.case, self.schedule = case, case.vq_model.schedules.by_grid(grid)
        self.targets = torch.from_numpy(targets[:1].astype(np.int64)).to(case.model.device)
        self.inputs = torch.from_numpy(inputs[:1].astype(np.int64)).to(case.model.device)  # of coarse scales, or empty

    def codes(self, undo=None, inputs_too: bool = False) -> torch.Tensor:
        """(1, L) codes that sum up to the picture: inputs, and of the targets what follows them."""
        targets = self._mended(self.targets, undo)
        if len(self.inputs) == 0:
            return targets
        inputs = torch.cat([self.inputs, self.targets[:, self.inputs.shape[1] :]], dim=1)
        inputs = self._mended(inputs, undo if inputs_too else None)
        length = self.inputs.shape[1]
        return torch.cat([inputs[:, :length], targets[:, length:]], dim=1)

    def agreement(self, undo=None, inputs_too: bool = False) -> float:
        """How many targets are what a fresh encoding behind the inputs gives, with a mistake undone."""
        codes = self.codes(undo, inputs_too)
        return _agreement(_recoded(self.case, codes, self.schedule), self._mended(self.targets, undo), self.schedule)

    def _mended(self, codes: torch.Tensor, undo) -> torch.Tensor:
        return codes if undo is None else undo(codes, self.schedule, self.case.config.vq_config)


def _recoded(case: Case, codes: torch.Tensor, schedule) -> torch.Tensor:
    """The nearest codes for the picture of `codes`, when the residual continues from `codes`."""
    features = _features_of(case, codes, schedule)
    config, nearest = case.config.vq_config, []
    for asked in reference.queries(features, codes, case.codebook, schedule):
        nearest.append(reference.distances(asked, case.codebook, config).argmin(-1))
    return torch.cat(nearest, dim=1)


def _features_of(case: Case, codes: torch.Tensor, schedule) -> torch.Tensor:
    """What the encoder makes of the picture of `codes`."""
    pixels = case.vq_model.decode(codes, schedule.final_grid)
    return case.vq_model.features(pixels)


def _agreement(a: torch.Tensor, b: torch.Tensor, schedule) -> float:
    """Share of equal codes, every scale counting the same."""
    equal = (a == b).float()
    return float(torch.stack([equal[:, schedule.slice(scale)].mean() for scale in range(len(schedule))]).mean())


def _rolled(shift: int):
    return lambda codes, schedule, config: codes.roll(shift, dims=1)


def _added(shift: int):
    return lambda codes, schedule, config: (codes + shift) % config.codebook_size


def _transposed(codes: torch.Tensor, schedule, config) -> torch.Tensor:
    parts = [
        codes[:, schedule.slice(scale)].view(-1, grid[1], grid[0]).transpose(1, 2).flatten(1)
        for scale, grid in enumerate(schedule)
    ]
    return torch.cat(parts, dim=1)


_MISTAKES = {
    "a shift by one position back": _rolled(1),
    "a shift by one position": _rolled(-1),
    "an offset of one": _added(-1),
    "an offset of minus one": _added(1),
    "an exchange of rows and columns": _transposed,
}
_FAULTS = dict(
    zip(_MISTAKES, ("shifted targets", "shifted targets", "wrong code offset", "wrong code offset", SWAPPED))
)


def check_correction_shares(case: Case) -> Finding:
    """Inputs differ from targets as often as the settings say, and targets never do from coding to coding."""
    check = Check(
        "self-correction of the shards",
        "shards",
        "inputs differ from targets in the share that the settings name, and the first scale's target is the same in "
        "every stored coding of a picture, whatever was disturbed",
    )
    _, manifest = open_shards(case.packs, hashes=False)
    settings = correction_settings(manifest)
    pictures = [(grid, targets, inputs) for grid, targets, inputs in stored_pictures(case, 64) if len(inputs)]
    if not settings or not pictures:
        return check.noted("the shards hold no self-corrected inputs")
    most = max(len(case.vq_model.schedules.by_grid(grid)) for grid, _, _ in pictures) - 1
    shares: list[list[float]] = [[] for _ in range(most)]
    unlike = 0
    for grid, targets, inputs in pictures:
        schedule = case.vq_model.schedules.by_grid(grid)
        unlike += int((targets[:, :1] != targets[:1, :1]).any())
        for scale in range(len(schedule) - 1):
            at = schedule.slice(scale)
            shares[scale] += (inputs[:, at] != targets[:, at]).mean(axis=1).tolist()
    means = [float(np.mean(values)) for values in shares]
    measured = f"{', '.join(f'{share:.0%}' for share in means)} of the inputs are disturbed at the scales"
    case.curves["disturbed inputs of each scale, share"] = {"share": means}
    step = "extract the shards anew with targets and inputs kept apart"
    cause = "what was disturbed for the input became the target, so the model learns the disturbance"
    if unlike:
        measured += f"; {unlike} of {len(pictures)} pictures have several first targets"
        return check.failed(measured, Verdict(MIXED, cause, step), shares=means)
    wanted = _expected_share(settings, case)
    for scale, values in enumerate(shares):
        score = z_score(torch.tensor(values) - wanted[scale])
        if wanted[scale] > 0 and len(values) >= ENOUGH and max(values) == 0:
            fault = Verdict(
                "self-correction missing",
                "no input is disturbed at this scale: they were lost, or overwritten by the targets",
                step,
            )
            return check.failed(measured + f"; scale {scale + 1} should have {wanted[scale]:.0%}", fault, shares=means)
        if abs(score) > SIGNIFICANT and len(values) >= ENOUGH:
            fault = Verdict("wrong share of self-correction", "the inputs were not made with these settings", step)
            measured += f"; scale {scale + 1} should have {wanted[scale]:.0%}"
            return check.failed(measured, fault, WARNING, shares=means)
    return check.passed(measured, shares=means)


def correction_settings(manifest: Mapping) -> dict | None:
    """Of self-correction, where all documents share them."""
    settings = manifest["documents"]["settings"] if "documents" in manifest else [manifest["settings"]]
    found = [each["self_correction"] for each in settings]
    return found[0] if found and all(each == found[0] for each in found) else None


def _expected_share(settings: Mapping, case: Case) -> list[float]:
    low, high = np.broadcast_to(settings["token_share"], 2)
    kept = 1 / min(settings["top_k"], case.config.vq_config.codebook_size)  # the draw may give the nearest itself
    shares = []
    for scale in range(case.vq_model.schedules.max_scales):
        last = settings["last_scale"]
        takes_part = settings["first_scale"] <= scale and (last is None or scale <= last)
        share = settings["probability"] * (low + high) / 2
        shares.append(float(takes_part * share * (1 - kept)) if settings["temperature"] is None else float("nan"))
    return shares


def check_correction_strength(case: Case) -> Finding:
    """Disturbed inputs are near entries, as many as the settings allow."""
    check = Check(
        "strength of self-correction",
        "shards",
        "most disturbed inputs are among the nearest entries that the settings draw from (top_k), and nearer to the "
        "nearest entry than to a random one; measured on the decoded picture, so not exactly",
    )
    settings = correction_settings(open_shards(case.packs, hashes=False)[1])
    config, outside, ways = case.config.vq_config, [], []
    for grid, targets, inputs in stored_pictures(case, 2 * SAMPLED):
        differ = inputs != targets[:, : inputs.shape[1]]
        if settings is None or not differ.any():
            continue
        most = int(differ.sum(axis=1).argmax())
        picture = StoredCodes(case, grid, targets[most : most + 1], inputs[most : most + 1])
        codes, beyond, way = picture.codes(), [], []
        features = _features_of(case, codes, picture.schedule)
        for scale, asked in enumerate(reference.queries(features, codes, case.codebook, picture.schedule)[:-1]):
            at = picture.schedule.slice(scale)
            disturbed = torch.from_numpy(differ[most, at])
            distances = reference.distances(asked, case.codebook, config)[0, disturbed]
            own = distances.gather(-1, codes[0, at][disturbed][:, None])
            nearest, random = distances.amin(-1, keepdim=True), distances.mean(-1, keepdim=True)
            beyond += ((distances < own).sum(-1) >= settings["top_k"]).tolist()
            way += ((own - nearest) / (random - nearest).clamp(min=1e-12)).flatten().tolist()
        outside.append(float(np.mean(beyond)))
        ways.append(float(np.mean(way)))
    if len(outside) < ENOUGH:
        return check.noted("the shards hold too few self-corrected inputs to say")
    share, way = float(np.mean(outside)), float(np.mean(ways))
    measured = (
        f"{share:.0%} of the disturbed inputs are beyond the {settings['top_k']} nearest, and they lie {way:.0%} of "
        f"the way from the nearest to a random entry ({len(outside)} pictures)"
    )
    if max(share, way) <= 0.5:
        return check.passed(measured, outside=share, way=way)
    cause = "inputs were drawn from too many entries, so the picture that they show is another one"
    step = "lower top_k, or draw by distance (`temperature`), and extract the shards anew"
    verdict = Verdict("self-correction too strong", cause, step)
    return check.failed(measured, verdict, WARNING, outside=share, way=way)


def packed_pictures(case: Case) -> Iterator[tuple[ScaleSchedule, torch.Tensor, torch.Tensor]]:
    """Schedule, (L,) targets and (L, V) log probabilities of supervised pictures, from packs run as in training."""
    folder, manifest = open_shards(case.packs, hashes=False)
    if manifest["content"] != "packs":
        return
    reader = PackReader(folder, manifest, sequence_spec(manifest["identity"]), case.seed)
    found = 0
    for index in np.random.default_rng(case.seed).permutation(len(reader)):
        pack = collate([reader[int(index)]], 0, False)
        if "image_grid_hw" not in pack:
            continue
        batch = {name: values.to(case.model.device) for name, values in pack.items()}
        labels = batch.pop("shift_labels")
        images = find_images(case.config, batch["input_ids"], batch["image_grid_hw"])
        hidden = case.model.model(**batch, use_cache=False).last_hidden_state
        codes = batch["image_codes"].split([image.num_codes for image in images])
        for image, own in zip(images, codes):
            if labels[0, image.start] >= 0:
                found += 1
                yield image.schedule, own, case.model.code_head(hidden[0, image.outputs]).float().log_softmax(-1)
        if found >= SAMPLED:
            return
