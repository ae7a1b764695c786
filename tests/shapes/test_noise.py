"""Packs whose inputs are under noise."""

from collections import Counter

import numpy as np
import pytest

from examples.shapes.documents import build_packs
from examples.shapes.evaluate import CHECKPOINT
from examples.shapes.noise import MOST_WORDS, NoisyPacks
from examples.shapes.world import COLOURS
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import ExtractionSettings, FixedLength, PackedDataset
from transformers_nextflow.losses import IGNORE

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


def test_words_of_answers_are_replaced_by_words_of_answers(datasets):
    (clean, noisy), tokenizer = datasets
    words = 0
    for index in range(len(clean)):
        before, after = clean[index], noisy[index]
        for name in ("document_ids", "image_grid_hw"):
            np.testing.assert_array_equal(before[name], after[name])
        places = answers(tokenizer, before)
        changed = np.flatnonzero(before["input_ids"] != after["input_ids"])
        assert set(changed) <= set(places)
        assert set(after["input_ids"][changed]) <= set(before["input_ids"][places])
        words += len(changed)
    assert words > 20


def codes_of(dataset, pack) -> list[dict[int, np.ndarray]]:
    """Of each picture, what stands at each scale: inputs, and of the last scale codes."""
    rows, inputs, codes = [], pack["image_input_codes"], pack["image_codes"]
    for grid in pack["image_grid_hw"].tolist():
        *lengths, last = dataset.spec.schedules.by_grid(grid).lengths
        ends = np.cumsum(lengths)
        rows.append(dict(enumerate([*np.split(inputs[: ends[-1]], ends[:-1]), codes[ends[-1] : ends[-1] + last]])))
        inputs, codes = inputs[ends[-1] :], codes[ends[-1] + last :]
    return rows


def pictures(datasets):
    """(document's place, role, before, after, scales that changed) of every picture, with its packs."""
    (clean, noisy), tokenizer = datasets
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    for epoch in range(3):
        clean.set_epoch(epoch), noisy.set_epoch(epoch)
        for index in range(len(clean)):
            packs = before, after = clean[index], noisy[index]
            starts = np.flatnonzero(before["input_ids"] == start)
            documents, written = before["document_ids"][starts], before["shift_labels"][starts] != IGNORE
            for place, (old, new) in enumerate(zip(*(codes_of(clean, pack) for pack in packs))):
                is_source = not written[place] and (documents == documents[place]).sum() == 2
                role = "written" if written[place] else "source" if is_source else "read"
                changed = {scale for scale in old if not np.array_equal(old[scale], new[scale])}
                yield before["document_ids"] == documents[place], role, packs, (old, new), changed
    clean.set_epoch(0), noisy.set_epoch(0)


def test_colours_or_patterns_of_pictures_are_replaced_by_their_like(datasets):
    (clean, _), _ = datasets
    seen, scales = Counter(), set()
    for _, role, (before, _), (_, new), changed in pictures(datasets):
        kinds = {scale % 2 for scale in changed}
        assert len(kinds) < 2
        seen[(role, *kinds)] += 1
        scales |= changed
        for scale in changed:
            pool = [each[scale] for each in codes_of(clean, before)]
            assert set(new[scale]) <= set(np.concatenate(pool))
    assert scales == set(range(6))
    assert seen.keys() == {("written",), ("written", 0), ("source",), ("read",), ("read", 0), ("read", 1)}
    read = sum(count for (role, *_), count in seen.items() if role == "read")
    assert seen["read", 1] > 0.2 * read and seen["written", 0] > 2 * seen["written",]


def test_codes_that_are_predicted_stay(datasets):
    (clean, noisy), tokenizer = datasets
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    for index in range(len(clean)):
        before, after = clean[index], noisy[index]
        sizes = [clean.spec.schedules.by_grid(grid).num_codes for grid in before["image_grid_hw"].tolist()]
        written = before["shift_labels"][before["input_ids"] == start] != IGNORE
        stays = np.repeat(written, sizes)
        assert np.array_equal(before["image_codes"][stays], after["image_codes"][stays])


def test_a_read_picture_is_asked_only_for_what_is_not_under_noise(datasets):
    _, tokenizer = datasets
    asked = Counter()
    for document, role, (before, after), _, changed in pictures(datasets):
        old, new = before["shift_labels"][document], after["shift_labels"][document]
        hidden = old != new
        if role != "read":
            assert not hidden.any()
            continue
        assert (new[hidden] == IGNORE).all()
        is_colour = np.array([tokenizer.decode([max(label, 0)]).strip() in COLOURS for label in old])
        expected = {0: is_colour, 1: ~is_colour & (old != IGNORE)}
        for kind in {scale % 2 for scale in changed}:
            assert np.array_equal(hidden, expected[kind])
            asked[kind] += (new != IGNORE).sum()
    assert asked[0] > asked[1] > 5


def test_shares_of_pictures_reach_from_few_to_most(datasets):
    shares = []
    for _, role, _, codes, _ in pictures(datasets):
        if role == "written":
            old, new = (np.concatenate([each[scale] for scale in (0, 2, 4)]) for each in codes)
            shares.append((old != new).mean())
    assert len(shares) > 20 and min(shares) < 0.1 and max(shares) > 0.6


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
