"""Asking providers: one answer, or vectors for many texts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TypeVar

import numpy as np

from sekha.calling import Answered, call_in_turn
from sekha.chat import REPLY_LIMITS, ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import DimensionMismatch, ProviderError
from sekha.ingest import Batch, BatchEmbedded
from sekha.ledger import Hold, Spend
from sekha.pricing import Usage, cost
from sekha.providers.base import ChatCall, Completion, Embeddings
from sekha.registry import Model, ProviderKind
from sekha.resources import Resources
from sekha.routing import Candidate, Plan
from sekha.settling import to_the_end
from sekha.steps.counting import count_chat, count_embedding, count_reply
from sekha.steps.money import spend_of

__all__ = ["Calls"]

T = TypeVar("T")

TEXTS_PER_CALL: Mapping[ProviderKind, int] = {"builtin": 4096, "openai": 512, "ollama": 128, "openrouter": 96}
"""Texts sent to a provider at once. Others may reach any API through LiteLLM, so they get the least, 96."""
CALLS_AT_ONCE = 4


class Calls:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def call_provider(self, request: ChatRequest, chosen: Plan, hold: Hold) -> Reply:  # noqa: ARG002 - held first
        """Ask the candidates in turn, with retries, until one answers."""

        async def once(candidate: Candidate, seconds: float) -> Completion:
            spec = self._open.registry.provider_of(candidate.model)
            options = {name: value for name, value in request.options.items() if name not in REPLY_LIMITS}
            if limit := request.reply_limit or candidate.estimate.reply_limit:
                options["max_tokens"] = limit
            call = ChatCall(
                model=candidate.model,
                messages=request.messages,
                options=options,
                timeout_seconds=min(spec.timeout_seconds, seconds),
            )
            return await self._open.provider(candidate.model.provider_id).complete(call)

        answered = await self._in_turn(chosen, once)
        model, completion = answered.candidate.model, answered.value
        usage = completion.usage or await self._counted_usage(request, completion, model)
        return Reply(
            text=completion.text,
            body=completion.body,
            provider_id=model.provider_id,
            model_id=model.id,
            usage=usage,
            estimated_cost=answered.candidate.estimate.expected,
            cost=_cost(usage, model),
            attempts=answered.attempts,
            reason=answered.candidate.reason,
            charged_to=chosen.ask.scope(model),
        )

    async def embed_texts(self, request: EmbedRequest, chosen: Plan, hold: Hold) -> Embedded:
        """Embed the texts at the first candidate that answers, and charge each call as it comes back."""
        return await self._embed(request.texts, chosen, hold, "")

    async def embed_batch(self, batch: Batch, chosen: Plan, hold: Hold) -> BatchEmbedded:
        """Embed one batch of an ingest, and charge it at once: a run that dies later has recorded it."""
        texts = tuple(chunk.text for chunk in batch.chunks)
        embedded = await self._embed(texts, chosen, hold, f"{batch.number}.")
        return BatchEmbedded(
            batch=batch,
            vectors=embedded.vectors,
            usage=embedded.usage,
            cost=embedded.cost,
            provider_id=embedded.provider_id,
            model_id=embedded.model_id,
        )

    async def _embed(self, texts: Sequence[str], chosen: Plan, hold: Hold, part: str) -> Embedded:
        size = min(TEXTS_PER_CALL.get(self._open.registry.provider_of(c.model).kind, 96) for c in chosen.candidates)
        limit = asyncio.Semaphore(CALLS_AT_ONCE)

        failures: list[ProviderError] = []

        async def call(number: int, some: Sequence[str]) -> Embedded | None:
            identity = f"{hold.id}:{part}{number}"
            async with limit:
                if failures:
                    return None
                try:
                    embedded = await self._embed_once(some, chosen)
                except ProviderError as error:
                    # The calls under way are let finish: they are paid for, and their cost has to be known.
                    failures.append(error)
                    if isinstance(error, DimensionMismatch):
                        await self._charge(hold, await self._unusable(error, some, chosen, identity))
                    return None
                await self._charge(hold, spend_of(embedded, identity=identity, at=self._open.now()))
                return embedded

        parts = [texts[at : at + size] for at in range(0, len(texts), size)]
        calls = [asyncio.create_task(call(number, some)) for number, some in enumerate(parts)]
        try:
            done = [embedded for embedded in await asyncio.gather(*calls) if embedded is not None]
        except BaseException:
            for each in calls:
                each.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            raise
        if failures:
            raise failures[0]
        if len(done) == 1:
            return done[0]
        return replace(
            done[0],
            vectors=np.concatenate([each.vectors for each in done]),
            usage=sum((each.usage for each in done), Usage()),
            estimated_cost=sum((each.estimated_cost for each in done), Decimal(0)),
            cost=sum((each.cost for each in done), Decimal(0)),
            attempts=tuple(attempt for each in done for attempt in each.attempts),
        )

    async def _charge(self, hold: Hold, spend: Spend) -> None:
        ledger = await self._open.ledger()
        await to_the_end(ledger.charge(hold, spend))

    async def _unusable(self, error: DimensionMismatch, texts: Sequence[str], chosen: Plan, identity: str) -> Spend:
        """What a provider takes for vectors that it made and that nobody can use."""
        model = next(each.model for each in chosen.candidates if each.model.provider_id == error.provider_id)
        total, _ = await count_embedding(texts, model.id)
        usage = Usage(input_tokens=total, counted=True)
        spent = _cost(usage, model)
        scope = chosen.ask.scope(model)
        return Spend(id=identity, scope=scope, cost=spent, estimated=spent, usage=usage, at=self._open.now())

    async def _in_turn(self, chosen: Plan, once: Callable[[Candidate, float], Awaitable[T]]) -> Answered[T]:
        return await call_in_turn(
            chosen.candidates,
            once,
            retries=self._open.retries,
            clock=self._open.clock,
            deadline_seconds=self._open.patience_seconds(chosen),
        )

    async def _embed_once(self, texts: Sequence[str], chosen: Plan) -> Embedded:
        async def once(candidate: Candidate, seconds: float) -> Embeddings:
            spec = self._open.registry.provider_of(candidate.model)
            provider = self._open.provider(candidate.model.provider_id)
            return await provider.embed(candidate.model, texts, timeout_seconds=min(spec.timeout_seconds, seconds))

        answered = await self._in_turn(chosen, once)
        model, embeddings = answered.candidate.model, answered.value
        usage, expected = embeddings.usage, Decimal(0)
        if usage is None or not (model.price and model.price.is_free):
            total, _ = await to_the_end(count_embedding(texts, model.id))
            counted = Usage(input_tokens=total, counted=True)
            usage, expected = usage or counted, _cost(counted, model)
        return Embedded(
            vectors=embeddings.vectors,
            provider_id=model.provider_id,
            model_id=model.id,
            usage=usage,
            # Of these texts alone: the plan's estimate is for all that are embedded under it.
            estimated_cost=expected,
            cost=_cost(usage, model),
            attempts=answered.attempts,
            charged_to=chosen.ask.scope(model),
        )

    async def _counted_usage(self, request: ChatRequest, completion: Completion, model: Model) -> Usage:
        """What was used, counted by us because the provider did not say."""
        went_in = await count_chat(request, model.id)
        came_out = await count_reply(completion.body, model.id)
        return Usage(input_tokens=went_in, output_tokens=came_out, images=request.image_count, counted=True)


def _cost(usage: Usage, model: Model) -> Decimal:
    if model.price is None:
        raise ValueError(f"{model.name!r} was called though its price is unknown")
    return cost(usage, model.price)
