"""`generate`: text as Qwen2.5-VL writes it, images scale by scale over a cache."""

import pytest
import torch
from test_modeling import qwen_of
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
    shown,
    tiny_config,
    tiny_model,
)
from transformers import DynamicCache

from transformers_nextflow import LinearRamp, NextFlowImageOutput, ScaleInterval, codes_of_region
from transformers_nextflow.cache_name import CACHE
from transformers_nextflow.modeling_nextflow_vq import patchify
from transformers_nextflow.quantizer import resize_features, to_map, to_sequence
from transformers_nextflow.sampling import RowGenerators, guide, per_scale, sample

RATIOS = {SQUARE: "1:1", WIDE: "2:1"}
GRIDS = pytest.mark.parametrize("grid", [SQUARE, WIDE], ids=["square", "wide"])
PROMPTS = [[10, 11, 12, BOI], [13, BOI], [14, 15, BOI]]
NULLS = [[20, BOI], [20, 21, 22, BOI], [23, 20, BOI]]
EDITS = [
    [10, shown(SQUARE, 1), 11, BOI],
    [12, BOI],
    [shown(WIDE, 2), shown(SQUARE, 3), 13, 14, BOI],
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def accumulated():
    return tiny_model(tiny_config(feature_mode="accumulated"))


@pytest.fixture(scope="module")
def paper():
    """Reads pictures without their last scale."""
    return tiny_model(tiny_config(condition_last_scale=False))


def draw(model, *rows, nulls=None, grid=SQUARE, **kwargs) -> NextFlowImageOutput:
    """`generate` in image mode; without null prompts unguided."""
    inputs = batch_of(model, *rows)
    if nulls is None:
        kwargs.setdefault("guidance_scale", 1.0)
    else:
        negative = batch_of(model, *nulls)
        inputs |= {"negative_" + name: negative[name] for name in ("input_ids", "attention_mask")}
    kwargs = {"seed": 0, "aspect_ratio": RATIOS[grid], "output_logits": True} | kwargs
    return model.generate(**inputs, generation_mode="image", return_dict_in_generate=True, **kwargs)


def forced(model, *rows, sequences: torch.Tensor, grid=SQUARE) -> torch.Tensor:
    """(B, codes, V): what one forward without a cache says about codes already known."""
    whole = [[*row[:-1], Picture(grid, codes=codes - TEXT_ROWS)] for row, codes in zip(rows, sequences)]
    with torch.no_grad():
        logits = model(**batch_of(model, *whole)).logits
    return logits[:, -1 - sequences.shape[1] : -1, TEXT_ROWS:]


def joined(output: NextFlowImageOutput) -> torch.Tensor:
    return torch.cat(output.logits, dim=1)


def with_last_scale(rows: list, last_scale: bool) -> list:
    return [[p._replace(last_scale=last_scale) if isinstance(p, Picture) else p for p in row] for row in rows]


# Text


@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "temperature": 1.5},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=["greedy", "sampled", "beams", "sampled beams", "processors"],
)
def test_text_is_qwens_token_by_token(model, strategy):
    qwen = qwen_of(model)
    qwen.generation_config.pad_token_id, qwen.generation_config.eos_token_id = PAD, EOS
    inputs = batch_of(model, [10, 11, 12, 13, 14], [15, 16], [17, 18, 19])
    kwargs = strategy | {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    outputs = []
    for each, suppressed in ((model, None), (qwen, [BOI, IMAGE, EOI])):
        torch.manual_seed(0)
        outputs.append(each.generate(**inputs, **kwargs, suppress_tokens=suppressed))
    ours, theirs = outputs
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.logits, theirs.logits))
    assert len(ours.sequences[:, 5:].unique()) > 4


CHATS = [[10, shown(SQUARE, 1), shown(WIDE, 2), 11], [12, 13], [14, shown(SQUARE, 3), 15, 16]]
TEXT_ONLY = {"suppress_tokens": [BOI, IMAGE, EOS], "max_new_tokens": 6}


@pytest.mark.parametrize("name", ["paper", "model"])
def test_captions_are_those_of_full_forwards(request, name):
    """Greedy over a cache, greedy without one, and a loop of forwards over the growing sequence."""
    model = request.getfixturevalue(name)
    inputs = batch_of(model, *with_last_scale(CHATS, model.config.condition_last_scale))
    cached = model.generate(**inputs, **TEXT_ONLY, output_logits=True, return_dict_in_generate=True)
    uncached = model.generate(**inputs, **TEXT_ONLY, use_cache=False)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        for step in range(6):
            logits = model(**inputs, logits_over="text").logits[:, -1]
            assert relative(cached.logits[step], logits) < 1e-5
            logits[:, TEXT_ONLY["suppress_tokens"]] = -torch.inf
            following = logits.argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    assert torch.equal(cached.sequences, inputs["input_ids"]) and torch.equal(uncached, inputs["input_ids"])
    assert cached.sequences.shape[1] == length + 6


@pytest.mark.parametrize("drafts", ["lookup", "another model", "its own"])
@pytest.mark.parametrize("chat", [[10, 11, 12, 10, 11], CHATS[0]], ids=["text", "pictures"])
def test_drafted_text_is_the_models_own(model, drafts, chat):
    """Prompt lookup and assisted generation only guess ahead."""
    inputs = batch_of(model, [*chat, 12, 11, 12])
    options = TEXT_ONLY | {"suppress_tokens": [BOI, IMAGE, EOI, EOS], "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assistants = {"another model": tiny_model(seed=5), "its own": tiny_model()}
    drafting = {"prompt_lookup_num_tokens": 3} if drafts == "lookup" else {"assistant_model": assistants[drafts]}
    assert torch.equal(model.generate(**inputs, **options, **drafting), expected)
    assert len(expected[0, -12:].unique()) > 3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("slots", [0, 4, 13], ids=["open", "cut", "whole"])
def test_text_does_not_follow_a_picture_that_is_not_over(paper, slots, use_cache):
    picture = {"image_grid_hw": torch.tensor([SQUARE]), "image_codes": torch.arange({0: 0, 4: 5, 13: 14}[slots])}
    ids = torch.tensor([[10, BOI, *[IMAGE] * slots]])
    with pytest.raises(ValueError, match="a prompt of text must not end within a picture"):
        paper.generate(ids, **picture, max_new_tokens=2, use_cache=use_cache)


def test_a_batch_of_captions_is_each_alone(model):
    together = model.generate(**batch_of(model, *CHATS), **TEXT_ONLY)
    for row, chat in zip(together, CHATS):
        assert torch.equal(row[-6:], model.generate(**batch_of(model, chat), **TEXT_ONLY)[0, -6:])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("by_pixels", [False, True], ids=["codes", "pixels"])
def test_several_answers_keep_each_rows_images(model, use_cache, by_pixels):
    def inputs_of(*rows):
        inputs = batch_of(model, *rows)
        if by_pixels and "image_codes" in inputs:
            del inputs["image_codes"]
            seeds = [part.seed for row in rows for part in row if isinstance(part, Picture)]
            patches = []
            for seed, (h, w) in zip(seeds, inputs["image_grid_hw"].tolist()):
                generator = torch.Generator().manual_seed(seed)
                picture = 2 * torch.rand(1, 3, PATCH * h, PATCH * w, generator=generator) - 1
                patches.append(patchify(picture, PATCH)[0])
            inputs["pixel_values"] = torch.cat(patches)
        return inputs

    kwargs = {**TEXT_ONLY, "use_cache": use_cache}
    inputs = inputs_of(*CHATS)
    greedy = model.generate(**inputs, **kwargs)
    likeliest = model.generate(**inputs, **kwargs, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(likeliest, greedy.repeat_interleave(3, dim=0))
    beams = model.generate(**inputs, **kwargs, num_beams=3, num_return_sequences=2)
    for index, chat in enumerate(CHATS):
        alone = model.generate(**inputs_of(chat), **kwargs, num_beams=3, num_return_sequences=2)
        assert torch.equal(beams[2 * index : 2 * index + 2, -6:], alone[:, -6:])


def test_text_ignores_null_prompts(model):
    inputs = batch_of(model, [10, 11])
    expected = model.generate(**inputs, max_new_tokens=3)
    negative = {"negative_input_ids": inputs["input_ids"], "negative_attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.generate(**inputs, **negative, max_new_tokens=3), expected)


# Images: logits


@GRIDS
@pytest.mark.parametrize("features", ["model", "accumulated", "paper"])
@pytest.mark.parametrize("prompts", [PROMPTS, EDITS, EDITS[:1]], ids=["text", "edits", "unpadded"])
def test_sampled_logits_are_those_of_one_forward(request, features, grid, prompts):
    model = request.getfixturevalue(features)
    prompts = with_last_scale(prompts, model.config.condition_last_scale)
    output = draw(model, *prompts, grid=grid)
    schedule = model.model.schedules.by_grid(grid)
    assert [logits.shape for logits in output.logits] == [(len(prompts), length, CODES) for length in schedule.lengths]
    assert output.image_grid_hw.tolist() == [list(grid)] * len(prompts)
    expected = forced(model, *prompts, sequences=output.sequences, grid=grid)
    assert relative(joined(output), expected) < 1e-5


@GRIDS
@pytest.mark.parametrize("features", ["model", "accumulated"])
def test_greedy_codes_are_those_of_a_loop_of_full_forwards(request, features, grid):
    """Each scale from scratch: blocks do not see later ones, so what stands there does not matter."""
    model = request.getfixturevalue(features)
    schedule = model.model.schedules.by_grid(grid)
    sequences = torch.full((3, schedule.num_codes), TEXT_ROWS)
    for scale in range(len(schedule)):
        at = schedule.slice(scale)
        sequences[:, at] = TEXT_ROWS + forced(model, *EDITS, sequences=sequences, grid=grid)[:, at].argmax(-1)
    assert torch.equal(draw(model, *EDITS, grid=grid, temperature=0.0).sequences, sequences)


@pytest.mark.parametrize("scales", [2.5, 0.0, [1.0, 4.0, 0.5], LinearRamp(1.0, 7.5)], ids=str)
@pytest.mark.parametrize("edits", [False, True], ids=["text", "edits"])
def test_guidance_adds_the_difference_of_two_forwards(model, scales, edits):
    prompts, nulls = (EDITS, NULLS) if edits else (PROMPTS, NULLS)
    if edits:
        pictures = [[part for part in row if isinstance(part, Picture)] for row in EDITS]
        nulls = [[*kept, *row] for kept, row in zip(pictures, NULLS)]
    output = draw(model, *prompts, nulls=nulls, guidance_scale=scales)
    conditional = forced(model, *prompts, sequences=output.sequences)
    unconditional = forced(model, *nulls, sequences=output.sequences)
    schedule = model.model.schedules.by_grid(SQUARE)
    factors = torch.tensor(per_scale("guidance_scale", scales, 3, 0.0))
    factors = factors.repeat_interleave(torch.tensor(schedule.lengths))[:, None]
    expected = unconditional + factors * (conditional - unconditional)
    assert relative(joined(output), expected) < 1e-5
    assert relative(expected, conditional) > 0.1


def test_guidance_of_one_is_the_conditional_alone(model):
    plain = draw(model, *PROMPTS)
    with_null = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=1.0)
    assert torch.equal(plain.sequences, with_null.sequences)
    assert not torch.equal(plain.sequences, draw(model, *PROMPTS, nulls=NULLS, guidance_scale=3.0).sequences)


def test_guide_by_hand():
    logits = torch.tensor([[[1.0, 5.0]], [[3.0, 1.0]]])
    assert guide(logits, 3.0).tolist() == [[[-3.0, 13.0]]]


def test_eager_attention_draws_the_same(model):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    assert relative(joined(draw(eager, *EDITS)), joined(draw(model, *EDITS))) < 1e-5


def test_a_bfloat16_model_draws(model):
    output = draw(tiny_model().to(torch.bfloat16), *EDITS)
    assert output.logits[0].dtype == torch.float32 and joined(output).isfinite().all()
    expected = joined(draw(model, *EDITS))[:, :1]
    assert relative(joined(output)[:, :1], expected) < 0.1


# Guidance by images, intervals, further passes


@pytest.mark.parametrize(
    "scales", [(2.0, 3.0), (1.0, 2.0), ([1.0, 2.0, 1.0], [2.0, 1.0, 1.0]), (1.0, [2.0, 3.0, 0.5])], ids=str
)
def test_image_guidance_adds_the_difference_of_a_third_forward(model, scales):
    text_scale, image_scale = scales
    pictures = [[part for part in row if isinstance(part, Picture)] for row in EDITS]
    nulls = [[20, *kept, *row] for kept, row in zip(pictures, NULLS)]
    output = draw(model, *EDITS, nulls=nulls, guidance_scale=text_scale, image_guidance_scale=image_scale)
    bare = [[20, *row] for row in NULLS]
    conditional, unconditional, none = (
        forced(model, *rows, sequences=output.sequences) for rows in (EDITS, nulls, bare)
    )
    lengths = torch.tensor(model.model.schedules.by_grid(SQUARE).lengths)
    text_scale, image_scale = (
        torch.tensor(per_scale("s", scale, 3, 0.0)).repeat_interleave(lengths)[:, None] for scale in scales
    )
    expected = none + image_scale * (unconditional - none) + text_scale * (conditional - unconditional)
    assert relative(joined(output), expected) < 1e-5
    assert relative(none[[0, 2]], unconditional[[0, 2]]) > 0.1


def test_image_guidance_of_one_is_text_guidance(model):
    pictures = [[part for part in row if isinstance(part, Picture)] for row in EDITS]
    nulls = [[*kept, *row] for kept, row in zip(pictures, NULLS)]
    expected = draw(model, *EDITS, nulls=nulls, guidance_scale=3.0)
    off = draw(model, *EDITS, nulls=nulls, guidance_scale=3.0, image_guidance_scale=1.0)
    assert torch.equal(off.sequences, expected.sequences)
    nearly = draw(model, *EDITS, nulls=nulls, guidance_scale=3.0, image_guidance_scale=[1.0, 1.0, 1.0 + 1e-7])
    assert relative(joined(nearly), joined(expected)) < 1e-5


def test_guidance_in_an_interval(model):
    everywhere = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=3.0)
    covering = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=ScaleInterval(3.0, 0, 2))
    assert torch.equal(covering.sequences, everywhere.sequences)
    middle = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=ScaleInterval(3.0, 1, 1))
    assert torch.equal(middle.sequences, draw(model, *PROMPTS, nulls=NULLS, guidance_scale=[1.0, 3.0, 1.0]).sequences)
    with pytest.raises(ValueError, match="an interval of 3 scales lies within 0 to 2"):
        draw(model, *PROMPTS, nulls=NULLS, guidance_scale=ScaleInterval(3.0, 1, 3))


def decoder_rows(model, *args, **kwargs) -> list[int]:
    """How many rows read the prompts, then each scale from the second on."""
    seen = {}

    def count(module, args, kwargs):
        for part in kwargs[CACHE].parts:
            rows, length = part.shape
            step = length if part.in_block else 0
            seen[step] = seen.get(step, 0) + rows

    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    draw(model, *args, **kwargs)
    hook.remove()
    return list(seen.values())


def test_null_rows_stop_after_the_last_guided_scale(model):
    rows = lambda scales: decoder_rows(model, *PROMPTS, nulls=NULLS, guidance_scale=scales)  # noqa: E731
    assert rows([3.0, 3.0, 3.0]) == [6, 6, 6]
    assert rows([1.0, 1.0, 3.0]) == [6, 6, 6]  # the last scale reads what the null rows held before
    assert rows([3.0, 3.0, 1.0]) == [6, 6, 3]
    assert rows([3.0, 1.0, 1.0]) == [6, 3, 3]
    assert rows([1.0, 1.0, 1.0]) == [3, 3, 3]


def last_scale_again(model, rows: list, sequences: torch.Tensor) -> torch.Tensor:
    """(B, 9, V) by hand: the last scale from its own codes on its own grid, over everything before it."""
    whole = [[*row[:-1], Picture(SQUARE, codes=codes - TEXT_ROWS)] for row, codes in zip(rows, sequences)]
    inner, schedule = model.model, model.model.schedules.by_grid(SQUARE)
    entries = inner.code_embeddings(sequences - TEXT_ROWS)
    own = entries[:, 5:]
    if model.config.feature_mode == "accumulated":
        maps = [to_map(entries[:, schedule.slice(scale)], grid) for scale, grid in enumerate(schedule)]
        own = to_sequence(sum(resize_features(each, SQUARE) for each in maps))
    replaced = inner.connector(own) + inner.scale_embedding(torch.tensor([3]), torch.tensor([3]))
    seen = {}
    hook = inner.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"], **kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch_of(model, *whole))
        hook.remove()
        kwargs = {name: seen[name] for name in ("position_ids", "attention_mask")}
        embeds = torch.cat([seen["embeds"][:, :-10], replaced, seen["embeds"][:, -1:]], dim=1)
        return model.code_head(inner.language_model(inputs_embeds=embeds, **kwargs).last_hidden_state[:, -10:-1])


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("features", ["model", "accumulated"])
def test_a_further_pass_reads_the_scale_itself(request, features, guided):
    model = request.getfixturevalue(features)
    kwargs = {"temperature": 0.0} | ({"guidance_scale": 3.0, "nulls": NULLS} if guided else {})
    once = draw(model, *PROMPTS, **kwargs)
    assert torch.equal(draw(model, *PROMPTS, refine_top_k=(), **kwargs).sequences, once.sequences)
    refined = draw(model, *PROMPTS, refine_top_k=(5,), forced_codes=once.sequences[:, :5] - TEXT_ROWS, **kwargs)
    logits = last_scale_again(model, PROMPTS, once.sequences)
    if guided:
        null = last_scale_again(model, NULLS, once.sequences)
        logits = null + 3.0 * (logits - null)
    assert relative(refined.logits[2], logits) < 1e-5
    assert torch.equal(refined.sequences[:, 5:] - TEXT_ROWS, logits.argmax(-1))
    assert relative(refined.logits[2], once.logits[2]) > 0.1


def test_every_pass_draws_anew_from_its_own_top_k(model):
    temperature, top_p = [1.5, 0.7, 1.2], [1.0, 0.9, 0.8]
    output = draw(model, *PROMPTS, top_k=1, refine_top_k=(2, 0), temperature=temperature, top_p=top_p, seed=5)
    stream, schedule = torch.Generator().manual_seed(5), model.model.schedules.by_grid(SQUARE)
    for scale, length in enumerate(schedule.lengths):
        for top_k in (1, 2, 0) if scale else (1,):  # the first scale has one pass
            uniform = torch.rand(length, generator=stream).expand(3, -1)
            expected = sample(output.logits[scale], temperature[scale], top_k, top_p[scale], uniform)
        assert torch.equal(output.sequences[:, schedule.slice(scale)] - TEXT_ROWS, expected)


def test_later_scales_see_the_block_as_first_read(model):
    output = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=2.0, refine_top_k=(3,), temperature=0.0)
    plain = draw(
        model,
        *PROMPTS,
        nulls=NULLS,
        guidance_scale=2.0,
        temperature=0.0,
        forced_codes=output.sequences[:, :5] - TEXT_ROWS,
    )
    again = draw(
        model,
        *PROMPTS,
        nulls=NULLS,
        guidance_scale=2.0,
        temperature=0.0,
        refine_top_k=(3,),
        forced_codes=output.sequences[:, :5] - TEXT_ROWS,
    )
    assert relative(again.logits[2], output.logits[2]) < 1e-5
    assert relative(again.logits[2], plain.logits[2]) > 1e-3


# Prefix fork


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("features", ["model", "accumulated"])
@pytest.mark.parametrize("refine", [(), (4,)], ids=["one pass", "two passes"])
def test_forcing_what_is_drawn_anyway_changes_nothing(request, features, guided, refine):
    model = request.getfixturevalue(features)
    kwargs = {"refine_top_k": refine} | ({"guidance_scale": 2.0, "nulls": NULLS} if guided else {})
    free = draw(model, *PROMPTS, **kwargs)
    codes = free.sequences - TEXT_ROWS
    for length in (1, 5, 14):
        kept = draw(model, *PROMPTS, forced_codes=codes[:, :length], **kwargs)
        assert torch.equal(kept.sequences, free.sequences)
        if not refine:
            assert relative(joined(kept), joined(free)) < 1e-5
    if not refine:  # a region is forced in every pass, in the first too
        mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(0)) < 0.5
        kept = draw(model, *PROMPTS, forced_codes=codes, forced_mask=mask, **kwargs)
        assert torch.equal(kept.sequences, free.sequences)


def test_logits_of_forced_codes_do_not_depend_on_other_rows(model):
    """Those of the last pass, whether or not another row is free there."""
    codes = draw(model, *PROMPTS, seed=3).sequences - TEXT_ROWS
    mask = torch.ones_like(codes, dtype=torch.bool)
    mask[1, 3:] = False
    kwargs = {"refine_top_k": (4, 2), "guidance_scale": 2.0}
    together = draw(model, *PROMPTS, nulls=NULLS, forced_codes=codes, forced_mask=mask, **kwargs)
    alone = draw(model, PROMPTS[0], nulls=NULLS[:1], forced_codes=codes[:1], **kwargs)
    assert torch.equal(alone.sequences, together.sequences[:1])
    assert relative(joined(together)[:1], joined(alone)) < 1e-5


@pytest.mark.parametrize(("length", "rows_read"), [(1, [3, 3, 12]), (5, [3, 3, 3])], ids=["one scale", "two scales"])
@pytest.mark.parametrize("features", ["model", "accumulated"])
def test_variations_share_a_prefix_and_its_cost(request, features, length, rows_read):
    model = request.getfixturevalue(features)
    codes = draw(model, *EDITS).sequences - TEXT_ROWS
    kwargs = {"num_images_per_prompt": 4, "forced_codes": codes[:, :length], "seed": 7}
    varied = draw(model, *EDITS, **kwargs)
    each = codes.repeat_interleave(4, dim=0)
    assert torch.equal(varied.sequences[:, :length] - TEXT_ROWS, each[:, :length])
    assert len(varied.sequences.unique(dim=0)) == 12
    rows = [row for row in EDITS for _ in range(4)]
    assert relative(joined(varied), forced(model, *rows, sequences=varied.sequences)) < 1e-5
    assert decoder_rows(model, *EDITS, **kwargs) == rows_read
    whole = draw(model, *EDITS, num_images_per_prompt=2, forced_codes=codes)
    assert torch.equal(whole.sequences - TEXT_ROWS, codes.repeat_interleave(2, dim=0))
    rows = [row for row in EDITS for _ in range(2)]
    assert relative(joined(whole), forced(model, *rows, sequences=whole.sequences)) < 1e-5
    alone = draw(model, EDITS[2], num_images_per_prompt=4, forced_codes=codes[2:, :length], seed=7)
    assert torch.equal(alone.sequences, varied.sequences[8:])


@GRIDS
def test_inpainting_keeps_every_code_of_the_region(model, grid):
    schedule = model.model.schedules.by_grid(grid)
    codes = draw(model, *PROMPTS, grid=grid).sequences - TEXT_ROWS
    region = torch.zeros(PATCH * grid[0], PATCH * grid[1], dtype=torch.bool)
    region[: PATCH + 1, :3] = True  # reaches one pixel into the second row of cells
    mask = codes_of_region(region, schedule)
    drawn = draw(model, *PROMPTS, grid=grid, forced_codes=codes, forced_mask=mask, seed=5).sequences - TEXT_ROWS
    assert torch.equal(drawn[:, mask], codes[:, mask]) and not torch.equal(drawn, codes)
    for scale, (h, w) in enumerate(schedule):
        cells = mask[schedule.slice(scale)].view(h, w)
        for row in range(h):
            for column in range(w):
                top, bottom = row * region.shape[0] / h, (row + 1) * region.shape[0] / h
                left, right = column * region.shape[1] / w, (column + 1) * region.shape[1] / w
                assert cells[row, column] == (top < PATCH + 1 and left < 3), (scale, row, column, bottom, right)
    expected = forced(model, *PROMPTS, sequences=drawn + TEXT_ROWS, grid=grid)
    again = draw(model, *PROMPTS, grid=grid, forced_codes=codes, forced_mask=mask.expand(3, -1), seed=5)
    assert relative(joined(again), expected) < 1e-5


@pytest.mark.parametrize(
    "region",
    [
        torch.ones(12, 12),
        *(torch.ones(*size, dtype=torch.bool) for size in ((12, 16), (2, 2), (0, 0), (12,), (1, 12, 12))),
    ],
    ids=lambda region: str(tuple(region.shape)),
)
def test_regions_of_other_pictures_are_refused(model, region):
    with pytest.raises(ValueError, match=r"a region must be bool, .* of the grid \(3, 3\), got torch\."):
        codes_of_region(region, model.model.schedules.by_grid(SQUARE))


def test_a_region_may_be_as_small_as_the_grid(model):
    corner = torch.zeros(SQUARE, dtype=torch.bool)
    corner[0, 0] = True
    codes = codes_of_region(corner, model.model.schedules.by_grid(SQUARE))
    assert codes.nonzero().flatten().tolist() == [0, 1, 5]


@pytest.mark.parametrize("refine", [(), (4,)], ids=["one pass", "two passes"])
def test_regions_stay_with_the_pictures_of_their_prompt(model, refine):
    codes = draw(model, *PROMPTS, seed=9).sequences - TEXT_ROWS
    mask = torch.zeros(3, 14, dtype=torch.bool)
    mask[0, :5], mask[1, [0, 2, 7]], mask[2, 5:] = True, True, True  # whole scales, single codes, all of the last
    kwargs = {"num_images_per_prompt": 2, "refine_top_k": refine}
    drawn = draw(model, *PROMPTS, forced_codes=codes, forced_mask=mask, seed=[5, 6, 7], **kwargs).sequences
    for index, prompt in enumerate(PROMPTS):
        at = slice(index, index + 1)
        alone = draw(model, prompt, forced_codes=codes[at], forced_mask=mask[at], seed=5 + index, **kwargs).sequences
        assert torch.equal(drawn[2 * index : 2 * index + 2], alone)
        assert torch.equal(alone[:, mask[index]] - TEXT_ROWS, codes[at, mask[index]].expand(2, -1))


def test_previews_of_a_shared_prefix(model):
    codes, seen = draw(model, *PROMPTS).sequences - TEXT_ROWS, []
    kwargs = {"num_images_per_prompt": 2, "forced_codes": codes[:, :5], "seed": 7}
    output = draw(model, *PROMPTS, on_scale_end=lambda *scale: seen.append(scale), **kwargs)
    assert [scale[:2] for scale in seen] == [(picture, scale) for scale in range(3) for picture in range(6)]
    for picture, scale, so_far in seen:
        assert torch.equal(so_far, output.sequences[picture, : (1, 5, 14)[scale]] - TEXT_ROWS)


def test_previews(model):
    seen = []
    record = lambda *scale: seen.append(scale)  # noqa: E731
    output = draw(model, *PROMPTS, num_images_per_prompt=2, on_scale_end=record)
    assert torch.equal(output.sequences, draw(model, *PROMPTS, num_images_per_prompt=2).sequences)
    assert [scale[:2] for scale in seen] == [(picture, scale) for scale in range(3) for picture in range(6)]
    for picture, scale, codes in seen:
        assert torch.equal(codes, output.sequences[picture, : (1, 5, 14)[scale]] - TEXT_ROWS)
    vq_model, codes = model.model.vq_model, output.sequences - TEXT_ROWS
    for scale, length in enumerate((1, 5, 14)):
        expected = vq_model.decode_prefix(codes, SQUARE, scale + 1)
        assert torch.equal(model.decode_preview(codes[:, :length], SQUARE), expected)
    assert torch.equal(model.decode_preview(codes[0], SQUARE), vq_model.decode(codes[:1], SQUARE)[0])
    with pytest.raises(ValueError, match=r"have 1, 5, 14 codes, got 4"):
        model.decode_preview(codes[:, :4], SQUARE)


# Images: batches and randomness


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_batch_is_each_prompt_alone(model, guided):
    kwargs = {"guidance_scale": 2.0} if guided else {}
    together = draw(model, *PROMPTS, nulls=NULLS if guided else None, seed=[5, 6, 7], **kwargs).sequences
    for index, prompt in enumerate(PROMPTS):
        nulls = NULLS[index : index + 1] if guided else None
        assert torch.equal(together[index], draw(model, prompt, nulls=nulls, seed=5 + index, **kwargs).sequences[0])


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_several_images_of_a_prompt(model, guided):
    kwargs = {"guidance_scale": 2.0, "nulls": NULLS} if guided else {}
    several = draw(model, *PROMPTS, seed=[5, 6, 7], num_images_per_prompt=3, **kwargs).sequences
    assert len(several) == 9 and len(several.unique(dim=0)) == 9
    assert torch.equal(several[::3], draw(model, *PROMPTS, seed=[5, 6, 7], **kwargs).sequences)
    fewer = draw(model, *PROMPTS, seed=[5, 6, 7], num_images_per_prompt=2, **kwargs).sequences
    assert torch.equal(several.view(3, 3, -1)[:, :2].flatten(0, 1), fewer)


def test_several_images_of_an_edit_see_its_pictures(model):
    output = draw(model, *EDITS, num_images_per_prompt=2)
    rows = [row for row in EDITS for _ in range(2)]
    assert relative(joined(output), forced(model, *rows, sequences=output.sequences)) < 1e-5


def test_edits_of_edits_see_what_was_drawn(model):
    """Each picture is drawn after those before it, given by their codes: as one forward over all of them says."""
    chat, null, drawn = [[10, Picture(SQUARE, 1, last_scale=True)]], [[20, Picture(SQUARE, 1, last_scale=True)]], []
    for turn, grid in enumerate((WIDE, SQUARE, WIDE)):
        chat[0] += [11 + turn]
        options = {"grid": grid, "seed": turn, "guidance_scale": 2.0}
        output = draw(model, [*chat[0], BOI], nulls=[[*null[0], BOI]], **options)
        codes = output.sequences
        conditional, unconditional = (
            forced(model, [*row[0], BOI], sequences=codes, grid=grid) for row in (chat, null)
        )
        assert relative(joined(output), unconditional + 2.0 * (conditional - unconditional)) < 1e-4
        drawn.append(Picture(grid, last_scale=True, codes=codes[0] - TEXT_ROWS))
        for row in (chat, null):
            row[0].append(drawn[-1])
    assert not torch.equal(drawn[0].codes, drawn[2].codes)


def test_one_seed_serves_every_prompt(model):
    output = draw(model, PROMPTS[0], PROMPTS[0], seed=3)
    assert torch.equal(output.sequences[0], output.sequences[1])
    assert torch.equal(output.sequences, draw(model, PROMPTS[0], PROMPTS[0], seed=[3, 3]).sequences)
    assert not torch.equal(output.sequences, draw(model, PROMPTS[0], PROMPTS[0], seed=4).sequences)


def test_generators_repeat_themselves(model):
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    one = [draw(model, *PROMPTS, seed=None, generator=generator(1)).sequences for _ in range(2)]
    assert torch.equal(*one) and len(one[0].unique(dim=0)) == 3
    running = generator(1)
    draw(model, *PROMPTS, seed=None, generator=running)
    assert not torch.equal(draw(model, *PROMPTS, seed=None, generator=running).sequences, one[0])
    listed = draw(model, *PROMPTS, seed=None, generator=[generator(seed) for seed in (5, 6, 7)]).sequences
    assert torch.equal(listed, draw(model, *PROMPTS, seed=[5, 6, 7]).sequences)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_running_generator_goes_on(model, prompts):
    """Whatever the other rows are, the first one takes its numbers, and no call takes those of one before."""
    running, alone = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(2):
        drawn = draw(model, *PROMPTS[:prompts], seed=None, generator=running).sequences
        assert torch.equal(drawn[:1], draw(model, PROMPTS[0], seed=None, generator=alone).sequences)
        assert torch.equal(running.get_state(), alone.get_state())
    again = draw(model, *PROMPTS[:prompts], seed=None, generator=running).sequences
    assert not (again == drawn).all(dim=1).any()


def test_without_a_seed_torchs_global_one_counts(model):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(draw(model, *PROMPTS, seed=None).sequences)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# Sampling


@pytest.mark.parametrize(
    "control",
    [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": [0.0, 0, 0.0]}, {"top_k": [1, 1, 1]}],
    ids=str,
)
def test_greedy_in_every_way(model, control):
    output = draw(model, *PROMPTS, **control)
    assert torch.equal(output.sequences - TEXT_ROWS, joined(output).argmax(-1))


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_controls_are_per_scale(model, name):
    loose, tight = {"temperature": (1.5, 0.0), "top_k": (0, 1), "top_p": (1.0, 1e-6)}[name]
    output = draw(model, *PROMPTS, num_images_per_prompt=4, **{name: [loose, tight, loose]})
    greedy = output.sequences - TEXT_ROWS == joined(output).argmax(-1)
    schedule = model.model.schedules.by_grid(SQUARE)
    assert greedy[:, schedule.slice(1)].all()
    assert not greedy[:, schedule.slice(0)].all() and not greedy[:, schedule.slice(2)].all()


def test_constants_lists_and_ramps_agree(model):
    expected = draw(model, *PROMPTS, temperature=0.8, top_k=5, top_p=0.9).sequences
    listed = draw(model, *PROMPTS, temperature=[0.8] * 3, top_k=[5] * 3, top_p=(0.9, 0.9, 0.9)).sequences
    ramps = {"temperature": LinearRamp(0.8, 0.8), "top_k": LinearRamp(5, 5), "top_p": LinearRamp(0.9, 0.9)}
    assert torch.equal(listed, expected)
    assert torch.equal(draw(model, *PROMPTS, **ramps).sequences, expected)


def test_a_ramp_is_linear_over_the_scales():
    assert per_scale("s", LinearRamp(1.0, 7.0), 4, 0.0) == [1.0, 3.0, 5.0, 7.0]
    assert per_scale("s", LinearRamp(2.0, 7.0), 1, 0.0) == [2.0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 6), (3, 1.0, 3), (0, 0.5, None), (4, 0.6, None)])
def test_codes_are_drawn_as_often_as_the_softmax_says(temperature, top_k, top_p, kept):
    draws, logits = 40_000, torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.6])
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    likeliest = order[: top_k or None]
    masses = probabilities[likeliest] / probabilities[likeliest].sum()
    if kept is None:
        kept = int((masses.cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros(6)
    expected[likeliest[:kept]] = masses[:kept] / masses[:kept].sum()
    uniform = torch.rand(1, draws, generator=torch.Generator().manual_seed(0))
    codes = sample(logits.expand(1, draws, 6), temperature, top_k, top_p, uniform)
    frequencies = codes[0].bincount(minlength=6) / draws
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((frequencies - expected).abs() <= 4.5 * deviation).all()
    assert (frequencies > 0).sum() == kept


def test_the_largest_number_draws_from_the_kept_set():
    """1 - 2^-24, the last float32 below 1, after which rounding must not reach the next code."""
    logits = 3 * torch.randn(4000, 1, 200, generator=torch.Generator().manual_seed(0))
    for top_p in (0.3, 0.6, 0.9):
        codes = sample(logits, 1.0, 0, top_p, torch.full((4000, 1), 1 - 2**-24))
        ordered = logits.softmax(-1).sort(descending=True)
        kept = (ordered.values.cumsum(-1) - ordered.values < top_p).sum(-1)
        rank = (ordered.indices == codes[..., None]).int().argmax(-1)
        assert (rank < kept).all()


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_no_number_draws_what_cannot_be(top_p):
    logits = 3 * torch.randn(4000, 1, 200, generator=torch.Generator().manual_seed(0))
    logits[..., :50] = logits[..., 150:] = -torch.inf
    for number in (0.0, 1 - 2**-24):
        codes = sample(logits, 1.0, 0, top_p, torch.full((4000, 1), number))
        assert ((codes >= 50) & (codes < 150)).all()


def test_a_seed_of_32_bits_is_torchs():
    for seed in (0, 7, 2**32 - 1):
        (own,) = RowGenerators.create(1, 1, seed=seed).generators
        assert own.initial_seed() == seed


def test_streams_of_rows_do_not_depend_on_their_neighbours():
    both = RowGenerators.create(2, 2, seed=[1, 2])
    alone = RowGenerators.create(1, 2, seed=2)
    for length in (1, 4):
        drawn = both.uniform(length, torch.device("cpu"))
        assert torch.equal(drawn[2:], alone.uniform(length, torch.device("cpu")))
        assert len(drawn.unique(dim=0)) == 4


# Sizes and defaults


def test_sizes_by_ratio_or_by_pixels(model):
    inputs = batch_of(model, [10, BOI])
    for size, codes in (
        ({"aspect_ratio": "1:1", "level": "12"}, 14),
        ({"aspect_ratio": "2:1"}, 11),
        ({"level": 12}, 14),
        ({"height": 8, "width": 16}, 11),
        ({"height": 12, "width": 12}, 14),
    ):
        output = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, **size)
        assert output.shape == (1, codes)
        assert TEXT_ROWS <= output.min() and output.max() < TEXT_ROWS + CODES


def test_defaults_are_the_configs(tmp_path):
    defaults = {"guidance_scale": 1.0, "temperature": 0.0, "aspect_ratio": "2:1", "num_images_per_prompt": 2}
    model = tiny_model(tiny_config(image_generation=defaults))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = batch_of(model, [10, BOI])
    output = again.generate(**inputs, generation_mode="image")
    assert output.shape == (2, 11) and torch.equal(output[0], output[1])
    greedy = draw(model, [10, BOI], grid=WIDE, temperature=0.0, num_images_per_prompt=1)
    assert torch.equal(output[:1], greedy.sequences)


def test_one_scale_images():
    model = tiny_model(tiny_config(vq={"scale_schedules": [[[1, 1]]], "levels": {"4": 1}}))
    output = draw(model, *PROMPTS, nulls=NULLS, guidance_scale=2.0)
    assert output.sequences.shape == (3, 1) and len(output.logits) == 1
    prompt = [shown((1, 1), 1), 10, BOI]
    plain = draw(model, prompt)
    assert relative(joined(plain), forced(model, prompt, sequences=plain.sequences, grid=(1, 1))) < 1e-5


@GRIDS
def test_decoded_pictures(model, grid):
    output = draw(model, *PROMPTS, grid=grid)
    expected = model.model.vq_model.decode(output.sequences - TEXT_ROWS, grid)
    assert expected.shape == (3, 3, PATCH * grid[0], PATCH * grid[1])
    for named in (output.image_grid_hw, list(grid), None):
        assert torch.equal(model.decode_image_tokens(output.sequences, named), expected)


def test_ambiguous_pictures_must_be_named():
    rows = [[[1, 1], [1, 2], [2, 4]], [[1, 1], [2, 1], [4, 2]]]
    model = tiny_model(tiny_config(vq={"scale_schedules": rows}))
    tokens = torch.full((2, 11), TEXT_ROWS)
    with pytest.raises(ValueError, match=r"11 codes fit 2 schedules .*name one by image_grid_hw"):
        model.decode_image_tokens(tokens)
    assert model.decode_image_tokens(tokens, [4, 2]).shape == (2, 3, 16, 8)
    with pytest.raises(ValueError, match="one grid at a time"):
        model.decode_image_tokens(tokens, torch.tensor([[4, 2], [2, 4]]))
    with pytest.raises(ValueError, match="12 codes fit 0 schedules"):
        model.decode_image_tokens(torch.full((1, 12), TEXT_ROWS))


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation_mode": "video"}, "generation_mode must be .* got 'video'"),
        ({"guidance_scale": 2.0, "negative_input_ids": torch.tensor([[BOI], [BOI]])}, "must have 1 rows, got 2"),
        ({"guidance_scale": float("nan")}, "guidance_scale must .* got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number of at least 0.0, got inf"),
        ({"guidance_scale": LinearRamp(1.0, float("inf"))}, "guidance_scale must"),
        ({"guidance_scale": -1.0}, r"guidance_scale must .* got -1\.0"),
        ({"guidance_scale": [1.0, 1.0]}, "guidance_scale must have one value for each of the 3 scales, got 2"),
        ({"guidance_scale": "high"}, "guidance_scale must .* got 'high'"),
        ({"temperature": -0.1}, r"temperature must .* got -0\.1"),
        ({"temperature": [1.0, float("inf"), 1.0]}, "temperature must .* got inf"),
        ({"top_p": 0.0}, r"top_p must .* got 0\.0"),
        ({"top_p": 1.5}, r"top_p must .* got 1\.5"),
        ({"top_k": -1}, "top_k must .* got -1"),
        ({"top_k": 2.5}, r"top_k must be an integer of at least 0, got 2\.5"),
        ({"top_k": [1, 1, 1, 1]}, "top_k must have one value for each of the 3 scales, got 4"),
        ({"image_guidance_scale": -1.0}, r"image_guidance_scale must .* got -1\.0"),
        ({"guidance_scale": {"start": "3", "end": 1.0}}, "guidance_scale must be a number of at least 0.0, got '3'"),
        ({"top_p": LinearRamp(0.5, None)}, r"top_p must be a number in \[1e-06, 1.0\], got None"),
        ({"temperature": LinearRamp(10**400, 1)}, "temperature must be a number of at least 0.0, got 10000"),
        ({"guidance_scale": ScaleInterval(3.0, 0.5, 1)}, "first of an interval of scales must be an integer, got 0.5"),
        ({"guidance_scale": ScaleInterval(3.0, -1, 1)}, "first of an interval of scales must be at least 0, got -1"),
        ({"guidance_scale": ScaleInterval(3.0, 0, "1")}, "last of an interval of scales must be an integer, got '1'"),
        ({"top_k": True}, "top_k must be an integer of at least 0, got True"),
        ({"attention_mask": [[1, 1]]}, "the attention mask of input_ids must be a tensor, got list"),
        (
            {"forced_codes": torch.zeros(1, 1, dtype=torch.long), "forced_mask": [[True]]},
            "forced_mask must be a tensor",
        ),
        ({"refine_top_k": [-1]}, "refine_top_k must be an integer of at least 0, got -1"),
        ({"forced_codes": torch.zeros(2, 5, dtype=torch.long)}, r"shape \(1, codes\), got \(2, 5\)"),
        ({"forced_codes": torch.zeros(0, 5, dtype=torch.long)}, r"shape \(1, codes\), got \(0, 5\)"),
        ({"forced_codes": torch.zeros(1, 6, dtype=torch.long)}, "have 1, 5, 14 codes, got 6"),
        ({"forced_codes": torch.full((1, 5), TEXT_ROWS)}, r"in \[0, 24\), got 48 to 48; .* without the text rows"),
        ({"forced_mask": torch.ones(1, 5, dtype=torch.bool)}, "forced_mask needs forced_codes"),
        (
            {"forced_codes": torch.zeros(1, 5, dtype=torch.long), "forced_mask": torch.ones(5)},
            r"bool of the shape \(1, 5\), got torch.float32 \(5,\)",
        ),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"aspect_ratio": "3:1", "exact_size": True}, r"no scale schedule has the aspect ratio 3:1 .* nearest: 2:1"),
        ({"aspect_ratio": "wide"}, "aspect_ratio must read"),
        ({"level": "256"}, "level must be one of 12, got 256"),
        ({"height": 12, "width": 16, "exact_size": True}, "no scale schedule for an image of 12x16 .* nearest: 12x12"),
        ({"height": 12}, "give height and width both, got 12 and None"),
        ({"height": 12, "width": 12, "level": "12"}, "give aspect_ratio and level, or height and width"),
        ({"seed": 1, "generator": torch.Generator()}, "either seed or generator, not both"),
        ({"seed": [1, 2]}, "one for each of the 1 prompts, got 2"),
        ({"seed": []}, "one for each of the 1 prompts, got 0"),
        ({"generator": [torch.Generator()] * 2}, "one for each of 1 pictures, got 2"),
        ({"generator": []}, "one for each of 1 pictures, got 0"),
        ({"image_grid_hw": torch.tensor([SQUARE])}, "hold 0 finished images, image_grid_hw has 1"),
        ({"image_codes": torch.zeros(14, dtype=torch.long)}, "image_codes must hold 0 rows"),
        ({"pixel_values": torch.zeros(9, 48)}, "pixel_values must hold 0 rows"),
        ({"past_key_values": DynamicCache()}, "does not know the arguments past_key_values"),
        ({"min_p": 0.1, "typical_p": 0.9}, "does not know the arguments min_p, typical_p"),
        ({"output_hidden_states": True}, "does not know the arguments output_hidden_states"),
    ],
)
def test_wrong_requests_are_refused(model, change, message):
    request = {"input_ids": torch.tensor([[10, BOI]]), "generation_mode": "image", "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        model.generate(**request | change)


def test_prompts_and_grids_must_match_in_number(model):
    inputs = batch_of(model, *EDITS)
    with pytest.raises(ValueError, match="hold 3 finished images, image_grid_hw has 2"):
        model.generate(
            **inputs | {"image_grid_hw": inputs["image_grid_hw"][:2]}, generation_mode="image", guidance_scale=1.0
        )


def test_each_prompt_has_a_null_prompt(model):
    for rows in (1, 3):
        nulls = {"negative_input_ids": torch.full((rows, 1), BOI), "guidance_scale": 2.0}
        with pytest.raises(ValueError, match=f"negative_input_ids must have 2 rows, got {rows}"):
            model.generate(torch.tensor([[10, BOI], [11, BOI]]), generation_mode="image", **nulls)


def test_null_prompts_must_hold_the_same_images(model):
    one, two = shown(SQUARE, 1), shown(SQUARE, 2)
    for nulls in ([[BOI], [BOI]], [[one, two, BOI], [BOI]]):
        with pytest.raises(ValueError, match="null prompts must hold the images of their prompts"):
            draw(model, [10, one, BOI], [11, two, BOI], nulls=nulls, guidance_scale=2.0)
