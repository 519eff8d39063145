"""Who may serve asks of one form, worked out once for all of them, and the best of a thousand in microseconds."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from sekha.asks import Ask, Conditions, Counter, Estimates, Size, cap
from sekha.errors import UnknownModel
from sekha.ledger import Budget
from sekha.pricing import ASSUMED_REPLY, LONGEST_REPLY, Price, most_of
from sekha.registry import TASKS, Model, Registry, Task

if TYPE_CHECKING:
    import numpy as np

    Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = [
    "OF_ONE_PROVIDER",
    "REMEMBERED",
    "SHORTLIST",
    "Entrant",
    "Lack",
    "LineUp",
    "Rule",
    "cap_at",
    "considered",
    "incapable",
    "line_up",
    "placed",
    "preferred",
    "spread",
    "unsure",
]

SHORTLIST = 5
"""Candidates that a plan has at the most."""
OF_ONE_PROVIDER = 2
"""Of them at one provider, while there is another: what keeps one of its models from answering may keep all."""
FORMS = 1_000
"""Forms of asks remembered with a registry; callers name models freely, so there may be very many."""
REMEMBERED = 20_000
"""Entrants in all of them together: less than twenty megabytes."""
SETS_OF_EQUALS = 16
"""Of which it is remembered, for each form, how often each of them is drawn."""
SHORTEST_SECONDS = 0.001
"""A latency below counts as this one, so that nobody takes all of the traffic for a rounding error."""
_NO_CHAT: frozenset[Task] = frozenset({"embedding", "image_generation"})
_ROLES: Mapping[str | None, str] = {None: "chat_fast", "chat_smart": "chat_smart", "vision": "chat_vision"}
"""Task of a chat → the role in `default_models` whose model goes first; no task is auto-routing."""
_SUM = 1 << 50
"""What a request costs at the most is a sum below this one, and fits behind a group into a machine word."""
_NEVER = 1 << 62
"""Above everything else in a machine word."""

T = TypeVar("T")
R = TypeVar("R")
Rule: TypeAlias = Literal["capability", "price", "context", "cost", "budget", "circuit", "rate", "fallback"]
_RULES: tuple[Rule | None, ...] = (None, "context", "cost", "budget", "circuit", "rate")
"""Those that depend on more than the form of an ask, in the order in which they are named."""


# --- who may be meant ----------------------------------------------------------------------


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
    first = preferred(ask, registry)
    if ask.preferred_model:
        models = (*first, *models)
    known = set(map(id, models))
    return tuple({id(model): model for model in (*(each for each in first if id(each) in known), *models)}.values())


def preferred(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """The models that go first: those the caller prefers, else the file's default for the role."""
    if ask.preferred_model:
        return registry.named(ask.preferred_model)
    task = ask.task or (None if ask.model == "auto" else ask.model)
    role = _ROLES.get("vision" if ask.vision and task is None else task)
    return registry.default_for(role) if role is not None and role in registry.default_models else ()


def placed(why: str, place: int) -> str:
    """Why a model stands at this place of a plan, the first of which is 0."""
    return f"fallback {place}: {why}" if place else why


def _embedding_models(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """One model, at every provider that has it: another model's vectors would not be comparable."""
    if ask.model in (None, "auto", "embedding"):
        found = registry.default_for("embedding")[:1]
        if not found:
            return ()
        return _comparable(found[0], registry.models)
    found = tuple(model for model in registry.named(ask.model) if model.dimension is not None)
    # Whoever names a provider means that one alone.
    anywhere = any(model.id == ask.model for model in found)
    return _comparable(found[0], registry.models if anywhere else found) if found else ()


def _comparable(first: Model, models: Sequence[Model]) -> tuple[Model, ...]:
    """The models that make the same vectors as the first, under whatever name."""
    return tuple(model for model in models if model.dimension and model.fingerprint == first.fingerprint)


class Lack(NamedTuple):
    """Why a model cannot do what is asked."""

    of: Literal["task", "images", "tools", "audio", "limits", "key"]
    """What it lacks. The later ones are looked at last, so that with a `key` it could."""
    why: str


def incapable(ask: Ask, model: Model) -> Lack | None:
    """Why the model cannot do what is asked, at any price; None when it can, or nobody says that it cannot."""
    if ask.kind == "chat" and _NO_CHAT.issuperset(model.tasks):
        return Lack("task", f"it does not chat: its task is {', '.join(model.tasks)}")
    if ask.vision and not model.vision:
        return Lack("images", "it does not take images")
    if ask.tools is not None and model.function_calling is False:
        return Lack("tools", "it does not call tools (`supports_function_calling: false`)")
    if ask.audio and model.audio is False:
        return Lack("audio", "it does not take audio (`supports_audio: false`)")
    breach = ask.pictures.breach(model.vision_limits) if ask.pictures is not None else None
    if breach is not None:
        return Lack("limits", breach.why)
    if ask.allowed is not None and not ask.may_use(model):
        may = f"key {ask.key!r} may not use"
        if ask.allowed.covers(model):
            return Lack("key", f"the call counts as {ask.task_at(model)!r}, which {may}")
        return Lack("key", f"{may} it")
    return None


def unsure(ask: Ask, model: Model) -> str:
    """What nobody says that the model can; empty where it is known to do all that is asked."""
    if ask.tools is not None and model.function_calling is None:
        return "not known to call tools"
    return "not known to take audio" if ask.audio and model.audio is None else ""


def shares(models: Sequence[Model], latency_seconds: Mapping[str, float]) -> list[float]:
    """How often each of several equals goes first, as sums from the first on: by its weight, and how quick it is.

    One whose latency is unknown counts as the mean of the known, so that a new one gets its share.
    """
    each: list[float] = [model.weight for model in models]
    if latency_seconds:
        latencies = [latency_seconds.get(model.name) for model in models]
        known = [max(seconds, SHORTEST_SECONDS) for seconds in latencies if seconds is not None]
        mean = math.fsum(known) / len(known) if known else 1.0
        each = [
            weight / (mean if seconds is None else max(seconds, SHORTEST_SECONDS))
            for weight, seconds in zip(each, latencies, strict=True)
        ]
    return [*accumulate(each)]


def drawn(upto: Sequence[float], draw: float) -> int:
    """Which of several equals with these `shares` goes first."""
    return min(bisect_right(upto, draw * upto[-1]), len(upto) - 1)


def spread(models: Sequence[Model], ranks: Sequence[Hashable], count: int, conditions: Conditions) -> list[int]:
    """The positions of the `count` models that are asked, in their order; the models come sorted by their rank.

    Of equals, which have one rank, one is drawn to go first. Of each provider `OF_ONE_PROVIDER` are taken at the
    most while others have one left, and whoever is kept back by that is drawn for no place.
    """
    providers = [model.provider_id for model in models]
    # So few share a provider that none can have too many.
    if len(models) <= count and len(models) - len(set(providers)) < OF_ONE_PROVIDER:
        return _all_of(models, ranks, conditions)
    equals: list[list[int]] = []
    at = 0
    while at < len(models):
        stop = at + 1
        while stop < len(models) and ranks[stop] == ranks[at]:
            stop += 1
        equals.append([*range(at, stop)])
        at = stop
    if len(equals) == len(models) <= count:
        return [*range(len(models))]  # nobody has an equal, and all are asked
    found: dict[int, int] = {}
    """Position → the rank."""
    places: dict[str, int] = {}
    drawn_in: set[int] = set()
    for most in (OF_ONE_PROVIDER, len(models)):
        for rank, those in enumerate(equals):
            able = [each for each in those if places.get(providers[each], 0) < most and each not in found]
            if len(able) > 1 and rank not in drawn_in:
                drawn_in.add(rank)
                upto = shares([models[each] for each in able], conditions.latency_seconds)
                able.insert(0, able.pop(drawn(upto, conditions.draw)))
            for each in able:
                if len(found) < count and (taken := places.get(providers[each], 0)) < most:
                    places[providers[each]] = taken + 1
                    found[each] = rank
        if len(found) == min(count, len(models)):
            break
    return sorted(found, key=found.__getitem__)


def _all_of(models: Sequence[Model], ranks: Sequence[Hashable], conditions: Conditions) -> list[int]:
    """What `spread` says where all are asked and nobody is kept back, as nearly always."""
    order: list[int] = []
    at = 0
    for stop in range(1, len(models) + 1):
        if stop < len(models) and ranks[stop] == ranks[at]:
            continue
        if stop - at == 1:
            order.append(at)
        else:
            those = [*range(at, stop)]
            order.append(those.pop(drawn(shares(models[at:stop], conditions.latency_seconds), conditions.draw)))
            order += those
        at = stop
    return order


# --- what holds for all asks of one form ---------------------------------------------------


class Entrant(NamedTuple):
    """A model that is able to serve, at a known price."""

    model: Model
    name: str
    group: int
    """Those of a lower group go first, whatever they cost: by preference, then by priority."""
    why: tuple[str, ...]
    """Why it stands where it stands, for each place of a plan."""
    why_cheap: tuple[str, ...]
    """The same where the price decides too."""


class _Cover:
    """A budget, and at which entrants a call counts against it; `at` is None for all of them."""

    def __init__(self, budget: Budget, at: tuple[bool, ...] | None) -> None:
        self.budget = budget
        self.at = at
        self.anyones = budget.match.keys().isdisjoint(("key", "tag"))
        """Whether it is for every request, whichever model serves it."""

    def concerns(self, ask: Ask) -> bool:
        """Whether the budget is for requests of this key with these tags, whichever model serves them."""
        match = self.budget.match
        return match.get("key", ask.key) == ask.key and ("tag" not in match or match["tag"] in ask.tags)

    @cached_property
    def positions(self) -> Numbers:
        """Where a call counts against it, of a budget that is not for all of the entrants."""
        import numpy as np

        return np.array(self.at).nonzero()[0]


Within: TypeAlias = "Sequence[tuple[Decimal, _Cover]]"
"""Dollars that a call may cost at those entrants alone that a budget covers."""


def cap_at(position: int, most: Decimal | None, within: Within) -> Decimal | None:
    """What a call to the entrant at this position may cost, when it may cost `most` at everybody."""
    for left, cover in within:
        if cover.at is not None and cover.at[position] and (most is None or left < most):
            most = left
    return most


class _Once(Generic[T, R]):
    """What a function gives, kept for as long as it is given the very same thing."""

    __slots__ = ("_given", "_result", "_work")

    def __init__(self, work: Callable[[T], R]) -> None:
        self._work = work
        self._given: T | None = None
        self._result: R | None = None

    def __call__(self, given: T) -> R:
        if self._result is None or given is not self._given:
            self._result = self._work(given)
            self._given = given
        return self._result


class LineUp:
    """The models that asks of one form may mean, and what is true of each whatever else is in the request."""

    def __init__(self, ask: Ask, registry: Registry) -> None:
        self.models = considered(ask, registry)
        self.entrants = tuple(_entrants(ask, registry, self.models))
        self._ask = ask
        self._covers = _Once(self._covers_of)
        self.counter_names = _Once(self._counter_names)

    def covered(self, ask: Ask, budgets: tuple[Budget, ...]) -> list[Budget]:
        """The budgets that a call to any of the entrants would count against."""
        return [cover.budget for cover in self._covers(budgets) if cover.concerns(ask)]

    def caps(self, estimates: Estimates) -> tuple[Decimal | None, Within]:
        """What a call may cost by `max_cost` and by what is left in the budgets: at everybody, and at some."""
        ask, budgets = estimates.size.ask, estimates.budgets
        most, _ = cap(ask, estimates.rules)
        if not budgets:
            return most, ()
        within: list[tuple[Decimal, _Cover]] = []
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
        """The positions of the first `count` that may serve, best first; None as of `_Field._measured`."""
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
    def _field(self) -> _Field:
        return _Field(self.entrants)

    def _covers_of(self, budgets: tuple[Budget, ...]) -> tuple[_Cover, ...]:
        found: list[_Cover] = []
        for budget in budgets:
            key, tag = budget.match.get("key"), budget.match.get("tag")
            theirs = self._ask._replace(key=key, tags=frozenset() if tag is None else frozenset({tag}))
            at = tuple(budget.covers(theirs.scope(entrant.model)) for entrant in self.entrants)
            if any(at):
                found.append(_Cover(budget, None if all(at) else at))
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


# --- the best of very many -----------------------------------------------------------------


class _Lengths(NamedTuple):
    """How long the replies are expected to be, where no request says otherwise."""

    usual: Numbers
    """Without a history, longer than any."""
    assumed: Numbers
    """Without a history, `ASSUMED_REPLY`."""
    output: Numbers
    """What the replies cost when nothing but the models' own limits cuts them."""
    compared: Numbers
    """Lengths by which prices are compared where no request says otherwise."""
    ranked_output: Numbers
    """What replies of those lengths cost, behind the group."""
    longest: int


_Measured: TypeAlias = tuple[Size, bool, "Numbers", _Lengths, list[int], list[int], int, bool]
"""What a request is at all entrants side by side: its size; whether it chats; whose way of counting is which; the
lengths of replies; by each way its tokens, and those at the most; what the dearest might cost; and whether each reply
is cut by nothing but its model's own limit. A plain tuple, since one is made for every choice."""


class _Field:
    """Numbers of all entrants side by side. Prices are whole ones, so that what they decide is exact."""

    def __init__(self, entrants: Sequence[Entrant]) -> None:
        import numpy as np

        self._np = np
        self._entrants = entrants
        models = [entrant.model for entrant in entrants]
        tariffs = [(model.price or Price()).tariff for model in models]
        places = max(tariff.places for tariff in tariffs)
        self._per_dollar = Decimal(10**places)
        scale = [10 ** (places - tariff.places) for tariff in tariffs]
        whole = {
            "input": [tariff.input * by for tariff, by in zip(tariffs, scale, strict=True)],
            "written": [max(tariff.input, tariff.written) * by for tariff, by in zip(tariffs, scale, strict=True)],
            "output": [tariff.output * by for tariff, by in zip(tariffs, scale, strict=True)],
            "image": [tariff.image * by for tariff, by in zip(tariffs, scale, strict=True)],
        }
        self._dearest = (max(whole["written"]), max(whole["output"]), max(whole["image"]))
        groups = [entrant.group for entrant in entrants]
        # Where a price or the groups do not fit, `best` is asked for no sum.
        self._fits = max(self._dearest) < _SUM and groups[-1] < _NEVER // _SUM
        arrays = {sort: np.array(each if self._fits else [0] * len(models)) for sort, each in whole.items()}
        self._input, self._written = arrays["input"], arrays["written"]
        self._output, self._image = arrays["output"], arrays["image"]
        # Whoever is of a later group ranks behind every sum.
        self._rank = np.array(groups if self._fits else [0] * len(models)) * _SUM
        prices = [model.price for model in models if model.price is not None]
        self._tiered = any(price.tiers for price in prices)
        self._long_from = min((above for price in prices for above, _ in price.long_input), default=_NEVER)
        self._limit = np.array([model.max_output_tokens or LONGEST_REPLY for model in models])
        self._window = np.array([model.context_window or _NEVER for model in models])
        self._slack = int((self._window - self._limit).min())
        self._smallest_window = int(self._window.min())
        self._thinks_by_number = any(model.thinks_by_number for model in models)
        self._position = {entrant.name: at for at, entrant in enumerate(entrants)}
        self._providers = [model.provider_id for model in models]
        self._at_provider: dict[str, list[int]] = {}
        for at, provider in enumerate(self._providers):
            self._at_provider.setdefault(provider, []).append(at)
        self._positions: dict[str, slice | Numbers] = {
            provider: slice(first, last + 1) if last - first < len(positions) else np.array(positions)
            for provider, positions in self._at_provider.items()
            for first, last in [(positions[0], positions[-1])]
        }
        self._ways = _Once(self._ways_of)
        self._worked_out: tuple[Mapping[str, int], int | None, _Lengths] | None = None
        self._latency: Mapping[str, float] | None = None
        self._shares: dict[Hashable, tuple[array[int], array[float]]] = {}
        """Of those that were equal while the latencies were these: where they stand, and their `shares`."""
        self._shut: tuple[frozenset[str], tuple[tuple[str, ...], ...], Numbers] | None = None

    def best(
        self, estimates: Estimates, most: Decimal | None, within: Within, conditions: Conditions, count: int
    ) -> list[int] | None:
        measured = self._measured(estimates)
        if measured is None:
            return None
        size, chats, way, lengths, tokens, at_most, dearest, plainly = measured
        np = self._np
        replies: Numbers | None = None
        if not estimates.rules.cost_aware:
            key = self._rank.copy()
        elif plainly:
            key = self._each(tokens, way) * self._input
            key += lengths.ranked_output
        else:
            replies = self._compared(estimates, lengths, self._each(at_most, way)) if chats else None
            key = self._each(tokens, way) * self._input
            key += self._rank
            if replies is not None:
                key += replies
        if size.images and estimates.rules.cost_aware:
            key += self._image * size.images

        if conditions.open_circuits or conditions.throttled or conditions.paused:
            key[self._shut_by(conditions)] = _NEVER
        # Where the longest reply fits into every context window, the prompt does.
        if not plainly and max(context := self._context(estimates, tokens)) > self._smallest_window:
            np.putmask(key, self._each(context, way) > self._window, _NEVER)
        limit = dearest
        if most is not None and (units := self._units(most)) < dearest:
            limit = units
        limits = [(units, cover) for left, cover in within if (units := self._units(left)) < limit]
        if limits or limit < dearest:
            worst = self._worst(size, lengths, self._each(at_most, way), plainly)
            if limit < dearest:
                np.putmask(key, worst > limit, _NEVER)
            for units, cover in limits:
                key[cover.positions[worst[cover.positions] > units]] = _NEVER
        return self._in_order(key, conditions, count)

    def rules(
        self, estimates: Estimates, most: Decimal | None, within: Within, conditions: Conditions
    ) -> list[tuple[Rule | None, Any]] | None:
        measured = self._measured(estimates)
        if measured is None:
            return None
        size, _, way, lengths, tokens, at_most, _, plainly = measured
        worst = self._worst(size, lengths, self._each(at_most, way), plainly)
        rule = self._np.zeros(len(self._entrants), dtype=int)
        limited = [at for provider in conditions.throttled for at in self._at_provider.get(provider, ())]
        rule[limited + self._places_of(conditions.paused)] = _RULES.index("rate")
        rule[self._places_of(conditions.open_circuits)] = _RULES.index("circuit")
        for left, cover in within:
            rule[cover.positions[worst[cover.positions] > self._units(left)]] = _RULES.index("budget")
        if most is not None:
            rule[worst > self._units(most)] = _RULES.index("budget")
        limit, _ = cap(size.ask, estimates.rules)
        if limit is not None:
            rule[worst > self._units(limit)] = _RULES.index("cost")
        rule[self._each(self._context(estimates, tokens), way) > self._window] = _RULES.index("context")
        return [(_RULES[each], costs) for each, costs in zip(rule.tolist(), worst.tolist(), strict=True)]

    def _places_of(self, names: Iterable[str]) -> list[int]:
        return [at for name in names if (at := self._position.get(name)) is not None]

    def _measured(self, estimates: Estimates) -> _Measured | None:
        """What a request is at each of the entrants.

        None where machine words are too short for what it costs, some have to think for so many tokens first, or
        some cost something else in its service tier.
        """
        size = estimates.size
        if (size.thinking and self._thinks_by_number) or (self._tiered and size.ask.tier is not None):
            return None
        chats = size.ask.kind == "chat"
        ways, way = self._ways(estimates.counters)
        known = estimates.counts
        lengths = self._lengths(estimates)
        tokens: list[int] = []
        at_most: list[int] = []
        for name, exact in ways:
            each, _ = known[name]
            tokens.append(each)
            at_most.append(each if exact else most_of(each))
        longest, reply_limit, replies = max(at_most), size.reply_limit, size.replies
        dearest_input, dearest_output, dearest_image = self._dearest
        dearest = longest * dearest_input + size.images * dearest_image
        if chats:
            dearest += (reply_limit or lengths.longest) * replies * dearest_output
        if not self._fits or longest > self._long_from or dearest >= _SUM:
            return None
        plainly = chats and reply_limit is None and replies == 1 and longest <= self._slack
        return size, chats, way, lengths, tokens, at_most, dearest, plainly

    def _context(self, estimates: Estimates, tokens: list[int]) -> list[int]:
        """Tokens that have to fit into the context window, by each way of counting."""
        if estimates.size.ask.kind != "chat":
            ways, _ = self._ways(estimates.counters)
            return [estimates.counts[name].longest for name, _ in ways]
        limit = estimates.size.reply_limit
        return [each + limit for each in tokens] if limit else tokens

    def _units(self, amount: Decimal) -> int:
        return int(amount * self._per_dollar)

    def _each(self, by_way: list[int], way: Numbers) -> Any:
        """A number for each entrant; one for all where they count alike."""
        return by_way[0] if len(by_way) == 1 else self._np.array(by_way).take(way)

    def _compared(self, estimates: Estimates, lengths: _Lengths, at_most: Any) -> Numbers:
        """What replies cost by which prices are compared, as `Estimates.compared` says."""
        size = estimates.size
        if estimates.compared_at is None:
            return self._replies(size, lengths, at_most)
        if size.reply_limit is not None:
            alike: Numbers = self._output * (min(estimates.compared_at, size.reply_limit) * size.replies)
            return alike
        costs: Numbers = lengths.compared * self._output
        return costs if size.replies == 1 else costs * size.replies

    def _replies(self, size: Size, lengths: _Lengths, at_most: Any) -> Numbers:
        """What the replies are expected to cost."""
        np = self._np
        if size.reply_limit is not None:
            length = np.minimum(lengths.usual, size.reply_limit)
        else:
            length = np.minimum(np.minimum(lengths.assumed, self._limit), np.maximum(self._window - at_most, 1))
        replies: Numbers = length * self._output
        return replies if size.replies == 1 else replies * size.replies

    def _worst(self, size: Size, lengths: _Lengths, at_most: Any, plainly: bool) -> Numbers:
        """The least that may be held for a call: what goes in at the most, and the reply that it is cut to."""
        worst: Numbers = at_most * (self._written if size.writes_cache else self._input)
        if size.images:
            worst += self._image * size.images
        if plainly:
            worst += lengths.output
        elif size.reply_limit is not None:
            worst += self._output * (size.reply_limit * size.replies)
        elif size.ask.kind == "chat":
            worst += self._replies(size, lengths, at_most)
        return worst

    def _in_order(self, key: Numbers, conditions: Conditions, count: int) -> list[int]:
        """The positions of the lowest keys, as `spread` takes them from the providers; the key is used up."""
        found: list[tuple[int, int]] = []
        places: dict[str, int] = {}
        aside: list[tuple[slice | Numbers, Numbers]] = []
        drawn_among: set[int] = set()
        providers = self._providers
        restored = False
        at = int(key.argmin())
        lowest = key.item(at)
        while True:
            if lowest == _NEVER:
                if not aside:
                    break
                # Nobody else is left.
                for where, keys in aside:
                    key[where] = keys
                aside.clear()
                restored = True
                at = int(key.argmin())
                lowest = key.item(at)
                continue
            key[at] = _NEVER
            after = -1
            if lowest not in drawn_among:
                after = int(key.argmin())
                following = key.item(after)
                if following == lowest:
                    drawn_among.add(lowest)
                    at, after = self._drawn(key, at, after, lowest, conditions), -1
            found.append((lowest, at))
            if len(found) == count:
                break
            provider = providers[at]
            taken = places[provider] = places.get(provider, 0) + 1
            if taken == OF_ONE_PROVIDER:
                where = self._positions[provider]
                aside.append((where, key[where].copy()))
                key[where] = _NEVER
                after = -1
            if after < 0:
                after = int(key.argmin())
                following = key.item(after)
            at, lowest = after, following
        if restored:
            found.sort(key=itemgetter(0))
        return [at for _, at in found]

    def _drawn(self, key: Numbers, first: int, second: int, lowest: int, conditions: Conditions) -> int:
        """What `drawn` draws of those whose key is the lowest: its position. Of them, its key alone is used up."""
        key[second] = _NEVER
        # A pair is found sooner without looking at all of the keys once more.
        only_two = key.item(key.argmin()) != lowest
        key[first] = key[second] = lowest
        equals = [first, second]
        equal: Numbers | None = None
        which: Hashable = (first, second)
        if not only_two:
            equal = key == lowest
            which = equal.tobytes()
        seconds = conditions.latency_seconds
        if self._latency is not seconds or len(self._shares) >= SETS_OF_EQUALS:
            self._latency = seconds
            self._shares.clear()
        known = self._shares.get(which)
        if known is None:
            if equal is not None:
                equals = equal.nonzero()[0].tolist()
            upto = shares([self._entrants[at].model for at in equals], seconds)
            known = self._shares[which] = array("l", equals), array("d", upto)
        positions, upto_each = known
        at = positions[drawn(upto_each, conditions.draw)]
        key[at] = _NEVER
        return at

    # --- what is looked up anew only when it has changed ---

    def _shut_by(self, conditions: Conditions) -> Numbers:
        """Who is shut out by a circuit or by a rate limit."""
        open_circuits, limited = conditions.open_circuits, (tuple(conditions.throttled), tuple(conditions.paused))
        if self._shut is None or self._shut[0] is not open_circuits or self._shut[1] != limited:
            shut = self._places_of((*conditions.open_circuits, *conditions.paused))
            shut += (at for provider in conditions.throttled for at in self._at_provider.get(provider, ()))
            self._shut = open_circuits, limited, self._np.array(shut, dtype=int)
        return self._shut[2]

    def _ways_of(self, counters: Mapping[str, Counter]) -> tuple[tuple[tuple[str, bool], ...], Numbers]:
        """The different ways of counting, and which of them is whose."""
        counted = [counters[entrant.model.id] for entrant in self._entrants]
        free = [entrant.model.price is not None and entrant.model.price.is_free for entrant in self._entrants]
        each = [(counter.name, counter.exact or gratis) for counter, gratis in zip(counted, free, strict=True)]
        ways = {way: number for number, way in enumerate(dict.fromkeys(each))}
        return tuple(ways), self._np.array([ways[way] for way in each])

    def _lengths(self, estimates: Estimates) -> _Lengths:
        np, usual, compared_at = self._np, estimates.usual, estimates.compared_at
        known = self._worked_out
        if known is not None and known[0] is usual and known[1] == compared_at:
            return known[2]
        seen = np.array([usual.get(entrant.name) or 0 for entrant in self._entrants])
        assumed = np.where(seen > 0, seen, ASSUMED_REPLY)
        cut = np.minimum(assumed, self._limit)
        compared = cut if compared_at is None else np.minimum(compared_at, self._limit)
        lengths = _Lengths(
            usual=np.where(seen > 0, seen, _NEVER),
            assumed=assumed,
            output=self._output * cut,
            compared=compared,
            ranked_output=self._output * compared + self._rank,
            longest=int(max(cut.max(), compared.max())),
        )
        self._worked_out = usual, compared_at, lengths
        return lengths
