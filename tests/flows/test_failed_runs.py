"""What is kept of requests that failed: who was asked and what it cost, and no word of the request or a provider."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.chat import chat
from sekha.chat import ChatRequest
from sekha.errors import ProviderError
from sekha.testing import StandIn
from tasks.parting import tell_prefect_the_rest
from tests.fixtures.prefect import Server
from tests.fixtures.process import Gate, Serves

pytestmark = [pytest.mark.prefect, pytest.mark.timeout(200)]

CONFIG = """
providers:
  - id: quoting
    provider_type: openai
    base_url: {url}
    timeout_secs: 3
    models:
      - {{model_id: chat, task: chat_small, price: {{input_per_million: 10, output_per_million: 20}}}}
      - {{model_id: vectors, task: embedding, dimension: 8, price: {{input_per_million: 10}}}}
routing:
  circuit_breaker: {{failure_threshold: 3, timeout_secs: 1}}
recording: {{content: {content}}}
"""
PROMPT = "Please read this letter. The patient {} is ill, and lives at 12 Elm Street."
"""Far more before what is quoted than anybody would look for it by its beginning."""
MARKS = {
    name: f"zanzibar{name}q7x"
    for name in ("prompt", "stop", "tool", "text", "stream", "body", "garbage", "name", "limit", "event")
}


async def ask(gate: Gate, standin: StandIn) -> list[str]:
    """Have the provider quote each part of a request in each way that it can; gives what the caller was told."""
    told = []
    tool = {"type": "function", "function": {"name": MARKS["tool"], "parameters": {"type": "object"}}}

    async def chat_with(mark: str, **fields: Any) -> None:
        told.append((await gate.chat(PROMPT.format(MARKS[mark]), model="chat", **fields)).text)

    for status in (400, 401, 429, 500):
        for mark, fields in (("prompt", {}), ("stop", {"stop": [MARKS["stop"]]}), ("tool", {"tools": [tool]})):
            standin.heal()
            standin.fail(status, message=f"Cannot take it near '{MARKS[mark]} is'", times=None)
            await chat_with(mark, **fields)
            # The circuit is open by now, as one of the errors that are quoted opened it.
            await asyncio.sleep(1.1 if status in (401, 500) else 0)
        standin.heal()
        standin.fail(status, message=f"bad input: '{MARKS['text']}'", times=None)
        body = {"input": f"the salary of {MARKS['text']} is high", "model": "vectors"}
        told.append((await gate.http.post("/v1/embeddings", json=body)).text)
        await asyncio.sleep(1.1 if status in (401, 500) else 0)
    standin.heal()
    standin.fail_within(f"Moderated: '{MARKS['stream']}'")
    await chat_with("stream", stream=True)
    standin.garbage()
    await chat_with("garbage")
    await asyncio.sleep(1.1)
    standin.mumble()
    await chat_with("garbage", stream=True)
    await asyncio.sleep(1.1)
    body = {"messages": [{"role": "user", "content": "Hello."}], "model": f"What of {MARKS['name']}?"}
    told.append((await gate.http.post("/v1/chat/completions", json=body)).text)
    await chat_with("limit", max_tokens=MARKS["limit"])
    await chat_with("body", metadata={"team": [MARKS["body"]]})
    return told


async def recorded(prefect: Server, error: str, said: str = "") -> str:
    """What the states of the runs say that ended with this error, once one says this."""
    names = {"flow_runs": {"tags": {"all_": ["sekha:gateway"]}}, "sort": "START_TIME_DESC", "limit": 100}
    async with asyncio.timeout(60):
        while True:
            runs = (await prefect.ask("POST", "/flow_runs/filter", names)).json()
            states = "\n".join(str(run["state"]["message"]) for run in runs if run["name"].endswith(f"→ {error}"))
            if states and said in states:
                return states
            await asyncio.sleep(0.3)


def holding(words: list[str], *folders: Path) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                kept = path.read_bytes()
                yield from ((word, path.name) for word in words if word.encode() in kept)


async def test_what_providers_quote_of_requests_is_told_to_the_caller_and_kept_nowhere(
    prefect: Server, serving: Serves, tmp_path: Path
) -> None:
    async with (
        StandIn(dimension=8) as standin,
        serving(
            CONFIG.format(url=standin.openai_url, content="false"),
            environment=prefect.local.environment,
        ) as gate,
    ):
        told = await ask(gate, standin)
        refused = await recorded(prefect, "model_not_found")
        metrics = (await gate.http.get("/metrics")).text
        health = (await gate.http.get("/api/v1/health/providers")).text
        rejected = await recorded(prefect, "provider_rejected")
        unspooled = list(holding(list(MARKS.values()), tmp_path))

    heard = "".join(told)
    assert [name for name in ("prompt", "stop", "tool", "text", "stream") if MARKS[name] not in heard] == []
    log = "\n".join(gate.lines)
    assert '"error":"provider_rejected"' in log
    assert '"error":"stream_broken"' in log
    assert "is unavailable: HTTP 500" in log, "what is known in our own words is logged"
    assert [mark for mark in MARKS.values() if mark in log + metrics + health] == []
    assert "model_not_found: It names what is not configured." in refused
    assert "provider_rejected: Provider 'quoting', model 'chat', rejects the request: HTTP 400." in rejected
    assert unspooled == []
    assert list(holding(list(MARKS.values()), tmp_path, prefect.home)) == []


async def test_with_content_the_record_says_what_the_provider_said(prefect: Server, serving: Serves) -> None:
    async with (
        StandIn(dimension=8) as standin,
        serving(CONFIG.format(url=standin.openai_url, content="true"), environment=prefect.local.environment) as gate,
    ):
        standin.fail(400, message="Near 'lives at 12 Elm': no.", times=None)
        await gate.chat(PROMPT.format("Jane"), model="chat", metadata={"team": "wanted"})
        await recorded(prefect, "provider_rejected", "Near 'lives at 12 Elm': no.")

    assert "Elm" not in "\n".join(gate.lines), "a log never does"


async def test_a_run_that_failed_is_found_by_its_provider_and_says_what_it_cost(
    prefect: Server, serving: Serves
) -> None:
    async with StandIn(dimension=8) as standin:
        config = CONFIG.format(url=standin.openai_url, content="false")
        async with serving(config, environment=prefect.local.environment) as gate:
            standin.hang(times=None)
            asking = asyncio.create_task(gate.chat(model="chat", metadata={"team": "blue"}))
            await standin.arrived.wait()
            asking.cancel()
            answer = await gate.chat(model="chat", metadata={"team": "blue"})
            timed_out = await recorded(prefect, "provider_timeout", "Cost $")
            left = await recorded(prefect, "client_left", "Cost $")
            tags = ["provider:quoting", "model:chat", "task:chat_small", "team:blue"]
            body = {"flow_runs": {"tags": {"all_": tags}}}
            runs = (await prefect.ask("POST", "/flow_runs/filter", body)).json()

    assert answer.status_code == 504
    assert "did not answer in time" in timed_out
    assert "The client left. Cost $" in left
    assert {run["state_name"] for run in runs} == {"Failed", "Cancelled"}


async def test_a_failed_flow_run_keeps_our_words_and_not_the_providers(prefect: Server, tmp_path: Path) -> None:
    quoted = "zanzibarflowq7x"
    file = tmp_path / "sekha.yaml"
    async with StandIn() as standin:
        standin.fail(400, message=f"Near '{quoted}': no.", times=None)
        file.write_text(CONFIG.format(url=standin.openai_url, content="false"))
        request = ChatRequest(messages=({"role": "user", "content": "Hello."},), model="chat")

        with pytest.raises(ProviderError) as caught:
            await chat(request, config=str(file))
        await tell_prefect_the_rest()
        run = (await prefect.runs("chat"))[0]
        logs = (await prefect.ask("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})).text

    assert quoted in caught.value.told, "whoever called is told"
    assert "rejects the request: HTTP 400" in run["state"]["message"]
    assert "rejects the request: HTTP 400" in json.dumps(logs)
    assert {"provider:quoting", "model:chat"} <= set(run["tags"])
    assert "| Cost | $0 |" in await prefect.receipt(run["id"])
    assert list(holding([quoted], tmp_path, prefect.home)) == []
