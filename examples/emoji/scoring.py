"""What is handed in for prompts, and what it is worth.

Whatever is handed in for a group of prompts is judged alike: the model's pictures or answers, the truth as the vision
tokenizer rebuilds it (what no drawing can be better than, but by luck), and what takes no model (`baselines.py`). A
picture that was not drawn counts as wrong. Shares come with Wilson's 95% interval, see `intervals.py`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .artist import Artist
from .baselines import mean_pictures, most_frequent, other_styles
from .documents import SIZES, draw_picture
from .intervals import paired_difference, proportion
from .judge import Judge, untouched, untouched_errors
from .splits import COMBINATION, PAIR, SEEN
from .tasks import KINDS, Item, Picture, Tasks
from .world import World, in_a_row

PARTS = {"seen": (SEEN,), "held out": (PAIR, COMBINATION)}
MODEL, TOKENIZER, MEAN, OTHER, SOURCE, FREQUENT = (
    *("model", "the truth rebuilt by the tokenizer", "mean picture of the style"),
    *("nearest seen picture of the name in another style", "source handed back", "most frequent answer"),
)
TRAINING_ANSWERS = 2_000  # of which the most frequent is taken
DRAWING = ("picture", "name", "style")
ATTRIBUTES = ("noun", "gender", "tone", "every attribute")
EXACT = {"exact": str}
CAPTION = {
    "exact": str,
    "name": lambda text: text.rpartition(", ")[0],
    "style": lambda text: text.rpartition(", ")[2],
}

Drawing = np.ndarray | None
Verdicts = dict[str, dict[str, np.ndarray]]  # who -> measure -> one value a prompt: bool, or the float of an error


@dataclass
class Exam:
    """What groups are drawn from and judged by.

    Attributes:
        split: "test", or "dev" for choosing settings.
        prompts: of a figure, where its split has as many.
    """

    artist: Artist
    tasks: Tasks
    split: str = "test"
    prompts: int = 1_000

    @property
    def world(self) -> World:
        return self.artist.world

    @cached_property
    def judge(self) -> Judge:
        things = self.tasks.things
        labels = {kind: [thing[kind] for thing in things] for kind in ("gender", "tone")}
        return Judge(self.world, {"noun": [thing.noun for thing in things], **labels, "every attribute": things})

    @cached_property
    def means(self) -> dict[str, np.ndarray]:
        return mean_pictures(self.world)

    def items(self, task: str, kind: str, parts: Sequence[str], wording: int = 0) -> list[Item]:
        """One item for each target of the parts, or for `prompts` of them drawn by the group's name; of any wording
        the same."""
        counts = {part: len(self.tasks.targets(task, kind, self.split, part)) for part in parts}
        places = [(part, number) for part, count in counts.items() for number in range(count)]
        if len(places) > self.prompts:
            places = random.Random(f"{task} {kind} {parts}").sample(places, self.prompts)
        return [
            self.tasks.draw(task, self.split, number, part=part, kind=kind, wording=wording) for part, number in places
        ]

    def truths(self, items: Sequence[Item]) -> list[np.ndarray]:
        """The one picture that each item asks for."""
        return [draw_picture(item.drawn[0], self.world, self.artist.level) for item in items]

    def canvas(self, picture: Picture, cells: Sequence[Drawing]) -> Drawing:
        """Other pictures in the cells of one; None if one is missing."""
        if any(cell is None for cell in cells):
            return None
        schedule = SIZES.by_aspect_ratio(picture.aspect_ratio, self.artist.level)
        return in_a_row(list(cells), *SIZES.image_size(schedule))

    def mean_of(self, row: int) -> np.ndarray:
        return self.means[self.world.styles[row]]

    def others_of(self, rows: Sequence[int]) -> list[Drawing]:
        others = other_styles(self.world, rows)
        return [None if other is None else self.world.pictures[other] for other in others]


# From verdicts to figures


def figures(verdicts: Verdicts) -> dict:
    """Shares with their intervals."""
    return {
        who: {measure: proportion(values) for measure, values in each.items() if values.dtype == bool}
        for who, each in verdicts.items()
    }


def pooled(several: Sequence[Verdicts]) -> Verdicts:
    """All prompts of several groups as one."""
    return {
        who: {measure: np.concatenate([each[who][measure] for each in several]) for measure in measures}
        for who, measures in several[0].items()
    }


def by_kind(
    exam: Exam,
    task: str,
    ask: Callable[[list[Item]], list],
    judge: Callable[[Exam, list[Item], list], Verdicts],
    figure: Callable[[Verdicts], dict] = figures,
) -> dict:
    """Figures of each kind of a task, seen and held out, and of all its prompts together.

    Args:
        ask: what the model makes of items.
        judge: what that is worth.
    """
    result, all_verdicts = {}, {part: [] for part in PARTS}
    for kind in KINDS[task]:
        result[kind] = {}
        for part, parts in PARTS.items():
            if items := exam.items(task, kind, parts):
                verdicts = judge(exam, items, ask(items))
                all_verdicts[part].append(verdicts)
                result[kind][part] = figure(verdicts)
    return {"all kinds": {part: figure(pooled(each)) for part, each in all_verdicts.items() if each}, **result}


# What is judged


def judged(
    exam: Exam, drawings: Sequence[Drawing], rows: Sequence[int], measures: Sequence[str]
) -> dict[str, np.ndarray]:
    """[`Judge.right`] of square pictures, of which some may be missing."""
    present = [place for place, drawing in enumerate(drawings) if drawing is not None]
    right = exam.judge.right([drawings[place] for place in present], [rows[place] for place in present])
    return {measure: _spread(right[measure], present, len(drawings)) for measure in measures}


def _spread(values: np.ndarray, places: Sequence[int], count: int) -> np.ndarray:
    result = np.zeros(count, bool)
    result[places] = values
    return result


def single_pictures(
    exam: Exam, items: Sequence[Item], drawings: Sequence[Drawing], measures: Sequence[str] = DRAWING
) -> Verdicts:
    rows = [item.targets[0] for item in items]
    handed_in = {
        MODEL: drawings,
        TOKENIZER: exam.artist.rebuild(exam.truths(items)),
        MEAN: [exam.mean_of(row) for row in rows],
        OTHER: exam.others_of(rows),
    }
    return {who: judged(exam, each, rows, measures) for who, each in handed_in.items()}


def changed_pictures(exam: Exam, items: Sequence[Item], drawings: Sequence[np.ndarray]) -> Verdicts:
    """Of edits and analogies, whose last picture is the one to change."""
    rows = [item.targets[0] for item in items]
    handed_in = {
        MODEL: drawings,
        TOKENIZER: exam.artist.rebuild(exam.truths(items)),
        SOURCE: [draw_picture(item.read[-1], exam.world, exam.artist.level) for item in items],
    }
    verdicts = {who: judged(exam, each, rows, DRAWING) for who, each in handed_in.items()}
    for who in (MODEL, TOKENIZER):
        errors = [_untouched_error(*each) for each in zip(handed_in[who], handed_in[SOURCE], exam.truths(items))]
        verdicts[who]["untouched"] = np.array(errors)
    return verdicts


def _untouched_error(drawing: np.ndarray, source: np.ndarray, target: np.ndarray) -> float:
    """Mean squared error of what the change leaves as it is, in levels of 0 to 255; NaN where that is nothing."""
    return untouched_errors(drawing, source, target)[0] if untouched(source, target).any() else np.nan


def change_figures(verdicts: Verdicts) -> dict:
    """And how the error of untouched pixels compares with the tokenizer's own on the same targets."""
    result, errors = figures(verdicts), {who: verdicts[who]["untouched"] for who in (MODEL, TOKENIZER)}
    known = ~np.isnan(errors[MODEL])
    if known.any():
        own, least = (errors[who][known] for who in (MODEL, TOKENIZER))
        result["squared error of untouched pixels"] = {
            **{who: round(float(errors[who][known].mean()), 2) for who in errors},
            "ratio": round(float(own.mean() / least.mean()), 3),
            "difference": paired_difference(own, least),
        }
    return result


def frames(exam: Exam, items: Sequence[Item], sequences: Sequence[Sequence[np.ndarray]]) -> Verdicts:
    """Of sequences: every frame the right one, as many as asked for, and each frame by itself."""
    rows = [row for item in items for row in item.targets]
    ends = np.cumsum([len(item.targets) for item in items])[:-1]
    truths = [draw_picture(picture, exam.world, exam.artist.level) for item in items for picture in item.drawn]
    cut = lambda pictures: [list(pictures[start:end]) for start, end in zip((0, *ends), (*ends, len(rows)))]  # noqa: E731
    handed_in = {
        MODEL: sequences,
        TOKENIZER: cut(exam.artist.rebuild(truths)),
        MEAN: cut([exam.mean_of(row) for row in rows]),
        OTHER: cut(exam.others_of(rows)),
    }
    verdicts = {}
    for who, each in handed_in.items():
        as_many = np.array([len(drawn) == len(item.targets) for drawn, item in zip(each, items)])
        padded = [(*drawn, *[None] * len(item.targets))[: len(item.targets)] for drawn, item in zip(each, items)]
        right = judged(exam, [frame for drawn in padded for frame in drawn], rows, DRAWING)
        all_right = np.array([all(of_item) for of_item in np.split(right["picture"], ends)])
        verdicts[who] = {"all frames": all_right & as_many, "number of frames": as_many, "frames": right["picture"]}
    return verdicts


def arrangements(exam: Exam, items: Sequence[Item], canvases: Sequence[np.ndarray]) -> Verdicts:
    """In GenEval's terms, for which a name counts in any style: see [`Judge.right_rows`]."""
    pictures, others = [item.drawn[0] for item in items], iter(exam.others_of([r for i in items for r in i.targets]))
    handed_in = {
        MODEL: canvases,
        TOKENIZER: exam.artist.rebuild(exam.truths(items)),
        MEAN: [exam.canvas(picture, [exam.mean_of(row) for row in picture.rows]) for picture in pictures],
        OTHER: [exam.canvas(picture, [next(others) for _ in picture.rows]) for picture in pictures],
    }
    measures = {"every cell": "picture", "position": "name", "style": "style"}
    measures |= {"two objects": "two objects", "counting": "counting"}
    verdicts = {}
    for who, each in handed_in.items():
        present = [place for place, canvas in enumerate(each) if canvas is not None]
        right = {}
        if present:
            right = exam.judge.right_rows(*zip(*((each[place], items[place].targets) for place in present)))
        verdicts[who] = {
            name: _spread(right.get(measure, False), present, len(items)) for name, measure in measures.items()
        }
    return verdicts


def answers(
    exam: Exam, items: Sequence[Item], given: Sequence[str], measures: Mapping[str, Callable[[str], str]] = EXACT
) -> Verdicts:
    """Equal to the truth, to the letter, in what each measure reads of both."""
    truths, (task, kind) = [item.assistant[0] for item in items], (items[0].task, items[0].kind)
    seen = [exam.tasks.draw(task, "train", number, kind=kind) for number in range(TRAINING_ANSWERS)]
    frequent = most_frequent([item.assistant[0] for item in seen])
    handed_in = {MODEL: given, FREQUENT: [frequent] * len(items)}
    return {
        who: {
            measure: np.array([read(answer) == read(truth) for answer, truth in zip(each, truths)])
            for measure, read in measures.items()
        }
        for who, each in handed_in.items()
    }
