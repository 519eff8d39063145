"""How long each model's answers take of late."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

__all__ = ["Latencies"]


class Latencies:
    """Means in which an answer counts the less the older it is: half as much with every `half_life_seconds`."""

    def __init__(self, *, clock: Callable[[], float], half_life_seconds: float = 60.0) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._decay = math.log(2) / half_life_seconds
        self._forgotten = 10 * half_life_seconds
        self._seen: dict[str, tuple[float, float, float]] = {}
        """Model → weighted sum of seconds, sum of weights, when."""
        self._snapshot: Mapping[str, float] = {}
        self._snapshot_at = -math.inf

    def observe(self, model: str, seconds: float) -> None:
        """Note that an answer of `provider/model` took so long."""
        now = self._clock()
        total, weight, at = self._seen.get(model, (0.0, 0.0, now))
        faded = math.exp((at - now) * self._decay)
        self._seen[model] = (total * faded + seconds, weight * faded + 1.0, now)

    def answered_within(self, model: str, seconds: float) -> bool:
        """Whether `provider/model` has answered at least once in the last so many seconds."""
        seen = self._seen.get(model)
        return seen is not None and self._clock() - seen[2] <= seconds

    def seconds(self) -> Mapping[str, float]:
        """`provider/model` → seconds, at most one second old and never changed afterwards.

        A model that has not answered for ten half-lives is unknown again, and so gets a new chance.
        """
        now = self._clock()
        if now - self._snapshot_at >= 1.0:
            self._seen = {model: seen for model, seen in self._seen.items() if now - seen[2] < self._forgotten}
            self._snapshot = {model: total / weight for model, (total, weight, _) in self._seen.items()}
            self._snapshot_at = now
        return self._snapshot
