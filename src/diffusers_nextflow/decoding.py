"""What the decoder pipelines share: codes, pictures or features to the condition, and a stock loop that reads it.

Each pipeline is diffusers' own image-to-image pipeline of its family, whose loop, guidance, schedulers, callbacks and
adapters are therefore the library's. Added is the condition, on the channels of what the backbone reads at each step,
and a start from noise, as in text-to-image, where `strength` is 1.

Shape suffixes: B pictures, n pictures for each, C condition channels, h w the codes' grid, H W pixels.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor

from transformers_nextflow import NextFlowImageProcessor, NextFlowVQModel
from transformers_nextflow.scales import Grid
from transformers_nextflow.utils.files import write_atomically

from .conditioning import NextFlowConditioner, ReadsCondition, condition_dim, read_condition, widen_conv_in

logger = logging.get_logger(__name__)

CAPTIONS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


class StableNames:
    """Of a pipeline: model_index.json names the project's classes by this package, whatever file they are in.

    Beside it goes `pipeline.py`, which imports the package for who has not: `DiffusionPipeline.from_pretrained(folder,
    custom_pipeline=folder, trust_remote_code=True)`, for a Hub id `custom_pipeline="pipeline"`.
    """

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        for name, component in self.components.items():
            if type(component).__module__.split(".")[0] in (__package__, "transformers_nextflow"):
                self.register_to_config(**{name: (__package__, type(component).__name__)})
        # one name for all: diffusers runs the files of all folders in one module, which may hold one pipeline
        shim = f"from {__package__} import {type(self).__name__} as Pipeline  # noqa: F401\n"
        write_atomically(Path(save_directory, "pipeline.py"), lambda partial: partial.write_text(shim))
        super().save_pretrained(save_directory, *args, **kwargs)


class NextFlowDecoderMixin(StableNames):
    """Codes to pictures by a diffusion backbone (NextFlow sec. 2.3 and 3.3), before a stock pipeline in the bases."""

    family: str  # of the conditioner
    backbone: str  # name of the component
    stride: int  # pixels along the edge of one latent or token

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, DiffusionPipeline):
            call = _with_arguments(NextFlowDecoderMixin.__call__, super().__call__)
            cls.__call__ = call  # type: ignore[method-assign]

    def _add_condition(self, conditioner: NextFlowConditioner | None, vq_model: NextFlowVQModel | None) -> None:
        """Register conditioner and vision tokenizer, and let the backbone read the condition."""
        backbone = getattr(self, self.backbone)
        if conditioner is None and vq_model is not None and backbone is not None:
            logger.warning("the decoder has no conditioner: a fresh one is made, which changes nothing until trained")
            conditioner = NextFlowConditioner.for_backbone(vq_model.config, backbone)
            conditioner.to(backbone.device)
        self.register_modules(conditioner=conditioner, vq_model=vq_model)
        if conditioner is None or backbone is None:
            return
        config = conditioner.config
        if config.backbone != self.family:
            raise ValueError(
                f"{type(self).__name__} needs a conditioner of the backbone {self.family}, got {config.backbone}"
            )
        if vq_model is not None:
            given, known = (config.condition_dim, config.patch_size), _described(vq_model)
            if given != known:
                raise ValueError(
                    f"the vision tokenizer has condition_dim and patch_size {known}, but the conditioner {given}"
                )
        if self.family == "unet":
            channels = self.vae.config.latent_channels
            widen_conv_in(backbone, channels, config.width)
            self.image_processor.register_to_config(vae_latent_channels=channels)  # of noise, which it leaves alone
        else:
            if config.width != backbone.inner_dim:
                raise ValueError(
                    f"the backbone's tokens have {backbone.inner_dim} channels, but the conditioner's {config.width}"
                )
            read_condition(self._embedder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        codes: torch.Tensor | Sequence[torch.Tensor] | None = None,
        grid: Grid | None = None,
        features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image: PipelineImageInput | None = None,
        upscale: int | None = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **kwargs,
    ):
        """Draw the pictures of codes, of pictures that are coded first, or of condition features.

        Args:
            prompt: captions for the text branch, one or one for each picture; `""` for none. Or `prompt_embeds`.
            codes: (B, L) int64 of one schedule, or B tensors (L,).
            grid: their final grid; may be absent where only one schedule has as many codes.
            features: instead of codes: (B, C, h, w), `torch.cat(vq_model.condition_features(codes, grid), dim=1)`, or
                B tensors (C, h, w). Needs no vision tokenizer.
            image: instead of codes: what `NextFlowImageProcessor` reads (floats in [0, 1]), of one grid. Beside
                codes or features: what `strength` below 1 starts from.
            upscale: edge of the output as a multiple of what was coded, default the conditioner's.
            strength: in (0, 1]; 1 starts from noise, less from the vision tokenizer's picture (brought to the output's
                size bicubically), which keeps more of its structure.
            height, width: to be checked against the output's size, which codes and `upscale` say already.
            num_images_per_prompt: pictures for each, next to each other in the output.
            generator: one, or a list with one for each picture of the output.
            latents: noise to start from, in the stock pipeline's form.
            kwargs: of the stock image-to-image pipeline's call: `num_inference_steps`, `guidance_scale`,
                `negative_prompt`, `output_type`, `callback_on_step_end`, ...

        Returns:
            The stock pipeline's output, B * n pictures.

        Raises:
            ValueError: if the condition is given not at all or twice, does not fit the backbone, or captions are
                missing, no strings, or differ in number.
        """
        if self.conditioner is None:
            raise ValueError("the decoder has no conditioner; load one, or give a vq_model for a fresh one")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a positive whole number, got {num_images_per_prompt!r}")
        features, start = self._condition(codes, grid, features, image, needs_start=strength < 1)
        cells = self.conditioner.cells(self.stride, upscale)
        size = self.output_size(features.shape[-2:], upscale)
        batch, rows = len(features), len(features) * num_images_per_prompt
        asked = (size[0] if height is None else height, size[1] if width is None else width)
        if asked != size:
            raise ValueError(f"the output is {size[0]}x{size[1]} (height x width), got {asked[0]}x{asked[1]}")
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"a list of generators needs one for each of {rows} pictures, got {len(generator)}")
        known = inspect.signature(super().__call__).parameters  # two of the stock pipelines swallow what they do not
        if unknown := sorted(kwargs.keys() - known.keys()):
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(unknown)}")
        captions = {name: kwargs.pop(name, None) for name in CAPTIONS[1:]}
        captions = _captions({"prompt": prompt} | captions, kwargs, batch)

        if strength == 1:
            kwargs |= self._noise(rows, size, generator, latents)
        elif latents is not None:
            raise ValueError(f"latents are noise to start from, which strength {strength} replaces; use strength=1")
        else:
            start = F.interpolate(start, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
            kwargs["image"] = (start.repeat_interleave(num_images_per_prompt, dim=0) + 1) / 2
        with self._reading(features.repeat_interleave(num_images_per_prompt, dim=0), cells):
            return super().__call__(
                **captions,
                **self._size_arguments(size),
                strength=strength,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                **kwargs,
            )

    def output_size(self, grid: Grid, upscale: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels of the pictures of a grid's codes.

        Raises:
            ValueError: if a cell of the grid is no whole number of latents or tokens.
        """
        edge = self.conditioner.cells(self.stride, upscale) * self.stride
        return grid[0] * edge, grid[1] * edge

    def get_timesteps(self, num_inference_steps: int, strength: float, *args, **kwargs):
        timesteps, steps = super().get_timesteps(num_inference_steps, strength, *args, **kwargs)
        if steps < 1:
            raise ValueError(f"strength {strength} leaves none of {num_inference_steps} steps")
        return timesteps, steps

    def _condition(self, codes, grid, features, image, needs_start: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, C, h, w) features and, where needed, (B, 3, H, W) pictures in [-1, 1] to start from."""
        if codes is not None and features is not None:
            raise ValueError("give codes or features, not both")
        alone = codes is None and features is None
        if alone and image is None:
            raise ValueError("give what to decode: codes, features or image")
        if codes is None and grid is not None:
            raise ValueError(f"grid belongs to codes, got {grid} without any")
        if not alone and image is not None and not needs_start:
            raise ValueError("image beside codes or features is what strength below 1 starts from, got strength 1")
        if (codes is not None or image is not None) and self.vq_model is None:
            raise ValueError("codes and images need the vision tokenizer: load the pipeline with vq_model=")
        device, start = self._execution_device, None
        if alone:
            pixels, grid = self._pixels(image)
            codes = apply_forward_hook(NextFlowVQModel.encode)(self.vq_model, pixels.to(device))
        elif image is not None:
            start, _ = self._pixels(image)
        if codes is not None:
            codes = _stacked("codes", codes, 2)
            if codes.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"codes must be int64, got {codes.dtype}")
            codes, grid = codes.to(device), self._grid(codes, grid)
            parts = apply_forward_hook(NextFlowVQModel.condition_features)(self.vq_model, codes, grid)
            features = torch.cat(parts, dim=1)
            if needs_start and start is None:
                start = apply_forward_hook(NextFlowVQModel.decode)(self.vq_model, codes, grid)
        features = _stacked("features", features, 4)
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        if needs_start and start is None:
            raise ValueError("strength below 1 starts from a picture: give codes, or image beside features")
        if start is not None and len(start) != len(features):
            raise ValueError(f"there are {len(features)} pictures to decode, got {len(start)} to start from")
        if start is not None and start.shape[-2:] != (expected := self._coded_size(features)):
            raise ValueError(f"the pictures to start from must be {expected}, got {tuple(start.shape[-2:])}")
        return features.to(device), start if start is None else start.to(device)

    def _random(self, shape: tuple[int, ...], generator, latents: torch.Tensor | None) -> torch.Tensor:
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
            return latents
        return randn_tensor(shape, generator, self._execution_device, getattr(self, self.backbone).dtype)

    def _coded_size(self, features: torch.Tensor) -> tuple[int, int]:
        height, width = (length * self.conditioner.config.patch_size for length in features.shape[-2:])
        return height, width

    def _grid(self, codes: torch.Tensor, grid: Grid | None) -> Grid:
        if grid is not None:
            height, width = map(int, grid)
            return height, width
        fitting = [s.final_grid for s in self.vq_model.schedules if s.num_codes == codes.shape[1]]
        if len(fitting) != 1:
            raise ValueError(f"{codes.shape[1]} codes fit {len(fitting)} schedules ({fitting}); name one by grid")
        return fitting[0]

    def _pixels(self, image) -> tuple[torch.Tensor, Grid]:
        """Pictures to (B, 3, H, W) in [-1, 1] of one grid, and that grid."""
        entries = image if isinstance(image, (list, tuple)) else [image]
        is_float = any("float" in str(getattr(entry, "dtype", "")) for entry in entries)
        processor = NextFlowImageProcessor.from_vq_config(self.vq_model.config)
        grid, pixels = processor.whole(processor(image, return_tensors="pt", do_rescale=not is_float))
        return pixels, grid

    @contextmanager
    def _reading(self, features: torch.Tensor, cells: int) -> Iterator[None]:
        """While it lasts, the backbone reads the condition beside each input."""
        backbone = getattr(self, self.backbone)
        if self.family != "unet" and not isinstance(self._embedder, ReadsCondition):
            raise ValueError("an adapter on the layer that reads the latents hides the condition: leave it out")
        condition = self.conditioner(features.to(self.conditioner.dtype), cells)
        dim = 1 if self.family == "unet" else -1

        def join(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            # guidance puts the unconditional rows before the others
            rows = condition.repeat(len(hidden) // len(condition), *[1] * (condition.ndim - 1))
            hidden = torch.cat([hidden, rows.to(hidden)], dim=dim)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        handle = backbone.register_forward_pre_hook(join, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _with_arguments(call, stock):
    """`call`, which hands its `kwargs` on to `stock`, with a signature that names them."""

    @wraps(call)
    def __call__(self, *args, **kwargs):
        return call(self, *args, **kwargs)

    own = {name: p for name, p in inspect.signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD}
    further = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(stock).parameters.items()
        if name not in own and parameter.kind is not parameter.VAR_KEYWORD
    ]
    __call__.__signature__ = inspect.Signature([*own.values(), *further])
    return __call__


def _described(vq_model: NextFlowVQModel) -> tuple[int, int]:
    config = vq_model.config
    if config.image_size is not None:
        raise ValueError(
            f"pictures of {config.image_size} pixels are no multiple of their grid: the decoder needs a vision "
            "tokenizer whose cells are whole pixels"
        )
    return condition_dim(config), config.patch_size


def _stacked(name: str, given: torch.Tensor | Sequence[torch.Tensor], ndim: int) -> torch.Tensor:
    """A batch, or a sequence of entries with or without a batch dimension, as one tensor."""
    entries = [given] if isinstance(given, torch.Tensor) else list(given)
    if not entries or not all(isinstance(entry, torch.Tensor) for entry in entries):
        raise ValueError(f"{name} must be a tensor or a list of tensors, got {given!r}")
    entries = [entry[None] if entry.ndim == ndim - 1 else entry for entry in entries]
    shapes = sorted({tuple(entry.shape[1:]) for entry in entries})
    if any(entry.ndim != ndim for entry in entries) or len(shapes) != 1:
        raise ValueError(f"{name} of one call must have {ndim} dimensions and one size, got {shapes}")
    return torch.cat(entries)


def _captions(captions: dict, kwargs: dict, batch: int) -> dict:
    """One caption for each picture."""
    if captions["prompt"] is None and kwargs.get("prompt_embeds") is None:
        raise ValueError('the decoder reads a caption too: give prompt ("" for none) or prompt_embeds')
    counts = {}
    for name, given in list(captions.items()):
        if given is None:
            del captions[name]
        else:
            captions[name] = [given] * batch if isinstance(given, str) else list(given)
            counts[name] = len(captions[name])
            if wrong := [entry for entry in captions[name] if not isinstance(entry, str)]:
                raise ValueError(f'{name} must hold strings ("" for none), got {wrong[0]!r}')
    if kwargs.get("prompt_embeds") is not None:
        counts["prompt_embeds"] = len(kwargs["prompt_embeds"])
    for name, count in counts.items():
        if count != batch:
            raise ValueError(f"{name} must have one entry for each of {batch} pictures, got {count}")
    return captions
