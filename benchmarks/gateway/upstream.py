"""A provider that answers at once, so that a gateway in front of it is all that takes time.

    python upstream.py        prints the port that it listens on

One hand-written protocol without a framework, and bytes that were made beforehand. Every piece of a stream is
sent by itself, as models send them, so that a gateway cannot pass a whole stream on as one.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import httptools
import orjson
import uvloop

CHAT_MODEL = "bench-chat"
EMBEDDING_MODEL = "bench-embedding"
DIMENSION = 1536
WORDS = [f"word{number} " for number in range(20)]
"""What a chat answers: each word is one piece of its stream."""

USAGE = {"prompt_tokens": 60, "completion_tokens": len(WORDS), "total_tokens": 60 + len(WORDS)}
STREAM = re.compile(rb'"stream"\s*:\s*true')
INCLUDE_USAGE = re.compile(rb'"include_usage"\s*:\s*true')


def whole(value: object) -> bytes:
    body = orjson.dumps(value)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(choices: list[object], **more: object) -> bytes:
    piece = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": CHAT_MODEL}
    return b"data: %s\n\n" % orjson.dumps({**piece, "choices": choices, **more})


def stream(*, usage: bool) -> list[bytes]:
    """What is sent for a stream, send by send: its head comes with the first piece."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [
        event([{"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}]) for word in WORDS
    ]
    end = event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if usage:
        end += event([], usage=USAGE)
    first, *others = map(chunked, pieces)
    return [head + first, *others, chunked(end + b"data: [DONE]\n\n") + b"0\r\n\r\n"]


CHAT = whole(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": CHAT_MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
)
EMBEDDING = whole(
    {
        "object": "list",
        "model": EMBEDDING_MODEL,
        # As many digits as OpenAI sends: what a gateway reads and writes is mostly these.
        "data": [
            {"object": "embedding", "index": 0, "embedding": [round(n / 49_999 - 0.015, 9) for n in range(DIMENSION)]}
        ],
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }
)
MODELS = whole(
    {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 1, "owned_by": "bench"} for name in (CHAT_MODEL, EMBEDDING_MODEL)
        ],
    }
)
STREAMS = {usage: stream(usage=usage) for usage in (False, True)}


class Provider(asyncio.Protocol):
    """One connection of a client, which asks one thing after another."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.fileno()
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url.endswith(b"/chat/completions"):
            if STREAM.search(self._body):
                self._send_each(STREAMS[INCLUDE_USAGE.search(self._body) is not None])
            else:
                self._transport.write(CHAT)
        elif self._url.endswith(b"/embeddings"):
            self._transport.write(EMBEDDING)
        else:
            self._transport.write(MODELS)

    def _send_each(self, pieces: Sequence[bytes]) -> None:
        # The transport would collect what is written in one turn of the loop, and send it as one.
        for piece in pieces:
            sent = 0
            if not self._transport.get_write_buffer_size():
                with suppress(BlockingIOError):
                    sent = os.write(self._file, piece)
            if sent < len(piece):
                self._transport.write(piece[sent:])


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Provider, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until whoever started us closes the pipe, or dies


if __name__ == "__main__":
    uvloop.run(main())
