"""A provider that needs no key and no network: hashed n-gram embeddings and a chat that echoes.

It is for first runs and tests, and says so. The embeddings are real ones, of modest quality: texts
that share words and parts of words come out near each other.
"""

from __future__ import annotations

import asyncio
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sekha.errors import DimensionMismatch, ModelNotFound, ProviderRejected
from sekha.pricing import Usage
from sekha.providers.base import ChatCall, Chunk, Completion, Embeddings
from sekha.registry import Model, ProviderSpec
from sekha.vectors.base import Vector

__all__ = ["ECHO", "HASHED", "HASHED_VERSION", "BuiltinProvider", "hashed_embeddings"]

ECHO = "echo"
HASHED = "hashed-"
"""Embedding models are named `hashed-768`, `hashed-1536`: any dimension."""
HASHED_VERSION = 1
"""Part of every hash. Vectors of two versions do not compare, so another version needs another name
than `hashed-` as well, by which stored vectors are told apart."""

_WORD = re.compile(r"\w+")
_CACHED_WORDS = 50_000
_LONGEST_CACHED = 40
_TEXTS_AT_ONCE = 64

_Features = npt.NDArray[np.uint64]


class BuiltinProvider:
    def __init__(self, spec: ProviderSpec) -> None:
        self._spec = spec

    async def complete(self, call: ChatCall) -> Completion:
        text, usage, reason = self._echo(call)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        body = _body(call, "chat.completion", choice)
        return Completion(body=body | {"usage": _openai_usage(usage)}, usage=usage)

    async def stream(self, call: ChatCall) -> AsyncIterator[Chunk]:
        text, usage, reason = self._echo(call)
        role: dict[str, Any] = {"role": "assistant"}
        for piece in re.findall(r"\S+\s*|\s+", text):
            yield Chunk(body=_chunk(call, role | {"content": piece}, None))
            role = {}
        yield Chunk(body=_chunk(call, role, reason) | {"usage": _openai_usage(usage)}, usage=usage)

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:  # noqa: ARG002
        dimension = self._dimension(model)
        vectors = await asyncio.to_thread(hashed_embeddings, texts, dimension)
        return Embeddings(vectors=vectors, usage=Usage(input_tokens=sum(len(text.split()) for text in texts)))

    async def aclose(self) -> None:
        pass

    def _echo(self, call: ChatCall) -> tuple[str, Usage, str]:
        if call.model.id != ECHO:
            raise self._unknown(call.model)
        words = sum(len(_text(message.get("content")).split()) for message in call.messages)
        said = [_text(message.get("content")) for message in call.messages if message.get("role") == "user"]
        if not said:
            raise ProviderRejected(
                "there is no user message to repeat", provider_id=self._spec.id, model_id=call.model.id
            )
        reply = (
            "I am Sekha's builtin echo model, and I only repeat your last message. "
            f"Name a real provider in sekha.yaml for real answers. You said: {said[-1]}"
        )
        reason = "stop"
        limit = call.options.get("max_completion_tokens") or call.options.get("max_tokens")
        if isinstance(limit, int) and len(reply.split()) > limit:
            reply = " ".join(reply.split()[:limit])
            reason = "length"
        return reply, Usage(input_tokens=words, output_tokens=len(reply.split())), reason

    def _dimension(self, model: Model) -> int:
        name = model.id.removeprefix(HASHED)
        if name == model.id or not name.isdecimal() or int(name) == 0:
            raise self._unknown(model)
        if model.dimension not in (None, int(name)):
            raise DimensionMismatch(
                wanted=model.dimension, returned=int(name), provider_id=self._spec.id, model_id=model.id
            )
        return int(name)

    def _unknown(self, model: Model) -> ModelNotFound:
        return ModelNotFound(
            f"it has {ECHO!r} for chat, and {HASHED + '768'!r} or any other dimension for embeddings",
            provider_id=self._spec.id,
            model_id=model.id,
        )


def hashed_embeddings(texts: Sequence[str], dimension: int) -> Vector:
    """Embed each text as its hashed words, pairs of words, and 3 to 5 letters within words.

    The same text has the same vector in every process, on every platform: weights are whole numbers,
    so that no sum depends on its order. A text without a word ("!!!", "") is hashed whole, to one
    coordinate; so no vector is zero. All have unit length.
    """
    vectors = np.empty((len(texts), dimension), dtype=np.float32)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        batch = texts[start : start + _TEXTS_AT_ONCE]
        vectors[start : start + len(batch)] = _embed(batch, dimension)
    return vectors


def _embed(texts: Sequence[str], dimension: int) -> Vector:
    found: list[_Features] = []
    counts: list[npt.NDArray[np.int64]] = []
    sizes: list[int] = []
    for text in texts:
        features, times = _features(text)
        found.append(features)
        counts.append(times)
        sizes.append(len(features))
    rows = np.repeat(np.arange(len(texts), dtype=np.uint64), sizes)
    features = np.concatenate(found)
    # One sort brings the same feature of the same text together: its row above its 40 bits.
    keys = (rows << np.uint64(40)) | features
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    times = np.add.reduceat(np.concatenate(counts)[order], first)
    keys = keys[first]
    weights = _WEIGHTS[np.minimum(times, _MOST_TIMES)]
    mixed = _mix(keys & _FEATURE_BITS)
    column = ((mixed >> np.uint64(32)) * np.uint64(dimension)) >> np.uint64(32)
    signed = np.where(mixed & np.uint64(1), weights, -weights)
    cells = (keys >> np.uint64(40)) * np.uint64(dimension) + column
    sums = np.bincount(cells.astype(np.intp), weights=signed, minlength=len(texts) * dimension)
    vectors = sums.reshape(len(texts), dimension)
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    for row in np.flatnonzero(lengths == 0).tolist():  # opposite signs may meet in one coordinate and cancel out
        vectors[row, zlib.crc32(texts[row].encode(errors="replace")) % dimension] = lengths[row] = 1.0
    return np.asarray(vectors / lengths[:, None], dtype=np.float32)


def _features(text: str) -> tuple[_Features, npt.NDArray[np.int64]]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:
        whole = zlib.crc32(text.encode(errors="replace"))
        return np.array([_WORDS_KIND | whole], dtype=np.uint64), np.ones(1, dtype=np.int64)
    distinct = Counter(words)
    arrays = [_features_of(word) for word in distinct]
    times = np.repeat(
        np.fromiter(distinct.values(), dtype=np.int64, count=len(distinct)), [len(array) for array in arrays]
    )
    if len(words) == 1:
        return np.concatenate(arrays), times
    place = {word: at for at, word in enumerate(distinct)}
    heads = np.array([array[0] for array in arrays], dtype=np.uint64)[[place[word] for word in words]]
    pairs = _mix(heads[:-1] * _PAIR_FACTOR + heads[1:]) >> np.uint64(32) | np.uint64(_PAIRS_KIND)
    return np.concatenate([*arrays, pairs]), np.concatenate([times, np.ones(len(pairs), dtype=np.int64)])


def _features_of(word: str) -> _Features:
    """The word itself first, then its runs of letters with its two ends marked."""
    if (cached := _word_features.get(word)) is not None:
        return cached
    marked = f"<{word}>"
    runs = [
        _RUNS_KIND | zlib.crc32(marked[at : at + length].encode(errors="replace"), HASHED_VERSION)
        for length in (3, 4, 5)
        for at in range(len(marked) - length + 1)
    ]
    head = _WORDS_KIND | zlib.crc32(word.encode(errors="replace"), HASHED_VERSION)
    features = np.array([head, *runs], dtype=np.uint64)
    if len(word) <= _LONGEST_CACHED:
        if len(_word_features) >= _CACHED_WORDS:
            _word_features.clear()
        _word_features[word] = features
    return features


def _mix(values: _Features) -> _Features:
    # The finalizer of MurmurHash3: CRC-32 alone is linear, and its low bits are no coin.
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


_word_features: dict[str, _Features] = {}
_WORDS_KIND, _PAIRS_KIND, _RUNS_KIND = 0 << 38, 1 << 38, 2 << 38
_PAIR_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FEATURE_BITS = np.uint64((1 << 40) - 1)
_MOST_TIMES = 1000


# Rounded to whole numbers: then every sum is exact, whatever the order and the machine.
_WEIGHTS = np.array(
    [0, *(round(1024 * (1 + math.log(times))) for times in range(1, _MOST_TIMES + 1))], dtype=np.float64
)


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [str(part.get("text", "")) for part in content if isinstance(part, Mapping)]
        return " ".join(text for text in texts if text)
    return ""


def _body(call: ChatCall, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-echo",
        "object": kind,
        "created": 0,
        "model": call.model.id,
        "choices": [{"index": 0} | choice],
    }


def _chunk(call: ChatCall, delta: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return _body(call, "chat.completion.chunk", {"delta": dict(delta), "finish_reason": finish_reason})


def _openai_usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
