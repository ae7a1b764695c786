"""A trained vision tokenizer enters a trained model by one command, which says what must be trained again."""

import copy
import json
import shutil

import pytest
import torch

from tests.tiny_models import CODES
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import enlarge_decoder


@pytest.fixture
def replaced(console, tiny_checkpoint, tmp_path):
    """Puts a tokenizer into the tiny checkpoint: the model as it loads, its processor, and the report."""

    def replaced(vq_model: NextFlowVQModel) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor, dict]:
        vq_model.save_pretrained(tmp_path / "vq")
        options = ("--model", str(tiny_checkpoint), "--output", "out", "--json")
        status, out, err = console("replace-tokenizer", "vq", *options)
        assert status == 0, err
        loaded, report = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, tensor in vq_model.state_dict().items():
            assert torch.equal(loaded.model.vq_model.state_dict()[name], tensor), name
        return loaded, NextFlowProcessor.from_pretrained(tmp_path / "out"), json.loads(out)

    return replaced


def of_transformer(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("model.vq_model")}


def changed(one, other) -> set[str]:
    one, other = of_transformer(one), of_transformer(other)
    assert one.keys() == other.keys()
    return {name for name in one if one[name].shape != other[name].shape or not torch.equal(one[name], other[name])}


def test_another_pixel_decoder_leaves_all_else_as_it_is(replaced, tiny_model):
    loaded, processor, report = replaced(enlarge_decoder(tiny_model.model.vq_model))
    assert report == {"new": [], "train_again": []} and not changed(loaded, tiny_model)
    assert loaded.config.vq_config.decoder_blocks == 2 * tiny_model.config.vq_config.decoder_blocks
    processor.check_fits(loaded.config)


def test_another_semantic_decoder_concerns_diffusion_decoders_alone(replaced, tiny_model):
    other = copy.deepcopy(tiny_model.model.vq_model)
    torch.nn.init.normal_(other.semantic_decoder.to_features[0].weight)
    loaded, _, report = replaced(other)
    assert not changed(loaded, tiny_model) and report["new"] == []
    assert [line.split(" of ")[0] for line in report["train_again"]] == ["diffusion decoders"]


def test_another_codebook_begins_the_code_embeddings_anew(replaced, tiny_model):
    other = copy.deepcopy(tiny_model.model.vq_model)
    torch.nn.init.normal_(other.quantizer.pixel_codebook)
    loaded, _, report = replaced(other)
    assert changed(loaded, tiny_model) == {"model.code_embeddings.weight"}
    assert torch.equal(loaded.model.code_embeddings.weight, other.quantizer())
    assert report["new"] == ["model.code_embeddings"] and "stage `alignment`" in report["train_again"][0]


def test_another_encoder_asks_for_new_shards_though_the_codebook_is_the_same(replaced, tiny_model):
    other = copy.deepcopy(tiny_model.model.vq_model)
    torch.nn.init.normal_(other.pixel_encoder.to_code.weight)
    tiny = copy.deepcopy(tiny_model)
    loaded, _, report = replaced(other)
    assert changed(loaded, tiny) <= {"model.code_embeddings.weight"}
    assert "extract the documents again" in report["train_again"][0]


def test_another_setting_of_the_encoder_asks_for_new_shards_though_all_weights_are_the_same(replaced, tiny_model):
    config = copy.deepcopy(tiny_model.config.vq_config)
    config.norm_groups = 1
    other = NextFlowVQModel(config)
    other.load_state_dict(tiny_model.model.vq_model.state_dict())
    report = replaced(other)[2]
    assert "extract the documents again" in report["train_again"][0]


def test_other_sizes_and_schedules(replaced, tiny_model):
    config = copy.deepcopy(tiny_model.config.vq_config)
    config.codebook_size, config.pixel_dim = CODES, config.pixel_dim + 2
    config.scale_schedules, config.levels = [[[1, 1], [2, 2]]], {"small": 2}
    other = NextFlowVQModel(config)
    loaded, processor, report = replaced(other)
    assert report["new"] == ["model.code_embeddings", "model.connector", "model.scale_embedding", "code_head"]
    parts = tuple(f"{name}." for name in report["new"])
    assert all(name.startswith(parts) for name in changed(loaded, tiny_model))
    assert loaded.code_head.weight.shape[0] == CODES and not loaded.model.scale_embedding.index.weight.any()
    assert loaded.code_head.weight.std().item() == pytest.approx(loaded.config.initializer_range, rel=0.2)
    processor.check_fits(loaded.config)
    grid = [2, 2]
    inputs = processor.apply_chat_template([{"role": "user", "content": "a cat"}], generation_mode="image")
    size = [edge * config.patch_size for edge in grid]
    codes = loaded.generate(**inputs, generation_mode="image", height=size[0], width=size[1], seed=0)
    assert codes.shape[0] == 1


@pytest.mark.parametrize("levels, kept", [({"24": 3}, "24"), ({"small": 3}, None)])
def test_the_image_processor_stays_as_it_is_but_for_sizes(
    levels, kept, console, tiny_checkpoint, tiny_model, tmp_path, caplog
):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    processor = NextFlowProcessor.from_pretrained(model)
    own = {"level": "24", "resample": 2, "do_convert_rgb": False}
    for name, value in own.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(model)
    config = copy.deepcopy(tiny_model.config.vq_config)
    config.scale_schedules, config.levels = config.scale_schedules[:1], levels
    NextFlowVQModel(config).save_pretrained(tmp_path / "vq")
    status, _, err = console("replace-tokenizer", "vq", "--output", "out", model=model)
    assert status == 0, err
    assert ("the levels small, not the image processor's 24" in caplog.text) == (kept is None)
    images = NextFlowProcessor.from_pretrained(tmp_path / "out").image_processor
    assert {name: getattr(images, name) for name in own} == own | {"level": kept}
    assert [*images.schedule_table()] == [*config.schedule_table()] and images.levels == levels


def test_adapters_are_merged_into_the_model_that_they_are_for(console, tiny_model, tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    base = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint)
    adapted = peft.get_peft_model(base, lora_config(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "tuned")
    enlarge_decoder(tiny_model.model.vq_model).save_pretrained(tmp_path / "vq")
    status, _, err = console("replace-tokenizer", "vq", "--output", "out", model=tmp_path / "tuned")
    assert status == 0, err
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert changed(loaded, tiny_model) and not changed(loaded, adapted.merge_and_unload())
    assert loaded.config.vq_config.decoder_blocks == 2 * tiny_model.config.vq_config.decoder_blocks


def test_what_is_there_is_not_overwritten(console, tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    options = ("--model", str(tiny_checkpoint), "--output", "out")
    status, _, err = console("replace-tokenizer", str(tiny_checkpoint), *options)
    assert status == 2 and "out exists already" in err
