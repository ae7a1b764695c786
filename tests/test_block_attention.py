"""One call per scale block and text run is attention under the whole mask."""

import pytest
import torch
import torch.nn.functional as F
from flash_stand_in import FLASH, without_masks
from tiny_models import BOI, IMAGE, SQUARE, WIDE, Picture, batch_of, relative, shown, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import StaticCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.attention import sequence_mask
from transformers_nextflow.block_attention import Segment, Segments, attend_by_segments, segments_of
from transformers_nextflow.layout import build_layout

PADDED = [[10, Picture(SQUARE, 1), 11, 12], [13, 14, Picture(WIDE, 2), Picture(SQUARE, 3), 15, 16, 17], [18, 19]]
DOCUMENTS = [
    [10, Picture(SQUARE, 1), 11, 12],
    [20, 21, 22],
    [Picture(WIDE, 2, last_scale=True), 13, 14, Picture(SQUARE, 3), 15, 16],
]


def padded_left(model) -> dict:
    return batch_of(model, *PADDED)


def padded_right(model) -> dict:
    batch = batch_of(model, *PADDED)
    for name in ("input_ids", "attention_mask"):
        rows = zip(batch[name], batch["attention_mask"].sum(1).tolist())
        batch[name] = torch.stack([row.roll(length) for row, length in rows])
    return batch


def packed(model, documents: list = DOCUMENTS) -> dict:
    """Two rows: all documents and padding, and the documents in another order."""
    lengths = [batch_of(model, document)["input_ids"].shape[1] for document in documents]
    orders = [[0, 1, 2], [2, 0, 1]]
    batch = batch_of(model, *([part for index in order for part in documents[index]] for order in orders))
    del batch["attention_mask"]
    rows = [[index for index in order for _ in range(lengths[index])] for order in orders]
    batch["input_ids"][0, -2:], rows[0][-2:] = 0, [-1] * 2  # both orders end in text
    return batch | {"document_ids": torch.tensor(rows)}


def packed_and_masked(model) -> dict:
    """Packed rows whose padding is in the mask too."""
    batch = packed(model)
    return batch | {"attention_mask": (batch["document_ids"] >= 0).long()}


def packed_text(model) -> dict:
    return packed(model, [[10, 11, 12], [20], [13, 14, 15, 16, 17]])


BATCHES = pytest.mark.parametrize(
    "batch_for", [padded_left, padded_right, packed, packed_and_masked, packed_text], ids=lambda f: f.__name__
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(params=["blocks", FLASH])
def pair(request):
    """The same weights under "sdpa" with masks, and under what takes none."""
    models = [tiny_model().double().train() for _ in range(2)]
    if request.param == FLASH:
        without_masks(models[1])
    else:
        models[1].set_attn_implementation(request.param)
    return models


def real(batch: dict) -> torch.Tensor:
    """(B, L) bool, False at padding."""
    return batch["document_ids"] >= 0 if "document_ids" in batch else batch["attention_mask"].bool()


def masks(model, batch: dict) -> list:
    """The masks of both implementations."""
    inner, masks = model.model, []
    embeddings = inner.get_input_embeddings()(batch["input_ids"])
    documents, valid = batch.get("document_ids"), batch.get("attention_mask")
    layout = build_layout(model.config, batch["input_ids"], batch.get("image_grid_hw"), valid, documents)
    block_ids = layout.block_ids if len(layout.slot_places) else None
    for implementation in ("sdpa", "blocks"):
        config = tiny_config().text_config
        config._attn_implementation = implementation
        masks.append(sequence_mask(config, embeddings, valid, block_ids, documents, None)["full_attention"])
    return masks


@BATCHES
def test_attention_alone(model, batch_for):
    """Output and gradients, float32; padding sees what it likes, but nothing of it is read."""
    batch = batch_for(model)
    rows, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(rows, heads, length, 16, generator=generator).requires_grad_() for heads in (2, 1, 1)]
    weights = torch.randn(rows, length, 2, 16, generator=generator) * real(batch)[..., None, None]
    module = model.model.language_model.layers[0].self_attn
    results, options = [], {"dropout": 0.0, "scaling": module.scaling}
    dense, segments = masks(model, batch)
    for output in (
        sdpa_attention_forward(module, *states, dense, **options)[0],
        attend_by_segments(sdpa_attention_forward, module, *states, segments, **options),
    ):
        assert output.shape == weights.shape
        output = output * real(batch)[..., None, None]
        results.append([output, *torch.autograd.grad((output * weights).sum(), states)])
    for dense, blocks in zip(*results):
        assert relative(blocks, dense) < 1e-6


@BATCHES
def test_logits_loss_and_gradients_of_the_model(pair, batch_for):
    batch = batch_for(pair[0])
    labels = batch["input_ids"].masked_fill(~real(batch), -100)
    if batch_for in (packed, packed_and_masked):  # the picture with its last scale is only read
        slots = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == BOI)
        labels = labels.masked_fill(slots, -100)
    outputs = [model(**batch, labels=labels, use_cache=False) for model in pair]
    for output in outputs:
        output.loss.backward()
    dense, blocks = outputs
    assert relative(blocks.logits[real(batch)], dense.logits[real(batch)]) < 1e-6
    assert relative(blocks.loss, dense.loss) < 1e-6
    expected, gradients = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} for model in pair
    )
    assert len(expected) > 20 and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 1e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(pair, reentrant):
    model, collected = pair[1], []
    batch = packed(model)
    labels = batch["input_ids"].masked_fill((batch["document_ids"] < 0) | (batch["input_ids"] > 40), -100)
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        collected.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.model.language_model.layers[0].gradient_checkpointing
    assert len(collected[0]) == len(collected[1])
    for plain, checkpointed in zip(*collected):
        assert relative(checkpointed, plain) < 1e-6


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
def test_a_prompt_fills_a_cache(pair, static):
    """A static cache hands out keys beyond the prompt; steps that follow have ordinary masks."""
    batch = padded_left(pair[0])
    following = torch.full((3, 1), 7)
    mask = F.pad(batch["attention_mask"], (0, 1), value=1)
    results = []
    for model, has_mask in ((pair[0], True), (pair[0], False), (pair[1], False)):
        model.eval()
        text = model.config.text_config
        cache = StaticCache(config=text, max_cache_len=64) if static else None
        with torch.set_grad_enabled(has_mask):
            prompt = model(**batch, past_key_values=cache, use_cache=True)
            positions = torch.full((3, 3, 1), 40.0)
            step = model(
                input_ids=following,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=prompt.past_key_values,
                use_cache=True,
            )
        results.append(torch.cat([prompt.logits[real(batch)], step.logits[:, 0]]))
    assert max(relative(result, results[0]) for result in results) < 1e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "blocks"])
def test_packed_documents_fill_a_static_cache(implementation):
    """Whose empty keys belong to none."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    pack = batch_of(model, [10, Picture(SQUARE), 11, 12, Picture(WIDE), 13])
    del pack["attention_mask"]
    pack["document_ids"] = torch.tensor([[0] * 17 + [1] * (pack["input_ids"].shape[1] - 17)])
    texts = {"input_ids": torch.tensor([[10, 11, 12, 13]]), "document_ids": torch.tensor([[0, 0, 1, 1]])}
    for inputs in (pack, texts):
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        assert relative(model(**inputs, past_key_values=cache).logits, model(**inputs).logits) < 1e-6


def test_generation_is_the_same(model, tmp_path):
    """Text and pictures; the vision tokenizer shares the implementation and has no segments."""
    model.save_pretrained(tmp_path)
    model = tiny_model()
    model.set_attn_implementation("eager")  # with a mask
    blocks = NextFlowForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="blocks")
    parts = [part.config._attn_implementation for part in (blocks, blocks.model.language_model)]
    assert parts == ["blocks", "blocks"]
    prompts = batch_of(model, [10, shown(SQUARE, 1), 11, BOI], [12, 13, BOI])
    options = {"generation_mode": "image", "aspect_ratio": "1:1", "guidance_scale": 1.0, "seed": 0}
    pictures = [each.generate(**prompts, **options) for each in (model, blocks)]
    assert torch.equal(*pictures)
    questions = batch_of(model, [10, shown(WIDE, 2), 11, 12], [13, 14])
    answers = [each.generate(**questions, max_new_tokens=6, do_sample=False) for each in (model, blocks)]
    assert torch.equal(*answers)
    pixels = torch.rand(1, 3, 12, 12)
    assert torch.equal(model.model.vq_model.encode(pixels), blocks.model.vq_model.encode(pixels))


@pytest.mark.parametrize("implementation", ["blocks", "sdpa"])
def test_a_compiled_layer_takes_any_layout(implementation):
    model = tiny_model(tiny_config({"num_hidden_layers": 1})).double()
    padded = batch_of(model, [10, Picture(SQUARE, 1), 11, 12], [13, 14])
    batches = padded, packed(model, [[10, Picture(SQUARE, 1), 11], [20, 21, 22], [23, 24, 25]])
    expected = [model(**batch, use_cache=False).logits[real(batch)] for batch in batches]
    model.set_attn_implementation(implementation)
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager", dynamic=True)
    with torch.no_grad():
        for batch, dense in zip(batches, expected):
            assert relative(model(**batch, use_cache=False).logits[real(batch)], dense) < 1e-6


@BATCHES
def test_sdpa_needs_no_mask_where_nothing_is_trained(batch_for):
    model = tiny_model().double()
    batch = batch_for(model)
    dense = model(**batch).logits[real(batch)]
    with torch.no_grad():
        assert relative(model(**batch).logits[real(batch)], dense) < 1e-6
    (trained, _), config = masks(model, batch), model.config.text_config
    assert isinstance(trained, torch.Tensor) and trained.ndim == 4
    blocks = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        assert isinstance(sequence_mask(config, dense, None, blocks, None, None)["full_attention"], Segments)
    if "attention_mask" in batch:  # one with a hole
        batch["attention_mask"][:, 3] = 0
        dense = model(**batch).logits[real(batch)]
        with torch.no_grad():
            assert relative(model(**batch).logits[real(batch)], dense) < 1e-6


# Segments


def test_segments_by_hand():
    """Two rows: a document, another with two neighbouring blocks, padding; padding and a text."""
    documents = torch.tensor([[4, 4, 9, 9, 9, 9, 9, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    blocks = torch.tensor([[-1, -1, -1, 3, 3, 5, -1, -1], [-1] * 8])
    text, block = (lambda length: Segment(length, False)), (lambda length: Segment(length, True))
    first = [(text(2),), (text(1), block(2), block(1), text(1)), (text(1),)]
    assert segments_of(blocks, documents) == Segments((*first, (text(2),), (text(6),)))


@pytest.mark.parametrize("pieces", [[0, 0, 1, 0], [0, -1, -1, 0]], ids=["another between", "padding between"])
def test_a_document_in_pieces_is_refused(pieces):
    documents = torch.tensor([[0, 0, 0, 0], pieces])
    with pytest.raises(ValueError, match="must be in one piece, but document 0 of row 1 goes on at 3"):
        segments_of(torch.full((2, 4), -1), documents)
    model = tiny_model()
    model.set_attn_implementation("blocks")
    with pytest.raises(ValueError, match="must be in one piece"):
        model(input_ids=torch.full((2, 4), 10), document_ids=documents)


def test_segments_of_another_sequence_are_refused(model):
    states = [torch.zeros(1, heads, 5, 16) for heads in (2, 1, 1)]
    module = model.model.language_model.layers[0].self_attn
    with pytest.raises(ValueError, match="the segments have 4 positions, the queries 1 x 5"):
        attend_by_segments(sdpa_attention_forward, module, *states, Segments(((Segment(4, False),),)))


def test_documents_behind_a_filled_cache_are_refused(model):
    with torch.no_grad():
        cache = model(**batch_of(model, [10, 11]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="document_ids cannot be given with a filled cache"):
            model(input_ids=torch.tensor([[12]]), document_ids=torch.tensor([[0]]), past_key_values=cache)


# Flex attention: one BlockMask for a batch, shared by its layers


def flex_model():
    model = tiny_model()
    model.model.language_model.set_attn_implementation("flex_attention")
    return model


@BATCHES
def test_flex_attention_forward_is_sdpa(model, batch_for):
    """As it is written: compiled, a forward alone takes a CPU most of a minute."""
    flex, masks = flex_model(), []
    for layer in flex.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True)
    batch = batch_for(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        dense, ours = (each(**batch, use_cache=False).logits[real(batch)] for each in (model, flex))
    assert relative(ours, dense) < 1e-5
    assert len(masks) == 2 and isinstance(masks[0], BlockMask) and masks[0] is masks[1]


def test_compiled_layers_take_the_next_batches_block_mask(model, monkeypatch):
    """Its functions are made anew for every batch, and still need no new graph."""
    make = lambda *args, **kwargs: create_block_mask(*args, **kwargs | {"_compile": False})  # noqa: E731
    monkeypatch.setattr(masking_utils, "create_block_mask", make)
    torch._dynamo.reset()
    flex, graphs = flex_model(), CompileCounter()
    for layer in flex.model.language_model.layers:
        layer.compile(backend=graphs, dynamic=False)
    for order in ([0, 1, 2], [1, 0, 2]):
        batch = packed(model, [DOCUMENTS[index] for index in order])
        with torch.no_grad():
            dense, ours = (each(**batch, use_cache=False).logits[real(batch)] for each in (model, flex))
        assert relative(ours, dense) < 1e-5
        assert graphs.frame_count == 1, "for both layers"


@pytest.mark.parametrize("implementation", ["flex_attention", FLASH])
def test_some_attention_is_the_decoders_alone(model, implementation, tmp_path, monkeypatch):
    """Named at loading or set later; the vision tokenizer keeps its attention, and gives the same codes."""
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None)
    model.save_pretrained(tmp_path)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    changed = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    changed.set_attn_implementation(implementation)
    pixels = torch.rand(1, 3, 12, 12)
    for other in (loaded, changed):
        vision = other.model.vq_model
        parts = (other, other.model.language_model, vision, vision.semantic_encoder, vision.semantic_decoder.layers)
        used = [part.config._attn_implementation for part in parts]
        assert used == [implementation] * 2 + ["sdpa"] * 3
        assert torch.equal(vision.encode(pixels), model.model.vq_model.encode(pixels))
    changed.set_attn_implementation("blocks")
    assert changed.model.vq_model.config._attn_implementation == "blocks"


@pytest.mark.parametrize("prepared", [False, True], ids=["mask", "prepared mask"])
def test_flex_attention_refuses_dense_masks(prepared):
    flex = flex_model()
    with torch.no_grad():
        cache = tiny_model()(**batch_of(flex, [10, 11]), use_cache=True).past_key_values
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    mask = {"full_attention": mask} if prepared else mask
    with pytest.raises(ValueError, match=r'"flex_attention" takes .* not a dense one of \(1, 1, 1, 3\); use "sdpa"'):
        flex(input_ids=torch.tensor([[12]]), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r'"flex_attention" takes .* not a dense one of \(1, 1, 1, 1\); use "sdpa"'):
        flex(input_ids=torch.tensor([[12]]), attention_mask=torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"not a dense one of \(1, 1, 3\)"):
        mask = {"full_attention": torch.ones(1, 1, 3, dtype=torch.bool)}
        flex(input_ids=torch.tensor([[12]]), attention_mask=mask, past_key_values=cache)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex attention has no backward on a CPU")
@BATCHES
def test_flex_attention_is_sdpa(batch_for):
    models = [tiny_model().cuda().train() for _ in range(2)]
    models[1].model.language_model.set_attn_implementation("flex_attention")
    batch = {name: values.cuda() for name, values in batch_for(tiny_model()).items()}
    labels = batch["input_ids"].masked_fill(~real(batch) | (batch["input_ids"] > 40), -100)
    outputs = [model(**batch, labels=labels, use_cache=False) for model in models]
    for output in outputs:
        output.loss.backward()
    dense, flex = outputs
    assert relative(flex.logits[real(batch)], dense.logits[real(batch)]) < 1e-4
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        if theirs.grad is not None:
            assert relative(ours.grad, theirs.grad) < 1e-4
