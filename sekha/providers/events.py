"""Server-sent events of OpenAI's protocol: out of bytes as they come, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from sekha.providers.http import BadResponse

__all__ = ["DONE", "EventSplitter", "bodies", "finishes", "json_object", "payloads", "texts_in"]

DONE = b"[DONE]"
_EVENT_BYTES = 8 * 1024 * 1024


class EventSplitter:
    """Finds whole events, whatever pieces they come in; line ends of any sort become `\\n`."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._after_return = False

    def feed(self, data: bytes) -> bytes:
        """The events that are whole by now, as one block that ends where an event ends; maybe none.

        Raises `BadResponse` when one event is longer than eight megabytes.
        """
        if b"\r" in data or self._after_return:
            data = self._with_newlines(data)
        if not self._held and data.endswith(b"\n\n"):
            return data
        if data.startswith(b"\n") and self._held and self._held[-1].endswith(b"\n"):
            # The blank line itself came in two pieces.
            return self._take(b"\n") + self._split(data[1:])
        return self._split(data)

    def rest(self) -> bytes:
        """What is left with no blank line after it, where it is an event all the same: some write none at the end."""
        left = self._take(b"").strip(b"\n")
        payload = next(payloads(left), b"")
        return left + b"\n\n" if payload == DONE or json_object(payload) is not None else b""

    def _split(self, data: bytes) -> bytes:
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._hold(data)
            return b""
        whole = self._take(data[:end])
        self._hold(data[end:])
        return whole

    def _take(self, last: bytes) -> bytes:
        whole = b"".join([*self._held, last])
        self._held.clear()
        self._held_bytes = 0
        return whole

    def _hold(self, data: bytes) -> None:
        if data:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > _EVENT_BYTES:
                raise BadResponse(f"one event of it is longer than {_EVENT_BYTES:,} bytes")

    def _with_newlines(self, data: bytes) -> bytes:
        if self._after_return and data.startswith(b"\n"):
            data = data[1:]
        self._after_return = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def payloads(block: bytes) -> Iterator[bytes]:
    """What each event of a block carries; a comment carries nothing."""
    for event in block.split(b"\n\n"):
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield lines[0] if len(lines) == 1 else b"\n".join(lines)


def json_object(payload: bytes) -> dict[str, Any] | None:
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def bodies(block: bytes) -> Iterator[dict[str, Any]]:
    return (body for payload in payloads(block) if (body := json_object(payload)) is not None)


def finishes(block: bytes) -> bool:
    """Whether a choice of it says why it ends."""
    return b'"finish_reason"' in block and any(choice.get("finish_reason") for choice in _choices(block))


def texts_in(blocks: Sequence[bytes]) -> list[str]:
    """What was said, in every choice: text, thoughts and calls of tools."""
    return [text for block in blocks for choice in _choices(block) for text in _said(choice.get("delta"))]


def _choices(block: bytes) -> Iterator[dict[str, Any]]:
    for body in bodies(block):
        choices = body.get("choices")
        yield from (choice for choice in choices if isinstance(choice, dict)) if isinstance(choices, list) else ()


def _said(delta: object) -> Iterator[str]:
    if not isinstance(delta, dict):
        return
    for name in ("content", "reasoning_content", "reasoning", "refusal"):
        if isinstance(text := delta.get(name), str):
            yield text
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield f"{function.get('name') or ''}{function.get('arguments') or ''}"
