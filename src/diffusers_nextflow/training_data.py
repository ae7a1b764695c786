"""Batches for training a decoder: pictures to draw, their captions, and what they are coded from or their codes.

A batch follows from the epoch and its place in it, so that a training continues where it stopped and processes share
the places.

Shape suffixes: B pictures of one grid, L codes, H W pixels of the coded picture.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image, ImageOps

from transformers_nextflow import NextFlowImageProcessor, NextFlowVQModel
from transformers_nextflow.data import Document, DocumentReader, ExtractionSettings, Source, open_shards
from transformers_nextflow.data.documents import (
    PictureSource,
    Skipped,
    open_image,
    read_size,
    skipping_damaged,
)
from transformers_nextflow.data.shards import (
    Shard,
    check_identity,
    decodable_codes,
    documents_of,
    encoder_settings,
    sequence_spec,
    vision_identity,
)
from transformers_nextflow.scales import Grid
from transformers_nextflow.training.images import SizedBatches

logger = logging.get_logger(__name__)

Read = Callable[[Mapping, int], list[Document]]  # the documents of a row, by its index


@dataclass(frozen=True)
class Picture:
    """One picture of a source.

    Attributes:
        row: of the source.
        key: of the row's document that shows it.
        place: among that document's pictures.
        grid: final grid of its schedule.
        codes: of its first variant (1, L) targets and (1 or 0, l) inputs, which stay in the shard's file until they
            are read; None where it is coded in training.
        images: pictures of that document, where that is known.
    """

    row: int
    key: str
    place: int
    grid: Grid
    codes: tuple[np.ndarray, np.ndarray] | None = None
    images: int | None = None


class PictureBatches(SizedBatches):
    """[`~transformers_nextflow.training.images.SizedBatches`] of a source, for training a decoder.

    Items are `pixel_values` (B, 3, upscale * H, upscale * W) in [-1, 1], `captions`, and either `codes` (B, L) with
    their `grid` or `coded_pixels` (B, 3, H, W).

    Args:
        table: rows of the source, see [`Source`].
        read: documents of a row, as training sees them.
        pictures: of those documents, see [`source_pictures`] and [`shard_pictures`].
        image_processor: of the vision tokenizer.
        batch_size: B.
        upscale: edge of the pictures to draw as a multiple of the coded ones; smaller ones are left out.
        empty_share: share of captions replaced by `""`.
        seed: of the order and of that share.

    Raises:
        ValueError: for no pictures, or numbers out of range; at an item if the source is not what was coded.
    """

    def __init__(
        self,
        table,
        read: Read,
        pictures: Sequence[Picture],
        image_processor: NextFlowImageProcessor,
        batch_size: int,
        upscale: int = 1,
        empty_share: float = 0.0,
        seed: int = 0,
    ):
        if not 0 <= empty_share <= 1:
            raise ValueError(f"empty_share must lie in [0, 1], got {empty_share}")
        self.table, self.read, self.image_processor = table, read, image_processor
        self.upscale, self.empty_share = upscale, empty_share
        self.pictures = pictures if upscale == 1 else self._large_enough(pictures)
        super().__init__(len(self.pictures), batch_size, seed)

    def _large_enough(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Those that need not be enlarged, by their headers; the others are counted in a warning."""
        schedules, large = self.image_processor.schedule_table(), []
        for picture in pictures:
            wanted = schedules.image_size(schedules.by_grid(picture.grid))
            try:
                size = read_size(self._document(picture).images[picture.place])
            except Skipped:
                large.append(picture)  # it is named when it is read
                continue
            if all(length >= self.upscale * edge for length, edge in zip(size, wanted)):
                large.append(picture)
        if small := len(pictures) - len(large):
            logger.warning(
                f"{small} pictures are smaller than {self.upscale} times the size they are coded at: left out"
            )
        return large

    def _document(self, picture: Picture) -> Document:
        documents = {document.key: document for document in self.read(self.table[picture.row], picture.row)}
        document = documents.get(picture.key)
        if document is None:
            raise ValueError(
                f"the shards hold codes of {picture.key}, but the source's row has only {', '.join(documents)}: it is "
                "not what the shards were made of"
            )
        if picture.images not in (None, len(document.images)):
            raise ValueError(
                f"the shards hold codes of {picture.images} pictures of {picture.key}, but the source's row has "
                f"{len(document.images)}: it is not what the shards were made of"
            )
        return document

    def name_of(self, number: int) -> str:
        return self.pictures[number].key

    def grid_of(self, number: int) -> Grid:
        return self.pictures[number].grid

    def read_picture(self, number: int) -> dict:
        """What a batch has, of one picture."""
        picture = self.pictures[number]
        document = self._document(picture)
        coded, target = self.pixels(document.images[picture.place], picture.grid)
        is_empty = random.Random(f"{self.seed} captions {self.epoch} {number}").random() < self.empty_share
        item = {"pixel_values": target, "captions": "" if is_empty else document.text}
        if picture.codes is None:
            return item | {"coded_pixels": coded}
        return item | {"codes": torch.from_numpy(decodable_codes(*picture.codes)), "grid": picture.grid}

    def collate(self, pictures: list[dict]) -> dict:
        batch: dict = {name: [picture[name] for picture in pictures] for name in pictures[0]}
        tensors = [name for name in batch if name not in ("captions", "grid")]
        grid = {"grid": batch["grid"][0]} if "grid" in batch else {}
        return batch | grid | {name: torch.stack(batch[name]) for name in tensors}

    def pixels(self, image: PictureSource, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, H, W) as it is coded, and (3, upscale * H, upscale * W) to draw, both in [-1, 1]."""
        table = self.image_processor.schedule_table()
        with skipping_damaged(), open_image(image) as opened:
            picture = self.image_processor.process_image(opened, do_convert_rgb=True)
        if not isinstance(picture, Image.Image):  # of more than 8 bits
            picture = Image.fromarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8))
        data = self.image_processor(picture, level=table.level_of(grid), return_tensors="pt")
        own, coded = self.image_processor.whole(data)
        if own != grid:
            raise ValueError(f"a picture of the grid {grid} was coded, the source's has another size: {image!r:.80}")
        pixels = coded[0]
        if self.upscale == 1:
            return pixels, pixels
        width, height = (length * self.upscale for length in reversed(table.image_size(table.by_grid(grid))))
        large = np.asarray(ImageOps.fit(picture, (width, height), self.image_processor.resample))
        return pixels, torch.from_numpy(large.copy()).movedim(-1, 0) / 127.5 - 1


def source_pictures(
    table, reader: DocumentReader, image_processor: NextFlowImageProcessor, level: str | int | None = None
) -> list[Picture]:
    """The supervised pictures of a source's documents, to be coded in training, by their headers alone.

    Documents that cannot be read are named in warnings.

    Args:
        table, reader: of the source.
        level: of the scale schedules they are brought to (default: the image processor's, or the highest).
    """
    schedules, pictures = image_processor.schedule_table(), []
    level = image_processor.level if level is None else level
    for row in range(len(table)):
        try:
            pictures += [
                Picture(row, document.key, place, schedules.nearest_to_image(*read_size(image), level).final_grid)
                for document in reader.read(table[row], row)
                for place, image in enumerate(document.images)
                if document.supervised_images[place]
            ]
        except Skipped as skip:
            logger.warning(f"left out {reader.key_of(table[row], row)}: {skip}")
    return pictures


def shard_pictures(name: str | Path, source: Source, table, vq_model: NextFlowVQModel) -> tuple[list[Picture], Read]:
    """The supervised pictures of shards, with the codes in them that sum up to a picture (their first variant).

    Args:
        name: folder or dataset repository of shards, of documents or packs.
        source, table: that they were extracted from, and its rows; pictures and captions come from it.
        vq_model: whose codes they must be.

    Returns:
        the pictures, and what reads documents of a row as extraction did (texts dropped, pairs inverted).

    Raises:
        ValueError: if they were made with another vision tokenizer or of several sources read differently, or the
            source lacks a document or has one key twice.
    """
    folder, manifest = open_shards(name)
    if manifest["identity"]["vision_tokenizer"] != vision_identity(vq_model):
        raise ValueError(f"the shards in {name} were made with another vision tokenizer")
    check_identity(manifest, {"encoder": encoder_settings(vq_model.config)})
    listed = manifest["documents"]["settings"] if manifest["content"] == "packs" else [manifest["settings"]]
    if any(values != listed[0] for values in listed):
        raise ValueError(f"the shards in {name} are of several sources that are read differently; give one of them")
    settings = ExtractionSettings(**listed[0] | {"self_correction": None})
    reader = settings.reader(vq_model.schedules, source.root)
    reader.check_columns(table.column_names)

    named = [name for name in (settings.columns.get("key", "key"), "__key__") if name in table.column_names]
    keys = table.select_columns(named) if named else [{}] * len(table)
    of_rows = [reader.key_of(keys[row], row) for row in range(len(table))]
    (key, count), *_ = Counter(of_rows).most_common(1)
    if count > 1:
        raise ValueError(f"{count} rows of the source have the key {key}: the shards cannot tell which is whose")
    rows = {key: row for row, key in enumerate(of_rows)}
    spec, pictures = sequence_spec(manifest["identity"]), []
    for entry in manifest["shards"]:
        shard = Shard(folder / "data" / entry["file"])
        for index in range(len(shard)):
            pictures += _row_pictures(shard.row(index), spec, manifest["variants"], rows)
    return pictures, partial(_read, settings, reader)


def _read(settings: ExtractionSettings, reader: DocumentReader, row: Mapping, index: int) -> list[Document]:
    return [settings.transformations(document)[0] for document in reader.read(row, index)]


def _row_pictures(row: Mapping, spec, variants: int, rows: Mapping[str, int]) -> list[Picture]:
    pictures = []
    for key, _, ids, flags, images in documents_of(row, spec, variants):
        supervised = flags[ids == spec.special.image].astype(bool)
        if not supervised.any():
            continue
        source_row = rows.get(key, rows.get(key.rpartition("#")[0]))  # "key#1" continues a long document
        if source_row is None:
            raise ValueError(f"the source has no document {key}, whose codes the shards hold")
        pictures += [
            Picture(source_row, key, place, grid, (targets[:1], inputs[:1]), len(images))
            for place, (grid, targets, inputs) in enumerate(images)
            if supervised[place]
        ]
    return pictures


@torch.no_grad()
def condition_of(vq_model: NextFlowVQModel, batch: Mapping) -> torch.Tensor:
    """(B, C, h, w) condition features of a batch; where it holds codes, no encoder runs."""
    if "codes" in batch:
        codes, grid = batch["codes"], batch["grid"]
    else:
        pixels = batch["coded_pixels"]
        grid = tuple(length // vq_model.config.patch_size for length in pixels.shape[-2:])
        codes = vq_model.encode(pixels.to(vq_model.device))
    device = vq_model.quantizer.pixel_codebook.device
    return torch.cat(vq_model.condition_features(codes.to(device), grid), dim=1)
