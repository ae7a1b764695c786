"""What a name says of its picture: the thing, and attributes such as skin tone, gender, hair, colour, hour, direction.

A name is read by a table of patterns, tried in order. What a pattern matches leaves the name and becomes attributes;
what remains is the thing. So "woman firefighter: dark skin tone" is a firefighter of the gender "woman" and the tone
"dark", and "three thirty" a clock of that hour.
Pictures whose things are equal and whose attributes differ in one are an edit of that attribute; see `tasks.py`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .names import TONES

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
HOURS = tuple(f"{number} {half}" for number in NUMBERS[1:] for half in ("oclock", "thirty"))
PHASES = (
    "new",
    "waxing crescent",
    "first quarter",
    "waxing gibbous",
    "full",
    "waning gibbous",
    "last quarter",
    "waning crescent",
)
DIGITS = tuple(map(str, range(11)))
AGES = ("baby", "child", "adult", "old")
HAIRS = ("red", "curly", "white", "blond", "bald", "beard")
COLOURS = tuple("light blue,black,blue,brown,green,grey,orange,pink,purple,red,white,yellow".split(","))
SIZES = ("small", "medium small", "medium", "large")

# kind of attribute -> its values, in their order where they have one
VALUES = {
    "tone": TONES,
    "gender": ("man", "woman", "person"),
    "hair": HAIRS,
    "age": AGES,
    "colour": COLOURS,
    "size": SIZES,
    "hour": HOURS,
    "phase": PHASES,
    "digit": DIGITS,
    "direction": ("left", "right", "up", "down", "up left", "up right", "down left", "down right"),
}

# names of somebody without a role -> age and gender
HUMANS = {
    "baby": ("baby", "person"),
    "child": ("child", "person"),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "person": ("adult", "person"),
    "man": ("adult", "man"),
    "woman": ("adult", "woman"),
    "older person": ("old", "person"),
    "old man": ("old", "man"),
    "old woman": ("old", "woman"),
}

# words that say a gender and a role at once, in the form of the other roles
ROLES = {
    "merman": "man merpeople",
    "mermaid": "woman merpeople",
    "merperson": "person merpeople",
    "santa claus": "man claus",
    "mrs claus": "woman claus",
    "mx claus": "person claus",
    "prince": "man with crown",
    "princess": "woman with crown",
}

# how the packages spell a value -> the value
_SPELLINGS = {
    **{tone.replace("-", " "): tone for tone in TONES},
    **{number: str(value) for value, number in enumerate(NUMBERS)},
}


def _one_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_TONE = _one_of(TONES)
_WAY = "(?:left|right|up|down)"
_ADULTS, _CHILDREN = "(?:man|woman|person|adult)", "(?:boy|girl|child)"

# A group is named by the attribute it holds; what the pattern matches is replaced by the text beside it.
_PATTERNS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf": (?P<tone>{_TONE}) skin tone(?:, (?P<second_tone>{_TONE}) skin tone)?$", ""),
        (r"^flag (?P<country>.+)$", "flag"),
        (rf"^(?P<hour>{_one_of(HOURS)})$", "clock"),
        (rf"^(?P<phase>{_one_of(PHASES)}) (?=moon)", ""),
        (rf"(?<=^keycap) (?P<digit>{_one_of(DIGITS)})$", ""),
        (rf"(?<=^digit) (?P<digit>{_one_of(NUMBERS)})$", ""),
        (rf"(?<=^family)(?P<adults>(?: {_ADULTS})+)", ""),
        (rf"(?<=^family)(?P<children>(?: {_CHILDREN})+)$", ""),
        (rf"(?<=^kiss)(?P<adults>(?: {_ADULTS})+)$", ""),
        (rf"(?<=^couple with heart)(?P<adults>(?: {_ADULTS})+)$", ""),
        (r"^(?P<adults>men|women|people|woman and man) (?=holding|hugging|wrestling|with)", ""),
        (rf"^(?P<human>{_one_of(HUMANS)})$", "human"),
        (rf"^(?P<human>man|woman|person) (?P<hair>{_one_of(HAIRS)})(?: hair)?$", "human"),
        (r"^(?P<gender>man|woman|person) ", ""),
        (r" (?P<gender>man|woman|person)$", ""),
        (rf" facing (?P<direction>{_WAY})$", ""),
        (rf" (?P<curve>{_WAY})(?<=curving) ", ""),
        (rf"^(?P<direction>{_WAY}(?: {_WAY})?)(?:wards)? ", ""),
        (rf" (?P<direction>{_WAY})(?=$| hand$| button$)", ""),
        (rf"^(?P<size>{_one_of(SIZES)}) ", ""),
        (rf"\b(?P<colour>{_one_of(COLOURS)}) ", ""),
        (rf"\b(?P<size>{_one_of(SIZES)}) (?=square|cloud)", ""),
        (r" (?P<volume>low|medium|high)(?= volume$)", ""),
    )
]

# What is left of some names holds words of attributes all the same; why they are none.
_REASONS = {
    "a baby beside or in place of the thing": ("baby angel", "baby bottle", "baby symbol", "feeding baby"),
    "the age of an animal": ("baby chick", "front facing baby chick"),
    "neither waxing nor waning": ("crescent moon", "star and crescent"),
    "nobody's hair": ("curly loop", "double curly loop", "hair pick"),
    "light is the thing": ("light bulb", "police car light", "horizontal traffic light", "vertical traffic light"),
    "a number of parts": (
        *("dotted six pointed star", "eight pointed star", "eight spoked asterisk", "four leaf clover"),
        *("one piece swimsuit", "two hearts", "two hump camel"),
    ),
    "written in the picture": (
        "no one under eighteen",
        "pool 8 ball",
        "up exclamation button",
        "new button",
    ),
    "another sense of the word": ("last track button", "leafy green", "left luggage", "light rail", "old key"),
    "a way of holding it": ("palms up together", "rolled up newspaper", "upside down face"),
    "a swatch of skin tones": tuple(f"{tone.replace('-', ' ')} skin tone" for tone in TONES),
}
EXCEPTIONS = {noun: reason for reason, nouns in _REASONS.items() for noun in nouns}


@dataclass(frozen=True)
class Thing:
    """What a picture shows.

    Attributes:
        noun: what it is, without its attributes: "firefighter", "human", "clock", "heart", "flag".
        attributes: kind and value of each, sorted; a kind of [`VALUES`], or one that no edit changes: "second_tone"
            and "adults" of people together, "children", "country", "curve", "volume".
    """

    noun: str
    attributes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, noun: str, attributes: dict[str, str]) -> "Thing":
        return cls(noun, tuple(sorted(attributes.items())))

    def __getitem__(self, kind: str) -> str | None:
        """The value of an attribute, or None."""
        return dict(self.attributes).get(kind)

    def without(self, kind: str) -> "Thing":
        return Thing(self.noun, tuple(item for item in self.attributes if item[0] != kind))


def read_name(name: str) -> Thing:
    """What a name says by itself; [`read_names`] knows more from the others."""
    noun, colon, tones = name.partition(":")
    noun, attributes = ROLES.get(noun, noun) + colon + tones, {}
    for pattern, replacement in _PATTERNS:
        match = None if noun in EXCEPTIONS else pattern.search(noun)
        if match:
            noun = noun[: match.start()] + replacement + noun[match.end() :]
            attributes |= {kind: value.strip() for kind, value in match.groupdict().items() if value}
    if "human" in attributes:
        attributes["age"], attributes["gender"] = HUMANS[attributes.pop("human")]
    return Thing.of(noun, {kind: _SPELLINGS.get(value, value) for kind, value in attributes.items()})


def read_names(names: Iterable[str]) -> dict[str, Thing]:
    """Name -> what it shows. A role without a gender is a person's where a man and a woman have it as well.

    Args:
        names: all names of the world.
    """
    things = {name: read_name(name) for name in sorted(set(names))}
    genders: dict[str, set[str]] = {}
    for thing in things.values():
        genders.setdefault(thing.noun, set()).add(thing["gender"])
    for name, thing in things.items():
        if thing["gender"] is None and {"man", "woman"} <= genders[thing.noun]:
            things[name] = Thing.of(thing.noun, dict(thing.attributes) | {"gender": "person"})
    return things


WORDS = frozenset(
    word
    for phrase in (*(value for values in VALUES.values() for value in values), *HUMANS, *NUMBERS)
    for word in phrase.split()
) | {"tone", "hair", "men", "women", "people", "leftwards", "rightwards", "upwards", "downwards"}


def attribute_words(text: str) -> list[str]:
    """The words of a name, or of what is left of it, that belong to an attribute's vocabulary."""
    return [word for word in re.findall(r"[\w-]+", text) if word in WORDS]
