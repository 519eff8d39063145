"""What only the Weaviate store has to get right; the rest is in `tests/contracts`."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import numpy as np
import pytest
from aiohttp import web

from sekha.errors import CollectionMissing, StoreError, StoreUnavailable, VectorRefused
from sekha.loading import load
from sekha.vectors.base import AllOf, AnyOf, Collection, Compare, Filter, Not, Record, Scalar
from sekha.vectors.opening import open_store
from sekha.vectors.weaviate import WeaviateStore
from tests.fixtures.missing import missing
from tests.fixtures.weaviate import Server, WeaviateServer, asked, empty_store, weaviate_section

DOCS = Collection("Docs_4", 4, "hash:4")
QUERY = np.array([1, 0, 0, 0], dtype=np.float32)


@pytest.fixture
async def store(weaviate_server: Server) -> AsyncIterator[WeaviateStore]:
    async with empty_store(weaviate_server) as opened:
        await opened.ensure_collection(DOCS)
        yield opened


@pytest.fixture
def own_server(weaviate_program: Path, tmp_path: Path) -> Iterator[WeaviateServer]:
    """A server that a test may kill."""
    server = WeaviateServer.private(weaviate_program, tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def uuid(number: int) -> str:
    return str(UUID(int=number << 96 | number))


def record(number: int, text: str = "text", **properties: Scalar) -> Record:
    return Record(uuid(number), text, np.array([1, number, 0, 0], dtype=np.float32), properties)


@asynccontextmanager
async def answering(meta: dict[str, str]) -> AsyncIterator[tuple[str, int]]:
    """A server that says what it is and no more, and its gRPC port, that takes connections and nothing else."""

    async def said(_: web.Request) -> web.Response:
        return web.json_response(meta)

    async def never(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    app = web.Application()
    app.router.add_get("/v1/meta", said)
    app.router.add_get("/v1/schema/{name}", never)
    runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as grpc:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", grpc.sockets[0].getsockname()[1]
    await runner.cleanup()


@asynccontextmanager
async def another(server: Server) -> AsyncIterator[WeaviateStore]:
    """A second store on the same server, as another process would have it."""
    async with await WeaviateStore.open(server.url, grpc_port=server.grpc_port, api_key=server.api_key) as opened:
        yield opened


def bare_client(server: Server) -> Any:
    """The client as others use it, who know nothing of us."""
    import weaviate  # only here, since a bare import of it warns

    port = urlsplit(server.url).port
    return weaviate.use_async_with_local(
        port=port,
        grpc_port=server.grpc_port,
        auth_credentials=server.api_key,
        skip_init_checks=True,
    )


def made(server: Server, name: str = "Docs_4") -> dict[str, Any]:
    """The class of a collection as the server has it, with the defaults that the client leaves out."""
    described: dict[str, Any] = json.loads(asked(server, f"/schema/{name}") or b"")
    return described


async def numbers(store: WeaviateStore, where: Filter) -> set[int]:
    """The records that match, as a search and a count agree on."""
    found = {int(hit.uuid[:8], 16) for hit in await store.search("Docs_4", QUERY, 100, where=where)}
    assert await store.count("Docs_4", where) == len(found)
    return found


# --- opening -------------------------------------------------------------------------------


async def test_a_configuration_opens_it(weaviate_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(weaviate_section(weaviate_server))

    store = await open_store(load(file, environ={"WEAVIATE_KEY": weaviate_server.api_key or ""}))

    assert isinstance(store, WeaviateStore)
    assert 0 <= await store.health() < 5
    await store.aclose()


@pytest.mark.parametrize(("quantizer", "quantized"), [("none", set()), ("rq-8", {"rq"})])
async def test_a_configuration_says_how_collections_are_made(
    weaviate_server: Server, tmp_path: Path, quantizer: str, quantized: set[str]
) -> None:
    file = tmp_path / "sekha.yaml"
    section = weaviate_section(weaviate_server)
    file.write_text(section.replace("}\n", f", quantizer: {quantizer}, consistency: all}}\n"))
    async with empty_store(weaviate_server):
        store = await open_store(load(file, environ={"WEAVIATE_KEY": weaviate_server.api_key or ""}))

        await store.ensure_collection(DOCS)

        assert await store.upsert("Docs_4", [record(number) for number in range(30)]) == {}
        assert await store.count("Docs_4") == 30
        await store.aclose()
        index = made(weaviate_server)["vectorConfig"]["default"]["vectorIndexConfig"]
        assert {name for name in ("bq", "pq", "rq", "sq") if index[name]["enabled"]} == quantized


async def test_a_configuration_says_how_long_to_wait(tmp_path: Path) -> None:
    async with answering({"version": "1.36.0"}) as (url, grpc_port):
        file = tmp_path / "sekha.yaml"
        file.write_text(f"store: {{kind: weaviate, url: '{url}', grpc_port: {grpc_port}, query_timeout_secs: 0.2}}\n")
        store = await open_store(load(file))

        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.2 s"):
            await store.describe("Docs_4")

        await store.aclose()


@pytest.mark.parametrize("key", [None, "open sesame"])
async def test_a_refused_key_is_said_and_never_shown(weaviate_server: Server, key: str | None) -> None:
    if weaviate_server.api_key is None:
        missing("the server in WEAVIATE_URL takes no key: name one that does, or none")

    with pytest.raises(StoreError, match="refuses our key") as caught:
        await WeaviateStore.open(weaviate_server.url, grpc_port=weaviate_server.grpc_port, api_key=key)

    assert not caught.value.retryable
    assert "sesame" not in str(caught.value)


async def test_a_server_that_is_not_there_is_unavailable(unused_tcp_port: int) -> None:
    with pytest.raises(StoreUnavailable, match=f"http://127.0.0.1:{unused_tcp_port}.*cannot be reached") as caught:
        await WeaviateStore.open(f"http://admin:secret@127.0.0.1:{unused_tcp_port}", api_key="sesame")

    assert "secret" not in str(caught.value)
    assert "sesame" not in str(caught.value)


async def test_a_wrong_grpc_port_is_named(weaviate_server: Server, unused_tcp_port: int) -> None:
    with pytest.raises(StoreUnavailable, match=f"gRPC port {unused_tcp_port} does not"):
        await WeaviateStore.open(weaviate_server.url, grpc_port=unused_tcp_port, api_key=weaviate_server.api_key)


@pytest.mark.parametrize("version", ["1.4.2", "1.35.9"])
async def test_a_server_that_is_too_old_is_refused(version: str) -> None:
    async with answering({"version": version}) as (url, grpc_port):
        with pytest.raises(StoreError, match=f"version {version}"):
            await WeaviateStore.open(url, grpc_port=grpc_port)


@pytest.mark.parametrize("version", ["1.36.0", "2.0.0"])
async def test_a_server_that_is_new_enough_is_taken(version: str) -> None:
    async with answering({"version": version}) as (url, grpc_port):
        store = await WeaviateStore.open(url, grpc_port=grpc_port)

    await store.aclose()


def test_importing_it_warns_of_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import sekha.vectors.weaviate"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_client_is_imported_only_when_it_is_needed() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, sekha.vectors.opening; sys.exit('weaviate' in sys.modules)"],
        timeout=60,
        check=False,
    )

    assert ran.returncode == 0


# --- collections and properties ------------------------------------------------------------


async def test_a_class_that_is_not_ours_is_left_alone(store: WeaviateStore, weaviate_server: Server) -> None:
    client = bare_client(weaviate_server)
    async with client:
        await client.collections.create("Theirs")

        try:
            assert await store.list_collections() == [DOCS]
            for call in (
                store.describe("Theirs"),
                store.ensure_collection(Collection("Theirs", 4)),
                store.drop_collection("Theirs"),
                store.upsert("Theirs", [record(1)]),
            ):
                with pytest.raises(StoreError, match="Sekha did not make"):
                    await call
            assert await client.collections.exists("Theirs")
        finally:
            await client.collections.delete("Theirs")


async def test_everything_that_servers_differ_in_is_said(store: WeaviateStore, weaviate_server: Server) -> None:
    config = made(weaviate_server)

    vector = config["vectorConfig"]["default"]
    assert vector["vectorIndexType"] == "hnsw"
    assert vector["vectorIndexConfig"]["distance"] == "cosine"
    assert not any(vector["vectorIndexConfig"][quantizer]["enabled"] for quantizer in ("bq", "pq", "rq", "sq"))
    assert vector["vectorizer"] == {"none": {}}
    assert config["replicationConfig"]["factor"] == 1
    properties = {each["name"]: each for each in config["properties"]}
    assert properties["source"]["tokenization"] == "field"
    assert properties["source"]["indexFilterable"] is True
    assert properties["chunk"]["dataType"] == ["number"]


@pytest.mark.parametrize(
    "properties",
    [
        {"Title": "upper", "title": "lower"},
        {"author-name": "a", "größe": 3, "": "empty", "a" * 300: True},
        {"n": 3, "share": 3.0, "large": 2**62 + 1, "draft": False, "nothing": None},
        {"source": 5, "chunk": "five", "text": "of its own", "properties": "too", "id": "x", "vector": "y"},
        {"blank": " ", "padded": " a ", "marked": "\x1f", "empty": ""},
    ],
)
async def test_properties_of_any_name_and_type_come_back_as_written(
    store: WeaviateStore, properties: dict[str, Scalar]
) -> None:
    written = Record(uuid(1), "text", QUERY, properties)

    assert await store.upsert("Docs_4", [written]) == {}

    read = (await store.get("Docs_4", [uuid(1)]))[uuid(1)].properties
    assert read == properties
    assert {name: type(value) for name, value in read.items()} == {n: type(v) for n, v in properties.items()}
    for name, value in properties.items():
        assert await numbers(store, Compare(name, "eq", value)) == {1}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Compare("mixed", "eq", 1), {1, 3}),  # True counts as 1
        (Compare("mixed", "eq", "1"), {2}),
        (Compare("mixed", "in", (1, "1", None)), {1, 2, 3, 4, 5}),
        (Compare("mixed", "gt", 0), {1, 3}),
        (Compare("mixed", "gt", ""), {2}),
        (Compare("mixed", "ne", 1), {2, 4, 5}),
        (Compare("blank", "eq", ""), {3}),
        (Compare("blank", "eq", " "), {4}),
        (Compare("blank", "eq", None), {1, 2, 5}),
        (Compare("blank", "ne", None), {3, 4}),
        (Compare("source", "eq", "the"), {1}),
        (Compare("source", "eq", "The"), {2}),
        (Compare("source", "eq", "the end"), {3}),
        (Compare("source", "eq", "t*"), {4}),
        (Not(AnyOf((Compare("mixed", "eq", None), Compare("blank", "eq", None)))), {3}),
        (AllOf((Compare("source", "ne", "x"), Not(Compare("mixed", "in", ())))), {1, 2, 3, 4, 5}),
    ],
)
async def test_filters_tell_apart_what_weaviate_would_not(
    store: WeaviateStore, where: Filter, expected: set[int]
) -> None:
    await store.upsert(
        "Docs_4",
        [
            record(1, mixed=1, source="the"),
            record(2, mixed="1", source="The"),
            record(3, mixed=True, source="the end", blank=""),
            record(4, source="t*", blank=" "),
            record(5),
        ],
    )

    assert await numbers(store, where) == expected


async def test_a_collection_made_anew_by_somebody_else_is_seen(store: WeaviateStore, weaviate_server: Server) -> None:
    await store.search("Docs_4", QUERY, 1)
    async with another(weaviate_server) as other:
        await other.drop_collection("Docs_4")
        await other.ensure_collection(Collection("Docs_4", 2))
        await other.upsert("Docs_4", [Record(uuid(1), "new", np.ones(2, dtype=np.float32), {"late": "yes"})])
        assert await other.catch_up("Docs_4") == 0

    hits = await store.search("Docs_4", np.ones(2, dtype=np.float32), 1, where=Compare("late", "eq", "yes"))

    assert [hit.text for hit in hits] == ["new"]
    with pytest.raises(VectorRefused, match="4 numbers, not 2"):
        await store.upsert("Docs_4", [record(1)])


async def test_an_alias_that_somebody_else_moves_is_followed(store: WeaviateStore, weaviate_server: Server) -> None:
    await store.ensure_collection(Collection("Docs_2", 2))
    await store.upsert("Docs_2", [Record(uuid(7), "two", np.ones(2, dtype=np.float32))])
    await store.point_alias("Current", "Docs_4")
    await store.search("Current", QUERY, 1)
    async with another(weaviate_server) as other:
        await other.point_alias("Current", "Docs_2")

    assert [hit.text for hit in await store.search("Current", np.ones(2, dtype=np.float32), 1)] == ["two"]


async def test_two_stores_make_the_same_collection_and_properties_at_once(
    store: WeaviateStore, weaviate_server: Server
) -> None:
    async with another(weaviate_server) as first, another(weaviate_server) as second:
        both = (first, second)
        await asyncio.gather(*(each.ensure_collection(Collection("New_4", 4)) for each in both))

        refused = await asyncio.gather(
            *(
                each.upsert("New_4", [record(number * 2 + at, colour="red", size=number) for number in range(50)])
                for at, each in enumerate(both)
            )
        )

    assert refused == [{}, {}]
    assert await store.count("New_4", Compare("colour", "eq", "red")) == 100
    assert await store.count("New_4", Compare("size", "lt", 10)) == 20


# --- many and large ------------------------------------------------------------------------


async def test_more_than_one_message_holds_is_written_and_read_back(store: WeaviateStore) -> None:
    batch = [record(number, text="x" * 20_000, even=number % 2 == 0) for number in range(2500)]

    assert await store.upsert("Docs_4", batch) == {}

    assert await store.count("Docs_4") == 2500
    read = await store.get("Docs_4", [each.uuid for each in batch])
    assert read == {each.uuid: each for each in batch}
    assert await store.delete_where("Docs_4", Compare("even", "eq", True)) == 1250
    assert await store.delete("Docs_4", [each.uuid for each in batch]) == 1250


async def test_what_fits_into_no_message_is_refused_and_the_rest_stored(store: WeaviateStore) -> None:
    refused = await store.upsert("Docs_4", [record(1), record(2, text="x" * 9_000_000), record(3)])

    assert set(refused) == {uuid(2)}
    assert "a message 33554432 at the most" in refused[uuid(2)]
    assert await store.count("Docs_4") == 2


async def test_deleting_goes_on_where_the_server_stops(store: WeaviateStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in range(10_500)])

    assert await store.delete_where("Docs_4", AllOf(()), dry_run=True) == 10_500
    assert await store.delete_where("Docs_4", AllOf(())) == 10_500

    assert await store.count("Docs_4") == 0


async def test_a_tie_is_cut_by_uuid_however_long_it_is(store: WeaviateStore) -> None:
    same = np.array([1, 1, 0, 0], dtype=np.float32)
    await store.upsert("Docs_4", [Record(uuid(number), "text", same) for number in range(40)])

    hits = await store.search("Docs_4", QUERY, 3)

    assert [hit.uuid for hit in hits] == [uuid(0), uuid(1), uuid(2)]


async def test_more_hits_than_a_server_returns_are_refused(store: WeaviateStore) -> None:
    with pytest.raises(StoreError, match="at most 10000 hits, and 10001 were asked for"):
        await store.search("Docs_4", QUERY, 10_001)


# --- failures ------------------------------------------------------------------------------


async def test_objects_that_the_server_refuses_are_named_and_their_texts_not_logged(
    store: WeaviateStore, weaviate_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    # Somebody wrote into our class by other means, and fixed another length than its description says.
    await store.ensure_collection(Collection("Spoilt_4", 4))
    async with bare_client(weaviate_server) as client:
        await client.collections.use("Spoilt_4").data.insert({"text": "", "properties": "{}"}, vector=[1.0, 2.0])

    with caplog.at_level(logging.DEBUG):
        refused = await store.upsert("Spoilt_4", [record(number, text="confidential") for number in (1, 2)])

    assert set(refused) == {uuid(1), uuid(2)}
    assert all("dimensions" in why for why in refused.values())
    assert "confidential" not in caplog.text
    assert "confidential" not in str(refused)


async def test_a_killed_server_is_unavailable_and_found_again(own_server: WeaviateServer) -> None:
    at = own_server.at
    async with await WeaviateStore.open(
        at.url, grpc_port=at.grpc_port, api_key=at.api_key, query_seconds=2, insert_seconds=2
    ) as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs_4", [record(number) for number in range(100)])

        own_server.kill()

        for call in (
            store.search("Docs_4", QUERY, 1),
            store.upsert("Docs_4", [record(1)]),
            store.count("Docs_4"),
            store.list_aliases(),
            store.health(),
        ):
            with pytest.raises(StoreUnavailable, match=at.url) as caught:
                await call
            assert caught.value.retryable
            assert str(at.api_key) not in str(caught.value)

        own_server.start()

        assert await store.count("Docs_4") == 100
        assert await store.upsert("Docs_4", [record(number) for number in range(200)]) == {}
        assert await store.count("Docs_4") == 200
        assert await store.search("Docs_4", QUERY, 1)


async def test_a_server_killed_during_an_upsert_fails_it_and_loses_nothing_acknowledged(
    own_server: WeaviateServer,
) -> None:
    at = own_server.at
    acknowledged: list[Record] = []
    async with await WeaviateStore.open(
        at.url, grpc_port=at.grpc_port, api_key=at.api_key, query_seconds=2, insert_seconds=2
    ) as store:
        await store.ensure_collection(DOCS)

        async def write() -> None:
            for start in range(0, 100_000, 100):
                batch = [record(number) for number in range(start, start + 100)]
                assert await store.upsert("Docs_4", batch) == {}
                acknowledged.extend(batch)
                if len(acknowledged) == 500:
                    half_way.set()

        half_way = asyncio.Event()
        writing = asyncio.create_task(write())
        await half_way.wait()
        own_server.kill()
        with pytest.raises(StoreUnavailable):
            await writing

        await asyncio.to_thread(own_server.start)

        read = await store.get("Docs_4", [each.uuid for each in acknowledged])
        assert set(read) == {each.uuid for each in acknowledged}


async def test_an_unknown_name_that_is_a_path_is_just_unknown(store: WeaviateStore) -> None:
    for name in ("Docs_4/../Docs_4", "../meta", "docs_4", "Docs_4?x=1"):
        with pytest.raises(CollectionMissing):
            await store.describe(name)
        assert await store.alias_target(name) is None
        assert await store.delete_alias(name) is False
        assert await store.drop_collection(name) is False
