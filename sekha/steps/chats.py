"""Asking providers for an answer, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from sekha.bill import note_asked, note_attempt
from sekha.calling import CANCELLED, Answered
from sekha.chat import ChatRequest, Opened, Piped, Reply, with_reply_limit
from sekha.errors import ProviderError
from sekha.ledger import Hold
from sekha.pricing import Usage
from sekha.providers.base import ByteProvider, ChatCall, Completion, RawStream
from sekha.providers.chunks import ChunkStream
from sekha.rates import Taken
from sekha.registry import Model
from sekha.routing import Candidate, Plan
from sekha.settling import to_the_end
from sekha.steps.asking import Asking, Sent, worst_of
from sekha.steps.counting import count_chat, count_embedding, count_reply
from sekha.steps.losses import Losses
from sekha.steps.money import check_worst_case, cost_of, spend_of, with_images

if TYPE_CHECKING:
    from sekha.providers.relay import RelayProvider

__all__ = ["ChatCalls"]


class ChatCalls(Asking):
    async def call_provider(self, request: ChatRequest, chosen: Plan, hold: Hold, sent: Sent | None = None) -> Reply:
        """Ask the candidates in turn, with retries, until one answers."""
        lost = Losses(self._open, chosen, hold, hold.id)
        begun = [] if sent is None else [sent.begun]

        def once(candidate: Candidate, seconds: float) -> Awaitable[Completion]:
            provider = self._open.provider(candidate.model.provider_id)
            call = self._call(request, candidate, seconds)
            if begun:
                return lost.attempt(candidate, worst_of, cast("RelayProvider", provider).complete, call, begun.pop())
            return lost.attempt(candidate, worst_of, provider.complete, call)

        try:
            answered = await self._in_turn(chosen, once, lost.affords, sent=sent)
            try:
                reply = await self._replied(request, chosen, answered, lost)
            except asyncio.CancelledError:
                await to_the_end(self._charge_unread(request, chosen, hold, answered, lost))
                raise
            await lost.charge(reply)
        except BaseException:
            await lost.free()
            raise
        return reply

    async def _charge_unread(
        self, request: ChatRequest, chosen: Plan, hold: Hold, answered: Answered[Completion], lost: Losses
    ) -> None:
        """Charge an answer whose caller left while it was counted."""
        reply = await self._replied(request, chosen, answered, lost)
        check_worst_case(self._open, reply)
        await self._charge(hold, spend_of(reply, identity=hold.id, at=self._open.now()))
        await lost.charge(reply)

    async def _replied(self, request: ChatRequest, chosen: Plan, answered: Answered[Completion], lost: Losses) -> Reply:
        completion, candidate, attempts, _ = answered
        model = candidate.model
        usage = completion.usage or await self._counted_usage(request, completion, model)
        usage = _in_tier(with_images(usage, request.image_count, model), request)
        return Reply(
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

    async def open_stream(self, request: ChatRequest, chosen: Plan, hold: Hold, sent: Sent | None = None) -> Opened:
        """Ask the candidates in turn until the first piece of an answer arrives."""
        lost = Losses(self._open, chosen, hold, hold.id)
        begun = [] if sent is None else [sent.begun]

        def once(candidate: Candidate, seconds: float) -> Awaitable[RawStream]:
            provider = self._open.provider(candidate.model.provider_id)
            call = self._call(request, candidate, seconds)
            if begun:
                relay = cast("RelayProvider", provider)
                return lost.attempt(candidate, worst_of, relay.open_stream, call, begun.pop())
            if hasattr(provider, "open_stream"):
                return lost.attempt(candidate, worst_of, cast("ByteProvider", provider).open_stream, call)
            return lost.attempt(candidate, worst_of, ChunkStream.open, provider, call)

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
            reply = await self._streamed(request, chosen, opened)
        except BaseException as error:
            await to_the_end(self._charge_part(request, chosen, hold, opened, error))
            raise
        finally:
            await events.aclose()
        if self._open.circuits is not None:
            self._open.circuits.note(opened.candidate.model.name, None, probe=opened.probe)
        note_attempt(opened.attempts[-1])
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
            came_out, _ = await count_embedding([opened.events.said()], model.id)
            reported = opened.events.went_in or Usage()
            if request.has_tools_of_providers:
                # What was reported before the end is of before it searched.
                went_in = max(reported.input_tokens, await _went_in(request, model))
                reported = replace(reported, input_tokens=went_in)
            usage = await _made_whole(request, model, reported, came_out)
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

    async def _counted_usage(self, request: ChatRequest, completion: Completion, model: Model) -> Usage:
        """What was used, counted by us where the provider did not say."""
        came_out = await count_reply(completion.body, model.id)
        return await _made_whole(request, model, completion.half or Usage(), came_out)


async def _made_whole(request: ChatRequest, model: Model, reported: Usage, came_out: int) -> Usage:
    """What its provider reported in part, with what we count in place of the rest."""
    went_in = reported.input_tokens or await _went_in(request, model)
    came_out = max(came_out, reported.output_tokens)
    return replace(reported, input_tokens=went_in, output_tokens=came_out, counted=True)


async def _went_in(request: ChatRequest, model: Model) -> int:
    """Tokens of a request whose provider says nothing of them: at the worst where nobody else can count them."""
    counted = await count_chat(request, model.id)
    if request.unbounded is None or model.context_window is None or (model.price and model.price.is_free):
        return counted
    return max(counted, model.context_window)


def _in_tier(usage: Usage, request: ChatRequest) -> Usage:
    """Usage in the service tier that was asked for, where the provider names none."""
    return replace(usage, tier=request.tier) if usage.tier is None and request.options and request.tier else usage
