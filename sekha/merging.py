"""One ranked list out of several: by how far up a document stands where it was found, never by similarity itself.

No two models measure similarity alike, so across spaces each similarity is first turned into a rank, by what the same
search found beside it. Similarities fall in a nearly straight line over the logarithm of the rank, and the line through
a space's candidates says for each of them which rank it has the similarity of: a document that stands out from what its
space has to offer comes before its bare rank, one that is only the best of a bad lot behind it. Divided by the size of
the space, ranks of large and small spaces compare: a tenth of the documents gets a tenth of the places. A document that
lies in several spaces is judged by the first that found it, and counts once.

Measured in `benchmarks/retrieval`, where bare ranks times size lost up to 0.005 of nDCG@10 to the old space alone while
a tenth was moved, and this nothing; it came before them in each share that was tried, and for documents that lie in
both spaces too. There the better of two opinions, or their mean, did worse: the new space is the one that is trusted.

Within all spaces together, what vectors find and what words find are two opinions on the same documents: reciprocal
rank fusion adds them up (Cormack, Clarke and Büttcher, SIGIR 2009). Spaces are merged first, for vectors and for words
by themselves, and then fused: sums of reciprocal ranks from one space do not compare with those from another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

__all__ = ["K", "Place", "Ranked", "fuse", "merge"]

K: Final = 60
"""The constant of reciprocal rank fusion, as its authors chose it."""


class Ranked(NamedTuple):
    """What one space found, best first, out of how many."""

    uuids: Sequence[str]
    scores: Sequence[float]
    """Similarities or BM25, falling; of any scale."""
    size: int


class Place(NamedTuple):
    """Where a document comes in the merged list, and why."""

    at: int
    """Which of the lists it is taken from."""
    rank: int
    """Its rank there, from 1."""
    score: float
    """`1 / (1 + the rank among all that it has the score of)`, by which the merged list is ordered."""


def fuse(*rankings: Iterable[str]) -> dict[str, float]:
    """What several rankings of the same documents found, best first: the sums of `1 / (K + rank)`.

    Of equal sums, which are many, the one that the first ranking has earlier goes first.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, uuid in enumerate(ranking, 1):
            scores[uuid] = scores.get(uuid, 0.0) + 1 / (K + rank)
    return dict(sorted(scores.items(), key=lambda scored: -scored[1]))


def merge(lists: Sequence[Ranked]) -> dict[str, Place]:
    """All lists together, by uuid, best first. A document in several is judged by the first that has it."""
    sizes = [max(ranked.size, len(ranked.uuids), 1) for ranked in lists]
    everything = math.log(sum(sizes)) if lists else 0.0
    ordered: list[tuple[float, int, int, str]] = []
    taken: set[str] = set()
    for at, (ranked, size) in enumerate(zip(lists, sizes, strict=True)):
        share = everything - math.log(size)
        for rank, (uuid, logarithm) in enumerate(zip(ranked.uuids, _smoothed(ranked.scores), strict=True), 1):
            if uuid not in taken:
                ordered.append((logarithm + share, at, rank, uuid))
                taken.add(uuid)
    # Ties go to the earlier list, and within one list nothing overtakes.
    ordered.sort()
    return {uuid: Place(at, rank, _reciprocal(logarithm)) for logarithm, at, rank, uuid in ordered}


def _smoothed(scores: Sequence[float]) -> list[float]:
    """Of falling scores, the logarithm of the rank at which the line through them all has each."""
    # Half a rank less: the best of ten documents is on average as good as the fifth of a hundred, hardly as the tenth.
    logarithms = [math.log(rank - 0.5) for rank in range(1, len(scores) + 1)]
    if not scores:
        return logarithms
    middle, mean = sum(logarithms) / len(scores), sum(scores) / len(scores)
    together = sum((x - middle) * (y - mean) for x, y in zip(logarithms, scores, strict=True))
    if together >= 0:  # all alike
        return logarithms
    spread = sum((x - middle) ** 2 for x in logarithms)
    return [middle + (score - mean) * spread / together for score in scores]


def _reciprocal(logarithm: float) -> float:
    return 1 / (1 + math.exp(min(logarithm, 700.0)))  # beyond it floats end
