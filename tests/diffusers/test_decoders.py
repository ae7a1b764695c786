"""The decoder pipelines of every family, on tiny backbones."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FluxTransformer2DModel

from diffusers_nextflow import NextFlowConditioner
from tests.diffusers.tiny_decoders import (
    FAMILIES,
    WIDE,
    decoder,
    guidance,
    let_condition_speak,
    pixel_decoder,
    random_codes,
    stock_components,
    stock_pipeline,
    tiny_vq_model,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = ["a cat", "dog"]
TWO_STEPS = {"num_inference_steps": 2, "output_type": "pt"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def condition(codes: torch.Tensor) -> torch.Tensor:
    return torch.cat(tiny_vq_model().condition_features(codes, WIDE), dim=1)


@every_family
def test_fresh_conditioner_leaves_the_stock_checkpoint_as_it_is(family, tmp_path):
    stock = stock_pipeline(family, stock_components(family))
    stock.save_pretrained(tmp_path)
    pipe = FAMILIES[family][0].from_pretrained(tmp_path, vq_model=tiny_vq_model())
    pipe.set_progress_bar_config(disable=True)
    for upscale in (1, 2):
        size = {"height": 32 * upscale, "width": 64 * upscale}
        expected = stock(PROMPTS, **size, generator=seeded(), **guidance(family)).images
        pictures = pipe(PROMPTS, random_codes(2), WIDE, upscale=upscale, generator=seeded(), **guidance(family)).images
        assert torch.equal(pictures, expected)


@every_family
def test_strength_starts_from_the_picture_of_the_codes(family):
    """As the stock image-to-image pipeline does of the vision tokenizer's picture, here of twice its size."""
    stock, pipe = stock_pipeline(family, stock_components(family), from_image=True), decoder(family)
    start = F.interpolate(tiny_vq_model().decode(random_codes(2), WIDE), scale_factor=2.0, mode="bicubic")
    start = (start.clamp(-1, 1).repeat_interleave(2, dim=0) + 1) / 2
    size = {"height": 64, "width": 128} if family in ("flux", "qwenimage") else {}
    arguments = guidance(family) | {"strength": 0.5, "num_images_per_prompt": 2}
    prompts = ["cat", "dog"]  # of one length: diffusers' mask of Qwen-Image's captions is wrong for others
    expected = stock(prompts, image=start, **size, generator=seeded(), **arguments).images
    arguments["upscale"] = 2
    pictures = pipe(prompts, random_codes(2), WIDE, generator=seeded(), **arguments).images
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    others = {"features": condition(random_codes(2, seed=1)), "image": list((random_pictures() + 1) / 2)}
    assert (pipe(prompts, **others, generator=seeded(), **arguments).images - expected).abs().max() > 1e-3
    others["image"] = list((tiny_vq_model().decode(random_codes(2), WIDE) + 1) / 2)
    pictures = pipe(prompts, **others, generator=seeded(), **arguments).images
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)


def random_pictures() -> torch.Tensor:
    return tiny_vq_model().decode(random_codes(2, seed=1), WIDE)


@every_family
def test_batch_is_each_picture_alone(family):
    pipe, codes = decoder(family, trained=True), random_codes(2)
    batch = pipe(
        PROMPTS, codes, WIDE, num_images_per_prompt=2, generator=[seeded(row) for row in range(4)], **guidance(family)
    ).images
    for row in range(4):
        own = guidance(family) | {"negative_prompt": guidance(family)["negative_prompt"][row // 2]}
        alone = pipe(PROMPTS[row // 2], codes[row // 2 :][:1], WIDE, generator=seeded(row), **own).images
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=0, atol=1e-5)
    others = pipe(
        PROMPTS,
        codes.flip(0),
        WIDE,
        num_images_per_prompt=2,
        generator=[seeded(row) for row in range(4)],
        **guidance(family),
    ).images
    assert all((batch[row] - others[row]).abs().max() > 1e-3 for row in range(4))


@every_family
def test_saved_pipeline_loads_by_class_and_without(family, tmp_path):
    pipe = decoder(family, trained=True)
    expected = pipe("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["conditioner"] == ["diffusers_nextflow", "NextFlowConditioner"]
    assert index["vq_model"] == ["diffusers_nextflow", "NextFlowVQModel"]
    for loader in (DiffusionPipeline, type(pipe)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(pipe)
        loaded.set_progress_bar_config(disable=True)
        pictures = loaded("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images
        # weights mapped from a file lie anywhere in memory, and kernels round by that
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, vq_model=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vq_model is None
    pictures = loaded("a cat", features=condition(random_codes(1)), generator=seeded(), **TWO_STEPS).images
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_codes_pictures_and_features_say_the_same(family):
    pipe = decoder(family, trained=True)
    pixels = torch.rand(2, 3, 32, 64, generator=seeded(5))
    codes = tiny_vq_model().encode(pixels * 2 - 1)
    assert not torch.equal(codes[0], codes[1])

    def draw(**what):
        return pipe(PROMPTS, generator=seeded(), **what, **TWO_STEPS).images

    expected = draw(codes=codes, grid=WIDE)
    assert torch.equal(draw(codes=list(codes), grid=WIDE), expected)
    assert torch.equal(draw(codes=[row[None] for row in codes], grid=WIDE), expected)
    assert torch.equal(draw(features=condition(codes)), expected)
    assert torch.equal(draw(features=list(condition(codes))), expected)
    assert torch.equal(draw(image=pixels), expected)
    assert torch.equal(draw(image=list(pixels)), expected)
    arrays = pixels.permute(0, 2, 3, 1).numpy()  # as `output_type="np"` gives them
    assert torch.equal(draw(image=arrays), expected) and torch.equal(draw(image=list(arrays)), expected)
    bytes_ = (arrays * 255).round().astype(np.uint8)
    picture, floats = Image.fromarray(bytes_[0]), torch.from_numpy(bytes_[1] / np.float32(255)).permute(2, 0, 1)
    assert torch.equal(draw(image=[picture, floats]), draw(image=list(bytes_)))
    assert pipe("", codes[:1], output_type="pil", num_inference_steps=1).images[0].size == (64, 32)  # the only grid
    latents = draw(codes=codes, grid=WIDE, latents=first_noise(pipe, codes))
    assert torch.equal(latents, expected)
    if family == "unet":
        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        given = {"prompt_embeds": embeds, "codes": codes, "grid": WIDE, "generator": seeded()}
        torch.testing.assert_close(pipe(**given, **TWO_STEPS).images, expected, rtol=0, atol=1e-5)


def first_noise(pipe, codes: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(len(codes), 4, 8, 16, generator=seeded())
    return noise if pipe.family == "unet" else pipe._pack_latents(noise, len(codes), 4, 8, 16)


@every_family
def test_gradient_reaches_a_fresh_conditioner(family):
    pipe = decoder(family)
    features = condition(random_codes(1))
    with torch.enable_grad(), pipe._reading(features, pipe.conditioner.cells(pipe.stride)):
        if family == "unet":
            hidden = pipe.unet(torch.ones(1, 4, 8, 16), 1, encoder_hidden_states=torch.ones(1, 3, 16)).sample
        elif family == "xl":
            added = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}
            hidden = pipe.unet(
                torch.ones(1, 4, 8, 16), 1, encoder_hidden_states=torch.ones(1, 3, 32), added_cond_kwargs=added
            ).sample
        else:
            arguments = {"hidden_states": torch.rand(1, 32, 16), "timestep": torch.ones(1)}
            arguments["encoder_hidden_states"] = torch.ones(1, 3, 16)
            if family == "flux":
                ids = {"img_ids": torch.ones(32, 3), "txt_ids": torch.ones(3, 3)}
                hidden = pipe.transformer(**arguments, **ids, pooled_projections=torch.ones(1, 16)).sample
            else:
                hidden = pipe.transformer(**arguments, img_shapes=[[(1, 4, 8)]]).sample
        hidden.square().sum().backward()
    if pipe.family == "unet":
        assert pipe.unet.conv_in.weight.grad[:, 4:].abs().max() > 0
        assert pipe.conditioner.projection.weight.abs().max() > 0  # the other factor is not zero too
    else:
        assert pipe.conditioner.projection[-1].weight.grad.abs().max() > 0
        assert pipe.conditioner.projection[-1].bias.grad.abs().max() > 0


@every_family
def test_adapter_goes_to_disk_beside_the_conditioner(family, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = decoder(family, trained=True)
    backbone = getattr(pipe, pipe.backbone)
    backbone.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    expected = pipe("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images
    layers = {f"{pipe.backbone}_lora_layers": peft.get_peft_model_state_dict(backbone)}
    pipe.save_lora_weights(tmp_path, **layers)
    pipe.conditioner.save_pretrained(tmp_path / "conditioner")

    conditioner = NextFlowConditioner.from_pretrained(tmp_path, subfolder="conditioner")
    loaded = decoder(family, conditioner=conditioner)
    if pipe.family == "unet":  # trained as a whole
        let_condition_speak(loaded)
    without = loaded("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images
    loaded.load_lora_weights(tmp_path)
    pictures = loaded("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images
    assert torch.equal(pictures, expected)
    assert not torch.equal(without, expected)


def test_conditioned_transformer_saves_and_loads_as_the_stock_class(tmp_path):
    pipe = decoder("flux", trained=True)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert type(loaded.x_embedder) is torch.nn.Linear
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # and a stock pipeline goes on with it
    shared = stock_pipeline("flux", stock_components("flux") | {"transformer": pipe.transformer})
    expected = stock_pipeline("flux", stock_components("flux"))
    arguments = {"height": 32, "width": 64, **TWO_STEPS}
    assert torch.equal(
        shared("a cat", generator=seeded(), **arguments).images,
        expected("a cat", generator=seeded(), **arguments).images,
    )


def test_callbacks_schedulers_and_tiling():
    pipe, seen = decoder("unet", trained=True), []
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.vae.enable_tiling()

    def on_step_end(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0}

    arguments = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": on_step_end}
    images = pipe("a cat", random_codes(1), WIDE, generator=seeded(), **arguments).images
    assert len(seen) == 2 and seen[0].shape == (1, 4, 8, 16)
    assert (images == 0).all()
    pictures = pipe("a cat", random_codes(1), WIDE, num_inference_steps=2, return_dict=False)[0]
    assert pictures[0].size == (64, 32)
    assert not pipe.unet._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_model_offload(family):
    """To the device it runs on, for lack of a second one: every part is reached through its hook."""
    pytest.importorskip("accelerate")
    pipe = decoder(family, trained=True, vq_model=copy.deepcopy(tiny_vq_model()))
    image, codes = torch.rand(3, 32, 64, generator=seeded()), random_codes(1)
    arguments = {"prompt": "a cat", "codes": codes, "grid": WIDE, "image": image, "strength": 0.5, **TWO_STEPS}
    expected = pipe(**arguments, generator=seeded()).images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe(**arguments, generator=seeded()).images, expected)


@pytest.mark.parametrize("family", ["unet", "flux", "qwenimage"])
def test_a_backbone_that_is_cast_layer_by_layer(family):
    """Before the decoder is made of it, as diffusers' documentation does, or afterwards."""
    dtypes = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    components, pictures = stock_components(family), []
    components["unet" if family == "unet" else "transformer"].enable_layerwise_casting(**dtypes)
    before, after = decoder(family, **components), decoder(family)
    getattr(after, after.backbone).enable_layerwise_casting(**dtypes)
    for pipe in (before, after):
        let_condition_speak(pipe)
        pictures.append(pipe("a cat", random_codes(1), WIDE, generator=seeded(), **TWO_STEPS).images)
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=0.02)
    assert not torch.equal(
        pictures[0], before("a cat", random_codes(1, seed=1), WIDE, generator=seeded(), **TWO_STEPS).images
    )


@every_family
def test_half_precision(family):
    whole = decoder(family, trained=True)
    expected = whole(PROMPTS, random_codes(2), WIDE, latents=first_noise(whole, PROMPTS), **TWO_STEPS).images
    vq_model = copy.deepcopy(tiny_vq_model())
    half = decoder(family, trained=True, vq_model=vq_model).to(torch.bfloat16)
    latents = first_noise(half, PROMPTS).bfloat16()
    pictures = half(PROMPTS, random_codes(2), WIDE, latents=latents, **TWO_STEPS).images
    torch.testing.assert_close(pictures.float(), expected, rtol=0, atol=0.1)
    assert half("", image=torch.rand(3, 32, 64), strength=0.5, **TWO_STEPS).images.isfinite().all()


def test_noise_of_any_number_of_channels_is_no_picture():
    """Here 6 x 6 latents of 48 channels, which the stock loop would bring to 4 x 4 if it took them for pixels."""
    pipe = pixel_decoder(tiny_vq_model(8))
    pictures = pipe("", random_codes(1, (3, 3)), upscale=1, **TWO_STEPS).images
    assert pictures.shape == (1, 3, 24, 24)


def test_adapter_on_the_layer_that_reads_the_condition():
    peft = pytest.importorskip("peft")
    pipe = decoder("flux")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["x_embedder"]))
    with pytest.raises(ValueError, match="hides the condition"):
        pipe("a", random_codes(1), WIDE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": None, "grid": None}, "give what to decode"),
        ({"prompt": None}, "caption"),
        ({"prompt": ["a", "b"]}, "prompt must have one entry for each of 1"),
        ({"prompt": [None]}, r'prompt must hold strings \("" for none\), got None'),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must have one entry for each of 1"),
        ({"prompt": ["a"], "codes": random_codes(2)}, "prompt must have one entry for each of 2 pictures, got 1"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 16)}, "prompt_embeds must have one entry for each of 1"),
        ({"codes": []}, r"codes must be a tensor or a list of tensors, got \[\]"),
        ({"codes": [[1, 2]]}, "codes must be a tensor or a list of tensors"),
        ({"codes": random_codes(1)[..., None]}, "codes of one call must have 2 dimensions and one size"),
        (
            {"codes": torch.zeros(1, 12, dtype=torch.long), "grid": None},
            r"12 codes fit 0 schedules \(\[\]\); name",
        ),
        ({"grid": (3, 3)}, r"grid \(3, 3\) must have the shape"),
        ({"grid": (4, 4)}, r"no scale schedule ends in the grid \(4, 4\)"),
        ({"codes": random_codes(1) + 24}, r"codes must lie in \[0, 24\)"),
        ({"codes": random_codes(1).float()}, "codes must be int64, got torch.float32"),
        ({"codes": [random_codes(1)[0], random_codes(1)[0, :5]]}, "one size"),
        ({"codes": None, "grid": None, "features": torch.zeros(1, 3, 2, 4)}, r"must have the shape \(B, 26, h, w\)"),
        (
            {"codes": None, "grid": None, "features": torch.zeros(1, 26, 2, 4, dtype=torch.int)},
            "features must be floating point",
        ),
        (
            {"codes": None, "features": torch.zeros(1, 26, 2, 4), "strength": 0.5, "grid": None},
            "starts from a picture",
        ),
        ({"features": torch.zeros(1, 26, 2, 4)}, "codes or features, not both"),
        ({"image": torch.rand(3, 32, 64)}, "got strength 1"),
        ({"image": torch.rand(3, 48, 48), "strength": 0.5}, r"start from must be \(32, 64\), got \(48, 48\)"),
        (
            {"codes": random_codes(1, (3, 3)), "grid": (3, 3), "image": torch.rand(3, 32, 64), "strength": 0.5},
            r"start from must be \(48, 48\), got \(32, 64\)",
        ),
        ({"image": torch.rand(2, 3, 32, 64), "strength": 0.5}, "there are 1 pictures to decode, got 2 to start from"),
        (
            {"codes": random_codes(2), "image": torch.rand(3, 32, 64), "strength": 0.5},
            "there are 2 pictures to decode, got 1 to start from",
        ),
        ({"codes": None, "image": torch.rand(3, 32, 64)}, r"grid belongs to codes, got \(2, 4\)"),
        ({"codes": None, "grid": None, "image": [torch.rand(3, 32, 64), torch.rand(3, 48, 48)]}, "must have one grid"),
        ({"height": 48}, r"the output is 32x64 \(height x width\), got 48x64"),
        ({"width": 48}, r"the output is 32x64 \(height x width\), got 32x48"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive whole number, got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a positive whole number, got 1.5"),
        ({"upscale": 1.5}, "upscale must be a positive whole number"),
        ({"upscale": 0}, "upscale must be a positive whole number, got 0"),
        ({"strength": 0}, r"strength must lie in \(0, 1\]"),
        ({"strength": 1.1}, r"strength must lie in \(0, 1\]"),
        ({"strength": 0.01}, "leaves none of 2 steps"),
        ({"strength": 0.6, "latents": torch.zeros(1, 4, 8, 16)}, "use strength=1"),
        ({"generator": [seeded(), seeded()]}, "one for each of 1 pictures, got 2"),
        ({"latents": torch.zeros(1, 8, 8, 16)}, r"latents must have the shape \(1, 4, 8, 16\)"),
        ({"latents": torch.zeros(1, 3, 8, 16)}, r"latents must have the shape \(1, 4, 8, 16\)"),
    ],
)
def test_wrong_arguments(unet_decoder, arguments, message):
    arguments = {"prompt": "a", "codes": random_codes(1), "grid": WIDE} | TWO_STEPS | arguments
    with pytest.raises(ValueError, match=message):
        unet_decoder(**arguments)


@pytest.fixture(scope="module")
def unet_decoder():
    return decoder("unet")


def test_unknown_argument(unet_decoder):
    with pytest.raises(TypeError, match="takes no argument prompt_2"):
        unet_decoder("a", random_codes(1), WIDE, prompt_2="b")
    named = inspect.signature(type(unet_decoder).__call__).parameters.values()
    assert {"prompt", "codes", "guidance_scale", "callback_on_step_end"} <= {each.name for each in named}
    assert not any(each.kind is each.VAR_KEYWORD for each in named)


def test_codes_without_a_vision_tokenizer():
    conditioner = decoder("unet").conditioner
    pipe = decoder("unet", conditioner=conditioner, vq_model=None)
    with pytest.raises(ValueError, match="need the vision tokenizer"):
        pipe("a", random_codes(1), WIDE)
    with pytest.raises(ValueError, match="no conditioner"):
        decoder("unet", vq_model=None)("a", features=condition(random_codes(1)))


def test_parts_that_do_not_fit_each_other():
    flux, unet = decoder("flux"), decoder("unet")
    with pytest.raises(ValueError, match="of the backbone flux, got qwenimage"):
        decoder("flux", conditioner=decoder("qwenimage").conditioner)
    with pytest.raises(ValueError, match="of the backbone unet, got flux"):
        decoder("unet", conditioner=flux.conditioner)
    with pytest.raises(ValueError, match="tokens have 16 channels, but the conditioner's 8"):
        decoder("flux", conditioner=NextFlowConditioner(26, 8, "flux"))
    with pytest.raises(ValueError, match="or 12 once it is widened for a conditioner of width 8, got 8"):
        decoder("unet", unet=unet.unet, conditioner=NextFlowConditioner(26, 8, "unet"))
    with pytest.raises(ValueError, match=r"\(26, 4\), but the conditioner \(26, 16\)"):
        decoder("flux", conditioner=flux.conditioner, vq_model=tiny_vq_model(4))
    with pytest.raises(ValueError, match="4 pixels wide .* multiple of the 8 pixels"):
        decoder("flux", vq_model=tiny_vq_model(4))("a", random_codes(1), WIDE)
    with pytest.raises(ValueError, match="backbone must be one of"):
        NextFlowConditioner(26, 8, "dit")
    with pytest.raises(ValueError, match="backbone is a UNet, Flux or Qwen-Image, got Linear"):
        NextFlowConditioner.for_backbone(tiny_vq_model().config, torch.nn.Linear(2, 2))
    other = copy.copy(tiny_vq_model())
    other.config = copy.copy(other.config)
    other.config.image_size = 30
    with pytest.raises(ValueError, match="pictures of 30 pixels are no multiple of their grid"):
        decoder("unet", vq_model=other)
