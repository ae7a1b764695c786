"""What users of transformers expect of any model: loading, dtypes, caches, compilation, pipelines, adapters."""

import copy
import io
import pickle
from itertools import cycle

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    StaticCache,
    pipeline,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.adapters import added_by_transformers
from tests.tiny_models import (
    BOI,
    CODES,
    SQUARE,
    TEXT_ROWS,
    WIDE,
    Picture,
    batch_of,
    refer_to,
    relative,
    shown,
    tiny_config,
    tiny_model,
)
from transformers_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowModel,
    NextFlowVQModel,
)
from transformers_nextflow.cli import main
from transformers_nextflow.data.shards import vision_identity
from transformers_nextflow.layout import build_layout
from transformers_nextflow.utils import loading
from transformers_nextflow.utils.loading import load_vision_tokenizer, load_vq_model, same_weights, source_name
from transformers_nextflow.utils.safetensors_folder import listing

ROWS = ([10, shown(SQUARE, 1), 11], [12, 13, shown(WIDE, 2), 14, 15])


@pytest.fixture(scope="module")
def model() -> NextFlowForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def warnings_of_the_library(caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    return caplog


def rewrite(folder, change) -> None:
    """Apply `change` to the tensors of a checkpoint."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


# Loading


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_changes_nothing(model, folder, device_map):
    pytest.importorskip("accelerate")
    loaded = NextFlowForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    batch = batch_of(model, *ROWS)
    assert torch.equal(logits_of(loaded.cpu(), batch), logits_of(model, batch))


@pytest.mark.parametrize("how", ["loaded", "cast", "loaded alone", "built"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pictures_have_their_codes_in_any_precision(model, folder, how, dtype, tmp_path):
    """Those that shards hold, and the name that shards know their tokenizer by; decoded pictures are the same too."""
    vq_model = model.model.vq_model
    if how == "loaded":
        other = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=dtype).model.vq_model
    elif how == "cast":
        other = copy.deepcopy(model).to(dtype).model.vq_model
    elif how == "loaded alone":
        vq_model.save_pretrained(tmp_path / "alone")
        other = NextFlowVQModel.from_pretrained(tmp_path / "alone", dtype=dtype)
    else:
        other = NextFlowVQModel._from_config(copy.deepcopy(vq_model.config), dtype=dtype)
        other.load_state_dict(vq_model.state_dict())
    pixels = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = vq_model.encode(pixels)
    assert len(codes.unique()) > 10 and torch.equal(other.encode(pixels), codes)
    assert torch.equal(other.encode(pixels.double()), codes)
    assert torch.equal(other.decode(codes, SQUARE), vq_model.decode(codes, SQUARE))
    assert vision_identity(other) == vision_identity(vq_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_assigned_tensors_take_the_place_of_their_values(model, dtype):
    """`assign=True` keeps tensors as they are given, but for those that are always float32."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    copied, assigned = (tiny_model(seed=1) for _ in range(2))
    for other, assign in ((copied, False), (assigned, True)):
        other.load_state_dict(state, assign=assign)
    assert assigned.lm_head.weight.dtype == dtype
    vq_models = [other.model.vq_model for other in (copied, assigned)]
    pixels = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, others = (each.encode(pixels) for each in vq_models)
    assert torch.equal(codes, others)
    pictures, others = (each.decode(codes, SQUARE) for each in vq_models)
    assert torch.equal(pictures, others)
    embeddings, others = (other.model.code_embeddings.weight for other in (copied, assigned))
    assert torch.equal(embeddings, others.float()) and others.dtype.itemsize >= 4
    assert logits_of(assigned, batch_of(model, *ROWS)).dtype == dtype


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
def test_a_model_that_was_used_is_copied(duplicate):
    used = tiny_model()
    pixels = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"generation_mode": "image", "guidance_scale": 1.0, "seed": 0}
    codes, drawn = used.model.vq_model.encode(pixels), used.generate(**batch_of(used, [10, BOI]), **options)
    used.train()(**batch_of(used, *ROWS), use_cache=False).logits.sum().backward()
    copied = duplicate(used.eval())
    assert torch.equal(copied.model.vq_model.encode(pixels), codes)
    assert torch.equal(copied.generate(**batch_of(copied, [10, BOI]), **options), drawn)
    assert torch.equal(logits_of(copied, batch_of(copied, *ROWS)), logits_of(used, batch_of(used, *ROWS)))


def test_rounded_encoders_are_another_vision_tokenizer(model):
    other = copy.deepcopy(model.model.vq_model)
    with torch.no_grad():
        for parameter in other.pixel_encoder.parameters():
            parameter.copy_(parameter.bfloat16())
    assert vision_identity(other) != vision_identity(model.model.vq_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_stay_float32_in_a_half_model(model, folder, dtype):
    loaded = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype and loaded.code_head.weight.dtype == dtype
    assert loaded.model.code_embeddings.weight.dtype == torch.float32
    assert torch.equal(loaded.model.vq_model.quantizer(), model.model.vq_model.quantizer())
    assert loaded.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    logits = logits_of(loaded, batch_of(model, *ROWS))
    assert logits.dtype == dtype and relative(logits.float(), logits_of(model, batch_of(model, *ROWS))) < 0.1
    codes = loaded.generate(**batch_of(model, [10, BOI]), generation_mode="image", guidance_scale=1.0, seed=0)
    assert codes.min() >= TEXT_ROWS and loaded.decode_image_tokens(codes).dtype == torch.float32


def test_a_vision_tokenizer_on_the_hub_comes_from_where_the_model_does(model, tmp_path):
    """From the cache that is named, without a call where none is wanted."""
    refer_to("owner/name", model, tmp_path / "checkpoint")
    stored = tmp_path / "cache" / "models--owner--name"
    model.save_pretrained(stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", **options)
    assert vision_identity(loaded.model.vq_model) == vision_identity(model.model.vq_model)


@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
)
def test_auto_classes_load_with_the_vision_tokenizer_or_without(model, auto, tmp_path):
    """As the classes themselves, of a checkpoint that refers to its own; a configuration holds no such answer."""
    model.save_pretrained(tmp_path / "whole")
    refer_to(str(tmp_path / "whole"), model, tmp_path / "checkpoint")
    for said, is_there in (({}, True), ({"vision_tokenizer": True}, True), ({"vision_tokenizer": False}, False)):
        loaded = auto.from_pretrained(tmp_path / "checkpoint", **said)
        assert isinstance(loaded.base_model.vq_model, NextFlowVQModel) == is_there
        assert (loaded.config.vision_tokenizer is None) == is_there
        assert isinstance(auto.from_pretrained(tmp_path / "whole", **said).base_model.vq_model, NextFlowVQModel)
    with pytest.raises(StrictDataclassFieldValidationError, match="vision_tokenizer"):
        AutoConfig.from_pretrained(tmp_path / "checkpoint", vision_tokenizer=False)


def test_missing_weights_are_initialised_as_at_the_start(folder, warnings_of_the_library):
    """SigLIP2's layers by its own rules, not as plain linear ones; and the library's report says what is missing."""

    def change(tensors):
        for name in list(tensors):
            if "semantic_encoder" in name or name == "code_head.weight" or "code_embeddings" in name:
                del tensors[name]

    rewrite(folder, change)
    loaded = NextFlowForConditionalGeneration.from_pretrained(folder)
    assert "code_head.weight" in warnings_of_the_library.text and "MISSING" in warnings_of_the_library.text
    biases = loaded.model.vq_model.semantic_encoder.encoder.layers[0].mlp.fc1.bias
    assert 0 < biases.abs().max() < 1e-4
    assert torch.equal(loaded.model.code_embeddings.weight, loaded.model.vq_model.quantizer())


def test_extra_weights_are_reported(folder, warnings_of_the_library):
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    NextFlowForConditionalGeneration.from_pretrained(folder)
    assert "model.extra.weight" in warnings_of_the_library.text and "UNEXPECTED" in warnings_of_the_library.text


def test_misshapen_weights_are_an_error(folder):
    rewrite(folder, lambda tensors: tensors.update({"code_head.weight": torch.zeros(CODES + 1, 32)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        NextFlowForConditionalGeneration.from_pretrained(folder)


def test_whether_a_name_is_of_adapters_is_asked_once(tiny_checkpoint, tiny_model, tmp_path, monkeypatch):
    """Of the Hub that is a request."""
    asked = []
    find = loading.find_adapter_config_file
    monkeypatch.setattr(loading, "find_adapter_config_file", lambda name: asked.append(name) or find(name))
    tiny_model.model.vq_model.save_pretrained(tmp_path)
    for load, name in (
        (loading.load_config, tiny_checkpoint),
        (loading.load_processor, tiny_checkpoint),
        (loading.load_merged, tiny_checkpoint),
        (load_vq_model, tmp_path),
    ):
        load(str(name))
        assert asked == [str(name)], load
        asked.clear()
    loading.load_model(str(tiny_checkpoint))
    assert len(asked) == 2  # the weights', and the processor's


@pytest.mark.parametrize("shards_remain", [False, True])
def test_an_index_beside_a_whole_file_is_passed_over(tiny_checkpoint, tiny_processor, tmp_path, shards_remain):
    """As transformers does, which leaves the index of an earlier saving, or another program the shards too."""
    folder, model = tmp_path / "model", NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_processor.save_pretrained(folder)
    shards = {path: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    with torch.no_grad():
        model.model.vq_model.pixel_encoder.to_code.bias += 1
    model.save_pretrained(folder)
    for path, content in shards.items() if shards_remain else ():
        path.write_bytes(content)
    assert (folder / "model.safetensors.index.json").exists() and len(shards) > 1
    loaded = NextFlowForConditionalGeneration.from_pretrained(folder)
    assert vision_identity(loaded.model.vq_model) == vision_identity(model.model.vq_model)
    assert vision_identity(load_vq_model(str(folder))) == vision_identity(model.model.vq_model)
    assert main(["export", str(folder), "--to", str(tmp_path / "exported")]) == 0
    assert [path.name for path in (tmp_path / "exported").glob("model*.s*")] == ["model.safetensors"]
    assert vision_identity(load_vq_model(str(tmp_path / "exported"))) == vision_identity(model.model.vq_model)


@pytest.mark.parametrize("damage", ["cut", "missing", "misshapen"])
def test_the_command_line_names_unreadable_weights(tiny_checkpoint, tmp_path, capsys, damage):
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage == "cut":
        (path,) = tmp_path.glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:5000])
    else:
        weight = torch.zeros(3, 32)
        rewrite(tmp_path, lambda tensors: tensors.update({"code_head.weight": weight}))
        if damage == "missing":
            rewrite(tmp_path, lambda tensors: tensors.pop("code_head.weight"))
    assert main(["generate", "a", "--model", str(tmp_path), "--output", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the weights in {tmp_path} ")
    assert damage == "cut" or damage == "misshapen" or "lack 1 tensors, code_head.weight among them" in error


def test_quantised_loading_leaves_vision_tokenizer_and_heads_alone(model):
    """By the library's own helper, which every quantiser asks."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    converted = {name for name in linear if should_convert_module(name, kept)}
    assert converted == {name for name in linear if name.startswith("model.language_model.")}
    kept_of_base = HfQuantizer.get_modules_to_not_convert(model.model, None, model.model._keep_in_fp32_modules)
    assert not should_convert_module("vq_model.semantic_encoder.encoder.layers.0.mlp.fc1", kept_of_base)


QUANTISED = {
    "4 bits": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("bits", QUANTISED)
def test_a_quantised_model_draws_reads_and_answers(bits, tmp_path):
    """What it holds beside the decoder's layers is exact, and with it codes and pictures."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole = tiny_model(tiny_config(text={"hidden_size": 64, "intermediate_size": 128}))
    whole.save_pretrained(tmp_path)
    settings = QUANTISED[bits]()
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    quantised = [module for module in loaded.modules() if "bitsandbytes" in type(module).__module__]
    batch = batch_of(whole, *ROWS)
    read = batch["attention_mask"].bool()
    likeness = torch.cosine_similarity(*(logits_of(each, batch)[read].float() for each in (loaded, whole)), dim=-1)
    assert len(quantised) == 2 * 7 and 0.9 < likeness.mean() < 0.99999
    pixels = torch.rand(9 + 8, 48) * 2 - 1
    assert torch.equal(loaded.encode_images(pixels, [SQUARE, WIDE]), whole.encode_images(pixels, [SQUARE, WIDE]))
    prompt = batch_of(whole, [10, Picture(SQUARE, 1, last_scale=True), BOI])
    codes = loaded.generate(**prompt, generation_mode="image", guidance_scale=1.0, seed=0)
    assert torch.equal(loaded.decode_image_tokens(codes), whole.decode_image_tokens(codes))
    answer = loaded.generate(**batch, generation_mode="interleaved", image_generation={"guidance_scale": 1.0}, seed=0)
    assert answer.sequences.shape[1] > batch["input_ids"].shape[1]


def test_more_text_rows_leave_everything_as_it_is(model, tmp_path):
    """Codes follow the text rows, so their ids move; new rows are drawn by no one."""
    larger = tiny_model()
    larger.resize_token_embeddings(TEXT_ROWS + 8)
    larger.save_pretrained(tmp_path)
    batch = batch_of(model, *ROWS)
    drawing = batch_of(model, [10, BOI]) | {"generation_mode": "image", "guidance_scale": 1.0, "seed": 0}
    expected, codes = logits_of(model, batch), model.generate(**drawing)
    for each in (larger, NextFlowForConditionalGeneration.from_pretrained(tmp_path)):
        text, added, of_codes = logits_of(each, batch).split([TEXT_ROWS, 8, CODES], dim=-1)
        assert torch.equal(torch.cat([text, of_codes], dim=-1), expected)
        drawn = each.generate(**drawing)
        assert torch.equal(drawn - 8, codes)
        assert torch.equal(each.decode_image_tokens(drawn), model.decode_image_tokens(codes))


@pytest.mark.parametrize("part", ["", "model"])
def test_rows_of_boi_image_and_eoi_stay(part):
    smaller = tiny_model(tiny_config(text={"vocab_size": TEXT_ROWS + 8})).get_submodule(part)
    with pytest.raises(ValueError, match=f"new_num_tokens must be at least {TEXT_ROWS}, .* got {TEXT_ROWS - 1}$"):
        smaller.resize_token_embeddings(TEXT_ROWS - 1)
    assert smaller.resize_token_embeddings().num_embeddings == TEXT_ROWS + 8
    assert smaller.resize_token_embeddings(TEXT_ROWS).num_embeddings == TEXT_ROWS
    assert smaller.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 64


# Forward


@pytest.mark.parametrize("by_config", [False, True])
def test_forward_gives_tuples(model, by_config):
    asked = tiny_model(tiny_config(return_dict=False)) if by_config else model
    call = {} if by_config else {"return_dict": False}
    batch = batch_of(model, [10, Picture(SQUARE, 1), 11], [12, 13, Picture(WIDE, 2), 14])
    for inputs in (batch, batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}):
        for part, whole in ((asked, model), (asked.model, model.model)):
            with torch.no_grad():
                found, expected = part(**inputs, **call), whole(**inputs).to_tuple()
            assert isinstance(found, tuple) and len(found) == len(expected)
            assert torch.equal(found[0], expected[0])
    pixels = torch.rand(1, 3, 12, 12)
    vq_model = model.model.vq_model
    assert torch.equal(vq_model(pixels, return_dict=False)[0], vq_model(pixels).reconstruction)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_model_whose_calls_give_tuples_generates(model, mode):
    batch = batch_of(model, [10, shown(SQUARE, 1), 11])
    call = (
        batch
        | {"generation_mode": mode, "return_dict_in_generate": True}
        | ({"guidance_scale": 1.0, "seed": 0} if mode == "image" else {"max_new_tokens": 4, "do_sample": False})
    )
    found = tiny_model(tiny_config(return_dict=False)).generate(**call)
    assert torch.equal(found.sequences, model.generate(**call).sequences)


def test_embeddings_in_place_of_ids(model):
    batch = batch_of(model, [10, Picture(SQUARE, 1), 11], [12, 13, Picture(WIDE, 2), 14, 15])
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        by_ids = model(input_ids=ids, labels=labels, **batch)
        by_embeds = model(inputs_embeds=embeds, labels=labels, **batch)
    assert torch.equal(by_embeds.logits, by_ids.logits) and torch.equal(by_embeds.loss, by_ids.loss)
    near = embeds.clone()  # no marker is what is merely above or below one
    near[0, 2] = model.get_input_embeddings().weight.amax(0) + 1
    assert model.model.marker_ids(near)[0, 2] == -1 and model.model.marker_ids(near - 2)[0, 2] == -1


def test_attention_is_set_on_every_part(model):
    other = tiny_model()
    other.set_attn_implementation("eager")
    parts = [part for part in other.modules() if isinstance(part, transformers.PreTrainedModel)]
    assert len(parts) == 6 and {part.config._attn_implementation for part in parts} == {"eager"}
    batch = batch_of(model, *ROWS)
    read = batch["attention_mask"].bool()
    assert relative(logits_of(other, batch)[read], logits_of(model, batch)[read]) < 1e-5
    pixels = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        features, expected = (m.model.vq_model(pixels).semantic_features for m in (other, model))
    assert relative(features, expected) < 1e-5


def test_nothing_supervised_is_nan_alone_and_zero_in_a_larger_step(model):
    """As of the library's models."""
    batch = batch_of(model, *ROWS)
    labels = torch.full_like(batch["input_ids"], -100)
    with torch.no_grad():
        assert model(**batch, labels=labels).loss.isnan()
        assert model(**batch, labels=labels, num_items_in_batch=7).loss == 0


# Generation


def test_static_cache_is_dynamic_cache(model):
    for rows in (ROWS, ([10, 11], [12, 13, 14])):
        batch = batch_of(model, *rows)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        dynamic = model.generate(**batch, **options)
        # compiled on accelerators; here the masks are what is compared
        static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, dynamic)


@pytest.mark.parametrize("is_read", [False, True], ids=["no cache", "cache"])
def test_pictures_without_their_grids_are_not_taken_for_text(model, is_read):
    """As they would be, at other positions than those they were read at."""
    batch, options = batch_of(model, *ROWS), {"max_new_tokens": 2, "do_sample": False}
    ids, cache = batch["input_ids"], {}
    if is_read:
        first = model.generate(**batch, **options, return_dict_in_generate=True)
        ids, cache = first.sequences, {"past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="hold <image> tokens, but no image_grid_hw came"):
        model.generate(ids, **cache, **options)


def test_positions_behind_pictures_are_not_guessed(model):
    """In a loop of one's own, and where `generate` gets the new text alone; behind text they follow from the cache."""
    for row, names in (([10, 11, 12], []), (ROWS[0], ["image_grid_hw", "image_codes"])):
        batch = batch_of(model, row)
        whole = torch.cat([batch["input_ids"], torch.tensor([[20, 21]])], dim=1)
        images = {name: batch[name] for name in names}
        positions = build_layout(model.config, whole, images.get("image_grid_hw")).position_ids[..., -2:]
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            expected = model(whole, **images).logits[:, -2:]
            given = model(whole[:, -2:], position_ids=positions, past_key_values=copy.deepcopy(cache)).logits
            assert relative(given, expected) < 1e-5
        options = {"past_key_values": cache, "max_new_tokens": 3, "do_sample": False}
        if names:
            with pytest.raises(ValueError, match="past_key_values hold images"):
                model(whole[:, -2:], past_key_values=cache)
            with pytest.raises(ValueError, match="past_key_values hold images"):
                model.generate(whole[:, -2:], attention_mask=torch.ones_like(whole), **options)
        else:
            assert relative(model(whole[:, -2:], past_key_values=copy.deepcopy(cache)).logits, expected) < 1e-5
            continued = model.generate(whole[:, -2:], attention_mask=torch.ones_like(whole), **options)
            assert torch.equal(continued[:, 2:], model.generate(whole, max_new_tokens=3, do_sample=False)[:, -3:])


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_padded_texts_continue_at_their_own_positions(model, is_static):
    """In a loop of one's own, which gives the mask of all that was read."""
    batch, new = batch_of(model, [10, 11, 12, 13], [14, 15]), torch.tensor([[20, 21], [22, 23]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=8) if is_static else None
    with torch.no_grad():
        expected = model(torch.cat([batch["input_ids"], new], dim=1), attention_mask=mask).logits[:, -2:]
        cache = model(**batch, past_key_values=cache, use_cache=True).past_key_values
        continued = model(new, attention_mask=mask, past_key_values=cache).logits
    assert relative(continued, expected) < 1e-5


def test_a_cache_that_was_reset_holds_text(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    options = {"past_key_values": cache, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    model.generate(**batch_of(model, ROWS[0]), **options)
    cache.reset()
    first = model.generate(torch.tensor([[10, 11]]), **options)
    assert torch.equal(model.generate(first, **options), model.generate(first, **options | {"past_key_values": None}))


def test_text_continues_from_a_cache_that_holds_its_pictures(model):
    batch = batch_of(model, ROWS[0])
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(**batch, **options, max_new_tokens=5).sequences
    first = model.generate(**batch, **options, max_new_tokens=2)
    rest = batch | {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    continued = model.generate(**rest, **options, past_key_values=first.past_key_values, max_new_tokens=3).sequences
    assert torch.equal(continued, whole)
    second = model.generate(**batch, **options, max_new_tokens=2)
    turn = batch_of(model, [*second.sequences[0].tolist()])
    turn["input_ids"] = torch.cat([turn["input_ids"], batch["input_ids"]], dim=1)
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    turn |= {"image_grid_hw": batch["image_grid_hw"].repeat(2, 1), "image_codes": batch["image_codes"].repeat(2)}
    with pytest.raises(ValueError, match="images cannot be given with a filled cache"):
        model.generate(**turn, **options, past_key_values=second.past_key_values, max_new_tokens=2)


GRIDS = [[[1, 1], [2, 2], [3, 3], [4, 4]], [[1, 1], [2, 3], [3, 4], [4, 6]]]


@pytest.mark.slow
def test_scale_steps_compile_once_for_all_grids():
    """The decoder compiled with dynamic shapes: another grid, another prompt length bring no new graph."""
    torch._dynamo.reset()
    model = tiny_model(tiny_config({"num_hidden_layers": 1}, {"scale_schedules": GRIDS, "levels": {"16": 4}}))
    counter = CompileCounter()
    options = {"generation_mode": "image", "guidance_scale": 1.0, "seed": 0}
    sizes = [{"height": 16, "width": 16}, {"height": 16, "width": 24}]
    prompts = [batch_of(model, [10, BOI]), batch_of(model, [10, 11, 12, BOI])]
    expected = [model.generate(**prompt, **size, **options) for prompt, size in zip(prompts, sizes)]
    decoder = model.model.language_model
    decoder.forward = torch.compile(decoder.forward, backend=counter, dynamic=True)
    assert torch.equal(model.generate(**prompts[0], **sizes[0], **options), expected[0])
    graphs = counter.frame_count
    assert 0 < graphs
    assert torch.equal(model.generate(**prompts[1], **sizes[1], **options), expected[1])
    assert counter.frame_count == graphs


def test_guided_scale_steps_are_one_graph_for_prompts_of_any_length_and_all_grids():
    """After the first prompt: its first step is of one length yet, and the last one keeps no keys."""
    torch._dynamo.reset()
    vq, counter = {"scale_schedules": GRIDS, "levels": {"16": 4}}, CompileCounter()
    model = tiny_model(tiny_config({"num_hidden_layers": 1}, vq))
    null = {"negative_input_ids": torch.tensor([[20, BOI]])}
    options = {"generation_mode": "image", "guidance_scale": 3.0, "seed": 0, "height": 16}
    prompts = [
        batch_of(model, [*range(10, 10 + length), BOI]) | null | {"width": width}
        for length, width in zip(range(2, 12), cycle((16, 16, 24)))
    ]
    expected = [model.generate(**prompt, **options) for prompt in prompts]
    decoder = model.model.language_model
    decoder.forward = torch.compile(decoder.forward, backend=counter, dynamic=True, fullgraph=True)
    graphs = []
    for prompt, codes in zip(prompts, expected):
        assert torch.equal(model.generate(**prompt, **options), codes)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}


def test_custom_generate_gets_the_models_inputs(model):
    def first_token(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        logits = model(**inputs).logits[:, -1]
        return torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)

    batch = batch_of(model, *ROWS)
    expected = model.generate(**batch, max_new_tokens=1, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(**batch, custom_generate=first_token, max_new_tokens=1), expected)


# Pipelines


def test_pipeline_of_pictures_and_text_to_text(tiny_model, tiny_processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "describe"}]}]
    describe = pipeline("image-text-to-text", model=tiny_model, processor=tiny_processor)
    (output,) = describe(text=chat, max_new_tokens=4, return_full_text=False)
    inputs = tiny_processor.apply_chat_template(chat)
    ids = tiny_model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    (expected,) = tiny_processor.post_process_multimodal_output(ids)
    assert output["generated_text"] == expected


@pytest.mark.skipif(transformers.utils.is_torchvision_available(), reason="torchvision is installed")
def test_pipeline_any_to_any_asks_for_torchvision(tiny_model, tiny_processor):
    with pytest.raises(ImportError, match="[Tt]orchvision"):
        pipeline("any-to-any", model=tiny_model, processor=tiny_processor)


# Adapters


@added_by_transformers
def test_adapters_of_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = tiny_model()
    batch = batch_of(model, *ROWS)
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    logits = logits_of(adapted, batch)
    assert relative(logits, logits_of(model, batch)) > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.disable_adapters()
    assert torch.equal(logits_of(adapted, batch), logits_of(model, batch))
    again = tiny_model()
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits_of(again.eval(), batch), logits)


def test_parts_load_from_the_whole(model, folder):
    base = NextFlowModel.from_pretrained(folder)
    batch = batch_of(model, *ROWS)
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    model.model.vq_model.save_pretrained(folder / "vq")
    pixels = torch.rand(1, 3, 12, 12)
    alone = NextFlowVQModel.from_pretrained(folder / "vq")
    assert torch.equal(alone.encode(pixels), model.model.vq_model.encode(pixels))


@pytest.mark.parametrize("whole", [True, False])
def test_a_vision_tokenizer_comes_out_of_a_model_or_alone_and_saves_alone(tiny_checkpoint, tmp_path, whole):
    expected = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint).model.vq_model
    expected.save_pretrained(tmp_path / "alone")
    loaded = load_vq_model(str(tiny_checkpoint if whole else tmp_path / "alone"))
    loaded.save_pretrained(tmp_path / "again")
    of_config = NextFlowImageProcessor.from_vq_config(loaded.config)
    assert load_vision_tokenizer(str(tmp_path / "again"))[1].to_dict() == of_config.to_dict()
    own = NextFlowImageProcessor.from_dict(of_config.to_dict() | {"resample": Image.Resampling.BOX})
    own.save_pretrained(tmp_path / "again")
    assert load_vision_tokenizer(str(tmp_path / "again"))[1].to_dict() == own.to_dict()
    again = load_vq_model(str(tmp_path / "again"))
    for model in (loaded, again):
        assert not model.training and model.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_in_a_card_and_in_errors(tmp_path):
    """A Hub id also where its folder in the cache was named; of many tensors some."""
    snapshot = tmp_path / "models--some-one--a.model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    names = {"some-one/a.model": "some-one/a.model", snapshot: "some-one/a.model", snapshot.parent: "snapshots"}
    assert {name: source_name(name) for name in names} == names
    assert [listing(list("abcdefg")[:count]) for count in (1, 5, 6, 7)] == [
        "a",
        "a, b, c, d, e",
        "a, b, c, d, e and 1 more",
        "a, b, c, d, e and 2 more",
    ]


def test_weights_are_the_same_by_name_and_value():
    one = torch.nn.Linear(2, 2)
    other = copy.deepcopy(one)
    assert same_weights(one, other) and not same_weights(one, torch.nn.Sequential(one))
    with torch.no_grad():
        other.bias[1] += 1
    assert not same_weights(one, other) and not same_weights(other, one)
