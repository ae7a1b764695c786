"""Rollouts at a lower level than the model's: the same first scales, and what still tells the levels apart."""

import pytest
import torch
from grpo_samples import policy_of
from test_grpo_trainer import rows, trainer

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
)

SCALES, LEVELS = [[[1, 1], [2, 2], [3, 3]]], {"16": 2, "24": 3}


@pytest.fixture
def policy(tiny_config) -> NextFlowForConditionalGeneration:
    values = tiny_config.to_dict()
    values["vq_config"] |= {"scale_schedules": SCALES, "levels": LEVELS}
    torch.manual_seed(0)
    return policy_of(NextFlowForConditionalGeneration(NextFlowConfig.from_dict(values)))


@pytest.fixture
def run(policy, text_tokenizer, tmp_path):
    def run(**values) -> dict:
        processor = NextFlowProcessor(
            NextFlowImageProcessor(patch_size=8, scale_schedules=SCALES, levels=LEVELS), text_tokenizer
        )
        dataset = [row for row in rows() if not row["images"]]
        trained = trainer(policy, processor, tmp_path, dataset=dataset, **values)
        trained.train()
        return trained

    return run


def test_the_difference_between_levels_is_measured_scale_by_scale(run, policy):
    trained = run(rollout_level="16", temperature=1.3)
    row, rollouts = trained.state.log_history[0], trained._buffer[0]
    assert trained.schedule.final_grid == (2, 2) and rollouts.codes.shape == (8, 5)
    logps = {}
    for grid in ((2, 2), (3, 3)):
        with torch.no_grad():
            logits = policy(
                input_ids=rollouts.input_ids,
                attention_mask=rollouts.attention_mask,
                image_codes=rollouts.codes.flatten(),
                image_grid_hw=torch.tensor([grid] * 8),
                logits_over="codes",
                logits_to_keep=5,
            ).logits
        logps[grid] = (logits / 1.3).log_softmax(-1)
    difference = logps[2, 2] - logps[3, 3]
    kl = (logps[2, 2].exp() * difference).sum(-1)
    drawn = difference.gather(-1, rollouts.codes[..., None]).squeeze(-1).abs()
    for scale, at in ((1, slice(0, 1)), (2, slice(1, 5))):
        assert row[f"level/kl/scale_{scale}"] == pytest.approx(kl[:, at].mean().item(), rel=1e-4)
        assert row[f"level/logp_difference/scale_{scale}"] == pytest.approx(drawn[:, at].mean().item(), rel=1e-4)
        assert row[f"level/kl/scale_{scale}"] > 1e-4


def test_the_number_of_scales_is_all_that_tells_the_levels_apart(run, policy):
    with torch.no_grad():
        policy.model.scale_embedding.length.weight.zero_()
    row = run(rollout_level="16").state.log_history[0]
    levels = {name: value for name, value in row.items() if name.startswith("level/")}
    assert len(levels) == 4 and not any(levels.values())


def test_nothing_is_measured_at_the_level_of_the_model(run):
    assert not any(name.startswith("level/") for name in run(rollout_level="24").state.log_history[0])
