"""Answers in pieces over HTTP: handed on as they come, charged at their end, and never ended as if they were whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from openai import APIError

from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served, config_for, payloads, wait_until
from tests.fixtures.upstream import Upstream
from tests.fixtures.ways import whole

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there."}]
SAID = "You said: Hello there."


def _text(chunks: list[dict[str, Any]]) -> str:
    said = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ())]
    return "".join(said)


async def test_a_stream_is_the_answer_in_pieces(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        stream = await served.openai.chat.completions.create(model="chat", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        spent, held = await served.spent(), await served.held()

    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == SAID
    assert len([piece for piece in pieces if piece]) == 4
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert (float(spent), held) == (0.01, 0)


async def test_who_does_not_ask_for_usage_gets_none_and_what_it_cost_is_a_comment(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        response, text = await served.stream(model="chat")
        sent = standin.requests[-1].json

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-sekha-provider"] == "first"
    assert float(response.headers["x-sekha-estimated-cost"]) > 0
    assert not [chunk for chunk in payloads(text) if chunk.get("usage")]
    *_, comment, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert orjson.loads(comment.removeprefix(": sekha "))["cost"] == 0.01
    # We ask for it all the same, since we are billed by it.
    assert sent["stream_options"]["include_usage"] is True


async def test_who_asks_for_usage_gets_it_and_what_it_cost(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        stream = await served.openai.chat.completions.create(
            model="chat", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(2, 4)]
    assert chunks[-1].choices == []
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["sekha"]["cost"] == 0.01
    assert chunks[-1].usage is not None


@pytest.mark.parametrize("reported", [True, False])
async def test_the_sdks_own_sum_of_a_stream_has_its_usage(gateway: Opens, reported: bool) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        if not reported:
            standin.omit_usage()
        async with served.openai.chat.completions.stream(
            model="chat", messages=HELLO, stream_options={"include_usage": True}
        ) as stream:
            summed = await stream.get_final_completion()

    assert summed.choices[0].message.content == SAID
    assert summed.usage is not None
    assert summed.usage.completion_tokens > 0
    # Clients in strict languages want these in every chunk.
    assert summed.id
    assert summed.created
    assert summed.model == "chat"


@pytest.mark.parametrize("kind", ["openai", "openrouter", "anthropic"])
async def test_usage_comes_once(gateway: Opens, kind: str) -> None:
    async with StandIn() as standin, gateway(config=config_for(standin, kind=kind)) as served:
        _, text = await served.stream(model="chat", stream_options={"include_usage": True})

    usages = [chunk["usage"]["completion_tokens"] for chunk in payloads(text) if chunk.get("usage")]
    assert usages == [4]


async def test_pieces_are_handed_on_while_the_answer_is_still_written(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.trickle(0.03)
        stream = await served.openai.chat.completions.create(model="chat", messages=HELLO, stream=True)
        await anext(stream)
        spent_meanwhile, held_meanwhile = await served.spent(), await served.held()
        await stream.close()

    assert spent_meanwhile == 0
    assert held_meanwhile > 0


async def test_a_tool_is_called_in_pieces(gateway: Opens) -> None:
    tool: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    async with StandIn() as standin, gateway(standin) as served:
        stream = await served.openai.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "Reykjavik"}], stream=True, tools=[tool]
        )
        calls = [call async for chunk in stream if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]

    assert "".join(call.function.name or "" for call in calls if call.function) == "weather"
    assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"city":"Reykjavik"}'


async def test_who_does_not_heed_that_a_stream_is_asked_for_is_asked_once_and_streamed_all_the_same(
    gateway: Opens,
) -> None:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    message = {"role": "assistant", "content": "Wait.", "tool_calls": calls}
    answer = whole(choices=[{"index": 0, "message": message, "finish_reason": "tool_calls"}])
    async with Upstream(answer) as upstream, gateway(upstream) as served:
        async with served.openai.chat.completions.stream(
            model="chat", messages=HELLO, stream_options={"include_usage": True}
        ) as stream:
            said = await stream.get_final_completion()
        _, text = await served.stream(model="chat")

    (choice,) = said.choices
    assert (choice.message.content, choice.finish_reason) == ("Wait.", "tool_calls")
    assert [call.function.name for call in choice.message.tool_calls or ()] == ["f", "g"]
    assert said.usage is not None
    assert said.usage.completion_tokens == 3
    assert {chunk["object"] for chunk in payloads(text)} == {"chat.completion.chunk"}
    assert text.endswith("data: [DONE]\n\n")
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("kind", ["openai", "anthropic", "ollama", "openrouter"])
async def test_every_protocol_streams_in_openais_shape(gateway: Opens, kind: str) -> None:
    async with StandIn() as standin, gateway(config=config_for(standin, kind=kind)) as served:
        _, text = await served.stream(model="chat", stream_options={"include_usage": True})
        spent = await served.spent()

    assert _text(list(payloads(text))) == SAID
    assert text.endswith("data: [DONE]\n\n")
    assert float(spent) == pytest.approx(0.01)


async def test_a_stream_without_usage_is_counted_and_marked(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.omit_usage()
        _, text = await served.stream(model="chat", stream_options={"include_usage": True})
        spent = await served.spent()

    ((note, usage),) = [(chunk["sekha"], chunk["usage"]) for chunk in payloads(text) if "sekha" in chunk]
    assert note["usage"] == "counted"
    assert note["cost"] == float(spent) > 0
    assert (usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1000 == pytest.approx(note["cost"])


# --- what breaks ---------------------------------------------------------------------------

BREAKS: dict[str, Callable[[StandIn, int], None]] = {
    "cut": lambda standin, after: standin.cut(after=after),
    "ended early": lambda standin, after: standin.end_early(after=after),
    "garbage": lambda standin, after: standin.mumble(after=after),
    "error within": lambda standin, after: standin.fail_within("It melted.", after=after),
    "stalled": lambda standin, after: standin.stall(after=after),
}


@pytest.mark.parametrize("how", BREAKS)
async def test_a_stream_that_breaks_after_its_first_piece_ends_with_an_error_and_nothing_else(
    gateway: Opens, how: str
) -> None:
    async with StandIn() as one, StandIn() as two, gateway(one, two, timeout_secs=0.3) as served:
        BREAKS[how](one, 3)
        response, text = await served.stream(model="chat")
        spent, held, calls = await served.spent(), await served.held(), await served.calls()

    *chunks, last = payloads(text)
    assert response.status_code == 200
    assert _text(chunks) == "You said:"
    assert "[DONE]" not in text
    assert last["error"]["code"] == ("provider_timeout" if how == "stalled" else "stream_broken")
    assert last["error"]["type"] == "server_error"
    assert (last["error"]["provider_id"], last["sekha"]["provider_id"]) == ("first", "first")
    assert [attempt["error"] for attempt in last["error"]["attempts"]] == [last["error"]["code"]]
    # What had arrived is paid for, once, and nobody else is asked to repeat it.
    assert spent > 0
    assert (held, calls) == (0, 1)
    assert not two.requests


async def test_a_broken_stream_raises_in_openais_sdk(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.cut(after=3)
        stream = await served.openai.chat.completions.create(model="chat", messages=HELLO, stream=True)
        arrived: list[str] = []

        with pytest.raises(APIError, match="broke off its stream") as caught:
            arrived += [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert isinstance(caught.value.body, dict)
    assert caught.value.code == "stream_broken"


@pytest.mark.parametrize("how", ["cut", "ended early", "garbage", "error within"])
async def test_a_stream_never_ends_as_if_it_were_whole_wherever_it_breaks(gateway: Opens, how: str) -> None:
    """It has seven events: the role, four words, the reason why it stops, usage; `[DONE]` comes after them."""
    ended: list[bool] = []
    async with StandIn() as standin, gateway(standin) as served:
        for after in range(8):
            BREAKS[how](standin, after)
            response, text = await served.stream(model="chat")
            whole = "[DONE]" in text
            broken = any("error" in chunk for chunk in payloads(text)) or response.status_code != 200
            ended.append(whole)

            assert whole != broken
            assert not whole or _text(list(payloads(text))) == SAID
        held = await served.held()

    assert not any(ended[:6])
    assert held == 0


@pytest.mark.parametrize("as_served", [False, True])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("how", BREAKS)
async def test_until_the_first_token_another_provider_is_asked(
    gateway: Opens, how: str, after: int, as_served: bool
) -> None:
    """The first event names who speaks and says nothing."""
    async with (
        StandIn() as one,
        StandIn() as two,
        gateway(one, two, timeout_secs=0.5, as_served=as_served) as served,
    ):
        if as_served:
            # The first of its kind is met in the line.
            await served.stream(model="chat")
        BREAKS[how](one, after)
        response, text = await served.stream(model="chat")
        await wait_until(lambda: _is_zero(served))
        held = await served.held()

    assert response.headers["x-sekha-provider"] == "second"
    assert _text(list(payloads(text))) == SAID
    assert text.endswith("data: [DONE]\n\n")
    assert held == 0


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_an_overloaded_anthropic_leaves_its_stream_to_another_provider(
    gateway: Opens, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so within a stream that began well: after its head, and after a block of text that is empty yet."""
    async with StandIn() as one, StandIn() as two:
        config = config_for(one, two).replace("provider_type: openai", "provider_type: anthropic", 1)
        async with gateway(config=config.replace(one.openai_url, one.anthropic_url, 1)) as served:
            one.fail_within("Overloaded", after=after)
            response, text = await served.stream(model="chat")
            one.fail_within("Overloaded", after=after)
            alone, said = await served.stream(model="first/chat")

    assert response.headers["x-sekha-provider"] == "second"
    assert _text(list(payloads(text))) == SAID
    assert alone.status_code == 503
    assert "Overloaded" in orjson.loads(said)["error"]["message"]
    assert "Overloaded" not in caplog.text, "a provider's words may quote the request"


async def test_the_first_token_is_timed_and_not_the_name_of_who_speaks(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin, as_served=True) as served:
        for _ in range(2):
            standin.trickle(0.15)
            await served.stream(model="chat")
        page = (await served.http.get("/metrics")).text

    (total,) = [line for line in page.splitlines() if line.startswith("sekha_first_token_seconds_sum")]
    assert float(total.rpartition(" ")[2]) > 2 * 2 * 0.15


async def test_a_refusal_before_the_first_piece_is_an_error_and_no_stream(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.fail(400, message="No.")
        response, text = await served.stream(model="chat")

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert orjson.loads(text)["error"]["code"] == "provider_rejected"


# --- who leaves ----------------------------------------------------------------------------


async def _leaves(served: Served, **fields: Any) -> None:
    """Read a stream's first piece, and close the connection."""
    asked = orjson.dumps({"messages": HELLO, "stream": True, **fields})
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(asked), asked))
    await reader.readuntil(b"data: ")
    writer.close()


async def test_who_leaves_a_stream_ends_it_upstream_and_pays_for_what_came(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.stall(after=3)
        await _leaves(served)
        async with asyncio.timeout(2):
            await standin.abandoned.wait()
        await wait_until(lambda: _is_zero(served))
        spent, calls = await served.spent(), await served.calls()

    assert spent > 0
    assert calls == 1


async def test_many_who_leave_hold_nothing(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.trickle(0.02, times=None)
        await asyncio.gather(*(_leaves(served) for _ in range(20)))
        await wait_until(lambda: _is_zero(served))
        calls = await served.calls()

    assert calls == 20


async def test_who_does_not_read_is_not_written_to_and_pays_for_what_went_out(gateway: Opens) -> None:
    asked = orjson.dumps({"messages": [{"role": "user", "content": "word " * 60_000}], "model": "chat", "stream": True})
    async with StandIn() as standin, gateway(standin, dear=1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(asked))
        writer.write(asked)
        await reader.readuntil(b"data: ")
        await asyncio.sleep(0.2)
        meanwhile = await served.spent()
        writer.transport.abort()
        await wait_until(lambda: _is_zero(served))
        spent = await served.spent()

    # Twelve megabytes of events: more than the sockets between us take.
    assert meanwhile == 0
    assert 0.06 < spent < 0.18


async def _is_zero(served: Served) -> bool:
    return await served.held() == 0
