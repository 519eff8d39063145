"""Turn texts into vectors: the same line as a chat, with vectors at its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Generic, Protocol, TypeVar

from sekha.apart import check_no_other_model, chooses_a_host
from sekha.asks import Allowed
from sekha.calling import Attempt
from sekha.errors import InvalidRequest
from sekha.ledger import Hold, Scope
from sekha.pricing import Usage
from sekha.routing import Ask, Estimates, Plan
from sekha.settling import let_go, reserved, settled
from sekha.vectors.base import Vector

__all__ = ["EmbedRequest", "EmbedSteps", "Embedded", "RawEmbedded", "embed"]


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed with one model."""

    texts: tuple[str, ...] = field(repr=False)
    model: str | None = None
    """A model or `provider/model`; left out, the default embedding model."""
    max_cost: Decimal | None = None
    bulk: bool = False
    """Many requests' worth of texts: `max_cost_per_request` does not cap it."""
    at_once: int | None = None
    """Texts that are sent together at the most; None where that is for who takes them to say."""
    tags: frozenset[str] = frozenset()
    key: str | None = None
    """The name of the caller's key, whose budgets it counts against."""
    allowed: Allowed | None = None
    """What that key may use; None for everything."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """OpenAI's other fields as they came: `dimensions`, `encoding_format`, `user`."""

    def __post_init__(self) -> None:
        for at, text in enumerate(self.texts):
            if not text:
                raise InvalidRequest(f"Text {at} is empty, and nothing has no meaning to embed.", field=f"input[{at}]")
        check_no_other_model(self.options)

    def ask(self) -> Ask:
        return Ask(
            kind="embedding",
            model=self.model,
            task="embedding",
            max_cost=self.max_cost,
            priced_apart="provider" if chooses_a_host(self.options.get("provider")) else None,
            bulk=self.bulk,
            key=self.key,
            allowed=self.allowed,
            tags=self.tags,
        )


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Vectors in the order of the texts, who made them, and what they cost."""

    vectors: Vector = field(repr=False)
    """Shape `(len(texts), dimension)`, float32."""
    provider_id: str
    model_id: str
    usage: Usage
    estimated_cost: Decimal
    cost: Decimal
    attempts: tuple[Attempt, ...]
    charged_to: Scope
    lost_cost: Decimal = Decimal(0)
    """Dollars for attempts that failed and may be billed all the same; no part of `cost`."""

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class RawEmbedded:
    """Vectors in OpenAI's JSON, who made them, and what they cost."""

    raw: bytes = field(repr=False)
    dimension: int
    provider_id: str
    model_id: str
    usage: Usage
    estimated_cost: Decimal
    cost: Decimal
    attempts: tuple[Attempt, ...]
    reason: str
    charged_to: Scope
    lost_cost: Decimal = Decimal(0)
    """Dollars for attempts that failed and may be billed all the same; no part of `cost`."""

    @property
    def total_cost(self) -> Decimal:
        """Dollars that the request was charged."""
        return self.cost + self.lost_cost


class Charged(Protocol):
    """What embedding gives: vectors as numbers, or as the bytes in which a provider wrote them."""

    @property
    def cost(self) -> Decimal: ...


E = TypeVar("E", bound=Charged)


@dataclass(frozen=True, slots=True)
class EmbedSteps(Generic[E]):
    """The steps of an embedding: plain callables in-process, Prefect tasks in a flow."""

    estimate: Callable[[EmbedRequest], Awaitable[Estimates]]
    select: Callable[[EmbedRequest, Estimates], Awaitable[Plan]]
    reserve: Callable[[Plan], Awaitable[Hold]]
    embed: Callable[[EmbedRequest, Plan, Hold], Awaitable[E]]
    settle: Callable[[Hold, E | None], Awaitable[None]]
    at_once: bool = False
    """Whether `reserve` and `settle` are safe to cancel, and so need no shield."""


async def embed(request: EmbedRequest, steps: EmbedSteps[E]) -> E:
    """Embed the texts. Money is held before anyone is called, and settled however it ends."""
    if not request.texts:
        raise InvalidRequest("There is no text to embed: send at least one.", field="input")
    estimates = await steps.estimate(request)
    plan = await steps.select(request, estimates)
    hold = await reserved(steps, plan)
    try:
        embedded = await steps.embed(request, plan, hold)
    except BaseException:
        await let_go(steps.settle, hold)
        raise
    await settled(steps, hold, embedded)
    return embedded
