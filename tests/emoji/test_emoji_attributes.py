"""What names say: by hand for some, and counted over all."""

from collections import defaultdict

import pytest

from examples.emoji.attributes import EXCEPTIONS, VALUES, Thing, attribute_words, read_name, read_names
from examples.emoji.names import names_of


@pytest.mark.parametrize(
    ("name", "noun", "attributes"),
    [
        ("woman firefighter: dark skin tone", "firefighter", {"gender": "woman", "tone": "dark"}),
        ("deaf man", "deaf", {"gender": "man"}),
        ("mermaid: light skin tone", "merpeople", {"gender": "woman", "tone": "light"}),
        (
            "man bald: medium-dark skin tone",
            "human",
            {"age": "adult", "gender": "man", "hair": "bald", "tone": "medium-dark"},
        ),
        ("woman blond hair", "human", {"age": "adult", "gender": "woman", "hair": "blond"}),
        ("girl: medium skin tone", "human", {"age": "child", "gender": "woman", "tone": "medium"}),
        ("older person", "human", {"age": "old", "gender": "person"}),
        ("black medium small square", "square", {"colour": "black", "size": "medium small"}),
        ("light blue heart", "heart", {"colour": "light blue"}),
        ("large orange diamond", "diamond", {"colour": "orange", "size": "large"}),
        ("three thirty", "clock", {"hour": "three thirty"}),
        ("waning gibbous moon", "moon", {"phase": "waning gibbous"}),
        ("new moon face", "moon face", {"phase": "new"}),
        ("keycap 10", "keycap", {"digit": "10"}),
        ("digit seven", "digit", {"digit": "7"}),
        ("up left arrow", "arrow", {"direction": "up left"}),
        (
            "backhand index pointing down: light skin tone",
            "backhand index pointing",
            {"direction": "down", "tone": "light"},
        ),
        ("woman walking facing right", "walking", {"direction": "right", "gender": "woman"}),
        ("rightwards hand", "hand", {"direction": "right"}),
        ("flag new zealand", "flag", {"country": "new zealand"}),
        ("white flag", "flag", {"colour": "white"}),
        ("family man woman girl boy", "family", {"adults": "man woman", "children": "girl boy"}),
        (
            "kiss woman man: dark skin tone, light skin tone",
            "kiss",
            {"adults": "woman man", "second_tone": "light", "tone": "dark"},
        ),
        ("upside down face", "upside down face", {}),
        ("police car light", "police car light", {}),
        ("baby chick", "baby chick", {}),
        ("orangutan", "orangutan", {}),
    ],
)
def test_attributes_of_a_name(name, noun, attributes):
    assert read_name(name) == Thing.of(noun, attributes)


def test_a_role_without_a_gender_is_a_persons_where_both_genders_have_it():
    things = read_names(["artist: dark skin tone", "man artist", "woman artist", "cat", "man dancing"])
    assert things["artist: dark skin tone"] == Thing.of("artist", {"gender": "person", "tone": "dark"})
    assert things["cat"]["gender"] is None


def test_at_least_99_percent_of_attribute_words_are_parsed_and_the_rest_is_listed(real_tasks):
    things = read_names(real_tasks.names)
    total = sum(len(attribute_words(name)) for name in things)
    left = defaultdict(int)
    for thing in things.values():
        if words := attribute_words(thing.noun):
            left[thing.noun] += len(words)
    assert total > 7000
    assert 1 - sum(left.values()) / total >= 0.99
    assert set(left) == set(EXCEPTIONS)


def test_one_thing_has_one_name(real_tasks):
    names = defaultdict(set)
    for name, thing in zip(real_tasks.names, real_tasks.things):
        names[thing].add(name)
    assert [same for same in names.values() if len(same) > 1] == []
    pairs = list(zip(real_tasks.names, real_tasks.styles))
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("firefighter-dark", "firefighter: dark skin tone"),
        ("firefighter-medium-dark-skin-tone", "firefighter: medium-dark skin tone"),
        ("man-medium-light-skin-tone-blond-hair", "man blond hair: medium-light skin tone"),
        ("man-blonde-hair-dark", "man blond hair: dark skin tone"),
        ("woman-dark-skin-tone-bald", "woman bald: dark skin tone"),
        ("woman-merpeople-dark", "mermaid: dark skin tone"),
        ("person-deaf", "deaf person"),
        ("person-elf-dark", "elf: dark skin tone"),
        ("person-rowing-boat", "person rowing boat"),
        ("medium-dark-skin-tone", "medium dark skin tone"),
        ("police-car-light", "police car light"),
        ("kiss-man-man-dark-skin-tone-light-skin-tone", "kiss man man: dark skin tone, light skin tone"),
    ],
)
def test_name_of_a_key(key, name):
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    stems = ("firefighter", "man-blonde-hair", "woman-merpeople", "person-elf")
    keys = {f"{stem}-{tone}" for stem in stems for tone in tones} | {"elf", "person-deaf", key}
    assert names_of(keys)[key] == name


def test_values_are_those_of_the_table(real_tasks):
    found = defaultdict(set)
    for thing in real_tasks.things:
        for kind, value in thing.attributes:
            found[kind].add(value)
    for kind, values in VALUES.items():
        assert found[kind] >= set(values)
        assert found[kind] - set(values) <= {"left right", "up down"}
