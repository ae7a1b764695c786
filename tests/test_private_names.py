"""Names with an underscore that the package takes from other libraries: all are here, and the libraries have them.

Any version may take such a name away. Looked at in transformers 5.23 and 5.24, diffusers 0.42, torch 2.13.
"""

import ast
import functools
import importlib
import pkgutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from transformers import GenerationConfig, TrainingArguments

PACKAGES = ("transformers_nextflow", "diffusers_nextflow")
SOURCES = Path(__file__).parents[1] / "src"

OVERRIDDEN = {
    "transformers.GenerationMixin": {
        *("_expand_inputs_for_generation", "_get_logits_processor", "_prepare_position_ids_for_generation"),
    },
    "transformers.PreTrainedModel": {
        *("_can_compile_fullgraph", "_init_weights", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        *("_no_split_modules", "_skip_keys_device_placement", "_supports_attention_backend", "_supports_flash_attn"),
        *("_supports_flex_attn", "_supports_sdpa", "_tied_weights_keys", "_tp_plan"),
    },
    "transformers.ProcessorMixin": {"_normalize_conversations"},
    "transformers.image_processing_utils.BaseImageProcessor": {"_preprocess", "_validate_preprocess_kwargs"},
    "transformers.Trainer": {
        *("_get_dataloader", "_get_num_items_in_batch", "_get_train_sampler", "_init_training_state"),
        *("_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_prepare_inputs"),
        *("_run_epoch", "_save", "_save_checkpoint", "_save_rng_state", "_track_num_input_tokens"),
    },
    "diffusers.DiffusionPipeline": {"_exclude_from_cpu_offload", "_optional_components"},
    "torch.nn.Module": {"_apply", "_load_from_state_dict"},
}
READ = {
    "transformers.GenerationMixin": {
        *("_get_stopping_criteria", "_prepare_generation_config", "_prepare_special_tokens"),
    },
    "transformers.PreTrainedConfig": {"_attn_implementation"},
    "transformers.PreTrainedTokenizerBase": {"_mark_chat_inputs"},
    "transformers.Trainer": {"_get_output_dir"},
    "transformers.ProcessorMixin": {
        *("_check_special_mm_tokens", "_merge_kwargs", "_resolve_chat_template"),
    },
    "diffusers.DiffusionPipeline": {"_execution_device"},
    "diffusers.FluxImg2ImgPipeline": {"_encode_vae_image", "_pack_latents", "_prepare_latent_image_ids"},
    "diffusers.StableDiffusionXLImg2ImgPipeline": {"_get_add_time_ids"},
    "torch": {"_C"},
    "torch._C": {"_are_functorch_transforms_active"},
    "torch.Tensor": {"_backward_hooks"},
    "torch.distributed.fsdp.FSDPModule": {"_get_fsdp_state"},
}
UNWRITTEN = ("_abc_impl", "_backward_cls", "_is_protocol", "_cached_value")  # ends of what libraries put on classes
# settings of generation and of trainings; torch's modules, nodes of its graphs, states of its sharding; named tuples;
# what accelerate leaves on modules
OF_INSTANCES = {
    *("_forward_hooks", "_forward_pre_hooks", "_saved_self", "_auto_reshard_after_forward", "_fsdp_param_groups"),
    *("_from_model_config", "_lazy_init", "_asdict", "_replace", "_n_gpu", "_is_accelerate_prepared"),
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for package in PACKAGES for path in (SOURCES / package).rglob("*.py")]


def names_read_and_nowhere_defined() -> set[str]:
    read, defined = set(), set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            (defined if is_own else read).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return {name for name in read - defined if private(name)}


def private_imports() -> set[str]:
    """Of other libraries."""
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    modules = [
        (node.module, each.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and not node.level
        for each in node.names
    ]
    modules += [(each.name, "") for node in nodes if isinstance(node, ast.Import) for each in node.names]
    return {f"{module}.{name}" for module, name in modules if any(map(private, [*module.split("."), name]))}


def names_overridden() -> set[str]:
    found = set()
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            try:
                defined = vars(importlib.import_module(module.name)).values()
            except ModuleNotFoundError:  # of an extra that is absent
                continue
            for own in defined:
                if isinstance(own, type) and own.__module__.split(".")[0] in PACKAGES:
                    others = [base for base in own.__mro__ if base.__module__.split(".")[0] not in PACKAGES]
                    found |= {name for name in vars(own) if private(name) and any(name in vars(b) for b in others)}
    return {name for name in found if not name.endswith(UNWRITTEN)}


def test_what_is_read_is_named_here():
    assert names_read_and_nowhere_defined() == set().union(OF_INSTANCES, *READ.values())
    assert private_imports() == set()


def test_what_is_overridden_is_named_here():
    pytest.importorskip("trl"), pytest.importorskip("diffusers")
    assert names_overridden() == set().union(*OVERRIDDEN.values())


@pytest.mark.parametrize("owner", OVERRIDDEN | READ)
def test_the_libraries_have_what_is_named_here(owner):
    pytest.importorskip(owner.split(".")[0])
    module, _, name = owner.rpartition(".")
    of_class = dir(getattr(importlib.import_module(module), name) if module else importlib.import_module(name))
    assert (OVERRIDDEN.get(owner, set()) | READ.get(owner, set())) - set(of_class) == set()


def test_instances_have_what_is_named_here():
    product = torch.ones(1, 1, requires_grad=True) @ torch.ones(1, 1)
    of_torch = {*vars(torch.nn.Module()), *dir(product.grad_fn), *vars(FSDPState()), *dir(FSDPState)}
    accelerate = pytest.importorskip("accelerate")
    of_accelerate = vars(accelerate.Accelerator(cpu=True).prepare_model(torch.nn.Linear(1, 1), evaluation_mode=True))
    of_training = {*vars(TrainingArguments(use_cpu=True)), *of_accelerate}
    assert OF_INSTANCES <= {*vars(GenerationConfig()), *of_torch, *of_training, *dir(namedtuple("Pair", "a b"))}
