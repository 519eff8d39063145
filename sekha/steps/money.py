"""What it may cost, who may be asked, what is held and what was spent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from weakref import WeakSet

from sekha.asks import Ask, Estimates, Size
from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest, RawEmbedded
from sekha.errors import LedgerError, NoCandidate
from sekha.ledger import Budget, Hold, Spend, remaining
from sekha.lineup import LineUp, line_up
from sekha.resources import Resources
from sekha.routing import Explanation, Plan, explain, plan
from sekha.steps.counting import Counters
from sekha.vision import are_heavy

__all__ = ["HOLD_SECONDS", "Money", "UsualReplies", "spend_of"]

HOLD_SECONDS = 900.0
"""A hold lasts this long, or twice as long as a call may take: only a process that died leaves one to expire."""
log = logging.getLogger("sekha.money")


class Money:
    def __init__(self, resources: Resources) -> None:
        self._open = resources
        self._counters = Counters(resources.registry)
        self._usual = UsualReplies(resources)
        self._images_need_vision = resources.loaded.config.routing.require_vision_for_images

    async def aclose(self) -> None:
        await self._usual.aclose()

    async def estimate_cost(self, request: ChatRequest | EmbedRequest) -> Estimates:
        """Count the request, from which its price at every model follows."""
        if isinstance(request, ChatRequest) and are_heavy(request.messages):
            await asyncio.to_thread(getattr, request, "pictures")
        ask = self._ask(request)
        lined_up = line_up(ask, self._open.registry)
        budgets = lined_up.covered(ask, self._open.budgets) if self._open.budgets else ()
        at = self._open.now() if budgets else None
        left = await self._remaining(budgets, at) if at is not None else {}
        usual: Mapping[str, int] = {}
        if isinstance(request, ChatRequest):
            known = self._usual.known(lined_up)
            usual = await self._usual.read(lined_up) if known is None else known
            images = 0 if ask.pictures is None else len(ask.pictures.each)
            counters = self._counters.of_images if images else self._counters.of_words
            names = lined_up.counter_names(counters)
            short = self._counters.count_short(request, names)
            counts = await self._counters.count_long(request, names) if short is None else short
            size = Size(ask, images, request.replies, request.reply_limit, request.writes_cache)
        else:
            counters = self._counters.of_words
            counts = await self._counters.count_texts(request.texts, lined_up.counter_names(counters))
            size = Size(ask)
        return Estimates(size, counters, counts, usual, self._open.rules, self._open.budgets, left, at)

    async def select_provider(
        self,
        request: ChatRequest | EmbedRequest,  # noqa: ARG002 - what of it decides is in the estimates
        estimates: Estimates,
    ) -> Plan:
        """Choose who is asked, in which order."""
        try:
            return plan(estimates, self._open.registry, self._open.conditions(estimates))
        except NoCandidate as error:
            if error.retryable and error.retry_after_seconds is None and self._open.circuits is not None:
                error.retry_after_seconds = self._open.circuits.soonest(name for name, _ in error.reasons)
            raise

    def explain_choice(self, estimates: Estimates) -> Explanation:
        """Say who would be asked and why, and which rule drops each of the others."""
        return explain(estimates, self._open.registry, self._open.conditions(estimates))

    async def reserve_budget(self, chosen: Plan) -> Hold:
        """Hold the worst case against every budget that the calls may count against."""
        amounts = chosen.holds(self._open.budgets)
        budgets = [budget for budget in self._open.budgets if budget.name in amounts]
        lasts = max(HOLD_SECONDS, 2 * self._open.patience_seconds(chosen))
        ledger = await self._open.ledger()
        scope = chosen.ask.scope(chosen.first.model)
        return await ledger.reserve(budgets, amounts, at=self._open.now(), ttl_seconds=lasts, scope=scope)

    async def settle_cost(self, hold: Hold, outcome: Reply | Embedded | RawEmbedded | None) -> None:
        """Record what the call cost, and free what is left of the hold."""
        ledger = await self._open.ledger()
        if isinstance(outcome, Reply):
            await ledger.settle(hold, spend_of(outcome, identity=hold.id, at=self._open.now()))
        else:
            # Embeddings were charged call by call, so that one that fails late hides nothing.
            await ledger.release(hold)

    def _ask(self, request: ChatRequest | EmbedRequest) -> Ask:
        if isinstance(request, ChatRequest):
            return request.ask(images_need_vision=self._images_need_vision)
        return request.ask()

    async def _remaining(self, budgets: Iterable[Budget], at: datetime) -> dict[str, Decimal]:
        """What is left in these budgets, which any of the models would count against."""
        ledger = await self._open.ledger()
        left: dict[str, Decimal] = {}
        for budget in budgets:
            spent, held = await ledger.spent(budget, at=at)
            left[budget.name] = remaining(budget, spent, held)
        return left


class UsualReplies:
    """How long the models' replies usually are: read once before it is needed, and then behind the requests."""

    REFRESH_SECONDS = 30.0

    def __init__(self, resources: Resources) -> None:
        self._open = resources
        self._tokens: Mapping[str, int] = {}
        """`provider/model` → tokens. Never changed, but replaced: estimates that were made keep what they saw."""
        self._models: dict[str, tuple[str, str]] = {}
        self._read: WeakSet[LineUp] = WeakSet()
        self._reading = asyncio.Lock()
        self._refreshed = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    def known(self, lined_up: LineUp) -> Mapping[str, int] | None:
        """Tokens of a usual reply, for those models that have a history; None before the line-up's were read."""
        if lined_up not in self._read:
            return None
        if self._open.clock.now() - self._refreshed > self.REFRESH_SECONDS and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        return self._tokens

    async def aclose(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    async def read(self, lined_up: LineUp) -> Mapping[str, int]:
        """Read them for the first time."""
        async with self._reading:
            new = {
                entrant.name: (entrant.model.provider_id, entrant.model.id)
                for entrant in lined_up.entrants
                # What a reply costs nothing for is worth no question.
                if entrant.name not in self._models and entrant.model.price and entrant.model.price.output
            }
            if new:
                self._tokens = {**self._tokens, **await self._ask(new)}
            if not self._models:
                self._refreshed = self._open.clock.now()
            self._models |= new
            self._read.add(lined_up)
            return self._tokens

    async def _refresh(self) -> None:
        try:
            tokens = await self._ask(self._models)
            if tokens.items() - self._tokens.items():
                self._tokens = {**self._tokens, **tokens}
        except LedgerError as error:
            log.warning("How long replies usually are could not be read again: %s", error)
        finally:
            self._refreshed = self._open.clock.now()
            self._refreshing = None

    async def _ask(self, models: Mapping[str, tuple[str, str]]) -> dict[str, int]:
        ledger = await self._open.ledger()
        found: dict[str, int] = {}
        for name, (provider, model) in list(models.items()):
            usual = await ledger.usual_output_tokens(provider, model)
            if usual:
                found[name] = usual
        return found


def spend_of(outcome: Reply | Embedded | RawEmbedded, *, identity: str, at: datetime) -> Spend:
    """What a call cost, as the ledger records it; once, however often under the same identity."""
    return Spend(
        id=identity,
        scope=outcome.charged_to,
        cost=outcome.cost,
        estimated=outcome.estimated_cost,
        usage=outcome.usage,
        at=at,
    )
