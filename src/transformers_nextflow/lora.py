"""What PEFT is to know of a NextFlow: which parts a LoRA changes, and whose adapter a row of a call has.

```python
model = get_peft_model(model, lora_config())
```
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from .modeling_nextflow import NextFlowPreTrainedModel

DECODER_LINEARS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
CODE_MODULES = ["code_head", "code_embeddings"]


def below_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, or itself where it has not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(**kwargs) -> "LoraConfig":
    """A `peft.LoraConfig` for [`NextFlowForConditionalGeneration`], to be changed by `kwargs` of the same names.

    Adapters on the decoder's linear layers; code head and code embeddings trained and saved whole, since a picture's
    codes are new to Qwen's weights. The vision tokenizer stays as it is.

    Raises:
        ImportError: if peft is not installed.
    """
    from peft import LoraConfig

    defaults = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": DECODER_LINEARS,
        "modules_to_save": CODE_MODULES,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | kwargs)


# What adapters have no place on, though it has linear layers: the frozen vision tokenizer, and a table of embeddings.
LEFT_OUT = r"(.*\.)?(vq_model|scale_embedding)\..*"
FROZEN = r"(.*\.)?vq_model(\..*)?"
KEEPING_WEIGHTS = (True, False, None, "gaussian", "orthogonal", "eva")  # of `init_lora_weights`; others change them


def place_adapters(model: "NextFlowPreTrainedModel", configs: dict[str, "PeftConfig"]) -> None:
    """Take adapters that PEFT has just put on `model` off what has none, and say so in their configs.

    PEFT's `"all-linear"` means every linear layer but `lm_head`, as of models of text. Here `lm_head` gets an adapter
    as well, unless it is the embedding too, because it shares a softmax with `code_head`.

    Raises:
        ValueError: if no adapter is left, or a part to be saved whole is the vision tokenizer's alone, or adapters on
            it have changed its own weights where they began.
    """
    misplaced = set()
    for path, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and re.fullmatch(LEFT_OUT, path):
            misplaced |= _adapters_on(module)
            model.set_submodule(path, module.base_layer)
    # `bias="all"` thaws some of it; before, adapters on it would share weights with others
    model.base_model.vq_model.requires_grad_(False)
    layers = {path: getattr(module, "base_layer", module) for path, module in model.named_modules()}
    inside = tuple(f"{path}." for path, module in model.named_modules() if hasattr(module, "base_layer"))
    linears = {
        path
        for path, layer in layers.items()
        if isinstance(layer, nn.Linear) and not path.startswith(inside) and not re.fullmatch(LEFT_OUT, path)
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and _adapters_on(head) | _adapters_on(embedding):
        head, embedding = (getattr(each, "base_layer", each) for each in (head, embedding))
        if head.weight is embedding.weight:  # what is merged into one of them would change the other
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    for name, config in configs.items():
        for part in getattr(config, "modules_to_save", None) or []:
            places = [path for path in layers if path.split(".")[-1] == part]
            if places and all(re.fullmatch(FROZEN, path) for path in places):
                raise ValueError(f"modules_to_save of {name} must not train the frozen vision tokenizer, got {part}")
        targets = getattr(config, "target_modules", None) or getattr(config, "target_parameters", None)
        if not targets:
            continue
        adapted = {path for path, module in model.named_modules() if name in _adapters_on(module)}
        if not adapted:
            raise ValueError(
                f"adapters of {name} would all sit on the frozen vision tokenizer or the scale embedding, got "
                f"{targets}"
            )
        elsewhere = sorted(path for path in adapted if not re.fullmatch(DECODER_LINEARS, path))
        if getattr(config, "alora_invocation_tokens", None) and elsewhere:
            raise ValueError(
                f"adapters of alora_invocation_tokens sit on the decoder's layers, which alone read whole rows, got "
                f"{', '.join(elsewhere)}: take lora_config(alora_invocation_tokens=...)"
            )
        start = getattr(config, "init_lora_weights", True)
        if name in misplaced and start not in KEEPING_WEIGHTS:
            raise ValueError(
                f"init_lora_weights={start!r} changes weights, and has changed the frozen vision tokenizer's: load "
                f"the model again, and leave it out by exclude_modules=r{LEFT_OUT!r}, or take lora_config()"
            )
        if getattr(config, "exclude_modules", LEFT_OUT):  # users say themselves what is left out, or the method cannot
            continue
        config.exclude_modules = LEFT_OUT
        if linears - adapted == {"lm_head"} and not model.config.tie_word_embeddings:
            from peft.functional import inject_adapter_in_model, set_adapter

            of_head = copy.deepcopy(config)
            of_head.target_modules = {"lm_head"}
            active = next(module.active_adapters for module in model.modules() if name in _adapters_on(module))
            trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            inject_adapter_in_model(of_head, model, name)
            set_adapter(model, active, of_head.inference_mode)  # which was this one then, everywhere
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            config.target_modules = {*targets, "lm_head"}


def are_placed(configs: dict[str, "PeftConfig"]) -> bool:
    """Whether [`place_adapters`] has seen all of them, or their users have said themselves what is left out."""
    return all(getattr(config, "exclude_modules", LEFT_OUT) for config in configs.values())


def check_no_learned_prompt(model: "NextFlowPreTrainedModel") -> None:
    """Raise a `ValueError` inside PEFT's `generate` of a learned prompt, which takes part in the loop over text alone,
    and there does not know the positions after pictures."""
    if getattr(model.prepare_inputs_for_generation, "__self__", model) is not model:
        raise ValueError("a prompt that PEFT has learned goes before text alone: it cannot guide or follow pictures")


def check_not_switched_on(model: "NextFlowPreTrainedModel") -> None:
    """Raise a `ValueError` where tokens of the prompt switch an adapter on (aLoRA), from which place on PEFT tells for
    rows of text alone."""
    if any("alora_offsets" in _told(module) for module in model.modules()):
        raise ValueError("adapters of alora_invocation_tokens write text alone: they cannot draw pictures")


def _adapters_on(module: nn.Module) -> set[str]:
    """Names of the adapters that PEFT has put on this layer."""
    parts = [attrgetter(part)(module) for part in getattr(module, "adapter_layer_names", ())]
    return {name for part in parts for name in part}


# PEFT's `generate(adapter_names=[...])` lets every adapted module of the call be told the adapter of each prompt, by
# hooks that stay while the call runs. A call that draws has other rows than prompts: null prompts, several pictures of
# a prompt, rows of one length at a time. So each step says which rows it has, by hooks that come after PEFT's.


def adapter_names(model: nn.Module) -> list[str] | None:
    """The adapter of each prompt, where PEFT was given some for the call that runs."""
    return next((list(told["adapter_names"]) for told in map(_told, model.modules()) if "adapter_names" in told), None)


@contextmanager
def using_adapters(model: nn.Module, names: Sequence[str] | None) -> Iterator[None]:
    """While this runs, adapted modules get inputs whose rows have these adapters; `None`: as PEFT was told.

    Args:
        names: of each row, or one for all.
    """

    def of_rows(module, args, kwargs):
        named = list(names) * (len(args[0]) if len(names) == 1 else 1)
        return args, kwargs | {"adapter_names": named or None}  # PEFT wants a row

    adapted = [] if names is None else [module for module in model.modules() if "adapter_names" in _told(module)]
    handles = [module.register_forward_pre_hook(of_rows, with_kwargs=True) for module in adapted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_by_its_adapter(
    model: nn.Module, names: Sequence[str] | None, run: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """(B, ...) that `run` gives of all rows as one, each row as by its adapter; `None`: as PEFT was told."""
    if names is None:
        return run()
    by_adapter = {}
    for name in dict.fromkeys(names):
        with using_adapters(model, [name]):
            by_adapter[name] = run()
    return torch.stack([by_adapter[name][row] for row, name in enumerate(names)])


def sum_by_adapter(
    model: nn.Module,
    names: Sequence[str] | None,
    rows_N: torch.Tensor,
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    *tensors_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and its (N,) terms, that `run` gives of N positions, each position as by the adapter of its row;
    `None`: as PEFT was told."""
    if names is None:
        return run(*tensors_N)
    sums, terms, places = [], [], []
    for name in dict.fromkeys(names):
        has_it = torch.tensor([own == name for own in names], device=rows_N.device)
        places.append(has_it[rows_N].nonzero()[:, 0])
        with using_adapters(model, [name]):
            total, terms_n = run(*(tensor[places[-1]] for tensor in tensors_N))
        sums.append(total)
        terms.append(terms_n)
    return sum(sums), torch.cat(terms)[torch.cat(places).argsort()]


def _told(module: nn.Module) -> dict:
    """Arguments that PEFT's hooks give a module."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, partial)]
    return {name: value for hook in hooks for name, value in hook.keywords.items()}
