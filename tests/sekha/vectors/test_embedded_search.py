"""The embedded store's search against a brute force, however it is carried out."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from sekha.errors import AliasMoved
from sekha.vectors.base import AllOf, AnyOf, Collection, Compare, Filter, Hit, Not, Record, Scalar, Vector
from sekha.vectors.embedded import EmbeddedStore

uuids = st.integers(0, 40).map(lambda number: str(UUID(int=number)))
vectors = st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any)
scalars: st.SearchStrategy[Scalar] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, -1.25]), st.sampled_from(["", "a", "b", "ü"])
)
names = st.sampled_from(["source", "n", "it's"])
properties = st.dictionaries(names, scalars, max_size=3)
records = st.builds(
    lambda uuid, vector, text, values: Record(uuid, text, np.array(vector, dtype=np.float32), values),
    uuids,
    vectors,
    st.text(st.characters(codec="utf-8"), max_size=8),
    properties,
)
compares: st.SearchStrategy[Filter] = st.one_of(
    st.builds(Compare, names, st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), scalars),
    st.builds(Compare, names, st.just("in"), st.lists(scalars, max_size=3).map(tuple)),
)
filters: st.SearchStrategy[Filter] = st.recursive(
    compares,
    lambda inner: st.one_of(
        st.builds(AllOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=5,
)


def matches(where: Filter | None, values: Any) -> bool:
    match where:
        case None:
            return True
        case AllOf(inner):
            return all(matches(each, values) for each in inner)
        case AnyOf(inner):
            return any(matches(each, values) for each in inner)
        case Not(inner):
            return not matches(inner, values)
        case Compare(name, operator, wanted):
            found = values.get(name)
            if operator == "in":
                assert isinstance(wanted, tuple)
                return found in wanted
            if operator in ("eq", "ne"):
                return (found == wanted) == (operator == "eq")
            if found is None or wanted is None or isinstance(found, str) != isinstance(wanted, str):
                return False
            order = {"lt": found < wanted, "le": found <= wanted, "gt": found > wanted, "ge": found >= wanted}
            return bool(order[operator])


def check(hits: list[Hit], stored: dict[str, Record], query: Vector, limit: int, where: Filter | None) -> None:
    """Hold hits against a brute force; ties may stand either way only where rounding decides."""
    direction = query / np.linalg.norm(query.astype(np.float64))
    distances = {}
    for uuid, record in stored.items():
        if matches(where, record.properties):
            assert record.vector is not None
            vector = record.vector.astype(np.float64)
            distances[uuid] = 1 - float(vector @ direction / np.linalg.norm(vector))
    nearest = sorted(distances.values())[:limit]
    assert [hit.distance for hit in hits] == pytest.approx(nearest, abs=1e-6)
    assert [distances[hit.uuid] for hit in hits] == pytest.approx(nearest, abs=1e-6)
    assert len({hit.uuid for hit in hits}) == len(hits)
    assert [(hit.distance, hit.uuid) for hit in hits] == sorted((hit.distance, hit.uuid) for hit in hits)


class StoreAgainstDictionary(RuleBasedStateMachine):
    """Two processes' stores on one file, one with and one without room for a matrix, against a dict."""

    aliases: Bundle[str] = Bundle("aliases")

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "store.db"
        self.stores = [EmbeddedStore.open(path), EmbeddedStore.open(path, cache_bytes=0)]
        self.names = ["One", "Two"]
        self.kept: dict[str, dict[str, Record]] = {name: {} for name in self.names}
        self.targets: dict[str, str] = {}
        for name in self.names:
            self.runner.run(self.stores[0].ensure_collection(Collection(name, 3)))

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for store in self.stores:
                self.runner.run(store.aclose())
            self.runner.close()
            self.folder.cleanup()

    @rule(which=st.integers(0, 1), name=st.integers(0, 1), batch=st.lists(records, max_size=15))
    def upsert(self, which: int, name: int, batch: list[Record]) -> None:
        assert self.runner.run(self.stores[which].upsert(self.names[name], batch)) == {}
        self.kept[self.names[name]] |= {record.uuid: record for record in batch}

    @rule(which=st.integers(0, 1), name=st.integers(0, 1), gone=st.lists(uuids, max_size=10))
    def delete(self, which: int, name: int, gone: list[str]) -> None:
        kept = self.kept[self.names[name]]
        deleted = self.runner.run(self.stores[which].delete(self.names[name], gone))
        assert deleted == sum(kept.pop(uuid, None) is not None for uuid in set(gone))

    @rule(which=st.integers(0, 1), name=st.integers(0, 1), where=filters)
    def delete_where(self, which: int, name: int, where: Filter) -> None:
        kept = self.kept[self.names[name]]
        gone = [uuid for uuid, record in kept.items() if matches(where, record.properties)]
        assert self.runner.run(self.stores[which].delete_where(self.names[name], where, dry_run=True)) == len(gone)
        assert self.runner.run(self.stores[which].delete_where(self.names[name], where)) == len(gone)
        for uuid in gone:
            del kept[uuid]

    @rule(which=st.integers(0, 1), name=st.integers(0, 1))
    def make_anew(self, which: int, name: int) -> None:
        assert self.runner.run(self.stores[which].drop_collection(self.names[name]))
        self.runner.run(self.stores[which].ensure_collection(Collection(self.names[name], 3)))
        self.kept[self.names[name]] = {}
        self.targets = {alias: target for alias, target in self.targets.items() if target != self.names[name]}

    @rule(
        which=st.integers(0, 1),
        alias=st.sampled_from(["Current", "Next"]),
        name=st.integers(0, 1),
        expect=st.sampled_from([None, "One", "Two"]),
    )
    def point_alias(self, which: int, alias: str, name: int, expect: str | None) -> None:
        moving = self.stores[which].point_alias(alias, self.names[name], expect=expect)
        if expect is not None and self.targets.get(alias) != expect:
            with pytest.raises(AliasMoved):
                self.runner.run(moving)
        else:
            self.runner.run(moving)
            self.targets[alias] = self.names[name]

    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(["One", "Two", "Current", "Next"]),
        query=vectors,
        limit=st.integers(1, 50),
        where=st.none() | filters,
    )
    def search(self, which: int, name: str, query: list[int], limit: int, where: Filter | None) -> None:
        physical = name if name in self.names else self.targets.get(name)
        if physical is None:
            return
        vector = np.array(query, dtype=np.float32)
        hits = self.runner.run(self.stores[which].search(name, vector, limit, where=where))
        check(hits, self.kept[physical], vector, limit, where)

    @rule(which=st.integers(0, 1), after=uuids, until=uuids, page=st.integers(1, 9))
    def scan(self, which: int, after: str, until: str, page: int) -> None:
        async def scanned() -> list[Record]:
            pages = self.stores[which].scan("One", after=after, until=until, page=page)
            return [record async for found in pages for record in found]

        kept = self.kept["One"]
        assert self.runner.run(scanned()) == [kept[uuid] for uuid in sorted(kept) if after < uuid <= until]

    @invariant()
    def both_stores_hold_the_same(self) -> None:
        for store in self.stores if hasattr(self, "stores") else []:
            assert self.runner.run(store.list_aliases()) == self.targets
            for name, kept in self.kept.items():
                assert self.runner.run(store.get(name, list(kept))) == kept
                assert self.runner.run(store.count(name)) == len(kept)


StoreAgainstDictionary.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStoreAgainstDictionary = StoreAgainstDictionary.TestCase


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def latent(rows: int, seed: int, noise: float) -> Vector:
    """Vectors of 48 dimensions that lie near a plane of four, nearer for less noise."""
    random = np.random.default_rng(seed)
    plane = np.random.default_rng(7).standard_normal((4, 48))
    made = random.standard_normal((rows, 4)) @ plane + noise * random.standard_normal((rows, 48))
    return made.astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    limit=st.sampled_from([1, 10, 40]),
    where=st.sampled_from([None, Compare("source", "eq", "s1"), Compare("source", "ne", "s1"), Compare("n", "lt", 7)]),
)
def test_searching_in_fewer_dimensions_first_finds_the_same(
    seed: int, noise: float, limit: int, where: Filter | None
) -> None:
    rows = latent(2600, seed, noise)
    stored = {
        str(UUID(int=n)): Record(str(UUID(int=n)), "text", rows[n], {"source": f"s{n % 3}", "n": n})
        for n in range(len(rows))
    }
    queries = [*latent(4, seed + 1, noise), rows[3], -rows[4]]

    async def search() -> None:
        with tempfile.TemporaryDirectory() as name:
            async with EmbeddedStore.open(Path(name) / "store.db", first_pass_rows=1) as store:
                await store.ensure_collection(Collection("Docs", 48))
                everything = list(stored.values())
                await store.upsert("Docs", everything[:2000])
                await store.warm("Docs")
                await store.upsert("Docs", everything[2000:])
                gone = list(stored)[10:60]
                await store.delete("Docs", gone)
                for uuid in gone:
                    del stored[uuid]
                for query in queries:
                    check(await store.search("Docs", query, limit, where=where), stored, query, limit, where)

    asyncio.run(search())


async def test_a_collection_searched_often_gets_its_first_pass_and_keeps_its_answers(tmp_path: Path) -> None:
    rows = latent(3000, 1, 0.1)
    stored = {str(UUID(int=n)): Record(str(UUID(int=n)), "text", row) for n, row in enumerate(rows)}
    async with EmbeddedStore.open(tmp_path / "store.db", first_pass_rows=1000) as store:
        await store.ensure_collection(Collection("Docs", 48))
        await store.upsert("Docs", list(stored.values()))

        for query in latent(100, 2, 0.1):
            check(await store.search("Docs", query, 5), stored, query, 5, None)


@pytest.mark.parametrize("cache_bytes", [0, 3000, 2**30])
async def test_results_do_not_depend_on_the_room_for_matrices(tmp_path: Path, cache_bytes: int) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db", cache_bytes=cache_bytes) as store:
        kept = {}
        for name, seed in (("One", 1), ("Two", 2), ("Three", 3)):
            rows = latent(10 * seed, seed, 0.5)
            kept[name] = {str(UUID(int=n)): Record(str(UUID(int=n)), "text", row) for n, row in enumerate(rows)}
            await store.ensure_collection(Collection(name, 48))
            await store.upsert(name, list(kept[name].values()))

        for query in latent(5, 9, 0.5):
            for name, stored in kept.items():
                check(await store.search(name, query, 7), stored, query, 7, None)


async def test_equal_vectors_tie_exactly_wherever_they_are_stored(tmp_path: Path) -> None:
    row = latent(1, 1, 1.0)[0]
    stored = [Record(str(UUID(int=n)), "text", row) for n in range(999, -1, -1)]
    async with EmbeddedStore.open(tmp_path / "store.db") as store:
        await store.ensure_collection(Collection("Docs", 48))
        await store.upsert("Docs", stored)

        hits = await store.search("Docs", latent(1, 2, 1.0)[0], 10)

    assert [hit.uuid for hit in hits] == [str(UUID(int=n)) for n in range(10)]
    assert len({hit.distance for hit in hits}) == 1


async def test_a_record_whose_vector_somebody_deleted_meanwhile_is_not_found(tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "v.db") as store:
        await store.ensure_collection(Collection("Docs_3", 3, "x"))
        axes = np.eye(3, dtype=np.float32)
        await store.upsert("Docs_3", [Record(str(UUID(int=n)), f"text {n}", axes[n], {}) for n in range(3)])
        before = await store.search("Docs_3", axes[0], 3)
        with closing(sqlite3.connect(tmp_path / "v.db")) as db:
            db.execute("DELETE FROM vectors_1 WHERE id = 1")
            db.commit()

        after = await store.search("Docs_3", axes[0], 3)

    assert [hit.text for hit in before] == ["text 0", "text 1", "text 2"]
    assert [hit.text for hit in after] == ["text 1", "text 2"]
