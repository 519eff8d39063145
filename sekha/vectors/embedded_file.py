"""The embedded store's file: its schema, its threads and connections, and its errors in our words."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from sekha.errors import StoreError, StoreUnavailable
from sekha.wal import use_wal

__all__ = ["StoreFile"]

T = TypeVar("T")

APPLICATION_ID: Final = 0x53454B48  # "SEKH", where `file` and other programs look for it
PAGE_BYTES: Final = 32_768  # five vectors of 1536, or ten of 768, and no overflow chain: the least to write
WAL_BYTES: Final = 32 * 2**20
READERS: Final = 4
_MAGIC: Final = b"SQLite format 3\0"

MIGRATIONS: Final = (
    (
        """
        CREATE TABLE collections (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            dimension INTEGER NOT NULL,
            fingerprint TEXT NOT NULL,
            next_id INTEGER NOT NULL DEFAULT 1,
            deletions INTEGER NOT NULL DEFAULT 0
        )
        """,
        """
        CREATE TABLE aliases (
            alias TEXT PRIMARY KEY,
            collection INTEGER NOT NULL REFERENCES collections(id) ON DELETE CASCADE
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE tombstones (
            collection INTEGER NOT NULL REFERENCES collections(id) ON DELETE CASCADE,
            deletion INTEGER NOT NULL,
            id INTEGER NOT NULL,
            PRIMARY KEY (collection, deletion, id)
        ) WITHOUT ROWID
        """,
    ),
)
"""Entry `n` takes a file from `user_version` `n` to `n + 1`. Append only: files of every version exist."""

_UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked; try again, or write in smaller batches",
    sqlite3.SQLITE_LOCKED: "another process has kept it locked; try again, or write in smaller batches",
    sqlite3.SQLITE_PROTOCOL: "another process has kept it locked; try again, or write in smaller batches",
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk fails to read or write",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened; check the path and its permissions",
    sqlite3.SQLITE_NOMEM: "memory is exhausted",
}
_BROKEN: Final = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database. Name another file under `store:` in sekha.yaml.",
    sqlite3.SQLITE_CORRUPT: "is damaged. Restore it from a backup, or move it away and ingest again.",
    sqlite3.SQLITE_READONLY: "cannot be written. Check the permissions of the file and of its folder.",
}


class StoreFile:
    """One file and the threads that work on it: a single writer, and a few readers.

    Everything that `write` and `read` are given runs off the event loop, each call in one
    transaction of its own.
    """

    def __init__(self, path: Path, *, busy_seconds: float) -> None:
        self.path = path.absolute()
        self._busy_seconds = busy_seconds
        self._connections: list[sqlite3.Connection] = []
        self._reader = threading.local()
        self._closed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(str(self.path), f"its folder cannot be created: {error.strerror}") from error
        self._refuse_foreign()
        try:
            self._writer = self._connect()
            _prepare(self._writer, self.path, busy_seconds)
        except sqlite3.Error as error:
            self._disconnect()
            raise self._translated(error) from error
        except StoreError:
            self._disconnect()
            raise
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="sekha-store-write")
        self._reading = ThreadPoolExecutor(READERS, thread_name_prefix="sekha-store-read")

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction that is committed when this returns.

        The lock is taken at the start, since a transaction that reads first and writes later fails
        when another process wrote in between.
        """
        return await self._run(self._writing, self._write, work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one unchanging snapshot of the file."""
        return await self._run(self._reading, self._read, work)

    def later(self, work: Callable[[], None]) -> None:
        """Run `work` when a reader is free; nobody waits for it."""
        with suppress(RuntimeError):  # closing
            self._reading.submit(work)

    async def aclose(self) -> None:
        """Finish what has begun, then close; closing twice changes nothing."""
        self._closed = True
        await asyncio.to_thread(self._close)

    async def _run(
        self,
        threads: ThreadPoolExecutor,
        run: Callable[[Callable[[sqlite3.Connection], T]], T],
        work: Callable[[sqlite3.Connection], T],
    ) -> T:
        if self._closed:
            raise StoreError(f"Store {str(self.path)!r} is closed. Open it again.")
        return await asyncio.get_running_loop().run_in_executor(threads, run, work)

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._in_transaction(self._writer, "BEGIN IMMEDIATE", work)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db: sqlite3.Connection | None = getattr(self._reader, "db", None)
        if db is None:
            try:
                db = self._connect()
                db.execute("PRAGMA query_only = ON")
            except sqlite3.Error as error:
                raise self._translated(error) from error
            self._reader.db = db
        return self._in_transaction(db, "BEGIN", work)

    def _in_transaction(self, db: sqlite3.Connection, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            db.execute(begin)
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some failures, such as a full disk.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._translated(error) from error
        return result

    def _refuse_foreign(self) -> None:
        # SQLite would take a file of a few bytes for an empty one, and write over it.
        try:
            with self.path.open("rb") as file:
                start = file.read(len(_MAGIC))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreUnavailable(str(self.path), f"the file cannot be opened: {error.strerror}") from error
        if start not in (b"", _MAGIC):
            raise StoreError(f"Store {str(self.path)!r} {_BROKEN[sqlite3.SQLITE_NOTADB]}")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        self._connections.append(db)
        db.execute("PRAGMA foreign_keys = ON")
        # With WAL this survives `kill -9`; a power cut may take the last commits, and never half of one.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -65536")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_BYTES // PAGE_BYTES}")
        db.execute(f"PRAGMA journal_size_limit = {2 * WAL_BYTES}")
        return db

    def _close(self) -> None:
        self._writing.shutdown()
        self._reading.shutdown()
        self._disconnect()

    def _disconnect(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _translated(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _UNAVAILABLE:
            return StoreUnavailable(str(self.path), _UNAVAILABLE[code])
        if code in _BROKEN:
            return StoreError(f"Store {str(self.path)!r} {_BROKEN[code]}")
        if str(error).startswith("no such module"):
            return StoreError(
                f"Store {str(self.path)!r} cannot be searched by words: the SQLite {sqlite3.sqlite_version} of this "
                "Python was built without FTS5. Use a Python whose SQLite has it, or `store: {kind: weaviate}`."
            )
        return StoreError(f"Store {str(self.path)!r} failed: {error}.")


def _prepare(db: sqlite3.Connection, path: Path, busy_seconds: float) -> None:
    """Make the file ours, with the schema that this code knows."""
    version = _version(db, path)
    if version == 0:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    use_wal(db, busy_seconds)
    if version == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have brought it up to date while we waited for the lock.
        for statements in MIGRATIONS[_version(db, path) :]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection, path: Path) -> int:
    # In this order: another process that makes the file ours meanwhile does all three at once.
    used = db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is not None
    application: int = db.execute("PRAGMA application_id").fetchone()[0]
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if used and application != APPLICATION_ID:
        raise StoreError(
            f"{str(path)!r} is another program's SQLite database. Name another file under `store:` in sekha.yaml."
        )
    if version > len(MIGRATIONS):
        raise StoreError(
            f"Store {str(path)!r} was written by a newer Sekha (schema {version}, and this one knows "
            f"{len(MIGRATIONS)}). Upgrade Sekha, or name another file under `store:` in sekha.yaml."
        )
    return version
