"""A chat's fields in OpenAI's shape, refused by name where they are not, before anybody counts or prices them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekha.errors import InvalidRequest
from sekha.vision import url_of

__all__ = ["as_object", "as_objects", "kind_of", "parts_of"]


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
