"""Messages of chats: as clients write them in, as they get answers out."""

import re
from itertools import count

from ..utils.files import png_base64
from .errors import RequestError
from .jobs import Answer, Chat, Parts, Studio
from .pictures import check_pictures
from .schemas import Message, Part

PLACE = "![](picture-{})"
"""What stands for a picture, by its number, in the text of an answer."""


def read_chat(messages: list[Message], studio: Studio) -> Chat:
    """Messages with their pictures as a studio reads them."""
    parts = [part for message in messages for part in (*message.content, *message.images)]
    check_pictures(sum(part.type == "image_url" for part in parts), studio.limits, "messages")
    chat = []
    for number, message in enumerate(messages):
        content, images = (
            [read_part(part, studio, f"messages[{number}].{name}[{place}]") for place, part in enumerate(listed)]
            for name, listed in (("content", message.content), ("images", message.images))
        )
        if images:
            content = with_images(content, images, f"messages[{number}].images")
        chat.append({"role": message.role, "content": content})
    return chat


def read_part(part: Part, studio: Studio, param: str) -> dict:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": studio.read_picture(part.image_url.url, f"{param}.image_url.url")}


def with_images(content: list[dict], images: list[dict], param: str) -> list[dict]:
    """The content of an answer as [`text_of`] writes it, with the images in the places its texts name."""
    mark = re.escape(PLACE).replace(r"\{\}", r"\d+")
    split = (re.split(f"({mark})", item["text"]) if item["type"] == "text" else [item] for item in content)
    pieces = [piece for listed in split for piece in listed]
    of_mark = {PLACE.format(number): image for number, image in enumerate(images)}
    named = [piece for piece in pieces if isinstance(piece, str) and re.fullmatch(mark, piece)]
    if named != list(of_mark):
        raise RequestError(f"the text names the pictures {named}, in a message of {len(images)}", param)
    texts = ({"type": "text", "text": piece.strip()} if isinstance(piece, str) else piece for piece in pieces)
    ordered = (of_mark.get(item.get("text"), item) for item in texts)
    return [item for item in ordered if item["type"] == "image" or item["text"]]


def message_of(answer: Answer) -> dict:
    """An answer as a message."""
    return {"role": "assistant", "content": text_of(answer.parts), "refusal": None, **images_of(answer)}


def text_of(parts: Parts) -> str:
    """The text of an answer, in which `![](picture-0)` stands for the first of its pictures."""
    numbers = count()
    return "\n\n".join(part if isinstance(part, str) else PLACE.format(next(numbers)) for part in parts)


def images_of(answer: Answer) -> dict[str, list]:
    """The `images` of an answer's message, if it has any."""
    urls = [f"data:image/png;base64,{png_base64(part)}" for part in answer.parts if not isinstance(part, str)]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"images": images} if images else {}
