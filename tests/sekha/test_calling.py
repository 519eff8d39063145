from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.breaker import BreakerRules
from sekha.calling import Answered, Retries, call_in_turn
from sekha.circuits import Circuits
from sekha.errors import (
    BadReply,
    CircuitOpen,
    ContentRefused,
    DimensionMismatch,
    FieldUnsupported,
    ProviderAuthFailed,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    StreamBroken,
)
from sekha.pauses import Pauses
from sekha.pricing import Estimate
from sekha.registry import Model
from sekha.routing import Candidate
from tests.fixtures.pipeline import FakeTime

NOTHING = Estimate(expected=Decimal(0), worst_case=Decimal(0), input_tokens=0, output_tokens=0, context_tokens=0)


def candidates(names: str) -> list[Candidate]:
    return [
        Candidate(model=Model(id="m", provider_id=name, tasks=("chat_small",)), estimate=NOTHING, reason="")
        for name in names
    ]


class Script:
    """Plays what each provider does at each of its turns; who has nothing left answers."""

    def __init__(self, time: FakeTime, **acts: Sequence[ProviderError]) -> None:
        self.time = time
        self.acts = {name: list(errors) for name, errors in acts.items()}
        self.asked: list[tuple[str, float]] = []
        self.seconds_each = 0.0
        self.allowed: list[float] = []
        self.circuits: Circuits | None = None
        self.limits: Callable[[Candidate], float] | None = None
        self.pauses: Pauses | None = None
        self.affords: Callable[[Candidate], bool] | None = None
        self.limits_first = False

    async def call(self, candidate: Candidate, seconds: float) -> str:
        name = candidate.model.provider_id
        self.asked.append((name, self.time.seconds - 1000.0))
        self.allowed.append(seconds)
        self.time.seconds += min(self.seconds_each, seconds)
        if self.acts.get(name):
            raise self.acts[name].pop(0)
        return f"{name} answers"

    async def run(self, names: str, *, rounds: int = 3, deadline: float = 60.0, whole: bool = True) -> Answered[str]:
        return await call_in_turn(
            candidates(names),
            self.call,
            retries=Retries(rounds=rounds, base_wait_seconds=1.0, longest_wait_seconds=4.0),
            clock=self.time.clock,
            deadline_seconds=deadline,
            circuits=self.circuits,
            limits=self.limits,
            limits_first=self.limits_first,
            pauses=self.pauses,
            affords=self.affords,
            whole=whole,
        )

    @property
    def order(self) -> str:
        return "".join(name for name, _ in self.asked)


class Guarded(Script):
    """A script whose calls go through circuits."""

    def __init__(self, time: FakeTime, **acts: Sequence[ProviderError]) -> None:
        super().__init__(time, **acts)
        rules = BreakerRules(failure_threshold=3, timeout_seconds=60, success_threshold=2)
        self.circuits: Circuits = Circuits(rules, now=lambda: time.seconds)

    def open(self, name: str) -> None:
        for _ in range(3):
            self.circuits.note(f"{name}/m", down(name))

    def open_in_the_next_wait(self, name: str) -> None:
        """Have others open a circuit while a call waits."""
        sleep = self.time.sleep

        async def others_fail_meanwhile(seconds: float) -> None:
            await sleep(seconds)
            self.open(name)

        self.time.sleep = others_fail_meanwhile  # type: ignore[method-assign]

    def failures(self, name: str) -> int:
        return self.circuits.snapshot()[f"{name}/m"].failures


def down(name: str, **fields: float) -> ProviderUnavailable:
    return ProviderUnavailable(provider_id=name, **fields)  # type: ignore[arg-type]


def limited(name: str, seconds: float | None = None) -> RateLimited:
    return RateLimited(provider_id=name, retry_after_seconds=seconds)


async def test_the_first_that_answers_ends_it() -> None:
    script = Script(FakeTime(), a=[down("a")])

    answered = await script.run("abc")

    assert (answered.value, script.order) == ("b answers", "ab")
    assert [(each.provider_id, each.error) for each in answered.attempts] == [
        ("a", "provider_unavailable"),
        ("b", None),
    ]


async def test_a_failed_provider_waits_until_every_other_had_its_turn() -> None:
    script = Script(FakeTime(), a=[down("a")] * 2, b=[down("b")] * 2)

    await script.run("ab")

    assert script.order == "ababa"


async def test_waits_grow_and_are_drawn_by_chance_up_to_the_longest() -> None:
    time = FakeTime(random=0.5)
    script = Script(time, a=[down("a")] * 9)

    with pytest.raises(ProviderUnavailable):
        await script.run("a", rounds=6)

    assert time.slept == [0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "error",
    [
        ContentRefused(provider_id="a"),
        StreamBroken(provider_id="a"),
        DimensionMismatch(wanted=1, returned=2, provider_id="a", model_id="m"),
    ],
)
async def test_an_error_that_no_other_provider_would_mend_asks_nobody_else(error: ProviderError) -> None:
    script = Script(FakeTime(), b=[down("b")], a=[error])

    with pytest.raises(type(error)) as caught:
        await script.run("bac")

    assert script.order == "ba"
    assert [each.error for each in caught.value.attempts] == ["provider_unavailable", error.code]


async def test_what_would_fail_again_is_not_asked_again() -> None:
    script = Script(FakeTime(), a=[ProviderAuthFailed(provider_id="a")], b=[down("b"), down("b")])

    await script.run("ab")

    assert script.order == "abbb"


async def test_with_every_candidate_failing_the_error_lists_every_attempt() -> None:
    script = Script(FakeTime(), a=[down("a")] * 9, b=[BadReply(provider_id="b")] * 9)

    with pytest.raises(BadReply) as caught:
        await script.run("ab", rounds=2)

    assert [each.provider_id for each in caught.value.attempts] == ["a", "b", "a", "b"]


async def test_the_error_of_who_may_yet_succeed_is_the_one_that_is_raised() -> None:
    script = Script(FakeTime(), a=[limited("a", 3600)], b=[ProviderAuthFailed(provider_id="b")])

    with pytest.raises(RateLimited) as caught:
        await script.run("ab")

    assert caught.value.retry_after_seconds == 3600
    assert [each.error for each in caught.value.attempts] == ["rate_limited", "provider_auth_failed"]


@pytest.mark.parametrize("order", ["ab", "ba"])
async def test_who_was_not_asked_does_not_hide_why_the_others_failed(order: str) -> None:
    script = Script(FakeTime(), a=[ProviderAuthFailed(provider_id="a")], b=[FieldUnsupported(provider_id="b")])

    with pytest.raises(ProviderAuthFailed) as caught:
        await script.run(order)

    assert len(caught.value.attempts) == 2


async def test_retry_after_is_waited_for() -> None:
    script = Script(FakeTime(), a=[limited("a", 7)])

    await script.run("a")

    assert script.asked == [("a", 0.0), ("a", 7.5)]


@pytest.mark.parametrize(("chance", "at"), [(0.0, 7.0), (0.5, 7.25), (0.99, 7.495)])
async def test_those_who_were_told_the_same_do_not_come_back_at_once_and_none_too_late(
    chance: float, at: float
) -> None:
    script = Script(FakeTime(random=chance), a=[limited("a", 7)])

    await script.run("a", deadline=7.5 / 0.9)

    assert script.asked[1] == ("a", pytest.approx(at))


async def test_a_long_retry_after_holds_no_other_provider_up() -> None:
    script = Script(FakeTime(), a=[limited("a", 3600)], b=[down("b")] * 2)

    answered = await script.run("ab")

    assert (answered.value, script.order) == ("b answers", "abbb")
    assert script.time.seconds < 1010


async def test_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    time = FakeTime()
    script = Script(time, a=[limited("a", 61)])

    with pytest.raises(RateLimited):
        await script.run("a", deadline=60)

    assert time.slept == []


async def test_whoever_has_no_room_is_passed_over_and_has_its_turn_when_there_is() -> None:
    time = FakeTime()
    script = Script(time, a=[down("a")] * 3)
    script.limits = lambda candidate: max(1009.0 - time.seconds, 0.0) if candidate.model.provider_id == "b" else 0.0

    answered = await script.run("ab")

    assert (answered.value, script.order) == ("b answers", "aaab")
    assert script.asked[-1][1] >= 9


@pytest.mark.parametrize(("wait", "retry_after"), [(40.0, 40.0), (math.inf, None)])
async def test_who_has_no_room_in_time_is_not_waited_for_and_the_error_says_how_long(
    wait: float, retry_after: float | None
) -> None:
    time = FakeTime()
    script = Script(time, a=[ProviderAuthFailed(provider_id="a")])
    script.limits = lambda _: wait

    with pytest.raises(ProviderError) as caught:
        await script.run("ab", deadline=20)

    assert (script.order, time.slept, caught.value.retry_after_seconds) == ("a", [], retry_after)
    assert isinstance(caught.value, ProviderAuthFailed if retry_after is None else RateLimited)
    assert [attempt.error for attempt in caught.value.attempts] == ["provider_auth_failed"]


async def test_attempts_share_one_deadline() -> None:
    script = Script(FakeTime(), a=[ProviderTimeout(provider_id="a")] * 9, b=[ProviderTimeout(provider_id="b")] * 9)
    script.seconds_each = 40

    with pytest.raises(ProviderTimeout):
        await script.run("abc", deadline=60)

    assert script.order == "ab"
    assert script.allowed == [60, 20]


async def test_a_cancelled_call_stops_at_once() -> None:
    entered = asyncio.Event()

    async def hang(candidate: Candidate, seconds: float) -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        call_in_turn(candidates("ab"), hang, retries=Retries(), clock=FakeTime().clock, deadline_seconds=1)
    )
    await entered.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


# --- circuits ------------------------------------------------------------------------------


async def test_a_candidate_whose_circuit_is_open_is_passed_over() -> None:
    script = Guarded(FakeTime())
    script.open("a")

    answered = await script.run("ab")

    assert (answered.value, script.order) == ("b answers", "b")
    assert [each.provider_id for each in answered.attempts] == ["b"]


async def test_with_every_circuit_open_nobody_is_asked_and_the_first_probe_is_named() -> None:
    script = Guarded(FakeTime())
    script.open("a")
    script.time.seconds += 20.5
    script.open("b")

    with pytest.raises(CircuitOpen, match=r"Provider 'a', model 'm', is left alone.*retry after 40 s") as caught:
        await script.run("ba")

    assert script.order == ""
    assert script.time.slept == []
    assert caught.value.retryable
    assert not caught.value.may_be_billed
    assert (caught.value.retry_after_seconds, caught.value.attempts) == (40, ())


async def test_calls_that_fail_open_the_circuit_and_those_that_answer_clear_it() -> None:
    script = Guarded(FakeTime(), a=[down("a")] * 2, b=[BadReply(provider_id="b")])

    await script.run("ab")
    before = (script.failures("a"), script.failures("b"))
    script.circuits.note("a/m", down("a"))

    assert script.order == "abab"
    assert before == (2, 0)
    assert script.circuits.open_now == {"a/m"}


async def test_a_candidate_that_a_failure_shut_is_not_waited_for() -> None:
    script = Guarded(FakeTime(), a=[down("a")] * 9)

    with pytest.raises(ProviderUnavailable) as caught:
        await script.run("a", rounds=9, deadline=600)

    assert script.order == "aaa"
    assert len(script.time.slept) == 2
    assert type(caught.value) is ProviderUnavailable


async def test_a_circuit_that_others_open_while_a_call_waits_ends_the_wait() -> None:
    script = Guarded(FakeTime(), a=[limited("a", 5)])
    script.open_in_the_next_wait("a")

    with pytest.raises(RateLimited):
        await script.run("a")

    assert script.order == "a"
    assert script.time.slept == [5.5]


async def test_what_the_caller_did_wrong_and_limits_open_nothing() -> None:
    script = Guarded(FakeTime(), a=[ContentRefused(provider_id="a")] * 9, b=[limited("b")] * 9)

    for _ in range(4):
        with pytest.raises(ContentRefused):
            await script.run("a")
    with pytest.raises(RateLimited):
        await script.run("b", rounds=9, deadline=600)

    assert script.circuits.snapshot() == {}


async def test_a_time_out_of_the_little_time_that_others_left_is_not_held_against_a_candidate() -> None:
    script = Guarded(FakeTime(), a=[ProviderTimeout(provider_id="a")], b=[ProviderTimeout(provider_id="b")])
    script.seconds_each = 40

    with pytest.raises(ProviderTimeout):
        await script.run("ab", deadline=60)

    assert script.order == "ab"
    assert set(script.circuits.snapshot()) == {"a/m"}


async def test_a_circuit_whose_time_has_passed_is_probed_by_one_call_and_closed_by_two() -> None:
    script = Guarded(FakeTime())
    script.open("a")
    script.time.seconds += 60

    first = await script.run("ab")
    between = script.circuits.snapshot()["a/m"]
    await script.run("ab")

    assert script.order == "aa"
    assert first.probe is not None
    assert (between.state, between.successes, between.probe) == ("half_open", 1, None)
    assert script.circuits.admit("a/m")


async def test_while_one_call_probes_the_others_go_elsewhere() -> None:
    script = Guarded(FakeTime())
    script.open("a")
    script.time.seconds += 60
    probing, may_end = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    async def call(candidate: Candidate, seconds: float) -> str:
        asked.append(candidate.model.provider_id)
        if candidate.model.provider_id == "a":
            probing.set()
            await may_end.wait()
        return candidate.model.provider_id

    async def one() -> str:
        answered = await call_in_turn(
            candidates("ab"),
            call,
            retries=Retries(),
            clock=script.time.clock,
            deadline_seconds=60,
            circuits=script.circuits,
        )
        return answered.value

    first = asyncio.create_task(one())
    await probing.wait()
    others = await asyncio.gather(*(one() for _ in range(9)))
    may_end.set()

    assert await first == "a"
    assert others == ["b"] * 9
    assert asked.count("a") == 1


async def test_a_probe_that_fails_falls_back_and_shuts_the_circuit_again() -> None:
    script = Guarded(FakeTime(), a=[down("a")])
    script.open("a")
    script.time.seconds += 60

    answered = await script.run("ab")

    assert (answered.value, script.order) == ("b answers", "ab")
    assert script.circuits.open_now == {"a/m"}


@pytest.mark.parametrize("ends", ["cancelled", "a bug"])
async def test_a_probe_that_is_cut_off_makes_room_for_the_next_and_notes_nothing(ends: str) -> None:
    script = Guarded(FakeTime())
    script.open("a")
    script.time.seconds += 60
    entered = asyncio.Event()

    async def call(candidate: Candidate, seconds: float) -> str:
        entered.set()
        if ends == "a bug":
            raise LookupError("a bug")
        return await asyncio.Event().wait() and ""

    task = asyncio.create_task(
        call_in_turn(
            candidates("a"),
            call,
            retries=Retries(),
            clock=script.time.clock,
            deadline_seconds=60,
            circuits=script.circuits,
        )
    )
    await entered.wait()
    task.cancel()
    with pytest.raises((asyncio.CancelledError, LookupError)):
        await task

    assert script.circuits.snapshot()["a/m"].state == "half_open"
    assert (await script.run("a")).value == "a answers"


async def test_how_a_stream_ends_is_for_its_reader_to_note() -> None:
    script = Guarded(FakeTime())
    for _ in range(2):
        script.circuits.note("a/m", down("a"))

    await script.run("a", whole=False)
    begun = script.failures("a")
    script.circuits.note("a/m", StreamBroken(provider_id="a"))

    assert begun == 2
    assert script.circuits.open_now == {"a/m"}


async def test_a_probe_that_begins_its_stream_makes_room_for_the_next() -> None:
    script = Guarded(FakeTime())
    script.open("a")
    script.time.seconds += 60

    first = await script.run("a", whole=False)
    second = await script.run("a", whole=False)

    assert first.probe
    assert second.probe
    assert script.circuits.admit("a/m")


class Noting(Circuits):
    """Circuits that remember what was noted."""

    def __init__(self, rules: BreakerRules, noted: list[tuple[str, str | None]]) -> None:
        super().__init__(rules)
        self.noted = noted

    def note(self, name: str, error: ProviderError | None, *, probe: str | None = None, seconds: float = 0.0) -> None:
        self.noted.append((name, error.code if error else None))
        super().note(name, error, probe=probe, seconds=seconds)


kinds = st.sampled_from(["down", "limited", "auth", "content"])


@given(
    acts=st.lists(st.lists(kinds, max_size=4), min_size=1, max_size=3),
    waits=st.lists(st.floats(0, 100), min_size=12, max_size=12),
    rounds=st.integers(1, 4),
    deadline=st.floats(1, 120),
    each=st.floats(0, 10),
    guarded=st.booleans(),
)
def test_whatever_fails_the_rules_hold(
    acts: list[list[str]], waits: list[float], rounds: int, deadline: float, each: float, guarded: bool
) -> None:
    time = FakeTime()
    names = "abc"[: len(acts)]
    limits = count()

    def error(kind: str, name: str) -> ProviderError:
        match kind:
            case "down":
                return down(name)
            case "limited":
                return limited(name, waits[next(limits)])
            case "auth":
                return ProviderAuthFailed(provider_id=name)
            case _:
                return ContentRefused(provider_id=name)

    errors = {name: [error(kind, name) for kind in act] for name, act in zip(names, acts, strict=True)}
    script = Script(time, **errors)
    script.seconds_each = each
    noted: list[tuple[str, str | None]] = []
    if guarded:
        script.circuits = Noting(BreakerRules(failure_threshold=2), noted)
    planned = {name: list(errors) for name, errors in script.acts.items()}

    try:
        attempts = asyncio.run(script.run(names, rounds=rounds, deadline=deadline)).attempts
    except ProviderError as failure:
        attempts = failure.attempts

    assert len(attempts) == len(script.asked)
    if guarded:
        assert noted == [(f"{attempt.provider_id}/m", attempt.error) for attempt in attempts]
    assert max(at for _, at in script.asked) <= deadline
    assert min(script.allowed) >= min(1.0, deadline / 10) - 1e-9
    for name in names:
        turns = [at for asked, at in script.asked if asked == name]
        assert len(turns) <= rounds
        for number, (turn, following) in enumerate(pairwise(turns)):
            failed = planned[name][number]
            assert failed.retryable
            assert following >= turn + (failed.retry_after_seconds or 0)


async def test_who_is_put_off_is_waited_for_where_the_others_protocol_lacks_a_field() -> None:
    script = Script(FakeTime(), a=[FieldUnsupported(provider_id="a")])
    script.limits = lambda _: 100.0

    with pytest.raises(RateLimited) as caught:
        await script.run("ab")

    assert caught.value.retryable
    assert caught.value.retry_after_seconds == 100.0
    assert [attempt.provider_id for attempt in caught.value.attempts] == ["a"]


async def test_who_may_be_asked_again_at_once_says_no_wait_of_anothers() -> None:
    script = Script(FakeTime(), a=[ProviderTimeout(provider_id="a")] * 3)
    script.limits = lambda candidate: 3600.0 if candidate.model.provider_id == "b" else 0.0

    with pytest.raises(ProviderTimeout) as caught:
        await script.run("ab")

    assert caught.value.retry_after_seconds is None


@pytest.mark.parametrize("fails", [ProviderAuthFailed, FieldUnsupported])
async def test_who_was_kept_back_and_then_failed_for_good_is_the_one_to_hear_of(fails: type[ProviderError]) -> None:
    time = FakeTime()
    script = Script(time, a=[FieldUnsupported(provider_id="a")], b=[fails(provider_id="b")])
    script.limits = lambda _: max(1007.0 - time.seconds, 0.0)

    with pytest.raises(fails) as caught:
        await script.run("ab")

    assert caught.value.provider_id == "b"
    assert [attempt.provider_id for attempt in caught.value.attempts] == ["a", "b"]


async def test_how_a_candidate_failed_last_is_what_counts() -> None:
    script = Script(FakeTime(), a=[down("a"), ProviderAuthFailed(provider_id="a")])

    with pytest.raises(ProviderAuthFailed):
        await script.run("a")

    assert script.order == "aa"


@pytest.mark.parametrize(("deadline", "seconds_each"), [(60.0, 59.5), (6.0, 5.5)])
async def test_a_call_that_would_be_cut_off_at_once_is_not_begun(deadline: float, seconds_each: float) -> None:
    script = Script(FakeTime(), a=[down("a")] * 3)
    script.seconds_each = seconds_each

    with pytest.raises(ProviderUnavailable):
        await script.run("ab", deadline=deadline)

    assert script.order == "a"


async def test_a_wait_that_is_told_is_what_is_left_of_the_shortest() -> None:
    script = Script(FakeTime(), a=[limited("a", 90)])
    script.seconds_each = 5
    script.limits = lambda candidate: 80.0 if candidate.model.provider_id == "b" else 0.0

    with pytest.raises(RateLimited) as caught:
        await script.run("ab")

    assert caught.value.provider_id == "a"
    assert caught.value.retry_after_seconds == 80.0


async def test_a_circuit_that_opens_while_its_candidate_is_paused_is_what_is_told() -> None:
    script = Guarded(FakeTime())
    script.pauses = Pauses(clock=lambda: script.time.seconds)
    script.pauses.note("a/m", 5.0)
    script.open_in_the_next_wait("a")

    with pytest.raises(CircuitOpen):
        await script.run("a")

    assert script.order == ""


async def test_who_was_kept_back_and_is_no_longer_paid_for_did_not_keep_failing() -> None:
    script = Guarded(FakeTime())
    script.limits, script.limits_first = lambda _: 5.0, True
    script.affords = lambda _: False

    with pytest.raises(RateLimited) as caught:
        await script.run("a")

    assert (script.order, caught.value.retry_after_seconds) == ("", None)


async def test_who_never_has_room_says_so_where_nobody_else_was_asked() -> None:
    script = Script(FakeTime())
    script.limits, script.limits_first = lambda _: math.inf, True

    with pytest.raises(RateLimited) as caught:
        await script.run("ab")

    assert (script.order, caught.value.retry_after_seconds) == ("", None)
