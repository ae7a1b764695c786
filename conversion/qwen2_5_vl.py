"""Qwen2.5-VL and a vision tokenizer as a NextFlow to be trained: `python -m conversion.qwen2_5_vl QWEN VQ OUT`.

QWEN is a folder of any size, in the Hub's key layout or transformers 5's, one file or shards, heads tied or not; VQ
is a folder of a [`NextFlowVQModel`]. The text decoder is copied tensor by tensor, the ViT left out; code embeddings
are the codebook, code head, connector and scale embeddings at their initialisation. Memory holds the vision tokenizer
first and then one tensor at a time, beside the mapped file it comes from.

`python -m conversion.qwen2_5_vl --back NEXTFLOW OUT` writes the text decoder of a NextFlow checkpoint in the Hub's
layout again.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
)
from transformers_nextflow.files import output_folder
from transformers_nextflow.safetensors_folder import SafetensorsFolder

from .checkpoints import ShardedWriter, check_keys

# The Hub's names, and those of transformers 5 and of NextFlow. A NextFlow has no ViT.
TEXT_KEYS = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
VIT_KEYS = ("visual.", "model.visual.")
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
VQ_PREFIX = "model.vq_model."
README = """\
---
license: other
---
# {name}

## Licence and sources

Text decoder and text tokenizer: {qwen}. Vision tokenizer: {vq}. The licences of both apply.

## Limits

The code head, the connector and the scale embeddings are untrained: text is the text decoder's own, pictures are
noise. No scores are known.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nextflow_key(name: str) -> str | None:
    """Where a tensor of Qwen2.5-VL stands in NextFlow; `None` for the ViT's.

    Raises:
        ValueError: if Qwen2.5-VL has no such tensor.
    """
    if name.startswith(VIT_KEYS):
        return None
    for hub, own in TEXT_KEYS.items():
        for prefix in (own, hub):
            if name.startswith(prefix):
                return own + name[len(prefix) :]
    raise ValueError(f"Qwen2.5-VL has no tensor {name}")


def hub_key(name: str) -> str | None:
    """Where a tensor of NextFlow stands in Qwen2.5-VL's layout on the Hub; `None` for what Qwen does not have."""
    for hub, own in TEXT_KEYS.items():
        if name.startswith(own):
            return hub + name[len(own) :]
    return None


def nextflow_config(qwen: PreTrainedConfig, vq_model: NextFlowVQModel, tokenizer) -> NextFlowConfig:
    """Qwen's text decoder with rotary channels dealt in turn, and the tokenizer's own ids of pictures."""
    text = qwen.text_config.to_dict()
    text["rope_parameters"] = {k: v for k, v in text["rope_parameters"].items() if k != "mrope_section"}
    boi, eoi, image = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    return NextFlowConfig(
        text_config=text,
        vq_config=vq_model.config,
        boi_token_id=boi,
        eoi_token_id=eoi,
        image_token_id=image,
        tie_word_embeddings=qwen.tie_word_embeddings,
    )


def text_tensors(source: SafetensorsFolder, config: NextFlowConfig) -> dict[str, str]:
    """NextFlow's name of each text tensor to the one it comes from, checked to be complete and of the right shapes."""
    names: dict[str, str] = {}
    for name in source:
        own = nextflow_key(name)
        if own in names:
            raise ValueError(f"{source.folder} holds both {names[own]} and {name}")
        if own is not None:
            names[own] = name
    layers = {int(found[1]) for own in names if (found := re.match(r"model\.language_model\.layers\.(\d+)\.", own))}
    if len(layers) != config.text_config.num_hidden_layers:  # before a model of any declared size is built
        raise ValueError(
            f"{source.folder} holds {len(layers)} layers, its config.json says {config.text_config.num_hidden_layers}"
        )
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    expected = {own: tuple(tensor.shape) for own, tensor in model.state_dict().items() if hub_key(own)}
    if config.tie_word_embeddings and HEAD not in names:
        del expected[HEAD]
    check_keys(
        source.folder,
        {name if name != own else own: source.shapes[name] for own, name in names.items()},
        {names.get(own, hub_key(own)): shape for own, shape in expected.items()},
    )
    if config.tie_word_embeddings and HEAD in names:
        (_, embedding), (_, head) = source.tensors([names[EMBEDDING]]), source.tensors([names[HEAD]])
        if not torch.equal(embedding, head):
            raise ValueError(f"config.json ties {names[HEAD]} to the embeddings, but their tensors differ")
        del names[HEAD]
    return names


def new_tensors(config: NextFlowConfig, vq_model: NextFlowVQModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What neither source has, by a fixed seed."""
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    parts = {
        "model.connector": model.model.connector,
        "model.scale_embedding": model.model.scale_embedding,
        "code_head": model.code_head,
    }
    tensors = {"model.code_embeddings.weight": vq_model.quantizer.codebook().detach()}  # float32, as in training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for prefix, part in parts.items():
            part.to_empty(device="cpu")
            for module in reversed(list(part.modules())):  # a part may overrule what it consists of
                model._init_weights(module)
            tensors |= {f"{prefix}.{name}": tensor.to(dtype) for name, tensor in part.state_dict().items()}
    return tensors


def convert(
    qwen: str | Path,
    vq: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a NextFlow checkpoint with its processor into a new folder.

    Args:
        qwen, vq: checkpoint folders.
        dtype: of the transformer's weights, by default Qwen's own. Codebook, code embeddings and vision tokenizer keep
            theirs.
        max_shard_size: in bytes.

    Raises:
        ValueError: if a source is refused, or a tensor is missing, unknown or of another shape; the error names it.
        FileExistsError: if there is something at `output`.
    """
    source = SafetensorsFolder(qwen)
    qwen_config = AutoConfig.from_pretrained(qwen)
    if qwen_config.model_type != "qwen2_5_vl":
        raise ValueError(f"{qwen} must hold a qwen2_5_vl, got the model type {qwen_config.model_type!r}")
    SafetensorsFolder(vq)  # refuses what is damaged
    vq_model = NextFlowVQModel.from_pretrained(vq)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    processor = NextFlowProcessor(NextFlowImageProcessor.from_vq_config(vq_model.config), tokenizer)
    config = nextflow_config(qwen_config, vq_model, tokenizer)
    names = text_tensors(source, config)
    config.dtype = dtype or source.dtypes[names[EMBEDDING]]
    config.architectures = [NextFlowForConditionalGeneration.__name__]

    first = {VQ_PREFIX + name: tensor for name, tensor in vq_model.state_dict().items()}
    first |= new_tensors(config, vq_model, config.dtype)
    del vq_model
    plan = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()}
    plan |= {own: (source.shapes[name], dtype or source.dtypes[name]) for own, name in names.items()}

    with output_folder(output) as folder:
        ShardedWriter(folder, plan, max_shard_size).write(_in_turn(first, source, names, dtype))
        processor.save_pretrained(folder)
        names_of = {"name": Path(output).name, "qwen": Path(qwen).resolve().name, "vq": Path(vq).resolve().name}
        (folder / "README.md").write_text(README.format(**names_of), encoding="utf-8")
        _generation_config(qwen, config).save_pretrained(folder)
        config.save_pretrained(folder)


def _in_turn(
    first: dict[str, torch.Tensor], source: SafetensorsFolder, names: dict[str, str], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of the plan; `first` is emptied on the way."""
    for name in list(first):
        yield name, first.pop(name)
    own_names = {name: own for own, name in names.items()}
    for name, tensor in source.tensors(own_names):
        yield own_names[name], tensor if dtype is None else tensor.to(dtype)


def _generation_config(qwen: str | Path, config: NextFlowConfig) -> GenerationConfig:
    if (Path(qwen) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(qwen)
    return GenerationConfig.from_model_config(config)


def convert_back(nextflow: str | Path, output: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Write the text decoder of a NextFlow checkpoint into a new folder, bit for bit, in the Hub's layout of
    Qwen2.5-VL, with its configuration and text tokenizer."""
    source = SafetensorsFolder(nextflow)
    config = NextFlowConfig.from_pretrained(nextflow)
    names = {hub: name for name in source if (hub := hub_key(name))}
    plan = {hub: (source.shapes[name], source.dtypes[name]) for hub, name in names.items()}
    hubs = {name: hub for hub, name in names.items()}
    text_config = config.text_config
    text_config.tie_word_embeddings = config.tie_word_embeddings
    text_config.dtype = config.dtype
    with output_folder(output) as folder:
        tensors = ((hubs[name], tensor) for name, tensor in source.tensors(hubs))
        ShardedWriter(folder, plan, max_shard_size).write(tensors)
        AutoTokenizer.from_pretrained(nextflow).save_pretrained(folder)
        text_config.save_pretrained(folder)


def parse_size(text: str) -> int:
    """`"5GB"`, `"500MB"` or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f'a size reads "5GB", "500MB" or a number of bytes, got {text!r}')
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.qwen2_5_vl",
        usage="%(prog)s QWEN VQ OUT [options]\n       %(prog)s --back NEXTFLOW OUT [options]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Qwen2.5-VL, vision tokenizer, and a new folder")
    parser.add_argument("--back", action="store_true", help="the text decoder of a NextFlow in Qwen's layout instead")
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer's weights (default: Qwen's own)")
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.folders) != (2 if arguments.back else 3):
        parser.error("give QWEN VQ OUT, or --back NEXTFLOW OUT")
    if arguments.back and arguments.dtype:
        parser.error("--back keeps every tensor as it is: no --dtype")
    try:
        if arguments.back:
            convert_back(*arguments.folders, arguments.max_shard_size)
        else:
            dtype = DTYPES[arguments.dtype] if arguments.dtype else None
            convert(*arguments.folders, dtype, arguments.max_shard_size)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(arguments.folders[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
