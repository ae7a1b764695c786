"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, where `param` is the field at fault."""

from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(HTTPException):
    """A request that is refused.

    Args:
        problem: what is wrong, and what would be right.
        param: the field at fault, such as `messages[0].content[1].image_url.url`, which the message begins with.
        status: of HTTP.
        code: OpenAI's name of the case, where it has one.
    """

    def __init__(self, problem: str, param: str | None = None, status: int = 400, code: str | None = None):
        message = problem if param is None else f"{param}: {problem}"
        super().__init__(status, message, headers={"Retry-After": "1"} if status == 429 else None)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's form of an error."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict:
    """OpenAI's form of what was raised."""
    if isinstance(error, RequestError):
        return error_body(error.status_code, error.detail, error.param, error.code)
    if isinstance(error, HTTPException):
        return error_body(error.status_code, error.detail)
    return error_body(500, "the server failed; its log says why")


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status)


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of an application have OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = field_name(first["loc"][1:]) if first["type"] != "json_invalid" else None
        message = f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
        if isinstance(first["input"], bytes):
            message = "the body: an object of JSON, with the header Content-Type: application/json"
        elif first["type"] != "missing" and not isinstance(first["input"], Mapping):
            message += f", got {first['input']!r:.80}"  # it may be a whole picture
        return error_response(400, message, param)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(body_of(error), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(error), 500)


def field_name(location: Sequence[str | int]) -> str | None:
    """`("messages", 0, "content")` as `messages[0].content`; of nothing None."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return name.removeprefix(".") or None
