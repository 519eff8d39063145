"""How things stand, as Prometheus has it: circuits, budgets and the recorder, which are the same for every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal

from sekha.breaker import CLOSED
from sekha.errors import LedgerError
from sekha.gateway.health import sekha_version
from sekha.gateway.metrics import Family
from sekha.gateway.serving import Serving
from sekha.ledger import Budget, remaining

__all__ = ["standing"]

_MODEL = ("provider", "model")
_BUDGET = ("budget", "period")
_STATES = ("closed", "half_open", "open")
_PATIENCE_SECONDS = 2.0

BUILD = Family(name="sekha_build_info", says="The version that runs.", labels=("version",), kind="gauge")
CIRCUIT = Family(
    name="sekha_circuit_state",
    says="1 for the state that a model's circuit is in, 0 for the others.",
    labels=(*_MODEL, "state"),
    kind="gauge",
)
FAILURES = Family(
    name="sekha_circuit_failures",
    says="Failures in a row that a model's circuit has seen.",
    labels=_MODEL,
    kind="gauge",
)
LIMIT = Family(
    name="sekha_budget_limit_dollars", says="US dollars of a budget in each period.", labels=_BUDGET, kind="gauge"
)
LEFT = Family(
    name="sekha_budget_left_dollars",
    says="US dollars that are neither spent nor held, in this period.",
    labels=_BUDGET,
    kind="gauge",
)
LEDGER = Family(name="sekha_ledger_up", says="1 when the ledger answers.", kind="gauge")
QUEUE = Family(name="sekha_recorder_queue_bytes", says="Recorded runs that are not published yet.", kind="gauge")
PUBLISHED = Family(name="sekha_recorder_published_total", says="Recorded runs that Prefect has, of all processes.")
REFUSED = Family(
    name="sekha_recorder_refused_total", says="Recorded runs and events that Prefect did not take, of all processes."
)


async def standing(serving: Serving) -> list[str]:
    """The lines on circuits, budgets and what is recorded."""
    return [
        *BUILD.lines([((sekha_version(),), 1)]),
        *_circuits(serving),
        *await _budgets(serving),
        *_recorder(serving),
    ]


def _circuits(serving: Serving) -> Iterator[str]:
    if serving.circuits is None:
        return
    found = serving.circuits.snapshot()
    circuits = {(model.provider_id, model.id): found.get(model.name, CLOSED) for model in serving.resources.registry}
    yield from CIRCUIT.lines(
        ((*name, state), circuit.state == state) for name, circuit in circuits.items() for state in _STATES
    )
    yield from FAILURES.lines((name, circuit.failures) for name, circuit in circuits.items())


async def _budgets(serving: Serving) -> list[str]:
    budgets = serving.resources.budgets
    limits = LIMIT.lines(((each.name, each.period), float(each.limit)) for each in budgets)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            left = [(each, await _left(serving, each)) for each in budgets]
    except (LedgerError, TimeoutError):
        # What was left a while ago is not what is left, so nothing is said.
        return [*limits, *LEDGER.lines([((), 0)])]
    said = LEFT.lines(((each.name, each.period), float(dollars)) for each, dollars in left)
    return [*limits, *said, *LEDGER.lines([((), 1)])]


async def _left(serving: Serving, budget: Budget) -> Decimal:
    ledger = await serving.resources.ledger()
    spent, held = await ledger.spent(budget, at=serving.resources.now())
    return remaining(budget, spent, held)


def _recorder(serving: Serving) -> Iterator[str]:
    if serving.recorder is None:
        return
    stats = serving.recorder.stats
    for family, value in (
        (QUEUE, stats.queued_bytes),
        (PUBLISHED, stats.published),
        (REFUSED, stats.refused),
    ):
        yield from family.lines([((), value)])
