"""How a server ends without losing a request that is on its way when SIGTERM comes.

uvicorn closes its door and every connection without a request at once, although a client may just have sent one
there, or read an answer and be about to. (RFC 9112, 9.6: a server should say `Connection: close` before it closes.)
"""

import asyncio
import socket

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send
from uvicorn import Config, Server

GRACE = 1.0
"""Seconds from the signal to the closed door: many times what a request needs to arrive."""


class GracefulServer(Server):
    """uvicorn's server, which from the signal on tells every client not to use its connection again, and for `GRACE`
    seconds still takes what comes."""

    def __init__(self, app: FastAPI, host: str, port: int):
        super().__init__(Config(self.answer, host=host, port=port, interface="asgi3"))
        self.app = app

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and self.should_exit:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, sent)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.sleep(GRACE)
        await super().shutdown(sockets)
