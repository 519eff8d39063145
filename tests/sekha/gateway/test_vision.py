"""Images over HTTP: read from their bytes, priced by a formula, and given to a model that takes them."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, Served
from tests.fixtures.upstream import Upstream, with_length

PRIORITY = {"first": 1, "second": 2, "third": 3}
PRICE = "{input_per_million: 1, output_per_million: 2}"
PLACE = "messages[0].content[{}].image_url"


def png(width: int = 64, height: int = 32, *, size: int = 24) -> str:
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    return f"data:image/png;base64,{base64.b64encode(data.ljust(size, bytes(1))).decode()}"


def part(url: str, **fields: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def provider(name: str, kind: str, standin: StandIn, model: str, limits: str = "", price: str = "free") -> str:
    return f"""
          - id: {name}
            provider_type: {kind}
            base_url: {getattr(standin, f"{kind}_url")}
            priority: {PRIORITY[name]}
            models:
              - model_id: {model}
                task: vision
                supports_vision: true
                max_output_tokens: 10
                price: {price}
                vision_capabilities: {{{limits}}}"""


def config_of(kind: str, standin: StandIn, limits: str = "") -> str:
    return "providers:" + provider("first", kind, standin, "eyes", limits)


async def look(served: Served, *parts: dict[str, Any], **fields: Any) -> Any:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}]
    return await served.http.post("/v1/chat/completions", json={"messages": messages, **fields})


@pytest.fixture
async def canary() -> AsyncIterator[list[bytes]]:
    """What was said to a server that nobody may call; its address is the first entry."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    heard.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/cat.png".encode())
    yield heard
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_url_goes_past_providers_that_take_data_alone_and_nobody_here_fetches_it(
    gateway: Opens, canary: list[bytes], stream: bool
) -> None:
    url = canary[0].decode()
    async with StandIn() as standin:
        config = (
            "providers:"
            + provider("first", "ollama", standin, "llava")
            + provider("second", "anthropic", standin, "claude-sonnet-4-5")
            + provider("third", "openai", standin, "gpt-4o")
        )
        async with gateway(config=config) as served:
            by_url = await look(served, part(url, detail="high"), stream=stream)
            by_data = await look(served, part(png()), stream=stream)

    assert by_url.headers["x-sekha-provider"] == "third"
    assert by_data.headers["x-sekha-provider"] == "first"
    assert standin.requests[0].json["messages"][0]["content"][1] == part(url, detail="high")
    assert canary == [url.encode()]


async def test_where_only_data_is_taken_a_url_is_refused_and_not_fetched(gateway: Opens, canary: list[bytes]) -> None:
    async with StandIn() as standin, gateway(config=config_of("ollama", standin)) as served:
        response = await look(served, part(canary[0].decode()))

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"], error["type"]) == (
        "invalid_request",
        PLACE.format(1),
        "invalid_request_error",
    )
    assert "send its bytes in a `data:` URL" in error["message"]
    assert standin.requests == []
    assert len(canary) == 1


@pytest.mark.parametrize(
    ("parts", "field", "says"),
    [
        ([part(png()), part(png()), part(png())], PLACE.format(3), "is one of 3; 2 images at the most"),
        ([part(png(size=300_000))], PLACE.format(1), "has 0.3 MB; 0.1 MB at the most"),
        ([part("data:image/png;base64,R0lGODlhAwACAA==")], PLACE.format(1), "is in gif, by its bytes; jpeg, png"),
        ([part(png(0, 7))], PLACE.format(1), "is 0 × 7 pixels"),
        ([part("data:image/png;base64,****")], PLACE.format(1), "has broken base64"),
        ([part("file:///etc/passwd")], PLACE.format(1), "begins with 'file'"),
        (
            [{"type": "input_image", "image_url": "https://pictures.test/1"}],
            "messages[0].content[1].type",
            "is 'input_image', and an image of a chat has the type `image_url`",
        ),
        ([part(png(), detail="most")], f"{PLACE.format(1)}.detail", "is 'most'; it is one of low, high, auto"),
    ],
)
async def test_images_that_cannot_be_taken_are_a_clear_400(
    gateway: Opens, parts: list[dict[str, Any]], field: str, says: str
) -> None:
    limits = "max_images: 2, max_image_size_mb: 0.1, supported_formats: [jpg, png]"
    async with StandIn() as standin, gateway(config=config_of("openai", standin, limits)) as served:
        response = await look(served, *parts)

    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == field
    assert error["message"].startswith(f"`{field}` {says}")
    assert response.headers["x-should-retry"] == "false"
    assert standin.requests == []


async def test_a_model_that_takes_fewer_is_left_to_one_that_takes_more(gateway: Opens) -> None:
    async with StandIn() as standin:
        config = (
            "providers:"
            + provider("first", "openai", standin, "gpt-4o", "max_images: 1")
            + provider("second", "openrouter", standin, "gpt-4o", "max_images: 5")
        )
        async with gateway(config=config) as served:
            one = await look(served, part(png()))
            two = await look(served, part(png()), part(png()))
            routed = await served.http.post(
                "/api/v1/route",
                json={"messages": [{"role": "user", "content": [part(png()), part(png())]}]},
            )

    assert one.headers["x-sekha-provider"] == "first"
    assert two.headers["x-sekha-provider"] == "second"
    assert [
        (each["provider_id"], each["rule"], each["reason"]) for each in routed.json()["candidates"] if each["rule"]
    ] == [("first", "capability", "it takes 1 image at the most")]


async def test_images_are_estimated_by_their_providers_formula(gateway: Opens) -> None:
    price = "{input_per_million: 1000000, output_per_million: 0}"
    async with StandIn() as standin:
        config = "providers:" + provider("first", "openai", standin, "gpt-4o", price=price)
        async with gateway(config=config) as served:
            answered = {
                name: (await look(served, *parts)).json()["sekha"]["estimated_cost"]
                for name, parts in {
                    "none": (),
                    "large": (part(png(1024, 1024), detail="high"),),
                    "low": (part(png(1024, 1024), detail="low"),),
                    "both": (part(png(1024, 1024), detail="high"), part(png(1024, 1024), detail="low")),
                    "unknown": (part("https://example.com/cat.png"),),
                }.items()
            }

    without = answered.pop("none")
    # At a dollar a token; one of unknown size counts as 2048 × 768 pixels.
    assert {name: cost - without for name, cost in answered.items()} == {
        "large": 765,
        "low": 85,
        "both": 850,
        "unknown": 1445,
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_images_that_are_priced_apart_are_billed_whatever_usage_says(gateway: Opens, stream: bool) -> None:
    price = "{input_per_million: 0, output_per_million: 0, per_image: 0.25}"
    async with StandIn() as standin:
        config = "providers:" + provider("first", "openai", standin, "gpt-4o", price=price)
        async with gateway(config=config) as served:
            response = await look(served, *[part(png())] * 3, stream=stream)
            spent = await served.spent()

    assert spent == Decimal("0.75")
    told = re.findall(r'"estimated_cost":([\d.]+),"cost":([\d.]+)', response.text)
    assert told == [("0.75", "0.75")]


async def test_images_that_are_priced_apart_are_billed_by_an_answer_that_is_none_too(gateway: Opens) -> None:
    unusable = with_length(b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2}}')
    async with Upstream(unusable, unusable, unusable) as upstream:
        config = f"""
        providers:
          - id: first
            provider_type: openai
            base_url: {upstream.url}
            models:
              - model_id: gpt-4o
                task: chat_small
                supports_vision: true
                price: {{input_per_million: 1000, output_per_million: 2000, per_image: 0.25}}
        """
        async with gateway(config=config) as served:
            response = await look(served, *[part(png())] * 3)
            spent = await served.spent()

    attempts = len(response.json()["error"]["attempts"])
    assert (response.status_code, spent) == (502, attempts * Decimal("0.764"))


@pytest.mark.parametrize(
    ("routing", "fields", "images", "answers"),
    [
        ("true", {}, 0, "blind"),
        ("true", {}, 1, "eyes"),
        ("false", {}, 1, "blind"),
        ("true", {"require_vision": True}, 0, "eyes"),
        ("false", {"require_vision": True}, 0, "eyes"),
    ],
)
async def test_who_has_to_see(gateway: Opens, routing: str, fields: dict[str, Any], images: int, answers: str) -> None:
    async with StandIn() as standin:
        config = f"""
        routing: {{require_vision_for_images: {routing}}}
        providers:
          - id: one
            provider_type: openai
            base_url: {standin.openai_url}
            priority: 1
            models: [{{model_id: blind, task: chat_small, price: free}}]
          - id: two
            provider_type: openai
            base_url: {standin.openai_url}
            priority: 2
            models: [{{model_id: eyes, task: chat_smart, supports_vision: true, price: free}}]
        """
        async with gateway(config=config) as served:
            response = await look(served, *[part(png())] * images, **fields)

    assert response.headers["x-sekha-model"] == answers


async def test_a_large_image_is_read_whole_and_handed_on_as_it_came(gateway: Opens) -> None:
    url = png(4000, 3000, size=3_000_000)
    async with StandIn() as standin, gateway(config=config_of("openai", standin)) as served:
        response = await look(served, part(url))

    assert response.status_code == 200
    assert standin.requests[0].json["messages"][0]["content"][1]["image_url"]["url"] == url


@pytest.mark.parametrize("needed", ["", "routing: {require_vision_for_images: false}"])
async def test_a_budget_for_vision_covers_images_however_the_model_is_asked_for(gateway: Opens, needed: str) -> None:
    async with StandIn() as standin:
        config = f"""
        providers:
          - id: first
            provider_type: openai
            base_url: {standin.openai_url}
            models:
              - {{model_id: multi, task: chat_small, supports_vision: true, price: {PRICE}}}
              - {{model_id: multi, task: vision, supports_vision: true, price: {PRICE}}}
              - {{model_id: multi, task: chat_smart, supports_vision: true, price: {PRICE}}}
        budgets:
          - {{name: seeing, limit: 0, match: {{task: vision}}}}
        {needed}
        """
        async with gateway(config=config) as served:
            for named in ({"model": "multi"}, {"model": "first/multi"}, {"model": "auto"}, {"model": "vision"}, {}):
                refused = await look(served, part(png()), **named)
                assert (refused.status_code, refused.json()["error"].get("budget")) == (402, "seeing"), named
            assert (await look(served, model="auto", require_vision=True)).status_code == 402
            assert standin.requests == []

            assert (await look(served, model="multi")).status_code == 200
            assert (await look(served, part(png()), model="chat_smart")).status_code == 200
