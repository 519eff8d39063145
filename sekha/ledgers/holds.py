"""What is held for calls under way, and how it becomes what was spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal

from sekha.errors import BudgetExceeded
from sekha.ledger import Budget, Hold, Spend, period_end, remaining
from sekha.ledgers.database import Transaction
from sekha.ledgers.encoding import matches_of, meaning, micros_of, picos, span_of, to_dollars
from sekha.ledgers.spends import record
from sekha.ledgers.totals import locked_totals, sum_of

__all__ = [
    "RECALL_MICROS",
    "charge",
    "drop_expired",
    "exceeded",
    "recall",
    "release",
    "reserve",
    "settle",
    "spent_and_held",
]

RECALL_MICROS = 2_000_000
"""An idle slice that its owner has not given back so long after it was recalled is not waited for."""


def reserve(transaction: Transaction, *, hold: Hold, at: datetime) -> BudgetExceeded | None:
    # A refusal is returned, not raised: the totals summed on the way to it must be kept, or an
    # exhausted budget would have them summed again for every request that it refuses.
    budgets = [budget for budget in hold.budgets if budget.name in hold.amounts]
    spent = locked_totals(transaction, budgets, at)
    drop_expired(transaction, at, owner="")
    held = _held(transaction, budgets, at)
    lines: dict[tuple[str, str], int] = {}
    for budget in budgets:
        line = meaning(budget), budget.period
        needed = hold.amounts[budget.name]
        left = remaining(budget, to_dollars(spent[line[0], span_of(budget.period, at)]), to_dollars(held[line]))
        if needed > left:
            recall(transaction, [line], owner="", at=at)
            return exceeded(budget, needed, left, at)
        lines[line] = max(picos(needed), lines.get(line, 0))
    for (match, period), amount in lines.items():
        transaction.changed(
            "INSERT INTO ledger_holds (id, match, period, amount, expires_at) VALUES (?, ?, ?, ?, ?)",
            hold.id,
            match,
            period,
            amount,
            micros_of(hold.expires_at),
        )
    return None


def charge(transaction: Transaction, *, hold: Hold, spend: Spend) -> None:
    if not record(transaction, spend) or not _lock(transaction, hold):
        return
    cost = picos(spend.cost)
    transaction.changed(
        "UPDATE ledger_holds SET amount = CASE WHEN amount > ? THEN amount - ? ELSE 0 END WHERE id = ? AND match IN ?",
        cost,
        cost,
        hold.id,
        matches_of(spend.scope),
    )
    # A long ingest charges on and on, and what it has yet to spend must not be given to others meanwhile.
    # A hold that had expired stays so: its money may be somebody else's by now.
    renewed = micros_of(spend.at + timedelta(seconds=hold.ttl_seconds))
    transaction.changed(
        "UPDATE ledger_holds SET expires_at = ? WHERE id = ? AND expires_at < ? AND expires_at > ?",
        renewed,
        hold.id,
        renewed,
        micros_of(spend.at),
    )


def settle(transaction: Transaction, *, hold: Hold, spend: Spend) -> None:
    record(transaction, spend)
    release(transaction, hold=hold)


def release(transaction: Transaction, *, hold: Hold) -> None:
    if _lock(transaction, hold):
        transaction.changed("DELETE FROM ledger_holds WHERE id = ?", hold.id)


def spent_and_held(transaction: Transaction, *, budget: Budget, at: datetime) -> tuple[int, int]:
    match, span = meaning(budget), span_of(budget.period, at)
    kept = transaction.rows("SELECT spent FROM ledger_totals WHERE match = ? AND span = ?", match, span)
    spent = kept[0][0] if kept else sum_of(transaction, budget, at)
    # What lies idle in slices is held for no call, and comes back when somebody needs it.
    held = transaction.rows(
        "SELECT coalesce(sum(amount - idle), 0) FROM ledger_holds WHERE match = ? AND period = ? AND expires_at > ?",
        match,
        budget.period,
        micros_of(at),
    )
    return spent, int(held[0][0])


def _lock(transaction: Transaction, hold: Hold) -> bool:
    """Lock what is left of a hold; False when nothing is."""
    if not hold.amounts:
        return False
    return bool(transaction.rows("SELECT 1 FROM ledger_holds WHERE id = ? ORDER BY match, period FOR UPDATE", hold.id))


def drop_expired(transaction: Transaction, at: datetime, owner: str) -> None:
    """Forget what has expired, but for the owner's own, which is about to be renewed."""
    transaction.changed(
        "DELETE FROM ledger_holds WHERE (id, match, period) IN "
        "(SELECT id, match, period FROM ledger_holds WHERE expires_at <= ? AND id <> ? FOR UPDATE SKIP LOCKED)",
        micros_of(at),
        owner,
    )


def _held(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos held by (match, period), in holds that have not expired."""
    held = {(meaning(budget), str(budget.period)): 0 for budget in budgets}
    rows = transaction.rows(
        "SELECT match, period, sum(amount) FROM ledger_holds WHERE match IN ? AND expires_at > ? "
        "GROUP BY match, period",
        sorted({match for match, _ in held}),
        micros_of(at),
    )
    return held | {(match, period): int(amount) for match, period, amount in rows}


def recall(transaction: Transaction, lines: Iterable[tuple[str, str]], *, owner: str, at: datetime) -> None:
    """Ask for what others leave idle. Slices that are being written are passed over: they are in use."""
    for match, period in sorted(lines):
        transaction.changed(
            "UPDATE ledger_holds SET recalled_at = ? WHERE (id, match, period) IN (SELECT id, match, period "
            "FROM ledger_holds WHERE match = ? AND period = ? AND id <> ? AND idle > 0 AND recalled_at = 0 "
            "FOR UPDATE SKIP LOCKED)",
            max(micros_of(at), 1),
            match,
            period,
            owner,
        )


def exceeded(budget: Budget, needed: Decimal, left: Decimal, at: datetime) -> BudgetExceeded:
    end = period_end(budget.period, at)
    return BudgetExceeded(
        budget.name,
        limit=budget.limit,
        remaining=left,
        needed=needed,
        period=budget.period,
        resets=f"{end:%Y-%m-%d %H:%M} UTC" if end else None,
    )
