"""The deployments on a real server: registered, started over Prefect's own API, run by a worker, read back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from sekha.chat import Reply
from sekha.errors import PrefectUnavailable
from sekha.stack import deploy, require_server
from tests.fixtures.prefect import Server

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def deployments(prefect: Server) -> dict[str, dict[str, Any]]:
    found = (await prefect.ask("POST", "/deployments/filter", {})).json()
    return {each["name"]: each for each in found}


@pytest.mark.prefect
async def test_deploying_twice_is_deploying_once(prefect: Server) -> None:
    await deploy(prefect.local.environment)
    once = await deployments(prefect)

    await deploy(prefect.local.environment)
    twice = await deployments(prefect)

    assert set(once) == {"backup", "chat", "doctor", "importing", "ingest", "retention", "search"}
    assert {name: each["id"] for name, each in twice.items()} == {name: each["id"] for name, each in once.items()}
    assert {each["entrypoint"] for each in twice.values()} == {f"flows.{name}:{name}" for name in twice}
    assert {each["work_pool_name"] for each in twice.values()} == {"sekha"}
    assert [schedule["active"] for schedule in twice["ingest"]["schedules"]] == [False]
    assert [schedule["active"] for schedule in twice["doctor"]["schedules"]] == [False]
    assert [schedule["active"] for schedule in twice["backup"]["schedules"]] == [False]
    assert [schedule["active"] for schedule in twice["retention"]["schedules"]] == [True]


async def scheduled(prefect: Server, name: str) -> list[dict[str, Any]]:
    deployment = (await deployments(prefect))[name]
    wanted = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    return list((await prefect.ask("POST", "/flow_runs/filter", {"flow_runs": wanted})).json())


@pytest.mark.prefect
async def test_prefect_makes_runs_of_a_schedule_that_is_on_and_of_no_other(prefect: Server) -> None:
    await deploy(prefect.local.environment)

    async with asyncio.timeout(90):
        while not (runs := await scheduled(prefect, "retention")):  # noqa: ASYNC110 - a server tells nobody
            await asyncio.sleep(0.5)

    assert {run["expected_start_time"][11:16] for run in runs} == {"03:30"}
    assert [await scheduled(prefect, name) for name in ("backup", "doctor", "ingest")] == [[], [], []]


@pytest.mark.prefect
@pytest.mark.timeout(180)
async def test_a_run_started_over_the_api_is_run_by_a_worker_and_read_back(
    prefect: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await deploy(prefect.local.environment)
    chat = (await deployments(prefect))["chat"]
    await prefect.local.worker()

    started = await prefect.ask(
        "POST", f"/deployments/{chat['id']}/create_flow_run", {"parameters": {"request": HELLO}}
    )
    run_id = started.json()["id"]
    run = await ended(prefect, run_id)

    async with get_client() as client:
        state = (await client.read_flow_run(run_id)).state
    assert state is not None
    reply = await state.aresult()
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert isinstance(reply, Reply)
    assert (reply.provider_id, reply.model_id) == ("builtin", "echo")
    assert "Hello" in reply.text
    assert (tmp_path / ".sekha" / "ledger.db").exists(), "a run keeps its things where the worker was started"


@pytest.mark.prefect
@pytest.mark.parametrize(
    "parameters",
    [{}, {"request": {"messages": "Hello"}}, {"request": {**HELLO, "max_tokens": "many"}}],
)
async def test_wrong_parameters_are_refused_before_anything_runs(prefect: Server, parameters: dict[str, Any]) -> None:
    await deploy(prefect.local.environment)
    chat = (await deployments(prefect))["chat"]
    before = len(await prefect.runs("chat"))

    answer = await prefect.ask("POST", f"/deployments/{chat['id']}/create_flow_run", {"parameters": parameters})

    assert answer.status_code in {409, 422}
    assert len(await prefect.runs("chat")) == before


async def ended(prefect: Server, run_id: str) -> dict[str, Any]:
    while True:
        run: dict[str, Any] = (await prefect.ask("GET", f"/flow_runs/{run_id}")).json()
        if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            return run
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/api"])
async def test_without_a_server_it_is_said_at_once_how_to_start_one(url: str | None) -> None:
    with pytest.raises(PrefectUnavailable, match="sekha up"):
        await require_server(url)
    with pytest.raises(PrefectUnavailable, match="sekha up"):
        await deploy({"PREFECT_API_URL": url} if url else {})
