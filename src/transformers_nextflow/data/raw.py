"""Documents that are coded when they are asked for, for training on few of them without shards."""

from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import Dataset

from ..image_processing_nextflow import DAMAGED
from .extraction import ExtractionSettings, Extractor
from .loading import unfold
from .sources import Source, as_source, task_of


class RawDocuments(Dataset):
    """Map-style: an item is one document of a source, as [`PackedDataset`] gives packs.

    Takes the place of extraction and packing where documents are few or change; the vision tokenizer then runs in
    training. Self-correction is drawn anew in every epoch.

    Args:
        source: whose rows hold one document each; its name, or the rows themselves.
        model: folder or Hub id of the model whose processor and vision tokenizer code them.
        settings: as of [`extract`]; `variants` does not apply. By default rows with `messages` are chats, others
            pictures and captions, see [`~sources.find_columns`].
        device: of the vision tokenizer.

    Raises:
        ValueError: at an item whose row extraction would skip, naming its key and the reason.
    """

    padded = False

    def __init__(
        self,
        source: "Source | str | Path | datasets.Dataset",
        model: str | Path,
        settings: ExtractionSettings | None = None,
        device: str = "cpu",
    ):
        source = as_source(source)
        if settings is None:
            task, columns = task_of(source.load())
            settings = ExtractionSettings(task, columns)
        self.extractor = Extractor(source, str(model), settings, device)
        self.spec, self.config = self.extractor.spec, self.extractor.config
        self.epoch = 0

    @property
    def levels(self) -> set[str]:
        """See [`~loading.PackReader.levels`]."""
        return {self.extractor.level}

    def set_epoch(self, epoch: int) -> None:
        """Which draws of self-correction are shown."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.extractor.table)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """See [`PackReader`]."""
        documents, _, skipped = self.extractor.read(range(index, index + 1))
        if skipped:
            raise ValueError(f"{skipped[0]['key']}: {skipped[0]['detail'] or skipped[0]['reason']}")
        if len(documents) != 1:
            raise ValueError(f"row {index} holds {len(documents)} documents, raw training takes one; extract it")
        (document, schedules), coded = documents[0], []
        corrected = self.extractor.settings.num_variants > 0
        for place, (image, schedule, supervised) in enumerate(
            zip(document.images, schedules, document.supervised_images)
        ):
            try:
                pixels = self.extractor.pixels(image, schedule)
            except DAMAGED as error:
                raise ValueError(f"{document.key}: unreadable image: {error}") from error
            variants = [self.epoch] if supervised and corrected else []
            codes, inputs = self.extractor.code([pixels], schedule, [[f"{document.key}/{place}"]], variants)
            coded.append({"codes": codes[0], "inputs": inputs[0]})
        row = self.extractor.row(document, schedules, coded)
        return unfold(row, np.array([len(row["input_ids"])]), self.spec, int(corrected), [0] * len(coded))
