"""Call the candidates of a plan in turn, with retries, until one answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sekha.errors import ProviderError
from sekha.routing import Candidate

__all__ = ["Answered", "Attempt", "Clock", "Retries", "call_in_turn"]

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
    """How often every healthy candidate is tried."""
    base_wait_seconds: float = 0.5
    longest_wait_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One call to one candidate, and how it ended."""

    provider_id: str
    model_id: str
    seconds: float
    error: str | None = None
    """The error's code; None when it answered."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Generic[T]):
    value: T
    candidate: Candidate
    attempts: tuple[Attempt, ...] = field(default=())


async def call_in_turn(
    candidates: Sequence[Candidate],
    call: Callable[[Candidate, float], Awaitable[T]],
    *,
    retries: Retries,
    clock: Clock,
    deadline_seconds: float,
) -> Answered[T]:
    """Try each candidate once, then those worth retrying again, within one deadline.

    `call` makes one attempt with the seconds that it may take. A failed candidate waits until every
    other had its turn; one whose error is not `retryable` is not asked again; an error that does not
    `falls_back` ends it at once, since no other provider would make the request right. A provider's
    `Retry-After` is waited for, unless the deadline comes first. Raises the last `ProviderError`,
    with every attempt in its `attempts`.
    """
    ends_at = clock.now() + deadline_seconds
    attempts: list[Attempt] = []
    waiting = list(candidates)
    for round_number in range(retries.rounds):
        again: list[Candidate] = []
        pause = 0.0
        for candidate in waiting:
            started = clock.now()
            try:
                value = await call(candidate, max(ends_at - started, 0.001))
            except ProviderError as error:
                attempts.append(_failed(candidate, error, clock.now() - started))
                error.attempts = tuple(attempts)
                failure = error
                log.warning("%s", error)
                if not error.falls_back:
                    raise
                if error.retryable:
                    again.append(candidate)
                    pause = max(pause, error.retry_after_seconds or 0.0)
            else:
                attempts.append(_answered(candidate, clock.now() - started))
                return Answered(value=value, candidate=candidate, attempts=tuple(attempts))
        if not again or round_number == retries.rounds - 1:
            raise failure
        wait = min(retries.base_wait_seconds * 2**round_number, retries.longest_wait_seconds) * clock.random()
        wait = max(wait, pause)
        if clock.now() + wait >= ends_at:
            raise failure
        log.info("waiting %.2f s before asking again: %s", wait, ", ".join(c.model.name for c in again))
        await clock.sleep(wait)
        waiting = again
    raise AssertionError("a plan has at least one candidate, and retries at least one round")


def _failed(candidate: Candidate, error: ProviderError, seconds: float) -> Attempt:
    return Attempt(
        provider_id=candidate.model.provider_id,
        model_id=candidate.model.id,
        seconds=seconds,
        error=error.code,
        detail=error.detail,
    )


def _answered(candidate: Candidate, seconds: float) -> Attempt:
    return Attempt(provider_id=candidate.model.provider_id, model_id=candidate.model.id, seconds=seconds)
