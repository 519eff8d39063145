"""Which model serves a request, which stand behind it, and why: one pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias

from sekha.errors import BudgetExceeded, CostRefused, NoCandidate, RequestRefused, UnknownModel, dollars
from sekha.ledger import Budget, Scope
from sekha.pricing import Estimate
from sekha.registry import TASKS, Model, Registry, Task

__all__ = ["Ask", "Candidate", "Dropped", "Estimates", "Plan", "Rule", "Rules", "cap", "considered", "plan"]

NO_CHAT: frozenset[Task] = frozenset({"embedding", "image_generation"})
Rule: TypeAlias = Literal["capability", "context", "circuit", "price", "cost", "budget", "fallback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request asks of a model, whatever it is to do with it."""

    kind: Literal["chat", "embedding"]
    model: str | None = None
    """A model, `provider/model`, a task's name, `auto`, or None."""
    task: Task | None = None
    preferred_model: str | None = None
    """Goes first, but unlike `model` other models of the task stand behind it."""
    vision: bool = False
    max_cost: Decimal | None = None
    priced_apart: str | None = None
    """A field of the request that providers bill otherwise than by the prices of their tokens."""
    bulk: bool = False
    """Many requests' worth of work: `max_cost_per_request` does not cap it, `max_cost` does."""
    key: str | None = None
    tags: frozenset[str] = frozenset()

    def scope(self, model: Model) -> Scope:
        """What a call to the model would be charged to."""
        task = self.task or (self.model if self.model in TASKS else None) or model.tasks[0]
        return Scope(provider=model.provider_id, model=model.id, task=task, key=self.key, tags=self.tags)

    def __str__(self) -> str:
        what = self.model if self.model not in (None, "auto") else self.task or self.kind
        return f"{what!r}" + (" with images" if self.vision else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The file's `routing:` section, as far as it decides."""

    auto_fallback: bool = True
    cost_aware: bool = True
    max_cost_per_request: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """The price of the request at every model considered, and what the budgets had left."""

    by_model: Mapping[str, Estimate | None] = field(repr=False)
    """`provider/model` → estimate; None where the price is unknown."""
    remaining: Mapping[str, Decimal] = field(default_factory=dict)
    """Budget → dollars left when this was estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model that may serve the request, with what it will cost."""

    model: Model
    estimate: Estimate
    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    model: Model
    rule: Rule
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is asked, in this order, and who is not."""

    ask: Ask
    candidates: tuple[Candidate, ...]
    """At least one; each later one is asked when those before it failed."""
    dropped: tuple[Dropped, ...] = ()

    @property
    def first(self) -> Candidate:
        return self.candidates[0]

    @property
    def worst_case(self) -> Decimal:
        return max(candidate.estimate.worst_case for candidate in self.candidates)

    def holds(self, budgets: Sequence[Budget]) -> dict[str, Decimal]:
        """Dollars to hold against each budget: the dearest candidate that counts against it."""
        amounts: dict[str, Decimal] = {}
        for budget in budgets:
            for candidate in self.candidates:
                if budget.covers(self.ask.scope(candidate.model)):
                    most = amounts.get(budget.name, Decimal(0))
                    amounts[budget.name] = max(most, candidate.estimate.worst_case)
        return amounts


def considered(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """The models that a request may mean, the preferred ones first, else by the providers' priority.

    Raises `UnknownModel` for a name that nothing carries.
    """
    if ask.kind == "embedding":
        return _embedding_models(ask, registry)
    if ask.model not in (None, "auto") and ask.model not in TASKS:
        return registry.named(ask.model)
    task = ask.task or ask.model
    if task in TASKS:
        models = registry.for_task(task)
    elif task in (None, "auto"):
        models = registry.chat_models()
    else:
        raise UnknownModel(str(task), TASKS, kind="task")
    preferred = _preferred(ask, registry)
    if ask.preferred_model:
        models = (*preferred, *models)
    first = [model for model in preferred if model in models]
    return tuple(dict.fromkeys([*first, *models]))


def _preferred(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """The models that go first: those the caller prefers, else the file's default for the role."""
    if ask.preferred_model:
        return registry.named(ask.preferred_model)
    task = ask.task or (None if ask.model == "auto" else ask.model)
    role = _ROLES.get("vision" if ask.vision and task is None else task)
    return registry.default_for(role) if role is not None and role in registry.default_models else ()


_ROLES: Mapping[str | None, str] = {None: "chat_fast", "chat_smart": "chat_smart", "vision": "chat_vision"}
"""Task of a chat → the role in `default_models` whose model goes first; no task is auto-routing."""


def _embedding_models(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """One model, at every provider that has it: another model's vectors would not be comparable."""
    if ask.model in (None, "auto", "embedding"):
        found = registry.default_for("embedding")[:1]
        if not found:
            return ()
        return tuple(model for model in registry.models if _same_space(model, found[0]))
    found = tuple(model for model in registry.named(ask.model) if model.dimension is not None)
    return tuple(model for model in found if _same_space(model, found[0]))


def _same_space(model: Model, other: Model) -> bool:
    return (model.id, model.dimension) == (other.id, other.dimension)


def plan(
    ask: Ask,
    registry: Registry,
    estimates: Estimates,
    *,
    rules: Rules,
    budgets: Sequence[Budget] = (),
    open_circuits: frozenset[str] = frozenset(),
) -> Plan:
    """Choose the candidates for a request and say what dropped the others.

    Raises the refusal that helps most: when models that are able and healthy are dropped for money,
    `CostRefused` or `BudgetExceeded` for the cheapest; else `NoCandidate` with each model's reason.
    """
    models = considered(ask, registry)
    limits = _Limits(rules, budgets, open_circuits)
    dropped: list[Dropped] = []
    kept: list[Model] = []
    for model in models:
        verdict = next(_objections(ask, model, estimates, limits), None)
        if verdict is None:
            kept.append(model)
        else:
            dropped.append(verdict)
    if not kept:
        raise _refusal(ask, dropped, estimates, rules, budgets)

    ranked = sorted(kept, key=_rank(ask, registry, estimates, rules, models))
    if not rules.auto_fallback:
        dropped += [Dropped(model, "fallback", "`auto_fallback` is off") for model in ranked[1:]]
        ranked = ranked[:1]
    candidates = tuple(
        Candidate(model=model, estimate=_estimate(model, estimates), reason=_reason(ask, registry, model, at, rules))
        for at, model in enumerate(ranked)
    )
    return Plan(ask=ask, candidates=candidates, dropped=tuple(dropped))


@dataclass(frozen=True, slots=True)
class _Limits:
    rules: Rules
    budgets: Sequence[Budget]
    open_circuits: frozenset[str]


def _objections(ask: Ask, model: Model, estimates: Estimates, limits: _Limits) -> Iterator[Dropped]:
    if ask.kind == "chat" and NO_CHAT.issuperset(model.tasks):
        yield Dropped(model, "capability", f"it does not chat: its task is {', '.join(model.tasks)}")
    if ask.vision and not model.vision:
        yield Dropped(model, "capability", "it does not take images")
    if model.name in limits.open_circuits:
        yield Dropped(model, "circuit", "its circuit is open after repeated failures")
    estimate = estimates.by_model.get(model.name)
    if estimate is None:
        yield Dropped(model, "price", _unpriced(ask, model))
        return
    if model.context_window and estimate.context_tokens > model.context_window:
        needs, takes = f"{estimate.context_tokens:,}", f"{model.context_window:,}"
        yield Dropped(model, "context", f"{needs} tokens do not fit its context window of {takes}")
    limit, name = cap(ask, limits.rules)
    if limit is not None and estimate.worst_case > limit:
        most = dollars(estimate.worst_case)
        yield Dropped(model, "cost", f"it may cost {most}, above `{name}` of {dollars(limit)}")
    scope = ask.scope(model)
    for budget in limits.budgets:
        left = estimates.remaining.get(budget.name, budget.limit)
        if budget.covers(scope) and estimate.worst_case > left:
            yield Dropped(
                model, "budget", f"budget {budget.name!r} has {dollars(left)} left of {dollars(budget.limit)}"
            )


def _unpriced(ask: Ask, model: Model) -> str:
    if model.price is not None and ask.priced_apart is not None:
        return f"its price with `{ask.priced_apart}` is unknown: leave that out, or set `price:` for the model"
    return "its price is unknown: set `price:` for it, or `unknown_price: free`"


def cap(ask: Ask, rules: Rules) -> tuple[Decimal | None, str]:
    """The dollars that one call may cost, and the name of the limit that says so."""
    per_request = None if ask.bulk else rules.max_cost_per_request
    limits = [(ask.max_cost, "max_cost"), (per_request, "max_cost_per_request")]
    return min(((cap, name) for cap, name in limits if cap is not None), default=(None, ""))


def _estimate(model: Model, estimates: Estimates) -> Estimate:
    estimate = estimates.by_model[model.name]
    if estimate is None:
        raise ValueError(f"{model.name!r} was kept without an estimate")
    return estimate


def _rank(
    ask: Ask, registry: Registry, estimates: Estimates, rules: Rules, models: Sequence[Model]
) -> Callable[[Model], tuple[bool, int, Decimal, int]]:
    """Preferred first, then priority, then price when `cost_aware`, then the order of the file."""
    preferred = frozenset(model.name for model in _preferred(ask, registry))
    order = {model.name: at for at, model in enumerate(models)}

    def key(model: Model) -> tuple[bool, int, Decimal, int]:
        price = _estimate(model, estimates).expected if rules.cost_aware else Decimal(0)
        priority = registry.provider_of(model).priority
        return (model.name not in preferred, priority, price, order[model.name])

    return key


def _reason(ask: Ask, registry: Registry, model: Model, at: int, rules: Rules) -> str:
    if model in _preferred(ask, registry):
        why = "preferred" if ask.preferred_model else "the default model"
    elif ask.model in (model.id, model.name):
        why = "named by the request"
    else:
        why = f"priority {registry.provider_of(model).priority}" + (", then price" if rules.cost_aware else "")
    return why if at == 0 else f"fallback {at}: {why}"


def _refusal(
    ask: Ask, dropped: Sequence[Dropped], estimates: Estimates, rules: Rules, budgets: Sequence[Budget]
) -> RequestRefused:
    rule_of = {drop.rule for drop in dropped}
    priced = [drop.model for drop in dropped if drop.rule in ("cost", "budget")]
    limit, limit_name = cap(ask, rules)
    if priced and not rule_of & {"circuit", "price"}:
        cheapest = min(priced, key=lambda model: _estimate(model, estimates).worst_case)
        needed = _estimate(cheapest, estimates).worst_case
        if limit is not None and needed > limit:
            replies = ask.kind == "chat"
            return CostRefused(limit=limit, limit_name=limit_name, cheapest=cheapest.name, cost=needed, replies=replies)
        for budget in budgets:
            left = estimates.remaining.get(budget.name, budget.limit)
            if budget.covers(ask.scope(cheapest)) and needed > left:
                return BudgetExceeded(
                    budget.name, limit=budget.limit, remaining=left, needed=needed, period=budget.period, resets=None
                )
    reasons = [(drop.model.name, drop.why) for drop in dropped]
    return NoCandidate(str(ask), reasons, retryable="circuit" in rule_of)
