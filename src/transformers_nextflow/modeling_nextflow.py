"""NextFlow: Qwen2.5-VL's text decoder over one sequence of text and multi-scale image codes (NextFlow sec. 2.2).

- Text is causal; an image is `<boi>`, scale blocks, `<eoi>`, and a block sees itself (`layout.py`, `attention.py`).
- The block of scale k holds features of scale k-1's codes and predicts scale k's codes, position by position.
- Positions are (counter, row, column), float32 whatever the model's dtype; text has all three equal, as in Qwen.
- Text rows (`lm_head`) and code rows (`code_head`) share one softmax in training; a text step computes the first, a
  scale step the second.

Shape suffixes: B batch, L sequence, N images of one schedule, l visual inputs, C code channels, D hidden.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import ismethod

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .attention import Apart, Part, is_decoders_alone, refuse_dense_mask, sequence_mask
from .block_attention import Segments, attend_by_segments
from .cache_name import CACHE, takes_cache
from .configuration_nextflow import NextFlowConfig
from .features import scale_taps
from .generation_nextflow import NextFlowGenerationMixin
from .layout import (
    ImageSpan,
    SequenceLayout,
    build_layout,
    check_cache_of_text,
    check_codes,
    check_rows,
    check_text,
    each_by_grid,
    find_images,
    joined,
    text_positions,
)
from .lora import adapter_names, are_placed, each_by_its_adapter, place_adapters, sum_by_adapter
from .losses import joint_cross_entropy
from .modeling_nextflow_vq import NextFlowVQModel, unpatchify
from .remote_code import LibraryModel
from .scales import Grid, ScaleSchedule
from .stored_tokenizer import AbsentVisionTokenizer, load_referred_to
from .utils.precision import AtLeastFloat32


class NextFlowRotaryEmbedding(AtLeastFloat32, Qwen2_5_VLRotaryEmbedding):
    """Qwen's rotary embedding whose frequencies stay float32 when the model is cast."""


class CodeEmbeddings(AtLeastFloat32, nn.Embedding):
    """A row for each code, float32 whatever the model is cast to."""


class LinearInItsPrecision(nn.Linear):
    """A linear layer that brings its inputs to its own precision, which hooks may change while it runs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.to(self.weight.dtype))


class ScaleEmbedding(nn.Module):
    """Which scale a position belongs to, and how many scales its image has (NextFlow sec. 2.2).

    A learnable embedding of the scale index, and a sinusoidal embedding of the number of scales through a linear map.
    Open in the paper: both begin at zero, and `<boi>` gets them as scale 1.
    """

    def __init__(self, max_scales: int, hidden_size: int):
        super().__init__()
        self.max_scales = max_scales
        self.index = nn.Embedding(max_scales + 2, hidden_size)  # 1..K, and K + 1 for an image's last codes
        self.length = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, scale_ids: torch.Tensor, num_scales: torch.Tensor) -> torch.Tensor:
        """(...) scale indices and numbers of scales, both at least 1 -> (..., D)."""
        indices = self.index(scale_ids)
        half = self.length.in_features // 2
        places = torch.arange(half, dtype=torch.float32, device=num_scales.device)
        frequencies = torch.exp(places * (-math.log(10_000) / half))
        angles = torch.arange(self.max_scales + 1, device=num_scales.device)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # one row for each number of scales
        return indices + F.embedding(num_scales, self.length(waves.to(indices.dtype)))


class NextFlowPreTrainedModel(LibraryModel):
    config_class = NextFlowConfig
    config: NextFlowConfig
    base_model_prefix = "model"
    input_modalities = ("text", "image")
    output_modalities = ("text", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "CodeEmbeddings", "ScaleEmbedding"]
    # float32 under float16, and what quantised loading leaves alone beside the heads
    _keep_in_fp32_modules = [rf"(?:model\.)?{name}" for name in ("vq_model", "connector", "scale_embedding")]
    _keep_in_fp32_modules_strict = ["vq_model", "code_embeddings"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, vision_tokenizer: bool = True, **kwargs):
        """As of the library's models.

        Args:
            vision_tokenizer: whether the one that `config.vision_tokenizer` refers to is loaded too.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if vision_tokenizer:
            hub = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in kwargs}
            model.base_model.bring_vision_tokenizer(**hub)
        model.base_model.vq_model.requires_grad_(False)  # loading replaces parameters and thaws them
        return loaded

    def __setattr__(self, name, value):
        if name == "peft_config":  # what PEFT sets on a model that it has just put adapters on
            place_adapters(self, value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        """Of copies and pickles. They have the forward of their class: one that a trainer has bound to this model, as
        TRL's do, would run this model's weights."""
        return {name: value for name, value in vars(self).items() if name != "forward" or not ismethod(value)}

    def train(self, mode: bool = True):
        """As of any module. Adapters that `PeftModel.add_adapter` has put on since find their places here."""
        if not are_placed(getattr(self, "peft_config", {})):
            self.peft_config = self.peft_config  # PEFT adds to it, which the model is not told
        return super().train(mode)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As of the library's models. `<boi>`, `<image>` and `<eoi>` keep their rows."""
        least = 1 + max(self.config.boi_token_id, self.config.image_token_id, self.config.eoi_token_id)
        if new_num_tokens is not None and new_num_tokens < least:
            raise ValueError(
                f"new_num_tokens must be at least {least}, which <boi>, <image> and <eoi> need, got {new_num_tokens}"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs) -> None:
        """As of the library's models; flex and FlashAttention are the decoder's alone, see [`NextFlowModel`]."""
        if isinstance(attn_implementation, str) and is_decoders_alone(attn_implementation):
            decoder = self.base_model.language_model
            decoder.set_attn_implementation(attn_implementation, **kwargs)
            self.config._attn_implementation = {"": decoder.config._attn_implementation}
        else:
            super().set_attn_implementation(attn_implementation, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ScaleEmbedding):
            init.zeros_(module.index.weight)
            init.zeros_(module.length.weight)
        elif isinstance(module, NextFlowModel):
            entries = module.code_embeddings.weight
            if self.config.vision_tokenizer is None and not getattr(entries, "_is_hf_initialized", False):
                init.copy_(entries, module.vq_model.quantizer())  # which ZeRO-3, that loads a model in shards, cannot


class NextFlowAttention(Qwen2_5_VLAttention):
    """Qwen's, which can also read the parts of a step [`Apart`] from each other, whatever their lengths.

    That a block is not causal could also be said by the decoder's own argument `is_causal`, which however writes it
    into the config that all calls share.
    """

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        cache, mask, rotary = (kwargs.get(name) for name in (CACHE, "attention_mask", "position_embeddings"))
        if isinstance(cache, Apart):
            return self._attend_apart(hidden_states, cache.parts, mask, rotary), None
        if isinstance(mask, Segments):
            whole = Part(cache, hidden_states.shape[:2], in_block=False)
            return self._attend_apart(hidden_states, [whole], [mask], rotary), None
        return super().forward(hidden_states, *args, **kwargs)

    def _attend_apart(
        self, hidden_states: torch.Tensor, parts: Sequence[Part], masks: Sequence, rotary: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        states = [project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections]
        states[:2] = apply_rotary_pos_emb(*states[:2], *rotary)
        sizes = [rows * length for rows, length in (part.shape for part in parts)]
        of_parts = zip(*(each.transpose(1, 2).flatten(0, 1).split(sizes) for each in states))
        own = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        outputs = []
        for part, mask, of_part in zip(parts, masks, of_parts):
            query, key, value = (each.unflatten(0, part.shape).transpose(1, 2) for each in of_part)
            key, value = part.read(key, value, self.layer_idx)
            if isinstance(mask, Segments):
                output = attend_by_segments(own, self, query, key, value, mask, **options)
            else:
                causality = {"is_causal": False} if part.in_block else {}
                output, _ = own(self, query, key, value, mask, **options, **causality)
            outputs.append(output.flatten(0, 1))
        return self.o_proj(torch.cat(outputs).flatten(1).view(*hidden_states.shape[:2], -1))


class NextFlowTextModel(Qwen2_5_VLTextModel):
    """Qwen2.5-VL's text decoder with float32 rotary frequencies, scale blocks, and flex attention allowed."""

    _supports_flex_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = NextFlowRotaryEmbedding(config=config)
        for layer in self.layers:
            layer.self_attn.__class__ = NextFlowAttention  # has the same weights


@dataclass
class NextFlowModelOutput(BaseModelOutputWithPast):
    """Output of [`NextFlowModel`] where labels came.

    Attributes:
        layout, image_codes: what was made of the inputs, unless a layout came with them.
    """

    layout: SequenceLayout | None = None
    image_codes: torch.LongTensor | None = None


class NextFlowModel(NextFlowPreTrainedModel):
    """The decoder with its visual inputs, without heads.

    Under `attn_implementation="flex_attention"` or FlashAttention the vision tokenizer stays with SDPA: its attention
    has no masks that blocks could be left out of, it is float32, which FlashAttention does not take, and its codes
    must not depend on the decoder's attention.
    """

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        if is_decoders_alone(config._attn_implementation):
            config.vq_config._attn_implementation = "sdpa"
        width, code_dim = config.text_config.hidden_size, config.vq_config.code_dim
        self.language_model = NextFlowTextModel(config.text_config)
        vq_class = NextFlowVQModel if config.vision_tokenizer is None else AbsentVisionTokenizer
        self.vq_model = vq_class(config.vq_config).requires_grad_(False)
        self.code_embeddings = CodeEmbeddings(config.vq_config.codebook_size, code_dim, dtype=torch.float32)
        self.connector = nn.Sequential(
            LinearInItsPrecision(code_dim, width), nn.GELU(), LinearInItsPrecision(width, width)
        )
        self.schedules = self.vq_model.schedules
        self.scale_embedding = ScaleEmbedding(self.schedules.max_scales, width)
        self.post_init()

    def bring_vision_tokenizer(self, **hub) -> None:
        """Load the vision tokenizer where `config.vision_tokenizer` refers to one, see there; `hub`: arguments of
        `snapshot_download`.

        Raises:
            ValueError: if it is not there, or another one is.
        """
        if self.config.vision_tokenizer is not None:
            devices = (parameter.device for parameter in self.parameters())  # "meta" of what is offloaded
            device = next((device for device in devices if device.type != "meta"), "cpu")
            self.vq_model = load_referred_to(self.config, **hub).to(device)
            self.config.vision_tokenizer = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts the model has its vision tokenizer, also where it was loaded without."""
        absent, reference = self.vq_model, self.config.vision_tokenizer
        self.bring_vision_tokenizer()
        try:
            yield
        finally:
            self.vq_model, self.config.vision_tokenizer = absent, reference

    def marker_ids(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L): the ids of `<boi>`, `<image>` and `<eoi>` where their embeddings stand, else -1."""
        ids = inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.long)
        for token_id in (self.config.boi_token_id, self.config.image_token_id, self.config.eoi_token_id):
            row = self.get_input_embeddings()(ids.new_tensor(token_id)).to(inputs_embeds.device)
            ids[(inputs_embeds == row).all(dim=-1)] = token_id
        return ids

    def scale_inputs(self, codes: torch.Tensor, schedule: ScaleSchedule, scale: int) -> torch.Tensor:
        """(N, codes of the first scales) -> (N, l, D): what the block of scale `scale` (0-based; K = the further block
        of the last codes) holds, before its scale embedding, if these are the codes so far."""
        source = sum(offset < codes.shape[1] for offset in schedule.offsets) - 1
        target = min(scale, len(schedule) - 1)
        accumulate = self.config.feature_mode == "accumulated" and scale < len(schedule)
        entries_LNC = self.code_embeddings(codes).transpose(0, 1).to(codes.device)
        taps = scale_taps(schedule, source, target, accumulate, codes.device)  # the same for all pictures
        features_lNC = taps(entries_LNC.flatten(1)).unflatten(1, entries_LNC.shape[1:])
        return self.connector(features_lNC.transpose(0, 1)).to(codes.device)

    def image_codes_of(
        self,
        images: Sequence[ImageSpan],
        pixel_values: torch.Tensor | None,
        image_codes: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """The images' flat codes, as given or by encoding flat patches; open images have none, on `device`."""
        if pixel_values is not None and image_codes is not None:
            raise ValueError("give either pixel_values or image_codes, not both")
        if image_codes is not None:
            check_codes(self.config, "image_codes", image_codes, sum(image.num_codes for image in images))
            return image_codes
        closed = [image for image in images if not image.is_open]
        if pixel_values is None and closed:
            raise ValueError(f"input_ids hold {len(closed)} images, but neither pixel_values nor image_codes came")
        if pixel_values is None:
            return joined([], device)
        for image in closed:
            if image.num_scales < len(image.schedule):
                raise ValueError(
                    f"row {image.row} ends after scale {image.num_scales} of an image: give its codes as image_codes"
                )
        codes = self.encode_images(pixel_values, [image.schedule.final_grid for image in closed])
        return joined(codes, pixel_values.device)

    def encode_images(self, pixel_values: torch.Tensor, image_grid_hw: Sequence) -> list[torch.Tensor]:
        """Flat patches of images of any final grids, as the processor gives them -> each image's (L_i,) codes."""
        schedules = [self.schedules.by_grid(grid) for grid in image_grid_hw]
        whole = self.config.vq_config.image_size is not None  # pictures, not patches
        cells = [1 if whole else schedule.lengths[-1] for schedule in schedules]
        width = 3 * self.config.vq_config.patch_size**2
        if not whole and (pixel_values.ndim != 2 or pixel_values.shape[1] != width):
            raise ValueError(f"pixel_values must hold patches of {width} numbers, got {tuple(pixel_values.shape)}")
        check_rows("pixel_values", len(pixel_values), sum(cells))
        patches = pixel_values.split(cells)

        def encode(grid: Grid, members: list[int]) -> torch.Tensor:
            parts = [patches[index] for index in members]
            size = self.config.vq_config.patch_size
            return self.vq_model.encode(torch.cat(parts) if whole else unpatchify(torch.stack(parts), grid, size))

        return each_by_grid([schedule.final_grid for schedule in schedules], encode)

    @torch.compiler.disable  # what is laid out depends on values, and is cached
    def lay_out(
        self,
        input_ids: torch.Tensor,
        image_grid_hw: torch.Tensor | Sequence | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> tuple[SequenceLayout, torch.Tensor]:
        """What forward does first where no `layout` came: the layout and the flat codes; see [`build_layout`].

        Raises:
            ValueError: under `torch.export`, since what is laid out depends on values.
        """
        if torch.compiler.is_exporting():
            raise ValueError("an exported forward with images or labels takes a layout, see `build_layout`, got none")
        if image_codes is None or pixel_values is not None:
            images = find_images(self.config, input_ids, image_grid_hw)
            image_codes = self.image_codes_of(images, pixel_values, image_codes, input_ids.device)
        layout = build_layout(self.config, input_ids, image_grid_hw, image_codes=image_codes, **inputs)
        return layout, image_codes

    def embed_images(
        self, inputs_embeds: torch.Tensor, layout: SequenceLayout, image_codes: torch.Tensor
    ) -> torch.Tensor:
        """Put the visual inputs and the scale embeddings into (B, L, D) embeddings of the ids.

        In training every module runs once, whatever the images are, so that every weight has a gradient and devices
        that share it stay in step.

        Args:
            image_codes: flat codes as inputs.
        """
        if not (len(layout.image_places) or self.training):
            return inputs_embeds
        embeds = inputs_embeds.flatten(0, 1)
        layout = layout.to(embeds.device)
        visual = self.connector(layout.taps(self.code_embeddings(image_codes).to(embeds.device)))
        scale_ids, num_scales = (each.flatten()[layout.image_places] for each in (layout.scale_ids, layout.num_scales))
        embeds = embeds.index_copy(0, layout.slot_places, visual.to(embeds))
        embeds = embeds.index_add(0, layout.image_places, self.scale_embedding(scale_ids, num_scales).to(embeds))
        return embeds.view_as(inputs_embeds)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_input_codes: torch.LongTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        layout: SequenceLayout | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of whole sequences, or of text that continues a cache.

        Wherever the parts of the model are, what goes between them is on the inputs' device.

        Args:
            input_ids: (B, L); or (B, L, D) `inputs_embeds`, in which images stand where the rows of `<boi>`, `<image>`
                and `<eoi>` do.
            attention_mask: (B, past + L), 0 at padding; of text alone also (B, 1, L, keys).
            position_ids: (3, B, L) rows (s, i, j); computed from the ids where absent, as behind a cache of text. Of
                text alone also (B, L): where they begin again, another document does.
            pixel_values: (sum of final-grid cells, p*p*3) in [-1, 1], patches row-major, images in the order of
                `<boi>`; (images, 3, H, W) for a vision tokenizer with an `image_size`.
            image_codes: (sum of codes,), scale by scale, instead of `pixel_values`; of an image that ends its row cut
                after a block, the codes that its outputs predict.
            image_input_codes: (sum of codes of scales 1..K-1,), where inputs differ from the targets.
            image_grid_hw: (images, 2) final grids, one for each `<boi>`; a row's last `<boi>` may be open.
            document_ids: (B, L) for packed rows, -1 at padding.
            layout: what [`build_layout`] makes of the other inputs, where a loader has made it already; ids, grids
                and codes are then not looked at again, and nothing waits for the device.
            kwargs: `labels` and `shift_labels` go into the layout, see [`NextFlowModelOutput`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        beside = (attention_mask, past_key_values, image_grid_hw, document_ids, layout)
        if position_ids is not None and position_ids.ndim == 2 and all(each is None for each in beside):
            shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            document_ids = find_packed_sequence_indices(position_ids.expand(shape))  # as of the library's models
        targets = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels")}
        has_targets = any(each is not None for each in targets.values())
        is_text = image_grid_hw is None and document_ids is None and layout is None and not has_targets
        if image_grid_hw is None and layout is None:
            check_text(pixel_values, image_codes)
        # masks come prepared for steps over a static cache
        prepared = isinstance(attention_mask, dict)
        # who says of every pair whether it is seen, as a server of many requests does, lays the text out too
        is_continued = prepared or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4)
        valid = None if is_continued else attention_mask
        if position_ids is None:
            check_cache_of_text(past_key_values)
        needs_positions = position_ids is None and valid is not None  # without padding the decoder knows them
        if needs_positions or not is_text or self.training:  # a compiled step must not ask for the cache's length
            is_continued = is_continued or _is_filled(past_key_values)
        if is_continued and image_grid_hw is not None:
            raise ValueError("images cannot be given with a filled cache, or a mask of (B, heads, L, keys)")
        if is_continued and document_ids is not None:
            raise ValueError("document_ids cannot be given with a filled cache")
        reads_text = is_continued or (is_text and not self.training)  # in training every weight has a gradient
        if layout is not None and pixel_values is not None:
            raise ValueError("a layout goes with image_codes, got pixel_values")
        laid_out = {}
        if layout is None and (has_targets or not reads_text):
            ids = self.marker_ids(inputs_embeds) if input_ids is None else input_ids
            layout, image_codes = self.lay_out(
                ids,
                image_grid_hw,
                pixel_values,
                image_codes,
                attention_mask=valid[:, -ids.shape[1] :] if is_continued and valid is not None else valid,
                document_ids=document_ids,
                image_input_codes=image_input_codes,
                **targets,
            )
            laid_out = {"layout": layout, "image_codes": image_codes}
        if reads_text:
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            past = past_key_values.get_seq_length() if needs_positions and is_continued else 0
            if needs_positions and (not past or valid.shape[1] == past + inputs.shape[1]):
                position_ids = text_positions(inputs, valid, past)
            refuse_dense_mask(
                self.config.text_config, attention_mask["full_attention"] if prepared else attention_mask
            )
        else:
            if inputs_embeds is None:
                inputs_embeds = self.language_model.embed_tokens(input_ids).to(input_ids.device)
                input_ids = None
            if image_codes is None:
                if len(layout.slot_places):
                    raise ValueError(
                        f"the layout has {len(layout.slot_places)} <image> tokens, but no image_codes came"
                    )
                image_codes = layout.slot_places.new_empty(0)
            if image_input_codes is not None:
                image_codes = image_codes.index_copy(0, layout.coarse_places, image_input_codes.to(image_codes))
            names = adapter_names(self.connector) or adapter_names(self.code_embeddings)
            embed = partial(self.embed_images, inputs_embeds, layout, image_codes)
            inputs_embeds = each_by_its_adapter(self, names, embed)  # images of all rows are embedded as one
            block_ids = layout.block_ids if len(layout.slot_places) else None
            position_ids = layout.position_ids if position_ids is None else position_ids
            attention_mask = sequence_mask(
                self.config.text_config, inputs_embeds, valid, block_ids, document_ids, past_key_values
            )
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if layout is not None and isinstance(outputs.get(CACHE), Cache):
            outputs[CACHE].holds_images = bool(len(layout.slot_places))
        return NextFlowModelOutput(**outputs, **laid_out) if has_targets and laid_out else outputs


@dataclass
class NextFlowOutput(CausalLMOutputWithPast):
    """Output of [`NextFlowForConditionalGeneration`].

    Attributes:
        loss: weighted mean of the cross-entropies, and the z-loss asked for, where labels came.
        logits: (B, L, text rows + codes), or the rows asked for.
        token_losses: (B, L) float32 unweighted cross-entropies, detached, 0 where nothing is supervised.
        scale_ids, block_ids: (B, L) int64 of the [`SequenceLayout`], where labels came.
    """

    token_losses: torch.FloatTensor | None = None
    scale_ids: torch.LongTensor | None = None
    block_ids: torch.LongTensor | None = None


class NextFlowForConditionalGeneration(NextFlowPreTrainedModel, NextFlowGenerationMixin):
    """NextFlow with its text and code heads: reads and writes text and images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output", "code_head": "colwise_gather_output"}

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.model = NextFlowModel(config)
        self.lm_head = nn.Linear(width, config.text_vocab_size, bias=False)
        self.code_head = nn.Linear(width, config.vq_config.codebook_size, bias=False)
        self.post_init()
        self.generation_config._from_model_config = False  # of such a file, `image_generation` would not be read

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_input_codes: torch.LongTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        layout: SequenceLayout | None = None,
        loss_weights: torch.FloatTensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        z_loss: float = 0.0,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        logits_over: str = "all",
        **kwargs: Unpack[TransformersKwargs],
    ) -> NextFlowOutput:
        """See [`NextFlowModel.forward`] for the inputs.

        Args:
            labels: (B, L), -100 where nothing is supervised. At `<boi>` and `<image>` slots a value is only a marker;
                an image is supervised whole or not at all, and the model fills in its codes.
            shift_labels: (B, L) targets already aligned with the outputs, with the same markers, instead of `labels`.
                No parameter, since the library's Trainer expects every parameter with "label" in its name at once.
            loss_weights: (B, L) weights of the targets; by default text weighs 1 and the scales as eq. 2 says.
            num_items_in_batch: what the weighted sum is divided by; by default the sum of the weights. Where nothing
                is supervised the loss is 0 with it and NaN without, as of the library's models.
            z_loss: coefficient of the squared log-sum-exp in the loss, see [`joint_cross_entropy`].
            logits_to_keep: the last positions, or indices, to compute logits for; 0 = all.
            logits_over: `"all"` rows (text, then codes), `"text"` rows, `"codes"`, or `"none"`.
        """
        if logits_over not in ("all", "text", "codes", "none"):
            raise ValueError(f'logits_over must be "all", "text", "codes" or "none", got {logits_over!r}')
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_codes=image_codes,
            image_input_codes=image_input_codes,
            image_grid_hw=image_grid_hw,
            document_ids=document_ids,
            labels=labels,
            layout=layout,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if layout is None and isinstance(outputs, NextFlowModelOutput):
            layout, image_codes = outputs.layout, outputs.image_codes
        supervised = layout is not None and layout.supervised is not None
        hidden_BLD = outputs.last_hidden_state.to((input_ids if inputs_embeds is None else inputs_embeds).device)

        loss = token_losses_BL = None
        if supervised:
            layout = layout.to(hidden_BLD.device)
            places_N, weights_N = layout.supervised, layout.weights
            if loss_weights is not None:
                weights_N = loss_weights.flatten()[places_N]
            both = (self.lm_head, self.code_head)
            num_rows = self.config.text_vocab_size + self.config.vq_config.codebook_size

            def score(hidden_nD, targets_n, weights_n):
                return joint_cross_entropy(hidden_nD, both, num_rows, targets_n, weights_n, z_loss)

            inputs = hidden_BLD.flatten(0, 1)[places_N], self.targets_of(layout, image_codes), weights_N
            names = adapter_names(self.lm_head) or adapter_names(self.code_head)
            total, losses_N = sum_by_adapter(self, names, places_N // hidden_BLD.shape[1], score, *inputs)
            loss = total / (weights_N.sum() if num_items_in_batch is None else num_items_in_batch)
            token_losses_BL = losses_N.new_zeros(hidden_BLD.shape[:2])
            token_losses_BL.view(-1)[places_N] = losses_N

        logits = None
        if logits_over != "none":
            indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            kept = hidden_BLD[:, indices, :]
            heads = {"all": (self.lm_head, self.code_head), "text": (self.lm_head,), "codes": (self.code_head,)}
            parts = [head(kept).to(kept.device) for head in heads[logits_over]]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return NextFlowOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_losses=token_losses_BL,
            scale_ids=layout.scale_ids if supervised else None,
            block_ids=layout.block_ids if supervised else None,
            **{CACHE: outputs.get(CACHE)},
        )

    def targets_of(self, layout: SequenceLayout, image_codes: torch.Tensor | None) -> torch.Tensor:
        """(N,) targets of a layout's supervised positions over all rows, text before codes."""
        if image_codes is None or len(image_codes) == 0:
            return layout.targets
        code_ids_N = self.config.text_vocab_size + image_codes[layout.target_codes.clamp(min=0)]
        return torch.where(layout.target_codes >= 0, code_ids_N, layout.targets)


def _is_filled(cache: Cache | None) -> bool:
    """Pages of a server's cache, which is no `Cache`, lay the text out by themselves."""
    return isinstance(cache, Cache) and cache.get_seq_length() > 0
