"""Pictures as batches of one size each, for training the vision tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..image_processing_nextflow import NextFlowImageProcessor, upright_size
from ..modeling_nextflow_vq import unpatchify


class ImageBatches(Dataset):
    """Map-style dataset whose items are batches: pictures of one scale schedule, in an order by seed and epoch.

    Args:
        images: paths or PIL images, for instance the column of an image dataset.
        image_processor: brings each to the size of the schedule nearest in aspect ratio, resized and cut, not bent.
        batch_size: pictures in an item; the last item of each size may hold fewer, no picture is left out.
        level: of the schedules (default: the highest).

    Raises:
        ValueError: for no pictures, or a `batch_size` below 1.
    """

    def __init__(
        self,
        images: Sequence[str | Path | Image.Image],
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
        for index in range(len(images)):
            grid = table.nearest_to_image(*self._size(index), self.level).final_grid
            self._groups.setdefault(grid, []).append(index)
        self.set_epoch(0)

    def _size(self, index: int) -> tuple[int, int]:
        image = self.images[index]
        if isinstance(image, Image.Image):
            return upright_size(image)
        with Image.open(image) as picture:
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
        pictures = [self.images[int(number)] for number in self._batches[index]]
        data = self.image_processor(pictures, level=self.level, return_tensors="pt")
        pixels, grid = data["pixel_values"], data["image_grid_hw"][0].tolist()
        if self.image_processor.image_size is None:
            patches = pixels.view(len(pictures), -1, pixels.shape[-1])
            pixels = unpatchify(patches, grid, self.image_processor.patch_size)
        return {"pixel_values": pixels}
