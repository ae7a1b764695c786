"""Items are true, depend on their number alone, and keep what is held out from training."""

from collections import defaultdict

import pytest

from examples.emoji.attributes import VALUES
from examples.emoji.documents import INVERTED, STAGES, inverted
from examples.emoji.names import person_of
from examples.emoji.splits import COMBINATION, NAME, PAIR, SEEN, SHARES, held_out
from examples.emoji.tasks import KINDS, WORDINGS, Picture, Tasks
from examples.emoji.wordings import plural, with_article

ALL_KINDS = [(task, kind) for task, kinds in KINDS.items() for kind in kinds]
HELD_OUT = (PAIR, COMBINATION, NAME)


def items_of(tasks: Tasks, task: str, kind: str, split: str, part: str = SEEN, count: int = 20):
    if not tasks.targets(task, kind, split, part):
        return []
    return [tasks.draw(task, split, number, part=part, kind=kind) for number in range(count)]


def rows_of(item) -> set[int]:
    return {row for picture in (*item.read, *item.drawn) for row in picture.rows}


def test_held_out_parts_have_their_shares(real_tasks):
    parts, names = real_tasks.parts, real_tasks.names
    things = {name.partition(":")[0]: part == NAME for name, part in zip(names, parts)}
    assert abs(sum(things.values()) / len(things) - SHARES[NAME]) < 0.015
    everything = set(names)
    people = {name: part for name, part in zip(names, parts) if (who := person_of(name, everything)) and who.tone}
    people = [part for part in people.values() if part != NAME]
    assert abs(sum(part == COMBINATION for part in people) / len(people) - SHARES[COMBINATION]) < 0.02
    rest = [part for part in parts if part in (SEEN, PAIR)]
    assert abs(sum(part == PAIR for part in rest) / len(rest) - SHARES[PAIR]) < 0.02


def test_what_is_held_out_is_seen_in_parts(real_tasks):
    names, parts = real_tasks.names, real_tasks.parts
    everything = set(names)
    parts_of, seen = defaultdict(set), set()
    for name, part in zip(names, parts):
        parts_of[name].add(part)
        person = person_of(name, everything)
        if part == SEEN and person:
            seen |= {("role", person.role), ("gender", person.gender), ("tone", person.tone)}
    for found in parts_of.values():
        if PAIR in found:
            assert SEEN in found
        if NAME in found or COMBINATION in found:
            assert len(found) == 1
    roles = [person_of(name, everything) for name, found in parts_of.items() if COMBINATION in found]
    unseen = [role for role in roles if not {("gender", role.gender), ("tone", role.tone)} <= seen]
    assert unseen == []


def test_equal_pictures_are_seen_together():
    names, styles = ["a", "b"] * 40, [style for number in range(40) for style in (str(number),) * 2]
    alone = held_out(names, styles)
    torn = [(row, row + 1) for row in range(0, 80, 2) if set(alone[row : row + 2]) == {SEEN, PAIR}]
    assert torn
    together = held_out(names, styles, torn)
    assert all(together[row] == SEEN for pair in torn for row in pair)


@pytest.mark.parametrize(("task", "kind"), ALL_KINDS)
def test_training_sees_no_held_out_picture(real_tasks, task, kind):
    for item in items_of(real_tasks, task, kind, "train", count=60):
        assert {real_tasks.parts[row] for row in rows_of(item)} == {SEEN}


@pytest.mark.parametrize(("task", "kind"), ALL_KINDS)
def test_splits_share_no_target(real_tasks, task, kind):
    train = {item.targets for item in items_of(real_tasks, task, kind, "train", count=400)}
    dev, test = (
        {item.targets for part in HELD_OUT for item in items_of(real_tasks, task, kind, split, part, count=100)}
        for split in ("dev", "test")
    )
    seen_dev, seen_test = (
        {item.targets for item in items_of(real_tasks, task, kind, split, count=100)} for split in ("dev", "test")
    )
    assert train and test and seen_test
    assert not train & (dev | test)
    assert not (dev | seen_dev) & (test | seen_test)
    if task in ("sequence", "arrangement"):  # several seen pictures together are held out too
        assert not train & (seen_dev | seen_test)


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("part", HELD_OUT)
@pytest.mark.parametrize(("task", "kind"), ALL_KINDS)
def test_only_targets_are_held_out(real_tasks, task, kind, part, split):
    for item in items_of(real_tasks, task, kind, split, part):
        parts = [real_tasks.parts[row] for row in item.targets]
        assert part in parts
        assert all(real_tasks.splits[row] in ("train", split) for row in item.targets)
        assert {real_tasks.parts[row] for row in rows_of(item) - set(item.targets)} <= {SEEN}


def test_a_figure_of_held_out_pairs_has_a_thousand_prompts(real_tasks):
    for task, kind in (("text-to-image", ""), ("captioning", ""), ("question", "name"), ("editing", "style")):
        assert len(real_tasks.targets(task, kind, "test", PAIR)) >= 1000
    assert sum(len(real_tasks.targets("editing", kind, "test", PAIR)) for kind in KINDS["editing"]) >= 2000


def test_items_depend_on_their_number_alone(real_tasks):
    again = Tasks(*(getattr(real_tasks, name) for name in ("names", "styles", "tags", "parts", "splits", "twins")))
    for task in KINDS:
        assert real_tasks.draw(task, "train", 7, seed=3) == again.draw(task, "train", 7, seed=3)
        assert len({str(again.draw(task, "train", number)) for number in range(20)}) > 10
        assert again.draw(task, "train", 0, seed=1) != again.draw(task, "train", 0, seed=2)


def test_every_target_of_a_figure_comes_once_before_any_comes_again(real_tasks):
    targets = real_tasks.targets("editing", "hair", "test", PAIR)
    drawn = [item.targets[0] for item in items_of(real_tasks, "editing", "hair", "test", PAIR, 2 * len(targets))]
    assert sorted(drawn[: len(targets)]) == sorted(drawn[len(targets) :]) == sorted(targets)
    assert drawn[: len(targets)] != sorted(targets)


def differences(tasks: Tasks, source: int, target: int) -> dict:
    """What two pictures differ in -> from, to."""
    old, new = dict(tasks.things[source].attributes), dict(tasks.things[target].attributes)
    found = {kind: (old.get(kind), new.get(kind)) for kind in old | new if old.get(kind) != new.get(kind)}
    if tasks.styles[source] != tasks.styles[target]:
        found["style"] = tasks.styles[source], tasks.styles[target]
    if tasks.things[source].noun != tasks.things[target].noun:
        found["noun"] = tasks.things[source].noun, tasks.things[target].noun
    return found


@pytest.mark.parametrize("kind", KINDS["editing"])
def test_an_edit_changes_one_attribute_and_says_to_what(real_tasks, kind):
    for item in items_of(real_tasks, "editing", kind, "test", count=50):
        (source,), (target,) = item.read[0].rows, item.targets
        changed = differences(real_tasks, source, target)
        assert set(changed) == {kind}
        assert changed[kind][1] is not None
        assert item.drawn == [Picture((target,))]
        if kind not in ("age", "gender"):
            assert changed[kind][1] in item.user[1]


def test_an_edit_of_gender_or_age_names_the_person(real_tasks):
    said = {}
    for kind in ("gender", "age"):
        for item in items_of(real_tasks, "editing", kind, "test", count=200):
            thing = real_tasks.things[item.targets[0]]
            said[thing["age"] or "adult", thing["gender"]] = item.user[1]
    assert said["old", "woman"] == "make it an old woman"
    assert said["child", "man"] == "make it a boy"
    assert said["adult", "person"] == "make it a person"


@pytest.mark.parametrize("kind", KINDS["analogy"])
def test_an_analogy_shows_its_change_on_another_thing(real_tasks, kind):
    for item in items_of(real_tasks, "analogy", kind, "test", count=30):
        (before,), (after,), (source,) = (picture.rows for picture in item.read)
        (target,) = item.targets
        assert differences(real_tasks, before, after) == differences(real_tasks, source, target)
        assert set(differences(real_tasks, source, target)) == {kind}
        assert after != target
        assert differences(real_tasks, after, target)


@pytest.mark.parametrize("kind", KINDS["sequence"])
def test_frames_are_consecutive_and_of_one_style(real_tasks, kind):
    order = list(VALUES[kind])
    step = 2 if kind == "hour" else 1
    for item in items_of(real_tasks, "sequence", kind, "train", count=40):
        places = [order.index(real_tasks.things[row][kind]) for row in item.targets]
        assert 3 <= len(places) <= 5
        assert {(second - first) % len(order) for first, second in zip(places, places[1:])} == {step}
        assert len({real_tasks.styles[row] for row in item.targets}) == 1
        assert len({real_tasks.things[row].without(kind) for row in item.targets}) == 1
        assert [picture.rows for picture in item.drawn] == [(row,) for row in item.targets]
        assert real_tasks.names[item.targets[0]] in item.user[0]
        assert real_tasks.names[item.targets[-1]] in item.user[0]


@pytest.mark.parametrize("kind", KINDS["arrangement"])
def test_cells_stand_where_the_text_says(real_tasks, kind):
    for item in items_of(real_tasks, "arrangement", kind, "train", count=20):
        (picture,) = item.drawn
        cells = [with_article(real_tasks.names[row]) for row in picture.rows]
        style = real_tasks.styles[picture.rows[0]]
        assert {real_tasks.styles[row] for row in picture.rows} == {style}
        several = {"number": {2: "two", 3: "three"}[len(cells)], "things": plural(real_tasks.names[picture.rows[0]])}
        text = {
            "left": "{0} to the left of {1}",
            "right": "{1} to the right of {0}",
            "above": "{0} above {1}",
            "below": "{1} below {0}",
            "row": "{0}, {1} and {2} in a row",
            "count": "{number} {things}",
        }[kind].format(*cells, **several)
        assert item.user == (f"{text}, {style}",)
        assert picture.aspect_ratio == ("1:2" if kind in ("above", "below") else f"{len(cells)}:1")


def test_questions_have_the_answers_of_the_name(real_tasks):
    for kind in ("tone", "hour", "gender", "colour"):
        for item in items_of(real_tasks, "question", kind, "test"):
            assert item.assistant == (real_tasks.things[item.targets[0]][kind],)
    (row,) = (item := real_tasks.draw("captioning", "test", 0)).targets
    assert item.assistant == (f"{real_tasks.names[row]}, {real_tasks.styles[row]}",)
    assert item.read == [Picture((row,))]
    assert item.drawn == []


def test_a_dialogue_asks_about_a_seen_picture_edits_it_and_asks_about_the_edit(real_tasks):
    kinds = set()
    for number in range(40):
        first, *others = items = real_tasks.dialogue(number)
        assert items == real_tasks.dialogue(number) != real_tasks.dialogue(number, seed=1)
        place, edit = next((place, item) for place, item in enumerate(items) if item.task == "editing")
        assert edit.targets == real_tasks.draw("editing", "train", number).targets
        assert {real_tasks.splits[row] for row in rows_of(first) | rows_of(edit)} == {"train"}
        assert [isinstance(item.user[0], Picture) for item in items] == [True] + [False] * len(others)
        (source,) = first.read[0].rows
        assert [item.targets for item in items] == [(source,)] * place + [edit.targets] * (len(items) - place)
        assert (place, len(items) - place - 1) == (
            0 if source in real_tasks.ambiguous else 2,
            0 if edit.targets[0] in real_tasks.ambiguous else 1,
        )
        for item in items[:place] + items[place + 1 :]:
            (row,) = item.targets
            caption = f"{real_tasks.names[row]}, {real_tasks.styles[row]}"
            told = {"": caption, "name": real_tasks.names[row], "style": real_tasks.styles[row]}
            assert item.assistant == (told.get(item.kind) or real_tasks.things[row][item.kind],)
            assert item.user[-1] in WORDINGS[item.task, item.kind]
            kinds.add(item.kind)
    assert {"", "name", "style", "tone", "gender"} <= kinds


def test_nothing_is_asked_about_a_picture_of_two_names(small_world):
    twins = list(range(len(small_world)))
    cat, dog = small_world.index["cat", "noto"], small_world.index["dog", "noto"]
    twins[dog] = cat
    columns = (small_world.names, small_world.styles, small_world.tags, small_world.parts, small_world.splits)
    tasks = Tasks(*columns, twins)
    assert not {cat, dog} & set(tasks.targets("question", "name", "train"))
    assert {cat, dog} <= set(tasks.targets("text-to-image", "", "train"))
    assert cat in tasks.targets("editing", "style", "train")


def test_reasoning_ends_in_the_prompt_and_shares_its_pictures_with_the_control(real_tasks):
    assert real_tasks.targets("reasoning", "", "test", PAIR) == real_tasks.targets("tags", "", "test", PAIR)
    assert STAGES["pretraining-64"].mixture["reasoning"] == STAGES["pretraining-64"].mixture["tags"]
    for item in items_of(real_tasks, "reasoning", "", "test"):
        (row,) = item.targets
        thought, picture = item.assistant
        assert thought.startswith("The user wants")
        assert thought.endswith(f"The final prompt is: {real_tasks.names[row]}, {real_tasks.styles[row]}.")
        assert picture == Picture((row,))


def test_a_tenth_of_text_to_image_is_inverted():
    mixture = inverted({"text-to-image": 0.5, "editing": 0.5})
    assert mixture == {"text-to-image": 0.5 * (1 - INVERTED), "captioning": 0.5 * INVERTED, "editing": 0.5}
    assert all(abs(sum(stage.mixture.values()) - 1) < 1e-9 for stage in STAGES.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drawing", "train", 0), "task must be one of .* got 'drawing'"),
        (("captioning", "valid", 0), "split must be one of 'train', 'dev', 'test', got 'valid'"),
        (("captioning", "train", 0, 0, PAIR), "part must be 'seen' in the split 'train'"),
        (("editing", "test", 0, 0, PAIR, "name"), "the kind of editing must be one of .* got 'name'"),
        (("sequence", "test", 0, 0, COMBINATION, "hour"), "no items of the kind 'hour' with combination targets"),
    ],
)
def test_what_there_is_not_is_refused(real_tasks, arguments, message):
    with pytest.raises(ValueError, match=message):
        real_tasks.draw(*arguments)
