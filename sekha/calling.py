"""Call the candidates of a plan in turn, with retries, until one answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Generic, NamedTuple, Protocol, TypeVar

from sekha.errors import CircuitOpen, ProviderError, ProviderTimeout
from sekha.routing import Candidate
from sekha.values import value

__all__ = ["Answered", "Attempt", "Clock", "Gate", "Retries", "call_in_turn"]

T = TypeVar("T")
log = logging.getLogger("sekha.calling")


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance, passed in so that nothing has to wait in a test."""

    now: Callable[[], float]
    """Seconds, monotonic."""
    sleep: Callable[[float], Awaitable[None]]
    random: Callable[[], float]
    """In [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long to go on. Waits are drawn from [0, base × 2ⁿ), "full jitter", at most `longest_wait_seconds`.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    rounds: int = 3
    """How often a candidate is tried at the most."""
    base_wait_seconds: float = 0.5
    longest_wait_seconds: float = 10.0


@value
class Attempt:
    """One call to one candidate, and how it ended."""

    provider_id: str
    model_id: str
    seconds: float
    error: str | None = None
    """The error's code; None when it answered."""
    detail: str = ""


# A tuple, because one is made for every request and a frozen dataclass takes five times as long.
class Answered(NamedTuple, Generic[T]):
    value: T
    candidate: Candidate
    attempts: tuple[Attempt, ...] = ()
    probe: str | None = None
    """The probe that the call was, if it was one. Whoever reads a stream to its end notes the end with it."""


class Gate(Protocol):
    """The circuits, as far as calling needs them. A name is `provider/model`."""

    def admit(self, name: str) -> bool:
        """Whether everybody may call, since the circuit is closed."""
        ...

    async def claim(self, name: str) -> str | None:
        """Become the one probe of a circuit that is not closed; None when nobody may call now.

        Whoever becomes it hands it to `note` or to `give_back`, however the call ends.
        """
        ...

    def note(self, name: str, error: ProviderError | None, *, probe: str | None = None, seconds: float = 0.0) -> None:
        """Say how a call ended that took so many seconds."""
        ...

    def give_back(self, name: str, probe: str) -> None:
        """Say that a probe ended and tells nothing about the provider."""
        ...

    def wait_seconds(self, name: str) -> float:
        """How long until the circuit lets a call through, as far as is known."""
        ...


async def call_in_turn(
    candidates: Sequence[Candidate],
    call: Callable[[Candidate, float], Awaitable[T]],
    *,
    retries: Retries,
    clock: Clock,
    deadline_seconds: float,
    circuits: Gate | None = None,
    whole: bool = True,
) -> Answered[T]:
    """Try each candidate once, then those worth retrying again, within one deadline.

    `call` makes one attempt with the seconds that it may take. A failed candidate waits until every
    other had its turn, and as long as its `Retry-After` says; one whose error is not `retryable` is
    not asked again; an error that does not `falls_back` ends it at once, since no other provider
    would make the request right. Raises the last `ProviderError` of a candidate that may yet
    succeed, else the last of all, with every attempt in its `attempts`.

    A candidate is passed over while its circuit lets no call through; `CircuitOpen` when that leaves
    nobody. Every call that ends is noted, once. When `call` returns not the `whole` answer but a stream
    that has begun, its reader notes the end; a probe has done its part by beginning.
    """
    awake = clock.now()
    asking = _Asking(call, clock, circuits, whole, awake + deadline_seconds)
    failure: ProviderError | None = None
    # Of those that failed: when they may be asked again, and how often they were.
    due: dict[str, float] = {}
    tried: dict[str, int] = {}
    for turn in count():
        for candidate in candidates:
            name = candidate.model.name
            if due.get(name, awake) > awake:
                continue
            if failure is not None and clock.now() >= asking.ends_at:
                raise failure
            try:
                answered = await asking.ask(candidate, name)
            except ProviderError as error:
                if failure is None or error.retryable or not failure.retryable or not error.falls_back:
                    failure = error
                failure.attempts = tuple(asking.attempts)
                if not error.falls_back:
                    raise
                tried[name] = tried.get(name, 0) + 1
                again = error.retryable and tried[name] < retries.rounds and asking.admits(name)
                due[name] = clock.now() + (error.retry_after_seconds or 0.0) if again else math.inf
            else:
                if answered is not None:
                    return answered
                if name in due:
                    due[name] = math.inf
        if failure is None:
            break
        wait = min(retries.base_wait_seconds * 2**turn, retries.longest_wait_seconds) * clock.random()
        awake = max(clock.now() + wait, min(due.values()))
        if awake >= asking.ends_at:
            raise failure
        names = ", ".join(name for name, at in due.items() if at <= awake)
        log.info("waiting %.2f s before asking again: %s", awake - clock.now(), names)
        await clock.sleep(awake - clock.now())
    raise _nobody(candidates, circuits)


class _Asking(Generic[T]):
    """How one request asks: each call under the one deadline, its circuit asked before and told after."""

    __slots__ = ("_call", "_circuits", "_clock", "_whole", "attempts", "ends_at")

    def __init__(
        self,
        call: Callable[[Candidate, float], Awaitable[T]],
        clock: Clock,
        circuits: Gate | None,
        whole: bool,
        ends_at: float,
    ) -> None:
        self._call = call
        self._clock = clock
        self._circuits = circuits
        self._whole = whole
        self.ends_at = ends_at
        self.attempts: list[Attempt] = []

    def admits(self, name: str) -> bool:
        return self._circuits is None or self._circuits.admit(name)

    async def ask(self, candidate: Candidate, name: str) -> Answered[T] | None:
        """Make one attempt; None when the circuit lets none through."""
        circuits, probe = self._circuits, None
        if circuits is not None and not circuits.admit(name):
            probe = await circuits.claim(name)
            # While we waited for that, somebody else's probe may have closed it.
            if probe is None and not circuits.admit(name):
                return None
        started = self._clock.now()
        try:
            value = await self._call(candidate, self.ends_at - started)
        except ProviderError as error:
            seconds = self._clock.now() - started
            log.warning("%s", error)
            if circuits is not None:
                if not self._cut_short(error):
                    circuits.note(name, error, probe=probe, seconds=seconds)
                elif probe is not None:
                    circuits.give_back(name, probe)
            self.attempts.append(_attempt(candidate, seconds, error))
            raise
        except BaseException:
            if circuits is not None and probe is not None:
                circuits.give_back(name, probe)
            raise
        if circuits is not None and (self._whole or probe is not None):
            circuits.note(name, None, probe=probe)
        self.attempts.append(_attempt(candidate, self._clock.now() - started))
        return Answered(value, candidate, tuple(self.attempts), probe)

    def _cut_short(self, error: ProviderError) -> bool:
        """Whether it ran out of the little time that those before it had left, which says nothing about it."""
        return isinstance(error, ProviderTimeout) and bool(self.attempts) and self._clock.now() >= self.ends_at


def _nobody(candidates: Sequence[Candidate], circuits: Gate | None) -> Exception:
    if circuits is None or not candidates:
        return ValueError("there is nobody to call: a plan has at least one candidate")
    waits = {candidate.model.name: circuits.wait_seconds(candidate.model.name) for candidate in candidates}
    soonest = min(candidates, key=lambda candidate: waits[candidate.model.name]).model
    return CircuitOpen(
        f"the same is true of all {len(candidates)} that may serve this request" if len(candidates) > 1 else "",
        provider_id=soonest.provider_id,
        model_id=soonest.id,
        # A circuit that somebody probes right now is known in a moment, not at once.
        retry_after_seconds=max(math.ceil(waits[soonest.name]), 1),
    )


def _attempt(candidate: Candidate, seconds: float, error: ProviderError | None = None) -> Attempt:
    return Attempt(
        provider_id=candidate.model.provider_id,
        model_id=candidate.model.id,
        seconds=seconds,
        error=None if error is None else error.code,
        detail="" if error is None else error.detail,
    )
