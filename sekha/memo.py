"""One answer to remember: what of it is written down at once, and what is read out of that later."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import orjson

from sekha.outbox import Item
from sekha.providers.events import bodies

if TYPE_CHECKING:
    from sekha.vectors.base import Vector

__all__ = [
    "TEXT_BYTES",
    "Memo",
    "answer_in",
    "cut",
    "decode",
    "encode",
    "exchange",
    "question_in",
    "streamed_in",
    "vectors_in",
]

TEXT_BYTES = 32_000
"""The longest text that is kept."""
EVENTS_AT_ONCE = 64 * 1024
"""Bytes of a stream that are read before others get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memo:
    """One answer to remember."""

    id: str
    """Of the run that it is from."""
    kind: Literal["chat", "embedding"]
    at: float
    """Seconds since the epoch."""
    provider_id: str
    model_id: str
    collection: str | None = None
    """Where it is to be kept; None in an outbox of before memos said so, for the one that remembers now."""
    key: str | None = None
    tags: tuple[str, ...] = ()
    texts: tuple[str, ...] = field(repr=False)
    """Of a chat the question and, unless it was streamed, the answer; else what was embedded."""
    error: str | None = None
    """The code of why it could not be kept, once it is given up."""
    said: bytes = field(default=b"", repr=False)
    """The events of a streamed answer, or the vectors in OpenAI's JSON."""


# --- as they lie in an outbox --------------------------------------------------------------

_HEAD = tuple(each.name for each in fields(Memo) if each.name != "said")


def encode(memo: Memo) -> Item:
    head = {name: getattr(memo, name) for name in _HEAD}
    try:
        return Item(orjson.dumps(head), memo.said)
    except TypeError:  # half a surrogate, which no store would take either
        head["texts"] = [text.encode(errors="replace").decode() for text in memo.texts]
        return Item(orjson.dumps(head), memo.said)


def decode(item: Item) -> Memo:
    """What was encoded. Raises `ValueError` for anything else."""
    try:
        head = orjson.loads(item.head)
        return Memo(**{**head, "tags": tuple(head["tags"]), "texts": tuple(head["texts"])}, said=item.attachment)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no memo: {type(error).__name__}") from error


# --- what is kept of an exchange -----------------------------------------------------------


def question_in(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last, be it in several messages. An image is named, and not kept."""
    said: list[str] = []
    for message in reversed(messages):
        if message.get("role") == "user":
            said.append(_text_of(message.get("content")))
        elif said:
            break
    return "\n\n".join(reversed(said))


def answer_in(message: object) -> str:
    """What a reply says, or which tools it calls."""
    if not isinstance(message, Mapping):
        return ""
    text = _text_of(message.get("content")) or _text_of(message.get("refusal"))
    tools = [_tool_of(call) for call in _mappings(message.get("tool_calls"))]
    called = [f"{each.get('name')}({_given_to(each)})" for each in tools if isinstance(each, Mapping)]
    return _with_calls(text, called)


def _tool_of(call: Mapping[str, Any]) -> Any:
    """The function of a call, or the tool of the caller's own making that takes a text."""
    return call.get("function") or call.get("custom")


def _given_to(tool: Mapping[str, Any]) -> Any:
    return tool.get("input") if "input" in tool else tool.get("arguments")


def _text_of(content: object) -> str:
    # A copy of the whole would be written down, and only its beginning is kept.
    if isinstance(content, str):
        return content[:TEXT_BYTES]
    if not isinstance(content, list | tuple):
        return ""
    parts = [_part(part) for part in content if isinstance(part, Mapping)]
    return "\n".join(parts)[:TEXT_BYTES]


def _part(part: Mapping[str, Any]) -> str:
    text = part.get("text") or part.get("refusal")
    return text if isinstance(text, str) else f"[{str(part.get('type')).removesuffix('_url').removeprefix('input_')}]"


async def streamed_in(events: bytes) -> str:
    """What a streamed answer says in its first choice, read in turns with whatever else is to be done."""
    texts: list[str] = []
    calls: dict[str, _Called] = {}
    start, latest = 0, ""
    while start < len(events):
        end = events.find(b"\n\n", start + EVENTS_AT_ONCE) + 2
        block = events[start:end] if end > 1 else events[start:]
        for delta in _deltas(block):
            texts.append(_text_of(delta.get("content")) or _text_of(delta.get("refusal")))
            for call in _mappings(delta.get("tool_calls")):
                latest = _which(call, latest)
                if isinstance(tool := _tool_of(call), Mapping):
                    calls.setdefault(latest, _Called()).add(tool)
        start += len(block)
        await asyncio.sleep(0)
    return _with_calls("".join(texts), [str(called) for called in calls.values()])


def _which(call: Mapping[str, Any], latest: str) -> str:
    """What tells a call from its neighbours: its index, else its id; a piece that has neither is of the latest."""
    # An index goes first, since there are providers whose every piece has an id of its own.
    if (index := call.get("index")) is not None:
        return f"index {index}"
    return f"id {named}" if (named := call.get("id")) else latest


@dataclass(slots=True)
class _Called:
    """A call of a tool, as it comes in pieces."""

    name: str = ""
    given: list[str] = field(default_factory=list)

    def add(self, tool: Mapping[str, Any]) -> None:
        # Its first piece alone has its name, and there are providers of which each has it.
        self.name = self.name or str(tool.get("name") or "")
        self.given.append(str(_given_to(tool) or ""))

    def __str__(self) -> str:
        return f"{self.name}({''.join(self.given)})"


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    """What of a list can be read: a provider may write anything where a list of objects belongs."""
    return (each for each in value if isinstance(each, Mapping)) if isinstance(value, list) else iter(())


def _with_calls(text: str, calls: Sequence[str]) -> str:
    return "\n".join([text, *calls] if text else calls)


def _deltas(block: bytes) -> Iterator[Mapping[str, Any]]:
    for body in bodies(block):
        for choice in _mappings(body.get("choices")):
            if not choice.get("index") and isinstance(delta := choice.get("delta"), Mapping):
                yield delta


def exchange(question: str, answer: str, limit: int) -> tuple[str, bool]:
    """Both as one text, and whether something had to be left out of it."""
    # The shorter of the two leaves what it does not need to the other.
    half = limit // 2
    asked, said = len(question.encode()), len(answer.encode())
    question, cut_question = cut(question, max(half, limit - said))
    answer, cut_answer = cut(answer, max(half, limit - asked))
    text = f"User: {question}\n\nAssistant: {answer}" if question else f"Assistant: {answer}"
    return text, cut_question or cut_answer


def cut(text: str, limit: int) -> tuple[str, bool]:
    """So much of a text as has so many bytes at the most, and ends where a sentence does or at least a word."""
    written = text.encode()
    if len(written) <= limit:
        return text, False
    text = written[:limit].decode(errors="ignore")
    ends = [text.rfind(end) + 1 for end in (". ", "! ", "? ", ".\n", "\n", "。")]
    # Of two halves, the first is kept whatever it is.
    for end in (max(ends), text.rfind(" ")):
        if end > len(text) // 2:
            return text[:end], True
    return text, True


# --- vectors -------------------------------------------------------------------------------


def vectors_in(memo: Memo) -> Vector:
    """The vectors of a reply in OpenAI's JSON, in the order of the texts. Raises `ValueError` when it has others."""
    import numpy as np

    try:
        data = sorted(orjson.loads(memo.said)["data"], key=lambda each: each.get("index", 0))
        vectors = np.stack([_vector(each["embedding"]) for each in data])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("this is no list of vectors") from error
    if vectors.shape[0] != len(memo.texts):
        raise ValueError("there are not as many vectors as texts")
    return vectors


def _vector(written: object) -> Vector:
    import numpy as np

    if isinstance(written, str):
        return np.frombuffer(base64.b64decode(written, validate=True), dtype="<f4")
    return np.array(written, dtype=np.float32)
