"""Text models into NextFlow and back: equal logits, equal texts, equal tensors, every layout, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conversion.text_models import LLAMA_TEMPLATE, llama, llama_tokenizer, qwen2, qwen2_5_vl, save
from tests.fresh import run, run_fresh
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.cli import main as command
from transformers_nextflow.conversion.decoder import hub_key
from transformers_nextflow.conversion.language_model import convert, convert_back
from transformers_nextflow.conversion.text_tokenizer import ImageTokens

SENTENCE = "a red circle above a blue square"
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "qwen2.5-vl": (qwen2_5_vl, {}),
    "qwen2.5-vl tied": (qwen2_5_vl, {"tie_word_embeddings": True}),
    "qwen2": (qwen2, {}),
    "qwen2 tied": (qwen2, {"tie_word_embeddings": True}),
    "qwen2 yarn": (qwen2, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}),
    "llama": (llama, {}),
    "llama tied": (llama, {"tie_word_embeddings": True}),
    "llama without grouped queries": (llama, {"num_key_value_heads": 4}),
    "llama with biases": (llama, {"attention_bias": True, "mlp_bias": True}),
    "llama linear": (llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama 3": (llama, {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 5e5}}),
}
IN_HALF = ("qwen2.5-vl", "qwen2 tied", "llama 3")


@pytest.fixture(scope="module")
def vq_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    tiny_model.model.vq_model.save_pretrained(folder)
    return folder


def main(arguments: list[str]) -> int:
    return command(["convert", "language-model", *arguments])


def text_logits(model, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(model, NextFlowForConditionalGeneration):
        return model(input_ids=ids, logits_over="text").logits
    return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "kind, dtype",
    [
        *((kind, torch.float32) for kind in KINDS),
        *((kind, torch.bfloat16) for kind in IN_HALF),
        *(pytest.param(kind, torch.bfloat16, marks=pytest.mark.slow) for kind in KINDS if kind not in IN_HALF),
    ],
)
@torch.no_grad()
def test_logits_and_texts_are_the_sources(kind, dtype, vq_folder, text_tokenizer, tmp_path):
    build, settings = KINDS[kind]
    tokenizer = llama_tokenizer() if build is llama else text_tokenizer
    source = save(build(tokenizer, **settings), tokenizer, tmp_path / "source", dtype)
    convert(tmp_path / "source", vq_folder, tmp_path / "out")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    expected = text_logits(source, ids)
    assert torch.equal(text_logits(model, ids)[..., : expected.shape[-1]], expected)
    assert expected.std() > 0.1
    greedy = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(model.generate(input_ids=ids, **greedy), source.generate(input_ids=ids, **greedy))
    assert model.dtype == dtype
    tied = settings.get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied

    assert main(["--back", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert back.config.model_type == "qwen2" and back.dtype == dtype
    assert torch.equal(text_logits(back, ids), text_logits(model, ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(SENTENCE).input_ids == ids[0].tolist()


@pytest.mark.parametrize("layout", ["own", "saved", "hub"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_is_read_and_its_tensors_come_back(layout, tied, text_tokenizer, vq_folder, tiny_model, tmp_path):
    model = qwen2_5_vl(text_tokenizer, tie_word_embeddings=tied)
    qwen = save(model, text_tokenizer, tmp_path / "qwen", torch.bfloat16, layout)
    assert main([str(tmp_path / "qwen"), str(vq_folder), str(tmp_path / "out"), "--max-shard-size", "40KB"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    own = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").model
    assert torch.equal(own.code_embeddings.weight, tiny_model.model.vq_model.quantizer())
    for name, tensor in tiny_model.model.vq_model.state_dict().items():
        assert torch.equal(own.vq_model.state_dict()[name], tensor.to(own.vq_model.state_dict()[name].dtype)), name

    assert main(["--back", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    sources = {k: v for k, v in qwen.state_dict().items() if hub_key(k) and not (tied and k == "lm_head.weight")}
    assert back.keys() == {hub_key(name) for name in sources}
    assert all(torch.equal(back[hub_key(name)], tensor) for name, tensor in sources.items())


def test_new_parts_are_at_their_initialisation(source, vq_folder, tmp_path):
    convert(source, vq_folder, tmp_path / "out")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.code_head.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert model.model.connector[0].weight.std() > 0
    assert not model.model.scale_embedding.index.weight.any()
    assert not model.model.scale_embedding.length.weight.any()


def test_the_card_names_sources_in_the_hubs_cache_by_their_ids(source, vq_folder, tmp_path):
    snapshot = tmp_path / "models--owner--text-1.5B" / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    convert(snapshot, vq_folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Text decoder and text tokenizer: owner/text-1.5B. " in card
    assert f"Vision tokenizer: {vq_folder.name}. " in card


def test_the_vision_tokenizer_of_a_whole_nextflow_is_taken(source, tiny_checkpoint, tiny_model, tmp_path):
    convert(source, tiny_checkpoint, tmp_path / "out", dtype=torch.float32)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, tensor in tiny_model.model.vq_model.state_dict().items():
        assert torch.equal(model.model.vq_model.state_dict()[name], tensor), name
    assert model.config.vq_config.scale_schedules == tiny_model.config.vq_config.scale_schedules


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_added_rows_are_new_and_leave_the_others_alone(tied, vq_folder, tmp_path):
    tokenizer = llama_tokenizer()
    source = save(llama(tokenizer, tie_word_embeddings=tied), tokenizer, tmp_path / "source")
    convert(tmp_path / "source", vq_folder, tmp_path / "out")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    rows, config = len(tokenizer), model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (rows, rows + 1, rows + 2)
    assert processor.tokenizer("<|vision_start|><|image_pad|>a").input_ids[:2] == [rows, rows + 2]
    assert config.text_vocab_size == rows + 3
    for own, theirs in (
        (model.get_input_embeddings(), source.get_input_embeddings()),
        (model.lm_head, source.lm_head),
    ):
        assert torch.equal(own.weight[:rows], theirs.weight)
        new, mean = own.weight[rows:], theirs.weight.mean(dim=0)
        assert torch.pdist(new).min() > 0
        assert (new - mean).norm(dim=1).max() < 0.2 * (theirs.weight - mean).norm(dim=1).min()
    ids = torch.randint(rows, (4, 64), generator=torch.Generator().manual_seed(1))
    assert text_logits(model, ids).argmax(dim=-1).max() < rows


@torch.no_grad()
def test_new_tokens_in_spare_rows_of_the_embedding(vq_folder, tmp_path):
    tokenizer = llama_tokenizer()
    source = save(qwen2(tokenizer), tokenizer, tmp_path / "source")  # rows for seven tokens more
    source_rows = source.get_input_embeddings().weight
    convert(tmp_path / "source", vq_folder, tmp_path / "out")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    own_rows, first = model.get_input_embeddings().weight, len(AutoTokenizer.from_pretrained(tmp_path / "source"))
    assert own_rows.shape == source_rows.shape
    is_same = (own_rows == source_rows).all(dim=1)
    assert (~is_same).nonzero().flatten().tolist() == [first, first + 1, first + 2]


def test_chosen_rows_are_used_as_they_are(vq_folder, tmp_path):
    tokenizer = llama_tokenizer()
    source = save(llama(tokenizer), tokenizer, tmp_path / "source")
    chosen = ["--boi", "<spare_2>", "--eoi", "<spare_0>", "--image", "<spare_1>"]
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out"), *chosen]) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    expected = tuple(tokenizer.convert_tokens_to_ids(["<spare_2>", "<spare_0>", "<spare_1>"]))
    config = model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == expected
    assert (processor.boi_token_id, processor.eoi_token_id, processor.image_token_id) == expected
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    prompt = processor.apply_chat_template([{"role": "user", "content": "x"}], generation_mode="image", tokenize=False)
    assert prompt.endswith("[assistant]<spare_2>")
    # what was converted names its tokens itself
    convert(tmp_path / "source", vq_folder, tmp_path / "again", ImageTokens("<spare_2>", "<spare_0>", "<spare_1>"))
    assert main(["--back", str(tmp_path / "again"), str(tmp_path / "back")]) == 0
    convert(tmp_path / "back", vq_folder, tmp_path / "third")
    assert NextFlowProcessor.from_pretrained(tmp_path / "third").boi_token == "<spare_2>"


CHATS = {
    "text": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": SENTENCE}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a red "}, {"type": "text", "text": "circle"}]}],
    "answered": [{"role": "user", "content": "17"}, {"role": "assistant", "content": "42"}],
}


SPACED_TEMPLATE = "\n  > " + LLAMA_TEMPLATE.replace("{{-", "{{") + "  \n"


def convert_llama(tokenizer, vq_folder: Path, folder: Path) -> None:
    """A tiny Llama in `source`, and the NextFlow that it becomes in `out`."""
    save(llama(tokenizer), tokenizer, folder / "source")
    convert(folder / "source", vq_folder, folder / "out")


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, SPACED_TEMPLATE], ids=["plain", "spaced"])
@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_the_text_models_own(chat, template, vq_folder, tmp_path):
    tokenizer = llama_tokenizer(template)
    convert_llama(tokenizer, vq_folder, tmp_path)
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    plain = CHATS[chat]
    if chat == "parts":
        plain = [{"role": "user", "content": "a red circle"}]
    asks = chat != "answered"
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=asks, tokenize=False)
    assert processor.apply_chat_template(CHATS[chat], tokenize=False) == expected
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=asks, return_dict=True)["input_ids"]
    assert processor.apply_chat_template(CHATS[chat])["input_ids"].tolist() == [ids]


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, LLAMA_TEMPLATE.replace("{{- bos_token }}", "")])
def test_chats_begin_as_the_template_says_whatever_the_tokenizer_adds_to_texts(template, vq_folder, tmp_path):
    tokenizer = llama_tokenizer(template)
    begins = {"special_tokens": [("<s>", tokenizer.bos_token_id)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", **begins)
    convert_llama(tokenizer, vq_folder, tmp_path)
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    assert processor(text="a")["input_ids"][0][0] == tokenizer.bos_token_id
    chat = [{"role": "user", "content": SENTENCE}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert processor.apply_chat_template(chat)["input_ids"].tolist() == [ids]
    inputs = processor.apply_chat_template(chat, generation_mode="image")
    assert inputs["input_ids"].tolist() == [[*ids, processor.boi_token_id]]
    assert inputs["negative_input_ids"][0].tolist().count(tokenizer.bos_token_id) == ids.count(tokenizer.bos_token_id)


@torch.no_grad()
def test_it_draws_and_reads_pictures_in_the_text_models_own_chats(vq_folder, tmp_path):
    tokenizer = llama_tokenizer()
    convert_llama(tokenizer, vq_folder, tmp_path)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    chats = [[{"role": "user", "content": text}] for text in ("a red circle", "17")]
    inputs = processor.apply_chat_template(chats, generation_mode="image")
    assert inputs["input_ids"][:, -1].tolist() == [model.config.boi_token_id] * 2
    nulls = processor.tokenizer.batch_decode(inputs["negative_input_ids"])
    assert nulls[0].endswith("<s>[user] </s>\n[assistant]<|vision_start|>")
    output = model.generate(**inputs, generation_mode="image", seed=0, return_dict_in_generate=True)
    pictures = processor.post_process_image(model.decode_image_tokens(output.sequences, output.image_grid_hw))
    assert [picture.size for picture in pictures] == [(24, 24)] * 2

    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 + 9 + 9
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("opening", ["", "Be brief.</s>"])
@torch.no_grad()
def test_a_next_turn_is_in_the_text_models_own_template(opening, vq_folder, tmp_path):
    """What the template begins a chat with does not come again."""
    tokenizer = llama_tokenizer(LLAMA_TEMPLATE.replace("bos_token }}", "bos_token }}" + opening))
    convert_llama(tokenizer, vq_folder, tmp_path)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    chats = [[{"role": "user", "content": text}] for text in ("a red circle", "17")]
    inputs = processor.apply_chat_template(chats, generation_mode="interleaved")
    output = model.generate(**inputs, generation_mode="interleaved", max_new_tokens=3, max_new_images=0)
    output.sequences[0, -1] = tokenizer.eos_token_id  # of an answer that ended by itself
    turn = [[{"role": "user", "content": text}] for text in ("42", "a blue square")]
    following = model.next_turn(output, **processor.apply_next_turn(output, turn, negative_prompt="a star"))

    def texts(of, name: str) -> list[str]:
        rows = zip(of[f"{name}input_ids"], of[f"{name}attention_mask"].bool())
        return [processor.tokenizer.decode(ids[mask]) for ids, mask in rows]

    whole = {"input_ids": output.sequences, "attention_mask": output.attention_mask}
    first, second = texts(whole, "")
    goes_on = "\n[user] {}</s>\n[assistant]"
    assert first.endswith("</s>") and not second.endswith("</s>")
    assert texts(following, "") == [first + goes_on.format("42"), second + "</s>" + goes_on.format("a blue square")]
    nulls = [null + "</s>" + goes_on.format("a star") for null in texts(inputs, "negative_")]
    assert texts(following, "negative_") == nulls
    endless = LLAMA_TEMPLATE.replace("{{ eos_token }}", "")
    with pytest.raises(ValueError, match="the chat template must end an answer by a token of its own"):
        processor.apply_next_turn(output, turn, chat_template=endless)


def test_what_came_back_becomes_a_nextflow_again(vq_folder, tiny_checkpoint, tmp_path, capsys):
    """With chats of a template of its own, and with the processor's."""
    tokenizer = llama_tokenizer()
    save(llama(tokenizer), tokenizer, tmp_path / "source")
    convert(tmp_path / "source", vq_folder, tmp_path / "first")
    chat = [{"role": "user", "content": "a red circle"}]
    for number, first in enumerate((tmp_path / "first", tiny_checkpoint)):
        text, again = tmp_path / f"text-{number}", tmp_path / f"again-{number}"
        convert_back(first, text)
        convert(text, vq_folder, again)
        before, after = map(NextFlowProcessor.from_pretrained, (first, again))
        for mode in ("text", "image"):
            prompts = [
                each.apply_chat_template(chat, generation_mode=mode, tokenize=False) for each in (before, after)
            ]
            assert prompts[0] == prompts[1]
    others = ["--boi", "<spare_2>", "--eoi", "<spare_0>", "--image", "<spare_1>"]
    assert main([str(tmp_path / "text-0"), str(vq_folder), str(tmp_path / "other"), *others]) == 2
    assert "the chat template has tokens of pictures, <spare_2>, <spare_0>, <spare_1> not" in capsys.readouterr().err


def test_a_tokenizer_without_a_chat_template_speaks_chatml_if_it_has_its_tokens(source, vq_folder, tmp_path, capsys):
    convert(source, vq_folder, tmp_path / "out")
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "a red circle"}]
    assert processor.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user\na red circle<|im_end|>")

    tokenizer = llama_tokenizer(chat_template=None)
    save(llama(tokenizer), tokenizer, tmp_path / "base")
    arguments = [str(tmp_path / "base"), str(vq_folder), str(tmp_path / "out of base")]
    assert main(arguments) == 2
    assert "neither a chat template nor the tokens <|im_start|> and <|im_end|>" in capsys.readouterr().err
    (tmp_path / "base" / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    assert main(arguments) == 0


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "llama"])
def test_a_fresh_process_loads_it_plainly(kind, text_tokenizer, vq_folder, tmp_path):
    build, settings = KINDS[kind]
    tokenizer = llama_tokenizer() if build is llama else text_tokenizer
    model = save(build(tokenizer, **settings), tokenizer, tmp_path / "source", torch.bfloat16)
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 0
    ids = tokenizer("a red circle", return_tensors="pt").input_ids
    with torch.no_grad():
        save_file({"ids": ids, "logits": text_logits(model, ids)}, tmp_path / "expected.safetensors")
    script = """
import torch, transformers_nextflow
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor
expected = load_file("expected.safetensors")
for folder in ("out", "again"):
    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": "a red circle"}], generation_mode="image")
    assert model.generate(**inputs, generation_mode="image", seed=0).shape == (1, 14)
    logits = model(input_ids=expected["ids"], logits_over="text").logits
    assert torch.equal(logits[..., : expected["logits"].shape[-1]], expected["logits"])
    model.save_pretrained("again")
    processor.save_pretrained("again")
"""
    run_fresh(script, tmp_path)


def test_the_command_under_its_first_name(source, vq_folder, tmp_path):
    run("-m", "conversion.qwen2_5_vl", source, vq_folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "build, settings, message",
    [
        (llama, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (llama, {"head_dim": 16}, "head_dim must be hidden_size / num_attention_heads, 32 / 4, got 16"),
        (
            llama,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        (
            llama,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "must rotate whole heads, got 0.5",
        ),
        (
            qwen2,
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "layers must have full attention, got sliding_attention",
        ),
    ],
)
def test_what_the_decoder_cannot_express_is_refused(build, settings, message, vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    save(build(tokenizer, **settings), tokenizer, tmp_path / "source")
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_architectures_are_refused(copied, vq_folder, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    assert main([str(copied), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "must be a llama, qwen2 or qwen2_5_vl, got the type 'mistral'" in capsys.readouterr().err


def test_biases_without_a_place_are_refused(vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    save(llama(tokenizer, attention_bias=True), tokenizer, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 0.1
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "lacks: model.layers.1.self_attn.o_proj.bias" in capsys.readouterr().err


def test_stored_rotary_frequencies_of_old_llamas_are_no_weights(vq_folder, tmp_path):
    tokenizer = llama_tokenizer()
    save(llama(tokenizer), tokenizer, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 0


def test_tied_heads_that_differ_are_refused(vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    save(llama(tokenizer), tokenizer, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "ties lm_head.weight to the embeddings, but their tensors differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tokens, message",
    [
        (
            ("<spare_0>", "<spare_1>", "<new>"),
            "<new> must be special tokens of the text tokenizer, which has <|endoftext|>",
        ),
        (("<spare_0>", "<spare_1>", "circle"), "circle must be special tokens"),
        (("<spare_0>", "<spare_1>", "<spare_1>"), "must be three tokens"),
        (("<spare_0>", "<spare_1>", "</s>"), "texts need </s>"),
    ],
)
def test_tokens_that_cannot_serve_are_refused(tokens, message, vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    save(llama(tokenizer), tokenizer, tmp_path / "source")
    chosen = [part for pair in zip(("--boi", "--eoi", "--image"), tokens) for part in pair]
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out"), *chosen]) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_with_some_of_qwens_tokens_is_refused(vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|vision_start|>"]})
    save(llama(tokenizer), tokenizer, tmp_path / "source")
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "lacks <|vision_end|>, <|image_pad|>: choose" in capsys.readouterr().err


def test_more_tokens_than_rows_are_refused(vq_folder, tmp_path, capsys):
    tokenizer = llama_tokenizer()
    save(llama(tokenizer, vocab_size=len(tokenizer) - 1), tokenizer, tmp_path / "source")
    assert main([str(tmp_path / "source"), str(vq_folder), str(tmp_path / "out")]) == 2
    rows = len(tokenizer) - 1
    assert f"has {rows + 1} tokens, the embedding {rows} rows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def source(text_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    save(qwen2_5_vl(text_tokenizer), text_tokenizer, folder, torch.bfloat16)
    return folder


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the source to be damaged, with its tensors."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_dtype_and_processor(source, vq_folder, text_tokenizer, tmp_path):
    assert main([str(source), str(vq_folder), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    boi, eoi, image = text_tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    config = model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_id) == (boi, eoi, image)
    assert (processor.boi_token_id, processor.eoi_token_id, processor.image_token_id) == (boi, eoi, image)
    assert config.text_config.rope_parameters["mrope_section"] == [1] * 4
    assert model.generation_config.eos_token_id == text_tokenizer.eos_token_id


def without_bias(tensors):
    del tensors["model.layers.1.self_attn.q_proj.bias"]


def with_more(tensors):
    tensors["model.language_model.layers.0.more"] = torch.zeros(1)


def with_stranger(tensors):
    tensors["stranger"] = torch.zeros(1)


def with_other_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(31)


def without_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def twice(tensors):
    tensors["model.language_model.norm.weight"] = torch.zeros(32)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_bias, "lacks model.layers.1.self_attn.q_proj.bias"),
        (with_more, "holds the unknown model.language_model.layers.0.more"),
        (with_stranger, "holds the unknown stranger"),
        (with_other_shape, r"model.norm.weight in .* must have the shape (32,), got (31,)"),
        (without_layer, "holds 1 layers, its config.json says 2"),
        (twice, "holds both model."),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, copied, vq_folder, tmp_path, capsys):
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    assert main([str(copied), str(vq_folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(".*")), error
    assert not (tmp_path / "out").exists()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors is truncated"


def indexed(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def absent_shard(folder):
    indexed(folder, {"lm_head.weight": "model-1.safetensors"})
    return "lacks model-1.safetensors, which model.safetensors.index.json names"


def outside(folder):
    indexed(folder, {"lm_head.weight": "../whole.safetensors"})
    return "must name .safetensors files of its own folder, got '../whole.safetensors'"


def absolute(folder):
    indexed(folder, {"lm_head.weight": str(folder / "whole.safetensors")})
    return "must name .safetensors files of its own folder"


def incomplete_index(folder):
    indexed(folder, {"lm_head.weight": "whole.safetensors"})
    return "does not list"


def lying_index(folder):
    indexed(folder, {"elsewhere": "whole.safetensors"})
    return "says that whole.safetensors holds elsewhere, which it does not"


def huge(folder):
    path = folder / "model.safetensors"
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    return "model.safetensors is truncated or no safetensors file"


def huge_header(folder):
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    return "model.safetensors is truncated or no safetensors file"


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "holds neither model.safetensors.index.json nor model.safetensors"


def huge_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 10**4, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return "holds 2 layers, its config.json says 10000"


def set_entry(path, value, *names):
    """Change a value of a JSON file."""
    values = inner = json.loads(path.read_text())
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    path.write_text(json.dumps(values))


def text_for_a_number(folder):
    set_entry(folder / "config.json", "2", "text_config", "num_attention_heads")
    return f"the config.json of {folder} cannot be loaded: StrictDataclassFieldValidationError"


def no_heads(folder):
    set_entry(folder / "config.json", 0, "text_config", "num_attention_heads")
    return f"the config.json of {folder} cannot be loaded: "


def no_size(folder):
    set_entry(folder / "config.json", -64, "text_config", "intermediate_size")
    return f"the config.json of {folder} cannot be loaded: "


def listed_config(folder):
    (folder / "config.json").write_text("[1]")
    return "config.json"


def no_text_tokenizer(folder):
    set_entry(folder / "tokenizer.json", {"type": "none"}, "model")
    return f"the text tokenizer in {folder} cannot be loaded: "


def generation_of_no_config(folder):
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many", "do_sample": []}')
    return f"the generation_config.json in {folder} cannot be loaded: "


JSON_DAMAGES = [text_for_a_number, no_heads, no_size, listed_config, no_text_tokenizer, generation_of_no_config]
DAMAGES = [truncated, absent_shard, outside, absolute, incomplete_index, lying_index, huge, huge_header, pickled]


@pytest.mark.parametrize("damage", [*DAMAGES, *JSON_DAMAGES, huge_config])
def test_damaged_and_malicious_folders_are_refused(damage, copied, vq_folder, tmp_path, capsys):
    message = damage(copied)
    assert main([str(copied), str(vq_folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"], "nothing is written"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_damaged_nextflow_does_not_come_back(file, source, vq_folder, tmp_path, capsys):
    convert(source, vq_folder, tmp_path / "nextflow")
    names = {"config.json": ["text_config", "num_attention_heads"], "tokenizer.json": ["model"]}
    set_entry(tmp_path / "nextflow" / file, "2", *names.get(file, ["max_new_tokens"]))
    assert main(["--back", str(tmp_path / "nextflow"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'nextflow'} cannot be loaded: " in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["nextflow"], "nothing is written"


def test_an_interrupted_run_leaves_nothing(source, vq_folder, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(NextFlowProcessor, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, vq_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_folder_of_that_name(source, vq_folder, tmp_path):
    script = f"""
import os
from transformers_nextflow.cli import main
fsync, shards = os.fsync, []
os.fsync = lambda number: os._exit(9) if shards else shards.append(fsync(number))
folders = {[str(source), str(vq_folder), str(tmp_path / "out")]!r}
main(["convert", "language-model", *folders, "--max-shard-size", "40KB"])
"""
    run("-c", script, status=9)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.") and not (partial / "config.json").exists()


def test_an_existing_output_is_kept(source, vq_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main([str(source), str(vq_folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", "b"),
        ("--back", *"abc"),
        ("--back", *"ab", "--boi", "<s>"),
        (*"abc", "--max-shard-size", "5X"),
        (*"abc", "--boi", "<s>", "--eoi", "</s>"),
    ],
)
def test_usage_errors(arguments):
    assert main(arguments) == 2
