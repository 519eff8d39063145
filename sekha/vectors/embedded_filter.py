"""Filters as SQL over the JSON column `properties`, with every value bound."""

from __future__ import annotations

import math
import re
from typing import Final, assert_never

import orjson

from sekha.errors import StoreError
from sekha.vectors.base import AllOf, AnyOf, Compare, Filter, Not, Scalar

__all__ = ["check_scalar", "sql"]

_ORDER: Final = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INT64: Final = range(-(2**63), 2**63)


def sql(where: Filter) -> tuple[str, list[Scalar]]:
    """The condition and its parameters. It is true or false for every record, and never NULL.

    Numbers, booleans (as 0 and 1) and texts are each ordered among themselves; what is of another
    sort, or absent, is neither less nor greater.
    """
    match where:
        case AllOf(filters):
            return _joined(filters, " AND ", empty="1")
        case AnyOf(filters):
            return _joined(filters, " OR ", empty="0")
        case Not(inner):
            condition, values = sql(inner)
            return f"(NOT {condition})", values
        case Compare():
            return _compared(where)
        case _:
            assert_never(where)


def check_scalar(value: object) -> str | None:
    """Why a value can be neither stored nor compared; None when it can."""
    if isinstance(value, str):
        return None if value.isascii() or _encodes(value) else "it is no valid Unicode"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if value in _INT64 else "it does not fit into 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "it is not finite"
    return f"it is a {type(value).__name__}, not a text, number, boolean or None"


def _joined(filters: tuple[Filter, ...], operator: str, *, empty: str) -> tuple[str, list[Scalar]]:
    if not filters:
        return empty, []
    parts = [sql(inner) for inner in filters]
    return f"({operator.join(part for part, _ in parts)})", [value for _, values in parts for value in values]


def _compared(compare: Compare) -> tuple[str, list[Scalar]]:
    left, path = _property(compare.property)
    if compare.operator == "in":
        return _contained(compare, left, path)
    value = compare.value
    if isinstance(value, tuple):
        raise StoreError(f"The filter on {compare.property!r} compares with {compare.operator!r}: give it one value.")
    _check(compare.property, value)
    match compare.operator:
        case "eq":
            return f"({left} IS ?)", [*path, value]
        case "ne":
            return f"({left} IS NOT ?)", [*path, value]
        case "lt" | "le" | "gt" | "ge":
            if value is None:
                return "0", []
            kinds = "('text')" if isinstance(value, str) else "('integer', 'real')"
            order = _ORDER[compare.operator]
            return f"(typeof({left}) IN {kinds} AND {left} {order} ?)", [*path, *path, value]
        case _:
            raise StoreError(f"The filter on {compare.property!r} has no operator {compare.operator!r}.")


def _contained(compare: Compare, left: str, path: list[Scalar]) -> tuple[str, list[Scalar]]:
    if not isinstance(compare.value, tuple):
        raise StoreError(f"The filter on {compare.property!r} compares with 'in': give it a tuple of values.")
    for value in compare.value:
        _check(compare.property, value)
    present = orjson.dumps([value for value in compare.value if value is not None]).decode()
    # Both halves spell out what happens to an absent property, because `NULL IN (…)` is NULL.
    condition = f"({left} IS NOT NULL AND {left} IN (SELECT value FROM json_each(?)))"
    if None in compare.value:
        return f"({left} IS NULL OR {condition})", [*path, *path, *path, present]
    return condition, [*path, *path, present]


def _property(name: str) -> tuple[str, list[Scalar]]:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # Spelled out, since the index on `source` serves this very expression only.
        return f"json_extract(properties, '$.{name}')", []
    # A JSON path has no way to write every name, so the others are looked up by value.
    return "(SELECT value FROM json_each(properties) WHERE key = ?)", [name]


def _check(name: str, value: object) -> None:
    if why := check_scalar(value):
        raise StoreError(f"The filter on {name!r} has a value that cannot be compared: {why}.")


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
