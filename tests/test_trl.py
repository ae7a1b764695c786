"""TRL's own trainers of text, by a model and by the path of one."""

import copy

import pytest
import torch

pytest.importorskip("trl", reason="the trainers are TRL's")

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.training import NextFlowDPOTrainer, NextFlowSFTTrainer

PAIRS = Dataset.from_list(
    [
        {"prompt": "How many circles are there?", "chosen": "There is one.", "rejected": "two small squares"},
        {"prompt": "Describe the picture.", "chosen": "a red circle", "rejected": "remove the star"},
    ]
)
TEXTS = Dataset.from_list([{"text": "There is one red circle"}, {"text": "a blue square"}])


def options(folder) -> dict:
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False}
    return {"output_dir": str(folder), **quiet, **steps}


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("by", ["model", "path", "adapter"])
def test_preferences(by, tiny_checkpoint, text_tokenizer, tmp_path):
    """The reference model is loaded again from where the model came from."""
    model = str(tiny_checkpoint) if by == "path" else NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    adapter = LoraConfig(target_modules=["q_proj"], r=2) if by == "adapter" else None
    data = {"train_dataset": PAIRS, "processing_class": text_tokenizer}
    trainer = DPOTrainer(model, args=DPOConfig(**options(tmp_path)), **data, peft_config=adapter)
    first, last = losses(trainer)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)  # model and reference agree
    assert by == "adapter" or last < first


def test_texts_by_a_path(tiny_checkpoint, text_tokenizer, tmp_path):
    args = SFTConfig(**options(tmp_path))
    trainer = SFTTrainer(str(tiny_checkpoint), args=args, train_dataset=TEXTS, processing_class=text_tokenizer)
    assert type(trainer.model) is NextFlowForConditionalGeneration
    first, last = losses(trainer)
    assert last < first


@pytest.mark.parametrize(
    "trls, ours, config, dataset",
    [(DPOTrainer, NextFlowDPOTrainer, DPOConfig, PAIRS), (SFTTrainer, NextFlowSFTTrainer, SFTConfig, TEXTS)],
)
def test_texts_are_trained_on_as_by_trl(trls, ours, config, dataset, tiny_checkpoint, text_tokenizer, tmp_path):
    def history(trainer_class) -> list[float]:
        model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
        args = config(**options(tmp_path))
        return losses(trainer_class(model, args=args, train_dataset=dataset, processing_class=text_tokenizer))

    assert history(ours) == history(trls)


def test_a_copy_of_a_model_in_training_has_weights_of_its_own(tiny_checkpoint, text_tokenizer, tmp_path):
    model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    args = SFTConfig(**options(tmp_path))
    SFTTrainer(model, args=args, train_dataset=TEXTS, processing_class=text_tokenizer)
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = model.eval()(**ids).logits
        model.lm_head.weight.zero_()
        assert torch.equal(copied(**ids).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "packed", [{"padding_free": True, "max_length": None}, {"packing": True}], ids=["free", "packed"]
)
def test_texts_that_share_a_row_do_not_see_each_other(packed, tiny_checkpoint, text_tokenizer, tmp_path):
    results = []
    for option in ({}, packed):
        model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
        args = SFTConfig(**options(tmp_path) | {"optim": "sgd", "learning_rate": 0.5} | option)
        trainer = SFTTrainer(model, args=args, train_dataset=TEXTS, processing_class=text_tokenizer)
        results.append((losses(trainer), torch.cat([weight.flatten() for weight in model.parameters()])))
    (alone, weights), (together, others) = results
    assert together == pytest.approx(alone, rel=1e-4)
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-6)


def test_answers_judged_one_by_one(tiny_checkpoint, text_tokenizer, tmp_path):
    judged = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in PAIRS
        for name in ("chosen", "rejected")
    ]
    model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    data = {"train_dataset": Dataset.from_list(judged), "processing_class": text_tokenizer}
    first, last = losses(KTOTrainer(model, args=KTOConfig(**options(tmp_path)), **data))
    assert first == pytest.approx(0.5, abs=1e-3) and last < first  # model and reference agree


def test_answers_with_rewards(tiny_checkpoint, text_tokenizer, tmp_path):
    """Written by the model itself, beside a reference model."""
    model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    before = model.lm_head.weight.detach().clone()
    reward = lambda completions, **kwargs: [float(len(set(text))) for text in completions]  # noqa: E731
    args = RLOOConfig(**options(tmp_path), num_generations=2, max_completion_length=4)
    data = {"train_dataset": PAIRS.select_columns(["prompt"]), "processing_class": text_tokenizer}
    losses(RLOOTrainer(model, reward, args=args, **data))
    assert not torch.equal(model.lm_head.weight, before)
