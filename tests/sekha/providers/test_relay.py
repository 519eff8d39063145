from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import SecretStr

from sekha.errors import (
    BadReply,
    ContentRefused,
    ContextExceeded,
    DimensionMismatch,
    ModelNotFound,
    ProviderAuthFailed,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    StreamBroken,
)
from sekha.pricing import Usage
from sekha.providers.base import ChatCall
from sekha.providers.opening import open_provider
from sekha.providers.relay import RelayProvider, RelayStream
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.testing import StandIn
from tests.fixtures.upstream import Answer, Upstream, chunked, with_length
from tests.fixtures.ways import streamed as piece_by_piece

SECRET = "sk-relay-0123456789abcdef"
PROMPT = "Tell me about the confidential merger"
PATIENCE = 20.0
EVENT_STREAM = ("Content-Type: text/event-stream",)
ROLE = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
WORD = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}],"usage":null}\n\n'
STOP = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n'
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":6,"completion_tokens":2,"total_tokens":8}}\n\n'
DONE = b"data: [DONE]\n\n"
NO_MAX_TOKENS = orjson.dumps(
    {
        "error": {
            "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "unsupported_parameter",
        }
    }
)
ANSWER = (
    b'{ "id":"c", "choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],'
    b' "usage":{"prompt_tokens":6,"completion_tokens":2,'
    b' "prompt_tokens_details":{"cached_tokens":4,"cache_write_tokens":1}},'
    b' "unheard": [1.10] }\n'
)


def chat(model: str = "gpt-4o-mini", *, timeout_seconds: float = PATIENCE, **options: Any) -> ChatCall:
    return ChatCall(
        model=Model(id=model, provider_id="one", tasks=("chat_small",)),
        messages=[{"role": "user", "content": PROMPT}],
        options=options,
        timeout_seconds=timeout_seconds,
    )


def embedder(dimension: int | None = 3) -> Model:
    return Model(id="embedder", provider_id="one", tasks=("embedding",), dimension=dimension)


@asynccontextmanager
async def relay_to(
    *answers: Answer | None, kind: ProviderKind = "openai"
) -> AsyncIterator[tuple[RelayProvider, Upstream]]:
    async with Upstream(*answers) as upstream:
        spec = ProviderSpec(id="one", kind=kind, base_url=f"{upstream.url}/v1", api_key=SecretStr(SECRET))
        async with aclosing(RelayProvider(spec)) as provider:
            yield provider, upstream


async def broken(*pieces: bytes) -> tuple[bytes, StreamBroken]:
    """What arrived of a stream of these pieces, and what broke it then."""
    received: list[bytes] = []
    async with relay_to(events(*pieces)) as (provider, _):
        stream = await provider.open_stream(chat())
        with pytest.raises(StreamBroken) as caught:
            await gather(stream, received)
    return b"".join(received), caught.value


async def streamed(answer: Answer, **options: Any) -> tuple[bytes, RelayStream]:
    async with relay_to(answer) as (provider, _):
        stream = await provider.open_stream(chat(**options))
        blocks = [block async for block in stream]
        await stream.aclose()
        return b"".join(blocks), stream


async def gather(stream: RelayStream, received: list[bytes]) -> None:
    async for block in stream:
        received.append(block)


def sent(upstream: Upstream) -> Any:
    return orjson.loads(upstream.requests[-1].partition(b"\r\n\r\n")[2])


def events(*pieces: bytes, end: bool = True) -> bytes:
    return chunked(*pieces, headers=EVENT_STREAM, end=end)


# --- whole answers -------------------------------------------------------------------------


async def test_an_answer_is_handed_on_byte_for_byte() -> None:
    async with relay_to(with_length(ANSWER)) as (provider, _):
        completion = await provider.complete(chat())

    assert completion.raw == ANSWER
    assert completion.text == "Hi"
    assert completion.usage == Usage(input_tokens=6, output_tokens=2, cached_tokens=4, cache_write_tokens=1)


async def test_every_field_goes_out_as_it_came_in() -> None:
    options = {"temperature": 0.5, "seed": 7, "unheard_of": {"a": [1, None]}, "metadata": {"x": "y"}, "stop": None}

    async with relay_to(with_length(ANSWER)) as (provider, upstream):
        await provider.complete(chat(**options, stream=True, stream_options={"include_usage": True}))

        assert sent(upstream) == {
            "model": "gpt-4o-mini",
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0.5,
            "seed": 7,
            "unheard_of": {"a": [1, None]},
            "metadata": {"x": "y"},
        }
        assert upstream.requests[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert f"authorization: Bearer {SECRET}\r\n".encode() in upstream.requests[0]


@pytest.mark.parametrize(
    ("kind", "model", "field"),
    [
        ("openai", "gpt-4o-mini", "max_tokens"),
        ("openai", "o1", "max_completion_tokens"),
        ("openai", "o3-mini", "max_completion_tokens"),
        ("openai", "gpt-5-mini", "max_completion_tokens"),
        ("openai", "ft:gpt-5-mini:us", "max_completion_tokens"),
        ("openai", "gpt-oss-20b", "max_tokens"),
        ("openai", "olmo-2", "max_tokens"),
        ("openrouter", "openai/gpt-5-mini", "max_tokens"),
    ],
)
async def test_a_limit_has_the_name_that_the_model_takes(kind: ProviderKind, model: str, field: str) -> None:
    async with relay_to(with_length(ANSWER), kind=kind) as (provider, upstream):
        await provider.complete(chat(model, max_tokens=9))

        assert {name: value for name, value in sent(upstream).items() if "tokens" in name} == {field: 9}


@pytest.mark.parametrize("how", ["complete", "stream"])
async def test_a_model_that_refuses_a_limit_by_one_name_is_asked_by_the_other_from_then_on(how: str) -> None:
    answer = with_length(ANSWER) if how == "complete" else events(ROLE, WORD, STOP, DONE)
    async with relay_to(with_length(NO_MAX_TOKENS, status="400 Bad Request"), answer) as (provider, upstream):
        for _ in range(2):
            if how == "complete":
                await provider.complete(chat("our-deployment", max_tokens=9))
            else:
                stream = await provider.open_stream(chat("our-deployment", max_tokens=9))
                assert [block async for block in stream]
                await stream.aclose()

        limits = [
            {name: value for name, value in asked.items() if "_tokens" in name}
            for request in upstream.requests
            for asked in [orjson.loads(request.partition(b"\r\n\r\n")[2])]
        ]

    assert limits == [{"max_tokens": 9}, {"max_completion_tokens": 9}, {"max_completion_tokens": 9}]


@pytest.mark.parametrize("how", ["complete", "stream"])
async def test_a_model_that_refuses_a_limit_by_either_name_is_asked_no_more(how: str) -> None:
    async with relay_to(with_length(NO_MAX_TOKENS, status="400 Bad Request")) as (provider, upstream):
        for _ in range(2):
            ask = provider.complete if how == "complete" else provider.open_stream
            with pytest.raises(ProviderRejected) as caught:
                await ask(chat(max_tokens=9))
            assert "not supported" in caught.value.told
        with pytest.raises(ProviderRejected):
            await provider.complete(chat())

        assert len(upstream.requests) == 2 * 2 + 1


async def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")

    async with StandIn() as standin:
        spec = ProviderSpec(id="one", kind="openai", base_url=standin.openai_url)
        async with aclosing(open_provider(spec)) as provider:
            await provider.complete(chat())

    assert "authorization" not in {name.lower() for name in standin.requests[0].headers}


@pytest.mark.parametrize(
    ("body", "expected", "says"),
    [
        (b'{"error":{"code":429,"message":"Slow down"}}', RateLimited, "Slow down"),
        (b'{"error":{"code":502,"message":"Upstream is down"}}', ProviderUnavailable, "Upstream is down"),
        (b'{"error":{"message":"No."}}', BadReply, "No"),
        (b'{"choices":[]}', BadReply, "it has no choices"),
        (b'{"choices":[{"index":0}]}', BadReply, "a choice has no message"),
        (b"[1]", BadReply, "it is not the JSON of its API"),
        (b"", BadReply, "it is not the JSON of its API"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(body: bytes, expected: type[ProviderError], says: str) -> None:
    async with relay_to(with_length(body)) as (provider, _):
        with pytest.raises(expected) as whole:
            await provider.complete(chat())
        with pytest.raises(expected) as in_pieces:
            await provider.open_stream(chat())

    assert type(whole.value) is expected
    assert type(in_pieces.value) is expected
    assert says in whole.value.told


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"code": "content_filter", "type": "invalid_request_error"}, ContentRefused),
        ({"code": "content_policy_violation", "type": "x"}, ContentRefused),
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, ContextExceeded),
        ({"code": "unsupported_value", "type": "invalid_request_error"}, ProviderRejected),
        ({"code": None, "type": "invalid_request_error"}, ProviderRejected),
        ({"code": "400"}, ProviderRejected),
        ({"code": "429"}, RateLimited),
        ({"code": "rate_limit_exceeded", "type": "requests"}, RateLimited),
        ({"type": "rate_limit_error"}, RateLimited),
        ({"code": "insufficient_quota", "type": "insufficient_quota"}, ProviderError),
        ({"code": "invalid_api_key", "type": "invalid_request_error"}, ProviderAuthFailed),
        ({"type": "authentication_error"}, ProviderAuthFailed),
        ({"code": "model_not_found", "type": "invalid_request_error"}, ModelNotFound),
        ({"type": "overloaded_error"}, ProviderUnavailable),
        ({"type": "server_error"}, ProviderUnavailable),
        ({"code": "BadRequest", "type": "x"}, ProviderRejected),
        ({"object": "error", "type": "BadRequestError"}, ProviderRejected),
        ({"code": "InternalServerError"}, ProviderUnavailable),
        ({"code": "data_inspection_failed", "type": "data_inspection_failed"}, ContentRefused),
        ({"code": "DataInspectionFailed", "type": "x"}, ContentRefused),
        ({"code": "none that we know", "type": "x"}, BadReply),
        ({"code": "20"}, BadReply),
        ({"code": ["400"], "type": {}}, BadReply),
    ],
)
async def test_an_error_within_an_answer_means_what_its_code_or_its_type_stands_for(
    error: dict[str, Any], expected: type[ProviderError]
) -> None:
    body = orjson.dumps({"error": {"message": "No.", **error}})
    async with relay_to(with_length(body), events(b"data: " + body + b"\n\n")) as (provider, _):
        with pytest.raises(ProviderError) as whole:
            await provider.complete(chat())
        with pytest.raises(ProviderError) as streamed_:
            await provider.open_stream(chat())

    assert (type(whole.value), type(streamed_.value)) == (expected, expected)


@pytest.mark.parametrize(
    "usage",
    [
        "null",
        "7",
        "{}",
        '{"prompt_tokens":0,"completion_tokens":0}',
        '{"prompt_tokens":"6"}',
        '{"prompt_tokens":-6}',
        '{"prompt_tokens":6}',
        '{"prompt_tokens":6,"completion_tokens":null}',
        '{"prompt_tokens":6,"total_tokens":6}',
        '{"prompt_tokens":"6","completion_tokens":2}',
        '{"prompt_tokens":6,"completion_tokens":"2","total_tokens":"8"}',
        '{"completion_tokens":9,"total_tokens":8}',
    ],
)
async def test_usage_that_says_nothing_is_none(usage: str) -> None:
    body = ANSWER[: ANSWER.index(b"{", 2 + ANSWER.index(b'"usage"'))] + usage.encode() + b"}"

    async with relay_to(with_length(body)) as (provider, _):
        assert (await provider.complete(chat())).usage is None


@pytest.mark.parametrize(
    "usage",
    [
        '{"prompt_tokens":6,"total_tokens":8}',
        '{"prompt_tokens":6,"completion_tokens":null,"total_tokens":8}',
        '{"prompt_tokens":"6","completion_tokens":2,"total_tokens":8}',
        '{"completion_tokens":2,"total_tokens":8}',
    ],
)
async def test_half_of_a_usage_is_made_whole_by_its_total(usage: str) -> None:
    body = ANSWER[: ANSWER.index(b"{", 2 + ANSWER.index(b'"usage"'))] + usage.encode() + b"}"
    counted = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % usage.encode()

    async with relay_to(with_length(body)) as (provider, _):
        whole = await provider.complete(chat())
    handed_on, stream = await streamed(events(ROLE, WORD, STOP, counted, DONE))

    assert whole.usage == stream.usage == Usage(input_tokens=6, output_tokens=2)
    assert handed_on == ROLE + WORD + STOP


@pytest.mark.parametrize(
    ("total", "more", "counts"),
    [
        ("135", '"completion_tokens_details":{"reasoning_tokens":94}', (32, 103, 0)),  # as xAI reports them
        ("41", '"completion_tokens_details":{"reasoning_tokens":4}', (32, 9, 0)),  # as OpenAI does
        ("41", '"completion_tokens_details":null', (32, 9, 0)),
        ("135", '"x":0', (32, 103, 0)),  # as Gemini does
        ("1041", '"cache_read_input_tokens":1000', (1032, 9, 1000)),
        ("1141", '"cache_read_input_tokens":1000', (32, 1109, 32)),
        (
            "51",
            '"prompt_tokens_details":{"cached_tokens":10},"completion_tokens_details":{"reasoning_tokens":10}',
            (32, 19, 10),
        ),
        ("40", '"x":0', (32, 9, 0)),
        ("null", '"completion_tokens_details":{"reasoning_tokens":94}', (32, 9, 0)),
        ('"135"', '"x":0', (32, 9, 0)),
        ("1e300", '"x":0', (32, 9, 0)),
    ],
)
async def test_what_the_total_has_beyond_both_halves_is_counted(
    total: str, more: str, counts: tuple[int, int, int]
) -> None:
    usage = f'{{"prompt_tokens":32,"completion_tokens":9,"total_tokens":{total},{more}}}'.encode()
    body = ANSWER[: ANSWER.index(b"{", 2 + ANSWER.index(b'"usage"'))] + usage + b"}"
    counted = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % usage
    went_in, came_out, cached = counts

    async with relay_to(with_length(body)) as (provider, _):
        whole = await provider.complete(chat())
    _, stream = await streamed(events(ROLE, WORD, STOP, counted, DONE))

    used = Usage(input_tokens=went_in, output_tokens=came_out, cached_tokens=cached)
    assert whole.usage == stream.usage == used
    assert usage in (whole.raw or b"")


@pytest.mark.parametrize(("said", "is_whole"), [(b"", True), (b"A word", False)], ids=["nothing", "something"])
async def test_no_output_is_a_report_where_nothing_was_said_alone(said: bytes, *, is_whole: bool) -> None:
    usage = b'"usage":{"prompt_tokens":6,"completion_tokens":0,"total_tokens":6}'
    message = b'"message":{"role":"assistant","content":"%b"}' % said
    word = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % said
    counted = b'data: {"id":"c","choices":[],%b}\n\n' % usage

    async with relay_to(with_length(b'{"choices":[{"index":0,%b}],%b}' % (message, usage))) as (provider, _):
        whole = await provider.complete(chat())
    _, stream = await streamed(events(ROLE, word, STOP, counted, DONE))

    assert whole.usage == stream.usage == (Usage(input_tokens=6) if is_whole else None)
    assert is_whole or whole.half == stream.went_in == Usage(input_tokens=6)


async def test_half_of_a_usage_that_the_caller_did_not_ask_for_is_not_handed_on() -> None:
    half = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":6,"completion_tokens":null}}\n\n'

    handed_on, stream = await streamed(events(ROLE, WORD, STOP, half, DONE))

    assert (handed_on, stream.usage) == (ROLE + WORD + STOP, None)


async def test_a_request_that_json_cannot_carry_is_the_callers_to_change() -> None:
    async with relay_to(with_length(ANSWER)) as (provider, upstream):
        for value in ("\ud800", 2**70, object()):
            with pytest.raises(ProviderRejected, match="cannot be written as JSON"):
                await provider.complete(chat(user=value))

        assert upstream.requests == []


async def test_a_key_that_no_header_can_carry_is_said_without_quoting_it() -> None:
    spec = ProviderSpec(id="one", kind="openai", base_url="http://127.0.0.1:9", api_key=SecretStr("sk-abc\r\nx"))

    with pytest.raises(ProviderAuthFailed, match="no header can carry") as caught:
        await RelayProvider(spec).complete(chat())

    assert "sk-abc" not in "".join(traceback.format_exception(caught.value))


async def test_neither_key_nor_prompt_is_in_an_error_or_its_causes() -> None:
    said = orjson.dumps({"error": {"message": f"Bad: {PROMPT} of {SECRET}"}})

    async with relay_to(with_length(said, status="400 Bad"), with_length(said), None) as (provider, _):
        for _ in range(3):
            with pytest.raises(ProviderError) as caught:
                await provider.complete(chat())

            shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__dict__)
            assert PROMPT not in shown
            assert SECRET not in shown


async def test_an_attempt_that_cannot_have_been_billed_is_told_from_one_that_can() -> None:
    half = with_length(ANSWER)[:-9]

    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(half)
        await writer.drain()
        writer.close()

    async with relay_to(break_off) as (provider, upstream):
        with pytest.raises(ProviderUnavailable) as cut:
            await provider.complete(chat())
        refused = RelayProvider(ProviderSpec(id="one", kind="openai", base_url=upstream.url))
    with pytest.raises(ProviderUnavailable) as never_sent:
        await refused.complete(chat())

    assert cut.value.may_be_billed
    assert not never_sent.value.may_be_billed


REDIRECT = with_length(
    b"", "Location: https://user:pw@elsewhere.example:8443/v2?key=abc", status="307 Temporary Redirect"
)


@pytest.mark.parametrize(
    ("answer", "expected", "says"),
    [
        (
            REDIRECT,
            ProviderError,
            "HTTP 307; it redirects to https://elsewhere.example:8443, and `base_url`",
        ),
        (
            with_length(b"", "Location: /v2", status="301 Moved"),
            ProviderError,
            "HTTP 301; it redirects, and `base_url`",
        ),
        (with_length(b"", "Location: https://[x", status="302 Found"), ProviderError, "it redirects, and `base_url`"),
        (with_length(b"", status="304 Not Modified"), ProviderError, "HTTP 304"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", BadReply, "HTTP 204"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", BadReply, "HTTP 101"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", BadReply, "HTTP 101"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", BadReply, "it is not HTTP/1.1"),
        (with_length(b'{"error":{"message":"No."},"choices":[]}'), BadReply, "No."),
        (with_length(b'{"error":"it failed"}'), BadReply, "it failed"),
    ],
)
async def test_an_answer_that_nobody_worked_on_is_not_billed_and_leaves_room_for_another_provider(
    answer: bytes, expected: type[ProviderError], says: str
) -> None:
    async with relay_to(answer) as (provider, _):
        for ask in (provider.complete, provider.open_stream):
            with pytest.raises(ProviderError) as caught:
                await ask(chat())

            assert type(caught.value) is expected
            assert says in caught.value.told
            assert "pw" not in caught.value.told
            assert "key=abc" not in caught.value.told
            assert caught.value.falls_back
            assert caught.value.retryable is (expected is BadReply)
            assert not caught.value.may_be_billed


@pytest.mark.parametrize(
    "answer",
    [
        with_length(b'{"choices":[{"mess'),
        with_length(b"\x00\x01", "Content-Encoding: br"),
        with_length(b'{"error":{"message":"No."},"usage":{"prompt_tokens":6,"completion_tokens":2}}'),
        with_length(b'{"error":{"message":"No."},"choices":[{"index":0}]}'),
        with_length(ANSWER, status="201 Created"),
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
    ],
)
async def test_an_answer_that_cannot_be_used_may_be_billed(answer: bytes) -> None:
    async with relay_to(answer) as (provider, _):
        for ask in (provider.complete, provider.open_stream):
            with pytest.raises(BadReply) as caught:
                await ask(chat())

            assert caught.value.may_be_billed


def test_nothing_heavy_is_imported_on_the_way() -> None:
    program = (
        "import asyncio, sys\n"
        "from sekha.providers.opening import open_provider\n"
        "from sekha.providers.base import ChatCall\n"
        "from sekha.registry import Model, ProviderSpec\n"
        "from sekha.errors import ProviderUnavailable\n"
        "provider = open_provider(ProviderSpec(id='one', kind='openai', base_url='http://127.0.0.1:1'))\n"
        "call = ChatCall(model=Model(id='m', provider_id='one', tasks=('chat_small',)), messages=[])\n"
        "try: asyncio.run(provider.complete(call))\n"
        "except ProviderUnavailable: pass\n"
        "print([name for name in ('litellm', 'httpx', 'openai', 'aiohttp', 'prefect') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"


# --- streams -------------------------------------------------------------------------------


async def test_a_stream_is_handed_on_byte_for_byte_but_for_its_last_word() -> None:
    handed_on, stream = await streamed(
        events(b": hello\n\n", ROLE, WORD, WORD[:20], WORD[20:], STOP, USAGE, DONE),
        stream_options={"include_usage": True},
    )

    assert handed_on == b": hello\n\n" + ROLE + WORD * 2 + STOP + USAGE
    assert stream.usage == Usage(input_tokens=6, output_tokens=2)
    assert stream.said() == "wordword"


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
async def test_usage_that_the_caller_did_not_ask_for_is_known_and_not_handed_on(options: dict[str, Any]) -> None:
    async with relay_to(events(ROLE, WORD, STOP, USAGE, DONE)) as (provider, upstream):
        stream = await provider.open_stream(chat(**options))
        handed_on = b"".join([block async for block in stream])

        assert sent(upstream)["stream_options"] == {"include_usage": True}
        assert sent(upstream)["stream"] is True
    assert handed_on == ROLE + WORD + STOP
    assert stream.usage == Usage(input_tokens=6, output_tokens=2)


async def test_usage_that_comes_with_a_choice_is_handed_on() -> None:
    together = STOP.replace(b'"usage":null', b'"usage": {"prompt_tokens": 6, "completion_tokens": 2}')

    handed_on, stream = await streamed(events(ROLE, together, DONE))

    assert handed_on == ROLE + together
    assert stream.usage == Usage(input_tokens=6, output_tokens=2)


def reporting(event: bytes, came_out: int) -> bytes:
    usage = b'"usage":{"prompt_tokens":6,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":4}}' % came_out
    return event.replace(b',"usage":null', b"")[:-3] + b"," + usage + b"}\n\n"


AT_FIRST, LONG_WORD = reporting(ROLE, 0), WORD.replace(b"word", b"word" * 750_000)


@pytest.mark.parametrize(
    ("pieces", "came_out"),
    [
        ((AT_FIRST, WORD, STOP), None),
        ((AT_FIRST + WORD + STOP,), None),
        ((AT_FIRST, WORD, LONG_WORD, LONG_WORD, STOP), None),
        ((reporting(WORD, 1), WORD, STOP), None),
        ((AT_FIRST, WORD, STOP, reporting(STOP, 2)), 2),
        ((AT_FIRST, WORD, LONG_WORD, LONG_WORD, reporting(STOP, 2)), 2),
        ((reporting(ROLE, 0), reporting(WORD, 1), reporting(WORD, 2), STOP), 2),
        ((ROLE, WORD, reporting(LONG_WORD, 2), STOP), 2),
    ],
)
@pytest.mark.parametrize("last", [DONE, b""])
async def test_what_is_reported_is_of_the_whole_where_nothing_is_said_after_it(
    pieces: tuple[bytes, ...], came_out: int | None, last: bytes
) -> None:
    _, stream = await streamed(events(*pieces, *([last] if last else ())))

    reported = None if came_out is None else Usage(input_tokens=6, output_tokens=came_out, cached_tokens=4)
    assert stream.usage == reported
    assert stream.went_in is not None
    assert (stream.went_in.input_tokens, stream.went_in.cached_tokens) == (6, 4)


@pytest.mark.parametrize(
    ("pieces", "is_whole"),
    [
        ((AT_FIRST, WORD), False),
        ((reporting(ROLE, 0), reporting(WORD, 1), reporting(WORD, 2)), False),
        ((WORD, STOP, USAGE), True),
        ((WORD, reporting(STOP, 2)), True),
    ],
)
async def test_of_a_stream_that_is_cut_only_what_came_with_its_end_or_after_is_of_the_whole(
    pieces: tuple[bytes, ...], is_whole: bool
) -> None:
    received: list[bytes] = []
    async with relay_to(piece_by_piece(*pieces, ends="never")) as (provider, _):
        stream = await provider.open_stream(chat())
        with pytest.raises(StreamBroken):
            await gather(stream, received)

    assert (stream.usage is not None) is is_whole
    assert stream.went_in is not None


async def test_words_that_mean_something_mean_nothing_within_what_is_said() -> None:
    said = 'data: [DONE] {"error": {"message": "x"}} "usage": {"completion_tokens": 9}'
    tricky = b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": said}}]}) + b"\n\n"

    handed_on, stream = await streamed(events(ROLE, tricky, STOP, DONE))

    assert handed_on == ROLE + tricky + STOP
    assert stream.said() == said
    assert stream.usage is None


@pytest.mark.parametrize("last", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n\r\n", b""])
async def test_a_stream_may_end_in_any_of_the_ways_there_are(last: bytes) -> None:
    handed_on, _ = await streamed(events(*[piece for piece in (ROLE, WORD, STOP, last) if piece]))

    assert handed_on == ROLE + WORD + STOP


async def test_a_stream_that_ends_without_saying_so_is_broken() -> None:
    async with relay_to(events(ROLE, WORD)) as (provider, _):
        stream = await provider.open_stream(chat())
        received: list[bytes] = []
        with pytest.raises(StreamBroken, match="it ended without saying so"):
            await gather(stream, received)

    assert b"".join(received) == ROLE + WORD


def of_choice(index: int, reason: str | None = None, *, said: str = "word") -> bytes:
    choice = {"index": index, "delta": {"content": said}, "finish_reason": reason}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


LONG = "x" * 3_000_000


@pytest.mark.parametrize(
    "pieces",
    [
        (of_choice(0), of_choice(1), of_choice(0, "stop"), of_choice(1)),
        (of_choice(0) + of_choice(1) + of_choice(1, "stop"),),
        (of_choice(0), of_choice(1, said=LONG), of_choice(0, "stop", said=LONG), WORD),
    ],
    ids=["by turns", "together", "forgotten"],
)
@pytest.mark.parametrize("ends", [False, True])
async def test_without_its_last_word_a_stream_is_whole_when_each_of_its_choices_ended(
    pieces: tuple[bytes, ...], ends: bool
) -> None:
    last = (of_choice(1, "length"), of_choice(0, "stop")) if ends else ()
    async with relay_to(events(*pieces, *last)) as (provider, _):
        stream = await provider.open_stream(chat())
        received: list[bytes] = []
        if ends:
            await gather(stream, received)
        else:
            with pytest.raises(StreamBroken, match="it ended without saying so"):
                await gather(stream, received)

    assert b"".join(received) == b"".join(pieces + last)


@pytest.mark.parametrize("n", [None, 1, 2, True, "2"])
async def test_without_its_last_word_a_stream_is_whole_when_it_has_the_choices_that_were_asked_for(n: object) -> None:
    async with relay_to(events(of_choice(0), of_choice(0, "stop"))) as (provider, _):
        stream = await provider.open_stream(chat(n=n))
        received: list[bytes] = []
        if n == 2:
            with pytest.raises(StreamBroken, match="it ended without saying so"):
                await gather(stream, received)
        else:
            await gather(stream, received)
    assert len(received) > 0

    whole, _ = await streamed(events(of_choice(0, "stop"), of_choice(1, "stop")), n=n)
    ended, _ = await streamed(events(of_choice(0, "stop"), DONE), n=n)
    assert whole.startswith(ended)


ERRORS = [
    b'event: error\ndata: {"message":"overloaded","type":"x"}\n\n',
    b'data: {"message":"overloaded"}\nevent:error\n\n',
    b"event: error\ndata: overloaded\n\n",
    b'data: {"object":"error","message":"overloaded","code":500}\n\n',
]


@pytest.mark.parametrize("failing", ERRORS)
@pytest.mark.parametrize("together", [False, True])
async def test_an_event_that_is_called_an_error_is_one_whatever_it_carries(failing: bytes, together: bool) -> None:
    for spoken in ((), (ROLE,)):
        pieces = (*spoken, failing, DONE)
        async with relay_to(events(*([b"".join(pieces)] if together else pieces))) as (provider, _):
            with pytest.raises(ProviderError) as early:
                await provider.open_stream(chat())
        assert early.value.falls_back
        assert not early.value.may_be_billed
        assert "overloaded" in early.value.told

    pieces = (ROLE, WORD, failing, STOP, DONE)
    received, late = await broken(*([b"".join(pieces)] if together else pieces))
    assert received == ROLE + WORD
    assert "overloaded" in late.told


@pytest.mark.parametrize("together", [False, True])
async def test_an_answer_of_nothing_is_whole_where_its_usage_or_its_end_is_told(together: bool) -> None:
    for last in (USAGE, STOP):
        pieces = (ROLE, last, DONE)
        handed_on, _ = await streamed(events(*([b"".join(pieces)] if together else pieces)))
        assert handed_on == ROLE + (STOP if last is STOP else b"")


async def test_an_error_in_the_middle_breaks_the_stream_after_what_was_said() -> None:
    failing = (
        b"data: "
        + orjson.dumps({"error": {"code": 502, "message": f"Overloaded by {PROMPT}"}, "choices": []})
        + b"\n\n"
    )

    received, error = await broken(ROLE, WORD, failing, WORD, DONE)

    assert received == ROLE + WORD
    assert "Overloaded by" in error.told
    assert "Overloaded by" not in str(error)
    assert PROMPT not in error.told
    assert not error.falls_back


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (events(b'data: {"error":{"code":429,"message":"Slow down"}}\n\n'), RateLimited),
        (events(b": waiting\n\n", b'data: {"error":{"code":404,"message":"No such model"}}\n\n'), ModelNotFound),
        (events(DONE), BadReply),
        (events(b": waiting\n\n"), BadReply),
        (events(b"data: hello\n\n"), BadReply),
        (events(PING, DONE), BadReply),
        (events(PING + ROLE, PING), BadReply),
        (events(PING, b'data: {"error":{"code":429,"message":"Slow down"}}\n\n'), RateLimited),
        (events(ROLE, DONE), BadReply),
        (events(ROLE + DONE), BadReply),
        (events(b'data: {"choices":[{"del\n\n', WORD, STOP, DONE), BadReply),
        (events(), BadReply),
        (with_length(ANSWER.replace(b'"message"', b'"delta"')), BadReply),
        (with_length(b"", "Retry-After: 2", status="503 No"), ProviderUnavailable),
    ],
)
async def test_until_the_first_event_a_failure_leaves_room_for_another_provider(
    answer: bytes, expected: type[ProviderError]
) -> None:
    async with relay_to(answer) as (provider, _):
        with pytest.raises(expected) as caught:
            await provider.open_stream(chat())

    assert type(caught.value) is expected
    assert caught.value.falls_back


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ((b'data: {"error":{"code":429,"message":"Slow down"}}\n\n',), RateLimited),
        ((b'data: {"error":{"message":"Overloaded"}}\n\n', WORD), ProviderError),
        ((b"\x00\xff<html>\n\n",), BadReply),
        ((b'data: {"choices":[{"del\n\n', WORD, STOP, DONE), BadReply),
        ((), BadReply),
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_what_names_who_speaks_is_no_token_yet(
    rest: tuple[bytes, ...], expected: type[ProviderError], together: bool
) -> None:
    pieces = (ROLE, *rest)
    async with relay_to(events(*([b"".join(pieces)] if together else pieces))) as (provider, _):
        with pytest.raises(expected) as caught:
            await provider.open_stream(chat())

    assert caught.value.falls_back


FILTERED = b'data: {"choices":[],"id":"","model":"","prompt_filter_results":[{"prompt_index":0}]}\n\n'
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("first", [ROLE, FILTERED, b": hello\n\n" + ROLE, b"\n\n" + ROLE, MARK + ROLE], ids=range(5))
@pytest.mark.parametrize("cuts", [(1,), (2, 4), (6, -2), (10,), (60,), (-1,)], ids=str)
async def test_the_first_event_may_come_in_pieces(first: bytes, cuts: tuple[int, ...]) -> None:
    pieces = [first[start:end] for start, end in zip((None, *cuts), (*cuts, None), strict=True)]

    handed_on, _ = await streamed(piece_by_piece(*pieces, WORD, STOP, DONE))

    assert handed_on == first.removeprefix(MARK) + WORD + STOP


@pytest.mark.parametrize("cut", [1, 2, 3, 9, -1])
async def test_a_byte_order_mark_hides_nothing_of_the_first_event(cut: int) -> None:
    first = MARK + reporting(WORD, 2)
    handed_on, stream = await streamed(piece_by_piece(first[:cut], first[cut:], STOP, DONE))
    assert handed_on == reporting(WORD, 2) + STOP
    assert (stream.said(), stream.usage) == ("word", Usage(input_tokens=6, output_tokens=2, cached_tokens=4))

    failing = MARK + b'data: {"error":{"code":429,"message":"Slow down"}}\n\n'
    async with relay_to(piece_by_piece(failing[:cut], failing[cut:])) as (provider, _):
        with pytest.raises(RateLimited):
            await provider.open_stream(chat())


async def test_a_byte_order_mark_hides_nothing_of_what_comes_whole_in_place_of_a_stream() -> None:
    handed_on, stream = await streamed(with_length(MARK + ANSWER))

    assert b'"delta":' in handed_on
    assert stream.usage == Usage(input_tokens=6, output_tokens=2, cached_tokens=4, cache_write_tokens=1)


async def test_a_byte_order_mark_elsewhere_is_no_part_of_an_event() -> None:
    received, error = await broken(ROLE, WORD, MARK + WORD, STOP, DONE)

    assert received == ROLE + WORD
    assert "what is no event" in str(error)


@pytest.mark.parametrize("first", [(PING,), (PING, PING, ROLE), (b"data: {}\n\n",), (PING + ROLE,)])
async def test_what_is_no_chunk_may_come_before_the_first(first: tuple[bytes, ...]) -> None:
    handed_on, _ = await streamed(events(*first, WORD, PING, STOP, DONE))

    assert handed_on == b"".join(first) + WORD + PING + STOP


async def test_silence_before_the_first_token_leaves_room_for_another_provider() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(events(ROLE, end=False))
        await asyncio.sleep(PATIENCE)

    async with relay_to(silent) as (provider, _):
        with pytest.raises(ProviderTimeout):
            await provider.open_stream(chat(timeout_seconds=0.3))


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "Hm"},
        {"refusal": "No"},
        {"tool_calls": [{"index": 0, "function": {"name": "look_up"}}]},
    ],
)
async def test_any_token_begins_a_stream_and_what_was_held_back_goes_out_before_it(delta: dict[str, Any]) -> None:
    first = b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + b"\n\n"
    given = asyncio.Event()

    async def waits(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(events(b": hello\n\n", ROLE, ROLE, first, end=False))
        await given.wait()
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(STOP), STOP))

    async with relay_to(waits) as (provider, _):
        stream = await provider.open_stream(chat())
        assert await anext(stream) == b": hello\n\n" + ROLE * 2 + first
        given.set()
        assert [block async for block in stream] == [STOP]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff<html>\n\n",
        b"<html>\n\n",
        b'data: {"a":"\xff"}\n\n',
        b'data: {"choices":[{"del\n\n',
        b'data: {"choices":[{"del}\n\n',
        b"data: hello\n\n",
        b"data: [1]\n\n",
        b"hello\n\n",
        b'error: {"message":"overloaded"}\n\n',
        b"Error: overloaded\n\n",
        b"httpx.ReadError: overloaded\n\n",
        b"Data: {}\n\n",
        b'id: 1\ndata: {"choices":\ndata: [{"del\n\n',
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_what_is_no_event_is_not_handed_on_and_breaks_the_stream(garbage: bytes, together: bool) -> None:
    pieces = [WORD + garbage] if together else [WORD, garbage]
    async with relay_to(events(ROLE, *pieces, STOP, DONE)) as (provider, _):
        stream = await provider.open_stream(chat())
        received: list[bytes] = []
        with pytest.raises(StreamBroken, match="it wrote what is no event"):
            await gather(stream, received)

    assert b"".join(received) == ROLE + WORD


async def test_any_line_of_events_and_any_language_is_handed_on() -> None:
    lines = b"event: x\nid: 1\nretry: 5\n: comment\ndata: {\ndata: }\n\n"
    halves = b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\ndata:{"logprob":-Infinity}\n\n'
    said = 'data: {"choices":[{"delta":{"content":"naïve 日本"}}]}\n\n'.encode()

    handed_on, _ = await streamed(events(ROLE, WORD, lines, halves, said[:50], said[50:], STOP, DONE))

    assert handed_on == ROLE + WORD + lines + halves + said + STOP


@pytest.mark.parametrize(
    "nothing",
    [
        b"data:\n\n",
        b"data: \n\n",
        b"event: keepalive\ndata:\n\n",
        b"data: []\n\n",
        b"data: null\nid: 7\n\n",
        b"data:\ndata:\n\n",
        b"data:\ndata: null\ndata\n\n",
        b"X-Bar: 1\ndata:\n\n",
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_an_event_of_nothing_is_left_out(nothing: bytes, together: bool) -> None:
    pieces = (nothing, ROLE, nothing, WORD, nothing, STOP, nothing, USAGE, DONE)

    handed_on, stream = await streamed(events(*([b"".join(pieces)] if together else pieces)))

    assert handed_on == ROLE + WORD + STOP
    assert stream.usage == Usage(input_tokens=6, output_tokens=2)


@pytest.mark.parametrize(
    "line", [b"time: 12\n", b" \n", b"data\n", b" \n\n", b"X-Bar: 1\n", b"ID: 3\n", b"x.y_Z:\n", b"data:\n"]
)
async def test_a_line_that_means_nothing_is_handed_on(line: bytes) -> None:
    handed_on, stream = await streamed(piece_by_piece(line + ROLE, line + WORD, line + STOP, USAGE, DONE))

    assert handed_on == line + ROLE + line + WORD + line + STOP
    assert (stream.said(), stream.usage) == ("word", Usage(input_tokens=6, output_tokens=2))


@pytest.mark.parametrize("together", [False, True])
async def test_the_lines_of_one_event_are_one_text(together: bool) -> None:
    start, end = WORD.split(b'"word"')
    lines = start + b'\ndata:\nX-Bar: 1\ndata: "word"' + end
    said = (ROLE, b"data:\n" + lines, STOP[:-1] + b"data:\n\n")
    pieces = (*said, USAGE[:-1] + b"data: \n\n", DONE[:-1] + b"data:\n\n")

    handed_on, stream = await streamed(events(*([b"".join(pieces)] if together else pieces)))

    assert handed_on == b"".join(said)
    assert (stream.said(), stream.usage) == ("word", Usage(input_tokens=6, output_tokens=2))


async def test_what_only_some_clients_read_is_handed_on_as_it_comes_and_counted() -> None:
    odd = WORD.replace(b'"finish_reason"', b'"logprobs":{"content":[{"logprob":-Infinity}]},"finish_reason"')
    half = WORD.replace(b"word", b"\\ud83d")
    tab = WORD.replace(b"word", b"{\t")
    given = asyncio.Event()

    async def waits(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(events(ROLE, odd, end=False))
        await given.wait()
        writer.write(events(odd, half, tab, STOP, DONE).partition(b"\r\n\r\n")[2])

    async with relay_to(waits) as (provider, _):
        stream = await provider.open_stream(chat())
        assert await anext(stream) == ROLE + odd
        given.set()
        assert b"".join([block async for block in stream]) == odd + half + tab + STOP

    assert stream.said() == "wordword?{\t"


async def test_comments_alone_do_not_keep_a_caller_waiting_beyond_its_time() -> None:
    async def only_comments(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b": waiting\n\n")
            await asyncio.sleep(0.02)

    async with relay_to(only_comments) as (provider, _):
        with pytest.raises(ProviderTimeout):
            await provider.open_stream(chat(timeout_seconds=0.3))


async def test_one_connection_serves_one_stream_after_another() -> None:
    async with relay_to(events(ROLE, STOP, DONE)) as (provider, upstream):
        for _ in range(3):
            stream = await provider.open_stream(chat())
            assert [block async for block in stream]
            await stream.aclose()

        assert upstream.connections == 1


async def test_what_was_said_can_be_counted_however_long_it_was() -> None:
    long = b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 100_000}}]}) + b"\n\n"

    _, stream = await streamed(events(ROLE, *[long] * 60, STOP))

    assert len(stream.said()) == 60 * 100_000
    assert stream.usage is None


# --- embeddings ----------------------------------------------------------------------------


def packed(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def vectors(*embeddings: object, indent: bool = False) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(embeddings)]
    body = {"object": "list", "data": data, "model": "e", "usage": {"prompt_tokens": 5, "total_tokens": 5}}
    return with_length(orjson.dumps(body, option=orjson.OPT_INDENT_2 if indent else 0))


@pytest.mark.parametrize("indent", [False, True])
@pytest.mark.parametrize("each", [packed(1, 2, 3), [1.0, -2e-05, 3]], ids=["base64", "numbers"])
async def test_embeddings_are_handed_on_byte_for_byte_and_measured(each: object, indent: bool) -> None:
    answer = vectors(each, each, indent=indent)

    async with relay_to(answer) as (provider, upstream):
        body = {"model": "any", "input": ["a", "b"], "encoding_format": "base64", "user": "me", "unheard": 1}
        embedded = await provider.embed_raw(embedder(), body, timeout_seconds=PATIENCE)

        assert sent(upstream) == body | {"model": "embedder"}
    assert embedded.raw == answer.partition(b"\r\n\r\n")[2]
    assert (embedded.count, embedded.dimension, embedded.usage) == (2, 3, Usage(input_tokens=5))


@pytest.mark.parametrize(
    ("given", "count"),
    [("text", 1), (["a"], 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), (("a", "b"), 2)],
    ids=str,
)
async def test_texts_and_tokens_are_counted_as_openai_counts_them(given: object, count: int) -> None:
    async with relay_to(vectors(*[packed(1, 2, 3)] * count)) as (provider, _):
        embedded = await provider.embed_raw(embedder(), {"input": given}, timeout_seconds=PATIENCE)

    assert embedded.count == count


async def test_the_dimensions_asked_for_are_the_ones_that_must_come() -> None:
    async with relay_to(vectors(packed(1, 2))) as (provider, _):
        shorter = await provider.embed_raw(embedder(), {"input": "a", "dimensions": 2}, timeout_seconds=PATIENCE)
        with pytest.raises(DimensionMismatch) as caught:
            await provider.embed_raw(embedder(), {"input": "a"}, timeout_seconds=PATIENCE)

    assert shorter.dimension == 2
    assert (caught.value.wanted, caught.value.returned) == (3, 2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "2 numbers, and sekha.yaml declares `dimension: 3`. Write `dimension: 2`"),
        ({"dimensions": 3}, "2 numbers, and sekha.yaml declares `dimension: 3`. Write `dimension: 2`"),
        ({"dimensions": 1}, "2 numbers, and the request asked for `dimensions: 1`. Leave that out"),
    ],
)
async def test_vectors_of_another_length_are_told_by_whoever_wanted_it(asked: dict[str, int], said: str) -> None:
    async with relay_to(vectors(packed(1, 2))) as (provider, _):
        with pytest.raises(DimensionMismatch) as caught:
            await provider.embed_raw(embedder(), {"input": "a", **asked}, timeout_seconds=PATIENCE)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        vectors(packed(1, 2, 3)),
        vectors(packed(1, 2, 3), packed(1, 2)),
        vectors([1, 2, 3], packed(1, 2)),
        vectors([], []),
        vectors([1, 2, 3], None),
        vectors("AAAA", "AAAA"),
        with_length(b'{"data":[{"embedding":[1,2,3'),
        with_length(b'{"data":[{},{}]}'),
        with_length(b'{"data":[1,2]}'),
        with_length(b'{"data":null}'),
    ],
)
async def test_vectors_that_are_not_what_was_asked_for_break_the_protocol(answer: bytes) -> None:
    async with relay_to(answer) as (provider, _):
        with pytest.raises(BadReply):
            await provider.embed_raw(embedder(None), {"input": ["a", "b"]}, timeout_seconds=PATIENCE)
        with pytest.raises(BadReply):
            await provider.embed(embedder(None), ["a", "b"], timeout_seconds=PATIENCE)


@pytest.mark.parametrize("said", ["NaN", "nan", "null", "Infinity", "-Infinity"])
@pytest.mark.parametrize("usage", ["", ',"usage":{"prompt_tokens":5,"total_tokens":5}'])
async def test_what_is_no_number_breaks_the_protocol_both_ways(said: str, usage: str) -> None:
    answer = f'{{"data":[{{"index":0,"embedding":[1,2,3]}},{{"index":1,"embedding":[1,{said},3]}}]{usage}}}'

    async with relay_to(with_length(answer.encode())) as (provider, _):
        with pytest.raises(BadReply):
            await provider.embed_raw(embedder(), {"input": ["a", "b"]}, timeout_seconds=PATIENCE)
        with pytest.raises(BadReply):
            await provider.embed(embedder(), ["a", "b"], timeout_seconds=PATIENCE)


async def test_numbers_written_out_are_read_where_a_provider_knows_no_base64() -> None:
    async with relay_to(vectors([1.5, 2, 3], [4, 5, 6])) as (provider, upstream):
        embedded = await provider.embed(embedder(), ["a", "b"], timeout_seconds=PATIENCE)

        assert sent(upstream)["encoding_format"] == "base64"
    np.testing.assert_array_equal(embedded.vectors, np.array([[1.5, 2, 3], [4, 5, 6]], dtype=np.float32))
