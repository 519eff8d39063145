"""Call the candidates of a plan in turn, with retries, until one answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Generic, NamedTuple, Protocol, TypeVar

from sekha.errors import CircuitOpen, FieldUnsupported, ProviderError, ProviderTimeout, RateLimited
from sekha.registry import Model
from sekha.routing import Candidate
from sekha.values import value

__all__ = [
    "CANCELLED",
    "FULL",
    "PAUSED",
    "Answered",
    "Attempt",
    "Clock",
    "Gate",
    "Retries",
    "Waits",
    "call_in_turn",
    "kept_back",
    "seconds_shut",
]

T = TypeVar("T")
log = logging.getLogger("sekha.calling")

CANCELLED = "cancelled"
"""What stands for the code of an error where an attempt was cut, as the request was that it was made for."""
FULL = "its `limits:` are reached"
PAUSED = "so it said to a request before this one"
_LEAST_SECONDS = 1.0
"""A call with less time than this, or than a tenth of all there was, is not begun: it would be paid for and cut off."""


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
    """How long to go on. Waits are drawn from [0, base × 2ⁿ), "full jitter", at most `longest_wait_seconds`, and
    begin when the `Retry-After` of whoever is due first is over.

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
    """The error's code, or `CANCELLED`; None when it answered."""
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


class Waits(Protocol):
    """The pauses that providers asked for, as far as calling needs them. A name is `provider/model`."""

    def note(self, name: str, seconds: float) -> None:
        """Leave a model alone for so long."""
        ...

    def wait(self, name: str) -> float:
        """Seconds for which this one is still to be left alone; 0 for none."""
        ...


async def call_in_turn(  # noqa: PLR0912, PLR0915 - the branches are what it is about
    candidates: Sequence[Candidate],
    call: Callable[[Candidate, float], Awaitable[T]],
    *,
    retries: Retries,
    clock: Clock,
    deadline_seconds: float,
    circuits: Gate | None = None,
    pauses: Waits | None = None,
    limits: Callable[[Candidate], float] | None = None,
    limits_first: bool = False,
    affords: Callable[[Candidate], bool] | None = None,
    told: Callable[[Attempt], None] | None = None,
    whole: bool = True,
    began_at: float | None = None,
) -> Answered[T]:
    """Try each candidate once, then those worth retrying again, within one deadline.

    `call` makes one attempt with the seconds that it may take. A failed candidate waits until every
    other had its turn, and as long as its `Retry-After` says; one whose error is not `retryable` is
    not asked again; an error that does not `falls_back` ends it at once, since no other provider
    would make the request right. With no time left for another call it raises, with every attempt in `attempts`,
    the last `ProviderError` of a candidate whose last one is `retryable`; else `RateLimited` for whoever was kept
    back, is due first and was not asked since; else the last of those that could be asked, else the last of all.

    A 429 that says how long to wait is noted in `pauses`, and a candidate that is paused has its turn
    when the pause is over, whichever request was told of it.

    After a failure `limits` is asked for how many seconds the limits of a candidate's provider let no more pass, and
    with `limits_first` before all calls. One that they keep back has its turn when there is room, if that is in time;
    for ever, and it is asked no more.

    A candidate is passed over while its circuit lets no call through; `CircuitOpen` when that leaves
    nobody. Every call that ends is noted, once. When `call` returns not the `whole` answer but a stream
    that has begun, its reader notes the end; a probe has done its part by beginning.

    After a failure whoever the request no longer `affords` is asked no more.

    Each attempt is `told` as it ends, one that is cut too: of a request that is cancelled there is nothing else to read
    it from. Of a stream that has begun its reader tells that as well.

    With `began_at`, the first candidate was let through and asked then, and its first `call` but waits for it.
    """
    now = clock.now
    ends_at = (now() if began_at is None else began_at) + deadline_seconds
    begins_until = ends_at - min(_LEAST_SECONDS, deadline_seconds / 10)
    first_failure = partial(_Failed, retries, clock, circuits, pauses, begins_until=begins_until, ends_at=ends_at)
    failed: _Failed | None = None
    try:
        for turn in count():
            for candidate in candidates:
                name = candidate.model.name
                if failed is not None and not failed.lets_ask(name):
                    continue
                if failed is not None and affords is not None and not affords(candidate):
                    failed.give_up(name)
                    continue
                if began_at is None and pauses is not None and (seconds := pauses.wait(name)):
                    failed = failed or first_failure()
                    failed.put_off(candidate.model, seconds, PAUSED)
                    continue
                if limits is not None and (failed is not None or limits_first) and (seconds := limits(candidate)):
                    failed = failed or first_failure()
                    failed.put_off(candidate.model, seconds, FULL)
                    continue
                probe: str | None = None
                if began_at is None and circuits is not None:
                    probe = None if circuits.admit(name) else await circuits.claim(name)
                    # Asked once more, since somebody else's probe may have closed it while we waited for ours.
                    if probe is None and not circuits.admit(name):
                        if failed is not None:
                            failed.leave_out(name)
                        continue
                began, began_at = now() if began_at is None else began_at, None
                try:
                    answer = await call(candidate, ends_at - began)
                except ProviderError as error:
                    failed = failed or first_failure()
                    failed.note(candidate.model, error, now() - began, probe)
                    if told is not None:
                        told(failed.attempts[-1])
                    if not error.falls_back:
                        raise
                    if affords is not None and not affords(candidate):
                        failed.give_up(name)
                except BaseException as error:
                    if circuits is not None and probe is not None:
                        circuits.give_back(name, probe)
                    # A cancellation is no `Exception`; what is one went wrong on our side.
                    if told is not None and not isinstance(error, Exception):
                        told(_attempt(candidate.model, now() - began, CANCELLED))
                    raise
                else:
                    if circuits is not None and (whole or probe is not None):
                        circuits.note(name, None, probe=probe)
                    attempt = _attempt(candidate.model, now() - began)
                    if told is not None and whole:
                        told(attempt)
                    return Answered(
                        answer, candidate, (attempt,) if failed is None else (*failed.attempts, attempt), probe
                    )
            if failed is None or not failed.knows_of_any:
                break
            await failed.wait(turn)
    finally:
        # It keeps an error, whose traceback keeps this frame, which keeps the request.
        failed = None
    raise _nobody(candidates, circuits)


class _Failed:
    """The calls of a request that failed so far: which error to end with, and who may be asked again and when."""

    def __init__(
        self,
        retries: Retries,
        clock: Clock,
        circuits: Gate | None,
        pauses: Waits | None,
        *,
        begins_until: float,
        ends_at: float,
    ) -> None:
        self.attempts: tuple[Attempt, ...] = ()
        self._retries = retries
        self._clock = clock
        self._circuits = circuits
        self._pauses = pauses
        self._begins_until = begins_until
        """No call is begun from then on."""
        self._ends_at = ends_at
        self._errors: dict[str, ProviderError] = {}
        """How the last call to each ended, the latest last."""
        self._kept_back: dict[str, tuple[Model, str]] = {}
        """Who is not asked yet since it has no room, and why."""
        self._awake = -math.inf
        self._due: dict[str, float] = {}
        """When each may be asked again."""
        self._tried: dict[str, int] = {}

    def note(self, model: Model, error: ProviderError, seconds: float, probe: str | None) -> None:
        """Note how a call ended that took so many seconds, for its circuit too."""
        log.warning("%s", error)
        name, circuits = model.name, self._circuits
        if circuits is not None:
            if not self._cut_short(error):
                circuits.note(name, error, probe=probe, seconds=seconds)
            elif probe is not None:
                circuits.give_back(name, probe)
        if self._pauses is not None and isinstance(error, RateLimited) and error.retry_after_seconds:
            self._pauses.note(name, error.retry_after_seconds)
        error.attempts = self.attempts = (*self.attempts, _attempt(model, seconds, error.code, error.detail))
        self._kept_back.pop(name, None)
        self._errors.pop(name, None)
        self._errors[name] = error
        tried = self._tried[name] = self._tried.get(name, 0) + 1
        again = error.retryable and tried < self._retries.rounds and (circuits is None or circuits.admit(name))
        self._due[name] = self._clock.now() + (error.retry_after_seconds or 0.0) if again else math.inf

    def put_off(self, model: Model, seconds: float, why: str) -> None:
        """Have this one wait for so long for its turn."""
        self._due[model.name] = self._clock.now() + seconds
        self._kept_back[model.name] = model, why

    @property
    def knows_of_any(self) -> bool:
        """Whether anybody was asked, or kept back for another reason than an open circuit."""
        return bool(self._errors or self._kept_back)

    def lets_ask(self, name: str) -> bool:
        """Whether it is this one's turn. Raises the error to end with when the time is over."""
        if self._due.get(name, self._awake) > self._awake:
            return False
        self._unless_over(self._clock.now())
        return True

    def give_up(self, name: str) -> None:
        """Ask this one no more, if it was asked or was to be."""
        if name in self._due:
            self._due[name] = math.inf

    def leave_out(self, name: str) -> None:
        """Ask this one no more, whose circuit is open. That says more of it than that it was kept back."""
        self._kept_back.pop(name, None)
        self.give_up(name)

    async def wait(self, turn: int) -> None:
        """Wait before everybody's next turn. Raises the error to end with when there is none in time."""
        longest = min(self._retries.base_wait_seconds * 2**turn, self._retries.longest_wait_seconds)
        now = self._clock.now()
        soonest = max(now, min(self._due.values()))
        if soonest < self._begins_until:
            # As long as was asked for, and then not all at once.
            longest = min(longest, self._begins_until - soonest)
        self._awake = soonest + longest * self._clock.random()
        self._unless_over(self._awake)
        names = ", ".join(name for name, at in self._due.items() if at <= self._awake)
        log.info("waiting %.2f s before asking again: %s", self._awake - now, names)
        await self._clock.sleep(self._awake - now)

    def _unless_over(self, at: float) -> None:
        if at >= self._begins_until and self.knows_of_any:
            try:
                raise self._to_end_with()
            finally:
                # Its traceback keeps this frame now.
                self._errors.clear()

    def _to_end_with(self) -> ProviderError:
        now = self._clock.now()
        if hopeful := [name for name, error in self._errors.items() if error.retryable]:
            error = self._errors[hopeful[-1]]
            self._say_when(error, self._due[hopeful[-1]] - now, min(self._due.values()) - now)
        elif self._kept_back and (not self._errors or self._due[self._first_kept_back()] < math.inf):
            first = self._first_kept_back()
            error = kept_back(*self._kept_back[first], max(self._due[first] - now, 0.0))
        else:
            # Who could not be asked at all says nothing of those who were and failed.
            asked = [error for error in self._errors.values() if not isinstance(error, FieldUnsupported)]
            error = asked[-1] if asked else list(self._errors.values())[-1]
        error.attempts = self.attempts
        return error

    def _first_kept_back(self) -> str:
        return min(self._kept_back, key=self._due.__getitem__)

    def _say_when(self, error: ProviderError, its_own: float, soonest: float) -> None:
        """Say how long to wait, where the one that failed has to be waited for, and no longer than for another."""
        if soonest <= 0 or soonest == math.inf:
            return
        if error.retry_after_seconds is not None:
            error.retry_after_seconds = min(error.retry_after_seconds, soonest)
        # Whoever may be asked again at once is not to wait for another.
        elif its_own == soonest:
            error.retry_after_seconds = soonest

    def _cut_short(self, error: ProviderError) -> bool:
        """Whether it ran out of the little time that those before it had left, which says nothing about it."""
        return isinstance(error, ProviderTimeout) and bool(self.attempts) and self._clock.now() >= self._ends_at


def _nobody(candidates: Sequence[Candidate], circuits: Gate | None) -> Exception:
    if circuits is None or not candidates:
        return ValueError("there is nobody to call: a plan has at least one candidate")
    soonest = min((candidate.model for candidate in candidates), key=lambda model: circuits.wait_seconds(model.name))
    return CircuitOpen(
        f"the same is true of all {len(candidates)} that may serve this request" if len(candidates) > 1 else "",
        provider_id=soonest.provider_id,
        model_id=soonest.id,
        retry_after_seconds=seconds_shut(soonest, circuits),
    )


def seconds_shut(model: Model, circuits: Gate) -> int:
    """For how many seconds an open circuit is to be told to be so."""
    # One that somebody probes right now is known in a moment, not at once.
    return max(math.ceil(circuits.wait_seconds(model.name)), 1)


def kept_back(model: Model, why: str, seconds: float) -> RateLimited:
    """What is told of one that was not asked since it has no room for so many seconds: `FULL`, or `PAUSED`."""
    wait = seconds if seconds < math.inf else None
    return RateLimited(why, provider_id=model.provider_id, model_id=model.id, retry_after_seconds=wait)


def _attempt(model: Model, seconds: float, error: str | None = None, detail: str = "") -> Attempt:
    return Attempt(provider_id=model.provider_id, model_id=model.id, seconds=seconds, error=error, detail=detail)
