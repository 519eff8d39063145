"""Copy a SQLite file while others write in it, and put a copy back where nobody else has the file open."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

from sekha.backup import CopiedFile
from sekha.errors import BackupBroken, StoreError, StoreInUse, StoreUnavailable

__all__ = [
    "Told",
    "check",
    "copy",
    "copy_file",
    "described",
    "move_aside",
    "put_back",
    "require_alone",
    "sync",
    "translated",
]

Told: TypeAlias = Callable[[float], None]
"""Told the share that is done, 0 to 1; in a thread of its own."""

PAGES_AT_ONCE: Final = 512
ALONE_SECONDS: Final = 2.0
"""How long a process that is just ending may take to let go of the file."""

_UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked; try again",
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk fails to read or write",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened; check the path and its permissions",
    sqlite3.SQLITE_READONLY: "the file cannot be written; check its permissions and its folder's",
}
_DAMAGED: Final = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def copy(db: sqlite3.Connection, target: Path, told: Told) -> None:
    """Copy what a connection sees in its transaction under way into a new file.

    SQLite begins a copy anew whenever somebody writes meanwhile. In a transaction of a file in
    write-ahead mode the connection does not see that, so the copy is of one moment, and ends.
    """
    if not db.in_transaction:
        raise ValueError("a copy outside a transaction never ends while others write")
    target.unlink(missing_ok=True)
    with translated(target), closing(sqlite3.connect(target, isolation_level=None)) as new:
        _copy_pages(db, new, told)


def copy_file(source: Path, target: Path, told: Told) -> None:
    """Copy a file in write-ahead mode as it is now."""
    with translated(source), closing(_opened(source, "rw")) as db:
        db.execute("BEGIN")
        db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()  # from here on it sees no other's writes
        copy(db, target, told)


def check(copied: Path) -> None:
    """Have SQLite look through a whole copy. Raises `BackupBroken` for one that is damaged."""
    with translated(copied), closing(_opened(copied, "ro&immutable=1")) as db:
        try:
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if _code(error) not in _DAMAGED:
                raise
            raise BackupBroken(str(copied), str(error)) from error
        if found != "ok":
            raise BackupBroken(str(copied), " ".join(str(found).split()))


def require_alone(path: Path) -> None:
    """Raise `StoreInUse` while another process has a file open."""
    with translated(path), closing(_opened(path, "rw", timeout=ALONE_SECONDS)) as db:
        _take_alone(db, path)


def put_back(copied: Path, target: Path, told: Told) -> None:
    """Make a file hold what a copy holds: all of it or, if somebody dies meanwhile, what it held before.

    It is written as one transaction into the file that is there. A new one in its place would leave
    those who are just opening the old one with a file that nobody else has. Raises `StoreInUse` while
    another process has it open.
    """
    with translated(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            closing(sqlite3.connect(target, timeout=ALONE_SECONDS, isolation_level=None)) as into,
            closing(_opened(copied, "ro&immutable=1")) as db,
        ):
            _take_alone(into, target)
            _copy_pages(db, into, told)


def move_aside(target: Path) -> Path:
    """Move a damaged file out of the way, with what belongs to it; returns where it is now."""
    number = 1
    while (aside := target.with_name(f"{target.name}.damaged-{number}")).exists():
        number += 1
    with translated(target):
        # The log first: beside a new file of the old name it would be taken for that file's own.
        for ending in ("-wal", "-shm", "-journal", ""):
            with suppress(FileNotFoundError):
                target.with_name(target.name + ending).rename(aside.with_name(aside.name + ending))
    return aside


def described(copied: Path) -> CopiedFile:
    """A file's size and digest, once it is safe on the disk."""
    with translated(copied), copied.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return CopiedFile(name=copied.name, bytes=copied.stat().st_size, sha256=digest)


def sync(folder: Path) -> None:
    """Make what was created or renamed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Say in our terms what went wrong with a file."""
    try:
        yield
    except sqlite3.Error as error:
        code = _code(error)
        if code in _UNAVAILABLE:
            raise StoreUnavailable(str(path), _UNAVAILABLE[code]) from error
        raise StoreError(f"{str(path)!r} cannot be copied: {error}. Look at the file and at the disk.") from error
    except OSError as error:
        raise StoreUnavailable(str(path), f"{error.strerror}") from error


def _take_alone(db: sqlite3.Connection, path: Path) -> None:
    # Whoever has a file open in write-ahead mode holds a lock on it, also while doing nothing. Ours shuts
    # everybody out until it is closed.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    try:
        db.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if _code(error) == sqlite3.SQLITE_BUSY:
            raise StoreInUse(str(path)) from error
        raise
    db.execute("COMMIT")


def _copy_pages(db: sqlite3.Connection, into: sqlite3.Connection, told: Told) -> None:
    def progress(_: int, left: int, pages: int) -> None:
        told((pages - left) / max(pages, 1))

    db.backup(into, pages=PAGES_AT_ONCE, sleep=0, progress=progress)


def _opened(path: Path, mode: str, *, timeout: float = 10.0) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, isolation_level=None, timeout=timeout)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
