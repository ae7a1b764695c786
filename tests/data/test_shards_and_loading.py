"""What damaged or foreign shards are refused for, plans of packs, the order of batches, the Hub's layout, pictures."""

import copy
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from inspect import signature
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from data_samples import documents, edit_manifest
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from tests.fresh import run_fresh
from tests.hub_stand_in import hub_stand_in
from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, SelfCorrection
from transformers_nextflow.cli import main
from transformers_nextflow.data import (
    BatchPadding,
    ComputeBudget,
    CostModel,
    ExtractionSettings,
    FixedLength,
    PackCollator,
    PackedDataset,
    PackSampler,
    Source,
    extraction,
    inspection,
    pack,
    packing,
    shards,
    verify,
)
from transformers_nextflow.data.inspection import contact_sheet, draw_costs, draw_sheet, summarize
from transformers_nextflow.data.packing import Extents, efficiency, pack_costs, split_to_multiple, statistics
from transformers_nextflow.losses import IGNORE

COST_MODEL = CostModel("blocks", 1.0, 3e-4, 0.5)  # about a model of width 512


@pytest.fixture(scope="module")
def packs(extracted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packs"
    pack([extracted], folder, ComputeBudget(300), COST_MODEL, multiple_of=6, packs_per_shard=2)
    return folder


@pytest.fixture
def damaged(packs, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(packs, tmp_path / "packs")


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rewrite(folder: Path, number: int, change) -> None:
    """Rows of a shard, as `change` makes them of its own."""
    entries = shards.read_manifest(folder)["shards"]
    path = folder / "data" / entries[number]["file"]
    shard = shards.Shard(path)
    rows = [
        {name: np.copy(value) if isinstance(value, np.ndarray) else value for name, value in shard.row(index).items()}
        for index in range(len(shard))
    ]
    change(rows)
    entries[number] = shards.write_shard(path, rows, dict(zip(shard.batch.schema.names, shard.batch.schema.types)))
    edit_manifest(folder, lambda manifest: manifest.update(shards=entries))


def change_identity(name: str, value):
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["identity"].__setitem__(name, value))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: flip(folder / "data" / "packs-00001.arrow"), "packs-00001.arrow is damaged: its sha256"),
        (lambda folder: (folder / "data" / "packs-00000.arrow").unlink(), "packs-00000.arrow is missing"),
        (lambda folder: (folder / "data" / "packs-00009.arrow").touch(), "does not name: packs-00009.arrow"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
        (
            lambda folder: edit_manifest(folder, lambda manifest: manifest["shards"][0].update(sha256="0" * 64)),
            "sha256",
        ),
        (
            lambda folder: edit_manifest(folder, lambda manifest: manifest["shards"][0].update(sha256="f" * 64)),
            "sha256",
        ),
        (lambda folder: edit_manifest(folder, lambda manifest: manifest.update(content="a")), "holds a, not packs"),
        (lambda folder: edit_manifest(folder, lambda manifest: manifest.update(content="z")), "holds z, not packs"),
        (change_identity("vision_tokenizer", "0" * 64), "another vision tokenizer"),
        (change_identity("encoder", {"norm_groups": 32}), "another encoder"),
        (change_identity("text_tokenizer", "0" * 64), "another text tokenizer"),
        (change_identity("scale_schedules", [[[1, 1], [2, 2], [4, 4]]]), "another scale schedules"),
        (change_identity("levels", {"24": 2}), "another levels"),
        (change_identity("code_offset", 151_936), "another code offset: 151936 there"),
        (change_identity("condition_last_scale", False), "another condition last scale"),
    ],
)
def test_what_is_refused_and_by_what_name(damaged, data_model, tiny_processor, damage, message):
    PackedDataset(damaged, data_model, tiny_processor)
    damage(damaged)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PackedDataset(damaged, data_model, tiny_processor)


def test_a_machine_hashes_its_shards_once(damaged, data_model, tiny_processor, monkeypatch):
    """By its first process, which ends the training for all of them."""
    hashed, hash_file = [], shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: (hashed.append(path), hash_file(path))[1])
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        before = len(hashed)
        PackedDataset(damaged, data_model, tiny_processor)
        assert (len(hashed) - before > 0) == (rank == "0")


def test_another_models_tokenizers_are_refused(packs, data_model, data_checkpoint, tiny_processor):
    other = copy.deepcopy(data_model)
    with torch.no_grad():
        other.model.vq_model.quantizer.pixel_codebook[3, 1] += 1e-3
    with pytest.raises(ValueError, match="another vision tokenizer"):
        PackedDataset(packs, other, tiny_processor)
    for owner, name, value in (
        (data_model.config.vq_config, "norm_groups", 1),
        (data_model.config.vq_config.semantic_config, "num_attention_heads", 1),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)  # which no tensor shows
        with pytest.raises(ValueError, match=f"another encoder: .*{name}"):
            PackedDataset(packs, data_model, tiny_processor)
        setattr(owner, name, before)
    with torch.no_grad():  # codes do not depend on the decoder
        other = copy.deepcopy(data_model)
        other.model.vq_model.pixel_decoder.conv_in.weight.zero_()
    PackedDataset(packs, other, tiny_processor)
    lower = NextFlowForConditionalGeneration.from_pretrained(data_checkpoint, dtype=torch.bfloat16)
    PackedDataset(packs, lower, tiny_processor)
    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)  # changes how the next call pads
    PackedDataset(packs, data_model, processor)
    processor.chat_template += " "
    with pytest.raises(ValueError, match="another text tokenizer"):
        PackedDataset(packs, data_model, processor)


def test_shards_of_before_the_encoders_settings_were_noted_are_taken(damaged, data_model, tiny_processor):
    edit_manifest(damaged, lambda manifest: manifest["identity"].pop("encoder"))
    assert len(PackedDataset(damaged, data_model, tiny_processor))
    change_identity("levels", {"24": 2})(damaged)
    with pytest.raises(ValueError, match="another levels"):
        PackedDataset(damaged, data_model, tiny_processor)


def test_sizes_are_compared_where_hashes_are_not(damaged):
    path = damaged / "data" / "packs-00001.arrow"
    flip(path)
    shards.open_shards(damaged, hashes=False)
    whole = path.read_bytes()
    for other in (whole[:-1], whole + b"0"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=f"packs-00001.arrow has {len(other)} bytes instead of {len(whole)}"):
            shards.open_shards(damaged, hashes=False)
    for name in ("nowhere", "./nowhere", "/no/where", "no/where/at/all"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder of shards {name}"):
            shards.open_shards(name)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("special_ids", {"boi": 1}, "TypeError"),
        ("levels", 3, "AttributeError"),
        ("scale_schedules", [], "ValueError"),
        ("condition_last_scale", None, "KeyError"),
    ],
)
def test_a_damaged_identity_is_named(name, value, error, extracted):
    identity = shards.read_manifest(extracted)["identity"] | {name: value}
    if value is None:
        del identity[name]
    with pytest.raises(ValueError, match=f"the identity of the shards is damaged: {error}: "):
        shards.sequence_spec(identity)


def test_codes_of_large_codebooks_have_room_and_columns_an_end():
    assert [shards.code_dtype(size) for size in (2, 2**16, 2**16 + 1)] == [np.uint16, np.uint16, np.int32]
    for size in (2**31, 2**31 + 1):
        rows = [{"flags": np.broadcast_to(np.uint8(0), size)}]
        with pytest.raises(ValueError, match=f"a shard's column holds {size} values, more than 2.31"):
            shards.write_shard(Path("nowhere"), rows, {"flags": pa.list_(pa.uint8())})


def test_verify_finds_codes_that_no_longer_decode(packs, data_checkpoint, tmp_path):
    assert verify(packs, data_checkpoint)["samples"] == 3
    folder = shutil.copytree(packs, tmp_path / "packs")
    off_by = lambda less: edit_manifest(folder, lambda manifest: manifest["samples"][1].update(error=error - less))  # noqa: E731
    error = shards.read_manifest(folder)["samples"][1]["error"]
    off_by(1.9)
    assert verify(folder, data_checkpoint, samples=2)["samples"] == 2
    off_by(2.1)
    with pytest.raises(ValueError, match="the vision tokenizer drifted"):
        verify(folder, data_checkpoint)


def with_ids(row: dict, place: int, value: int) -> None:
    row["input_ids"][place] = value


WRONG_ROWS = [
    (lambda row: with_ids(row, 0, -1), "holds ids outside of the"),
    (lambda row: with_ids(row, 0, 10**6), "holds ids outside of the"),
    (lambda row: row.update(supervised=row["supervised"][1:]), ".* or flags beside ids"),
    (lambda row: row.update(supervised=np.append(row["supervised"], 1)), ".* or flags beside ids"),
    (lambda row: row["image_codes"].__setitem__(1, 64), "holds the code 64, the codebook ends at 64"),
    (lambda row: row["image_input_codes"].__setitem__(1, 65), "holds the code 65, the codebook ends at 64"),
    (lambda row: row.update(image_grid_hw=row["image_grid_hw"][2:]), "shows other images than its grids name"),
    (
        lambda row: row.update(image_grid_hw=np.append(row["image_grid_hw"], [3, 3])),
        "shows other images than its grids",
    ),
    (lambda row: row.update(image_codes=np.append(row["image_codes"], 1)), "is malformed: codes are too many"),
    (lambda row: row.update(image_input_codes=np.append(row["image_input_codes"], 1)), "is malformed: codes are too "),
    (lambda row: row.update(image_codes=row["image_codes"][:-1]), "is malformed: "),
    (lambda row: row["image_grid_hw"].__setitem__(0, 5), "is malformed: no scale schedule ends in the grid"),
    (lambda row: row.update(num_tokens=row["num_tokens"] + 1), "has [0-9]+ tokens, its num_tokens is"),
    (lambda row: row.update(num_tokens=row["num_tokens"] - 1), "has [0-9]+ tokens, its num_tokens is"),
]


def test_verify_names_the_row_that_is_wrong(extracted, tmp_path):
    folder = tmp_path / "documents"
    for change, message in WRONG_ROWS:
        shutil.copytree(extracted, folder, dirs_exist_ok=True)
        rewrite(folder, 1, lambda rows, change=change: change(rows[1]))
        with pytest.raises(ValueError, match=f"^row 1 of documents-00001.arrow {message}"):
            verify(folder)
    shutil.copytree(extracted, folder, dirs_exist_ok=True)
    last = shards.read_manifest(folder)["identity"]["code_offset"] - 1
    for first, code in ((0, 0), (last, 63)):  # at the limits
        rewrite(folder, 1, lambda rows, first=first: with_ids(rows[1], 0, first))
        rewrite(folder, 1, lambda rows, code=code: rows[1]["image_codes"].__setitem__(1, code))
        assert verify(folder)["rows"] == 14
    for entry, message in (("tokens", "tokens, the manifest says"), ("rows", "has 5 rows, its manifest says")):
        for more in (-1, 1):
            shutil.copytree(extracted, folder, dirs_exist_ok=True)

            def miscount(manifest, entry=entry, more=more):
                (manifest["statistics"] if entry == "tokens" else manifest["shards"][0])[entry] += more

            edit_manifest(folder, miscount)
            with pytest.raises(ValueError, match=message):
                verify(folder)


@pytest.mark.parametrize("code", [-1, 70_000])
def test_verify_finds_codes_that_no_codebook_has(code, extracted, tmp_path):
    """Of a large one, whose codes have a sign."""
    folder = shutil.copytree(extracted, tmp_path / "documents")
    entries = shards.read_manifest(folder)["shards"]

    def enlarge(manifest):
        manifest["identity"]["codebook_size"] = 70_000
        manifest["shards"] = entries

    for wrong in (False, True):
        for place, entry in enumerate(entries):
            shard = shards.Shard(folder / "data" / entry["file"])
            rows = [shard.row(index) for index in range(len(shard))]
            if wrong and place == 1:
                drawn = next(row for row in rows if len(row["image_input_codes"]))
                drawn["image_input_codes"] = drawn["image_input_codes"].astype(np.int32)
                drawn["image_input_codes"][2] = code
            schema = shards.list_schema(70_000, packs=False)
            entries[place] = shards.write_shard(folder / "data" / entry["file"], rows, schema)
        edit_manifest(folder, enlarge)
        if not wrong:
            assert verify(folder)["rows"] == 14
    with pytest.raises(ValueError, match=f"documents-00001.arrow holds the code {code}, .* 70000"):
        verify(folder)


def test_extraction_of_another_model_is_not_packed_with_it(extracted, tmp_path):
    other = shutil.copytree(extracted, tmp_path / "other")
    change_identity("code_offset", 1000)(other)
    with pytest.raises(ValueError, match="was made with another code_offset than"):
        pack([extracted, other], tmp_path / "out", ComputeBudget(300), COST_MODEL)
    other = shutil.copytree(extracted, tmp_path / "of more variants")
    edit_manifest(other, lambda manifest: manifest.update(variants=3))
    with pytest.raises(ValueError, match="was made with another variants than"):
        pack([extracted, other], tmp_path / "out", ComputeBudget(300), COST_MODEL)
    with pytest.raises(ValueError, match="name at least one folder of documents to pack"):
        pack([], tmp_path / "out", ComputeBudget(300), COST_MODEL)


def test_several_folders_are_packed_as_one(extracted, data_checkpoint, tmp_path):
    """With the samples of all."""
    folders = [extracted, *(shutil.copytree(extracted, tmp_path / name) for name in ("second", "third"))]
    for folder in folders[1:]:
        edit_manifest(folder, lambda manifest, name=folder.name: manifest.update(of=name))
    third = {"row": 0, "image": 2, "error": 255.0}  # of a video
    edit_manifest(folders[1], lambda manifest: manifest["samples"][1].update(third))
    manifest = pack(folders, tmp_path / "packs", FixedLength(400), COST_MODEL, packs_per_shard=3)
    assert manifest["statistics"]["documents"] == 3 * 14 and len(manifest["samples"]) == 9
    assert verify(tmp_path / "packs", data_checkpoint)["samples"] == 8
    spec, (sample,) = (
        shards.sequence_spec(manifest["identity"]),
        [sample for sample in manifest["samples"] if sample["error"] == 255.0],
    )
    video, row = (
        shards.images_of(shards.Shard(path).row(row), spec, 2)
        for path, row in (
            (extracted / "data" / "documents-00001.arrow", 0),
            (tmp_path / "packs" / "data" / manifest["shards"][sample["shard"]]["file"], sample["row"]),
        )
    )
    assert len(video) == 3 and all(np.array_equal(*each) for each in zip(row[sample["image"]], video[2]))
    summary, whole = summarize(tmp_path / "packs"), summarize(extracted)
    assert summary["kinds"] == {kind: 3 * count for kind, count in whole["kinds"].items()}
    assert [summary[name] for name in ("images", "supervised images")] == [66, 3 * whole["supervised images"]]
    assert np.mean(summary["costs"]) == pytest.approx(manifest["statistics"]["mean cost"])
    assert summary["rows"] == len(summary["costs"]) == manifest["statistics"]["packs"]


@pytest.mark.parametrize("is_copy", [False, True])
def test_the_same_documents_are_not_packed_twice(extracted, tmp_path, is_copy):
    again = shutil.copytree(extracted, tmp_path / "again") if is_copy else extracted
    with pytest.raises(ValueError, match=f"^{again} holds the documents of {extracted}, name one of them$"):
        pack([extracted, again], tmp_path / "out", ComputeBudget(300), COST_MODEL)
    assert not (tmp_path / "out").exists()


def test_a_seed_below_zero_is_refused(extracted, data_checkpoint, tmp_path):
    for refused in (
        lambda: pack([extracted], tmp_path / "packs", ComputeBudget(300), COST_MODEL, seed=-1),
        lambda: contact_sheet(extracted, data_checkpoint, tmp_path / "sheet", seed=-1),
    ):
        with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
            refused()
    assert not list(tmp_path.iterdir())


# Plans


def random_extents(count: int, seed: int = 0) -> Extents:
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.lognormal(5, 1, count), 4000).astype(np.int64) + 1
    is_image = rng.random(count) < 0.4
    tokens[is_image] = 1000 + rng.integers(20, 200, is_image.sum())
    return Extents(tokens, tokens * (tokens + 1) // 2 + 30_000 * is_image, tokens // 2)


@pytest.mark.parametrize("strategy", [ComputeBudget(8192), FixedLength(8192), BatchPadding(8, 8192)], ids=repr)
@pytest.mark.parametrize("multiple_of", [1, 64])
def test_plans_hold_every_document_once(strategy, multiple_of):
    extents = random_extents(3000)
    planned = strategy.plan(extents, COST_MODEL, multiple_of, seed=0)
    assert sorted(document for members in planned for document in members) == list(range(3000))
    assert len(planned) % multiple_of == 0 and all(planned)
    if not strategy.padded:
        assert max(extents.num_tokens[members].sum() for members in planned) <= 8192


def of_any_cost(count: int) -> Extents:
    """Documents whose cost does not follow from their length."""
    rng = np.random.default_rng(0)
    return Extents(rng.integers(1, 4000, count), rng.integers(1, 10**7, count), rng.integers(1, 4000, count))


def extents_of(tokens, pairs=None, targets=None) -> Extents:
    return Extents(*(np.array(tokens if values is None else values) for values in (tokens, pairs, targets)))


@pytest.mark.parametrize(
    ("strategy", "extents", "multiple_of", "expected"),
    [
        (ComputeBudget(100, fill=1.0), extents_of([1] * 1000), 1, 11),  # at most 97% full
        (ComputeBudget(100), extents_of([51] * 105), 1, 105),  # no two of which find room in a pack
        (ComputeBudget(100), extents_of([51] * 106), 1, 106),  # which steps of 2% pass over
        (ComputeBudget(100), extents_of([51] * 105), 7, 105),
        (ComputeBudget(100, budget=10), extents_of([10] * 10), 1, 10),
        (ComputeBudget(100, budget=40), extents_of([10] * 100), 1, 25),
        (ComputeBudget(100, budget=30), extents_of([10] * 100), 1, 34),
        (ComputeBudget(100, budget=30), extents_of([10] * 100), 8, 40),
        (ComputeBudget(10_000), extents_of([1000] * 66, [130_000] + [15_000] * 65), 1, 9),  # 8.5 times the costliest
    ],
)
def test_as_few_packs_as_budget_and_length_allow(strategy, extents, multiple_of, expected):
    by_pairs = CostModel("blocks", 0.0, 1.0) if extents.attended_pairs[0] > 1000 else CostModel()
    assert len(strategy.plan(extents, by_pairs, multiple_of, seed=0)) == expected


def test_rows_are_filled_by_length_the_longest_documents_first():
    assert FixedLength(10).plan(extents_of([2, 7, 5, 3, 3]), CostModel(), 1, seed=0) == [[1, 3], [2, 4, 0]]


@pytest.mark.parametrize(
    ("packs", "lengths", "multiple_of", "expected"),
    [
        ([[0, 1, 2], [3]], [5, 1, 6, 20], 3, [[0, 1], [3], [2]]),
        ([[0, 1], [2, 3]], [1, 1, 5, 5], 3, [[0, 1], [2], [3]]),
        ([[0, 1], [2, 3, 4, 5]], [3, 3, 4, 4, 4, 4], 4, [[0, 1], [2], [4, 5], [3]]),
        ([[0, 1, 2, 3]], [1, 1, 1, 1], 4, [[0], [2], [1], [3]]),
        ([[0, 1]], [1, 9], 2, [[0], [1]]),
        ([[0, 1]], [1, 9], 1, [[0, 1]]),
    ],
)
def test_the_longest_packs_are_halved(packs, lengths, multiple_of, expected):
    assert split_to_multiple(packs, np.array(lengths), multiple_of) == expected


def test_figures_of_a_plan_by_hand():
    extents, costs = extents_of([3, 1, 2], [6, 1, 3], [1, 1, 2]), np.array([1.0, 3.0])
    figures = {"packs": 2, "documents": 3, "tokens": 6, "targets": 4, "longest pack": 4, "step efficiency": {}}
    figures |= {"mean cost": 2.0, "coefficient of variation of cost": 0.5}
    assert statistics([[0, 1], [2]], extents, costs, padded=True) == figures | {"padded positions": 2}
    assert statistics([[0, 1], [2]], extents, costs, padded=False) == figures | {"padded positions": 0}
    eight = statistics([[0]] * 8, extents, np.arange(8.0), padded=False)["step efficiency"]
    assert eight == {"8": 0.5} and efficiency(costs, 2) == pytest.approx(2 / 3)
    assert efficiency(np.ones(5), 2) == 1.0 and np.isnan(efficiency(np.ones(3), 4))


def test_a_document_goes_into_the_cheapest_pack_with_room():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        extents = Extents(rng.integers(1, 40, 60), rng.integers(1, 9, 60) * 100, rng.integers(0, 3, 60))
        planned = ComputeBudget(64, fill=0.97).plan(extents, COST_MODEL, 1, seed=0)
        costs = COST_MODEL.document_costs(*extents.of(slice(None)), row_length=64 * 0.97)
        filled, lengths, expected = [0.0] * len(planned), [0] * len(planned), [[] for _ in planned]
        for document in np.argsort(-costs, kind="stable").tolist():
            with_room = [n for n, length in enumerate(lengths) if length + extents.num_tokens[document] <= 64]
            cheapest = min(with_room, key=lambda pack: filled[pack])
            expected[cheapest].append(document)
            filled[cheapest] += costs[document]
            lengths[cheapest] += extents.num_tokens[document]
        assert planned == expected


def test_a_plans_work_grows_as_its_documents():
    """Also where packs are nearly full, of documents whose length and cost are independent."""

    def work_of(count: int) -> int:
        calls = 0

        def count_calls(frame, event, argument):
            nonlocal calls
            calls += 1

        extents = of_any_cost(count)
        sys.setprofile(count_calls)
        try:
            ComputeBudget(8192, fill=0.97).plan(extents, COST_MODEL, 1, seed=0)
        finally:
            sys.setprofile(None)
        return calls

    assert work_of(8000) < 5 * work_of(2000)


def test_budget_evens_out_what_ranks_wait_for():
    extents = random_extents(20_000)
    share = {}
    for strategy in (ComputeBudget(8192), FixedLength(8192), BatchPadding(8, 8192)):
        planned = strategy.plan(extents, COST_MODEL, 64, seed=0)
        share[type(strategy)] = efficiency(pack_costs(planned, extents, COST_MODEL, strategy.padded), 64)
    assert share[ComputeBudget] > 0.99 > share[FixedLength] > share[BatchPadding]


def test_flops_of_stored_extents_do_not_overflow():
    flops = CostModel.from_config(NextFlowConfig())  # 7B
    tokens = np.array([4000, 3000, 2000, 1000], dtype=np.int32)  # as shards hold them
    extents = Extents(tokens, tokens.astype(np.int64) ** 2 // 2, tokens)
    assert ComputeBudget(8000).plan(extents, flops, 2, seed=0) == [[0, 3], [1, 2]]
    assert flops.pack_cost(*extents.of([0])) > 4000 * 3 * 2 * 6.5e9


def test_under_dense_attention_the_budget_is_a_length():
    extents, dense = random_extents(5000), CostModel("dense", 1.0, 1e-2)
    planned = ComputeBudget(8192).plan(extents, dense, 64, seed=0)
    lengths = np.array([extents.num_tokens[members].sum() for members in planned])
    assert lengths.std() < 0.01 * lengths.mean()


def test_budgets_that_cannot_be():
    with pytest.raises(ValueError, match="budget 10 is below the costliest document's"):
        ComputeBudget(8192, budget=10.0).plan(random_extents(100), COST_MODEL, 1, seed=0)
    for strategy in (ComputeBudget(8192), FixedLength(8192)):
        with pytest.raises(ValueError, match="100 documents cannot fill 128 packs; lower multiple_of"):
            strategy.plan(random_extents(100), COST_MODEL, 128, seed=0)
    with pytest.raises(ValueError, match="100 documents cannot fill 105 packs; lower multiple_of"):
        ComputeBudget(100).plan(extents_of([51] * 100), CostModel(), 7, seed=0)


def test_a_binding_length_still_gives_every_document_a_pack():
    extents = random_extents(3000)
    planned = ComputeBudget(4200, fill=1.0).plan(extents, COST_MODEL, 8, seed=0)
    lengths = np.array([extents.num_tokens[members].sum() for members in planned])
    assert lengths.max() <= 4200 and lengths.mean() > 0.9 * 4200


def test_ranks_wait_for_the_costliest_document_so_the_others_hold_as_much():
    tokens = np.array([4000, *[100] * 440])
    extents = Extents(tokens, tokens * (tokens + 1) // 2, tokens)
    by_pairs = CostModel("blocks", 1.0, 0.01)  # the first costs 84,020, all others together 66,220
    planned = ComputeBudget(8192).plan(extents, by_pairs, 1, seed=0)
    assert [0] in planned and len(planned) == 7  # 8 at 6,144 positions each; in 6 the last go beside the first
    assert len(ComputeBudget(8192).plan(extents, CostModel("blocks", 1.0), 1, seed=0)) == 8  # where no pair costs


@pytest.mark.parametrize("seed", range(5))
def test_each_document_joins_the_cheapest_pack_with_room(seed):
    rng = np.random.default_rng(seed)
    tokens = 100 * rng.integers(1, 20, 300)  # in no order under costs by pairs
    extents = Extents(tokens, rng.integers(1, 10**6, 300), tokens)
    by_pairs = CostModel("blocks", 0.0, 1.0)
    planned = ComputeBudget(4200, fill=1.0).plan(extents, by_pairs, 1, seed=0)
    costs = by_pairs.document_costs(*extents.of(slice(None)), row_length=4200)
    held, filled, rooms = [[] for _ in planned], [0.0] * len(planned), [4200] * len(planned)
    for document in np.argsort(-costs, kind="stable").tolist():
        with_room = [number for number in range(len(planned)) if rooms[number] >= extents.num_tokens[document]]
        number = min(with_room, key=filled.__getitem__)
        held[number].append(document)
        filled[number] += costs[document]
        rooms[number] -= extents.num_tokens[document]
    assert planned == held


def test_cost_models_by_hand():
    tokens, pairs, targets = np.array([10, 4]), np.array([70, 12]), np.array([3, 2])
    blocks = CostModel("blocks", 1.0, 10.0, 100.0, 1000.0, 7.0)
    dense = CostModel("dense", 1.0, 10.0, 100.0, 1000.0, 7.0)
    rest = 100 * 5 + 2000 + 7
    assert blocks.pack_cost(tokens, pairs, targets) == 14 + 10 * 82 + rest
    assert dense.pack_cost(tokens, pairs, targets) == 14 + 10 * 14**2 + rest
    assert dense.pack_cost(tokens, pairs, targets, padded=True) == 20 + 10 * 2 * 10**2 + rest
    assert blocks.pack_cost(tokens, pairs, targets, padded=True) == 20 + 10 * (82 + 6**2 // 2) + rest
    assert CostModel().pack_cost(tokens, pairs, targets) == 14
    of_each = [model.document_costs(tokens, pairs, targets, row_length=20.0).tolist() for model in (blocks, dense)]
    assert of_each[0] == [10 + 10 * 70 + 100 * 3 + 1000, 4 + 10 * 12 + 100 * 2 + 1000]
    assert of_each[1] == [10 + 10 * 10 * 20 + 100 * 3 + 1000, 4 + 10 * 4 * 20 + 100 * 2 + 1000]
    for model in (dense, CostModel()):
        assert CostModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    with pytest.raises(ValueError, match="version 0"):
        CostModel.from_dict(dense.to_dict() | {"version": 0})
    rng = np.random.default_rng(0)
    measures = np.array([blocks.measures(*rng.integers(1, 50, (3, 1 + n % 7))) for n in range(30)])
    fitted = CostModel.fit(measures, measures @ blocks.coefficients, "blocks", {})
    assert np.allclose(fitted.coefficients, blocks.coefficients, rtol=1e-6)


def test_flops_of_a_position_are_six_of_each_weight(tiny_model):
    """Two forward, and twice that backward; a pair is two products as wide as the heads, in every layer."""
    costs, text = CostModel.from_config(tiny_model.config), tiny_model.config.text_config
    layers = tiny_model.model.language_model.layers
    assert costs.per_token == 6 * sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    assert costs.per_pair == 3 * 4 * text.hidden_size * text.num_hidden_layers
    assert costs.per_target == 6 * text.hidden_size * (tiny_model.config.text_vocab_size + 64)


def test_long_documents_are_an_error_or_counted(extracted, tmp_path):
    folder, manifest = shards.open_shards(extracted)
    files = [shards.Shard(folder / "data" / entry["file"]) for entry in manifest["shards"]]
    rows = [shard.row(index) for shard in files for index in range(len(shard))]
    longest = max(rows, key=lambda row: row["num_tokens"])
    assert longest is not rows[0]
    message = f"document {longest['key']} has {longest['num_tokens']}:"
    with pytest.raises(ValueError, match=message):
        pack([extracted], tmp_path / "e", FixedLength(longest["num_tokens"] - 1), COST_MODEL)
    assert pack([extracted], tmp_path / "f", FixedLength(longest["num_tokens"]), COST_MODEL)
    with pytest.raises(ValueError, match="there is no document to pack"):
        pack([extracted], tmp_path / "d", FixedLength(1), COST_MODEL, drop_long=True)
    with pytest.raises(ValueError, match="longer than 60 positions, document .* has"):
        pack([extracted], tmp_path / "a", FixedLength(60), COST_MODEL)
    statistics = pack([extracted], tmp_path / "b", FixedLength(60), COST_MODEL, drop_long=True)["statistics"]
    assert statistics["dropped documents"] > 0 and statistics["documents"] + statistics["dropped documents"] == 14
    whole = pack([extracted], tmp_path / "c", FixedLength(300), COST_MODEL)["statistics"]
    assert statistics["tokens"] + statistics["dropped tokens"] == whole["tokens"]


def test_text_share(extracted, tmp_path, caplog):
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"text_share must lie in \[0, 1\), got {share}"):
            pack([extracted], tmp_path / f"of {share}", FixedLength(300), COST_MODEL, text_share=share)
    with pytest.raises(ValueError, match="text_share 0.9 asks for"):
        pack([extracted], tmp_path / "a", FixedLength(300), COST_MODEL, text_share=0.9)
    statistics = pack([extracted], tmp_path / "b", FixedLength(300), COST_MODEL, text_share=0.0)["statistics"]
    assert statistics["text left out"] == 2 and statistics["documents"] == 12
    whole = pack([extracted], tmp_path / "c", FixedLength(300), COST_MODEL)["statistics"]["tokens"]
    share = 1 - statistics["tokens"] / whole  # all that there is
    assert (
        pack([extracted], tmp_path / "d", FixedLength(300), COST_MODEL, text_share=share)["statistics"][
            "text left out"
        ]
        == 0
    )
    assert "positions of text" not in caplog.text
    with pytest.raises(ValueError, match="of other documents, there are 0: at most 0.000"):
        pack([pictures_alone(extracted, tmp_path)], tmp_path / "e", FixedLength(300), COST_MODEL, text_share=0.1)


def pictures_alone(extracted, tmp_path) -> Path:
    folder = shutil.copytree(extracted, tmp_path / "pictures")
    for number in range(3):
        rewrite(
            folder, number, lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["kind"] != "text"])
        )
    return folder


def test_a_share_of_text_that_its_documents_are_too_long_for_is_told(extracted, tmp_path, caplog):
    """Two, of which the first drawn has more than is wanted, or both together have."""
    whole = pack([extracted], tmp_path / "a", FixedLength(300), COST_MODEL)["statistics"]
    others = pack([extracted], tmp_path / "b", FixedLength(300), COST_MODEL, text_share=0.0)["statistics"]["tokens"]
    both = whole["tokens"] - others
    few, most = 0.1 * both, 0.9 * both
    with pytest.raises(ValueError, match=f"asks for {few:.0f} positions .* beside {others} .* has [0-9]+ alone"):
        pack([extracted], tmp_path / "c", FixedLength(300), COST_MODEL, text_share=few / (few + others))
    assert "positions of text" not in caplog.text
    packed = pack([extracted], tmp_path / "d", FixedLength(300), COST_MODEL, text_share=most / (most + others))
    kept = packed["statistics"]["tokens"] - others
    assert 0 < kept < most and packed["statistics"]["text left out"] == 1
    assert f"{kept} positions of text are packed instead of {most:.0f}" in caplog.text


# Loading


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_continues_after_any_batch(packs, data_model, tiny_processor, world_size, workers):
    dataset = PackedDataset(packs, data_model, tiny_processor)
    dataset.set_epoch(2)
    start = 1
    for rank in range(world_size):
        sampler = PackSampler(len(dataset), seed=4, epoch=2, rank=rank, world_size=world_size)
        whole = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=PackCollator(dataset)))
        sampler.set_epoch(2, start)
        assert len(sampler) == len(whole) - start
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackCollator(dataset), num_workers=workers)
        rest = list(loader)
        assert len(rest) == len(whole) - start > 0
        for batch, expected in zip(rest, whole[start:]):
            assert batch.keys() == expected.keys()
            layouts = [vars(each.pop("layout")) for each in (batch, expected)]
            layouts = [layout | layout.pop("taps")._asdict() for layout in layouts]
            for ours, theirs in ((batch, expected), layouts):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_share_every_pack_of_an_epoch():
    for world_size in (1, 2, 3):
        samplers = [PackSampler(12, seed=1, epoch=5, rank=rank, world_size=world_size) for rank in range(world_size)]
        steps = list(zip(*samplers))
        order = [pack for step in steps for (pack,) in step]
        assert sorted(order) == list(range(12))
        assert order == [pack for (pack,) in PackSampler(12, seed=1, epoch=5)], "whatever the number of ranks"
    assert order != [pack for (pack,) in PackSampler(12, seed=1, epoch=6)]
    assert list(PackSampler(12)) == list(PackSampler(12, 1, 0, 0, 0, 1, 0))
    for rank in (-1, 3):
        with pytest.raises(ValueError, match=rf"rank must lie in \[0, 3\), got {rank}"):
            PackSampler(12, rank=rank, world_size=3)
    with pytest.raises(
        ValueError, match="12 packs do not divide by batch size 2 x 5 ranks: pack with --multiple-of 10$"
    ):
        PackSampler(12, batch_size=2, world_size=5)


def test_batches_of_several_packs_begin_where_they_are_told():
    samplers = [PackSampler(24, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    whole = [list(sampler) for sampler in samplers]
    assert sorted(pack for batches in whole for batch in batches for pack in batch) == list(range(24))
    for start in range(4):
        for sampler, batches in zip(samplers, whole):
            sampler.set_epoch(0, start)
            assert list(sampler) == batches[start:] and len(sampler) == 3 - start
    for start in (-1, 4):
        with pytest.raises(ValueError, match=rf"start must lie in \[0, 3\], got {start}"):
            samplers[0].set_epoch(0, start)


def test_a_batch_of_packs_is_what_the_model_takes(packs, data_model, tiny_processor):
    dataset = PackedDataset(packs, data_model, tiny_processor)
    batch = PackCollator(dataset)([dataset[0], dataset[1]])
    loss = data_model(**batch, use_cache=False).loss
    assert torch.isfinite(loss) and batch["input_ids"].shape[0] == 2
    length = batch["input_ids"].shape[1]
    longer = PackCollator(dataset, pad_to=length + 7)([dataset[0], dataset[1]])
    assert longer["input_ids"].shape == longer["document_ids"].shape == (2, length + 7)
    torch.testing.assert_close(data_model(**longer, use_cache=False).loss, loss)
    for name, fill in (("input_ids", dataset.spec.special.pad), ("document_ids", -1), ("shift_labels", IGNORE)):
        assert (longer[name][:, length:] == fill).all()
    assert PackCollator(dataset, pad_to=length)([dataset[0], dataset[1]])["input_ids"].shape[1] == length
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"^pack {index} of 6$"):
            dataset[index]
    with pytest.raises(ValueError, match=f"a row has {length} positions, more than pad_to={length - 1}"):
        PackCollator(dataset, pad_to=length - 1)([dataset[0], dataset[1]])


# Hub layout


def test_datasets_reads_the_folder(packs):
    table = datasets.load_dataset(str(packs), split="train")
    assert len(table) == 6 and table.features["image_codes"].feature.dtype == "uint16"
    assert {key for keys in table["keys"] for key in keys} == {document.key for document in documents()}


@pytest.fixture(scope="module")
def from_the_hub(packs, data_checkpoint, tmp_path_factory) -> list[str]:
    """What a fresh process prints that creates a repository, uploads to it, commits, downloads and examines."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(packs, folder / "packs")
    (folder / "packs" / "work").mkdir()
    (folder / "packs" / "work" / "notes.txt").write_text("mine")
    script = f"""
from transformers_nextflow.cli import main
from transformers_nextflow.data import push_to_hub
from transformers_nextflow.data.shards import open_shards
from transformers_nextflow.doctor import examination

push_to_hub("packs", "someone/packs")
print(push_to_hub("packs", "someone/packs"))  # again, where they are
folder, manifest = open_shards("someone/packs", "packs")
print(folder)
try:
    open_shards("someone/packs", "documents")
except ValueError as error:
    print(error)
examination.MEANS = ()
main(["doctor", {data_checkpoint!r}, "someone/packs", "--json"])
"""
    with hub_stand_in() as hub:
        return run_fresh(script, folder, **hub.environment).split("\n", 3)


def test_shards_go_to_the_hub_and_come_back(packs, from_the_hub):
    """What was left of the work stays behind."""
    name, folder, refusal, _ = from_the_hub
    assert "someone/packs" in name and "holds packs, not documents" in refusal
    sent = {path.relative_to(packs) for path in packs.rglob("*") if path.is_file()}
    came = {path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()}
    assert came - {Path(".gitattributes")} == sent and Path(folder) != packs
    assert all((Path(folder) / path).read_bytes() == (packs / path).read_bytes() for path in sent)


def test_the_doctor_examines_shards_on_the_hub(from_the_hub):
    findings = json.loads(from_the_hub[-1])["findings"]
    (files,) = (finding for finding in findings if finding["check"] == "files")
    assert files["severity"] == "ok"


# Command line


def test_one_command_each(document_source, data_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", data_checkpoint]
    assert main(["data", "extract", document_source.name, "--output", "documents", "--variants", "2", *model]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["shards", "1"]
    assert main(["data", "pack", "documents", "--output", "packs", "--length", "400", *model]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["shards", "1"]
    assert main(["data", "verify", "packs", *model]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["samples", "1"]
    assert main(["data", "inspect", "packs", *model]) == 0
    assert {"images": "22"}.items() <= dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines()
    ).items()
    assert main(["data", "verify", "packs", "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1
    assert main(["data", "inspect", "packs", "--output", "sheet", "--json", *model]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["images"] == 22 and summary["kinds"]["editing"] == 2
    page = (tmp_path / "sheet" / "index.html").read_text()
    assert "text-to-image" in page and page.count("<section>") == 12
    assert Image.open("sheet/sheet.png").width > 300 and Image.open("sheet/costs.png").width == 640
    flip(tmp_path / "packs" / "data" / "packs-00000.arrow")
    assert main(["data", "verify", "packs", *model]) == 2
    assert "packs-00000.arrow is damaged" in capsys.readouterr().err


@pytest.fixture
def calls(monkeypatch) -> list:
    """What a command calls a function of this package with, which then does nothing."""
    calls = []
    for module, name in ((extraction, "extract"), (packing, "pack"), (inspection, "contact_sheet")):
        bind = signature(getattr(module, name)).bind

        def call(*args, bind=bind):
            bound = bind(*args)
            calls.append(bound.arguments | {"omitted": bound.signature})
            return {"statistics": {}, "shards": [], "costs": []}

        monkeypatch.setattr(module, name, call)
    return calls


def test_options_of_extraction_are_the_functions(calls, tiny_checkpoint, monkeypatch, capsys):
    model = ["--model", str(tiny_checkpoint)]

    def extracted_by(*words) -> dict:
        assert main(["data", "extract", "photos", "--output", "out", *words, *model]) == 0
        return calls.pop()

    plain = extracted_by()
    assert plain["settings"] == ExtractionSettings() and plain["source"] == Source("photos")
    assert plain["devices"] == ["cpu"]
    for name in ("num_proc", "engine"):
        assert plain[name] == plain["omitted"].parameters[name].default
    words = "--task captioning --columns text=a=b --columns image=photo --level 24 --max-images 2 --min-size 3 "
    words += "--max-aspect-ratio 4 --min-text 5 --max-text 6 --invert-share 0.1 --drop-text 0.2 --drop-condition 0.3 "
    words += "--correction-probability 0.4 --correction-share 0.5 --correction-top-k 7 --correction-temperature 0.6 "
    words += "--variants 8 --batch-size 9 --documents-per-shard 10 --seed 11 --devices a --devices b --split test"
    given, correction = extracted_by(*words.split()), SelfCorrection(0.4, 0.5, 7, 0.6)
    columns = {"text": "a=b", "image": "photo"}
    settings = ("captioning", columns, "24", 2, 3, 4.0, 5, 6, 0.1, 0.2, 0.3, correction, 8, 11, 9, 10)
    assert given["settings"] == ExtractionSettings(*settings)
    assert given["devices"] == ["a", "b"] and given["source"] == Source("photos", "test")
    assert extracted_by("--no-self-correction")["settings"] == ExtractionSettings(self_correction=None)
    for cores, words, workers in (
        (None, (), 0),
        (1, (), 0),
        (8, (), 7),
        (64, (), 8),
        (8, ("--num-proc", "2"), 3),
        (8, ("--num-proc", "0"), 7),
        (8, ("--num-workers", "3"), 3),
        (8, ("--engine", "ray"), 0),
    ):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert extracted_by(*words)["num_workers"] == workers
    assert main(["data", "extract", "photos", "--output", "out", "--columns", "a", "--columns", "b", *model]) == 2
    assert "--columns reads NAME=COLUMN, got a" in capsys.readouterr().err


def test_options_of_packing_are_the_functions(calls, tiny_checkpoint, tiny_model, tmp_path):
    def packed_by(*words) -> dict:
        assert main(["data", "pack", "documents", "--output", "out", *words, "--model", str(tiny_checkpoint)]) == 0
        return calls.pop()

    plain, flops = packed_by(), CostModel.from_config(tiny_model.config)
    assert plain["strategy"] == ComputeBudget(16_384) and plain["cost_model"] == flops
    for name in ("multiple_of", "text_share", "drop_long", "seed", "packs_per_shard"):
        assert plain[name] == plain["omitted"].parameters[name].default
    (tmp_path / "costs.json").write_text(json.dumps(COST_MODEL.to_dict()))
    words = "--multiple-of 2 --text-share 0.25 --drop-long --seed 3 --packs-per-shard 4 --length 5 --budget 6"
    given = packed_by(*words.split(), "--cost-model", str(tmp_path / "costs.json"))
    assert list(given.values())[2:-1] == [ComputeBudget(5, 6.0), COST_MODEL, 2, 0.25, True, 3, 4]
    assert packed_by("--strategy", "padding")["strategy"] == BatchPadding(8, 16_384)
    given = packed_by("--strategy", "length", "--length", "5", "--backend", "dense")
    assert given["strategy"] == FixedLength(5) and given["cost_model"].backend == "dense"
    assert main(["data", "inspect", "packs", "--output", "sheet", "--model", str(tiny_checkpoint)]) == 0
    for name in ("count", "seed"):
        assert calls[0][name] == calls[0]["omitted"].parameters[name].default


def test_a_summary_counts_what_the_documents_have(extracted, packs):
    made, summary = documents(), summarize(extracted)
    images = [image for document in made for image in document.images]
    assert summary["kinds"] == dict.fromkeys((document.kind for document in made), 2)
    grids = Counter(
        {(40, 40): "3x3", (30, 60): "4x2", (60, 30): "2x4"}[Image.open(BytesIO(image)).size] for image in images
    )
    assert summary["final grids"] == grids and summary["images"] == len(images) == 22
    assert summary["supervised images"] == sum(sum(document.supervised_images) for document in made)
    assert (summary["rows"], summary["shards"], summary["content"]) == (14, 3, "documents")
    assert summary["statistics"]["images"] == 22 and sum(summary["costs"]) == summary["statistics"]["tokens"]
    lengths = np.percentile(summary["costs"], [0, 10, 50, 90, 100]).astype(int)
    assert summary["length of a row, quantiles"] == dict(zip(("0", "10", "50", "90", "100"), lengths))
    files = [shards.Shard(path) for path in (extracted / "data").iterdir()]
    assert (
        summary["text tokens"]
        == sum(len(each.row(row)["input_ids"]) for each in files for row in range(len(each))) - 22
    )
    together = summarize(packs)
    for name in ("kinds", "final grids", "images", "supervised images", "text tokens"):
        assert together[name] == summary[name]


def coloured(size: tuple[int, int], colour: str) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_sheet_has_pictures_of_one_edge_above_their_texts():
    """Three documents in a row, as wide as the most pictures; five lines of text."""
    first, many = [coloured((24, 24), "red"), coloured((32, 16), "green"), coloured((1, 400), "blue")], []
    texts = ["a red circle\n\n" + "x" * 200 + "\nmore\nand more", "one", "two", "three"]
    sheet = draw_sheet(list(zip(texts, [first, many, many, [coloured((1, 1), "black")]])))
    expected = coloured((3 * 408, 2 * 212), "white")
    pen, font = ImageDraw.Draw(expected), ImageFont.load_default(12)
    expected.paste("red", (6, 6, 134, 134))
    expected.paste("green", (138, 6, 266, 70))
    expected.paste("blue", (270, 6, 271, 134))
    expected.paste("black", (6, 218, 134, 346))
    lines = ["a red circle", "", *("x" * 56 for _ in range(3))]
    pen.multiline_text((6, 138), "\n".join(lines), "#222222", font)
    for place, text in (((414, 138), "one"), ((822, 138), "two"), ((6, 350), "three")):
        pen.multiline_text(place, text, "#222222", font)
    assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    assert draw_sheet([]).size == draw_sheet([("one", first[:1])]).size == (3 * 268, 212)
    assert draw_sheet([("one", first[:1])] * 4, edge=8, columns=2).size == (2 * 28, 2 * 92)


@pytest.mark.parametrize(
    ("costs", "end", "bars", "title"),
    [
        ([0.1, 0.1, 0.1, 0.5], 2.5, {8: 1, 39: 1 / 3}, "cost of 4 rows over their mean, at most 2.50"),
        ([3.0, 3.0], 2.0, {20: 1}, "cost of 2 rows over their mean, at most 1.00"),
        ([], 2.0, {20: 1}, "cost of 0 rows over their mean, at most 1.00"),
        ([0.0], 2.0, {0: 1}, "cost of 1 rows over their mean, at most 0.00"),
    ],
)
def test_costs_are_drawn_over_their_mean(costs, end, bars, title):
    expected = coloured((640, 320), "white")
    pen, font = ImageDraw.Draw(expected), ImageFont.load_default(12)
    for place in range(40):
        left = 40 + 14.5 * place
        pen.rectangle([left, 280 - 250 * bars.get(place, 0), left + 13.5, 280], "#4477aa")
    for place in range(5):
        pen.text((40 + 145 * place, 284), f"{end * place / 4:.2g}", "#222222", font)
    pen.text((40, 8), title, "#222222", font)
    assert np.array_equal(np.asarray(draw_costs(costs)), np.asarray(expected))


def test_contact_sheet_shows_the_decoded_inputs(extracted, data_checkpoint, data_model, tmp_path):
    from transformers_nextflow.data.shards import Shard, decodable_codes, images_of, read_manifest, sequence_spec

    contact_sheet(extracted, data_checkpoint, tmp_path, count=14)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    manifest = read_manifest(extracted)
    row = Shard(extracted / "data" / "documents-00000.arrow").row(1)
    ((grid, targets, inputs),) = images_of(row, sequence_spec(manifest["identity"]), manifest["variants"])
    decoded = data_model.model.vq_model.decode(torch.from_numpy(decodable_codes(targets, inputs)[None]), grid)[0]
    picture = Image.fromarray(((decoded + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    shown = np.asarray(picture.resize((128, 64)))
    starts = np.argwhere((sheet == shown[0, 0]).all(axis=-1))
    assert any(np.array_equal(sheet[y : y + 64, x : x + 128], shown) for y, x in starts), "the picture is on the sheet"
    contact_sheet(extracted, data_checkpoint, tmp_path / "few", count=3)
    assert (tmp_path / "few" / "index.html").read_text().count("<section>") == 3


def test_packs_go_to_workers_that_are_spawned(packs, data_model, tiny_processor):
    """Which get them, and what makes batches of them, pickled."""
    dataset = PackedDataset(packs, data_model, tiny_processor)
    dataset[0]  # with a shard open
    sent, collate = pickle.loads(pickle.dumps((dataset, PackCollator(dataset))))
    expected, got = PackCollator(dataset)([dataset[0]]), collate([sent[0]])
    assert all(torch.equal(expected[name], got[name]) for name in expected if name != "layout")
