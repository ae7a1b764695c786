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

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2Config

from .. import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
)
from ..utils.files import output_folder
from ..utils.loading import begin_anew, load_config, load_generation_config, load_vq_model, naming, source_name
from ..utils.safetensors_folder import SafetensorsFolder
from .checkpoints import write_shards
from .decoder import EMBEDDING, TextDecoder, hub_key, shared_fields, text_config_of
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


def new_tensors(config: NextFlowConfig, vq_model: NextFlowVQModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What neither source has, by a fixed seed."""
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    tensors = {"model.code_embeddings.weight": vq_model.quantizer().detach()}  # float32, as in training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in ("model.connector", "model.scale_embedding", "code_head"):
            state = begin_anew(model, part).state_dict()
            tensors |= {f"{part}.{name}": tensor.to(dtype) for name, tensor in state.items()}
    return tensors


def convert(
    text_model: str | Path,
    vq: str | Path,
    output: str | Path,
    image_tokens: ImageTokens | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a NextFlow checkpoint with its processor into a new folder.

    Args:
        text_model: checkpoint folder, or GGUF file, whose weights become float32.
        vq: folder of a vision tokenizer, or of a NextFlow.
        image_tokens: special tokens of the text tokenizer, by default Qwen's.
        dtype: of the transformer's weights, by default the text model's own. Codebook, code embeddings and vision
            tokenizer are float32.
        max_shard_size: in bytes, or a size such as `"5GB"`.

    Raises:
        ValueError: if a source is refused, or a tensor is missing, unknown or of another shape; the error names it.
        FileExistsError: if there is something at `output`.
    """
    is_gguf = Path(text_model).suffix == ".gguf"
    with safetensors_folder(text_model) if is_gguf else nullcontext(Path(text_model)) as folder:
        source = SafetensorsFolder(folder)
        with naming(f"the config.json of {text_model}"):
            source_config = AutoConfig.from_pretrained(folder)
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
        config.dtype = dtype or decoder.plan[EMBEDDING].dtype
        config.architectures = [NextFlowForConditionalGeneration.__name__]

        first = {VQ_PREFIX + name: tensor for name, tensor in vq_model.state_dict().items()}
        first |= new_tensors(config, vq_model, config.dtype)
        del vq_model
        plan = {name: tensor.to("meta") for name, tensor in first.items()}
        plan |= {own: tensor.to(dtype or tensor.dtype) for own, tensor in decoder.plan.items()}

        with output_folder(output) as partial:
            write_shards(
                partial, plan, lambda name: first.pop(name) if name in first else decoder.tensor(name), max_shard_size
            )
            processor.save_pretrained(partial)
            names = {"name": Path(output).name, "text": source_name(text_model), "vq": source_name(vq)}
            (partial / "README.md").write_text(README.format(**names), encoding="utf-8")
            load_generation_config(folder, config).save_pretrained(partial)
            config.save_pretrained(partial)


def convert_back(nextflow: str | Path, output: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write the text decoder of a NextFlow checkpoint into a new folder, bit for bit, as a Qwen2 in the Hub's layout,
    with its text tokenizer. Qwen2.5-VL's text decoder has the same names."""
    source = SafetensorsFolder(nextflow)
    config = load_config(str(nextflow))
    names = {hub: name for name in source if (hub := hub_key(name))}
    plan = {
        hub: torch.empty(source.shapes[name], dtype=source.dtypes[name], device="meta") for hub, name in names.items()
    }
    qwen2 = Qwen2Config(
        **shared_fields(config.text_config),
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        architectures=["Qwen2ForCausalLM"],
    )
    with output_folder(output) as folder:
        write_shards(folder, plan, lambda hub: source.tensor(names[hub]), max_shard_size)
        with naming(f"the text tokenizer in {nextflow}"):
            AutoTokenizer.from_pretrained(nextflow).save_pretrained(folder)
        load_generation_config(Path(nextflow), config).save_pretrained(folder)
        qwen2.save_pretrained(folder)
