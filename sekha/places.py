"""Who gets which place of a plan: of equals one is drawn, and no provider gets all places while there is another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate

from sekha.asks import Conditions
from sekha.registry import Model

__all__ = ["OF_ONE_PROVIDER", "SHORTEST_SECONDS", "SHORTLIST", "placed", "spread"]

SHORTLIST = 5
"""Candidates that a plan has at the most."""
OF_ONE_PROVIDER = 2
"""Of them at one provider, while there is another: what keeps one of its models from answering may keep all."""
SHORTEST_SECONDS = 0.001
"""A latency below counts as this one, so that nobody takes all of the traffic for a rounding error."""


def placed(why: str, place: int) -> str:
    """Why a model stands at this place of a plan, the first of which is 0."""
    return f"fallback {place}: {why}" if place else why


def drawn(models: Sequence[Model], conditions: Conditions) -> int:
    """Which of several equals goes first: each as often as its weight, and the more often the quicker it is.

    One whose latency is unknown counts as the mean of the known, so that a new one gets its share.
    """
    shares: list[float] = [model.weight for model in models]
    if conditions.latency_seconds:
        latencies = [conditions.latency_seconds.get(model.name) for model in models]
        known = [max(seconds, SHORTEST_SECONDS) for seconds in latencies if seconds is not None]
        mean = math.fsum(known) / len(known) if known else 1.0
        shares = [
            weight / (mean if seconds is None else max(seconds, SHORTEST_SECONDS))
            for weight, seconds in zip(shares, latencies, strict=True)
        ]
    upto = [*accumulate(shares)]
    return min(bisect_right(upto, conditions.draw * upto[-1]), len(upto) - 1)


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
                able.insert(0, able.pop(drawn([models[each] for each in able], conditions)))
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
            order.append(those.pop(drawn(models[at:stop], conditions)))
            order += those
        at = stop
    return order
