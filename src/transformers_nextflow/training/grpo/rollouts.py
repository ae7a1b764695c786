"""Prompts to sampled pictures, and the tensors that training needs of them.

Shape suffixes: B pictures, T the most tokens of a text before a picture, n codes of the scale prefix, A what is
optimised of these: T, n, or T + n; V codebook size, or text rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.utils.rnn import pad_sequence

from ...generation_nextflow import NextFlowGenerationMixin
from ...image_generation import LIMITS
from ...processing_nextflow import NextFlowProcessor
from ...sampling import per_scale
from ...scales import ScaleSchedule
from .config import PER_SCALE, NextFlowGRPOConfig
from .objective import code_logps, guided_logits, sampling_support
from .prompts import seed_of
from .texts import text_logps, write_texts

TEXT = 1  # among the parts of a seed


@dataclass
class Rollouts:
    """A batch of sampled prefixes; every tensor has B rows, so that batches are cut by row.

    Attributes:
        input_ids, attention_mask: (B, L) prompts, texts, `<boi>` and the slots of the prefix, padded on the left.
        null_input_ids, null_attention_mask: the same of the null prompts, where their log-probabilities count.
        condition_codes, condition_grids: (B, C) and (B, N, 2), -1 and 0 where a row has fewer; of the prompts' images.
        codes: (B, n).
        sampling_logps: (B, A) under the distribution that was sampled from.
        support, text_support: (B, n, V) and (B, T, V) bool, codes and tokens that could be drawn, where filters count.
        text_mask: (B, T) bool, which of the T tokens up to `<boi>` were sampled; where texts are.
        advantages: (B,).
        old_logps, ref_logps: (B, A), where they count.
        token_mask: (B, n) bool, codes that are optimised; default all.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    condition_codes: torch.Tensor
    condition_grids: torch.Tensor
    codes: torch.Tensor
    sampling_logps: torch.Tensor
    null_input_ids: torch.Tensor | None = None
    null_attention_mask: torch.Tensor | None = None
    support: torch.Tensor | None = None
    text_support: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def rows(self, rows: slice) -> "Rollouts":
        return Rollouts(**{name: value[rows] for name, value in self.tensors().items()})

    @property
    def num_slots(self) -> int:
        return self.codes.shape[1] - 1

    @property
    def text_ids(self) -> torch.Tensor:
        """(B, T) the tokens up to `<boi>`; some rows' texts begin later, see `text_mask`."""
        end = self.input_ids.shape[1] - self.num_slots
        return self.input_ids[:, end - self.text_mask.shape[1] : end]

    def texts(self) -> list[list[int]]:
        """Each row's sampled tokens without `<boi>`."""
        boi = self.input_ids[0, self.input_ids.shape[1] - self.num_slots - 1]
        return [row[kept & (row != boi)].tolist() for row, kept in zip(self.text_ids, self.text_mask)]


@dataclass(frozen=True)
class PrefixControls:
    """How the codes of a prefix are sampled; the lists have one value for each of its scales."""

    guidance_scale: list[float]
    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    lengths: tuple[int, ...]

    @classmethod
    def create(cls, args: NextFlowGRPOConfig, prefix: ScaleSchedule, schedule: ScaleSchedule) -> "PrefixControls":
        """The first of what `args` says of the scales of a `schedule`.

        Raises:
            ValueError: for a value out of range, another number of values than scales, or a temperature of the prefix
                that is not positive.
        """
        values: list = [
            per_scale(name, getattr(args, name), len(schedule), *LIMITS[name])[: len(prefix)] for name in PER_SCALE
        ]
        controls = cls(*values, lengths=tuple(prefix.lengths))
        if not min(controls.temperature) > 0:
            raise ValueError(f"temperature must be positive, what is optimised is sampled; got {args.temperature}")
        return controls

    @property
    def is_guided(self) -> bool:
        return any(value != 1.0 for value in self.guidance_scale)

    @property
    def is_filtered(self) -> bool:
        return any(self.top_k) or min(self.top_p) < 1.0

    def temperatures(self, device: torch.device) -> torch.Tensor:
        """(n,) of every code."""
        return torch.tensor(self.temperature, device=device).repeat_interleave(
            torch.tensor(self.lengths, device=device)
        )


@torch.no_grad()
def roll_out(
    model: NextFlowGenerationMixin,
    processor: NextFlowProcessor,
    conversations: Sequence[list[dict]],
    num_pictures: int,
    seeds: Sequence[int],
    prefix: ScaleSchedule,
    schedule: ScaleSchedule,
    args: NextFlowGRPOConfig,
    shared: Rollouts | None = None,
) -> tuple[Rollouts, torch.Tensor]:
    """Sample `num_pictures` for each prompt, which is read once; each after a text of its own, where texts are
    optimised.

    Args:
        seeds: of the pictures, prompt by prompt; a picture depends on its own alone.
        shared: rollouts, one for each prompt, whose texts and prefixes the pictures share.

    Returns:
        the rollouts without advantages, and the (B, codes) codes of whole pictures.
    """
    device, config = model.device, model.config
    height, width = model.model.schedules.image_size(schedule)
    inputs = processor.apply_chat_template(list(conversations), generation_mode="image").to(device)
    controls = PrefixControls.create(args, prefix, schedule)
    condition_codes, condition_grids = _conditions(model, inputs)
    texts = None
    if args.optimize != "image":
        inputs = {name: inputs[name] for name in inputs if name.endswith(("input_ids", "attention_mask"))}
        if shared is None:  # rows part at the first token
            rows = torch.arange(len(conversations), device=device).repeat_interleave(num_pictures)
            inputs = {name: value[rows] for name, value in inputs.items()}
            condition_codes, condition_grids = condition_codes[rows], condition_grids[rows]
            num_pictures = 1
        images = _flat_images(condition_codes, condition_grids)
        if shared is None:
            text_seeds = [seed_of(seed, TEXT) for seed in seeds]
            texts = write_texts(model, inputs["input_ids"], inputs["attention_mask"], images, text_seeds, args)
            inputs |= {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}
        else:
            end = shared.input_ids.shape[1] - shared.num_slots
            inputs |= {name: getattr(shared, name)[:, :end] for name in ("input_ids", "attention_mask")}
        inputs |= images
    output = model.generate(
        **inputs,
        generation_mode="image",
        **{name: getattr(args, name) for name in PER_SCALE},
        image_guidance_scale=1.0,
        refine_top_k=[],
        height=height,
        width=width,
        num_images_per_prompt=num_pictures,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        forced_codes=None if shared is None else shared.codes,
        output_logits=len(prefix),
        return_dict_in_generate=True,
    )
    whole = output.sequences - config.text_vocab_size
    codes = whole[:, : prefix.num_codes]
    behaves = args.logprob_mode == "behaviour"
    support = None
    if controls.is_filtered:
        support = sampling_support(output.logits, controls.temperature, controls.top_k, controls.top_p)
    logits = torch.cat(output.logits, dim=1)
    sampling_logps, _ = code_logps(logits, codes, controls.temperatures(device), support)
    if texts is not None:
        sampling_logps = torch.cat([texts.logps, sampling_logps], dim=1) if args.optimize == "both" else texts.logps

    def opened(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots = ids.new_full((len(ids), prefix.num_codes - 1), config.image_token_id)
        rows = torch.cat([ids, slots], dim=1), torch.cat([mask, torch.ones_like(slots)], dim=1)
        return tuple(each.repeat_interleave(num_pictures, dim=0) for each in rows)

    ids, mask = opened(inputs["input_ids"], inputs["attention_mask"])
    rollouts = Rollouts(
        input_ids=ids,
        attention_mask=mask,
        condition_codes=condition_codes.repeat_interleave(num_pictures, dim=0),
        condition_grids=condition_grids.repeat_interleave(num_pictures, dim=0),
        codes=codes,
        sampling_logps=sampling_logps,
        support=support if behaves else None,
        text_support=texts.support if behaves and texts is not None else None,
        text_mask=None if texts is None else texts.sampled,
    )
    if behaves and controls.is_guided:
        null = opened(inputs["negative_input_ids"], inputs["negative_attention_mask"])
        rollouts.null_input_ids, rollouts.null_attention_mask = null
    return rollouts, whole


def _conditions(model, inputs: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and grids of each prompt's images, padded to (prompts, C) and (prompts, N, 2)."""
    ids, device = inputs["input_ids"], model.device
    counts = ((ids == model.config.boi_token_id).sum(dim=1) - 1).tolist()  # the last <boi> is the picture's to draw
    none = torch.empty(0, dtype=torch.long, device=device)
    if not any(counts):
        return none.expand(len(ids), 0), none[:, None].expand(len(ids), 0, 2)
    grids = inputs["image_grid_hw"]
    codes = iter(model.model.encode_images(inputs["pixel_values"], grids.tolist()))
    rows = [torch.cat([none, *(next(codes) for _ in range(count))]) for count in counts]
    return pad_sequence(rows, True, -1), pad_sequence(grids.split(counts), True, 0)


def rollout_logps(
    model, rollouts: Rollouts, prefix: ScaleSchedule, schedule: ScaleSchedule, args: NextFlowGRPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) log-probabilities of what `args.optimize` names of the rollouts, and their entropies, teacher-forced by
    one forward that ends with it; in the mode that `args.logprob_mode` says. Both are 0 where no token was sampled."""
    parts: list = []
    controls = PrefixControls.create(args, prefix, schedule)
    text_logits, logits = _logits(model, rollouts, rollouts.input_ids, rollouts.attention_mask, schedule, args)
    if args.optimize != "image":
        config = extract_model_from_parallel(model).config
        settings = args.text_temperature, config, rollouts.text_support
        of_text = text_logps(text_logits, rollouts.text_ids, *settings)
        parts.append([values.where(rollouts.text_mask, 0.0) for values in of_text])
    if args.optimize != "text":
        if rollouts.null_input_ids is not None:
            null = rollouts.null_input_ids, rollouts.null_attention_mask
            _, null_logits = _logits(model, rollouts, *null, schedule, args, with_text=False)
            logits = guided_logits(torch.cat([logits, null_logits]), controls.guidance_scale, prefix)
        parts.append(code_logps(logits, rollouts.codes, controls.temperatures(logits.device), rollouts.support))
    logps, entropies = (torch.cat(values, dim=1) for values in zip(*parts))
    return logps, entropies


@torch.no_grad()
def level_difference(
    model,
    rollouts: Rollouts,
    prefix: ScaleSchedule,
    schedule: ScaleSchedule,
    other: ScaleSchedule,
    args: NextFlowGRPOConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the policy of a prefix depends on the level: p of pictures of `schedule`, q of `other` with the same
    first scales. Positions and features of these scales are the same; what differs is the embedding of how
    many scales the picture has.

    Returns:
        (m,) means of |log p - log q| of the rollouts' codes over the codes of each scale, and (m,) means of
        KL(p || q) of whole distributions; conditional, under the temperature.
    """
    rows = rollouts.input_ids, rollouts.attention_mask
    temperature_n1 = PrefixControls.create(args, prefix, schedule).temperatures(rollouts.codes.device)[:, None]
    logps_BnV = [
        (_logits(model, rollouts, *rows, level, args, with_text=False)[1].float() / temperature_n1).log_softmax(-1)
        for level in (schedule, other)
    ]
    own, others = (logps.gather(-1, rollouts.codes[..., None]).squeeze(-1) for logps in logps_BnV)
    kl_Bn = (logps_BnV[0].exp() * (logps_BnV[0] - logps_BnV[1])).sum(-1)
    by_scale = lambda values: torch.stack([p.mean() for p in values.split(list(prefix.lengths), dim=1)])  # noqa: E731
    return by_scale((own - others).abs()), by_scale(kl_Bn)


def _flat_images(
    condition_codes: torch.Tensor,
    condition_grids: torch.Tensor,
    codes: torch.Tensor | None = None,
    schedule: ScaleSchedule | None = None,
) -> dict[str, torch.Tensor]:
    """The model's `image_codes` and `image_grid_hw` of padded rows; with `schedule`, of a picture after each row's
    images, whose `codes` so far are given where they are inputs."""
    flat_codes, flat_grids = [], []
    for row, (condition, grids) in enumerate(zip(condition_codes, condition_grids)):
        flat_codes.append(condition[condition >= 0])
        flat_grids += [grid for grid in grids.tolist() if grid[0]]
        if schedule is not None:
            flat_grids.append(list(schedule.final_grid))
        if codes is not None:
            flat_codes.append(codes[row])
    flat_codes = torch.cat(flat_codes)
    images = {"image_codes": flat_codes} if len(flat_codes) else {}
    if flat_grids:
        images["image_grid_hw"] = torch.tensor(flat_grids, device=condition_codes.device)
    return images


def _logits(
    model, rollouts: Rollouts, input_ids, attention_mask, schedule, args, with_text: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(B, T, V) text logits and (B, n, V) code logits. A token is predicted where the one before it stands, `<boi>`
    predicts the first scale, each block its own: the last T + n positions count."""
    num_codes = rollouts.codes.shape[1]
    num_tokens = rollouts.text_mask.shape[1] if with_text and args.optimize != "image" else 0
    conditions = rollouts.condition_codes, rollouts.condition_grids
    if args.optimize == "text":  # the picture is left out with its `<boi>`
        input_ids, attention_mask = input_ids[:, :-num_codes], attention_mask[:, :-num_codes]
        images, over, kept = _flat_images(*conditions), "text", num_tokens
    else:
        # a picture of one scale is still open, its codes are no input
        images = _flat_images(*conditions, rollouts.codes if rollouts.num_slots else None, schedule)
        over, kept = "all" if num_tokens else "codes", num_tokens + num_codes
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        **images,
        logits_over=over,
        logits_to_keep=kept,
        use_cache=False,
        return_dict=True,
    ).logits
    if over == "text":
        return logits, None
    if over == "codes":
        return None, logits
    codes_at = extract_model_from_parallel(model).config.text_vocab_size
    return logits[:, :num_tokens, :codes_at], logits[:, num_tokens:, codes_at:]
