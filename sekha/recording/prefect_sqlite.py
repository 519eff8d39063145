"""Prefect's tables in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording.prefect_rows import TABLES, Row, moment

__all__ = ["SqliteTables"]

BUSY_SECONDS = 10.0


class SqliteTables:
    """The file that a Prefect server on this machine keeps.

    One that was deleted or replaced while this was open raises `PrefectUnavailable` from then on: what is
    written into it is read by nobody.
    """

    name = "Prefect's SQLite database"
    revision = "a3b9c7d2e5f1"

    def __init__(self, file: Path) -> None:
        with _translated():
            # Before it is opened: if another takes its place in between, it is opened once more, and not kept.
            self._file = file.absolute()
            self._opened = _identity(self._file)
            uri = f"{file.resolve().as_uri()}?mode=rw"
            self._connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            self._connection.execute("PRAGMA foreign_keys=ON")
            self._connection.execute("PRAGMA synchronous=NORMAL")

    def span(self, seconds: float) -> str:
        # SQLAlchemy keeps a duration as that long after the epoch.
        return moment(seconds)

    def current_revision(self) -> str:
        self._require_same_file()
        with _translated():
            row = self._connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(row[0]) if row else "none"

    def find_flow(self, name: str) -> str | None:
        with _translated():
            found = self._connection.execute("SELECT id FROM flow WHERE name = ?", (name,)).fetchone()
            return str(found[0]) if found else None

    def add_flow(self, name: str, new_id: str) -> None:
        with _translated():
            add = "INSERT INTO flow (id, name) VALUES (?, ?) ON CONFLICT DO NOTHING"
            self._connection.execute(add, (new_id, name))

    def insert(self, rows: Mapping[str, Sequence[Row]]) -> None:
        with _translated():
            # At once for writing: a transaction that begins by reading fails when another commits meanwhile.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                # A run names its state and the state its run.
                self._connection.execute("PRAGMA defer_foreign_keys=ON")
                for table, columns in TABLES.items():
                    if table in rows:
                        self._connection.executemany(_insert(table, columns), rows[table])
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        # Before these rows count as published.
        self._require_same_file()

    def close(self) -> None:
        self._connection.close()

    def _require_same_file(self) -> None:
        with _translated():
            if _identity(self._file) != self._opened:
                raise PrefectUnavailable(f"{self._file} was replaced, and is opened anew.")


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _insert(table: str, columns: Sequence[str]) -> str:
    values = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values}) ON CONFLICT DO NOTHING"  # noqa: S608 - constants


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PrefectUnavailable(f"Prefect's SQLite database cannot be reached: {error.strerror}.") from error
    except sqlite3.OperationalError as error:
        raise PrefectUnavailable(f"Prefect's SQLite database cannot be written now: {error}.") from error
    except (sqlite3.Error, OverflowError, ValueError) as error:
        raise RecordError(f"Prefect's SQLite database does not take a run: {type(error).__name__}.") from error
