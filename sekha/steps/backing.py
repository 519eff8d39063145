"""Backing up: the store and the ledger, copied while others write, read back, and kept."""

from __future__ import annotations

import asyncio
import fcntl
import secrets
import shutil
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast

from sekha import copying
from sekha.address import without_secrets
from sekha.backup import (
    LEDGER_FILE,
    MANIFEST,
    VECTORS_FILE,
    BackupRequest,
    BackupSteps,
    Contents,
    CopiedFile,
    Draft,
    Manifest,
    Vectors,
    listed,
    read_contents,
    to_delete,
    written,
)
from sekha.errors import BackupBroken, InvalidRequest, StoreError, StoreUnavailable
from sekha.resources import Resources, ledger_url
from sekha.vectors.base import VectorStore
from sekha.vectors.embedded import EmbeddedStore

if TYPE_CHECKING:
    from sekha.vectors.weaviate import WeaviateStore

__all__ = ["Backing", "Tell", "backups_folder", "embedded_file", "ledger_file", "store_contents"]

Tell = Callable[[str], None]
"""Told what is being done, whenever that changes."""

POSTGRES: Final = "the ledger: it is in PostgreSQL, which pg_dump backs up"


def _untold(_: str) -> None:
    pass


class Backing:
    """The steps of a backup. One at a time is made into a folder, whoever makes it."""

    def __init__(self, resources: Resources, tell: Tell = _untold) -> None:
        self._open = resources
        self._tell = tell
        self._locks: dict[str, IO[bytes]] = {}

    @property
    def steps(self) -> BackupSteps:
        return BackupSteps(
            begin=self.begin_backup,
            copy_vectors=self.copy_vectors,
            copy_ledger=self.copy_ledger,
            read_back=self.read_back,
            complete=self.complete_backup,
            delete_old=self.delete_old_backups,
            end=self.end_backup,
        )

    async def begin_backup(self, request: BackupRequest) -> Draft:
        """Choose where it will stand, and clear away what somebody left who died.

        Raises `InvalidRequest` for a name that is taken, `StoreUnavailable` while another backup is made there.
        """
        return await asyncio.to_thread(self._begun, request)

    async def copy_vectors(self, draft: Draft) -> Vectors | None:
        """Copy the store, or have its server do so; None when there is none yet."""
        file = embedded_file(self._open)
        if file is None:
            return await self._copy_on_server(draft)
        if not file.exists():
            return None
        self._tell("copying the vectors")
        async with await asyncio.to_thread(EmbeddedStore.open, file) as store:
            counted = await store.copy_to(draft.path / VECTORS_FILE, self._share("copying the vectors"))
        # What it holds is said by the copy itself; the counts are those of the moment that was copied.
        contents = tuple(Contents(name=name, dimension=0, fingerprint="", records=n) for name, n in counted.items())
        return Vectors(kind="embedded", collections=contents, aliases={})

    async def copy_ledger(self, draft: Draft) -> CopiedFile | None:
        """Copy the ledger's file; None when there is none yet, or it is in PostgreSQL."""
        file = ledger_file(self._open)
        if file is None or not file.exists():
            return None
        self._tell("copying the ledger")
        target = draft.path / LEDGER_FILE
        await asyncio.to_thread(copying.copy_file, file, target, self._share("copying the ledger"))
        await asyncio.to_thread(copying.check, target)
        return await asyncio.to_thread(copying.described, target)

    async def read_back(self, draft: Draft, vectors: Vectors | None, ledger: CopiedFile | None) -> Manifest:
        """Read the whole copy as the store would, and say what it holds. Raises `BackupBroken`."""
        if vectors is None and ledger is None:
            raise StoreError(
                f"There is nothing to back up: {draft.of!r} is not there, and no ledger's file. Is this the right "
                "configuration? --config names another."
            )
        if vectors is not None:
            read = self._read_file if vectors.kind == "embedded" else self._read_server
            vectors = await read(draft, vectors)
        left_out = () if ledger_file(self._open) else (POSTGRES,)
        return Manifest(
            name=draft.name,
            made_at=draft.made_at,
            of=draft.of,
            sekha=_version(),
            rotates=draft.rotates,
            vectors=vectors,
            ledger=ledger,
            left_out=left_out,
        )

    async def complete_backup(self, draft: Draft, manifest: Manifest) -> str:
        """Make it a backup, in one move that outlives a power cut; returns its folder."""

        def complete() -> None:
            with copying.translated(draft.path):
                note = draft.path / MANIFEST
                note.write_bytes(written(manifest))
                copying.described(note)
                copying.sync(draft.path)
                draft.path.rename(draft.place)
                copying.sync(draft.place.parent)

        await asyncio.to_thread(complete)
        return str(draft.place)

    async def delete_old_backups(self, draft: Draft, manifest: Manifest) -> tuple[Manifest, ...]:
        """Delete the oldest backups of this store that nobody named, now that there is a newer one."""
        folder = Path(draft.folder)
        old = to_delete(listed(folder)[0], manifest, draft.keep)
        for each in reversed(old):
            self._tell(f"deleting {each.name}")
            with copying.translated(folder / each.name):
                # Out of sight first, so that one that is half gone is never taken for a whole one.
                gone = (folder / each.name).rename(folder / f".{each.name}.deleted")
                await asyncio.to_thread(shutil.rmtree, gone)
        return tuple(old)

    async def end_backup(self, draft: Draft) -> None:
        """Take away what is not whole, and let others make backups there."""
        if lock := self._locks.pop(draft.folder, None):
            with closing(lock):
                await asyncio.to_thread(shutil.rmtree, draft.path, ignore_errors=True)

    # --- details ---------------------------------------------------------------------------

    def _begun(self, request: BackupRequest) -> Draft:
        folder, made_at = backups_folder(self._open, request.folder), self._open.now()
        with copying.translated(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
            try:
                for left in (*folder.glob(".*.partial"), *folder.glob(".*.deleted")):
                    shutil.rmtree(left)
                draft = Draft(
                    name=_free_name(folder, request.name, f"{made_at:%Y%m%d-%H%M%S}"),
                    folder=str(folder),
                    made_at=f"{made_at:%Y-%m-%dT%H:%M:%SZ}",
                    of=self._whose(),
                    rotates=request.name is None,
                    keep=request.keep or self._open.loaded.config.backup.keep,
                )
                # It holds what was stored and spent, whatever the folder lets others see.
                draft.path.mkdir(mode=0o700)
            except BaseException:
                lock.close()
                raise
        self._locks[draft.folder] = lock
        return draft

    def _whose(self) -> str:
        file = embedded_file(self._open)
        return str(file) if file else without_secrets(self._open.loaded.config.store.url or "")

    def _share(self, what: str) -> copying.Told:
        return lambda share: self._tell(f"{what}: {share:.0%}")

    async def _copy_on_server(self, draft: Draft) -> Vectors | None:
        store = cast("WeaviateStore", await self._open.store())
        collections, aliases = await store_contents(store, self._tell)
        if not collections:
            return None
        backend = self._open.loaded.config.backup.backend
        # The server takes each id once and for good, whatever came of the try.
        backup_id = f"sekha-{draft.name}-{secrets.token_hex(4)}"
        names = [each.name for each in collections]
        await store.backups(backend).create(backup_id, names, lambda state: self._tell(f"Weaviate's backup: {state}"))
        return Vectors(kind="weaviate", collections=collections, aliases=aliases, backend=backend, backup_id=backup_id)

    async def _read_file(self, draft: Draft, vectors: Vectors) -> Vectors:
        file = draft.path / VECTORS_FILE
        self._tell("checking the copy")
        await asyncio.to_thread(copying.check, file)
        async with await asyncio.to_thread(EmbeddedStore.open, file) as store:
            collections, aliases = await store_contents(store, self._tell)
        copied = {each.name: each.records for each in vectors.collections}
        if copied != {each.name: each.records for each in collections}:
            raise BackupBroken(str(file), "it has not as many records as the store had")
        described = await asyncio.to_thread(copying.described, file)
        return Vectors(kind="embedded", collections=collections, aliases=aliases, file=described)

    async def _read_server(self, draft: Draft, vectors: Vectors) -> Vectors:  # noqa: ARG002 - it is not in our folder
        """Weaviate shows nothing of a backup but its list, so what is in it is what was there before and after."""
        store = cast("WeaviateStore", await self._open.store())
        there = await store.backups(vectors.backend).collections(vectors.backup_id)
        wanted = {each.name for each in vectors.collections}
        if there is None or not wanted <= there:
            raise BackupBroken(vectors.backup_id, f"Weaviate lists {', '.join(sorted(there or ())) or 'nothing'} of it")
        after = {each.name: each for each in (await store_contents(store, self._tell))[0]}
        steady = tuple(each if after.get(each.name) == each else _without_digest(each) for each in vectors.collections)
        return Vectors(
            kind="weaviate",
            collections=steady,
            aliases=vectors.aliases,
            backend=vectors.backend,
            backup_id=vectors.backup_id,
        )


async def store_contents(store: VectorStore, tell: Tell) -> tuple[tuple[Contents, ...], dict[str, str]]:
    """Everything that a store holds, read whole."""
    found: list[Contents] = []
    for each in await store.list_collections():
        total = await store.count(each.name)

        def told(read: int, name: str = each.name, total: int = total) -> None:
            tell(f"reading {name}: {read:,} of {total:,}")

        found.append(await read_contents(store, each, told))
    return tuple(found), await store.list_aliases()


def backups_folder(resources: Resources, named: str | None) -> Path:
    loaded = resources.loaded
    return loaded.path(named or loaded.config.backup.folder)


def embedded_file(resources: Resources) -> Path | None:
    """The embedded store's file; None when a server keeps the vectors."""
    store = resources.loaded.config.store
    return None if store.kind == "weaviate" and store.url else resources.loaded.path(store.path)


def ledger_file(resources: Resources) -> Path | None:
    """The ledger's file; None when it is in PostgreSQL."""
    url = ledger_url(resources.loaded)
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _free_name(folder: Path, wanted: str | None, stamp: str) -> str:
    if wanted is not None and (folder / wanted).exists():
        raise InvalidRequest(
            f"A backup {wanted!r} is in {str(folder)!r} already. Choose another name, or delete it.", field="name"
        )
    name, number = wanted or stamp, 1
    while (folder / name).exists():
        number += 1
        name = f"{stamp}-{number}"
    return name


def _locked(folder: Path) -> IO[bytes]:
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreUnavailable(str(folder), "another backup is being made into it; wait for that one") from error
    return lock


def _version() -> str:
    try:
        return version("sekha")
    except PackageNotFoundError:
        return "from a checkout"


def _without_digest(contents: Contents) -> Contents:
    return Contents(
        name=contents.name,
        dimension=contents.dimension,
        fingerprint=contents.fingerprint,
        records=contents.records,
    )
