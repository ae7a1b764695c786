"""Documents coded when they are asked for are the ones that extraction stores."""

import copy
import dataclasses
import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from data_samples import SETTINGS, documents
from PIL import Image

from transformers_nextflow.data import CostModel, FixedLength, PackCollator, RawDocuments, Source, extract, pack
from transformers_nextflow.data.loading import PackReader, unfold
from transformers_nextflow.data.shards import Shard, open_shards
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments, load_stages


@pytest.fixture(scope="module")
def raw(document_source, data_checkpoint) -> RawDocuments:
    return RawDocuments(document_source, data_checkpoint, SETTINGS)


def test_items_are_what_extraction_stores(raw, extracted):
    folder, manifest = open_shards(extracted, "documents")
    shards = [Shard(folder / "data" / entry["file"]) for entry in manifest["shards"]]
    rows = [shard.row(place) for shard, entry in zip(shards, manifest["shards"]) for place in range(entry["rows"])]
    assert len(rows) == len(raw)
    for epoch in (0, 1):  # as many as there are stored variants
        raw.set_epoch(epoch)
        for index, row in enumerate(rows):
            picks = [epoch] * (len(row["image_grid_hw"]) // 2)
            stored = unfold(row, np.array([len(row["input_ids"])]), raw.spec, manifest["variants"], picks)
            item = raw[index]
            assert stored.keys() == item.keys()
            for name, values in stored.items():
                assert np.array_equal(values, item[name]), (row["key"], name)


def test_documents_go_to_workers_that_are_spawned(raw):
    raw.set_epoch(0)
    expected = raw[0]
    got = pickle.loads(pickle.dumps(raw))[0]
    assert expected.keys() == got.keys() and all(np.array_equal(expected[name], got[name]) for name in expected)


def test_self_correction_is_drawn_anew_in_every_epoch(raw):
    drawn = []
    for epoch in (5, 6, 5):
        raw.set_epoch(epoch)
        drawn.append(np.concatenate([raw[index]["image_input_codes"] for index in range(len(raw))]))
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


def test_the_trainer_takes_them(raw, data_model, tmp_path):
    model = data_model.__class__(data_model.config)
    model.load_state_dict(data_model.state_dict())
    values = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = NextFlowTrainingArguments(str(tmp_path), per_device_train_batch_size=7, disable_tqdm=True, **values)
    trainer = NextFlowTrainer(model, arguments, train_dataset=raw)
    trainer.train()
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert not torch.equal(model.lm_head.weight, data_model.lm_head.weight)


@pytest.mark.parametrize("collator", [None, PackCollator])
def test_a_stage_says_how_scales_weigh(collator, raw, data_model, tmp_path):
    model = copy.deepcopy(data_model)
    dataclasses.replace(load_stages()["ct"], level="24", scale_loss_alpha=2.0).prepare(model, raw)
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = NextFlowTrainer(model, arguments, collator and collator(raw), train_dataset=raw)
    weights = torch.cat([batch["layout"].weights for batch in trainer.get_train_dataloader()])
    expected = {1.0, *(weight for schedule in raw.spec.schedules.of_level(24) for weight in schedule.weights(2.0))}
    assert sorted(set(weights.tolist())) == pytest.approx(sorted(expected))


@pytest.mark.parametrize("level", [24, "24", None])
def test_levels_are_known_by_name_or_number(level, document_source, data_checkpoint, data_model, tmp_path):
    settings = dataclasses.replace(SETTINGS, level=level)
    raw = RawDocuments(document_source, data_checkpoint, settings)
    extract(document_source, data_checkpoint, tmp_path / "documents", settings)
    pack([tmp_path / "documents"], tmp_path / "packs", FixedLength(300), CostModel("blocks", 1.0, 3e-4, 0.5))
    packs = PackReader(*open_shards(tmp_path / "packs"), raw.spec)
    assert raw.levels == packs.levels == {"24"}
    stage = load_stages()["ct"]
    with pytest.raises(ValueError, match="the packs hold pictures of level 24: extract them anew"):
        stage.prepare(copy.deepcopy(data_model), raw, packs)
    dataclasses.replace(stage, level=level or "24").prepare(copy.deepcopy(data_model), raw, packs)


def test_a_row_that_extraction_would_skip_is_an_error_at_its_item(data_checkpoint, tmp_path):
    good = [document for document in documents() if document.kind == "captioning"]
    broken = dataclasses.replace(good[0], key="torn", images=(good[0].images[0][:60],))
    path = tmp_path / "documents.parquet"
    datasets.Dataset.from_list([good[1].to_row(), broken.to_row()]).to_parquet(str(path))
    raw = RawDocuments(Source(str(path)), data_checkpoint, SETTINGS)
    assert len(raw[0]["input_ids"])
    with pytest.raises(ValueError, match="torn: unreadable image: "):
        raw[1]
    many = datasets.Dataset.from_list([{"texts": [None, None], "images": [good[0].to_row()["images"][0]] * 2}])
    raw = RawDocuments(many, data_checkpoint, dataclasses.replace(SETTINGS, task="interleaved", max_images=1))
    with pytest.raises(ValueError, match="row 0 holds 2 documents, raw training takes one; extract it"):
        raw[0]


@pytest.mark.parametrize("where", ["apart", "in the messages", "both", "as loaded rows"])
def test_pictures_of_a_chat_stand_apart_or_in_its_messages(where, data_checkpoint, tmp_path):
    document = next(document for document in documents() if document.kind == "editing")
    row = document.to_row()
    expected = RawDocuments(datasets.Dataset.from_list([row]), data_checkpoint, SETTINGS)[0]
    pictures = iter(row["images"])
    for message in row["messages"] if where != "apart" else ():
        for item in message["content"]:
            item["image"] = next(pictures) if item["type"] == "image" else None
            item["image"] = item["image"] and Image.open(io.BytesIO(item["image"]["bytes"]))
    if where == "both":  # the first in its message, the others apart
        users = next(message for message in row["messages"] if message["role"] == "user")
        for item in users["content"][1:] + row["messages"][-1]["content"]:
            item["image"] = None
        row["images"] = row["images"][1:]
    elif where != "apart":
        del row["images"]
    table = datasets.Dataset.from_list([row])
    if where != "as loaded rows":
        table.to_parquet(str(tmp_path / "chats.parquet"))
        table = Source(str(tmp_path / "chats.parquet"))
    documents_again = RawDocuments(table, data_checkpoint, SETTINGS)
    documents_again.set_epoch(0)  # as at the beginning
    item = documents_again[0]
    for name, values in expected.items():
        assert np.array_equal(values, item[name]), name
