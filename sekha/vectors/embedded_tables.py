"""The embedded store's tables: collections, aliases and records, each act inside a caller's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import orjson

from sekha.errors import AliasMoved, CollectionConflict, CollectionMissing, StoreError
from sekha.vectors.base import Collection, Record, Scalar
from sekha.vectors.checks import canonical, properties_as_json, unit

__all__ = [
    "Stored",
    "aliases",
    "as_json",
    "collections",
    "columns",
    "count",
    "delete",
    "delete_alias",
    "drop",
    "ensure",
    "get",
    "page",
    "point",
    "resolve",
    "upsert",
]

KEPT_DELETIONS: Final = 1000
"""Transactions whose tombstones are kept; a process further behind loads its matrix anew."""


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
    def words(self) -> str:
        return f"words_{self.id}"

    @property
    def outdated(self) -> str:
        return f"outdated_{self.id}"

    @property
    def collection(self) -> Collection:
        return Collection(self.name, self.dimension, self.fingerprint)


# --- collections and aliases ---------------------------------------------------------------


def resolve(db: sqlite3.Connection, name: str) -> Stored:
    row = db.execute(
        """
        SELECT id, name, dimension, fingerprint, next_id, deletions FROM collections
        WHERE name = ?1 OR id = (SELECT collection FROM aliases WHERE alias = ?1)
        """,
        (name,),
    ).fetchone()
    if row is None:
        raise CollectionMissing(name, [*(known.name for known in collections(db)), *aliases(db)])
    return Stored(*row)


def collections(db: sqlite3.Connection) -> list[Collection]:
    rows = db.execute("SELECT name, dimension, fingerprint FROM collections ORDER BY name")
    return [Collection(*row) for row in rows]


def aliases(db: sqlite3.Connection) -> dict[str, str]:
    return dict(
        db.execute("SELECT alias, name FROM aliases JOIN collections ON id = collection ORDER BY alias").fetchall()
    )


def ensure(db: sqlite3.Connection, wanted: Collection) -> None:
    if wanted.name in aliases(db):
        raise StoreError(f"{wanted.name!r} is an alias. Give the collection another name, or delete the alias.")
    if existing := {known.name: known for known in collections(db)}.get(wanted.name):
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


def drop(db: sqlite3.Connection, name: str) -> int | None:
    row = db.execute("SELECT id FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    (number,) = row
    db.execute(f"DROP TABLE IF EXISTS words_{number}")
    db.execute(f"DROP TABLE IF EXISTS outdated_{number}")
    db.execute(f"DROP TABLE vectors_{number}")
    db.execute(f"DROP TABLE records_{number}")
    db.execute("DELETE FROM collections WHERE id = ?", (number,))
    return int(number)


def point(db: sqlite3.Connection, alias: str, target: str, expect: str | None) -> None:
    if any(known.name == alias for known in collections(db)):
        raise StoreError(f"{alias!r} is a collection, so it cannot be an alias too. Choose another alias.")
    found = aliases(db).get(alias)
    if expect is not None and found != expect:
        raise AliasMoved(alias, expected=expect, found=found)
    db.execute(
        "INSERT INTO aliases VALUES (?, ?) ON CONFLICT (alias) DO UPDATE SET collection = excluded.collection",
        (alias, resolve(db, target).id),
    )


def delete_alias(db: sqlite3.Connection, alias: str) -> bool:
    return bool(db.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount)


# --- records -------------------------------------------------------------------------------


def upsert(db: sqlite3.Connection, name: str, records: Sequence[Record]) -> None:
    stored = resolve(db, name)
    vectors = unit(stored.name, stored.dimension, [(record.uuid, record.vector) for record in records])
    latest = {canonical(record.uuid): (record, row) for record, row in zip(records, vectors, strict=True)}
    present = {
        row[0]: row[1:]
        for row in db.execute(
            f"""
            SELECT uuid, id, text, properties, vector
            FROM {stored.records} LEFT JOIN {stored.vectors} USING (id)
            WHERE uuid IN (SELECT value FROM json_each(?))
            """,
            (as_json(list(latest)),),
        )
    }
    added: list[tuple[int, str, str, str]] = []
    added_vectors: list[tuple[int, bytes]] = []
    changed: list[tuple[str, str, int]] = []
    replaced: list[int] = []
    next_id = stored.next_id
    for uuid, (record, row) in latest.items():
        text, properties, vector = record.text, properties_as_json(uuid, record), row.tobytes()
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


def delete(db: sqlite3.Connection, name: str, condition: str, values: Sequence[Scalar]) -> int:
    stored = resolve(db, name)
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


def get(db: sqlite3.Connection, name: str, uuids: Sequence[str], *, vectors: bool) -> dict[str, Record]:
    stored = resolve(db, name)
    rows = db.execute(
        f"SELECT {columns(stored, vectors=vectors)} WHERE uuid IN (SELECT value FROM json_each(?))", (as_json(uuids),)
    )
    return {row[0]: _record(row) for row in rows}


def page(db: sqlite3.Connection, name: str, span: tuple[str, str], limit: int, *, vectors: bool) -> list[Record]:
    rows = db.execute(
        f"SELECT {columns(resolve(db, name), vectors=vectors)} WHERE uuid > ? AND uuid <= ? ORDER BY uuid LIMIT ?",
        (*span, limit),
    )
    return [_record(row) for row in rows]


def count(db: sqlite3.Connection, stored: Stored, condition: str, values: Sequence[Scalar]) -> int:
    row = db.execute(f"SELECT count(*) FROM {stored.records} WHERE {condition}", values).fetchone()
    return int(row[0])


def columns(stored: Stored, *, vectors: bool) -> str:
    if vectors:
        # A record that lost its vector is still a record: `sekha doctor` has to see it.
        return f"uuid, text, properties, vector FROM {stored.records} LEFT JOIN {stored.vectors} USING (id)"
    return f"uuid, text, properties, NULL FROM {stored.records}"


def _record(row: tuple[str, str, str, bytes | None]) -> Record:
    uuid, text, properties, vector = row
    numbers = None if vector is None else np.frombuffer(vector[: len(vector) // 4 * 4], dtype=np.float32)
    return Record(uuid, text, numbers, orjson.loads(properties))


def as_json(values: Sequence[object]) -> str:
    return orjson.dumps(values).decode()
