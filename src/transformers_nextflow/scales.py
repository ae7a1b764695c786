"""Scale schedules: the ordered grids, coarse to fine, on which an image is coded (NextFlow appendix A.1, table 14).

A schedule is named by its final grid, because no two schedules of a table may share one. A table row lists every scale
up to the highest level; lower levels are prefixes of the row.
"""

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.resources import files
from itertools import accumulate
from math import log

from transformers.utils import logging

logger = logging.get_logger(__name__)

Grid = tuple[int, int]  # (height, width) in cells


def pair_of(grid: Sequence[int]) -> Grid:
    """A grid of Python's, NumPy's or torch's integers; raises `ValueError` for anything else."""
    try:
        height, width = map(operator.index, grid)
    except (TypeError, ValueError):
        raise ValueError(f"a grid must be two integers, height and width, got {grid!r}") from None
    return height, width


@dataclass(frozen=True)
class ScaleSchedule:
    """The ordered grids of one image, coarse to fine.

    Args:
        grids: `(height, width)` of every scale; the first is `(1, 1)`.

    Raises:
        ValueError: if there is no scale, the first is not `(1, 1)`, an edge is no integer, or a grid shrinks from one
            scale to the next.
    """

    grids: tuple[Grid, ...]

    def __post_init__(self):
        given = [(h, w) for h, w in self.grids]
        if any(isinstance(edge, str) or edge % 1 != 0 for grid in given for edge in grid):  # infinity too
            raise ValueError(f"the edges of grids must be integers, got {given}")
        object.__setattr__(self, "grids", tuple((int(h), int(w)) for h, w in given))
        if not self.grids or self.grids[0] != (1, 1):
            raise ValueError(f"a scale schedule begins with the grid (1, 1), got {self.grids}")
        for (h0, w0), (h1, w1) in zip(self.grids, self.grids[1:]):
            if h1 < h0 or w1 < w0:
                raise ValueError(f"grids must not shrink from one scale to the next, got {(h0, w0)} then {(h1, w1)}")

    def __len__(self) -> int:
        return len(self.grids)

    def __iter__(self) -> Iterator[Grid]:
        return iter(self.grids)

    def __getitem__(self, scale: int) -> Grid:
        return self.grids[scale]

    @property
    def final_grid(self) -> Grid:
        return self.grids[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Codes of the scales up to each one."""
        return tuple(accumulate(self.lengths))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each scale's first code among all codes of the image."""
        return (0, *self.ends[:-1])

    @property
    def num_codes(self) -> int:
        return self.ends[-1]

    def slice(self, scale: int) -> slice:
        """Where the codes of `scale` (0-based) stand among all codes of the image."""
        return slice(self.offsets[scale], self.ends[scale])

    def prefix(self, num_scales: int) -> "ScaleSchedule":
        """The first `num_scales` scales."""
        if not 1 <= num_scales <= len(self):
            raise ValueError(f"num_scales must be between 1 and {len(self)}, got {num_scales}")
        return ScaleSchedule(self.grids[:num_scales])

    def weights(self, alpha: float) -> tuple[float, ...]:
        """Loss weight of one code of each scale: `1 / (h * w) ** alpha`, normalised per image so that the weights of
        all its codes sum to the number of codes (NextFlow eq. 2: the total vision loss is kept constant)."""
        raw = [length**-alpha for length in self.lengths]
        norm = self.num_codes / sum(weight * length for weight, length in zip(raw, self.lengths))
        return tuple(weight * norm for weight in raw)


class ScheduleTable:
    """Every schedule a model knows, by final grid.

    Args:
        rows: the full-length schedules, one for each aspect ratio.
        levels: level name to number of scales, e.g. `{"256": 12, "512": 16, "1024": 18}`.
        patch_size: pixels along the edge of one cell of the final grid, a fraction where the grid does not divide the
            pictures.

    Raises:
        ValueError: if two schedules share a final grid, or a level asks for more scales than a row has.
    """

    def __init__(self, rows: Sequence[Sequence[Grid]], levels: Mapping[str, int], patch_size: int | Fraction):
        if not rows or not levels:
            raise ValueError("a schedule table needs at least one row and one level")
        self.patch_size = patch_size
        self.levels = dict(sorted(levels.items(), key=lambda item: item[1]))
        self._by_grid: dict[Grid, ScaleSchedule] = {}
        for row in rows:
            full = ScaleSchedule(tuple((height, width) for height, width in row))
            for num_scales in self.levels.values():
                schedule = full.prefix(num_scales)
                if schedule.final_grid in self._by_grid:
                    raise ValueError(f"two schedules share the final grid {schedule.final_grid}")
                self._by_grid[schedule.final_grid] = schedule

    def __len__(self) -> int:
        return len(self._by_grid)

    def __iter__(self) -> Iterator[ScaleSchedule]:
        return iter(self._by_grid.values())

    @property
    def max_scales(self) -> int:
        return max(map(len, self))

    @cached_property
    def finest_edge(self) -> float:
        """`C` of NextFlow eq. 1: the edge, in cells, of a square with the largest final area (64 for table 14)."""
        return max(schedule.lengths[-1] for schedule in self) ** 0.5

    def by_grid(self, grid: Grid) -> ScaleSchedule:
        """The schedule that ends in `grid`."""
        grid = pair_of(grid)
        if grid not in self._by_grid:
            nearest = ", ".join(map(str, self._nearest(grid)))
            raise ValueError(f"no scale schedule ends in the grid {grid}; nearest: {nearest}")
        return self._by_grid[grid]

    def by_size(self, height: int, width: int, exact: bool = True) -> ScaleSchedule:
        """The schedule of an image of `height` x `width` pixels; unless `exact`, the nearest if there is none, with a
        warning."""
        grid = (height // self.patch_size, width // self.patch_size)
        if height % self.patch_size == 0 and width % self.patch_size == 0 and grid in self._by_grid:
            return self._by_grid[grid]
        nearest = self._nearest((height, width), self.patch_size)
        sizes = ["{}x{}".format(*self.image_size(self.by_grid(known))) for known in nearest]
        _say_missing(f"for an image of {height}x{width} (height x width)", sizes, exact)
        return self.by_grid(nearest[0])

    def by_aspect_ratio(
        self, aspect_ratio: str = "1:1", level: str | int | None = None, exact: bool = True
    ) -> ScaleSchedule:
        """The schedule of an aspect ratio `"width:height"` at `level` (default: the highest); unless `exact`, the
        nearest if there is none, with a warning.

        The final grids decide, not table 14's labels, which read height:width and disagree with the grids in places.
        """
        schedules = {Fraction(*schedule.final_grid[::-1]): schedule for schedule in self.of_level(level)}
        try:
            width, height = (int(part) for part in str(aspect_ratio).split(":"))
            ratio = Fraction(width, height)
            if width <= 0 or height <= 0:
                raise ValueError
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'aspect_ratio must read "width:height", e.g. "1:1", got {aspect_ratio!r}') from None
        if ratio in schedules:
            return schedules[ratio]
        near = sorted(schedules, key=lambda known: abs(log(known) - log(width) + log(height)))[:4]
        names = [f"{r.numerator}:{r.denominator}" for r in near]
        _say_missing(f"has the aspect ratio {aspect_ratio} (width:height)", names, exact)
        return schedules[near[0]]

    def of_level(self, level: str | int | None = None) -> list[ScaleSchedule]:
        """All schedules of a level (default: the highest)."""
        num_scales = self.levels[self.level_name(level)]
        return [schedule for schedule in self if len(schedule) == num_scales]

    def level_name(self, level: str | int | None = None) -> str:
        """Of a level (default: the highest).

        Raises:
            ValueError: if there is no such level.
        """
        name = list(self.levels)[-1] if level is None else str(level)
        if name not in self.levels:
            raise ValueError(f"level must be one of {', '.join(self.levels)}, got {name}")
        return name

    def level_of(self, grid: Grid) -> str:
        """Name of the level whose schedules include the final grid `grid`."""
        return {num_scales: level for level, num_scales in self.levels.items()}[len(self.by_grid(grid))]

    def nearest_to_image(self, height: int, width: int, level: str | int | None = None) -> ScaleSchedule:
        """The schedule of `level` whose aspect ratio is nearest to that of an image to be resized and cropped."""
        if height < 1 or width < 1:
            raise ValueError(f"an image has at least one pixel, got {height}x{width}")
        return min(self.of_level(level), key=lambda s: abs(log(s.final_grid[0] / s.final_grid[1] * width / height)))

    def image_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """(height, width) in pixels of an image coded by `schedule`."""
        height, width = schedule.final_grid
        return int(height * self.patch_size), int(width * self.patch_size)

    def _nearest(self, size: tuple[float, float], cell: int | Fraction = 1) -> list[Grid]:
        """The final grids nearest to a (height, width) in pixels of which `cell` are one cell."""
        # logarithms, because a quotient overflows where an integer is very long
        height, width = (log(max(length, cell / 2)) for length in size)

        def distance(known: Grid) -> float:
            """Of areas and, twice as much, of aspect ratios: a size beyond all of them is still tall or wide."""
            rows, columns = log(known[0] * cell) - height, log(known[1] * cell) - width
            return abs(rows + columns) + 2 * abs(rows - columns)

        return sorted(self._by_grid, key=distance)[:3]


def _say_missing(what: str, nearest: Sequence[str], exact: bool) -> None:
    """That there is no schedule `what`: an error that names the nearest ones, or unless `exact` a warning that
    names the one taken."""
    missing = f"no scale schedule {what}; nearest: "
    if exact:
        raise ValueError(missing + ", ".join(nearest))
    logger.warning_once(missing + nearest[0])


@lru_cache(maxsize=1)
def paper_schedules() -> tuple[tuple[Grid, ...], ...]:
    """Table 14: 41 aspect ratios of 18 scales; 12, 16 and 18 scales are the 256-, 512- and 1024-level."""
    table = json.loads(files(__package__).joinpath("scale_schedules.json").read_text())
    return tuple(tuple(map(tuple, row["scales"])) for row in table["schedules"])


PAPER_LEVELS = {"256": 12, "512": 16, "1024": 18}


def schedule_table(
    rows: Sequence | None, levels: Mapping[str, int] | None, patch_size: int | Fraction, image_size: int | None = None
) -> ScheduleTable:
    """The table of a configuration, in which `None` means table 14.

    Args:
        image_size: edge of the pictures of the only schedule, where it is not the grid's times `patch_size`.
    """
    if image_size is not None:
        patch_size = Fraction(image_size, rows[0][-1][0])
    rows = paper_schedules() if not rows else tuple(tuple(map(tuple, row)) for row in rows)
    return _table(rows, tuple((levels or PAPER_LEVELS).items()), patch_size)


@lru_cache(maxsize=16)
def _table(rows: tuple, levels: tuple, patch_size: int | Fraction) -> ScheduleTable:
    return ScheduleTable(rows, dict(levels), patch_size)
