"""Names of the emoji world: one name for one thing, whatever the package calls it."""

import re
from collections.abc import Iterable, Set
from typing import NamedTuple

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("man", "woman", "person")
_LONGEST_FIRST = sorted(TONES, key=len, reverse=True)

# What the packages call by two names, in CLDR's words.
_SAME = {
    "blackbird": "black-bird",
    "direct-hit": "bullseye",
    "exclamation-mark": "red-exclamation-mark",
    "keycap-hashtag": "keycap-pound",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "man-deaf": "deaf-man",
    "man-merpeople": "merman",
    "man-with-bunny-ears": "men-with-bunny-ears",
    "man-wrestling": "men-wrestling",
    "on-arrow": "on-exclamation-arrow",
    "person-deaf": "deaf-person",
    "person-merpeople": "merperson",
    "person-with-bunny-ears": "people-with-bunny-ears",
    "person-wrestling": "people-wrestling",
    "phoenix-bird": "phoenix",
    "piata": "pinata",
    "pouting-face": "enraged-face",
    "question-mark": "red-question-mark",
    "red-triangle": "red-triangle-pointed-up",
    "up-button": "up-exclamation-button",
    "woman-deaf": "deaf-woman",
    "woman-merpeople": "mermaid",
    "woman-with-bunny-ears": "women-with-bunny-ears",
    "woman-wrestling": "women-wrestling",
}
_TONE = "|".join(_LONGEST_FIRST)
_TONE_BEFORE_HAIR = re.compile(rf"(man|woman|person)-({_TONE})-skin-tone-(bald|beard|\w+-hair)")


def names_of(keys: Iterable[str]) -> dict[str, str]:
    """The packages' icon names -> names in CLDR's manner, words apart and skin tones after a colon.

    One thing has one name: `firefighter-dark` and `firefighter-dark-skin-tone` become `firefighter: dark skin tone`,
    `man-dark-skin-tone-blond-hair` and `man-blonde-hair-dark` `man blond hair: dark skin tone`, `person-elf` is `elf`
    where that is a key too, and `man-deaf` is `deaf man`. A last word such as the one of `police-car-light` is no
    tone, since the car has no other.
    """
    keys = set(keys)
    return {key: _name(key, keys) for key in sorted(keys)}


def _name(key: str, keys: set[str]) -> str:
    thing, tones = _without_tones(_TONE_BEFORE_HAIR.sub(r"\1-\3-\2-skin-tone", key), keys)
    thing = _SAME.get(thing, thing).replace("blonde-hair", "blond-hair")
    if thing.removeprefix("person-") in keys:
        thing = thing.removeprefix("person-")
    words = thing.replace("-", " ")
    return words if not tones else f"{words}: " + ", ".join(f"{tone} skin tone" for tone in tones)


def _without_tones(key: str, keys: set[str]) -> tuple[str, list[str]]:
    tones: list[str] = []
    if key.removesuffix("-skin-tone") in TONES:  # a swatch
        return key, tones
    while tone := next((tone for tone in _LONGEST_FIRST if key.endswith(f"-{tone}-skin-tone")), None):
        tones.insert(0, tone)
        key = key.removesuffix(f"-{tone}-skin-tone")
    tone = next((tone for tone in _LONGEST_FIRST if key.endswith(f"-{tone}")), None)
    if not tones and tone and all(f"{key.removesuffix(f'-{tone}')}-{other}" in keys for other in TONES):
        return key.removesuffix(f"-{tone}"), [tone]
    return key, tones


class Person(NamedTuple):
    """What a name of a person says.

    Attributes:
        role: profession or activity ("firefighter", "rowing boat").
        gender: "man", "woman" or "person".
        tone: one of [`TONES`], or "".
    """

    role: str
    gender: str
    tone: str


def person_of(name: str, names: Set[str]) -> Person | None:
    """Role, gender and skin tone, of names that say a role which other genders have too.

    Args:
        names: all names of the world: "firefighter" is a role since "man firefighter" is a name.
    """
    thing, _, tones = name.partition(": ")
    if "," in tones:
        return None
    tone = tones.removesuffix(" skin tone")
    first, _, rest = thing.partition(" ")
    if first in GENDERS and rest and sum(f"{gender} {rest}" in names for gender in GENDERS) + (rest in names) > 1:
        return Person(rest, first, tone)
    if f"man {thing}" in names and f"woman {thing}" in names:
        return Person(thing, "person", tone)
    return None
