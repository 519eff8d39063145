"""The embedded store's search by words: its index, which nobody but a search waits for, and its scores."""

from __future__ import annotations

import asyncio
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sekha.errors import StoreError
from sekha.vectors.base import AllOf, Collection, Compare, Record, Scalar, TextHit
from sekha.vectors.checks import words
from sekha.vectors.embedded import EmbeddedStore

ROOT = Path(__file__).parents[3]
DOCS = Collection("Docs", 3, "hash:3")
X, Y, Z = np.eye(3, dtype=np.float32)

OLD_FILE = """
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, dimension INTEGER NOT NULL,
    fingerprint TEXT NOT NULL, next_id INTEGER NOT NULL DEFAULT 1, deletions INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE aliases (
    alias TEXT PRIMARY KEY, collection INTEGER NOT NULL REFERENCES collections(id) ON DELETE CASCADE
) WITHOUT ROWID;
CREATE TABLE tombstones (
    collection INTEGER NOT NULL REFERENCES collections(id) ON DELETE CASCADE, deletion INTEGER NOT NULL,
    id INTEGER NOT NULL, PRIMARY KEY (collection, deletion, id)
) WITHOUT ROWID;
CREATE TABLE records_1 (
    id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, text TEXT NOT NULL, properties TEXT NOT NULL
);
CREATE INDEX source_1 ON records_1 (json_extract(properties, '$.source'));
CREATE TABLE vectors_1 (id INTEGER PRIMARY KEY, vector BLOB NOT NULL);
INSERT INTO collections VALUES (1, 'Docs', 3, 'hash:3', 4, 1);
INSERT INTO aliases VALUES ('Current', 1);
INSERT INTO tombstones VALUES (1, 1, 2);
INSERT INTO records_1 VALUES (1, '00000000-0000-0000-0000-000000000001', 'from before', '{"source":"a.md"}');
INSERT INTO records_1 VALUES (3, '00000000-0000-0000-0000-000000000003', 'before that', '{}');
INSERT INTO vectors_1 VALUES (1, x'0000803f0000000000000000'), (3, x'000000000000803f00000000');
PRAGMA application_id = 0x53454B48;
PRAGMA user_version = 1;
"""

SEARCHER = """
import asyncio, sys
from sekha.vectors.embedded import EmbeddedStore

async def search():
    async with EmbeddedStore.open(sys.argv[1]) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        print(len(await store.search_text("Docs", "alpha", 1_000_000)))

asyncio.run(search())
"""


def uuid(number: int) -> str:
    return str(UUID(int=number))


def record(number: int, text: str, vector: np.ndarray = X, **properties: Scalar) -> Record:
    return Record(uuid(number), text, vector, properties)


def numbers(hits: list[TextHit]) -> list[int]:
    return [UUID(hit.uuid).int for hit in hits]


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite%'")}


def taken_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM words_1_docsize").fetchone()[0])


def check_index(path: Path) -> None:
    """Have FTS5 compare its index with the texts, word by word. They must be caught up."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("INSERT INTO words_1 (words_1, rank) VALUES ('integrity-check', 1)")


# --- the index -----------------------------------------------------------------------------


async def test_a_file_from_before_is_searched_by_words(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store.db")) as old:
        old.executescript(OLD_FILE)

    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        assert numbers(await store.search_text("Current", "from before", 5)) == [1, 3]
        await store.upsert("Docs", [record(1, "now", X), record(4, "from now", Z)])
        assert numbers(await store.search_text("Current", "before from", 5)) == [3, 4]
        assert [hit.uuid for hit in await store.search("Current", Y, 1)] == [uuid(3)]

    check_index(tmp_path / "store.db")


async def test_who_never_searches_by_words_pays_nothing_for_them(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with EmbeddedStore.open(path) as store:
        await store.ensure_collection(DOCS)
        await store.ensure_collection(Collection("Others", 3))
        await store.upsert("Docs", [record(1, "alpha")])
        await store.search("Docs", X, 1)
        before = tables(path)

        await store.search_text("Docs", "alpha", 1)

        assert not any("words" in name or "outdated" in name for name in before)
        assert not any(name.endswith("_2") for name in tables(path) - before)
        assert await store.drop_collection("Docs")
        assert not any("words" in name or "outdated" in name for name in tables(path))


async def test_more_than_one_transaction_takes_in_is_taken_in(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(number, f"alpha w{number}", n=number) for number in range(12_000)])

        assert len(await store.search_text("Docs", "alpha", 20_000)) == 12_000
        await store.delete_where("Docs", Compare("n", "lt", 11_000))
        await store.upsert("Docs", [record(number, "beta alpha", n=number) for number in range(11_500, 12_500)])

        assert numbers(await store.search_text("Docs", "alpha", 20_000, where=AllOf(()))) == [*range(11_000, 12_500)]
        assert numbers(await store.search_text("Docs", "w11000 w11500 w5", 5)) == [11_000]
    check_index(tmp_path / "store.db")


async def test_the_index_follows_whoever_writes_without_knowing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with EmbeddedStore.open(path) as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(number, f"alpha w{number}") for number in range(5)])
        await store.search_text("Docs", "alpha", 5)
        with closing(sqlite3.connect(path)) as older:
            older.execute("UPDATE records_1 SET text = 'beta' WHERE uuid = ?", (uuid(0),))
            older.execute("UPDATE records_1 SET text = 'gamma alpha' WHERE uuid = ?", (uuid(0),))
            older.execute("DELETE FROM records_1 WHERE uuid = ?", (uuid(1),))
            older.commit()

        assert sorted(numbers(await store.search_text("Docs", "alpha", 5))) == [0, 2, 3, 4]
        assert numbers(await store.search_text("Docs", "gamma beta w0 w1", 5)) == [0]
    check_index(path)


async def test_no_hit_is_without_the_words_however_much_is_written_meanwhile(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as here, EmbeddedStore.open(tmp_path / "store.db") as there:
        await here.ensure_collection(DOCS)
        await here.upsert("Docs", [record(number, "alpha") for number in range(100)])

        async def write() -> None:
            for turn in range(60):
                text, vector = ("beta", "alpha")[turn % 2], (X, X, Y, Z)[turn % 4]
                await there.upsert("Docs", [record(number, text, vector) for number in range(100)])
                await there.delete("Docs", [uuid(turn)])
            done.set()

        async def search() -> None:
            while not done.is_set():
                hits = await here.search_text("Docs", "alpha", 1000)
                assert all(hit.text == "alpha" for hit in hits)
                assert len(set(numbers(hits))) == len(hits)

        done = asyncio.Event()
        await asyncio.gather(write(), *(search() for _ in range(3)))

        assert len(await here.search_text("Docs", "alpha", 1000)) == 99
    check_index(tmp_path / "store.db")


async def test_a_sqlite_without_full_text_search_says_so_and_stores_all_the_same(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(DOCS)
        await store.upsert("Docs", [record(1, "alpha")])
        await store.search_text("Docs", "alpha", 1)
    with closing(sqlite3.connect(tmp_path / "store.db")) as db:
        # To this file, it is as if the module were not there.
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'fts5', 'fts_of_nobody') WHERE name = 'words_1'")
        db.commit()

    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        for call in (store.search_text("Docs", "alpha", 1), store.drop_collection("Docs")):
            with pytest.raises(StoreError, match=r"built without FTS5\. Use a Python whose SQLite has it") as caught:
                await call
            assert not caught.value.retryable
        assert await store.upsert("Docs", [record(1, "beta"), record(2, "alpha")]) == {}
        assert await store.delete("Docs", [uuid(1)]) == 1
        assert len(await store.search("Docs", X, 5)) == 1


# --- several processes ---------------------------------------------------------------------

Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that searches by words as soon as it reads a line; all of them are gone after the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(path: Path) -> subprocess.Popen[str]:
        searcher = subprocess.Popen(
            [sys.executable, "-c", SEARCHER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        running.append(searcher)
        assert searcher.stdout is not None
        assert searcher.stdout.readline() == "ready\n"
        return searcher

    yield begin
    for searcher in running:
        searcher.kill()
        searcher.communicate()


@pytest.fixture
async def full(tmp_path: Path) -> Path:
    """A file of 20,000 records, whose words nobody has asked for yet."""
    path = tmp_path / "store.db"
    async with EmbeddedStore.open(path) as store:
        await store.ensure_collection(DOCS)
        filler = " ".join(f"filler{number}" for number in range(30))
        await store.upsert("Docs", [record(number, f"alpha w{number} {filler}") for number in range(20_000)])
    return path


async def test_processes_that_search_first_at_once_find_the_same(start: Start, full: Path) -> None:
    searchers = [start(full) for _ in range(3)]

    for searcher in searchers:
        assert searcher.stdin is not None
        searcher.stdin.write("go\n")
        searcher.stdin.flush()
    answers = [searcher.communicate()[0] for searcher in searchers]

    assert answers == ["20000\n"] * 3
    check_index(full)


async def test_a_search_killed_while_it_takes_in_words_leaves_nothing_wrong(start: Start, full: Path) -> None:
    searcher = start(full)
    assert searcher.stdin is not None
    searcher.stdin.write("go\n")
    searcher.stdin.flush()
    while "words_1_docsize" not in tables(full):
        assert searcher.poll() is None

    searcher.kill()
    searcher.communicate()

    assert taken_in(full) < 20_000
    async with EmbeddedStore.open(full) as store:
        await store.upsert("Docs", [record(3, "beta"), record(20_001, "alpha")])
        assert len(await store.search_text("Docs", "alpha", 30_000)) == 20_000
        assert numbers(await store.search_text("Docs", "w3 w17", 5)) == [17]
    assert taken_in(full) == 20_001
    check_index(full)


# --- scores --------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), max_size=6).map(" ".join)
records = st.builds(
    lambda number, text, at, n: record(number, text, (X, Y, Z)[at], n=n),
    st.integers(0, 12),
    texts,
    st.integers(0, 2),
    st.integers(0, 3),
)


def bm25(texts: dict[str, str], query: set[str]) -> dict[str, float]:
    """The scores by the book (k1 1.2, b 0.75), of those that have any of the words."""
    counted = {uuid: Counter(text.split()) for uuid, text in texts.items()}
    mean = sum(counts.total() for counts in counted.values()) / max(len(counted), 1)
    scores: Counter[str] = Counter()
    for word in query:
        holders = [uuid for uuid, counts in counted.items() if counts[word]]
        rarity = math.log((len(texts) - len(holders) + 0.5) / (len(holders) + 0.5))
        for uuid in holders:
            often, length = counted[uuid][word], counted[uuid].total()
            # A word that half of the texts have still says a little.
            scores[uuid] += max(rarity, 1e-6) * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * length / mean))
    return dict(scores)


class WordsAgainstTheBook(RuleBasedStateMachine):
    """Two processes' stores on one file against BM25 computed from a dict."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store.db"
        self.stores = [EmbeddedStore.open(self.path), EmbeddedStore.open(self.path)]
        self.kept: dict[str, Record] = {}
        self.runner.run(self.stores[0].ensure_collection(DOCS))

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for store in self.stores:
                self.runner.run(store.aclose())
            self.runner.close()
            self.folder.cleanup()

    @rule(which=st.integers(0, 1), batch=st.lists(records, max_size=8))
    def upsert(self, which: int, batch: list[Record]) -> None:
        self.runner.run(self.stores[which].upsert("Docs", batch))
        self.kept |= {each.uuid: each for each in batch}

    @rule(which=st.integers(0, 1), gone=st.lists(st.integers(0, 12).map(uuid), max_size=4))
    def delete(self, which: int, gone: list[str]) -> None:
        self.runner.run(self.stores[which].delete("Docs", gone))
        for each in gone:
            self.kept.pop(each, None)

    @rule(which=st.integers(0, 1), query=texts, limit=st.integers(0, 15), n=st.none() | st.integers(0, 3))
    def search(self, which: int, query: str, limit: int, n: int | None) -> None:
        where = None if n is None else Compare("n", "le", n)
        found = self.runner.run(self.stores[which].search_text("Docs", query, limit, where=where))

        scores = bm25({uuid: kept.text for uuid, kept in self.kept.items()}, set(query.split()))
        among = {uuid for uuid, kept in self.kept.items() if n is None or int(kept.properties["n"] or 0) <= n}
        expected = sorted((score for uuid, score in scores.items() if uuid in among), reverse=True)[:limit]
        assert [hit.score for hit in found] == pytest.approx(expected, rel=1e-9)
        assert [hit.score for hit in found] == pytest.approx([scores[hit.uuid] for hit in found], rel=1e-9)
        assert {hit.uuid for hit in found} <= among
        assert [(-hit.score, hit.uuid) for hit in found] == sorted((-hit.score, hit.uuid) for hit in found)
        assert all(hit.text == self.kept[hit.uuid].text for hit in found)
        if query and limit:
            check_index(self.path)


TestWordsAgainstTheBook = WordsAgainstTheBook.TestCase
TestWordsAgainstTheBook.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


# Python and SQLite are of different years, so they differ on what younger characters are.
settled = st.characters(codec="utf-8").filter(lambda one: unicodedata.ucd_3_2_0.category(one) not in ("Cn", "Co"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(settled), data=st.data())
def test_any_text_is_found_by_any_of_its_words(text: str, data: st.DataObject) -> None:
    async def found(word: str) -> list[int]:
        with tempfile.TemporaryDirectory() as folder:
            async with EmbeddedStore.open(Path(folder) / "store.db") as store:
                await store.ensure_collection(DOCS)
                await store.upsert("Docs", [record(1, text)])
                return numbers(await store.search_text("Docs", word, 5))

    known = words(text)
    if not known:
        assert asyncio.run(found(text)) == []
    else:
        assert asyncio.run(found(data.draw(st.sampled_from(known)))) == [1]
