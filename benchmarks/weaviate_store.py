"""The Weaviate store against the client without us: the same objects, the same server, in turns.

    python benchmarks/weaviate_store.py --rows 5000 --dimension 768

Uses the server in `WEAVIATE_URL`, else starts one. Exits with 1 when a bound is missed, and with 0 and a
note when there is no server to be had.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import sekha.vectors.weaviate  # noqa: F401 - before the client itself, whose import would warn
from sekha.vectors.base import Collection, Compare, Record
from tests.fixtures.weaviate import Server, WeaviateServer, empty_store, find_program, named_server

BATCH = 500
LIMIT = 10
PROPERTIES = ["text", "source", "chunk", "heading", "content_hash"]


def made(rows: int, dimension: int) -> list[Record]:
    random = np.random.default_rng(1)
    words = np.array(["the", "store", "keeps", "what", "was", "written", "and", "finds", "what", "is", "near"])
    vectors = random.standard_normal((rows, dimension), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        Record(
            str(UUID(bytes=random.bytes(16))),
            " ".join(random.choice(words, 130)),
            vector,
            {
                "source": f"s{at % 10}",
                "chunk": at,
                "heading": f"Document {at}",
                "content_hash": random.bytes(32).hex(),
                "embedding_fingerprint": "hash:768",
                "source_updated_at": "2026-11-23T12:00:00+00:00",
            },
        )
        for at, vector in enumerate(vectors)
    ]


async def measure(server: Server, rows: int, dimension: int, queries: int) -> dict[str, float]:
    from weaviate.classes.config import ConsistencyLevel
    from weaviate.classes.data import DataObject
    from weaviate.classes.query import Filter, MetadataQuery

    records = made(rows, dimension)
    async with empty_store(server) as store, bare_client(server) as client:
        # Two collections of ours, so that both sides write to the same kind of index.
        for name in ("Ours", "Bare"):
            await store.ensure_collection(Collection(name, dimension, "hash:768"))
        bare = client.collections.use("Bare").with_consistency_level(ConsistencyLevel.QUORUM)
        ours_seconds: list[float] = []
        bare_seconds: list[float] = []
        for start in range(0, rows, BATCH):
            batch = records[start : start + BATCH]
            for turn in (0, 1) if start // BATCH % 2 else (1, 0):
                began = time.perf_counter()
                if turn:
                    assert await store.upsert("Ours", batch) == {}
                    ours_seconds.append(time.perf_counter() - began)
                else:
                    objects = [
                        DataObject(
                            properties={"text": each.text, **each.properties}, uuid=each.uuid, vector=each.vector
                        )
                        for each in batch
                    ]
                    assert not (await bare.data.insert_many(objects)).has_errors
                    bare_seconds.append(time.perf_counter() - began)
        figures = {
            "ingest, objects/s": rows / sum(ours_seconds),
            "bare insert_many, objects/s": rows / sum(bare_seconds),
            # Pair by pair, since a server that compacts in the middle of one batch would decide a sum.
            "ingest / bare": median(bare / ours for bare, ours in zip(bare_seconds, ours_seconds, strict=True)),
        }
        ours = client.collections.use("Ours").with_consistency_level(ConsistencyLevel.QUORUM)
        plain: list[float] = []
        times: dict[str, list[float]] = {"": [], ", filtered": []}
        for name, where, filters in (
            ("", None, None),
            (", filtered", Compare("source", "eq", "s3"), Filter.by_property("source").equal("s3")),
        ):
            plain.clear()
            for query in np.random.default_rng(2).standard_normal((queries, dimension), dtype=np.float32):
                began = time.perf_counter()
                await ours.query.near_vector(
                    query.tolist(),
                    limit=LIMIT,
                    filters=filters,
                    return_properties=PROPERTIES,
                    return_metadata=MetadataQuery(distance=True),
                )
                between = time.perf_counter()
                assert len(await store.search("Ours", query, LIMIT, where=where)) == LIMIT
                plain.append(between - began)
                times[name].append(time.perf_counter() - between)
            figures[f"bare near_vector{name}, p50 ms"] = median(plain) * 1e3
            figures[f"search{name}, p50 ms"] = median(times[name]) * 1e3
            figures[f"search adds{name}, p50 ms"] = (median(times[name]) - median(plain)) * 1e3
    return figures


def bare_client(server: Server) -> Any:
    import weaviate

    return weaviate.use_async_with_local(
        port=int(server.url.rsplit(":", 1)[1]),
        grpc_port=server.grpc_port,
        auth_credentials=server.api_key,
        skip_init_checks=True,
    )


def bound(name: str) -> str:
    if name == "ingest / bare":
        return ">= 0.9"
    return "<= 1" if name.startswith("search adds") else ""


def missed(name: str, value: float) -> bool:
    return (name == "ingest / bare" and value < 0.9) or (name.startswith("search adds") and value > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="objects stored")
    parser.add_argument("--dimension", type=int, default=768, help="numbers in a vector")
    parser.add_argument("--queries", type=int, default=300, help="searches, filtered and not")
    options = parser.parse_args()
    if (named := named_server()) is not None:
        figures = asyncio.run(measure(named, options.rows, options.dimension, options.queries))
    else:
        program = find_program(build=False)
        if isinstance(program, str):
            print(f"not measured: {program}")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            server = WeaviateServer.private(program, Path(folder))
            try:
                server.start()
                figures = asyncio.run(measure(server.at, options.rows, options.dimension, options.queries))
            finally:
                server.kill()
    print(f"{options.rows} x {options.dimension}, batches of {BATCH}, top {LIMIT}, {options.queries} queries")
    for name, value in figures.items():
        print(f"{name:<40}{value:>10.2f} {bound(name):<7}{'  MISSED' if missed(name, value) else ''}".rstrip())
    return int(any(missed(name, value) for name, value in figures.items()))


if __name__ == "__main__":
    raise SystemExit(main())
