"""Backups that a Weaviate server makes of itself: what is in them, and what is there after a restore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sekha.backup import (
    MANIFEST,
    BackupReport,
    BackupRequest,
    RestoreReport,
    RestoreRequest,
    backup,
    read_manifest,
    written,
)
from sekha.errors import BackupBroken, StoreError, StoreNotEmpty, StoreUnavailable
from sekha.loading import load
from sekha.resources import Resources
from sekha.runtime import Runtime
from sekha.steps.backing import Backing
from sekha.steps.restoring import Restoring
from sekha.vectors.base import Collection, Record, VectorStore
from tests.fixtures.weaviate import Server, WeaviateServer, empty_store, weaviate_section

DOCS = Collection("Docs_4", 4, "hash:4")
NOTES = Collection("Notes_4", 4, "hash:4")


def record(number: int, text: str = "text") -> Record:
    vector = np.array([1, number, 0, 0], dtype=np.float32)
    return Record(f"00000000-0000-0000-0000-{number:012d}", f"{text} {number}", vector, {"n": number})


async def back_up(sekha: Runtime, name: str) -> BackupReport:
    return await backup(BackupRequest(name=name), Backing(sekha.resources).steps)


async def put_back(sekha: Runtime, name: str, *, may_replace: bool = True, safety: bool = False) -> RestoreReport:
    restoring = Restoring(sekha.resources, lambda _: None)
    request = RestoreRequest(backup=name, replace=may_replace, safety=safety)
    return await restoring.restore(await restoring.plan(request))


async def texts(store: VectorStore, name: str) -> list[str]:
    return [each.text async for page in store.scan(name) for each in page]


def configured(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, more: str = "") -> Resources:
    monkeypatch.setenv("WEAVIATE_KEY", server.api_key or "")
    (folder / "sekha.yaml").write_text("providers: []\n" + weaviate_section(server) + more, "utf-8")
    return Resources(load(folder / "sekha.yaml"))


@pytest.fixture(scope="module")
def server(weaviate_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of our own in any case: only such a one has a place for backups."""
    private = WeaviateServer.private(weaviate_program, tmp_path_factory.mktemp("weaviate"))
    try:
        private.start()
        yield private.at
    finally:
        private.kill()


@pytest.fixture
async def sekha(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runtime]:
    async with empty_store(server), Runtime(configured(tmp_path, server, monkeypatch)) as opened:
        store = await opened.resources.store()
        await store.ensure_collection(DOCS)
        await store.upsert("Docs_4", [record(number) for number in range(20)])
        await store.point_alias("Docs", "Docs_4")
        yield opened


async def test_a_restore_brings_back_what_was_and_nothing_else(sekha: Runtime) -> None:
    store = await sekha.resources.store()
    before = await texts(store, "Docs")
    made = await back_up(sekha, "first")
    await store.upsert("Docs_4", [record(number, "other") for number in range(5, 30)])
    await store.ensure_collection(NOTES)
    await store.point_alias("Docs", "Notes_4")
    await store.point_alias("Notes", "Notes_4")

    restored = await put_back(sekha, "first", safety=True)

    assert (made.manifest.records, made.manifest.files) == (20, ())
    assert restored.not_compared == ()
    assert [each.name for each in await store.list_collections()] == ["Docs_4"]
    assert await store.list_aliases() == {"Docs": "Docs_4"}
    assert await texts(store, "Docs") == before
    (hit,) = await store.search("Docs", np.array([1, 19, 0, 0], dtype=np.float32), 1)
    assert hit.text == "text 19"
    assert restored.safety is not None
    await put_back(sekha, restored.safety)
    assert {each.name for each in await store.list_collections()} == {"Docs_4", "Notes_4"}
    assert await store.list_aliases() == {"Docs": "Notes_4", "Notes": "Notes_4"}


async def test_what_is_acknowledged_before_is_in_it_while_others_write_on(sekha: Runtime) -> None:
    store = await sekha.resources.store()
    done = asyncio.Event()

    async def write_on() -> None:
        number = 1000
        while not done.is_set():
            await store.upsert("Docs_4", [record(number)])
            number += 1

    writing = asyncio.create_task(write_on())
    try:
        made = await back_up(sekha, "busy")
    finally:
        done.set()
        await writing
    restored = await put_back(sekha, "busy")

    assert made.manifest.vectors is not None
    assert made.manifest.vectors.collections[0].digest is None
    assert restored.not_compared == ("Docs_4",)
    assert {f"text {number}" for number in range(20)} <= set(await texts(store, "Docs"))


async def test_a_restore_replaces_nothing_unless_told(sekha: Runtime) -> None:
    store = await sekha.resources.store()
    await back_up(sekha, "first")
    await store.upsert("Docs_4", [record(100)])

    with pytest.raises(StoreNotEmpty, match="21 records in Docs_4"):
        await put_back(sekha, "first", may_replace=False)

    assert await store.count("Docs_4") == 21


async def test_a_backup_that_the_server_no_longer_has_drops_nothing(sekha: Runtime) -> None:
    store = await sekha.resources.store()
    made = await back_up(sekha, "first")
    folder = Path(made.path)
    manifest = read_manifest(folder)
    assert manifest.vectors is not None
    gone = replace(manifest, vectors=replace(manifest.vectors, backup_id="sekha-first-gone"))
    (folder / MANIFEST).write_bytes(written(gone))

    with pytest.raises(BackupBroken, match="Weaviate does not list it as whole"):
        await put_back(sekha, "first")

    assert await store.count("Docs_4") == 20


async def test_a_server_without_the_module_says_which_one_it_needs(
    sekha: Runtime, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = configured(tmp_path, server, monkeypatch, "backup: {backend: s3}\n")
    async with Runtime(resources) as elsewhere:
        with pytest.raises(StoreError, match="ENABLE_MODULES=backup-s3 and BACKUP_S3_BUCKET"):
            await back_up(elsewhere, "first")

    assert [each.name for each in (tmp_path / ".sekha" / "backups").iterdir()] == [".lock"]


@pytest.mark.timeout(180)
async def test_a_server_that_was_killed_is_backed_up_once_it_is_back(
    weaviate_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    mortal = WeaviateServer.private(weaviate_program, tmp_path / "server")
    mortal.start()
    try:
        resources = configured(tmp_path, mortal.at, monkeypatch)
        async with Runtime(resources) as sekha:
            store = await sekha.resources.store()
            await store.ensure_collection(DOCS)
            await store.upsert("Docs_4", [record(number) for number in range(20)])
            mortal.kill()
            with pytest.raises(StoreUnavailable):
                await back_up(sekha, "away")
            mortal.start()

            made = await back_up(sekha, "back")
            await store.drop_collection("Docs_4")
            mortal.kill()
            mortal.start()
            await put_back(sekha, "back")

            assert made.manifest.records == 20
            assert await store.count("Docs_4") == 20
    finally:
        mortal.kill()
