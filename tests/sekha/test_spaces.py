from __future__ import annotations

import pytest

from sekha.registry import Model, Space
from sekha.spaces import alias_of, index_for, indexes_of
from sekha.vectors.base import Collection


def space(name: str = "nomic", dimension: int = 768, collection: str = "notes", **fields: str) -> Space:
    makes = fields.pop("makes", f"ollama/{name}")
    return Space(
        collection, Model(id=name, provider_id="p", tasks=("embedding",), dimension=dimension, makes=makes, **fields)
    )


def test_the_first_space_of_a_dimension_has_its_name() -> None:
    assert index_for(space(), ()) == Collection("Notes_768", 768, "ollama/nomic:768:unit")


def test_a_second_model_of_a_dimension_has_an_index_of_its_own() -> None:
    first = index_for(space("bge"), ())

    second = index_for(space("BAAI/bge-base:v1.5"), [first])

    assert second.name == "Notes_768_baai_bge_base_v1_5"
    assert index_for(space("BAAI/bge-base:v1.5"), [first, second]) == second
    assert index_for(space("bge"), [first, second]) == first


def test_a_revision_and_a_prefix_have_indexes_of_their_own() -> None:
    there: list[Collection] = []
    for each in (space(), space(makes="ollama/nomic@2"), space(document_prefix="passage: "), space("b")):
        there.append(index_for(each, there))

    assert len({index.name for index in there}) == len({index.fingerprint for index in there}) == 4
    assert [index_for(each, there) for each in (space(), space("b"))] == [there[0], there[3]]


@pytest.mark.parametrize("name", ["3-small", "768", "日本", "!"])
def test_an_index_of_any_model_is_known_for_its_collections(name: str) -> None:
    there = [index_for(space("first"), ())]
    there.append(index_for(space(name), there))

    assert len(indexes_of("notes", there)) == 2


def test_a_collection_is_not_taken_for_another_whose_name_goes_on() -> None:
    there = [
        Collection("Reports_768", 768, "m:768"),
        Collection("Reports_2024_768", 768, "m:768"),
        Collection("Reports_2024_bge_1024", 1024, "m:1024"),
    ]

    assert [index.name for index in indexes_of("reports", there)] == ["Reports_768"]
    assert [index.name for index in indexes_of("reports_2024", there)] == ["Reports_2024_768"]
    assert [index.name for index in indexes_of("reports_2024_bge", there)] == ["Reports_2024_bge_1024"]


def test_vectors_that_the_first_version_kept_are_known_again() -> None:
    kept = Collection("Notes_768", 768, "nomic:768")

    assert index_for(space(), [kept]) == kept
    assert index_for(space(document_prefix="passage: "), [kept]).name == "Notes_768_nomic"


def test_an_alias_is_a_collections_name_with_a_capital() -> None:
    assert alias_of("conversations") == "Conversations"
