"""The least that a Python gateway can do: bare ASGI and aiohttp, a request and its reply parsed, no features.

UPSTREAM=http://127.0.0.1:9000 uvicorn --loop uvloop --http httptools relay:app
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
from yarl import URL

UPSTREAM = os.environ["UPSTREAM"]
URLS = {path: URL(UPSTREAM + path) for path in ("/v1/chat/completions", "/v1/embeddings")}
HEADERS = {"content-type": "application/json"}
session: aiohttp.ClientSession


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["method"] == "GET":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        return
    streams = orjson.loads(body).get("stream")
    async with session.post(URLS[scope["path"]], data=body, headers=HEADERS) as reply:
        start = {"type": "http.response.start", "status": reply.status}
        content_type = reply.headers["content-type"].encode()
        if streams:
            await send({**start, "headers": [(b"content-type", content_type)]})
            async for piece in reply.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
            return
        answer = await reply.read()
        orjson.loads(answer)
        length = str(len(answer)).encode()
        await send({**start, "headers": [(b"content-type", content_type), (b"content-length", length)]})
        await send({"type": "http.response.body", "body": answer})


async def live(
    receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    global session  # noqa: PLW0603 - ASGI hands nothing on from start-up to a request
    await receive()
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        auto_decompress=False,
    )
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await session.close()
    await send({"type": "lifespan.shutdown.complete"})
