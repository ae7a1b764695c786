"""The Trainer's loss by hand and over every split of a step, exact resume, what is logged, stages and adapters."""

import copy
import dataclasses
import itertools
import json
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flash_stand_in import FLASH
from torch._dynamo.testing import CompileCounter
from torch.utils.data import ConcatDataset, Subset
from trainings import largest_difference, losses, parameters, train
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from tests.fresh import run
from transformers_nextflow import NextFlowModel
from transformers_nextflow.attention import attended_pairs, sequence_mask
from transformers_nextflow.data import CostModel, PackCollator, PackedDataset
from transformers_nextflow.layout import build_layout
from transformers_nextflow.lora import lora_config
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments, load_stages
from transformers_nextflow.training import attention_logits as training_logits
from transformers_nextflow.training import trainer as trainer_module
from transformers_nextflow.training.order import EpochOrder, EvenShares, ToldEpochs, WithEpoch


def test_loss_of_a_step_is_the_weighted_mean_over_all_its_targets(dataset, data_model, tmp_path):
    trainer = train(copy.deepcopy(data_model), dataset, tmp_path, gradient_accumulation_steps=8, z_loss=0.01)
    collator, sums = PackCollator(dataset), {"all": 0.0, "text": [], "vision": [], "targets": 0}
    by_scale: dict[int, list] = {}
    data_model.train()
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        with torch.no_grad():
            output = data_model(**batch, num_items_in_batch=1.0, z_loss=0.01, use_cache=False)
        sums["all"] += output.loss.item()
        sums["targets"] += int((batch["shift_labels"] != IGNORE).sum())
        for place in (batch["shift_labels"] != IGNORE).nonzero().tolist():
            scale, loss = int(output.scale_ids[tuple(place)]), output.token_losses[tuple(place)].item()
            by_scale.setdefault(scale, []).append(loss)
    data_model.eval()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(sums["all"] / sums["targets"], rel=1e-5)
    for scale, values in by_scale.items():
        name = f"loss_scale_{scale}" if scale else "loss_text"
        assert logged[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    vision = [loss for scale, values in by_scale.items() if scale for loss in values]
    assert logged["loss_vision"] == pytest.approx(sum(vision) / len(vision), rel=1e-5)
    assert len(by_scale) == 1 + data_model.model.schedules.max_scales
    assert logged["tokens_per_second"] > 0 and logged["flops_per_second"] > logged["tokens_per_second"]


def test_forward_leaves_the_layout_to_the_loader(dataset, data_model, tmp_path, monkeypatch):
    lay_out, calls = NextFlowModel.lay_out, []

    def counted(*args, **kwargs):
        calls.append(args)
        return lay_out(*args, **kwargs)

    monkeypatch.setattr(NextFlowModel, "lay_out", counted)
    train(copy.deepcopy(data_model), dataset, tmp_path, gradient_accumulation_steps=4)
    assert len(calls) == 0


def test_a_batch_without_its_layout_is_the_same_batch(dataset, data_model):
    batch = PackCollator(dataset)([dataset[0], dataset[1]])
    with torch.no_grad():
        given = data_model(**batch, use_cache=False)
        batch.pop("layout")
        made = data_model(**batch, use_cache=False)
    assert torch.equal(given.loss, made.loss) and torch.equal(given.token_losses, made.token_losses)


def visible(model, batch) -> torch.Tensor:
    """(B, 1, L, L) bool, who sees whom; padding sees nothing."""
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(*batch["input_ids"].shape, 1)
    with torch.enable_grad():  # which has masks
        masks = sequence_mask(config, embeds, None, batch["layout"].block_ids, batch["document_ids"], None)
    return masks["full_attention"] & (batch["document_ids"] >= 0)[:, None, :, None]


@torch.no_grad()
def attention_logits(model, batch) -> tuple[float, float]:
    """The largest that the mask lets through, and the largest at all, from every layer's own input."""
    inputs = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *args: inputs.append((args[0], args[2])), with_kwargs=True)
        for layer in model.model.language_model.layers
    ]
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    mask, seen, all_of_them = visible(model, batch), [], []
    for attention, kwargs in inputs:
        hidden = kwargs["hidden_states"]
        query, key = (
            projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        logits = query @ key.repeat_interleave(attention.num_key_value_groups, dim=1).mT / attention.head_dim**0.5
        seen.append(logits.masked_fill(~mask, -torch.inf).max().item())
        all_of_them.append(logits.max().item())
    return max(seen), max(all_of_them)


@pytest.mark.parametrize(
    "implementation, at_once", [("sdpa", 1), ("eager", 10_000), ("blocks", 2**26), (FLASH, 2**26)]
)
def test_largest_attention_logit_of_the_batch_before_a_log(
    implementation, at_once, dataset, data_model, tmp_path, monkeypatch
):
    model = copy.deepcopy(data_model)
    model.model.language_model.config._attn_implementation_internal = implementation
    monkeypatch.setattr(training_logits, "LOGITS_AT_ONCE", at_once)
    read, seen = PackedDataset.__getitem__, []
    monkeypatch.setattr(PackedDataset, "__getitem__", lambda self, index: (seen.append(index), read(self, index))[1])
    trainer = train(model, dataset, tmp_path, max_steps=4, learning_rate=0.0, gradient_accumulation_steps=2)
    logged = [row["max_attention_logit"] for row in trainer.state.log_history if "loss" in row]
    last = [PackCollator(dataset)([read(dataset, index)]) for index in seen[1:8:2]]
    expected, unmasked = zip(*(attention_logits(model.eval(), batch) for batch in last))
    assert logged == pytest.approx(expected, rel=1e-5)
    assert max(logged) > 1.01 * min(logged) and any(a > 1.01 * b for a, b in zip(unmasked, expected))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_largest_attention_logit_of_a_position_alone_is_its_own(data_model):
    ids = torch.tensor([[5]])
    layout = build_layout(data_model.config, ids, shift_labels=ids)
    batch = {"input_ids": ids, "document_ids": torch.zeros_like(ids), "layout": layout}
    with training_logits.LargestAttentionLogit(data_model.model) as largest:
        data_model(**batch, use_cache=False)
    assert largest.value.item() == pytest.approx(attention_logits(data_model, batch)[0], rel=1e-5)


@pytest.mark.parametrize("logging", [{"logging_steps": 2}, {"logging_steps": 3}, {"logging_first_step": True}])
def test_watching_the_attention_compiles_nothing_anew(logging, dataset, data_model, tmp_path):
    """With rows of one length, for which a layer is compiled once, and logs what it does where nothing is compiled."""
    collator, logged = PackCollator(dataset, pad_to=128), []
    torch.compiler.reset()
    for counter in (None, CompileCounter()):
        model = copy.deepcopy(data_model)
        for layer in model.model.language_model.layers if counter else []:
            layer.compile(backend=counter, dynamic=False)
        run = train(model, dataset, tmp_path, collator=collator, **{"max_steps": 6, "logging_steps": 4} | logging)
        logged.append([row["max_attention_logit"] for row in run.state.log_history if "loss" in row])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5) and logged[0]
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "logging, logs",
    [
        ({"logging_strategy": "epoch", "max_steps": 6}, 2),  # after 4 steps, and the last
        ({"logging_strategy": "epoch", "logging_first_step": True, "max_steps": 4}, 2),
        ({"logging_strategy": "no", "max_steps": 2}, 0),
        ({"logging_strategy": "no", "logging_first_step": True, "max_steps": 2}, 1),
        ({"logging_steps": 3, "max_steps": 6}, 2),
        ({"logging_steps": 3, "logging_first_step": True, "max_steps": 4}, 2),
    ],
)
def test_one_batch_before_each_log_is_watched(logging, logs, dataset, data_model, tmp_path, monkeypatch):
    watched, enter = [], training_logits.LargestAttentionLogit.__enter__
    monkeypatch.setattr(
        training_logits.LargestAttentionLogit, "__enter__", lambda self: (watched.append(self), enter(self))[1]
    )
    run = train(copy.deepcopy(data_model), dataset, tmp_path, gradient_accumulation_steps=2, **logging)
    rows = [row["max_attention_logit"] for row in run.state.log_history if "loss" in row]
    assert rows == [float(each.value) for each in watched] and len(rows) == logs


def check_evaluations(evaluated: list[dict], model, packs: list[dict], collator) -> None:
    """Each has the losses of all packs, seen one by one."""
    sums, by_scale = [], {}
    for pack in packs:
        batch = collator([pack])
        with torch.no_grad():
            output = model(**batch, num_items_in_batch=1.0)
        supervised = batch["shift_labels"] != IGNORE
        sums.append((output.loss.item(), int(supervised.sum())))
        for scale, loss in zip(output.scale_ids[supervised].tolist(), output.token_losses[supervised].tolist()):
            by_scale.setdefault(scale, []).append(loss)
    loss, count = (sum(column) for column in zip(*sums))
    for metrics in evaluated:
        assert metrics["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
        for scale, values in by_scale.items():
            name = f"eval_loss_scale_{scale}" if scale else "eval_loss_text"
            assert metrics[name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_an_evaluation_does_not_depend_on_its_batches(dataset, data_model, tmp_path):
    seven, collator, evaluated = Subset(dataset, range(7)), PackCollator(dataset), []
    for batch_size, drop_last in ((1, False), (2, True), (3, False), (6, True), (8, True)):
        values = {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": drop_last}
        arguments = NextFlowTrainingArguments(
            str(tmp_path), **values, use_cpu=True, report_to="none", disable_tqdm=True
        )
        evaluated.append(NextFlowTrainer(data_model, arguments, collator, eval_dataset=seven).evaluate())
    check_evaluations(evaluated, data_model, list(seven), collator)


def test_a_step_does_not_depend_on_how_it_is_split(dataset, data_model, tmp_path):
    """One process alone, with accumulation, and two processes; neither do evaluations."""
    after = []
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        model = copy.deepcopy(data_model)
        split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        row = losses(train(model, dataset, tmp_path, optim="sgd", learning_rate=0.03, z_loss=0.01, **split))[0]
        after.append((row, parameters(model)))
    data_model.save_pretrained(tmp_path / "model")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    run(script, dataset.folder, tmp_path)
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    check_evaluations(evaluated, data_model, [dataset[index] for index in range(7)], PackCollator(dataset))
    row = json.loads((tmp_path / "two.json").read_text())
    after.append((row, torch.load(tmp_path / "two.pt", weights_only=True)))
    (expected, weights), moved = after[0], parameters(data_model)
    assert largest_difference(weights, moved) > 1e-4
    for row, other in after[1:]:
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert row["loss_vision"] == pytest.approx(expected["loss_vision"], rel=1e-6)
        assert largest_difference(weights, other) < 1e-6


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from torch.utils.data import ConcatDataset, Subset
from tests.ranks import on_ranks
from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.data import PackCollator
from transformers_nextflow.data.loading import PackReader
from transformers_nextflow.data.shards import open_shards, sequence_spec
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments


def work():
    folder, output = map(Path, sys.argv[1:])
    model = NextFlowForConditionalGeneration.from_pretrained(output / "model")
    folder, manifest = open_shards(folder, "packs")
    dataset = PackReader(folder, manifest, sequence_spec(manifest["identity"]))
    dataset.padded, dataset.config = False, model.config
    arguments = NextFlowTrainingArguments(
        output_dir=str(output), max_steps=1, logging_steps=1, learning_rate=0.03, save_strategy="no", seed=5,
        report_to="none", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant", gradient_accumulation_steps=4,
        ddp_find_unused_parameters=True, z_loss=0.01, optim="sgd",
    )
    trainer = NextFlowTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    model, evaluated = NextFlowForConditionalGeneration.from_pretrained(output / "model"), []
    for batch_size in (1, 2, 3):
        arguments.per_device_eval_batch_size = batch_size
        seven = Subset(dataset, range(7))
        evaluated.append(NextFlowTrainer(model, arguments, PackCollator(dataset), eval_dataset=seven).evaluate())
    if trainer.is_world_process_zero():
        (output / "two.json").write_text(json.dumps(trainer.state.log_history[0]))
        (output / "evaluated.json").write_text(json.dumps(evaluated))
        torch.save(weights, output / "two.pt")
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()

on_ranks(work)
"""


def test_several_gpus_of_one_process_are_one(dataset, data_model, tmp_path, caplog):
    """They would get rows of a batch without their codes."""
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2  # as where there are two
    arguments.__post_init__()
    trainer = NextFlowTrainer(data_model, arguments, train_dataset=dataset)
    assert trainer._wrap_model(trainer.model) is trainer.model and trainer.args.train_batch_size == 1
    assert "1 of 2 GPUs is used: start by `accelerate launch` to use all" in caplog.text
    caplog.clear()
    arguments._n_gpu = 1
    arguments.__post_init__()
    assert "GPUs is used" not in caplog.text


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_of_outputs_are_refused(name, dataset, data_model, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is of outputs that this trainer never gathers"):
        NextFlowTrainer(data_model, NextFlowTrainingArguments(str(tmp_path)), **{name: lambda *outputs: {}})


def test_a_prediction_is_of_all_packs_too(dataset, data_model, tmp_path):
    values = {"per_device_eval_batch_size": 3, "dataloader_drop_last": True, "prediction_loss_only": True}
    arguments = NextFlowTrainingArguments(str(tmp_path), **values, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = NextFlowTrainer(data_model, arguments, eval_dataset=dataset)
    evaluated, predicted = trainer.evaluate(), trainer.predict(dataset).metrics
    for name in ("loss", "loss_text", "loss_vision"):
        assert predicted[f"test_{name}"] == evaluated[f"eval_{name}"]


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_input_tokens_are_counted_without_padding_too(counted, dataset, data_model, tmp_path):
    run = {"include_num_input_tokens_seen": counted, "per_device_train_batch_size": 8}
    seen = train(copy.deepcopy(data_model), dataset, tmp_path, **run).state.num_input_tokens_seen
    lengths = [len(pack["input_ids"]) for pack in dataset]
    assert len(set(lengths)) > 1
    assert seen == (8 * max(lengths) if counted == "all" else sum(lengths))


def test_the_best_by_any_loss_is_the_lowest(dataset, data_model, tmp_path):
    """The Trainer takes a name that does not end in `loss` for one whose greatest is best."""
    run = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run |= {"load_best_model_at_end": True, "metric_for_best_model": "loss_vision", "learning_rate": 0.03}
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **run)
    trainer = NextFlowTrainer(copy.deepcopy(data_model), arguments, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    evaluated = [row["eval_loss_vision"] for row in trainer.state.log_history if "eval_loss_vision" in row]
    assert trainer.state.best_metric == min(evaluated) < max(evaluated)
    assert trainer.evaluate()["eval_loss_vision"] == pytest.approx(min(evaluated), rel=1e-6)


def test_a_log_after_an_evaluation_has_all_losses(dataset, data_model, tmp_path):
    """At the end of an epoch, whose last step was evaluated."""
    run = {"eval_strategy": "steps", "eval_steps": 8, "logging_strategy": "epoch", "num_train_epochs": 1}
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", **run)
    trainer = NextFlowTrainer(copy.deepcopy(data_model), arguments, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert {"loss_text", "loss_vision", "loss_scale_1", "tokens_per_second"} <= row.keys()


def test_what_was_interrupted_between_two_logs_is_not_logged_later(dataset, data_model, tmp_path):
    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    run = {"learning_rate": 0.0, "logging_steps": 2, "max_steps": 4}
    whole, interrupted = train(copy.deepcopy(data_model), dataset, tmp_path, **run), Interrupted()
    again = NextFlowTrainer(copy.deepcopy(data_model), whole.args, None, dataset, callbacks=[interrupted])
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(interrupted)
    again.train()
    assert losses(again) == losses(whole)


def test_held_out_packs_alone_are_evaluated(dataset, data_model, tmp_path):
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    alone = NextFlowTrainer(data_model, arguments, eval_dataset={"a": dataset}).evaluate()
    both = NextFlowTrainer(data_model, arguments, train_dataset=dataset, eval_dataset=dataset).evaluate()
    assert alone["eval_a_loss"] == both["eval_loss"]


def test_datasets_are_told_apart_by_workers_that_stay(dataset, data_model, tmp_path):
    """The Trainer keeps one loader for all datasets without a name; those with one keep theirs."""
    halves = {name: Subset(dataset, range(at, 8, 2)) for at, name in enumerate(("even", "odd"))}
    losses, before = [], active_children()
    started = lambda: len({*active_children()} - {*before})  # noqa: E731
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **workers)
        trainer = NextFlowTrainer(data_model, arguments, PackCollator(dataset), eval_dataset=halves)
        for _ in range(2):
            losses.append([trainer.evaluate()[f"eval_{name}_loss"] for name in halves])
        of_names = started()
        losses.append([trainer.evaluate(half)["eval_loss"] for half in halves.values()])
        assert trainer.evaluate(halves["odd"])["eval_loss"] == losses[-1][1]
    assert (of_names, started()) == (len(halves), 2 * len(halves))
    assert losses[0][0] != losses[0][1]
    assert losses[1:] == [losses[0]] * 5


def test_the_one_dataset_is_told_from_others_by_workers_that_stay(dataset, data_model, tmp_path):
    kept = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **kept)
    half = Subset(dataset, range(4))
    trainer = NextFlowTrainer(data_model, arguments, PackCollator(dataset), eval_dataset=half)
    losses = [trainer.evaluate(each)["eval_loss"] for each in (None, half, dataset, None)]
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_other_datasets_than_packs_are_named(dataset, data_model, tmp_path):
    for other, message in (
        ([{"text": "a"}], "datasets must be packs or raw documents, .* got list"),
        (iter(dataset), "datasets must be packs or raw documents, .* got iterator"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data_model, other, tmp_path)
    with pytest.raises(ValueError, match="train_dataset must have a length and items by number, got generator"):
        train(data_model, (each for each in dataset), tmp_path, collator=PackCollator(dataset))


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_batches_are_not_cut_for_the_devices(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}( is not for this trainer|: they cut)"):
        NextFlowTrainingArguments(str(tmp_path), accelerator_config={name: True})


def test_an_order_that_is_not_resumed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_seedable_sampler is to stay"):
        NextFlowTrainingArguments(str(tmp_path), accelerator_config={"use_seedable_sampler": False})


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_would_not_warm_up_is_named(kind, tmp_path):
    judged = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": kind}
    with pytest.raises(ValueError, match=f"lr_scheduler_type '{kind}' heeds no warmup_steps, got 10"):
        NextFlowTrainingArguments(str(tmp_path), warmup_steps=10, **judged)


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing_factor": 0.5},
        {"train_sampling_strategy": "group_by_length"},
        {"average_tokens_across_devices": False},
    ],
)
def test_options_that_would_not_be_heeded_are_refused(option, tmp_path):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} is not for this trainer: leave .*, got {value!r}"):
        NextFlowTrainingArguments(str(tmp_path), **option)


def test_a_resumed_run_continues_the_undisturbed_one(dataset, data_model, tmp_path):
    """From the middle of the first epoch into the third, with AdamW's moments and stored variants by epoch."""
    run = {"max_steps": 10, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    set_seed(0)
    whole = train(copy.deepcopy(data_model), dataset, tmp_path, **run)
    resumed = train(copy.deepcopy(data_model), dataset, tmp_path, resume=str(tmp_path / "checkpoint-3"), **run)
    assert [row["step"] for row in losses(whole)] == list(range(1, 11))
    assert losses(resumed) == losses(whole)
    assert largest_difference(parameters(whole.model), parameters(resumed.model)) == 0
    assert len({row["loss"] for row in losses(whole)}) == 10


def test_a_run_resumed_at_its_end_makes_no_step(dataset, data_model, tmp_path):
    run = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = train(copy.deepcopy(data_model), dataset, tmp_path, **run)
    again = train(copy.deepcopy(data_model), dataset, tmp_path, resume=True, **run)
    assert again.state.global_step == 3 and losses(again) == losses(whole)
    assert largest_difference(parameters(whole.model), parameters(again.model)) == 0


def test_a_run_is_not_resumed_on_data_in_another_order(dataset, data_model, tmp_path):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(copy.deepcopy(data_model), dataset, tmp_path, **run, gradient_accumulation_steps=2)
    resume = {"resume": str(tmp_path / "checkpoint-1"), **run}
    split = train(copy.deepcopy(data_model), dataset, tmp_path, per_device_train_batch_size=2, **resume)
    assert losses(split)[-1]["loss"] == pytest.approx(losses(whole)[-1]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="checkpoint-1 was trained with items per step 2, with 4 its epoch"):
        train(copy.deepcopy(data_model), dataset, tmp_path, per_device_train_batch_size=4, **resume)
    other = resume | {"gradient_accumulation_steps": 2, "data_seed": 6}
    with pytest.raises(ValueError, match="checkpoint-1 was trained with seed 5, with 6 its epoch"):
        train(copy.deepcopy(data_model), dataset, tmp_path, **other)
    fewer = Subset(dataset, range(6)), tmp_path, resume["resume"], None, PackCollator(dataset)
    with pytest.raises(ValueError, match="checkpoint-1 was trained with items 8, with 6 its epoch"):
        train(copy.deepcopy(data_model), *fewer, **run, gradient_accumulation_steps=2)
    assert train(copy.deepcopy(data_model), dataset, tmp_path, **other, ignore_data_skip=True).state.global_step == 4


def test_a_checkpoint_of_another_training_is_not_resumed(dataset, data_model, tmp_path):
    """Of other parameters, or of a model of another size."""
    train(copy.deepcopy(data_model), dataset, tmp_path, save_strategy="steps", save_steps=1)
    frozen, larger = copy.deepcopy(data_model), copy.deepcopy(data_model)
    load_stages()["alignment"].prepare(frozen)
    larger.lm_head = torch.nn.Linear(larger.lm_head.in_features, larger.lm_head.out_features + 1, bias=False)
    for model in (frozen, larger):
        with pytest.raises(ValueError, match="checkpoint-1 is of another training than this: resume with the model"):
            train(model, dataset, tmp_path, resume=True, max_steps=2)
    with pytest.raises(ValueError, match="checkpoint-1 has the state of another optimizer than Adafactor"):
        train(copy.deepcopy(data_model), dataset, tmp_path, resume=True, max_steps=2, optim="adafactor")


class Descent(torch.optim.Optimizer):
    """One of a user's own, whose groups hold a rate alone."""

    def __init__(self, parameters, lr: float = 0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


def test_a_run_with_an_optimizer_of_ones_own_is_resumed(dataset, data_model, tmp_path, monkeypatch):
    def create_optimizer(self, model=None):
        self.optimizer = Descent(self.model.parameters())
        return self.optimizer

    monkeypatch.setattr(NextFlowTrainer, "create_optimizer", create_optimizer)
    run = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = train(copy.deepcopy(data_model), dataset, tmp_path, **run)
    resumed = train(copy.deepcopy(data_model), dataset, tmp_path, resume=str(tmp_path / "checkpoint-2"), **run)
    assert losses(resumed) == losses(whole)
    assert largest_difference(parameters(whole.model), parameters(resumed.model)) == 0


def test_weights_alone_are_not_resumed(dataset, data_model, tmp_path):
    """Whose optimizer and learning rate would begin anew."""
    train(copy.deepcopy(data_model), dataset, tmp_path, save_strategy="steps", save_steps=1, save_only_model=True)
    with pytest.raises(ValueError, match="checkpoint-1 holds weights alone, by save_only_model: begin with it as the"):
        train(copy.deepcopy(data_model), dataset, tmp_path, resume=True, max_steps=2)


def test_every_epoch_sees_all_packs_in_an_order_of_its_own(dataset, data_model, tmp_path, monkeypatch):
    seen, read = [], PackedDataset.__getitem__
    monkeypatch.setattr(PackedDataset, "__getitem__", lambda self, index: (seen.append(index), read(self, index))[1])
    train(copy.deepcopy(data_model), dataset, tmp_path, max_steps=8, gradient_accumulation_steps=2)
    first, second = seen[:8], seen[8:16]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_an_order_begins_with_the_first_epoch():
    order, epochs = EpochOrder(9, seed=3), []
    for epoch in (None, 0, 1):
        if epoch is not None:
            order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[0] == epochs[1] != epochs[2] and sorted(epochs[0]) == sorted(epochs[2]) == list(range(9))
    assert list(WithEpoch(order)) == [(1, index) for index in epochs[2]] and len(WithEpoch(order)) == 9


def test_datasets_in_datasets_are_told_an_epoch_when_it_begins():
    class Told(list):
        def set_epoch(self, epoch):
            told.append((len(self), epoch))

    told, one, other = [], Told("ab"), Told("cde")
    dataset = ToldEpochs(ConcatDataset([Subset(one, [1]), other, ["f"]]))
    assert [dataset[place] for place in ((0, 0), (0, 3), (1, 4), (1, 0))] == ["b", "e", "f", "b"]
    assert told == [(2, 0), (3, 0), (2, 1), (3, 1)] and len(dataset) == 5


@pytest.mark.parametrize("count, multiple, length", [(5, 4, 8), (8, 4, 8), (1, 3, 3), (4, 1, 4)])
def test_shares_of_an_evaluation_are_even_and_no_item_counts_twice(count, multiple, length):
    items = [{"place": place} for place in range(count)]
    shares = EvenShares(items, multiple, lambda item: item | {"blank": True})
    got = [shares[place] for place in range(len(shares))]
    assert len(got) == length and got[:count] == items
    assert got[count:] == [{"place": place % count, "blank": True} for place in range(count, length)]


def test_an_evaluation_divides_by_the_batches_of_all_devices(dataset, data_model, tmp_path, monkeypatch):
    arguments = NextFlowTrainingArguments(str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    trainer = NextFlowTrainer(data_model, arguments, PackCollator(dataset), eval_dataset=Subset(dataset, range(7)))
    assert len(trainer.get_eval_dataloader().dataset) == 7
    monkeypatch.setattr(NextFlowTrainingArguments, "world_size", property(lambda self: 4))
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)  # pairs of devices read the same batches
    assert len(trainer.get_eval_dataloader().dataset) == 12


def test_data_is_ordered_by_its_own_seed(dataset, data_model, tmp_path, monkeypatch):
    read, seen = PackedDataset.__getitem__, []
    monkeypatch.setattr(PackedDataset, "__getitem__", lambda self, index: (seen.append(index), read(self, index))[1])
    packs = {"max_steps": 1, "gradient_accumulation_steps": 8}
    for values in ({"data_seed": 3}, {"seed": 3}, {"seed": 3, "data_seed": 0}):
        train(copy.deepcopy(data_model), dataset, tmp_path, **packs | values)
    own, same, other = seen[:8], seen[8:16], seen[16:]
    assert own == same != other and sorted(own) == sorted(other) == list(range(8))


def test_workers_that_outlive_an_epoch_are_told_the_next(dataset, data_model, tmp_path):
    """Self-corrected variants by epoch: losses with persistent workers are those without any, and other ones in the
    second epoch, whose step has the same packs."""
    run = {"max_steps": 2, "gradient_accumulation_steps": 8, "learning_rate": 0.0}
    alone = train(copy.deepcopy(data_model), dataset, tmp_path, **run)
    kept = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    workers = train(copy.deepcopy(data_model), dataset, tmp_path, **run, **kept)
    assert losses(workers) == losses(alone)
    first, second = (row["loss"] for row in losses(alone))
    assert first != pytest.approx(second, rel=1e-4)


def test_packs_in_torchs_datasets_are_told_the_epoch(dataset, data_model, tmp_path):
    """Parts of them, and several put together."""
    run = {"max_steps": 2, "gradient_accumulation_steps": 8, "learning_rate": 0.0}
    halves = [Subset(dataset, range(4)), Subset(dataset, range(4, 8))]
    alone, joined = (
        losses(train(copy.deepcopy(data_model), each, tmp_path, collator=PackCollator(dataset), **run))
        for each in (dataset, ConcatDataset(halves))
    )
    assert joined == alone and joined[0]["loss"] != joined[1]["loss"]


def test_the_attention_is_not_watched_if_asked(dataset, data_model, tmp_path, monkeypatch):
    monkeypatch.setattr(training_logits.LargestAttentionLogit, "__enter__", lambda self: pytest.fail("watched"))
    run = train(copy.deepcopy(data_model), dataset, tmp_path, log_attention_logits=False)
    assert "max_attention_logit" not in run.state.log_history[0] and "loss_text" in run.state.log_history[0]


def test_flops_are_the_cost_models_and_mfu_is_their_share_of_the_peak(dataset, data_model, tmp_path, monkeypatch):
    """By a clock on which each of two steps takes a quarter of a second."""
    ticks = itertools.count(step=0.25)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(NextFlowTrainingArguments, "world_size", property(lambda self: 2))  # one is idle
    packs = {"max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 4}
    logged = train(copy.deepcopy(data_model), dataset, tmp_path, peak_flops=1e12, **packs).state.log_history[0]
    collator, work = PackCollator(dataset), [0, 0, 0]
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        work[0] += int((batch["document_ids"] >= 0).sum())
        work[1] += int(visible(data_model, batch).sum())
        work[2] += int((batch["shift_labels"] != IGNORE).sum())
    flops = sum(count * each for count, each in zip(work, CostModel.from_config(data_model.config).coefficients))
    assert logged["tokens_per_second"] == pytest.approx(work[0] / 0.5)
    assert logged["flops_per_second"] == pytest.approx(flops / 0.5)
    assert logged["mfu"] == pytest.approx(logged["flops_per_second"] / 2e12)


def test_uneven_packs_are_refused(dataset, data_model, tmp_path):
    with pytest.raises(ValueError, match="8 packs or documents do not divide by the 3 .* --multiple-of 3"):
        train(copy.deepcopy(data_model), dataset, tmp_path, gradient_accumulation_steps=3)


def test_adapters_and_named_modules_alone_are_trained(dataset, data_model, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(data_model), lora_config(r=2))
    before = parameters(model)
    train(model, dataset, tmp_path, max_steps=2, gradient_accumulation_steps=4)
    changed = {name for name, value in parameters(model).items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert any("lora_" in name for name in changed) and any("code_head" in name for name in changed)


def test_attended_pairs_are_what_the_mask_lets_through(dataset, data_model):
    for index in range(3):
        batch = PackCollator(dataset)([dataset[index], dataset[index + 1]])
        assert attended_pairs(batch["layout"].block_ids, batch["document_ids"]) == int(
            visible(data_model, batch).sum()
        )


def test_the_papers_stages():
    stages = load_stages()
    assert list(stages) == ["alignment", "pretrain-256", "pretrain-512", "pretrain-1024", "ct", "sft"]
    assert stages["pretrain-256"].shares["text-to-image"] == pytest.approx(1891 / 3220)
    assert [stage.learning_rate for stage in stages.values()] == [1e-3, 1e-4, 1e-4, 1e-4, 5e-5, 1e-5]
    shared = Path(__file__).parents[3] / "shared" / "paper" / "recipe.json"
    if not shared.exists():
        pytest.skip("no table of the paper beside the repository")
    names = {"text": "text", "t2i": "text-to-image", "i2t": "captioning", "editing": "editing"}
    for row in json.loads(shared.read_text())["stages"]:
        stage = stages[row["stage"]]
        mixture = {(names | {"interleaved": "interleaved"})[k]: row[k] for k in (*names, "interleaved") if row[k]}
        assert (stage.mixture, stage.level, stage.tokens) == (mixture, str(row["level"]), row["tokens"])
        assert (stage.learning_rate, stage.epochs) == (row["learning_rate"], row["epochs"])


@pytest.mark.parametrize("name", ["alignment", "ct"])
def test_a_stage_trains_what_it_names(name, data_model):
    model = copy.deepcopy(data_model)
    load_stages()[name].prepare(model)
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    if name == "alignment":
        assert trained and all(name.startswith(("model.connector", "lm_head", "code_head")) for name in trained)
        assert model.config.scale_loss_alpha == 0
    else:
        frozen = {parameter for parameter, _ in model.named_parameters()} - trained
        assert frozen and all(name.startswith("model.vq_model") for name in frozen)
        assert model.config.scale_loss_alpha == 0.9


@pytest.mark.parametrize("z_loss", [-1.0, float("inf")])
def test_a_z_loss_that_is_none_is_refused(z_loss, tmp_path):
    with pytest.raises(ValueError, match=f"z_loss must be a finite number of at least 0, got {z_loss}"):
        NextFlowTrainingArguments(str(tmp_path), z_loss=z_loss)


def test_the_launchers_precision_is_the_trainings_unless_it_says_otherwise(tmp_path, monkeypatch):
    def precision(launched: str, **given) -> tuple[bool, bool]:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given)
        return arguments.bf16, arguments.fp16

    assert precision("bf16") == precision("no", bf16=True) == (True, False)
    assert precision("no") == precision("fp8") == (False, False)
    with pytest.raises(ValueError, match="fp16 is for GPUs"):
        precision("fp16")


def test_a_plain_librarys_arguments_train_the_same(dataset, data_model, tmp_path):
    quiet = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "seed": 5}
    quiet |= {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 1, "remove_unused_columns": False}
    rows = []
    for kind in (TrainingArguments, NextFlowTrainingArguments):
        trainer = NextFlowTrainer(copy.deepcopy(data_model), kind(str(tmp_path), **quiet), train_dataset=dataset)
        trainer.train()
        rows.append({name: row for name, row in trainer.state.log_history[0].items() if "per_second" not in name})
    assert rows[0] == rows[1] and "max_attention_logit" in rows[0]


def test_the_loader_weighs_scales_as_the_stage_does(dataset, data_model, tmp_path):
    model = copy.deepcopy(data_model)
    dataclasses.replace(load_stages()["ct"], level="24", scale_loss_alpha=2.0).prepare(model, dataset)
    arguments = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    collator = NextFlowTrainer(model, arguments, train_dataset=dataset).data_collator
    given, before = collator([dataset[0]]), PackCollator(dataset)([dataset[0]])
    losses = [model(**batch, use_cache=False).loss for batch in (given, before)]
    given.pop("layout")
    assert torch.equal(model(**given, use_cache=False).loss, losses[0]) and losses[0] != losses[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- {name: a, trains: most, level: '1', epochs: 1, learning_rate: 1, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage a: trains must be one of .* got 'most'"),
        ("- {name: a, trains: all, level: '1', epochs: 1, learning_rate: 1, scale_loss_alpha: 0, mixture: {}}",
         "stage a: mixture must hold"),
        ("- {name: a, trains: all}", "stage a lacks epochs, learning_rate, level, mixture, scale_loss_alpha"),
        ("- {name: a, lr: 1}", "stage a has unknown fields lr"),
        ("- {name: 1, trains: all, level: 1, epochs: 0, learning_rate: 1, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage 1: epochs must be a number above 0, got 0"),
        ("- {name: a, trains: all, level: 1, epochs: on, learning_rate: 1, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage a: epochs must be a number above 0, got True"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: fast, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage a: learning_rate must be a number above 0, got 'fast'"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: 1, scale_loss_alpha: , mixture: {text: 1}}",
         "stage a: scale_loss_alpha must be a number, got None"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: 1, scale_loss_alpha: 0, mixture: {text: most}}",
         "stage a: mixture must hold an amount of documents, got {'text': 'most'}"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: 1, scale_loss_alpha: 0, mixture: [1]}",
         r"stage a: mixture must hold an amount of documents, got \[1\]"),
        ("- {name: a, trains: all, level: 1, epochs: .inf, learning_rate: 1, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage a: epochs must be a number above 0, got inf"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: 0, scale_loss_alpha: 0, mixture: {text: 1}}",
         "stage a: learning_rate must be a number above 0, got 0"),
        ("- {name: a, trains: all, level: 1, epochs: 1, learning_rate: 1, scale_loss_alpha: 0,"
         " mixture: {a: -1, b: 2}}",
         "stage a: mixture must hold an amount of documents, got {'a': -1, 'b': 2}"),
        ("- &a {name: a, trains: all, level: 1, epochs: 1, learning_rate: 1, scale_loss_alpha: 0,"
         " mixture: {text: 1}}\n- *a", "there are two stages a"),
        ("\ud800", "stages.yaml is no YAML file"),
        ("", "stages.yaml must hold a list of stages"),
        ("a: {trains: all}", "stages.yaml must hold a list of stages"),
        ("- a", "stages.yaml must hold a list of stages"),
        ("a: [1,", "stages.yaml is no YAML file"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(text, message, tmp_path):
    (tmp_path / "stages.yaml").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=message):
        load_stages(tmp_path / "stages.yaml")
