"""Requests and tokens a minute: what a limit lets pass now, and how long the rest has to wait."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain

from sekha.registry import Registry

__all__ = ["ProviderRates", "RateLimit", "Taken", "part"]

SLICES = 60
"""A minute is counted in so many slices of a second, so that it takes as long to look at however much passed."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one request took of a limit, and in which second."""

    second: int
    tokens: int


class RateLimit:
    """At most so many requests and so many tokens in any minute, whenever it begins.

    All of a minute's share may pass at once. What passed in a second counts for sixty whole seconds
    after it, so that over a long time a sixtieth of the limit at the most is left unused. Everything
    takes the same few steps however high the limits are. It waits for nobody and locks nothing: one
    event loop.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self.requests_per_minute: float = math.inf if requests_per_minute is None else requests_per_minute
        self.tokens_per_minute: float = math.inf if tokens_per_minute is None else tokens_per_minute
        # One slice more than a minute has: a minute that begins within one second ends within another.
        self._requests = [0] * (SLICES + 1)
        self._tokens = [0] * (SLICES + 1)
        self._all_requests = 0
        self._all_tokens = 0
        self._second = math.floor(clock())

    def wait(self, tokens: int = 0) -> float:
        """Seconds until a request of so many tokens may pass: 0 for now, infinite for never. Takes nothing."""
        # What is counted only falls by itself, so that nothing need be looked at where there is room anyway.
        if self._has_room(self._all_requests, self._all_tokens, tokens):
            return 0.0
        now = self._clock()
        self._forget_until(math.floor(now))
        if self._has_room(self._all_requests, self._all_tokens, tokens):
            return 0.0
        if not self._has_room(0, 0, tokens):
            return math.inf
        # How many of the oldest seconds have to be over before there is room.
        oldest = (self._second + 1) % (SLICES + 1)
        over = 0
        if self._all_requests >= self.requests_per_minute:
            over = _first(self._requests, oldest, self._all_requests - self.requests_per_minute + 1)
        if self._all_tokens + tokens > self.tokens_per_minute:
            over = max(over, _first(self._tokens, oldest, self._all_tokens + tokens - self.tokens_per_minute))
        return max(self._second + 1 + over - now, 0.0)

    def take(self, tokens: int = 0) -> Taken:
        """Count a request that passes; a limit that is reached does not stop it, `wait` says whether it may."""
        self._forget_until(math.floor(self._clock()))
        at = self._second % (SLICES + 1)
        self._requests[at] += 1
        self._tokens[at] += tokens
        self._all_requests += 1
        self._all_tokens += tokens
        return Taken(self._second, tokens)

    def correct(self, taken: Taken, tokens: int) -> Taken:
        """Count a request that passed with the tokens that it really had."""
        if self._still_counts(taken):
            self._tokens[taken.second % (SLICES + 1)] += tokens - taken.tokens
            self._all_tokens += tokens - taken.tokens
        return Taken(taken.second, tokens)

    def give_back(self, taken: Taken) -> None:
        """Take back a request that never reached the provider. Once, or others may pass that should not."""
        if self._still_counts(taken):
            at = taken.second % (SLICES + 1)
            self._requests[at] -= 1
            self._tokens[at] -= taken.tokens
            self._all_requests -= 1
            self._all_tokens -= taken.tokens

    def is_half_used(self) -> bool:
        """Whether half of what a minute lets pass has passed."""
        if 2 * self._all_requests < self.requests_per_minute and 2 * self._all_tokens < self.tokens_per_minute:
            return False
        self._forget_until(math.floor(self._clock()))
        return 2 * self._all_requests >= self.requests_per_minute or 2 * self._all_tokens >= self.tokens_per_minute

    def _has_room(self, requests: int, counted: int, tokens: int) -> bool:
        return requests < self.requests_per_minute and counted + tokens <= self.tokens_per_minute

    def _still_counts(self, taken: Taken) -> bool:
        return taken.second >= self._second - SLICES

    def _forget_until(self, second: int) -> None:
        """Move on to this second, and count no more what passed more than a minute before."""
        for late in range(self._second + 1, min(second, self._second + SLICES + 1) + 1):
            at = late % (SLICES + 1)
            self._all_requests -= self._requests[at]
            self._all_tokens -= self._tokens[at]
            self._requests[at] = self._tokens[at] = 0
        self._second = max(second, self._second)


def _first(ring: list[int], oldest: int, enough: float) -> int:
    """After which second of the ring, the oldest being 0, so many are over."""
    return bisect_left(list(accumulate(chain(ring[oldest:], ring[:oldest]))), enough)


def part(limit: int | None, processes: int) -> int | None:
    """One process's part of a limit that several keep together."""
    return None if limit is None else max(limit // processes, 1)


class ProviderRates:
    """The `limits:` of every provider that has some."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float], processes: int = 1) -> None:
        """`processes` serve together, and each lets through its part of every limit."""
        self._limits = {
            name: RateLimit(
                clock=clock,
                requests_per_minute=part(spec.limits.requests_per_minute, processes),
                tokens_per_minute=part(spec.limits.tokens_per_minute, processes),
            )
            for name, spec in registry.providers.items()
            if spec.limits.requests_per_minute is not None or spec.limits.tokens_per_minute is not None
        }

        self._least_tokens = min((limit.tokens_per_minute for limit in self._limits.values()), default=math.inf)
        # Where less than half is used there is room, so that a request asks but the busy ones.
        self._busy: dict[str, RateLimit] = {}

    def __bool__(self) -> bool:
        return bool(self._limits)

    def throttled(self, tokens: int) -> Mapping[str, float]:
        """Providers whose limits do not let a request of so many tokens pass now → seconds until they do."""
        if 2 * tokens > self._least_tokens:
            return {name: wait for name, limit in self._limits.items() if (wait := limit.wait(tokens))}
        if not self._busy:
            return _NOBODY
        waits: dict[str, float] = {}
        for name, limit in list(self._busy.items()):
            if wait := limit.wait(tokens):
                waits[name] = wait
            elif not limit.is_half_used():
                del self._busy[name]
        return waits

    def take(self, provider_id: str, tokens: int) -> Taken | None:
        """Count a request that goes to a provider; None for a provider without limits."""
        limit = self._limits.get(provider_id)
        if limit is None:
            return None
        taken = limit.take(tokens)
        self._look_at(provider_id, limit)
        return taken

    def correct(self, provider_id: str, taken: Taken, tokens: int) -> Taken:
        """Count a request that went to a provider with the tokens that it really had."""
        limit = self._limits[provider_id]
        corrected = limit.correct(taken, tokens)
        self._look_at(provider_id, limit)
        return corrected

    def give_back(self, provider_id: str, taken: Taken) -> None:
        """Take back a request that never reached the provider."""
        self._limits[provider_id].give_back(taken)

    def _look_at(self, name: str, limit: RateLimit) -> None:
        if name not in self._busy and limit.is_half_used():
            self._busy[name] = limit


_NOBODY: Mapping[str, float] = {}
