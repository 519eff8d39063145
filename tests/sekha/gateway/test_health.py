"""Health: real probes, seldom; circuits; and little for strangers."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from sekha.breaker import BreakerRules
from sekha.calling import Clock
from sekha.circuits import Circuits
from sekha.errors import ProviderUnavailable
from sekha.gateway.app import Gateway
from sekha.gateway.health import Health
from sekha.gateway.metrics import Metrics
from sekha.gateway.serving import Serving
from sekha.keys import hash_of, new_key
from sekha.ledgers.leased import LeasedLedger
from sekha.ledgers.sql import SqlLedger
from sekha.ledgers.sqlite import SqliteDatabase
from sekha.loading import load
from sekha.resources import WALL, Resources
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, config_for, wait_until


@asynccontextmanager
async def answering(status: int | None) -> AsyncIterator[str]:
    """The address of a provider that answers everything with this status, or nothing at all."""
    gone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if status is None:
            await gone.wait()
        else:
            writer.write(b"HTTP/1.1 %d Whatever\r\ncontent-length: 2\r\n\r\n{}" % status)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        gone.set()


def one_model(**addresses: str) -> str:
    """A sekha.yaml with a provider at each address."""
    providers = [
        f"  - {{id: {name}, provider_type: openai, base_url: '{url}', "
        "models: [{model_id: chat, task: chat_small, price: free}]}"
        for name, url in addresses.items()
    ]
    return "\n".join(["providers:", *providers])


def failures(circuits: Circuits, name: str, count: int) -> None:
    for _ in range(count):
        circuits.note(name, ProviderUnavailable(provider_id=name.partition("/")[0]))


async def test_a_gateway_whose_providers_answer_is_healthy(gateway: Opens) -> None:
    async with StandIn() as first, StandIn() as second, gateway(first, second) as served:
        answer = await served.http.get("/api/v1/health")

        said = answer.json()
        assert answer.status_code == 200
        assert said["status"] == "healthy"
        assert said["totals"]["providers"] == said["totals"]["healthy"] == 2
        assert said["totals"]["models"] == 6
        assert said["ledger"]["status"] == "healthy"
        assert said["recorder"]["sink"] == "off"
        assert said["uptime_seconds"] >= 0
        assert said["version"]


async def test_providers_are_asked_once_however_many_ask(gateway: Opens) -> None:
    async with StandIn() as first, StandIn() as second, gateway(first, second) as served:
        await asyncio.gather(*(served.http.get("/api/v1/health/providers") for _ in range(20)))
        answer = await served.http.get("/api/v1/health")

        assert answer.status_code == 200
        for standin in (first, second):
            assert [(each.method, each.path) for each in standin.requests] == [("GET", "/v1/models")]


@pytest.mark.parametrize(
    ("kind", "path", "header"),
    [
        ("openai", "/v1/models", "authorization"),
        ("openrouter", "/api/v1/models", "authorization"),
        ("anthropic", "/v1/models", "x-api-key"),
        ("ollama", "/api/tags", "authorization"),
    ],
)
async def test_each_kind_of_provider_is_asked_for_its_models_with_its_key(
    tmp_path: Path, kind: str, path: str, header: str
) -> None:
    file = tmp_path / "sekha.yaml"
    async with StandIn() as standin:
        file.write_text(config_for(standin, kind=kind).replace("  priority: 1", "  priority: 1\n    api_key: ${KEY}"))
        resources = Resources(load(file, environ={"KEY": "sk-secret"}))
        health = Health(resources)

        look = (await health.providers())["first"]

        (probe,) = standin.requests
        assert look.status == "healthy"
        assert (probe.method, probe.path.partition("?")[0]) == ("GET", path)
        assert {name.lower(): value for name, value in probe.headers.items()}[header].endswith("sk-secret")
        await health.aclose()
        await resources.aclose()


@pytest.mark.parametrize(
    ("status", "health", "says"),
    [
        (401, "unhealthy", "refuses our key"),
        (429, "degraded", "rate limiting"),
        (500, "unhealthy", "HTTP 500"),
        (404, "healthy", None),
    ],
)
async def test_what_a_probe_is_answered_says_how_a_provider_is(
    gateway: Opens, status: int, health: str, says: str | None
) -> None:
    async with answering(status) as one, answering(200) as other, gateway(config=one_model(a=one, b=other)) as served:
        first, second = (await served.http.get("/api/v1/health/providers")).json()["providers"]

        assert (first["status"], second["status"]) == (health, "healthy")
        assert first["detail"] is None if says is None else says in first["detail"]


async def test_one_provider_that_is_gone_degrades_and_all_of_them_make_unhealthy(gateway: Opens) -> None:
    async with StandIn() as first:
        async with StandIn() as second, StandIn() as third:
            config = config_for(first, second)
            all_gone = config_for(second, third)
        async with gateway(config=config) as served:
            some = await served.http.get("/api/v1/health")
        async with gateway(config=all_gone) as served:
            none = await served.http.get("/api/v1/health")
            ready = await served.http.get("/health/ready")

    assert (some.status_code, some.json()["status"]) == (200, "degraded")
    assert (none.status_code, none.json()["status"]) == (503, "unhealthy")
    assert ready.status_code == 200  # elsewhere they would be gone too


async def test_providers_that_hang_are_waited_for_side_by_side_and_not_for_long(gateway: Opens) -> None:
    async with (
        answering(None) as one,
        answering(None) as two,
        answering(None) as three,
        gateway(config=one_model(a=one, b=two, c=three)) as served,
    ):
        began = time.monotonic()

        said = (await served.http.get("/api/v1/health/providers")).json()

        assert time.monotonic() - began < 4
        assert {each["detail"] for each in said["providers"]} == {"no answer within 2 s"}


async def test_a_circuit_shows_in_its_providers_health(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=3))
    async with StandIn() as first, StandIn() as second, gateway(first, second, circuits=circuits) as served:
        failures(circuits, "first/chat", 3)
        failures(circuits, "first/vectors", 1)

        one, other = (await served.http.get("/api/v1/health/providers")).json()["providers"]

        assert (one["status"], other["status"]) == ("degraded", "healthy")
        assert one["circuit_breaker"]["state"] == "open"
        assert one["circuit_breaker"]["failure_count"] == 3
        assert one["circuit_breaker"]["success_count"] == 0
        assert one["circuit_breaker"]["last_error"] == "provider_unavailable"
        assert one["circuit_breaker"]["last_failure"].startswith("20")
        assert {name: each["state"] for name, each in one["circuits"].items()} == {"chat": "open", "vectors": "closed"}
        assert other["circuit_breaker"] == {
            "state": "closed",
            "failure_count": 0,
            "success_count": 0,
            "last_failure": None,
            "last_error": None,
        }


async def test_a_provider_all_of_whose_circuits_are_open_is_unhealthy(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1))
    async with StandIn() as standin, gateway(standin, circuits=circuits) as served:
        for model in ("chat", "eyes", "vectors"):
            failures(circuits, f"first/{model}", 1)

        answer = await served.http.get("/api/v1/health")

        assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")


async def test_without_a_ledger_nothing_is_ready(gateway: Opens, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    async with StandIn() as standin, gateway(standin, extra="ledger: {url: 'sqlite:///taken'}\n") as served:
        ready = await served.http.get("/health/ready")
        health = await served.http.get("/api/v1/health")
        live = await served.http.get("/health/live")

        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
        assert health.json()["ledger"]["detail"]
        assert (live.status_code, live.json()["status"]) == (200, "alive")


async def test_it_is_ready_for_as_long_as_requests_are_answered_without_the_ledger(
    tmp_path: Path,
) -> None:
    async with StandIn() as standin:
        (tmp_path / "sekha.yaml").write_text(config_for(standin))
        loaded, now = load(tmp_path / "sekha.yaml", environ={}), 0.0
        database = SqliteDatabase(str(tmp_path / "ledger.db"), busy_seconds=0.01)
        ledger = LeasedLedger(SqlLedger(database), tmp_path / "journal", behind_seconds=2.0)
        clock = Clock(now=lambda: now, sleep=WALL.sleep, random=lambda: 0.0)
        serving = Serving(Resources(loaded, clock=clock, ledger=ledger), Metrics(), leased=ledger)
        transport = httpx.ASGITransport(Gateway(serving))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:

            async def statuses() -> tuple[int, int]:
                nonlocal now
                now += 10  # what was seen is old
                asked = {"messages": [{"role": "user", "content": "Hello."}], "model": "chat"}
                answered = (await http.post("/v1/chat/completions", json=asked)).status_code
                return answered, (await http.get("/health/ready")).status_code

            well = await statuses()
            with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as blocking:
                blocking.execute("begin immediate")
                await statuses()
                await wait_until(lambda: ledger.away is not None)
                without = await statuses()
                looked = (await serving.health.ledger()).status
                await wait_until(lambda: ledger.is_too_far_behind)
                too_long = await statuses()
                blocking.execute("rollback")
            await wait_until(lambda: ledger.away is None)
            now += 10
            again = (await http.get("/health/ready")).status_code
        await serving.aclose()

    assert well == without == (200, 200)
    assert looked == "unhealthy"
    assert again == 200
    assert too_long == (503, 503)


async def test_whoever_has_no_key_is_told_little(gateway: Opens) -> None:
    key = new_key()
    circuits = Circuits(BreakerRules(failure_threshold=1))
    keys = f'keys: [{{name: ops, hash: "{hash_of(key)}"}}]\n'
    async with StandIn() as first, StandIn() as second, gateway(first, second, circuits=circuits, extra=keys) as served:
        failures(circuits, "first/chat", 1)

        health = await served.http.get("/api/v1/health")
        providers = await served.http.get("/api/v1/health/providers")
        wrong = await served.http.get("/api/v1/health", headers={"authorization": "Bearer sk-sekha-guess"})
        known = await served.http.get("/api/v1/health/providers", headers={"authorization": f"Bearer {key}"})

        assert health.json().keys() == {"status", "version"}
        assert health.json()["status"] == "degraded"
        assert providers.json() == {"totals": {"providers": 2, "healthy": 1}}
        assert wrong.status_code == 401
        assert [each["provider_id"] for each in known.json()["providers"]] == ["first", "second"]


async def test_liveness_asks_nobody_and_needs_no_key(gateway: Opens) -> None:
    keys = f'keys: [{{name: ops, hash: "{hash_of(new_key())}"}}]\n'
    async with StandIn() as standin, gateway(standin, extra=keys) as served:
        live = await served.http.get("/health/live")
        ready = await served.http.get("/health/ready")
        short = await served.http.get("/health")

        assert (live.status_code, ready.status_code) == (200, 200)
        assert (short.status_code, short.headers["location"]) == (307, "/api/v1/health")
        assert standin.requests == []


async def test_the_store_is_looked_at_where_collections_are_kept(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, extra="collections: {notes: {model: vectors}}\n") as served:
        said = (await served.http.get("/api/v1/health")).json()["store"]

        assert (said["status"], said["kind"]) == ("healthy", "embedded")
        assert said["latency_ms"] > 0


async def test_a_provider_without_an_address_is_not_held_against_the_gateway(gateway: Opens) -> None:
    config = """
    providers:
      - id: anywhere
        provider_type: litellm
        models: [{model_id: groq/fast, task: chat_small, price: free}]
      - id: here
        provider_type: builtin
        models: [{model_id: hash, task: embedding, dimension: 8}]
    """
    async with gateway(config=config) as served:
        providers = (await served.http.get("/api/v1/health/providers")).json()["providers"]
        health = (await served.http.get("/api/v1/health")).json()

        assert {each["provider_id"]: each["status"] for each in providers} == {"anywhere": "unknown", "here": "healthy"}
        assert health["status"] == "healthy"
