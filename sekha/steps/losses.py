"""What attempts that failed may have cost, within one request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from typing import ParamSpec, TypeVar

from sekha.asks import cap
from sekha.bill import note_asked, note_charged
from sekha.chat import Reply
from sekha.errors import DimensionMismatch, ProviderError, dollars
from sekha.ledger import Hold, Spend
from sekha.pricing import Usage
from sekha.resources import Resources
from sekha.routing import Candidate, Plan
from sekha.settling import to_the_end
from sekha.steps.money import cost_of, spend_of, with_images

__all__ = ["Losses"]

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("sekha.calls")


class Losses:
    """The money of attempts that failed and that a provider may bill all the same: they count at their worst case.

    Each uses up a part of the hold, so that as much is held again before the next attempt.
    """

    __slots__ = ("_again", "_chosen", "_hold", "_identity", "_of_all", "_open", "_spends")

    def __init__(
        self, resources: Resources, chosen: Plan, hold: Hold, identity: str, of_all: list[Decimal] | None = None
    ) -> None:
        """`of_all` is shared by the parts of a request that is sent in several calls, which have one cap together."""
        self._open = resources
        self._chosen = chosen
        self._hold = hold
        self._identity = identity
        self._spends: list[Spend] = []
        self._again: list[Hold] = []
        self._of_all: list[Decimal] = [] if of_all is None else of_all
        """Dollars of each attempt."""

    @property
    def cost(self) -> Decimal:
        return sum((spend.cost for spend in self._spends), Decimal(0))

    def affords(self, candidate: Candidate) -> bool:
        """Whether one more attempt keeps the request within its cap, whatever the provider makes of those before."""
        if not self._of_all:
            return True
        most, name = cap(self._chosen.ask, self._open.rules)
        lost, worst = sum(self._of_all, Decimal(0)), candidate.estimate.worst_case
        if most is None or lost + worst <= most:
            return True
        log.info(
            "%s is not asked again: attempts that failed may cost %s, and %s more would pass `%s` of %s",
            candidate.model.name,
            dollars(lost),
            dollars(worst),
            name,
            dollars(most),
        )
        return False

    async def attempt(
        self,
        candidate: Candidate,
        at_worst: Callable[[Candidate], Awaitable[tuple[Usage, Decimal]]],
        call: Callable[P, Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        note_asked(candidate.model)
        if len(self._again) < len(self._spends):
            await self._hold_again(self._spends[-1])
        try:
            return await call(*args, **kwargs)
        except ProviderError as error:
            if error.may_be_billed or isinstance(error, DimensionMismatch):
                reported = error.usage
                if reported is None:
                    usage, amount = await at_worst(candidate)
                else:
                    usage = reported if reported.tier else replace(reported, tier=self._chosen.ask.tier)
                    pictures = self._chosen.ask.pictures
                    usage = with_images(usage, len(pictures.each) if pictures else 0, candidate.model)
                    amount = cost_of(usage, candidate.model)
                if amount:
                    await to_the_end(self._charge(candidate, usage, amount))
            raise
        except asyncio.CancelledError:
            # The caller left, and nobody will know what the provider makes of it: leaving is no way past a budget.
            await to_the_end(self._charge_left(candidate, at_worst))
            raise

    async def charge(self, reply: Reply) -> None:
        """Record a reply against what was held again, before that is freed. Settling it once more changes nothing."""
        if self._again:
            ledger = await self._open.ledger()
            spend = spend_of(reply, identity=self._identity, at=self._open.now())
            await to_the_end(ledger.charge(self._again[-1], spend))
            await self.free()

    async def free(self) -> None:
        if self._again:
            ledger = await self._open.ledger()
            for hold in self._again:
                await to_the_end(ledger.release(hold))
            self._again.clear()
            self._spends.clear()

    async def _hold_again(self, lost: Spend) -> None:
        amounts = {budget.name: lost.cost for budget in self._hold.budgets if budget.covers(lost.scope)}
        ledger = await self._open.ledger()
        budgets, ttl = self._hold.budgets, self._hold.ttl_seconds
        at = self._open.now()
        self._again.append(await ledger.reserve(budgets, amounts, at=at, ttl_seconds=ttl, scope=lost.scope))

    async def _charge_left(
        self, candidate: Candidate, at_worst: Callable[[Candidate], Awaitable[tuple[Usage, Decimal]]]
    ) -> None:
        usage, amount = await at_worst(candidate)
        if amount:
            await self._charge(candidate, usage, amount)

    async def _charge(self, candidate: Candidate, usage: Usage, amount: Decimal) -> None:
        spend = Spend(
            id=f"{self._identity}!{len(self._spends) + 1}",
            scope=self._chosen.ask.scope(candidate.model),
            cost=amount,
            estimated=candidate.estimate.expected,
            usage=usage,
            at=self._open.now(),
            replies=1 if self._chosen.estimates is None else self._chosen.estimates.size.replies,
        )
        ledger = await self._open.ledger()
        await ledger.charge(self._again[-1] if self._again else self._hold, spend)
        note_charged(spend, lost=True)
        self._spends.append(spend)
        self._of_all.append(spend.cost)
