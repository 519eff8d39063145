"""Put a SQLite file into write-ahead mode, however many processes open it at once."""

from __future__ import annotations

import sqlite3
import time

__all__ = ["use_wal"]


def use_wal(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Switch the file to WAL, where readers and a writer do not wait for each other.

    Raises `sqlite3.OperationalError` when others keep it locked for longer than `busy_seconds`.
    """
    # Processes that switch a new file at the same moment shut each other out, and SQLite then fails at
    # once: its busy timeout does not cover this statement.
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
