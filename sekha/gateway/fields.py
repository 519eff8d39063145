"""The fields of a JSON body, each read as what it should be, or refused with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import orjson

from sekha.errors import InvalidRequest, did_you_mean

__all__ = ["dollars", "flag", "kind_of", "number", "object_in", "only", "text", "whole"]

_MOST_DOLLARS = 10**9
_FINEST_DOLLARS = -100
"""Digits behind the point. More are no price, and amounts with a million of them take a while to add up."""
_MOST_DIGITS = 40


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
    if type(value) in (int, float, str):
        written = str(value)
        try:
            amount = Decimal(written if len(written) <= _MOST_DIGITS else "NaN")
        except InvalidOperation:
            amount = Decimal("NaN")
        if amount.is_finite() and abs(amount) <= _MOST_DOLLARS and _places(amount) >= _FINEST_DOLLARS:
            return amount
    instead = "" if type(value) in (int, float) else f", not {kind_of(value)}"
    raise InvalidRequest(f"`{name}` must be dollars, such as 0.01{instead}.", field=name)


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
        case list():
            return "a list"
        case _:
            return "an object"


def _places(amount: Decimal) -> int:
    exponent = amount.as_tuple().exponent
    return exponent if isinstance(exponent, int) else 0
