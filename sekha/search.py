"""Find what is stored: embed the question as the collection was embedded, and ask its index."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal

from sekha.calling import Attempt
from sekha.embedding import Embedded, EmbedRequest, EmbedSteps, embed
from sekha.errors import InvalidRequest
from sekha.pricing import Usage
from sekha.vectors.base import Filter, Hit

__all__ = ["Found", "SearchRequest", "SearchSteps", "search"]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    query: str = field(repr=False)
    collection: str = "documents"
    limit: int = 10
    where: Filter | None = None
    min_similarity: float | None = None
    """Cosine similarity, -1 to 1, below which nothing is returned."""
    max_cost: Decimal | None = None
    tags: frozenset[str] = frozenset()
    key: str | None = None
    """The name of the caller's key, whose budgets it counts against."""

    def __post_init__(self) -> None:
        if not self.query or self.query.isspace():
            raise InvalidRequest("`query` is empty: say what to look for.", field="query")
        if not 1 <= self.limit <= 10_000:
            raise InvalidRequest(f"`limit` is {self.limit!r}; it must be 1 to 10,000.", field="limit")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found, nearest first, and what asking cost."""

    hits: tuple[Hit, ...]
    collection: str
    space: str
    dimension: int
    provider_id: str
    model_id: str
    usage: Usage
    estimated_cost: Decimal
    cost: Decimal
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchSteps:
    """The steps of a search: plain callables in-process, Prefect tasks in a flow."""

    prepare: Callable[[SearchRequest], Awaitable[EmbedRequest]]
    embedding: EmbedSteps[Embedded]
    look_up: Callable[[SearchRequest, Embedded], Awaitable[Found]]


async def search(request: SearchRequest, steps: SearchSteps) -> Found:
    """Embed the question under the collection's model, then search its space."""
    question = await steps.prepare(request)
    embedded = await embed(question, steps.embedding)
    return await steps.look_up(request, embedded)
