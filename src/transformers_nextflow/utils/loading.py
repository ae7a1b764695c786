"""Models from folders, with errors that name the folder: what the libraries raise of damaged files seldom does."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..image_processing_nextflow import NextFlowImageProcessor
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..processing_nextflow import NextFlowProcessor
from ..stored_tokenizer import load_referred_to, stored_tensors
from .files import read_json
from .lazy import needing_extra
from .safetensors_folder import INDEX, SINGLE, SafetensorsFolder, folder_of

DEFAULT_MODEL = Path(__file__).parents[3] / "checkpoints" / "nextflow-emoji"
if not DEFAULT_MODEL.is_dir():  # this file is in no checkout of the repository, but the current folder may be one
    DEFAULT_MODEL = Path("checkpoints", "nextflow-emoji")

JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX),
)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise errors of the libraries as a `ValueError` that says `what` cannot be loaded; `OSError` passes.

    A damaged file ends in almost any kind of them.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        plain = isinstance(error, ValueError) or type(error) is Exception  # tokenizers raises no class of its own
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} cannot be loaded: {reason}") from error


def model_name(model: str | None) -> str:
    """A local model folder or an id on the Hub, by default the repository's own checkpoint: of the checkout that the
    package is in, or that is the current folder.

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


def source_name(name: str | Path) -> str:
    """What a card calls a source: a Hub id, also where its folder in the Hub's cache was named; of other folders the
    last part of the path."""
    if not Path(name).exists():
        return str(name)
    path = Path(name).resolve()
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", path.as_posix())
    return "/".join(found.groups()) if found else path.name


def base_of(name: str, **revision: str) -> str | None:
    """The model that the adapters of a folder or Hub id are for, where they name a revision the folder that holds it;
    `None` where it holds a model.

    Raises:
        ValueError: if it holds both, or the adapters name no model, or themselves, or one that is not there.
    """
    path = find_adapter_config_file(name, **revision)
    if path is None:
        return None
    if (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds a model and adapters: keep adapters in a folder of their own")
    values = read_json(Path(path))
    base, of_base = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or Path(base).resolve() == Path(name).resolve():
        raise ValueError(f"base_model_name_or_path in {path} must name the model that they are for, got {base!r}")
    try:
        base = model_name(base)
    except (ValueError, NotADirectoryError) as error:
        raise ValueError(f"{name} holds adapters on another model, see adapter_config.json: {error}") from error
    return base if of_base is None else folder_of(base, of_base)


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
    loaded = load_merged(name, dtype).to(device).eval()
    return loaded, load_processor(name, loaded.config)


def load_merged(name: str, dtype: torch.dtype | None = None) -> NextFlowForConditionalGeneration:
    """A model, or the one below adapters with these merged into its weights."""
    base = base_of(name)
    if base is None:
        check_model_type(name, NextFlowConfig.model_type)
        return load_weights(NextFlowForConditionalGeneration, name, dtype)
    with needing_extra("train", f"{name}, which holds adapters,"):
        from peft import PeftConfig, PeftModel
    model = load_merged(base, dtype)
    dtypes = {path: parameter.dtype for path, parameter in model.named_parameters(remove_duplicate=False)}
    with naming(f"the adapters in {name}"):
        config = PeftConfig.from_pretrained(name)
        if config.is_prompt_learning:
            raise ValueError(
                f"a learned prompt ({config.peft_type.value}) cannot be merged: use PeftModel.from_pretrained"
            )
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
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


def load_processor(name: str, config: NextFlowConfig | None = None) -> NextFlowProcessor:
    """A model's processor; raises `ValueError` if it does not fit `config`."""
    name = root_of(name)
    with naming(f"the processor in {name}"):
        processor = NextFlowProcessor.from_pretrained(name)
        if config is not None:
            processor.check_fits(config)
    return processor


def load_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """A folder's own defaults of generation, or else those that follow from its configuration."""
    if (folder / "generation_config.json").is_file():
        with naming(f"the generation_config.json in {folder}"):
            return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def check_model_type(name: str, *known: str) -> str:
    """The model type in a model's `config.json`.

    Args:
        name: folder or Hub id of no adapters, see [`root_of`].

    Raises:
        ValueError: if it is none of `known`, or a JSON file of the folder is damaged.
        OSError: without a `config.json`.
    """
    for path in filter(Path.is_file, (Path(name, file) for file in JSON_FILES)):
        read_json(path)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        if name in str(error):
            raise
        raise OSError(f"there is no folder {name}, and nothing of that name came from the Hub: {error}") from error
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
    check_tensors(NextFlowForConditionalGeneration, whole, name)
    vq_model = NextFlowVQModel(whole.vq_config)
    with naming(f"the weights in {name}"):
        vq_model.load_state_dict(dict(stored_tensors(name)))
    return vq_model.eval()


def load_vision_tokenizer(model: str | None) -> tuple[NextFlowVQModel, NextFlowImageProcessor]:
    """The vision tokenizer of a model, or one saved alone, on the GPU where there is one, and its image processor."""
    name = model_name(model)
    vq_model = load_vq_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
    return vq_model, load_image_processor(name, vq_model.config)


def load_image_processor(name: str, config: NextFlowVQConfig) -> NextFlowImageProcessor:
    """A model's, or that saved beside a vision tokenizer alone; where there is none, one that fits `config`."""
    name = root_of(name)
    if check_model_type(name, NextFlowConfig.model_type, NextFlowVQConfig.model_type) == NextFlowConfig.model_type:
        return load_processor(name).image_processor
    try:
        return NextFlowImageProcessor.from_pretrained(name)
    except OSError:
        return NextFlowImageProcessor.from_vq_config(config)


def load_tokenizers(model: str, device: str = "cpu") -> tuple[NextFlowConfig, NextFlowProcessor, NextFlowVQModel]:
    """What codes documents: configuration, processor and float32 vision tokenizer of a folder or Hub id."""
    config = load_config(model)
    return config, load_processor(model), load_vq_model(model).to(device)


def begin_anew(model: PreTrainedModel, name: str, device: torch.device | str = "cpu") -> nn.Module:
    """A part of a model on the meta device, in memory and at its initialisation."""
    part = model.get_submodule(name).to_empty(device=device)
    for module in reversed(list(part.modules())):  # a part may overrule what it consists of
        model._init_weights(module)
    return part


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same tensors under the same names, wherever they are."""
    ours, others = one.state_dict(), other.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[key].cpu(), others[key].cpu()) for key in ours)


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
    check_tensors(model_class, config, name)
    with naming(f"the weights in {name}"):
        model, report = model_class.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    if missing := report["missing_keys"]:
        raise ValueError(f"the weights in {name} lack {len(missing)} tensors, {min(missing)} among them")
    return model


def check_tensors(model_class, config, name: str) -> None:
    """Compare the shapes that a local folder declares with the model's, before memory is taken for either; those of
    quantised weights are others."""
    folder = Path(name)
    has_weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if not has_weights or "quantization_config" in config.to_dict():
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


def _num_layers(config) -> int:
    """Layers and blocks of all parts: at least one tensor each."""
    whole = isinstance(config, NextFlowConfig)
    vq = config.vq_config if whole else config
    layers = vq.semantic_config.num_hidden_layers + vq.semantic_decoder_layers + vq.encoder_blocks + vq.decoder_blocks
    if whole and config.vision_tokenizer is not None:
        layers = 0
    return layers + (config.text_config.num_hidden_layers if whole else 0)
