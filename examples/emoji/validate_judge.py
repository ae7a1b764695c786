"""Choose the judge's metric and hold it to pictures whose truth is known: `python -m examples.emoji.validate_judge`.

True pictures that are blurred, shifted, compressed and resized, and the errors of a vision tokenizer, have to find
themselves; grey, noise, mean pictures and pictures of other prompts have to score as chance does. No model is scored:
`--tokenizer` adds a trained vision tokenizer's reconstructions to what has to be found again.
"""

import argparse
import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import scipy
import skimage
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2lab

from benchmarks.harness import machine, report
from transformers_nextflow import NextFlowVQModel

from .baselines import mean_pictures, other_styles
from .data import WHITE
from .intervals import proportion
from .judge import EDGE, Judge, squared_distances
from .names import GENDERS, person_of
from .world import World, resized, to_pixel_values

SEED = 0
LEAST = 0.95  # of the true pictures, under every change that is to be forgiven
SHIFTS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
CHOSEN = f"RGB, triangle, {EDGE}"

# Changes of a picture: uint8 (size, size, 3), generator -> uint8 square picture


def as_pixels(values: np.ndarray) -> np.ndarray:
    return np.round(values).clip(0, 255).astype(np.uint8)


def blurred(picture: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    return as_pixels(gaussian_filter(picture.astype(float), (sigma, sigma, 0), mode="nearest"))


def shifted(picture: np.ndarray, rng: np.random.Generator | None, y: int, x: int) -> np.ndarray:
    """Down by y and right by x pixels, on white."""
    margin, edge = max(abs(y), abs(x)), len(picture)
    padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), constant_values=WHITE)
    return padded[margin - y : margin - y + edge, margin - x : margin - x + edge]


def compressed(picture: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(picture: np.ndarray, rng: np.random.Generator, psnr: float) -> np.ndarray:
    """A stand-in for a vision tokenizer: blurred by a pixel, with blotches of noise 1.5 pixels wide, at a given PSNR.

    A picture that the blur alone takes below that PSNR gets no noise."""
    truth, blur = picture.astype(float), gaussian_filter(picture.astype(float), (1, 1, 0), mode="nearest")
    noise = gaussian_filter(rng.standard_normal(picture.shape), (1.5, 1.5, 0))
    noise /= noise.std()
    low, high = 0.0, 255.0
    for _ in range(12):  # clipping bends the error, so the amplitude is searched
        middle = (low + high) / 2
        error = np.square(as_pixels(blur + middle * noise) - truth).mean()
        low, high = (middle, high) if error < 255**2 / 10 ** (psnr / 10) else (low, middle)
    return as_pixels(blur + low * noise)


def at_edge(picture: np.ndarray, rng: np.random.Generator, edge: int) -> np.ndarray:
    return resized(picture, edge)


FORGIVEN: dict[str, Callable] = {
    "as it is": lambda picture, rng: picture,
    "blur 1": partial(blurred, sigma=1),
    "blur 1.5": partial(blurred, sigma=1.5),
    "blur 2": partial(blurred, sigma=2),
    **{f"shift {y} {x}": partial(shifted, y=y, x=x) for y, x in SHIFTS if (y, x) != (0, 0)},
    "JPEG 75": partial(compressed, quality=75),
    "JPEG 25": partial(compressed, quality=25),
    "stand-in 23 dB": partial(noisy, psnr=23),
    "48 pixels": partial(at_edge, edge=48),
    "40 pixels": partial(at_edge, edge=40),
    "32 pixels": partial(at_edge, edge=32),
}
BEYOND: dict[str, Callable] = {
    "blur 3": partial(blurred, sigma=3),
    **{f"shift {y} {x}": partial(shifted, y=y, x=x) for y, x in [(0, -2), (0, 2), (-2, 0), (2, 0)]},
    "JPEG 10": partial(compressed, quality=10),
    "stand-in 20 dB": partial(noisy, psnr=20),
    "stand-in 17 dB": partial(noisy, psnr=17),
}

# Metrics: squared differences of features


class Metric(NamedTuple):
    """`features` takes pictures to float32 (B, D); with `shifts` the nearest of nine shifts counts."""

    features: Callable[[Sequence[np.ndarray]], np.ndarray]
    shifts: bool = False


def at(pictures: Sequence[np.ndarray], edge: int, resample: Image.Resampling) -> np.ndarray:
    small = [np.asarray(Image.fromarray(picture).resize((edge, edge), resample)) for picture in pictures]
    return np.stack(small).astype(np.float32) - 128


def rgb(pictures: Sequence[np.ndarray], edge: int, resample: Image.Resampling = Image.Resampling.BOX) -> np.ndarray:
    return at(pictures, edge, resample).reshape(len(pictures), -1)


def lab(pictures: Sequence[np.ndarray], edge: int) -> np.ndarray:
    small = (at(pictures, edge, Image.Resampling.BOX) + 128) / 255
    return rgb2lab(small).astype(np.float32).reshape(len(pictures), -1)


def several(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The means of squared differences at three resolutions, added up."""
    return np.concatenate([rgb(pictures, edge) / edge for edge in (8, 16, 32)], axis=1)


TRIANGLE = Image.Resampling.BILINEAR
METRICS = {
    "RGB, box, 8": Metric(partial(rgb, edge=8)),
    "RGB, box, 16": Metric(partial(rgb, edge=16)),
    "RGB, box, 32": Metric(partial(rgb, edge=32)),
    "RGB, box, 64": Metric(partial(rgb, edge=64)),
    "RGB, box, 8 + 16 + 32": Metric(several),
    "RGB, triangle, 16": Metric(partial(rgb, edge=16, resample=TRIANGLE)),
    "RGB, triangle, 32": Metric(partial(rgb, edge=32, resample=TRIANGLE)),
    "RGB, box, 16, nine shifts": Metric(partial(rgb, edge=16), shifts=True),
    "CIELAB, box, 16": Metric(partial(lab, edge=16)),
}


def found(world: World, metric: Metric, rows: np.ndarray, changed: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Of each change, the share of pictures that are nearest to themselves, or to one that is equal to the pixel."""
    distinct = np.unique(world.twins)
    truth = metric.features(world.pictures[distinct])
    result = {}
    for change, pictures in changed.items():
        right = []
        for start in range(0, len(rows), 250):
            chunk = pictures[start : start + 250]
            moves = SHIFTS if metric.shifts else [(0, 0)]
            distances = squared_distances(metric.features([shifted(each, None, *moves[0]) for each in chunk]), truth)
            for move in moves[1:]:
                other = squared_distances(metric.features([shifted(each, None, *move) for each in chunk]), truth)
                np.minimum(distances, other, out=distances)
            right += list(distinct[distances.argmin(1)] == world.twins[rows[start : start + 250]])
        result[change] = round(float(np.mean(right)), 4)
    return result


# Nonsense


def skin_tone(name: str) -> str:
    """One skin tone, or "" for none and for several."""
    tones = name.partition(": ")[2]
    return "" if "," in tones else tones


def chance(labels: Sequence, targets: np.ndarray) -> dict[str, float]:
    """How often a picture of the world, drawn at random, has the label asked for, and how often the luckiest has."""
    of_all, asked = Counter(labels), Counter(labels[row] for row in targets)
    shares = {label: count / len(targets) for label, count in asked.items()}
    random_picture = sum(share * of_all[label] / len(labels) for label, share in shares.items())
    return {"a random picture": round(random_picture, 5), "the luckiest picture": round(max(shares.values()), 5)}


def nonsense(world: World, rows: np.ndarray, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """What no drawing should score by, one for each picture asked for."""
    size, means = world.pictures.shape[1], mean_pictures(world)
    constants = {f"grey {level}": np.full((size, size, 3), level, np.uint8) for level in (64, 128, 192)}
    constants["white"], constants["black"] = (np.full((size, size, 3), level, np.uint8) for level in (WHITE, 0))
    constants["mean picture of all"] = as_pixels(world.pictures[world.seen].mean(0))
    return {
        **{name: [picture] * len(rows) for name, picture in constants.items()},
        "noise": [rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for _ in rows],
        "mean picture of another style": [means[_other_style(world, row, rng)] for row in rows],
        "pictures of other prompts": list(world.pictures[_deranged(world.twins[rows], rows, rng)]),
    }


def _other_style(world: World, row: int, rng: np.random.Generator) -> str:
    return rng.choice(sorted(set(world.styles) - {world.styles[row]}))


def _deranged(twins: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows in another order, in which none stands where it, or one equal to the pixel, was asked for."""
    order = np.argsort(rng.random(len(rows)))
    for place in np.flatnonzero(twins[order] == twins):
        other = next(
            each
            for each in range(len(rows))
            if twins[order[each]] != twins[place] and twins[order[place]] != twins[each]
        )
        order[[place, other]] = order[[other, place]]
    return rows[order]


def judged(
    judge: Judge, drawings: list[np.ndarray], rows: np.ndarray, toned: np.ndarray, gendered: np.ndarray
) -> dict:
    """Every measure with its interval; skin tone and gender of those prompts that name one."""
    right = judge.right(drawings, rows)
    masks = {"skin tone": toned, "gender": gendered}
    return {measure: proportion(each[masks.get(measure, slice(None))]) for measure, each in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="of `examples.emoji.data`")
    parser.add_argument("--pictures", type=int, default=1_000, help="pictures that are changed and looked for")
    parser.add_argument("--tokenizer", type=Path, help="folder of a vision tokenizer: judge its reconstructions only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    world, rng = World(arguments.data), np.random.default_rng(SEED)
    if not 2 <= arguments.pictures <= len(world):
        parser.error(f"--pictures must be in 2..{len(world)}, got {arguments.pictures}")
    rows = rng.choice(len(world), arguments.pictures, replace=False)
    result = {"pictures": len(world), "distinct": len(np.unique(world.twins)), "asked for": len(rows), "seed": SEED}
    if arguments.tokenizer:
        result |= of_tokenizer(world, arguments.tokenizer, rows)
    else:
        result |= validation(world, rows, rng)
    versions = {each.__name__: each.__version__ for each in (np, scipy, skimage, PIL)}
    report(result | {"machine": machine(torch.device("cpu")) | versions}, arguments.json, arguments.output)


def validation(world: World, rows: np.ndarray, rng: np.random.Generator) -> dict:
    changes = {"to forgive": FORGIVEN, "beyond": BEYOND}
    changed = {
        kind: {name: [change(world.pictures[row], rng) for row in rows] for name, change in each.items()}
        for kind, each in changes.items()
    }
    metrics = {}
    for name, metric in METRICS.items():
        shares = found(world, metric, rows, changed["to forgive"])
        metrics[name] = {"passes": min(shares.values()) >= LEAST, "found": shares}
    names = set(world.names)
    people = [person_of(name, names) for name in world.names]
    labels = {
        "skin tone": [skin_tone(name) for name in world.names],
        "gender": [person.gender if person else "" for person in people],
    }
    toned = np.array([labels["skin tone"][row] != "" for row in rows])
    gendered = np.array([labels["gender"][row] in GENDERS for row in rows])
    started = time.perf_counter()
    judge = Judge(world, labels)
    built = time.perf_counter()
    judge.right(changed["to forgive"]["blur 1"], rows)
    seconds = {"world": round(built - started, 2), "drawings": round(time.perf_counter() - built, 2)}
    measured = partial(judged, judge, toned=toned, gendered=gendered)
    true = {name: measured(drawings, rows) for name, drawings in (changed["to forgive"] | changed["beyond"]).items()}
    absurd = {name: measured(drawings, rows) for name, drawings in nonsense(world, rows, rng).items()}
    others = other_styles(world, rows)
    with_other = np.array([other is not None for other in others])
    means = mean_pictures(world)
    baselines = {
        "mean picture of the style": measured([means[world.styles[row]] for row in rows], rows),
        "nearest seen picture of the name in another style": judged(
            judge,
            [world.pictures[other] for other in others if other is not None],
            rows[with_other],
            toned[with_other],
            gendered[with_other],
        ),
    }
    asked = {"skin tone": rows[toned], "gender": rows[gendered]}
    luck = {
        measure: chance(each, asked.get(measure, rows))
        for measure, each in {"picture": world.twins.tolist(), **judge.labels}.items()
    }
    return {
        "chosen": CHOSEN,
        "metrics": metrics,
        "true pictures": true,
        "chance": luck,
        "nonsense": absurd,
        "baselines": baselines,
        "ties": ties(judge, changed["to forgive"]),
        "seconds": seconds,
    }


def ties(judge: Judge, changed: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """How many drawings, of all changes, are nearest to several pictures that are not equal to the pixel."""
    twins, counts = judge.world.twins, Counter()
    for drawings in changed.values():
        counts.update(len(set(twins[near])) for near in judge.nearest(drawings))
    return {"drawings": counts.total(), "with several nearest": counts.total() - counts[1], "most": max(counts)}


def of_tokenizer(world: World, folder: Path, rows: np.ndarray) -> dict:
    """How often the reconstructions of true pictures find themselves, of pictures seen and held out."""
    model = NextFlowVQModel.from_pretrained(folder).eval()
    rebuilt = []
    for start in range(0, len(rows), 50):
        pixels = to_pixel_values(list(world.pictures[rows[start : start + 50]]))
        with torch.no_grad():
            grid = model.schedules.by_size(*pixels.shape[-2:]).final_grid
            decoded = model.decode(model.encode(pixels), grid)
        rebuilt += [as_pixels((each + 1) * 127.5) for each in decoded.float().permute(0, 2, 3, 1).numpy()]
    right = Judge(world).right(rebuilt, rows)
    parts = np.array(world.parts)[rows]
    return {
        "tokenizer": folder.name,
        "reconstructions": {
            part: {measure: proportion(each[parts == part]) for measure, each in right.items()}
            for part in sorted(set(parts))
        },
    }


if __name__ == "__main__":
    main()
