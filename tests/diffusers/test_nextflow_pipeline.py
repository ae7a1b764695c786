"""The whole model as a diffusers pipeline, on the tiny checkpoint."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from diffusers import DiffusionPipeline
from transformers import GenerationConfig

from diffusers_nextflow import NextFlowPipeline
from tests.diffusers.tiny_decoders import decoder
from transformers_nextflow.utils.export import export

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return NextFlowPipeline.from_pretrained(tiny_checkpoint)


def test_pictures_are_those_of_generate(pipe):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = pipe.processor.apply_chat_template(chats, generation_mode="image")
    tokens = pipe.model.generate(**inputs, generation_mode="image", seed=3, num_images_per_prompt=2)
    pixels = pipe.model.decode_image_tokens(tokens, (3, 3))
    for mine, expected in zip(
        pipe(PROMPTS, seed=3, num_images_per_prompt=2).images, pipe.processor.post_process_image(pixels)
    ):
        assert np.array_equal(mine, expected)
    pictures = pipe(PROMPTS, seed=3, num_images_per_prompt=2, output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(pictures, (pixels + 1) / 2)
    codes = pipe(PROMPTS, seed=3, num_images_per_prompt=2, output_type="latent").images
    assert torch.equal(codes, tokens - pipe.model.config.text_vocab_size)
    pipe = NextFlowPipeline(copy.deepcopy(pipe.model), pipe.processor)
    pipe.model.config.image_generation = {"num_images_per_prompt": 2}
    for said in ({}, {"num_images_per_prompt": None}):  # which says nothing
        assert torch.equal(pipe(PROMPTS, seed=3, **said, output_type="latent").images, codes)
    own = NextFlowPipeline(copy.deepcopy(pipe.model), pipe.processor)
    own.model.config.image_generation = {"num_images_per_prompt": 1}
    config = GenerationConfig(image_generation={"num_images_per_prompt": 2})
    for said in (
        {"generation_config": config},
        {"image_generation": config.image_generation},
        {"num_return_sequences": 2},
    ):
        assert torch.equal(own(PROMPTS, seed=3, **said, output_type="latent").images, codes)
    own.model.generation_config = config
    assert torch.equal(own(PROMPTS, seed=3, output_type="latent").images, codes)
    generated = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), aspect_ratio="2:1").images[0]
    assert generated.width == 2 * generated.height


def test_edit_keeps_the_size_of_its_source(pipe):
    sources = [pipe(prompt, seed=0, aspect_ratio="2:1").images[0] for prompt in PROMPTS]
    one = pipe("make it green", image=sources[0], seed=1).images
    assert [picture.size for picture in one] == [sources[0].size]
    both = pipe(["make it green", "make it red"], image=sources, seed=1).images
    nested = pipe(["make it green", "make it red"], image=[[source] for source in sources], seed=1).images
    assert np.array_equal(both[0], one[0]) and np.array_equal(both[1], nested[1])
    for images in (sources[:1], sources + sources[:1]):
        with pytest.raises(ValueError, match=f"one entry for each of 2 prompts, got {len(images)}"):
            pipe(PROMPTS, image=images)
    with pytest.raises(ValueError, match="different grids"):
        pipe(PROMPTS, image=[sources[0], pipe(PROMPTS[0], seed=0).images[0]])


def test_a_generator_is_its_seed(tiny_model, tiny_processor):
    """As the drivers of any pipeline call it."""
    pipe, steps = NextFlowPipeline(tiny_model, tiny_processor), []
    expected = pipe(PROMPTS[0], seed=0, output_type="latent").images
    calls = (
        {"generator": seeded()},
        {"generator": [seeded()]},
        {"seed": 0, "generator": torch.Generator().manual_seed(5), "num_inference_steps": 50},
        {"seed": 0, "callback_on_step_end": lambda pipe, step, timestep, tensors: steps.append(step) or tensors},
        {"seed": 0, "guidance_scale": None, "latents": None, "prompt_embeds": None, "height": None, "width": None},
    )
    for arguments in calls:
        assert torch.equal(pipe(PROMPTS[0], output_type="latent", **arguments).images, expected)
    assert steps == [0, 1, 2]
    nearest = pipe(PROMPTS[0], seed=0, height=40, width=17).images[0]
    assert nearest.size == (16, 32)
    (edited,) = pipe("make it green", image=nearest, seed=1).images
    assert edited.size == nearest.size
    drawn = []
    called = {"callback_on_step_end": lambda pipe, step, timestep, tensors: drawn.append(tensors["codes"]) or tensors}
    pipe(PROMPTS[0], seed=0, callback_on_step_end_tensor_inputs=["codes"], **called)
    assert torch.equal(drawn[-1], expected[0]) and len(drawn) == 3
    with pytest.raises(ValueError, match="must be of codes, got latents"):
        pipe(PROMPTS[0], seed=0, callback_on_step_end_tensor_inputs=["latents"], **called)


def test_a_picture_in_every_form(pipe):
    """Floats in [0, 1], as other pipelines read and give them, alone and as a batch."""
    source = pipe(PROMPTS[0], seed=0).images[0]
    (expected,) = pipe("make it green", image=source, seed=1).images
    array = np.asarray(source, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (array, tensor, array[None], tensor[None], [tensor], np.asarray(source)):
        (edited,) = pipe("make it green", image=image, seed=1).images
        assert np.array_equal(edited, expected)
    both = pipe(["make it green"] * 2, image=torch.stack([tensor, tensor]), seed=1).images
    assert np.array_equal(both[0], expected) and np.array_equal(both[1], expected)


def test_ends_in_a_diffusion_decoder_and_round_trips(pipe, tmp_path):
    vq_model = pipe.model.model.vq_model
    unet = decoder("unet", trained=True, vq_model=vq_model)
    whole = NextFlowPipeline(pipe.model, pipe.processor)
    whole.decoder = unet
    for options in ({}, {"strength": 0.5}):
        arguments = {"num_inference_steps": 2, **options}
        two = {"seed": 0, "num_images_per_prompt": 2}
        pictures = whole(PROMPTS, **two, output_type="pt", decoder_kwargs=arguments | {"generator": seeded()}).images
        by_seed = whole(PROMPTS, **two, output_type="pt", decoder_kwargs=arguments).images
        alone = whole(PROMPTS[1], **two, output_type="pt", decoder_kwargs=arguments).images
        torch.testing.assert_close(by_seed[2:], alone, rtol=0, atol=1e-5)
        assert (by_seed - pictures).abs().max() > 1e-3
        codes = pipe(PROMPTS, **two, output_type="latent").images
        captions = [prompt for prompt in PROMPTS for _ in range(2)]
        expected = unet(captions, codes, (3, 3), generator=seeded(), output_type="pt", **arguments).images
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
        one = {"output_type": "pt", "decoder_kwargs": arguments}
        by_seed = whole(PROMPTS[0], seed=0, **one).images
        for generator in (seeded(), [seeded()]):
            assert torch.equal(whole(PROMPTS[0], generator=generator, **one).images, by_seed)
        for steps in ({"num_inference_steps": 2, "decoder_kwargs": options}, {"num_inference_steps": 1, **one}):
            assert torch.equal(whole(PROMPTS[0], seed=0, **one | steps).images, by_seed)
    assert whole(PROMPTS[0], decoder_kwargs={"num_inference_steps": 1, "upscale": 2}).images[0].size == (48, 48)

    whole.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is NextFlowPipeline and type(loaded.decoder) is type(unet)
    loaded.decoder.set_progress_bar_config(disable=True)
    again = loaded(PROMPTS, **two, output_type="pt", decoder_kwargs=arguments | {"generator": seeded()}).images
    assert torch.equal(again, pictures)
    assert NextFlowPipeline.from_pretrained(tmp_path, decoder=None).decoder is None
    assert loaded.to(torch.float64).decoder.unet.dtype == torch.float64


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_neither_pipeline_nor_transformers_checkpoint(tiny_checkpoint, tmp_path):
    with pytest.raises(OSError):
        NextFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not take scheduler"):
        NextFlowPipeline.from_pretrained(tiny_checkpoint, scheduler=None)
    assert NextFlowPipeline.from_pretrained(tiny_checkpoint, use_safetensors=True).decoder is None
    with pytest.raises(OSError, match="model.fp16.safetensors"):
        NextFlowPipeline.from_pretrained(tiny_checkpoint, variant="fp16")


def test_offload(pipe):
    pytest.importorskip("accelerate")
    whole = NextFlowPipeline(copy.deepcopy(pipe.model), pipe.processor)
    whole.enable_model_cpu_offload(device="cpu")
    expected = pipe(PROMPTS[0], seed=0, output_type="pt").images
    assert torch.equal(whole(PROMPTS[0], seed=0, output_type="pt").images, expected)

    whole.decoder = decoder("unet", trained=True, vq_model=None, conditioner=conditioner_of(pipe))
    arguments = {"seed": 0, "output_type": "pt", "decoder_kwargs": {"num_inference_steps": 1}}
    whole.remove_all_hooks()
    expected = whole(PROMPTS[0], **arguments).images
    whole.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(whole(PROMPTS[0], **arguments).images, expected)
        assert len(whole.decoder._all_hooks) == 4  # conditioner, text encoder, UNet, VAE


def test_what_is_done_to_all_parts_is_done_to_the_decoder(pipe, tmp_path, capsys):
    whole = NextFlowPipeline(copy.deepcopy(pipe.model), pipe.processor)
    whole.decoder = decoder("unet", vq_model=whole.model.model.vq_model)
    arguments = {"seed": 0, "output_type": "pt", "decoder_kwargs": {"num_inference_steps": 1}}
    whole.set_progress_bar_config(disable=False)
    expected = whole(PROMPTS[0], **arguments).images
    assert "1/1" in capsys.readouterr().err
    whole.set_progress_bar_config(disable=True)
    whole.enable_model_cpu_offload(device="cpu")
    whole.remove_all_hooks()
    assert not any(hasattr(part, "_hf_hook") for part in whole.decoder.components.values())
    whole.enable_group_offload("cpu", offload_type="leaf_level")
    assert torch.equal(whole(PROMPTS[0], **arguments).images, expected)
    assert any(hasattr(part, "_diffusers_hook") for part in whole.decoder.unet.modules())
    assert "1/1" not in capsys.readouterr().err

    NextFlowPipeline(pipe.model, pipe.processor, decoder("unet", vq_model=pipe.model.model.vq_model)).save_pretrained(
        tmp_path
    )
    half = torch.bfloat16
    for dtype, got in (
        (half, half),
        ({"default": half, "decoder": torch.float64}, torch.float64),
        (None, torch.float32),
    ):
        assert NextFlowPipeline.from_pretrained(tmp_path, dtype=dtype).decoder.unet.dtype == got
    given = NextFlowPipeline.from_pretrained(tmp_path, dtype=half, decoder=whole.decoder).decoder
    assert given.unet.dtype == torch.float32, "as it was given"


def conditioner_of(pipe):
    return decoder("unet", vq_model=pipe.model.model.vq_model).conditioner


@pytest.mark.parametrize("prompt", [None, 3, []])
def test_prompts_that_are_no_texts(pipe, prompt):
    with pytest.raises(ValueError, match="prompt must be a text or a list of texts, got"):
        pipe(prompt)


def test_arguments_of_a_decoder_that_is_not_there(pipe):
    with pytest.raises(ValueError, match=r"decoder_kwargs \(upscale\) need a decoder, and the pipeline has none"):
        pipe(PROMPTS[0], decoder_kwargs={"upscale": 2})


def test_documentation_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "decoder.md").read_text(), flags=re.DOTALL)
    exec(compile(block, "decoder.md", "exec"), {})


def test_an_exported_checkpoint_is_a_pipeline(tiny_checkpoint, pipe, tmp_path):
    export(tiny_checkpoint, str(tmp_path / "exported"))
    expected = pipe(PROMPTS[0], seed=0, output_type="latent").images
    for door in (DiffusionPipeline, NextFlowPipeline):
        loaded = door.from_pretrained(tmp_path / "exported")
        assert type(loaded) is NextFlowPipeline
        assert torch.equal(loaded(PROMPTS[0], seed=0, output_type="latent").images, expected)
    half = NextFlowPipeline.from_pretrained(tmp_path / "exported", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16


def test_variants(pipe, tmp_path):
    """diffusers cannot load one of a pipeline that holds another."""
    whole = NextFlowPipeline(pipe.model, pipe.processor)
    whole.save_pretrained(tmp_path, variant="fp16")
    assert type(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")) is NextFlowPipeline
    whole.decoder = decoder("unet", vq_model=pipe.model.model.vq_model)
    with pytest.raises(ValueError, match="save it apart for variant='fp16'"):
        whole.save_pretrained(tmp_path, variant="fp16")


def test_a_processor_of_another_model_is_refused(pipe):
    other = copy.copy(pipe.processor)
    other.condition_last_scale = False
    with pytest.raises(ValueError, match="condition_last_scale must be the model's, True, got False of the processor"):
        NextFlowPipeline(pipe.model, other)
