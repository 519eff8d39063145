"""Providers that fail and callers who leave: who is asked, how often, and what it does to the money."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, config_for, wait_until
from tests.fixtures.upstream import Upstream, chunked, with_length

HELLO = [{"role": "user", "content": "Hello there."}]
LONG = "word " * 3000
ANSWERED = (
    b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":6,"completion_tokens":2}}'
)
PASSING: dict[str, Callable[[StandIn], None]] = {
    "500": lambda standin: standin.fail(500),
    "503": lambda standin: standin.fail(503, retry_after=30),
    "429": lambda standin: standin.fail(429, retry_after=30),
    "our key": lambda standin: standin.fail(401),
    "no such model": lambda standin: standin.fail(404),
    "out of money": lambda standin: standin.fail(429, message="You exceeded your current quota."),
    "dropped": lambda standin: standin.drop(),
    "cut": lambda standin: standin.cut(),
    "garbage": lambda standin: standin.garbage(),
    "hang": lambda standin: standin.hang(),
}


@pytest.mark.parametrize("fault", PASSING)
async def test_another_provider_answers_when_one_fails(gateway: Opens, fault: str) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, rounds=3, timeout_secs=0.3) as served:
        PASSING[fault](one)
        response = await served.chat(model="chat")
        held = await served.held()

    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "You said: Hello there."
    assert (response.headers["x-sekha-provider"], response.json()["sekha"]["attempts"]) == ("second", 2)
    assert (len(one.requests), len(two.requests)) == (1, 1)
    assert held == 0


@pytest.mark.parametrize(
    "fault", [StandIn.refuse_content, StandIn.exceed_context, lambda s, **times: s.fail(400, **times)]
)
async def test_what_is_wrong_with_the_request_is_asked_once_and_costs_nothing(
    gateway: Opens, fault: Callable[..., None]
) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, rounds=3) as served:
        fault(one, times=None)
        response = await served.chat(model="chat")
        spent, held = await served.spent(), await served.held()

    assert response.status_code == 400
    assert response.headers["x-should-retry"] == "false"
    assert (len(one.requests), len(two.requests)) == (1, 0)
    assert (spent, held) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_with_the_request_is_so_too_where_the_answer_began_with_200(
    gateway: Opens, stream: bool
) -> None:
    error = {"message": "It was flagged.", "code": "content_filter", "type": "invalid_request_error"}
    body = orjson.dumps({"error": error})
    answer = chunked(b"data: " + body + b"\n\n") if stream else with_length(body)
    async with Upstream(answer) as one, StandIn() as two, gateway(one, two, rounds=3, as_served=True) as served:
        answers = [await served.chat(model="chat", stream=stream) for _ in range(4)]
        asked = len(one.requests)

    assert {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(400, "content_refused")}
    assert (asked, len(two.requests)) == (4, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_field_that_one_providers_protocol_lacks_takes_the_chat_to_another(
    gateway: Opens, stream: bool
) -> None:
    async with StandIn() as one, StandIn() as two:
        config = config_for(one, two).replace("provider_type: openai", "provider_type: anthropic", 1)
        config = config.replace(one.openai_url, one.anthropic_url, 1)
        async with gateway(config=config, as_served=True) as served:
            answers = [
                await served.chat(model="chat", seed=1, stream=stream),
                await served.chat(model="first/chat", seed=1, stream=stream),
                await served.chat(model="first/chat", presence_penalty=0, user="somebody", stream=stream),
            ]

    assert [(answer.status_code, answer.headers.get("x-sekha-provider")) for answer in answers] == [
        (200, "second"),
        (400, None),
        (200, "first"),
    ]
    assert two.requests[0].json["seed"] == 1
    refused = answers[1].json()["error"]
    assert (refused["code"], refused["param"], refused["type"]) == (
        "field_unsupported",
        "seed",
        "invalid_request_error",
    )
    assert "no `seed`" in refused["message"]


async def test_a_storm_of_429_is_left_alone_while_another_answers(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, rounds=3) as served:
        one.fail(429, retry_after=30, times=None)
        started = time.perf_counter()
        answers = await asyncio.gather(*(served.chat(model="chat") for _ in range(20)))
        seconds = time.perf_counter() - started
        asked = len(one.requests)
        answers.append(await served.chat(model="chat"))

    assert {answer.headers["x-sekha-provider"] for answer in answers} == {"second"}
    # Those that were on their way before the first of them was told, and none after it.
    assert 1 <= asked <= 20
    assert len(one.requests) == asked
    assert seconds < 10


async def test_a_provider_is_asked_again_when_it_said_that_it_may(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, rounds=3) as served:
        standin.fail(429, retry_after=0.1, times=2)
        started = time.perf_counter()
        response = await served.chat(model="chat")
        seconds = time.perf_counter() - started

    assert response.json()["sekha"]["attempts"] == 3
    assert seconds >= 0.2


async def test_who_asks_to_wait_longer_than_there_is_time_is_not_waited_for(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, rounds=3, timeout_secs=1) as served:
        standin.fail(429, retry_after=60, times=None)
        started = time.perf_counter()
        response = await served.chat(model="chat")
        seconds = time.perf_counter() - started

    assert (response.status_code, response.headers["retry-after"]) == (429, "60")
    assert seconds < 1
    assert len(standin.requests) == 1


@pytest.mark.parametrize("as_served", [False, True])
async def test_who_said_how_long_to_wait_is_left_alone_by_the_requests_after_it(
    gateway: Opens, as_served: bool
) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, rounds=3, as_served=as_served) as served:
        one.fail(429, retry_after=60)
        answers = [await served.chat(model="chat") for _ in range(3)]
        route = (await served.http.post("/api/v1/route", json={"model": "chat"})).json()
        health = (await served.http.get("/api/v1/health/providers")).json()
        chats = [each for each in one.requests if each.method == "POST"]

    assert {answer.headers["x-sekha-provider"] for answer in answers} == {"second"}
    assert [answer.json()["sekha"]["attempts"] for answer in answers] == [2, 1, 1]
    assert len(chats) == 1
    passed = next(each for each in route["candidates"] if each["provider_id"] == "first")
    assert (passed["place"], passed["rule"]) == (2, None)
    assert 50 < passed["throttled_seconds"] <= 60
    first = next(each for each in health["providers"] if each["provider_id"] == "first")
    assert first["status"] == "degraded"
    assert 50 < first["paused_seconds"]["chat"] <= 60


@pytest.mark.parametrize("as_served", [False, True])
async def test_where_there_is_no_other_the_next_request_waits_what_is_left_and_asks_once(
    gateway: Opens, as_served: bool
) -> None:
    async with StandIn() as standin, gateway(standin, rounds=3, as_served=as_served) as served:
        await served.chat(model="first/chat")  # from the second on, the short way is taken
        standin.fail(429, retry_after=1)
        started = time.perf_counter()
        first = asyncio.create_task(served.chat(model="first/chat"))
        await wait_until(served.serving.resources.pauses.now)
        second = await served.chat(model="first/chat")
        seconds = time.perf_counter() - started
        await first

    assert second.json()["sekha"]["attempts"] == 1
    assert 0.9 <= seconds < 1.8
    assert len(standin.requests) == 4


@pytest.mark.parametrize("as_served", [False, True])
async def test_who_is_left_alone_is_asked_when_that_is_over_and_the_others_failed(
    gateway: Opens, as_served: bool
) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, rounds=3, as_served=as_served) as served:
        await served.chat(model="chat")
        one.fail(429, retry_after=2)
        await served.chat(model="chat")
        two.fail(500, times=None)
        answer = await served.chat(model="chat")

    assert answer.headers["x-sekha-provider"] == "first"
    assert answer.json()["sekha"]["attempts"] == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_served", [False, True])
async def test_whoever_asks_to_be_left_alone_for_ages_is_so_for_an_hour_and_the_first_caller_is_told_that_too(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served) as served:
        await served.chat(model="first/chat")  # from the second on, the short way is taken
        standin.fail(429, retry_after="99999999999999999999")
        first = await served.chat(model="first/chat", stream=stream)
        second = await served.chat(model="first/chat", stream=stream)

    assert (first.status_code, first.headers["retry-after"]) == (429, "3600")
    assert 3500 < int(second.headers["retry-after"]) <= 3600
    assert "retry after 3600 s" in first.json()["error"]["message"]


async def test_who_is_left_alone_for_longer_than_a_request_may_take_is_a_429_at_once(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, rounds=3, timeout_secs=1) as served:
        standin.fail(429, retry_after=60, times=None)
        await served.chat(model="chat")
        started = time.perf_counter()
        response = await served.chat(model="chat")
        seconds = time.perf_counter() - started

    assert response.status_code == 429
    assert response.json()["error"]["code"] == "rate_limited"
    assert 50 < int(response.headers["retry-after"]) <= 60
    assert seconds < 1
    assert len(standin.requests) == 1


@pytest.mark.parametrize("as_served", [False, True])
async def test_a_fallback_keeps_the_limits_of_whom_it_falls_back_to(gateway: Opens, as_served: bool) -> None:
    async def fails(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Every plan is made while there is still room behind.
        await wait_until(lambda: len(one.requests) >= 12)
        writer.write(with_length(b"", status="500 No"))

    async with Upstream(fails) as one, StandIn() as two:
        config = config_for(one, two, extra="routing: {circuit_breaker: {failure_threshold: 1000}}")
        config = config.replace("- id: second\n", "- id: second\n    limits: {requests_per_minute: 3}\n")
        async with gateway(config=config, rounds=3, as_served=as_served) as served:
            answers = await asyncio.gather(*(served.chat(model="chat") for _ in range(12)))

    by_status = {status: [each for each in answers if each.status_code == status] for status in (200, 503)}
    assert (len(by_status[200]), len(by_status[503]), len(two.requests)) == (3, 9, 3)
    # The one that failed may be well at once, whoever else is full for a minute.
    assert not any("retry-after" in each.headers for each in by_status[503])


async def test_a_retry_keeps_the_limits_too(gateway: Opens) -> None:
    async with StandIn() as standin:
        standin.fail(500, times=None)
        config = config_for(standin)
        config = config.replace("- id: first\n", "- id: first\n    limits: {requests_per_minute: 1}\n")
        async with gateway(config=config, rounds=3) as served:
            response = await served.chat(model="chat")

    assert (response.status_code, len(standin.requests)) == (503, 1)
    assert 50 < float(response.headers["retry-after"]) <= 62


async def test_a_provider_that_keeps_failing_is_not_asked_any_more(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=3))
    async with StandIn() as one, StandIn() as two, gateway(one, two, circuits=circuits) as served:
        one.fail(500, times=None)
        answers = [await served.chat(model="chat") for _ in range(5)]
        asked = len(one.requests)
        two.fail(500, times=None)
        last = [await served.chat(model="chat") for _ in range(4)][-1]

    assert [answer.headers["x-sekha-provider"] for answer in answers] == ["second"] * 5
    assert asked == 3
    assert last.status_code == 503
    assert last.json()["error"]["code"] in ("circuit_open", "no_candidate")
    assert last.headers["x-should-retry"] == "true"


# --- who leaves ----------------------------------------------------------------------------


async def _ask_and_leave(served: Served, standin: StandIn, **fields: Any) -> None:
    """Send a request and close the connection once a provider was asked."""
    body = orjson.dumps({"messages": [{"role": "user", "content": "Hello there."}], **fields})
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    async with asyncio.timeout(2):
        await standin.arrived.wait()
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_provider_is_left_too_when_the_caller_leaves_before_the_answer(gateway: Opens, stream: bool) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.hang()
        await _ask_and_leave(served, standin, stream=stream)
        async with asyncio.timeout(1):
            await standin.abandoned.wait()
        await wait_until(lambda: _nothing_held(served))
        after = await served.chat()

    assert after.status_code == 200
    assert len(standin.requests) == 2


async def test_who_leaves_while_an_attempt_is_waited_for_ends_it(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, rounds=3) as served:
        standin.fail(429, retry_after=5, times=None)
        await _ask_and_leave(served, standin, model="chat")
        await wait_until(lambda: _nothing_held(served), seconds=1)

    assert len(standin.requests) == 1


async def test_who_leaves_in_the_middle_of_a_body_asked_for_nothing(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"messages": [')
        await writer.drain()
        writer.close()
        after = await served.chat()

    assert after.status_code == 200
    assert len(standin.requests) == 1


# --- money ---------------------------------------------------------------------------------


async def test_an_outcome_that_nobody_knows_is_charged_at_its_worst(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, timeout_secs=0.3) as served:
        one.hang()
        asking = asyncio.create_task(served.chat(model="chat"))
        await one.arrived.wait()
        held = await served.held()
        response = await asking
        costs = {line["group"]: line["cost"] for line in await _costs(served)}
        held_after = await served.held()

    # Held is the dearer's worst case, and the dearer costs twice as much.
    assert costs["first"] == pytest.approx(float(held) / 2)
    assert costs["first"] + costs["second"] == pytest.approx(response.json()["sekha"]["cost"])
    assert held_after == 0


async def test_a_lost_attempt_and_the_one_after_it_are_both_paid_for(gateway: Opens) -> None:
    worst = await _worst_case(gateway)
    async with StandIn() as standin, gateway(standin, rounds=2, timeout_secs=0.3) as served:
        standin.hang()
        response = await served.chat(model="chat")
        spent, held = await served.spent(), await served.held()

    assert response.status_code == 200
    assert float(spent) == pytest.approx(response.json()["sekha"]["cost"])
    assert spent > worst
    assert held == 0


async def test_a_connection_that_is_lost_while_a_chat_is_worked_on_is_a_failed_attempt_and_paid_for(
    gateway: Opens,
) -> None:
    worst = await _worst_case(gateway)

    async def works(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        writer.close()

    async with (
        Upstream(with_length(ANSWERED), works) as one,
        StandIn() as two,
        gateway(one, two, rounds=1, as_served=True) as served,
    ):
        await served.chat(model="chat")
        before = await served.spent()
        response = await served.chat(model="chat")
        spent = await served.spent() - before

    said = response.json()["sekha"]
    assert (response.status_code, said["provider_id"], said["attempts"], len(one.requests)) == (200, "second", 2, 2)
    assert float(spent) == pytest.approx(said["cost"])
    assert spent > worst


async def test_a_lost_attempt_is_the_last_when_the_budget_cannot_hold_another(gateway: Opens) -> None:
    worst = await _worst_case(gateway)
    small = f"{{name: small, limit: {worst * Decimal('1.5')}}}"
    async with StandIn() as standin, gateway(standin, rounds=2, timeout_secs=0.3, budgets=[small]) as served:
        standin.hang()
        response = await served.chat(model="chat")
        spent, held = await served.spent(), await served.held("small")

    assert response.status_code == 402
    assert response.json()["error"]["code"] == "budget_exceeded"
    assert (spent, held) == (worst, 0)
    assert len(standin.requests) == 1


@pytest.mark.parametrize("hanging", [False, True])
async def test_many_at_once_never_pass_a_nearly_spent_budget(gateway: Opens, hanging: bool) -> None:
    worst = await _worst_case(gateway)
    limit = worst * Decimal("3.5")
    most_held: list[Decimal] = []
    async with (
        StandIn() as standin,
        gateway(standin, timeout_secs=0.3, budgets=[f"{{name: small, limit: {limit}}}"]) as served,
    ):
        standin.hang(times=None) if hanging else standin.slow(0.1, times=None)

        async def watch() -> None:
            resources = served.serving.resources
            budget = next(each for each in resources.budgets if each.name == "small")
            ledger = await resources.ledger()
            while True:
                # Both at one moment: read one after the other, what is settled in between counts twice.
                most_held.append(sum(await ledger.spent(budget, at=datetime.now(UTC)), Decimal(0)))
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(*(served.chat(model="chat") for _ in range(50)))
        watching.cancel()
        spent, held = await served.spent(), await served.held("small")

    admitted = [answer for answer in answers if answer.status_code != 402]
    assert {answer.status_code for answer in admitted} == {504 if hanging else 200}
    assert len(admitted) == len(standin.requests) >= 3
    assert spent <= limit
    assert max(most_held) <= limit
    assert held == 0
    assert all(answer.json()["error"]["code"] == "budget_exceeded" for answer in answers if answer.status_code == 402)


async def test_a_leased_budget_is_not_passed_either(gateway: Opens) -> None:
    worst = await _worst_case(gateway)
    limit = worst * Decimal("3.5")
    small = f"{{name: small, limit: {limit}}}"
    async with StandIn() as standin:
        standin.slow(0.1, times=None)
        async with gateway(standin, as_served=True, budgets=[small]) as served:
            answers = await asyncio.gather(*(served.chat(model="chat") for _ in range(50)))
        # Whoever opens it next finds what the one before spent, and nothing held.
        async with gateway(standin, budgets=[small]) as served:
            spent, held = await served.spent(), await served.held("small")

    admitted = [answer for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} == {200, 402}
    assert float(spent) == pytest.approx(sum(answer.json()["sekha"]["cost"] for answer in admitted))
    assert spent <= limit
    assert held == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": {"description": LONG}}}},
        {"functions": [{"name": "it", "description": LONG}]},
        {"prediction": {"type": "content", "content": LONG}},
        {"messages": [{"role": "assistant", "content": "y", "reasoning_content": LONG}]},
    ],
)
async def test_no_field_is_a_way_past_a_cap(gateway: Opens, fields: dict[str, Any]) -> None:
    async with StandIn() as standin, gateway(standin, as_served=True) as served:
        plain = await served.chat(model="chat", max_tokens=5, max_cost=0.1)
        # The second of its kind takes the short way, if it is one that may.
        again = await served.chat(model="chat", max_tokens=5)
        refused = await served.chat(model="chat", max_tokens=5, max_cost=0.1, **fields)
        answered = await served.chat(model="chat", max_tokens=5, **fields)

    assert [plain.status_code, again.status_code, answered.status_code] == [200, 200, 200]
    assert refused.status_code == 402
    assert refused.json()["error"]["code"] == "cost_refused"
    assert answered.json()["sekha"]["estimated_cost"] > 3
    assert len(standin.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cost_above_what_was_held_is_told_once_and_counted_each_time(
    gateway: Opens, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    usage = '"usage":{"prompt_tokens":5000,"completion_tokens":1,"total_tokens":5001}'
    if stream:
        said = '{"choices":[{"index":0,"delta":{"content":"y"},"finish_reason":"stop"}]}'
        whole = f'data: {said}\n\ndata: {{"choices":[],{usage}}}\n\ndata: [DONE]\n\n'
    else:
        whole = f'{{"choices":[{{"index":0,"message":{{"content":"y"}}}}],{usage}}}'
    kind = "text/event-stream" if stream else "application/json"
    answer = with_length(whole.encode(), f"Content-Type: {kind}")

    async with Upstream(answer) as upstream, gateway(upstream, as_served=True) as served:
        for _ in range(3):  # by the line, and then by the short way
            response = await served.chat("paint the boats blue", model="chat", max_tokens=5, stream=stream)
            assert response.status_code == 200
        metrics = (await served.http.get("/metrics")).text

    assert 'sekha_worst_case_passed_total{provider="first",model="chat"} 3' in metrics
    told = [record.getMessage() for record in caplog.records if record.name == "sekha.money"]
    assert len(told) == 1, "one a minute is enough"
    assert told[0].startswith("first/chat billed $5.00, and $0.0")
    assert "boats" not in caplog.text


async def _worst_case(gateway: Opens) -> Decimal:
    """Of a chat in one sentence at the first provider."""
    async with StandIn() as standin, gateway(standin) as served:
        routed = await served.http.post("/api/v1/route", json={"model": "chat", "messages": HELLO})
    return Decimal(str(routed.json()["worst_case_cost"]))


async def _costs(served: Served) -> list[dict[str, Any]]:
    costs: list[dict[str, Any]] = (await served.http.get("/api/v1/costs?by=provider")).json()["costs"]
    return costs


async def _nothing_held(served: Served) -> bool:
    return await served.held() == 0


async def test_who_leaves_before_the_answer_pays_for_the_worst_case(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.hang()

        with pytest.raises(httpx.TimeoutException):
            await served.http.post("/v1/chat/completions", json={"messages": HELLO}, timeout=0.4)
        await wait_until(served.calls)
        spent, held = await served.spent(), await served.held()

    # 100 tokens of a reply at 2,000 dollars a million, and what went in.
    assert spent > Decimal("0.2")
    assert held == 0


async def test_when_every_circuit_is_open_the_answer_says_when_to_come_back(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1, timeout_seconds=30))
    async with StandIn() as standin, gateway(standin, circuits=circuits) as served:
        standin.fail(500)
        await served.chat(model="chat")

        answer = await served.chat(model="chat")
        route = await served.http.post("/api/v1/route", json={"model": "chat"})

    assert (answer.status_code, route.status_code) == (503, 503)
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert 1 <= int(route.headers["retry-after"]) <= 30


async def test_while_a_circuit_is_probed_the_others_are_told_so_and_to_come_back_in_a_moment(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1, timeout_seconds=0))
    async with StandIn() as standin, gateway(standin, circuits=circuits) as served:
        standin.fail(500)
        await served.chat(model="chat")
        standin.hang()
        asked = len(standin.requests)
        probe = asyncio.create_task(served.chat(model="chat"))
        await wait_until(lambda: len(standin.requests) > asked)

        answer = await served.chat(model="chat")
        route = await served.http.post("/api/v1/route", json={"model": "chat"})
        probe.cancel()

    assert (answer.status_code, answer.headers["retry-after"], route.headers["retry-after"]) == (503, "1", "1")
    assert "half open" in answer.json()["error"]["reasons"][0]["why"]
    assert route.json()["candidates"][0]["circuit"] == "half_open"
    assert "half open" in route.json()["candidates"][0]["reason"]
    assert len(standin.requests) == asked + 1
