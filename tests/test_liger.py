"""Liger's layers take the place of the decoder's norms and MLPs and nothing else.

Liger itself needs a GPU: its classes have stand-ins here, of the same constructors and parameters, in plain PyTorch.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SQUARE, Picture, batch_of, relative, tiny_model
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.liger import apply_liger_kernel as of_the_trainer

from transformers_nextflow.liger import apply_liger_kernel, register_liger_kernel
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training.loading import PrecisionTrainer


class LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden):
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class LigerSwiGLUMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


@pytest.fixture
def table(monkeypatch) -> dict:
    """Liger's functions by model type."""
    known: dict = {}

    def apply_to_instance(model, **kwargs):
        if model.config.model_type in known:
            known[model.config.model_type](model=model, **kwargs)

    package, classes, patches = map(ModuleType, ("liger_kernel", "liger_kernel.transformers", "liger_kernel.patches"))
    classes.LigerRMSNorm, classes.LigerSwiGLUMLP = LigerRMSNorm, LigerSwiGLUMLP
    classes._apply_liger_kernel_to_instance = apply_to_instance
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = known
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", classes)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return known


def replaced(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LigerRMSNorm | LigerSwiGLUMLP)}


NORMS = {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")}
MLPS = {"layers.0.mlp", "layers.1.mlp"}


@pytest.mark.parametrize(
    "chosen, expected",
    [({}, NORMS | {"norm"} | MLPS), ({"rms_norm": False}, MLPS), ({"swiglu": False}, NORMS | {"norm"})],
)
def test_the_decoders_norms_and_mlps_are_replaced_and_compute_the_same(table, chosen, expected):
    model = tiny_model()
    before, names = {id(parameter) for parameter in model.parameters()}, list(model.state_dict())
    apply_liger_kernel(model, **chosen)
    assert replaced(model) == {f"model.language_model.{name}" for name in expected}
    assert {id(parameter) for parameter in model.parameters()} == before, "an optimizer made before still holds them"
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    other = tiny_model()
    batch = batch_of(model, [10, Picture(SQUARE, 1), 11, 12], [13, 14])
    outputs = [each(**batch, labels=batch["input_ids"], use_cache=False) for each in (model, other)]
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    for output in outputs:
        output.loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert theirs.grad is None or relative(ours.grad, theirs.grad) < 1e-4


def test_the_trainers_own_call_replaces_them_once_registered(table):
    """Unregistered, the library leaves the model as it is and says nothing."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora_config(r=2))
    of_the_trainer(model, None)
    assert not replaced(model)
    register_liger_kernel()
    assert list(table) == ["nextflow"]
    of_the_trainer(model, {"swiglu": False})
    assert len(replaced(model)) == 5
    of_the_trainer(model, {"fused_linear_cross_entropy": False})  # as TRL's trainers have it
    assert len(replaced(model)) == 7
    with pytest.raises(ValueError, match="fused_linear_cross_entropy knows one head: leave it off"):
        of_the_trainer(model, {"fused_linear_cross_entropy": True})
    gate = model.get_base_model().model.language_model.layers[0].mlp.gate_proj
    assert isinstance(gate, peft.tuners.lora.Linear), "adapters stay"


def test_trainers_of_this_package_register_them(table, tmp_path):
    class Trained(PrecisionTrainer):
        def get_train_dataloader(self):
            raise KeyboardInterrupt

    model = tiny_model()
    arguments = TrainingArguments(str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to="none")
    with pytest.raises(KeyboardInterrupt):
        Trained(model, arguments).train()
    assert len(replaced(model)) == 7


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
@pytest.mark.parametrize("call", [lambda: apply_liger_kernel(tiny_model()), register_liger_kernel])
def test_without_liger_the_package_is_named(call):
    with pytest.raises(ImportError, match=r"pip install 'transformers-nextflow\[cuda\]'"):
        call()
