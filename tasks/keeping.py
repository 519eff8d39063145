"""Collections: reading documents, seeing what changed, storing vectors."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from sekha.ingest import BatchEmbedded, Changes, Chunks, Indexed, IngestRequest, Stored
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = ["await_indexed", "find_changes", "read_documents", "remove_stale", "upsert_batch"]


@task(cache_policy=NO_CACHE)
async def read_documents(request: IngestRequest) -> Chunks:
    """Read every document and split it; refuse them all when one cannot be read."""
    return await runtime().keeping.read_documents(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def find_changes(request: IngestRequest, chunks: Chunks) -> Changes:
    """Compare the chunks with what is stored, by their UUIDs and content hashes."""
    return await runtime().keeping.find_changes(request, chunks)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def upsert_batch(changes: Changes, embedded: BatchEmbedded) -> Stored:
    """Keep one batch in the collection for its dimension."""
    return await runtime().keeping.upsert_batch(changes, embedded)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def await_indexed(changes: Changes, stored: Sequence[Stored]) -> Indexed:
    """Wait until searches find what was stored, or for half a minute."""
    return await runtime().keeping.await_indexed(changes, stored)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def remove_stale(changes: Changes, indexed: Indexed | None) -> int:
    """Delete the chunks that their documents no longer have."""
    return await runtime().keeping.remove_stale(changes, indexed)
