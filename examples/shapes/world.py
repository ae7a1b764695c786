"""The shapes world: scenes of coloured shapes, their exact rendering, and the combinations kept out of training.

- A `Scene` is one to four `Object`s on a plain background; lengths are pixels, y grows downwards.
- Each object stands in a cell of 32 x 32 pixels of its own, at one of four places.
- "Reading order" is that of the cells, row by row: lists of objects name them so.
- Everything random takes a `random.Random`: the same seed gives the same scene on every machine.
- `held_out(scene)` names the combinations that no training scene may contain.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

KINDS = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 210, 50),
    "purple": (170, 50, 200),
    "cyan": (40, 200, 220),
}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (128, 128, 128), "white": (240, 240, 240)}
RADII = {"small": 7.0, "large": 10.5}  # half the side of the bounding box
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

MAX_OBJECTS = 4
CELL = 32  # pixels along the edge
PLACES = (12, 20)  # of a centre in its cell, along each axis: neighbours keep 3 pixels between them
RELATION_MARGIN = 12  # "left of" means that the centres differ by at least this
CLEAR_MARGIN = 16  # what scenes drawn for a relation keep, so that a small reading error does not undo it
SUBSAMPLES = 16  # per pixel and axis
ATTEMPTS = 2000


@dataclasses.dataclass(frozen=True)
class Described:
    """What a text says of one object; `size` is None where the text leaves it open."""

    kind: str
    colour: str
    size: str | None = None


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; (y, x) is the centre of its bounding box, on a pixel corner."""

    kind: str
    colour: str
    size: str
    y: int
    x: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture of `height` x `width` pixels shows."""

    height: int
    width: int
    background: str
    objects: tuple[Object, ...]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        objects = tuple(Object(**value) for value in values["objects"])
        return cls(values["height"], values["width"], values["background"], objects)


# Rendering


def _inside(kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points in units of the radius, (0, 0) being the centre, lie in the shape."""
    if kind == "circle":
        return y**2 + x**2 <= 1
    if kind == "ring":
        return (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.5**2)
    if kind == "square":  # a little smaller, so that its area stays close to the circle's
        return np.maximum(abs(y), abs(x)) <= 0.92
    if kind == "triangle":
        return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
    if kind == "cross":
        return (np.maximum(abs(y), abs(x)) <= 1) & (np.minimum(abs(y), abs(x)) <= 0.36)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


@functools.cache
def _patch(kind: str, colour: str, size: str, background: str, scale: int) -> np.ndarray:
    """The shape on its background, uint8 of shape (2h, 2h, 3) with h the radius rounded up to whole pixels."""
    half = math.ceil(RADII[size]) * scale
    points = (np.arange(2 * half * SUBSAMPLES) + 0.5) / SUBSAMPLES - half
    points /= RADII[size] * scale
    covered = _inside(kind, points[:, None], points[None, :])
    coverage = covered.reshape(2 * half, SUBSAMPLES, 2 * half, SUBSAMPLES).mean(axis=(1, 3))[..., None]
    pixels = coverage * np.array(COLOURS[colour]) + (1 - coverage) * np.array(BACKGROUNDS[background])
    return np.round(pixels).astype(np.uint8)


def render(scene: Scene, scale: int = 1) -> np.ndarray:
    """Draw the scene as uint8 of shape (height * scale, width * scale, 3).

    Edges are computed at the output resolution: scale 2 is the true picture at twice the size, not an enlargement.
    """
    image = np.empty((scene.height * scale, scene.width * scale, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        patch = _patch(item.kind, item.colour, item.size, scene.background, scale)
        half = len(patch) // 2
        y, x = item.y * scale, item.x * scale
        image[y - half : y + half, x - half : x + half] = patch
    return image


# Relations


def relation_holds(a, relation: str, b, margin: float = RELATION_MARGIN) -> bool:
    """Whether a stands in `relation` to b: their centres differ by `margin` pixels or more along its axis."""
    if relation == "left of":
        return b.x - a.x >= margin
    if relation == "above":
        return b.y - a.y >= margin
    if relation in INVERSE:
        return relation_holds(b, INVERSE[relation], a, margin)
    raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")


# What is held out of training. Each is of allowed parts only: a held-out pair consists of two trained objects.


def _choose_objects(rng: random.Random) -> frozenset:
    """Four (kind, colour), each of another kind and another colour."""
    return frozenset(zip(rng.sample(KINDS, 4), rng.sample(list(COLOURS), 4)))


def _choose_pairs(rng: random.Random) -> frozenset:
    """A tenth of the unordered pairs of different kinds, a third of them of one colour, as two_objects needs."""
    pairs = [frozenset(pair) for pair in itertools.combinations(TRAINING_OBJECTS, 2) if pair[0][0] != pair[1][0]]
    same = [pair for pair in pairs if len({colour for _, colour in pair}) == 1]
    different = [pair for pair in pairs if len({colour for _, colour in pair}) == 2]
    total = round(len(pairs) / 10)
    return frozenset(rng.sample(same, total // 3) + rng.sample(different, total - total // 3))


def _choose_relations(rng: random.Random) -> frozenset:
    """A tenth of (a, "left of" or "above", b) with a and b of different kinds and not a held-out pair."""
    relations = [
        (a, relation, b)
        for a, b in itertools.permutations(TRAINING_OBJECTS, 2)
        for relation in ("left of", "above")
        if a[0] != b[0] and frozenset((a, b)) not in HELD_OUT_PAIRS
    ]
    return frozenset(rng.sample(relations, round(len(relations) / 10)))


def _choose_counts(rng: random.Random) -> frozenset:
    """Three (n, kind, colour) for each n from two to four, about a tenth."""
    return frozenset((n, *item) for n in range(2, MAX_OBJECTS + 1) for item in rng.sample(TRAINING_OBJECTS, 3))


_rng = random.Random("shapes world, held out")
HELD_OUT_OBJECTS = _choose_objects(_rng)
TRAINING_OBJECTS = [pair for pair in itertools.product(KINDS, COLOURS) if pair not in HELD_OUT_OBJECTS]
HELD_OUT_PAIRS = _choose_pairs(_rng)
HELD_OUT_RELATIONS = _choose_relations(_rng)
HELD_OUT_COUNTS = _choose_counts(_rng)


def held_out_contents(contents: Iterable[tuple[str, str]]) -> set[tuple]:
    """The held-out objects, pairs and counts in a multiset of (kind, colour)."""
    counts = Counter(contents)
    found = {("object", *item) for item in counts if item in HELD_OUT_OBJECTS}
    found |= {("count", n, *item) for item, n in counts.items() if (n, *item) in HELD_OUT_COUNTS}
    found |= {
        ("pair", *pair) for pair in itertools.combinations(sorted(counts), 2) if frozenset(pair) in HELD_OUT_PAIRS
    }
    return found


def held_out(scene: Scene) -> set[tuple]:
    """Every held-out combination that the scene shows, e.g. ("object", "ring", "red"); empty for training scenes."""
    found = held_out_contents((item.kind, item.colour) for item in scene.objects)
    for size in RADII:  # "two small red circles and a large one" would teach "two red circles"
        found |= held_out_contents((item.kind, item.colour) for item in scene.objects if item.size == size)
    for a, b in itertools.permutations(scene.objects, 2):
        for relation in ("left of", "above"):
            named = (a.kind, a.colour), relation, (b.kind, b.colour)
            if named in HELD_OUT_RELATIONS and relation_holds(a, relation, b):
                found.add(("relation", *named))
    return found


def is_training_scene(scene: Scene) -> bool:
    """Whether training may show the scene."""
    return not held_out(scene)


# Sampling


@functools.cache
def lattice(length: int) -> tuple[int, ...]:
    """The coordinates of centres along an edge of `length` pixels."""
    return tuple(cell + at for cell in range(0, length - CELL + 1, CELL) for at in PLACES)


def cell(item: Object) -> tuple[int, int]:
    """The (row, column) of the cell in which the object stands; cells sort in reading order."""
    return item.y // CELL, item.x // CELL


def in_reading_order(objects: tuple[Object, ...]) -> tuple[Object, ...]:
    """The same objects with their places exchanged, so that they stand in the order in which they are listed."""
    places = sorted(objects, key=cell)
    return tuple(dataclasses.replace(item, y=at.y, x=at.x) for item, at in zip(objects, places))


def place(
    rng: random.Random,
    described: Sequence[Described],
    height: int,
    width: int,
    relations: Sequence[tuple[int, str, int]],
    fixed: tuple[Object, ...],
) -> tuple[Object, ...] | None:
    """One attempt at adding the described objects, in order, each in a random free cell."""
    placed = list(fixed)
    for index, wanted in enumerate(described, start=len(fixed)):
        size = wanted.size or rng.choice(list(RADII))
        candidates = [(y, x) for y in lattice(height) for x in lattice(width)]
        rng.shuffle(candidates)
        for y, x in candidates:
            item = Object(wanted.kind, wanted.colour, size, y, x)
            trial = [*placed, item]
            if all(cell(item) != cell(other) for other in placed) and all(
                relation_holds(trial[a], relation, trial[b], CLEAR_MARGIN)
                for a, relation, b in relations
                if max(a, b) == index
            ):
                placed = trial
                break
        else:
            return None
    return tuple(placed)


def arrange(
    rng: random.Random,
    described: Sequence[Described],
    height: int = 64,
    width: int = 64,
    background: str | None = None,
    relations: Sequence[tuple[int, str, int]] = (),
    fixed: tuple[Object, ...] = (),
    accept: Callable[[Scene], bool] = lambda scene: True,
) -> Scene:
    """Draw a scene of the `fixed` objects and the described ones, at random places and in random sizes where open.

    `relations` holds (index, relation, index) into fixed objects followed by described ones; without relations or
    fixed objects, the described ones stand in reading order where that is accepted. Raises ValueError when the objects
    do not fit the canvas or nothing is accepted.
    """
    for _ in range(ATTEMPTS):
        objects = place(rng, described, height, width, relations, fixed)
        if objects is not None:
            chosen = background or rng.choice(list(BACKGROUNDS))
            for order in (objects,) if relations or fixed else (in_reading_order(objects), objects):
                scene = Scene(height, width, chosen, order)
                if accept(scene):
                    return scene
    raise ValueError(
        f"no acceptable scene of {height}x{width} pixels found for {list(described)} beside {list(fixed)}"
    )


def sample_contents(rng: random.Random, count: int, choices: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Draw `count` (kind, colour); repeats are common enough for counting to be learnt."""
    contents = []
    for _ in range(count):
        contents.append(rng.choice(contents if contents and rng.random() < 0.25 else choices))
    return contents


def sample_scene(
    rng: random.Random,
    height: int = 64,
    width: int = 64,
    num_objects: int | None = None,
    training: bool = True,
) -> Scene:
    """Draw a scene of one to four objects; unless `training` is False it shows nothing that is held out."""
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(f"num_objects must be from 1 to {MAX_OBJECTS}, got {num_objects}")
    choices = TRAINING_OBJECTS if training else list(itertools.product(KINDS, COLOURS))
    count = num_objects or rng.choices((1, 2, 3, 4), (2, 3, 3, 2))[0]
    for _ in range(ATTEMPTS):
        contents = sample_contents(rng, count, choices)
        if training and held_out_contents(contents):
            continue
        objects = place(rng, [Described(*item) for item in contents], height, width, (), ())
        if objects is not None:
            scene = Scene(height, width, rng.choice(list(BACKGROUNDS)), objects)
            if not training or is_training_scene(scene):
                return scene
    raise ValueError(f"no room for {count} objects on a canvas of {height}x{width} pixels; 64x64 holds four")
