"""What is trained and scored: a user's texts and pictures, and the assistant's answer in text and pictures, the truth.

Each item is drawn from (task, kind, split, part, seed, number) alone. What it is about are its targets: the pictures
that it asks for, or the one that it asks about.

- "train": every picture is seen, and no arrangement is one of the held-out ones.
- "dev" and "test": targets are of one `part` (see `splits.py`), all other pictures are seen. Part "seen" has seen
  targets, for figures beside those of held-out ones; its arrangements and sequences of several seen pictures are ones
  that training never shows. dev and test share no target.

| task | user | assistant |
|---|---|---|
| text-to-image | name, style | picture |
| captioning | picture, question | name, style |
| question | picture, question | name, style, tone, hour, gender or colour |
| editing | picture, instruction | picture |
| analogy | A, A', B, "do the same ..." | B' |
| tags | tags, style | picture |
| reasoning | "think first", tags, style | "The user wants ... The final prompt is: ...", picture |
| sequence | "show the hours from ... to ..." | 3 to 5 frames |
| arrangement | two or three things and where they stand | one picture of several cells |
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from .attributes import NUMBERS, VALUES, Thing, read_names
from .splits import COMBINATION, DEV_SHARE, NAME, PAIR, SEEN, fraction, is_dev
from .wordings import (
    ANALOGIES,
    ARRANGEMENTS,
    CAPTION,
    INSTRUCTIONS,
    PICTURES,
    QUESTIONS,
    SEQUENCES,
    TAGS,
    THINKING,
    THOUGHT,
    hour_phrase,
    is_countable,
    list_of,
    plural,
    value_phrase,
    with_article,
)
from .world import World

KINDS = {
    "text-to-image": ("",),
    "captioning": ("",),
    "question": ("name", "style", "tone", "hour", "gender", "colour"),
    "editing": tuple(INSTRUCTIONS),
    # of hours and digits there is one thing alone
    "analogy": ("style", "tone", "gender", "hair", "age", "colour", "size", "phase", "direction"),
    "tags": ("",),
    "reasoning": ("",),
    "sequence": tuple(SEQUENCES),
    "arrangement": tuple(ARRANGEMENTS),
}
WORDINGS = {
    ("text-to-image", ""): PICTURES,
    ("captioning", ""): QUESTIONS["caption"],
    **{("question", kind): QUESTIONS[kind] for kind in KINDS["question"]},
}
FRAMES = (3, 4, 5)  # of a sequence
HELD_OUT_ARRANGEMENTS = 0.1  # share of the combinations of several seen pictures
MAX_TAGS = 6
CYCLIC = ("hour", "phase")
UNMARKED = ("tone", "hair", "direction")  # a picture without the attribute can be given it


@dataclass(frozen=True)
class Picture:
    """One picture of the world, or several of one style side by side or one below the other.

    Attributes:
        rows: the pictures of its cells, from left to right or from top to bottom.
        vertical: whether the cells stand one below the other.
    """

    rows: tuple[int, ...]
    vertical: bool = False

    @property
    def aspect_ratio(self) -> str:
        """ "width:height"."""
        return f"1:{len(self.rows)}" if self.vertical else f"{len(self.rows)}:1"


@dataclass(frozen=True)
class Item:
    """A prompt and its truth.

    Attributes:
        task, kind: of [`KINDS`], the kind of question, edit, sequence or arrangement ("" where there is one).
        targets: rows of the pictures asked for, or of the one asked about.
        user: texts and pictures that are only read.
        assistant: texts and pictures that are supervised.
    """

    task: str
    kind: str
    targets: tuple[int, ...]
    user: tuple[str | Picture, ...]
    assistant: tuple[str | Picture, ...]

    @property
    def read(self) -> list[Picture]:
        """Pictures of the prompt."""
        return [part for part in self.user if isinstance(part, Picture)]

    @property
    def drawn(self) -> list[Picture]:
        """Pictures of the answer."""
        return [part for part in self.assistant if isinstance(part, Picture)]


class Tasks:
    """All items of a world.

    Args:
        names, styles, tags, parts, splits, twins: of each picture, as [`World`] has them.
    """

    def __init__(
        self,
        names: Sequence[str],
        styles: Sequence[str],
        tags: Sequence[Sequence[str]],
        parts: Sequence[str],
        splits: Sequence[str],
        twins: Sequence[int],
    ):
        self.names, self.styles, self.tags = names, styles, tags
        self.parts, self.splits, self.twins = parts, splits, twins
        things = read_names(names)
        self.things: list[Thing] = [things[name] for name in names]
        groups: dict[int, list[int]] = defaultdict(list)
        for row, twin in enumerate(twins):
            groups[twin].append(row)
        # equal pictures have several names: nothing is asked about them
        self.ambiguous = {row for group in groups.values() if len(group) > 1 for row in group}
        # equal pictures of dev and test belong to neither
        self._torn = {row for group in groups.values() if len({splits[row] for row in group}) > 1 for row in group}
        self._builders: dict[str, Callable[..., Item]] = {
            "text-to-image": self._text_to_image,
            "captioning": self._captioning,
            "question": self._question,
            "editing": self._editing,
            "analogy": self._analogy,
            "tags": self._from_tags,
            "reasoning": self._reasoning,
            "sequence": self._sequence,
            "arrangement": self._arrangement,
        }
        self._candidates: dict[tuple[str, str], list] = {}
        self._targets: dict[tuple[str, ...], list] = {}

    @classmethod
    def of(cls, world: World) -> "Tasks":
        twins = [int(twin) for twin in world.twins]
        return cls(world.names, world.styles, world.tags, world.parts, world.splits, twins)

    def draw(
        self,
        task: str,
        split: str,
        number: int,
        seed: int = 0,
        part: str = SEEN,
        kind: str | None = None,
        wording: int = 0,
    ) -> Item:
        """Item `number` of a task.

        Args:
            split: "train", "dev" or "test".
            part: of the targets; only "seen" is trained on.
            kind: one of [`KINDS`] of the task, whose targets dev and test take once each before any comes again; by
                default a drawn one, by the root of its number of targets.
            wording: of [`WORDINGS`], in dev and test; training draws any.

        Raises:
            ValueError: if there is no such task, kind, split or part, or it has no item.
        """
        name = f"{task} {kind} {split} {part} {seed}"
        rng = random.Random(f"{name} {number}")
        if kind is None:
            kinds = _one_of("task", task, KINDS)
            kind = rng.choices(kinds, [len(self.targets(task, kind, split, part)) ** 0.5 for kind in kinds])[0]
        targets = self.targets(task, kind, split, part)
        if not targets:
            raise ValueError(f"the task {task} has no items of the kind {kind!r} with {part} targets in {split}")
        if split == "train":
            target = rng.choice(targets)
        else:
            target = targets[_shuffled(name, len(targets))[number % len(targets)]]
        return self._builders[task](_Draw(rng, split, part, kind, wording), target)

    def dialogue(self, number: int, seed: int = 0) -> tuple[Item, ...]:
        """Items of one conversation, for training: a seen picture is described, asked about and edited, and its edit
        described. Texts of all but the first item are about the picture that came last."""
        edit = self.draw("editing", "train", number, seed)
        ((source,),) = (picture.rows for picture in edit.read)
        (target,) = edit.targets
        rng = random.Random(f"dialogue {seed} {number}")
        before, after = (self._asked(rng, row, count) for row, count in ((source, 2), (target, 1)))
        first, *others = *before, edit, *after
        texts = [tuple(part for part in item.user if isinstance(part, str)) for item in others]
        return first, *(replace(item, user=user) for item, user in zip(others, texts))

    def _asked(self, rng: random.Random, row: int, count: int) -> list[Item]:
        """A caption or questions about a seen picture, in any order; nothing where its name is not its own."""
        if row in self.ambiguous:
            return []
        kinds = [kind for kind in ("", *KINDS["question"]) if self._answer(kind, row) is not None]
        draws = [_Draw(rng, "train", SEEN, kind, 0) for kind in rng.sample(kinds, count)]
        return [self._question(draw, row) if draw.kind else self._captioning(draw, row) for draw in draws]

    def targets(self, task: str, kind: str, split: str, part: str = SEEN) -> list[int] | list[tuple[int, ...]]:
        """Rows that items may be about; runs of rows where a kind has sequences or several of one thing."""
        _check(task, kind, split, part)
        key = (task, kind, split, part)
        if key not in self._targets:
            if (task, kind) not in self._candidates:
                self._candidates[task, kind] = list(self._find_candidates(task, kind))
            found = self._candidates[task, kind]
            self._targets[key] = [target for target in found if self._is_target(target, split, part)]
        return self._targets[key]

    def _is_target(self, target: int | tuple[int, ...], split: str, part: str) -> bool:
        if isinstance(target, tuple):
            if all(self.splits[row] == "train" for row in target):
                return part == SEEN and self._arrangement_split(target) == split
            return (
                split != "train"
                and any(self.parts[row] == part for row in target)
                and all(self.splits[row] == "train" or self._is_held_out(row, split) for row in target)
            )
        if part != SEEN:
            return self.parts[target] == part and self._is_held_out(target, split)
        if self.splits[target] != "train":
            return False
        return split == "train" or is_dev(self.names[target], self.styles[target]) == (split == "dev")

    def _is_held_out(self, row: int, split: str) -> bool:
        return self.splits[row] == split and row not in self._torn

    def _arrangement_split(self, rows: Sequence[int]) -> str:
        """Where seen pictures together belong: a tenth of their combinations is not trained on."""
        drawn = fraction("arrangement", self.styles[rows[0]], *(self.names[row] for row in rows))
        if drawn >= HELD_OUT_ARRANGEMENTS:
            return "train"
        return "dev" if drawn < DEV_SHARE * HELD_OUT_ARRANGEMENTS else "test"

    def _find_candidates(self, task: str, kind: str) -> Iterator[int] | Iterator[tuple[int, ...]]:
        """What items of any split may be about."""
        rows = range(len(self.names))
        if task == "editing":
            yield from sorted(self._sources[kind])
        elif task == "analogy":
            yield from (row for row in sorted(self._sources[kind]) if self._analogies(kind, row))
        elif task in ("tags", "reasoning"):
            yield from self._tagged
        elif task == "sequence":
            yield from self._runs(kind)
        elif kind == "count":
            yield from ((row,) * count for row in self._countable for count in (2, 3))
        elif task == "arrangement":
            yield from self._countable
        elif task == "text-to-image":
            yield from rows
        else:
            yield from (row for row in rows if row not in self.ambiguous and self._answer(kind, row) is not None)

    # Text and one picture

    def _text_to_image(self, draw: "_Draw", row: int) -> Item:
        return Item("text-to-image", "", (row,), (self._fill(draw.word(PICTURES), row),), (Picture((row,)),))

    def _captioning(self, draw: "_Draw", row: int) -> Item:
        user = Picture((row,)), draw.word(QUESTIONS["caption"])
        return Item("captioning", "", (row,), user, (self._answer("", row),))

    def _question(self, draw: "_Draw", row: int) -> Item:
        user = Picture((row,)), draw.word(QUESTIONS[draw.kind])
        return Item("question", draw.kind, (row,), user, (self._answer(draw.kind, row),))

    def _answer(self, kind: str, row: int) -> str | None:
        """The truth of a question, or None where it cannot be asked; "" asks for the caption."""
        thing = self.things[row]
        if kind in ("", "name", "style"):
            return {"": self._fill(CAPTION, row), "name": self.names[row], "style": self.styles[row]}[kind]
        two_tones = kind == "tone" and thing["second_tone"]
        of_child = kind == "gender" and thing["age"] in ("baby", "child")
        beside = kind == "colour" and thing["gender"]  # the cane of somebody is white
        return None if two_tones or of_child or beside else thing[kind]

    def _fill(self, wording: str, row: int, **words: str) -> str:
        return wording.format(name=self.names[row], style=self.styles[row], **words)

    # Edits

    @cached_property
    def _sources(self) -> dict[str, dict[int, list[int]]]:
        """Kind of edit -> target -> the seen pictures that differ from it in that alone."""
        found: dict[str, dict[int, list[int]]] = {}
        for kind in INSTRUCTIONS:
            groups: dict[tuple, list[int]] = defaultdict(list)
            for row, (thing, style) in enumerate(zip(self.things, self.styles)):
                if kind == "style":
                    groups[thing,].append(row)
                elif thing[kind] or kind in UNMARKED:
                    groups[self._base(kind, row), style].append(row)
            found[kind] = {}
            for group in groups.values():
                for target in group:
                    if sources := [source for source in group if self._is_edit(kind, source, target)]:
                        found[kind][target] = sources
        return found

    def _is_edit(self, kind: str, source: int, target: int) -> bool:
        return (
            self.splits[source] == "train"
            and self.twins[source] != self.twins[target]
            and self._value(kind, target) not in (None, self._value(kind, source))
            and not (kind == "tone" and self.things[target]["second_tone"])
        )

    def _value(self, kind: str, row: int) -> str | None:
        return self.styles[row] if kind == "style" else self.things[row][kind]

    def _change(self, kind: str, source: int, target: int) -> tuple:
        """What two edits have in common that do the same."""
        style = None if kind == "style" else self.styles[target]
        return self._value(kind, source), self._value(kind, target), style

    def _base(self, kind: str, row: int) -> Thing:
        """What an edit of the kind leaves as it is."""
        return self.things[row] if kind == "style" else self.things[row].without(kind)

    @cached_property
    def _changes(self) -> dict[str, dict[tuple, dict[Thing, list[tuple[int, int]]]]]:
        """Kind of edit -> change -> thing -> the pairs of seen pictures that show it."""
        found: dict[str, dict[tuple, dict]] = {}
        for kind, targets in self._sources.items():
            found[kind] = defaultdict(lambda: defaultdict(list))
            for target, sources in targets.items():
                if self.splits[target] == "train":
                    base = self._base(kind, target)
                    for source in sources:
                        found[kind][self._change(kind, source, target)][base].append((source, target))
        return found

    def _analogies(self, kind: str, target: int) -> list[int]:
        """Sources of a target whose change another thing shows as well."""
        base, changes = self._base(kind, target), self._changes[kind]
        shown = {source: changes.get(self._change(kind, source, target), ()) for source in self._sources[kind][target]}
        return [source for source, things in shown.items() if len(things) > (base in things)]

    def _editing(self, draw: "_Draw", target: int) -> Item:
        source = draw.rng.choice(self._sources[draw.kind][target])
        value = value_phrase(draw.kind, self.things[target], self.styles[target])
        if draw.kind == "hour" and draw.split == "train" and draw.rng.random() < 0.5:
            value = hour_phrase(value)
        user = Picture((source,)), draw.word(INSTRUCTIONS[draw.kind]).format(value)
        return Item("editing", draw.kind, (target,), user, (Picture((target,)),))

    def _analogy(self, draw: "_Draw", target: int) -> Item:
        source = draw.rng.choice(self._analogies(draw.kind, target))
        things = self._changes[draw.kind][self._change(draw.kind, source, target)]
        thing = draw.rng.choice([thing for thing in things if thing != self._base(draw.kind, target)])
        before, after = draw.rng.choice(things[thing])
        user = *(Picture((row,)) for row in (before, after, source)), draw.word(ANALOGIES)
        return Item("analogy", draw.kind, (target,), user, (Picture((target,)),))

    # Reasoning first, and the same without

    @cached_property
    def _tagged(self) -> list[int]:
        """Pictures that their tags and style name: tags are of a thing, whatever its skin tone, and of no other."""
        names: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for name, tags in zip(self.names, self.tags):
            names[tuple(tags)].add(name.partition(":")[0])
        return [
            row
            for row, tags in enumerate(self.tags)
            if len(tags) > 1 and len(names[tuple(tags)]) == 1 and self.things[row]["tone"] is None
        ]

    def _from_tags(self, draw: "_Draw", row: int) -> Item:
        user = self._fill(TAGS, row, tags=", ".join(self._drawn_tags(draw, row)))
        return Item("tags", "", (row,), (user,), (Picture((row,)),))

    def _reasoning(self, draw: "_Draw", row: int) -> Item:
        tags = self._drawn_tags(draw, row)
        user = self._fill(THINKING, row, tags=", ".join(tags))
        return Item(
            "reasoning", "", (row,), (user,), (self._fill(THOUGHT, row, tags=list_of(tags[:2])), Picture((row,)))
        )

    def _drawn_tags(self, draw: "_Draw", row: int) -> list[str]:
        """The first tags, or in training some."""
        tags = self.tags[row]
        return tags[:MAX_TAGS] if draw.split != "train" else draw.rng.sample(tags, min(len(tags), MAX_TAGS))

    # Several pictures

    def _runs(self, kind: str) -> Iterator[tuple[int, ...]]:
        """Rows of consecutive values of an attribute, of one thing in one style."""
        step = 2 if kind == "hour" else 1  # full hours, or half hours
        order = {value: place for place, value in enumerate(VALUES[kind])}
        groups: dict[tuple, dict[int, int]] = defaultdict(dict)
        for row, (thing, style) in enumerate(zip(self.things, self.styles)):
            if thing[kind] and row not in self.ambiguous:
                groups[style, thing.without(kind)][order[thing[kind]]] = row
        for rows in groups.values():
            for first in sorted(rows):
                for length in FRAMES:
                    places = [first + step * frame for frame in range(length)]
                    if kind in CYCLIC:
                        places = [place % len(order) for place in places]
                    if all(place in rows for place in places):
                        yield tuple(rows[place] for place in places)

    def _sequence(self, draw: "_Draw", run: tuple[int, ...]) -> Item:
        first, last = self.names[run[0]], self.names[run[-1]]
        user = SEQUENCES[draw.kind].format(first=first, last=last, style=self.styles[run[0]])
        return Item("sequence", draw.kind, run, (user,), tuple(Picture((row,)) for row in run))

    @cached_property
    def _countable(self) -> list[int]:
        return [row for row, thing in enumerate(self.things) if is_countable(thing)]

    def _arrangement(self, draw: "_Draw", target: int | tuple[int, ...]) -> Item:
        cells = target if isinstance(target, tuple) else self._with_neighbours(draw, target)
        nouns = [with_article(self.names[row]) for row in cells]
        several = {"count": NUMBERS[len(cells)], "plural": plural(self.names[cells[0]])}
        user = ARRANGEMENTS[draw.kind].format(*nouns, style=self.styles[cells[0]], **several)
        picture = Picture(cells, vertical=draw.kind in ("above", "below"))
        return Item("arrangement", draw.kind, cells, (user,), (picture,))

    def _with_neighbours(self, draw: "_Draw", target: int) -> tuple[int, ...]:
        """The target and one or two seen things of its style, in an order that belongs to the split."""
        style = self.styles[target]
        others = [
            row
            for row in self._countable
            if self.styles[row] == style and self.splits[row] == "train" and row != target
        ]
        for _ in range(10_000):
            cells = [target, *draw.rng.sample(others, 2 if draw.kind == "row" else 1)]
            draw.rng.shuffle(cells)
            if draw.part != SEEN or self._arrangement_split(cells) == draw.split:
                return tuple(cells)
        raise ValueError(f"nothing stands beside {self.names[target]}, {style}, in the split {draw.split}")


@dataclass(frozen=True)
class _Draw:
    """What one item is drawn with."""

    rng: random.Random
    split: str
    part: str
    kind: str
    wording: int

    def word(self, wordings: Sequence[str]) -> str:
        """The wording asked for, the canonical one being the first, or in training any."""
        return self.rng.choice(wordings) if self.split == "train" else wordings[self.wording]


@lru_cache(maxsize=64)
def _shuffled(name: str, count: int) -> list[int]:
    """The numbers below `count` in the order that belongs to a name."""
    return random.Random(name).sample(range(count), count)


def _one_of(what: str, value: str, known):
    """`known[value]`, or a ValueError."""
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return known[value] if isinstance(known, dict) else value


def _check(task: str, kind: str, split: str, part: str) -> None:
    _one_of(f"the kind of {task}", kind, _one_of("task", task, KINDS))
    _one_of("split", split, ("train", "dev", "test"))
    _one_of("part", part, (SEEN, PAIR, COMBINATION, NAME))
    if split == "train" and part != SEEN:
        raise ValueError(f"trainings see no {part} targets; part must be {SEEN!r} in the split 'train'")
