"""A durable queue in a folder: many processes append to it, one reads.

Each writer fills a segment of its own, `….open`, and hands it over by renaming it to `….ready`. It holds
a lock on the segment for as long as it lives, so that the segment of a killed writer is known by its
lock being free. A line is safe from `kill -9` of anything once it is written, and from a power cut
once the system has written it to disk, which takes up to half a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from sekha.recording.run import Event, Run, decode

__all__ = ["Segment", "SpoolReader", "SpoolWriter", "Waiting", "waiting_in"]

SEGMENT_BYTES = 1 << 20
STALE_SECONDS = 60.0

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What lies in a spool."""

    bytes: int
    segments: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What one segment holds. `torn` counts lines that were cut off when their writer died or its disk was full."""

    path: Path
    runs: tuple[Run, ...]
    events: tuple[Event, ...]
    torn: int


class SpoolWriter:
    """Appends lines. For one thread; every write is one call to the system."""

    def __init__(self, folder: Path) -> None:
        # Prompts may lie in there, when the configuration has them recorded.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._file: int | None = None
        self._path = folder
        self._bytes = 0
        self._begun = 0.0

    def write(self, lines: Sequence[bytes]) -> int:
        """Append whole lines; returns how many bytes. Raises `OSError`, after which none of them counts as written."""
        data = b"".join(lines)
        file = self._begin() if self._file is None else self._file
        try:
            written = os.write(file, data)
        except OSError:
            self.hand_over()
            raise
        if written < len(data):
            # Nothing may follow a torn line in its segment.
            os.ftruncate(file, self._bytes)
            self.hand_over()
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        self._bytes += len(data)
        if self._bytes >= SEGMENT_BYTES:
            self.hand_over()
        return len(data)

    def hand_over(self, *, older_than_seconds: float = 0.0) -> None:
        """Let the reader have what was written so far."""
        if self._file is None or time.monotonic() - self._begun < older_than_seconds:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            self._path.rename(self._path.with_suffix(".ready"))
        os.close(file)

    def _begin(self) -> int:
        # Named by time, so that segments of all writers sort by age.
        name = f"{time.time_ns():020}-{os.getpid()}-{next(_numbers)}"
        new = self._folder / f"{name}.new"
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            # Locked before it has its name: a reader takes an unlocked segment for a dead writer's.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path = new.with_suffix(".open")
            new.rename(self._path)
        except OSError:
            os.close(file)
            raise
        self._file, self._bytes, self._begun = file, 0, time.monotonic()
        return file


class SpoolReader:
    """Reads what writers have handed over, and what killed writers have left. One at a time in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def ready(self) -> list[Path]:
        """The segments that can be read, the oldest first."""
        self._adopt()
        return sorted(self._folder.glob("*.ready"))

    def read(self, path: Path) -> Segment:
        runs: list[Run] = []
        events: list[Event] = []
        torn = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                what = decode(line)
            except ValueError:
                torn += 1
                continue
            if isinstance(what, Run):
                runs.append(what)
            else:
                events.append(what)
        return Segment(path, tuple(runs), tuple(events), torn)

    def done(self, segment: Segment) -> None:
        """Delete a segment that has been published."""
        segment.path.unlink(missing_ok=True)

    def _adopt(self) -> None:
        for path in (*self._folder.glob("*.open"), *self._folder.glob("*.new")):
            with contextlib.suppress(OSError):
                if path.suffix == ".new" and time.time() - path.stat().st_mtime < STALE_SECONDS:
                    continue
                file = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.rename(path.with_suffix(".ready"))
                finally:
                    os.close(file)


def waiting_in(folder: Path) -> Waiting:
    """How much lies in a spool, read or not."""
    total = segments = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".open", ".ready")):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
                    segments += 1
    return Waiting(total, segments)
