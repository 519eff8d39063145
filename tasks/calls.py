"""Asking providers: one answer, or vectors for many texts."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest
from sekha.ingest import Batch, BatchEmbedded
from sekha.ledger import Hold
from sekha.routing import Plan
from tasks.resources import runtime

__all__ = ["call_provider", "embed_batch", "embed_texts"]


# A call to an LLM is no pure function, and prompts do not belong in cache keys.
@task(cache_policy=NO_CACHE)
async def call_provider(request: ChatRequest, plan: Plan, hold: Hold) -> Reply:
    """Ask the candidates in turn, with retries, until one answers."""
    return await runtime().chat_calls.call_provider(request, plan, hold)


@task(cache_policy=NO_CACHE)
async def embed_texts(request: EmbedRequest, plan: Plan, hold: Hold) -> Embedded:
    """Embed the texts at the first candidate that answers."""
    return await runtime().embed_calls.embed_texts(request, plan, hold)


@task(cache_policy=NO_CACHE)
async def embed_batch(batch: Batch, plan: Plan, hold: Hold) -> BatchEmbedded:
    """Embed one batch of an ingest, and charge it."""
    return await runtime().embed_calls.embed_batch(batch, plan, hold)
