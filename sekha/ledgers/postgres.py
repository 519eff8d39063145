"""A ledger in PostgreSQL, shared by processes on many machines. The one file that imports psycopg."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import ReadOnlySqlTransaction

from sekha.errors import ConfigError, LedgerError, LedgerUnavailable, Problem
from sekha.ledgers.database import Transaction, Value, expand, migrate

__all__ = ["PostgresDatabase"]

T = TypeVar("T")

ANSWER_SECONDS = 8.0
"""A server that takes longer over a statement is taken for silent, and left."""
_CONNECT_SECONDS = 5
_CONNECTIONS = 8
# A process that is stopped or cut off in the middle of a transaction must not stop all others.
_IDLE_SECONDS = 30
_NOTICES = {"keepalives_idle": 10, "keepalives_interval": 3, "keepalives_count": 3}
"""How soon it shows that a network lets nothing through, also while nobody asks."""
_MIGRATING = 0x5E4A
_READ_ONLY = (
    "After a failover this may be the server that now stands by: let it take writes again, or name the one that does "
    "under `ledger:` in sekha.yaml, or all of them with `target_session_attrs=read-write`"
)


class _Silent(psycopg.OperationalError):
    """The server did not answer in time. What came of it nobody knows, as when a connection breaks."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """One that waits for a statement's end for so long and no longer.

    Neither a time-out of the server's nor one of the network's notices a server that is stopped: it keeps no time, and
    the kernel goes on acknowledging what it is sent.
    """

    answer_seconds = ANSWER_SECONDS

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **named: Any) -> T:
        return super().wait(self._in_time(gen), *args, **named)

    def _in_time(self, steps: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        began = monotonic()
        try:
            awaited = next(steps)
            while True:
                ready = yield awaited
                # Read anew each time: it shrinks when the database is closed meanwhile.
                if not ready and monotonic() - began > self.answer_seconds:
                    raise _Silent(f"it has not answered for {self.answer_seconds:g} s")
                awaited = steps.send(ready)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # what the steps returned


class PostgresDatabase:
    """A few connections, each used by one thread at a time, and made when they are first needed.

    A server that is silent is given up, and so is every connection to it: whoever comes next connects anew. So is one
    that takes no writes: another may have taken its place. No transaction goes on once it was given up; a COMMIT that
    was sent may still be done.
    """

    def __init__(self, url: str, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        try:
            info = conninfo_to_dict(url)
        except psycopg.Error:
            # psycopg quotes the URL, and with it the password: neither its words nor it may be shown.
            problem = Problem("ledger.url", "it is no PostgreSQL URL. Write `postgresql://user@host:5432/database`.")
            raise ConfigError("sekha.yaml", [problem]) from None
        self._answer_seconds = answer_seconds
        self._limits = "; ".join(
            f"SET {name} = {1000 * seconds:.0f}"
            for name, seconds in (
                # A server that is only busy says so itself, and before it is given up.
                ("lock_timeout", 0.7 * answer_seconds),
                ("statement_timeout", 0.9 * answer_seconds),
                ("idle_in_transaction_session_timeout", _IDLE_SECONDS),
            )
        )
        noticed = {**_NOTICES, "tcp_user_timeout": round(1000 * answer_seconds)}
        wanted = {name: value for name, value in noticed.items() if name not in info}
        self._where = make_conninfo(url, **wanted, connect_timeout=_CONNECT_SECONDS, application_name="sekha")
        self._name = f"{info.get('dbname', 'postgres')} at {info.get('host', 'localhost')}"
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "ledger")
        self._idle: list[_Connection] = []
        self._used: set[_Connection] = set()
        self._migrated = False

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:  # noqa: ARG002
        # Everything is durable here: the server may restart while those who hold money live on.
        # Not READ WRITE, which writes also where whoever runs the server has asked that nothing be written.
        return self._threads.submit(self._run, work, "BEGIN ISOLATION LEVEL READ COMMITTED")

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._threads.submit(self._run, work, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        for connection in tuple(self._used):
            connection.answer_seconds = min(connection.answer_seconds, self._answer_seconds)
        self._threads.shutdown(wait=True)
        self._close_idle()

    def _run(self, work: Callable[[Transaction], T], begin: str) -> T:
        with self._translated():
            connection = self._begin(begin)
            try:
                result = work(_PostgresTransaction(connection))
                connection.answer_seconds = self._answer_seconds
                connection.execute("COMMIT")
            except BaseException as error:
                # The server rolls back whatever a closed connection had begun.
                self._give_up(connection, error)
                raise
            self._used.discard(connection)
            self._idle.append(connection)
            return result

    def _give_up(self, connection: _Connection, error: BaseException) -> None:
        connection.close()
        self._used.discard(connection)
        if isinstance(error, _Silent | ReadOnlySqlTransaction):
            # Each would have to be tried by itself to find that it is no better.
            self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):  # another thread took the last one
                self._idle.pop().close()

    def _begin(self, begin: str) -> _Connection:
        """Begin on an idle connection, passing over those that broke while they were idle."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            self._used.add(connection)
            try:
                connection.execute(begin)
            except psycopg.OperationalError as error:
                self._give_up(connection, error)
                if isinstance(error, _Silent):
                    raise
            else:
                return connection
        connection = self._connect()
        try:
            connection.execute(begin)
        except BaseException as error:
            self._give_up(connection, error)
            raise
        return connection

    def _connect(self) -> _Connection:
        connection = _Connection.connect(self._where, autocommit=True)
        connection.answer_seconds = self._answer_seconds
        self._used.add(connection)
        try:
            connection.execute(self._limits.encode())
            if not self._migrated:
                with connection.transaction():
                    # CREATE TABLE IF NOT EXISTS fails when two run it at the same moment.
                    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATING])
                    migrate(_PostgresTransaction(connection), self._name)
                connection.answer_seconds = self._answer_seconds
                self._migrated = True
        except BaseException as error:
            self._give_up(connection, error)
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise LedgerUnavailable(self._name, _first_line(error)) from error
        except ReadOnlySqlTransaction as error:
            raise LedgerUnavailable(self._name, f"{_first_line(error)}. {_READ_ONLY}") from error
        except psycopg.Error as error:
            raise LedgerError(
                f"Ledger {self._name!r} cannot be used: {_first_line(error)}. Check that its user may create and "
                "write tables there, or name another under `ledger:` in sekha.yaml."
            ) from error


class _PostgresTransaction:
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, *values: Value) -> list[tuple[Any, ...]]:
        return self._execute(sql, values).fetchall()

    def changed(self, sql: str, *values: Value) -> int:
        return self._execute(sql, values).rowcount

    def lock(self, sql: str, *values: Value) -> None:
        self._execute(sql, values)

    def freeze_spends(self) -> None:
        # Conflicts with the lock that every INSERT takes; two that only sum do not wait for each other.
        self._connection.execute("LOCK TABLE ledger_spends IN SHARE MODE")

    def take_long(self, seconds: float) -> None:
        self._connection.execute(f"SET LOCAL statement_timeout = {1000 * seconds:.0f}".encode())
        self._connection.answer_seconds = seconds

    def _execute(self, sql: str, values: tuple[Value, ...]) -> psycopg.Cursor[tuple[Any, ...]]:
        written, flat = expand(sql, values)
        return self._connection.execute(written.replace("?", "%s").encode(), flat)


def _first_line(error: psycopg.Error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
