"""Attention of packs document by document is attention under the whole mask."""

import pytest
import torch
from tiny_models import SQUARE, WIDE, Picture, batch_of, relative, tiny_config, tiny_model

from examples.emoji import attention
from examples.emoji.attention import DOCUMENTS

ROWS = [
    [[10, Picture(SQUARE, 1), 11, 12], [20, 21, 22], [Picture(WIDE, 2), 13, Picture(SQUARE, 3), 15]],
    [[Picture(WIDE, 4), 13, 14], [30], [16, Picture(SQUARE, 5), 17]],
]


def packed(model) -> dict:
    """Two rows of documents, the second with padding at its end."""
    batch = batch_of(model, *([part for document in row for part in document] for row in ROWS))
    lengths = [[batch_of(model, document)["input_ids"].shape[1] for document in row] for row in ROWS]
    numbers = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    missing = len(numbers[0]) - len(numbers[1])
    assert missing > 0
    batch["document_ids"] = torch.tensor([numbers[0], numbers[1] + [-1] * missing])
    batch["input_ids"][1] = batch["input_ids"][1].roll(-missing)
    del batch["attention_mask"]
    return batch | {"labels": batch["input_ids"].masked_fill(batch["document_ids"] < 0, -100)}


@pytest.mark.parametrize("queries", [6, 128], ids=["documents in parts", "documents as a whole"])
def test_logits_loss_and_gradients(queries, monkeypatch):
    """In compiled layers, as the recipe trains them, with keys and values that heads share."""
    monkeypatch.setattr(attention, "QUERIES", queries)
    results = []
    for name in ("sdpa", DOCUMENTS):
        model = tiny_model(tiny_config({"num_hidden_layers": 1})).double().train()
        model.set_attn_implementation({"text_config": name})
        for layer in model.model.language_model.layers if name == DOCUMENTS else ():
            layer.compile(backend="aot_eager", dynamic=False)
        batch = packed(model)
        output = model(**batch)
        output.loss.backward()
        gradients = [each.grad for each in model.model.language_model.parameters() if each.grad is not None]
        results.append([output.loss, output.logits[batch["document_ids"] >= 0], *gradients])
    assert len(results[0]) > 12
    for masked, documents in zip(*results, strict=True):
        assert relative(documents, masked) < 1e-7
