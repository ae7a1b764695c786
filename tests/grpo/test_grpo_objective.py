"""Eq. 3 to 5 by hand, and what sampling and training must agree on."""

import math
from types import SimpleNamespace

import pytest
import torch
from grpo_samples import SCHEDULE, chat, picture, policy_of

from transformers_nextflow.sampling import LinearRamp, ScaleInterval, sample
from transformers_nextflow.training.chats import with_images
from transformers_nextflow.training.grpo.objective import (
    clipped_policy_loss,
    code_logps,
    group_advantages,
    kl_to_reference,
    log_ratios,
    nanstd,
    normalized_sum_advantages,
    num_prefix_scales,
    prefix_values,
    sampling_support,
    token_weights,
)
from transformers_nextflow.training.grpo.prompts import PromptOrder, columns, conversations, seed_of
from transformers_nextflow.training.grpo.rollouts import roll_out, rollout_logps


@pytest.fixture(scope="module")
def policy(tiny_model):
    return policy_of(tiny_model)


def settings(**values) -> SimpleNamespace:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0, "logprob_mode": "behaviour"}
    defaults |= {"optimize": "image"}
    return SimpleNamespace(**defaults | values)


def sampled(policy, processor, args, prompts=None, m=3, aspect_ratio="1:1", count=2):
    schedule = policy.model.schedules.by_aspect_ratio(aspect_ratio)
    prompts = prompts or [chat("a large red circle"), chat("blue")]
    prefix = schedule.prefix(m)
    seeds = range(len(prompts) * count)
    rollouts, codes = roll_out(policy, processor, prompts, count, seeds, prefix, schedule, args)
    return rollouts, codes, prefix, schedule


@pytest.mark.parametrize("aspect_ratio", ["1:1", "2:1"])
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"guidance_scale": 3.0},
        {"guidance_scale": 4.0, "temperature": 1.3, "top_k": 5, "top_p": 0.8},
        {"guidance_scale": [1.0, 4.0, 2.0], "temperature": LinearRamp(1.5, 0.5), "top_k": [0, 5, 9]},
        {"guidance_scale": ScaleInterval(3.0, 0, 0), "temperature": [1.0, 0.7, 1.0], "top_p": [1.0, 0.6, 1.0]},
    ],
    ids=str,
)
def test_teacher_forced_log_probabilities_are_those_of_sampling(policy, tiny_processor, aspect_ratio, m, controls):
    """Ragged prompts, one of them with an image."""
    args = settings(**controls)
    prompts = [
        chat("a large red circle and more"),
        chat("blue", picture(1)),
        chat("make it green", picture(2, 16, 32)),
    ]
    rollouts, _, prefix, schedule = sampled(policy, tiny_processor, args, prompts, m, aspect_ratio)
    with torch.no_grad():
        logps, entropies = rollout_logps(policy, rollouts, prefix, schedule, args)
    torch.testing.assert_close(logps, rollouts.sampling_logps, rtol=1e-5, atol=1e-5)
    assert (logps <= 1e-6).all() and logps.min() < -0.01
    assert (entropies >= 0).all() and (entropies <= math.log(64) + 1e-5).all()


@pytest.mark.parametrize(
    ("controls", "m", "filtered", "guided"),
    [
        ({}, 3, False, False),
        ({"top_k": 3}, 3, True, False),
        ({"top_p": 0.6}, 3, True, False),
        ({"guidance_scale": 3.0}, 3, False, True),
        ({"top_k": [0, 5, 9], "guidance_scale": [1.0, 4.0, 2.0]}, 1, False, False),  # later than the prefix
        ({"top_k": [0, 5, 9], "guidance_scale": [1.0, 4.0, 2.0]}, 2, True, True),
    ],
)
def test_kept_is_only_what_log_probabilities_depend_on(policy, tiny_processor, controls, m, filtered, guided):
    rollouts, *_ = sampled(policy, tiny_processor, settings(**controls), m=m)
    assert (rollouts.support is not None, rollouts.null_input_ids is not None) == (filtered, guided)


def test_conditional_log_probabilities_forget_guidance_and_filters(policy, tiny_processor):
    plain, guided = (
        settings(logprob_mode="conditional"),
        settings(logprob_mode="conditional", guidance_scale=3.0, top_k=4),
    )
    rollouts, _, prefix, schedule = sampled(policy, tiny_processor, guided)
    assert rollouts.support is None and rollouts.null_input_ids is None
    with torch.no_grad():
        logps, _ = rollout_logps(policy, rollouts, prefix, schedule, guided)
        as_plain, _ = rollout_logps(policy, rollouts, prefix, schedule, plain)
    torch.testing.assert_close(logps, as_plain, rtol=0, atol=0)
    assert (logps - rollouts.sampling_logps).abs().max() > 0.1
    rollouts, *_ = sampled(policy, tiny_processor, plain)  # without either both are one
    with torch.no_grad():
        logps, _ = rollout_logps(policy, rollouts, prefix, schedule, plain)
    torch.testing.assert_close(logps, rollouts.sampling_logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("m", [1, 2])
def test_a_forward_cut_after_the_prefix_is_the_whole_forward_there(policy, tiny_processor, m):
    args = settings()
    rollouts, codes, prefix, schedule = sampled(policy, tiny_processor, args, [chat("a ring", picture(3))], m)
    with torch.no_grad():
        cut, _ = rollout_logps(policy, rollouts, prefix, schedule, args)
    whole, _, everything, _ = sampled(policy, tiny_processor, args, [chat("a ring", picture(3))], 3)
    assert torch.equal(whole.codes, codes)
    with torch.no_grad():
        full, _ = rollout_logps(policy, whole, everything, schedule, args)
    torch.testing.assert_close(cut, full[:, : prefix.num_codes], rtol=0, atol=1e-5)
    assert cut.shape[1] < full.shape[1]


def test_a_picture_is_the_same_in_any_batch_and_group(policy, tiny_processor):
    args, schedule = settings(), policy.model.schedules.by_aspect_ratio("1:1")
    draw = lambda prompts, count, seeds: roll_out(  # noqa: E731
        policy, tiny_processor, [chat(prompt) for prompt in prompts], count, seeds, schedule, schedule, args
    )[1]
    both = draw(["a", "a blue ring"], 2, [6, 7, 8, 9])
    assert torch.equal(both[2:], draw(["a blue ring"], 2, [8, 9]))
    assert torch.equal(both[3:], draw(["a blue ring"], 1, [9])) and not torch.equal(both[2], both[3])


def test_the_score_function_gives_the_gradient_of_the_expected_reward():
    """All codes of a small codebook, enumerated."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, 5, dtype=torch.float64)
    probabilities = logits[0].softmax(-1)
    (exact,) = torch.autograd.grad((probabilities[0][:, None] * probabilities[1] * reward).sum(), logits)
    surrogate = 0.0
    for first in range(5):
        for second in range(5):
            codes = torch.tensor([[first, second]])
            logps = logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
            ratios = log_ratios(logps, logps.detach(), (1, 1), "token")
            losses, _, _ = clipped_policy_loss(ratios, reward[first, second][None], 0.2, 0.2)
            surrogate = surrogate - losses.sum() * (probabilities[0, first] * probabilities[1, second]).detach()
    (estimate,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimate, exact)


def test_the_policy_loss_is_eq_5_by_hand():
    """Two scales, both levels of the ratio, either sign of the advantage."""
    prefix = SCHEDULE.prefix(2)
    torch.manual_seed(0)
    logps, old = (torch.randn(2, 5) * 0.3 - 1 for _ in range(2))
    advantages = torch.tensor([1.5, -0.5])
    weights = token_weights(prefix, 0.9)
    k = [1.0, 1 / 4**0.9]
    total = k[0] * 1 + k[1] * 4
    torch.testing.assert_close(weights, torch.tensor([k[0], *[k[1]] * 4]) / total)
    for level in ("token", "scale"):
        expected = 0.0
        for row in range(2):
            for scale, codes in enumerate([[0], [1, 2, 3, 4]]):
                differences = [(logps[row, code] - old[row, code]).item() for code in codes]
                if level == "scale":
                    differences = [sum(differences) / len(codes)] * len(codes)
                for difference in differences:
                    ratio, advantage = math.exp(difference), advantages[row].item()
                    clipped = min(max(ratio, 0.8), 1.3)
                    expected -= k[scale] / total * min(ratio * advantage, clipped * advantage) / 2
        ratios = log_ratios(logps, old, prefix.lengths, level)
        losses, low, high = clipped_policy_loss(ratios, advantages, 0.2, 0.3)
        assert (losses * weights).sum(1).mean().item() == pytest.approx(expected, rel=1e-5)
        assert (low | high).any() and not (low & high).any()


def test_clipped_codes_have_no_gradient():
    ratios = torch.tensor([[math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    for advantage, clipped in ((1.0, 0), (-1.0, 1)):
        losses, low, high = clipped_policy_loss(ratios, torch.tensor([advantage]), 0.2, 0.2)
        (gradient,) = torch.autograd.grad(losses.sum(), ratios)
        assert [bool(value) for value in gradient[0] == 0] == [place == clipped for place in range(3)]
        assert [bool(value) for value in (low | high)[0]] == [place == clipped for place in range(3)]


def test_advantages_are_eq_4_and_silent_rewards_do_not_count():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    advantages = group_advantages(rewards, 3)[0]
    torch.testing.assert_close(advantages[:3], (rewards[:3] - 3) / (rewards[:3].std() + 1e-4))
    assert not advantages[3:].any()
    by_batch = group_advantages(rewards, 3, "batch")[0]
    torch.testing.assert_close(by_batch[:3], (rewards[:3] - 3) / (rewards.std() + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, 3, "none")[0][:3], rewards[:3] - 3)
    assert nanstd(torch.tensor([[1.0, math.nan]])) == 0  # of a single value
    silent = group_advantages(torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan]), 3)[0]
    torch.testing.assert_close(silent[:3], torch.tensor([-1.0, 0.0, 1.0]) / (2**0.5 + 1e-4))
    assert not silent[3:].any()


def test_groups_of_equal_rewards_say_nothing_however_large_they_are():
    """In float32 the mean of seven rewards of 98765.4 is another number."""
    rewards = torch.tensor([98765.4] * 7 + [98765.4, *[98766.4] * 6])
    for scale_rewards in ("group", "batch", "none"):
        advantages, _ = group_advantages(rewards, 7, scale_rewards)
        assert not advantages[:7].any() and advantages[7] < 0 < advantages[8]
    assert group_advantages(rewards, 7)[1][0] == 0 and nanstd(rewards[None, :7]) == 0
    advantages, _ = normalized_sum_advantages(rewards[:, None].expand(-1, 2), torch.tensor([1.0, 0.5]), 7)
    assert advantages[:7].abs().max() < 1e-6 and advantages[7] < 0 < advantages[8]
    assert not normalized_sum_advantages(rewards[:7, None], torch.ones(1), 7)[0].any()


def test_each_functions_rewards_are_normalised_in_their_groups():
    rewards_NF = torch.tensor([[1.0, 9], [2, 9], [6, 0], [0, 4], [math.nan, 2], [3, math.nan]])  # two groups
    advantages, deviation = normalized_sum_advantages(rewards_NF, torch.tensor([1.0, 0.5]), 3)
    sums = torch.zeros(6)
    for weight, rewards in zip((1.0, 0.5), rewards_NF.T):
        for group in (slice(0, 3), slice(3, 6)):
            there = rewards[group][~rewards[group].isnan()]
            sums[group] += (weight * (rewards[group] - there.mean()) / (there.std() + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(deviation, sums.std()[None, None])
    torch.testing.assert_close(advantages, (sums - sums.mean()) / (sums.std() + 1e-4))


def test_kl_is_zero_at_the_reference_and_its_mean_is_the_kl():
    torch.manual_seed(0)
    logits, reference = torch.randn(1, 1, 6, requires_grad=True), torch.randn(1, 1, 6)
    same = kl_to_reference(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    (gradient,) = torch.autograd.grad(same.sum(), logits)
    assert not same.any() and gradient.abs().max() < 1e-7
    logps, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    k3 = kl_to_reference(logps, ref)
    assert (k3 >= 0).all()
    exact = (logps.exp() * (logps - ref)).sum()
    torch.testing.assert_close((logps.exp() * k3).sum(), exact)


def test_with_the_ratio_value_and_gradient_of_the_kl_are_eq_5s():
    """All codes, enumerated as drawn by an older policy."""
    torch.manual_seed(0)
    logits, reference, older = torch.randn(6, requires_grad=True), torch.randn(6), torch.randn(6)
    logps, ref, old = logits.log_softmax(-1), reference.log_softmax(-1), older.log_softmax(-1)
    gradient = lambda value: torch.autograd.grad(value, logits, retain_graph=True)[0]  # noqa: E731
    exact, reverse = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    estimate = (old.exp() * kl_to_reference(logps, ref, old)).sum()
    torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(gradient(estimate), gradient(exact))
    alone = (logps.detach().exp() * kl_to_reference(logps, ref)).sum()
    torch.testing.assert_close(gradient(alone), gradient(reverse))
    assert (gradient(reverse) - gradient(exact)).abs().max() > 0.05


def test_values_of_prefixes_leave_out_what_has_no_reward():
    rewards = torch.tensor([[1.0, 2.0, math.nan], [math.nan] * 3, [3.0, 3.0, 3.0]])
    values = prefix_values(rewards, 0.5)
    assert values[0].item() == pytest.approx(0.5 * math.log((math.exp(2) + math.exp(4)) / 2))
    assert values[1].isnan() and values[2].item() == pytest.approx(3.0)
    assert torch.equal(prefix_values(rewards[:1, :1], 0.5), rewards[0, :1])


def test_a_soft_value_of_prefixes_is_the_mean_of_their_rewards():
    rewards = torch.tensor([[0.1, 0.2, 0.4], [0.3, 0.3, 0.3]])
    torch.testing.assert_close(prefix_values(rewards, 1e6), rewards.mean(dim=1), rtol=1e-5, atol=0)


def test_codes_that_do_not_count_have_no_part_in_the_ratio_of_their_scale():
    logps, old = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    counts = torch.tensor([[True, True, False, False, True], [False] * 5])
    ratios = log_ratios(logps, old, (1, 4), "scale", counts)
    (gradient,) = torch.autograd.grad(ratios[counts].sum(), logps)
    assert not gradient[~counts].any()
    torch.testing.assert_close(ratios[0, 1:], (logps - old)[0, [1, 4]].mean().expand(4))


def test_log_probabilities_are_renormalised_over_the_support():
    logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
    support = torch.tensor([[[True, False, True, False]]])
    logps, entropy = code_logps(logits, torch.tensor([[2]]), torch.tensor([2.0]), support)
    probability = 1 / (1 + math.exp(1.0))
    assert logps.item() == pytest.approx(math.log(probability))
    expected = -sum(p * math.log(p) for p in (probability, 1 - probability))
    assert entropy.item() == pytest.approx(expected)


def test_the_support_and_its_probabilities_are_those_of_sampling():
    """Every code's share of a fine grid of draws."""
    torch.manual_seed(0)
    logits, draws = 2 * torch.randn(1, 1, 9), 40_000
    uniform = ((torch.arange(draws) + 0.5) / draws)[:, None]
    for controls in ((1.7, 0, 0.7), (0.6, 4, 1.0), (1.3, 5, 0.8)):
        drawn = sample(logits.expand(draws, 1, 9), *controls, uniform)
        frequencies = drawn.flatten().bincount(minlength=9) / draws
        support = sampling_support([logits], *([value] for value in controls))
        assert torch.equal(support[0, 0], frequencies > 0)
        codes = support[0, 0].nonzero().T
        temperature, several = torch.full((codes.shape[1],), controls[0]), codes.shape[1]
        logps, _ = code_logps(logits.expand(1, several, 9), codes, temperature, support.expand(1, several, 9))
        torch.testing.assert_close(logps.exp()[0], frequencies[codes[0]], rtol=0, atol=2 / draws)


def test_all_codes_can_be_drawn_at_a_scale_without_filters():
    """Another scale has them; from the most likely on, probabilities sum up to 1 before the last."""
    logits = torch.tensor([-20.0, 0.0]).expand(1, 1, 2)
    assert sample(logits, 1.0, 0, 1.0, torch.zeros(1, 1)) == 0
    assert sampling_support([logits, logits], [1.0, 1.0], [0, 0], [1.0, 0.9]).tolist() == [[[True] * 2, [False, True]]]


def test_the_prefix_is_the_most_scales_that_fit():
    assert num_prefix_scales(SCHEDULE, None, 256) == 3
    assert num_prefix_scales(SCHEDULE, None, 13) == 2 and num_prefix_scales(SCHEDULE, None, 1) == 1
    assert num_prefix_scales(SCHEDULE, 1, 256) == 1 and num_prefix_scales(SCHEDULE, None, None) == 3
    assert num_prefix_scales(SCHEDULE, None, 14) == num_prefix_scales(SCHEDULE, 3, None) == 3
    for scales in (0, 4):
        with pytest.raises(ValueError, match=rf"scale_prefix must lie in \[1, 3\].*got {scales}"):
            num_prefix_scales(SCHEDULE, scales, None)
    with pytest.raises(ValueError, match="prefix_tokens must hold the first scale of 1 codes, got 0"):
        num_prefix_scales(SCHEDULE, None, 0)


def test_prompts_come_in_groups_of_their_generations_and_repetitions():
    order = PromptOrder(7, prompts_at_once=2, num_generations=3, repeats=2, seed=None)
    assert len(order) == len(list(order)) == 6 * 3 * 2
    assert list(order)[:12] == [0, 0, 0, 1, 1, 1] * 2 and list(order)[-12:] == [4, 4, 4, 5, 5, 5] * 2
    mixed = PromptOrder(7, 2, 3, 2, seed=0)
    first = list(mixed)
    mixed.set_epoch(1)
    assert len(set(first)) == 6 and first != list(mixed) and first != list(order)


def test_a_conversation_is_read_once_for_a_run_of_equal_rows():
    rows = [(number, {"prompt": f"box {number}", "size": number}) for number in range(3)]
    for numbers, read, repeats in (([0, 0, 2, 2], [0, 2], 2), ([1, 1, 2, 2, 2], [1, 1, 2, 2, 2], 1), ([2], [2], 1)):
        chats, found = conversations([rows[number] for number in numbers])
        assert [chat[0]["content"][0]["text"] for chat in chats] == [f"box {number}" for number in read]
        assert found == repeats
    assert columns(rows) == {"size": [0, 1, 2]}


def test_seeds_of_numbers_are_the_same_everywhere():
    assert seed_of(5, 0, 1) == 3073054868 and max(seed_of(number) for number in range(99)) < 2**32
    assert len({seed_of(*parts) for parts in ((1, 2), (12,), (2, 1), (1, 2, 0), (-1, 2))}) == 5


def test_pictures_fill_the_image_items_or_go_first():
    one, two = picture(1), picture(2)
    filled = with_images(
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}]}],
        [one, two],
        "prompt 0",
    )
    assert [item.get("image") for item in filled[0]["content"]] == [None, one, two]
    first = with_images("make it red", [one], "prompt 0")
    assert [item["type"] for item in first[0]["content"]] == ["image", "text"]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "make it red"}]
    told = with_images([*chat, {"role": "user", "content": "now"}], [one], "prompt 0")
    assert [[item["type"] for item in each["content"]] for each in told] == [["text"], ["image", "text"], ["text"]]
    assert with_images(chat[:1], one, "prompt 0")[0]["content"][0]["image"] is one  # where no user speaks
    with pytest.raises(ValueError, match="prompt 4 has 1 places for images, and 0 images"):
        with_images([{"role": "user", "content": [{"type": "image"}]}], None, "prompt 4")
    with pytest.raises(ValueError, match="prompt 5 has 2 places for images, and 1 images"):
        with_images("x", [one, None], "prompt 5")
