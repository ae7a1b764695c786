"""The words of the tasks: few and small, since a small model learns them in minutes.

The first wording of each is the canonical one, which figures are made with; training draws among all.
"""

from collections.abc import Sequence

from .attributes import HUMANS, Thing

PICTURES = ("{name}, {style}", "draw {name}, {style}", "{name} in the style {style}")
CAPTION = "{name}, {style}"
QUESTIONS = {
    "caption": ("describe the picture", "name and style"),
    "name": ("what is it?", "what does it show?"),
    "style": ("which style is it?", "what is the style?"),
    "tone": ("which skin tone is it?", "what is the skin tone?"),
    "hour": ("which hour is it?", "what is the time?"),
    "gender": ("which gender is it?", "what is the gender?"),
    "colour": ("which colour is it?", "what is the colour?"),
}
INSTRUCTIONS = {
    "style": ("make it {}", "change the style to {}"),
    "tone": ("give it {} skin tone", "make the skin tone {}"),
    "gender": ("make it {}", "change it to {}"),
    "hair": ("give it {}", "change the hair to {}"),
    "age": ("make it {}", "change it to {}"),
    "colour": ("make it {}", "change the colour to {}"),
    "size": ("make it {}", "change the size to {}"),
    "hour": ("make it {}", "set the clock to {}"),
    "phase": ("make it {} moon", "change the moon to {}"),
    "digit": ("make it {}", "change the number to {}"),
    "direction": ("turn it {}", "make it point {}"),
}
ANALOGIES = ("do the same to the third picture", "change the third picture as the first was changed")
SEQUENCES = {
    "hour": "show the hours from {first} to {last}, {style}",
    "phase": "show the moon phases from {first} to {last}, {style}",
    "age": "show the ages from {first} to {last}, {style}",
    "digit": "show the numbers from {first} to {last}, {style}",
}
ARRANGEMENTS = {
    "left": "{0} to the left of {1}, {style}",
    "right": "{1} to the right of {0}, {style}",
    "above": "{0} above {1}, {style}",
    "below": "{1} below {0}, {style}",
    "row": "{0}, {1} and {2} in a row, {style}",
    "count": "{count} {plural}, {style}",
}
TAGS = "{tags}, {style}"
THINKING = "think first: {tags}, {style}"
THOUGHT = "The user wants something about {tags} in {style}. The final prompt is: {name}, {style}."

_HAIRS = {"bald": "a bald head", "beard": "a beard"}
_NOUN_OF = {age_and_gender: noun for noun, age_and_gender in HUMANS.items()}

# things that can be counted and stand beside others
NOUNS = frozenset(
    "airplane alien ambulance anchor ant avocado backpack balloon banana basketball bathtub battery bear bed bell "
    "bicycle bird blowfish bomb briefcase burrito bus butterfly cactus calendar camel camera candle canoe carrot "
    "castle cat chestnut chicken chipmunk church clipboard cloud comet cookie cow crab crayon crocodile croissant "
    "crown cucumber dagger dog dolphin door doughnut dove dragon dress drum duck eagle ear egg elephant envelope "
    "factory ferry flashlight fountain fox frog gear ghost goat gorilla guitar hamburger hammer hamster handbag "
    "helicopter horse hospital hotel key keyboard kimono koala laptop lemon leopard lion lipstick lizard lollipop "
    "megaphone melon microphone microscope monkey motorcycle mountain mushroom necktie newspaper notebook octopus owl "
    "package paintbrush panda paperclip parrot peach pear pen pencil penguin pig pill pineapple pizza postbox potato "
    "printer purse pushpin rabbit radio ram rat rhinoceros ring robot rocket rooster rose sailboat satellite "
    "saxophone school scorpion scroll seat shark shield ship skull snail snake snowflake spider spoon squid star "
    "stopwatch strawberry sun sunflower syringe taco taxi telephone telescope television tent thermometer ticket "
    "tiger toilet tomato tornado tractor train tram trophy trumpet tulip turkey turtle umbrella unicorn violin "
    "volcano volleyball wastebasket watch watermelon whale wrench".split()
)
COLOURED = frozenset(("heart", "square", "circle", "book"))


def is_countable(thing: Thing) -> bool:
    """Whether a thing without attributes, or a coloured one, has a plural here."""
    kinds = [kind for kind, _ in thing.attributes]
    return (thing.noun in NOUNS and not kinds) or (thing.noun in COLOURED and kinds == ["colour"])


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato", "tornado", "volcano"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def list_of(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def value_phrase(kind: str, thing: Thing, style: str) -> str:
    """How an instruction says what the picture is to become."""
    if kind == "style":
        return style
    if kind == "hair":
        return _HAIRS.get(thing["hair"], f"{thing['hair']} hair")
    if kind in ("age", "gender"):
        return with_article(_NOUN_OF[thing["age"] or "adult", thing["gender"]])
    return thing[kind]


def hour_phrase(hour: str) -> str:
    """ "half past three" for "three thirty"."""
    number, half = hour.split()
    return f"half past {number}" if half == "thirty" else hour
