"""What people see of a gateway's requests: flow runs in Prefect's own UI, in a real browser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import pytest

from sekha.testing import StandIn
from tests.fixtures.prefect import Server
from tests.fixtures.process import Gate, Serves

# A browser may have to be asked more than once.
pytestmark = [pytest.mark.prefect, pytest.mark.timeout(400)]

Reads: TypeAlias = Callable[..., str]

CONFIG = """
providers:
  - id: first
    provider_type: openai
    base_url: {first}
    api_key: ${{FIRST_KEY}}
    priority: 1
    models: [{{model_id: chat, task: chat_small, price: {{input_per_million: 10, output_per_million: 20}}}}]
  - id: second
    provider_type: openai
    base_url: {second}
    priority: 2
    models:
      - {{model_id: chat, task: chat_small, price: {{input_per_million: 10, output_per_million: 20}}}}
      - {{model_id: dear, task: chat_smart, price: {{input_per_million: 1000, output_per_million: 2000}}}}
budgets:
  - {{name: tight, limit: 0.000001, match: {{model: dear}}}}
"""
STEPS = ("estimate_cost", "select_provider", "reserve_budget", "call_provider", "settle_cost")
JOINED = ["estimate_cost, select_provider, reserve_budget", "call_provider", "settle_cost"]
KEY = "sk-ui-0123456789abcdef"
SECRET = f"zanzibar{uuid4().hex}"


@pytest.fixture
async def standins() -> AsyncIterator[tuple[StandIn, StandIn]]:
    async with StandIn() as first, StandIn() as second:
        yield first, second


@dataclass(frozen=True)
class Shown:
    """What Prefect has of one request."""

    run: dict[str, Any]
    steps: list[dict[str, Any]]
    drawn: set[tuple[str, str]]
    """The arrows of its graph, which the UI draws on a canvas that cannot be read."""

    @property
    def names(self) -> list[str]:
        return [step["name"] for step in self.steps]


async def shown(prefect: Server, name: str, *, among: int = 1) -> Shown:
    """The run of that name with the fewest task runs, once so many are there."""
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_DESC"}
    async with asyncio.timeout(60):
        while len(found := (await prefect.ask("POST", "/flow_runs/filter", body)).json()) < among:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    return min([await _shown(prefect, run) for run in found], key=lambda each: len(each.steps))


async def _shown(prefect: Server, run: dict[str, Any]) -> Shown:
    nodes = (await prefect.ask("GET", f"/flow_runs/{run['id']}/graph-v2")).json()["nodes"]
    labels = {node["id"]: node["label"] for _, node in nodes}
    drawn = {(labels[parent["id"]], node["label"]) for _, node in nodes for parent in node["parents"]}
    return Shown(run, await prefect.steps(run["id"], ended=0), drawn)


async def asked(gate: Gate, model: str) -> int:
    answer = await gate.chat(f"What of {SECRET}?", model=model, max_tokens=5)
    return answer.status_code


async def test_an_answer_a_fallback_and_a_refusal_are_shown_and_no_prompt_is(
    prefect: Server, standins: tuple[StandIn, StandIn], serving: Serves, read_page: Reads, tmp_path: Path
) -> None:
    first, second = standins
    config = CONFIG.format(first=first.openai_url, second=second.openai_url)
    async with serving(config, environment={**prefect.local.environment, "FIRST_KEY": KEY}) as gate:
        # On a busy machine one step or another takes its time, and is shown by itself.
        statuses = [await asked(gate, "chat") for _ in range(10)]
        first.fail(401)
        statuses.append(await asked(gate, "chat"))
        statuses.append(await asked(gate, "dear"))
        answered = await shown(prefect, "chat → first/chat", among=10)
        fell_back = await shown(prefect, "chat → second/chat")
        refused = await shown(prefect, "dear → budget_exceeded")
    url = f"{prefect.local.ui_url}/%sruns/flow-run/%s?tab=%s"
    pages = {
        each.run["name"]: (
            read_page(url % ("", each.run["id"], "Parameters"), "messages"),
            read_page(url % ("v2/", each.run["id"], "TaskRuns"), *steps),
        )
        for each, steps in ((answered, STEPS), (fell_back, STEPS), (refused, STEPS[:2]))
    }

    assert statuses == [200] * 11 + [402]
    assert answered.names == JOINED
    assert answered.drawn == {(JOINED[0], JOINED[1]), (JOINED[0], JOINED[2]), (JOINED[1], JOINED[2])}
    for each, state, tags, steps in (
        (answered, "Completed", ("provider:first", "model:chat", "task:chat_small"), STEPS),
        (fell_back, "Completed", ("provider:second", "model:chat", "task:chat_small", "fallback"), STEPS),
        (refused, "Refused", ("refused",), STEPS[:2]),
    ):
        page, listed = pages[each.run["name"]]
        assert each.run["name"] in page
        assert state in page
        assert [tag for tag in ("sekha:gateway", *tags) if tag not in page] == []
        assert f"{len(each.steps)} Task runs" in page
        assert '"messages" : 1 ,' in page
        assert [step for step in steps if step not in listed] == []
        assert ", ".join(each.names) == ", ".join(steps)
        assert set(pairwise(each.names)) <= each.drawn
        assert SECRET not in page + listed
    assert "first/chat (provider_auth_failed)" in fell_back.run["state"]["message"]
    assert "tight" in refused.run["state"]["message"]
    assert holding(SECRET, prefect.home, tmp_path) == []


def holding(secret: str, *folders: Path) -> list[str]:
    """The files in which a secret can be found."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path.name for path in files if secret.encode() in path.read_bytes()]
