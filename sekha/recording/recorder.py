"""What the gateway tells of its requests: it keeps them in a spool, and sees to it that a publisher runs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from sekha.config import RecordingSection
from sekha.naps import nap
from sekha.recording.policy import Policy
from sekha.recording.publisher import NOWHERE, Report, forget_sink, read_report
from sekha.recording.run import Event, Outcome, Run, encode
from sekha.segments import SegmentWriter, waiting_in

__all__ = ["Recorder", "Stats"]

log = logging.getLogger("sekha.recording")

SPOOL_BYTES = 512 << 20
# The rest is for what the policy always keeps.
ORDINARY_SHARE = 0.75
# What one turn of the event loop writes: a quarter of a millisecond.
FLUSH_RUNS = 64
PENDING_RUNS = 20_000
ROUND_SECONDS = 0.5
# Publishing takes a core, or a turn of the one that callers and providers share with us, so it waits for a moment
# without requests, and in larger batches takes less. It does not wait for long: people look at what they just asked.
HAND_OVER_SECONDS_WHEN_BUSY = 2.0
# Looking takes a thread, and the requests beside it wait for that.
ROUNDS_PER_LOOK = 2
MANY_SEGMENTS = 200
# While nobody takes segments away, fewer and larger ones are easier on everybody.
HAND_OVER_SECONDS_WHEN_MANY = 30.0
# Of what Prefect's API bears, so that it also catches up.
API_SHARE = 0.8
LONGEST_RESTART_SECONDS = 30.0
LAST_SECONDS = 6.0
LOG_BYTES = 1 << 20
# In the background and in batches: its own retries, checks and logs would only be in the way.
SETTINGS: Mapping[str, str] = {
    "PREFECT_CLIENT_MAX_RETRIES": "1",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the start of this process. `published` and `refused` count for all who ever wrote to the spool."""

    recorded: int
    kept: int
    """Of those, recorded whatever the sample."""
    sampled_out: int
    dropped: int
    """Wanted, and lost: the spool was full or could not be written."""
    queued_bytes: int
    published: int
    refused: int
    sink: str
    waits_for: str


class Recorder:
    """Takes finished requests and events, on the event loop's thread.

    >>> recorder = Recorder(config.recording, folder)
    >>> await recorder.start()
    >>> if recorder.wants(outcome="answered", seconds=0.8):
    ...     recorder.record(run)

    What was recorded is in the spool with the next turn of the event loop; until then `kill -9` of this process
    loses it, and later nothing but a power cut does. Several processes may share a folder: one of them starts the
    publisher, and another does when it or its parent dies.
    """

    def __init__(
        self,
        section: RecordingSection,
        folder: Path,
        *,
        processes: int = 1,
        max_bytes: int = SPOOL_BYTES,
        publish_after_seconds: float = 0.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`processes` share `max_per_second`. `environment` is added to this process's own, to name another server.

        A publisher takes a second of a core to start, and does so once `publish_after_seconds` have passed.
        """
        self._policy = Policy(
            sample=section.sample,
            max_per_second=section.max_per_second / processes,
            keep=section.keep,
            clock=time.monotonic,
            random=random.random,
        )
        self._processes = processes
        self._folder = folder
        self._max_bytes = max_bytes
        self._ordinary_bytes = int(max_bytes * ORDINARY_SHARE)
        self._environment = environment or {}
        self._steps = section.steps
        self._writer = SegmentWriter(folder)
        self._pending: deque[Run | Event] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flushing: asyncio.Handle | None = None
        self._looking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._publisher: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._start_at = time.monotonic() + publish_after_seconds
        self._report = Report()
        self._used = 0
        self._failing = False
        self._closed = False
        self._recorded = self._kept = self._sampled_out = self._dropped = 0
        self._told_at: dict[tuple[str, str], float] = {}
        self._told_dropped = 0
        self._seen = 0
        """Requests that had ended when that was last looked at."""
        self._news = False
        """Whether an event waits to be handed over."""

    def wants(self, *, outcome: Outcome, seconds: float) -> bool:
        """Whether to record a request. To be asked once for each."""
        if self._report.sink != NOWHERE and self._policy.wants(outcome, seconds):
            return True
        self._sampled_out += 1
        return False

    def record(self, run: Run) -> None:
        """Take a finished request. Never raises and never waits; when there is no room, it is dropped and counted."""
        kept = self._policy.keeps(run.outcome, run.ended_at - run.started_at)
        if self._take(run, self._max_bytes if kept else self._ordinary_bytes):
            self._recorded += 1
            self._kept += kept

    def event(self, name: str, resource: str, payload: Mapping[str, Any], *, every_seconds: float = 0.0) -> None:
        """Take what happened to the gateway. Prefect's automations hear of it within a second or two.

        What happens to a resource again within `every_seconds` is not news.
        """
        now = time.monotonic()
        if self._report.sink == NOWHERE or now - self._told_at.get((name, resource), -inf) < every_seconds:
            return
        event = Event(id=str(uuid4()), occurred_at=time.time(), name=name, resource=resource, payload=payload)
        if self._take(event, self._max_bytes):
            self._news = True
            if every_seconds:
                self._told_at[name, resource] = now

    @property
    def stats(self) -> Stats:
        return Stats(
            recorded=self._recorded,
            kept=self._kept,
            sampled_out=self._sampled_out,
            dropped=self._dropped,
            queued_bytes=self._used,
            published=self._report.published,
            refused=self._report.refused,
            sink=self._report.sink,
            waits_for=self._report.waits_for,
        )

    async def start(self) -> None:
        """Begin to write, and start a publisher unless this folder has one. Does not wait for it: it takes seconds."""
        self._loop = asyncio.get_running_loop()
        self._looking = asyncio.create_task(self._keep_looking())
        if self._pending:
            self._flushing = self._loop.call_soon(self._flush)

    async def aclose(self) -> None:
        """Write what is pending, and let the publisher end. What it has not published waits for the next start."""
        self._closed = True
        # Not cancelled: its thread would go on, and might start a publisher that nobody ends.
        self._wake.set()
        if self._looking is not None:
            await self._looking
        if self._flushing is not None:
            self._flushing.cancel()
        while self._pending:
            self._write()
        self._writer.hand_over()
        if self._publisher is not None:
            await asyncio.to_thread(_end, self._publisher)
        self._report = read_report(self._folder)
        self._used = waiting_in(self._folder).bytes

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _take(self, what: Run | Event, limit: int) -> bool:
        if self._closed or self._used >= limit or len(self._pending) >= PENDING_RUNS:
            self._dropped += 1
            return False
        self._pending.append(what)
        if self._flushing is None and self._loop is not None:
            # Right behind the answer, where nobody waits yet. By a timer it would come in the middle of another
            # request. Whatever ends in the same turn is written together.
            self._flushing = self._loop.call_soon(self._flush)
        return True

    def _flush(self) -> None:
        self._flushing = None
        self._write()
        if self._pending and self._loop is not None:
            self._flushing = self._loop.call_later(0.001, self._flush)

    def _write(self) -> None:
        some = [self._pending.popleft() for _ in range(min(FLUSH_RUNS, len(self._pending)))]
        lines = []
        for each in some:
            try:
                lines.append(encode(each))
            # What a caller put into a request may be what JSON cannot say, and is never worth an answer.
            except (TypeError, ValueError, RecursionError):
                self._dropped += 1
        if not lines:
            return
        try:
            self._used += self._writer.write(lines)
            self._failing = False
        except OSError as error:
            self._dropped += len(lines)
            if not self._failing:
                log.warning("The spool %s cannot be written, and requests go unrecorded: %s", self._folder, error)
            self._failing = True

    async def _keep_looking(self) -> None:
        for number in itertools.count():
            if number % ROUNDS_PER_LOOK == 0:
                report, used, segments = await asyncio.to_thread(self._look)
                self._report, self._used = report, used
                bears = report.runs_per_second
                self._policy.limit(None if bears is None else bears * API_SHARE / self._processes)
                many = segments > MANY_SEGMENTS
                self._tell_of_dropped()
            self._writer.hand_over(older_than_seconds=HAND_OVER_SECONDS_WHEN_MANY if many else self._patience())
            await nap(self._wake, ROUND_SECONDS)
            if self._closed:
                return

    def _patience(self) -> float:
        """How long what is recorded may still wait for a moment without requests. Events do not."""
        seen, self._seen = self._seen, self._recorded + self._sampled_out
        news, self._news = self._news, False
        return 0.0 if news or seen == self._seen else HAND_OVER_SECONDS_WHEN_BUSY

    def _tell_of_dropped(self) -> None:
        # While the spool is full there is no room for this either: it is told once there is. Nor is there once it is
        # closed, and this would be dropped too.
        if self._dropped > self._told_dropped and self._used < self._max_bytes and not self._closed:
            lost, self._told_dropped = self._dropped - self._told_dropped, self._dropped
            self.event("sekha.recorder.dropped", "sekha.recorder", {"dropped": lost, "in_all": self._dropped})

    def _look(self) -> tuple[Report, int, int]:
        waiting = waiting_in(self._folder)
        self._have_publisher()
        return read_report(self._folder), waiting.bytes, waiting.segments

    def _have_publisher(self) -> None:
        """Start the publisher if nobody's runs on this folder. Whoever gets the lock hands it on to a new one."""
        if self._publisher is not None and self._publisher.poll() is None:
            return
        # Not from the folder it is started in, where `types/` or `trace.py` may lie.
        command = [sys.executable, "-P", "-m", "sekha.recording.publisher", str(self._folder.resolve()), self._steps]
        with contextlib.ExitStack() as opened:
            try:
                lock = opened.enter_context((self._folder / "publisher.lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Nobody publishes now, and nothing is left out because the last one had nowhere to go.
                forget_sink(self._folder)
                if time.monotonic() < self._start_at:
                    return
                output = opened.enter_context(_log_file(self._folder).open("ab"))
                publisher = subprocess.Popen(  # noqa: S603 - the command line is ours
                    command,
                    env={**SETTINGS, **os.environ, **self._environment},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],
                    # Ctrl-C is for the gateway, which then lets it finish.
                    process_group=0,
                )
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("The publisher of %s cannot be started: %s", self._folder, error)
                return
        if self._publisher is not None:
            if time.monotonic() - self._start_at > LONGEST_RESTART_SECONDS:
                self._starts = 0
            log.warning("The publisher ended by itself and was started anew; its log is %s", _log_file(self._folder))
            _let_go(self._publisher)
        self._publisher = publisher
        self._starts += 1
        self._start_at = time.monotonic() + min(2.0**self._starts / 2, LONGEST_RESTART_SECONDS)


def _log_file(folder: Path) -> Path:
    file = folder / "publisher.log"
    if file.exists() and file.stat().st_size > LOG_BYTES:
        file.replace(file.with_suffix(".log.1"))
    return file


def _end(publisher: subprocess.Popen[bytes]) -> None:
    _let_go(publisher)
    try:
        publisher.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        publisher.kill()
        publisher.wait()


def _let_go(publisher: subprocess.Popen[bytes]) -> None:
    if publisher.stdin is not None:
        publisher.stdin.close()
