"""Reads pictures of the shapes world back into scenes by image processing alone, and judges what they show.

- The background is the level of the pixels without colour; objects are connected regions of one hue that stand out.
- A region's kind is the template that its soft silhouette resembles most, once both are centred and of one scale.
- Blur, noise, specks and ragged edges are tolerated; what resembles no kind is "unknown" and never right.
- Only the vocabulary and the meaning of a relation come from the world: silhouettes, hues and sizes are its own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from .grammar import Edit, Request
from .world import BACKGROUNDS, COLOURS, KINDS, RELATION_MARGIN, Described, Object

UNKNOWN = "unknown"
HUES = {"red": 0, "yellow": 52, "green": 128, "cyan": 186, "blue": 228, "purple": 289}  # degrees
HUE_TOLERANCE = 30
LEVELS = {"black": (0, 70), "gray": (85, 170), "white": (200, 255)}  # of the background, in 0..255
COLOURLESS = 45  # largest minus smallest channel, below which a pixel may be background
LEAST_TINT = 0.3  # the same in parts of the contrast, below which an object has no colour
FAINT = 40  # Euclidean distance from the background, in RGB, below which nothing is seen
SPECK = 24  # pixels; smaller regions are noise
RAGGEDNESS = 0.15  # radii of gyration by which silhouettes are smoothed before they are compared
LEAST_LIKENESS = 0.88  # correlation with the best template, below which a region is of no kind
SMALL_UP_TO = 8.75  # radius in pixels
SAME_PLACE = 4  # pixels that an object may seem to move in an edit that leaves it alone


@dataclasses.dataclass(frozen=True)
class ReadObject:
    """An object as seen; (y, x) is the centre of its bounding box in pixels. Each name may be "unknown"."""

    kind: str
    colour: str
    size: str
    y: float
    x: float


@dataclasses.dataclass(frozen=True)
class ReadScene:
    """A picture as seen, objects in no particular order."""

    height: int
    width: int
    background: str
    objects: tuple[ReadObject, ...]


# Silhouettes


@dataclasses.dataclass(frozen=True)
class Silhouette:
    """A shape centred on its mass and scaled to a unit radius of gyration.

    `pattern` is its soft mask as a unit vector without mean; `radius` (half the bounding box's height) and `drop`
    (how far the box's centre lies below the centre of mass) are in radii of gyration.
    """

    pattern: np.ndarray
    radius: float
    drop: float


def _moments(mask: np.ndarray) -> tuple[float, float, float]:
    """Centre of mass (y, x) and radius of gyration of a soft mask, in pixels."""
    y, x = np.indices(mask.shape)
    mass = mask.sum()
    centre_y, centre_x = (mask * y).sum() / mass, (mask * x).sum() / mass
    gyration = np.sqrt((mask * ((y - centre_y) ** 2 + (x - centre_x) ** 2)).sum() / mass)
    return centre_y, centre_x, gyration


def _pattern(mask: np.ndarray) -> np.ndarray:
    """Sample a soft mask on a grid fixed to its centre and scale; a unit vector of zero mean."""
    centre_y, centre_x, gyration = _moments(mask)
    mask = ndimage.gaussian_filter(mask, RAGGEDNESS * gyration)
    steps = np.linspace(-2.3, 2.3, 25) * gyration
    points = np.stack(np.meshgrid(centre_y + steps, centre_x + steps, indexing="ij"))
    values = ndimage.map_coordinates(mask, points, order=1).ravel()
    values -= values.mean()
    return values / np.linalg.norm(values)


@functools.cache
def _silhouettes() -> dict[str, Silhouette]:
    """The ideal of each kind, drawn 80 pixels high."""
    y, x = np.mgrid[-60:61, -60:61] / 40.0
    centre_distance = np.hypot(y, x)
    shapes = {
        "circle": centre_distance < 1,
        "ring": abs(centre_distance - 0.75) < 0.25,
        "square": np.maximum(abs(y), abs(x)) < 1,
        "triangle": (y < 1) & (2 * abs(x) < 1 + y),
        "cross": ((abs(y) < 0.35) & (abs(x) < 1)) | ((abs(x) < 0.35) & (abs(y) < 1)),
    }
    silhouettes = {}
    for kind in KINDS:
        mask = shapes[kind].astype(float)
        centre_y, _, gyration = _moments(mask)
        silhouettes[kind] = Silhouette(_pattern(mask), 40 / gyration, (60 - centre_y) / gyration)
    return silhouettes


# Reading


def _hue_names(pixels: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """The colour name of each pixel of (..., 3), "unknown" between the hues and where contrast has little colour."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    away = np.stack([abs((hue - HUES[name] + 180) % 360 - 180) for name in COLOURS])
    names = np.array([*COLOURS])[away.argmin(axis=0)]
    plain = np.ptp(pixels, axis=-1) < LEAST_TINT * contrast
    return np.where(plain | (away.min(axis=0) > HUE_TOLERANCE), UNKNOWN, names)


def _read_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background's name and its RGB."""
    plain = pixels[np.ptp(pixels, axis=-1) < COLOURLESS]
    if len(plain) < 0.15 * pixels[..., 0].size:
        return UNKNOWN, np.median(pixels.reshape(-1, 3), axis=0)
    colour = np.median(plain, axis=0)
    even = np.mean(np.linalg.norm(plain - colour, axis=-1) < 2 * FAINT) > 0.75
    names = [name for name in BACKGROUNDS if LEVELS[name][0] <= colour.mean() <= LEVELS[name][1]]
    return (names[0] if names and even else UNKNOWN), colour


def _labelled(mask: np.ndarray, least: int) -> Iterator[np.ndarray]:
    """The connected regions of at least that many pixels."""
    labels, _ = ndimage.label(mask)
    for index in np.flatnonzero(np.bincount(labels.ravel())[1:] >= least) + 1:
        yield labels == index


def _regions(visible: np.ndarray, contrast: np.ndarray) -> Iterator[np.ndarray]:
    """Soft masks of the separate objects among the visible pixels of one colour.

    An object's edge is where the contrast falls to half of its own, which parts neighbours that blur joins.
    """
    solid = np.zeros_like(contrast)
    for region in _labelled(visible, SPECK):
        solid[region] = contrast[region] / np.percentile(contrast[region], 80)
    inside = solid > 0.5
    cores = ndimage.binary_opening(inside)  # cuts bridges of a pixel or two
    for core in _labelled(cores, SPECK // 2):
        region = ndimage.binary_dilation(core, iterations=2) & (core | ~cores)
        if (region & inside).sum() >= SPECK:
            yield region * np.clip(2 * solid - 0.5, 0, 1)


def _read_object(mask: np.ndarray, colour: str) -> ReadObject:
    centre_y, centre_x, gyration = _moments(mask)
    pattern = _pattern(mask)
    likeness = {kind: float(pattern @ silhouette.pattern) for kind, silhouette in _silhouettes().items()}
    kind = max(likeness, key=likeness.get)
    silhouette = _silhouettes()[kind]
    size = "small" if silhouette.radius * gyration <= SMALL_UP_TO else "large"
    if likeness[kind] < LEAST_LIKENESS:
        return ReadObject(UNKNOWN, colour, UNKNOWN, centre_y + 0.5, centre_x + 0.5)
    return ReadObject(kind, colour, size, centre_y + 0.5 + silhouette.drop * gyration, centre_x + 0.5)


def read_scene(image: np.ndarray | Image.Image) -> ReadScene:
    """Read a picture, uint8 RGB of shape (height, width, 3), at the world's own resolution."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be uint8 of shape (height, width, 3), got {pixels.dtype} of {pixels.shape}")
    pixels = ndimage.gaussian_filter(pixels.astype(float), (0.6, 0.6, 0))
    background, level = _read_background(pixels)
    contrast = np.linalg.norm(pixels - level, axis=-1)
    names = _hue_names(pixels, contrast)
    objects = tuple(
        _read_object(mask, colour)
        for colour in (*COLOURS, UNKNOWN)
        for mask in _regions((names == colour) & (contrast > FAINT), contrast)
    )
    height, width = contrast.shape
    return ReadScene(height, width, background, objects)


# Judging


def _is(item: ReadObject, wanted: Described | Object) -> bool:
    return (item.kind, item.colour) == (wanted.kind, wanted.colour) and wanted.size in (None, item.size)


def _relation_holds(a: ReadObject, relation: str, b: ReadObject) -> bool:
    distances = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return distances[relation] >= RELATION_MARGIN


def _names(objects: Sequence[ReadObject]) -> str:
    return ", ".join(f"{item.size} {item.colour} {item.kind}" for item in objects) or "nothing"


def fault_in_request(image: np.ndarray | Image.Image, request: Request) -> str | None:
    """Why the picture is not what the request asks for, or None if it is."""
    scene = read_scene(image)
    if request.background not in (None, scene.background):
        return f"the background is {scene.background}, not {request.background}"
    if len(scene.objects) != len(request.objects):
        return f"{len(scene.objects)} objects instead of {len(request.objects)}: {_names(scene.objects)}"
    orders = [
        items
        for items in itertools.permutations(scene.objects)
        if all(_is(item, wanted) for item, wanted in zip(items, request.objects))
    ]
    if not orders:
        return f"other objects than asked for: {_names(scene.objects)}"
    if not any(all(_relation_holds(items[a], name, items[b]) for a, name, b in request.relations) for items in orders):
        return f"not {' and '.join(name for _, name, _ in request.relations)}"
    return None


def judge_request(image: np.ndarray | Image.Image, request: Request) -> bool:
    """Whether the picture shows exactly the objects asked for, with their attributes, relations and background."""
    return fault_in_request(image, request) is None


def fault_in_edit(image: np.ndarray | Image.Image, edit: Edit) -> str | None:
    """Why the picture is not the edited source, or None if it is."""
    scene = read_scene(image)
    if scene.background != edit.target.background:
        return f"the background is {scene.background}, not {edit.target.background}"
    left = list(scene.objects)
    for wanted in edit.target.objects[:-1] if edit.added else edit.target.objects:
        there = [item for item in left if max(abs(item.y - wanted.y), abs(item.x - wanted.x)) <= SAME_PLACE]
        if len(there) != 1 or not _is(there[0], wanted):
            return f"{_names(there)} where a {wanted.size} {wanted.colour} {wanted.kind} belongs"
        left.remove(there[0])
    if not edit.added:
        return f"too much: {_names(left)}" if left else None
    if len(left) != 1 or not _is(left[0], edit.added):
        return f"added {_names(left)}, not a {edit.added.colour} {edit.added.kind}"
    if edit.relation and not _relation_holds(left[0], *edit.relation):
        return f"added, but not {edit.relation[0]} the other"
    return None


def judge_edit(image: np.ndarray | Image.Image, edit: Edit) -> bool:
    """Whether the edit is done and everything that it does not mention is unchanged and in its place."""
    return fault_in_edit(image, edit) is None
