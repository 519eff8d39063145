"""What answers in other protocols than OpenAI's mean in OpenAI's words."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web
from pydantic import SecretStr

from sekha.pricing import Usage
from sekha.providers.base import ChatCall, Chunk
from sekha.providers.litellm import LiteLLMProvider
from sekha.registry import Model, ProviderKind, ProviderSpec
from tests.fixtures.upstream import anthropic_events

FULL = "model_context_window_exceeded"


@asynccontextmanager
async def answering(kind: ProviderKind, *parts: Mapping[str, Any]) -> AsyncIterator[LiteLLMProvider]:
    """A provider that answers with these lines of Ollama's or events of Anthropic's, or with the only one, whole."""

    async def answer(_: web.Request) -> web.Response:
        if len(parts) == 1:
            return web.Response(body=orjson.dumps(parts[0]), content_type="application/json")
        if kind == "ollama":
            return web.Response(
                body=b"".join(orjson.dumps(part) + b"\n" for part in parts), content_type="application/x-ndjson"
            )
        events = (b"event: %b\ndata: %b\n\n" % (part["type"].encode(), orjson.dumps(part)) for part in parts)
        return web.Response(body=b"".join(events), content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        spec = ProviderSpec(id="one", kind=kind, base_url=f"http://127.0.0.1:{port}", api_key=SecretStr("k"))
        async with aclosing(LiteLLMProvider(spec)) as provider:
            yield provider
    finally:
        await runner.cleanup()


def call(kind: ProviderKind) -> ChatCall:
    model = Model(id="claude-sonnet-4-5" if kind == "anthropic" else "llava", provider_id="one", tasks=("vision",))
    return ChatCall(model=model, messages=[{"role": "user", "content": "Hello"}], timeout_seconds=20)


def line(done_reason: str | None = None, **message: object) -> dict[str, Any]:
    end = {"done_reason": done_reason, "prompt_eval_count": 10, "eval_count": 5} if done_reason else {}
    said = {"role": "assistant", "content": "", **message}
    at = "2025-01-01T00:00:00Z"
    return {"model": "llava", "created_at": at, "message": said, "done": done_reason is not None, **end}


def started(**usage: int) -> list[dict[str, Any]]:
    message = {"id": "m", "type": "message", "role": "assistant", "model": "c", "content": [], "usage": usage}
    return [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
    ]


def stopped(reason: str) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]


async def streamed(kind: ProviderKind, *parts: Mapping[str, Any]) -> list[Chunk]:
    async with answering(kind, *parts) as provider:
        return [chunk async for chunk in provider.stream(call(kind))]


def calls_in(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    choices = (choice for chunk in chunks for choice in chunk.body["choices"])
    return [call for choice in choices for call in choice["delta"].get("tool_calls", ())]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
async def test_calls_that_ollama_streams_are_told_apart(together: bool) -> None:
    f, g = ({"function": {"name": name, "arguments": {"a": 1}}} for name in "fg")
    lines = [line(tool_calls=[f, g])] if together else [line(tool_calls=[f]), line(tool_calls=[g])]

    chunks = await streamed("ollama", *lines, line("stop"))

    assert [(each["index"], each["function"]["name"]) for each in calls_in(chunks)] == [(0, "f"), (1, "g")]


@pytest.mark.parametrize("arguments", [{}, {"a": 1}], ids=["without arguments", "with some"])
async def test_every_call_that_ollama_streams_has_an_id_of_its_own(arguments: dict[str, int]) -> None:
    f, g = ({"function": {"name": name, "arguments": arguments}} for name in "fg")

    chunks = await streamed("ollama", line(tool_calls=[f]), line(tool_calls=[g, f]), line("stop"))

    ids = [each["id"] for each in calls_in(chunks)]
    assert all(ids)
    assert len(set(ids)) == 3


async def test_a_full_context_is_a_length_at_anthropic() -> None:
    body = {"id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": FULL}
    body |= {"content": [{"type": "text", "text": "Hi"}], "usage": {"input_tokens": 10, "output_tokens": 5}}

    async with answering("anthropic", body) as provider:
        whole = await provider.complete(call("anthropic"))
    chunks = await streamed("anthropic", *started(input_tokens=10, output_tokens=1), *stopped(FULL))

    finished = [choice["finish_reason"] for chunk in chunks for choice in chunk.body["choices"]]
    assert whole.finish_reason == "length"
    assert [reason for reason in finished if reason] == ["length"]


async def test_null_for_the_usage_is_none_at_anthropic() -> None:
    body = {"id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": "end_turn"}
    body |= {"content": [{"type": "text", "text": "Hi"}], "usage": None}
    begun = started()
    begun[0]["message"]["usage"] = None
    ending = stopped("end_turn")
    ending[1]["usage"] = None

    async with answering("anthropic", body) as provider:
        whole = await provider.complete(call("anthropic"))
    chunks = await streamed("anthropic", *begun, *ending)

    assert (whole.text, whole.usage) == ("Hi", None)
    assert "".join(chunk.text for chunk in chunks) == "Hi"
    assert {chunk.usage for chunk in chunks} == {None}


@pytest.mark.parametrize(
    ("half", "told"),
    [
        ({"input_tokens": 10}, Usage(input_tokens=10)),
        ({"input_tokens": 10, "output_tokens": None}, Usage(input_tokens=10)),
        ({"input_tokens": 10, "output_tokens": 0}, Usage(input_tokens=10)),
        ({"output_tokens": 5}, Usage(output_tokens=5)),
        ({"input_tokens": 0, "output_tokens": 5}, Usage(output_tokens=5)),
    ],
)
async def test_half_of_a_usage_is_told_from_a_whole_one_at_anthropic(half: dict[str, object], told: Usage) -> None:
    body = {"id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": "end_turn"}
    body |= {"content": [{"type": "text", "text": "Hi"}], "usage": half}

    async with answering("anthropic", body) as provider:
        whole = await provider.complete(call("anthropic"))

    assert (whole.text, whole.usage, whole.half) == ("Hi", None, told)


@pytest.mark.parametrize(
    ("lacks", "told"),
    [("prompt_eval_count", Usage(output_tokens=5)), ("eval_count", Usage(input_tokens=10))],
)
async def test_half_of_a_usage_is_told_from_a_whole_one_at_ollama(lacks: str, told: Usage) -> None:
    last = line("stop", content="Hi")
    del last[lacks]

    async with answering("ollama", last) as provider:
        whole = await provider.complete(call("ollama"))
    chunks = await streamed("ollama", line(content="Hi"), line("stop") | {lacks: None})

    assert (whole.text, whole.usage, whole.half) == ("Hi", None, told)
    assert {chunk.usage for chunk in chunks} == {None}


async def test_an_answer_of_nothing_may_have_no_output_at_anthropic() -> None:
    body = {"id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": "refusal", "content": []}

    async with answering("anthropic", body | {"usage": {"input_tokens": 10, "output_tokens": 0}}) as provider:
        whole = await provider.complete(call("anthropic"))

    assert whole.usage == Usage(input_tokens=10)


@pytest.mark.parametrize("last", [{}, {"usage": None}, {"usage": {"output_tokens": 0}}], ids=["absent", "null", "zero"])
async def test_a_stream_of_anthropics_that_ends_without_its_output_reports_what_went_in_alone(
    last: dict[str, object],
) -> None:
    ending = stopped("end_turn")
    del ending[1]["usage"]
    ending[1] |= last

    chunks = await streamed("anthropic", *started(input_tokens=10, output_tokens=1), *ending)

    assert {chunk.usage for chunk in chunks} == {None}
    assert {chunk.went_in for chunk in chunks if chunk.went_in} == {Usage(input_tokens=10)}


@pytest.mark.parametrize("first", [{"output_tokens": 1}, {}], ids=["half", "empty"])
async def test_a_stream_of_anthropics_that_reports_its_output_alone_reports_that_half(first: dict[str, int]) -> None:
    chunks = await streamed("anthropic", *started(**first), *stopped("end_turn"))

    assert "".join(chunk.text for chunk in chunks) == "Hi"
    assert {chunk.usage for chunk in chunks} == {None}
    assert {chunk.went_in for chunk in chunks if chunk.went_in} == {Usage(output_tokens=5)}


THINKING = {"type": "thinking", "thinking": "", "signature": ""}
HIDDEN = {"type": "redacted_thinking", "data": "AAAA"}


def thought(*texts: str, signature: str | None = None) -> list[dict[str, Any]]:
    """The deltas of a block of thought."""
    said: list[dict[str, Any]] = [{"type": "thinking_delta", "thinking": text} for text in texts]
    return [*said, {"type": "signature_delta", "signature": signature}] if signature else said


TEXT = ({"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi"})


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        (
            [(THINKING, *thought("a ", "b", signature="s")), TEXT],
            [{"type": "thinking", "thinking": "a b", "signature": "s"}],
        ),
        ([(THINKING, *thought(signature="s")), TEXT], [{"type": "thinking", "thinking": "", "signature": "s"}]),
        ([(HIDDEN,), TEXT], [HIDDEN]),
        (
            [(THINKING, *thought("a", signature="s")), (HIDDEN,), (THINKING, *thought("b", signature="t")), TEXT],
            [
                {"type": "thinking", "thinking": "a", "signature": "s"},
                HIDDEN,
                {"type": "thinking", "thinking": "b", "signature": "t"},
            ],
        ),
        (
            [(THINKING, *thought("a", "b")), TEXT, (THINKING, *thought("c"))],
            [{"type": "thinking", "thinking": "ab"}, {"type": "thinking", "thinking": "c"}],
        ),
    ],
    ids=["one", "left out", "redacted", "several", "unsigned"],
)
async def test_what_was_thought_comes_whole_at_the_end_of_a_stream(
    written: list[tuple[dict[str, Any], ...]], whole: list[dict[str, Any]]
) -> None:
    chunks = await streamed("anthropic", *anthropic_events(*written))

    choices = [choice for chunk in chunks for choice in chunk.body["choices"]]
    read = "".join(choice["delta"].get("reasoning_content", "") for choice in choices)
    assert [choice["finish_reason"] for choice in choices if "thinking_blocks" in choice["delta"]] == ["stop"]
    assert choices[-1]["delta"]["thinking_blocks"] == whole
    assert read == "".join(block.get("thinking", "") for block in whole)
