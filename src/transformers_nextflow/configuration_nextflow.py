"""Configurations of the vision tokenizer and the transformer. Every choice the paper leaves open is a field here."""

from typing import TYPE_CHECKING, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.vit.configuration_vit import ViTConfig

from .cache_name import CACHE
from .image_generation import ImageGenerationConfig
from .remote_code import ConfigBringsCode
from .scales import PAPER_LEVELS, ScheduleTable, schedule_table

if TYPE_CHECKING:  # what a configuration has once it is made is more than what it is made from
    from typing import Any as Pictures
    from typing import Any as SubConfig
else:
    SubConfig = PreTrainedConfig | dict | None  # in this order, or checks write all of a configuration into an error
    Pictures = dict | ImageGenerationConfig | None

# transformers' model types: the first reads any grid, the others one size
SEMANTIC_ENCODERS = ("siglip2_vision_model", "siglip_vision_model", "clip_vision_model")

SO400M_NAFLEX = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 16,
    "num_patches": 256,
    "vision_use_head": False,
}

QWEN2_5_7B_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@strict
class NextFlowVQConfig(ConfigBringsCode, PreTrainedConfig):
    r"""
    Configuration of [`NextFlowVQModel`], the dual-codebook multi-scale vision tokenizer (NextFlow sec. 2.1). The
    defaults are the full size: SigLIP2-so400m-naflex beside a CNN with 16x downsampling.

    Args:
        semantic_config (`Siglip2VisionConfig`, `SiglipVisionConfig`, `CLIPVisionConfig` or `dict`, *optional*):
            The semantic encoder: SigLIP2-naflex, which reads any grid, or one of TokenFlow's of a fixed size; a `dict`
            names another than the first by its `model_type`.
        semantic_feature_layer (`int`, *optional*, defaults to -2):
            Which of the encoder's hidden states the semantic branch reads (TokenFlow's SigLIP: before the last layer);
            `None` is its output after the last norm (TokenFlow's CLIP).
        semantic_mean, semantic_deviation (`list[float]`, *optional*):
            What the semantic encoder's pixels are normalised by, after [-1, 1] became [0, 1]; `None` leaves [-1, 1].
        semantic_decoder_layers (`int`, defaults to 3):
            Transformer layers from quantised semantic entries back to the teacher's features.
        semantic_decoder_config (`ViTConfig`, *optional*):
            TokenFlow's fixed-size semantic decoder; `None` is one of SigLIP2-naflex layers, for any grid.
        teacher_dim (`int`, *optional*):
            Width of the teacher's features, which the semantic decoder estimates; `None` is the semantic encoder's.
        semantic_dim, pixel_dim (`int`, defaults to 32 and 8):
            Channels of the two halves of a codebook entry.
        codebook_size (`int`, defaults to 32768):
            Entries of the codebook; one index selects both halves.
        semantic_weight, pixel_weight (`float`, default to 1.0):
            Weights of the two squared distances in the lookup (sec. 2.1).
        normalize_entries (`bool`, defaults to `True`):
            Whether both halves are L2-normalised, entries and queries alike (TokenFlow); `False` is VAR's plain
            Euclidean lookup, whose short entries leave flat regions alone and so make fine scales predictable.
        patch_size (`int`, defaults to 16):
            Pixels along the edge of one cell of the final grid: the downsampling of both branches.
        image_size (`int`, *optional*):
            Edge of the only pictures there are, where it is not the grid's times `patch_size`: TokenFlow's SigLIP
            reads 384 x 384 pixels on a grid of 27 x 27, and the CNN the picture resized to 432 x 432.
        base_channels (`int`, defaults to 128), channel_multipliers (`list[int]`, defaults to `[1, 1, 2, 2, 4]`):
            Width of the CNN at each resolution, finest first, each half of the one before.
        stem_stride (`int`, defaults to 1):
            Edge of the pixel squares folded into channels before the first convolution (1 = none, as in TokenFlow);
            `stem_stride * 2 ** (len(channel_multipliers) - 1)` must equal `patch_size`.
        latent_channels (`int`, defaults to 256):
            Channels between the CNN and the codebook's pixel half.
        decoder_base_channels (`int`, *optional*):
            `base_channels` of the pixel decoder, by default the same (TokenFlow's enhanced decoder: twice as many).
        norm_groups (`int`, *optional*):
            Groups of the CNN's normalisation (TokenFlow: 32); `None` is 32, and fewer below 128 channels.
        attention (`str`, defaults to `"single"`):
            Attention of the CNN at the coarsest resolution: once, after the first residual block (`"single"`), or
            after each, with two more residual blocks and attention between them next to the codes (`"dense"`,
            TokenFlow's).
        encoder_blocks, decoder_blocks (`int`, default to 2 and 6):
            Residual blocks at each resolution. Open in the paper: how the pixel decoder's capacity is doubled in the
            third training stage; here it is the depth, 3 blocks (TokenFlow's) becoming 6.
        scale_schedules (`list`, *optional*):
            Full-length schedules as lists of `[height, width]`; `None` is table 14.
        levels (`dict[str, int]`, *optional*):
            Level name to number of scales; `None` is `{"256": 12, "512": 16, "1024": 18}`.
        training_stages (`list[str]`, *optional*):
            Stages of training (sec. 3.1) that the weights have begun, in order. After a `"joint"` one the semantic
            encoder is its own teacher no more, after a `"decoder"` one the pixel decoder has its twofold capacity.
    """

    model_type = "nextflow_vq"
    base_config_key = "vq_config"
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_nextflow.NextFlowVQConfig",
        "AutoModel": "modeling_nextflow_vq.NextFlowVQModel",
    }
    sub_configs_defaults = {
        "semantic_config": SubConfigSpec(AutoConfig, model_type="siglip2_vision_model"),
        "semantic_decoder_config": SubConfigSpec(ViTConfig, optional=True),
    }

    semantic_config: SubConfig = None
    semantic_feature_layer: int | None = -2
    semantic_mean: list[float] | None = None
    semantic_deviation: list[float] | None = None
    semantic_decoder_layers: int = 3
    semantic_decoder_config: SubConfig = None
    teacher_dim: int | None = None
    semantic_dim: int = 32
    pixel_dim: int = 8
    codebook_size: int = 32768
    semantic_weight: float | int = 1.0
    pixel_weight: float | int = 1.0
    normalize_entries: bool = True
    patch_size: int = 16
    image_size: int | None = None
    base_channels: int = 128
    channel_multipliers: list[int] | None = None
    stem_stride: int = 1
    latent_channels: int = 256
    decoder_base_channels: int | None = None
    norm_groups: int | None = None
    attention: str = "single"
    encoder_blocks: int = 2
    decoder_blocks: int = 6
    scale_schedules: list | None = None
    levels: dict[str, int] | None = None
    training_stages: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.semantic_config is None:
            self.semantic_config = dict(SO400M_NAFLEX)
        self.channel_multipliers = self.channel_multipliers or [1, 1, 2, 2, 4]
        self.levels = self.levels or dict(PAPER_LEVELS)
        super().__post_init__(**kwargs)
        if self.attention not in ("single", "dense"):
            raise ValueError(f'attention must be "single" or "dense", got {self.attention!r}')
        if self.semantic_config.model_type not in SEMANTIC_ENCODERS:
            known = ", ".join(SEMANTIC_ENCODERS)
            raise ValueError(f"the semantic encoder must be one of {known}, got {self.semantic_config.model_type}")
        if self.semantic_config.model_type != "siglip2_vision_model" and self.semantic_decoder_config is None:
            raise ValueError("a semantic encoder of a fixed size needs a semantic_decoder_config")
        if (self.semantic_mean is None) != (self.semantic_deviation is None):
            raise ValueError("semantic_mean and semantic_deviation must be given together")
        downsampling = self.stem_stride * 2 ** (len(self.channel_multipliers) - 1)
        if downsampling != self.patch_size:
            raise ValueError(
                f"stem_stride {self.stem_stride} and {len(self.channel_multipliers)} channel_multipliers downsample "
                f"by {downsampling}, but patch_size is {self.patch_size}"
            )
        if self.image_size is not None:
            self._check_image_size()
        elif self.semantic_config.patch_size != self.patch_size:
            raise ValueError(
                f"both branches must share one grid: semantic patch_size {self.semantic_config.patch_size}, "
                f"pixel patch_size {self.patch_size}"
            )

    def _check_image_size(self) -> None:
        edge = self.image_size // self.semantic_config.patch_size
        schedules = self.scale_schedules or []
        if len(schedules) != 1 or len(self.levels) != 1 or list(schedules[0][-1]) != [edge, edge]:
            raise ValueError(
                f"image_size {self.image_size} in semantic patches of {self.semantic_config.patch_size} needs exactly "
                f"one scale schedule, which ends in the grid ({edge}, {edge})"
            )

    @property
    def code_dim(self) -> int:
        """Channels of a whole codebook entry, semantic half first."""
        return self.semantic_dim + self.pixel_dim

    def schedule_table(self) -> ScheduleTable:
        """The schedules this tokenizer knows."""
        return schedule_table(self.scale_schedules, self.levels, self.patch_size, self.image_size)


@strict
class NextFlowConfig(ConfigBringsCode, PreTrainedConfig):
    r"""
    Configuration of [`NextFlowForConditionalGeneration`]: Qwen2.5-VL's text decoder, which reads and writes text by
    next token and images by next scale (NextFlow sec. 2.2). The defaults are the 7B model.

    Args:
        text_config (`Qwen2_5_VLTextConfig` or `dict`, *optional*):
            The decoder. Its `rope_parameters["mrope_section"]` deals the rotary channels to the axes (counter, row,
            column). Open in the paper; default `[1] * (head_dim // 2)`, in turn over the frequencies, so that every
            axis gets high and low ones. Qwen's contiguous sections are possible. Text is unaffected by either.
        vq_config (`NextFlowVQConfig` or `dict`, *optional*):
            The vision tokenizer, frozen in transformer training.
        boi_token_id, eoi_token_id, image_token_id (`int`):
            Qwen's vision_start, vision_end and image_pad; no text row is added or changed. Code ids follow the text
            rows: id = `text_config.vocab_size` + code.
        feature_mode (`str`, defaults to `"residual"`):
            The input of the next scale: one scale's own entries (`"residual"`, the paper) or VAR's running sum
            (`"accumulated"`, for comparison).
        position_scale (`float`, *optional*):
            `C` of eq. 1. Open in the paper; `None` is the finest grid's edge (64 for table 14).
        condition_last_scale (`bool`, defaults to `True`):
            Whether images given as input carry one further block with their last scale's codes, which next-scale
            inputs never hold. `False` is the paper; a model that trains without it can hardly copy what an edit leaves
            as it is (`benchmarks/paper/condition_images.py`).
        scale_loss_alpha (`float`, defaults to 0.9):
            Exponent of the scale weights in the loss (eq. 2).
        image_generation (`dict` or `ImageGenerationConfig`, *optional*):
            How pictures are drawn where a call says nothing. A `dict` goes over what is there already, also by
            `from_pretrained(..., image_generation={...})`, and what is None in it says nothing.
        vision_tokenizer (`dict`, *optional*):
            Of a checkpoint without its vision tokenizer: the `model` that has it, a folder or Hub id (whose `revision`
            may be given), and the `sha256` of what its codes depend on. `from_pretrained` brings it from there.
    """

    model_type = "nextflow"
    sub_configs_defaults = {"text_config": Qwen2_5_VLTextConfig, "vq_config": NextFlowVQConfig}
    keys_to_ignore_at_inference = [CACHE, "token_losses", "scale_ids", "block_ids"]
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_nextflow.NextFlowConfig",
        "AutoModel": "modeling_nextflow.NextFlowModel",
        "AutoModelForCausalLM": "modeling_nextflow.NextFlowForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_nextflow.NextFlowForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_nextflow.NextFlowForConditionalGeneration",
    }

    text_config: SubConfig = None
    vq_config: SubConfig = None
    boi_token_id: int = 151652
    eoi_token_id: int = 151653
    image_token_id: int = 151655
    feature_mode: str = "residual"
    position_scale: float | int | None = None
    condition_last_scale: bool = True
    scale_loss_alpha: float | int = 0.9
    image_generation: Pictures = None
    vision_tokenizer: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs: bool = False, **kwargs):
        """As of the library's configurations. To the Auto classes, which ask for what a configuration does not use,
        `vision_tokenizer=False` is an argument of the model's `from_pretrained`."""
        is_for_model = return_unused_kwargs and isinstance(kwargs.get("vision_tokenizer"), bool)
        of_model = {"vision_tokenizer": kwargs.pop("vision_tokenizer")} if is_for_model else {}
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        return (config, unused | of_model) if return_unused_kwargs else config

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = dict(QWEN2_5_7B_TEXT)
        super().__post_init__(**kwargs)
        if others := set(self.text_config.layer_types) - {"full_attention"}:
            raise ValueError(f"scale blocks need layers of full attention, got {', '.join(sorted(others))}")
        rope = self.text_config.rope_parameters
        half = self.text_config.hidden_size // self.text_config.num_attention_heads // 2
        if sum(rope.setdefault("mrope_section", [1] * half)) != half:
            raise ValueError(f"mrope_section must sum to half the head size, {half}, got {rope['mrope_section']}")
        if self.feature_mode not in ("residual", "accumulated"):
            raise ValueError(f'feature_mode must be "residual" or "accumulated", got {self.feature_mode!r}')
        for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} must be a text row, 0 to {self.text_config.vocab_size - 1}, got {getattr(self, name)}"
                )

    def __setattr__(self, key, value):
        if key == "image_generation":
            if not isinstance(value, ImageGenerationConfig):
                before = ImageGenerationConfig(**self.__dict__.get(key) or {})
                value = before.updated(**value or {})
            value = value.to_dict()
        super().__setattr__(key, value)

    @property
    def text_vocab_size(self) -> int:
        """Rows of the text embedding; code ids begin here."""
        return self.text_config.vocab_size

    @property
    def finest_edge(self) -> float:
        """`C` of eq. 1."""
        return float(self.position_scale or self.vq_config.schedule_table().finest_edge)
