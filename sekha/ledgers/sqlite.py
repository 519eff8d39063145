"""A ledger in a SQLite file, shared by every process of one machine."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sekha.errors import LedgerError, LedgerUnavailable
from sekha.ledgers.database import Transaction, Value, expand, migrate
from sekha.wal import use_wal

__all__ = ["SqliteDatabase"]

T = TypeVar("T")

_LARGEST_BATCH = 256
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
}


class _Write(NamedTuple):
    work: Callable[[Transaction], Any]
    durable: bool
    future: Future[Any]


class SqliteDatabase:
    """One connection that writes and one that reads, each in a thread of its own.

    Writes that wait together are committed together: a file has one writer at a time, and what a
    commit costs is the wait for the disk. Each is still done as a whole or not at all.
    """

    def __init__(self, path: str, *, busy_seconds: float = 10.0) -> None:
        self._path = path
        self._busy_seconds = busy_seconds
        self._waiting: deque[_Write] = deque()
        self._writer = ThreadPoolExecutor(1, "ledger-writer")
        self._reader = ThreadPoolExecutor(1, "ledger-reader")
        self._writing: sqlite3.Connection | None = None
        self._durable: bool | None = None
        """Whether that connection's commits wait for the disk; None before the first."""
        self._reading: sqlite3.Connection | None = None

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.append(_Write(work, durable, future))
        self._writer.submit(self._write_waiting)
        return future

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._reader.submit(self._read, work)

    def close(self) -> None:
        for executor in (self._writer, self._reader):
            executor.shutdown(wait=True)
        for connection in (self._writing, self._reading):
            if connection is not None:
                connection.close()

    def _write_waiting(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _LARGEST_BATCH))]
        if not batch:
            return
        try:
            with self._translated():
                if self._writing is None:
                    self._writing = self._connect()
                deliveries = self._commit(self._writing, batch)
        except Exception as error:
            deliveries = [partial(write.future.set_exception, error) for write in batch]
        for deliver in deliveries:
            deliver()

    def _commit(self, connection: sqlite3.Connection, batch: list[_Write]) -> list[Callable[[], None]]:
        # Spending must outlive a power cut, so its commits wait for the disk (FULL). Holds need not:
        # a power cut also ends every process on this machine that could spend them. Both outlive a
        # kill -9, and a FULL commit makes all earlier ones durable with it.
        durable = any(write.durable for write in batch)
        if durable is not self._durable:
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        transaction = _SqliteTransaction(connection)
        deliveries: list[Callable[[], None]] = []
        connection.execute("BEGIN IMMEDIATE")
        try:
            for write in batch:
                connection.execute("SAVEPOINT one")
                try:
                    with self._translated():
                        result = write.work(transaction)
                except Exception as error:
                    connection.execute("ROLLBACK TO one")
                    deliveries.append(partial(write.future.set_exception, error))
                else:
                    deliveries.append(partial(write.future.set_result, result))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return deliveries

    def _read(self, work: Callable[[Transaction], T]) -> T:
        with self._translated():
            if self._reading is None:
                self._reading = self._connect()
            self._reading.execute("BEGIN")
            try:
                return work(_SqliteTransaction(self._reading))
            finally:
                self._reading.execute("ROLLBACK")

    def _connect(self) -> sqlite3.Connection:
        path = Path(self._path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"Ledger {self._path!r} cannot be made: {error.strerror}. Name a folder that this process may "
                "write to as `url` under `ledger:` in sekha.yaml."
            ) from error
        connection = sqlite3.connect(path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            use_wal(connection, self._busy_seconds)
            connection.execute("BEGIN IMMEDIATE")
            migrate(_SqliteTransaction(connection), self._path)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _UNAVAILABLE:
                raise LedgerUnavailable(self._path, str(error)) from error
            raise LedgerError(
                f"Ledger {self._path!r} cannot be used: {error}. Check that it is a ledger of Sekha's and that this "
                "process may write to it, or name another under `ledger:` in sekha.yaml."
            ) from error


class _SqliteTransaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *values: Value) -> list[tuple[Any, ...]]:
        return self._connection.execute(*expand(_unlocked(sql), values)).fetchall()

    def changed(self, sql: str, *values: Value) -> int:
        return self._connection.execute(*expand(_unlocked(sql), values)).rowcount

    def lock(self, sql: str, *values: Value) -> None:
        """Nothing to do, as below."""

    def freeze_spends(self) -> None:
        """Nothing to do: BEGIN IMMEDIATE shut every other writer out."""

    def take_long(self, seconds: float) -> None:
        """Nothing to do: a file is not silent, and a lock is not waited for in the middle of a transaction."""


@lru_cache(maxsize=256)
def _unlocked(sql: str) -> str:
    """Leave out row locks, which SQLite neither has nor needs: there is one writer at a time."""
    return sql.replace(" FOR UPDATE SKIP LOCKED", "").replace(" FOR UPDATE", "")
