"""A durable outbox: what was accepted waits in a folder until it is done, whoever dies meanwhile.

A line is a checksum, how long its attachment is, a head, and the attachment, which may be large and
is checked by its length alone. It reaches the operating system in one write, so it survives `kill -9`
from then on. Many processes may put into one folder; whoever holds its claim takes out, and things
come out at least once: those of a process that dies while it delivers come out again.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EDQUOT
from pathlib import Path

from sekha.segments import SegmentWriter, ready_in, waiting_in, write_apart

__all__ = ["Claim", "Item", "Outbox", "Parcel"]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was put. A zero in an attachment comes out as a newline: JSON and events have none."""

    head: bytes
    """Without newlines and zeros, as JSON that is not indented."""
    attachment: bytes = b""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one segment holds. `torn` counts lines that were cut off when their disk was full or lost power."""

    path: Path
    items: tuple[Item, ...]
    torn: int = 0


class Outbox:
    """One folder of items. `put` is for one thread, the event loop's; the others are for any."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._writer = SegmentWriter(folder)
        self._used = waiting_in(folder).bytes

    @property
    def used(self) -> int:
        """Bytes that lie there, of all processes when it was last looked at."""
        return self._used

    def put(self, item: Item) -> None:
        """Append an item, which survives this process when this returns. Raises `OSError` when it is not taken."""
        line = encode(item)
        self._room_for(line)
        self._used += self._writer.write([line])

    def put_apart(self, items: Sequence[Item], *, over: Path | None = None) -> None:
        """Put items that are large or many as a segment of their own, or in the place of one. Raises `OSError`."""
        lines = [encode(item) for item in items]
        if over is None:
            self._room_for(*lines)
        write_apart(self._folder, lines, over=over)

    def hand_over(self, *, older_than_seconds: float = 0.0) -> None:
        """Let whoever holds the claim have what was put. For the thread of `put`."""
        self._writer.hand_over(older_than_seconds=older_than_seconds)

    def look(self) -> int:
        """See how much lies there by now; returns how many segments."""
        waiting = waiting_in(self._folder)
        self._used = waiting.bytes
        return waiting.segments

    # --- for whoever holds the claim ---

    def ready(self) -> list[Path]:
        """The segments that wait, the oldest first; those too that killed processes have left."""
        return ready_in(self._folder)

    def read(self, path: Path) -> Parcel:
        lines = path.read_bytes().split(b"\n")
        # Behind the last newline there is nothing, unless the last line is torn.
        items = [decode(line) for line in lines if line]
        whole = tuple(item for item in items if item is not None)
        return Parcel(path, whole, len(items) - len(whole))

    def done(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _room_for(self, *lines: bytes) -> None:
        if self._used + sum(map(len, lines)) > self._max_bytes:
            raise OSError(EDQUOT, f"more than {self._max_bytes >> 20:,} MB wait already")


def encode(item: Item) -> bytes:
    """One line."""
    head = b"%d %b" % (len(item.attachment), item.head)
    attachment = b"\0" + item.attachment.replace(b"\n", b"\0") if item.attachment else b""
    return b"%08x %b%b\n" % (zlib.crc32(head), head, attachment)


def decode(line: bytes) -> Item | None:
    """What was encoded; None for anything else."""
    written, _, attachment = line.partition(b"\0")
    checksum, _, counted = written.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(counted):
        return None
    length, _, head = counted.partition(b" ")
    if not length.isdigit() or int(length) != len(attachment):
        return None
    return Item(head, attachment.replace(b"\0", b"\n"))


class Claim:
    """The right to take out of a folder, which one process has at a time; it passes on when that one dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "claim.lock"
        self._lock: int | None = None

    def held(self) -> bool:
        """Whether it is ours, by now."""
        if self._lock is None:
            lock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
