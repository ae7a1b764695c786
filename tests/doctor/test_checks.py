"""Single checks of the doctor: tokenizers, documents, sampling and the diagnosis, each on a case of its own."""

import copy
import html
import random
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import FrozenInstanceError, asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ImageColor
from torch import nn

from transformers_nextflow import SelfCorrection
from transformers_nextflow.data.shards import decodable_codes
from transformers_nextflow.doctor import (
    Diagnosis,
    examination,
    examine,
    sampling,
    shards,
    to_text,
    tokenizer,
    write_report,
)
from transformers_nextflow.doctor.alterations import hooked
from transformers_nextflow.doctor.case import Case, Document, Reading
from transformers_nextflow.doctor.findings import Finding, difference, tolerance, z_score
from transformers_nextflow.doctor.pictures import default_pictures, draw
from transformers_nextflow.doctor.report import plot
from transformers_nextflow.doctor.weights import code_rows, copies, finite, spectra, values
from transformers_nextflow.scales import ScaleSchedule
from transformers_nextflow.training.metrics import psnr

TOY = Finding("toy", "weights", "that it is so")


@pytest.fixture(scope="module")
def pictures(trained):
    """Sixteen squares of the lowest level, and no other form."""
    return default_pictures(trained[0].model.schedules, 0, each=16)[:16]


@pytest.fixture(scope="module")
def case(trained, pictures):
    case = Case(*trained, pictures)
    with torch.no_grad():
        assert case.coded
    return case


@torch.no_grad()
def test_curves_and_pictures_of_the_tokenizer_go_scale_by_scale(case):
    assert tokenizer.reconstruction(TOY, case).fault is None
    schedule, by_scale = case.coded[0][1], []
    for scale in range(1, len(schedule) + 1):
        codes = [(each.quantization.target_codes, pixels) for pixels, _, each in case.coded]
        shown = [(case.vq_model.decode_prefix(own, schedule.final_grid, scale), pixels) for own, pixels in codes]
        by_scale.append(np.mean([float(psnr(*each)) for each in shown]))
    figures = case.curves["picture after each scale, PSNR in dB"]["PSNR"]
    assert figures == pytest.approx(by_scale, abs=1e-3) and figures == sorted(figures)
    [row] = case.images["picture, and what its codes keep of it"]
    assert len(row) == 2


def rebuilding(change, count: int = 16) -> SimpleNamespace:
    """Pictures that come back as `change` makes them, at first as their mean colour; in squares and wide ones."""
    torch.manual_seed(0)
    pixels = [0.4 * torch.randn(1, 3, 8, 8 + 4 * (number % 2)).clamp(-1, 1) for number in range(count)]
    schedules = [ScaleSchedule(((1, 1), tuple(each.shape[2:]))) for each in pixels]
    outputs = [SimpleNamespace(quantization=SimpleNamespace(target_codes=number)) for number in range(count)]
    case = SimpleNamespace(pictures=[SimpleNamespace(image=n) for n in range(count)], curves={}, images={})
    case.coded = list(zip(pixels, schedules, outputs))
    made = [(each.mean(dim=(2, 3), keepdim=True).expand_as(each), change(each)) for each in pixels]
    case.vq_model = SimpleNamespace(decode_prefix=lambda codes, grid, scale: made[codes][scale - 1])
    case.processor = SimpleNamespace(image_processor=SimpleNamespace(postprocess=list))
    return case


@pytest.mark.parametrize(
    "change, count, fault",
    [
        (lambda pixels: pixels, 16, None),
        (lambda pixels: pixels + 0.1, 16, None),
        (lambda pixels: 0.8 * pixels, 16, None),
        (lambda pixels: pixels.flip(-1), 16, "pictures come back mirrored"),
        (lambda pixels: pixels.flip(-2), 16, "pictures come back upside down"),
        (lambda pixels: pixels.flip(1), 16, "pictures come back with colours exchanged"),
        (lambda pixels: -pixels, 16, "pictures come back in negative"),
        (lambda pixels: pixels / 2, 16, "pictures come back of half the contrast"),
        (lambda pixels: torch.randn_like(pixels), 12, "damaged vision tokenizer"),
        (lambda pixels: torch.randn_like(pixels), 11, None),
    ],
)
def test_pictures_that_come_back_otherwise_are_named(change, count, fault):
    case = rebuilding(change, count)
    found = tokenizer.reconstruction(TOY, case)
    assert found.fault == fault, found.measured
    own = []
    for pixels, _, output in case.coded:
        made = [case.vq_model.decode_prefix(output.quantization.target_codes, None, scale) for scale in (1, 2)]
        own.append([min(float(psnr(each, pixels)), 60.0) for each in made])
    mean, last = np.mean(own, axis=0)
    assert f"{last - mean:.1f} dB above the mean colour's; by scale {mean:.1f}, {last:.1f}" == found.measured
    shown = case.images["picture, and what its codes keep of it"]
    assert sorted(row[0] for row in shown) == [count - 2, count - 1]  # the last of each form
    for number, rebuilt in shown:
        assert torch.equal(rebuilt, case.vq_model.decode_prefix(number, None, 2)[0])


@pytest.mark.parametrize(
    "count, scale, different, fault",
    [
        (16, 2, 5, None),
        (16, 2, 4, "collapsed codes"),
        (16, 0, 1, None),
        (16, 3, 1, "collapsed codes"),
        (12, 1, 1, "collapsed codes"),
        (11, 1, 1, None),
    ],
)
def test_a_scale_of_few_codes_is_collapsed(count, scale, different, fault, case):
    own = Case(case.model, case.processor, case.pictures)
    vars(own)["coded"] = copy.deepcopy(case.coded[:count])
    for number, (_, schedule, output) in enumerate(own.coded):
        output.quantization.target_codes[:, schedule.slice(scale)] = number % different
    found = tokenizer.codes(TOY, own)
    assert found.fault == fault
    assert found.measured.split(" different")[0].split(", ")[scale] == str(different)


@torch.no_grad()
def test_of_a_single_scale_no_codes_are_collapsed(case):
    """Which has one code a picture."""
    own = Case(case.model, case.processor, case.pictures)
    quantization = SimpleNamespace(target_codes=torch.tensor([[7]]))
    output = SimpleNamespace(quantization=quantization)
    vars(own)["coded"] = [(None, ScaleSchedule(((1, 1),)), output)] * 16
    assert tokenizer.codes(TOY, own).fault is None


@torch.no_grad()
def test_few_pictures_raise_no_alarm_of_the_tokenizer(trained):
    few = default_pictures(trained[0].model.schedules, 0, each=12)[:12]
    few = Case(*trained, few)
    checks = (tokenizer.reconstruction, tokenizer.codes, tokenizer.semantics)
    assert [check(TOY, few).fault for check in checks] == [None] * 3


@pytest.mark.parametrize(
    "kept, count, fault",
    [(0.5, 12, None), (0.0, 12, "semantic branch lost"), (0.0, 11, None), (-0.5, 16, "semantic branch lost")],
)
def test_a_semantic_branch_that_says_no_more_than_the_mean_is_lost(kept, count, fault):
    """Of features that have much in common; what is read of them is it, and a share of what is a picture's own."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(count, 1, 5, 8, generator=generator) + 3 * torch.randn(8, generator=generator)
    mean, schedule = wanted.mean(dim=(0, 2)), ScaleSchedule(((1, 1), (1, 5)))
    made = mean + kept * (wanted - mean) + 1e-3 * torch.randn(wanted.shape, generator=generator)
    case = SimpleNamespace(coded=[(n, schedule, SimpleNamespace(semantic_features=made[n])) for n in range(count)])
    case.vq_model = SimpleNamespace(semantic_features=lambda number: wanted[number])
    found = tokenizer.semantics(TOY, case)
    assert found.fault == fault, found.measured
    own, plain = (float(torch.cosine_similarity(wanted, other, dim=-1).mean()) for other in (made, mean))
    assert found.measured == f"cosine {own:.2f}, of the mean {plain:.2f}"
    for width in (7, 9):
        case.vq_model = SimpleNamespace(semantic_features=lambda number, width=width: torch.zeros(1, 5, width))
        assert tokenizer.semantics(TOY, case).severity == "unchecked"


@torch.no_grad()
def test_parts_of_the_pixel_branch_are_tried_on_pictures_and_of_shards_in_other_orders(
    random_model, tiny_processor, monkeypatch, tmp_path
):
    monkeypatch.setattr(tokenizer, "judge", lambda *arguments: arguments)
    case = Case(random_model, tiny_processor, default_pictures(random_model.model.schedules, 0, each=6))
    _, measure, rows, whole, resizable, movable, _ = tokenizer.parts(TOY, case)
    named = dict(case.vq_model.named_modules())
    assert all(name.startswith("pixel_") and named[name] is module for name, module in resizable.items())
    assert {"pixel_encoder.conv_in", "pixel_decoder.conv_out"} <= set(resizable) and not whole and not movable
    assert len(rows) == 16 and any(torch.equal(rows[0], pixels) for pixels, _, _ in case.coded)
    expected = [-float(psnr(case.vq_model(pixels).reconstruction, pixels)) for pixels in rows[:3]]
    assert measure(rows[:3]).tolist() == pytest.approx(expected)
    document = case.document("a star", case.pictures[0].image)
    vars(case).update(packs=tmp_path, stored=document.images * 20)
    _, _, rows, _, resizable, movable, _ = tokenizer.parts(TOY, case)
    codes = torch.from_numpy(document.images[0][1])
    assert len(rows) == 16 and torch.equal(rows[0], case.vq_model.decode(codes, document.images[0][0]))
    assert set(movable) == {name for name in resizable if name.startswith("pixel_encoder")} != set()


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda codes: codes, None),
        (
            lambda codes: np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape),
            "stored codes in disorder",
        ),
    ],
)
@torch.no_grad()
def test_stored_codes_that_are_not_those_of_their_pictures_are_named(change, fault, case):
    own = Case(case.model, case.processor, case.pictures)
    coded = [(each.quantization.target_codes.numpy(), schedule.final_grid) for _, schedule, each in case.coded[:12]]
    vars(own)["documents"] = [
        Document(np.array([0]), np.array([True]), [(grid, change(codes), codes[:0])], [True]) for codes, grid in coded
    ]
    assert shards.codes(TOY, own).fault == fault
    vars(own)["documents"] = own.documents[:11]
    vars(own).pop("stored")
    assert shards.codes(TOY, own).severity == "unchecked"


@torch.no_grad()
def test_targets_numbered_from_elsewhere_are_told_where_inputs_are_not(case):
    """Of the pictures a third have no inputs of their own, as those that are only shown."""
    own, size = Case(case.model, case.processor, case.pictures), case.config.vq_config.codebook_size
    vars(own)["stored"] = [
        (it.final_grid, (codes + 1) % size, codes[: bool(number % 3), : it.offsets[-1]])
        for number, (_, it, output) in enumerate(case.coded[:12])
        for codes in [output.quantization.target_codes.numpy()]
    ]
    found = shards.codes(TOY, own)
    assert found.fault == "wrong code offset", found.measured


class OneScale(list):
    final_grid = (4, 4)

    def slice(self, scale):
        return slice(16)


class Quantizer:
    def __call__(self):
        return torch.eye(64)

    def normalized(self, queries):
        return queries

    def distances(self, queries, table):
        return -queries @ table.T


class Snapping:
    """A tokenizer of a table of 64, whose pictures are their codes: at each of 16 positions one of 16 neighbours is
    what it codes a picture by, and decodes rightly."""

    wanted, quantizer = 5 * torch.arange(16) % 16, Quantizer()

    def decode(self, codes, grid):
        return codes

    def encode(self, codes):
        return codes // 16 * 16 + self.wanted

    def features(self, codes):
        return torch.eye(64)[torch.where(codes % 16 == self.wanted, codes, (codes + 32) % 64)].mT.unflatten(2, (4, 4))


def snapping(stored: list[np.ndarray]) -> SimpleNamespace:
    """Of pictures of 16 codes each, without inputs of their own."""
    case = SimpleNamespace(vq_model=Snapping())
    case.stored = [((4, 4), each[None], np.zeros((0, 0), int)) for each in stored]
    case.config = SimpleNamespace(vq_config=SimpleNamespace(codebook_size=64))
    case.schedules = SimpleNamespace(by_grid=lambda grid: OneScale([(4, 4)]))
    case.codes_of = lambda targets, inputs: torch.from_numpy(decodable_codes(targets, inputs))[None]
    return case


ON, BACK, EARLIER, LATER = 1, -1, "earlier", "later"


def partly(right: int, wrong: int = 0, way=ON) -> np.ndarray:
    """Of 16 codes some as the tokenizer codes them, then some numbered from elsewhere or of the neighbour's place."""
    own, rng = Snapping.wanted.numpy(), np.random.default_rng(0)
    moved = np.roll(own, 1 if way == LATER else -1) if way in (EARLIER, LATER) else own + way
    at = np.arange(16)
    codes = np.where(at < right, own, np.where(at < right + wrong, moved, own + 8))
    return (codes + 16 * rng.integers(4, size=16)) % 64


@pytest.mark.parametrize(
    "pictures, fault, shown",
    [
        ([partly(16)] * 12, None, "100.0% agree over 12 pictures, 100.0% of codes made twice; read as they are 100"),
        ([partly(8)] * 20, None, "50.0% agree over 16 pictures, 100.0% of codes made twice; read as they are 50.0%"),
        ([partly(7)] * 12, "stored codes in disorder", "read as they are 43.8%"),
        ([partly(16)] * 5 + [partly(0)] * 7, None, "read as they are 41.7%"),  # 3.9 standard errors
        ([partly(16)] * 4 + [partly(0)] * 8, "stored codes in disorder", "read as they are 33.3%"),  # 4.7
        ([partly(0, 16, ON)] * 12, "wrong code offset", "read numbered one less 100.0%"),
        ([partly(0, 16, BACK)] * 12, "wrong code offset", "read numbered one more 100.0%"),
        ([partly(0, 16, LATER)] * 12, "shifted targets", "read one position earlier 100.0%"),
        ([partly(0, 16, EARLIER)] * 12, "shifted targets", "read one position later 100.0%"),
        ([partly(2, 9)] * 12, "wrong code offset", "read numbered one less 56.2%"),
        ([partly(2, 8)] * 12, "stored codes in disorder", "read numbered one less 50.0%"),
        ([partly(0, 5)] * 12, "wrong code offset", "read numbered one less 31.2%"),
        ([partly(0, 4)] * 12, "stored codes in disorder", "read numbered one less 25.0%"),
        ([partly(0, 4, LATER)] * 12, "stored codes in disorder", "read one position earlier 25.0%"),
        ([partly(0, 5, LATER)] * 12, "shifted targets", "read one position earlier 31.2%"),
    ],
)
def test_codes_are_read_as_they_agree_best(pictures, fault, shown):
    """By more than four times as many as at first, and a quarter of those of codes made twice."""
    found = shards.codes(TOY, snapping(pictures))
    assert found.fault == fault and shown in found.measured, found.measured


def corrected(
    count: int, change=lambda targets, inputs: None, share=0.6, variants=2, settings=None, **named
) -> SimpleNamespace:
    """Of a table of 64 numbers on a line, and pictures of 1 + 16 + 64 codes, where a share of the inputs is one on."""
    rng, stored = np.random.default_rng(0), []
    for _ in range(count):
        targets = np.repeat(rng.integers(0, 63, (1, 81)), variants, 0)
        scales = np.arange(17) > 0
        takes_part = (named.get("first_scale", 0) <= scales) & (scales <= named.get("last_scale", 1))
        is_more = (rng.random((variants, 17)) < share) & takes_part
        inputs = targets[:, :17] + is_more
        change(targets, inputs)
        stored.append(((8, 8), targets, inputs))
    stored.insert(0, ((8, 8), targets[:1], inputs[:0])) if count else None  # which is shown and has none
    schedule = ScaleSchedule(((1, 1), (4, 4), (8, 8)))
    manifest = {"settings": {"self_correction": asdict(SelfCorrection(**named)) if settings is None else settings}}
    case = SimpleNamespace(shards=(None, manifest), stored=stored, curves={}, seed=0)
    case.schedules = SimpleNamespace(by_grid=lambda grid: schedule)
    case.vq_model = SimpleNamespace(quantizer=lambda: torch.arange(64.0)[:, None])
    return case


def plainly(targets, inputs):
    pass


def write_into(targets, inputs):
    targets[1, 0] = (targets[0, 0] + 1) % 64


def repeat(targets, inputs):
    inputs[:] = inputs[:1]


def at_the_first(targets, inputs):
    inputs[:, 0] += 1


def draw_above(targets, inputs):
    """Codes that are far away, above or below: of nothing in between."""
    changed = inputs != targets[:, :17]
    targets[:] = np.random.default_rng(1).integers(0, 20, targets[:1].shape)
    inputs[:] = targets[:, :17] + changed * 40


def draw_below(targets, inputs):
    changed = inputs != targets[:, :17]
    targets[:] = np.random.default_rng(1).integers(43, 63, targets[:1].shape)
    inputs[:] = targets[:, :17] - changed * 40


@pytest.mark.parametrize(
    "count, change, share, named, fault, wrong",
    [
        (70, plainly, 0.6, {}, None, []),
        (24, plainly, 0.6, {"first_scale": 1}, None, []),
        (24, plainly, 0.6, {"last_scale": 0}, None, []),
        (24, write_into, 0.6, {}, "self-correction written into targets", []),
        (24, plainly, 0.9, {}, "wrong share of self-correction", [1, 2]),
        (24, at_the_first, 0.6, {"first_scale": 1}, "wrong share of self-correction", [1]),
        (24, plainly, 0.6, {"probability": 0.5}, "wrong share of self-correction", [1, 2]),
        (12, plainly, 0.0, {}, "wrong share of self-correction", [1, 2]),
        (12, plainly, 0.0, {"probability": 0.0}, None, []),
        (11, plainly, 0.0, {}, None, []),
        (12, repeat, 0.6, {}, "variants all alike", []),
        (11, repeat, 0.6, {}, None, []),
        (24, draw_above, 0.6, {}, "self-correction by any codes", []),
        (24, draw_below, 0.6, {}, "self-correction by any codes", []),
    ],
)
def test_self_correction_is_as_its_settings_say(count, change, share, named, fault, wrong):
    case = corrected(count, change, share, **named)
    found = shards.correction(TOY, case)
    assert found.fault == fault and f"wrong at {wrong}, " in found.measured, found.measured
    assert f"of {min(count, 64)} pictures {count * (change is write_into)} have several" in found.measured
    curve = case.curves["disturbed inputs of each scale, share"]["share"]
    shares = [share * (named.get("first_scale", 0) == 0), share * (named.get("last_scale", 1) == 1)]
    shares[0] += change is at_the_first
    assert curve == pytest.approx(shares, abs=0.25)


def test_of_several_settings_or_none_self_correction_is_not_checked():
    case = corrected(24)
    several = [{"self_correction": {"probability": p}} for p in (0.5, 1.0)]
    case.shards = (None, {"documents": {"settings": several}})
    assert shards.correction(TOY, case).severity == "unchecked"
    assert shards.correction(TOY, corrected(24, settings=False)).severity == "unchecked"
    assert shards.correction(TOY, corrected(0)).severity == "unchecked"


@pytest.fixture(scope="module")
def tiny_case(random_model, tiny_processor):
    return Case(random_model, tiny_processor, default_pictures(random_model.model.schedules, 0, each=1))


def by_count(module, inputs, output):
    """As of a head that depends on how many positions it is given at once."""
    return output * (1 + torch.arange(output.shape[-1]) / output[..., 0].numel())


@pytest.mark.parametrize(
    "check, hooks, fault",
    [
        (sampling.forced, {}, None),
        (sampling.guidance, {}, None),
        (sampling.forced, {"code_head": by_count}, "sampling unlike training"),
        (sampling.guidance, {"code_head": by_count}, "wrong guidance"),
        (sampling.guidance, {"attention": lambda module, inputs, output: 0 * output}, "guidance without effect"),
    ],
)
@torch.no_grad()
def test_sampling_that_is_no_training_is_named(check, hooks, fault, tiny_case):
    model = tiny_case.model
    attention = [layer.self_attn.o_proj for layer in model.model.language_model.layers]
    modules = {"code_head": [model.code_head], "attention": attention}
    with ExitStack() as stack:
        for name, change in hooks.items():
            stack.enter_context(hooked(change, *modules[name]))
        assert check(TOY, tiny_case).fault == fault


def prompted(case, **others) -> Case:
    """The same model and pictures, with other prompts."""
    own = Case(case.model, case.processor, case.pictures)
    vars(own).update(others)
    return own


@torch.no_grad()
def test_null_prompts_end_in_the_pictures_begin_and_are_no_longer_than_a_prompt(tiny_case):
    tokenizer, boi = tiny_case.processor.tokenizer, tiny_case.config.boi_token_id
    length = sum(map(len, tiny_case.frame))
    for null, fault in [
        ([9] * length + [boi], None),
        ([9] * (length + 1) + [boi], "wrong null prompt"),
        ([9] * (length - 1) + [boi], None),
        ([boi] * (length - 1) + [9], "wrong null prompt"),
    ]:
        found = sampling.prompts(TOY, prompted(tiny_case, null_prompt=torch.tensor([null])))
        assert found.fault == fault, found.measured
        assert found.measured.startswith(f"0 of {8 * len(tiny_case.pictures)} texts have other ids")
        assert f"null prompt {tokenizer.decode(null)!r}" in found.measured


@torch.no_grad()
def test_two_control_tokens_of_one_row_are_named(tiny_model, tiny_processor):
    model, boi = copy.deepcopy(tiny_model), tiny_model.config.boi_token_id
    rows = model.get_input_embeddings().weight
    rows[model.config.eoi_token_id] = 2 * rows[boi]
    found = sampling.prompts(TOY, Case(model, tiny_processor, []))
    assert found.fault == "control tokens reset" and "one row: ['<|vision_end|>'];" in found.measured
    assert found.measured.startswith("0 of 8 texts")


def drawing(cost: float, expected: float, null: float, of_level=True, count: int = 14) -> SimpleNamespace:
    """Prompts of one number each, and what draws cost after them and after the null prompt."""
    schedule, boi, null_id = ScaleSchedule(((1, 1), (2, 2))), 3, 1000
    calls, images = [], [((2, 2), np.arange(5)[None], None)]

    def generate(**settings):
        calls.append(settings)
        return SimpleNamespace(sequences=torch.full((2, 5), 10 + settings["seed"]), logits=[torch.zeros(2, 5, 8)])

    def row_of(document):
        codes = torch.from_numpy(document.images[0][1][0])
        row = {"input_ids": torch.from_numpy(np.append(document.prompt, boi))[None], "image_codes": codes}
        return row | {"image_input_codes": codes[:1], "image_grid_hw": torch.tensor([[2, 2]])}

    def read(row):
        costs = torch.full((5, 1), null if row["input_ids"][0, 0] == null_id else cost)
        return Reading(torch.tensor([0]), torch.tensor([0]), costs, torch.tensor([expected]))

    case = SimpleNamespace(seed=7, images={}, calls=calls, row_of=row_of, read=read)
    case.asked = [Document(np.array([20 + n, 5]), np.array([False, True]), images, [True]) for n in range(count)]
    case.compact, case.null_prompt = np.asarray, [null_id]
    case.config = SimpleNamespace(boi_token_id=boi, text_vocab_size=10, image_generation={"level": 256})
    case.schedules = SimpleNamespace(by_grid=lambda grid: schedule, image_size=lambda schedule: (32, 48))
    case.schedules.level_name, case.schedules.level_of = str, lambda grid: "256" if of_level else "1024"
    case.model = SimpleNamespace(generate=generate)
    case.decoded = lambda row: row["image_codes"][None]
    case.vq_model = SimpleNamespace(decode=lambda codes, grid: codes if grid == (2, 2) else None)
    case.processor = SimpleNamespace(image_processor=SimpleNamespace(postprocess=lambda pixels: pixels.tolist()))
    return case


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"cost": 2.0, "expected": 2.5, "null": 3.0}, None),
        ({"cost": 2.5, "expected": 2.0, "null": 3.0}, "harmful sampling settings"),
        ({"cost": 2.5, "expected": 2.0, "null": 3.0, "of_level": False}, None),
        ({"cost": 3.0, "expected": 4.0, "null": 2.5}, "drawn against the prompt"),
        ({"cost": 3.0, "expected": 4.0, "null": 2.5, "of_level": False}, "drawn against the prompt"),
    ],
)
def test_draws_cost_what_plain_ones_would_and_less_than_after_the_null_prompt(settings, fault):
    """Of twelve prompts two each, from seeds of their own; four are shown with the picture that answers them."""
    case = drawing(**settings)
    found = sampling.draws(TOY, case)
    assert found.fault == fault, found.measured
    own, plain, null = (settings[name] for name in ("cost", "expected", "null"))
    assert f"{own:.2f} nats a code over 24 pictures, plain ones would {plain:.2f}, after" in found.measured
    assert found.measured.endswith(f"these {null:.2f}")
    assert [call["seed"] for call in case.calls] == [7000 + number for number in range(12)]
    assert [call["input_ids"].tolist() for call in case.calls] == [[[20 + number, 3]] for number in range(12)]
    assert all(call["num_images_per_prompt"] == 2 and call["negative_input_ids"] == [1000] for call in case.calls)
    assert all((call["height"], call["width"]) == (32, 48) for call in case.calls)
    [rows] = case.images.values()
    assert rows == [[list(range(5)), *[[7000 + number] * 5] * 2] for number in range(4)]


def finding_of(name: str, fault: str | None = None, severity: str = "warning") -> Finding:
    return Finding(name, "weights", "", severity, measured="no reason", fault=fault)


@pytest.mark.parametrize(
    "findings, headline",
    [
        ([finding_of("a"), finding_of("b")], "Nothing wrong was found in 2 checks."),
        (
            [finding_of("a"), finding_of("b", severity="unchecked"), finding_of("c", severity="unchecked")],
            "Nothing wrong was found in 1 checks. Not checked: b, c (no reason).",
        ),
        ([finding_of("a"), finding_of("b", "bad")], "Most likely: bad (b)."),
        (
            [finding_of("a", "bad"), finding_of("b", "worse")],
            "Most likely: bad (a). 1 further alarm may follow from it.",
        ),
        (
            [finding_of("a", "bad"), finding_of("b", "worse"), finding_of("c", "worst")],
            "Most likely: bad (a). 2 further alarms may follow from it.",
        ),
    ],
)
def test_the_headline_says_what_was_found_and_what_not_checked(findings, headline):
    diagnosis = Diagnosis(findings, {"loss": {"own": [1.0]}}, {}, 1.234)
    assert diagnosis.headline == headline
    first = next((each.fault for each in findings if each.fault), None)
    figures = diagnosis.to_dict()
    assert figures.pop("findings")[0]["check"] == "a"
    assert figures == {"fault": first, "headline": headline, "curves": {"loss": {"own": [1.0]}}, "seconds": 1.23}


def spoiled_by(kind: type[Exception]):
    def spoiled_check(check, case):
        """That it
        is so."""
        raise kind("too bad")

    spoiled_check.__module__ = "transformers_nextflow.doctor.weights"
    return spoiled_check


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, IndexError, KeyError, TypeError, OSError])
@pytest.mark.parametrize("order, severity", [("EXACT", "error"), ("MEANS", "warning")])
def test_a_check_that_raises_is_a_finding(kind, order, severity, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(examination, "EXACT", ())
    monkeypatch.setattr(examination, "MEANS", ())
    monkeypatch.setattr(examination, order, (spoiled_by(kind),))
    seen = []
    diagnosis = examine(tiny_model, tiny_processor, pictures=[], on_check=seen.append)
    assert 0 < diagnosis.seconds < 60
    [finding] = diagnosis.findings
    assert seen == [finding] and finding.part == "weights" and finding.severity == severity
    assert (finding.check, finding.expected) == ("spoiled check", "That it is so.")
    assert finding.fault == "the code raises" and finding.measured == f"{kind.__name__}: {kind('too bad')}"
    monkeypatch.setattr(examination, order, (spoiled_by(AttributeError),))
    with pytest.raises(AttributeError, match="too bad"):
        examine(tiny_model.train(), tiny_processor, pictures=[])
    assert tiny_model.training
    tiny_model.eval()


def test_examined_are_twelve_pictures_of_each_form_with_the_seed_0(tiny_model, tiny_processor, monkeypatch, tmp_path):
    cases = []

    def seen(check, case):
        """That it is seen."""
        cases.append(case)
        return check.verdict("", {})

    seen.__module__ = "transformers_nextflow.doctor.weights"
    monkeypatch.setattr(examination, "EXACT", (seen,))
    monkeypatch.setattr(examination, "MEANS", ())
    for settings in ({}, {"packs": str(tmp_path), "seed": 3, "pictures": iter(cases)}):
        with pytest.raises(FrozenInstanceError):
            examine(tiny_model, tiny_processor, **settings).findings[0].fault = "another"
    drawn, given = cases
    assert (drawn.seed, drawn.packs, given.seed, given.packs, given.pictures) == (0, None, 3, tmp_path, [drawn])
    forms = Counter(picture.image.size for picture in drawn.pictures)
    assert forms == {(24, 24): 12, (32, 16): 12, (16, 32): 12} and Case(tiny_model, tiny_processor, []).seed == 0


def test_a_drawn_shape_is_as_its_caption_says(tiny_model):
    """Circles, squares and triangles fill other shares of what holds them, which is half to nine tenths of a side."""
    fills = {"circle": 0.785, "square": 1.0, "triangle": 0.5}
    for number in range(24):
        picture = draw(random.Random(number), 120, 160)
        _, colour, kind = picture.caption.split()
        pixels = np.array(picture.image).astype(int)
        assert pixels.shape == (120, 160, 3)
        is_shape = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
        rows, columns = np.flatnonzero(is_shape.any(1)), np.flatnonzero(is_shape.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert is_shape.sum() / (height * width) == pytest.approx(fills[kind], abs=0.06), picture.caption
        radius = max(height, width) / {"circle": 2, "square": 2**0.5, "triangle": 3**0.5}[kind] / 120
        assert 0.24 < radius < 0.43
        colours, counts = np.unique(pixels[is_shape], axis=0, return_counts=True)
        assert tuple(colours[counts.argmax()]) == ImageColor.getrgb(colour)


def test_findings_are_told_by_their_parts(tmp_path):
    """Alarms first, in full."""
    alarm = Finding("order", "tokenizer", "fine", "error", "mend", "bad", "spoiled", "rust")
    fine = Finding("place", "weights", "so", "ok", "none", "good")
    late = Finding("time", "sampling", "so", "unchecked", "none", "late")
    diagnosis = Diagnosis([fine, alarm, late])
    text = to_text(diagnosis)
    first, *lines = [line.rstrip() for line in text.splitlines()]
    assert first.startswith("Most likely: spoiled (order).") and max(map(len, lines)) == 100
    words = re.findall("[a-z_]{3,}", " ".join(lines))
    assert words[: words.index("weights")] == (
        "error spoiled check tokenizer order measured bad expected fine cause rust next step mend".split()
    )
    parts = "weights tokenizer shards transformer sampling".split()
    rows = {
        "weights": ["place", "good"],
        "tokenizer": ["error", "order", "bad"],
        "sampling": ["unchecked", "time", "late"],
    }
    expected = [word for part in parts for word in (part, "check", "measured", *rows.get(part, ()))]
    assert words[words.index("weights") :] == expected
    page = write_report(diagnosis, tmp_path, "title").read_text()
    shown = re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]
    assert "color: #" in shown and max(map(len, html.unescape(re.sub("<.*?>", "", shown)).splitlines())) == 140
    assert plot("loss", {"own": [1.0, 2.0]}).tobytes() != plot("loss", {"own": [2.0, 1.0]}).tobytes()


@pytest.mark.parametrize(
    "values, score",
    [
        ([1.0] * 11, 0.0),
        ([1.0] * 12, float("inf")),
        ([-1.0] * 12, float("-inf")),
        ([0.0] * 12, 0.0),
        ([1.0, 3.0] * 8, 2 / (np.std([1.0, 3.0] * 8, ddof=1) / 4)),
    ],
)
def test_a_mean_is_told_in_its_standard_error(values, score):
    assert z_score(torch.tensor(values)) == pytest.approx(score)


def test_differences_are_those_of_the_largest():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert difference(a, b) == pytest.approx(0.5 / 4) and difference(b, b) == 0.0
    assert difference(a, b[:1]) == difference(a, a / 0) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert tolerance(torch.float32) == pytest.approx(3.45e-4, rel=0.01) and tolerance(torch.bfloat16) > 0.05


@pytest.mark.parametrize(
    "used, gap, first, is_missing",
    [
        (range(64), 0, 0, False),
        (range(56), 8, 56, False),
        (range(55), 9, 55, True),
        (range(32), 32, 32, True),
        (range(8, 64), 8, 0, False),
        (range(9, 64), 9, 0, True),
        (range(0, 32, 2), 33, 31, True),
        (sorted({*range(0, 32, 2)} - {2}), 33, 31, False),
    ],
)
@pytest.mark.parametrize("count", [33, 32])
def test_an_eighth_of_the_table_may_be_without_use(used, gap, first, is_missing, count):
    """Unless codes are too few to tell, eight for each entry, or half of the others are without use as well."""
    every = np.array(used)[np.random.default_rng(0).permutation(count * 16) % len(used)]
    found = shards.codes(TOY, snapping(list(every.reshape(count, 16))))
    assert (found.fault == "codes missing") is (is_missing and count == 33), found.measured
    assert f"the longest gap in the ids of {count * 16} codes is {gap} from {first} on" in found.measured


def linear(rows: int = 96, columns: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(4)))


def fault_of(check, model) -> str | None:
    with torch.no_grad():
        return check(TOY, SimpleNamespace(model=model, seed=0)).fault


@pytest.mark.parametrize(
    "factor, fault", [(64, None), (65, "weights out of bounds"), (torch.nan, "weights not finite")]
)
def test_an_entry_may_be_sixty_four_times_the_second(factor, fault):
    model = linear()
    model[1].weight.data[3, 4] = factor * model[1].weight.abs().max().item()
    assert fault_of(finite, model) == fault
    model[1].weight.data.zero_()
    assert fault_of(finite, model) is None


@pytest.mark.parametrize(
    "count, columns, fault",
    [(90, 96, None), (96, 96, "weights clipped"), (90, 49, "weights clipped"), (90, 48, None), (90, 40, None)],
)
def test_a_hundredth_of_a_matrix_may_be_its_largest_entry(count, columns, fault):
    model = linear(columns=columns)
    largest = model[1].weight.abs().max().item()
    model[1].weight.data.view(-1)[torch.randperm(96 * columns)[:count]] = largest
    assert fault_of(values, model) == fault


@pytest.mark.parametrize("bits, fault", [(8, None), (4, "weights too coarse")])
@pytest.mark.parametrize("group", [16, 96])
def test_four_bits_are_told_from_eight_whatever_their_groups(bits, group, fault):
    """Of few rows, which end in no whole sixteen."""
    model = linear(rows=12, columns=104)
    groups = model[1].weight.data[:, :96].reshape(-1, group)
    step = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    groups.copy_((groups / step).round() * step)
    groups.add_(1e-3 * torch.randn(len(groups), 1) * step)  # so that few entries are the largest
    model[1].weight.data[:, :96] = groups.view(12, 96)
    assert fault_of(values, model) == fault


@pytest.mark.parametrize("different, fault", [(12, None), (11, "weights too coarse")])
def test_of_sixteen_neighbours_twelve_may_differ(different, fault):
    model = linear()
    model[1].weight.data.view(-1, 16)[:, different:] = model[1].weight.data.view(-1, 16)[:, :1]
    assert fault_of(values, model) == fault


def test_a_single_number_is_trained_and_two_alike_are_not():
    model = linear()
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert fault_of(values, model) is None
    model.register_parameter("scales", nn.Parameter(torch.ones(2)))
    assert fault_of(values, model) == "untrained weights"


@torch.no_grad()
def test_matrices_of_48_rows_and_columns_have_a_spectrum():
    for rows, columns, severity in [(48, 48, "warning"), (47, 96, "unchecked"), (96, 47, "unchecked")]:
        assert spectra(TOY, SimpleNamespace(model=linear(rows, columns), seed=0)).severity == severity


@pytest.mark.parametrize("noise, fault", [(0.0, "copied weights"), (0.02, "copied weights"), (0.1, None)])
def test_a_copy_is_one_though_it_was_rounded(noise, fault):
    model = linear()
    spread = model[0].weight.std()
    model[2].weight.data.copy_(model[0].weight + noise * spread * torch.randn(96, 96))
    assert fault_of(copies, model) == fault


def coded(share: float, shift: int = 0, count: int = 1024) -> SimpleNamespace:
    """Entries of a table, embeddings that began with them and a head that is like them, but for a share of rows."""
    torch.manual_seed(0)
    table = torch.randn(1024, 16) + 2.0
    rows = (table @ torch.randn(16, 32) + 0.1 * torch.randn(1024, 32)).roll(shift, 0)
    mixed = rows.clone()
    mixed[torch.randperm(1024)[: int(share * 1024)]] = rows.mean(0) + rows.std() * torch.randn(int(share * 1024), 32)
    parts = [SimpleNamespace(weight=weight) for weight in (rows, mixed)]
    model = SimpleNamespace(model=SimpleNamespace(code_embeddings=parts[0]), code_head=parts[1])
    return SimpleNamespace(model=model, vq_model=SimpleNamespace(quantizer=lambda: table[:count]))


@pytest.mark.parametrize(
    "share, shift, fault",
    [
        (0.0, 0, None),
        (0.15, 0, None),
        (0.4, 0, "code head without order in part"),
        (1.0, 0, "code head without order"),
        (0.0, 1, "wrong code offset"),
        (0.0, -1, "wrong code offset"),
        (0.0, 2, "code embeddings without order"),
    ],
)
def test_rows_of_codes_are_in_the_order_of_the_table(share, shift, fault):
    found = code_rows(TOY, coded(share, shift))
    assert found.fault == fault, found.measured
    if not shift:  # of rows like none a sixth is likelier than by one deviation
        lost = int(found.measured.rpartition(" on, ")[2].partition("%")[0]) / 100
        assert lost == pytest.approx(0.84 * share, abs=0.03)


def test_rows_without_order_are_told_by_their_place():
    case = coded(0.0)
    head = case.model.code_head.weight
    head[512:768] = head[512:768].roll(100, 0)
    found = code_rows(TOY, case)
    assert found.fault == "code head without order" and "in the 256 rows from 512 on, " in found.measured
    assert code_rows(TOY, coded(0.0, count=11)).measured == "11 codes are too few"


@pytest.mark.parametrize("count, shown", [(1, "0.weight of 4"), (3, "0.weight, 1.weight, 2.weight of 4")])
def test_at_most_three_names_are_shown(count, shown):
    model = linear()
    for layer in model[:count]:
        layer.weight.data[0, 0] = torch.nan
    found = finite(TOY, SimpleNamespace(model=model))
    assert found.measured == f"{shown} are not"
    model[3].weight.data[0, 0] = torch.nan
    if count == 3:
        assert finite(TOY, SimpleNamespace(model=model)).measured == f"{shown[:-5]} and 1 more of 4 are not"
