"""diffusers' pipeline, memory and LoRA tests on each family's decoder, and on the stock pipeline that it extends."""

import copy
import gc

import diffusers
import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.diffusers.common.library import import_library
from tests.diffusers.tiny_decoders import (
    FAMILIES,
    WIDE,
    clip_text_config,
    decoder,
    let_condition_speak,
    random_codes,
    stock_components,
    tiny_vq_model,
)

library = import_library("pipelines.testing_utils")
UNETS = ("unet", "xl")


def components_of(family: str) -> dict:
    """The tiny stock components, with text encoders of the depth that the LoRA tests take for granted."""
    components = stock_components(family)
    torch.manual_seed(0)
    config = clip_text_config()
    config.num_hidden_layers = 5
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if isinstance(components.get(name), kind):
            components[name] = kind(copy.deepcopy(config)).eval()
    return components | ({"image_encoder": None, "feature_extractor": None} if family != "qwenimage" else {})


ISOLATED = {"device": "cpu", "do_classifier_free_guidance": True}  # what Stable Diffusion's encode_prompt requires


class Common(library.BasePipelineTesterConfig):
    family: str
    output_shape = (3, 32, 64)

    def arguments(self) -> dict:
        guidance = {"guidance_scale": 3.0} if self.family in UNETS else {"guidance_scale": 3.0, "true_cfg_scale": 1.0}
        lengths = {} if self.family in UNETS else {"max_sequence_length": 16}
        return {
            "prompt": "a painting of a cat",
            "negative_prompt": "a dog",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "output_type": "pt",
            **guidance,
            **lengths,
        }


class Stock(Common):
    optional_input_params = library.BasePipelineTesterConfig.optional_input_params - {"latents"}  # image to image
    required_input_params_in_call_signature = frozenset(["prompt", "image", "strength", "guidance_scale"])
    batch_input_params = frozenset(["prompt", "negative_prompt", "image"])

    @property
    def pipeline_class(self):
        return FAMILIES[self.family][2]

    def get_dummy_components(self) -> dict:
        components = components_of(self.family)
        return components | ({"safety_checker": None} if self.family == "unet" else {})

    def get_dummy_inputs(self) -> dict:
        image = torch.rand(1, 3, 32, 64, generator=self.get_generator(1))
        size = {} if self.family in UNETS else {"height": 32, "width": 64}
        return self.arguments() | {"image": image, "strength": 0.8} | size


class Pipeline(library.PipelineTesterMixin):
    def test_encode_prompt_works_in_isolation(self):
        super().test_encode_prompt_works_in_isolation(extra_required_param_value_dict=ISOLATED)

    def test_save_load_optional_components(self, tmp_path):
        if issubclass(type(self), Ours):
            pytest.skip("a decoder without its conditioner decodes nothing")
        super().test_save_load_optional_components(tmp_path)


class Ours(Common):
    required_input_params_in_call_signature = frozenset(
        ["prompt", "codes", "grid", "features", "image", "upscale", "strength", "height", "width", "guidance_scale"]
    )
    batch_input_params = frozenset(["prompt", "negative_prompt", "codes"])

    @property
    def pipeline_class(self):
        return FAMILIES[self.family][0]

    def get_dummy_components(self) -> dict:
        vq_model = copy.deepcopy(tiny_vq_model())
        pipe = decoder(self.family, vq_model=vq_model, **components_of(self.family))
        let_condition_speak(pipe, std=0.1)  # louder, it would drown what adapters change
        return dict(pipe.components)

    def get_dummy_inputs(self) -> dict:
        return self.arguments() | {"codes": random_codes(1), "grid": WIDE}


def mixins_of(family: str) -> dict[str, tuple[type, ...]]:
    """In classes of their own, because the memory tests' mark, that they need an accelerator, holds for a class."""
    unet = (library.UNetLoraTesterMixin,) if family in UNETS else ()
    return {
        "": (Pipeline,),
        "Memory": (library.MemoryTesterMixin,),
        "Lora": (library.LoraTesterMixin, *unet),
        "LoraMemory": (library.LoraMemoryTesterMixin,),
    }


for family in FAMILIES:
    setattr(diffusers.pipelines, FAMILIES[family][0].__name__, FAMILIES[family][0])  # where its source is looked up
    for base in (Ours, Stock):
        for kind, mixins in mixins_of(family).items():
            name = f"Test{base.__name__}{family.title()}{kind}"
            globals()[name] = type(name, (base, *mixins), {"family": family, "__module__": __name__})

torch.compiler.reset()  # so that all is imported
gc.freeze()  # the library collects garbage twice for each test: nothing that was imported is any
