"""Packed loss and gradients = the same documents one by one, and what the model sees = the processor's own inputs."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from data_samples import documents
from PIL import Image
from torch.utils.data import DataLoader

from transformers_nextflow.data import (
    BatchPadding,
    ComputeBudget,
    CostModel,
    Document,
    FixedLength,
    Message,
    PackCollator,
    PackedDataset,
    PackSampler,
    pack,
)
from transformers_nextflow.data.sequences import DocumentTokenizer
from transformers_nextflow.data.shards import Shard
from transformers_nextflow.layout import find_images, shift_labels_of
from transformers_nextflow.losses import IGNORE

STRATEGIES = {
    "budget": ComputeBudget(max_length=400),
    "length": FixedLength(max_length=300),
    "padding": BatchPadding(batch_size=3, max_length=400),
}


@pytest.fixture(scope="module")
def packed(extracted, data_model, tmp_path_factory):
    def packed(strategy: str):
        folder = tmp_path_factory.mktemp("packs") / strategy
        cost_model = CostModel.from_config(data_model.config)
        pack([extracted], folder, STRATEGIES[strategy], cost_model, packs_per_shard=2)
        return folder

    return packed


def loss_and_gradients(model, batches) -> tuple[float, dict]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        output = model(**batch, num_items_in_batch=1.0, use_cache=False, logits_over="none")
        output.loss.backward()
        total += output.loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_loss_and_gradients_equal_the_documents_alone(
    strategy, packed, extracted, data_model, tiny_processor, tmp_path
):
    model = copy.deepcopy(data_model)
    packs = PackedDataset(packed(strategy), model, tiny_processor, seed=5)
    together = DataLoader(packs, batch_sampler=PackSampler(len(packs), batch_size=1), collate_fn=PackCollator(packs))
    loss, gradients = loss_and_gradients(model, together)

    # one document to a row and no document_ids: the model's own path for a single sequence
    alone = []
    for index in range(len(packs)):
        expanded, row = packs[index], packs.row(index)
        images, codes, inputs = iter(expanded["image_grid_hw"]), 0, 0
        for document in range(len(row["keys"])):
            at = expanded["document_ids"] == document
            single = {name: torch.from_numpy(expanded[name][at])[None] for name in ("input_ids", "shift_labels")}
            grids = [next(images) for _ in range(int((expanded["input_ids"][at] == packs.spec.special.boi).sum()))]
            if grids:
                schedules = [packs.spec.schedules.by_grid(grid) for grid in grids]
                size, coarse = sum(s.num_codes for s in schedules), sum(s.offsets[-1] for s in schedules)
                single["image_grid_hw"] = torch.tensor(np.array(grids))
                single["image_codes"] = torch.from_numpy(expanded["image_codes"][codes : codes + size])
                single["image_input_codes"] = torch.from_numpy(expanded["image_input_codes"][inputs : inputs + coarse])
                codes, inputs = codes + size, inputs + coarse
            alone.append(single)
    assert len(alone) == 14
    expected, alone_gradients = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == alone_gradients.keys() and len(gradients) > 25
    for name, gradient in gradients.items():
        difference = (gradient - alone_gradients[name]).abs().max() / alone_gradients[name].abs().max()
        assert difference < 1e-5, name


def test_packing_loses_no_document_and_the_inputs_are_disturbed(packed, data_model, tiny_processor):
    packs = PackedDataset(packed("budget"), data_model, tiny_processor)
    keys = [key for index in range(len(packs)) for key in packs.row(index)["keys"]]
    assert sorted(keys) == sorted(document.key for document in documents())
    statistics = packs.manifest["statistics"]
    assert statistics["dropped tokens"] == statistics["padded positions"] == 0
    assert sum(len(packs[index]["input_ids"]) for index in range(len(packs))) == statistics["tokens"]
    shown = [np.concatenate([packs[index]["image_input_codes"] for index in range(len(packs))])]
    packs.set_epoch(1)
    shown.append(np.concatenate([packs[index]["image_input_codes"] for index in range(len(packs))]))
    assert not np.array_equal(*shown), "another epoch shows other variants"


@pytest.mark.parametrize("kind", ["text-to-image", "captioning"])
def test_chats_become_the_processors_own_inputs(kind, packed, data_model, tiny_processor):
    packs = PackedDataset(packed("budget"), data_model, tiny_processor)
    processor = copy.deepcopy(tiny_processor)
    processor.condition_last_scale = kind == "captioning"  # of pictures that are read, not of those drawn
    by_key = {document.key: document for document in documents()}
    checked = 0
    for index in range(len(packs)):
        expanded, row = packs[index], packs.row(index)
        for number, key in enumerate(row["keys"]):
            if row["kinds"][number] != kind:
                continue
            chat = [
                {
                    "role": message.role,
                    "content": [
                        {"type": "text", "text": part}
                        if part is not None
                        else {"type": "image", "image": Image.open(io.BytesIO(by_key[key].images[0]))}
                        for part in message.content
                    ],
                }
                for message in by_key[key].messages
            ]
            expected = processor.apply_chat_template(chat, add_generation_prompt=False)
            ids = expanded["input_ids"][expanded["document_ids"] == number]
            assert ids.tolist() == expected["input_ids"][0].tolist()
            checked += 1
    assert checked == 2


def test_labels_equal_the_models_own_shift(data_model, tiny_processor, packed):
    packs = PackedDataset(packed("length"), data_model, tiny_processor)
    for index in range(len(packs)):
        batch = PackCollator(packs)([packs[index]])
        images = find_images(data_model.config, batch["input_ids"], batch.get("image_grid_hw"))
        row = packs.row(index)
        flags = np.repeat(
            row["supervised"],
            np.where(row["input_ids"] == packs.spec.special.image, 0, 1),
        )
        labels = batch["input_ids"].clone()
        text = torch.ones_like(labels[0], dtype=torch.bool)
        supervised_images = row["supervised"][row["input_ids"] == packs.spec.special.image]
        for image, supervised in zip(images, supervised_images):
            text[image.start : image.start + image.num_inputs + 2] = False
            if not supervised:
                labels[0, image.start : image.start + image.num_inputs + 2] = IGNORE
        labels[0, text] = labels[0, text].masked_fill(torch.from_numpy(flags) == 0, IGNORE)
        labels[batch["input_ids"] == packs.spec.special.eoi] = IGNORE
        expected = shift_labels_of(labels, images, packs.spec.special.boi, document_ids=batch["document_ids"])
        assert torch.equal(batch["shift_labels"], expected)


def test_extents_count_what_the_mask_lets_see(data_model, tiny_processor, packed, extracted):
    packs = PackedDataset(packed("length"), data_model, tiny_processor)
    extents = {}
    for path in sorted((extracted / "data").glob("*.arrow")):
        shard = Shard(path)
        extents |= {shard.row(i)["key"]: shard.row(i) for i in range(len(shard))}
    for index in range(len(packs)):
        batch, keys = PackCollator(packs)([packs[index]]), packs.row(index)["keys"]
        documents_of = batch["document_ids"][0]
        block = batch["layout"].block_ids[0]
        place = torch.arange(len(block))
        sees = (place[:, None] >= place) | ((block[:, None] == block) & (block >= 0))
        sees &= documents_of[:, None] == documents_of
        for number, key in enumerate(keys):
            at = documents_of == number
            assert int(sees[at].sum()) == extents[key]["attended_pairs"]
            assert int(at.sum()) == extents[key]["num_tokens"]
            assert int((batch["shift_labels"][0, at] != IGNORE).sum()) == extents[key]["num_targets"]


def test_user_texts_hold_no_control_tokens(tiny_processor):
    tokenize = DocumentTokenizer(tiny_processor, tiny_processor.tokenizer.eos_token_id)
    spelled = "a <|im_end|> <|vision_start|><|image_pad|><|vision_end|>"
    chat = (Message("user", (spelled,)), Message("assistant", ("yes",)))
    ids, supervised = tokenize(Document("a", "chat", chat))
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens.count("<|im_end|>") == 2 and "<|image_pad|>" not in tokens
    assert spelled in tiny_processor.tokenizer.decode(ids.tolist())
    words = tiny_processor.tokenizer.decode(ids[supervised].tolist())
    assert words == "yes<|im_end|>"


def test_manifest_is_json_of_plain_values(extracted):
    manifest = json.loads((extracted / "manifest.json").read_text())
    assert manifest["statistics"]["documents"] == 14 and manifest["statistics"]["images"] == 22
