"""What the doctor finds in both stores, what it says to do about it, and that doing so helps."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sekha.doctor import Diagnosis, DoctorRequest, Finding, diagnose
from sekha.documents import Document
from sekha.errors import BudgetExceeded, InvalidRequest
from sekha.runtime import Runtime
from sekha.trace import Tracer
from sekha.vectors.base import Collection, Record
from tests.fixtures.runtimes import TWO_MODELS, opened, opened_on
from tests.fixtures.weaviate import Server, foreign_client, weaviate_section

PRICED = """
providers:
  - id: builtin
    provider_type: builtin
    models:
      - {model_id: hashed-8, task: embedding, dimension: 8, price: {input_per_million: 1000000}}
budgets:
  - {name: all, limit: 1, period: total}
"""
FINGERPRINT = "builtin/hashed-8:8:unit"


@pytest.fixture
async def sekha(tmp_path: Path) -> AsyncIterator[Runtime]:
    async with opened(tmp_path) as sekha:
        yield sekha


async def keep(sekha: Runtime, count: int = 6, collection: str = "documents") -> None:
    await sekha.ingest([Document(source=f"{n}.md", text=f"Text number {n}.") for n in range(count)], collection)


async def looked(sekha: Runtime, *repair: Any, **fields: Any) -> Diagnosis:
    return await sekha.diagnose(DoctorRequest(repair=repair, **fields))


def damage(folder: Path, statement: str, *values: object) -> None:
    """What only somebody else does to the embedded store's file."""
    with closing(sqlite3.connect(folder / ".sekha" / "vectors.db")) as db:
        db.execute(statement, values)
        db.commit()


def of(diagnosis: Diagnosis, kind: str) -> list[Finding]:
    return [each for each in diagnosis.findings if each.kind == kind]


def numbers(*values: float) -> bytes:
    return np.array(values, dtype=np.float32).tobytes()


async def test_nothing_is_wrong_where_nothing_is(sekha: Runtime, tmp_path: Path) -> None:
    found = await looked(sekha)

    assert (found.indexes, found.findings) == ((), ())
    assert not (tmp_path / ".sekha" / "vectors.db").exists()


async def test_nothing_is_wrong_with_what_was_ingested(sekha: Runtime) -> None:
    await keep(sekha)

    found = await looked(sekha)

    (index,) = found.indexes
    assert (index.name, index.collection, index.records, index.model) == (
        "Documents_8",
        "documents",
        6,
        "builtin/hashed-8",
    )
    assert found.findings == ()


UNSOUND: Sequence[tuple[bytes, str]] = [
    (numbers(*[0] * 8), "it is zero"),
    (numbers(float("nan"), *[0] * 7), "it holds NaN or infinite numbers"),
    (numbers(float("inf"), *[0] * 7), "it holds NaN or infinite numbers"),
    (numbers(1, 0, 0), "it has 3 numbers, not 8"),
    (numbers(1, 0, 0)[:-1], "it has 2 numbers, not 8"),
    (numbers(*[1] * 8), "it is not of unit length"),
]


@pytest.mark.parametrize(("vector", "why"), UNSOUND)
async def test_a_vector_that_cannot_be_searched_is_found_and_made_anew(
    sekha: Runtime, tmp_path: Path, vector: bytes, why: str
) -> None:
    await keep(sekha)
    damage(tmp_path, "UPDATE vectors_1 SET vector = ? WHERE id = (SELECT min(id) FROM vectors_1)", vector)

    (found,) = (await looked(sekha)).findings
    repaired = await looked(sekha, "vectors")

    assert (found.kind, found.where, found.count, len(found.examples)) == ("vectors", "Documents_8", 1, 1)
    assert found.what == f"without a sound vector: {why}"
    assert found.next == "sekha doctor --repair vectors --collection documents"
    assert (repaired.embedded, repaired.findings) == (1, ())
    assert len((await sekha.search("Text number 1.", limit=10)).hits) == 6


async def test_a_record_that_lost_its_vector_is_found_and_gets_one(sekha: Runtime, tmp_path: Path) -> None:
    await keep(sekha)
    damage(tmp_path, "DELETE FROM vectors_1 WHERE id > (SELECT min(id) FROM vectors_1) + 1")

    (found,) = (await looked(sekha)).findings
    repaired = await looked(sekha, "vectors")

    assert (found.count, len(found.examples), found.what) == (4, 3, "without a sound vector: it is missing")
    assert (repaired.embedded, repaired.findings) == (4, ())


async def test_records_of_two_models_in_one_index_are_found_and_made_one(sekha: Runtime) -> None:
    await keep(sekha)
    store = await sekha.resources.store()
    axes = np.eye(8, dtype=np.float32)
    other = [
        Record(
            f"00000000-0000-0000-0000-{n:012d}",
            f"other {n}",
            axes[n],
            {"embedding_fingerprint": said},
        )
        for n, said in enumerate(["openai/ada:8:unit", "openai/ada:8:unit", FINGERPRINT])
    ]
    await store.upsert("Documents_8", other)

    found = await looked(sekha)
    repaired = await looked(sekha, "models")

    (mixed,) = found.problems
    assert (mixed.kind, mixed.count, mixed.examples) == ("models", 2, (other[0].uuid, other[1].uuid))
    assert "openai/ada:8:unit" in mixed.what
    assert (repaired.embedded, repaired.findings) == (2, ())
    kept = (await store.get("Documents_8", [other[0].uuid]))[other[0].uuid]
    assert (kept.text, kept.properties["embedding_fingerprint"]) == ("other 0", FINGERPRINT)


async def test_a_record_without_a_text_is_found_and_deleted_only_when_asked(sekha: Runtime, tmp_path: Path) -> None:
    await keep(sekha)
    damage(tmp_path, "UPDATE records_1 SET text = ' ' WHERE id = (SELECT min(id) FROM records_1)")
    damage(tmp_path, "DELETE FROM vectors_1 WHERE id = (SELECT min(id) FROM vectors_1)")

    left = await looked(sekha, "vectors", "models", "duplicates", "aliases")
    repaired = await looked(sekha, "texts")

    assert [(each.kind, each.count) for each in left.findings] == [("texts", 1), ("vectors", 1)]
    assert (left.embedded, left.deleted) == (0, 0)
    assert (repaired.deleted, repaired.records, repaired.findings) == (1, 5, ())


async def test_texts_that_are_kept_twice_are_told_and_all_but_one_deleted(sekha: Runtime) -> None:
    same = [Document(source=f"{n}.md", text="The very same text.") for n in range(3)]
    await sekha.ingest([*same, Document(source="other.md", text="Another.")])

    found = await looked(sekha)
    repaired = await looked(sekha, "duplicates")

    (twice,) = found.findings
    assert (twice.kind, twice.count, twice.notice) == ("duplicates", 2, True)
    assert found.problems == ()
    assert (repaired.deleted, repaired.records, repaired.findings) == (2, 2, ())


async def test_of_two_records_with_one_text_the_sound_one_stays(sekha: Runtime, tmp_path: Path) -> None:
    await sekha.ingest([Document(source=f"{n}.md", text="The very same text.") for n in range(2)])
    first = "(SELECT id FROM records_1 ORDER BY uuid LIMIT 1)"
    damage(tmp_path, f"UPDATE vectors_1 SET vector = zeroblob(32) WHERE id = {first}")

    left = await looked(sekha, "duplicates")
    mended = await looked(sekha, "vectors")
    one = await looked(sekha, "duplicates")

    assert (left.deleted, [each.kind for each in left.findings]) == (0, ["vectors"])
    assert (mended.embedded, [each.kind for each in mended.findings]) == (1, ["duplicates"])
    assert (one.deleted, one.records, one.findings) == (1, 1, ())


async def test_a_missing_alias_is_found_and_set(sekha: Runtime) -> None:
    await keep(sekha)
    store = await sekha.resources.store()
    await store.delete_alias("Documents")

    (found,) = (await looked(sekha)).findings
    repaired = await looked(sekha, "aliases")

    assert (found.kind, found.where, found.next) == ("aliases", "Documents", "sekha doctor --repair aliases")
    assert (repaired.aliases, repaired.findings) == (("Documents",), ())
    assert await store.alias_target("Documents") == "Documents_8"


async def test_an_alias_that_names_another_collections_index_is_found_and_moved(sekha: Runtime) -> None:
    await keep(sekha)
    await keep(sekha, collection="notes")
    store = await sekha.resources.store()
    await store.point_alias("Documents", "Notes_8")

    (found,) = (await looked(sekha)).findings

    repaired = await looked(sekha, "aliases")

    assert (found.kind, found.where, found.count) == ("aliases", "Documents", 6)
    assert "'Notes_8', which is no index of this collection" in found.what
    assert found.next == "sekha doctor --repair aliases"
    assert (repaired.aliases, repaired.findings) == (("Documents",), ())
    assert await store.list_aliases() == {"Documents": "Documents_8", "Notes": "Notes_8"}


async def test_an_index_whose_model_the_file_no_longer_has_is_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as sekha:
        await keep(sekha)
    async with opened(tmp_path, TWO_MODELS.replace("hashed-8", "hashed-9")) as sekha:
        found = await looked(sekha)

    unknown = next(each for each in found.findings if not each.notice)
    assert (unknown.kind, unknown.where, unknown.count) == ("drift", "Documents_8", 6)
    assert f"made by '{FINGERPRINT}', which the file does not have" in unknown.what
    assert "Did you mean 'hashed-9'?" in unknown.what
    assert "`providers:`" in unknown.next


async def test_a_collection_whose_model_was_changed_in_the_file_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as sekha:
        await keep(sekha)
    async with opened(tmp_path, f"{TWO_MODELS}\ncollections: {{documents: {{model: hashed-16}}}}\n") as sekha:
        (found,) = (await looked(sekha)).findings

        assert (found.kind, found.where, found.count, found.notice) == ("drift", "Documents_8", 6, True)
        assert "'builtin/hashed-16'" in found.what
        await keep(sekha)
        assert (await looked(sekha)).findings == ()


async def test_an_index_that_nothing_reads_is_found(sekha: Runtime) -> None:
    store = await sekha.resources.store()
    await store.ensure_collection(Collection("Documents_9", 8, FINGERPRINT))

    (found,) = (await looked(sekha)).findings

    assert (found.kind, found.where) == ("drift", "Documents_9")
    assert "nothing reads it" in found.what


async def test_a_collection_with_a_number_in_its_name_is_read(sekha: Runtime) -> None:
    await keep(sekha, collection="my_2_docs")

    found = await looked(sekha)

    assert [(each.name, each.collection) for each in found.indexes] == [("My_2_docs_8", "my_2_docs")]
    assert found.findings == ()


async def test_only_the_collections_that_are_asked_for_are_looked_at(sekha: Runtime) -> None:
    await keep(sekha)
    await keep(sekha, collection="notes")

    found = await looked(sekha, collections=("notes",))

    assert [each.name for each in found.indexes] == ["Notes_8"]
    with pytest.raises(InvalidRequest, match="Did you mean 'notes'"):
        await looked(sekha, collections=("nots",))


async def test_what_is_embedded_anew_counts_against_the_budgets(tmp_path: Path) -> None:
    async with opened(tmp_path) as sekha:
        await keep(sekha)
    damage(tmp_path, "DELETE FROM vectors_1")
    async with opened(tmp_path, PRICED) as sekha:
        with pytest.raises(BudgetExceeded):
            await looked(sekha, "vectors")

        assert of(await looked(sekha), "vectors")[0].count == 6


async def test_many_faults_are_repaired_batch_by_batch(sekha: Runtime, tmp_path: Path) -> None:
    await keep(sekha, 600)
    damage(tmp_path, "DELETE FROM vectors_1")
    told: list[tuple[str, int, int]] = []
    tracer = Tracer(clock=sekha.resources.clock.now)

    found = await diagnose(
        DoctorRequest(repair=("vectors",)),
        tracer.wrap(sekha.doctor_steps),
        progress=lambda *done: told.append(done),
    )

    assert (found.embedded, found.findings) == (600, ())
    assert told == [("Documents_8", 256, 600), ("Documents_8", 512, 600), ("Documents_8", 600, 600)]
    assert ("survey_store", "examine_index") in tracer.trace.edges
    assert ("gather_faulty", "write_anew") in tracer.trace.edges


@pytest.mark.parametrize("fields", [{"repair": ("vektors",)}, {"collections": ("no such name",)}])
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        DoctorRequest(**fields)


# --- Weaviate ------------------------------------------------------------------------------


@pytest.fixture
async def over_weaviate(
    weaviate_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Runtime]:
    async with opened_on(weaviate_server, tmp_path, monkeypatch) as sekha:
        yield sekha


async def test_unsound_objects_of_a_server_are_found_and_made_anew(
    over_weaviate: Runtime, weaviate_server: Server
) -> None:
    sekha = over_weaviate
    await keep(sekha)
    async with foreign_client(weaviate_server) as client:
        data = client.collections.use("Documents_8").data
        kept = {"properties": "{}"}
        await data.insert({**kept, "text": "without"}, uuid="00000000-0000-0000-0000-000000000001")
        await data.insert({**kept, "text": "zero"}, uuid="00000000-0000-0000-0000-000000000002", vector=[0.0] * 8)
        await data.insert({**kept, "text": "long"}, uuid="00000000-0000-0000-0000-000000000003", vector=[2.0] * 8)
        await data.insert({**kept, "text": ""}, uuid="00000000-0000-0000-0000-000000000004", vector=[1.0, *[0.0] * 7])

    found = await looked(sekha)
    repaired = await looked(sekha, "vectors", "texts")

    assert [(each.kind, each.what.rpartition(": ")[2], each.examples[0][-1]) for each in found.findings] == [
        ("texts", "without a text, so that no other model can ever embed them", "4"),
        ("vectors", "it is missing", "1"),
        ("vectors", "it is not of unit length", "3"),
        ("vectors", "it is zero", "2"),
    ]
    assert (repaired.embedded, repaired.deleted, repaired.findings) == (3, 1, ())


async def test_an_alias_whose_class_somebody_dropped_is_found_and_deleted(
    over_weaviate: Runtime, weaviate_server: Server
) -> None:
    sekha = over_weaviate
    await keep(sekha)
    async with foreign_client(weaviate_server) as client:
        await client.collections.delete("Documents_8")

    (found,) = (await looked(sekha)).findings
    repaired = await looked(sekha, "aliases")

    assert (found.kind, found.where) == ("aliases", "Documents")
    assert "'Documents_8', which is not there" in found.what
    assert (repaired.aliases, repaired.findings) == (("Documents",), ())


async def test_what_other_programs_have_on_the_same_server_is_theirs(
    over_weaviate: Runtime, weaviate_server: Server
) -> None:
    from weaviate.classes.config import Configure

    await keep(over_weaviate)
    async with foreign_client(weaviate_server) as client:
        await client.collections.create("Theirs")
        await client.collections.create("Rented", multi_tenancy_config=Configure.multi_tenancy(enabled=True))
        await client.alias.create(alias_name="Others", target_collection="Theirs")
        await client.collections.create("Gone")
        await client.alias.create(alias_name="Lost", target_collection="Gone")
        await client.collections.delete("Gone")
        try:
            found = await looked(over_weaviate, "aliases")
            left = set(await client.alias.list_all())
        finally:
            for alias in ("Others", "Lost"):
                await client.alias.delete(alias_name=alias)
            for name in ("Theirs", "Rented"):
                await client.collections.delete(name)

    assert (found.findings, found.aliases) == ((), ())
    assert left == {"Documents", "Others", "Lost"}


async def test_an_alias_that_another_program_uses_is_left_to_it(
    over_weaviate: Runtime, weaviate_server: Server
) -> None:
    await keep(over_weaviate)
    async with foreign_client(weaviate_server) as client:
        await client.collections.create("Theirs")
        await client.alias.update(alias_name="Documents", new_target_collection="Theirs")
        try:
            found = await looked(over_weaviate, "aliases")
        finally:
            await client.alias.delete(alias_name="Documents")
            await client.collections.delete("Theirs")

    assert [(each.where, each.count, found.aliases) for each in found.problems] == [("Documents", 6, ())]
    assert "'Theirs', a class that Sekha did not make" in found.problems[0].what
    assert (await looked(over_weaviate, "aliases")).aliases == ("Documents",)


async def test_a_class_that_stands_where_the_alias_should_is_found(
    over_weaviate: Runtime, weaviate_server: Server
) -> None:
    sekha = over_weaviate
    async with foreign_client(weaviate_server) as client:
        await client.collections.create("Documents")
        try:
            await keep(sekha)
            (found,) = (await looked(sekha, "aliases")).findings
        finally:
            await client.collections.delete("Documents")

    assert (found.kind, found.where) == ("aliases", "Documents")
    assert found.next.startswith("sekha import weaviate --collection Documents --dry-run")
    assert (await looked(sekha, "aliases")).findings == ()


async def test_classes_that_were_made_before_the_file_said_otherwise_are_told(
    over_weaviate: Runtime, weaviate_server: Server, tmp_path: Path
) -> None:
    await keep(over_weaviate)
    section = weaviate_section(weaviate_server).replace("}\n", ", replication: 3, quantizer: rq-8}\n")
    async with opened(tmp_path, TWO_MODELS + section) as sekha:
        found = await looked(sekha)

    assert [(each.kind, each.where, each.notice) for each in found.findings] == [("drift", "Documents_8", True)] * 2
    assert "`replication: 3`" in found.findings[0].what
    assert "keeps vectors in memory as 'none', and the file says `quantizer: rq-8`" in found.findings[1].what
