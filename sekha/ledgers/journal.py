"""What one process holds and spends, written down before it goes on, for whoever survives it.

A line is a CRC and a JSON list. It is copied into memory that maps the file, which is the operating
system's, so it survives `kill -9`; `sync` makes it survive a power cut. What of the file is not used
yet is zeros. A process keeps its journal's lock file locked for as long as it lives, so whoever gets
the lock knows that its owner is dead. That holds within one machine: a journal is recovered where it
was written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import chain
from mmap import ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from threading import Lock
from time import time
from typing import Any
from zlib import crc32

import orjson

from sekha.errors import LedgerError, LedgerUnavailable
from sekha.ledger import Budget, Scope, Spend
from sekha.ledgers.encoding import picos, storable, to_dollars
from sekha.pricing import Usage

__all__ = ["Abandoned", "Journal", "abandoned", "delete", "scope_record", "spend_record"]

log = logging.getLogger("sekha.ledgers")

_VERSION = 2
_READABLE = (1, 2)
_BEGUN_SECONDS = 60.0
_MOST = 2**63 - 1
_PIECE = 1024 * 1024
"""So much of the disk is taken at a time, for four thousand records or so: it takes a fraction of a millisecond."""
_UNABLE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
"""What a filesystem says that cannot take room beforehand, or cannot be mapped."""


class Journal:
    """An append-only file in segments. `records` and their meaning are the caller's, but for the first line's."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._folder = folder
        self._number = 0
        self._listed = 0
        """The segment that the folder is known to list after a power cut."""
        self._segment = _Segment(-1)
        self._switching = Lock()
        self._put: Callable[[bytes], object] = _no_room
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Locked before it goes by the name that others look for: they take what is not locked for abandoned.
            unseen = self._lock_path.with_suffix(".new")
            self._lock = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unseen.rename(self._lock_path)
            try:
                self.rotate(0, ())
            except BaseException:
                # Or it would be in the way of the next that goes by this name, once there is room.
                self.remove()
                raise
        except OSError as error:
            raise LedgerError(
                f"Journal {str(folder)!r} cannot be made: {error.strerror}. Name a folder that this process may write "
                "to."
            ) from error

    @property
    def size(self) -> int:
        """Bytes written to the present segment."""
        return self._segment.size

    def write(self, record: Sequence[object]) -> None:
        """Append one record, whole or not at all; raises `LedgerUnavailable` when the disk has no room for it."""
        try:
            line = orjson.dumps(record)
        except TypeError:  # a number beyond 64 bits, which no provider means
            line = orjson.dumps([min(each, _MOST) if isinstance(each, int) else each for each in record])
        line = b"%08x %b\n" % (crc32(line), line)
        try:
            try:
                self._put(line)
            except ValueError:  # it goes beyond what is mapped
                self._put = self._segment.with_room_for(len(line))
                self._put(line)
        except OSError as error:
            raise LedgerUnavailable(str(self._folder), error.strerror or "it cannot be written") from error

    def sync(self) -> None:
        """Make all that was written survive a power cut. Blocks: for another thread than writes."""
        with self._switching:  # or the number might be another file's by now
            file, number = os.dup(self._segment.file), self._number
        try:
            os.fdatasync(file)
        finally:
            os.close(file)
        if number != self._listed:
            self._sync_folder()
            self._listed = number

    def rotate(self, spends: int, records: Iterable[Sequence[object]]) -> list[Path]:
        """Begin a new segment with these records, and say which ones it may replace.

        `spends` is how many were written before: once they are on record elsewhere, the segments
        returned may be deleted.
        """
        before = self._segments()
        number = self._number + 1
        path = self._folder / f"{self._name}-{number:06}.journal"
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with self._switching:
            self._segment.close()
            self._segment, self._put, self._number = _Segment(file), _no_room, number
        self.write(["v", _VERSION, spends])
        for record in records:
            self.write(record)
        return before

    def close(self) -> None:
        """Let go of the journal as it is: whoever finds it next recovers it."""
        with self._switching:
            self._segment.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the journal, so that not even a power cut brings it back."""
        delete(self._segments())
        self._lock_path.unlink(missing_ok=True)
        self.close()
        self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @property
    def _lock_path(self) -> Path:
        return self._folder / f"{self._name}.lock"

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}-*.journal"))


class _Segment:
    """A file that is appended to, by copying into memory that maps it.

    A copy that finds no room on the disk kills the process (SIGBUS), so room is taken beforehand. Where
    a filesystem cannot promise any, lines are written to the file instead.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self._mapped = True
        self._memory: mmap | None = None
        self._start = 0
        """Where the memory begins; without any, where the next line does."""

    @property
    def size(self) -> int:
        return self._start if self._memory is None else self._start + self._memory.tell()

    def with_room_for(self, length: int) -> Callable[[bytes], object]:
        """What appends a line of this length and those after it. With a `ValueError` it asks for more room."""
        if self._mapped:
            try:
                return self._map(length).write
            except OSError as error:
                if self.size or error.errno not in _UNABLE:
                    raise
                self._mapped = False
        return self._append

    def _map(self, length: int) -> mmap:
        # Btrfs, which counts no files, takes room anew for whatever is changed, and a full one kills all the same.
        if not os.fstatvfs(self.file).f_files:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        size = self.size
        start = size - size % ALLOCATIONGRANULARITY
        room = -(-(size + length - start) // _PIECE) * _PIECE
        os.posix_fallocate(self.file, start, room)
        memory = mmap(self.file, room, offset=start)
        memory.seek(size - start)
        if self._memory is not None:
            self._memory.close()
        self._start, self._memory = start, memory
        return memory

    def _append(self, line: bytes) -> None:
        written = os.pwrite(self.file, line, self._start)
        if written < len(line):
            os.ftruncate(self.file, self._start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._start += written

    def close(self) -> None:
        """Close the file, if there is one, without the zeros at its end."""
        if self._memory is not None:
            self._start = self.size
            self._memory.close()
            self._memory = None
        file, self.file = self.file, -1  # the number may soon be another file's
        if file >= 0:
            with suppress(OSError):  # whoever reads it does with them
                os.ftruncate(file, self._start)
            os.close(file)


def _no_room(_line: bytes) -> None:
    """Appends to a segment that was given no room yet."""
    raise ValueError


def scope_record(scope: Scope) -> orjson.Fragment:
    """A scope as journals write it, encoded once for many records."""
    fields = [scope.provider, scope.model, scope.task, scope.key]
    try:
        written = orjson.dumps([*fields, *scope.tags])
    except TypeError:  # half a surrogate, which no database could store either
        written = orjson.dumps([*map(storable, fields), *map(storable, scope.tags)])
    # A copy, since it is kept: what orjson makes takes four kilobytes however short it is.
    return orjson.Fragment(b"%b" % written)


def spend_record(  # noqa: PLR0917 - for each request, and names take half as long again
    kind: str, hold: str, spend: Spend, scope: orjson.Fragment, cost: int, estimated: int
) -> tuple[object, ...]:
    usage = spend.usage
    return (
        kind,
        hold,
        spend.id,
        spend.at,
        scope,
        cost,
        estimated,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.images,
        usage.counted,
    )


def delete(segments: Iterable[Path]) -> None:
    """Blocks while what they took is freed: for another thread than serves, where they are long."""
    for path in segments:
        path.unlink(missing_ok=True)


# --- what a dead process left behind -------------------------------------------------------


@dataclass(frozen=True)
class Abandoned:
    """A journal whose owner is dead, locked against everybody else until `close`."""

    name: str
    spends: tuple[tuple[int, Spend], ...]
    """What it spent and may not have recorded, each with its number in the journal."""
    worst: tuple[Spend, ...]
    """What its calls under way may have cost at most."""
    _paths: tuple[Path, ...]
    _lock: int

    def remove(self) -> None:
        delete(self._paths)

    def close(self) -> None:
        os.close(self._lock)


def abandoned(folder: Path) -> Iterator[Abandoned]:
    """Find and lock each journal that has no owner any more."""
    for path in folder.glob("*.new"):
        # Its owner was killed before it began, unless it is beginning just now.
        with suppress(FileNotFoundError):
            if time() - path.stat().st_mtime > _BEGUN_SECONDS:
                path.unlink()
    for path in sorted(folder.glob("*.lock")):
        lock = _locked(path)
        if lock is None:
            continue
        segments = sorted(folder.glob(f"{path.stem}-*.journal"))
        try:
            spends, worst = _read(segments)
        except _Unreadable as error:
            log.warning("Journal %s is left alone: %s", path.stem, error)
            os.close(lock)
            continue
        # The lock file goes last, or what a second death leaves would never be found.
        yield Abandoned(path.stem, spends, worst, (*segments, path), lock)


class _Unreadable(Exception):
    pass


@dataclass
class _Open:
    """A hold that nobody settled or released."""

    at: datetime
    scope: Scope
    left: list[tuple[Budget, int]]
    named: bool
    """A spend went by its name."""


def _read(segments: Iterable[Path]) -> tuple[tuple[tuple[int, Spend], ...], tuple[Spend, ...]]:
    spends: dict[int, Spend] = {}
    holds: dict[str, _Open] = {}
    budgets: dict[int, Budget] = {}
    count = recorded = 0
    known = False
    for record in _records(segments):
        if not known and record[0] != "v":
            raise _Unreadable("its beginning is damaged")
        known = True
        match record:
            case ["v", version, before]:
                if version not in _READABLE:
                    raise _Unreadable(f"a Sekha of another version wrote it ({version!r}, not {_VERSION})")
                count = before
            case ["p", index, match, period]:
                budgets[index] = Budget(name="", limit=Decimal(0), period=period, match=json.loads(match))
            case ["h", hold, at, amounts, scope, named]:
                left = [(budgets[index], amount) for index, amount in amounts]
                holds[hold] = _Open(datetime.fromisoformat(at), _scope(scope), left, named)
            case ["c" | "s" as kind, hold, *values]:
                count += 1
                spend = spends[count] = _spend(values)
                if kind == "s":
                    holds.pop(hold, None)
                elif hold in holds:
                    _charge(holds[hold], spend)
                    holds[hold].named |= spend.id == hold
            case ["r", hold]:
                holds.pop(hold, None)
            case ["f", recorded]:  # of version 1, whose spends are on record each by itself
                pass
    return (
        tuple((number, spend) for number, spend in spends.items() if number > recorded),
        tuple(chain.from_iterable(_worst_case(name, hold) for name, hold in holds.items())),
    )


def _charge(hold: _Open, spend: Spend) -> None:
    cost = picos(spend.cost)
    hold.left = [
        (budget, max(amount - cost, 0) if budget.covers(spend.scope) else amount) for budget, amount in hold.left
    ]


def _worst_case(name: str, hold: _Open) -> Iterator[Spend]:
    """Spends that count at least what is left of the hold against each of its budgets.

    Where the scope that is known decides all budgets, that is one spend. A budget that it does not
    reach, since a call may have gone to another candidate, gets one of its own.
    """
    left = [(budget, amount) for budget, amount in hold.left if amount]
    number = 0
    scope = hold.scope
    reached = [amount for budget, amount in left if budget.covers(scope)]
    cost = max(reached, default=0)
    while left:
        if cost:
            # The first goes by the hold's own name, as its settling would have, so that only one of them counts.
            identity = f"{name}/{number}" if number or hold.named else name
            amount = to_dollars(cost)
            yield Spend(id=identity, scope=scope, cost=amount, estimated=amount, usage=Usage(counted=True), at=hold.at)
            number += 1
        left = [(b, amount - cost if b.covers(scope) else amount) for b, amount in left]
        left = sorted(
            ((budget, amount) for budget, amount in left if amount > 0),
            key=lambda one: (-len(one[0].match), sorted(one[0].match.items()), one[0].period),
        )
        if left:
            budget, cost = left[0]
            scope = _within(hold.scope, budget.match)


def _within(scope: Scope, match: Mapping[str, str]) -> Scope:
    """The scope, changed as little as makes the match cover it."""
    fields: dict[str, Any] = {name: value for name, value in match.items() if name != "tag"}
    if "provider" in fields and fields["provider"] != scope.provider:
        fields.setdefault("model", None)
    if "tag" in match:
        fields["tags"] = scope.tags | {match["tag"]}
    return scope._replace(**fields)


def _scope(values: Sequence[str] | None) -> Scope:
    if values is None:
        return Scope()
    provider, model, task, key, *tags = values
    return Scope(provider=provider, model=model, task=task, key=key, tags=frozenset(tags))


def _spend(values: Sequence[Any]) -> Spend:
    identity, at, scope, cost, estimated, given, replied, cached, written, images, counted = values
    return Spend(
        id=identity,
        scope=_scope(scope),
        cost=to_dollars(cost),
        estimated=to_dollars(estimated),
        usage=Usage(
            input_tokens=given,
            output_tokens=replied,
            cached_tokens=cached,
            cache_write_tokens=written,
            images=images,
            counted=counted,
        ),
        at=datetime.fromisoformat(at),
        # That is not written down: a few lengths less to learn from, and every version reads it.
        replies=0,
    )


def _records(segments: Iterable[Path]) -> Iterator[list[Any]]:
    for path in segments:
        with path.open("rb") as lines:
            for line in lines:
                checksum, _, written = line.rstrip(b"\n\0").partition(b" ")
                if checksum == b"%08x" % crc32(written) and written:
                    yield orjson.loads(written)
                elif checksum:
                    log.warning("Journal %s has a line that was never finished", path.stem)
                if b"\0" in line:
                    # Its owner came no further. What there is beyond, a power cut kept of what was never synced.
                    break


def _locked(path: Path) -> int | None:
    """Lock a file and open it; None while its owner lives, or when somebody else was faster."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    if os.fstat(lock).st_nlink:
        return lock
    os.close(lock)
    return None
