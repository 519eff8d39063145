"""What the answers mean that LiteLLM makes of other providers', in OpenAI's shape.

What LiteLLM makes up (usage that it counted itself, a `stop` for a stream that broke off) is taken out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from sekha.pricing import MOST_TOKENS, Usage
from sekha.providers.base import Chunk, openai_usage
from sekha.providers.reports import with_the_rest
from sekha.registry import Model

__all__ = [
    "Thoughts",
    "choice_of",
    "chunk_of",
    "ended",
    "envelope_of",
    "finishes",
    "number_calls",
    "usage_of",
    "went_in_of",
]


def envelope_of(reply: Any, model: Model, kind: str) -> dict[str, Any]:
    envelope = {"id": reply.id, "object": kind, "created": reply.created, "model": model.id}
    fingerprint = getattr(reply, "system_fingerprint", None)
    return envelope | ({"system_fingerprint": fingerprint} if fingerprint else {})


def choice_of(choice: Any) -> dict[str, Any]:
    message = choice.message.model_dump(exclude_none=True)
    message.pop("provider_specific_fields", None)
    body = {"index": choice.index, "message": {"content": None} | message, "finish_reason": choice.finish_reason}
    logprobs = getattr(choice, "logprobs", None)
    return body | ({"logprobs": _plain(logprobs)} if logprobs else {})


def chunk_of(piece: Any, pieces: Any, envelope: dict[str, Any]) -> Chunk | None:
    if getattr(piece, "usage", None) is not None:
        # LiteLLM closes with a sum that is its own count where no piece of the provider's carried one.
        reports = [usage for each in pieces.chunks if (usage := getattr(each, "usage", None)) is not None]
        usage = usage_of(piece.usage, total=max(map(_total, reports))) if reports else None
        return Chunk(body=envelope | {"choices": [], "usage": openai_usage(usage)}, usage=usage) if usage else None
    choices = []
    for choice in piece.choices:
        delta = choice.delta.model_dump(exclude_none=True)
        delta.pop("provider_specific_fields", None)
        body = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
        logprobs = getattr(choice, "logprobs", None)
        choices.append(body | ({"logprobs": _plain(logprobs)} if logprobs else {}))
    return Chunk(body=envelope | {"choices": choices}) if choices else None


def went_in_of(pieces: Any) -> Usage | None:
    """What went in, from the piece with which Anthropic begins; that what came out is more than it says there."""
    usage = next((usage for piece in pieces.chunks if (usage := usage_of(getattr(piece, "usage", None)))), None)
    return usage and replace(usage, output_tokens=0)


def number_calls(chunk: Chunk, before: int) -> int:
    """Give each call of a tool the next index, and an id if it has none; return how many there were by now.

    Ollama writes a call whole and none twice, but LiteLLM counts anew in each chunk; what has one index is one call.
    Nor does it give an id to a call without arguments, whose result then could not be sent back.
    """
    for choice in chunk.body["choices"]:
        for call in choice["delta"].get("tool_calls") or ():
            call["index"] = before
            call["id"] = call.get("id") or f"call_{uuid4()}"
            before += 1
    return before


class Thoughts:
    """The blocks of thought in a stream, which go out whole beside what ends it.

    LiteLLM hands them on in pieces. OpenAI's SDK for Python joins the pieces of such a list by an `index` in each, the
    one for Node keeps the last list alone: only a list that is whole and comes once is right for both. What is thought
    can be read as it comes all the same, in `reasoning_content`.
    """

    __slots__ = ("_blocks", "_open")

    def __init__(self) -> None:
        self._blocks: dict[int, list[list[dict[str, Any]]]] = {}
        """Choice → the pieces of each of its blocks."""
        self._open: set[int] = set()
        """Choices whose last block goes on."""

    def gather(self, chunk: Chunk) -> None:
        """Take the pieces out of a chunk, and put the blocks into the one that says why its choice ends."""
        for choice in chunk.body["choices"]:
            at, delta = choice["index"], choice["delta"]
            for piece in delta.pop("thinking_blocks", ()):
                self._add(at, piece)
            if delta.get("content") or delta.get("tool_calls"):
                # A block that nobody signed ends as something else is said.
                self._open.discard(at)
            if choice["finish_reason"] and at in self._blocks:
                delta["thinking_blocks"] = [_joined(pieces) for pieces in self._blocks.pop(at)]

    def _add(self, at: int, piece: dict[str, Any]) -> None:
        blocks, thinks = self._blocks.setdefault(at, []), piece.get("type") == "thinking"
        if thinks and at in self._open:
            blocks[-1].append(piece)
        else:
            blocks.append([piece])
        # A signature is the last of its block, and what was redacted comes in one piece.
        if thinks and not piece.get("signature"):
            self._open.add(at)
        else:
            self._open.discard(at)


def _joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    block = {name: value for piece in pieces for name, value in piece.items()}
    text = "".join(piece.get("thinking") or "" for piece in pieces)
    return block | {"thinking": text} if "thinking" in block else block


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def ended(pieces: Any) -> bool:
    """Whether the provider itself said how it finished; LiteLLM says `stop` for one that did not."""
    return pieces.received_finish_reason is not None or pieces.intermittent_finish_reason is not None


def finishes(chunk: Chunk) -> bool:
    return any(choice["finish_reason"] for choice in chunk.body["choices"]) or chunk.usage is not None


def usage_of(reported: Any, *, total: int = 0, replies: bool = True) -> Usage | None:
    """LiteLLM writes zeros where nothing was reported. No real call takes no tokens, or more than any model could.

    The `total` is the most that was reported before LiteLLM added it up anew. Where there are no `replies`, all of it
    went in.
    """
    if reported is None:
        return None
    went_in, came_out = reported.prompt_tokens or 0, reported.completion_tokens or 0
    details = getattr(reported, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None) or getattr(reported, "cache_read_input_tokens", None)
    written = getattr(reported, "cache_creation_input_tokens", None)
    if (total := max(total, _total(reported))) > went_in + came_out:
        if went_in and replies:
            thought = getattr(getattr(reported, "completion_tokens_details", None), "reasoning_tokens", None) or 0
            from_cache = (cached or 0) + (written or 0)
            went_in, came_out = with_the_rest(went_in, came_out, total, cached=from_cache, thought=thought)
        else:
            went_in = total - came_out
    if not 0 < went_in + came_out <= MOST_TOKENS:
        return None
    return Usage(
        input_tokens=went_in,
        output_tokens=came_out,
        cached_tokens=cached or 0,
        cache_write_tokens=written or 0,
    )


def _total(reported: Any) -> int:
    total = getattr(reported, "total_tokens", None)
    return total if isinstance(total, int) else 0
