"""How pictures are drawn: what a call says, over what the checkpoint says, over the defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from typing import Any, TypedDict

from .sampling import SAMPLING_LIMITS, LinearRamp, PerScale, ScaleInterval, integer, per_scale, plain
from .scales import Grid, ScaleSchedule, ScheduleTable

LIMITS: dict[str, tuple] = {"guidance_scale": (0.0,), "image_guidance_scale": (0.0,), **SAMPLING_LIMITS}

BY_RATIO, BY_PIXELS = ("aspect_ratio", "level"), ("height", "width")
"""The two ways to say a size."""


@dataclass(frozen=True)
class ImageControls:
    """How pictures are drawn; the lists have one value for each scale.

    Attributes:
        schedule: the pictures' scales.
        guidance, image_guidance: see [`guide`].
        temperature, top_k, top_p: see [`sample`].
        refine_top_k: top-k of one further pass over every scale but the first for each entry, see
            [`~transformers_nextflow.drawing.Sampler`].
    """

    schedule: ScaleSchedule
    guidance: list[float]
    image_guidance: list[float]
    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    refine_top_k: tuple[int, ...] = ()

    def num_roles(self, scale: int) -> int:
        """Which rows scale `scale` is predicted from: 1 = the prompts', 2 = and the null prompts', 3 = and those of
        the null prompts without their images."""
        if self.image_guidance[scale] != 1.0:
            return 3
        return 2 if self.guidance[scale] != 1.0 else 1

    def roles_from(self, scale: int) -> int:
        """Rows that this scale or a later one is predicted from."""
        return max(map(self.num_roles, range(scale, len(self.schedule))))


class ImageGenerationKwargs(TypedDict, total=False):
    """Keywords of `generate`; see [`ImageGenerationConfig`]."""

    guidance_scale: PerScale | None
    image_guidance_scale: PerScale | None
    temperature: PerScale | None
    top_k: PerScale | None
    top_p: PerScale | None
    refine_top_k: Sequence[int] | None
    aspect_ratio: str | None
    level: str | int | None
    height: int | None
    width: int | None
    exact_size: bool | None
    num_images_per_prompt: int | None


@dataclass(frozen=True)
class ImageGenerationConfig:
    """How pictures are drawn; saved with a checkpoint as `config.image_generation`.

    Open in the paper; TokenFlow samples with guidance 7.5 (a ramp), top-k 600 and top-p 0.6.

    Args:
        guidance_scale: `uncond + s * (cond - uncond)`; 1.0 everywhere is off.
        image_guidance_scale: guidance by the prompts' images, apart: `none + s_image * (uncond - none) +
            s * (cond - uncond)`, where `none` is the null prompt without its images; 1.0 everywhere is off.
        temperature, top_k, top_p: see [`sample`]. These five are a number (Python's, NumPy's or torch's), one per
            scale, a [`LinearRamp`] or a [`ScaleInterval`], which a file holds as a dict of their fields.
        refine_top_k: top-k of further passes, each of which predicts a scale (but the first) again from its own codes;
            TokenFlow samples with top-k 1200, then (100, 1).
        aspect_ratio, level: `"width:height"` (default: 1:1), and the name of a level of the scale schedules (default:
            the highest).
        height, width: in pixels, instead of these.
        exact_size: whether a size that no schedule has is an error. By default the nearest one is taken, and a
            warning names it.
        num_images_per_prompt: pictures for each prompt, next to each other in the output.

    Raises:
        ValueError: for values out of range, and sizes given by half or twice.
    """

    guidance_scale: PerScale = 3.0
    image_guidance_scale: PerScale = 1.0
    temperature: PerScale = 1.0
    top_k: PerScale = 0
    top_p: PerScale = 1.0
    refine_top_k: Sequence[int] = ()
    aspect_ratio: str | None = None
    level: str | int | None = None
    height: int | None = None
    width: int | None = None
    exact_size: bool = False
    num_images_per_prompt: int = 1

    def __post_init__(self):
        for entry in fields(self):
            value = plain(getattr(self, entry.name))
            if isinstance(value, Mapping):
                value = _of_scales(entry.name, value)
            object.__setattr__(self, entry.name, value)
        if isinstance(self.refine_top_k, str) or not isinstance(self.refine_top_k, Sequence):
            raise ValueError(f"refine_top_k must be a list of integers, got {self.refine_top_k!r}")
        object.__setattr__(self, "refine_top_k", list(self.refine_top_k))
        per_scale("refine_top_k", self.refine_top_k, len(self.refine_top_k), 0, inf, True)
        integer("num_images_per_prompt", self.num_images_per_prompt, 1)
        for name in LIMITS:
            value = getattr(self, name)
            if not isinstance(value, LinearRamp | ScaleInterval):
                per_scale(name, value, len(value) if isinstance(value, list) else 1, *LIMITS[name])
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give height and width both, got {self.height} and {self.width}")
        if self.height is not None:
            integer("height", self.height, 1)
            integer("width", self.width, 1)
            if self.aspect_ratio is not None or self.level is not None:
                said = {name: getattr(self, name) for name in (*BY_RATIO, *BY_PIXELS)}
                sizes = ", ".join(f"{name}={value!r}" for name, value in said.items() if value is not None)
                raise ValueError(f"give aspect_ratio and level, or height and width: {sizes}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def updated(self, **given: Any) -> "ImageGenerationConfig":
        """With what is given and not None. A size by pixels replaces one by ratio and level, and the other way."""
        known = self.to_dict().keys()
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"the controls of pictures do not include {', '.join(unknown)}, but {', '.join(known)}")
        given = {name: value for name, value in given.items() if value is not None}
        for names, others in ((BY_RATIO, BY_PIXELS), (BY_PIXELS, BY_RATIO)):
            if given.keys() & names:
                given = dict.fromkeys(others) | given
        return replace(self, **given)

    def schedule(self, table: ScheduleTable, pictures: Sequence[Grid | None] = (None,)) -> ScaleSchedule:
        """The schedule of the size asked for, or the nearest one.

        Args:
            pictures: of each prompt, the final grid of the picture whose size is to be kept, at `level` if there is
                one; `None` where there is none.

        Raises:
            ValueError: if they ask for several schedules, as prompts with and without pictures may.
        """
        schedules = {self._schedule_like(table, picture) for picture in pictures}
        if len(schedules) > 1:
            grids = sorted(schedule.final_grid for schedule in schedules)
            raise ValueError(f"the prompts' first images have different grids, {grids}: say height and width")
        return schedules.pop()

    def _schedule_like(self, table: ScheduleTable, picture: Grid | None) -> ScaleSchedule:
        if picture is not None:
            own = table.by_grid(picture)
            return own if self.level is None else table.nearest_to_image(*table.image_size(own), self.level)
        if self.height is not None:
            return table.by_size(self.height, self.width, self.exact_size)
        ratio = "1:1" if self.aspect_ratio is None else self.aspect_ratio
        return table.by_aspect_ratio(ratio, self.level, self.exact_size)

    def controls(self, schedule: ScaleSchedule) -> ImageControls:
        """One value for each scale."""
        values: list = [per_scale(name, getattr(self, name), len(schedule), *limit) for name, limit in LIMITS.items()]
        return ImageControls(schedule, *values, refine_top_k=tuple(self.refine_top_k))


def _of_scales(name: str, values: Mapping[str, Any]) -> LinearRamp | ScaleInterval:
    """As a file holds it."""
    for kind in (LinearRamp, ScaleInterval):
        if values.keys() == {entry.name for entry in fields(kind)}:
            return kind(**values)
    raise ValueError(f"{name} over the scales must have the fields of a LinearRamp or a ScaleInterval, got {values}")
