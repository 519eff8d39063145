"""The store that needs no server: SQLite for what must last, NumPy for what must be quick.

Search is exact. Every process that searches keeps the vectors it searched as a float32 matrix, and
before each search takes in what any process wrote since. Two rules make that cheap: row ids only
grow, and a vector that changes takes a new one, so "what is new" is "what has a higher id"; a
deletion leaves a tombstone.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

import numpy as np
import numpy.typing as npt
import orjson

from sekha.errors import AliasMoved, CollectionConflict, CollectionMissing, StoreError, VectorRefused
from sekha.vectors.base import Collection, Filter, Hit, Record, Scalar, Vector
from sekha.vectors.embedded_file import StoreFile
from sekha.vectors.embedded_filter import check_scalar, sql
from sekha.vectors.embedded_matrix import NORM_TOLERANCE, Ids, Matrices, Matrix, View, best, rounding

__all__ = ["EmbeddedStore"]

logger = logging.getLogger(__name__)

KEPT_DELETIONS: Final = 1000
"""Transactions whose tombstones are kept; a process further behind loads its matrix anew."""
LARGE_BYTES: Final = 200_000 * 1536 * 4
FIRST_PASS_AFTER_SEARCHES: Final = 32
"""Making a first pass takes about as long as this many exact searches."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A collection's row, as one transaction sees it."""

    id: int
    name: str
    dimension: int
    fingerprint: str
    next_id: int
    deletions: int

    @property
    def records(self) -> str:
        return f"records_{self.id}"

    @property
    def vectors(self) -> str:
        return f"vectors_{self.id}"

    @property
    def collection(self) -> Collection:
        return Collection(self.name, self.dimension, self.fingerprint)


class SnapshotTooOldError(Exception):
    """Another search has taken in what was written after our snapshot: begin with a new one."""


class EmbeddedStore:
    """A `VectorStore` in one file, for any number of processes of one machine.

    `async with EmbeddedStore.open(".sekha/vectors.db") as store: …`

    Vectors are kept at unit length, so `get` returns the direction that was written, and the very
    numbers when they had unit length already. Acknowledged writes survive `kill -9`; a power cut may
    take the last of them, in whole batches.
    """

    def __init__(self, file: StoreFile, *, cache_bytes: int, first_pass_rows: int) -> None:
        self._file = file
        self._matrices = Matrices(cache_bytes)
        self._first_pass_rows = first_pass_rows
        self._warned: set[int] = set()

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        *,
        cache_bytes: int = 2 * 2**30,
        first_pass_rows: int = 20_000,
        busy_seconds: float = 10.0,
    ) -> Self:
        """Open the file, or create it with its folders.

        A collection whose vectors take more than `cache_bytes` is read from the file at each search,
        and one of `first_pass_rows` is searched in fewer dimensions first; the results are the same.
        Raises `StoreError` for a file that is not ours or of a newer version, `StoreUnavailable` when
        it cannot be opened.
        """
        return cls(
            StoreFile(Path(path), busy_seconds=busy_seconds), cache_bytes=cache_bytes, first_pass_rows=first_pass_rows
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def ensure_collection(self, collection: Collection) -> None:
        if not re.fullmatch(r"[A-Z][_0-9A-Za-z]{0,254}", collection.name):
            raise StoreError(
                f"{collection.name!r} cannot name a collection. Begin with a capital letter, and go on with "
                "letters, digits and underscores."
            )
        if collection.dimension < 1:
            raise StoreError(f"Collection {collection.name!r} needs a dimension of 1 or more.")
        await self._file.write(lambda db: _ensure(db, collection))

    async def describe(self, name: str) -> Collection:
        return (await self._file.read(lambda db: _resolve(db, name))).collection

    async def list_collections(self) -> list[Collection]:
        return await self._file.read(_collections)

    async def drop_collection(self, name: str) -> bool:
        dropped = await self._file.write(lambda db: _drop(db, name))
        if dropped is None:
            return False
        self._matrices.drop(dropped)
        return True

    async def upsert(self, name: str, records: Sequence[Record]) -> dict[str, str]:
        """Write all of the records or, when this raises, none; so no uuid is ever returned as failed.

        Of two records with one uuid the later counts. Raises `StoreError` for what is no uuid, and
        for properties that are not flat.
        """
        await self._file.write(lambda db: _upsert(db, name, records))
        return {}

    async def get(self, name: str, uuids: Sequence[str], *, vectors: bool = False) -> dict[str, Record]:
        wanted = _canonical_all(uuids)
        return {record.uuid: record for record in await self._file.read(lambda db: _get(db, name, wanted, vectors))}

    async def delete(self, name: str, uuids: Sequence[str]) -> int:
        condition = "uuid IN (SELECT value FROM json_each(?))"
        wanted = _json(_canonical_all(uuids))
        return await self._file.write(lambda db: _delete(db, name, condition, [wanted]))

    async def delete_where(self, name: str, where: Filter, *, dry_run: bool = False) -> int:
        condition, values = sql(where)
        if dry_run:
            return await self._file.read(lambda db: _count(db, name, condition, values))
        return await self._file.write(lambda db: _delete(db, name, condition, values))

    async def count(self, name: str, where: Filter | None = None) -> int:
        condition, values = sql(where) if where is not None else ("1", [])
        return await self._file.read(lambda db: _count(db, name, condition, values))

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
        cursor = "" if after is None else _canonical(after)
        last = "g" if until is None else _canonical(until)  # behind every hexadecimal digit

        def next_page(db: sqlite3.Connection) -> list[Record]:
            return _page(db, physical, (cursor, last), page, vectors=vectors)

        while records := await self._file.read(next_page):
            yield records
            cursor = records[-1].uuid

    async def point_alias(self, alias: str, target: str, *, expect: str | None = None) -> None:
        if not re.fullmatch(r"[A-Za-z][_0-9A-Za-z]{0,254}", alias):
            raise StoreError(
                f"{alias!r} cannot name an alias. Begin with a letter, and go on with letters, digits and underscores."
            )
        await self._file.write(lambda db: _point(db, alias, target, expect))

    async def alias_target(self, alias: str) -> str | None:
        return (await self.list_aliases()).get(alias)

    async def list_aliases(self) -> dict[str, str]:
        return await self._file.read(_aliases)

    async def delete_alias(self, alias: str) -> bool:
        return await self._file.write(lambda db: _delete_alias(db, alias))

    async def health(self) -> float:
        began = time.perf_counter()
        await self._file.read(_collections)
        return time.perf_counter() - began

    async def aclose(self) -> None:
        await self._file.aclose()

    def _search(self, db: sqlite3.Connection, name: str, vector: Vector, limit: int, where: Filter | None) -> list[Hit]:
        stored = _resolve(db, name)
        query = _unit(stored, [(None, vector)]).astype(np.float64)[0]
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
            ids, shortened = view.nearest(short, limit, among)
            matrix.note(shortened)
            if view.count >= self._first_pass_rows and matrix.wants_first_pass(FIRST_PASS_AFTER_SEARCHES):
                self._file.later(matrix.learn_first_pass)
        return _hits(db, stored, ids, query)[:limit]

    def _warm(self, db: sqlite3.Connection, name: str) -> None:
        stored = _resolve(db, name)
        matrix = self._matrices.use(stored.id, lambda: Matrix(stored.dimension))
        view = self._current_view(db, stored, matrix)
        if view is not None and view.count >= self._first_pass_rows:
            matrix.learn_first_pass()

    def _current_view(self, db: sqlite3.Connection, stored: Stored, matrix: Matrix) -> View | None:
        """The matrix as this transaction sees the collection; None when it is too large to keep."""
        with matrix.lock:
            if matrix.next_id > stored.next_id or matrix.deletions > stored.deletions:
                raise SnapshotTooOldError
            if matrix.deletions < stored.deletions - KEPT_DELETIONS:
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
        (count,) = db.execute(f"SELECT count(*) FROM {stored.records}").fetchone()
        size = count * stored.dimension * 4
        if size > LARGE_BYTES and stored.id not in self._warned:
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


# --- collections and aliases ---------------------------------------------------------------


def _resolve(db: sqlite3.Connection, name: str) -> Stored:
    row = db.execute(
        """
        SELECT id, name, dimension, fingerprint, next_id, deletions FROM collections
        WHERE name = ?1 OR id = (SELECT collection FROM aliases WHERE alias = ?1)
        """,
        (name,),
    ).fetchone()
    if row is None:
        raise CollectionMissing(name, [*(known.name for known in _collections(db)), *_aliases(db)])
    return Stored(*row)


def _collections(db: sqlite3.Connection) -> list[Collection]:
    rows = db.execute("SELECT name, dimension, fingerprint FROM collections ORDER BY name")
    return [Collection(*row) for row in rows]


def _aliases(db: sqlite3.Connection) -> dict[str, str]:
    return dict(
        db.execute("SELECT alias, name FROM aliases JOIN collections ON id = collection ORDER BY alias").fetchall()
    )


def _ensure(db: sqlite3.Connection, wanted: Collection) -> None:
    if wanted.name in _aliases(db):
        raise StoreError(f"{wanted.name!r} is an alias. Give the collection another name, or delete the alias.")
    if existing := {known.name: known for known in _collections(db)}.get(wanted.name):
        for field in ("dimension", "fingerprint"):
            exists, asked = getattr(existing, field), getattr(wanted, field)
            if exists != asked:
                raise CollectionConflict(wanted.name, field=field, exists=exists, wanted=asked)
        return
    number = db.execute(
        "INSERT INTO collections (name, dimension, fingerprint) VALUES (?, ?, ?)",
        (wanted.name, wanted.dimension, wanted.fingerprint),
    ).lastrowid
    # Vectors have a table of their own, so that what reads only text or properties stays small.
    db.execute(
        f"""
        CREATE TABLE records_{number} (
            id INTEGER PRIMARY KEY,
            uuid TEXT NOT NULL UNIQUE,
            text TEXT NOT NULL,
            properties TEXT NOT NULL
        )
        """
    )
    db.execute(f"CREATE INDEX source_{number} ON records_{number} (json_extract(properties, '$.source'))")
    db.execute(f"CREATE TABLE vectors_{number} (id INTEGER PRIMARY KEY, vector BLOB NOT NULL)")


def _drop(db: sqlite3.Connection, name: str) -> int | None:
    row = db.execute("SELECT id FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    (number,) = row
    db.execute(f"DROP TABLE vectors_{number}")
    db.execute(f"DROP TABLE records_{number}")
    db.execute("DELETE FROM collections WHERE id = ?", (number,))
    return int(number)


def _point(db: sqlite3.Connection, alias: str, target: str, expect: str | None) -> None:
    if any(known.name == alias for known in _collections(db)):
        raise StoreError(f"{alias!r} is a collection, so it cannot be an alias too. Choose another alias.")
    found = _aliases(db).get(alias)
    if expect is not None and found != expect:
        raise AliasMoved(alias, expected=expect, found=found)
    db.execute(
        "INSERT INTO aliases VALUES (?, ?) ON CONFLICT (alias) DO UPDATE SET collection = excluded.collection",
        (alias, _resolve(db, target).id),
    )


def _delete_alias(db: sqlite3.Connection, alias: str) -> bool:
    return bool(db.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount)


# --- records -------------------------------------------------------------------------------


def _upsert(db: sqlite3.Connection, name: str, records: Sequence[Record]) -> None:
    stored = _resolve(db, name)
    latest = {_canonical(record.uuid): record for record in records}
    vectors = _unit(stored, [(uuid, record.vector) for uuid, record in latest.items()])
    present = {
        row[0]: row[1:]
        for row in db.execute(
            f"""
            SELECT uuid, id, text, properties, vector
            FROM {stored.records} JOIN {stored.vectors} USING (id)
            WHERE uuid IN (SELECT value FROM json_each(?))
            """,
            (_json(list(latest)),),
        )
    }
    added: list[tuple[int, str, str, str]] = []
    added_vectors: list[tuple[int, bytes]] = []
    changed: list[tuple[str, str, int]] = []
    replaced: list[int] = []
    next_id = stored.next_id
    for (uuid, record), row in zip(latest.items(), vectors, strict=True):
        text, properties, vector = _text(uuid, record.text), _properties(uuid, record), row.tobytes()
        old = present.get(uuid)
        if old is not None and old[3] == vector:
            if old[1:3] != (text, properties):
                changed.append((text, properties, old[0]))
            continue
        if old is not None:
            replaced.append(old[0])
        added.append((next_id, uuid, text, properties))
        added_vectors.append((next_id, vector))
        next_id += 1
    db.executemany(f"UPDATE {stored.records} SET text = ?, properties = ? WHERE id = ?", changed)
    _bury(db, stored, replaced)
    db.executemany(f"INSERT INTO {stored.records} VALUES (?, ?, ?, ?)", added)
    db.executemany(f"INSERT INTO {stored.vectors} VALUES (?, ?)", added_vectors)
    if added:
        db.execute("UPDATE collections SET next_id = ? WHERE id = ?", (next_id, stored.id))


def _delete(db: sqlite3.Connection, name: str, condition: str, values: Sequence[Scalar]) -> int:
    stored = _resolve(db, name)
    ids = [row[0] for row in db.execute(f"SELECT id FROM {stored.records} WHERE {condition}", values)]
    _bury(db, stored, ids)
    return len(ids)


def _bury(db: sqlite3.Connection, stored: Stored, ids: Sequence[int]) -> None:
    """Delete rows, and leave word of it for the matrices of other processes."""
    if not ids:
        return
    deletion = stored.deletions + 1
    one_each = [(gone,) for gone in ids]
    db.executemany(f"DELETE FROM {stored.records} WHERE id = ?", one_each)
    db.executemany(f"DELETE FROM {stored.vectors} WHERE id = ?", one_each)
    db.executemany("INSERT INTO tombstones VALUES (?, ?, ?)", ((stored.id, deletion, gone) for gone in ids))
    db.execute("DELETE FROM tombstones WHERE collection = ? AND deletion <= ?", (stored.id, deletion - KEPT_DELETIONS))
    db.execute("UPDATE collections SET deletions = ? WHERE id = ?", (deletion, stored.id))


def _get(db: sqlite3.Connection, name: str, uuids: Sequence[str], vectors: bool) -> list[Record]:
    stored = _resolve(db, name)
    rows = db.execute(
        f"SELECT {_columns(stored, vectors)} WHERE uuid IN (SELECT value FROM json_each(?))", (_json(uuids),)
    )
    return [_record(row) for row in rows]


def _page(db: sqlite3.Connection, name: str, span: tuple[str, str], limit: int, *, vectors: bool) -> list[Record]:
    rows = db.execute(
        f"SELECT {_columns(_resolve(db, name), vectors)} WHERE uuid > ? AND uuid <= ? ORDER BY uuid LIMIT ?",
        (*span, limit),
    )
    return [_record(row) for row in rows]


def _count(db: sqlite3.Connection, name: str, condition: str, values: Sequence[Scalar]) -> int:
    row = db.execute(f"SELECT count(*) FROM {_resolve(db, name).records} WHERE {condition}", values).fetchone()
    return int(row[0])


def _columns(stored: Stored, vectors: bool) -> str:
    if vectors:
        return f"uuid, text, properties, vector FROM {stored.records} JOIN {stored.vectors} USING (id)"
    return f"uuid, text, properties, NULL FROM {stored.records}"


def _record(row: tuple[str, str, str, bytes | None]) -> Record:
    uuid, text, properties, vector = row
    numbers = None if vector is None else np.frombuffer(vector, dtype=np.float32)
    return Record(uuid, text, numbers, orjson.loads(properties))


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
        f"SELECT {_columns(stored, vectors=True)} WHERE id IN (SELECT value FROM json_each(?))",
        (_json(ids.tolist()),),
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


# --- what may be written -------------------------------------------------------------------


def _unit(stored: Stored, vectors: Sequence[tuple[str | None, Vector | None]]) -> Vector:
    """The vectors at unit length, or `VectorRefused` for the first that has no direction."""
    for uuid, vector in vectors:
        if vector is None:
            raise VectorRefused(stored.name, uuid, "it is missing")
        if np.shape(vector) != (stored.dimension,):
            shape = " × ".join(map(str, np.shape(vector)))
            raise VectorRefused(stored.name, uuid, f"it has {shape} numbers, not {stored.dimension}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        rows = np.array([vector for _, vector in vectors], dtype=np.float32).reshape(-1, stored.dimension)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    for index in np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[:1].tolist():
        why = "it is zero" if norms[index] == 0 else "it holds NaN or infinite numbers"
        raise VectorRefused(stored.name, vectors[index][0], why)
    # Unit vectors keep their bits, so that what was read can be written back and changes nothing.
    longer = np.abs(norms - 1) > NORM_TOLERANCE
    rows[longer] = rows[longer] / norms[longer, np.newaxis]
    return rows


def _canonical(uuid: str) -> str:
    try:
        return str(UUID(uuid))
    except (ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{uuid!r} is no uuid. Write it as '9f1c…-…', 32 hexadecimal digits.") from error


def _canonical_all(uuids: Iterable[str]) -> list[str]:
    return [_canonical(uuid) for uuid in uuids]


def _text(uuid: str, text: str) -> str:
    if why := check_scalar(text):
        raise StoreError(f"The text of {uuid!r} cannot be stored: {why}.")
    return text


def _properties(uuid: str, record: Record) -> str:
    for name, value in record.properties.items():
        if why := check_scalar(name) or check_scalar(value):
            raise StoreError(f"Property {name!r} of {uuid!r} cannot be stored: {why}.")
    return orjson.dumps(dict(record.properties), option=orjson.OPT_SORT_KEYS).decode()


def _json(values: Any) -> str:
    return orjson.dumps(values).decode()
