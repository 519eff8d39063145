"""The best of a thousand models in microseconds: what is true of each as numbers side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cached_property, partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from sekha.asks import Ask, Conditions, Counter, Estimates, Size, cap
from sekha.ledger import Budget
from sekha.places import OF_ONE_PROVIDER, SHORTEST_SECONDS
from sekha.pricing import ASSUMED_REPLY, LONGEST_REPLY, Price, most_of
from sekha.registry import Model

if TYPE_CHECKING:
    import numpy as np

    Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Cover", "Entrant", "Field", "Once", "Rule", "Within", "cap_at"]

SETS_OF_EQUALS = 16
"""Of which it is remembered how often each of them is drawn."""
_SUM = 1 << 50
"""What a request costs at the most is a sum below this one, and fits behind a group into a machine word."""
_NEVER = 1 << 62
"""Above everything else in a machine word."""

T = TypeVar("T")
R = TypeVar("R")
Rule: TypeAlias = Literal["capability", "price", "context", "cost", "budget", "circuit", "rate", "fallback"]
_RULES: tuple[Rule | None, ...] = (None, "context", "cost", "budget", "circuit", "rate")
"""Those that depend on more than the form of an ask, in the order in which they are named."""


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


class Cover:
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


Within: TypeAlias = "Sequence[tuple[Decimal, Cover]]"
"""Dollars that a call may cost at those entrants alone that a budget covers."""


def cap_at(position: int, most: Decimal | None, within: Within) -> Decimal | None:
    """What a call to the entrant at this position may cost, when it may cost `most` at everybody."""
    for left, cover in within:
        if cover.at is not None and cover.at[position] and (most is None or left < most):
            most = left
    return most


class Once(Generic[T, R]):
    """What a function gives, kept for as long as it is given the very same thing."""

    __slots__ = ("_known", "_work")

    def __init__(self, work: Callable[[T], R]) -> None:
        self._work = work
        self._known: tuple[T, R] | None = None

    def __call__(self, given: T) -> R:
        known = self._known
        if known is None or given is not known[0]:
            # In one: another thread may ask for something else meanwhile.
            known = self._known = given, self._work(given)
        return known[1]


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


class _Shares:
    """How often each of a thousand goes first among equals while the latencies are these, as `places.drawn` has it."""

    def __init__(self, entrants: Sequence[Entrant], seconds: Mapping[str, float]) -> None:
        import numpy as np

        self._np = np
        self._weight = np.array([entrant.model.weight for entrant in entrants], dtype=float)
        latency = np.array([seconds.get(entrant.name, math.nan) for entrant in entrants])
        self._latency = np.maximum(latency, SHORTEST_SECONDS)
        self._some_unknown = bool(np.isnan(latency).any())
        self._each = self._weight / self._latency
        self._known: dict[bytes, tuple[Numbers, Numbers]] = {}
        """Of those that were equal before: their positions, and the sums of their shares from the first on."""

    def drawn(self, equal: Numbers, draw: float) -> int:
        """Which of the positions that are equal goes first."""
        which = equal.tobytes()
        known = self._known.get(which)
        if known is None:
            if len(self._known) >= SETS_OF_EQUALS:
                self._known.clear()
            positions = equal.nonzero()[0]
            known = self._known[which] = positions, self._of(positions)
        positions, upto = known
        at = int(upto.searchsorted(draw * upto.item(-1), "right"))
        return int(positions[min(at, len(upto) - 1)])

    def drawn_of_two(self, first: int, second: int, draw: float) -> int:
        """The same of two positions."""
        if self._some_unknown:
            one, both = self._of(self._np.array([first, second])).tolist()
        else:
            one = self._each.item(first)
            both = one + self._each.item(second)
        return first if draw * both < one else second

    def _of(self, positions: Numbers) -> Numbers:
        if not self._some_unknown:
            return self._np.cumsum(self._each[positions])
        latency = self._latency[positions]
        unknown = self._np.isnan(latency)
        known = latency[~unknown].tolist()
        latency[unknown] = math.fsum(known) / len(known) if known else 1.0
        return self._np.cumsum(self._weight[positions] / latency)


class Field:
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
        self._ways = Once(self._ways_of)
        self._worked_out: tuple[Mapping[str, int], int | None, _Lengths] | None = None
        self._shares: Once[Mapping[str, float], _Shares] = Once(partial(_Shares, entrants))
        self._shut: tuple[frozenset[str], tuple[tuple[str, ...], ...], Numbers] | None = None

    def best(
        self, estimates: Estimates, most: Decimal | None, within: Within, conditions: Conditions, count: int
    ) -> list[int] | None:
        """The positions of the first `count` that may serve, best first; None as of `_measured`."""
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
        """Which of those whose key is the lowest goes first: its position. Of them, its key alone is used up."""
        shares = self._shares(conditions.latency_seconds)
        key[second] = _NEVER
        # A pair is found sooner without looking at all of the keys once more.
        only_two = key.item(key.argmin()) != lowest
        key[first] = key[second] = lowest
        if only_two:
            at = shares.drawn_of_two(first, second, conditions.draw)
        else:
            at = shares.drawn(key == lowest, conditions.draw)
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
