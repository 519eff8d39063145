"""What goes wrong, as OpenAI's own SDK meets it: its classes, and what it may try again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import openai
import pytest

from sekha.keys import hash_of, new_key
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served
from tests.fixtures.upstream import Upstream, with_length

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

SECRET = "the plan is to paint the boats blue"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": SECRET}]


async def _ask(served: Served, **fields: Any) -> ChatCompletion:
    reply: ChatCompletion = await served.openai.chat.completions.create(model="chat", messages=HELLO, **fields)
    return reply


FAULTS: dict[str, tuple[Callable[[StandIn], None], type[openai.APIStatusError], int, str]] = {
    "400": (lambda s: s.fail(400), openai.BadRequestError, 400, "provider_rejected"),
    "content policy": (lambda s: s.refuse_content(), openai.BadRequestError, 400, "content_refused"),
    "context window": (lambda s: s.exceed_context(), openai.BadRequestError, 400, "context_exceeded"),
    "our key": (lambda s: s.fail(401), openai.InternalServerError, 502, "provider_auth_failed"),
    "forbidden": (lambda s: s.fail(403), openai.InternalServerError, 502, "provider_auth_failed"),
    "no such model": (lambda s: s.fail(404), openai.InternalServerError, 502, "provider_model_not_found"),
    "429": (lambda s: s.fail(429), openai.RateLimitError, 429, "rate_limited"),
    "500": (lambda s: s.fail(500), openai.InternalServerError, 503, "provider_unavailable"),
    "503": (lambda s: s.fail(503), openai.InternalServerError, 503, "provider_unavailable"),
    "dropped": (lambda s: s.drop(), openai.InternalServerError, 503, "provider_unavailable"),
    "garbage": (lambda s: s.garbage(), openai.InternalServerError, 502, "provider_bad_reply"),
    "hang": (lambda s: s.hang(), openai.InternalServerError, 504, "provider_timeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_providers_failure_has_its_class_in_the_sdk(gateway: Opens, fault: str) -> None:
    plan, kind, status, code = FAULTS[fault]
    async with StandIn() as standin, gateway(standin, timeout_secs=0.3) as served:
        plan(standin)

        with pytest.raises(kind) as caught:
            await _ask(served)

    assert caught.value.status_code == status
    assert caught.value.code == code
    assert caught.value.request_id
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["provider_id"] == "first"
    assert [attempt["error"] for attempt in caught.value.body["attempts"]] == [code]
    assert SECRET not in caught.value.response.text


async def test_retry_after_is_kept(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.fail(429, retry_after=17)

        with pytest.raises(openai.RateLimitError) as caught:
            await _ask(served)

    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("17", "17000")


async def test_no_key_and_a_wrong_one_are_refused_in_the_same_shape(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, extra=_keys(new_key())) as served:
        without = await served.chat()
        with pytest.raises(openai.AuthenticationError) as caught:
            await _ask(served)

    wrong = caught.value.response
    for response in (without, wrong):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert not standin.requests


async def test_the_right_key_is_let_in(gateway: Opens) -> None:
    key = new_key()
    async with StandIn() as standin, gateway(standin, extra=_keys(key), api_key=key) as served:
        reply = await _ask(served)
        by_key = (await served.http.get("/api/v1/costs?by=key", headers={"Authorization": f"bearer {key}"})).json()

    assert reply.choices
    assert [line["group"] for line in by_key["costs"]] == ["research"]
    # The provider is given its own key or none, and never the caller's.
    assert key not in str(standin.requests)


async def test_an_unknown_model_is_not_found(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        with pytest.raises(openai.NotFoundError, match="Did you mean 'chat'") as caught:
            await served.openai.chat.completions.create(model="chatt", messages=HELLO)

    assert caught.value.code == "model_not_found"


async def test_a_field_that_is_wrong_is_named(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await _ask(served, n="three")

    assert (caught.value.param, caught.value.code) == ("n", "invalid_request")
    assert not standin.requests


@pytest.mark.parametrize(("fault", "asked"), [(503, 3), (401, 1), (400, 1)])
async def test_the_sdk_tries_again_only_what_may_succeed(gateway: Opens, fault: int, asked: int) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.fail(fault, retry_after="0.01" if fault == 503 else None, times=None)

        with pytest.raises(openai.APIStatusError) as caught:
            await served.openai.with_options(max_retries=2).chat.completions.create(model="chat", messages=HELLO)

    assert len(standin.requests) == asked
    assert caught.value.response.headers["x-should-retry"] == ("true" if asked > 1 else "false")


async def test_the_sdk_waits_as_long_as_the_provider_says_and_then_succeeds(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.fail(429, retry_after="0.05", times=2)
        reply = await served.openai.with_options(max_retries=2).chat.completions.create(model="chat", messages=HELLO)

    assert reply.choices
    assert len(standin.requests) == 3


# --- money ---------------------------------------------------------------------------------


async def test_what_would_cost_too_much_is_refused_with_the_cheapest_there_is(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        response = await served.chat(max_cost=0.001)

    error = response.json()["error"]
    assert response.status_code == 402
    assert (error["code"], error["type"]) == ("cost_refused", "insufficient_quota")
    assert error["cheapest"]["model"] == "first/chat"
    assert error["cheapest"]["estimated_cost"] > error["limit"] == 0.001
    assert response.headers["x-should-retry"] == "false"
    assert not one.requests
    assert not two.requests


async def test_a_spent_budget_refuses_and_says_when_it_starts_anew(gateway: Opens) -> None:
    small = "{name: small, limit: 0.35, period: month, match: {model: chat}}"
    async with StandIn() as standin, gateway(standin, budgets=[small]) as served:
        await served.chat("word " * 100)
        with pytest.raises(openai.APIStatusError) as caught:
            await _ask(served)
        elsewhere = await served.chat(model="eyes")

    error = caught.value.body
    assert isinstance(error, dict)
    assert caught.value.status_code == 402
    assert (error["code"], error["budget"]) == ("budget_exceeded", "small")
    assert 0 < error["remaining"] < 0.1
    assert error["resets"]
    assert elsewhere.status_code == 200


def _keys(key: str) -> str:
    return f"keys:\n  - {{name: research, hash: '{hash_of(key)}'}}"


@pytest.mark.parametrize(
    ("param", "told"), [(b'"messages[0].content"', "messages[0].content"), (b'"no field at all"', None), (b"[1]", None)]
)
@pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])
async def test_the_field_that_a_provider_calls_wrong_is_told(
    gateway: Opens, as_served: bool, param: bytes, told: str | None
) -> None:
    said = b'{"error":{"message":"No.","type":"invalid_request_error","param":' + param + b"}}"
    answer = with_length(said, status="400 Bad Request")
    async with Upstream(answer) as upstream, gateway(upstream, as_served=as_served) as served:
        response = await served.chat(model="chat")

    assert (response.status_code, response.json()["error"]["param"]) == (400, told)
