"""Counting tokens without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import orjson

from sekha import tokens
from sekha.asks import Count, Counter
from sekha.chat import ChatRequest
from sekha.images import Formula, formula_of
from sekha.providers.events import said_in
from sekha.registry import Registry
from sekha.steps.parts import largest_of

__all__ = ["INLINE", "Counters", "count_chat", "count_embedding", "count_reply"]

INLINE = 20_000
"""Characters up to which counting is quicker than a thread."""


class _Way(NamedTuple):
    tokenizer: tokens.TokenizerName
    formula: Formula | None


class Counters:
    """How the models of a registry count: many models, few tokenizers and image formulas."""

    def __init__(self, registry: Registry) -> None:
        self._ids = list(dict.fromkeys(model.id for model in registry))
        self._ways: dict[str, _Way] = {}

    @cached_property
    def of_words(self) -> Mapping[str, Counter]:
        """Model id → what counts it where there are no images."""
        return {model_id: self._counter(model_id, None) for model_id in self._ids}

    @cached_property
    def of_images(self) -> Mapping[str, Counter]:
        """Model id → what counts it where there are images."""
        return {model_id: self._counter(model_id, formula_of(model_id)) for model_id in self._ids}

    def _counter(self, model_id: str, formula: Formula | None) -> Counter:
        tokenizer = tokens.tokenizer_of(model_id)
        name = tokenizer.name if formula is None else f"{tokenizer.name}, {formula}"
        self._ways[name] = _Way(tokenizer.name, formula)
        return Counter(name, tokenizer.exact)

    def tokenizer(self, name: str) -> tokens.TokenizerName:
        """The tokenizer of a counter."""
        return self._ways[name].tokenizer

    def count_short(self, request: ChatRequest, names: Sequence[str]) -> dict[str, Count] | None:
        """What each of these counters makes of a chat; None for one that is better counted in a thread."""
        if not _is_short(request):
            return None
        if len(names) == 1 and self._ways[names[0]].formula is None:
            tokenizer = self._ways[names[0]].tokenizer
            return {names[0]: Count(tokens.count_words(request.messages, tokenizer, options=request.options))}
        return self._count(request, names)

    async def count_long(self, request: ChatRequest, names: Sequence[str]) -> dict[str, Count]:
        return await asyncio.to_thread(self._count, request, names)

    def _count(self, request: ChatRequest, names: Sequence[str]) -> dict[str, Count]:
        """Words are counted once by each tokenizer, and images read once for all formulas."""
        ways = [self._ways[name] for name in names]
        tokenizers = dict.fromkeys(way.tokenizer for way in ways)
        words = {name: tokens.count_words(request.messages, name, options=request.options) for name in tokenizers}
        images = tokens.images_in(request.messages) if any(way.formula for way in ways) else []
        return {
            name: Count(
                words[way.tokenizer] + sum(way.formula.tokens(image, detail) for image, detail in images)
                if way.formula
                else words[way.tokenizer]
            )
            for name, way in zip(names, ways, strict=True)
        }

    async def count_texts(
        self, texts: Sequence[str], names: Sequence[str], at_once: int | None = None
    ) -> tuple[dict[str, Count], int]:
        """What each of these counters makes of texts to embed, and the most that any makes of `at_once` of them."""

        def count() -> tuple[dict[str, Count], int]:
            made: dict[str, Count] = {}
            largest = 0
            for name in names:
                each = tokens.count_each(texts, self._ways[name].tokenizer)
                made[name] = Count(sum(each), max(each, default=0))
                if at_once is not None:
                    largest = max(largest, largest_of(each, at_once))
            return made, largest

        return count() if sum(map(len, texts)) <= INLINE else await asyncio.to_thread(count)


def _is_short(request: ChatRequest) -> bool:
    """Whether counting it takes no longer than handing it to a thread would."""
    characters = 0
    for message in request.messages:
        content = message.get("content")
        if isinstance(content, str):
            characters += len(content)
        else:
            characters += sum(map(_characters, content or ()))
        if len(message) > 2:
            characters += sum(_length(value) for name, value in message.items() if name != "content")
        if characters > INLINE:
            return False
    return not request.options or characters + _prompted(request.options) <= INLINE


def _prompted(options: Mapping[str, Any]) -> int:
    return sum(_length(value) for name, value in options.items() if name not in tokens.NOT_IN_PROMPT)


def _length(value: object) -> int:
    """About how many characters are to be counted of it."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, Mapping | list | tuple):
        return 0
    try:
        return len(orjson.dumps(value, default=str))
    except orjson.JSONEncodeError:
        return 0  # it is refused when it is counted


def _characters(part: Mapping[str, Any]) -> int:
    kind = part.get("type")
    if isinstance(kind, str) and kind in tokens.MEDIA:
        return 0  # nobody reads it here
    if kind not in ("image_url", "text"):
        return _length(part)
    if (text := part.get("text")) is not None:
        return len(text)
    image = part.get("image_url")
    return len(image.get("url", "") if isinstance(image, Mapping) else str(part))


async def count_chat(request: ChatRequest, model_id: str) -> int:
    """Tokens that go in: messages, images and tools."""

    def count() -> int:
        return tokens.count_messages(request.messages, model_id, options=request.options)

    return count() if _is_short(request) else await asyncio.to_thread(count)


async def count_embedding(texts: Sequence[str], model_id: str) -> tuple[int, int]:
    """Tokens of all the texts together, and of the longest."""

    def count() -> tuple[int, int]:
        counts = tokens.count_texts(texts, model_id)
        return sum(counts), max(counts, default=0)

    return count() if sum(map(len, texts)) <= INLINE else await asyncio.to_thread(count)


async def count_reply(body: Mapping[str, Any], model_id: str) -> int:
    """Tokens that came out, in every choice: text, thoughts and calls of tools."""
    said = [text for choice in body["choices"] for text in said_in(choice["message"])]
    if sum(map(len, said)) <= INLINE:
        return sum(tokens.count_texts(said, model_id))
    return sum(await asyncio.to_thread(tokens.count_texts, said, model_id))
