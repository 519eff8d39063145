"""The embedded store against the bare thing: SQLite without us, and NumPy without us.

    python benchmarks/store.py --rows 100000 --dimension 1536

Both sides of every ratio run in turns, batch by batch and query by query, so that a busy machine
slows them alike. Exits with 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from uuid import UUID

import numpy as np
import numpy.typing as npt
import orjson

from sekha.vectors.base import Collection, Compare, Hit, Record, Vector
from sekha.vectors.embedded import EmbeddedStore

BATCH = 500
QUERIES = 60
LIMIT = 10
NEVER = sys.maxsize


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def missed(self) -> bool:
        below = self.at_least is not None and self.value < self.at_least
        return below or (self.at_most is not None and self.value > self.at_most)

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}" if self.at_most is not None else ""


def clustered(rows: int, dimension: int, seed: int) -> Vector:
    """Unit vectors of 400 clusters in 64 latent dimensions; a fifth of their energy is noise in all."""
    shape, random = np.random.default_rng(0), np.random.default_rng(seed)
    centres, spread = shape.standard_normal((400, 64)), shape.standard_normal((64, dimension))
    made = np.empty((rows, dimension), dtype=np.float32)
    for start in range(0, rows, 10_000):
        part = made[start : start + 10_000]
        latent = centres[random.integers(400, size=len(part))] + 0.6 * random.standard_normal((len(part), 64))
        signal = latent @ spread
        signal /= np.linalg.norm(signal, axis=1, keepdims=True)
        noise = random.standard_normal((len(part), dimension)) / dimension**0.5
        part[:] = unit(0.8**0.5 * signal + 0.2**0.5 * noise)
    return made


def isotropic(rows: int, dimension: int, seed: int) -> Vector:
    """Unit vectors that have no direction in common: nothing can be left out in the first pass."""
    return unit(np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32))


def unit(vectors: npt.NDArray[np.floating]) -> Vector:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / norms, dtype=np.float32)


def records(vectors: Vector) -> list[Record]:
    random = np.random.default_rng(1)
    words = np.array(["the", "store", "keeps", "what", "was", "written", "and", "finds", "what", "is", "near"])
    return [
        Record(
            str(UUID(bytes=random.bytes(16))),
            " ".join(random.choice(words, 130)),
            vector,
            {"source": f"s{index % 10}", "chunk": index, "title": f"Document {index}", "language": "en"},
        )
        for index, vector in enumerate(vectors)
    ]


async def ingest(path: Path, stored: Sequence[Record], dimension: int) -> list[Figure]:
    bare = sqlite3.connect(path / "bare.db", isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "cache_size = -65536", "wal_autocheckpoint = 8192"):
        bare.execute(f"PRAGMA {pragma}")
    bare.execute("CREATE TABLE rows (uuid TEXT PRIMARY KEY, text TEXT, properties TEXT, vector BLOB)")
    ours = without = 0.0
    async with EmbeddedStore.open(path / "store.db") as store:
        await store.ensure_collection(Collection("Documents", dimension))
        for start in range(0, len(stored), BATCH):
            batch = stored[start : start + BATCH]
            rows = [
                (record.uuid, record.text, orjson.dumps(record.properties).decode(), vector.tobytes())
                for record in batch
                if (vector := record.vector) is not None
            ]
            began = time.perf_counter()
            bare.execute("BEGIN IMMEDIATE")
            bare.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
            bare.execute("COMMIT")
            between = time.perf_counter()
            await store.upsert("Documents", batch)
            ours += time.perf_counter() - between
            without += between - began
        began = time.perf_counter()
        for start in range(0, min(len(stored), 20 * BATCH), BATCH):
            await store.upsert("Documents", stored[start : start + BATCH])
        again = time.perf_counter() - began
    bare.close()
    return [
        Figure("ingest", len(stored) / ours, "rows/s"),
        Figure("ingest, bare executemany", len(stored) / without, "rows/s"),
        Figure("ingest / bare executemany", without / ours, "x", at_least=0.7),
        Figure("the same rows again", min(len(stored), 20 * BATCH) / again, "rows/s"),
        Figure("file", (path / "store.db").stat().st_size / 1e6, "MB"),
    ]


async def search(path: Path, matrix: Vector, uuids: Sequence[str], queries: Vector, *, hard: bool) -> list[Figure]:
    """Exact, with the first pass, and filtered, each query beside NumPy's own."""
    async with (
        EmbeddedStore.open(path / "store.db", first_pass_rows=NEVER, cache_bytes=2**40) as exact,
        EmbeddedStore.open(path / "store.db", first_pass_rows=1, cache_bytes=2**40) as short,
    ):
        cold, _ = await timed(exact.search("Documents", queries[0], LIMIT))
        began = time.perf_counter()
        await short.warm("Documents")
        warm = time.perf_counter() - began
        numpy_times, exact_times, short_times, filtered_times = [], [], [], []
        recalled, source = 0, Compare("source", "eq", "s3")
        for query in queries:
            began = time.perf_counter()
            scores = matrix @ query
            top = np.argpartition(scores, -LIMIT)[-LIMIT:]
            truth = {uuids[index] for index in top[np.argsort(-scores[top])].tolist()}
            numpy_times.append(time.perf_counter() - began)
            seconds, hits = await timed(exact.search("Documents", query, LIMIT))
            exact_times.append(seconds)
            assert {hit.uuid for hit in hits} == truth
            seconds, hits = await timed(short.search("Documents", query, LIMIT))
            short_times.append(seconds)
            recalled += len(truth & {hit.uuid for hit in hits})
            seconds, _ = await timed(short.search("Documents", query, LIMIT, where=source))
            filtered_times.append(seconds)
    bare = median(numpy_times)
    recall = Figure("recall with first pass", recalled / (LIMIT * len(queries)), "", at_least=0.999)
    ratio = median(short_times) / bare
    if hard:
        return [recall, Figure("first pass / NumPy", ratio, "x")]
    return [
        Figure("cold load and first search", cold, "s"),
        Figure("load and first pass made", warm, "s"),
        Figure("NumPy product and partition, p50", bare * 1e3, "ms"),
        Figure("exact search, p50", median(exact_times) * 1e3, "ms"),
        Figure("exact search / NumPy", median(exact_times) / bare, "x", at_most=1.2),
        Figure("search with first pass, p50", median(short_times) * 1e3, "ms"),
        Figure("first pass / NumPy", ratio, "x", at_most=0.5),
        recall,
        Figure("filtered search (one in ten), p50", median(filtered_times) * 1e3, "ms"),
    ]


async def timed(search: Awaitable[list[Hit]]) -> tuple[float, list[Hit]]:
    began = time.perf_counter()
    hits = await search
    return time.perf_counter() - began, hits


async def measure(rows: int, dimension: int) -> list[Figure]:
    figures = []
    for name, make, count in (("clustered", clustered, rows), ("isotropic", isotropic, max(rows // 5, 1000))):
        with tempfile.TemporaryDirectory() as folder:
            vectors = make(count, dimension, 1)
            stored = records(vectors)
            ingested = await ingest(Path(folder), stored, dimension)
            uuids = [record.uuid for record in stored]
            hard = name == "isotropic"
            searched = await search(Path(folder), vectors, uuids, make(QUERIES, dimension, 2), hard=hard)
            found = searched if hard else [*ingested, *searched]
            figures += [Figure(f"{name}: {figure.name}", *list(asdict(figure).values())[1:]) for figure in found]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="vectors stored")
    parser.add_argument("--dimension", type=int, default=1536, help="numbers in a vector")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.rows, options.dimension))
    if options.json:
        print(json.dumps([{**asdict(figure), "missed": figure.missed} for figure in figures]))
    else:
        print(f"{options.rows} x {options.dimension}, batches of {BATCH}, top {LIMIT}, {QUERIES} queries")
        for figure in figures:
            print(f"{figure.name:<48}{figure.value:>12.3f} {figure.unit:<7}{figure.bound:<9}", end="")
            print("  MISSED" if figure.missed else "")
    return int(any(figure.missed for figure in figures))


if __name__ == "__main__":
    raise SystemExit(main())
