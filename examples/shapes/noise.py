"""Cues that cannot be relied on, so that a model looks again at what it answers about.

Training never shows some kinds in some colours, and a model learns that it never does: after "a small blue" it does
not say "circle", whatever the picture shows. So a share of what may be such a cue is replaced by others like it while
the targets stay: words of answers by words of answers, codes of colours by codes of colours of the same scale. It does
to them what self-correction (NextFlow sec. 3.1) does to codes with their near neighbours.

What is under noise is guessed from what is not. So codes of patterns stay, from which kinds are to be read, and the
sources of edits, whose colours are to be kept.
"""

import numpy as np

from transformers_nextflow.data import PackedDataset
from transformers_nextflow.losses import IGNORE

# Each pack draws the share of its words that are replaced from [0, MOST_WORDS], each picture that of its colours from
# [0, 1].
MOST_WORDS = 0.3
COLOUR_SCALES = (0, 2, 4)  # of the tokenizer's six


class NoisyPacks(PackedDataset):
    """Packs whose answers and colours are disturbed where they are inputs, by seed, epoch and pack."""

    def __init__(self, name, model, processor, seed: int = 0):
        super().__init__(name, model, processor, seed)
        self.marks = list(processor.tokenizer.get_added_vocab().values())

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pack = super().__getitem__(index)
        rng = np.random.default_rng([self.seed, self.epoch, index, 1])
        _replace(pack["input_ids"], self._answers(pack), rng.uniform(0, MOST_WORDS), rng)
        scales, pictures = self._scales(pack["image_grid_hw"])
        shares = (rng.uniform(size=len(pack["image_grid_hw"])) * ~self._sources(pack))[pictures]
        for scale in COLOUR_SCALES:
            at = np.flatnonzero(scales == scale)
            _replace(pack["image_input_codes"], at, shares[at], rng)
        return pack

    def _answers(self, pack: dict[str, np.ndarray]) -> np.ndarray:
        """Places of the words that are targets, too."""
        ids, labels = pack["input_ids"][1:], pack["shift_labels"][:-1]
        return 1 + np.flatnonzero((labels == ids) & (labels != IGNORE) & ~np.isin(ids, self.marks))

    def _sources(self, pack: dict[str, np.ndarray]) -> np.ndarray:
        """Of each picture whether it is read in a document that writes another."""
        starts = np.flatnonzero(pack["input_ids"] == self.spec.special.boi)
        written, documents = pack["shift_labels"][starts] != IGNORE, pack["document_ids"][starts]
        return ~written & np.isin(documents, documents[written])

    def _scales(self, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each input code its scale and its picture; the last scale's codes are no inputs."""
        lengths = [self.spec.schedules.by_grid(grid).lengths[:-1] for grid in grids.tolist()]
        scales = [np.repeat(np.arange(len(each)), each) for each in lengths]
        pictures = np.repeat(np.arange(len(lengths)), [sum(each) for each in lengths])
        return np.concatenate([*scales, np.empty(0, np.int64)]), pictures


def _replace(values: np.ndarray, places: np.ndarray, shares: float | np.ndarray, rng: np.random.Generator) -> None:
    """Replace shares of the values at these places by values at these places."""
    chosen = places[rng.random(len(places)) < shares]
    if len(chosen):
        values[chosen] = rng.choice(values[places], len(chosen))
