"""A text model and a vision tokenizer as a NextFlow: `transformers-nextflow convert language-model TEXT VQ OUT`.

TEXT is a folder of a Llama, Qwen2, Qwen2.5 or Qwen2.5-VL of any size, in one safetensors file or shards, heads tied or
not; or a GGUF file of one of the first three. VQ is a folder of a [`NextFlowVQModel`], or of a whole NextFlow whose
vision tokenizer is taken. The text decoder is copied tensor by tensor, a ViT left out: text logits equal the source's
bit for bit. Code embeddings are the codebook; code head, connector and scale embeddings are at their initialisation.
Memory holds the vision tokenizer first and then one tensor at a time, beside the mapped file it comes from.

`<boi>`, `<eoi>` and `<image>` are special tokens of the text tokenizer, chosen by `--boi`, `--eoi` and `--image`, or
Qwen's; a tokenizer that has none of Qwen's gets them, with new rows in embedding and head. Chats have the text model's
own template.

`transformers-nextflow convert language-model --back NEXTFLOW OUT` writes the text decoder of a NextFlow checkpoint as
a Qwen2, which is the same arithmetic, bit for bit.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2Config

from .. import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
)
from ..utils.files import output_folder
from ..utils.loading import load_vq_model
from ..utils.safetensors_folder import SafetensorsFolder
from .checkpoints import ShardedWriter
from .decoder import EMBEDDING, SAME_FIELDS, TextDecoder, hub_key, text_config_of
from .gguf import safetensors_folder
from .text_tokenizer import ImageTokens, chat_template_of, load_text_tokenizer

VQ_PREFIX = "model.vq_model."
README = """\
---
license: other
---
# {name}

## Licence and sources

Text decoder and text tokenizer: {text}. Vision tokenizer: {vq}. The licences of both apply.

## Limits

The code head, the connector and the scale embeddings are untrained: text is the text decoder's own, pictures are
noise. No scores are known.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def new_tensors(config: NextFlowConfig, vq_model: NextFlowVQModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What neither source has, by a fixed seed."""
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    parts = {
        "model.connector": model.model.connector,
        "model.scale_embedding": model.model.scale_embedding,
        "code_head": model.code_head,
    }
    tensors = {"model.code_embeddings.weight": vq_model.quantizer().detach()}  # float32, as in training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for prefix, part in parts.items():
            part.to_empty(device="cpu")
            for module in reversed(list(part.modules())):  # a part may overrule what it consists of
                model._init_weights(module)
            tensors |= {f"{prefix}.{name}": tensor.to(dtype) for name, tensor in part.state_dict().items()}
    return tensors


def convert(
    text_model: str | Path,
    vq: str | Path,
    output: str | Path,
    image_tokens: ImageTokens | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a NextFlow checkpoint with its processor into a new folder.

    Args:
        text_model: checkpoint folder, or GGUF file, whose weights become float32.
        vq: folder of a vision tokenizer, or of a NextFlow.
        image_tokens: special tokens of the text tokenizer, by default Qwen's.
        dtype: of the transformer's weights, by default the text model's own. Codebook, code embeddings and vision
            tokenizer are float32.
        max_shard_size: in bytes.

    Raises:
        ValueError: if a source is refused, or a tensor is missing, unknown or of another shape; the error names it.
        FileExistsError: if there is something at `output`.
    """
    is_gguf = Path(text_model).suffix == ".gguf"
    with safetensors_folder(text_model) if is_gguf else nullcontext(Path(text_model)) as folder:
        source, source_config = SafetensorsFolder(folder), AutoConfig.from_pretrained(folder)
        text_config = text_config_of(source_config)
        tokenizer, tokens, new_ids = load_text_tokenizer(folder, image_tokens)
        if (count := len(tokenizer) - len(new_ids)) > text_config["vocab_size"]:
            raise ValueError(f"the text tokenizer has {count} tokens, the embedding {text_config['vocab_size']} rows")
        text_config["vocab_size"] = max(text_config["vocab_size"], *(token_id + 1 for token_id in new_ids), 0)
        vq_model = load_vq_model(str(vq))
        processor = NextFlowProcessor(
            NextFlowImageProcessor.from_vq_config(vq_model.config), tokenizer, chat_template_of(tokenizer, tokens)
        )
        config = NextFlowConfig(
            text_config=text_config,
            vq_config=vq_model.config,
            boi_token_id=processor.boi_token_id,
            eoi_token_id=processor.eoi_token_id,
            image_token_id=processor.image_token_id,
            tie_word_embeddings=source_config.tie_word_embeddings,
        )
        decoder = TextDecoder(source, source_config, config, new_ids)
        config.dtype = dtype or decoder.dtypes[EMBEDDING]
        config.architectures = [NextFlowForConditionalGeneration.__name__]

        first = {VQ_PREFIX + name: tensor for name, tensor in vq_model.state_dict().items()}
        first |= new_tensors(config, vq_model, config.dtype)
        del vq_model
        plan = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()}
        plan |= {own: (shape, dtype or decoder.dtypes[own]) for own, shape in decoder.shapes.items()}

        with output_folder(output) as partial:
            ShardedWriter(partial, plan, max_shard_size).write(_in_turn(first, decoder, dtype))
            processor.save_pretrained(partial)
            names = {"name": Path(output).name, "text": Path(text_model).resolve().name, "vq": Path(vq).resolve().name}
            (partial / "README.md").write_text(README.format(**names), encoding="utf-8")
            _generation_config(folder, config).save_pretrained(partial)
            config.save_pretrained(partial)


def _in_turn(
    first: dict[str, torch.Tensor], decoder: TextDecoder, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of the plan; `first` is emptied on the way."""
    for name in list(first):
        yield name, first.pop(name)
    for name, tensor in decoder.tensors():
        yield name, tensor if dtype is None else tensor.to(dtype)


def _generation_config(folder: Path, config: NextFlowConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def convert_back(nextflow: str | Path, output: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Write the text decoder of a NextFlow checkpoint into a new folder, bit for bit, as a Qwen2 in the Hub's layout,
    with its text tokenizer. Qwen2.5-VL's text decoder has the same names."""
    source = SafetensorsFolder(nextflow)
    config = NextFlowConfig.from_pretrained(nextflow)
    names = {hub: name for name in source if (hub := hub_key(name))}
    plan = {hub: (source.shapes[name], source.dtypes[name]) for hub, name in names.items()}
    hubs = {name: hub for hub, name in names.items()}
    text = config.text_config
    rope = {name: value for name, value in text.rope_parameters.items() if name != "mrope_section"}
    qwen2 = Qwen2Config(
        **{name: getattr(text, name) for name in SAME_FIELDS},
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        architectures=["Qwen2ForCausalLM"],
    )
    with output_folder(output) as folder:
        tensors = ((hubs[name], tensor) for name, tensor in source.tensors(hubs))
        ShardedWriter(folder, plan, max_shard_size).write(tensors)
        AutoTokenizer.from_pretrained(nextflow).save_pretrained(folder)
        _generation_config(Path(nextflow), config).save_pretrained(folder)
        qwen2.save_pretrained(folder)


def parse_size(text: str) -> int:
    """`"5GB"`, `"500MB"` or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f'a size reads "5GB", "500MB" or a number of bytes, got {text!r}')
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="transformers-nextflow convert language-model",
        usage="%(prog)s TEXT VQ OUT [options]\n       %(prog)s --back NEXTFLOW OUT [options]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="text model, vision tokenizer, and a new folder")
    parser.add_argument("--back", action="store_true", help="the text decoder of a NextFlow as a Qwen2 instead")
    group = parser.add_argument_group("special tokens of the text model that serve for pictures (default: Qwen's)")
    for name, meaning in zip(ImageTokens._fields, ("begins a picture", "ends it", "stands for its codes")):
        group.add_argument(f"--{name}", metavar="TOKEN", help=meaning)
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer's weights (default: the text model's own)")
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    tokens = [getattr(arguments, name) for name in ImageTokens._fields]
    if len(arguments.folders) != (2 if arguments.back else 3):
        parser.error("give TEXT VQ OUT, or --back NEXTFLOW OUT")
    if arguments.back and (arguments.dtype or any(tokens)):
        parser.error("--back keeps every tensor as it is: no --dtype, --boi, --eoi or --image")
    if any(tokens) and not all(tokens):
        parser.error("name all of --boi, --eoi and --image, or none")
    try:
        if arguments.back:
            convert_back(*arguments.folders, max_shard_size=arguments.max_shard_size)
        else:
            options = {
                "image_tokens": ImageTokens(*tokens) if all(tokens) else None,
                "dtype": DTYPES[arguments.dtype] if arguments.dtype else None,
                "max_shard_size": arguments.max_shard_size,
            }
            convert(*arguments.folders, **options)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(arguments.folders[-1])
    return 0
