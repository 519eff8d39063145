from __future__ import annotations


async def test_what_was_backed_up_is_listed_and_comes_back(sekha):
    sekha.write("docs/a.md", "# Holds\n\nA hold sets money aside.\n")
    sekha.write("docs/b.md", "# Breakers\n\nA breaker leaves a provider alone.\n")
    await sekha("ingest", "docs")

    made = await sekha("backup", "first")
    listed = await sekha("backups")
    as_json = (await sekha("backups", "--json")).json
    sekha.write("docs/c.md", "A third.")
    await sekha("ingest", "docs")
    shown = await sekha("restore", "first", "--dry-run")
    refused = await sekha("restore", "first")
    restored = await sekha("restore", "first", "--yes")
    found = (await sekha("search", "A third.", "--json")).json

    assert (made.code, listed.code, shown.code, refused.code, restored.code) == (0, 0, 0, 6, 0)
    assert "Documents_768: 2 records" in made.out
    assert "It was read back." in made.err
    assert "first" in listed.out
    assert [(each["name"], each["rotates"]) for each in as_json["backups"]] == [("first", False)]
    assert "3 records in Documents_768" in shown.out
    assert "Nothing was restored." in shown.err
    assert "--yes" in refused.err
    assert "sekha restore before-restore-" in restored.err
    assert len(found["hits"]) == 2


async def test_a_backup_that_is_not_there_is_answered_with_the_nearest(sekha):
    sekha.write("docs/a.md", "A text.")
    await sekha("ingest", "docs")
    await sekha("backup", "first")

    ended = await sekha("restore", "fist")

    assert ended.code == 6
    assert "Did you mean 'first'?" in ended.err


async def test_of_those_without_a_name_the_latest_stay(sekha):
    sekha.write("docs/a.md", "A text.")
    await sekha("ingest", "docs")

    await sekha("backup", "named")
    first = (await sekha("backup", "--keep", "1", "--json")).json
    second = (await sekha("backup", "--keep", "1", "--json")).json
    left = (await sekha("backups", "--json")).json["backups"]

    assert second["deleted"] == [first["manifest"]["name"]]
    assert {each["name"] for each in left} == {"named", second["manifest"]["name"]}
