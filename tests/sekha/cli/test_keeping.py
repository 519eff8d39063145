from __future__ import annotations

import pytest

from sekha.testing import StandIn

DOCUMENT = "# Holds\n\nA hold sets money aside before a call.\n\n# Breakers\n\nA breaker leaves a provider alone.\n"


def embedding_provider(stand_in: StandIn) -> str:
    return f"""
providers:
  - id: far
    provider_type: openai
    base_url: {stand_in.openai_url}
    api_key: ${{OPENAI_API_KEY}}
    models:
      - {{model_id: text-embedding-3-small, task: embedding, dimension: 1536}}
"""


async def test_a_dry_run_prices_and_stores_nothing(sekha):
    sekha.write("docs/a.md", DOCUMENT)

    shown = await sekha("ingest", "docs", "--dry-run")
    planned = (await sekha("ingest", "docs", "-n", "--json")).json

    assert shown.code == 0
    assert "Nothing was embedded or stored." in shown.err
    assert planned["to_embed"] == planned["chunks"] == 2
    assert planned["estimated_cost"] == 0


async def test_what_is_ingested_is_found_and_a_second_time_costs_nothing(sekha):
    sekha.write("docs/a.md", DOCUMENT)
    sekha.write("docs/b.txt", "Nothing of the sort.")

    first = (await sekha("ingest", "docs", "--json")).json
    second = await sekha("ingest", "docs")
    found = (await sekha("search", "money set aside by a hold", "--json", "--limit", "1")).json

    assert (first["embedded"], first["space"]) == (3, "Documents_768")
    assert "0 embedded, 3 unchanged" in second.out
    assert found["hits"][0]["properties"]["heading"] == "Holds"
    assert found["hits"][0]["similarity"] > 0.2


async def test_a_search_may_name_its_sources_and_a_least_similarity(sekha):
    sekha.write("docs/a.md", DOCUMENT)
    sekha.write("docs/b.md", "# Holds\n\nMoney set aside by a hold, again.\n")
    await sekha("ingest", "docs")

    only = (await sekha("search", "hold", "--source", "docs/a.md", "--json")).json
    none = await sekha("search", "hold", "--min-similarity", "0.99")

    assert {hit["properties"]["source"] for hit in only["hits"]} == {"docs/a.md"}
    assert none.code == 0
    assert none.out == ""
    assert "Nothing found" in none.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ingest", "nope"], 4, "nope: it cannot be read"),
        (["ingest", "docs"], 4, "binary"),
        (["ingest", "docs", "--chunk-overlap", "2000"], 2, "less than --chunk-size"),
        (["ingest", "docs", "--flow", "--dry-run"], 2, "leave out one"),
        (["search", " "], 4, "empty"),
        (["search", "hold", "--collection", "nope"], 6, "No collection"),
    ],
)
async def test_what_cannot_be_done_says_why(sekha, arguments, code, says):
    sekha.write("docs/a.md", "\0\0\0")

    ended = await sekha(*arguments)

    assert ended.code == code
    assert says in ended.err
    assert ended.out == ""


async def test_refused_documents_may_be_left_out(sekha):
    sekha.write("docs/a.md", DOCUMENT)
    sekha.write("docs/b.md", "\0\0\0")

    ended = await sekha("ingest", "docs", "--skip-refused", "--json")

    assert ended.json["documents"] == 1


async def test_an_incomplete_ingest_lists_what_is_missing_and_is_finished_by_a_second(sekha):
    async with StandIn() as provider:
        provider.omit_usage()
        provider.fail(401, times=None)
        sekha.write("sekha.yaml", embedding_provider(provider))
        sekha.write("docs/a.md", DOCUMENT)
        sekha.write("docs/b.md", DOCUMENT)

        first = await sekha("ingest", "docs", "--batch-size", "1")
        provider.heal()
        second = await sekha("ingest", "docs", "--batch-size", "1", "--json")

    assert first.code == 8
    assert "b.md: 2 chunks" in first.err
    assert "run the same ingest again" in first.err
    assert second.code == 0
    assert second.json["unchanged"] >= 1
    assert second.json["embedded"] + second.json["unchanged"] == 4


async def test_interrupting_an_ingest_says_what_is_stored(sekha):
    async with StandIn() as provider:
        provider.hang(times=None)
        sekha.write("sekha.yaml", embedding_provider(provider))
        sekha.write("docs/a.md", DOCUMENT)

        ended = await sekha("ingest", "docs", interrupt_when=lambda: len(provider.requests) > 0)

    assert ended.code == 130
    assert "0 of 2 chunks are stored" in ended.err
    assert "run the same again" in ended.err
