"""Faults to plant in a good checkpoint or its shards, and the name each must be given.

Faults in code are patched in, faults in weights and shards are edits of copies. `plant` gives what to examine.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from transformers_nextflow import (
    contexts,
    drawing,
    features,
    generation_nextflow,
    image_processing_nextflow,
    layout,
    modeling_nextflow,
    processing_nextflow,
    quantizer,
    sampling,
)
from transformers_nextflow.contexts import Contexts
from transformers_nextflow.data.shards import Shard, sha256_of
from transformers_nextflow.modeling_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowRotaryEmbedding,
    ScaleEmbedding,
)
from transformers_nextflow.scales import ScaleSchedule

OFFSET, SWAPPED, SHIFTED = "wrong code offset", "swapped height and width", "shifted targets"
INTERPOLATION, DRIFTED, LEAKING = "wrong interpolation", "drifted tokenizer", "leaking documents"
COORDINATES, AXIS, SCALES = "bf16 coordinates", "blind position axis", "missing scale embedding"
PIXELS, GUIDANCE, MIXED = "dropped pixels", "guidance rows swapped", "self-correction written into targets"


@dataclass
class Patient:
    """What a fault is planted in; `packs` and `text_source` are given to the doctor only where a fault needs them."""

    model: nn.Module
    processor: object
    packs: Path
    folder: Path
    stack: ExitStack
    text_source: nn.Module | None = None

    def patch(self, owner, name: str, value) -> None:
        self.stack.enter_context(patch.object(owner, name, value))

    def copy_model(self):
        self.model = copy.deepcopy(self.model)
        return self.model

    def copy_packs(self) -> Path:
        target = self.folder / "packs"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.packs, target)
        self.packs = target
        return target


@dataclass(frozen=True)
class Fault:
    """A fault, the name the first finding must give it, and whether shards are examined."""

    title: str
    expected: str
    plant: Callable[[Patient], None]
    packs: bool = False


FAULTS: list[Fault] = []


def fault(title: str, expected: str, packs: bool = False):
    def add(plant: Callable[[Patient], None]):
        FAULTS.append(Fault(title, expected, plant, packs))
        return plant

    return add


@contextmanager
def planted(fault: Fault, model, processor, packs: Path, folder: Path) -> Iterator[dict]:
    """The arguments of `examine` for a patient with this fault."""
    with ExitStack() as stack:
        caches = layout._blocks, features.scale_taps
        for cached in caches:
            stack.callback(cached.cache_clear)
        patient = Patient(model, processor, packs, folder, stack)
        fault.plant(patient)
        for cached in caches:
            cached.cache_clear()
        arguments = {"model": patient.model, "processor": patient.processor, "text_source": patient.text_source}
        yield arguments | ({"packs": patient.packs} if fault.packs else {})


def rewrite(packs: Path, change: Callable[[dict], None]) -> None:
    """Change every row of a folder of packs, and what its manifest says of the files."""
    manifest = json.loads((packs / "manifest.json").read_text())
    for entry in manifest["shards"]:
        path = packs / "data" / entry["file"]
        shard = Shard(path)
        rows = [{name: np.array(value) for name, value in shard.row(i).items()} for i in range(len(shard))]
        for row in rows:
            change(row)
        schema = shard.batch.schema
        columns = [pa.array([row[field.name].tolist() for row in rows], type=field.type) for field in schema]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (packs / "manifest.json").write_text(json.dumps(manifest))


def pictures_of(row: dict, variants: int, schedules, image_id: int):
    """(schedule, place among the codes, copies, place among the inputs) of each stored picture of a row."""
    flags = row["supervised"][row["input_ids"] == image_id]
    at = inputs_at = 0
    for grid, supervised in zip(row["image_grid_hw"].reshape(-1, 2).tolist(), flags):
        schedule = schedules.by_grid(grid)
        copies = variants if supervised else 1
        inputs = copies * schedule.offsets[-1] if supervised else 0
        yield schedule, slice(at, at + copies * schedule.num_codes), copies, slice(inputs_at, inputs_at + inputs)
        at, inputs_at = at + copies * schedule.num_codes, inputs_at + inputs


def bilinear(features, grid):
    return F.interpolate(features, size=tuple(grid), mode="bilinear")


# Listed by name


@fault("code ids one too high in the loss", OFFSET)
def _(p):
    targets = NextFlowForConditionalGeneration._targets
    raised = lambda self, layout, codes: targets(self, layout, codes) + (layout.target_codes >= 0)  # noqa: E731
    p.patch(NextFlowForConditionalGeneration, "_targets", raised)


@fault("rows and columns of coordinates exchanged", SWAPPED)
def _(p):
    cells = layout.scale_coordinates
    for module in (layout, contexts):
        p.patch(module, "scale_coordinates", lambda grid, edge: cells(grid, edge).flip(0))


@fault("bilinear in place of bicubic everywhere", INTERPOLATION)
def _(p):
    for module in (quantizer, features):
        p.patch(module, "resize_features", bilinear)


@fault("targets one position late", SHIFTED)
def _(p):
    targets = NextFlowForConditionalGeneration._targets
    late = lambda self, layout, codes: targets(self, layout, codes.roll(1))  # noqa: E731
    p.patch(NextFlowForConditionalGeneration, "_targets", late)


@fault("tokenizer trained on after the shards", DRIFTED, packs=True)
def _(p):
    for weight in p.copy_model().model.vq_model.pixel_encoder.to_code.parameters():
        weight.data += 0.05 * torch.randn_like(weight) * weight.std()


@fault("documents see each other", LEAKING)
def _(p):
    mask = modeling_nextflow.sequence_mask
    p.patch(
        modeling_nextflow,
        "sequence_mask",
        lambda config, embeds, mask2d, layout, documents, cache: mask(config, embeds, mask2d, layout, None, cache),
    )


@fault("coordinates rounded to bfloat16", COORDINATES)
def _(p):
    cells = layout.scale_coordinates
    for module in (layout, contexts):
        p.patch(module, "scale_coordinates", lambda grid, edge: cells(grid, edge).bfloat16().float())


@fault("columns at one place", AXIS)
def _(p):
    cells = layout.scale_coordinates

    def blind(grid, edge):
        rows, columns = cells(grid, edge)
        return torch.stack([rows, columns.mean().expand_as(columns)])

    for module in (layout, contexts):
        p.patch(module, "scale_coordinates", blind)


@fault("no scale embedding", SCALES)
def _(p):
    forward = ScaleEmbedding.forward
    p.patch(ScaleEmbedding, "forward", lambda self, ids, counts: 0 * forward(self, ids, counts))


def without_pictures(embed: Callable) -> Callable:
    """`embed_images` that leaves the placeholders' embeddings where they are."""
    of_slots = ("slot_places", "tap_places", "tap_weights", "tap_starts")

    def other(self, embeds, layout, codes):
        nothing = {name: getattr(layout, name)[:0] for name in of_slots}
        return embed(self, embeds, replace(layout, **nothing), codes)

    return other


@fault("pictures in prompts never embedded", PIXELS)
def _(p):
    model = modeling_nextflow.NextFlowModel
    p.patch(model, "embed_images", without_pictures(model.embed_images))


@fault("null prompts first", GUIDANCE)
def _(p):
    guide = drawing.guide
    p.patch(drawing, "guide", lambda logits, s, i=1.0, n=2: guide(torch.cat(logits.chunk(n)[::-1]), s, i, n))


@fault("disturbed codes stored as targets", MIXED, packs=True)
def _(p):
    schedules, variants = p.model.model.schedules, 2

    def change(row):
        for schedule, at, copies, inputs_at in pictures_of(row, variants, schedules, p.model.config.image_token_id):
            if inputs_at.stop > inputs_at.start:
                targets = row["image_codes"][at].reshape(copies, -1).copy()
                targets[:, : schedule.offsets[-1]] = row["image_input_codes"][inputs_at].reshape(copies, -1)
                row["image_codes"][at] = targets.ravel()

    rewrite(p.copy_packs(), change)


@fault("entries alike", "collapsed coarse codebook")
def _(p):
    quantizer = p.copy_model().model.vq_model.quantizer
    for book in (quantizer.semantic_codebook, quantizer.pixel_codebook):
        book.data = book.data.mean(0) + 1e-4 * torch.randn_like(book)


LISTED = len(FAULTS)

# The same faults elsewhere, and others


@fault("decoded ids one too low", OFFSET)
def _(p):
    cls, size = modeling_nextflow.NextFlowForConditionalGeneration, p.model.config.vq_config.codebook_size
    decode, base = cls.decode_image_tokens, p.model.config.text_vocab_size
    p.patch(
        cls, "decode_image_tokens", lambda self, ids, grid=None: decode(self, (ids - base - 1) % size + base, grid)
    )


@fault("shards of another code offset", OFFSET, packs=True)
def _(p):
    path = p.copy_packs() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["code_offset"] += 1
    path.write_text(json.dumps(manifest))


@fault("code head one row off", OFFSET, packs=True)
def _(p):
    weight = p.copy_model().code_head.weight
    weight.data = weight.data.roll(1, 0)


@fault("stored codes one too high", OFFSET, packs=True)
def _(p):
    size = p.model.config.vq_config.codebook_size

    def change(row):
        for name in ("image_codes", "image_input_codes"):
            row[name] = (row[name].astype(np.int64) + 1) % size

    rewrite(p.copy_packs(), change)


@fault("rows and columns exchanged while sampling", SWAPPED)
def _(p):
    cells = layout.scale_coordinates
    p.patch(contexts, "scale_coordinates", lambda grid, edge: cells(grid, edge).flip(0))


@fault("codes laid out column by column", SWAPPED)
def _(p):
    p.patch(quantizer, "to_map", lambda rows, grid: rows.transpose(1, 2).unflatten(2, grid[::-1]).transpose(-1, -2))


@fault("pictures transposed by the processor", SWAPPED)
def _(p):
    cut = image_processing_nextflow.patchify
    p.patch(image_processing_nextflow, "patchify", lambda pixels, size: cut(pixels.transpose(-1, -2), size))


def taps_by(resize: Callable) -> Callable:
    taps = features.scale_taps.__wrapped__

    def other(*args):
        with patch.object(features, "resize_features", resize):
            return taps(*args)

    return other


@fault("bilinear inputs of the next scale", INTERPOLATION)
def _(p):
    p.patch(layout, "scale_taps", taps_by(bilinear))


@fault("nearest neighbours while sampling", INTERPOLATION)
def _(p):
    nearest = lambda maps, grid: F.interpolate(maps, size=tuple(grid), mode="nearest")  # noqa: E731
    p.patch(modeling_nextflow, "scale_taps", taps_by(nearest))


@fault("text not shifted", SHIFTED)
def _(p):
    p.patch(layout, "shift_labels_of", lambda labels, *args: labels)


@fault("stored codes one position late", SHIFTED, packs=True)
def _(p):
    def change(row):
        for _, at, copies, _ in pictures_of(row, 2, p.model.model.schedules, p.model.config.image_token_id):
            row["image_codes"][at] = np.roll(row["image_codes"][at].reshape(copies, -1), 1, axis=1).ravel()

    rewrite(p.copy_packs(), change)


@fault("another pixel decoder than the shards'", DRIFTED, packs=True)
def _(p):
    for weight in p.copy_model().model.vq_model.pixel_decoder.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.roll(1, 1)


@fault("rotary frequencies cast with the model", COORDINATES)
def _(p):
    p.patch(NextFlowRotaryEmbedding, "_apply", nn.Module._apply)


@fault("positions in bfloat16", COORDINATES)
def _(p):
    build = modeling_nextflow.build_layout

    def other(*args, **kwargs):
        made = build(*args, **kwargs)
        return replace(made, position_ids=made.position_ids.bfloat16())

    p.patch(modeling_nextflow, "build_layout", other)


@fault("no rotary channels for columns", AXIS)
def _(p):
    rotary = p.copy_model().model.language_model.rotary_emb
    half = sum(rotary.mrope_section)
    rotary.mrope_section = [half // 2, half - half // 2, 0]


@fault("no scale embedding while sampling", SCALES)
def _(p):
    embedding = Contexts._scale_embedding
    p.patch(Contexts, "_scale_embedding", lambda self, *args: 0 * embedding(self, *args))


@fault("scale embedding never trained", SCALES)
def _(p):
    for weight in p.copy_model().model.scale_embedding.parameters():
        weight.data.zero_()


@fault("pictures in prompts lost while sampling", PIXELS)
def _(p):
    read, model = generation_nextflow.read_prompts, modeling_nextflow.NextFlowModel

    def other(*args):
        with patch.object(model, "embed_images", without_pictures(model.embed_images)):
            return read(*args)

    p.patch(generation_nextflow, "read_prompts", other)


@fault("last rows of a picture blank", PIXELS)
def _(p):
    cut = image_processing_nextflow.patchify

    def other(pixels, size):
        patches = cut(pixels, size).clone()
        patches[:, -patches.shape[1] // 4 :] = 0
        return patches

    p.patch(image_processing_nextflow, "patchify", other)


@fault("one guidance too much", "wrong guidance")
def _(p):
    guide = drawing.guide
    p.patch(drawing, "guide", lambda logits, s, i=1.0, n=2: guide(logits, s + 1 if n > 1 else s, i, n))


@fault("encoding gives disturbed targets", MIXED)
def _(p):
    forward = quantizer.DualCodebookQuantizer.forward

    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return replace(output, target_codes=output.input_codes)

    p.patch(quantizer.DualCodebookQuantizer, "forward", other)


@fault("targets stored as inputs", "self-correction missing", packs=True)
def _(p):
    def change(row):
        for schedule, at, copies, inputs in pictures_of(
            row, 2, p.model.model.schedules, p.model.config.image_token_id
        ):
            if inputs.stop > inputs.start:
                targets = row["image_codes"][at].reshape(copies, -1)
                row["image_input_codes"][inputs] = targets[:, : schedule.offsets[-1]].ravel()

    rewrite(p.copy_packs(), change)


@fault("config.json with another feature mode", "wrong feature mode", packs=True)
def _(p):
    config = p.copy_model().config
    config.feature_mode = "residual" if config.feature_mode == "accumulated" else "accumulated"


@fault("config.json with another position scale", "wrong position scale", packs=True)
def _(p):
    config = p.copy_model().config
    config.position_scale = 6 * p.model.model.schedules.finest_edge


@fault("positions see what they predict", "scales see later ones")
def _(p):
    mask = modeling_nextflow.sequence_mask

    def other(config, embeds, mask2d, layout, documents, cache):
        merged = replace(layout, block_ids=torch.where(layout.block_ids >= 0, documents + 7, layout.block_ids))
        return mask(config, embeds, mask2d, merged, documents, cache)

    def guarded(config, embeds, mask2d, layout, documents, cache):
        documents = torch.zeros_like(layout.block_ids) if documents is None else documents
        return other(config, embeds, mask2d, layout, documents, cache)

    p.patch(modeling_nextflow, "sequence_mask", guarded)


@fault("blocks read from left to right", "causal blocks")
def _(p):
    mask = modeling_nextflow.sequence_mask

    def other(config, embeds, mask2d, layout, documents, cache):
        documents = torch.zeros_like(layout.block_ids) if documents is None else documents
        flat = replace(layout, block_ids=torch.full_like(layout.block_ids, -1))
        return mask(config, embeds, mask2d, flat, documents, cache)

    p.patch(modeling_nextflow, "sequence_mask", other)


@fault("a byte of a shard flipped", "damaged shards", packs=True)
def _(p):
    path = next((p.copy_packs() / "data").glob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@fault("text head of another model", "text drifted")
def _(p):
    p.text_source = p.model
    weight = p.copy_model().lm_head.weight
    weight.data += 0.05 * torch.randn_like(weight) * weight.std()


@fault("all codes weigh the same", "wrong scale weights")
def _(p):
    targets = layout._targets
    p.patch(layout, "_targets", lambda labels, images, starts, alpha: targets(labels, images, starts, 0.0))


@fault("the counter one too far while sampling", "wrong position counter")
def _(p):
    read = Contexts.read_scale

    def other(self, *args):
        self.counters = self.counters + 1
        return read(self, *args)

    p.patch(Contexts, "read_scale", other)


@fault("BGR for RGB", "swapped colour channels")
def _(p):
    cut = image_processing_nextflow.patchify
    p.patch(image_processing_nextflow, "patchify", lambda pixels, size: cut(pixels.flip(1), size))


@fault("pixels in [0, 1]", "wrong pixel range")
def _(p):
    p.processor = copy.deepcopy(p.processor)
    p.processor.image_processor.image_mean = [0.0] * 3
    p.processor.image_processor.image_std = [1.0] * 3


@fault("draws at half the temperature", "wrong draws")
def _(p):
    sample = drawing.sample
    p.patch(drawing, "sample", lambda logits, t, k, top_p, uniform: sample(2 * logits, t, k, top_p, uniform))


@fault("semantic entries zero", "semantic branch lost")
def _(p):
    p.copy_model().model.vq_model.quantizer.semantic_codebook.data.zero_()


@fault("pixel decoder not loaded", "damaged vision tokenizer")
def _(p):
    for weight in p.copy_model().model.vq_model.pixel_decoder.parameters():
        weight.data.zero_()


@fault("connector not loaded", "earlier scales ignored")
def _(p):
    for weight in p.copy_model().model.connector.parameters():
        weight.data.zero_()


# Faults that the checks were not written for


@fault("disturbed inputs from any entry", "self-correction too strong", packs=True)
def _(p):
    vq, draw = p.model.model.vq_model, np.random.default_rng(0)

    def change(row):
        for schedule, at, copies, inputs_at in pictures_of(row, 2, vq.schedules, p.model.config.image_token_id):
            if inputs_at.stop == inputs_at.start:
                continue
            targets = row["image_codes"][at].reshape(copies, -1)
            inputs = row["image_input_codes"][inputs_at].reshape(copies, -1)
            for scale in range(len(schedule) - 1):
                cells = schedule.slice(scale)
                other = draw.integers(vq.config.codebook_size, size=inputs[:, cells].shape)
                inputs[:, cells] = np.where(inputs[:, cells] != targets[:, cells], other, inputs[:, cells])

    rewrite(p.copy_packs(), change)


@fault("scale weights not normalised", "wrong scale weights")
def _(p):
    p.patch(ScaleSchedule, "weights", lambda self, alpha: [length**-alpha for length in self.lengths])


@fault("<eoi> supervised", "boundary tokens supervised")
def _(p):
    shift = layout.shift_labels_of

    def other(labels, images, *args):
        shifted = shift(labels, images, *args)
        for image in images:
            shifted[image.row, image.outputs.stop] = p.model.config.eoi_token_id
        return shifted

    p.patch(layout, "shift_labels_of", other)


@fault("null prompt with the user's text", "wrong null prompt")
def _(p):
    p.patch(processing_nextflow, "_without_user_texts", lambda chat, prompt: list(chat))


@fault("null prompt without the template", "wrong null prompt")
def _(p):
    kind = type(p.processor)
    render = kind._render_null_prompts
    p.patch(
        kind,
        "_render_null_prompts",
        lambda self, *args, **kwargs: [
            self.image_placeholder * text.count(self.image_placeholder) + self.boi_token
            for text in render(self, *args, **kwargs)
        ],
    )


@fault("processor without condition pictures' last scale", "last scale of condition pictures dropped")
def _(p):
    p.processor = copy.deepcopy(p.processor)
    p.processor.condition_last_scale = not p.model.config.condition_last_scale


@fault("patches put together to a mirrored picture", "patches misplaced")
def _(p):
    unpatchify = modeling_nextflow.unpatchify
    p.patch(modeling_nextflow, "unpatchify", lambda *args: unpatchify(*args).flip(-1))


@fault("codebook in float16", "rounded codebook")
def _(p):
    book = quantizer.DualCodebookQuantizer.codebook
    p.patch(quantizer.DualCodebookQuantizer, "codebook", lambda self: book(self).half().float())


@fault("distances in float16", "wrong lookup")
def _(p):
    distances = quantizer.DualCodebookQuantizer.distances
    p.patch(
        quantizer.DualCodebookQuantizer,
        "distances",
        lambda self, features, book: distances(self, features.half().float(), book.half().float()).half().float(),
    )


@fault("code embeddings overwritten by noise", "code embeddings lost")
def _(p):
    rows = p.copy_model().model.code_embeddings.weight.data
    rows.copy_(torch.randn_like(rows) * rows.std())


@fault("code embeddings in another order", "code embeddings lost")
def _(p):
    weight = p.copy_model().model.code_embeddings.weight
    weight.data = weight.data[torch.randperm(len(weight))]


@fault("rotary channels in contiguous sections", "wrong decoder layers")
def _(p):
    rotary = p.copy_model().model.language_model.rotary_emb
    half = sum(rotary.mrope_section)
    rotary.mrope_section = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]


@fault("config.json with contiguous rotary sections", "wrong rotary sections", packs=True)
def _(p):
    rotary = p.copy_model().model.language_model.rotary_emb
    half = sum(rotary.mrope_section)
    rotary.mrope_section = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]
    p.model.config.text_config.rope_parameters["mrope_section"] = rotary.mrope_section


@fault("final norm dropped", "wrong decoder layers")
def _(p):
    p.copy_model().model.language_model.norm = nn.Identity()


@fault("bias of the connector zeroed", "untrained weights")
def _(p):
    p.copy_model().model.connector[0].bias.data.zero_()


@fault("one layer as before training", "untrained weights")
def _(p):
    for name, weight in p.copy_model().model.language_model.layers[-1].named_parameters():
        weight.data = torch.randn_like(weight) * 0.02 if weight.ndim > 1 else torch.full_like(weight, "norm" in name)


@fault("one row of the code head not a number", "damaged weights")
def _(p):
    p.copy_model().code_head.weight.data[7] = torch.nan


@fault("code head overwritten by noise", "worse than the unigram", packs=True)
def _(p):
    rows = p.copy_model().code_head.weight.data
    rows.copy_(torch.randn_like(rows) * rows.std())


@fault("text tokenizer with shuffled ids", "prompt ignored", packs=True)
def _(p):
    rows = p.copy_model().model.language_model.embed_tokens.weight  # the same, seen from the model
    first = 1 + max(p.model.config.boi_token_id, p.model.config.eoi_token_id, p.model.config.image_token_id)
    rows.data[first:] = rows.data[first:][torch.randperm(len(rows) - first)]


@fault("captions of other pictures", "prompt ignored", packs=True)
def _(p):
    schedules = p.model.model.schedules

    def change(row):
        alike: dict[tuple, list[tuple[slice, slice]]] = {}
        for schedule, at, copies, inputs_at in pictures_of(row, 2, schedules, p.model.config.image_token_id):
            alike.setdefault((schedule.final_grid, copies), []).append((at, inputs_at))
        codes, inputs = row["image_codes"].copy(), row["image_input_codes"].copy()
        for places in alike.values():
            for (at, inputs_at), (other, other_inputs) in zip(places, places[1:] + places[:1]):
                row["image_codes"][at], row["image_input_codes"][inputs_at] = codes[other], inputs[other_inputs]

    packs = p.copy_packs()
    rewrite(packs, change)
    manifest = json.loads((packs / "manifest.json").read_text())
    (packs / "manifest.json").write_text(json.dumps(manifest | {"samples": []}))  # as if mixed up before extraction


def patch_controls(p, name: str) -> None:
    """Each scale gets the setting of another."""
    create = drawing.ImageControls.__init__

    def other(self, *args, **kwargs):
        create(self, *args, **kwargs)
        object.__setattr__(self, name, list(getattr(self, name))[::-1])

    p.patch(drawing.ImageControls, "__init__", other)


@fault("guidance of the scales in the wrong order", "wrong guidance")
def _(p):
    patch_controls(p, "guidance")


@fault("temperatures of the scales in the wrong order", "wrong draws")
def _(p):
    patch_controls(p, "temperature")


@fault("guidance by text and by pictures exchanged", "wrong guidance")
def _(p):
    guide = drawing.guide
    p.patch(drawing, "guide", lambda logits, s, i=1.0, n=2: guide(logits, *((i, s) if n == 3 else (s, i)), n))


@fault("top-k not applied", "wrong draws")
def _(p):
    sample = drawing.sample
    p.patch(drawing, "sample", lambda logits, t, k, top_p, uniform: sample(logits, t, 0, top_p, uniform))


@fault("one random number for all positions", "draws not independent")
def _(p):
    uniform = sampling.RowGenerators.uniform
    p.patch(sampling.RowGenerators, "uniform", lambda self, n, on: uniform(self, n, on)[:, :1].expand(-1, n))


@fault("all pictures of a prompt alike", "draws not independent")
def _(p):
    uniform = sampling.RowGenerators.uniform
    p.patch(
        sampling.RowGenerators,
        "uniform",
        lambda self, n, on: uniform(self, n, on)[:1].expand(len(self.generators), -1),
    )


@fault("temperature 5 by default", "harmful sampling settings")
def _(p):
    config = p.copy_model().config
    config.image_generation = config.image_generation | {"temperature": 5.0}
