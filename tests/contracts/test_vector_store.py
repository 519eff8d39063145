"""What every vector store must do. A backend joins by one more entry in `BACKENDS`."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sekha.errors import AliasMoved, CollectionConflict, CollectionMissing, StoreError, VectorRefused
from sekha.vectors.base import AllOf, AnyOf, Collection, Compare, Filter, Not, Record, Scalar, VectorStore
from sekha.vectors.embedded import EmbeddedStore
from tests.fixtures.weaviate import empty_store

BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[VectorStore]]] = {
    "embedded": lambda request: EmbeddedStore.open(request.getfixturevalue("tmp_path") / "store.db"),
    "weaviate": lambda request: empty_store(request.getfixturevalue("weaviate_server")),
}
TOLERANCE = 1e-3  # a backend may compare vectors in fewer bits
DOCS = Collection("Docs_4", 4, "hash:4")


@pytest.fixture(params=sorted(BACKENDS))
async def store(request: pytest.FixtureRequest) -> AsyncIterator[VectorStore]:
    async with BACKENDS[request.param](request) as opened:
        await opened.ensure_collection(DOCS)
        yield opened


def uuid(number: int) -> str:
    return str(UUID(int=number << 96 | number))


def record(number: int, vector: list[float] | None = None, text: str = "", **properties: Scalar) -> Record:
    numbers = np.array(vector or [1, number, 0, 0], dtype=np.float32)
    return Record(uuid(number), text or f"text {number}", numbers, properties)


async def worded(store: VectorStore, query: str, limit: int = 100, where: Filter | None = None) -> list[int]:
    """The numbers of the records that a search by words finds, in its order."""
    return [UUID(hit.uuid).int >> 96 for hit in await store.search_text("Docs_4", query, limit, where=where)]


async def scanned(store: VectorStore, name: str, **options: object) -> list[str]:
    return [found.uuid async for page in store.scan(name, **options) for found in page]  # type: ignore[arg-type]


# --- collections ---------------------------------------------------------------------------


async def test_a_collection_is_described_as_it_was_made(store: VectorStore) -> None:
    described = await store.describe("Docs_4")

    assert described == DOCS


async def test_collections_are_listed_by_name(store: VectorStore) -> None:
    await store.ensure_collection(Collection("Chats_2", 2))

    assert [collection.name for collection in await store.list_collections()] == ["Chats_2", "Docs_4"]


async def test_ensuring_a_collection_again_keeps_what_is_in_it(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1)])

    await store.ensure_collection(DOCS)

    assert await store.count("Docs_4") == 1


@pytest.mark.parametrize(
    ("other", "field"),
    [(Collection("Docs_4", 5, "hash:4"), "dimension"), (Collection("Docs_4", 4, "other:4"), "fingerprint")],
)
async def test_a_collection_of_other_properties_is_a_conflict(
    store: VectorStore, other: Collection, field: str
) -> None:
    with pytest.raises(CollectionConflict) as caught:
        await store.ensure_collection(other)

    assert caught.value.field == field


@pytest.mark.parametrize("name", ["docs_4", "", "Docs-4", "4Docs", 'Docs"; DROP TABLE collections; --', "D" * 256])
async def test_a_name_that_not_every_store_takes_is_refused(store: VectorStore, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name a collection"):
        await store.ensure_collection(Collection(name, 4))


async def test_an_unknown_collection_is_named_with_the_nearest_known(store: VectorStore) -> None:
    with pytest.raises(CollectionMissing, match="Did you mean 'Docs_4'") as caught:
        await store.describe("Docs_5")

    assert pickle.loads(pickle.dumps(caught.value)).name == "Docs_5"


async def test_every_call_on_an_unknown_collection_says_so(store: VectorStore) -> None:
    vector = np.ones(4, dtype=np.float32)

    for call in (
        store.describe("Nothing"),
        store.upsert("Nothing", [record(1)]),
        store.get("Nothing", [uuid(1)]),
        store.delete("Nothing", [uuid(1)]),
        store.delete_where("Nothing", Compare("n", "eq", 1)),
        store.count("Nothing"),
        store.search("Nothing", vector, 1),
        store.search_text("Nothing", "words", 1),
        store.search_text("Nothing", "", 1),
        scanned(store, "Nothing"),
        store.point_alias("Current", "Nothing"),
    ):
        with pytest.raises(CollectionMissing):
            await call


async def test_a_dropped_collection_takes_its_aliases_along(store: VectorStore) -> None:
    await store.point_alias("Current", "Docs_4")

    assert await store.drop_collection("Docs_4") is True

    assert await store.list_aliases() == {}
    assert await store.list_collections() == []
    assert await store.drop_collection("Docs_4") is False


async def test_an_alias_cannot_drop_a_collection(store: VectorStore) -> None:
    await store.point_alias("Current", "Docs_4")

    assert await store.drop_collection("Current") is False

    assert await store.describe("Current") == DOCS


async def test_a_collection_made_anew_is_empty(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1)])
    await store.search("Docs_4", np.ones(4, dtype=np.float32), 1)
    await store.search_text("Docs_4", "text", 1)
    await store.drop_collection("Docs_4")

    await store.ensure_collection(DOCS)

    assert await store.search("Docs_4", np.ones(4, dtype=np.float32), 1) == []
    assert await store.search_text("Docs_4", "text", 1) == []
    assert await store.count("Docs_4") == 0


# --- writing and reading -------------------------------------------------------------------


async def test_what_was_written_is_read(store: VectorStore) -> None:
    written = record(1, text="Größe 😀", source="a.md", n=3, share=0.5, draft=True)

    assert await store.upsert("Docs_4", [written]) == {}

    assert await store.get("Docs_4", [uuid(1)]) == {uuid(1): written}


async def test_vectors_are_read_only_when_asked_for(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1)])

    read = await store.get("Docs_4", [uuid(1)])

    assert read[uuid(1)].vector is None


async def test_a_vector_is_read_with_the_direction_it_was_written_with(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, [3, 4, 0, 0])])

    vector = (await store.get("Docs_4", [uuid(1)], vectors=True))[uuid(1)].vector

    assert vector is not None
    assert vector.dtype == np.float32
    assert vector / np.linalg.norm(vector) == pytest.approx([0.6, 0.8, 0, 0], abs=1e-6)


async def test_records_that_are_not_there_are_left_out(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1)])

    assert set(await store.get("Docs_4", [uuid(1), uuid(2)])) == {uuid(1)}
    assert await store.get("Docs_4", []) == {}


async def test_an_upsert_replaces_the_whole_object(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, [1, 0, 0, 0], "old", source="a.md", n=1)])

    await store.upsert("Docs_4", [record(1, [0, 1, 0, 0], "new", source="b.md")])

    assert await store.get("Docs_4", [uuid(1)]) == {uuid(1): record(1, text="new", source="b.md")}
    (hit,) = await store.search("Docs_4", np.array([0, 1, 0, 0], dtype=np.float32), 5)
    assert (hit.distance, hit.text) == (pytest.approx(0, abs=TOLERANCE), "new")
    assert await store.count("Docs_4") == 1


async def test_writing_the_same_again_changes_nothing(store: VectorStore) -> None:
    batch = [record(number, source="a.md") for number in range(20)]
    await store.upsert("Docs_4", batch)

    await store.upsert("Docs_4", batch)

    assert await store.count("Docs_4") == 20
    assert len(await store.search("Docs_4", np.ones(4, dtype=np.float32), 50)) == 20


async def test_of_two_records_with_one_uuid_the_later_counts(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, text="first"), record(1, text="second")])

    assert (await store.get("Docs_4", [uuid(1)]))[uuid(1)].text == "second"
    assert await store.count("Docs_4") == 1


async def test_an_empty_upsert_is_one(store: VectorStore) -> None:
    assert await store.upsert("Docs_4", []) == {}


async def test_uuids_are_kept_in_canonical_form(store: VectorStore) -> None:
    loud = Record(uuid(0xABCDEF).upper(), "text", np.ones(4, dtype=np.float32))
    await store.upsert("Docs_4", [loud])

    assert set(await store.get("Docs_4", [loud.uuid.replace("-", "")])) == {uuid(0xABCDEF)}
    assert await store.delete("Docs_4", [loud.uuid]) == 1


@pytest.mark.parametrize("wrong", ["", "not-a-uuid", "123"])
async def test_what_is_no_uuid_is_refused(store: VectorStore, wrong: str) -> None:
    with pytest.raises(StoreError, match="no uuid"):
        await store.upsert("Docs_4", [record(1), Record(wrong, "text", np.ones(4, dtype=np.float32))])
    with pytest.raises(StoreError, match="no uuid"):
        await store.get("Docs_4", [wrong])

    assert await store.count("Docs_4") == 0


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        ([1, 2, 3], "it has 3 numbers, not 4"),
        ([0, 0, 0, 0], "it is zero"),
        ([1, float("nan"), 0, 0], "NaN or infinite"),
        ([1, float("inf"), 0, 0], "NaN or infinite"),
    ],
)
async def test_a_vector_without_a_direction_is_refused_and_nothing_written(
    store: VectorStore, vector: list[float], why: str
) -> None:
    with pytest.raises(VectorRefused, match=why) as caught:
        await store.upsert("Docs_4", [record(1), record(2, vector)])
    with pytest.raises(VectorRefused, match=why):
        await store.search("Docs_4", np.array(vector, dtype=np.float32), 1)

    assert caught.value.uuid == uuid(2)
    assert await store.count("Docs_4") == 0


async def test_a_record_without_a_vector_is_refused(store: VectorStore) -> None:
    with pytest.raises(VectorRefused, match="missing"):
        await store.upsert("Docs_4", [Record(uuid(1), "text")])


async def test_properties_that_are_not_flat_are_refused_and_nothing_written(store: VectorStore) -> None:
    nested = Record(uuid(2), "text", np.ones(4, dtype=np.float32), {"tags": ["a"]})  # type: ignore[dict-item]

    with pytest.raises(StoreError, match="'tags'"):
        await store.upsert("Docs_4", [record(1), nested])

    assert await store.count("Docs_4") == 0


async def test_deleting_says_how_many_there_were(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1), record(2)])

    assert await store.delete("Docs_4", [uuid(1), uuid(3), uuid(1)]) == 1

    assert await scanned(store, "Docs_4") == [uuid(2)]
    assert [hit.uuid for hit in await store.search("Docs_4", np.ones(4, dtype=np.float32), 5)] == [uuid(2)]


async def test_deleting_by_filter_can_be_tried_first(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(n, source="a.md" if n % 2 else "b.md") for n in range(10)])
    odd = Compare("source", "eq", "a.md")

    assert await store.delete_where("Docs_4", odd, dry_run=True) == 5
    assert await store.count("Docs_4") == 10
    assert await store.delete_where("Docs_4", odd) == 5

    assert await store.count("Docs_4", odd) == 0
    assert await store.count("Docs_4") == 5


# --- search and filters --------------------------------------------------------------------


async def test_the_nearest_come_first_with_their_cosine_distance(store: VectorStore) -> None:
    await store.upsert(
        "Docs_4", [record(1, [-2, 0, 0, 0]), record(2, [0, 5, 0, 0]), record(3, [9, 0, 0, 0], source="a.md")]
    )

    hits = await store.search("Docs_4", np.array([0.5, 0, 0, 0], dtype=np.float32), 3)

    assert [hit.uuid for hit in hits] == [uuid(3), uuid(2), uuid(1)]
    assert [hit.distance for hit in hits] == pytest.approx([0, 1, 2], abs=TOLERANCE)
    assert hits[0].similarity == pytest.approx(1, abs=TOLERANCE)
    assert (hits[0].text, hits[0].properties) == ("text 3", {"source": "a.md"})


async def test_equal_distances_are_ordered_by_uuid(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number, [1, 1, 0, 0]) for number in (5, 3, 9, 1, 7)])

    hits = await store.search("Docs_4", np.array([1, 0, 0, 0], dtype=np.float32), 3)

    assert [hit.uuid for hit in hits] == [uuid(1), uuid(3), uuid(5)]


async def test_an_empty_collection_has_no_hits(store: VectorStore) -> None:
    assert await store.search("Docs_4", np.ones(4, dtype=np.float32), 10) == []


async def test_hits_end_at_the_greatest_distance(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, [1, 0, 0, 0]), record(2, [1, 1, 0, 0]), record(3, [0, 1, 0, 0])])

    hits = await store.search("Docs_4", np.array([1, 0, 0, 0], dtype=np.float32), 10, max_distance=0.5)

    assert [hit.uuid for hit in hits] == [uuid(1), uuid(2)]


async def test_a_filter_leaves_the_nearest_of_what_it_matches(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(n, [1, n / 10, 0, 0], source=f"s{n % 3}") for n in range(30)])

    hits = await store.search(
        "Docs_4", np.array([1, 0, 0, 0], dtype=np.float32), 3, where=Compare("source", "eq", "s2")
    )

    assert [hit.uuid for hit in hits] == [uuid(2), uuid(5), uuid(8)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Compare("source", "eq", "a.md"), {1, 2}),
        (Compare("source", "ne", "a.md"), {3, 4}),
        (Compare("source", "eq", None), {4}),
        (Compare("source", "ne", None), {1, 2, 3}),
        (Compare("source", "in", ("b.md", "c.md")), {3}),
        (Compare("source", "in", ("b.md", None)), {3, 4}),
        (Compare("source", "in", ()), set()),
        (Compare("n", "lt", 2), {1}),
        (Compare("n", "le", 2), {1, 2}),
        (Compare("n", "gt", 1.5), {2, 3}),
        (Compare("n", "ge", 3), {3}),
        (Compare("n", "gt", None), set()),
        (Compare("source", "ge", "b"), {3}),
        (Compare("draft", "eq", True), {2}),
        (Compare("nowhere", "eq", None), {1, 2, 3, 4}),
        (Not(Compare("n", "gt", 1)), {1, 4}),
        (Not(Compare("source", "in", ("a.md",))), {3, 4}),
        (AllOf((Compare("source", "eq", "a.md"), Compare("n", "eq", 2))), {2}),
        (AnyOf((Compare("source", "eq", "b.md"), Not(Compare("n", "ne", 1)))), {1, 3}),
        (AllOf(()), {1, 2, 3, 4}),
        (AnyOf(()), set()),
    ],
)
async def test_filters_compare_and_combine(store: VectorStore, where: Filter, expected: set[int]) -> None:
    await store.upsert(
        "Docs_4",
        [
            record(1, source="a.md", n=1, draft=False),
            record(2, source="a.md", n=2, draft=True),
            record(3, source="b.md", n=3),
            record(4),
        ],
    )

    hits = await store.search("Docs_4", np.ones(4, dtype=np.float32), 10, where=where)

    assert {hit.uuid for hit in hits} == {uuid(number) for number in expected}
    assert await store.count("Docs_4", where) == len(expected)


async def test_records_from_before_a_property_was_known_do_not_have_it(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1), record(2)])
    await store.upsert("Docs_4", [record(3, colour="red")])

    for where, expected in (
        (Compare("colour", "eq", None), {1, 2}),
        (Compare("colour", "ne", "red"), {1, 2}),
        (Not(Compare("colour", "eq", None)), {3}),
    ):
        hits = await store.search("Docs_4", np.ones(4, dtype=np.float32), 10, where=where)
        assert {hit.uuid for hit in hits} == {uuid(number) for number in expected}
        assert await store.count("Docs_4", where) == len(expected)


@pytest.mark.parametrize("name", ["current", "", "9", "Docs-4"])
async def test_an_alias_that_not_every_store_takes_is_refused(store: VectorStore, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name an alias"):
        await store.point_alias(name, "Docs_4")


# --- search by words -----------------------------------------------------------------------


async def test_any_word_of_the_query_may_match_and_rarer_ones_count_for_more(store: VectorStore) -> None:
    await store.upsert(
        "Docs_4",
        [
            record(1, text="how the ledger reserves money", source="a.md"),
            record(2, text="how the gateway answers"),
            record(3, text="how the spool is drained"),
            record(4, text="of something else altogether"),
        ],
    )

    hits = await store.search_text("Docs_4", "how is a ledger kept", 10)

    assert {hit.uuid for hit in hits} == {uuid(1), uuid(2), uuid(3)}
    assert {hit.uuid for hit in hits[:2]} == {uuid(1), uuid(3)}
    assert hits[-1].score > 0
    assert sorted((hit.score for hit in hits), reverse=True) == [hit.score for hit in hits]
    (first,) = [hit for hit in hits if hit.uuid == uuid(1)]
    assert (first.text, first.properties) == ("how the ledger reserves money", {"source": "a.md"})
    assert "ledger" not in repr(first)


async def test_a_word_counts_for_more_where_it_is_repeated_and_where_less_else_is_said(store: VectorStore) -> None:
    await store.upsert(
        "Docs_4",
        [
            record(1, text="alpha and nine other words that only make this one longer"),
            record(2, text="alpha beta"),
            record(3, text="alpha alpha"),
            *(record(number, text="gamma delta") for number in range(4, 12)),
        ],
    )

    assert await worded(store, "alpha") == [3, 2, 1]


async def test_equal_scores_are_ordered_by_uuid_however_many_there_are(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number, text=f"alpha w{number}") for number in (45, *range(40, 0, -1))])
    await store.upsert("Docs_4", [record(number, text="beta gamma") for number in range(50, 150)])

    assert await worded(store, "alpha", 3) == [1, 2, 3]
    assert await worded(store, "alpha") == [*range(1, 41), 45]


async def test_no_more_are_found_than_asked_for(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in range(5)])

    assert len(await worded(store, "text", 4)) == 4
    assert await worded(store, "text", 0) == []


@pytest.mark.parametrize("query", ["", "  ", "nowhere", "?!", '"', "'", "*", "-", "😀 …", "\x00", "\ud800"])
async def test_what_holds_no_word_of_any_record_finds_nothing(store: VectorStore, query: str) -> None:
    await store.upsert("Docs_4", [record(1, text="text 😀 … ?! \" * ' -")])

    assert await worded(store, query) == []


async def test_an_empty_collection_has_no_words(store: VectorStore) -> None:
    assert await worded(store, "words") == []


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Der GROẞE Äpfel ÉTAGE", "äpfel"),
        ("Der große Äpfel étage", "ÉTAGE"),
        ("Москва", "МОСКВА"),
        ("version 3.11 of it", "11"),
        ("call `ensure_collection()`", "collection"),
        ("tea-time", "time"),
        ("naïve", "NAÏVE"),
        ("हिन्दी भाषा", "हिन्दी"),
        ("数据库 是", "数据库"),
        ("x😀y", "Y"),
        ("great🤔", "great"),
        ("👍🏽good ❤️too", "good"),
        ("👍🏽good ❤️too", "too"),
    ],
)
async def test_words_are_found_whatever_their_case_and_script(store: VectorStore, text: str, query: str) -> None:
    await store.upsert("Docs_4", [record(1, text=text), record(2, text="something else")])

    assert await worded(store, query) == [1]


@pytest.mark.parametrize("query", ["the", "to be or not to be"])
async def test_words_that_are_everywhere_are_words_too(store: VectorStore, query: str) -> None:
    await store.upsert("Docs_4", [record(1, text="the one to be, or not")])

    assert await worded(store, query) == [1]


@pytest.mark.parametrize(
    "query",
    [
        "alpha AND nothing",
        "NOT alpha",
        "alpha NEAR/2 beta",
        "NEAR(alpha beta)",
        "text:alpha",
        "rank:alpha",
        "-text:alpha",
        "{text} : alpha",
        "^alpha",
        '"alpha',
        '"alpha beta"gamma"',
        "alpha'; DROP TABLE records_1; --",
        "alph* alpha*",
        "(((alpha",
        "alpha\x00\x00beta",
        "\ud800alpha\udfff",
        "alpha + \\ ,;%_?",
        "alpha " * 5000,
        "alpha " + " ".join(f"w{number}" for number in range(5000)),
        "alpha " + "x" * 100_000,
    ],
)
async def test_nothing_in_a_query_is_an_operator(store: VectorStore, query: str) -> None:
    await store.upsert("Docs_4", [record(1, text="alpha omega"), record(2, text="quite something")])

    assert await worded(store, query) == [1]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.text() | st.sampled_from(["NEAR(", '"', "*", " OR ", " AND ", "alpha", "^", "text:"])))
async def test_any_text_can_be_asked_for(store: VectorStore, parts: list[str]) -> None:
    await store.upsert("Docs_4", [record(1, text="alpha NEAR beta")])

    assert await worded(store, "".join(parts)) in ([], [1])


async def test_a_filter_leaves_the_best_of_what_it_matches(store: VectorStore) -> None:
    await store.upsert(
        "Docs_4", [record(number, text="alpha " + "x " * number, source=f"s{number % 3}") for number in range(30)]
    )

    assert await worded(store, "alpha", 3, Compare("source", "eq", "s2")) == [2, 5, 8]
    assert await worded(store, "alpha", 3, Not(Compare("source", "in", ("s2", "s0")))) == [1, 4, 7]
    assert await worded(store, "alpha", 3, Compare("nowhere", "eq", "s2")) == []
    assert len(await worded(store, "alpha", 100, Compare("nowhere", "eq", None))) == 30
    with pytest.raises(StoreError, match="'source'"):
        await worded(store, "alpha", 3, Compare("source", "in", "s2"))


async def test_words_follow_what_is_written_changed_and_deleted(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, text="alpha"), record(2, text="alpha beta"), record(3, text="alpha")])
    assert await worded(store, "alpha") == [1, 3, 2]

    await store.upsert("Docs_4", [record(4, text="alpha"), record(1, text="gamma")])
    await store.upsert("Docs_4", [record(2, [0, 0, 0, 1], text="delta alpha", source="a.md")])
    await store.delete("Docs_4", [uuid(3)])

    assert await worded(store, "alpha") == [4, 2]
    assert await worded(store, "gamma") == [1]
    assert await worded(store, "beta") == []
    (hit,) = await store.search_text("Docs_4", "delta", 1)
    assert (hit.text, hit.properties) == ("delta alpha", {"source": "a.md"})


async def test_words_that_come_back_are_found_again(store: VectorStore) -> None:
    for text in ("alpha", "beta", "gamma", "alpha"):
        await store.upsert("Docs_4", [record(1, text=text), record(2, text="omega")])
        assert await worded(store, text) == [1]
    await store.delete("Docs_4", [uuid(1)])
    assert await worded(store, "alpha") == []

    await store.upsert("Docs_4", [record(1, text="alpha")])

    assert await worded(store, "alpha") == [1]


async def test_words_are_searched_through_an_alias_that_moves(store: VectorStore) -> None:
    await store.ensure_collection(Collection("Docs_2", 2))
    await store.upsert("Docs_2", [Record(uuid(7), "alpha in two", np.ones(2, dtype=np.float32))])
    await store.upsert("Docs_4", [record(1, text="alpha in four")])
    await store.point_alias("Current", "Docs_4")
    assert [hit.uuid for hit in await store.search_text("Current", "alpha", 5)] == [uuid(1)]

    await store.point_alias("Current", "Docs_2")

    assert [hit.uuid for hit in await store.search_text("Current", "alpha", 5)] == [uuid(7)]


# --- scan ----------------------------------------------------------------------------------


async def test_a_scan_goes_through_all_records_in_uuid_order(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in (11, 2, 255, 16, 9, 7, 3)])

    pages = [page async for page in store.scan("Docs_4", page=3)]

    assert [len(page) for page in pages] == [3, 3, 1]
    assert [found.uuid for page in pages for found in page] == [uuid(n) for n in (2, 3, 7, 9, 11, 16, 255)]
    assert all(found.vector is None for page in pages for found in page)


async def test_ranges_of_uuids_divide_a_scan(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in range(1, 30)])

    first = await scanned(store, "Docs_4", until=uuid(10), page=4)
    rest = await scanned(store, "Docs_4", after=uuid(10).upper(), page=4)

    assert first == [uuid(number) for number in range(1, 11)]
    assert rest == [uuid(number) for number in range(11, 30)]


async def test_the_boundaries_of_a_scan_need_not_exist(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in (1, 5, 9)])

    assert await scanned(store, "Docs_4", after=uuid(2), until=uuid(7)) == [uuid(5)]


async def test_a_scan_reads_vectors_when_asked(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(1, [0, 2, 0, 0], source="a.md")])

    ((found,),) = [page async for page in store.scan("Docs_4", vectors=True)]

    assert found.vector == pytest.approx([0, 1, 0, 0])
    assert found.properties == {"source": "a.md"}


async def test_a_scan_stays_in_the_collection_where_it_began(store: VectorStore) -> None:
    await store.ensure_collection(Collection("Docs_2", 2))
    await store.upsert("Docs_4", [record(number) for number in range(4)])
    await store.point_alias("Current", "Docs_4")

    seen = []
    async for page in store.scan("Current", page=2):
        seen += [found.uuid for found in page]
        await store.point_alias("Current", "Docs_2")

    assert seen == [uuid(number) for number in range(4)]


async def test_what_was_written_is_found_once_the_store_has_caught_up(store: VectorStore) -> None:
    await store.upsert("Docs_4", [record(number) for number in range(1, 4)])

    waiting = await store.catch_up("Docs_4")

    assert waiting == 0
    assert len(await store.search("Docs_4", np.array([1, 0, 0, 0], dtype=np.float32), 10)) == 3


async def test_nothing_catches_up_with_a_collection_that_is_not_there(store: VectorStore) -> None:
    with pytest.raises(CollectionMissing):
        await store.catch_up("Nowhere_4")


# --- aliases -------------------------------------------------------------------------------


async def test_an_alias_stands_wherever_a_name_is_read(store: VectorStore) -> None:
    await store.point_alias("Current", "Docs_4")

    await store.upsert("Current", [record(1, source="a.md")])

    assert await store.alias_target("Current") == "Docs_4"
    assert await store.list_aliases() == {"Current": "Docs_4"}
    assert (await store.describe("Current")).name == "Docs_4"
    assert set(await store.get("Current", [uuid(1)])) == {uuid(1)}
    assert await scanned(store, "Current") == [uuid(1)]
    assert len(await store.search("Current", np.ones(4, dtype=np.float32), 1)) == 1
    assert await store.delete_where("Current", Compare("source", "eq", "a.md")) == 1
    assert await store.count("Docs_4") == 0


async def test_moving_an_alias_moves_its_readers(store: VectorStore) -> None:
    await store.ensure_collection(Collection("Docs_2", 2))
    await store.upsert("Docs_2", [Record(uuid(7), "new", np.ones(2, dtype=np.float32))])
    await store.point_alias("Current", "Docs_4")

    await store.point_alias("Current", "Docs_2", expect="Docs_4")

    assert [hit.text for hit in await store.search("Current", np.ones(2, dtype=np.float32), 5)] == ["new"]


@pytest.mark.parametrize("before", [None, "Docs_4"])
async def test_an_alias_that_is_not_where_expected_is_not_moved(store: VectorStore, before: str | None) -> None:
    await store.ensure_collection(Collection("Docs_2", 2))
    if before:
        await store.point_alias("Current", before)

    with pytest.raises(AliasMoved) as caught:
        await store.point_alias("Current", "Docs_2", expect="Docs_9")

    assert (caught.value.found, await store.alias_target("Current")) == (before, before)


async def test_an_alias_and_a_collection_never_share_a_name(store: VectorStore) -> None:
    await store.point_alias("Current", "Docs_4")

    with pytest.raises(StoreError, match="is a collection"):
        await store.point_alias("Docs_4", "Docs_4")
    with pytest.raises(StoreError, match="is an alias"):
        await store.ensure_collection(Collection("Current", 4))


async def test_a_deleted_alias_names_nothing(store: VectorStore) -> None:
    await store.point_alias("Current", "Docs_4")

    assert await store.delete_alias("Current") is True

    assert await store.delete_alias("Current") is False
    assert await store.alias_target("Current") is None
    with pytest.raises(CollectionMissing):
        await store.count("Current")


async def test_a_healthy_store_says_how_long_it_took(store: VectorStore) -> None:
    assert 0 <= await store.health() < 5
