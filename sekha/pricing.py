"""What tokens cost. Prices, usage and the two sums over them; pure, and exact throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from sekha.values import value

__all__ = [
    "ASSUMED_REPLY",
    "FREE",
    "INEXACT",
    "LONGEST_REPLY",
    "MOST_TOKENS",
    "ChatUnits",
    "Estimate",
    "Price",
    "Tariff",
    "Usage",
    "chat_units",
    "cost",
    "cost_units",
    "estimate_chat",
    "estimate_embedding",
    "most_of",
    "price_of",
]

Basis: TypeAlias = Literal["max_tokens", "history", "assumed", "no reply"]


class Tariff(NamedTuple):
    """A price in whole numbers of `unit`: exact like Decimals, and many times as quick to add up."""

    input: int
    cached: int
    written: int
    output: int
    image: int
    """Each for one token, or one image."""
    places: int
    unit: Decimal
    """10 to the power of minus `places`, in US dollars."""
    per_dollar: Decimal
    """Units in one US dollar: to multiply by it takes a third of what `scaleb` does."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens of each sort.

    `cached_input` is what a provider takes for input that it had cached, and `cache_write` for input
    that it is asked to cache; None where that costs what other input costs. An unknown price is not
    a `Price` but None, and never counts as zero.
    """

    input: Decimal = Decimal(0)
    output: Decimal = Decimal(0)
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    per_image: Decimal | None = None
    """US dollars for each input image, where a provider prices images apart from tokens."""
    long_input: tuple[tuple[int, Price], ...] = ()
    """Input longer than so many tokens costs another price, for all of its tokens and the reply's."""
    tiers: tuple[tuple[str, Price], ...] = ()
    """What it costs in service tiers with prices of their own: `flex`, `priority`."""
    source: Literal["configured", "price map", "local"] = "configured"

    @cached_property
    def is_free(self) -> bool:
        return not (self.input or self.output or self.per_image)

    def of_tier(self, tier: str | None) -> Price:
        """The price of a service tier: this one, where the tier has none of its own."""
        return next((price for name, price in self.tiers if name == tier), self) if tier else self

    def at(self, input_tokens: int) -> Price:
        """The price that holds for an input of this length."""
        if not self.long_input:
            return self
        return next((price for above, price in reversed(self.long_input) if input_tokens > above), self)

    @cached_property
    def tariff(self) -> Tariff:
        """This price, but for `long_input` and `tiers`, in whole numbers."""
        cached = self.input if self.cached_input is None else self.cached_input
        written = self.input if self.cache_write is None else self.cache_write
        amounts = (self.input, cached, written, self.output, self.per_image or Decimal(0))
        # A million tokens cost the amount, so that one costs a whole number six places further down.
        places = 6 + max(0, *(-int(amount.normalize().as_tuple().exponent) for amount in amounts))
        of_input, of_cached, of_written, of_output = (int(amount.scaleb(places - 6)) for amount in amounts[:4])
        of_image = int(amounts[4].scaleb(places))
        unit, per_dollar = Decimal(1).scaleb(-places), Decimal(10**places)
        return Tariff(of_input, of_cached, of_written, of_output, of_image, places, unit, per_dollar)


FREE = Price(source="local")
"""Nothing is charged: the provider runs on our own machines, or the configuration says so."""


@value
class Usage:
    """Tokens of one call. `cached_tokens` and `cache_write_tokens` are part of `input_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    images: int = 0
    counted: bool = False
    """True when the provider reported nothing and we counted."""
    tier: str | None = None
    """The service tier that the provider says it was served in; None where it says none."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            images=self.images + other.images,
            counted=self.counted or other.counted,
        )


class Estimate(NamedTuple):
    """What one call to one model will cost, said before it is made."""

    # A named tuple: several are made for each request, and a frozen dataclass takes six times as long to make.
    expected: Decimal
    """Dollars to plan with."""
    worst_case: Decimal
    """Dollars that the call cannot pass; what a budget holds for it."""
    input_tokens: int
    output_tokens: int
    """The expected length of the reply."""
    context_tokens: int
    """Tokens that must fit into the context window: input and reply, or the longest text to embed."""
    reply_limit: int | None = None
    """Sent as `max_tokens` to keep the worst case; None where nothing needs to be sent."""
    basis: Basis = "no reply"
    """Where `output_tokens` comes from: the request, this model's usual replies, `ASSUMED_REPLY`, or none."""


MOST_TOKENS = 100_000_000
"""That one call can have: ten times the widest context window. Whoever reports more reports nonsense."""
ASSUMED_REPLY = 512
"""Tokens of a reply from a model of which no reply has been seen yet."""
INEXACT = Decimal("1.25")
"""How many more tokens than we count a provider may count, where its tokenizer is not public."""
_PARTS, _WHOLE = INEXACT.as_integer_ratio()
LONGEST_REPLY = 4096
"""Tokens at which a reply is cut where nobody knows the model's own limit and its tokens cost money."""


class ChatUnits(NamedTuple):
    """What one chat will cost, in whole numbers of its tariff's unit."""

    expected: int
    worst_case: int
    output_tokens: int
    reply_limit: int | None
    basis: Basis


def estimate_chat(  # noqa: PLR0917 - made for each request and model, and names in a call take as long as the sums
    price: Price,
    input_tokens: int,
    requested: int | None,
    model_limit: int | None,
    usual: int | None,
    cap: Decimal | None,
    context_window: int | None = None,
    exact: bool = True,
    images: int = 0,
    replies: int = 1,
    writes_cache: bool = False,
    bounded: bool = True,
    least: int = 0,
) -> Estimate:
    """Price a chat before it is made.

    `requested` is the caller's `max_tokens`, `replies` how many answers are wanted (`n`), `usual` the
    length of this model's replies so far, and `cap` the dollars that this call may cost. Under a cap,
    a reply whose length nobody limited is limited to what the cap affords, so that the call cannot
    pass it, but to no less than `least`, below which it would be refused. The worst case counts input
    that is not `exact` as `INEXACT` times as long, and all of it as written to the provider's cache when
    the request `writes_cache`. Input that is not `bounded` is at the worst all that fits the context window.
    """
    most = input_tokens if exact else most_of(input_tokens)
    if not bounded and context_window and most < context_window:
        # What is left for the reply goes by what was counted, as ever.
        context_window, most = 2 * context_window - most, context_window
    now = then = price.tariff
    if price.long_input:
        now, then = price.at(input_tokens).tariff, price.at(most).tariff
    expected, worst, length, limit, basis = chat_units(
        now,
        then,
        input_tokens,
        most,
        requested,
        model_limit,
        usual,
        None if cap is None else int(cap * then.per_dollar),
        context_window,
        images,
        replies,
        writes_cache,
        least,
    )
    context_tokens = input_tokens + requested if requested else input_tokens
    # Past the function that a named tuple makes itself with, which takes as long as both products.
    return tuple.__new__(
        Estimate, (expected * now.unit, worst * then.unit, input_tokens, length, context_tokens, limit, basis)
    )


def chat_units(  # noqa: PLR0917 - as above
    now: Tariff,
    then: Tariff,
    input_tokens: int,
    most: int,
    requested: int | None,
    model_limit: int | None,
    usual: int | None,
    cap: int | None,
    context_window: int | None = None,
    images: int = 0,
    replies: int = 1,
    writes_cache: bool = False,
    least: int = 0,
) -> tuple[int, int, int, int | None, Basis]:
    """What `estimate_chat` says, in whole numbers: expected at the tariff `now`, at the worst by `then`.

    `most` is what `input_tokens` may come to at the provider, and `cap` in units of `then`. What comes is what
    `ChatUnits` names, in a plain tuple, since most of those that want it take it apart at once.
    """
    of_input, _, written, output, of_image, _, _, _ = then
    at_most = most * (written if writes_cache and written > of_input else of_input) + images * of_image
    each_at_most = output * replies
    limit: int | None = None
    if requested is not None:
        length = requested
        basis: Basis = "max_tokens"
        if usual and usual < requested:
            length, basis = usual, "history"
        longest = requested  # sent as the caller's own `max_tokens`, so no limit of ours is needed
    else:
        if usual:
            length, basis = usual, "history"
        else:
            length, basis = ASSUMED_REPLY, "assumed"
        longest = model_limit or (LONGEST_REPLY if least < LONGEST_REPLY else least)
        if context_window and context_window - most < longest:
            # Providers refuse a `max_tokens` that would not fit behind the input.
            longest = max(context_window - most, 1)
        if length > longest:  # noqa: PLR1730 - for each candidate, and `min` takes four times as long
            length = longest
        # Where it matters a limit is sent, since the one that we know of the model may be out of date.
        if each_at_most and (cap is not None or not model_limit):
            limit = longest
            if cap is not None and at_most + longest * each_at_most > cap:
                # A limit below the usual length would not save the request but mutilate its reply.
                afforded = (cap - at_most) // each_at_most
                if afforded < length:  # noqa: PLR1730 - as for `longest`
                    afforded = length
                if afforded < least:
                    afforded = max(afforded, min(least, longest))
                longest = limit = afforded
    length *= replies
    return (
        input_tokens * now.input + images * now.image + length * now.output,
        at_most + longest * each_at_most,
        length,
        limit,
        basis,
    )


def estimate_embedding(price: Price, *, input_tokens: int, longest: int, exact: bool = True) -> Estimate:
    """Price an embedding before it is made: exact but for the tokenizer, since nothing comes back."""
    most = input_tokens if exact else most_of(input_tokens)
    now, then = price.at(input_tokens).tariff, price.at(most).tariff
    return Estimate(input_tokens * now.input * now.unit, most * then.input * then.unit, input_tokens, 0, longest)


def most_of(tokens: int) -> int:
    """Tokens that a provider may count where we, not exactly, count these."""
    return -(-tokens * _PARTS // _WHOLE)


def cost(usage: Usage, price: Price) -> Decimal:
    """Dollars for a call: input, cached input and input written to a cache at their prices, output, images."""
    each = price.of_tier(usage.tier).at(usage.input_tokens).tariff
    return cost_units(usage, each) * each.unit


def cost_units(usage: Usage, each: Tariff) -> int:
    """What `cost` says, in whole numbers of the tariff's unit."""
    plain = usage.input_tokens
    units = usage.output_tokens * each.output + usage.images * each.image
    if usage.cached_tokens or usage.cache_write_tokens:
        cached = min(usage.cached_tokens, plain)
        written = min(usage.cache_write_tokens, plain - cached)
        plain -= cached + written
        units += cached * each.cached + written * each.written
    return units + plain * each.input


def price_of(configured: Price | None, mapped: Price | None, *, unknown_is_free: bool) -> Price | None:
    """The price that holds: the file's, else the map's, else free or unknown as the file decides."""
    if configured is not None:
        return configured
    if mapped is not None:
        return mapped
    return replace(FREE, source="configured") if unknown_is_free else None
