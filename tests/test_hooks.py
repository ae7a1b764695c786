"""Weights are used by calling modules, so whoever hooks modules serves every way into the model: accelerate's offload,
and a hook that lets each module have its weights only while it runs."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pretended_devices import DEVICES, PretendedDevices
from tiny_models import (
    BOI,
    EOS,
    PATCH,
    SQUARE,
    WIDE,
    Picture,
    batch_of,
    refer_to,
    relative,
    shown,
    tiny_config,
    tiny_model,
)

from transformers_nextflow import NextFlowForConditionalGeneration

accelerate = pytest.importorskip("accelerate")

ROWS = [[10, Picture(SQUARE, 1), 11, 12, EOS], [13, Picture(WIDE, 2), EOS]]
EDIT = [10, shown(SQUARE, 1), 11]
NULL = [shown(SQUARE, 1), 20, 21]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request) -> NextFlowForConditionalGeneration:
    return tiny_model(tiny_config(tie_word_embeddings=request.param))


def home(model) -> torch.device:
    """Where a caller's tensors are."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def inputs_of(model, *rows) -> dict:
    return {name: tensor.to(home(model)) for name, tensor in batch_of(model, *rows).items()}


def guided(model, prompt: list, null: list) -> dict:
    negative = inputs_of(model, null)
    return inputs_of(model, prompt) | {f"negative_{name}": negative[name] for name in ("input_ids", "attention_mask")}


def with_labels(model) -> dict:
    batch = inputs_of(model, *ROWS)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def patches(model) -> torch.Tensor:
    return torch.rand(9 + 8, 3 * PATCH**2, generator=torch.Generator().manual_seed(0)).to(home(model)) * 2 - 1


def codes(model) -> torch.Tensor:
    return torch.arange(14, device=home(model))[None]


def pixels(model) -> torch.Tensor:
    return torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(home(model))


def loss(model) -> torch.Tensor:
    return model(**with_labels(model)).loss


def token_losses(model) -> torch.Tensor:
    return model(**with_labels(model), z_loss=0.1).token_losses


def logits(model) -> torch.Tensor:
    return model(**inputs_of(model, *ROWS)).logits


def logits_of_an_open_image(model) -> torch.Tensor:
    inputs = inputs_of(model, [10, 11, BOI])
    return model(**inputs, image_grid_hw=torch.tensor([SQUARE], device=home(model))).logits


def logits_of_embeddings(model) -> torch.Tensor:
    inputs = inputs_of(model, *ROWS)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return model(**inputs, inputs_embeds=embeds.to(home(model))).logits


def draw(model) -> torch.Tensor:
    return model.generate(**guided(model, [10, 11, BOI], [20, BOI]), generation_mode="image", seed=0)


def draw_refined(model) -> torch.Tensor:
    prompt = guided(model, [10, 11, BOI], [20, BOI])
    return model.generate(**prompt, generation_mode="image", seed=0, refine_top_k=[3], num_images_per_prompt=2)


def edit(model) -> torch.Tensor:
    prompt = guided(model, [*EDIT, BOI], [*NULL, BOI])
    return model.generate(**prompt, generation_mode="image", seed=0, image_guidance_scale=1.5)


def describe(model) -> torch.Tensor:
    inputs = inputs_of(model, [10, shown(SQUARE), 11, 12], [13, shown(WIDE)])
    del inputs["image_codes"]
    return model.generate(**inputs, pixel_values=patches(model), max_new_tokens=3, do_sample=False)


def interleave(model) -> torch.Tensor:
    options = {"generation_mode": "interleaved", "max_new_tokens": 3, "sequence_bias": {(BOI,): 40.0}}
    output = model.generate(**guided(model, EDIT, NULL), **options, max_new_images=2, seed=0)
    assert len(output.image_grid_hw) > 1
    return torch.cat([output.sequences[0], output.image_codes])


def encode(model) -> torch.Tensor:
    return model.encode_images(patches(model), [SQUARE, WIDE])


def decode(model) -> torch.Tensor:
    return model.decode_image_tokens(48 + codes(model), SQUARE)


def decoder_conditions(model) -> torch.Tensor:
    return torch.cat(model.model.vq_model.condition_features(codes(model), SQUARE), dim=1)


def tokenize(model) -> torch.Tensor:
    return model.model.vq_model(pixels(model)).semantic_features


USES = [loss, token_losses, logits, logits_of_an_open_image, logits_of_embeddings, draw, draw_refined, edit]
USES += [describe, interleave, encode, decode, decoder_conditions, tokenize]
BY_USE = pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)


@functools.cache
@torch.no_grad()
def answer(use: Callable, model) -> torch.Tensor:
    return use(model)


@torch.no_grad()
def assert_same(use: Callable, model, other) -> None:
    expected, got = answer(use, model), use(other).cpu()
    if expected.is_floating_point():
        assert relative(got, expected) < 1e-5
    else:
        assert torch.equal(got, expected)


# accelerate


@pytest.fixture(scope="module")
def offloaded(model) -> NextFlowForConditionalGeneration:
    other = copy.deepcopy(model)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    return other


@BY_USE
def test_offloaded_to_the_cpu(model, offloaded, use):
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    assert_same(use, model, offloaded)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_device_map(model, folder, tmp_path_factory) -> NextFlowForConditionalGeneration:
    """The library's own `device_map="auto"`, with memory for half of the weights."""
    options = {"device_map": "auto", "max_memory": {"cpu": "90KB"}, "offload_folder": tmp_path_factory.mktemp("disk")}
    other = NextFlowForConditionalGeneration.from_pretrained(folder, **options)
    other.generation_config = model.generation_config
    return other


@BY_USE
def test_offloaded_to_disk_by_a_device_map(model, by_device_map, use):
    assert set(by_device_map.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(use, model, by_device_map)


@pytest.fixture(scope="module", params=["heads", "images", "decoder"])
def on_disk(request, model, folder, tmp_path_factory) -> NextFlowForConditionalGeneration:
    parts = {
        "heads": ("lm_head", "code_head"),
        "images": ("model.vq_model", "model.code_embeddings", "model.connector", "model.scale_embedding"),
        "decoder": ("model.language_model",),
    }
    everything = [name for names in parts.values() for name in names]
    if model.config.tie_word_embeddings and request.param != "images":
        pytest.skip("accelerate keeps tied weights on one device")
    other = NextFlowForConditionalGeneration.from_pretrained(
        folder,
        device_map={name: "disk" if name in parts[request.param] else "cpu" for name in everything},
        offload_folder=tmp_path_factory.mktemp("disk"),
    )
    other.generation_config = model.generation_config
    return other


@BY_USE
def test_parts_on_disk(model, on_disk, use):
    assert_same(use, model, on_disk)


@pytest.mark.parametrize("is_all", [False, True], ids=["decoder", "all"])
def test_a_vision_tokenizer_of_another_folder_beside_parts_on_disk(is_all, tmp_path):
    """As checkpoints of a training refer to it."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    refer_to(str(tmp_path / "model"), model, tmp_path / "checkpoint")
    names = ("lm_head", "code_head", "model.code_embeddings", "model.connector", "model.scale_embedding")
    places = dict.fromkeys(names, "disk" if is_all else "cpu") | {
        "model.language_model": "disk",
        "model.vq_model": "cpu",
    }
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    other = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", **options)
    pixels = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.model.vq_model.encode(pixels)
    assert torch.equal(other.model.vq_model.encode(pixels), codes)
    assert torch.equal(other.model.vq_model.decode(codes, SQUARE), model.model.vq_model.decode(codes, SQUARE))


# Several devices

FIRST, SECOND = map(str, DEVICES)
DECODER = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
TOKENIZER = ["semantic_encoder", "semantic_to_code", "pixel_encoder", "quantizer", "semantic_decoder", "pixel_decoder"]
PARTS = [
    *("lm_head", "code_head", "model.code_embeddings", "model.connector", "model.scale_embedding"),
    *(f"model.language_model.{name}" for name in DECODER),
    *(f"model.vq_model.{name}" for name in TOKENIZER),
]
MAPS = {
    "in turn": {part: (FIRST, SECOND)[index % 2] for index, part in enumerate(PARTS)},
    "in turn the other way": {part: (SECOND, FIRST)[index % 2] for index, part in enumerate(PARTS)},
    "tokenizer apart": {part: SECOND if "vq_model" in part else FIRST for part in PARTS},
    "offloaded": {part: (FIRST, "cpu")[index % 2] for index, part in enumerate(PARTS)},
}


def spread(model, places: dict) -> NextFlowForConditionalGeneration:
    """A copy with its parts where accelerate puts them; those on the CPU are brought to the first device to run."""
    model = copy.deepcopy(model)
    with PretendedDevices():
        accelerate.dispatch_model(model, places, main_device=FIRST)
        assert len({parameter.device for parameter in model.parameters()}) == 2
        return model


@pytest.fixture(scope="module")
def untied() -> NextFlowForConditionalGeneration:
    return tiny_model()


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * n.endswith("other way")) for n in MAPS]
)
def of_untied(request, untied) -> NextFlowForConditionalGeneration:
    return spread(untied, MAPS[request.param])


@BY_USE
def test_parts_on_two_devices(untied, of_untied, use):
    with PretendedDevices():
        assert_same(use, untied, of_untied)


@pytest.fixture(scope="module")
def tied() -> NextFlowForConditionalGeneration:
    return tiny_model(tiny_config(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def of_tied(tied) -> NextFlowForConditionalGeneration:
    """The head is where the embedding is, as accelerate places them."""
    return spread(tied, MAPS["in turn"] | {"lm_head": MAPS["in turn"]["model.language_model.embed_tokens"]})


@BY_USE
def test_tied_weights_beside_parts_on_two_devices(tied, of_tied, use):
    with PretendedDevices():
        assert_same(use, tied, of_tied)


@pytest.mark.parametrize("name", ["in turn", "in turn the other way"])
def test_gradients_of_parts_on_two_devices(untied, name):
    """In training mode, where rows without pictures give every weight a gradient as well."""
    untied.zero_grad()
    untied.train()(**with_labels(untied), z_loss=0.1).loss.backward()
    other = spread(untied, MAPS[name])
    with PretendedDevices():
        other.train()(**with_labels(other), z_loss=0.1).loss.backward()
        got = {name: weight.grad.cpu() for name, weight in other.named_parameters() if weight.grad is not None}
    expected = {name: weight.grad for name, weight in untied.eval().named_parameters() if weight.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 30
    for name, gradient in got.items():
        assert relative(gradient, expected[name]) < 1e-5, name


# A hook of our own


@contextmanager
def weights_only_while_running(model) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Every module has its own weights from just before its forward to just after it, and none otherwise."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    handles = []
    for module in model.modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        away = {
            name: torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad) for name, parameter in own.items()
        }
        module._parameters.update(away)
        handles.append(module.register_forward_pre_hook(lambda module, _, own=own: module._parameters.update(own)))
        handles.append(module.register_forward_hook(lambda module, *_, away=away: module._parameters.update(away)))
    yield weights
    for handle in handles:
        handle.remove()
    for path, parameter in weights.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._parameters[name] = parameter


@pytest.fixture(scope="module")
def weightless(model) -> Iterator[NextFlowForConditionalGeneration]:
    other = copy.deepcopy(model)
    with weights_only_while_running(other):
        yield other


@BY_USE
def test_weights_are_there_only_while_their_module_runs(model, weightless, use):
    assert_same(use, model, weightless)


def test_gradients_reach_weights_that_are_there_only_while_their_module_runs(model):
    """Of the loss and of the tokenizer's own training, as without a hook."""

    def gradients(model, weights: dict) -> dict[str, torch.Tensor]:
        for parameter in weights.values():
            parameter.grad = None
        model(**with_labels(model), z_loss=0.1, use_cache=False).loss.backward()
        output = model.model.vq_model(pixels(model))
        (output.reconstruction.square().sum() + output.semantic_features.square().sum()).backward()
        sum(entries.sum() for entries, _ in output.quantization.pairs).backward()
        return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}

    model.requires_grad_(True)
    other = copy.deepcopy(model)
    expected = gradients(model, dict(model.named_parameters(remove_duplicate=False)))
    with weights_only_while_running(other) as weights:
        got = gradients(other, weights)
    assert got.keys() == expected.keys() and len(got) > 100
    for name, gradient in got.items():
        assert relative(gradient, expected[name]) < 1e-5, name


# diffusers


@pytest.fixture(scope="module")
def casting(model) -> tuple[NextFlowForConditionalGeneration, NextFlowForConditionalGeneration]:
    """All but the vision tokenizer's, whose codes must stay those of shards."""
    hooks = pytest.importorskip("diffusers.hooks")
    rounded = copy.deepcopy(model)
    inner = rounded.model
    for part in (inner.language_model, inner.connector, inner.scale_embedding, rounded.lm_head, rounded.code_head):
        part.bfloat16().float()
    other = copy.deepcopy(rounded)
    hooks.apply_layerwise_casting(other, torch.bfloat16, torch.float32, skip_modules_pattern=("vq_model", "norm"))
    return rounded, other


@BY_USE
def test_weights_that_are_stored_in_a_lower_precision_than_they_are_used_in(casting, use):
    rounded, other = casting
    assert_same(use, rounded, other)
    assert other.lm_head.weight.dtype == other.model.connector[0].weight.dtype == torch.bfloat16


@pytest.fixture(scope="module", params=["leaf_level", "block_level"])
def in_groups(request, model) -> NextFlowForConditionalGeneration:
    hooks = pytest.importorskip("diffusers.hooks")
    other, cpu = copy.deepcopy(model), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if request.param == "block_level" else {}
    hooks.apply_group_offloading(other, cpu, cpu, offload_type=request.param, **blocks)
    return other


@BY_USE
def test_groups_of_weights_are_there_only_while_they_are_used(model, in_groups, use):
    assert_same(use, model, in_groups)
