"""The judge, its intervals and baselines, on worlds of a few coloured pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.emoji.baselines import mean_pictures, most_frequent, other_styles
from examples.emoji.intervals import difference, paired_difference, proportion, wilson
from examples.emoji.judge import Judge, features, squared_distances, squares, untouched, untouched_errors
from examples.emoji.validate_judge import CHOSEN, FORGIVEN, LEAST, METRICS, chance, nonsense, shifted
from examples.emoji.world import World, in_a_row

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "emoji_judge.json"
NAMES, STYLES = ["cat", "dog", "sun", "boat"], ["flat", "round"]


def scenery(rng: np.random.Generator, edge: int = 64) -> np.ndarray:
    """A smooth random picture, uint8 (edge, edge, 3)."""
    coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC))


def world_of(pictures: list[np.ndarray], **columns) -> World:
    """Pictures named in turn, first all of one style and then all of the other."""
    count = len(pictures)
    columns = {"names": (NAMES * 2)[:count], "styles": [STYLES[row // 4] for row in range(count)], **columns}
    return World.from_arrays(np.stack(pictures), **columns)


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(0)
    return world_of([scenery(rng) for _ in range(8)])


@pytest.fixture(scope="module")
def judge(world) -> Judge:
    return Judge(world, {"legs": [4, 4, 0, 0] * 2})


# The metric


def test_distances_are_the_integers_that_int64_gives(world):
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    values = features([*world.pictures, black, white])
    exact = np.square(values.astype(np.int64)[:, None] - values.astype(np.int64)).sum(-1)
    assert np.array_equal(squared_distances(values, values), exact)
    assert exact[-1, -2] == 16 * 16 * 3 * 255**2


def test_a_picture_has_the_same_features_at_twice_its_size(world):
    """Up to rounding: the judge takes drawings of any edge."""
    large = [np.repeat(np.repeat(picture, 2, 0), 2, 1) for picture in world.pictures]
    assert np.abs(features(large) - features(world.pictures)).max() <= 4


def test_pictures_that_are_not_square_rgb_of_uint8_are_refused(judge, world):
    for wrong in (np.zeros((64, 128, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8)):
        with pytest.raises(ValueError, match="square RGB"):
            judge.right([wrong], [0])
    with pytest.raises(ValueError, match="as many targets, got 1"):
        judge.right(list(world.pictures[:2]), [0])


# Single pictures


def test_every_picture_is_nearest_to_itself_alone(judge):
    assert np.array_equal(judge.nearest(judge.world.pictures), np.eye(8, dtype=bool))


@pytest.mark.parametrize("change", FORGIVEN)
def test_changed_pictures_find_themselves(judge, change):
    rng = np.random.default_rng(1)
    drawings = [FORGIVEN[change](picture, rng) for picture in judge.world.pictures]
    assert judge.right(drawings, range(8))["picture"].all()


def test_name_style_and_labels_are_judged_apart(judge):
    pictures = judge.world.pictures
    # the flat cat is asked for; the round cat, the flat dog, the round dog and the flat sun are drawn
    right = judge.right(pictures[[4, 1, 5, 2]], [0] * 4)
    assert right["picture"].tolist() == [False, False, False, False]
    assert right["name"].tolist() == [True, False, False, False]
    assert right["style"].tolist() == [False, True, False, True]
    assert right["legs"].tolist() == [True, True, True, False]


def test_a_missing_label_is_met_by_a_picture_without_one(world):
    judge = Judge(world, {"tone": ["dark", "light", None, None] + [None] * 4})
    assert judge.right(world.pictures[[2, 0, 3]], [3, 3, 0])["tone"].tolist() == [True, False, False]


def test_labels_are_one_for_each_picture(world):
    with pytest.raises(ValueError, match="labels of tone must be 8, one a picture, got 2"):
        Judge(world, {"tone": ["dark", "light"]})


def test_pictures_equal_to_the_pixel_are_one_picture(world):
    twins = world_of([*world.pictures[:5], world.pictures[1], *world.pictures[6:]])
    judge = Judge(twins)
    assert twins.twins.tolist() == [0, 1, 2, 3, 4, 1, 6, 7]
    assert judge.nearest(twins.pictures[[5]])[0].nonzero()[0].tolist() == [1, 5]
    right = judge.right(twins.pictures[[1, 5]], [5, 1])
    assert all(verdicts.all() for verdicts in right.values())


def test_pictures_at_one_distance_tie_whatever_their_order(world):
    """Grey of level 100 lies halfway between levels 90 and 110."""
    levels = [90, 110, 90, 0, 110, 255, 200, 40]
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in levels]
    pictures[2][0, 0] += 1  # another picture of the same features: it ties too
    judge = Judge(world_of(pictures))
    grey = np.full((64, 64, 3), 100, np.uint8)
    assert judge.nearest([grey])[0].nonzero()[0].tolist() == [0, 1, 2, 4]
    assert judge.right([grey] * 8, range(8))["picture"].tolist() == [True, True, True, False, True] + [False] * 3


def test_a_constant_drawing_is_right_for_one_picture_only(judge):
    grey = np.full((64, 64, 3), 128, np.uint8)
    right = judge.right([grey] * 8, range(8))
    assert [right[measure].sum() for measure in ("picture", "name", "style")] == [1, 2, 4]


# Rows of pictures


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (40, 120)])
def test_rows_are_judged_square_by_square(judge, shape):
    count = max(shape) // min(shape)
    asked = [0, 5, 2][:count]
    swapped, restyled = [asked[1], asked[0], *asked[2:]], [(row + 4) % 8 for row in asked]
    rows = [asked, swapped, restyled, [asked[0], asked[0], *asked[2:]]]
    canvases = [in_a_row([judge.world.pictures[row] for row in each], *shape) for each in rows]
    right = judge.right_rows(canvases, [asked] * 4)
    assert right["picture"].tolist() == [True, False, False, False]
    assert right["name"].tolist() == [True, False, True, False]
    assert right["style"].tolist() == [True, False, False, False]
    assert right["two objects"].tolist() == [True, True, True, False]
    assert right["counting"].tolist() == [True, True, True, False]
    rest = [True] * (count - 2)
    assert right["squares"].tolist() == [True] * count + [False] * 2 + rest + [False] * count + [True, False] + rest


def test_counting_wants_neither_fewer_nor_more(judge):
    pictures = judge.world.pictures
    asked = [[0, 0, 1], [0, 0, 1], [0, 1, 2]]
    canvases = [in_a_row(list(pictures[each]), 64, 192) for each in ([0, 1, 0], [0, 0, 0], [0, 1, 1])]
    right = judge.right_rows(canvases, asked)
    assert right["counting"].tolist() == [True, False, False]
    assert right["two objects"].tolist() == [True, False, False]


def test_rows_need_as_many_targets_as_squares(judge):
    with pytest.raises(ValueError, match="canvas of 2 squares needs as many targets, got 3"):
        judge.right_rows([np.zeros((64, 128, 3), np.uint8)], [[0, 1, 2]])
    with pytest.raises(ValueError, match="got 0 and 0"):
        judge.right_rows([], [])
    with pytest.raises(ValueError, match="got 64 x 100 pixels"):
        squares(np.zeros((64, 100, 3), np.uint8))


# Edits


def test_untouched_pixels_are_equal_and_not_white():
    source = np.array([[[255, 255, 255], [255, 0, 0], [0, 0, 0], [255, 255, 254]]], np.uint8)
    target = np.array([[[255, 255, 255], [255, 0, 1], [0, 0, 0], [255, 255, 254]]], np.uint8)
    assert untouched(source, target).tolist() == [[False, False, True, True]]
    drawing = np.array([[[0, 0, 0], [0, 0, 0], [3, 0, 0], [255, 255, 251]]], np.uint8)
    assert untouched_errors(drawing, source, target) == ((9 + 9) / 6, (3 + 3) / 6)
    with pytest.raises(ValueError, match="no pixel untouched"):
        untouched_errors(drawing[:, :2], source[:, :2], target[:, :2])
    with pytest.raises(ValueError, match="sizes must be equal"):
        untouched_errors(drawing[:, :2], source, target)


# Intervals


def test_wilson_interval_is_scipys():
    from scipy.stats import binomtest

    for right, n in [(0, 10), (3, 10), (10, 10), (512, 1000)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert proportion([True, True, False, False]) == {"score": 0.5, "low": 0.15, "high": 0.85, "n": 4}


def test_difference_of_different_prompts_is_newcombes():
    """The worked example of Newcombe (1998), table II (a): 56/70 against 48/80."""
    result = difference([True] * 56 + [False] * 14, [True] * 48 + [False] * 32)
    assert (result["score"], result["low"], result["high"]) == (0.2, 0.0524, 0.3339)


def test_paired_difference_uses_the_pairs():
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.5
    better = easy.copy()
    better[np.flatnonzero(~easy)[:20]] = True
    paired, apart = paired_difference(better, easy), difference(better, easy)
    assert paired["score"] == apart["score"] == 0.05
    assert 0 < paired["low"] < 0.05 < paired["high"] < 0.08
    assert apart["low"] < 0  # which different prompts would not show
    assert paired_difference(easy, easy) == {"score": 0.0, "low": 0.0, "high": 0.0, "n": 400}
    half = 1.96 * np.sqrt(0.05 * 0.95 / 400)
    assert paired["high"] - paired["low"] == pytest.approx(2 * half, rel=0.1)
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_difference([1, 0, 1], [1, 0])


def test_nothing_has_no_share():
    with pytest.raises(ValueError, match="no values"):
        proportion([])


# Baselines and nonsense


def test_mean_pictures_leave_out_what_is_held_out(world):
    held = world_of(list(world.pictures), splits=["train", "test", "train", "dev"] + ["train"] * 4)
    means = mean_pictures(held)
    assert np.array_equal(means["flat"], np.round(world.pictures[[0, 2]].astype(float).mean(0)).astype(np.uint8))
    assert np.array_equal(means["round"], np.round(world.pictures[4:].astype(float).mean(0)).astype(np.uint8))


def test_other_styles_are_seen_and_nearest(world):
    rng = np.random.default_rng(2)
    near = np.clip(world.pictures[0].astype(int) + 5, 0, 255).astype(np.uint8)
    pictures = [world.pictures[0], scenery(rng), near, scenery(rng), scenery(rng)]
    columns = {"names": ["cat"] * 4 + ["dog"], "styles": ["a", "b", "c", "d", "a"]}
    assert other_styles(world_of(pictures, **columns), [0, 2, 4]) == [2, 0, None]
    held = world_of(pictures, **columns, splits=["test", "train", "test", "train", "train"])
    assert other_styles(held, [0])[0] in (1, 3)


def test_most_frequent_answer():
    assert most_frequent(["noto", "fluent", "noto", "twemoji"]) == "noto"
    assert most_frequent(["noto", "fluent"]) == "fluent"
    with pytest.raises(ValueError, match="no answers"):
        most_frequent([])


def test_nonsense_is_never_what_was_asked_for_by_design(world):
    rows = np.arange(8)
    for seed in range(20):
        drawings = nonsense(world, rows, np.random.default_rng(seed))
        assert {len(each) for each in drawings.values()} == {8}
        for drawing, row in zip(drawings["pictures of other prompts"], rows):
            assert not np.array_equal(drawing, world.pictures[row])


def test_shifts_go_down_and_right_on_white():
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    moved = shifted(picture, None, 1, -2)
    assert np.array_equal(moved[1:, :2], picture[:-1, 2:])
    assert (moved[0] == 255).all() and (moved[:, 2:] == 255).all()


def test_chance_of_labels():
    labels = ["a", "a", "a", "b"]
    assert chance(labels, np.arange(4)) == {"a random picture": 0.625, "the luckiest picture": 0.75}
    assert chance(labels, np.array([3])) == {"a random picture": 0.25, "the luckiest picture": 1.0}


# The validation that is committed


@pytest.fixture(scope="module")
def validation() -> dict:
    return json.loads(RESULT.read_text())


def test_the_chosen_metric_is_the_judges(world, validation):
    assert validation["chosen"] == CHOSEN
    assert np.array_equal(METRICS[CHOSEN].features(world.pictures), features(world.pictures))


def test_validation_finds_true_pictures(validation):
    assert validation["asked for"] >= 1_000
    assert set(validation["metrics"]) == set(METRICS)
    assert min(validation["true pictures"][change]["picture"]["score"] for change in FORGIVEN) >= LEAST


def test_validation_scores_nonsense_as_chance(world, validation):
    assert set(validation["nonsense"]) == set(nonsense(world, np.arange(8), np.random.default_rng(0)))
    for shares in validation["nonsense"].values():
        assert shares["picture"]["score"] <= 0.001  # a constant drawing is nearest to some picture
        for measure, share in shares.items():
            assert share["low"] <= validation["chance"][measure]["the luckiest picture"]
