"""What every provider does, over real HTTP to a stand-in for each protocol."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from sekha.errors import (
    BadReply,
    ContentRefused,
    ContextExceeded,
    DimensionMismatch,
    FieldUnsupported,
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
from sekha.providers.base import ChatCall, Chunk, Provider
from sekha.providers.litellm import litellm_module
from sekha.providers.opening import open_provider
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.testing import Received, StandIn

SECRET = "sk-standin-0123456789abcdef"
PROMPT = "Tell me about the confidential merger"
PATIENCE = 20.0
IMPATIENCE = 0.4

IMAGES = {
    format_: base64.b64encode(head).decode()
    for format_, head in {
        "png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 3, 2),
        "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 2, 3, 1),
        "gif": b"GIF89a" + struct.pack("<HH", 3, 2),
        "webp": b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + struct.pack("<HH", 3, 2),
    }.items()
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


CHANGES_NOTHING: dict[str, Any] = {
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "stream_options": {"include_usage": True},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": None,
}
HINTS = {
    "metadata": {"team": "search"},
    "prompt_cache_key": "one",
    "safety_identifier": "somebody",
    "store": True,
    "user": "somebody",
}
MEANT: dict[str, Any] = {"logit_bias": {"50256": -100}, "logprobs": True, "n": 2, "presence_penalty": 0.5}
"""What says something, and what neither Anthropic's protocol nor Ollama's can say."""


@dataclass(frozen=True)
class Subject:
    """One provider under test and the stand-in it talks to."""

    kind: ProviderKind
    provider: Provider
    standin: StandIn
    chat: Model
    embedding: Model | None

    def call(self, *, timeout_seconds: float = PATIENCE, content: object = PROMPT, **options: Any) -> ChatCall:
        return ChatCall(
            model=self.chat,
            messages=[{"role": "user", "content": content}],
            options=options,
            timeout_seconds=timeout_seconds,
        )

    async def embed(self, *texts: str, timeout_seconds: float = PATIENCE) -> Any:
        assert self.embedding is not None
        return await self.provider.embed(self.embedding, list(texts), timeout_seconds=timeout_seconds)

    @property
    def calls(self) -> list[Received]:
        return [request for request in self.standin.requests if request.path != "/api/show"]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(format_: str, **fields: str) -> dict[str, Any]:
    """An image as OpenAI's protocol has it."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{format_};base64,{IMAGES[format_]}", **fields}}


def block(format_: str) -> dict[str, Any]:
    """The same as Anthropic's has it."""
    source = {"type": "base64", "media_type": f"image/{format_}", "data": IMAGES[format_]}
    return {"type": "image", "source": source}


class Listener:
    """Remembers whatever anybody says to it, and hangs up."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    async def __aenter__(self) -> Listener:
        self._server = await asyncio.start_server(self._listen, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read(65_536)
        at = len(self.heard)
        self.heard.append(said)
        head, _, _ = said.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        missing = len(head) + 4 + int(length[1]) - len(said) if length else 0
        if missing > 0:
            self.heard[at] += await reader.readexactly(missing)
        writer.close()


@pytest.fixture
async def canary(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listener]:
    """Where nobody may ever call."""
    # LiteLLM would not fetch from this machine, which would prove nothing of the others.
    monkeypatch.setattr(litellm_module(), "user_url_validation", False)
    async with Listener() as listener:
        yield listener


MODELS: dict[str, tuple[str, str | None]] = {
    "builtin": ("echo", "hashed-768"),
    "openai": ("gpt-4o-mini", "text-embedding-3-small"),
    "anthropic": ("claude-sonnet-4-5", None),
    "ollama": ("llama3.1:8b", "nomic-embed-text"),
    "openrouter": ("meta/llama", "openai/text-embedding-3-small"),
    "litellm": ("openai/gpt-4o-mini", "openai/text-embedding-3-small"),
}
DIMENSIONS = {"builtin": 768, "openai": 1536, "ollama": 768, "openrouter": 1536, "litellm": 1536}
REMOTE = ["openai", "anthropic", "ollama", "openrouter", "litellm"]
EMBEDDING = ["openai", "ollama", "openrouter", "litellm"]


def open_subject(kind: ProviderKind, standin: StandIn) -> Subject:
    # LiteLLM reaches any API by the model's name; here OpenAI's, which otherwise goes past it.
    protocol = "openai" if kind == "litellm" else kind
    url = None if kind == "builtin" else getattr(standin, f"{protocol}_url")
    provider = open_provider(ProviderSpec(id="one", kind=kind, base_url=url, api_key=SecretStr(SECRET)))
    chat, embedding = MODELS[kind]
    return Subject(
        kind,
        provider,
        standin,
        Model(id=chat, provider_id="one", tasks=("chat_small",)),
        Model(id=embedding, provider_id="one", tasks=("embedding",), dimension=DIMENSIONS[kind]) if embedding else None,
    )


@pytest.fixture
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with StandIn() as standin:
        opened = open_subject(request.param, standin)
        yield opened
        await opened.provider.aclose()


def every(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("subject", kinds, indirect=True)


async def pieces_of(stream: AsyncIterator[Chunk], into: list[Chunk] | None = None) -> list[Chunk]:
    pieces = [] if into is None else into
    async for piece in stream:
        pieces.append(piece)
    return pieces


async def attempt(subject: Subject, how: str, timeout_seconds: float) -> None:
    match how:
        case "complete":
            await subject.provider.complete(subject.call(timeout_seconds=timeout_seconds))
        case "stream":
            await pieces_of(subject.provider.stream(subject.call(timeout_seconds=timeout_seconds)))
        case "embed":
            await subject.embed(PROMPT, "another", timeout_seconds=timeout_seconds)


async def failure(subject: Subject, how: str, *, timeout_seconds: float = PATIENCE) -> ProviderError:
    """What one attempt raises, and that it was one attempt."""
    with pytest.raises(ProviderError) as caught:
        await attempt(subject, how, timeout_seconds)
    assert len(subject.calls) == 1
    assert SECRET not in caught.value.told
    assert PROMPT not in caught.value.told
    assert "Traceback" not in caught.value.told
    assert len(caught.value.detail) <= 200
    assert len(caught.value.said) <= 200
    assert not caught.value.said or caught.value.said not in str(caught.value), "it may quote the request"
    assert caught.value.provider_id == "one"
    return caught.value


def each_way(*excluded: str) -> Any:
    """Every protocol by chat, stream and embedding, where it has one, but for the excluded."""
    ways = [
        (kind, how)
        for kind in REMOTE
        for how in ("complete", "stream", "embed")
        if not {kind, how} & set(excluded) and (how != "embed" or kind in EMBEDDING)
    ]
    return pytest.mark.parametrize(
        ("subject", "how"), ways, indirect=["subject"], ids=[f"{kind}-{how}" for kind, how in ways]
    )


# --- what works ----------------------------------------------------------------------------


@every("builtin", *REMOTE)
async def test_a_chat_is_answered_in_openais_shape_with_the_providers_usage(subject: Subject) -> None:
    reply = await subject.provider.complete(subject.call())

    assert PROMPT in reply.text
    assert reply.finish_reason == "stop"
    assert reply.body["object"] == "chat.completion"
    assert reply.body["model"] == subject.chat.id
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.counted) == (6, False)
    assert reply.usage.output_tokens == len(reply.text.split())
    assert reply.body["usage"]["prompt_tokens"] == 6


@every(*REMOTE)
async def test_a_stream_that_takes_longer_than_the_timeout_but_never_pauses_as_long_is_whole(subject: Subject) -> None:
    whole = await subject.provider.complete(subject.call())
    subject.standin.trickle(0.3)

    pieces = await pieces_of(subject.provider.stream(subject.call(timeout_seconds=1.0)))

    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) * 0.3 > 1.0


@every("builtin", *REMOTE)
async def test_a_stream_adds_up_to_the_answer_and_ends_with_usage(subject: Subject) -> None:
    whole = await subject.provider.complete(subject.call())

    pieces = await pieces_of(subject.provider.stream(subject.call()))

    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 3
    assert pieces[-1].usage == whole.usage
    assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert len({piece.body["id"] for piece in pieces}) == 1
    finished = [choice["finish_reason"] for piece in pieces for choice in piece.body["choices"]]
    assert [reason for reason in finished if reason] == ["stop"]


@every("builtin", *EMBEDDING)
async def test_texts_are_embedded_in_their_order(subject: Subject) -> None:
    together = await subject.embed("the cat sat", "a wing in a supersonic flow")

    apart = await subject.embed("a wing in a supersonic flow")

    assert together.vectors.shape == (2, DIMENSIONS[subject.kind])
    assert together.vectors.dtype == np.float32
    np.testing.assert_array_equal(together.vectors[1], apart.vectors[0])
    assert together.usage == Usage(input_tokens=9)


@every(*REMOTE)
async def test_a_tool_is_called(subject: Subject) -> None:
    reply = await subject.provider.complete(subject.call(tools=[TOOL]))

    (tool_call,) = reply.body["choices"][0]["message"]["tool_calls"]
    assert tool_call["function"]["name"] == "look_up"
    assert PROMPT in tool_call["function"]["arguments"]
    assert tool_call["id"]
    assert reply.finish_reason == "tool_calls"


@every(*REMOTE)
async def test_a_tool_call_is_streamed(subject: Subject) -> None:
    pieces = await pieces_of(subject.provider.stream(subject.call(tools=[TOOL])))

    deltas = [choice["delta"] for piece in pieces for choice in piece.body["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "look_up"
    assert PROMPT in "".join(call["function"].get("arguments") or "" for call in calls)
    finished = [choice["finish_reason"] for piece in pieces for choice in piece.body["choices"]]
    assert finished[-1] == "tool_calls"


@every(*REMOTE)
async def test_a_tools_result_goes_back_to_the_model(subject: Subject) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}
    messages = [
        {"role": "user", "content": "What is x?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a letter"},
    ]

    reply = await subject.provider.complete(
        ChatCall(model=subject.chat, messages=messages, options={"tools": [TOOL]}, timeout_seconds=PATIENCE)
    )

    assert reply.text == "You said: a letter"
    assert messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "a letter"}


@every(*REMOTE)
@pytest.mark.parametrize("how", ["complete", "stream"])
async def test_images_take_each_protocols_own_form_in_every_turn(subject: Subject, how: str) -> None:
    first = [text("Which is larger?"), image("png", detail="low"), image("jpeg", detail="high")]
    second = [image("gif"), text("And of these?"), image("webp", detail="auto")]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "The second."},
        {"role": "user", "content": second},
    ]
    call = ChatCall(model=subject.chat, messages=messages, timeout_seconds=PATIENCE)

    if how == "complete":
        await subject.provider.complete(call)
    else:
        await pieces_of(subject.provider.stream(call))

    sent = subject.calls[0].json["messages"]
    match subject.kind:
        case "anthropic":
            assert sent == [
                {"role": "user", "content": [text("Which is larger?"), block("png"), block("jpeg")]},
                {"role": "assistant", "content": [text("The second.")]},
                {"role": "user", "content": [block("gif"), text("And of these?"), block("webp")]},
            ]
        case "ollama":
            assert sent == [
                {"role": "user", "content": "Which is larger?", "images": [IMAGES["png"], IMAGES["jpeg"]]},
                {"role": "assistant", "content": "The second.", "images": []},
                {"role": "user", "content": "And of these?", "images": [IMAGES["gif"], IMAGES["webp"]]},
            ]
        case _:
            assert sent == messages


@every("openai", "openrouter", "litellm", "anthropic")
@pytest.mark.parametrize("written", ["as an object", "as a text"])
async def test_an_image_behind_a_url_is_left_for_the_provider_to_fetch(
    subject: Subject, canary: Listener, written: str
) -> None:
    url = f"https://127.0.0.1:{canary.port}/cat.png"
    given = {"url": url, "detail": "high"} if written == "as an object" else url
    content = [text("What is this?"), {"type": "image_url", "image_url": given}, image("png")]
    # Where none is reported, LiteLLM counts for itself, and would fetch the image to learn its size.
    subject.standin.omit_usage()

    await pieces_of(subject.provider.stream(subject.call(content=content)))
    await subject.provider.complete(subject.call(content=content))

    for received in subject.calls:
        (message,) = received.json["messages"]
        match subject.kind:
            case "anthropic":
                source = {"type": "url", "url": url}
                assert message["content"] == [text("What is this?"), {"type": "image", "source": source}, block("png")]
            case "litellm":
                shown = given if isinstance(given, dict) else {"url": given}
                assert message["content"] == [content[0], {"type": "image_url", "image_url": shown}, content[2]]
            case _:
                assert message["content"] == content
    assert canary.heard == []


@every("anthropic", "ollama", "litellm")
async def test_bytes_under_another_name_go_out_under_their_own(subject: Subject) -> None:
    url = f"data:image/png;base64,{IMAGES['webp']}"

    await subject.provider.complete(subject.call(content=[{"type": "image_url", "image_url": {"url": url}}]))

    (message,) = subject.calls[0].json["messages"]
    match subject.kind:
        case "anthropic":
            assert message["content"] == [block("webp")]
        case "ollama":
            assert message["images"] == [IMAGES["webp"]]
        case _:
            assert message["content"] == [image("webp")]


def parts_with(address: str) -> dict[str, Any]:
    """Everything that LiteLLM would fetch for one provider or another."""
    source = {"type": "url", "url": address}
    return {
        "image": {"type": "image_url", "image_url": {"url": address, "detail": "high"}},
        "image as text": {"type": "image_url", "image_url": address},
        "image with a format": {"type": "image_url", "image_url": {"url": address, "format": "image/png"}},
        "image by its source": {"type": "image", "source": source},
        "document": {"type": "document", "source": source},
        "file by its id": {"type": "file", "file": {"file_id": address}},
        "file by its data": {"type": "file", "file": {"file_data": address}},
        "in a tool's result": {"type": "tool_result", "content": [{"type": "image", "source": source}]},
    }


@every("ollama", "anthropic")
@pytest.mark.parametrize("part", parts_with(""))
async def test_what_is_at_an_address_is_never_fetched(subject: Subject, canary: Listener, part: str) -> None:
    address = f"http://127.0.0.1:{canary.port}/cat.png"

    with pytest.raises(ProviderRejected, match=r"base64|has no place for"):
        await subject.provider.complete(subject.call(content=[text("What?"), parts_with(address)[part]]))

    assert subject.calls == []
    assert canary.heard == []


@pytest.mark.parametrize(
    "model", ["gemini/gemini-2.5-pro", "bedrock/anthropic.claude-3", "vertex_ai/gemini-3", "gpt-4o"]
)
@pytest.mark.parametrize("scheme", ["http", "https", "gs"])
async def test_litellm_is_given_no_address_that_it_might_fetch(canary: Listener, model: str, scheme: str) -> None:
    provider = open_provider(ProviderSpec(id="one", kind="litellm", api_key=SecretStr(SECRET)))
    messages = [{"role": "user", "content": [parts_with(f"{scheme}://127.0.0.1:{canary.port}/cat.png")["image"]]}]
    call = ChatCall(model=Model(id=model, provider_id="one", tasks=("vision",)), messages=messages)

    with pytest.raises(ProviderRejected, match="base64"):
        await provider.complete(call)

    await provider.aclose()
    assert canary.heard == []


@pytest.mark.parametrize("part", [name for name in parts_with("") if not name.startswith("image")])
async def test_litellm_is_given_no_other_part_by_its_address(canary: Listener, part: str) -> None:
    provider = open_provider(ProviderSpec(id="one", kind="litellm", api_key=SecretStr(SECRET)))
    address = f"https://127.0.0.1:{canary.port}/report.pdf"
    call = ChatCall(
        model=Model(id="openai/gpt-4o", provider_id="one", tasks=("vision",)),
        messages=[{"role": "user", "content": [parts_with(address)[part]]}],
    )

    with pytest.raises(ProviderRejected, match="base64"):
        await provider.complete(call)

    await provider.aclose()
    assert canary.heard == []


@pytest.mark.parametrize(
    "prefix", ["azure", "deepinfra", "groq", "hosted_vllm", "mistral", "openai", "openrouter", "together_ai", "xai"]
)
async def test_litellm_hands_urls_on_to_those_that_take_them(canary: Listener, prefix: str) -> None:
    url = f"http://127.0.0.1:{canary.port}/cat.png"
    async with Listener() as upstream:
        base_url = f"http://127.0.0.1:{upstream.port}/v1"
        provider = open_provider(ProviderSpec(id="one", kind="litellm", base_url=base_url, api_key=SecretStr(SECRET)))
        call = ChatCall(
            model=Model(id=f"{prefix}/eyes", provider_id="one", tasks=("vision",)),
            messages=[{"role": "user", "content": [text("What?"), parts_with(url)["image"]]}],
            timeout_seconds=PATIENCE,
        )

        with pytest.raises(ProviderError):
            await provider.complete(call)
        await provider.aclose()

    assert url.encode() in upstream.heard[0]
    assert canary.heard == []


async def test_the_canary_sings_when_litellm_fetches(canary: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would say nothing."""
    litellm = litellm_module()
    fetching = litellm.litellm_core_utils.prompt_templates.image_handling
    monkeypatch.setattr(fetching, "MAX_IMAGE_URL_DOWNLOAD_SIZE_MB", 1)
    part = parts_with(f"http://127.0.0.1:{canary.port}/cat.png")["image"]
    provider = open_provider(ProviderSpec(id="one", kind="litellm"))

    with pytest.raises(litellm.ImageFetchError):
        await litellm.acompletion(
            model="anthropic/claude-sonnet-4-5",
            messages=[{"role": "user", "content": [part]}],
            api_base=f"http://127.0.0.1:{canary.port}",
            api_key=SECRET,
        )
    await provider.aclose()

    assert b"GET /cat.png" in canary.heard[0]


@every("openai", "anthropic", "openrouter", "litellm")
async def test_cached_tokens_are_part_of_the_input(subject: Subject) -> None:
    subject.standin.cached_tokens = 4

    reply = await subject.provider.complete(subject.call())
    pieces = await pieces_of(subject.provider.stream(subject.call()))

    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.cached_tokens) == (6, 4)
    assert pieces[-1].usage == reply.usage


@every("anthropic")
async def test_tokens_written_to_the_cache_are_part_of_the_input(subject: Subject) -> None:
    subject.standin.cache_write_tokens = 3

    reply = await subject.provider.complete(subject.call())
    pieces = await pieces_of(subject.provider.stream(subject.call()))

    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.cache_write_tokens) == (6, 3)
    assert pieces[-1].usage == reply.usage


@every(*REMOTE)
async def test_usage_that_was_not_reported_is_none(subject: Subject) -> None:
    subject.standin.omit_usage(times=2)

    reply = await subject.provider.complete(subject.call())
    pieces = await pieces_of(subject.provider.stream(subject.call()))

    assert reply.usage is None
    assert "usage" not in reply.body
    assert [piece.usage for piece in pieces] == [None] * len(pieces)


@every(*REMOTE)
async def test_the_key_and_the_options_reach_the_provider(subject: Subject) -> None:
    await subject.provider.complete(subject.call(max_tokens=77, temperature=0.5))

    (received,) = subject.calls
    sent = received.json | received.json.get("options", {})
    assert 77 in (sent.get("max_tokens"), sent.get("max_completion_tokens"), sent.get("num_predict"))
    assert sent["temperature"] == 0.5
    assert any(SECRET in value for value in received.headers.values())


@every("builtin", *REMOTE)
@pytest.mark.parametrize("how", ["complete", "stream"])
async def test_what_changes_nothing_and_what_nobody_needs_to_heed_keeps_no_chat_from_its_answer(
    subject: Subject, how: str
) -> None:
    call = subject.call(**CHANGES_NOTHING, **HINTS)

    if how == "complete":
        said = (await subject.provider.complete(call)).text
    else:
        said = "".join(piece.text for piece in await pieces_of(subject.provider.stream(call)))

    assert PROMPT in said


@every("anthropic", "ollama")
@pytest.mark.parametrize("field", CHANGES_NOTHING)
async def test_a_value_that_changes_nothing_is_not_sent_where_the_protocol_lacks_it(
    subject: Subject, field: str
) -> None:
    await subject.provider.complete(subject.call())
    await subject.provider.complete(subject.call(**{field: CHANGES_NOTHING[field]}))

    without, given = (received.json for received in subject.calls)
    assert given == without


@every("anthropic", "ollama")
@pytest.mark.parametrize("how", ["complete", "stream"])
@pytest.mark.parametrize("field", MEANT)
async def test_a_field_that_the_protocol_lacks_is_left_to_those_that_have_it(
    subject: Subject, how: str, field: str
) -> None:
    call = subject.call(**{field: MEANT[field]})

    with pytest.raises(FieldUnsupported) as caught:
        await (subject.provider.complete(call) if how == "complete" else pieces_of(subject.provider.stream(call)))

    assert subject.calls == []
    assert caught.value.falls_back
    assert not caught.value.may_be_billed
    assert caught.value.field == field
    assert caught.value.message == (
        f"Provider 'one', model {subject.chat.id!r}, was not asked: its protocol has no `{field}`. "
        "Leave that out, or name a model of a provider that takes it."
    )


@every("openai", "openrouter", "litellm")
@pytest.mark.parametrize("field", MEANT)
async def test_a_field_of_openais_reaches_whoever_speaks_its_protocol(subject: Subject, field: str) -> None:
    await subject.provider.complete(subject.call(**{field: MEANT[field]}))

    assert subject.calls[0].json[field] == MEANT[field]


# --- what fails ----------------------------------------------------------------------------


@each_way()
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, ProviderRejected),
        (401, ProviderAuthFailed),
        (402, ProviderError),
        (404, ModelNotFound),
        (500, ProviderUnavailable),
        (503, ProviderUnavailable),
    ],
)
async def test_a_status_has_one_meaning(subject: Subject, how: str, status: int, expected: type[ProviderError]) -> None:
    subject.standin.fail(status)

    error = await failure(subject, how)

    assert type(error) is expected
    assert error.status == status
    assert error.said


@each_way()
@pytest.mark.parametrize(
    ("retry_after", "seconds"), [("3", 3), ("Wed, 21 Oct 2099 07:28:00 GMT", 3600)], ids=["seconds", "date"]
)
async def test_a_rate_limit_keeps_its_retry_after_up_to_an_hour(
    subject: Subject, how: str, retry_after: str, seconds: float
) -> None:
    subject.standin.fail(429, retry_after=retry_after)

    error = await failure(subject, how)

    assert type(error) is RateLimited
    assert error.retry_after_seconds == seconds


@each_way("embed", "ollama")
async def test_content_policy_is_told_from_other_refusals(subject: Subject, how: str) -> None:
    subject.standin.refuse_content()

    assert type(await failure(subject, how)) is ContentRefused


@each_way()
async def test_too_long_a_request_is_told_from_other_refusals(subject: Subject, how: str) -> None:
    subject.standin.exceed_context()

    assert type(await failure(subject, how)) is ContextExceeded


@each_way()
async def test_silence_is_a_timeout(subject: Subject, how: str) -> None:
    subject.standin.hang()

    assert type(await failure(subject, how, timeout_seconds=IMPATIENCE)) is ProviderTimeout


@each_way()
async def test_a_dropped_connection_is_an_outage(subject: Subject, how: str) -> None:
    subject.standin.drop()

    error = await failure(subject, how)

    assert type(error) is ProviderUnavailable
    assert error.status is None


@each_way("stream")
async def test_a_body_that_breaks_off_is_an_outage(subject: Subject, how: str) -> None:
    subject.standin.cut()

    assert type(await failure(subject, how)) is ProviderUnavailable


@each_way()
async def test_a_web_page_for_an_answer_breaks_the_protocol(subject: Subject, how: str) -> None:
    subject.standin.garbage()

    assert type(await failure(subject, how)) is BadReply


@every(*REMOTE)
@pytest.mark.parametrize("fault", ["cut", "end_early"])
async def test_a_stream_that_breaks_off_is_never_taken_for_its_end(subject: Subject, fault: str) -> None:
    getattr(subject.standin, fault)(after=5)
    received: list[Chunk] = []

    with pytest.raises(StreamBroken):
        await pieces_of(subject.provider.stream(subject.call()), received)

    assert "You" in "".join(piece.text for piece in received)
    assert not any(choice["finish_reason"] for piece in received for choice in piece.body["choices"])
    assert len(subject.calls) == 1


@every(*REMOTE)
async def test_a_stream_cut_before_its_first_piece_is_an_outage(subject: Subject) -> None:
    subject.standin.cut(after=0)

    error = await failure(subject, "stream")

    assert type(error) is ProviderUnavailable


@every(*REMOTE)
async def test_a_stream_that_falls_silent_is_a_timeout(subject: Subject) -> None:
    subject.standin.stall(after=5)
    received: list[Chunk] = []

    with pytest.raises(ProviderTimeout):
        await pieces_of(subject.provider.stream(subject.call(timeout_seconds=IMPATIENCE)), received)

    assert received


@every(*REMOTE)
async def test_closing_a_stream_closes_its_connection(subject: Subject) -> None:
    subject.standin.stall(after=5)
    stream = subject.provider.stream(subject.call())
    await anext(stream)

    await stream.aclose()  # type: ignore[attr-defined]

    async with asyncio.timeout(5):
        await subject.standin.abandoned.wait()


@every(*REMOTE)
async def test_a_cancelled_call_closes_its_connection(subject: Subject) -> None:
    subject.standin.hang()
    call = asyncio.create_task(subject.provider.complete(subject.call()))
    async with asyncio.timeout(PATIENCE):
        await subject.standin.arrived.wait()

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(5):
        await subject.standin.abandoned.wait()


@every(*EMBEDDING)
async def test_vectors_of_another_length_are_refused(subject: Subject) -> None:
    subject.standin.wrong_dimension(12)

    with pytest.raises(DimensionMismatch) as caught:
        await subject.embed("one", "two")

    assert caught.value.returned == 12
    assert caught.value.wanted == DIMENSIONS[subject.kind]


@every("builtin", *REMOTE)
async def test_a_model_that_is_not_there_is_named(subject: Subject) -> None:
    subject.standin.models = []
    missing = replace(subject.chat, id=f"{subject.chat.id}-missing")

    with pytest.raises(ModelNotFound) as caught:
        await subject.provider.complete(
            ChatCall(model=missing, messages=[{"role": "user", "content": "Hi"}], timeout_seconds=PATIENCE)
        )

    assert caught.value.model_id == missing.id
