"""Pictures as batches of one size each, for trainings that read them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.documents import PictureSource, Skipped, open_image, read_size, skipping_damaged
from ..image_processing_nextflow import NextFlowImageProcessor, upright_size
from ..scales import Grid

logger = logging.get_logger(__name__)


class SizedBatches(Dataset, ABC):
    """Map-style dataset whose items are batches: pictures of one final grid, in an order by seed and epoch.

    A damaged picture is named in a warning and left out: at once where `grid_of` finds it, and else of each batch that
    it is a part of; a batch without any other is the next one instead.

    Args:
        count: pictures, known by their numbers.
        batch_size: pictures in an item; the last item of each grid may hold fewer, no picture is left out.

    Attributes:
        grids: of the pictures whose headers can be read, by their numbers.
        damaged: what is known to be wrong, by the picture's number; each worker has its own.

    Raises:
        ValueError: for no pictures that can be read, or a `batch_size` below 1.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        if not count:
            raise ValueError("there are no pictures to train on")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.grids: dict[int, Grid] = {}
        self.damaged: dict[int, str] = {}
        for number in range(count):
            try:
                self.grids[number] = self.grid_of(number)
            except Skipped as skip:
                self._leave_out(number, skip)
        if not self.grids:
            raise ValueError(f"none of {count} pictures can be read, the first: {self.damaged[0]}")
        self.set_epoch(0)

    @abstractmethod
    def name_of(self, number: int) -> str:
        """Of a picture, for warnings."""

    @abstractmethod
    def grid_of(self, number: int) -> Grid:
        """Of the schedule that a picture is brought to; raises `Skipped` where it cannot be read."""

    @abstractmethod
    def read_picture(self, number: int):
        """A picture as `collate` takes it; raises `Skipped` where it cannot be read."""

    @abstractmethod
    def collate(self, pictures: list) -> dict:
        """A batch."""

    def _leave_out(self, number: int, skip: Skipped) -> None:
        if number not in self.damaged:
            self.damaged[number] = skip.detail or skip.reason
            what = f"{self.name_of(number)}, damaged image number {len(self.damaged)}"
            logger.warning(f"left out {what}: {self.damaged[number]}")

    def set_epoch(self, epoch: int) -> None:
        """Which pictures share a batch."""
        self.epoch, rng = epoch, np.random.default_rng([self.seed, epoch])
        groups: dict[Grid, list[int]] = {}
        for number, grid in self.grids.items():
            groups.setdefault(grid, []).append(number)
        self._batches = [
            order[start : start + self.batch_size].tolist()
            for _, members in sorted(groups.items())
            for order in [rng.permutation(members)]
            for start in range(0, len(members), self.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict:
        for place in range(index, index + len(self)):
            pictures = []
            for number in self._batches[place % len(self)]:
                try:
                    pictures.append(self.read_picture(number))
                except Skipped as skip:
                    self._leave_out(number, skip)
            if pictures:
                return self.collate(pictures)
        raise ValueError(f"none of {len(self.grids)} pictures can be read")


class ImageBatches(SizedBatches):
    """[`SizedBatches`] for training the vision tokenizer: `pixel_values` (B, 3, H, W) float32 in [-1, 1].

    Sizes are read from the pictures' headers.

    Args:
        images: paths, encoded or PIL pictures, for instance the column of an image dataset, or
            [`~transformers_nextflow.data.Pictures`].
        image_processor: brings each to the size of the schedule nearest in aspect ratio, resized and cut, not bent.
        level: of the schedules (default: the image processor's, or the highest).
    """

    def __init__(
        self,
        images: Sequence[PictureSource],
        image_processor: NextFlowImageProcessor,
        batch_size: int,
        level: str | int | None = None,
        seed: int = 0,
    ):
        self.images, self.image_processor = images, image_processor
        self.table = image_processor.schedule_table()
        self.level = self.table.level_name(image_processor.level if level is None else level)
        super().__init__(len(images), batch_size, seed)

    def name_of(self, number: int) -> str:
        try:
            image = self.images[number]
        except ValueError:
            image = None
        return str(image) if isinstance(image, (str, Path)) else f"image {number}"

    def grid_of(self, number: int) -> Grid:
        with skipping_damaged():
            image = self.images[number]
            size = upright_size(image) if isinstance(image, Image.Image) else read_size(image)
        return self.table.nearest_to_image(*size, self.level).final_grid

    def read_picture(self, number: int) -> torch.Tensor:
        """(3, H, W)"""
        with skipping_damaged():
            image = self.images[number]
            picture = image if isinstance(image, Image.Image) else open_image(image)
            data = self.image_processor(picture, level=self.level, return_tensors="pt")
        grid, pixels = self.image_processor.whole(data)
        if grid != self.grids[number]:
            raise Skipped("unreadable image", f"its header promised the grid {self.grids[number]}, it has {grid}")
        return pixels[0]

    def collate(self, pictures: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack(pictures)}
