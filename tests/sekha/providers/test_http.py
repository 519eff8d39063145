from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from sekha.providers.http import (
    AnswerCut,
    AnswerLost,
    BadResponse,
    HttpClient,
    HttpLimits,
    NoAnswer,
    NotSent,
    Response,
    Target,
)
from tests.fixtures.upstream import Answer, Upstream, chunked, with_length

PATIENCE = 20.0
IMPATIENCE = 0.2


def target(upstream: Upstream, **headers: str) -> Target:
    return Target.of(f"{upstream.url}/v1/thing", headers)


async def hang(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


def then_hang_up(answer: bytes) -> Answer:
    async def answered(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    return answered


async def answer_to(answer: Answer | None, limits: HttpLimits | None = None) -> bytes:
    async with Upstream(answer) as upstream, aclosing(HttpClient(limits=limits)) as client:
        response = await client.post(target(upstream), b"{}", timeout_seconds=PATIENCE)
        assert response.status == 200
        return response.content


# --- what works ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        with_length(b"hello world"),
        chunked(b"hello", b" ", b"world"),
        then_hang_up(b"HTTP/1.1 200 OK\r\n\r\nhello world"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(b"hello world"),
        with_length(gzip.compress(b"hello world"), "Content-Encoding: gzip"),
        with_length(b"hello world", "Content-Encoding: identity"),
    ],
    ids=["length", "chunked", "until closed", "after an interim answer", "compressed unasked", "identity"],
)
async def test_a_body_is_read_however_it_is_delimited(answer: Answer) -> None:
    assert await answer_to(answer) == b"hello world"


@given(cuts=st.sets(st.integers(min_value=1, max_value=len(chunked(b"hello", b" world")) - 1)))
def test_an_answer_is_the_same_whatever_pieces_it_comes_in(cuts: set[int]) -> None:
    whole = chunked(b"hello", b" world")
    edges = [0, *sorted(cuts), len(whole)]

    async def in_pieces(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start, end in pairwise(edges):
            writer.write(whole[start:end])
            await asyncio.sleep(0)

    assert asyncio.run(answer_to(in_pieces)) == b"hello world"


async def test_a_request_says_where_it_goes_what_it_is_and_how_long() -> None:
    async with Upstream(with_length(b"")) as upstream, aclosing(HttpClient()) as client:
        await client.post(target(upstream, authorization="Bearer key"), b'{"a":1}', timeout_seconds=PATIENCE)

        head, _, body = upstream.requests[0].partition(b"\r\n\r\n")
        host = upstream.url.removeprefix("http://")
    first, *lines = head.decode().split("\r\n")
    assert first == "POST /v1/thing HTTP/1.1"
    assert set(lines) == {
        f"host: {host}",
        "authorization: Bearer key",
        "accept-encoding: identity",
        "content-length: 7",
    }
    assert body == b'{"a":1}'


async def test_a_large_request_arrives_whole() -> None:
    body = b"x" * 3_000_000

    async with Upstream(with_length(b"")) as upstream, aclosing(HttpClient()) as client:
        await client.post(target(upstream), body, timeout_seconds=PATIENCE)

        assert upstream.requests[0].endswith(b"\r\n\r\n" + body)


async def test_headers_are_found_by_their_lower_case_name() -> None:
    async with (
        Upstream(with_length(b"", "Retry-After: 7", status="429 Slow down")) as upstream,
        aclosing(HttpClient()) as client,
    ):
        response = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

    assert (response.status, response.headers["retry-after"]) == (429, "7")


async def test_one_connection_serves_one_request_after_another() -> None:
    async with Upstream(with_length(b"one")) as upstream, aclosing(HttpClient()) as client:
        for _ in range(5):
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert (len(upstream.requests), upstream.connections) == (5, 1)


async def test_a_connection_the_server_will_close_is_not_used_again() -> None:
    async with Upstream(with_length(b"one", "Connection: close")) as upstream, aclosing(HttpClient()) as client:
        for _ in range(3):
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert upstream.connections == 3


async def test_requests_wait_for_a_connection_where_there_are_no_more() -> None:
    async with (
        Upstream(with_length(b"one")) as upstream,
        aclosing(HttpClient(limits=HttpLimits(connections=2))) as client,
    ):
        asked = [client.post(target(upstream), b"", timeout_seconds=PATIENCE) for _ in range(20)]
        responses = await asyncio.gather(*asked)

        assert [response.content for response in responses] == [b"one"] * 20
        assert upstream.connections == 2


async def test_a_body_is_read_as_it_comes() -> None:
    more = asyncio.Event()

    async def slowly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(b"one", end=False))
        await more.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    async with Upstream(slowly) as upstream, aclosing(HttpClient()) as client:
        response = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
        first = await response.block()
        more.set()
        rest = [await response.block(), await response.block()]

    assert (first, rest) == (b"one", [b"two", b""])


async def test_a_piece_that_unpacks_to_nothing_yet_is_not_taken_for_the_end() -> None:
    packed, more = gzip.compress(b"hello world"), asyncio.Event()
    first, last = packed[:10], packed[10:]

    async def in_two(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(first, headers=("Content-Encoding: gzip",), end=False))
        await more.wait()
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))

    async with Upstream(in_two) as upstream, aclosing(HttpClient()) as client:
        response = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
        reading = asyncio.create_task(response.block())
        await asyncio.sleep(0)
        more.set()

        assert [await reading, await response.block()] == [b"hello world", b""]


async def test_a_reader_that_lags_makes_the_server_wait() -> None:
    stuck = asyncio.Event()
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n")
        while not stuck.is_set():
            writer.write(b"x" * 100_000)
            sent += 100_000
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                stuck.set()
        await hang(_, writer)

    async with Upstream(flood) as upstream, aclosing(HttpClient()) as client:
        response = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            await stuck.wait()
        received = 0
        while received < sent // 2:
            received += len(await response.block())
        response.close()

    assert sent < 100_000_000


async def test_a_connection_left_at_the_end_of_a_stream_is_used_again() -> None:
    last = asyncio.Event()

    async def with_a_late_end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(b"done", end=False))
        await last.wait()
        writer.write(b"0\r\n\r\n")

    async with (
        Upstream(with_a_late_end, with_length(b"next")) as upstream,
        aclosing(HttpClient(limits=HttpLimits(connections=1))) as client,
    ):
        response = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
        await response.block()
        response.leave(PATIENCE)
        last.set()
        following = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert (following.content, upstream.connections) == (b"next", 1)


async def test_a_connection_left_at_the_end_of_a_stream_that_goes_on_is_closed() -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(b"done", end=False))
        await _.read()
        raise ConnectionResetError

    async with Upstream(endless) as upstream, aclosing(HttpClient()) as client:
        response = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
        await response.block()
        response.leave(IMPATIENCE)

        async with asyncio.timeout(PATIENCE):
            await upstream.closed.wait()


def test_it_works_on_uvloop_too() -> None:
    async def both_ways() -> tuple[bytes, bytes, int]:
        async with Upstream(with_length(b"hello")) as upstream, aclosing(HttpClient()) as client:
            whole = await client.post(target(upstream), b"x" * 200_000, timeout_seconds=PATIENCE)
            opened = await client.open(target(upstream), b"", timeout_seconds=PATIENCE)
            return whole.content, await opened.body(), upstream.connections

    assert uvloop.run(both_ways()) == (b"hello", b"hello", 1)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_time_runs_out_on_every_loop(run: object) -> None:
    async def late() -> None:
        async with Upstream(hang) as upstream, aclosing(HttpClient()) as client:
            with pytest.raises(TimeoutError):
                await client.post(target(upstream), b"", timeout_seconds=IMPATIENCE)

    run(late())  # type: ignore[operator]


def test_a_client_can_be_used_under_one_loop_after_another() -> None:
    client = HttpClient()

    async def once() -> bytes:
        async with Upstream(with_length(b"hello")) as upstream:
            response = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
            await client.aclose()
            return response.content

    assert [asyncio.run(once()), asyncio.run(once())] == [b"hello", b"hello"]


# --- what fails ----------------------------------------------------------------------------


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced_once() -> None:
    async with (
        Upstream(with_length(b"one"), None, with_length(b"two")) as upstream,
        aclosing(HttpClient()) as client,
    ):
        await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        response = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert response.content == b"two"
        assert (len(upstream.requests), upstream.connections) == (3, 2)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_kept_connection_that_is_lost_while_its_request_is_worked_on_is_not_asked_again(at_once: bool) -> None:
    async def works(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Longer than it takes to tell that it was closed before, and less than a second.
        await asyncio.sleep(0.6)
        writer.transport.abort()

    async with idle(works, with_length(b"again")) as (upstream, client, where):
        if at_once:
            asked: Awaitable[object] = taken_over(client, where, whole=True, late=0, timeout_seconds=PATIENCE)
        else:
            asked = client.post(where, b"{}", timeout_seconds=PATIENCE)
        with pytest.raises(AnswerLost):
            await asked

        assert len(upstream.requests) == 2


async def test_a_fresh_connection_that_is_dropped_is_not_tried_again() -> None:
    async with Upstream(None) as upstream, aclosing(HttpClient()) as client:
        with pytest.raises(ConnectionError):
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert len(upstream.requests) == 1


async def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    half = then_hang_up(with_length(b"hello")[:-2])

    async with Upstream(with_length(b"one"), half) as upstream, aclosing(HttpClient()) as client:
        await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        with pytest.raises(AnswerCut):
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert len(upstream.requests) == 2


async def test_silence_in_the_middle_of_a_body_is_a_timeout() -> None:
    async def stall(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(b"one", end=False))
        await hang(_, writer)

    async with Upstream(stall) as upstream, aclosing(HttpClient()) as client:
        response = await client.open(target(upstream), b"", timeout_seconds=IMPATIENCE)
        assert await response.block() == b"one"
        with pytest.raises(TimeoutError):
            await response.block()


async def test_a_request_that_gets_no_connection_in_time_was_not_sent() -> None:
    async with Upstream(hang) as upstream, aclosing(HttpClient(limits=HttpLimits(connections=1))) as client:
        first = asyncio.create_task(client.post(target(upstream), b"", timeout_seconds=PATIENCE))
        await upstream.arrived.wait()

        with pytest.raises(NotSent):
            await client.post(target(upstream), b"", timeout_seconds=IMPATIENCE)

        assert len(upstream.requests) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_refused_connection_is_an_os_error_and_leaves_room_for_the_next() -> None:
    async with Upstream(with_length(b"")) as upstream:
        gone = target(upstream)

    async with aclosing(HttpClient(limits=HttpLimits(connections=1))) as client:
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                await client.post(gone, b"", timeout_seconds=PATIENCE)


async def test_a_cancelled_request_closes_its_connection() -> None:
    async def until_closed(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()
        raise ConnectionResetError

    async with Upstream(until_closed) as upstream, aclosing(HttpClient()) as client:
        asked = asyncio.create_task(client.post(target(upstream), b"", timeout_seconds=PATIENCE))
        await upstream.arrived.wait()

        asked.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asked
        async with asyncio.timeout(PATIENCE):
            await upstream.closed.wait()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "it is not HTTP/1.1"),
        (
            b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            r"it changes to another protocol than HTTP/1.1 \(HTTP 101\)",
        ),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000, "its head is longer than 65,536 bytes"),
        (with_length(b"x", "Content-Encoding: br"), "it is compressed, which we did not ask for"),
        (with_length(b"x" * 10, "Content-Encoding: gzip"), "it is not HTTP/1.1"),
        (with_length(b"x" * 5000), "it is longer than 4,000 bytes"),
        (
            with_length(gzip.compress(b"x" * 5000), "Content-Encoding: gzip"),
            "it is longer than 4,000 bytes when unpacked",
        ),
    ],
)
async def test_an_answer_that_breaks_the_rules_is_refused(answer: bytes, says: str) -> None:
    with pytest.raises(BadResponse, match=f"^{says}$"):
        await answer_to(answer, HttpLimits(body_bytes=4000))


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        (b"\x00garbage", False),
        (b"HTTX", False),
        (b"HTTP/9.9 500 OK\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", True),
        (chunked(b"x", end=False) + b"garbage", True),
    ],
)
async def test_what_does_not_begin_as_http_answers_nothing_whatever_was_answered_before(
    answer: bytes, answers: bool
) -> None:
    async with Upstream(with_length(b"one"), answer) as upstream, aclosing(HttpClient()) as client:
        await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        with pytest.raises(BadResponse) as caught:
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

    assert isinstance(caught.value, NoAnswer) is not answers
    assert upstream.connections == 1


async def test_an_answer_to_no_request_is_never_taken_for_the_next_ones() -> None:
    async with (
        Upstream(with_length(b"one") + with_length(b"smuggled"), with_length(b"two")) as upstream,
        aclosing(HttpClient()) as client,
    ):
        first = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        second = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

    assert (first.content, second.content) == (b"one", b"two")


async def test_the_beginning_of_an_answer_to_no_request_is_not_kept_either() -> None:
    async with (
        Upstream(with_length(b"one") + b"HTTP/1.1 200 OK\r\nX", with_length(b"two")) as upstream,
        aclosing(HttpClient()) as client,
    ):
        first = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        second = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

    assert (first.content, second.content, upstream.connections) == (b"one", b"two", 2)


async def test_a_connection_that_lies_idle_is_closed() -> None:
    async with (
        Upstream(with_length(b"one")) as upstream,
        aclosing(HttpClient(limits=HttpLimits(idle_seconds=0.1))) as client,
    ):
        await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        async with asyncio.timeout(PATIENCE):
            await upstream.closed.wait()


async def test_closing_the_client_ends_what_is_under_way() -> None:
    async with Upstream(hang) as upstream:
        client = HttpClient()
        asked = asyncio.create_task(client.post(target(upstream), b"", timeout_seconds=PATIENCE))
        await upstream.arrived.wait()

        await client.aclose()

        with pytest.raises(ConnectionError):
            await asked


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "caf\u00e9 \u2615", "\x00"])
def test_a_header_that_would_end_early_is_refused_unquoted(value: str) -> None:
    with pytest.raises(ValueError, match="the header 'authorization' holds a character") as caught:
        Target.of("http://127.0.0.1/", {"authorization": value})

    assert value not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/", "http:///path", "http://host:port/", "http://host/a b"])
def test_an_address_that_http_cannot_carry_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|Port"):
        Target.of(url, {})


# --- at once, or not at all ----------------------------------------------------------------


class Told:
    """What a request that was sent at once is told of its answer."""

    def __init__(self) -> None:
        self.times = 0
        self.news = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self.news.set()

    async def again(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.news.wait()
        self.news.clear()


@asynccontextmanager
async def idle(*answers: Answer | None) -> AsyncIterator[tuple[Upstream, HttpClient, Target]]:
    """A client with a connection that lies idle, whose requests are answered so from now on."""
    async with Upstream(with_length(b"first"), *answers) as upstream, aclosing(HttpClient()) as client:
        where = target(upstream)
        await client.post(where, b"{}", timeout_seconds=PATIENCE)
        yield upstream, client, where


async def test_nothing_is_sent_at_once_where_no_connection_lies_idle() -> None:
    told = Told()
    async with Upstream(with_length(b"ok")) as upstream, aclosing(HttpClient()) as client:
        where, other = target(upstream), target(upstream, authorization="Bearer other")
        before = client.is_idle(where)
        nothing = client.send_now(where, b"", timeout_seconds=1, whole=True, told=told)
        await client.post(where, b"", timeout_seconds=PATIENCE)
        between = client.is_idle(where), client.is_idle(other)
        first = client.send_now(other, b"", timeout_seconds=1, whole=True, told=told)
        busy = client.is_idle(where)
        second = client.send_now(where, b"", timeout_seconds=1, whole=True, told=told)
        await told.again()

    assert (before, nothing, between, busy, second) == (False, None, (True, True), False, None)
    assert first is not None
    assert first.content == b"ok"
    assert (len(upstream.requests), upstream.connections, told.times) == (2, 1, 1)


async def test_nothing_is_sent_at_once_by_a_connection_that_was_closed() -> None:
    async with Upstream(then_hang_up(with_length(b"ok"))) as upstream, aclosing(HttpClient()) as client:
        await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        await asyncio.sleep(0.05)

        assert client.send_now(target(upstream), b"", timeout_seconds=1, whole=True, told=Told()) is None


@pytest.mark.parametrize("answer", [with_length(b"hello world"), chunked(b"hello", b" world")])
async def test_what_is_sent_at_once_is_what_a_post_sends_and_its_answer_is_told_of_once(answer: bytes) -> None:
    told = Told()
    async with idle(answer) as (upstream, client, where):
        posted = await client.post(where, b'{"a":1}', timeout_seconds=PATIENCE)
        response = client.send_now(where, b'{"a":1}', timeout_seconds=PATIENCE, whole=True, told=told)
        assert response is not None
        assert (told.times, response.complete) == (0, False)
        await told.again()
        again = client.is_idle(where)

    assert (response.status, response.content, response.headers) == (200, posted.content, posted.headers)
    assert (response.complete, response.error, told.times, again) == (True, None, 1, True)
    assert upstream.requests[1] == upstream.requests[2]


async def test_an_answer_that_comes_in_pieces_is_told_of_with_each() -> None:
    may_go_on = asyncio.Event()

    async def in_pieces(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"3\r\none\r\n",
            b"3\r\ntwo\r\n",
            b"0\r\n\r\n",
        ):
            writer.write(piece)
            await may_go_on.wait()
            may_go_on.clear()

    told, seen = Told(), []
    async with idle(in_pieces) as (_, client, where):
        response = client.send_now(where, b"", timeout_seconds=PATIENCE, whole=False, told=told)
        assert response is not None
        for _ in range(4):
            await told.again()
            seen.append((response.headed, response.take(), response.complete))
            may_go_on.set()

    assert seen == [(True, None, False), (True, b"one", False), (True, b"two", False), (True, b"", True)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, ConnectionError),
        (hang, TimeoutError),
        (b"SSH-2.0-OpenSSH\r\n", BadResponse),
        (then_hang_up(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), AnswerCut),
        (with_length(b"x", "Content-Encoding: br"), BadResponse),
    ],
)
async def test_a_failure_is_told_of_too(answer: Answer | None, error: type[Exception], whole: bool) -> None:
    told = Told()
    async with idle(answer) as (_, client, where):
        response = client.send_now(where, b"", timeout_seconds=IMPATIENCE, whole=whole, told=told)
        assert response is not None
        async with asyncio.timeout(PATIENCE):
            while response.error is None:
                await told.again()

    assert isinstance(response.error, error)
    assert told.times <= 2  # of its head, and of its end


async def taken_over(
    client: HttpClient, where: Target, *, whole: bool, late: float, timeout_seconds: float
) -> Response:
    """What comes of a request that is sent at once and waited for so many seconds later."""
    told = Told()
    response = client.send_now(where, b"{}", timeout_seconds=timeout_seconds, whole=whole, told=told)
    assert response is not None
    if late:
        await asyncio.sleep(late)
    answer = await client.take_over(response, where, b"{}")
    times = told.times
    if not whole:
        await answer.body()
    assert told.times == times  # whoever waits is not told
    return answer


@pytest.mark.parametrize("late", [0.0, 0.05])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        with_length(b"hello"),
        chunked(b"hel", b"lo"),
        with_length(b"no", status="500 No"),
        None,
        hang,
        b"SSH-2.0-OpenSSH\r\n",
        then_hang_up(with_length(b"hello")[:-1]),
    ],
)
async def test_what_was_sent_at_once_can_be_waited_for_like_any_other(
    answer: Answer | None, whole: bool, late: float
) -> None:
    async def outcome(*, at_once: bool) -> object:
        async with idle(answer, with_length(b"again")) as (upstream, client, where):
            try:
                if at_once:
                    response = await taken_over(client, where, whole=whole, late=late, timeout_seconds=IMPATIENCE)
                else:
                    asks = client.post if whole else client.open
                    response = await asks(where, b"{}", timeout_seconds=IMPATIENCE)
                    await response.body()
            except (OSError, BadResponse) as error:
                return type(error), str(error), len(upstream.requests)
            return response.status, response.content, len(upstream.requests), client.is_idle(where)

    assert await outcome(at_once=True) == await outcome(at_once=False)


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced_once_for_what_was_sent_at_once() -> None:
    async with idle(None, None, with_length(b"third")) as (upstream, client, where):
        with pytest.raises(ConnectionError):
            await taken_over(client, where, whole=True, late=0, timeout_seconds=PATIENCE)

        assert (len(upstream.requests), upstream.connections) == (3, 2)


async def test_who_is_cancelled_while_waiting_for_what_was_sent_at_once_closes_it() -> None:
    left = asyncio.Event()

    async def until_left(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        upstream.arrived.set()
        await reader.read()
        left.set()

    async with idle(until_left) as (upstream, client, where):
        waiting = asyncio.create_task(taken_over(client, where, whole=True, late=0, timeout_seconds=PATIENCE))
        upstream.arrived.clear()
        await upstream.arrived.wait()

        waiting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not client.is_idle(where)
        async with asyncio.timeout(PATIENCE):
            await left.wait()


# --- heads of answers that a connection has seen -------------------------------------------


PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %b\r\nx: y\r\n\r\n"


async def second(answer: Answer, *, met: bool, limits: HttpLimits | None = None) -> tuple[object, ...]:
    """What comes of an answer, on a connection on which one with the plain head came before; or on a new one."""
    before = [PLAIN % b"5" + b"first"] if met else []
    async with (
        Upstream(*before, answer, with_length(b"next")) as upstream,
        aclosing(HttpClient(limits=limits)) as client,
    ):
        for _ in before:
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        try:
            response = await client.post(target(upstream), b"", timeout_seconds=IMPATIENCE)
        except (OSError, BadResponse) as error:
            return type(error), str(error)
        after = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
        # Its length is that of the content.
        headers = {name: value for name, value in response.headers.items() if name != "content-length"}
        return response.status, response.content, headers, after.content, upstream.connections


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN % b"5" + b"hello",
        PLAIN % b"0",
        PLAIN % b"05" + b"hello",
        PLAIN % b"11" + b"hello world",
        PLAIN % b"300000" + b"x" * 300_000,
        PLAIN % b"5" + b"hello and more",
        PLAIN % b"5" + b"helloHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        PLAIN % b"" + b"hello",
        PLAIN % b"+5" + b"hello",
        PLAIN % b"5 " + b"hello",
        PLAIN % b"5,5" + b"hello",
        PLAIN % b"0x5" + b"hello",
        PLAIN % b"5\r\ncontent-length: 6" + b"hello",
        PLAIN % b"5\r\ntransfer-encoding: chunked" + b"5\r\nhello\r\n0\r\n\r\n",
        PLAIN % b"5\r\nconnection: close" + b"hello",
        PLAIN % b"5\r\ncontent-encoding: br" + b"hello",
        PLAIN % b"5\n" + b"hello",
        (PLAIN % b"5").replace(b"200 OK", b"404 No") + b"hello",
        (PLAIN % b"5").replace(b"HTTP/1.1", b"HTTP/1.0") + b"hello",
        (PLAIN % b"5").replace(b"x: y", b"x: z") + b"hello",
        (PLAIN % b"5").replace(b"text/plain", b"text/html") + b"hello",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + PLAIN % b"5" + b"hello",
        PLAIN % b"9999999999",
        PLAIN % b"99999999999999999999",
    ],
)
async def test_an_answer_like_the_one_before_means_what_it_would_mean_on_a_new_connection(answer: bytes) -> None:
    known, new = await second(answer, met=True), await second(answer, met=False)

    assert known == new


@pytest.mark.parametrize("cut", [10, len(PLAIN % b"5"), len(PLAIN % b"5") + 2])
async def test_an_answer_like_the_one_before_may_be_cut_or_late(cut: int) -> None:
    whole = PLAIN % b"5" + b"hello"

    async def stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole[:cut])
        await reader.read()

    for answer in (then_hang_up(whole[:cut]), stays):
        assert await second(answer, met=True) == await second(answer, met=False)


async def test_an_answer_like_the_one_before_is_no_longer_than_may_be() -> None:
    limits = HttpLimits(body_bytes=10)

    assert await second(PLAIN % b"11" + b"hello world", met=True, limits=limits) == (
        BadResponse,
        "it is longer than 10 bytes",
    )


@given(cuts=st.sets(st.integers(min_value=1, max_value=len(PLAIN % b"11") + 10)))
def test_an_answer_like_the_one_before_is_the_same_whatever_pieces_it_comes_in(cuts: set[int]) -> None:
    whole = PLAIN % b"11" + b"hello world"
    edges = [0, *sorted(cuts), len(whole)]

    async def in_pieces(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start, end in pairwise(edges):
            writer.write(whole[start:end])
            await asyncio.sleep(0)

    status, content, headers, after, connections = asyncio.run(second(in_pieces, met=True))

    assert (status, content, after, connections) == (200, b"hello world", b"next", 1)
    assert headers == {"content-type": "text/plain", "x": "y"}


# --- TLS -----------------------------------------------------------------------------------


@pytest.fixture
def certified(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's side that trust each other."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "here.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=file)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_tls_is_spoken(certified: tuple[ssl.SSLContext, ssl.SSLContext], run: object) -> None:
    theirs, ours = certified

    async def twice() -> tuple[bytes, int]:
        async with Upstream(with_length(b"hello"), tls=theirs) as upstream, aclosing(HttpClient(tls=ours)) as client:
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
            response = await client.post(target(upstream), b"", timeout_seconds=PATIENCE)
            return response.content, upstream.connections

    assert run(twice()) == (b"hello", 1)  # type: ignore[operator]


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    certified: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with Upstream(with_length(b"hello"), tls=certified[0]) as upstream, aclosing(HttpClient()) as client:
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.post(target(upstream), b"", timeout_seconds=PATIENCE)

        assert upstream.requests == []
