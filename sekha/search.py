"""Find what is stored: embed the question as each space was embedded, ask them side by side, and merge by rank."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from sekha.asks import Allowed
from sekha.calling import Attempt
from sekha.embedding import Embedded, EmbedRequest, EmbedSteps, embed
from sekha.errors import InvalidRequest, KeyNotAllowed, NoCandidate, ProviderError
from sekha.pricing import Usage
from sekha.vectors.base import Collection, Filter, Hit, Scalar, TextHit

__all__ = [
    "Answer",
    "Asked",
    "Found",
    "FoundHit",
    "LeftOut",
    "Question",
    "Ranks",
    "SearchRequest",
    "SearchSteps",
    "search",
]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    query: str = field(repr=False)
    collection: str = "documents"
    dimension: int | None = None
    """Search the spaces of this dimension alone; left out, all that the collection has."""
    limit: int = 10
    where: Filter | None = None
    min_similarity: float | None = None
    """Cosine similarity, -1 to 1, below which nothing is returned. Each model has its own scale of it."""
    hybrid: bool = False
    """Whether the question's words are looked for too, by BM25."""
    max_cost: Decimal | None = None
    """Dollars for all of its questions together; each space may cost an equal part."""
    tags: frozenset[str] = frozenset()
    key: str | None = None
    """The name of the caller's key, whose budgets it counts against."""
    allowed: Allowed | None = None
    """What that key may use; None for everything. A space that only another model can ask is left out."""

    def __post_init__(self) -> None:
        if not self.query or self.query.isspace():
            raise InvalidRequest("`query` is empty: say what to look for.", field="query")
        if not 1 <= self.limit <= 10_000:
            raise InvalidRequest(f"`limit` is {self.limit!r}; it must be 1 to 10,000.", field="limit")
        if self.hybrid and self.min_similarity is not None:
            raise InvalidRequest(
                "`min_similarity` is about vectors, and `hybrid` finds words too: leave out one of the two.",
                field="min_similarity",
            )


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one space is asked."""

    index: Collection
    size: int
    """How many records may be found in it."""
    limit: int
    embed: EmbedRequest


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A space that was not searched, and why."""

    space: str
    why: str
    attempts: tuple[Attempt, ...] = ()
    """Who was asked to embed the question for it, and failed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The questions, the space that readers use first, and the spaces that nobody can be asked for."""

    questions: tuple[Question, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True)
class Ranks:
    """Why a document comes where it comes."""

    rank: int
    """Its rank among the results of its own space, from 1."""
    of: int
    """How many records its space has."""
    by_vector: int | None
    """Its rank among what vectors found in the first space that has it; None when only its words were found."""
    by_words: int | None = None


@dataclass(frozen=True, slots=True)
class FoundHit:
    """One document that was found."""

    uuid: str
    text: str = field(repr=False)
    properties: Mapping[str, Scalar]
    similarity: float | None
    """Cosine similarity in its own space, which says nothing beside another's; None when only words found it."""
    score: float
    """By which the results are ordered: the similarity in one space; across spaces `1 / (1 + rank)`, where the rank is
    the one among all that its similarity speaks for; with words a sum of reciprocal ranks."""
    space: str
    dimension: int
    ranks: Ranks


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one space found, and what asking it cost."""

    space: str
    dimension: int
    size: int
    by_vector: tuple[Hit, ...]
    """Nearest first."""
    by_words: tuple[TextHit, ...] | None
    """Best first; None where words were not looked for."""
    seconds: float
    """That the store took."""
    provider_id: str
    model_id: str
    usage: Usage
    estimated_cost: Decimal
    cost: Decimal
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found, best first, and what asking cost, all spaces together."""

    hits: tuple[FoundHit, ...]
    collection: str
    answers: tuple[Answer, ...]
    """What each space said, without its hits; the one that readers use comes first. Never empty."""
    left_out: tuple[LeftOut, ...]
    usage: Usage
    estimated_cost: Decimal
    cost: Decimal
    attempts: tuple[Attempt, ...] = ()
    """All calls of all spaces, those of the spaces that were left out too."""

    @property
    def space(self) -> str:
        return ", ".join(answer.space for answer in self.answers)

    @property
    def dimension(self) -> int:
        return self.answers[0].dimension

    @property
    def provider_id(self) -> str:
        return self.answers[0].provider_id

    @property
    def model_id(self) -> str:
        return self.answers[0].model_id


@dataclass(frozen=True, slots=True)
class SearchSteps:
    """The steps of a search: plain callables in-process, Prefect tasks in a flow."""

    find_spaces: Callable[[SearchRequest], Awaitable[Asked]]
    embedding: EmbedSteps[Embedded]
    look_up: Callable[[SearchRequest, Question, Embedded], Awaitable[Answer]]
    merge: Callable[[SearchRequest, Asked, Sequence[Answer | LeftOut]], Awaitable[Found]]


async def search(request: SearchRequest, steps: SearchSteps) -> Found:
    """Ask every space of the collection, each under its own model, and merge what they found.

    A space whose embedder is down is left out, and the result says so. Raises what went wrong when no
    space could be asked.
    """
    asked = await steps.find_spaces(request)
    first, *others = asked.questions
    if not others:
        return await steps.merge(request, asked, [await _answer(request, first, steps)])
    failures: dict[str, ProviderError | NoCandidate | KeyNotAllowed] = {}

    async def one(question: Question) -> Answer | LeftOut:
        try:
            return await _answer(request, question, steps)
        except (ProviderError, NoCandidate, KeyNotAllowed) as error:
            failures[question.index.name] = error
            attempts = error.attempts if isinstance(error, ProviderError) else ()
            return LeftOut(question.index.name, error.message, attempts)

    try:
        async with asyncio.TaskGroup() as group:
            under_way = [group.create_task(one(question)) for question in asked.questions]
    except BaseExceptionGroup as errors:
        # The first that failed has ended the others.
        raise errors.exceptions[0] from None
    if len(failures) == len(asked.questions):
        raise failures[first.index.name]
    return await steps.merge(request, asked, [task.result() for task in under_way])


async def _answer(request: SearchRequest, question: Question, steps: SearchSteps) -> Answer:
    embedded = await embed(question.embed, steps.embedding)
    return await steps.look_up(request, question, embedded)
