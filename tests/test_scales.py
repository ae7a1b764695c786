"""Scale schedules: table 14 and lookups in it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from transformers_nextflow.scales import PAPER_LEVELS, ScaleSchedule, ScheduleTable, paper_schedules

PAPER_TABLE = Path(__file__).parents[2] / "shared/paper/scale_schedules.json"


@pytest.fixture(scope="module")
def table():
    return ScheduleTable(paper_schedules(), PAPER_LEVELS, patch_size=16)


@pytest.mark.skipif(not PAPER_TABLE.exists(), reason="the paper's table is not beside the repository")
def test_package_data_is_table_14():
    rows = json.loads(PAPER_TABLE.read_text())["schedules"]
    assert [list(map(list, row)) for row in paper_schedules()] == [row["scales"] for row in rows]


def test_table_14_has_41_ratios_of_18_scales_and_123_distinct_grids(table):
    assert len(paper_schedules()) == 41
    assert all(len(row) == 18 and row[0] == (1, 1) for row in paper_schedules())
    assert len(table) == len({schedule.final_grid for schedule in table}) == 123
    assert table.max_scales == 18
    assert table.finest_edge == 64


def test_every_row_transposed_is_a_row():
    rows = set(paper_schedules())
    assert {tuple((w, h) for h, w in row) for row in rows} == rows


@pytest.mark.parametrize("level, scales, codes", [("256", 12, 900), ("512", 16, 3684), ("1024", 18, 10084)])
def test_square_code_counts(table, level, scales, codes):
    schedule = table.by_aspect_ratio("1:1", level)
    assert (len(schedule), schedule.num_codes) == (scales, codes)
    assert schedule.grids == tuple((edge, edge) for edge, _ in schedule)


@pytest.mark.parametrize("level, fewest, most", [("256", 815, 905), ("1024", 9093, 10089)])
def test_code_counts_are_about_constant_over_aspect_ratios(table, level, fewest, most):
    counts = [schedule.num_codes for schedule in table.of_level(level)]
    assert len(counts) == 41
    assert (min(counts), max(counts)) == (fewest, most)


def test_offsets_and_slices_tile_the_codes():
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5)))
    assert (schedule.lengths, schedule.offsets, schedule.num_codes) == ((1, 6, 20), (0, 1, 7), 27)
    codes = list(range(27))
    assert [code for scale in range(3) for code in codes[schedule.slice(scale)]] == codes
    assert len(codes[schedule.slice(1)]) == 6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_weights_keep_the_total_and_fall_with_area(table, alpha):
    schedule = table.by_aspect_ratio("7:9", "512")
    weights = schedule.weights(alpha)
    assert sum(w * n for w, n in zip(weights, schedule.lengths)) == pytest.approx(schedule.num_codes)
    scaled = [weight * area**alpha for weight, area in zip(weights, schedule.lengths)]
    assert scaled == pytest.approx([scaled[0]] * len(schedule))


def test_prefix():
    schedule = ScaleSchedule(((1, 1), (2, 2), (3, 3)))
    assert schedule.prefix(2) == ScaleSchedule(((1, 1), (2, 2)))
    assert schedule.prefix(3) == schedule
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and 3, got {wrong}"):
            schedule.prefix(wrong)


@pytest.mark.parametrize("grids", [(), ((2, 2), (3, 3)), ((1, 2), (2, 2))])
def test_the_first_grid_is_one_cell(grids):
    for edge in (1.5, float("inf"), "2"):
        with pytest.raises(ValueError, match="the edges of grids must be integers"):
            ScaleSchedule([(1, 1), (edge, 2)])
    with pytest.raises(ValueError, match=r"begins with the grid \(1, 1\)"):
        ScaleSchedule(grids)


def test_grids_may_not_shrink():
    for before, after in (((2, 3), (3, 2)), ((3, 2), (2, 3))):
        with pytest.raises(ValueError, match=re.escape(f"{before} then {after}")):
            ScaleSchedule(((1, 1), before, after))


def test_lists_become_hashable_tuples():
    assert hash(ScaleSchedule([[1, 1], [2, 2]])) == hash(ScaleSchedule(((1, 1), (2, 2))))


def test_lookups_agree(table):
    for schedule in table:
        assert table.by_grid(schedule.final_grid) is schedule
        assert table.by_size(*table.image_size(schedule)) is schedule
        h, w = schedule.final_grid
        assert table.by_aspect_ratio(f"{w}:{h}", table.level_of((h, w))) is schedule
        assert table.nearest_to_image(16 * h, 16 * w, table.level_of((h, w))) is schedule


def test_aspect_ratio_is_width_to_height(table):
    h, w = table.by_aspect_ratio("2:1").final_grid
    assert w == 2 * h


def test_errors_name_the_nearest(table):
    with pytest.raises(ValueError, match=r"grid \(64, 63\); nearest: \(64, 64\)(, \(\d+, \d+\)){2}$"):
        table.by_grid((64, 63))
    with pytest.raises(ValueError, match="1000x1000 .*nearest: 1024x1024"):
        table.by_size(1000, 1000)
    with pytest.raises(ValueError, match="1024x1030 .*nearest: 1024x1024"):  # 1030 is no multiple of 16
        table.by_size(1024, 1030)
    with pytest.raises(ValueError, match=r"16:9 .*nearest: 7:4(, \d+:\d+){3}$"):
        table.by_aspect_ratio("16:9")
    with pytest.raises(ValueError, match="one of 256, 512, 1024, got 768"):
        table.by_aspect_ratio("1:1", 768)
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="an image has at least one pixel, got {}x{}".format(*size)):
            table.nearest_to_image(*size)
    assert table.nearest_to_image(1, 1) is table.by_aspect_ratio()


@pytest.mark.parametrize("ratio", ["1", "1:0", "0:1", "-1:1", "1:-1", "a:b", "1:1:1"])
def test_malformed_aspect_ratios_are_refused(table, ratio):
    with pytest.raises(ValueError, match="must read"):
        table.by_aspect_ratio(ratio)


@pytest.mark.parametrize(
    "grid",
    [(64.9, 64.2), (64.0, 64), (64, 64, 3), (64,), ("64", "64"), 64, None, torch.tensor([64.0, 64.0])],
    ids=repr,
)
def test_a_grid_is_two_integers(table, grid):
    with pytest.raises(ValueError, match="a grid must be two integers, height and width, got"):
        table.by_grid(grid)


@pytest.mark.parametrize("grid", [[64, 64], np.array([64, 64]), torch.tensor([64, 64]), (np.int64(64), np.int32(64))])
def test_integers_of_numpy_and_torch_name_a_grid(table, grid):
    assert table.by_grid(grid) is table.by_grid((64, 64))


def test_two_schedules_with_one_final_grid_are_refused():
    with pytest.raises(ValueError, match=r"share the final grid \(4, 4\)"):
        ScheduleTable([[(1, 1), (2, 2), (4, 4)], [(1, 1), (3, 3), (4, 4)]], {"only": 3}, patch_size=8)


def test_a_level_longer_than_a_row_is_refused():
    for rows, levels in (([], {"only": 1}), ([[(1, 1)]], {})):
        with pytest.raises(ValueError, match="at least one row and one level"):
            ScheduleTable(rows, levels, patch_size=8)
    with pytest.raises(ValueError, match="between 1 and 2, got 3"):
        ScheduleTable([[(1, 1), (2, 2)]], {"only": 3}, patch_size=8)
