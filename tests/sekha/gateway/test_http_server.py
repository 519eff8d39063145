"""The server under the gateway: what it takes for HTTP, and what it makes of callers who dawdle, hurry or leave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import pytest

from sekha.errors import SekhaError
from sekha.gateway.exchange import Exchange
from sekha.gateway.http_server import HEAD_BYTES, Connections, HttpExchange
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, payloads, wait_until

Answers: TypeAlias = Callable[[Exchange], Awaitable[None]]


class App:
    """Answers as a test has it, and notes who left."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.left: list[str] = []

    def begin(self, x: HttpExchange, body: bytes, /) -> bool:
        return False

    async def exchange(self, x: Exchange, /) -> None:
        try:
            await self._answers(x)
        except asyncio.CancelledError:
            self.left.append(x.path)
            if not x.left:
                raise
        except SekhaError as error:
            await x.answer(413, error.code.encode(), [])


async def echo(x: Exchange) -> None:
    """Say what was asked: method, path, query and body."""
    body = await x.body(limit_mb=1, timeout_seconds=5)
    await x.answer(200, b"%b %b ?%b %b" % (x.method.encode(), x.path.encode(), x.query, body), [])


async def without_reading(x: Exchange) -> None:
    await x.answer(401, b"no", [])


class Caller:
    """One connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()
            await asyncio.sleep(0.01)

    async def reply(self) -> tuple[bytes, bytes]:
        """The next reply whose length is known: head and body."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return head, await self._reader.readexactly(int(length.partition(b":")[2]))

    async def head(self) -> bytes:
        return await self._reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All until the other side closes."""
        async with asyncio.timeout(5):
            return await self._reader.read()

    def leave(self) -> None:
        self._writer.close()


@asynccontextmanager
async def serving(
    answers: Answers = echo, *, head_seconds: float = 20, idle_seconds: float = 20
) -> AsyncIterator[tuple[Connections, App, Callable[[], Awaitable[Caller]]]]:
    app = App(answers)
    connections = Connections(app, head_seconds=head_seconds, idle_seconds=idle_seconds)
    server = await asyncio.get_running_loop().create_server(connections.connect, "127.0.0.1", 0)
    callers: list[Caller] = []

    async def connect() -> Caller:
        callers.append(Caller(*await asyncio.open_connection(*server.sockets[0].getsockname())))
        return callers[-1]

    try:
        yield connections, app, connect
    finally:
        for caller in callers:
            caller.leave()
        server.close()
        await connections.end()
        connections.close()
    assert not connections.turn.busy


async def until_the_end(*sent: bytes, answers: Answers = echo) -> bytes:
    """All that comes to whoever sends this, when the connection ends with it."""
    async with serving(answers) as (_, _, connect):
        caller = await connect()
        await caller.send(*sent)
        return await caller.rest()


def _post(length: bytes) -> bytes:
    return b"POST /a?b HTTP/1.1\r\nhost: x\r\nContent-Length: %b\r\naccept: */*\r\n\r\n" % length


def _without_what_changes(replies: bytes) -> bytes:
    return re.sub(rb"(date|x-request-id): [^\r]*\r\n", b"", replies)


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST /a?b=c HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc")
        head, first = await caller.reply()
        await caller.send(b"GET /%C3%A9 HTTP/1.1\r\n\r\n")
        _, second = await caller.reply()

        assert head.startswith(b"HTTP/1.1 200 OK\r\ndate: ")
        assert (first, second) == (b"POST /a ?b=c abc", "GET /é ? ".encode())


async def test_requests_sent_at_once_are_answered_in_turn() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"".join(b"POST /%d HTTP/1.1\r\ncontent-length: 1\r\n\r\nx" % at for at in range(50)))

        assert [(await caller.reply())[1] for _ in range(50)] == [b"POST /%d ? x" % at for at in range(50)]


async def test_a_head_that_is_sent_again_may_be_of_a_body_of_another_length() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()
        replies = []

        for body in (b"a", b"", b"b" * 12, b"c" * 300_000):
            await caller.send(_post(b"%d" % len(body)) + body)
            replies.append((await caller.reply())[1])

        assert replies == [b"POST /a ?b " + body for body in (b"a", b"", b"b" * 12, b"c" * 300_000)]


async def test_a_head_that_is_sent_again_may_come_before_its_body_and_the_next_request_right_behind_it() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()
        await caller.send(_post(b"3") + b"abc")
        await caller.reply()

        await caller.send(_post(b"6"), b"de", b"fghi" + _post(b"1") + b"j" + _post(b"2"), b"kl")

        assert [(await caller.reply())[1] for _ in range(3)] == [
            b"POST /a ?b defghi",
            b"POST /a ?b j",
            b"POST /a ?b kl",
        ]


async def test_who_is_refused_while_sending_a_head_again_may_ask_once_more() -> None:
    async with serving(without_reading) as (_, _, connect):
        caller = await connect()
        await caller.send(_post(b"3") + b"abc")
        first = await caller.reply()

        await caller.send(_post(b"6") + b"abc")
        second = await caller.reply()
        await caller.send(b"def" + _post(b"1") + b"g")

        assert first[1] == second[1] == (await caller.reply())[1] == b"no"


async def test_a_body_above_the_limit_is_refused_behind_a_head_that_is_sent_again() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()
        await caller.send(_post(b"1") + b"x")
        await caller.reply()

        await caller.send(_post(b"9000000"), b"x" * 1_100_000)

        assert (await caller.reply())[1] == b"request_too_large"


@pytest.mark.parametrize(
    "length",
    [
        b"",
        b" ",
        b"+3",
        b"-3",
        b"0x3",
        b"3_0",
        b" 3",
        b"3 ",
        b"3,3",
        b"003",
        b"0" * 12 + b"3",
        b"9" * 20,
        b"\xb3",
        b"3\n",
        b"3\r",
        b"3\r\n 4",
        b"3\ncontent-length: 4",
        b"3\r\ncontent-length: 4",
        b"3\r\ntransfer-encoding: chunked",
        b"3\r\nconnection: close",
        b"3\r\nexpect: 100-continue",
        b"3\r\n\r\nabcPOST /smuggled HTTP/1.1\r\ncontent-length: 3",
    ],
)
async def test_what_is_like_a_head_from_before_means_what_it_would_mean_alone(length: bytes) -> None:
    sent = _post(length) + b"abcGET /last HTTP/1.1\r\nconnection: close\r\n\r\n"
    async with serving() as (_, _, connect):
        first, again = await connect(), await connect()
        await again.send(_post(b"3") + b"abc")
        await again.reply()

        await first.send(sent)
        await again.send(sent)

        assert _without_what_changes(await again.rest()) == _without_what_changes(await first.rest())


async def test_a_head_is_not_taken_for_the_one_before_when_anything_but_the_length_differs() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()
        replies = []

        for sent in (_post(b"1"), _post(b"1").replace(b"/a", b"/c"), _post(b"1").replace(b"?b", b"?d"), _post(b"1")):
            await caller.send(sent + b"x")
            replies.append((await caller.reply())[1])

        assert replies == [b"POST /a ?b x", b"POST /c ?b x", b"POST /a ?d x", b"POST /a ?b x"]


async def test_a_body_may_come_in_chunks_and_drop_by_drop() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", b"3\r\nabc", b"\r\n2\r\nd", b"e\r\n0\r\n\r\n"
        )

        assert (await caller.reply())[1] == b"POST / ? abcde"


async def test_a_body_that_is_asked_for_is_waited_for_with_100_continue() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        told = await caller.head()
        await caller.send(b"ok")

        assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await caller.reply())[1] == b"POST / ? ok"


async def test_a_connection_ends_when_a_body_that_was_announced_is_not_wanted() -> None:
    announced = b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"

    assert b"\r\nconnection: close\r\n" in await until_the_end(announced, answers=without_reading)


async def test_who_is_refused_while_sending_may_ask_again_on_the_same_connection() -> None:
    async with serving(without_reading) as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\ncontent-length: 6\r\n\r\nabc")
        first = await caller.reply()
        await caller.send(b"defGET / HTTP/1.1\r\n\r\n")

        assert first[1] == (await caller.reply())[1] == b"no"


async def test_a_body_above_the_limit_is_refused_before_it_is_all_here() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\ncontent-length: 9000000\r\n\r\n", b"x" * 1_100_000)

        assert (await caller.reply())[1] == b"request_too_large"


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"])
@pytest.mark.parametrize("known", [False, True])
async def test_a_body_announced_above_the_limit_is_refused_without_any_of_it(expect: bytes, known: bool) -> None:
    head = b"POST / HTTP/1.1\r\n%bcontent-length: " % expect
    async with serving() as (_, _, connect):
        caller = await connect()
        if known:
            await caller.send(head + b"1\r\n\r\nx")
            await caller.reply()

        await caller.send(head + b"1000001\r\n\r\n")
        async with asyncio.timeout(1):
            said, body = await caller.reply()

        assert body == b"request_too_large"
        assert b"\r\nconnection: close\r\n" in said
        assert await caller.rest() == b""


async def test_who_is_refused_from_the_head_and_sends_it_all_the_same_can_read_why() -> None:
    async with serving() as (connections, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\ncontent-length: 9000000\r\n\r\n", *[b"x" * 1_000_000] * 9)

        assert (await caller.rest()).endswith(b"request_too_large")
        caller.leave()
        await wait_until(lambda: not len(connections))


async def test_who_is_refused_from_the_head_and_stays_is_let_go() -> None:
    async with serving(head_seconds=0.1) as (connections, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\ncontent-length: 9000000\r\n\r\n")
        await caller.rest()

        await wait_until(lambda: not len(connections))


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_answered_with_400_and_the_end(sent: bytes) -> None:
    head, _, body = (await until_the_end(sent)).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nconnection: close" in head
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head)
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", None)
    assert error["message"].startswith("What was sent is not HTTP/1.1: ")


async def test_what_is_no_http_keeps_the_id_that_was_read_before_it() -> None:
    answered = await until_the_end(b"GET / HTTP/1.1\r\nx-request-id: mine\r\ncontent-length: -1\r\n\r\n")

    assert b"\r\nx-request-id: mine\r\n" in answered


async def test_who_is_told_that_it_is_no_http_may_still_be_sending() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", *[b"x" * 1_000_000] * 9)

        assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")


async def test_chunks_that_are_none_end_a_request_that_waits_for_them() -> None:
    async with serving() as (_, app, connect):
        caller = await connect()

        await caller.send(b"POST /bad HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", b"zz\r\n")

        assert (await caller.rest()).endswith(b"\r\nconnection: close\r\n\r\ninvalid_request")
        assert app.left == []


async def test_chunks_that_are_none_behind_an_answer_get_no_second_one() -> None:
    async with serving(without_reading) as (_, _, connect):
        caller = await connect()

        await caller.send(b"POST /bad HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        await caller.reply()
        await caller.send(b"zz\r\n")

        assert await caller.rest() == b""


async def test_garbage_behind_a_request_does_not_keep_it_from_its_answer() -> None:
    async with serving() as (_, _, connect):
        caller = await connect()

        await caller.send(b"GET /good HTTP/1.1\r\n\r\n\x00\x00\r\n\r\n")

        assert (await caller.reply())[1] == b"GET /good ? "
        assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")


async def test_headers_beyond_all_measure_are_refused() -> None:
    answered = await until_the_end(b"GET / HTTP/1.1\r\nx: ", b"x" * (HEAD_BYTES + 1))

    assert answered.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("beyond", [1, 1_000, 40_000, 3 * HEAD_BYTES])
@pytest.mark.parametrize("first", [0, 20, 30_000, -3])
@pytest.mark.parametrize("where", ["url", "header"])
async def test_a_head_above_the_limit_is_refused_however_it_comes(beyond: int, first: int, where: str) -> None:
    url, rest = (b"/?", b"") if where == "url" else (b"/", b"x: ")
    bare = len(b"GET %b HTTP/1.1\r\n%b\r\n\r\n" % (url, rest))
    filled = b"x" * (HEAD_BYTES - bare + beyond)
    head = b"GET %b HTTP/1.1\r\n%b\r\n\r\n" % ((url + filled, b"y:") if where == "url" else (url, rest + filled))

    answered = await until_the_end(*(part for part in (head[:first], head[first:]) if part))

    assert answered.startswith(b"HTTP/1.1 431 ")
    assert answered.count(b"HTTP/1.1 ") == 1


BEFORE = {
    "bare": b"GET /first HTTP/1.1\r\n\r\n",
    "with a body": b"POST /first HTTP/1.1\r\ncontent-length: 20\r\n\r\nGET /?x HTTP/1.1\r\n\r\n",
    "with a long body": b"POST /first HTTP/1.1\r\ncontent-length: 100000\r\n\r\n" + b"b" * 100_000,
    "in chunks": b"POST /first HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nx: y\r\n\r\n",
    "in long chunks": b"POST /first HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"10000\r\n%b\r\n" % (b"b" * 65_536) * 2
    + b"0\r\n\r\n",
}


@pytest.mark.parametrize("first", [0, 20_000, HEAD_BYTES, 110_000])
@pytest.mark.parametrize("beyond", [0, 1, 15_000, HEAD_BYTES - 1, 3 * HEAD_BYTES])
@pytest.mark.parametrize("before", BEFORE)
async def test_a_head_is_measured_alone_though_it_comes_right_behind_another_request(
    before: str, beyond: int, first: int
) -> None:
    head = b"GET /?x HTTP/1.1\r\nconnection: close\r\nx: "
    head += b"x" * (HEAD_BYTES + beyond - len(head) - 4) + b"\r\n\r\n"
    sent = BEFORE[before] + head

    answered = await until_the_end(*(part for part in (sent[:first], sent[first:]) if part))

    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answered)]
    assert statuses == [200, 431 if beyond else 200]


@pytest.mark.parametrize("first", [0, 1, 30_000, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1])
async def test_a_head_of_just_the_limit_is_taken_with_all_that_follows_it(first: int) -> None:
    head = b"POST / HTTP/1.1\r\ncontent-length: 100000\r\nx: "
    head += b"x" * (HEAD_BYTES - len(head) - 4) + b"\r\n\r\n"
    sent = head + b"b" * 100_000 + b"POST /next HTTP/1.1\r\nconnection: close\r\ncontent-length: 1\r\n\r\nc"

    answered = await until_the_end(*(part for part in (sent[:first], sent[first:]) if part))

    assert answered.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\nPOST / ? %bHTTP/1.1" % (b"b" * 100_000) in answered
    assert answered.endswith(b"POST /next ? c")


async def test_an_upgrade_is_answered_as_what_it_would_be_without_and_nothing_follows() -> None:
    answered = await until_the_end(
        b"GET /chat HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    )

    assert answered.endswith(b"GET /chat ? ")
    assert b"\r\nconnection: close\r\n" in answered


async def test_http_1_0_gets_no_chunks_and_the_end() -> None:
    async def pieces(x: Exchange) -> None:
        await x.begin([])
        await x.go_on(b"one ")
        await x.end(b"two")

    old = await until_the_end(b"GET / HTTP/1.0\r\n\r\n", answers=pieces)
    new = await until_the_end(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", answers=pieces)

    assert old.endswith(b"\r\n\r\none two")
    assert new.endswith(b"\r\n\r\n4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")


async def test_the_answer_to_head_has_no_body() -> None:
    assert (await until_the_end(b"HEAD /a HTTP/1.1\r\nconnection: close\r\n\r\n")).endswith(b"\r\n\r\n")


async def test_a_header_with_a_line_break_is_never_sent() -> None:
    refused: list[str] = []

    async def injects(x: Exchange) -> None:
        try:
            await x.answer(200, b"", [(b"x-model", b"a\r\nset-cookie: b")])
        except ValueError as error:
            refused.append(str(error))
        await x.answer(500, b"", [])

    async with serving(injects) as (_, _, connect):
        caller = await connect()

        await caller.send(b"GET / HTTP/1.1\r\n\r\n")

        assert b"set-cookie" not in (await caller.reply())[0]
        assert len(refused) == 1


async def test_a_request_is_cancelled_at_once_when_its_caller_leaves() -> None:
    began = asyncio.Event()

    async def never(x: Exchange) -> None:
        began.set()
        await asyncio.Event().wait()

    async with serving(never) as (_, app, connect):
        caller = await connect()
        await caller.send(b"GET /slow HTTP/1.1\r\n\r\n")
        await began.wait()

        caller.leave()

        await wait_until(lambda: app.left == ["/slow"])


@pytest.mark.parametrize("handed_over", [False, True])
async def test_whoever_leaves_in_the_moment_in_which_his_requests_task_begins_is_noticed(handed_over: bool) -> None:
    async def never(x: Exchange) -> None:
        await asyncio.Event().wait()

    async with serving(never) as (connections, app, connect):
        caller = await connect()
        await wait_until(lambda: len(connections))

        def leaves(x: HttpExchange, body: bytes, /) -> bool:
            connections.abort(within_seconds=5)
            if handed_over:
                x.hand_over()
            return handed_over

        app.begin = leaves  # type: ignore[method-assign]
        await caller.send(b"POST /late HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")

        await wait_until(lambda: app.left == ["/late"])
        assert not connections.tasks


async def test_who_sends_nothing_and_who_has_nothing_more_to_send_are_let_go() -> None:
    async with serving(head_seconds=0.2, idle_seconds=0.2) as (connections, _, connect):
        silent, done = await connect(), await connect()
        await done.send(b"GET / HTTP/1.1\r\n\r\n")
        await done.reply()

        assert await silent.rest() == await done.rest() == b""
        await wait_until(lambda: len(connections) == 0)


async def test_a_stream_waits_for_a_reader_who_is_slow() -> None:
    written = 0

    async def much(x: Exchange) -> None:
        nonlocal written
        await x.begin([])
        for _ in range(400):
            await x.go_on(b"x" * 65_536)
            written += 1
        await x.end()

    async with serving(much) as (_, _, connect):
        caller = await connect()
        await caller.send(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        await asyncio.sleep(0.1)
        before_reading = written

        got = await caller.rest()

        assert before_reading < 400
        assert got.count(b"x" * 65_536) == 400


async def test_the_end_waits_for_answers_and_not_for_idle_connections() -> None:
    go_on = asyncio.Event()

    async def slow(x: Exchange) -> None:
        await go_on.wait()
        await x.answer(200, b"done", [])

    async with serving(slow) as (connections, _, connect):
        idle, busy = await connect(), await connect()
        await busy.send(b"GET / HTTP/1.1\r\n\r\n")
        await wait_until(lambda: connections.tasks)

        ending = asyncio.create_task(connections.end())
        assert await idle.rest() == b""
        assert not ending.done()
        go_on.set()

        assert (await busy.rest()).endswith(b"\r\nconnection: close\r\n\r\ndone")
        await ending


@pytest.mark.parametrize("gateway", ["own", "asgi"], indirect=True)
async def test_the_gateway_says_the_same_under_any_asgi_server(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as gate:
        whole = await gate.chat(model="chat")
        head, streamed = await gate.stream(model="chat")
        refused = await gate.http.post("/v1/chat/completions", content=b"{")
        missing = await gate.http.get("/nowhere")

        assert whole.json()["sekha"]["model_id"] == whole.headers["x-sekha-model"] == "chat"
        assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert list(payloads(streamed))
        assert streamed.endswith("data: [DONE]\n\n")
        assert (refused.status_code, missing.status_code) == (400, 404)
        assert all(len(reply.headers["x-request-id"]) == 32 for reply in (whole, head, refused, missing))
