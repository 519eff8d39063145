"""Heads that a connection has seen: what is like one is read as a parser reads it, and what is not is left to one."""

from __future__ import annotations

from typing import Any

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sekha.plain_heads import PlainHead, plain_head

POST = b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\naccept: */*\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"


def known(raw: bytes = POST, length: bytes = b"3") -> PlainHead:
    head = plain_head(raw, length)
    assert head is not None
    return head


@pytest.mark.parametrize("raw", [POST, OK])
@pytest.mark.parametrize(
    ("digits", "length"), [(b"0", 0), (b"3", 3), (b"12345", 12345), (b"007", 7), (b"9" * 10, 10**10 - 1)]
)
def test_a_head_is_known_again_whatever_its_bodys_length(raw: bytes, digits: bytes, length: int) -> None:
    again = raw.replace(b": 3\r", b": %b\r" % digits)

    assert known(raw).body_of(again + b"abc") == (len(again), length)


@pytest.mark.parametrize(
    "raw",
    [
        POST.replace(b"content-length", b"Content-Length"),
        POST.replace(b"content-length", b"CONTENT-LENGTH"),
        POST.replace(b"\r\naccept: */*", b""),
        POST.replace(b"host: x\r\n", b""),
        POST + b"abc",
        POST + b"abc" + POST,
        OK.replace(b"200 OK", b"200 "),
        OK.replace(b"\r\n\r\n", b"\r\nx: \xff\t y\r\n\r\n"),
    ],
)
def test_a_head_is_plain_however_its_names_are_written_and_whatever_else_it_says(raw: bytes) -> None:
    assert known(raw).body_of(raw) == (raw.index(b"\r\n\r\n") + 4, 3)


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", b"3"),
        (POST, b"4"),
        (POST, b"03"),
        (POST[:-1], b"3"),
        (POST.replace(b"content-length: 3\r\n", b""), b"3"),
        (POST.replace(b"\r\n", b"\n"), b"3"),
        (POST.replace(b"\r\naccept", b"\naccept"), b"3"),
        (POST.replace(b"host: x\r\n", b"host: x\r"), b"3"),
        (POST.replace(b": 3", b":3"), b"3"),
        (POST.replace(b": 3", b":  3"), b"3"),
        (POST.replace(b": 3", b": 3 "), b"3"),
        (POST.replace(b": 3", b":\t3"), b"3"),
        (POST.replace(b": 3", b": +3"), b"3"),
        (POST.replace(b"content-length", b"x-content-length"), b"3"),
        (POST.replace(b": 3", b": 12345678901"), b"12345678901"),
        (POST.replace(b"x\r\n", b"x" * 5000 + b"\r\n"), b"3"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"3"),
        (b"\r\n" + OK, b"3"),
    ],
)
def test_what_two_might_read_differently_is_not_plain(raw: bytes, length: bytes) -> None:
    head = plain_head(raw, length)

    # A header whose name only ends so is part of another name, and never begins a line.
    assert head is None or head.before.endswith(b"x-content-length: ")


@pytest.mark.parametrize(
    "other",
    [
        b"",
        POST[:10],
        POST[: POST.index(b"3\r")],
        POST[: POST.index(b"3\r") + 1],
        POST[:-1],
        POST.replace(b"POST", b"PUT"),
        POST.replace(b"/v1/x", b"/v1/y"),
        POST.replace(b"host: x", b"host: y"),
        POST.replace(b"content-length", b"Content-Length"),
        POST.replace(b"accept: */*", b"accept: text"),
        POST.replace(b"accept: */*\r\n", b""),
        POST.replace(b": 3", b": "),
        POST.replace(b": 3", b": +3"),
        POST.replace(b": 3", b": -3"),
        POST.replace(b": 3", b":  3"),
        POST.replace(b": 3", b": 3 "),
        POST.replace(b": 3", b": 3_0"),
        POST.replace(b": 3", b": 0x3"),
        POST.replace(b": 3", b": 3,3"),
        POST.replace(b": 3", b": \xb3"),
        POST.replace(b": 3", b": " + b"3" * 11),
        POST.replace(b": 3\r\n", b": 3\n"),
        POST.replace(b": 3\r\n", b": 3\r\ncontent-length: 4\r\n"),
        POST.replace(b": 3\r\n", b": 3\r\ntransfer-encoding: chunked\r\n"),
        POST.replace(b": 3\r\n", b": 3\r\n\r\n"),
    ],
)
def test_what_differs_in_anything_but_the_length_is_another_head(other: bytes) -> None:
    assert known().body_of(other) is None


def test_what_is_kept_of_a_head_is_no_more_than_the_head() -> None:
    before, after = known(POST + b"x" * 100_000)

    assert before + b"3" + after == POST


class Parsed:
    """What a parser makes of a message."""

    def __init__(self, raw: bytes) -> None:
        self.lengths: list[bytes] = []
        self.body = b""
        self.ends = 0
        self.fails = False
        try:
            httptools.HttpRequestParser(self).feed_data(raw)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fails = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-length" and not self.ends:
            self.lengths.append(value)

    def on_body(self, body: bytes) -> None:
        self.body += b"" if self.ends else body

    def on_message_complete(self) -> None:
        self.ends += 1


LINES = st.sampled_from(
    [b"a: b\r\n"] * 4
    + [
        b"host: x\r\n",
        b"Content-Length: 3\r\n",
        b"content-length: 12\r\n",
        b"transfer-encoding: chunked\r\n",
        b"a:b\r\n",
    ]
    + [
        b"x: content-length: 5\r\n",
        b"a: b\n",
        b"a: b\r",
        b" folded\r\n",
        b"\r\n",
        b"connection: close\r\n",
        b": b\r\n",
        b"a\r\n",
    ]
    + [b"a: \xff\r\n", b"a: \x00\r\n", b"content-length : 4\r\n", b"content-length:4\r\n", b"x-content-length: 4\r\n"]
)


@given(st.lists(LINES, max_size=3), st.lists(LINES, max_size=3), st.integers(min_value=0, max_value=20))
@example([], [], 3)
def test_whatever_is_taken_for_plain_is_what_a_parser_reads(
    before: list[bytes], after: list[bytes], length: int
) -> None:
    def written(digits: bytes) -> bytes:
        head = b"".join([b"POST / HTTP/1.1\r\n", *before, b"content-length: ", digits, b"\r\n", *after, b"\r\n"])
        return head + b"x" * 20

    first: Any = Parsed(written(b"3"))
    head = plain_head(written(b"3"), b"3")
    if first.fails or len(first.lengths) != 1 or head is None:
        return
    again = written(b"%d" % length)
    found = head.body_of(again)
    assert found is not None
    start, size = found
    parsed: Any = Parsed(again)
    assert size == int(parsed.lengths[0])
    assert again[start : start + size] == parsed.body
