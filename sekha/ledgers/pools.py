"""What one process has of each budget, and what it knows of it."""

from __future__ import annotations

from datetime import UTC, datetime

from sekha.ledger import Budget, Period
from sekha.ledgers.encoding import meaning

__all__ = ["FIRST", "LAST", "Pool"]

FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
_LONG_AGO = -10_000
"""Beats, before any that counts."""


class Pool:
    """One budget's slice in this process, in picos, and what is known of the budget."""

    __slots__ = (
        "asked", "budget", "debt", "elsewhere", "end", "exact_until", "free", "good_until", "held", "index", "limit",
        "match", "pending", "period", "refreshed", "since", "slice", "spent", "start", "unrecorded", "until", "used",
        "written",
    )  # fmt: skip

    def __init__(self, index: int, budget: Budget) -> None:
        self.index = index
        self.budget = budget
        self.match = meaning(budget)
        self.period: Period = budget.period
        # What is leased is always `free + held + unrecorded`; the shared ledger has at least as much.
        self.free = 0
        self.held = 0
        self.unrecorded = 0
        self.debt = 0
        """Spent beyond all that was leased: what is freed goes there first."""
        self.written: tuple[int, int] | None = (0, 0)
        """In use and idle, as the shared ledger has it; None when nobody knows."""
        self.limit = 0
        """The limit under which `free` was leased."""
        self.since = LAST
        """When the period began in which it was leased."""
        self.until = FIRST
        self.slice = 0
        """How much of it to keep when it is not in use."""
        self.exact_until = 0.0
        self.good_until = 0.0
        """Until when what is known of it was found to hold, so that nobody need look at it closely."""
        self.used = self.asked = _LONG_AGO
        """The last beats when it was held from, and when its spending was asked for."""
        # What the budget has spent in the period from `start` to `end`.
        self.start, self.end = LAST, LAST
        self.spent = 0
        self.pending = 0
        self.elsewhere = 0
        self.refreshed = 0.0

    @property
    def leased(self) -> bool:
        return bool(self.free or self.held or self.unrecorded or self.written != (0, 0))

    def record(self) -> list[object]:
        """As the journal has it."""
        return ["p", self.index, self.match, self.period]

    def overspend(self, amount: int) -> None:
        """Take what no hold covers out of the slice, as far as it goes."""
        idle = min(self.free, amount)
        self.free -= idle
        self.debt += amount - idle

    def recorded(self, cost: int, at: datetime, *, new: bool) -> None:
        """Count what is on record now as spent."""
        self.unrecorded -= cost
        if self.start <= at < self.end:
            self.pending -= cost
            self.spent += cost if new else 0
