"""Requests as calls of `generate`: which fit together, and what comes of several at once.

Every row has a seed of its own, and every request's pictures are encoded and decoded by themselves, so that a request
gets what it would get alone, up to what the rounding of a batch's logits changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..configuration_nextflow import NextFlowConfig
from ..image_generation import ImageGenerationConfig
from ..image_processing_nextflow import size_of
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..processing_nextflow import NextFlowProcessor
from ..regions import codes_of_region
from ..text_generation import text_sampling
from .errors import RequestError
from .limits import Limits
from .pictures import check_pictures, read_picture, too_many_pixels
from .schemas import ChatRequest, Controls, ImageRequest

MAX_NEW_TOKENS = 256
"""Of text, where a request does not say."""

SAMPLING = {"temperature", "top_k", "top_p"}

Chat = list[dict[str, Any]]
"""Messages as the processor takes them, with pictures as [`~Studio.read_picture`] gives them."""

Parts = Sequence[str | Image.Image | None]
"""Texts and pictures of an answer in order, with None for a picture that is not there yet."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request.

    Attributes:
        chat: what is asked.
        mode: `"image"` or `"interleaved"`; text alone is the latter without pictures.
        arguments: of `generate`; requests that are drawn together have the same.
        seed, negative_prompt: its own.
        num_pictures: that are drawn of it at once.
        param: the field that holds the prompt.
        kept: (H, W) bool, where the first picture of the chat stays; None = nowhere.
        tell: gets the parts of an answer so far after each token, see [`Growing`].
        is_awaited: whether somebody waits for the answer.
    """

    chat: Chat
    mode: str
    arguments: dict[str, Any]
    seed: int
    negative_prompt: str
    num_pictures: int
    param: str
    kept: torch.Tensor | None = None
    tell: Callable[[Parts], object] | None = None
    is_awaited: Callable[[], bool] = lambda: True

    def fits(self, other: "Job") -> bool:
        """Whether both can be one call of `generate`."""
        is_alike = self.mode == other.mode and (self.kept is None) == (other.kept is None)
        return is_alike and self.arguments == other.arguments


@dataclass(frozen=True)
class Answer:
    """What came of a request: texts and pictures in order, and its cost.

    Attributes:
        is_whole: false where the answer was cut short.
        prompt_tokens, completion_tokens: positions, those of pictures included.
    """

    parts: Sequence[str | Image.Image]
    is_whole: bool
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Studio:
    """A model and its processor, and what they may be asked for."""

    model: NextFlowForConditionalGeneration
    processor: NextFlowProcessor
    limits: Limits

    def read_picture(self, data: bytes, param: str) -> Image.Image | np.ndarray:
        """See [`~pictures.read_picture`] and [`~Studio.fit`]."""
        return self.fit(read_picture(data, self.limits.max_pixels, param), param)

    def fit(self, picture: Image.Image, param: str) -> Image.Image | np.ndarray:
        """A picture in the size that the model reads it in, since many may wait; raises `RequestError` if the model
        does not take it."""
        try:
            return self.processor.image_processor.fit(picture)
        except ValueError as error:
            raise RequestError(str(error), param) from error

    def picture_job(
        self, asked: ImageRequest | ChatRequest, chat: Chat, param: str, kept: torch.Tensor | None = None
    ) -> Job:
        """Pictures for a chat, by default of the size of its first picture.

        Args:
            param: the field that holds the prompt.
            kept: (H, W) bool, where that picture stays.

        Raises:
            RequestError: if the model draws no such size, or it is not that of a masked picture.
        """
        check_pictures(asked.n, self.limits, "n")
        size = self._size(asked.size, *pictures_of(chat)[:1])
        self._check_guided(asked, size)
        if kept is not None and size != kept.shape:
            sizes = "{1}x{0}, got {3}x{2}".format(*kept.shape, *size)
            raise RequestError(f"with a mask it is the picture's, {sizes}", "size")
        sampling = asked.model_dump(include={*SAMPLING, "guidance_scale"})
        arguments = {"height": size[0], "width": size[1], "num_images_per_prompt": asked.n, **sampling}
        return Job(chat, "image", arguments, asked.seed, asked.negative_prompt or "", asked.n, param, kept)

    def answer_job(self, asked: ChatRequest, chat: Chat) -> Job:
        """An answer of text, or of text and pictures in turn.

        Raises:
            RequestError: if it may be longer than the server writes, or the model draws no such size.
        """
        given = asked.model_dump(include={"max_tokens", "max_completion_tokens"}, exclude_none=True)
        if len({*given.values()}) > 1:
            values = " and ".join(map(str, given.values()))
            raise RequestError(f"the same as max_completion_tokens, got {values}", "max_tokens")
        limit = self.limits.max_new_tokens
        for name, value in given.items():
            if value > limit:
                raise RequestError(f"at most {limit}, got {value}", name)
        max_new_tokens = next(iter(given.values()), min(MAX_NEW_TOKENS, limit))
        arguments = text_sampling(self.model, self.processor, max_new_tokens, **asked.model_dump(include=SAMPLING))
        if "image" in asked.modalities:
            check_pictures(asked.max_images, self.limits, "max_images")
            height, width = self._size(asked.size, *pictures_of(chat)[:1])
            self._check_guided(asked, (height, width))
            guidance = asked.model_dump(include={"guidance_scale"}, exclude_none=True)
        else:
            height, width = self._size(None)  # of nothing, but one for all chats
            guidance = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
        arguments["max_new_images"] = asked.max_images if "image" in asked.modalities else 0
        arguments["image_generation"] = {"height": height, "width": width, **guidance}
        return Job(chat, "interleaved", arguments, asked.seed, asked.negative_prompt or "", 1, "messages")

    @property
    def _settings(self) -> ImageGenerationConfig:
        return ImageGenerationConfig(**self.model.config.image_generation)

    def _check_guided(self, asked: Controls, size: tuple[int, int]) -> None:
        """Raise a [`RequestError`] where a null prompt is given and pictures of a size are not guided."""
        schedule = self.model.model.schedules.by_size(*size)
        settings = self._settings.updated(guidance_scale=asked.guidance_scale)
        if asked.negative_prompt and settings.controls(schedule).roles_from(0) == 1:
            raise RequestError("has no effect without guidance", "negative_prompt")

    def _size(self, asked: tuple[int, int] | None, picture: Image.Image | np.ndarray | None = None) -> tuple[int, int]:
        """(height, width) that is drawn: as asked, else of a picture, else the checkpoint's."""
        table, grid = self.model.model.schedules, None
        settings = self._settings
        if asked is not None:
            settings = settings.updated(height=asked[0], width=asked[1], exact_size=True)
        elif picture is not None:
            grid = table.by_size(*size_of(picture)).final_grid
        try:
            height, width = table.image_size(settings.schedule(table, [grid]))
        except ValueError as error:
            raise RequestError(str(error), "size") from error
        if height * width > self.limits.max_pixels:
            raise RequestError(too_many_pixels(self.limits.max_pixels, width, height), "size")
        return height, width

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers of jobs that fit together.

        Raises:
            RequestError: if the model does not take one of the prompts, or its template one of the chats.
            InterruptedError: as soon as nobody waits for any of them.
        """
        first = jobs[0]

        def go_on(*_) -> bool:
            if not any(job.is_awaited() for job in jobs):
                raise InterruptedError("nobody waits for an answer")
            return False  # what ends an answer

        try:
            inputs = self._inputs(jobs)
        except ValueError as error:
            raise RequestError(str(error), first.param) from error
        arguments = {"seed": [job.seed for job in jobs], "generation_mode": first.mode, **first.arguments}
        arguments["on_scale_end"] = go_on
        try:
            if first.mode == "image":
                return self._draw(inputs, first.num_pictures, arguments)
            arguments["stopping_criteria"] = StoppingCriteriaList([go_on])
            return self._write(inputs, arguments, [job.tell for job in jobs])
        except ValueError as error:  # a prompt is too long
            prompt, null = (inputs[f"{of}attention_mask"].sum() for of in ("", "negative_"))
            raise RequestError(str(error), "negative_prompt" if null > prompt else first.param) from error

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, torch.Tensor]:
        inputs = self.processor.apply_chat_template(
            [job.chat for job in jobs],
            sanitize_control_tokens=True,
            generation_mode=jobs[0].mode,
            negative_prompt=[job.negative_prompt for job in jobs],
            processor_kwargs={"do_rescale": False},
        ).to(self.model.device)
        return inputs | self._codes(jobs, inputs) if "pixel_values" in inputs else inputs

    def _codes(self, jobs: Sequence[Job], inputs: dict) -> dict[str, torch.Tensor]:
        """The codes of the chats' pictures, and those that stay of each chat's first one; request by request, as the
        rounding of a batch could choose others."""
        schedules, whole = self.model.model.schedules, self.model.config.vq_config.image_size is not None
        codes, forced, masks, start = [], [], [], 0
        for job, grids in zip(jobs, inputs["image_grid_hw"].split([len(pictures_of(job.chat)) for job in jobs])):
            of_pictures = [schedules.by_grid(grid) for grid in grids.tolist()]
            end = start + sum(1 if whole else schedule.lengths[-1] for schedule in of_pictures)
            codes.append(self.model.encode_images(inputs["pixel_values"][start:end], grids))
            start = end
            if job.kept is not None:
                forced.append(codes[-1][: of_pictures[0].num_codes])
                masks.append(codes_of_region(job.kept, of_pictures[0]))
        kept = {"forced_codes": torch.stack(forced), "forced_mask": torch.stack(masks)} if forced else {}
        return {"image_codes": torch.cat(codes), "pixel_values": None, **kept}

    def _draw(self, inputs: dict, count: int, arguments: dict) -> list[Answer]:
        output = self.model.generate(**inputs, **arguments, return_dict_in_generate=True)
        answers = []
        for row, mask in enumerate(inputs["attention_mask"]):
            own = slice(row * count, (row + 1) * count)
            pixels = self.model.decode_image_tokens(output.sequences[own], output.image_grid_hw[own])
            pictures = self.processor.post_process_image(pixels)
            answers.append(Answer(pictures, True, int(mask.sum()), output.sequences[own].numel()))
        return answers

    def _write(self, inputs: dict, arguments: dict, tell: Sequence[Callable | None]) -> list[Answer]:
        streamers = [each and Growing(self.model.config, self.processor.tokenizer, each) for each in tell]
        output = self.model.generate(**inputs, **arguments, streamer=streamers)
        schedules = map(self.model.model.schedules.by_grid, output.image_grid_hw.tolist())
        codes = output.image_codes.split([schedule.num_codes for schedule in schedules])
        pictures = [self.model.decode_images(*one)[0] for one in zip(codes, output.image_grid_hw.split(1))]
        split = self.processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=pictures)
        ends, start = arguments["eos_token_id"], output.prompt_length
        ends = ends if isinstance(ends, list) else [ends]
        answers = []
        for parts, ids, mask in zip(split, output.sequences, output.attention_mask.bool()):
            written = ids[start:][mask[start:]].tolist()
            parts = [part.strip() if isinstance(part, str) else part for part in parts]
            parts = [part for part in parts if part != ""]
            answers.append(Answer(parts, written[-1] in ends, int(mask[:start].sum()), len(written)))
        return answers


class Growing(BaseStreamer):
    """Tells the parts of an answer after each of its tokens, with None in the place of a picture."""

    def __init__(self, config: NextFlowConfig, tokenizer, tell: Callable[[Parts], object]):
        self.config, self.tokenizer, self.tell = config, tokenizer, tell
        self.texts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.texts:  # the prompt
            self.texts.append([])
            return
        if (token := int(value)) == self.config.boi_token_id:
            self.texts.append([])
        elif token != self.config.eoi_token_id:
            self.texts[-1].append(token)
        texts = [self.tokenizer.decode(text, skip_special_tokens=True).strip() for text in self.texts]
        texts[-1] = texts[-1].rstrip("\ufffd")  # half a character, of which the rest may come
        first, *others = texts
        parts = [first, *(part for text in others for part in (None, text))]
        self.tell([part for part in parts if part != ""])

    def end(self) -> None:
        """The answer itself follows."""


def make_exact(model: NextFlowForConditionalGeneration) -> None:
    """Let the decoder, what feeds it, and the heads run in float64: what a batch's rounding changes is then lost where
    logits are rounded to float32, so that a request gets in company what it gets alone."""
    core = model.model
    for module in (core.language_model, core.connector, core.scale_embedding, model.lm_head, model.code_head):
        module.double()


def pictures_of(chat: Chat) -> list[Image.Image | np.ndarray]:
    """The pictures of a chat in order."""
    return [item["image"] for message in chat for item in message["content"] if item["type"] == "image"]
