from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from sekha.chat import ChatRequest, ChatSteps, answer
from sekha.errors import (
    BudgetExceeded,
    ContentRefused,
    CostRefused,
    InvalidRequest,
    LedgerUnavailable,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
)
from sekha.ledger import Hold
from sekha.routing import Plan
from tests.fixtures.pipeline import NOON, TWO_PROVIDERS, Opens, Pipeline

HELLO = ChatRequest(messages=({"role": "user", "content": "Hello"},))


def down(name: str = "first") -> ProviderUnavailable:
    return ProviderUnavailable("no luck", provider_id=name, model_id="chat")


async def test_an_answer_says_who_gave_it_and_what_it_cost(pipeline: Opens) -> None:
    async with pipeline() as opened:
        reply = await opened.runtime.chat("Hello")

        assert (reply.text, reply.provider_id, reply.model_id) == ("first says so.", "first", "chat")
        assert reply.cost == Decimal("0.02")  # 10 tokens in at $1,000 a million, 5 out at $2,000
        assert await opened.spent() == reply.cost
        assert await opened.held() == 0


async def test_the_next_provider_answers_where_the_first_cannot_and_is_paid(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [down()]

        reply = await opened.runtime.chat("Hello")

        assert reply.provider_id == "second"
        assert [attempt.error for attempt in reply.attempts] == ["provider_unavailable", None]
        assert reply.reason.startswith("fallback 1")
        assert await opened.spent() == reply.cost == Decimal("0.06")
        assert await opened.held() == 0


async def test_a_hold_is_released_when_every_candidate_fails(pipeline: Opens) -> None:
    async with pipeline(rounds=2) as opened:
        opened.actors["first"].acts = [down()] * 2
        opened.actors["second"].acts = [down("second")] * 2

        with pytest.raises(ProviderUnavailable) as caught:
            await opened.runtime.chat("Hello")

        assert [attempt.provider_id for attempt in caught.value.attempts] == ["first", "second", "first", "second"]
        assert await opened.held() == await opened.spent() == 0


async def test_a_callers_error_asks_nobody_else(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [ContentRefused(provider_id="first")]

        with pytest.raises(ContentRefused):
            await opened.runtime.chat("Hello")

        assert opened.actors["second"].chats == []
        assert await opened.held() == 0


async def test_retry_after_is_waited_for_where_nobody_else_answers(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [RateLimited(provider_id="first", retry_after_seconds=5)]

        await opened.runtime.chat("Hello", model="first/chat")

        (slept,) = opened.time.slept
        assert 5 <= slept < 6


async def test_what_no_provider_reports_is_counted(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [None]

        reply = await opened.runtime.chat("Hello")

        assert reply.usage.counted
        assert reply.usage.input_tokens > 0
        assert reply.usage.output_tokens > 0
        assert await opened.spent() == reply.cost > 0


async def test_a_reply_costs_what_was_used_though_it_was_estimated_higher(pipeline: Opens) -> None:
    async with pipeline() as opened:
        plan = await opened.runtime.route(HELLO)

        reply = await opened.runtime.chat(HELLO)

        assert reply.estimated_cost == plan.first.estimate.expected
        assert reply.cost < plan.first.estimate.expected <= plan.first.estimate.worst_case


# --- what is sent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "sent"),
    [
        # A budget watches, so the model's own limit is said aloud.
        (ChatRequest(messages=HELLO.messages), {"max_tokens": 100}),
        (ChatRequest(messages=HELLO.messages, max_tokens=7), {"max_tokens": 7}),
        (ChatRequest(messages=HELLO.messages, options={"max_completion_tokens": 7}), {"max_completion_tokens": 7}),
        (
            ChatRequest(messages=HELLO.messages, max_tokens=9, options={"max_tokens": 7, "seed": 1}),
            {"max_tokens": 7, "seed": 1},
        ),
    ],
)
async def test_the_longest_reply_is_sent_under_one_name(
    request_: ChatRequest, sent: dict[str, Any], pipeline: Opens
) -> None:
    async with pipeline() as opened:
        await opened.runtime.chat(request_)

        assert opened.actors["first"].chats[0].options == sent


async def test_a_reply_limited_in_the_options_is_priced_by_that_limit(pipeline: Opens) -> None:
    async with pipeline() as opened:
        limited = await opened.runtime.route(replace(HELLO, options={"max_completion_tokens": 50}))
        three = await opened.runtime.route(replace(HELLO, options={"max_completion_tokens": 50, "n": 3}))

        per_reply = Decimal(50) * 2000 / 1_000_000
        assert three.first.estimate.worst_case - limited.first.estimate.worst_case == 2 * per_reply


async def test_a_reply_is_cut_at_what_the_cap_affords(pipeline: Opens) -> None:
    async with pipeline(TWO_PROVIDERS.replace("max_output_tokens: 100", "max_output_tokens: 1000")) as opened:
        await opened.runtime.chat("Hello", max_cost=Decimal("1.1"), model="first/chat")

        (call,) = opened.actors["first"].chats
        assert 512 <= call.options["max_tokens"] < 550  # $1.1 at $2,000 a million, less the input
        assert await opened.spent() <= Decimal("1.1")


async def test_what_the_cap_cannot_afford_is_refused_before_anyone_is_asked(pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(CostRefused) as caught:
            await opened.runtime.chat("Hello", max_cost=Decimal("0.0001"))

        assert (caught.value.cheapest, caught.value.limit_name) == ("first/chat", "max_cost")
        assert opened.actors["first"].chats == []


# --- budgets -------------------------------------------------------------------------------


async def test_a_budget_is_never_passed_by_any_number_of_callers_at_once(pipeline: Opens) -> None:
    async with pipeline(TWO_PROVIDERS.replace("limit: 100", "limit: 2")) as opened:
        one = replace(HELLO, model="first/chat")
        affordable = int(2 // (await opened.runtime.route(one)).first.estimate.worst_case)
        actor, gate, full = opened.actors["first"], asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            if len(actor.chats) == affordable:
                full.set()
            await gate.wait()

        actor.acts = [wait] * 30
        calls = [asyncio.create_task(opened.runtime.chat(one)) for _ in range(30)]
        await full.wait()
        assert await opened.held() <= 2
        gate.set()
        done = await asyncio.gather(*calls, return_exceptions=True)

        refused = [outcome for outcome in done if isinstance(outcome, BudgetExceeded)]
        answered = [outcome for outcome in done if not isinstance(outcome, BaseException)]
        assert len(refused) + len(answered) == 30
        assert len(answered) >= affordable > 1
        assert await opened.spent() == len(answered) * Decimal("0.02")
        assert await opened.held() == 0


async def test_a_hold_outlives_the_longest_call(pipeline: Opens) -> None:
    async with pipeline(TWO_PROVIDERS.replace("timeout_secs: 10", "timeout_secs: 3600")) as opened:
        steps = opened.runtime.chat_steps
        plan = await steps.select(HELLO, await steps.estimate(HELLO))

        hold = await steps.reserve(plan)

        assert (hold.expires_at - NOON).total_seconds() > opened.runtime.resources.patience_seconds(plan) == 7200


# --- however it ends -----------------------------------------------------------------------


class Gates:
    """The steps of a pipeline, with a gate in front of the answer of one."""

    def __init__(self, opened: Pipeline) -> None:
        self.steps: ChatSteps = opened.runtime.chat_steps
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()

    async def reserve(self, plan: Plan) -> Hold:
        hold = await self.steps.reserve(plan)
        self.entered.set()
        await self.gate.wait()
        return hold

    async def settle(self, hold: Hold, outcome: Any) -> None:
        self.entered.set()
        await self.gate.wait()
        await self.steps.settle(hold, outcome)

    async def cancel_at(self, steps: ChatSteps) -> None:
        task = asyncio.create_task(answer(HELLO, steps))
        await self.entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        self.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_caller_who_leaves_during_the_call_leaves_no_hold(pipeline: Opens) -> None:
    async with pipeline() as opened:
        asked, never = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            asked.set()
            await never.wait()

        opened.actors["first"].acts = [hang]
        task = asyncio.create_task(opened.runtime.chat("Hello"))
        await asked.wait()
        assert await opened.held() > 0

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await opened.held() == 0


async def test_a_caller_who_leaves_while_money_is_reserved_leaves_no_hold(pipeline: Opens) -> None:
    async with pipeline() as opened:
        gates = Gates(opened)

        await gates.cancel_at(replace(gates.steps, reserve=gates.reserve))

        assert await opened.held() == 0
        assert opened.actors["first"].chats == []


async def test_a_caller_who_leaves_while_it_is_settled_has_still_paid(pipeline: Opens) -> None:
    async with pipeline() as opened:
        gates = Gates(opened)

        await gates.cancel_at(replace(gates.steps, settle=gates.settle))

        assert await opened.spent() == Decimal("0.02")
        assert await opened.held() == 0


async def test_a_ledger_that_fails_to_release_does_not_hide_why_the_call_failed(
    pipeline: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    async def settle(hold: Hold, outcome: Any) -> None:
        raise LedgerUnavailable("ledger.db", "the disk is full")

    async with pipeline(rounds=1) as opened:
        opened.actors["first"].acts = [down()]

        with pytest.raises(ProviderError):
            await answer(replace(HELLO, model="first/chat"), replace(opened.runtime.chat_steps, settle=settle))

    assert "will expire at" in caplog.text


async def test_a_ledger_that_fails_to_record_is_said(pipeline: Opens) -> None:
    async def settle(hold: Hold, outcome: Any) -> None:
        raise LedgerUnavailable("ledger.db", "the disk is full")

    async with pipeline() as opened:
        with pytest.raises(LedgerUnavailable):
            await answer(HELLO, replace(opened.runtime.chat_steps, settle=settle))


# --- requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": ()}, "messages"),
        ({"messages": ("Hello",)}, "messages[0]"),
        ({"messages": ({"content": "Hello"},)}, "messages[0]"),
        ({"messages": HELLO.messages, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO.messages, "max_cost": Decimal(-1)}, "max_cost"),
        ({"messages": HELLO.messages, "options": {"max_completion_tokens": -1}}, "max_completion_tokens"),
        ({"messages": HELLO.messages, "options": {"n": True}}, "n"),
    ],
)
def test_a_malformed_request_names_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest(**fields)

    assert caught.value.field == field
    assert f"`{field}`" in str(caught.value)


def test_images_are_counted_and_demand_a_model_that_sees() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    request = ChatRequest(messages=({"role": "user", "content": [{"type": "text", "text": "What?"}, image, image]},))

    assert request.image_count == 2
    assert request.ask().vision
    assert not request.ask(images_need_vision=False).vision


async def test_no_prompt_and_no_answer_shows_when_printed(pipeline: Opens) -> None:
    async with pipeline() as opened:
        reply = await opened.runtime.chat("a secret prompt")

        assert "secret" not in repr(opened.actors["first"].chats[0])
        assert "says so" not in repr(reply)
    assert "secret" not in repr(ChatRequest(messages=({"role": "user", "content": "a secret prompt"},)))
