"""What transformers' own loop over text needs to know about a model that reads pictures."""

import math

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from .cache_name import CACHE
from .layout import build_layout, check_cache_of_text, check_text, find_images
from .prompts import check_last_scale, check_prompt
from .sampling import COLDEST, SAMPLING_LIMITS, per_scale, plain

IMAGE_INPUTS = ("pixel_values", "image_codes", "image_input_codes", "image_grid_hw", "document_ids")


def text_sampling(model, processor, max_new_tokens: int, **given: float | None) -> dict:
    """Arguments of `generate` for text: greedy unless `temperature`, `top_k` or `top_p` says otherwise."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        per_scale(name, value, 1, *SAMPLING_LIMITS[name])
    do_sample = bool(given) and given.get("temperature", 1.0) >= COLDEST
    eos = model.generation_config.eos_token_id
    return {
        "do_sample": do_sample,
        **(given if do_sample else {}),
        "max_new_tokens": max_new_tokens,
        "eos_token_id": processor.tokenizer.eos_token_id if eos is None else eos,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }


class TextTokens(LogitsProcessor):
    """Nothing but text is written: no rows of codes, where logits have them, and no tokens of images."""

    supports_continuous_batching = True

    def __init__(self, num_rows: int, unwritten: set[int]):
        self.num_rows, self.unwritten = num_rows, sorted(unwritten)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.unwritten] = -torch.inf
        scores[:, self.num_rows :] = -torch.inf
        return scores


def check_unguided(generation_config: GenerationConfig) -> None:
    """Raise a `ValueError` where transformers' own guidance is asked for, which knows logits of text rows alone."""
    if (plain(generation_config.guidance_scale) or 1.0) != 1.0:
        raise ValueError(f"guidance_scale guides pictures, not text, got {generation_config.guidance_scale}")


class TextGenerationMixin(GenerationMixin):
    """Text by next token."""

    def write_text(self, input_ids=None, **kwargs):
        """`generate` of transformers."""
        for name in ("negative_input_ids", "negative_attention_mask"):
            kwargs.pop(name, None)  # what the processor gives for guidance
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", settings.use_cache) is not False:
            self.check_keeps_caches()
        has_pictures = kwargs.get("image_grid_hw") is not None
        chunk_size = kwargs.get("prefill_chunk_size", settings.prefill_chunk_size)
        if chunk_size is not None and has_pictures:
            raise ValueError(f"prompts with pictures are read in one go, got prefill_chunk_size={chunk_size}")
        if kwargs.get("cache_implementation") == "paged" and has_pictures:
            raise ValueError("continuous batching reads text alone, got cache_implementation='paged' and pictures")
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            cache = kwargs.get(CACHE, kwargs.get("past_key_values"))
            mask = kwargs.get("attention_mask") if cache is None else None
            mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
            check_prompt(input_ids, mask, self.config.text_vocab_size)
            if not has_pictures:
                check_text(kwargs.get("pixel_values"), kwargs.get("image_codes"))
                if (input_ids == self.config.image_token_id).any():
                    raise ValueError(
                        "input_ids hold <image> tokens, but no image_grid_hw came: pass all that the processor gives, "
                        "also where past_key_values hold the images already"
                    )
        return super().generate(input_ids, **kwargs)

    def check_keeps_caches(self) -> None:
        """Raise a `ValueError` where layers drop what they have just read, as they do for a backward."""
        if self.training and self.model.language_model.layers[0].gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing in training mode drops the caches that generation reads: call eval() or "
                "gradient_checkpointing_disable() before it"
            )

    @property
    def max_positions(self) -> float:
        """How many positions the decoder knows; types of rope other than the default one reach further than any."""
        config = self.config.text_config
        is_default = config.rope_parameters.get("rope_type", "default") == "default"
        return config.max_position_embeddings if is_default else math.inf

    def check_reach(self, positions: torch.Tensor, further: int = 0) -> None:
        """Raise a `ValueError` where positions, and `further` ones after them, go beyond those the decoder knows."""
        reach, limit = int(positions.max()) + 1 + further, self.max_positions
        if reach > limit:
            raise ValueError(f"the prompt needs {reach} positions, the model has {limit} (max_position_embeddings)")

    def _get_logits_processor(self, generation_config, *args, device=None, **kwargs):
        """Text alone holds no tokens of images, unless one ends it."""
        check_unguided(generation_config)
        if generation_config.assistant_early_exit is not None:  # the library writes it into the shared configuration
            layer = generation_config.assistant_early_exit
            raise ValueError(
                f"no layer but the last answers, got assistant_early_exit={layer}: draft by assistant_model or "
                "prompt_lookup_num_tokens"
            )
        processors = super()._get_logits_processor(generation_config, *args, device=device, **kwargs)
        config, ends = self.config, plain(generation_config.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        tokens = {config.boi_token_id, config.image_token_id, config.eoi_token_id} - set(ends)
        processors.insert(0, TextTokens(config.text_vocab_size, tokens))
        return processors

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        grids, mask = model_kwargs.get("image_grid_hw"), model_kwargs.get("attention_mask")
        if grids is None:
            check_cache_of_text(model_kwargs.get(CACHE))
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            self.check_reach(positions)
            return positions[None].expand(3, *positions.shape)
        ids = self._prompt_ids(model_kwargs.get("input_ids"), inputs_tensor)
        images = find_images(self.config, ids, grids)
        if any(image.outputs.stop == ids.shape[1] for image in images):
            raise ValueError(
                'a prompt of text must not end within a picture: generation_mode="image" draws one that is open, and '
                "<eoi> ends one that is whole"
            )
        check_last_scale(images, self.config)
        layout = build_layout(self.config, ids, grids, mask)
        self.check_reach(layout.position_ids[0])
        return layout.position_ids

    def _prompt_ids(self, input_ids: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
        """(B, L) ids; where there are none but `inputs`, (B, L) ids or (B, L, D) embeddings, what those say of
        images."""
        if input_ids is not None and input_ids.shape[1] > 0:
            return input_ids
        return self.model.marker_ids(inputs) if inputs.is_floating_point() else inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Rows repeat for beams and several answers; of the flat tensors of images, each row's own do."""
        grids = model_kwargs.get("image_grid_hw")
        if expand_size == 1 or grids is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        ids = self._prompt_ids(input_ids, model_kwargs.get("inputs_embeds"))
        images = find_images(self.config, ids, grids)
        of_row = [[index for index, image in enumerate(images) if image.row == row] for row in range(len(ids))]
        order = [index for indices in of_row for _ in range(expand_size) for index in indices]
        whole = self.config.vq_config.image_size is not None  # pictures, not patches
        lengths = {
            "image_grid_hw": lambda image: 1,
            "pixel_values": lambda image: 0 if image.is_open else 1 if whole else image.schedule.lengths[-1],
            "image_codes": lambda image: image.num_codes,
            "image_input_codes": lambda image: image.num_coarse_codes,
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

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, inputs_embeds=None, **kwargs):
        kwargs |= {"is_first_iteration": is_first_iteration, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get(CACHE)
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
