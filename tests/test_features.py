"""Taps against the interpolations they stand for."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import relative

from transformers_nextflow import NextFlowVQConfig, ScaleSchedule
from transformers_nextflow.features import Taps, join, scale_taps

TABLE = NextFlowVQConfig().schedule_table()
SCHEDULES = [
    ScaleSchedule(((1, 1), (2, 2), (3, 3), (5, 5))),
    ScaleSchedule(((1, 1), (1, 2), (2, 4), (3, 7))),
    TABLE.by_aspect_ratio("1:1", "1024"),
    TABLE.by_aspect_ratio("16:9", "512", exact=False),
    TABLE.by_aspect_ratio("1:3", "256", exact=False),
]
EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule.final_grid))


def entries_of(schedule: ScaleSchedule, seed: int = 0) -> torch.Tensor:
    """(codes, 8) float32."""
    return torch.randn(schedule.num_codes, 8, generator=torch.Generator().manual_seed(seed))


def as_map(entries: torch.Tensor, schedule: ScaleSchedule, scale: int) -> torch.Tensor:
    return entries[schedule.slice(scale)].T.reshape(1, -1, *schedule[scale])


def as_rows(features: torch.Tensor) -> torch.Tensor:
    return features[0].flatten(1).T


@EACH_SCHEDULE
def test_residual_features_are_one_scales_entries_on_the_next_grid(schedule):
    entries = entries_of(schedule)
    for scale in range(len(schedule) - 1):
        expected = F.interpolate(as_map(entries, schedule, scale), size=schedule[scale + 1], mode="bicubic")
        taps = scale_taps(schedule, scale, scale + 1)
        assert relative(taps(entries), as_rows(expected)) < 4e-6
        assert len(taps.places) <= 16 * len(taps.starts)


@EACH_SCHEDULE
def test_accumulated_features_are_the_running_sum_on_the_next_grid(schedule):
    entries, total = entries_of(schedule), 0.0
    for scale in range(len(schedule) - 1):
        total = total + F.interpolate(as_map(entries, schedule, scale), size=schedule.final_grid, mode="bicubic")
        expected = F.interpolate(total, size=schedule[scale + 1], mode="area")
        assert relative(scale_taps(schedule, scale, scale + 1, accumulate=True)(entries), as_rows(expected)) < 2e-5


@EACH_SCHEDULE
def test_on_its_own_grid_a_scale_is_its_entries(schedule):
    entries, scale = entries_of(schedule), len(schedule) - 1
    taps = scale_taps(schedule, scale, scale)
    assert torch.equal(taps(entries), entries[schedule.slice(scale)])
    assert len(taps.places) == schedule.lengths[-1]


def test_the_gradient_is_the_interpolations():
    schedule = SCHEDULES[1]
    entries, upstream = entries_of(schedule).requires_grad_(), entries_of(schedule, 1)[: schedule.lengths[3]]
    (ours,) = torch.autograd.grad(scale_taps(schedule, 2, 3)(entries), entries, upstream)
    resized = F.interpolate(as_map(entries, schedule, 2), size=schedule[3], mode="bicubic")
    (expected,) = torch.autograd.grad(as_rows(resized), entries, upstream)
    assert relative(ours, expected) < 4e-6


def test_joined_taps_are_each_on_its_own_rows():
    rows = [entries_of(schedule, seed) for seed, schedule in enumerate(SCHEDULES[:2])]
    parts = [scale_taps(schedule, 1, 2) for schedule in SCHEDULES[:2]]
    joined = join(parts, [0, len(rows[0])])
    assert torch.equal(joined(torch.cat(rows)), torch.cat([part(own) for part, own in zip(parts, rows)]))
    nothing = join([], [])
    assert isinstance(nothing, Taps) and nothing(rows[0]).shape == (0, 8)


def test_taps_first_made_in_inference_mode_can_be_trained_with():
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5)))
    with torch.inference_mode():
        scale_taps(schedule, 1, 2)
    entries = entries_of(schedule).requires_grad_()
    scale_taps(schedule, 1, 2)(entries).sum().backward()
    assert entries.grad.sum() > 0
