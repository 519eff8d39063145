"""What a request took is free once it is over: nothing waits for the garbage collector, which counts no bytes."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import orjson
import pytest

from sekha.chat import ChatRequest
from sekha.embedding import EmbedRequest
from sekha.gateway.finished import UnderWay
from sekha.gateway.http_server import HttpConnection, HttpExchange
from sekha.providers.http import Response
from sekha.providers.relay import RelayStream
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, config_for

REQUESTS = 5
TAKEN = (ChatRequest, EmbedRequest, UnderWay, HttpConnection, HttpExchange, Response, RelayStream)
"""What holds a request or an answer, and so up to many megabytes of images, vectors or text."""

Asks = Callable[[Served, StandIn, StandIn], Awaitable[None]]


async def _whole(served: Served, _: StandIn, __: StandIn) -> None:
    assert (await served.chat(model="first/chat")).status_code == 200


async def _in_pieces(served: Served, _: StandIn, __: StandIn) -> None:
    assert "[DONE]" in (await served.stream(model="first/chat"))[1]


async def _in_pieces_with_usage(served: Served, _: StandIn, __: StandIn) -> None:
    assert "[DONE]" in (await served.stream(model="chat", stream_options={"include_usage": True}))[1]


async def _by_task(served: Served, _: StandIn, __: StandIn) -> None:
    assert (await served.chat(model="chat_small", n=2)).status_code == 200


async def _vectors(served: Served, _: StandIn, __: StandIn) -> None:
    assert (await served.http.post("/v1/embeddings", json={"model": "vectors", "input": "One."})).status_code == 200


async def _vectors_fail(served: Served, one: StandIn, two: StandIn) -> None:
    one.fail(401)
    asked = {"model": "first/vectors", "input": "One."}
    assert (await served.http.post("/v1/embeddings", json=asked)).status_code == 502


async def _falls_back(served: Served, one: StandIn, _: StandIn) -> None:
    one.fail(500)
    assert (await served.chat(model="chat")).status_code == 200


async def _falls_back_in_pieces(served: Served, one: StandIn, _: StandIn) -> None:
    one.drop()
    assert "[DONE]" in (await served.stream(model="chat"))[1]


async def _fails(served: Served, one: StandIn, two: StandIn) -> None:
    one.fail(401)
    two.fail(401)
    assert (await served.chat(model="chat")).status_code == 502


async def _fails_in_pieces(served: Served, one: StandIn, two: StandIn) -> None:
    one.fail(401)
    two.fail(401)
    assert (await served.stream(model="chat"))[0].status_code == 502


async def _only_one_fails(served: Served, one: StandIn, _: StandIn) -> None:
    one.fail(401)
    assert (await served.chat(model="first/chat")).status_code == 502


async def _only_one_fails_in_pieces(served: Served, one: StandIn, _: StandIn) -> None:
    one.fail(401)
    assert (await served.stream(model="first/chat"))[0].status_code == 502


async def _times_out(served: Served, one: StandIn, two: StandIn) -> None:
    one.hang()
    two.hang()
    assert (await served.chat(model="chat")).status_code == 504


async def _is_cut(served: Served, one: StandIn, _: StandIn) -> None:
    one.cut(after=3)
    assert "[DONE]" not in (await served.stream(model="first/chat"))[1]


async def _stalls(served: Served, one: StandIn, _: StandIn) -> None:
    one.stall(after=3)
    assert "[DONE]" not in (await served.stream(model="first/chat"))[1]


async def _is_refused(served: Served, one: StandIn, _: StandIn) -> None:
    one.fail(400)
    assert (await served.chat(model="chat")).status_code == 400


async def _costs_too_much(served: Served, _: StandIn, __: StandIn) -> None:
    assert (await served.chat(model="chat", max_cost=0.0001)).status_code == 402


async def _is_unheard_of(served: Served, _: StandIn, __: StandIn) -> None:
    assert (await served.chat(model="unheard of")).status_code == 404


async def _leaves(served: Served, one: StandIn, _: StandIn) -> None:
    one.stall(after=3)
    asked = orjson.dumps({"model": "first/chat", "messages": [{"role": "user", "content": "Hello."}], "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(asked), asked))
    await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(2):
        await one.abandoned.wait()
    one.abandoned.clear()


ALL: tuple[Asks, ...] = (
    _whole,
    _in_pieces,
    _in_pieces_with_usage,
    _by_task,
    _vectors,
    _vectors_fail,
    _falls_back,
    _falls_back_in_pieces,
    _fails,
    _fails_in_pieces,
    _only_one_fails,
    _only_one_fails_in_pieces,
    _times_out,
    _is_cut,
    _stalls,
    _is_refused,
    _costs_too_much,
    _is_unheard_of,
    _leaves,
)


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("asks", ALL, ids=lambda asks: asks.__name__[1:])
@pytest.mark.parametrize("as_served", [False, True], ids=["plain", "as served"])
async def test_a_request_leaves_nothing_for_the_collector(
    gateway: Opens, uncollected: None, caplog: pytest.LogCaptureFixture, asks: Asks, as_served: bool
) -> None:
    # Pytest keeps what is logged, which is an error with its traceback.
    caplog.set_level(logging.ERROR, "sekha")
    async with StandIn(dimension=8) as one, StandIn(dimension=8) as two:
        config = config_for(one, two, timeout_secs=0.3, extra="routing: {circuit_breaker: {failure_threshold: 1000}}")
        async with gateway(config=config, as_served=as_served) as served:
            for _ in range(2):
                await asks(served, one, two)
            before = _alive()
            for _ in range(REQUESTS):
                await asks(served, one, two)
            await asyncio.sleep(0.05)
            more = _alive() - before

    assert {kind: number for kind, number in more.items() if number >= REQUESTS - 1} == {}


def _alive() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, TAKEN))
