"""Answers of a text, then a picture: what is sampled, what is scored, what is optimised, what rewards see."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from grpo_samples import chat, picture, policy_of
from test_grpo_trainer import moved, redness, rows, state, trainer

from transformers_nextflow.lora import lora_config
from transformers_nextflow.training.grpo.rollouts import Rollouts, roll_out, rollout_logps

LIMIT = 6
PROMPTS = [chat("a large red circle and more"), chat("blue", picture(1)), chat("make it green", picture(2, 16, 32))]


@pytest.fixture(scope="module")
def policy(tiny_model):
    """One that goes on to the picture after some tokens."""
    policy = policy_of(tiny_model)
    with torch.no_grad():
        policy.lm_head.weight[policy.config.boi_token_id] *= 4
    return policy


def settings(**values) -> SimpleNamespace:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0, "logprob_mode": "behaviour"}
    defaults |= {"text_temperature": 1.0, "text_top_k": 0, "text_top_p": 1.0, "max_completion_length": LIMIT}
    return SimpleNamespace(**defaults | {"optimize": "both"} | values)


def sampled(policy, processor, args, prompts=PROMPTS, m=3, count=2, seeds=None, **kwargs):
    schedule = policy.model.schedules.by_aspect_ratio("1:1")
    prefix, seeds = schedule.prefix(m), range(len(prompts) * count) if seeds is None else seeds
    rollouts, codes = roll_out(policy, processor, prompts, count, seeds, prefix, schedule, args, **kwargs)
    return rollouts, codes, prefix, schedule


def logps_of(policy, rollouts, prefix, schedule, args) -> torch.Tensor:
    with torch.no_grad():
        return rollout_logps(policy, rollouts, prefix, schedule, args)[0]


@pytest.mark.parametrize(("optimize", "m"), [("text", 3), ("both", 1), ("both", 3)])
@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"text_temperature": 1.7, "temperature": 0.7},
        {"text_top_k": 6, "top_k": 3},
        {"text_top_p": 0.7},
        {"guidance_scale": 3.0, "text_temperature": 1.4, "text_top_k": 20, "text_top_p": 0.9, "top_p": 0.8},
    ],
    ids=str,
)
def test_teacher_forced_log_probabilities_are_those_of_sampling(policy, tiny_processor, controls, optimize, m):
    """Ragged prompts, two of them with images, and ragged texts."""
    args = settings(optimize=optimize, **controls)
    rollouts, _, prefix, schedule = sampled(policy, tiny_processor, args, m=m, count=4)
    logps = logps_of(policy, rollouts, prefix, schedule, args)
    num_tokens = rollouts.text_mask.shape[1]
    assert logps.shape == (12, num_tokens + (prefix.num_codes if optimize == "both" else 0))
    torch.testing.assert_close(logps, rollouts.sampling_logps, rtol=1e-5, atol=1e-5)
    if rollouts.text_support is not None:  # nothing is left out where nothing was drawn
        assert rollouts.text_support[~rollouts.text_mask].all()
    of_text = logps[:, :num_tokens]
    assert not of_text[~rollouts.text_mask].any() and of_text[rollouts.text_mask].min() < -0.1
    assert len(set(rollouts.text_mask.sum(dim=1).tolist())) > 1


def test_texts_end_in_a_picture_at_the_limit_at_last(policy, tiny_processor):
    args, config = settings(text_temperature=1.3), policy.config
    rollouts, *_ = sampled(policy, tiny_processor, args, count=8)
    lengths, ids = rollouts.text_mask.sum(dim=1), rollouts.text_ids
    assert (ids[:, -1] == config.boi_token_id).all() and lengths.min() >= 1 and lengths.max() == LIMIT
    reached = ~rollouts.text_mask[:, -1]
    assert reached.any() and not reached.all()  # `<boi>` was put there, or sampled
    assert (lengths[reached] == LIMIT).all()
    never = {config.eoi_token_id, config.image_token_id, config.text_config.eos_token_id}
    for text, length, cut in zip(rollouts.texts(), lengths.tolist(), reached.tolist()):
        assert len(text) == (length if cut else length - 1) and not never & set(text)
    every_row = settings(text_temperature=0.01, max_completion_length=2)
    assert sampled(policy, tiny_processor, every_row, m=1)[0].text_mask.shape[1] <= 3


@pytest.mark.parametrize("controls", [{"text_temperature": 1e-3}, {"text_top_k": 1}, {"text_top_p": 1e-6}], ids=str)
def test_texts_are_drawn_with_their_own_controls(policy, tiny_processor, controls):
    """Each leaves the most likely tokens alone."""
    args, config = settings(**controls), policy.config
    rollouts, *_ = sampled(policy, tiny_processor, args, [chat("blue"), chat("a ring")], m=1)
    inputs = tiny_processor.apply_chat_template([chat("blue"), chat("a ring")])
    greedy = policy.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=config.boi_token_id,
        suppress_tokens=[config.eoi_token_id, config.image_token_id, config.text_config.eos_token_id],
        pad_token_id=config.boi_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    expected = [row[row != config.boi_token_id].tolist() for row in greedy]
    assert rollouts.texts() == [text for text in expected for _ in range(2)]
    of_texts = rollouts.sampling_logps[:, : rollouts.text_mask.shape[1]]
    torch.testing.assert_close(of_texts, torch.zeros_like(of_texts), atol=1e-3, rtol=0)  # nothing else could be drawn


def test_probabilities_of_text_are_over_what_can_be_written(policy, tiny_processor):
    """Every token after a prompt, in turn."""
    args = settings(optimize="text", text_temperature=1.5, logprob_mode="conditional")
    rollouts, _, prefix, schedule = sampled(policy, tiny_processor, args, [chat("blue")], count=1, m=1)
    end = rollouts.input_ids.shape[1] - rollouts.text_mask.shape[1]
    prompt, boi = rollouts.input_ids[0, :end], policy.config.boi_token_id
    tokens = torch.arange(policy.config.text_vocab_size)
    ids = torch.cat([prompt.expand(len(tokens), -1), tokens[:, None], tokens[:, None] * 0 + boi], dim=1)
    every = Rollouts(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        condition_codes=torch.empty(len(tokens), 0, dtype=torch.long),
        condition_grids=torch.empty(len(tokens), 0, 2, dtype=torch.long),
        codes=torch.zeros(len(tokens), 1, dtype=torch.long),
        sampling_logps=torch.zeros(len(tokens), 2),
        text_mask=torch.ones(len(tokens), 2, dtype=torch.bool),
    )
    first = logps_of(policy, every, prefix, schedule, args)[:, 0]
    assert first.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    config = policy.config
    impossible = [config.eoi_token_id, config.image_token_id, config.text_config.eos_token_id]
    assert sorted(first.isinf().nonzero().flatten().tolist()) == sorted(impossible)
    with torch.no_grad():
        logits = policy(input_ids=prompt[None], logits_over="text").logits[0, -1] / 1.5
    expected = logits - logits[first.isfinite()].logsumexp(dim=0)
    torch.testing.assert_close(first[first.isfinite()], expected[first.isfinite()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimize", ["text", "both"])
def test_ragged_texts_are_scored_together_as_one_by_one(policy, tiny_processor, optimize):
    args = settings(optimize=optimize, logprob_mode="conditional")
    rollouts, _, prefix, schedule = sampled(policy, tiny_processor, args)
    together = logps_of(policy, rollouts, prefix, schedule, args)
    num_tokens = rollouts.text_mask.shape[1]
    for row in range(6):
        alone = rollouts.rows(slice(row, row + 1))
        at = alone.attention_mask[0].bool()
        first = int(alone.text_mask[0].long().argmax())  # its own text, without the others' columns
        alone.input_ids, alone.attention_mask = alone.input_ids[:, at], alone.attention_mask[:, at]
        alone.text_mask = alone.text_mask[:, first:]
        expected = logps_of(policy, alone, prefix, schedule, args)
        torch.testing.assert_close(together[row : row + 1, first:], expected, rtol=1e-5, atol=1e-5)
        assert not together[row, :first].any() and first < num_tokens


def test_answers_of_a_prompt_are_the_same_in_any_batch(policy, tiny_processor):
    args = settings()
    both, codes, *_ = sampled(policy, tiny_processor, args, PROMPTS[:2], seeds=[6, 7, 8, 9])
    alone, own, *_ = sampled(policy, tiny_processor, args, PROMPTS[1:2], seeds=[8, 9])
    assert torch.equal(codes[2:], own) and both.texts()[2:] == alone.texts()
    assert both.texts()[2] != both.texts()[3]


def test_later_scales_follow_from_the_text_and_prefix_that_are_shared(policy, tiny_processor):
    args = settings()
    rollouts, codes, prefix, _ = sampled(policy, tiny_processor, args, m=2, count=1)
    further, others, *_ = sampled(policy, tiny_processor, args, m=2, count=2, shared=rollouts)
    assert torch.equal(others[:, : prefix.num_codes], codes[:, : prefix.num_codes].repeat_interleave(2, dim=0))
    assert not torch.equal(others, codes.repeat_interleave(2, dim=0))
    end = rollouts.input_ids.shape[1]
    assert torch.equal(further.input_ids[:, -end:], rollouts.input_ids.repeat_interleave(2, dim=0))


def gradients(run, rollouts: Rollouts, optimize: str) -> dict[str, torch.Tensor]:
    """Of the loss of a part of rollouts, or of both."""
    num_tokens = rollouts.text_mask.shape[1]
    columns = {"text": slice(num_tokens), "image": slice(num_tokens, None), "both": slice(None)}[optimize]
    own = {name: getattr(rollouts, name) for name in ("sampling_logps", "old_logps", "ref_logps")}
    own = {name: None if values is None else values[:, columns] for name, values in own.items()}
    run.args.optimize = optimize
    run.model.zero_grad()
    run.compute_loss(run.model, dataclasses.replace(rollouts, **own)).backward()
    return {
        name: parameter.grad.clone() for name, parameter in run.model.named_parameters() if parameter.grad is not None
    }


@pytest.fixture(scope="module")
def run_of_both(policy, tiny_processor, tmp_path_factory):
    """After a step, before the next one on the same rollouts."""
    values = {"optimize": "both", "max_completion_length": LIMIT, "text_loss_weight": 0.3, "beta": 0.2}
    values |= {"num_iterations": 2, "max_steps": 1, "learning_rate": 1e-3}
    run = trainer(policy, tiny_processor, tmp_path_factory.mktemp("both"), **values)
    run.train()
    return run


def test_the_gradient_of_both_is_that_of_the_image_and_that_of_the_text(run_of_both):
    rollouts = run_of_both._buffer[0]
    both, image, text = (gradients(run_of_both, rollouts, name) for name in ("both", "image", "text"))
    assert text["lm_head.weight"].abs().max() > 1e-4 and image["code_head.weight"].abs().max() > 1e-4
    for name, gradient in both.items():
        expected = sum(part.get(name, torch.zeros_like(gradient)) for part in (image, text))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "scale"])
def test_the_loss_of_both_is_as_documented_by_hand(run_of_both, monkeypatch, level):
    """A text's tokens count one by one at either level of the ratio, a scale's codes together at the second."""
    run, rollouts = run_of_both, run_of_both._buffer[0]
    monkeypatch.setattr(run.args, "optimize", "both")
    monkeypatch.setattr(run.args, "importance_sampling_level", level)
    with torch.no_grad():
        logps, _ = rollout_logps(run.model, rollouts, run.prefix, run.schedule, run.args)
        loss = run.compute_loss(run.model, rollouts).item()
    num_tokens, expected = rollouts.text_mask.shape[1], 0.0
    k = [1.0, *[4**-0.9] * 4]
    end = num_tokens + len(k)
    for row, advantage in enumerate(rollouts.advantages.tolist()):

        def ratio(*columns, row=row):
            differences = [(logps[row, column] - rollouts.old_logps[row, column]).item() for column in columns]
            return math.exp(sum(differences) / len(differences))

        def policy(column, advantage=advantage, ratio=ratio):
            together = (column,) if level == "token" or column <= num_tokens else tuple(range(num_tokens + 1, end))
            clipped = min(max(ratio(*together), 0.8), 1.2)
            return -min(ratio(*together) * advantage, clipped * advantage)

        def kl(column, row=row, ratio=ratio):
            difference = (rollouts.ref_logps[row, column] - logps[row, column]).item()
            return 0.2 * ratio(column) * (math.exp(difference) - difference - 1)

        tokens = [column for column in range(num_tokens) if rollouts.text_mask[row, column]]
        expected += 0.3 * sum(policy(token) + kl(token) for token in tokens) / len(tokens) / 8
        expected += sum(weight * policy(num_tokens + code) for code, weight in enumerate(k)) / sum(k) / 8
        expected += sum(kl(num_tokens + code) for code in range(len(k))) / len(k) / 8
    assert loss == pytest.approx(expected, rel=1e-4)


def test_codes_leave_no_gradient_where_the_text_is_optimised(run_of_both):
    rollouts = run_of_both._buffer[0]
    text = gradients(run_of_both, rollouts, "text")
    for part in ("code_head", "model.code_embeddings", "model.scale_embedding"):
        assert not any(gradient.any() for name, gradient in text.items() if name.startswith(part)), part
    others = dataclasses.replace(rollouts, codes=(rollouts.codes + 1) % 64)
    for name, gradient in gradients(run_of_both, others, "text").items():
        assert torch.equal(gradient, text[name])


@pytest.mark.parametrize("optimize", ["text", "both"])
def test_the_ratio_is_one_at_first_and_moves_then(policy, tiny_processor, tmp_path, optimize):
    """With explicit old log-probabilities."""
    values = {"optimize": optimize, "max_completion_length": LIMIT, "num_iterations": 2, "learning_rate": 0.1}
    run = trainer(policy, tiny_processor, tmp_path, max_steps=2, logprob_mode="behaviour", **values)
    run.train()
    first, second = (row for row in run.state.log_history if "loss" in row)
    rollouts = run._buffer[0]
    before = logps_of(policy, rollouts, run.prefix, run.schedule, run.args)
    torch.testing.assert_close(before, rollouts.old_logps, rtol=0, atol=1e-5)
    for name in ("text/",) if optimize == "text" else ("text/", ""):
        assert first[f"{name}clip_ratio/region_mean"] == 0.0 < second[f"{name}clip_ratio/region_mean"]
        assert first[f"{name}sampling/sampling_logp_difference/max"] < 1e-4
        assert first[f"{name}entropy"] > 0
    assert ("entropy" in first) == (optimize == "both")
    drawn = rollouts.text_mask.float()
    assert first["completions/mean_length"] == pytest.approx(drawn.sum(dim=1).mean().item())
    assert first["completions/clipped_ratio"] == pytest.approx(1 - drawn[:, -1].mean().item())


def test_splits_of_a_step_and_resuming_train_the_same(policy, tiny_processor, tmp_path):
    values = {"optimize": "both", "max_completion_length": LIMIT, "max_steps": 2, "num_iterations": 2, "beta": 0.1}
    values |= {"learning_rate": 1e-4}
    ends = {}
    for size in (8, 4):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        split |= {"steps_per_generation": 8 // size, "save_strategy": "steps", "save_steps": 1}
        run = trainer(policy, tiny_processor, tmp_path / str(size), **values, **split)
        run.train()
        ends[size] = state(run.model)
    for name, value in ends[8].items():
        torch.testing.assert_close(ends[4][name], value, rtol=1e-4, atol=1e-5)
    again = trainer(policy, tiny_processor, tmp_path / "4", **values, **split)
    again.train(resume_from_checkpoint=str(tmp_path / "4" / "checkpoint-1"))
    assert not moved(ends[4], state(again.model)) and moved(state(policy), ends[4])


def test_rewards_see_the_text_and_the_picture(policy, tiny_processor, tmp_path):
    seen = []

    def reward(completions, completion_ids, images, **kwargs):
        seen.append((completions, completion_ids))
        return redness(images)

    values = {"optimize": "both", "max_completion_length": LIMIT, "vmr_continuations": 2, "log_completions": True}
    run = trainer(policy, tiny_processor, tmp_path, reward=reward, **values)
    run.train()
    (completions, ids), (further, further_ids) = seen
    assert ids == run._buffer[0].texts() and len(set(map(tuple, ids))) > 1
    assert further_ids == [text for text in ids for _ in range(1)]
    for completion, text in zip(completions, ids):
        (message,) = completion
        assert [item["type"] for item in message["content"]] == ["text", "image"]
        assert message["content"][0]["text"] == tiny_processor.tokenizer.decode(text, skip_special_tokens=True)
    assert (tmp_path / "completions" / "step-1.png").exists()
    assert -2 <= run.evaluate(rows(2))["eval_reward"] <= 2


def test_adapters_learn_to_write_what_is_rewarded(policy, tiny_processor, tmp_path):
    """Short texts, by adapters alone."""

    def brief(completion_ids, **kwargs):
        return [-float(len(text)) for text in completion_ids]

    values = {"optimize": "text", "max_completion_length": LIMIT, "max_steps": 8, "optim": "adamw_torch"}
    values |= {"learning_rate": 3e-2, "num_generations": 8, "per_device_train_batch_size": 16}
    run = trainer(
        policy, tiny_processor, tmp_path, reward=brief, peft_config=lora_config(modules_to_save=None), **values
    )
    run.train()
    curve = [row["reward"] for row in run.state.log_history if "reward" in row]
    assert sum(curve[-3:]) / 3 > curve[0] + 1, curve


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimize": "words"}, "optimize must be one of image, text, both, got 'words'"),
        ({"text_temperature": 0.0}, "text_temperature and text_loss_weight must be positive"),
        ({"text_loss_weight": -1.0}, "text_temperature and text_loss_weight must be positive"),
        ({"text_loss_weight": 0.0}, "text_temperature and text_loss_weight must be positive"),
        ({"text_top_k": -1}, "text_top_k must be an integer of at least 0, got -1"),
        ({"text_top_p": 1.5}, r"text_top_p must be a number in \[1e-06, 1.0\], got 1.5"),
        ({"optimize": "text", "vmr_continuations": 2}, "vmr_continuations values prefixes of pictures"),
        ({"optimize": "both", "max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(policy, tiny_processor, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        trainer(policy, tiny_processor, tmp_path, **values)
