"""What the publisher does with a sink that refuses, is away, or bears little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording.prefect_database import DatabaseSink
from sekha.recording.prefect_sqlite import SqliteTables
from sekha.recording.publisher import NOWHERE, Publisher, read_report
from sekha.recording.run import Event, Run, encode, new_run_id
from sekha.recording.spool import SpoolReader
from sekha.segments import SegmentWriter
from tests.sekha.recording.conftest import QUICK_STEPS, Tables

Makes: TypeAlias = Callable[..., Run]


@dataclass
class ListSink:
    """Keeps what it is given. `away` counts how many calls fail before one succeeds."""

    name: str = "a list"
    runs_per_second: float | None = None
    away: int = 0
    poison: str = ""
    runs: list[Run] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    emits_away: int = 0
    closed: int = 0

    def publish(self, runs: Sequence[Run]) -> None:
        if self.away:
            self.away -= 1
            raise PrefectUnavailable("The list is away.")
        if any(run.id == self.poison for run in runs):
            raise RecordError("The list does not take this.")
        self.runs += runs

    def emit(self, events: Sequence[Event]) -> None:
        if self.emits_away:
            self.emits_away -= 1
            raise PrefectUnavailable("The list takes no events.")
        self.events += events

    def close(self) -> None:
        self.closed += 1


@dataclass
class Waits:
    """A wait that takes no time, and ends the publisher after so many."""

    left: int = 10
    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        self.left -= 1
        return self.left <= 0


def spooled(folder: Path, *what: Run | Event) -> None:
    writer = SegmentWriter(folder)
    writer.write([encode(each) for each in what])
    writer.hand_over()


def test_runs_and_events_are_published_and_their_segment_deleted(tmp_path: Path, make_run: Makes) -> None:
    runs, event = [make_run() for _ in range(250)], Event(id=new_run_id(), occurred_at=1.0, name="n", resource="r")
    spooled(tmp_path, *runs, event)
    sink = ListSink()

    Publisher(tmp_path, lambda: sink, wait=Waits()).run()

    assert sink.runs == runs
    assert sink.events == [event]
    assert SpoolReader(tmp_path).ready() == []
    assert read_report(tmp_path).published == 250
    assert sink.closed == 1


def test_it_is_told_how_many_segments_wait(tmp_path: Path, make_run: Makes) -> None:
    told: list[int] = []
    publisher = Publisher(tmp_path, ListSink, wait=lambda _: False, waiting=told.append)
    for _ in range(3):
        spooled(tmp_path, make_run())

    publisher.publish_waiting()
    publisher.publish_waiting()

    assert told == [3, 0]


def test_quick_steps_are_published_as_one_where_that_is_wanted(tmp_path: Path, make_run: Makes) -> None:
    run, slow = make_run(steps=QUICK_STEPS), make_run()
    as_one, each = ListSink(), ListSink()

    spooled(tmp_path, run, slow)
    Publisher(tmp_path, lambda: as_one, wait=Waits(), joins=True).run()
    spooled(tmp_path, run, slow)
    Publisher(tmp_path, lambda: each, wait=Waits()).run()

    assert [len(shown.steps) for shown in as_one.runs] == [3, 5]
    assert as_one.runs[0].steps[0].name == "estimate_cost, select_provider, reserve_budget"
    assert each.runs == [run, slow]


def test_nothing_is_lost_while_the_sink_is_away(tmp_path: Path, make_run: Makes) -> None:
    runs = [make_run() for _ in range(30)]
    spooled(tmp_path, *runs)
    sink, waits = ListSink(away=5), Waits(left=20)

    Publisher(tmp_path, lambda: sink, wait=waits).run()

    assert sink.runs == runs
    assert waits.seconds[:5] == [1.0, 2.0, 4.0, 8.0, 15.0]
    assert read_report(tmp_path).waits_for == ""


def test_what_is_published_again_is_counted_once(tmp_path: Path, make_run: Makes) -> None:
    runs, event = [make_run() for _ in range(7)], Event(id=new_run_id(), occurred_at=1.0, name="n", resource="r")
    spooled(tmp_path, *runs, event)
    sink = ListSink(emits_away=2, poison=runs[3].id)

    Publisher(tmp_path, lambda: sink, wait=Waits(left=20)).run()

    assert sink.events == [event]
    assert (read_report(tmp_path).published, read_report(tmp_path).refused) == (6, 1)


def test_one_run_that_is_never_taken_keeps_no_other_out(tmp_path: Path, make_run: Makes) -> None:
    runs = [make_run() for _ in range(10)]
    spooled(tmp_path, *runs)
    sink = ListSink(poison=runs[4].id)

    Publisher(tmp_path, lambda: sink, wait=Waits()).run()

    assert sink.runs == runs[:4] + runs[5:]
    assert (read_report(tmp_path).published, read_report(tmp_path).refused) == (9, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"started_at": "yesterday"},
        {"ended_at": 1e300},
        {"clock_offset": None},
        {"steps": [["estimate_cost", [], "now", "then", None]]},
    ],
)
def test_a_run_that_no_table_can_hold_is_refused_and_keeps_no_other_out(
    tmp_path: Path, make_run: Makes, tables: Tables, changes: dict[str, Any]
) -> None:
    runs = [make_run() for _ in range(3)]
    spooled(tmp_path / "spool", *runs)
    [segment] = SpoolReader(tmp_path / "spool").ready()
    lines = segment.read_bytes().splitlines(keepends=True)
    said = json.loads(lines[1][1:]) | changes
    segment.write_bytes(b"".join([lines[0], b"R%b\n" % json.dumps(said).encode(), lines[2]]))

    Publisher(tmp_path / "spool", lambda: DatabaseSink(SqliteTables(tables.file), None), wait=Waits(), joins=True).run()

    assert set(tables.run_ids()) == {runs[0].id, runs[2].id}
    report = read_report(tmp_path / "spool")
    assert (report.published, report.refused) == (2, 1)


def test_events_without_an_api_are_counted_and_keep_no_run_out(
    tmp_path: Path, make_run: Makes, tables: Tables, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    spooled(tmp_path / "spool", run, *[Event(id=new_run_id(), occurred_at=1.0, name="n", resource="r")] * 2)

    Publisher(tmp_path / "spool", lambda: DatabaseSink(SqliteTables(tables.file), None), wait=Waits()).run()

    report = read_report(tmp_path / "spool")
    assert tables.run_ids() == [run.id]
    assert (report.published, report.refused) == (1, 2)
    assert SpoolReader(tmp_path / "spool").ready() == []
    assert "PREFECT_API_URL names none. 2 left out." in caplog.text


def test_a_sink_that_bears_little_is_given_one_run_at_a_time(tmp_path: Path, make_run: Makes) -> None:
    spooled(tmp_path, *[make_run() for _ in range(8)])
    waits = Waits(left=100)

    Publisher(tmp_path, lambda: ListSink(runs_per_second=5.0), wait=waits).run()

    assert sum(waits.seconds[:8]) > 1.5
    assert max(waits.seconds[:8]) <= 0.2


def test_a_publisher_that_is_to_end_leaves_what_is_over_for_the_next(tmp_path: Path, make_run: Makes) -> None:
    runs = [make_run() for _ in range(40)]
    spooled(tmp_path, *runs)
    now = [0.0]

    class Slow(ListSink):
        def publish(self, runs: Sequence[Run]) -> None:
            now[0] += 1.0
            super().publish(runs)

    first, second = Slow(runs_per_second=5.0), ListSink()
    Publisher(tmp_path, lambda: first, wait=lambda _: True, clock=lambda: now[0]).run()

    Publisher(tmp_path, lambda: second, wait=Waits()).run()

    assert 1 <= len(first.runs) < 40
    assert first.runs + second.runs == runs
    assert read_report(tmp_path).published == 40


def test_a_segment_goes_on_where_it_was_left_however_it_was_left(tmp_path: Path, make_run: Makes) -> None:
    runs, event = [make_run() for _ in range(9)], Event(id=new_run_id(), occurred_at=1.0, name="n", resource="r")
    spooled(tmp_path, *runs, event)
    [segment] = SpoolReader(tmp_path).ready()
    segment.write_bytes(b"torn\n" + segment.read_bytes())
    sink = ListSink(runs_per_second=5.0, poison=runs[1].id)

    def dies(_: float) -> bool:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Publisher(tmp_path, lambda: sink, wait=dies).run()
    part = read_report(tmp_path)
    sink.away = 2
    Publisher(tmp_path, lambda: sink, wait=Waits(left=30)).run()

    assert (part.published, part.refused) == (2, 2)
    assert sink.runs == [runs[0], *runs[2:]]
    assert sink.events == [event]
    assert (read_report(tmp_path).published, read_report(tmp_path).refused) == (8, 2)


def test_a_segment_that_was_begun_is_ended_before_an_older_one_that_came_since(tmp_path: Path, make_run: Makes) -> None:
    older, runs = make_run(), [make_run() for _ in range(3)]
    writer, sink = SegmentWriter(tmp_path), ListSink(runs_per_second=5.0)
    writer.write([encode(older)])
    spooled(tmp_path, *runs)

    def dies(_: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Publisher(tmp_path, lambda: sink, wait=dies).run()
    writer.hand_over()
    Publisher(tmp_path, lambda: sink, wait=Waits()).run()

    assert sink.runs == [*runs, older]
    assert read_report(tmp_path).published == 4


def test_the_next_segment_is_published_from_its_start(tmp_path: Path, make_run: Makes) -> None:
    first, second = [make_run() for _ in range(3)], [make_run() for _ in range(5)]
    sink = ListSink()

    for runs in (first, second):
        spooled(tmp_path, *runs)
        Publisher(tmp_path, lambda: sink, wait=Waits()).run()

    assert sink.runs == [*first, *second]


def test_without_a_server_it_says_so_and_sleeps(tmp_path: Path, make_run: Makes) -> None:
    spooled(tmp_path, make_run())
    waits = Waits(left=3)

    Publisher(tmp_path, lambda: None, wait=waits).run()

    assert read_report(tmp_path).sink == NOWHERE
    assert waits.seconds == [15.0, 15.0, 15.0]
    assert len(SpoolReader(tmp_path).ready()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true",
        "sqlite+aiosqlite:///file:prefect?mode=memory&cache=shared&uri=true",
    ],
)
def test_a_database_in_another_process_memory_is_nowhere_to_publish(tmp_path: Path, url: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    program = "from sekha.recording.prefect_choice import open_sink; print(open_sink(), open_sink())"

    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PREFECT_HOME": str(tmp_path), "PREFECT_API_DATABASE_CONNECTION_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stdout.strip() == "None None"
    assert said.stderr.count("Prefect's database is in the memory of its own process") == 1


def test_where_nobody_names_a_server_or_a_database_there_is_nowhere_to_publish(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    program = "from sekha.recording.prefect_choice import open_sink; print(open_sink())"

    said = subprocess.run(  # Prefect reads its settings once in a process
        [sys.executable, "-c", program],
        env=environment | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stdout.strip() == "None"
