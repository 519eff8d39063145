"""A ledger in PostgreSQL, shared by processes on many machines. The one file that imports psycopg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from sekha.errors import ConfigError, LedgerError, LedgerUnavailable, Problem
from sekha.ledgers.database import Transaction, Value, expand, migrate

__all__ = ["PostgresDatabase"]

T = TypeVar("T")

_CONNECTIONS = 8
# A process that is stopped or cut off in the middle of a transaction must not stop all others.
_LIMITS = "SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '30s'"
_MIGRATING = 0x5E4A


class PostgresDatabase:
    """A few connections, each used by one thread at a time, and made when they are first needed."""

    def __init__(self, url: str) -> None:
        try:
            info = conninfo_to_dict(url)
        except psycopg.Error:
            # psycopg quotes the URL, and with it the password: neither its words nor it may be shown.
            problem = Problem("ledger.url", "it is no PostgreSQL URL. Write `postgresql://user@host:5432/database`.")
            raise ConfigError("sekha.yaml", [problem]) from None
        self._url = url
        self._name = f"{info.get('dbname', 'postgres')} at {info.get('host', 'localhost')}"
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "ledger")
        self._idle: list[psycopg.Connection] = []
        self._migrated = False

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:  # noqa: ARG002
        # Everything is durable here: the server may restart while those who hold money live on.
        return self._threads.submit(self._run, work, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._threads.submit(self._run, work, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        for connection in self._idle:
            connection.close()

    def _run(self, work: Callable[[Transaction], T], begin: str) -> T:
        with self._translated():
            connection = self._begin(begin)
            try:
                result = work(_PostgresTransaction(connection))
                connection.execute("COMMIT")
            except BaseException:
                # The server rolls back whatever a closed connection had begun.
                connection.close()
                raise
            self._idle.append(connection)
            return result

    def _begin(self, begin: str) -> psycopg.Connection:
        """Begin on an idle connection, passing over those that broke while they were idle."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            try:
                connection.execute(begin)
            except psycopg.OperationalError:
                connection.close()
            else:
                return connection
        connection = self._connect()
        connection.execute(begin)
        return connection

    def _connect(self) -> psycopg.Connection:
        connection = psycopg.connect(self._url, autocommit=True, connect_timeout=10, application_name="sekha")
        try:
            connection.execute(_LIMITS)
            if not self._migrated:
                with connection.transaction():
                    # CREATE TABLE IF NOT EXISTS fails when two run it at the same moment.
                    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATING])
                    migrate(_PostgresTransaction(connection), self._name)
                self._migrated = True
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise LedgerUnavailable(self._name, _first_line(error)) from error
        except psycopg.Error as error:
            raise LedgerError(
                f"Ledger {self._name!r} cannot be used: {_first_line(error)}. Check that its user may create and "
                "write tables there, or name another under `ledger:` in sekha.yaml."
            ) from error


class _PostgresTransaction:
    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *values: Value) -> list[tuple[Any, ...]]:
        return self._execute(sql, values).fetchall()

    def changed(self, sql: str, *values: Value) -> int:
        return self._execute(sql, values).rowcount

    def freeze_spends(self) -> None:
        # Conflicts with the lock that every INSERT takes; two that only sum do not wait for each other.
        self._connection.execute("LOCK TABLE ledger_spends IN SHARE MODE")

    def _execute(self, sql: str, values: tuple[Value, ...]) -> psycopg.Cursor[tuple[Any, ...]]:
        written, flat = expand(sql, values)
        return self._connection.execute(written.replace("?", "%s").encode(), flat)


def _first_line(error: psycopg.Error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
