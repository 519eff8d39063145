"""Asking providers for the vectors of texts, in as many calls as they take."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, cast

import orjson

from sekha.calling import FULL, kept_back
from sekha.embedding import Embedded, EmbedRequest, RawEmbedded
from sekha.errors import FieldUnsupported, ProviderError, RateLimited
from sekha.ledger import Hold
from sekha.pricing import Usage
from sekha.providers.base import ByteProvider, Embeddings, Provider, RawEmbeddings
from sekha.registry import Model, ProviderKind
from sekha.resources import Resources
from sekha.routing import Candidate, Plan
from sekha.steps.asking import Asking, Sent, worst_of
from sekha.steps.counting import count_embedding
from sekha.steps.losses import Losses
from sekha.steps.money import cost_of, spend_of
from sekha.steps.parts import only_theirs, texts_per_call
from sekha.vectors.base import Vector

if TYPE_CHECKING:
    from sekha.ingest import Batch, BatchEmbedded
    from sekha.providers.relay import RelayProvider

__all__ = ["EmbedCalls"]

log = logging.getLogger("sekha.calls")

CALLS_AT_ONCE = 4
_ROOM_SECONDS = 300.0
"""What part of a request waits no longer for room: a minute brings some, but others want it too. A hold outlasts it."""
_LOOKS_EVERY_SECONDS = 1.0
"""So soon a part that waits for room hears that another one failed."""

_OPENAI_COMPATIBLE: frozenset[ProviderKind] = frozenset({"openai", "openrouter"})


class EmbedCalls(Asking):
    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self._queues: dict[frozenset[str], asyncio.Lock] = {}
        """Who waits for room at the same providers goes one after another, or the last might never have its turn."""

    async def embed_texts(self, request: EmbedRequest, chosen: Plan, hold: Hold) -> Embedded:
        """Embed the texts at the first candidate that answers, and charge each call as it comes back."""
        return await self._embed(request.texts, chosen, hold, "")

    async def embed_raw(self, request: EmbedRequest, chosen: Plan, hold: Hold, sent: Sent | None = None) -> RawEmbedded:
        """Embed the texts, and leave the vectors in the bytes in which a provider wrote them where that can be."""
        # What was sent was all of it, and what only a provider can heed goes to it in one piece.
        whole = sent is not None or any(only_theirs(request, each.model) for each in chosen.candidates)
        if not whole and len(request.texts) > self._texts_per_call(chosen):
            embedded = await self._embed(request.texts, chosen, hold, "", request.options.get("dimensions"))
            return _raw_of(embedded, await _written(request, embedded.vectors, embedded.model_id, embedded.usage))
        lost = Losses(self._open, chosen, hold, hold.id)
        texts = request.texts
        body = {"input": texts[0] if len(texts) == 1 else texts, **request.options}
        begun = [] if sent is None else [sent.begun]

        def once(candidate: Candidate, seconds: float) -> Awaitable[RawEmbeddings | Embeddings]:
            model = candidate.model
            spec, provider = self._open.registry.provider_of(model), self._open.provider(model.provider_id)
            timeout_seconds = min(spec.timeout_seconds, seconds)
            if begun:
                waited_for = cast("RelayProvider", provider).embed_begun
                return lost.attempt(candidate, worst_of, waited_for, model, body, begun.pop())
            if spec.kind in _OPENAI_COMPATIBLE:
                raw = cast("ByteProvider", provider).embed_raw
                return lost.attempt(candidate, worst_of, raw, model, body, timeout_seconds=timeout_seconds)
            return lost.attempt(
                candidate, worst_of, _embed_elsewhere, provider, request, model, timeout_seconds=timeout_seconds
            )

        try:
            answered = await self._in_turn(chosen, once, lost.affords, sent=sent)
            model, answer = answered.candidate.model, answered.value
            usage = answer.usage
            if usage is None:
                usage = Usage(input_tokens=answered.candidate.estimate.input_tokens, counted=True)
            raw_embedded = RawEmbedded(
                raw=answer.raw if isinstance(answer, RawEmbeddings) else b"",
                dimension=answer.dimension,
                provider_id=model.provider_id,
                model_id=model.id,
                usage=usage,
                estimated_cost=answered.candidate.estimate.expected,
                cost=cost_of(usage, model),
                attempts=answered.attempts,
                reason=answered.candidate.reason,
                charged_to=chosen.ask.scope(model),
                lost_cost=lost.cost,
            )
            if raw_embedded.cost > (worst := answered.candidate.estimate.worst_case):
                self._open.worst_case_passed(model.provider_id, model.id, raw_embedded.cost, worst)
            await self._charge(hold, spend_of(raw_embedded, identity=f"{hold.id}:0", at=self._open.now()))
        finally:
            await lost.free()
        if isinstance(answer, RawEmbeddings):
            return raw_embedded
        return replace(raw_embedded, raw=await _written(request, answer.vectors, model.id, usage))

    async def embed_batch(self, batch: Batch, chosen: Plan, hold: Hold) -> BatchEmbedded:
        """Embed one batch of an ingest, and charge it at once: a run that dies later has recorded it."""
        from sekha.ingest import BatchEmbedded

        prefix = chosen.first.model.document_prefix
        texts = tuple(prefix + chunk.text for chunk in batch.chunks)
        embedded = await self._embed(texts, chosen, hold, f"{batch.number}.")
        return BatchEmbedded(
            batch=batch,
            vectors=embedded.vectors,
            usage=embedded.usage,
            cost=embedded.cost,
            provider_id=embedded.provider_id,
            model_id=embedded.model_id,
        )

    async def _embed(
        self, texts: Sequence[str], chosen: Plan, hold: Hold, part: str, dimensions: int | None = None
    ) -> Embedded:
        """`dimensions` are the ones that the file declares, and go to those whose protocol has them."""
        size = self._texts_per_call(chosen)
        limit = asyncio.Semaphore(CALLS_AT_ONCE)

        failures: list[ProviderError] = []
        losses: list[Decimal] = []

        async def call(number: int, some: Sequence[str]) -> Embedded | None:
            identity = f"{hold.id}:{part}{number}"
            async with limit:
                if failures:
                    return None
                lost = Losses(self._open, chosen, hold, identity, losses)
                try:
                    embedded = await self._embed_with_room(some, chosen, lost, dimensions, failures)
                    if embedded is not None:
                        await self._charge(hold, spend_of(embedded, identity=identity, at=self._open.now()))
                except ProviderError as error:
                    # The calls under way are let finish: they are paid for, and their cost has to be known.
                    failures.append(error)
                    return None
                finally:
                    await lost.free()
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
            vectors=_joined([each.vectors for each in done]),
            usage=sum((each.usage for each in done), Usage()),
            estimated_cost=sum((each.estimated_cost for each in done), Decimal(0)),
            cost=sum((each.cost for each in done), Decimal(0)),
            lost_cost=sum((each.lost_cost for each in done), Decimal(0)),
            attempts=tuple(attempt for each in done for attempt in each.attempts),
        )

    def _texts_per_call(self, chosen: Plan) -> int:
        """As many as each of those takes who may be asked."""
        return min(texts_per_call(self._open.registry.provider_of(each.model).kind) for each in chosen.candidates)

    async def _sized(self, texts: Sequence[str], chosen: Plan, counted: dict[str, int]) -> Plan:
        """The plan for these texts alone, which are a part of all that are embedded under it."""
        own: list[Candidate] = []
        for each in chosen.candidates:
            tokens = await _count_once(texts, each.model, counted)
            own.append(each._replace(estimate=each.estimate._replace(input_tokens=tokens)))
        return replace(chosen, candidates=tuple(own))

    async def _embed_with_room(
        self,
        texts: Sequence[str],
        chosen: Plan,
        lost: Losses,
        dimensions: int | None,
        failures: Sequence[ProviderError],
    ) -> Embedded | None:
        """Embed them once a provider's limits have room for them; None where something failed meanwhile.

        Waiting is no part of the time that the call may take: a minute may be longer than all of it.
        """
        counted: dict[str, int] = {}
        if not self._open.rates:
            return await self._embed_once(texts, chosen, lost, dimensions, counted)
        chosen = await self._sized(texts, chosen, counted)
        wanted: Sequence[Candidate] = chosen.candidates
        until = math.inf
        while True:
            queue = self._queues.setdefault(frozenset(each.model.provider_id for each in wanted), asyncio.Lock())
            async with queue:
                until = min(until, self._open.clock.now() + _ROOM_SECONDS)
                if not await self._found_room(wanted, until, failures):
                    return None
            try:
                return await self._embed_once(texts, chosen, lost, dimensions, counted)
            except RateLimited as error:
                # Whoever had room may have failed, or another request was quicker; then it is this one's that counts.
                wanted = [each for each in wanted if each.model.provider_id == error.provider_id and self._wait(each)]
                if not wanted:
                    raise

    async def _found_room(self, wanted: Sequence[Candidate], until: float, failures: Sequence[ProviderError]) -> bool:
        """Wait until the limits of one of these let it be called, which is done before anybody else looks.

        False as soon as something else failed. Raises `RateLimited` where there will be no room in time.
        """
        clock, first = self._open.clock, wanted[0].model
        told = False
        while not failures:
            wait = min(map(self._wait, wanted))
            if wait <= 0:
                return True
            if clock.now() + wait > until:
                raise kept_back(first, FULL, wait)
            if not told:
                log.info("waiting %.1f s for room in the limits of %s", wait, first.provider_id)
                told = True
            await clock.sleep(min(wait, _LOOKS_EVERY_SECONDS))
        return False

    def _wait(self, candidate: Candidate) -> float:
        return self._open.rates.wait(candidate.model.provider_id, candidate.estimate.input_tokens)

    async def _embed_once(
        self, texts: Sequence[str], chosen: Plan, lost: Losses, dimensions: int | None, counted: dict[str, int]
    ) -> Embedded:
        def tokens(model: Model) -> Awaitable[int]:
            """Of these texts alone, since the plan's estimate may be for all that are embedded under it."""
            return _count_once(texts, model, counted)

        async def at_worst(candidate: Candidate) -> tuple[Usage, Decimal]:
            usage = Usage(input_tokens=await tokens(candidate.model), counted=True)
            return usage, cost_of(usage, candidate.model)

        async def once(candidate: Candidate, seconds: float) -> Embeddings:
            model = candidate.model
            if not (model.price and model.price.is_free):
                await tokens(model)  # before it is paid for: who leaves while they are counted would not be charged
            spec, provider = self._open.registry.provider_of(model), self._open.provider(model.provider_id)
            timeout_seconds = min(spec.timeout_seconds, seconds)
            embed = provider.embed
            if dimensions is not None and spec.kind in _OPENAI_COMPATIBLE:
                embed = partial(cast("ByteProvider", provider).embed, dimensions=dimensions)
            return await lost.attempt(candidate, at_worst, embed, model, texts, timeout_seconds=timeout_seconds)

        answered = await self._in_turn(chosen, once, lost.affords, planned=False)
        model, embeddings = answered.candidate.model, answered.value
        usage, expected = embeddings.usage, Decimal(0)
        if usage is None or not (model.price and model.price.is_free):
            estimated = Usage(input_tokens=await tokens(model), counted=True)
            usage, expected = usage or estimated, cost_of(estimated, model)
        return Embedded(
            vectors=embeddings.vectors,
            provider_id=model.provider_id,
            model_id=model.id,
            usage=usage,
            estimated_cost=expected,
            cost=cost_of(usage, model),
            attempts=answered.attempts,
            charged_to=chosen.ask.scope(model),
            lost_cost=lost.cost,
        )


def _placeless(field: str, model: Model) -> FieldUnsupported:
    known = field == "dimensions"
    lacks = f"its protocol has no `{field[:40]}`" + (f", and its vectors have {model.dimension}" if known else "")
    # A caller names fields freely, and what he writes is not for the records.
    error = FieldUnsupported(
        lacks if known else "", said="" if known else lacks, provider_id=model.provider_id, model_id=model.id
    )
    error.field = field
    return error


async def _count_once(texts: Sequence[str], model: Model, counted: dict[str, int]) -> int:
    """Tokens of these texts, kept in `counted` by model id."""
    if model.id not in counted:
        counted[model.id], _ = await count_embedding(texts, model.id)
    return counted[model.id]


async def _embed_elsewhere(
    provider: Provider, request: EmbedRequest, model: Model, *, timeout_seconds: float
) -> Embeddings:
    """Embed by another protocol than OpenAI's, which has a place for texts and for nothing else."""
    if (field := only_theirs(request, model)) is not None:
        raise _placeless(field, model)
    return await provider.embed(model, request.texts, timeout_seconds=timeout_seconds)


def _raw_of(embedded: Embedded, raw: bytes) -> RawEmbedded:
    return RawEmbedded(
        raw=raw,
        dimension=embedded.dimension,
        provider_id=embedded.provider_id,
        model_id=embedded.model_id,
        usage=embedded.usage,
        estimated_cost=embedded.estimated_cost,
        cost=embedded.cost,
        attempts=embedded.attempts,
        reason="",
        charged_to=embedded.charged_to,
        lost_cost=embedded.lost_cost,
    )


async def _written(request: EmbedRequest, vectors: Vector, model_id: str, usage: Usage) -> bytes:
    """Vectors that came as numbers, in OpenAI's JSON."""
    packed = request.options.get("encoding_format") == "base64"
    return await asyncio.to_thread(_as_openai_writes, vectors, model_id, usage.input_tokens, packed=packed)


def _as_openai_writes(vectors: Vector, model_id: str, tokens: int, *, packed: bool) -> bytes:
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(row) if packed else row}
        for index, row in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": model_id, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _joined(vectors: Sequence[Vector]) -> Vector:
    import numpy as np

    return np.concatenate(vectors)


def _packed(row: Vector) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
