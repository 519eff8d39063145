from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.merging import Ranked, fuse, merge, pool

SCORES = st.floats(-1, 1, width=32)
LISTS = st.lists(
    st.tuples(st.dictionaries(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), SCORES), st.integers(0, 1000)),
    min_size=1,
    max_size=4,
)


def ranked(prefix: str, found: int, size: int, *, scale: float = 1.0, above: float = 0.0) -> Ranked:
    """As many as were found in a space whose similarities fall as those of any model do, on a scale of its own."""
    scores = [above + scale * math.sqrt(-math.log((rank - 0.5) / size)) for rank in range(1, found + 1)]
    return Ranked([f"{prefix}{n:03}" for n in range(found)], scores, size)


def test_a_tenth_of_the_documents_gets_a_tenth_of_the_places_whatever_the_scale_of_its_similarities() -> None:
    places = merge([ranked("old", 100, 900, above=0.7), ranked("new", 100, 100, scale=0.01)])

    assert sum(place.at == 1 for place in list(places.values())[:50]) == 5


def test_what_stands_out_in_its_space_comes_before_what_is_only_the_best_of_a_bad_lot() -> None:
    uuids, scores, size = ranked("new", 30, 300)

    stands_out = merge([ranked("old", 30, 900), Ranked(uuids, [scores[0] + 3, *scores[1:]], size)])
    does_not = merge([ranked("old", 30, 900), Ranked(uuids, [scores[1], *scores[1:]], size)])

    assert next(iter(stands_out)) == "new000"
    assert next(iter(does_not)) == "old000"
    assert stands_out["new000"].rank == does_not["new000"].rank == 1


def test_places_do_not_depend_on_the_order_of_lists_that_share_nothing() -> None:
    one, other = ranked("a", 20, 300), ranked("b", 20, 110)

    assert list(merge([one, other])) == list(merge([other, one]))


def test_a_document_in_two_lists_is_judged_by_the_first() -> None:
    places = merge([Ranked(["x", "y"], [0.9, 0.1], 2), Ranked(["z", "x"], [0.9, 0.8], 2)])

    assert {uuid: (place.at, place.rank) for uuid, place in places.items()} == {"x": (0, 1), "y": (0, 2), "z": (1, 1)}


def test_a_copy_of_the_first_list_changes_nothing() -> None:
    one = ranked("a", 30, 500)

    assert list(merge([one, one])) == one.uuids


def test_similarities_that_are_all_alike_leave_the_ranks() -> None:
    places = merge([Ranked(["a", "b"], [0.5, 0.5], 2), Ranked(["c"], [0.9], 1)])

    assert list(places) == ["a", "c", "b"]


def test_a_few_documents_of_which_none_stands_out_do_not_push_others_aside() -> None:
    places = merge([ranked("old", 100, 990), ranked("new", 10, 10, scale=3)])

    assert all(place.at == 0 for place in list(places.values())[:10])


def test_scores_of_one_measure_are_compared_as_they_are() -> None:
    places = pool([Ranked(["x", "y"], [7.0, 2.0], 900), Ranked(["z", "x"], [9.5, 9.0], 100)])

    assert {uuid: (place.at, place.rank, place.score) for uuid, place in places.items()} == {
        "z": (1, 1, 9.5),
        "x": (0, 1, 7.0),
        "y": (0, 2, 2.0),
    }
    assert list(places) == ["z", "x", "y"]


@given(LISTS)
def test_nothing_is_lost_doubled_or_put_before_what_its_own_space_ranks_higher(
    lists: list[tuple[dict[str, float], int]],
) -> None:
    falling = [(sorted(scores, key=lambda uuid: -scores[uuid]), scores, size) for scores, size in lists]

    places = merge([Ranked(uuids, [scores[uuid] for uuid in uuids], size) for uuids, scores, size in falling])

    assert places.keys() == {uuid for uuids, *_ in falling for uuid in uuids}
    for at, (uuids, *_) in enumerate(falling):
        mine = [uuid for uuid, place in places.items() if place.at == at]
        assert mine == [uuid for uuid in uuids if uuid in mine]
        assert all(uuids[places[uuid].rank - 1] == uuid for uuid in mine)
    scores = [place.score for place in places.values()]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


def test_what_both_rankings_find_comes_before_what_one_of_them_puts_first() -> None:
    scores = fuse(["a", "b"], ["c", "b"])

    assert list(scores) == ["b", "a", "c"]
    assert scores["b"] == pytest.approx(1 / 62 + 1 / 62)


def test_of_equal_sums_the_first_ranking_decides() -> None:
    assert list(fuse(["z", "a"], ["a", "z"])) == ["z", "a"]
