"""Retention on a real server: what goes, what stays, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import pytest
import yaml

from flows.retention import retention
from sekha.calling import Attempt
from sekha.recording.prefect_database import DatabaseSink
from sekha.recording.prefect_sqlite import SqliteTables
from sekha.recording.run import Run, new_run_id
from sekha.stack import deployment_file
from sekha.trace import Step
from tests.fixtures.prefect import Server

pytestmark = pytest.mark.prefect

Records: TypeAlias = Callable[..., list[str]]
Writes: TypeAlias = Callable[..., str]

DAY = timedelta(days=1).total_seconds()
FELL_BACK = (
    Attempt(provider_id="openai", model_id="gpt-5-mini", seconds=0.1, error="rate_limited"),
    Attempt(provider_id="anthropic", model_id="claude", seconds=0.2),
)


@pytest.fixture
def record(prefect: Server) -> Iterator[Records]:
    """Record requests that ended so many days ago, as a gateway's publisher does."""
    sink = DatabaseSink(SqliteTables(prefect.home / "prefect.db"), None)

    def recorded(*days_ago: float) -> list[str]:
        runs = [
            Run(
                id=new_run_id(),
                flow="chat",
                name="chat → anthropic/claude",
                started_at=time.time() - days * DAY - 1,
                ended_at=time.time() - days * DAY,
                outcome="fallback",
                steps=(Step("call_provider", (), 1.0, 1.5),),
                clock_offset=time.time() - days * DAY - 2,
                provider_id="anthropic",
                model_id="claude",
                attempts=FELL_BACK,
            )
            for days in days_ago
        ]
        sink.publish(runs)
        return [run.id for run in runs]

    yield recorded
    sink.close()


async def engine_run(prefect: Server, *tags: str, flow: str = "chat") -> str:
    """A run that was no request of a gateway, and ended now."""
    flow_id = (await prefect.ask("POST", "/flows/", {"name": flow})).json()["id"]
    body = {"flow_id": flow_id, "name": f"{uuid4()}", "tags": tags, "state": {"type": "COMPLETED"}}
    return str((await prefect.ask("POST", "/flow_runs/", body)).json()["id"])


async def left(prefect: Server, *ids: str) -> list[bool]:
    return [(await prefect.ask("GET", f"/flow_runs/{each}")).status_code == 200 for each in ids]


async def rows(prefect: Server, kind: str, run_id: str) -> int:
    """How many task runs or artifacts a run still has."""
    key = "task_runs" if kind == "task_runs" else "artifacts"
    body: dict[str, Any] = {key: {"flow_run_id": {"any_": [run_id]}}}
    return len((await prefect.ask("POST", f"/{kind}/filter", body)).json())


async def test_old_requests_go_with_all_that_they_have_and_young_ones_stay(
    prefect: Server, config: Writes, record: Records
) -> None:
    old, young = record(20, 15), record(13, 0)
    engines = await engine_run(prefect, "sekha", "chat")

    done = await retention(config=config())

    assert (done.found, done.deleted) == (2, 2)
    assert await left(prefect, *old, *young, engines) == [False, False, True, True, True]
    assert [await rows(prefect, kind, old[0]) for kind in ("task_runs", "artifacts")] == [0, 0]
    assert [await rows(prefect, kind, young[0]) for kind in ("task_runs", "artifacts")] == [1, 1]
    run = (await prefect.runs("retention"))[0]
    assert "| Deleted | 2 |" in await prefect.receipt(run["id"])
    assert (run["state_type"], run["name"]) == ("COMPLETED", "older than configured")


async def test_a_dry_run_counts_and_deletes_nothing(prefect: Server, config: Writes, record: Records) -> None:
    old = record(30)

    done = await retention(dry_run=True, config=config())

    assert (done.found, done.deleted) == (1, 0)
    assert await left(prefect, *old) == [True]


async def test_the_configuration_says_how_long_and_a_parameter_says_otherwise(
    prefect: Server, config: Writes, record: Records
) -> None:
    path = config("providers: []\nrecording: {retention_days: 40}\n")
    months = record(30, 50)

    first = await left(prefect, *months) if (await retention(config=path)).deleted else []
    await retention(older_than_days=25, config=path)

    assert first == [True, False]
    assert await left(prefect, *months) == [False, False]


async def test_runs_of_the_engine_go_only_when_they_are_asked_for_and_nobody_elses_ever(
    prefect: Server, config: Writes, record: Records
) -> None:
    recorded = record(0.001)
    deployed = yaml.safe_load(deployment_file("prefect.yaml").read_text("utf-8"))["deployments"]
    ours = [await engine_run(prefect, *each["tags"], flow=each["name"]) for each in deployed]
    same_name, same_tag = await engine_run(prefect), await engine_run(prefect, "sekha", flow="theirs")

    await retention(older_than_days=1e-9)
    without = await left(prefect, *recorded, *ours, same_name, same_tag)
    await retention(older_than_days=1e-9, engine_runs=True)

    assert without == [False, *[True] * len(ours), True, True]
    assert await left(prefect, *ours, same_name, same_tag) == [*[False] * len(ours), True, True]


async def test_more_than_one_batch_goes(prefect: Server, record: Records) -> None:
    recorded = record(*[100.0] * 120)

    done = await retention(older_than_days=90)

    assert done.deleted == 120
    assert not any(await left(prefect, recorded[0], recorded[-1]))
