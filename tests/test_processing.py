"""Texts with pictures and chats to model inputs, and outputs back."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, pipeline

from transformers_nextflow import NextFlowImageProcessor, NextFlowInterleavedOutput, NextFlowProcessor
from transformers_nextflow.cli import main
from transformers_nextflow.layout import find_images

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SLOTS = {(3, 3): 4 + 9, (2, 4): 4 + 8, (4, 2): 4 + 8}


def picture(height: int = 24, width: int = 24, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*content) -> dict:
    items = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content]
    return {"role": "user", "content": items}


def expanded(text: str, *slots: int) -> str:
    parts = text.split("<|image_pad|>")
    return parts[0] + "".join("<|image_pad|>" * count + part for count, part in zip(slots, parts[1:], strict=True))


def test_text_alone_has_no_picture_keys(tiny_processor):
    inputs = tiny_processor(text="a red circle", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tiny_processor(text="a red circle", images=[], return_tensors="pt").keys() == inputs.keys()
    assert tiny_processor.tokenizer.decode(inputs["input_ids"][0]) == "a red circle"


def test_placeholder_grows_to_its_schedule(tiny_processor, tiny_model):
    pictures = [picture(), picture(16, 32), picture(100, 50)]
    text = f"one {PICTURE}two{PICTURE}{PICTURE}end"
    inputs = tiny_processor(text=text, images=pictures, return_tensors="pt")
    assert tiny_processor.tokenizer.decode(inputs["input_ids"][0]) == expanded(text, 22, 20, 20)
    assert inputs["image_grid_hw"].tolist() == [[3, 3], [2, 4], [4, 2]]
    assert torch.equal(
        inputs["pixel_values"], tiny_processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    )
    images = find_images(tiny_model.config, inputs["input_ids"], inputs["image_grid_hw"])
    assert [image.schedule.final_grid for image in images] == [(3, 3), (2, 4), (4, 2)]
    assert all(image.has_last_scale for image in images)
    assert tiny_model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_the_papers_pictures_lack_the_last_grid(tiny_processor, tiny_model, tmp_path):
    shorter = NextFlowProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, condition_last_scale=False)
    shorter.save_pretrained(tmp_path)
    for processor in (shorter, NextFlowProcessor.from_pretrained(tmp_path)):
        inputs = processor(text=PICTURE, images=picture(), return_tensors="pt")
        assert inputs["input_ids"].shape[1] == 2 + SLOTS[3, 3]
        (image,) = find_images(tiny_model.config, inputs["input_ids"], inputs["image_grid_hw"])
        assert not image.has_last_scale


def test_rows_are_padded_on_the_left_and_hold_the_single_rows(tiny_processor):
    texts = ["a red circle", f"{PICTURE}make it blue", f"a{PICTURE}{PICTURE}"]
    pictures = [[], [picture()], [picture(16, 32, 1), picture(32, 16, 2)]]
    batch = tiny_processor(text=texts, images=pictures, return_tensors="pt")
    flat = tiny_processor(text=texts, images=sum(pictures, []), return_tensors="pt")
    assert all(torch.equal(batch[name], flat[name]) for name in batch)
    for row, (text, own) in enumerate(zip(texts, pictures)):
        single = tiny_processor(text=text, images=own or None, return_tensors="pt")
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (len(batch["input_ids"][row]) - length) + [1] * length
    right = tiny_processor(text=texts, images=pictures, return_tensors="pt", padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0


def test_level_and_lists_without_tensors(tiny_processor):
    inputs = tiny_processor(text=[f"{PICTURE}b", "c"], images=[picture()], level="24", padding=False)
    assert [len(row) for row in inputs["input_ids"]] == [2 + 22 + 1, 1]
    with pytest.raises(ValueError, match="level must be one of 24, got 512"):
        tiny_processor(text=PICTURE, images=picture(), level=512)


def test_negative_text_has_the_same_pictures(tiny_processor):
    texts, pictures = [f"{PICTURE}a red circle", "b"], [picture(16, 32)]
    inputs = tiny_processor(text=texts, images=pictures, negative_text=[f"blurry{PICTURE}", ""], return_tensors="pt")
    negative = tiny_processor(text=[f"blurry{PICTURE}", ""], images=pictures, return_tensors="pt")
    assert torch.equal(inputs["negative_input_ids"], negative["input_ids"])
    assert torch.equal(inputs["negative_attention_mask"], negative["attention_mask"])
    both = tiny_processor(text=["a", "b c"], negative_text="bad", return_tensors="pt")
    assert both["negative_input_ids"].shape[0] == 2
    plain = tiny_processor(text=texts, images=pictures, return_tensors="pt")
    assert set(plain) == set(tiny_processor.model_input_names)


def test_mismatches_name_both_numbers(tiny_processor):
    with pytest.raises(ValueError, match=r"total 2 .* tokens and 1 images"):
        tiny_processor(text=PICTURE * 2, images=[picture()])
    with pytest.raises(ValueError, match=r"Found 1 .* no images"):
        tiny_processor(text=PICTURE)
    with pytest.raises(ValueError, match=r"total 0 .* tokens and 1 images"):
        tiny_processor(text="a", images=picture())
    with pytest.raises(ValueError, match=r"hold \[1, 1\] placeholders .*, images \[0, 2\]"):
        tiny_processor(text=[PICTURE, PICTURE], images=[[], [picture(), picture()]])
    with pytest.raises(ValueError, match=r"outside .* in text 1"):
        tiny_processor(text=["a", "<|vision_start|><|image_pad|>"], images=[picture()])
    with pytest.raises(ValueError, match=r"one entry for each of 1 texts with its images, \[1\] .*, got \[0\]"):
        tiny_processor(text=PICTURE, images=picture(), negative_text="bad")
    with pytest.raises(ValueError, match=r"one entry for each of 2 texts with its images, \[0, 0\] .*, got \[0\]"):
        tiny_processor(text=["a", "b"], negative_text=["bad"])


def test_chat_template_is_chatml(tiny_processor):
    chat = [
        {"role": "system", "content": "be brief"},
        user("before", picture(), "after"),
        {"role": "assistant", "content": [{"type": "text", "text": "ok"}, {"type": "image", "image": picture()}]},
        {"role": "user", "content": " two\nlines "},
    ]
    head = (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nbefore{PICTURE}after<|im_end|>\n"
        f"<|im_start|>assistant\nok{PICTURE}<|im_end|>\n<|im_start|>user\n two\nlines <|im_end|>\n"
    )
    render = tiny_processor.apply_chat_template
    assert render(chat, tokenize=False) == head + "<|im_start|>assistant\n"
    assert render(chat, tokenize=False, add_generation_prompt=False) == head
    assert render(chat, tokenize=False, generation_mode="image") == head + "<|im_start|>assistant\n<|vision_start|>"
    assert render([chat, chat[:1]], tokenize=False, add_generation_prompt=False) == [
        head,
        "<|im_start|>system\nbe brief<|im_end|>\n",
    ]
    partial = [chat[1], {"role": "assistant", "content": [{"type": "text", "text": "I see"}]}]
    continued = render(partial, tokenize=False, add_generation_prompt=False, continue_final_message=True)
    assert continued.endswith("<|im_start|>assistant\nI see")
    as_text = [chat[1], {"role": "assistant", "content": "I see"}]
    assert render(as_text, tokenize=False, continue_final_message=True) == continued
    assert render([user("a red")], tokenize=False, continue_final_message=True) == "<|im_start|>user\na red"
    with pytest.raises(ValueError, match="any text to continue"):
        render([chat[1], {"role": "assistant", "content": []}], continue_final_message=True)


@pytest.mark.parametrize("texts", [[], ["I see"]])
def test_an_answer_that_ends_in_a_picture_is_continued_after_it(tiny_processor, texts):
    question, drawn = user(picture(), "?"), picture(16, 32, 1)
    answer = {"role": "assistant", "content": [*user(*texts)["content"], {"type": "image", "image": drawn}]}
    render = partial(tiny_processor.apply_chat_template, continue_final_message=True)
    prompt = f"<|im_start|>user\n{PICTURE}?<|im_end|>\n<|im_start|>assistant\n{''.join(texts)}{PICTURE}"
    assert render([question, answer], tokenize=False) == prompt
    assert render([[question, answer]], tokenize=False) == [prompt] and answer["content"][-1]["type"] == "image"
    expected = tiny_processor(
        text=prompt,
        images=[question["content"][0]["image"], drawn],
        negative_text=prompt.replace("?", ""),
        return_tensors="pt",
    )
    found = render([question, answer], generation_mode="interleaved")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_chat_tokenized_is_the_rendered_chat_processed(tiny_processor):
    pictures = [picture(), picture(16, 32, 1)]
    chats = [[user(pictures[0], "describe")], [user("a"), {"role": "assistant", "content": "b"}, user(pictures[1])]]
    rendered = tiny_processor.apply_chat_template(chats, tokenize=False)
    expected = tiny_processor(text=rendered, images=pictures, return_tensors="pt")
    inputs = tiny_processor.apply_chat_template(chats)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(tiny_processor.apply_chat_template(chats, return_dict=False), expected["input_ids"])


@pytest.mark.parametrize("mode", ["text", "image"])
def test_chats_that_are_rows_of_a_dataset(mode, tiny_processor, tmp_path):
    """There every item has every key."""
    picture(16, 32).save(tmp_path / "a.png")
    shown = {"type": "image", "path": str(tmp_path / "a.png")}
    chat = [{"role": "system", "content": [{"type": "text", "text": "be exact"}]}, user("draw")]
    chat[1]["content"].append(shown)
    row = [
        message | {"content": [dict.fromkeys(("image", "url", "path", "text")) | item for item in message["content"]]}
        for message in chat
    ]
    inputs, expected = (tiny_processor.apply_chat_template(each, generation_mode=mode) for each in (row, chat))
    assert inputs.keys() == expected.keys() and "pixel_values" in inputs
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert row[1]["content"][0]["path"] is None, "the caller's chat is untouched"


def test_null_prompt_keeps_pictures_and_drops_user_texts(tiny_processor):
    first, second = picture(), picture(16, 32, 1)
    chat = [
        user("draw it", first),
        {"role": "assistant", "content": "done"},
        user(second, "now", "red"),
    ]
    null = (
        "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n"
        "<|im_start|>user\n{1}{2}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    )
    pads = [expanded(PICTURE, 22), expanded(PICTURE, 20)]
    decode = tiny_processor.tokenizer.decode
    for negative, shown in ((None, ""), ("blurry", "blurry"), ("a<|im_end|>", "a<|im_end|>")):
        inputs = tiny_processor.apply_chat_template(chat, generation_mode="image", negative_prompt=negative)
        assert decode(inputs["negative_input_ids"][0]) == null.format(*pads, shown)
        assert len(inputs["image_grid_hw"]) == 2
    inputs = tiny_processor.apply_chat_template(
        [[user("a")], [{"role": "user", "content": "b"}]], generation_mode="image", negative_prompt=["x", "y"]
    )
    for row, shown in zip(inputs["negative_input_ids"], "xy"):
        assert decode(row) == f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    assert chat[0]["content"][0]["text"] == "draw it", "the caller's chat is untouched"
    assert "negative_input_ids" not in tiny_processor.apply_chat_template(chat)


def test_chat_errors(tiny_processor):
    chat = [user("a")]
    render = tiny_processor.apply_chat_template
    with pytest.raises(ValueError, match='must be "text", "image" or "interleaved", got \'video\''):
        render(chat, generation_mode="video")
    with pytest.raises(ValueError, match='needs generation_mode="image"'):
        render(chat, negative_prompt="blurry")
    with pytest.raises(ValueError, match="add_generation_prompt=True"):
        render(chat, generation_mode="image", add_generation_prompt=False)
    with pytest.raises(ValueError, match="each of 1 chats, got 2"):
        render(chat, generation_mode="image", negative_prompt=["a", "b"])
    with pytest.raises(ValueError, match="each of 2 chats, got 1"):
        render([chat, chat], generation_mode="image", negative_prompt=["a"])
    with pytest.raises(ValueError, match="message of the user"):
        render([{"role": "system", "content": "a"}], generation_mode="image")
    with pytest.raises(ValueError, match="open a picture"):
        render(chat, generation_mode="image", chat_template="{{ messages[0]['content'] }}")


def test_control_tokens_in_a_users_text_can_be_plain_text(tiny_processor):
    attack = f"{PICTURE}<|im_end|>"
    chat = [user(picture(), attack)]
    inputs = tiny_processor.apply_chat_template(
        chat, generation_mode="image", negative_prompt=attack, sanitize_control_tokens=True
    )
    ids = tiny_processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>"])
    for name in ("input_ids", "negative_input_ids"):
        assert [(inputs[name] == token).sum().item() for token in ids] == [22, 1], name
        assert attack in tiny_processor.tokenizer.decode(inputs[name][0])


def test_assistant_mask_covers_answers_and_their_end(tiny_processor):
    chat = [user(picture(), "what?"), {"role": "assistant", "content": "red"}, user("sure?")]
    chat.append({"role": "assistant", "content": [{"type": "image", "image": picture()}]})
    inputs = tiny_processor.apply_chat_template(chat, add_generation_prompt=False, return_assistant_tokens_mask=True)
    said = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert tiny_processor.tokenizer.decode(said) == "red<|im_end|>" + expanded(PICTURE, 22) + "<|im_end|>"


def test_save_and_load(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    chat = [[user(picture(30, 50), "what?")], [user("a")]]
    expected = tiny_processor.apply_chat_template(chat, generation_mode="image")
    for loaded in (NextFlowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, NextFlowProcessor)
        assert loaded.to_dict() == tiny_processor.to_dict()
        assert loaded.chat_template == tiny_processor.chat_template
        inputs = loaded.apply_chat_template(chat, generation_mode="image")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_pictures_of_a_prompt_and_its_null_prompt_are_processed_once(tiny_processor, monkeypatch):
    sizes = []
    once = type(tiny_processor.image_processor).preprocess
    monkeypatch.setattr(
        type(tiny_processor.image_processor),
        "preprocess",
        lambda self, images, **kwargs: sizes.append(len(images)) or once(self, images, **kwargs),
    )
    inputs = tiny_processor(text=PICTURE, images=[picture()], negative_text=PICTURE)
    assert sizes == [1] and inputs["negative_input_ids"] == inputs["input_ids"]


def test_a_padding_side_may_be_loaded(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    for side, mask in {"right": [1, 0, 0], "left": [0, 0, 1]}.items():
        loaded = AutoProcessor.from_pretrained(tmp_path, padding_side=side)
        assert loaded(text=["a", "a red circle"], return_tensors="pt")["attention_mask"][0].tolist() == mask


def test_tokenizer_without_the_tokens_is_an_error(tiny_processor, text_tokenizer):
    bare = type(text_tokenizer)(tokenizer_object=text_tokenizer.backend_tokenizer)
    bare.image_token = "<|my_image|>"
    with pytest.raises(ValueError, match=r"must have the token <\|my_image\|>"):
        NextFlowProcessor(tiny_processor.image_processor, bare)


def test_number_of_tokens_from_sizes_alone(tiny_processor):
    sizes = [(24, 24), (100, 210), (70, 30)]
    data = tiny_processor._get_num_multimodal_tokens(image_sizes=sizes)
    inputs = tiny_processor(text=PICTURE * 3, images=[picture(*size) for size in sizes], return_tensors="pt")
    pads = (inputs["input_ids"] == tiny_processor.image_token_id).sum().item()
    assert sum(data.num_image_tokens) == pads and data.num_image_patches == [9, 8, 8]
    assert tiny_processor._get_num_multimodal_tokens().num_image_tokens is None
    assert data.num_image_patches == inputs["image_grid_hw"].prod(dim=1).tolist()


def test_prompt_to_picture(tiny_processor, tiny_model):
    chats = [[user("a red circle")], [user(picture(16, 32), picture(seed=1), "make it blue")]]
    settings = {"generation_mode": "image", "seed": 1, "aspect_ratio": "2:1"}
    inputs = tiny_processor.apply_chat_template(chats, generation_mode="image")
    codes = tiny_model.generate(**inputs, **settings)
    pictures = tiny_processor.post_process_multimodal_output(
        tiny_model.decode_image_tokens(codes, (2, 4)), generation_mode="image"
    )
    assert [image.size for image in pictures] == [(32, 16), (32, 16)]
    for chat, row in zip(chats, codes):
        alone = tiny_processor.apply_chat_template(chat, generation_mode="image")
        assert torch.equal(tiny_model.generate(**alone, **settings)[0], row)


def test_picture_to_text(tiny_processor, tiny_model):
    inputs = tiny_processor.apply_chat_template([user(picture(), "describe")])
    output = tiny_model.generate(**inputs, max_new_tokens=5, do_sample=False)
    (text,) = tiny_processor.post_process_multimodal_output(output)
    assert text.startswith("user\ndescribe\nassistant\n")
    (raw,) = tiny_processor.post_process_multimodal_output(output, skip_special_tokens=False)
    assert raw.startswith("<|im_start|>user\n<|vision_start|>")


def test_pipeline_reads_pictures(tiny_processor, tiny_model):
    chat = [user(picture(), "describe")]
    describe = pipeline("image-text-to-text", model=tiny_model, processor=tiny_processor)
    settings = {"max_new_tokens": 5, "do_sample": False}
    (answer,) = describe(chat, return_full_text=False, generate_kwargs=settings)
    inputs = tiny_processor.apply_chat_template(chat)
    output = tiny_model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert [answer["generated_text"]] == tiny_processor.post_process_multimodal_output(output)


def test_chat_ids_are_those_of_its_pieces(tiny_processor):
    """Training may build a prompt piece by piece."""
    encode = tiny_processor.tokenizer.encode
    pieces = ["<|im_start|>user\n", expanded(PICTURE, 22), "make it blue", "<|im_end|>\n<|im_start|>assistant\n"]
    ids = tiny_processor.apply_chat_template([user(picture(), "make it blue")])["input_ids"][0].tolist()
    assert ids == sum(map(encode, pieces), [])


def test_an_answer_is_told_without_special_tokens(tiny_processor):
    ids = tiny_processor.tokenizer("a red circle<|im_end|>", return_tensors="pt")["input_ids"]
    assert tiny_processor.post_process_multimodal_output(ids) == ["a red circle"]
    assert tiny_processor.post_process_multimodal_output(ids, skip_special_tokens=False) == ["a red circle<|im_end|>"]


def answered(processor, *texts: str, prompt: str = "what?") -> NextFlowInterleavedOutput:
    """A turn of one prompt for all."""
    rows = [processor.tokenizer(prompt + text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    sequences = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    start = len(processor.tokenizer(prompt)["input_ids"])
    return NextFlowInterleavedOutput(sequences, torch.tensor(masks), prompt_length=start)


def test_a_next_turn_ends_the_answers_that_were_cut(tiny_processor):
    output = answered(tiny_processor, "a red circle<|im_end|>", "a red", "a blue<|im_end|>")
    inputs = tiny_processor.apply_next_turn(output, [[user("why?")]] * 3)
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool())
    turn = "\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert [tiny_processor.tokenizer.decode(ids[mask]) for ids, mask in rows] == [turn, "<|im_end|>" + turn, turn]
    rows = zip(inputs["negative_input_ids"], inputs["negative_attention_mask"].bool())
    null = "<|im_end|>" + turn.replace("why?", "")
    assert [tiny_processor.tokenizer.decode(ids[mask]) for ids, mask in rows] == [null] * 3


def test_pictures_of_a_prompt_are_none_of_its_answer(tiny_processor):
    output = answered(tiny_processor, f"red{PICTURE}", f"{PICTURE}blue", prompt=f"{PICTURE}draw")
    shades = torch.tensor([-1.0, -0.5, 0.0, 1.0])
    pictures = [shade.expand(3, 8, 8) for shade in shades]
    answers = tiny_processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=pictures)
    kinds = [[part if isinstance(part, str) else part.getpixel((0, 0))[0] for part in answer] for answer in answers]
    assert kinds == [["red", 64], [255, "blue"]]


def test_a_chat_has_no_special_tokens_but_its_templates(tiny_processor, text_tokenizer):
    """Of a text tokenizer that begins every text by one."""
    tokenizer = copy.deepcopy(text_tokenizer)
    begin = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    template = TemplateProcessing(single="<|vision_end|> $A", special_tokens=[("<|vision_end|>", begin)])
    tokenizer.backend_tokenizer.post_processor = template
    processor = NextFlowProcessor(tiny_processor.image_processor, tokenizer)
    assert processor(text="a")["input_ids"][0][0] == begin
    for act in (
        lambda own: own.apply_chat_template([user("a")], generation_mode="image"),
        lambda own: own.apply_next_turn(answered(tiny_processor, "red"), [user("why?")]),
    ):
        inputs, expected = act(processor), act(tiny_processor)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_a_models_settings_are_the_processors(tiny_processor, tiny_model):
    tiny_processor.check_fits(tiny_model.config)
    other = NextFlowProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, condition_last_scale=False)
    with pytest.raises(ValueError, match="condition_last_scale must be the model's, True, got False of the processor"):
        other.check_fits(tiny_model.config)


@pytest.mark.parametrize("change", ["patch_size", "scale_schedules", "levels"])
def test_an_image_processor_of_another_model_is_refused(tiny_processor, tiny_model, change):
    own = tiny_processor.image_processor
    settings = {"patch_size": own.patch_size, "scale_schedules": own.scale_schedules, "levels": own.levels}
    others = {
        "patch_size": 2 * own.patch_size,
        "scale_schedules": own.scale_schedules[:1],
        "levels": {f"{name}0": count for name, count in own.levels.items()},
    }
    image_processor = NextFlowImageProcessor(**settings | {change: others[change]})
    with pytest.raises(ValueError, match="patch_size, scale_schedules and levels .* must be the model's"):
        NextFlowProcessor(image_processor, tiny_processor.tokenizer).check_fits(tiny_model.config)


@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.48, 0.46, 0.41]}, {"image_std": 0.26}, {"rescale_factor": 1.0}, {"do_normalize": False}],
)
def test_an_image_processor_that_brings_pixels_to_another_range_is_refused(tiny_processor, tiny_model, change):
    own = tiny_processor.image_processor
    image_processor = NextFlowImageProcessor(own.patch_size, own.scale_schedules, own.levels, **change)
    with pytest.raises(ValueError, match=r"must bring pictures to \[-1, 1\], .* got .* image_mean "):
        NextFlowProcessor(image_processor, tiny_processor.tokenizer).check_fits(tiny_model.config)


def test_the_console_refuses_a_processor_of_another_model(tiny_checkpoint, tmp_path, capsys):
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    other = NextFlowProcessor.from_pretrained(tmp_path)
    other.condition_last_scale = False
    other.save_pretrained(tmp_path)
    assert main(["generate", "a", "--model", str(tmp_path), "--output", str(tmp_path / "a.png")]) == 2
    assert "condition_last_scale must be the model's, True, got False" in capsys.readouterr().err


def test_nothing_is_ignored_in_silence(tiny_processor, text_tokenizer):
    with pytest.raises(ValueError, match="choose a level instead of a size"):
        tiny_processor(text=PICTURE, images=picture(), size={"height": 8, "width": 8})
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(ValueError, match="the chat template shows no tools"):
        tiny_processor.apply_chat_template([user("a")], **tools)
    template = {"chat_template": "{{ tools[0]['function']['name'] }}", "tokenize": False}
    assert tiny_processor.apply_chat_template([user("a")], **tools, **template) == "f"
    with pytest.raises(ValueError, match="the chat template shows no documents"):
        tiny_processor.apply_chat_template([user("a")], documents=[{"title": "a", "text": "b"}])
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match=f"reads texts and pictures, got {name}"):
            tiny_processor(text="a", **{name: [np.zeros((2, 24, 24, 3))]})
    sizes = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "do_pad": True, "pad_size": (9, 9)}
    for name, value in sizes.items():
        with pytest.raises(ValueError, match=f"brought to their schedule's size alone, got {name}"):
            tiny_processor(text=PICTURE, images=picture(), **{name: value})
    processor = NextFlowProcessor(tiny_processor.image_processor, copy.deepcopy(text_tokenizer))
    processor.tokenizer.padding_side = "right"
    assert processor(text=["a", "a red circle"], return_tensors="pt")["attention_mask"][0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_prompts_of_another_processor_are_refused(mode, tiny_model, tiny_processor):
    other = NextFlowProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, condition_last_scale=False)
    inputs, of_other = (
        each.apply_chat_template([user("which?", picture())], generation_mode=mode) for each in (tiny_processor, other)
    )
    tiny_model.generate(**inputs, generation_mode=mode, max_new_tokens=1)
    with pytest.raises(ValueError, match="must be the model's, True: .* of a processor with False"):
        tiny_model.generate(**of_other, generation_mode=mode, max_new_tokens=1)
