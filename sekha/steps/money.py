"""What it may cost, who may be asked, what is held and what was spent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from statistics import median_low
from typing import NamedTuple
from weakref import WeakSet

from sekha.asks import Ask, Count, Estimates, Size
from sekha.bill import note_charged
from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest, RawEmbedded
from sekha.errors import CostRefused, LedgerError, NoCandidate
from sekha.ledger import Budget, Hold, Scope, Spend, remaining
from sekha.lineup import REMEMBERED, LineUp, line_up
from sekha.pricing import Usage, cost
from sekha.registry import Model
from sekha.resources import Resources
from sekha.routing import Explanation, Plan, cheapest, considered, explain, plan
from sekha.steps.counting import Counters
from sekha.steps.parts import FEWEST_TEXTS, texts_at_once
from sekha.tokens import TokenizerName
from sekha.vision import are_heavy

__all__ = ["HOLD_SECONDS", "Known", "Money", "UsualReplies", "check_worst_case", "cost_of", "spend_of", "with_images"]

HOLD_SECONDS = 900.0
"""A hold lasts this long, or twice as long as a call may take: only a process that died leaves one to expire."""
ASKS = 1_000
"""Asks for which it is remembered who may serve them, up to `REMEMBERED` entrants. Callers make them, like scopes."""
SCOPES = 1_000
"""Scopes whose budgets are remembered. Callers make them, with up to ten kilobytes of tags each."""
log = logging.getLogger("sekha.money")


class Known(NamedTuple):
    """What all asks that are alike have in common."""

    lined_up: LineUp
    budgets: Sequence[Budget]
    """Those that a call to any of the models would count against."""
    counters: tuple[str, ...]
    """What counts the words for these models."""


class Money:
    def __init__(self, resources: Resources) -> None:
        self._open = resources
        self._counters = Counters(resources.registry)
        self._usual = UsualReplies(resources)
        self._known: dict[Ask, Known] = {}
        self._lined_up: set[LineUp] = set()
        """All line-ups in there, which asks of one form share."""
        self._budgets = {budget.name: budget for budget in resources.budgets}
        self._covered: dict[Scope, tuple[str, ...]] = {}
        self._images_need_vision = resources.loaded.config.routing.require_vision_for_images

    async def aclose(self) -> None:
        await self._usual.aclose()

    async def estimate_cost(self, request: ChatRequest | EmbedRequest) -> Estimates:
        """Count the request, from which its price at every model follows."""
        if isinstance(request, ChatRequest):
            if request.image_count and are_heavy(request.messages):
                await asyncio.to_thread(getattr, request, "pictures")
            ask = request.ask(images_need_vision=self._images_need_vision)
        else:
            ask = request.ask()
        known = self._known.get(ask) or await self._meet(ask)
        resources = self._open
        at: datetime | None = None
        left: dict[str, Decimal] = {}
        if known.budgets:
            at = resources.now()
            ledger = await resources.ledger()
            for budget in known.budgets:
                spent, held = await ledger.spent(budget, at=at)
                left[budget.name] = remaining(budget, spent, held)
        usual: Mapping[str, int] = {}
        largest: int | None = None
        if isinstance(request, ChatRequest):
            usual = self._usual.known()
            images, counters, names = 0, self._counters.of_words, known.counters
            if ask.pictures is not None:
                images, counters = len(ask.pictures.each), self._counters.of_images
                names = known.lined_up.counter_names(counters)
            short = self._counters.count_short(request, names)
            counts = await self._counters.count_long(request, names) if short is None else short
            size = Size(
                ask,
                images,
                request.replies,
                request.reply_limit,
                request.writes_cache,
                request.unbounded,
                request.thinking,
            )
        else:
            counters = self._counters.of_words
            at_once: int | None = None
            if resources.rates and len(request.texts) > min(FEWEST_TEXTS, request.at_once or FEWEST_TEXTS):
                models = (entrant.model for entrant in known.lined_up.entrants)
                at_once = texts_at_once(request, models, resources.registry)
            counts, most = await self._counters.count_texts(request.texts, known.counters, at_once)
            largest = None if at_once is None else most
            size = Size(ask)
        return Estimates(
            size=size,
            counters=counters,
            counts=counts,
            usual=usual,
            compared_at=self._usual.middle if usual else None,
            rules=resources.rules,
            budgets=resources.budgets,
            remaining=left,
            at=at,
            largest_call=largest,
        )

    def estimates(self, size: Size, counts: Mapping[str, Count]) -> Estimates:
        """What `estimate_cost` makes of a request without images that is counted, but for what is left in budgets.

        Whoever goes by it holds what it may cost all the same, and so finds out whether there is as much.
        """
        resources = self._open
        return Estimates(
            size=size,
            counters=self._counters.of_words,
            counts=counts,
            usual=self._usual.known() if size.ask.kind == "chat" else {},
            compared_at=self._usual.middle if size.ask.kind == "chat" else None,
            rules=resources.rules,
            budgets=resources.budgets,
        )

    async def select_provider(
        self,
        request: ChatRequest | EmbedRequest,
        estimates: Estimates,
    ) -> Plan:
        """Choose who is asked, in which order."""
        try:
            return plan(estimates, self._open.registry, self._open.conditions(estimates))
        except NoCandidate as error:
            self._say_when(error, estimates)
            raise
        except CostRefused as error:
            raise await self._with_alternative(request, error) from None

    def known(self, ask: Ask) -> Known | None:
        """What all asks like this one have in common; None before the first of them was estimated."""
        return self._known.get(ask)

    @property
    def usual(self) -> UsualReplies:
        return self._usual

    def tokenizer_of(self, model: Model) -> tuple[TokenizerName, bool]:
        """What counts words for a model, and whether its provider counts just so."""
        counter = self._counters.of_words[model.id]
        return self._counters.tokenizer(counter.name), counter.exact

    def tokenizers_of(self, counters: Iterable[str]) -> dict[str, TokenizerName]:
        """Counter → what it counts words with."""
        return {name: self._counters.tokenizer(name) for name in counters}

    async def explain_choice(
        self,
        request: ChatRequest | EmbedRequest,
        estimates: Estimates,
        *,
        resized: Callable[[Estimates], Estimates] = lambda estimates: estimates,
    ) -> Explanation:
        """Say who would be asked and why, and which rule drops each of the others; of a request `resized` so."""
        estimates = resized(estimates)
        explained = explain(estimates, self._open.registry, self._open.conditions(estimates))
        if isinstance(explained.refusal, NoCandidate):
            self._say_when(explained.refusal, estimates)
        if isinstance(explained.refusal, CostRefused):
            return replace(explained, refusal=await self._with_alternative(request, explained.refusal, resized))
        return explained

    def _say_when(self, refusal: NoCandidate, estimates: Estimates) -> None:
        """Say when to come back, where a circuit alone keeps somebody from serving."""
        if refusal.retryable and refusal.retry_after_seconds is None and self._open.circuits is not None:
            names = (model.name for model in considered(estimates.ask, self._open.registry))
            refusal.retry_after_seconds = self._open.circuits.soonest(names)

    async def _with_alternative(
        self,
        request: ChatRequest | EmbedRequest,
        refused: CostRefused,
        resized: Callable[[Estimates], Estimates] = lambda estimates: estimates,
    ) -> CostRefused:
        """The same refusal, with the cheapest of all models that could serve it, whichever were asked for."""
        if not isinstance(request, ChatRequest) or (request.model in (None, "auto") and request.task is None):
            return refused  # that is the cheapest, since vectors of another model would be other vectors
        anybody = replace(request, model=None, task=None, preferred_model=None)
        estimates = resized(await self.estimate_cost(anybody))
        found = cheapest(estimates, self._open.registry, self._open.conditions(estimates))
        if found is None or found[0].name == refused.cheapest:
            return refused
        return CostRefused(
            limit=refused.limit,
            limit_name=refused.limit_name,
            cheapest=found[0].name,
            cost=found[1],
            replies=refused.replies,
            refused=refused.cheapest,
            refused_cost=refused.cost,
        )

    async def reserve_budget(self, chosen: Plan) -> Hold:
        """Hold the worst case against every budget that the calls may count against."""
        amounts: dict[str, Decimal] = {}
        scope: Scope | None = None
        for model, estimate, _ in chosen.candidates:
            charged_to, worst = chosen.ask.scope(model), estimate.worst_case
            scope = scope or charged_to
            names = self._covered.get(charged_to)
            for name in self._covering(charged_to) if names is None else names:
                # The dearest of the candidates that count against it.
                most = amounts.get(name)
                if most is None or worst > most:
                    amounts[name] = worst
        budgets = [self._budgets[name] for name in amounts]
        lasts = max(HOLD_SECONDS, 2 * self._open.patience_seconds(chosen))
        ledger = await self._open.ledger()
        return await ledger.reserve(budgets, amounts, at=self._open.now(), ttl_seconds=lasts, scope=scope)

    async def settle_cost(self, hold: Hold, outcome: Reply | Embedded | RawEmbedded | None) -> None:
        """Record what the call cost, and free what is left of the hold."""
        ledger = await self._open.ledger()
        if isinstance(outcome, Reply):
            check_worst_case(self._open, outcome)
            spend = spend_of(outcome, identity=hold.id, at=self._open.now())
            # Before, since whoever leaves meanwhile is charged all the same.
            note_charged(spend)
            await ledger.settle(hold, spend)
        else:
            # Embeddings were charged call by call, so that one that fails late hides nothing.
            await ledger.release(hold)

    def _covering(self, scope: Scope) -> tuple[str, ...]:
        """Find the budgets that a call in this scope counts against, by name."""
        if len(self._covered) >= SCOPES:
            self._covered.clear()
        names = self._covered[scope] = tuple(budget.name for budget in self._open.budgets if budget.covers(scope))
        return names

    async def _meet(self, ask: Ask) -> Known:
        """Work out what all asks like this one have in common."""
        lined_up = line_up(ask, self._open.registry)
        if ask.kind == "chat":
            await self._usual.read(lined_up)
        counters = lined_up.counter_names(self._counters.of_words)
        known = Known(lined_up, lined_up.covered(ask, self._open.budgets), counters)
        if ask.pictures is None:  # the same images hardly ever come again
            entrants = sum(len(each.entrants) for each in self._lined_up | {lined_up})
            if len(self._known) >= ASKS or (entrants > REMEMBERED and lined_up not in self._lined_up):
                self._known.clear()
                self._lined_up.clear()
            self._known[ask] = known
            self._lined_up.add(lined_up)
        return known


class UsualReplies:
    """How long the models' replies usually are: read once before it is needed, and then behind the requests."""

    REFRESH_SECONDS = 30.0

    def __init__(self, resources: Resources) -> None:
        self._open = resources
        self.tokens: Mapping[str, int] = {}
        """`provider/model` → tokens, as last read.

        Never changed, but replaced: estimates that were made keep what they saw.
        """
        self.middle: int | None = None
        """The median of them; None where nobody has a history."""
        self._models: dict[str, tuple[str, str]] = {}
        self._read: WeakSet[LineUp] = WeakSet()
        self._reading = asyncio.Lock()
        self._refreshed = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    def known(self) -> Mapping[str, int]:
        """Tokens of a usual reply, for those of the models that were read that have a history."""
        if self._open.clock.now() - self._refreshed > self.REFRESH_SECONDS and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        return self.tokens

    async def aclose(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    async def read(self, lined_up: LineUp) -> None:
        """Read those of a line-up's models, for the first time."""
        if lined_up in self._read:
            return
        async with self._reading:
            new = {
                entrant.name: (entrant.model.provider_id, entrant.model.id)
                for entrant in lined_up.entrants
                # What a reply costs nothing for is worth no question.
                if entrant.name not in self._models and entrant.model.price and entrant.model.price.output
            }
            if new:
                self._learn(await self._ask(new))
            if not self._models:
                self._refreshed = self._open.clock.now()
            self._models |= new
            self._read.add(lined_up)

    async def _refresh(self) -> None:
        try:
            tokens = await self._ask(self._models)
            if tokens.items() - self.tokens.items():
                self._learn(tokens)
        except LedgerError as error:
            log.warning("How long replies usually are could not be read again: %s", error)
        finally:
            self._refreshed = self._open.clock.now()
            self._refreshing = None

    def _learn(self, tokens: Mapping[str, int]) -> None:
        self.tokens = {**self.tokens, **tokens}
        self.middle = median_low(self.tokens.values()) if self.tokens else None

    async def _ask(self, models: Mapping[str, tuple[str, str]]) -> dict[str, int]:
        ledger = await self._open.ledger()
        found: dict[str, int] = {}
        for name, (provider, model) in list(models.items()):
            usual = await ledger.usual_output_tokens(provider, model)
            if usual:
                found[name] = usual
        return found


def check_worst_case(resources: Resources, reply: Reply) -> None:
    """Tell of a reply that cost more than was held for it."""
    if reply.cost > reply.worst_case:
        resources.worst_case_passed(reply.provider_id, reply.model_id, reply.cost, reply.worst_case)


def spend_of(outcome: Reply | Embedded | RawEmbedded, *, identity: str, at: datetime) -> Spend:
    """What a call cost, as the ledger records it: under one identity once, as `Spend.id` says."""
    return Spend(
        id=identity,
        scope=outcome.charged_to,
        cost=outcome.cost,
        estimated=outcome.estimated_cost,
        usage=outcome.usage,
        at=at,
        replies=outcome.replies if isinstance(outcome, Reply) else 1,
    )


def cost_of(usage: Usage, model: Model) -> Decimal:
    """Dollars for what a model was used for."""
    if model.price is None:
        raise ValueError(f"{model.name!r} was called though its price is unknown")
    return cost(usage, model.price)


def with_images(usage: Usage, images: int, model: Model) -> Usage:
    """Usage with the images that are priced apart: no provider says how many it was sent."""
    if model.price is None or not model.price.per_image or not images:
        return usage
    return replace(usage, images=images)
