"""Collections: reading documents, seeing what changed, storing vectors, searching them."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from sekha.embedding import Embedded, EmbedRequest
from sekha.ingest import BatchEmbedded, Changes, Chunks, IngestRequest, Stored
from sekha.search import Found, SearchRequest
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = ["find_changes", "prepare_query", "read_documents", "remove_stale", "search_space", "upsert_batch"]


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
async def remove_stale(changes: Changes, stored: Sequence[Stored]) -> int:
    """Delete the chunks that their documents no longer have."""
    return await runtime().keeping.remove_stale(changes, stored)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def prepare_query(request: SearchRequest) -> EmbedRequest:
    """Phrase the question for the model under which the collection is read."""
    return await runtime().keeping.prepare_query(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def search_space(request: SearchRequest, embedded: Embedded) -> Found:
    """Look up the nearest neighbours of the question in its space."""
    return await runtime().keeping.search_space(request, embedded)
