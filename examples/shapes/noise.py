"""Cues that cannot be relied on, so that a model looks again at what it answers about.

Training never shows some kinds in some colours, and a model learns that it never does: after "a small blue" it does
not say "circle", whatever the picture shows. So a share of what may be such a cue is replaced by others like it while
the targets stay: words of answers by words of answers, codes of a scale by codes of the same scale. It does to them
what self-correction (NextFlow sec. 3.1) does to codes with their near neighbours.

What is under noise is guessed from what is not, which is the very belief to be lost. So of a picture that is read,
colours are not asked for where they are under noise, and nothing but colours is where patterns are, from which kinds
are read. Of a picture that is written colours alone are under noise, and the sources of edits, which are to be kept,
stay as they are.
"""

import numpy as np

from transformers_nextflow.data import PackedDataset
from transformers_nextflow.losses import IGNORE

from .world import COLOURS

# Each pack draws the share of its words that are replaced from [0, MOST_WORDS], each picture that of its codes from
# [0, 1].
MOST_WORDS = 0.3
COLOUR_SCALES, PATTERN_SCALES = (0, 2, 4), (1, 3, 5)  # of the tokenizer's six
NOTHING, COLOUR, PATTERN = range(3)  # under noise of a picture; each of a third of those that are read


class NoisyPacks(PackedDataset):
    """Packs whose answers and pictures are disturbed where they are inputs, by seed, epoch and pack."""

    def __init__(self, name, model, processor, seed: int = 0):
        super().__init__(name, model, processor, seed)
        tokenizer = processor.tokenizer
        self.marks = list(tokenizer.get_added_vocab().values())
        self.colours = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip() in COLOURS]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pack = super().__getitem__(index)
        rng = np.random.default_rng([self.seed, self.epoch, index, 1])
        _replace(pack["input_ids"], self._answers(pack), rng.uniform(0, MOST_WORDS), rng)
        documents, written, sources = self._pictures(pack)
        noise = np.where(written, COLOUR, rng.integers(3, size=len(documents)))
        noise[sources] = NOTHING
        shares = rng.uniform(size=len(documents))
        for name, scales, pictures in self._inputs(pack, written):
            for kind, own in ((COLOUR, COLOUR_SCALES), (PATTERN, PATTERN_SCALES)):
                for scale in own:
                    at = np.flatnonzero(scales == scale)
                    _replace(pack[name], at, (shares * (noise == kind))[pictures[at]], rng)
        labels, is_colour = pack["shift_labels"], np.isin(pack["shift_labels"], self.colours)
        for kind, is_hidden in ((COLOUR, is_colour), (PATTERN, ~is_colour)):
            labels[np.isin(pack["document_ids"], documents[~written & (noise == kind)]) & is_hidden] = IGNORE
        return pack

    def _answers(self, pack: dict[str, np.ndarray]) -> np.ndarray:
        """Places of the words that are targets, too."""
        ids, labels = pack["input_ids"][1:], pack["shift_labels"][:-1]
        return 1 + np.flatnonzero((labels == ids) & (labels != IGNORE) & ~np.isin(ids, self.marks))

    def _pictures(self, pack: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each picture its document, whether it is written, and whether it is read in a document that writes
        another."""
        starts = np.flatnonzero(pack["input_ids"] == self.spec.special.boi)
        documents, written = pack["document_ids"][starts], pack["shift_labels"][starts] != IGNORE
        return documents, written, ~written & np.isin(documents, documents[written])

    def _inputs(self, pack: dict[str, np.ndarray], written: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Which codes are inputs, of each array its own: their scales, -1 where they are none, and their pictures. All
        scales but the last are in `image_input_codes`, the last of pictures that are only read is in `image_codes`."""
        lengths = [self.spec.schedules.by_grid(grid).lengths for grid in pack["image_grid_hw"].tolist()]
        none = np.empty(0, np.int64)
        scales = np.concatenate([none, *(np.repeat(np.arange(len(each)), each) for each in lengths)])
        lasts = np.concatenate([none, *(np.repeat(len(each) - 1, sum(each)) for each in lengths)])
        pictures = np.repeat(np.arange(len(lengths)), [sum(each) for each in lengths])
        is_last = scales == lasts
        finest = np.where(is_last & ~written[pictures], scales, -1)
        return [("image_input_codes", scales[~is_last], pictures[~is_last]), ("image_codes", finest, pictures)]


def _replace(values: np.ndarray, places: np.ndarray, shares: float | np.ndarray, rng: np.random.Generator) -> None:
    """Replace shares of the values at these places by values at these places."""
    chosen = places[rng.random(len(places)) < shares]
    if len(chosen):
        values[chosen] = rng.choice(values[places], len(chosen))
