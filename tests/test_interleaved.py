"""Answers of text and pictures: equal to one forward, to image mode, to each row alone, to a run without a cache."""

import pytest
import torch
from tiny_models import (
    BOI,
    EOI,
    EOS,
    IMAGE,
    PAD,
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
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_nextflow import NextFlowInterleavedOutput

PROMPTS = [[10, Picture(SQUARE, 1), 11], [12, 13, 14, 15], [Picture(WIDE, 2), Picture(SQUARE, 3), 16]]
NULLS = [[20, Picture(SQUARE, 1)], [20, 21], [Picture(WIDE, 2), Picture(SQUARE, 3), 20, 21, 22]]
NEXT, NEXT_NULL = [[30, 31, 32], [33], [34, 35]], [[20], [20, 21], [20]]
OFTEN = {"sequence_bias": {(BOI,): 3.0, (EOS,): -1.0}}  # a picture every few words
PLAIN, GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 2.0, "image_guidance_scale": [1.5, 1.0, 2.0]}
BY_GUIDANCE = pytest.mark.parametrize(
    "image_generation", [PLAIN, {"guidance_scale": [3.0, 2.0, 1.0]}, GUIDED], ids=["plain", "guided", "by images"]
)


@pytest.fixture(scope="module")
def model():
    """Reads pictures without their last scale."""
    return tiny_model(tiny_config(condition_last_scale=False))


@pytest.fixture(scope="module")
def reading():
    """Reads pictures with their last scale."""
    return tiny_model(seed=2)


def with_nulls(model, rows, nulls) -> dict:
    inputs, negative = batch_of(model, *rows), batch_of(model, *nulls)
    return inputs | {"negative_" + name: negative[name] for name in ("input_ids", "attention_mask")}


def answer(model, inputs: dict, image_generation=PLAIN, **kwargs) -> NextFlowInterleavedOutput:
    kwargs = {"seed": 0, "max_new_tokens": 12, "do_sample": True, "output_logits": True, **OFTEN} | kwargs
    image_generation = {"aspect_ratio": "2:1"} | image_generation
    return model.generate(**inputs, generation_mode="interleaved", image_generation=image_generation, **kwargs)


def pieces(output: NextFlowInterleavedOutput, row: int) -> list:
    """A row without padding, pictures as `Picture`."""
    before = (output.sequences[:row] == BOI).sum() if row else 0
    ids = output.sequences[row][output.attention_mask[row].bool()].tolist()
    grids = [tuple(grid) for grid in output.image_grid_hw.tolist()]
    lengths = [{SQUARE: 14, WIDE: 11}[grid] for grid in grids]
    codes, parts, index = output.image_codes.split(lengths), [], int(before)
    for token in ids:
        if token == BOI:
            parts.append(Picture(grids[index], codes=codes[index]))
            index += 1
        elif token not in (IMAGE, EOI):
            parts.append(token)
    return parts


def last_scales(rows: list, model) -> list:
    keep = model.config.condition_last_scale
    return [[p._replace(last_scale=keep) if isinstance(p, Picture) else p for p in row] for row in rows]


@pytest.mark.parametrize("name", ["model", "reading"])
def test_every_step_is_that_of_one_forward(request, name):
    model = request.getfixturevalue(name)
    output = answer(model, batch_of(model, *last_scales(PROMPTS, model)))
    again = {"input_ids": output.sequences, "attention_mask": output.attention_mask}
    with torch.no_grad():
        logits = model(**again, image_grid_hw=output.image_grid_hw, image_codes=output.image_codes).logits
    drawn = 0
    for row, steps in enumerate(output.logits):
        kept = output.attention_mask[row].bool()
        start = int(kept[: output.prompt_length].sum())
        ids, of_row = output.sequences[row][kept].tolist(), logits[row][kept]
        column, steps = start - 1, list(steps)
        while steps:
            step = steps.pop(0)
            assert relative(step[0], of_row[column, :TEXT_ROWS]) < 1e-5
            column += 1
            if ids[column] == BOI:
                drawn += 1
                scales = torch.cat([steps.pop(0) for _ in range(3)])
                assert relative(scales, of_row[column : column + 11, TEXT_ROWS:]) < 1e-5
                column = ids.index(EOI, column)
        assert column == len(ids) - 1
    assert drawn >= 4
    assert {EOI, IMAGE}.isdisjoint(token for row in range(3) for token in pieces(output, row))


def test_without_pictures_it_is_text_generation(model):
    inputs = batch_of(model, *PROMPTS)
    kwargs = {"max_new_tokens": 9, "repetition_penalty": 1.3, "min_new_tokens": 5, "no_repeat_ngram_size": 2}
    ours = answer(model, inputs, max_new_images=0, do_sample=False, **kwargs)
    expected = model.generate(**inputs, suppress_tokens=[BOI, EOI, IMAGE], **kwargs, **OFTEN)
    assert torch.equal(ours.sequences, expected[:, : ours.sequences.shape[1]])
    assert (expected[:, ours.sequences.shape[1] :] == PAD).all()
    assert ours.sequences.shape[1] - ours.prompt_length >= 5


def test_penalties_of_prompts_are_those_of_text_generation(model):
    inputs, kwargs = batch_of(model, PROMPTS[0]), {"encoder_repetition_penalty": 50.0, "max_new_tokens": 9}
    ours = answer(model, inputs, max_new_images=0, do_sample=False, **kwargs)
    assert torch.equal(ours.sequences, model.generate(**inputs, **kwargs, **OFTEN))


@BY_GUIDANCE
def test_pictures_are_those_of_image_mode(model, image_generation):
    """Text is greedy, so that only pictures draw random numbers: the first picture of a row is that of image mode."""
    inputs = with_nulls(model, PROMPTS, NULLS)
    output = answer(model, inputs, image_generation, do_sample=False, max_new_images=2)
    drawn = 0
    for row, (prompt, null) in enumerate(zip(PROMPTS, NULLS)):
        parts = pieces(output, row)
        at = [index for index, part in enumerate(parts) if isinstance(part, Picture) and index >= len(prompt)]
        earlier = []
        for place in at:
            rows = with_nulls(model, [[*parts[:place], BOI]], [[*null, *earlier, BOI]])
            controls = {"aspect_ratio": "2:1", "output_logits": True, "return_dict_in_generate": True, "seed": 0}
            alone = model.generate(
                **rows,
                generation_mode="image",
                **controls,
                forced_codes=parts[place].codes[None] if earlier else None,
                **image_generation,
            )
            steps = [step for step in output.logits[row] if step.shape[-1] != TEXT_ROWS][3 * len(earlier) :][:3]
            assert torch.equal(alone.sequences[0] - TEXT_ROWS, parts[place].codes)
            assert relative(torch.cat(steps), torch.cat(alone.logits, dim=1)[0]) < 1e-5
            earlier.append(parts[place])
            drawn += 1
    assert drawn >= 4


def test_a_picture_of_further_passes_is_read_as_first_predicted(model):
    """Its codes are those of image mode; what follows it is predicted as in one forward."""
    controls, inputs = {"guidance_scale": 3.0, "refine_top_k": (4,)}, with_nulls(model, PROMPTS, NULLS)
    at_once = {"sequence_bias": {(BOI,): 100.0, (EOS,): -100.0}}  # a picture first, then text
    output = answer(model, inputs, controls, do_sample=False, max_new_images=1, **at_once)
    again = {name: output[name] for name in ("attention_mask", "image_grid_hw", "image_codes")}
    with torch.no_grad():
        logits = model(input_ids=output.sequences, **again).logits
    for row, (prompt, null) in enumerate(zip(PROMPTS, NULLS)):
        parts = pieces(output, row)
        (place,) = (index for index, part in enumerate(parts) if isinstance(part, Picture) and index >= len(prompt))
        rows = with_nulls(model, [[*parts[:place], BOI]], [[*null, BOI]])
        alone = model.generate(**rows, generation_mode="image", aspect_ratio="2:1", seed=0, **controls)
        assert torch.equal(alone[0] - TEXT_ROWS, parts[place].codes)
        assert place == len(prompt) and len(parts) > place + 4, "text must follow"
        last = logits[row][output.attention_mask[row].bool()][-2, :TEXT_ROWS]
        assert relative(output.logits[row][-1][0], last) < 1e-5


@pytest.mark.parametrize("image_generation", [{"guidance_scale": 2.0}, GUIDED], ids=["guided", "by images"])
def test_nothing_may_be_left_of_a_null_prompt(model, image_generation):
    """Of ids without a template: the pictures of image mode, and of a next turn with and without what was read."""
    prompts = [[10, 11], [12, Picture(WIDE, 2), 13]]
    bias = {"sequence_bias": {(BOI,): 50.0}, "max_new_tokens": 4, "max_new_images": 1, "do_sample": False}
    output = answer(model, batch_of(model, *prompts), image_generation, **bias)
    controls = {"aspect_ratio": "2:1", "output_logits": True, "return_dict_in_generate": True, "seed": 0}
    for row, prompt in enumerate(prompts):
        inputs = batch_of(model, [*prompt, BOI])
        drawn = model.generate(**inputs, generation_mode="image", **controls, **image_generation)
        steps = output.logits[row][1:4]
        assert all(relative(mine, scale[0]) < 1e-5 for mine, scale in zip(steps, drawn.logits, strict=True))
    inputs = model.next_turn(output, **with_nulls(model, [[30], [31, Picture(WIDE, 3)]], [[20], [Picture(WIDE, 3)]]))
    cached = answer(model, inputs, image_generation, **bias)
    anew = answer(model, inputs | {"contexts": None}, image_generation, **bias)
    assert torch.equal(cached.image_codes, anew.image_codes) and len(cached.image_grid_hw) == 6
    for mine, others in zip(cached.logits, anew.logits):
        assert all(relative(one, other) < 1e-5 for one, other in zip(mine, others, strict=True))


@BY_GUIDANCE
def test_a_batch_is_each_prompt_alone(model, image_generation):
    inputs = with_nulls(model, PROMPTS, NULLS)
    together = answer(model, inputs, image_generation, seed=[5, 6, 7], max_new_tokens=14)
    counts = []
    for row, (prompt, null) in enumerate(zip(PROMPTS, NULLS)):
        alone = answer(model, with_nulls(model, [prompt], [null]), image_generation, seed=5 + row, max_new_tokens=14)
        expected, got = pieces(alone, 0), pieces(together, row)
        assert [p for p in got if not isinstance(p, Picture)] == [p for p in expected if not isinstance(p, Picture)]
        for mine, other in zip(got, expected):
            assert not isinstance(mine, Picture) or torch.equal(mine.codes, other.codes)
        assert len(together.logits[row]) == len(alone.logits[0])
        assert all(relative(mine, other) < 1e-5 for mine, other in zip(together.logits[row], alone.logits[0]))
        counts.append(len(got))
    assert len(set(counts)) > 1, "rows must be at different stages"


def forwarded(model, call):
    """What `call` returns, and how many tokens went through the decoder."""
    counted = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    output = call()
    hook.remove()
    return output, sum(counted), counted


@pytest.mark.parametrize("name", ["model", "reading"])
@BY_GUIDANCE
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_a_second_turn_reads_only_what_is_new(request, name, image_generation, batched):
    model = request.getfixturevalue(name)
    rows = slice(None) if batched else slice(0, 1)
    prompts, nulls = (last_scales(each[rows], model) for each in (PROMPTS, NULLS))
    first = answer(model, with_nulls(model, prompts, nulls), image_generation)
    assert len(first.image_grid_hw) > sum(isinstance(p, Picture) for row in prompts for p in row)
    new_picture = Picture(SQUARE, 9, last_scale=model.config.condition_last_scale)
    following = [[*NEXT[0], new_picture, 36], *NEXT[1:]][rows]
    inputs = with_nulls(model, following, [[*NEXT_NULL[0], new_picture], *NEXT_NULL[1:]][rows])
    inputs = model.next_turn(first, **inputs)
    cache = inputs.pop("contexts")
    held = [len(ids) for ids in cache.token_ids]
    whole, all_tokens, _ = forwarded(model, lambda: answer(model, inputs, image_generation, seed=1))
    cached, new_tokens, counted = forwarded(
        model, lambda: answer(model, inputs | {"contexts": cache}, image_generation, seed=1)
    )
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.equal(cached.image_codes, whole.image_codes)
    for mine, others in zip(cached.logits, whole.logits):
        assert all(relative(one, other) < 1e-5 for one, other in zip(mine, others))
    if not batched and image_generation == PLAIN:
        assert all_tokens - new_tokens == held[0]
    assert new_tokens < all_tokens - sum(held) / 2
    if image_generation == GUIDED:
        assert len(held) == 3 * len(prompts)


@BY_GUIDANCE
def test_six_turns_over_one_cache(reading, image_generation):
    """As if all was run again in each turn."""
    inputs = with_nulls(reading, *(last_scales(each[:2], reading) for each in (PROMPTS, NULLS)))
    one_picture = {"max_new_tokens": 4, "max_new_images": 1, "sequence_bias": {(BOI,): 6.0, (EOS,): -1.0}}
    for turn in range(6):
        cached = answer(reading, inputs, image_generation, seed=turn, **one_picture)
        anew = {name: value for name, value in inputs.items() if name != "contexts"}
        whole = answer(reading, anew, image_generation, seed=turn, **one_picture)
        assert torch.equal(cached.sequences, whole.sequences) and torch.equal(cached.image_codes, whole.image_codes)
        for mine, others in zip(cached.logits, whole.logits):
            assert all(relative(one, other) < 1e-4 for one, other in zip(mine, others))
        new = with_nulls(reading, [[30 + turn, 31], [32]], [[20], [20, 21]])
        inputs = reading.next_turn(cached, **new)
    assert len(cached.image_grid_hw) > 1 + 6


def test_a_next_turn_is_the_turn_before_and_the_new_messages(model):
    first = answer(model, with_nulls(model, PROMPTS, NULLS), GUIDED)
    following = [[30, Picture(SQUARE, 9), 31], [33], [Picture(WIDE, 8), Picture(SQUARE, 7), 34]]
    nulls = [[Picture(SQUARE, 9)], [20, 21], [Picture(WIDE, 8), Picture(SQUARE, 7), 20]]
    new = with_nulls(model, following, nulls)
    inputs = model.next_turn(first, **new)
    names = "attention_mask", "image_grid_hw", "image_codes"
    both = NextFlowInterleavedOutput(inputs["input_ids"], *(inputs[name] for name in names))
    told = lambda parts: [(p.grid, codes_of(model, p).tolist()) if isinstance(p, Picture) else p for p in parts]  # noqa: E731
    for row, parts in enumerate(following):
        assert told(pieces(both, row)) == told(pieces(first, row) + parts)
    read = lambda ids, mask: [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]  # noqa: E731
    names = "negative_input_ids", "negative_attention_mask"
    before = read(first.negative_sequences, first.negative_attention_mask)
    together, after = (read(*(each[name] for name in names)) for each in (inputs, new))
    assert together == [old + ids for old, ids in zip(before, after)]


def test_new_messages_that_do_not_fit_the_turn_before_are_refused(model):
    first = answer(model, with_nulls(model, [[10], [11]], [[20], [21]]), GUIDED, max_new_images=0)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"the new messages must have 2 rows, got {rows}"):
            model.next_turn(first, torch.full((rows, 2), 12))
    with pytest.raises(ValueError, match="the turn before was guided: the new messages need negative_input_ids"):
        model.next_turn(first, torch.full((2, 2), 12))


def test_processors_and_criteria_see_each_row_alone(model):
    seen, judged = [], []

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores):
            judged.append(input_ids[0].tolist())
            return torch.zeros(1, dtype=torch.bool)

    inputs = batch_of(model, *PROMPTS)
    processors, criteria = LogitsProcessorList([Processor()]), StoppingCriteriaList([Criterion()])
    output = answer(model, inputs, logits_processor=processors, stopping_criteria=criteria)
    assert (output.image_grid_hw == torch.tensor(WIDE)).all(dim=1).sum() >= 4
    before, after = [], []
    for row, kept in zip(output.sequences, output.attention_mask.bool()):
        start = output.prompt_length
        prompt, reply = row[:start][kept[:start]].tolist(), row[start:][kept[start:]].tolist()
        text = prompt + [token for token in reply if token not in (IMAGE, EOI)]
        before += [text[:length] for length in range(len(prompt), len(text))]
        judgeable = min(len(text), len(prompt) + 11)  # the twelfth token is the last whatever criteria say
        after += [text[:length] for length in range(len(prompt) + 1, judgeable + 1)]
    assert sorted(seen) == sorted(before) and sorted(judged) == sorted(after)


class Recorder(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamed_is_plain(model):
    inputs = batch_of(model, PROMPTS[0])
    plain = answer(model, inputs)
    streamer, scales = Recorder(), []
    streamed = answer(model, inputs, streamer=streamer, on_scale_end=lambda *scale: scales.append(scale))
    assert torch.equal(streamed.sequences, plain.sequences) and torch.equal(streamed.image_codes, plain.image_codes)
    prompt, *tokens = streamer.ids
    assert prompt == inputs["input_ids"][0].tolist() and streamer.ended
    text = plain.sequences[0, plain.prompt_length :]
    assert [token for put in tokens for token in put] == text[text != IMAGE].tolist()
    codes = plain.image_codes[14:].split(11)  # after the prompt's picture
    assert len(codes) >= 1 and len(scales) == 3 * len(codes)
    for index, (row, scale, so_far) in enumerate(scales):
        assert (row, scale) == (0, index % 3)
        assert torch.equal(so_far, codes[index // 3][: (1, 3, 11)[scale]])


def test_a_last_token_can_be_forced(model):
    output = answer(model, batch_of(model, *PROMPTS), forced_eos_token_id=EOS)
    for row in range(len(PROMPTS)):
        *_, before, last = output.sequences[row][output.attention_mask[row].bool()].tolist()
        assert last == EOS and before != EOS


def test_a_batch_has_a_streamer_for_each_row(model):
    inputs = batch_of(model, *PROMPTS)
    first, last = Recorder(), Recorder()
    output = answer(model, inputs, streamer=[first, None, last])
    for row, streamer in ((0, first), (2, last)):
        text = output.sequences[row, output.prompt_length :][output.attention_mask[row, output.prompt_length :].bool()]
        assert [token for put in streamer.ids[1:] for token in put] == text[text != IMAGE].tolist()
        assert streamer.ids[0] == inputs["input_ids"][row].tolist() and streamer.ended


def test_scales_of_a_batch_name_their_rows(model):
    scales = {}
    output = answer(
        model,
        batch_of(model, *PROMPTS),
        on_scale_end=lambda row, scale, codes: scales.setdefault((row, scale), []).append(codes),
    )
    for row, prompt in enumerate(PROMPTS):
        pictures = [part for part in pieces(output, row)[len(prompt) :] if isinstance(part, Picture)]
        drawn = scales.get((row, 2), [])
        assert len(drawn) == len(pictures)
        assert all(torch.equal(one, other.codes) for one, other in zip(drawn, pictures))


def test_limits(model):
    inputs = batch_of(model, *PROMPTS)
    none = answer(model, inputs, max_new_images=0, max_length=None)
    assert (none.sequences[:, none.prompt_length :] != BOI).all()
    one = answer(model, inputs, max_new_images=1)
    assert ((one.sequences[:, one.prompt_length :] == BOI).sum(dim=1) <= 1).all()
    short = answer(model, inputs, max_new_tokens=1, sequence_bias={(BOI,): 100.0})
    assert torch.equal(short.sequences[:, -12:], torch.tensor([[BOI, *[IMAGE] * 10, EOI]]).expand(3, -1))
    ended = answer(model, inputs, sequence_bias={(EOS,): 100.0})
    assert ended.sequences[:, ended.prompt_length :].tolist() == [[EOS]] * 3
    assert answer(model, batch_of(model, [10, 11]), max_new_images=0).image_grid_hw.shape == (0, 2)


def test_decoded_pictures_are_in_order(model):
    output = answer(model, batch_of(model, *PROMPTS))
    pictures = model.decode_images(output.image_codes, output.image_grid_hw)
    lengths = [{SQUARE: 14, WIDE: 11}[tuple(grid)] for grid in output.image_grid_hw.tolist()]
    for picture, codes, grid in zip(pictures, output.image_codes.split(lengths), output.image_grid_hw.tolist()):
        assert torch.allclose(picture, model.model.vq_model.decode(codes[None], grid)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 9}, "bounded by max_new_tokens and max_new_images"),
        ({"num_beams": 2}, "one answer for each prompt, got beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "one answer for each prompt, got contrastive_search"),
        ({"dola_layers": "low"}, "one answer for each prompt, got dola_generation"),
        ({"force_words_ids": [[20]]}, "one answer for each prompt, got constrained_beam_search"),
        ({"output_scores": True}, "does not know the arguments output_scores"),
        ({"token_healing": True}, "does not know the arguments token_healing"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"colour": "red"}, "does not know the arguments colour"),
        ({"image_generation": {"colour": "red"}}, "controls of pictures do not include colour"),
        ({"max_new_images": -1}, "max_new_images must be at least 0, got -1"),
        (
            {"contexts": NextFlowInterleavedOutput()},
            "contexts must be those of an interleaved output, got NextFlowInter",
        ),
        ({"input_ids": torch.tensor([[10, BOI]])}, "must not end in <boi>"),
        (
            {"negative_input_ids": torch.tensor([[10, BOI]]), "image_generation": {"guidance_scale": 2.0}},
            "and their null prompts, must not end in <boi>",
        ),
        (
            {"input_ids": torch.tensor([[10], [11]]), "streamer": Recorder()},
            "a streamer follows one prompt, got 1 for 2",
        ),
        ({"image_grid_hw": torch.tensor([SQUARE])}, "hold 0 finished images, image_grid_hw has 1"),
    ],
)
def test_wrong_requests_are_refused(model, change, message):
    request = {"input_ids": torch.tensor([[10, 11]]), "image_generation": PLAIN, "generation_mode": "interleaved"}
    with pytest.raises(ValueError, match=message):
        model.generate(**request | change)


def test_a_cache_must_hold_the_beginning_of_the_rows(model):
    first = answer(model, batch_of(model, [10, 11]), max_new_images=0)
    inputs = model.next_turn(first, **batch_of(model, [12]))
    changed = inputs | {"input_ids": inputs["input_ids"].clone().fill_(10)}
    with pytest.raises(ValueError, match="row 0 must begin with the .* tokens that contexts hold"):
        answer(model, changed)
    with pytest.raises(ValueError, match="over 2 rows .*, got 1"):
        answer(
            model,
            with_nulls(model, [[10, 11, 12]], [[20]]) | {"contexts": first.contexts},
            GUIDED | {"image_guidance_scale": 1.0},
        )


def test_a_chat_goes_on(tiny_model, tiny_processor):
    """Chats to answers, and a second turn that reads as the whole chat rendered at once."""
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": "draw a red circle"}]}],
        [{"role": "user", "content": "a blue square"}],
    ]
    often = {"sequence_bias": {(tiny_model.config.boi_token_id,): 3.0}, "do_sample": True, "seed": 0}
    inputs = tiny_processor.apply_chat_template(chats, generation_mode="interleaved")
    tokenizer = tiny_processor.tokenizer
    nulls = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*list(inputs.values())[2:])]
    assert nulls == ["<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"] * 2
    output = tiny_model.generate(**inputs, generation_mode="interleaved", max_new_tokens=12, **often)
    pictures = tiny_model.decode_images(output.image_codes, output.image_grid_hw)
    answers = tiny_processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=pictures)
    drawn = [part for answer in answers for part in answer if not isinstance(part, str)]
    for part, pixels in zip(drawn, pictures, strict=True):
        assert part.tobytes() == tiny_processor.post_process_image(pixels[None])[0].tobytes()
    assert len(drawn) >= 2

    turn = [[{"role": "user", "content": "another"}]] * 2
    following = tiny_model.next_turn(output, **tiny_processor.apply_next_turn(output, turn))
    for row, (ids, mask) in enumerate(zip(following["input_ids"], following["attention_mask"].bool())):
        first = tokenizer.decode(output.sequences[row][output.attention_mask[row].bool()])
        end = "" if first.endswith("<|im_end|>") else "<|im_end|>"
        expected = f"{first}{end}\n<|im_start|>user\nanother<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids[mask]) == expected
    second = tiny_model.generate(**following, generation_mode="interleaved", max_new_tokens=5, **often)
    assert (second.sequences[:, : following["input_ids"].shape[1]] == following["input_ids"]).all()
    for rows, messages in ((1, turn[0]), (3, [*turn, turn[0]])):
        with pytest.raises(ValueError, match=f"has 2 rows, got {rows}"):
            tiny_processor.apply_next_turn(output, messages)
    for given in ((), [*pictures, pictures[0]]):
        with pytest.raises(ValueError, match=f"holds {len(pictures)} pictures, got {len(given)}"):
            tiny_processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=given)
