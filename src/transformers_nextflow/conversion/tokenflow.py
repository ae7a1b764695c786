"""TokenFlow's vision tokenizers as `NextFlowVQModel`: `transformers-nextflow convert tokenflow CHECKPOINT.pt OUT`.

Takes the SigLIP variant (384 x 384) and the CLIP-B variant (224 x 224 and 256 x 256), with the plain or the enhanced
decoder. All sizes are read from the tensors; attention heads, of which tensors show nothing, are those of the released
models, and 4 in transformers narrower than 256. Every tensor of the checkpoint must be known and have its shape; those
that no picture or code depends on (SigLIP's pooling head, usage counts) are left out.

`transformers-nextflow convert tokenflow --from-siglip2 DIR OUT` writes a NextFlow tokenizer to be trained instead: a
SigLIP2-naflex checkpoint as its semantic encoder, everything else at its initialisation.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from .. import NextFlowImageProcessor, NextFlowVQConfig, NextFlowVQModel
from ..utils.files import output_folder
from ..utils.safetensors_folder import SafetensorsFolder
from .checkpoints import check_keys, load_torch_checkpoint

SIGLIP_EDGES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27]
SIGLIP_IMAGE_SIZE = 384
CLIP_EDGES = [1, 2, 4, 6, 8, 10, 12, 14, 16]
CLIP_LEVELS = {"224": 8, "256": 9}
SMALL_WIDTH, SMALL_HEADS = 256, 4
USAGE_WINDOW = 131072
HEAD = "encoder_vqkd.vision_model.head."

# Where a tensor of the checkpoint goes: parts of the model that it is split over along the first dimension, or the
# shape of one that is left out.
Table = dict[str, "list[torch.Tensor] | tuple[int, ...]"]


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of the checkpoint's tensors, and the names of those from which sizes were read."""

    def __init__(self, state: Mapping[str, torch.Tensor]):
        super().__init__({name: tuple(tensor.shape) for name, tensor in state.items()})
        self.read: list[str] = []


def is_siglip(shapes: Shapes) -> bool:
    if any(name.startswith("encoder_vqkd.vision_model.") for name in shapes):
        return True
    if any(name.startswith("encoder_vqkd.transformer.resblocks.") for name in shapes):
        return False
    raise ValueError(
        "the checkpoint is neither TokenFlow's SigLIP variant (encoder_vqkd.vision_model...) nor its CLIP variant "
        "(encoder_vqkd.transformer.resblocks...)"
    )


def config_of(
    state: Mapping[str, torch.Tensor],
    shapes: Shapes,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
) -> NextFlowVQConfig:
    """The configuration whose tensors have the checkpoint's shapes.

    Args:
        shapes: of `state`.
        encoder_heads, decoder_heads: attention heads of the semantic encoder and decoder.

    Raises:
        ValueError: if a tensor that tells a size is missing or cannot be.
    """
    siglip = is_siglip(shapes)
    base, multipliers = _multipliers(shapes, "encoder", last_first=False)
    decoder_base, decoder_multipliers = _multipliers(shapes, "decoder", last_first=True)
    if multipliers != decoder_multipliers:
        raise ValueError(f"encoder and decoder widths must correspond, got {multipliers} and {decoder_multipliers}")
    codebook_size, semantic_dim = _shape(shapes, "quantize.embedding_vqkd.weight", 2)
    _, pixel_dim = _shape(shapes, "quantize.embedding_vqgan.weight", 2)
    patch_size = 2 ** (len(multipliers) - 1)
    sizes = {
        "semantic_config": _siglip_config(shapes, encoder_heads) if siglip else _clip_config(shapes, encoder_heads),
        "semantic_decoder_config": _decoder_config(shapes, decoder_heads),
        "teacher_dim": _shape(shapes, "decode_task_layer.2.weight", 2)[0],
        "semantic_dim": semantic_dim,
        "pixel_dim": pixel_dim,
        "codebook_size": codebook_size,
        "patch_size": patch_size,
        "base_channels": base,
        "decoder_base_channels": decoder_base,
        "channel_multipliers": multipliers,
        "latent_channels": _shape(shapes, "encoder.conv_out.weight", 4)[0],
        "norm_groups": 32,
        "attention": "dense",
        "encoder_blocks": _count(shapes, "encoder.conv_blocks.0.res."),
        "decoder_blocks": _count(shapes, "decoder.conv_blocks.0.res."),
    }
    if siglip:
        mean, std = (_values(state, f"scaling_layer.{name}") for name in ("shift", "scale"))
        sizes |= {
            "semantic_feature_layer": -2,
            "semantic_mean": mean,
            "semantic_deviation": std,
            "image_size": SIGLIP_IMAGE_SIZE,
            "scale_schedules": [[[edge, edge] for edge in SIGLIP_EDGES]],
            "levels": {str(SIGLIP_IMAGE_SIZE): len(SIGLIP_EDGES)},
        }
    else:
        sizes |= {
            "semantic_feature_layer": None,
            "scale_schedules": [[[edge, edge] for edge in CLIP_EDGES]],
            "levels": CLIP_LEVELS,
        }
    return NextFlowVQConfig(**sizes)


def _siglip_config(shapes: Shapes, heads: int | None) -> dict:
    prefix = "encoder_vqkd.vision_model."
    width, _, patch_size, _ = _shape(shapes, prefix + "embeddings.patch_embedding.weight", 4)
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, prefix + "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(shapes, prefix + "encoder.layers."),
        "num_attention_heads": heads or _heads(width, 16),
        "image_size": SIGLIP_IMAGE_SIZE,
        "patch_size": patch_size,
        "vision_use_head": False,
    }


def _clip_config(shapes: Shapes, heads: int | None) -> dict:
    width, _, patch_size, _ = _shape(shapes, "encoder_vqkd.conv1.weight", 4)
    positions, _ = _shape(shapes, "encoder_vqkd.positional_embedding", 2)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _count(shapes, "encoder_vqkd.transformer.resblocks."),
        "num_attention_heads": heads or _heads(width, width // 64),
        "image_size": round((positions - 1) ** 0.5) * patch_size,
        "patch_size": patch_size,
    }


def _decoder_config(shapes: Shapes, heads: int | None) -> dict:
    width, channels, _, _ = _shape(shapes, "decoder_vqkd.patch_embed.proj.weight", 4)
    _, positions, _ = _shape(shapes, "decoder_vqkd.pos_embed", 3)
    return {
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "decoder_vqkd.blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(shapes, "decoder_vqkd.blocks."),
        "num_attention_heads": heads or _heads(width, 12),
        "layer_norm_eps": 1e-6,
        "image_size": round((positions - 1) ** 0.5),
        "patch_size": 1,
        "num_channels": channels,
    }


def _heads(width: int, of_released: int) -> int:
    return SMALL_HEADS if width < SMALL_WIDTH else of_released


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"the checkpoint lacks {name}")
    shapes.read.append(name)
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        raise ValueError(f"{name} must have {dimensions} dimensions, got the shape {shapes[name]}")
    return shapes[name]


def _values(state: Mapping[str, torch.Tensor], name: str) -> list[float]:
    if name not in state:
        raise ValueError(f"the checkpoint lacks {name}")
    return state[name].flatten().tolist()


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    numbers = {name[len(prefix) :].split(".")[0]: name for name in shapes if name.startswith(prefix)}
    if not numbers:
        raise ValueError(f"the checkpoint lacks {prefix}0...")
    shapes.read.append(list(numbers.values())[-1])
    return len(numbers)


def _multipliers(shapes: Shapes, part: str, last_first: bool) -> tuple[int, list[int]]:
    """Channels of the finest resolution, and the multiples of them at each, finest first."""
    levels = range(_count(shapes, f"{part}.conv_blocks."))
    widths = [_shape(shapes, f"{part}.conv_blocks.{level}.res.0.conv1.weight", 4)[0] for level in levels]
    if last_first:
        widths.reverse()
    if any(width % widths[0] for width in widths):
        raise ValueError(f"the widths of {part}.conv_blocks must be multiples of the finest, got {widths}")
    return widths[0], [width // widths[0] for width in widths]


def key_table(model: NextFlowVQModel) -> Table:
    """Every tensor of the checkpoint of which `model` has the sizes."""
    config = model.config
    table: Table = {}
    add = lambda source, *targets: table.update(_tensors(source, *targets))  # noqa: E731

    for part, cnn in (("encoder", model.pixel_encoder), ("decoder", model.pixel_decoder)):
        encoder = part == "encoder"
        for name in ("conv_in", "norm_out", "conv_out"):
            add(f"{part}.{name}", getattr(cnn, name))
        middle = cnn.resolutions[-1][-3:] if encoder else cnn.resolutions[0][:3]
        for index, layer in enumerate(middle):
            table |= _cnn_layer(f"{part}.mid.{index}", layer)
        for level, resolution in enumerate(cnn.resolutions):
            coarsest = level == (len(cnn.resolutions) - 1 if encoder else 0)
            if coarsest:
                resolution = resolution[:-3] if encoder else resolution[3:]
            for index, layer in enumerate(resolution):
                kind, number = (("res", "attn")[index % 2], index // 2) if coarsest else ("res", index)
                table |= _cnn_layer(f"{part}.conv_blocks.{level}.{kind}.{number}", layer)
    for level, conv in enumerate(model.pixel_encoder.downsamples):
        add(f"encoder.conv_blocks.{level}.downsample.conv", conv)
    for level, conv in enumerate(model.pixel_decoder.upsamples):
        add(f"decoder.conv_blocks.{level}.upsample.conv", conv)
    add("quant_conv", model.pixel_encoder.to_code)
    add("post_quant_conv", model.pixel_decoder.from_code)

    for layer in (0, 2):
        add(f"encode_task_layer.{layer}", model.semantic_to_code[layer])
        add(f"decode_task_layer.{layer}", model.semantic_decoder.to_features[layer])
    table |= _siglip(model.semantic_encoder) if config.image_size else _clip(model.semantic_encoder)
    table |= _semantic_decoder(model.semantic_decoder.layers)

    table["quantize.embedding_vqkd.weight"] = [model.quantizer.semantic_codebook]
    table["quantize.embedding_vqgan.weight"] = [model.quantizer.pixel_codebook]
    table["quantize.codebook_used"] = (USAGE_WINDOW,)
    return table


def entry_shape(entry: list[torch.Tensor] | tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of the checkpoint must have."""
    return entry if isinstance(entry, tuple) else (sum(part.shape[0] for part in entry), *entry[0].shape[1:])


def _tensors(source: str, *targets: nn.Module) -> Table:
    """Weight and bias of one module, split over `targets`; a 1 x 1 convolution may become a linear layer."""
    table: Table = {f"{source}.weight": [target.weight for target in targets]}
    if targets[0].bias is not None:
        table[f"{source}.bias"] = [target.bias for target in targets]
    return table


def _cnn_layer(source: str, layer: nn.Module) -> Table:
    """A residual block, or attention, whose 1 x 1 convolutions are linear layers here."""
    table: Table = {}
    if hasattr(layer, "conv1"):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            table |= _tensors(f"{source}.{name}", getattr(layer, name))
        if isinstance(layer.shortcut, nn.Conv2d):
            table |= _tensors(f"{source}.nin_shortcut", layer.shortcut)
        return table
    table |= _tensors(f"{source}.norm", layer.norm)
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases):
        table |= {f"{source}.{name}.weight": [weight[..., None, None]], f"{source}.{name}.bias": [bias]}
    table[f"{source}.proj_out.weight"] = [layer.proj_out.weight[..., None, None]]
    table[f"{source}.proj_out.bias"] = [layer.proj_out.bias]
    return table


def _siglip(encoder: nn.Module) -> Table:
    prefix = "encoder_vqkd.vision_model."
    table: Table = {prefix + name: [parameter] for name, parameter in encoder.named_parameters()}
    width, inner = encoder.config.hidden_size, encoder.config.intermediate_size
    return table | {
        HEAD + "probe": (1, 1, width),
        HEAD + "attention.in_proj_weight": (3 * width, width),
        HEAD + "attention.in_proj_bias": (3 * width,),
        HEAD + "attention.out_proj.weight": (width, width),
        HEAD + "attention.out_proj.bias": (width,),
        HEAD + "layernorm.weight": (width,),
        HEAD + "layernorm.bias": (width,),
        HEAD + "mlp.fc1.weight": (inner, width),
        HEAD + "mlp.fc1.bias": (inner,),
        HEAD + "mlp.fc2.weight": (width, inner),
        HEAD + "mlp.fc2.bias": (width,),
        "scaling_layer.shift": (1, 3, 1, 1),  # in the configuration
        "scaling_layer.scale": (1, 3, 1, 1),
    }


def _clip(encoder: nn.Module) -> Table:
    """OpenAI's own names, not those of transformers."""
    embeddings, prefix = encoder.embeddings, "encoder_vqkd."
    table: Table = {
        prefix + "class_embedding": [embeddings.class_embedding],
        prefix + "positional_embedding": [embeddings.position_embedding.weight],
        prefix + "conv1.weight": [embeddings.patch_embedding.weight],
    }
    table |= _tensors(prefix + "ln_pre", encoder.pre_layrnorm) | _tensors(prefix + "ln_post", encoder.post_layernorm)
    for index, layer in enumerate(encoder.encoder.layers):
        block = f"{prefix}transformer.resblocks.{index}."
        parts = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        table[block + "attn.in_proj_weight"] = [part.weight for part in parts]
        table[block + "attn.in_proj_bias"] = [part.bias for part in parts]
        table |= _tensors(block + "attn.out_proj", layer.self_attn.out_proj)
        table |= _tensors(block + "ln_1", layer.layer_norm1) | _tensors(block + "ln_2", layer.layer_norm2)
        table |= _tensors(block + "mlp.c_fc", layer.mlp.fc1) | _tensors(block + "mlp.c_proj", layer.mlp.fc2)
    return table


def _semantic_decoder(vit: nn.Module) -> Table:
    """BEiT's ViT, which has no bias of the keys."""
    table: Table = {
        "decoder_vqkd.cls_token": [vit.embeddings.cls_token],
        "decoder_vqkd.pos_embed": [vit.embeddings.position_embeddings],
    }
    table |= _tensors("decoder_vqkd.patch_embed.proj", vit.embeddings.patch_embeddings.projection)
    for index, layer in enumerate(vit.layers):
        block, attention = f"decoder_vqkd.blocks.{index}.", layer.attention
        table[block + "attn.qkv.weight"] = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        table[block + "attn.q_bias"] = [attention.q_proj.bias]
        table[block + "attn.v_bias"] = [attention.v_proj.bias]
        table |= _tensors(block + "attn.proj", attention.o_proj)
        table |= _tensors(block + "norm1", layer.layernorm_before) | _tensors(block + "norm2", layer.layernorm_after)
        table |= _tensors(block + "mlp.fc1", layer.mlp.fc1) | _tensors(block + "mlp.fc2", layer.mlp.fc2)
    return table | _tensors("decoder_vqkd.fc_norm", vit.layernorm)


def convert(
    checkpoint: str | Path, encoder_heads: int | None = None, decoder_heads: int | None = None
) -> NextFlowVQModel:
    """A TokenFlow checkpoint file as a float32 model in evaluation mode; heads as in [`config_of`].

    Raises:
        ValueError: if the file is refused, or a tensor is missing, unknown or of another shape; the error names it.
    """
    state = load_torch_checkpoint(checkpoint)
    shapes = Shapes(state)
    try:
        model = NextFlowVQModel(config_of(state, shapes, encoder_heads, decoder_heads)).eval()
        table = key_table(model)
        check_keys(checkpoint, shapes, {name: entry_shape(entry) for name, entry in table.items()})
    except (ValueError, StrictDataclassError) as error:  # sizes that no configuration allows are of the second kind
        read = f"; sizes were read from {', '.join(shapes.read)}" if shapes.read else ""
        raise ValueError(f"{error}{read}") from error
    with torch.no_grad():
        for layer in model.semantic_decoder.layers.layers:
            layer.attention.k_proj.bias.zero_()
        for name, entry in table.items():
            if isinstance(entry, list):
                for part, values in zip(entry, state[name].split([part.shape[0] for part in entry])):
                    part.copy_(values)
    return model


def from_siglip2(folder: str | Path) -> NextFlowVQModel:
    """A NextFlow tokenizer to be trained: the semantic encoder of a SigLIP2-naflex checkpoint (a vision model, or one
    with a text model), everything else at its initialisation."""
    source = SafetensorsFolder(folder)
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type != "siglip2_vision_model":
        raise ValueError(f"{folder} must hold SigLIP2-naflex, got the model type {config.model_type!r}")
    sizes = config.to_dict() | {"vision_use_head": False}
    torch.manual_seed(0)
    model = NextFlowVQModel(NextFlowVQConfig(semantic_config=sizes, patch_size=config.patch_size)).eval()
    parameters = dict(model.semantic_encoder.named_parameters())
    sources = {}
    for name in source:
        own = name.removeprefix("vision_model.")
        if own.startswith("head.") or (own == name and own.startswith(("text_model.", "logit_"))):
            continue
        sources[own] = name
    check_keys(
        folder,
        {own: source.shapes[name] for own, name in sources.items()},
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
    )
    names = {name: own for own, name in sources.items()}
    with torch.no_grad():
        for name, tensor in source.tensors(names):
            parameters[names[name]].copy_(tensor)
    return model


def save(model: NextFlowVQModel, output: str | Path) -> None:
    """Model and image processor, in a new folder."""
    image_processor = NextFlowImageProcessor.from_vq_config(model.config)
    with output_folder(output) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="transformers-nextflow convert tokenflow", description=__doc__.split("\n")[0]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT.pt", help="of TokenFlow")
    source.add_argument("--from-siglip2", metavar="DIR", help="SigLIP2-naflex checkpoint folder, instead")
    parser.add_argument("--encoder-heads", type=int, metavar="N", help="of the semantic encoder, if not the released")
    parser.add_argument("--decoder-heads", type=int, metavar="N", help="of the semantic decoder, if not the released")
    parser.add_argument("output", metavar="OUT", help="new folder")
    arguments = parser.parse_args(argv)
    try:
        if arguments.from_siglip2:
            model = from_siglip2(arguments.from_siglip2)
        else:
            model = convert(arguments.checkpoint, arguments.encoder_heads, arguments.decoder_heads)
        save(model, arguments.output)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{arguments.output}  {model.num_parameters():,} parameters")
    return 0
