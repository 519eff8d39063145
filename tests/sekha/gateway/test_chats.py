"""Whole answers over HTTP: what the caller sends goes through as it is, and the reply says who gave it."""

from __future__ import annotations

import asyncio
import base64
import struct
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, config_for, payloads
from tests.fixtures.upstream import Upstream, with_length

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there."}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says what the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# As far as anybody looks: the first bytes of a PNG of 64 by 32.
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 64, 32) + b"\x08\x02\x00\x00\x00"
BASE64 = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
ADDRESS = "https://example.com/cat.png"


def _note(reply: ChatCompletion) -> dict[str, Any]:
    assert reply.model_extra is not None
    note = reply.model_extra["sekha"]
    assert isinstance(note, dict)
    return note


async def test_a_reply_says_who_gave_it_and_what_it_cost(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        answered = await served.openai.chat.completions.with_raw_response.create(model="chat", messages=HELLO)
        reply = answered.parse()
        spent = await served.spent()

    note = _note(reply)
    assert reply.choices[0].message.content == "You said: Hello there."
    # Two words at $1,000 a million, and four at $2,000.
    assert float(answered.headers["x-sekha-cost"]) == note["cost"] == float(spent) == 0.01
    assert answered.headers["x-sekha-provider"] == note["provider_id"] == "first"
    assert answered.headers["x-sekha-model"] == note["model_id"] == "chat"
    assert note["attempts"] == 1
    assert note["estimated_cost"] >= note["cost"]
    assert note["run_id"]
    assert answered.headers["x-request-id"] == reply._request_id


async def test_a_callers_request_id_comes_back(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.http.post(
            "/v1/chat/completions", json={"messages": HELLO}, headers={"X-Request-ID": "abc123"}
        )

    assert response.headers["x-request-id"] == "abc123"


async def test_fields_that_are_not_ours_reach_the_provider_as_they_came(gateway: Opens) -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "stop": ["\n", "END"],
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0.25,
        "top_p": 0.5,
        "user": "u-1",
        "timeout": 30,
        "frequency_penalty": 0.5,
        "logit_bias": {"50256": -100},
        "parallel_tool_calls": False,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "object"}}},
    }
    async with StandIn() as standin, gateway(standin) as served:
        await served.openai.chat.completions.create(model="chat", messages=HELLO, max_tokens=9, extra_body=fields)
        sent = standin.requests[-1].json

    assert {name: sent[name] for name in fields} == fields
    assert sent["max_tokens"] == 9
    assert sent["messages"] == HELLO


@pytest.mark.parametrize("as_served", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_keeps_the_callers_name_for_it(gateway: Opens, as_served: bool, stream: bool) -> None:
    limits: list[dict[str, int]] = [
        {"max_tokens": 7},
        {"max_completion_tokens": 7},
        {"max_tokens": 9, "max_completion_tokens": 7},
        {},
    ]
    async with StandIn() as standin, gateway(standin, as_served=as_served) as served:
        await served.chat(model="chat")  # the first of its kind is met in the line
        for limit in limits:
            await served.chat(model="chat", stream=stream, **limit)
        asked = [{name: value for name, value in sent.json.items() if "_tokens" in name} for sent in standin.requests]

    assert asked[1:4] == [{"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_completion_tokens": 7}]
    assert asked[4].keys() <= {"max_tokens"}


async def test_a_limit_of_ours_reaches_a_model_that_takes_it_by_its_newer_name_alone(gateway: Opens) -> None:
    said = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    async with StandIn() as standin, gateway(standin, as_served=True) as served:
        await served.chat(model="chat")
        standin.fail(400, message=said)
        answers = [await served.chat(model="chat", max_tokens=5) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3
    names = [name for sent in standin.requests[1:] for name in sent.json if "_tokens" in name]
    assert names == ["max_tokens", *["max_completion_tokens"] * 3]


async def test_our_own_fields_stay_here(gateway: Opens) -> None:
    ours = {"task": "chat_small", "max_cost": 5, "preferred_model": "chat", "require_vision": False}
    async with StandIn() as standin, gateway(standin) as served:
        await served.openai.chat.completions.create(
            model="auto", messages=HELLO, metadata={"team": "search"}, extra_body=ours
        )
        sent = standin.requests[-1].json

    assert not sent.keys() & {*ours, "store", "metadata"}
    assert sent["model"] == "chat"


@pytest.mark.parametrize("kind", ["openai", "openrouter", "anthropic", "ollama"])
@pytest.mark.parametrize("store", [False, True, None])
async def test_whether_to_store_it_is_said_to_whoever_may_store_it(
    gateway: Opens, kind: str, store: bool | None
) -> None:
    async with StandIn() as standin:
        config = THINKER.format(url=getattr(standin, f"{kind}_url")).replace("type: anthropic", f"type: {kind}")
        async with gateway(config=config) as served:
            answer = await served.chat(model="claude-sonnet-4-5", store=store)

    assert answer.status_code == 200
    # Others who speak OpenAI's protocol store nothing, and some refuse the field.
    kept = kind == "openrouter" or (kind == "openai" and store is True)
    assert [sent.json.get("store") for sent in standin.requests] == [store if kept else None]


async def test_every_reply_and_its_log_probabilities_come_back(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        reply = await served.openai.chat.completions.create(model="chat", messages=HELLO, n=3, logprobs=True)

    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {"You said: Hello there."}
    logprobs = reply.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [said.logprob for said in logprobs.content] == [-0.25] * 4


@pytest.mark.parametrize("as_served", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_several_replies_at_once_do_not_make_one_look_longer(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin:
        async with gateway(standin, as_served=as_served) as served:
            for _ in range(12):
                await served.chat(model="chat", n=8, stream=stream)
        async with gateway(standin, as_served=as_served) as served:
            asked = {"model": "chat", "messages": HELLO}
            routed = [(await served.http.post("/api/v1/route", json={**asked, "n": n})).json() for n in (1, 8)]

    estimates = [each["candidates"][0]["price"] for each in routed]
    assert [(each["reply_length"], each["output_tokens"]) for each in estimates] == [("history", 4), ("history", 32)]


async def test_a_tool_is_called_and_its_result_is_answered(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        asked: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Reykjavik"}]
        first = await served.openai.chat.completions.create(model="chat", messages=asked, tools=[WEATHER])
        (call,) = first.choices[0].message.tool_calls or ()
        assert call.type == "function"
        result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        answered = await served.openai.chat.completions.create(
            model="chat",
            messages=[*asked, first.choices[0].message.model_dump(exclude_none=True), result],  # type: ignore[list-item]
            tools=[WEATHER],
        )

    assert first.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city":"Reykjavik"}')
    assert answered.choices[0].message.content == "You said: Rain."


async def test_a_blocking_client_is_served_as_well(gateway: Opens) -> None:
    from openai import OpenAI

    async with StandIn() as standin, gateway(standin) as served:

        def ask() -> str | None:
            with OpenAI(base_url=served.v1, api_key="nobody's", max_retries=0) as client:
                return client.chat.completions.create(model="chat", messages=HELLO).choices[0].message.content

        said = await asyncio.to_thread(ask)

    assert said == "You said: Hello there."


# --- which model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "answers"),
    [
        ("chat", "first/chat"),
        ("second/chat", "second/chat"),
        ("chat_small", "first/chat"),
        ("vision", "first/eyes"),
        ("auto", "first/chat"),
        (None, "first/chat"),
        ("", "first/chat"),
    ],
)
async def test_a_model_may_be_named_in_several_ways(gateway: Opens, named: str | None, answers: str) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        response = await served.chat(**{} if named is None else {"model": named})

    assert f"{response.headers['x-sekha-provider']}/{response.headers['x-sekha-model']}" == answers


async def test_the_preferred_model_goes_first_and_others_stand_behind_it(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        preferred = await served.chat(preferred_model="second/chat")
        two.fail(500)
        behind = await served.chat(preferred_model="second/chat")

    assert preferred.headers["x-sekha-provider"] == "second"
    assert behind.headers["x-sekha-provider"] == "first"


@pytest.mark.parametrize("field", ["model", "preferred_model"])
async def test_an_unknown_model_is_refused_with_the_nearest_name(gateway: Opens, field: str) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.chat(**{field: "chatt"})

    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["code"], error["type"]) == ("model_not_found", "not_found_error")
    assert "Did you mean 'chat'?" in error["message"]
    assert not standin.requests


async def test_an_unknown_task_is_refused_with_the_tasks_that_there_are(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.chat(task="chat_smal")

    assert response.status_code == 404
    assert "Did you mean 'chat_small'?" in response.json()["error"]["message"]


# --- images --------------------------------------------------------------------------------


async def test_images_go_to_a_model_that_sees_them_as_they_were_sent(gateway: Opens) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What are these?"},
                {"type": "image_url", "image_url": {"url": ADDRESS, "detail": "high"}},
                {"type": "image_url", "image_url": {"url": BASE64, "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": "A cat and a dot."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": BASE64}}]},
    ]
    async with StandIn() as standin, gateway(standin) as served:
        reply = await served.openai.chat.completions.create(model="auto", messages=messages)
        sent = standin.requests[-1].json

    assert _note(reply)["model_id"] == "eyes"
    assert sent["messages"] == messages


async def test_a_blind_model_is_not_asked_about_an_image(gateway: Opens) -> None:
    seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ADDRESS}}]}]
    async with StandIn() as standin, gateway(standin) as served:
        response = await served.http.post("/v1/chat/completions", json={"model": "chat", "messages": seen})

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_capable", "messages[0].content[0].image_url")
    assert "Ask for one that can: eyes." in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert not standin.requests


@pytest.mark.parametrize("kind", ["openai", "anthropic", "ollama"])
async def test_an_image_reaches_each_provider_in_its_own_shape(gateway: Opens, kind: str) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": BASE64}}]
    async with StandIn() as standin, gateway(config=config_for(standin, kind=kind)) as served:
        response = await served.http.post(
            "/v1/chat/completions", json={"model": "auto", "messages": [{"role": "user", "content": parts}]}
        )
        sent = standin.requests[-1].json["messages"][0]

    assert response.status_code == 200, response.text
    encoded = base64.b64encode(PNG).decode()
    match kind:
        case "openai":
            assert sent["content"] == parts
        case "anthropic":
            assert sent["content"][1]["source"] == {"type": "base64", "media_type": "image/png", "data": encoded}
        case _:
            assert sent["images"] == [encoded]


@pytest.mark.parametrize("kind", ["anthropic", "ollama", "openrouter"])
async def test_other_protocols_answer_in_openais_shape(gateway: Opens, kind: str) -> None:
    async with StandIn() as standin, gateway(config=config_for(standin, kind=kind)) as served:
        reply = await served.openai.chat.completions.create(model="chat", messages=HELLO)
        called = await served.openai.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "Reykjavik"}], tools=[WEATHER]
        )

    assert reply.choices[0].message.content == "You said: Hello there."
    assert reply.usage is not None
    assert _note(reply)["cost"] == pytest.approx(0.01)
    (call,) = called.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"


# --- what it cost --------------------------------------------------------------------------


async def test_usage_that_no_provider_reports_is_counted_and_marked(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.omit_usage()
        reply = await served.openai.chat.completions.create(model="chat", messages=HELLO)
        spent = await served.spent()

    note = _note(reply)
    assert note["usage"] == "counted"
    assert note["cost"] == float(spent) > 0
    assert reply.usage is not None
    # Whoever asks the SDK finds what was counted: at $1,000 a million tokens that go in, and $2,000 that come out.
    assert (reply.usage.prompt_tokens + 2 * reply.usage.completion_tokens) / 1000 == pytest.approx(note["cost"])
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


LONG = "thinking it over " * 100
SPOKEN: dict[str, dict[str, Any]] = {
    "reasoning_content": {"content": "4", "reasoning_content": LONG},
    "reasoning": {"content": "4", "reasoning": LONG},
    "refusal": {"content": None, "refusal": LONG},
    "parts": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": LONG}]}]},
    "tool": {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": LONG}}]},
    "custom tool": {"content": None, "tool_calls": [{"id": "1", "custom": {"name": "f", "input": LONG}}]},
    "function": {"content": None, "function_call": {"name": "f", "arguments": LONG}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("usage", ["", ',"usage":null', ',"usage":{"prompt_tokens":0,"completion_tokens":0}'])
@pytest.mark.parametrize("how", SPOKEN)
async def test_thoughts_refusals_and_calls_are_counted_where_no_usage_is_reported(
    gateway: Opens, how: str, usage: str, stream: bool
) -> None:
    said = orjson.dumps(SPOKEN[how]).decode()
    if stream:
        piece = f'{{"choices":[{{"index":0,"delta":{said},"finish_reason":"stop"}}]}}'
        last = f'data: {{"choices":[]{usage}}}\n\n' if usage else ""
        answer = with_length(f"data: {piece}\n\n{last}data: [DONE]\n\n".encode(), "Content-Type: text/event-stream")
    else:
        whole = f'{{"choices":[{{"index":0,"message":{said}}}]{usage}}}'
        answer = with_length(whole.encode(), "Content-Type: application/json")

    async with Upstream(answer) as upstream, gateway(upstream) as served:
        if stream:
            _, text = await served.stream(model="chat", stream_options={"include_usage": True})
            *_, body = payloads(text)
        else:
            body = (await served.chat(model="chat")).json()
        spent = await served.spent()

    assert body["sekha"]["usage"] == "counted"
    assert body["usage"]["completion_tokens"] >= 300
    assert float(spent) == body["sekha"]["cost"] > 0.6


async def test_tokens_that_the_provider_had_cached_cost_less(gateway: Opens) -> None:
    config = """
        providers:
          - id: first
            provider_type: openai
            base_url: {url}
            models:
              - model_id: chat
                task: chat_small
                price: {{input_per_million: 1000, output_per_million: 0, cached_input_per_million: 100}}
        """
    async with StandIn() as standin, gateway(config=config.format(url=standin.openai_url)) as served:
        standin.cached_tokens = 1
        reply = await served.openai.chat.completions.create(model="chat", messages=HELLO)

    assert _note(reply)["cost"] == pytest.approx(0.0011)


async def test_costs_are_reported_by_provider_and_tag(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        await served.chat(metadata={"team": "search"})
        await served.chat()
        by_provider = (await served.http.get("/api/v1/costs")).json()
        by_tag = (await served.http.get("/api/v1/costs?by=tag")).json()

    assert [(line["group"], line["calls"]) for line in by_provider["costs"]] == [("first", 2)]
    assert ("team:search", 1) in [(line["group"], line["calls"]) for line in by_tag["costs"]]


# --- whose move it is when nobody can be asked ------------------------------------------------


async def test_a_history_that_fits_no_window_is_refused_as_openai_refuses_it(gateway: Opens) -> None:
    async with StandIn() as standin:
        config = config_for(standin).replace("- model_id: chat\n", "- model_id: chat\n        context_window: 20\n")
        async with gateway(config=config) as served:
            response = await served.chat("word " * 30, model="chat")
            route = await served.http.post(
                "/api/v1/route", json={"model": "chat", "messages": [{"role": "user", "content": "word " * 30}]}
            )

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "maximum context length is 20 tokens, of 'first/chat'" in error["message"]
    assert route.json()["error"] == error
    assert not standin.requests


async def test_tools_do_not_go_to_a_model_that_is_said_not_to_call_them(gateway: Opens) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    async with StandIn() as one, StandIn() as two:
        config = config_for(one, two).replace("- model_id: chat\n", "- model_id: chat\n        SAID\n")
        config = config.replace("SAID", "supports_function_calling: false", 1)
        config = config.replace("SAID", "supports_function_calling: true", 1)
        async with gateway(config=config) as served:
            answer = await served.chat(model="chat", tools=tools)
            nobody = await served.chat(model="first/chat", tools=tools)

    assert answer.headers["x-sekha-provider"] == "second"
    assert nobody.status_code == 400
    assert (nobody.json()["error"]["code"], nobody.json()["error"]["param"]) == ("model_not_capable", "tools")
    assert not one.requests


async def test_what_is_too_dear_at_the_model_that_was_named_is_offered_at_the_cheapest(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        refused = (await served.chat(model="second/chat", max_tokens=10, max_cost=0.035)).json()["error"]
        route = (
            await served.http.post("/api/v1/route", json={"model": "second/chat", "max_tokens": 10, "max_cost": 0.035})
        ).json()["error"]
        both = (await served.chat(model="second/chat", max_tokens=10, max_cost=0.001)).json()["error"]

    assert (refused["code"], refused["cheapest"]["model"]) == ("cost_refused", "first/chat")
    assert refused["cheapest"]["within_limit"] is True
    assert refused["cheapest"]["estimated_cost"] <= 0.035
    assert "'first/chat' would do for" in refused["message"]
    assert route["cheapest"]["model"] == "first/chat"
    assert both["cheapest"]["within_limit"] is False
    assert "which is above it too" in both["message"]


async def test_where_every_providers_limits_are_reached_the_caller_is_told_when_to_come_back(gateway: Opens) -> None:
    async with StandIn() as standin:
        config = config_for(standin).replace("  priority: 1", "  priority: 1\n    limits: {requests_per_minute: 1}")
        async with gateway(config=config) as served:
            first, second = await served.chat(model="chat"), await served.chat(model="chat")

    assert first.status_code == 200
    assert (second.status_code, second.json()["error"]["code"]) == (429, "limits_reached")
    assert 1 <= int(second.headers["retry-after"]) <= 61
    assert second.headers["x-should-retry"] == "true"


MAPPED = """
providers:
  - id: first
    provider_type: openai
    base_url: {url}
    models: [{{model_id: gpt-4o-mini, task: chat_small}}]
"""
SOUND = {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"web_search_options": {}}, "web_search_options"),
        ({"service_tier": "scale"}, "service_tier"),
        ({"service_tier": "priority", "web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "user", "content": [SOUND]}]}, "messages"),
    ],
)
async def test_what_nobody_knows_the_price_of_is_the_callers_to_leave_out(
    gateway: Opens, fields: dict[str, Any], param: str
) -> None:
    async with StandIn() as standin, gateway(config=MAPPED.format(url=standin.openai_url)) as served:
        answer = await served.chat(**fields)

    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["x-should-retry"]) == (400, "false")
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "price_unknown", param)
    assert "Leave" in error["message"]
    assert standin.requests == []


HOSTED = """
providers:
  - id: first
    provider_type: openrouter
    base_url: {url}
    models:
      - {{model_id: openai/gpt-4o-mini, task: chat_small{price}}}
      - {{model_id: openai/text-embedding-3-small, task: embedding, dimension: 1536{price}}}
"""
EMBEDDING = {"model": "openai/text-embedding-3-small", "input": "a"}


@pytest.mark.parametrize("price", ["", ", price: free"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", ["anthropic/claude-opus-4.1"]),
        ("route", "cheapest"),
        ("preset", "mine"),
        ("fallbacks", [{"model": "anthropic/claude-opus-4.1"}]),
    ],
)
async def test_no_provider_is_let_answer_with_another_model(
    gateway: Opens, field: str, value: object, price: str
) -> None:
    async with StandIn() as standin, gateway(config=HOSTED.format(url=standin.openai_url, price=price)) as served:
        chat = await served.chat(model="openai/gpt-4o-mini", **{field: value})
        stream = await served.chat(model="openai/gpt-4o-mini", stream=True, **{field: value})
        embedding = await served.http.post("/v1/embeddings", json=EMBEDDING | {field: value})

    for answer in (chat, stream, embedding):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", field)
        assert f"Leave `{field}` out, and list that model in sekha.yaml" in error["message"]
    assert standin.requests == []


@pytest.mark.parametrize("route", [None, "fallback"])
async def test_fields_that_name_no_other_model_stand_in_nobodys_way(gateway: Opens, route: str | None) -> None:
    nothing: dict[str, Any] = {"models": [], "route": route, "preset": "", "transforms": ["middle-out"]}
    async with StandIn() as standin, gateway(config=HOSTED.format(url=standin.openai_url, price="")) as served:
        answer = await served.chat(model="openai/gpt-4o-mini", **nothing)

    assert answer.status_code == 200
    sent = standin.requests[0].json
    sent_as_they_came = ["models", "route", "preset", "transforms"] if route else ["models", "preset", "transforms"]
    assert [field for field in nothing if field in sent] == sent_as_they_came


@pytest.mark.parametrize(
    ("provider", "price", "status"),
    [
        ({"only": ["azure"]}, "", 400),
        ({"order": ["azure"], "allow_fallbacks": False}, "", 400),
        ({"sort": "throughput"}, "", 400),
        ({"sort": {"by": "throughput"}}, "", 400),
        ({"sort": {"by": "price"}}, "", 200),
        ({"order": ["azure"]}, ", price: {input_per_million: 1, output_per_million: 2}", 200),
        ({"sort": "price", "max_price": {"prompt": 1}, "data_collection": "deny", "zdr": True, "order": []}, "", 200),
    ],
)
async def test_who_chooses_a_host_has_to_have_its_price(
    gateway: Opens, provider: dict[str, Any], price: str, status: int
) -> None:
    async with StandIn() as standin, gateway(config=HOSTED.format(url=standin.openai_url, price=price)) as served:
        chat = await served.chat(model="openai/gpt-4o-mini", provider=provider)
        embedding = await served.http.post("/v1/embeddings", json=EMBEDDING | {"provider": provider})

    assert (chat.status_code, embedding.status_code) == (status, status)
    if status == 400:
        for error in (chat.json()["error"], embedding.json()["error"]):
            assert (error["code"], error["param"]) == ("price_unknown", "provider")
        assert standin.requests == []


TIERS = {"flex": (0.125, 1.0), "default": (0.25, 2.0), "priority": (0.45, 3.6)}
"""What gpt-5-mini costs in each of them: input and output, per million."""


@pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("asked", "served_in", "billed"),
    [
        ("flex", "flex", "flex"),
        ("auto", "default", "default"),
        (None, "priority", "priority"),
        ("auto", "priority", "priority"),
        ("priority", "priority", "priority"),
        ("priority", "default", "default"),
        ("priority", None, "priority"),
    ],
)
async def test_an_answer_costs_what_the_tier_costs_that_it_names(
    gateway: Opens, as_served: bool, stream: bool, asked: str | None, served_in: str | None, billed: str
) -> None:
    tier = {"service_tier": served_in} if served_in else {}
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 100_000, "total_tokens": 1_100_000}
    choice = {"index": 0, "finish_reason": "stop"}
    body = {"id": "c", "model": "gpt-5-mini", "choices": [choice | {"message": {"content": "Hi"}}], "usage": usage}
    said = {"id": "c", "choices": [choice | {"delta": {"content": "Hi"}}]}
    pieces = [said, {"id": "c", "choices": [], "usage": usage}]
    answer = with_length(orjson.dumps(body | tier))
    if stream:
        events = b"".join(b"data: %b\n\n" % orjson.dumps(piece | tier) for piece in pieces)
        answer = with_length(events + b"data: [DONE]\n\n", "Content-Type: text/event-stream")
    async with Upstream(answer) as upstream:
        config = MAPPED.format(url=upstream.url).replace("gpt-4o-mini", "gpt-5-mini")
        async with gateway(config=config, as_served=as_served) as served:
            for _ in range(2):  # the first of its kind never takes the short way
                fields = {"service_tier": asked} if asked else {}
                answered = await served.chat(model="gpt-5-mini", stream=stream, **fields)
                assert answered.status_code == 200
            spent = await served.spent()

    of_input, of_output = TIERS[billed]
    assert float(spent) == pytest.approx(2 * (of_input + of_output / 10))


@pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_was_thought_is_billed_where_it_is_reported_apart(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    counts = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135}
    usage = counts | {"completion_tokens_details": {"reasoning_tokens": 94}}
    choice = {"index": 0, "finish_reason": "stop"}
    answer = with_length(orjson.dumps({"choices": [choice | {"message": {"content": "Hi"}}], "usage": usage}))
    if stream:
        pieces = [{"choices": [choice | {"delta": {"content": "Hi"}}]}, {"choices": [], "usage": usage}]
        events = b"".join(b"data: %b\n\n" % orjson.dumps(piece) for piece in pieces)
        answer = with_length(events + b"data: [DONE]\n\n", "Content-Type: text/event-stream")
    config = MAPPED.replace(
        "task: chat_small", "task: chat_small, price: {{input_per_million: 1, output_per_million: 1}}"
    )
    asked = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with (
        Upstream(answer) as upstream,
        gateway(config=config.format(url=upstream.url), as_served=as_served) as served,
    ):
        for _ in range(2):  # the first of its kind never takes the short way
            answered = await served.chat(**asked)
            assert b'"usage":%b' % orjson.dumps(usage) in answered.content
        spent = await served.spent()

    assert spent == 2 * Decimal("0.000135")


async def test_a_dearer_tier_is_held_at_its_own_price(gateway: Opens) -> None:
    async with StandIn() as standin:
        config = MAPPED.format(url=standin.openai_url).replace("gpt-4o-mini", "gpt-5-mini")
        async with gateway(config=config) as served:
            ordinary, dear = [
                (await served.chat(max_tokens=1000, service_tier=tier)).json()["sekha"]["estimated_cost"]
                for tier in ("default", "priority")
            ]

    assert dear == pytest.approx(ordinary * 1.8)


THINKER = """
providers:
  - id: first
    provider_type: anthropic
    base_url: {url}
    priority: 1
    models:
      - model_id: claude-sonnet-4-5
        task: chat_small
        price: {{input_per_million: 3, output_per_million: 15}}
"""
CHEAP = """
  - id: second
    provider_type: openai
    base_url: {url}
    priority: 2
    models:
      - model_id: gpt-4o-mini
        task: chat_small
        price: {{input_per_million: 0.1, output_per_million: 0.2}}
"""


@pytest.mark.parametrize(("effort", "thoughts"), [("low", 1024), ("high", 4096)])
@pytest.mark.parametrize("limit", ["max_cost", "max_cost_per_request"])
async def test_a_cap_refuses_the_thoughts_that_it_does_not_afford(
    gateway: Opens, effort: str, thoughts: int, limit: str
) -> None:
    too_little, enough = (thoughts + 1) * 15e-6, (thoughts + 1024) * 15e-6
    asked: dict[str, Any] = {"model": "claude-sonnet-4-5", "reasoning_effort": effort}
    async with StandIn() as one, StandIn() as two:
        answers = {}
        for cap in (too_little, enough):
            config = THINKER.format(url=one.anthropic_url) + CHEAP.format(url=two.openai_url)
            config += f"routing: {{max_cost_per_request: {cap}}}\n" if limit == "max_cost_per_request" else ""
            async with gateway(config=config) as served:
                answers[cap] = await served.chat(**asked, **({"max_cost": cap} if limit == "max_cost" else {}))

    refused = answers[too_little].json()["error"]
    assert (answers[too_little].status_code, refused["code"]) == (402, "cost_refused")
    assert refused["cheapest"]["model"] == "second/gpt-4o-mini"
    assert answers[enough].status_code == 200
    (sent,) = one.requests
    assert sent.json["thinking"]["budget_tokens"] == thoughts
    assert thoughts < sent.json["max_tokens"] <= thoughts + 1024


async def test_a_cap_leaves_an_answer_beside_thoughts_whose_length_the_model_is_to_choose(gateway: Opens) -> None:
    asked: dict[str, Any] = {"model": "claude-sonnet-4-5", "thinking": {"type": "adaptive"}}
    async with StandIn() as standin, gateway(config=THINKER.format(url=standin.anthropic_url)) as served:
        refused = await served.chat(**asked, max_cost=1100 * 15e-6)
        answered = await served.chat(**asked, max_cost=3072 * 15e-6)

    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "cost_refused")
    assert answered.status_code == 200
    (sent,) = standin.requests
    assert sent.json["thinking"]["budget_tokens"] + 512 <= sent.json["max_tokens"] <= 3072


async def test_a_cap_leaves_the_callers_own_limit_alone(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(config=THINKER.format(url=standin.anthropic_url)) as served:
        answer = await served.chat(model="claude-sonnet-4-5", reasoning_effort="low", max_tokens=100, max_cost=0.009)

    assert answer.status_code == 200
    assert standin.requests[0].json["max_tokens"] == 100
