"""The model: text as in Qwen2.5-VL, images by scale, and the loss."""

import copy
import inspect
import re
from ast import literal_eval

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    BOI,
    CODES,
    IMAGE,
    PATCH,
    SQUARE,
    TEXT_ROWS,
    WIDE,
    Picture,
    batch_of,
    codes_of,
    relative,
    tiny_config,
    tiny_model,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowModel,
    NextFlowVQConfig,
    cache_name,
)
from transformers_nextflow.cache_name import CACHE
from transformers_nextflow.layout import build_layout
from transformers_nextflow.modeling_nextflow_vq import patchify

CONTIGUOUS, INTERLEAVED = [2, 3, 3], [1] * 8
SECTIONS = pytest.mark.parametrize("sections", [CONTIGUOUS, INTERLEAVED], ids=["contiguous", "interleaved"])


def rope(sections: list[int]) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": sections}}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def trainable():
    """A model of its own for each test."""
    return tiny_model().train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def qwen_of(model) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with the model's text weights."""
    text_config = copy.deepcopy(model.config.text_config.to_dict())
    text_config["rope_parameters"]["mrope_section"] = CONTIGUOUS
    vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    qwen = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, tie_word_embeddings=False)
    ).eval()
    ours = {name: value for name, value in model.state_dict().items() if name in qwen.state_dict()}
    missing, unexpected = qwen.load_state_dict(ours, strict=False)
    assert not unexpected and all(name.startswith("model.visual.") for name in missing)
    return qwen


# Text


@SECTIONS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_text_logits_are_qwens_bit_for_bit(sections, implementation):
    model = tiny_model(tiny_config(text=rope(sections)))
    qwen = qwen_of(model)
    model.set_attn_implementation(implementation)
    qwen.set_attn_implementation(implementation)
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    with torch.no_grad():
        for attention_mask in (torch.ones_like(ids), mask):
            # Qwen's forward counts padding too, unlike its `generate`, whose positions these are
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
            theirs = qwen(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits
            ours = model(input_ids=ids, attention_mask=attention_mask).logits
            assert ours.shape[-1] == TEXT_ROWS + CODES and theirs.shape[-1] == model.config.text_vocab_size
            seen = attention_mask.bool()
            assert torch.equal(ours[seen][:, :TEXT_ROWS], theirs[seen])
        assert torch.equal(model(input_ids=ids).logits[..., :TEXT_ROWS], qwen(input_ids=ids).logits)


def test_rows_of_the_heads_can_be_asked_for(model):
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    with torch.no_grad():
        whole = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_over="text").logits, whole[..., :TEXT_ROWS])
        assert torch.equal(model(**inputs, logits_over="codes").logits, whole[..., TEXT_ROWS:])
        assert model(**inputs, logits_over="none").logits is None
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([3, 1])).logits, whole[:, [3, 1]])
        with pytest.raises(ValueError, match='logits_over must be "all"'):
            model(**inputs, logits_over="images")


# Positions


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.parametrize("part", ["whole", "without heads"])
def test_the_cache_goes_by_the_librarys_name_and_by_the_old(model, part, name):
    """transformers' loops look for it in signatures and in outputs."""
    called = model if part == "whole" else model.model
    first = called(input_ids=torch.tensor([[10, 11, 12]]), use_cache=True)
    assert CACHE in first and CACHE in inspect.signature(called.forward).parameters
    assert first[CACHE].get_seq_length() == 3
    continued = called(input_ids=torch.tensor([[13]]), **{name: first[CACHE]})
    whole = called(input_ids=torch.tensor([[10, 11, 12, 13]]))
    assert relative(continued[0], whole[0][:, -1:]) < 1e-5


def test_a_function_takes_a_cache_by_both_names(monkeypatch):
    """As under transformers from 5.24 on."""
    monkeypatch.setattr(cache_name, "CACHE", "cache")
    told = cache_name.takes_cache(lambda ids, past_key_values=None, use_cache=None: (ids, past_key_values, use_cache))
    assert list(inspect.signature(told).parameters) == ["ids", "cache", "use_cache"]
    assert told(1, cache=2, use_cache=3) == told(1, past_key_values=2, use_cache=3) == told(1, 2, 3) == (1, 2, 3)
    with pytest.raises(ValueError, match="cache and past_key_values are the same"):
        told(1, cache=2, past_key_values=2)


def test_a_cache_is_given_once(model):
    if CACHE == "past_key_values":
        pytest.skip("transformers before 5.24 has one name for it")
    with pytest.raises(ValueError, match="cache and past_key_values are the same"):
        model(input_ids=torch.tensor([[10]]), cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["counter", "row", "column"])
def test_a_move_along_each_axis_moves_the_image_logits(axis):
    model = tiny_model(tiny_config(text=rope(INTERLEAVED)))
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    layout = build_layout(model.config, inputs["input_ids"], inputs["image_grid_hw"])
    positions = layout.position_ids.clone()
    with torch.no_grad():
        before = model(**inputs).logits
        assert torch.equal(model(**inputs, position_ids=positions).logits, before)
        positions[axis, 0, 10] += 1.0
        after = model(**inputs, position_ids=positions).logits
    assert relative(after[0, 10, TEXT_ROWS:], before[0, 10, TEXT_ROWS:]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_positions_and_frequencies_stay_float32_in_a_cast_model(dtype, rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 1000.0, "mrope_section": INTERLEAVED}
    if rope_type == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 256}
    model = tiny_model(tiny_config(text={"rope_parameters": parameters}))
    rotary = model.model.language_model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    model.to(dtype)
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, frequencies) and torch.equal(rotary.original_inv_freq, frequencies)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], build_layout(model.config, inputs["input_ids"], inputs["image_grid_hw"]).position_ids)


def test_loading_in_bfloat16_keeps_quantizer_code_embeddings_and_frequencies_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inner = loaded.model
    assert {p.dtype for p in inner.vq_model.quantizer.parameters()} == {torch.float32}
    assert torch.equal(inner.code_embeddings.weight, model.model.code_embeddings.weight)
    assert torch.equal(inner.language_model.rotary_emb.inv_freq, model.model.language_model.rotary_emb.inv_freq)
    assert loaded.lm_head.weight.dtype == inner.connector[0].weight.dtype == torch.bfloat16
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    with torch.no_grad():
        assert relative(loaded(**inputs).logits.float(), model(**inputs).logits) < 0.1


def test_c_is_the_finest_grids_edge_unless_set(model):
    assert model.config.finest_edge == 3.0
    configs = model.config, tiny_config(position_scale=8.0)
    inputs = batch_of(model, [10, Picture(SQUARE)])
    rows = [build_layout(c, inputs["input_ids"], [SQUARE]).position_ids[1:, 0, 2:15] for c in configs]
    torch.testing.assert_close(rows[1], rows[0] * 8 / 3)


# Visual inputs


def test_pixels_are_their_codes(model):
    generator = torch.Generator().manual_seed(0)
    grids = [SQUARE, WIDE, SQUARE]
    pixels = [2 * torch.rand(1, 3, PATCH * h, PATCH * w, generator=generator) - 1 for h, w in grids]
    codes = [model.model.vq_model.encode(picture)[0] for picture in pixels]
    assert not torch.equal(codes[0], codes[2])
    inputs = batch_of(model, [10, Picture(SQUARE), 11, Picture(WIDE)], [12, Picture(SQUARE)])
    inputs["image_codes"] = torch.cat(codes)
    patches = torch.cat([patchify(picture, PATCH)[0] for picture in pixels])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        by_codes = model(**inputs, labels=labels)
        del inputs["image_codes"]
        by_pixels = model(**inputs, pixel_values=patches, labels=labels)
        unsupervised = model(**inputs, pixel_values=patches)
    assert torch.equal(by_pixels.logits, by_codes.logits) and torch.equal(by_pixels.loss, by_codes.loss)
    assert torch.equal(unsupervised.logits, by_codes.logits)


def test_a_batch_of_mixed_grids_is_each_row_alone(model):
    rows = [[10, Picture(SQUARE, 1), 11, 12], [10, Picture(WIDE, 2), Picture(SQUARE, 3)], [10, 11], [Picture(WIDE, 4)]]
    with torch.no_grad():
        together = batch_of(model, *rows)
        logits = model(**together).logits
        for row, padded, mask in zip(rows, logits, together["attention_mask"]):
            alone = model(**batch_of(model, row)).logits[0]
            assert relative(padded[mask.bool()], alone) < 1e-5


def test_the_last_codes_are_read_only_with_the_last_scale(model):
    for last_scale in (False, True):
        inputs = batch_of(model, [10, Picture(SQUARE, last_scale=last_scale), 11])
        changed = inputs | {"image_codes": inputs["image_codes"].clone()}
        changed["image_codes"][-1] = (changed["image_codes"][-1] + 1) % CODES
        with torch.no_grad():
            moved = not torch.equal(model(**inputs).logits[0, -1], model(**changed).logits[0, -1])
        assert moved == last_scale


def connected(model, *row) -> torch.Tensor:
    """The features that reach the connector."""
    seen = []
    hook = model.model.connector.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch_of(model, row))
    hook.remove()
    return seen[0]


def test_residual_features_resize_each_scales_entries_to_the_next_grid(model):
    inner, schedule = model.model, model.model.schedules.by_grid(SQUARE)
    codes = codes_of(model, Picture(SQUARE))[None]
    first, second = inner.code_embeddings(codes[:, :1]), inner.code_embeddings(codes[:, 1:5])
    maps = [F.interpolate(second.view(1, 2, 2, -1).permute(0, 3, 1, 2), size=SQUARE, mode="bicubic")]
    expected = torch.cat([first.expand(-1, 4, -1), maps[0].flatten(2).transpose(1, 2)], dim=1)[0]
    assert relative(connected(model, 10, Picture(SQUARE), 11), expected) < 1e-6
    drawn = [inner.scale_inputs(codes[:, : schedule.offsets[scale]], schedule, scale) for scale in (1, 2)]
    assert relative(torch.cat(drawn, dim=1)[0], inner.connector(expected)) < 1e-6
    last = connected(model, 10, Picture(SQUARE, last_scale=True), 11)[13:]
    assert torch.equal(last, inner.code_embeddings(codes[0, 5:]))


def test_accumulated_features_are_vars():
    """VAR: every scale's entries bicubic to the final grid, summed, then area-resized to the next grid."""
    model = tiny_model(tiny_config(feature_mode="accumulated"))
    inner, schedule = model.model, model.model.schedules.by_grid(WIDE)
    codes = codes_of(model, Picture(WIDE))[None]
    total, expected, done = torch.zeros(1, 10, *WIDE), [], 0
    for (h, w), following in zip(schedule.grids, schedule.grids[1:]):
        entries = inner.code_embeddings(codes[:, done : done + h * w]).view(1, h, w, -1).permute(0, 3, 1, 2)
        total = total + F.interpolate(entries, size=WIDE, mode="bicubic")
        expected.append(F.interpolate(total, size=following, mode="area").flatten(2).transpose(1, 2)[0])
        done += h * w
    assert relative(connected(model, 10, Picture(WIDE), 11), torch.cat(expected)) < 1e-5
    for scale, features in enumerate(expected, start=1):
        drawn = inner.scale_inputs(codes[:, : schedule.offsets[scale]], schedule, scale)
        assert relative(drawn[0], inner.connector(features)) < 1e-5
    last = connected(model, 10, Picture(WIDE, last_scale=True), 11)[10:]
    assert torch.equal(last, inner.code_embeddings(codes[0, 3:]))
    residual = tiny_model()
    assert relative(connected(residual, 10, Picture(WIDE), 11), torch.cat(expected)) > 0.1
    inputs = batch_of(model, [10, Picture(WIDE), 11])
    with torch.no_grad():
        assert relative(residual(**inputs).logits[0, -1], model(**inputs).logits[0, -1]) > 1e-2


def test_scale_embeddings_start_at_zero_and_learn():
    torch.manual_seed(0)
    model = NextFlowForConditionalGeneration(tiny_config())
    embedding = model.model.scale_embedding
    assert not embedding.index.weight.any() and not embedding.length.weight.any()
    for linear in (model.code_head, model.model.vq_model.semantic_to_code[0]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for codebook in model.model.vq_model.quantizer.parameters():
        assert 0.6 < codebook.square().sum(dim=1).mean() < 1.5
    conv = model.model.vq_model.pixel_encoder.conv_in
    bound = conv.weight[0].numel() ** -0.5  # as torch's own convolutions begin
    assert 0.9 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert embedding.length.weight.grad.abs().sum() > 0
    rows = embedding.index.weight.grad.abs().sum(-1) > 0
    assert rows.tolist() == [False, True, True, True, False]  # <boi> is scale 1


def test_the_number_of_scales_is_told_to_boi_and_blocks():
    rows = [[[1, 1], [2, 2], [3, 3], [4, 4]], [[1, 1], [1, 2], [2, 4], [2, 8]]]
    model = tiny_model(tiny_config(vq={"scale_schedules": rows, "levels": {"few": 3, "many": 4}}))
    embedding = model.model.scale_embedding
    with torch.no_grad():
        few, many = (embedding(torch.tensor([1]), torch.tensor([number])) for number in (3, 4))
    assert relative(few, many) > 1e-2
    batch = batch_of(model, [10, BOI])
    with torch.no_grad():
        few, many = (model(**batch, image_grid_hw=torch.tensor([grid])).logits[0, -1] for grid in ((3, 3), (4, 4)))
    assert relative(few, many) > 1e-2


def test_code_embeddings_start_as_the_codebook():
    model = NextFlowModel(tiny_config())
    assert torch.equal(model.code_embeddings.weight, model.vq_model.quantizer())


def test_gradients_never_reach_the_vision_tokenizer(trainable):
    inputs = batch_of(trainable, [10, Picture(SQUARE), 11])
    del inputs["image_codes"]
    pixels = torch.rand(9, 3 * PATCH * PATCH)
    trainable(**inputs, pixel_values=pixels, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in trainable.model.vq_model.parameters())
    assert {name for name, p in trainable.named_parameters() if p.grad is None} == {
        name for name, _ in trainable.named_parameters() if name.startswith("model.vq_model.")
    }


# Packing


DOCUMENTS = [
    [10, Picture(SQUARE, 1), 11, 12],
    [20, 21, 22],
    [13, 14, Picture(WIDE, 2), Picture(SQUARE, 3), 15],
]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_packed_documents_are_each_alone(trainable, order):
    """Logits and the gradients of every parameter, with self-corrected inputs; padding at the end."""

    def of(*documents):
        parts = [part for document in documents for part in document]
        inputs = batch_of(trainable, parts)
        corrected = []
        for picture in filter(lambda part: isinstance(part, Picture), parts):
            coarse = trainable.model.schedules.by_grid(picture.grid).offsets[-1]
            corrected.append(codes_of(trainable, Picture(picture.grid, 100 + picture.seed))[:coarse])
        return inputs | ({"image_input_codes": torch.cat(corrected)} if corrected else {})

    logits, losses = [], []
    for index in order:
        inputs = of(DOCUMENTS[index])
        output = trainable(**inputs, labels=inputs["input_ids"], num_items_in_batch=1.0)
        output.loss.backward()
        logits.append(output.logits[0].detach())
        losses.append(output.loss.item())
    alone = gradients(trainable)
    trainable.zero_grad()

    packed = of(*(DOCUMENTS[index] for index in order))
    del packed["attention_mask"]
    documents = [document for document, rows in enumerate(logits) for _ in rows]
    packed["input_ids"] = F.pad(packed["input_ids"], (0, 3))
    packed["document_ids"] = F.pad(torch.tensor([documents]), (0, 3), value=-1)
    labels = packed["input_ids"].masked_fill(packed["document_ids"] < 0, -100)
    output = trainable(**packed, labels=labels, num_items_in_batch=1.0)
    output.loss.backward()
    assert relative(output.logits[0, :-3], torch.cat(logits)) < 1e-5
    assert output.loss.item() == pytest.approx(sum(losses), rel=1e-5)
    together = gradients(trainable)
    assert together.keys() == alone.keys() and len(together) > 30
    for name, gradient in together.items():
        assert relative(gradient, alone[name]) < 1e-5, name


def test_training_after_inference_mode():
    """Of grids that were first seen in inference mode."""
    schedules = [[[1, 1], [2, 3], [3, 5]], [[1, 1], [3, 2], [5, 3]]]
    model = tiny_model(tiny_config(vq={"scale_schedules": schedules})).train()
    inputs = batch_of(model, [10, Picture((3, 5), last_scale=True), 11, Picture((5, 3))])
    with torch.inference_mode():
        model(**inputs)
        prompt = batch_of(model, [10, Picture((3, 5), last_scale=True), BOI])
        model.generate(**prompt, generation_mode="image", guidance_scale=1.0, height=20, width=12)
    ids = inputs["input_ids"]
    model(**inputs, labels=ids.masked_fill((ids == BOI) | (ids == IMAGE), -100)).loss.backward()
    assert model.model.connector[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("measure", [lambda output: output.logits.square().mean(), lambda output: output.loss])
def test_gradients_by_a_function_of_the_weights(trainable, measure):
    """`torch.func`, inside of which new tensors have no memory to look at, and none is told to require a gradient."""
    inputs = batch_of(trainable, [10, Picture(SQUARE, 1), 11], [12, Picture(WIDE, 2), 13, 14])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    weights = {name: each.detach() for name, each in trainable.named_parameters() if each.requires_grad}
    found = torch.func.grad(lambda given: measure(torch.func.functional_call(trainable, given, (), inputs)))(weights)
    trainable.zero_grad()
    measure(trainable(**inputs)).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, trainable.get_parameter(name).grad)


def test_gradient_checkpointing_changes_no_gradient(trainable):
    inputs = batch_of(trainable, [10, Picture(SQUARE), 11], [10, 12, Picture(WIDE)])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    collected = []
    for _ in range(2):
        trainable.zero_grad()
        trainable(**inputs, labels=labels, use_cache=False).loss.backward()
        collected.append(gradients(trainable))
        trainable.gradient_checkpointing_enable()
    assert trainable.model.language_model.layers[0].gradient_checkpointing
    for name, gradient in collected[1].items():
        assert relative(gradient, collected[0][name]) < 1e-6, name


# Loss


def test_the_loss_by_hand(model):
    """Text 10, <boi>, 1 + 4 + 9 codes, <eoi>, text 11 12: the weighted mean under one softmax over all rows."""
    inputs = batch_of(model, [10, Picture(SQUARE, 5), 11, 12])
    codes = codes_of(model, Picture(SQUARE, 5)).tolist()
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
    probabilities = output.logits[0].double().softmax(-1)
    raw = [1.0] + [4**-0.9] * 4 + [9**-0.9] * 9
    total, expected = 0.0, [-probabilities[0, BOI].log()]
    for slot, (code, weight) in enumerate(zip(codes, raw), start=1):
        expected.append(-probabilities[slot, TEXT_ROWS + code].log())
        total += weight * 14 / sum(raw) * expected[-1]
    total = total + expected[0]
    for slot, token in ((15, 11), (16, 12)):
        expected.append(-probabilities[slot, token].log())
        total = total + expected[-1]
    assert output.loss.item() == pytest.approx(float(total) / (1 + 14 + 2), rel=1e-6)
    assert output.token_losses[0].tolist() == pytest.approx([float(e) for e in expected] + [0.0], rel=1e-5)
    assert not output.token_losses.requires_grad
    with torch.no_grad():
        by_count = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(40)).loss
        flat = model(**inputs, labels=inputs["input_ids"], loss_weights=torch.ones(1, 18)).loss
    assert by_count.item() == pytest.approx(float(total) / 40, rel=1e-6)
    assert flat.item() == pytest.approx(float(sum(expected)) / 17, rel=1e-6)


def test_alpha_zero_weighs_all_codes_alike():
    model = tiny_model(tiny_config(scale_loss_alpha=0.0))
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(output.loss, output.token_losses.sum() / 16)


def test_accumulated_steps_are_one_batch(model):
    """num_items_in_batch: micro-batches sum to the whole batch's loss."""
    rows = [[10, Picture(SQUARE, 1), 11], [20, 21, 22, 23]]
    whole = batch_of(model, *rows)
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    with torch.no_grad():
        together = model(**whole, labels=labels).loss
        parts = [batch_of(model, row) for row in rows]
        apart = sum(model(**part, labels=part["input_ids"], num_items_in_batch=16 + 3).loss for part in parts)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=0)


def supervised(model, inputs, labels) -> list[bool]:
    with torch.no_grad():
        return (model(**inputs, labels=labels).token_losses[0] > 0).tolist()


def test_labels_of_a_condition_image_supervise_nothing_of_it(model):
    inputs = batch_of(model, [10, Picture(WIDE), 11, 12])
    labels = inputs["input_ids"].clone()
    labels[0, 1:12] = -100  # <boi> and its ten slots; <eoi> keeps its label
    assert supervised(model, inputs, labels) == [False] * 11 + [False, True, True, False]


def test_eoi_is_never_a_target(model):
    inputs = batch_of(model, [10, Picture(WIDE), 11, 12])
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        before = model(**inputs, labels=labels).loss
        labels[0, 12] = 33
        assert torch.equal(model(**inputs, labels=labels).loss, before)
        labels[0, 12] = -100
        assert torch.equal(model(**inputs, labels=labels).loss, before)
    assert supervised(model, inputs, labels) == [True] * 14 + [False]


def test_labels_at_image_slots_are_markers(model):
    inputs = batch_of(model, [10, Picture(WIDE), 11])
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        before = model(**inputs, labels=labels).loss
        labels[0, 1:12] = 10**6
        assert torch.equal(model(**inputs, labels=labels).loss, before)


@pytest.mark.parametrize("index", [1, 2, 11], ids=["boi", "first slot", "last slot"])
def test_an_image_is_supervised_whole_or_not_at_all(model, index):
    inputs = batch_of(model, [10, Picture(WIDE), 11])
    labels = inputs["input_ids"].clone()
    labels[0, index] = -100
    with pytest.raises(ValueError, match="whole or not at all: row 0, <boi> at 1, has 10 of 11 labels"):
        model(**inputs, labels=labels)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_are_text_rows_of_the_shape_of_the_ids(model, name):
    inputs = batch_of(model, [10, Picture(WIDE), 11, 12])
    ids = inputs["input_ids"]
    assert model(**inputs, **{name: ids.int()}).loss == model(**inputs, **{name: ids}).loss
    with pytest.raises(ValueError, match=rf"{name} beside them, must have the shape \(B, L\), got \(1, 15\) and"):
        model(**inputs, **{name: ids[:, 1:]})
    for wrong in (TEXT_ROWS, -1):
        labels = ids.clone()
        labels[0, -2] = wrong
        with pytest.raises(ValueError, match=rf"must be -100 or lie in \[0, {TEXT_ROWS}\), got"):
            model(**inputs, **{name: labels})


def test_an_image_with_its_last_scale_cannot_be_supervised(model):
    inputs = batch_of(model, [10, Picture(WIDE, last_scale=True), 11])
    with pytest.raises(ValueError, match="carries its last scale as input cannot be supervised"):
        model(**inputs, labels=inputs["input_ids"])


def test_shift_labels_are_labels_already_aligned(model):
    inputs = batch_of(model, [10, Picture(WIDE), 11, 12])
    aligned = torch.tensor([[BOI, *[IMAGE] * 11, 11, 12, -100]])
    with torch.no_grad():
        ours = model(**inputs, shift_labels=aligned).loss
        assert torch.equal(ours, model(**inputs, labels=inputs["input_ids"]).loss)


def test_targets_stay_the_codes_where_inputs_are_self_corrected(model):
    inputs = batch_of(model, [10, Picture(SQUARE, 1)])
    corrected = codes_of(model, Picture(SQUARE, 2))[:5]
    targets, labels = inputs["image_codes"], inputs["input_ids"]
    with torch.no_grad():
        output = model(**inputs, image_input_codes=corrected, labels=labels)
        expected = F.cross_entropy(output.logits[0, 1:15], targets + TEXT_ROWS, reduction="none")
        torch.testing.assert_close(output.token_losses[0, 1:15], expected)
        as_inputs = model(**inputs | {"image_codes": torch.cat([corrected, targets[5:]])}).logits
    assert torch.equal(output.logits, as_inputs)
    for pair in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
        codes, own = (each.to(dtype) for each, dtype in zip((targets, corrected), pair))
        with torch.no_grad():
            logits = model(**inputs | {"image_codes": codes}, image_input_codes=own).logits
        assert torch.equal(logits, as_inputs)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_codes": None}, "hold 1 images, but neither pixel_values nor image_codes came"),
        ({"pixel_values": torch.zeros(8, 48)}, "either pixel_values or image_codes, not both"),
        ({"image_codes": torch.zeros(10, dtype=torch.long)}, "image_codes must hold 11 rows .* got 10"),
        ({"image_codes": torch.full((11,), CODES)}, rf"image_codes must lie in \[0, {CODES}\), got {CODES}"),
        ({"image_codes": torch.full((11,), -1)}, "image_codes must lie in"),
        ({"image_codes": None, "pixel_values": torch.zeros(7, 48)}, "pixel_values must hold 8 rows .* got 7"),
        ({"image_input_codes": torch.zeros(4, dtype=torch.long)}, "image_input_codes must hold 3 rows .* got 4"),
        (
            {"image_input_codes": torch.full((3,), CODES)},
            rf"image_input_codes must lie in \[0, {CODES}\), got {CODES}",
        ),
        (
            {"image_input_codes": torch.zeros(3)},
            "image_input_codes must hold int64 in 1 dimensions, got torch.float32",
        ),
        ({"image_grid_hw": torch.tensor([WIDE, WIDE])}, "hold 1 images .* image_grid_hw has 2"),
        ({"inputs_embeds": torch.zeros(1, 14, 32)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_inputs_that_do_not_match_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**batch_of(model, [10, Picture(WIDE), 11]) | change)


def test_pixels_of_an_image_that_is_cut_are_refused(model):
    """They would have codes that no output predicts."""
    inputs = batch_of(model, [10, Picture(WIDE)])
    cut = torch.cat([inputs["input_ids"][:, :2], torch.full((1, 2), IMAGE)], dim=1)
    with pytest.raises(ValueError, match="row 0 ends after scale 2 of an image: give its codes as image_codes"):
        model(input_ids=cut, image_grid_hw=inputs["image_grid_hw"], pixel_values=torch.zeros(8, 3 * PATCH**2))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"feature_mode": "summed"}, 'feature_mode must be "residual" or "accumulated", got \'summed\''),
        ({"text": rope([4, 5, 8])}, r"mrope_section must sum to half the head size, 8, got \[4, 5, 8\]"),
        (
            {"text": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}},
            "scale blocks need layers of full attention, got sliding_attention",
        ),
        ({"boi_token_id": TEXT_ROWS}, f"boi_token_id must be a text row, 0 to {TEXT_ROWS - 1}, got {TEXT_ROWS}"),
        ({"eoi_token_id": -1}, "eoi_token_id must be a text row"),
        ({"image_generation": {"cfg": 2.0}}, "controls of pictures do not include cfg, but guidance_scale, "),
        ({"vq": {"stem_stride": 4}}, "downsample by 8, but patch_size is 4"),
        ({"vq": {"patch_size": 8, "stem_stride": 4}}, "both branches must share one grid"),
    ],
)
def test_wrong_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


# Saving and sizes


def test_the_auto_classes_load_what_was_saved(tmp_path):
    config = tiny_config(image_generation={"guidance_scale": [1.0, 2.0, 3.0], "top_k": 5}, position_scale=6.0)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NextFlowConfig) and isinstance(loaded.vq_config, NextFlowVQConfig)
    assert loaded.image_generation == config.image_generation
    assert loaded.image_generation["top_k"] == 5 and loaded.image_generation["aspect_ratio"] is None
    assert loaded.position_scale == 6.0 and loaded.text_config.rope_parameters["mrope_section"] == [1] * 8
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    with torch.no_grad():
        expected = model(**inputs).logits
        for auto in (AutoModelForMultimodalLM, AutoModelForImageTextToText):
            again = auto.from_pretrained(tmp_path)
            assert isinstance(again, NextFlowForConditionalGeneration)
            assert torch.equal(again(**inputs).logits, expected)
            assert not any(p.requires_grad for p in again.model.vq_model.parameters())
        hidden = model.model(**inputs).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path)
        assert isinstance(base, NextFlowModel)
        assert torch.equal(base(**inputs).last_hidden_state, hidden)


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    inputs = batch_of(model, [10, Picture(SQUARE), 11])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_the_default_decoder_has_qwen_7bs_parameters():
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(NextFlowConfig())
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == 7_615_616_512
    text = model.config.text_config
    assert (text.max_position_embeddings, text.rms_norm_eps) == (128_000, 1e-6)
    assert text.rope_parameters["rope_theta"] == 1e6 and text.rope_parameters["mrope_section"] == [1] * 64
    assert model.config.finest_edge == 64.0 and len(model.model.schedules) == 123
    assert model.code_head.weight.shape == (32768, 3584)


@pytest.mark.parametrize("kind, count", [(NextFlowConfig, 3), (NextFlowVQConfig, 16)])
def test_defaults_are_those_of_the_docstring(kind, count):
    config, said = kind(), re.findall(r"([\w, ]+) \(`[^)]*?\bdefaults? to ([^)]*)\)", kind.__doc__)
    found = 0
    for names, values in said:
        names, values = re.findall(r"\w+", names), [literal_eval(value.strip("`")) for value in values.split(" and ")]
        assert [getattr(config, name) for name in names] == values * (len(names) // len(values))
        found += len(names)
    assert found == count


def test_boundary_tokens_are_qwens():
    config = NextFlowConfig()
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (151652, 151653, 151655)
