"""Prefect's own database as a sink: exact times and ids, hundreds of runs a second. It imports nothing of Prefect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol
from uuid import uuid4

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording.prefect_rows import Row, rows_of
from sekha.recording.run import Event, Run

__all__ = ["Database", "DatabaseSink", "Emit"]


class Database(Protocol):
    """One of the databases that Prefect's server runs on, and how it writes durations."""

    name: str
    revision: str
    """The Alembic revision of the tables that this is tested with."""

    def span(self, seconds: float) -> str: ...

    def current_revision(self) -> str: ...

    def find_flow(self, name: str) -> str | None: ...

    def add_flow(self, name: str, new_id: str) -> None:
        """Add a flow, unless there is one of that name."""
        ...

    def insert(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Insert rows by table in one transaction, leaving those that are there already as they are."""
        ...

    def close(self) -> None: ...


class Emit(Protocol):
    """Events go through the API: what is in the database already triggers no automation."""

    def emit(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


class DatabaseSink:
    """Writes runs as rows. Raises `PrefectUnavailable` when the tables are not those it knows."""

    runs_per_second: float | None = None

    def __init__(self, database: Database, events: Emit | None) -> None:
        self.name = database.name
        self._database = database
        self._events = events
        self._flow_ids: dict[str, str] = {}

    def publish(self, runs: Sequence[Run]) -> None:
        # Asked each time: the server may be upgraded while this runs.
        self.require_known_tables()
        try:
            self._database.insert(self._rows(runs))
        except PrefectUnavailable:
            raise
        except RecordError:
            # Someone may have deleted a flow in Prefect, and all its runs with it.
            self._flow_ids.clear()
            self._database.insert(self._rows(runs))

    def require_known_tables(self) -> None:
        found = self._database.current_revision()
        if found != self._database.revision:
            raise PrefectUnavailable(
                f"{self.name} has tables of another Prefect ({found}) than Sekha knows ({self._database.revision})."
            )

    def has_flow(self, flow_id: str) -> bool:
        """Whether the flow `chat` has that id here."""
        return self._database.find_flow("chat") == flow_id

    def flow_id(self, name: str) -> str:
        if name not in self._flow_ids:
            new_id = str(uuid4())
            self._database.add_flow(name, new_id)
            self._flow_ids[name] = self._database.find_flow(name) or new_id
        return self._flow_ids[name]

    def emit(self, events: Sequence[Event]) -> None:
        if self._events is None:
            raise RecordError("Prefect hears of events through its API alone, and PREFECT_API_URL names none.")
        self._events.emit(events)

    def close(self) -> None:
        self._database.close()
        if self._events is not None:
            self._events.close()

    def _rows(self, runs: Iterable[Run]) -> dict[str, list[Row]]:
        tables: dict[str, list[Row]] = {}
        for run in runs:
            for table, row in rows_of(run, self.flow_id(run.flow), span=self._database.span):
                tables.setdefault(table, []).append(row)
        return tables
