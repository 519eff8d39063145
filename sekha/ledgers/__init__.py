"""Where the ledger is kept: a SQLite file by default, PostgreSQL by one line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sekha.address import WRONG_PORT, has_wrong_port
from sekha.errors import ConfigError, Problem
from sekha.ledger import Ledger
from sekha.ledgers.database import Database
from sekha.ledgers.sql import SqlLedger

if TYPE_CHECKING:
    from sekha.ledgers.leased import LeasedLedger

__all__ = ["lease_from", "open_database", "open_leased", "open_ledger"]


def open_ledger(url: str) -> Ledger:
    """Open the ledger in the database at this URL. Closing it closes the database."""
    return SqlLedger(open_database(url))


def open_leased(url: str, folder: Path) -> LeasedLedger:
    """Open the ledger at a URL for a process that answers many requests a second, its journal in this folder.

    Journals are kept apart by the ledger that they belong to, so one folder may serve several.
    """
    return lease_from(SqlLedger(open_database(url)), url, folder)


def lease_from(ledger: SqlLedger, url: str, folder: Path) -> LeasedLedger:
    """The same over a ledger that is open already."""
    from sekha.ledgers.leased import LeasedLedger

    return LeasedLedger(ledger, folder / _fingerprint(url))


def open_database(url: str) -> Database:
    """Open the database of a ledger at `sqlite:///.sekha/ledger.db`, `sqlite:////var/lib/ledger.db` or `postgresql://…`.

    Nothing is connected before the first call, so this never blocks; one that cannot be
    reached, or that a newer Sekha wrote, says so there. Close it with `close`.
    """
    scheme, separator, rest = url.partition("://")
    match scheme:
        # In memory, every connection would have a ledger of its own.
        case "sqlite" if separator and rest.startswith("/") and rest not in ("/", "/:memory:"):
            from sekha.ledgers.sqlite import SqliteDatabase

            return SqliteDatabase(rest[1:])
        case "postgresql" | "postgres" if separator and has_wrong_port(url):
            raise ConfigError("sekha.yaml", [Problem("ledger.url", WRONG_PORT)])
        case "postgresql" | "postgres" if separator:
            # psycopg costs every command its import, and most ledgers are files.
            from sekha.ledgers.postgres import PostgresDatabase

            return PostgresDatabase(url)
        case _:
            # The URL itself stays out of the message: it may carry a password.
            problem = Problem(
                "ledger.url",
                f"{scheme if separator else 'what is written there'!r} names no ledger. Write "
                "`sqlite:///.sekha/ledger.db` (four slashes for an absolute path) or "
                "`postgresql://user@host/database`.",
            )
            raise ConfigError("sekha.yaml", [problem])


def _fingerprint(url: str) -> str:
    """Name a ledger by where it is, whoever asks and with whatever password."""
    where, _, options = url.partition("?")
    split = urlsplit(where)
    if split.scheme == "sqlite":
        place = str(Path(split.path[1:]).resolve())
    else:
        hosts = split.netloc.rpartition("@")[2]
        hosts = hosts if "," in hosts else f"{split.hostname}:{split.port or 5432}"
        place = f"{hosts}{split.path}?{options}"
    return hashlib.sha256(place.encode()).hexdigest()[:16]
