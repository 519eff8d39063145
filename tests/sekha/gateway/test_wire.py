"""Bytes as they come: slow, in pieces, too many, broken, by the wrong method."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.errors import InvalidRequest, UnknownModel
from sekha.gateway.exchange import Exchange
from sekha.gateway.serving import Serving
from sekha.gateway.wire import chat_asked, embed_asked, money, with_note
from sekha.keys import new_key
from sekha.steps.counting import count_chat
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens

CHAT = orjson.dumps({"model": "chat", "messages": [{"role": "user", "content": "Hello there."}]})
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def _whole(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _status(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1])


def _body(raw: bytes) -> dict[str, Any]:
    said = orjson.loads(raw.partition(b"\r\n\r\n")[2])
    assert isinstance(said, dict)
    return said


async def _small(serving: Serving, x: Exchange) -> None:
    """A page that reads little and waits for no one."""
    body = await x.body(limit_mb=0.001, timeout_seconds=0.1)
    await x.answer(200, b"%d" % len(body), [])


SMALL = {"/small": {"POST": _small}}


# --- bodies --------------------------------------------------------------------------------


async def test_a_body_that_trickles_in_is_given_up(gateway: Opens) -> None:
    async with gateway(routes=SMALL) as served:
        raw = await served.send(
            b"POST /small HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n", b"{"
        )

    assert _status(raw) == 408
    assert _body(raw)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused_before_it_is_whole(gateway: Opens, chunked: bool) -> None:
    announced = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000000"
    part = b"7d0\r\n" + b"x" * 2000 + b"\r\n" if chunked else b"x" * 2000
    async with gateway(routes=SMALL) as served:
        raw = await served.send(b"POST /small HTTP/1.1\r\nHost: x\r\n" + announced + b"\r\n\r\n", part, whole=False)

    assert _status(raw) == 413


async def test_a_body_as_large_as_it_may_be_is_read(gateway: Opens) -> None:
    async with gateway(routes=SMALL) as served:
        fits = await served.http.post("/small", content=b"x" * 1000)
        too_large = await served.http.post("/small", content=b"x" * 1001)

    assert (fits.status_code, fits.text) == (200, "1000")
    assert too_large.status_code == 413
    assert "0.001 MB" in too_large.json()["error"]["message"]


async def test_a_body_may_come_in_many_small_chunks(gateway: Opens) -> None:
    chunks = [b"1\r\n%c\r\n" % byte for byte in CHAT]
    async with StandIn() as standin, gateway(standin) as served:
        raw = await served.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")

    assert _status(raw) == 200
    assert b"You said: Hello there." in raw


async def test_who_expects_to_be_told_to_continue_is(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(CHAT)
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head)
        interim = await reader.readuntil(b"\r\n\r\n")
        writer.write(CHAT)
        raw = await reader.read()
        writer.close()

    assert _status(interim) == 100
    assert _status(raw) == 200


async def test_several_requests_share_a_connection(gateway: Opens) -> None:
    alive = _whole(CHAT).replace(b"Connection: close\r\n", b"")
    async with StandIn() as standin, gateway(standin) as served:
        raw = await served.send(alive + alive + _whole(CHAT))

    assert raw.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"{" * 100_000,
    ],
)
async def test_what_is_no_json_object_is_refused_without_a_word_of_it(gateway: Opens, body: bytes) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        raw = await served.send(_whole(body))

    assert _status(raw) == 400
    assert _body(raw)["error"]["code"] == "invalid_request"
    assert not standin.requests


async def test_what_is_no_http_is_refused(gateway: Opens) -> None:
    async with gateway(routes=SMALL) as served:
        raw = await served.send(b"HELLO\r\n\r\n")
        after = await served.http.post("/small", content=b"x")

    assert _status(raw) == 400
    assert after.status_code == 200


# --- fields --------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": None}, "messages"),
    "none of them": ({"messages": []}, "messages"),
    "text": ({"messages": "Hello"}, "messages"),
    "a message that is text": ({"messages": ["Hello"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "Hello"}]}, "messages[0]"),
    "a number for a role": ({"messages": [{"role": 5, "content": "Hello"}]}, "messages[0]"),
    "a number for content": ({"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
    "an object for content": ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages[0]"),
    "a part that is text": ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0]"),
    "a number for a text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0]"),
    "no image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    "an image by number": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]},
        "messages[0].content[0]",
    ),
    "tool calls as text": ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0]"),
    "a tool call as text": ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0]"),
    "a model by number": ({"model": 5}, "model"),
    "a model of any length": ({"model": "m" * 257}, "model"),
    "a preferred model of any length": ({"preferred_model": "m" * 257}, "preferred_model"),
    "n": ({"n": "two"}, "n"),
    "no n": ({"n": 0}, "n"),
    "max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "max_completion_tokens": ({"max_completion_tokens": "9"}, "max_completion_tokens"),
    "max_cost": ({"max_cost": "much"}, "max_cost"),
    "endless max_cost": ({"max_cost": "Infinity"}, "max_cost"),
    "less than nothing": ({"max_cost": -1}, "max_cost"),
    "stream": ({"stream": "yes"}, "stream"),
    "store": ({"store": 1}, "store"),
    "metadata": ({"metadata": "x"}, "metadata"),
    "metadata of numbers": ({"metadata": {"team": 5}}, "metadata"),
    "a function as text": ({"messages": [{"role": "assistant", "tool_calls": [{"function": "x"}]}]}, "messages[0]"),
    "tools": ({"tools": "x"}, "tools"),
    "a tool": ({"tools": ["x"]}, "tools"),
    "modalities": ({"modalities": 5}, "modalities"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_field_that_is_wrong_is_refused_by_its_name(gateway: Opens, what: str) -> None:
    fields, name = WRONG[what]
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.chat(**fields)

    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"].startswith(name)
    assert not standin.requests


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["model", "messages", "input", "n", "max_tokens", "max_cost", "metadata", "store", "stream", "task", "tools"]
)


@given(st.dictionaries(NAMES, JSON, max_size=6))
def test_whatever_is_sent_becomes_a_request_or_a_refusal(sent: dict[str, Any]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]} | sent).encode()
    for asked in (chat_asked, embed_asked):
        with contextlib.suppress(InvalidRequest, UnknownModel):
            asked(body)


PARTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image_url", "input_audio"]), "text": JSON, "image_url": JSON}
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional={
        "content": st.lists(PARTS | JSON, max_size=3) | JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({}, optional={"function": JSON}), max_size=2) | JSON,
        "name": JSON,
        "cache_control": JSON,
    },
)


@given(st.lists(MESSAGES, min_size=1, max_size=3), st.none() | JSON)
def test_what_is_taken_for_a_chat_can_be_counted_and_routed(messages: list[Any], tools: Any) -> None:
    body = json.dumps({"messages": messages, "tools": tools}).encode()
    with contextlib.suppress(InvalidRequest):
        request = chat_asked(body).request

        assert request.ask().kind == "chat"
        assert asyncio.run(count_chat(request, "gpt-4o")) > 0


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        chat_asked(b'{"messages": [{"role": "user", "content": "x"}], "max_cost": 1e999}')


def test_a_note_is_spliced_into_what_the_provider_wrote() -> None:
    assert with_note(b'{"id":"x"}\n', {"cost": 1}) == b'{"id":"x","sekha":{"cost":1}}'
    assert money(Decimal("0.0000100")) == b"0.00001"
    assert money(Decimal("1E+2")) == b"100"
    assert money(Decimal(0)) == b"0"


# --- paths and methods ---------------------------------------------------------------------


async def test_a_path_that_is_not_there_names_the_nearest(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.http.post("/v1/chat/completion", json={})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/metrics", "GET"),
    ],
)
async def test_another_method_is_refused_with_the_one_that_is_meant(
    gateway: Opens, method: str, path: str, allowed: str
) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.http.request(method, path)

    assert response.status_code == 405
    assert allowed in response.headers["allow"].split(", ")


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/health", "/metrics"])
async def test_a_head_is_what_a_get_would_begin_with(gateway: Opens, path: str) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        head = await served.http.head(path)
        refused = await served.http.head("/v1/embeddings")

    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    assert (refused.status_code, refused.content) == (405, b"")


async def test_a_web_socket_is_closed(gateway: Opens) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    async with StandIn() as standin, gateway(standin) as served:
        raw = await served.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n", whole=False)

    # Uvicorn serves it as what it is without the upgrade.
    assert _status(raw) == 200


async def test_every_reply_has_a_request_id(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        replies = [
            await served.chat(),
            await served.chat(model="nobody"),
            await served.http.get("/nowhere"),
            await served.http.get("/v1/models", headers={"x-request-id": "not\tgood" + "x" * 200}),
            await served.http.get("/v1/models", headers={"x-request-id": f"id-{new_key()}"}),
        ]

    assert len({reply.headers["x-request-id"] for reply in replies}) == 5
    assert all(reply.headers["x-request-id"].isalnum() for reply in replies)


@pytest.mark.parametrize(
    "asked", ["d2b7c7a4-6a0b-4f6e-9a49-0a9f5f1f7c11", "trace.7_b-2", "x" * 128, "0HN7:01", "a b", "x" * 129, "é"]
)
async def test_a_request_keeps_its_callers_id_where_that_breaks_no_line(gateway: Opens, asked: str) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        reply = await served.http.get("/v1/models", headers={"x-request-id": asked.encode()})

    kept = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", asked) is not None
    assert (reply.headers["x-request-id"] == asked) is kept
    assert kept or re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


@pytest.mark.parametrize("tokens", [[76460], [[9906], [76460]]], ids=["of one text", "of texts"])
def test_tokens_that_are_no_whole_text_are_refused(tokens: object) -> None:
    body = json.dumps({"model": "text-embedding-3-small", "input": tokens}).encode()

    with pytest.raises(InvalidRequest, match="no whole text") as caught:
        embed_asked(body)

    assert caught.value.field == "input"


def test_tokens_that_are_whole_text_together_are_that_text() -> None:
    (text,) = embed_asked(b'{"model": "text-embedding-3-small", "input": [76460, 222]}')[0].texts

    assert len(text) == 1
    assert text != "\ufffd"
