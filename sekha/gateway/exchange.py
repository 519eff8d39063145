"""One request and its reply, as ASGI carries them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from random import getrandbits
from typing import TYPE_CHECKING, Any, TypeAlias

from sekha.errors import BodyTooLarge, BodyTooSlow
from sekha.gateway.problems import Headers

if TYPE_CHECKING:
    from sekha.gateway.finished import UnderWay

__all__ = ["Exchange", "Message", "Receive", "Send"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_ID_LENGTH = 128


class Exchange:
    """Reads a request's body and sends its reply, with the request's id on it whatever that is."""

    __slots__ = (
        "_receive",
        "_send",
        "authorization",
        "ended",
        "method",
        "path",
        "query",
        "request_id",
        "status",
        "under_way",
        "was_read",
    )

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.authorization: bytes | None = None
        self.request_id = b""
        self.status = 0
        """Of the reply; 0 until it has begun."""
        self.under_way: UnderWay | None = None
        """What is noted of it, once it is known what is asked."""
        self.was_read = False
        """Whether the body is here."""
        self.ended = False
        """Whether the reply is out."""
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"x-request-id" and len(value) <= _ID_LENGTH and value.isalnum():
                self.request_id = value
        if not self.request_id:
            self.request_id = b"%032x" % getrandbits(128)

    async def body(self, *, limit_mb: float, timeout_seconds: float) -> bytes:
        """The whole body. Raises `BodyTooLarge`, `BodyTooSlow`, and `ConnectionError` when the caller is gone."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message.get("body", b"")
            if len(body) > limit_mb * 1e6:
                raise BodyTooLarge(limit_mb)
            self.was_read = True
            return body
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._long_body(message, limit_mb)
        except TimeoutError as error:
            raise BodyTooSlow(timeout_seconds) from error

    async def _long_body(self, message: Message, limit_mb: float) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the caller left while sending")
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit_mb * 1e6:
                raise BodyTooLarge(limit_mb)
            parts.append(part)
            if not message.get("more_body"):
                self.was_read = True
                return b"".join(parts)
            message = await self._receive()

    async def caller_left(self) -> None:
        """Return when the caller has closed the connection. For after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes, headers: Headers) -> None:
        self.status = status
        headers.append((b"content-length", str(len(body)).encode()))
        headers.append((b"x-request-id", self.request_id))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
        self.ended = True

    async def begin(self, headers: Headers) -> None:
        """Begin a reply that comes in pieces."""
        self.status = 200
        headers.append((b"x-request-id", self.request_id))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def go_on(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": piece})
        self.ended = True
