"""Rewards that are shipped: CLIP-like scores, text in pictures, and servers elsewhere.

Each is a callable in TRL's signature, see `rewards.py`.
"""

import difflib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ...utils.files import png_base64


def prompt_text(prompt: str | list[dict]) -> str:
    """The texts of a prompt's last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return (
        content if isinstance(content, str) else " ".join(item["text"] for item in content if item["type"] == "text")
    )


class ClipScore:
    """Cosine similarity of picture and prompt under a CLIP or SigLIP model of transformers.

    PickScore (`yuvalkirstain/PickScore_v1`) and HPSv2 are CLIP models too: give their weights in transformers' form,
    and `scaled=True` for the logits that they compare.

    Args:
        model, processor: loaded, or the name of both.
        scaled: multiply by the model's logit scale.
        device: where the model runs.
    """

    def __init__(self, model, processor=None, scaled: bool = False, device: str | None = None):
        if isinstance(model, str):
            processor = processor or AutoProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
        self.__name__ = f"{type(model).__name__.removesuffix('Model').lower()}_score"
        self.model = model.eval().requires_grad_(False).to(device or model.device)
        self.processor, self.scaled = processor, scaled

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence, **kwargs) -> list[float]:
        texts = [prompt_text(prompt) for prompt in prompts]
        padding = "max_length" if "siglip" in self.model.config.model_type else True  # as SigLIP was trained
        inputs = self.processor(images=list(images), text=texts, padding=padding, truncation=True, return_tensors="pt")
        output = self.model(**inputs.to(self.model.device))
        similarity = (
            torch.nn.functional.normalize(output.image_embeds.float(), dim=-1)
            * torch.nn.functional.normalize(output.text_embeds.float(), dim=-1)
        ).sum(-1)
        return (similarity * self.model.logit_scale.exp() if self.scaled else similarity).tolist()


class TextMatch:
    """How much of a wanted text a reader finds in the picture: `difflib`'s ratio, case and spaces aside, in [0, 1].

    Args:
        read: a picture's text, by any OCR.
        column: of the dataset, with the wanted texts.
    """

    def __init__(self, read: Callable[[Image.Image], str], column: str = "text"):
        self.read, self.column, self.__name__ = read, column, "text_match"

    def __call__(self, images: Sequence[Image.Image], **columns) -> list[float]:
        if self.column not in columns:
            raise ValueError(f"the dataset has no column {self.column!r} with the wanted texts")
        plain = lambda text: "".join(text.split()).lower()  # noqa: E731
        return [
            difflib.SequenceMatcher(None, plain(wanted), plain(self.read(image))).ratio()
            for image, wanted in zip(images, columns[self.column])
        ]


class RewardServer:
    """Rewards from a server: JSON over HTTP.

    Sends `{"prompts": [...], "images": [base64 PNG, ...], "columns": {...}}`, takes `{"rewards": [number or null]}`.

    Args:
        url: of the server.
        timeout: seconds that an answer may take.
        retries: further attempts after a connection, a time-out or a 5xx status fails, `backoff * 2**n` seconds apart.
        columns: of the dataset that are sent along.

    Raises:
        ConnectionError: when all attempts have failed; ValueError: for an answer that holds no rewards.
    """

    def __init__(
        self, url: str, timeout: float = 60.0, retries: int = 5, backoff: float = 1.0, columns: Sequence[str] = ()
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.columns, self.__name__ = columns, "reward_server"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence, **columns) -> list[float | None]:
        body: dict = {"prompts": [prompt_text(prompt) for prompt in prompts], "images": list(map(png_base64, images))}
        body["columns"] = {name: columns[name] for name in self.columns}
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        failure: OSError | None = None
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _rewards_of(answer.read(), self.url)
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise ValueError(f"{self.url} answered {error.code} {error.reason}") from error
                failure = error
            except OSError as error:  # refused, reset, timed out
                failure = error
            if attempt < self.retries:
                time.sleep(self.backoff * 2**attempt)
        raise ConnectionError(f"{self.url} failed {self.retries + 1} times, at last with: {failure}") from failure


def _rewards_of(answer: bytes, url: str) -> list[float | None]:
    try:
        rewards = json.loads(answer)["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{url} must answer {{"rewards": [..]}}, got {answer[:80]!r}') from error
    return rewards
