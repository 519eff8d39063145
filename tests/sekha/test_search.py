from __future__ import annotations

from typing import Any

import pytest

from sekha.documents import Document
from sekha.errors import CollectionMissing, InvalidRequest, ProviderUnavailable, SpaceMismatch
from sekha.search import SearchRequest
from sekha.vectors.base import Compare
from tests.fixtures.pipeline import TWO_PROVIDERS, Opens

DOCUMENTS = [
    Document(source="cats.md", text="Cats sleep on warm windowsills."),
    Document(source="ships.md", text="Container ships cross the ocean."),
]


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


async def test_an_index_of_another_model_is_never_searched(pipeline: Opens) -> None:
    async with pipeline() as opened:
        await opened.runtime.ingest(DOCUMENTS)

    async with pipeline(TWO_PROVIDERS.replace("vectors", "others")) as opened:
        with pytest.raises(SpaceMismatch) as caught:
            await opened.runtime.search("ships")

        assert (caught.value.stored, caught.value.wanted) == ("vectors:8", "others:8")
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
