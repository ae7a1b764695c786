"""The GRPO trainer: one step by hand, every split of it, exact resume, what it moves, rewards at fault."""

import asyncio
import copy
import dataclasses
import itertools
import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from grpo_samples import chat, picture, policy_of
from transformers import TrainerCallback
from trl import GRPOConfig

from transformers_nextflow.lora import lora_config
from transformers_nextflow.sampling import LinearRamp
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer, RewardError
from transformers_nextflow.training.grpo import trainer as trainer_module
from transformers_nextflow.training.grpo.config import NOT_APPLICABLE
from transformers_nextflow.training.grpo.rollouts import rollout_logps


@pytest.fixture(scope="module")
def policy(tiny_model):
    return policy_of(tiny_model)


def redness(images, **kwargs) -> list[float]:
    """How red pictures are."""
    return [
        sum(image.resize((1, 1)).getpixel((0, 0))[channel] * s for channel, s in ((0, 2), (1, -1), (2, -1))) / 255
        for image in images
    ]


def rows(count: int = 8) -> list[dict]:
    prompts = [{"prompt": chat(f"a large red circle {'and ' * number}"), "number": number} for number in range(count)]
    prompts[1] = {"prompt": "make it blue", "images": [picture(1)], "number": 1}
    for row in prompts:
        row.setdefault("images", [])
    return prompts


def trainer(
    model,
    processor,
    output,
    reward=redness,
    dataset=None,
    eval_dataset=None,
    peft_config=None,
    callbacks=None,
    trainer_class=NextFlowGRPOTrainer,
    **values,
):
    defaults = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "seed": 5}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    defaults |= {"num_generations": 4, "per_device_train_batch_size": 8, "prefix_tokens": 5, "optim": "sgd"}
    defaults |= {"max_grad_norm": 0.0, "bf16": False, "gradient_checkpointing": False}
    args = NextFlowGRPOConfig(output_dir=str(output), **(defaults | values))
    dataset = rows() if dataset is None else dataset
    return trainer_class(
        copy.deepcopy(model), reward, args, dataset, eval_dataset, processing_class=processor,
        peft_config=peft_config, callbacks=callbacks,
    )  # fmt: skip


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_step_is_the_gradient_of_eq_5_by_hand(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, learning_rate=0.1, beta=0.0)
    before = copy.deepcopy(policy)
    run.train()
    assert run.state.log_history[0]["frac_reward_zero_std"] == 0.0
    rollouts = run._buffer[0]
    assert run.prefix.num_codes == 5 and rollouts.codes.shape == (8, 5)
    logps, _ = rollout_logps(before, rollouts, run.prefix, run.schedule, run.args)
    k = torch.tensor([1.0, *[4**-0.9] * 4])
    # the ratio is 1, its gradient that of the log-probability
    loss = -((k / k.sum()) * logps * rollouts.advantages[:, None]).sum(dim=1).mean()
    loss.backward()
    for name, parameter in before.named_parameters():
        if name.startswith("model.vq_model"):
            continue
        expected = parameter if parameter.grad is None else parameter - 0.1 * parameter.grad
        torch.testing.assert_close(run.model.get_parameter(name), expected, rtol=1e-4, atol=1e-6)
    assert {name for name in moved(state(before), state(run.model))} == {
        name for name, parameter in before.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


def test_nothing_beyond_the_prefix_is_computed_or_has_a_gradient(policy, tiny_processor, tmp_path):
    """Of three scales two are optimised."""
    seen = []
    run = trainer(policy, tiny_processor, tmp_path)
    run._prepare_inputs([(number, rows()[number]) for number in (0, 2) for _ in range(4)])
    with run.model.code_head.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        loss = run.compute_loss(run.model, run._buffer[0])
    (gradient,) = torch.autograd.grad(loss, seen)
    assert gradient.shape == (8, 5, 64) and gradient.any()
    rollouts = run._buffer[0]
    assert (rollouts.input_ids == run.model.config.image_token_id).sum() == 8 * 4  # slots of the second scale alone


def test_advantages_compare_pictures_of_one_prompt(policy, tiny_processor, tmp_path):
    seen = []

    def number(images, number, **kwargs):
        seen.append(list(number))
        return [float(value) for value in number]

    run = trainer(policy, tiny_processor, tmp_path, reward=number)
    before = state(run.model)
    run.train()
    assert all(len(set(numbers[start : start + 4])) == 1 for numbers in seen for start in range(0, 8, 4))
    assert not run._buffer[0].advantages.any()  # a group of equal rewards says nothing
    assert not moved(before, state(run.model))
    assert run.state.log_history[0]["frac_reward_zero_std"] == 1.0


def test_every_epoch_takes_every_prompt_in_an_order_of_its_own(policy, tiny_processor, tmp_path):
    seen = []

    def note(images, number, **kwargs):
        seen.extend(number[::4])
        return [0.0] * len(images)

    trainer(policy, tiny_processor, tmp_path, reward=note, dataset=rows(6), max_steps=9).train()
    epochs = [seen[start : start + 6] for start in range(0, 18, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


SPLITS = {
    "one batch": {"per_device_train_batch_size": 16},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "smaller than a group": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
}


def test_every_split_of_a_step_trains_the_same(policy, tiny_processor, tmp_path):
    """Over several generations."""
    results = {}
    for name, split in SPLITS.items():
        run = trainer(policy, tiny_processor, tmp_path, beta=0.1, max_steps=3, learning_rate=1e-3, **split)
        run.train()
        results[name] = (state(run.model), [row["reward"] for row in run.state.log_history if "reward" in row])
    expected, rewards = results.pop("one batch")
    assert len(set(rewards)) == 3
    for got, got_rewards in results.values():
        assert got_rewards == pytest.approx(rewards)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_resuming_continues_as_if_nothing_had_happened(policy, tiny_processor, tmp_path):
    """In the middle of a generation that four steps train on, and over the end of an epoch."""
    values = {"max_steps": 11, "num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    values |= {"beta": 0.05, "optim": "adamw_torch", "learning_rate": 1e-3, "dataset": rows(4)}
    whole = trainer(policy, tiny_processor, tmp_path / "whole", **values)
    whole.train()
    cut = trainer(policy, tiny_processor, tmp_path / "cut", **values | {"save_strategy": "steps", "save_steps": 5})
    cut.train()
    for checkpoint in (5, 10):
        again = trainer(policy, tiny_processor, tmp_path / "cut", **values)
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{checkpoint}"))
        assert not moved(state(whole.model), state(again.model)), checkpoint
    kept = ("step", "loss", "reward", "kl", "entropy")
    curves = [
        [{k: row.get(k) for k in kept} for row in run.state.log_history if "loss" in row] for run in (whole, again)
    ]
    assert curves[0] == curves[1]


def test_resuming_draws_what_would_have_been_drawn_next(policy, tiny_processor, tmp_path):
    """In the second epoch of three batches, whose last update is of one."""
    values = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "dataset": rows(3)}
    values |= {"steps_per_generation": 1}
    whole = trainer(policy, tiny_processor, tmp_path, save_strategy="steps", save_steps=3, **values)
    whole.train()
    again = trainer(policy, tiny_processor, tmp_path, **values)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(whole._buffer[0].codes, again._buffer[0].codes)
    assert not moved(state(whole.model), state(again.model))


def test_resuming_is_exact_where_updates_fall_into_generations(policy, tiny_processor, tmp_path):
    """An epoch is of nine batches, its last update of one."""
    values = CROSSING | {"max_steps": 8, "dataset": rows(9), "learning_rate": 1e-3, "beta": 0.05}
    whole = trainer(policy, tiny_processor, tmp_path, save_strategy="steps", save_steps=1, **values)
    whole.train()
    for checkpoint in (4, 5, 6):  # before the last update, at the end of the epoch, in a generation of the next
        again = trainer(policy, tiny_processor, tmp_path / "again", **values)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert not moved(state(whole.model), state(again.model)), checkpoint


def test_an_update_inside_a_generation_is_seen_by_the_ratio(policy, tiny_processor, tmp_path):
    """The first two batches of three are trained by the policy that drew them, the third by a later one."""
    values = CROSSING | {"max_steps": 2, "dataset": rows(9), "learning_rate": 0.3}
    run = trainer(policy, tiny_processor, tmp_path, **values)
    drawn, generate = [], run._generate
    run._generate = lambda batch: drawn.append(generate(batch)) or drawn[-1]
    run.train()
    assert len(drawn) == 2 and all(rollouts.old_logps is not None for rollouts in drawn)
    first, second = (row["clip_ratio/region_mean"] for row in run.state.log_history if "loss" in row)
    assert first == 0.0 < second
    aligned = trainer(policy, tiny_processor, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    aligned.train()
    assert aligned._buffer[0].old_logps is None


def test_a_reference_that_is_synced_follows_the_policy(policy, tiny_processor, tmp_path):
    values = {"max_steps": 3, "learning_rate": 0.1, "beta": 0.1, "sync_ref_model": True}
    kl = {}
    for every in (1, 100):
        settings = {"ref_model_sync_steps": every, "ref_model_mixup_alpha": 1.0}
        run = trainer(policy, tiny_processor, tmp_path, **values, **settings)
        run.train()
        kl[every] = [row["kl"] for row in run.state.log_history if "kl" in row]
    assert kl[1] == pytest.approx([0.0] * 3, abs=1e-6) and min(kl[100][1:]) > 1e-5


def test_later_steps_of_a_generation_compare_with_the_policy_that_sampled(
    policy, tiny_processor, tmp_path, monkeypatch
):
    ticks = itertools.count(step=0.25)  # where a step begins and ends, and rollouts of the first do
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run = trainer(policy, tiny_processor, tmp_path, max_steps=2, num_iterations=2, learning_rate=0.3)
    run.train()
    first, second = (row for row in run.state.log_history if "loss" in row)
    assert (first["step_time"], second["step_time"]) == (0.75, 0.25)
    assert first["rollout_share"] == pytest.approx(1 / 3) and second["rollout_share"] == 0
    assert not (tmp_path / "completions").exists()
    rollouts = run._buffer[0]
    with torch.no_grad():
        logps, _ = rollout_logps(policy, rollouts, run.prefix, run.schedule, run.args)
    torch.testing.assert_close(rollouts.old_logps, logps, rtol=1e-5, atol=1e-5)
    assert first["clip_ratio/region_mean"] == 0.0  # explicit old log-probabilities, ratio 1
    assert "reward" in first and "reward" not in second  # one generation, one reward
    assert second["clip_ratio/region_mean"] > 0.0


def test_kl_is_zero_at_first_and_holds_the_policy_back(policy, tiny_processor, tmp_path):
    ends = {}
    for beta in (1e-6, 10.0):
        values = {"max_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-3}
        run = trainer(policy, tiny_processor, tmp_path, beta=beta, **values)
        run.train()
        curve = [row["kl"] for row in run.state.log_history if "kl" in row]
        assert curve[0] == pytest.approx(0.0, abs=1e-6) and curve[-1] > 0
        ends[beta] = curve[-1]
    assert ends[10.0] < 0.5 * ends[1e-6], ends


def test_the_kl_of_a_step_is_eq_5_by_hand(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, beta=0.5)
    run.train()
    rollouts = run._buffer[0]
    rollouts.ref_logps = rollouts.ref_logps - 0.7
    with torch.no_grad():
        both = run.compute_loss(run.model, rollouts)
        run.args.beta = 0.0
        alone = run.compute_loss(run.model, rollouts)
        logps, _ = rollout_logps(run.model, rollouts, run.prefix, run.schedule, run.args)
    difference = rollouts.ref_logps - logps
    k3 = difference.exp() - difference - 1
    torch.testing.assert_close(both - alone, 0.5 * k3.mean())  # without the weights of scales


def test_adapters_alone_are_trained_and_come_off(policy, tiny_processor, tmp_path):
    config = lora_config(r=4, modules_to_save=None)
    run = trainer(policy, tiny_processor, tmp_path, max_steps=3, beta=0.1, peft_config=config, learning_rate=0.5)
    before = state(run.model)
    run.train()
    changed = moved(before, state(run.model))
    assert changed and all("lora_" in name for name in changed)
    curve = [row["kl"] for row in run.state.log_history if "kl" in row]
    assert curve[0] == pytest.approx(0.0, abs=1e-6) and curve[-1] > 0
    rollouts = run._buffer[0]
    with torch.no_grad():
        adapted, _ = rollout_logps(run.model, rollouts, run.prefix, run.schedule, run.args)
        with run.model.disable_adapter():
            base, _ = rollout_logps(run.model, rollouts, run.prefix, run.schedule, run.args)
        original, _ = rollout_logps(policy, rollouts, run.prefix, run.schedule, run.args)
        merged, _ = rollout_logps(run.model.merge_and_unload(), rollouts, run.prefix, run.schedule, run.args)
    torch.testing.assert_close(base, original, rtol=0, atol=0)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - base).abs().max() > 1e-3


def brightness(images, **kwargs) -> list[float]:
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


def dealt_out(reward, seed: int):
    """The same rewards in a random order."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(images, **kwargs) -> list[float]:
        values = reward(images)
        return [values[place] for place in torch.randperm(len(values), generator=generator)]

    return shuffled


def sampled_brightness(model, processor) -> torch.Tensor:
    """Of 256 pictures, sampled with the same random numbers whatever the model."""
    inputs = processor.apply_chat_template([chat("a large red circle")], generation_mode="image")
    codes = model.eval().generate(**inputs, generation_mode="image", num_images_per_prompt=256, seed=0)
    return torch.tensor(brightness(processor.post_process_image(model.decode_image_tokens(codes, (3, 3)))))


@pytest.fixture
def one_thread():
    """Sums in one order, so that a training of a seed is the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def brighter(policy, processor, folder, reward, seed: int) -> float:
    """After a training, the share of pictures above the untrained policy's median."""
    median = sampled_brightness(policy, processor).median()
    values = {"max_steps": 60, "optim": "adamw_torch", "learning_rate": 3e-3, "seed": seed}
    values |= {"num_generations": 8, "per_device_train_batch_size": 32, "logging_steps": 100}
    run = trainer(policy, processor, folder, reward=reward, **values)
    run.train()
    return (sampled_brightness(run.model, processor) > median).float().mean().item()


@pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_verifiable_reward_climbs(policy, tiny_processor, tmp_path, one_thread, seed):
    assert brighter(policy, tiny_processor, tmp_path, brightness, seed) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_shuffled_reward_does_not_climb(policy, tiny_processor, tmp_path, one_thread, seed):
    assert brighter(policy, tiny_processor, tmp_path, dealt_out(brightness, seed), seed) < 0.7


def test_values_of_prefixes_are_soft_means_over_their_continuations(policy, tiny_processor, tmp_path):
    calls = []

    def reward(images, **kwargs):
        calls.append(images)
        return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]

    run = trainer(
        policy, tiny_processor, tmp_path, reward=reward, vmr_continuations=3, vmr_eta=0.5, scale_rewards="none"
    )
    run.train()
    first, further = calls
    assert len(first) == 8 and len(further) == 16
    rate = lambda images: torch.tensor([image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images])  # noqa: E731
    rewards = torch.cat([rate(first)[:, None], rate(further).view(8, 2)], dim=1)
    values = 0.5 * (rewards / 0.5).exp().mean(dim=1).log()
    expected = (values.view(2, 4) - values.view(2, 4).mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(run._buffer[0].advantages, expected, rtol=1e-4, atol=1e-5)
    row = run.state.log_history[0]
    assert row["vmr/value"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert row["reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)


def test_masked_codes_do_not_count(policy, tiny_processor, tmp_path):
    values = {"learning_rate": 0.1}
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[:, 0] = True
    args = trainer(policy, tiny_processor, tmp_path, **values)
    args.token_mask_func = lambda prompts, images, prefix, **columns: mask
    args.train()
    first = trainer(policy, tiny_processor, tmp_path, **values | {"prefix_tokens": 1})
    first.train()
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(args.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_mask_of_codes_fits_them(policy, tiny_processor, tmp_path):
    run, batch = trainer(policy, tiny_processor, tmp_path), [(0, rows()[0])] * 8
    for mask, said in ((torch.ones(8, 5), "torch.float32"), (torch.ones(8, 4, dtype=torch.bool), r"\(8, 4\)")):
        run.token_mask_func = lambda mask=mask, **columns: mask
        with pytest.raises(ValueError, match=rf"must return bool of the shape \(8, 5\), got .*{said}"):
            run._generate(batch)
    given = {"train_dataset": rows(), "processing_class": tiny_processor, "token_mask_func": run.token_mask_func}
    assert NextFlowGRPOTrainer(policy, redness, run.args, **given).token_mask_func is run.token_mask_func
    run.args.optimize = "text"
    with pytest.raises(ValueError, match="optimize='text' optimises none"):
        NextFlowGRPOTrainer(policy, redness, run.args, **given)


def test_pictures_of_rollouts_have_the_aspect_ratio_that_is_asked_for(policy, tiny_processor, tmp_path):
    """Or the nearest that there is."""
    grids = {}
    for asked in (None, "2:1", "3:1"):
        run = trainer(policy, tiny_processor, tmp_path, aspect_ratio=asked)
        assert run.schedule == run.model_schedule
        grids[asked] = run.schedule.final_grid
    assert grids == {None: (3, 3), "2:1": (2, 4), "3:1": (2, 4)}


@pytest.mark.parametrize("version", [1, 2])
def test_devices_that_share_weights_are_those_of_fsdp2_and_share_evaluations(
    version, policy, tiny_processor, tmp_path, monkeypatch
):
    class Sharing(NextFlowGRPOTrainer):
        """accelerate turns FSDP on for accelerators alone."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

        def _check_devices(self):
            with monkeypatch.context() as two:
                two.setattr(Accelerator, "num_processes", property(lambda self: 2))
                super()._check_devices()

    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: version == 2))
    for count in (2, 3):
        said = f"divide by the 2 processes, got {count}" if version == 2 else "not FSDP1 or ZeRO-3"
        with nullcontext() if version == count == 2 else pytest.raises(ValueError, match=said):
            trainer(policy, tiny_processor, tmp_path, eval_dataset=rows(count), trainer_class=Sharing)


def test_schedules_over_scales_are_written_by_their_fields(tmp_path):
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none"}
    ramp = NextFlowGRPOConfig(str(tmp_path), guidance_scale=LinearRamp(1.0, 3.0), top_k=[4], **quiet)
    written = json.loads(ramp.to_json_string())
    assert written["guidance_scale"] == dataclasses.asdict(LinearRamp(1.0, 3.0)) and written["top_k"] == 4


def test_completions_are_drawn_and_rewards_see_trl_arguments(policy, tiny_processor, tmp_path):
    seen = {}

    async def reward(prompts, completions, completion_ids, images, trainer_state, log_metric, number, **kwargs):
        await asyncio.sleep(0)
        seen.update(locals())
        log_metric("images_seen", len(images))
        return [None if place == 0 else float(place) for place in range(len(images))]

    run = trainer(
        policy, tiny_processor, tmp_path, reward=[redness, reward], reward_weights=[0.0, 2.0], log_completions=True
    )
    run.train()
    assert seen["completions"][3][0]["content"][0]["image"] is seen["images"][3]
    assert seen["prompts"][0][0]["role"] == "user" and len(seen["number"]) == 8
    row = run.state.log_history[0]
    assert row["images_seen"] == 8 and row["rewards/reward/mean"] == pytest.approx(4.0)
    assert row["reward"] == pytest.approx(2 * sum(range(8)) / 8)
    assert row["reward_std"] == pytest.approx(torch.arange(0.0, 16, 2).std().item())
    assert 0 < row["rollout_share"] < 1 and row["step_time"] > 0
    assert {"entropy", "clip_ratio/high_max"} <= row.keys() and "vmr/value" not in row
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert (tmp_path / "completions" / "step-1.png").exists()


def test_rollouts_are_sampled_in_the_precision_of_training(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, bf16=True)
    run.train()
    # 0.014 between a float32 rollout and training under bfloat16
    assert 0 < run.state.log_history[0]["sampling/sampling_logp_difference/mean"] < 0.003


def faulty(kind: str):
    async def waits(images, **kwargs):
        await asyncio.sleep(60)

    def reward(images, **kwargs):
        if kind == "waits":
            return waits(images)
        if kind == "exits":
            sys.exit(3)
        if kind == "raises":
            raise KeyError("score")
        if kind == "hangs":
            time.sleep(60)
        short, nan, words = [1.0], [float("nan")] * len(images), ["good"] * len(images)
        if kind in ("huge", "too long"):
            return [{"huge": 1e30, "too long": 10**400}[kind]] * len(images)
        return {"short": short, "nan": nan, "text": "good", "words": words}[kind]

    return reward


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("exits", "reward function reward raised SystemExit: 3"),
        ("words", "reward function reward returned 'good' for picture 0: a reward is a finite number, or None"),
        ("waits", "reward function reward has not returned after 0.2 seconds"),
        ("raises", "reward function reward raised KeyError: 'score'"),
        ("short", "reward function reward returned 1 rewards for 8 pictures"),
        ("nan", "reward function reward returned nan for picture 0"),
        ("huge", "reward function reward returned 1e[+]30 for picture 0"),
        ("too long", "reward function reward returned 1000"),
        ("text", "reward function reward must return a list of numbers, got str"),
        ("hangs", "reward function reward has not returned after 0.2 seconds"),
    ],
)
def test_reward_functions_at_fault_are_named(policy, tiny_processor, tmp_path, kind, message):
    run = trainer(
        policy,
        tiny_processor,
        tmp_path,
        reward=faulty(kind),
        reward_timeout=0.2 if kind in ("hangs", "waits") else None,
    )
    with pytest.raises(RewardError, match=message):
        run.train()


# updates that fall into generations, of which an epoch has three and ends with half an update
CROSSING = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 2}


def test_rewards_may_be_arrays_tensors_and_flags(policy, tiny_processor, tmp_path):
    for rewards in (np.arange(8.0), torch.arange(8.0), [bool(place % 2) for place in range(8)]):
        run = trainer(policy, tiny_processor, tmp_path, reward=lambda images, rewards=rewards, **kwargs: rewards)
        run.train()
        assert run.state.log_history[0]["reward"] == pytest.approx(sum(map(float, rewards)) / 8)


def test_rewards_of_one_name_are_logged_apart(policy, tiny_processor, tmp_path):
    """As two CLIP scores are, of different models."""
    rewards = [lambda images, value=value, **kwargs: [value] * len(images) for value in (1.0, 3.0)]
    run = trainer(policy, tiny_processor, tmp_path, reward=rewards)
    run.train()
    row = run.state.log_history[0]
    assert row["rewards/<lambda>/mean"] == 1.0 and row["rewards/<lambda>_1/mean"] == 3.0


@pytest.mark.parametrize(("values", "call"), [({}, 4), (CROSSING, 2)], ids=["between updates", "in an update"])
def test_a_reward_that_dies_in_mid_run_loses_no_step(policy, tiny_processor, tmp_path, values, call):
    calls = []

    def reward(images, **kwargs):
        calls.append(len(images))
        if len(calls) == call:
            raise ConnectionError("server gone")
        return redness(images)

    values = values | {"max_steps": 6, "learning_rate": 1e-2, "dataset": rows(9)}
    run = trainer(policy, tiny_processor, tmp_path / "died", reward=reward, **values)
    with pytest.raises(RewardError, match="server gone"):
        run.train()
    again = trainer(policy, tiny_processor, tmp_path / "died", **values)
    (tmp_path / "died" / "checkpoint-9").mkdir()  # killed while it was written
    again.train(resume_from_checkpoint=True)
    whole = trainer(policy, tiny_processor, tmp_path / "whole", **values)
    whole.train()
    assert again.state.log_history[0]["step"] == 1
    assert not moved(state(whole.model), state(again.model))


def test_a_picture_without_reward_does_not_count_in_its_group(policy, tiny_processor, tmp_path):
    rewards = [None, 1.0, 2.0, 6.0, 1.0, 2.0, 3.0, 4.0]
    run = trainer(policy, tiny_processor, tmp_path, reward=lambda images, **kwargs: rewards, scale_rewards="none")
    run.train()
    expected = torch.tensor([0.0, -2.0, -1.0, 3.0, -1.5, -0.5, 0.5, 1.5])
    torch.testing.assert_close(run._buffer[0].advantages, expected)


def test_silent_rewards_move_nothing(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, reward=lambda images, **kwargs: [None] * len(images))
    before = state(run.model)
    run.train()
    assert not moved(before, state(run.model))


class Tracker:
    """What wandb and trackio have in common."""

    def __init__(self):
        self.logged = []

    def Image(self, picture, caption):
        return picture, caption

    def log(self, values):
        self.logged.append(values)


class SummaryWriter:
    """As torch's."""

    def __init__(self, folder):
        self.folder, self.tags, self.closed = folder, [], False
        MADE.append(self)

    def add_image(self, tag, picture, step, dataformats):
        self.tags.append((tag, step, picture.shape))

    def flush(self):
        pass

    def close(self):
        self.closed = True


MADE: list[SummaryWriter] = []


def test_trackers_that_take_pictures_get_completions(policy, tiny_processor, tmp_path, monkeypatch):
    trackers = Tracker(), Tracker()
    for name, tracker in zip(("wandb", "trackio"), trackers):
        monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = trainer(policy, tiny_processor, tmp_path, log_completions=True, num_completions_to_print=3)
    run.args.report_to = ["wandb", "trackio", "tensorboard"]  # after the Trainer's own callbacks are chosen
    run.train()
    for tracker in trackers:
        (values,) = tracker.logged
        assert values.pop("train/global_step") == 1
        assert list(values) == [f"completions/0{number}" for number in range(3)]
        for (image, caption), (text, drawn, reward) in zip(values.values(), run._pictures):
            assert image is drawn and caption == f"{reward:.3g}: {text}"
    (writer,) = MADE
    assert writer.closed and writer.folder == str(tmp_path / "runs" / "completions")
    assert writer.tags == [(f"completions/0{number}", 1, (24, 24, 3)) for number in range(3)]


@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_fields_that_say_nothing_about_pictures_are_refused(tmp_path, name):
    default = {entry.name: entry.default for entry in dataclasses.fields(GRPOConfig)}[name]
    other = not default if isinstance(default, bool) else 1.25 if default is None else default + type(default)(1)
    other = {"pad_to_multiple_of": 8}.get(name, other)
    # TRL's own name of what an old one stands for
    message = {"use_transformers_paged": "use_transformers_continuous_batching"}.get(name, name)
    with pytest.raises(ValueError, match=message):
        NextFlowGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **{name: other})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 3}, "divisible by num_generations"),
        ({"scale_rewards": "sum"}, "scale_rewards must be one of group, batch, none, got 'sum'"),
        (
            {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
            "gradient_accumulation_steps must hold whole generations.*got 3 and 2",
        ),
        ({"scale_prefix": 4}, r"scale_prefix must lie in \[1, 3\]"),
        ({"use_vllm": True}, "use_vllm does not apply to pictures"),
        ({"repetition_penalty": 1.2}, "repetition_penalty does not apply"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"logprob_mode": "exact"}, "logprob_mode must be one of conditional, behaviour, got 'exact'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be one of token, scale"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must have 1 entries, got 2"),
        ({"vmr_continuations": 0}, "vmr_continuations must be at least 1"),
        ({"vmr_eta": 0.0}, "vmr_eta positive, got 1 and 0.0"),
        ({"reward_timeout": 0.0}, "reward_timeout must be positive, got 0.0"),
        ({"rollout_level": "512"}, "512"),
        ({"sync_ref_model": True}, "sync_ref_model needs beta > 0"),
    ],
)
def test_wrong_settings_are_refused(policy, tiny_processor, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        trainer(policy, tiny_processor, tmp_path, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"vmr_continuations": 2, "vmr_eta": 1e-3, "reward_timeout": 1e-3},
        {"text_temperature": 1e-3, "text_loss_weight": 1e-3, "optimize": "both", "max_completion_length": 1},
        {"optimize": "both", "vmr_continuations": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
        {"gradient_accumulation_steps": 6, "steps_per_generation": 3},
        {"gradient_accumulation_steps": 6, "steps_per_generation": 3, "num_iterations": 2},
    ],
)
def test_settings_at_their_limits_are_taken(tmp_path, values):
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none"}
    batch = {"num_generations": 2, "per_device_train_batch_size": 2}
    config = NextFlowGRPOConfig(str(tmp_path), **quiet, **batch, **values)
    assert {name: getattr(config, name) for name in values} == values


def test_a_reward_at_fault_is_asked_no_more(policy, tiny_processor, tmp_path):
    """Nor is anything more drawn for an evaluation, by one process."""
    asked, drawn = [], []

    def reward(images, **kwargs):
        asked.append(len(images))
        raise ConnectionError("server gone")

    run = trainer(policy, tiny_processor, tmp_path, reward=reward, vmr_continuations=2, per_device_eval_batch_size=4)
    with pytest.raises(RewardError, match="server gone"):
        run.train()
    assert asked == [8]
    roll_out = run._roll_out
    run._roll_out = lambda chats, *args: drawn.append(len(chats)) or roll_out(chats, *args)
    with pytest.raises(RewardError, match="server gone"):
        run.evaluate(rows(3))
    assert asked == [8, 4] and drawn == [1]


def test_too_few_prompts_and_missing_images_are_refused(policy, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="a generation takes 2 prompts, the dataset has 1"):
        trainer(policy, tiny_processor, tmp_path, dataset=rows(2)[:1]).train()
    broken = [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]}] * 2
    with pytest.raises(ValueError, match="prompt [01] has 1 places for images, and 0 images"):
        trainer(policy, tiny_processor, tmp_path, dataset=broken).train()
    given = [{"prompt": "make it blue", "images": [picture(1), None]}] * 2
    with pytest.raises(ValueError, match="prompt [01] has 2 places for images, and 1 images"):
        trainer(policy, tiny_processor, tmp_path, dataset=given).train()


def test_evaluation_is_the_mean_reward_of_held_out_prompts(policy, tiny_processor, tmp_path):
    run = trainer(policy, tiny_processor, tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    once, twice = run.evaluate(rows(3)), run.evaluate(rows(3))
    assert once == twice and -2 <= once["eval_reward"] <= 2
    assert once["eval_reward"] == pytest.approx(once["eval_rewards/redness/mean"])
    json.dumps(once)
    alone = trainer(policy, tiny_processor, tmp_path, num_generations_eval=2, per_device_eval_batch_size=1)
    assert alone.evaluate(rows(3)) == pytest.approx(once, abs=1e-5)  # whatever the batch
    of_each = run.evaluate({"first": rows(3), "second": rows(2)})
    assert of_each["eval_first_reward"] == once["eval_reward"] and "eval_second_rewards/redness/mean" in of_each
    with pytest.raises(ValueError, match="evaluation needs an eval_dataset"):
        run.evaluate()


def test_what_rewards_log_in_evaluation_is_not_trainings(policy, tiny_processor, tmp_path):
    def reward(images, log_metric, trainer_state, **kwargs):
        log_metric("pictures", len(images))
        log_metric("pictures", len(images) + 1)
        return redness(images)

    values = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 4}
    run = trainer(policy, tiny_processor, tmp_path, reward=reward, eval_dataset=rows(3), **values)
    run.train()
    assert [row["pictures"] for row in run.state.log_history if "pictures" in row] == [8.5, 8.5]
    assert [row["eval_pictures"] for row in run.state.log_history if "eval_pictures" in row] == [4.5, 4.5]


def test_what_was_cut_off_is_not_logged_of_what_follows(policy, tiny_processor, tmp_path):
    """Of an evaluation whose reward fails, and of a training that is interrupted between two logs."""
    failing = []

    def reward(images, log_metric, **kwargs):
        log_metric("pictures", len(images))
        if failing:
            raise failing.pop()
        return redness(images)

    values = {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 2, "per_device_eval_batch_size": 4}
    values |= {"num_generations_eval": 2}
    whole, again = (trainer(policy, tiny_processor, tmp_path, reward=reward, **values) for _ in range(2))
    evaluated = whole.evaluate(rows(3))
    whole.train()
    failing.append(ConnectionError("server gone"))
    with pytest.raises(RewardError, match="server gone"):
        again.evaluate(rows(3))
    assert again.evaluate(rows(3)) == evaluated
    failing.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        again.evaluate(rows(3))
    stopping = StopAfterFirst()
    again.add_callback(stopping)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(stopping)
    again.train()
    timed = ("step_time", "rollout_share")
    expected, got = (
        [{k: v for k, v in row.items() if k not in timed} for row in run.state.log_history if "loss" in row]
        for run in (whole, again)
    )
    assert got == expected


class StopAfterFirst(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt
