from __future__ import annotations

import sqlite3
from contextlib import closing


def damage(sekha, statement):
    with closing(sqlite3.connect(sekha.folder / ".sekha" / "vectors.db")) as db:
        db.execute(statement)
        db.commit()


async def test_a_sound_store_ends_well(sekha):
    sekha.write("docs/a.md", "# Holds\n\nA hold sets money aside.\n")
    nothing = await sekha("doctor")
    await sekha("ingest", "docs")

    looked = await sekha("doctor")

    assert (nothing.code, looked.code) == (0, 0)
    assert "Nothing is kept in" in nothing.err
    assert "Documents_768" in looked.out
    assert "Nothing is wrong." in looked.err


async def test_what_is_wrong_is_said_with_the_next_command_and_that_helps(sekha):
    sekha.write("docs/a.md", "# Holds\n\nA hold sets money aside.\n")
    await sekha("ingest", "docs")
    damage(sekha, "UPDATE vectors_1 SET vector = zeroblob(768 * 4)")

    looked = await sekha("doctor")
    as_json = await sekha("doctor", "--json")
    repaired = await sekha("doctor", "--repair", "vectors", "--collection", "documents")
    after = await sekha("doctor")

    assert looked.code == 6
    assert "Documents_768: 1 record without a sound vector: it is zero" in looked.out
    assert "next: sekha doctor --repair vectors --collection documents" in looked.out
    assert as_json.code == 6
    assert [each["kind"] for each in as_json.json["findings"]] == ["vectors"]
    assert repaired.code == 0
    assert "Embedded anew: 1 record" in repaired.err
    assert after.code == 0


async def test_nothing_is_deleted_without_a_yes(sekha):
    sekha.write("docs/a.md", "The very same text.")
    sekha.write("docs/b.md", "The very same text.")
    await sekha("ingest", "docs")

    refused = await sekha("doctor", "--repair", "duplicates")
    told = await sekha("doctor")
    deleted = await sekha("doctor", "--repair", "duplicates", "--yes")

    assert refused.code == 2
    assert "--yes" in refused.err
    assert told.code == 0
    assert "with the same text as another" in told.out
    assert "Deleted: 1 record" in deleted.err


async def test_a_collection_that_is_not_there_is_answered_with_the_nearest(sekha):
    sekha.write("docs/a.md", "A text.")
    await sekha("ingest", "docs")

    ended = await sekha("doctor", "--collection", "documnets")

    assert ended.code == 4
    assert "Did you mean 'documents'?" in ended.err
