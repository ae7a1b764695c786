"""Packs whose inputs are under noise."""

import numpy as np
import pytest

from examples.shapes.documents import build_packs
from examples.shapes.evaluate import CHECKPOINT
from examples.shapes.noise import MOST_WORDS, NoisyPacks
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import ExtractionSettings, FixedLength, PackedDataset

MIXTURE = {"caption": 0.4, "edit": 0.2, "edit/remove": 0.2, "t2i": 0.2}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The same packs of the shapes checkpoint, as they are and under noise."""
    model = NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = NextFlowProcessor.from_pretrained(CHECKPOINT)
    folder = tmp_path_factory.mktemp("noise")
    packs = build_packs(folder, CHECKPOINT, 60, MIXTURE, ExtractionSettings("chat", batch_size=64), FixedLength(800))
    return [kind(packs, model, processor, seed=3) for kind in (PackedDataset, NoisyPacks)], processor.tokenizer


def answers(tokenizer, pack) -> list[int]:
    """Places of the words of answers: between the assistant's header and the mark that ends its turn."""
    places, inside = [], False
    marks = set(tokenizer.get_added_vocab().values())
    for place, (word, label) in enumerate(zip(pack["input_ids"][1:], pack["shift_labels"]), 1):
        inside = label == word and word not in marks
        places += [place] if inside else []
    return places


def test_only_words_of_answers_and_colours_are_replaced(datasets):
    (clean, noisy), tokenizer = datasets
    words = codes = 0
    for index in range(len(clean)):
        before, after = clean[index], noisy[index]
        for name in set(before) - {"input_ids", "image_input_codes"}:
            np.testing.assert_array_equal(before[name], after[name])
        places = answers(tokenizer, before)
        changed = np.flatnonzero(before["input_ids"] != after["input_ids"])
        assert set(changed) <= set(places)
        assert set(after["input_ids"][changed]) <= set(before["input_ids"][places])
        words += len(changed)
        codes += (before["image_input_codes"] != after["image_input_codes"]).sum()
    assert words > 20 and codes > 50


def test_colours_are_replaced_by_colours_of_their_scale_and_patterns_stay(datasets):
    (clean, noisy), _ = datasets
    for index in range(len(clean)):
        before, after = clean[index], noisy[index]
        scales = []
        for grid in before["image_grid_hw"].tolist():
            schedule = clean.spec.schedules.by_grid(grid)
            scales += [scale for scale, length in enumerate(schedule.lengths[:-1]) for _ in range(length)]
        scales = np.array(scales)
        for scale in set(scales):
            old, new = (pack["image_input_codes"][scales == scale] for pack in (before, after))
            assert set(new) <= set(old) if scale % 2 == 0 else np.array_equal(new, old)


def changed_shares(clean, noisy, index: int) -> list[float]:
    """Of the codes of each picture of a pack, the share that is replaced."""
    before, after = clean[index], noisy[index]
    lengths = [clean.spec.schedules.by_grid(grid).offsets[-1] for grid in before["image_grid_hw"].tolist()]
    changed = before["image_input_codes"] != after["image_input_codes"]
    return [part.mean() for part in np.split(changed, np.cumsum(lengths)[:-1])]


def test_every_picture_but_sources_of_edits_has_a_share_of_its_own(datasets):
    (clean, noisy), tokenizer = datasets
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    sources, others = [], []
    for index in range(len(clean)):
        pack = clean[index]
        documents = pack["document_ids"][pack["input_ids"] == start].tolist()
        for place, share in enumerate(changed_shares(clean, noisy, index)):
            is_source = documents.count(documents[place]) == 2 and documents.index(documents[place]) == place
            (sources if is_source else others).append(share)
    assert len(sources) > 10 and not any(sources)
    assert min(others) < 0.1 and max(others) > 0.5  # four of five input codes are colours


def test_noise_is_drawn_anew_in_every_epoch(datasets):
    (_, noisy), _ = datasets

    def inputs() -> list[np.ndarray]:
        return [noisy[index]["image_input_codes"] for index in range(len(noisy))]

    first = inputs()
    assert all(map(np.array_equal, first, inputs()))
    noisy.set_epoch(1)
    assert not any(map(np.array_equal, first, inputs()))
    noisy.set_epoch(0)


def test_at_most_a_share_of_the_words_is_replaced(datasets):
    (clean, noisy), tokenizer = datasets
    words = changed = 0
    for epoch in range(4):
        clean.set_epoch(epoch), noisy.set_epoch(epoch)
        for index in range(len(clean)):
            words += len(answers(tokenizer, clean[index]))
            changed += (clean[index]["input_ids"] != noisy[index]["input_ids"]).sum()
    assert MOST_WORDS / 4 < changed / words < 0.7 * MOST_WORDS
