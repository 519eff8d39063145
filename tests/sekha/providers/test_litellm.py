import logging
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from pydantic import SecretStr

from sekha.errors import BadReply, FieldUnsupported, ProviderError, ProviderRejected, StreamBroken
from sekha.providers.base import ChatCall, Completion
from sekha.providers.litellm import litellm_module
from sekha.providers.opening import open_provider
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.testing import StandIn
from tests.fixtures.upstream import Upstream, chunked
from tests.fixtures.ways import event, streamed, whole


def call(name: str, content: object = "Hello", **options: object) -> ChatCall:
    return ChatCall(
        model=Model(id=name, provider_id="one", tasks=("chat_small",)),
        messages=[{"role": "user", "content": content}],
        options=options,
        timeout_seconds=20,
    )


async def ask(spec: ProviderSpec, request: ChatCall) -> Completion:
    async with aclosing(open_provider(spec)) as provider:
        return await provider.complete(request)


async def test_any_model_of_litellm_goes_by_its_own_name() -> None:
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind="litellm", base_url=standin.openai_url, api_key=SecretStr("secret"))

        reply = await ask(spec, call("openai/gpt-4o-mini"))

    assert reply.text == "You said: Hello"
    assert standin.requests[0].json["model"] == "gpt-4o-mini"


async def test_a_key_from_the_environment_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-from-the-environment")

    async with StandIn() as standin:
        await ask(ProviderSpec(id="one", kind="anthropic", base_url=standin.anthropic_url), call("claude-sonnet-4-5"))

    assert "sk-from-the-environment" not in str(standin.requests[0].headers)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("counts", "used"),
    [((100, 10, 410), (100, 310)), ((100, 10, 110), (100, 10)), ((0, 10, 410), (400, 10)), ((100, 0, 410), (100, 310))],
)
async def test_what_a_total_has_beyond_both_halves_is_counted(
    counts: tuple[int, int, int], used: tuple[int, int], *, stream: bool
) -> None:
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=True))
    said = event("Hi", finish="stop"), event(usage=usage), b"data: [DONE]\n\n"
    async with Upstream(streamed(*said) if stream else whole("Hi", usage=usage)) as upstream:
        spec = ProviderSpec(id="one", kind="litellm", base_url=upstream.openai_url, api_key=SecretStr("secret"))
        async with aclosing(open_provider(spec)) as provider:
            if stream:
                reported = [chunk.usage async for chunk in provider.stream(call("hosted_vllm/x"))][-1]
            else:
                reported = (await provider.complete(call("hosted_vllm/x"))).usage

    assert reported is not None
    assert (reported.input_tokens, reported.output_tokens) == used


@pytest.mark.parametrize("field", ["api_base", "mock_response", "fallbacks", "num_retries", "extra_headers"])
async def test_a_caller_cannot_give_litellm_orders(field: str) -> None:
    async with StandIn() as standin:
        anthropic = ProviderSpec(id="a", kind="anthropic", base_url=standin.url, api_key=SecretStr("k"))

        with pytest.raises(ProviderRejected) as caught:
            await ask(anthropic, call("claude-sonnet-4-5", **{field: "x"}))

    assert field in caught.value.told
    assert field not in str(caught.value), "the caller's words are for the caller"
    assert standin.requests == []


@pytest.mark.parametrize(("kind", "url"), [("ollama", "https://host/cat.png"), ("anthropic", "http://host/cat.png")])
async def test_an_address_in_a_message_is_never_fetched(kind: ProviderKind, url: str) -> None:
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind=kind, base_url=standin.url, api_key=SecretStr("k"))

        with pytest.raises(ProviderRejected, match="base64"):
            await ask(spec, call("m", [{"type": "image_url", "image_url": {"url": url}}]))

    assert standin.requests == []


async def test_a_failure_is_not_logged_with_its_prompt(caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(logging.DEBUG)

    async with StandIn() as standin:
        standin.garbage()
        spec = ProviderSpec(id="one", kind="ollama", base_url=standin.url)
        with pytest.raises(BadReply):
            await ask(spec, call("llama3", "a most secret prompt"))

    printed = capfd.readouterr()
    assert "secret prompt" not in caplog.text + printed.out + printed.err


@pytest.mark.parametrize("started", [False, True])
async def test_an_error_for_a_line_of_ollamas_stream_is_its_failure_and_not_the_requests(started: bool) -> None:
    word = b'{"model":"m","message":{"role":"assistant","content":"word"},"done":false}\n'
    lines = [word] * started + [b'{"error":"cuda died"}\n']

    async with Upstream(chunked(*lines, headers=("Content-Type: application/x-ndjson",))) as upstream:
        spec = ProviderSpec(id="one", kind="ollama", base_url=upstream.url)
        async with aclosing(open_provider(spec)) as provider:
            with pytest.raises(StreamBroken if started else BadReply) as caught:
                _ = [piece async for piece in provider.stream(call("m"))]

    assert "cuda died" in caught.value.told
    assert "cuda died" not in str(caught.value)
    assert caught.value.falls_back is not started
    assert caught.value.retryable is not started
    assert caught.value.may_be_billed is started


async def test_ollama_is_asked_nothing_besides() -> None:
    async with StandIn() as standin:
        unheard = Model(id="unheard-embedder", provider_id="one", tasks=("embedding",))

        async with aclosing(open_provider(ProviderSpec(id="one", kind="ollama", base_url=standin.url))) as provider:
            await provider.complete(call("never-heard-of:7b"))
            await provider.embed(unheard, ["text"], timeout_seconds=20)

    assert [request.path for request in standin.requests] == ["/api/chat", "/api/embed"]


async def test_the_last_provider_to_close_leaves_no_connection_open() -> None:
    async with StandIn() as standin:
        specs = [ProviderSpec(id=name, kind="anthropic", base_url=standin.url) for name in ("one", "two")]
        one, two = (open_provider(spec) for spec in specs)
        await one.complete(call("claude-sonnet-4-5"))
        await two.complete(call("claude-sonnet-4-5"))

        await one.aclose()
        assert (await two.complete(call("claude-sonnet-4-5"))).text
        await two.aclose()

        assert not litellm_module().in_memory_llm_clients_cache.cache_dict
        assert (await ask(specs[0], call("claude-sonnet-4-5"))).text


def tool(**more: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **more}}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [tool(parameters="x")]),
        ("tools", [{"type": "mcp"}]),
        ("tools", [{"type": "computer_20241022", "function": {"name": "computer"}}]),
        ("reasoning_effort", "zzz"),
    ],
)
async def test_what_cannot_be_translated_is_not_sent_and_costs_nothing(
    field: str, value: object, streamed: bool
) -> None:
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind="anthropic", base_url=standin.url, api_key=SecretStr("k"))

        async with aclosing(open_provider(spec)) as provider:
            request = call("claude-sonnet-4-5", **{field: value})
            answer = anext(provider.stream(request)) if streamed else provider.complete(request)
            with pytest.raises(FieldUnsupported) as caught:
                await answer

    assert caught.value.field == field
    assert f"its protocol cannot carry the `{field}` of this request" in str(caught.value)
    assert not caught.value.may_be_billed
    assert standin.requests == []


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("model", "key", "missing"),
    [
        ("gemini/gemini-2.0-flash", None, "`api_key` or GEMINI_API_KEY or GOOGLE_API_KEY"),
        ("azure/gpt-4o", None, "`api_key` or AZURE_OPENAI_API_KEY or AZURE_OPENAI_AD_TOKEN"),
        ("azure/gpt-4o", "k", "`base_url`"),
        ("azure_ai/x", "k", "`base_url`"),
        ("snowflake/x", None, "`api_key`"),
        ("cloudflare/@cf/x", None, "`api_key`"),
        ("fireworks_ai/x", None, "`api_key` or FIREWORKS_API_KEY"),
        ("watsonx/ibm/granite", None, "WX_PROJECT_ID or WX_SPACE_ID"),
        ("databricks/dbrx", None, "`base_url` or `api_key`"),
    ],
)
async def test_what_a_provider_lacks_in_the_file_is_no_fault_of_whoever_asks(
    model: str, key: str | None, missing: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_API_BASE", "_TOKEN")):
            monkeypatch.delenv(name)
    spec = ProviderSpec(id="one", kind="litellm", api_key=SecretStr(key) if key else None)

    async with aclosing(open_provider(spec)) as provider:
        request = call(model)
        answer = anext(provider.stream(request)) if streamed else provider.complete(request)
        with pytest.raises(ProviderError) as caught:
            await answer

    error = caught.value
    assert f"as it is set up in sekha.yaml, for lack of {missing}" in str(error)
    assert (error.code, error.health, error.retryable, error.falls_back) == ("provider_error", "failing", False, True)
    assert not error.may_be_billed


@pytest.mark.parametrize(
    ("kind", "field", "value", "place"),
    [
        ("anthropic", "response_format", {"type": "json_object"}, "response_format"),
        ("ollama", "tool_choice", "required", "tool_choice"),
        ("ollama", "tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice"),
        ("ollama", "functions", [{"name": "f", "parameters": {}}], "functions"),
        ("ollama", "reasoning_effort", "zzz", "reasoning_effort"),
        ("ollama", "seed", 2.0**70, "seed"),
        ("ollama", "tools", [{"type": "mcp"}], "tools[0]"),
        *[
            (kind, field, value, place)
            for kind in ("anthropic", "ollama")
            for field, value, place in [
                ("tools", [{}], "tools[0]"),
                ("tools", [{"type": "custom", "custom": {"name": "x"}}], "tools[0]"),
                ("tools", [tool(), {"type": "function", "function": {}}], "tools[1].function"),
                ("tools", [{"type": "function"}], "tools[0].function"),
                ("tool_choice", "zzz", "tool_choice"),
                ("response_format", "json", "response_format"),
                ("response_format", [1], "response_format"),
                ("response_format", {"type": "json_schema", "json_schema": None}, "response_format"),
                ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "response_format"),
                ("stop", 5, "stop"),
                ("stop", [5], "stop"),
                ("reasoning_effort", 5, "reasoning_effort"),
            ]
        ],
    ],
)
async def test_a_value_that_a_protocol_cannot_carry_is_refused_and_not_left_out(
    kind: ProviderKind, field: str, value: object, place: str
) -> None:
    fields = {"tools": [tool()], field: value}
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind=kind, base_url=standin.url, api_key=SecretStr("k"))
        with pytest.raises(FieldUnsupported) as caught:
            await ask(spec, call("claude-sonnet-4-5", **fields))

    assert caught.value.field == place
    assert standin.requests == []


@pytest.mark.parametrize("kind", ["anthropic", "ollama"])
async def test_a_callers_own_timeout_is_refused_and_not_left_out(kind: ProviderKind) -> None:
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind=kind, base_url=standin.url, api_key=SecretStr("k"))
        with pytest.raises(FieldUnsupported) as caught:
            await ask(spec, call("claude-sonnet-4-5", timeout=30))

    assert caught.value.field == "timeout"
    assert standin.requests == []


async def test_ollama_is_given_no_tools_where_none_may_be_called() -> None:
    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind="ollama", base_url=standin.url)
        await ask(spec, call("llama3", tools=[tool()], tool_choice="none"))
        await ask(spec, call("llama3", tools=[tool()], tool_choice="auto"))

    assert ["tools" in request.json for request in standin.requests] == [False, True]


async def test_an_answer_that_cannot_be_read_may_be_billed() -> None:
    async with StandIn() as standin:
        standin.garbage()

        with pytest.raises(BadReply) as caught:
            await ask(ProviderSpec(id="one", kind="anthropic", base_url=standin.url), call("claude-sonnet-4-5"))

    assert caught.value.may_be_billed


def test_litellm_is_imported_by_the_first_call_only() -> None:
    program = (
        "import sys; from sekha.providers.opening import open_provider; from sekha.registry import ProviderSpec; "
        "open_provider(ProviderSpec(id='one', kind='anthropic')); assert 'litellm' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


def test_litellm_is_imported_ahead_once_where_a_provider_needs_it_and_whoever_asks_meanwhile_waits() -> None:
    program = """
import asyncio, sys, threading
from sekha.errors import ProviderError
from sekha.providers.base import ChatCall
from sekha.providers.opening import import_ahead, open_provider
from sekha.registry import Model, ProviderSpec

openai = ProviderSpec(id="one", kind="openai", base_url="http://127.0.0.1:1")
ollama = ProviderSpec(id="two", kind="ollama", base_url="http://127.0.0.1:1")
model = Model(id="m", provider_id="two", tasks=("chat_small",))

def importing():
    return sum(thread.name == "litellm" for thread in threading.enumerate())

async def main():
    import_ahead([openai])
    assert "litellm" not in sys.modules and not importing()
    import_ahead([openai, ollama])
    assert importing() == 1
    call = ChatCall(model=model, messages=[{"role": "user", "content": "Hi"}], timeout_seconds=90)
    asking = [asyncio.create_task(open_provider(ollama).complete(call)) for _ in range(50)]
    asking[0].cancel()
    # Those who wait take no thread from whoever else needs one.
    async with asyncio.timeout(30):
        await asyncio.to_thread(int)
    assert importing() == 1
    failed = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(error, ProviderError) for error in failed[1:]), failed
    assert not importing()

asyncio.run(main())
"""

    subprocess.run([sys.executable, "-c", program], check=True)


def test_who_waits_for_litellm_waits_no_longer_than_a_call_may_take_and_the_provider_is_not_blamed(
    tmp_path: Path,
) -> None:
    (tmp_path / "litellm").mkdir()
    (tmp_path / "litellm" / "__init__.py").write_text("import time\ntime.sleep(120)\n")
    program = f"""
import asyncio, sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
from sekha.errors import NotLoaded
from sekha.providers.base import ChatCall
from sekha.providers.opening import open_provider
from sekha.registry import Model, ProviderSpec

model = Model(id="m", provider_id="two", tasks=("chat_small",), dimension=3)
call = ChatCall(model=model, messages=[{{"role": "user", "content": "Hi"}}], timeout_seconds=0.3)

async def main():
    provider = open_provider(ProviderSpec(id="two", kind="ollama", base_url="http://127.0.0.1:1"))
    for _ in range(2):
        embedding = provider.embed(model, ["a"], timeout_seconds=0.3)
        for ask in (provider.complete(call), anext(provider.stream(call)), embedding):
            began = time.monotonic()
            try:
                await ask
            except NotLoaded as error:
                assert "LiteLLM is still being loaded" in str(error)
                assert (error.retryable, error.falls_back, error.health) == (True, True, "unknown")
                assert not error.may_be_billed
            else:
                raise AssertionError("it was answered")
            assert time.monotonic() - began < 30
    assert sum(thread.name == "litellm" for thread in threading.enumerate()) == 1

asyncio.run(main())
"""

    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
