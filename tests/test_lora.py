"""PEFT's defaults: what a LoRA changes, trains and saves, and that merging keeps the model's outputs."""

import importlib.util

import pytest
import torch
from tiny_models import EOS, SQUARE, Picture, batch_of, relative, tiny_config, tiny_model
from transformers import BitsAndBytesConfig

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import load_stages

peft = pytest.importorskip("peft")


def batch(model) -> dict:
    return batch_of(model, [1, 2, Picture(SQUARE), EOS], [3, 4, 5, Picture(SQUARE, seed=1), EOS])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model.get_base_model() if hasattr(model, "get_base_model") else model)).logits


def train(model, inputs: dict, rate: float = 0.5) -> dict[str, torch.Tensor]:
    """A few steps; all parameters and buffers before them."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return before


@pytest.fixture
def adapted():
    return peft.get_peft_model(tiny_model(), lora_config(r=4))


def test_adapters_sit_on_the_decoders_linear_layers_alone(adapted):
    layers = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert len(layers) == 2 * 7
    assert all("language_model.layers." in name for name in layers)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    others = {name for name in trained if ".lora_" not in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in others} == {"code_head", "code_embeddings"}
    assert not any("vq_model" in name for name in trained)


def test_training_changes_what_it_should_and_the_forward_uses_it(adapted):
    inputs = batch(adapted.get_base_model())
    first = logits(adapted)
    assert torch.equal(first, logits(tiny_model())), "a new adapter changes nothing"
    before = train(adapted, inputs)
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("code_head.modules_to_save.default.weight") for name in changed)
    assert any(name.endswith("code_embeddings.modules_to_save.default.weight") for name in changed)
    assert all(".lora_" in name or ".modules_to_save." in name for name in changed)
    whole = logits(adapted)
    for name in ("code_head", "code_embeddings"):  # with either put back, the outputs differ
        (wrapper,) = (module for path, module in adapted.named_modules() if path.endswith(f".{name}"))
        kept = wrapper.modules_to_save["default"].weight.detach().clone()
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.copy_(wrapper.original_module.weight)
            assert not torch.equal(logits(adapted), whole)
            wrapper.modules_to_save["default"].weight.copy_(kept)
    assert torch.equal(logits(adapted), whole)


def test_save_load_and_merge(adapted, tmp_path):
    train(adapted, batch(adapted.get_base_model()))
    adapted.eval()
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, NextFlowForConditionalGeneration)
    assert relative(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    plain = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert plain.state_dict().keys() == tiny_model().state_dict().keys()
    assert torch.equal(logits(plain), logits(merged))


def test_an_adapter_added_to_the_model_itself_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.add_adapter(lora_config(r=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("code_head.modules_to_save" in name for name in trained)
    assert not any("vq_model" in name for name in trained)
    train(model, batch(model))
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path))
    assert not torch.equal(logits(loaded), logits(tiny_model()))
    assert torch.equal(logits(loaded), logits(model))


def test_settings_can_be_changed():
    config = lora_config(r=2, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 32, {"q_proj"})


# QLoRA: adapters on a decoder in 4 bits


@pytest.fixture
def four_bit_folder(tmp_path):
    """A checkpoint whose linear layers fill bitsandbytes' blocks of 64."""
    model = tiny_model(tiny_config(text={"hidden_size": 64, "intermediate_size": 128}))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_in_4bit(folder) -> NextFlowForConditionalGeneration:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return NextFlowForConditionalGeneration.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def test_adapters_on_4_bits_train_and_come_back(four_bit_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole, model = NextFlowForConditionalGeneration.from_pretrained(four_bit_folder), load_in_4bit(four_bit_folder)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantised) == 2 * 7 and all("language_model.layers." in name for name in quantised)
    for ours, theirs in zip(model.model.vq_model.parameters(), whole.model.vq_model.parameters()):
        assert torch.equal(ours, theirs), "the vision tokenizer is as it was"
    load_stages()["sft"].prepare(model)
    adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model, False), lora_config(r=4)).train()
    trained = {name: parameter.dtype for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 + 2 and set(trained.values()) == {torch.float32}
    inputs = batch(whole)
    with torch.no_grad():
        first = adapted(**inputs, labels=inputs["input_ids"]).loss
    before = train(adapted, inputs, rate=0.1)
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name or ".modules_to_save." in name for name in changed)
    adapted.eval()
    with torch.no_grad():
        assert adapted(**inputs, labels=inputs["input_ids"]).loss < first
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = peft.prepare_model_for_kbit_training(load_in_4bit(four_bit_folder), False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_4_bits_name_the_missing_package(four_bit_folder):
    with pytest.raises(ImportError, match="requires bitsandbytes"):
        load_in_4bit(four_bit_folder)
