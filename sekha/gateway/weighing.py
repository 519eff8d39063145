"""What a request is taken for against its key's tokens a minute, until its usage is known."""

from __future__ import annotations

import asyncio

from sekha import tokens
from sekha.chat import ChatRequest
from sekha.embedding import EmbedRequest
from sekha.gateway.serving import Serving
from sekha.keys import Pass
from sekha.pricing import ASSUMED_REPLY

__all__ = ["BYTES_PER_TOKEN", "reply_weight", "weighed_chat", "weighed_embedding"]

BYTES_PER_TOKEN = 4
"""Of a body, but for the data of images and files in it."""
_PER_IMAGE = 1_000
_PER_LOW_IMAGE = 85
_PER_FILE = 4_000
_ANY: tokens.TokenizerName = "cl100k_base"
"""Counts for whichever model it will be."""


def reply_weight(requested: int | None, replies: int = 1) -> tuple[int, int]:
    """Tokens that replies may take as the caller limits them, and those by a guess where he does not."""
    return (0, ASSUMED_REPLY * replies) if requested is None else (requested * replies, 0)


async def weighed_chat(serving: Serving, by: Pass, body: bytes, request: ChatRequest) -> Pass:
    """Let a chat in at what it may take: its words, its replies, and its images and files by a guess."""
    if by.limit is None:
        return by
    data, guess = 0, 0
    for kind, size, detail in request.data_parts:
        data += size
        guess += _PER_FILE if kind != "image_url" else _PER_LOW_IMAGE if detail == "low" else _PER_IMAGE
    words = (len(body) - data) // BYTES_PER_TOKEN
    replies, more = reply_weight(request.reply_limit, request.replies)
    if words + replies > by.limit.tokens_per_minute:
        # A body may be long by its escapes alone: it is counted before its caller is told that it never fits.
        count = tokens.count_words
        words = min(words, await asyncio.to_thread(count, request.messages, _ANY, options=request.options))
    return serving.keys.weigh(by, words + replies, guess + more)


async def weighed_embedding(serving: Serving, by: Pass, body: bytes, request: EmbedRequest) -> Pass:
    """Let an embedding in at what it may take."""
    if by.limit is None:
        return by
    words = len(body) // BYTES_PER_TOKEN
    if words > by.limit.tokens_per_minute:
        counts = await asyncio.to_thread(tokens.count_each, request.texts, _ANY)
        words = min(words, sum(counts))
    return serving.keys.weigh(by, words)
