"""What a gateway tells Prefect beside its requests, so that automations can act on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sekha.breaker import CLOSED
from sekha.circuits import Circuits, Tripped
from sekha.errors import BudgetExceeded
from sekha.latency import Latencies
from sekha.registry import Registry

if TYPE_CHECKING:
    from sekha.recording.recorder import Recorder

__all__ = ["tell_of_budget", "tell_of_circuit"]

BUDGET_SECONDS = 60.0
LATELY_SECONDS = 60.0
"""What a model did before says nothing of how its provider is now."""


def tell_of_circuit(
    recorder: Recorder, registry: Registry, circuits: Circuits, latencies: Latencies, change: Tripped
) -> None:
    """Tell of a change, once for all processes, and of the outage that it may be."""
    if not change.here:
        return
    recorder.event(
        f"sekha.circuit.{_name_of(change)}",
        f"sekha.circuit.{change.name}",
        {"before": change.before, "after": change.after, "reason": change.reason},
    )
    if (change.before, change.after) == ("closed", "open"):
        _tell_of_outage(recorder, registry, circuits, latencies, change)


def tell_of_budget(recorder: Recorder, error: BudgetExceeded) -> None:
    """Tell that a budget refused a request, at most once a minute: each process for itself."""
    recorder.event(
        "sekha.budget.exhausted",
        f"sekha.budget.{error.budget}",
        {
            "limit": str(error.limit),
            "remaining": str(error.remaining),
            "needed": str(error.needed),
            "period": error.period,
            "resets": error.resets,
        },
        every_seconds=BUDGET_SECONDS,
    )


def _name_of(change: Tripped) -> str:
    match change.before, change.after:
        case "half_open", "open":
            # A probe failed, every few seconds for as long as a provider is away: that is no second failure.
            return "reopened"
        case _, "open":
            return "opened"
    return change.after


def _tell_of_outage(
    recorder: Recorder, registry: Registry, circuits: Circuits, latencies: Latencies, change: Tripped
) -> None:
    """A provider is out when each of its models that was asked lately is shut, and they are two if it has more."""
    known = circuits.snapshot()
    provider = next(
        (each for each in registry.providers.values() if change.name in {model.name for model in each.models}), None
    )
    if provider is None:
        return
    names = [model.name for model in provider.models]
    shut = [name for name in names if known.get(name, CLOSED).state != "closed"]

    def asked_lately(name: str) -> bool:
        # One that fails, and not often enough yet, tells of it when it is shut.
        failed_at = known.get(name, CLOSED).last_failure_at
        failed = failed_at is not None and change.at - failed_at <= LATELY_SECONDS
        return failed or latencies.answered_within(name, LATELY_SECONDS)

    if len(shut) >= min(2, len(names)) and not any(asked_lately(name) for name in names if name not in shut):
        recorder.event(
            "sekha.provider.outage", f"sekha.provider.{provider.id}", {"models": shut, "reason": change.reason}
        )
