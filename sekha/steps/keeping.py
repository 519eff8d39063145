"""Collections: reading documents, seeing what changed, storing vectors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path

from sekha.documents import Chunk, checked, read_folder, split
from sekha.embedding import EmbedRequest
from sekha.errors import CollectionMissing
from sekha.ingest import Batch, BatchEmbedded, Changes, Chunks, Failure, Indexed, IngestRequest, LeftOut, Stale, Stored
from sekha.resources import Resources
from sekha.vectors.base import AllOf, Compare, Record

__all__ = ["Keeping"]

SOURCES_AT_ONCE = 500
"""Sources counted in one query."""


class Keeping:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def read_documents(self, request: IngestRequest) -> Chunks:
        """Read every document and split it; refuse them all when one cannot be read."""

        def chunks_of_all() -> Chunks:
            size = request.max_document_mb
            left_out: list[tuple[str, str]] | None = [] if request.skip_refused else None
            read = partial(read_folder, home=self._open.loaded.folder, max_document_mb=size, left_out=left_out)
            found = read(Path(request.path)) if request.path else []
            documents = checked([*request.documents, *found], max_document_mb=size, left_out=left_out)
            chunks = tuple(
                chunk
                for document in documents
                for chunk in split(document, size=request.chunk_size, overlap=request.chunk_overlap)
            )
            return Chunks(
                collection=request.collection,
                documents=len(documents),
                chunks=chunks,
                left_out=tuple(LeftOut(source=source, why=why) for source, why in left_out or ()),
            )

        return await asyncio.to_thread(chunks_of_all)

    async def find_changes(self, request: IngestRequest, read: Chunks) -> Changes:
        """Compare the chunks with what is stored, by their UUIDs and content hashes."""
        space = self._open.registry.space(request.collection)
        index = await self._open.indexes.holding(space)
        by_uuid = {chunk.uuid_in(request.collection): chunk for chunk in read.chunks}
        stored = await self._stored(index.name, list(by_uuid))
        changed = tuple(
            chunk for uuid, chunk in by_uuid.items() if stored.get(uuid) != (chunk.content_hash, index.fingerprint)
        )
        size = request.batch_size
        return Changes(
            collection=request.collection,
            space=index.name,
            to_embed=EmbedRequest(
                texts=tuple(space.model.document_prefix + chunk.text for chunk in changed),
                model=space.asked_as,
                max_cost=request.max_cost,
                bulk=True,
                at_once=size,
                tags=request.tags,
            ),
            batches=tuple(
                Batch(number=number, chunks=changed[at : at + size])
                for number, at in enumerate(range(0, len(changed), size))
            ),
            stale=await self._stale(index.name, by_uuid, stored),
            unchanged=len(by_uuid) - len(changed),
        )

    async def upsert_batch(self, changes: Changes, embedded: BatchEmbedded) -> Stored:
        """Keep one batch in the collection for its dimension."""
        space = self._open.registry.space(changes.collection)
        store = await self._open.store()
        index = await self._open.indexes.for_writing(space)
        chunks = embedded.batch.chunks
        records = [
            Record(
                uuid=chunk.uuid_in(changes.collection),
                text=chunk.text,
                vector=vector,
                properties={
                    "source": chunk.source,
                    "chunk": chunk.index,
                    "heading": chunk.heading,
                    "content_hash": chunk.content_hash,
                    "embedding_fingerprint": index.fingerprint,
                    "source_updated_at": chunk.updated_at,
                },
            )
            for chunk, vector in zip(chunks, embedded.vectors, strict=True)
        ]
        refused = await store.upsert(index.name, records)
        self._open.indexes.written(index)
        failures = tuple(
            Failure(source=chunk.source, chunks=1, error=refused[record.uuid])
            for chunk, record in zip(chunks, records, strict=True)
            if record.uuid in refused
        )
        return Stored(number=embedded.batch.number, stored=len(records) - len(failures), refused=failures)

    async def await_indexed(self, changes: Changes, stored: Sequence[Stored]) -> Indexed:  # noqa: ARG002 - they say when
        """Wait until searches find what was stored, or for half a minute."""
        store = await self._open.store()
        return Indexed(waiting=await store.catch_up(changes.space))

    async def remove_stale(self, changes: Changes, indexed: Indexed | None) -> int:  # noqa: ARG002 - it says when
        """Delete the chunks that their documents no longer have, once the new ones are stored and found."""
        store = await self._open.store()
        return sum([await store.delete_where(changes.space, _behind(stale)) for stale in changes.stale])

    async def _stored(self, index: str, uuids: Sequence[str]) -> dict[str, tuple[object, object]]:
        store = await self._open.store()
        found: dict[str, tuple[object, object]] = {}
        for at in range(0, len(uuids), 1000):
            try:
                page = await store.get(index, uuids[at : at + 1000])
            except CollectionMissing:
                return {}
            for uuid, record in page.items():
                properties = record.properties
                found[uuid] = (properties.get("content_hash"), properties.get("embedding_fingerprint"))
        return found

    async def _stale(self, index: str, chunks: Mapping[str, Chunk], stored: Container[str]) -> tuple[Stale, ...]:
        """The sources that have more chunks stored than their documents have now.

        Positions may have gaps where an earlier run failed, so nothing short of counting finds them all.
        """
        ends = {chunk.source: chunk.index + 1 for chunk in chunks.values()}
        there = Counter(chunk.source for uuid, chunk in chunks.items() if uuid in stored)
        store = await self._open.store()

        async def among(sources: Sequence[str]) -> list[Stale]:
            counted = await store.count(index, Compare("source", "in", tuple(sources)))
            if counted == sum(there[source] for source in sources):
                return []
            if len(sources) == 1:
                return [Stale(source=sources[0], first=ends[sources[0]])]
            half = len(sources) // 2
            return [*await among(sources[:half]), *await among(sources[half:])]

        sources = list(ends)
        try:
            pages = [await among(sources[at : at + SOURCES_AT_ONCE]) for at in range(0, len(sources), SOURCES_AT_ONCE)]
        except CollectionMissing:
            return ()
        return tuple(stale for page in pages for stale in page)


def _behind(stale: Stale) -> AllOf:
    return AllOf((Compare("source", "eq", stale.source), Compare("chunk", "ge", stale.first)))
