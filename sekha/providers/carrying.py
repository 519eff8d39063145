"""What the protocols of other providers than OpenAI's have a place for, and what of a request has none there."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from sekha.images import format_of

__all__ = [
    "FIELDS",
    "HINTS",
    "OLLAMA_FIELDS",
    "Protocol",
    "Uncarried",
    "addresses",
    "call_by_its_format",
    "changes_nothing",
    "fields_for",
    "images",
]

Protocol: TypeAlias = Literal["anthropic", "ollama"]

# A caller's field is handed on only by name: LiteLLM takes its own orders (`api_base`, `fallbacks`,
# `mock_response`) as fields of the same call.
FIELDS = frozenset(
    {
        "audio",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    }
)
OLLAMA_FIELDS = frozenset(
    {
        "keep_alive",
        "min_p",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "num_ctx",
        "num_gpu",
        "num_predict",
        "num_thread",
        "repeat_last_n",
        "repeat_penalty",
        "tfs_z",
        "think",
    }
)
HINTS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "store", "user"})
"""What nobody needs to heed for the answer to be the one that was asked for."""
_CHANGES_NOTHING: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": ([], ["text"]),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "stop": ([], ""),
    "temperature": (1,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
    "verbosity": ("medium",),
}
"""Values that say what is so without them. A protocol that lacks the field does the same."""
_CHOICES = ("auto", "none", "required")
_EFFORTS = ("none", "minimal", "low", "medium", "high")
_ADDRESSED = frozenset({"file_data", "file_id", "file_uri", "image_url", "uri", "url"})
"""Fields of a part that may name what LiteLLM would fetch."""


def changes_nothing(name: str, value: object) -> bool:
    return name in HINTS or value in _CHANGES_NOTHING.get(name, ())


class Uncarried(Exception):
    """A field, or a place in one, for which a protocol has none."""

    def __init__(self, field: str, lacks: str | None = None) -> None:
        super().__init__(field)
        self.field = field
        self.lacks = lacks or f"its protocol has no place for `{field}`"


def fields_for(protocol: Protocol, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as these protocols can carry them. Raises `Uncarried` with the first that they cannot.

    LiteLLM leaves out the values that it does not know of a field that it does.
    """
    carried = dict(fields)
    _check_tools(protocol, carried)
    _check_format(protocol, fields.get("response_format"))
    stop = fields.get("stop")
    if not (stop is None or isinstance(stop, str) or _is_texts(stop)):
        raise Uncarried("stop")
    # Beyond 64 bits it was read as a fraction, and would be another seed.
    if isinstance(fields.get("seed"), float):
        raise Uncarried("seed")
    effort = fields.get("reasoning_effort")
    # Ollama thinks or does not, and LiteLLM takes every other word for not.
    if effort is not None and (not isinstance(effort, str) or (protocol == "ollama" and effort not in _EFFORTS)):
        raise Uncarried("reasoning_effort")
    return carried


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _check_tools(protocol: Protocol, carried: dict[str, Any]) -> None:
    if carried.get("functions"):
        # An answer would call it as a tool, which who asks in the old way does not look for.
        raise Uncarried("functions")
    tools = carried.get("tools") or ()
    for at, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        # Anthropic has tools of its own.
        if not isinstance(kind, str) or (kind == "custom" and "custom" in tool):
            raise Uncarried(f"tools[{at}]")
        if kind == "function" and not _names_something(tool.get("function")):
            raise Uncarried(f"tools[{at}].function")
        if kind != "function" and protocol == "ollama":
            raise Uncarried(f"tools[{at}]")
    choice = carried.get("tool_choice")
    if choice in (None, "auto"):
        return
    if protocol == "anthropic":
        if not _is_choice(choice):
            raise Uncarried("tool_choice")
    elif choice == "none":
        # Without tools none is called.
        carried.pop("tools", None)
    else:
        raise Uncarried("tool_choice")


def _is_choice(choice: object) -> bool:
    if isinstance(choice, Mapping):
        return _names_something(choice.get("function")) or choice.get("type") in (*_CHOICES, "any")
    return choice in _CHOICES


def _names_something(function: object) -> bool:
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"])


def _check_format(protocol: Protocol, format_: object) -> None:
    if format_ is None:
        return
    kind = format_.get("type") if isinstance(format_, Mapping) else None
    if kind == "json_schema" and isinstance(format_, Mapping):
        described = format_.get("json_schema")
        if isinstance(described, Mapping) and isinstance(described.get("schema"), Mapping):
            return
    # Anthropic has no JSON without a schema, and LiteLLM asks it for text.
    elif kind == "text" or (kind == "json_object" and protocol == "ollama"):
        return
    raise Uncarried("response_format")


def images(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                yield part


def call_by_its_format(part: dict[str, Any]) -> None:
    """Let the media type of a `data:` URL say what the bytes are: Anthropic refuses an image under another name.

    A scheme in capitals is written small.
    """
    reference = part.get("image_url")
    url = reference.get("url") if isinstance(reference, dict) else reference
    if isinstance(url, str) and url[:8].lower() == "https://" and not url.startswith("https://"):
        # LiteLLM knows it in small letters alone.
        url = f"https://{url[8:]}"
        part["image_url"] = reference | {"url": url} if isinstance(reference, dict) else url
    if not isinstance(url, str) or url[:5].lower() != "data:":
        return
    encoded = url.partition(",")[2]
    try:
        format_ = format_of(base64.b64decode(encoded[:64]))
    except ValueError:
        return
    if format_ is not None:
        told = f"data:image/{format_};base64,{encoded}"
        part["image_url"] = reference | {"url": told} if isinstance(reference, dict) else told


def addresses(content: object, kind: str = "") -> Iterator[tuple[str, str, str]]:
    """Every address in the parts of a message: the type of its part, its field, and the address."""
    if isinstance(content, list | tuple):
        for part in content:
            yield from addresses(part, kind)
    elif isinstance(content, Mapping):
        kind = kind or str(content.get("type"))
        for field, value in content.items():
            if not isinstance(value, str):
                yield from addresses(value, kind)
            elif field in _ADDRESSED and value[:5].lower() != "data:" and (kind == "image_url" or "://" in value):
                yield kind, field, value
