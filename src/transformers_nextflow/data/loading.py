"""Packs to batches: a map-style dataset, a permutation by (seed, epoch, rank), and a collator.

```python
packs = PackedDataset("packs", model=model, processor=processor)
sampler = PackSampler(len(packs), seed=0, rank=rank, world_size=world_size)
loader = DataLoader(packs, batch_sampler=sampler, collate_fn=PackCollator(packs), num_workers=4)
for epoch in range(epochs):
    packs.set_epoch(epoch)
    sampler.set_epoch(epoch, start=batches_done if epoch == epoch_done else 0)
    for batch in loader:
        loss = model(**batch, logits_over="none", use_cache=False).loss
```
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..layout import SequenceLayout, build_layout
from ..lora import below_adapters
from ..losses import IGNORE
from .sequences import SequenceSpec
from .shards import Shard, check_identity, identity_of, images_of, open_shards, sequence_spec


class PackReader(Dataset):
    """Packs of a folder as expanded arrays, map-style.

    Args:
        folder, manifest: as [`~shards.open_shards`] gives them.
        spec: of the model's sequences.
        seed: of the choice among self-corrected variants, anew for every epoch.
    """

    def __init__(self, folder: Path, manifest: Mapping, spec: SequenceSpec, seed: int = 0):
        self.folder, self.manifest, self.spec = folder, manifest, spec
        self.seed, self.epoch = seed, 0
        self._starts = [0, *accumulate(entry["rows"] for entry in manifest["shards"])]
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def levels(self) -> set[str]:
        """Of the scale schedules that the documents' pictures were brought to; empty for text alone."""
        settings = self.manifest["documents"]["settings"]
        return {self.spec.schedules.level_name(each["level"]) for each in settings if each["task"] != "text"}

    def __getstate__(self):
        return self.__dict__ | {"_shards": {}}  # every worker maps the files itself

    def set_epoch(self, epoch: int) -> None:
        """Which of the stored variants of each picture are shown."""
        self.epoch = epoch

    def row(self, index: int) -> dict:
        """A pack as it is stored."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        if number not in self._shards:
            self._shards[number] = Shard(self.folder / "data" / self.manifest["shards"][number]["file"])
        return self._shards[number].row(index - self._starts[number])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """(L,) int64 `input_ids`, `document_ids`, `shift_labels`; `image_grid_hw` (images, 2); flat `image_codes` and
        `image_input_codes`, all of one pack."""
        row, variants = self.row(index), self.manifest["variants"]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        picks = rng.integers(max(variants, 1), size=len(row["image_grid_hw"]) // 2)
        return unfold(row, row["document_lengths"], self.spec, variants, picks)


def unfold(
    row: dict, lengths: np.ndarray, spec: SequenceSpec, variants: int, picks: Sequence[int] | np.ndarray
) -> dict[str, np.ndarray]:
    """A stored row as [`PackReader`] gives it.

    Args:
        lengths: (documents,) compact ids of each.
        variants, picks: stored encodings of each supervised picture, and which of them is shown.
    """
    grids = row["image_grid_hw"].reshape(-1, 2)
    pack = spec.expand(row["input_ids"], row["supervised"].astype(bool), grids, lengths)
    pack["image_grid_hw"] = grids.astype(np.int64)
    codes, inputs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for (grid, targets, corrected), pick in zip(images_of(row, spec, variants), picks):
        target = targets[pick if len(targets) > 1 else 0]
        coarse = spec.schedules.by_grid(grid).offsets[-1]
        codes.append(target)
        inputs.append(corrected[pick] if len(corrected) else target[:coarse])
    pack["image_codes"] = np.concatenate(codes).astype(np.int64)
    pack["image_input_codes"] = np.concatenate(inputs).astype(np.int64)
    return pack


class PackedDataset(PackReader):
    """The packs of a folder, or of a dataset repository on the Hub, that were made for a model.

    Args:
        name: of the folder or repository.
        model, processor: whose tokenizers, schedules, code offset and special ids the shards must have been made with;
            the model may have adapters.
        seed: of the choice among self-corrected variants.
        hashes: whether every shard's hash is checked now, by the first process of a machine, or only its size.

    Raises:
        ValueError, FileNotFoundError: naming a shard that is missing or damaged, or what differs from the model.
    """

    def __init__(self, name: str | Path, model, processor, seed: int = 0, hashes: bool = True):
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        folder, manifest = open_shards(name, "packs", hashes and first)
        model = below_adapters(model)
        check_identity(manifest, identity_of(model.config, processor, model.base_model.vq_model))
        super().__init__(folder, manifest, sequence_spec(manifest["identity"]), seed)
        self.padded, self.config = manifest["padded"], model.config


class PackSampler(Sampler[list[int]]):
    """Batches of packs for one rank: a permutation of all packs by seed and epoch, dealt to the ranks in turn.

    What step s of an epoch consumes over all ranks depends on neither the ranks nor the workers; `start` continues an
    epoch after its first batches, exactly.

    Args:
        num_packs: must divide by `batch_size * world_size`; `data pack --multiple-of` makes it so.
        start: batches of this epoch that were consumed already.

    Raises:
        ValueError: where ranks would get uneven shares.
    """

    def __init__(
        self,
        num_packs: int,
        batch_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if num_packs % (batch_size * world_size):
            raise ValueError(
                f"{num_packs} packs do not divide by batch size {batch_size} x {world_size} ranks: pack with "
                f"--multiple-of {batch_size * world_size}"
            )
        self.num_packs, self.batch_size, self.seed = num_packs, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(epoch, start)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration's epoch, and how many of its batches to leave out."""
        steps = self.num_packs // (self.batch_size * self.world_size)
        if not 0 <= start <= steps:
            raise ValueError(f"start must lie in [0, {steps}], got {start}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_packs // (self.batch_size * self.world_size) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_packs)
        steps = order.reshape(-1, self.batch_size, self.world_size)[self.start :, :, self.rank]
        yield from steps.tolist()


class PackCollator:
    """[`collate`] for the packs of a dataset, as `DataLoader` calls it, and their `layout`.

    Args:
        pad_to: positions of all rows, so that what is compiled for one batch fits all; by default the longest's.
    """

    def __init__(self, dataset: PackedDataset, pad_to: int = 0):
        self.padded, self.pad, self.config = dataset.padded, dataset.spec.special.pad, dataset.config
        self.pad_to = pad_to

    def __call__(self, packs: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor | SequenceLayout]:
        batch = collate(packs, self.pad, self.padded, self.pad_to)
        return batch | {"layout": build_layout(self.config, **batch)}


def collate(
    packs: Sequence[dict[str, np.ndarray]], pad: int, padded: bool, pad_to: int = 0
) -> dict[str, torch.Tensor]:
    """Packs to what the model's forward takes.

    A pack is one row of documents (`document_ids` keep them apart) or, if `padded`, a row for each document. Rows are
    padded on the right with the id `pad`, document -1 and no target.

    Raises:
        ValueError: if a row is longer than `pad_to`, where that is given.

    Returns:
        (B, L) int64 `input_ids`, `document_ids`, `shift_labels`; with images `image_grid_hw` (images, 2),
        `image_codes`, `image_input_codes`.
    """
    fills = {"input_ids": pad, "document_ids": -1, "shift_labels": IGNORE}
    batch = {}
    for name, fill in fills.items():
        rows = [row for pack in packs for row in (_split(pack, name) if padded else [pack[name]])]
        longest = max(map(len, rows))
        if 0 < pad_to < longest:
            raise ValueError(f"a row has {longest} positions, more than pad_to={pad_to}")
        whole = np.full((len(rows), pad_to or longest), fill, dtype=np.int64)
        for place, values in enumerate(rows):
            whole[place, : len(values)] = values
        batch[name] = torch.from_numpy(whole)
    if any(len(pack["image_grid_hw"]) for pack in packs):
        for name in ("image_grid_hw", "image_codes", "image_input_codes"):
            batch[name] = torch.from_numpy(np.concatenate([pack[name] for pack in packs]))
    return batch


def _split(pack: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return np.split(pack[name], np.flatnonzero(np.diff(pack["document_ids"])) + 1)
