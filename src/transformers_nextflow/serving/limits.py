"""What a server takes."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from ..sampling import integer


@dataclass(frozen=True)
class Limits:
    """Limits; what goes beyond them is refused.

    Attributes:
        max_queue: requests that wait; further ones get status 429.
        max_batch: pictures drawn, or answers written, together.
        max_batches: that are drawn at a time, each by a thread of its own.
        max_images: pictures of one request, in its prompt and in its answer.
        max_pixels: of one picture, in a prompt or in an answer.
        max_new_tokens: of text.
        max_body: of a request, in MiB.

    Raises:
        ValueError: if one is no positive integer.
    """

    max_queue: Annotated[int, Option(metavar="N", help="Requests that wait; beyond, status 429.")] = 64
    max_batch: Annotated[int, Option(metavar="N", help="Pictures drawn, or answers written, together.")] = 16
    max_batches: Annotated[int, Option(metavar="N", help="Drawn at a time; on a CPU with OMP_NUM_THREADS=1.")] = 1
    max_images: Annotated[int, Option(metavar="N", help="Of one request, in its prompt and in its answer.")] = 10
    max_pixels: Annotated[int, Option(metavar="N", help="Of one picture.")] = 2**24
    max_new_tokens: Annotated[int, Option(metavar="N", help="Of text.")] = 1024
    max_body: Annotated[int, Option(metavar="MIB", help="Of a request.")] = 32

    def __post_init__(self):
        for name, value in vars(self).items():
            integer(f"--{name.replace('_', '-')}", value, 1)
