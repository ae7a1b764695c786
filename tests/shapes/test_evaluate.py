"""What edits are scored by, on pictures that the world itself draws."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from examples.shapes import evaluate, world
from examples.shapes.grammar import EDITS, held_out_edits


@pytest.fixture
def perfect(tiny_processor) -> SimpleNamespace:
    """An evaluator whose tokenizer reconstructs every picture as it is."""
    return SimpleNamespace(processor=tiny_processor, reconstructions=lambda pixels: (pixels, None))


def drawn(change) -> dict:
    """Edits of every operation, with `change` of a true result as the picture."""
    tasks = {operation: held_out_edits(operation, 4, seed=0) for operation in EDITS}
    return {name: [(task, change(world.render(task.target))) for task in each] for name, each in tasks.items()}


def test_true_results_are_done_and_leave_everything_else_as_it_is(perfect):
    pairs = drawn(lambda picture: picture)
    scores = evaluate.edits(pairs)
    assert all(scores[name]["score"] == 1 for name in ("overall", *EDITS)) and scores["copy_the_source"]["score"] == 0
    assert evaluate.untouched_error(perfect, pairs) == {"done": 0, "all": 0, "reconstruction": 0}


def test_the_error_is_of_what_an_instruction_leaves_alone(perfect):
    """2 of 255 levels everywhere are (2 / 127.5) ** 2, and blank pictures are no edits that are done."""
    slightly = lambda picture: np.where(picture < 128, picture + 2, picture - 2).astype(np.uint8)  # noqa: E731
    errors = evaluate.untouched_error(perfect, drawn(slightly))
    assert errors["done"] == errors["all"] == pytest.approx((2 / 127.5) ** 2, rel=1e-3)
    blank = evaluate.untouched_error(perfect, drawn(np.zeros_like))
    assert blank["done"] is None and blank["all"] > 0.01 and blank["reconstruction"] == 0


def test_an_added_object_touches_any_free_cell():
    (task,) = held_out_edits("add", 1, seed=0)
    kept = evaluate.untouched(task)
    cells = {world.cell(item) for item in task.source.objects}
    for y, x in itertools.product((0, 1), repeat=2):
        assert kept[y * 32 : y * 32 + 32, x * 32 : x * 32 + 32].all() == ((y, x) in cells)
    (recolour,) = held_out_edits("recolour", 1, seed=0)
    changed = world.render(dataclasses.replace(recolour.target, objects=())) != world.render(recolour.target)
    assert not evaluate.untouched(recolour).all() and evaluate.untouched(recolour)[~changed.any(axis=-1)].all()
