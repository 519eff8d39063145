"""What a real Prefect server says of recorded requests, whichever way they got there."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from uuid import uuid4

import httpx
import psycopg
import pytest

from sekha.calling import Attempt
from sekha.config import RecordingSection
from sekha.recording.joining import joined
from sekha.recording.prefect_api import ApiSink
from sekha.recording.prefect_database import DatabaseSink
from sekha.recording.prefect_postgres import PostgresTables
from sekha.recording.prefect_rows import RECORDED
from sekha.recording.prefect_sqlite import SqliteTables
from sekha.recording.recorder import Recorder
from sekha.recording.run import Run
from sekha.stack import LocalPrefect
from sekha.trace import Step
from tests.fixtures.prefect import Server
from tests.sekha.recording.conftest import QUICK_STEPS

pytestmark = pytest.mark.prefect

Makes: TypeAlias = Callable[..., Run]
Until: TypeAlias = Callable[..., Any]

EVERYTHING = RecordingSection(max_per_second=1e9)
AT = 1_795_000_000.25
ATTEMPTS = (
    Attempt(provider_id="openai", model_id="gpt-5-mini", seconds=0.1, error="rate_limited", detail="429"),
    Attempt(provider_id="anthropic", model_id="claude", seconds=0.2),
)


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def edges_of(task_runs: list[dict[str, Any]]) -> set[tuple[str, str]]:
    names = {each["id"]: each["name"] for each in task_runs}
    return {
        (names[given["id"]], each["name"])
        for each in task_runs
        for inputs in each["task_inputs"].values()
        for given in inputs
    }


async def check_exact(server: Server, run: Run) -> None:
    """All that Prefect shows of an answered chat."""
    shown = (await server.ask("GET", f"/flow_runs/{run.id}")).json()
    task_runs = await server.steps(run.id, ended=5)
    flow = (await server.ask("GET", f"/flows/{shown['flow_id']}")).json()
    graph = (await server.ask("GET", f"/flow_runs/{run.id}/graph-v2")).json()

    assert flow["name"] == "chat"
    assert (shown["name"], shown["state"]["type"], shown["state"]["name"]) == (run.name, "COMPLETED", "Completed")
    assert shown["state"]["message"] == "openai/gpt-5-mini answered. Cost $0.00031, estimated $0.00040."
    assert seconds_of(shown["start_time"]) == pytest.approx(run.started_at, abs=2e-6)
    assert seconds_of(shown["end_time"]) == pytest.approx(run.ended_at, abs=2e-6)
    assert shown["total_run_time"] == pytest.approx(0.270001, abs=2e-6)
    assert shown["parameters"] == run.parameters
    assert set(shown["tags"]) == {RECORDED, *run.tags}

    assert [each["name"] for each in task_runs] == [step.name for step in run.steps]
    for each, step in zip(task_runs, run.steps, strict=True):
        assert seconds_of(each["start_time"]) == pytest.approx(step.started + run.clock_offset, abs=2e-6)
        assert seconds_of(each["end_time"]) == pytest.approx(step.ended + run.clock_offset, abs=2e-6)
        assert each["total_run_time"] == pytest.approx(step.ended - step.started, abs=2e-6)
        assert each["state"]["type"] == "COMPLETED"
    assert edges_of(task_runs) == {
        ("estimate_cost", "select_provider"),
        ("select_provider", "reserve_budget"),
        ("select_provider", "call_provider"),
        ("reserve_budget", "call_provider"),
        ("reserve_budget", "settle_cost"),
        ("call_provider", "settle_cost"),
    }
    assert {node["label"] for _, node in graph["nodes"]} == {step.name for step in run.steps}
    labels = {node["id"]: node["label"] for _, node in graph["nodes"]}
    # Prefect names a parent once for each of the parent's own inputs (3.8.8, `query_components.py`): a set.
    drawn = {(labels[parent["id"]], node["label"]) for _, node in graph["nodes"] for parent in node["parents"]}
    assert drawn == edges_of(task_runs)


async def check_joined(server: Server, run: Run, flow_run_id: str) -> None:
    """How a chat is shown whose steps before the call were quick."""
    task_runs = await server.steps(flow_run_id, ended=3)
    graph = (await server.ask("GET", f"/flow_runs/{flow_run_id}/graph-v2")).json()

    before = "estimate_cost, select_provider, reserve_budget"
    edges = {(before, "call_provider"), (before, "settle_cost"), ("call_provider", "settle_cost")}
    assert [each["name"] for each in task_runs] == [before, "call_provider", "settle_cost"]
    assert [each["state_type"] for each in task_runs] == ["COMPLETED"] * 3
    assert edges_of(task_runs) == edges
    labels = {node["id"]: node["label"] for _, node in graph["nodes"]}
    assert {(labels[parent["id"]], node["label"]) for _, node in graph["nodes"] for parent in node["parents"]} == edges
    times = [(run.steps[0].started, run.steps[2].ended), *[(step.started, step.ended) for step in run.steps[3:]]]
    for each, (started, ended) in zip(task_runs, times, strict=True):
        assert seconds_of(each["start_time"]) == pytest.approx(started + run.clock_offset, abs=2e-6)
        assert seconds_of(each["end_time"]) == pytest.approx(ended + run.clock_offset, abs=2e-6)
        assert each["total_run_time"] == pytest.approx(ended - started, abs=2e-6)


async def test_quick_steps_are_one_task_run_unless_each_is_asked_for(
    prefect: Server, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    run, each = make_run(steps=QUICK_STEPS), make_run(steps=QUICK_STEPS)
    every_step = EVERYTHING.model_copy(update={"steps": "all"})
    for section, what in ((EVERYTHING, run), (every_step, each)):
        async with Recorder(section, tmp_path / section.steps) as recorder:
            recorder.record(what)
            await until(recorder, lambda stats: stats.published == 1)

    await check_joined(prefect, run, run.id)
    assert [step["name"] for step in await prefect.steps(each.id, ended=5)] == [step.name for step in QUICK_STEPS]


async def test_a_chat_is_a_flow_run_with_exact_times_and_its_steps_drawn(
    prefect: Server, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    run = make_run()
    async with Recorder(EVERYTHING, tmp_path / "spool") as recorder:
        recorder.record(run)
        stats = await until(recorder, lambda stats: stats.published == 1)

    assert stats.sink == "Prefect's SQLite database"
    await check_exact(prefect, run)


async def test_a_fallback_a_failure_and_a_refusal_say_what_happened(
    prefect: Server, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    fell_back = make_run(outcome="fallback", attempts=ATTEMPTS, provider_id="anthropic", model_id="claude")
    failed = make_run(
        outcome="failed",
        error="rate_limited",
        message="Everyone is busy.",
        attempts=ATTEMPTS[:1],
        cost=None,
        steps=(Step("call_provider", (), 100.0, 100.1, error="rate_limited"),),
    )
    refused = make_run(
        outcome="refused", error="budget_exceeded", message="Budget 'day' is spent.", cost=None, attempts=(), steps=()
    )
    left = make_run(outcome="cancelled", steps=(Step("call_provider", (), 100.0, 100.1, error="CancelledError"),))
    async with Recorder(EVERYTHING, tmp_path / "spool") as recorder:
        for run in (fell_back, failed, refused, left):
            recorder.record(run)
        await until(recorder, lambda stats: stats.published == 4)

    async def shown(run: Run) -> dict[str, Any]:
        return dict((await prefect.ask("GET", f"/flow_runs/{run.id}")).json())

    assert (await shown(fell_back))["state"]["message"].startswith(
        "anthropic/claude answered after openai/gpt-5-mini (rate_limited). Cost $0.00031"
    )
    assert "fallback" in (await shown(fell_back))["tags"]
    assert "| 1 | openai | gpt-5-mini | 0.10 | rate_limited |" in await prefect.receipt(fell_back.id)
    assert (await shown(failed))["state"]["message"].startswith("rate_limited: Everyone is busy.")
    assert (await shown(failed))["state_type"] == "FAILED"
    [step] = await prefect.steps(failed.id, ended=1)
    assert (step["state"]["type"], step["state"]["message"]) == ("FAILED", "rate_limited")
    assert ((await shown(refused))["state_type"], (await shown(refused))["state_name"]) == ("FAILED", "Refused")
    assert "refused" in (await shown(refused))["tags"]
    assert (await shown(left))["state_type"] == "CANCELLED"
    [step] = await prefect.steps(left.id, ended=1)
    assert step["state"]["type"] == "CANCELLED"


async def test_prompts_are_shown_only_when_they_are_given(
    prefect: Server, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    without, content = make_run(), make_run(content={"messages": [{"role": "user", "content": "nul \0 and all"}]})
    async with Recorder(EVERYTHING, tmp_path / "spool") as recorder:
        recorder.record(without)
        recorder.record(content)
        await until(recorder, lambda stats: stats.published == 2)

    shown = [(await prefect.ask("GET", f"/flow_runs/{run.id}")).json()["parameters"] for run in (without, content)]
    assert shown[0] == without.parameters
    assert shown[1]["messages"] == [{"role": "user", "content": "nul \ufffd and all"}]


async def test_events_reach_prefect(prefect: Server, tmp_path: Path, until: Until) -> None:
    resource = f"sekha.circuit.{uuid4()}"
    async with Recorder(EVERYTHING, tmp_path / "spool") as recorder:
        recorder.event("sekha.circuit.opened", resource, {"failures": 3})
        await until(recorder, lambda stats: stats.sink and stats.queued_bytes == 0)

    body = {"filter": {"resource": {"id": [resource]}}}
    async with asyncio.timeout(30):
        while True:
            found = (await prefect.ask("POST", "/events/filter", body)).json()["events"]
            if found:
                break
            await asyncio.sleep(0.2)
    assert (found[0]["event"], found[0]["payload"]) == ("sekha.circuit.opened", {"failures": 3})


def named(tables: Any) -> dict[str, str]:
    """Settings that name this database, beside the session's server."""
    name = "PREFECT_API_DATABASE_CONNECTION_URL"
    return {name: tables.environment[name]}


async def test_a_database_that_is_not_the_servers_is_left_alone(
    prefect: Server, tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    with closing(sqlite3.connect(tables.file)) as connection:
        connection.execute("DELETE FROM flow")
        connection.commit()
    run = make_run(name=f"over the API {uuid4()}")
    quick = make_run(name=f"over the API {uuid4()}", steps=QUICK_STEPS)
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=named(tables)) as recorder:
        recorder.record(run)
        recorder.record(quick)
        stats = await until(recorder, lambda stats: stats.published == 2)

    async def named_as(name: str) -> list[dict[str, Any]]:
        body = {"flow_runs": {"name": {"any_": [name]}}}
        return list((await prefect.ask("POST", "/flow_runs/filter", body)).json())

    shown = await named_as(run.name)
    task_runs = await prefect.steps(shown[0]["id"], ended=5)
    assert stats.sink == "Prefect's API"
    assert tables.run_ids() == []
    assert (len(shown), shown[0]["state_type"], set(shown[0]["tags"])) == (1, "COMPLETED", {RECORDED, *run.tags})
    assert shown[0]["parameters"]["run_id"] == run.id
    assert [each["name"] for each in task_runs] == [step.name for step in run.steps]
    assert len(edges_of(task_runs)) == 6
    assert seconds_of(task_runs[3]["start_time"]) == pytest.approx(run.steps[3].started + run.clock_offset, abs=2e-6)
    assert task_runs[3]["total_run_time"] == pytest.approx(0.254123, abs=2e-6)
    await check_joined(prefect, quick, (await named_as(quick.name))[0]["id"])


async def test_what_is_sent_to_the_api_again_is_there_once(prefect: Server, make_run: Makes) -> None:
    name = f"again {uuid4()}"
    runs = [make_run(name=name, outcome="fallback", attempts=ATTEMPTS) for _ in range(2)]

    def send(some: list[Run]) -> None:
        sink = ApiSink()
        sink.publish(some)
        sink.close()

    for some in (runs[:1], runs, runs):
        await asyncio.to_thread(send, some)
    shown = (await prefect.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})).json()

    assert len(shown) == 2
    for each in shown:
        assert "rate_limited" in await prefect.receipt(each["id"]), "and there is but one"


async def test_an_artifact_that_did_not_arrive_with_its_run_comes_when_it_is_sent_again(
    prefect: Server, make_run: Makes
) -> None:
    name = f"late {uuid4()}"
    run = make_run(name=name, outcome="fallback", attempts=ATTEMPTS)

    def send(some: Run) -> None:
        sink = ApiSink()
        sink.publish([some])
        sink.close()

    # As far as a publisher came that was killed behind the run itself.
    for some in (replace(run, attempts=()), run):
        await asyncio.to_thread(send, some)
    [shown] = (await prefect.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})).json()

    assert "rate_limited" in await prefect.receipt(shown["id"])


async def test_tables_of_another_prefect_are_left_alone(
    prefect: Server, tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    with closing(sqlite3.connect(tables.file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        connection.commit()
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=named(tables)) as recorder:
        stats = await until(recorder, lambda stats: stats.sink)

    assert stats.sink == "Prefect's API"


async def test_what_is_recorded_while_prefect_is_down_is_there_when_it_is_up(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    tables.file.rename(home / "prefect.db")
    (home / "migrated").write_text(version("prefect"))
    server = LocalPrefect(home, port=free_port())
    environment = {**server.environment, "PREFECT_API_DATABASE_CONNECTION_URL": ""}
    runs = [make_run() for _ in range(300)]
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=environment) as recorder:
        for run in runs:
            recorder.record(run)
        down = await until(recorder, lambda stats: stats.waits_for)
        async with server:
            await until(recorder, lambda stats: stats.published == 300)
            await check_exact(Server(server), runs[299])

    assert down.published == 0
    assert "does not answer" in down.waits_for
    assert (recorder.stats.dropped, recorder.stats.queued_bytes) == (0, 0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@asynccontextmanager
async def on_postgres(url: str, home: Path) -> AsyncIterator[tuple[Server, dict[str, str]]]:
    """A Prefect server on PostgreSQL, and the settings that lead to both."""
    local = SimpleNamespace(home=home, api_url=f"http://127.0.0.1:{free_port()}/api")
    port = local.api_url.split(":")[2].partition("/")[0]
    settings = {
        **LocalPrefect(home).environment,
        "PREFECT_API_URL": local.api_url,
        "PREFECT_API_DATABASE_CONNECTION_URL": url,
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    }
    home.mkdir()  # noqa: ASYNC240
    with (home / "server.log").open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
            env={**os.environ, **settings},
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(local)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(80):
            while not await answers(server):
                assert process.poll() is None, (home / "server.log").read_text()
                await asyncio.sleep(0.3)
        yield server, settings
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


async def answers(server: Server) -> bool:
    try:
        return (await server.ask("GET", "/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def test_postgres_shows_the_same(
    prefect: Server, postgres_server: str, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    name = f"prefect_{uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = postgres_server.replace("/postgres?", f"/{name}?").replace("postgresql://", "postgresql+asyncpg://")
    run = make_run()
    quick = make_run(steps=QUICK_STEPS)
    fell_back = make_run(outcome="fallback", attempts=ATTEMPTS, content={"prompt": "nul \0 and all"})
    async with on_postgres(url, tmp_path / "home") as (server, settings):
        async with Recorder(EVERYTHING, tmp_path / "spool", environment=settings) as recorder:
            for each in (run, quick, fell_back):
                recorder.record(each)
            stats = await until(recorder, lambda stats: stats.published == 3)

        assert stats.sink == "Prefect's PostgreSQL database"
        await check_exact(server, run)
        await check_joined(server, quick, quick.id)
        assert "rate_limited" in await server.receipt(fell_back.id)


def many(make_run: Makes, first: int, count: int, steps: tuple[Step, ...]) -> list[Run]:
    """Chats of a gateway that has 50 a second."""
    starts = [AT + number / 50 for number in range(first, first + count)]
    return [make_run(started_at=at, ended_at=at + 0.270001, clock_offset=at - 100.0, steps=steps) for at in starts]


def grown(sink: DatabaseSink, size: Callable[[], int], make_run: Makes, steps: tuple[Step, ...] = QUICK_STEPS) -> float:
    """What a chat adds to a database that holds some already, in bytes."""
    for at in range(0, 1_000, 250):
        sink.publish(many(make_run, at, 250, steps))
    before = size()
    for at in range(1_000, 3_000, 250):
        sink.publish(many(make_run, at, 250, steps))
    after = size()
    sink.close()
    return (after - before) / 2_000


@pytest.mark.parametrize(("steps", "most"), [(joined(QUICK_STEPS), 5_000), (QUICK_STEPS, 6_600)])
def test_sqlite_keeps_a_chat_in_what_the_manual_says(
    tables: Any, make_run: Makes, steps: tuple[Step, ...], most: int
) -> None:
    def size() -> int:
        tables.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(tables.file.stat().st_size)

    assert grown(DatabaseSink(SqliteTables(tables.file), None), size, make_run, steps) <= most


def test_postgres_keeps_a_chat_in_five_kilobytes(postgres_server: str, tmp_path: Path, make_run: Makes) -> None:
    name = f"prefect_{uuid4().hex}"
    url = postgres_server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        subprocess.run(
            [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"],
            env={
                **os.environ,
                "PREFECT_HOME": str(tmp_path),
                "PREFECT_API_URL": "",
                "PREFECT_API_DATABASE_CONNECTION_URL": url.replace("postgresql://", "postgresql+asyncpg://"),
            },
            check=True,
            stdout=subprocess.DEVNULL,
        )

        def size() -> int:
            [row] = connection.execute("SELECT pg_database_size(%s)", (name,)).fetchall()
            return int(row[0])

        assert grown(DatabaseSink(PostgresTables(url), None), size, make_run) <= 5_000
