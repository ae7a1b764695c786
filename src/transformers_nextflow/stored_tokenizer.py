"""The vision tokenizer of a NextFlow on disk, for models without it: transformer training needs its identity alone."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .modeling_nextflow_vq import NextFlowVQModel
from .utils.safetensors_folder import SafetensorsFolder, folder_of

PREFIX = "model.vq_model."
DECODERS = ("pixel_decoder", "semantic_decoder")


class AbsentVisionTokenizer(nn.Module):
    """What stands in the place of a vision tokenizer that `config.vision_tokenizer` refers to: it has no weights."""

    _keys_to_ignore_on_load_unexpected = (r"(^|\.)vq_model\.",)  # of a checkpoint that has it

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        self.config, self.schedules = config, config.schedule_table()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{name} is of the vision tokenizer, without which this model was loaded: "
                "`with model.base_model.whole():` brings it"
            ) from None


def vision_tokenizer_hash(tensors: Iterable[tuple[str, torch.Tensor]], config: NextFlowVQConfig) -> str:
    """sha256 of everything codes depend on: both encoders and the quantizer, not the decoders.

    Args:
        tensors: of the vision tokenizer's state, in the order of their names.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if name.split(".")[0] in DECODERS:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    lookup = (config.semantic_weight, config.pixel_weight, config.normalize_entries, config.semantic_feature_layer)
    digest.update(repr(lookup).encode())
    return digest.hexdigest()


def stored_tensors(model: str, revision: str | None = None, **hub) -> Iterator[tuple[str, torch.Tensor]]:
    """The vision tokenizer's tensors in float32, by name and in the order of the names, one at a time.

    Args:
        model: folder or Hub id of a NextFlow.
        revision: of the id.
        hub: see [`folder_of`].
    """
    folder = SafetensorsFolder(folder_of(model, revision, **hub))
    for name in sorted(name for name in folder if name.startswith(PREFIX)):
        tensor = folder.tensor(name)
        yield name.removeprefix(PREFIX), tensor.float() if tensor.is_floating_point() else tensor


def tensors_referred_to(config: NextFlowConfig, **hub) -> dict[str, torch.Tensor]:
    """The tensors that `config.vision_tokenizer` refers to; `hub` as in [`stored_tensors`].

    Raises:
        ValueError: if it is not there, or another one is.
    """
    model = config.vision_tokenizer["model"]
    remedy = "name the folder that has it as `vision_tokenizer` in config.json"
    try:
        tensors = dict(stored_tensors(model, config.vision_tokenizer.get("revision"), **hub))
    except (OSError, ValueError) as error:
        raise ValueError(f"the vision tokenizer of this checkpoint is that of {model}, {error}: {remedy}") from error
    if vision_tokenizer_hash(tensors.items(), config.vq_config) != config.vision_tokenizer["sha256"]:
        raise ValueError(f"the vision tokenizer of this checkpoint was that of {model}, now another: {remedy}")
    return tensors


def load_referred_to(config: NextFlowConfig, **hub) -> NextFlowVQModel:
    """The vision tokenizer that `config.vision_tokenizer` refers to; see [`tensors_referred_to`]."""
    model = NextFlowVQModel(config.vq_config)
    model.load_state_dict(tensors_referred_to(config, **hub))
    return model.eval().requires_grad_(False)
