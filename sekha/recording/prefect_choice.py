"""Which way into Prefect: its database where we may and know it, else its API. Loaded by the publisher alone."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from prefect.settings import get_current_settings

from sekha.address import is_loopback
from sekha.errors import PrefectUnavailable
from sekha.recording.prefect_api import ApiSink
from sekha.recording.prefect_database import Database, DatabaseSink
from sekha.recording.prefect_sqlite import SqliteTables
from sekha.recording.sink import Sink

__all__ = ["open_sink"]

log = logging.getLogger("sekha.recording")


def open_sink() -> Sink | None:
    """Open what Prefect's own settings lead to; None when they name no server.

    The database is used when it has tables that we know and is the one of the server, if a server is
    named: both give the same id to one flow. Raises `PrefectUnavailable` when that cannot be found out now.
    """
    settings = get_current_settings()
    api_url = settings.api.url
    named = settings.server.database.connection_url
    url = named.get_secret_value() if named is not None else ""
    own = settings.home / "prefect.db"
    if not api_url:
        # Prefect names its own where nobody names another, which says nothing of a server.
        if not url or (_file_of(url) == own and not own.is_file()):
            return None
        return _database_sink(url, None)
    if not url and is_loopback(urlsplit(api_url).hostname or ""):
        url = f"sqlite:///{own}"
    api = ApiSink()
    try:
        database = _database_sink(url, api) if url else None
    except BaseException:
        api.close()
        raise
    return database if database is not None else api


def _database_sink(url: str, api: ApiSink | None) -> DatabaseSink | None:
    """A sink into that database; None if it is not the API's, or not one that we know."""
    expected = api.flow_id("chat") if api else None
    try:
        database = _open(url, alone=api is None)
    except PrefectUnavailable as error:
        if api is None:
            raise
        log.warning("%s Runs go through the API.", error)
        return None
    if database is None:
        return None
    sink = DatabaseSink(database, api)
    try:
        sink.require_known_tables()
        same = expected is None or sink.has_flow(expected)
    except PrefectUnavailable as error:
        database.close()
        if api is None:
            raise
        log.warning("%s Runs go through the API.", error)
        return None
    if not same:
        database.close()
        log.warning("%s is not the one of the server at PREFECT_API_URL. Runs go through the API.", database.name)
        return None
    return sink


@cache
def _say_that_it_is_in_memory() -> None:
    """Said once, since it is looked at again and again."""
    log.warning(
        "Prefect's database is in the memory of its own process, where nobody else gets at it, so nothing is recorded. "
        "Name its server by PREFECT_API_URL, or a file by PREFECT_API_DATABASE_CONNECTION_URL."
    )


def _file_of(url: str) -> Path:
    return Path(url.partition("://")[2].removeprefix("/").partition("?")[0])


def _open(url: str, *, alone: bool) -> Database | None:
    """The database at SQLAlchemy's URL; None if there is none on this machine, or within reach.

    One that is `alone`, with no API beside it, may come yet: Prefect makes it as it starts.
    """
    scheme, _, rest = url.partition("://")
    match scheme.partition("+")[0]:
        case "sqlite":
            if ":memory:" in rest or "mode=memory" in rest:
                if alone:
                    _say_that_it_is_in_memory()
                return None
            file = _file_of(url)
            if not alone and not file.is_file():
                return None
            return SqliteTables(file)
        case "postgresql" | "postgres":
            from sekha.recording.prefect_postgres import PostgresTables

            return PostgresTables(f"postgresql://{rest}")
    return None
