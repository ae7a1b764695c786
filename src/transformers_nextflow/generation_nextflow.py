"""`generate`: text by next token (transformers' own loop), images by next scale (NextFlow sec. 2.2), and both in turn.

The steps themselves are in `drawing.py` and `contexts.py`. Shape suffixes: B prompts or pictures, R rows (prompts,
then null prompts, then those without images), L prompt, l codes of one scale, D hidden, V vocabulary or codebook size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .contexts import Context, read_prompts
from .drawing import Forced, ImageControls, Sampler, draw_pictures
from .interleaved import Answer, interleave
from .layout import check_integers, final_grids, num_image_slots
from .sampling import SAMPLING_LIMITS, PerScale, RowGenerators, integer, per_scale
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


@dataclass
class NextFlowInterleavedOutput(ModelOutput):
    """Prompts and answers of text and pictures; what [`~NextFlowGenerationMixin.next_turn`] goes on from.

    Attributes:
        sequences, attention_mask: (B, L) the prompts as they came, then the answers, padded on the right. A picture is
            `<boi>`, its `<image>` slots, `<eoi>`, as in the model's inputs.
        image_grid_hw: (N, 2) final grids of all pictures of prompts and answers, in row-major order of `<boi>`.
        image_codes: (sum of codes,) their codes, scale by scale.
        prompt_length: columns of the prompts.
        negative_sequences, negative_attention_mask: (B, L') the null prompts, then the answers' pictures; where
            guided.
        logits: of each row, in the order of its steps, (1, V) text logits before processors and (l, V) guided code
            logits of each scale, all float32; with `output_logits`.
        past_key_values: the cache of all rows; a next call writes into it.
    """

    sequences: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    image_grid_hw: torch.LongTensor | None = None
    image_codes: torch.LongTensor | None = None
    prompt_length: int | None = None
    negative_sequences: torch.LongTensor | None = None
    negative_attention_mask: torch.LongTensor | None = None
    logits: tuple[tuple[torch.FloatTensor, ...], ...] | None = None
    past_key_values: list[Context] | None = None


class NextFlowGenerationMixin(GenerationMixin):
    """Adds images to transformers' generation."""

    def generate(self, inputs: torch.Tensor | None = None, *args, generation_mode: str = "text", **kwargs):
        """Generate text, pictures, or both in turn.

        Args:
            inputs: (B, L) prompt ids; also as `input_ids`.
            generation_mode: `"text"`, with every argument of transformers' `generate`; `"image"`, see
                [`generate_image`], for prompts that end in `<boi>`; or `"interleaved"`, see [`generate_interleaved`].

        Raises:
            ValueError: in every mode, if ids are no text rows, or prompts go beyond the decoder's positions.
        """
        if generation_mode == "text":
            for name in ("negative_input_ids", "negative_attention_mask"):
                kwargs.pop(name, None)  # what the processor gives for guidance
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if ids is not None and kwargs.get("inputs_embeds") is None:
                mask = None if kwargs.get("past_key_values") is not None else kwargs.get("attention_mask")
                self._check_prompt(ids, mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)
            return super().generate(inputs, *args, **kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_mode == "image":
            return self.generate_image(*args, **kwargs)
        if generation_mode == "interleaved":
            return self.generate_interleaved(*args, **kwargs)
        raise ValueError(f'generation_mode must be "text", "image" or "interleaved", got {generation_mode!r}')

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
        image_guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        refine_top_k: Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int | None = None,
        aspect_ratio: str | None = None,
        level: str | int | None = None,
        height: int | None = None,
        width: int | None = None,
        forced_codes: torch.LongTensor | None = None,
        forced_mask: torch.BoolTensor | None = None,
        on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
        output_logits: bool | int = False,
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
            image_guidance_scale: guidance by the prompts' images, apart: `none + s_image * (uncond - none) +
                s * (cond - uncond)`, where `none` is the null prompt without its images; 1.0 everywhere is off.
            temperature, top_k, top_p: see [`sample`]. These five are a number, one per scale, a [`LinearRamp`] or a
                [`ScaleInterval`].
            refine_top_k: top-k of further passes, each of which predicts a scale (but the first) again from its own
                codes; TokenFlow samples with top-k 1200, then (100, 1).
            seed, generator: see [`RowGenerators.create`].
            num_images_per_prompt: pictures for each prompt, next to each other in the output.
            aspect_ratio, level: `"width:height"` and level name; or else `height` and `width` in pixels.
            forced_codes: (B, n) codes, without the text rows, of the first scales of each prompt's pictures (or of
                all). The rest is sampled, with the random numbers it would have got if nothing was forced. Scales
                that are forced as a whole are run once for all pictures of a prompt, which then share them.
            forced_mask: (B, n) or (n,) bool, which of `forced_codes` are forced; default all.
            on_scale_end: called after each scale with (picture, scale from 0 on, (n,) codes so far).
            output_logits: also return the logits of each scale, or of the first so many scales (with
                `return_dict_in_generate`).

        Returns:
            (B * num_images_per_prompt, codes) ids, text rows + code; or [`NextFlowImageOutput`].
        """
        self._check_prompts((input_ids, attention_mask), (negative_input_ids, negative_attention_mask))
        controls = self._image_controls(
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            refine_top_k=refine_top_k,
            aspect_ratio=aspect_ratio,
            level=level,
            height=height,
            width=width,
        )
        schedule = controls.schedule
        num_images = self.config.image_generation["num_images_per_prompt"]
        num_images = num_images if num_images_per_prompt is None else num_images_per_prompt
        num_images = integer("num_images_per_prompt", num_images, 1)
        generators = RowGenerators.create(len(input_ids), num_images, seed, generator)
        if forced_codes is not None:
            forced = self._check_forced(forced_codes, forced_mask, len(input_ids), schedule)
            forced_codes, forced_mask = (tensor.to(input_ids.device) for tensor in forced)
        elif forced_mask is not None:
            raise ValueError("forced_mask needs forced_codes")
        if not self._is_open(input_ids) or not (negative_input_ids is None or self._is_open(negative_input_ids)):
            raise ValueError(
                f"every prompt of an image must end in <boi> (id {self.config.boi_token_id}) and be padded on the left"
            )

        prompts, nulls = (input_ids, attention_mask), (negative_input_ids, negative_attention_mask)
        rows = self._context_rows(prompts, nulls, controls)
        contexts, _ = self._read_prompts(
            rows, len(input_ids), pixel_values, image_codes, image_grid_hw, schedule, is_open=True
        )
        forced = None if forced_codes is None else Forced(forced_codes, forced_mask)
        num_logits = len(schedule) if output_logits is True else int(output_logits)
        sampler = Sampler(self, controls, generators, forced, num_logits)
        codes, logits = draw_pictures(sampler, contexts, num_images, on_scale_end)
        sequences = codes + self.config.text_vocab_size
        if not return_dict_in_generate:
            return sequences
        grids = torch.tensor(schedule.final_grid, device=sequences.device).expand(len(sequences), 2)
        return NextFlowImageOutput(sequences, grids, tuple(logits) if output_logits else None)

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        past_key_values: list[Context] | None = None,
        image_generation: dict | None = None,
        max_new_images: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        streamer: BaseStreamer | None = None,
        on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        output_logits: bool = False,
        generation_config=None,
        tokenizer=None,
        **kwargs,
    ) -> NextFlowInterleavedOutput:
        """Answer in text and pictures: text by next token until `<boi>` is sampled, then a picture scale by scale,
        `<eoi>`, and text again, until end of text, `max_new_tokens`, or a stopping criterion.

        Rows at a picture wait for the others' text, and then draw together; a row gives the same alone. A picture that
        was begun is finished. Under guidance a picture's null context is the null prompt and all earlier pictures of
        the row, without the answer's text, which describes what to draw; image guidance drops the pictures too.

        Args:
            input_ids, attention_mask: (B, L) prompts, padded on the left.
            negative_input_ids, negative_attention_mask: (B, L') the null prompts, as for an image but without `<boi>`.
            pixel_values, image_codes, image_grid_hw: the prompts' images, as in the model's forward.
            past_key_values: of an earlier output, whose tokens are not run again; the other inputs still hold them,
                see [`next_turn`].
            image_generation: controls of the pictures over the defaults in `config.image_generation`: guidance and
                sampling, size and `refine_top_k` as in [`generate_image`]. They hold for all pictures of the call.
            max_new_images: pictures of an answer, after which `<boi>` is not sampled any more; default any number.
            seed, generator: see [`RowGenerators.create`]; a row's text and pictures draw from one stream.
            streamer: as in transformers, for one prompt; gets the prompt, then every token of text. Of a picture it
                gets `<boi>` and `<eoi>`.
            on_scale_end: called after each scale with (row, scale from 0 on, (n,) codes so far).
            logits_processor, stopping_criteria, generation_config, kwargs: of transformers' `generate`, for the text.
                Processors and criteria see each row alone, (1, n) ids without padding and without the answer's
                `<image>` slots and `<eoi>`; `max_new_tokens` (default 512) counts the same.

        Returns:
            [`NextFlowInterleavedOutput`].
        """
        self._check_prompts((input_ids, attention_mask), (negative_input_ids, negative_attention_mask))
        if "max_length" in kwargs:
            raise ValueError("interleaved answers are bounded by max_new_tokens and max_new_images, got max_length")
        generation_config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise ValueError(f"interleaved generation does not know the arguments {', '.join(sorted(unknown))}")
        if (generation_config.num_beams or 1) > 1 or (generation_config.num_return_sequences or 1) > 1:
            raise ValueError(
                "interleaved generation samples one answer for each prompt, got num_beams="
                f"{generation_config.num_beams}, num_return_sequences={generation_config.num_return_sequences}"
            )
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer follows one prompt, got {len(input_ids)}")
        if max_new_images is not None:
            max_new_images = integer("max_new_images", max_new_images, 0)
        if self._is_open(input_ids, any_row=True):
            raise ValueError("a prompt of interleaved generation must not end in <boi>")
        generation_config.max_length = None
        if generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = 512
        controls = self._image_controls(**(image_generation or {}))
        generators = RowGenerators.create(len(input_ids), 1, seed, generator)
        prompts, nulls = (input_ids, attention_mask), (negative_input_ids, negative_attention_mask)
        rows = self._context_rows(prompts, nulls, controls)
        self._prepare_special_tokens(generation_config, True, device=input_ids.device, batch_size=len(input_ids))
        if streamer is not None:
            streamer.put(input_ids.cpu())
        contexts, pictures = self._read_prompts(
            rows,
            len(input_ids),
            pixel_values,
            image_codes,
            image_grid_hw,
            controls.schedule,
            past_key_values=past_key_values,
        )
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(*(each[: len(input_ids)] for each in rows))]
        pad_id = self.config.eoi_token_id if generation_config.pad_token_id is None else generation_config.pad_token_id
        answers = [
            Answer(
                text_ids,
                self._get_logits_processor(
                    generation_config,
                    input_ids_seq_length=len(text_ids),
                    logits_processor=logits_processor or LogitsProcessorList(),
                    device=input_ids.device,
                    model_kwargs={},
                ),
                self._get_stopping_criteria(
                    generation_config, stopping_criteria or StoppingCriteriaList(), tokenizer=tokenizer
                ),
            )
            for text_ids in prompt_ids
        ]
        contexts = interleave(
            contexts,
            answers,
            controls,
            generators,
            do_sample=bool(generation_config.do_sample),
            max_new_tokens=generation_config.max_new_tokens,
            max_new_images=max_new_images,
            streamer=streamer,
            output_logits=output_logits,
            on_scale_end=on_scale_end,
        )
        return self._interleaved_output(prompts, nulls, pictures, answers, controls.schedule, contexts, pad_id)

    @torch.no_grad()
    def next_turn(
        self,
        output: NextFlowInterleavedOutput,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
    ) -> dict:
        """Inputs of the next interleaved call: an output, followed by new messages.

        Args:
            output: of the turn before.
            input_ids and the others: the new messages alone, as [`~NextFlowProcessor.apply_next_turn`] gives them.

        Returns:
            `input_ids`, `attention_mask`, the null prompts, `image_grid_hw`, `image_codes` of both, and
            `past_key_values`, without which everything is run again with the same result.
        """

        def follow(before, mask_before, after, mask_after):
            mask_after = torch.ones_like(after) if mask_after is None else mask_after
            return torch.cat([before, after], dim=1), torch.cat([mask_before, mask_after.to(mask_before)], dim=1)

        if len(input_ids) != len(output.sequences):
            raise ValueError(f"the new messages must have {len(output.sequences)} rows, got {len(input_ids)}")
        ids, mask = follow(output.sequences, output.attention_mask, input_ids, attention_mask)
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": output.past_key_values}
        if output.negative_sequences is not None:
            if negative_input_ids is None:
                raise ValueError("the turn before was guided: the new messages need negative_input_ids")
            inputs["negative_input_ids"], inputs["negative_attention_mask"] = follow(
                output.negative_sequences, output.negative_attention_mask, negative_input_ids, negative_attention_mask
            )
        layout = self.model.lay_out(input_ids, [] if image_grid_hw is None else image_grid_hw, attention_mask)
        new_codes = self.model.image_codes_of(layout, pixel_values, image_codes)
        new = [[] for _ in range(len(input_ids))]
        for image, codes in zip(layout.images, new_codes):
            new[image.row].append((image.schedule.final_grid, codes))
        old = [[] for _ in range(len(input_ids))]
        layout = self.model.lay_out(output.sequences, output.image_grid_hw, output.attention_mask)
        for image, codes in zip(layout.images, self.model.image_codes_of(layout, None, output.image_codes)):
            old[image.row].append((image.schedule.final_grid, codes))
        inputs |= _flat_images([before + after for before, after in zip(old, new)], input_ids.device)
        return inputs

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: torch.LongTensor, image_grid_hw: torch.LongTensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """(B, codes) ids from `generate(generation_mode="image")` -> (B, 3, H, W) float32 pictures in [-1, 1].

        Args:
            image_grid_hw: their common final grid; may be absent where only one schedule has as many codes.
        """
        check_integers("image_tokens", image_tokens, 2)
        length = image_tokens.shape[-1]
        if image_grid_hw is None:
            fitting = [schedule.final_grid for schedule in self.model.schedules if schedule.num_codes == length]
            if len(fitting) != 1:
                raise ValueError(f"{length} codes fit {len(fitting)} schedules ({fitting}); name one by image_grid_hw")
            grid = fitting[0]
        else:
            rows = image_grid_hw.tolist() if isinstance(image_grid_hw, torch.Tensor) else image_grid_hw
            is_pair = isinstance(rows, Sequence) and len(rows) == 2 and isinstance(rows[0], int)
            grids = sorted(set(final_grids([rows] if is_pair else rows)))
            if len(grids) != 1:
                raise ValueError(f"the vision tokenizer decodes pictures of one grid at a time, got {grids}")
            (grid,) = grids
        return self.model.vq_model.decode(image_tokens - self.config.text_vocab_size, grid)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.FloatTensor, image_grid_hw: torch.LongTensor) -> torch.LongTensor:
        """Flat patches of pictures, as the image processor gives them, to their flat codes; see [`decode_images`]."""
        codes = self.model.encode_images(pixel_values, final_grids(image_grid_hw))
        return torch.cat([torch.empty(0, dtype=torch.long, device=pixel_values.device), *codes])

    @torch.no_grad()
    def decode_images(self, image_codes: torch.LongTensor, image_grid_hw: torch.LongTensor) -> list[torch.Tensor]:
        """Flat codes of pictures of any grids, as a [`NextFlowInterleavedOutput`] holds them, to float32 pictures
        (3, H, W) in [-1, 1]."""
        check_integers("image_codes", image_codes, 1)
        grids = final_grids(image_grid_hw)
        lengths = [self.model.schedules.by_grid(grid).num_codes for grid in grids]
        if len(image_codes) != sum(lengths):
            raise ValueError(f"image_codes must hold {sum(lengths)} codes for {grids}, got {len(image_codes)}")
        codes = image_codes.split(lengths)
        pictures: dict[int, torch.Tensor] = {}
        for grid in dict.fromkeys(grids):
            members = [index for index, other in enumerate(grids) if other == grid]
            decoded = self.model.vq_model.decode(torch.stack([codes[index] for index in members]), grid)
            pictures |= dict(zip(members, decoded))
        return [pictures[index] for index in range(len(grids))]

    @torch.no_grad()
    def decode_preview(self, codes: torch.LongTensor, image_grid_hw: Sequence[int]) -> torch.Tensor:
        """(B, n) or (n,) codes of the first scales, as `on_scale_end` gets them -> (B, 3, H, W) or (3, H, W) float32
        pictures of the final size in [-1, 1].

        Raises:
            ValueError: if the codes do not end with a scale.
        """
        check_integers("codes", codes, 1, 2)
        schedule = self.model.schedules.by_grid(*final_grids([image_grid_hw]))
        num_scales = _num_scales(codes, schedule)
        missing = schedule.num_codes - codes.shape[-1]
        codes_BL = torch.nn.functional.pad(codes.reshape(-1, codes.shape[-1]), (0, missing))
        pictures = self.model.vq_model.decode_prefix(codes_BL, schedule.final_grid, num_scales)
        return pictures if codes.ndim == 2 else pictures[0]

    def _target_schedule(self, aspect_ratio, level, height, width) -> ScaleSchedule:
        schedules = self.model.schedules
        if height is None and width is None:
            defaults = self.config.image_generation
            return schedules.by_aspect_ratio(
                defaults["aspect_ratio"] if aspect_ratio is None else aspect_ratio,
                defaults["level"] if level is None else level,
            )
        if height is None or width is None or aspect_ratio is not None or level is not None:
            raise ValueError(
                f"give aspect_ratio and level, or height and width: {aspect_ratio=}, {level=}, {height=}, {width=}"
            )
        return schedules.by_size(integer("height", height, 1), integer("width", width, 1))

    def _image_controls(
        self, aspect_ratio=None, level=None, height=None, width=None, refine_top_k=None, **controls: PerScale | None
    ) -> ImageControls:
        """Controls over the defaults in the config, one value for each scale."""
        schedule = self._target_schedule(aspect_ratio, level, height, width)
        limits = {"guidance_scale": (0.0,), "image_guidance_scale": (0.0,), **SAMPLING_LIMITS}
        if unknown := set(controls) - set(limits):
            raise ValueError(f"the controls of pictures do not include {', '.join(sorted(unknown))}")
        defaults = self.config.image_generation
        values = []
        for name, limit in limits.items():
            value = defaults[name] if controls.get(name) is None else controls[name]
            values.append(per_scale(name, value, len(schedule), *limit))
        refine_top_k = defaults["refine_top_k"] if refine_top_k is None else refine_top_k
        if not isinstance(refine_top_k, Sequence):
            raise ValueError(f"refine_top_k must be a list of integers, got {refine_top_k!r}")
        per_scale("refine_top_k", refine_top_k, len(refine_top_k), 0, inf, True)
        return ImageControls(schedule, *values, refine_top_k=tuple(refine_top_k))

    def _check_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, name: str = "input_ids"
    ) -> None:
        """Raise a `ValueError` for anything but (B, L) ids of text rows, and a mask that leaves each row a token."""
        check_integers(name, input_ids, 2)
        if input_ids.numel() == 0:
            raise ValueError(f"{name} must hold at least one prompt of one token, got {tuple(input_ids.shape)}")
        limit, low, high = self.config.text_vocab_size, int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got {low} to {high}; codes go into image_codes")
        if attention_mask is None:
            return
        if attention_mask.shape != input_ids.shape:
            shape, expected = tuple(attention_mask.shape), tuple(input_ids.shape)
            raise ValueError(f"the attention mask of {name} must have their shape {expected}, got {shape}")
        if not attention_mask.bool().any(dim=1).all():
            raise ValueError(f"the attention mask must leave every row of {name} a token")

    def _check_prompts(self, prompts: tuple, nulls: tuple) -> None:
        self._check_prompt(*prompts)
        if nulls[0] is not None:
            self._check_prompt(*nulls, name="negative_input_ids")

    def _check_reach(self, positions: torch.Tensor, further: int = 0) -> None:
        """Raise a `ValueError` where positions, and `further` ones after them, go beyond those the decoder knows."""
        config = self.config.text_config
        reach, limit = int(positions.max()) + 1 + further, config.max_position_embeddings
        if reach > limit and config.rope_parameters.get("rope_type", "default") == "default":  # others reach further
            raise ValueError(f"the prompt needs {reach} positions, the model has {limit} (max_position_embeddings)")

    def _is_open(self, input_ids: torch.Tensor, any_row: bool = False) -> bool:
        """Whether every row, or any, ends in `<boi>`."""
        ends = input_ids[:, -1] == self.config.boi_token_id
        return bool(ends.any() if any_row else ends.all())

    def _check_forced(
        self, codes: torch.Tensor, mask: torch.Tensor | None, num_prompts: int, schedule: ScaleSchedule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_integers("forced_codes", codes, 2)
        if len(codes) != num_prompts:
            raise ValueError(f"forced_codes must have the shape ({num_prompts}, codes), got {tuple(codes.shape)}")
        _num_scales(codes, schedule)
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
        if mask.dtype != torch.bool or mask.shape not in (codes.shape, codes.shape[1:]):
            raise ValueError(
                f"forced_mask must be bool of the shape {tuple(codes.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        limit = self.config.vq_config.codebook_size
        mask = mask.to(codes.device).expand_as(codes)
        if mask.any() and not (0 <= codes[mask].min() and codes[mask].max() < limit):
            low, high = int(codes[mask].min()), int(codes[mask].max())
            raise ValueError(f"forced_codes must lie in [0, {limit}), without the text rows, got {low} to {high}")
        return codes, mask

    def _context_rows(
        self, prompts: tuple, nulls: tuple, controls: ImageControls
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, L) ids and mask: the prompts, and the null prompts and those without images where they guide, padded on
        the left."""
        contexts = [prompts]
        if controls.max_roles > 1:
            ids, mask = nulls
            if ids is None:
                raise ValueError(
                    f"guidance_scale {controls.guidance} needs negative_input_ids, which the processor gives; "
                    "guidance_scale=1.0 samples without"
                )
            if len(prompts[0]) != len(ids):
                raise ValueError(f"negative_input_ids must have {len(prompts[0])} rows, got {len(ids)}")
            contexts.append(nulls)
        contexts = [(ids, torch.ones_like(ids) if mask is None else mask) for ids, mask in contexts]
        images, *null_images = (
            ((ids == self.config.boi_token_id) & mask.bool()).sum(dim=1).tolist() for ids, mask in contexts
        )
        if null_images and null_images[0] != images:
            raise ValueError(
                f"null prompts must hold the images of their prompts, got {null_images[0]} <boi> tokens for {images}"
            )
        if controls.max_roles > 2:
            ids, mask = contexts[1]
            contexts.append((ids, mask.masked_fill(self._at_images(ids), 0)))
        length = max(ids.shape[1] for ids, _ in contexts)
        pad = lambda rows: torch.nn.functional.pad(rows, (length - rows.shape[1], 0))  # noqa: E731
        ids, mask = (torch.cat(list(map(pad, rows))) for rows in zip(*contexts))
        return ids.masked_fill(mask == 0, self.config.eoi_token_id), mask.bool()

    def _at_images(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) bool: from `<boi>` to `<eoi>` of finished images."""
        opened = input_ids == self.config.boi_token_id
        inside = opened | (input_ids == self.config.image_token_id)
        inside[:, 1:] |= inside[:, :-1] & (input_ids[:, 1:] == self.config.eoi_token_id)
        inside[:, -1] &= ~opened[:, -1]
        return inside

    def _read_prompts(
        self,
        rows: tuple[torch.Tensor, torch.Tensor],
        num_prompts: int,
        pixel_values,
        image_codes,
        image_grid_hw,
        schedule: ScaleSchedule,
        is_open: bool = False,
        past_key_values: list[Context] | None = None,
    ) -> tuple[list[Context], list[list[tuple]]]:
        """Run what the contexts do not hold of the rows.

        Args:
            schedule: of the pictures to draw.
            is_open: the rows end in the `<boi>` of such a picture.

        Returns:
            the contexts, and each prompt's images as (grid, codes).
        """
        input_ids, mask = rows
        closed = ((input_ids == self.config.boi_token_id) & mask).sum(dim=1) - int(is_open)
        given = [] if image_grid_hw is None else final_grids(image_grid_hw)
        if int(closed[:num_prompts].sum()) != len(given):
            raise ValueError(
                f"the prompts hold {int(closed[:num_prompts].sum())} finished images, image_grid_hw has {len(given)}"
            )
        grids, of_row = [], []
        for row, count in enumerate(closed.tolist()):
            first = int(closed[row - row % num_prompts : row].sum())
            of_row.append(range(first, first + count))
            grids += [given[index] for index in of_row[-1]] + [schedule.final_grid] * int(is_open)
        layout = self.model.lay_out(input_ids, grids, mask)
        self._check_reach(layout.position_ids[0], len(schedule) - 1 if is_open else 0)
        own = replace(layout, images=[image for image in layout.images if image.row < num_prompts])
        codes = self.model.image_codes_of(own, pixel_values, image_codes)

        contexts = past_key_values or [Context.empty(self, len(input_ids), input_ids.device)]
        num_rows = sum(len(context.rows) for context in contexts)
        if num_rows != len(input_ids):
            raise ValueError(
                f"past_key_values must come from interleaved generation over {len(input_ids)} rows (prompts and null "
                f"prompts), got {num_rows}"
            )
        of_rows = [codes[index] for indices in of_row for index in indices]
        pictures = [[(given[index], codes[index]) for index in indices] for indices in of_row[:num_prompts]]
        return read_prompts(contexts, input_ids, mask, layout, of_rows), pictures

    def _interleaved_output(
        self, prompts, nulls, pictures, answers: list[Answer], schedule: ScaleSchedule, contexts, pad_id: int
    ) -> NextFlowInterleavedOutput:
        config = self.config
        picture_ids = [
            config.boi_token_id,
            *[config.image_token_id] * num_image_slots(schedule, config.condition_last_scale),
            config.eoi_token_id,
        ]

        def follow(ids, mask, new: list[list[int]]):
            new = [torch.tensor(row, dtype=ids.dtype, device=ids.device) for row in new]
            kept = [torch.ones_like(row) for row in new]
            mask = torch.ones_like(ids) if mask is None else mask.to(ids)
            ids = torch.cat([ids, pad_sequence(new, batch_first=True, padding_value=pad_id)], dim=1)
            return ids, torch.cat([mask, pad_sequence(kept, batch_first=True)], dim=1)

        sequences, attention_mask = follow(*prompts, [answer.token_ids for answer in answers])
        negative = (None, None)
        if nulls[0] is not None and sum(len(context.rows) for context in contexts) > len(answers):
            negative = follow(*nulls, [picture_ids * len(answer.image_codes) for answer in answers])
        for row, answer in zip(pictures, answers):
            row += [(schedule.final_grid, codes) for codes in answer.image_codes]
        return NextFlowInterleavedOutput(
            sequences=sequences,
            attention_mask=attention_mask,
            **_flat_images(pictures, sequences.device),
            prompt_length=prompts[0].shape[1],
            negative_sequences=negative[0],
            negative_attention_mask=negative[1],
            logits=tuple(tuple(answer.logits) for answer in answers) if answers[0].logits else None,
            past_key_values=contexts,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor
        if input_ids.ndim != 2 or input_ids.is_floating_point() or model_kwargs.get("image_grid_hw") is None:
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            self._check_reach(positions)
            return positions[None].expand(3, *positions.shape)
        layout = self.model.lay_out(input_ids, model_kwargs["image_grid_hw"], model_kwargs.get("attention_mask"))
        self._check_reach(layout.position_ids[0])
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
        whole = self.config.vq_config.image_size is not None  # pictures, not patches
        lengths = {
            "image_grid_hw": lambda image: 1,
            "pixel_values": lambda image: 0 if image.is_open else 1 if whole else image.schedule.lengths[-1],
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


def _num_scales(codes: torch.Tensor, schedule: ScaleSchedule) -> int:
    """How many scales (..., n) codes are."""
    ends = [offset + length for offset, length in zip(schedule.offsets, schedule.lengths)]
    if codes.shape[-1] not in ends:
        raise ValueError(
            f"the first scales of the final grid {schedule.final_grid} have {', '.join(map(str, ends))} codes, got "
            f"{codes.shape[-1]}"
        )
    return ends.index(codes.shape[-1]) + 1


def _flat_images(rows: list[list[tuple]], device: torch.device) -> dict:
    """Each row's images as (grid, codes) to the flat tensors of the model's inputs."""
    images = [image for row in rows for image in row]
    codes = [torch.empty(0, dtype=torch.long, device=device), *(codes for _, codes in images)]
    grids = torch.tensor([grid for grid, _ in images], dtype=torch.long, device=device).reshape(-1, 2)
    return {"image_grid_hw": grids, "image_codes": torch.cat(codes)}
