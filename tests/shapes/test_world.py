import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.shapes import grammar, world
from examples.shapes.grammar import CATEGORIES, EDITS, SPLITS, TASKS

CANVASES = ((64, 64), (64, 96), (96, 64), (96, 96))
DOCUMENTS = [
    grammar.sample_document(random.Random(f"{task} {index}"), task, CANVASES[index % len(CANVASES)])
    for task in TASKS
    for index in range(150)
]
MENTION = re.compile(
    rf"\b({'|'.join(grammar.NUMBERS[2:])})?(?: ?(?:small|large))? ?\b({'|'.join(world.COLOURS)}) "
    rf"({'|'.join(world.KINDS)})(?:s|es)?\b"
)
THING = rf"(?:a|the) (?:small |large )?({'|'.join(world.COLOURS)}) ({'|'.join(world.KINDS)})"
RELATED = re.compile(rf"{THING} (?:to the )?(left of|right of|above|below) {THING}")


def scenes(count: int, **options) -> list[world.Scene]:
    rng = random.Random("test scenes")
    return [world.sample_scene(rng, *CANVASES[index % len(CANVASES)], **options) for index in range(count)]


def test_objects_lie_wholly_inside_cells_of_their_own():
    for scene in scenes(300, training=False):
        for item in scene.objects:
            row, column = world.cell(item)
            radius = world.RADII[item.size]
            assert 0 <= row < scene.height // 32 and 0 <= column < scene.width // 32
            assert 32 * row + radius <= item.y <= 32 * row + 32 - radius
            assert 32 * column + radius <= item.x <= 32 * column + 32 - radius
        assert len({world.cell(item) for item in scene.objects}) == len(scene.objects)


def test_lists_name_objects_in_reading_order():
    named = [world.Described("circle", "red"), world.Described("ring", "blue", "small")] * 2
    for seed in range(20):
        objects = world.arrange(random.Random(seed), named).objects
        assert [(item.kind, item.colour) for item in objects] == [(item.kind, item.colour) for item in named]
        assert [world.cell(item) for item in objects] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for index, scene in enumerate(scenes(100)):
        request = grammar.describe_scene(random.Random(index), scene)
        if not request.relations:
            ordered = sorted(scene.objects, key=world.cell)
            assert [item.kind for item in request.objects] == [item.kind for item in ordered]


def test_four_large_objects_fit_the_square_canvas():
    described = [world.Described("circle", "red", "large")] * 4
    assert len(world.arrange(random.Random(0), described).objects) == 4


def test_every_number_of_objects_can_be_asked_for():
    for count in range(1, world.MAX_OBJECTS + 1):
        assert all(len(scene.objects) == count for scene in scenes(10, num_objects=count))


def test_scenes_survive_json():
    for scene in scenes(20):
        assert world.Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_rendering_shows_colours_and_background_unmixed():
    scene = world.Scene(64, 96, "gray", (world.Object("square", "cyan", "large", 20, 44),))
    image = world.render(scene)
    assert image.shape == (64, 96, 3) and image.dtype == np.uint8
    assert tuple(image[20, 44]) == world.COLOURS["cyan"]
    assert tuple(image[0, 0]) == world.BACKGROUNDS["gray"]


def test_rendering_twice_the_size_averages_to_the_picture():
    for scene in scenes(20):
        large = world.render(scene, scale=2).astype(float)
        assert large.shape == (2 * scene.height, 2 * scene.width, 3)
        averaged = large.reshape(scene.height, 2, scene.width, 2, 3).mean(axis=(1, 3))
        assert np.abs(averaged - world.render(scene)).max() < 16  # sampling of the edges is finite


def test_rendering_twice_the_size_is_sharper_than_enlarging():
    scene = world.Scene(64, 64, "white", (world.Object("triangle", "red", "large", 30, 30),))
    enlarged = world.render(scene).repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(world.render(scene, scale=2).astype(int) - enlarged).max() > 50


def test_a_seed_fixes_every_document():
    for task in TASKS:
        first, second = (grammar.sample_document(random.Random(7), task) for _ in range(2))
        assert first == second


def test_nothing_depends_on_hash_order():
    program = (
        "import random; from examples.shapes import grammar as g; "
        "print([g.held_out_prompts(c, 5, 0) for c in g.CATEGORIES], "
        "[g.sample_document(random.Random(1), t) for t in g.TASKS])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_held_out_objects_are_of_different_kinds_and_colours():
    kinds, colours = zip(*world.HELD_OUT_OBJECTS)
    assert len(set(kinds)) == len(set(colours)) == 4


def test_held_out_pairs_relations_and_counts_are_about_a_tenth():
    objects = world.TRAINING_OBJECTS
    pairs = [pair for pair in itertools.combinations(objects, 2) if pair[0][0] != pair[1][0]]
    assert len(world.HELD_OUT_PAIRS) / len(pairs) == pytest.approx(0.1, abs=0.01)
    assert len(world.HELD_OUT_RELATIONS) / (4 * len(pairs)) == pytest.approx(0.1, abs=0.02)
    assert len(world.HELD_OUT_COUNTS) / (3 * len(objects)) == pytest.approx(0.1, abs=0.03)


def test_what_is_held_out_consists_of_trained_parts():
    trained = {pair for scene in scenes(3000) for item in scene.objects for pair in [(item.kind, item.colour)]}
    assert trained == set(world.TRAINING_OBJECTS)
    assert all(pair <= trained for pair in world.HELD_OUT_PAIRS)
    assert all({a, b} <= trained for a, _, b in world.HELD_OUT_RELATIONS)
    assert all((kind, colour) in trained for _, kind, colour in world.HELD_OUT_COUNTS)


def test_a_held_out_relation_is_found_in_the_geometry():
    a, relation, b = min(world.HELD_OUT_RELATIONS)
    scene = world.arrange(random.Random(0), [world.Described(*a), world.Described(*b)], relations=[(0, relation, 1)])
    mirrored = dataclasses.replace(
        scene,
        objects=tuple(
            dataclasses.replace(item, y=scene.height - item.y, x=scene.width - item.x) for item in scene.objects
        ),
    )
    named = ("relation", a, relation, b)
    assert named in world.held_out(scene)
    assert named not in world.held_out(mirrored)


@pytest.mark.parametrize("task", TASKS)
def test_no_training_scene_shows_a_held_out_combination(task):
    for document in DOCUMENTS:
        if document.task == task:
            assert all(world.is_training_scene(scene) for scene in document.scenes)
            shown = {(item.kind, item.colour) for scene in document.scenes for item in scene.objects}
            assert not any(pair <= shown for pair in world.HELD_OUT_PAIRS)


@pytest.mark.parametrize("task", TASKS)
def test_no_training_text_names_a_held_out_combination(task):
    texts = [document.texts for document in DOCUMENTS if document.task == task]
    assert sum(bool(MENTION.search(text)) for document in texts for text in document) > 20
    for document in texts:
        mentions = [match.groups() for text in document for match in MENTION.finditer(text)]
        named = {(kind, colour) for _, colour, kind in mentions}
        assert not named & world.HELD_OUT_OBJECTS
        assert not any(pair <= named for pair in world.HELD_OUT_PAIRS)
        counts = {(grammar.NUMBERS.index(number), kind, colour) for number, colour, kind in mentions if number}
        assert not counts & world.HELD_OUT_COUNTS
        for text in document:
            for colour, kind, relation, other_colour, other_kind in RELATED.findall(text):
                a, b = (kind, colour), (other_kind, other_colour)
                assert (a, relation, b) not in world.HELD_OUT_RELATIONS
                assert (b, world.INVERSE[relation], a) not in world.HELD_OUT_RELATIONS


def test_training_prompts_are_true_of_their_scenes():
    for document in DOCUMENTS:
        if document.task == "t2i":
            assert grammar.caption_matches(document.texts[0], document.scenes[0])


def test_captions_read_back_and_tell_scenes_apart():
    drawn = scenes(100)
    for scene in drawn:
        request = grammar.parse_caption(grammar.caption(scene))
        assert request.background == scene.background
        assert Counter(request.objects) == Counter(
            world.Described(item.kind, item.colour, item.size) for item in scene.objects
        )
    for scene, other in itertools.pairwise(drawn):
        contents = [
            (each.background, Counter((item.kind, item.colour, item.size) for item in each.objects))
            for each in (scene, other)
        ]
        assert grammar.caption_matches(grammar.caption(scene), other) == (contents[0] == contents[1])


def test_a_caption_names_objects_in_reading_order_and_equal_ones_together():
    objects = tuple(
        world.Object(kind, "red", "small", y, x)
        for kind, y, x in (("square", 44, 12), ("ring", 44, 44), ("circle", 12, 44), ("ring", 12, 12))
    )
    text = grammar.caption(world.Scene(64, 64, "gray", objects))
    assert text == "two small red rings, a small red circle, a small red square on a gray background"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a circle",
        "a red circles",
        "two red circle",
        "a red blob",
        "a red circle and",
        "two red circles above a blue square",
        "three red circles, two blue squares",
        "a red circle on a green background",
    ],
)
def test_other_texts_are_not_captions(text):
    with pytest.raises(ValueError):
        grammar.parse_caption(text)
    assert not grammar.caption_matches(text, scenes(1)[0])


def test_a_caption_of_fewer_objects_does_not_match():
    scene = world.Scene(
        64, 64, "black", (world.Object("circle", "red", "small", 14, 14), world.Object("ring", "red", "small", 50, 50))
    )
    assert grammar.caption_matches("a red circle and a red ring", scene)
    assert grammar.caption_matches("a red ring below a red circle", scene)
    assert not grammar.caption_matches("a red ring above a red circle", scene)
    assert not grammar.caption_matches("a red circle", scene)
    assert not grammar.caption_matches("a large red circle and a red ring", scene)
    assert not grammar.caption_matches("a red circle and a red ring on a white background", scene)


@pytest.mark.parametrize("category", CATEGORIES)
def test_held_out_prompts_ask_for_a_held_out_combination(category):
    rng = random.Random(0)
    for index, request in enumerate(grammar.held_out_prompts(category, 40, seed=0)):
        scene = request.reference_scene(rng, *CANVASES[index % len(CANVASES)])
        assert request.satisfied_by(scene)
        assert world.held_out(scene)
        parsed = grammar.parse_caption(request.text)
        assert dataclasses.replace(parsed, category=category) == request


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_share_no_prompt(category):
    dev, test = ({request.text for request in grammar.held_out_prompts(category, 60, 0, name)} for name in SPLITS)
    assert dev and test and not dev & test


def test_prompts_depend_on_the_seed():
    assert grammar.held_out_prompts("position", 10, 0) == grammar.held_out_prompts("position", 10, 0)
    assert grammar.held_out_prompts("position", 10, 0) != grammar.held_out_prompts("position", 10, 1)


@pytest.mark.parametrize("operation", EDITS)
@pytest.mark.parametrize("training", [True, False])
def test_an_edit_changes_one_thing_only(operation, training):
    rng = random.Random(3)
    for _ in range(30):
        edit = grammar.sample_edit(rng, operation=operation, training=training)
        before, after = set(edit.source.objects), set(edit.target.objects)
        changed = (len(before - after), len(after - before), edit.source.background != edit.target.background)
        expected = {"recolour": (1, 1, 0), "kind": (1, 1, 0), "remove": (1, 0, 0), "add": (0, 1, 0)}
        assert changed == expected.get(operation, (0, 0, 1))
        if edit.relation:
            relation, other = edit.relation
            assert world.relation_holds(edit.target.objects[-1], relation, other)


@pytest.mark.parametrize("operation", EDITS)
def test_held_out_edits_lead_to_held_out_combinations(operation):
    dev, test = (grammar.held_out_edits(operation, 20, 0, split) for split in SPLITS)
    assert all(world.held_out(edit.target) for edit in dev + test)
    assert not {(edit.text, edit.source) for edit in dev} & {(edit.text, edit.source) for edit in test}


def test_stories_have_two_to_four_frames_that_differ_by_one_event():
    for document in DOCUMENTS:
        if document.task == "story":
            assert 2 <= len(document.scenes) == len(document.texts) <= 4
            for before, after in itertools.pairwise(document.scenes):
                assert len(set(before.objects) ^ set(after.objects)) in (1, 2)


def test_answers_to_counting_questions_are_true():
    questions = 0
    for document in DOCUMENTS:
        question, *answer = document.texts
        match = re.fullmatch(rf"how many (?:({'|'.join(world.COLOURS)}) )?(\w+) are there\?", question)
        if document.task == "vqa" and match:
            questions += 1
            (scene,) = document.scenes
            kind = next((kind for kind, plural in grammar.PLURALS.items() if plural == match[2]), None)
            counted = [o for o in scene.objects if kind in (None, o.kind) and match[1] in (None, o.colour)]
            assert answer == [grammar.NUMBERS[len(counted)]]
    assert questions > 20


def test_the_corpus_has_a_small_vocabulary_and_covers_evaluation():
    corpus = list(grammar.all_texts(random.Random(0), 3000))
    assert len(corpus) == 3000
    words = {word for text in corpus for word in re.findall(r"\w+", text)}
    assert len(words) < 100
    for category in CATEGORIES:
        for request in grammar.held_out_prompts(category, 30, 0):
            assert set(request.text.split()) <= words


@pytest.mark.parametrize("operation", EDITS)
def test_documents_of_one_operation_are_edits_of_it(operation):
    rng = random.Random(operation)
    for document in (grammar.sample_document(rng, f"edit/{operation}") for _ in range(20)):
        source, target = document.scenes
        left, came = set(source.objects) - set(target.objects), set(target.objects) - set(source.objects)
        changes = {
            "recolour": [item.kind for item in left] == [item.kind for item in came] != [],
            "kind": [item.colour for item in left] == [item.colour for item in came] != [],
            "remove": len(left) == 1 and not came,
            "add": len(came) == 1 and not left,
            "background": source.background != target.background,
        }
        assert [name for name, changed in changes.items() if changed] == [operation]
        assert grammar.shows_nothing_held_out(source, target)


def test_wrong_arguments_are_named():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="got 5"):
        world.sample_scene(rng, num_objects=5)
    with pytest.raises(ValueError, match="20x20"):
        world.sample_scene(rng, 20, 20, num_objects=2)
    with pytest.raises(ValueError, match="got 'poem'"):
        grammar.sample_document(rng, "poem")
    with pytest.raises(ValueError, match="got caption/remove"):
        grammar.sample_document(rng, "caption/remove")
    with pytest.raises(ValueError, match="got 'tickle'"):
        grammar.sample_document(rng, "edit/tickle")
    with pytest.raises(ValueError, match="got 'scene'"):
        grammar.held_out_prompts("scene", 1, 0)
    with pytest.raises(ValueError, match="got 'train'"):
        grammar.held_out_prompts("colors", 1, 0, "train")
