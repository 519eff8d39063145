"""Prefect's tables in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter

import psycopg

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording.prefect_rows import TABLES, Row

__all__ = ["PostgresTables"]

# The last is for Prefect's indexes over parts of names: what is not sorted into them yet takes ten times as much,
# and would be up to 4 MB of each.
_SETTINGS = (
    "SET timezone = 'UTC'; SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '30s'; "
    "SET gin_pending_list_limit = '64kB'"
)


class PostgresTables:
    """The database of a Prefect server anywhere."""

    name = "Prefect's PostgreSQL database"
    revision = "d4a7e1c93f52"

    def __init__(self, url: str) -> None:
        """`url` is libpq's: `postgresql://…`."""
        with _translated():
            self._connection = psycopg.connect(
                url, autocommit=True, connect_timeout=10, application_name="sekha recording"
            )
            try:
                self._connection.execute(_SETTINGS)
            except BaseException:
                self._connection.close()
                raise
        self._staged = False

    def span(self, seconds: float) -> str:
        return f"{seconds:.6f} seconds"

    def current_revision(self) -> str:
        with _translated():
            row = self._connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(row[0]) if row else "none"

    def find_flow(self, name: str) -> str | None:
        with _translated():
            found = self._connection.execute("SELECT id FROM flow WHERE name = %s", (name,)).fetchone()
            return str(found[0]) if found else None

    def add_flow(self, name: str, new_id: str) -> None:
        with _translated():
            add = "INSERT INTO flow (id, name) VALUES (%s, %s) ON CONFLICT DO NOTHING"
            self._connection.execute(add, (new_id, name))

    def insert(self, rows: Mapping[str, Sequence[Row]]) -> None:
        with _translated(), self._connection.transaction(), self._connection.cursor() as cursor:
            if not self._staged:
                for table, columns in TABLES.items():
                    cursor.execute(_stage(table, columns).encode())
            for table, columns in TABLES.items():
                if table in rows:
                    with cursor.copy(f"COPY new_{table} ({', '.join(columns)}) FROM STDIN".encode()) as copy:
                        # By their ids: PostgreSQL fills the pages of an index that grows at its end, and leaves
                        # those of another a third empty.
                        for row in sorted(rows[table], key=itemgetter(0)):
                            copy.write_row(row)
            # One statement for all tables: what a row refers to is looked for when the statement ends.
            moved = [
                f"{table}_moved AS ({_move(table, columns)})" for table, columns in TABLES.items() if table in rows
            ]
            cursor.execute(f"WITH {', '.join(moved)} SELECT 1".encode())
        self._staged = True

    def close(self) -> None:
        self._connection.close()


def _stage(table: str, columns: Sequence[str]) -> str:
    some = ", ".join(columns)
    return f"CREATE TEMP TABLE new_{table} ON COMMIT DELETE ROWS AS SELECT {some} FROM {table} WITH NO DATA"  # noqa: S608 - constants


def _move(table: str, columns: Sequence[str]) -> str:
    some = ", ".join(columns)
    return f"INSERT INTO {table} ({some}) SELECT {some} FROM new_{table} ON CONFLICT DO NOTHING"  # noqa: S608 - constants


@contextmanager
def _translated() -> Iterator[None]:
    """psycopg's words quote values and URLs, so that only their kind is passed on."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.ProgrammingError) as error:
        what = type(error).__name__
        raise PrefectUnavailable(f"Prefect's PostgreSQL database cannot be written now: {what}.") from error
    except (psycopg.Error, ValueError) as error:
        raise RecordError(f"Prefect's PostgreSQL database does not take a run: {type(error).__name__}.") from error
