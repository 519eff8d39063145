"""What every provider can do, and the values that cross that line.

A provider makes one attempt and says truthfully how it ended: a value, or one `ProviderError`.
Retries, fallback, budgets and circuits are decided above it. `tests/contracts/test_provider.py`
holds every provider to this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import field
from typing import Any, Protocol

from sekha.pricing import Usage
from sekha.registry import Model
from sekha.values import value
from sekha.vectors.base import Vector

__all__ = [
    "ByteProvider",
    "ChatCall",
    "Chunk",
    "Completion",
    "Embeddings",
    "Provider",
    "RawEmbeddings",
    "RawStream",
    "openai_usage",
]


@value
class ChatCall:
    """One attempt at one model. Nothing in it is shown when it is printed."""

    model: Model
    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    """In OpenAI's shape; content is text or parts (`text`, `image_url`)."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """OpenAI's other fields as they came: `max_tokens`, `temperature`, `tools`, `response_format` …"""
    timeout_seconds: float = 60.0
    """For the whole answer; for a stream, until its first token and between any two chunks."""


@value
class Completion:
    """A whole answer: `body` is OpenAI's `chat.completion` object."""

    body: Mapping[str, Any] = field(repr=False)
    usage: Usage | None
    """None when the provider reported none, or half of it."""
    half: Usage | None = None
    """That half, zero for the other; None when there is none."""
    raw: bytes | None = field(default=None, repr=False)
    """The body as it came, from a provider that speaks OpenAI's protocol."""

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"].get("content") or "")

    @property
    def finish_reason(self) -> str:
        return str(self.body["choices"][0].get("finish_reason") or "stop")


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI writes it."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@value
class Chunk:
    """One piece of a streamed answer: `body` is OpenAI's `chat.completion.chunk` object."""

    body: Mapping[str, Any] = field(repr=False)
    usage: Usage | None = None
    """Set on the piece that carries it, usually the last."""
    went_in: Usage | None = None
    """What the provider said of a part alone: what went in, where it says so before the answer; half of a report."""

    @property
    def text(self) -> str:
        choices = self.body.get("choices") or ()
        return str(choices[0].get("delta", {}).get("content") or "") if choices else ""


class RawStream(Protocol):
    """A streamed answer as the server-sent events in which a provider wrote it.

    Iterating gives blocks of whole events, without the last, `[DONE]`. It ends only when the
    provider said that it ended, and else raises `StreamBroken` or `ProviderTimeout`.
    """

    @property
    def usage(self) -> Usage | None:
        """What the provider reported of the whole; None before its end, and where more was said after it.

        An error of its own is an end too.
        """
        ...

    @property
    def went_in(self) -> Usage | None:
        """What the provider reported before the end, or of half alone, if it did.

        That is what went in, 0 where it does not say, and the least that came out.
        """
        ...

    def said(self) -> str:
        """The text that arrived so far, for counting."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None:
        """Close the connection; the provider stops writing."""
        ...


@value
class Embeddings:
    vectors: Vector = field(repr=False)
    """Shape `(len(texts), dimension)`, float32, in the order of the texts."""
    usage: Usage | None

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])


@value
class RawEmbeddings:
    """Embeddings in OpenAI's JSON, as they came."""

    raw: bytes = field(repr=False)
    usage: Usage | None
    count: int
    dimension: int


class Provider(Protocol):
    """One configured provider. Safe to use from many tasks at once."""

    async def complete(self, call: ChatCall) -> Completion: ...

    def stream(self, call: ChatCall) -> AsyncIterator[Chunk]:
        """Yield the pieces as they come, and end only when the provider said that it ended.

        A stream that is cut or stalls raises `StreamBroken` or `ProviderTimeout`; closing the
        iterator closes the connection.
        """
        ...

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:
        """Embed the texts in one call.

        Raises `DimensionMismatch` when the vectors are not as long as `model.dimension`, and
        `BadReply` when there are not as many as texts.
        """
        ...

    async def aclose(self) -> None: ...


class ByteProvider(Provider, Protocol):
    """A provider that speaks OpenAI's protocol, so that its bytes can be handed on."""

    async def open_stream(self, call: ChatCall) -> RawStream:
        """Wait until something is said. Until then every failure is raised here, and another provider may be asked."""
        ...

    async def embed(
        self, model: Model, texts: Sequence[str], *, timeout_seconds: float, dimensions: int | None = None
    ) -> Embeddings:
        """Embed the texts in one call, in vectors of so many `dimensions` where some are asked for."""
        ...

    async def embed_raw(self, model: Model, body: Mapping[str, Any], *, timeout_seconds: float) -> RawEmbeddings:
        """Embed what `body` holds, `input` and OpenAI's other fields, in one call.

        Raises as `embed` does.
        """
        ...
