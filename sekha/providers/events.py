"""Server-sent events of OpenAI's protocol: out of bytes as they come, and what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from math import isfinite
from typing import Any

import orjson

from sekha.providers.http import BadResponse

__all__ = [
    "COUNTED",
    "DONE",
    "ERROR",
    "EventSplitter",
    "as_events",
    "bodies",
    "body_in",
    "endings",
    "error_in",
    "is_plain",
    "is_sound",
    "json_object",
    "payloads",
    "said_in",
    "says_something",
    "sound_in",
    "texts_in",
]

DONE = b"[DONE]"
ERROR = b'"error"'
COUNTED = b'_tokens"'
"""No usage of a chat is without it, be it half of one."""
_EVENT_BYTES = 8 * 1024 * 1024
_NOBODY: Mapping[str, bool] = {}
# A field that nobody knows means nothing, but for the `error:` that some write in place of an event, and for `Data:`,
# whose writer meant something by it.
_LINE = re.compile(rb"data:|(?!(?i:[\w.]*error|data):)[A-Za-z][\w.-]*:|:|(data|event|id|retry)?\s*$")
_NOTHING = (b"", b"[]", b"null")


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
        return left + b"\n\n" if _carries(payload) else b""

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
    """What each event of a block carries, without blanks around it; a comment carries nothing."""
    for event in block.split(b"\n\n"):
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield lines[0] if len(lines) == 1 else b"\n".join(lines).strip()


def is_sound(block: bytes) -> bool:
    """Whether a block is text, each line of it one that events are made of, and what its events carry JSON."""
    return _is_text(block) and all(map(_is_event, block.split(b"\n\n")))


def sound_in(block: bytes) -> tuple[bytes, bool]:
    """A block without its events of nothing, until the first that is not sound, and whether there is none such."""
    events = [event for event in block.split(b"\n\n") if event and not _is_of_nothing(event)]
    sound = list(takewhile(is_sound, events))
    return b"".join(event + b"\n\n" for event in sound), len(sound) == len(events)


def is_plain(block: bytes) -> bool:
    """Whether a block is sound and has neither an error nor usage in it, as nearly all are; False says nothing."""
    if not (block.startswith(b"data: {") and block.endswith(b"}\n\n") and _is_text(block)):
        return False
    events = block.count(b"}\n\ndata: {") + 1
    return block.count(b"\n") == 2 * events and _is_closed(block) and ERROR not in block and COUNTED not in block


def _is_closed(data: bytes) -> bool:
    """Whether JSON was not cut, by its braces, since reading all of it takes several times as long.

    False says nothing: text may hold braces too.
    """
    return data.count(b"{") == data.count(b"}")


def _is_text(data: bytes) -> bool:
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
    return True


def _is_event(event: bytes) -> bool:
    if event.startswith(b"data:") and b"\n" not in event:
        payload = event[5:].strip()
        return (payload.startswith(b"{") and payload.endswith(b"}") and _is_closed(payload)) or _carries(payload)
    if not all(map(_LINE.match, event.split(b"\n"))):
        return False
    return _names_an_error(event) or all(map(_carries, payloads(event)))


def _is_of_nothing(event: bytes) -> bool:
    """Whether an event carries nothing, as some do to keep a connection alive; clients stumble over it."""
    payload = next(payloads(event), None)
    return payload in _NOTHING and is_sound(event.replace(b"data:", b":")) and not _names_an_error(event)


def error_in(event: bytes, body: Mapping[str, Any] | None) -> object:
    """What an event says went wrong: its `error`, or all that it carries where it is one by name; None of others."""
    if body is not None and ((error := body.get("error")) or body.get("object") == "error"):
        return error or body
    if _names_an_error(event):
        return next(payloads(event), b"").decode(errors="replace") if body is None else body
    return None


def _names_an_error(event: bytes) -> bool:
    return b"event:" in event and any(
        line.startswith(b"event:") and line[6:].strip() == b"error" for line in event.split(b"\n")
    )


def _carries(payload: bytes) -> bool:
    return payload == DONE or body_in(payload) is not None


def json_object(payload: bytes) -> dict[str, Any] | None:
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def body_in(payload: bytes) -> dict[str, Any] | None:
    """The object that an event carries, also where some clients take it and others do not; it can be written again.

    So half of a pair of surrogates becomes a question mark, a number that is none becomes None, and a tab may stand
    in a text as it is.
    """
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        body = _loosely_read(payload)
    return body if isinstance(body, dict) else None


def _loosely_read(payload: bytes) -> object:
    try:
        read = json.loads(payload.decode(), strict=False, parse_float=_number, parse_constant=_number)
        return orjson.loads(json.dumps(read, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _number(written: str) -> float | None:
    number = float(written)
    return number if isfinite(number) else None


def bodies(block: bytes) -> Iterator[dict[str, Any]]:
    return (body for payload in payloads(block) if (body := body_in(payload)) is not None)


def as_events(answer: Mapping[str, Any]) -> bytes:
    """A whole answer as the stream that says the same at once; each of its choices has its message."""
    choices = []
    for at, choice in enumerate(answer["choices"]):
        said = {name: value for name, value in choice.items() if name != "message"}
        choices.append({"index": at, "finish_reason": None} | said | {"delta": _delta_of(choice["message"])})
    chunk = {**answer, "object": "chat.completion.chunk", "choices": choices}
    return b"data: %b\n\ndata: %b\n\n" % (orjson.dumps(chunk), DONE)


def _delta_of(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Clients put the calls of a stream together by an index, which those of a whole answer lack."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    numbered = [call | {"index": at} if isinstance(call, dict) else call for at, call in enumerate(calls)]
    return {**message, "tool_calls": numbered}


def says_something(body: Mapping[str, Any]) -> bool:
    """Whether a chunk carries a token, or says why there are no more; the first often but names who speaks."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return bool(body.get("usage"))
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        if choice.get("finish_reason"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict):
            for name, value in delta.items():  # for each stream, and a generator takes three times as long
                if value and name != "role":
                    return True
    return False


def endings(blocks: Sequence[bytes], known: Mapping[str, bool] = _NOBODY) -> dict[str, bool]:
    """Whether each choice said why it ends, by its index; with what is known of the blocks before."""
    ended = dict(known)
    for block in blocks:
        for choice in _choices(block):
            index = str(choice.get("index") or 0)
            ended[index] = ended.get(index, False) or bool(choice.get("finish_reason"))
    return ended


def texts_in(blocks: Sequence[bytes]) -> list[str]:
    """What was said, in every choice: text, thoughts and calls of tools."""
    return [text for block in blocks for choice in _choices(block) for text in said_in(choice.get("delta"))]


def _choices(block: bytes) -> Iterator[dict[str, Any]]:
    for body in bodies(block):
        choices = body.get("choices")
        yield from (choice for choice in choices if isinstance(choice, dict)) if isinstance(choices, list) else ()


def said_in(message: object) -> Iterator[str]:
    """What a message says, or a piece of one: text, thoughts, a refusal and calls of tools."""
    if not isinstance(message, Mapping):
        return
    thoughts = message.get("reasoning_content") or message.get("reasoning")  # some write the same under both names
    for said in (message.get("content"), thoughts, message.get("refusal")):
        yield from _texts(said)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        if isinstance(call, Mapping):
            yield from _called(call.get("function"))
            yield from _called(call.get("custom"))
    yield from _called(message.get("function_call"))


def _texts(said: object) -> Iterator[str]:
    """A text, or those of its parts: some providers write thoughts so."""
    if isinstance(said, str):
        yield said
        return
    for part in said if isinstance(said, list | tuple) else ():
        if isinstance(part, Mapping):
            yield from _texts(part.get("text"))
            yield from _texts(part.get("thinking"))


def _called(called: object) -> Iterator[str]:
    if isinstance(called, Mapping):
        yield "".join(str(called.get(name) or "") for name in ("name", "arguments", "input"))
