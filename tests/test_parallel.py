"""Two ranks do what one does: tensor parallelism, and weights sharded by FSDP2."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from test_fixed_size import FIXED_SIZE
from tiny_models import relative, tiny_config, tiny_model

from tests.fresh import run
from tests.two_ranks import MODES


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
