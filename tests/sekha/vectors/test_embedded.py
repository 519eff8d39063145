"""What is the embedded store's own: its file, its caches and its refusals."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from sekha.errors import StoreError, StoreUnavailable
from sekha.vectors.base import AnyOf, Collection, Compare, Not, Record, Scalar
from sekha.vectors.embedded import EmbeddedStore
from sekha.vectors.embedded_file import StoreFile

DOCS = Collection("Docs", 3, "hash:3")
X, Y, Z = np.eye(3, dtype=np.float32)


def uuid(number: int) -> str:
    return str(UUID(int=number))


def record(number: int, vector: np.ndarray = X, **properties: Scalar) -> Record:
    return Record(uuid(number), f"text {number}", vector, properties)


# --- the file ------------------------------------------------------------------------------


async def test_opening_creates_the_folders(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "a" / "b" / "store.db") as store:
        await store.ensure_collection(DOCS)

    assert (tmp_path / "a" / "b" / "store.db").exists()


async def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(1)])
        await store.point_alias("Current", "Docs")

    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        assert await store.describe("Current") == DOCS
        assert [hit.uuid for hit in await store.search("Current", X, 1)] == [uuid(1)]


async def test_a_new_file_can_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"{number}.db"

        opened = await asyncio.gather(*(asyncio.to_thread(EmbeddedStore.open, path) for _ in range(8)))

        for store in opened:
            assert await store.list_collections() == []
            await store.aclose()


async def test_closing_leaves_one_file(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.count("Docs")

    await store.aclose()

    assert os.listdir(tmp_path) == ["store.db"]  # noqa: PTH208


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        pass

    with pytest.raises(StoreError, match=r"is closed\. Open it again"):
        await store.list_collections()


@pytest.mark.parametrize("content", [b"# Notes\n\nThis is Markdown.\n", b"\x00" * 5000, b"x"])
def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.md").write_bytes(content)

    with pytest.raises(StoreError, match=r"is not an SQLite database\. Name another file"):
        EmbeddedStore.open(tmp_path / "notes.md")

    assert (tmp_path / "notes.md").read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "cookies.db")
    foreign.execute("CREATE TABLE cookies (name)")
    foreign.close()

    with pytest.raises(StoreError, match="another program's SQLite database"):
        EmbeddedStore.open(tmp_path / "cookies.db")


def test_a_newer_file_is_refused_with_the_fix(tmp_path: Path) -> None:
    asyncio.run(EmbeddedStore.open(tmp_path / "store.db").aclose())
    newer = sqlite3.connect(tmp_path / "store.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()

    with pytest.raises(StoreError, match=r"schema 99, and this one knows 1\)\. Upgrade Sekha"):
        EmbeddedStore.open(tmp_path / "store.db")


def test_a_path_that_cannot_be_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreUnavailable, match="folder cannot be created"):
        EmbeddedStore.open(tmp_path / "file" / "store.db")
    with pytest.raises(StoreUnavailable, match="cannot be opened: Is a directory"):
        EmbeddedStore.open(tmp_path)


async def test_a_store_that_another_process_keeps_locked_is_unavailable(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db", busy_seconds=0.01) as store:
        await store.ensure_collection(DOCS)
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(StoreUnavailable, match="locked") as caught:
            await store.upsert("Docs", [record(1)])

        assert caught.value.retryable
        assert await store.count("Docs") == 0  # readers are not in the way of anybody
        other.execute("ROLLBACK")
        assert await store.upsert("Docs", [record(1)]) == {}
        other.close()


async def test_a_full_disk_is_unavailable_and_leaves_whole_batches(tmp_path: Path) -> None:
    file = StoreFile(tmp_path / "store.db", busy_seconds=1)
    await file.write(lambda db: db.execute("PRAGMA max_page_count = 12").fetchall())
    async with EmbeddedStore(file, cache_bytes=2**20, first_pass_rows=1, warn_bytes=2**20) as store:
        await store.ensure_collection(DOCS)
        stored = 0

        with pytest.raises(StoreUnavailable, match="disk is full"):  # noqa: PT012
            while not await store.upsert("Docs", [record(stored + n, title="t" * 500) for n in range(50)]):
                stored += 50

        assert stored > 0
        assert await store.count("Docs") == stored
        assert len(await store.search("Docs", X, 10_000)) == stored


# --- what is written -----------------------------------------------------------------------


async def test_unit_vectors_keep_their_very_bits(tmp_path: Path) -> None:
    vector = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(1, vector)])
        once = (await store.get("Docs", [uuid(1)], vectors=True))[uuid(1)].vector
        assert once is not None
        await store.upsert("Docs", [record(1, once)])

        again = (await store.get("Docs", [uuid(1)], vectors=True))[uuid(1)].vector

    assert again is not None
    assert again.tobytes() == once.tobytes()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
async def test_only_the_direction_of_a_vector_counts(tmp_path: Path, scale: float) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(1, np.array([1, 2, 2], dtype=np.float32) * np.float32(scale))])

        (hit,) = await store.search("Docs", np.array([2, 1, 2], dtype=np.float32) * np.float32(scale), 1)

    assert hit.distance == pytest.approx(1 - 8 / 9, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, "\ud800", b"bytes", {"a": 1}])
async def test_what_json_cannot_hold_is_refused_as_property_and_in_a_filter(tmp_path: Path, value: object) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)

        with pytest.raises(StoreError, match="'n'"):
            await store.upsert("Docs", [record(1, n=value)])  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="'n'"):
            await store.count("Docs", Compare("n", "eq", value))  # type: ignore[arg-type]

        assert await store.count("Docs") == 0


async def test_half_a_surrogate_pair_is_refused_as_text(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)

        with pytest.raises(StoreError, match="no valid Unicode"):
            await store.upsert("Docs", [Record(uuid(1), "\ud800", X)])


@pytest.mark.parametrize(
    "name", ["plain", "with space", "it's", 'a"b', "a.b", "$.x", "'); DROP TABLE records_1; --", "ü", ""]
)
async def test_any_property_name_can_be_filtered_on(tmp_path: Path, name: str) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(1, **{name: "a"}), record(2, **{name: 5}), record(3)])

        assert await store.count("Docs", Compare(name, "eq", "a")) == 1
        assert await store.count("Docs", Compare(name, "gt", 4)) == 1
        assert await store.count("Docs", AnyOf((Compare(name, "in", ("a", None)), Compare(name, "ge", "z")))) == 2
        assert await store.count("Docs", Not(Compare(name, "lt", "b"))) == 2


@pytest.mark.parametrize(
    "where",
    [Compare("n", "in", 1), Compare("n", "eq", (1,)), Compare("n", "like", "a%")],  # type: ignore[arg-type]
)
async def test_a_filter_that_makes_no_sense_is_refused(tmp_path: Path, where: Compare) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)

        with pytest.raises(StoreError, match="'n'"):
            await store.count("Docs", where)


# --- several stores on one file, as processes are ------------------------------------------


async def test_matrices_of_other_processes_notice_new_changed_and_deleted_vectors(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as here, EmbeddedStore.open(tmp_path / "store.db") as there:
        await here.ensure_collection(DOCS)
        await here.upsert("Docs", [record(1, X), record(2, Y)])
        assert [hit.uuid for hit in await there.search("Docs", X, 2)] == [uuid(1), uuid(2)]

        await here.upsert("Docs", [record(1, Z), record(3, X)])
        assert [hit.uuid for hit in await there.search("Docs", X, 1)] == [uuid(3)]
        await here.delete("Docs", [uuid(3)])

        assert [hit.uuid for hit in await there.search("Docs", Z, 5)] == [uuid(1), uuid(2)]


async def test_changed_text_is_found_under_an_unchanged_vector(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as here, EmbeddedStore.open(tmp_path / "store.db") as there:
        await here.ensure_collection(DOCS)
        await here.upsert("Docs", [record(1, X, source="a")])
        await there.search("Docs", X, 1)

        await here.upsert("Docs", [Record(uuid(1), "new", X, {"source": "b"})])

        (hit,) = await there.search("Docs", X, 1, where=Compare("source", "eq", "b"))
        assert hit.text == "new"


async def test_a_process_that_slept_through_many_deletions_sees_none_of_the_deleted(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as here, EmbeddedStore.open(tmp_path / "store.db") as there:
        await here.ensure_collection(DOCS)
        await here.upsert("Docs", [record(number) for number in range(1110)])
        assert len(await there.search("Docs", X, 2000)) == 1110

        for number in range(1105):
            await here.delete("Docs", [uuid(number)])

        hits = await there.search("Docs", X, 2000)
        assert [hit.uuid for hit in hits] == [uuid(number) for number in range(1105, 1110)]


async def test_a_matrix_of_mostly_deleted_rows_is_made_anew(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(number, n=number) for number in range(3000)])
        await store.search("Docs", X, 1)

        await store.delete_where("Docs", Compare("n", "lt", 2900))
        await store.upsert("Docs", [record(5, Y)])

        assert len(await store.search("Docs", X, 3000)) == 101


async def test_a_collection_dropped_and_made_by_another_process_is_not_mixed_with_the_old(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as here, EmbeddedStore.open(tmp_path / "store.db") as there:
        await here.ensure_collection(DOCS)
        await here.upsert("Docs", [record(1)])
        await there.search("Docs", X, 1)
        await here.drop_collection("Docs")
        await here.ensure_collection(Collection("Docs", 2))
        await here.upsert("Docs", [Record(uuid(2), "text", np.ones(2, dtype=np.float32))])

        hits = await there.search("Docs", np.ones(2, dtype=np.float32), 5)

        assert [hit.uuid for hit in hits] == [uuid(2)]


async def test_searches_and_writes_at_once_never_show_half_a_batch(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)

        async def write() -> None:
            for batch in range(40):
                await store.upsert("Docs", [record(batch * 10 + number) for number in range(10)])

        async def search() -> None:
            seen = 0
            while seen < 400:
                found = len(await store.search("Docs", X, 1000))
                assert found % 10 == 0
                assert found >= seen
                seen = found

        await asyncio.gather(write(), *(search() for _ in range(6)))


async def test_a_write_that_waits_holds_up_neither_readers_nor_the_event_loop(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(store.upsert("Docs", [record(1)]))

        for _ in range(10):
            assert await store.count("Docs") == 0
        assert not writing.done()

        other.execute("ROLLBACK")
        other.close()
        assert await writing == {}


async def test_a_large_collection_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db", warn_bytes=100) as store:
        await store.ensure_collection(DOCS)
        for number in range(0, 30, 10):
            await store.upsert("Docs", [record(number + n) for n in range(10)])
            with caplog.at_level(logging.WARNING):
                await store.search("Docs", X, 1)

    assert len(caplog.records) == 1
    assert "Weaviate serves this size better" in caplog.text
