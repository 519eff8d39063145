from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.merging import Ranked, fuse, merge

RANKINGS = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), unique=True), st.integers(0, 1000)),
    min_size=1,
    max_size=4,
)


def uuids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{n:03}" for n in range(count)]


def test_a_tenth_of_the_documents_gets_a_tenth_of_the_places() -> None:
    places = merge([Ranked(uuids("old", 100), 900), Ranked(uuids("new", 100), 100)], 50)

    assert sum(place.at == 1 for place in places) == 5


def test_places_go_by_size_whatever_order_the_lists_come_in() -> None:
    one, other = Ranked(uuids("a", 20), 300), Ranked(uuids("b", 20), 100)

    assert {place.uuid for place in merge([one, other], 12)} == {place.uuid for place in merge([other, one], 12)}


def test_a_document_in_two_lists_is_counted_in_the_first() -> None:
    places = merge([Ranked(["x", "y"], 2), Ranked(["x", "z"], 2)], 10)

    assert [(place.uuid, place.at, place.rank) for place in places if place.uuid != "y"] == [("x", 0, 1), ("z", 1, 1)]


def test_a_copy_of_the_first_list_changes_nothing() -> None:
    ranked = Ranked(uuids("a", 30), 500)

    places = merge([ranked, ranked], 10)

    assert [place.uuid for place in places] == ranked.uuids[:10]


@given(RANKINGS, st.integers(1, 50))
def test_nothing_is_lost_doubled_or_put_before_what_its_own_space_ranks_higher(
    lists: list[tuple[list[str], int]], limit: int
) -> None:
    ranked = [Ranked(*each) for each in lists]

    places = merge(ranked, limit)

    every = {uuid for each in ranked for uuid in each.uuids}
    assert len({place.uuid for place in places}) == len(places) == min(limit, len(every))
    for at, each in enumerate(ranked):
        mine = [place.uuid for place in places if place.at == at]
        assert mine == [uuid for uuid in each.uuids if uuid in mine]


@given(st.lists(st.text(), unique=True))
def test_one_list_stays_as_it_is(found: list[str]) -> None:
    assert [place.uuid for place in merge([Ranked(found, len(found))], len(found))] == found


def test_what_both_rankings_find_comes_before_what_one_of_them_puts_first() -> None:
    scores = fuse(["a", "b"], ["c", "b"])

    assert list(scores) == ["b", "a", "c"]
    assert scores["b"] == pytest.approx(1 / 62 + 1 / 62)
