"""What it may cost, who may be asked, what is held and what was spent."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest
from sekha.ledger import Hold
from sekha.routing import Estimates, Plan
from tasks.resources import runtime

__all__ = ["estimate_cost", "reserve_budget", "select_provider", "settle_cost"]


@task(cache_policy=NO_CACHE)
async def estimate_cost(request: ChatRequest | EmbedRequest) -> Estimates:
    """Count the request's tokens and price it at every model that it may mean."""
    return await runtime().money.estimate_cost(request)


@task(cache_policy=NO_CACHE)
async def select_provider(request: ChatRequest | EmbedRequest, estimates: Estimates) -> Plan:
    """Choose who is asked, in which order, and note why the others are not."""
    return await runtime().money.select_provider(request, estimates)


@task(cache_policy=NO_CACHE)
async def reserve_budget(plan: Plan) -> Hold:
    """Hold the worst case against every budget that the calls may count against."""
    return await runtime().money.reserve_budget(plan)


@task(cache_policy=NO_CACHE)
async def settle_cost(hold: Hold, outcome: Reply | Embedded | None) -> None:
    """Record what the call cost, and free what is left of the hold."""
    await runtime().money.settle_cost(hold, outcome)
