"""What tokens cost. Prices, usage and the two sums over them; pure, and Decimal throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

__all__ = ["FREE", "Estimate", "Price", "Usage", "cost", "price_of"]

_MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars per million tokens of each sort.

    `cached_input` is None when the provider has no discount for it: cached tokens then cost what
    other input costs. An unknown price is not a `Price` but None, and never counts as zero.
    """

    input: Decimal = Decimal(0)
    output: Decimal = Decimal(0)
    cached_input: Decimal | None = None
    per_image: Decimal | None = None
    """US dollars for each input image, where a provider prices images apart from tokens."""
    source: Literal["configured", "price map", "local"] = "configured"

    @property
    def is_free(self) -> bool:
        return not (self.input or self.output or self.per_image)


FREE = Price(source="local")
"""Nothing is charged: the provider runs on our own machines, or the configuration says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one call. `cached_tokens` are part of `input_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    images: int = 0
    counted: bool = False
    """True when the provider reported nothing and we counted."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            images=self.images + other.images,
            counted=self.counted or other.counted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one call to one model will cost, said before it is made.

    `expected` is what to plan with; `worst_case` is what a budget holds, and no call can pass it:
    the length of the reply is limited to `reply_limit` tokens.
    """

    expected: Decimal
    worst_case: Decimal
    input_tokens: int
    output_tokens: int
    """The expected length of the reply."""
    reply_limit: int | None
    """Sent as `max_tokens`. None leaves the reply's length to the provider, which then costs nothing more."""
    basis: Literal["max_tokens", "history", "model limit", "no reply"]
    """Where `output_tokens` comes from."""


def cost(usage: Usage, price: Price) -> Decimal:
    """Dollars for a call: input at its price, cached input at its own, output, images."""
    cached = min(usage.cached_tokens, usage.input_tokens)
    cached_price = price.input if price.cached_input is None else price.cached_input
    tokens = (
        (usage.input_tokens - cached) * price.input + cached * cached_price + usage.output_tokens * price.output
    ) / _MILLION
    return tokens + usage.images * (price.per_image or Decimal(0))


def price_of(configured: Price | None, mapped: Price | None, *, unknown_is_free: bool) -> Price | None:
    """The price that holds: the file's, else the map's, else free or unknown as the file decides."""
    if configured is not None:
        return configured
    if mapped is not None:
        return mapped
    return replace(FREE, source="configured") if unknown_is_free else None
