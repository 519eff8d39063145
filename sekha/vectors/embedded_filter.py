"""Filters as SQL over the JSON column `properties`, with every value bound."""

from __future__ import annotations

import re
from typing import Final, assert_never

import orjson

from sekha.vectors.base import AllOf, AnyOf, Compare, Filter, Not, Scalar
from sekha.vectors.checks import check_compared

__all__ = ["sql"]

_ORDER: Final = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}


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


def _joined(filters: tuple[Filter, ...], operator: str, *, empty: str) -> tuple[str, list[Scalar]]:
    if not filters:
        return empty, []
    parts = [sql(inner) for inner in filters]
    return f"({operator.join(part for part, _ in parts)})", [value for _, values in parts for value in values]


def _compared(compare: Compare) -> tuple[str, list[Scalar]]:
    check_compared(compare)
    left, path = _property(compare.property)
    value = compare.value
    if isinstance(value, tuple):
        return _contained(value, left, path)
    if compare.operator == "eq":
        return f"({left} IS ?)", [*path, value]
    if compare.operator == "ne":
        return f"({left} IS NOT ?)", [*path, value]
    if value is None:
        return "0", []
    kinds = "('text')" if isinstance(value, str) else "('integer', 'real')"
    order = _ORDER[compare.operator]
    return f"(typeof({left}) IN {kinds} AND {left} {order} ?)", [*path, *path, value]


def _contained(values: tuple[Scalar, ...], left: str, path: list[Scalar]) -> tuple[str, list[Scalar]]:
    present = orjson.dumps([value for value in values if value is not None]).decode()
    # Both halves spell out what happens to an absent property, because `NULL IN (…)` is NULL.
    condition = f"({left} IS NOT NULL AND {left} IN (SELECT value FROM json_each(?)))"
    if None in values:
        return f"({left} IS NULL OR {condition})", [*path, *path, *path, present]
    return condition, [*path, *path, present]


def _property(name: str) -> tuple[str, list[Scalar]]:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # Spelled out, since the index on `source` serves this very expression only.
        return f"json_extract(properties, '$.{name}')", []
    # A JSON path has no way to write every name, so the others are looked up by value.
    return "(SELECT value FROM json_each(properties) WHERE key = ?)", [name]
