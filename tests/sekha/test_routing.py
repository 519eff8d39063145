from __future__ import annotations

import math
import pickle
import re
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekha.asks import Allowed
from sekha.errors import (
    BudgetExceeded,
    CostRefused,
    KeyNotAllowed,
    LimitsReached,
    NoCandidate,
    NotCapable,
    NotPriced,
    PromptTooLong,
    RequestRefused,
    UnknownModel,
)
from sekha.ledger import Budget
from sekha.lineup import FORMS, REMEMBERED
from sekha.pricing import FREE, Price
from sekha.registry import TASKS, Model, ProviderSpec, Registry, Task
from sekha.routing import (
    SHORTLIST,
    Ask,
    Conditions,
    Count,
    Counter,
    Estimates,
    Plan,
    Rules,
    Size,
    cap,
    cheapest,
    considered,
    explain,
    plan,
)
from sekha.vision import Picture, Pictures

TOKENS = 100
CHAT = Ask(kind="chat")
RULES = Rules()
ANYTIME = Conditions()
NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)


def price(costs: str) -> Price:
    """At which a request of `TOKENS` is expected to cost so much, and at the most twice as much."""
    each = Decimal(costs) * 1_000_000 / TOKENS
    return Price(input=each, cache_write=2 * each)


def model(name: str, *tasks: Task, **fields: Any) -> Model:
    provider, _, model_id = name.partition("/")
    return Model(id=model_id, provider_id=provider, tasks=tasks or ("chat_small",), **({"price": price("1")} | fields))


def registry(*models: Model, priority: dict[str, int] | None = None, **defaults: str) -> Registry:
    ids = dict.fromkeys(each.provider_id for each in models)
    return Registry(
        providers={
            name: ProviderSpec(
                id=name,
                kind="openai",
                priority=(priority or {}).get(name, 50),
                models=tuple(each for each in models if each.provider_id == name),
            )
            for name in ids
        },
        default_models=defaults,
    )


def costing(known: Registry, costs: dict[str, str]) -> Registry:
    """The same registry, by provider id: what a call costs."""
    return Registry(
        providers={
            name: replace(spec, models=tuple(replace(each, price=price(costs[name])) for each in spec.models))
            if name in costs
            else spec
            for name, spec in known.providers.items()
        },
        default_models=known.default_models,
    )


def estimates(
    ask: Ask,
    models: Sequence[Model],
    *,
    rules: Rules = RULES,
    budgets: Sequence[Budget] = (),
    left: dict[str, str] | None = None,
    at: datetime | None = None,
) -> Estimates:
    return Estimates(
        size=Size(ask, writes_cache=True),
        counters={each.id: Counter("words", exact=True) for each in models},
        counts={"words": Count(TOKENS, longest=TOKENS)},
        rules=rules,
        budgets=tuple(budgets),
        remaining={name: Decimal(amount) for name, amount in (left or {}).items()},
        at=at,
    )


def route(ask: Ask, known: Registry, conditions: Conditions = ANYTIME, **given_: Any) -> Plan:
    costs = {name: given_.pop(name) for name in list(given_) if name in known.providers}
    # Where nothing costs anything else it is the same registry, with all that is remembered of it.
    known = costing(known, costs) if costs else known
    return plan(estimates(ask, known.models, **given_), known, conditions)


def why_not(ask: Ask, known: Registry, conditions: Conditions = ANYTIME, **given_: Any) -> list[tuple[str, str]]:
    costs = {name: given_.pop(name) for name in list(given_) if name in known.providers}
    known = costing(known, costs)
    explained = explain(estimates(ask, known.models, **given_), known, conditions)
    return [(each.model.name, str(each.rule)) for each in explained.dropped]


def order(made: Plan) -> list[str]:
    return [candidate.model.name for candidate in made.candidates]


# --- who is considered, and in which order -------------------------------------------------


def test_the_lower_priority_goes_first_then_the_price_then_the_file() -> None:
    known = registry(
        model("dear/m"), model("cheap/m"), model("cheap/n"), model("last/m"), priority={"dear": 1, "cheap": 1}
    )

    assert order(route(CHAT, known, dear="3", cheap="2", last="1")) == ["cheap/m", "cheap/n", "dear/m", "last/m"]


def test_without_cost_awareness_the_files_order_decides_among_equals() -> None:
    known = registry(model("dear/m"), model("cheap/m"))

    assert order(route(CHAT, known, dear="3", rules=Rules(cost_aware=False))) == ["dear/m", "cheap/m"]


@pytest.mark.parametrize(
    ("ask", "first"),
    [
        (Ask(kind="chat"), "a/fast"),
        (Ask(kind="chat", model="auto"), "a/fast"),
        (Ask(kind="chat", vision=True), "a/eyes"),
        (Ask(kind="chat", task="chat_smart"), "a/smart"),
        (Ask(kind="chat", model="chat_smart"), "a/smart"),
        (Ask(kind="chat", task="vision"), "a/eyes"),
        (Ask(kind="chat", preferred_model="other"), "a/other"),
        (Ask(kind="chat", task="chat_smart", preferred_model="other"), "a/other"),
    ],
)
def test_the_preferred_model_goes_first_else_the_default_of_the_role(ask: Ask, first: str) -> None:
    known = registry(
        model("z/any", "chat_small", "chat_smart", "vision", vision=True),
        model("a/fast"),
        model("a/smart", "chat_smart"),
        model("a/eyes", "vision", vision=True),
        model("a/other", "chat_large"),
        priority={"z": 1, "a": 9},
        chat_fast="fast",
        chat_smart="smart",
        chat_vision="eyes",
    )

    made = route(ask, known)

    assert made.first.model.name == first
    assert made.first.reason in ("preferred", "the default model")
    assert "z/any" in order(made)


def test_a_named_model_is_asked_at_every_provider_that_has_it_and_no_other_is() -> None:
    known = registry(model("a/m"), model("b/m"), model("b/n"))

    made = route(Ask(kind="chat", model="m"), known)

    assert order(made) == ["a/m", "b/m"]
    assert [candidate.reason for candidate in made.candidates] == [
        "named by the request",
        "fallback 1: named by the request",
    ]


def test_a_task_is_served_by_its_models_alone() -> None:
    known = registry(model("a/m"), model("a/big", "chat_large"))

    assert order(route(Ask(kind="chat", task="chat_large"), known)) == ["a/big"]
    assert order(route(Ask(kind="chat", model="chat_large"), known)) == ["a/big"]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (Ask(kind="chat", model="n"), "No model 'n'"),
        (Ask(kind="chat", preferred_model="n"), "No model 'n'"),
        (Ask(kind="chat", task="chat_smal"), "No task 'chat_smal'. Did you mean 'chat_small'?"),  # type: ignore[arg-type]
        (Ask(kind="embedding", model="n"), "No model 'n'"),
    ],
)
def test_an_unknown_name_is_refused(ask: Ask, says: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        route(ask, registry(model("a/m")))

    assert says in str(caught.value)


def test_an_embedding_falls_back_to_the_same_model_only() -> None:
    known = registry(
        model("a/e", "embedding", dimension=8),
        model("b/e", "embedding", dimension=8),
        model("c/e", "embedding", dimension=4),
        model("d/f", "embedding", dimension=8),
        embedding="e",
    )

    assert order(route(Ask(kind="embedding"), known)) == ["a/e", "b/e"]
    assert order(route(Ask(kind="embedding", model="b/e"), known)) == ["b/e"]


# --- who is dropped ------------------------------------------------------------------------


def test_a_model_that_cannot_see_is_dropped_where_there_are_images() -> None:
    known = registry(model("a/blind"), model("b/eyes", vision=True))

    assert order(route(Ask(kind="chat", vision=True), known)) == ["b/eyes"]
    assert why_not(Ask(kind="chat", vision=True), known) == [("a/blind", "capability")]


@pytest.mark.parametrize("name", ["e", "embedding"])
def test_an_embedding_model_is_never_chatted_with(name: str) -> None:
    with pytest.raises(NoCandidate, match="it does not chat"):
        route(Ask(kind="chat", model=name), registry(model("a/e", "embedding", dimension=8)))


@pytest.mark.parametrize(
    ("ask", "rest"),
    [(Ask(kind="chat", tools="tools"), {"function_calling": False}), (Ask(kind="chat", audio=True), {"audio": False})],
)
def test_a_model_that_is_said_not_to_call_tools_or_hear_is_not_asked_to(ask: Ask, rest: dict[str, bool]) -> None:
    able = dict.fromkeys(rest, True)
    known = registry(model("cheap/m", **rest), model("dear/m", **able), model("unsure/m"))

    made = route(ask, known, cheap="1", dear="3", unsure="2")

    assert order(made) == ["dear/m", "unsure/m"]
    assert "not known to" in made.candidates[1].reason
    assert why_not(ask, known, cheap="1", dear="3", unsure="2") == [("cheap/m", "capability")]
    assert order(route(CHAT, known, cheap="1", dear="3", unsure="2")) == ["cheap/m", "unsure/m", "dear/m"]


def test_who_is_only_not_known_to_call_tools_keeps_its_priority() -> None:
    known = registry(model("local/m"), model("far/m", function_calling=True), priority={"local": 1})

    assert order(route(Ask(kind="chat", tools="tools"), known)) == ["local/m", "far/m"]


def test_what_does_not_fit_the_context_window_is_dropped() -> None:
    known = registry(model("a/m", context_window=TOKENS - 1), model("b/m", context_window=TOKENS))

    assert order(route(CHAT, known)) == ["b/m"]
    assert why_not(CHAT, known) == [("a/m", "context")]


def test_an_unknown_price_is_dropped_and_said() -> None:
    with pytest.raises(NoCandidate, match="its price is unknown: set `price:` for it"):
        route(CHAT, registry(model("a/m", price=None)))


TIERED = Ask(kind="chat", priced_apart="service_tier")
MAPPED = Price(input=Decimal(1), source="price map")


@pytest.mark.parametrize("others", [0, 9])
def test_what_keeps_a_price_from_being_known_is_named(others: int) -> None:
    unpriced = [model(f"a/{number}", price=None) for number in range(others)]

    error = refused(TIERED, registry(model("a/m", price=MAPPED), *unpriced))

    assert isinstance(error, NotPriced)
    assert (error.field, error.what, error.retryable) == ("service_tier", "service_tier", False)
    assert type(refused(TIERED, registry(model("a/m", price=None)))) is NoCandidate


@pytest.mark.parametrize("others", [0, 9])
def test_what_nobody_can_count_is_named_where_no_window_bounds_it(others: int) -> None:
    known = registry(model("a/m"), *[model(f"a/{number}") for number in range(others)])
    made = estimates(CHAT, known.models)

    with pytest.raises(NotPriced) as caught:
        plan(replace(made, size=made.size._replace(unbounded="file")), known)

    assert (caught.value.field, caught.value.what) == ("messages", "file")
    assert len(caught.value.reasons) == 1 + others


def test_who_waits_and_who_is_too_dear_come_nearer_than_what_has_no_price() -> None:
    known = registry(model("a/m", price=MAPPED), model("b/m"))

    shut = refused(TIERED, known, Conditions(open_circuits=frozenset({"b/m"})))
    dear = refused(TIERED._replace(max_cost=Decimal(0)), known)

    assert (type(shut), shut.retryable) == (NoCandidate, True)
    assert isinstance(dear, CostRefused)


def test_an_open_circuit_is_passed_by_and_may_be_tried_later() -> None:
    known = registry(model("a/m"), model("b/m"))

    assert order(route(CHAT, known, Conditions(open_circuits=frozenset({"a/m"})))) == ["b/m"]
    with pytest.raises(NoCandidate) as caught:
        route(CHAT, known, Conditions(open_circuits=frozenset({"a/m", "b/m"})))
    assert caught.value.retryable


def test_a_throttled_provider_is_passed_by_and_when_all_are_the_shortest_wait_is_said() -> None:
    known = registry(model("a/m"), model("b/m"))

    assert order(route(CHAT, known, Conditions(throttled={"a": 2.5}))) == ["b/m"]
    with pytest.raises(LimitsReached, match="reached for the next 3 s") as caught:
        route(CHAT, known, Conditions(throttled={"a": 2.5, "b": 7}))
    assert caught.value.retryable
    assert caught.value.retry_after_seconds == 2.5


def test_a_model_whose_provider_limits_us_is_passed_by_for_as_long_as_it_asked() -> None:
    known = registry(model("a/m"), model("a/n"), model("b/m"))
    paused = Conditions(paused={"a/m": 2.5})

    assert order(route(CHAT, known, paused)) == ["a/n", "b/m", "a/m"]
    last = explain(estimates(CHAT, known.models), known, paused).kept[-1]
    assert (last.model.name, last.throttled_seconds) == ("a/m", 2.5)


def test_a_model_whose_provider_limits_us_takes_nobodys_place() -> None:
    others = [model(f"{provider}/m") for provider in "bcdef"]
    known = registry(model("a/m"), *others)
    paused = Conditions(paused={"a/m": 2.5})

    assert order(route(CHAT, known, paused)) == [each.name for each in others]
    [dropped] = explain(estimates(CHAT, known.models), known, paused).dropped
    assert (dropped.rule, dropped.throttled_seconds) == ("rate", 2.5)
    assert dropped.why == "its provider limits us (429), and asked to be left alone for 3 s more"


def test_a_provider_of_many_models_leaves_room_for_the_others() -> None:
    many = [model(f"a/{name}") for name in "lmnopq"]

    known = registry(*many, model("b/m"), priority={"a": 1, "b": 2})
    assert order(route(CHAT, known)) == ["a/l", "a/m", "a/n", "a/o", "b/m"]
    dropped = {each.model.name: each.why for each in explain(estimates(CHAT, known.models), known).dropped}
    assert dropped == dict.fromkeys(["a/p", "a/q"], "2 others of its provider stand before it, and 5 in all are asked")

    others = [model(f"{provider}/{name}") for provider in "bc" for name in "lmn"]
    known = registry(*many, *others, priority={"a": 1, "b": 2, "c": 3})
    assert order(route(CHAT, known)) == ["a/l", "a/m", "b/l", "b/m", "c/l"]


def test_prices_are_compared_at_one_length_of_reply_whoever_has_a_history() -> None:
    each = Price(input=Decimal(1), output=Decimal(10))
    half = replace(each, output=Decimal(5))
    known = registry(model("a/m", price=each), model("b/m", price=each), model("c/m", price=half))
    made = replace(estimates(CHAT, known.models), usual={"a/m": 50}, compared_at=50)

    assert order(plan(made, known, Conditions(draw=0.0))) == ["c/m", "a/m", "b/m"]
    assert order(plan(made, known, Conditions(draw=0.9))) == ["c/m", "b/m", "a/m"]
    kept = explain(made, known).kept
    assert [verdict.compared for verdict in kept] == [Decimal(amount) / 1_000_000 for amount in (350, 600, 600)]
    expected = [verdict.estimate.expected for verdict in kept if verdict.estimate is not None]
    assert expected[1] < expected[0]


def test_where_only_models_that_are_left_alone_could_serve_they_are_asked_when_that_is_over() -> None:
    known = registry(model("a/m"), model("b/m"), model("c/m", context_window=TOKENS - 1))
    paused = Conditions(paused={"a/m": 2.5, "b/m": 1.0})

    assert order(route(CHAT, known, paused)) == ["a/m", "b/m"]
    assert [each.throttled_seconds for each in explain(estimates(CHAT, known.models), known, paused).kept] == [2.5, 1.0]


def test_a_request_that_no_rate_limit_ever_lets_pass_is_not_tried_again() -> None:
    with pytest.raises(LimitsReached, match="never let as many tokens pass") as caught:
        route(CHAT, registry(model("a/m")), Conditions(throttled={"a": math.inf}))

    assert not caught.value.retryable
    assert caught.value.retry_after_seconds is None


def test_waiting_is_not_advised_where_the_money_would_be_refused_afterwards() -> None:
    shut = Conditions(open_circuits=frozenset({"a/m"}), throttled={"b": 1})

    with pytest.raises(CostRefused):
        route(Ask(kind="chat", max_cost=Decimal(1)), registry(model("a/m"), model("b/m")), shut)


def test_without_fallback_one_is_asked() -> None:
    known, rules = registry(model("a/m"), model("b/m")), Rules(auto_fallback=False)

    assert order(route(CHAT, known, rules=rules)) == ["a/m"]
    assert why_not(CHAT, known, rules=rules) == [("b/m", "fallback")]


def test_a_plan_names_a_handful_and_the_explanation_all() -> None:
    known = registry(*(model(f"p{number}/m") for number in range(SHORTLIST + 2)))

    assert order(route(CHAT, known)) == [f"p{number}/m" for number in range(SHORTLIST)]
    assert why_not(CHAT, known) == [(f"p{SHORTLIST}/m", "fallback"), (f"p{SHORTLIST + 1}/m", "fallback")]


# --- who has to change what, when nobody can be asked ---------------------------------------


def refused(ask: Ask, known: Registry, conditions: Conditions = ANYTIME, **given_: Any) -> Any:
    with pytest.raises(RequestRefused) as caught:
        route(ask, known, conditions, **given_)
    return caught.value


def test_a_prompt_that_fits_no_window_is_told_by_how_much_it_is_too_long() -> None:
    narrow = [model("a/m", context_window=TOKENS - 60), model("b/m", context_window=TOKENS - 10)]

    error = refused(CHAT, registry(*narrow))

    assert isinstance(error, PromptTooLong)
    assert (error.code, error.field) == ("context_length_exceeded", "messages")
    assert (error.needs, error.model, error.takes) == (TOKENS, "b/m", TOKENS - 10)


def test_a_prompt_that_fits_where_somebody_is_shut_is_to_be_sent_again() -> None:
    known = registry(model("a/m", context_window=TOKENS - 1), model("b/m"))

    error = refused(CHAT, known, Conditions(open_circuits=frozenset({"b/m"})))

    assert type(error) is NoCandidate
    assert error.retryable


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (Ask(kind="chat", model="m", vision=True), "require_vision"),
        (Ask(kind="chat", model="m", tools="functions"), "functions"),
        (Ask(kind="chat", model="m", audio=True), "messages"),
        (Ask(kind="chat", model="e"), "model"),
        (Ask(kind="chat", task="embedding"), "task"),
        (Ask(kind="embedding", model="m"), "model"),
    ],
)
def test_what_no_model_that_was_asked_for_can_do_is_told_by_its_field(ask: Ask, field: str) -> None:
    known = registry(
        model("a/m", function_calling=False, audio=False),
        model("a/all", vision=True, function_calling=True, audio=True),
        model("a/e", "embedding", dimension=8),
    )

    error = refused(ask, known)

    assert isinstance(error, NotCapable)
    assert error.field == field
    assert error.reasons
    assert error.able == (
        ("e",) if ask.kind == "embedding" else ("m", "all") if field in ("model", "task") else ("all",)
    )


def test_a_key_that_may_use_nobody_who_could_serve_is_told_so() -> None:
    known = registry(model("a/blind"), model("a/eyes", vision=True))
    ask = Ask(kind="chat", vision=True, key="research", allowed=Allowed(models=frozenset({"blind"})))

    error = refused(ask, known)

    assert isinstance(error, KeyNotAllowed)
    assert str(error).startswith("Key 'research' may not use 'a/eyes', but blind: ")


@pytest.mark.parametrize(
    "ask",
    [
        Ask(kind="chat", model="both", vision=True),
        Ask(kind="chat", model="a/both", pictures=Pictures((Picture("image_url", "auto", None, scheme="https"),))),
        Ask(kind="chat", model="auto", vision=True),
        Ask(kind="chat", preferred_model="both", vision=True),
        Ask(kind="chat", task="vision"),
        Ask(kind="embedding", model="both", task="embedding"),
    ],
    ids=str,
)
def test_a_key_uses_a_model_only_as_what_it_may(ask: Ask) -> None:
    both = model("a/both", "chat_small", "vision", "embedding", vision=True, dimension=8)
    ask = ask._replace(key="research", allowed=Allowed(tasks=frozenset({"chat_small"})))

    error = refused(ask, registry(both))

    task = ask.task or "vision"
    assert isinstance(error, KeyNotAllowed)
    assert str(error).startswith(f"Key 'research' may not use {task!r}, but chat_small: ")


def test_a_call_counts_as_the_first_of_a_models_tasks_that_its_key_may_use() -> None:
    tasks: tuple[Task, ...] = ("chat_small", "chat_smart", "vision")
    both = model("a/both", *tasks, vision=True)

    counted = {
        task: Ask(kind="chat", model="both", key="k", allowed=Allowed(tasks=frozenset({task}))).scope(both).task
        for task in tasks
    }

    assert counted == {task: task for task in tasks}
    assert Ask(kind="chat", model="both").scope(both).task == "chat_small"


def test_images_go_to_who_counts_as_what_the_key_may_use() -> None:
    known = registry(model("a/both", "chat_small", "vision", vision=True), model("b/sees", vision=True))
    ask = Ask(kind="chat", vision=True, key="k", allowed=Allowed(tasks=frozenset({"chat_small"})))

    assert order(route(ask, known)) == ["b/sees"]


def test_a_thousand_that_are_dropped_are_not_all_listed() -> None:
    error = refused(CHAT, registry(*(model(f"p{number}/m", price=None) for number in range(100))))

    assert (len(error.reasons), error.more) == (20, 80)
    assert "; and 95 more. " in str(error)


def test_the_cheapest_of_all_may_serve_what_those_that_were_asked_for_may_not() -> None:
    known = registry(model("a/m"), model("b/m"), model("c/m", context_window=TOKENS - 1), model("d/m"))
    known = costing(known, {"a": "3", "b": "2", "c": "0.1", "d": "1"})
    ask = Ask(kind="chat", max_cost=Decimal(5))

    found = cheapest(estimates(ask, known.models), known, Conditions(open_circuits=frozenset({"d/m"})))
    none_fits = cheapest(estimates(ask._replace(max_cost=Decimal(1)), known.models), known)

    assert found is not None
    assert (found[0].name, found[1]) == ("b/m", Decimal(4))
    assert none_fits is not None
    assert (none_fits[0].name, none_fits[1]) == ("d/m", Decimal(2))


# --- equals --------------------------------------------------------------------------------


def firsts(known: Registry, **conditions: Any) -> Tally[str]:
    draws = [number / 1000 for number in range(1000)]
    return Tally(order(route(CHAT, known, Conditions(draw=draw, **conditions)))[0] for draw in draws)


@pytest.mark.parametrize("others", [0, SHORTLIST])
def test_equals_share_the_traffic_by_weight_and_the_others_stand_behind(others: int) -> None:
    dearer = [model(f"z{number}/m", price=price("2")) for number in range(others)]
    known = registry(model("a/m", weight=1), model("b/m", weight=3), *dearer)

    assert firsts(known) == {"a/m": 250, "b/m": 750}
    assert order(route(CHAT, known, Conditions(draw=0.9)))[:2] == ["b/m", "a/m"]


@pytest.mark.parametrize("others", [0, SHORTLIST])
def test_the_quicker_of_equals_gets_more_and_an_unknown_one_as_much_as_the_mean(others: int) -> None:
    dearer = [model(f"z{number}/m", price=price("2")) for number in range(others)]
    known = registry(model("a/m"), model("b/m"), model("c/m"), *dearer)

    # 1 / 0.5, 1 / 1.5 and 1 / 1 are shares of 6, 2 and 3.
    assert firsts(known, latency_seconds={"a/m": 0.5, "b/m": 1.5}) == {"a/m": 546, "b/m": 182, "c/m": 272}


def test_who_is_dearer_or_of_a_later_priority_is_no_equal() -> None:
    known = registry(model("a/m"), model("b/m"), model("c/m"), priority={"c": 60})

    assert firsts(known, latency_seconds={"a/m": 9.0}).keys() == {"a/m", "b/m"}
    assert order(route(CHAT, known, Conditions(draw=0.99), a="3"))[0] == "b/m"


def test_a_shut_equal_leaves_its_share_to_the_others() -> None:
    known = registry(model("a/m"), model("b/m"), model("c/m"))

    assert firsts(known, open_circuits=frozenset({"b/m"})) == {"a/m": 500, "c/m": 500}


@pytest.mark.parametrize("equals", [2, 3, SHORTLIST + 4])
def test_the_quicker_gets_more_whoever_was_quicker_before(equals: int) -> None:
    names = [f"p{number}/m" for number in range(equals)]
    dearer = [model(f"z{number}/m", price=price("2")) for number in range(SHORTLIST)]
    known = registry(*map(model, names), *dearer)

    for quickest in (*names, *names):
        drawn = firsts(known, latency_seconds={name: 1.0 if name == quickest else 9.0 for name in names})
        assert max(drawn, key=drawn.__getitem__) == quickest


def test_however_many_were_equal_before_one_is_drawn_as_it_is_explained() -> None:
    names = [f"p{number}/m" for number in range(SHORTLIST + 4)]
    known = registry(*map(model, names))
    latency = {name: 1.0 + number for number, name in enumerate(names[1:])}
    shut = [frozenset(pair) for pair in combinations(names, 2)]

    for open_circuits in (*shut, *shut):
        conditions = Conditions(open_circuits=open_circuits, latency_seconds=latency, draw=0.6)
        explained = explain(estimates(CHAT, known.models), known, conditions)
        assert order(route(CHAT, known, conditions)) == [each.model.name for each in explained.kept]


# --- money ---------------------------------------------------------------------------------


def test_what_may_cost_more_than_the_cap_is_dropped() -> None:
    known = registry(model("dear/m"), model("cheap/m"))
    ask = Ask(kind="chat", max_cost=Decimal(3))

    assert order(route(ask, known, dear="2", cheap="1")) == ["cheap/m"]
    assert why_not(ask, known, dear="2", cheap="1") == [("dear/m", "cost")]


@pytest.mark.parametrize(
    ("ask", "rule", "holds"),
    [
        (None, None, (None, "")),
        (None, "2", (Decimal(2), "max_cost_per_request")),
        ("3", "2", (Decimal(2), "max_cost_per_request")),
        ("1", "2", (Decimal(1), "max_cost")),
        ("0", None, (Decimal(0), "max_cost")),
    ],
)
def test_the_lower_of_the_two_caps_holds(ask: str | None, rule: str | None, holds: tuple[Decimal | None, str]) -> None:
    asked = Ask(kind="chat", max_cost=None if ask is None else Decimal(ask))

    assert cap(asked, Rules(max_cost_per_request=None if rule is None else Decimal(rule))) == holds


def test_bulk_work_is_capped_by_its_own_limit_alone() -> None:
    rules = Rules(max_cost_per_request=Decimal(1))

    assert cap(Ask(kind="embedding", bulk=True), rules) == (None, "")
    assert cap(Ask(kind="embedding", bulk=True, max_cost=Decimal(5)), rules) == (Decimal(5), "max_cost")


def test_when_money_alone_stands_in_the_way_the_cheapest_is_named() -> None:
    known = registry(model("dear/m"), model("cheap/m"), model("blind/m"))

    with pytest.raises(CostRefused) as caught:
        route(Ask(kind="chat", max_cost=Decimal(1)), known, dear="9", cheap="2", blind="2")

    assert (caught.value.cheapest, caught.value.cost, caught.value.limit_name) == ("cheap/m", Decimal(4), "max_cost")


def test_models_that_never_could_do_not_hide_that_it_is_the_money() -> None:
    known = registry(model("a/blind"), model("b/eyes", vision=True))

    with pytest.raises(CostRefused):
        route(Ask(kind="chat", vision=True, max_cost=Decimal(1)), known)


def test_models_without_a_price_do_not_hide_that_it_is_the_money() -> None:
    known = registry(model("a/m"), model("b/unpriced", price=None), model("c/n", price=price("3")))
    spent = Budget(name="small", limit=Decimal("0.5"), period="day")

    above, over = refused(CHAT._replace(max_cost=Decimal(1)), known), refused(CHAT, known, budgets=(spent,))

    assert (type(above), getattr(above, "cheapest", None)) == (CostRefused, "a/m")
    assert type(over) is BudgetExceeded


def test_a_budget_with_too_little_left_is_named() -> None:
    budget = Budget(name="team", limit=Decimal(10), period="day", match={"provider": "a"})

    with pytest.raises(BudgetExceeded) as caught:
        route(CHAT, registry(model("a/m")), budgets=[budget], left={"team": "1.5"}, at=NOW)

    assert caught.value.resets == "2026-11-24T00:00Z"
    assert (caught.value.budget, caught.value.remaining, caught.value.needed) == ("team", Decimal("1.5"), Decimal(2))


def test_nobody_is_told_to_wait_for_a_budget_that_is_too_small_for_the_request() -> None:
    budget = Budget(name="team", limit=Decimal("1.5"), period="day")

    with pytest.raises(BudgetExceeded) as caught:
        route(CHAT, registry(model("a/m")), budgets=[budget], at=NOW)

    assert caught.value.resets is None


def test_a_budget_that_does_not_cover_a_model_does_not_stop_it() -> None:
    budget = Budget(name="team", limit=Decimal(10), match={"provider": "a"})

    known = registry(model("a/m"), model("b/m"))

    assert order(route(CHAT, known, budgets=[budget], left={"team": "0"})) == ["b/m"]
    assert why_not(CHAT, known, budgets=[budget], left={"team": "0"}) == [("a/m", "budget")]


@pytest.mark.parametrize(
    ("ask", "stands"),
    [
        (Ask(kind="chat", key="research"), False),
        (Ask(kind="chat", key="other"), True),
        (Ask(kind="chat", key="research", tags=frozenset({"eval"})), False),
    ],
)
def test_a_budget_of_a_key_stops_that_key_alone(ask: Ask, stands: bool) -> None:
    budget = Budget(name="team", limit=Decimal(0), match={"key": "research"})
    known = registry(model("a/m"))

    if stands:
        assert order(route(ask, known, budgets=[budget])) == ["a/m"]
    else:
        with pytest.raises(BudgetExceeded):
            route(ask, known, budgets=[budget])


@pytest.mark.parametrize(
    ("ask", "task"),
    [
        (Ask(kind="chat"), "chat_small"),
        (Ask(kind="chat", task="vision"), "vision"),
        (Ask(kind="chat", model="vision"), "vision"),
        (Ask(kind="chat", model="m"), "chat_small"),
        (Ask(kind="chat", model="m", vision=True), "vision"),
        (Ask(kind="chat", model="auto", vision=True), "vision"),
        (Ask(kind="chat", task="chat_small", vision=True), "chat_small"),
    ],
)
def test_a_call_is_charged_to_the_task_that_was_asked_for(ask: Ask, task: str) -> None:
    scope = ask.scope(model("a/m", "chat_small", "vision"))

    assert (scope.provider, scope.model, scope.task) == ("a", "m", task)


# --- what is handed on ---------------------------------------------------------------------


def test_an_explanation_tells_all_that_decides_over_a_model() -> None:
    budget = Budget(name="team", limit=Decimal(10), match={"provider": "a"})
    known = registry(model("a/m", weight=2), model("b/m"), priority={"b": 60})
    conditions = Conditions(frozenset({"b/m"}), {"b": 4.0}, {"a/m": 0.5})

    explained = explain(estimates(CHAT, known.models, budgets=[budget], left={"team": "8"}), known, conditions)

    first, second = explained.verdicts
    assert (first.place, first.rule, first.why, first.equals) == (1, None, "priority 50, then price", 1)
    assert first.estimate is not None
    assert (first.estimate.expected, first.estimate.worst_case) == (Decimal(1), Decimal(2))
    assert (first.priority, first.circuit, first.throttled_seconds, first.latency_seconds) == (50, "closed", 0.0, 0.5)
    assert first.budgets == {"team": Decimal(8)}
    assert (second.place, second.rule, second.circuit, second.throttled_seconds) == (None, "circuit", "open", 4.0)
    assert second.budgets == {}
    assert explained.refusal is None


def test_estimates_and_plans_survive_pickling() -> None:
    known = registry(*(model(f"p{number}/m") for number in range(20)))
    priced = estimates(CHAT, known.models)
    made = plan(priced, known)

    assert pickle.loads(pickle.dumps(priced)) == priced
    assert pickle.loads(pickle.dumps(made)) == made
    assert plan(priced, pickle.loads(pickle.dumps(known))) == made


def test_callers_who_name_every_model_in_every_way_fill_no_memory() -> None:
    known = registry(*(model(f"p{number}/m{number}") for number in range(400)))

    for each in known.models:
        plan(estimates(Ask(kind="chat", preferred_model=each.name), known.models), known)

    assert sum(len(each.entrants) for each in known.worked_out.values()) <= REMEMBERED + len(known.models)
    assert 40 < len(known.worked_out) <= FORMS


# --- whatever is asked of whatever registry ------------------------------------------------

tasks = st.lists(st.sampled_from(TASKS), min_size=1, max_size=3, unique=True).map(tuple)
ids = st.sampled_from(["m", "n", "o", "gpt"])
amounts = st.decimals(0, 10, places=2)
tiny = st.decimals(0, "0.02", places=5)
# Few different ones, so that many are equal.
rates = st.sampled_from([Decimal(each) for each in ("0", "0.1", "1", "2.5", "30", "0.075", "1.5", "1e-9")])
prices = st.builds(
    Price,
    input=rates,
    output=rates,
    cache_write=st.none() | rates,
    per_image=st.none() | st.just(Decimal("0.001")),
    long_input=st.sampled_from([()] * 30 + [((above, Price(input=Decimal(3))),) for above in (50, 250)]),
    tiers=st.sampled_from([(), (("priority", Price(input=Decimal(7), output=Decimal(9), source="price map")),)]),
    source=st.sampled_from(["configured", "price map"]),
)


@st.composite
def models(draw: st.DrawFn, name: str) -> Model:
    provider, _, model_id = name.partition("/")
    of_tasks = draw(st.just(("chat_small",)) | st.just(("chat_small",)) | tasks)
    return Model(
        id=model_id,
        provider_id=provider,
        tasks=of_tasks,
        dimension=draw(st.sampled_from([4, 8])) if "embedding" in of_tasks else None,
        vision=draw(st.booleans()),
        audio=draw(st.sampled_from([None, True, False])),
        function_calling=draw(st.sampled_from([None, True, False])),
        context_window=draw(st.none() | st.integers(1, 600)),
        max_output_tokens=draw(st.none() | st.sampled_from([1, 100, 1000])),
        thinks_by_number=draw(st.booleans()),
        weight=draw(st.integers(1, 3)),
        price=draw(st.none() | st.just(FREE) | prices | prices | prices),
    )


@st.composite
def registries(draw: st.DrawFn) -> Registry:
    names = draw(st.permutations([f"{provider}/{name}" for provider in "abcdefgh" for name in ("m", "n", "o", "gpt")]))
    # As often as not there are more than a plan has candidates.
    count = draw(st.sampled_from([1, 2, 5, 16, 24, 32]))
    found = [draw(models(name)) for name in names[:count]]
    return registry(*found, priority={each.provider_id: draw(st.integers(1, 2)) for each in found})


anybody = st.builds(
    Ask,
    kind=st.just("chat"),
    vision=st.booleans(),
    pictures=st.none(),
    max_cost=st.none() | tiny,
    allowed=st.none(),
    tools=st.none() | st.just("tools"),
    audio=st.booleans(),
)
asks = anybody | st.builds(
    Ask,
    kind=st.sampled_from(["chat", "chat", "embedding"]),
    model=st.none() | st.sampled_from(["auto", "m", "a/m", "vision", "embedding"]),
    task=st.none() | st.sampled_from(TASKS),
    preferred_model=st.none() | st.none() | ids,
    vision=st.booleans(),
    pictures=st.none(),
    max_cost=st.none() | amounts | tiny,
    priced_apart=st.none() | st.just("service_tier"),
    tier=st.none() | st.just("priority"),
    bulk=st.booleans(),
    key=st.sampled_from([None, "k"]),
    allowed=st.none()
    | st.sampled_from(
        [
            Allowed(models=frozenset({"m", "a/n"})),
            Allowed(tasks=frozenset({"chat_small"})),
            Allowed(tasks=frozenset(TASKS)),
        ]
    ),
    tags=st.frozensets(st.just("t")),
    tools=st.none() | st.none() | st.just("tools"),
    audio=st.sampled_from([False, False, True]),
)
rules = st.builds(
    Rules,
    auto_fallback=st.booleans() | st.just(True),
    cost_aware=st.booleans(),
    max_cost_per_request=st.none() | st.decimals("0.01", 10, places=2),
)
a_budget = st.builds(
    Budget,
    name=st.sampled_from(["x", "y"]),
    limit=amounts | tiny,
    match=st.fixed_dictionaries(
        {},
        optional={
            "provider": st.sampled_from("abc"),
            "model": ids,
            "task": st.sampled_from(TASKS),
            "key": st.just("k"),
            "tag": st.just("t"),
        },
    ),
)
tokenizers = st.sampled_from([Counter("one", exact=True), Counter("two", exact=False), Counter("two", exact=True)])


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Estimates, Registry, Conditions]:
    known = draw(registries())
    names = [each.name for each in known]
    some = st.sampled_from(names or ["-"])
    budgets = tuple(draw(st.lists(a_budget, max_size=2, unique_by=lambda each: each.name)))
    made = Estimates(
        size=Size(
            draw(asks),
            images=draw(st.integers(0, 2)),
            replies=draw(st.sampled_from([1, 1, 3])),
            reply_limit=draw(st.none() | st.integers(1, 2000)),
            writes_cache=draw(st.booleans()),
            unbounded=draw(st.none() | st.none() | st.just("file")),
            thinking=draw(st.sampled_from([0, 0, 1024, 4096])),
        ),
        counters={name: draw(tokenizers) for name in ["m", "n", "o", "gpt"]},
        counts={name: Count(draw(st.integers(0, 300)), draw(st.integers(0, 300))) for name in ("one", "two")},
        usual=draw(st.dictionaries(some, st.integers(1, 3000), max_size=4)),
        compared_at=draw(st.none() | st.integers(1, 3000)),
        rules=draw(rules),
        budgets=budgets,
        remaining={budget.name: draw(amounts | tiny) for budget in budgets if draw(st.booleans())},
    )
    conditions = Conditions(
        open_circuits=draw(st.frozensets(some, max_size=3)),
        throttled=draw(st.dictionaries(st.sampled_from("abz"), st.sampled_from([0.5, 9.0, math.inf]), max_size=2)),
        latency_seconds=draw(st.dictionaries(some, st.floats(0, 100), max_size=4)),
        draw=draw(st.floats(0, 1, exclude_max=True)),
        paused=draw(st.just({}) | st.dictionaries(some, st.sampled_from([0.5, 9.0]), max_size=4)),
    )
    return made, known, conditions


def decided(made: Estimates, known: Registry, conditions: Conditions) -> Plan | RequestRefused:
    try:
        return plan(made, known, conditions)
    except RequestRefused as refused:
        return refused


@settings(max_examples=400)
@given(decisions())
def test_the_quick_choice_is_the_one_that_is_explained(decision: tuple[Estimates, Registry, Conditions]) -> None:
    made, known, conditions = decision

    quick = decided(made, known, conditions)

    if isinstance(quick, UnknownModel):
        with pytest.raises(UnknownModel, match=re.escape(str(quick))):
            explain(made, known, conditions)
        return
    explained = explain(made, known, conditions)
    if isinstance(quick, RequestRefused):
        assert explained.kept == ()
        assert type(quick) is type(explained.refusal)
        assert str(quick) == str(explained.refusal)
        return
    assert explained.refusal is None
    assert quick == decided(made, known, conditions)
    assert [(each.model, each.estimate, each.reason) for each in quick.candidates] == [
        (each.model, each.estimate, each.why) for each in explained.kept
    ]
    asked = considered(made.ask, known)
    assert sorted(each.model.name for each in explained.verdicts) == sorted(each.name for each in asked)


@given(decisions())
def test_the_candidates_of_a_plan_break_no_rule(decision: tuple[Estimates, Registry, Conditions]) -> None:
    made, known, conditions = decision

    chosen = decided(made, known, conditions)

    if isinstance(chosen, RequestRefused):
        return
    ask = made.ask
    assert 1 <= len(chosen.candidates) <= (SHORTLIST if made.rules.auto_fallback else 1)
    limit, _ = cap(ask, made.rules)
    for candidate in chosen.candidates:
        kept, estimate = candidate.model, candidate.estimate
        assert kept.price is not None
        assert kept.name not in conditions.open_circuits
        assert kept.provider_id not in conditions.throttled
        assert kept.vision or not ask.vision
        assert kept.context_window is None or estimate.context_tokens <= kept.context_window
        assert limit is None or estimate.worst_case <= limit
        assert (kept.dimension is not None) or ask.kind == "chat"
        for budget in made.budgets:
            assert not budget.covers(ask.scope(kept)) or estimate.worst_case <= made.left(budget)
    if ask.kind == "embedding":
        assert len({(candidate.model.id, candidate.model.dimension) for candidate in chosen.candidates}) == 1
    preferred = {each.name for each in known if ask.preferred_model in (each.id, each.name)}
    if ask.preferred_model is None:
        ranks = [known.provider_of(candidate.model).priority for candidate in chosen.candidates]
        assert ranks == sorted(ranks)
    elif ask.kind == "chat" and ask.model is None:
        ranked = [candidate.model.name in preferred for candidate in chosen.candidates]
        assert ranked == sorted(ranked, reverse=True)
