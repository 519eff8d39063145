"""What one configuration serves with. A reload opens another beside it, and this one ends with its last request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sekha.chat import ChatSteps, StreamSteps
from sekha.embedding import EmbedSteps, RawEmbedded
from sekha.gateway.health import Health
from sekha.gateway.metrics import Metrics
from sekha.keys import Key, Keyring
from sekha.rates import Minutes
from sekha.resources import Resources
from sekha.runtime import Runtime
from sekha.search import SearchSteps
from sekha.steps.asking import SentSteps
from sekha.trace import noted

if TYPE_CHECKING:
    from sekha.gateway.remembering import Remembering
    from sekha.ledgers.leased import LeasedLedger
    from sekha.recording.recorder import Recorder

__all__ = ["BODY_MB", "BODY_SECONDS", "Serving"]

BODY_MB = 64.0
"""The largest body that is read: a dozen images in base64."""
BODY_SECONDS = 30.0


class Serving:
    """The open resources of one configuration, its steps noted, and how many requests use it."""

    def __init__(
        self,
        resources: Resources,
        metrics: Metrics,
        *,
        recorder: Recorder | None = None,
        memory: Remembering | None = None,
        leased: LeasedLedger | None = None,
        minutes: Minutes | None = None,
    ) -> None:
        """`leased` is the ledger of `resources`, where it is one whose holds can be taken and settled at once."""
        self.resources = resources
        self.leased = leased
        self.under_way = 0
        """Requests that use it."""
        self.recorder = recorder
        self.records_content = resources.loaded.config.recording.content
        self.memory = memory
        if recorder is not None:
            metrics.follow(recorder)
        self.circuits = resources.circuits
        self.health = Health(resources)
        self.runtime = Runtime(resources)
        self.metrics = metrics
        resources.when_passed = metrics.passed
        keys = (
            Key(
                name=section.name,
                hash=section.hash,
                models=section.models,
                tasks=section.tasks,
                requests_per_minute=section.requests_per_minute,
                tokens_per_minute=section.tokens_per_minute,
                reads=section.reads,
                operator=section.operator,
            )
            for section in resources.loaded.config.keys
        )
        self.keys = Keyring(keys, clock=resources.clock.now, minutes=minutes)
        money, chats, embeds = self.runtime.money, self.runtime.chat_calls, self.runtime.embed_calls
        self.chat: ChatSteps = noted(
            ChatSteps(
                estimate=money.estimate_cost,
                select=money.select_provider,
                reserve=money.reserve_budget,
                call=chats.call_provider,
                settle=money.settle_cost,
                at_once=leased is not None,
            ),
            time.perf_counter,
        )
        self.stream: StreamSteps = noted(
            StreamSteps(
                estimate=money.estimate_cost,
                select=money.select_provider,
                reserve=money.reserve_budget,
                open=chats.open_stream,
                relay=chats.relay_stream,
                settle=money.settle_cost,
                at_once=leased is not None,
            ),
            time.perf_counter,
        )
        self.embed: EmbedSteps[RawEmbedded] = noted(
            EmbedSteps(
                estimate=money.estimate_cost,
                select=money.select_provider,
                reserve=money.reserve_budget,
                embed=embeds.embed_raw,
                settle=money.settle_cost,
                at_once=leased is not None,
            ),
            time.perf_counter,
        )
        self.search: SearchSteps = noted(self.runtime.search_steps, time.perf_counter)
        self.sent: SentSteps = noted(
            SentSteps(chats.call_provider, chats.open_stream, embeds.embed_raw), time.perf_counter
        )

    async def aclose(self) -> None:
        await self.health.aclose()
        if self.memory is not None:
            await self.memory.aclose()
        await self.runtime.aclose()
        if self.recorder is not None:
            await self.recorder.aclose()
            self.metrics.leave(self.recorder)
