"""What policies come from and go to: 16-bit checkpoints, folders of adapters, references, checkpoints."""

import asyncio
import copy
import os
import signal
import threading

import pytest
import torch
from datasets import Dataset
from grpo_samples import policy_of
from peft import PeftModel, get_peft_model
from test_grpo_trainer import moved, redness, rows, state, trainer

from transformers_nextflow.lora import lora_config
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.training.grpo.metrics import Metrics


@pytest.fixture(scope="module")
def policy(tiny_model):
    return policy_of(tiny_model)


@pytest.fixture(scope="module")
def adapted(policy, tiny_processor, tmp_path_factory):
    """Folders of a model in bfloat16 and of trained adapters on it."""
    folder = tmp_path_factory.mktemp("adapted")
    base = policy_of(policy)
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    tiny_processor.save_pretrained(folder / "base")
    base = type(policy).from_pretrained(folder / "base", dtype=torch.float32)
    model = get_peft_model(base, lora_config(r=4))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapters")
    return folder


def by_name(folder, output, **values):
    defaults = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    defaults |= {"num_generations": 4, "per_device_train_batch_size": 8, "prefix_tokens": 5, "max_grad_norm": 0.0}
    defaults |= {"gradient_checkpointing": False, "disable_tqdm": True}
    return NextFlowGRPOTrainer(str(folder), redness, NextFlowGRPOConfig(str(output), **defaults | values), rows())


def test_arguments_without_a_rate_serve_adapters_and_whole_models(adapted, tmp_path):
    arguments = by_name(adapted / "base", tmp_path).args
    arguments.learning_rate = None
    for folder, rate in (("adapters", 1e-4), ("base", 1e-6)):
        run = NextFlowGRPOTrainer(str(adapted / folder), redness, arguments, rows())
        assert run.args.learning_rate == rate and arguments.learning_rate is None


def test_a_checkpoint_in_16_bits_is_trained_in_32(adapted, tmp_path):
    run = by_name(adapted / "base", tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    assert run.model.config._attn_implementation == "eager"
    assert run.args.learning_rate == 1e-6 and by_name(adapted / "adapters", tmp_path).args.learning_rate == 1e-4
    before = state(run.model)
    assert {parameter.dtype for parameter in run.model.parameters() if parameter.requires_grad} == {torch.float32}
    run.train()
    layers = [name for name in before if ".layers." in name and "proj.weight" in name and "vq_model" not in name]
    after = state(run.model)
    changed = sum((before[name] != after[name]).sum() for name in layers)
    assert changed > 0.9 * sum(before[name].numel() for name in layers)


def test_what_is_trained_in_16_bits_is_named(policy, tiny_processor, tmp_path, caplog):
    trainer(copy.deepcopy(policy).to(torch.bfloat16), tiny_processor, tmp_path, max_steps=1).train()
    assert "trained tensors are bfloat16, such as" in caplog.text and "dtype=torch.float32" in caplog.text


def test_adapters_of_a_folder_are_trained_on_and_the_reference_has_them(adapted, tmp_path):
    run = by_name(adapted / "adapters", tmp_path, beta=0.1, learning_rate=1e-2, max_steps=2)
    loaded = state(run.model)
    base = type(run.model.get_base_model()).from_pretrained(adapted / "base", dtype=torch.float32)
    saved = state(PeftModel.from_pretrained(base, adapted / "adapters"))
    assert not moved(saved, loaded) and any("lora_B" in name and value.any() for name, value in loaded.items())
    run.train()
    changed = moved(loaded, state(run.model))
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    first, second = (row["kl"] for row in run.state.log_history if "kl" in row)
    assert first == pytest.approx(0.0, abs=1e-7) and second > 0
    with pytest.raises(ValueError, match="the model has adapters, which are trained on"):
        NextFlowGRPOTrainer(str(adapted / "adapters"), redness, run.args, rows(), peft_config=lora_config())


def test_the_best_is_the_highest_held_out_reward_and_its_loss_is_the_kl(policy, tiny_processor, tmp_path):
    values = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    values |= {"load_best_model_at_end": True, "per_device_eval_batch_size": 4, "beta": 0.1, "eval_dataset": rows(3)}
    run = trainer(policy, tiny_processor, tmp_path, **values)
    run.train()
    held = [row for row in run.state.log_history if "eval_reward" in row]
    assert run.state.best_metric == max(row["eval_reward"] for row in held)
    for row in held:
        assert row["eval_loss"] == pytest.approx(0.1 * row["eval_kl"], abs=1e-6)


def test_evaluation_draws_with_other_seeds_than_training(policy, tiny_processor, tmp_path):
    """One prompt again and again, so that pictures differ by their seeds alone."""
    drawn = []

    def note(images, **kwargs):
        drawn.append({image.tobytes() for image in images})
        return [0.0] * len(images)

    run = trainer(policy, tiny_processor, tmp_path, reward=note, dataset=rows(2)[:1] * 8, max_steps=2)
    run.train()
    run.evaluate(rows(2)[:1] * 4)
    training, held = set.union(*drawn[:2]), set.union(*drawn[2:])
    assert len(held) > 4 and not training & held


def test_a_reference_that_follows_the_policy_is_resumed_where_it_was(policy, tiny_processor, tmp_path):
    values = {"max_steps": 4, "beta": 0.1, "learning_rate": 0.3, "dataset": rows(8)}
    values |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    whole = trainer(policy, tiny_processor, tmp_path, save_strategy="steps", save_steps=2, **values)
    whole.train()
    again = trainer(policy, tiny_processor, tmp_path, **values)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = [[row["kl"] for row in run.state.log_history if "kl" in row][2:] for run in (whole, again)]
    assert last[0] == last[1] and min(last[0]) > 0
    assert not moved(state(whole.model), state(again.model))


def test_extremes_are_of_all_that_was_noted():
    metrics = Metrics()
    for values in ([3.0, 1.0], [2.0]):
        for name in ("low_min", "high_max"):
            metrics.extreme(name, torch.tensor(values))
        metrics.mean("each", torch.tensor(values))
    assert metrics.pop() == {"low_min": 1.0, "high_max": 3.0, "each": 2.0}
    assert metrics.pop() == {}


def test_rollouts_are_there_before_a_checkpoint_is_whole(policy, tiny_processor, tmp_path, monkeypatch):
    """The state, which makes it whole, is not written if anything before it fails."""
    from transformers_nextflow.training.grpo import trainer as module

    def full(tensors, path):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", full)
    values = {"num_iterations": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(OSError, match="no space left"):
        trainer(policy, tiny_processor, tmp_path, **values).train()
    assert not (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(policy, tiny_processor, tmp_path, **values).train(resume_from_checkpoint="True")


def test_rewards_are_called_as_trl_calls_them(policy, tiny_processor, tmp_path):
    """In the main thread, where signals work; `async` ones in one loop, whose tasks live on."""
    threads, loops = [], []

    def in_time(images, **kwargs):
        threads.append(threading.current_thread())
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.alarm(5)
        signal.alarm(0)
        return redness(images)

    async def served(images, **kwargs):
        loops.append(asyncio.get_running_loop())
        assert not loops[0].is_closed()
        return redness(images)

    trainer(policy, tiny_processor, tmp_path, reward=[in_time, served], max_steps=2).train()
    assert threads == [threading.main_thread()] * 2 and loops[0] is loops[1]


def test_pictures_without_any_reward_are_warned_of(policy, tiny_processor, tmp_path, caplog):
    trainer(policy, tiny_processor, tmp_path, reward=lambda images, **kwargs: [None] * len(images)).train()
    assert "8 of 8 pictures have no reward of any function" in caplog.text


ROLES = ("user", "assistant")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": []}, "reward_funcs must hold at least one function"),
        ({"reward": "clip:model"}, "reward_funcs must be functions of pictures.*got 'clip:model'"),
        ({"dataset": iter(())}, "train_dataset must be one dataset with a length"),
        ({"dataset": {"train": [{"prompt": "a"}]}}, "train_dataset must be one dataset with .*, got dict"),
        ({"dataset": [{"text": "a"}]}, "rows of train_dataset must have a prompt, got text"),
        (
            {"dataset": Dataset.from_list([{"prompt": "a"}, {"prompt": None}])},
            "prompt 1 of train_dataset must be a text or messages, got None",
        ),
        (
            {"dataset": Dataset.from_list([{"prompt": []}])},
            r"prompt 0 of train_dataset must be a text or .*, got \[\]",
        ),
        (
            {"dataset": Dataset.from_list([{"prompt": [{"role": role, "content": "a"} for role in ROLES]}])},
            "prompt 0 of train_dataset must end with what is to be answered",
        ),
        (
            {"dataset": [{"prompt": "a", "completions": "b", "trainer_state": 1}]},
            "train_dataset must not have the columns completions, trainer_state",
        ),
        ({"reward_weights": [float("nan")]}, "reward_weights must be finite numbers"),
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"epsilon_high": -0.1}, "epsilon_high must not be negative, got -0.1"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is not for this trainer"),
        ({"remove_unused_columns": True}, "remove_unused_columns is not for this trainer: leave False, got True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not for this trainer: leave None, got 5.0"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not for this trainer: leave False, got True"),
        ({"temperature": [1.0, 0.0, 1.0]}, "temperature must be positive"),
        ({"top_k": [1, 2]}, "top_k must have one value for each of the 3 scales, got 2"),
        ({"loss_type": "dapo"}, "loss_type must be 'grpo'"),
        ({"multi_objective_aggregation": "max"}, "multi_objective_aggregation must be one of"),
    ],
)
def test_wrong_arguments_are_refused_before_a_rollout(policy, tiny_processor, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        trainer(policy, tiny_processor, tmp_path, **values)


def test_what_is_not_gathered_is_refused(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="NextFlowGRPOTrainer gathers no outputs: measure a dataset by `evaluate`"):
        run.predict(rows())
    with pytest.raises(ValueError, match="compute_metrics is of outputs that this trainer never gathers"):
        NextFlowGRPOTrainer(policy, redness, run.args, rows(), processing_class=tiny_processor, compute_metrics=len)


def test_rows_are_read_by_workers_where_asked(policy, tiny_processor, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return rows()[index] | {"reader": os.getpid()}

    readers = set()

    def reward(images, reader, **kwargs):
        readers.update(reader)
        return redness(images)

    alone, workers = (
        trainer(policy, tiny_processor, tmp_path, reward=reward, dataset=Rows(), dataloader_num_workers=number)
        for number in (0, 1)
    )
    alone.train()
    assert readers == {os.getpid()}
    workers.train()
    assert len(readers) == 2
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), workers.model.parameters()))


def test_a_rate_follows_the_reward_upwards(tmp_path):
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1}
    config = NextFlowGRPOConfig(str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", **quiet)
    assert (config.metric_for_best_model, config.greater_is_better) == ("reward", True)


def test_every_reward_is_normalised_before_they_are_summed(policy, tiny_processor, tmp_path):
    """As TRL's `normalize_then_sum`, by hand."""
    first, second = torch.tensor([0.0, 1, 2, 5, 1, 1, 4, 2]), torch.tensor([9.0, 0, 70, 20, 30, 10, 5, 80])
    given = [lambda images, values=values, **kwargs: values.tolist() for values in (first, second)]
    values = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 3.0]}
    run = trainer(policy, tiny_processor, tmp_path, reward=given, **values)
    run.train()
    scores = 0.0
    for weight, rewards in ((1.0, first), (3.0, second)):
        groups = rewards.view(2, 4)
        scores += weight * (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    expected = (scores - scores.mean()) / (scores.std() + 1e-4)
    torch.testing.assert_close(run._buffer[0].advantages, expected.flatten(), rtol=1e-4, atol=1e-4)
    row = run.state.log_history[0]
    assert row["frac_reward_zero_std"] == 0.0
    assert row["reward_std"] == pytest.approx((first + 3 * second).std().item(), rel=1e-5)


def test_epsilon_high_is_the_upper_bound(policy, tiny_processor, tmp_path):
    """A code whose ratio is 1.4: clipped by .2, not by .5."""
    run = trainer(policy, tiny_processor, tmp_path, num_iterations=2, max_steps=1, learning_rate=0.0)
    run.train()
    rollouts = run._buffer[0]
    rollouts.advantages = torch.ones(8)
    rollouts.old_logps = run._logps(run.model, rollouts)[0].detach() - torch.tensor(1.4).log()
    for high, expected in ((None, -1.2), (0.5, -1.4)):
        run.args.epsilon_high = high
        assert run.compute_loss(run.model, rollouts).item() == pytest.approx(expected, rel=1e-4)
    logged = run._metrics.pop()  # of both, the second of which clips nothing
    assert (logged["clip_ratio/high_mean"], logged["clip_ratio/high_max"]) == pytest.approx((0.5, 1.0))
    assert logged["clip_ratio/region_mean"] == 0.5
    assert logged["clip_ratio/low_mean"] == logged["clip_ratio/low_min"] == 0


def test_the_support_is_kept_under_top_p_alone(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, logprob_mode="behaviour", top_p=0.5)
    run.train()
    assert run._buffer[0].support is not None and not run._buffer[0].support.all()
    assert run.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-4
