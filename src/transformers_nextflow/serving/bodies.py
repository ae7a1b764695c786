"""Requests that mean one thing: what a web framework would drop, mend or choose of them is refused by its name."""

import json
from collections import Counter
from collections.abc import Callable, Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData

from .errors import RequestError

MAX_TEXTS = 32
"""Of a form; there are fewer fields."""

MAY_BE_EMPTY = ("negative_prompt", "user")
"""Texts of a form that say as much where they are empty as where they are not given."""


class OneMeaning(Request):
    """A request whose body says each thing once, and nothing but what is read."""

    async def json(self):
        long = lambda digits: int(digits) if len(digits) < 20 else float(digits)  # noqa: E731  # out of every range
        return json.loads(await self.body(), object_pairs_hook=once, parse_int=long)

    async def form(self, **limits) -> FormData:  # type: ignore[override]
        kind, options = parse_options_header(header := self.headers.get("content-type"))
        if kind != b"multipart/form-data":
            raise RequestError(f"the body: a form of the type multipart/form-data, got {header!r}")
        body, form = await self.body(), await super().form(**limits | {"max_fields": MAX_TEXTS})
        if b"--" + options[b"boundary"] + b"--" not in body:
            raise RequestError("the body: the form is cut short, its last boundary is missing")
        check_once(name for name, _ in form.multi_items() if name not in ("image", "image[]"))
        for name, value in form.multi_items():
            if not (value if isinstance(value, str) else value.size) and name not in MAY_BE_EMPTY:
                raise RequestError("it is empty", name)
            if isinstance(value, str) and value.encode() not in body:  # Starlette reads as Latin-1 what is none
                raise RequestError("texts are UTF-8", name)
        return form


class Route(APIRoute):
    """A path that takes a body as [`OneMeaning`] and nothing beside it."""

    def get_route_handler(self) -> Callable:
        answer = super().get_route_handler()

        async def checked(request: Request):
            for name in request.query_params:
                raise RequestError("it belongs into the body; paths take no parameters", name)
            if (coding := request.headers.get("content-encoding", "identity")) != "identity":
                raise RequestError(f"the body: as it is, got one of the Content-Encoding {coding!r}", status=415)
            return await answer(OneMeaning(request.scope, request.receive))

        return checked


def once(pairs: list[tuple]) -> dict:
    """An object of JSON, of whose names each stands there once."""
    check_once(name.encode(errors="backslashreplace").decode() for name, _ in pairs)
    return dict(pairs)


def check_once(names: Iterable[str]) -> None:
    """Raise a [`RequestError`] where a field is given several times."""
    for name, times in Counter(names).items():
        if times > 1:
            raise RequestError(f"give it once, got it {times} times", name)
