"""PEFT's defaults: what a LoRA changes, trains and saves, and that merging keeps the model's outputs."""

import importlib.util
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny_models import BOI, EOS, SQUARE, WIDE, Picture, batch_of, relative, tiny_config, tiny_model
from transformers import BitsAndBytesConfig

from tests.adapters import added_by_transformers
from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.lora import DECODER_LINEARS, LEFT_OUT, lora_config
from transformers_nextflow.training import load_stages
from transformers_nextflow.utils.loading import load_merged

peft = pytest.importorskip("peft")
from peft.utils.hotswap import hotswap_adapter  # noqa: E402


def batch(model) -> dict:
    return batch_of(model, [1, 2, Picture(SQUARE), EOS], [3, 4, 5, Picture(SQUARE, seed=1), EOS])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model.get_base_model() if hasattr(model, "get_base_model") else model)).logits


def train(model, inputs: dict, rate: float = 0.5) -> dict[str, torch.Tensor]:
    """A few steps; all parameters and buffers before them."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return before


@pytest.fixture
def adapted():
    return peft.get_peft_model(tiny_model(), lora_config(r=4))


def test_adapters_sit_on_the_decoders_linear_layers_alone(adapted):
    layers = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert len(layers) == 2 * 7
    assert all("language_model.layers." in name for name in layers)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    others = {name for name in trained if ".lora_" not in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in others} == {"code_head", "code_embeddings"}
    assert not any("vq_model" in name for name in trained)


def test_training_changes_what_it_should_and_the_forward_uses_it(adapted):
    inputs = batch(adapted.get_base_model())
    first = logits(adapted)
    assert torch.equal(first, logits(tiny_model())), "a new adapter changes nothing"
    before = train(adapted, inputs)
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("code_head.modules_to_save.default.weight") for name in changed)
    assert any(name.endswith("code_embeddings.modules_to_save.default.weight") for name in changed)
    assert all(".lora_" in name or ".modules_to_save." in name for name in changed)
    whole = logits(adapted)
    for name in ("code_head", "code_embeddings"):  # with either put back, the outputs differ
        (wrapper,) = (module for path, module in adapted.named_modules() if path.endswith(f".{name}"))
        kept = wrapper.modules_to_save["default"].weight.detach().clone()
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.copy_(wrapper.original_module.weight)
            assert not torch.equal(logits(adapted), whole)
            wrapper.modules_to_save["default"].weight.copy_(kept)
    assert torch.equal(logits(adapted), whole)


def test_save_load_and_merge(adapted, tmp_path):
    train(adapted, batch(adapted.get_base_model()))
    adapted.eval()
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, NextFlowForConditionalGeneration)
    assert relative(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    plain = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert plain.state_dict().keys() == tiny_model().state_dict().keys()
    assert torch.equal(logits(plain), logits(merged))


@added_by_transformers
def test_an_adapter_added_to_the_model_itself_is_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.add_adapter(lora_config(r=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("code_head.modules_to_save" in name for name in trained)
    assert not any("vq_model" in name for name in trained)
    train(model, batch(model))
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path))
    assert not torch.equal(logits(loaded), logits(tiny_model()))
    assert torch.equal(logits(loaded), logits(model))


# PEFT's own settings


def adapters_of(model) -> set[str]:
    names = [name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A" in name]
    return {name.split("base_model.model.")[-1] for name in names}


def add_by_peft(model, config):
    return peft.get_peft_model(model, config)


def add_by_transformers(model, config):
    model.add_adapter(config)
    return model


ADAPTER = {add_by_peft: "peft_config", add_by_transformers: "adapter_config"}
BY_DOOR = pytest.mark.parametrize("add", [add_by_peft, pytest.param(add_by_transformers, marks=added_by_transformers)])


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_a_head_or_embedding_that_is_trained_whole_is_merged_where_they_were_one(part, tmp_path):
    tiny_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    base = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, lora_config(r=4, modules_to_save=[part]))
    before = logits(adapted.eval())
    train(adapted, batch(base), rate=0.05)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    merged = load_merged(str(tmp_path / "adapters")).eval()
    assert relative(logits(merged), expected) < 1e-5 < relative(before, expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_merged(str(tmp_path / "merged")).eval()), logits(merged))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_parameters": ["lm_head.weight"]},
        {"target_parameters": ["embed_tokens.weight"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_adapters_on_head_or_embedding_are_merged_where_they_were_one(targets, tmp_path):
    base = tiny_model(tiny_config(tie_word_embeddings=True))
    adapted = peft.get_peft_model(base, peft.LoraConfig(**targets, r=2, init_lora_weights=False)).eval()
    expected = logits(adapted)
    assert relative(logits(tiny_model(base.config)), expected) > 1e-3
    merged = adapted.merge_and_unload()
    assert relative(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert relative(logits(NextFlowForConditionalGeneration.from_pretrained(tmp_path)), expected) < 1e-5


@BY_DOOR
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_trains_layers_connector_and_heads(add, tied, tmp_path):
    """Each adapter gets a gradient; the frozen vision tokenizer has none, in what is loaded again as well."""
    config = tiny_config(tie_word_embeddings=tied)
    adapted = add(tiny_model(config), peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    parts = {".".join(name.split(".")[:2]) for name in adapters_of(adapted)}
    heads = {"code_head"} if tied else {"code_head", "lm_head"}
    assert parts == {"model.language_model", "model.connector"} | heads
    assert len(adapters_of(adapted)) == 2 * 7 + 2 + len(heads)
    inputs = batch(tiny_model(config))
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    expected = logits(adapted.eval())
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(config), tmp_path).eval()
    assert adapters_of(loaded) == adapters_of(adapted) and relative(logits(loaded), expected) < 1e-6


def test_adapters_on_all_layers_are_swapped_while_loaded(tmp_path):
    """PEFT's hotswap takes no weights below adapters, which PEFT saves of a head unless told."""
    for seed, name in enumerate(("first", "second")):
        model = tiny_model()
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "first").eval()
    assert not torch.equal(logits(loaded), logits(adapted))
    hotswap_adapter(loaded, tmp_path / "second", adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(loaded), logits(adapted))


@BY_DOOR
def test_names_of_layers_mean_the_decoders(add):
    """SigLIP2's layers have the same names."""
    adapted = add(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    layers = [f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert adapters_of(adapted) == {f"{layer}.{name}_proj" for layer in layers for name in "qv"}


@BY_DOOR
def test_adapters_of_the_vision_tokenizer_alone_are_refused(add):
    with pytest.raises(ValueError, match="frozen vision tokenizer or the scale embedding, got {'fc1'}"):
        add(tiny_model(), peft.LoraConfig(target_modules=["fc1"]))


@BY_DOOR
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_begin_by_changing_weights_leave_the_vision_tokenizer_alone(add, start):
    config = partial(peft.LoraConfig, r=2, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes weights.*load the model again"):
        add(tiny_model(), config(target_modules=["q_proj"]))
    before = tiny_model()
    for targets in ({"target_modules": ["q_proj"], "exclude_modules": LEFT_OUT}, {"target_modules": DECODER_LINEARS}):
        adapted = add(tiny_model(), config(**targets))
        after = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        for name, tensor in before.model.vq_model.state_dict().items():
            assert torch.equal(after.model.vq_model.get_parameter(name), tensor), name
        assert relative(logits(adapted), logits(before)) < 1e-5
    adapted.add_adapter(adapter_name="plain", **{ADAPTER[add]: peft.LoraConfig(target_modules=["q_proj"], r=2)})


@added_by_transformers
@pytest.mark.parametrize("first", ["all-linear", ["q_proj"]])
def test_a_second_adapter_is_placed_as_if_alone(first):
    """transformers' `add_adapter` twice: each adapter has its own places, all with a gradient."""
    model = tiny_model()
    for name, targets in (("first", first), ("second", "all-linear")):
        model.add_adapter(peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False), adapter_name=name)
    inputs = batch(tiny_model())
    for name, targets in (("first", first), ("second", "all-linear")):
        alone = tiny_model()
        alone.add_adapter(peft.LoraConfig(target_modules=targets, r=2), adapter_name=name)
        placed = {key for key, _ in alone.named_parameters() if ".lora_" in key}
        assert {key for key, _ in model.named_parameters() if ".lora_" in key and f".{name}." in key} == placed
        model.set_adapter(name)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(model.get_parameter(key).grad.abs().max() > 0 for key in placed)


@added_by_transformers
def test_a_second_adapter_of_the_vision_tokenizer_alone_is_refused():
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", r=2), adapter_name="first")
    with pytest.raises(ValueError, match="adapters of second would all sit on the frozen vision tokenizer"):
        model.add_adapter(peft.LoraConfig(target_modules=["fc1"], r=2), adapter_name="second")


def test_an_adapter_that_peft_adds_later_is_placed_before_training():
    """`PeftModel.add_adapter`, of which the model hears nothing."""
    config = lambda: peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)  # noqa: E731
    adapted = peft.get_peft_model(tiny_model(), config())
    alone = adapters_of(adapted)
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    inputs = batch(tiny_model())
    adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    second = {name for name, _ in adapted.named_parameters() if ".second." in name}
    assert {name.split(".lora_")[0].split("base_model.model.")[-1] for name in second} == alone
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == second and all(adapted.get_parameter(name).grad.abs().max() > 0 for name in second)
    assert set(adapted.peft_config) == {"default", "second"}


@pytest.mark.parametrize("active", ["default", ["default", "second"]])
def test_adapters_stay_as_they_were_set_where_another_finds_its_places(active):
    config = partial(peft.LoraConfig, target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model(), config())
    adapted.add_adapter("second", config())
    adapted.eval().set_adapter("default")
    adapted.add_adapter("third", config())
    adapted.base_model.set_adapter(active)
    expected = logits(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert torch.equal(logits(adapted.eval()), expected)
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
    assert any("lm_head" in name and "third" in name for name in adapted.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules="all-linear", r=2),
        peft.OFTConfig(target_modules="all-linear", r=0, oft_block_size=2),
    ],
)
def test_adapters_that_answer_in_float32_on_a_model_in_16_bits(config):
    adapted = peft.get_peft_model(tiny_model().bfloat16(), config)
    inputs = batch(adapted.get_base_model())
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


@BY_DOOR
def test_what_users_leave_out_themselves_is_left_out(add):
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], r=2)
    assert {name.rsplit(".")[-1] for name in adapters_of(add(tiny_model(), config))} & {"lm_head", "fc1"} == set()


@BY_DOOR
@pytest.mark.parametrize("part", ["vq_model", "quantizer", "pixel_decoder"])
def test_the_vision_tokenizer_is_not_saved_whole(add, part):
    with pytest.raises(ValueError, match=f"must not train the frozen vision tokenizer, got {part}"):
        add(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[part]))


def test_biases_of_the_vision_tokenizer_stay_frozen():
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear", bias="all", r=2))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("bias" in name for name in trained) and not any("vq_model" in name for name in trained)


def test_rows_of_embeddings_are_trained_beside_adapters():
    config = peft.LoraConfig(target_modules="all-linear", trainable_token_indices={"embed_tokens": [1, BOI]}, r=2)
    adapted = peft.get_peft_model(tiny_model(), config)
    before = train(adapted, batch(tiny_model()))
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("trainable_tokens_delta" in name for name in changed)
    assert not any("vq_model" in name for name in adapters_of(adapted))


SHARED = {
    "vblora_vector_bank": partial(peft.VBLoRAConfig, r=2, num_vectors=8, vector_length=8, topk=2),
    "tinylora_v": partial(peft.TinyLoraConfig, r=2),
}


@pytest.mark.parametrize("shared", SHARED)
def test_weights_that_adapters_share_are_trained(shared):
    """Those on the vision tokenizer's layers of the same names, which come off, had them too."""
    adapted = peft.get_peft_model(tiny_model(), SHARED[shared](target_modules=["q_proj"]))
    before = train(adapted, batch(adapted.get_base_model()))
    after = adapted.state_dict()
    assert any(shared in name and not torch.equal(after[name], before[name]) for name in after)


def test_methods_that_can_exclude_nothing():
    adapted = peft.get_peft_model(tiny_model(), peft.VeraConfig(target_modules="all-linear", r=2))
    layers = {name.split(".vera_")[0] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(layers) == 2 * 7 + 2 + 1 and not any("vq_model" in name for name in layers)


@pytest.mark.parametrize("targets", [["lm_head"], ["code_head"], ["lm_head", "code_head"]])
def test_adapters_on_heads_learn_from_the_loss_as_from_logits(targets):
    """The loss in chunks is the loss of the logits, with the same gradients."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model(), config)
    inputs = batch(adapted.get_base_model())
    ids = inputs["input_ids"]
    at_text = (ids < EOS) & (inputs["attention_mask"] == 1)
    words = ((7 * ids + 3) % EOS).masked_fill(~at_text, -100)

    def gradients(loss) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in adapted.parameters() if p.requires_grad])]

    by_loss = gradients(adapted(**inputs, shift_labels=words).loss)
    scores = adapted(**inputs).logits.flatten(0, 1)
    by_logits = gradients(torch.nn.functional.cross_entropy(scores, words.flatten()))
    assert len(by_loss) == 1 + 2 * len(config.target_modules)
    for ours, theirs in zip(by_loss, by_logits):
        assert relative(ours, theirs) < 1e-5


def test_the_connector_is_trained_and_saved_whole(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["connector"])
    adapted = peft.get_peft_model(tiny_model(), config)
    train(adapted, batch(adapted.get_base_model()))
    expected = logits(adapted.eval())
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected) and not torch.equal(logits(loaded), logits(tiny_model()))
    prompt = batch_of(tiny_model(), [1, 2, BOI])
    drawn = loaded.generate(**prompt, generation_mode="image", guidance_scale=1.0, seed=0)
    assert drawn.shape == (1, 11) or drawn.shape == (1, 14)


def test_settings_can_be_changed():
    config = lora_config(r=2, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 32, {"q_proj"})
    assert (lora_config().r, lora_config().lora_dropout) == (16, 0.0)


# QLoRA: adapters on a decoder in 4 bits


@pytest.fixture
def four_bit_folder(tmp_path):
    """A checkpoint whose linear layers fill bitsandbytes' blocks of 64."""
    model = tiny_model(tiny_config(text={"hidden_size": 64, "intermediate_size": 128}))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_in_4bit(folder) -> NextFlowForConditionalGeneration:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return NextFlowForConditionalGeneration.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def test_adapters_on_4_bits_train_and_come_back(four_bit_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole, model = NextFlowForConditionalGeneration.from_pretrained(four_bit_folder), load_in_4bit(four_bit_folder)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantised) == 2 * 7 and all("language_model.layers." in name for name in quantised)
    for ours, theirs in zip(model.model.vq_model.parameters(), whole.model.vq_model.parameters()):
        assert torch.equal(ours, theirs), "the vision tokenizer is as it was"
    load_stages()["sft"].prepare(model)
    adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model, False), lora_config(r=4)).train()
    trained = {name: parameter.dtype for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 + 2 and set(trained.values()) == {torch.float32}
    inputs = batch(whole)
    with torch.no_grad():
        first = adapted(**inputs, labels=inputs["input_ids"]).loss
    before = train(adapted, inputs, rate=0.1)
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name or ".modules_to_save." in name for name in changed)
    adapted.eval()
    with torch.no_grad():
        assert adapted(**inputs, labels=inputs["input_ids"]).loss < first
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = peft.prepare_model_for_kbit_training(load_in_4bit(four_bit_folder), False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_4_bits_name_the_missing_package(four_bit_folder):
    with pytest.raises(ImportError, match="requires bitsandbytes"):
        load_in_4bit(four_bit_folder)


# An adapter for each prompt


PARTS = ["q_proj", "up_proj", "connector.0", "connector.2", "lm_head", "code_head", "embed_tokens"]
PLACES = {
    "parts": partial(peft.LoraConfig, target_modules=PARTS),
    "all-linear": partial(peft.LoraConfig, target_modules="all-linear"),
    "whole parts": lora_config,
}


@pytest.fixture(params=PLACES)
def two_adapters(request):
    """On all that a call may run, and far from doing nothing; the second one is PEFT's alone to place."""
    config = partial(PLACES[request.param], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config(), adapter_name="a")
    model.add_adapter("b", config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save.b" in name:
                weight.neg_()
    return model.eval()


NAMES = ["a", "__base__", "b", "a"]
CHATS = [[10, 11, 12], [13], [14, Picture(SQUARE, 1, last_scale=True), 15], [16, 17]]
NULLS = [[20], [20, 21, 22], [23, Picture(SQUARE, 1, last_scale=True)], [20]]
CALLS = {
    "guided": {"generation_mode": "image", "guidance_scale": 2.0, "aspect_ratio": "1:1", "image_guidance_scale": 1.5},
    "several": {"generation_mode": "image", "guidance_scale": 2.0, "aspect_ratio": "1:1", "num_images_per_prompt": 2},
    "refined": {"generation_mode": "image", "guidance_scale": 1.0, "aspect_ratio": "1:1", "refine_top_k": [3]},
    "interleaved": {
        **{"generation_mode": "interleaved", "image_generation": {"guidance_scale": 2.0}, "max_new_tokens": 8},
        **{"sequence_bias": {(BOI,): 6.0}, "max_new_images": 2},
    },
}


def draw(model, call: str, rows: list[int], **kwargs) -> list[torch.Tensor]:
    """What is drawn for each of some chats."""
    base = model.get_base_model()
    inputs, negative = (batch_of(base, *(chats[row] for row in rows)) for chats in (CHATS, NULLS))
    nulls = {f"negative_{name}": negative[name] for name in ("input_ids", "attention_mask")}
    drawn = model.generate(**inputs, **nulls, **CALLS[call], seed=rows, **kwargs)
    if call != "interleaved":
        return list(drawn.view(len(rows), -1))
    answers = zip(drawn.sequences[:, drawn.prompt_length :], drawn.attention_mask[:, drawn.prompt_length :])
    return [ids[mask.bool()] for ids, mask in answers]


@pytest.mark.parametrize("call", CALLS)
def test_each_prompt_has_its_adapter(two_adapters, call):
    """Rows of a call that draws are more than its prompts; each is drawn as with its adapter alone."""
    together = draw(two_adapters, call, [0, 1, 2, 3], adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with two_adapters.disable_adapter():
                (alone,) = draw(two_adapters, call, [row])
        else:
            two_adapters.set_adapter(name)
            (alone,) = draw(two_adapters, call, [row])
        assert torch.equal(together[row], alone), name
    with two_adapters.disable_adapter():
        plain = draw(two_adapters, call, [0, 1, 2, 3])
    assert any(not torch.equal(mine, other) for mine, other in zip(together, plain))
    assert not any(module._forward_pre_hooks for module in two_adapters.modules())


def test_each_description_has_its_adapter(two_adapters):
    inputs = batch_of(two_adapters.get_base_model(), *CHATS)
    together = two_adapters.generate(
        **inputs,
        **{"adapter_names": NAMES, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None},
        **{"output_logits": True, "return_dict_in_generate": True},
    )
    for row, name in enumerate(NAMES):
        with two_adapters.disable_adapter() if name == "__base__" else nullcontext():
            two_adapters.set_adapter("a" if name == "__base__" else name)
            outputs = two_adapters(**batch_of(two_adapters.get_base_model(), CHATS[row]), logits_over="text")
        assert relative(together.logits[0][row], outputs.logits[0, -1]) < 1e-5, name


def test_each_row_has_its_adapters_loss(two_adapters):
    """Heads see the supervised positions of all rows as one."""
    base = two_adapters.get_base_model()
    chats = [[10, 11, 12], [13, Picture(WIDE), 14], [14, Picture(SQUARE, 1), 15], [16, Picture(SQUARE), 17]]

    def losses(*rows: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = batch_of(base, *(chats[row] for row in rows))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = two_adapters(**inputs, labels=labels, num_items_in_batch=1.0, **kwargs)
        return outputs.loss, outputs.token_losses

    together, token_losses = losses(0, 1, 2, 3, adapter_names=NAMES)
    alone = []
    for row, name in enumerate(NAMES):
        with two_adapters.disable_adapter() if name == "__base__" else nullcontext():
            two_adapters.set_adapter("a" if name == "__base__" else name)
            loss, own = losses(row)
        assert relative(token_losses[row, -own.shape[1] :], own[0]) < 1e-5, name
        alone.append(loss)
    assert relative(together, sum(alone)) < 1e-5


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "code_head"]])
def test_the_loss_without_adapters_is_that_of_the_model_below(targets):
    """Nothing is trained then, though weights of adapters are there to be."""
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model(), config)
    inputs = batch(tiny_model())
    with adapted.disable_adapter():
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    assert torch.equal(loss, tiny_model()(**inputs, labels=inputs["input_ids"]).loss)


def test_adapters_of_other_prompts_are_refused(two_adapters):
    with pytest.raises(ValueError, match="adapter_names must hold one for each of 4 prompts, got 2"):
        draw(two_adapters, "guided", [0, 1, 2, 3], adapter_names=["a", "b"])


@pytest.mark.parametrize("training", [True, False])
def test_a_learned_prefix_of_texts(training):
    """PEFT gives it as a filled cache, with a mask that is longer than the ids."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), config).train(training)
    inputs = batch_of(model.get_base_model(), [10, 11, 12, 13], [14, 15])
    outputs = model(**inputs, labels=inputs["input_ids"])
    targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten())
    assert relative(outputs.loss, expected) < 1e-5
    outputs.loss.backward()
    (weight,) = (weight for weight in model.parameters() if weight.requires_grad)
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_a_learned_prompt_is_of_text_alone(kind):
    """Where pictures are drawn or read it would count for nothing, or shift what follows them."""
    model = peft.get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    text = batch_of(model.get_base_model(), [10, 11, 12], [13])
    greedy = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert model.generate(**text, **greedy).shape == (2, 5)
    shown = batch_of(model.get_base_model(), [10, Picture(SQUARE, 1, last_scale=True), 11])
    for inputs, mode in ((text, "image"), (text, "interleaved"), (shown, "image"), (shown, "text")):
        with pytest.raises(ValueError, match="has learned goes before text alone"):
            model.generate(**inputs, generation_mode=mode)
    assert model.generate(**text, **greedy).shape == (2, 5)
    assert model.get_base_model().generate(**shown, **greedy).shape == (1, shown["input_ids"].shape[1] + 2)


def test_a_learned_prompt_cannot_be_merged(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"a learned prompt \(PROMPT_TUNING\) cannot be merged"):
        load_merged(str(tmp_path / "prompt"))


def invoked_by(tokens: list[int], **settings):
    config = lora_config(alora_invocation_tokens=tokens, init_lora_weights=False, modules_to_save=None, **settings)
    return peft.get_peft_model(tiny_model(), config).eval()


def test_adapters_that_tokens_switch_on_answer_in_text():
    """Also about pictures; a prompt without these tokens is answered by the model below."""
    adapted, plain = invoked_by([4, 5], r=2), tiny_model()
    prompts = [batch_of(plain, [1, Picture(SQUARE, last_scale=True), *ids]) for ids in ([4, 5, 6], [5, 4, 6])]
    for inputs, is_same in zip(prompts, (False, True)):
        found, expected = (model(**inputs).logits.detach() for model in (adapted, plain))
        assert torch.equal(found[:, :-3], expected[:, :-3]) and torch.equal(found, expected) == is_same
        answer = adapted.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert relative(answer.logits[0], found[:, -1, : plain.config.text_vocab_size]) < 1e-5


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_adapters_that_tokens_switch_on_do_not_draw(mode):
    adapted = invoked_by([4, 5], r=2)
    with pytest.raises(ValueError, match="adapters of alora_invocation_tokens write text alone"):
        adapted.generate(**batch_of(adapted.get_base_model(), [1, 4, 5]), generation_mode=mode)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "code_head"]])
def test_adapters_that_tokens_switch_on_sit_on_layers(targets):
    with pytest.raises(ValueError, match="sit on the decoder's layers, .* got .*code_head"):
        invoked_by([4, 5], target_modules=targets)


@BY_DOOR
def test_parameters_of_the_vision_tokenizer_are_no_targets(add):
    with pytest.raises(ValueError, match="adapters of default would all sit on the frozen vision tokenizer"):
        add(tiny_model(), peft.LoraConfig(target_parameters=["quantizer.semantic_codebook"], r=2))


def test_adapters_on_parameters(tmp_path):
    config = peft.LoraConfig(target_parameters=["code_head.weight"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()), logits(model))
    assert not torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.parametrize("name", ["connector", "scale_embedding", "lm_head"])
def test_any_part_is_trained_and_saved_whole(name, tmp_path):
    """PEFT's wrapper stands where the part stood."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=[name])
    model = peft.get_peft_model(tiny_model(), config)
    before = train(model, batch(model.get_base_model()))
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert any(f"{name}.modules_to_save.default" in key for key in changed)
    assert not any("original_module" in key for key in changed)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()), logits(model))
