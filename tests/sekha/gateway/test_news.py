"""What a gateway tells of itself: circuits, outages, budgets."""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.config import RecordingSection
from sekha.errors import BudgetExceeded, ProviderUnavailable
from sekha.gateway.news import tell_of_budget, tell_of_circuit
from sekha.latency import Latencies
from sekha.loading import load
from sekha.recording.recorder import Recorder
from sekha.recording.run import Event
from sekha.recording.spool import SpoolReader
from sekha.resources import Resources

CONFIG = """
providers:
  - id: one
    provider_type: openai
    models: [{model_id: only, task: chat_small}]
  - id: many
    provider_type: openai
    models: [{model_id: first, task: chat_small}, {model_id: second, task: chat_small}]
  - id: more
    provider_type: openai
    models: [{model_id: a, task: chat_small}, {model_id: b, task: chat_small}, {model_id: c, task: chat_small}]
"""


class Gateway:
    """The circuits of a configuration, and the recorder that hears of them."""

    def __init__(self, folder: Path) -> None:
        (folder / "sekha.yaml").write_text(CONFIG)
        self.now = 1000.0
        self.folder = folder / "spool"
        self.recorder = Recorder(RecordingSection(), self.folder)
        rules = BreakerRules(failure_threshold=1, timeout_seconds=10, success_threshold=1)
        self.circuits = Circuits(rules, now=lambda: self.now)
        self.latencies = Latencies(clock=lambda: self.now)
        registry = Resources(load(folder / "sekha.yaml", environ={})).registry
        self.circuits.subscribe(partial(tell_of_circuit, self.recorder, registry, self.circuits, self.latencies))

    def fail(self, name: str, *, probe: str | None = None) -> None:
        self.circuits.note(name, ProviderUnavailable(provider_id=name.partition("/")[0]), probe=probe)

    def answer(self, name: str) -> None:
        self.circuits.note(name, None)
        self.latencies.observe(name, 0.1)

    async def told(self) -> list[Event]:
        await self.recorder.aclose()
        reader = SpoolReader(self.folder)
        return [event for path in reader.ready() for event in reader.read(path).events]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


def named(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.name.removeprefix("sekha."), event.resource.removeprefix("sekha.")) for event in events]


async def test_a_failing_probe_is_told_apart_from_the_failure_before(gateway: Gateway) -> None:
    gateway.fail("many/first")
    gateway.now += 11
    gateway.fail("many/first", probe=await gateway.circuits.claim("many/first"))
    gateway.now += 11
    gateway.circuits.note("many/first", None, probe=await gateway.circuits.claim("many/first"))

    assert named(await gateway.told()) == [
        (f"circuit.{change}", "circuit.many/first")
        for change in ("opened", "half_open", "reopened", "half_open", "closed")
    ]


async def test_a_provider_is_out_when_all_of_its_models_are(gateway: Gateway) -> None:
    gateway.fail("one/only")
    gateway.fail("many/first")
    gateway.fail("many/second")

    told = await gateway.told()

    assert named(told) == [
        ("circuit.opened", "circuit.one/only"),
        ("provider.outage", "provider.one"),
        ("circuit.opened", "circuit.many/first"),
        ("circuit.opened", "circuit.many/second"),
        ("provider.outage", "provider.many"),
    ]
    assert told[-1].payload == {"models": ["many/first", "many/second"], "reason": "provider_unavailable"}


async def test_a_provider_of_which_a_model_answers_is_not_out(gateway: Gateway) -> None:
    gateway.answer("more/a")
    gateway.fail("more/b")
    gateway.answer("more/a")
    gateway.now += 50
    gateway.fail("more/c")

    assert named(await gateway.told()) == [("circuit.opened", "circuit.more/b"), ("circuit.opened", "circuit.more/c")]


async def test_a_model_that_nobody_asked_lately_does_not_speak_for_its_provider(gateway: Gateway) -> None:
    gateway.answer("more/a")
    gateway.now += 61
    gateway.fail("more/b")
    gateway.fail("more/c")

    told = await gateway.told()

    assert named(told)[-1] == ("provider.outage", "provider.more")
    assert told[-1].payload["models"] == ["more/b", "more/c"]


async def test_a_budget_that_refuses_again_and_again_is_told_once_a_minute(gateway: Gateway) -> None:
    for name in ("day", "day", "team", "day"):
        tell_of_budget(gateway.recorder, exceeded(name))

    told = await gateway.told()

    assert named(told) == [("budget.exhausted", "budget.day"), ("budget.exhausted", "budget.team")]
    assert told[0].payload == {
        "limit": "5",
        "remaining": "0.10",
        "needed": "0.20",
        "period": "day",
        "resets": "00:00 UTC",
    }


def exceeded(name: str) -> BudgetExceeded:
    return BudgetExceeded(
        name, limit=Decimal(5), remaining=Decimal("0.10"), needed=Decimal("0.20"), period="day", resets="00:00 UTC"
    )
