"""A Weaviate server's own backups: begun, waited for, and found again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from sekha.errors import StoreError, StoreUnavailable

__all__ = ["WeaviateBackups"]

FIRST_LOOK_SECONDS: Final = 0.2
LOOK_SECONDS: Final = 5.0
AWAY_SECONDS: Final = 120.0
"""How long a server may be gone in the middle: it goes on with a backup for as long as it runs."""

_WHERE: Final[Mapping[str, str]] = {
    "filesystem": "BACKUP_FILESYSTEM_PATH=/a/folder",
    "s3": "BACKUP_S3_BUCKET=a-bucket",
    "gcs": "BACKUP_GCS_BUCKET=a-bucket",
    "azure": "BACKUP_AZURE_CONTAINER=a-container",
}


class WeaviateBackups:
    """What a server keeps on one backend.

    It makes a backup of classes while they are written to, and what it acknowledged before is in it. It
    restores only classes that are not there, and deletes no backup.
    """

    def __init__(self, client: Any, backend: Any, url: str, ask: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
        self._client = client
        self._backend = backend
        self._url = url
        self._ask = ask

    async def create(self, backup_id: str, collections: Sequence[str], told: Callable[[str], None]) -> None:
        """Make a backup of these collections and their aliases. Raises `StoreError` unless it succeeds."""
        await self._begin(self._client.create(backup_id, self._backend, include_collections=list(collections)))
        try:
            await self._ended("backup", lambda: self._client.get_create_status(backup_id, self._backend), told)
        except asyncio.CancelledError:
            with suppress(StoreError):
                await self._ask(self._client.cancel(backup_id, self._backend))
            raise

    async def restore(self, backup_id: str, collections: Sequence[str], told: Callable[[str], None]) -> None:
        """Put back these collections, none of which may be there, and their aliases, wherever those point now."""
        restoring = self._client.restore(
            backup_id, self._backend, include_collections=list(collections), overwrite_alias=True
        )
        await self._begin(restoring)
        await self._ended("restore", lambda: self._client.get_restore_status(backup_id, self._backend), told)

    async def collections(self, backup_id: str) -> frozenset[str] | None:
        """The collections in a backup; None when there is no such backup, or it is not whole."""
        listed = await self._begin(self._client.list_backups(self._backend))
        for each in listed:
            if each.backup_id == backup_id and each.status.value == "SUCCESS":
                return frozenset(each.collections)
        return None

    async def _begin(self, asked: Awaitable[Any]) -> Any:
        try:
            return await self._ask(asked)
        except StoreError as error:
            if "did you enable the right module" not in str(error):
                raise
            name = self._backend.value
            raise StoreError(
                f"Weaviate at {self._url} has no backups on {name!r}. Start it with ENABLE_MODULES=backup-{name} and "
                f"{_WHERE[name]}, or name another `backend` under `backup:` in sekha.yaml."
            ) from error

    async def _ended(
        self, what: str, look: Callable[[], Awaitable[Any]], told: Callable[[str], None], wait: float = 0.0
    ) -> None:
        answered = time.monotonic()
        while True:
            wait = min(max(FIRST_LOOK_SECONDS, 1.5 * wait), LOOK_SECONDS)
            await asyncio.sleep(wait)
            try:
                state = await self._ask(look())
            except StoreUnavailable:
                if time.monotonic() - answered > AWAY_SECONDS:
                    raise
                continue
            answered = time.monotonic()
            match state.status.value:
                case "SUCCESS":
                    return
                case "FAILED" | "CANCELED" as status:
                    why = f"{status.lower()}: {' '.join(str(state.error or 'no reason given').split())}"
                    raise StoreError(f"The {what} by Weaviate at {self._url} {why}. See the server's log.")
                case status:
                    told(status.lower())
