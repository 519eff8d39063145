"""Answer a request, with every step on the record."""

from __future__ import annotations

from prefect import flow

from sekha.chat import ChatRequest, ChatSteps, Reply, answer
from tasks.calls import call_provider
from tasks.money import estimate_cost, reserve_budget, select_provider, settle_cost
from tasks.resources import opened

__all__ = ["STEPS", "chat"]

STEPS = ChatSteps(
    estimate=estimate_cost,
    select=select_provider,
    reserve=reserve_budget,
    call=call_provider,
    settle=settle_cost,
)


@flow(name="chat", persist_result=True, result_serializer="json")
async def chat(request: ChatRequest, config: str | None = None) -> Reply:
    """Answer one request: estimate, select, reserve, call, settle."""
    async with opened(config):
        return await answer(request, STEPS)
