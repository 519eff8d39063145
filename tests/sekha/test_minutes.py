"""A limit that several worker processes keep together, in memory that they share."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.errors import SekhaError
from sekha.minutes import SharedMinutes
from sekha.rates import ProviderRates, RateLimit
from sekha.registry import Limits, ProviderSpec, Registry


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limits(folder: Path, clock: Clock, workers: int, name: str = "key:one", **most: int) -> list[RateLimit]:
    """The same limit, as each worker has it."""
    return [
        RateLimit(clock=clock, minute=SharedMinutes(folder, worker, workers).of(name), **most)
        for worker in range(workers)
    ]


def test_one_worker_may_use_all_of_a_limit_and_the_others_see_it_at_once(tmp_path: Path) -> None:
    clock = Clock(1000.25)
    one, other, third = limits(tmp_path, clock, 3, requests_per_minute=3)

    for _ in range(3):
        assert one.wait() == 0
        one.take()

    assert [each.wait() for each in (one, other, third)] == [60.75] * 3
    clock.now += 60.75
    assert [each.wait() for each in (third, other, one)] == [0] * 3


def test_tokens_that_another_worker_corrects_or_gives_back_are_free_at_once(tmp_path: Path) -> None:
    one, other = limits(tmp_path, Clock(), 2, tokens_per_minute=100)
    taken = one.take(90)
    assert other.wait(20) == 61

    taken = one.correct(taken, 70)
    assert other.wait(20) == 0
    one.give_back(taken)

    assert other.wait(100) == 0


def test_a_worker_in_anothers_place_goes_on_with_its_counts(tmp_path: Path) -> None:
    clock = Clock()
    before = limits(tmp_path, clock, 2, requests_per_minute=2)
    before[1].take()
    before[1].take()

    after = limits(tmp_path, clock, 2, requests_per_minute=2)

    assert after[0].wait() == after[1].wait() == before[0].wait() == 61


def test_limits_are_told_apart_by_name_whoever_asks_for_them_first(tmp_path: Path) -> None:
    clock, names = Clock(), [f"key:{number}" for number in range(200)]
    one, other = (SharedMinutes(tmp_path, worker, 2) for worker in range(2))
    for name in names:
        RateLimit(clock=clock, minute=one.of(name), requests_per_minute=1)
    for name in reversed([*names, "key:new"]):
        if name[-1] in "7w":
            RateLimit(clock=clock, minute=other.of(name), requests_per_minute=1).take()

    used = [
        name
        for name in [*names, "key:new"]
        if RateLimit(clock=clock, minute=one.of(name), requests_per_minute=1).wait() > 0
    ]

    assert used == [name for name in [*names, "key:new"] if name[-1] in "7w"]


def test_providers_limits_are_shared_too(tmp_path: Path) -> None:
    registry = Registry(providers={"a": ProviderSpec(id="a", kind="openai", limits=Limits(2))})
    one, other = (
        ProviderRates(registry, clock=Clock(), minutes=SharedMinutes(tmp_path, worker, 2)) for worker in range(2)
    )

    assert other.throttled(1) == {}
    one.take("a", 1)
    one.take("a", 1)

    assert other.throttled(1) == {"a": 61}


def test_a_folder_that_takes_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SekhaError, match="takes no more") as caught:
        SharedMinutes(tmp_path / "nowhere", 0, 2).of("key:one")

    assert str(tmp_path / "nowhere") in str(caught.value)


steps = st.tuples(
    st.floats(0, 90), st.integers(0, 60), st.integers(0, 2), st.sampled_from(["take", "take", "take", "back", "more"])
)


@given(st.lists(steps, max_size=60), st.floats(0, 100))
def test_workers_together_let_pass_what_one_would(schedule: list[tuple[float, int, int, str]], start: float) -> None:
    clock = Clock(start)
    alone = RateLimit(clock=clock, requests_per_minute=4, tokens_per_minute=80)
    with tempfile.TemporaryDirectory() as folder:
        several = limits(Path(folder), clock, 3, requests_per_minute=4, tokens_per_minute=80)

        for pause, tokens, at, then in schedule:
            clock.now += pause
            waits = {each.wait(tokens) for each in several}
            assert waits == {alone.wait(tokens)}
            if math.isinf(wait := waits.pop()):
                continue
            clock.now += wait
            taken = several[at].take(tokens), alone.take(tokens)
            if then == "back":
                several[at].give_back(taken[0])
                alone.give_back(taken[1])
            elif then == "more":
                several[at].correct(taken[0], tokens // 2)
                alone.correct(taken[1], tokens // 2)
