"""The whole NextFlow model as one diffusers pipeline: prompt and pictures in, pictures out."""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers.processing_utils import Unpack

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.image_generation import ImageGenerationKwargs
from transformers_nextflow.sampling import RowGenerators

from .decoding import NextFlowDecoderMixin, StableNames

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
MODEL_ARGUMENTS = ("use_safetensors", "variant", "device_map")


def _with_decoder(name: str) -> Callable:
    """A pipeline's method for all of its parts, which takes the decoder for none, since it is a pipeline itself."""
    of_pipeline = getattr(DiffusionPipeline, name)

    @wraps(of_pipeline)
    def method(self, *args, **kwargs):
        result = of_pipeline(self, *args, **kwargs)
        if self.decoder is not None:
            getattr(self.decoder, name)(*args, **kwargs)
        return result

    return method


class NextFlowPipeline(StableNames, DiffusionPipeline):
    """NextFlow draws a picture's codes scale by scale; the vision tokenizer's decoder, or a diffusion decoder, draws
    the pixels (NextFlow sec. 2.2 and 2.3).

    Args:
        model: the transformer, with its vision tokenizer.
        processor: its processor.
        decoder: one of the decoder pipelines; without one (the paper's default) the vision tokenizer decodes.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["decoder"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor: NextFlowProcessor,
        decoder: NextFlowDecoderMixin | None = None,
    ):
        super().__init__()
        processor.check_fits(model.config)
        self.register_modules(model=model, processor=processor, decoder=decoder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "NextFlowPipeline":
        """Also of a transformers checkpoint, a folder or Hub id that holds model and processor alone.

        Args:
            kwargs: as in `DiffusionPipeline.from_pretrained`; of a transformers checkpoint, `dtype`, `decoder`,
                `use_safetensors`, `variant`, `device_map`, and the Hub's arguments.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            cls.load_config(pretrained_model_name_or_path, **hub)
        except OSError:  # no model_index.json
            decoder = kwargs.pop("decoder", None)
            dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", torch.float32))
            if unknown := sorted(kwargs.keys() - {*hub, *MODEL_ARGUMENTS}):
                raise ValueError(f"a transformers checkpoint does not take {', '.join(unknown)}") from None
            model = NextFlowForConditionalGeneration.from_pretrained(
                pretrained_model_name_or_path, dtype=dtype, **kwargs
            )
            processor = NextFlowProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
            return cls(model, processor, decoder)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if isinstance(dtype, dict):
            dtype = dtype.get("decoder", dtype.get("default"))
        if dtype is not None and pipe.decoder is not None and "decoder" not in kwargs:
            pipe.decoder.to(dtype)  # diffusers loads a pipeline in the pipeline in float32
        return pipe

    def save_pretrained(self, save_directory, *args, variant: str | None = None, **kwargs) -> None:
        """As of any pipeline; raises a `ValueError` for a `variant` with a decoder, which diffusers cannot load."""
        if variant is not None and self.decoder is not None:
            raise ValueError(f"the decoder is a pipeline in the pipeline: save it apart for variant={variant!r}")
        super().save_pretrained(save_directory, *args, variant=variant, **kwargs)

    to = _with_decoder("to")
    set_progress_bar_config = _with_decoder("set_progress_bar_config")
    remove_all_hooks = _with_decoder("remove_all_hooks")
    enable_model_cpu_offload = _with_decoder("enable_model_cpu_offload")
    enable_sequential_cpu_offload = _with_decoder("enable_sequential_cpu_offload")
    enable_group_offload = _with_decoder("enable_group_offload")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: PipelineImageInput | Sequence[Sequence] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        num_inference_steps: int | None = None,
        callback_on_step_end: Callable[["NextFlowPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        decoder_kwargs: dict | None = None,
        **kwargs: Unpack[ImageGenerationKwargs],
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures for prompts, or edit pictures.

        Args:
            prompt: one or several.
            image: one picture, or several, that belong to the only prompt; or a list of them for each prompt. Anything
                the processor reads; floats are in [0, 1], as of other pipelines, and a batch of arrays or tensors is
                a list. Without a size, the output has that of each prompt's first picture.
            negative_prompt: what guidance leads away from.
            num_images_per_prompt, kwargs: as in `generate` of the model, with its other arguments too, as
                `generation_config`; what is None says nothing.
            seed, generator: as there; the decoder's noise follows from them too. With both, as drivers of any
                pipeline give them, the seed counts.
            num_inference_steps: of the decoder; the steps of the model are its scales, whatever this is.
            callback_on_step_end: called after each scale of a picture with (pipeline, scale from 0 on, scale,
                tensors); what it returns is not read, codes are forced by `generate` of the model.
            callback_on_step_end_tensor_inputs: names of these tensors: `"codes"` alone, the picture's so far.
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`, the
                codes (B, L).
            decoder_kwargs: of the decoder pipeline's call: `num_inference_steps`, `upscale`, `strength`, `prompt` (in
                place of the prompts), ...

        Returns:
            `ImagePipelineOutput`, or a tuple, with `images`, prompt by prompt.

        Raises:
            ValueError: for `decoder_kwargs` without a decoder, pictures or sizes that do not fit, and what
                `generate` refuses.
        """
        if decoder_kwargs and self.decoder is None:
            raise ValueError(f"decoder_kwargs ({', '.join(decoder_kwargs)}) need a decoder, and the pipeline has none")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs must be of {known}, got {', '.join(unknown)}")
        if not isinstance(prompt, (str, list, tuple)) or prompt in ([], ()):
            raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
        kwargs["num_images_per_prompt"] = num_images_per_prompt
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        pictures = _pictures(image, len(prompts))
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": each} for each in own] + [_text(text)]}]
            for own, text in zip(pictures, prompts)
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            generation_mode="image",
            negative_prompt=negative_prompt,
            sanitize_control_tokens=True,
            processor_kwargs={"do_rescale": False},
        )
        num_images = self.model.image_settings(**kwargs)[0].num_images_per_prompt
        generator = None if seed is not None else generator
        generators = RowGenerators.create(len(prompts), num_images, seed, generator).generators
        of_decoder = [each.clone_state() for each in generators]
        if callback_on_step_end is not None:
            names = callback_on_step_end_tensor_inputs

            def tell(picture: int, scale: int, codes: torch.Tensor) -> None:
                callback_on_step_end(self, scale, scale, {name: codes for name in names})

            kwargs["on_scale_end"] = tell
        output = apply_forward_hook(NextFlowForConditionalGeneration.generate)(
            self.model,
            **inputs.to(self._execution_device),
            generation_mode="image",
            generator=generators,
            return_dict_in_generate=True,
            **kwargs,
        )
        codes, grid = output.sequences - self.model.config.text_vocab_size, tuple(output.image_grid_hw[0].tolist())
        if output_type == "latent":
            images = codes
        elif self.decoder is not None:
            if num_inference_steps is not None:
                decoder_kwargs = {"num_inference_steps": num_inference_steps} | (decoder_kwargs or {})
            images = self._draw(prompts, codes, grid, num_images, of_decoder, output_type, decoder_kwargs)
        else:
            pixels = self.model.model.vq_model.decode(codes, grid)
            if output_type == "pil":
                images = self.processor.post_process_image(pixels)
            else:
                images = VaeImageProcessor().postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draw(self, prompts, codes, grid, num_images, generator, output_type, decoder_kwargs):
        """By the diffusion decoder: the prompts are its captions."""
        vq_model = self.model.model.vq_model
        controls = {"prompt": [text for text in prompts for _ in range(num_images)], "generator": generator}
        controls |= decoder_kwargs or {}
        features = torch.cat(vq_model.condition_features(codes, grid), dim=1)
        if controls.get("strength", 1) < 1:
            controls.setdefault("image", list((vq_model.decode(codes, grid) + 1) / 2))
        self.maybe_free_model_hooks()  # the decoder may need the memory
        return self.decoder(features=features, output_type=output_type, **controls).images


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _pictures(image, num_prompts: int) -> list[list]:
    """The pictures of each prompt."""
    if image is None:
        return [[] for _ in range(num_prompts)]
    if not isinstance(image, (list, tuple)):
        image = list(image) if getattr(image, "ndim", 3) == 4 else [image]
    nested = [isinstance(entry, (list, tuple)) for entry in image]
    if not any(nested) and num_prompts == 1:
        return [list(image)]
    if len(image) != num_prompts:
        raise ValueError(f"image must hold one entry for each of {num_prompts} prompts, got {len(image)}")
    return [list(entry) if own else [entry] for own, entry in zip(nested, image)]
