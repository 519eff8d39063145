"""Money on record: budgets, what is held for calls under way, and what was spent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal, NamedTuple, Protocol, TypeAlias, assert_never, get_args
from uuid import uuid4

from sekha.pricing import Usage
from sekha.values import value

__all__ = [
    "GROUPS",
    "Budget",
    "GroupBy",
    "Hold",
    "Ledger",
    "Period",
    "Scope",
    "Spend",
    "Spent",
    "period_end",
    "period_start",
    "remaining",
    "since_of",
]

Period: TypeAlias = Literal["hour", "day", "month", "total"]
GroupBy: TypeAlias = Literal["provider", "model", "task", "key", "tag", "day"]
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
_AGO = re.compile(r"(\d{1,4})([hdw])", re.ASCII)
_SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class Scope(NamedTuple):
    """What a call is charged to. A budget matches on the fields that it names."""

    # A named tuple: several things are looked up by it for each request, and a dataclass is hashed in Python.

    provider: str | None = None
    model: str | None = None
    task: str | None = None
    key: str | None = None
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At most `limit` dollars in each `period` (UTC), for the calls that `match`."""

    name: str
    limit: Decimal
    period: Period = "month"
    match: Mapping[str, str] = field(default_factory=dict)
    """Of `key`, `provider`, `model`, `task`, `tag`; empty matches every call."""

    def covers(self, scope: Scope) -> bool:
        """Whether a call in this scope counts against the budget."""
        for name, wanted in self.match.items():
            if name == "tag":
                if wanted not in scope.tags:
                    return False
            elif getattr(scope, name) != wanted:
                return False
        return True


@value
class Hold:
    """Money set aside for a call under way. Gone when settled or released, or at `expires_at`."""

    id: str
    budgets: tuple[Budget, ...]
    """The budgets that any call under this hold may count against."""
    amounts: Mapping[str, Decimal]
    """Budget name → dollars held against it."""
    expires_at: datetime
    ttl_seconds: float
    """How long it lasts without a charge; each charge under it renews it for as long."""


@value
class Spend:
    """What one call really cost."""

    id: str = field(default_factory=lambda: str(uuid4()))
    """What was recorded under an id is not recorded again, so an unknown outcome may be retried.

    A ledger of transactions knows an id for ever, whichever process hands it in: a flow's step may run again
    elsewhere. `LeasedLedger` adds up what is spent, and knows an id only where it was handed in, and not for long.
    """
    scope: Scope
    cost: Decimal
    estimated: Decimal
    usage: Usage
    at: datetime
    replies: int = 1
    """Into how many replies its output tokens go; 0 where nobody knows, and then no length is learned from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One line of a report."""

    group: str
    """The provider, model, task, key, tag or day (`2026-11-23`, UTC); empty for calls that have none."""
    calls: int
    cost: Decimal
    estimated: Decimal
    input_tokens: int
    output_tokens: int


class Ledger(Protocol):
    """Every process that spends shares one. Each method is one transaction.

    A budget's spending is the sum of all spends that its `match` covers in the period, whoever
    recorded them and whatever budgets were declared then. All times are passed in and aware. All
    methods raise `LedgerUnavailable` when the ledger is busy, full or unreachable.
    """

    async def reserve(
        self,
        budgets: Sequence[Budget],
        amounts: Mapping[str, Decimal],
        *,
        at: datetime,
        ttl_seconds: float,
        scope: Scope | None = None,
    ) -> Hold:
        """Hold `amounts[budget.name]` against each budget, or against none.

        Budgets without an amount are carried along and hold nothing; no budgets at all is legal.
        Raises `BudgetExceeded` for the first budget whose spent and held money leave too little.
        Concurrent callers, in any number of processes, never hold more than the limit together.
        A hold counts until it expires, also into the next period, where its call may yet be charged.
        `scope` is what is known of the call so far: a ledger that outlives its process charges the worst
        case there when nobody is left to say what the call cost.
        """
        ...

    async def charge(self, hold: Hold, spend: Spend) -> None:
        """Record what a call cost, and reduce the hold by it. The hold goes on, renewed from `spend.at`.

        Spending is recorded even when it exceeds the hold, and when the hold has expired. Only what
        is held for budgets that cover the spend is reduced, and never below zero. When it returns,
        the spend survives `kill -9`, and a power cut unless the ledger says how much may be lost.
        """
        ...

    async def settle(self, hold: Hold, spend: Spend) -> None:
        """Record what the only call under a hold cost, and free the rest of it."""
        ...

    async def release(self, hold: Hold) -> None:
        """Free what is left in the hold; doing it twice changes nothing."""
        ...

    async def spent(self, budget: Budget, *, at: datetime) -> tuple[Decimal, Decimal]:
        """Dollars spent and dollars held against the budget in the period that holds `at`."""
        ...

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        """The 95th percentile of the model's last 200 replies in tokens; None before ten of them.

        Where very many came at once, some of them stand for all.
        """
        ...

    async def report(self, by: GroupBy, *, since: datetime | None = None) -> list[Spent]:
        """Calls and money by group, the dearest first. A call with two tags counts under both."""
        ...

    async def aclose(self) -> None: ...


def since_of(written: str, now: datetime) -> datetime:
    """The moment that `24h`, `7d`, `2w`, a day or a time means. Raises `ValueError` and `OverflowError`."""
    if found := _AGO.fullmatch(written):
        return now - int(found[1]) * _SPANS[found[2]]
    at = datetime.fromisoformat(written)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def remaining(budget: Budget, spent: Decimal, held: Decimal) -> Decimal:
    return max(budget.limit - spent - held, Decimal(0))


def period_start(period: Period, at: datetime) -> datetime | None:
    """When the period that holds `at` began, in UTC; None for `total`, which never did.

    Raises `ValueError` for a time without a zone.
    """
    if at.tzinfo is None:
        raise ValueError("a ledger's times need a zone; pass datetime.now(UTC)")
    hour = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    match period:
        case "hour":
            return hour
        case "day":
            return hour.replace(hour=0)
        case "month":
            return hour.replace(day=1, hour=0)
        case "total":
            return None
        case _:
            assert_never(period)


def period_end(period: Period, at: datetime) -> datetime | None:
    """When the next period begins, in UTC; None for `total`, which never ends."""
    start = period_start(period, at)
    if start is None:
        return None
    match period:
        case "hour":
            return start + timedelta(hours=1)
        case "day":
            return start + timedelta(days=1)
        case _:
            # No month has more than 31 days, and 32 days on is never two months on.
            return (start + timedelta(days=32)).replace(day=1)
