"""What budgets have spent, kept up to date so that no request sums a month.

What is spent is summed from the spends. `ledger_totals` keeps the sums that some budget has asked for,
by what they mean (which calls, which period), not by the budget's name: a budget that is renamed or edited
finds its own, and a new one starts with a sum over the spends, in the transaction that first asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Generic, TypeVar

from sekha.ledger import Budget, Scope, period_end, period_start
from sekha.ledgers.database import Transaction, Value
from sekha.ledgers.encoding import HOUR, MOST, fields_of, meaning, micros_of, span_of, spans_of, storable

__all__ = ["Coverage", "add_to_totals", "locked_totals", "sum_of"]

T = TypeVar("T")


class Coverage(Generic[T]):
    """Finds what covers a scope among many matches without trying each."""

    def __init__(self) -> None:
        self._by_names: dict[tuple[str, ...], dict[tuple[str, ...], list[T]]] = {}

    def add(self, match: Mapping[str, str], item: T) -> None:
        names = tuple(sorted(match))
        self._by_names.setdefault(names, {}).setdefault(tuple(match[name] for name in names), []).append(item)

    def of(self, scope: Scope) -> list[T]:
        found: list[T] = []
        for names, by_values in self._by_names.items():
            tags: Iterable[str] = scope.tags if "tag" in names else ("",)
            for tag in tags:
                values = tuple(tag if name == "tag" else getattr(scope, name) for name in names)
                found += by_values.get(values, ())
        return found


def locked_totals(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos spent by (match, span), locked until the transaction ends."""
    wanted = {(meaning(budget), span_of(budget.period, at)): budget for budget in budgets}
    matches, spans = sorted({match for match, _ in wanted}), sorted({span for _, span in wanted})
    kept = transaction.rows("SELECT match, span FROM ledger_totals WHERE match IN ? AND span IN ?", matches, spans)
    if missing := wanted.keys() - set(kept):
        # Otherwise a spend that is not yet committed would be neither in the sum nor added to it.
        transaction.freeze_spends()
        for match, span in sorted(missing):
            transaction.changed(
                "INSERT INTO ledger_totals (match, span, spent) VALUES (?, ?, ?) ON CONFLICT (match, span) DO NOTHING",
                match,
                span,
                sum_of(transaction, wanted[match, span], at),
            )
    rows = transaction.rows(
        "SELECT match, span, spent FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE",
        matches,
        spans,
    )
    return {(match, span): spent for match, span, spent in rows}


SUM_SECONDS = 600.0
"""All that was ever spent may have to be added up."""

_COVERS = {
    "provider": "provider = ?",
    "model": "model = ?",
    "task": "task = ?",
    "key": "key = ?",
    "tag": "EXISTS (SELECT 1 FROM ledger_tags WHERE spend = id AND tag = ?)",
}


def sum_of(transaction: Transaction, budget: Budget, at: datetime) -> int:
    """Picos that a budget has spent, from the spends themselves."""
    transaction.take_long(SUM_SECONDS)
    start, end = period_start(budget.period, at), period_end(budget.period, at)
    conditions = ["SELECT coalesce(sum(cost), 0) FROM ledger_spends WHERE at >= ? AND at < ?"]
    values: list[Value] = [micros_of(start) if start else 0, micros_of(end) if end else MOST]
    for name, wanted in budget.match.items():
        conditions.append(_COVERS[name])
        values.append(storable(wanted))
    return int(transaction.rows(" AND ".join(conditions), *values)[0][0])


def add_to_totals(transaction: Transaction, spent: Iterable[tuple[int, Scope, int]]) -> None:
    """Count what was spent, each with its time in micros and its cost in picos, into the totals that cover it."""
    added = _added(transaction, spent)
    if added:
        matches, spans = sorted({match for match, _ in added}), sorted({span for _, span in added})
        transaction.lock(
            "SELECT 1 FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE", matches, spans
        )
    for (match, span), cost in sorted(added.items()):
        # Nine million dollars are the most that a total can say; it stays there, and its budget is spent.
        more = min(cost, MOST)
        transaction.changed(
            "UPDATE ledger_totals SET spent = CASE WHEN spent > ? THEN ? ELSE spent + ? END "
            "WHERE match = ? AND span = ?",
            MOST - more,
            MOST,
            more,
            match,
            span,
        )


def _added(transaction: Transaction, spent: Iterable[tuple[int, Scope, int]]) -> dict[tuple[str, str], int]:
    """What this adds to each total that is kept, by match and span."""
    by_span: dict[tuple[str, ...], dict[Scope, int]] = {}
    for micros, scope, cost in spent:
        by_scope = by_span.setdefault(spans_of(micros // HOUR), {})
        by_scope[scope] = by_scope.get(scope, 0) + cost
    kept = transaction.rows(
        "SELECT match, span FROM ledger_totals WHERE span IN ?", sorted({span for spans in by_span for span in spans})
    )
    by_match: dict[str, set[str]] = {}
    for match, span in kept:
        by_match.setdefault(match, set()).add(span)
    coverage: Coverage[str] = Coverage()
    for match in by_match:
        coverage.add(fields_of(match), match)
    added: dict[tuple[str, str], int] = {}
    for spans, by_scope in by_span.items():
        for scope, cost in by_scope.items():
            for match in coverage.of(scope) if cost else ():
                for span in by_match[match].intersection(spans):
                    added[match, span] = added.get((match, span), 0) + cost
    return added
