"""Ask one address as fast as it answers, over so many connections, and note how long each answer took."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, cast

import httptools
import orjson
from upstream import CHAT_MODEL, EMBEDDING_MODEL

WARM_UP_SECONDS = 0.3
PATIENCE_SECONDS = 30.0
QUESTION = [
    {"role": "system", "content": "You answer questions about money and failure in short and simple words."},
    {
        "role": "user",
        "content": "What does a hold do, when is it settled, and what becomes of it when the client has gone away "
        "before the answer was whole? Say it so that somebody understands it who has never run a gateway.",
    },
]
CHAT = {"model": CHAT_MODEL, "messages": QUESTION, "max_tokens": 256}
STREAM = {**CHAT, "stream": True}
EMBEDDING = {"model": EMBEDDING_MODEL, "input": "What does a hold do, and when is it settled?"}


class Failed(Exception):
    """An answer was not what was asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and how to be let in."""

    port: int
    headers: Mapping[str, str]

    def request(self, path: str, body: object) -> bytes:
        data = orjson.dumps(body)
        headers = {
            "host": f"127.0.0.1:{self.port}",
            "content-type": "application/json",
            "content-length": str(len(data)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST /v1{path} HTTP/1.1\r\n{lines}\r\n".encode() + data


@dataclass(frozen=True, slots=True)
class Sample:
    """What a run came to. Times are in milliseconds."""

    per_second: float
    p50: float
    p99: float
    first_p50: float
    """Until the first byte of a stream's body."""
    answers: int
    """All of them, those of the warm-up too."""


class Run:
    """What the connections of one run have in common."""

    def __init__(self, connections: int, seconds: float) -> None:
        self.begins = perf_counter() + WARM_UP_SECONDS
        self.ends = self.begins + seconds
        self.seconds = seconds
        self.whole: list[float] = []
        self.first: list[float] = []
        self.answers = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open = connections

    def close_one(self) -> None:
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(Failed(why))

    def sample(self) -> Sample:
        if len(self.whole) < 2:
            raise Failed(f"{len(self.whole)} answers in {self.seconds:g} s; take longer")
        return Sample(
            per_second=len(self.whole) / self.seconds,
            p50=statistics.median(self.whole) * 1e3,
            p99=statistics.quantiles(self.whole, n=100, method="inclusive")[98] * 1e3,
            first_p50=statistics.median(self.first or self.whole) * 1e3,
            answers=self.answers,
        )


class Asking(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, run: Run) -> None:
        self._request = request
        self._run = run
        self._parser = httptools.HttpResponseParser(self)
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._run.fail(f"not HTTP ({error}): {data[:200]!r}")

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over:
            self._run.fail(f"the connection was closed in the middle: {error or 'by the server'}")

    def on_message_complete(self) -> None:
        now = perf_counter()
        status = self._parser.get_status_code()
        if status != 200 or not self._parser.should_keep_alive():
            self._run.fail(f"status {status}, kept alive: {self._parser.should_keep_alive()}")
        run = self._run
        run.answers += 1
        if run.begins <= now < run.ends:
            self._note(now)
        if now < run.ends and not run.done.done():
            self._ask()
        else:
            self._over = True
            self._transport.close()
            run.close_one()

    def _ask(self) -> None:
        self._asked = perf_counter()
        self._transport.write(self._request)

    def _note(self, now: float) -> None:
        self._run.whole.append(now - self._asked)


class Streaming(Asking):
    """The same for streams, of which every one has to be whole."""

    _first = 0.0
    _last = b""

    def on_body(self, body: bytes) -> None:
        if not self._first:
            self._first = perf_counter()
        self._last = body

    def on_message_complete(self) -> None:
        if not self._last.endswith(b"[DONE]\n\n"):
            self._run.fail(f"a stream ended without [DONE]: {self._last[-200:]!r}")
        super().on_message_complete()

    def _ask(self) -> None:
        self._first = 0.0
        super()._ask()

    def _note(self, now: float) -> None:
        super()._note(now)
        self._run.first.append(self._first - self._asked)


class Connection(Protocol):
    def __call__(self, request: bytes, run: Run) -> asyncio.Protocol: ...


async def load(
    target: Target, path: str, body: object, *, connections: int, seconds: float, kind: Connection = Asking
) -> Sample:
    """Ask for so many seconds, after a short warm-up. Raises `Failed` when an answer is not one."""
    loop = asyncio.get_running_loop()
    request = target.request(path, body)
    run = Run(connections, seconds)
    opened = [
        await loop.create_connection(lambda: kind(request, run), "127.0.0.1", target.port) for _ in range(connections)
    ]
    try:
        await asyncio.wait_for(run.done, seconds + PATIENCE_SECONDS)
    except TimeoutError as error:
        raise Failed(f"no answer for {PATIENCE_SECONDS:g} s") from error
    finally:
        for transport, _ in opened:
            transport.abort()
    return run.sample()
