"""Guidance and sampling of the codes of one scale.

Shape suffixes: B rows, l codes of one scale, V codebook size.
"""

import hashlib
import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

import numpy as np
import torch

COLDEST = 1e-6
"""Temperatures below take the most likely, their limit: quotients by them overflow float32."""

# (lowest, highest, whether whole) of what text and pictures are sampled with, see `per_scale`
SAMPLING_LIMITS: dict[str, tuple] = {
    "temperature": (0.0, inf, False),
    "top_k": (0, inf, True),
    "top_p": (1e-6, 1.0, False),
}


def integer(name: str, value: int, low: int, high: float = inf) -> int:
    """`value` as an int, if it is one of Python's, NumPy's or torch's.

    Raises:
        ValueError: if it is none, or lies outside [low, high].
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        limits = f"at least {low}" if high == inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {limits}, got {number}")
    return number


def plain(value):
    """Numbers and lists of NumPy and torch as Python's."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def check_seed(seed: int) -> int:
    """A seed of torch's generators; raises `ValueError` for anything else."""
    return integer("seed", seed, -(2**63), 2**64 - 1)


@dataclass(frozen=True)
class OverScales:
    """Values over scales, of Python's, NumPy's or torch's numbers; a `GenerationConfig` saves them by `to_dict`."""

    def __post_init__(self):
        for entry in fields(self):
            object.__setattr__(self, entry.name, plain(getattr(self, entry.name)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LinearRamp(OverScales):
    """A value that grows linearly over the scales, from `start` at scale 1 to `end` at scale K."""

    start: float
    end: float

    def over(self, num_scales: int) -> list[float]:
        steps = max(num_scales - 1, 1)
        return [self.start + (self.end - self.start) * scale / steps for scale in range(num_scales)]


@dataclass(frozen=True)
class ScaleInterval(OverScales):
    """A value on the scales `first` to `last` (0-based, inclusive), and `outside` on the others.

    As a guidance scale it confines guidance to these scales. Null rows are run up to the last guided scale: before the
    first one they fill the cache that it reads, after the last one nothing needs them.
    """

    value: float
    first: int
    last: int
    outside: float = 1.0

    def over(self, num_scales: int) -> list[float]:
        for name in ("first", "last"):
            integer(f"{name} of an interval of scales", getattr(self, name), 0)
        if not self.first <= self.last < num_scales:
            raise ValueError(f"an interval of {num_scales} scales lies within 0 to {num_scales - 1}, got {self}")
        return [self.value if self.first <= scale <= self.last else self.outside for scale in range(num_scales)]


PerScale = float | int | Sequence[float] | LinearRamp | ScaleInterval


def per_scale(
    name: str, value: PerScale, num_scales: int, low: float, high: float = inf, whole: bool = False
) -> list[float]:
    """One value for each scale from a constant, a list, a ramp or an interval; with `whole` a ramp takes the nearest
    integers.

    Raises:
        ValueError: if a list has another length, or a value lies outside [low, high], is not finite, or with `whole`
            is no integer.
    """
    value = plain(value)
    if isinstance(value, LinearRamp | ScaleInterval):
        numbers = (value.start, value.end) if isinstance(value, LinearRamp) else (value.value, value.outside)
        per_scale(name, numbers, 2, low, high)
        values = value.over(num_scales)
        values = list(map(round, values)) if whole else values
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != num_scales:
            raise ValueError(f"{name} must have one value for each of the {num_scales} scales, got {len(values)}")
    else:
        values = [value] * num_scales
    for entry in values:
        # NaN fails the comparison; an integer may be longer than any float
        is_kind = type(entry) is int or (type(entry) is float and not whole)  # True is no number
        if not is_kind or not low <= entry <= high or (entry > sys.float_info.max and not whole):
            kind = "an integer" if whole else "a number"
            limits = f"of at least {low}" if high == inf else f"in [{low}, {high}]"
            raise ValueError(f"{name} must be {kind} {limits}, got {entry!r}")
    return values


def guide(
    logits_NlV: torch.Tensor, guidance_scale: float, image_guidance_scale: float = 1.0, num_contexts: int = 2
) -> torch.Tensor:
    """Combine the logits of a prompt, its null prompt, and the null prompt without images: (N, l, V) -> (B, l, V).

    One context: the prompt's. Two: `uncond + s * (cond - uncond)`. Three: text and images guide apart,
    `none + s_image * (uncond - none) + s * (cond - uncond)` (InstructPix2Pix, sec. 3.2).

    Args:
        logits_NlV: N = num_contexts * B rows, the prompts first.
    """
    conditional, *null = logits_NlV.chunk(num_contexts)
    if num_contexts == 1:
        return conditional
    if num_contexts == 2:
        return null[0] + guidance_scale * (conditional - null[0])
    unconditional, none = null
    return none + image_guidance_scale * (unconditional - none) + guidance_scale * (conditional - unconditional)


def sample(
    logits_BlV: torch.Tensor, temperature: float, top_k: int, top_p: float, uniform_Bl: torch.Tensor
) -> torch.Tensor:
    """Draw one code at every position: (B, l, V) -> (B, l) int64.

    Args:
        temperature: 0 takes the most likely code, and so does anything below [`COLDEST`].
        top_k: how many of the most likely codes may be drawn; 0 = all.
        top_p: the smallest set of most likely codes whose probability reaches this may be drawn; 1.0 = all.
        uniform_Bl: float32 numbers in [0, 1), one draw for each position.

    Raises:
        ValueError: if a position's logits are not finite (single codes may have -inf).
    """
    if temperature < COLDEST:
        top = logits_BlV.max(dim=-1)
        _check_finite(top.values)
        return top.indices
    logits_BlV = logits_BlV.float() / temperature
    if 0 < top_k < logits_BlV.shape[-1] or top_p < 1.0:
        indices, last, cumulative = kept_codes(logits_BlV, top_k, top_p)
        return indices.gather(-1, _draw(cumulative, cumulative.gather(-1, last), uniform_Bl)).squeeze(-1)
    # in the codes' own order, as sorting costs more than all the rest
    _check_finite(logits_BlV.amax(dim=-1))
    cumulative = logits_BlV.softmax(dim=-1).cumsum(dim=-1)
    return _draw(cumulative, cumulative[..., -1:], uniform_Bl).squeeze(-1)


def _draw(cumulative: torch.Tensor, mass: torch.Tensor, uniform_Bl: torch.Tensor) -> torch.Tensor:
    """(B, l, 1) the places that numbers in [0, 1) take of the first `mass` of cumulative probabilities."""
    # less than the mass also where rounded, as a float32 below 1 is at most 1 - 2^-24
    return torch.searchsorted(cumulative, uniform_Bl[..., None] * mass, right=True)


def kept_codes(logits_BlV: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What [`sample`] draws from, of logits divided by the temperature.

    Returns:
        (B, l, k) indices from the most likely on, (B, l, 1) the place of the last that may be drawn, and (B, l, k)
        cumulative probabilities among the `top_k`.
    """
    num_kept = min(top_k, logits_BlV.shape[-1]) if top_k else logits_BlV.shape[-1]
    kept = logits_BlV.float().topk(num_kept, dim=-1)
    _check_finite(kept.values[..., 0])
    probabilities = kept.values.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # the code that reaches top_p still belongs to the set; 1.0 is reached by rounding before the last
    belongs = (cumulative - probabilities < top_p) | (top_p == 1.0)
    last = belongs.sum(dim=-1, keepdim=True) - 1
    return kept.indices, last, cumulative


def _check_finite(largest_Bl: torch.Tensor) -> None:
    """NaN counts as the largest of its position."""
    if not largest_Bl.isfinite().all():
        raise ValueError(
            "the logits are not finite: the weights are damaged, or a guidance scale or temperature is out of range"
        )


@dataclass(frozen=True)
class RowGenerators:
    """One random stream for each row, so that a row draws the same in any batch."""

    generators: list[torch.Generator]

    @classmethod
    def create(
        cls,
        num_prompts: int,
        images_per_prompt: int,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> "RowGenerators":
        """Streams for prompts x images, prompt by prompt.

        A number as `seed` serves every prompt, a list has one for each; the first image of a prompt draws from the
        seed, the n-th from (seed, n), whatever the other rows are. A list of generators has one for each row; a single
        one is that of the first row and gives the others their seeds, as torch's global one does without either.
        """
        seeds, rows = plain(seed), num_prompts * images_per_prompt
        given = generator if isinstance(generator, Sequence) else [generator]
        if generator is not None and not all(isinstance(each, torch.Generator) for each in given):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if seed is not None and generator is not None:
            raise ValueError("give either seed or generator, not both")
        if isinstance(generator, Sequence):
            if len(generator) != rows:
                raise ValueError(f"a list of generators needs one for each of {rows} pictures, got {len(generator)}")
            return cls(list(generator))
        if seed is not None:
            is_list = isinstance(seeds, Sequence) and not isinstance(seeds, str)
            seeds = [check_seed(each) for each in (seeds if is_list else [seeds] * num_prompts)]
            if len(seeds) != num_prompts:
                raise ValueError(f"a list of seeds needs one for each of the {num_prompts} prompts, got {len(seeds)}")
            row_seeds = [_image_seed(prompt, index) for prompt in seeds for index in range(images_per_prompt)]
            return cls([torch.Generator().manual_seed(row_seed) for row_seed in row_seeds])
        first, source, device = [], None, "cpu"
        if generator is not None:  # which goes on by what the first row draws, as it would alone
            first, source, device = [generator], generator.clone_state(), generator.device
        row_seeds = torch.randint(2**32, (rows,), generator=source, device=device).tolist()
        return cls([*first, *(torch.Generator().manual_seed(row_seed) for row_seed in row_seeds[len(first) :])])

    def take(self, rows: Sequence[int]) -> "RowGenerators":
        """The streams of some rows, which go on where they are."""
        return RowGenerators([self.generators[row] for row in rows])

    def uniform(self, length: int, device: torch.device) -> torch.Tensor:
        """(rows, length) float32 in [0, 1), the next numbers of every row."""
        draws = [torch.rand(length, generator=own, device=own.device, dtype=torch.float) for own in self.generators]
        return torch.stack([draw.to(device) for draw in draws])


def _image_seed(seed: int, index: int) -> int:
    """The seed of a prompt's image `index`, of the 32 bits that torch's CPU generator reads."""
    if index == 0 and 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")
