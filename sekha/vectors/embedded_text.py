"""Search by words in the embedded store: a full-text index beside a collection's records.

Writing does not wait for it. It is made at the first search, and every search first takes in what was
written since: row ids only grow, so what is new has a higher id than all in the index. A row in it
that is deleted or takes other words is noted by triggers, with the old text, since FTS5 cannot remove
a row without it; and so it stays true whoever writes, an older Sekha too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import orjson

from sekha.vectors.base import Scalar, TextHit
from sekha.vectors.embedded_tables import Stored

__all__ = ["is_current", "search", "take_in"]

ROWS_AT_ONCE: Final = 5000
"""Rows of one transaction: a tenth of a second or two, in which nobody else can write."""
GATHERED_BYTES: Final = 16 * 2**20
"""What FTS5 gathers in memory before it writes; its own 1 MiB takes twice as long."""

# SQLite's tables of characters are older than many emoji, and take those for letters.
_EMOJI: Final = "\ufe0f" + "".join(map(chr, range(0x1F300, 0x1FB00)))
# `words` in `checks.py` parts a query in the same way.
_TOKENIZER: Final = f"unicode61 remove_diacritics 0 categories ''L* N* Mn Mc'' separators ''{_EMOJI}''"


def is_current(db: sqlite3.Connection, stored: Stored) -> bool:
    """Whether the index has the words of all records, as this transaction sees them."""
    if not _exists(db, stored):
        return False
    behind = db.execute(
        f"""
        SELECT EXISTS (SELECT 1 FROM {stored.outdated})
            OR EXISTS (SELECT 1 FROM {stored.records} WHERE id > {_last(stored)})
        """
    ).fetchone()[0]
    return not behind


def take_in(db: sqlite3.Connection, stored: Stored) -> bool:
    """Take in some of what was written since, and say whether that was all."""
    if not _exists(db, stored):
        _create(db, stored)
    words, outdated, records = stored.words, stored.outdated, stored.records
    until = db.execute(
        f"SELECT max(id) FROM (SELECT id FROM {outdated} ORDER BY id LIMIT ?)", (ROWS_AT_ONCE,)
    ).fetchone()
    db.execute(
        f"INSERT INTO {words} ({words}, rowid, text) SELECT 'delete', id, text FROM {outdated} WHERE id <= ?", until
    )
    db.execute(
        f"""
        INSERT INTO {words} (rowid, text)
        SELECT id, text FROM {records} WHERE id IN (SELECT id FROM {outdated} WHERE id <= ?)
        """,
        until,
    )
    db.execute(f"DELETE FROM {outdated} WHERE id <= ?", until)
    db.execute(
        f"""
        INSERT INTO {words} (rowid, text)
        SELECT id, text FROM {records} WHERE id > {_last(stored)} ORDER BY id LIMIT ?
        """,
        (ROWS_AT_ONCE,),
    )
    return is_current(db, stored)


def search(
    db: sqlite3.Connection,
    stored: Stored,
    words: Sequence[str],
    limit: int,
    among: tuple[str, list[Scalar]] | None,
) -> list[TextHit]:
    """The records that hold any of the words; what was written since the index was current is left out."""
    if not _exists(db, stored):  # the collection was made anew a moment ago
        return []
    condition, values = among or ("", [])
    # The plus keeps SQLite from looking up the words for each record that the filter matches.
    filtered = f"AND +{stored.words}.rowid IN (SELECT id FROM {stored.records} WHERE {condition})" if among else ""
    rows = db.execute(
        f"""
        WITH found AS (
            SELECT {stored.words}.rowid AS id, uuid, bm25({stored.words}) AS cost
            FROM {stored.words} CROSS JOIN {stored.records} ON {stored.records}.id = {stored.words}.rowid
            WHERE {stored.words} MATCH ?
                AND +{stored.words}.rowid NOT IN (SELECT id FROM {stored.outdated})
                {filtered}
            ORDER BY cost, uuid LIMIT ?
        )
        SELECT found.uuid, -cost, text, properties FROM found JOIN {stored.records} USING (id)
        ORDER BY cost, found.uuid
        """,
        (" OR ".join(f'"{word}"' for word in words), *values, limit),
    )
    return [TextHit(uuid, score, text, orjson.loads(properties)) for uuid, score, text, properties in rows]


def _exists(db: sqlite3.Connection, stored: Stored) -> bool:
    found = db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", (stored.words,))
    return found.fetchone() is not None


def _create(db: sqlite3.Connection, stored: Stored) -> None:
    db.execute(
        f"""
        CREATE VIRTUAL TABLE {stored.words}
        USING fts5(text, content='{stored.records}', content_rowid='id', tokenize='{_TOKENIZER}')
        """
    )
    db.execute(f"INSERT INTO {stored.words} ({stored.words}, rank) VALUES ('hashsize', ?)", (GATHERED_BYTES,))
    db.execute(f"CREATE TABLE {stored.outdated} (id INTEGER PRIMARY KEY, text TEXT NOT NULL)")
    for name, event in (("removed", "DELETE"), ("reworded", "UPDATE OF text")):
        # What a row said when it was taken in is what counts, so a later change does not replace it.
        db.execute(
            f"""
            CREATE TRIGGER {name}_{stored.id} AFTER {event} ON {stored.records}
            WHEN EXISTS (SELECT 1 FROM {stored.words}_docsize WHERE id = old.id)
            BEGIN INSERT OR IGNORE INTO {stored.outdated} VALUES (old.id, old.text); END
            """
        )


def _last(stored: Stored) -> str:
    """The highest id in the index, as SQL. FTS5 keeps a row of `docsize` for every row that it has."""
    return f"(SELECT ifnull(max(id), 0) FROM {stored.words}_docsize)"
