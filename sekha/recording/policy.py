"""Which requests are recorded. Decisions alone: the clock and the dice are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from sekha.recording.run import Outcome

__all__ = ["Policy"]

SLOW_SHARE = 0.01
SLOW_AT_LEAST_SECONDS = 1.0
_STEP = 0.02


class Policy:
    """A share of all requests, at most so many a second, and always what is named in `keep`.

    Beyond `max_per_second` a request is recorded whenever the rate allows the next one, whatever it is.
    Slow is what takes longer than 99 of 100 requests did lately, and a second at least. So what counts
    as slow follows the models in use, and slowness that becomes the rule is not recorded in full.
    """

    def __init__(
        self,
        *,
        sample: float,
        max_per_second: float,
        keep: Iterable[str],
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._sample = sample
        self._configured = max_per_second
        self._keep = frozenset(keep)
        self._clock = clock
        self._random = random
        self._rate = max_per_second
        self._burst = max(max_per_second, 1.0)
        self._tokens = self._burst
        self._at = clock()
        self.slow_seconds = SLOW_AT_LEAST_SECONDS
        """From where on a request is slow, as of now."""

    def limit(self, per_second: float | None) -> None:
        """Record no more than this either; None for no other limit than the configured one."""
        self._rate = min(self._configured, inf if per_second is None else per_second)
        self._burst = max(self._rate, 1.0) if self._rate else 0.0
        self._tokens = min(self._tokens, self._burst)

    def keeps(self, outcome: Outcome, seconds: float) -> bool:
        """Whether it is recorded whatever the sample and the rate."""
        return outcome in self._keep or (seconds > self.slow_seconds and "slow" in self._keep)

    def wants(self, outcome: Outcome, seconds: float) -> bool:
        """Whether to record a request. Asked once for each, since it learns from it what is slow."""
        slow = seconds > self.slow_seconds
        kept = outcome in self._keep or (slow and "slow" in self._keep)
        # A quantile without a memory: at balance, 99 small steps down are one step up.
        if slow:
            self.slow_seconds *= 1 + _STEP * (1 - SLOW_SHARE)
        elif self.slow_seconds > SLOW_AT_LEAST_SECONDS:
            self.slow_seconds = max(self.slow_seconds * (1 - _STEP * SLOW_SHARE), SLOW_AT_LEAST_SECONDS)
        if kept:
            return True
        if self._sample < 1 and self._random() >= self._sample:
            return False
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
