"""From a configuration to what the gateway serves with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits, Tripped
from sekha.circuits_shared import SharedCircuits
from sekha.config import CircuitBreaker
from sekha.gateway.metrics import Metrics
from sekha.gateway.serving import Serving
from sekha.ledgers import lease_from, open_database
from sekha.ledgers.sql import SqlLedger
from sekha.loading import Loaded
from sekha.resources import Resources, ledger_url

if TYPE_CHECKING:
    from sekha.recording.recorder import Recorder

__all__ = ["open_serving", "state_folder"]


def state_folder(loaded: Loaded) -> Path:
    """Where a gateway keeps what it must not forget: journals, the spool, the outbox."""
    return loaded.path(".sekha/gateway")


async def open_serving(loaded: Loaded, metrics: Metrics, *, workers: int = 1) -> Serving:
    """Open what the configuration declares. Providers and store connect with their first use."""
    from sekha.recording.recorder import Recorder

    state = state_folder(loaded)
    recorder = Recorder(loaded.config.recording, state / "recording", processes=workers)
    url = ledger_url(loaded)
    database = open_database(url)
    circuits = Circuits(_rules(loaded.config.routing.circuit_breaker), shared=SharedCircuits(database))
    circuits.subscribe(partial(_tell, recorder))
    ledger = lease_from(SqlLedger(database), url, state / "journal")
    resources = Resources(loaded, ledger=ledger, circuits=circuits)
    await circuits.start()
    await recorder.start()
    return Serving(resources, metrics, recorder=recorder, at_once=True)


def _rules(section: CircuitBreaker) -> BreakerRules:
    return BreakerRules(
        failure_threshold=section.failure_threshold,
        timeout_seconds=section.timeout_secs,
        success_threshold=section.success_threshold,
    )


def _tell(recorder: Recorder, change: Tripped) -> None:
    """Let Prefect's automations hear of it, once for all processes."""
    if change.here:
        recorder.event(
            f"sekha.circuit.{change.after}",
            f"sekha.circuit.{change.name}",
            {"before": change.before, "after": change.after, "reason": change.reason},
        )
