"""Search a collection, with every step on the record."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from sekha.search import Found, SearchRequest, SearchSteps
from sekha.search import search as search_in_order
from tasks.embedding import EMBEDDING
from tasks.receipts import with_receipt
from tasks.resources import opened
from tasks.results import RESULT
from tasks.searching import find_spaces, merge_found, search_space
from tasks.whole import given_whole

__all__ = ["STEPS", "search"]

STEPS = given_whole(
    SearchSteps(
        find_spaces=find_spaces,
        embedding=EMBEDDING,
        look_up=search_space,
        merge=merge_found,
    )
)


def run_name() -> str:
    """The collection that is searched; never the question."""
    request: SearchRequest = flow_run.parameters["request"]
    return f"in {request.collection}"


@flow(name="search", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def search(request: SearchRequest, config: str | None = None) -> Found:
    """Ask every space of a collection, each under its own model, and merge what they found."""
    async with opened(config):
        return await with_receipt(search_in_order(request, STEPS))
