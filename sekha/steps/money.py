"""What it may cost, who may be asked, what is held and what was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal

from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest
from sekha.ledger import Hold, Spend, remaining
from sekha.pricing import Estimate, estimate_chat, estimate_embedding
from sekha.registry import Model
from sekha.resources import Resources
from sekha.routing import Ask, Estimates, Plan, cap, considered, plan
from sekha.steps.counting import count_chat, count_embedding, counts_exactly

__all__ = ["HOLD_SECONDS", "Money", "spend_of"]

HOLD_SECONDS = 900.0
"""A hold lasts this long, or twice as long as a call may take: only a process that died leaves one to expire."""


class Money:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def estimate_cost(self, request: ChatRequest | EmbedRequest) -> Estimates:
        """Count the request's tokens and price it at every model that it may mean."""
        ask = self._ask(request)
        models = considered(ask, self._open.registry)
        left = await self._remaining(ask, models)
        by_model: dict[str, Estimate | None] = {}
        for model in models:
            if isinstance(request, ChatRequest):
                by_model[model.name] = await self._chat_estimate(request, ask, model, left)
            else:
                by_model[model.name] = await self._embedding_estimate(request, model)
        return Estimates(by_model=by_model, remaining=left)

    async def select_provider(self, request: ChatRequest | EmbedRequest, estimates: Estimates) -> Plan:
        """Choose who is asked, in which order, and note why the others are not."""
        ask, rules, budgets = self._ask(request), self._open.rules, self._open.budgets
        return plan(ask, self._open.registry, estimates, rules=rules, budgets=budgets)

    async def reserve_budget(self, chosen: Plan) -> Hold:
        """Hold the worst case against every budget that the calls may count against."""
        amounts = chosen.holds(self._open.budgets)
        budgets = [budget for budget in self._open.budgets if budget.name in amounts]
        lasts = max(HOLD_SECONDS, 2 * self._open.patience_seconds(chosen))
        ledger = await self._open.ledger()
        return await ledger.reserve(budgets, amounts, at=self._open.now(), ttl_seconds=lasts)

    async def settle_cost(self, hold: Hold, outcome: Reply | Embedded | None) -> None:
        """Record what the call cost, and free what is left of the hold."""
        ledger = await self._open.ledger()
        if isinstance(outcome, Reply):
            await ledger.settle(hold, spend_of(outcome, identity=hold.id, at=self._open.now()))
        else:
            # Embeddings were charged call by call, so that one that fails late hides nothing.
            await ledger.release(hold)

    async def _embedding_estimate(self, request: EmbedRequest, model: Model) -> Estimate | None:
        if model.price is None:
            return None
        total, longest = await count_embedding(request.texts, model.id)
        exact = counts_exactly(model)
        return estimate_embedding(model.price, input_tokens=total, longest=longest, exact=exact)

    def _ask(self, request: ChatRequest | EmbedRequest) -> Ask:
        if isinstance(request, ChatRequest):
            return request.ask(images_need_vision=self._open.loaded.config.routing.require_vision_for_images)
        return request.ask()

    async def _remaining(self, ask: Ask, models: Sequence[Model]) -> dict[str, Decimal]:
        """What is left now in the budgets that any of the models would count against."""
        scopes = [ask.scope(model) for model in models]
        at = self._open.now()
        left: dict[str, Decimal] = {}
        for budget in self._open.budgets:
            if any(budget.covers(scope) for scope in scopes):
                spent, held = await (await self._open.ledger()).spent(budget, at=at)
                left[budget.name] = remaining(budget, spent, held)
        return left

    async def _chat_estimate(
        self, request: ChatRequest, ask: Ask, model: Model, left: Mapping[str, Decimal]
    ) -> Estimate | None:
        if model.price is None:
            return None
        if ask.priced_apart is not None and model.price.source == "price map" and not model.price.is_free:
            return None  # the map's price is another one, which would record too little
        counted = await count_chat(request, model.id)
        usual = None
        if model.price.output:
            usual = await (await self._open.ledger()).usual_output_tokens(model.provider_id, model.id)
        scope = ask.scope(model)
        caps = [left[budget.name] for budget in self._open.budgets if budget.name in left and budget.covers(scope)]
        most, _ = cap(ask, self._open.rules)
        return estimate_chat(
            model.price,
            input_tokens=counted,
            images=request.image_count,
            replies=request.replies,
            requested=request.reply_limit,
            model_limit=model.max_output_tokens,
            usual=usual,
            cap=min([*caps, most] if most is not None else caps, default=None),
            context_window=model.context_window,
            exact=counts_exactly(model),
            writes_cache=request.writes_cache,
        )


def spend_of(outcome: Reply | Embedded, *, identity: str, at: datetime) -> Spend:
    """What a call cost, as the ledger records it; once, however often under the same identity."""
    return Spend(
        id=identity,
        scope=outcome.charged_to,
        cost=outcome.cost,
        estimated=outcome.estimated_cost,
        usage=outcome.usage,
        at=at,
    )
