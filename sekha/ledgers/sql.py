"""The ledger's transactions, written once in the SQL that SQLite and PostgreSQL share.

Amounts are whole pico-dollars (1e-12): every listed price comes out even for a single token, sums
are exact, and 64 bits hold nine million dollars. Anything finer is rounded up, so that a limit stays a
limit. Times are microseconds since 1970.

What is spent is summed from the spends. So that no request sums a month, `ledger_totals` keeps the
sums that some budget has asked for, by what they mean (which calls, which period), not by the
budget's name: a budget that is renamed or edited finds its own, and a new one starts with a sum over
the spends, in the transaction that first asks.

Locks are taken in one order everywhere, so that transactions wait for each other but never in a
circle: spends, then totals by name, then holds.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache, partial
from itertools import combinations
from typing import Any, Protocol, TypeAlias, TypeVar, cast, get_args
from uuid import uuid4

from sekha.errors import BudgetExceeded, LedgerError
from sekha.ledger import Budget, GroupBy, Hold, Period, Scope, Spend, Spent, period_end, period_start, remaining

__all__ = ["Database", "SqlLedger", "Transaction", "Value", "expand", "migrate"]

T = TypeVar("T")
Value: TypeAlias = str | int | tuple[str, ...] | list[str] | None

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = 86_400_000_000
_MOST = 2**63 - 1

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE ledger_spends (
            id TEXT PRIMARY KEY, at BIGINT NOT NULL,
            provider TEXT, model TEXT, task TEXT, key TEXT,
            cost BIGINT NOT NULL, estimated BIGINT NOT NULL,
            input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
            images BIGINT NOT NULL, counted BIGINT NOT NULL
        )""",
        "CREATE INDEX ledger_spends_at ON ledger_spends (at)",
        """CREATE INDEX ledger_spends_replies ON ledger_spends (provider, model, at, output_tokens)
            WHERE output_tokens > 0""",
        # Not a primary key: tags come from callers, and PostgreSQL limits the length of what it indexes.
        "CREATE TABLE ledger_tags (spend TEXT NOT NULL, tag TEXT NOT NULL)",
        "CREATE INDEX ledger_tags_spend ON ledger_tags (spend)",
        """CREATE TABLE ledger_totals (
            match TEXT NOT NULL, span TEXT NOT NULL, spent BIGINT NOT NULL, PRIMARY KEY (match, span)
        )""",
        """CREATE TABLE ledger_holds (
            id TEXT NOT NULL, match TEXT NOT NULL, period TEXT NOT NULL,
            amount BIGINT NOT NULL, expires_at BIGINT NOT NULL, PRIMARY KEY (id, match, period)
        )""",
        "CREATE INDEX ledger_holds_match ON ledger_holds (match, period, expires_at, amount)",
        "CREATE INDEX ledger_holds_expires_at ON ledger_holds (expires_at)",
    ),
)


class Transaction(Protocol):
    """One open transaction. SQL marks values with `?`; a tuple or list becomes `(?, ?, …)`."""

    def rows(self, sql: str, *values: Value) -> list[tuple[Any, ...]]: ...

    def changed(self, sql: str, *values: Value) -> int:
        """Run a statement and say how many rows it changed."""
        ...

    def freeze_spends(self) -> None:
        """Let no other transaction record a spend until this one ends."""
        ...


class Database(Protocol):
    """Runs work in transactions, in threads of its own, so that the event loop never waits.

    Every future ends, in a result or a `LedgerError`. Work may run beside other work, and is done
    as a whole or not at all.
    """

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        """Run and commit. What is not `durable` may be forgotten in a power cut, not in a `kill -9`."""
        ...

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        """Run against one snapshot."""
        ...

    def close(self) -> None:
        """Finish what was handed in, then close every connection."""
        ...


class SqlLedger:
    """A `Ledger` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def reserve(
        self,
        budgets: Sequence[Budget],
        amounts: Mapping[str, Decimal],
        *,
        at: datetime,
        ttl_seconds: float,
    ) -> Hold:
        held = {budget.name: amounts[budget.name] for budget in budgets if amounts.get(budget.name, 0) > 0}
        hold = Hold(
            id=str(uuid4()),
            budgets=tuple(budgets),
            amounts=held,
            expires_at=at + timedelta(seconds=ttl_seconds),
            ttl_seconds=ttl_seconds,
        )
        if not held:
            return hold
        reserving = self._database.write(partial(_reserve, hold=hold, at=at), durable=False)
        try:
            refused = await _outcome(reserving)
        except asyncio.CancelledError:
            reserving.add_done_callback(partial(self._abandon, hold=hold))
            raise
        if refused is not None:
            raise refused
        return hold

    async def charge(self, hold: Hold, spend: Spend) -> None:
        await _outcome(self._database.write(partial(_charge, hold=hold, spend=spend), durable=True))

    async def settle(self, hold: Hold, spend: Spend) -> None:
        await _outcome(self._database.write(partial(_settle, hold=hold, spend=spend), durable=True))

    async def release(self, hold: Hold) -> None:
        if hold.amounts:
            await _outcome(self._database.write(partial(_release, hold=hold), durable=False))

    async def spent(self, budget: Budget, *, at: datetime) -> tuple[Decimal, Decimal]:
        spent, held = await _outcome(self._database.read(partial(_spent, budget=budget, at=at)))
        return _dollars(spent), _dollars(held)

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        return await _outcome(self._database.read(partial(_usual_output_tokens, provider=provider, model=model)))

    async def report(self, by: GroupBy, *, since: datetime | None = None) -> list[Spent]:
        return await _outcome(self._database.read(partial(_report, by=by, since=since)))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._database.close)

    def _abandon(self, reserving: Future[BudgetExceeded | None], hold: Hold) -> None:
        """Free a hold that was made for a caller who had left."""
        if reserving.exception() is None and reserving.result() is None:
            with suppress(RuntimeError):  # the ledger is being closed, and the hold expires by itself
                self._database.write(partial(_release, hold=hold), durable=False)


def migrate(transaction: Transaction, ledger: str) -> None:
    """Bring the tables to this version. Raises `LedgerError` when a newer Sekha made them."""
    transaction.changed("CREATE TABLE IF NOT EXISTS ledger_version (version BIGINT NOT NULL)")
    rows = transaction.rows("SELECT version FROM ledger_version")
    version = rows[0][0] if rows else 0
    if version > len(_MIGRATIONS):
        raise LedgerError(
            f"Ledger {ledger!r} has schema {version}, and this Sekha knows {len(_MIGRATIONS)}: a newer one wrote it. "
            "Upgrade Sekha, or name another ledger under `ledger:` in sekha.yaml."
        )
    if version == len(_MIGRATIONS):
        return
    for step in _MIGRATIONS[version:]:
        for statement in step:
            transaction.changed(statement)
    transaction.changed("DELETE FROM ledger_version")
    transaction.changed("INSERT INTO ledger_version VALUES (?)", len(_MIGRATIONS))


def expand(sql: str, values: Sequence[Value]) -> tuple[str, Sequence[str | int | None]]:
    """Write out the marks of values that are tuples or lists, and flatten them."""
    if not any(isinstance(value, tuple | list) for value in values):
        return sql, cast("Sequence[str | int | None]", values)
    flat: list[str | int | None] = []
    pieces = sql.split("?")
    written = [pieces[0]]
    for value, piece in zip(values, pieces[1:], strict=True):
        if isinstance(value, tuple | list):
            flat.extend(value)
            written.append(f"({', '.join('?' * len(value))})")
        else:
            flat.append(value)
            written.append("?")
        written.append(piece)
    return "".join(written), flat


async def _outcome(work: Future[T]) -> T:
    # Shielded: a caller who leaves may not take a spend with it that is waiting to be recorded.
    return await asyncio.shield(asyncio.wrap_future(work))


# --- transactions --------------------------------------------------------------------------


def _reserve(transaction: Transaction, *, hold: Hold, at: datetime) -> BudgetExceeded | None:
    # A refusal is returned, not raised: the totals summed on the way to it must be kept, or an
    # exhausted budget would have them summed again for every request that it refuses.
    budgets = [budget for budget in hold.budgets if budget.name in hold.amounts]
    spent = _totals(transaction, budgets, at)
    transaction.changed(
        "DELETE FROM ledger_holds WHERE (id, match, period) IN "
        "(SELECT id, match, period FROM ledger_holds WHERE expires_at <= ? FOR UPDATE SKIP LOCKED)",
        _micros(at),
    )
    held = _held(transaction, budgets, at)
    lines: dict[tuple[str, str], int] = {}
    for budget in budgets:
        meaning = _match(budget), budget.period
        needed = hold.amounts[budget.name]
        left = remaining(budget, _dollars(spent[_match(budget), _span(budget.period, at)]), _dollars(held[meaning]))
        if needed > left:
            return _exceeded(budget, needed, left, at)
        lines[meaning] = max(_picos(needed), lines.get(meaning, 0))
    for (match, period), amount in lines.items():
        transaction.changed(
            "INSERT INTO ledger_holds (id, match, period, amount, expires_at) VALUES (?, ?, ?, ?, ?)",
            hold.id,
            match,
            period,
            amount,
            _micros(hold.expires_at),
        )
    return None


def _charge(transaction: Transaction, *, hold: Hold, spend: Spend) -> None:
    if not _record(transaction, spend) or not _lock(transaction, hold):
        return
    cost = _picos(spend.cost)
    transaction.changed(
        "UPDATE ledger_holds SET amount = CASE WHEN amount > ? THEN amount - ? ELSE 0 END WHERE id = ? AND match IN ?",
        cost,
        cost,
        hold.id,
        _matches(spend.scope),
    )
    # A long ingest charges on and on, and what it has yet to spend must not be given to others meanwhile.
    # A hold that had expired stays so: its money may be somebody else's by now.
    renewed = _micros(spend.at + timedelta(seconds=hold.ttl_seconds))
    transaction.changed(
        "UPDATE ledger_holds SET expires_at = ? WHERE id = ? AND expires_at < ? AND expires_at > ?",
        renewed,
        hold.id,
        renewed,
        _micros(spend.at),
    )


def _settle(transaction: Transaction, *, hold: Hold, spend: Spend) -> None:
    _record(transaction, spend)
    _release(transaction, hold=hold)


def _release(transaction: Transaction, *, hold: Hold) -> None:
    if _lock(transaction, hold):
        transaction.changed("DELETE FROM ledger_holds WHERE id = ?", hold.id)


def _lock(transaction: Transaction, hold: Hold) -> bool:
    """Lock what is left of a hold; False when nothing is."""
    if not hold.amounts:
        return False
    return bool(transaction.rows("SELECT 1 FROM ledger_holds WHERE id = ? ORDER BY match, period FOR UPDATE", hold.id))


def _record(transaction: Transaction, spend: Spend) -> bool:
    """Write a spend and count it into every total that covers it; False when it was written before."""
    scope, usage, cost = spend.scope, spend.usage, _picos(spend.cost)
    new = transaction.changed(
        "INSERT INTO ledger_spends (id, at, provider, model, task, key, cost, estimated, input_tokens, "
        "output_tokens, cached_tokens, images, counted) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO NOTHING",
        spend.id,
        _micros(spend.at),
        _text(scope.provider),
        _text(scope.model),
        _text(scope.task),
        _text(scope.key),
        cost,
        _picos(spend.estimated),
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.images,
        int(usage.counted),
    )
    if not new:
        return False
    for tag in sorted(scope.tags):
        transaction.changed("INSERT INTO ledger_tags (spend, tag) VALUES (?, ?)", spend.id, _text(tag))
    matches, spans = _matches(scope), [_span(period, spend.at) for period in get_args(Period)]
    totals = transaction.rows(
        "SELECT 1 FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE", matches, spans
    )
    if totals and cost:
        transaction.changed(
            "UPDATE ledger_totals SET spent = spent + ? WHERE match IN ? AND span IN ?", cost, matches, spans
        )
    return True


def _spent(transaction: Transaction, *, budget: Budget, at: datetime) -> tuple[int, int]:
    match, span = _match(budget), _span(budget.period, at)
    kept = transaction.rows("SELECT spent FROM ledger_totals WHERE match = ? AND span = ?", match, span)
    spent = kept[0][0] if kept else _sum(transaction, budget, at)
    return spent, _held(transaction, [budget], at)[match, budget.period]


def _usual_output_tokens(transaction: Transaction, *, provider: str, model: str) -> int | None:
    rows = transaction.rows(
        "SELECT output_tokens FROM ledger_spends WHERE provider = ? AND model = ? AND output_tokens > 0 "
        "ORDER BY at DESC LIMIT 200",
        provider,
        model,
    )
    if len(rows) < 10:
        return None
    lengths = sorted(int(row[0]) for row in rows)
    return lengths[math.ceil(0.95 * len(lengths)) - 1]


_GROUPS: Mapping[GroupBy, str] = {
    "provider": "provider",
    "model": "model",
    "task": "task",
    "key": "key",
    "tag": "tag",
    "day": f"at / {_DAY}",
}


def _report(transaction: Transaction, *, by: GroupBy, since: datetime | None) -> list[Spent]:
    tags = "LEFT JOIN ledger_tags ON spend = id" if by == "tag" else ""
    rows = transaction.rows(
        f"SELECT {_GROUPS[by]}, count(*), sum(cost), sum(estimated), sum(input_tokens), sum(output_tokens) "  # noqa: S608 - both from this file
        f"FROM ledger_spends {tags} WHERE at >= ? GROUP BY 1",
        0 if since is None else _micros(since),
    )
    lines = [
        Spent(
            group=(_EPOCH + timedelta(days=group)).date().isoformat() if by == "day" else group or "",
            calls=calls,
            cost=_dollars(cost),
            estimated=_dollars(estimated),
            input_tokens=int(input_tokens),
            output_tokens=int(output_tokens),
        )
        for group, calls, cost, estimated, input_tokens, output_tokens in rows
    ]
    return sorted(lines, key=lambda line: (-line.cost, line.group))


# --- what budgets have spent and hold ------------------------------------------------------


def _totals(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos spent by (match, span), locked until the transaction ends."""
    wanted = {(_match(budget), _span(budget.period, at)): budget for budget in budgets}
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
                _sum(transaction, wanted[match, span], at),
            )
    rows = transaction.rows(
        "SELECT match, span, spent FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE",
        matches,
        spans,
    )
    return {(match, span): spent for match, span, spent in rows}


_COVERS = {
    "provider": "provider = ?",
    "model": "model = ?",
    "task": "task = ?",
    "key": "key = ?",
    "tag": "EXISTS (SELECT 1 FROM ledger_tags WHERE spend = id AND tag = ?)",
}


def _sum(transaction: Transaction, budget: Budget, at: datetime) -> int:
    start, end = period_start(budget.period, at), period_end(budget.period, at)
    conditions = ["SELECT coalesce(sum(cost), 0) FROM ledger_spends WHERE at >= ? AND at < ?"]
    values: list[Value] = [_micros(start) if start else 0, _micros(end) if end else _MOST]
    for name, wanted in budget.match.items():
        conditions.append(_COVERS[name])
        values.append(_text(wanted))
    return int(transaction.rows(" AND ".join(conditions), *values)[0][0])


def _held(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos held by (match, period), in holds that have not expired."""
    held = {(_match(budget), str(budget.period)): 0 for budget in budgets}
    rows = transaction.rows(
        "SELECT match, period, sum(amount) FROM ledger_holds WHERE match IN ? AND expires_at > ? "
        "GROUP BY match, period",
        sorted({match for match, _ in held}),
        _micros(at),
    )
    return held | {(match, period): int(amount) for match, period, amount in rows}


def _exceeded(budget: Budget, needed: Decimal, left: Decimal, at: datetime) -> BudgetExceeded:
    end = period_end(budget.period, at)
    return BudgetExceeded(
        budget.name,
        limit=budget.limit,
        remaining=left,
        needed=needed,
        period=budget.period,
        resets=f"{end:%Y-%m-%d %H:%M} UTC" if end else None,
    )


# --- how values are written ----------------------------------------------------------------


def _match(budget: Budget) -> str:
    """What a budget covers, written one way: `{"key": "research"}`."""
    return json.dumps(dict(budget.match), sort_keys=True)


@lru_cache(maxsize=4096)
def _matches(scope: Scope) -> tuple[str, ...]:
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


def _span(period: Period, at: datetime) -> str:
    """The period that holds `at`, by name: `month 2026-11-01 00:00`."""
    start = period_start(period, at)
    return f"{period} {start:%Y-%m-%d %H:%M}" if start else period


def _micros(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _picos(amount: Decimal) -> int:
    return min(int(amount.scaleb(12).to_integral_value(ROUND_CEILING)), _MOST)


def _dollars(picos: int) -> Decimal:
    return Decimal(picos).scaleb(-12)


def _text(value: str | None) -> str | None:
    """What both databases can store: tags come from callers, and JSON may carry NUL or half a surrogate."""
    if value is None:
        return None
    return value.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
