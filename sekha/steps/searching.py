"""Searching: which spaces can be asked, what each finds, and the one list that comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING

from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import InvalidRequest, KeyNotAllowed, SpaceMismatch
from sekha.indexes import Readable
from sekha.merging import Ranked, fuse, merge, pool
from sekha.pricing import Usage
from sekha.resources import Resources
from sekha.search import Answer, Asked, Found, FoundHit, LeftOut, Question, Ranks, SearchRequest
from sekha.spaces import embedder_of, index_for
from sekha.vectors.base import TextHit

if TYPE_CHECKING:
    from sekha.vectors.base import Collection, Hit, Vector

__all__ = ["Searching"]

CANDIDATES = 30
"""What vectors give of each space where several are merged: enough that the line through their similarities is steady.
With 12 the old space alone is better by 0.003 of nDCG@10; 50 gain little and take half as long again."""
CANDIDATES_WITH_WORDS = 50
"""What each ranking gives where words are looked for too: enough that a document in two of them is seen in both."""


class Searching:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    async def find_spaces(self, request: SearchRequest) -> Asked:
        """Phrase the question for the model of each space, the space that is written to first."""
        found = await self._open.indexes.of(request.collection)
        indexes = self._in_order(request, found)
        sizes = await self._sizes(request, indexes, found)
        limit = request.limit
        if request.hybrid:
            limit = max(limit, CANDIDATES_WITH_WORDS)
        elif len(indexes) > 1:
            limit = max(limit, CANDIDATES)
        questions: list[Question] = []
        left_out: list[LeftOut] = []
        refused: KeyNotAllowed | None = None
        for index in indexes:
            model = embedder_of(index, self._open.registry)
            if model is None:
                why = f"No model under `providers:` makes vectors of {index.fingerprint!r}."
                left_out.append(LeftOut(index.name, why))
                continue
            asked_as = self._asked_as(request.collection, index, model.id)
            if (refusal := self._refusal(request, asked_as)) is not None:
                left_out.append(LeftOut(index.name, refusal.message))
                refused = refused or refusal
                continue
            questions.append(
                Question(
                    index=index,
                    size=sizes.get(index.name, 0),
                    limit=limit,
                    embed=EmbedRequest(
                        texts=(model.query_prefix + request.query,),
                        model=asked_as,
                        tags=request.tags,
                        key=request.key,
                        allowed=request.allowed,
                    ),
                )
            )
        if not questions:
            if refused is not None:
                raise refused
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
            by_vector=tuple(by_vector),
            by_words=None if by_words is None else tuple(by_words),
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
            hits=_merged(given, request.limit),
            collection=request.collection,
            answers=tuple(replace(answer, by_vector=(), by_words=None) for answer in given),
            left_out=tuple(left_out),
            usage=sum((answer.usage for answer in given), Usage()),
            estimated_cost=sum((answer.estimated_cost for answer in given), Decimal(0)),
            cost=sum((answer.cost for answer in given), Decimal(0)),
            attempts=tuple(attempt for each in answers for attempt in each.attempts),
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

    def _refusal(self, request: SearchRequest, model: str) -> KeyNotAllowed | None:
        """Why the caller's key may not ask the model, as it would be told where it embeds with it."""
        allowed = request.allowed
        if allowed is None or any(map(allowed.covers, self._open.registry.named(model))):
            return None
        return KeyNotAllowed(request.key or "", model, allowed.instead_of(self._open.registry.named(model)))

    def _asked_as(self, collection: str, index: Collection, model_id: str) -> str:
        """Any provider that has the model may embed, unless the file names one for the collection."""
        space = self._open.registry.space(collection)
        return space.asked_as if index_for(space, [index]) is index else model_id

    async def _nearest(self, request: SearchRequest, question: Question, vector: Vector) -> list[Hit]:
        far = None if request.min_similarity is None else 1.0 - request.min_similarity
        store = await self._open.store()
        return await store.search(question.index.name, vector, question.limit, where=request.where, max_distance=far)


def _merged(answers: Sequence[Answer], limit: int) -> tuple[FoundHit, ...]:
    """The first of what one space found, or several together."""
    words = [answer.by_words or () for answer in answers]
    near = merge([_ranked(answer.by_vector, answer.size) for answer in answers])
    said = pool([_ranked(found, answer.size) for found, answer in zip(words, answers, strict=True)])
    if any(answer.by_words is not None for answer in answers):
        scores = fuse(near, said)
    elif len(answers) == 1:
        scores = {hit.uuid: hit.similarity for hit in answers[0].by_vector}
    else:
        scores = {uuid: place.score for uuid, place in near.items()}
    ranks = [0] * len(answers)

    def found(uuid: str, score: float) -> FoundHit:
        by_vector, by_words = near.get(uuid), said.get(uuid)
        nearest = answers[by_vector.at].by_vector[by_vector.rank - 1] if by_vector else None
        place = by_vector or by_words
        assert place is not None  # noqa: S101 - the scores are theirs
        hit = nearest or words[place.at][place.rank - 1]
        answer = answers[place.at]
        ranks[place.at] += 1
        return FoundHit(
            uuid=uuid,
            text=hit.text,
            properties=hit.properties,
            similarity=nearest.similarity if nearest else None,
            score=score,
            space=answer.space,
            dimension=answer.dimension,
            ranks=Ranks(
                rank=ranks[place.at],
                of=answer.size,
                by_vector=by_vector.rank if by_vector else None,
                by_words=by_words.rank if by_words else None,
            ),
        )

    return tuple(found(uuid, score) for uuid, score in islice(scores.items(), limit))


def _ranked(found: Sequence[Hit] | Sequence[TextHit], size: int) -> Ranked:
    scores = [hit.score if isinstance(hit, TextHit) else hit.similarity for hit in found]
    return Ranked([hit.uuid for hit in found], scores, size)
