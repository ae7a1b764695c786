"""Doors of the libraries that lead to the text decoder, or through the whole model: masks, servers, compilers."""

import pytest
import torch
from tiny_models import (
    BOI,
    CODES,
    EOI,
    EOS,
    IMAGE,
    PAD,
    PATCH,
    SQUARE,
    TEXT_ROWS,
    WIDE,
    Picture,
    batch_of,
    relative,
    tiny_config,
    tiny_model,
)
from transformers import AttentionInterface, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation import ContinuousBatchingConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_nextflow.layout import SequenceLayout, build_layout

CHATS = [[10, 11, 12, 13], [14, 15], [16, 17, 18]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# Masks of every pair


def causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("form", ["bool", "float"])
def test_masks_of_every_pair_are_what_they_say(model, form):
    """Causal ones change nothing; two texts in one row that do not see each other are each alone."""
    make = lambda mask: mask if form == "bool" else torch.zeros(()).masked_fill(~mask, -1e9)  # noqa: E731
    whole, *alone = [10, 11, 12, 13, 14], [10, 11], [12, 13, 14]
    expected = model(input_ids=torch.tensor([whole])).logits
    assert relative(model(input_ids=torch.tensor([whole]), attention_mask=make(causal(5))).logits, expected) < 1e-5
    apart = causal(5)
    apart[..., 2:, :2] = False
    positions = torch.tensor([0, 1, 0, 1, 2]).expand(3, 1, -1)
    packed = model(input_ids=torch.tensor([whole]), attention_mask=make(apart), position_ids=positions).logits
    each = torch.cat([model(input_ids=torch.tensor([row])).logits for row in alone], dim=1)
    assert relative(packed, each) < 1e-5 and relative(packed, expected) > 1e-2


def test_labels_beside_masks_of_every_pair(model):
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    outputs = model(input_ids=ids, attention_mask=causal(5), labels=ids)
    assert relative(outputs.loss, model(input_ids=ids, labels=ids).loss) < 1e-5


def test_masks_of_every_pair_are_of_text_alone(model):
    inputs = batch_of(model, [10, Picture(SQUARE, 1), 11])
    inputs["attention_mask"] = causal(inputs["input_ids"].shape[1])
    with pytest.raises(ValueError, match="images cannot be given with .* a mask of"):
        model(**inputs)


# Servers


def test_requests_are_batched_as_they_come(model):
    """transformers' continuous batching writes what `generate` writes, of text rows alone."""
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)
    # a code would be the likeliest, and then a mark of images
    bias = torch.zeros(model.config.text_vocab_size + model.config.vq_config.codebook_size)
    bias[[BOI, IMAGE, EOI]], bias[TEXT_ROWS:] = 50.0, 100.0
    offset = lambda at: lambda module, args, logits: logits + bias[at]  # noqa: E731
    hooks = [
        model.lm_head.register_forward_hook(offset(slice(TEXT_ROWS))),
        model.code_head.register_forward_hook(offset(slice(TEXT_ROWS, None))),
    ]
    results = model.generate_batch(CHATS, generation_config=config, continuous_batching_config=small)
    written = [result.generated_tokens for _, result in sorted(results.items())]
    expected = [model.generate(torch.tensor([chat]), generation_config=config)[0, len(chat) :] for chat in CHATS]
    for hook in hooks:
        hook.remove()
    assert written == [ids.tolist() for ids in expected]
    assert all(ids and max(ids) < TEXT_ROWS and not {BOI, IMAGE, EOI} & set(ids) for ids in written)


def test_the_text_decoder_may_have_an_attention_of_its_own(model):
    """What vLLM's backend for models of transformers asks for."""
    assert type(model).is_backend_compatible() and Qwen2_5_VLForConditionalGeneration.is_backend_compatible()
    layers = []

    def attend(module, *args, **kwargs):
        layers.append((module.layer_idx, kwargs["of_the_server"]))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("of_a_server", attend)
    other = tiny_model()
    other.model.language_model.config._attn_implementation_internal = "of_a_server"
    ids = torch.tensor([CHATS[0]])
    logits = other(input_ids=ids, attention_mask=causal(4), of_the_server="cache").logits
    assert layers == [(0, "cache"), (1, "cache")]
    assert relative(logits, model(input_ids=ids).logits) < 1e-5


# Compilers


@pytest.fixture(scope="module")
def shallow():
    """Of a layer each."""
    config = tiny_config({"num_hidden_layers": 1})
    config.vq_config.semantic_config.num_hidden_layers = 1
    return tiny_model(config)


def test_ids_are_a_batch(model):
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    ids, grids = inputs["input_ids"][0], inputs["image_grid_hw"]
    with pytest.raises(ValueError, match="input_ids must hold int64 in 2 dimensions"):
        model(ids, pixel_values=torch.zeros(9, 3 * PATCH**2), image_grid_hw=grids)


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_pictures_of_several_sizes_under_a_compiler(shallow, backend):
    compiled = torch.compile(shallow, backend=backend)
    for number, grid in enumerate((SQUARE, WIDE)):
        inputs = batch_of(shallow, [10, Picture(grid, 1), 11])
        del inputs["image_codes"]
        generator = torch.Generator().manual_seed(number)
        inputs["pixel_values"] = torch.rand(grid[0] * grid[1], 48, generator=generator) * 2 - 1
        with torch.no_grad():
            assert relative(compiled(**inputs).logits, shallow(**inputs).logits) < 1e-4
    torch._dynamo.reset()


def test_text_is_exported(shallow):
    """A graph for rows of any number and length."""
    inputs = batch_of(shallow, *CHATS)
    shapes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    shapes["use_cache"] = None
    exported = torch.export.export(shallow, (), inputs | {"use_cache": False}, dynamic_shapes=shapes)
    for rows in (CHATS, [[10], [11, 12, 13, 14, 15]], [[20, 21, 22]]):
        inputs = batch_of(shallow, *rows)
        graph = exported.module()(**inputs, use_cache=False)
        assert relative(graph.logits, shallow(**inputs).logits) < 1e-5


def test_pictures_are_exported(shallow):
    """With a layout, which depends on values; and what codes look like."""
    inputs = batch_of(shallow, [10, Picture(SQUARE, 1), 11], [12, Picture(WIDE, 2), 13])
    with pytest.raises(ValueError, match="an exported forward with images or labels takes a layout"):
        torch.export.export(shallow, (), inputs | {"use_cache": False})
    layout = build_layout(shallow.config, inputs["input_ids"], inputs["image_grid_hw"], inputs["attention_mask"])
    tensors = {name: tensor for name, tensor in vars(layout).items() if tensor is not None}

    class Read(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = shallow

        def forward(self, layout, **inputs):
            return self.model(layout=SequenceLayout(**layout), use_cache=False, **inputs).logits

    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_codes")} | {"layout": tensors}
    exported = torch.export.export(Read(), (), given).module()
    other = batch_of(shallow, [20, Picture(SQUARE, 3), 21], [22, Picture(WIDE, 4), 23])
    for each in (inputs, other):
        graph = exported(**given | {name: each[name] for name in ("input_ids", "image_codes")})
        assert relative(graph, shallow(**each).logits) < 1e-5

    class Decode(Read):
        def forward(self, codes):
            return self.model.model.vq_model.decode(codes, SQUARE)

    codes = torch.randint(CODES, (2, 14), generator=torch.Generator().manual_seed(0))
    decoded = torch.export.export(Decode(), (torch.zeros_like(codes),)).module()(codes)
    assert relative(decoded, shallow.model.vq_model.decode(codes, SQUARE)) < 1e-5


def test_steps_over_a_static_cache_are_exported(model):
    """By transformers' own wrapper, as for devices."""
    other, ids = tiny_model(), torch.tensor([CHATS[0]])
    other.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    steps = TorchExportableModuleWithStaticCache(other, batch_size=1, max_cache_len=16, device="cpu")
    step = lambda at: {"input_ids": ids[:, at : at + 1], "cache_position": torch.tensor([at])}  # noqa: E731
    exported = torch.export.export(steps, (), step(0)).module()
    logits = torch.cat([exported(**step(at)) for at in range(ids.shape[1])], dim=1)
    assert relative(logits, model(input_ids=ids).logits) < 1e-5


def test_text_alone_is_text_beside_pictures(model):
    """Positions and logits of a row do not depend on whether another row has a picture."""
    text, picture = [10, 11, 12], [13, Picture(SQUARE, 1), 14]
    both = batch_of(model, text, picture)
    alone = batch_of(model, text, [PAD] * both["input_ids"].shape[1])
    alone["attention_mask"][1] = 1
    assert relative(model(**alone).logits[0, -3:], model(**both).logits[0, -3:]) < 1e-5


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", ["pixel_values", "image_codes"])
def test_images_need_their_grids(model, name, labels):
    inputs = batch_of(model, [10, Picture(SQUARE, 1), 11])
    given = {"pixel_values": torch.rand(9, 48), "image_codes": inputs["image_codes"]}[name]
    ids = {"input_ids": inputs["input_ids"]} | ({"labels": inputs["input_ids"]} if labels else {})
    with pytest.raises(ValueError, match=f"{name} came without image_grid_hw"):
        model(**ids, **{name: given})
