"""Messages of chats: as clients write them in, as they get answers out."""

import re

from .errors import RequestError
from .jobs import Answer, Chat
from .limits import Limits
from .pictures import check_pictures, read_data_url, to_base64
from .schemas import Message, Part

PLACE = r"!\[\]\(picture-(\d+)\)"
"""What stands for a picture in the text of an answer."""


def read_chat(messages: list[Message], limits: Limits) -> Chat:
    """Messages with their pictures decoded."""
    parts = [part for message in messages for part in (*message.content, *message.images)]
    check_pictures(sum(part.type == "image_url" for part in parts), limits, "messages")
    chat = []
    for number, message in enumerate(messages):
        content, images = (
            [read_part(part, limits, f"messages[{number}].{name}[{place}]") for place, part in enumerate(listed)]
            for name, listed in (("content", message.content), ("images", message.images))
        )
        if images:
            content = with_images(content, images, f"messages[{number}].images")
        chat.append({"role": message.role, "content": content})
    return chat


def read_part(part: Part, limits: Limits, param: str) -> dict:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": read_data_url(part.image_url.url, limits.max_pixels, f"{param}.image_url.url")}


def with_images(content: list[dict], images: list[dict], param: str) -> list[dict]:
    """The content of an answer as [`message_of`] writes it, with the images in the places its texts name."""
    pieces = [re.split(PLACE, item["text"]) if item["type"] == "text" else [item] for item in content]
    named = [piece for split in pieces for piece in split[1::2]]
    if named != [str(place) for place in range(len(images))]:
        raise RequestError(f"{param}: the text names the pictures {named}, in a message of {len(images)}", param)
    unread, ordered = iter(images), []
    for split in pieces:
        for place, piece in enumerate(split):
            if place % 2:
                ordered.append(next(unread))
            elif not isinstance(piece, str):
                ordered.append(piece)
            elif piece.strip():
                ordered.append({"type": "text", "text": piece.strip()})
    return ordered


def message_of(answer: Answer) -> dict:
    """An answer as a message: its text, in which `![](picture-0)` stands for the first of its `images`."""
    texts, images = [], []
    for part in answer.parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        texts.append(f"![](picture-{len(images)})")  # as PLACE reads it
        images.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_base64(part)}"}})
    message = {"role": "assistant", "content": "\n\n".join(texts), "refusal": None}
    return message | ({"images": images} if images else {})
