"""Nodes for ComfyUI: link or copy this folder into `ComfyUI/custom_nodes`, and install the package beside ComfyUI.

Pictures are ComfyUI's, (B, H, W, 3) float32 in [0, 1], or with 1 or 4 channels to be read.
"""

import torch
from PIL import Image

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.processing_nextflow import user_message
from transformers_nextflow.text_generation import text_sampling
from transformers_nextflow.utils.loading import load_model

try:
    from comfy.utils import ProgressBar
except ImportError:  # outside of ComfyUI, as in tests
    ProgressBar = None

PREVIEW_EDGE = 512  # in pixels, at most


class LoadNextFlow:
    """A model and its processor."""

    CATEGORY = "NextFlow"
    RETURN_TYPES = ("NEXTFLOW",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        about = {"default": "", "tooltip": "Folder or Hub id; nothing = the repository's own."}
        return {"required": {"model": ("STRING", about)}}

    def load(self, model: str) -> tuple:
        return (load_model(model or None),)


class NextFlowDraw:
    """A picture for a text; with a picture, an edit of it."""

    CATEGORY = "NextFlow"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        about = {"default": "", "tooltip": "One for all scales, one for each, or nothing: the model's own."}
        return {
            "required": {
                "nextflow": ("NEXTFLOW",),
                "text": ("STRING", {"multiline": True}),
                "guidance": ("STRING", about),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
                "aspect_ratio": ("STRING", {"default": "", "tooltip": "Nothing: the picture's, else the model's."}),
            },
            "optional": {"image": ("IMAGE",)},
        }

    def draw(
        self,
        nextflow: tuple[NextFlowForConditionalGeneration, NextFlowProcessor],
        text: str,
        guidance: str,
        seed: int,
        batch_size: int,
        aspect_ratio: str,
        image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """Every picture of `image` belongs to the prompt.

        Raises:
            ValueError: if `guidance` is no list of numbers with commas, or not one for each scale.
        """
        model, processor = nextflow
        inputs = chat_inputs(processor, text, image, "image").to(model.device)
        settings = {"guidance_scale": read_guidance(guidance)}
        if aspect_ratio:
            settings["aspect_ratio"] = aspect_ratio
        output = model.generate(
            **inputs,
            generation_mode="image",
            seed=seed,
            num_images_per_prompt=batch_size,
            on_scale_end=None if ProgressBar is None else previews(model, processor, inputs, settings),
            return_dict_in_generate=True,
            **settings,
        )
        pixels = model.decode_image_tokens(output.sequences, output.image_grid_hw)
        return (((pixels + 1) / 2).movedim(1, -1).cpu(),)


class NextFlowDescribe:
    """A text about a picture."""

    CATEGORY = "NextFlow"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "describe"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "nextflow": ("NEXTFLOW",),
                "image": ("IMAGE",),
                "question": ("STRING", {"default": "describe the picture", "multiline": True}),
                "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 4096}),
            }
        }

    def describe(self, nextflow, image: torch.Tensor, question: str, max_new_tokens: int) -> tuple[str]:
        model, processor = nextflow
        inputs = chat_inputs(processor, question, image, "text").to(model.device)
        ids = model.generate(**inputs, **text_sampling(model, processor, max_new_tokens))
        (text,) = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])
        return (text.strip(),)


NODE_CLASS_MAPPINGS = {each.__name__: each for each in (LoadNextFlow, NextFlowDraw, NextFlowDescribe)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadNextFlow": "Load NextFlow",
    "NextFlowDraw": "NextFlow: draw, edit",
    "NextFlowDescribe": "NextFlow: describe",
}


def chat_inputs(processor: NextFlowProcessor, text: str, image: torch.Tensor | None, mode: str):
    pictures = [] if image is None else as_pictures(image)
    return processor.apply_chat_template(
        [user_message(text, pictures)], generation_mode=mode, sanitize_control_tokens=True
    )


def as_pictures(image: torch.Tensor) -> list[Image.Image]:
    """The pictures of ComfyUI, which may be grey or have an alpha, of 8 bits a channel."""
    if not image.isfinite().all():
        raise ValueError("the image is not finite")
    pixels = (image.float() * 255).round().clamp(0, 255).byte().cpu().numpy()
    return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels]


def previews(model, processor, inputs, settings: dict):
    """What shows the first picture after each of its scales in the node."""
    grid = model.drawn_grid(inputs.get("image_grid_hw"), **settings)
    num_scales = len(model.model.schedules.by_grid(grid))
    progress = ProgressBar(num_scales)

    def tell(picture: int, scale: int, codes: torch.Tensor) -> None:
        if picture == 0:
            pixels = model.decode_preview(codes, grid)
            (shown,) = processor.post_process_image(pixels[None])
            progress.update_absolute(scale + 1, num_scales, ("PNG", shown, PREVIEW_EDGE))

    return tell


def read_guidance(guidance: str) -> float | list[float] | None:
    try:
        values = [float(value) for value in guidance.split(",")] if guidance.strip() else []
    except ValueError:
        raise ValueError(f'guidance must read "3" or "1, 2.5, 3", got {guidance!r}') from None
    return values if len(values) > 1 else values[0] if values else None
