"""How money, times and budgets are written in a ledger's tables.

Amounts are whole pico-dollars (1e-12): every listed price comes out even for a single token, sums
are exact, and 64 bits hold nine million dollars. Anything finer is rounded up, so that a limit stays a
limit. Times are microseconds since 1970.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import combinations
from typing import cast, get_args

from sekha.ledger import Budget, Period, Scope, period_start

__all__ = [
    "DAY",
    "EPOCH",
    "HOUR",
    "MOST",
    "fields_of",
    "matches_of",
    "meaning",
    "micros_of",
    "picos",
    "span_of",
    "spans_of",
    "storable",
    "to_dollars",
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY = 86_400_000_000
HOUR = 3_600_000_000
MOST = 2**63 - 1
_PICOS = Decimal(10**12)
_PICO = Decimal("1e-12")


def meaning(budget: Budget) -> str:
    """What a budget covers, written one way: `{"key": "research"}`."""
    return json.dumps(dict(budget.match), sort_keys=True)


@lru_cache(maxsize=4096)
def fields_of(match: str) -> Mapping[str, str]:
    """What a budget covers, read from its `meaning`."""
    return cast("dict[str, str]", json.loads(match))


@lru_cache(maxsize=4096)
def matches_of(scope: Scope) -> tuple[str, ...]:
    """Every match that covers a call in this scope."""
    named = [("key", scope.key), ("model", scope.model), ("provider", scope.provider), ("task", scope.task)]
    fields = [(name, value) for name, value in named if value is not None]
    tags = [(), *((("tag", tag),) for tag in sorted(scope.tags))]
    return tuple(
        json.dumps(dict(chosen + tag), sort_keys=True)
        for count in range(len(fields) + 1)
        for chosen in combinations(fields, count)
        for tag in tags
    )


def span_of(period: Period, at: datetime) -> str:
    """The period that holds `at`, by name: `month 2026-11-01 00:00`."""
    start = period_start(period, at)
    return f"{period} {start:%Y-%m-%d %H:%M}" if start else period


@lru_cache(maxsize=64)
def spans_of(hour: int) -> tuple[str, ...]:
    """The periods that hold this hour since 1970."""
    at = EPOCH + timedelta(hours=hour)
    return tuple(span_of(period, at) for period in get_args(Period))


def micros_of(at: datetime) -> int:
    # Dividing by a timedelta takes five times as long, and every spend has two of these.
    since = at - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def picos(amount: Decimal) -> int:
    # Four times for each request: `scaleb` and `min` would take half a microsecond more each.
    whole = math.ceil(amount * _PICOS)
    return whole if whole < MOST else MOST


def to_dollars(picos: int) -> Decimal:
    return picos * _PICO


def storable(value: str | None) -> str | None:
    """What both databases can store: tags come from callers, and JSON may carry NUL or half a surrogate."""
    if value is None or (value.isascii() and "\x00" not in value):
        return value
    return value.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
