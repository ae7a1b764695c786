"""What is examined: a model, its processor, pictures, perhaps shards, and what several checks need of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..layout import num_image_slots
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQOutput
from ..scales import Grid, ScaleSchedule
from . import reference
from .pictures import Picture, draw, sizes

LOOKED_AT = 32
"""Prompts with pictures."""


@dataclass(frozen=True)
class Coded:
    """Pictures of one grid, as the vision tokenizer sees them.

    Attributes:
        pictures: whose they are.
        pixels: (B, 3, H, W) in [-1, 1].
        codes: (B, L).
        output: of the vision tokenizer's forward.
    """

    schedule: ScaleSchedule
    pictures: list[Picture]
    pixels: torch.Tensor
    codes: torch.Tensor
    output: NextFlowVQOutput


@dataclass(frozen=True)
class Sequence:
    """A prompt and the picture that answers it, one row, as the model's forward takes it.

    Attributes:
        inputs: of the forward.
        prompt: of `generate`: ids that end in `<boi>`, null prompt, condition images.
        codes: (1, L) of the answer.
        start: index of the answer's `<boi>`.
        targets: (L,) what the model is to predict, `codes` but where these are self-corrected.
    """

    inputs: dict[str, torch.Tensor]
    prompt: dict[str, torch.Tensor]
    codes: torch.Tensor
    schedule: ScaleSchedule
    start: int
    targets: torch.Tensor

    @property
    def outputs(self) -> slice:
        """Positions that predict the answer's codes, in order."""
        return slice(self.start, self.start + self.schedule.num_codes)


class Case:
    """A model under examination.

    Args:
        model, processor: as loaded, the model in eval mode.
        pictures: at least three of one size for means over pictures.
        packs: folder of training shards.
        text_source: the model whose text the checkpoint must have kept.
        seed: of everything drawn.
    """

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor,
        pictures: list[Picture],
        packs: Path | None = None,
        text_source: nn.Module | None = None,
        seed: int = 0,
    ):
        self.model, self.processor, self.pictures = model, processor, pictures
        self.packs, self.text_source, self.seed = packs, text_source, seed
        self.config, self.vq_model = model.config, model.model.vq_model
        self.images: dict[str, list] = {}  # rows of pictures for the report
        self.curves: dict[str, dict[str, list[float]]] = {}  # per scale, for the report

    @cached_property
    def codebook(self) -> torch.Tensor:
        return self.vq_model.quantizer().detach()

    @cached_property
    def groups(self) -> list[Coded]:
        """All pictures, by grid."""
        by_grid: dict[Grid, list[tuple[Picture, torch.Tensor]]] = {}
        for picture in self.pictures:
            grid, pixels = self.pixels_of(picture.image)
            by_grid.setdefault(grid, []).append((picture, pixels))
        groups = []
        for grid, members in by_grid.items():
            pixels = torch.cat([pixels for _, pixels in members])
            output = self.vq_forward(pixels)
            schedule = self.vq_model.schedules.by_grid(grid)
            pictures = [picture for picture, _ in members]
            groups.append(Coded(schedule, pictures, pixels, output.quantization.target_codes, output))
        return groups

    @torch.no_grad()
    def vq_forward(self, pixels: torch.Tensor) -> NextFlowVQOutput:
        return self.vq_model(pixels.float())

    def pixels_of(self, image) -> tuple[Grid, torch.Tensor]:
        """A picture as the processor gives it: final grid, and (1, 3, H, W) put together from its patches here."""
        inputs = self.processor.image_processor(image, return_tensors="pt")
        grid = tuple(inputs["image_grid_hw"][0].tolist())
        values = inputs["pixel_values"].to(self.model.device)
        if self.config.vq_config.image_size is None:
            size = self.config.vq_config.patch_size
            values = values.view(*grid, size, size, 3).permute(4, 0, 2, 1, 3)
            values = values.reshape(1, 3, grid[0] * size, grid[1] * size)
        return grid, values

    @cached_property
    def oblong(self) -> Coded:
        """Pictures of a grid that is no square, where there is one: there height and width cannot hide."""
        return max(self.groups, key=lambda group: abs(group.schedule.final_grid[0] - group.schedule.final_grid[1]))

    @cached_property
    def described(self) -> list[tuple[Picture, torch.Tensor, ScaleSchedule]]:
        """Pictures with a text, their codes and schedules; drawn ones where the user's have none."""
        found = [
            (picture, codes[None], group.schedule)
            for group in self.groups
            for picture, codes in zip(group.pictures, group.codes)
            if picture.caption
        ]
        if found:
            return found
        rng, made = random.Random(f"described {self.seed}"), []
        for schedule in sizes(self.vq_model.schedules):
            pictures = [draw(rng, *self.vq_model.schedules.image_size(schedule)) for _ in range(4)]
            pixels = torch.cat([self.pixels_of(picture.image)[1] for picture in pictures])
            codes = self.vq_forward(pixels).quantization.target_codes
            made += [(picture, code[None], schedule) for picture, code in zip(pictures, codes)]
        return made

    def sequence(self, text: str, codes: torch.Tensor, schedule: ScaleSchedule, conditions=()) -> Sequence:
        """`text`, after the pictures `conditions`, answered by the picture of (1, L) `codes`."""
        content = [{"type": "image", "image": image} for image in conditions] + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        prompt = dict(self.processor.apply_chat_template(chat, generation_mode="image").to(self.model.device))
        prompt.pop("mm_token_type_ids", None)
        return self.answered(prompt, codes, schedule)

    def answered(
        self,
        prompt: dict[str, torch.Tensor],
        codes: torch.Tensor,
        schedule: ScaleSchedule,
        targets: torch.Tensor | None = None,
    ) -> Sequence:
        """A prompt, as `generate` takes it, answered by the picture of (1, L) `codes`."""
        ids = prompt["input_ids"]
        slots = [self.config.image_token_id] * num_image_slots(schedule) + [self.config.eoi_token_id]
        inputs = {"input_ids": torch.cat([ids, ids.new_tensor([slots])], dim=1)}
        grids, all_codes = torch.tensor([schedule.final_grid], device=ids.device), codes[0]
        if "image_grid_hw" in prompt:
            given = prompt.get("image_codes")
            if given is None:
                given = self.model.encode_images(prompt["pixel_values"], prompt["image_grid_hw"])
            grids = torch.cat([prompt["image_grid_hw"].to(ids.device), grids])
            all_codes = torch.cat([given.to(ids.device), all_codes])
        inputs |= {"image_grid_hw": grids, "image_codes": all_codes}
        return Sequence(inputs, prompt, codes, schedule, ids.shape[1] - 1, codes[0] if targets is None else targets)

    @cached_property
    def drawn_for(self) -> list[Sequence]:
        """Prompts with the pictures that answer them: of the packs, which the model was trained on, or else
        described ones."""
        if self.packs is not None:
            from .stored import stored_sequences

            if found := stored_sequences(self, LOOKED_AT):
                return found
        return [
            self.sequence(picture.caption, codes, schedule) for picture, codes, schedule in self.described[:LOOKED_AT]
        ]

    @cached_property
    def example(self) -> Sequence:
        """A described picture, of a grid that is no square where there is one."""
        picture, codes, schedule = max(
            self.described, key=lambda entry: abs(entry[2].final_grid[0] - entry[2].final_grid[1])
        )
        return self.sequence(picture.caption, codes, schedule)

    @torch.no_grad()
    def code_logits(self, sequence: Sequence, rows: str = "codes") -> torch.Tensor:
        """(L, V) float32 teacher-forced logits of the answer's codes."""
        output = self.model(**sequence.inputs, logits_over=rows, use_cache=False)
        return output.logits[0, sequence.outputs].float()

    def reference_inputs(
        self,
        ids: torch.Tensor,
        schedules: list[ScaleSchedule],
        codes: list[torch.Tensor],
        where: reference.Places,
        resize: reference.Resize = reference.bicubic,
        to_map=reference.as_map,
        accumulate: bool | None = None,
        visual: bool = True,
        scales: bool = True,
    ) -> torch.Tensor:
        """(L, D) what the decoder must be given for one row, from the weights alone.

        Args:
            ids: (L,).
            codes: (L_i,) of each image. The other arguments make the mistakes that a real model must not.
        """
        model, config = self.model.model, self.config
        embeds = model.language_model.embed_tokens.weight[ids].detach().clone()
        starts = (ids == config.boi_token_id).nonzero().flatten().tolist()
        accumulate = config.feature_mode == "accumulated" if accumulate is None else accumulate
        for start, schedule, code in zip(starts, schedules, codes):
            count = 0
            while start + 1 + count < len(ids) and ids[start + 1 + count] == config.image_token_id:
                count += 1
            entries = model.code_embeddings.weight[code][None].detach()
            features = reference.next_features(entries, schedule, accumulate, resize, to_map)
            if count > features.shape[1]:
                features = torch.cat([features, entries[:, schedule.slice(len(schedule) - 1)]], dim=1)
            if visual and count:
                first, _, second = model.connector
                hidden = nn.functional.gelu(features.to(first.weight.dtype) @ first.weight.T + first.bias)
                embeds[start + 1 : start + 1 + count] = (hidden @ second.weight.T + second.bias)[0].to(embeds.dtype)
        if scales:
            for index, (scale, count) in enumerate(zip(where.scales, where.counts)):
                if scale:
                    embedding = reference.scale_embedding(model.scale_embedding, scale, count)
                    embeds[index] += embedding.to(embeds.dtype)
        return embeds.detach()

    def places(self, ids: torch.Tensor, schedules: list[ScaleSchedule], documents=None) -> reference.Places:
        largest = max(schedule.final_grid[0] * schedule.final_grid[1] for schedule in self.vq_model.schedules)
        edge = float(self.config.position_scale or largest**0.5)
        return reference.places(
            ids.tolist(), schedules, self.config.boi_token_id, self.config.image_token_id, edge, documents
        )


@contextmanager
def captured(module: nn.Module) -> Iterator[list[dict]]:
    """Keyword arguments of every call of a module."""
    calls: list[dict] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def changed(module: nn.Module, change) -> Iterator[None]:
    """Every call of a module with the keyword arguments that `change` makes of its own."""
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: (args, change(dict(kwargs))), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
