"""One ranked list out of several: by rank, never by similarity, which no two models measure alike.

Within one space, what its vectors find and what its words find are two opinions on the same documents: reciprocal
rank fusion adds them up (Cormack, Clarke and Büttcher, SIGIR 2009). Across spaces, each document has its place in
one list alone, and a list of a tenth of the documents deserves a tenth of the places: a rank counts as many times
over as the space is smaller than all of them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

__all__ = ["K", "Place", "Ranked", "fuse", "merge"]

K: Final = 60
"""The constant of reciprocal rank fusion, as its authors chose it."""


class Ranked(NamedTuple):
    """What one space found, best first, out of how many."""

    uuids: Sequence[str]
    size: int


class Place(NamedTuple):
    """Where a document comes in the merged list, and why."""

    uuid: str
    at: int
    """Which of the lists it is taken from."""
    rank: int
    """Its rank there, from 1, those not counted that another list has."""
    score: float
    """`1 / (K + rank × all / size)`, by which the merged list is ordered."""


def fuse(*rankings: Iterable[str]) -> dict[str, float]:
    """What several rankings of the same documents found, best first, ties by uuid: the sums of `1 / (K + rank)`."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, uuid in enumerate(ranking, 1):
            scores[uuid] = scores.get(uuid, 0.0) + 1 / (K + rank)
    return dict(sorted(scores.items(), key=lambda scored: (-scored[1], scored[0])))


def merge(lists: Sequence[Ranked], limit: int) -> list[Place]:
    """The first `limit` of all lists together. A document in several is counted in the first that has it."""
    taken: set[str] = set()
    own: list[list[str]] = []
    sizes: list[float] = []
    for ranked in lists:
        mine = [uuid for uuid in dict.fromkeys(ranked.uuids) if uuid not in taken]
        taken.update(mine)
        own.append(mine)
        # What of its best lies in the others too is taken for the share of all it has.
        size = max(ranked.size, len(ranked.uuids), 1)
        sizes.append(size * (len(mine) / len(ranked.uuids) if ranked.uuids else 1))
    everything = sum(sizes)
    places = [
        Place(uuid, at, rank, 1 / (K + rank * everything / sizes[at]))
        for at, mine in enumerate(own)
        for rank, uuid in enumerate(mine, 1)
    ]
    places.sort(key=lambda place: (-place.score, place.at, place.uuid))
    return places[:limit]
