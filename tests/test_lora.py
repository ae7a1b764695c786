"""PEFT's defaults: what a LoRA changes, trains and saves, and that merging keeps the model's outputs."""

import pytest
import torch
from tiny_models import EOS, SQUARE, Picture, batch_of, relative, tiny_model

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.lora import lora_config

peft = pytest.importorskip("peft")


def batch(model) -> dict:
    return batch_of(model, [1, 2, Picture(SQUARE), EOS], [3, 4, 5, Picture(SQUARE, seed=1), EOS])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model.get_base_model() if hasattr(model, "get_base_model") else model)).logits


def train(model, inputs: dict) -> dict[str, torch.Tensor]:
    """A few steps; all parameters and buffers before them."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
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
