"""Money of calls that failed or were cut is counted and logged with the request that it was spent for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest

from sekha.gateway.app import Gateway
from sekha.gateway.logs import AccessLog, Lines
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, config_for, listening, payloads, wait_until
from tests.fixtures.upstream import Answer, Upstream, anthropic_stream, with_length
from tests.fixtures.ways import event, streamed, whole


@contextlib.asynccontextmanager
async def logged(served: Served) -> Any:
    """A second door to the same gateway, which logs; yields a client of it and what it has logged."""
    kept = io.BytesIO()
    log = AccessLog(Lines(kept))
    app = Gateway(served.serving, access=log)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in kept.getvalue().splitlines()]

    async with (
        listening(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False, timeout=20) as http,
    ):
        yield http, lines
    log.close()


def asked(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello there."}], "model": "chat", **fields}


async def counted(served: Served) -> dict[str, float]:
    """Dollars that the metrics count, by provider."""
    text = (await served.http.get("/metrics")).text
    found = re.findall(r'^sekha_dollars_total\{provider="(\w+)",model="\w+"\} (\S+)$', text, re.MULTILINE)
    return {provider: float(value) for provider, value in found}


async def tell(http: httpx.AsyncClient, lines: Callable[[], list[dict[str, Any]]], **fields: Any) -> dict[str, Any]:
    """Ask, and give the line that was logged of it."""
    before = len(lines())
    await http.post("/v1/chat/completions", json=asked(**fields))
    await wait_until(lambda: len(lines()) > before)
    return lines()[-1]


BOTH = pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])


@BOTH
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_time_out_is_counted_and_logged_at_its_worst_case(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served, timeout_secs=0.5) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.hang(times=None)
            line = await tell(http, lines, stream=stream)
        spent, metrics = await served.spent(), await counted(served)

    assert spent > before
    assert metrics == {"first": pytest.approx(float(spent))}
    assert (line["outcome"], line["error"]) == ("failed", "provider_timeout")
    assert (line["provider"], line["model"]) == ("first", "chat")
    assert line["cost"] == pytest.approx(float(spent - before))
    assert line["input_tokens"] > 0


@BOTH
async def test_a_stream_that_stalls_took_until_it_was_given_up_and_cost_what_had_come(
    gateway: Opens, as_served: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served, timeout_secs=0.5) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.stall(after=3)
            answer = await http.post("/v1/chat/completions", json=asked(stream=True))
            await wait_until(lambda: len(lines()) > 1)
        line = lines()[-1]
        spent, metrics = await served.spent(), await counted(served)

    (told,) = re.findall(r'"attempts":\[\{[^]]*"seconds":([\d.]+)', answer.text)
    assert float(told) >= 0.5
    assert line["cost"] == pytest.approx(float(spent - before)) != 0
    assert (line["provider"], line["status"], line["outcome"]) == ("first", 200, "failed")
    assert metrics == {"first": pytest.approx(float(spent))}


@BOTH
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_caller_who_left_is_logged_as_that_with_what_it_cost(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served) as served:
        async with logged(served) as (http, lines):
            await tell(http, lines)
            before = await served.spent()
            standin.arrived.clear()
            standin.hang(times=None)
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=asked(stream=stream)))
            await standin.arrived.wait()
            asking.cancel()
            await wait_until(lambda: len(lines()) > 1)
        line = lines()[-1]
        spent, metrics = await served.spent(), await counted(served)

    assert (line["status"], line["outcome"], line["error"]) == (499, "cancelled", "client_left")
    assert (line["provider"], line["model"]) == ("first", "chat")
    assert line["cost"] == pytest.approx(float(spent - before)) != 0
    assert metrics == {"first": pytest.approx(float(spent))}


@BOTH
async def test_an_answer_after_a_time_out_costs_both_and_its_caller_is_told(gateway: Opens, as_served: bool) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, as_served=as_served, timeout_secs=0.5) as served:
        one.hang(times=2)
        async with logged(served) as (http, lines):
            answer = await http.post("/v1/chat/completions", json=asked())
            await wait_until(lambda: len(lines()) == 1)
            line = lines()[-1]
            spent, metrics = await served.spent(), await counted(served)
            _, streamed = await served.stream(model="chat")
        in_all = await served.spent()

    assert (line["provider"], line["outcome"]) == ("second", "fallback")
    assert line["cost"] == pytest.approx(float(spent))
    assert sum(metrics.values()) == pytest.approx(float(spent))
    assert set(metrics) == {"first", "second"}
    assert float(answer.headers["x-sekha-cost"]) == pytest.approx(float(spent))
    assert answer.json()["sekha"]["cost"] == pytest.approx(float(spent))
    (told,) = re.findall(r'"cost":([\d.]+)', streamed)
    assert float(told) == pytest.approx(float(in_all - spent))


@BOTH
async def test_a_caller_without_an_answer_is_told_what_that_cost(gateway: Opens, as_served: bool) -> None:
    async with StandIn() as one, gateway(one, as_served=as_served, timeout_secs=0.5) as served:
        one.cut(after=3)
        _, broken = await served.stream(model="chat")
        of_stream = await served.spent()
        one.hang(times=None)
        failed = await served.chat(model="chat")
        spent = await served.spent() - of_stream
        refused = await served.chat(model="chat", max_cost=0)

    assert failed.status_code == 504
    assert float(failed.headers["x-sekha-cost"]) == pytest.approx(float(spent)) != 0
    note = failed.json()["sekha"]
    assert (note["provider_id"], note["model_id"], note["cost"]) == ("first", "chat", pytest.approx(float(spent)))
    assert "[DONE]" not in broken
    (told,) = re.findall(r'"cost":([\d.]+)', broken)
    assert float(told) == pytest.approx(float(of_stream)) != 0
    assert "sekha" not in refused.json(), "nobody was asked"
    assert "x-sekha-cost" not in refused.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_who_leaves_while_we_count_is_charged(gateway: Opens, stream: bool) -> None:
    """What its provider does not report is counted, which takes a moment for a long prompt."""
    long = [{"role": "user", "content": " ".join(f"word{7919 * number % 100_003}" for number in range(40_000))}]
    events = with_length(
        event("Hello.") + event(finish="stop") + b"data: [DONE]\n\n", "Content-Type: text/event-stream"
    )
    answer = events if stream else whole(usage=None)
    async with Upstream(answer) as upstream, gateway(upstream) as served, logged(served) as (http, lines):
        expected = (await tell(http, lines, messages=long, stream=stream))["cost"]
        before, upstream.arrived = await served.spent(), asyncio.Event()
        body = orjson.dumps(asked(messages=long, stream=stream))
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        if stream:
            await reader.readuntil(b'"finish_reason":"stop"')
        else:
            await upstream.arrived.wait()
            await asyncio.sleep(0.02)
        writer.transport.abort()
        await wait_until(lambda: len(lines()) > 1)
        spent = await served.spent() - before

    assert lines()[-1]["error"] == "client_left"
    assert lines()[-1]["cost"] == pytest.approx(float(spent)) == pytest.approx(expected, rel=0.01)


@BOTH
@pytest.mark.parametrize("path", ["chat", "stream", "embeddings"])
async def test_retries_that_may_be_billed_never_take_a_request_past_its_cap(
    gateway: Opens, as_served: bool, path: str
) -> None:
    settings: dict[str, Any] = {"as_served": as_served, "rounds": 3, "timeout_secs": 0.3}
    async with StandIn() as one, StandIn() as two, gateway(one, two, **settings) as served:
        one.hang(times=None)
        two.hang(times=None)
        cap = 0.3 if path != "embeddings" else 0.005
        if path == "embeddings":
            body = {"input": "Hello there.", "model": "vectors", "max_cost": cap}
            response = await served.http.post("/v1/embeddings", json=body)
        else:
            response = await served.chat(model="chat", max_cost=cap, stream=path == "stream")
        spent = await served.spent()

    assert response.status_code == 504
    assert 0 < float(spent) <= cap
    assert len(response.json()["error"]["attempts"]) == 1


@BOTH
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("chat/completions", b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2}}'),
        ("chat/completions", b'{"error":{"message":"broken"},"usage":{"prompt_tokens":10,"completion_tokens":2}}'),
        ("chat/completions", b'{"error":{"message":"broken"},"usage":{"prompt_tokens":14}}'),
        ("chat/completions", b'{"error":{"message":"broken"},"usage":{"prompt_tokens":10,"total_tokens":12}}'),
        (
            "chat/completions",
            b'{"error":{"message":"broken"},"usage":{"prompt_tokens":6,"completion_tokens":3,"total_tokens":10}}',
        ),
        ("embeddings", b'{"data":[],"usage":{"prompt_tokens":14}}'),
        ("embeddings", b'{"data":[],"usage":{"prompt_tokens":4,"total_tokens":14}}'),
        ("embeddings", b'{"error":{"message":"broken"},"usage":{"prompt_tokens":4,"total_tokens":14}}'),
    ],
    ids=[
        *("no choices", "error", "error before any output", "error by its total", "error and thoughts"),
        *("no vectors", "no vectors by the total", "error of vectors"),
    ],
)
async def test_an_answer_that_is_none_costs_what_it_says_it_used(
    gateway: Opens, as_served: bool, path: str, said: bytes
) -> None:
    unusable = with_length(said)
    async with Upstream(unusable, unusable, unusable) as upstream, gateway(upstream, as_served=as_served) as served:
        body = {"input": "Hello there."} if path == "embeddings" else asked()
        response = await served.http.post(f"/v1/{path}", json=body)
        spent = await served.spent()

    attempts = len(response.json()["error"]["attempts"])
    # Ten tokens at 1,000 dollars a million and two at twice that, or fourteen.
    assert (response.status_code, spent) == (502, attempts * Decimal("0.014"))


USED = {"prompt_tokens": 10, "completion_tokens": 2}
WENT_WRONG = {"error": {"message": "It melted.", "type": "x"}}


@BOTH
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    ("pieces", "charged"),
    [
        ((event("word " * 50), event(usage=USED), event(None, **WENT_WRONG)), Decimal("0.014")),
        ((event("word " * 50) + event(usage=USED) + event(None, **WENT_WRONG),), Decimal("0.014")),
        ((event("word " * 50), event(finish="error", usage=USED, **WENT_WRONG)), Decimal("0.014")),
        ((event("word " * 50, usage=USED), event("word " * 50), event(None, **WENT_WRONG)), None),
    ],
    ids=["one by one", "together", "with the error", "words behind it"],
)
async def test_a_stream_that_fails_behind_its_usage_costs_what_that_says(
    gateway: Opens, as_served: bool, wanted: bool, pieces: tuple[bytes, ...], charged: Decimal | None
) -> None:
    answers = [streamed(event("Hi", finish="stop", usage=USED), b"data: [DONE]\n\n"), streamed(*pieces)]
    async with Upstream(*answers) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.stream(model="chat")
        before = await served.spent()
        _, text = await served.stream(model="chat", stream_options={"include_usage": wanted})
        spent = await served.spent() - before

    *_, last = payloads(text)
    assert last["error"]["code"] == "stream_broken"
    assert last["sekha"]["cost"] == float(spent)
    # Words that come behind it are counted.
    assert spent == charged if charged else spent > Decimal("0.1")


THOUGHT = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 10}


@BOTH
@pytest.mark.parametrize(
    "failing",
    [
        streamed(event("", usage=USED), event(None, **WENT_WRONG)),
        streamed(event(""), event(None, usage=THOUGHT, **WENT_WRONG)),
        streamed(event("", usage=USED), event(None, usage={"prompt_tokens": 10}, **WENT_WRONG)),
        whole(usage=THOUGHT, **WENT_WRONG),
    ],
    ids=["before", "with the error", "half with the error", "whole"],
)
async def test_a_stream_that_fails_before_its_first_word_costs_the_usage_that_it_reported(
    gateway: Opens, as_served: bool, failing: Answer
) -> None:
    good = streamed(event("Hi", finish="stop", usage=USED), b"data: [DONE]\n\n")
    answers = good, *[failing] * 3
    async with Upstream(*answers) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.stream(model="chat")
        before = await served.spent()
        response, text = await served.stream(model="chat")
        spent = await served.spent() - before

    attempts = len(json.loads(text)["error"]["attempts"])
    assert (response.status_code, spent) == (502, attempts * Decimal("0.014"))


@BOTH
@pytest.mark.parametrize(("more", "status"), [({}, 200), ({"choices": []}, 502)], ids=["an answer", "none"])
async def test_what_comes_whole_in_place_of_a_stream_costs_the_usage_that_it_reports(
    gateway: Opens, as_served: bool, more: dict[str, Any], status: int
) -> None:
    answers = [streamed(event("Hi", finish="stop", usage=USED), b"data: [DONE]\n\n"), whole(usage=USED, **more)]
    async with Upstream(*answers) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.stream(model="chat")
        before = await served.spent()
        response, _ = await served.stream(model="chat")
        spent = await served.spent() - before

    attempts = len(upstream.requests) - 1
    assert (response.status_code, spent) == (status, attempts * Decimal("0.014"))
    assert attempts == 1 or status == 502


NESTED = whole(usage=USED).partition(b"\r\n\r\n")[2].replace(b'"id":', b'"x":%b%b,"id":' % (b"[" * 300, b"]" * 300))


@BOTH
async def test_an_answer_that_is_nested_too_deeply_for_a_stream_costs_what_it_reports(
    gateway: Opens, as_served: bool
) -> None:
    answers = [whole(usage=USED), *[with_length(NESTED)] * 3]
    async with Upstream(*answers) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.chat(model="chat")
        before = await served.spent()
        response, text = await served.stream(model="chat")
        spent = await served.spent() - before

    error = json.loads(text)["error"]
    assert (response.status_code, error["code"]) == (502, "provider_bad_reply")
    assert spent == len(error["attempts"]) * Decimal("0.014")


@BOTH
async def test_an_answer_that_is_nested_deeply_is_handed_on_with_what_was_counted(
    gateway: Opens, as_served: bool
) -> None:
    nested = with_length(NESTED.replace(b'"prompt_tokens":10', b'"prompt_tokens":0'))
    async with Upstream(whole(usage=USED), nested) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.chat(model="chat")
        response = await served.chat(model="chat")

    assert response.json()["usage"]["prompt_tokens"] > 0
    assert response.json()["sekha"]["usage"] == "counted"


async def test_a_failure_that_is_not_billed_leaves_the_cap_to_the_next(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        one.fail(500)
        response = await served.chat(model="chat", max_cost=0.5)

    assert (response.status_code, response.json()["sekha"]["provider_id"]) == (200, "second")


async def test_a_cut_stream_costs_the_input_that_its_provider_reported_before_the_first_word(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, kind="anthropic") as served, logged(served) as (http, lines):
        full = await tell(http, lines)
        standin.cut(after=6)
        cut = await tell(http, lines, stream=True)

    assert cut["error"] == "stream_broken"
    assert cut["input_tokens"] == full["input_tokens"]
    assert cut["output_tokens"] > 0


@pytest.mark.parametrize("last", [None, {"output_tokens": 0}], ids=["null", "zero"])
async def test_a_stream_whose_provider_never_says_what_came_out_costs_what_is_counted(
    gateway: Opens, last: dict[str, int] | None
) -> None:
    text = {"type": "text", "text": ""}, {"type": "text_delta", "text": "word " * 200}
    async with Upstream(anthropic_stream(text, usage=last)) as upstream:
        config = config_for(upstream).replace("provider_type: openai", "provider_type: anthropic")
        async with gateway(config=config) as served, logged(served) as (http, lines):
            line = await tell(http, lines, stream=True)

    assert (line["outcome"], line["input_tokens"]) == ("answered", 10)
    assert line["output_tokens"] >= 200


SEARCHING = """
providers:
  - id: first
    provider_type: {kind}
    base_url: {url}
    models:
      - model_id: chat
        task: chat_small
        max_output_tokens: 100
        context_window: 5000
        price: {{input_per_million: 1000, output_per_million: 2000}}
"""


@pytest.mark.parametrize(
    ("asks", "charged"),
    [({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 5000), ({}, 10)],
    ids=["searching", "not searching"],
)
async def test_a_cut_stream_of_claudes_costs_what_its_search_may_have_read(
    gateway: Opens, asks: dict[str, Any], charged: int
) -> None:
    text = {"type": "text", "text": ""}, {"type": "text_delta", "text": "I searched: "}
    said = anthropic_stream(text).partition(b"\r\n\r\n")[2].partition(b"event: content_block_stop")[0]
    async with (
        Upstream(streamed(said, ends="never", seconds=0.1)) as upstream,
        gateway(config=SEARCHING.format(kind="anthropic", url=upstream.url)) as served,
        logged(served) as (http, lines),
    ):
        line = await tell(http, lines, stream=True, **asks)

    assert (line["error"], line["input_tokens"]) == ("stream_broken", charged)


async def test_a_stream_of_claudes_that_reports_its_output_alone_costs_that_and_the_input_that_is_counted(
    gateway: Opens,
) -> None:
    hidden = ({"type": "redacted_thinking", "data": "AAAA"},)
    text = {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi"}
    said = anthropic_stream(hidden, text, begun=None, usage={"output_tokens": 3000})
    async with Upstream(said) as upstream:
        config = config_for(upstream).replace("provider_type: openai", "provider_type: anthropic")
        async with gateway(config=config) as served:
            _, answered = await served.stream(model="chat", stream_options={"include_usage": True})
            spent = await served.spent()

    *_, last = payloads(answered)
    assert last["usage"]["completion_tokens"] == 3000
    assert last["usage"]["prompt_tokens"] > 0
    assert last["sekha"]["usage"] == "counted"
    assert float(spent) == last["sekha"]["cost"] == pytest.approx(6 + last["usage"]["prompt_tokens"] / 1000)


@BOTH
async def test_a_stream_that_reports_each_half_by_itself_or_one_alone_costs_at_least_what_it_reports(
    gateway: Opens, as_served: bool
) -> None:
    done = event(finish="stop"), b"data: [DONE]\n\n"
    came_out = event(usage={"completion_tokens": 40})
    alone = streamed(event("Hi"), done[0], came_out, done[1])
    each = streamed(event("", usage={"prompt_tokens": 500}), event("Hi"), done[0], came_out, done[1])
    async with Upstream(whole(), alone, each) as upstream, gateway(upstream, as_served=as_served) as served:
        await served.chat(model="chat")
        texts = [(await served.stream(model="chat", stream_options={"include_usage": True}))[1] for _ in range(2)]

    one, other = [list(payloads(text))[-1] for text in texts]
    assert one["usage"]["prompt_tokens"] > 0
    assert other["usage"]["prompt_tokens"] == 500
    for last in (one, other):
        assert last["usage"]["completion_tokens"] == 40
        assert last["sekha"]["usage"] == "counted"
        assert last["sekha"]["cost"] == pytest.approx(0.08 + last["usage"]["prompt_tokens"] / 1000)


@BOTH
async def test_a_budget_for_a_model_at_one_provider_holds_for_that_provider_alone(
    gateway: Opens, as_served: bool
) -> None:
    settings: dict[str, Any] = {"budgets": ["{name: dear, limit: 0.5, match: {model: first/chat}}"]}
    async with StandIn() as one, StandIn() as two, gateway(one, two, as_served=as_served, **settings) as served:
        first = [await served.chat(model="first/chat", max_tokens=100) for _ in range(40)]
        second = await served.chat(model="second/chat", max_tokens=100)
        anywhere = await served.chat(model="chat", max_tokens=100)
        spent = (await served.http.get("/api/v1/costs", params={"by": "provider"})).json()["costs"]

    assert {each.status_code for each in first} == {200, 402}
    assert first[-1].json()["error"]["budget"] == "dear"
    assert second.status_code == 200
    assert anywhere.json()["sekha"]["provider_id"] == "second"
    assert next(line["cost"] for line in spent if line["group"] == "first") <= 0.5


async def test_what_failed_and_is_not_billed_costs_nothing_and_names_who_was_asked_last(gateway: Opens) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two) as served:
        one.fail(500)
        two.fail(500)
        async with logged(served) as (http, lines):
            line = await tell(http, lines)
            refused = await tell(http, lines, max_cost=0)

    assert (line["provider"], line["cost"], line["error"]) == ("second", 0, "provider_unavailable")
    assert refused["error"] == "cost_refused"
    assert refused.keys().isdisjoint({"provider", "cost"}), "nobody was asked"


@BOTH
async def test_a_budget_that_names_a_provider_counts_its_model_by_either_name_and_not_another_by_the_same(
    gateway: Opens, as_served: bool
) -> None:
    config = """
    providers:
    - {{id: a, provider_type: openai, base_url: "{url}", models: [{{model_id: m, task: chat_smart, price: {price}}}]}}
    - {{id: b, provider_type: openai, base_url: "{url}", models: [{{model_id: a/m, task: chat_small, price: {price}}}]}}
    budgets:
    - {{name: one, limit: 1000, match: {{provider: a, model: m}}}}
    - {{name: the same, limit: 1000, match: {{provider: a, model: a/m}}}}
    - {{name: other, limit: 1000, match: {{provider: b, model: a/m}}}}
    - {{name: other by name, limit: 1000, match: {{model: b/a/m}}}}
    """
    async with StandIn() as standin:
        text = config.format(url=standin.openai_url, price="{input_per_million: 1000, output_per_million: 1000}")
        async with gateway(config=text, as_served=as_served) as served:
            for model in ("chat_smart", "chat_smart", "chat_small"):
                assert (await served.chat(model=model, max_tokens=9)).status_code == 200
            ledger, resources = await served.serving.resources.ledger(), served.serving.resources
            spent = {each.name: (await ledger.spent(each, at=resources.now()))[0] for each in resources.budgets}

    assert spent["one"] == spent["the same"] == 2 * spent["other"] == 2 * spent["other by name"] > 0


@BOTH
@pytest.mark.parametrize(
    ("path", "status", "shown"),
    [
        ("/v1/models/first/chat", 200, "/v1/models/{model}"),
        ("/v1/models/secret", 404, "/v1/models/{model}"),
        ("/v1/models/sk-sekha-secret", 404, "/v1/models/{model}"),
        ("/v1/secret", 404, "other"),
        ("/secret", 404, "other"),
        ("/v1/embeddings", 405, "/v1/embeddings"),
    ],
)
async def test_nothing_that_a_caller_put_into_a_path_is_logged(
    gateway: Opens, as_served: bool, path: str, status: int, shown: str
) -> None:
    async with StandIn() as standin, gateway(standin, as_served=as_served) as served, logged(served) as (http, lines):
        answered = await http.get(path)
        await wait_until(lines)
        (line,) = lines()

    assert (answered.status_code, line["status"], line["path"]) == (status, status, shown)
    assert "secret" not in json.dumps(line)
