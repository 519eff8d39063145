from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

import sekha
from sekha.chat import ChatRequest
from sekha.errors import ConfigError, NoCandidate
from tests.fixtures.pipeline import Opens


async def test_everything_works_where_nothing_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Holds\n\nA hold is money set aside for a call under way.")

    async with sekha.open() as s:
        reply = await s.chat("What does a hold do?")
        embedded = await s.embed("What does a hold do?")
        report = await s.ingest("docs")
        found = await s.search("What is a hold?")

    assert reply.text.endswith("You said: What does a hold do?")
    assert embedded.vectors.shape == (1, 768)
    assert (report.space, report.embedded) == ("Documents_768", 1)
    assert found.hits[0].text.endswith("set aside for a call under way.")
    assert reply.cost + embedded.cost + report.cost + found.cost == 0
    assert sorted(path.name for path in (tmp_path / ".sekha").glob("*.db")) == ["ledger.db", "vectors.db"]


def test_a_wrong_file_is_said_when_it_is_opened_and_not_later(tmp_path: Path) -> None:
    (tmp_path / "sekha.yaml").write_text("provders: []\n")

    with pytest.raises(ConfigError, match="Did you mean 'providers'"):
        sekha.open(tmp_path / "sekha.yaml")


async def test_opening_alone_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async with sekha.open():
        pass

    assert os.listdir() == []  # noqa: PTH208 - blocking is fine here


async def test_a_message_may_be_a_text_messages_or_a_whole_request(pipeline: Opens) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    async with pipeline() as opened:
        for asked in ("Hello", messages, ChatRequest(messages=tuple(messages))):
            await opened.runtime.chat(asked)

        assert [list(call.messages) for call in opened.actors["first"].chats] == [messages] * 3


async def test_a_plan_can_be_seen_without_asking_anyone(pipeline: Opens) -> None:
    async with pipeline() as opened:
        plan = await opened.runtime.route(ChatRequest(messages=({"role": "user", "content": "Hello"},)))

        assert [candidate.model.name for candidate in plan.candidates] == ["first/chat", "second/chat"]
        assert opened.actors["first"].chats == []
        assert await opened.held() == 0


PRICE = "{input_per_million: 1, output_per_million: 2}"
ORDINARY = ({"role": "user", "content": "Hello"},)
CACHED = ({"role": "user", "content": "Hello", "cache_control": {"type": "ephemeral", "ttl": "1h"}},)
HEARD = ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},)


@pytest.mark.parametrize(
    ("messages", "options", "field"),
    [
        (ORDINARY, {"service_tier": "scale"}, "service_tier"),
        (ORDINARY, {"web_search_options": {}}, "web_search_options"),
        (ORDINARY, {"modalities": ["text", "audio"]}, "modalities"),
        (HEARD, {}, "input_audio"),
        (CACHED, {}, "cache_control.ttl"),
    ],
)
async def test_what_the_price_map_does_not_price_is_refused_until_the_file_does(
    tmp_path: Path, messages: Any, options: dict[str, Any], field: str
) -> None:
    file = tmp_path / "sekha.yaml"
    model = "model_id: gpt-4o-mini, task: chat_small"
    asked = ChatRequest(messages=messages, options=options)

    file.write_text(f"providers: [{{id: a, provider_type: openai, models: [{{{model}}}]}}]")
    async with sekha.open(file) as s:
        for tier in ("flex", "priority"):
            assert (await s.route(ChatRequest(messages=ORDINARY, options={"service_tier": tier}))).candidates
        with pytest.raises(NoCandidate, match=f"its price with `{re.escape(field)}` is unknown"):
            await s.route(asked)

    file.write_text(f"providers: [{{id: a, provider_type: openai, models: [{{{model}, price: {PRICE}}}]}}]")
    async with sekha.open(file) as s:
        assert (await s.route(asked)).candidates


async def test_everything_is_closed_even_when_a_provider_fails_to(pipeline: Opens) -> None:
    async def fail() -> None:
        raise RuntimeError("cannot close")

    async with pipeline() as opened:
        await opened.runtime.chat("Hello", model="first/chat")
        await opened.runtime.chat("Hello", model="second/chat")
        opened.actors["first"].aclose = fail  # type: ignore[method-assign]

        with pytest.raises(RuntimeError, match="cannot close"):
            await opened.runtime.aclose()

        assert opened.actors["second"].closed


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'opn'"):
        sekha.opn  # noqa: B018


def test_every_public_name_is_there() -> None:
    assert all(getattr(sekha, name) for name in sekha.__all__)
