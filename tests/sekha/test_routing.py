from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.errors import BudgetExceeded, CostRefused, NoCandidate, RequestRefused, UnknownModel
from sekha.ledger import Budget
from sekha.pricing import FREE, Estimate, Price
from sekha.registry import TASKS, Model, ProviderSpec, Registry, Task
from sekha.routing import Ask, Estimates, Plan, Rules, cap, considered, plan

PRICE = Price(input=Decimal(1))


def model(name: str, *tasks: Task, **fields: Any) -> Model:
    provider, _, model_id = name.partition("/")
    return Model(id=model_id, provider_id=provider, tasks=tasks or ("chat_small",), **({"price": PRICE} | fields))


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


def estimates(models: Sequence[Model], left: dict[str, str] | None = None, **costs: str) -> Estimates:
    """By provider id: what a call costs; a model whose provider is not named costs 1."""

    def of(each: Model) -> Estimate | None:
        if each.price is None:
            return None
        amount = Decimal(costs.get(each.provider_id, "1"))
        return Estimate(expected=amount, worst_case=2 * amount, input_tokens=100, output_tokens=0, context_tokens=100)

    remaining = {name: Decimal(amount) for name, amount in (left or {}).items()}
    return Estimates(by_model={each.name: of(each) for each in models}, remaining=remaining)


def route(ask: Ask, known: Registry, **given_: Any) -> Plan:
    rules = given_.pop("rules", Rules())
    budgets = given_.pop("budgets", ())
    open_circuits = given_.pop("open_circuits", frozenset())
    priced = estimates(considered(ask, known), **given_)
    return plan(ask, known, priced, rules=rules, budgets=budgets, open_circuits=open_circuits)


def order(made: Plan) -> list[str]:
    return [candidate.model.name for candidate in made.candidates]


CHAT = Ask(kind="chat")


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
    made = route(Ask(kind="chat", vision=True), registry(model("a/blind"), model("b/eyes", vision=True)))

    assert order(made) == ["b/eyes"]
    assert [(drop.model.name, drop.rule) for drop in made.dropped] == [("a/blind", "capability")]


@pytest.mark.parametrize("name", ["e", "embedding"])
def test_an_embedding_model_is_never_chatted_with(name: str) -> None:
    with pytest.raises(NoCandidate, match="it does not chat"):
        route(Ask(kind="chat", model=name), registry(model("a/e", "embedding", dimension=8)))


def test_what_does_not_fit_the_context_window_is_dropped() -> None:
    made = route(CHAT, registry(model("a/m", context_window=99), model("b/m", context_window=100)))

    assert order(made) == ["b/m"]
    assert made.dropped[0].rule == "context"


def test_an_unknown_price_is_dropped_and_said() -> None:
    with pytest.raises(NoCandidate, match="its price is unknown: set `price:` for it"):
        route(CHAT, registry(model("a/m", price=None)))


def test_an_open_circuit_is_passed_by_and_may_be_tried_later() -> None:
    known = registry(model("a/m"), model("b/m"))

    assert order(route(CHAT, known, open_circuits=frozenset({"a/m"}))) == ["b/m"]
    with pytest.raises(NoCandidate) as caught:
        route(CHAT, known, open_circuits=frozenset({"a/m", "b/m"}))
    assert caught.value.retryable


def test_without_fallback_one_is_asked() -> None:
    made = route(CHAT, registry(model("a/m"), model("b/m")), rules=Rules(auto_fallback=False))

    assert order(made) == ["a/m"]
    assert [(drop.model.name, drop.rule) for drop in made.dropped] == [("b/m", "fallback")]


# --- money ---------------------------------------------------------------------------------


def test_what_may_cost_more_than_the_cap_is_dropped() -> None:
    known = registry(model("dear/m"), model("cheap/m"))

    made = route(Ask(kind="chat", max_cost=Decimal(3)), known, dear="2", cheap="1")

    assert order(made) == ["cheap/m"]
    assert made.dropped[0].rule == "cost"


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


def test_a_budget_with_too_little_left_is_named() -> None:
    budget = Budget(name="team", limit=Decimal(10), period="day", match={"provider": "a"})

    with pytest.raises(BudgetExceeded) as caught:
        route(CHAT, registry(model("a/m")), budgets=[budget], left={"team": "1.5"})

    assert (caught.value.budget, caught.value.remaining, caught.value.needed) == ("team", Decimal("1.5"), Decimal(2))


def test_a_budget_that_does_not_cover_a_model_does_not_stop_it() -> None:
    budget = Budget(name="team", limit=Decimal(10), match={"provider": "a"})

    made = route(CHAT, registry(model("a/m"), model("b/m")), budgets=[budget], left={"team": "0"})

    assert order(made) == ["b/m"]
    assert made.dropped[0].rule == "budget"


def test_each_budget_holds_for_the_dearest_candidate_that_counts_against_it() -> None:
    budgets = [
        Budget(name="all", limit=Decimal(100)),
        Budget(name="a", limit=Decimal(100), match={"provider": "a"}),
        Budget(name="none", limit=Decimal(100), match={"provider": "z"}),
    ]

    made = route(CHAT, registry(model("a/m"), model("b/m")), budgets=budgets, a="1", b="4")

    assert made.holds(budgets) == {"all": Decimal(8), "a": Decimal(2)}
    assert made.worst_case == Decimal(8)


@pytest.mark.parametrize(
    ("ask", "task"),
    [
        (Ask(kind="chat"), "chat_small"),
        (Ask(kind="chat", task="vision"), "vision"),
        (Ask(kind="chat", model="vision"), "vision"),
        (Ask(kind="chat", model="m"), "chat_small"),
    ],
)
def test_a_call_is_charged_to_the_task_that_was_asked_for(ask: Ask, task: str) -> None:
    scope = ask.scope(model("a/m", "chat_small", "vision"))

    assert (scope.provider, scope.model, scope.task) == ("a", "m", task)


# --- whatever is asked of whatever registry ------------------------------------------------

tasks = st.lists(st.sampled_from(TASKS), min_size=1, max_size=3, unique=True).map(tuple)
ids = st.sampled_from(["m", "n", "o"])
amounts = st.decimals(0, 10, places=2)


@st.composite
def models(draw: st.DrawFn) -> Model:
    of_tasks = draw(tasks)
    return Model(
        id=draw(ids),
        provider_id=draw(st.sampled_from(["a", "b", "c"])),
        tasks=of_tasks,
        dimension=draw(st.sampled_from([4, 8])) if "embedding" in of_tasks else None,
        vision=draw(st.booleans()),
        context_window=draw(st.none() | st.integers(1, 200)),
        price=draw(st.none() | st.just(FREE) | st.just(PRICE)),
    )


registries = st.lists(models(), max_size=6, unique_by=lambda each: each.name).flatmap(
    lambda found: st.fixed_dictionaries({each.provider_id: st.integers(1, 3) for each in found}).map(
        lambda priority: registry(*found, priority=priority)
    )
)
asks = st.builds(
    Ask,
    kind=st.sampled_from(["chat", "embedding"]),
    model=st.none() | st.sampled_from(["auto", "m", "a/m", "vision", "embedding"]),
    task=st.none() | st.sampled_from(TASKS),
    preferred_model=st.none() | ids,
    vision=st.booleans(),
    max_cost=st.none() | amounts,
    bulk=st.booleans(),
)
rules = st.builds(
    Rules,
    auto_fallback=st.booleans(),
    cost_aware=st.booleans(),
    max_cost_per_request=st.none() | st.decimals("0.01", 10, places=2),
)
a_budget = st.builds(
    Budget,
    name=st.sampled_from(["x", "y"]),
    limit=amounts,
    match=st.dictionaries(st.sampled_from(["provider", "model"]), st.sampled_from(["a", "m"]), max_size=2),
)


@given(data=st.data(), known=registries, ask=asks, rules=rules, budgets=st.lists(a_budget, max_size=2))
def test_a_plan_is_pure_and_total_and_its_candidates_break_no_rule(
    data: st.DataObject, known: Registry, ask: Ask, rules: Rules, budgets: list[Budget]
) -> None:
    by_model: dict[str, Estimate | None] = {}
    for each in known:
        expected, more = data.draw(amounts), data.draw(amounts)
        tokens = data.draw(st.integers(0, 300))
        by_model[each.name] = (
            None
            if each.price is None
            else Estimate(
                expected=expected,
                worst_case=expected + more,
                input_tokens=tokens,
                output_tokens=0,
                context_tokens=tokens,
            )
        )
    open_circuits = frozenset(data.draw(st.lists(st.sampled_from(sorted(by_model) or ["-"]), max_size=2)))
    left = {budget.name: data.draw(amounts) for budget in budgets}
    priced = Estimates(by_model=by_model, remaining=left)

    def run() -> Plan | RequestRefused:
        try:
            return plan(ask, known, priced, rules=rules, budgets=budgets, open_circuits=open_circuits)
        except RequestRefused as refused:
            return refused

    made, again = run(), run()

    if isinstance(made, RequestRefused):
        assert str(again) == str(made)
        return
    assert again == made
    asked = considered(ask, known)
    names = [candidate.model.name for candidate in made.candidates] + [drop.model.name for drop in made.dropped]
    assert sorted(names) == sorted(each.name for each in asked)
    assert len(made.candidates) == 1 or rules.auto_fallback
    limit, _ = cap(ask, rules)
    for candidate in made.candidates:
        kept, estimate = candidate.model, candidate.estimate
        assert kept.price is not None
        assert kept.name not in open_circuits
        assert kept.vision or not ask.vision
        assert kept.context_window is None or estimate.context_tokens <= kept.context_window
        assert limit is None or estimate.worst_case <= limit
        assert (kept.dimension is not None) or ask.kind == "chat"
        for budget in budgets:
            assert not budget.covers(ask.scope(kept)) or estimate.worst_case <= left[budget.name]
    if ask.kind == "embedding":
        assert len({(candidate.model.id, candidate.model.dimension) for candidate in made.candidates}) == 1
    preferred = {each.name for each in known if ask.preferred_model in (each.id, each.name)}
    if ask.preferred_model is None:
        ranks = [known.provider_of(candidate.model).priority for candidate in made.candidates]
        assert ranks == sorted(ranks)
    elif ask.kind == "chat" and ask.model is None:
        ranked = [candidate.model.name in preferred for candidate in made.candidates]
        assert ranked == sorted(ranked, reverse=True)
