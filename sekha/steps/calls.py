"""Asking providers: one answer, or vectors for many texts."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import orjson

from sekha.bill import note_asked, note_attempt, note_charged
from sekha.calling import CANCELLED, Answered, call_in_turn
from sekha.chat import ChatRequest, Opened, Piped, Reply, with_reply_limit
from sekha.embedding import Embedded, EmbedRequest, RawEmbedded
from sekha.errors import FieldUnsupported, NotLoaded, ProviderError, RateLimited
from sekha.ledger import Hold, Spend
from sekha.pricing import Usage
from sekha.providers.base import ByteProvider, ChatCall, Completion, Embeddings, Provider, RawEmbeddings, RawStream
from sekha.providers.chunks import ChunkStream
from sekha.rates import Taken
from sekha.registry import Model, ProviderKind
from sekha.resources import Resources
from sekha.routing import Candidate, Plan
from sekha.settling import to_the_end
from sekha.steps.counting import count_chat, count_embedding, count_reply
from sekha.steps.losses import Losses
from sekha.steps.money import check_worst_case, cost_of, spend_of, with_images
from sekha.steps.parts import only_theirs, texts_per_call
from sekha.steps.waits import unless_others_may
from sekha.vectors.base import Vector

if TYPE_CHECKING:
    from sekha.ingest import Batch, BatchEmbedded
    from sekha.providers.relay import Begun, RelayProvider

__all__ = ["Calls", "Sent", "SentSteps"]

T = TypeVar("T")
log = logging.getLogger("sekha.calls")

CALLS_AT_ONCE = 4
_ROOM_SECONDS = 300.0
"""What part of a request waits no longer for room: a minute brings some, but others want it too. A hold outlasts it."""

_OPENAI_COMPATIBLE: frozenset[ProviderKind] = frozenset({"openai", "openrouter"})


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


class Calls:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def call_provider(self, request: ChatRequest, chosen: Plan, hold: Hold, sent: Sent | None = None) -> Reply:
        """Ask the candidates in turn, with retries, until one answers."""
        lost = Losses(self._open, chosen, hold, hold.id)
        begun = [] if sent is None else [sent.begun]

        def once(candidate: Candidate, seconds: float) -> Awaitable[Completion]:
            provider = self._open.provider(candidate.model.provider_id)
            call = self._call(request, candidate, seconds)
            if begun:
                return lost.attempt(candidate, _worst_of, cast("RelayProvider", provider).complete, call, begun.pop())
            return lost.attempt(candidate, _worst_of, provider.complete, call)

        try:
            answered = await self._in_turn(chosen, once, lost.affords, sent=sent)
            completion, candidate, attempts, _ = answered
            model = candidate.model
            usage = completion.usage or await self._counted_usage(request, completion, model)
            usage = _in_tier(with_images(usage, request.image_count, model), request)
            reply = Reply(
                text=completion.text,
                body=completion.body,
                raw=completion.raw,
                provider_id=model.provider_id,
                model_id=model.id,
                usage=usage,
                estimated_cost=candidate.estimate.expected,
                worst_case=candidate.estimate.worst_case,
                cost=cost_of(usage, model),
                attempts=attempts,
                reason=candidate.reason,
                charged_to=chosen.ask.scope(model),
                lost_cost=lost.cost,
                replies=request.replies,
            )
            await lost.charge(reply)
        except BaseException:
            await lost.free()
            raise
        return reply

    async def open_stream(self, request: ChatRequest, chosen: Plan, hold: Hold, sent: Sent | None = None) -> Opened:
        """Ask the candidates in turn until the first piece of an answer arrives."""
        lost = Losses(self._open, chosen, hold, hold.id)
        begun = [] if sent is None else [sent.begun]

        def once(candidate: Candidate, seconds: float) -> Awaitable[RawStream]:
            provider = self._open.provider(candidate.model.provider_id)
            call = self._call(request, candidate, seconds)
            if begun:
                relay = cast("RelayProvider", provider)
                return lost.attempt(candidate, _worst_of, relay.open_stream, call, begun.pop())
            if hasattr(provider, "open_stream"):
                return lost.attempt(candidate, _worst_of, cast("ByteProvider", provider).open_stream, call)
            return lost.attempt(candidate, _worst_of, ChunkStream.open, provider, call)

        taken: dict[str, Taken] = {}
        try:
            answered = await self._in_turn(chosen, once, lost.affords, whole=False, sent=sent, taken=taken)
        except BaseException:
            await lost.free()
            raise
        return Opened(
            events=answered.value,
            candidate=answered.candidate,
            attempts=answered.attempts,
            probe=answered.probe,
            began_at=self._open.clock.now() - answered.attempts[-1].seconds,
            charge=lost.charge,
            lost_cost=lost.cost,
            taken=taken.get(answered.candidate.model.provider_id),
        )

    async def relay_stream(self, request: ChatRequest, chosen: Plan, hold: Hold, opened: Opened, pipe: Piped) -> Reply:
        """Hand the pieces on as they come. However it ends, what arrived is on record."""
        events = opened.events
        note_asked(opened.candidate.model)
        try:
            await pipe.begin(opened)
            async for block in events:
                await pipe.write(block)
        except BaseException as error:
            await to_the_end(self._charge_part(request, chosen, hold, opened, error))
            raise
        finally:
            await events.aclose()
        if self._open.circuits is not None:
            self._open.circuits.note(opened.candidate.model.name, None, probe=opened.probe)
        note_attempt(opened.attempts[-1])
        reply = await self._streamed(request, chosen, opened)
        self._correct(opened.candidate, opened.taken, reply.usage)
        await opened.charge(reply)
        return reply

    async def _charge_part(
        self, request: ChatRequest, chosen: Plan, hold: Hold, opened: Opened, error: BaseException
    ) -> None:
        """Charge what had arrived when a stream broke off or its reader left."""
        # Until it broke off, and not until it began.
        seconds = self._open.clock.now() - opened.began_at
        last = replace(opened.attempts[-1], seconds=seconds, error=CANCELLED)
        if isinstance(error, ProviderError):
            last = replace(last, error=error.code, detail=error.detail)
            error.attempts = (*opened.attempts[:-1], last)
            if self._open.circuits is not None:
                self._open.circuits.note(opened.candidate.model.name, error, probe=opened.probe)
        note_attempt(last)
        await opened.events.aclose()
        part = await self._streamed(request, chosen, opened)
        self._correct(opened.candidate, opened.taken, part.usage)
        check_worst_case(self._open, part)
        await self._charge(hold, spend_of(part, identity=hold.id, at=self._open.now()))
        await opened.charge(part)

    async def _streamed(self, request: ChatRequest, chosen: Plan, opened: Opened) -> Reply:
        model = opened.candidate.model
        usage = opened.events.usage
        if usage is None:
            went_in = opened.events.went_in or Usage(input_tokens=await _went_in(request, model))
            came_out, _ = await count_embedding([opened.events.said()], model.id)
            usage = replace(went_in, output_tokens=max(came_out, went_in.output_tokens), counted=True)
        usage = _in_tier(with_images(usage, request.image_count, model), request)
        return Reply(
            text="",
            body={},
            provider_id=model.provider_id,
            model_id=model.id,
            usage=usage,
            estimated_cost=opened.candidate.estimate.expected,
            worst_case=opened.candidate.estimate.worst_case,
            cost=cost_of(usage, model),
            attempts=opened.attempts,
            reason=opened.candidate.reason,
            charged_to=chosen.ask.scope(model),
            lost_cost=opened.lost_cost,
            replies=request.replies,
        )

    def _call(self, request: ChatRequest, candidate: Candidate, seconds: float) -> ChatCall:
        model, estimate, _ = candidate
        longest = self._open.registry.provider_of(model).timeout_seconds
        return ChatCall(
            model=model,
            messages=request.messages,
            options=with_reply_limit(request.options, request.reply_limit or estimate.reply_limit),
            timeout_seconds=seconds if seconds < longest else longest,
        )

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
                return lost.attempt(candidate, _worst_of, waited_for, model, body, begun.pop())
            if spec.kind in _OPENAI_COMPATIBLE:
                raw = cast("ByteProvider", provider).embed_raw
                return lost.attempt(candidate, _worst_of, raw, model, body, timeout_seconds=timeout_seconds)
            return lost.attempt(
                candidate, _worst_of, _embed_elsewhere, provider, request, model, timeout_seconds=timeout_seconds
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
        limit, room = asyncio.Semaphore(CALLS_AT_ONCE), asyncio.Lock()

        failures: list[ProviderError] = []
        losses: list[Decimal] = []

        async def call(number: int, some: Sequence[str]) -> Embedded | None:
            identity = f"{hold.id}:{part}{number}"
            async with limit:
                if failures:
                    return None
                lost = Losses(self._open, chosen, hold, identity, losses)
                try:
                    own, counted = chosen, dict[str, int]()
                    if self._open.rates:
                        own = await self._sized(some, chosen, counted)
                        async with room:  # one after another, or the last might never have its turn
                            await self._wait_for_room(own)
                        if failures:
                            return None
                    embedded = await self._embed_once(some, own, lost, dimensions, counted)
                except ProviderError as error:
                    # The calls under way are let finish: they are paid for, and their cost has to be known.
                    failures.append(error)
                    return None
                finally:
                    await lost.free()
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

    async def _charge(self, hold: Hold, spend: Spend) -> None:
        ledger = await self._open.ledger()
        note_charged(spend)
        await to_the_end(ledger.charge(hold, spend))

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

    async def _sized(self, texts: Sequence[str], chosen: Plan, counted: dict[str, int]) -> Plan:
        """The plan for these texts alone, which are a part of all that are embedded under it."""
        own: list[Candidate] = []
        for each in chosen.candidates:
            tokens = await _count_once(texts, each.model, counted)
            own.append(each._replace(estimate=each.estimate._replace(input_tokens=tokens)))
        return replace(chosen, candidates=tuple(own))

    async def _wait_for_room(self, chosen: Plan) -> None:
        """Wait until the limits of somebody's provider let the next call pass. Whoever goes on at once has that room.

        That is no part of the time that the call may take: a minute may be longer than all of it.
        """
        rates, clock = self._open.rates, self._open.clock
        until = clock.now() + _ROOM_SECONDS

        def seconds() -> float:
            return min(rates.wait(model.provider_id, estimate.input_tokens) for model, estimate, _ in chosen.candidates)

        while (wait := seconds()) > 0:
            first = chosen.first.model
            if clock.now() + wait > until:
                raise RateLimited(
                    "its `limits:` are reached",
                    provider_id=first.provider_id,
                    model_id=first.id,
                    retry_after_seconds=None if wait == math.inf else wait,
                )
            log.info("waiting %.1f s for room in the limits of %s", wait, first.provider_id)
            await clock.sleep(wait)

    async def _embed_once(
        self, texts: Sequence[str], chosen: Plan, lost: Losses, dimensions: int | None, counted: dict[str, int]
    ) -> Embedded:
        def tokens(model: Model) -> Awaitable[int]:
            """Of these texts alone, since the plan's estimate may be for all that are embedded under it."""
            return _count_once(texts, model, counted)

        async def at_worst(candidate: Candidate) -> tuple[Usage, Decimal]:
            usage = Usage(input_tokens=await tokens(candidate.model), counted=True)
            return usage, cost_of(usage, candidate.model)

        def once(candidate: Candidate, seconds: float) -> Awaitable[Embeddings]:
            model = candidate.model
            spec, provider = self._open.registry.provider_of(model), self._open.provider(model.provider_id)
            timeout_seconds = min(spec.timeout_seconds, seconds)
            embed = provider.embed
            if dimensions is not None and spec.kind in _OPENAI_COMPATIBLE:
                embed = partial(cast("ByteProvider", provider).embed, dimensions=dimensions)
            return lost.attempt(candidate, at_worst, embed, model, texts, timeout_seconds=timeout_seconds)

        answered = await self._in_turn(chosen, once, lost.affords, planned=False)
        model, embeddings = answered.candidate.model, answered.value
        usage, expected = embeddings.usage, Decimal(0)
        if usage is None or not (model.price and model.price.is_free):
            estimated = Usage(input_tokens=await to_the_end(tokens(model)), counted=True)
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

    async def _counted_usage(self, request: ChatRequest, completion: Completion, model: Model) -> Usage:
        """What was used, counted by us because the provider did not say."""
        went_in = await _went_in(request, model)
        came_out = await count_reply(completion.body, model.id)
        return Usage(input_tokens=went_in, output_tokens=came_out, counted=True)


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


async def _worst_of(candidate: Candidate) -> tuple[Usage, Decimal]:
    estimate = candidate.estimate
    return Usage(input_tokens=estimate.input_tokens, counted=True), estimate.worst_case


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


async def _went_in(request: ChatRequest, model: Model) -> int:
    """Tokens of a request whose provider says nothing of them: at the worst where nobody else can count them."""
    counted = await count_chat(request, model.id)
    if request.unbounded is None or model.context_window is None or (model.price and model.price.is_free):
        return counted
    return max(counted, model.context_window)


def _in_tier(usage: Usage, request: ChatRequest) -> Usage:
    """Usage in the service tier that was asked for, where the provider names none."""
    return replace(usage, tier=request.tier) if usage.tier is None and request.options and request.tier else usage
