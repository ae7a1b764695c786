"""Models from folders, with errors that name the folder: what the libraries raise of damaged files seldom does."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file, logging

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..image_processing_nextflow import NextFlowImageProcessor
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..processing_nextflow import NextFlowProcessor
from ..stored_tokenizer import load_referred_to
from .files import read_json
from .safetensors_folder import INDEX, SINGLE, SafetensorsFolder

DEFAULT_MODEL = Path(__file__).parents[3] / "checkpoints" / "nextflow-emoji"  # in a checkout of the repository

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


def model_name(model: str | None) -> str:
    """A local model folder or an id on the Hub, by default the repository's own checkpoint.

    Raises:
        ValueError: if none is named and there is no such checkpoint, or the name is a URL.
        NotADirectoryError: if it can only be a folder, and there is none.
    """
    if model is None:
        if not (DEFAULT_MODEL / "config.json").is_file():
            raise ValueError(f"name a model with --model: the default, {DEFAULT_MODEL}, does not exist")
        return str(DEFAULT_MODEL)
    if "://" in model:
        raise ValueError(f"a model is a local folder or an id on the Hub, got {model}")
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise NotADirectoryError(f"there is no model directory {model}")
    return model


def base_of(name: str, **revision: str) -> str | None:
    """The model that the adapters of a folder or Hub id are for; `None` where it holds a model.

    Raises:
        ValueError: if it holds both, or the adapters name no model, or themselves, or one that is not there.
    """
    path = find_adapter_config_file(name, **revision)
    if path is None:
        return None
    if (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds a model and adapters: keep adapters in a folder of their own")
    base = read_json(Path(path)).get("base_model_name_or_path")
    if not isinstance(base, str) or Path(base).resolve() == Path(name).resolve():
        raise ValueError(f"base_model_name_or_path in {path} must name the model that they are for, got {base!r}")
    try:
        return model_name(base)
    except (ValueError, NotADirectoryError) as error:
        raise ValueError(f"{name} holds adapters on another model, see adapter_config.json: {error}") from error


def root_of(name: str) -> str:
    """The model below adapters, whose configuration, processor and vision tokenizer are theirs too."""
    base = base_of(name)
    return name if base is None else root_of(base)


def load_model(
    model: str | None = None, dtype: torch.dtype | None = None
) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """A model, on the GPU where there is one, and its processor; see [`model_name`].

    Args:
        model: of adapters, too, which are merged into the model that they are for.
        dtype: of the weights; by default as they are stored.
    """
    name = model_name(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, processor = load_merged(name, dtype).to(device).eval(), load_processor(name)
    with naming(f"the processor in {root_of(name)}"):
        processor.check_fits(loaded.config)
    return loaded, processor


def load_merged(name: str, dtype: torch.dtype | None = None) -> NextFlowForConditionalGeneration:
    """A model, or the one below adapters with these merged into its weights."""
    base = base_of(name)
    if base is None:
        check_model_type(name, NextFlowConfig.model_type)
        return load_weights(NextFlowForConditionalGeneration, name, dtype)
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(f"{name} holds adapters, which need the package peft: pip install peft") from error
    model = load_merged(base, dtype)
    dtypes = {path: parameter.dtype for path, parameter in model.named_parameters()}
    with naming(f"the adapters in {name}"):
        adapted = PeftModel(model, PeftConfig.from_pretrained(name), low_cpu_mem_usage=True)
        report = adapted.load_adapter(name, adapted.active_adapter, low_cpu_mem_usage=True)
        if wrong := [*report.missing_keys, *report.unexpected_keys]:
            raise ValueError(f"{len(wrong)} tensors are lacking or have no place, {min(wrong)} among them")
        merged = adapted.merge_and_unload()
    for path, parameter in merged.named_parameters():  # PEFT holds what adapters bring whole in float32
        parameter.data = parameter.data.to(dtypes[path])
    return merged


def load_config(name: str) -> NextFlowConfig:
    """The configuration of a NextFlow; raises `ValueError` for another model's."""
    name = root_of(name)
    check_model_type(name, NextFlowConfig.model_type)
    with naming(f"the config.json of {name}"):
        return NextFlowConfig.from_pretrained(name)


def load_processor(name: str) -> NextFlowProcessor:
    name = root_of(name)
    with naming(f"the processor in {name}"):
        return NextFlowProcessor.from_pretrained(name)


def check_json_files(folder: Path) -> None:
    """Raise a `ValueError` that names the first JSON file of a model folder that is damaged."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def check_model_type(name: str, *known: str) -> str:
    """The model type in a model's `config.json`; of adapters, in that of the model below them.

    Raises:
        ValueError: if it is none of `known`, or a JSON file of the folder is damaged.
        OSError: without a `config.json`.
    """
    name = root_of(name)
    check_json_files(Path(name))
    values, _ = PreTrainedConfig.get_config_dict(name)
    if not values:
        raise OSError(f"{name} holds no config.json")
    model_type = values.get("model_type")
    if model_type not in known:
        types = " or ".join(f'"{entry}"' for entry in known)
        raise ValueError(f"{name} must hold a model of type {types}, got {model_type!r}")
    return model_type


def load_vq_model(name: str) -> NextFlowVQModel:
    """The vision tokenizer of a NextFlow, without its transformer, or one saved alone; in float32, for inference.

    Raises:
        ValueError: if it is neither, or its files are damaged, or lack or misshape tensors.
    """
    name = root_of(name)
    if check_model_type(name, NextFlowConfig.model_type, NextFlowVQConfig.model_type) == NextFlowVQConfig.model_type:
        return load_weights(NextFlowVQModel, name).float().eval()
    whole = load_config(name)
    if whole.vision_tokenizer is not None:
        return load_referred_to(whole)
    if "quantization_config" not in whole.to_dict():
        check_tensors(NextFlowForConditionalGeneration, whole, name)
    config = whole.vq_config
    prefix = f"{NextFlowForConditionalGeneration.base_model_prefix}.{NextFlowVQModel.base_model_prefix}"
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the transformer's weights are left out on purpose
    try:
        with naming(f"the weights in {name}"):
            loaded, report = NextFlowVQModel.from_pretrained(
                name,
                config=config,
                key_mapping={rf"^{prefix}\.": ""},
                dtype=torch.float32,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
    _refuse_missing(name, report["missing_keys"])
    alone = NextFlowVQModel(config)  # `loaded` would save its tensors under their names in the whole model
    alone.load_state_dict(loaded.state_dict())
    return alone.eval()


def load_vision_tokenizer(model: str | None) -> tuple[NextFlowVQModel, NextFlowImageProcessor]:
    """The vision tokenizer of a model, or one saved alone, on the GPU where there is one, and its image processor."""
    name = model_name(model)
    vq_model = load_vq_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
    if check_model_type(name, NextFlowConfig.model_type, NextFlowVQConfig.model_type) == NextFlowVQConfig.model_type:
        return vq_model, NextFlowImageProcessor.from_vq_config(vq_model.config)
    return vq_model, load_processor(name).image_processor


def load_weights(model_class, name: str, dtype: torch.dtype | None = None):
    """`from_pretrained`.

    Args:
        model_class: of the model.
        name: folder, or id on the Hub.
        dtype: by default as they are stored.

    Raises:
        ValueError: if the files are damaged, or lack or misshape tensors.
    """
    with naming(f"the config.json of {name}"):
        config = model_class.config_class.from_pretrained(name)
    if "quantization_config" not in config.to_dict():
        check_tensors(model_class, config, name)
    with naming(f"the weights in {name}"):
        model, report = model_class.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
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
    if whole and config.vision_tokenizer is not None:
        layers = 0
    return layers + (config.text_config.num_hidden_layers if whole else 0)
