"""Next-scale decoding (NextFlow sec. 2.2): `draw_scales` is the algorithm, what it is asked with stands around it.

Shape suffixes: B pictures, R rows (the prompts of all pictures, then their null prompts, then those without images),
l codes of one scale, D hidden, V codebook size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from transformers.utils import ModelOutput

from .contexts import Contexts
from .image_codes import num_scales_of
from .image_generation import ImageControls
from .layout import check_integers, check_range
from .lora import using_adapters
from .sampling import RowGenerators, guide, sample
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration

LOGITS_OF_WEIGHTS = 0.5
"""Logits of all rows that are computed and sampled from in one go, over the code head's weights: so they take little
memory beside it, and reading the weights again for the next ones costs little beside the product."""


@dataclass
class NextFlowOutputWithPictures(ModelOutput):
    """What came of a call that draws; see its subclasses. A copy, or one that was pickled, is without the model and
    what it has read."""

    _decode: ClassVar[Callable[[], list[torch.Tensor]] | None] = None  # set on each output, but no field of it

    def decode(self) -> list[torch.Tensor]:
        """Its pictures, (3, H, W) float32 in [-1, 1]; raises `ValueError` for a copy."""
        if self._decode is None:
            raise ValueError("this output is a copy without its model: call `model.decode_images` with its codes")
        return self._decode()

    def __reduce__(self):
        make, values, *_ = super().__reduce__()
        return make, tuple(None if isinstance(value, Contexts) else value for value in values)


class Forced(NamedTuple):
    """Codes that pictures must have.

    Attributes:
        codes, mask: (B, codes of the first scales) codes, and where they are forced.
    """

    codes: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of_call(
        cls, codes, mask, num_prompts: int, schedule: ScaleSchedule, codebook_size: int, device: torch.device
    ) -> "Forced":
        """From what a user gives.

        Raises:
            ValueError: for codes that are none, or not of whole scales, and masks of other shapes.
        """
        check_integers("forced_codes", codes, 2)
        if len(codes) != num_prompts:
            raise ValueError(f"forced_codes must have the shape ({num_prompts}, codes), got {tuple(codes.shape)}")
        num_scales_of(codes, schedule)
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
        if not isinstance(mask, torch.Tensor):
            raise ValueError(f"forced_mask must be a tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.shape not in (codes.shape, codes.shape[1:]):
            raise ValueError(
                f"forced_mask must be bool of the shape {tuple(codes.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask.to(codes.device).expand_as(codes)
        check_range("forced_codes", codes[mask], codebook_size, "; they are codes, without the text rows")
        return cls(codes.to(device), mask.to(device))

    def repeat(self, count: int) -> "Forced":
        return Forced(*(tensor.repeat_interleave(count, dim=0) for tensor in self))

    def num_scales(self, schedule: ScaleSchedule) -> int:
        """How many of the first scales are forced as a whole."""
        free = (~self.mask).any(dim=0).nonzero().flatten().tolist()
        reach = min([*free, self.codes.shape[1]])
        return sum(end <= reach for end in schedule.ends)


@dataclass
class Sampler:
    """Chooses the codes of a scale from what the rows have just read.

    A further pass of `refine_top_k` predicts a scale again from that scale's own codes, in place of the previous
    scale's (TokenFlow's sampling in several steps); later scales see the block as it was first read.

    Attributes:
        forced: codes to take as they are.
        num_logits: of how many first scales the guided logits of the last pass are kept in `logits`, (B, l, V)
            float32.
    """

    model: "NextFlowForConditionalGeneration"
    controls: ImageControls
    generators: RowGenerators
    forced: Forced | None = None
    num_logits: int = 0
    logits: list[torch.Tensor] = field(default_factory=list, init=False)

    def __call__(self, contexts: Contexts, codes_BL: torch.Tensor, scale: int) -> torch.Tensor:
        """(B, l) codes of a scale, after those of the scales before it."""
        codes_Bl, logits = self._draw(contexts, scale, self.controls.top_k[scale])
        refine_top_k = self.controls.refine_top_k if scale else ()
        for top_k in refine_top_k:
            codes_Bl, logits = self._draw(self._read_again(contexts, codes_BL, codes_Bl, scale), scale, top_k)
        if scale < self.num_logits:
            self.logits.append(torch.cat(logits, dim=1))
        return codes_Bl

    def take_forced(self, contexts: Contexts, codes_BL: torch.Tensor, scale: int) -> torch.Tensor:
        """As a call, for a scale that is forced as a whole: the pictures of a prompt are still one, and the random
        numbers go by, so that the others are drawn as if nothing was forced."""
        at = self.controls.schedule.slice(scale)
        codes_Bl = self.forced.codes[:, at]
        num_further = len(self.controls.refine_top_k) if scale else 0
        for _ in range(1 + num_further):
            self.generators.uniform(at.stop - at.start, torch.device("cpu"))
        if scale < self.num_logits:
            last = self._read_again(contexts, codes_BL, codes_Bl, scale) if num_further else contexts
            self.logits.append(torch.cat(list(self._predict(last, len(codes_BL), scale)), dim=1))
        return codes_Bl

    def _read_again(self, contexts: Contexts, codes_BL: torch.Tensor, codes_Bl: torch.Tensor, scale: int) -> Contexts:
        """The contexts as a further pass needs them, which have read the scale's own codes instead of its block."""
        again = contexts.take(range(len(contexts)))
        again.rewind(codes_Bl.shape[1])
        again.read_scale(torch.cat([codes_BL, codes_Bl], dim=1), self.controls.schedule, scale)
        return again

    def _draw(self, contexts: Contexts, scale: int, top_k: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One pass: (B, l) codes, and the logits if they are to be kept."""
        controls, at = self.controls, self.controls.schedule.slice(scale)
        uniform_Bl = self.generators.uniform(at.stop - at.start, contexts.hidden_RlD.device)
        codes, logits, start = [], [], 0
        for logits_BlV in self._predict(contexts, len(uniform_Bl), scale):
            uniform = uniform_Bl[:, start : start + logits_BlV.shape[1]]
            codes.append(sample(logits_BlV, controls.temperature[scale], top_k, controls.top_p[scale], uniform))
            start += logits_BlV.shape[1]
            if scale < self.num_logits:
                logits.append(logits_BlV)
        codes_Bl = torch.cat(codes, dim=1)
        if self.forced is not None and at.start < self.forced.codes.shape[1]:
            codes_Bl = torch.where(self.forced.mask[:, at], self.forced.codes[:, at], codes_Bl)
        return codes_Bl, logits

    def _predict(self, contexts: Contexts, num_pictures: int, scale: int) -> Iterable[torch.Tensor]:
        """The scale's guided logits (B, some positions, V) in float32."""
        controls, roles = self.controls, self.controls.num_roles(scale)
        hidden_RlD = contexts.hidden_RlD[: roles * num_pictures]
        adapters = contexts.adapters and contexts.adapters[: len(hidden_RlD)]
        positions = int(LOGITS_OF_WEIGHTS * hidden_RlD.shape[-1] / len(hidden_RlD))
        for hidden in hidden_RlD.split(max(positions, 1), dim=1):
            with using_adapters(self.model, adapters):
                logits_RlV = self.model.code_head(hidden).to(hidden.device, torch.float32)
            yield guide(logits_RlV, controls.guidance[scale], controls.image_guidance[scale], roles)


def draw_scales(
    contexts: Contexts,
    controls: ImageControls,
    choose: Callable[[Contexts, torch.Tensor, int], torch.Tensor],
    scales: range,
    codes_BL: torch.Tensor,
    tell: Callable[[torch.Tensor, int], None],
    keep_contexts: bool = False,
) -> tuple[Contexts, torch.Tensor]:
    """Draw some scales of pictures, and read the one that follows.

    Args:
        contexts: have just read `<boi>`, or the block of the first of `scales`.
        choose: gives (B, l) codes from the contexts, the codes so far and the scale.
        codes_BL: of the scales before.
        tell: called with the codes so far and the scale, see [`telling`].
        keep_contexts: whether all rows must hold the whole picture afterwards; if not, null rows stop after the last
            scale they guide, and of the last block, the longest, no keys and values are kept.

    Returns:
        the contexts, and the codes so far.
    """
    for scale in scales:
        codes_BL = torch.cat([codes_BL, choose(contexts, codes_BL, scale)], dim=1)
        tell(codes_BL, scale)
        if scale + 1 < len(controls.schedule):
            needed = controls.roles_from(scale + 1) * len(codes_BL)
            if needed < len(contexts) and not keep_contexts:
                contexts = contexts.take(range(needed))
            is_read_again = scale + 2 < len(controls.schedule) or keep_contexts or controls.refine_top_k
            contexts.read_scale(codes_BL, controls.schedule, scale + 1, keep=bool(is_read_again))
    return contexts, codes_BL


def telling(
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None, pictures: Sequence[Sequence[int]]
) -> Callable[[torch.Tensor, int], None]:
    """What tells `on_scale_end` of every picture; `pictures`: those of each row of codes."""

    def tell(codes_BL: torch.Tensor, scale: int) -> None:
        for so_far, numbers in zip(codes_BL, pictures):
            for number in numbers:
                on_scale_end(number, scale, so_far)

    return tell if on_scale_end is not None else lambda codes_BL, scale: None


def draw_pictures(
    sampler: Sampler,
    contexts: Contexts,
    count: int = 1,
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`count` pictures for each prompt, the rows of which have just read `<boi>`.

    Scales that are forced as a whole are read once for all pictures of a prompt; then the rows part, and so many
    pictures are drawn at once as memory takes (see [`pictures_at_once`]).

    Args:
        sampler: of all pictures, prompt by prompt; its `forced` codes of the prompts.
        on_scale_end: called with (picture, scale, (n,) codes so far).

    Returns:
        (B, codes) codes, and the logits that the sampler keeps.
    """
    controls, schedule = sampler.controls, sampler.controls.schedule
    num_prompts = len(sampler.generators.generators) // count
    forced = sampler.forced
    num_forced = forced.num_scales(schedule) if forced is not None else 0

    device = contexts.hidden_RlD.device
    numbers = torch.arange(num_prompts * count, device="cpu").view(num_prompts, count)
    codes_BL = torch.empty(num_prompts, 0, dtype=torch.long, device=device)
    tell = telling(on_scale_end, numbers.tolist())
    scales, rest = range(num_forced), range(num_forced, len(schedule))
    contexts, codes_BL = draw_scales(contexts, controls, sampler.take_forced, scales, codes_BL, tell)
    parts = numbers.split(pictures_at_once(contexts, schedule), dim=1)
    drawn, logits = [], []
    for part in parts:
        each = part.shape[1]
        some = replace(
            sampler,
            generators=sampler.generators.take(part.flatten().tolist()),
            forced=forced and forced.repeat(each),
        )
        of_part = contexts.take([row for row in range(len(contexts)) for _ in range(each)])
        tell = telling(on_scale_end, part.reshape(-1, 1).tolist())
        codes = codes_BL.repeat_interleave(each, dim=0)
        drawn.append(draw_scales(of_part, controls, some, rest, codes, tell)[1])
        logits.append([scale.repeat_interleave(each, dim=0) for scale in sampler.logits] + some.logits)
    order = torch.cat([part.flatten() for part in parts]).argsort().to(device)
    return torch.cat(drawn)[order], [torch.cat(scale)[order] for scale in zip(*logits)]


def pictures_at_once(contexts: Contexts, schedule: ScaleSchedule) -> int:
    """Of how many pictures for each prompt the caches take as much memory as the decoder's weights, or 1 GiB if that
    is more; at least 1."""
    weights = sum(each.numel() * each.element_size() for each in contexts.model.model.language_model.parameters())
    of_contexts = sum(
        x.numel() * x.element_size() * (1 + schedule.num_codes / x.shape[-2])
        for _, cache in contexts.groups
        for layer in cache.layers
        for x in (layer.keys, layer.values)
    )
    return max(int(max(weights, 2**30) / of_contexts), 1)
