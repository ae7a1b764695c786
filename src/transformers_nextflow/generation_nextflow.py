"""`generate`: text by next token (transformers' own loop), images by next scale (NextFlow sec. 2.2).

Shape suffixes: R rows (conditional, then unconditional), B pictures, l codes of one scale, D hidden, V codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .attention import scale_step_mask
from .layout import scale_coordinates
from .quantizer import next_scale_step
from .sampling import PerScale, RowGenerators, guide, per_scale, sample
from .scales import ScaleSchedule

IMAGE_INPUTS = ("pixel_values", "image_codes", "image_input_codes", "image_grid_hw", "document_ids")


@dataclass
class NextFlowImageOutput(ModelOutput):
    """Generated pictures.

    Attributes:
        sequences: (B, codes) ids, text rows + code, scale by scale.
        image_grid_hw: (B, 2) final grids.
        logits: per scale, (B, l, V) float32, guided, before temperature and filters.
    """

    sequences: torch.LongTensor | None = None
    image_grid_hw: torch.LongTensor | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None


class NextFlowGenerationMixin(GenerationMixin):
    """Adds images to transformers' generation."""

    def generate(self, inputs: torch.Tensor | None = None, *args, generation_mode: str = "text", **kwargs):
        """Generate text or pictures.

        Args:
            inputs: (B, L) prompt ids; also as `input_ids`.
            generation_mode: `"text"`, with every argument of transformers' `generate`; or `"image"`, see
                [`generate_image`], for prompts that end in `<boi>`.
        """
        if generation_mode == "text":
            for name in ("negative_input_ids", "negative_attention_mask"):
                kwargs.pop(name, None)  # what the processor gives for guidance
            return super().generate(inputs, *args, **kwargs)
        if generation_mode == "image":
            if inputs is not None:
                kwargs["input_ids"] = inputs
            return self.generate_image(*args, **kwargs)
        raise ValueError(f'generation_mode must be "text" or "image", got {generation_mode!r}')

    @torch.no_grad()
    def generate_image(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int | None = None,
        aspect_ratio: str | None = None,
        level: str | int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_logits: bool = False,
        return_dict_in_generate: bool = False,
    ) -> torch.LongTensor | NextFlowImageOutput:
        """Decode pictures scale by scale over a key-value cache.

        Defaults of everything that is `None` are in `config.image_generation`.

        Args:
            input_ids, attention_mask: (B, L) prompts that end in `<boi>`, padded on the left.
            negative_input_ids, negative_attention_mask: the null prompts (the template with the negative prompt or
                nothing, and the same images); needed with guidance, and given by the processor.
            pixel_values, image_codes, image_grid_hw: the prompts' images, as in the model's forward.
            guidance_scale: `uncond + s * (cond - uncond)`; 1.0 everywhere is off.
            temperature, top_k, top_p: see [`sample`]. These four are a number, one per scale, or a [`LinearRamp`].
            seed, generator: see [`RowGenerators.create`].
            num_images_per_prompt: pictures for each prompt, next to each other in the output.
            aspect_ratio, level: `"width:height"` and level name; or else `height` and `width` in pixels.
            output_logits: also return each scale's logits (with `return_dict_in_generate`).

        Returns:
            (B * num_images_per_prompt, codes) ids, text rows + code; or [`NextFlowImageOutput`].
        """
        defaults = self.config.image_generation
        num_images = defaults["num_images_per_prompt"] if num_images_per_prompt is None else num_images_per_prompt
        if num_images < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images}")
        schedule = self._target_schedule(aspect_ratio, level, height, width)
        pick = lambda name, value: defaults[name] if value is None else value  # noqa: E731
        guidance_S = per_scale("guidance_scale", pick("guidance_scale", guidance_scale), len(schedule), 0.0)
        temperature_S = per_scale("temperature", pick("temperature", temperature), len(schedule), 0.0)
        top_k_S = per_scale("top_k", pick("top_k", top_k), len(schedule), 0, whole=True)
        top_p_S = per_scale("top_p", pick("top_p", top_p), len(schedule), 1e-6, 1.0)
        guided = any(value != 1.0 for value in guidance_S)
        batch = len(input_ids)
        rows = RowGenerators.create(batch, num_images, seed, generator)
        self._check_open(input_ids)

        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        if guided:
            if negative_input_ids is None:
                raise ValueError(
                    f"guidance_scale {guidance_S} needs negative_input_ids, which the processor gives; "
                    "guidance_scale=1.0 samples without"
                )
            self._check_open(negative_input_ids)
            prompt = self._stack_prompts(prompt, negative_input_ids, negative_attention_mask)
        cache, hidden_R1D, counter_R, mask_RL = self._prefill_image(
            **prompt,
            pixel_values=pixel_values,
            image_codes=image_codes,
            image_grid_hw=image_grid_hw,
            schedule=schedule,
            copies=2 if guided else 1,
        )
        if num_images > 1:
            cache.batch_repeat_interleave(num_images)
            hidden_R1D, counter_R = (x.repeat_interleave(num_images, dim=0) for x in (hidden_R1D, counter_R))
            mask_RL = None if mask_RL is None else mask_RL.repeat_interleave(num_images, dim=0)

        codes, logits = [], []
        total = 0.0 if self.config.feature_mode == "accumulated" else None
        hidden_RlD = hidden_R1D
        for scale, (h, w) in enumerate(schedule):
            logits_BlV = self.code_head(hidden_RlD).float()
            if guided:
                logits_BlV = guide(logits_BlV, guidance_S[scale])
            uniform_Bl = rows.uniform(h * w, logits_BlV.device)
            codes_Bl = sample(logits_BlV, temperature_S[scale], top_k_S[scale], top_p_S[scale], uniform_Bl)
            codes.append(codes_Bl)
            if output_logits:
                logits.append(logits_BlV)
            if scale + 1 == len(schedule):
                break
            entries_BlC = self.model.code_embeddings(codes_Bl)
            features_BlC, total = next_scale_step(entries_BlC, schedule, scale, total)
            inputs_BlD = self.model.connect(features_BlC)
            inputs_RlD = torch.cat([inputs_BlD, inputs_BlD]) if guided else inputs_BlD
            hidden_RlD, mask_RL = self._scale_step(inputs_RlD, schedule, scale + 1, counter_R, mask_RL, cache)

        sequences = torch.cat(codes, dim=1) + self.config.text_vocab_size
        if not return_dict_in_generate:
            return sequences
        grids = torch.tensor(schedule.final_grid, device=sequences.device).expand(len(sequences), 2)
        return NextFlowImageOutput(sequences, grids, tuple(logits) if output_logits else None)

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: torch.LongTensor, image_grid_hw: torch.LongTensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """(B, codes) ids from `generate(generation_mode="image")` -> (B, 3, H, W) float32 pictures in [-1, 1].

        Args:
            image_grid_hw: their common final grid; may be absent where only one schedule has as many codes.
        """
        length = image_tokens.shape[-1]
        if image_grid_hw is None:
            fitting = [schedule.final_grid for schedule in self.model.schedules if schedule.num_codes == length]
            if len(fitting) != 1:
                raise ValueError(f"{length} codes fit {len(fitting)} schedules ({fitting}); name one by image_grid_hw")
            grid = fitting[0]
        else:
            grids = torch.as_tensor(image_grid_hw).reshape(-1, 2).unique(dim=0)
            if len(grids) != 1:
                raise ValueError(f"the vision tokenizer decodes pictures of one grid at a time, got {grids.tolist()}")
            grid = tuple(grids[0].tolist())
        return self.model.vq_model.decode(image_tokens - self.config.text_vocab_size, grid)

    def _target_schedule(self, aspect_ratio, level, height, width) -> ScaleSchedule:
        schedules = self.model.schedules
        if height is None and width is None:
            defaults = self.config.image_generation
            return schedules.by_aspect_ratio(aspect_ratio or defaults["aspect_ratio"], level or defaults["level"])
        if height is None or width is None or aspect_ratio is not None or level is not None:
            raise ValueError(
                f"give aspect_ratio and level, or height and width: {aspect_ratio=}, {level=}, {height=}, {width=}"
            )
        return schedules.by_size(height, width)

    def _check_open(self, input_ids: torch.Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or (input_ids[:, -1] != self.config.boi_token_id).any():
            raise ValueError(
                f"every prompt of an image must end in <boi> (id {self.config.boi_token_id}) and be padded on the left"
            )

    def _stack_prompts(self, prompt: dict, negative_input_ids, negative_attention_mask) -> dict:
        """Conditional rows, then unconditional ones, padded on the left to one length."""
        ids = [prompt["input_ids"], negative_input_ids]
        masks = [
            torch.ones_like(rows) if mask is None else mask
            for rows, mask in zip(ids, (prompt["attention_mask"], negative_attention_mask))
        ]
        if len(ids[0]) != len(ids[1]):
            raise ValueError(f"negative_input_ids must have {len(ids[0])} rows, got {len(ids[1])}")
        images, null_images = (
            ((rows == self.config.boi_token_id) & mask.bool()).sum(dim=1).tolist() for rows, mask in zip(ids, masks)
        )
        if images != null_images:
            raise ValueError(
                f"null prompts must hold the images of their prompts, got {null_images} <boi> tokens for {images}"
            )
        length = max(rows.shape[1] for rows in ids)
        pad = lambda rows: torch.nn.functional.pad(rows, (length - rows.shape[1], 0))  # noqa: E731
        return {"input_ids": torch.cat(list(map(pad, ids))), "attention_mask": torch.cat(list(map(pad, masks)))}

    def _prefill_image(
        self,
        input_ids,
        attention_mask,
        pixel_values,
        image_codes,
        image_grid_hw,
        schedule: ScaleSchedule,
        copies: int,
    ) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the prompts; returns the cache, the hidden states of `<boi>`, its counter, and the padding mask if any
        row is padded."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        opened = input_ids == self.config.boi_token_id
        closed = (opened if attention_mask is None else opened & attention_mask.bool()).sum(dim=1) - 1
        given = [] if image_grid_hw is None else torch.as_tensor(image_grid_hw).tolist()
        if int(closed.sum()) != len(given) * copies:
            raise ValueError(
                f"the prompts hold {int(closed.sum()) // copies} finished images, image_grid_hw has {len(given)}"
            )
        grids, unread = [], list(given) * copies
        for count in closed.tolist():
            grids += unread[:count] + [list(schedule.final_grid)]
            unread = unread[count:]
        layout = self.model.lay_out(input_ids, grids, attention_mask)
        half = self.model.lay_out(input_ids[: len(input_ids) // copies], grids[: len(grids) // copies])
        codes = self.model.image_codes_of(half, pixel_values, image_codes)
        cache = DynamicCache(config=self.config.text_config)
        hidden_RLD = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_codes=torch.cat(codes).repeat(copies) if codes else None,
            layout=layout,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return cache, hidden_RLD[:, -1:], layout.position_ids[0, :, -1], attention_mask

    def _scale_step(
        self, inputs_RlD, schedule: ScaleSchedule, scale: int, counter_R, mask_RL, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One forward over the block of scale `scale` (0-based); returns hidden states and the grown padding mask."""
        length = schedule.lengths[scale]
        device = inputs_RlD.device
        index, count = torch.tensor([scale + 1], device=device), torch.tensor([len(schedule)], device=device)
        inputs_RlD = inputs_RlD + self.model.scale_embedding(index, count).to(inputs_RlD.dtype)
        cells_2l = scale_coordinates(schedule[scale], self.model.finest_edge).to(device)
        counter_Rl = (counter_R + scale)[:, None].expand(-1, length)
        positions_3Rl = torch.stack([counter_Rl, *(cells.expand_as(counter_Rl) for cells in cells_2l)])
        if mask_RL is not None:
            mask_RL = torch.cat([mask_RL, mask_RL.new_ones(len(mask_RL), length)], dim=1)
        hidden_RlD = self.model.language_model(
            inputs_embeds=inputs_RlD,
            position_ids=positions_3Rl,
            attention_mask=scale_step_mask(self.config.text_config, inputs_RlD, mask_RL, cache),
            past_key_values=cache,
            use_cache=True,
            is_causal=False,
        ).last_hidden_state
        return hidden_RlD, mask_RL

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor
        if input_ids.ndim != 2 or input_ids.is_floating_point() or model_kwargs.get("image_grid_hw") is None:
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            return positions[None].expand(3, *positions.shape)
        layout = self.model.lay_out(input_ids, model_kwargs["image_grid_hw"], model_kwargs.get("attention_mask"))
        return layout.position_ids

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Rows repeat for beams and several answers; of the flat tensors of images, each row's own do."""
        grids = model_kwargs.get("image_grid_hw")
        if expand_size == 1 or grids is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        images = self.model.lay_out(input_ids, grids, model_kwargs.get("attention_mask")).images
        of_row = [[index for index, image in enumerate(images) if image.row == row] for row in range(len(input_ids))]
        order = [index for indices in of_row for _ in range(expand_size) for index in indices]
        lengths = {
            "image_grid_hw": lambda image: 1,
            "pixel_values": lambda image: 0 if image.is_open else image.schedule.lengths[-1],
            "image_codes": lambda image: 0 if image.is_open else image.schedule.num_codes,
            "image_input_codes": lambda image: 0 if image.is_open else image.schedule.offsets[-1],
        }
        flat = {name: model_kwargs.pop(name) for name in lengths if model_kwargs.get(name) is not None}
        for name, rows in flat.items():
            parts = rows.split([lengths[name](image) for image in images])
            flat[name] = torch.cat([parts[index] for index in order])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | flat

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, is_first_iteration=False, **kwargs):
        """Masks of the steps over a static cache; that of the prompt is forward's, which sees its images."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and (not is_first_iteration or self._continues(cache, inputs.get("input_ids"))):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        inputs["logits_over"] = "text"
        return inputs

    def _continues(self, cache: Cache, input_ids: torch.Tensor | None) -> bool:
        """Whether the prompt's images are in the cache already, and `input_ids` only the rest of its text."""
        return (
            cache.get_seq_length() > 0
            and input_ids is not None
            and not bool((input_ids == self.config.boi_token_id).any())
        )
