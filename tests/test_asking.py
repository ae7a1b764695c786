"""How drawing is asked for: as users of transformers, pipelines and servers ask, from any thread, at any size."""

import copy
import json
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from flash_stand_in import without_masks
from PIL import Image
from tiny_models import (
    BOI,
    CODES,
    EOI,
    EOS,
    IMAGE,
    PAD,
    SCHEDULES,
    SQUARE,
    TEXT_ROWS,
    WIDE,
    Picture,
    batch_of,
    relative,
    shown,
    tiny_config,
    tiny_model,
)
from transformers import GenerationConfig, LogitsProcessorList, PrefixConstrainedLogitsProcessor, TextIteratorStreamer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from transformers_nextflow import (
    ImageGenerationConfig,
    LinearRamp,
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    ScaleInterval,
    SelfCorrection,
)
from transformers_nextflow.cli import main
from transformers_nextflow.features import scale_taps
from transformers_nextflow.layout import build_layout
from transformers_nextflow.prompts import Prompts
from transformers_nextflow.sampling import COLDEST
from transformers_nextflow.text_generation import text_sampling

PROMPTS = [[10, 11, 12, BOI], [13, BOI], [14, 15, BOI]]
NULLS = [[20, BOI], [20, 21, 22, BOI], [23, 20, BOI]]
CHUNKED = {"prefill_chunk_size": 2}
PLAIN = {"generation_mode": "image", "guidance_scale": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def guided(model, prompts=PROMPTS, nulls=NULLS) -> dict:
    negative = batch_of(model, *nulls)
    names = ("input_ids", "attention_mask")
    return batch_of(model, *prompts) | {f"negative_{name}": negative[name] for name in names}


# No call leaves a trace


@contextmanager
def torch_with(default: torch.dtype | str) -> Iterator[None]:
    """While another dtype or device is torch's default; `"meta"` shows all that would be made there."""
    if isinstance(default, str):
        with torch.device(default):
            yield
        return
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_torchs_defaults_change_nothing(model, default):
    """Neither while scripts, or models that other threads load, have set them, nor afterwards."""
    pixels = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = batch_of(model, [10, Picture(SQUARE, 1), 11], [12, Picture(WIDE, 2), 13, 14])
    ids["labels"] = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    chat, prompts = batch_of(model, [10, shown(SQUARE, 1), 11], [12, 13]), guided(model)
    writing = {"max_new_tokens": 2, "max_new_images": 1, "seed": 0, "height": 12, "width": 12}
    writing |= {"generation_mode": "interleaved", "forced_eos_token_id": [BOI], "output_logits": True}
    processor = NextFlowImageProcessor(4, SCHEDULES, {"12": 3}, image_mean=[0.48, 0.46, 0.41])

    def everything() -> list[torch.Tensor]:
        scale_taps.cache_clear()
        with torch.no_grad():
            read = model(**ids)
        drawn = model.generate(**prompts, **PLAIN | {"guidance_scale": 2.0}, num_images_per_prompt=2)
        written = model.generate(**chat, **writing)
        codes = model.model.vq_model.encode(pixels, SelfCorrection(), seed=0, keys=["a", "b"])
        decoded = model.model.vq_model.decode(codes[0], SQUARE)
        pictures = [torch.from_numpy(np.array(picture)) for picture in processor.postprocess(decoded)]
        return [read.loss, read.logits, drawn, *written.logits[0], written.image_codes, *codes, decoded, *pictures]

    expected = everything()
    with torch_with(default):
        changed = everything()
    with torch.no_grad():
        kept = model(**ids).logits
    for got, wanted in zip([*changed, kept], [*expected, expected[1]], strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_threads_on_one_model_draw_as_alone(model):
    """Two calls are inside forwards at once, and nothing is written into what all share."""
    nulls = batch_of(model, [20, shown(SQUARE, 1), BOI])
    edits = batch_of(model, [10, shown(SQUARE, 1), 11, BOI])
    edits |= {f"negative_{name}": nulls[name] for name in ("input_ids", "attention_mask")}
    chats = batch_of(model, [10, shown(WIDE, 2), 12], [11, 13])
    del chats["image_codes"]
    chats["pixel_values"] = torch.rand(8, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    written = {"generation_mode": "interleaved", "image_generation": {"guidance_scale": 1.0}}
    written |= {"max_new_tokens": 4, "max_new_images": 1, "sequence_bias": {(BOI,): 6.0}}
    draw = lambda seed: model.generate(**guided(model), **PLAIN | {"guidance_scale": 2.0, "seed": seed})  # noqa: E731
    edit = lambda seed: model.generate(  # noqa: E731
        **edits, **PLAIN | {"guidance_scale": 2.0, "seed": seed}, image_guidance_scale=1.5, aspect_ratio="2:1"
    )
    describe = lambda seed: model.generate(**chats, max_new_tokens=3 + seed, do_sample=False)  # noqa: E731
    interleave = lambda seed: model.generate(**batch_of(model, [10, 11]), **written, seed=seed).sequences  # noqa: E731
    calls = [partial(call, seed) for seed in range(2) for call in (draw, edit, describe, interleave)]
    expected, before = [call() for call in calls], model.config.to_json_string(use_diff=False)
    inside, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)
    first = threading.local()

    def enter(*_):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        if not getattr(first, "met", False):  # the first forward of a thread waits for another thread's
            first.met = True
            both.wait(60)

    def leave(*_):
        nonlocal inside
        with lock:
            inside -= 1

    hooks = [
        model.model.language_model.register_forward_pre_hook(enter),
        model.model.language_model.register_forward_hook(leave),
    ]
    mixed = lambda thread: [(thread + step) % len(calls) for step in range(20)]  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda thread: [(index, calls[index]()) for index in mixed(thread)], range(8)))
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(result, expected[index]) for thread in results for index, result in thread)
    assert most >= 2
    assert model.config.to_json_string(use_diff=False) == before and not hasattr(model.config.text_config, "is_causal")


# No masks


@pytest.fixture(scope="module")
def unmasked():
    return without_masks(tiny_model())


def test_guided_rows_of_different_lengths_need_no_mask(model, unmasked):
    edits = [[10, shown(SQUARE, 1), 11, BOI], [12, BOI], [shown(WIDE, 2), shown(SQUARE, 3), 13, BOI]]
    nulls = [[20, shown(SQUARE, 1), BOI], [20, 21, BOI], [shown(WIDE, 2), shown(SQUARE, 3), BOI]]
    for inputs in (guided(model), guided(model, edits, nulls)):
        controls = PLAIN | {"guidance_scale": 2.0, "image_guidance_scale": 1.5, "aspect_ratio": "1:1"}
        assert torch.equal(unmasked.generate(**inputs, **controls), model.generate(**inputs, **controls))


def test_rows_of_different_lengths_run_through_the_layers_together(model):
    """Weights are read once for each scale, however many lengths there are."""
    layer, seen = model.model.language_model.layers[0], []
    hooks = [
        each.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
        for each in (layer.self_attn.o_proj, layer.mlp)
    ]
    model.generate(**guided(model), **PLAIN | {"guidance_scale": 2.0, "aspect_ratio": "1:1"})
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, PROMPTS + NULLS))
    assert seen == [(tokens, 1)] * 2 + [(6, 4)] * 2 + [(6, 9)] * 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_pictures_are_described_without_masks(model, unmasked, use_cache):
    alike, picture = [[10, shown(SQUARE, seed), shown(WIDE, 3), 11, 12] for seed in (1, 2)], shown(SQUARE, 1)
    for rows in (alike, [[10, picture, 11], [12, 13]], [[picture, 11], [11, picture]]):
        inputs = batch_of(model, *rows)
        real = inputs["attention_mask"].bool()
        outputs, expected = (each(**inputs, output_hidden_states=True) for each in (unmasked, model))
        assert relative(outputs.logits[real], expected.logits[real]) < 1e-5
        for layer, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert relative(layer[real], other[real]) < 1e-5
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
        assert torch.equal(unmasked.generate(**inputs, **options), model.generate(**inputs, **options))


def test_logits_come_in_chunks(model, monkeypatch):
    """The head, guidance and draws of a scale need only some positions' logits at a time."""
    from transformers_nextflow import drawing

    monkeypatch.setattr(drawing, "LOGITS_OF_WEIGHTS", 1e6)
    expected = model.generate(**guided(model), **PLAIN | {"guidance_scale": 2.0})
    monkeypatch.undo()
    sizes = []
    hook = model.code_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    assert torch.equal(model.generate(**guided(model), **PLAIN | {"guidance_scale": 2.0}), expected)
    hook.remove()
    assert max(sizes) == 2 * 6 * CODES and len(sizes) > 3


@pytest.mark.parametrize("controls, is_kept", [({}, False), ({"refine_top_k": [4]}, True)])
def test_keys_of_the_last_block_are_kept_only_where_they_are_read_again(model, monkeypatch, controls, is_kept):
    from transformers_nextflow import drawing

    ends, draw = [], drawing.draw_scales
    monkeypatch.setattr(drawing, "draw_scales", lambda *args: ends.append(draw(*args)) or ends[-1])
    output = model.generate(input_ids=torch.tensor([[10, 11]]), **PLAIN | controls, return_dict_in_generate=True)
    schedule = model.model.schedules.by_grid(output.image_grid_hw[0])
    blocks = schedule.lengths[1:] if is_kept else schedule.lengths[1:-1]
    (_, cache), *others = ends[-1][0].groups
    assert cache.get_seq_length() == len([10, 11, "<boi>"]) + sum(blocks) and not others


@pytest.mark.parametrize("forced", [None, 5])
def test_many_pictures_are_drawn_some_at_a_time(model, monkeypatch, forced):
    from transformers_nextflow import drawing

    controls = PLAIN | {"num_images_per_prompt": 5, "guidance_scale": 2.0, "seed": [1, 2, 3]}
    if forced:
        controls["forced_codes"] = torch.arange(15).view(3, 5)
    expected = model.generate(**guided(model), **controls)
    monkeypatch.setattr(drawing, "pictures_at_once", lambda *args: 2)
    rows = []
    hook = model.code_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    assert torch.equal(model.generate(**guided(model), **controls), expected)
    hook.remove()
    assert max(rows) == 2 * 2 * 3


# As pipelines and servers ask


def test_the_prompt_is_opened(model):
    opened = model.generate(**batch_of(model, *PROMPTS), **PLAIN)
    assert torch.equal(model.generate(**batch_of(model, *(row[:-1] for row in PROMPTS)), **PLAIN), opened)
    mixed = [PROMPTS[0], PROMPTS[1][:-1], PROMPTS[2]]
    assert torch.equal(model.generate(**batch_of(model, *mixed), **PLAIN), opened)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_padding_is_found(model, mode):
    rows = PROMPTS if mode == "image" else [row[:-1] for row in PROMPTS]
    inputs, options = batch_of(model, *rows), {"generation_mode": mode, "seed": 0}
    options["image_generation"] = {"guidance_scale": 1.0}
    if mode == "interleaved":
        options |= {"max_new_tokens": 4, "max_new_images": 1, "sequence_bias": {(BOI,): 4.0}}
    with_mask = model.generate(**inputs, **options)
    without = model.generate(inputs["input_ids"], **options)
    codes = (lambda output: output.image_codes) if mode == "interleaved" else (lambda output: output)
    assert torch.equal(codes(without), codes(with_mask))
    unknowing = tiny_model()
    unknowing.generation_config.pad_token_id = None
    told = unknowing.generate(inputs["input_ids"], **options, generation_config=GenerationConfig(pad_token_id=PAD))
    assert torch.equal(codes(told), codes(with_mask))


def test_padding_after_a_prompt_is_found(model):
    rows = [[10, 11, 12, PAD, PAD], [PAD, 10, 11, 12, PAD], [10, 11, 12, 13, 14]]
    drawn = model.generate(torch.tensor(rows), **PLAIN)
    expected = [model.generate(torch.tensor([row]), **PLAIN) for row in ([10, 11, 12], [10, 11, 12], rows[2])]
    assert torch.equal(drawn, torch.cat(expected))
    assert Prompts(torch.tensor(rows)).checked(model.config, None).attention_mask.all(), "without a token for it"
    ends = model.generate(torch.tensor([[10, EOS]]), **PLAIN, pad_token_id=EOS)  # it may end a prompt
    assert torch.equal(ends, model.generate(torch.tensor([[10, EOS]]), **PLAIN))


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_prompts_are_ids(model, mode):
    embeds = model.get_input_embeddings()(torch.tensor([[10, 11]]))
    with pytest.raises(ValueError, match=f'generation_mode="{mode}" reads prompts as input_ids, got none'):
        model.generate(inputs_embeds=embeds, generation_mode=mode, seed=0)


def test_a_null_prompt_is_made(model, tiny_model, tiny_processor):
    """Of a chat's ids: as the processor makes it."""
    assert model.generate(**batch_of(model, *PROMPTS), generation_mode="image", seed=0).shape == (3, 14)
    picture = {"type": "image", "image": np.zeros((24, 24, 3), dtype=np.uint8)}
    for content in ("draw a red circle", [picture, {"type": "text", "text": "blue"}]):
        chat = [{"role": "user", "content": content}]
        inputs = tiny_processor.apply_chat_template(chat, generation_mode="image")
        options = {"generation_mode": "image", "guidance_scale": 3.0, "seed": 0, "aspect_ratio": "1:1"}
        expected = tiny_model.generate(**inputs, **options)
        bare = {name: value for name, value in inputs.items() if not name.startswith("negative")}
        assert torch.equal(tiny_model.generate(**bare, **options), expected)


def test_a_null_prompt_of_images_alone(model):
    """Without its images nothing is left of it."""
    options = PLAIN | {"guidance_scale": 2.0, "image_guidance_scale": 1.5}
    drawn = model.generate(**batch_of(model, [10, shown(SQUARE, 1), 11]), **options)
    picture = model.generate(**guided(model, [[10, shown(SQUARE, 1), 11]], [[shown(SQUARE, 1)]]), **options)
    assert torch.equal(drawn, picture)


@pytest.mark.parametrize(
    ("prompt", "null"),
    [
        ([10, EOS, shown(SQUARE, 1), 11, BOI], [EOS, shown(SQUARE, 1), 11, BOI]),
        ([10, shown(WIDE, 2), EOS, shown(SQUARE, 1), BOI], [shown(WIDE, 2), EOS, shown(SQUARE, 1), BOI]),
        ([10, shown(WIDE, 2), 11, EOS, 10, 12, 13, BOI], [10, shown(WIDE, 2), EOS, 10, 12, 13, BOI]),
        ([10, 9, EOS, 10, shown(SQUARE, 1), BOI], [10, EOS, 10, shown(SQUARE, 1), BOI]),
    ],
    ids=["behind the last end", "on both sides", "inside of the header", "behind the answer's header"],
)
def test_a_null_prompt_holds_each_image_once(model, prompt, null):
    options = PLAIN | {"guidance_scale": 2.0, "aspect_ratio": "1:1"}
    drawn = model.generate(**batch_of(model, prompt), **options)
    assert torch.equal(drawn, model.generate(**guided(model, [prompt], [null]), **options))


def test_arguments_of_text_generation(model):
    inputs = batch_of(model, *PROMPTS)
    expected = model.generate(**inputs, **PLAIN)
    ignored = {
        "max_new_tokens": 256,
        "do_sample": True,
        "generation_config": GenerationConfig(max_new_tokens=5),
        "mm_token_type_ids": torch.zeros_like(inputs["input_ids"]),
        "use_cache": True,
        "pad_token_id": PAD,
        "assistant_model": None,
        "tokenizer": None,
        "token_type_ids": torch.zeros_like(inputs["input_ids"]),
        "inputs_embeds": None,
    }
    assert torch.equal(model.generate(**inputs, **PLAIN, **ignored), expected)
    two = model.generate(**inputs, **PLAIN, num_return_sequences=2)
    assert torch.equal(two, model.generate(**inputs, **PLAIN, num_images_per_prompt=2))
    greedy = model.generate(**inputs, **PLAIN, do_sample=False)
    assert torch.equal(greedy, model.generate(**inputs, **PLAIN, temperature=0.0))
    said = GenerationConfig(num_return_sequences=2, do_sample=True)
    assert torch.equal(model.generate(**inputs, **PLAIN, generation_config=said), two)
    three = model.generate(**inputs, **PLAIN, generation_config=said, num_images_per_prompt=3)
    assert torch.equal(three, model.generate(**inputs, **PLAIN, num_images_per_prompt=3))
    for name in ("colour", "num_images", "controls", "negative_prompt_ids"):
        with pytest.raises(ValueError, match=f"does not know the arguments {name}"):
            model.generate(**inputs, **PLAIN, **{name: 2})
    with pytest.raises(ValueError, match="num_return_sequences and num_images_per_prompt are the same, got 2 and 3"):
        model.generate(**inputs, **PLAIN, num_return_sequences=2, num_images_per_prompt=3)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_arguments_by_place(model, mode):
    """As transformers' own models take them."""
    ids, said = torch.tensor([[10, 11]]), GenerationConfig(image_generation={"aspect_ratio": "2:1"}, max_new_tokens=3)
    options = {"generation_mode": mode} | ({} if mode == "text" else {"seed": 0, "guidance_scale": 1.0})
    forced = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda batch, ids: [BOI, 12], 1)])
    named = model.generate(input_ids=ids, generation_config=said, logits_processor=forced, **options)
    placed = model.generate(ids, said, forced, **options)
    if mode == "interleaved":
        assert placed.image_grid_hw.tolist() == [list(WIDE)] * 3
        named, placed = named.sequences, placed.sequences
    assert torch.equal(placed, named) and (mode != "text" or placed.tolist() == [[10, 11, 12, 12, 12]])
    for name in ("input_ids", "generation_config"):
        with pytest.raises(ValueError, match=f"{name} is given twice"):
            model.generate(ids, said, **options, **{name: {"input_ids": ids, "generation_config": said}[name]})
    with pytest.raises(TypeError, match="too many positional arguments"):
        model.generate(ids, said, *[None] * 20, **options)


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), [np.float16(0.5)] * 3], ids=repr
)
def test_numbers_of_numpy_and_torch(model, half):
    controls = {"temperature": half, "top_k": np.int64(5), "num_images_per_prompt": torch.tensor(2)}
    drawn = model.generate(**batch_of(model, *PROMPTS), **PLAIN, **controls)
    plain = {"temperature": 0.5, "top_k": 5, "num_images_per_prompt": 2}
    assert torch.equal(drawn, model.generate(**batch_of(model, *PROMPTS), **PLAIN, **plain))
    ramps = [np.linspace(1, 0.5, 3), torch.linspace(1, 0.5, 3)]
    ramps += [LinearRamp(np.float32(1), np.float32(0.5)), LinearRamp(torch.tensor(1), torch.tensor(0.5))]
    for ramp in ramps:
        drawn = model.generate(**batch_of(model, *PROMPTS), **PLAIN, temperature=ramp)
        assert torch.equal(drawn, model.generate(**batch_of(model, *PROMPTS), **PLAIN, temperature=[1, 0.75, 0.5]))
    expected = model.generate(**batch_of(model, *PROMPTS), **PLAIN | {"seed": [1, 2, 3]})
    for seeds in (np.arange(1, 4), torch.arange(1, 4)):
        assert torch.equal(model.generate(**batch_of(model, *PROMPTS), **PLAIN | {"seed": seeds}), expected)


def test_ids_name_their_grid():
    """All 123 of table 14, some of which have as many codes as others."""
    config = tiny_config(vq={"scale_schedules": None, "levels": None})
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    seen, schedules = [], list(model.model.schedules)
    assert len(schedules) == 123 > len({schedule.num_codes for schedule in schedules})
    model.model.vq_model.decode = lambda codes, grid: seen.append((codes, tuple(grid)))
    for schedule in schedules:
        codes = torch.arange(schedule.num_codes)[None] % CODES
        model.decode_image_tokens(codes + TEXT_ROWS + model.id_shift(schedule))
        assert seen[-1][1] == schedule.final_grid and torch.equal(seen[-1][0], codes)
        model.decode_image_tokens(codes + TEXT_ROWS, schedule.final_grid)
        assert torch.equal(seen[-1][0], codes)


def test_what_was_drawn_is_decoded():
    rows = [[[1, 1], [1, 2], [2, 4]], [[1, 1], [2, 1], [4, 2]]]
    model = tiny_model(tiny_config(vq={"scale_schedules": rows}))
    for ratio, size in (("2:1", (8, 16)), ("1:2", (16, 8))):
        options = PLAIN | {"aspect_ratio": ratio}
        ids = model.generate(**batch_of(model, *PROMPTS), **options)
        output = model.generate(**batch_of(model, *PROMPTS), **options, return_dict_in_generate=True)
        pictures = model.decode_image_tokens(ids)
        assert pictures.shape == (3, 3, *size)
        assert torch.equal(pictures, model.decode_image_tokens(ids, output.image_grid_hw))
        assert torch.equal(pictures, torch.stack(output.decode()))
        grid = output.image_grid_hw[0].numpy()
        for named in (grid, tuple(grid), grid[None], [tuple(grid)]):  # NumPy's integers are integers
            assert torch.equal(pictures, model.decode_image_tokens(ids, named))


def test_whoever_waits_for_a_text_is_told_that_none_comes(model):
    streamer = TextIteratorStreamer(None, timeout=60)
    thread = threading.Thread(
        target=partial(model.generate, **batch_of(model, PROMPTS[0]), **PLAIN, streamer=streamer)
    )
    thread.start()
    assert "".join(streamer) == ""
    thread.join()


# Sizes


@pytest.mark.parametrize("pictures", [[], [shown(WIDE, 1)], [shown(SQUARE, 1), shown(WIDE, 2)]])
@pytest.mark.parametrize("size", [{}, {"aspect_ratio": "2:1"}, {"height": 12, "width": 12}, {"top_k": 3}])
def test_the_grid_of_a_drawing_is_known_before(model, pictures, size):
    inputs = batch_of(model, [10, *pictures, 11, BOI])
    drawn = model.generate(**inputs, **PLAIN, **size, return_dict_in_generate=True).image_grid_hw
    grid = model.drawn_grid(inputs.get("image_grid_hw") if pictures else None, **size)
    assert grid == tuple(drawn[0].tolist())
    if size.keys() & {"aspect_ratio", "height"}:
        assert grid == (WIDE if "aspect_ratio" in size else SQUARE)


def test_the_grid_of_a_drawing_after_no_picture(model):
    assert model.drawn_grid(torch.zeros(0, 2, dtype=torch.long)) == model.drawn_grid() == SQUARE


def test_an_edit_keeps_the_first_pictures_size(model):
    edit = batch_of(model, [10, shown(WIDE, 1), shown(SQUARE, 2), 11, BOI])
    kept = model.generate(**edit, **PLAIN, return_dict_in_generate=True)
    assert kept.image_grid_hw.tolist() == [list(WIDE)]
    said = model.generate(**edit, **PLAIN, aspect_ratio="1:1", return_dict_in_generate=True)
    assert said.image_grid_hw.tolist() == [list(SQUARE)]
    differing = batch_of(model, [10, shown(WIDE, 1), BOI], [shown(SQUARE, 2), BOI])
    with pytest.raises(ValueError, match=r"different grids, .*: say height and width"):
        model.generate(**differing, **PLAIN)
    mixed = batch_of(model, [12, BOI], [10, shown(WIDE, 1), BOI])  # whose first row alone is square
    with pytest.raises(ValueError, match=r"different grids, .*: say height and width"):
        model.generate(**mixed, **PLAIN)
    drawn = model.generate(**mixed, **PLAIN, aspect_ratio="2:1", return_dict_in_generate=True)
    assert drawn.image_grid_hw.tolist() == [list(WIDE)] * 2
    written = {"generation_mode": "interleaved", "guidance_scale": 1.0, "max_new_images": 1, "max_new_tokens": 3}
    written |= {"sequence_bias": {(BOI,): 20.0}, "seed": 0}
    edit = batch_of(model, [10, shown(WIDE, 1), 11])
    assert model.generate(**edit, **written).image_grid_hw.tolist() == [list(WIDE)] * 2
    said = model.generate(**edit, **written, image_generation={"aspect_ratio": "1:1"})
    assert said.image_grid_hw.tolist() == [list(WIDE), list(SQUARE)]


@pytest.mark.parametrize("level", ["256", "512", "1024"])
@pytest.mark.parametrize("ratio", ["4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "5:4", "4:5"])
def test_the_nearest_ratio_is_taken(ratio, level):
    width, height = map(int, ratio.split(":"))
    table = NextFlowConfig().vq_config.schedule_table()
    sizes = [table.image_size(schedule) for schedule in table.of_level(level)]
    apart = lambda size: abs(np.log(size[1] / size[0] * height / width))  # noqa: E731
    taken = table.by_aspect_ratio(ratio, level, exact=False)
    assert apart(table.image_size(taken)) <= min(map(apart, sizes)) + 1e-9 < 0.12


def test_the_command_line_takes_the_nearest_ratio(console):
    status, out, err = console("flops", "--aspect-ratio", "16:9", "--level", "512", "--json", model=None)
    assert status == 0, err
    figures, table = json.loads(out), NextFlowConfig().vq_config.schedule_table()
    size = table.image_size(table.by_aspect_ratio("16:9", "512", exact=False))
    assert (figures["height"], figures["width"]) == size


def test_the_nearest_size_is_taken(model):
    inputs = batch_of(model, *PROMPTS)
    by_pixels = lambda height, width: {"height": height, "width": width}  # noqa: E731
    asked = [(by_pixels(9, 20), WIDE), ({"aspect_ratio": "31:10"}, WIDE), (by_pixels(13, 13), SQUARE)]
    asked.append((by_pixels(720, 1280), WIDE))  # of no area near, but of that aspect ratio
    logger = logging.get_logger("transformers_nextflow.scales")
    logger.warning_once.cache_clear()
    for size, grid in asked:
        with CaptureLogger(logger) as logs:
            output = model.generate(**inputs, **PLAIN, **size, return_dict_in_generate=True)
        assert "no scale schedule" in logs.out and "nearest: " in logs.out
        assert output.image_grid_hw.tolist() == [list(grid)] * 3
        with pytest.raises(ValueError, match="no scale schedule .* nearest"):
            model.generate(**inputs, **PLAIN, **size, exact_size=True)


# Defaults


def test_defaults_are_merged(tmp_path, model):
    model.save_pretrained(tmp_path)
    changed = type(model).from_pretrained(tmp_path, image_generation={"guidance_scale": 1.0, "top_k": 1})
    greedy = model.generate(**batch_of(model, *PROMPTS), **PLAIN, top_k=1)
    assert torch.equal(changed.generate(**batch_of(model, *PROMPTS), generation_mode="image", seed=0), greedy)
    changed.save_pretrained(tmp_path / "again")
    again = NextFlowConfig.from_pretrained(tmp_path / "again")
    assert again.image_generation == model.config.image_generation | {"guidance_scale": 1.0, "top_k": 1}
    by_config = GenerationConfig(image_generation={"guidance_scale": 1.0, "top_k": 1})
    drawn = model.generate(**batch_of(model, *PROMPTS), generation_mode="image", seed=0, generation_config=by_config)
    assert torch.equal(drawn, greedy)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    other.generation_config.image_generation = {"guidance_scale": 1.0, "top_k": 1}
    other.save_pretrained(tmp_path / "by_file")
    by_file = type(model).from_pretrained(tmp_path / "by_file")
    assert torch.equal(by_file.generate(**batch_of(model, *PROMPTS), generation_mode="image", seed=0), greedy)


def test_guidance_of_a_generation_config_is_that_of_the_keyword(model):
    """Which, like `image_generation`, goes before it."""
    inputs = batch_of(model, *PROMPTS) | {"generation_mode": "image", "seed": 0}
    said = GenerationConfig(guidance_scale=9.0)
    drawn = model.generate(**inputs, generation_config=said)
    assert torch.equal(drawn, model.generate(**inputs, guidance_scale=9.0))
    plain = model.generate(**inputs, guidance_scale=1.0)
    assert not torch.equal(drawn, plain)
    for over in ({"guidance_scale": 1.0}, {"image_generation": {"guidance_scale": 1.0}}):
        assert torch.equal(model.generate(**inputs, generation_config=said, **over), plain)


def test_a_generation_config_of_ones_own_leaves_the_rest_to_the_models(tmp_path, model):
    """As for text: what it does not say; and what the call itself says goes over both."""
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    controls = {"guidance_scale": 1.0, "temperature": 0.7, "aspect_ratio": "2:1"}
    other.generation_config.update(pad_token_id=PAD, image_generation=controls, allow_custom_entries=True)
    inputs = batch_of(model, *PROMPTS)
    padded = {"input_ids": inputs["input_ids"], "generation_mode": "image", "seed": 0}
    for said in ({"max_new_tokens": 4}, {"guidance_scale": 9.0}, {"image_generation": {"top_k": 3}}):
        options = {"aspect_ratio": "2:1", "temperature": 0.7} | said.get("image_generation", said)
        expected = model.generate(**inputs, **PLAIN | options)
        drawn = other.generate(**padded, pad_token_id=None, generation_config=GenerationConfig(**said))
        assert torch.equal(drawn, expected)
    greedy = model.generate(**inputs, **PLAIN, aspect_ratio="2:1", temperature=0.0)
    assert torch.equal(other.generate(**padded, do_sample=False), greedy)
    assert other.drawn_grid() == WIDE and other.drawn_grid(aspect_ratio="1:1") == SQUARE


def test_defaults_that_are_none(model):
    with pytest.raises(ValueError, match="image_generation must be an ImageGenerationConfig or a dict"):
        model.generate(**batch_of(model, *PROMPTS), generation_mode="image", image_generation=["top_k"])


RAMP, INTERVAL = LinearRamp(1.0, 3.0), ScaleInterval(2.0, 1, 2)


@pytest.mark.parametrize(
    "settings",
    [{"guidance_scale": RAMP, "temperature": 0.5}, {"guidance_scale": INTERVAL}, {"height": 8, "width": 16}],
    ids=str,
)
def test_defaults_are_one_object(settings, tmp_path, model):
    """In a call, in the model's configuration, beside the text's, and saved."""
    said, inputs = ImageGenerationConfig(**settings), batch_of(model, *PROMPTS)
    options = {"generation_mode": "image", "seed": 0, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options, **{"guidance_scale": 3.0} | settings)
    drawn = [model.generate(**inputs, **options, image_generation=said)]
    drawn.append(model.generate(**inputs, **options, generation_config=GenerationConfig(image_generation=said)))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, image_generation=said)
    drawn.append(loaded.generate(**inputs, **options))
    loaded.save_pretrained(tmp_path)
    drawn.append(type(model).from_pretrained(tmp_path).generate(**inputs, **options))
    for output in drawn:
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.image_grid_hw, expected.image_grid_hw)


@pytest.mark.parametrize("value", [RAMP, INTERVAL], ids=str)
def test_values_over_scales_beside_the_texts_defaults_are_saved(value, tmp_path, model):
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    other.generation_config.image_generation = {"guidance_scale": value}
    other.save_pretrained(tmp_path)
    inputs = batch_of(model, *PROMPTS) | {"generation_mode": "image", "seed": 0}
    drawn = type(model).from_pretrained(tmp_path).generate(**inputs)
    assert torch.equal(drawn, model.generate(**inputs, guidance_scale=value))


def test_values_over_scales_of_a_file():
    with pytest.raises(ValueError, match="guidance_scale over the scales must have the fields of a LinearRamp or"):
        ImageGenerationConfig(guidance_scale={"start": 1.0, "stop": 2.0})


@pytest.mark.parametrize("ratio", [{"aspect_ratio": "2:1"}, {"level": "12"}], ids=str)
def test_a_size_is_said_in_one_way(ratio):
    """Wherever it is said."""
    twice = ratio | {"height": 12, "width": 12}
    said = ImageGenerationConfig()
    for say in (ImageGenerationConfig, said.updated, lambda **size: NextFlowConfig(image_generation=size)):
        with pytest.raises(
            ValueError, match="give aspect_ratio and level, or height and width: .*height=12, width=12"
        ):
            say(**twice)


def test_what_is_none_in_a_configuration_says_nothing():
    for empty in (None, {}, dict.fromkeys(ImageGenerationConfig().to_dict())):
        config = NextFlowConfig(image_generation=empty)
        assert config.image_generation == ImageGenerationConfig().to_dict()
    config = NextFlowConfig(image_generation={"top_k": 5, "top_p": None})
    config.image_generation = {"top_k": None, "top_p": 0.5}
    assert config.image_generation == ImageGenerationConfig(top_k=5, top_p=0.5).to_dict()


def test_arguments_of_text_beside_one_object(model):
    """They say what it leaves at its defaults."""
    inputs, said = batch_of(model, *PROMPTS), ImageGenerationConfig(top_k=5, guidance_scale=1.0)
    options = {"generation_mode": "image", "seed": 0}
    named = options | {"guidance_scale": 1.0, "top_k": 5}
    two = model.generate(**inputs, **named, num_images_per_prompt=2)
    counted = GenerationConfig(num_return_sequences=2, do_sample=True)
    for asked in ({"num_return_sequences": 2}, {"generation_config": counted}):
        assert torch.equal(model.generate(**inputs, **options, **asked, image_generation=said), two)
    greedy = model.generate(**inputs, **options, image_generation=said, do_sample=False)
    assert torch.equal(greedy, model.generate(**inputs, **named, temperature=0.0))
    guidance = GenerationConfig(guidance_scale=9.0)
    over, under = (ImageGenerationConfig(top_k=5, **more) for more in ({"guidance_scale": 1.0}, {}))
    drawn = [
        model.generate(**inputs, **options, image_generation=each, generation_config=guidance)
        for each in (over, under)
    ]
    assert torch.equal(drawn[0], model.generate(**inputs, **named))
    assert torch.equal(drawn[1], model.generate(**inputs, **named | {"guidance_scale": 9.0}))
    three = ImageGenerationConfig(num_images_per_prompt=3)
    for asked in ({"image_generation": three}, {"num_images_per_prompt": 3}, {"num_images_per_prompt": 1}):
        with pytest.raises(ValueError, match="num_return_sequences and num_images_per_prompt are the same, got 2 and"):
            model.generate(**inputs, **options, **asked, num_return_sequences=2)


def test_an_edit_keeps_its_size_under_one_object(model):
    edit, said = batch_of(model, [10, shown(WIDE, 1), 11]), ImageGenerationConfig(guidance_scale=1.0)
    options = {"generation_mode": "image", "seed": 0, "return_dict_in_generate": True}
    assert model.generate(**edit, **options, image_generation=said).image_grid_hw.tolist() == [list(WIDE)]


def test_a_default_size_replaces_the_other_way_to_say_it(tmp_path, model):
    model.save_pretrained(tmp_path)
    by_pixels = type(model).from_pretrained(tmp_path, image_generation={"height": 8, "width": 16})
    by_pixels.save_pretrained(tmp_path)
    by_ratio = type(model).from_pretrained(tmp_path, image_generation={"aspect_ratio": "1:1"})
    for each, grid in ((by_pixels, WIDE), (by_ratio, SQUARE)):
        output = each.generate(**batch_of(model, *PROMPTS), **PLAIN, return_dict_in_generate=True)
        assert output.image_grid_hw.tolist() == [list(grid)] * 3
    wide = {"image_generation": {"aspect_ratio": "2:1"}}
    by_config = {"generation_config": GenerationConfig(**wide), "image_generation": {"height": 12, "width": 12}}
    for over in (wide | {"height": 12, "width": 12}, by_config):
        output = model.generate(**batch_of(model, *PROMPTS), **PLAIN, **over, return_dict_in_generate=True)
        assert output.image_grid_hw.tolist() == [list(SQUARE)] * 3


def test_answers_do_without_the_kinds_of_tokens(model):
    inputs, options = batch_of(model, [10, shown(SQUARE, 1), 11]), {"max_new_tokens": 2, "do_sample": False}
    kinds = {name: torch.zeros_like(inputs["input_ids"]) for name in ("token_type_ids", "mm_token_type_ids")}
    for mode in ("text", "interleaved"):
        output, other = (model.generate(**inputs, **more, **options, generation_mode=mode) for more in ({}, kinds))
        sequences = lambda output: getattr(output, "sequences", output)  # noqa: E731
        assert torch.equal(sequences(output), sequences(other))


def test_interleaved_pictures_take_the_same_keywords(model):
    options = {"generation_mode": "interleaved", "max_new_tokens": 4, "max_new_images": 1, "seed": 0}
    options |= {"sequence_bias": {(BOI,): 6.0}, "do_sample": False}
    inputs = batch_of(model, [10, 11])
    by_name = model.generate(**inputs, **options, guidance_scale=1.0, aspect_ratio="2:1", refine_top_k=[3])
    controls = {"guidance_scale": 1.0, "aspect_ratio": "2:1", "refine_top_k": [3]}
    assert torch.equal(by_name.image_codes, model.generate(**inputs, **options, image_generation=controls).image_codes)
    assert by_name.image_grid_hw.tolist() == [list(WIDE)]


# Text


@pytest.mark.parametrize(
    "strategy", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}], ids=str
)
@pytest.mark.parametrize("chat", [[10, 11, 12], [10, shown(SQUARE, 1), 11, 12, 11]], ids=["text", "picture"])
def test_text_holds_no_marks_of_images(model, strategy, chat):
    options = {"max_new_tokens": 6, "do_sample": False, "sequence_bias": {(BOI,): 9.0, (IMAGE,): 8.0, (EOI,): 7.0}}
    written = model.generate(**batch_of(model, chat), **options, **strategy)[0, -6:]
    assert not {BOI, IMAGE, EOI} & set(written.tolist())
    ended = model.generate(**batch_of(model, chat), **options, eos_token_id=[EOS, BOI])
    assert ended[0, -1] == BOI  # where it ends the text it may be written


def test_prompts_with_pictures_are_not_read_in_chunks(model):
    options = {"max_new_tokens": 3, "do_sample": False}
    chunked, whole = (model.generate(**batch_of(model, [10, 11, 12]), **options, **more) for more in (CHUNKED, {}))
    assert torch.equal(chunked, whole)
    said = GenerationConfig(**CHUNKED, **options)
    for more in (options | CHUNKED, {"generation_config": said}):
        with pytest.raises(ValueError, match="read in one go, got prefill_chunk_size=2"):
            model.generate(**batch_of(model, [10, shown(SQUARE), 11]), **more)
    with pytest.raises(ValueError, match="reads text alone, got cache_implementation='paged' and pictures"):
        model.generate(**batch_of(model, [10, shown(SQUARE), 11]), **options, cache_implementation="paged")


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_what_is_asked_is_named_where_it_is_none(model, mode):
    inputs = batch_of(model, [10, shown(SQUARE), 11])
    del inputs["image_grid_hw"]
    with pytest.raises(ValueError, match="image_codes came without image_grid_hw"):
        model.generate(**inputs, generation_mode=mode, max_new_tokens=2)
    for said in ({"max_new_tokens": 2}, "folder"):
        with pytest.raises(ValueError, match="generation_config must be a GenerationConfig, got"):
            model.generate(**batch_of(model, [10, 11]), generation_mode=mode, generation_config=said)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_outputs_are_copied_without_their_model(model, mode, duplicate):
    options = {"guidance_scale": 1.0, "return_dict_in_generate": True}
    if mode == "interleaved":
        options = {"max_new_tokens": 3, "max_new_images": 1, "sequence_bias": {(BOI,): 20.0}}
    output = model.generate(**batch_of(model, [10, shown(SQUARE), 11]), generation_mode=mode, seed=0, **options)
    copied = duplicate(output)
    assert torch.equal(copied.sequences, output.sequences)
    assert torch.equal(copied.image_grid_hw, output.image_grid_hw)
    assert getattr(copied, "contexts", None) is None
    assert output.decode()
    with pytest.raises(ValueError, match="a copy without its model: call `model.decode_images`"):
        copied.decode()


def test_text_takes_no_guidance(model):
    said = GenerationConfig(guidance_scale=1.5, max_new_tokens=3)
    for options in ({"guidance_scale": 1.5}, {"guidance_scale": 0.5}, {"generation_config": said}):
        with pytest.raises(ValueError, match=r"guidance_scale guides pictures, not text, got [10]\.5"):
            model.generate(**batch_of(model, [10, 11]), **options)
    with pytest.raises(ValueError, match="guidance_scale guides pictures, not text, got 1.5"):
        model.generate(**batch_of(model, [10, 11]), generation_mode="interleaved", generation_config=said, seed=0)


def test_text_is_sampled_where_a_control_says_so(tiny_model, tiny_processor):
    settings = partial(text_sampling, tiny_model, tiny_processor, 4)
    greedy = settings()
    assert greedy["do_sample"] is False and greedy["max_new_tokens"] == 4
    for cold in ({"temperature": 0.0}, {"temperature": COLDEST / 2, "top_k": 3}, {"top_p": None}):
        assert settings(**cold) == greedy
    for given in ({"top_k": 3}, {"top_p": 0.5}, {"temperature": COLDEST}, {"temperature": 0.7, "top_k": 0}):
        assert settings(**given) == greedy | given | {"do_sample": True}
    for wrong in ({"temperature": -0.1}, {"top_k": 1.5}, {"top_p": 1.1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            settings(**wrong)


@pytest.mark.parametrize("said", [None, [3, 4]])
def test_text_ends_as_the_model_says_and_else_as_its_tokenizer(said, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(tiny_model.generation_config, "eos_token_id", said)
    expected = said or tiny_processor.tokenizer.eos_token_id
    assert text_sampling(tiny_model, tiny_processor, 4)["eos_token_id"] == expected


def test_no_layer_but_the_last_answers(model):
    inputs, said = batch_of(model, [10, 11]), GenerationConfig(assistant_early_exit=1, max_new_tokens=3)
    for options in ({"assistant_early_exit": 1, "do_sample": False}, {"generation_config": said}):
        with pytest.raises(ValueError, match="no layer but the last answers, got assistant_early_exit=1: draft by"):
            model.generate(**inputs, **options)


def test_an_answer_draws_each_picture_once(model):
    with pytest.raises(ValueError, match="num_images_per_prompt is of pictures alone, .* got 2"):
        model.generate(
            **batch_of(model, [10, 11]), generation_mode="interleaved", num_images_per_prompt=2, guidance_scale=1.0
        )


def test_text_from_embeddings(model):
    inputs = batch_of(model, [10, 11, 12])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    written = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, 3:])


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_text_from_embeddings_around_images(model, strategy):
    inputs = batch_of(model, [10, shown(SQUARE, 1), 11], [shown(WIDE, 2), 12, shown(SQUARE, 3)])
    options = strategy | {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    length = inputs.pop("input_ids").shape[1]
    output = model.generate(inputs_embeds=embeds, **inputs, **options)
    assert torch.equal(output.sequences, expected.sequences[:, length:])
    for logits, others in zip(output.logits, expected.logits, strict=True):
        assert relative(logits, others) < 1e-5


# Bounds and random numbers


def test_an_answer_ends_where_positions_do():
    model = tiny_model(tiny_config(text={"max_position_embeddings": 24}))
    options = {"generation_mode": "interleaved", "guidance_scale": 1.0, "do_sample": False, "seed": 0}
    options |= {"sequence_bias": {(EOS,): -20.0, (BOI,): 2.0}, "max_new_tokens": 100}
    with CaptureLogger(logging.get_logger("transformers_nextflow.interleaved")) as logs:
        output = model.generate(**batch_of(model, [10, 11, 12]), **options)
    layout = build_layout(model.config, output.sequences, output.image_grid_hw, output.attention_mask)
    assert layout.position_ids.max() == 23
    count = int(re.search(r"an answer ends after (\d+) tokens: the model has 24 positions", logs.out)[1])
    with CaptureLogger(logging.get_logger("transformers_nextflow.interleaved")) as logs:
        asked = model.generate(**batch_of(model, [10, 11, 12]), **options | {"max_new_tokens": count})
    assert torch.equal(asked.sequences, output.sequences) and not logs.out


def test_an_answer_goes_on_where_rope_reaches_further():
    """Behind a prompt beyond `max_position_embeddings` as before one."""
    scaled = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_model(tiny_config(text={"max_position_embeddings": 8, "rope_parameters": scaled}))
    options = {"max_new_tokens": 12, "do_sample": False, "sequence_bias": {(EOS,): -50.0}}
    prompt = batch_of(model, [10, 11, 12, 13, 14, 15, 16, 17, 18])
    written = model.generate(**prompt, **options)
    options |= {"generation_mode": "interleaved", "guidance_scale": 1.0, "seed": 0}
    assert torch.equal(model.generate(**prompt, **options, max_new_images=0).sequences, written)
    options["sequence_bias"] = {(BOI,): 50.0, (EOS,): -50.0}
    drawn = model.generate(**prompt, **options, max_new_images=1)
    assert len(drawn.image_grid_hw) == 1


def test_an_answer_has_some_pictures_by_default(model):
    options = {"generation_mode": "interleaved", "guidance_scale": 1.0, "do_sample": False, "seed": 0}
    output = model.generate(**batch_of(model, [10, 11]), **options, sequence_bias={(BOI,): 50.0}, max_new_tokens=40)
    assert len(output.image_grid_hw) == 16


def test_all_seeds_differ(model):
    seeds = [0, 5, 2**32 - 1, 2**32, 5 + 2**32, 5 + 2**33, 5 - 2**32, 2**64 - 1, -1, -(2**63)]
    drawn = [model.generate(**batch_of(model, [10, BOI]), **PLAIN | {"seed": seed}) for seed in seeds]
    assert len(torch.cat(drawn).unique(dim=0)) == len(seeds)


def test_a_generator_is_its_seed(model):
    inputs, options = batch_of(model, [10, BOI]), PLAIN | {"seed": None}
    generator = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    expected = model.generate(**inputs, **PLAIN | {"seed": 7})
    assert torch.equal(model.generate(**inputs, **options, generator=generator()), expected)
    assert torch.equal(model.generate(**inputs, **options, generator=[generator()]), expected)
    two = model.generate(**inputs, **options, generator=generator(), num_images_per_prompt=2)
    assert torch.equal(two[:1], expected) and not torch.equal(two[1:], expected)


# What is read


@pytest.mark.parametrize(
    "size", [(320, 240), (240, 320), (300, 300), (700, 500), (1000, 1000), (1920, 1080), (64, 64)]
)
def test_a_picture_that_is_read_is_not_enlarged(size):
    processor = NextFlowImageProcessor()
    width, height = size
    table, schedule = processor.schedule_table(), processor.schedule_of(height, width)
    read = table.image_size(schedule)
    higher = [level for level in table.levels if int(level) > int(table.level_of(schedule.final_grid))]
    if size != (64, 64):  # below every level
        assert read[0] <= height and read[1] <= width
    for level in higher:  # would enlarge it
        read = table.image_size(table.nearest_to_image(height, width, level))
        assert read[0] > height or read[1] > width
    assert len(higher) == {240: 2, 320: 2, 300: 2, 500: 1, 1000: 1, 1080: 0, 64: 2}[height]


def test_the_image_token_alone_stands_for_a_picture(tiny_processor):
    picture = np.zeros((24, 24, 3), dtype=np.uint8)
    whole = tiny_processor(text=f"{tiny_processor.image_placeholder} describe", images=picture)
    alone = tiny_processor(text=f"{tiny_processor.image_token} describe", images=picture)
    assert alone["input_ids"] == whole["input_ids"]
    with pytest.raises(ValueError, match="stands outside"):
        tiny_processor(text=f"{tiny_processor.boi_token}{tiny_processor.image_token} describe", images=picture)


# Messages and manners


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize("mark", ["boi_token", "image_token", "image_placeholder"])
@pytest.mark.parametrize("place", ["alone", "beside a picture", "negative"])
def test_marks_in_a_users_text_name_the_remedy(tiny_model, tiny_processor, mode, mark, place):
    spelled = getattr(tiny_processor, mark)
    if mode == "text" and (place == "negative" or (place == "alone" and mark == "boi_token")):
        return  # text alone is read as it is
    text = [{"type": "text", "text": "a circle" if place == "negative" else f"a {spelled} circle"}]
    picture = {"type": "image", "image": np.zeros((24, 24, 3), dtype=np.uint8)}
    options = {"negative_prompt": spelled} if place == "negative" else {}
    content = [picture, *text] if place == "beside a picture" else text
    chat, mode = [{"role": "user", "content": content}], {"generation_mode": mode}
    with pytest.raises(ValueError, match="sanitize_control_tokens=True"):
        tiny_model.generate(**tiny_processor.apply_chat_template(chat, **mode, **options), **mode, max_new_tokens=1)
    inputs = tiny_processor.apply_chat_template(chat, **mode, **options, sanitize_control_tokens=True)
    tiny_model.generate(**inputs, **mode, max_new_tokens=1)


def test_a_second_answer_replaces_the_first(console, tmp_path):
    (tmp_path / "answer").mkdir()
    names = [f"picture-{number}.png" for number in range(30)]
    for name in names:
        (tmp_path / "answer" / name).write_bytes(b"of an earlier answer")
    (tmp_path / "answer" / "answer.md").write_text("\n\n".join(f"![]({name})" for name in names))
    status, out, err = console("interleave", "a", "--max-new-tokens", 3, "--seed", 0, "--json")
    assert status == 0, err
    pictures = sorted(path.name for path in (tmp_path / "answer").glob("*.png"))
    assert pictures == sorted(part["path"].split("/")[-1] for part in json.loads(out)["parts"] if "path" in part)


def test_folders_are_made_and_the_version_is_told(console, tmp_path, capsys):
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    status, _, err = console("describe", "a.png", "--max-new-tokens", 1, "--output", "new/folder/x.txt")
    assert status == 0 and (tmp_path / "new" / "folder" / "x.txt").is_file(), err
    status, _, err = console("describe", "a.png", "--output", "new")
    assert status == 2 and "--output must be a file, got the folder new" in err
    assert main(["--version"]) == 0 and "0.1.0" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_caches_that_are_dropped_are_not_read(mode):
    """Under gradient checkpointing the library's layers keep none in training mode."""
    model = tiny_model()
    inputs = batch_of(model, [10, shown(SQUARE, 1), 11])
    options = {"do_sample": False, "max_new_tokens": 3} if mode == "text" else {"seed": 0}
    output = {} if mode == "interleaved" else {"return_dict_in_generate": True}
    expected = model.generate(**inputs, generation_mode=mode, **output, **options).sequences
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"drops the caches that generation reads: call eval\(\)"):
        model.generate(**inputs, generation_mode=mode, **options)
    if mode == "text":
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected)
    model.eval()
    again = model.generate(**inputs, generation_mode=mode, **output, **options).sequences
    assert torch.equal(again, expected)
