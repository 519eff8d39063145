"""Answer a request, with every step on the record."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from sekha.chat import ChatRequest, ChatSteps, Reply, answer
from tasks.calls import call_provider
from tasks.money import estimate_cost, reserve_budget, select_provider, settle_cost
from tasks.receipts import with_receipt
from tasks.resources import opened
from tasks.results import RESULT
from tasks.whole import given_whole

__all__ = ["STEPS", "chat"]

STEPS = given_whole(
    ChatSteps(
        estimate=estimate_cost,
        select=select_provider,
        reserve=reserve_budget,
        call=call_provider,
        settle=settle_cost,
    )
)


def run_name() -> str:
    """The model that was asked for: what tells runs apart in Prefect's list, without a prompt."""
    request: ChatRequest = flow_run.parameters["request"]
    return request.preferred_model or request.model or request.task or "auto"


@flow(name="chat", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def chat(request: ChatRequest, config: str | None = None) -> Reply:
    """Answer one request: estimate, select, reserve, call, settle."""
    async with opened(config):
        return await with_receipt(answer(request, STEPS))
