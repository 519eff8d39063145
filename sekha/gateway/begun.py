"""A chat on the short way: sent with its request at hand, answered with the provider's, or handed over to the line."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, Literal, cast

from sekha.bill import note_asked, note_attempt, note_charged
from sekha.calling import Attempt
from sekha.chat import ChatRequest, Opened, Reply, carried_out, with_reply_limit
from sekha.embedding import EmbedRequest, RawEmbedded
from sekha.errors import ProviderError, SekhaError
from sekha.gateway.chats import (
    Pipe,
    end_of,
    end_with_usage,
    headers_of,
    without_usage_at_its_end,
)
from sekha.gateway.finished import UnderWay
from sekha.gateway.lanes import Fork, Lane
from sekha.gateway.problems import money
from sekha.gateway.serving import Serving
from sekha.gateway.wire import ChatAsked, answer_headers, chat_reply, chat_request, with_note
from sekha.ledger import Hold, Spend
from sekha.pricing import ChatUnits, Estimate, Usage, chat_units, cost_units, most_of
from sekha.providers.relay import Begun, RelayStream
from sekha.recording.run import Run, new_run_id
from sekha.routing import Candidate, Plan
from sekha.steps.asking import Sent
from sekha.trace import Step

if TYPE_CHECKING:
    from sekha.gateway.app import Gateway
    from sekha.gateway.http_server import HttpExchange
    from sekha.ledgers.leased import LeasedLedger

__all__ = ["BegunAnswer", "BegunStream", "Shortened"]

log = logging.getLogger("sekha.gateway")


class Shortened(ABC):
    """One request on the short way. It may be handed over to the line at any moment."""

    __slots__ = (
        "_by",
        "_called_at",
        "_ended_at",
        "_estimated_at",
        "_fork",
        "_gateway",
        "_given",
        "_hold",
        "_lane",
        "_requested",
        "_reserved_at",
        "_selected_at",
        "_sent",
        "_settled_at",
        "_taken",
        "_tokens",
        "_units",
        "_x",
        "began",
        "cost",
        "run_id",
        "serving",
        "usage",
    )

    flow = "chat"
    page = "/v1/chat/completions"
    streams = False
    outcome: Literal["answered"] = "answered"
    error: None = None

    def __init__(  # noqa: PLR0917 - for each request, and names take half as long again
        self,
        gateway: Gateway,
        serving: Serving,
        x: HttpExchange,
        lane: Lane,
        given: dict[str, Any],
        began: float,
        fork: Fork | None,
    ) -> None:
        self.serving = serving
        self.began = began
        self._called_at = 0.0
        self._gateway = gateway
        self._x = x
        self._lane = lane
        self._fork = fork
        self._given = given
        self._settled_at = 0.0

    # --- the request is here ---

    def send(self, requested: int | None, tokens: int, size: int) -> bool:
        """Estimate, select, reserve and call, for a request that counts as `size` against its key's limits."""
        lane = self._lane
        model = lane.model
        if self._fork is not None:
            units = self._fork.units
        else:
            units = ChatUnits(
                *chat_units(
                    lane.tariff,
                    lane.tariff,
                    tokens,
                    tokens if lane.exact else most_of(tokens),
                    requested,
                    model.max_output_tokens,
                    lane.usual.tokens.get(lane.name),
                    lane.limited,
                    lane.window,
                )
            )
        self._units = units
        self._requested, self._tokens = requested, tokens
        self._estimated_at = perf_counter()
        if (lane.window and tokens + (requested or 0) > lane.window) or not self._reserve(units.worst_case, size):
            return False
        given = self._given
        options = with_reply_limit(given, requested or units.reply_limit)
        seconds, streams = lane.timeout_seconds, self.streams
        return self._call(
            lane.provider.begin(
                model, given["messages"], options, timeout_seconds=seconds, told=self._told, stream=streams
            ),
            size,
        )

    def _reserve(self, worst: int, size: int) -> bool:
        """Select the candidate, unless something speaks against it now, and hold the worst case of all there are."""
        lane, serving, tokens, fork = self._lane, self.serving, self._tokens, self._fork
        resources, ledger = serving.resources, serving.leased
        circuits, rates, limit = resources.circuits, resources.rates, lane.by.limit
        if (
            ledger is None
            or not lane.provider.is_ready
            or (lane.cap is not None and worst > lane.cap)
            or (circuits is not None and not circuits.admit(lane.name))
            or (rates and lane.model.provider_id in rates.throttled(tokens))
            or resources.pauses.wait(lane.name)
            or (limit is not None and limit.wait(size))
        ):
            return False
        self._selected_at = perf_counter()
        if fork is None:
            budgets, amounts = lane.budgets, (worst * lane.picos,) * len(lane.budgets)
        else:
            budgets, amounts = fork.amounts
        hold = ledger.reserve_now(
            budgets, amounts, at=resources.now(), ttl_seconds=self._hold_seconds, scope=lane.scope
        )
        if hold is None:
            return False
        self._hold = hold
        self._reserved_at = perf_counter()
        return True

    @property
    def _hold_seconds(self) -> float:
        return self._lane.hold_seconds if self._fork is None else self._fork.hold_seconds

    def _call(self, sent: Begun | None, size: int) -> bool:
        """Take what was sent for this chat's call; with nothing sent, nothing has happened."""
        lane, resources = self._lane, self.serving.resources
        if sent is None:
            cast("LeasedLedger", self.serving.leased).release_now(self._hold)
            return False
        limit, rates = lane.by.limit, resources.rates
        self._sent = sent
        self._by = lane.by if limit is None else lane.by._replace(taken=limit.take(size))
        self._taken = None
        if rates:
            self._taken = rates.take(lane.model.provider_id, self._tokens + self._units.output_tokens)
        self.run_id = new_run_id()
        self._x.begun = self
        return True

    # --- the answer is here ---

    def _told(self) -> None:
        try:
            self._go_on()
        except Exception:
            # The traceback may quote what was asked, as in `Gateway.exchange`.
            log.error("request %s left the short way", self._x.request_id.decode())  # noqa: TRY400
            log.debug("request %s", self._x.request_id.decode(), exc_info=True)
            if not self._x.ended and self._x.task is None:
                self._x.hand_over()

    @abstractmethod
    def _go_on(self) -> None:
        """Go on with what the provider said."""

    def _settle(self, usage: Usage) -> bool:
        """Settle at what was used. False when that is nowhere on record yet, and so nobody may be told."""
        lane, serving = self._lane, self.serving
        unit, spent, expected = lane.tariff.unit, cost_units(usage, lane.tariff), self._units.expected
        self.usage, self.cost = usage, spent * unit
        if spent > self._units.worst_case:
            worst = self._units.worst_case * unit
            serving.resources.worst_case_passed(self.provider_id, self.model_id, self.cost, worst)
        hold, spend = self._hold, self._spend()
        ledger = cast("LeasedLedger", serving.leased)
        written = ledger.settle_now(hold, spend, cost=spent * lane.picos, estimated=expected * lane.picos)
        self._settled_at = perf_counter()
        return written

    def _spend(self) -> Spend:
        estimated = self._units.expected * self._lane.tariff.unit
        hold, scope, at = self._hold, self._lane.scope, self.serving.resources.now()
        return Spend(id=hold, scope=scope, cost=self.cost, estimated=estimated, usage=self.usage, at=at)

    def _note(self) -> dict[str, object]:
        """What the reply carries under `sekha`, as `wire.sekha_note` has it."""
        return {
            **self._lane.said,
            "estimated_cost": float(self._units.expected * self._lane.tariff.unit),
            "cost": float(self.cost),
            "attempts": 1,
            "run_id": self.run_id,
        }

    def _ended(self) -> None:
        """Count it behind the answer, which nobody is to wait longer for."""
        self._x.begun = None
        self.stop()
        self._ended_at = perf_counter()
        self._x.behind(self._over)

    def _over(self) -> None:
        self._count()
        self._gateway.over(self.serving, self._x, self.page, self._ended_at - self.began)
        # Or the two would keep each other from being freed.
        self._x.under_way = None

    def _count(self) -> None:
        """Count what was answered, and record it."""
        lane, serving, usage = self._lane, self.serving, self.usage
        name, resources, waited = lane.name, serving.resources, self._waited
        went_in, came_out = usage.input_tokens, usage.output_tokens
        lane.usual.known()
        if resources.circuits is not None:
            resources.circuits.note(name, None)
        resources.latencies.observe(name, waited)
        if self._taken is not None:
            resources.rates.correct(self.provider_id, self._taken, went_in + came_out)
        self._by.used(went_in + came_out)
        lane.counts.answer(waited, went_in, came_out, float(self.cost))
        seconds = self._ended_at - self.began
        if serving.recorder is not None and serving.recorder.wants(outcome="answered", seconds=seconds):
            serving.recorder.record(self._run(waited))
        self._x.under_way = self

    def _run(self, waited: float) -> Run:
        """The run that `UnderWay` would have made of it."""
        lane, given, offset = self._lane, self._given, time() - perf_counter()
        asked = given["model"]
        parameters: dict[str, object] = {"model": asked, **self._asked_for()}
        if self._by.key is not None:
            parameters["key"] = self._by.key
        calls = self._calls()
        return Run(
            id=self.run_id,
            flow=self.flow,
            name=f"{asked} → {lane.name}",
            started_at=self.began + offset,
            ended_at=self._ended_at + offset,
            outcome="answered",
            steps=(
                Step("estimate_cost", (), self.began, self._estimated_at),
                Step("select_provider", (0,), self._estimated_at, self._selected_at),
                Step("reserve_budget", (1,), self._selected_at, self._reserved_at),
                *calls,
                Step("settle_cost", (2, 2 + len(calls)), self._called_at, self._settled_at),
            ),
            clock_offset=offset,
            parameters=parameters,
            tags=lane.tags,
            provider_id=self.provider_id,
            model_id=self.model_id,
            estimated_cost=self._units.expected * lane.tariff.unit,
            cost=self.cost,
            attempts=(Attempt(provider_id=self.provider_id, model_id=self.model_id, seconds=waited),),
        )

    def _attempt(self) -> Attempt:
        return Attempt(provider_id=self.provider_id, model_id=self.model_id, seconds=self._waited)

    def _asked_for(self) -> dict[str, object]:
        """What the run says of the request, without a word of it."""
        return {"messages": len(self._given["messages"]), "images": 0}

    @abstractmethod
    def _calls(self) -> tuple[Step, ...]:
        """The steps between reserving and settling; they go by number, and the first is 3."""

    # What the log says of it.

    @property
    def key(self) -> str | None:
        return self._by.key

    @property
    def provider_id(self) -> str:
        return self._lane.model.provider_id

    @property
    def model_id(self) -> str:
        return self._lane.model.id

    # --- handed over ---

    def stop(self) -> None:
        """Do nothing more when the provider says something: from now on the line listens."""
        self._sent.response.told = None

    async def in_line(self) -> None:
        """Go on as the line would that has come as far as this."""
        if self._settled_at:
            # What it cost is on record nowhere yet, and nobody is to be told before it is.
            try:
                await cast("LeasedLedger", self.serving.leased).recorded()
                await self._tell()
            except BaseException as error:
                # It is paid for, whoever got it.
                under_way = self._x.under_way = self._under_way()
                note_asked(self._lane.model)
                note_attempt(self._attempt())
                note_charged(self._spend())
                if self._taken is not None:
                    tokens = self.usage.input_tokens + self.usage.output_tokens
                    self.serving.resources.rates.correct(self.provider_id, self._taken, tokens)
                under_way.failed(error)
                if not await self._broken_in_line(under_way, error):
                    raise
                return
            self._ended_at = perf_counter()
            self._count()
            return
        under_way = self._x.under_way = self._under_way()
        plan = self._plan()
        ledger, resources = cast("LeasedLedger", self.serving.leased), self.serving.resources
        hold = ledger.held_now(self._hold, at=resources.now(), ttl_seconds=self._hold_seconds)
        under_way.noted_before(
            plan,
            hold,
            began=self.began,
            estimated_at=self._estimated_at,
            selected_at=self._selected_at,
            reserved_at=self._reserved_at,
        )
        since = perf_counter() - self._reserved_at
        sent = Sent(self._sent, resources.clock.now() - since, self._taken)
        try:
            reply = await self._call_in_line(under_way, plan, hold, sent)
        except BaseException as error:
            under_way.failed(error)
            if not await self._broken_in_line(under_way, error):
                raise
        else:
            under_way.answered(reply)

    @property
    def _waited(self) -> float:
        """Seconds from the call until a whole answer, or the first of a stream."""
        return self._called_at - self._reserved_at

    @abstractmethod
    async def _tell(self) -> None:
        """Answer with what was settled."""

    @abstractmethod
    async def _call_in_line(self, under_way: UnderWay, plan: Plan, hold: Hold, sent: Sent) -> Reply | RawEmbedded:
        """Wait for the call, and answer."""

    async def _broken_in_line(self, _: UnderWay, __: BaseException) -> bool:
        """Whether the caller was told of an error within what he got."""
        return False

    def _request(self) -> ChatRequest | EmbedRequest:
        return chat_request(self._given, by=self._by)

    def _under_way(self) -> UnderWay:
        return UnderWay(self.serving, self.flow, self._request(), self._by, run_id=self.run_id, began=self.began)

    def _plan(self) -> Plan:
        if self._fork is not None:
            return self._fork.plan
        lane, units, tokens, requested = self._lane, self._units, self._tokens, self._requested
        expected, worst, length, limit, basis = units
        unit, context = lane.tariff.unit, tokens + (requested or 0)
        estimate = Estimate(expected * unit, worst * unit, tokens, length, context, limit, basis)
        return Plan(ask=lane.ask, candidates=(Candidate(lane.model, estimate, lane.reason),))


class BegunAnswer(Shortened):
    """A chat whose answer goes out whole."""

    __slots__ = ()

    def _go_on(self) -> None:
        lane, x = self._lane, self._x
        self._called_at = perf_counter()
        usage = lane.provider.usage_of(self._sent, lane.tiers)
        if usage is None:
            x.hand_over()
        elif self._settle(usage):
            said = with_note(self._sent.response.content, self._note())
            x.answer_now(said, b"%b%b\r\n" % (lane.lines, money(self.cost)))
            self._ended()
        else:
            x.hand_over()

    async def _tell(self) -> None:
        said = with_note(self._sent.response.content, self._note())
        await self._x.answer(200, said, answer_headers(self.provider_id, self.model_id, self.cost))

    async def _call_in_line(self, under_way: UnderWay, plan: Plan, hold: Hold, sent: Sent) -> Reply:
        serving, request = self.serving, cast("ChatRequest", under_way.request)

        async def call(plan: Plan, hold: Hold) -> Reply:
            try:
                return await serving.sent.call(request, plan, hold, sent)
            finally:
                under_way.last_began(self._reserved_at)

        reply = await carried_out(serving.chat, plan, hold, call)
        await self._x.answer(200, chat_reply(reply, self.run_id), headers_of(reply))
        return reply

    def _calls(self) -> tuple[Step, ...]:
        return (Step("call_provider", (1, 2), self._reserved_at, self._called_at),)


class BegunStream(Shortened):
    """A chat whose answer is handed on as it comes."""

    __slots__ = ("_held", "_opened_at", "_piped", "_stream", "_wants_usage")

    streams = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._piped: Pipe | None = None
        self._stream: RelayStream | None = None
        self._opened_at = 0.0
        """Once something was said."""
        options = self._given.get("stream_options")
        self._wants_usage = options is not None and options["include_usage"]
        self._held = b""
        """What came last, if that has the usage."""

    @property
    def _waited(self) -> float:
        return self._opened_at - self._reserved_at

    def _go_on(self) -> None:
        if not self._opened_at and not self._opens():
            return
        x, response, stream = self._x, self._sent.response, cast("RelayStream", self._stream)
        try:
            while not x.is_held_up:
                block = stream.take()
                if block is not None:
                    if self._wants_usage:
                        block, self._held = without_usage_at_its_end(self._held + block)
                    if block:
                        x.go_on_now(block)
                # Whatever has come is one block. Nobody calls again behind the last.
                if not response.complete or stream.has_ended:
                    break
        except ProviderError:
            x.hand_over()
            return
        if stream.has_ended:
            self._end(stream)
        elif x.is_held_up or stream.is_broken:
            x.hand_over()
        else:
            stream.listen()
            x.flush()

    def _end(self, stream: RelayStream) -> None:
        self._called_at = perf_counter()
        usage = stream.usage
        if usage is None or usage.tier in self._lane.tiers:
            self._x.hand_over()
            return
        written = self._settle(usage)
        stream.let_go()  # whatever becomes of the answer, nobody reads on
        if written:
            self._x.end_now(self._last())
            self._ended()
        else:
            self._x.hand_over()

    def _opens(self) -> bool:
        """Begin to answer, where the provider has said something by now."""
        x, lane, stream = self._x, self._lane, self._stream
        if stream is None:
            response = self._sent.response
            if not (response.parts or response.complete or response.error):
                return False  # its head alone
            stream = lane.provider.stream_of(
                self._sent, lane.model, timeout_seconds=lane.timeout_seconds, hands_on_usage=self._wants_usage
            )
            self._stream = stream
        begun = stream.begin_now()
        if begun is None:
            return False
        if not begun:
            x.hand_over()
            return False
        self._opened_at = perf_counter()
        x.begin_now(b"%b%b\r\n" % (lane.stream_lines, money(self._units.expected * lane.tariff.unit)))
        x.behind(self._note_first)
        return True

    def _note_first(self) -> None:
        self.serving.metrics.first(self.provider_id, self.model_id, self._opened_at - self.began)

    def _last(self) -> bytes:
        if not self._wants_usage:
            return end_of(self._note())
        return end_with_usage(self._held, self._note(), self.model_id, self.run_id, usage=self.usage)

    async def _tell(self) -> None:
        await self._x.end(self._last())

    async def _call_in_line(self, under_way: UnderWay, plan: Plan, hold: Hold, sent: Sent) -> Reply:
        serving, request = self.serving, cast("ChatRequest", under_way.request)
        pipe = self._pipe(under_way)

        async def call(plan: Plan, hold: Hold) -> Reply:
            opened = self._opened(plan)
            if opened is None:
                try:
                    opened = await serving.sent.open(request, plan, hold, sent)
                finally:
                    under_way.last_began(self._reserved_at)
                return await serving.stream.relay(request, plan, hold, opened, pipe)
            serving.resources.latencies.observe(self._lane.name, self._waited)
            under_way.notes.append(("open_stream", (plan, hold), self._reserved_at, self._opened_at, opened, None))
            try:
                return await serving.stream.relay(request, plan, hold, opened, pipe)
            finally:
                under_way.last_began(self._opened_at)

        reply = await carried_out(serving.stream, plan, hold, call)
        await pipe.end(reply)
        return reply

    async def _broken_in_line(self, under_way: UnderWay, error: BaseException) -> bool:
        if not self._x.status or not isinstance(error, SekhaError):
            return False
        await self._pipe(under_way).broken(error)
        return True

    def _pipe(self, under_way: UnderWay) -> Pipe:
        if self._piped is None:
            request = cast("ChatRequest", under_way.request)
            asked = ChatAsked(request, stream=True, keep=False)
            self._piped = Pipe(self._x, self.serving, asked, under_way, held=self._held)
        return self._piped

    def _opened(self, plan: Plan) -> Opened | None:
        if self._stream is None or not self._opened_at:
            return None
        return Opened(
            events=self._stream,
            candidate=plan.first,
            attempts=(self._attempt(),),
            probe=None,
            began_at=self.serving.resources.clock.now() - (perf_counter() - self._reserved_at),
            charge=_nothing_more,
            taken=self._taken,
        )

    def _calls(self) -> tuple[Step, ...]:
        return (
            Step("open_stream", (1, 2), self._reserved_at, self._opened_at),
            Step("relay_stream", (1, 2, 3), self._opened_at, self._called_at),
        )


async def _nothing_more(reply: Reply) -> None:
    """Nothing is charged beside the reply, where no attempt before it failed."""
