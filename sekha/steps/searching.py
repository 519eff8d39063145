"""Searching: which spaces can be asked, what each finds, and the one list that comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import InvalidRequest, SpaceMismatch
from sekha.indexes import Readable
from sekha.merging import Ranked, fuse, merge
from sekha.pricing import Usage
from sekha.resources import Resources
from sekha.search import Answer, Asked, Found, FoundHit, LeftOut, Question, Ranks, SearchRequest
from sekha.spaces import embedder_of, index_for

if TYPE_CHECKING:
    from sekha.vectors.base import Collection, Hit, TextHit, Vector

__all__ = ["Searching"]

CANDIDATES = 100
"""What each ranking gives where several are made one: enough that a document in two of them is seen in both."""


class Searching:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def find_spaces(self, request: SearchRequest) -> Asked:
        """Phrase the question for the model of each space, the space that is written to first."""
        found = await self._open.indexes.of(request.collection)
        indexes = self._in_order(request, found)
        sizes = await self._sizes(request, indexes, found)
        questions: list[Question] = []
        left_out: list[LeftOut] = []
        for index in indexes:
            model = embedder_of(index, self._open.registry)
            if model is None:
                why = f"No model under `providers:` makes vectors of {index.fingerprint!r}."
                left_out.append(LeftOut(index.name, why))
                continue
            questions.append(
                Question(
                    index=index,
                    size=sizes.get(index.name, 0),
                    limit=request.limit if len(indexes) == 1 and not request.hybrid else max(request.limit, CANDIDATES),
                    embed=EmbedRequest(
                        texts=(model.query_prefix + request.query,),
                        model=self._asked_as(request.collection, index, model.id),
                        tags=request.tags,
                        key=request.key,
                    ),
                )
            )
        if not questions:
            wanted = self._open.registry.space(request.collection).fingerprint
            raise SpaceMismatch(indexes[0].name, stored=indexes[0].fingerprint, wanted=wanted)
        if request.max_cost is not None:
            part = request.max_cost / len(questions)
            questions = [replace(each, embed=replace(each.embed, max_cost=part)) for each in questions]
        return Asked(questions=tuple(questions), left_out=tuple(left_out))

    async def search_space(self, request: SearchRequest, question: Question, embedded: Embedded) -> Answer:
        """Look up what is nearest to the question in one space, and what has its words."""
        began = time.perf_counter()
        vector, index = embedded.vectors[0], question.index
        by_words: Sequence[TextHit] | None = None
        if request.hybrid:
            store = await self._open.store()
            by_vector, by_words = await asyncio.gather(
                self._nearest(request, question, vector),
                store.search_text(index.name, request.query, question.limit, where=request.where),
            )
        else:
            by_vector = await self._nearest(request, question, vector)
        return Answer(
            space=index.name,
            dimension=index.dimension,
            size=question.size,
            hits=_hits(question, by_vector, by_words),
            seconds=time.perf_counter() - began,
            provider_id=embedded.provider_id,
            model_id=embedded.model_id,
            usage=embedded.usage,
            estimated_cost=embedded.estimated_cost,
            cost=embedded.cost,
            attempts=embedded.attempts,
        )

    async def merge_found(self, request: SearchRequest, asked: Asked, answers: Sequence[Answer | LeftOut]) -> Found:
        """One list out of what the spaces found, and one bill."""
        given = [answer for answer in answers if isinstance(answer, Answer)]
        left_out = [*asked.left_out, *(answer for answer in answers if isinstance(answer, LeftOut))]
        return Found(
            hits=given[0].hits[: request.limit] if len(given) == 1 else _merged(given, request.limit),
            collection=request.collection,
            answers=tuple(replace(answer, hits=()) for answer in given),
            left_out=tuple(left_out),
            usage=sum((answer.usage for answer in given), Usage()),
            estimated_cost=sum((answer.estimated_cost for answer in given), Decimal(0)),
            cost=sum((answer.cost for answer in given), Decimal(0)),
            attempts=tuple(attempt for answer in given for attempt in answer.attempts),
        )

    def _in_order(self, request: SearchRequest, found: Readable) -> list[Collection]:
        """The spaces to search: the one that is written to first, since it has each document's latest text."""
        indexes = [index for index in found.indexes if request.dimension in (None, index.dimension)]
        if not indexes:
            have = ", ".join(str(index.dimension) for index in found.indexes)
            raise InvalidRequest(
                f"Collection {request.collection!r} has no vectors of {request.dimension} numbers; it has {have}. "
                "Leave `dimension` out to search them all.",
                field="dimension",
            )
        written = index_for(self._open.registry.space(request.collection), found.indexes).name
        return sorted(indexes, key=lambda index: (index.name != written, index.name != found.named))

    async def _sizes(self, request: SearchRequest, indexes: Sequence[Collection], found: Readable) -> Mapping[str, int]:
        if len(indexes) == 1 or request.where is None:
            return found.sizes
        store, names = await self._open.store(), [index.name for index in indexes]
        counts = await asyncio.gather(*(store.count(name, request.where) for name in names))
        return dict(zip(names, counts, strict=True))

    def _asked_as(self, collection: str, index: Collection, model_id: str) -> str:
        """Any provider that has the model may embed, unless the file names one for the collection."""
        space = self._open.registry.space(collection)
        return space.asked_as if index_for(space, [index]) is index else model_id

    async def _nearest(self, request: SearchRequest, question: Question, vector: Vector) -> list[Hit]:
        far = None if request.min_similarity is None else 1.0 - request.min_similarity
        store = await self._open.store()
        return await store.search(question.index.name, vector, question.limit, where=request.where, max_distance=far)


def _hits(question: Question, by_vector: Sequence[Hit], by_words: Sequence[TextHit] | None) -> tuple[FoundHit, ...]:
    """What one space found, best first: by similarity, or by both rankings together."""
    near = {hit.uuid: (rank, hit) for rank, hit in enumerate(by_vector, 1)}
    said = {hit.uuid: (rank, hit) for rank, hit in enumerate(by_words or (), 1)}
    scores = fuse(near, said) if by_words is not None else {hit.uuid: hit.similarity for hit in by_vector}

    def found(at: int, uuid: str, score: float) -> FoundHit:
        near_rank, near_hit = near.get(uuid, (None, None))
        said_rank, said_hit = said.get(uuid, (None, None))
        hit = near_hit or said_hit
        assert hit is not None  # noqa: S101 - the scores are theirs
        return FoundHit(
            uuid=uuid,
            text=hit.text,
            properties=hit.properties,
            similarity=near_hit.similarity if near_hit else None,
            score=score,
            space=question.index.name,
            dimension=question.index.dimension,
            ranks=Ranks(rank=at, of=question.size, by_vector=near_rank, by_words=said_rank),
        )

    return tuple(found(at, uuid, score) for at, (uuid, score) in enumerate(scores.items(), 1))


def _merged(answers: Sequence[Answer], limit: int) -> tuple[FoundHit, ...]:
    """The hits of several spaces as one list."""
    by_uuid = [{hit.uuid: hit for hit in answer.hits} for answer in answers]
    places = merge([Ranked(tuple(hits), answer.size) for hits, answer in zip(by_uuid, answers, strict=True)], limit)
    hits = ((place, by_uuid[place.at][place.uuid]) for place in places)
    return tuple(replace(hit, score=place.score, ranks=replace(hit.ranks, rank=place.rank)) for place, hit in hits)
