"""Who may serve asks of one form, worked out once for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

from sekha.asks import Ask, Conditions, Counter, Estimates, Size, cap
from sekha.eligible import considered, incapable, preferred, unsure
from sekha.field import Cover, Entrant, Field, Once, Rule, Within
from sekha.ledger import Budget
from sekha.places import SHORTLIST, placed
from sekha.registry import Model, Registry

__all__ = ["FORMS", "REMEMBERED", "LineUp", "line_up"]

FORMS = 1_000
"""Forms of asks remembered with a registry; callers name models freely, so there may be very many."""
REMEMBERED = 20_000
"""Entrants in all of them together: less than twenty megabytes."""


class LineUp:
    """The models that asks of one form may mean, and what is true of each whatever else is in the request."""

    def __init__(self, ask: Ask, registry: Registry) -> None:
        self.models = considered(ask, registry)
        self.entrants = tuple(_entrants(ask, registry, self.models))
        self._ask = ask
        self._covers = Once(self._covers_of)
        self.counter_names = Once(self._counter_names)

    def covered(self, ask: Ask, budgets: tuple[Budget, ...]) -> list[Budget]:
        """The budgets that a call to any of the entrants would count against."""
        return [cover.budget for cover in self._covers(budgets) if cover.concerns(ask)]

    def caps(self, estimates: Estimates) -> tuple[Decimal | None, Within]:
        """What a call may cost by `max_cost` and by what is left in the budgets: at everybody, and at some."""
        ask, budgets = estimates.size.ask, estimates.budgets
        most, _ = cap(ask, estimates.rules)
        if not budgets:
            return most, ()
        within: list[tuple[Decimal, Cover]] = []
        remaining = estimates.remaining
        for cover in self._covers(budgets):
            if cover.anyones or cover.concerns(ask):
                left = remaining.get(cover.budget.name, cover.budget.limit)
                if cover.at is not None:
                    within.append((left, cover))
                elif most is None or left < most:
                    most = left
        if within and most is not None:
            # What has more left than any call may cost decides nothing.
            within = [each for each in within if each[0] < most]
        return most, within

    def best(
        self, estimates: Estimates, most: Decimal | None, within: Within, conditions: Conditions, count: int
    ) -> list[int] | None:
        """The positions of the first `count` that may serve, best first; None where numbers alone do not tell."""
        return self._field.best(estimates, most, within, conditions, count)

    def rules(
        self, estimates: Estimates, most: Decimal | None, within: Within, conditions: Conditions
    ) -> list[tuple[Rule | None, Any]] | None:
        """Of each entrant: the first rule that drops it, and what a call costs at the least. None as for `best`.

        Whoever costs less than another does so by these numbers too; they are no dollars.
        """
        return self._field.rules(estimates, most, within, conditions)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The position among the entrants of each of the models; -1 for one that is none."""
        position = {id(entrant.model): at for at, entrant in enumerate(self.entrants)}
        return tuple(position.get(id(model), -1) for model in self.models)

    @cached_property
    def left_out(self) -> tuple[tuple[Rule | None, Any], ...]:
        """Of each of the models: the rule that makes it no entrant, and what it lacks where it is `capability`."""
        lacks = (
            None if at >= 0 else incapable(self._ask, model) for model, at in zip(self.models, self.places, strict=True)
        )
        return tuple(
            (None, None) if at >= 0 else ("price", None) if lack is None else ("capability", lack.of)
            for at, lack in zip(self.places, lacks, strict=True)
        )

    @cached_property
    def _field(self) -> Field:
        return Field(self.entrants)

    def _covers_of(self, budgets: tuple[Budget, ...]) -> tuple[Cover, ...]:
        found: list[Cover] = []
        for budget in budgets:
            key, tag = budget.match.get("key"), budget.match.get("tag")
            theirs = self._ask._replace(key=key, tags=frozenset() if tag is None else frozenset({tag}))
            at = tuple(budget.covers(theirs.scope(entrant.model)) for entrant in self.entrants)
            if any(at):
                found.append(Cover(budget, None if all(at) else at))
        return tuple(found)

    def _counter_names(self, counters: Mapping[str, Counter]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(counters[entrant.model.id].name for entrant in self.entrants))


def line_up(ask: Ask, registry: Registry) -> LineUp:
    """Who may serve asks of this form. Raises `UnknownModel` for a name that nothing carries."""
    kind, model, task, preferred_model, vision, pictures, _, priced_apart, _, _, allowed, _, tools, audio, tier = ask
    # Whose limits the images break is all that they have to do with it.
    seen_by = None if pictures is None else tuple(pictures.breach(each) is None for each in registry.vision_limits)
    # What is priced apart matters by its name only where a tier's own price may be known.
    apart = priced_apart is None if tier is None else priced_apart
    form = (kind, model, task, preferred_model, vision, tools is None, audio, apart, tier, allowed, seen_by)
    known: dict[Hashable, LineUp] = registry.worked_out
    found = known.get(form)
    if found is None:
        found = LineUp(ask, registry)
        while known and (len(known) >= FORMS or sum(len(each.entrants) for each in known.values()) > REMEMBERED):
            known.pop(next(iter(known)))
        known[form] = found
    return found


def _entrants(ask: Ask, registry: Registry, models: Sequence[Model]) -> Iterator[Entrant]:
    first = {model.name for model in preferred(ask, registry)}
    pricing = Estimates(size=Size(ask), counters={}, counts={})
    some_unsure = ask.tools is not None or ask.audio
    able = [model for model in models if incapable(ask, model) is None and pricing.knows_price(model)]
    ranks = [
        (model.name not in first, registry.provider_of(model).priority, unsure(ask, model) if some_unsure else "")
        for model in able
    ]
    groups = {rank: group for group, rank in enumerate(sorted(set(ranks)))}
    for rank, model in sorted(zip(ranks, able, strict=True), key=lambda each: each[0]):
        if model.name in first:
            why = why_cheap = "preferred" if ask.preferred_model else "the default model"
        elif ask.model in (model.id, model.name):
            why = why_cheap = "named by the request"
        else:
            why = f"priority {rank[1]}" + (f", {rank[2]}" if rank[2] else "")
            why_cheap = f"{why}, then price"
        yield Entrant(model, model.name, groups[rank], _at_places(why), _at_places(why_cheap))


@lru_cache(maxsize=256)
def _at_places(why: str) -> tuple[str, ...]:
    return tuple(placed(why, place) for place in range(SHORTLIST))
