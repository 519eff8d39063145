"""Circuits that several processes share: a table in the ledger's database."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias

from sekha.breaker import CLOSED, Circuit
from sekha.ledgers.database import Database, Transaction

__all__ = ["SharedCircuits", "Step"]

Step: TypeAlias = Callable[[Circuit], Circuit]
"""What happens to a circuit. It may be taken twice, and changes nothing the second time."""
Exchanged: TypeAlias = tuple[dict[str, Circuit], int]

_TABLES = (
    """CREATE TABLE IF NOT EXISTS sekha_circuits (
        name TEXT PRIMARY KEY, state TEXT NOT NULL, failures BIGINT NOT NULL, successes BIGINT NOT NULL,
        since BIGINT NOT NULL, last_failure_at BIGINT, error TEXT,
        probe TEXT, probe_until BIGINT, version BIGINT NOT NULL
    )""",
    "CREATE TABLE IF NOT EXISTS sekha_circuits_version (id BIGINT PRIMARY KEY, version BIGINT NOT NULL)",
    "INSERT INTO sekha_circuits_version (id, version) VALUES (1, 0) ON CONFLICT (id) DO NOTHING",
)
_COLUMNS = "name, state, failures, successes, since, last_failure_at, error, probe, probe_until"


class SharedCircuits:
    """Takes steps one after the other, whoever asks for them, and tells what changed since."""

    def __init__(self, database: Database) -> None:
        """The database stays its opener's, who closes it after the circuits."""
        self._database = database
        self._made = False

    def exchange(self, steps: Sequence[tuple[str, Step]], since: int) -> Future[Exchanged]:
        """Take the steps, then read the circuits that they meant and those that changed after version `since`.

        Also returns the version that this brings the caller to. All of it is done, or nothing.
        """
        work = partial(_exchange, steps=tuple(steps), since=since)
        if steps or not self._made:
            return self._database.write(partial(self._make_and, work), durable=False)
        return self._database.read(work)

    def known(self) -> Future[Mapping[str, Circuit]]:
        """Read every circuit, and write nothing: a `LedgerError` where no gateway ever made the table."""
        return self._database.read(_known)

    def _make_and(self, work: Callable[[Transaction], Exchanged], transaction: Transaction) -> Exchanged:
        if not self._made:
            # PostgreSQL fails when two make a table at the same moment, so they queue for a row that is there.
            transaction.lock("SELECT version FROM ledger_version FOR UPDATE")
            for statement in _TABLES:
                transaction.changed(statement)
        done = work(transaction)
        self._made = True
        return done


def _exchange(transaction: Transaction, *, steps: tuple[tuple[str, Step], ...], since: int) -> Exchanged:
    told: dict[str, Circuit] = {}
    if steps:
        # Whoever writes holds this row until it has committed. So versions appear in their order, and a reader
        # that has seen one has seen all before it.
        transaction.changed("UPDATE sekha_circuits_version SET version = version + 1 WHERE id = 1")
        ((version,),) = transaction.rows("SELECT version FROM sekha_circuits_version WHERE id = 1")
        for name, step in steps:
            before = told[name] if name in told else _read(transaction, name)
            told[name] = after = step(before)
            if after != before:
                _write(transaction, name, after, version)
    rows = transaction.rows(f"SELECT version, {_COLUMNS} FROM sekha_circuits WHERE version > ?", since)  # noqa: S608
    changed = {row[1]: _circuit(row[2:]) for row in rows}
    return {**told, **changed}, max([since, *(row[0] for row in rows)])


def _known(transaction: Transaction) -> Mapping[str, Circuit]:
    rows = transaction.rows(f"SELECT {_COLUMNS} FROM sekha_circuits")  # noqa: S608
    return {row[0]: _circuit(row[1:]) for row in rows}


def _read(transaction: Transaction, name: str) -> Circuit:
    rows = transaction.rows(f"SELECT {_COLUMNS} FROM sekha_circuits WHERE name = ?", name)  # noqa: S608
    return _circuit(rows[0][1:]) if rows else CLOSED


def _write(transaction: Transaction, name: str, circuit: Circuit, version: int) -> None:
    transaction.changed(
        f"INSERT INTO sekha_circuits ({_COLUMNS}, version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "  # noqa: S608
        "ON CONFLICT (name) DO UPDATE SET state = excluded.state, failures = excluded.failures, "
        "successes = excluded.successes, since = excluded.since, last_failure_at = excluded.last_failure_at, "
        "error = excluded.error, probe = excluded.probe, probe_until = excluded.probe_until, "
        "version = excluded.version",
        name,
        circuit.state,
        circuit.failures,
        circuit.successes,
        _micros(circuit.since),
        _micros(circuit.last_failure_at),
        circuit.error,
        circuit.probe,
        _micros(circuit.probe_until),
        version,
    )


def _circuit(row: tuple[Any, ...]) -> Circuit:
    state, failures, successes, since, last_failure_at, error, probe, probe_until = row
    return Circuit(
        state=state,
        failures=failures,
        successes=successes,
        since=since / 1e6,
        last_failure_at=None if last_failure_at is None else last_failure_at / 1e6,
        error=error,
        probe=probe,
        probe_until=None if probe_until is None else probe_until / 1e6,
    )


def _micros(at: float | None) -> int | None:
    return None if at is None else round(at * 1e6)
