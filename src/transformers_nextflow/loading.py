"""Models from folders, with errors that name the folder: what the libraries raise of damaged files seldom does."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .configuration_nextflow import NextFlowConfig
from .files import read_json
from .safetensors_folder import INDEX, SINGLE, SafetensorsFolder

JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX),
)

# a JSON file of other types than its reader expects ends in almost any of these
ESCAPES = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, ImportError),
    *(StrictDataclassError, SafetensorError),
)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise errors of the libraries as a `ValueError` that says `what` cannot be loaded; `OSError` passes."""
    try:
        yield
    except ESCAPES as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} cannot be loaded: {reason}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(f"{what} cannot be loaded: {error}") from error  # tokenizers raises no class of its own


def check_json_files(folder: Path) -> None:
    """Raise a `ValueError` that names the first JSON file of a model folder that is damaged."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def load_weights(model_class, name: str):
    """`from_pretrained`.

    Args:
        model_class: of the model.
        name: folder, or id on the Hub.

    Raises:
        ValueError: if the files are damaged, or lack or misshape tensors.
    """
    with naming(f"the config.json of {name}"):
        config = model_class.config_class.from_pretrained(name)
    if "quantization_config" not in config.to_dict():
        check_tensors(model_class, config, name)
    with naming(f"the weights in {name}"):
        model, report = model_class.from_pretrained(name, output_loading_info=True)
    _refuse_missing(name, report["missing_keys"])
    return model


def check_tensors(model_class, config, name: str) -> None:
    """Compare the tensors that a local folder declares with the model's, before memory is taken for either."""
    folder = Path(name)
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        return
    with naming(f"the weights in {name}"):
        found = {key: list(shape) for key, shape in SafetensorsFolder(folder).shapes.items()}
    if (layers := _num_layers(config)) > len(found):
        raise ValueError(f"the weights in {name} are {len(found)} tensors, config.json asks for {layers} layers")
    with naming(f"the config.json of {name}"), torch.device("meta"):
        model = model_class(config)
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            raise ValueError(f"the weights in {name} hold {key} as {found[key]}, config.json asks for {expected[key]}")
    missing = expected.keys() - found.keys() - model.all_tied_weights_keys.keys()
    if len(missing) > len(found.keys() - expected.keys()):  # the library renames some as it loads them
        _refuse_missing(name, missing)


def _refuse_missing(name: str, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"the weights in {name} lack {len(missing)} tensors, {min(missing)} among them")


def _num_layers(config) -> int:
    """Layers and blocks of all parts: at least one tensor each."""
    whole = isinstance(config, NextFlowConfig)
    vq = config.vq_config if whole else config
    layers = vq.semantic_config.num_hidden_layers + vq.semantic_decoder_layers + vq.encoder_blocks + vq.decoder_blocks
    return layers + (config.text_config.num_hidden_layers if whole else 0)
