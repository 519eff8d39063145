"""The fields of a JSON body, each read as what it should be, or refused with its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import orjson

from sekha.errors import InvalidRequest, did_you_mean
from sekha.messages import kind_of

__all__ = ["dollars", "flag", "name_in", "number", "object_in", "only", "text", "whole"]

_MOST_DOLLARS = 10**9
_NAME_LENGTH = 256
"""Longer than any model's, and short enough to be logged, recorded and looked for among similar ones."""
# An amount with a million digits would be a number too, and take a while to add up.
_WRITTEN_DOLLARS = re.compile(r"[0-9]{1,10}(\.[0-9]{1,30})?")


def object_in(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The parser's message quotes nothing of the body but where it breaks.
        raise InvalidRequest(f"The body is no JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from None
    if type(given) is not dict:
        raise InvalidRequest(f"The body must be a JSON object, not {kind_of(given)}.")
    return given


def only(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse fields that nobody would read."""
    for name in given:
        if name not in known:
            raise InvalidRequest(f"There is no field {name[:64]!r} here.{did_you_mean(name, known)}", field=name[:64])


def text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is None or type(value) is str:
        return value or None
    raise InvalidRequest(f"`{name}` must be text, not {kind_of(value)}.", field=name)


def name_in(given: Mapping[str, Any], field: str) -> str | None:
    """The name of a model, or of what it is to do."""
    value = text(given, field)
    if value is not None and len(value) > _NAME_LENGTH:
        raise InvalidRequest(f"`{field}` has {len(value):,} characters; {_NAME_LENGTH} is the most.", field=field)
    return value


def flag(given: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = given.get(name)
    if value is None:
        return default
    if type(value) is bool:
        return value
    raise InvalidRequest(f"`{name}` must be true or false, not {kind_of(value)}.", field=name)


def whole(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None or (type(value) is int and least <= value <= most):
        return value
    raise InvalidRequest(f"`{name}` must be a whole number, {least:,} to {most:,}.", field=name)


def number(given: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None or (type(value) in (int, float) and least <= value <= most):
        return value
    raise InvalidRequest(f"`{name}` must be a number, {least:g} to {most:g}.", field=name)


def dollars(given: Mapping[str, Any], name: str) -> Decimal | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) in (int, float) or (type(value) is str and _WRITTEN_DOLLARS.fullmatch(value)):
        amount = Decimal(str(value))
        if amount < 0:
            raise InvalidRequest(f"`{name}` is {value}; it must be 0 or more.", field=name)
        if amount <= _MOST_DOLLARS:
            return amount
    instead = "" if type(value) in (int, float, str) else f", not {kind_of(value)}"
    raise InvalidRequest(f"`{name}` must be dollars, such as 0.01{instead}.", field=name)
