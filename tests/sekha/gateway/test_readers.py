"""Callers who read slowly, and those who never do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import orjson
import pytest

from sekha.gateway.exchange import Exchange
from sekha.gateway.serving import Serving
from tests.fixtures.gateway import Opens, Served, listening, wait_until
from tests.fixtures.upstream import Upstream, chunked

WRITE_SECONDS = 0.4
LARGE = 24_000_000
"""Several times what the system takes in for a reader who does not read."""
STREAM = orjson.dumps({"messages": [{"role": "user", "content": "Hello there."}], "stream": True})


async def without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Stream for as long as anybody takes it."""
    event = {"choices": [{"index": 0, "delta": {"content": "on "}}], "obfuscation": "x" * 50_000}
    writer.write(chunked(headers=("Content-Type: text/event-stream",), end=False))
    while True:
        data = b"data: %b\n\n" % orjson.dumps(event)
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()


async def large(serving: Serving, x: Exchange) -> None:
    await x.answer(200, b"x" * LARGE, [])


@asynccontextmanager
async def calling(port: int, request: bytes) -> AsyncIterator[socket.socket]:
    """A caller who has asked, and for whom the system takes in little that he does not read."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        caller.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(caller, ("127.0.0.1", port))
        await loop.sock_sendall(caller, request)
        yield caller


async def read(caller: socket.socket) -> int:
    """How many bytes come until the other side closes."""
    loop, count = asyncio.get_running_loop(), 0
    with suppress(ConnectionResetError):
        while data := await loop.sock_recv(caller, 1 << 20):
            count += len(data)
    return count


async def _nothing_held(served: Served) -> bool:
    return await served.held() == 0


async def test_a_stream_that_nobody_reads_is_cut_and_what_arrived_is_paid_for(gateway: Opens) -> None:
    async with (
        Upstream(without_end) as upstream,
        gateway(upstream) as served,
        listening(served.gateway, write_seconds=WRITE_SECONDS) as port,
    ):
        asked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(STREAM), STREAM)
        async with calling(port, asked) as caller:
            await upstream.arrived.wait()
            held = await served.held()
            async with asyncio.timeout(20):
                await upstream.closed.wait()
            await wait_until(lambda: _nothing_held(served))
            spent = await served.spent()
            came = await read(caller)

    assert held > 0
    assert spent > 0
    assert came > 0


async def test_an_answer_that_nobody_reads_keeps_no_connection(gateway: Opens) -> None:
    async with (
        gateway(routes={"/large": {"GET": large}}) as served,
        listening(served.gateway, write_seconds=WRITE_SECONDS) as port,
        calling(port, b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as caller,
    ):
        # It cannot be seen from here that it was cut, but by reading.
        await asyncio.sleep(3 * WRITE_SECONDS)
        came = await read(caller)

    assert 0 < came < LARGE


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
async def test_who_reads_slowly_is_waited_for(gateway: Opens, connection: str) -> None:
    async with (
        gateway(routes={"/large": {"GET": large}}) as served,
        listening(served.gateway, write_seconds=WRITE_SECONDS) as port,
    ):
        started = asyncio.get_running_loop().time()
        request = b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: %b\r\n\r\n" % connection.encode()
        async with calling(port, request) as caller:
            came, loop = 0, asyncio.get_running_loop()
            while came < LARGE and (data := await loop.sock_recv(caller, 1 << 18)):
                came += len(data)
                await asyncio.sleep(0.002)
        seconds = asyncio.get_running_loop().time() - started

    assert came > LARGE
    assert seconds > 2 * WRITE_SECONDS
