"""A provider's chunks as the server-sent events that OpenAI would have written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Self

import orjson

from sekha.errors import BadReply
from sekha.pricing import Usage
from sekha.providers.base import ChatCall, Chunk, Provider
from sekha.providers.events import said_in, says_something
from sekha.providers.reports import joined

__all__ = ["ChunkStream"]


class ChunkStream:
    """A `RawStream` over `Provider.stream`, for providers that speak another protocol than OpenAI's."""

    def __init__(self, chunks: AsyncIterator[Chunk], first: Sequence[Chunk], *, wants_usage: bool) -> None:
        self.usage: Usage | None = None
        self.went_in: Usage | None = None
        self._chunks = chunks
        self._first = first
        self._wants_usage = wants_usage
        self._said: list[str] = []

    @classmethod
    async def open(cls, provider: Provider, call: ChatCall) -> Self:
        """Wait until something is said. Until then a failure may fall back on another provider.

        What says nothing is held back until then.
        """
        chunks = provider.stream(call)
        first: list[Chunk] = []
        async for chunk in chunks:
            first.append(chunk)
            if says_something(chunk.body):
                break
        if not first:
            raise BadReply(
                "the stream ended before it began", provider_id=call.model.provider_id, model_id=call.model.id
            )
        options = call.options.get("stream_options") or {}
        return cls(chunks, first, wants_usage=options.get("include_usage") is True)

    def said(self) -> str:
        return "".join(self._said)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"".join(map(self._event, self._first))
        async for chunk in self._chunks:
            if event := self._event(chunk):
                yield event

    def _event(self, chunk: Chunk) -> bytes:
        choices = chunk.body.get("choices") or ()
        self._said += (text for choice in choices for text in said_in(choice.get("delta")))
        body = chunk.body
        if chunk.went_in is not None:
            self.went_in = joined(self.went_in, chunk.went_in)
            if not choices:
                return b""
        if chunk.usage is not None:
            self.usage = chunk.usage
            if not self._wants_usage:
                body = {name: value for name, value in body.items() if name != "usage"}
                if not body.get("choices"):
                    return b""
        return b"data: " + orjson.dumps(body, default=str) + b"\n\n"

    async def aclose(self) -> None:
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()
