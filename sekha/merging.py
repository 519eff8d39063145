"""One ranked list out of several: similarities by how far up they stand where they were found, never by themselves.

No two models measure similarity alike, so across spaces each similarity is first turned into a rank, by what the same
search found beside it. A question's similarities to all texts of a space spread about as a normal distribution does,
whose largest fall in a straight line over the square root of -log(rank / size). The line through a space's candidates
says for each of them which rank it has the similarity of: a document that stands out from what its space has to offer
comes before its bare rank, one that is only the best of a bad lot behind it. As shares of the size of the space, ranks
of large and small spaces compare: a tenth of the documents gets a tenth of the places. A document that lies in several
spaces is judged by the first that found it, and counts once.

Measured in `benchmarks/retrieval`: from a worse model to a better one, bare ranks lose up to 0.004 of nDCG@10 to the
old space alone while a small part is moved, and these nothing. Where documents lie in both spaces the better of two
opinions, or their mean, did worse: the new space is the one that is trusted.

Words are different. BM25 is one measure, the same whichever model embedded a text, so its scores compare as they are,
but for how rare each space takes a word to be; bare scores came before ranks in every share that was tried.

Within all spaces together, what vectors find and what words find are two opinions on the same documents: reciprocal
rank fusion adds them up (Cormack, Clarke and Büttcher, SIGIR 2009). Spaces are put together first, for vectors and for
words by themselves, and then fused: sums of reciprocal ranks from one space do not compare with those from another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

__all__ = ["K", "Place", "Ranked", "fuse", "merge", "pool"]

K: Final = 60
"""The constant of reciprocal rank fusion, as its authors chose it."""


class Ranked(NamedTuple):
    """What one space found, best first, out of how many."""

    uuids: Sequence[str]
    scores: Sequence[float]
    """Similarities or BM25, falling."""
    size: int


class Place(NamedTuple):
    """Where a document comes in the list of all, and why."""

    at: int
    """Which of the lists it is taken from."""
    rank: int
    """Its rank there, from 1."""
    score: float
    """By which the list of all is ordered: its own where scores compare, else `1 / (1 + the rank that it speaks for)`
    among the documents of all lists."""


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
    """All lists together by uuid, best first, whatever the scale of each one's scores.

    A document in several is judged by the first that has it.
    """
    sizes = [max(ranked.size, len(ranked.uuids), 1) for ranked in lists]
    heights = [_heights(ranked.scores, size) for ranked, size in zip(lists, sizes, strict=True)]
    total = sum(sizes)
    return {uuid: Place(at, rank, _reciprocal(height, total)) for height, at, rank, uuid in _ordered(lists, heights)}


def pool(lists: Sequence[Ranked]) -> dict[str, Place]:
    """All lists together by uuid, best first, where all scores are of one measure.

    A document in several is judged by the first that has it.
    """
    scores = [ranked.scores for ranked in lists]
    return {uuid: Place(at, rank, score) for score, at, rank, uuid in _ordered(lists, scores)}


def _ordered(lists: Sequence[Ranked], scores: Sequence[Sequence[float]]) -> list[tuple[float, int, int, str]]:
    """Each document once, with its score, its list and its rank there, highest first."""
    found: list[tuple[float, int, int, str]] = []
    taken: set[str] = set()
    for at, (ranked, those) in enumerate(zip(lists, scores, strict=True)):
        for rank, (uuid, score) in enumerate(zip(ranked.uuids, those, strict=True), 1):
            if uuid not in taken:
                found.append((score, at, rank, uuid))
                taken.add(uuid)
    # Ties go to the earlier list, and within one list nothing overtakes.
    return sorted(found, key=lambda each: (-each[0], each[1], each[2]))


def _heights(scores: Sequence[float], size: int) -> Sequence[float]:
    """Of falling scores, how far up the line through them all has each: the square root of -log(rank / size)."""
    # Half a rank less: the best of ten documents is on average as good as the fifth of a hundred, hardly as the tenth.
    heights = [math.sqrt(-math.log((rank - 0.5) / size)) for rank in range(1, len(scores) + 1)]
    if len(scores) < 2:
        return heights
    middle, mean = sum(heights) / len(scores), sum(scores) / len(scores)
    together = sum((x - middle) * (y - mean) for x, y in zip(heights, scores, strict=True))
    if together <= 0:  # all alike
        return heights
    spread = sum((x - middle) ** 2 for x in heights)
    return [middle + (score - mean) * spread / together for score in scores]


def _reciprocal(height: float, total: int) -> float:
    """`1 / (1 + rank)`, of the rank among all that is as far up."""
    height = max(height, 0.0)
    return 1 / (1 + total * math.exp(-height * height))
