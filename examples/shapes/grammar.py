"""The language of the shapes world: prompts, captions, questions, edits and stories, for training and evaluation.

- `Request` is what a prompt asks of a picture, `Edit` what an instruction asks of one; both can be judged.
- `held_out_prompts` and `held_out_edits` draw evaluation sets of combinations that training never shows.
- `sample_document` draws training documents, `all_texts` the corpus of the text tokenizer.
- A text describes exactly what is in the picture; without a random generator each function words it canonically.
"""

import dataclasses
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .world import (
    BACKGROUNDS,
    CLEAR_MARGIN,
    COLOURS,
    HELD_OUT_COUNTS,
    HELD_OUT_OBJECTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    INVERSE,
    KINDS,
    MAX_OBJECTS,
    RADII,
    RELATIONS,
    TRAINING_OBJECTS,
    Described,
    Object,
    Scene,
    arrange,
    cell,
    held_out,
    held_out_contents,
    is_training_scene,
    lattice,
    place,
    relation_holds,
    sample_scene,
)

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
TASKS = ("t2i", "caption", "vqa", "edit", "story", "text")
EDITS = ("recolour", "kind", "remove", "add", "background")
SPLITS = ("dev", "test")

# The first wording of each is the canonical one.
PREFIXES = ("", "a picture of ", "an image of ", "draw ")
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
BACKGROUND_WORDS = (" on a {} background", " with a {} background")
DESCRIBE_QUESTIONS = ("describe the picture", "describe the image", "what is in the picture?", "what does it show?")
NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {kind: kind + ("es" if kind.endswith("s") else "s") for kind in KINDS}


def _pick(rng: random.Random | None, wordings: Sequence[str]) -> str:
    return wordings[0] if rng is None else rng.choice(wordings)


# Phrases


def _noun(item: Described, plural: bool = False) -> str:
    """The words of an object without its article: "large red circle"."""
    kind = PLURALS[item.kind] if plural else item.kind
    return " ".join(word for word in (item.size, item.colour, kind) if word)


def _group(item: Described, count: int) -> str:
    return f"a {_noun(item)}" if count == 1 else f"{NUMBERS[count]} {_noun(item, plural=True)}"


def _join(phrases: Sequence[str], last: str) -> str:
    """Join with commas, and `last` before the last phrase."""
    return last.join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def compose(
    objects: Sequence[Described],
    relations: Sequence[tuple[int, str, int]] = (),
    background: str | None = None,
    rng: random.Random | None = None,
) -> str:
    """Word a description; a relation is worded where there are just two different objects."""
    if relations:
        ((a, relation, b),) = relations
        words = _pick(rng, RELATION_WORDS[relation])
        text = f"{_group(objects[a], 1)} {words} {_group(objects[b], 1)}"
    else:
        text = _join([_group(item, count) for item, count in Counter(objects).items()], " and ")
    if background:
        text += _pick(rng, BACKGROUND_WORDS).format(background)
    return _pick(rng, PREFIXES) + text


def caption(scene: Scene) -> str:
    """The canonical caption: every object with its size, in reading order, equal ones together, and the background."""
    objects = [Described(item.kind, item.colour, item.size) for item in sorted(scene.objects, key=cell)]
    groups = [_group(item, count) for item, count in Counter(objects).items()]
    return ", ".join(groups) + BACKGROUND_WORDS[0].format(scene.background)


# Requests


@dataclasses.dataclass(frozen=True)
class Request:
    """What must be true of a picture: these objects and no others, their relations, the background where named.

    `relations` holds (index, relation, index) into `objects`.
    """

    category: str
    text: str
    objects: tuple[Described, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None

    def satisfied_by(self, scene: Scene) -> bool:
        if len(scene.objects) != len(self.objects) or self.background not in (None, scene.background):
            return False
        return any(
            all(
                (wanted.kind, wanted.colour) == (item.kind, item.colour) and wanted.size in (None, item.size)
                for wanted, item in zip(self.objects, items)
            )
            and all(relation_holds(items[a], relation, items[b]) for a, relation, b in self.relations)
            for items in itertools.permutations(scene.objects)
        )

    def reference_scene(self, rng: random.Random, height: int = 64, width: int = 64, training: bool = False) -> Scene:
        """Draw a scene that satisfies the request; with `training`, one that shows nothing held out."""
        accept = is_training_scene if training else lambda scene: True
        return arrange(rng, self.objects, height, width, self.background, self.relations, accept=accept)


_BACKGROUND = re.compile(rf" (?:on|with) a ({'|'.join(BACKGROUNDS)}) background$")
_RELATION = re.compile(r" (?:to the )?(left of|right of|above|below) ")
_GROUP = re.compile(
    rf"(a|{'|'.join(NUMBERS[2:])}) (?:({'|'.join(RADII)}) )?({'|'.join(COLOURS)}) "
    rf"(?:({'|'.join(KINDS)})|({'|'.join(PLURALS.values())}))"
)
_SINGULAR = {plural: kind for kind, plural in PLURALS.items()}


def _parse_group(phrase: str) -> list[Described]:
    match = _GROUP.fullmatch(phrase)
    if match is None or (match[1] == "a") != bool(match[4]):
        raise ValueError(f'expected objects such as "a large red circle" or "two red circles", got {phrase!r}')
    count = 1 if match[1] == "a" else NUMBERS.index(match[1])
    return [Described(match[4] or _SINGULAR[match[5]], match[3], match[2])] * count


def parse_caption(text: str) -> Request:
    """Read a caption or a prompt of the grammar; raises ValueError, naming the phrase, on anything else."""
    rest = text.strip().removesuffix(".")
    for prefix in PREFIXES[1:]:
        rest = rest.removeprefix(prefix)
    background = _BACKGROUND.search(rest)
    if background:
        rest = rest[: background.start()]
    relations: tuple[tuple[int, str, int], ...] = ()
    relation = _RELATION.search(rest)
    if relation:
        objects = _parse_group(rest[: relation.start()]) + _parse_group(rest[relation.end() :])
        if len(objects) != 2:
            raise ValueError(f"a relation is between two single objects, got {rest!r}")
        relations = ((0, relation[1], 1),)
    else:
        objects = [item for phrase in re.split(r", | and ", rest) for item in _parse_group(phrase)]
    if len(objects) > MAX_OBJECTS:
        raise ValueError(f"at most {MAX_OBJECTS} objects fit a scene, got {len(objects)} in {text!r}")
    return Request("caption", text, tuple(objects), relations, background[1] if background else None)


def caption_matches(text: str, scene: Scene) -> bool:
    """Whether the caption is of the grammar and true of the scene, naming every object."""
    try:
        return parse_caption(text).satisfied_by(scene)
    except ValueError:
        return False


def _other(rng: random.Random, item: tuple[str, str], same_colour: bool) -> tuple[str, str]:
    """A training object of another kind that makes no held-out pair with `item`."""
    return rng.choice(
        [
            other
            for other in TRAINING_OBJECTS
            if other[0] != item[0]
            and (other[1] == item[1]) == same_colour
            and frozenset((item, other)) not in HELD_OUT_PAIRS
        ]
    )


def _training_contents(rng: random.Random, category: str) -> tuple[list[tuple[str, str]], str | None]:
    """(kind, colour) of each object of a training prompt, and the relation of a position prompt."""
    first = rng.choice(TRAINING_OBJECTS)
    if category == "counting":
        counts = [n for n in range(2, MAX_OBJECTS + 1) if (n, *first) not in HELD_OUT_COUNTS]
        return [first] * rng.choice(counts), None
    if category == "two_objects":
        return [first, _other(rng, first, same_colour=True)], None
    if category == "color_attribution":
        return [first, _other(rng, first, same_colour=False)], None
    if category == "position":
        second = _other(rng, first, same_colour=rng.random() < 0.2)
        allowed = [
            relation
            for relation in RELATIONS
            if (first, relation, second) not in HELD_OUT_RELATIONS
            and (second, INVERSE[relation], first) not in HELD_OUT_RELATIONS
        ]
        return [first, second], rng.choice(allowed)
    return [first], None


def _held_out_contents(rng: random.Random, category: str) -> tuple[list[tuple[str, str]], str | None]:
    """The same for an evaluation prompt, which names exactly one held-out combination."""
    if category == "counting":
        n, *item = rng.choice(sorted(HELD_OUT_COUNTS))
        return [tuple(item)] * n, None
    if category in ("two_objects", "color_attribution"):
        pairs = sorted(sorted(pair) for pair in HELD_OUT_PAIRS)
        pairs = [(a, b) for a, b in pairs if (a[1] == b[1]) == (category == "two_objects")]
        return rng.sample(rng.choice(pairs), 2), None
    if category == "position":
        a, relation, b = rng.choice(sorted(HELD_OUT_RELATIONS))
        return ([a, b], relation) if rng.random() < 0.5 else ([b, a], INVERSE[relation])
    return [rng.choice(sorted(HELD_OUT_OBJECTS))], None


def sample_request(rng: random.Random, category: str, training: bool = True) -> Request:
    """Draw a prompt of one of the six categories, of training combinations or of a held-out one."""
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}, got {category!r}")
    contents, relation = (_training_contents if training else _held_out_contents)(rng, category)
    size = rng.choice(list(RADII)) if len(contents) == 1 and rng.random() < 0.3 else None
    objects = tuple(Described(*item, size) for item in contents)
    relations = ((0, relation, 1),) if relation else ()
    background = rng.choice(list(BACKGROUNDS)) if category == "colors" or rng.random() < 0.3 else None
    return Request(category, compose(objects, relations, background, rng), objects, relations, background)


def _split(text: str) -> str:
    """A quarter of all texts are for development, by a hash of the text."""
    return "dev" if hashlib.sha256(text.encode()).digest()[0] % 4 == 0 else "test"


def held_out_prompts(category: str, n: int, seed: int, split: str = "test") -> list[Request]:
    """Draw n prompts of a held-out combination; the texts of the two splits are disjoint.

    Texts differ from each other until the grammar runs out of them (some 60 in "dev"), then they repeat.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{category} {seed} {split}")
    requests: list[Request] = []
    seen: set[str] = set()
    misses = 0
    while len(requests) < n:
        request = sample_request(rng, category, training=False)
        if _split(request.text) != split:
            continue
        if request.text in seen and misses < 500:
            misses += 1
            continue
        misses = 0
        seen.add(request.text)
        requests.append(request)
    return requests


def _sized(item: Object) -> Described:
    return Described(item.kind, item.colour, item.size)


def describe_scene(rng: random.Random, scene: Scene) -> Request:
    """Draw a prompt of which the scene is one picture; it may name sizes, a relation and the background.

    Without a relation, it names the objects in reading order.
    """
    items = sorted(scene.objects, key=cell)
    objects = tuple(_sized(item) for item in items)
    if rng.random() < 0.5:
        objects = tuple(Described(item.kind, item.colour) for item in items)
    relations: tuple[tuple[int, str, int], ...] = ()
    if len(items) == 2 and objects[0] != objects[1] and rng.random() < 0.5:
        if rng.random() < 0.5:
            items, objects = items[::-1], objects[::-1]
        clear = [relation for relation in RELATIONS if relation_holds(items[0], relation, items[1], CLEAR_MARGIN)]
        relations = ((0, rng.choice(clear), 1),)
    background = scene.background if rng.random() < 0.6 else None
    return Request("scene", compose(objects, relations, background, rng), objects, relations, background)


# Edits


@dataclasses.dataclass(frozen=True)
class Change:
    """One step from a scene to the next: `before` becomes `after`, or the background changes.

    `before` is None when an object is added, `after` when it is removed; an added object may stand in
    `relation` = (relation, other object).
    """

    operation: str
    before: Object | None = None
    after: Object | None = None
    background: str | None = None
    relation: tuple[str, Object] | None = None

    def apply(self, scene: Scene) -> Scene:
        objects = [self.after if item == self.before else item for item in scene.objects]
        if self.before is None:
            objects.append(self.after)
        objects = tuple(item for item in objects if item is not None)
        return dataclasses.replace(scene, objects=objects, background=self.background or scene.background)


@dataclasses.dataclass(frozen=True)
class Edit:
    """An instruction on `source`, and one `target` that follows it.

    The result must show every object of the target in its place, and its background. Only an `added` object, which
    is the target's last, may be anywhere that `relation` = (relation, other object of the source) allows.
    """

    operation: str
    text: str
    source: Scene
    target: Scene
    added: Described | None = None
    relation: tuple[str, Object] | None = None


def _the(item: Object, scene: Scene) -> str | None:
    """The shortest phrase that means this object alone, or None."""
    for names in (("kind", "colour"), ("kind", "colour", "size")):
        wanted = {name: getattr(item, name) for name in names}
        if sum(all(getattr(other, name) == value for name, value in wanted.items()) for other in scene.objects) == 1:
            return f"the {_noun(Described(**wanted))}"
    return None


def sample_change(rng: random.Random, scene: Scene, operation: str) -> Change | None:
    """Draw a change of the scene that words can name, or None where this draw finds none."""
    if operation == "background":
        return Change(operation, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
    nameable = [item for item in scene.objects if _the(item, scene)]
    item = rng.choice(nameable) if nameable else None
    if operation == "add":
        if len(scene.objects) == MAX_OBJECTS:
            return None
        relation = rng.choice(RELATIONS) if item and rng.random() < 0.6 else None
        where = [(len(scene.objects), relation, scene.objects.index(item))] if relation else []
        new = Described(rng.choice(KINDS), rng.choice(list(COLOURS)))
        objects = place(rng, [new], scene.height, scene.width, where, scene.objects)
        return objects and Change(operation, after=objects[-1], relation=(relation, item) if relation else None)
    if item is None:
        return None
    if operation == "recolour":
        colour = rng.choice([name for name in COLOURS if name != item.colour])
        return Change(operation, item, dataclasses.replace(item, colour=colour))
    if operation == "kind":
        kind = rng.choice([name for name in KINDS if name != item.kind])
        return Change(operation, item, dataclasses.replace(item, kind=kind))
    if operation == "remove":
        return Change(operation, item) if len(scene.objects) > 1 else None
    if operation == "move":
        after = _moved(rng, item, scene)
        return after and Change(operation, item, after)
    raise ValueError(f"operation must be one of {', '.join(EDITS)} or move, got {operation!r}")


def _moved(rng: random.Random, item: Object, scene: Scene) -> Object | None:
    """The object at another free place in its row or column, far enough to be seen to move."""
    others = [other for other in scene.objects if other != item]
    places = [dataclasses.replace(item, x=x) for x in lattice(scene.width)]
    places += [dataclasses.replace(item, y=y) for y in lattice(scene.height)]
    free = [there for there in places if cell(there) not in [cell(item), *map(cell, others)]]
    return rng.choice(free) if free else None


def _word_relation(rng: random.Random, change: Change, scene: Scene) -> str:
    if change.relation is None:
        return ""
    relation, other = change.relation
    return f" {_pick(rng, RELATION_WORDS[relation])} {_the(other, scene)}"


def sample_edit(
    rng: random.Random,
    height: int = 64,
    width: int = 64,
    operation: str | None = None,
    training: bool = True,
) -> Edit:
    """Draw an edit; in training nothing held out occurs, else the target shows a held-out combination.

    The evaluation's sources are training scenes where the operation can lead out of them, which removing an object
    and changing the background cannot.
    """
    operation = operation or rng.choice(EDITS)
    while True:
        source = sample_scene(rng, height, width, training=training or operation not in ("remove", "background"))
        change = sample_change(rng, source, operation)
        if change is None:
            continue
        target = change.apply(source)
        if shows_nothing_held_out(source, target) if training else held_out(target):
            return _word_edit(rng, source, target, change)


def _word_edit(rng: random.Random, source: Scene, target: Scene, change: Change) -> Edit:
    if change.operation == "background":
        wordings = ("make the background {}", "change the background to {}")
        return Edit(change.operation, rng.choice(wordings).format(change.background), source, target)
    if change.operation == "add":
        size = change.after.size if rng.random() < 0.4 else None
        added = Described(change.after.kind, change.after.colour, size)
        text = rng.choice(("add {}", "put {}", "insert {}")).format(_group(added, 1))
        return Edit(
            change.operation, text + _word_relation(rng, change, source), source, target, added, change.relation
        )
    wordings = {
        "recolour": ("make {the} {after.colour}", "paint {the} {after.colour}", "change {the} to {after.colour}"),
        "kind": ("turn {the} into a {after.kind}", "change {the} to a {after.kind}"),
        "remove": ("remove {the}", "delete {the}", "take away {the}"),
    }[change.operation]
    text = rng.choice(wordings).format(the=_the(change.before, source), after=change.after)
    return Edit(change.operation, text, source, target)


def held_out_edits(
    operation: str, n: int, seed: int, split: str = "test", height: int = 64, width: int = 64
) -> list[Edit]:
    """Draw n edits whose results show held-out combinations; the two splits share no instruction on one source."""
    if operation not in EDITS:
        raise ValueError(f"operation must be one of {', '.join(EDITS)}, got {operation!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{operation} {seed} {split}")
    edits: list[Edit] = []
    while len(edits) < n:
        edit = sample_edit(rng, height, width, operation, training=False)
        if _split(f"{edit.text} {edit.source}") == split:
            edits.append(edit)
    return edits


# Training documents


@dataclasses.dataclass(frozen=True)
class Document:
    """One training example.

    - "t2i": (prompt,), (scene,)
    - "caption" and "vqa": (question, answer), (scene,)
    - "edit": (instruction,), (source, target)
    - "story": one sentence and one scene per frame
    - "text": sentences, no scene
    """

    task: str
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()


def shows_nothing_held_out(*scenes: Scene) -> bool:
    """Whether one document may show these scenes: each alone, and no held-out pair across them."""
    contents = {(item.kind, item.colour) for scene in scenes for item in scene.objects}
    return all(is_training_scene(scene) for scene in scenes) and not held_out_contents(contents)


def _sample_t2i(rng: random.Random, height: int, width: int) -> Document:
    category = rng.choice((*CATEGORIES, "scene", "scene"))
    if category == "scene":
        scene = sample_scene(rng, height, width)
        return Document("t2i", (describe_scene(rng, scene).text,), (scene,))
    request = sample_request(rng, category)
    scene = request.reference_scene(rng, height, width, training=True)
    if rng.random() < 0.3:
        objects = tuple(_sized(item) for item in scene.objects)
        return Document("t2i", (compose(objects, request.relations, request.background, rng),), (scene,))
    return Document("t2i", (request.text,), (scene,))


def _sample_caption(rng: random.Random, height: int, width: int) -> Document:
    scene = sample_scene(rng, height, width)
    return Document("caption", (rng.choice(DESCRIBE_QUESTIONS), caption(scene)), (scene,))


def ask(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Draw a question that the scene answers in a word or a phrase, and the answer."""
    kinds = Counter(item.kind for item in scene.objects)
    colours = Counter(item.colour for item in scene.objects)
    kind, colour, item = rng.choice(KINDS), rng.choice(list(COLOURS)), rng.choice(scene.objects)
    alike = sum((other.kind, other.colour) == (item.kind, item.colour) for other in scene.objects)
    questions = [
        (f"how many {PLURALS[kind]} are there?", NUMBERS[kinds[kind]]),
        (f"how many {colour} objects are there?", NUMBERS[colours[colour]]),
        (f"how many {_noun(Described(item.kind, item.colour), plural=True)} are there?", NUMBERS[alike]),
        ("how many objects are there?", NUMBERS[len(scene.objects)]),
        ("what color is the background?", scene.background),
    ]
    if kinds[item.kind] == 1:
        questions += [(f"what color is the {item.kind}?", item.colour), (f"how big is the {item.kind}?", item.size)]
    if colours[item.colour] == 1:
        questions.append((f"what shape is the {item.colour} object?", item.kind))
    the = _the(item, scene)
    for relation in RELATIONS:
        related = [other for other in scene.objects if relation_holds(other, relation, item, 1)]
        if the and len(related) == 1 and relation_holds(related[0], relation, item, CLEAR_MARGIN):
            answer = _group(Described(related[0].kind, related[0].colour), 1)
            questions.append((f"what is {RELATION_WORDS[relation][0]} {the}?", answer))
    return rng.choice(questions)


def _sample_vqa(rng: random.Random, height: int, width: int) -> Document:
    scene = sample_scene(rng, height, width)
    return Document("vqa", ask(rng, scene), (scene,))


def _sample_edit_document(rng: random.Random, height: int, width: int, operation: str | None = None) -> Document:
    edit = sample_edit(rng, height, width, operation)
    return Document("edit", (edit.text,), (edit.source, edit.target))


def _sample_story(rng: random.Random, height: int, width: int) -> Document:
    """Two to four frames: shapes appear, move, change colour and leave."""
    frames = rng.choice((2, 3, 4))
    texts, scenes = [], []
    while len(scenes) < frames:
        scene = sample_scene(rng, height, width, num_objects=rng.choice((1, 1, 2)))
        texts, scenes = [f"here is {caption(scene)}."], [scene]
        for _ in range(4 * frames):  # a crowded canvas may allow no further event: then another story begins
            change = sample_change(rng, scenes[-1], rng.choice(("add", "move", "recolour", "remove")))
            if len(scenes) < frames and change and shows_nothing_held_out(*scenes, change.apply(scenes[-1])):
                texts.append(_word_event(rng, change, scenes[-1]))
                scenes.append(change.apply(scenes[-1]))
    return Document("story", tuple(texts), tuple(scenes))


def _word_event(rng: random.Random, change: Change, scene: Scene) -> str:
    """The sentence of a story for a change of the scene."""
    if change.operation == "add":
        return f"{_group(_sized(change.after), 1)} appears{_word_relation(rng, change, scene)}."
    the = _the(change.before, scene)
    if change.operation == "recolour":
        return f"{the} turns {change.after.colour}."
    if change.operation == "remove":
        return f"{the} leaves."
    across, down = change.after.x - change.before.x, change.after.y - change.before.y
    direction = ("right" if across > 0 else "left") if across else ("down" if down > 0 else "up")
    return f"{the} moves {direction}."


def _sample_text(rng: random.Random, height: int, width: int) -> Document:
    """A description of a scene and some facts that follow from it."""
    scene = sample_scene(rng, height, width)
    sentences = [f"here is {caption(scene)}."]
    for _ in range(rng.choice((1, 2, 3))):
        question, answer = ask(rng, scene)
        sentences.append(f"{question} {answer}.")
    return Document("text", tuple(sentences))


_SAMPLERS: dict[str, Callable[[random.Random, int, int], Document]] = {
    "t2i": _sample_t2i,
    "caption": _sample_caption,
    "vqa": _sample_vqa,
    "edit": _sample_edit_document,
    "story": _sample_story,
    "text": _sample_text,
}


def sample_document(rng: random.Random, task: str, canvas: tuple[int, int] = (64, 64)) -> Document:
    """Draw a training document of one of `TASKS`, or of "edit/remove" and the like; its scenes are `canvas` = (height,
    width) pixels."""
    task, _, operation = task.partition("/")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if operation and task != "edit":
        raise ValueError(f"only edits have operations, got {task}/{operation}")
    return _sample_edit_document(rng, *canvas, operation) if operation else _SAMPLERS[task](rng, *canvas)


def all_texts(rng: random.Random, n: int) -> Iterator[str]:
    """n training texts of all tasks, the corpus of the text tokenizer."""
    documents = (sample_document(rng, task) for task in itertools.cycle(TASKS))
    return itertools.islice((text for document in documents for text in document.texts), n)
