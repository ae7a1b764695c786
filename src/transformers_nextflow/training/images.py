"""Pictures as batches of one size each, for training the vision tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.documents import PictureSource, open_image
from ..image_processing_nextflow import DAMAGED, NextFlowImageProcessor, upright_size
from ..modeling_nextflow_vq import unpatchify

logger = logging.get_logger(__name__)


class ImageBatches(Dataset):
    """Map-style dataset whose items are batches: pictures of one scale schedule, in an order by seed and epoch.

    Sizes are read from the pictures' headers. A damaged picture is named in a warning and left out: at once where its
    header is damaged, and else of each batch that it is a part of; a batch without any other is the next one instead.

    Args:
        images: paths, encoded or PIL pictures, for instance the column of an image dataset, or
            [`~transformers_nextflow.data.Pictures`].
        image_processor: brings each to the size of the schedule nearest in aspect ratio, resized and cut, not bent.
        batch_size: pictures in an item; the last item of each size may hold fewer, no picture is left out.
        level: of the schedules (default: the highest).

    Attributes:
        damaged: what is known to be wrong, by the picture's number in `images`; each worker has its own.

    Raises:
        ValueError: for no pictures that can be read, or a `batch_size` below 1.
    """

    def __init__(
        self,
        images: Sequence[PictureSource],
        image_processor: NextFlowImageProcessor,
        batch_size: int,
        level: str | None = None,
        seed: int = 0,
    ):
        if not len(images):
            raise ValueError("there are no images to train on")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.images, self.image_processor, self.batch_size, self.seed = images, image_processor, batch_size, seed
        table = image_processor.schedule_table()
        self.level = table.level_of(table.of_level(level)[0].final_grid)
        self._groups: dict[tuple[int, int], list[int]] = {}
        self.damaged: dict[int, str] = {}
        for index in range(len(images)):
            try:
                grid = table.nearest_to_image(*self._size(index), self.level).final_grid
            except DAMAGED as error:
                self._leave_out(index, error)
            else:
                self._groups.setdefault(grid, []).append(index)
        if not self._groups:
            raise ValueError(f"none of {len(images)} images can be read, the first: {self.damaged[0]}")
        self.set_epoch(0)

    def _leave_out(self, index: int, error: Exception) -> None:
        if index not in self.damaged:
            self.damaged[index] = str(error)
            logger.warning(f"left out {self._name(index)}, damaged image number {len(self.damaged)}: {error}")

    def _name(self, index: int) -> str:
        try:
            image = self.images[index]
        except ValueError:
            image = None
        return str(image) if isinstance(image, (str, Path)) else f"image {index}"

    def _size(self, index: int) -> tuple[int, int]:
        image = self.images[index]
        if isinstance(image, Image.Image):
            return upright_size(image)
        with open_image(image) as picture:
            return upright_size(picture)

    def set_epoch(self, epoch: int) -> None:
        """Which pictures share a batch."""
        rng = np.random.default_rng([self.seed, epoch])
        self._batches = [
            order[start : start + self.batch_size]
            for _, members in sorted(self._groups.items())
            for order in [rng.permutation(members)]
            for start in range(0, len(members), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, H, W) float32 in [-1, 1]."""
        for place in range(index, index + len(self)):
            pictures = []
            for number in self._batches[place % len(self)]:
                try:
                    pictures.append(self._pixels(int(number)))
                except DAMAGED as error:
                    self._leave_out(int(number), error)
            if pictures:
                return {"pixel_values": torch.stack(pictures)}
        raise ValueError(f"none of {len(self.images)} images can be read")

    def _pixels(self, number: int) -> torch.Tensor:
        """(3, H, W)"""
        image = self.images[number]
        picture = image if isinstance(image, Image.Image) else open_image(image)
        data = self.image_processor(picture, level=self.level, return_tensors="pt")
        pixels = data["pixel_values"]
        if self.image_processor.image_size is not None:
            return pixels[0]
        return unpatchify(pixels[None], data["image_grid_hw"][0].tolist(), self.image_processor.patch_size)[0]
