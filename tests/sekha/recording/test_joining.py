"""Which steps Prefect is told as one."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.recording.joining import BETWEEN, JOINABLE, QUICK_SECONDS, joined
from sekha.recording.prefect_rows import steps_of
from sekha.steps.money import Money
from sekha.trace import Step
from tests.sekha.recording.conftest import QUICK_STEPS, STEPS, a_run

ESTIMATE, SELECT, RESERVE, CALL, SETTLE = QUICK_STEPS
BEFORE = "estimate_cost, select_provider, reserve_budget"


def names(*steps: Step) -> list[str]:
    return [step.name for step in joined(steps)]


def later(step: Step, seconds: float, places: int = 0) -> Step:
    """The same step, begun and ended so much later, and as many places further behind."""
    after = tuple(before + places for before in step.after)
    return step._replace(started=step.started + seconds, ended=step.ended + seconds, after=after)


def test_quick_steps_before_a_call_are_one_from_the_firsts_start_to_the_lasts_end() -> None:
    assert joined(QUICK_STEPS) == (
        Step(BEFORE, (), ESTIMATE.started, RESERVE.ended),
        CALL._replace(after=(0,)),
        SETTLE._replace(after=(0, 1)),
    )


def test_a_stream_and_an_embedding_are_joined_alike() -> None:
    opened, relayed = CALL._replace(name="open_stream"), Step("relay_stream", (1, 2, 3), CALL.ended, CALL.ended + 1)
    streamed = later(SETTLE, 1)._replace(after=(2, 4))

    assert names(ESTIMATE, SELECT, RESERVE, opened, relayed, streamed) == [
        *(BEFORE, "open_stream", "relay_stream", "settle_cost")
    ]
    assert names(ESTIMATE, SELECT, RESERVE, CALL._replace(name="embed_raw"), SETTLE) == [
        *(BEFORE, "embed_raw", "settle_cost")
    ]


def test_a_search_has_its_spaces_joined_and_the_store_by_itself() -> None:
    found = Step("find_spaces", (), 99.9999, 99.9999)
    embedding = [later(step, 0, places=1) for step in QUICK_STEPS]
    embedding[0] = ESTIMATE._replace(after=(0,))
    embedding[3] = embedding[3]._replace(name="embed_texts", ended=embedding[3].started + 0.0001)
    looked_up = Step("search_space", (0, 4), SETTLE.ended, SETTLE.ended + 0.0002)
    merged = Step("merge_found", (0, 6), looked_up.ended, looked_up.ended + 0.0001)

    run = joined((found, *embedding, looked_up, merged))

    assert [(step.name, step.after) for step in run] == [
        ("find_spaces", ()),
        (BEFORE, (0,)),
        ("embed_texts", (1,)),
        ("settle_cost", (1, 2)),
        ("search_space", (0, 2)),
        ("merge_found", (0, 4)),
    ]


@pytest.mark.parametrize(
    ("reserve", "shown"),
    [
        (RESERVE._replace(ended=RESERVE.started + 0.04), "reserve_budget"),
        (RESERVE._replace(error="budget_exceeded"), "reserve_budget"),
        (RESERVE._replace(error="CancelledError"), "reserve_budget"),
        (RESERVE._replace(ended=RESERVE.started - 1), "reserve_budget"),
        (later(RESERVE, QUICK_SECONDS), "reserve_budget"),
        (RESERVE._replace(started=SELECT.started), "reserve_budget"),
        (RESERVE._replace(after=()), "reserve_budget"),
        (RESERVE._replace(name="look_up_key"), "look_up_key"),
    ],
    ids=["slow", "failed", "cancelled", "not ended", "after a pause", "at the same time", "on nothing", "unknown"],
)
def test_a_step_with_something_of_its_own_to_say_is_shown_by_itself(reserve: Step, shown: str) -> None:
    assert names(ESTIMATE, SELECT, reserve) == ["estimate_cost, select_provider", shown]


def test_what_follows_a_slow_step_begins_anew() -> None:
    slow = ESTIMATE._replace(started=ESTIMATE.started - 1)

    assert joined((slow, SELECT, RESERVE)) == (
        slow,
        Step("select_provider, reserve_budget", (0,), SELECT.started, RESERVE.ended),
    )


def test_a_step_on_a_result_from_elsewhere_is_shown_by_itself() -> None:
    found = Step("find_spaces", (), 99.0, 99.5)
    selected = SELECT._replace(after=(0, 1))

    assert names(found, ESTIMATE._replace(after=(0,)), selected) == ["find_spaces", "estimate_cost", "select_provider"]


def test_steps_that_take_their_time_stay_as_they_are() -> None:
    assert joined(STEPS) == STEPS
    assert joined(()) == ()


def test_steps_that_ran_again_are_told_apart_one_by_one() -> None:
    again = [later(step, 1, places=5) for step in QUICK_STEPS]
    slow = later(RESERVE._replace(ended=RESERVE.started + 0.04), 2, places=10)
    third = (later(ESTIMATE, 2), later(SELECT, 2, places=10), slow)
    run = a_run(steps=(*QUICK_STEPS, *again, *third))

    shown = steps_of(replace(run, steps=joined(run.steps)))

    assert [step.name for step in shown] == [
        *(BEFORE, "call_provider", "settle_cost"),
        *("estimate_cost-2, select_provider-2, reserve_budget-2", "call_provider-2", "settle_cost-2"),
        *("estimate_cost-3, select_provider-3", "reserve_budget-3"),
    ]
    assert shown[4].inputs == {"reserve_budget-2": [{"id": shown[3].id}]}


def test_what_may_be_joined_is_what_asks_nobody_but_the_ledger() -> None:
    steps = {name for name, _ in inspect.getmembers(Money, inspect.iscoroutinefunction)} - {"aclose", "explain_choice"}

    assert {name for name in steps if not name.startswith("_")} == JOINABLE


@st.composite
def traces(draw: st.DrawFn) -> tuple[Step, ...]:
    steps: list[Step] = []
    at = 0.0
    for number in range(draw(st.integers(0, 12))):
        at += draw(st.sampled_from([0.0, 0.0002, 0.01]))
        name = draw(st.sampled_from([*sorted(JOINABLE), "call_provider", "search_space"]))
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        ended = at + draw(st.sampled_from([0.0001, 0.0009, 0.02]))
        steps.append(Step(name, tuple(sorted(after)), at, ended, draw(st.sampled_from([None, None, None, "refused"]))))
        at = draw(st.sampled_from([at, ended]))
    return tuple(steps)


@given(traces())
def test_no_step_dependency_or_failure_is_lost_or_made_up(steps: tuple[Step, ...]) -> None:
    shown = joined(steps)

    parts = [(place, name) for place, step in enumerate(shown) for name in step.name.split(BETWEEN)]
    place = [at for at, _ in parts]
    assert [name for _, name in parts] == [step.name for step in steps]
    drawn = {(before, at) for at, step in enumerate(shown) for before in step.after}
    assert drawn == {
        (place[before], place[at])
        for at, step in enumerate(steps)
        for before in step.after
        if place[before] != place[at]
    }
    assert [step.error for step in shown if step.error] == [step.error for step in steps if step.error]
    assert joined(shown) == shown
