"""Checks of training shards, and of the transformer on what they hold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

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
from ..scales import ScaleSchedule
from . import reference
from .case import Case, Sequence
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, z_score
from .tokenizer import SWAPPED

DRIFTED, MIXED = "drifted tokenizer", "self-correction written into targets"
SAMPLED = 16  # pictures that are looked at


def check_files(case: Case) -> Finding:
    """Every shard is what was written, and every row unfolds."""
    check = Check("files of the shards", "shards", "every shard is there, has its sha256, and its rows unfold")
    try:
        report = verify(case.packs)
    except (ValueError, OSError) as error:
        verdict = Verdict(
            "damaged shards", "a file was cut, changed or lost after it was written", "copy or extract the shards anew"
        )
        return check.failed(str(error), verdict)
    return check.passed(f"{report['rows']} rows, {report['tokens']} tokens in {report['shards']} shards", **report)


def check_whose(case: Case) -> Finding:
    """The shards were made with this model's tokenizers, schedules and ids."""
    check = Check("whose shards", "shards", "tokenizers, schedules, special ids and code offset are the model's")
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
    return check.passed("all agree")


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


def stored_pictures(case: Case, limit: int = 24) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Grid, targets and inputs of pictures of rows drawn at random."""
    pictures = (image for document in stored_documents(case) for image in document.images)
    return list(islice(pictures, limit))


@dataclass(frozen=True)
class StoredDocument:
    """One document as it is stored: compact ids, which of them are supervised, and its pictures' grids and codes."""

    ids: np.ndarray
    supervised: np.ndarray
    images: list[tuple]


def stored_documents(case: Case) -> Iterator[StoredDocument]:
    """All documents, from rows drawn at random."""
    folder, manifest = open_shards(case.packs, hashes=False)
    spec = sequence_spec(manifest["identity"])
    rows = [(entry["file"], row) for entry in manifest["shards"] for row in range(entry["rows"])]
    shards: dict[str, Shard] = {}
    for place in np.random.default_rng(case.seed).permutation(len(rows)):
        file, index = rows[place]
        row = shards.setdefault(file, Shard(folder / "data" / file)).row(index)
        images = iter(images_of(row, spec, manifest["variants"]))
        ends = np.cumsum(row.get("document_lengths", [len(row["input_ids"])]))[:-1]
        for ids, flags in zip(np.split(row["input_ids"], ends), np.split(row["supervised"], ends)):
            yield StoredDocument(ids, flags, [next(images) for _ in range(int((ids == spec.special.image).sum()))])


def stored_sequences(case: Case, limit: int = 16, edits: bool = False) -> list[Sequence]:
    """Documents whose one supervised picture is their last: after a text alone, or as an edit of another picture of
    its size."""
    spec = sequence_spec(open_shards(case.packs, hashes=False)[1]["identity"])
    empty = case.processor.apply_chat_template([{"role": "user", "content": ""}], generation_mode="image")
    null = empty["input_ids"].to(case.model.device)
    found: list[Sequence] = []
    for document in stored_documents(case):
        at = np.flatnonzero(document.ids == spec.special.image)
        flags = document.supervised[at].astype(bool)
        if len(at) == 0 or not flags[-1] or flags[:-1].any() or edits != (len(at) > 1):
            continue
        if edits and document.images[-2][0] != document.images[-1][0]:
            continue
        # a text that was dropped leaves the null prompt
        if not edits and at[0] + 1 <= null.shape[1]:
            continue
        before = slice(0, at[-1])
        *given, (grid, targets, inputs) = document.images
        codes = torch.from_numpy(decodable_codes(*_least_disturbed(targets, inputs)))[None].to(case.model.device)
        grids = np.array([each[0] for each in given]).reshape(-1, 2)
        opened = spec.expand(document.ids[before], document.supervised[before], grids, np.array([at[-1]]))
        prompt = null.new_tensor([[*opened["input_ids"].tolist(), spec.special.boi]])
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "negative_input_ids": null}
        if given:
            inputs["image_codes"] = torch.from_numpy(np.concatenate([each[1][0] for each in given]).astype(np.int64))
            inputs["image_grid_hw"] = torch.from_numpy(grids)
        found.append(case.answered(inputs, codes, case.vq_model.schedules.by_grid(grid)))
        if len(found) == limit:
            break
    return found


def _least_disturbed(targets: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a picture's stored codings the one whose inputs are most like its targets."""
    if len(inputs) == 0:
        return targets, inputs
    best = int((inputs != targets[:, : inputs.shape[1]]).sum(axis=1).argmin())
    return targets[best : best + 1], inputs[best : best + 1]


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
    pixels = case.vq_model.decode(codes, schedule.final_grid)
    with torch.no_grad():
        features = case.vq_model.features(pixels.to(case.vq_model.pixel_encoder.to_code.weight.dtype))
    config, nearest = case.config.vq_config, []
    for scale, asked in enumerate(reference.queries(features, codes, case.codebook, schedule)):
        allowed = reference.entries_of(config, scale)
        nearest.append(allowed.start + reference.distances(asked, case.codebook, config)[..., allowed].argmin(-1))
    return torch.cat(nearest, dim=1)


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
    shares = []
    for scale in range(case.vq_model.schedules.max_scales):
        last = settings["last_scale"]
        takes_part = settings["first_scale"] <= scale and (last is None or scale <= last)
        entries = reference.entries_of(case.config.vq_config, scale)
        kept = 1 / min(settings["top_k"], entries.stop - entries.start)  # the draw may give the nearest itself
        share = settings["probability"] * (low + high) / 2
        shares.append(float(takes_part * share * (1 - kept)) if settings["temperature"] is None else float("nan"))
    return shares


def check_losses(case: Case) -> Finding:
    """The loss of each scale is below the entropy of its codes, and the right codes are the likeliest reading."""
    check = Check(
        "loss of each scale",
        "transformer",
        "stored targets cost less than codes drawn by their frequency alone would (unigram, each picture left out in "
        "turn), less than their neighbours in number or place, and less than with other settings of config.json",
    )
    pictures = supervised_pictures(case)
    if len(pictures) < ENOUGH:
        return check.noted("the shards hold too few supervised pictures to say")
    return _misread(case, check, pictures) or _judge_losses(case, check, pictures)


def other_settings(case: Case) -> list[tuple[str, str, object]]:
    """Settings that weights do not show: the fault's name, the setting, another value."""
    mode = "residual" if case.config.feature_mode == "accumulated" else "accumulated"
    others = [("wrong feature mode", "feature_mode", mode)]
    if case.config.position_scale is not None:
        others.append(("wrong position scale", "position_scale", None))
    return others


@contextmanager
def other_setting(config, name: str, value) -> Iterator[None]:
    kept = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, kept)


@dataclass(frozen=True)
class Supervised:
    """A supervised picture of the packs, as the model sees it.

    Attributes:
        codes: (L,) targets.
        log_probs: (L, V).
    """

    schedule: ScaleSchedule
    codes: torch.Tensor
    log_probs: torch.Tensor

    def loss_of(self, codes: torch.Tensor) -> float:
        """Mean cost of (L,) codes; one that is all but impossible counts no more than 30 nats."""
        return float(F.nll_loss(self.log_probs, codes, reduction="none").clamp(max=30).mean())


def supervised_pictures(case: Case) -> list[Supervised]:
    """Those of packs drawn at random."""
    folder, manifest = open_shards(case.packs, "packs", hashes=False)
    reader = PackReader(folder, manifest, sequence_spec(manifest["identity"]), case.seed)
    order = np.random.default_rng(case.seed).permutation(len(reader))
    pictures = []
    for index in order:
        pack = collate([reader[int(index)]], 0, False)
        if "image_grid_hw" not in pack:
            continue
        batch = {name: values.to(case.model.device) for name, values in pack.items()}
        labels = batch.pop("shift_labels")
        layout = case.model.model.lay_out(
            batch["input_ids"], batch["image_grid_hw"], document_ids=batch["document_ids"]
        )
        hidden = case.model.model(**batch, use_cache=False).last_hidden_state
        codes = batch["image_codes"].split([image.num_codes for image in layout.closed_images])
        for image, own in zip(layout.closed_images, codes):
            if labels[0, image.start] >= 0:
                log_probs = case.model.code_head(hidden[0, image.slots]).float().log_softmax(-1)
                pictures.append(Supervised(image.schedule, own, log_probs))
        if len(pictures) >= SAMPLED:
            break
    return pictures


def _misread(case: Case, check: Check, pictures: list[Supervised]) -> Finding | None:
    """Whether the weights find other codes, or the same under another setting, likelier than what is stored."""
    size, step = case.config.vq_config.codebook_size, "the model was trained on codes of another numbering or order"
    readings: dict[str, tuple[Verdict, list[float]]] = {}
    for shift in (-2, -1, 1, 2):
        name = f"codes numbered {shift:+d}"
        verdict = Verdict("wrong code offset", f"the model finds {name} likelier", f"{step}: compare the offsets")
        readings[name] = verdict, [picture.loss_of((picture.codes + shift) % size) for picture in pictures]
    for shift in (-1, 1):
        name = f"codes {shift:+d} position"
        verdict = Verdict("shifted targets", f"the model finds {name} likelier", f"{step}: compare the targets")
        readings[name] = verdict, [picture.loss_of(picture.codes.roll(shift)) for picture in pictures]
    for fault, name, value in other_settings(case):
        cause = f"config.json says {name} = {getattr(case.config, name)}, the weights were trained with {value}"
        with other_setting(case.config, name, value):
            then = [picture.loss_of(picture.codes) for picture in supervised_pictures(case)]
        readings[f"{name} = {value}"] = Verdict(fault, cause, f"set {name} to {value} in config.json"), then
    own = torch.tensor([picture.loss_of(picture.codes) for picture in pictures])
    best = min(readings, key=lambda name: sum(readings[name][1]))
    verdict, values = readings[best]
    if z_score(own - torch.tensor(values)) <= SIGNIFICANT:
        return None
    then = sum(values) / len(values)
    measured = f"{float(own.mean()):.2f} nats a code over {len(own)} stored pictures, {then:.2f} with {best}"
    return check.failed(measured, verdict, WARNING)


def _judge_losses(case: Case, check: Check, pictures: list[Supervised]) -> Finding:
    config = case.config.vq_config
    most = max(len(picture.schedule) for picture in pictures)
    loss = [[] for _ in range(most)]
    unigram = [[] for _ in range(most)]
    counts = torch.zeros(most, config.codebook_size)
    for picture in pictures:
        for scale in range(len(picture.schedule)):
            counts[scale] += (
                picture.codes[picture.schedule.slice(scale)].bincount(minlength=config.codebook_size).cpu()
            )
    for picture in pictures:
        schedule, codes, log_probs = picture.schedule, picture.codes, picture.log_probs
        losses = F.nll_loss(log_probs, codes, reduction="none")
        for scale in range(len(schedule)):
            own = codes[schedule.slice(scale)].cpu()
            rest = counts[scale] - own.bincount(minlength=config.codebook_size)
            allowed = reference.entries_of(config, scale)
            size = allowed.stop - allowed.start
            probability = (rest + 0.5) / (rest.sum() + 0.5 * size)
            loss[scale].append(float(losses[schedule.slice(scale)].mean()))
            unigram[scale].append(float(-probability[own].log().mean()))
    means = {"loss": [float(np.mean(each)) for each in loss], "unigram": [float(np.mean(each)) for each in unigram]}
    case.curves["loss of each scale, nats per code"] = means
    shown = ", ".join(f"{a:.2f} ({b:.2f})" for a, b in zip(means["loss"], means["unigram"]))
    measured = f"loss (unigram) of the scales over {len(pictures)} stored pictures: {shown}"
    for scale in range(most):
        score = z_score(torch.tensor(loss[scale]) - torch.tensor(unigram[scale]))
        if score > SIGNIFICANT:
            verdict = Verdict(
                "worse than the unigram",
                f"scale {scale + 1} is predicted worse than by the frequencies of its codes: not trained, trained on "
                "other codes, or its inputs are not those of the training",
                "train longer, or compare codes, inputs and positions with the training's",
            )
            return check.failed(
                f"{measured}; scale {scale + 1} is {score:.1f} standard errors above", verdict, WARNING, **means
            )
    return check.passed(measured, **means)


def check_copying(case: Case) -> Finding:
    """Where an edit changes codes, the model gives the target's more than the source's."""
    check = Check(
        "copying the source",
        "transformer",
        "where the target's codes differ from the condition picture's, the target's are likelier",
    )
    gains, shares = [], []
    for sequence in stored_sequences(case, edits=True):
        codes = sequence.codes[0]
        source = sequence.inputs["image_codes"][-2 * len(codes) : -len(codes)]
        differ = codes != source
        shares.append(float((~differ).float().mean()))
        if differ.any():
            logits = case.code_logits(sequence)[differ]
            own, copied = (float(F.cross_entropy(logits, each[differ])) for each in (codes, source))
            gains.append(copied - own)
    if len(gains) < ENOUGH:
        return check.noted(f"{len(gains)} edits of a picture of the same size are too few to say", gains=gains)
    gain, score = sum(gains) / len(gains), z_score(torch.tensor(gains))
    measured = (
        f"over {len(gains)} edits, {sum(shares) / len(shares):.0%} of the codes are the source's; at the others the "
        f"target is {gain:.1f} nats likelier ({score:.1f} standard errors)"
    )
    if score > -SIGNIFICANT:
        return check.passed(measured, gain=gain, score=score)
    cause = "handing the source back scores well where most of a picture stays, and the model has learned no more"
    verdict = Verdict("copies the source", cause, "weigh changed regions more, or show more edits that change much")
    return check.failed(measured, verdict, WARNING, gain=gain, score=score)
