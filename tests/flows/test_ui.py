"""What people see: a flow run in Prefect's own UI, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from flows.chat import chat
from sekha.chat import ChatRequest
from sekha.testing import StandIn
from tests.fixtures.prefect import Server

# A browser may have to be asked more than once.
pytestmark = [pytest.mark.prefect, pytest.mark.timeout(330)]

Writes: TypeAlias = Callable[..., str]
Reads: TypeAlias = Callable[..., str]

FALLS_BACK = """
providers:
  - id: away
    provider_type: openai
    base_url: {url}
    api_key: ${{AWAY_KEY}}
    priority: 1
    models: [{{model_id: gpt-4o-mini, task: chat_small}}]
  - id: builtin
    provider_type: builtin
    models: [{{model_id: echo, task: chat_small}}]
"""
STEPS = ("estimate_cost", "select_provider", "reserve_budget", "call_provider", "settle_cost")


async def test_a_chat_that_fell_back_is_shown_with_its_steps_and_tags_and_without_its_prompt(
    prefect: Server, config: Writes, standin: StandIn, read_page: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWAY_KEY", "sk-ui-0123456789abcdef")
    standin.fail(status=401, times=9)
    request = ChatRequest(messages=({"role": "user", "content": "the plan for Zanzibar"},))

    await chat(request, config(FALLS_BACK.format(url=standin.openai_url)))
    run = (await prefect.runs("chat"))[0]
    await prefect.steps(run["id"], ended=len(STEPS))
    page = read_page(f"{prefect.local.ui_url}/runs/flow-run/{run['id']}", *STEPS)

    assert "Completed" in page
    assert f"{len(STEPS)} Task runs" in page
    assert [step for step in STEPS if step not in page] == []
    assert "provider:builtin" in page
    assert "Zanzibar" not in page
    assert "sk-ui" not in page
