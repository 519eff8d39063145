"""The automations on a real server: off until somebody wants them, then told what happened."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from blocks.automations import register_automations
from sekha.errors import ConfigMissing
from sekha.recording.prefect_api import ApiSink
from sekha.recording.run import Event
from sekha.stack import deployment_file
from tests.fixtures.prefect import Server

pytestmark = pytest.mark.prefect

DECLARED = deployment_file("automations.yaml").read_text(encoding="utf-8")
EVENTS = {"sekha.circuit.opened", "sekha.provider.outage", "sekha.budget.exhausted", "sekha.recorder.dropped"}


@pytest.fixture(autouse=True)
async def none_yet(prefect: Server) -> None:
    for each in await automations(prefect):
        await prefect.ask("DELETE", f"/automations/{each['id']}")


async def automations(prefect: Server) -> list[dict[str, Any]]:
    return list((await prefect.ask("POST", "/automations/filter", {})).json())


@dataclass
class Pager:
    """Somebody who is notified over HTTP."""

    port: int
    heard: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def block(self) -> str:
        name = f"pager-{uuid4().hex}"
        webhook = CustomWebhookNotificationBlock(
            name=name, url=f"http://127.0.0.1:{self.port}/", json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        await webhook.save(name)
        return f"custom-webhook/{name}"


@pytest.fixture
async def pager() -> AsyncIterator[Pager]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split()[0])
        found.heard.put_nowait(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        found = Pager(server.sockets[0].getsockname()[1])
        yield found


def emit(name: str, resource: str, **payload: Any) -> None:
    """Tell Prefect, as a gateway's publisher does."""
    sink = ApiSink()
    sink.emit([Event(id=str(uuid4()), occurred_at=time.time(), name=name, resource=resource, payload=payload)])
    sink.close()


async def test_they_are_registered_once_and_off(prefect: Server) -> None:
    first = await register_automations(DECLARED)
    second = await register_automations(DECLARED)

    there = await automations(prefect)
    assert {each["name"] for each in there} == {each.name for each in first}
    assert {event for each in there for event in each["trigger"]["expect"]} == EVENTS
    assert not any(each["enabled"] for each in there)
    assert {each.outcome for each in first} == {"created"}
    assert {each.outcome for each in second} == {"unchanged"}


async def test_what_was_changed_in_prefect_stays(prefect: Server) -> None:
    await register_automations(DECLARED)
    [edited] = [each for each in await automations(prefect) if "budget" in each["name"]]
    await prefect.ask("PATCH", f"/automations/{edited['id']}", {"enabled": True})

    await register_automations(DECLARED)

    there = {each["name"]: each["enabled"] for each in await automations(prefect)}
    assert [name for name, enabled in there.items() if enabled] == [edited["name"]]


async def test_somebody_is_notified_of_each_event_and_only_when_they_are_on(prefect: Server, pager: Pager) -> None:
    await register_automations(DECLARED)
    emit("sekha.circuit.opened", "sekha.circuit.openai/unheard")

    registered = await register_automations(DECLARED, notify=await pager.block())
    again = await register_automations(DECLARED, notify=await pager.block())
    for event in EVENTS:
        emit(event, f"sekha.some.{event}", reason="rate_limited")
    async with asyncio.timeout(60):
        heard = [await pager.heard.get() for _ in EVENTS]

    assert [(each.outcome, each.enabled) for each in registered] == [("updated", True)] * 4
    assert len(await automations(prefect)) == len(again) == 4
    assert {each["body"].split("\n")[0] for each in heard} == {f"sekha.some.{event}" for event in EVENTS}
    assert {each["subject"] for each in heard} == {each.name for each in registered}
    assert all('"rate_limited"' in each["body"] for each in heard)
    assert pager.heard.empty()


async def test_a_block_that_is_not_there_is_named_before_anything_changes(prefect: Server) -> None:
    with pytest.raises(ConfigMissing, match="slack-webhook/ops"):
        await register_automations(DECLARED, notify="slack-webhook/ops")

    assert await automations(prefect) == []
