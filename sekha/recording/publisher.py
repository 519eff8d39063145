"""The publisher: its own process, which moves what lies in a spool into Prefect.

    python -P -m sekha.recording.publisher SPOOL joined|all

It ends when its standard input does, however the process at the other end of it ended; what it has not
published by then stays in the spool for the next one. It inherits a lock, which tells other gateways
that this spool has its publisher.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording import priority
from sekha.recording.joining import joined
from sekha.recording.run import Run
from sekha.recording.sink import Sink
from sekha.recording.spool import Segment, SpoolReader

__all__ = ["NOWHERE", "Publisher", "Report", "forget_sink", "read_report"]

log = logging.getLogger("sekha.recording")

BATCH = 250
NOWHERE = "nowhere"
IDLE_SECONDS = 0.25
# A commit takes the database from Prefect's server for a moment; it gets a quarter of that in return.
REST_SHARE = 0.25
LONGEST_WAIT_SECONDS = 15.0
LAST_SECONDS = 4.0
BEHIND = 8
"""It keeps up as long as no more segments wait."""
REPORT = "publisher.json"
# A line may be JSON and yet no run: where a number belongs, it says something else, or one that no date has.
_NOT_TAKEN = (RecordError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far the publisher of a spool is. Counts go on from one publisher to the next."""

    process_id: int = 0
    sink: str = ""
    """Where runs go; empty as long as that is not known, `nowhere` if Prefect's settings name no server."""
    runs_per_second: float | None = None
    published: int = 0
    refused: int = 0
    """Runs and events that Prefect did not take, and lines that could not be read."""
    waits_for: str = ""
    """Why nothing can be published now."""
    segment: str = ""
    """The segment that was published last, whole or in part."""
    done: int = 0
    """How many of its runs are counted above: the next publisher goes on behind them."""


def read_report(folder: Path) -> Report:
    try:
        return Report(**json.loads((folder / REPORT).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Report()


def forget_sink(folder: Path) -> None:
    """Let what the last publisher said of its sink hold no longer, once it has ended; its counts go on.

    The next one may have other settings, and takes seconds to say where it goes.
    """
    report = read_report(folder)
    if report.sink or report.waits_for:
        _write(folder, replace(report, process_id=0, sink="", runs_per_second=None, waits_for=""))


def _write(folder: Path, report: Report) -> None:
    new = folder / f"{REPORT}.new"
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(asdict(report)), encoding="utf-8")
        new.replace(folder / REPORT)


@dataclass(slots=True)
class _Tally:
    """What became of a part of a segment. Counted once all of it is out: until then it is published again."""

    published: int = 0
    refused: int = 0


class Publisher:
    """Publishes segment after segment, and deletes what is published.

    `wait` sleeps for so many seconds, and returns whether the publisher is to end. With `joins`, quick steps
    that follow one another are published as one. `waiting` is told how many segments wait each time before they
    are published.
    """

    def __init__(
        self,
        folder: Path,
        open_sink: Callable[[], Sink | None],
        *,
        wait: Callable[[float], bool],
        joins: bool = False,
        clock: Callable[[], float] = time.monotonic,
        waiting: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._spool = SpoolReader(folder)
        self._open_sink = open_sink
        self._wait = wait
        self._joins = joins
        self._clock = clock
        self._waiting = waiting
        self._sink: Sink | None = None
        self._until: float | None = None
        """When to stop, once it is to end."""
        self._report = replace(read_report(folder), process_id=os.getpid(), sink="", waits_for="")

    def run(self) -> None:
        """Publish until told to end, and then what is there already, for a few seconds at the most."""
        failures = 0
        ending = False
        while not ending:
            try:
                self.publish_waiting()
                failures = 0
                # Its settings are read once, so that nothing changes for a publisher that has nowhere to go.
                seconds = LONGEST_WAIT_SECONDS if self._sink is None else IDLE_SECONDS
            except PrefectUnavailable as error:
                failures += 1
                seconds = min(0.5 * 2**failures, LONGEST_WAIT_SECONDS)
                self._close()
                if failures == 1:
                    log.warning("%s What is recorded waits in the spool.", error)
                self._tell(waits_for=str(error))
            ending = self._wait(seconds)
        with contextlib.suppress(PrefectUnavailable):
            self._end_soon()
            self.publish_waiting()
        self._close()

    def publish_waiting(self) -> None:
        """Publish every segment that is ready. Raises `PrefectUnavailable`."""
        if self._sink is None:
            self._sink = self._open_sink()
            name = self._sink.name if self._sink else NOWHERE
            if name != self._report.sink:
                log.info("recorded requests go to %s", name)
            self._tell(sink=name, runs_per_second=self._sink and self._sink.runs_per_second, waits_for="")
        sink = self._sink
        if sink is None:
            return
        # One that was begun before any other: another writer's may be older and have come later.
        ready = self._spool.ready()
        self._waiting(len(ready))
        for path in sorted(ready, key=lambda path: path.name != self._report.segment):
            segment = self._spool.read(path)
            if not self._publish(segment, sink):
                return
            self._spool.done(segment)

    def _publish(self, segment: Segment, sink: Sink) -> bool:
        """Publish what is left of it; False if the time is up."""
        begun = self._report.segment == segment.path.name
        tally = _Tally(refused=0 if begun else segment.torn)
        size = 1 if sink.runs_per_second else BATCH
        for at in range(self._report.done if begun else 0, len(segment.runs), size):
            started = self._clock()
            if self._until is not None and started > self._until:
                return False
            some = segment.runs[at : at + size]
            self._publish_runs(some, sink, tally)
            # In one file with the counts, so that neither is ever ahead of the other.
            self._count(tally, segment, at + len(some))
            tally = _Tally()
            took = self._clock() - started
            rest = 1 / sink.runs_per_second - took if sink.runs_per_second else REST_SHARE * took
            if self._wait(max(rest, 0.0)):
                self._end_soon()
        if segment.events:
            try:
                sink.emit(segment.events)
            except PrefectUnavailable:
                raise
            except _NOT_TAKEN as error:
                _refuse(len(segment.events), error, tally)
        self._count(tally, segment, len(segment.runs))
        return True

    def _end_soon(self) -> None:
        if self._until is None:
            self._until = self._clock() + LAST_SECONDS

    def _count(self, tally: _Tally, segment: Segment, done: int) -> None:
        published, refused = self._report.published + tally.published, self._report.refused + tally.refused
        self._tell(published=published, refused=refused, segment=segment.path.name, done=done)

    def _publish_runs(self, runs: Sequence[Run], sink: Sink, tally: _Tally) -> None:
        try:
            sink.publish([replace(run, steps=joined(run.steps)) for run in runs] if self._joins else runs)
        except PrefectUnavailable:
            raise
        except _NOT_TAKEN as error:
            if len(runs) == 1:
                _refuse(1, error, tally)
                return
            # One that is not taken must not keep the others out.
            for run in runs:
                self._publish_runs([run], sink, tally)
            return
        tally.published += len(runs)

    def _tell(self, **changes: Any) -> None:
        self._report = replace(self._report, **changes)
        _write(self._folder, self._report)

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def _refuse(count: int, error: Exception, tally: _Tally) -> None:
    # What is no error of ours may quote what was asked.
    said = error if isinstance(error, RecordError) else f"It cannot be written ({type(error).__name__})."
    log.warning("%s %d left out.", said, count)
    tally.refused += count


def main(folder: Path, *, joins: bool) -> None:
    priority.begin()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("httpx", "prefect"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    ended = threading.Event()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    # Takes seconds, and is the reason for a process of its own.
    from sekha.recording.prefect_choice import open_sink

    # What Prefect is made of stays as it is: collecting garbage need not look through it again and again.
    gc.freeze()
    Publisher(
        folder, open_sink, wait=ended.wait, joins=joins, waiting=lambda count: priority.give_way(behind=count > BEHIND)
    ).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), joins=sys.argv[2] == "joined")
