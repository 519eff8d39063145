"""Asking the candidates of a plan in turn, within the limits of their providers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sekha.bill import note_attempt, note_charged
from sekha.calling import Answered, call_in_turn
from sekha.chat import ChatRequest, Opened, Reply
from sekha.embedding import EmbedRequest, RawEmbedded
from sekha.errors import FieldUnsupported, NotLoaded
from sekha.ledger import Hold, Spend
from sekha.pricing import Usage
from sekha.rates import Taken
from sekha.resources import Resources
from sekha.routing import Candidate, Plan
from sekha.settling import to_the_end
from sekha.steps.waits import unless_others_may

if TYPE_CHECKING:
    from sekha.providers.relay import Begun

__all__ = ["Asking", "Sent", "SentSteps", "worst_of"]

T = TypeVar("T")


class Sent(NamedTuple):
    """The call to the first candidate, where it was sent before the step began that waits for it."""

    begun: Begun
    at: float
    """By the clock of `Resources`."""
    taken: Taken | None
    """What it took of the provider's limits."""


@dataclass(frozen=True, slots=True)
class SentSteps:
    """The steps of a line that wait for a call which was sent before."""

    call: Callable[[ChatRequest, Plan, Hold, Sent], Awaitable[Reply]]
    open: Callable[[ChatRequest, Plan, Hold, Sent], Awaitable[Opened]]
    embed: Callable[[EmbedRequest, Plan, Hold, Sent], Awaitable[RawEmbedded]]


class Asking:
    """What asking for an answer and asking for vectors have in common."""

    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def _in_turn(
        self,
        chosen: Plan,
        once: Callable[[Candidate, float], Awaitable[T]],
        affords: Callable[[Candidate], bool],
        *,
        whole: bool = True,
        sent: Sent | None = None,
        taken: dict[str, Taken] | None = None,
        planned: bool = True,
    ) -> Answered[T]:
        """Ask the candidates in turn, as long as the request `affords` another attempt.

        `taken` is told what the last call to each provider took of its limits. Where those were not `planned` for
        with this call alone, they are asked before the first one too.
        """
        rates = self._open.rates
        taken = {} if taken is None else taken
        counts = sent is None
        if sent is not None and sent.taken is not None:
            taken[chosen.first.model.provider_id] = sent.taken

        async def counted(candidate: Candidate, seconds: float) -> T:
            nonlocal counts
            provider_id, estimate = candidate.model.provider_id, candidate.estimate
            if not counts:
                counts = True
            elif took := rates.take(provider_id, estimate.input_tokens + estimate.output_tokens):
                taken[provider_id] = took
            try:
                return await once(candidate, seconds)
            except (FieldUnsupported, NotLoaded) as error:
                if not error.may_be_billed and (unused := taken.pop(provider_id, None)):  # nothing was sent
                    rates.give_back(provider_id, unused)
                raise

        def room(candidate: Candidate) -> float:
            # By what goes in, as the plan asked for those that come first.
            return rates.wait(candidate.model.provider_id, candidate.estimate.input_tokens)

        try:
            answered = await call_in_turn(
                chosen.candidates,
                counted if rates else once,
                retries=self._open.retries,
                clock=self._open.clock,
                deadline_seconds=self._open.patience_seconds(chosen),
                circuits=self._open.circuits,
                pauses=self._open.pauses,
                limits=room if rates else None,
                limits_first=not planned,
                affords=affords,
                told=note_attempt,
                whole=whole,
                began_at=None if sent is None else sent.at,
            )
        except FieldUnsupported as error:
            unless_others_may(self._open, chosen, error)
            raise
        answer, candidate, attempts, _ = answered
        model = candidate.model
        self._open.latencies.observe(model.name, attempts[-1].seconds)
        if whole:  # a stream that has begun is counted at its end
            self._correct(candidate, taken.get(model.provider_id), getattr(answer, "usage", None))
        return answered

    def _correct(self, candidate: Candidate, taken: Taken | None, usage: Usage | None) -> None:
        """Count a call against its provider's limits by what it used, in place of what it was taken for."""
        if taken is not None and usage is not None:
            tokens = usage.input_tokens + usage.output_tokens
            self._open.rates.correct(candidate.model.provider_id, taken, tokens)

    async def _charge(self, hold: Hold, spend: Spend) -> None:
        ledger = await self._open.ledger()
        note_charged(spend)
        await to_the_end(ledger.charge(hold, spend))


async def worst_of(candidate: Candidate) -> tuple[Usage, Decimal]:
    estimate = candidate.estimate
    return Usage(input_tokens=estimate.input_tokens, counted=True), estimate.worst_case
