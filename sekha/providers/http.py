"""A small HTTP/1.1 client for one job: many POSTs to few origins, at the least CPU.

Connections are kept open and used again. Time limits cost a request nothing: one timer in each client looks
at all of them every tenth of a second, so a limit is kept to within that. Proxies are not used, and neither
`HTTPS_PROXY` nor `.netrc` is read; redirects are not followed, since a key must not follow them.

    client = HttpClient()
    target = Target.of("https://api.example.com/v1/chat/completions", {"authorization": "Bearer …"})
    response = await client.post(target, body, timeout_seconds=60)
    response.status, response.content

What fails raises `TimeoutError` (`NotSent` while there was no connection), `OSError` (`ConnectionError` for a
connection that was lost, `AnswerLost` after a while, `AnswerCut` once an answer had begun), or `BadResponse` where
the other side does not speak HTTP/1.1 as agreed (`NoAnswer` where it did not even begin to).
"""

from __future__ import annotations

import asyncio
import re
import ssl
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any
from urllib.parse import urlsplit

import httptools

from sekha.plain_heads import PlainHead, plain_head
from sekha.turns import MOST_BYTES, turn_of

__all__ = [
    "AnswerCut",
    "AnswerLost",
    "BadResponse",
    "HttpClient",
    "HttpLimits",
    "NoAnswer",
    "NotSent",
    "Response",
    "Target",
]

_SWEEP_SECONDS = 0.1
# A kept connection that the other side had closed is noticed within a round trip, and connecting takes one at the
# least. What is lost later may have been worked on, and paid for, so it is not sent again.
_STALE_CONNECTS = 2
_STALE_SECONDS = (0.1, 1.0)
"""At the least, so that a loop that was busy notices it in time too, and at the most."""
_LEARNED = 8
"""Heads of answers that a connection remembers in vain before it stops: most providers never send one twice."""
_STATUS = re.compile(rb"[\r\n]*HTTP/(?:0\.9|1\.[01]|2\.0) +\d")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class BadResponse(Exception):
    """The answer breaks HTTP, or a limit of ours. The message quotes nothing of it."""


class NoAnswer(BadResponse):
    """What came answers no request: it is not HTTP at all, or leaves it. So nobody worked on the request."""


class NotSent(TimeoutError):
    """No connection was to be had in time, so the other side knows nothing of the request."""


class AnswerLost(ConnectionResetError):
    """The connection was lost so long after the request that somebody may have worked on it."""


class AnswerCut(ConnectionError):
    """The connection was lost in the middle of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    connections: int = 1000
    """To one origin at once; further requests wait for one, within their own time."""
    connect_seconds: float = 10.0
    idle_seconds: float = 60.0
    header_bytes: int = 64 * 1024
    body_bytes: int = 64 * 1024 * 1024
    """Of a whole body; a body that is read as it comes may be longer."""
    unread_bytes: int = 256 * 1024
    """Of a body that is read as it comes: above it, the other side has to wait for the reader."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and their head but for the length of the body, written once."""

    host: str
    port: int
    secure: bool
    head: bytes = field(repr=False)
    origin: tuple[str, int, bool] = field(init=False)
    """Whose connections they can share."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", (self.host, self.port, self.secure))

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str], *, method: str = "POST") -> Target:
        """Raises `ValueError`, which quotes no header, for an address or header that HTTP cannot carry."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{parts.scheme}://{parts.hostname or ''} is no address of an HTTP server")
        secure = parts.scheme == "https"
        host = parts.hostname.encode("idna").decode("ascii")
        shown = f"[{host}]" if ":" in host else host
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or not path.isprintable() or " " in path:
            raise ValueError("the path of an address holds a character that has to be percent-encoded")
        lines = [f"{method} {path} HTTP/1.1", f"host: {shown}{f':{parts.port}' if parts.port else ''}"]
        for name, value in {**headers, "accept-encoding": "identity"}.items():
            if not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"the header {name!r} holds a character that no header can carry")
            lines.append(f"{name}: {value}")
        head = "\r\n".join([*lines, "content-length: "]).encode("latin-1")
        return cls(host, parts.port or (443 if secure else 80), secure, head)


class HttpClient:
    """Connections of one event loop. Used under another loop, it forgets the first one's and starts anew."""

    def __init__(self, *, limits: HttpLimits | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.limits = limits or HttpLimits()
        self._tls = tls
        self._pools: dict[tuple[str, int, bool], _Pool] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def post(self, target: Target, body: bytes, *, timeout_seconds: float) -> Awaitable[Response]:
        """Send, and return when the whole answer is there."""
        return self._exchange(target, body, timeout_seconds, whole=True)

    def open(self, target: Target, body: bytes, *, timeout_seconds: float) -> Awaitable[Response]:
        """Send, and return when the answer's head is there. Read its `block()`s, and `close()` it."""
        return self._exchange(target, body, timeout_seconds, whole=False)

    async def aclose(self) -> None:
        """Close every connection; what is under way fails with `ConnectionError`."""
        for pool in self._pools.values():
            for connection in list(pool.connections):
                connection.abort()
        self._pools.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        # The sockets are closed by the loop's next turn.
        await asyncio.sleep(0)

    async def _exchange(self, target: Target, body: bytes, timeout_seconds: float, *, whole: bool) -> Response:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._start(loop)
        pool = self._pools.get(target.origin) or self._pool(target)
        expires_at = loop.time() + timeout_seconds
        connection = pool.take() or await pool.connection(expires_at)
        response = Response(connection, loop, expires_at, whole)
        connection.send(response, target.head, body)
        return await self._first(response, target, body)

    def is_idle(self, target: Target) -> bool:
        """Whether a connection lies idle there, as far as is known."""
        pool = self._pools.get(target.origin)
        return pool is not None and bool(pool.idle)

    def send_now(
        self, target: Target, body: bytes, *, timeout_seconds: float, whole: bool, told: Callable[[], None]
    ) -> Response | None:
        """Send, and call `told` whenever there is more: the `whole` answer, or its head and then each block.

        None, and nothing has happened, where no connection lies idle. `take_over` makes of it what `post` or
        `open` would have returned.
        """
        pool = self._pools.get(target.origin)
        if pool is None or (connection := pool.take()) is None:
            return None
        response = Response(connection, pool.loop, pool.loop.time() + timeout_seconds, whole)
        response.told = told
        connection.send(response, target.head, body)
        return response

    def take_over(self, response: Response, target: Target, body: bytes) -> Awaitable[Response]:
        """Wait for what `send_now` sent, as whoever had called `post` or `open` would."""
        response.told = None
        return self._first(response, target, body)

    async def _first(self, response: Response, target: Target, body: bytes) -> Response:
        """Wait for the first of an answer, and ask once more where a kept connection turns out to have been closed."""
        try:
            if response.whole or not response.headed or response.error is not None:
                await response.more()
        except ConnectionError:
            if not response.stale:
                raise
        except BaseException:
            response.close()
            raise
        else:
            return response
        # A pool with no connection left may have been forgotten meanwhile.
        pool = self._pools.get(target.origin) or self._pool(target)
        connection = await pool.connect(response.expires_at)
        again = Response(connection, response.loop, response.expires_at, response.whole)
        connection.send(again, target.head, body)
        await again.wait()
        return again

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pools.clear()
        self._sweeping = None

    def _pool(self, target: Target) -> _Pool:
        if target.secure and self._tls is None:
            self._tls = _default_tls()
        assert self._loop is not None  # noqa: S101 - set by `_start`, for the type checker
        pool = _Pool(target, self._tls if target.secure else None, self.limits, self._loop)
        self._pools[target.origin] = pool
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        return pool

    def _sweep(self) -> None:
        assert self._loop is not None  # noqa: S101 - set by `_start`, for the type checker
        now = self._loop.time()
        for pool in self._pools.values():
            for connection in list(pool.connections):
                connection.check(now)
        # A client left alone lets its loop sleep.
        self._pools = {where: pool for where, pool in self._pools.items() if pool.in_use}
        self._sweeping = self._loop.call_later(_SWEEP_SECONDS, self._sweep) if self._pools else None


class Response:
    """One answer. Reading it to its end gives its connection back; closing it early closes the connection."""

    # Defaults of the class, since one is made for each request, and most of them stay as they are.
    status = 0
    started = False
    """Whether a byte of it has come."""
    headed = False
    complete = False
    error: Exception | None = None
    unpack: Any = None
    stale = False
    """Whether its connection was lost as one is that the other side had closed before it was asked."""
    told: Callable[[], None] | None = None
    """Called when more is there, in place of `more`."""
    size = 0
    _left = False
    _waiter: asyncio.Future[None] | None = None

    def __init__(
        self, connection: _Connection, loop: asyncio.AbstractEventLoop, expires_at: float, whole: bool
    ) -> None:
        self.expires_at = expires_at
        """The loop's time at which waiting ends with `TimeoutError`. Set it later to allow more."""
        self.whole = whole
        """Whether it is handed on when all of it is there, and not before."""
        self.loop = loop
        self.sent_at = loop.time()
        self.reused = connection.used
        """Whether its connection had carried another, and so may have been closed meanwhile."""
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self._connection = connection

    @property
    def headers(self) -> Mapping[str, str]:
        """By lower-case name; of one that came several times, the last.

        Of an answer whose head was known, `content-length` is the first one's, which was read for good.
        """
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw_headers}

    @property
    def content(self) -> bytes:
        """What has come of the body and was not taken as a block."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    async def body(self) -> bytes:
        """The rest of the body, whole."""
        self.whole = True
        if not self.complete:
            self._connection.resume()
            await self.wait()
        return self.content

    async def block(self) -> bytes:
        """The next bytes, as many as have come; none when the body has ended."""
        while (data := self.take()) is None:
            await self.wait()
        return data

    def take(self) -> bytes | None:
        """The bytes that have come; none when the body has ended, None while there is `more` to wait for."""
        parts = self.parts
        if not parts:
            return b"" if self.complete else None
        self.parts = []
        self.size = 0
        if self._connection.paused:
            self._connection.resume()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if not self.complete:
            self._connection.abort()

    def leave(self, seconds: float) -> None:
        """Take the rest unread, so that the connection can be used again; what is not there by then is cut off."""
        self._left = True
        self.parts.clear()
        self.expires_at = self.loop.time() + seconds

    async def wait(self) -> None:
        """Wait for `more`; who is cancelled meanwhile wants no more."""
        try:
            await self.more()
        except BaseException:
            self.close()
            raise

    def more(self) -> asyncio.Future[None]:
        """What is done when more is there: the head, a block or the whole, as it was asked for.

        Whoever is cancelled while awaiting it has to `close`.
        """
        waiter = self._waiter = self.loop.create_future()
        if self.complete or self.error is not None:
            self.wake()
        return waiter

    # What its connection tells it.

    @property
    def is_awaited(self) -> bool:
        return self._waiter is not None or self._left or self.told is not None

    def restart(self) -> None:
        """Forget an interim answer, such as 100 Continue; the real one follows."""
        self.started = self.headed = False
        self.raw_headers.clear()

    def ends_with_connection(self) -> bool:
        headers = self.headers
        return "content-length" not in headers and not headers.get("transfer-encoding", "").endswith("chunked")

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self.wake()

    def wake(self) -> None:
        if self.told is not None:
            self.told()
            return
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            if self.error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self.error)


class _Connection(asyncio.Protocol):
    """One connection. It carries one request at a time."""

    __slots__ = (
        "_excess",
        "_head_bytes",
        "_keeps",
        "_known",
        "_known_headers",
        "_learned",
        "_limits",
        "_missing",
        "_parser",
        "_pool",
        "_raw",
        "_response",
        "_transport",
        "closing",
        "idle_since",
        "paused",
        "stale_seconds",
        "used",
    )

    def __init__(self, pool: _Pool) -> None:
        self.used = False
        self.closing = False
        self.paused = False
        self.idle_since = inf
        self.stale_seconds = 0.0
        """Within so many of a request it shows that the other side had closed it before."""
        self._pool = pool
        self._limits = pool.limits
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._transport: Any = None
        self._head_bytes = 0
        self._excess = False
        self._keeps = False
        self._raw = b""
        """What an answer began with, that is being parsed."""
        self._known: PlainHead | None = None
        """The last head of an answer that was plain."""
        self._known_headers: list[tuple[bytes, bytes]] = []
        self._learned = 0
        self._missing = 0
        """Bytes of an answer whose head was known, so that the parser has no part in it."""

    def send(self, response: Response, head: bytes, body: bytes) -> None:
        self._response = response
        self._head_bytes = 0
        self.used = True
        self.idle_since = inf
        write = self._pool.turn.write
        if len(body) > MOST_BYTES:  # not copied once more
            write(self._transport, b"%b%d\r\n\r\n" % (head, len(body)))
            write(self._transport, body)
        else:
            write(self._transport, b"%b%d\r\n\r\n%b" % (head, len(body), body))
        self._pool.turn.flush(self._transport)

    def abort(self) -> None:
        self._end(ConnectionAbortedError("closed by us"))

    def check(self, now: float) -> None:
        """End what has taken too long: a request that is waited for, or lying idle."""
        if (response := self._response) is not None:
            if response.is_awaited and now >= response.expires_at:
                self._end(TimeoutError("no answer in time"))
        elif now - self.idle_since > self._limits.idle_seconds:
            self._end(ConnectionAbortedError("idle"))

    def resume(self) -> None:
        if self.paused and not self.closing:
            self.paused = False
            self._transport.resume_reading()

    def _end(self, error: Exception) -> None:
        self.closing = True
        self._transport.abort()
        if self._response is not None:
            self._response.fail(error)

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            # Nothing was asked.
            self._end(BadResponse("nothing was asked"))
            return
        if response.whole and (self._missing or not response.started):
            if self._again(response, data):
                return
            self._raw = data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, zlib.error) as error:
            self._excess = True
            if not response.complete:
                self._end(self._broken_by(error, response, data))
                return
        if response.whole and response.size > self._limits.body_bytes:
            self._end(BadResponse(f"it is longer than {self._limits.body_bytes:,} bytes"))
        elif response.complete:
            if self._raw:
                self._learn(response)
            self._finish(response)
        elif not response.headed:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes:
                self._end(BadResponse(f"its head is longer than {self._limits.header_bytes:,} bytes"))
        elif not response.whole:
            if response.size > self._limits.unread_bytes and not self.paused:
                self.paused = True
                self._transport.pause_reading()
            response.wake()

    def _broken_by(self, error: Exception, response: Response, data: bytes) -> BadResponse:
        ours = error.__context__  # what a callback raises comes wrapped
        if isinstance(ours, BadResponse):
            failure = ours
        else:
            # Until this answer has come as far as its status, the parser has that of the last.
            begun = response.headed or self._head_bytes >= len(b"HTTP/1.1 ") or _STATUS.match(data)
            kind = BadResponse if begun and self._parser.get_status_code() else NoAnswer
            failure = kind("it is not HTTP/1.1")
        failure.__cause__ = error
        return failure

    def _again(self, response: Response, data: bytes) -> bool:
        """Take a piece of an answer whose head is known. Returns whether it is."""
        missing = self._missing
        if not missing:
            found = None if self._known is None else self._known.body_of(data)
            if found is None:
                return False
            start, missing = found
            if missing > self._limits.body_bytes or missing < len(data) - start:
                # Too long, or more than was asked for: that is for the parser.
                return False
            response.started = response.headed = True
            response.status = 200
            response.raw_headers = self._known_headers
            self._keeps = True
            self._learned = 0
            data = data[start:]
        elif len(data) > missing:
            data, self._excess = data[:missing], True
        if data:
            response.parts.append(data)
            response.size += len(data)
        self._missing = missing - len(data)
        if not self._missing:
            response.complete = True
            self._finish(response)
        return True

    def _learn(self, response: Response) -> None:
        """Remember the head of an answer, when it is one that may come again."""
        raw, self._raw = self._raw, b""
        if response.status == 200 and response.unpack is None and self._keeps and self._learned < _LEARNED:
            self._learned += 1
            for name, value in response.raw_headers:
                if len(name) == 14 and name.lower() == b"content-length":
                    self._known = plain_head(raw, value)
                    self._known_headers = response.raw_headers

    def eof_received(self) -> None:
        self.closing = True

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        response, self._response = self._response, None
        if response is not None and not response.complete:
            if error is None and response.headed and response.ends_with_connection():
                response.complete = True
                response.wake()
            else:
                at_once = response.loop.time() - response.sent_at <= self.stale_seconds
                response.stale = at_once and response.reused and not response.started and response.error is None
                lost = AnswerCut() if response.headed else ConnectionResetError() if at_once else AnswerLost()
                lost.__cause__ = error
                response.fail(lost)
        self._pool.closed(self)
        del self._parser  # each keeps the other

    def _finish(self, response: Response) -> None:
        self._response = None
        unsent = self._transport.get_write_buffer_size()
        if unsent or self._excess or self.closing or not self._keeps:
            self.closing = True
            self._transport.close()
        else:
            if self.paused:
                self.resume()
            self.idle_since = self._pool.loop.time()
            self._pool.release(self)
        response.wake()

    # httptools calls these.

    def on_message_begin(self) -> None:
        response = self._response
        if response is None or response.started:
            raise BadResponse("nothing was asked")
        response.started = True

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self._response
        assert response is not None  # noqa: S101 - parsing begins with a request under way
        if response.headed:
            return  # trailers, which mean nothing to us
        response.raw_headers.append((name, value))
        if len(name) == 16 and name.lower() == b"content-encoding":
            match value.strip().lower():
                case b"identity" | b"":
                    pass
                case b"gzip" | b"x-gzip" | b"deflate":
                    response.unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
                case _:
                    raise BadResponse("it is compressed, which we did not ask for")

    def on_headers_complete(self) -> None:
        response = self._response
        assert response is not None  # noqa: S101 - parsing begins with a request under way
        response.status = self._parser.get_status_code()
        response.headed = True

    def on_body(self, data: bytes) -> None:
        response = self._response
        assert response is not None  # noqa: S101 - parsing begins with a request under way
        if response.unpack is not None:
            data = response.unpack.decompress(data, max(self._limits.body_bytes - response.size, 1))
            if response.unpack.unconsumed_tail:
                raise BadResponse(f"it is longer than {self._limits.body_bytes:,} bytes when unpacked")
        if data:  # what unpacks to nothing yet would look like the end
            response.parts.append(data)
            response.size += len(data)

    def on_message_complete(self) -> None:
        response = self._response
        assert response is not None  # noqa: S101 - parsing begins with a request under way
        if response.status == 101:
            raise NoAnswer("it changes to another protocol than HTTP/1.1 (HTTP 101)")
        if 100 <= response.status < 200:
            response.restart()
        else:
            response.complete = True
            # The parser forgets it once this returns.
            self._keeps = self._parser.should_keep_alive()


class _Pool:
    """The connections to one origin."""

    def __init__(
        self, target: Target, tls: ssl.SSLContext | None, limits: HttpLimits, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.idle: list[_Connection] = []
        """Ready to be used, the one used last at the end."""
        self.connections: set[_Connection] = set()
        self.limits = limits
        self.loop = loop
        self.turn = turn_of(loop)
        self._target = target
        self._tls = tls
        self._connecting = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def in_use(self) -> bool:
        return bool(self.connections or self._connecting or self._waiting)

    def take(self) -> _Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if not connection.closing:
                return connection
        return None

    async def connection(self, expires_at: float) -> _Connection:
        while True:
            if (connection := self.take()) is not None:
                return connection
            if len(self.connections) + self._connecting < self.limits.connections:
                return await self.connect(expires_at)
            turn = self.loop.create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout_at(expires_at):
                    await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self._call_next()
                if isinstance(error, TimeoutError):
                    raise NotSent from error
                raise

    async def connect(self, expires_at: float) -> _Connection:
        self._connecting += 1
        target, began = self._target, self.loop.time()
        try:
            async with asyncio.timeout_at(min(expires_at, self.loop.time() + self.limits.connect_seconds)):
                _, connection = await self.loop.create_connection(
                    lambda: _Connection(self), target.host, target.port, ssl=self._tls
                )
        except BaseException as error:
            self._call_next()
            if isinstance(error, TimeoutError):
                raise NotSent from error
            raise
        finally:
            self._connecting -= 1
        least, most = _STALE_SECONDS
        connection.stale_seconds = min(max(_STALE_CONNECTS * (self.loop.time() - began), least), most)
        return connection

    def release(self, connection: _Connection) -> None:
        self.idle.append(connection)
        if self._waiting:
            self._call_next()

    def closed(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


@cache
def _default_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
