"""The store that needs no server: SQLite for what must last, NumPy for what must be quick.

Search is exact. Every process that searches keeps the vectors it searched as a float32 matrix, and
before each search takes in what any process wrote since. Two rules make that cheap: row ids only
grow, and a vector that changes takes a new one, so "what is new" is "what has a higher id"; a
deletion leaves a tombstone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import orjson

from sekha import copying
from sekha.vectors import embedded_tables as tables
from sekha.vectors import embedded_text
from sekha.vectors.base import Collection, Filter, Hit, Record, TextHit, Vector
from sekha.vectors.checks import canonical, canonical_all, check_alias, check_collection, unit, words
from sekha.vectors.embedded_file import StoreFile
from sekha.vectors.embedded_filter import sql
from sekha.vectors.embedded_matrix import Ids, Matrices, Matrix, View, best, rounding
from sekha.vectors.embedded_tables import Stored

__all__ = ["EmbeddedStore"]

logger = logging.getLogger(__name__)

FIRST_PASS_AFTER_SEARCHES: Final = 32
"""Making a first pass takes about as long as this many exact searches."""
PAUSE_SECONDS: Final = 0.02
"""How long other processes are given to write, between two steps of a long catching up."""


class SnapshotTooOldError(Exception):
    """Another search has taken in what was written after our snapshot: begin with a new one."""


class EmbeddedStore:
    """A `VectorStore` in one file, for any number of processes of one machine.

    `async with EmbeddedStore.open(".sekha/vectors.db") as store: …`

    Vectors are kept at unit length, so `get` returns the direction that was written, and the very
    numbers when they had unit length already. Acknowledged writes survive `kill -9`; a power cut may
    take the last of them, in whole batches.
    """

    def __init__(self, file: StoreFile, *, cache_bytes: int, first_pass_rows: int, warn_bytes: int) -> None:
        self._file = file
        self._matrices = Matrices(cache_bytes)
        self._first_pass_rows = first_pass_rows
        self._warn_bytes = warn_bytes
        self._warned: set[int] = set()
        # BLAS uses every core for one product, and its threads spin while they wait for those of another: on two
        # cores eight searches at once take 4.6 ms each side by side, and 2.0 ms one after the other.
        self._scans = threading.Semaphore(max(1, (os.cpu_count() or 1) // 2))

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        *,
        cache_bytes: int = 2 * 2**30,
        first_pass_rows: int = 20_000,
        warn_bytes: int = 200_000 * 1536 * 4,
        busy_seconds: float = 10.0,
    ) -> Self:
        """Open the file, or create it with its folders; the one call here that touches the disk itself.

        A collection whose vectors take more than `cache_bytes` is read from the file at each search,
        and one of `first_pass_rows` is searched in fewer dimensions first; the results are the same.
        One above `warn_bytes` is warned about in the log, once.
        Raises `StoreError` for a file that is not ours or of a newer version, `StoreUnavailable` when
        it cannot be opened.
        """
        file = StoreFile(Path(path), busy_seconds=busy_seconds)
        return cls(file, cache_bytes=cache_bytes, first_pass_rows=first_pass_rows, warn_bytes=warn_bytes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def ensure_collection(self, collection: Collection) -> None:
        check_collection(collection)
        await self._file.write(lambda db: tables.ensure(db, collection))

    async def describe(self, name: str) -> Collection:
        return (await self._file.read(lambda db: tables.resolve(db, name))).collection

    async def list_collections(self) -> list[Collection]:
        return await self._file.read(tables.collections)

    async def drop_collection(self, name: str) -> bool:
        dropped = await self._file.write(lambda db: tables.drop(db, name))
        if dropped is None:
            return False
        self._matrices.drop(dropped)
        return True

    async def upsert(self, name: str, records: Sequence[Record]) -> dict[str, str]:
        """Write all of the records or, when this raises, none; so no uuid is ever returned as failed.

        Of two records with one uuid the later counts. Raises `StoreError` for what is no uuid, and
        for properties that are not flat.
        """
        await self._file.write(lambda db: tables.upsert(db, name, records))
        return {}

    async def get(self, name: str, uuids: Sequence[str], *, vectors: bool = False) -> dict[str, Record]:
        wanted = canonical_all(uuids)
        return await self._file.read(lambda db: tables.get(db, name, wanted, vectors=vectors))

    async def delete(self, name: str, uuids: Sequence[str]) -> int:
        condition = "uuid IN (SELECT value FROM json_each(?))"
        wanted = tables.as_json(canonical_all(uuids))
        return await self._file.write(lambda db: tables.delete(db, name, condition, [wanted]))

    async def delete_where(self, name: str, where: Filter, *, dry_run: bool = False) -> int:
        condition, values = sql(where)
        if dry_run:
            return await self._file.read(lambda db: tables.count(db, tables.resolve(db, name), condition, values))
        return await self._file.write(lambda db: tables.delete(db, name, condition, values))

    async def count(self, name: str, where: Filter | None = None) -> int:
        condition, values = sql(where) if where is not None else ("1", [])
        return await self._file.read(lambda db: tables.count(db, tables.resolve(db, name), condition, values))

    async def search(
        self,
        name: str,
        vector: Vector,
        limit: int,
        *,
        where: Filter | None = None,
        max_distance: float | None = None,
    ) -> list[Hit]:
        while True:
            try:
                hits = await self._file.read(lambda db: self._search(db, name, vector, limit, where))
            except SnapshotTooOldError:
                continue
            return hits if max_distance is None else [hit for hit in hits if hit.distance <= max_distance]

    async def search_text(self, name: str, query: str, limit: int, *, where: Filter | None = None) -> list[TextHit]:
        """The records that hold any word of the query, best first by BM25, ties by uuid.

        The words of what was written since the last such search are taken in first, so the first of all
        takes longer: some seconds for 100,000 records. Raises `StoreError` when SQLite has no FTS5.
        """
        wanted, among = words(query), sql(where) if where is not None else None
        # An alias may move meanwhile; the search goes on in the collection where it began.
        physical, current = await self._file.read(lambda db: _words_of(db, name))
        if not wanted or limit < 1:
            return []
        while not current:
            current = await self._file.write(lambda db: embedded_text.take_in(db, tables.resolve(db, physical)))
            if not current:
                await asyncio.sleep(PAUSE_SECONDS)
        return await self._file.read(
            lambda db: embedded_text.search(db, tables.resolve(db, physical), wanted, limit, among)
        )

    async def warm(self, name: str) -> None:
        """Load a collection's vectors and prepare its first pass, so that no search has to wait for it."""
        while True:
            try:
                await self._file.read(lambda db: self._warm(db, name))
            except SnapshotTooOldError:
                continue
            return

    async def scan(
        self,
        name: str,
        *,
        after: str | None = None,
        until: str | None = None,
        page: int = 500,
        vectors: bool = False,
    ) -> AsyncIterator[list[Record]]:
        if page < 1:
            raise ValueError(f"a page of {page} records never ends a scan")
        # An alias may move while the scan runs; it goes on in the collection where it began.
        physical = (await self.describe(name)).name
        cursor = "" if after is None else canonical(after)
        last = "g" if until is None else canonical(until)  # behind every hexadecimal digit

        def next_page(db: sqlite3.Connection) -> list[Record]:
            return tables.page(db, physical, (cursor, last), page, vectors=vectors)

        while records := await self._file.read(next_page):
            yield records
            cursor = records[-1].uuid

    async def point_alias(self, alias: str, target: str, *, expect: str | None = None) -> None:
        check_alias(alias)
        await self._file.write(lambda db: tables.point(db, alias, target, expect))

    async def alias_target(self, alias: str) -> str | None:
        return (await self.list_aliases()).get(alias)

    async def list_aliases(self) -> dict[str, str]:
        return await self._file.read(tables.aliases)

    async def delete_alias(self, alias: str) -> bool:
        return await self._file.write(lambda db: tables.delete_alias(db, alias))

    async def catch_up(self, name: str, *, seconds: float = 30.0) -> int:  # noqa: ARG002 - nothing is behind
        """Nothing waits: what is written is found."""
        await self.describe(name)
        return 0

    async def health(self) -> float:
        began = time.perf_counter()
        await self._file.read(tables.collections)
        return time.perf_counter() - began

    async def copy_to(self, target: Path, told: copying.Told) -> dict[str, int]:
        """Copy all of it into a new file while others write; the records in the copy, by collection.

        What was acknowledged before this is called is in the copy, and no half of a batch. `told` is
        called from another thread.
        """

        def work(db: sqlite3.Connection) -> dict[str, int]:
            stored = [tables.resolve(db, known.name) for known in tables.collections(db)]
            counted = {each.name: tables.count(db, each, "1", []) for each in stored}
            copying.copy(db, target, told)
            return counted

        return await self._file.read(work)

    async def aclose(self) -> None:
        await self._file.aclose()

    def _search(self, db: sqlite3.Connection, name: str, vector: Vector, limit: int, where: Filter | None) -> list[Hit]:
        stored = tables.resolve(db, name)
        query = unit(stored.name, stored.dimension, [(None, vector)]).astype(np.float64)[0]
        if limit < 1:
            return []
        query /= np.sqrt(query @ query)
        short = query.astype(np.float32)
        matrix = self._matrices.use(stored.id, lambda: Matrix(stored.dimension))
        view = self._current_view(db, stored, matrix)
        if view is None:
            ids = _nearest_in_file(db, stored, short, limit, where)
        else:
            among = None if where is None else _matching(db, stored, where)
            with self._scans:
                ids, shortened = view.nearest(short, limit, among)
            matrix.note(shortened)
            if view.count >= self._first_pass_rows and matrix.wants_first_pass(FIRST_PASS_AFTER_SEARCHES):
                self._file.later(matrix.learn_first_pass)
        return _hits(db, stored, ids, query)[:limit]

    def _warm(self, db: sqlite3.Connection, name: str) -> None:
        stored = tables.resolve(db, name)
        matrix = self._matrices.use(stored.id, lambda: Matrix(stored.dimension))
        view = self._current_view(db, stored, matrix)
        if view is not None and view.count >= self._first_pass_rows:
            matrix.learn_first_pass()

    def _current_view(self, db: sqlite3.Connection, stored: Stored, matrix: Matrix) -> View | None:
        """The matrix as this transaction sees the collection; None when it is too large to keep."""
        with matrix.lock:
            if matrix.next_id > stored.next_id or matrix.deletions > stored.deletions:
                raise SnapshotTooOldError
            if matrix.deletions < stored.deletions - tables.KEPT_DELETIONS:
                matrix.clear()
            if matrix.next_id < stored.next_id and not self._fits(db, stored):
                self._matrices.drop(stored.id)
                return None
            _take_in(db, stored, matrix)
            if matrix.wasteful:
                matrix.clear()
                _take_in(db, stored, matrix)
            view = matrix.view()
        self._matrices.trim()
        return view

    def _fits(self, db: sqlite3.Connection, stored: Stored) -> bool:
        count = tables.count(db, stored, "1", [])
        size = count * stored.dimension * 4
        if size > self._warn_bytes and stored.id not in self._warned:
            self._warned.add(stored.id)
            logger.warning(
                "Collection %r holds %d vectors of %d numbers: %.1f GB for every process that searches it. "
                "Weaviate serves this size better: `store: {kind: weaviate}` in sekha.yaml.",
                stored.name,
                count,
                stored.dimension,
                size / 1e9,
            )
        return size * 7 // 6 <= self._matrices.limit_bytes


# --- search --------------------------------------------------------------------------------


def _take_in(db: sqlite3.Connection, stored: Stored, matrix: Matrix) -> None:
    if matrix.next_id < stored.next_id:
        rows = db.execute(f"SELECT id, vector FROM {stored.vectors} WHERE id >= ?", (matrix.next_id,))
        for ids, vectors in _stacked(rows):
            matrix.append(ids, vectors)
        matrix.next_id = stored.next_id
    if matrix.deletions < stored.deletions:
        gone = db.execute(
            "SELECT id FROM tombstones WHERE collection = ? AND deletion > ?", (stored.id, matrix.deletions)
        )
        matrix.remove(_ids(gone))
        matrix.deletions = stored.deletions


def _words_of(db: sqlite3.Connection, name: str) -> tuple[str, bool]:
    stored = tables.resolve(db, name)
    return stored.name, embedded_text.is_current(db, stored)


def _matching(db: sqlite3.Connection, stored: Stored, where: Filter) -> Ids:
    condition, values = sql(where)
    return np.sort(_ids(db.execute(f"SELECT id FROM {stored.records} WHERE {condition}", values)))


def _nearest_in_file(db: sqlite3.Connection, stored: Stored, query: Vector, limit: int, where: Filter | None) -> Ids:
    condition, values = sql(where) if where is not None else ("1", [])
    rows = db.execute(
        f"SELECT id, vector FROM {stored.records} JOIN {stored.vectors} USING (id) WHERE {condition}", values
    )
    scored = [(ids, vectors @ query) for ids, vectors in _stacked(rows)]
    if not scored:
        return np.empty(0, dtype=np.int64)
    ids = np.concatenate([ids for ids, _ in scored])
    return ids[best(np.concatenate([scores for _, scores in scored]), limit, 2 * rounding(stored.dimension))]


def _hits(db: sqlite3.Connection, stored: Stored, ids: Ids, query: npt.NDArray[np.float64]) -> list[Hit]:
    """The rows with their exact distances, nearest first.

    Each distance is summed in double precision and row by row, because a matrix product rounds equal
    vectors differently at different positions, and ties would no longer be ties.
    """
    found = db.execute(
        f"SELECT {tables.columns(stored, vectors=True)} "
        "WHERE id IN (SELECT value FROM json_each(?)) AND vector IS NOT NULL",
        (tables.as_json(ids.tolist()),),
    ).fetchall()
    if not found:
        return []
    rows = np.frombuffer(b"".join([row[3] for row in found]), dtype=np.float32).reshape(len(found), -1)
    exact = rows.astype(np.float64)
    cosines = (exact * query).sum(axis=1) / np.sqrt((exact * exact).sum(axis=1))
    distances = np.clip(1 - cosines, 0, 2).tolist()
    ranked = sorted(zip(distances, found, strict=True), key=lambda pair: (pair[0], pair[1][0]))
    return [Hit(row[0], distance, row[1], orjson.loads(row[2])) for distance, row in ranked]


def _stacked(rows: sqlite3.Cursor) -> Iterator[tuple[Ids, Vector]]:
    while chunk := rows.fetchmany(1024):
        ids, vectors = zip(*chunk, strict=True)
        yield (
            np.array(ids, dtype=np.int64),
            np.frombuffer(b"".join(vectors), dtype=np.float32).reshape(len(chunk), -1),
        )


def _ids(rows: sqlite3.Cursor) -> Ids:
    return np.fromiter((row[0] for row in rows), dtype=np.int64)
