from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sekha.breaker import (
    CLOSED,
    BreakerRules,
    Circuit,
    admit,
    failed,
    given_back,
    later,
    opened_by,
    renewed,
    succeeded,
    wait_seconds,
)

RULES = BreakerRules(failure_threshold=3, timeout_seconds=60.0, success_threshold=2, lease_seconds=10.0)


def fail(circuit: Circuit, at: float, *, times: int = 1, probe: str | None = None) -> Circuit:
    for _ in range(times):
        circuit = failed(circuit, RULES, at, error="provider_unavailable", began_at=at, probe=probe)
    return circuit


def opened(at: float = 1000.0) -> Circuit:
    return fail(CLOSED, at, times=3)


def probing(at: float = 1060.0, probe: str = "p") -> Circuit:
    circuit, admitted = admit(opened(at - 60), RULES, at, probe=probe)
    assert admitted
    return circuit


def test_failures_in_a_row_open_it() -> None:
    circuit = fail(CLOSED, 1000.0, times=2)

    assert circuit.state == "closed"
    assert fail(circuit, 1001.0) == Circuit(
        state="open", failures=3, since=1001.0, last_failure_at=1001.0, error="provider_unavailable"
    )


def test_an_answer_between_failures_starts_the_count_again() -> None:
    circuit = succeeded(fail(CLOSED, 1000.0, times=2), RULES, 1000.5)

    assert fail(circuit, 1001.0, times=2).state == "closed"


def test_an_open_circuit_admits_nobody_until_its_time_has_passed() -> None:
    circuit = opened(1000.0)

    assert admit(circuit, RULES, 1059.9, probe="p") == (circuit, False)
    assert wait_seconds(circuit, RULES, 1012.0) == 48
    assert wait_seconds(circuit, RULES, 1060.0) == 0


def test_exactly_one_probe_goes_through_half_open() -> None:
    circuit = probing(1060.0, "first")

    again, admitted = admit(circuit, RULES, 1060.0, probe="second")

    assert (circuit.state, circuit.probe) == ("half_open", "first")
    assert (again, admitted) == (circuit, False)


def test_probes_that_succeed_in_a_row_close_it() -> None:
    once = succeeded(probing(1060.0, "first"), RULES, 1061.0, probe="first")
    circuit, _ = admit(once, RULES, 1061.0, probe="second")

    closed = succeeded(circuit, RULES, 1062.0, probe="second")

    assert (once.state, once.successes) == ("half_open", 1)
    assert closed == Circuit(since=1062.0, last_failure_at=1000.0, error="provider_unavailable")


def test_a_probe_that_fails_opens_it_again_for_the_whole_time() -> None:
    circuit = fail(succeeded(probing(1060.0), RULES, 1061.0, probe="p"), 1062.0, probe="p")

    assert (circuit.state, circuit.successes, circuit.since) == ("open", 0, 1062.0)
    assert wait_seconds(circuit, RULES, 1062.0) == 60


def test_one_probe_that_is_noted_twice_counts_once() -> None:
    circuit = succeeded(probing(), RULES, 1061.0, probe="p")

    assert succeeded(circuit, RULES, 1062.0, probe="p") == circuit


def test_a_probe_whose_process_died_is_lost_after_its_lease() -> None:
    circuit = probing(1060.0, "dead")

    assert not admit(circuit, RULES, 1069.9, probe="next")[1]
    assert admit(circuit, RULES, 1070.0, probe="next")[1]


def test_a_probe_that_is_renewed_is_not_lost() -> None:
    circuit = renewed(probing(1060.0), RULES, 1069.0, probe="p")

    assert not admit(circuit, RULES, 1078.9, probe="next")[1]


def test_a_lost_probe_closes_nothing_and_frees_nobody_elses_place() -> None:
    circuit, _ = admit(probing(1060.0, "lost"), RULES, 1070.0, probe="next")

    assert succeeded(circuit, RULES, 1071.0, probe="lost") == circuit
    assert given_back(circuit, probe="lost") == circuit
    assert renewed(circuit, RULES, 1071.0, probe="lost") == circuit


def test_a_probe_that_is_given_back_lets_the_next_through_at_once() -> None:
    circuit = given_back(probing(1060.0, "first"), probe="first")

    assert circuit.state == "half_open"
    assert admit(circuit, RULES, 1060.1, probe="second")[1]


@pytest.mark.parametrize("circuit", [opened(), probing()], ids=["open", "half open"])
def test_calls_from_before_it_opened_say_nothing(circuit: Circuit) -> None:
    assert fail(circuit, 1061.0) == circuit
    assert succeeded(circuit, RULES, 1061.0) == circuit


def test_time_outs_of_calls_from_before_it_closed_do_not_open_it_again() -> None:
    closed = Circuit(since=1062.0)

    late = failed(closed, RULES, 1070.0, error="provider_timeout", began_at=1010.0)

    assert late == closed


def test_a_probes_stream_that_breaks_after_it_closed_the_circuit_counts() -> None:
    closed = Circuit(since=1062.0)

    assert failed(closed, RULES, 1070.0, error="stream_broken", began_at=1060.0, probe="p").failures == 1


def test_a_clock_that_is_set_back_keeps_nothing_open_for_longer_than_twice_its_time() -> None:
    assert wait_seconds(opened(5000.0), RULES, 1000.0) == 0
    assert wait_seconds(opened(1030.0), RULES, 1000.0) == 30
    assert wait_seconds(probing(5000.0), RULES, 1000.0) == 0


def test_who_finds_a_circuit_open_already_leaves_it_as_it_is() -> None:
    theirs, ours = opened(1000.0), opened(1000.3)

    assert opened_by(theirs, other=ours) == theirs
    assert opened_by(Circuit(since=900.0), other=ours) == ours


def test_of_two_accounts_the_later_change_holds() -> None:
    assert later(opened(1000.0), other=Circuit(since=1100.0)) == Circuit(since=1100.0)
    assert later(opened(1000.0), other=CLOSED) == opened(1000.0)


class BreakerMachine(RuleBasedStateMachine):
    """Any order of calls, against what the rules say when they are read out loud."""

    calls = Bundle("calls")
    probes = Bundle("probes")

    def __init__(self) -> None:
        super().__init__()
        self.circuit = CLOSED
        self.now = 1000.0
        self.named = 0
        # What an observer with a notebook knows.
        self.state = "closed"
        self.changed = 0.0
        self.in_a_row = 0
        self.good_probes = 0
        self.under_way: dict[str, float] = {}

    def to(self, state: str) -> None:
        self.state, self.changed = state, self.now
        self.in_a_row = self.good_probes = 0
        self.under_way.clear()

    def alive(self) -> list[str]:
        return [probe for probe, until in self.under_way.items() if self.now < until]

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.5, 10.0, 59.5, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=calls)
    def call(self) -> object:
        if self.state != "closed":
            return multiple()
        assert admit(self.circuit, RULES, self.now, probe="unused") == (self.circuit, True)
        return self.now

    @rule(target=probes)
    def probe(self) -> object:
        if self.state == "closed":
            return multiple()
        self.named += 1
        name = f"probe {self.named}"
        self.circuit, admitted = admit(self.circuit, RULES, self.now, probe=name)
        if self.state == "open":
            assert admitted == (self.now - self.changed >= 60)
            if admitted:
                self.to("half_open")
        else:
            assert admitted == (not self.alive())
        if not admitted:
            return multiple()
        self.under_way = {name: self.now + 10}
        return name

    @rule(began_at=consumes(calls), well=st.booleans())
    def call_ends(self, began_at: float, well: bool) -> None:
        if well:
            self.circuit = succeeded(self.circuit, RULES, self.now)
        else:
            self.circuit = failed(self.circuit, RULES, self.now, error="x", began_at=began_at)
        if self.state != "closed" or (not well and began_at < self.changed):
            return
        self.in_a_row = 0 if well else self.in_a_row + 1
        if self.in_a_row == 3:
            self.to("open")

    @rule(name=consumes(probes), ends=st.sampled_from(["well", "badly", "given back"]))
    def probe_ends(self, name: str, ends: str) -> None:
        known = self.under_way.pop(name, None) is not None
        match ends:
            case "well":
                self.circuit = succeeded(self.circuit, RULES, self.now, probe=name)
                if self.state == "half_open":
                    self.good_probes += known
                    if self.good_probes == 2:
                        self.to("closed")
                elif self.state == "closed":
                    self.in_a_row = 0
            case "badly":
                self.circuit = failed(self.circuit, RULES, self.now, error="x", began_at=self.now, probe=name)
                if self.state == "half_open":
                    self.to("open")
                elif self.state == "closed":
                    self.in_a_row += 1
                    if self.in_a_row == 3:
                        self.to("open")
            case _:
                self.circuit = given_back(self.circuit, probe=name)

    @rule(name=probes)
    def probe_renews(self, name: str) -> None:
        self.circuit = renewed(self.circuit, RULES, self.now, probe=name)
        if name in self.under_way:
            self.under_way[name] = self.now + 10

    @invariant()
    def both_agree(self) -> None:
        assert (self.circuit.state, self.circuit.since) == (self.state, self.changed)
        if self.state == "closed":
            assert self.circuit.failures == self.in_a_row
            assert wait_seconds(self.circuit, RULES, self.now) == 0
        elif self.state == "open":
            assert wait_seconds(self.circuit, RULES, self.now) == max(self.changed + 60 - self.now, 0)
        else:
            assert self.circuit.successes == self.good_probes
            assert (wait_seconds(self.circuit, RULES, self.now) > 0) == bool(self.alive())


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
