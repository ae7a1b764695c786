"""GGUF files into NextFlow: the logits of what transformers reads, and what it would leave out without a word."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conversion.text_models import LLAMA_TEMPLATE, llama, llama_tokenizer, qwen2, save
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.cli import main as command

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate alone")

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main(arguments: list[str]) -> int:
    return command(["convert", "language-model", *arguments])


def gguf_name(name: str) -> str:
    name, kind = name.rsplit(".", 1)
    if name in OUTER:
        return f"{OUTER[name]}.{kind}"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order for Llama: channels that rotate together are neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(
    model, tokenizer, path: Path, architecture: str, more: dict | None = None, blocks: bool = False, scaling: str = ""
) -> None:
    """A model and its text tokenizer as llama.cpp's files have them, float32, or with linear layers in blocks of 4
    bits."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    special = set(tokenizer.all_special_tokens) | {"<spare_0>", "<spare_1>", "<spare_2>"}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(LLAMA_TEMPLATE)
    tensors = {gguf_name(name): tensor for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    for name, tensor in (tensors | (more or {})).items():
        if architecture == "llama" and ".attn_q." in name:
            tensor = paired(tensor, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in name:
            tensor = paired(tensor, config.num_key_value_heads)
        if blocks and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges_of(tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


@pytest.fixture(scope="module")
def vq_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    tiny_model.model.vq_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("blocks", [False, True], ids=["float32", "blocks"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("build, architecture", [(llama, "llama"), (qwen2, "qwen2")])
@torch.no_grad()
def test_logits_and_chats_are_the_files(build, architecture, tied, blocks, vq_folder, tmp_path):
    tokenizer = llama_tokenizer(unknown="<unk>" if build is llama else "<|endoftext|>")  # every Qwen has the latter
    rope = {"rope_type": "default", "rope_theta": 2e4}
    model = build(tokenizer, tie_word_embeddings=tied, rope_parameters=rope)
    written = save(model, tokenizer, tmp_path / "source")
    path = tmp_path / "model.gguf"
    write(written, tokenizer, path, architecture, blocks=blocks)
    assert main([str(path), str(vq_folder), str(tmp_path / "out")]) == 0
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("a red circle above a blue square", return_tensors="pt").input_ids
    logits = model(input_ids=ids, logits_over="text").logits
    rows = [row for row in range(written.config.vocab_size) if row not in new_rows(model.config)]
    assert torch.equal(logits[..., rows], source(input_ids=ids).logits[..., rows])
    if not blocks:
        torch.testing.assert_close(logits[..., rows], written(input_ids=ids).logits[..., rows], rtol=1e-4, atol=1e-4)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    assert len(processor.tokenizer) <= model.config.text_vocab_size
    chat = [{"role": "user", "content": "a red circle"}]
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )
    assert processor.apply_chat_template(chat)["input_ids"].tolist() == [expected["input_ids"]]
    inputs = processor.apply_chat_template(chat, generation_mode="image")
    assert model.generate(**inputs, generation_mode="image", seed=0).shape == (1, 14)


def new_rows(config) -> set[int]:
    return {config.boi_token_id, config.eoi_token_id, config.image_token_id}


def refused(path: Path, vq_folder, tmp_path, capsys) -> str:
    assert main([str(path), str(vq_folder), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    tokenizer = llama_tokenizer()
    return save(llama(tokenizer), tokenizer, tmp_path_factory.mktemp("llama")), tokenizer


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_gate_inp.weight"])
def test_tensors_that_are_not_read_are_refused(name, tiny_llama, vq_folder, tmp_path, capsys):
    write(*tiny_llama, tmp_path / "model.gguf", "llama", more={name: torch.ones(32)})
    assert f"holds {name}, which is not read from GGUF" in refused(
        tmp_path / "model.gguf", vq_folder, tmp_path, capsys
    )


def test_scaled_rotary_embeddings_are_refused(tiny_llama, vq_folder, tmp_path, capsys):
    write(*tiny_llama, tmp_path / "model.gguf", "llama", scaling="yarn")
    error = refused(tmp_path / "model.gguf", vq_folder, tmp_path, capsys)
    assert "scales its rotary embedding (yarn)" in error


def test_other_architectures_are_refused(tiny_llama, vq_folder, tmp_path, capsys):
    write(*tiny_llama, tmp_path / "model.gguf", "gemma")
    error = refused(tmp_path / "model.gguf", vq_folder, tmp_path, capsys)
    assert "must hold one of llama, qwen2, got the architecture 'gemma'" in error


def test_a_file_that_lacks_a_tensor_is_refused(tiny_llama, vq_folder, tmp_path, capsys):
    model, tokenizer = tiny_llama
    model.config.num_hidden_layers += 1
    try:
        write(model, tokenizer, tmp_path / "model.gguf", "llama")
    finally:
        model.config.num_hidden_layers -= 1
    assert "it lacks model.layers.2." in refused(tmp_path / "model.gguf", vq_folder, tmp_path, capsys)


@pytest.mark.parametrize("size", [0, 10, 3000, -100])
def test_damaged_files_are_refused(size, tiny_llama, vq_folder, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    write(*tiny_llama, path, "llama")
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} cannot be loaded" in refused(path, vq_folder, tmp_path, capsys)


def test_a_file_that_is_not_there(vq_folder, tmp_path, capsys):
    assert "there is no file" in refused(tmp_path / "model.gguf", vq_folder, tmp_path, capsys)
