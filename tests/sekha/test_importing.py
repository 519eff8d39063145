"""Taking over what other stores hold: what comes across, what is left out, and what a second run does."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from sekha.errors import InvalidRequest
from sekha.importing import ImportReport, ImportRequest, Taken, bring, uuid_of
from sekha.runtime import Runtime
from sekha.vectors.base import Record
from tests.fixtures.chroma import VECTORS, chroma
from tests.fixtures.runtimes import TWO_MODELS, opened, opened_on
from tests.fixtures.weaviate import Server, empty_store, foreign_client


@pytest.fixture
async def sekha(tmp_path: Path) -> AsyncIterator[Runtime]:
    async with opened(tmp_path) as runtime:
        yield runtime


async def imported(sekha: Runtime, origin: Any = "chroma", **fields: Any) -> ImportReport:
    return await bring(ImportRequest(origin=origin, **fields), sekha.importing.steps)


async def only(sekha: Runtime, origin: Any = "chroma", **fields: Any) -> Taken:
    (taken,) = (await imported(sekha, origin, **fields)).taken
    return taken


async def kept(sekha: Runtime, index: str) -> list[Record]:
    store = await sekha.resources.store()
    return [record async for page in store.scan(index, vectors=True) for record in page]


async def test_everything_comes_across_as_it_is_there(sekha: Runtime, tmp_path: Path) -> None:
    path = chroma(tmp_path / "old")

    taken = await only(sekha, path=path, model="hashed-8", page_size=2)

    assert (taken.read, taken.imported, taken.there, taken.left_out) == (5, 5, 0, ())
    records = {record.properties["imported_id"]: record for record in await kept(sekha, "Conversations_8")}
    assert sorted(records) == [f"doc-{number}" for number in range(5)]
    one = records["doc-3"]
    assert (one.text, one.properties["number"]) == ("text 3", 3)
    assert one.properties["embedding_fingerprint"] == "builtin/hashed-8:8:unit"
    assert one.vector is not None
    assert one.vector @ VECTORS[3] / np.linalg.norm(VECTORS[3]) == pytest.approx(1, abs=1e-6)


async def test_what_was_imported_is_found(sekha: Runtime, tmp_path: Path) -> None:
    (question,) = (await sekha.embed("Where is the moon?", model="hashed-8")).vectors
    vectors = np.array([question, *VECTORS[:4]])
    await imported(sekha, path=chroma(tmp_path / "old", vectors=vectors), model="hashed-8")

    found = await sekha.search("Where is the moon?", "conversations", limit=1)

    assert [hit.text for hit in found.hits] == ["text 0"]


async def test_a_second_import_brings_nothing_and_doubles_nothing(sekha: Runtime, tmp_path: Path) -> None:
    path = chroma(tmp_path / "old")
    await imported(sekha, path=path, model="hashed-8")

    again = await only(sekha, path=path, model="hashed-8")

    assert (again.imported, again.there) == (0, 5)
    assert len(await kept(sekha, "Conversations_8")) == 5


async def test_a_later_import_brings_what_is_new(sekha: Runtime, tmp_path: Path) -> None:
    await imported(sekha, path=chroma(tmp_path / "old", count=3), model="hashed-8")

    later = await only(sekha, path=chroma(tmp_path / "old", name="conversations_8", count=5), model="hashed-8")

    assert (later.imported, later.there) == (2, 3)


async def test_records_without_a_sound_vector_are_left_out_and_counted(sekha: Runtime, tmp_path: Path) -> None:
    vectors = VECTORS[:5].copy()
    vectors[1:3] = 0

    taken = await only(sekha, path=chroma(tmp_path / "old", vectors=vectors), model="hashed-8", page_size=2)

    assert taken.imported == 3
    (left_out,) = taken.left_out
    assert (left_out.count, left_out.examples) == (2, ("doc-1", "doc-2"))
    assert "zero" in left_out.why


async def test_a_dimension_alone_decides_nothing(sekha: Runtime, tmp_path: Path) -> None:
    path = chroma(tmp_path / "old")

    with pytest.raises(InvalidRequest, match="does not say which model made them") as caught:
        await imported(sekha, path=path)

    assert "hashed-8 of 8 numbers" in caught.value.message
    assert not (tmp_path / ".sekha" / "vectors.db").exists()


@pytest.mark.parametrize("model", ["hashed-9", "hashed-16"])
async def test_a_model_that_makes_no_such_vectors_is_refused(sekha: Runtime, tmp_path: Path, model: str) -> None:
    with pytest.raises(InvalidRequest, match=f"by '{model}', and no such model of that dimension"):
        await imported(sekha, path=chroma(tmp_path / "old"), model=model)


async def test_the_model_that_a_collection_names_is_taken(sekha: Runtime, tmp_path: Path) -> None:
    taken = await only(sekha, path=chroma(tmp_path / "old", said={"embedding_model": "hashed-8"}))

    assert (taken.source.model, taken.imported) == ("builtin/hashed-8", 5)


async def test_records_that_name_another_model_than_the_rest_are_left_out(sekha: Runtime, tmp_path: Path) -> None:
    metadata = [{"model": "hashed-8"}, {"model": "hashed-8"}, {"model": "other"}, {"model": "hashed-8"}, {"x": 1}]

    taken = await only(sekha, path=chroma(tmp_path / "old", metadata=metadata))

    assert taken.imported == 4
    assert [(each.count, each.examples) for each in taken.left_out] == [(1, ("doc-2",))]


async def test_only_what_is_named_is_taken_and_where_it_is_told_to(sekha: Runtime, tmp_path: Path) -> None:
    path = chroma(tmp_path / "old")
    chroma(tmp_path / "old", "others")

    taken = await only(sekha, path=path, model="hashed-8", names=("others",), into="kept")

    assert taken.source.index == "Kept_8"


async def test_a_name_that_is_not_there_is_answered_with_the_nearest(sekha: Runtime, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Did you mean 'conversations_8'"):
        await imported(sekha, path=chroma(tmp_path / "old"), model="hashed-8", names=("conversation_8",))


async def test_a_folder_without_a_chroma_store_is_left_as_it_is(sekha: Runtime, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    with pytest.raises(InvalidRequest, match=r"it has no chroma\.sqlite3"):
        await imported(sekha, path="other", model="hashed-8")

    assert list((tmp_path / "other").iterdir()) == []


async def test_a_damaged_chroma_store_is_said_to_be_unreadable(sekha: Runtime, tmp_path: Path) -> None:
    from sekha.errors import StoreError

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "chroma.sqlite3").write_bytes(b"nothing of the kind" * 100)

    with pytest.raises(StoreError, match="could not be read"):
        await imported(sekha, path="old", model="hashed-8")


def test_without_the_extra_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "sekha.yaml").write_text(TWO_MODELS, "utf-8")
    path = chroma(tmp_path / "old")
    # What an environment without chromadb finds.
    code = "import sys; sys.modules['chromadb'] = None; from sekha.cli.app import main; main()"

    ended = subprocess.run(
        [sys.executable, "-c", code, "import", "chroma", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 4
    assert "pip install 'sekha[chroma]'" in ended.stderr


def test_an_import_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "sekha.yaml").write_text(TWO_MODELS, "utf-8")
    path = chroma(tmp_path / "old", count=5000)
    command = [sys.executable, "-m", "sekha", "import", "chroma", path, "--model", "hashed-8", "--json"]

    with subprocess.Popen(
        [*command, "--page-size", "50"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        until = time.monotonic() + 60
        while not 500 <= rows(tmp_path) < 5000:
            assert killed.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        killed.kill()
    before = rows(tmp_path)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)

    (taken,) = json.loads(again.stdout)["taken"]
    assert 0 < before < 5000
    assert (taken["there"], taken["imported"]) == (before, 5000 - before)
    assert rows(tmp_path) == 5000


def rows(folder: Path) -> int:
    """How many records the store's file has, while others write it."""
    file = folder / ".sekha" / "vectors.db"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM records_1").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def test_a_name_that_is_a_uuid_stays_and_others_follow_from_the_collection() -> None:
    uuid = str(UUID(int=7))

    assert uuid_of("documents", uuid) == uuid
    assert uuid_of("documents", "a") == uuid_of("documents", "a")
    assert uuid_of("documents", "a") != uuid_of("conversations", "a")


# --- Weaviate ------------------------------------------------------------------------------


@asynccontextmanager
async def with_a_class(server: Server, name: str = "Conversations") -> AsyncIterator[None]:
    """A class as others make it, with six objects; the last has no vector."""
    from weaviate.classes.config import Configure, DataType, Property
    from weaviate.classes.data import DataObject

    async with foreign_client(server) as client:
        made = await client.collections.create(
            name,
            vector_config=Configure.Vectors.self_provided(),
            properties=[
                Property(name="content", data_type=DataType.TEXT),
                Property(name="said_at", data_type=DataType.DATE),
                Property(name="tags", data_type=DataType.TEXT_ARRAY),
            ],
        )
        await made.data.insert_many(
            [
                DataObject(
                    properties={"content": f"text {n}", "said_at": "2026-01-02T03:04:05Z", "tags": ["a", "b"]},
                    uuid=UUID(int=n + 1),
                    vector=VECTORS[n] if n < 5 else None,
                )
                for n in range(6)
            ]
        )
        try:
            yield
        finally:
            await client.collections.delete(name)


async def test_a_class_without_a_suffix_becomes_the_collection_of_its_dimension(
    weaviate_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_on(weaviate_server, tmp_path, monkeypatch) as sekha, with_a_class(weaviate_server):
        taken = await only(sekha, "weaviate", model="hashed-8", page_size=4)

        assert (taken.source.index, taken.imported) == ("Conversations_8", 5)
        assert [(each.count, each.why) for each in taken.left_out] == [(1, "its vector: it is missing")]
        assert taken.in_the_way == "Conversations"
        records = {record.uuid: record for record in await kept(sekha, "Conversations_8")}
        one = records[str(UUID(int=1))]
        assert (one.text, one.properties["tags"]) == ("text 0", '["a","b"]')
        assert str(one.properties["said_at"]).startswith("2026-01-02T03:04:05")


async def test_a_class_is_dropped_only_when_all_of_it_is_here_and_makes_room_for_the_alias(
    weaviate_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_on(weaviate_server, tmp_path, monkeypatch) as sekha, with_a_class(weaviate_server):
        kept_there = await only(sekha, "weaviate", model="hashed-8", drop=True)
        async with foreign_client(weaviate_server) as client:
            await client.collections.use("Conversations").data.delete_by_id(UUID(int=6))

        dropped = await only(sekha, "weaviate", model="hashed-8", drop=True)

        assert (kept_there.dropped, kept_there.in_the_way) == (False, "Conversations")
        assert (dropped.dropped, dropped.there, dropped.in_the_way) == (True, 5, None)
        store = await sekha.resources.store()
        assert await store.alias_target("Conversations") == "Conversations_8"


async def test_classes_of_another_server_come_into_the_store_that_is_configured(
    weaviate_server: Server, sekha: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = weaviate_server
    monkeypatch.setenv("OLD_KEY", at.api_key or "")
    async with empty_store(at), with_a_class(at):
        taken = await only(
            sekha, "weaviate", model="hashed-8", url=at.url, grpc_port=at.grpc_port, api_key_env="OLD_KEY"
        )

    assert taken.imported == 5
    assert taken.in_the_way is None
    assert len(await kept(sekha, "Conversations_8")) == 5


async def test_an_embedded_store_has_no_classes_to_import(sekha: Runtime) -> None:
    with pytest.raises(InvalidRequest, match="name the server to import from"):
        await imported(sekha, "weaviate", model="hashed-8")
