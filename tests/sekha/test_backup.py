"""Backups: what they hold, which old ones go, and what is in the store after a restore."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sekha.backup import (
    VECTORS_FILE,
    BackupReport,
    BackupRequest,
    Contents,
    Manifest,
    RestoreReport,
    RestoreRequest,
    Vectors,
    backup,
    differences,
    listed,
    read_manifest,
    to_delete,
    written,
)
from sekha.errors import (
    BackupBroken,
    BackupMissing,
    InvalidRequest,
    StoreError,
    StoreInUse,
    StoreNotEmpty,
    StoreUnavailable,
)
from sekha.loading import load
from sekha.resources import Resources
from sekha.steps.backing import Backing
from sekha.steps.restoring import Restoring
from sekha.vectors.base import Collection, Record
from sekha.vectors.embedded import EmbeddedStore
from tests.fixtures.pipeline import NOON, Opens

DOCS = Collection("Docs_4", 4, "hash:4")


def record(number: int, text: str = "text") -> Record:
    vector = np.array([1, number, 0, 0], dtype=np.float32)
    return Record(f"00000000-0000-0000-0000-{number:012d}", f"{text} {number}", vector, {"n": number})


class Place:
    """A configuration in a folder, and what a command does with it."""

    def __init__(self, folder: Path, config: str = "providers: []\n") -> None:
        self.folder = folder
        self.store = folder / ".sekha" / "vectors.db"
        self.ledger = folder / ".sekha" / "ledger.db"
        self.backups = folder / ".sekha" / "backups"
        self.now = NOON
        (folder / "sekha.yaml").write_text(config)

    def resources(self) -> Resources:
        return Resources(load(self.folder / "sekha.yaml", environ={}), now=lambda: self.now)

    async def write(self, *numbers: int, text: str = "text") -> None:
        async with EmbeddedStore.open(self.store) as store:
            await store.ensure_collection(DOCS)
            await store.upsert("Docs_4", [record(number, text) for number in numbers])
            await store.point_alias("Docs", "Docs_4")

    async def texts(self, path: Path | None = None) -> list[str]:
        async with EmbeddedStore.open(path or self.store) as store:
            return [found.text async for page in store.scan("Docs_4") for found in page]

    async def back_up(self, name: str | None = None, **fields: Any) -> BackupReport:
        self.now += timedelta(minutes=1)
        return await backup(BackupRequest(name=name, **fields), Backing(self.resources()).steps)

    async def restore(self, name: str, **fields: Any) -> RestoreReport:
        self.now += timedelta(minutes=1)
        restoring = Restoring(self.resources(), lambda _: None)
        return await restoring.restore(await restoring.plan(RestoreRequest(backup=name, **fields)))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- making one ----------------------------------------------------------------------------


async def test_a_backup_says_what_it_holds_and_is_read_back_as_it_says(place: Place) -> None:
    await place.write(1, 2, 3)

    made = (await place.back_up("first")).manifest

    assert made.vectors is not None
    (contents,) = made.vectors.collections
    assert (contents.name, contents.dimension, contents.fingerprint, contents.records) == ("Docs_4", 4, "hash:4", 3)
    assert made.vectors.aliases == {"Docs": "Docs_4"}
    assert read_manifest(place.backups / "first") == made
    assert await place.texts(place.backups / "first" / "vectors.db") == ["text 1", "text 2", "text 3"]
    assert sorted(each.name for each in (place.backups / "first").iterdir()) == ["manifest.json", "vectors.db"]


async def test_equal_contents_have_one_digest_and_each_change_another(place: Place) -> None:
    async def digest(name: str) -> str | None:
        made = (await place.back_up(name)).manifest
        assert made.vectors is not None
        return made.vectors.collections[0].digest

    await place.write(1, 2)
    digests = [await digest("a"), await digest("b")]
    await place.write(2, text="changed")
    digests.append(await digest("c"))
    async with EmbeddedStore.open(place.store) as store:
        await store.upsert("Docs_4", [replace(record(2, "changed"), properties={"n": 2, "m": 1})])
    digests.append(await digest("d"))
    async with EmbeddedStore.open(place.store) as store:
        moved = replace(record(2, "changed"), properties={"n": 2, "m": 1}, vector=np.ones(4, dtype=np.float32))
        await store.upsert("Docs_4", [moved])
    digests.append(await digest("e"))

    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


async def test_what_is_acknowledged_before_is_in_it_while_others_write_on(place: Place) -> None:
    await place.write(*range(2000))
    ended = asyncio.Event()

    async def write_on() -> int:
        number = 10_000
        async with EmbeddedStore.open(place.store) as store:
            while not ended.is_set():
                await store.upsert("Docs_4", [record(number), record(number + 1)])
                number += 2
        return number

    writing = asyncio.create_task(write_on())
    try:
        await place.back_up("busy")
    finally:
        ended.set()
    last = await writing
    copied = [int(text.split()[1]) for text in await place.texts(place.backups / "busy" / "vectors.db")]

    assert copied[:2000] == list(range(2000))
    assert last > 10_000
    assert len(copied) % 2 == 0, "half of a batch was copied"


async def test_the_ledger_goes_along(pipeline: Opens, tmp_path: Path) -> None:
    async with pipeline() as opened:
        await opened.runtime.chat("Hello")
        spent = await opened.spent()
        report = await backup(BackupRequest(name="money"), opened.runtime.backing.steps)

    with sqlite3.connect(tmp_path / ".sekha" / "backups" / "money" / "ledger.db") as copied:
        (rows,) = copied.execute("SELECT count(*) FROM ledger_spends").fetchone()
    copied.close()
    assert spent > 0
    assert rows == 1
    assert report.manifest.vectors is None
    assert report.manifest.ledger is not None


async def test_a_ledger_in_postgresql_is_said_to_be_left_out(tmp_path: Path) -> None:
    place = Place(tmp_path, "providers: []\nledger: {url: postgresql://sekha@localhost/ledger}\n")
    await place.write(1)

    made = (await place.back_up("first")).manifest

    assert made.ledger is None
    assert "pg_dump" in made.left_out[0]


async def test_nothing_is_no_backup(place: Place) -> None:
    with pytest.raises(StoreError, match="nothing to back up"):
        await place.back_up()

    assert listed(place.backups) == ([], [])
    assert not place.store.exists()


async def test_a_name_is_taken_once_and_has_to_be_one(place: Place) -> None:
    await place.write(1)
    await place.back_up("first")

    with pytest.raises(InvalidRequest, match="already"):
        await place.back_up("first")
    for name in ("", "../up", "Upper", "a" * 101, ".hidden"):
        with pytest.raises(InvalidRequest, match="lower-case"):
            BackupRequest(name=name)


async def test_two_at_once_into_one_folder_are_one_and_a_refusal(place: Place) -> None:
    await place.write(1)
    one, other = Backing(place.resources()), Backing(place.resources())

    draft = await one.begin_backup(BackupRequest(name="first"))
    with pytest.raises(StoreUnavailable, match="another backup"):
        await other.begin_backup(BackupRequest(name="second"))
    await one.end_backup(draft)
    await other.end_backup(await other.begin_backup(BackupRequest(name="second")))

    assert [each.name for each in place.backups.iterdir()] == [".lock"]


async def test_a_damaged_store_makes_no_backup(place: Place) -> None:
    await place.write(*range(500))
    with place.store.open("r+b") as file:
        file.seek(3 * 32_768)
        file.write(b"\xff" * 3 * 32_768)

    with pytest.raises(StoreError):
        await place.back_up("first")

    assert listed(place.backups) == ([], [])


async def test_a_record_that_lost_its_vector_is_backed_up_as_it_is(place: Place) -> None:
    await place.write(*range(3))
    with closing(sqlite3.connect(place.store)) as db:
        db.execute("DELETE FROM vectors_1 WHERE id = 1")
        db.execute("UPDATE vectors_1 SET vector = x'00000000' WHERE id = 2")
        db.commit()

    report = await place.back_up("first")

    assert report.manifest.records == 3
    await place.write(*range(3))
    await place.restore("first", replace=True)
    async with EmbeddedStore.open(place.store) as store:
        (records,) = [page async for page in store.scan("Docs_4", vectors=True)]
    assert [None if each.vector is None else each.vector.size for each in records].count(None) == 1


async def test_a_backup_that_was_killed_leaves_nothing_that_looks_like_one(place: Place) -> None:
    await place.write(*range(20_000))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sekha", "backup", "killed"), cwd=place.folder, stdout=DEVNULL, stderr=DEVNULL
    )
    async with asyncio.timeout(60):
        while not (place.backups / ".killed.partial" / VECTORS_FILE).exists():
            assert process.returncode is None
            await asyncio.sleep(0.002)
    process.kill()
    await process.wait()
    assert listed(place.backups) == ([], [])
    assert (place.backups / ".killed.partial").exists()
    report = await place.back_up("whole")

    assert report.manifest.records == 20_000
    assert sorted(each.name for each in place.backups.iterdir()) == [".lock", "whole"]


# --- which ones go -------------------------------------------------------------------------


def manifest(name: str, *, day: int = 1, of: str = "here", rotates: bool = True) -> Manifest:
    made = datetime(2026, 11, day, tzinfo=UTC)
    return Manifest(name=name, made_at=f"{made:%Y-%m-%dT%H:%M:%SZ}", of=of, sekha="1", rotates=rotates)


def test_the_oldest_of_ours_that_nobody_named_go() -> None:
    there = [manifest(f"auto-{day}", day=day) for day in (3, 1, 4, 2)]
    spared = [manifest("named", rotates=False), manifest("theirs", of="elsewhere")]
    new = manifest("new", day=5)

    assert [each.name for each in to_delete([*there, *spared, new], new, 3)] == ["auto-2", "auto-1"]
    assert to_delete([*there, *spared, new], new, 5) == []
    assert [each.name for each in to_delete(there, replace(new, rotates=False), 3)] == ["auto-1"]


def test_the_new_one_stays_even_when_the_clock_was_set_back() -> None:
    new = manifest("new", day=1)

    gone = to_delete([manifest("auto-2", day=2), new], new, 1)

    assert [each.name for each in gone] == ["auto-2"]


async def test_old_backups_go_once_the_new_one_is_there(place: Place) -> None:
    await place.write(1)
    names = [(await place.back_up(keep=2)).manifest.name for _ in range(3)]
    await place.back_up("named", keep=2)
    shutil.copytree(place.backups / names[2], place.backups / "by-hand")

    last = await place.back_up(keep=1)

    assert last.deleted == (names[2], names[1])
    assert [each.name for each in listed(place.backups)[0]] == [last.manifest.name, "named", "by-hand"]


async def test_a_backup_that_fails_deletes_nothing(place: Place) -> None:
    await place.write(1)
    kept = (await place.back_up(keep=1)).manifest.name
    place.store.write_bytes(b"no database")

    with pytest.raises(StoreError):
        await place.back_up(keep=1)

    assert [each.name for each in listed(place.backups)[0]] == [kept]


# --- manifests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"rotates": false', '"rotates": true'),
        lambda _: "[]",
        lambda _: "",
    ],
)
def test_a_manifest_that_was_changed_is_no_manifest(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    (tmp_path / "manifest.json").write_text(spoil(written(manifest("first", rotates=False)).decode()))

    with pytest.raises(BackupBroken, match="damaged"):
        read_manifest(tmp_path)


def test_a_newer_manifest_wants_a_newer_sekha(tmp_path: Path) -> None:
    content = json.loads(written(manifest("first"))) | {"format": 99, "unknown": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(content))

    with pytest.raises(BackupBroken, match="newer Sekha"):
        read_manifest(tmp_path)


def test_every_difference_is_named() -> None:
    def contents(name: str, records: int = 1, digest: str | None = "d", dimension: int = 4) -> Contents:
        return Contents(name=name, dimension=dimension, fingerprint="f", records=records, digest=digest)

    wanted = Vectors(
        kind="embedded",
        collections=(*map(contents, "abcd"), contents("e", digest=None)),
        aliases={"x": "a"},
    )
    there = [
        contents("a", 2),
        contents("b", digest="other"),
        contents("c", dimension=8),
        contents("e", 7),
        contents("f"),
    ]

    found = "; ".join(differences(wanted, there, {}))

    for what in ("'a' has 2", "'b' has other", "'c' is of another", "'d' is missing", "'f' is there", "aliases differ"):
        assert what in found
    assert "'e'" not in found
    assert differences(wanted, wanted.collections, {"x": "a"}) == []


# --- restoring -----------------------------------------------------------------------------


async def test_a_restore_brings_back_what_was_and_nothing_else(place: Place) -> None:
    await place.write(1, 2, 3)
    await place.back_up("first")
    await place.write(2, text="changed")
    async with EmbeddedStore.open(place.store) as store:
        await store.delete("Docs_4", [record(1).uuid])
        await store.ensure_collection(Collection("Later_8", 8))
        await store.point_alias("Other", "Later_8")

    done = await place.restore("first", replace=True)

    assert await place.texts() == ["text 1", "text 2", "text 3"]
    async with EmbeddedStore.open(place.store) as store:
        assert await store.list_collections() == [DOCS]
        assert await store.list_aliases() == {"Docs": "Docs_4"}
        assert record(3).vector is not None
        (hit,) = await store.search("Docs", np.array([1, 3, 0, 0], dtype=np.float32), 1)
        assert hit.text == "text 3"
    assert done.safety is not None
    await place.restore(done.safety, replace=True, safety=False)
    assert await place.texts() == ["changed 2", "text 3"]


async def test_a_restore_replaces_nothing_unless_told(place: Place) -> None:
    await place.write(1)
    await place.back_up("first")
    await place.write(2)

    with pytest.raises(StoreNotEmpty, match="2 records in Docs_4"):
        await place.restore("first")

    assert await place.texts() == ["text 1", "text 2"]


async def test_where_nothing_is_a_restore_needs_no_permission(place: Place) -> None:
    await place.write(1)
    await place.back_up("first")
    place.store.unlink()

    done = await place.restore("first")

    assert await place.texts() == ["text 1"]
    assert done.safety is None


async def test_a_file_that_is_open_elsewhere_is_left_alone(place: Place) -> None:
    await place.write(1)
    await place.back_up("first")
    await place.write(2)

    async with EmbeddedStore.open(place.store) as held:
        with pytest.raises(StoreInUse, match="open in another process"):
            await place.restore("first", replace=True)
        assert await held.count("Docs_4") == 2

    await place.restore("first", replace=True)
    assert await place.texts() == ["text 1"]


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0 and no more of it"])
async def test_a_file_that_cannot_be_read_is_moved_aside(place: Place, damage: bytes) -> None:
    await place.write(1)
    await place.back_up("first")
    place.store.write_bytes(damage)

    with pytest.raises(StoreNotEmpty, match="cannot be read"):
        await place.restore("first")
    done = await place.restore("first", replace=True)

    assert await place.texts() == ["text 1"]
    assert done.aside == f"{place.store}.damaged-1"
    assert place.store.with_name("vectors.db.damaged-1").read_bytes() == damage


async def test_a_copy_that_changed_on_the_disk_is_refused_before_anything_is_touched(place: Place) -> None:
    await place.write(1)
    await place.back_up("first")
    await place.write(2)
    copied = place.backups / "first" / "vectors.db"
    copied.write_bytes(copied.read_bytes()[:-1] + b"x")

    with pytest.raises(BackupBroken, match="not the file that was written"):
        await place.restore("first", replace=True)
    copied.unlink()
    with pytest.raises(BackupBroken, match="No such file"):
        await place.restore("first", replace=True)

    assert await place.texts() == ["text 1", "text 2"]


async def test_into_a_new_file_the_store_stays_as_it_is(place: Place, tmp_path: Path) -> None:
    await place.write(1)
    await place.back_up("first")
    await place.write(2)

    await place.restore("first", into=str(tmp_path / "look.db"))

    assert await place.texts(tmp_path / "look.db") == ["text 1"]
    assert await place.texts() == ["text 1", "text 2"]
    with pytest.raises(StoreNotEmpty):
        await place.restore("first", into=str(tmp_path / "look.db"), replace=True)


async def test_the_ledger_is_restored_when_it_is_asked_for_and_only_then(pipeline: Opens, tmp_path: Path) -> None:
    ledger = {"parts": ("ledger",), "replace": True}
    async with pipeline() as opened:
        await opened.runtime.chat("Hello")
        before = await opened.spent()
        await backup(BackupRequest(name="first"), opened.runtime.backing.steps)
        await opened.runtime.chat("Hello")
        after = await opened.spent()
    place = Place(tmp_path, (tmp_path / "sekha.yaml").read_text())
    await place.write(1)
    await place.back_up("second")

    await place.restore("second", replace=True)
    async with pipeline() as opened:
        assert await opened.spent() == after > before
        with pytest.raises(StoreInUse):
            await place.restore("first", **ledger)
    await place.restore("first", **ledger)
    async with pipeline() as opened:
        assert await opened.spent() == before
    with pytest.raises(StoreError, match="holds no vectors"):
        await place.restore("first", replace=True)


async def test_a_backup_is_found_by_name_or_path_and_the_nearest_is_named(place: Place, tmp_path: Path) -> None:
    await place.write(1)
    await place.back_up("before-upgrade", folder=str(tmp_path / "elsewhere"))

    with pytest.raises(BackupMissing, match="No backup 'before-upgrade'"):
        await place.restore("before-upgrade", replace=True)
    with pytest.raises(BackupMissing, match="Did you mean 'before-upgrade'"):
        await place.restore("before-upgrad", folder=str(tmp_path / "elsewhere"))
    await place.restore("before-upgrade", folder=str(tmp_path / "elsewhere"), replace=True)
    await place.restore(str(tmp_path / "elsewhere" / "before-upgrade"), replace=True, safety=False)

    assert await place.texts() == ["text 1"]


async def test_an_embedded_backup_does_not_go_into_weaviate(tmp_path: Path) -> None:
    place = Place(tmp_path)
    await place.write(1)
    await place.back_up("first")
    other = Place(tmp_path, "providers: []\nstore: {kind: weaviate, url: 'http://127.0.0.1:9'}\n")

    with pytest.raises(StoreError, match="names Weaviate"):
        await other.restore("first", replace=True)
