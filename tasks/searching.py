"""Searching: which spaces can be asked, what each finds, and the one list that comes of it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from sekha.embedding import Embedded
from sekha.search import Answer, Asked, Found, LeftOut, Question, SearchRequest
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = ["find_spaces", "merge_found", "search_space"]


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def find_spaces(request: SearchRequest) -> Asked:
    """Phrase the question for the model of each space that the collection has."""
    return await runtime().searching.find_spaces(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def search_space(request: SearchRequest, question: Question, embedded: Embedded) -> Answer:
    """Look up what is nearest to the question in one space, and what has its words."""
    return await runtime().searching.search_space(request, question, embedded)


@task(cache_policy=NO_CACHE)
async def merge_found(request: SearchRequest, asked: Asked, answers: Sequence[Answer | LeftOut]) -> Found:
    """One list out of what the spaces found, and one bill."""
    return await runtime().searching.merge_found(request, asked, answers)
