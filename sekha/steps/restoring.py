"""Restoring: what a backup holds is put back where the configuration says, and read back from there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sekha import copying
from sekha.address import without_secrets
from sekha.backup import (
    MANIFEST,
    BackupRequest,
    CopiedFile,
    Manifest,
    RestorePlan,
    RestoreReport,
    RestoreRequest,
    Vectors,
    backup,
    differences,
    listed,
    read_manifest,
)
from sekha.errors import BackupBroken, BackupMissing, StoreError, StoreInUse, StoreNotEmpty, StoreUnavailable
from sekha.resources import Resources
from sekha.steps.backing import Backing, Tell, backups_folder, embedded_file, ledger_file, store_contents
from sekha.vectors.base import VectorStore
from sekha.vectors.embedded import EmbeddedStore

if TYPE_CHECKING:
    from sekha.vectors.weaviate import WeaviateStore

__all__ = ["Restoring", "held"]


class Restoring:
    def __init__(self, resources: Resources, tell: Tell) -> None:
        self._open = resources
        self._tell = tell

    async def plan(self, request: RestoreRequest) -> RestorePlan:
        """Find the backup, and say what a restore would replace. Changes nothing.

        Raises `BackupMissing`, `BackupBroken` for a file that is not as it was written, and `StoreError`
        for what the backup does not hold or the configuration has no place for.
        """
        self._tell("reading the backup")
        plan = await asyncio.to_thread(self._planned, request)
        if plan.vectors_into is None:
            return plan
        if plan.manifest.vectors is not None and plan.manifest.vectors.kind == "weaviate":
            return replace(plan, holds=await _counts(await self._open.store()))
        try:
            store = await asyncio.to_thread(_opened, Path(plan.vectors_into))
            if store is None:
                return plan
            async with store:
                return replace(plan, holds=await _counts(store))
        except StoreUnavailable:
            raise
        except StoreError as error:
            return replace(plan, unreadable=str(error))

    async def restore(self, plan: RestorePlan) -> RestoreReport:
        """Put back what was planned, and read it back.

        Raises `StoreNotEmpty` when that replaces something and the request does not say so, `StoreInUse`
        while another process has a file open, and `BackupBroken` when what is there in the end is not
        what was backed up.
        """
        request, manifest, folder = plan.request, plan.manifest, Path(plan.path)
        if plan.replaces and not request.replace:
            raise StoreNotEmpty(plan.vectors_into or plan.ledger_into or "", held(plan))
        for file in _replaced(plan):
            await asyncio.to_thread(copying.require_alone, file)
        report = RestoreReport(plan=plan, safety=await self._made_safe(plan))
        try:
            if manifest.vectors is not None and plan.vectors_into is not None:
                if manifest.vectors.file is not None:
                    aside = await self._file_put_back(plan, folder / manifest.vectors.file.name, manifest.vectors)
                    report = replace(report, aside=aside)
                else:
                    await self._server_put_back(plan, manifest.vectors)
                unknown = [each.name for each in manifest.vectors.collections if each.digest is None]
                report = replace(report, not_compared=tuple(unknown))
            if manifest.ledger is not None and plan.ledger_into is not None:
                ledger = Path(plan.ledger_into)
                self._tell("putting the ledger back")
                await asyncio.to_thread(copying.put_back, folder / manifest.ledger.name, ledger, lambda _: None)
                await asyncio.to_thread(copying.check, ledger)
        except (StoreInUse, StoreUnavailable):
            raise
        except StoreError as error:
            if report.safety is None:
                raise
            raise StoreError(f"{error} What was there before is in backup {report.safety!r}.") from error
        return report

    # --- what there is ---------------------------------------------------------------------

    def _planned(self, request: RestoreRequest) -> RestorePlan:
        folder = self._found(request)
        manifest = read_manifest(folder)
        for part in request.parts:
            if getattr(manifest, part) is None:
                raise StoreError(f"Backup {manifest.name!r} holds no {part}, so there is nothing to restore of them.")
        for file in manifest.files:
            _check_file(folder / file.name, file)
        ledger = self._ledger_into(request)
        return RestorePlan(
            request=request,
            manifest=manifest,
            path=str(folder),
            vectors_into=self._vectors_into(request, manifest),
            ledger_into=ledger,
            holds={},
            replaces_ledger=ledger is not None and Path(ledger).exists(),
        )

    def _found(self, request: RestoreRequest) -> Path:
        named = Path(request.backup).expanduser()
        if len(named.parts) > 1 or (named / MANIFEST).is_file():
            return named.resolve()
        folder = backups_folder(self._open, request.folder)
        if not (folder / named / MANIFEST).is_file():
            raise BackupMissing(request.backup, [each.name for each in listed(folder)[0]])
        return folder / named

    def _vectors_into(self, request: RestoreRequest, manifest: Manifest) -> str | None:
        vectors = manifest.vectors
        if vectors is None or "vectors" not in request.parts:
            return None
        file, url = embedded_file(self._open), self._open.loaded.config.store.url
        if vectors.kind == "weaviate":
            if request.into or file is not None:
                raise StoreError(
                    f"Backup {manifest.name!r} is kept by Weaviate, which restores it into itself. Name that server "
                    "under `store:` in sekha.yaml."
                )
            return without_secrets(url or "")
        if request.into:
            into = self._open.loaded.path(request.into)
            if into.exists():
                raise StoreNotEmpty(str(into), "something")
            return str(into)
        if file is None:
            raise StoreError(
                f"Backup {manifest.name!r} is of an embedded store, and `store:` names Weaviate. Restore it `--into` a "
                "new file."
            )
        return str(file)

    def _ledger_into(self, request: RestoreRequest) -> str | None:
        if "ledger" not in request.parts:
            return None
        if (file := ledger_file(self._open)) is None:
            raise StoreError("The ledger is in PostgreSQL, which restores it with its own tools: pg_restore.")
        return str(file)

    async def _made_safe(self, plan: RestorePlan) -> str | None:
        request = plan.request
        if not request.safety or plan.unreadable or not plan.replaces:
            return None
        name = f"before-restore-{self._open.now():%Y%m%d-%H%M%S}"
        try:
            made = await backup(BackupRequest(name=name, folder=request.folder), Backing(self._open, self._tell).steps)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise StoreError(
                f"What is there cannot be backed up before it is replaced, so nothing was done: {error} With "
                "--no-safety it is replaced all the same."
            ) from error
        return made.manifest.name

    # --- putting back ----------------------------------------------------------------------

    async def _file_put_back(self, plan: RestorePlan, copied: Path, vectors: Vectors) -> str | None:
        target = Path(str(plan.vectors_into))
        self._tell("putting the vectors back")
        aside = None
        if plan.unreadable:
            aside = await asyncio.to_thread(copying.move_aside, target)

        def told(share: float) -> None:
            self._tell(f"putting the vectors back: {share:.0%}")

        await asyncio.to_thread(copying.put_back, copied, target, told)
        async with await asyncio.to_thread(EmbeddedStore.open, target) as store:
            await self._compare(store, vectors, str(target))
        return None if aside is None else str(aside)

    async def _server_put_back(self, plan: RestorePlan, vectors: Vectors) -> None:
        store = cast("WeaviateStore", await self._open.store())
        backups = store.backups(vectors.backend)
        wanted = [each.name for each in vectors.collections]
        # Looked for before anything is dropped, since Weaviate restores only what is not there.
        there = await backups.collections(vectors.backup_id)
        if there is None or not there.issuperset(wanted):
            raise BackupBroken(vectors.backup_id, "Weaviate does not list it as whole")
        for name in plan.holds:
            self._tell(f"dropping {name}")
            await store.drop_collection(name)
        await backups.restore(vectors.backup_id, wanted, lambda state: self._tell(f"Weaviate's restore: {state}"))
        aliases = await store.list_aliases()
        for alias, target in vectors.aliases.items():
            if aliases.get(alias) != target:
                await store.point_alias(alias, target)
        await self._compare(store, vectors, str(plan.vectors_into))

    async def _compare(self, store: VectorStore, vectors: Vectors, where: str) -> None:
        differ = differences(vectors, *await store_contents(store, self._tell))
        if differ:
            raise BackupBroken(where, f"after the restore, {'; '.join(differ)}")


def held(plan: RestorePlan) -> str:
    """In words, what is there now."""
    holds = [f"{sum(plan.holds.values()):,} records in {', '.join(plan.holds)}"] if plan.holds else []
    holds += ["a file that cannot be read"] if plan.unreadable else []
    holds += ["a ledger"] if plan.replaces_ledger else []
    return " and ".join(holds) or "nothing"


def _replaced(plan: RestorePlan) -> list[Path]:
    """The files that are there, can be read, and will be written over."""
    vectors = plan.manifest.vectors
    files = [plan.vectors_into] if vectors and vectors.kind == "embedded" and not plan.unreadable else []
    return [path for each in (*files, plan.ledger_into) if each is not None and (path := Path(each)).exists()]


def _opened(file: Path) -> EmbeddedStore | None:
    return EmbeddedStore.open(file) if file.exists() else None


async def _counts(store: VectorStore) -> Mapping[str, int]:
    return {each.name: await store.count(each.name) for each in await store.list_collections()}


def _check_file(path: Path, stated: CopiedFile) -> None:
    try:
        found = copying.described(path)
    except StoreUnavailable as error:
        raise BackupBroken(str(path), error.detail) from error
    if found != stated:
        raise BackupBroken(str(path), "it is not the file that was written")
