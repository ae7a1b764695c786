"""transformers' own Trainer on rows with pictures."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.tiny_models import EOS, SQUARE, WIDE, Picture, batch_of, tiny_model


class Rows(Dataset):
    """Items are whole batches of two rows."""

    def __init__(self, model):
        rows = ([10, Picture(SQUARE, 1), 11, EOS], [12, Picture(WIDE, 2), EOS], [13, 14, Picture(SQUARE, 3), EOS])
        self.batches = [batch_of(model, row, rows[0]) for row in rows]
        for batch in self.batches:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def test_evaluation_has_a_loss_and_metrics_of_logits(tmp_path):
    model, seen = tiny_model(), []

    def metrics(prediction) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.label_ids))}

    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = Rows(model)
    trainer = Trainer(model, arguments, lambda items: items[0], eval_dataset=rows, compute_metrics=metrics)
    result = trainer.evaluate()
    with torch.no_grad():
        counts = [
            int((rows[index]["labels"][:, 1:] != -100).sum()) for index in range(3)
        ]  # what the Trainer divides by
        outputs = [model(**rows[index], num_items_in_batch=count) for index, count in enumerate(counts)]
    assert result["eval_loss"] == pytest.approx(np.mean([output.loss.item() for output in outputs]), rel=1e-6)
    assert result["eval_rows"] == 6
    (prediction,) = seen
    length = outputs[0].logits.shape[1]
    np.testing.assert_allclose(prediction.predictions[:2, :length], outputs[0].logits.numpy(), rtol=1e-6)
    assert prediction.label_ids[:2, :length].tolist() == rows[0]["labels"].tolist()
