"""Two ranks do what one does: tensor parallelism, and weights sharded by FSDP2."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from test_fixed_size import FIXED_SIZE
from tiny_models import CODES, TEXT_ROWS, relative, tiny_config, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from tests.fresh import run
from tests.two_ranks import MODES, ROWS, with_labels
from transformers_nextflow import losses
from transformers_nextflow.training.fsdp import (
    WholeHeadsCallback,
    keep_losses_float32,
    let_go,
    local_part,
    sharded_like,
    whole_tensor,
    whole_weights,
)
from transformers_nextflow.training.loading import PrecisionTrainer


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What one rank comes to, and two, by what they do."""
    folder = tmp_path_factory.mktemp("ranks")
    for mode in MODES:
        config = tiny_config(text={"num_key_value_heads": 2}) if "tensor_parallel" in mode else tiny_config()
        tiny_model(config).save_pretrained(folder / mode)
    run("-m", "tests.two_ranks", folder)
    return {mode: [load_file(folder / mode / f"{ranks}.safetensors") for ranks in (1, 2)] for mode in MODES}


def test_tensor_parallel_loss_gradients_and_codes_are_one_ranks(by_ranks):
    one, two = by_ranks["tensor_parallel"]
    assert two.keys() == one.keys() and len(one) > 30
    assert torch.equal(two["codes"], one["codes"])
    for name, tensor in two.items():
        assert name == "codes" or relative(tensor, one[name]) < 1e-5, name


def test_a_training_under_tensor_parallelism_is_one_ranks(by_ranks):
    """Ranks that read the same batches count them once."""
    one, two = by_ranks["tensor_parallel_training"]
    assert two.keys() == one.keys() and {"logs", "held_out", "code_head.weight"} <= one.keys()
    for name, tensor in two.items():
        assert relative(tensor, one[name]) < 1e-5, name


def test_a_bfloat16_model_trains_in_shards(by_ranks):
    one, two = (results["losses"] for results in by_ranks["sharded"])
    assert one[-1] < one[0] - 0.5
    assert relative(two, one) < 2e-2


def test_heads_that_are_units_of_their_own(by_ranks):
    """Each call gathers them, on all ranks at once, whatever number of targets a rank has."""
    one, two = by_ranks["sharded_heads"]
    assert two.keys() == one.keys() and {"lm_head.weight", "code_head.weight"} <= one.keys()
    for name, tensor in two.items():
        assert relative(tensor, one[name]) < 1e-5, name


@pytest.mark.parametrize("vq", [{}, FIXED_SIZE], ids=["any grid", "one size"])
def test_units_that_are_named_are_there(vq):
    """accelerate looks up each class that a model names as a whole."""
    model = tiny_model(tiny_config(vq=vq))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = {type(module).__name__ for module in model.modules() if policy(module)}
    assert {"Qwen2_5_VLDecoderLayer", "CodeEmbeddings", "ResidualBlock"} <= units == model._no_split_modules


@pytest.fixture
def one_rank():
    """This process alone as a group of those that share weights."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_weights_in_shards_are_whole_for_a_while(one_rank):
    """Also where a part runs before the whole ever has; afterwards they are let go as before."""
    model, inputs = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    expected = model(inputs)
    for unit in (*model, model):
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))

    def whole() -> list[bool]:
        return [not isinstance(part.weight, DTensor) for part in model]

    with whole_weights(model):
        before = whole()
        model[1](inputs)
        assert before == whole() == [True, True]
    assert whole() == [False, False]
    torch.testing.assert_close(model(inputs), expected)
    assert whole() == [False, False]


def test_shards_that_are_changed_are_what_runs_next(one_rank):
    model, inputs = nn.Linear(2, 2), torch.ones(1, 2)
    weight, expected = model.weight.detach().clone(), model(inputs) + 3  # by two inputs and the bias
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(inputs)
    assert not isinstance(model.weight, DTensor)
    let_go(model)
    assert isinstance(model.weight, DTensor)
    for parameter in model.parameters():
        local_part(parameter.detach()).add_(1)
    torch.testing.assert_close(model(inputs), expected)
    let_go(model)
    assert torch.equal(whole_tensor(model.weight), weight + 1)
    assert torch.equal(whole_tensor(sharded_like(weight, model.weight)), weight)


def test_heads_are_gathered_once_for_all_chunks_of_a_loss(one_rank, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 10 * (TEXT_ROWS + CODES))
    alone = tiny_model().train()
    model, inputs, whole = copy.deepcopy(alone), with_labels(alone, *ROWS[:1]), []
    for unit in (model.lm_head, model.code_head, model):
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
    WholeHeadsCallback().on_train_begin(None, None, None, model=model)
    for head in (model.lm_head, model.code_head):
        head.register_forward_hook(lambda head, *args: whole.append(not isinstance(head.weight, DTensor)))
    for each in (model, alone):
        each(**inputs, use_cache=False, logits_over="none").loss.backward()
    assert len(whole) > 2 and all(whole)
    for head in ("lm_head", "code_head"):
        expected, got = (whole_tensor(each.get_submodule(head).weight.grad) for each in (alone, model))
        torch.testing.assert_close(got, expected)


def test_losses_of_shards_are_not_rounded():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    before = plugin.mixed_precision_policy
    keep_losses_float32(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert before.output_dtype == torch.bfloat16 and plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == before.param_dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_rounds_what_is_trained_and_not_what_gives_codes(stage, tmp_path, monkeypatch):
    """All of it, where weights are in shards, which is refused."""

    def round_all(trainer) -> None:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.bfloat16()
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    monkeypatch.setattr(Trainer, "train", round_all)
    model = tiny_model()
    model.model.vq_model.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.model.vq_model.named_parameters()}
    trainer = PrecisionTrainer(model, TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none"))
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(zero_stage=stage))
    if stage == 3:
        with pytest.raises(ValueError, match="ZeRO-3 in 16 bits would round the vision tokenizer"):
            trainer.train()
        return
    trainer.train()
    assert all(torch.equal(model.model.vq_model.get_parameter(name), weight) for name, weight in before.items())
    trained = {weight.dtype for weight in model.to(torch.bfloat16).parameters() if weight.requires_grad}
    assert trained == {torch.bfloat16} and model.model.vq_model.quantizer.pixel_codebook.dtype == torch.float32
