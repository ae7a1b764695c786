"""Prompts to sampled pictures, and the tensors that training needs of them.

Shape suffixes: B pictures, n codes of the scale prefix, V codebook size.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from PIL import Image

from ...generation_nextflow import NextFlowGenerationMixin
from ...processing_nextflow import NextFlowProcessor
from ...scales import ScaleSchedule
from .config import NextFlowGRPOConfig
from .objective import code_logps, guided_logits, sampling_support


@dataclass
class Rollouts:
    """A batch of sampled prefixes; every tensor has B rows, so that batches are cut by row.

    Attributes:
        input_ids, attention_mask: (B, L) prompts, `<boi>` and the slots of the prefix, padded on the left.
        null_input_ids, null_attention_mask: the same of the null prompts, where their log-probabilities count.
        condition_codes, condition_grids: (B, C) and (B, N, 2), -1 and 0 where a row has fewer; of the prompts' images.
        codes: (B, n).
        sampling_logps: (B, n) under the distribution that was sampled from.
        support: (B, n, V) bool, codes that could be drawn, where they count.
        advantages: (B,).
        old_logps, ref_logps: (B, n), where they count.
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


def with_images(prompt, images: Sequence[Image.Image] | None, where: str) -> list[dict]:
    """A prompt as messages with their pictures in them, TRL's way: pictures fill the image items in order, or go
    before the first user message where there are none.

    Raises:
        ValueError: if pictures and image items differ in number, or a picture is missing.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
    images = list(images or [])
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        message["content"] = [dict(item) for item in message["content"]]
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    empty = [item for item in items if not any(item.get(key) is not None for key in ("image", "path", "url"))]
    if not items and images:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        empty = [{"type": "image"} for _ in images]
        first["content"] = empty + first["content"]
    if len(empty) != len(images) or any(image is None for image in images):
        raise ValueError(
            f"{where} has {len(empty)} places for images, and {sum(i is not None for i in images)} images"
        )
    for item, image in zip(empty, images):
        item["image"] = image
    return messages


def seed_of(*parts: int) -> int:
    """A seed of 32 bits from numbers."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:4], "big")


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
    forced_codes: torch.Tensor | None = None,
) -> tuple[Rollouts, torch.Tensor]:
    """Sample `num_pictures` for each prompt, which is read once.

    Args:
        forced_codes: (prompts, n) codes of the prefix that the pictures share.

    Returns:
        the rollouts without advantages, and the (B, codes) codes of whole pictures.
    """
    device, config = model.device, model.config
    height, width = model.model.schedules.image_size(schedule)
    inputs = processor.apply_chat_template(list(conversations), generation_mode="image").to(device)
    controls = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    controls |= {"guidance_scale": args.guidance_scale, "image_guidance_scale": 1.0, "refine_top_k": []}
    output = model.generate_image(
        **inputs,
        **controls,
        height=height,
        width=width,
        num_images_per_prompt=num_pictures,
        seed=list(seeds),
        forced_codes=forced_codes,
        output_logits=len(prefix),
        return_dict_in_generate=True,
    )
    whole = output.sequences - config.text_vocab_size
    codes = whole[:, : prefix.num_codes]
    behaves = args.logprob_mode == "behaviour"
    per_scale = [[value] * len(prefix) for value in (args.temperature, args.top_k, args.top_p)]
    support = sampling_support(output.logits, *per_scale)
    temperature = torch.full((prefix.num_codes,), args.temperature, device=device)
    sampling_logps, _ = code_logps(torch.cat(output.logits, dim=1), codes, temperature, support)

    def opened(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots = ids.new_full((len(ids), prefix.num_codes - 1), config.image_token_id)
        rows = torch.cat([ids, slots], dim=1), torch.cat([mask, torch.ones_like(slots)], dim=1)
        return tuple(each.repeat_interleave(num_pictures, dim=0) for each in rows)

    condition_codes, condition_grids = _conditions(model, inputs)
    ids, mask = opened(inputs["input_ids"], inputs["attention_mask"])
    rollouts = Rollouts(
        input_ids=ids,
        attention_mask=mask,
        condition_codes=condition_codes.repeat_interleave(num_pictures, dim=0),
        condition_grids=condition_grids.repeat_interleave(num_pictures, dim=0),
        codes=codes,
        sampling_logps=sampling_logps,
        support=support if behaves else None,
    )
    if behaves and args.guidance_scale != 1.0:
        null = opened(inputs["negative_input_ids"], inputs["negative_attention_mask"])
        rollouts.null_input_ids, rollouts.null_attention_mask = null
    return rollouts, whole


def _conditions(model, inputs: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and grids of each prompt's images, padded to (prompts, C) and (prompts, N, 2)."""
    ids, device = inputs["input_ids"], model.device
    counts = ((ids == model.config.boi_token_id).sum(dim=1) - 1).tolist()  # the last <boi> is the picture's to draw
    if not any(counts):
        return torch.empty(len(ids), 0, dtype=torch.long, device=device), torch.empty(
            len(ids), 0, 2, dtype=torch.long, device=device
        )
    grids = inputs["image_grid_hw"]
    codes = model.model.encode_images(inputs["pixel_values"], grids.tolist())
    groups, rows = iter(zip(codes, grids)), []
    for count in counts:
        own = [next(groups) for _ in range(count)]
        rows.append((torch.cat([torch.empty(0, dtype=torch.long, device=device), *(each for each, _ in own)]), own))
    padded = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True, padding_value=-1)
    grid_rows = torch.zeros(len(ids), max(counts), 2, dtype=torch.long, device=device)
    for place, (_, own) in enumerate(rows):
        for number, (_, grid) in enumerate(own):
            grid_rows[place, number] = grid
    return padded, grid_rows


def prefix_logps(
    model, rollouts: Rollouts, prefix: ScaleSchedule, schedule: ScaleSchedule, args: NextFlowGRPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) log-probabilities of the rollouts' codes and their entropies, teacher-forced by one forward that ends
    with the prefix; in the mode that `args.logprob_mode` says."""
    logits = _logits(model, rollouts, rollouts.input_ids, rollouts.attention_mask, prefix, schedule)
    if rollouts.null_input_ids is not None:
        null = _logits(model, rollouts, rollouts.null_input_ids, rollouts.null_attention_mask, prefix, schedule)
        logits = guided_logits(torch.cat([logits, null]), [args.guidance_scale] * len(prefix), prefix)
    temperature = torch.full((prefix.num_codes,), args.temperature, device=logits.device)
    return code_logps(logits, rollouts.codes, temperature, rollouts.support)


def _logits(model, rollouts: Rollouts, input_ids, attention_mask, prefix, schedule) -> torch.Tensor:
    """(B, n, V) code logits. `<boi>` predicts the first scale, each block its own, so the last n positions count."""
    flat_codes, flat_grids = [], []
    for condition, grids, codes in zip(rollouts.condition_codes, rollouts.condition_grids, rollouts.codes):
        flat_codes.append(condition[condition >= 0])
        flat_grids += [grid for grid in grids.tolist() if grid[0]] + [list(schedule.final_grid)]
        if len(prefix) > 1:  # a picture of one scale is still open, its codes are no input
            flat_codes.append(codes)
    flat_codes = torch.cat(flat_codes)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_codes=flat_codes if len(flat_codes) else None,
        image_grid_hw=torch.tensor(flat_grids, device=input_ids.device),
        logits_over="codes",
        logits_to_keep=prefix.num_codes,
        use_cache=False,
    ).logits
