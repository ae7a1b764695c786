"""A vision tokenizer of one picture size, which its grid does not divide, inside of the whole model."""

import copy
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_hooks import weights_only_while_running
from tiny_models import BOI, EOI, EOS, IMAGE, PAD, tiny_model
from tiny_models import tiny_config as tiny_nextflow_config
from transformers import AutoModel

from tests.conftest import build_config
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQConfig,
    codes_of_region,
)
from transformers_nextflow.data import ExtractionSettings, RawDocuments, Source, extract
from transformers_nextflow.data.shards import Shard, read_manifest

accelerate = pytest.importorskip("accelerate")

EDGE, SLOTS = 40, 13 + 9  # pixels; 2x2 and 3x3 cells, and the last ones once more
FIXED_SIZE = {
    "semantic_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": 13,
        "vision_use_head": False,
    },
    "semantic_mean": [0.5, 0.5, 0.5],
    "semantic_deviation": [0.5, 0.5, 0.5],
    "semantic_decoder_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 3,
        "patch_size": 1,
        "num_channels": 6,
    },
    "image_size": EDGE,
    "attention": "dense",
    "scale_schedules": [[[1, 1], [2, 2], [3, 3]]],
    "levels": {"40": 3},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_nextflow_config(vq=FIXED_SIZE))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_region_of_a_picture_that_its_grid_does_not_divide(model):
    schedule = model.model.schedules.by_grid((3, 3))
    region = torch.zeros(EDGE, EDGE, dtype=torch.bool)
    region[13, 26] = True  # in the first rows of cells by a third of a pixel, and in the last columns by two thirds
    mask = codes_of_region(region, schedule)
    assert mask[1:5].view(2, 2).tolist() == [[False, True], [False, False]]
    assert mask[5:].view(3, 3).tolist() == [[False, True, True], [False, True, True], [False] * 3]
    assert codes_of_region(~region, schedule).all() and not codes_of_region(region & ~region, schedule).any()


@pytest.fixture
def inputs(pixels) -> dict:
    picture = [BOI, *[IMAGE] * SLOTS, EOI]
    ids = torch.tensor([[1, 2, *picture, 3], [4, 5, *picture, 6]])
    return {"input_ids": ids, "image_grid_hw": torch.tensor([[3, 3], [3, 3]]), "pixel_values": pixels}


@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model"])
def test_weights_are_there_only_while_their_module_runs(kind, pixels):
    semantic = FIXED_SIZE["semantic_config"] | {"model_type": kind}
    model = tiny_model(tiny_nextflow_config(vq=FIXED_SIZE | {"semantic_config": semantic})).model.vq_model
    expected = model.encode(pixels)
    with weights_only_while_running(model):
        assert torch.equal(model.encode(pixels), expected) and len(expected.unique()) > 4


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "siglip_vision_model", "clip_vision_model"])
@pytest.mark.parametrize("layer", [-2, None])
def test_the_semantic_encoder_runs_as_a_whole(kind, layer):
    """Whoever hooks it takes part, and finds it as it was: in a pickle and in a copy, which read the same."""
    vq = FIXED_SIZE | {"semantic_config": FIXED_SIZE["semantic_config"] | {"model_type": kind}}
    vq = {} if kind == "siglip2_vision_model" else vq
    model = tiny_model(tiny_nextflow_config(vq=vq | {"semantic_feature_layer": layer})).model.vq_model
    pixels = torch.rand(2, 3, *[EDGE if vq else 12] * 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[torch.Size] = []
    hook = model.semantic_encoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = model.semantic_features(pixels)
    hook.remove()
    assert seen == [expected.shape] and expected.shape[:2] == (2, 9)
    assert not model.semantic_encoder.is_custom_code(), "its attention has to be initialised"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.semantic_features(pixels), expected)
        accelerate.cpu_offload(other.semantic_encoder, torch.device("cpu"))
        assert {weight.device.type for weight in other.semantic_encoder.parameters()} == {"meta"}
        assert torch.equal(other.semantic_features(pixels), expected)
    teacher = AutoModel.from_config(model.config.semantic_config).eval()
    teacher.load_state_dict(model.semantic_encoder.state_dict())
    kind_of_teacher = type(teacher)
    torch.testing.assert_close(model.semantic_features(pixels, teacher), expected)
    assert type(teacher) is kind_of_teacher


def test_whole_pictures_are_their_codes(model, inputs, pixels):
    codes = model.model.vq_model.encode(pixels)
    assert codes.shape == (2, 14) and not torch.equal(codes[0], codes[1])
    assert model.model.vq_model.decode(codes, (3, 3)).shape == (2, 3, EDGE, EDGE)
    with torch.no_grad():
        whole = model(**inputs).logits
        inputs = {name: inputs[name] for name in ("input_ids", "image_grid_hw")}
        coded = model(**inputs, image_codes=codes.flatten()).logits
    assert torch.equal(whole, coded)
    with pytest.raises(ValueError, match="pixel_values must hold 2 rows for the images in input_ids, got 1"):
        model(**inputs | {"pixel_values": pixels[:1]})


def test_answers_of_a_row_keep_its_picture(model, inputs):
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    one = model.generate(**inputs, **settings)
    several = model.generate(**inputs, **settings, num_beams=2, num_return_sequences=2)
    assert several.shape[0] == 4 and one.shape[0] == 2


def test_pictures_are_generated_at_that_size(model):
    ids = torch.tensor([[1, 2, BOI]])
    settings = {"generation_mode": "image", "guidance_scale": 1.0, "seed": 0}
    by_size = model.generate(input_ids=ids, height=EDGE, width=EDGE, **settings)
    assert torch.equal(by_size, model.generate(input_ids=ids, **settings))
    assert model.decode_image_tokens(by_size, (3, 3)).shape == (1, 3, EDGE, EDGE)
    with pytest.raises(ValueError, match="no scale schedule for an image of 12x12 .*nearest: 40x40"):
        model.generate(input_ids=ids, height=12, width=12, exact_size=True, **settings)


def test_image_processor_keeps_pictures_whole(tmp_path):
    processor = NextFlowImageProcessor(4, FIXED_SIZE["scale_schedules"], FIXED_SIZE["levels"], image_size=EDGE)
    processor.save_pretrained(tmp_path)
    processor = NextFlowImageProcessor.from_pretrained(tmp_path)
    pictures = [Image.new("RGB", (90, 50), "red"), Image.new("RGB", (EDGE, EDGE), "blue")]
    inputs = processor(pictures, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, EDGE, EDGE)
    assert inputs["image_grid_hw"].tolist() == [[3, 3], [3, 3]]
    assert inputs["pixel_values"][0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("edge, patch", [(EDGE, 13), (24, 8)])  # which the grid's cells of 8 pixels divide or not
def test_codes_of_documents_are_those_of_whole_pictures(edge, patch, text_tokenizer, tmp_path, monkeypatch):
    """Of shards, and of documents that are coded when they are asked for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config, semantic = build_config(text_tokenizer).to_dict(), FIXED_SIZE["semantic_config"]
    sizes = {"image_size": edge, "semantic_config": semantic | {"image_size": edge, "patch_size": patch}}
    model = tiny_model(NextFlowConfig(**config | {"vq_config": config["vq_config"] | FIXED_SIZE | sizes}))
    vq_model = model.model.vq_model
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    model.save_pretrained(tmp_path / "model")
    NextFlowProcessor(processor, text_tokenizer).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)) for _ in range(3)]
    rows = [{"key": str(number), "text": "a star", "image": picture} for number, picture in enumerate(pictures)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    expected = vq_model.encode(processor(pictures, return_tensors="pt")["pixel_values"]).numpy()
    assert len(np.unique(expected, axis=0)) == 3
    source = Source(str(tmp_path / "rows.parquet"))
    settings = ExtractionSettings("text-to-image", self_correction=None)
    extract(source, tmp_path / "model", tmp_path / "shards", settings)
    (entry,) = read_manifest(tmp_path / "shards")["shards"]
    shard = Shard(tmp_path / "shards" / "data" / entry["file"])
    assert np.array_equal([shard.row(number)["image_codes"] for number in range(len(shard))], expected)
    raw = RawDocuments(source, tmp_path / "model", settings)
    assert np.array_equal([item["image_codes"] for item in raw], expected)


def config(**changes) -> NextFlowVQConfig:
    sizes = {"patch_size": 4, "stem_stride": 2, "channel_multipliers": [1, 1], "semantic_dim": 6}
    return NextFlowVQConfig(**sizes | FIXED_SIZE | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 60}, r"needs exactly one scale schedule, which ends in the grid \(4, 4\)"),
        ({"scale_schedules": None}, "needs exactly one scale schedule"),
        ({"scale_schedules": [[[1, 1], [2, 2], [3, 3]]] * 2}, "needs exactly one scale schedule"),
        ({"scale_schedules": [[[1, 1], [2, 2], [3, 4]]]}, "needs exactly one scale schedule"),
        ({"levels": {"20": 2, "40": 3}}, "needs exactly one scale schedule"),
        ({"semantic_deviation": None}, "must be given together"),
        ({"semantic_decoder_config": None}, "needs a semantic_decoder_config"),
        ({"attention": "none"}, "attention must be"),
        ({"semantic_config": {"model_type": "vit"}}, "the semantic encoder must be one of .* got vit"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
