"""Requests and tokens a minute: what a limit lets pass now, and how long the rest has to wait."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

from sekha.registry import Registry

__all__ = ["ROW", "Minute", "Minutes", "ProviderRates", "RateLimit", "Taken"]

SLICES = 60
"""A minute is counted in so many slices of a second, so that it takes as long to look at however much passed."""
RING = SLICES + 1
_HEAD = 3
ROW = _HEAD + 2 * RING
"""Numbers in one process's row."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one request took of a limit, and in which second."""

    second: int
    tokens: int


class Minute:
    """What passed of one limit in the last minute, in slices of a second.

    It outlives the configuration that the limit stands in. Where several processes keep the limit together, each
    has a row of memory that all can read, and writes its own alone: `[second, all requests, all tokens, a number of
    requests for each slice, a number of tokens for each]`.
    """

    __slots__ = ("all_requests", "all_tokens", "others", "requests", "row", "second", "tokens")

    def __init__(self, row: memoryview | None = None, others: Sequence[memoryview] = ()) -> None:
        """`row` is this process's own, with what one of its number left there; `others` are the others'."""
        self.row, self.others = row, others
        self.second = 0
        """Up to which it is counted."""
        # One slice more than a minute has: a minute that begins within one second ends within another.
        self.requests = [0] * RING
        self.tokens = [0] * RING
        if row is not None:
            self.second = row[0]
            self.requests, self.tokens = row[_HEAD : _HEAD + RING].tolist(), row[_HEAD + RING : ROW].tolist()
        self.all_requests, self.all_tokens = sum(self.requests), sum(self.tokens)
        if row is not None:
            # Whoever was killed had perhaps counted a request in one place only.
            row[1], row[2] = self.all_requests, self.all_tokens

    def add(self, second: int, requests: int, tokens: int) -> None:
        """Count in a second that is not forgotten yet."""
        at = second % RING
        self.requests[at] += requests
        self.tokens[at] += tokens
        self.all_requests += requests
        self.all_tokens += tokens
        if (row := self.row) is not None:
            row[_HEAD + at], row[_HEAD + RING + at] = self.requests[at], self.tokens[at]
            row[1], row[2] = self.all_requests, self.all_tokens

    def forget_until(self, second: int) -> None:
        """Move on to this second, and count no more what passed more than a minute before."""
        if second <= self.second:
            return
        row = self.row
        for late in range(self.second + 1, min(second, self.second + RING) + 1):
            at = late % RING
            self.all_requests -= self.requests[at]
            self.all_tokens -= self.tokens[at]
            self.requests[at] = self.tokens[at] = 0
            if row is not None:
                row[_HEAD + at] = row[_HEAD + RING + at] = 0
        self.second = second
        if row is not None:
            row[0], row[1], row[2] = second, self.all_requests, self.all_tokens

    def in_order(self) -> tuple[list[int], list[int]]:
        """Requests and tokens of every process, the oldest second first."""
        requests = _in_order(self.requests, self.second, self.second)
        tokens = _in_order(self.tokens, self.second, self.second)
        for row in self.others:
            second, all_requests, all_tokens = row[:_HEAD].tolist()
            if second < self.second - SLICES or not (all_requests or all_tokens):
                continue  # all of that is forgotten, though nobody was there to say so
            theirs = _in_order(row[_HEAD : _HEAD + RING].tolist(), second, self.second)
            requests = list(map(add, requests, theirs))
            theirs = _in_order(row[_HEAD + RING : ROW].tolist(), second, self.second)
            tokens = list(map(add, tokens, theirs))
        return requests, tokens


def _in_order(ring: list[int], second: int, now: int) -> list[int]:
    """A ring that was counted up to `second`, as the slices of the minute up to `now`, the oldest first."""
    oldest = (second + 1) % RING
    ordered = ring[oldest:] + ring[:oldest]
    late = now - second
    if late > 0:
        return ordered[late:] + [0] * min(late, RING)
    if late < 0:
        # Another process saw the second end a moment before.
        early = min(-late, SLICES)
        *kept, last = ordered[:-early]
        return [*([0] * early), *kept, last + sum(ordered[-early:])]
    return ordered


class Minutes:
    """The minute of every limit, by the limit's name. For one process; `sekha.minutes` has those of several."""

    shared = False
    """Whether other processes count in them too."""

    def __init__(self) -> None:
        self._found: dict[str, Minute] = {}

    def of(self, name: str) -> Minute:
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._make(name)
        return found

    def _make(self, _: str) -> Minute:
        return Minute()


class RateLimit:
    """At most so many requests and so many tokens in any minute, whenever it begins.

    All of a minute's share may pass at once. What passed in a second counts for sixty whole seconds
    after it, so that over a long time a sixtieth of the limit at the most is left unused. Everything
    takes the same few steps however high the limits are. It waits for nobody and locks nothing: what other
    processes let pass is seen at once, but for what passes at the very same moment.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        minute: Minute | None = None,
    ) -> None:
        """`clock` gives monotonic seconds, of all processes that share `minute` the same."""
        self._clock = clock
        self.requests_per_minute: float = math.inf if requests_per_minute is None else requests_per_minute
        self.tokens_per_minute: float = math.inf if tokens_per_minute is None else tokens_per_minute
        self._minute = minute = minute or Minute()
        minute.forget_until(math.floor(clock()))

    def wait(self, tokens: int = 0) -> float:
        """Seconds until a request of so many tokens may pass: 0 for now, infinite for never. Takes nothing."""
        minute = self._minute
        # What is counted only falls by itself, so that nothing need be looked at where there is room anyway.
        requests, counted = minute.all_requests, minute.all_tokens
        for row in minute.others:
            requests += row[1]
            counted += row[2]
        if requests < self.requests_per_minute and counted + tokens <= self.tokens_per_minute:
            return 0.0
        now = self._clock()
        minute.forget_until(math.floor(now))
        if not minute.others and self._has_room(minute.all_requests, minute.all_tokens, tokens):
            return 0.0
        if not self._has_room(0, 0, tokens):
            return math.inf
        by_second, tokens_by_second = minute.in_order()
        all_requests, all_tokens = sum(by_second), sum(tokens_by_second)
        if self._has_room(all_requests, all_tokens, tokens):
            return 0.0
        # How many of the oldest seconds have to be over before there is room.
        over = 0
        if all_requests >= self.requests_per_minute:
            over = _first(by_second, all_requests - self.requests_per_minute + 1)
        if all_tokens + tokens > self.tokens_per_minute:
            over = max(over, _first(tokens_by_second, all_tokens + tokens - self.tokens_per_minute))
        return max(minute.second + 1 + over - now, 0.0)

    def take(self, tokens: int = 0) -> Taken:
        """Count a request that passes; a limit that is reached does not stop it, `wait` says whether it may."""
        minute = self._minute
        minute.forget_until(math.floor(self._clock()))
        minute.add(minute.second, 1, tokens)
        return Taken(minute.second, tokens)

    def correct(self, taken: Taken, tokens: int) -> Taken:
        """Count a request that passed with the tokens that it really had."""
        if self._still_counts(taken):
            self._minute.add(taken.second, 0, tokens - taken.tokens)
        return Taken(taken.second, tokens)

    def give_back(self, taken: Taken) -> None:
        """Take back a request that never reached the provider. Once, or others may pass that should not."""
        if self._still_counts(taken):
            self._minute.add(taken.second, -1, -taken.tokens)

    def is_half_used(self) -> bool:
        """Whether half of what a minute lets pass has passed."""
        if not self._is_half(*self._counted()):
            return False
        self._minute.forget_until(math.floor(self._clock()))
        return self._is_half(*self._counted())

    def _counted(self) -> tuple[int, int]:
        """Requests and tokens of all processes that share it, as of when each looked last: too many at the most."""
        minute = self._minute
        requests, tokens = minute.all_requests, minute.all_tokens
        for row in minute.others:
            requests += row[1]
            tokens += row[2]
        return requests, tokens

    def _is_half(self, requests: int, tokens: int) -> bool:
        return 2 * requests >= self.requests_per_minute or 2 * tokens >= self.tokens_per_minute

    def _has_room(self, requests: int, counted: int, tokens: int) -> bool:
        return requests < self.requests_per_minute and counted + tokens <= self.tokens_per_minute

    def _still_counts(self, taken: Taken) -> bool:
        return taken.second >= self._minute.second - SLICES


def _first(ordered: list[int], enough: float) -> int:
    """After which of the seconds, the oldest being 0, so many are over."""
    return bisect_left(list(accumulate(ordered)), enough)


class ProviderRates:
    """The `limits:` of every provider that has some."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float], minutes: Minutes | None = None) -> None:
        """`minutes` have what passed under the configuration before, and what other processes let pass."""
        minutes = minutes or Minutes()
        self._limits = {
            name: RateLimit(
                clock=clock,
                requests_per_minute=spec.limits.requests_per_minute,
                tokens_per_minute=spec.limits.tokens_per_minute,
                minute=minutes.of(f"provider:{name}"),
            )
            for name, spec in registry.providers.items()
            if spec.limits.requests_per_minute is not None or spec.limits.tokens_per_minute is not None
        }

        self._least_tokens = min((limit.tokens_per_minute for limit in self._limits.values()), default=math.inf)
        # Where less than half is used there is room, so that a request asks but the busy ones. Of what several
        # processes share none of them knows when it gets busy.
        self._shared = minutes.shared
        self._busy = {name: limit for name, limit in self._limits.items() if self._shared or limit.is_half_used()}

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
            elif not self._shared and not limit.is_half_used():
                del self._busy[name]
        return waits

    def wait(self, provider_id: str, tokens: int) -> float:
        """Seconds until this provider's limits let a request of so many tokens pass; 0 for now, infinite for never."""
        limit = self._limits.get(provider_id)
        return 0.0 if limit is None else limit.wait(tokens)

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
