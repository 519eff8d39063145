"""The messages of a chat as Anthropic's and Ollama's protocols can carry them.

LiteLLM leaves out what it does not know, and says what nobody wrote where a protocol has no place for a message as it
is. So whatever means something is put in words that these protocols have, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import takewhile
from typing import Any

import orjson

from sekha.providers.carrying import Protocol, Uncarried

__all__ = ["history_for"]

_SYSTEM = frozenset({"system", "developer"})
_RESULTS = frozenset({"tool", "function"})
_ROLES = _SYSTEM | _RESULTS | {"user", "assistant"}
_IMAGES = frozenset({"text", "image_url"})
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_OWN = frozenset({"document", "server_tool_use"})
"""Parts of Anthropic's own that LiteLLM hands on as they are."""


def history_for(protocol: Protocol, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages in which everything has a place. Raises `Uncarried` with the first field that has none."""
    history: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for at, given in enumerate(messages):
        message, where = deepcopy(dict(given)), f"messages[{at}]"
        role = message.get("role")
        if role not in _ROLES:
            raise Uncarried(f"{where}.role")
        if role == "assistant":
            _as_spoken(message, where, called)
            _check_thoughts(message, where)
        elif role == "function":
            _as_result(message, where, called)
        if protocol == "anthropic" and message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise Uncarried(f"{where}.tool_call_id")
        _check_parts(protocol, message, where)
        if protocol == "anthropic":
            if role == "assistant":
                _as_thought(message, where)
            _leave_out_blanks(message, where)
        history.append(message)
    return _system_first(history) if protocol == "anthropic" else history


def _as_spoken(message: dict[str, Any], where: str, called: dict[str, str]) -> None:
    if message.get("audio") is not None:
        raise Uncarried(f"{where}.audio")
    refusal = message.pop("refusal", None)
    if refusal is not None:
        if not isinstance(refusal, str):
            raise Uncarried(f"{where}.refusal")
        said = message.get("content")
        said = [{"type": "text", "text": said}] if isinstance(said, str) and said else said or []
        message["content"] = [*said, {"type": "refusal", "refusal": refusal}] if said else refusal
    calls = message.get("tool_calls")
    if not calls:
        message.pop("tool_calls", None)
    elif not isinstance(calls, list):
        raise Uncarried(f"{where}.tool_calls")
    else:
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    if (legacy := message.pop("function_call", None)) is not None:
        if "tool_calls" in message:
            raise Uncarried(f"{where}.function_call")
        # The old way has no ids: a result belongs to the last call of its name.
        call = _call({"id": f"call_{where[9:-1]}", "function": legacy}, where, "function_call")
        called[call["function"]["name"]] = call["id"]
        message["tool_calls"] = [call]


def _call(call: object, where: str, named: str = "function") -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        raise Uncarried(where)
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
        raise Uncarried(f"{where}.{named}")
    if not isinstance(call.get("id"), str):
        raise Uncarried(f"{where}.id")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = orjson.dumps(arguments).decode()
    # A model that calls a function without arguments may write none.
    arguments = "{}" if arguments is None or arguments == "" else arguments
    if (arguments := _object_in(arguments)) is None:
        raise Uncarried(f"{where}.{named}.arguments")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _object_in(written: object) -> str | None:
    """The JSON of an object as UTF-8 can carry it; None for all else.

    A model that is cut may write half of a character, `\\ud83d`, which is JSON, and nothing that can be sent:
    it becomes the sign for what cannot be shown.
    """
    if not isinstance(written, str):
        return None
    with suppress(orjson.JSONDecodeError):
        return written if isinstance(orjson.loads(written), dict) else None
    try:
        read = json.loads(written, parse_constant=_no_json)
        plain = json.dumps(read, ensure_ascii=False, allow_nan=False) if isinstance(read, dict) else None
    except (ValueError, RecursionError):
        return None
    return plain and plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def _as_result(message: dict[str, Any], where: str, called: Mapping[str, str]) -> None:
    name = message.get("name")
    if not isinstance(name, str) or name not in called:
        raise Uncarried(f"{where}.name")
    message["role"] = "tool"
    message["tool_call_id"] = called[name]


def _check_thoughts(message: Mapping[str, Any], where: str) -> None:
    thoughts = message.get("thinking_blocks")
    if thoughts is not None and not (isinstance(thoughts, list) and all(isinstance(each, dict) for each in thoughts)):
        raise Uncarried(f"{where}.thinking_blocks")


def _as_thought(message: dict[str, Any], where: str) -> None:
    """The thoughts of a message as Anthropic wrote them, which it takes with no field more."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for each in (*(message.get("thinking_blocks") or ()), *filter(_is_thought, parts)):
        # Whoever adds a stream up may have numbered them.
        each.pop("index", None)
    redacted = next((at for at, part in enumerate(parts) if part["type"] == "redacted_thinking"), None)
    if redacted is not None:
        # LiteLLM forgets it among the parts.
        thoughts = list(takewhile(_is_thought, parts))
        message["content"] = parts[len(thoughts) :]
        field = message.get("thinking_blocks") or []
        # Some write the same thoughts in both places. Those of the field alone come first, as LiteLLM puts them.
        message["thinking_blocks"] = [*(each for each in field if each not in thoughts), *thoughts]
        if any(map(_is_thought, message["content"])):
            raise Uncarried(f"{where}.content[{redacted}]")


def _is_thought(part: Mapping[str, Any]) -> bool:
    return part.get("type") in _THOUGHTS


def _check_parts(protocol: Protocol, message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return
    message["content"] = parts = list(content)
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "refusal" and message["role"] == "assistant" and isinstance(part.get("refusal"), str):
            parts[at] = {"type": "text", "text": part["refusal"]}
        elif not isinstance(kind, str) or not _has_place(protocol, message["role"], kind):
            raise Uncarried(f"{where}.content[{at}]")
        elif kind == "text" and not isinstance(part.get("text"), str):
            raise Uncarried(f"{where}.content[{at}].text")
        elif kind == "file" and not _is_file(part.get("file")):
            raise Uncarried(f"{where}.content[{at}].file")


def _leave_out_blanks(message: dict[str, Any], where: str) -> None:
    """Leave out text that says nothing. Anthropic refuses it, and LiteLLM writes words of its own in its place."""
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        content = [part for part in content if part["type"] != "text" or part["text"].strip()]
    elif isinstance(content, str) and role != "tool":
        content = content if content.strip() else None
    if role == "user" and not content:
        raise Uncarried(f"{where}.content", f"it takes no message that says nothing, as `{where}` does")
    message["content"] = content


def _system_first(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Anthropic has one place for, ahead of the conversation. LiteLLM would say a later one in the user's name."""
    system = [message | {"role": "system"} for message in history if message["role"] in _SYSTEM and message["content"]]
    return [*system, *(message for message in history if message["role"] not in _SYSTEM)]


def _has_place(protocol: Protocol, role: str, kind: str) -> bool:
    if protocol == "ollama":
        return kind in _IMAGES
    if role in _SYSTEM:
        return kind == "text"
    if role == "assistant":
        return kind == "text" or kind in _THOUGHTS or kind in _OWN or kind.endswith("_tool_result")
    return kind in _IMAGES or kind == "file" or kind in ("document", "tool_reference")


def _is_file(file: object) -> bool:
    if not isinstance(file, Mapping):
        return False
    data, id_ = file.get("file_data"), file.get("file_id")
    return (isinstance(data, str) and data[:5].lower() == "data:") if data else isinstance(id_, str) and bool(id_)
