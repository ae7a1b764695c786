"""TokenFlow's vision tokenizers as `NextFlowVQModel`: `transformers-nextflow convert tokenflow CHECKPOINT.pt OUT`.

Takes the SigLIP variant (384 x 384) and the CLIP-B variant (224 x 224 and 256 x 256), with the plain or the enhanced
decoder. All sizes are read from the tensors; attention heads, of which tensors show nothing, are those of the released
models, and 4 in transformers narrower than 256. Every tensor of the checkpoint must be known and have its shape; those
that no picture or code depends on (SigLIP's pooling head, usage counts) are left out.

`transformers-nextflow convert tokenflow --from-siglip2 DIR OUT` writes a NextFlow tokenizer to be trained instead: a
SigLIP2-naflex checkpoint as its semantic encoder, everything else at its initialisation.
"""

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from .. import NextFlowImageProcessor, NextFlowVQConfig, NextFlowVQModel
from ..modeling_nextflow_vq import AttnBlock, ResidualBlock
from ..utils.files import output_folder
from ..utils.loading import naming
from ..utils.safetensors_folder import SafetensorsFolder
from .checkpoints import check_keys, load_torch_checkpoint

SIGLIP_EDGES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27]
SIGLIP_IMAGE_SIZE = 384
CLIP_EDGES = [1, 2, 4, 6, 8, 10, 12, 14, 16]
CLIP_LEVELS = {"224": 8, "256": 9}
SMALL_WIDTH, SMALL_HEADS = 256, 4
USAGE_WINDOW = 131072
SIGLIP_PREFIX = "encoder_vqkd.vision_model."
CLIP_BLOCKS, BEIT_BLOCKS = "encoder_vqkd.transformer.resblocks.", "decoder_vqkd.blocks."

# Names of the checkpoint, and the parts of a module of ours that are split from that tensor along the first dimension;
# `{}` is weight and bias.
PARTS = {
    "encoder.conv_in.{}": "pixel_encoder.conv_in.{}",
    "encoder.norm_out.{}": "pixel_encoder.norm_out.{}",
    "encoder.conv_out.{}": "pixel_encoder.conv_out.{}",
    "quant_conv.{}": "pixel_encoder.to_code.{}",
    "decoder.conv_in.{}": "pixel_decoder.conv_in.{}",
    "decoder.norm_out.{}": "pixel_decoder.norm_out.{}",
    "decoder.conv_out.{}": "pixel_decoder.conv_out.{}",
    "post_quant_conv.{}": "pixel_decoder.from_code.{}",
    "encode_task_layer.0.{}": "semantic_to_code.0.{}",
    "encode_task_layer.2.{}": "semantic_to_code.2.{}",
    "decode_task_layer.0.{}": "semantic_decoder.to_features.0.{}",
    "decode_task_layer.2.{}": "semantic_decoder.to_features.2.{}",
    "quantize.embedding_vqkd.weight": "quantizer.semantic_codebook",
    "quantize.embedding_vqgan.weight": "quantizer.pixel_codebook",
}
RESIDUAL_BLOCK = {f"{name}.{{}}": f"{name}.{{}}" for name in ("norm1", "conv1", "norm2", "conv2")}
CLIP = {  # OpenAI's own names, not those of transformers
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.{}": "pre_layrnorm.{}",
    "ln_post.{}": "post_layernorm.{}",
}
CLIP_BLOCK = {
    "attn.in_proj_{}": "self_attn.q_proj.{} self_attn.k_proj.{} self_attn.v_proj.{}",
    "attn.out_proj.{}": "self_attn.out_proj.{}",
    "ln_1.{}": "layer_norm1.{}",
    "ln_2.{}": "layer_norm2.{}",
    "mlp.c_fc.{}": "mlp.fc1.{}",
    "mlp.c_proj.{}": "mlp.fc2.{}",
}
BEIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{}": "embeddings.patch_embeddings.projection.{}",
    "fc_norm.{}": "layernorm.{}",
}
BEIT_BLOCK = {  # no bias of the keys
    "attn.qkv.weight": "attention.q_proj.weight attention.k_proj.weight attention.v_proj.weight",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj.{}": "attention.o_proj.{}",
    "norm1.{}": "layernorm_before.{}",
    "norm2.{}": "layernorm_after.{}",
    "mlp.fc1.{}": "mlp.fc1.{}",
    "mlp.fc2.{}": "mlp.fc2.{}",
}

# Where a tensor of the checkpoint goes: parts of the model that it is split over along the first dimension, or the
# shape of one that is left out.
Table = dict[str, "list[torch.Tensor] | tuple[int, ...]"]


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of the checkpoint's tensors, and the names of those from which sizes were read."""

    def __init__(self, state: Mapping[str, torch.Tensor]):
        super().__init__({name: tuple(tensor.shape) for name, tensor in state.items()})
        self.read: list[str] = []


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
    siglip = any(name.startswith(SIGLIP_PREFIX) for name in shapes)
    if not siglip and not any(name.startswith(CLIP_BLOCKS) for name in shapes):
        raise ValueError(
            "the checkpoint is neither TokenFlow's SigLIP variant (encoder_vqkd.vision_model...) nor its CLIP variant "
            "(encoder_vqkd.transformer.resblocks...)"
        )
    widths, decoder_widths = _widths(shapes, "encoder"), _widths(shapes, "decoder")[::-1]
    multipliers = [width // widths[0] for width in widths]
    if [[each * of_part[0] for each in multipliers] for of_part in (widths, decoder_widths)] != [
        widths,
        decoder_widths,
    ]:
        got = f"got {widths} of the encoder and {decoder_widths} of the decoder"
        raise ValueError(f"widths must be the same multiples of the finest's in encoder and decoder, {got}")
    codebook_size, semantic_dim = _shape(shapes, "quantize.embedding_vqkd.weight", 2)
    decoder = _transformer(shapes, "decoder_vqkd.patch_embed.proj.weight", BEIT_BLOCKS, "mlp.fc1", decoder_heads, 12)
    decoder |= {"layer_norm_eps": 1e-6, "image_size": _edge(_shape(shapes, "decoder_vqkd.pos_embed", 3)[1])}
    sizes: dict = {
        "semantic_decoder_config": decoder,
        "teacher_dim": _shape(shapes, "decode_task_layer.2.weight", 2)[0],
        "semantic_dim": semantic_dim,
        "pixel_dim": _shape(shapes, "quantize.embedding_vqgan.weight", 2)[1],
        "codebook_size": codebook_size,
        "patch_size": 2 ** (len(multipliers) - 1),
        "base_channels": widths[0],
        "decoder_base_channels": decoder_widths[0],
        "channel_multipliers": multipliers,
        "latent_channels": _shape(shapes, "encoder.conv_out.weight", 4)[0],
        "norm_groups": 32,
        "attention": "dense",
        "encoder_blocks": _count(shapes, "encoder.conv_blocks.0.res."),
        "decoder_blocks": _count(shapes, "decoder.conv_blocks.0.res."),
        "semantic_feature_layer": -2 if siglip else None,
        "scale_schedules": [[[edge, edge] for edge in (SIGLIP_EDGES if siglip else CLIP_EDGES)]],
        "levels": {str(SIGLIP_IMAGE_SIZE): len(SIGLIP_EDGES)} if siglip else CLIP_LEVELS,
    }
    if siglip:
        patches, blocks = f"{SIGLIP_PREFIX}embeddings.patch_embedding.weight", f"{SIGLIP_PREFIX}encoder.layers."
        encoder = _transformer(shapes, patches, blocks, "mlp.fc1", encoder_heads, 16)
        own = {"model_type": "siglip_vision_model", "image_size": SIGLIP_IMAGE_SIZE, "vision_use_head": False}
        sizes["image_size"] = SIGLIP_IMAGE_SIZE
        for field, name in (("semantic_mean", "scaling_layer.shift"), ("semantic_deviation", "scaling_layer.scale")):
            _shape(shapes, name, 4)
            sizes[field] = state[name].flatten().tolist()
    else:
        patches = "encoder_vqkd.conv1.weight"
        heads = _shape(shapes, patches, 4)[0] // 64
        encoder = _transformer(shapes, patches, CLIP_BLOCKS, "mlp.c_fc", encoder_heads, heads)
        edge = _edge(_shape(shapes, "encoder_vqkd.positional_embedding", 2)[0])
        own = {"model_type": "clip_vision_model", "image_size": edge * encoder["patch_size"]}
    return NextFlowVQConfig(**sizes, semantic_config=encoder | own)


def _transformer(shapes: Shapes, patches: str, blocks: str, mlp: str, heads: int | None, of_released: int) -> dict:
    """Sizes of a vision transformer; `heads` by default those of the released one."""
    width, channels, patch_size, _ = _shape(shapes, patches, 4)
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch_size,
        "intermediate_size": _shape(shapes, f"{blocks}0.{mlp}.weight", 2)[0],
        "num_hidden_layers": _count(shapes, blocks),
        "num_attention_heads": heads or (SMALL_HEADS if width < SMALL_WIDTH else of_released),
    }


def _edge(positions: int) -> int:
    """Of the square grid of all positions but the class token's."""
    return round((positions - 1) ** 0.5)


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    shapes.read.append(name)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"the checkpoint lacks {name} of {dimensions} dimensions, got the shape {shape}")
    return shape


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    numbers = {name[len(prefix) :].split(".")[0]: name for name in shapes if name.startswith(prefix)}
    if not numbers:
        raise ValueError(f"the checkpoint lacks {prefix}0...")
    shapes.read.append(list(numbers.values())[-1])
    return len(numbers)


def _widths(shapes: Shapes, part: str) -> list[int]:
    """Channels of each resolution."""
    levels = range(_count(shapes, f"{part}.conv_blocks."))
    return [_shape(shapes, f"{part}.conv_blocks.{level}.res.0.conv1.weight", 4)[0] for level in levels]


def key_table(model: NextFlowVQModel) -> Table:
    """Every tensor of the checkpoint of which `model` has the sizes."""
    table: Table = _tensors("", model, PARTS)
    resolutions = {"encoder": model.pixel_encoder.resolutions, "decoder": model.pixel_decoder.resolutions}
    levels = {part: [[*level] for level in of_part] for part, of_part in resolutions.items()}
    middles = {"encoder": levels["encoder"][-1][-3:], "decoder": levels["decoder"][0][:3]}
    del levels["encoder"][-1][-3:], levels["decoder"][0][:3]
    for part, middle in middles.items():
        for index, layer in enumerate(middle):
            table |= _cnn_layer(f"{part}.mid.{index}", layer)
        for level, layers in enumerate(levels[part]):
            for kind, layer_class in (("res", ResidualBlock), ("attn", AttnBlock)):
                for index, layer in enumerate(layer for layer in layers if isinstance(layer, layer_class)):
                    table |= _cnn_layer(f"{part}.conv_blocks.{level}.{kind}.{index}", layer)
    resamplings = {
        "encoder.{}.downsample": model.pixel_encoder.downsamples,
        "decoder.{}.upsample": model.pixel_decoder.upsamples,
    }
    for name, convs in resamplings.items():
        for level, conv in enumerate(convs):
            table |= _tensors(name.format(f"conv_blocks.{level}") + ".conv.", conv, {"{}": "{}"})

    encoder, decoder = model.semantic_encoder, model.semantic_decoder.layers
    if model.config.image_size:
        table |= {SIGLIP_PREFIX + name: [parameter] for name, parameter in encoder.named_parameters()}
        table |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}  # in the configuration
        with torch.device("meta"):
            pooling_head = SiglipMultiheadAttentionPoolingHead(encoder.config).state_dict()
        table |= {f"{SIGLIP_PREFIX}head.{name}": tuple(tensor.shape) for name, tensor in pooling_head.items()}
    else:
        table |= _tensors("encoder_vqkd.", encoder, CLIP)
        for index, layer in enumerate(encoder.encoder.layers):
            table |= _tensors(f"{CLIP_BLOCKS}{index}.", layer, CLIP_BLOCK)
    table |= _tensors("decoder_vqkd.", decoder, BEIT)
    for index, layer in enumerate(decoder.layers):
        table |= _tensors(f"{BEIT_BLOCKS}{index}.", layer, BEIT_BLOCK)
    return table | {"quantize.codebook_used": (USAGE_WINDOW,)}


def entry_shape(entry: list[torch.Tensor] | tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of the checkpoint must have."""
    return entry if isinstance(entry, tuple) else (sum(part.shape[0] for part in entry), *entry[0].shape[1:])


def _tensors(prefix: str, module: nn.Module, names: Mapping[str, str]) -> Table:
    """The tensors that a table such as `PARTS` names, below `prefix` and in `module`."""
    return {
        prefix + name.format(kind): [attrgetter(path)(module) for path in parts.replace("{}", kind).split()]
        for name, parts in names.items()
        for kind in ("weight", "bias")
    }


def _cnn_layer(source: str, layer: nn.Module) -> Table:
    """A residual block, or attention, whose 1 x 1 convolutions are linear layers here."""
    if isinstance(layer, ResidualBlock):
        shortcut = {"nin_shortcut.{}": "shortcut.{}"} if isinstance(layer.shortcut, nn.Conv2d) else {}
        return _tensors(f"{source}.", layer, RESIDUAL_BLOCK | shortcut)
    weights = zip(("q", "k", "v", "proj_out"), (*layer.qkv.weight.chunk(3), layer.proj_out.weight))
    table = _tensors(f"{source}.", layer, {"norm.{}": "norm.{}", "proj_out.bias": "proj_out.bias"})
    table |= {f"{source}.{name}.weight": [weight[..., None, None]] for name, weight in weights}
    return table | {f"{source}.{name}.bias": [bias] for name, bias in zip("qkv", layer.qkv.bias.chunk(3))}


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
    torch.manual_seed(0)
    with naming(f"the config.json of {folder}"):
        config = AutoConfig.from_pretrained(folder)
        config = getattr(config, "vision_config", config)
        if config.model_type != "siglip2_vision_model":
            raise ValueError(f"it must be of SigLIP2-naflex, got the model type {config.model_type!r}")
        sizes = config.to_dict() | {"vision_use_head": False}
        model = NextFlowVQModel(NextFlowVQConfig(semantic_config=sizes, patch_size=config.patch_size)).eval()
    encoder = model.semantic_encoder
    left_out = ("head.", "vision_model.head.", "text_model.", "logit_")
    sources = {name.removeprefix("vision_model."): name for name in source if not name.startswith(left_out)}
    check_keys(
        folder,
        {own: source.shapes[name] for own, name in sources.items()},
        {own: tuple(tensor.shape) for own, tensor in encoder.state_dict().items()},
    )
    encoder.load_state_dict({own: source.tensor(name) for own, name in sources.items()})
    return model


def save(model: NextFlowVQModel, output: str | Path) -> None:
    """Model and image processor, in a new folder."""
    with output_folder(output) as folder:
        model.save_pretrained(folder)
        NextFlowImageProcessor.from_vq_config(model.config).save_pretrained(folder)
