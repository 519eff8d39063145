from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import sekha
from sekha.documents import Document
from sekha.errors import (
    BudgetExceeded,
    ContentRefused,
    CostRefused,
    DimensionMismatch,
    DocumentRefused,
    IngestIncomplete,
    InvalidRequest,
    ProviderAuthFailed,
    ProviderUnavailable,
)
from sekha.ingest import IngestReport, IngestRequest
from sekha.testing import StandIn
from sekha.vectors.base import Collection
from tests.fixtures.pipeline import TWO_PROVIDERS, Opens, Pipeline

EACH = Decimal("0.01")
"""What one call costs at the first provider: its actors report ten tokens, at $1,000 a million."""

ROOT = Path(__file__).resolve().parents[2]


def sections(source: str, count: int, *, word: str = "text") -> Document:
    """A document that splits into as many chunks."""
    return Document(source=source, text="\n\n".join(f"# {number}\n\n{word} {number}" for number in range(count)))


async def stored(opened: Pipeline) -> dict[tuple[str, int], str]:
    """Source and position → text, of everything in the collection."""
    store = await opened.runtime.resources.store()
    records: AsyncIterator[Any] = store.scan("Documents_8")
    return {
        (str(record.properties["source"]), int(record.properties["chunk"])): record.text
        async for page in records
        for record in page
    }


async def ingest(opened: Pipeline, *documents: Document, **fields: Any) -> IngestReport:
    return await opened.runtime.ingest(documents, **{"batch_size": 2, **fields})


def embedded(opened: Pipeline) -> list[str]:
    return [text for texts in opened.actors["first"].embedded for text in texts]


# --- what is done, and what is not done twice ----------------------------------------------


async def test_documents_are_kept_with_where_they_come_from(pipeline: Opens) -> None:
    async with pipeline() as opened:
        report = await ingest(opened, sections("a.md", 3), sections("b.md", 2))

        assert (report.space, report.documents, report.chunks, report.embedded) == ("Documents_8", 2, 5, 5)
        assert (await stored(opened))["a.md", 1] == "# 1\ntext 1"
        store = await opened.runtime.resources.store()
        (hit,) = (await opened.runtime.search("text 1", limit=1)).hits
        assert hit.properties["heading"] == "1"
        assert (await store.describe("Documents_8")).fingerprint == "openai/vectors:8:unit"
        assert await store.alias_target("Documents") == "Documents_8"


async def test_the_money_on_record_is_that_of_the_calls_that_were_made(pipeline: Opens) -> None:
    async with pipeline() as opened:
        report = await ingest(opened, sections("a.md", 5))

        assert len(opened.actors["first"].embedded) == 3
        assert await opened.spent() == report.cost == 3 * EACH
        assert await opened.held() == 0


async def test_more_than_a_minute_lets_pass_takes_more_than_a_minute(pipeline: Opens) -> None:
    """Each batch is about 12 tokens, of which all together are 60."""
    limited = TWO_PROVIDERS.replace("    priority: 1\n", "    priority: 1\n    limits: {tokens_per_minute: 30}\n")
    config = limited.replace("{model: vectors}", "{model: first/vectors}")
    async with pipeline(config) as opened:
        opened.actors["first"].acts = [None] * 5

        report = await ingest(opened, sections("a.md", 10))

        assert (report.embedded, report.failures) == (10, ())
        assert sorted(embedded(opened)) == sorted(f"# {number}\ntext {number}" for number in range(10))
        assert 120 < opened.time.seconds - 1000 < 200


async def test_the_same_text_again_costs_nothing(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 5))
        before = embedded(opened)

        report = await ingest(opened, sections("a.md", 5))

        assert (report.unchanged, report.embedded, report.cost, report.provider_id) == (5, 0, 0, None)
        assert embedded(opened) == before
        assert await opened.spent() == 3 * EACH


async def test_only_the_chunks_that_changed_are_embedded_again(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 5))
        opened.actors["first"].embedded.clear()
        changed = Document(source="a.md", text=sections("a.md", 5).text.replace("text 3", "other 3"))

        report = await ingest(opened, changed)

        assert embedded(opened) == ["# 3\nother 3"]
        assert (report.embedded, report.unchanged) == (1, 4)
        assert (await stored(opened))["a.md", 3] == "# 3\nother 3"


async def test_a_document_that_shrank_loses_the_chunks_it_no_longer_has(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 100), sections("b.md", 3), batch_size=50)

        report = await ingest(opened, sections("a.md", 2))

        assert (report.removed, report.unchanged) == (98, 2)
        assert sorted(await stored(opened)) == [("a.md", 0), ("a.md", 1), *(("b.md", at) for at in range(3))]


async def test_a_document_that_shrank_and_changed_loses_them_too(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 4))

        report = await ingest(opened, sections("a.md", 2, word="new"))

        assert (report.removed, report.embedded) == (2, 2)
        assert await stored(opened) == {("a.md", 0): "# 0\nnew 0", ("a.md", 1): "# 1\nnew 1"}


async def test_stale_chunks_are_found_behind_the_gap_that_a_failure_left(pipeline: Opens) -> None:
    async with pipeline(rounds=1) as opened:
        # The first half is refused by its content, and what follows it is stored.
        opened.actors["first"].acts = [ContentRefused(provider_id="first")]
        with pytest.raises(IngestIncomplete):
            await ingest(opened, sections("a.md", 100), batch_size=50)
        assert sorted(await stored(opened))[0] == ("a.md", 50)

        report = await ingest(opened, sections("a.md", 2))

        assert report.removed == 50
        assert sorted(await stored(opened)) == [("a.md", 0), ("a.md", 1)]


async def test_progress_is_told_after_every_batch(pipeline: Opens) -> None:
    told: list[tuple[int, int]] = []

    async with pipeline() as opened:
        await opened.runtime.ingest([sections("a.md", 5)], progress=lambda *at: told.append(at), batch_size=2)

    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    assert len(told) == 4


async def test_a_folder_is_ingested_under_names_that_do_not_depend_on_where_it_is(
    pipeline: Opens, tmp_path_factory: pytest.TempPathFactory
) -> None:
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    async with pipeline() as opened:
        for folder in (here, there):
            (folder / "a.md").write_text("text")

        await opened.runtime.ingest(here)
        report = await opened.runtime.ingest(there)

        assert (report.unchanged, report.embedded) == (1, 0)


async def test_another_collection_is_another_index_entry(pipeline: Opens) -> None:
    two = TWO_PROVIDERS.replace("documents: {model: vectors}", "documents: {model: vectors}\n  notes: {model: vectors}")

    async with pipeline(two) as opened:
        await ingest(opened, sections("a.md", 1))
        report = await opened.runtime.ingest([sections("a.md", 1)], "notes")

        assert (report.space, report.embedded) == ("Notes_8", 1)


# --- what fails ----------------------------------------------------------------------------


async def test_a_provider_that_fails_midway_loses_nothing_and_a_second_run_finishes_it(pipeline: Opens) -> None:
    document = sections("a.md", 20)

    async with pipeline(rounds=1) as opened:
        opened.actors["first"].acts = [lambda: None] * 3 + [ProviderUnavailable(provider_id="first")] * 9
        opened.actors["second"].acts = [ProviderUnavailable(provider_id="second")] * 9

        with pytest.raises(IngestIncomplete) as caught:
            await ingest(opened, document)

        report = caught.value.report
        assert report.embedded + report.missing == report.chunks == 20
        assert report.embedded == len(await stored(opened)) >= 4
        assert {failure.source for failure in report.failures} == {"a.md"}
        assert isinstance(caught.value.__cause__, ProviderUnavailable)
        assert await opened.spent() == report.cost == 3 * EACH
        assert await opened.held() == 0

        for actor in opened.actors.values():
            actor.acts = []
        second = await ingest(opened, document)

        assert (second.embedded, second.unchanged) == (report.missing, report.embedded)
        assert len(await stored(opened)) == 20


async def test_a_provider_that_is_down_is_not_asked_for_every_batch(pipeline: Opens) -> None:
    async with pipeline(rounds=1) as opened:
        opened.actors["first"].acts = [ProviderAuthFailed(provider_id="first")] * 99
        opened.actors["second"].acts = [ProviderAuthFailed(provider_id="second")] * 99

        with pytest.raises(IngestIncomplete) as caught:
            await ingest(opened, sections("a.md", 40))

        assert len(opened.actors["first"].embedded) <= 2  # those under way when the first failed
        assert caught.value.report.missing == 40


async def test_a_dimension_that_differs_stops_it_before_it_costs_more(pipeline: Opens) -> None:
    wrong = DimensionMismatch(wanted=8, returned=4, provider_id="first", model_id="vectors")

    async with pipeline() as opened:
        opened.actors["first"].acts = [wrong] * 99

        with pytest.raises(IngestIncomplete, match=r"Write `dimension: 4` for this model.* Mend that, then") as caught:
            await ingest(opened, sections("a.md", 40))

        assert not caught.value.retryable
        calls = len(opened.actors["first"].embedded)
        assert calls <= 2
        assert await opened.spent() > 0
        store = await opened.runtime.resources.store()
        assert await store.list_collections() == []


async def test_what_is_wrong_with_one_batch_leaves_the_others_to_be_kept(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [ContentRefused(provider_id="first")]

        with pytest.raises(IngestIncomplete) as caught:
            await ingest(opened, sections("a.md", 10))

        assert (caught.value.report.embedded, caught.value.report.missing) == (8, 2)


async def test_stale_chunks_stay_until_the_new_ones_are_stored(pipeline: Opens) -> None:
    async with pipeline(rounds=1) as opened:
        await ingest(opened, sections("a.md", 6))
        opened.actors["first"].acts = [ContentRefused(provider_id="first")]

        with pytest.raises(IngestIncomplete):
            await ingest(opened, sections("a.md", 2, word="new"))

        assert len(await stored(opened)) == 6


async def test_another_provider_stands_in_and_both_are_paid(pipeline: Opens) -> None:
    async with pipeline(rounds=1) as opened:
        opened.actors["first"].acts = [lambda: None, ProviderUnavailable(provider_id="first")]

        report = await ingest(opened, sections("a.md", 4))

        assert report.embedded == 4
        assert await opened.spent() == report.cost == EACH + 3 * EACH


async def test_a_caller_who_leaves_midway_leaves_no_hold_and_loses_nothing_stored(pipeline: Opens) -> None:
    async with pipeline() as opened:
        third = asyncio.Event()

        async def hang() -> None:
            third.set()
            await asyncio.Event().wait()

        opened.actors["first"].acts = [lambda: None, lambda: None, hang, hang]
        task = asyncio.create_task(ingest(opened, sections("a.md", 20)))
        await third.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await opened.held() == 0
        kept = len(await stored(opened))
        opened.actors["first"].acts = []

        report = await ingest(opened, sections("a.md", 20))

        # A batch that was being written when the caller left is whole, and may have come in since.
        assert report.unchanged >= kept
        assert len(await stored(opened)) == 20


# --- what is refused before anything is written --------------------------------------------


async def nothing_happened(opened: Pipeline) -> bool:
    store = await opened.runtime.resources.store()
    untouched = await store.list_collections() == [] and embedded(opened) == []
    return untouched and await opened.held() == await opened.spent() == 0


@pytest.mark.parametrize(
    "bad",
    [
        Document(source="bad.md", text=""),
        Document(source="bad.md", text="\0"),
        Document(source="bad.md", text="\ud800"),
        Document(source="bad.md", text="x" * 50_000_000),
    ],
    ids=["empty", "binary", "half a character", "50 MB"],
)
async def test_one_bad_document_refuses_all_and_writes_nothing(bad: Document, pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(DocumentRefused, match=r"1 document cannot be ingested, and nothing was stored"):
            await ingest(opened, sections("a.md", 2), bad)

        assert await nothing_happened(opened)


async def test_bad_documents_are_left_out_on_demand(pipeline: Opens) -> None:
    async with pipeline() as opened:
        report = await ingest(opened, sections("a.md", 2), Document(source="b.md", text=""), skip_refused=True)

        assert (report.documents, report.embedded) == (1, 2)
        assert [(each.source, each.why) for each in report.left_out] == [
            ("b.md", "it is empty: write something, or leave it out")
        ]


async def test_a_document_that_is_handed_over_and_in_the_folder_is_refused(pipeline: Opens, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    request = IngestRequest(path=str(tmp_path / "a.md"), documents=(sections("a.md", 1),))

    async with pipeline() as opened:
        with pytest.raises(DocumentRefused, match="two documents have this source"):
            await opened.runtime.ingest(request)


async def test_what_a_budget_cannot_pay_as_a_whole_is_not_begun(pipeline: Opens) -> None:
    async with pipeline(TWO_PROVIDERS.replace("limit: 100", "limit: 0.01")) as opened:
        with pytest.raises(BudgetExceeded):
            await ingest(opened, sections("a.md", 40))

        assert await nothing_happened(opened)


async def test_what_the_caller_will_not_pay_is_not_begun(pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(CostRefused):
            await ingest(opened, sections("a.md", 40), max_cost=Decimal("0.001"))

        assert await nothing_happened(opened)


async def test_the_limit_on_one_request_does_not_stop_an_ingest(pipeline: Opens) -> None:
    async with pipeline(TWO_PROVIDERS + "routing: {max_cost_per_request: 0.001}\n") as opened:
        assert (await ingest(opened, sections("a.md", 40))).embedded == 40


async def test_another_models_vectors_are_never_mixed_into_an_index(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 2))

    async with pipeline(TWO_PROVIDERS.replace("vectors", "others")) as opened:
        report = await ingest(opened, sections("a.md", 2))

        store = await opened.runtime.resources.store()
        assert (report.space, report.embedded) == ("Documents_8_others", 2)
        assert {each.name: each.fingerprint for each in await store.list_collections()} == {
            "Documents_8": "openai/vectors:8:unit",
            "Documents_8_others": "openai/others:8:unit",
        }
        assert await store.alias_target("Documents") == "Documents_8"


async def test_a_model_that_a_gateway_gave_another_name_goes_on_in_its_index(pipeline: Opens) -> None:
    renamed = TWO_PROVIDERS.replace("model_id: vectors,", "model_id: gw-vectors, same_as: openai/vectors,")
    async with pipeline() as opened:
        await ingest(opened, sections("a.md", 2))

    async with pipeline(renamed.replace("{model: vectors}", "{model: gw-vectors}")) as opened:
        report = await ingest(opened, sections("a.md", 2))

        assert (report.space, report.unchanged) == ("Documents_8", 2)


async def test_an_index_that_the_first_version_made_goes_on(pipeline: Opens) -> None:
    async with pipeline() as opened:
        store = await opened.runtime.resources.store()
        await store.ensure_collection(Collection("Documents_8", 8, "vectors:8"))

        first = await ingest(opened, sections("a.md", 2))
        again = await ingest(opened, sections("a.md", 2))

        assert (first.space, first.embedded, again.unchanged) == ("Documents_8", 2, 2)


async def test_a_text_is_embedded_behind_the_prefix_that_its_model_wants(pipeline: Opens) -> None:
    prefixes = "document_prefix: 'passage: ', query_prefix: 'query: '"
    config = TWO_PROVIDERS.replace("dimension: 8,", f"dimension: 8, {prefixes},")
    async with pipeline(config) as opened:
        await ingest(opened, Document(source="a.md", text="Cats sleep."))
        await opened.runtime.search("Who sleeps?")

        assert opened.actors["first"].embedded == [("passage: Cats sleep.",), ("query: Who sleeps?",)]
        assert (await stored(opened))["a.md", 0] == "Cats sleep."


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "documents"),
        ({"path": "x", "collection": "my docs"}, "collection"),
        ({"path": "x", "collection": "1st"}, "collection"),
        ({"path": "x", "chunk_size": 0}, "chunk_size"),
        ({"path": "x", "chunk_overlap": -1}, "chunk_overlap"),
        ({"path": "x", "chunk_size": 100, "chunk_overlap": 51}, "chunk_overlap"),
        ({"path": "x", "batch_size": 0}, "batch_size"),
    ],
)
def test_a_malformed_request_names_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        IngestRequest(**fields)

    assert caught.value.field == field


# --- over real HTTP ------------------------------------------------------------------------

STANDIN = """
providers:
  - id: openai
    provider_type: openai
    base_url: {url}
    api_key: ${{KEY}}
    models:
      - {{model_id: text-embedding-3-small, task: embedding, dimension: 1536, price: {{input_per_million: 1000}}}}
collections:
  documents: {{model: text-embedding-3-small}}
"""


async def test_an_ingest_over_http_survives_its_providers_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-stand-in")
    async with StandIn() as standin:
        (tmp_path / "sekha.yaml").write_text(STANDIN.format(url=standin.openai_url))
        async with sekha.open(tmp_path / "sekha.yaml") as s:
            standin.fail(401, times=None)
            with pytest.raises(IngestIncomplete) as caught:
                await s.ingest([sections("a.md", 6)], batch_size=2)
            assert caught.value.report.missing == 6
            assert "sk-stand-in" not in str(caught.value)

            standin.heal()
            standin.requests.clear()
            report = await s.ingest([sections("a.md", 6)], batch_size=2)

            assert report.embedded == 6
            assert len(standin.requests) == 3
            used = sum(len(text.split()) for request in standin.requests for text in request.json["input"])
            assert report.cost == Decimal(used) / 1000
            (line,) = await (await s.resources.ledger()).report("model")
            assert (line.calls, line.cost) == (3, report.cost)


async def test_vectors_of_another_length_than_declared_are_never_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-stand-in")
    async with StandIn() as standin:
        (tmp_path / "sekha.yaml").write_text(STANDIN.format(url=standin.openai_url))
        standin.wrong_dimension(768)
        async with sekha.open(tmp_path / "sekha.yaml") as s:
            with pytest.raises(IngestIncomplete, match="Write `dimension: 768` for this model"):
                await s.ingest([sections("a.md", 1)])

            assert await (await s.resources.store()).list_collections() == []
            (line,) = await (await s.resources.ledger()).report("model")

    assert line.cost > 0, "the provider takes money for vectors that nobody can use"


# --- kill -9 -------------------------------------------------------------------------------

BUILTIN = """
providers:
  - {id: builtin, provider_type: builtin, models: [{model_id: hashed-8, task: embedding, dimension: 8}]}
collections:
  documents: {model: hashed-8}
"""


def run(config: Path, folder: Path, kill_after: int) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "fixtures" / "ingester.py"
    return subprocess.run(
        [sys.executable, str(script), str(config), str(folder), str(kill_after)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def killed_and_resumed(folder: Path, kills: list[int]) -> None:
    config, documents = folder / "sekha.yaml", folder / "docs"
    config.write_text(BUILTIN)
    documents.mkdir()
    for name in ("a", "b"):
        (documents / f"{name}.md").write_text(sections("", 20, word=name).text)

    least = 0
    for kill in kills:
        assert run(config, documents, kill).returncode == -9
        async with sekha.open(config) as s:
            kept = await (await s.resources.store()).count("Documents_8")
        assert kept >= least + kill  # what was told as done is stored
        least = kept
    last = run(config, documents, 1000)

    assert last.returncode == 0, last.stderr
    assert last.stdout.splitlines()[-1] == f"{40 - least} {least}"
    async with sekha.open(config) as s:
        assert await (await s.resources.store()).count("Documents_8") == 40
        for text in ("a 7", "b 19"):
            assert (await s.search(f"# {text.split()[1]}\n{text}", limit=1)).hits[0].text.endswith(text)


async def test_a_killed_ingest_goes_on_where_it_was(tmp_path: Path) -> None:
    await killed_and_resumed(tmp_path, [12])


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10))
async def test_an_ingest_killed_again_and_again_ends_whole(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    await killed_and_resumed(tmp_path, [chance.choice([1, 4, 5, 8]) for _ in range(3)])
