"""What a decision is made from: what is asked, under which rules, what it costs, and what is shut just now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Literal, NamedTuple

from sekha.ledger import Budget, Scope
from sekha.pricing import ASSUMED_REPLY, LONGEST_REPLY, Estimate, estimate_chat, estimate_embedding
from sekha.registry import TASKS, Model, Task
from sekha.values import value
from sekha.vision import Pictures

__all__ = ["PRICED_FIELDS", "Allowed", "Ask", "Conditions", "Count", "Counter", "Estimates", "Rules", "Size", "cap"]

PRICED_FIELDS = frozenset({"modalities", "plugins", "provider", "service_tier", "tools", "web_search_options"})
"""What `Ask.priced_apart` may name that is a field of the request; anything else stands in its messages."""


class Allowed(NamedTuple):
    """What the caller's key may use. Empty `models` and `tasks` allow all."""

    models: frozenset[str] = frozenset()
    """Names as callers write them: a model's id, or `provider/model`."""
    tasks: frozenset[str] = frozenset()

    def covers(self, model: Model) -> bool:
        """Whether the model is among them, and does one of the tasks."""
        return self._names(model) and (not self.tasks or not self.tasks.isdisjoint(model.tasks))

    def instead_of(self, models: Iterable[Model]) -> list[str]:
        """What may be used where none of these may: models, or tasks where those are what leaves them out."""
        return sorted(self.tasks if any(map(self._names, models)) else self.models)

    def _names(self, model: Model) -> bool:
        return not self.models or model.id in self.models or model.name in self.models


# What is made anew for each request is a named tuple: a frozen dataclass takes four times as long to make.
class Ask(NamedTuple):
    """What a request asks of a model, whatever it is to do with it."""

    kind: Literal["chat", "embedding"]
    model: str | None = None
    """A model, `provider/model`, a task's name, `auto`, or None."""
    task: Task | None = None
    preferred_model: str | None = None
    """Goes first, but unlike `model` other models of the task stand behind it."""
    vision: bool = False
    pictures: Pictures | None = None
    """The images that go with it, which not every model that sees can take."""
    max_cost: Decimal | None = None
    priced_apart: str | None = None
    """A field of the request that providers bill otherwise than by the prices of their tokens."""
    bulk: bool = False
    """Many requests' worth of work: `max_cost_per_request` does not cap it, `max_cost` does."""
    key: str | None = None
    allowed: Allowed | None = None
    """What its key may use; None for everything."""
    tags: frozenset[str] = frozenset()
    tools: str | None = None
    """The field that has tools to call, `tools` or `functions`; None where there are none."""
    audio: bool = False
    """Whether audio goes in."""
    tier: str | None = None
    """The service tier that is asked for, where that may be dearer than the ordinary one."""

    def scope(self, model: Model) -> Scope:
        """What a call to the model would be charged to."""
        return _scope(model.provider_id, model.id, self.task_at(model), self.key, self.tags)

    def task_at(self, model: Model) -> str:
        """The task that a call to the model counts as.

        Where none is named it is the model's first, of those that the key may use. But images are looked at: whoever
        names the model does not get round what `vision` may cost, nor round who may use it.
        """
        task = self.task or (self.model if self.model in TASKS else None)
        if task is not None:
            return task
        if (self.vision or self.pictures is not None) and "vision" in model.tasks:
            return "vision"
        tasks = self.allowed.tasks if self.allowed is not None else ()
        return next((each for each in model.tasks if each in tasks), model.tasks[0])

    def may_use(self, model: Model) -> bool:
        """Whether the caller's key may, as the task that the call counts as."""
        allowed = self.allowed
        if allowed is None:
            return True
        return allowed.covers(model) and (not allowed.tasks or self.task_at(model) in allowed.tasks)

    def __str__(self) -> str:
        what = self.model if self.model not in (None, "auto") else self.task or self.kind
        return f"{what!r}" + (" with images" if self.vision else "")


# A request needs the same one four times over, and the next request as a rule that one too.
@lru_cache(maxsize=256)
def _scope(provider: str, model: str, task: str, key: str | None, tags: frozenset[str]) -> Scope:
    return Scope(provider=provider, model=model, task=task, key=key, tags=tags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The file's `routing:` section, as far as it decides."""

    auto_fallback: bool = True
    cost_aware: bool = True
    max_cost_per_request: Decimal | None = None


def cap(ask: Ask, rules: Rules) -> tuple[Decimal | None, str]:
    """The dollars that one call may cost, and the name of the limit that says so."""
    most, per_request = ask.max_cost, None if ask.bulk else rules.max_cost_per_request
    if per_request is None or (most is not None and most <= per_request):
        return most, "" if most is None else "max_cost"
    return per_request, "max_cost_per_request"


class Conditions(NamedTuple):
    """What is shut or slow just now. A snapshot: the mappings do not change once they are in here."""

    open_circuits: frozenset[str] = frozenset()
    """Models, as `provider/model`, that are left alone because they kept failing."""
    throttled: Mapping[str, float] = {}
    """Provider → seconds until its rate limit lets this request pass; infinite when it never will."""
    latency_seconds: Mapping[str, float] = {}
    """`provider/model` → the seconds that its answers take of late."""
    draw: float = 0.0
    """In [0, 1): chooses among equals."""
    paused: Mapping[str, float] = {}
    """`provider/model` → seconds for which its provider asked, by a 429, to be left alone."""
    half_open: frozenset[str] = frozenset()
    """Models whose circuit is half open. Those that are in `open_circuits` too are being probed just now."""


class Counter(NamedTuple):
    """How a model counts a request."""

    name: str
    exact: bool
    """Whether its provider counts just so."""


class Count(NamedTuple):
    tokens: int
    longest: int = 0
    """The longest of the texts to embed."""


class Size(NamedTuple):
    """What a request is, whoever serves it."""

    ask: Ask
    images: int = 0
    replies: int = 1
    reply_limit: int | None = None
    """Tokens that the caller allows each reply."""
    writes_cache: bool = False
    unbounded: str | None = None
    """What in it nobody can count but its provider: at the worst it fills the context window."""
    thinking: int = 0
    """Tokens that a reply is to think for, at a model that is told a number of them."""


# It goes from step to step, and what does is a dataclass: Prefect takes a tuple for several values.
@value
class Estimates:
    """What the request costs at any model that was counted for, worked out when it is asked."""

    size: Size
    counters: Mapping[str, Counter]
    """Model id → how it counts."""
    counts: Mapping[str, Count]
    """Counter → what it made of the request."""
    usual: Mapping[str, int] = field(default_factory=dict)
    """`provider/model` → tokens of its usual reply, where it has a history."""
    compared_at: int | None = None
    """Tokens of reply by which prices are compared, since some of the models have a history."""
    rules: Rules = Rules()
    budgets: tuple[Budget, ...] = ()
    remaining: Mapping[str, Decimal] = field(default_factory=dict)
    """Budget → dollars left when this was estimated; a budget that is not here is untouched."""
    at: datetime | None = None
    """When the budgets were looked at."""
    largest_call: int | None = None
    """Tokens of the largest call at the most, where it may be sent in several."""

    @property
    def ask(self) -> Ask:
        return self.size.ask

    @property
    def tokens(self) -> int:
        """Tokens that go in, by whichever tokenizer makes the most of them."""
        most = 0
        for tokens, _ in self.counts.values():
            if tokens > most:  # noqa: PLR1730 - for each request, and `max` takes three times as long
                most = tokens
        return most

    @property
    def tokens_at_once(self) -> int:
        """Tokens for which the limits of a provider need to have room: each further call waits for its own."""
        return self.tokens if self.largest_call is None else self.largest_call

    def of(self, model: Model) -> Estimate | None:
        """What one call to the model will cost; None where its price is unknown."""
        if not self.knows_price(model) or not self.knows_most(model):
            return None
        scope = self.ask.scope(model)
        most, _ = cap(self.ask, self.rules)
        caps = [self.left(budget) for budget in self.budgets if budget.covers(scope)]
        return self.priced(model, min([*caps, most] if most is not None else caps, default=None), model.name)

    def knows_price(self, model: Model) -> bool:
        if model.price is None:
            return False
        # With what is priced apart the map's price is another one, which would record too little.
        if self.ask.priced_apart is None or model.price.source != "price map" or model.price.is_free:
            return True
        return self.ask.priced_apart == "service_tier" and any(name == self.ask.tier for name, _ in model.price.tiers)

    def knows_most(self, model: Model) -> bool:
        """Whether there is a bound on what a call to a model whose price is known may cost."""
        return (
            self.size.unbounded is None or model.context_window is not None or bool(model.price and model.price.is_free)
        )

    def left(self, budget: Budget) -> Decimal:
        return self.remaining.get(budget.name, budget.limit)

    def compared(self, model: Model, estimate: Estimate) -> Decimal:
        """Dollars by which its price is compared with others': those expected, but of a reply as long as anybody's.

        By its own length whoever has a history of short replies would be cheaper than its equals, and would stay so.
        """
        length, price, size = self.compared_at, model.price, self.size
        if length is None or price is None or size.ask.kind == "embedding":
            return estimate.expected
        length = min(length, size.reply_limit or model.max_output_tokens or LONGEST_REPLY)
        each = price.of_tier(self.ask.tier).at(estimate.input_tokens).tariff
        return estimate.expected + (length * size.replies - estimate.output_tokens) * each.output * each.unit

    def priced(self, model: Model, most: Decimal | None, name: str) -> Estimate:
        """What one call to a model whose price is known costs, when it may cost `most`."""
        price = model.price
        if price is None:
            raise ValueError(f"{name!r} has no price to estimate with")
        counter, exact = self.counters[model.id]
        tokens, longest = self.counts[counter]
        exact = exact or price.is_free
        ask, images, replies, reply_limit, writes_cache, unbounded, thinking = self.size
        if ask.tier is not None:
            price = price.of_tier(ask.tier)
        if ask.kind == "embedding":
            return estimate_embedding(price, input_tokens=tokens, longest=longest, exact=exact)
        # In the order of its parameters: by their names the call takes half as long again.
        return estimate_chat(
            price,
            tokens,
            reply_limit,
            model.max_output_tokens,
            self.usual.get(name),
            most,
            model.context_window,
            exact,
            images,
            replies,
            writes_cache,
            unbounded is None,
            # A limit that is no longer than the thoughts is refused, and one that ends with them leaves no answer.
            thinking + ASSUMED_REPLY if thinking and model.thinks_by_number else 0,
        )
