"""What a search adds to the store's own, and what three spaces at once take beside the slowest of them.

    python benchmarks/search.py --rows 20000

A collection lies in three spaces, of 768, 1536 and 3072 numbers, with as many records each: in the embedded store, and
in Weaviate. Questions are embedded beforehand, so that no model is timed, but held, priced and settled as `sekha serve`
does. Everything is asked in turns: the client's own `near_vector`, our store, and the whole `search`, in one space;
then `search` in each of the spaces, and in all of them, once by a provider that embeds at once and once by one that
takes 50 ms. The first says what three searches cost two cores; the second, which has the bound, what somebody waits.

Uses the Weaviate server in `WEAVIATE_URL`, which must be empty, else starts one; without any only the embedded store is
measured. Exits with 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, cast

import orjson

sys.path.insert(0, str(Path(__file__).parents[1]))

from store import Figure, clustered, records
from weaviate_store import bare_client

import sekha.vectors.weaviate  # noqa: F401 - before the client itself, whose import would warn
from sekha.ledgers import lease_from, open_database
from sekha.ledgers.sql import SqlLedger
from sekha.loading import load
from sekha.pricing import Usage
from sekha.providers.base import Embeddings
from sekha.providers.builtin import BuiltinProvider
from sekha.registry import Model, ProviderSpec
from sekha.resources import Resources, ledger_url
from sekha.runtime import Runtime
from sekha.search import SearchRequest
from sekha.vectors.base import Collection, Vector
from sekha.vectors.embedded import EmbeddedStore
from tests.fixtures.weaviate import Server, WeaviateServer, empty_store, find_program, named_server

DIMENSIONS = (768, 1536, 3072)
BATCH = 500
LIMIT = 10
WARMING = 40
EMBEDDING_MS = 50

Ask: TypeAlias = Callable[[str], Awaitable[object]]
Vectors: TypeAlias = Mapping[int, Mapping[str, Vector]]
"""What each model makes of each question, by its dimension."""


class Beforehand(BuiltinProvider):
    """Has embedded all questions before it is asked, and answers after so many seconds."""

    seconds = 0.0

    def __init__(self, spec: ProviderSpec, vectors: Vectors) -> None:
        super().__init__(spec)
        self._vectors = vectors

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:  # noqa: ARG002
        (text,) = texts
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return Embeddings(vectors=self._vectors[model.dimension or 0][text][None], usage=Usage(input_tokens=4))


@asynccontextmanager
async def opened(folder: Path, store: Mapping[str, object], vectors: Vectors) -> AsyncIterator[Runtime]:
    """Sekha over this store, with money as the gateway has it."""
    models = [
        {
            "model_id": f"hashed-{dimension}",
            "task": "embedding",
            "dimension": dimension,
            "price": {"input_per_million": 1},
        }
        for dimension in DIMENSIONS
    ]
    file = folder / "sekha.yaml"
    file.write_bytes(
        orjson.dumps(
            {
                "providers": [{"id": "builtin", "provider_type": "builtin", "models": models}],
                "collections": {"documents": {"model": f"hashed-{DIMENSIONS[0]}"}},
                "budgets": [{"name": "all", "limit": 1000, "period": "month"}],
                "store": store,
                "ledger": {"url": "sqlite:///ledger.db"},
            }
        )
    )
    loaded = load(file)
    url = ledger_url(loaded)
    ledger = lease_from(SqlLedger(open_database(url)), url, folder / "journal")
    resources = Resources(loaded, ledger=ledger, open_provider=lambda spec: Beforehand(spec, vectors))
    async with Runtime(resources) as runtime:
        yield runtime


async def fill(runtime: Runtime, rows: int) -> None:
    """Write as many records into each space, without the models that would have embedded them."""
    store = await runtime.resources.store()
    for model in runtime.resources.registry.for_task("embedding"):
        dimension = model.dimension or 0
        name = f"Documents_{dimension}"
        await store.ensure_collection(Collection(name, dimension, model.fingerprint))
        stored = records(clustered(rows, dimension, 1))
        for start in range(0, rows, BATCH):
            assert await store.upsert(name, stored[start : start + BATCH]) == {}
        if isinstance(store, EmbeddedStore):
            # As it is after its first searches, which last while it learns.
            await store.warm(name)


async def in_turns(asks: Mapping[str, Ask], questions: Sequence[str]) -> dict[str, float]:
    """The median of each, in milliseconds; each question is asked by all, another one first each time."""
    names, seconds = list(asks), {name: list[float]() for name in asks}
    for number, question in enumerate([*questions[:WARMING], *questions]):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            await asks[name](question)
            if number >= WARMING:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(those) * 1e3 for name, those in seconds.items()}


async def measure(runtime: Runtime, vectors: Vectors, near_vector: Ask | None) -> list[Figure]:
    """All figures of one store; `near_vector` asks it without us."""
    store = await runtime.resources.store()
    least = DIMENSIONS[0]

    async def ours(question: str) -> None:
        assert len(await store.search(f"Documents_{least}", vectors[least][question], LIMIT)) == LIMIT

    def whole(dimension: int | None) -> Ask:
        async def ask(question: str) -> None:
            found = await runtime.search(SearchRequest(query=question, dimension=dimension, limit=LIMIT))
            assert len(found.hits) == LIMIT
            assert len(found.answers) == (len(DIMENSIONS) if dimension is None else 1)

        return ask

    questions = list(vectors[least])
    one = await in_turns(
        {**({"near": near_vector} if near_vector else {}), "store": ours, "search": whole(least)}, questions
    )
    figures = [Figure("the store's search, p50", one["store"], "ms"), Figure("search, p50", one["search"], "ms")]
    if near_vector:
        figures = [
            Figure("the client's near_vector, p50", one["near"], "ms"),
            *figures,
            Figure("the store adds", one["store"] - one["near"], "ms", at_most=1),
            Figure("search adds", one["search"] - one["near"], "ms", at_most=1),
        ]
    else:
        figures.append(Figure("search adds to its store", one["search"] - one["store"], "ms", at_most=1))
    spaces: dict[str, Ask] = {f"search of {dimension}": whole(dimension) for dimension in DIMENSIONS}
    embedder = cast("Beforehand", runtime.resources.provider("builtin"))
    for waits, embedder.seconds, at_most in (
        ("", 0.0, None),
        (f", embedded in {EMBEDDING_MS} ms", EMBEDDING_MS / 1e3, 1.3),
    ):
        alone = await in_turns({**spaces, "search of all": whole(None)}, questions)
        together = alone.pop("search of all")
        figures += [Figure(f"{name}{waits}, p50", took, "ms") for name, took in alone.items()]
        figures.append(Figure(f"search of all{waits}, p50", together, "ms"))
        ratio = together / max(alone.values())
        figures.append(Figure(f"all / the slowest alone{waits}", ratio, "x", at_most=at_most))
    return figures


async def embedded(folder: Path, rows: int, vectors: Vectors) -> list[Figure]:
    async with opened(folder, {"kind": "embedded", "path": "vectors.db"}, vectors) as runtime:
        await fill(runtime, rows)
        return await measure(runtime, vectors, None)


async def weaviate(server: Server, folder: Path, rows: int, vectors: Vectors) -> list[Figure]:
    from weaviate.classes.config import ConsistencyLevel
    from weaviate.classes.query import MetadataQuery

    store = {"kind": "weaviate", "url": server.url, "grpc_port": server.grpc_port}
    if server.api_key is not None:
        os.environ["WEAVIATE_KEY"] = server.api_key
        store["api_key"] = "${WEAVIATE_KEY}"
    least = DIMENSIONS[0]
    async with empty_store(server), bare_client(server) as client, opened(folder, store, vectors) as runtime:
        bare = client.collections.use(f"Documents_{least}").with_consistency_level(ConsistencyLevel.QUORUM)

        async def near_vector(question: str) -> Any:
            return await bare.query.near_vector(
                vectors[least][question].tolist(),
                limit=LIMIT,
                return_properties=["text", "properties"],
                return_metadata=MetadataQuery(distance=True),
            )

        await fill(runtime, rows)
        return await measure(runtime, vectors, near_vector)


def with_server(rows: int, vectors: Vectors) -> list[Figure] | str:
    """The figures over Weaviate, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        (state := Path(folder) / "sekha").mkdir()
        if (named := named_server()) is not None:
            return asyncio.run(weaviate(named, state, rows, vectors))
        program = find_program(build=False)
        if isinstance(program, str):
            return program
        server = WeaviateServer.private(program, Path(folder))
        try:
            server.start()
            return asyncio.run(weaviate(server.at, state, rows, vectors))
        finally:
            server.kill()


def show(store: str, figures: Sequence[Figure]) -> bool:
    """Print the figures; whether a bound is missed."""
    print(store)
    for figure in figures:
        missed = "  MISSED" if figure.missed else ""
        print(
            f"  {figure.name:<44}{figure.value:>10.2f} {figure.unit:<4}{figure.bound:<8}{missed}".rstrip(), flush=True
        )
    return any(figure.missed for figure in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="records in each of the spaces")
    parser.add_argument("--queries", type=int, default=150, help="questions")
    parser.add_argument("--store", choices=("embedded", "weaviate"), help="only over this one")
    options = parser.parse_args()
    questions = [f"question number {number}" for number in range(options.queries)]
    vectors = {
        dimension: dict(zip(questions, clustered(options.queries, dimension, 2), strict=True))
        for dimension in DIMENSIONS
    }
    print(f"{options.rows} records in each space, top {LIMIT}, {options.queries} questions")
    missed = False
    if options.store != "weaviate":
        with tempfile.TemporaryDirectory() as folder:
            missed |= show("embedded", asyncio.run(embedded(Path(folder), options.rows, vectors)))
    if options.store != "embedded":
        figures = with_server(options.rows, vectors)
        if isinstance(figures, str):
            print(f"weaviate\n  not measured: {figures}")
        else:
            missed |= show("weaviate", figures)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
