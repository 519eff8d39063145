"""The same line of steps through Prefect's engine as in-process: same results, same trace, and what Prefect shows."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from prefect.client.orchestration import get_client

import sekha
from flows.backup import backup
from flows.chat import chat
from flows.doctor import doctor
from flows.importing import importing
from flows.ingest import ingest
from flows.search import search
from sekha.backup import BackupRequest
from sekha.backup import backup as backup_in_order
from sekha.chat import ChatRequest, Reply, answer
from sekha.doctor import DoctorRequest, diagnose
from sekha.documents import Document
from sekha.errors import (
    CollectionMissing,
    ConfigMissing,
    DocumentRefused,
    IngestIncomplete,
    ProviderAuthFailed,
    ProviderRejected,
)
from sekha.importing import ImportRequest, bring
from sekha.ingest import IngestRequest
from sekha.ingest import ingest as ingest_in_order
from sekha.search import Found, SearchRequest
from sekha.search import search as search_in_order
from sekha.testing import StandIn
from sekha.trace import Trace, Tracer
from tasks.parting import tell_prefect_the_rest
from tests.fixtures.chroma import chroma
from tests.fixtures.prefect import Server

pytestmark = pytest.mark.prefect

Writes: TypeAlias = Callable[..., str]

SECRET = "the merger with Initech"
HELLO = ChatRequest(messages=({"role": "user", "content": f"What of {SECRET}?"},))
KEY = "sk-flows-0123456789abcdef"

ONE_PROVIDER = """
providers:
  - id: away
    provider_type: openai
    base_url: {url}
    api_key: ${{AWAY_KEY}}
    models:
      - {{model_id: gpt-4o-mini, task: chat_small}}
      - {{model_id: text-embedding-3-small, task: embedding, dimension: 1536}}
collections:
  documents: {{model: text-embedding-3-small}}
"""
OF_8_NUMBERS = """
providers:
  - id: builtin
    provider_type: builtin
    models: [{model_id: hashed-8, task: embedding, dimension: 8}]
"""
WITH_FALLBACK = ONE_PROVIDER.replace("    models:\n", "    priority: 1\n    models:\n", 1).replace(
    "collections:",
    "  - id: builtin\n    provider_type: builtin\n    models: [{{model_id: echo, task: chat_small}}]\ncollections:",
)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWAY_KEY", KEY)


def documents(count: int) -> tuple[Document, ...]:
    return tuple(
        Document(source=f"{number}.md", text=f"Note {number} on holds and budgets.") for number in range(count)
    )


def unhurried(reply: Reply) -> Reply:
    """A reply without what differs from one time to the next."""
    attempts = tuple(replace(attempt, seconds=0.0) for attempt in reply.attempts)
    return replace(reply, attempts=attempts, body={**reply.body, "id": "", "created": 0})


def unhurried_found(found: Found) -> Found:
    """What was found without what differs from one time to the next."""
    answers = tuple(replace(answer, seconds=0.0, attempts=()) for answer in found.answers)
    return replace(found, attempts=(), answers=answers)


def steps_of(trace: Trace) -> list[str]:
    return sorted(step.name for step in trace.steps)


def name_of(task_run: dict[str, Any]) -> str:
    """A task run's name without the letters by which Prefect tells it from others."""
    return str(task_run["name"]).rpartition("-")[0]


def edges_of(task_runs: list[dict[str, Any]]) -> frozenset[tuple[str, str]]:
    names = {each["id"]: name_of(each) for each in task_runs}
    return frozenset(
        (names[given["id"]], name_of(each))
        for each in task_runs
        for parameter, inputs in each["task_inputs"].items()
        if parameter != "__parents__"
        for given in inputs
        if given["input_type"] == "task_run"
    )


async def shown(prefect: Server, flow: str, trace: Trace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run = (await prefect.runs(flow))[0]
    return run, await prefect.steps(run["id"], ended=len(trace.steps))


async def test_a_chat_through_prefect_gives_the_same_answer_and_trace(prefect: Server, config: Writes) -> None:
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(config(name="here")) as running:
        expected = await answer(HELLO, tracer.wrap(running.chat_steps))

    reply = await chat(HELLO, config=config(name="flow"))

    run, task_runs = await shown(prefect, "chat", tracer.trace)
    assert unhurried(reply) == unhurried(expected)
    assert sorted(map(name_of, task_runs)) == steps_of(tracer.trace)
    assert edges_of(task_runs) == tracer.trace.edges
    assert (run["state_type"], run["name"]) == ("COMPLETED", "auto")


async def test_an_ingest_of_several_batches_gives_the_same_report_and_trace(prefect: Server, config: Writes) -> None:
    longer = (Document(source="0.md", text="\n\n".join(f"Paragraph {at}. " * 60 for at in range(6))),)
    request = IngestRequest(documents=documents(7), batch_size=2)
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(here := config(name="here")) as running:
        await running.ingest(longer)
        expected = await ingest_in_order(request, tracer.wrap(running.ingest_steps))
    there = config(name="flow")
    async with sekha.open(there) as running:
        await running.ingest(longer)

    report = await ingest(request, config=there)

    _, task_runs = await shown(prefect, "ingest", tracer.trace)
    assert report == expected
    assert report.embedded == 7
    assert report.removed > 0
    assert sorted(map(name_of, task_runs)) == steps_of(tracer.trace)
    assert edges_of(task_runs) == tracer.trace.edges
    assert here != there


async def test_an_import_takes_over_the_same_with_the_same_trace(
    prefect: Server, config: Writes, tmp_path: Path
) -> None:
    request = ImportRequest(origin="chroma", path=chroma(tmp_path / "old"), model="hashed-8", page_size=2)
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(config(OF_8_NUMBERS, name="here")) as running:
        expected = await bring(request, tracer.wrap(running.importing.steps))

    report = await importing(request, config=config(OF_8_NUMBERS, name="flow"))

    run = (await prefect.runs("importing"))[0]
    published = len(tracer.trace.steps) + 1
    task_runs = await prefect.steps(run["id"], ended=published)
    steps = [each for each in task_runs if name_of(each) != "publish_import"]
    assert len(task_runs) == published
    assert report == expected
    assert report.imported == 5
    assert sorted(map(name_of, steps)) == steps_of(tracer.trace)
    assert edges_of(steps) == tracer.trace.edges
    assert run["name"] == "chroma old"


async def test_a_look_at_what_is_kept_finds_and_repairs_the_same_with_the_same_trace(
    prefect: Server, config: Writes, tmp_path: Path
) -> None:
    damaged = []
    for name in ("here", "flow"):
        damaged.append(config(name=name))
        async with sekha.open(damaged[-1]) as running:
            await running.ingest(documents(3))
            file = running.resources.loaded.path(".sekha/vectors.db")
        with closing(sqlite3.connect(file)) as db:
            db.execute("DELETE FROM vectors_1 WHERE id = 1")
            db.commit()
    request = DoctorRequest(repair=("vectors",))
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(damaged[0]) as running:
        expected = await diagnose(request, tracer.wrap(running.doctor_steps))

    found = await doctor(request, config=damaged[1])

    run = (await prefect.runs("doctor"))[0]
    published = len(tracer.trace.steps) + 1
    task_runs = await prefect.steps(run["id"], ended=published)
    steps = [each for each in task_runs if name_of(each) != "publish_diagnosis"]
    assert len(task_runs) == published
    assert (found.embedded, found.findings) == (expected.embedded, expected.findings) == (1, ())
    assert sorted(map(name_of, steps)) == steps_of(tracer.trace)
    assert edges_of(steps) == tracer.trace.edges
    assert run["name"] == "all"


async def test_a_backup_holds_the_same_with_the_same_trace(prefect: Server, config: Writes) -> None:
    places = [config(name=name) for name in ("here", "flow")]
    for place in places:
        async with sekha.open(place) as running:
            await running.ingest(documents(3))
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(places[0]) as running:
        expected = await backup_in_order(BackupRequest(name="first"), tracer.wrap(running.backing.steps))

    made = await backup(BackupRequest(name="first"), config=places[1])

    run = (await prefect.runs("backup"))[0]
    published = len(tracer.trace.steps) + 1
    task_runs = await prefect.steps(run["id"], ended=published)
    steps = [each for each in task_runs if name_of(each) != "publish_backup"]
    assert len(task_runs) == published
    assert made.manifest.vectors is not None
    assert expected.manifest.vectors is not None
    assert made.manifest.vectors.collections == expected.manifest.vectors.collections
    assert (Path(made.path) / "manifest.json").exists()
    assert sorted(map(name_of, steps)) == steps_of(tracer.trace)
    assert edges_of(steps) == tracer.trace.edges
    assert run["name"] == "first"


async def test_a_search_finds_the_same_with_the_same_trace(prefect: Server, config: Writes) -> None:
    path = config()
    request = SearchRequest(query="holds and budgets", limit=3)
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(path) as running:
        await running.ingest(documents(5))
        expected = await search_in_order(request, tracer.wrap(running.search_steps))

    found = await search(request, config=path)

    run, task_runs = await shown(prefect, "search", tracer.trace)
    assert unhurried_found(found) == unhurried_found(expected)
    assert len(found.hits) == 3
    assert edges_of(task_runs) == tracer.trace.edges
    assert run["name"] == "in documents"


async def test_a_chat_that_fails_has_the_same_trace_and_settles(
    prefect: Server, config: Writes, standin: StandIn
) -> None:
    standin.fail(401, times=None)
    text = ONE_PROVIDER.format(url=standin.openai_url)
    tracer = Tracer(clock=time.monotonic)
    async with sekha.open(config(text, name="here")) as running:
        with pytest.raises(ProviderAuthFailed):
            await answer(HELLO, tracer.wrap(running.chat_steps))

    with pytest.raises(ProviderAuthFailed) as raised:
        await chat(HELLO, config=config(text, name="flow"))

    run, task_runs = await shown(prefect, "chat", tracer.trace)
    assert sorted(map(name_of, task_runs)) == steps_of(tracer.trace)
    assert edges_of(task_runs) == tracer.trace.edges
    assert {name_of(each): each["state_type"] for each in task_runs}["call_provider"] == "FAILED"
    assert run["state_type"] == "FAILED"
    assert str(raised.value) in run["state"]["message"]
    assert KEY not in str(run)


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_no_log_of_a_run_holds_what_a_provider_quotes(
    prefect: Server, config: Writes, standin: StandIn, kind: str
) -> None:
    standin.fail(400, times=None, message=f"The key {KEY} may not ask: What of {SECRET}?")
    text = ONE_PROVIDER.format(url=getattr(standin, f"{kind}_url")).replace("openai", kind) + "unknown_price: free\n"

    with pytest.raises(ProviderRejected):
        await chat(HELLO, config=config(text))
    await tell_prefect_the_rest()

    run = (await prefect.runs("chat"))[0]
    logs = (await prefect.ask("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})).text
    assert "ProviderRejected" in logs
    assert KEY not in logs
    assert SECRET not in logs


async def test_a_run_shows_who_was_asked_when_a_provider_failed(
    prefect: Server, config: Writes, standin: StandIn
) -> None:
    standin.fail(401, times=None)

    reply = await chat(HELLO, config=config(WITH_FALLBACK.format(url=standin.openai_url)))

    run = (await prefect.runs("chat"))[0]
    receipt = await prefect.receipt(run["id"])
    assert reply.provider_id == "builtin"
    assert "| 1 | away | gpt-4o-mini |" in receipt
    assert "provider_auth_failed" in receipt
    assert "| 2 | builtin | echo |" in receipt
    assert {"fallback", "provider:builtin", "model:echo"} <= set(run["tags"])
    assert SECRET not in receipt
    assert reply.text not in receipt


async def test_a_failed_run_is_read_back_as_the_error_that_it_was(
    prefect: Server, config: Writes, standin: StandIn
) -> None:
    standin.fail(401, times=None)

    state = await chat(HELLO, config=config(ONE_PROVIDER.format(url=standin.openai_url)), return_state=True)
    async with get_client() as client:
        run = await client.read_flow_run(state.state_details.flow_run_id)
    assert run.state is not None
    error = await run.state.aresult(raise_on_failure=False)

    assert isinstance(error, ProviderAuthFailed)
    assert error.provider_id == "away"
    assert [attempt.error for attempt in error.attempts] == ["provider_auth_failed"]


async def test_an_ingest_that_fails_on_the_way_says_what_is_missing(
    prefect: Server, config: Writes, standin: StandIn
) -> None:
    path = config(ONE_PROVIDER.format(url=standin.openai_url))
    standin.slow(0, times=1)
    standin.fail(401, times=None)

    with pytest.raises(IngestIncomplete):
        await ingest(IngestRequest(documents=documents(4), batch_size=2), config=path)
    run = (await prefect.runs("ingest"))[0]
    receipt = await prefect.receipt(run["id"])
    standin.heal()
    again = await ingest(IngestRequest(documents=documents(4), batch_size=2), config=path)

    assert run["state_type"] == "FAILED"
    assert "Chunks stored: 2; missing: 2" in run["state"]["message"]
    assert "| Missing | 2 |" in receipt
    assert (again.unchanged, again.embedded, again.failures) == (2, 2, ())


async def test_a_refused_document_fails_the_run_and_stores_nothing(prefect: Server, config: Writes) -> None:
    path = config()
    request = IngestRequest(documents=(*documents(2), Document(source="empty.md", text=" ")))

    with pytest.raises(DocumentRefused):
        await ingest(request, config=path)

    run = (await prefect.runs("ingest"))[0]
    assert run["state_type"] == "FAILED"
    assert "empty.md" in run["state"]["message"]
    async with sekha.open(path) as running:
        with pytest.raises(CollectionMissing):
            await running.search("anything")


async def test_a_configuration_that_is_not_there_fails_the_run_at_once(prefect: Server) -> None:
    with pytest.raises(ConfigMissing):
        await chat(HELLO, config="nowhere/sekha.yaml")

    run = (await prefect.runs("chat"))[0]
    assert "there is no such file" in run["state"]["message"]
