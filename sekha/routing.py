"""Which model serves a request, which stand behind it, and why: pure functions, one quick and one that explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias

from sekha.asks import PRICED_FIELDS, Ask, Conditions, Count, Counter, Estimates, Rules, Size, cap
from sekha.eligible import considered, incapable, preferred, unsure
from sekha.errors import (
    MOST_REASONS,
    BudgetExceeded,
    CostRefused,
    KeyNotAllowed,
    LimitsReached,
    NoCandidate,
    NotCapable,
    NotPriced,
    PromptTooLong,
    RequestRefused,
    dollars,
)
from sekha.field import Entrant, Rule, cap_at
from sekha.ledger import Budget, period_end
from sekha.lineup import LineUp, line_up
from sekha.places import OF_ONE_PROVIDER, SHORTLIST, placed, spread
from sekha.pricing import Estimate
from sekha.registry import TASKS, Model, Registry
from sekha.values import value
from sekha.vision import nearest

__all__ = [
    "SHORTLIST",
    "Ask",
    "Candidate",
    "Conditions",
    "Count",
    "Counter",
    "Estimates",
    "Explanation",
    "Plan",
    "Rule",
    "Rules",
    "Size",
    "Verdict",
    "cap",
    "cheapest",
    "considered",
    "explain",
    "plan",
    "put_by",
]

ANYTIME = Conditions()
_Kept: TypeAlias = tuple[int, Estimate]
"""The position of an entrant that is asked, and what it would cost."""
_ANY = Decimal(0)
"""Stands for every price where price does not decide."""
_Dropped: TypeAlias = tuple[Model, Rule, Any]
"""A model, the rule that drops it, and what a refusal has to know: what it lacks by `capability`, else its costs."""


class Candidate(NamedTuple):
    """A model that may serve the request, with what it will cost."""

    model: Model
    estimate: Estimate
    reason: str


@value
class Plan:
    """Who is asked, in this order."""

    ask: Ask
    candidates: tuple[Candidate, ...]
    """One to `SHORTLIST`; each later one is asked when those before it failed."""
    estimates: Estimates | None = field(default=None, repr=False, compare=False)
    """What it was made from; None where it was made for one candidate that was known before."""

    @property
    def first(self) -> Candidate:
        return self.candidates[0]

    @property
    def worst_case(self) -> Decimal:
        return max(candidate.estimate.worst_case for candidate in self.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Everything that decided over one model."""

    model: Model
    place: int | None
    """1 is asked first; None when it is not asked."""
    rule: Rule | None
    """The rule that dropped it."""
    why: str
    """Why it stands at its place, or what the rule says of it."""
    estimate: Estimate | None
    """None when its price is unknown, or it cannot do what is asked."""
    compared: Decimal | None
    """Dollars by which its price is compared with others'."""
    priority: int
    circuit: Literal["closed", "open", "half_open"]
    throttled_seconds: float
    """Until its provider's `limits:` let this request pass, and what it asked for with a 429 is over; 0 for at once."""
    latency_seconds: float | None
    equals: int
    """How many equals it was drawn among, itself included; 0 when it is not asked."""
    budgets: Mapping[str, Decimal]
    """What is left in the budgets that a call to it counts against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What became of every model that a request may mean: first those that are asked, in their order."""

    ask: Ask
    verdicts: tuple[Verdict, ...]
    refusal: RequestRefused | None = field(default=None, compare=False)
    """What is said to the caller when nobody can be asked."""

    @property
    def kept(self) -> tuple[Verdict, ...]:
        return tuple(each for each in self.verdicts if each.place is not None)

    @property
    def dropped(self) -> tuple[Verdict, ...]:
        return tuple(each for each in self.verdicts if each.place is None)


def plan(estimates: Estimates, registry: Registry, conditions: Conditions = ANYTIME) -> Plan:
    """Choose who is asked, and who stands behind.

    Preferred or named models go first, then the lower priority, then the lower price when `cost_aware`.
    Of equals one is drawn to go first, by weight and latency. A plan names at most `SHORTLIST`
    candidates, of one provider `OF_ONE_PROVIDER` where there are others, and one alone without
    `auto_fallback`; of all the others `explain` tells. Those whose providers asked to be left alone are
    named last, where there is room: their call waits its turn.

    Raises the refusal that helps most, by whichever rule dropped the model that came nearest to serving: what
    waiting mends; `CostRefused` or `BudgetExceeded` for the cheapest; `PromptTooLong`; `NotPriced` where something
    in the request keeps its price from being known; `KeyNotAllowed` where a
    model could and the key may not; `NotCapable`. Else `NoCandidate` with each model's reason.
    """
    ask, rules = estimates.size.ask, estimates.rules
    count = SHORTLIST if rules.auto_fallback else 1
    lined_up = line_up(ask, registry)
    kept = _shortlisted(lined_up, estimates, conditions, count)
    if conditions.paused and len(kept) < count:
        anybody = _shortlisted(lined_up, estimates, conditions._replace(paused={}), count)
        paused = [each for each in anybody if lined_up.entrants[each[0]].name in conditions.paused]
        kept += paused[: count - len(kept)]
    if not kept:
        awake = conditions._replace(paused={})
        raise _refusal([*_dropped(lined_up, estimates, awake)], estimates, registry, awake)
    candidates = _candidates(lined_up.entrants, kept, rules.cost_aware)
    return Plan(ask=ask, candidates=candidates, estimates=estimates)


def put_by(made: Plan, registry: Registry, conditions: Conditions) -> list[Model]:
    """Who is not in a plan, and whom nothing keeps from serving but what passes: a circuit, limits or a pause."""
    if made.estimates is None:
        return []
    asked = {candidate.model.name for candidate in made.candidates}
    dropped = _dropped(line_up(made.ask, registry), made.estimates, conditions)
    return [model for model, rule, _ in dropped if rule in ("circuit", "rate") and model.name not in asked]


def explain(estimates: Estimates, registry: Registry, conditions: Conditions = ANYTIME) -> Explanation:
    """Say of every model that the request may mean where it stands, or which rule drops it.

    What `plan` decides of the same arguments, looked at one by one: slow where there are many models.
    """
    ask, rules = estimates.ask, estimates.rules
    models = considered(ask, registry)
    priced = {model.name: _priced(model, estimates) for model in models}

    def objected(conditions: Conditions) -> dict[str, tuple[Rule, str] | None]:
        return {
            model.name: next(_objections(model, priced[model.name], estimates, conditions), None) for model in models
        }

    count = SHORTLIST if rules.auto_fallback else 1
    rank = _ranking(priced, registry, estimates)

    def chosen(objections: Mapping[str, object]) -> tuple[list[tuple[Model, int]], list[Model]]:
        """Who is asked, with the number of its equals, and who could be."""
        ranked = sorted(((rank(model), model) for model in models if objections[model.name] is None), key=itemgetter(0))
        ranks, able = [rank for rank, _ in ranked], [model for _, model in ranked]
        return [(able[at], ranks.count(ranks[at])) for at in spread(able, ranks, count, conditions)], able

    objections = objected(conditions)
    first, able = chosen(objections)
    if conditions.paused and len(first) < count:
        awake = objected(conditions._replace(paused={}))
        paused = [each for each in chosen(awake)[0] if each[0].name in conditions.paused][: count - len(first)]
        first += paused
        objections |= {model.name: None for model, _ in paused}
    asked_for = [model for model, _ in first]
    for model in able:
        if model not in asked_for:
            objections[model.name] = ("fallback", _behind(model, asked_for, rules))

    def verdict(model: Model, place: int | None, equals: int) -> Verdict:
        objection = objections[model.name]
        scope = ask.scope(model)
        return Verdict(
            model=model,
            place=place,
            rule=None if objection is None else objection[0],
            why=placed(_reason(estimates, registry, model), (place or 1) - 1) if objection is None else objection[1],
            estimate=(estimate := priced[model.name]),
            compared=None if estimate is None else estimates.compared(model, estimate),
            priority=registry.provider_of(model).priority,
            circuit=_state(model, conditions),
            throttled_seconds=max(
                conditions.throttled.get(model.provider_id, 0.0), conditions.paused.get(model.name, 0.0)
            ),
            latency_seconds=conditions.latency_seconds.get(model.name),
            equals=equals,
            budgets={each.name: estimates.left(each) for each in estimates.budgets if each.covers(scope)},
        )

    asked = [verdict(model, place, equals) for place, (model, equals) in enumerate(first, 1)]
    left_out = [verdict(model, None, 0) for model in models if objections[model.name] is not None]
    refusal = None
    if not asked:
        dropped = [(each.model, each.rule, _detail(each, estimates)) for each in left_out if each.rule is not None]
        refusal = _refusal(dropped, estimates, registry, conditions._replace(paused={}))
    return Explanation(ask=ask, verdicts=(*asked, *left_out), refusal=refusal)


def cheapest(
    estimates: Estimates, registry: Registry, conditions: Conditions = ANYTIME
) -> tuple[Model, Decimal] | None:
    """Where the request costs least, and how much: of those that may serve it, else of those that are above a cap.

    None where no cap keeps anybody from serving it.
    """
    lined_up = line_up(estimates.ask, registry)
    found = _ruled(lined_up, estimates, conditions._replace(paused={}))
    for wanted in (None, "cost"):
        able = [(costs, at) for at, (_, rule, costs) in enumerate(found) if rule == wanted]
        if able:
            _, at = min(able)
            return found[at][0], _least(estimates, found[at][0])
    return None


# --- quickly -------------------------------------------------------------------------------


def _shortlisted(lined_up: LineUp, estimates: Estimates, conditions: Conditions, count: int) -> list[_Kept]:
    entrants = lined_up.entrants
    most, within = lined_up.caps(estimates)
    cost_aware = estimates.rules.cost_aware
    unbounded = estimates.size.unbounded is not None
    if len(entrants) > SHORTLIST and not unbounded:
        best = lined_up.best(estimates, most, within, conditions, count)
        if best is not None:
            chosen: list[_Kept] = []
            for at in best:
                model, name, _, _, _ = entrants[at]
                limit = cap_at(at, most, within) if within else most
                chosen.append((at, estimates.priced(model, limit, name)))
            return chosen
    open_circuits, throttled, _, _, paused, _ = conditions
    able: list[tuple[int, Decimal, int, Estimate]] = []
    for at, (model, name, group, _, _) in enumerate(entrants):
        if name in open_circuits or model.provider_id in throttled or name in paused:
            continue
        if unbounded and not estimates.knows_most(model):
            continue
        limit = cap_at(at, most, within) if within else most
        estimate = estimates.priced(model, limit, name)
        if limit is not None and estimate.worst_case > limit:
            continue
        if model.context_window and estimate.context_tokens > model.context_window:
            continue
        able.append((group, estimates.compared(model, estimate) if cost_aware else _ANY, at, estimate))
    if len(able) > 1:
        able.sort()
        models = [entrants[at].model for _, _, at, _ in able]
        able = [able[at] for at in spread(models, [each[:2] for each in able], count, conditions)]
    return [each[2:] for each in able]


def _candidates(entrants: Sequence[Entrant], kept: Sequence[_Kept], cost_aware: bool) -> tuple[Candidate, ...]:
    found: list[Candidate] = []
    new = tuple.__new__  # half of the time
    for place, (at, estimate) in enumerate(kept):
        model, _, _, why, why_cheap = entrants[at]
        found.append(new(Candidate, (model, estimate, (why_cheap if cost_aware else why)[place])))
    return tuple(found)


# --- in full -------------------------------------------------------------------------------


def _objections(
    model: Model, estimate: Estimate | None, estimates: Estimates, conditions: Conditions
) -> Iterator[tuple[Rule, str]]:
    """What speaks against a model. What passes by itself comes last, so that it is named only where nothing else is."""
    ask = estimates.ask
    if (lack := incapable(ask, model)) is not None:
        yield "capability", lack.why
    if estimate is None:
        yield "price", _unpriced(estimates, model)
        return
    if model.context_window and estimate.context_tokens > model.context_window:
        needs, takes = f"{estimate.context_tokens:,}", f"{model.context_window:,}"
        yield "context", f"{needs} tokens do not fit its context window of {takes}"
    limit, name = cap(ask, estimates.rules)
    if limit is not None and estimate.worst_case > limit:
        yield "cost", f"it may cost {dollars(estimate.worst_case)}, above `{name}` of {dollars(limit)}"
    scope = ask.scope(model)
    for budget in estimates.budgets:
        left = estimates.left(budget)
        if budget.covers(scope) and estimate.worst_case > left:
            yield "budget", f"budget {budget.name!r} has {dollars(left)} left of {dollars(budget.limit)}"
    if model.name in conditions.open_circuits:
        if model.name in conditions.half_open:
            yield "circuit", "its circuit is half open after repeated failures, and one call probes it just now"
        else:
            yield "circuit", "its circuit is open after repeated failures"
    if (seconds := conditions.throttled.get(model.provider_id)) is not None:
        yield "rate", _throttled(seconds)
    if (seconds := conditions.paused.get(model.name)) is not None:
        yield "rate", f"its provider limits us (429), and asked to be left alone for {math.ceil(seconds)} s more"


def _state(model: Model, conditions: Conditions) -> Literal["closed", "open", "half_open"]:
    if model.name in conditions.half_open:
        return "half_open"
    return "open" if model.name in conditions.open_circuits else "closed"


def _priced(model: Model, estimates: Estimates) -> Estimate | None:
    """What a call would cost; None for a model that could not serve at any price, for which nothing was counted."""
    return None if incapable(estimates.ask, model) else estimates.of(model)


def _unpriced(estimates: Estimates, model: Model) -> str:
    if estimates.knows_price(model):
        what = estimates.size.unbounded
        return f"how much `{what}` may cost is unknown: leave that out, or set `context_window:` for the model"
    if model.price is not None and (what := estimates.ask.priced_apart) is not None:
        return f"its price with `{what}` is unknown: leave that out, or set `price:` for the model"
    return "its price is unknown: set `price:` for it, or `unknown_price: free`"


def _throttled(seconds: float) -> str:
    if math.isinf(seconds):
        return "its provider's `limits:` never let as many tokens pass in a minute"
    return f"its provider's `limits:` are reached for the next {math.ceil(seconds)} s"


def _ranking(
    priced: Mapping[str, Estimate | None], registry: Registry, estimates: Estimates
) -> Callable[[Model], tuple[bool, int, str, Decimal]]:
    """What says where a model stands among those that may serve: equals stand at the same."""
    ask = estimates.ask
    first = preferred(ask, registry)

    def rank(model: Model) -> tuple[bool, int, str, Decimal]:
        estimate = priced[model.name]
        price = _ANY
        if estimate is not None and estimates.rules.cost_aware:
            price = estimates.compared(model, estimate)
        return model not in first, registry.provider_of(model).priority, unsure(ask, model), price

    return rank


def _behind(model: Model, asked: Sequence[Model], rules: Rules) -> str:
    """Why one that could serve is not asked."""
    if not rules.auto_fallback:
        return "`auto_fallback` is off"
    if sum(each.provider_id == model.provider_id for each in asked) >= OF_ONE_PROVIDER:
        return f"{OF_ONE_PROVIDER} others of its provider stand before it, and {SHORTLIST} in all are asked"
    return f"{len(asked)} others stand before it"


def _reason(estimates: Estimates, registry: Registry, model: Model) -> str:
    ask = estimates.ask
    if model in preferred(ask, registry):
        return "preferred" if ask.preferred_model else "the default model"
    if ask.model in (model.id, model.name):
        return "named by the request"
    doubt = unsure(ask, model)
    why = f"priority {registry.provider_of(model).priority}" + (f", {doubt}" if doubt else "")
    return why + (", then price" if estimates.rules.cost_aware else "")


# --- why nobody ----------------------------------------------------------------------------


def _ruled(lined_up: LineUp, estimates: Estimates, conditions: Conditions) -> list[tuple[Model, Rule | None, Any]]:
    """Each of the models with the first rule that drops it: a thousand of them in less than a millisecond."""
    entrants = lined_up.entrants
    found: list[tuple[Rule | None, Any]] | None = None
    if len(entrants) > SHORTLIST and estimates.size.unbounded is None:
        found = lined_up.rules(estimates, *lined_up.caps(estimates), conditions)
    if found is None:
        found = [
            (_first_rule(model, estimates, conditions), _least(estimates, model)) for model, _, _, _, _ in entrants
        ]
    models = zip(lined_up.models, lined_up.places, lined_up.left_out, strict=True)
    return [(model, *(left_out if at < 0 else found[at])) for model, at, left_out in models]


def _dropped(lined_up: LineUp, estimates: Estimates, conditions: Conditions) -> Iterator[_Dropped]:
    for model, rule, detail in _ruled(lined_up, estimates, conditions):
        if rule is not None:
            yield model, rule, detail


def _first_rule(model: Model, estimates: Estimates, conditions: Conditions) -> Rule | None:
    return next((rule for rule, _ in _objections(model, _priced(model, estimates), estimates, conditions)), None)


def _least(estimates: Estimates, model: Model) -> Decimal:
    """Dollars that have to be held for a call to a model whose price is known, at the least."""
    return estimates.priced(model, Decimal(0), model.name).worst_case


def _detail(verdict: Verdict, estimates: Estimates) -> Any:
    if verdict.rule == "capability":
        lack = incapable(estimates.ask, verdict.model)
        return None if lack is None else lack.of
    return None if verdict.estimate is None else _least(estimates, verdict.model)


def _refusal(
    dropped: Sequence[_Dropped], estimates: Estimates, registry: Registry, conditions: Conditions
) -> RequestRefused:
    ask = estimates.ask
    by_rule: dict[Rule, list[_Dropped]] = {}
    for each in dropped:
        by_rule.setdefault(each[1], []).append(each)
    waits = [_wait(model, conditions) for model, _, _ in by_rule.get("rate", ())]
    soon = [wait for wait in waits if not math.isinf(wait)]
    of_money = [*by_rule.get("cost", ()), *by_rule.get("budget", ())]
    unpriced = _unpriced_by(by_rule.get("price", ()), estimates)
    if not soon and "circuit" not in by_rule and of_money:
        # Of equals the first that was considered.
        return _too_dear(min((each for each in dropped if each[1] in ("cost", "budget")), key=_costs)[0], estimates)
    reasons = [(model.name, _why(model, rule, estimates, conditions)) for model, rule, _ in dropped[:MOST_REASONS]]
    more = len(dropped) - len(reasons)
    if soon or (waits and "circuit" not in by_rule and not of_money):
        return LimitsReached(
            str(ask), reasons, more=more, retryable=bool(soon), retry_after_seconds=min(soon, default=None)
        )
    if "circuit" in by_rule or of_money:
        return NoCandidate(str(ask), reasons, more=more, retryable="circuit" in by_rule)
    if too_small := by_rule.get("context"):
        widest = max((model for model, _, _ in too_small), key=lambda model: model.context_window or 0)
        estimate = estimates.of(widest)
        return PromptTooLong(
            str(ask),
            reasons,
            more=more,
            field="messages" if ask.kind == "chat" else "input",
            needs=0 if estimate is None else estimate.context_tokens,
            model=widest.name,
            takes=widest.context_window or 0,
        )
    if unpriced is not None:
        field = unpriced if unpriced in PRICED_FIELDS else "messages"
        return NotPriced(str(ask), reasons, more=more, field=field, what=unpriced)
    if "price" not in by_rule and (dropped or ask.kind == "embedding"):
        return _not_capable(dropped, reasons, more, ask, registry)
    return NoCandidate(str(ask), reasons, more=more)


def _unpriced_by(dropped: Sequence[_Dropped], estimates: Estimates) -> str | None:
    """What in the request keeps a price that is known otherwise from being so; None where that is for nobody."""
    for model, _, _ in dropped:
        if estimates.knows_price(model):
            return estimates.size.unbounded
        if model.price is not None:
            return estimates.ask.priced_apart
    return None


def _costs(dropped: _Dropped) -> Any:
    return dropped[2]


def _why(model: Model, rule: Rule, estimates: Estimates, conditions: Conditions) -> str:
    objections = _objections(model, _priced(model, estimates), estimates, conditions)
    return next((why for found, why in objections if found == rule), "")


def _wait(model: Model, conditions: Conditions) -> float:
    return conditions.throttled.get(model.provider_id, 0.0)


def _too_dear(model: Model, estimates: Estimates) -> RequestRefused:
    """The refusal where nothing but money keeps this model, the cheapest, from serving."""
    ask, needed, scope = estimates.ask, _least(estimates, model), estimates.ask.scope(model)
    limit, limit_name = cap(ask, estimates.rules)
    if limit is not None and needed > limit:
        name, replies = model.name, ask.kind == "chat"
        return CostRefused(limit=limit, limit_name=limit_name, cheapest=name, cost=needed, replies=replies)
    budget = next(each for each in estimates.budgets if each.covers(scope) and needed > estimates.left(each))
    return BudgetExceeded(
        budget.name,
        limit=budget.limit,
        remaining=estimates.left(budget),
        needed=needed,
        period=budget.period,
        resets=_resets(budget, needed, estimates),
    )


def _not_capable(
    dropped: Sequence[_Dropped], reasons: Sequence[tuple[str, str]], more: int, ask: Ask, registry: Registry
) -> RequestRefused:
    """The refusal where no model that was asked for can do it, or the key may use none that can."""
    lacking = {lack: model for model, _, lack in reversed(dropped)}
    if (model := lacking.get("key")) is not None and ask.allowed is not None and ask.key is not None:
        models, tasks = ask.allowed
        if ask.allowed.covers(model):
            return KeyNotAllowed(ask.key, ask.task_at(model), sorted(tasks))
        return KeyNotAllowed(ask.key, model.name, [*sorted(models), *sorted(tasks)])
    if "limits" in lacking and ask.pictures is not None:
        limits = dict.fromkeys(model.vision_limits for model, _, lack in dropped if lack == "limits")
        breaches = (ask.pictures.breach(each) for each in limits)
        refusal = nearest(breach for breach in breaches if breach is not None)
        if refusal is not None:
            return refusal
    if ask.kind == "embedding":
        if ask.model is None or ask.model in ("auto", *TASKS):
            return NoCandidate(str(ask), reasons, more=more)
        reasons = [
            (each.name, f"it does not embed: its task is {', '.join(each.tasks)}") for each in registry.named(ask.model)
        ]
        able = [model.id for model in registry.for_task("embedding")]
        return NotCapable(str(ask), reasons, able=[*dict.fromkeys(able)][:SHORTLIST])
    field = "model"
    if "audio" in lacking:
        field = "messages"
    elif "tools" in lacking:
        field = ask.tools or "tools"
    elif "images" in lacking:
        field = "require_vision" if ask.pictures is None else ask.pictures.each[0].field
    elif ask.model is None and ask.task is not None:
        field = "task"
    anybody = ask._replace(model=None, task=None, preferred_model=None)
    able = [entrant.model.id for entrant in line_up(anybody, registry).entrants[: 2 * SHORTLIST]]
    return NotCapable(str(ask), reasons, more=more, field=field, able=[*dict.fromkeys(able)][:SHORTLIST])


def _resets(budget: Budget, needed: Decimal, estimates: Estimates) -> str | None:
    """When waiting helps, in ISO 8601; None when it never does."""
    ends = None if estimates.at is None or needed > budget.limit else period_end(budget.period, estimates.at)
    return None if ends is None else f"{ends:%Y-%m-%dT%H:%MZ}"
