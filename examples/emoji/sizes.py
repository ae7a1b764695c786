"""The sizes of the emoji models: what two CPU cores can train."""

from transformers import PreTrainedTokenizerFast

from transformers_nextflow import NextFlowConfig, NextFlowVQConfig

# (1, 1) to the 32 pixel level's grid, then to the 64 pixel level's; areas of one index are alike, as in table 14
SCHEDULES = [
    [[1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6], [8, 8]],
    [[1, 1], [1, 2], [2, 4], [3, 6], [4, 7], [4, 8], [6, 12]],
    [[1, 1], [2, 1], [4, 2], [6, 3], [7, 4], [8, 4], [12, 6]],
    [[1, 1], [1, 3], [2, 5], [2, 6], [3, 9], [4, 12], [5, 15]],
]
LEVELS = {"32": 4, "64": 7}
PATCH_SIZE = 8

TEACHER_VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "patch_size": PATCH_SIZE,
    "num_patches": 64,
}
TEACHER_TEXT = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}
TEACHER_VOCABULARY = 3072


def vq_config() -> NextFlowVQConfig:
    """The vision tokenizer before its last stage, which doubles the pixel decoder's depth."""
    return NextFlowVQConfig(
        semantic_config={**TEACHER_VISION, "vision_use_head": False},
        semantic_decoder_layers=2,
        semantic_dim=16,
        pixel_dim=16,
        codebook_size=4096,
        patch_size=PATCH_SIZE,
        stem_stride=4,
        base_channels=96,
        channel_multipliers=[1, 2],
        latent_channels=64,
        encoder_blocks=2,
        decoder_blocks=3,
        scale_schedules=SCHEDULES,
        levels=LEVELS,
    )


SPECIAL_IDS = {"boi_token_id": "<|vision_start|>", "eoi_token_id": "<|vision_end|>", "image_token_id": "<|image_pad|>"}


def nextflow_config(text_tokenizer: PreTrainedTokenizerFast, vq: NextFlowVQConfig, **overrides) -> NextFlowConfig:
    """The transformer: 8 layers of width 256, every mechanism the library's default."""
    ids = {name: text_tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
    return NextFlowConfig(
        text_config={
            "vocab_size": len(text_tokenizer),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": text_tokenizer.eos_token_id,
            "pad_token_id": text_tokenizer.pad_token_id,
        },
        vq_config=vq,
        tie_word_embeddings=True,
        **ids | overrides,
    )
