"""One request and its reply: what a handler needs of a server, and how ASGI carries it."""

from __future__ import annotations

import asyncio
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sekha.errors import BodyTooLarge, BodyTooSlow
from sekha.gateway.problems import Headers
from sekha.keys import KEY_PREFIX

if TYPE_CHECKING:
    from sekha.gateway.begun import Shortened
    from sekha.gateway.finished import UnderWay

__all__ = ["AsgiExchange", "Exchange", "Message", "Receive", "Send"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""What a caller may call a request: nothing that could end a header, or a line of a log."""
_KEY = KEY_PREFIX.encode()
_IDS_AT_ONCE = 64
_ids: list[bytes] = []
os.register_at_fork(after_in_child=_ids.clear)


class Exchange(ABC):
    """Reads a request's body and sends its reply, with the request's id on it whatever that is."""

    # Defaults of the class, since one is made for each request, and most of them stay as they are.
    method = ""
    path = ""
    query = b""
    authorization: bytes | None = None
    request_id = b""
    status = 0
    """Of the reply; 0 until it has begun."""
    under_way: UnderWay | Shortened | None = None
    """What is noted of it, once it is known what is asked."""
    begun: Shortened | None = None
    """What was done for it before it had a task."""
    ended = False
    """Whether the reply is out."""
    left = False
    """Whether the caller is gone, and the request was cancelled for it."""

    def identify(self, asked: bytes | None) -> None:
        """Give the request the id that its caller asked for, or a new one: if that is none, or has a key in it."""
        if asked is not None and _ID.fullmatch(asked) and _KEY not in asked:
            self.request_id = asked
        else:
            if not _ids:
                # Many for one call of the system's.
                drawn = os.urandom(16 * _IDS_AT_ONCE).hex().encode()
                _ids.extend(drawn[at : at + 32] for at in range(0, len(drawn), 32))
            self.request_id = _ids.pop()

    @abstractmethod
    async def body(self, *, limit_mb: float, timeout_seconds: float) -> bytes:
        """The whole body. Raises `BodyTooLarge`, `BodyTooSlow`, and `ConnectionError` when the caller is gone."""

    @abstractmethod
    async def answer(self, status: int, body: bytes, headers: Headers) -> None: ...

    @abstractmethod
    async def begin(self, headers: Headers) -> None:
        """Begin a reply that comes in pieces."""

    @abstractmethod
    async def go_on(self, piece: bytes) -> None: ...

    @abstractmethod
    async def end(self, piece: bytes = b"") -> None: ...


class AsgiExchange(Exchange):
    """An exchange under any ASGI server: for tests, and for mounting the gateway in another application."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method = scope["method"]
        self.path = scope["path"]
        self.query = scope["query_string"]
        self.was_read = False
        """Whether the body is here."""
        asked = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"x-request-id":
                asked = value
        self.identify(asked)

    async def body(self, *, limit_mb: float, timeout_seconds: float) -> bytes:
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
        self.status = 200
        headers.append((b"x-request-id", self.request_id))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def go_on(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": piece})
        self.ended = True
