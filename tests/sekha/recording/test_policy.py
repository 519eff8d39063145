"""Which requests are recorded, at a clock and with dice that are ours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from sekha.recording.policy import Policy

KEEP = ("failed", "fallback", "refused", "slow")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def policy(clock: Clock | None = None, **changes: Any) -> Policy:
    settings: dict[str, Any] = {"sample": 1.0, "max_per_second": 50.0, "keep": KEEP}
    dice = random.Random(7).random
    return Policy(**{**settings, **changes}, clock=clock or Clock(), random=dice)


def test_everything_is_recorded_up_to_the_rate_and_sampled_beyond_it() -> None:
    clock = Clock()
    under, over = policy(clock), policy(clock)
    taken = {"under": 0, "over": 0}

    for tick in range(10_000):
        clock.now = tick / 1_000
        taken["under"] += tick % 25 == 0 and under.wants("answered", 0.2)
        taken["over"] += over.wants("answered", 0.2)

    assert taken["under"] == 400
    assert taken["over"] == pytest.approx(10 * 50 + 50, abs=2)


def test_a_sample_is_a_share_of_all_requests() -> None:
    tenth = policy(sample=0.1, max_per_second=1e9)

    taken = sum(tenth.wants("answered", 0.2) for _ in range(20_000))

    assert taken == pytest.approx(2_000, rel=0.1)


@pytest.mark.parametrize("outcome", ["failed", "fallback", "refused"])
def test_what_is_kept_is_recorded_whatever_the_sample_and_the_rate(outcome: Any) -> None:
    nothing = policy(sample=0.0, max_per_second=0.1)

    assert all(nothing.wants(outcome, 0.2) for _ in range(1_000))
    assert not nothing.wants("answered", 0.2)
    assert not nothing.wants("cancelled", 0.2)


def test_what_is_not_named_is_sampled_like_the_rest() -> None:
    assert not policy(sample=0.0, keep=()).wants("failed", 60.0)


def test_slow_is_the_slowest_hundredth_of_what_was_seen() -> None:
    dice = random.Random(3)
    keeps_slow = policy(sample=0.0)
    for _ in range(30_000):
        keeps_slow.wants("answered", dice.expovariate(1 / 4.0))

    taken = [seconds for _ in range(20_000) if keeps_slow.wants("answered", seconds := dice.expovariate(1 / 4.0))]

    assert len(taken) == pytest.approx(200, rel=0.3)
    assert min(taken) > 12


def test_nothing_within_a_second_is_slow() -> None:
    keeps_slow = policy(sample=0.0)

    assert not any(keeps_slow.wants("answered", 0.9) for _ in range(1_000))
    assert keeps_slow.wants("answered", 1.1)


def test_a_sink_that_bears_less_lowers_the_rate_and_gives_it_back() -> None:
    clock = Clock()
    limited = policy(clock)
    limited.limit(4.0)
    taken = [0, 0]

    for half in (0, 1):
        for tick in range(10_000):
            clock.now = half * 10 + tick / 1_000
            taken[half] += limited.wants("answered", 0.2)
        limited.limit(None)

    assert taken[0] == pytest.approx(44, abs=2)
    assert taken[1] == pytest.approx(500, abs=52)
