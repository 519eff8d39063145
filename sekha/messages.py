"""A chat's fields in OpenAI's shape, refused by name where they are not, before anybody counts or prices them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekha.errors import InvalidRequest
from sekha.vision import url_of

__all__ = ["as_object", "as_objects", "check_no_other_model", "chooses_a_host", "is_of_provider", "kind_of", "parts_of"]

_OTHER_MODELS = ("models", "route", "preset", "fallbacks")
"""Fields by which OpenRouter, and other gateways, are told to answer with another model than the one asked for."""

_OF_NO_HOST = frozenset(
    {"allow_fallbacks", "data_collection", "enforce_distillable_text", "max_price", "require_parameters", "zdr"}
)
"""What OpenRouter's `provider` may say without choosing a host: what any of them has to keep."""

_BY_PRICE = ("price", {"by": "price"})
"""What its `sort` may say, in both of its shapes."""

_FUNCTIONS = ({"function_declarations"}, {"functionDeclarations"}, {"toolSpec"})
"""All that Gemini's and Bedrock's tools have that the caller runs."""

_UNPRICED_TOOLS = ("bash_", "computer_", "memory_", "text_editor_", "tool_search_tool_")
"""Anthropic's tools that the caller runs, and the one that finds what is in the request anyway. Dates follow."""


def check_no_other_model(options: Mapping[str, Any]) -> None:
    """Refuse what would let a provider answer with a model whose price and permission nobody looked up."""
    for name in _OTHER_MODELS:
        # By itself `route` says what is so anyway: that where `models` names others those are asked next.
        if (value := options.get(name)) and (name, value) != ("route", "fallback"):
            raise InvalidRequest(
                f"`{name}` lets the provider answer with another model, which is neither priced nor checked "
                f"against the key. Leave `{name}` out, and list that model in sekha.yaml: Sekha falls back by itself.",
                field=name,
            )


def chooses_a_host(provider: object) -> bool:
    """Whether OpenRouter's `provider` picks one of a model's hosts by anything but its price: each has its own."""
    if not isinstance(provider, (dict, Mapping)):
        return bool(provider)
    return any(
        value and name not in _OF_NO_HOST and not (name == "sort" and value in _BY_PRICE)
        for name, value in provider.items()
    )


def is_of_provider(tool: Mapping[str, Any]) -> bool:
    """Whether the provider runs a tool itself, as a search or a sandbox, which has a price of its own.

    One that nobody knows is taken for such. What the caller runs has a name, and Gemini's own have none.
    """
    if tool.keys() in _FUNCTIONS:
        return False
    if not ("function" in tool or "name" in tool or "custom" in tool):
        return True
    kind = tool.get("type")
    return kind not in (None, "function", "custom") and not (isinstance(kind, str) and kind.startswith(_UNPRICED_TOOLS))


def parts_of(message: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
    """The parts of a message whose content is no plain text. `where` is what a refusal calls it: `messages[0]`."""
    for at, call in enumerate(as_objects(message.get("tool_calls"), f"{where}.tool_calls")):
        as_object(call.get("function"), f"{where}.tool_calls[{at}].function")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return ()
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(
            f"`{where}.content` must be text or a list of parts, not {kind_of(content)}.", field=f"{where}.content"
        )
    parts = as_objects(content, f"{where}.content")
    for at, part in enumerate(parts):
        _check_part(part, f"{where}.content[{at}]")
    return parts


def as_objects(value: object, where: str) -> Sequence[Mapping[str, Any]]:
    """The objects of a list; none where there is no list."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"`{where}` must be a list, not {kind_of(value)}.", field=where)
    for at, each in enumerate(value):
        if not isinstance(each, (dict, Mapping)):
            raise InvalidRequest(f"`{where}[{at}]` must be an object, not {kind_of(each)}.", field=f"{where}[{at}]")
    return value


def as_object(value: object, where: str) -> Mapping[str, Any]:
    """An object; an empty one where there is none."""
    if value is None:
        return {}
    if not isinstance(value, (dict, Mapping)):
        raise InvalidRequest(f"`{where}` must be an object, not {kind_of(value)}.", field=where)
    return value


def kind_of(value: object) -> str:
    """What a value is, in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case _:
            return "an object"


def _check_part(part: Mapping[str, Any], where: str) -> None:
    # Some servers go by what else is in a part, and would be sent an image that nobody here saw as one.
    if not isinstance(part.get("type"), str):
        raise InvalidRequest(
            f"`{where}.type` must say what the part is: `text`, `image_url` or another.", field=f"{where}.type"
        )
    if (said := part.get("text")) is not None and not isinstance(said, str):
        raise InvalidRequest(f"`{where}.text` must be text, not {kind_of(said)}.", field=f"{where}.text")
    if part["type"] == "input_image":
        # Some servers take it in a chat too, and would look at an image that nobody here saw as one.
        raise InvalidRequest(
            f"`{where}.type` is 'input_image', and an image of a chat has the type `image_url`: "
            '`{"type": "image_url", "image_url": {"url": "…"}}`.',
            field=f"{where}.type",
        )
    if part["type"] == "image_url" or "image_url" in part:
        url_of(part.get("image_url"), f"{where}.image_url")
