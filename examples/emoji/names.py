"""Names of the emoji world: one name for one thing, whatever the package calls it."""

from collections.abc import Iterable, Set
from typing import NamedTuple

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("man", "woman", "person")
_LONGEST_FIRST = sorted(TONES, key=len, reverse=True)


def names_of(keys: Iterable[str]) -> dict[str, str]:
    """The packages' icon names -> names in CLDR's manner, words apart and skin tones after a colon.

    Fluent's packages write `firefighter-dark`, the others `firefighter-dark-skin-tone`: both become
    `firefighter: dark skin tone`. A last word such as the one of `police-car-light` is no tone, since the car has no
    other.
    """
    keys = set(keys)
    return {key: _name(key, keys) for key in sorted(keys)}


def _name(key: str, keys: set[str]) -> str:
    tones, rest = [], key
    while tone := next((tone for tone in _LONGEST_FIRST if rest.endswith(f"-{tone}-skin-tone")), None):
        tones.insert(0, tone)
        rest = rest.removesuffix(f"-{tone}-skin-tone")
    tone = next((tone for tone in _LONGEST_FIRST if rest.endswith(f"-{tone}")), None)
    if not tones and tone and all(f"{rest.removesuffix(f'-{tone}')}-{other}" in keys for other in TONES):
        tones, rest = [tone], rest.removesuffix(f"-{tone}")
    words = rest.replace("-", " ")
    return words if not tones else f"{words}: " + ", ".join(f"{tone} skin tone" for tone in tones)


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
