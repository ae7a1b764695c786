"""Prompts rewritten by a chat model before they are drawn, off unless asked for (`--rewrite`).

The paper reports WISE with rewritten prompts. Differs from the paper: it prints neither the model nor its instruction;
the model is whichever the user names, the instruction is ours.
"""

import json
import os
from dataclasses import dataclass
from http.client import HTTPException
from typing import Annotated
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from typer import Option

KEY = "TRANSFORMERS_NEXTFLOW_REWRITE_KEY"
"""Name in the environment of the API key."""

INSTRUCTION = (
    "You rewrite prompts for a model that draws pictures. Say in one paragraph what is to be seen: work out what the "
    "prompt only hints at by general knowledge, and keep every object, number, colour, relation and text it names. "
    "Answer with the rewritten prompt alone."
)
PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Rewriting:
    """Rewriting of prompts.

    Attributes:
        rewrite: address of an API like OpenAI's, such as `http://127.0.0.1:8001/v1`; None leaves prompts as they are.
        rewrite_model: what is asked there.

    Raises:
        ValueError: if one is given without the other, or the address is none of HTTP.
    """

    rewrite: Annotated[
        str | None, Option(metavar="ADDRESS", help=f"Of a chat model's API like OpenAI's; its key: {KEY}.")
    ] = None
    rewrite_model: Annotated[str | None, Option(metavar="NAME", help="The chat model.")] = None

    def __post_init__(self):
        if (self.rewrite is None) != (self.rewrite_model is None):
            raise ValueError("--rewrite and --rewrite-model belong together")
        if self.rewrite is not None and not self.rewrite.startswith(("http://", "https://")):
            raise ValueError(f"--rewrite must be an address such as http://127.0.0.1:8001/v1, got {self.rewrite}")

    def __call__(self, prompt: str) -> str:
        """The prompt that is drawn.

        Raises:
            ConnectionError: if the chat model is not there, or answers with anything but a text.
        """
        if self.rewrite is None:
            return prompt
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        body = json.dumps({"model": self.rewrite_model, "messages": messages}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, 'none')}"}
        request = Request(f"{self.rewrite.rstrip('/')}/chat/completions", body, headers)
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                text = json.load(answer)["choices"][0]["message"]["content"].strip()
        except HTTPError as error:
            raise ConnectionError(f"{self.rewrite} refuses to rewrite: {error}, {error.read()[:200]!r}") from error
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"nobody rewrites at {self.rewrite}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConnectionError(f"{self.rewrite} answers with no message of a chat: {error!r}") from error
        if not text:
            raise ConnectionError(f"{self.rewrite} answers with an empty prompt")
        return text
