"""A gateway that has answered two hundred thousand requests is as it was before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop

from sekha.gateway.app import ROUTES
from sekha.keys import hash_of, new_key
from sekha.ledger import Budget
from sekha.ledgers import open_ledger
from tests.fixtures.flood import MESSAGES, MODELS, Bill, Flood, listening
from tests.fixtures.gateway import wait_until
from tests.fixtures.process import Gate, Serves

REQUESTS = int(os.environ.get("SEKHA_TEST_SOAK_REQUESTS", "200000"))
WARM_UP = min(20_000, REQUESTS // 2)
"""Until caches are full, and what is needed now and then has been imported."""
CONNECTIONS = 32
MEGABYTE = 1 << 20
ALL = Budget(name="all", limit=Decimal(10_000_000), period="total")
PRICE = {"input_per_million": 100, "output_per_million": 200}


def config(port: int, keys: dict[str, str]) -> str:
    """Everything on: keys, budgets, limits, circuits, memory, one in ten requests recorded, all of them logged."""

    def models(*names: str) -> list[dict[str, Any]]:
        return [{"model_id": name, "task": "chat_small", "max_output_tokens": 100, "price": PRICE} for name in names]

    steady = {
        "id": "steady",
        "provider_type": "openai",
        "base_url": f"http://127.0.0.1:{port}/steady",
        "limits": {"requests_per_minute": 10_000_000},
        "models": [
            *models(*(name for name in MODELS if name != "broken")),
            {"model_id": "vectors", "task": "embedding", "dimension": 256, "price": PRICE},
        ],
    }
    shaky = {
        "id": "shaky",
        "provider_type": "openai",
        "base_url": f"http://127.0.0.1:{port}/shaky",
        "priority": 10,
        "models": models("fragile", "broken"),
    }
    here = {
        "id": "here",
        "provider_type": "builtin",
        "models": [{"model_id": "hashed-256", "task": "embedding", "dimension": 256}],
    }
    said = {
        "providers": [steady, shaky, here],
        "routing": {"circuit_breaker": {"timeout_secs": 1}},
        "keys": [
            {"name": "team", "hash": hash_of(keys["team"])},
            {"name": "poor", "hash": hash_of(keys["poor"])},
            {"name": "slow", "hash": hash_of(keys["slow"]), "requests_per_minute": 1},
        ],
        "budgets": [
            {"name": "all", "limit": int(ALL.limit), "period": "total"},
            {"name": "poor", "limit": 0.000001, "match": {"key": "poor"}},
            {"name": "one", "limit": 1000, "match": {"tag": "caller:caller 60"}},
        ],
        "collections": {"conversations": {"model": "hashed-256"}},
        "memory": {"collection": "conversations"},
        "recording": {"sample": 0.1},
    }
    # JSON is YAML.
    return orjson.dumps(said).decode()


@dataclass(frozen=True)
class Taken:
    """What the gateway's process takes."""

    rss: int
    descriptors: int
    threads: int
    metrics: int
    """Lines of `/metrics`."""


async def counted(gate: Gate) -> list[str]:
    """The lines of `/metrics`."""
    return (await gate.http.get("/metrics")).text.splitlines()


async def taken(gate: Gate) -> Taken:
    process = Path(f"/proc/{gate.process.pid}")
    said = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Taken(
        rss=int(said["VmRSS"].split()[0]) * 1024,
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(said["Threads"]),
        metrics=len(await counted(gate)),
    )


def size_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


async def at_rest(gate: Gate) -> bool:
    """Whether it serves nobody but whoever asks, and nothing is held as another process reads it."""
    said = await counted(gate)
    ledger = open_ledger(f"sqlite:///{gate.folder}/.sekha/ledger.db")
    try:
        _, held = await ledger.spent(ALL, at=datetime.now(UTC))
    finally:
        await ledger.aclose()
    waiting = list((gate.folder / ".sekha/gateway/memory/chats").glob("*"))
    return "sekha_requests_under_way 1" in said and held == 0 and not waiting


async def worst_case(gate: Gate, key: str) -> Decimal:
    asked = {"model": "silent", "messages": MESSAGES, "max_tokens": 50}
    routed = await gate.http.post("/api/v1/route", json=asked, headers={"authorization": f"Bearer {key}"})
    return Decimal(str(routed.json()["worst_case_cost"]))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_two_hundred_thousand_requests_of_every_sort_leave_nothing_behind(serving: Serves, tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_soak(serving, tmp_path))


async def _soak(serving: Serves, folder: Path) -> None:
    keys = {name: new_key() for name in ("team", "poor", "slow")}
    bill = Bill(worst_case=Decimal(0))
    log = folder / "access.log"
    # A server that is named and never there: what is recorded waits in the spool.
    nowhere = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    async with (
        listening(bill) as upstream,
        serving(config(upstream, keys), environment=nowhere, log=log) as gate,
    ):
        gate.http.headers["authorization"] = f"Bearer {keys['team']}"
        bill.worst_case = await worst_case(gate, keys["team"])
        flood = Flood(gate.port, keys, bill, connections=CONNECTIONS)
        await flood.ask(WARM_UP)
        await wait_until(lambda: at_rest(gate), seconds=20)
        first = await taken(gate)
        await flood.ask(REQUESTS - WARM_UP)
        await wait_until(lambda: at_rest(gate), seconds=20)
        last = await taken(gate)
        paths = {line.split('"')[1] for line in await counted(gate) if '{path="' in line}
        spool = size_of((gate.folder / ".sekha/gateway/recording").iterdir())
        journal = size_of((gate.folder / ".sekha/gateway/journal").iterdir())
    ledger = open_ledger(f"sqlite:///{folder}/.sekha/ledger.db")
    recorded = {line.group: (line.calls, line.cost) for line in await ledger.report("model")}
    await ledger.aclose()

    assert flood.wrong == []
    assert {"answered", "streamed", "embedded", "fell back", "failed", "broke off", "refused", "left", "page"} == {
        kind for kind, _ in flood.ended
    }
    assert recorded == {model: (bill.calls[model], cost) for model, cost in bill.dollars.items()}
    # Pages of the allocator and SQLite's caches come to half of it; 48 bytes left behind by each request pass it.
    assert last.rss - first.rss < 8 * MEGABYTE
    # Idle connections to the provider, and threads of a pool that starts them as they are needed.
    assert last.descriptors <= first.descriptors + 8
    assert last.threads <= first.threads + 4
    assert last.metrics <= first.metrics + 10
    assert paths <= {*ROUTES, "other"}
    assert journal < 10 * MEGABYTE
    assert spool < 64 * MEGABYTE
    assert len(log.read_bytes().splitlines()) >= REQUESTS
