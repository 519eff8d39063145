"""Weaviate servers that are killed in the middle of writing and searching: one alone, and one of three."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from sekha.documents import Document
from sekha.errors import StoreUnavailable
from sekha.loading import load
from sekha.resources import Resources
from sekha.runtime import Runtime
from sekha.vectors.base import Collection, Record
from sekha.vectors.weaviate import Consistency, WeaviateStore
from tests.fixtures.weaviate import WeaviateServer, cluster, weaviate_section

DIMENSION = 64
DOCS = Collection(f"Docs_{DIMENSION}", DIMENSION, "hash:64")
ALL = 4000
BATCH = 100
PATIENCE_SECONDS = 3.0
WRITING_SECONDS = 20.0
"""What a busy machine needs for three copies of a batch while one of the nodes starts."""
VECTORS = np.random.default_rng(7).standard_normal((ALL, DIMENSION)).astype(np.float32)


def uuid(number: int) -> str:
    return str(UUID(int=number << 96 | number))


def batch(start: int) -> list[Record]:
    return [Record(uuid(number), "text", VECTORS[number], {}) for number in range(start, start + BATCH)]


@asynccontextmanager
async def opened(
    server: WeaviateServer,
    *,
    replication: int = 1,
    consistency: Consistency = "quorum",
    patience_seconds: float = PATIENCE_SECONDS,
) -> AsyncIterator[WeaviateStore]:
    at = server.at
    async with await WeaviateStore.open(
        at.url,
        grpc_port=at.grpc_port,
        api_key=at.api_key,
        replication=replication,
        consistency=consistency,
        query_seconds=patience_seconds,
        insert_seconds=patience_seconds,
    ) as store:
        yield store


@dataclass
class Storm:
    """An ingest that goes on where it failed, and searches for what was in the store before it began."""

    writer: WeaviateStore
    reader: WeaviateStore
    acknowledged: int = 0
    searches: int = 0
    failed_writes: list[StoreUnavailable] = field(default_factory=list)
    failed_searches: list[StoreUnavailable] = field(default_factory=list)
    slowest_failure: float = 0.0
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def begin(self) -> None:
        await self.writer.ensure_collection(DOCS)
        assert await self.writer.upsert(DOCS.name, batch(0)) == {}
        assert await self.writer.catch_up(DOCS.name) == 0
        self.acknowledged = BATCH

    async def write(self) -> None:
        while self.acknowledged < ALL:
            try:
                refused = await self.writer.upsert(DOCS.name, batch(self.acknowledged))
            except StoreUnavailable as error:
                self.failed_writes.append(error)
                continue
            assert refused == {}
            async with self.progress:
                self.acknowledged += BATCH
                self.progress.notify_all()

    async def search(self) -> None:
        """Until it is cancelled."""
        while True:
            wanted = self.searches % BATCH
            began = time.monotonic()
            try:
                hits = await self.reader.search(DOCS.name, VECTORS[wanted], 1)
            except StoreUnavailable as error:
                self.failed_searches.append(error)
                self.slowest_failure = max(self.slowest_failure, time.monotonic() - began)
                continue
            assert [hit.uuid for hit in hits] == [uuid(wanted)]
            async with self.progress:
                self.searches += 1
                self.progress.notify_all()

    async def reach(self, *, acknowledged: int = 0, searches: int = 0) -> None:
        async with self.progress:
            await self.progress.wait_for(lambda: self.acknowledged >= acknowledged and self.searches >= searches)


async def assert_all_are_there(store: WeaviateStore) -> None:
    """Each record with its vector, and found by it."""
    assert await store.catch_up(DOCS.name) == 0
    assert await store.count(DOCS.name) == ALL
    read = await store.get(DOCS.name, [uuid(number) for number in range(ALL)], vectors=True)
    assert len(read) == ALL
    assert all(record.vector is not None for record in read.values())
    lost = []
    for number in range(ALL):
        hits = await store.search(DOCS.name, VECTORS[number], 1)
        if [hit.uuid for hit in hits] != [uuid(number)]:
            lost.append(number)
    assert lost == []


async def given_all(node: WeaviateStore) -> None:
    """What was written while a node was away, it is given behind the scenes, and says nothing of it."""
    async with asyncio.timeout(60):
        while True:
            if await node.count(DOCS.name) == ALL:
                return
            await asyncio.sleep(0.2)


@pytest.fixture
def server(weaviate_program: Path, tmp_path: Path) -> Iterator[WeaviateServer]:
    started = WeaviateServer.private(weaviate_program, tmp_path, {"ASYNC_INDEXING": "true"})
    try:
        started.start()
        yield started
    finally:
        started.kill()


async def test_what_is_indexed_behind_the_answer_is_found_once_the_store_has_caught_up(server: WeaviateServer) -> None:
    async with opened(server) as store:
        await store.ensure_collection(DOCS)
        assert await store.upsert(DOCS.name, batch(0)) == {}

        at_once = await store.catch_up(DOCS.name, seconds=0)
        in_time = await store.catch_up(DOCS.name)

        assert at_once == BATCH
        assert in_time == 0
        assert [hit.uuid for hit in await store.search(DOCS.name, VECTORS[7], 1)] == [uuid(7)]


async def test_an_ingest_ends_when_what_it_kept_is_found(
    server: WeaviateServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVIATE_KEY", server.at.api_key or "")
    providers = """
providers:
  - id: builtin
    provider_type: builtin
    models: [{model_id: hashed-512, task: embedding, dimension: 512}]
"""
    (tmp_path / "sekha.yaml").write_text(providers + weaviate_section(server.at), "utf-8")
    texts = [f"Paragraph {number} says {number * 7919} and {number * 104_729}." for number in range(ALL)]

    async with Runtime(Resources(load(tmp_path / "sekha.yaml"))) as sekha:
        await sekha.ingest([Document(source=f"{n}.md", text=text) for n, text in enumerate(texts)])
        asked = [texts[number] for number in (0, ALL // 2, ALL - 1)]
        found = [(await sekha.search(text, limit=1)).hits for text in asked]

    assert [hits[0].text for hits in found] == asked


async def test_a_server_killed_in_an_ingest_and_in_searches_loses_nothing_acknowledged(server: WeaviateServer) -> None:
    async with opened(server) as store:
        storm = Storm(store, store)
        await storm.begin()

        async with asyncio.TaskGroup() as group:
            writing = group.create_task(storm.write())
            searching = group.create_task(storm.search())
            await storm.reach(acknowledged=ALL // 2, searches=100)
            server.kill()
            before = storm.searches
            await asyncio.to_thread(server.start)
            await storm.reach(searches=before + 100)
            await writing
            searching.cancel()

        assert storm.failed_writes
        assert storm.failed_searches
        assert all(error.retryable for error in [*storm.failed_writes, *storm.failed_searches])
        assert all(server.at.url in error.message for error in storm.failed_searches)
        assert storm.slowest_failure < PATIENCE_SECONDS + 1
        await assert_all_are_there(store)


@pytest.fixture
def nodes(weaviate_program: Path, tmp_path: Path) -> Iterator[list[WeaviateServer]]:
    servers = cluster(weaviate_program, tmp_path)
    try:
        for node in servers:
            node.launch()
        for node in servers:
            node.await_ready()
        yield servers
    finally:
        for node in servers:
            node.kill()


@pytest.mark.timeout(180)
async def test_one_of_three_nodes_killed_and_started_again_is_not_noticed(nodes: list[WeaviateServer]) -> None:
    async with AsyncExitStack() as stack:
        # The searches have no more time than anywhere else.
        writer, reader = [
            await stack.enter_async_context(
                opened(node, replication=3, consistency="quorum", patience_seconds=patience)
            )
            for node, patience in zip(nodes, (WRITING_SECONDS, PATIENCE_SECONDS), strict=False)
        ]
        storm = Storm(writer, reader)
        await storm.begin()

        async with asyncio.TaskGroup() as group:
            writing = group.create_task(storm.write())
            searching = group.create_task(storm.search())
            await storm.reach(acknowledged=ALL // 4, searches=100)
            nodes[2].kill()
            before = storm.searches
            await storm.reach(acknowledged=ALL // 2, searches=before + 200)
            await asyncio.to_thread(nodes[2].start)
            before = storm.searches
            await writing
            await storm.reach(searches=before + 100)
            searching.cancel()

        assert storm.failed_searches == []
        assert storm.failed_writes == []
        for node in nodes:
            alone = await stack.enter_async_context(opened(node, replication=3, consistency="one"))
            await given_all(alone)
        await assert_all_are_there(reader)
