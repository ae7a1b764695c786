"""[`SamplesCallback`]: pictures for the same prompts and seed all along a training."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback

from ..lora import below_adapters
from ..processing_nextflow import NextFlowProcessor, user_message
from ..utils.files import write_atomically


class PictureReports:
    """Hands pictures to the trackers of `report_to` that take them: wandb and trackio get them in the Trainer's run,
    TensorBoard as a run of their own, `runs/NAME` in `output_dir` or else `TENSORBOARD_LOGGING_DIR`.

    Args:
        name: of the pictures, before their numbers.
    """

    def __init__(self, name: str):
        self.name = name
        self._writer: Any = None  # tensorboard's, once there is something to write

    def log(self, args, step: int, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        tags = [f"{self.name}/{index:02}" for index in range(len(pictures))]
        for name in ("wandb", "trackio"):
            if name in args.report_to:
                tracker = import_module(name)
                drawn = [tracker.Image(picture, caption=text) for picture, text in zip(pictures, captions)]
                tracker.log({**dict(zip(tags, drawn)), "train/global_step": step})
        if "tensorboard" in args.report_to:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                folder = os.environ.get("TENSORBOARD_LOGGING_DIR", os.path.join(args.output_dir, "runs"))
                self._writer = SummaryWriter(os.path.join(folder, self.name))
            for tag, picture in zip(tags, pictures):
                self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class DrawingCallback(TrainerCallback):
    """Draws pictures every few steps, writes them, and hands them to the trackers of `report_to` that take pictures.

    - `output_dir/samples/step-N/00.png` .. in the order of the captions, each file written whole or not at all.
    - Trackers get them as `samples/00` .., see [`PictureReports`].

    Every process draws, since sharded weights take all of them, and the first one writes.

    Args:
        captions: of the pictures that `draw` gives for a model.
        every: optimizer steps from one drawing to the next.

    Raises:
        ValueError: for `every` below 1.
    """

    def __init__(self, captions: Sequence[str], every: int):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.captions, self.every = captions, every
        self._reports = PictureReports("samples")

    def draw(self, model) -> list[Image.Image]:
        """One picture for each caption."""
        raise NotImplementedError

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        pictures = self.draw(model)
        if not state.is_world_process_zero:
            return
        self.write(Path(args.output_dir, "samples", f"step-{state.global_step}"), pictures)
        self._reports.log(args, state.global_step, pictures, self.captions)

    def on_train_end(self, args, state, control, **kwargs):
        self._reports.close()

    def write(self, folder: Path, pictures: Sequence[Image.Image]) -> None:
        """The pictures as `00.png` .. of a folder."""
        for index, picture in enumerate(pictures):
            write_atomically(folder / f"{index:02}.png", lambda path, picture=picture: picture.save(path, "PNG"))


class SamplesCallback(DrawingCallback):
    """A NextFlow's pictures of the same prompts all along a training, see [`DrawingCallback`].

    The pictures have random streams of their own, so the training's losses are what they are without samples.

    Args:
        processor: of the model.
        prompts: a picture is drawn for each.
        every: optimizer steps from one drawing to the next.
        images: condition images of each prompt, in order; default none.
        seed: of the pictures, or one for each prompt.
        generation: guidance, sampling and size, as [`~NextFlowForConditionalGeneration.generate`] takes them.

    Raises:
        ValueError: without prompts, for `every` below 1, or if `images` has not one entry for each prompt.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        prompts: Sequence[str],
        every: int = 500,
        images: Sequence[Sequence[Image.Image]] | None = None,
        seed: int | Sequence[int] = 0,
        **generation,
    ):
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        super().__init__(list(prompts), every)
        if images is None:
            images = [[]] * len(prompts)
        if len(images) != len(prompts):
            raise ValueError(f"images must have one entry for each of {len(prompts)} prompts, got {len(images)}")
        self.processor, self.seed, self.generation = processor, seed, generation
        self.chats = [[user_message(prompt, given)] for prompt, given in zip(prompts, images)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # the Trainer does the same with `generate`; nothing where FSDP2 shards nothing
        register_fsdp_forward_method(model, "decode_image_tokens")

    @torch.no_grad()
    def draw(self, model) -> list[Image.Image]:
        """One picture for each prompt."""
        inputs = self.processor.apply_chat_template(self.chats, generation_mode="image").to(model.device)
        was_training = model.training
        model.eval()
        try:
            with below_adapters(model).base_model.whole():
                output = model.generate(
                    **inputs,
                    generation_mode="image",
                    seed=self.seed,
                    num_images_per_prompt=1,
                    return_dict_in_generate=True,
                    **self.generation,
                )
                pixels = model.decode_image_tokens(output.sequences, output.image_grid_hw)
        finally:
            model.train(was_training)
        return self.processor.post_process_image(pixels)
