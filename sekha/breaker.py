"""When a provider that keeps failing is left alone, and how it comes back: pure functions of one circuit.

    closed     everybody calls; `failure_threshold` failures in a row open it
    open       nobody calls for `timeout_seconds`
    half_open  one call at a time, the probe; `success_threshold` probes in a row close it, one that fails opens it

Only what a circuit in its present state let through tells it anything. A call that began before the circuit
opened and ends after it closed says how the provider was then, so that a provider that is back is not shut
out again by the time-outs of its bad hour.

Times are seconds since 1970, since processes and machines compare them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, assert_never

__all__ = [
    "CLOSED",
    "BreakerRules",
    "Circuit",
    "State",
    "admit",
    "failed",
    "given_back",
    "later",
    "opened_by",
    "renewed",
    "succeeded",
    "wait_seconds",
]

State: TypeAlias = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """The file's `routing.circuit_breaker`."""

    failure_threshold: int = 3
    timeout_seconds: float = 60.0
    success_threshold: int = 2
    lease_seconds: float = 10.0
    """How long a probe is taken to be under way without a word from its process, which may have died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Circuit:
    """Whether a model may be called at a provider."""

    state: State = "closed"
    failures: int = 0
    """In a row."""
    successes: int = 0
    """Probes that succeeded in a row."""
    since: float = 0.0
    """When it came into its state; 0 for one that never left it."""
    last_failure_at: float | None = None
    error: str | None = None
    """The code of its last failure."""
    probe: str | None = None
    """Who probes now."""
    probe_until: float | None = None
    """When the probe counts as lost, unless it is renewed."""


CLOSED = Circuit()


def failed(
    circuit: Circuit, rules: BreakerRules, at: float, *, error: str, began_at: float, probe: str | None = None
) -> Circuit:
    """Count a call that failed."""
    match circuit.state:
        case "closed":
            if probe is None and began_at < circuit.since:
                return circuit
            failures = circuit.failures + 1
            hurt = replace(circuit, failures=failures, last_failure_at=at, error=error)
            return replace(hurt, state="open", since=at) if failures >= rules.failure_threshold else hurt
        case "half_open":
            if probe is None:
                return circuit
            failures = circuit.failures + 1
            return Circuit(state="open", failures=failures, since=at, last_failure_at=at, error=error)
        case "open":
            return circuit
        case _:
            assert_never(circuit.state)


def succeeded(circuit: Circuit, rules: BreakerRules, at: float, *, probe: str | None = None) -> Circuit:
    """Count a call that was answered. Half open, only the one probe that the circuit knows of counts, and once."""
    match circuit.state:
        case "closed":
            return replace(circuit, failures=0) if circuit.failures else circuit
        case "half_open":
            if probe is None or circuit.probe != probe:
                return circuit
            successes = circuit.successes + 1
            if successes < rules.success_threshold:
                return replace(circuit, successes=successes, probe=None, probe_until=None)
            return Circuit(since=at, last_failure_at=circuit.last_failure_at, error=circuit.error)
        case "open":
            return circuit
        case _:
            assert_never(circuit.state)


def admit(circuit: Circuit, rules: BreakerRules, at: float, *, probe: str) -> tuple[Circuit, bool]:
    """Say whether a call may go; where the circuit is not closed it goes as `probe`, for which a place is taken."""
    if circuit.state == "closed":
        return circuit, True
    if wait_seconds(circuit, rules, at) > 0:
        return circuit, False
    if circuit.state == "open":
        circuit = replace(circuit, state="half_open", successes=0, since=at)
    return replace(circuit, probe=probe, probe_until=at + rules.lease_seconds), True


def wait_seconds(circuit: Circuit, rules: BreakerRules, at: float) -> float:
    """How long until a call may go, as far as is known; 0 when one may go now."""
    match circuit.state:
        case "closed":
            return 0.0
        case "open":
            # Clocks are set back now and then, and a circuit may not stay open for as long as that takes to catch up.
            passed = abs(at - circuit.since)
            return max(rules.timeout_seconds - passed, 0.0)
        case "half_open":
            left = circuit.probe_until - at if circuit.probe_until is not None else 0.0
            # Here too, with room for machines whose clocks differ.
            return left if 0 < left <= 2 * rules.lease_seconds else 0.0
        case _:
            assert_never(circuit.state)


def renewed(circuit: Circuit, rules: BreakerRules, at: float, *, probe: str) -> Circuit:
    """Say that the probe is still under way."""
    return replace(circuit, probe_until=at + rules.lease_seconds) if circuit.probe == probe else circuit


def given_back(circuit: Circuit, *, probe: str) -> Circuit:
    """Free the place of a probe that ended without saying anything about the provider."""
    return replace(circuit, probe=None, probe_until=None) if circuit.probe == probe else circuit


def opened_by(circuit: Circuit, *, other: Circuit) -> Circuit:
    """Open a circuit that another process found closed and opened; one that is not closed knows better."""
    return other if circuit.state == "closed" else circuit


def later(circuit: Circuit, *, other: Circuit) -> Circuit:
    """Whichever came into its state later, of two accounts that lost sight of each other."""
    return other if other.since > circuit.since else circuit
