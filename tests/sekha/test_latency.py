from __future__ import annotations

import pytest

from sekha.latency import Latencies


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_latency_is_a_mean_in_which_the_older_counts_less() -> None:
    clock = Clock()
    latencies = Latencies(clock=clock, half_life_seconds=60)
    latencies.observe("a/m", 1.0)
    clock.now += 60
    latencies.observe("a/m", 4.0)

    assert latencies.seconds() == {"a/m": pytest.approx((0.5 * 1 + 4) / 1.5)}


def test_many_answers_at_once_count_alike() -> None:
    latencies = Latencies(clock=Clock())
    for seconds in (1.0, 2.0, 3.0):
        latencies.observe("a/m", seconds)

    assert latencies.seconds() == {"a/m": pytest.approx(2.0)}


def test_what_was_handed_out_does_not_change_and_is_renewed_each_second() -> None:
    clock = Clock()
    latencies = Latencies(clock=clock)
    latencies.observe("a/m", 1.0)
    first = latencies.seconds()

    latencies.observe("b/m", 1.0)

    assert latencies.seconds() is first
    assert first.keys() == {"a/m"}
    clock.now += 1
    assert latencies.seconds().keys() == {"a/m", "b/m"}


def test_a_model_that_has_not_answered_for_long_is_unknown_again() -> None:
    clock = Clock()
    latencies = Latencies(clock=clock, half_life_seconds=60)
    latencies.observe("a/m", 30.0)

    clock.now += 600

    assert latencies.seconds() == {}
