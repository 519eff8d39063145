"""The ledger's transactions, written once in the SQL that SQLite and PostgreSQL share.

Amounts are whole pico-dollars (1e-12): every listed price comes out even for a single token, sums
are exact, and 64 bits hold nine million dollars. Anything finer is rounded up, so that a limit stays a
limit. Times are microseconds since 1970.

What is spent is summed from the spends. So that no request sums a month, `ledger_totals` keeps the
sums that some budget has asked for, by what they mean (which calls, which period), not by the
budget's name: a budget that is renamed or edited finds its own, and a new one starts with a sum over
the spends, in the transaction that first asks.

A row of `ledger_spends` is one call, or what the calls of one process in one scope and minute cost together:
a gateway makes thousands a second, and nothing that is asked of them needs each by itself. Such sums
have no id that would show that a call was recorded before. What they were made of is counted in the process's
journal instead, and `ledger_journals` says up to where that is on record.

A process may hold a slice of a budget (`sekha/ledgers/leased.py`). It is a hold like any other, under the
process's own id, with the part that no call of its own needs yet marked as `idle`. Whoever finds too
little left recalls idle slices, and their owners give them back.

Locks are taken in one order everywhere, so that transactions wait for each other but never in a
circle: how far a journal is on record, spends, totals by name, holds.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from itertools import chain, combinations
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, cast, get_args
from uuid import uuid4

from sekha.errors import BudgetExceeded, LedgerError
from sekha.ledger import Budget, GroupBy, Hold, Period, Scope, Spend, Spent, period_end, period_start, remaining

__all__ = [
    "LAST_REPLIES",
    "SHARE",
    "Batch",
    "Coverage",
    "Database",
    "Kept",
    "Leased",
    "Slice",
    "SqlLedger",
    "Standing",
    "Tally",
    "Transaction",
    "Value",
    "Wanted",
    "exceeded",
    "expand",
    "meaning",
    "migrate",
    "picos",
    "storable",
    "to_dollars",
]

T = TypeVar("T")
Value: TypeAlias = str | int | tuple[str, ...] | list[str] | None

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = 86_400_000_000
_HOUR = 3_600_000_000
_MOST = 2**63 - 1
_HUGE = 2**54
_PICOS = Decimal(10**12)
_PICO = Decimal("1e-12")

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
    (
        "ALTER TABLE ledger_holds ADD COLUMN idle BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE ledger_holds ADD COLUMN recalled_at BIGINT NOT NULL DEFAULT 0",
        "CREATE INDEX ledger_totals_span ON ledger_totals (span)",
    ),
    (
        "ALTER TABLE ledger_spends ADD COLUMN calls BIGINT NOT NULL DEFAULT 1",
        "CREATE TABLE ledger_journals (process TEXT PRIMARY KEY, recorded BIGINT NOT NULL)",
        """CREATE TABLE ledger_replies (
            provider TEXT NOT NULL, model TEXT NOT NULL, at BIGINT NOT NULL, output_tokens BIGINT NOT NULL
        )""",
        """INSERT INTO ledger_replies SELECT provider, model, at, output_tokens FROM (
            SELECT provider, model, at, output_tokens,
                row_number() OVER (PARTITION BY provider, model ORDER BY at DESC) AS place FROM ledger_spends
            WHERE output_tokens > 0 AND provider IS NOT NULL AND model IS NOT NULL
        ) AS replies WHERE place <= 200""",
        "CREATE INDEX ledger_replies_at ON ledger_replies (provider, model, at, output_tokens)",
        "DROP INDEX ledger_spends_replies",
    ),
)

LAST_REPLIES = 200
"""As many replies say how long a model's usually are."""
SHARE = 20
"""A slice is this part of what is left, so that it shrinks toward nothing as the budget is spent."""
_TIDIED = 50
"""One in so many spends, picked by its microseconds, also forgets replies. Each would take a third longer by that."""
_RECALL_MICROS = 2_000_000
"""An idle slice that its owner has not given back so long after it was recalled is not waited for."""


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


class Standing(NamedTuple):
    """Picos spent in a period, and held by others for calls under way."""

    spent: int
    elsewhere: int


class Tally:
    """What calls of one process in one scope and minute cost together, in picos and tokens."""

    __slots__ = (
        "at", "cached_tokens", "calls", "cost", "counted", "estimated", "id", "images", "input_tokens", "output_tokens",
        "replies", "scope",
    )  # fmt: skip

    def __init__(self, identity: str, scope: Scope, at: datetime, *, counted: bool) -> None:
        self.id = identity
        """The same for all that is recorded of this scope and minute: it is added up there."""
        self.scope = scope
        self.at = at
        """When the first of the calls was made."""
        self.counted = counted
        self.calls = self.cost = self.estimated = 0
        self.input_tokens = self.output_tokens = self.cached_tokens = self.images = 0
        self.replies: deque[tuple[datetime, int]] = deque(maxlen=LAST_REPLIES)
        """When the last calls were made, and how many tokens came out."""


class Batch(NamedTuple):
    """What a process spent, to be recorded together."""

    upto: int
    """How many spends the process's journal had when the last of these was in it: recorded up to there once."""
    tallies: Sequence[Tally]
    spends: Sequence[Spend]
    """Those that are recorded each by itself, under its own id."""


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
        scope: Scope | None = None,  # noqa: ARG002 - for ledgers that outlive their process
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
        return to_dollars(spent), to_dollars(held)

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        return await _outcome(self._database.read(partial(_usual_output_tokens, provider=provider, model=model)))

    async def report(self, by: GroupBy, *, since: datetime | None = None) -> list[Spent]:
        return await _outcome(self._database.read(partial(_report, by=by, since=since)))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._database.close)

    async def lease(self, owner: str, wanted: Sequence[Wanted], *, at: datetime, expires_at: datetime) -> list[Leased]:
        """Enlarge slices by what is needed and left, each as far as it goes, and recall what others leave idle."""
        work = partial(_lease, owner=owner, wanted=wanted, at=at, expires_at=expires_at)
        return await _outcome(self._database.write(work, durable=False))

    async def keep(self, owner: str, batch: Batch | None, slices: Sequence[Slice], *, expires_at: datetime) -> Kept:
        """Record what was spent and write down the slices that it was taken from, all in one transaction."""
        work = partial(_keep, owner=owner, batch=batch, slices=slices, expires_at=expires_at)
        return await _outcome(self._database.write(work, durable=batch is not None))

    async def close_lease(self, owner: str, batch: Batch | None, holds: Sequence[tuple[Hold, Sequence[Slice]]]) -> None:
        """Record what was spent from a process's slices, make holds of calls under way, and free the rest."""
        work = partial(_close_lease, owner=owner, batch=batch, holds=holds)
        await _outcome(self._database.write(work, durable=True))

    async def finish(self, owner: str, spends: Sequence[tuple[int, Spend]], worst: Sequence[Spend]) -> int:
        """Record what a dead process spent, by its journal's numbers, and what its calls cost at worst; how many."""
        work = partial(_finish, owner=owner, spends=spends, worst=worst)
        return await _outcome(self._database.write(work, durable=True))

    async def forget(self, owner: str) -> None:
        """Forget how much of a process's journal is on record, once there is no journal any more."""
        await _outcome(self._database.write(partial(_forget, owner=owner), durable=False))

    async def standings(self, owner: str, budgets: Sequence[Budget], *, at: datetime) -> list[Standing]:
        """What each budget has spent and others hold for calls, in the period that holds `at`."""
        found = await _outcome(self._database.read(partial(_standings, owner=owner, budgets=budgets, at=at)))
        if None in found:
            # Kept from now on, since whoever asks once will ask again.
            await _outcome(self._database.write(partial(_totals, budgets=budgets, at=at), durable=False))
            found = await _outcome(self._database.read(partial(_standings, owner=owner, budgets=budgets, at=at)))
        return [standing for standing in found if standing is not None]

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
    if {tuple, list}.isdisjoint(map(type, values)):
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
    _drop_expired(transaction, at, owner="")
    held = _held(transaction, budgets, at)
    lines: dict[tuple[str, str], int] = {}
    for budget in budgets:
        line = meaning(budget), budget.period
        needed = hold.amounts[budget.name]
        left = remaining(budget, to_dollars(spent[line[0], _span(budget.period, at)]), to_dollars(held[line]))
        if needed > left:
            _recall(transaction, [line], owner="", at=at)
            return exceeded(budget, needed, left, at)
        lines[line] = max(picos(needed), lines.get(line, 0))
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
    cost = picos(spend.cost)
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
    cost = picos(spend.cost)
    new = transaction.changed(f"{_INSERT_SPENDS} {_ROW} ON CONFLICT (id) DO NOTHING", *_row(spend))
    if not new:
        return False
    for tag in sorted(spend.scope.tags):
        transaction.changed("INSERT INTO ledger_tags (spend, tag) VALUES (?, ?)", spend.id, storable(tag))
    replies = _replies_of(spend)
    if _micros(spend.at) % _TIDIED:
        _insert_replies(transaction, replies)
    else:
        _note_replies(transaction, replies)
    matches, spans = _matches(spend.scope), _spans(_micros(spend.at) // _HOUR)
    totals = transaction.rows(
        "SELECT 1 FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE", matches, spans
    )
    if totals and cost:
        transaction.changed(
            "UPDATE ledger_totals SET spent = spent + ? WHERE match IN ? AND span IN ?", cost, matches, spans
        )
    return True


_SUMS = ("calls", "cost", "estimated", "input_tokens", "output_tokens", "cached_tokens", "images")
_COLUMNS = f"id, at, provider, model, task, key, counted, {', '.join(_SUMS)}"
_INSERT_SPENDS = f"INSERT INTO ledger_spends ({_COLUMNS}) VALUES"
_ROW = f"({', '.join('?' * len(_COLUMNS.split(',')))})"


def _row(spend: Spend) -> tuple[str | int | None, ...]:
    usage = spend.usage
    return (
        spend.id,
        _micros(spend.at),
        *_stored(spend.scope),
        int(usage.counted),
        1,
        picos(spend.cost),
        picos(spend.estimated),
        min(usage.input_tokens, _MOST),
        min(usage.output_tokens, _MOST),
        min(usage.cached_tokens, _MOST),
        min(usage.images, _MOST),
    )


def _tally_row(tally: Tally, upto: int) -> tuple[str | int | None, ...]:
    sums = [min(getattr(tally, name), _MOST) for name in _SUMS]
    # Databases fail to add up beyond 64 bits: what is absurdly large stays by itself.
    identity = tally.id if max(sums) < _HUGE else f"{tally.id}+{upto}"
    return (identity, _micros(tally.at), *_stored(tally.scope), int(tally.counted), *sums)


@lru_cache(maxsize=256)
def _stored(scope: Scope) -> tuple[str | None, ...]:
    """Whom a spend is charged to, as its row says it."""
    return tuple(map(storable, (scope.provider, scope.model, scope.task, scope.key)))


def _spent(transaction: Transaction, *, budget: Budget, at: datetime) -> tuple[int, int]:
    match, span = meaning(budget), _span(budget.period, at)
    kept = transaction.rows("SELECT spent FROM ledger_totals WHERE match = ? AND span = ?", match, span)
    spent = kept[0][0] if kept else _sum(transaction, budget, at)
    # What lies idle in slices is held for no call, and comes back when somebody needs it.
    held = transaction.rows(
        "SELECT coalesce(sum(amount - idle), 0) FROM ledger_holds WHERE match = ? AND period = ? AND expires_at > ?",
        match,
        budget.period,
        _micros(at),
    )
    return spent, int(held[0][0])


def _usual_output_tokens(transaction: Transaction, *, provider: str, model: str) -> int | None:
    rows = transaction.rows(
        "SELECT output_tokens FROM ledger_replies WHERE provider = ? AND model = ? ORDER BY at DESC LIMIT ?",
        provider,
        model,
        LAST_REPLIES,
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
        f"SELECT {_GROUPS[by]}, sum(calls), sum(cost), sum(estimated), sum(input_tokens), sum(output_tokens) "  # noqa: S608 - both from this file
        f"FROM ledger_spends {tags} WHERE at >= ? GROUP BY 1",
        0 if since is None else _micros(since),
    )
    lines = [
        Spent(
            group=(_EPOCH + timedelta(days=group)).date().isoformat() if by == "day" else group or "",
            calls=int(calls),
            cost=to_dollars(cost),
            estimated=to_dollars(estimated),
            input_tokens=int(input_tokens),
            output_tokens=int(output_tokens),
        )
        for group, calls, cost, estimated, input_tokens, output_tokens in rows
    ]
    return sorted(lines, key=lambda line: (-line.cost, line.group))


# --- slices ---------------------------------------------------------------------------------


def _lease(
    transaction: Transaction, *, owner: str, wanted: Sequence[Wanted], at: datetime, expires_at: datetime
) -> list[Leased]:
    budgets = [want.budget for want in wanted]
    spent = _totals(transaction, budgets, at)
    _drop_expired(transaction, at, owner)
    held = _held_elsewhere(transaction, owner, budgets, at)
    there = _lock_slices(transaction, owner, [want.slice for want in wanted])
    leased: list[Leased] = []
    short: list[tuple[str, str]] = []
    for want in wanted:
        line = want.slice.match, want.slice.period
        others = held.get(line, _Elsewhere(0, 0, 0))
        lost = want.slice.idle > 0 and line not in there
        idle = 0 if lost else want.slice.idle
        total = spent[line[0], _span(want.budget.period, at)]
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
    _recall(transaction, short, owner=owner, at=at)
    return leased


def _keep(
    transaction: Transaction, *, owner: str, batch: Batch | None, slices: Sequence[Slice], expires_at: datetime
) -> Kept:
    tallied, new = _record_batch(transaction, owner, batch)
    there = _lock_slices(transaction, owner, slices)
    lost = {(one.match, one.period) for one in slices if one.idle and (one.match, one.period) not in there}
    for one in sorted(slices):
        gone = (one.match, one.period) in lost
        _write_slice(transaction, owner, one._replace(idle=0) if gone else one, expires_at)
    recalled = transaction.rows("SELECT match, period FROM ledger_holds WHERE id = ? AND recalled_at > 0", owner)
    return Kept(tallied, new, frozenset(lost), frozenset((match, period) for match, period in recalled))


def _close_lease(
    transaction: Transaction, *, owner: str, batch: Batch | None, holds: Sequence[tuple[Hold, Sequence[Slice]]]
) -> None:
    _record_batch(transaction, owner, batch)
    transaction.changed("DELETE FROM ledger_holds WHERE id = ?", owner)
    for hold, slices in holds:
        for one in sorted(slices):
            _write_slice(transaction, hold.id, one, hold.expires_at)


def _finish(
    transaction: Transaction, *, owner: str, spends: Sequence[tuple[int, Spend]], worst: Sequence[Spend]
) -> int:
    # Made and locked before it is read: the process may have died while its last commit was under way.
    transaction.changed(
        "INSERT INTO ledger_journals (process, recorded) VALUES (?, 0) ON CONFLICT (process) DO NOTHING", owner
    )
    rows = transaction.rows("SELECT recorded FROM ledger_journals WHERE process = ? FOR UPDATE", owner)
    recorded = rows[0][0]
    # Kept from now on: whoever finds the journal again before it is removed has nothing left to record.
    _record_upto(transaction, owner, max((number for number, _ in spends), default=0))
    new = _record_all(transaction, [*(spend for number, spend in spends if number > recorded), *worst])
    transaction.changed("DELETE FROM ledger_holds WHERE id = ?", owner)
    return len(new)


def _forget(transaction: Transaction, *, owner: str) -> None:
    transaction.changed("DELETE FROM ledger_journals WHERE process = ?", owner)


def _lock_slices(transaction: Transaction, owner: str, slices: Sequence[Slice]) -> set[tuple[str, str]]:
    """Lock those of the slices that are there still."""
    if not slices:
        return set()
    rows = transaction.rows(
        "SELECT match, period FROM ledger_holds WHERE id = ? AND match IN ? ORDER BY match, period FOR UPDATE",
        owner,
        sorted({one.match for one in slices}),
    )
    return {(match, period) for match, period in rows}


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
        min(one.in_use + one.idle, _MOST),
        one.idle,
        _micros(expires_at),
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
        _micros(at) - _RECALL_MICROS,
        sorted({meaning(budget) for budget in budgets}),
        owner,
        _micros(at),
    )
    return {
        (match, period): _Elsewhere(int(amount), int(idle), int(soon)) for match, period, amount, idle, soon in rows
    }


def _recall(transaction: Transaction, lines: Iterable[tuple[str, str]], *, owner: str, at: datetime) -> None:
    """Ask for what others leave idle. Slices that are being written are passed over: they are in use."""
    for match, period in sorted(lines):
        transaction.changed(
            "UPDATE ledger_holds SET recalled_at = ? WHERE (id, match, period) IN (SELECT id, match, period "
            "FROM ledger_holds WHERE match = ? AND period = ? AND id <> ? AND idle > 0 AND recalled_at = 0 "
            "FOR UPDATE SKIP LOCKED)",
            max(_micros(at), 1),
            match,
            period,
            owner,
        )


def _record_batch(transaction: Transaction, owner: str, batch: Batch | None) -> tuple[bool, frozenset[str]]:
    """Write what a process spent; whether its tallies were new, and the ids of the other spends that were."""
    if batch is None:
        return False, frozenset()
    tallied = _record_upto(transaction, owner, batch.upto) and bool(batch.tallies)
    if tallied:
        _record_tallies(transaction, batch.tallies, batch.upto)
    return tallied, _record_all(transaction, batch.spends)


def _record_upto(transaction: Transaction, owner: str, upto: int) -> bool:
    """Note that so many of a journal's spends are on record; False when they were before."""
    return bool(
        transaction.changed(
            "INSERT INTO ledger_journals (process, recorded) VALUES (?, ?) ON CONFLICT (process) "
            "DO UPDATE SET recorded = excluded.recorded WHERE ledger_journals.recorded < excluded.recorded",
            owner,
            upto,
        )
    )


def _record_tallies(transaction: Transaction, tallies: Sequence[Tally], upto: int) -> None:
    rows = {str(row[0]): (row, tally) for tally in tallies for row in [_tally_row(tally, upto)]}
    tags: list[tuple[Value, ...]] = []
    for some in _chunks(sorted(rows)):
        written = transaction.rows(_upsert(len(some)), *chain.from_iterable(rows[identity][0] for identity in some))
        for identity, calls in written:
            tally = rows[identity][1]
            if tally.scope.tags and calls == tally.calls:
                tags += [(identity, storable(tag)) for tag in sorted(tally.scope.tags)]
    _insert(transaction, "ledger_tags (spend, tag)", tags)
    _note_replies(transaction, [reply for tally in tallies for reply in _replies_of(tally)])
    _add_to_totals(transaction, [(_micros(tally.at), tally.scope, tally.cost) for tally in tallies])


def _record_all(transaction: Transaction, spends: Sequence[Spend]) -> frozenset[str]:
    """Write spends and count them into the totals that cover them; the ids of those that were new."""
    # In one order, so that two who record the same ones wait for each other but never in a circle.
    ordered = sorted(spends, key=lambda spend: spend.id)
    new: set[str] = set()
    for some in _chunks(ordered):
        written = transaction.rows(_insert_or_leave(len(some)), *chain.from_iterable(map(_row, some)))
        new.update(row[0] for row in written)
    if not new:
        return frozenset()
    recorded = list({spend.id: spend for spend in reversed(ordered) if spend.id in new}.values())
    tags = [(spend.id, storable(tag)) for spend in recorded for tag in sorted(spend.scope.tags)]
    _insert(transaction, "ledger_tags (spend, tag)", tags)
    _note_replies(transaction, [reply for spend in recorded for reply in _replies_of(spend)])
    _add_to_totals(transaction, [(_micros(spend.at), spend.scope, picos(spend.cost)) for spend in recorded])
    return frozenset(new)


@lru_cache
def _insert_or_leave(spends: int) -> str:
    return f"{_INSERT_SPENDS} {', '.join([_ROW] * spends)} ON CONFLICT (id) DO NOTHING RETURNING id"


@lru_cache
def _upsert(tallies: int) -> str:
    sums = ", ".join(f"{name} = ledger_spends.{name} + excluded.{name}" for name in _SUMS)
    return f"{_INSERT_SPENDS} {', '.join([_ROW] * tallies)} ON CONFLICT (id) DO UPDATE SET {sums} RETURNING id, calls"


def _insert(transaction: Transaction, table: str, rows: Sequence[tuple[Value, ...]]) -> None:
    for some in _chunks(rows):
        marks = ", ".join([f"({', '.join('?' * len(some[0]))})"] * len(some))
        transaction.changed(f"INSERT INTO {table} VALUES {marks}", *chain.from_iterable(some))  # noqa: S608 - nothing but marks


_Reply: TypeAlias = tuple[str, str, int, int]
"""Provider, model, when in micros, and tokens that came out."""


def _replies_of(what: Spend | Tally) -> list[_Reply]:
    provider, model, _, _ = _stored(what.scope)
    if provider is None or model is None:
        return []
    replies = [(what.at, what.usage.output_tokens)] if isinstance(what, Spend) else what.replies
    return [(provider, model, _micros(at), min(tokens, _MOST)) for at, tokens in replies if tokens > 0]


def _insert_replies(transaction: Transaction, replies: Sequence[_Reply]) -> None:
    _insert(transaction, "ledger_replies (provider, model, at, output_tokens)", replies)


def _note_replies(transaction: Transaction, replies: Sequence[_Reply]) -> None:
    """Write down how long the last replies of each model were, and forget those before."""
    by_model: dict[tuple[str, str], list[_Reply]] = {}
    for reply in replies:
        by_model.setdefault(reply[:2], []).append(reply)
    for (provider, model), found in sorted(by_model.items()):
        _insert_replies(transaction, sorted(found)[-LAST_REPLIES:])
        transaction.changed(
            "DELETE FROM ledger_replies WHERE (provider, model, at) IN (SELECT provider, model, at FROM ledger_replies "
            "WHERE provider = ? AND model = ? AND at < (SELECT min(at) FROM (SELECT at FROM ledger_replies "
            "WHERE provider = ? AND model = ? ORDER BY at DESC LIMIT ?) AS newest) FOR UPDATE SKIP LOCKED)",
            provider,
            model,
            provider,
            model,
            LAST_REPLIES,
        )


def _add_to_totals(transaction: Transaction, spent: Iterable[tuple[int, Scope, int]]) -> None:
    """Count what was spent, each with its time in micros and its cost in picos, into the totals that cover it."""
    added = _added(transaction, spent)
    if added:
        matches, spans = sorted({match for match, _ in added}), sorted({span for _, span in added})
        transaction.rows(
            "SELECT 1 FROM ledger_totals WHERE match IN ? AND span IN ? ORDER BY match, span FOR UPDATE", matches, spans
        )
    for (match, span), cost in sorted(added.items()):
        transaction.changed(
            "UPDATE ledger_totals SET spent = spent + ? WHERE match = ? AND span = ?", cost, match, span
        )


def _added(transaction: Transaction, spent: Iterable[tuple[int, Scope, int]]) -> dict[tuple[str, str], int]:
    """What this adds to each total that is kept, by match and span."""
    by_span: dict[tuple[str, ...], dict[Scope, int]] = {}
    for micros, scope, cost in spent:
        by_scope = by_span.setdefault(_spans(micros // _HOUR), {})
        by_scope[scope] = by_scope.get(scope, 0) + cost
    kept = transaction.rows(
        "SELECT match, span FROM ledger_totals WHERE span IN ?", sorted({span for spans in by_span for span in spans})
    )
    by_match: dict[str, set[str]] = {}
    for match, span in kept:
        by_match.setdefault(match, set()).add(span)
    coverage: Coverage[str] = Coverage()
    for match in by_match:
        coverage.add(_fields(match), match)
    added: dict[tuple[str, str], int] = {}
    for spans, by_scope in by_span.items():
        for scope, cost in by_scope.items():
            for match in coverage.of(scope) if cost else ():
                for span in by_match[match].intersection(spans):
                    added[match, span] = added.get((match, span), 0) + cost
    return added


@lru_cache(maxsize=64)
def _spans(hour: int) -> tuple[str, ...]:
    """The periods that hold this hour since 1970."""
    at = _EPOCH + timedelta(hours=hour)
    return tuple(_span(period, at) for period in get_args(Period))


def _chunks(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Split into pieces of few different lengths, so that databases meet statements again that they know."""
    start = 0
    for length in (100, 10, 1):
        while len(items) - start >= length:
            yield items[start : start + length]
            start += length


def _standings(
    transaction: Transaction, *, owner: str, budgets: Sequence[Budget], at: datetime
) -> list[Standing | None]:
    spans = sorted({_span(budget.period, at) for budget in budgets})
    matches = sorted({meaning(budget) for budget in budgets})
    rows = transaction.rows(
        "SELECT match, span, spent FROM ledger_totals WHERE match IN ? AND span IN ?", matches, spans
    )
    spent = {(match, span): total for match, span, total in rows}
    held = _held_elsewhere(transaction, owner, budgets, at)
    found: list[Standing | None] = []
    for budget in budgets:
        match = meaning(budget)
        others = held.get((match, budget.period), _Elsewhere(0, 0, 0))
        total = spent.get((match, _span(budget.period, at)))
        found.append(None if total is None else Standing(total, others.amount - others.idle))
    return found


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


@lru_cache(maxsize=4096)
def _fields(match: str) -> Mapping[str, str]:
    return cast("dict[str, str]", json.loads(match))


# --- what budgets have spent and hold ------------------------------------------------------


def _totals(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos spent by (match, span), locked until the transaction ends."""
    wanted = {(meaning(budget), _span(budget.period, at)): budget for budget in budgets}
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
        values.append(storable(wanted))
    return int(transaction.rows(" AND ".join(conditions), *values)[0][0])


def _drop_expired(transaction: Transaction, at: datetime, owner: str) -> None:
    """Forget what has expired, but for the owner's own, which is about to be renewed."""
    transaction.changed(
        "DELETE FROM ledger_holds WHERE (id, match, period) IN "
        "(SELECT id, match, period FROM ledger_holds WHERE expires_at <= ? AND id <> ? FOR UPDATE SKIP LOCKED)",
        _micros(at),
        owner,
    )


def _held(transaction: Transaction, budgets: Sequence[Budget], at: datetime) -> dict[tuple[str, str], int]:
    """Picos held by (match, period), in holds that have not expired."""
    held = {(meaning(budget), str(budget.period)): 0 for budget in budgets}
    rows = transaction.rows(
        "SELECT match, period, sum(amount) FROM ledger_holds WHERE match IN ? AND expires_at > ? "
        "GROUP BY match, period",
        sorted({match for match, _ in held}),
        _micros(at),
    )
    return held | {(match, period): int(amount) for match, period, amount in rows}


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


# --- how values are written ----------------------------------------------------------------


def meaning(budget: Budget) -> str:
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
    # Dividing by a timedelta takes five times as long, and every spend has two of these.
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def picos(amount: Decimal) -> int:
    # Four times for each request: `scaleb` and `min` would take half a microsecond more each.
    whole = math.ceil(amount * _PICOS)
    return whole if whole < _MOST else _MOST


def to_dollars(picos: int) -> Decimal:
    return picos * _PICO


def storable(value: str | None) -> str | None:
    """What both databases can store: tags come from callers, and JSON may carry NUL or half a surrogate."""
    if value is None or (value.isascii() and "\x00" not in value):
        return value
    return value.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
