"""Configurations of the vision tokenizer and of the transformer. Every choice the paper leaves open is a field here."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from .scales import PAPER_LEVELS, ScheduleTable, paper_schedules

SO400M_NAFLEX = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 16,
    "num_patches": 256,
    "vision_use_head": False,
}


@strict
class NextFlowVQConfig(PreTrainedConfig):
    r"""
    Configuration of [`NextFlowVQModel`], the dual-codebook multi-scale vision tokenizer (NextFlow sec. 2.1). The
    defaults are the full size: SigLIP2-so400m-naflex beside a CNN with 16x downsampling.

    Args:
        semantic_config (`Siglip2VisionConfig` or `dict`, *optional*):
            The semantic encoder, which is also the size of the teacher it is distilled from.
        semantic_feature_layer (`int`, defaults to -2):
            Which of the encoder's hidden states the semantic branch reads (TokenFlow: before the last layer).
        semantic_decoder_layers (`int`, defaults to 3):
            Transformer layers from quantised semantic entries back to the teacher's features.
        semantic_dim, pixel_dim (`int`, defaults to 32 and 8):
            Channels of the two halves of a codebook entry.
        codebook_size (`int`, defaults to 32768):
            Entries of the codebook; one index selects both halves.
        semantic_weight, pixel_weight (`float`, default to 1.0):
            Weights of the two squared distances in the lookup (sec. 2.1).
        patch_size (`int`, defaults to 16):
            Pixels along the edge of one cell of the final grid: the downsampling of both branches.
        base_channels (`int`, defaults to 128), channel_multipliers (`list[int]`, defaults to `[1, 1, 2, 2, 4]`):
            Width of the CNN at each resolution, finest first, each half of the one before.
        stem_stride (`int`, defaults to 1):
            Edge of the pixel squares folded into channels before the first convolution (1 = none, as in TokenFlow);
            `stem_stride * 2 ** (len(channel_multipliers) - 1)` must equal `patch_size`.
        latent_channels (`int`, defaults to 256):
            Channels between the CNN and the codebook's pixel half.
        encoder_blocks, decoder_blocks (`int`, default to 2 and 6):
            Residual blocks at each resolution. Open in the paper: how the pixel decoder's capacity is doubled in the
            third training stage; here it is the depth, 3 blocks (TokenFlow's) becoming 6.
        scale_schedules (`list`, *optional*):
            Full-length schedules as lists of `[height, width]`; `None` is table 14.
        levels (`dict[str, int]`, *optional*):
            Level name to number of scales; `None` is `{"256": 12, "512": 16, "1024": 18}`.
    """

    model_type = "nextflow_vq"
    base_config_key = "vq_config"
    sub_configs_defaults = {"semantic_config": Siglip2VisionConfig}

    semantic_config: dict | PreTrainedConfig | None = None
    semantic_feature_layer: int = -2
    semantic_decoder_layers: int = 3
    semantic_dim: int = 32
    pixel_dim: int = 8
    codebook_size: int = 32768
    semantic_weight: float | int = 1.0
    pixel_weight: float | int = 1.0
    patch_size: int = 16
    base_channels: int = 128
    channel_multipliers: list[int] | None = None
    stem_stride: int = 1
    latent_channels: int = 256
    encoder_blocks: int = 2
    decoder_blocks: int = 6
    scale_schedules: list | None = None
    levels: dict[str, int] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.semantic_config is None:
            self.semantic_config = dict(SO400M_NAFLEX)
        self.channel_multipliers = self.channel_multipliers or [1, 1, 2, 2, 4]
        self.levels = self.levels or dict(PAPER_LEVELS)
        super().__post_init__(**kwargs)
        downsampling = self.stem_stride * 2 ** (len(self.channel_multipliers) - 1)
        if downsampling != self.patch_size:
            raise ValueError(
                f"stem_stride {self.stem_stride} and {len(self.channel_multipliers)} channel_multipliers downsample "
                f"by {downsampling}, but patch_size is {self.patch_size}"
            )
        if self.semantic_config.patch_size != self.patch_size:
            raise ValueError(
                f"both branches must share one grid: semantic patch_size {self.semantic_config.patch_size}, "
                f"pixel patch_size {self.patch_size}"
            )

    @property
    def code_dim(self) -> int:
        """Channels of a whole codebook entry, semantic half first."""
        return self.semantic_dim + self.pixel_dim

    def schedule_table(self) -> ScheduleTable:
        """The schedules this tokenizer knows."""
        return ScheduleTable(self.scale_schedules or paper_schedules(), self.levels, self.patch_size)
