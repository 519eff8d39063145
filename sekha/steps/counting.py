"""Counting tokens without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sekha import tokens
from sekha.chat import ChatRequest
from sekha.registry import Model

__all__ = ["count_chat", "count_embedding", "count_reply", "counts_exactly"]

INLINE = 20_000
"""Characters up to which counting is quicker than a thread."""


def counts_exactly(model: Model) -> bool:
    """Whether we count as the provider does; what is free need not be."""
    free = model.price is not None and model.price.is_free
    return free or tokens.tokenizer_of(model.id).exact


async def count_chat(request: ChatRequest, model_id: str) -> int:
    """Tokens that go in: messages, images and tools."""

    def count() -> int:
        return tokens.count_messages(request.messages, model_id, tools=request.options.get("tools"))

    size = sum(len(str(message.get("content", ""))) for message in request.messages)
    return count() if size <= INLINE else await asyncio.to_thread(count)


async def count_embedding(texts: Sequence[str], model_id: str) -> tuple[int, int]:
    """Tokens of all the texts together, and of the longest."""

    def count() -> tuple[int, int]:
        counts = tokens.count_texts(texts, model_id)
        return sum(counts), max(counts, default=0)

    return count() if sum(map(len, texts)) <= INLINE else await asyncio.to_thread(count)


async def count_reply(body: Mapping[str, Any], model_id: str) -> int:
    """Tokens that came out, in every choice: text and calls of tools."""
    said = [text for choice in body["choices"] for text in _said(choice["message"])]
    if sum(map(len, said)) <= INLINE:
        return sum(tokens.count_texts(said, model_id))
    return sum(await asyncio.to_thread(tokens.count_texts, said, model_id))


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    yield str(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        yield f"{function.get('name', '')}{function.get('arguments', '')}"
