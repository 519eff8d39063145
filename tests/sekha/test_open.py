from __future__ import annotations

import os
from pathlib import Path

import pytest

import sekha
from sekha.chat import ChatRequest
from sekha.errors import ConfigError
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
