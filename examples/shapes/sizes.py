"""The sizes of the shapes model: what a small computer can train to master the world."""

from transformers import PreTrainedTokenizerFast

from transformers_nextflow import NextFlowConfig, NextFlowVQConfig

# colours and arrangement of the whole picture, colours and patterns of the cells in which objects stand, the same of
# small windows
SCHEDULES = [
    [[1, 1], [1, 1], [2, 2], [2, 2], [4, 4], [8, 8]],
    [[1, 1], [1, 1], [2, 3], [2, 3], [4, 6], [8, 12]],
    [[1, 1], [1, 1], [3, 2], [3, 2], [6, 4], [12, 8]],
]
SCALE_ENTRIES = [64, 192, 128, 256, 1280, 1344]
LEVELS = {"64": 6}
PATCH_SIZE = 8
CANVASES = ((64, 64), (64, 96), (96, 64))  # (height, width)
CANVAS_WEIGHTS = (0.8, 0.1, 0.1)

TEACHER_VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": PATCH_SIZE,
    "num_patches": 64,
}
TEACHER_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

SPECIAL_IDS = {"boi_token_id": "<|vision_start|>", "eoi_token_id": "<|vision_end|>", "image_token_id": "<|image_pad|>"}


def vq_config(decoder_blocks: int) -> NextFlowVQConfig:
    """The tokenizer; the pixel decoder has `decoder_blocks` 1 until its own stage doubles it."""
    return NextFlowVQConfig(
        semantic_config={**TEACHER_VISION, "vision_use_head": False},
        semantic_decoder_layers=2,
        semantic_dim=16,
        pixel_dim=66,
        semantic_weight=0.01,
        padding_mode="replicate",
        normalize_entries=False,
        codebook_size=sum(SCALE_ENTRIES),
        scale_entries=SCALE_ENTRIES,
        pixel_encoder="figure_ground",
        patch_size=PATCH_SIZE,
        stem_stride=8,
        base_channels=192,
        channel_multipliers=[1],
        latent_channels=64,
        decoder_blocks=decoder_blocks,
        scale_schedules=SCHEDULES,
        levels=LEVELS,
    )


def nextflow_config(text_tokenizer: PreTrainedTokenizerFast, vq: NextFlowVQConfig, **overrides) -> NextFlowConfig:
    """The transformer: 6 layers of width 256."""
    ids = {name: text_tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
    return NextFlowConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": text_tokenizer.eos_token_id,
            "pad_token_id": text_tokenizer.pad_token_id,
        },
        vq_config=vq,
        **{
            "condition_last_scale": True,
            "feature_mode": "accumulated",
            "coordinate_frequencies": 2,
            **ids,
            **overrides,
        },
    )
