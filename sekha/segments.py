"""Segments: files of lines in a folder that many processes append to, and one takes away.

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
from errno import EDQUOT, ENOSPC
from pathlib import Path

__all__ = ["SegmentWriter", "Waiting", "ready_in", "waiting_in", "write_apart"]

SEGMENT_BYTES = 1 << 20
STALE_SECONDS = 60.0

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What lies in a folder of segments, read or not."""

    bytes: int
    segments: int


class SegmentWriter:
    """Appends lines. For one thread; every write is one call to the system."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError` for a folder in which no file can be made, unless there is but no room in it now."""
        # What was asked and answered may lie in there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _try_to_write_in(folder)
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
        """Let a reader have what was written so far."""
        if self._file is None or time.monotonic() - self._begun < older_than_seconds:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            self._path.rename(self._path.with_suffix(".ready"))
        os.close(file)

    def _begin(self) -> int:
        new, file = _new_in(self._folder)
        try:
            self._path = new.with_suffix(".open")
            new.rename(self._path)
        except OSError:
            os.close(file)
            raise
        self._file, self._bytes, self._begun = file, 0, time.monotonic()
        return file


def write_apart(folder: Path, lines: Sequence[bytes], *, over: Path | None = None) -> None:
    """Write a whole segment, which is ready when this returns, or put it in the place of one. For any thread.

    Raises `OSError`, after which there is none of it.
    """
    new, file = _new_in(folder)
    try:
        for line in lines:
            left = memoryview(line)
            while left:
                left = left[os.write(file, left) :]
        new.rename(over or new.with_suffix(".ready"))
    except OSError:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def ready_in(folder: Path) -> list[Path]:
    """The segments that can be read, the oldest first; those too that killed writers have left."""
    ready = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".ready"):
                ready.append(Path(entry.path))
            elif entry.name.endswith((".open", ".new")):
                with contextlib.suppress(OSError):
                    if left := _left_by_the_dead(Path(entry.path)):
                        ready.append(left)
    return sorted(ready)


def _left_by_the_dead(path: Path) -> Path | None:
    """The segment of a writer that no longer lives, made ready; None if it may live."""
    if path.suffix == ".new" and time.time() - path.stat().st_mtime < STALE_SECONDS:
        return None
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.rename(path.with_suffix(".ready"))
    finally:
        os.close(file)


def waiting_in(folder: Path) -> Waiting:
    """How much lies in a folder, read or not."""
    total = segments = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".open", ".ready")):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
                    segments += 1
    return Waiting(total, segments)


def _try_to_write_in(folder: Path) -> None:
    try:
        path, file = _new_in(folder)
    except OSError as error:
        # There may be room again, and until then each line that is lost is told of.
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        return
    path.unlink(missing_ok=True)
    os.close(file)


def _new_in(folder: Path) -> tuple[Path, int]:
    """A file that nobody takes for a segment yet, and the lock on it that says that its writer lives."""
    # Named by time, so that segments of all writers sort by age.
    path = folder / f"{time.time_ns():020}-{os.getpid()}-{next(_numbers)}.new"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        # Locked before it has its name: a reader takes an unlocked segment for a dead writer's.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return path, file
