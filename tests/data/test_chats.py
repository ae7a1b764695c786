"""Chats of a dataset as batches, and TRL's trainers of answers and preferences on pictures."""

import copy
import inspect
import json
import math
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", reason="the trainers are TRL's")

from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from tiny_models import enlarge_
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig

from tests.fresh import run
from tests.ranks import on_ranks
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.data import ExtractionSettings, RawDocuments, Source
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import (
    ChatCollator,
    EMACallback,
    NextFlowDPOTrainer,
    NextFlowSFTTrainer,
    NextFlowTrainer,
    NextFlowTrainingArguments,
)
from transformers_nextflow.training.joint_head import add_joint_head
from transformers_nextflow.training.preferences import PreferenceCollator

ROOT = Path(__file__).parents[2]


def picture(color: str, width: int = 24) -> Image.Image:
    return Image.new("RGB", (width, 24), color)


def asks(*content) -> dict:
    return {"role": "user", "content": items(content)}


def answers(*content) -> dict:
    return {"role": "assistant", "content": items(content)}


def items(content) -> list[dict]:
    return [{"type": "text", "text": part} if part else {"type": "image"} for part in content]


CHATS = [
    {"messages": [asks("a red circle"), answers(None)], "images": [picture("red")]},
    {"messages": [asks(None, "Describe the picture."), answers("a blue square")], "images": [picture("blue", 40)]},
    {
        "messages": [asks(None, "make it blue"), answers("There is one.", None), asks("a star"), answers(None)],
        "images": [picture("red"), picture("blue", 40), picture("green")],
    },
]
PAIRS = [
    {
        "prompt": [asks("a red circle")],
        "chosen": [answers(None)],
        "rejected": [answers(None)],
        "images": [picture("red"), picture("blue")],
    },
    {
        "prompt": [asks(None, "make it blue")],
        "chosen": [answers("blue", None)],
        "rejected": [answers(None)],
        "images": [picture("red"), picture("blue", 40), picture("green")],
    },
]


@pytest.fixture
def model(data_checkpoint):
    return NextFlowForConditionalGeneration.from_pretrained(data_checkpoint)


def options(folder, **further) -> dict:
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    steps = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False}
    return {"output_dir": str(folder), **quiet, **steps, "max_length": None} | further


def logged(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_tokens_and_targets_are_those_of_shards(data_checkpoint, tiny_processor, tmp_path):
    """A batch's rows are the documents that extraction makes of the same chats."""
    Dataset.from_list(CHATS).to_parquet(str(tmp_path / "chats.parquet"))
    documents = RawDocuments(
        Source(str(tmp_path / "chats.parquet")), data_checkpoint, ExtractionSettings(self_correction=None)
    )
    batch = ChatCollator(tiny_processor)(CHATS)
    for row, document in enumerate(documents[index] for index in range(3)):
        real = batch["attention_mask"][row].bool()
        assert real.sum() == len(document["input_ids"])
        for name in ("input_ids", "shift_labels"):
            assert batch[name][row][real].tolist() == document[name].tolist()
        assert (batch["shift_labels"][row][~real] == -100).all()
    grids = [grid for index in range(3) for grid in documents[index]["image_grid_hw"].tolist()]
    assert batch["image_grid_hw"].tolist() == grids


@pytest.mark.parametrize("level, grid", [("low", [2, 2]), ("high", [3, 3]), (None, [3, 3])])
def test_pictures_are_brought_to_a_level(level, grid, tiny_processor):
    processor, levels = copy.copy(tiny_processor), {"low": 2, "high": 3}
    processor.image_processor = NextFlowImageProcessor(8, [[[1, 1], [2, 2], [3, 3]]], levels)
    assert ChatCollator(processor, level)(CHATS[:1])["image_grid_hw"].tolist() == [grid]


def test_both_forms_of_labels_are_the_same_targets(model, tiny_processor):
    batch = ChatCollator(tiny_processor)(CHATS)
    shifted = batch.pop("shift_labels")
    by_labels = model(**batch)
    batch.pop("labels")
    by_shifted = model(**batch, shift_labels=shifted)
    assert by_labels.loss == by_shifted.loss and torch.equal(by_labels.token_losses, by_shifted.token_losses)
    assert ((by_labels.token_losses > 0) == (shifted != -100)).all()


def test_collators_go_to_workers_that_are_spawned(tiny_processor):
    collator = ChatCollator(tiny_processor)
    expected, got = collator(CHATS), pickle.loads(pickle.dumps(collator))(CHATS)
    assert torch.equal(expected["input_ids"], got["input_ids"]) and expected.keys() == got.keys()


def test_prompts_with_completions_are_chats(tiny_processor):
    rows = [
        {"prompt": "a red circle", "completion": [answers(None)], "image": picture("red")},
        {"prompt": [asks(None, "Describe the picture.")], "completion": "a blue square", "images": [picture("blue")]},
    ]
    chats = [
        CHATS[0],
        {"messages": [asks(None, "Describe the picture."), answers("a blue square")], "images": [picture("blue")]},
    ]
    collator = ChatCollator(tiny_processor, pad_to_multiple_of=8)
    expected, got = collator(chats), collator(rows)
    assert expected["input_ids"].shape[1] % 8 == 0
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a red circle"}, {}, "row 0 must have messages, or a prompt and its completion, got text"),
        ({"prompt": "hi"}, {}, "row 0 must have messages, or a prompt and its completion, got prompt"),
        ({"completion": "hi"}, {}, "row 0 must have messages, or a prompt and its completion, got completion"),
        ({"messages": [asks("a red circle")]}, {}, "no message of the assistant"),
        ({"messages": [asks("hi"), answers(None)], "images": [picture("red")] * 2}, {}, "1 places .* 2 images"),
        ({"messages": [asks("hi"), answers(None)]}, {}, "1 places for images, and 0 images"),
        ({"messages": [asks("hi"), answers(None)], "images": ["red.png"]}, {}, "must hold PIL pictures, got .'str'"),
        (CHATS[0], {"max_length": 8}, "positions, more than max_length=8"),
        (CHATS[0], {"level": "7"}, "7"),
    ],
)
def test_errors_name_the_row(row, options, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        ChatCollator(tiny_processor, **options)([row])


def test_a_row_may_be_as_long_as_the_limit_and_is_padded_to_no_more(tiny_processor):
    rows = [CHATS[0] | {"messages": [asks("a large red circle"), answers(None)]}]
    whole = ChatCollator(tiny_processor)(rows)
    length = whole["input_ids"].shape[1]
    assert whole["attention_mask"].all() and length % 2
    limited = ChatCollator(tiny_processor, max_length=length)(rows)
    assert torch.equal(limited["input_ids"], whole["input_ids"])
    padded = ChatCollator(tiny_processor, pad_to_multiple_of=length - 1)(rows)
    assert padded["attention_mask"].tolist() == [[1] * length + [0] * (length - 2)]
    with pytest.raises(ValueError, match=f"row 0 has {length} positions, more than max_length={length - 1}"):
        ChatCollator(tiny_processor, max_length=length - 1)(rows)


def test_held_out_texts_alone_have_a_loss_of_text(model, tiny_processor, tmp_path):
    texts = [{"messages": [asks("hi"), answers("there is one")]}]
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    measured = NextFlowTrainer(model, args, ChatCollator(tiny_processor), eval_dataset=texts).evaluate()
    assert measured["eval_loss_text"] == pytest.approx(measured["eval_loss"])
    assert not [name for name in measured if "vision" in name or "scale" in name]


def test_a_prompt_is_added_only_where_an_answer_is_to_follow(tiny_processor):
    chat = [asks("a red circle")]
    asked = tiny_processor.apply_chat_template(chat, tokenize=False)
    assert asked == tiny_processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    answered = tiny_processor.apply_chat_template([*chat, answers("There is one.")], tokenize=False)
    assert answered.endswith("There is one.<|im_end|>\n")
    with pytest.raises(ValueError, match="some chats end in a message of the assistant"):
        tiny_processor.apply_chat_template([chat, [*chat, answers("There is one.")]])


def test_a_plain_trainer_learns_to_draw(model, tiny_processor, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path),
        remove_unused_columns=False,
        max_steps=12,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    before = model.code_head.weight.detach().clone()
    trainer = Trainer(model, arguments, ChatCollator(tiny_processor), CHATS, eval_dataset=CHATS)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * first
    assert not torch.equal(model.code_head.weight, before)


def test_a_copy_of_a_model_in_training_has_weights_of_its_own(model, tiny_processor, tmp_path):
    data = {"train_dataset": Dataset.from_list(CHATS), "processing_class": tiny_processor}
    NextFlowSFTTrainer(model, SFTConfig(**options(tmp_path)), **data)
    copied, batch = copy.deepcopy(model).eval(), ChatCollator(tiny_processor)(CHATS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_hw")}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        model.lm_head.weight.zero_()
        got = copied(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("adapted", [False, True])
def test_answers_are_trained_by_the_models_own_loss(adapted, model, tiny_processor, tmp_path):
    """Pictures too; as NextFlowTrainer has it, whose batches hold the same."""
    reference = copy.deepcopy(model)
    trained = get_peft_model(model, lora_config(r=2)) if adapted else model
    args = SFTConfig(**options(tmp_path, per_device_train_batch_size=3, max_steps=8, learning_rate=1e-2))
    data = {"train_dataset": Dataset.from_list(CHATS), "eval_dataset": Dataset.from_list(CHATS)}
    trainer = NextFlowSFTTrainer(trained, args, processing_class=tiny_processor, **data)
    batch = ChatCollator(tiny_processor)(CHATS)
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    expected = NextFlowTrainer(reference, arguments).compute_loss(reference.train(), batch)
    got = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    expected.backward()
    got.backward()
    gradients = dict(reference.named_parameters())
    if not adapted:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    trainer.model.zero_grad()
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3) and losses[-1] < 0.8 * losses[0]
    assert logged(trainer, "mean_token_accuracy")[-1] > logged(trainer, "mean_token_accuracy")[0]
    moved = {
        name for name, each in trainer.model.named_parameters() if name in before and (each != before[name]).any()
    }
    assert moved == set(before) and any("code_head" in name for name in moved)
    assert trainer.evaluate()["eval_loss"] < losses[0]


def test_what_trl_reads_is_of_the_distributions_of_the_whole_forward(model, tiny_processor):
    batch = ChatCollator(tiny_processor)(CHATS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_hw")}
    supervised = batch["shift_labels"] != -100
    weights = torch.where(torch.arange(supervised.numel()).view(supervised.shape) % 3 == 0, 0.0, 0.5) * supervised
    outputs = model(**inputs, shift_labels=batch["shift_labels"])
    signature = inspect.signature(model.forward)
    add_joint_head(model, Accelerator(cpu=True))
    scored = model(**inputs, shift_labels=batch["shift_labels"], loss_weights=weights, fused_lm_head=True)
    assert inspect.signature(model.forward) == signature  # `generate` looks at it
    torch.testing.assert_close(model(**inputs, shift_labels=batch["shift_labels"]).loss, outputs.loss)

    counts, logps = weights != 0, outputs.logits.float().log_softmax(-1)
    assert torch.equal(scored.label_mask, counts) and 0 < counts.sum() < supervised.sum()
    torch.testing.assert_close(scored.log_probs, -outputs.token_losses * weights)
    likeliest = (outputs.token_losses + logps.amax(-1)).abs() < 1e-6
    assert torch.equal(scored.is_top1.bool(), likeliest & counts)
    for name, expected in {
        "entropy": torch.special.entr(logps.exp()).sum(-1),
        "mean_logits": outputs.logits.mean(-1),
        "log_sum_sq_probs": logps.exp().square().sum(-1).log(),
    }.items():
        torch.testing.assert_close(getattr(scored, name), expected * counts, msg=name)


def test_what_pictures_cannot_be_trained_with_is_refused(model, tiny_processor, tmp_path):
    data = {"train_dataset": Dataset.from_list(CHATS), "processing_class": tiny_processor}
    unheeded = ({"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "group_by_length"})
    for option in ({"loss_type": "dft"}, {"completion_only_loss": False}, *unheeded):
        with pytest.raises(ValueError, match=next(iter(option))):
            NextFlowSFTTrainer(copy.deepcopy(model), SFTConfig(**options(tmp_path, **option)), **data)
    pairs = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny_processor}
    with pytest.raises(ValueError, match="ld_alpha"):
        NextFlowDPOTrainer(model, args=DPOConfig(**options(tmp_path, ld_alpha=0.5)), **pairs)
    with pytest.raises(ValueError, match="padding_free is not for this trainer: leave False, got True"):
        NextFlowDPOTrainer(copy.deepcopy(model), args=DPOConfig(**options(tmp_path, padding_free=True)), **pairs)
    follows = DPOConfig(**options(tmp_path, sync_ref_model=True))
    trainer = NextFlowDPOTrainer(copy.deepcopy(model), args=follows, **pairs)
    with pytest.raises(ValueError, match="sync_ref_model is not resumed, since no checkpoint has it"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="num_scales must be at least 1, got 0"):
        NextFlowDPOTrainer(model, args=DPOConfig(**options(tmp_path)), num_scales=0, **pairs)


def test_held_out_answers_count_by_their_targets(model, tiny_processor, tmp_path):
    """However many share a batch; as in the loss of one batch."""
    data = {"train_dataset": Dataset.from_list(CHATS), "eval_dataset": Dataset.from_list(CHATS)}
    losses = []
    for batch_size in (1, 2, 3):
        args = SFTConfig(**options(tmp_path, per_device_eval_batch_size=batch_size))
        trainer = NextFlowSFTTrainer(copy.deepcopy(model), args, processing_class=tiny_processor, **data)
        losses.append(trainer.evaluate()["eval_loss"])
    inputs = ChatCollator(tiny_processor)(CHATS)
    expected = model(**inputs, num_items_in_batch=(inputs["shift_labels"] != -100).sum()).loss.item()
    assert losses == pytest.approx([expected] * 3, rel=1e-5)


def test_this_packages_trainer_judges_chats_too(model, tiny_processor, tmp_path):
    """Also where the last batch is to be a full one: a row fills it that does not count again."""
    losses = []
    for batch_size in (3, 2):
        options = {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": True}
        args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
        trainer = NextFlowTrainer(model, args, ChatCollator(tiny_processor), eval_dataset=Dataset.from_list(CHATS))
        losses.append(trainer.evaluate())
    whole, filled = losses
    assert {name: filled[name] for name in whole if "loss" in name} == pytest.approx(
        {name: whole[name] for name in whole if "loss" in name}, rel=1e-5
    )


def test_this_packages_trainer_learns_from_chats_too(model, tiny_processor, tmp_path):
    """In one batch as in several, and the largest attention logit is that of all rows."""
    logs, weights = [], []
    for batch_size in (3, 1):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 3 // batch_size}
        options |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1}
        args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
        trainer = NextFlowTrainer(copy.deepcopy(model), args, ChatCollator(tiny_processor), Dataset.from_list(CHATS))
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
        weights.append(torch.cat([weight.flatten() for weight in trainer.model.parameters()]))
    for ours, theirs in zip(*logs):
        kept = [name for name in ours if "loss" in name]
        assert {name: ours[name] for name in kept} == pytest.approx({name: theirs[name] for name in kept}, rel=1e-4)
        assert ours["max_attention_logit"] > 0
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def by_processes(data_checkpoint, tmp_path_factory) -> list[dict]:
    """What [`main`] writes of one process, and of two."""
    folder = tmp_path_factory.mktemp("processes")
    run("-m", "tests.data.test_chats", data_checkpoint, folder, PYTHONPATH=os.pathsep.join(sys.path))
    return [json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2)]


def test_two_processes_judge_held_out_answers_as_one(by_processes):
    """Three rows, of which one fills the second process's share and is not to count again."""
    one, two = (processes["held out"] for processes in by_processes)
    assert two == pytest.approx(one, rel=1e-6)


def test_processes_go_on_in_the_order_of_their_epoch(by_processes):
    """The second, which is cut after three of its four steps."""
    for processes in by_processes:
        assert len(processes["whole"]) == 8 and processes["resumed"] == processes["whole"]


def test_an_evaluation_before_does_not_leave_devices_to_themselves(by_processes):
    one, two = (processes["whole"] for processes in by_processes)
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("kind", ["answers", "preferences"])
def test_averages_are_saved_and_torn_checkpoints_passed_over(kind, model, tiny_processor, tmp_path):
    """As of this package's other trainers."""

    average = EMACallback(0.5)

    def trainer(output):
        saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        shared = {"processing_class": tiny_processor, "callbacks": [average]}
        if kind == "answers":
            args = SFTConfig(**options(output, **saves))
            return NextFlowSFTTrainer(copy.deepcopy(model), args, train_dataset=Dataset.from_list(CHATS), **shared)
        args = DPOConfig(**options(output, **saves))
        return NextFlowDPOTrainer(copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(PAIRS), **shared)

    whole = trainer(tmp_path)
    whole.train()
    whole.save_model()
    saved = dict(NextFlowForConditionalGeneration.from_pretrained(tmp_path / "ema").named_parameters())
    assert average.averages and all(torch.equal(saved[name], each) for name, each in average.averages.items())
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert torch.equal(resumed.model.code_head.weight, whole.model.code_head.weight)


def test_weights_in_16_bits_are_named(model, tiny_processor, tmp_path, caplog):
    model.to(torch.bfloat16)
    answers = {"train_dataset": Dataset.from_list(CHATS), "processing_class": tiny_processor}
    NextFlowSFTTrainer(copy.deepcopy(model), SFTConfig(**options(tmp_path)), **answers).train()
    pairs = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny_processor}
    NextFlowDPOTrainer(copy.deepcopy(model), args=DPOConfig(**options(tmp_path)), **pairs).train()
    assert caplog.text.count("trained tensors are bfloat16") == 2


def test_the_reference_is_the_model_as_it_is_handed_over(model, tiny_processor, tmp_path):
    """Not as its folder has it; so the first loss is that of no preference."""
    model.save_pretrained(tmp_path / "model")
    trained = type(model).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        trained.code_head.weight.neg_()
    data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny_processor}
    trainer = NextFlowDPOTrainer(trained, args=DPOConfig(**options(tmp_path)), **data)
    trainer.train()
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-5)


def answer_logps(model, batch: dict, num_scales: int | None) -> torch.Tensor:
    """(2B,) of the answers' texts and first scales, from the logits of a whole forward."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_hw")}
    outputs = model(**inputs, shift_labels=batch["shift_labels"])
    kept = (outputs.token_losses > 0) & (outputs.scale_ids <= (num_scales or 99))
    return -(outputs.token_losses * kept).sum(dim=1)


@pytest.mark.parametrize("num_scales", [None, 2])
@pytest.mark.parametrize("adapted", [False, True])
def test_preferences_are_their_formula(adapted, num_scales, model, tiny_processor, tmp_path):
    """DPO's: -log sigmoid(beta x (policy's less the reference's difference of chosen and rejected))."""
    reference, changed = copy.deepcopy(model), copy.deepcopy(model)
    enlarge_(changed)
    trained = get_peft_model(model, lora_config(r=2)) if adapted else changed
    args = DPOConfig(**options(tmp_path, beta=0.3, max_steps=6, learning_rate=1e-2))
    data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny_processor}
    references = {} if adapted else {"ref_model": copy.deepcopy(reference)}
    trainer = NextFlowDPOTrainer(trained, args=args, num_scales=num_scales, **references, **data)
    assert (trainer.ref_model is None) == adapted  # without its adapters a model is its reference
    batch = PreferenceCollator(tiny_processor, num_scales)(PAIRS)
    with torch.no_grad():
        policy = reference if adapted else changed  # adapters begin as nothing
        chosen, rejected = (
            answer_logps(policy, batch, num_scales) - answer_logps(reference, batch, num_scales)
        ).chunk(2)
        expected = -F.logsigmoid(0.3 * (chosen - rejected)).mean()
        got = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert adapted or abs(expected.item() - 0.6931) > 0.01
    before = dict(trainer.model.get_base_model().named_parameters() if adapted else trainer.model.named_parameters())
    before = {name: each.detach().clone() for name, each in before.items() if "code_head" in name}
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    assert logged(trainer, "rewards/accuracies")[-1] == 1
    after = dict(trainer.model.get_base_model().named_parameters() if adapted else trainer.model.named_parameters())
    assert any(not torch.equal(after[name], each) for name, each in before.items())


def test_scored_are_answers_alone(tiny_processor):
    whole, part = (PreferenceCollator(tiny_processor, scales)(PAIRS) for scales in (None, 2))
    assert len(whole["input_ids"]) == 4
    assert (whole["completion_mask"] == (whole["shift_labels"] != -100)).all()
    # 24 x 24 pixels: 1, 4, 9 codes; 24 x 40: 1, 4, 8
    assert (whole["completion_mask"] - part["completion_mask"]).sum(dim=1).tolist() == [9, 8, 9, 9]
    with pytest.raises(ValueError, match="rejected missing"):
        PreferenceCollator(tiny_processor)([{"prompt": "a", "chosen": "b"}])


def test_the_page_of_trainings_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    (block,) = [each for each in blocks if "NextFlowDPOTrainer" in each]
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "training.md", "exec"), names)
    assert names["trainer"].state.global_step == 2


def main(checkpoint: Path, folder: Path) -> None:
    """Evaluate a row at a time, and train for two epochs and once more for the end of them, in one of one or two
    processes."""
    models = (NextFlowForConditionalGeneration, NextFlowProcessor)
    chats = [CHATS[0] | {"messages": [asks(f"{number} circles"), answers(None)]} for number in range(8)]
    data = {"train_dataset": Dataset.from_list(chats), "eval_dataset": Dataset.from_list(CHATS)}
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "constant"}
    results = {}
    for name in ("whole", "resumed"):
        model, processor = (each.from_pretrained(checkpoint) for each in models)
        args = SFTConfig(**options(folder / "run", per_device_eval_batch_size=1, **steps))
        args.per_device_train_batch_size = 2 // args.world_size
        trainer = NextFlowSFTTrainer(model, args, processing_class=processor, **data)
        results.setdefault("held out", trainer.evaluate()["eval_loss"])
        trainer.train(resume_from_checkpoint=name == "resumed" and str(folder / "run" / "checkpoint-7"))
        results[name] = logged(trainer)
    if trainer.is_world_process_zero():
        (folder / f"{trainer.args.world_size}.json").write_text(json.dumps(results))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    for processes in (1, 2):
        on_ranks(lambda: main(*map(Path, sys.argv[1:])), processes)
