"""Qwen2.5-VL into NextFlow and back: equal logits, equal tensors, every layout, and what is refused."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextModel

from conversion.qwen2_5_vl import hub_key, main
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

ROOT = Path(__file__).parents[2]


def build_qwen(tokenizer, tied: bool, dtype=torch.bfloat16) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer) + 7,  # Qwen pads its embedding too
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    with tempfile.TemporaryDirectory() as folder:  # only loading casts weights and leaves the rotary frequencies
        model.to(dtype).save_pretrained(folder)
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def qwen(request, text_tokenizer):
    return build_qwen(text_tokenizer, request.param)


@pytest.fixture(scope="module")
def vq_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    tiny_model.model.vq_model.save_pretrained(folder)
    return folder


def save_layout(qwen, tokenizer, folder: Path, layout: str) -> Path:
    """As transformers 5 holds it, as it saves it, and as the Hub's first checkpoints are: flat configuration too."""
    shards = "20KB" if layout == "hub" else "5GB"
    qwen.save_pretrained(folder, save_original_format=layout != "own", max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    if layout == "hub":
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "model_type": "qwen2_5_vl", "torch_dtype": config.pop("dtype")}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        (folder / "config.json").write_text(json.dumps(config | text))
    return folder


@pytest.mark.parametrize("layout", ["own", "saved", "hub"])
def test_text_is_qwens_bit_for_bit_and_comes_back(layout, qwen, text_tokenizer, vq_folder, tiny_model, tmp_path):
    source = save_layout(qwen, text_tokenizer, tmp_path / "qwen", layout)
    assert main([str(source), str(vq_folder), str(tmp_path / "out"), "--max-shard-size", "40KB"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([text_tokenizer("a red circle above a blue square")["input_ids"]])
    with torch.no_grad():
        expected = qwen(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, logits_over="text").logits, expected)
    assert model.dtype == torch.bfloat16
    tied = qwen.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied

    own = model.model
    assert torch.equal(own.code_embeddings.weight, tiny_model.model.vq_model.quantizer.codebook())
    for name, tensor in tiny_model.model.vq_model.state_dict().items():
        assert torch.equal(own.vq_model.state_dict()[name], tensor.to(own.vq_model.state_dict()[name].dtype)), name
    assert model.code_head.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert own.connector[0].weight.std() > 0 and not own.scale_embedding.index.weight.any()

    assert main(["--back", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    sources = {k: v for k, v in qwen.state_dict().items() if hub_key(k) and not (tied and k == "lm_head.weight")}
    assert back.keys() == {hub_key(name) for name in sources}
    assert all(torch.equal(back[hub_key(name)], tensor) for name, tensor in sources.items())


def test_a_fresh_process_loads_it_plainly(text_tokenizer, vq_folder, tmp_path):
    qwen = build_qwen(text_tokenizer, tied=False)
    source = save_layout(qwen, text_tokenizer, tmp_path / "qwen", "saved")
    assert main([str(source), str(vq_folder), str(tmp_path / "out")]) == 0
    ids = torch.tensor([text_tokenizer("a red circle")["input_ids"]])
    with torch.no_grad():
        save_file({"ids": ids, "logits": qwen(input_ids=ids).logits}, tmp_path / "expected.safetensors")
    script = """
import sys, torch, transformers_nextflow
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor
model, expected = AutoModelForMultimodalLM.from_pretrained("out"), load_file("expected.safetensors")
processor = AutoProcessor.from_pretrained("out")
inputs = processor.apply_chat_template([{"role": "user", "content": "a red circle"}], generation_mode="image")
assert model.generate(**inputs, generation_mode="image", seed=0).shape == (1, 14)
assert torch.equal(model(input_ids=expected["ids"], logits_over="text").logits, expected["logits"])
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(text_tokenizer, tmp_path_factory):
    qwen = build_qwen(text_tokenizer, tied=False)
    return save_layout(qwen, text_tokenizer, tmp_path_factory.mktemp("qwen"), "saved")


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the source to be damaged, with its tensors."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_dtype_and_processor(source, vq_folder, text_tokenizer, tmp_path):
    assert main([str(source), str(vq_folder), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    boi, eoi, image = text_tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    config = model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (boi, eoi, image)
    assert (processor.boi_token_id, processor.eoi_token_id, processor.image_token_id) == (boi, eoi, image)
    assert config.text_config.rope_parameters["mrope_section"] == [1] * 8
    assert model.generation_config.eos_token_id == text_tokenizer.eos_token_id


def test_the_way_back_loads_as_qwens_text_model(source, vq_folder, tmp_path):
    assert main([str(source), str(vq_folder), str(tmp_path / "out")]) == 0
    assert main(["--back", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    text = Qwen2_5_VLTextModel.from_pretrained(tmp_path / "back")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, tensor in model.model.language_model.state_dict().items():
        assert torch.equal(text.state_dict()[name], tensor), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) > 0


def without_bias(tensors):
    del tensors["model.layers.1.self_attn.q_proj.bias"]


def with_more(tensors):
    tensors["model.language_model.layers.0.more"] = torch.zeros(1)


def with_stranger(tensors):
    tensors["stranger"] = torch.zeros(1)


def with_other_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(31)


def without_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def twice(tensors):
    tensors["model.language_model.norm.weight"] = torch.zeros(32)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_bias, "lacks model.layers.1.self_attn.q_proj.bias"),
        (with_more, "holds the unknown model.language_model.layers.0.more"),
        (with_stranger, "Qwen2.5-VL has no tensor stranger"),
        (with_other_shape, r"model.norm.weight in .* must have the shape (32,), got (31,)"),
        (without_layer, "holds 1 layers, its config.json says 2"),
        (twice, "holds both model."),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, copied, vq_folder, tmp_path, capsys):
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    assert main([str(copied), str(vq_folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(".*")), error
    assert not (tmp_path / "out").exists()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors is truncated"


def indexed(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def absent_shard(folder):
    indexed(folder, {"lm_head.weight": "model-1.safetensors"})
    return "lacks model-1.safetensors, which model.safetensors.index.json names"


def outside(folder):
    indexed(folder, {"lm_head.weight": "../model.safetensors"})
    return "must name .safetensors files of its own folder, got '../model.safetensors'"


def absolute(folder):
    indexed(folder, {"lm_head.weight": str(folder / "model.safetensors")})
    return "must name .safetensors files of its own folder"


def incomplete_index(folder):
    indexed(folder, {"lm_head.weight": "model.safetensors"})
    return "does not list"


def lying_index(folder):
    indexed(folder, {"elsewhere": "model.safetensors"})
    return "says that model.safetensors holds elsewhere, which it does not"


def huge(folder):
    path = folder / "model.safetensors"
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    return "model.safetensors is truncated or no safetensors file"


def huge_header(folder):
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    return "model.safetensors is truncated or no safetensors file"


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "holds neither model.safetensors.index.json nor model.safetensors"


def huge_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 10**4, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return "holds 2 layers, its config.json says 10000"


DAMAGES = [truncated, absent_shard, outside, absolute, incomplete_index, lying_index, huge, huge_header, pickled]


@pytest.mark.parametrize("damage", [*DAMAGES, huge_config])
def test_damaged_and_malicious_folders_are_refused(damage, copied, vq_folder, tmp_path, capsys):
    message = damage(copied)
    assert main([str(copied), str(vq_folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"], "nothing is written"


def test_an_interrupted_run_leaves_nothing(source, vq_folder, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(NextFlowProcessor, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([str(source), str(vq_folder), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_folder_of_that_name(source, vq_folder, tmp_path):
    script = f"""
import os, sys
from conversion.checkpoints import ShardedWriter
from conversion.qwen2_5_vl import main
header = ShardedWriter._header
ShardedWriter._header = lambda self, names: header(self, names) if len(os.listdir(self.folder)) < 2 else os._exit(9)
main([{str(source)!r}, {str(vq_folder)!r}, {str(tmp_path / "out")!r}, "--max-shard-size", "40KB"])
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=600)
    assert done.returncode == 9
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.") and not (partial / "config.json").exists()


def test_an_existing_output_is_kept(source, vq_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main([str(source), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize("arguments", [("a", "b"), ("--back", *"abc"), (*"abc", "--max-shard-size", "5X")])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
