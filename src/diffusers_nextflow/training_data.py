"""Batches for training a decoder: pictures to draw, their captions, and what they are coded from or their codes.

A batch follows from the epoch and its place in it, so that a training continues where it stopped and processes share
the places.

Shape suffixes: B pictures of one grid, L codes, H W pixels of the coded picture.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from transformers_nextflow import NextFlowImageProcessor, NextFlowVQModel
from transformers_nextflow.data import Document, DocumentReader, ExtractionSettings, Source, open_shards
from transformers_nextflow.data.documents import MAX_IMAGES, open_image
from transformers_nextflow.data.shards import (
    Shard,
    decodable_codes,
    images_of,
    sequence_spec,
    vision_identity,
)
from transformers_nextflow.image_processing_nextflow import upright_size
from transformers_nextflow.modeling_nextflow_vq import unpatchify
from transformers_nextflow.scales import Grid

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
        codes: (L,) int64; None where it is coded in training.
        images: pictures of that document, where that is known.
    """

    row: int
    key: str
    place: int
    grid: Grid
    codes: np.ndarray | None = None
    images: int | None = None


class PictureBatches(Dataset):
    """Pictures of a source in batches of one grid; every epoch shows every picture once, in batches of its own.

    The last batch of a grid may be smaller than the others.

    Args:
        table: rows of the source, see [`Source`].
        read: documents of a row, as training sees them.
        pictures: of those documents, see [`source_pictures`] and [`shard_pictures`].
        image_processor: of the vision tokenizer.
        batch_size: B.
        upscale: edge of the pictures to draw as a multiple of the coded ones.
        empty_share: share of captions replaced by `""`.
        seed: of the order and of that share.

    Raises:
        ValueError: for no pictures, or numbers out of range.
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
        if not pictures:
            raise ValueError("there are no pictures to train on")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not 0 <= empty_share <= 1:
            raise ValueError(f"empty_share must lie in [0, 1], got {empty_share}")
        self.table, self.read, self.pictures, self.image_processor = table, read, pictures, image_processor
        self.batch_size, self.upscale, self.empty_share, self.seed = batch_size, upscale, empty_share, seed
        self._groups: dict[Grid, list[int]] = {}
        for index, picture in enumerate(pictures):
            self._groups.setdefault(picture.grid, []).append(index)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Which pictures share a batch, and which captions are left out."""
        self.epoch, rng = epoch, np.random.default_rng([self.seed, epoch])
        self._batches = [
            order[start : start + self.batch_size]
            for _, members in sorted(self._groups.items())
            for order in [rng.permutation(members)]
            for start in range(0, len(members), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: int) -> dict:
        """`pixel_values` (B, 3, upscale * H, upscale * W) in [-1, 1], `captions`, and either `codes` (B, L) with their
        `grid` or `coded_pixels` (B, 3, H, W)."""
        rng = random.Random(f"{self.seed} captions {self.epoch} {place}")
        pictures, targets, coded, captions = [self.pictures[index] for index in self._batches[place]], [], [], []
        for picture in pictures:
            document = next(d for d in self.read(self.table[picture.row], picture.row) if d.key == picture.key)
            if picture.images not in (None, len(document.images)):
                raise ValueError(
                    f"the shards hold codes of {picture.images} pictures of {picture.key}, but the source's row has "
                    f"{len(document.images)}: it is not what the shards were made of"
                )
            pixels, target = self.pixels(document.images[picture.place], picture.grid)
            targets.append(target)
            coded.append(pixels)
            captions.append("" if rng.random() < self.empty_share else document.text)
        batch = {"pixel_values": torch.stack(targets), "captions": captions}
        if pictures[0].codes is None:
            return batch | {"coded_pixels": torch.stack(coded)}
        codes = np.stack([picture.codes for picture in pictures])
        return batch | {"codes": torch.from_numpy(codes), "grid": pictures[0].grid}

    def pixels(self, image: bytes | str, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, H, W) as it is coded, and (3, upscale * H, upscale * W) to draw, both in [-1, 1]."""
        table = self.image_processor.schedule_table()
        with open_image(image) as opened:
            picture = self.image_processor.process_image(opened, do_convert_rgb=True)
        if not isinstance(picture, Image.Image):  # of more than 8 bits
            picture = Image.fromarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8))
        data = self.image_processor(picture, level=table.level_of(grid), return_tensors="pt")
        if tuple(data["image_grid_hw"][0].tolist()) != grid:
            raise ValueError(f"a picture of the grid {grid} was coded, the source's has another size: {image!r:.80}")
        pixels = unpatchify(data["pixel_values"][None], grid, self.image_processor.patch_size)[0]
        if self.upscale == 1:
            return pixels, pixels
        width, height = (length * self.upscale for length in reversed(table.image_size(table.by_grid(grid))))
        large = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
        return pixels, torch.from_numpy(large.copy()).movedim(-1, 0) / 127.5 - 1


def source_pictures(
    table, reader: DocumentReader, image_processor: NextFlowImageProcessor, level: str | None = None, upscale: int = 1
) -> list[Picture]:
    """The supervised pictures of a source's documents, to be coded in training, by their headers alone.

    Those too small for the output are left out, and counted in a warning.

    Args:
        table, reader: of the source.
        level: of the scale schedules they are brought to (default: the highest).
    """
    schedules, pictures, small = image_processor.schedule_table(), [], 0
    level = level or list(schedules.levels)[-1]
    for row in range(len(table)):
        for document in reader.read(table[row], row):
            for place, image in enumerate(document.images):
                if not document.supervised_images[place]:
                    continue
                with open_image(image) as opened:
                    height, width = upright_size(opened)
                schedule = schedules.nearest_to_image(height, width, level)
                wanted = schedules.image_size(schedule)
                if upscale > 1 and (height < upscale * wanted[0] or width < upscale * wanted[1]):
                    small += 1
                    continue
                pictures.append(Picture(row, document.key, place, schedule.final_grid))
    if small:
        logger.warning(f"{small} pictures are smaller than {upscale} times the size they are coded at: left out")
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
            source lacks a document.
    """
    folder, manifest = open_shards(name)
    if manifest["identity"]["vision_tokenizer"] != vision_identity(vq_model):
        raise ValueError(f"the shards in {name} were made with another vision tokenizer")
    listed = manifest["documents"]["settings"] if manifest["content"] == "packs" else [manifest["settings"]]
    if any(values != listed[0] for values in listed):
        raise ValueError(f"the shards in {name} are of several sources that are read differently; give one of them")
    settings = ExtractionSettings(**listed[0] | {"self_correction": None})
    level = settings.level or list(vq_model.schedules.levels)[-1]
    max_images = settings.max_images or MAX_IMAGES.get(str(level))
    reader = DocumentReader(settings.task, settings.columns, max_images, source.root)
    reader.check_columns(table.column_names)

    def read(row: Mapping, index: int) -> list[Document]:
        return [settings.transformations(document)[0] for document in reader.read(row, index)]

    named = [name for name in (settings.columns.get("key", "key"), "__key__") if name in table.column_names]
    keys = table.select_columns(named) if named else [{}] * len(table)
    rows = {reader.key_of(keys[row], row): row for row in range(len(table))}
    spec, pictures = sequence_spec(manifest["identity"]), []
    for entry in manifest["shards"]:
        shard = Shard(folder / "data" / entry["file"])
        for index in range(len(shard)):
            pictures += _row_pictures(shard.row(index), spec, manifest["variants"], rows)
    return pictures, read


def _row_pictures(row: Mapping, spec, variants: int, rows: Mapping[str, int]) -> list[Picture]:
    packed = "keys" in row
    keys = row["keys"] if packed else [row["key"]]
    lengths = row["document_lengths"] if packed else [len(row["input_ids"])]
    shown = row["input_ids"] == spec.special.image
    supervised = row["supervised"][shown].astype(bool)
    document = np.repeat(np.arange(len(keys)), lengths)[shown]
    pictures = []
    for number, (grid, targets, inputs) in enumerate(images_of(row, spec, variants)):
        key = keys[document[number]]
        if not supervised[number]:
            continue
        source_row = rows.get(key, rows.get(key.rpartition("#")[0]))  # "key#1" continues a long document
        if source_row is None:
            raise ValueError(f"the source has no document {key}, whose codes the shards hold")
        own = np.flatnonzero(document == document[number])
        place = int(np.searchsorted(own, number))
        pictures.append(Picture(source_row, key, place, grid, decodable_codes(targets, inputs), len(own)))
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
