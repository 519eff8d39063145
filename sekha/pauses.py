"""Models whose providers asked to be left alone for a while, by a 429 with `Retry-After`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["Pauses"]

_MOMENT = 0.001
"""What is left of a pause by the rounding of clocks and timers is none."""
_NOBODY: Mapping[str, float] = {}


class Pauses:
    """Until when each model is left alone. Limits are a model's at most providers, so that is kept by `provider/model`.

    What one process was told it keeps to itself: each of several learns it from a 429 of its own.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._until: dict[str, float] = {}

    def note(self, name: str, seconds: float) -> None:
        """Leave a model alone for so long. A shorter word does not take back a longer one."""
        until = self._clock() + seconds
        if until > self._until.get(name, 0.0):
            self._until[name] = until

    def wait(self, name: str) -> float:
        """Seconds for which this one is still to be left alone; 0 for none."""
        # As a rule nobody is, and this is asked for each request.
        if not self._until or name not in self._until:
            return 0.0
        return self._left(name, self._clock())

    def now(self) -> Mapping[str, float]:
        """`provider/model` → seconds, of those that are left alone just now."""
        if not self._until:
            return _NOBODY
        now = self._clock()
        return {name: left for name in list(self._until) if (left := self._left(name, now))}

    def _left(self, name: str, now: float) -> float:
        left = self._until[name] - now
        if left > _MOMENT:
            return left
        del self._until[name]
        return 0.0
