"""What is examined: readings, documents and rows of a model without and with shards."""

import math

import numpy as np
import pytest
import torch

from transformers_nextflow.doctor import sampling
from transformers_nextflow.doctor.case import Case, Document, Reading, by_part
from transformers_nextflow.doctor.findings import difference
from transformers_nextflow.doctor.pictures import Picture, default_pictures


@pytest.fixture(scope="module")
def case(random_model, tiny_processor):
    """With a square, a wide and a tall picture."""
    return Case(random_model, tiny_processor, default_pictures(random_model.model.schedules, 0, each=1))


def test_what_targets_cost_at_five_temperatures_and_what_the_model_expects():
    logits = torch.tensor([[0.0, 3.0], [-100.0, 0.0], [torch.nan, 0.0], [2.0, 2.0]])
    reading = Reading.of(logits, torch.tensor([1, 0, 0, 0]), torch.tensor([-1, 0, 1, 1]))
    temperatures = (0.5, math.sqrt(0.5), 1.0, math.sqrt(2), 2.0)
    for costs_N, temperature in zip(reading.costs_TN.tolist(), temperatures, strict=True):
        likely, impossible, none, even = costs_N
        assert likely == pytest.approx(math.log1p(math.exp(-3 / temperature)), rel=1e-4)
        assert impossible == none == 30.0 and even == pytest.approx(math.log(2))
    p = 1 / (1 + math.exp(-3))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert reading.expected_N[[0, 1, 3]].tolist() == pytest.approx([expected, 0.0, math.log(2)], abs=1e-5)
    assert float(reading.codes.cost) == pytest.approx((60 + math.log(2)) / 3)
    text = by_part([reading])["text"][0]
    assert float(text.cost) == pytest.approx(-math.log(p), rel=1e-4)
    assert float(text.surprise) == pytest.approx(-math.log(p) - expected, rel=1e-3)
    scales = {name: [len(each.targets_N) for each in parts] for name, parts in by_part([reading, text]).items()}
    assert scales == {"text": [1, 1], "scale 1": [1], "scale 2": [2]}


@torch.no_grad()
def test_a_document_reads_its_pictures_and_draws_the_last(case):
    images = [picture.image for picture in case.pictures]
    document = case.document("draw it", *images)
    grids, codes = zip(*((grid, case.vq_model.encode(pixels)) for grid, pixels in map(case.pixels_of, images)))
    assert grids == ((3, 3), (2, 4), (4, 2)) and document.draws == [False, False, True]
    assert document.flags.tolist() == [False] * (len(document.ids) - 1) + [True]
    assert (document.ids == case.image_id).sum() == 3 and document.ids[-1] == case.image_id
    for (grid, targets, inputs), wanted, own in zip(document.images, codes, grids):
        assert grid == own and np.array_equal(targets, wanted) and len(inputs) == 0
    row = case.row_of(document)
    own = case.decoded(row)
    assert torch.equal(own, codes[-1])
    logits, targets, scales = case.logits(row)[0]
    assert torch.equal(targets, own[0])
    lengths = case.schedules.by_grid((4, 2)).lengths
    assert scales.tolist() == [scale for scale, length in enumerate(lengths) for _ in range(length)]
    controls = {**sampling.PLAIN, **sampling.UNGUIDED, "forced_codes": own}
    drawn, forced = sampling.generate(case, row, **controls)
    assert torch.equal(drawn, own) and difference(forced, logits) < 1e-4


@torch.no_grad()
def test_documents_of_a_row_are_read_as_if_alone(case):
    head, tail = map(case.processor.tokenizer.decode, case.frame)
    assert tail == "<|im_end|>\n<|im_start|>assistant\n" and head.endswith("<|im_start|>user\n")
    documents = [case.document("a star", picture.image) for picture in case.pictures]
    alone = [case.logits(case.row_of(document))[0] for document in documents]
    row = case.row_of(*documents)
    assert row["input_ids"].shape[0] == 1
    for both, parts in zip(case.logits(row)[0], zip(*alone)):
        torch.testing.assert_close(both, torch.cat(parts))
    codes = [torch.from_numpy(document.images[0][1][0]) for document in documents]
    assert torch.equal(torch.cat([targets for _, targets, _ in alone]), torch.cat(codes))


@torch.no_grad()
def test_without_shards_documents_are_of_described_pictures_or_of_drawn_ones(case):
    images = [picture.image for picture in default_pictures(case.schedules, 1, each=1)]
    described = Case(case.model, case.processor, [Picture(images[0]), Picture(images[1], "a small star")])
    [document] = described.documents
    assert "a small star" in case.processor.tokenizer.decode(document.prompt)
    assert document.images[0][0] == (2, 4)
    others = Case(case.model, case.processor, [Picture(image) for image in images])
    assert len(others.documents) == len(others.rows) == len(others.asked) == 16
    assert all(document.draws == [True] for document in others.documents)
    assert len({document.prompt.tobytes() for document in others.documents}) > 4


@torch.no_grad()
def test_asked_are_framed_texts_that_one_picture_answers(case):
    own = Case(case.model, case.processor, [])
    plain = case.document("a star", case.pictures[0].image)
    wide = case.document("another", case.pictures[1].image)
    head, null = case.frame[0], case.compact(case.null_prompt)
    ids = plain.ids.copy()
    ids[: len(head)] += 1
    lower = plain.ids.copy()
    lower[: len(head)] = 0
    text = Document(np.append(plain.ids, 9), np.append(plain.flags, True), [], [])
    others = [plain.after(null), plain._replace(ids=ids), plain._replace(ids=lower), text]
    others += [case.document("edit", *(picture.image for picture in case.pictures[:2])), plain._replace(draws=[False])]
    vars(own)["documents"] = [*others, plain, wide]
    assert [each is wanted for each, wanted in zip(own.asked, (plain, wide), strict=True)] == [True, True]
    vars(own)["documents"] = [plain] * 20
    vars(own).pop("asked")
    assert len(own.asked) == 16
    vars(own)["documents"] = others
    vars(own).pop("asked")
    assert own.asked == own.described


def test_some_documents_are_read_and_some_rows_tried(case, tmp_path):
    for packs, rows in ((None, [1] * 16), (tmp_path, [2] * 16)):
        own = Case(case.model, case.processor, [], packs)
        document = Document(np.array([1, 2]), np.array([False, True]), [], [True])
        vars(own)["documents"] = [document._replace(draws=[False]), *[document] * 200]
        own.row_of, own.read = (lambda *documents: documents), (lambda documents: documents)
        assert [len(row) for row in own.rows] == rows and own.rows[0][0] is document
        assert len(own.readings) == 192
        vars(own)["documents"] = [document] * 5
        vars(own).pop("rows")
        assert [len(row) for row in own.rows] == ([1] * 5 if packs is None else [2, 2, 1])


def test_losses_are_those_of_the_temperature_that_suits_all_rows_best(case):
    own = Case(case.model, case.processor, [])
    costs = torch.tensor([[9.0, 9.0, 2.0, 3.0, 9.0], [9.0, 9.0, 4.0, 1.0, 9.0], [9.0, 1.0, 5.0, 5.0, 9.0]])
    scales = torch.tensor([0, -1])  # of which texts count nothing
    readings = [
        Reading(torch.zeros(2), scales, torch.stack([cost, torch.zeros(5)], dim=1), torch.zeros(2)) for cost in costs
    ]
    own.read = lambda row: readings[row]
    assert own.losses([0, 1, 2]).tolist() == [3.0, 1.0, 5.0]
    assert own.losses([2, 0]).tolist() == [5.0, 2.0]
