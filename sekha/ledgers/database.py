"""What a ledger needs of a database, its tables, and how SQL is written for SQLite and PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from sekha.errors import LedgerError

__all__ = ["Database", "Transaction", "Value", "chunks", "expand", "insert", "migrate"]

T = TypeVar("T")
Value: TypeAlias = str | int | tuple[str, ...] | list[str] | None

MIGRATION_SECONDS = 3600.0
"""A step of a migration may read all that was ever spent."""

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


class Transaction(Protocol):
    """One open transaction. SQL marks values with `?`; a tuple or list becomes `(?, ?, …)`."""

    def rows(self, sql: str, *values: Value) -> list[tuple[Any, ...]]: ...

    def changed(self, sql: str, *values: Value) -> int:
        """Run a statement and say how many rows it changed."""
        ...

    def lock(self, sql: str, *values: Value) -> None:
        """Lock the rows that a SELECT … FOR UPDATE finds, in its order, where others could change them meanwhile."""
        ...

    def freeze_spends(self) -> None:
        """Let no other transaction record a spend until this one ends."""
        ...

    def take_long(self, seconds: float) -> None:
        """Let each statement from here on take so long: a server that is well is not taken for one that is silent."""
        ...


class Database(Protocol):
    """Runs work in transactions, in threads of its own, so that the event loop never waits.

    Every future ends, in a result or a `LedgerError`, also when a server falls silent: then within seconds, but for
    work that may take long. Work may run beside other work, and is done as a whole or not at all. Which of the two is
    unknown after a server was lost or silent, so that work may be handed in again: it keeps the rows that it locked
    until it is decided, and then finds what it wrote.
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
    transaction.take_long(MIGRATION_SECONDS)
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


def insert(transaction: Transaction, table: str, rows: Sequence[tuple[Value, ...]]) -> None:
    """Insert many rows in few statements; `table` names the columns too."""
    for some in chunks(rows):
        marks = ", ".join([f"({', '.join('?' * len(some[0]))})"] * len(some))
        transaction.changed(f"INSERT INTO {table} VALUES {marks}", *chain.from_iterable(some))  # noqa: S608 - nothing but marks


def chunks(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Split into pieces of few different lengths, so that databases meet statements again that they know."""
    start = 0
    for length in (100, 10, 1):
        while len(items) - start >= length:
            yield items[start : start + length]
            start += length
