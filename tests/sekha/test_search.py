from __future__ import annotations

from typing import Any

import pytest

from sekha.documents import Document
from sekha.errors import CollectionMissing, CostRefused, InvalidRequest, ProviderUnavailable, SpaceMismatch
from sekha.search import SearchRequest
from sekha.vectors.base import Compare
from tests.fixtures.pipeline import TWO_PROVIDERS, Opens

DOCUMENTS = [
    Document(source="cats.md", text="Cats sleep on warm windowsills."),
    Document(source="ships.md", text="Container ships cross the ocean."),
]
MORE = Document(source="planes.md", text="Planes cross the sky.")


async def test_what_is_nearest_comes_first(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)

        found = await opened.runtime.search("Container ships cross the ocean.")

        assert [hit.properties["source"] for hit in found.hits] == ["ships.md", "cats.md"]
        assert found.hits[0].similarity == pytest.approx(1, abs=1e-6)
        assert (found.collection, found.space, found.dimension) == ("documents", "Documents_8", 8)
        assert (found.provider_id, found.model_id) == ("first", "vectors")


async def test_asking_is_paid_for(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)
        before = await opened.spent()

        found = await opened.runtime.search("ships")

        assert await opened.spent() - before == found.cost > 0
        assert await opened.held() == 0


async def test_results_can_be_limited_filtered_and_required_to_be_near(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)

        one = await opened.runtime.search("ships", limit=1)
        cats = await opened.runtime.search("ships", where=Compare("source", "eq", "cats.md"))
        near = await opened.runtime.search("Cats sleep on warm windowsills.", min_similarity=0.999)

        assert len(one.hits) == 1
        assert [hit.properties["source"] for hit in cats.hits] == ["cats.md"]
        assert [hit.properties["source"] for hit in near.hits] == ["cats.md"]


async def test_the_question_falls_back_to_another_provider_of_the_same_model(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)
        opened.actors["first"].acts = [ProviderUnavailable(provider_id="first")]

        assert (await opened.runtime.search("ships")).provider_id == "second"


async def test_a_collection_in_which_nothing_is_kept_is_said_before_anyone_is_paid(pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(CollectionMissing):
            await opened.runtime.search("ships", collection="notes")

        assert opened.actors["first"].embedded == []


async def test_what_only_models_embedded_that_are_no_longer_listed_cannot_be_searched(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)

    async with pipeline(TWO_PROVIDERS.replace("vectors", "others")) as opened:
        with pytest.raises(SpaceMismatch) as caught:
            await opened.runtime.search("ships")

        assert (caught.value.stored, caught.value.wanted) == ("openai/vectors:8:unit", "openai/others:8:unit")
        assert opened.actors["first"].embedded == []


@pytest.mark.parametrize(
    ("fields", "field"), [({"query": ""}, "query"), ({"query": " "}, "query"), ({"query": "a", "limit": 0}, "limit")]
)
def test_a_malformed_search_names_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SearchRequest(**fields)

    assert caught.value.field == field


def test_no_question_shows_when_printed() -> None:
    assert "secret" not in repr(SearchRequest(query="a secret"))


# --- several spaces ------------------------------------------------------------------------

TWO_MODELS = TWO_PROVIDERS.replace(
    "  - id: second",
    """      - {model_id: others, task: embedding, dimension: 8, price: {input_per_million: 1000}}
      - {model_id: long, task: embedding, dimension: 16, price: {input_per_million: 1000}}
  - id: second""",
)


def under(model: str) -> str:
    return TWO_MODELS.replace("documents: {model: vectors}", f"documents: {{model: {model}}}")


async def ingested(pipeline: Opens, **documents: list[Document]) -> None:
    """Keep the documents in one collection, each list under another model."""
    for model, those in documents.items():
        async with pipeline(under(model)) as opened:
            await opened.runtime.ingest(those)


async def test_every_space_of_a_collection_is_searched_and_merged_by_rank(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS[:1], others=DOCUMENTS[1:], long=[MORE])
    async with pipeline(under("vectors")) as opened:
        found = await opened.runtime.search("Container ships cross the ocean.", limit=2)
        every = await opened.runtime.search("Container ships cross the ocean.")

    assert [(hit.space, hit.ranks.rank, hit.ranks.of) for hit in every.hits] == [
        ("Documents_8", 1, 1),
        ("Documents_16", 1, 1),
        ("Documents_8_others", 1, 1),
    ]
    assert found.hits == every.hits[:2]
    assert [answer.space for answer in found.answers] == ["Documents_8", "Documents_16", "Documents_8_others"]
    assert [answer.model_id for answer in found.answers] == ["vectors", "long", "others"]
    assert found.cost == sum(answer.cost for answer in found.answers) > 0
    assert found.left_out == ()


async def test_one_dimension_can_be_asked_for(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors")) as opened:
        found = await opened.runtime.search("ships", dimension=16)
        with pytest.raises(InvalidRequest, match="no vectors of 32 numbers; it has 16, 8"):
            await opened.runtime.search("ships", dimension=32)

    assert [answer.space for answer in found.answers] == ["Documents_16"]
    assert {hit.properties["source"] for hit in found.hits} == {"planes.md"}


async def test_a_document_in_two_spaces_is_found_once_where_it_is_written_now(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=DOCUMENTS)
    async with pipeline(under("long")) as opened:
        found = await opened.runtime.search("ships")

    assert [hit.space for hit in found.hits] == ["Documents_16", "Documents_16"]
    assert len({hit.uuid for hit in found.hits}) == 2


async def test_a_space_whose_embedder_is_down_is_left_out_and_named(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors")) as opened:
        opened.actors["first"].acts = [ProviderUnavailable(provider_id="first")] * 9
        opened.actors["second"].acts = []

        found = await opened.runtime.search("ships")

        assert await opened.held() == 0
    assert {hit.space for hit in found.hits} == {"Documents_8"}
    assert [answer.provider_id for answer in found.answers] == ["second"]
    assert [(each.space, "unavailable" in each.why) for each in found.left_out] == [("Documents_16", True)]


async def test_a_search_fails_when_no_space_can_be_asked(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors")) as opened:
        for actor in opened.actors.values():
            actor.acts = [ProviderUnavailable(provider_id="first")] * 9

        with pytest.raises(ProviderUnavailable):
            await opened.runtime.search("ships")

        assert await opened.held() == 0


async def test_a_space_that_no_listed_model_can_be_asked_for_is_left_out_and_named(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors").replace("model_id: long", "model_id: longer")) as opened:
        found = await opened.runtime.search("ships")

    assert {hit.space for hit in found.hits} == {"Documents_8"}
    assert [each.space for each in found.left_out] == ["Documents_16"]
    assert "'openai/long:16:unit'" in found.left_out[0].why


async def test_the_spaces_of_a_search_share_what_it_may_cost(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors")) as opened:
        whole = await opened.runtime.search("ships")

        enough = await opened.runtime.search("ships", max_cost=4 * whole.estimated_cost)
        with pytest.raises(CostRefused) as caught:
            await opened.runtime.search("ships", max_cost=whole.estimated_cost / 2)

    assert caught.value.limit == whole.estimated_cost / 4
    assert enough.hits == whole.hits


async def test_a_filter_holds_in_every_space_and_sizes_are_of_what_it_matches(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS, long=[MORE])
    async with pipeline(under("vectors")) as opened:
        found = await opened.runtime.search("ships", where=Compare("source", "in", ("cats.md", "planes.md")))

    assert {hit.properties["source"]: hit.ranks.of for hit in found.hits} == {"cats.md": 1, "planes.md": 1}


async def test_words_are_looked_for_too_when_asked(pipeline: Opens) -> None:
    await ingested(pipeline, vectors=DOCUMENTS)
    async with pipeline(under("vectors")) as opened:
        found = await opened.runtime.search("WINDOWSILLS", hybrid=True)

    assert found.hits[0].properties["source"] == "cats.md"
    assert found.hits[0].ranks.by_words == 1
    assert found.hits[1].ranks.by_words is None
