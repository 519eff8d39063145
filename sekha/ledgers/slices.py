"""Slices of budgets that processes hold, to spend from them without a transaction.

A slice is a hold like any other, under the process's own id, with the part that no call of its own needs yet
marked as `idle`. Whoever finds too little left recalls idle slices, and their owners give them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sekha.ledger import Budget, Hold, Period, Spend
from sekha.ledgers.database import Transaction
from sekha.ledgers.encoding import MOST, meaning, micros_of, span_of
from sekha.ledgers.holds import RECALL_MICROS, drop_expired, recall
from sekha.ledgers.spends import Batch, record_all, record_batch, record_upto
from sekha.ledgers.totals import locked_totals

__all__ = [
    "SHARE",
    "Kept",
    "Leased",
    "Slice",
    "Standing",
    "Wanted",
    "close_lease",
    "finish",
    "keep",
    "lease",
    "standings",
]

SHARE = 20
"""A slice is this part of what is left, so that it shrinks toward nothing as the budget is spent."""


class Slice(NamedTuple):
    """What one process has of a budget, in picos. The process alone writes it."""

    match: str
    period: Period
    in_use: int
    """Held for calls under way, or spent and not yet recorded."""
    idle: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """More of a budget for the slice that a process has of it."""

    budget: Budget
    limit: int
    """Picos that all spending and holds together may not pass."""
    slice: Slice
    needs: tuple[int, ...]
    """What calls wait for, in picos, the first in line first."""
    exact: bool
    """Lease no more than the calls need."""


class Standing(NamedTuple):
    """Picos spent in a period, and held by others for calls under way."""

    spent: int
    elsewhere: int


@dataclass(frozen=True, slots=True)
class Leased:
    granted: int
    used: int
    """Picos spent and held by anybody, but for what is idle in this process's own slice."""
    standing: Standing
    recalled: int
    """Picos idle in other processes' slices that may come back."""
    lost: bool
    """The slice had expired and may be somebody else's by now: what was idle in it is gone."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of spends and slices that were handed in."""

    tallied: bool
    """Whether the tallies were not on record before."""
    new: frozenset[str]
    """The spends that were not on record before, by id."""
    lost: frozenset[tuple[str, str]]
    """Slices that had expired, by match and period: what was idle in them is gone."""
    recalled: frozenset[tuple[str, str]]
    """Slices whose idle part somebody else needs."""
    standings: Sequence[Standing | None]
    """How the watched budgets stand with all this on record; None where nobody has asked for that before."""


def lease(
    transaction: Transaction, *, owner: str, wanted: Sequence[Wanted], at: datetime, expires_at: datetime
) -> list[Leased]:
    budgets = [want.budget for want in wanted]
    spent = locked_totals(transaction, budgets, at)
    drop_expired(transaction, at, owner)
    held = _held_elsewhere(transaction, owner, budgets, at)
    there = _lock_slices(transaction, owner)
    leased: list[Leased] = []
    short: list[tuple[str, str]] = []
    for want in wanted:
        line = want.slice.match, want.slice.period
        others = held.get(line, _Elsewhere(0, 0, 0))
        lost = want.slice.idle > 0 and line not in there
        idle = 0 if lost else want.slice.idle
        total = spent[line[0], span_of(want.budget.period, at)]
        used = total + others.amount + want.slice.in_use
        available = max(want.limit - used, 0)
        fitting = 0
        for need in want.needs:
            if fitting + need <= available:
                fitting += need
            elif line not in short:
                short.append(line)
        share = 0 if want.exact else available // SHARE
        granted = max(min(max(fitting, share), available) - idle, 0)
        _write_slice(transaction, owner, want.slice._replace(idle=idle + granted), expires_at)
        standing = Standing(total, others.amount - others.idle)
        leased.append(Leased(granted, used, standing, others.coming if line in short else 0, lost))
    recall(transaction, short, owner=owner, at=at)
    return leased


def keep(
    transaction: Transaction,
    *,
    owner: str,
    batch: Batch | None,
    slices: Sequence[Slice],
    expires_at: datetime,
    watched: Sequence[Budget],
    at: datetime,
) -> Kept:
    tallied, new = record_batch(transaction, owner, batch)
    there = _lock_slices(transaction, owner)
    recalled = {line for line, is_recalled in there.items() if is_recalled}
    lost: set[tuple[str, str]] = set()
    for one in sorted(slices):
        line = one.match, one.period
        if one.idle and line not in there:
            lost.add(line)
            one = one._replace(idle=0)  # noqa: PLW2901 - what was idle in it is gone
        if not one.idle:
            recalled.discard(line)
        _write_slice(transaction, owner, one, expires_at)
    found = standings(transaction, owner=owner, budgets=watched, at=at) if watched else ()
    return Kept(tallied, new, frozenset(lost), frozenset(recalled), found)


def close_lease(
    transaction: Transaction, *, owner: str, batch: Batch | None, holds: Sequence[tuple[Hold, Sequence[Slice]]]
) -> None:
    record_batch(transaction, owner, batch)
    transaction.changed("DELETE FROM ledger_holds WHERE id = ?", owner)
    for hold, slices in holds:
        for one in sorted(slices):
            _write_slice(transaction, hold.id, one, hold.expires_at)


def finish(transaction: Transaction, *, owner: str, spends: Sequence[tuple[int, Spend]], worst: Sequence[Spend]) -> int:
    # Made and locked before it is read: the process may have died while its last commit was under way.
    transaction.changed(
        "INSERT INTO ledger_journals (process, recorded) VALUES (?, 0) ON CONFLICT (process) DO NOTHING", owner
    )
    rows = transaction.rows("SELECT recorded FROM ledger_journals WHERE process = ? FOR UPDATE", owner)
    recorded = rows[0][0]
    # Kept from now on: whoever finds the journal again before it is removed has nothing left to record.
    record_upto(transaction, owner, max((number for number, _ in spends), default=0))
    new = record_all(transaction, [*(spend for number, spend in spends if number > recorded), *worst])
    transaction.changed("DELETE FROM ledger_holds WHERE id = ?", owner)
    return len(new)


def standings(
    transaction: Transaction, *, owner: str, budgets: Sequence[Budget], at: datetime
) -> list[Standing | None]:
    spans = sorted({span_of(budget.period, at) for budget in budgets})
    matches = sorted({meaning(budget) for budget in budgets})
    # First: what becomes spent between the two is better counted twice than not at all.
    held = _held_elsewhere(transaction, owner, budgets, at)
    rows = transaction.rows(
        "SELECT match, span, spent FROM ledger_totals WHERE match IN ? AND span IN ?", matches, spans
    )
    spent = {(match, span): total for match, span, total in rows}
    found: list[Standing | None] = []
    for budget in budgets:
        match = meaning(budget)
        others = held.get((match, budget.period), _Elsewhere(0, 0, 0))
        total = spent.get((match, span_of(budget.period, at)))
        found.append(None if total is None else Standing(total, others.amount - others.idle))
    return found


def _lock_slices(transaction: Transaction, owner: str) -> dict[tuple[str, str], bool]:
    """Lock the slices that are there still: by match and period, whether somebody else needs what is idle in it."""
    rows = transaction.rows(
        "SELECT match, period, recalled_at FROM ledger_holds WHERE id = ? ORDER BY match, period FOR UPDATE", owner
    )
    return {(match, period): recalled_at > 0 for match, period, recalled_at in rows}


def _write_slice(transaction: Transaction, owner: str, one: Slice, expires_at: datetime) -> None:
    if not one.in_use and not one.idle:
        transaction.changed(
            "DELETE FROM ledger_holds WHERE id = ? AND match = ? AND period = ?", owner, one.match, one.period
        )
        return
    transaction.changed(
        "INSERT INTO ledger_holds (id, match, period, amount, idle, expires_at) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id, match, period) DO UPDATE SET amount = excluded.amount, idle = excluded.idle, "
        "expires_at = excluded.expires_at, "
        # A slice with nothing idle in it has answered.
        "recalled_at = CASE WHEN excluded.idle = 0 THEN 0 ELSE ledger_holds.recalled_at END",
        owner,
        one.match,
        one.period,
        min(one.in_use + one.idle, MOST),
        one.idle,
        micros_of(expires_at),
    )


class _Elsewhere(NamedTuple):
    amount: int
    idle: int
    coming: int
    """Idle, and not recalled in vain."""


def _held_elsewhere(
    transaction: Transaction, owner: str, budgets: Sequence[Budget], at: datetime
) -> dict[tuple[str, str], _Elsewhere]:
    rows = transaction.rows(
        "SELECT match, period, sum(amount), sum(idle), "
        "sum(CASE WHEN recalled_at = 0 OR recalled_at > ? THEN idle ELSE 0 END) "
        "FROM ledger_holds WHERE match IN ? AND id <> ? AND expires_at > ? GROUP BY match, period",
        micros_of(at) - RECALL_MICROS,
        sorted({meaning(budget) for budget in budgets}),
        owner,
        micros_of(at),
    )
    return {
        (match, period): _Elsewhere(int(amount), int(idle), int(soon)) for match, period, amount, idle, soon in rows
    }
