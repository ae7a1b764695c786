"""The groups of prompts that a checkpoint is scored on, each with its figures as `scoring.py` makes them."""

from collections.abc import Callable

import numpy as np

from .intervals import paired_difference, proportion
from .scoring import (
    ATTRIBUTES,
    CAPTION,
    DRAWING,
    MODEL,
    Exam,
    answers,
    arrangements,
    by_kind,
    change_figures,
    changed_pictures,
    figures,
    frames,
    judged,
    single_pictures,
)
from .splits import COMBINATION, NAME, PAIR, SEEN
from .tasks import FRAMES, WORDINGS


def drawings(exam: Exam) -> dict:
    """Text to image."""
    result = {}
    for part in (SEEN, PAIR, COMBINATION):
        items = exam.items("text-to-image", "", (part,))
        measures = (*DRAWING, *ATTRIBUTES) if part == COMBINATION else DRAWING
        result[part] = figures(single_pictures(exam, items, exam.artist.draw(items), measures))
    return result


def drawings_32(exam: Exam) -> dict:
    """Text to image at the lower level."""
    return drawings(Exam(exam.artist.at_level("32"), exam.tasks, exam.split, exam.prompts))


def captions(exam: Exam) -> dict:
    parts = {part: exam.items("captioning", "", (part,)) for part in (SEEN, PAIR, COMBINATION, NAME)}
    return {part: figures(answers(exam, items, exam.artist.answer(items), CAPTION)) for part, items in parts.items()}


def questions(exam: Exam) -> dict:
    return by_kind(exam, "question", exam.artist.answer, answers)


def edits(exam: Exam) -> dict:
    return by_kind(exam, "editing", exam.artist.draw, changed_pictures, change_figures)


def analogies(exam: Exam) -> dict:
    return by_kind(exam, "analogy", exam.artist.draw, changed_pictures, change_figures)


def sequences(exam: Exam) -> dict:
    ask = lambda items: [drawn for _, drawn in exam.artist.interleave(items, max(FRAMES))]  # noqa: E731
    return by_kind(exam, "sequence", ask, frames)


def canvases(exam: Exam) -> dict:
    """Several things on one picture, at 2:1, 1:2 and 3:1."""
    return by_kind(exam, "arrangement", exam.artist.draw, arrangements)


def reasoning(exam: Exam) -> dict:
    """Reasoning first against the same tags without: the model writes its own thoughts, then the picture."""
    result = {}
    for part in (SEEN, PAIR):
        thinking = exam.items("reasoning", "", (part,))
        count = len(exam.tasks.targets("tags", "", exam.split, part))
        drawn = (exam.tasks.draw("tags", exam.split, number, part=part, kind="") for number in range(count))
        plain = {item.targets: item for item in drawn}
        items = [plain[item.targets] for item in thinking]
        without = single_pictures(exam, items, exam.artist.draw(items))
        thoughts = exam.artist.interleave(thinking, 1)
        rows = [item.targets[0] for item in items]
        pictures = [next(iter(drawn), None) for _, drawn in thoughts]
        reasoned = judged(exam, pictures, rows, DRAWING)
        exact = np.array([text == item.assistant[0] for (text, _), item in zip(thoughts, thinking)])
        result[part] = {
            "reasoning first": {**figures({MODEL: reasoned})[MODEL], "thoughts exact": proportion(exact)},
            "tags alone": figures(without),
            "difference": {name: paired_difference(reasoned[name], without[MODEL][name]) for name in DRAWING},
        }
    return result


def by_wording(exam: Exam) -> dict:
    """Seen pictures, asked for and asked about by each wording; at the lower level too, as every picture of less than
    64 pixels is read there."""
    result: dict[str, dict] = {}
    for (task, kind), wordings in WORDINGS.items():
        for number, wording in enumerate(wordings):
            if not (items := exam.items(task, kind, (SEEN,), number)):
                continue
            scores = result.setdefault(f"{task} {kind}".strip(), {})[wording] = {}
            for level in ("64", "32"):
                artist = exam.artist.at_level(level)
                if task == "text-to-image":
                    rows = [item.targets[0] for item in items]
                    right = judged(exam, artist.draw(items), rows, ("picture",))["picture"]
                else:
                    right = answers(exam, items, artist.answer(items))[MODEL]["exact"]
                scores[level] = proportion(right)
    return result


GROUPS: dict[str, Callable[[Exam], dict]] = {
    "drawings": drawings,
    "drawings-32": drawings_32,
    "captions": captions,
    "questions": questions,
    "edits": edits,
    "analogies": analogies,
    "reasoning": reasoning,
    "sequences": sequences,
    "arrangements": canvases,
    "wordings": by_wording,
}
