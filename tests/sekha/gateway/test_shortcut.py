"""The short way of an ordinary chat: nobody can tell it from the line, by any sign, in whatever goes right or wrong."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import json
import logging
import math
import random
import re
import socket
import sqlite3
import struct
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest

from sekha.calling import Retries
from sekha.gateway.begun import Shortened
from sekha.gateway.server import Server, bind
from sekha.keys import hash_of, new_key
from sekha.ledger import Budget
from sekha.ledgers import open_leased, open_ledger
from sekha.providers.litellm import begin_import
from sekha.recording.prefect_rows import receipt
from sekha.steps.counting import INLINE
from sekha.testing import StandIn
from tests.fixtures.full import room_for
from tests.fixtures.gateway import config_for, wait_until
from tests.fixtures.upstream import Answer, Upstream, chunked, with_length
from tests.fixtures.ways import (
    EMBED,
    GOOD,
    HELLO_EVENTS,
    USAGE,
    Caller,
    Side,
    Way,
    body_of,
    both,
    event,
    fill_journal,
    opened,
    streamed,
    whole,
)


@pytest.fixture(autouse=True)
def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails the test in which something went wrong that nobody foresaw."""
    yield
    said = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not [record.getMessage() for record in said if record.name.startswith("sekha")]


def asking(*bodies: bytes, meets: Sequence[bytes] = (), headers: Sequence[str] = ()) -> Callable[[Side], Any]:
    """Ask for these, one after another on one connection."""

    async def asks(side: Side) -> None:
        await side.meet(*meets, headers=headers)
        caller = await side.connect()
        for body in bodies:
            await side.ask(body, caller=caller, headers=headers)

    return asks


# --- what is asked -------------------------------------------------------------------------

SPECIAL = 'Grüß "Gott" \\ \u2028\u0000\x7f 你好 👩‍👩‍👧 e\u0301 <|endoftext|> </script>'
ORDINARY: dict[str, bytes] = {
    "plain": body_of(),
    "empty": body_of(""),
    "special": body_of(SPECIAL),
    "escaped": json.dumps({"model": "chat", "messages": [{"role": "user", "content": SPECIAL}]}).encode(),
    "as long as may be": body_of("word " * (INLINE // 5)),
    "spaced": b' \r\n\t{ "messages" : [ {"content":"Hi", "role":"user"} ] ,\n"model":"chat" } \n',
    "said twice": b'{"model":"nobody","messages":5,"model":"chat","temperature":1,"temperature":0.5,'
    b'"messages":[{"role":"x","role":"user","content":"a","content":"b"}]}',
    "max_tokens": body_of(max_tokens=5),
    "max_completion_tokens": body_of(max_completion_tokens=7),
    "both": body_of(max_tokens=9, max_completion_tokens=9),
    "the first is less": body_of(max_tokens=5, max_completion_tokens=7),
    "the second is less": body_of(max_tokens=7, max_completion_tokens=5),
    "one of them is null": body_of(max_tokens=None, max_completion_tokens=5),
    "no limit": body_of(max_tokens=None, max_completion_tokens=None),
    "no stream": body_of(stream=None),
    "whole": body_of(stream=False),
    "nulls": body_of(
        temperature=None,
        top_p=None,
        frequency_penalty=None,
        presence_penalty=None,
        logit_bias=None,
        logprobs=None,
        top_logprobs=None,
        reasoning_effort=None,
        seed=None,
        stop=None,
        user=None,
        verbosity=None,
    ),
    "options": body_of(
        user="me",
        verbosity="low",
        stop=["\n", "👋"],
        seed=-(2**63),
        reasoning_effort="minimal",
        top_logprobs=3,
        logprobs=True,
        logit_bias={"50256": -100, "é": 1.5},
        presence_penalty=-2,
        frequency_penalty=1e-7,
        top_p=0.30000000000000004,
        temperature=0,
        max_tokens=3,
    ),
    "options as nobody takes them": body_of(
        temperature="hot",
        top_p=[],
        seed=1.5,
        stop={"a": None},
        user=7,
        logprobs="yes",
        logit_bias=[1],
        verbosity=False,
        reasoning_effort={},
        top_logprobs=-1,
        frequency_penalty=[[]],
        presence_penalty=2**63,
    ),
    "names": orjson.dumps(
        {
            "model": "chat",
            "messages": [{"role": "user", "content": "a", "name": name} for name in ("Ann", "", None, 5, ["é"])],
        }
    ),
    "roles": orjson.dumps(
        {
            "model": "chat",
            "messages": [
                {"role": role, "content": f"I am {role}."}
                for role in ("system", "developer", "user", "assistant", "tool", "function", "", "Käpt'n", "user")
            ],
        }
    ),
    "provider and model": body_of(model="first/chat"),
    "a task": body_of(model="chat_small"),
}
MET = [body_of(model=name) for name in ("chat", "first/chat", "chat_small")]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_ordinary_is_asked_and_answered_as_in_the_line(tmp_path: Path, stream: bool) -> None:
    bodies = [body[:1] + b'"stream":true,' + body[1:] for body in map(bytes.strip, ORDINARY.values())]
    bodies = [body for body in bodies if body.count(b'"stream"') == 1] if stream else list(ORDINARY.values())

    def makes() -> Upstream:
        return Upstream(*[GOOD] * len(MET), streamed(*HELLO_EVENTS) if stream else GOOD)

    side = await both(tmp_path, makes, asking(*bodies, meets=MET), took=["short"] * len(bodies))

    assert {reply.status for reply in side.seen.replies} == {200}
    assert len(side.seen.asked) == len(MET) + len(bodies)


CHEAPER = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    models:
      - {model_id: chat, task: chat_small, max_output_tokens: 100, price: {input_per_million: 1, output_per_million: 2}}
      - {model_id: eyes, task: vision, supports_vision: true, max_output_tokens: 100, price: {input_per_million: 3}}
budgets: [{name: all, limit: 1000}]
"""
OTHERWISE: dict[str, bytes] = {
    "too long to be counted at once": body_of("x" * (INLINE + 1)),
    "parts": body_of(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    "no content": body_of(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]),
    "nothing but a role": body_of(messages=[{"role": "user"}]),
    "a message with more": body_of(messages=[{"role": "user", "content": "Hi", "weight": 1}]),
    "a call": body_of(
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ]
    ),
    "tools": body_of(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "no tools": body_of(tools=None),
    "a shape": body_of(response_format={"type": "json_object"}),
    "several": body_of(n=2),
    "tags": body_of(metadata={"team": "search"}),
    "kept": body_of(store=False),
    "what it may cost": body_of(max_cost=0.5),
    "preferred": body_of(preferred_model="chat"),
    "no model": orjson.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
    "any model": body_of(model="auto"),
    "null": body_of(model=None),
    "empty": body_of(model=""),
    "not met yet": body_of(model="first/eyes"),
    "what nobody knows": body_of(frobnicate=[1, "é"]),
    "options of no stream": body_of(stream_options={"include_usage": True}),
}


async def test_what_is_not_ordinary_goes_the_long_way(tmp_path: Path) -> None:
    bodies = list(OTHERWISE.values())

    side = await both(tmp_path, lambda: Upstream(GOOD), asking(*bodies), took=["line"] * len(bodies), config=CHEAPER)

    assert {reply.status for reply in side.seen.replies} == {200}


async def test_options_of_a_stream_that_say_more_go_the_long_way(tmp_path: Path) -> None:
    options = [{}, {"include_usage": True, "include_obfuscation": False}, {"include_usage": 1}]
    bodies = [body_of(stream=True, stream_options=each) for each in options]

    await both(
        tmp_path, lambda: Upstream(GOOD, streamed(*HELLO_EVENTS)), asking(*bodies, meets=[body_of()]), took=["line"] * 3
    )


async def test_an_image_goes_the_long_way(tmp_path: Path) -> None:
    drawn = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    dot = f"data:image/png;base64,{drawn}"
    body = body_of(
        model="eyes", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": dot}}]}]
    )

    side = await both(
        tmp_path, lambda: Upstream(GOOD), asking(body, body, meets=[body_of(model="eyes")]), took=["line"] * 2
    )

    assert [reply.status for reply in side.seen.replies] == [200, 200]


REMEMBERED = """
collections: {said: {model: vectors}}
memory: {collection: said}
"""


@pytest.mark.parametrize("kept", ["recording: {content: true}", REMEMBERED])
async def test_where_a_chats_words_are_kept_all_of_them_go_the_long_way(tmp_path: Path, kept: str) -> None:
    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream, extra=kept) as side:
        await side.meet()
        for _ in range(3):
            assert (await side.ask(body_of())).status == 200

    assert side.went == ["line"] * 3


WRONG: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"model=chat",
    "half": body_of()[:-1],
    "more": body_of() + b"{}",
    "a mark": b"\xef\xbb\xbf" + body_of(),
    "no UTF-8": body_of("A").replace(b'"A"', b'"\xff"'),
    "half a pair": body_of("A").replace(b'"A"', b'"\\ud800"'),
    "no number": body_of(temperature=0.125).replace(b"0.125", b"NaN"),
    "too deep": body_of(stop=0.125).replace(b"0.125", b"[" * 2000 + b"]" * 2000),
    "a list": b"[" + body_of() + b"]",
    "null": b"null",
    "text": b'"chat"',
    "an empty object": b"{}",
    **{f"model {value!r}"[:30]: body_of(model=value) for value in (5, True, ["chat"], {}, "x" * 257)},
    **{
        f"messages {value!r}": body_of(messages=value)
        for value in (None, "Hi", 5, {}, [], [5], [None], ["Hi"], [[]], [{}])
    },
    **{f"role {value!r}": body_of(messages=[{"role": value, "content": "Hi"}]) for value in (None, 5, ["user"], True)},
    **{f"content {value!r}": body_of(messages=[{"role": "user", "content": value}]) for value in (5, True, {}, ["Hi"])},
    **{f"max_tokens {value!r}": body_of(max_tokens=value) for value in (0, -1, 1.0, 1.5, "5", True, False, [], {})},
    **{
        f"max_completion_tokens {value!r}": body_of(max_tokens=5, max_completion_tokens=value)
        for value in (0, 2.5, "5")
    },
    "a number beyond all": body_of(max_tokens=0.125).replace(b"0.125", b"1" + b"0" * 30),
    **{f"stream {value!r}": body_of(stream=value) for value in (1, 0, "true", [], {})},
    "store": body_of(store="no"),
    "n": body_of(n=0),
    "tools": body_of(tools={}),
    "stream_options": body_of(stream=True, stream_options=5),
    "modalities": body_of(modalities="audio"),
    "metadata": body_of(metadata=5),
    "max_cost": body_of(max_cost=-1),
    "task": body_of(task="embedding"),
}


async def test_what_is_wrong_is_refused_in_the_same_words(tmp_path: Path) -> None:
    bodies = list(WRONG.values())

    side = await both(tmp_path, lambda: Upstream(GOOD), asking(*bodies), took=["line"] * len(bodies))

    assert {reply.status for reply in side.seen.replies} == {400}
    assert len(side.seen.asked) == 1


async def test_who_is_not_there_is_not_found_and_what_does_not_fit_is_not_sent(tmp_path: Path) -> None:
    config = """
    providers:
      - id: first
        provider_type: openai
        base_url: URL
        models:
          - model_id: chat
            task: chat_small
            context_window: 200
            max_output_tokens: 100
            price: {input_per_million: 1}
    """
    bodies = [
        body_of(model="nobody"),
        body_of(model="second/chat"),
        body_of(model="chat "),
        body_of("word " * 100),
        body_of("word " * 300),
        body_of(max_tokens=150),
        body_of(max_tokens=195),
        body_of(max_tokens=2**62),
    ]
    side = await both(
        tmp_path,
        lambda: Upstream(GOOD),
        asking(*bodies),
        took=["line"] * 3 + ["short", "line", "short", "line", "line"],
        config=config,
    )

    assert [reply.status == 200 for reply in side.seen.replies] == [way == "short" for way in side.went]


# --- what comes of a whole answer ----------------------------------------------------------


def refusal(status: int, *headers: str, message: str = "It failed.", **more: Any) -> bytes:
    body = orjson.dumps({"error": {"message": message, "type": "x", "param": None, "code": None} | more})
    return with_length(body, "Content-Type: application/json", *headers, status=f"{status} X")


def then_hang_up(answer: bytes) -> Answer:
    async def answered(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    return answered


def in_two(answer: bytes, at: int) -> Answer:
    async def answered(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer[:at])
        await writer.drain()
        await asyncio.sleep(0.005)
        writer.write(answer[at:])
        await writer.drain()

    return answered


PATIENT = "routing: {circuit_breaker: {failure_threshold: 100}}"
ONE = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    models:
      - {model_id: chat, task: chat_small, max_output_tokens: 9, price: {input_per_million: 10, output_per_million: 20}}
budgets: [{name: all, limit: 1000}]
routing: {circuit_breaker: {failure_threshold: 1000}}
"""
JSON = "Content-Type: application/json"
THOUGHT_APART = {  # as xAI reports it
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 33,
    "completion_tokens_details": {"reasoning_tokens": 20},
}
WHOLE: dict[str, tuple[int, list[Answer | None], str]] = {
    "good": (200, [GOOD], "short"),
    "in two pieces": (200, [in_two(GOOD, 20)], "short"),
    "its head first": (200, [in_two(GOOD, GOOD.index(b"\r\n\r\n") + 4)], "short"),
    "in chunks": (200, [chunked(GOOD.partition(b"\r\n\r\n")[2][:50], GOOD.partition(b"\r\n\r\n")[2][50:])], "short"),
    "until it is closed": (200, [then_hang_up(b"HTTP/1.1 200 OK\r\n\r\n" + GOOD.partition(b"\r\n\r\n")[2])], "short"),
    "and the end": (200, [GOOD.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)], "short"),
    "packed": (200, [with_length(gzip.compress(GOOD.partition(b"\r\n\r\n")[2]), "Content-Encoding: gzip")], "short"),
    "after an interim answer": (200, [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + GOOD], "short"),
    "with more behind it": (200, [GOOD + b"HTTP/1.1 200 OK\r\n\r\n"], "short"),
    "cached": (200, [whole(usage=USAGE | {"prompt_tokens_details": {"cached_tokens": 5}})], "short"),
    "written to a cache": (200, [whole(usage=USAGE | {"cache_creation_input_tokens": 2})], "short"),
    "dearer than was thought": (200, [whole(usage={"prompt_tokens": 9_999, "completion_tokens": 999})], "short"),
    "spaced": (200, [with_length(b"\n " + GOOD.partition(b"\r\n\r\n")[2] + b" \r\n", JSON)], "short"),
    "special": (200, [whole(SPECIAL, service_tier="x", sekha={"cost": 5})], "short"),
    "an error that is none": (200, [whole(error=None)], "short"),
    "several choices": (200, [whole(choices=[{"message": {"content": "a"}}, {"message": {}, "index": 5}])], "short"),
    "no usage": (200, [whole(usage=None)], "handed over"),
    "usage of nothing": (200, [whole(usage={"prompt_tokens": 0, "completion_tokens": 0})], "handed over"),
    "usage that is none": (200, [whole(usage=[5])], "handed over"),
    "usage in words": (200, [whole(usage={"prompt_tokens": "7", "completion_tokens": None})], "handed over"),
    "half of its usage": (200, [whole(usage={"prompt_tokens": 9, "completion_tokens": None})], "handed over"),
    "usage by its total": (200, [whole(usage={"prompt_tokens": 9, "total_tokens": 13})], "handed over"),
    "thoughts apart": (200, [whole(usage=THOUGHT_APART)], "short"),
    "no choices": (502, [whole(choices=[])] * 3, "handed over"),
    "choices of nothing": (502, [whole(choices=None)] * 3, "handed over"),
    "a choice without a message": (502, [whole(choices=[{"index": 0}])] * 3, "handed over"),
    "another status": (200, [GOOD.replace(b"200 OK", b"202 Accepted"), GOOD], "handed over"),
    "elsewhere": (502, [with_length(b"", "Location: /there", status="302 Found")], "handed over"),
    "a page": (
        502,
        [with_length(b"<html><body>Please log in</body></html>", "Content-Type: text/html")] * 3,
        "handed over",
    ),
    "nothing at all": (502, [with_length(b"")] * 3, "handed over"),
    "a list": (502, [with_length(b"[]")] * 3, "handed over"),
    "half of it": (502, [with_length(GOOD.partition(b"\r\n\r\n")[2][:-9])] * 3, "handed over"),
    "an error inside": (502, [whole(error={"message": "no"})] * 3, "handed over"),
    "an error inside with its status": (429, [whole(error={"message": "slow", "code": 429})] * 3, "handed over"),
    "an error inside by its code": (400, [whole(error={"message": "no", "code": "content_filter"})], "handed over"),
    "and then good": (200, [refusal(500), GOOD], "handed over"),
    "429 and then good": (200, [refusal(429, "Retry-After: 0.05"), GOOD], "handed over"),
    "500": (503, [refusal(500)] * 3, "handed over"),
    "400": (400, [refusal(400)], "handed over"),
    "401": (502, [refusal(401)], "handed over"),
    "403": (502, [refusal(403)], "handed over"),
    "404": (502, [refusal(404)], "handed over"),
    "413": (400, [refusal(413)], "handed over"),
    "content": (400, [refusal(400, code="content_policy_violation")], "handed over"),
    "context": (400, [refusal(400, code="context_length_exceeded")], "handed over"),
    "no more money": (
        502,
        [refusal(429, code="insufficient_quota", message="You exceeded your current quota.")],
        "handed over",
    ),
    "closed before the answer": (200, [None, GOOD], "handed over"),
    "closed again and again": (503, [None, None, None, None], "handed over"),
    "cut in its head": (200, [then_hang_up(GOOD[:20]), GOOD], "handed over"),
    "cut in its body": (200, [then_hang_up(GOOD[:-20]), GOOD], "handed over"),
    "cut in its chunks": (200, [then_hang_up(chunked(b"{", end=False)), GOOD], "handed over"),
    "no HTTP": (200, [b"SSH-2.0-OpenSSH_9.6\r\n", GOOD], "handed over"),
    "compressed as nobody asked for": (200, [with_length(b"x", "Content-Encoding: br"), GOOD], "handed over"),
}


async def test_a_whole_answer_or_what_comes_in_its_place_is_handled_as_in_the_line(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        caller = await side.connect()
        for name, (status, _, _) in WHOLE.items():
            await side.meet()
            assert (await side.ask(body_of(), caller=caller)).status == status, name
            side.note(circuits=side.circuits)

    answers = [answer for _, script, _ in WHOLE.values() for answer in (GOOD, *script)]
    took = [way for _, _, way in WHOLE.values()]

    side = await both(tmp_path, lambda: Upstream(*answers), asks, took=took, extra=PATIENT)

    assert len(side.seen.asked) == len(answers)


# --- what comes of a stream ----------------------------------------------------------------

SAY, MORE, STOP, COUNTED, DONE = HELLO_EVENTS
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
WRONG_EVENT = b'data: {"error": {"message": "It went wrong.", "type": "x"}}\n\n'


def crlf(piece: bytes) -> bytes:
    return piece.replace(b"\n", b"\r\n")


def over_lines(piece: bytes) -> bytes:
    """The same event with its JSON over several lines."""
    said = orjson.dumps(orjson.loads(piece[5:]), option=orjson.OPT_INDENT_2)
    return b"".join(b"data: %b\n" % line for line in said.splitlines()) + b"\n"


INFINITE = SAY.replace(b'"finish_reason"', b'"logprobs":{"content":[{"logprob":-Infinity}]},"finish_reason"')
HALF = event("x", finish="stop", usage=USAGE).replace(b'"x"', b'"\\ud83d"')
STREAMS: dict[str, tuple[int, list[Answer | None], Way]] = {
    "usage with the last choice": (200, [streamed(SAY, event(finish="stop", usage=USAGE), DONE)], "short"),
    "usage before the last choice": (200, [streamed(SAY, event(usage=USAGE), STOP, DONE)], "short"),
    "usage all the time": (
        200,
        [streamed(event("Hel", usage=USAGE), event("lo.", usage=USAGE), event(usage=USAGE), DONE)],
        "short",
    ),
    "usage, and then wrong": (200, [streamed(SAY, COUNTED, WRONG_EVENT)], "handed over"),
    "good": (200, [streamed(*HELLO_EVENTS)], "short"),
    "its end later": (200, [streamed(*HELLO_EVENTS, ends="later")], "short"),
    "its end never": (200, [streamed(*HELLO_EVENTS, ends="never")], "short"),
    "all at once": (200, [streamed(b"".join(HELLO_EVENTS))], "short"),
    "in two pieces": (200, [streamed(SAY + MORE, STOP + COUNTED + DONE)], "short"),
    "cut up": (
        200,
        [streamed(SAY, MORE[:1], MORE[1:-1], MORE[-1:] + STOP + COUNTED[:-9], COUNTED[-9:] + DONE)],
        "short",
    ),
    "comments within": (200, [streamed(SAY, b": wait\n\n", MORE + b": and wait\n\n", STOP, COUNTED, DONE)], "short"),
    "named events": (200, [streamed(SAY, b"event: x\nid: 5\n" + MORE, STOP, COUNTED, DONE)], "short"),
    "what is no JSON": (200, [streamed(SAY, b"data: [1]\n\n", b"data: hm\n\n", STOP, COUNTED, DONE)], "handed over"),
    "line ends of another sort later": (200, [streamed(SAY, crlf(MORE), crlf(STOP) + COUNTED, crlf(DONE))], "short"),
    "usage in every event": (
        200,
        [
            streamed(
                event("a", usage=USAGE), event("b", usage=USAGE | {"completion_tokens": 5}), event(finish="stop"), DONE
            )
        ],
        "short",
    ),
    "usage at the first": (200, [streamed(event("", usage=USAGE) + SAY, MORE, STOP, DONE)], "handed over"),
    "usage at the first and at the end": (200, [streamed(event("", usage=USAGE), *HELLO_EVENTS)], "short"),
    "usage at the first, and cut": (200, [streamed(event("", usage=USAGE), SAY, ends="never")], "handed over"),
    "usage alone at the first": (200, [streamed(COUNTED, SAY, STOP, DONE)], "handed over"),
    "usage all the time, and cut": (
        200,
        [streamed(event("Hel", usage=USAGE), event("lo.", usage=USAGE), ends="never")],
        "handed over",
    ),
    "usage with the last choice, and cut": (
        200,
        [streamed(SAY, event(finish="stop", usage=USAGE), ends="never")],
        "handed over",
    ),
    "more usage than choices": (
        200,
        [streamed(SAY, STOP, COUNTED, event(usage=USAGE | {"prompt_tokens": 70}), DONE)],
        "short",
    ),
    "an error that is none": (200, [streamed(SAY, event("x", error=None), STOP, COUNTED, DONE)], "short"),
    "another field behind the usage": (200, [streamed(SAY, STOP, COUNTED[:-1] + b"id: 7\n\n", DONE)], "short"),
    "another field before the usage": (200, [streamed(SAY, STOP, b"event: message\n" + COUNTED, DONE)], "short"),
    "several lines for the usage": (200, [streamed(SAY, STOP, over_lines(COUNTED), DONE)], "short"),
    "a number that is none in the usage": (
        200,
        [streamed(SAY, STOP, COUNTED.replace(b'"usage":{', b'"usage":{"cost":NaN,"saved":1e999,'), DONE)],
        "short",
    ),
    "braces that are no usage": (200, [streamed(SAY, STOP, COUNTED, b'data: {"usage":{7}}\n\n', DONE)], "short"),
    "numbers that are none": (200, [streamed(*[INFINITE] * 3, STOP, COUNTED, DONE)], "short"),
    "numbers that are none, and no usage": (200, [streamed(*[INFINITE] * 3, STOP, DONE)], "handed over"),
    "half a pair of surrogates with all the rest": (200, [streamed(event(""), HALF, DONE)], "short"),
    "what is said behind the end": (200, [streamed(SAY, STOP, COUNTED, DONE + MORE + WRONG_EVENT)], "short"),
    "tools": (
        200,
        [
            streamed(
                event(
                    "", choices=[{"index": 0, "delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]
                ),
                event(finish="tool_calls"),
                COUNTED,
                DONE,
            )
        ],
        "short",
    ),
    "no end in a word": (200, [streamed(SAY, MORE, STOP, COUNTED, ends="later")], "short"),
    "no end in a word, and no more": (200, [streamed(SAY, MORE, STOP, COUNTED)], "short"),
    "no end in a word, all at once": (200, [chunked(SAY, MORE, STOP, COUNTED)], "short"),
    "no blank line at the end": (200, [streamed(SAY, MORE, STOP, COUNTED, DONE[:-1])], "short"),
    "no blank line at the end, all at once": (200, [chunked(SAY, MORE, STOP, COUNTED, DONE[:-2])], "short"),
    "neither usage nor a word for the end": (200, [streamed(SAY, MORE, STOP)], "handed over"),
    "neither usage nor a word for the end, all at once": (200, [chunked(SAY, MORE, STOP)], "handed over"),
    "half an event, and the end": (200, [streamed(SAY, MORE[:9])], "handed over"),
    "the end": (200, [streamed(SAY, MORE)], "handed over"),
    "the end at once": (200, [chunked(SAY)], "handed over"),
    "no usage": (200, [streamed(SAY, MORE, STOP, DONE)], "handed over"),
    "half of its usage": (200, [streamed(SAY, STOP, event(usage={"prompt_tokens": 9}), DONE)], "handed over"),
    "usage by its total": (
        200,
        [streamed(SAY, STOP, event(usage={"prompt_tokens": 9, "total_tokens": 13}), DONE)],
        "short",
    ),
    "thoughts apart": (200, [streamed(SAY, STOP, event(usage=THOUGHT_APART), DONE)], "short"),
    "neither usage nor end in a word": (200, [streamed(SAY, STOP, ends="later")], "handed over"),
    "line ends of another sort": (200, [streamed(*map(crlf, HELLO_EVENTS))], "handed over"),
    "a comment first": (200, [streamed(b": OPENROUTER PROCESSING\n\n", *HELLO_EVENTS)], "handed over"),
    "a mark first": (200, [streamed(b"\xef\xbb\xbf" + SAY, *HELLO_EVENTS[1:])], "handed over"),
    "a blank line first": (200, [streamed(b"\n" + SAY, *HELLO_EVENTS[1:])], "handed over"),
    "another field first": (200, [streamed(b"id: 5\n" + SAY, *HELLO_EVENTS[1:])], "handed over"),
    "no blank": (200, [streamed(SAY.replace(b"data: ", b"data:"), *HELLO_EVENTS[1:])], "handed over"),
    "half an event first": (200, [streamed(SAY[:9], SAY[9:], *HELLO_EVENTS[1:])], "short"),
    "its first in three pieces": (200, [streamed(SAY[:6], SAY[6:-2], SAY[-2:], *HELLO_EVENTS[1:])], "short"),
    "a null for an error first": (200, [streamed(event("x", error=None), *HELLO_EVENTS)], "handed over"),
    "two lines for one event": (
        200,
        [streamed(SAY.replace(b'{"id"', b'{\ndata: "id"'), *HELLO_EVENTS[1:])],
        "handed over",
    ),
    "an error later": (200, [streamed(SAY, MORE, WRONG_EVENT)], "handed over"),
    "an error behind the first": (200, [streamed(SAY + WRONG_EVENT)], "handed over"),
    "an error and the end": (200, [streamed(SAY, MORE + WRONG_EVENT + DONE)], "handed over"),
    "an error without words": (200, [streamed(SAY, b'data: {"error": "no"}\n\n')], "handed over"),
    "no end": (200, [streamed(SAY, MORE, ends="later")], "handed over"),
    "no end but usage": (200, [streamed(SAY, MORE, COUNTED, ends="later")], "handed over"),
    "half an event at the end": (200, [streamed(SAY, MORE, STOP[:20], ends="later")], "handed over"),
    "cut behind the first": (200, [streamed(SAY, ends="never")], "handed over"),
    "cut": (200, [streamed(SAY, MORE, ends="never")], "handed over"),
    "cut in an event": (200, [streamed(SAY, MORE[:9], ends="never")], "handed over"),
    "cut behind its usage": (200, [streamed(SAY, STOP, COUNTED, ends="never")], "handed over"),
    "mumbled": (200, [streamed(SAY, b"\x00\xff<html>\n\n", ends="never")], "handed over"),
    "no chunk at once": (200, [chunked(SAY, end=False) + b"zz\r\n", streamed(*HELLO_EVENTS)], "handed over"),
    "no chunk": (200, [in_two(chunked(SAY, end=False) + b"zz\r\n", -4)], "handed over"),
    "whole and not streamed": (200, [GOOD], "handed over"),
    "whole and not streamed, without usage": (200, [whole(usage=None)], "handed over"),
    "whole and not streamed, and an error inside": (502, [whole(error={"message": "no"})] * 3, "handed over"),
    "whole and not streamed, without choices": (502, [whole(choices=[])] * 3, "handed over"),
    "an error first": (502, [streamed(WRONG_EVENT)] * 3, "handed over"),
    "an error first with its status": (
        429,
        [streamed(b'data: {"error": {"message": "slow", "code": 429}}\n\n')] * 3,
        "handed over",
    ),
    "an error first by its type": (
        400,
        [streamed(b'data: {"error": {"message": "no", "type": "invalid_request_error"}}\n\n')],
        "handed over",
    ),
    "an error by name later": (200, [streamed(SAY, b"event: error\ndata: {}\n\n", DONE)], "handed over"),
    "an error by name first": (502, [streamed(b"event: error\ndata: {}\n\n")] * 3, "handed over"),
    "events of nothing": (
        200,
        [streamed(SAY, b"data:\n\n", MORE, b"event: keepalive\ndata: []\n\n" + STOP, COUNTED, b"data: null\n\n", DONE)],
        "short",
    ),
    "an event of nothing first": (200, [streamed(b"data:\n\n", *HELLO_EVENTS)], "handed over"),
    "events of nothing alone": (502, [streamed(b"data:\n\n", b"data: null\n\n", DONE)] * 3, "handed over"),
    "a field that nobody knows": (200, [streamed(SAY, b"time: 12\n" + MORE, b" \n\n", *HELLO_EVENTS[2:])], "short"),
    "a field first that nobody knows": (200, [streamed(b"time: 12\n" + SAY, *HELLO_EVENTS[1:])], "handed over"),
    "a field in capitals first": (200, [streamed(b"ID: 3\n" + SAY, *HELLO_EVENTS[1:])], "handed over"),
    "fields in capitals": (
        200,
        [streamed(SAY, b"X-Bar: 1\n" + MORE, STOP, b"ID: 3\n" + COUNTED, b"X-Bar: 1\n" + DONE)],
        "short",
    ),
    "empty lines of data": (
        200,
        [streamed(SAY, b"data:\n" + MORE, STOP, b"data:\n" + COUNTED, DONE[:-1] + b"data:\n\n")],
        "short",
    ),
    "no chunk first": (200, [streamed(PING, *HELLO_EVENTS)], "handed over"),
    "no chunk within": (200, [streamed(SAY, PING, *HELLO_EVENTS[1:])], "short"),
    "no chunk at all": (502, [streamed(PING, DONE)] * 3, "handed over"),
    "no chunk, and cut": (200, [streamed(PING, ends="never"), streamed(*HELLO_EVENTS)], "handed over"),
    "an answer of nothing": (502, [streamed(event(""), DONE)] * 3, "handed over"),
    "nothing": (502, [streamed()] * 3, "handed over"),
    "nothing but the end": (502, [streamed(DONE)] * 3, "handed over"),
    "a comment and nothing": (502, [streamed(b": hello\n\n", DONE)] * 3, "handed over"),
    "cut before the first": (200, [streamed(ends="never"), streamed(*HELLO_EVENTS)], "handed over"),
    "cut in the first": (200, [streamed(SAY[:9], ends="never"), streamed(*HELLO_EVENTS)], "handed over"),
    "closed before its head": (200, [None, streamed(*HELLO_EVENTS)], "handed over"),
    "closed again and again": (503, [None, None, None, None], "handed over"),
    "a page": (
        502,
        [with_length(b"<html><body>Please log in</body></html>", "Content-Type: text/html")] * 3,
        "handed over",
    ),
    "500": (503, [refusal(500)] * 3, "handed over"),
    "500 and then good": (200, [refusal(500), streamed(*HELLO_EVENTS)], "handed over"),
    "429 and then good": (200, [refusal(429, "Retry-After: 0.05"), streamed(*HELLO_EVENTS)], "handed over"),
    "400": (400, [refusal(400)], "handed over"),
    "401": (502, [refusal(401)], "handed over"),
    "until it is closed": (200, [then_hang_up(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(HELLO_EVENTS))], "short"),
    "of known length": (200, [with_length(b"".join(HELLO_EVENTS))], "short"),
}


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
async def test_a_stream_or_what_comes_in_its_place_is_handled_as_in_the_line(
    tmp_path: Path, options: dict[str, bool] | None
) -> None:
    async def asks(side: Side) -> None:
        caller = await side.connect()
        for name, (status, _, _) in STREAMS.items():
            await side.meet()
            body = body_of(stream=True, stream_options=options)
            assert (await side.ask(body, caller=caller)).status == status, name
            await side.settled()
            side.note(circuits=side.circuits)

    answers = [answer for _, script, _ in STREAMS.values() for answer in (GOOD, *script)]
    took = [way for _, _, way in STREAMS.values()]

    side = await both(tmp_path, lambda: Upstream(*answers), asks, took=took, extra=PATIENT)

    assert len(side.seen.asked) == len(answers)


@pytest.mark.parametrize(
    "last",
    [
        COUNTED[:-1] + b"id: 7\n\n",
        b"event: message\n" + COUNTED,
        over_lines(COUNTED),
        COUNTED.replace(b'"usage":{', b'"usage":{"cost":NaN,'),
        HALF,
    ],
    ids=["a field behind", "a field before", "lines", "no number", "half a pair"],
)
async def test_a_stream_ends_with_its_usage_however_that_is_written(tmp_path: Path, last: bytes) -> None:
    ask = asking(body_of(stream=True, stream_options={"include_usage": True}), meets=[body_of()])

    side = await both(tmp_path, lambda: Upstream(GOOD, streamed(SAY, STOP, last, DONE)), ask)

    *_, chunk, done = [piece for piece in side.seen.replies[0].body.split(b"\n\n") if piece]
    assert done == b"data: [DONE]"
    said = orjson.loads(chunk.removeprefix(b"data: "))
    assert said["usage"]["completion_tokens"] == 3
    assert said["sekha"]["cost"] > 0
    assert side.seen.replies[0].body.count(b"completion_tokens") == 1


HALVES: dict[str, tuple[dict[str, Any], bool]] = {
    "what went in": ({"prompt_tokens": 9}, False),
    "what came out": ({"completion_tokens": 3}, False),
    "null": ({"prompt_tokens": 9, "completion_tokens": None}, False),
    "a text": ({"prompt_tokens": "9", "completion_tokens": 3, "total_tokens": "12"}, False),
    "nothing in": ({"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}, False),
    "nothing out": ({"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}, False),
    "nothing in by its total": ({"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 12}, True),
    "below nothing": ({"prompt_tokens": 9, "completion_tokens": -3}, False),
    "by its total": ({"prompt_tokens": 9, "total_tokens": 12}, True),
    "null by its total": ({"prompt_tokens": None, "completion_tokens": 3, "total_tokens": 12}, True),
    "a text by its total": ({"prompt_tokens": "9", "completion_tokens": 3, "total_tokens": 12}, True),
    "no whole number by its total": ({"prompt_tokens": 9, "completion_tokens": 3.0, "total_tokens": 12}, True),
}
"""Usage of which half is missing, zero or no number, and whether its total says the rest."""


@pytest.mark.parametrize("where", ["whole", "alone", "with the last choice", "behind all of it"])
async def test_who_is_charged_by_half_of_a_usage_is_shown_all_of_it(tmp_path: Path, where: str) -> None:
    answers: list[Answer | None] = []
    for half, _ in HALVES.values():
        said = event(finish="stop", usage=half) if where == "with the last choice" else STOP + event(usage=half)
        said = COUNTED + said if where == "behind all of it" else said
        answers += [GOOD, whole(usage=half) if where == "whole" else streamed(SAY, said, DONE)]
    body = body_of() if where == "whole" else body_of(stream=True, stream_options={"include_usage": True})

    async def asks(side: Side) -> None:
        for _ in HALVES:
            await side.meet()
            await side.ask(body)
            await side.settled()

    reported = [
        told or (where == "behind all of it" and half.get("completion_tokens") != 0) for half, told in HALVES.values()
    ]
    took: list[Way] = ["short" if each and where != "whole" else "handed over" for each in reported]
    side = await both(tmp_path, lambda: Upstream(*answers), asks, took=took, extra=PATIENT)

    for reply, line, is_reported in zip(side.seen.replies, side.seen.lines[1::2], reported, strict=True):
        said = reply.body if where == "whole" else reply.body.split(b"\n\n")[-3].removeprefix(b"data: ")
        last = orjson.loads(said)
        assert [type(last["usage"][name]) for name in USAGE] == [int] * 3
        assert last["usage"]["prompt_tokens"] == line["input_tokens"]
        assert last["usage"]["completion_tokens"] == line["output_tokens"]
        assert last["usage"]["prompt_tokens"] > 0
        assert last["usage"]["completion_tokens"] > 0
        assert ("usage" not in last["sekha"]) is is_reported


@pytest.mark.parametrize(("wanted", "status"), [(False, 502), (True, 200)])
async def test_usage_that_is_handed_on_begins_a_stream_and_other_does_not(
    tmp_path: Path, wanted: bool, status: int
) -> None:
    ask = asking(body_of(stream=True, stream_options={"include_usage": wanted}), meets=[body_of()])

    side = await both(
        tmp_path, lambda: Upstream(GOOD, streamed(COUNTED, WRONG_EVENT)), ask, took=["handed over"], waits=True
    )

    assert side.seen.replies[0].status == status


@pytest.mark.parametrize("ends", ["at once", "never"])
async def test_words_are_paid_for_that_come_after_the_only_usage(tmp_path: Path, ends: Any) -> None:
    pieces = [event("", usage={"prompt_tokens": 10, "completion_tokens": 0}), event("word " * 400)]
    pieces += [STOP, DONE] if ends == "at once" else []
    ask = asking(body_of(stream=True, max_tokens=500), meets=[body_of()])

    side = await both(tmp_path, lambda: Upstream(GOOD, streamed(*pieces, ends=ends)), ask, took=["handed over"])

    line = side.seen.lines[-1]
    assert line["input_tokens"] == 10
    assert line["output_tokens"] >= 400
    assert line["cost"] == pytest.approx((10 + 2 * line["output_tokens"]) / 1000)


# --- money ---------------------------------------------------------------------------------


def slowly(answer: Answer, seconds: float = 0.1) -> Answer:
    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        if isinstance(answer, bytes):
            writer.write(answer)
        else:
            await answer(reader, writer)

    return answered


PRICED = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    models:
      - model_id: chat
        task: chat_small
        max_output_tokens: 100
        price: {input_per_million: 1000, output_per_million: 2000}
      - {model_id: open, task: chat_smart, price: {input_per_million: 0.3, output_per_million: 0.125}}
      - model_id: cached
        task: chat_smart
        price: {input_per_million: 3, cached_input_per_million: 0.3, output_per_million: 15}
      - {model_id: window, task: chat_smart, context_window: 60, price: {input_per_million: 3, output_per_million: 15}}
      - {model_id: free, task: chat_smart, price: {input_per_million: 0, output_per_million: 0}}
      - {model_id: gpt-4o-mini, task: chat_smart}
      - model_id: claude-sonnet-4-5
        task: chat_smart
        max_output_tokens: 50
        price: {input_per_million: 3, output_per_million: 15}
"""
NAMES = ("chat", "open", "cached", "window", "free", "gpt-4o-mini", "claude-sonnet-4-5")
LIMITS: dict[str, str] = {
    "no budget": "",
    "budgets": "budgets: [{name: all, limit: 1000}, {name: little, limit: 5, period: day}]",
    "what a request may cost": "routing: {max_cost_per_request: 0.15}",
    "hardly anything": "routing: {max_cost_per_request: 0.0001}\nbudgets: [{name: all, limit: 1000}]",
    "both": "routing: {max_cost_per_request: 0.1234567890123}\nbudgets: [{name: all, limit: 0.5, period: total}]",
    "a budget of its own": (
        "budgets: [{name: one, limit: 0.7, match: {model: chat}}, {name: other, limit: 9, match: {model: open}}]"
    ),
}


@pytest.mark.parametrize(("limit", "history"), [*((limit, None) for limit in LIMITS), ("no budget", 7), ("both", 7)])
async def test_what_it_may_cost_and_how_long_it_may_be_is_as_in_the_line(
    tmp_path: Path, limit: str, history: int | None
) -> None:
    """Whatever is asked of whichever model, until money runs out here and there."""
    bodies = [
        body_of("word " * words, model=name, **fields)
        for name in NAMES
        for words in (1, 30)
        for fields in ({}, {"max_tokens": 5}, {"max_completion_tokens": 60}, {"max_tokens": 500_000})
    ]

    async def asks(side: Side) -> None:
        await side.meet(*(body_of(model=name, max_tokens=1) for name in NAMES), statuses=(200, 402))
        caller = await side.connect()
        for body in bodies:
            await side.ask(body, caller=caller)

    side = await both(tmp_path, lambda: Upstream(GOOD), asks, took=None, config=PRICED + LIMITS[limit], history=history)

    assert side.went.count("short") >= len(bodies) // 4
    assert {reply.status for reply in side.seen.replies} <= {200, 400, 402, 503}


async def test_what_is_spent_and_held_is_so_in_every_budget_that_covers_it(tmp_path: Path) -> None:
    key = new_key()
    money = f"""
    keys: [{{name: team, hash: "{hash_of(key)}"}}, {{name: other, hash: "{hash_of(new_key())}"}}]
    budgets:
      - {{name: all, limit: 1000}}
      - {{name: hour, limit: 1000, period: hour}}
      - {{name: provider, limit: 1000, match: {{provider: first}}}}
      - {{name: model, limit: 1000, match: {{model: chat}}}}
      - {{name: task, limit: 1000, match: {{task: chat_small}}}}
      - {{name: key, limit: 1000, match: {{key: team}}}}
      - {{name: all of it, limit: 1000, match: {{provider: first, model: chat, task: chat_small, key: team}}}}
      - {{name: another task, limit: 1000, match: {{task: chat_smart}}}}
      - {{name: another model, limit: 1000, match: {{model: open}}}}
      - {{name: another key, limit: 1000, match: {{key: other}}}}
      - {{name: a tag, limit: 1000, match: {{tag: "team:search"}}}}
    """
    authorized = [f"authorization: Bearer {key}"]

    async def asks(side: Side) -> None:
        await side.meet(headers=authorized)
        for stream in (False, True):
            asking_it = asyncio.create_task(side.ask(body_of(stream=stream), headers=authorized))
            await asyncio.sleep(0.05)
            side.note(held=await side.held())
            await asking_it

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD, slowly(GOOD), slowly(streamed(*HELLO_EVENTS))),
        asks,
        took=["short"] * 2,
        config=PRICED + textwrap.dedent(money),
    )

    held = dict(side.notes)["held"]
    covering = {"all", "hour", "provider", "model", "task", "key", "all of it"}
    assert {name for name, amount in held.items() if amount} == covering
    assert len({held[name] for name in covering}) == 1
    assert {name for name, amount in side.seen.budgets.items() if amount} == covering


@pytest.mark.parametrize("behind", [0, 1])
async def test_a_nearly_spent_budget_is_never_passed_however_many_ask_at_once(tmp_path: Path, behind: int) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 45}  # half of what there may be
    limit, most = Decimal("0.1") * 200, Decimal(0)

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        good = (
            streamed(SAY, STOP, event(usage=usage), DONE) if b"stream" in upstream.requests[-1] else whole(usage=usage)
        )
        await slowly(good, 0.01)(reader, writer)

    async def ask(side: Side, *, stream: bool) -> list[int]:
        caller, statuses = await side.connect(), []
        for _ in range(3):
            caller.send(body_of(stream=stream) if stream else body_of())
            statuses.append((await caller.reply()).status)
            await asyncio.sleep(random.random() / 50)
        caller.leave()
        return statuses

    async def watch(side: Side) -> None:
        nonlocal most
        while True:
            most = max(most, (await side.held())["small"] + (await side.spent())["small"])
            await asyncio.sleep(0.01)

    budgets = [f"{{name: small, limit: {limit}, period: total}}"]
    async with (
        Upstream(GOOD, answered) as upstream,
        opened(tmp_path, upstream, config=config_for(upstream, *[upstream] * behind, budgets=budgets)) as side,
    ):
        await side.meet()
        watching = asyncio.create_task(watch(side))
        asked = await asyncio.gather(*(ask(side, stream=at % 2 > 0) for at in range(200)))
        watching.cancel()
    statuses = [status for each in asked for status in each]

    assert set(statuses) == {200, 402}
    # Of two the dearer is held.
    assert statuses.count(200) == len(upstream.requests) - 1 > (100 if behind else 150)
    assert side.went.count("line") <= len(statuses) - 20  # the others went the short way
    assert limit * Decimal("0.9") < most <= limit
    assert side.seen.budgets["small"] <= limit
    assert side.seen.held["small"] == 0


# --- keys and limits -----------------------------------------------------------------------


async def test_a_key_may_do_what_it_may_do_in_the_line(tmp_path: Path) -> None:
    anything, small, other, stranger = new_key(), new_key(), new_key(), new_key()
    keys = f"""
    keys:
      - {{name: anything, hash: "{hash_of(anything)}"}}
      - {{name: small, hash: "{hash_of(small)}", tasks: [chat_small]}}
      - {{name: other, hash: "{hash_of(other)}", models: [open, first/free]}}
    """
    headers = {
        "anything": [f"authorization: Bearer {anything}"],
        "spelt": [f"Authorization: bearer  {anything} "],
        "small": [f"authorization: Bearer {small}"],
        "other": [f"authorization: Bearer {other}"],
        "stranger": [f"authorization: Bearer {stranger}"],
        "basic": ["authorization: Basic eDp5"],
        "nobody": [],
    }
    statuses: dict[tuple[str, str], int] = {}

    async def asks(side: Side) -> None:
        await side.meet(*(body_of(model=name) for name in NAMES), headers=headers["anything"])
        for _ in range(2):
            for who, header in headers.items():
                for name in ("chat", "first/open", "free", "chat_small", "nobody's"):
                    reply = await side.ask(body_of(model=name), headers=header)
                    statuses[who, name] = reply.status

    side = await both(tmp_path, lambda: Upstream(GOOD), asks, took=None, config=PRICED + textwrap.dedent(keys))

    assert {who for (who, _), status in statuses.items() if status == 401} == {"stranger", "basic", "nobody"}
    assert {asked for asked, status in statuses.items() if status == 403} == {
        ("small", "first/open"),
        ("small", "free"),
        ("other", "chat"),
        ("other", "chat_small"),
    }
    assert side.went.count("short") >= 10


@pytest.mark.parametrize(
    ("limits", "passing"),
    [("requests_per_minute: 5", 5), ("tokens_per_minute: 70", 4), ("requests_per_minute: 6, tokens_per_minute: 20", 0)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_keys_limits_are_reached_with_the_same_request(
    tmp_path: Path, limits: str, passing: int, stream: bool
) -> None:
    key, other = new_key(), new_key()
    keys = f'keys: [{{name: k, hash: "{hash_of(key)}", {limits}}}, {{name: other, hash: "{hash_of(other)}"}}]'
    bodies = [body_of(), b"{", body_of(model="nobody"), *[body_of(stream=stream)] * 6, body_of("long " * 200)]

    async def asks(side: Side) -> None:
        await side.meet(headers=[f"authorization: Bearer {other}"])
        for body in bodies:
            await side.ask(body, headers=[f"authorization: Bearer {key}"])
        await side.ask(body_of(stream=stream), headers=[f"authorization: Bearer {other}"])

    def makes() -> Upstream:
        return Upstream(GOOD, GOOD, streamed(*HELLO_EVENTS)) if stream else Upstream(GOOD)

    side = await both(tmp_path, makes, asks, took=None, config=PRICED + keys, waits=True)

    assert 429 in {reply.status for reply in side.seen.replies}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limits", ["requests_per_minute: 4", "tokens_per_minute: 450", "tokens_per_minute: 50"])
async def test_a_providers_limits_are_reached_with_the_same_request(tmp_path: Path, limits: str, stream: bool) -> None:
    config = f"""
    providers:
      - id: first
        provider_type: openai
        base_url: URL
        limits: {{{limits}}}
        models: [{{model_id: chat, task: chat_small, max_output_tokens: 100, price: {{input_per_million: 1}}}}]
    """
    said = ["Hi", *["word " * 20] * 4, "word " * 450, "Hi", *["a " * 99] * 3]
    bodies = [body_of(text, stream=stream) for text in said]

    def makes() -> Upstream:
        return Upstream(GOOD, streamed(*HELLO_EVENTS)) if stream else Upstream(GOOD)

    side = await both(tmp_path, makes, asking(*bodies), took=None, config=config, waits=True)

    statuses = {reply.status for reply in side.seen.replies}
    assert 200 in statuses
    assert statuses <= {200, 429, 503}
    assert len(statuses) > 1
    assert "short" in side.went


LENGTHY = event("word " * 3_000)
ENDS: dict[str, Answer] = {
    "whole": streamed(LENGTHY, event(finish="stop"), event(usage={"prompt_tokens": 9, "completion_tokens": 3_000})),
    "broken off": streamed(LENGTHY, ends="never"),
}


@pytest.mark.parametrize("end", [*ENDS, "left"])
@pytest.mark.parametrize("whose", ["provider", "key"])
async def test_a_stream_counts_by_what_it_used_however_it_ended(tmp_path: Path, whose: str, end: str) -> None:
    """Nobody limits the reply, and it is six times as long as a usual one."""
    key, limit = new_key(), "tokens_per_minute: 5000"
    headers = [f"authorization: Bearer {key}"]
    config = f"""
    keys: [{{name: k, hash: "{hash_of(key)}"{f", {limit}" if whose == "key" else ""}}}]
    providers:
      - id: first
        provider_type: openai
        base_url: URL
        limits: {{{limit if whose == "provider" else ""}}}
        models: [{{model_id: chat, task: chat_small, max_output_tokens: 9000, price: {{input_per_million: 1}}}}]
    """
    body = body_of(stream=True)

    async def asks(side: Side) -> None:
        await side.meet(headers=headers)
        for _ in range(2):
            caller = await side.connect()
            if end != "left":
                await side.ask(body, caller=caller, headers=headers)
            else:
                caller.send(body, side.way, headers=headers)
                await caller.reader.readuntil(b"word word")
                caller.leave()
            await side.settled()
        await side.ask(body, headers=headers)

    def makes() -> Upstream:
        return Upstream(GOOD, ENDS.get(end) or then_hang(LENGTHY))

    side = await both(tmp_path, makes, asks, took=None, config=config, waits=True)

    assert side.seen.replies[-1].status == 429
    assert len(side.seen.asked) == 3


# --- who waits, and who leaves -------------------------------------------------------------


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say nothing more until the other side has left."""
    await reader.read()
    raise ConnectionResetError


def then_hang(*pieces: bytes) -> Answer:
    """Begin a stream, and fall silent."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(*pieces, end=False))
        await hang(reader, writer)

    return answered


async def a_head_and_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GOOD[:-20])
    await hang(reader, writer)


LATE: dict[str, tuple[bool, int, list[Answer]]] = {
    "no answer": (False, 504, [hang, hang, hang]),
    "no answer, and then one": (False, 200, [hang, GOOD]),
    "half an answer, and then one": (False, 200, [a_head_and_half, GOOD]),
    "no stream": (True, 504, [hang, hang, hang]),
    "no stream, and then one": (True, 200, [hang, streamed(*HELLO_EVENTS)]),
    "a head, and then a stream": (True, 200, [then_hang(), streamed(*HELLO_EVENTS)]),
    "the first event alone": (True, 200, [then_hang(SAY)]),
    "all but the end": (True, 200, [then_hang(SAY, STOP, COUNTED)]),
    "each event in time": (True, 200, [streamed(*HELLO_EVENTS, seconds=0.1)]),
    "each event in time, behind a blank line": (True, 200, [streamed(b"\n\n", *HELLO_EVENTS, seconds=0.1)]),
    "each event in time, behind half a blank line": (True, 200, [streamed(b"\n", *HELLO_EVENTS, seconds=0.1)]),
    "each event in time, behind one of another sort": (True, 200, [streamed(b"\r\n", *HELLO_EVENTS, seconds=0.1)]),
}


@pytest.mark.parametrize("late", LATE)
async def test_who_is_late_is_given_up_and_paid_for_as_in_the_line(tmp_path: Path, late: str) -> None:
    stream, status, answers = LATE[late]

    async def asks(side: Side) -> None:
        await side.meet()
        began = asyncio.get_running_loop().time()
        assert (await side.ask(body_of(stream=stream))).status == status
        took = asyncio.get_running_loop().time() - began
        assert 0.25 <= took < 3
        await side.settled()
        side.note(spent=await side.spent(), held=await side.held(), left=len(side.upstream.requests))

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD, *answers),
        asks,
        took=["short" if late == "each event in time" else "handed over"],
        timeout_secs=0.3,
        extra=PATIENT,
    )

    assert side.notes[1] == ("held", {"all": 0})


async def test_a_connection_that_is_lost_late_is_not_taken_for_a_stale_one(tmp_path: Path) -> None:
    async def later(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        writer.close()

    side = await both(tmp_path, lambda: Upstream(GOOD, later, GOOD), asking(body_of()), took=["handed over"])

    assert side.seen.replies[0].json()["sekha"]["attempts"] == 2


async def test_a_connection_that_was_seen_to_close_is_not_used_again(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        await asyncio.sleep(0.05)
        await side.ask(body_of())

    await both(tmp_path, lambda: Upstream(then_hang_up(GOOD), GOOD), asks, took=["line"])


LEFT: dict[str, tuple[bool, Answer, bool]] = {
    "before an answer": (False, hang, False),
    "in the middle of an answer": (False, a_head_and_half, False),
    "before a stream": (True, hang, False),
    "behind the head of a stream": (True, then_hang(), False),
    "behind a comment": (True, then_hang(b": wait\n\n"), False),
    "behind the first event": (True, then_hang(SAY), True),
    "behind the usage": (True, then_hang(SAY, MORE, STOP, COUNTED), True),
}


@pytest.mark.parametrize(
    ("when", "how"),
    [
        *((when, "closes") for when in LEFT),
        *(("before an answer", how) for how in ("half", "resets")),
        *(("behind the first event", how) for how in ("half", "resets")),
    ],
)
async def test_who_leaves_ends_the_call_and_pays_for_it_as_in_the_line(tmp_path: Path, when: str, how: str) -> None:
    stream, answer, begins = LEFT[when]

    async def asks(side: Side) -> None:
        upstream = side.upstream
        assert isinstance(upstream, Upstream)
        await side.meet()
        upstream.arrived.clear()
        caller = await side.connect()
        caller.send(body_of(stream=stream), side.way)
        await upstream.arrived.wait()
        if begins:
            await caller.reader.readuntil(b"Hel")
        await asyncio.sleep(0.03)
        if how == "closes":
            caller.leave()
        elif how == "half":
            caller.writer.write_eof()
        else:
            caller.writer.transport.abort()
        async with asyncio.timeout(2):
            await upstream.closed.wait()
            await side.settled()
        side.note(held=await side.held())
        await side.ask(body_of())

    side = await both(tmp_path, lambda: Upstream(GOOD, answer, GOOD), asks, took=None)

    assert side.went == ["handed over", "line"]
    assert side.notes == [("held", {"all": 0})]
    assert [line["status"] for line in side.seen.lines] == [200, 499, 200]
    left = side.seen.runs[1]
    assert (left.outcome, [attempt.error for attempt in left.attempts]) == ("cancelled", ["cancelled"])
    assert left.attempts[0].seconds >= 0.03
    assert "| cancelled |" in (receipt(left) or "")
    calls = 'sekha_provider_calls_total{provider="first",model="chat",outcome="%s"}'
    assert (side.seen.counts[calls % "cancelled"], side.seen.counts[calls % "answered"]) == (1, 2)
    if not begins:  # nobody knows what it came to
        assert side.seen.budgets["all"] > Decimal("0.2")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_failed_before_a_caller_left_is_counted_and_on_the_record(tmp_path: Path, stream: bool) -> None:
    async def asks(side: Side) -> None:
        upstream = side.upstream
        assert isinstance(upstream, Upstream)
        await side.meet()
        caller = await side.connect()
        caller.send(body_of(stream=stream), side.way)
        await wait_until(lambda: side.serving.resources.pauses.wait("first/chat"))
        caller.leave()
        await side.settled()

    limited = b"HTTP/1.1 429 Too Many\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"
    side = await both(tmp_path, lambda: Upstream(GOOD, limited), asks, took=None)

    left = side.seen.runs[1]
    assert (left.outcome, [attempt.error for attempt in left.attempts]) == ("cancelled", ["rate_limited"])
    assert "| rate_limited |" in (receipt(left) or "")
    assert side.seen.counts['sekha_provider_calls_total{provider="first",model="chat",outcome="rate_limited"}'] == 1


async def test_who_leaves_before_all_is_asked_asks_for_nothing(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        caller = await side.connect()
        caller.send(body_of(), side.way)
        await caller.reply()
        caller.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n" + body_of()[:40]
        )
        await asyncio.sleep(0.03)
        caller.leave()
        await asyncio.sleep(0.03)
        await side.ask(body_of())

    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream) as side:
        await asks(side)

    assert len(upstream.requests) == 3
    assert side.went == ["short"]
    assert "sekha_requests_under_way" not in side.seen.counts


async def slow_reader(side: Side) -> Caller:
    """A connection whose other end takes in little before somebody reads there."""
    receiving = socket.socket()
    receiving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    receiving.setblocking(False)
    await asyncio.get_running_loop().sock_connect(receiving, ("127.0.0.1", side.port))
    return Caller(*await asyncio.open_connection(sock=receiving, limit=2**16))


LONG = [event(f"{at:04}" + " word" * 4_000) for at in range(400)]


async def test_a_reader_who_is_slow_loses_nothing_of_a_stream_and_holds_it_up(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        caller = await slow_reader(side)
        caller.send(body_of(stream=True), side.way)
        await wait_until(lambda: side.went, seconds=10)
        went = [*side.went]
        side.seen.replies.append(await caller.reply())
        caller.leave()
        assert went == (["line"] if side.way == "line" else ["handed over"])

    def makes() -> Upstream:
        return Upstream(GOOD, streamed(*LONG, STOP, COUNTED, DONE, seconds=0.0001))

    side = await both(tmp_path, makes, asks, took=["handed over"])

    said = re.findall(rb'"content":"(\d+) ', side.seen.replies[0].body)
    assert list(map(int, said)) == list(range(400))
    assert side.seen.replies[0].body.endswith(b"data: [DONE]\n\n")


async def test_a_reader_who_is_slow_and_leaves_pays_for_what_had_come(tmp_path: Path) -> None:
    answer = streamed(*LONG, STOP, COUNTED, DONE, seconds=0.0001)

    async with Upstream(GOOD, answer) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        caller = await slow_reader(side)
        caller.send(body_of(stream=True))
        await wait_until(lambda: side.went, seconds=10)
        caller.writer.transport.abort()

    assert side.went == ["handed over"]
    assert [run.outcome for run in side.seen.runs] == ["answered", "cancelled"]
    assert side.seen.held == {"all": 0}
    # Far more than the 100 tokens that were held for it.
    assert side.seen.budgets["all"] > 1


async def test_how_long_a_stream_took_to_begin_is_known_though_the_line_counts_its_end(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        await side.ask(body_of(stream=True))
        side.note(slower=side.serving.resources.latencies.seconds()["first/chat"] > 0.05)

    # Longer than what is known of it is kept.
    late = slowly(streamed(SAY, STOP, DONE), 1.1)

    await both(tmp_path, lambda: Upstream(GOOD, late), asks, took=["handed over"])


async def test_no_more_than_one_answer_waits_for_a_caller_who_does_not_read(tmp_path: Path) -> None:
    asked: dict[str, int] = {}

    for way in ("short", "line"):
        async with Upstream(GOOD, whole("x" * 1_000_000)) as upstream, opened(tmp_path / way, upstream, way) as side:
            await side.meet()
            caller = await side.connect()
            caller.writer.transport.pause_reading()
            for _ in range(20):
                caller.send(body_of(), side.way)
                await asyncio.sleep(0.02)
            asked[way] = len(upstream.requests)
            caller.writer.transport.abort()

    assert asked["short"] <= asked["line"] + 1


async def test_whoever_leaves_at_whatever_moment_leaves_nothing_behind(tmp_path: Path) -> None:
    some = random.Random(1)

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = b"stream" in upstream.requests[-1]
        good = streamed(*HELLO_EVENTS, seconds=0.001) if stream else GOOD
        await slowly(good, some.random() / 100)(reader, writer)

    async def ask_and_leave(side: Side) -> None:
        for _ in range(10):
            caller = await side.connect()
            caller.send(body_of(stream=True) if some.random() < 0.5 else body_of())
            await asyncio.sleep(some.random() / 20)
            caller.writer.transport.abort() if some.random() < 0.5 else caller.leave()

    async with Upstream(GOOD, answered) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        await asyncio.gather(*(ask_and_leave(side) for _ in range(8)))
        await side.settled()
        await asyncio.sleep(0.05)

    calls = next(line for line in side.seen.spent if line[0] == "model")[2]
    statuses = [line["status"] for line in side.seen.lines]
    assert side.seen.held == {"all": 0}
    assert set(statuses) == {200, 499}
    # Some left before anybody was asked.
    assert statuses.count(200) <= calls <= len(statuses)
    assert len(side.seen.runs) == len(statuses)


# --- an embedding --------------------------------------------------------------------------


def vectors(*rows: object, usage: object = None, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(rows)]
    said = {
        "object": "list",
        "data": data,
        "model": "vectors",
        "usage": usage or {"prompt_tokens": 5, "total_tokens": 5},
    }
    return with_length(orjson.dumps(said | more), JSON)


def texts(given: object = "Hello there.", **fields: Any) -> bytes:
    return orjson.dumps({"model": "vectors", "input": given, **fields})


ROW = [0.5, -1, 2e-3, 0, 1, 1, 1, 1]
PACKED = base64.b64encode(struct.pack("<8f", *ROW)).decode()
EMBEDDINGS: dict[str, tuple[bytes, int, list[Answer | None], Way]] = {
    "one": (texts(), 200, [vectors(ROW)], "short"),
    "one in a list": (texts(["Hi"]), 200, [vectors(ROW)], "short"),
    "several": (texts(["a", "b", SPECIAL]), 200, [vectors(ROW, ROW, ROW)], "short"),
    "packed": (texts(encoding_format="base64"), 200, [vectors(PACKED)], "short"),
    "float": (texts(encoding_format="float", user="me"), 200, [vectors(ROW)], "short"),
    "nulls": (texts(encoding_format=None, dimensions=None, user=None), 200, [vectors(ROW)], "short"),
    "spelt": (texts(model="first/vectors"), 200, [vectors(ROW)], "line"),
    "of another length": (texts(dimensions=4), 200, [vectors(ROW[:4])], "short"),
    "in chunks": (texts(), 200, [chunked(vectors(ROW).partition(b"\r\n\r\n")[2])], "short"),
    "another length than was asked for": (texts(dimensions=4), 502, [vectors(ROW)], "handed over"),
    "too few": (texts(["a", "b"]), 502, [vectors(ROW)] * 3, "handed over"),
    "no number among the numbers": (texts(), 502, [vectors([*ROW[:7], math.nan])] * 3, "handed over"),
    "a page": (texts(), 502, [with_length(b"<html>", "Content-Type: text/html")] * 3, "handed over"),
    "an error inside": (texts(), 502, [vectors(ROW, error={"message": "no"})] * 3, "handed over"),
    "500": (texts(), 503, [refusal(500)] * 3, "handed over"),
    "429": (texts(), 429, [refusal(429)] * 3, "handed over"),
    "400": (texts(), 400, [refusal(400)], "handed over"),
    "no usage": (texts(), 200, [vectors(ROW, usage={"prompt_tokens": 0})], "handed over"),
    "500 and then good": (texts(), 200, [refusal(500), vectors(ROW)], "handed over"),
    "closed": (texts(), 200, [None, vectors(ROW)], "handed over"),
    "cut": (texts(), 200, [then_hang_up(vectors(ROW)[:-9]), vectors(ROW)], "handed over"),
    "tokens": (texts([1, 2, 3]), 200, [vectors(ROW)], "line"),
    "tokens of several": (texts([[1], [2, 3]]), 200, [vectors(ROW, ROW)], "line"),
    "too long to be counted at once": (texts("word " * 5_000), 200, [vectors(ROW)], "line"),
    "what nobody knows": (texts(frobnicate=1), 200, [vectors(ROW)], "line"),
    "tags": (texts(metadata={"a": "b"}), 200, [vectors(ROW)], "line"),
    "nothing": (texts(""), 400, [], "line"),
    "blank": (texts(" "), 200, [vectors(ROW)], "short"),
    "blank among others": (texts(["a", "\n"]), 200, [vectors(ROW, ROW)], "short"),
    "nothing among others": (texts(["a", ""]), 400, [], "line"),
    "no texts": (texts([]), 400, [], "line"),
    "mixed": (texts(["a", 5]), 400, [], "line"),
    "null": (texts(None), 400, [], "line"),
    "another format": (texts(encoding_format="int8"), 400, [], "line"),
    "no length": (texts(dimensions=0), 400, [], "line"),
    "a length in words": (texts(dimensions="8"), 400, [], "line"),
    "a model that chats": (texts(model="chat"), 400, [], "line"),
    "who is not there": (texts(model="nobody"), 404, [], "line"),
}


async def test_an_embedding_is_asked_for_and_answered_as_in_the_line(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        for name, (body, status, _, _) in EMBEDDINGS.items():
            await side.meet(texts(), path=EMBED)
            assert (await side.ask(body, path=EMBED)).status == status, name
            await side.settled()
            side.note(circuits=side.circuits)

    answers = [answer for _, _, script, _ in EMBEDDINGS.values() for answer in (vectors(ROW), *script)]
    took = [way for _, _, _, way in EMBEDDINGS.values()]

    side = await both(tmp_path, lambda: Upstream(*answers), asks, took=took, extra=PATIENT)

    assert len(side.seen.asked) == len(answers)


# --- another configuration, and the end ----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_that_began_before_a_reload_ends_as_it_began(tmp_path: Path, stream: bool) -> None:
    async def asks(side: Side) -> None:
        assert isinstance(side.upstream, Upstream)
        await side.meet()
        side.upstream.arrived.clear()
        asking_it = asyncio.create_task(side.ask(body_of(stream=stream)))
        await side.upstream.arrived.wait()
        before, other = side.serving, config_for(side.upstream, dear=5000, extra="routing: {max_cost_per_request: 2}")
        replacing = asyncio.create_task(side.gateway.replace(await side.load(other)))
        await asyncio.sleep(0.05)
        side.note(under_way=before.under_way, replaced=replacing.done())
        await asking_it
        await asyncio.wait_for(replacing, 5)
        side.note(under_way=before.under_way)
        await side.meet()
        await side.ask(body_of())

    def makes() -> Upstream:
        return Upstream(GOOD, slowly(streamed(*HELLO_EVENTS) if stream else GOOD, 0.4), GOOD)

    side = await both(tmp_path, makes, asks, took=["short", "short"])

    assert side.notes == [("under_way", 1), ("replaced", False), ("under_way", 0)]
    costs = [float(reply.body.partition(b'"cost":')[2].partition(b",")[0]) for reply in side.seen.replies]
    assert costs == [0.013, 0.065]


@asynccontextmanager
async def ending(side: Side, drain_seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Another server of the gateway, which takes its place, and what tells it to end. Ends when it has."""
    bound = bind("127.0.0.1", 0)
    server = Server(side.gateway, bound, drain_seconds=drain_seconds)
    running = asyncio.create_task(server.run())
    side.port = bound.getsockname()[1]
    yield server.stop
    await asyncio.wait_for(running, 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_under_way_when_a_gateway_is_told_to_end_is_answered_and_the_last(
    tmp_path: Path, stream: bool
) -> None:
    async def asks(side: Side) -> None:
        assert isinstance(side.upstream, Upstream)
        await side.meet()
        async with ending(side, 5) as stop:
            side.upstream.arrived.clear()
            asking_it = asyncio.create_task(side.ask(body_of(stream=stream)))
            await side.upstream.arrived.wait()
            stop()
            await asking_it

    def makes() -> Upstream:
        return Upstream(GOOD, slowly(streamed(*HELLO_EVENTS) if stream else GOOD, 0.2))

    side = await both(tmp_path, makes, asks)

    assert side.seen.replies[0].status == 200
    assert side.seen.replies[0].named["connection"] == "close"


@pytest.mark.parametrize(("stream", "answer"), [(False, hang), (True, hang), (True, then_hang(SAY))])
async def test_what_takes_too_long_at_the_end_is_cut_and_paid_for(tmp_path: Path, stream: bool, answer: Answer) -> None:
    async def asks(side: Side) -> None:
        assert isinstance(side.upstream, Upstream)
        await side.meet()
        async with ending(side, 0.2) as stop:
            side.upstream.arrived.clear()
            caller = await side.connect()
            caller.send(body_of(stream=stream), side.way)
            await side.upstream.arrived.wait()
            await asyncio.sleep(0.05)
            stop()
            cut = await caller.reader.read()
            assert b"[DONE]" not in cut

    side = await both(tmp_path, lambda: Upstream(GOOD, answer), asks, took=["handed over"])

    assert [run.outcome for run in side.seen.runs] == ["answered", "cancelled"]


@pytest.mark.parametrize("answer", ["whole", "begun stream"])
async def test_what_was_under_way_in_a_process_that_was_killed_is_charged_at_its_worst_case(
    tmp_path: Path, answer: str
) -> None:
    script = [sys.executable, "-m", "tests.fixtures.short_way", str(tmp_path)]
    async with Upstream(GOOD, GOOD, then_hang(SAY) if answer == "begun stream" else hang) as upstream:
        process = await asyncio.create_subprocess_exec(
            *script, upstream.openai_url, cwd=Path(__file__).parents[3], stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = int(await process.stdout.readline())
        caller = Caller(*await asyncio.open_connection("127.0.0.1", port))
        for way in ("line", "short"):
            caller.send(body_of(), way)
            assert (await caller.reply()).status == 200
        upstream.arrived.clear()
        caller.send(body_of(stream=answer != "whole"))
        await upstream.arrived.wait()
        if answer == "begun stream":
            await caller.reader.readuntil(b"Hel")

        process.kill()
        told = (await process.stdout.read()).split()
        await process.wait()
        caller.leave()

    assert told == [b"line"]  # the first alone
    survivor = open_leased(f"sqlite:///{tmp_path}/.sekha/ledger.db", tmp_path / ".sekha/gateway/journal")
    try:
        spent, held = await survivor.spent(Budget(name="all", limit=Decimal(1000)), at=datetime.now(UTC))
        recovered = {line.group: (line.calls, line.cost) for line in await survivor.report("model")}
    finally:
        await survivor.aclose()
    # Two that were answered, and a worst case: 8 words count as 10, and 100 tokens may come back.
    assert (spent, held) == (2 * Decimal("0.013") + Decimal("0.21") + Decimal("0.003"), 0)
    assert recovered == {"chat": (3, spent)}


async def test_what_was_under_way_in_a_process_that_was_killed_is_charged_by_the_next_though_nobody_asks_it_anything(
    tmp_path: Path,
) -> None:
    script = [sys.executable, "-m", "tests.fixtures.short_way", str(tmp_path)]
    async with Upstream(hang) as upstream:
        process = await asyncio.create_subprocess_exec(
            *script, upstream.openai_url, cwd=Path(__file__).parents[3], stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = int(await process.stdout.readline())
        caller = Caller(*await asyncio.open_connection("127.0.0.1", port))
        caller.send(body_of())
        await upstream.arrived.wait()
        process.kill()
        await process.wait()
        caller.leave()

        async with opened(tmp_path, upstream) as side:
            ledger = open_ledger(f"sqlite:///{tmp_path}/.sekha/ledger.db")

            async def is_charged() -> bool:
                spent, held = await ledger.spent(side.serving.resources.budgets[0], at=datetime.now(UTC))
                return held == 0 and spent == Decimal("0.213")

            await wait_until(is_charged, seconds=20)
            await ledger.aclose()


# --- what must be on record ----------------------------------------------------------------


@pytest.mark.parametrize(("left", "down"), [("nothing", False), ("nothing", True), ("a hold", False)])
@pytest.mark.parametrize("stream", [False, True])
async def test_without_room_for_its_journal_nothing_is_answered_that_is_not_on_record(
    tmp_path: Path, left: Literal["nothing", "a hold"], down: bool, stream: bool
) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        await side.ask(body_of())
        size = fill_journal(side, left=left)
        with room_for(0 if down else size):
            await side.ask(body_of(stream=stream))
            await asyncio.sleep(0.1)  # nor can the spool be written, if that is down
        await side.ask(body_of())

    def makes() -> Upstream:
        return Upstream(GOOD, GOOD, streamed(*HELLO_EVENTS) if stream and left == "a hold" else GOOD, GOOD)

    side = await both(tmp_path, makes, asks, took=None)

    assert side.went[1] == ("line" if left == "nothing" else "handed over")
    assert [reply.status for reply in side.seen.replies] == [200, 503 if left == "nothing" else 200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_waits_until_it_is_on_record(tmp_path: Path, stream: bool) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        await side.ask(body_of())
        with (
            room_for(fill_journal(side, left="a hold")),
            closing(sqlite3.connect(side.folder / ".sekha/ledger.db", isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            asking_it = asyncio.create_task(side.ask(body_of(stream=stream)))
            await asyncio.sleep(0.4)
            side.note(answered=asking_it.done())
            other.execute("ROLLBACK")
            await asking_it
            side.note(calls=other.execute("SELECT COUNT(*) FROM ledger_spends").fetchall())

    def makes() -> Upstream:
        return Upstream(GOOD, GOOD, streamed(*HELLO_EVENTS) if stream else GOOD)

    side = await both(tmp_path, makes, asks, took=None)

    assert dict(side.notes)["answered"] is False


@pytest.mark.parametrize("stream", [False, True])
async def test_what_can_neither_be_written_nor_recorded_is_told_as_in_the_line(tmp_path: Path, stream: bool) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        await side.ask(body_of())
        await asyncio.sleep(0.1)  # both are in the spool
        fill_journal(side, left="a hold")
        with room_for(0):
            await side.ask(body_of(stream=stream))
            await asyncio.sleep(0.1)

    def makes() -> Upstream:
        return Upstream(GOOD, GOOD, streamed(*HELLO_EVENTS) if stream else GOOD)

    await both(tmp_path, makes, asks, took=["short", "handed over"])


async def test_a_stream_that_can_be_recorded_nowhere_does_not_keep_its_providers_connection(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        upstream = side.upstream
        assert isinstance(upstream, Upstream)
        await side.meet()
        await side.ask(body_of())
        await asyncio.sleep(0.1)  # both are in the spool
        fill_journal(side, left="a hold")
        with room_for(0):
            await side.ask(body_of(stream=True))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            await upstream.closed.wait()

    await both(tmp_path, lambda: Upstream(GOOD, GOOD, then_hang(*HELLO_EVENTS)), asks, took=["short", "handed over"])


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_chat_made_is_freed_with_its_last_reference(tmp_path: Path, stream: bool) -> None:
    async with (
        Upstream(GOOD, streamed(*HELLO_EVENTS) if stream else GOOD) as upstream,
        opened(tmp_path, upstream) as side,
    ):
        await side.meet()
        caller = await side.connect()
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await side.ask(body_of(stream=stream), caller=caller)
            await asyncio.sleep(0.05)
            left = sum(isinstance(each, Shortened) for each in gc.get_objects())
        finally:
            gc.enable()

    assert side.went == ["short"] * 10
    assert left <= 1  # the last


# --- on one connection ---------------------------------------------------------------------


async def test_requests_sent_at_once_are_answered_in_turn(tmp_path: Path) -> None:
    """The first goes the short way; those behind it wait, and go the long one."""

    async def asks(side: Side) -> None:
        await side.meet()
        caller = await side.connect()
        for at in range(5):
            caller.send(body_of(f"{at} words", stream=at % 2 > 0), side.way)
        caller.writer.write(b"GET /health/live HTTP/1.1\r\n\r\n")
        side.seen.replies += [await caller.reply() for _ in range(6)]

    answers = [
        slowly(streamed(event(f"{at}"), STOP, COUNTED, DONE) if at % 2 else whole(f"{at}"), 0.01) for at in range(5)
    ]

    side = await both(tmp_path, lambda: Upstream(GOOD, *answers), asks, took=None)

    assert side.went == ["line"] * 4
    assert [f'content":"{at}"'.encode() in reply.body for at, reply in enumerate(side.seen.replies[:5])] == [True] * 5


async def test_a_body_may_come_in_pieces(tmp_path: Path) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    body = body_of(SPECIAL)
    sent = head % len(body) + body

    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        caller = await side.connect()
        for size in (len(sent), 1, 7, len(sent) - len(body), len(sent) - len(body) + 3, len(sent) - 1):
            for at in range(0, len(sent), size):
                caller.writer.write(sent[at : at + size])
                await caller.writer.drain()
                await asyncio.sleep(0.0005)
            assert (await caller.reply()).status == 200

    assert side.went == []
    assert {request.partition(b"\r\n\r\n")[2] for request in upstream.requests[1:]} == {
        orjson.dumps(orjson.loads(body) | {"max_tokens": 100})
    }


async def test_who_is_late_with_a_body_is_waited_for_and_told_when_it_took_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sekha.gateway.chats.BODY_SECONDS", 0.4)
    body = body_of()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        caller = await side.connect()
        for _ in range(2):  # a head that is new, and one that was met
            began = asyncio.get_running_loop().time()
            caller.writer.write(head + body[:9])
            late = await caller.reply()
            assert (late.status, late.json()["error"]["code"]) == (408, "request_timeout")
            assert 1 < asyncio.get_running_loop().time() - began < 4
            # What was still on its way belongs to nobody.
            caller.writer.write(body[9:] + b"GET /health/live HTTP/1.1\r\n\r\n")
            assert (await caller.reply()).status == 200
            caller.send(body)
            assert (await caller.reply()).status == 200

    # Those that were late, and those after them: money that lay idle for a second is to be leased anew.
    assert side.went == ["line"] * 4


async def test_who_is_late_with_a_body_and_not_too_late_is_answered(tmp_path: Path) -> None:
    body = body_of()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        caller = await side.connect()
        for seconds in (0.3, 2.1):  # a short body is waited for a second or two before anything is done for it
            caller.writer.write(head + body[:-1])
            await asyncio.sleep(seconds)
            caller.writer.write(body[-1:])
            assert (await caller.reply()).status == 200

    assert side.went == ["line"]


async def test_every_outcome_leaves_the_connection_as_the_line_leaves_it(tmp_path: Path) -> None:
    """Whatever is asked next on it, and however the one who asks writes HTTP."""
    cases: list[tuple[bytes, list[str]]] = [
        (body_of(), []),
        (body_of(stream=True), []),
        (b"{", []),
        (body_of(model="nobody"), []),
        (body_of(), ["x-request-id: 5d0b4f8d"]),
        (body_of(), ["authorization: Bearer whatever"]),
        (body_of(), ["Content-Type: text/plain", "Accept-Encoding: gzip", "accept: */*"]),
        (body_of(), []),
        (body_of(), ["connection: keep-alive"]),
        (body_of(stream=True), ["connection: close"]),
    ]
    ask_ids: list[bytes] = []

    async def asks(side: Side) -> None:
        await side.meet(headers=["authorization: Bearer whatever"])
        caller = await side.connect()
        for body, headers in cases:
            await side.ask(body, caller=caller, headers=headers)
            if "connection: close" not in headers:
                for line in (
                    b"GET /health/live",
                    b"HEAD /health/live",
                    b"GET /v1/chat/completions",
                    b"DELETE /nowhere",
                ):
                    caller.writer.write(line + b" HTTP/1.1\r\nhost: x\r\n\r\n")
                    if line.startswith(b"HEAD"):
                        side.note(head=(await caller.reader.readuntil(b"\r\n\r\n"))[:12])
                    else:
                        side.seen.replies.append(await caller.reply())
        ask_ids.append(await caller.reader.read())

    def makes() -> Upstream:
        return Upstream(GOOD, GOOD, streamed(*HELLO_EVENTS), *[GOOD] * 5, streamed(*HELLO_EVENTS))

    side = await both(tmp_path, makes, asks, took=None)

    assert side.went == ["short"] * 2 + ["line"] * 2 + ["short"] * 6
    assert ask_ids == [b"", b""]
    assert [line["request_id"] for line in side.seen.lines].count("5d0b4f8d") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_before_chunks_were_known_a_reply_ends_with_its_connection(tmp_path: Path, stream: bool) -> None:
    body = body_of(stream=stream)
    replies = []

    async with (
        Upstream(GOOD, streamed(*HELLO_EVENTS) if stream else GOOD) as upstream,
        opened(tmp_path, upstream) as side,
    ):
        await side.meet()
        for padding in (b"", b" " * 70_000):  # so long a body is not waited for, and goes the long way
            sent = body + padding
            caller = await side.connect()
            caller.writer.write(
                b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(sent), sent)
            )
            replies.append(await caller.reply())
            assert await caller.reader.read() == b""

    assert side.went == ["line"]
    assert replies[0] == replies[1]
    assert replies[0].named["connection"] == "close"
    assert "transfer-encoding" not in replies[0].named


async def test_who_asks_whether_to_send_a_body_is_told_to(tmp_path: Path) -> None:
    body = body_of()

    async with Upstream(GOOD) as upstream, opened(tmp_path, upstream) as side:
        await side.meet()
        caller = await side.connect()
        caller.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        caller.writer.write(body)
        assert (await caller.reply()).status == 200

    assert side.went == ["line"]


async def test_three_failures_open_a_circuit_whichever_way_they_came(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        for at in range(3):
            await side.meet(body_of(model="eyes"))
            if at == 0:
                await side.meet()
            await side.ask(body_of(stream=at == 1))
            side.note(circuits=side.circuits)
        await side.ask(body_of())

    once = Retries(rounds=1)
    answers = [GOOD, GOOD, refusal(500), GOOD, refusal(500), GOOD, refusal(500), GOOD]

    side = await both(
        tmp_path, lambda: Upstream(*answers), asks, took=["handed over"] * 3 + ["line"], retries=once, waits=True
    )

    assert dict(side.notes)["circuits"] == {"first/chat": ("open", 3)}
    assert [reply.status for reply in side.seen.replies] == [503] * 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_is_left_alone_for_as_long_as_it_says_whichever_way_it_was_told(
    tmp_path: Path, stream: bool
) -> None:
    async def asks(side: Side) -> None:
        await side.meet(body_of(model="eyes"), body_of())
        await side.ask(body_of(stream=stream))
        await side.ask(body_of(stream=stream))
        await side.ask(body_of(model="eyes"))

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD, GOOD, refusal(429, "Retry-After: 600"), GOOD),
        asks,
        took=["handed over", "line", "short"],
        waits=True,
    )

    assert [reply.status for reply in side.seen.replies] == [429, 429, 200]
    assert len(side.seen.asked) == 4


# --- where others stand behind -------------------------------------------------------------

SIBLINGS = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    priority: 1
    models:
      - {model_id: chat, task: chat_small, max_output_tokens: 9, price: {input_per_million: 10, output_per_million: 20}}
      - {model_id: vectors, task: embedding, dimension: 8, price: {input_per_million: 1}}
  - id: second
    provider_type: openai
    base_url: URL
    priority: 2
    models:
      - {model_id: chat, task: chat_small, max_output_tokens: 50, price: {input_per_million: 30, output_per_million: 7}}
      - {model_id: vectors, task: embedding, dimension: 8, price: {input_per_million: 3}}
  - id: third
    provider_type: openrouter
    base_url: URL
    priority: 3
    models:
      - {model_id: chat, task: chat_small, context_window: 90, price: {input_per_million: 1, output_per_million: 1}}
budgets: [{name: all, limit: 1000}, {name: theirs, limit: 900, match: {provider: second}}]
routing: {circuit_breaker: {failure_threshold: 1000}}
"""


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_ordinary_goes_the_short_way_though_others_stand_behind(tmp_path: Path, stream: bool) -> None:
    bodies = [body[:1] + b'"stream":true,' + body[1:] for body in map(bytes.strip, ORDINARY.values())]
    bodies = [body for body in bodies if body.count(b'"stream"') == 1] if stream else list(ORDINARY.values())

    def makes() -> Upstream:
        return Upstream(*[GOOD] * len(MET), streamed(*HELLO_EVENTS) if stream else GOOD)

    side = await both(
        tmp_path, makes, asking(*bodies, meets=MET), took=["short"] * len(bodies), config=SIBLINGS, waits=True
    )

    assert {reply.named["x-sekha-provider"] for reply in side.seen.replies} == {"first"}


TAKEN_OVER: dict[str, tuple[int, list[Answer | None], str]] = {
    "500": (200, [refusal(500), GOOD], "second"),
    "429": (200, [refusal(429, "Retry-After: 0.05"), GOOD], "second"),
    "401": (200, [refusal(401), GOOD], "second"),
    "no usage": (200, [whole(usage=None)], "first"),
    "closed": (200, [None, None, GOOD], "second"),
    "cut": (200, [then_hang_up(GOOD[:-20]), GOOD], "second"),
    "a page": (200, [with_length(b"<html>", "Content-Type: text/html"), GOOD], "second"),
    "two of them": (200, [refusal(500), refusal(503), GOOD], "third"),
    "all of them, and then good": (200, [refusal(500)] * 3 + [GOOD], "first"),
    "400": (400, [refusal(400)], ""),
    "content": (400, [refusal(400, code="content_policy_violation")], ""),
    "nobody": (502, [refusal(401)] * 3, ""),
}
STREAMS_TAKEN_OVER: dict[str, tuple[int, list[Answer | None], str]] = {
    "500": (200, [refusal(500), streamed(*HELLO_EVENTS)], "second"),
    "wrong at once": (200, [streamed(WRONG_EVENT), streamed(*HELLO_EVENTS)], "second"),
    "cut before its first": (200, [streamed(ends="never"), streamed(*HELLO_EVENTS)], "second"),
    "cut after its first": (200, [streamed(SAY, ends="never")], "first"),
    "wrong within": (200, [streamed(SAY, WRONG_EVENT)], "first"),
    "no usage": (200, [streamed(SAY, MORE, STOP, DONE)], "first"),
    "nobody": (502, [refusal(401)] * 3, ""),
}


@pytest.mark.parametrize("stream", [False, True])
async def test_another_takes_over_what_began_the_short_way(tmp_path: Path, stream: bool) -> None:
    scripts = STREAMS_TAKEN_OVER if stream else TAKEN_OVER

    async def asks(side: Side) -> None:
        for name, (status, _, by) in scripts.items():
            await side.meet()
            reply = await side.ask(body_of(stream=stream))
            assert (reply.status, reply.named.get("x-sekha-provider", "")) == (status, by), name
            await side.settled()
            await asyncio.sleep(0.06)  # nobody is left alone any more
            side.note(circuits=side.circuits)

    answers = [answer for _, script, _ in scripts.values() for answer in (GOOD, *script)]

    side = await both(
        tmp_path, lambda: Upstream(*answers), asks, took=["handed over"] * len(scripts), config=SIBLINGS, waits=True
    )

    assert len(side.seen.asked) == len(answers)


async def test_the_dearest_of_those_who_may_be_asked_is_held_in_every_budget(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        asking_it = asyncio.create_task(side.ask(body_of()))
        await asyncio.sleep(0.05)
        side.note(held=await side.held())
        await asking_it

    side = await both(tmp_path, lambda: Upstream(GOOD, slowly(GOOD)), asks, config=SIBLINGS)

    held = dict(side.notes)["held"]
    assert held["all"] == held["theirs"] > 0
    assert side.seen.budgets["all"] > side.seen.budgets["theirs"] == 0


@pytest.mark.parametrize("limits", ["", "routing: {auto_fallback: false}"])
async def test_the_same_one_is_chosen_and_the_same_is_held_as_in_the_line(tmp_path: Path, limits: str) -> None:
    """Which is cheapest depends on how each counts, and on what comes out."""
    bodies = [
        body_of("word " * words + "é" * more, model="chat_smart", **fields)
        for words in (1, 30, 300)
        for more in (0, 50)
        for fields in ({}, {"max_tokens": 5}, {"max_completion_tokens": 900})
    ]
    config = (
        PRICED
        + limits
        + "\nbudgets: [{name: all, limit: 1000}, {name: one, limit: 9, match: {model: open}}"
        + ", {name: other, limit: 0.0001, match: {model: free}}]"
    )

    async def asks(side: Side) -> None:
        await side.meet(body_of(model="chat_smart"), body_of(model="open"))
        caller = await side.connect()
        for body in bodies:
            await side.ask(body, caller=caller)

    side = await both(tmp_path, lambda: Upstream(GOOD), asks, took=["short"] * len(bodies), config=config)

    assert {reply.status for reply in side.seen.replies} == {200}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429])
async def test_what_is_sent_costs_no_more_than_what_is_held_of_a_small_budget(
    tmp_path: Path, status: int, stream: bool
) -> None:
    """Nobody limits the reply, and at its longest it costs ten times what the budget has, of which nothing is spent."""
    config = """
    providers:
      - id: first
        provider_type: openai
        base_url: URL
        models:
          - model_id: one
            task: chat_smart
            max_output_tokens: 16384
            price: {input_per_million: 10, output_per_million: 30}
          - model_id: other
            task: chat_smart
            max_output_tokens: 16384
            price: {input_per_million: 11, output_per_million: 31}
    budgets: [{name: all, limit: 100}, {name: little, limit: 0.05, period: total}]
    routing: {circuit_breaker: {failure_threshold: 1000}}
    """
    body = body_of(model="chat_smart", stream=stream)

    async def longest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = orjson.loads(upstreams[-1].requests[-1].partition(b"\r\n\r\n")[2])
        usage = {"prompt_tokens": 9, "completion_tokens": asked["max_tokens"]}
        answer = streamed(SAY, STOP, event(usage=usage), DONE) if stream else whole(usage=usage)
        await slowly(answer, 0)(reader, writer)

    async def asks(side: Side) -> None:
        await side.meet(body, statuses=(status,))
        await asyncio.sleep(0.06)  # nobody is left alone any more
        await side.ask(body)

    upstreams: list[Upstream] = []

    def makes() -> Upstream:
        refused: list[Answer] = [refusal(status, "Retry-After: 0.05")] * (1 if status == 400 else 2)
        upstreams.append(Upstream(*refused, longest))
        return upstreams[-1]

    side = await both(tmp_path, makes, asks, config=config, retries=Retries(rounds=1), waits=True)

    assert Decimal("0.045") < side.seen.budgets["little"] <= Decimal("0.05")
    assert not [name for name in side.seen.counts if name.startswith("sekha_worst_case_passed")]


async def test_a_circuit_that_opens_has_another_go_first_on_the_short_way(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        await side.meet()
        for _ in range(3):
            await side.ask(body_of())
            await side.settled()
        side.note(circuits=side.circuits)
        for _ in range(2):
            await side.ask(body_of())

    answers = [GOOD, *[refusal(500), GOOD] * 3, GOOD]

    side = await both(
        tmp_path,
        lambda: Upstream(*answers),
        asks,
        took=["handed over"] * 3 + ["short"] * 2,
        config=SIBLINGS.replace("1000}}", "3, timeout_secs: 60}}"),
        retries=Retries(rounds=1),
        waits=True,
    )

    assert dict(side.notes)["circuits"]["first/chat"] == ("open", 3)
    assert [reply.named["x-sekha-provider"] for reply in side.seen.replies] == ["second"] * 5


async def test_a_key_is_served_by_those_it_may_use(tmp_path: Path) -> None:
    key = new_key()
    keys = f'keys: [{{name: some, hash: "{hash_of(key)}", models: [second/chat, third/chat]}}]\n'
    authorized = [f"authorization: Bearer {key}"]

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD),
        asking(body_of(), body_of(stream=True), meets=[body_of()], headers=authorized),
        took=["short", "handed over"],
        config=SIBLINGS + keys,
    )

    assert side.seen.replies[0].named["x-sekha-provider"] == "second"


async def test_an_embedding_goes_the_short_way_though_another_has_its_model(tmp_path: Path) -> None:
    async def asks(side: Side) -> None:
        for body in (texts(), texts(["a", "b"]), texts(), texts()):
            await side.meet(texts(), path=EMBED)
            await side.ask(body, path=EMBED)
            await side.settled()

    answers = [vectors(ROW), vectors(ROW)] * 2
    answers[3:] = [vectors(ROW, ROW), vectors(ROW), refusal(500), vectors(ROW), vectors(ROW), refusal(400)]

    side = await both(
        tmp_path,
        lambda: Upstream(*answers),
        asks,
        took=["short", "short", "handed over", "handed over"],
        config=SIBLINGS,
        waits=True,
    )

    assert [reply.status for reply in side.seen.replies] == [200, 200, 200, 400]
    assert [reply.named.get("x-sekha-provider") for reply in side.seen.replies] == ["first", "first", "second", None]


TWO_PROTOCOLS = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    priority: 1
    models:
      - {model_id: vectors, task: embedding, dimension: 8, price: {input_per_million: 1000}}
  - id: second
    provider_type: SECOND
    base_url: ROOT
    priority: 2
    models:
      - {model_id: vectors, task: embedding, dimension: 8, same_as: openai/vectors, price: {input_per_million: 1000}}
budgets: [{name: all, limit: 1000}]
routing: {circuit_breaker: {failure_threshold: 1000}}
"""
SILENT = {"prompt_tokens": 0}
"""No usage that anybody could charge by."""
OLLAMAS = with_length(orjson.dumps({"model": "vectors", "embeddings": [ROW], "prompt_eval_count": 3}), JSON)
EMBEDDED_BY: dict[str, tuple[bytes, int, list[Answer | None], Way, str]] = {
    "one": (texts(), 200, [vectors(ROW)], "short", "first"),
    "no usage": (texts(), 200, [vectors(ROW, usage=SILENT)], "handed over", "first"),
    "of another length": (texts(dimensions=4), 200, [vectors(ROW[:4])], "short", "first"),
    "of another length, no usage": (
        texts(dimensions=4),
        200,
        [vectors(ROW[:4], usage=SILENT)],
        "handed over",
        "first",
    ),
    "what only one knows": (texts(input_type="query"), 200, [vectors(ROW)], "line", "first"),
    "the other takes over": (texts(), 200, [refusal(401), OLLAMAS], "handed over", "second"),
    "the other cannot": (texts(dimensions=4), 502, [refusal(401)], "handed over", ""),
    "the other can": (texts(dimensions=8), 200, [refusal(401), OLLAMAS], "handed over", "second"),
    "the request is wrong": (texts(dimensions=4), 400, [refusal(400)], "handed over", ""),
}


async def test_an_embedding_is_made_by_who_can_whatever_stands_behind(tmp_path: Path) -> None:
    await asyncio.wrap_future(begin_import())  # which may take longer than anybody waits here

    async def asks(side: Side) -> None:
        for name, (body, status, _, _, by) in EMBEDDED_BY.items():
            await side.meet(texts(), path=EMBED)
            reply = await side.ask(body, path=EMBED)
            assert (reply.status, reply.named.get("x-sekha-provider", "")) == (status, by), (name, reply.body)
            await side.settled()

    answers = [answer for _, _, script, _, _ in EMBEDDED_BY.values() for answer in (vectors(ROW), *script)]
    took = [way for _, _, _, way, _ in EMBEDDED_BY.values()]
    config = TWO_PROTOCOLS.replace("SECOND", "ollama")

    side = await both(tmp_path, lambda: Upstream(*answers), asks, took=took, config=config, waits=True)

    assert len(side.seen.asked) == len(answers)


@pytest.mark.parametrize(("second", "calls"), [("openrouter", 3), ("ollama", 2)])
async def test_many_texts_whose_usage_nobody_reports_are_charged_call_by_call(
    tmp_path: Path, second: str, calls: int
) -> None:
    async def asks(side: Side) -> None:
        await side.meet(texts(), path=EMBED)
        await side.ask(texts(["hello"] * 200), path=EMBED)

    def makes() -> StandIn:
        standin = StandIn(dimension=8)
        standin.omit_usage(times=None)
        return standin

    config = TWO_PROTOCOLS.replace("SECOND", second)

    side = await both(tmp_path, makes, asks, took=["line"], config=config)

    assert side.seen.replies[0].status == 200
    assert orjson.loads(side.seen.replies[0].body)["sekha"]["attempts"] == calls
    assert len(side.seen.asked) == 1 + calls


TWO_TASKS = """
providers:
  - id: first
    provider_type: openai
    base_url: URL
    models:
      - {model_id: chat, task: chat_small, supports_vision: true, price: {input_per_million: 9, output_per_million: 9}}
      - {model_id: chat, task: vision}
"""


async def test_a_run_is_tagged_with_the_task_that_it_is_charged_to(tmp_path: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD),
        asking(body_of(), body_of(image), body_of(model="vision"), meets=[*MET, body_of(model="vision")]),
        took=None,
        config=TWO_TASKS,
    )

    tasks = [tag for run in side.seen.runs[-3:] for tag in run.tags if tag.startswith("task:")]
    assert tasks == ["task:chat_small", "task:vision", "task:vision"]
    charged = {line[1]: line[2] for line in side.seen.spent if line[0] == "task"}
    met = [tag for run in side.seen.runs for tag in run.tags]
    assert charged == {task: met.count(f"task:{task}") for task in ("chat_small", "vision")}


# --- by which name a limit goes ------------------------------------------------------------

NEWER = ("o3-mini", "gpt-5-mini", "ft:gpt-5-mini:us::x", "openai/o1", "gpt-4o-mini", "mine")


@pytest.mark.parametrize("kind", ["openai", "openrouter"])
@pytest.mark.parametrize("budgets", ["", "budgets: [{name: all, limit: 1000}]"])
async def test_the_longest_reply_is_asked_for_by_the_name_that_the_line_would_use(
    tmp_path: Path, kind: str, budgets: str
) -> None:
    models = "\n".join(
        f"      - {{model_id: '{name}', task: chat_small, price: {{input_per_million: 1, output_per_million: 2}}}}"
        for name in NEWER
    )
    config = (
        f"providers:\n  - id: first\n    provider_type: {kind}\n    base_url: URL\n    models:\n{models}\n{budgets}"
    )
    bodies = [
        body_of(model=name, stream=stream, **limits)
        for name in NEWER
        for stream in (None, False)
        for limits in (
            {},
            {"max_tokens": 5},
            {"max_completion_tokens": 6},
            {"max_tokens": 7, "max_completion_tokens": 8},
            {"max_completion_tokens": 9, "max_tokens": 9},
        )
    ]

    side = await both(
        tmp_path,
        lambda: Upstream(GOOD),
        asking(*bodies, meets=[body_of(model=name) for name in NEWER]),
        took=["short"] * len(bodies),
        config=config,
    )

    assert any(b'"max_completion_tokens":5' in asked for asked in side.seen.asked) == (kind == "openai")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_turns_out_to_take_the_limit_by_another_name_is_asked_again_and_then_at_once(
    tmp_path: Path, stream: bool
) -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    unsupported = refusal(400, message=said, param="max_tokens", code="unsupported_parameter")
    body = body_of(stream=stream, max_tokens=5)

    def makes() -> Upstream:
        return Upstream(GOOD, unsupported, streamed(*HELLO_EVENTS) if stream else GOOD)

    side = await both(tmp_path, makes, asking(body, body), took=["handed over", "short"])

    assert [reply.status for reply in side.seen.replies] == [200, 200]
    assert [b'"max_tokens":5' in asked for asked in side.seen.asked] == [False, True, False, False]


# --- whatever is asked, and whatever comes of it -------------------------------------------

SOMETHING = (None, 0, 1, -2.5, "x", "é", [], {}, [1], {"a": [None]}, True, False)
OPTIONS = (
    "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
    "reasoning_effort", "seed", "stop", "user", "verbosity",
)  # fmt: skip
ODD = (
    "n", "tools", "response_format", "store", "metadata", "stream_options", "modalities", "service_tier", "max_cost",
    "task", "preferred_model", "frobnicate",
)  # fmt: skip
LENGTHS = (*(None, 1, 5, 60, 10**7) * 3, 0, -1, 1.5, "5", True)
COMES = (*("good",) * 8, "no usage", "dear", "500", "429", "400", "closed", "page", "error", "cut")


def any_body(some: random.Random) -> bytes:
    """A chat, well formed as a rule."""

    def message() -> object:
        if some.random() < 0.02:
            return some.choice(SOMETHING)
        said = {
            "role": some.choice(("user",) * 6 + ("system", "assistant", "tool", "", "é")),
            "content": some.choice(("Hi", "Hello there.", SPECIAL, "word " * 50, "")),
        }
        if some.random() < 0.2:
            said["name"] = some.choice(("Ann", "", None, 5))
        if some.random() < 0.03:
            said[some.choice(("role", "content", "name", "tool_calls"))] = some.choice(SOMETHING)
        return said

    body: dict[str, object] = {
        "model": some.choice(("chat",) * 12 + ("first/chat",) * 4 + ("nobody", "", None, 5, "auto"))
    }
    body["messages"] = [message() for _ in range(some.choice((1, 1, 1, 2, 3)))]
    if some.random() < 0.5:
        body["stream"] = some.choice((True,) * 9 + (False,) * 4 + (None, 1, "x"))
    for name in ("max_tokens", "max_completion_tokens"):
        if some.random() < 0.2:
            body[name] = some.choice(LENGTHS)
    for _ in range(some.choice((0, 0, 1, 3))):
        body[some.choice(OPTIONS)] = some.choice(SOMETHING)
    if some.random() < 0.1:
        body[some.choice(ODD)] = some.choice(SOMETHING)
    fields = list(body.items())
    some.shuffle(fields)
    written = orjson.dumps(dict(fields)) if some.random() < 0.7 else json.dumps(dict(fields), indent=1).encode()
    return written[:-1] if some.random() < 0.03 else written


def comes(kind: str, *, stream: bool) -> Answer | None:
    """What a provider answers, in one of few ways."""
    refused: dict[str, Answer | None] = {
        "500": refusal(500),
        "429": refusal(429),
        "400": refusal(400),
        "page": with_length(b"<html>"),
        "closed": None,
    }
    if kind in refused:
        return refused[kind]
    usage = None if kind == "no usage" else USAGE | ({"completion_tokens": 9_000} if kind == "dear" else {})
    if stream:
        end = WRONG_EVENT if kind == "error" else event(usage=usage) + DONE if usage else DONE
        return streamed(SAY, MORE, STOP, end, seconds=0.0001, ends="never" if kind == "cut" else "at once")
    if kind == "cut":
        return then_hang_up(GOOD[:-9])
    return whole(usage=usage, **({"error": {"message": "no"}} if kind == "error" else {}))


@pytest.mark.parametrize(("seed", "config"), [*((seed, ONE) for seed in range(4)), (4, SIBLINGS), (5, SIBLINGS)])
async def test_whatever_is_asked_and_whatever_comes_of_it_is_the_same(tmp_path: Path, seed: int, config: str) -> None:
    some = random.Random(seed)
    asked = [(any_body(some), some.choice(COMES)) for _ in range(60)]
    now = "good"

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = comes(now, stream=b'"stream":true' in upstream.requests[-1])
        if answer is None:
            writer.close()
        elif isinstance(answer, bytes):
            writer.write(answer)
        else:
            await answer(reader, writer)

    def makes() -> Upstream:
        nonlocal upstream
        upstream = Upstream(answered)
        return upstream

    async def asks(side: Side) -> None:
        nonlocal now
        for body, kind in asked:
            now = "good"
            await side.meet(body_of(), body_of(model="first/chat"))
            now = kind
            await side.ask(body)
            await side.settled()

    upstream: Upstream
    side = await both(tmp_path, makes, asks, took=None, config=config, waits=True)

    assert side.went.count("short") >= 10
    assert side.went.count("handed over") >= 5


@pytest.mark.parametrize("way", ["short", "line"])
async def test_usage_beyond_all_measure_is_no_report(tmp_path: Path, way: Way) -> None:
    """Nine million dollars are more picos than a ledger's integers take."""
    absurd = whole(usage={"prompt_tokens": 2**53, "completion_tokens": 1})

    async with Upstream(GOOD, absurd, GOOD) as upstream, opened(tmp_path, upstream, way) as side:
        await side.meet()
        counted = await side.ask(body_of())
        calls = [line.calls for line in await (await side.serving.resources.ledger()).report("model")]

    assert counted.json()["sekha"]["usage"] == "counted"
    assert counted.json()["sekha"]["cost"] < 1
    assert calls == [2]
