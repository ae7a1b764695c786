import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from examples.shapes import grammar, world
from examples.shapes.grammar import CATEGORIES, EDITS, Request
from examples.shapes.judge import fault_in_request, judge_edit, judge_request, read_scene

CANVASES = ((64, 64), (64, 96), (96, 64), (96, 96))
SCENES = [
    world.sample_scene(random.Random(f"judge {index}"), *CANVASES[index % len(CANVASES)], training=False)
    for index in range(300)
]


def degrade(image: np.ndarray, sigma: float = 1.2, noise: float = 6) -> np.ndarray:
    """Gaussian blur of `sigma` pixels, then noise of standard deviation `noise` in 0..255."""
    blurred = ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))
    noisy = blurred + np.random.default_rng(image.sum()).normal(0, noise, image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def read_rate(pictures: list[np.ndarray]) -> float:
    """The share of `SCENES` read back wholly: names, and places to within a pixel."""
    right = 0
    for scene, picture in zip(SCENES, pictures, strict=True):
        read = read_scene(picture)
        expected = sorted(scene.objects, key=lambda item: (item.y, item.x))
        matched = [
            any(
                (item.kind, item.colour, item.size) == (seen.kind, seen.colour, seen.size)
                and abs(item.y - seen.y) <= 1
                and abs(item.x - seen.x) <= 1
                for seen in read.objects
            )
            for item in expected
        ]
        right += all(matched) and len(read.objects) == len(expected) and read.background == scene.background
    return right / len(SCENES)


def request_for(scene: world.Scene) -> Request:
    objects = tuple(world.Described(item.kind, item.colour, item.size) for item in scene.objects)
    return Request("scene", "", objects, background=scene.background)


def other(rng: random.Random, names, name: str) -> str:
    return rng.choice([choice for choice in names if choice != name])


def replace_one(scene: world.Scene, rng: random.Random, field: str, names) -> world.Scene:
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    changed = dataclasses.replace(item, **{field: other(rng, names, getattr(item, field))})
    return dataclasses.replace(scene, objects=(*scene.objects[:index], changed, *scene.objects[index + 1 :]))


def resize_one(scene: world.Scene, rng: random.Random) -> world.Scene:
    return replace_one(scene, rng, "size", world.RADII)


def remove_one(scene: world.Scene, rng: random.Random) -> world.Scene:
    kept = rng.sample(scene.objects, len(scene.objects) - 1)
    return dataclasses.replace(scene, objects=tuple(kept))


def add_one(scene: world.Scene, rng: random.Random) -> world.Scene:
    """One object more, or one less where none fits."""
    described = world.Described(rng.choice(world.KINDS), rng.choice(list(world.COLOURS)), "small")
    objects = world.place(rng, [described], scene.height, scene.width, (), scene.objects)
    return dataclasses.replace(scene, objects=objects) if objects else remove_one(scene, rng)


PLANTED: dict[str, Callable[[world.Scene, random.Random], world.Scene]] = {
    "kind": lambda scene, rng: replace_one(scene, rng, "kind", world.KINDS),
    "colour": lambda scene, rng: replace_one(scene, rng, "colour", world.COLOURS),
    "size": resize_one,
    "removed": remove_one,
    "added": add_one,
    "background": lambda scene, rng: dataclasses.replace(
        scene, background=other(rng, world.BACKGROUNDS, scene.background)
    ),
}


def test_pictures_of_the_world_read_back_exactly():
    assert read_rate([world.render(scene) for scene in SCENES]) >= 0.99


def test_blurred_noisy_pictures_read_back():
    assert read_rate([degrade(world.render(scene)) for scene in SCENES]) >= 0.97


def test_strongly_blurred_pictures_read_back():
    assert read_rate([degrade(world.render(scene), sigma=1.4, noise=3) for scene in SCENES]) >= 0.97


@pytest.mark.parametrize("category", CATEGORIES)
def test_pictures_that_satisfy_a_prompt_pass(category):
    rng = random.Random(category)
    requests = grammar.held_out_prompts(category, 50, seed=0)
    pictures = [world.render(request.reference_scene(rng)) for request in requests]
    passed = [judge_request(degrade(picture), request) for picture, request in zip(pictures, requests)]
    assert np.mean(passed) >= 0.97


@pytest.mark.parametrize("error", PLANTED)
@pytest.mark.parametrize("blurred", [False, True])
def test_one_planted_error_is_rejected(error, blurred):
    rng = random.Random(error)
    accepted = 0
    for scene in SCENES[:150]:
        picture = world.render(PLANTED[error](scene, rng))
        accepted += judge_request(degrade(picture) if blurred else picture, request_for(scene))
    assert accepted / 150 <= 0.01


def test_a_mirrored_relation_is_rejected():
    rng = random.Random(0)
    for request in grammar.held_out_prompts("position", 60, seed=0):
        ((a, relation, b),) = request.relations
        mirrored = dataclasses.replace(request, relations=((a, world.INVERSE[relation], b),))
        picture = world.render(mirrored.reference_scene(rng))
        assert judge_request(picture, mirrored)
        assert not judge_request(picture, request)


def test_neighbours_of_one_colour_at_the_least_gap_stay_separate_under_blur():
    for kind in world.KINDS:
        pair = (world.Object(kind, "red", "large", 20, 20), world.Object(kind, "red", "large", 20, 44))
        scene = world.Scene(64, 64, "white", pair)
        assert len(read_scene(degrade(world.render(scene), sigma=1.5)).objects) == 2


def test_edges_and_specks_that_a_person_overlooks_are_overlooked():
    rng = np.random.default_rng(0)
    scene = world.Scene(
        64, 64, "gray", (world.Object("ring", "blue", "large", 22, 18), world.Object("cross", "red", "small", 46, 46))
    )
    image = world.render(scene)
    shown = np.linalg.norm(image - image[0, 63].astype(float), axis=-1) > 20
    rim = ndimage.binary_dilation(shown) & ~ndimage.binary_erosion(shown)
    ragged = image.copy()
    ragged[rim & (rng.random(rim.shape) < 0.4)] = world.BACKGROUNDS["gray"]
    ragged[4:7, 50:53] = world.COLOURS["green"]
    assert judge_request(ragged, request_for(scene))


@pytest.mark.parametrize("shape", ["half circle", "triangle upside down", "two joined circles", "thin bar"])
def test_a_shape_of_no_kind_is_unknown(shape):
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    mask = {
        "half circle": (np.hypot(y, x) < 13) & (y > 0),
        "triangle upside down": (abs(y) < 12) & (abs(x) < (12 - y) / 2),
        "two joined circles": (np.hypot(y, x - 9) < 9.5) | (np.hypot(y, x + 9) < 9.5),
        "thin bar": (abs(y) < 3) & (abs(x) < 12),
    }[shape]
    image = np.where(mask[..., None], np.uint8(world.COLOURS["red"]), np.uint8(world.BACKGROUNDS["white"]))
    (seen,) = read_scene(image).objects
    assert (seen.kind, seen.colour) == ("unknown", "red")


def test_an_object_without_colour_counts():
    scene = world.Scene(64, 64, "black", (world.Object("circle", "red", "small", 14, 14),))
    image = world.render(scene)
    image[36:56, 36:56] = 255
    assert not judge_request(image, request_for(scene))


def test_a_picture_of_nothing_has_no_objects():
    read = read_scene(np.full((48, 80, 3), 128, dtype=np.uint8))
    assert (read.height, read.width, read.background, read.objects) == (48, 80, "gray", ())


@pytest.mark.parametrize("operation", EDITS)
def test_the_edited_scene_passes_and_the_source_does_not(operation):
    for edit in grammar.held_out_edits(operation, 40, seed=0):
        assert judge_edit(degrade(world.render(edit.target), sigma=1), edit)
        assert not judge_edit(world.render(edit.source), edit)


@pytest.mark.parametrize("operation", EDITS)
@pytest.mark.parametrize("error", ["kind", "colour", "size", "removed", "moved", "background"])
def test_an_edit_that_changes_something_else_fails(operation, error):
    rng = random.Random(operation + error)
    tried = 0
    for edit in grammar.held_out_edits(operation, 40, seed=1):
        unmentioned = tuple(item for item in edit.target.objects if item in edit.source.objects)
        rest = tuple(item for item in edit.target.objects if item not in unmentioned)
        part = dataclasses.replace(edit.target, objects=unmentioned)
        if error == "moved":
            wrong = grammar.sample_change(rng, part, "move")
            wrong = wrong and wrong.apply(part)
        else:
            wrong = PLANTED[error](part, rng) if unmentioned else None
        if wrong and not {world.cell(a) for a in wrong.objects} & {world.cell(b) for b in rest}:
            tried += 1
            picture = world.render(dataclasses.replace(wrong, objects=wrong.objects + rest))
            assert not judge_edit(picture, edit)
    assert tried > 3


def test_an_added_object_may_stand_wherever_the_relation_allows():
    rng = random.Random(0)
    for edit in grammar.held_out_edits("add", 40, seed=2):
        relations = []
        if edit.relation:
            relation, anchor = edit.relation
            relations = [(len(edit.source.objects), relation, edit.source.objects.index(anchor))]
        source = edit.source
        elsewhere = world.arrange(rng, [edit.added], 64, 64, source.background, relations, source.objects)
        assert judge_edit(world.render(elsewhere), edit)


def test_faults_are_named():
    scene = world.Scene(64, 64, "black", (world.Object("circle", "red", "small", 14, 14),))
    request = grammar.parse_caption("a blue circle on a white background")
    assert fault_in_request(world.render(scene), request) == "the background is black, not white"
    request = grammar.parse_caption("a blue circle")
    assert "small red circle" in fault_in_request(world.render(scene), request)


def test_images_of_another_form_are_refused():
    with pytest.raises(ValueError, match="float64"):
        read_scene(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        read_scene(np.zeros((64, 64), dtype=np.uint8))
