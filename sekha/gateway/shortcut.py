"""The short way of an ordinary chat, from a caller's bytes to a provider's and back, without a task of its own.

The line of steps in `sekha/chat.py` is what a request goes through. Of a hundred requests ninety-nine need the same
of it: a model, a closed circuit, money in this process's slice, a connection that lies idle, and a whole answer.
For these every step's decision is a comparison, and nearly all of their time went into getting from step to step. So
they are done here in two moments, when the request is here and when the answer is, by the same sums, the same ledger
and the same counts.

Whatever is not ordinary is none of this file's business. Before anything was sent, `begin` says so and nothing has
happened. Afterwards the request is handed over to the line as it stands, with its hold and its call under way: what
is retried, refused, charged and told when something goes wrong is written there, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import orjson

from sekha.asks import Ask, Size
from sekha.chat import MOST_TOKENS, REPLY_LIMITS, thinking_of
from sekha.errors import SekhaError
from sekha.gateway.begun import BegunAnswer, BegunStream
from sekha.gateway.begun_embeddings import BegunEmbedding
from sekha.gateway.lanes import Junction, Lane, lane_of
from sekha.gateway.serving import Serving
from sekha.gateway.weighing import BYTES_PER_TOKEN, reply_weight
from sekha.gateway.wire import MOST_DIMENSIONS
from sekha.registry import Task
from sekha.steps.counting import INLINE
from sekha.tokens import count_each, count_plain

if TYPE_CHECKING:
    from sekha.gateway.app import Gateway
    from sekha.gateway.http_server import HttpExchange

__all__ = ["Shortcut"]

_ORDINARY = frozenset(
    {
        "model",
        "messages",
        "stream",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "reasoning_effort",
        "seed",
        "stop",
        "stream_options",
        "user",
        "verbosity",
    }
)
"""Fields that are passed on as they are, or that are read here. Any other may mean something to the line."""
_ORDINARY_EMBEDDING = frozenset({"model", "input", "encoding_format", "dimensions", "user"})
_ENCODINGS = (None, "float", "base64")
_LANES = 1_000
"""Remembered at once: callers name models freely."""


class Shortcut:
    """Begins ordinary chats under one configuration."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._lanes: dict[tuple[bytes | None, str, str], Lane | Junction | None] = {}
        """By the caller's header, the model that is asked for, and for what; None where there is no short way."""
        # What is remembered is written down before an answer goes out, and content is read from the request.
        self._open = serving.leased is not None and serving.memory is None and not serving.records_content

    def begin(self, gateway: Gateway, x: HttpExchange, body: bytes) -> bool:
        """Send an ordinary chat to its provider. False, and nothing has happened, for any other request."""
        if not self._open:
            return False
        began = perf_counter()
        given = _object_of(body, _ORDINARY)
        if given is None:
            return False
        asked, stream = given.get("model"), given.get("stream")
        if type(asked) is not str or not (stream is None or type(stream) is bool):
            return False
        options = given.get("stream_options")
        if options is not None and (not stream or not _is_plain(options)):
            return False
        found = self._lanes.get((x.authorization, asked, "chat")) or self._lane(x.authorization, asked, "chat")
        if found is None:
            return False
        requested, bounded = _limit_in(given)
        if not bounded:
            return False
        messages = given.get("messages")
        if isinstance(found, Lane):
            lane, fork, counted = found, None, count_plain(messages, found.tokenizer, most=INLINE)
            if counted is None:
                return False
            tokens = counted
        else:
            counts = found.count(lambda tokenizer: count_plain(messages, tokenizer, most=INLINE))
            size_of = Size(found.ask, reply_limit=requested, thinking=thinking_of(given))
            fork = None if counts is None else found.fork(size_of, counts)
            if fork is None:
                return False
            lane, tokens = fork.lane, fork.plan.first.estimate.input_tokens
        size = 0
        if lane.by.limit is not None:
            replies, guess = reply_weight(requested)
            size = lane.by.room(len(body) // BYTES_PER_TOKEN + replies, guess)
        kind = BegunStream if stream else BegunAnswer
        return kind(gateway, self._serving, x, lane, given, began, fork).send(requested, tokens, size)

    def begin_embedding(self, gateway: Gateway, x: HttpExchange, body: bytes) -> bool:
        """The same for an ordinary embedding."""
        if not self._open:
            return False
        began = perf_counter()
        given = _object_of(body, _ORDINARY_EMBEDDING)
        if given is None:
            return False
        asked, texts, dimensions = given.get("model"), given.get("input"), given.get("dimensions")
        texts = [texts] if type(texts) is str else texts
        if type(asked) is not str or not _are_plain(texts) or given.get("encoding_format") not in _ENCODINGS:
            return False
        if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= MOST_DIMENSIONS):
            return False
        found = self._lanes.get((x.authorization, asked, "embedding"))
        found = found or self._lane(x.authorization, asked, "embedding")
        if found is None:
            return False
        if len(texts) > found.texts:
            return False
        if isinstance(found, Lane):
            lane, fork = found, None
        else:
            fork = found.fork(Size(found.ask), found.count_texts(texts))
            if fork is None:
                return False
            lane = fork.lane
        counts = count_each(texts, lane.tokenizer)
        return BegunEmbedding(gateway, self._serving, x, lane, given, began, fork).embed(
            texts, counts, len(body) // BYTES_PER_TOKEN
        )

    def _lane(
        self, authorization: bytes | None, asked: str, kind: Literal["chat", "embedding"]
    ) -> Lane | Junction | None:
        if (authorization, asked, kind) in self._lanes:
            return None
        serving = self._serving
        resources = serving.resources
        try:
            by = serving.keys.known(authorization)
            by.check(resources.registry, asked, None)
        except SekhaError:
            return None
        task: Task | None = None if kind == "chat" else "embedding"
        ask = Ask(kind, asked, task, key=by.key, allowed=by.allowed)
        known = serving.runtime.money.known(ask)
        if known is None:
            return None  # the first of its kind is met in the line
        if len(self._lanes) >= _LANES:
            self._lanes.clear()
        lane = self._lanes[authorization, asked, kind] = lane_of(serving, ask, by, known)
        return lane


def _object_of(body: bytes, fields: frozenset[str]) -> dict[str, Any] | None:
    """The JSON object of a body that has no other fields than these."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return given if type(given) is dict and fields.issuperset(given) else None


def _limit_in(given: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The tokens that a reply may have, None for as many as there are; and whether they are said as they have to be."""
    requested: int | None = None
    for name in REPLY_LIMITS:
        if (limit := given.get(name)) is not None:
            if type(limit) is not int or not 1 <= limit <= MOST_TOKENS:
                return None, False
            requested = limit if requested is None else min(limit, requested)
    return requested, True


def _is_plain(options: object) -> bool:
    """Whether these options of a stream say nothing but whether it is to end with its usage."""
    return type(options) is dict and [*options] == ["include_usage"] and type(options["include_usage"]) is bool


def _are_plain(texts: object) -> TypeGuard[list[str]]:
    """Whether these are texts, none of them empty, and short enough to be counted at once."""
    if type(texts) is not list or not texts:
        return False
    characters = 0
    for text in texts:
        if type(text) is not str or not text:
            return False
        characters += len(text)
    return characters <= INLINE
