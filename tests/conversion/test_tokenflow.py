"""TokenFlow's checkpoints give the codes, features and pictures that TokenFlow computes; misfits are named."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_tokenflow import tokenflow_clip
from safetensors.torch import load_file
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from transformers_nextflow import NextFlowImageProcessor, NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.cli import main as command
from transformers_nextflow.conversion.checkpoints import check_keys
from transformers_nextflow.conversion.tokenflow import (
    Shapes,
    config_of,
    convert,
    entry_shape,
    key_table,
)

FIXTURES = Path(__file__).parents[3] / "shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not beside the repository")


# of TokenFlow's configurations
CLIP_EDGES, CLIP_LEVELS = [1, 2, 4, 6, 8, 10, 12, 14, 16], {"224": 8, "256": 9}
SIGLIP_EDGES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27]


def main(arguments: list[str]) -> int:
    return command(["convert", "tokenflow", *arguments])


def clip_model(decoder_channels: int = 32, decoder_blocks: int = 3, multipliers=(1, 1, 1, 1, 2)) -> NextFlowVQModel:
    """TokenFlow's CLIP variant at tiny sizes, with weights large enough that every layer matters."""
    torch.manual_seed(0)
    config = NextFlowVQConfig(
        semantic_config={
            "model_type": "clip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 16,
        },
        semantic_feature_layer=None,
        semantic_decoder_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "layer_norm_eps": 1e-6,
            "image_size": 14,
            "patch_size": 1,
            "num_channels": 12,
        },
        teacher_dim=20,
        semantic_dim=12,
        pixel_dim=6,
        codebook_size=96,
        base_channels=32,
        decoder_base_channels=decoder_channels,
        channel_multipliers=list(multipliers),
        latent_channels=10,
        norm_groups=32,
        attention="dense",
        encoder_blocks=1,
        decoder_blocks=decoder_blocks,
        scale_schedules=[[[edge, edge] for edge in CLIP_EDGES]],
        levels=CLIP_LEVELS,
    )
    model = NextFlowVQModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "codebook" not in name:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        for layer in model.semantic_decoder.layers.layers:
            layer.attention.k_proj.bias.zero_()
    return model


def tokenflow_state(model: NextFlowVQModel) -> dict[str, torch.Tensor]:
    """A checkpoint in TokenFlow's layout."""
    state = {}
    for name, entry in key_table(model).items():
        state[name] = torch.rand(entry) if isinstance(entry, tuple) else torch.cat(entry).detach().clone()
    return state


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@needs_fixtures
def test_the_siglip_fixture(tmp_path):
    """Through the command, a saved folder, the model and the console's picture."""
    folder = FIXTURES / "tokenflow_siglip_tiny"
    expected = load_file(folder / "expected.safetensors")
    assert main([str(folder / "tokenflow_tiny.pt"), str(tmp_path / "out")]) == 0
    model = NextFlowVQModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        output = model(expected["pixel_values"])
    assert torch.equal(output.quantization.target_codes, expected["codes"])
    assert relative(output.quantization.quantized, expected["quantized"]) < 1e-4
    assert relative(output.semantic_features, expected["semantic_features"]) < 1e-4
    assert relative(output.reconstruction, expected["reconstruction"]) < 1e-4
    decoded = model.decode(expected["codes"], (27, 27))
    assert relative(decoded, expected["reconstruction"].clamp(-1, 1)) < 1e-4

    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    processor = NextFlowImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(Image.open(tmp_path / "picture.png"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 384, 384) and inputs["image_grid_hw"].tolist() == [[27, 27]]


@needs_fixtures
def test_every_key_of_the_released_siglip_checkpoint_is_consumed():
    shapes = json.loads((FIXTURES / "tokenflow_siglip_32k.keys.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state |= {name: torch.full((1, 3, 1, 1), 0.5) for name in ("scaling_layer.shift", "scaling_layer.scale")}
    with torch.device("meta"):
        model = NextFlowVQModel(config_of(state, Shapes(state)))
    table = key_table(model)
    sizes = {name: entry_shape(entry) for name, entry in table.items()}
    check_keys("the released checkpoint", {name: tuple(shape) for name, shape in shapes.items()}, sizes)
    filled = sum(part.numel() for entry in table.values() if isinstance(entry, list) for part in entry)
    key_biases = sum(layer.attention.k_proj.bias.numel() for layer in model.semantic_decoder.layers.layers)
    assert filled == model.num_parameters() - key_biases
    config = model.config
    assert (config.semantic_config.num_attention_heads, config.semantic_decoder_config.num_attention_heads) == (16, 12)
    assert (config.codebook_size, config.encoder_blocks, config.decoder_blocks) == (32768, 2, 3)


ENHANCED = {"decoder_channels": 64, "decoder_blocks": 5}


@pytest.mark.parametrize(
    "size, edges, decoder",
    [
        (224, CLIP_EDGES[:-1], ENHANCED),
        (256, CLIP_EDGES, {}),
        pytest.param(224, CLIP_EDGES[:-1], {}, marks=pytest.mark.slow),
        pytest.param(256, CLIP_EDGES, ENHANCED, marks=pytest.mark.slow),
    ],
)
def test_the_clip_variant(size, edges, decoder, tmp_path):
    state = tokenflow_state(clip_model(**decoder))
    torch.save({"model": state, "steps": 3}, tmp_path / "clip.pt")
    model = convert(tmp_path / "clip.pt")
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes, quantized, semantic, reconstruction = tokenflow_clip(state, pixels, edges)
        output = model(pixels)
    assert len(codes.unique()) > 20
    assert torch.equal(output.quantization.target_codes, codes)
    assert relative(output.quantization.quantized, quantized) < 1e-4
    assert relative(output.semantic_features, semantic) < 1e-4
    assert relative(output.reconstruction, reconstruction) < 1e-4


def test_sizes_are_read_from_the_tensors(tmp_path):
    model = clip_model(multipliers=(1, 2, 1, 1, 3))
    state = tokenflow_state(model)
    for wrapper in ("ema", "model", "state_dict", None):
        other = {"model": {}} if wrapper == "ema" else {}
        torch.save(state if wrapper is None else other | {wrapper: state}, tmp_path / "clip.pt")
        converted = convert(tmp_path / "clip.pt")
        for name, tensor in model.state_dict().items():
            assert torch.equal(converted.state_dict()[name], tensor), name
    assert converted.config.to_dict() == model.config.to_dict()
    converted = convert(tmp_path / "clip.pt", encoder_heads=2, decoder_heads=8)
    assert converted.config.semantic_config.num_attention_heads == 2
    assert converted.config.semantic_decoder_config.num_attention_heads == 8


def test_the_siglip_variant_reads_one_size_and_says_its_scaling(tmp_path):
    shown = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shown |= {"num_attention_heads": 4, "patch_size": 14, "image_size": 384, "vision_use_head": False}
    sizes = clip_model().config.to_dict()
    sizes["semantic_decoder_config"]["image_size"] = 27
    schedules = {"scale_schedules": [[[edge, edge] for edge in SIGLIP_EDGES]], "levels": {"384": 15}}
    own = {"semantic_config": shown, "semantic_feature_layer": -2, "image_size": 384}
    model = NextFlowVQModel(NextFlowVQConfig(**sizes | schedules | own))
    state = tokenflow_state(model)
    shift, scale = (state[f"scaling_layer.{name}"] for name in ("shift", "scale"))
    assert shift.shape == scale.shape == (1, 3, 1, 1) and state["quantize.codebook_used"].shape == (131072,)
    torch.save(state, tmp_path / "siglip.pt")
    converted = convert(tmp_path / "siglip.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    scaling = {"semantic_mean": shift.flatten().tolist(), "semantic_deviation": scale.flatten().tolist()}
    assert converted.config.to_dict() == NextFlowVQConfig(**sizes | schedules | own | scaling).to_dict()
    wide = {"encoder_vqkd.vision_model.embeddings.patch_embedding.weight": torch.empty(1152, 3, 14, 14)}
    assert config_of(state, Shapes(state | wide)).semantic_config.num_attention_heads == 16  # of the released size
    torch.save({name: each for name, each in state.items() if name != "scaling_layer.scale"}, tmp_path / "siglip.pt")
    with pytest.raises(ValueError, match="lacks scaling_layer.scale of 4 dimensions"):
        convert(tmp_path / "siglip.pt")


def test_heads_are_those_of_the_released_sizes(state):
    """Of wide models; heads are no tensors."""
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    shapes["encoder_vqkd.conv1.weight"] = torch.empty(512, 3, 16, 16, device="meta")
    shapes["decoder_vqkd.patch_embed.proj.weight"] = torch.empty(768, 12, 1, 1, device="meta")
    config = config_of(shapes, Shapes(shapes))
    assert config.semantic_config.num_attention_heads == 512 // 64
    assert config.semantic_decoder_config.num_attention_heads == 12


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return tokenflow_state(clip_model())


@pytest.mark.parametrize(
    "name",
    [
        "encoder.mid.1.q.weight",
        "decoder.conv_blocks.0.attn.2.proj_out.bias",
        "encoder_vqkd.class_embedding",
        "decoder_vqkd.blocks.1.attn.v_bias",
        "quantize.codebook_used",
        "quantize.embedding_vqgan.weight",
        "decode_task_layer.2.weight",
        "encoder_vqkd.conv1.weight",
        "encoder.conv_out.weight",
    ],
)
def test_misfits_are_named(name, state, tmp_path, capsys):
    lacking = {key: value for key, value in state.items() if key != name}
    longer = torch.zeros(state[name].shape[0] + 1, *state[name].shape[1:])
    cases = [
        (lacking, f"lacks {name}"),
        (state | {f"{name}.more": torch.zeros(1)}, f"holds the unknown {name}.more"),
        (state | {name: longer}, name),
        (state | {name: state[name][None]}, name),
    ]
    for damaged, message in cases:
        torch.save(damaged, tmp_path / "damaged.pt")
        assert main([str(tmp_path / "damaged.pt"), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_trainers_own_checkpoint_says_how_to_save_the_tensors_alone(state, tmp_path, capsys):
    path, new_path = tmp_path / "trained.pt", tmp_path / "tensors.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, path)
    assert main([str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "more than tensors (argparse.Namespace)" in error
    exec(error.split("`")[1], {"torch": torch, "path": path, "new_path": new_path})
    assert main([str(new_path), str(tmp_path / "out")]) == 0


def test_malicious_and_broken_files_are_refused(state, tmp_path, capsys):
    path, mark = tmp_path / "bad.pt", tmp_path / "executed"

    def refused(message: str) -> None:
        assert main([str(path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not mark.exists() and not (tmp_path / "out").exists()

    for legacy in (False, True):
        torch.save({"model": state, "extra": Payload(mark)}, path, _use_new_zipfile_serialization=not legacy)
        refused(f"is refused, it holds more than tensors{'' if legacy else ' (posix.mkdir)'} or is damaged")
    torch.save(state, path)
    whole = path.read_bytes()
    for length in (0, 3, 1000, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        refused("bad.pt is")
    torch.save(state | {"quantize.embedding_vqkd.weight": torch.zeros(1).expand(2**40, 12)}, path)
    refused("quantize.embedding_vqkd.weight in")
    torch.save({"model": {"encoder.conv_in.weight": "text"}}, path)
    refused("'encoder.conv_in.weight' is a str")
    torch.save([1], path)
    refused("must hold a state dict")
    torch.save({"some.other": torch.zeros(1)}, path)
    refused("neither TokenFlow's SigLIP variant")
    path.unlink()
    refused("there is no checkpoint")


@pytest.mark.parametrize(("entry", "value"), [("hidden_size", "32"), ("num_attention_heads", 0), ("patch_size", -1)])
def test_a_damaged_siglip2_is_named(entry, value, tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=16)).save_pretrained(tmp_path / "siglip2")
    path = tmp_path / "siglip2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    assert main(["--from-siglip2", str(tmp_path / "siglip2"), str(tmp_path / "out")]) == 2
    assert f"the config.json of {tmp_path / 'siglip2'} cannot be loaded: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True], ids=["vision", "with_text"])
def test_from_siglip2(whole, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    if whole:
        text = sizes | {"vocab_size": 20, "projection_size": 32}
        source = Siglip2Model(Siglip2Config(text_config=text, vision_config=sizes | {"patch_size": 16}))
        encoder = source.vision_model
    else:
        source = encoder = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=16))
    source.save_pretrained(tmp_path / "siglip2")
    assert main(["--from-siglip2", str(tmp_path / "siglip2"), str(tmp_path / "out")]) == 0
    model = NextFlowVQModel.from_pretrained(tmp_path / "out")
    expected = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("head.")}
    assert model.semantic_encoder.state_dict().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model.semantic_encoder.state_dict()[name], tensor), name
    assert len(model.schedules) == 123


def test_a_converted_tokenizer_reconstructs_by_the_console_command(state, tmp_path, capsys):
    torch.save(state, tmp_path / "clip.pt")
    assert main([str(tmp_path / "clip.pt"), str(tmp_path / "out")]) == 0
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    picture = ["--output", str(tmp_path / "pair.png")]
    arguments = [str(tmp_path / "red.png"), "--model", str(tmp_path / "out"), "--level", "224", *picture]
    assert command(["reconstruct", *arguments]) == 0
    assert Image.open(tmp_path / "pair.png").size == (448, 224)
