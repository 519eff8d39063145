from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sekha.rates import ProviderRates, RateLimit
from sekha.registry import Limits, ProviderSpec, Registry


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- one limit -----------------------------------------------------------------------------


def test_a_minutes_share_may_pass_at_once_and_then_nothing_for_a_minute() -> None:
    clock = Clock(1000.25)
    limit = RateLimit(clock=clock, requests_per_minute=3)

    for _ in range(3):
        assert limit.wait() == 0
        limit.take()

    assert limit.wait() == 60.75
    clock.now += 60.75
    assert limit.wait() == 0


def test_the_wait_is_for_as_much_as_the_request_needs() -> None:
    clock = Clock()
    limit = RateLimit(clock=clock, tokens_per_minute=100)
    limit.take(60)
    clock.now += 10
    limit.take(40)

    assert limit.wait(0) == 0
    assert limit.wait(60) == 51
    assert limit.wait(61) == 61
    assert limit.wait(101) == math.inf


def test_looking_takes_nothing() -> None:
    limit = RateLimit(clock=Clock(), requests_per_minute=1)

    assert [limit.wait() for _ in range(3)] == [0, 0, 0]


def test_no_limit_lets_everything_pass() -> None:
    limit = RateLimit(clock=Clock())

    limit.take(10**9)

    assert limit.wait(10**9) == 0


def test_true_tokens_take_the_place_of_estimated_ones_wherever_they_were_counted() -> None:
    clock = Clock()
    limit = RateLimit(clock=clock, tokens_per_minute=100)
    taken = limit.take(90)
    clock.now += 30

    assert limit.wait(20) == 31
    assert limit.correct(taken, 50).tokens == 50
    assert limit.wait(20) == 0
    clock.now += 31
    assert limit.wait(100) == 0


def test_a_request_that_was_never_sent_is_given_back() -> None:
    limit = RateLimit(clock=Clock(), requests_per_minute=1, tokens_per_minute=10)
    taken = limit.take(10)

    limit.give_back(taken)

    assert limit.wait(10) == 0


def test_what_is_corrected_or_given_back_after_its_minute_changes_nothing() -> None:
    clock = Clock()
    limit = RateLimit(clock=clock, requests_per_minute=1, tokens_per_minute=10)
    taken = limit.take(10)
    clock.now += 61
    limit.take(10)

    limit.correct(taken, 0)
    limit.give_back(taken)

    assert limit.wait(1) == 61


steps = st.tuples(st.floats(0, 90), st.integers(0, 60), st.sampled_from(["take", "take", "take", "back", "more"]))


@given(st.integers(1, 8), st.integers(10, 100), st.lists(steps, max_size=60), st.floats(0, 1))
def test_no_minute_whenever_it_begins_lets_more_pass_than_the_limit(
    requests: int, tokens: int, schedule: list[tuple[float, int, str]], start: float
) -> None:
    clock = Clock(start)
    limit = RateLimit(clock=clock, requests_per_minute=requests, tokens_per_minute=tokens)
    passed: list[tuple[float, int]] = []

    for pause, wanted, then in schedule:
        clock.now += pause
        wait = limit.wait(wanted)
        if wanted > tokens:
            assert wait == math.inf
        elif wait:
            assert wait <= 61
            clock.now += wait
            assert limit.wait(wanted) == 0
            wait = 0
        if wait == 0:
            taken = limit.take(wanted)
            if then == "back":
                limit.give_back(taken)
            else:
                # Correcting downwards lets more pass; what really had fewer tokens is counted with fewer.
                really = wanted // 2 if then == "more" else wanted
                limit.correct(taken, really)
                passed.append((clock.now, really))

    for begins, _ in passed:
        minute = [amount for at, amount in passed if begins <= at < begins + 60]
        assert len(minute) <= requests
        assert sum(minute) <= tokens


# --- those of all providers ----------------------------------------------------------------


def registry(**limits: Limits) -> Registry:
    return Registry(
        providers={name: ProviderSpec(id=name, kind="openai", limits=each) for name, each in limits.items()}
    )


def test_a_provider_is_throttled_when_its_own_limit_is_reached() -> None:
    clock = Clock()
    rates = ProviderRates(registry(a=Limits(2), b=Limits(None, 100), c=Limits()), clock=clock)

    assert rates.throttled(10) == {}
    rates.take("a", 10)
    rates.take("a", 10)
    rates.take("b", 95)
    assert rates.take("c", 10**9) is None

    assert rates.throttled(10) == {"a": 61, "b": 61}
    assert rates.throttled(5) == {"a": 61}
    assert rates.throttled(101) == {"a": 61, "b": math.inf}
    clock.now += 61
    assert rates.throttled(10) == {}


def test_a_correction_upwards_throttles_too() -> None:
    rates = ProviderRates(registry(a=Limits(None, 100)), clock=Clock())
    taken = rates.take("a", 1)
    assert taken is not None

    rates.correct("a", taken, 98)

    assert rates.throttled(3) == {"a": 61}


def test_what_is_given_back_throttles_no_longer() -> None:
    rates = ProviderRates(registry(a=Limits(1)), clock=Clock())
    taken = rates.take("a", 1)
    assert taken is not None

    rates.give_back("a", taken)

    assert rates.throttled(1) == {}


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.floats(0, 40)), max_size=40), st.integers(0, 110)
)
def test_looking_at_the_busy_ones_alone_misses_nobody(calls: list[tuple[str, int, float]], wanted: int) -> None:
    clock = Clock()
    limits = {"a": Limits(3, 100), "b": Limits(1)}
    rates = ProviderRates(registry(**limits), clock=clock)
    alone = {
        name: RateLimit(
            clock=clock, requests_per_minute=each.requests_per_minute, tokens_per_minute=each.tokens_per_minute
        )
        for name, each in limits.items()
    }

    for name, tokens, pause in calls:
        rates.take(name, tokens)
        alone[name].take(tokens)
        clock.now += pause

        assert rates.throttled(wanted) == {each: wait for each, limit in alone.items() if (wait := limit.wait(wanted))}
