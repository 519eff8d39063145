"""HTTP/1.1 for the gateway, at the least CPU.

Under uvicorn a chat took three timers, an ASGI scope and five messages: a fifth of all its CPU. Here a request is
one task, and one timer of the whole server looks at all time limits. A caller who leaves cancels his request
at once. TLS, HTTP/2 and WebSockets are for whoever stands in front.

Who keeps a connection sends the same head again and again, but for the length of the body. The first is parsed and
remembered; what is the same to the byte is not parsed again, and what differs in anything else is.
"""

from __future__ import annotations

import asyncio
import http
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from math import inf
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools

from sekha.errors import BodyTooLarge, BodyTooSlow, InvalidRequest
from sekha.gateway.exchange import Exchange
from sekha.gateway.heads import Head, head_of
from sekha.gateway.problems import Headers, answer_to
from sekha.turns import turn_of

__all__ = ["HEAD_BYTES", "WRITE_SECONDS", "Connections", "HttpConnection", "HttpExchange", "lines_of"]

HEAD_BYTES = 64 * 1024
"""Of a request's line and headers together."""
WRITE_SECONDS = 60.0
"""Within these a caller takes in some of what waits for him, or is cut: for him a provider works and money is held."""
_UNREAD_BYTES = 256 * 1024
"""Of a body that nobody has asked for yet; whoever sends more has to wait."""
_SHORT_BYTES = 64 * 1024
"""Of a body that is waited for before anything is done for it."""
_SHORT_SECONDS = 1.0
"""How long: then whoever answers waits for the rest, and says so when it does not come."""
_LONG_HEAD = f"The request's line and headers have more than {HEAD_BYTES // 1024} KB together. Send less in them."
_FIELD = b": ".join
_CR, _LF = b"\r\n"
_SWEEP_SECONDS = 1.0
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in http.HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE = b"connection: close\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"


def lines_of(headers: Headers) -> bytes:
    """Lines of a head. Raises `ValueError` for a header that would be more than one."""
    lines = list(map(_FIELD, headers))
    said = b"".join(lines)
    if _CR in said or _LF in said:
        raise ValueError("a header of the reply holds a line break")
    lines.append(b"")
    return b"\r\n".join(lines)


class _Answers(Protocol):
    """The gateway, as far as a server knows it."""

    async def exchange(self, x: Exchange, /) -> None: ...

    def begin(self, x: HttpExchange, body: bytes, /) -> bool:
        """Begin to answer without a task, where that can be, and say whether it can."""
        ...


class Connections:
    """All connections of one server, their time limits, and how it ends."""

    def __init__(
        self,
        gateway: _Answers,
        *,
        head_seconds: float,
        idle_seconds: float,
        write_seconds: float = WRITE_SECONDS,
        refused: Callable[[HttpExchange, str], None] | None = None,
    ) -> None:
        """`refused` is told of each request that was no HTTP, and so never reached the gateway, and of its error."""
        self.gateway = gateway
        self.refused = refused
        self.head_seconds = head_seconds
        self.idle_seconds = idle_seconds
        self.write_seconds = write_seconds
        self.loop = asyncio.get_running_loop()
        self.turn = turn_of(self.loop)
        self.date = b""
        """The header, written once a second for everybody."""
        self.ending = False
        self.tasks: set[asyncio.Task[None]] = set()
        self._open: set[HttpConnection] = set()
        self._sweep_seconds = min(_SWEEP_SECONDS, head_seconds / 4, write_seconds / 4)
        self._sweeping = self.loop.call_soon(self._sweep)
        self._ended = asyncio.Event()
        self._given_up = False

    def __len__(self) -> int:
        return len(self._open)

    def connect(self) -> HttpConnection:
        """What `create_server` calls for each connection."""
        return HttpConnection(self)

    async def end(self) -> None:
        """Close what is idle, and return when everything else has been answered."""
        self.ending = True
        for connection in list(self._open):
            connection.close_when_idle()
        while (self._open or self.tasks) and not self._given_up:
            self._ended.clear()
            await self._ended.wait()

    def abort(self, *, within_seconds: float) -> None:
        """Cut every connection, as if all callers had left: their requests end as those do, settled and on record."""
        for connection in list(self._open):
            connection.abort()
        self.loop.call_later(within_seconds, self._give_up)

    def close(self) -> None:
        self._sweeping.cancel()

    # Its connections tell it:

    def opened(self, connection: HttpConnection) -> None:
        self._open.add(connection)

    def lost(self, connection: HttpConnection) -> None:
        self._open.discard(connection)
        if self.ending:
            self._look()

    def finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if self.ending:
            self._look()

    def _look(self) -> None:
        if not self._open and not self.tasks:
            self._ended.set()

    def _give_up(self) -> None:
        self._given_up = True
        self._ended.set()

    def _sweep(self) -> None:
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()
        now = self.loop.time()
        for connection in list(self._open):
            connection.check(now)
        self._sweeping = self.loop.call_later(self._sweep_seconds, self._sweep)


class HttpExchange(Exchange):
    """One request of a connection. What comes of its body is kept here until somebody asks for it."""

    _size = 0
    headed = False
    """Whether all its headers are here."""
    whole = False
    """Whether its body is."""
    keeps = True
    """Whether the connection goes on after it."""
    waits_to_send = False
    """Whether the caller waits with the body until we want it (`Expect: 100-continue`)."""
    body_limit = inf
    announced = 0
    """Bytes that its body is to have, where its head says so and they were not all here with it."""
    broken: InvalidRequest | None = None
    """Why it is no HTTP, or not as we take it."""
    broken_status = 400
    chunked = True
    """Whether the caller knows of replies in chunks."""
    task: asyncio.Task[None] | None = None
    waiter: asyncio.Future[None] | None = None

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection
        self.parts: list[bytes] = []

    async def body(self, *, limit_mb: float, timeout_seconds: float) -> bytes:
        self.body_limit = limit_mb * 1e6
        if not self.whole:
            if self.announced > self.body_limit:
                self.keeps = False  # what it is about to send is no request
                raise BodyTooLarge(limit_mb)
            if self._size <= self.body_limit and self.broken is None:
                await self._rest(timeout_seconds)
            if self.broken is not None:
                raise self.broken
        if self._size > self.body_limit:
            raise BodyTooLarge(limit_mb)
        parts, self.parts = self.parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _rest(self, timeout_seconds: float) -> None:
        connection = self._connection
        if self.waits_to_send:
            self.waits_to_send = False
            connection.write(_CONTINUE)
        connection.resume_reading()
        self.waiter = connection.all.loop.create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.waiter
        except TimeoutError as error:
            raise BodyTooSlow(timeout_seconds) from error
        finally:
            self.waiter = None

    def received(self, part: bytes) -> None:
        """Take a piece of the body."""
        if self.ended or self._size > self.body_limit:
            return
        self._size += len(part)
        self.parts.append(part)
        if self._size > self.body_limit:
            self.parts.clear()
            self.wake()
        elif self.waiter is None and self._size > _UNREAD_BYTES:
            self._connection.pause_reading()

    def received_whole(self, body: bytes) -> None:
        """Take all of the body, before anybody asks for it."""
        self._size = len(body)
        self.parts.append(body)
        self.whole = True

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def answer(self, status: int, body: bytes, headers: Headers) -> None:
        head = self._head(status, headers, len(body))
        self.status = status
        connection = self._connection
        if self.method == "HEAD":
            body = b""
        if connection.writing_paused:
            await connection.drain()
        connection.write(head)
        connection.write(body)
        self._end()

    def refuse(self, status: int, error: InvalidRequest) -> None:
        """Answer what nobody is asked about."""
        _, body, headers = answer_to(error)
        head = self._head(status, headers, len(body))
        self.status = status
        self._connection.write(head if self.method == "HEAD" else head + body)
        self._end()

    def answer_now(self, body: bytes, lines: bytes) -> None:
        """Answer with 200 and these lines of a head, each with its end.

        It waits for nobody who reads slowly: one answer is all that waits for him.
        """
        self.status = 200
        connection = self._connection
        connection.write(
            b"HTTP/1.1 200 OK\r\n%b%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (connection.all.date, lines, self._closing(), self.request_id, len(body), body)
        )
        self._end()

    def hand_over(self) -> asyncio.Task[None]:
        """Go on with a task of its own, as every request does that was not begun at once."""
        if self.begun is not None:
            self.begun.stop()
        return self._connection.serve(self)

    async def begin(self, headers: Headers) -> None:
        self.begin_now(lines_of(headers))

    async def go_on(self, piece: bytes) -> None:
        if self._connection.writing_paused:
            await self._connection.drain()
        self.go_on_now(piece)

    async def end(self, piece: bytes = b"") -> None:
        if self._connection.writing_paused:
            await self._connection.drain()
        self.end_now(piece)

    @property
    def is_held_up(self) -> bool:
        """Whether the caller takes in less than is written to him."""
        return self._connection.writing_paused

    def begin_now(self, lines: bytes) -> None:
        """Begin a reply of 200 that comes in pieces, with these lines of a head, each with its end."""
        self.status = 200
        connection = self._connection
        # Before chunks were known, a reply ended with its connection.
        self.keeps = self.keeps and self.chunked
        connection.write(
            b"HTTP/1.1 200 OK\r\n%b%b%bx-request-id: %b\r\n%b\r\n"
            % (connection.all.date, lines, self._closing(), self.request_id, _CHUNKED if self.chunked else b"")
        )

    def flush(self) -> None:
        """Let what was written go out, if nothing more is to be written now."""
        self._connection.flush()

    def behind(self, callback: Callable[[], None]) -> None:
        """Call back once what was written has gone out."""
        self._connection.all.turn.behind(callback)

    def go_on_now(self, piece: bytes) -> None:
        if piece:
            self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)

    def end_now(self, piece: bytes) -> None:
        if self.chunked:
            last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(piece), piece) if piece else b"0\r\n\r\n"
            self._connection.write(last)
        elif piece:
            self._connection.write(piece)
        self._end()

    def _head(self, status: int, headers: Headers, length: int) -> bytes:
        lines = lines_of([*headers, (b"x-request-id", self.request_id), (b"content-length", b"%d" % length)])
        return b"".join((_STATUS_LINES[status], self._connection.all.date, lines, self._closing(), b"\r\n"))

    def _closing(self) -> bytes:
        """The line of a head that says that the connection ends with this reply, where it does."""
        if self.waits_to_send or self._connection.all.ending:
            # A body that was never sent for may or may not come: only a new connection leaves no doubt.
            self.keeps = False
        return b"" if self.keeps else _CLOSE

    def _end(self) -> None:
        self.ended = True
        self._connection.flush()
        self._connection.answered(self)


class HttpConnection(asyncio.Protocol):
    """One connection. Requests that are sent at once, without waiting for answers, are answered in turn."""

    __slots__ = (
        "_arriving",
        "_asked_id",
        "_deadline",
        "_drained",
        "_head_bytes",
        "_known",
        "_length",
        "_missing",
        "_parser",
        "_queue",
        "_raw",
        "_read_by",
        "_reading_paused",
        "_serving",
        "_transport",
        "_unsent",
        "_unusable",
        "_url",
        "all",
        "writing_paused",
    )

    def __init__(self, connections: Connections) -> None:
        self.all = connections
        self.writing_paused = False
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._arriving: HttpExchange | None = None
        self._serving: HttpExchange | None = None
        self._queue: deque[HttpExchange] = deque()
        self._known: Head | None = None
        """The last head that was plain."""
        self._missing = 0
        """Bytes of the arriving body, when its head was known and so the parser has no part in it."""
        self._raw = b""
        """What is being parsed, when a request begins with it."""
        self._url = b""
        self._length: bytes | None = None
        self._asked_id: bytes | None = None
        self._head_bytes = 0
        self._deadline = connections.loop.time() + connections.head_seconds
        self._drained: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._unsent: float = inf
        """What waited for the caller to read when that was last less than before."""
        self._read_by = inf
        self._unusable = False
        """Whether what comes is no longer read as HTTP."""

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.all.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._unusable:
            return
        if self._missing:
            data = self._rest_of_body(data)
            if not data:
                return
        if self._arriving is None:
            known = self._known
            if known is not None and self._serving is None and self._again(known, data):
                return
            self._raw = data
        self._parse(data)

    def _again(self, head: Head, data: bytes) -> bool:
        """Begin a request whose head is known. Returns whether it is."""
        found = head.plain.body_of(data)
        if found is None:
            return False
        start, length = found
        body = data[start:]
        missing = length - len(body)
        if missing < 0:
            # More follows: that is for the parser.
            return False
        x = HttpExchange(self)
        x.method = head.method
        x.path = head.path
        x.query = head.query
        x.authorization = head.authorization
        x.identify(None)
        x.headed = True
        if missing:
            self._serve(x, length)
            if body:
                x.received(body)
            x.announced = length
            self._arriving = x
            self._missing = missing
        else:
            self._take_up(x)
            x.received_whole(body)
            self._begin(x)
        return True

    def _rest_of_body(self, data: bytes) -> bytes:
        """Take what belongs to the body of a request whose head was known, and return what follows it."""
        missing = self._missing
        if len(data) < missing:
            self._missing = missing - len(data)
            self.on_body(data)
            return b""
        self._missing = 0
        self.on_body(data[:missing])
        self.on_message_complete()
        return data[missing:]

    def _parse(self, data: bytes) -> None:
        while data:
            arriving, rest = self._arriving, b""
            room = HEAD_BYTES - self._head_bytes
            if len(data) > room:
                # So that a head is not measured together with what follows it.
                data, rest = data[:room], data[room:]
            if arriving is None or not arriving.headed:
                self._head_bytes += len(data)
            self._feed(data)
            if self._unusable:
                break
            if not self._head_bytes and self._arriving is not None and not self._arriving.headed:
                self._head_bytes = self._begun_in(data)
            if rest and self._head_bytes == HEAD_BYTES:  # no head ended in there
                self._refuse(431, InvalidRequest(_LONG_HEAD))
                break
            data = rest
        self._raw = b""

    def _begun_in(self, data: bytes) -> int:
        """Bytes of a head that has begun in there, behind the end of another request, and not ended yet."""
        if not self._url:
            return 0  # a few letters of its method
        # The parser does not say where a request ends, and what came before may look like this one; what follows may
        # as well, but only of somebody who wants to send some bytes more.
        begins = data.rfind(b"%b %b" % (self._parser.get_method(), self._url))
        return len(data) - max(begins, 0)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # It is answered as what it would be without; what follows is in a language that we do not speak.
            self._last()
        except httptools.HttpParserError as error:
            self._refuse(400, InvalidRequest(f"What was sent is not HTTP/1.1: {error}. Nothing more is read of it."))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - nobody is there to be told why
        self._unusable = True
        self._queue.clear()
        self.all.turn.busy.discard(self)
        x = self._serving
        if x is not None and not x.ended:
            self._leave(x)
        self.resume_writing()
        self.all.lost(self)
        del self._parser  # each keeps the other

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        self._unsent = inf
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # The parser calls these, within `data_received`.

    def on_message_begin(self) -> None:
        self._arriving = HttpExchange(self)
        self._url = b""
        self._length = self._asked_id = None
        if self._serving is None:
            self._deadline = self.all.loop.time() + self.all.head_seconds

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        x = self._arriving
        if x is None or x.headed:  # what trails a body is no header
            return
        # Names of other lengths need not be looked at: a request has a dozen headers, and four matter.
        match len(name):
            case 13 if name.lower() == b"authorization":
                x.authorization = value
            case 14 if name.lower() == b"content-length":
                self._length = value
            case 12 if name.lower() == b"x-request-id":
                self._asked_id = value
            case 6 if name.lower() == b"expect":
                x.waits_to_send = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        x = cast("HttpExchange", self._arriving)
        parser = self._parser
        x.method = parser.get_method().decode("ascii")
        x.path, x.query = _where(self._url)
        x.identify(self._asked_id)
        x.chunked = parser.get_http_version() != "1.0"
        x.keeps = x.chunked and parser.should_keep_alive()
        x.headed = True
        self._head_bytes = 0
        if self._length and x.keeps and not x.waits_to_send and self._asked_id is None:
            self._known = head_of(self._raw, self._length, x)
        self._raw = b""  # what else is in it begins elsewhere
        length = int(self._length) if self._length else None
        x.announced = length or 0
        if self._serving is None:
            self._serve(x, None if x.waits_to_send else length)
        else:
            self._queue.append(x)
            self.pause_reading()

    def on_body(self, body: bytes) -> None:
        x = cast("HttpExchange", self._arriving)
        x.waits_to_send = False
        x.received(body)

    def on_message_complete(self) -> None:
        x = cast("HttpExchange", self._arriving)
        self._arriving = None
        x.whole = True
        x.waits_to_send = False
        x.wake()
        if self._serving is None:
            # It was answered before it was all here.
            self._deadline = self.all.loop.time() + self.all.idle_seconds
        elif self._serving is x:
            self._begin(x)

    # Its exchange calls these.

    def write(self, data: bytes) -> None:
        self.all.turn.write(self._transport, data)

    def flush(self) -> None:
        self.all.turn.flush(self._transport)

    async def drain(self) -> None:
        """Wait until the caller has taken in most of what was written."""
        if self.writing_paused and not self._transport.is_closing():
            self._drained = self.all.loop.create_future()
            await self._drained

    def pause_reading(self) -> None:
        if not self._reading_paused and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._reading_paused and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    def answered(self, x: HttpExchange) -> None:
        """Go on with the next request, when this one's reply has been written."""
        self._let_go()
        if not x.keeps or self.all.ending:
            self._unusable = True
            if x.whole or self.all.ending:
                self.all.turn.close(self._transport)
            else:
                self._linger()
            return
        if self._queue:
            following = self._queue.popleft()
            if following.headed:
                self._serve(following)
            else:
                self._tell(following)
        else:
            # What is still on its way of a body that nobody wants is waited for no longer than for a head.
            seconds = self.all.idle_seconds if self._arriving is None else self.all.head_seconds
            self._deadline = self.all.loop.time() + seconds
        if not self._queue:
            self.resume_reading()

    def _linger(self) -> None:
        """End with a caller who may still be sending: a socket that is closed on him takes the answer with it."""
        self._deadline = self.all.loop.time() + self.all.head_seconds
        self.all.turn.end(self._transport)
        self.resume_reading()

    # The server calls these.

    def check(self, now: float) -> None:
        """Let go of a caller who takes too long to send or to read, or has sent nothing for long."""
        if now > self._deadline and self._serving is not None:
            # Its body is late: the one who reads it says so.
            self._deadline = inf
            self.serve(self._serving)
        elif now > self._deadline:
            self._unusable = True
            self.all.turn.close(self._transport)
            self._deadline = inf
        if self.writing_paused or self._transport.is_closing():
            self._check_reader(now)

    def _check_reader(self, now: float) -> None:
        # Nothing is added in either state, so that there is less whenever the caller has read.
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent = unsent
            self._read_by = now + self.all.write_seconds
        elif now > self._read_by:
            self.abort()

    def close_when_idle(self) -> None:
        if self._serving is None:
            self._unusable = True
            self.all.turn.close(self._transport)

    def abort(self) -> None:
        self._transport.abort()

    def _leave(self, x: HttpExchange) -> None:
        """Cancel a request whose caller is gone."""
        x.left = True
        task = x.hand_over() if x.task is None and x.begun is not None else x.task
        if task is not None:
            # Once it runs, since it may be as new as this turn: a task that is cancelled before does nothing at all.
            self.all.loop.call_soon(task.cancel)

    def _take_up(self, x: HttpExchange) -> None:
        self._serving = x
        self.all.turn.busy.add(self)

    def _let_go(self) -> None:
        self._serving = None
        self.all.turn.busy.discard(self)

    def _serve(self, x: HttpExchange, length: int | None = None) -> None:
        """Serve it: a short body of known length is waited for, since it is here as a rule, or in a moment."""
        self._take_up(x)
        if length is None or length > _SHORT_BYTES:
            self._deadline = inf
            self.serve(x)
        else:
            self._deadline = self.all.loop.time() + _SHORT_SECONDS

    def _begin(self, x: HttpExchange) -> None:
        """Begin with a request that is whole, unless it was served before it was."""
        if x.task is None:
            self._deadline = inf
            body = x.parts[0] if len(x.parts) == 1 else b"".join(x.parts)
            # Who has not read the last answer yet is answered once he has.
            if self.writing_paused or not self.all.gateway.begin(x, body):
                self.serve(x)

    def serve(self, x: HttpExchange) -> asyncio.Task[None]:
        task = x.task = self.all.loop.create_task(self._answer(x))
        self.all.tasks.add(task)
        return task

    async def _answer(self, x: HttpExchange) -> None:
        task = x.task
        try:
            await self.all.gateway.exchange(x)
        finally:
            x.task = None  # or the two would keep each other from being freed
            if not x.ended:
                # Cut, so that what is there is not taken for the whole.
                x.ended = True
                self._let_go()
                self.all.turn.close(self._transport)
            if task is not None:
                self.all.finished(task)

    def _last(self) -> None:
        """Answer what has come, and take nothing more."""
        self._unusable = True
        last = self._queue[-1] if self._queue else self._serving
        if last is not None:
            last.keeps = False
        else:
            self.all.turn.close(self._transport)

    def _refuse(self, status: int, error: InvalidRequest) -> None:
        """Take nothing more, and answer what is no HTTP, or not as we take it, when those before it are answered."""
        arriving, self._arriving = self._arriving, None
        self._unusable = True
        x = arriving or HttpExchange(self)
        x.broken, x.broken_status, x.keeps = error, status, False
        if x.ended:
            # It was answered before it was all here.
            self._linger()
        elif x.headed:
            # Who reads its body is told, and has not asked anybody yet.
            x.wake()
        else:
            if arriving is not None:
                self._describe(x)
            x.identify(None if arriving is None else self._asked_id)
            if self._serving is None:
                self._tell(x)
            else:
                self._queue.append(x)

    def _describe(self, x: HttpExchange) -> None:
        """Note what is known of a request whose head does not end well."""
        if self._url:
            x.method = self._parser.get_method().decode("ascii")
            with suppress(httptools.HttpParserError, UnicodeDecodeError):
                x.path, x.query = _where(self._url)

    def _tell(self, x: HttpExchange) -> None:
        """Answer a request whose head is no HTTP: the gateway never hears of it."""
        error = cast("InvalidRequest", x.broken)
        x.refuse(x.broken_status, error)
        if self.all.refused is not None:
            self.all.refused(x, error.code)


@lru_cache(maxsize=256)
def _where(url: bytes) -> tuple[str, bytes]:
    """The path and the query of a request's target. Raises what makes it a bad request."""
    parsed = httptools.parse_url(url)
    path = (parsed.path or b"").decode("ascii")
    return unquote(path) if "%" in path else path, parsed.query or b""
