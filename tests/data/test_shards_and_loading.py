"""What damaged or foreign shards are refused for, plans of packs, the order of batches, the Hub's layout, pictures."""

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_samples import documents, edit_manifest
from PIL import Image
from torch.utils.data import DataLoader

from tests.fresh import run_fresh
from tests.hub_stand_in import hub_stand_in
from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.cli import main
from transformers_nextflow.data import (
    BatchPadding,
    ComputeBudget,
    CostModel,
    FixedLength,
    PackCollator,
    PackedDataset,
    PackSampler,
    pack,
    shards,
    verify,
)
from transformers_nextflow.data.inspection import contact_sheet
from transformers_nextflow.data.packing import Extents, efficiency, pack_costs

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


def change_identity(name: str, value):
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["identity"].__setitem__(name, value))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: flip(folder / "data" / "packs-00001.arrow"), "packs-00001.arrow is damaged: its sha256"),
        (lambda folder: (folder / "data" / "packs-00000.arrow").unlink(), "packs-00000.arrow is missing"),
        (lambda folder: (folder / "data" / "packs-00009.arrow").touch(), "does not name: packs-00009.arrow"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
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


def test_verify_finds_codes_that_no_longer_decode(packs, data_checkpoint, tmp_path):
    assert verify(packs, data_checkpoint)["samples"] == 3
    folder = shutil.copytree(packs, tmp_path / "packs")
    edit_manifest(folder, lambda manifest: manifest["samples"][1].update(error=-50.0))
    with pytest.raises(ValueError, match="the vision tokenizer drifted"):
        verify(folder, data_checkpoint)


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
    with pytest.raises(ValueError, match="100 documents cannot fill 128 packs; lower multiple_of"):
        ComputeBudget(8192).plan(random_extents(100), COST_MODEL, 128, seed=0)


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
    assert CostModel.from_dict(json.loads(json.dumps(dense.to_dict()))) == dense
    with pytest.raises(ValueError, match="version 0"):
        CostModel.from_dict(dense.to_dict() | {"version": 0})
    rng = np.random.default_rng(0)
    measures = np.array([blocks.measures(*rng.integers(1, 50, (3, 1 + n % 7))) for n in range(30)])
    fitted = CostModel.fit(measures, measures @ blocks.coefficients, "blocks", {})
    assert np.allclose(fitted.coefficients, blocks.coefficients, rtol=1e-6)


def test_long_documents_are_an_error_or_counted(extracted, tmp_path):
    with pytest.raises(ValueError, match="longer than 60 positions, document .* has"):
        pack([extracted], tmp_path / "a", FixedLength(60), COST_MODEL)
    statistics = pack([extracted], tmp_path / "b", FixedLength(60), COST_MODEL, drop_long=True)["statistics"]
    assert statistics["dropped documents"] > 0 and statistics["documents"] + statistics["dropped documents"] == 14
    whole = pack([extracted], tmp_path / "c", FixedLength(300), COST_MODEL)["statistics"]
    assert statistics["tokens"] + statistics["dropped tokens"] == whole["tokens"]


def test_text_share(extracted, tmp_path):
    with pytest.raises(ValueError, match="text_share 0.9 asks for"):
        pack([extracted], tmp_path / "a", FixedLength(300), COST_MODEL, text_share=0.9)
    statistics = pack([extracted], tmp_path / "b", FixedLength(300), COST_MODEL, text_share=0.0)["statistics"]
    assert statistics["text left out"] == 2 and statistics["documents"] == 12


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
    with pytest.raises(ValueError, match="12 packs do not divide by batch size 1 x 5 ranks: pack with --multiple-of"):
        PackSampler(12, world_size=5)


def test_a_batch_of_packs_is_what_the_model_takes(packs, data_model, tiny_processor):
    dataset = PackedDataset(packs, data_model, tiny_processor)
    batch = PackCollator(dataset)([dataset[0], dataset[1]])
    loss = data_model(**batch, use_cache=False).loss
    assert torch.isfinite(loss) and batch["input_ids"].shape[0] == 2
    length = batch["input_ids"].shape[1]
    longer = PackCollator(dataset, pad_to=length + 7)([dataset[0], dataset[1]])
    assert longer["input_ids"].shape == longer["document_ids"].shape == (2, length + 7)
    torch.testing.assert_close(data_model(**longer, use_cache=False).loss, loss)
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

print(push_to_hub("packs", "someone/packs"))
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
    assert main(["data", "pack", "documents", "--output", "packs", "--length", "400", *model]) == 0
    capsys.readouterr()
    assert main(["data", "verify", "packs", "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1
    assert main(["data", "inspect", "packs", "--output", "sheet", "--json", *model]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["images"] == 22 and summary["kinds"]["editing"] == 2
    assert "text-to-image" in (tmp_path / "sheet" / "index.html").read_text()
    assert Image.open("sheet/sheet.png").width > 300 and Image.open("sheet/costs.png").width == 640
    flip(tmp_path / "packs" / "data" / "packs-00000.arrow")
    assert main(["data", "verify", "packs", *model]) == 2
    assert "packs-00000.arrow is damaged" in capsys.readouterr().err


def test_contact_sheet_shows_the_decoded_inputs(extracted, data_checkpoint, data_model, tmp_path):
    from transformers_nextflow.data.inspection import contact_sheet
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


def test_packs_go_to_workers_that_are_spawned(packs, data_model, tiny_processor):
    """Which get them, and what makes batches of them, pickled."""
    dataset = PackedDataset(packs, data_model, tiny_processor)
    dataset[0]  # with a shard open
    sent, collate = pickle.loads(pickle.dumps((dataset, PackCollator(dataset))))
    expected, got = PackCollator(dataset)([dataset[0]]), collate([sent[0]])
    assert all(torch.equal(expected[name], got[name]) for name in expected if name != "layout")
