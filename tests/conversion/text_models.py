"""Tiny text models of every kind that conversion takes, with random weights large enough to matter."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXTS = ["user\na red circle above a blue square", "assistant\nIt is 42 to the left of 17.", "system\nBe brief."] * 3
SPECIAL_TOKENS = ["<s>", "</s>", "<spare_0>", "<spare_1>", "<spare_2>"]
LLAMA_TEMPLATE = """\
{{- bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}
"""


def llama_tokenizer(
    chat_template: str | None = LLAMA_TEMPLATE, unknown: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """A text tokenizer that knows nothing of Qwen's tokens for pictures and chats, pads with nothing, and has a chat
    template of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[unknown, *SPECIAL_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown, "model_max_length": 512}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def text_sizes(tokenizer, spare_rows: int) -> dict:
    return {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llama(tokenizer, **settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer, spare_rows=0) | settings))


def qwen2(tokenizer, **settings) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**text_sizes(tokenizer, spare_rows=7) | settings))  # Qwen pads its embedding


def qwen2_5_vl(tokenizer, tie_word_embeddings: bool = False, **settings) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = text_sizes(tokenizer, spare_rows=7) | {"rope_parameters": rope} | settings
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie_word_embeddings)
    return Qwen2_5_VLForConditionalGeneration(config)


def save(model, tokenizer, folder: Path, dtype=torch.float32, layout: str = "saved"):
    """Write a model with random weights as transformers 5 holds it (`own`), as it saves it (`saved`), or as the Hub's
    first checkpoints of Qwen2.5-VL are (`hub`: flat configuration too), and load it again.

    Biases that Qwen2 has no place for are left zero.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                continue
            parameter.normal_(std=0.3)
    shards = "20KB" if layout == "hub" else "5GB"
    model.to(dtype).save_pretrained(folder, save_original_format=layout != "own", max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    if layout == "hub":
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "model_type": "qwen2_5_vl", "torch_dtype": config.pop("dtype")}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        (folder / "config.json").write_text(json.dumps(config | text))
    # only loading casts weights and leaves the rotary frequencies
    auto = type(model) if model.config.model_type == "qwen2_5_vl" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()
