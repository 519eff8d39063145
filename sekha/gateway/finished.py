"""What is noted of a request once its answer is out: counts, the run in Prefect, the latency of who answered."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol, TypeAlias

from sekha.bill import open_bill
from sekha.calling import Attempt
from sekha.chat import ChatRequest
from sekha.embedding import EmbedRequest
from sekha.errors import BudgetExceeded, ProviderError, SekhaError
from sekha.gateway.news import tell_of_budget
from sekha.gateway.serving import Serving
from sekha.keys import EVERYBODY, Pass, without_keys
from sekha.ledger import Spend
from sekha.pricing import Usage
from sekha.recording.run import Outcome, Run, new_run_id
from sekha.search import Found, SearchRequest
from sekha.trace import take_notes, trace_of

__all__ = ["CLIENT_LEFT", "UnderWay"]

CLIENT_LEFT = "client_left"
"""What the log and the record say of a request whose caller did not wait for its end."""

Asked: TypeAlias = ChatRequest | EmbedRequest | SearchRequest


_NAME = re.compile(r"[\w.:/@+-]{1,128}")


class Answered(Protocol):
    """A `Reply` or vectors: who answered and what it cost."""

    @property
    def provider_id(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def cost(self) -> Decimal: ...
    @property
    def estimated_cost(self) -> Decimal: ...
    @property
    def attempts(self) -> tuple[Attempt, ...]: ...


class UnderWay:
    """One request from when its body was read until its answer is out."""

    __slots__ = (
        "_began",
        "_bill",
        "_by",
        "_flow",
        "_serving",
        "answer",
        "cost",
        "error",
        "model_id",
        "notes",
        "outcome",
        "provider_id",
        "request",
        "run_id",
        "said",
        "usage",
    )

    def __init__(
        self,
        serving: Serving,
        flow: str,
        request: Asked,
        by: Pass = EVERYBODY,
        *,
        run_id: str | None = None,
        began: float | None = None,
    ) -> None:
        self._by = by
        self.run_id = run_id or new_run_id()
        self.answer: Answered | None = None
        self.provider_id: str | None = None
        """Of who answered, or was asked last; None as long as nobody was."""
        self.model_id: str | None = None
        self.cost: Decimal | None = None
        """All that it was charged, for attempts that failed too."""
        self.usage: Usage | None = None
        self.outcome: Outcome | None = None
        self.error: str | None = None
        """The code of what went wrong, or the name of what nobody foresaw."""
        self.said: Callable[[], str] | None = None
        """The text of an answer that went out in pieces."""
        self._serving = serving
        self._flow = flow
        self.request = request
        self.notes = take_notes()
        self._bill = open_bill()
        self._began = time.perf_counter() if began is None else began

    @property
    def key(self) -> str | None:
        return self.request.key

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def lost_cost(self) -> Decimal:
        """Dollars for attempts so far that failed and may be billed all the same."""
        return self._bill.lost_cost

    def noted_before(
        self,
        plan: object,
        hold: object,
        *,
        began: float,
        estimated_at: float,
        selected_at: float,
        reserved_at: float,
    ) -> None:
        """Note the steps before a call that were taken elsewhere, and led to its plan and hold."""
        estimates = object()
        self.notes += [
            ("estimate_cost", (self.request,), began, estimated_at, estimates, None),
            ("select_provider", (self.request, estimates), estimated_at, selected_at, plan, None),
            ("reserve_budget", (plan,), selected_at, reserved_at, hold, None),
        ]

    def last_began(self, at: float) -> None:
        """Correct when the step that ended last began: what it waited for had been begun before it."""
        name, given, _, ended, result, error = self.notes[-1]
        self.notes[-1] = (name, given, at, ended, result, error)

    def answered(self, by: Answered) -> None:
        """Note an answer. Behind it: what is written in a turn of the event loop goes out at the turn's end."""
        self.answer = by
        self.provider_id, self.model_id, self.usage = by.provider_id, by.model_id, by.usage
        self.cost = by.cost + self._bill.lost_cost if self._bill.lost else by.cost
        # One attempt is the one that answered; of several, a search over several spaces has one for each.
        failed = len(by.attempts) > 1 and any(attempt.error for attempt in by.attempts)
        self.outcome = "fallback" if failed else "answered"
        asyncio.get_running_loop().call_soon(self._note_answer, by, self.outcome, self.seconds)

    def failed(self, error: BaseException) -> None:
        """Note a failure, a refusal, or a caller who left."""
        serving = self._serving
        attempts = tuple(self._bill.attempts)
        _count(serving, attempts)
        outcome: Outcome = "failed"
        if isinstance(error, ProviderError):
            if error.attempts:
                last = error.attempts[-1]
                self.provider_id, self.model_id = last.provider_id, last.model_id
        elif isinstance(error, asyncio.CancelledError | ConnectionError):
            outcome = "cancelled"
        elif isinstance(error, SekhaError) and not error.retryable:
            outcome = "refused"
            if serving.recorder is not None and isinstance(error, BudgetExceeded):
                tell_of_budget(serving.recorder, error)
        code = error.code if isinstance(error, SekhaError) else type(error).__name__
        if outcome == "cancelled":
            code = CLIENT_LEFT
        self.outcome, self.error = outcome, code
        self._note_charges()
        self._count_for_key(error)
        seconds = self.seconds
        if serving.recorder is not None and serving.recorder.wants(outcome=outcome, seconds=seconds):
            said = _recorded(error, content=serving.records_content) if isinstance(error, SekhaError) else ""
            serving.recorder.record(self._run(outcome, seconds, None, code, said, attempts))
        self._let_go()

    def charged(self) -> dict[str, object]:
        """What a caller who gets no answer is told under `sekha`: who was asked last, and what that cost."""
        cost = None if self.cost is None else float(self.cost)
        return {"provider_id": self.provider_id, "model_id": self.model_id, "cost": cost, "run_id": self.run_id}

    def _note_charges(self) -> None:
        """Count what a request cost that has no answer, or none that arrived, and note who was asked last."""
        bill = self._bill
        if self.provider_id is None and bill.asked is not None:
            self.provider_id, self.model_id = bill.asked.provider_id, bill.asked.id
        if bill.spends:
            self.cost = bill.cost
            self.usage = sum((spend.usage for spend in bill.spends.values()), Usage())
            self._count_spent(bill.spends.values())
        elif bill.asked is not None:
            self.cost = Decimal(0)

    def _count_for_key(self, error: BaseException) -> None:
        """Count against the key's limits what a request used that has no answer, or none that arrived."""
        usage, taken = self.usage, self._by.taken
        if usage is not None:
            tokens = usage.input_tokens + usage.output_tokens
            # Of what is charged at its worst nobody knows how long the reply was.
            self._by.used(max(tokens, taken.tokens) if self._bill.lost and taken is not None else tokens)
        elif isinstance(error, SekhaError) and self.said is None and not getattr(error, "may_be_billed", False):
            self._by.used(0)  # no reply will come for which tokens were taken

    def _count_spent(self, spends: Iterable[Spend]) -> None:
        for spend in spends:
            usage, scope = spend.usage, spend.scope
            tokens = usage.input_tokens, usage.output_tokens
            self._serving.metrics.spent(scope.provider or "", scope.model or "", *tokens, spend.cost)

    def _note_answer(self, by: Answered, outcome: Outcome, seconds: float) -> None:
        serving = self._serving
        _count(serving, by.attempts)
        usage = by.usage
        self._by.used(usage.input_tokens + usage.output_tokens)
        for each in by.answers if isinstance(by, Found) else (by,):
            tokens = each.usage.input_tokens, each.usage.output_tokens
            serving.metrics.spent(each.provider_id, each.model_id, *tokens, each.cost)
        self._count_spent(self._bill.lost)
        if serving.recorder is not None and serving.recorder.wants(outcome=outcome, seconds=seconds):
            serving.recorder.record(self._run(outcome, seconds, by, None, "", by.attempts))
        self._let_go()

    def _let_go(self) -> None:
        """Forget what the steps were given and gave: some of it knows of this, and each would keep the other."""
        self.notes.clear()
        self.said = None

    def _task(self) -> Sequence[str]:
        """The tag of what the model was asked to do: the task that its calls are charged to."""
        models = self._serving.resources.registry.providers[str(self.provider_id)].models
        asked = [model for model in models if model.id == self.model_id][:1]
        if isinstance(self.request, SearchRequest):
            return ["task:embedding" for _ in asked]
        ask = self.request.ask()
        return [f"task:{ask.scope(model).task}" for model in asked]

    def _content(self) -> Mapping[str, Any]:
        """Prompt and reply, for a configuration that says `content: true`."""
        request = self.request
        match request:
            case ChatRequest():
                text = self.said() if self.said is not None else getattr(self.answer, "text", None)
                return {"prompt": [_without_data(message) for message in request.messages], "answer": text}
            case EmbedRequest():
                return {"input": request.texts}
            case SearchRequest():
                return {"query": request.query}

    def _run(  # noqa: PLR0917 - for one in so many requests, and names take half as long again
        self,
        outcome: Outcome,
        seconds: float,
        by: Answered | None,
        error: str | None,
        message: str,
        attempts: tuple[Attempt, ...],
    ) -> Run:
        request = self.request
        parameters: dict[str, object]
        match request:
            case ChatRequest():
                asked = _name(request.model or request.task or "auto")
                parameters = {"model": asked, "messages": len(request.messages), "images": request.image_count}
            case EmbedRequest():
                asked = _name(request.model or "auto")
                parameters = {"model": asked, "texts": len(request.texts)}
            case SearchRequest():
                asked = request.collection
                parameters = {"collection": asked, "limit": request.limit}
        if request.max_cost is not None:
            parameters["max_cost"] = str(request.max_cost)
        if request.key is not None:
            parameters["key"] = request.key
        tags = []
        if self.provider_id is not None:
            # Also of a failure, by who was asked last: a provider's failures are looked for by them.
            tags = [f"provider:{self.provider_id}", f"model:{self.model_id}", *self._task()]
        tags += sorted(request.tags)
        if outcome != "answered":
            tags.append(outcome)
        came_to = error if by is None else f"{by.provider_id}/{by.model_id}"
        # One for the run and its steps: by another it would begin after the first of them.
        offset = time.time() - time.perf_counter()
        return Run(
            id=self.run_id,
            flow=self._flow,
            name=f"{asked} → {came_to}",
            started_at=self._began + offset,
            ended_at=self._began + seconds + offset,
            outcome=outcome,
            error=error,
            message=message,
            steps=trace_of(self.notes).steps,
            clock_offset=offset,
            parameters=parameters,
            content=self._content() if self._serving.records_content else None,
            tags=tuple(tags),
            provider_id=self.provider_id,
            model_id=self.model_id,
            estimated_cost=None if by is None else by.estimated_cost,
            cost=self.cost,
            attempts=attempts,
        )


def _without_data(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose images are named and not shown: their bytes are no reading."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {
        **message,
        "content": [part if part.get("type") == "text" else {"type": part.get("type")} for part in content],
    }


def _name(asked: str) -> str:
    """The model that was asked for, unless it is no name at all: then it may be anything, a prompt too.

    A key may look like a name.
    """
    return without_keys(asked) if _NAME.fullmatch(asked) else "what is no model's name"


def _recorded(error: SekhaError, *, content: bool) -> str:
    """What a record may hold of an error: what repeats the request only where that is recorded too."""
    if content:
        return without_keys(error.told)
    if not error.quotes_request:
        return without_keys(error.message)
    field = getattr(error, "field", None)
    return f"`{field}` is refused." if field else "It names what is not configured."


def _count(serving: Serving, attempts: Sequence[Attempt]) -> None:
    for attempt in attempts:
        serving.metrics.call(attempt.provider_id, attempt.model_id, attempt.error or "answered", attempt.seconds)
