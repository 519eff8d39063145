"""Programs that speak OpenAI's protocol by other means than its bare SDK."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import orjson
import pytest
from pydantic import BaseModel

from sekha.providers.litellm import litellm_module
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens
from tests.fixtures.upstream import Upstream, anthropic_stream

HELLO: list[Any] = [{"role": "user", "content": "Hello there."}]

THINKS = """
providers:
  - id: thinks
    provider_type: anthropic
    base_url: {url}
    models: [{{model_id: claude-sonnet-4-5, task: chat_small, price: free}}]
"""
THOUGHT = anthropic_stream(
    [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Let me "},
        {"type": "thinking_delta", "thinking": "see."},
        {"type": "signature_delta", "signature": "signed"},
    ],
    [{"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi."}],
)


class Weather(BaseModel):
    city: str


async def test_the_sdks_parsed_tools_are_parsed(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        reply = await served.openai.chat.completions.parse(
            model="chat",
            messages=[{"role": "user", "content": "Reykjavik"}],
            tools=[openai.pydantic_function_tool(Weather)],
        )
        sent = standin.requests[-1].json

    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Weather(city="Reykjavik")
    assert sent["tools"][0]["function"]["strict"] is True


async def test_the_sdks_response_format_reaches_the_provider_as_a_schema(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        # The stand-in does not keep to it, and the SDK says so: it looked at our reply as at OpenAI's.
        with pytest.raises(ValueError, match="Weather"):
            await served.openai.chat.completions.parse(model="chat", messages=HELLO, response_format=Weather)
        sent = standin.requests[-1].json

    assert sent["response_format"]["json_schema"]["name"] == "Weather"
    assert sent["response_format"]["json_schema"]["schema"]["required"] == ["city"]


async def test_a_raw_stream_shows_its_headers_before_its_end(gateway: Opens) -> None:
    async with (
        StandIn() as standin,
        gateway(standin) as served,
        served.openai.chat.completions.with_streaming_response.create(
            model="chat", messages=HELLO, stream=True
        ) as response,
    ):
        provider = response.headers["x-sekha-provider"]
        lines = [line async for line in response.iter_lines() if line]

    assert provider == "first"
    assert lines[-1] == "data: [DONE]"


async def test_a_timeout_of_the_sdk_leaves_nothing_behind(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        standin.hang()
        with pytest.raises(openai.APITimeoutError):
            await served.openai.with_options(timeout=0.2).chat.completions.create(model="chat", messages=HELLO)
        async with asyncio.timeout(2):
            await standin.abandoned.wait()


async def test_many_share_one_client(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        texts = [f"Number {number}." for number in range(40)]
        replies = await asyncio.gather(
            *(
                served.openai.chat.completions.create(model="chat", messages=[{"role": "user", "content": text}])
                for text in texts
            )
        )
        calls = await served.calls()

    assert [reply.choices[0].message.content for reply in replies] == [f"You said: {text}" for text in texts]
    assert calls == 40


async def test_litellm_takes_it_for_an_openai(gateway: Opens) -> None:
    litellm = await asyncio.to_thread(litellm_module)
    from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

    async with StandIn(dimension=8) as standin, gateway(standin) as served:
        there: dict[str, Any] = {"api_base": served.v1, "api_key": "nobody's"}
        chat = await litellm.acompletion(model="openai/chat", messages=HELLO, **there)
        stream = await litellm.acompletion(
            model="openai/chat", messages=HELLO, stream=True, stream_options={"include_usage": True}, **there
        )
        chunks = [chunk async for chunk in stream]
        embedded = await litellm.aembedding(model="openai/vectors", input=["one"], **there)
        standin.fail(429, retry_after=7)
        with pytest.raises(litellm.RateLimitError):
            await litellm.acompletion(model="openai/chat", messages=HELLO, num_retries=0, max_retries=0, **there)
        await close_litellm_async_clients()
        # What is closed would be handed out again.
        litellm.in_memory_llm_clients_cache.flush_cache()

    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    usages = [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)]
    assert chat.choices[0].message.content == "".join(pieces) == "You said: Hello there."
    assert (chat.usage.completion_tokens, usages[-1]) == (4, 4)
    assert len(embedded.data[0]["embedding"]) == 8


async def test_what_a_stream_thought_is_summed_up_and_can_be_sent_back(gateway: Opens) -> None:
    async with Upstream(THOUGHT) as upstream, gateway(config=THINKS.format(url=upstream.url)) as served:
        async with served.openai.chat.completions.stream(
            model="claude-sonnet-4-5", messages=HELLO, reasoning_effort="low"
        ) as stream:
            whole = await stream.get_final_completion()
        said: Any = whole.choices[0].message.to_dict()
        await served.chat(model="claude-sonnet-4-5", messages=[*HELLO, said, *HELLO])

    sent = orjson.loads(upstream.requests[-1].partition(b"\r\n\r\n")[2])
    thought = {"type": "thinking", "thinking": "Let me see.", "signature": "signed"}
    assert said["thinking_blocks"] == [thought]
    assert (said["reasoning_content"], said["content"]) == ("Let me see.", "Hi.")
    assert sent["messages"][1] == {"role": "assistant", "content": [thought, {"type": "text", "text": "Hi."}]}
