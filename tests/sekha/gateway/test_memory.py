"""What passes the gateway is remembered: once each, however the store, the embedder and the gateway fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.calling import Clock, Retries
from sekha.documents import Document
from sekha.errors import ConfigError, ProviderUnavailable
from sekha.gateway.app import Gateway
from sekha.gateway.metrics import Metrics
from sekha.gateway.opening import open_serving
from sekha.gateway.remembering import Pace, Remembering
from sekha.gateway.serving import Serving
from sekha.keys import hash_of, new_key
from sekha.loading import load
from sekha.memo import cut, decode
from sekha.outbox import Outbox
from sekha.providers.base import Embeddings, Provider
from sekha.providers.builtin import BuiltinProvider
from sekha.registry import Model, ProviderSpec
from sekha.resources import WALL, Resources
from sekha.testing import StandIn
from sekha.vectors.base import Record
from tests.fixtures.gateway import wait_until
from tests.fixtures.upstream import Upstream, chunked
from tests.fixtures.weaviate import WeaviateServer

SPACE = "Conversations_16"
LIMIT = 32_000
ROOT = Path(__file__).resolve().parents[3]


def config(chats: StandIn | Upstream, embedder: StandIn, *, extra: str = "") -> str:
    """One provider that chats and another that embeds, so that each may fail alone."""
    return f"""
providers:
  - id: talker
    provider_type: openai
    base_url: {chats.openai_url}
    models: [{{model_id: chat, task: chat_small, price: free}}]
  - id: embedder
    provider_type: openai
    base_url: {embedder.openai_url}
    timeout_secs: 5
    models:
      - {{model_id: small, task: embedding, dimension: 16, price: {{input_per_million: 1000}}}}
      - {{model_id: same, task: embedding, dimension: 16, price: free}}
      - {{model_id: large, task: embedding, dimension: 32, price: free}}
      - {{model_id: larger, task: embedding, dimension: 32, price: free}}
collections: {{conversations: {{model: small}}}}
memory: {{collection: conversations}}
routing: {{circuit_breaker: {{failure_threshold: 1000}}, require_vision_for_images: false}}
{textwrap.dedent(extra)}
"""


@dataclass
class Gate:
    """A gateway that remembers, in this process, and what it remembers."""

    http: httpx.AsyncClient
    serving: Serving
    memory: Remembering
    folder: Path

    async def chat(self, text: str, **fields: Any) -> httpx.Response:
        asked = {"messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=asked)

    async def embed(self, *texts: str, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/embeddings", json={"input": list(texts), "model": "small", **fields})

    async def kept(self, count: int) -> None:
        await wait_until(lambda: self.memory.stats.kept >= count and not self.memory.stats.waiting_bytes)

    async def records(self, space: str = SPACE) -> list[Record]:
        store = await self.serving.resources.store()
        if space not in [each.name for each in await store.list_collections()]:
            return []
        return [record async for page in store.scan(space, vectors=True) for record in page]

    async def texts(self, space: str = SPACE) -> Counter[str]:
        return Counter(record.text for record in await self.records(space))


Remembers: TypeAlias = Callable[..., AbstractAsyncContextManager[Gate]]


@pytest.fixture
def gate(tmp_path: Path) -> Remembers:
    """Opens a gateway that remembers; again in the same test, on the same folder."""

    @asynccontextmanager
    async def opened(
        text: str,
        *,
        collection: str = "conversations",
        wall: Callable[[], float] = time.time,
        max_bytes: int = 1 << 20,
        open_provider: Callable[[ProviderSpec], Provider] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Gate]:
        file = tmp_path / "sekha.yaml"
        file.write_text(text)
        # Jitter that never waits: what is tried again is tried at the next look.
        clock = Clock(now=WALL.now, sleep=WALL.sleep, random=lambda: 0.0)
        resources = Resources(
            load(file, environ=environ or {}), clock=clock, retries=Retries(rounds=1), open_provider=open_provider
        )
        folder = tmp_path / "memory"
        pace = Pace(look_seconds=0.01)
        memory = Remembering(folder, collection, pace=pace, clock=clock, wall=wall, max_bytes=max_bytes)
        serving = Serving(resources, Metrics(), memory=memory)
        memory.start(serving)
        transport = httpx.ASGITransport(Gateway(serving))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                yield Gate(http, serving, memory, folder)
        finally:
            await serving.aclose()

    return opened


@pytest.fixture
async def chats() -> AsyncIterator[StandIn]:
    async with StandIn() as standin:
        yield standin


@pytest.fixture
async def embedder() -> AsyncIterator[StandIn]:
    async with StandIn(dimension=16) as standin:
        yield standin


def exchange(text: str) -> str:
    return f"User: {text}\n\nAssistant: You said: {text}"


async def test_an_exchange_is_found_by_what_it_was_about(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    async with gate(config(chats, embedder)) as served:
        answered = await served.chat("How do whales sleep?", metadata={"team": "sea"})
        await served.chat("Bread needs salt.")
        await served.kept(2)
        found = await served.http.post("/api/v1/search", json={"query": "How do whales sleep?", "limit": 1})

    [hit] = found.json()["results"]
    assert hit["content"] == exchange("How do whales sleep?")
    properties = hit["properties"]
    assert properties.pop("created") <= time.strftime("%Y-%m-%dT%H:%M:%S~", time.gmtime())
    assert properties == {
        "kind": "chat",
        "model": "chat",
        "provider": "talker",
        "key": None,
        "run_id": answered.json()["sekha"]["run_id"],
        "tags": "team:sea",
        "cut": False,
        "embedding_fingerprint": "openai/small:16:unit",
    }


async def test_a_streamed_exchange_is_remembered(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    usage = {"stream_options": {"include_usage": True}}
    async with gate(config(chats, embedder)) as served:
        await served.chat("Tell me slowly.", stream=True)
        await served.chat("Tell me all.", stream=True, **usage)
        await served.kept(2)

        assert await served.texts() == Counter([exchange("Tell me slowly."), exchange("Tell me all.")])


@pytest.mark.parametrize("before", [[], ["First part. "]])
async def test_what_comes_with_the_usage_reaches_the_caller_and_the_memory(
    gate: Remembers, embedder: StandIn, before: list[str]
) -> None:
    def event(text: str, **fields: Any) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if fields else None}
        return b"data: %s\n\n" % json.dumps({"id": "a", "choices": [choice], **fields}).encode()

    last = event("Last part.", usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
    stream = chunked(*map(event, before), last, b"data: [DONE]\n\n", headers=("Content-Type: text/event-stream",))
    async with Upstream(stream) as chats, gate(config(chats, embedder)) as served:
        answered = await served.chat("Hello?", stream=True, stream_options={"include_usage": True})
        await served.kept(1)
        texts = await served.texts()

    text = "".join([*before, "Last part."])
    events = [json.loads(line[6:]) for line in answered.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == text
    assert events[-1]["usage"]["completion_tokens"] == 2
    assert answered.text.endswith("data: [DONE]\n\n")
    assert texts == Counter([f"User: Hello?\n\nAssistant: {text}"])


async def test_what_cannot_be_remembered_costs_the_memory_and_not_the_answer(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    def no_time() -> float:
        raise OverflowError("the clock has stopped")

    async with gate(config(chats, embedder), wall=no_time) as served:
        answers = [
            await served.chat("Hello?"),
            await served.chat("Hello?", stream=True),
            await served.embed("Hello?"),
        ]
        stats = served.memory.stats

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert answers[1].text.endswith("data: [DONE]\n\n")
    assert (stats.accepted, stats.lost) == (0, 3)


async def test_a_call_of_a_tool_is_remembered_alike_whole_and_streamed(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with gate(config(chats, embedder)) as served:
        await served.chat("Will it rain?", tools=[tool])
        await served.chat("Will it rain?", tools=[tool], stream=True)
        await served.kept(2)
        texts = await served.texts()

    [(text, count)] = texts.items()
    assert text.startswith("User: Will it rain?\n\nAssistant: weather({")
    assert text.endswith("})")
    assert count == 2


async def test_an_answer_that_broke_off_is_not_remembered(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    async with gate(config(chats, embedder)) as served:
        chats.cut(after=2)
        await served.chat("It will break.", stream=True)
        await served.chat("It will not.")
        await served.kept(1)

        assert await served.texts() == Counter([exchange("It will not.")])


async def test_a_question_is_what_the_user_said_last(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Look here."},
        {"role": "user", "content": parts},
    ]
    async with gate(config(chats, embedder)) as served:
        answered = await served.http.post("/v1/chat/completions", json={"messages": messages})
        assert answered.status_code == 200
        await served.kept(1)
        [record] = await served.records()

    assert record.text.startswith("User: Look here.\n\nWhat is this?\n[image]\n\nAssistant: ")


async def test_store_false_leaves_no_trace(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    async with gate(config(chats, embedder)) as served:
        await served.chat("A secret.", store=False)
        await served.chat("A secret.", store=False, stream=True)
        await served.embed("A secret.", store=False)
        await served.chat("No secret.")
        await served.kept(1)

        assert await served.texts() == Counter([exchange("No secret.")])
        assert served.memory.stats.accepted == 1
    assert not [path for path in served.folder.rglob("*.*") if b"A secret" in path.read_bytes()]


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_vectors_are_kept_as_their_caller_got_them(
    gate: Remembers, chats: StandIn, embedder: StandIn, encoding: str
) -> None:
    async with gate(config(chats, embedder)) as served:
        await served.embed("One thing.", "Another thing.", encoding_format=encoding)
        await served.kept(1)
        asked = len(embedder.requests)
        first = await served.http.post("/api/v1/search", json={"query": "Another thing.", "limit": 1})
        records = await served.records()

    assert asked == 1
    assert {record.text: record.properties["kind"] for record in records} == {
        "One thing.": "embedding",
        "Another thing.": "embedding",
    }
    assert first.json()["results"][0]["content"] == "Another thing."
    assert first.json()["results"][0]["score"] == pytest.approx(1, abs=1e-5)


# --- whose it is ---------------------------------------------------------------------------


def keyring(**lines: str) -> tuple[dict[str, dict[str, str]], str]:
    """Headers of keys by their name, and the file's section with a line of each."""
    made = {name: new_key() for name in lines}
    section = "".join(f"  - {{name: {name}, hash: '{hash_of(made[name])}'{line}}}\n" for name, line in lines.items())
    return {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}, f"keys:\n{section}"


# What is asked for under other names is the same collection.
@pytest.mark.parametrize("collection", ["conversations", "Conversations"])
async def test_a_key_finds_what_it_asked_and_nobody_elses(
    gate: Remembers, chats: StandIn, embedder: StandIn, collection: str
) -> None:
    headers, keys = keyring(alice="", bob="", auditor=", reads: all")
    async with gate(config(chats, embedder, extra=keys)) as served:

        async def found(who: str, **fields: Any) -> set[str]:
            asked = {"query": "How do whales sleep?", "limit": 100, "collection": collection, **fields}
            said = (await served.http.post("/api/v1/search", json=asked, headers=headers[who])).json()
            return {hit["properties"]["key"] for hit in said["results"]}

        for who in ("alice", "bob"):
            served.http.headers.update(headers[who])
            await served.chat(f"How do whales sleep, asks {who}?")
            await served.embed(f"Whales of {who}.")
        await served.kept(4)

        whose = {who: await found(who) for who in headers}
        forced = await found("bob", where={"property": "key", "operator": "eq", "value": "alice"})
        either = {
            "any": [
                {"property": "key", "operator": "eq", "value": "alice"},
                {"property": "kind", "operator": "eq", "value": "chat"},
            ]
        }
        by_words = await found("bob", where=either, hybrid=True)

    assert whose == {"alice": {"alice"}, "bob": {"bob"}, "auditor": {"alice", "bob"}}
    assert forced == set()
    assert by_words == {"bob"}


@pytest.mark.parametrize("asked", ["Conversations_16", "conversation"])
async def test_who_misses_the_name_is_told_the_one_to_ask_for(
    gate: Remembers, chats: StandIn, embedder: StandIn, asked: str
) -> None:
    headers, keys = keyring(bob="")
    async with gate(config(chats, embedder, extra=keys)) as served:
        served.http.headers.update(headers["bob"])
        await served.chat("How do whales sleep?")
        await served.kept(1)
        await served.serving.runtime.ingest([Document(source="sea.md", text="Whales sleep upright.")], "seas")

        answer = await served.http.post("/api/v1/search", json={"query": "whales", "collection": asked})

    assert answer.status_code == 404
    assert f"{asked!r}. Did you mean 'conversations'?" in answer.json()["error"]["message"]
    assert answer.json()["error"]["message"].endswith("Collections here: conversations, seas.")


async def test_another_collection_is_for_every_key(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    headers, keys = keyring(bob="")
    async with gate(config(chats, embedder, extra=keys)) as served:
        await served.serving.runtime.ingest([Document(source="sea.md", text="Whales sleep upright.")], "notes")
        asked = {"query": "whales", "collection": "notes"}

        said = (await served.http.post("/api/v1/search", json=asked, headers=headers["bob"])).json()

    assert [hit["content"] for hit in said["results"]] == ["Whales sleep upright."]


@pytest.mark.parametrize("may", [", models: [chat]", ", models: [chat, large]", ", models: [talker/chat, same]"])
async def test_a_search_embeds_with_no_model_that_its_key_is_denied(
    gate: Remembers, chats: StandIn, embedder: StandIn, may: str
) -> None:
    headers, keys = keyring(alice="", bob=may)
    async with gate(config(chats, embedder, extra=keys)) as served:
        served.http.headers.update(headers["alice"])
        await served.chat("How do whales sleep?")
        await served.kept(1)
        before = len(embedder.requests)

        searched = await served.http.post("/api/v1/search", json={"query": "whales"}, headers=headers["bob"])
        embedded = await served.http.post(
            "/v1/embeddings", json={"input": "whales", "model": "small"}, headers=headers["bob"]
        )

    assert searched.status_code == embedded.status_code == 403
    assert searched.json() == embedded.json()
    assert len(embedder.requests) == before


async def test_a_space_that_only_a_denied_model_asks_is_left_out(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    headers, keys = keyring(alice="", bob=", models: [small], reads: all")
    async with StandIn(dimension=32) as larger:
        text = (
            config(chats, embedder, extra=keys)
            .replace("- {model_id: large,", "- {model_id: medium,")
            .replace(
                "providers:\n",
                f"providers:\n  - id: other\n    provider_type: openai\n    base_url: {larger.openai_url}\n"
                "    models: [{model_id: large, task: embedding, dimension: 32, price: free}]\n",
            )
        )
        async with gate(text) as served:
            served.http.headers.update(headers["alice"])
            await served.embed("Whales.", model="small")
            await served.embed("Whales.", model="large")
            await served.kept(2)

            said = (await served.http.post("/api/v1/search", json={"query": "Whales."}, headers=headers["bob"])).json()

    assert [each["model_id"] for each in said["sekha"]["spaces"]] == ["small"]
    [left_out] = said["sekha"]["left_out"]
    assert "'bob' may not use 'large'" in left_out["why"]
    assert len(larger.requests) == 1


async def test_two_models_vectors_never_share_an_index(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    async with gate(config(chats, embedder)) as served:
        await served.embed("By the collection's own model.")
        await served.embed("By another of that dimension.", model="same")
        embedder.wrong_dimension(32, times=None)
        await served.embed("By one of another dimension.", model="large")
        await served.embed("By a second of that dimension.", model="larger")
        await served.embed("By a third of that dimension.", model="larger")
        await served.kept(5)

        assert await served.texts() == Counter(["By the collection's own model."])
        assert await served.texts("Conversations_16_same") == Counter(["By another of that dimension."])
        assert await served.texts("Conversations_32") == Counter(["By one of another dimension."])
        assert await served.texts("Conversations_32_larger") == Counter(
            ["By a second of that dimension.", "By a third of that dimension."]
        )


async def test_shortened_vectors_are_left_out(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    async with gate(config(chats, embedder)) as served:
        shortened = await served.embed("Shortened.", dimensions=8)
        await served.embed("Whole.", dimensions=16)
        await served.kept(1)
        await wait_until(lambda: served.memory.stats.left_out == (shortened.status_code == 200))

        assert await served.texts() == Counter(["Whole."])


async def test_while_the_embedder_is_down_exchanges_wait_and_vectors_do_not(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    async with gate(config(chats, embedder)) as served:
        await served.embed("Before it went down.")
        embedder.fail(503, times=None)
        for at in range(5):
            await served.chat(f"Number {at}.")
        await wait_until(lambda: served.memory.stats.kept == 1)
        await wait_until(lambda: len(embedder.requests) > 4)
        while_down = await served.texts()
        embedder.heal()
        await served.kept(6)

        wanted = Counter({exchange(f"Number {at}."): 1 for at in range(5)})
        assert while_down == Counter(["Before it went down."])
        assert await served.texts() == wanted + while_down
        assert served.memory.stats.given_up == 0


async def test_while_the_store_is_down_nobody_pays_and_nothing_is_lost(
    gate: Remembers, chats: StandIn, embedder: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / ".sekha" / "vectors.db"
    in_the_way.mkdir(parents=True)
    async with gate(config(chats, embedder)) as served:
        for at in range(5):
            await served.chat(f"Number {at}.")
        await served.embed("A vector.")
        paid_for = len(embedder.requests)
        await wait_until(lambda: caplog.text.count("remembered waits: Store") == 2)
        while_down = (served.memory.stats.kept, len(embedder.requests))
        in_the_way.rmdir()
        await served.kept(6)

        assert while_down == (0, paid_for)
        assert await served.texts() == Counter([*(exchange(f"Number {at}.") for at in range(5)), "A vector."])


async def test_while_weaviate_is_down_nothing_is_lost(
    gate: Remembers, chats: StandIn, embedder: StandIn, weaviate_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = WeaviateServer.private(weaviate_program, tmp_path_factory.mktemp("weaviate"))
    store = f"store: {{kind: weaviate, url: {server.at.url}, grpc_port: {server.at.grpc_port}, api_key: '${{KEY}}'}}"
    environ = {"KEY": server.at.api_key or ""}
    await asyncio.to_thread(server.start)
    try:
        async with gate(config(chats, embedder, extra=store), environ=environ) as served:
            await served.chat("While it is up.")
            await served.kept(1)
            server.kill()
            await served.chat("While it is down.")
            await served.embed("A vector.")
            paid_for = len(embedder.requests)
            await wait_until(lambda: served.memory.stats.waiting_bytes)
            await asyncio.to_thread(server.start)
            await wait_until(lambda: served.memory.stats.kept == 3, seconds=30)

            assert paid_for == 2
            assert await served.texts() == Counter(
                [exchange("While it is up."), exchange("While it is down."), "A vector."]
            )
    finally:
        server.kill()


async def test_what_waits_is_kept_by_the_next_process(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    embedder.fail(503, times=None)
    async with gate(config(chats, embedder)) as served:
        await served.chat("Later.")
        before = await served.texts()
    embedder.heal()
    async with gate(config(chats, embedder)) as served:
        await served.kept(1)

        assert before == Counter()
        assert await served.texts() == Counter([exchange("Later.")])


async def test_who_stands_back_delivers_nothing_and_loses_nothing(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    async with gate(config(chats, embedder)) as before:
        await before.memory.stand_back()
        await before.chat("After it stood back.")
        await before.embed("A vector.")
        asked = len(embedder.requests)
        async with gate(config(chats, embedder)) as now:
            await now.kept(2)

            assert before.memory.stats.kept == 0
            assert asked == 1
            assert await now.texts() == Counter([exchange("After it stood back."), "A vector."])


async def test_what_waits_is_kept_where_it_was_to_be_though_another_collection_remembers_now(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    embedder.fail(503, times=None)
    async with gate(config(chats, embedder)) as served:
        await served.chat("Asked before.")
    embedder.heal()
    async with gate(config(chats, embedder), collection="notes") as served:
        await served.chat("Asked since.")
        await served.kept(2)

        assert await served.texts() == Counter([exchange("Asked before.")])
        assert await served.texts("Notes_16") == Counter([exchange("Asked since.")])


async def test_a_spent_budget_parks_exchanges_until_it_is_given_up(
    gate: Remembers, chats: StandIn, embedder: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.time()
    budget = "budgets: [{name: small, limit: 0, match: {model: small}}]"
    async with gate(config(chats, embedder, extra=budget), wall=lambda: now) as served:
        await served.chat("Nobody pays.")
        await wait_until(lambda: served.memory.stats.parked == 1 and served.memory.stats.parked_bytes)
        parked = [record.getMessage() for record in caplog.records if "parked" in record.message]
        now += 86_401
        await wait_until(lambda: served.memory.stats.given_up == 1 and not served.memory.stats.parked_bytes)
        given_up = Outbox(served.folder / "given-up", max_bytes=0)
        [item] = [item for path in given_up.ready() for item in given_up.read(path).items]

    assert len(parked) == 1
    assert "Budget 'small' has $0 of $0 left" in parked[0]
    assert "Nobody pays" not in caplog.text
    assert decode(item).texts == ("Nobody pays.", "You said: Nobody pays.")
    assert decode(item).error == "budget_exceeded"
    assert embedder.requests == []


async def test_a_parked_exchange_is_kept_once_there_is_money(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    poor = config(chats, embedder, extra="budgets: [{name: small, limit: 0, match: {model: small}}]")
    async with gate(poor) as served:
        await served.chat("Somebody will pay.")
        await wait_until(lambda: served.memory.stats.parked == 1)
    async with gate(poor.replace("limit: 0", "limit: 5")) as served:
        await wait_until(lambda: served.memory.stats.kept == 1 and not served.memory.stats.parked_bytes)

        assert await served.texts() == Counter([exchange("Somebody will pay.")])


async def test_a_text_too_long_for_its_model_is_cut(gate: Remembers, chats: StandIn, embedder: StandIn) -> None:
    long = "This is a sentence. " * 2_000
    embedder.exceed_context(times=2)
    async with gate(config(chats, embedder)) as served:
        await served.chat(long)
        await served.kept(1)
        [record] = await served.records()

    assert record.properties["cut"] is True
    assert LIMIT // 5 < len(record.text) <= LIMIT // 4
    assert record.text.endswith("sentence.")


class Fragile(BuiltinProvider):
    """A provider that a certain word brings down."""

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:
        if any("poison" in text for text in texts):
            raise ProviderUnavailable(provider_id="local", model_id=model.id)
        if any("surprise" in text for text in texts):
            raise RuntimeError("nobody foresaw it")
        return await super().embed(model, texts, timeout_seconds=timeout_seconds)


LOCAL = """
providers:
  - id: local
    provider_type: builtin
    models: [{model_id: echo, task: chat_small}, {model_id: hashed-16, task: embedding, dimension: 16}]
memory: {collection: conversations}
routing: {circuit_breaker: {failure_threshold: 1000}}
"""


async def test_an_exchange_at_which_the_embedder_always_fails_keeps_no_other_waiting(gate: Remembers) -> None:
    async with gate(LOCAL, open_provider=Fragile) as served:
        for text in ("One.", "A poison.", "Two.", "Three."):
            await served.chat(text)
        await wait_until(lambda: served.memory.stats.kept == 3)
        await served.chat("Four.")
        await wait_until(lambda: served.memory.stats.kept == 4)
        asked = sorted(text.splitlines()[0] for text in await served.texts())

        assert asked == ["User: Four.", "User: One.", "User: Three.", "User: Two."]
        assert served.memory.stats.waiting_bytes > 0
        assert served.memory.stats.given_up == 0


async def test_a_fault_that_nobody_foresaw_does_not_end_the_delivery(
    gate: Remembers, caplog: pytest.LogCaptureFixture
) -> None:
    async with gate(LOCAL, open_provider=Fragile) as served:
        await served.chat("A surprise.")
        await wait_until(lambda: "RuntimeError, which nobody foresaw" in caplog.text)
        await served.chat("Another.")
        await wait_until(lambda: served.memory.stats.kept == 1)

        assert served.memory.stats.waiting_bytes > 0
        assert "A surprise" not in caplog.text


async def test_a_full_outbox_costs_the_memory_and_not_the_answer(
    gate: Remembers, chats: StandIn, embedder: StandIn
) -> None:
    embedder.fail(503, times=None)
    async with gate(config(chats, embedder), max_bytes=1_000) as served:
        answers = [await served.chat("x" * 300) for _ in range(5)]

        assert [answer.status_code for answer in answers] == [200] * 5
        assert served.memory.stats.accepted == 1
        assert served.memory.stats.lost == 4


async def test_memory_without_a_model_to_embed_with_is_a_fault_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    model = "{model_id: echo, task: chat_small}"
    file.write_text(f"providers: [{{id: a, provider_type: builtin, models: [{model}]}}]\nmemory: {{}}\n")

    with pytest.raises(ConfigError, match="no model to embed 'conversations' with"):
        await open_serving(load(file, environ={}), Metrics())


@given(st.text(), st.integers(0, 200))
def test_a_cut_text_is_a_beginning_that_fits(text: str, limit: int) -> None:
    shown, was_cut = cut(text, limit)

    assert text.startswith(shown)
    assert len(shown.encode()) <= limit
    assert was_cut == (len(text.encode()) > limit)


# --- real processes, killed ----------------------------------------------------------------


@asynccontextmanager
async def serving(folder: Path, *arguments: str) -> AsyncIterator[tuple[httpx.AsyncClient, Callable[[], None]]]:
    """`sekha serve` in a process group of its own, and how to kill all of it."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "sekha",
            "--config",
            str(folder / "sekha.yaml"),
            "serve",
            "--json",
            "--port",
            "0",
            *arguments,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    url = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))["url"]

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=30) as http:
            yield http, kill
    finally:
        if process.returncode is None:
            kill()
            await process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("embedder_is_down", [False, True])
async def test_what_was_answered_is_remembered_once_though_the_gateway_is_killed(
    tmp_path: Path, chats: StandIn, embedder: StandIn, workers: str, embedder_is_down: bool
) -> None:
    (tmp_path / "sekha.yaml").write_text(config(chats, embedder))

    async def chat(http: httpx.AsyncClient, at: int) -> None:
        asked = {"messages": [{"role": "user", "content": f"Number {at}."}], "stream": at % 3 == 0}
        answered = await http.post("/v1/chat/completions", json=asked)
        assert answered.status_code == 200

    async def embed(http: httpx.AsyncClient, at: int) -> None:
        answered = await http.post("/v1/embeddings", json={"model": "small", "input": f"Vector {at}."})
        assert answered.status_code == 200

    async with serving(tmp_path, "--workers", workers) as (http, kill):
        await asyncio.gather(*(embed(http, at) for at in range(20)))
        if embedder_is_down:
            embedder.fail(503, times=None)
        await asyncio.gather(*(chat(http, at) for at in range(40)))
        kill()
    embedder.heal()
    wanted = {f"Vector {at}." for at in range(20)} | {exchange(f"Number {at}.") for at in range(40)}
    async with serving(tmp_path, "--workers", workers) as (http, _):

        async def found() -> list[str]:
            asked = {"query": "Number 7.", "limit": 100}
            response = await http.post("/api/v1/search", json=asked)
            return [hit["content"] for hit in response.json()["results"]] if response.status_code == 200 else []

        async def all_found() -> bool:
            return wanted <= set(await found())

        await wait_until(all_found, seconds=20)

        assert Counter(await found()) == Counter(wanted)
