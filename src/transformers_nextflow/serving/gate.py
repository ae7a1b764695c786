"""What is refused before a body is read: strangers, and bodies too large."""

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response


class Gate:
    """Middleware of ASGI.

    Args:
        api_key: what paths under `/v1` ask for; None lets everyone in.
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int):
        self.app, self.api_key, self.max_bytes = app, api_key, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, num_bytes = Headers(scope=scope), 0
        too_large = f"a body has at most {self.max_bytes} bytes"
        length = headers.get("content-length", "0")
        if not self._knows(scope["path"], headers.get("authorization", "")):
            wanted = "give the server's API key: Authorization: Bearer KEY"
            return await error_response(401, wanted, code="invalid_api_key")(scope, receive, send)
        if length.isdecimal() and int(length) > self.max_bytes:
            return await error_response(413, f"{too_large}, got {length}")(scope, receive, send)

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:  # in chunks, of no declared length
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)

    def _knows(self, path: str, authorization: str) -> bool:
        is_open = self.api_key is None or not path.startswith("/v1")
        return is_open or hmac.compare_digest(authorization.encode(), f"Bearer {self.api_key}".encode())
