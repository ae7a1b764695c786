"""What every request passes: strangers and bodies too large are refused before they are read; all are counted."""

import hmac
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response
from .metrics import Metrics


class Gate:
    """Middleware of ASGI.

    Args:
        api_key: what paths under `/v1` ask for; None lets everyone in.
        max_bytes: of a body.
        metrics: get the number and the seconds of requests, by the path they are routed to.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int, metrics: Metrics):
        self.app, self.api_key, self.max_bytes, self.metrics = app, api_key, max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        num_bytes, status, start = 0, 500, time.perf_counter()

        async def received() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:  # in chunks, of no declared length
                raise HTTPException(413, f"a body has at most {self.max_bytes} bytes")
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, received, sent)
        finally:
            route = scope.get("route")  # of any other path there may be as many as a client likes
            path = "other" if route is None else route.path
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        key, given = f"Bearer {self.api_key}", headers.get("authorization", "")
        is_open = self.api_key is None or not scope["path"].startswith("/v1")
        if not is_open and not hmac.compare_digest(given.encode(), key.encode()):
            message = "give the server's API key: Authorization: Bearer KEY"
            return error_response(401, message, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            return error_response(413, f"a body has at most {self.max_bytes} bytes, got {length}")
        return None
