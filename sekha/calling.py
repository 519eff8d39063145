"""Call the candidates of a plan in turn, with retries, until one answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
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
    """How often a candidate is tried at the most."""
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
    other had its turn, and as long as its `Retry-After` says; one whose error is not `retryable` is
    not asked again; an error that does not `falls_back` ends it at once, since no other provider
    would make the request right. Raises the last `ProviderError` of a candidate that may yet
    succeed, else the last of all, with every attempt in its `attempts`.
    """
    ends_at = clock.now() + deadline_seconds
    attempts: list[Attempt] = []
    failure: ProviderError | None = None
    awake = clock.now()
    due = {candidate.model.name: awake for candidate in candidates}
    tried: Counter[str] = Counter()
    for turn in count():
        for candidate in candidates:
            name = candidate.model.name
            if name not in due or due[name] > awake:
                continue
            started = clock.now()
            if failure is not None and started >= ends_at:
                raise failure
            tried[name] += 1
            try:
                value = await call(candidate, ends_at - started)
            except ProviderError as error:
                attempts.append(_failed(candidate, error, clock.now() - started))
                log.warning("%s", error)
                if failure is None or error.retryable or not failure.retryable or not error.falls_back:
                    failure = error
                failure.attempts = tuple(attempts)
                if not error.falls_back:
                    raise
                if error.retryable and tried[name] < retries.rounds:
                    due[name] = clock.now() + (error.retry_after_seconds or 0.0)
                else:
                    del due[name]
            else:
                attempts.append(_answered(candidate, clock.now() - started))
                return Answered(value=value, candidate=candidate, attempts=tuple(attempts))
        if failure is None:
            break
        wait = min(retries.base_wait_seconds * 2**turn, retries.longest_wait_seconds) * clock.random()
        awake = max(clock.now() + wait, min(due.values(), default=ends_at))
        if awake >= ends_at:
            raise failure
        again = ", ".join(name for name, at in due.items() if at <= awake)
        log.info("waiting %.2f s before asking again: %s", awake - clock.now(), again)
        await clock.sleep(awake - clock.now())
    raise ValueError("there is nobody to call: a plan has at least one candidate")


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
