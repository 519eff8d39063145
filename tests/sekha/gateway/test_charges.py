"""Money of calls that failed or were cut is counted and logged with the request that it was spent for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from sekha.gateway.app import Gateway
from sekha.gateway.logs import AccessLog, Lines
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, listening, wait_until


@contextlib.asynccontextmanager
async def logged(served: Served) -> Any:
    """A second door to the same gateway, which logs; yields a client of it and what it has logged."""
    kept = io.BytesIO()
    log = AccessLog(Lines(kept))
    app = Gateway(served.serving, access=log)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in kept.getvalue().splitlines()]

    async with (
        listening(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False, timeout=20) as http,
    ):
        yield http, lines
    log.close()


def asked(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello there."}], "model": "chat", **fields}


async def counted(served: Served) -> dict[str, float]:
    """Dollars that the metrics count, by provider."""
    text = (await served.http.get("/metrics")).text
    found = re.findall(r'^sekha_dollars_total\{provider="(\w+)",model="\w+"\} (\S+)$', text, re.MULTILINE)
    return {provider: float(value) for provider, value in found}


async def tell(http: httpx.AsyncClient, lines: Callable[[], list[dict[str, Any]]], **fields: Any) -> dict[str, Any]:
    """Ask, and give the line that was logged of it."""
    before = len(lines())
    await http.post("/v1/chat/completions", json=asked(**fields))
    await wait_until(lambda: len(lines()) > before)
    return lines()[-1]


BOTH = pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])


@BOTH
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_time_out_is_counted_and_logged_at_its_worst_case(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served, timeout_secs=0.5) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.hang(times=None)
            line = await tell(http, lines, stream=stream)
        spent, metrics = await served.spent(), await counted(served)

    assert spent > before
    assert metrics == {"first": pytest.approx(float(spent))}
    assert (line["outcome"], line["error"]) == ("failed", "provider_timeout")
    assert (line["provider"], line["model"]) == ("first", "chat")
    assert line["cost"] == pytest.approx(float(spent - before))
    assert line["input_tokens"] > 0


@BOTH
async def test_a_stream_that_stalls_took_until_it_was_given_up_and_cost_what_had_come(
    gateway: Opens, as_served: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served, timeout_secs=0.5) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.stall(after=3)
            answer = await http.post("/v1/chat/completions", json=asked(stream=True))
            await wait_until(lambda: len(lines()) > 1)
        line = lines()[-1]
        spent, metrics = await served.spent(), await counted(served)

    (told,) = re.findall(r'"attempts":\[\{[^]]*"seconds":([\d.]+)', answer.text)
    assert float(told) >= 0.5
    assert line["cost"] == pytest.approx(float(spent - before)) != 0
    assert (line["provider"], line["status"], line["outcome"]) == ("first", 200, "failed")
    assert metrics == {"first": pytest.approx(float(spent))}


@BOTH
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_caller_who_left_is_logged_as_that_with_what_it_cost(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.arrived.clear()
            standin.hang(times=None)
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=asked(stream=stream)))
            await standin.arrived.wait()
            asking.cancel()
            await wait_until(lambda: len(lines()) > 1)
        line = lines()[-1]
        spent, metrics = await served.spent(), await counted(served)

    assert (line["status"], line["outcome"], line["error"]) == (499, "cancelled", "client_left")
    assert (line["provider"], line["model"]) == ("first", "chat")
    assert line["cost"] == pytest.approx(float(spent - before)) != 0
    assert metrics == {"first": pytest.approx(float(spent))}


async def test_an_answer_after_a_time_out_costs_both(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, timeout_secs=0.5) as served:
        one.hang()
        async with logged(served) as (http, lines):
            line = await tell(http, lines)
        spent, metrics = await served.spent(), await counted(served)

    assert (line["provider"], line["outcome"]) == ("second", "fallback")
    assert line["cost"] == pytest.approx(float(spent))
    assert sum(metrics.values()) == pytest.approx(float(spent))
    assert set(metrics) == {"first", "second"}


async def test_what_failed_and_is_not_billed_costs_nothing_and_names_who_was_asked_last(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        one.fail(500)
        two.fail(500)
        async with logged(served) as (http, lines):
            line = await tell(http, lines)
            refused = await tell(http, lines, max_cost=0)

    assert (line["provider"], line["cost"], line["error"]) == ("second", 0, "provider_unavailable")
    assert refused["error"] == "cost_refused"
    assert refused.keys().isdisjoint({"provider", "cost"}), "nobody was asked"
