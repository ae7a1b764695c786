"""What requests say: OpenAI's fields, as far as this model has a meaning for them, and its own controls of pictures.

Fields that are not here, or whose value would have no effect, are refused rather than ignored; null is as good as
nothing.
"""

import json
import random
import re
from base64 import b64decode
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..sampling import COLDEST

LONGEST_PROMPT = 32_000
"""Characters, as in OpenAI's API."""

NUMBER_OR_BOOL = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false"
"""As JSON writes them."""

Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]

OnlyFalse = Annotated[Literal[False], BeforeValidator(lambda given: False if given is False else repr(given))]
"""Where 0 is something else."""


class Schema(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, str_min_length=0)  # no surrogates where there is a limit

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


def read_data_url(url: Any) -> bytes:
    """The file in a data URL of a picture, in base64."""
    header = re.match(r"data:image/[\w.+-]+;base64,", str(url), re.ASCII)
    if header is None:
        raise ValueError("pictures come as data URLs, data:image/png;base64,...; nothing is fetched")
    try:
        return b64decode(url[header.end() :], validate=True)
    except ValueError as error:  # binascii.Error, and what is no ASCII
        raise ValueError(f"the picture is no base64: {error}") from error


def read_size(size: Any) -> tuple[int, int] | None:
    """`"WIDTHxHEIGHT"` as (height, width); None for `"auto"`."""
    if size == "auto":
        return None
    if not (found := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(size))):
        raise ValueError('a size is "auto" or WIDTHxHEIGHT in pixels')
    return int(found[2]), int(found[1])


class Controls(Schema):
    """How things are drawn: of OpenAI's API seed, temperature and top_p, and this model's own; default: the model's.

    Attributes:
        seed: by default a new one, which the answer tells.
        size: (height, width); None is `"auto"`.
        user: OpenAI's name for whose request it is; nothing is made of it.
    """

    seed: int = Field(default_factory=lambda: random.randrange(2**31), ge=0, lt=2**63)
    size: Annotated[Any, BeforeValidator(read_size)] = None  # a type of its own would be none of a form's fields
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    negative_prompt: str | None = Field(default=None, max_length=LONGEST_PROMPT)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, ge=1e-6, le=1)
    user: str | None = None

    @field_validator("top_k", "top_p")
    @classmethod
    def there_is_chance(cls, value: float | None, info: ValidationInfo) -> float | None:
        temperature = info.data.get("temperature")
        if temperature is not None and temperature < COLDEST and value not in (None, 0, 1):
            raise ValueError(f"has no effect with temperature {temperature}")
        return value


class ImageRequest(Controls):
    """`/v1/images/generations`."""

    prompt: Prompt
    model: str | None = None
    n: int = Field(default=1, ge=1)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"
    stream: OnlyFalse = False


class EditRequest(ImageRequest):
    """`/v1/images/edits`, a form with files, whose numbers and the like are texts as JSON writes them.

    Attributes:
        image, images: the pictures; clients write `image` of one, `image[]` of several.
        mask: of the first picture's size; it is drawn anew where this is transparent.
    """

    image: list[UploadFile] = []
    images: list[UploadFile] = Field(default=[], alias="image[]")
    mask: UploadFile | None = None

    @field_validator("n", "seed", "guidance_scale", "temperature", "top_k", "top_p", "stream", mode="before")
    @classmethod
    def text_as_json(cls, text: Any) -> Any:
        return json.loads(text) if isinstance(text, str) and re.fullmatch(NUMBER_OR_BOOL, text) else text


class ImageUrl(Schema):
    url: Annotated[bytes, BeforeValidator(read_data_url)]
    detail: Literal["auto"] = "auto"


class Part(Schema):
    """A text or a picture of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def is_what_it_says(self):
        other = {"text": "image_url", "image_url": "text"}[self.type]
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of the type {self.type} has the field {self.type} and no {other}")
        return self


class Message(Schema):
    """A message of a chat.

    Attributes:
        images: of an earlier answer, in whose text `![](picture-0)` stands for the first of them.
    """

    role: Literal["system", "user", "assistant"]
    content: list[Part] = Field(min_length=1)
    images: list[Part] = []

    @field_validator("content", mode="before")
    @classmethod
    def text_is_one_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def images_are_an_answers(self):
        if self.images and (self.role != "assistant" or any(part.type == "text" for part in self.images)):
            raise ValueError("images are the pictures of an answer; others are parts of the content")
        return self


OF_MODALITIES = {
    **dict.fromkeys(("size", "guidance_scale", "negative_prompt"), {"image"}),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), {"text"}),
    "max_images": {"text", "image"},
}
"""Fields of a chat that are about answers with these modalities alone."""


class StreamOptions(Schema):
    include_usage: bool = False


class ChatRequest(Controls):
    """`/v1/chat/completions`.

    Attributes:
        modalities: what the answer is made of: text (the default), a picture, or both in turn.
        max_tokens, max_completion_tokens: of text, two names of one thing.
        max_images: of an answer of both.
        stream, stream_options: the answer as events, a last one with the usage.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] = Field(default=["text"], min_length=1, max_length=2)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_images: int = Field(default=1, ge=1)
    n: int = Field(default=1, ge=1, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def without_effect(self) -> str | None:
        """A field that was given and says nothing about an answer of these modalities."""
        found = [name for name, needed in OF_MODALITIES.items() if not needed <= {*self.modalities}]
        found += [] if self.stream else ["stream_options"]
        return next((name for name in found if name in self.model_fields_set), None)

    @field_validator("modalities")
    @classmethod
    def each_once(cls, modalities: list[str]) -> list[str]:
        if len({*modalities}) < len(modalities):
            raise ValueError("name each modality once")
        return modalities

    @field_validator("messages")
    @classmethod
    def ends_in_a_question(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages
