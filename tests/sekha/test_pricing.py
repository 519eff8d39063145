from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.pricing import (
    ASSUMED_REPLY,
    INEXACT,
    LONGEST_REPLY,
    Price,
    Usage,
    cost,
    estimate_chat,
    estimate_embedding,
    price_of,
)

PRICE = Price(input=Decimal(2), output=Decimal(8), cached_input=Decimal("0.5"), per_image=Decimal("0.01"))
LONG = Price(
    input=Decimal(1), output=Decimal(1), long_input=((200_000, Price(input=Decimal(2), output=Decimal("2.999"))),)
)

dollars = st.decimals(0, 1000, places=6)
tokens = st.integers(0, 10**7)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    price = draw(flat_prices())
    if draw(st.booleans()):
        # Long inputs cost more, never less, wherever anybody asks another price for them.
        dearer = replace(price, input=price.input + draw(dollars), output=price.output + draw(dollars))
        price = replace(price, long_input=((draw(st.integers(1, 10**6)), dearer),))
    return price


@st.composite
def flat_prices(draw: st.DrawFn) -> Price:
    of_input = draw(dollars)
    return Price(
        input=of_input,
        output=draw(dollars),
        cached_input=draw(st.none() | st.decimals(0, of_input, places=6)),
        cache_write=draw(st.none() | st.decimals(of_input, of_input * 2 + 1, places=6)),
        per_image=draw(st.none() | st.decimals(0, 1, places=6)),
    )


@pytest.mark.parametrize(
    ("usage", "price", "costs"),
    [
        (Usage(), PRICE, "0"),
        (Usage(input_tokens=1_000_000), PRICE, "2"),
        (Usage(output_tokens=500_000), PRICE, "4"),
        (Usage(input_tokens=1_000_000, cached_tokens=400_000), PRICE, "1.4"),
        (Usage(input_tokens=1_000_000, cached_tokens=400_000), Price(input=Decimal(2)), "2"),
        (Usage(input_tokens=10, cached_tokens=1_000_000), Price(cached_input=Decimal(1), input=Decimal(2)), "0.00001"),
        (Usage(images=3), PRICE, "0.03"),
        (Usage(input_tokens=1_000_000, cache_write_tokens=400_000), PRICE, "2"),
        (Usage(input_tokens=1_000_000, cache_write_tokens=400_000), replace(PRICE, cache_write=Decimal(3)), "2.4"),
        (Usage(input_tokens=200_000, output_tokens=10), LONG, "0.20001"),
        (Usage(input_tokens=200_001, output_tokens=1000), LONG, "0.403001"),
        (Usage(input_tokens=1), Price(input=Decimal("0.000001")), "1e-12"),
    ],
)
def test_a_call_costs_what_its_tokens_cost(usage: Usage, price: Price, costs: str) -> None:
    assert cost(usage, price) == Decimal(costs)


def test_usage_adds_up() -> None:
    one = Usage(input_tokens=1, output_tokens=2, cached_tokens=3, images=4)
    other = Usage(input_tokens=10, output_tokens=20, cached_tokens=30, images=40, counted=True)

    assert one + other == Usage(input_tokens=11, output_tokens=22, cached_tokens=33, images=44, counted=True)


@pytest.mark.parametrize(
    ("given_", "reply", "limit", "basis", "worst"),
    [
        ({}, ASSUMED_REPLY, LONGEST_REPLY, "assumed", LONGEST_REPLY),
        ({"model_limit": 300}, 300, None, "assumed", 300),
        ({"usual": 50}, 50, LONGEST_REPLY, "history", LONGEST_REPLY),
        ({"usual": 50, "model_limit": 300}, 50, None, "history", 300),
        ({"requested": 100}, 100, None, "max_tokens", 100),
        ({"requested": 100, "usual": 50}, 50, None, "history", 100),
        ({"requested": 100, "usual": 500}, 100, None, "max_tokens", 100),
        # $1 affords 1,000 tokens at $1,000 per million, and the input takes none of it.
        ({"cap": Decimal(1)}, ASSUMED_REPLY, 1000, "assumed", 1000),
        ({"cap": Decimal(1), "model_limit": 5000}, ASSUMED_REPLY, 1000, "assumed", 1000),
        ({"cap": Decimal(1), "model_limit": 600}, ASSUMED_REPLY, 600, "assumed", 600),
        # Nobody can say more than fits behind the input.
        ({"cap": Decimal(1), "model_limit": 600, "context_window": 300}, 300, 300, "assumed", 300),
        ({"cap": Decimal("0.1")}, ASSUMED_REPLY, ASSUMED_REPLY, "assumed", ASSUMED_REPLY),
        ({"cap": Decimal("0.1"), "requested": 900}, 900, None, "max_tokens", 900),
    ],
)
def test_a_reply_is_estimated_by_what_is_known_of_its_length(
    given_: dict[str, int | Decimal], reply: int, limit: int | None, basis: str, worst: int
) -> None:
    known = {"requested": None, "model_limit": None, "usual": None, "cap": None} | given_

    estimate = estimate_chat(Price(output=Decimal(1000)), input_tokens=0, **known)  # type: ignore[arg-type]

    assert (estimate.output_tokens, estimate.reply_limit, estimate.basis) == (reply, limit, basis)
    assert estimate.expected == Decimal(reply) / 1000
    assert estimate.worst_case == Decimal(worst) / 1000


def test_nothing_is_cut_where_nothing_costs() -> None:
    estimate = estimate_chat(
        Price(), input_tokens=10, requested=None, model_limit=None, usual=None, cap=Decimal("0.000001")
    )

    assert estimate.reply_limit is None
    assert estimate.worst_case == 0


def test_every_reply_of_several_is_paid_for() -> None:
    one = estimate_chat(PRICE, input_tokens=0, requested=100, model_limit=None, usual=None, cap=None)
    three = estimate_chat(PRICE, input_tokens=0, replies=3, requested=100, model_limit=None, usual=None, cap=None)

    assert three.worst_case == 3 * one.worst_case
    assert three.output_tokens == 300


@given(
    price=prices(),
    input_tokens=tokens,
    images=st.integers(0, 20),
    replies=st.integers(1, 5),
    requested=st.none() | st.integers(1, 10**6),
    model_limit=st.none() | st.integers(1, 10**6),
    usual=st.none() | st.integers(1, 10**5),
    cap=st.none() | dollars,
    share=st.floats(0, 1),
    cached=st.floats(0, 1),
    undercounted=st.sampled_from([Decimal(1), Decimal("1.1"), INEXACT]),
    writes_cache=st.booleans(),
)
def test_no_call_within_its_limits_costs_more_than_its_worst_case(
    price: Price,
    input_tokens: int,
    images: int,
    replies: int,
    requested: int | None,
    model_limit: int | None,
    usual: int | None,
    cap: Decimal | None,
    share: float,
    cached: float,
    undercounted: Decimal,
    writes_cache: bool,
) -> None:
    estimate = estimate_chat(
        price,
        input_tokens=input_tokens,
        images=images,
        replies=replies,
        requested=requested,
        model_limit=model_limit,
        usual=usual,
        cap=cap,
        exact=undercounted == 1,
        writes_cache=writes_cache,
    )

    # What is sent as `max_tokens` holds, else what the model itself can say.
    sent = requested or estimate.reply_limit or model_limit
    if sent is None:
        assert not price.output
        sent = 10**6
    really = int(input_tokens * undercounted)
    usage = Usage(
        input_tokens=really,
        output_tokens=int(sent * share) * replies,
        cached_tokens=int(really * cached),
        cache_write_tokens=really if writes_cache else 0,
        images=images,
    )
    assert cost(usage, price) <= estimate.worst_case
    assert estimate.expected <= estimate.worst_case


@given(price=prices(), input_tokens=tokens, usual=st.integers(1, 1000), cap=dollars)
def test_a_reply_is_cut_at_what_the_cap_affords_and_never_below_its_usual_length(
    price: Price, input_tokens: int, usual: int, cap: Decimal
) -> None:
    estimate = estimate_chat(price, input_tokens=input_tokens, requested=None, model_limit=None, usual=usual, cap=cap)

    assert estimate.worst_case <= max(cap, estimate.expected)


@given(price=prices(), input_tokens=tokens)
def test_an_embedding_costs_its_input(price: Price, input_tokens: int) -> None:
    estimate = estimate_embedding(price, input_tokens=input_tokens, longest=7)

    assert estimate.expected == estimate.worst_case == cost(Usage(input_tokens=input_tokens), price)
    assert estimate.context_tokens == 7


def test_the_files_price_holds_before_the_maps() -> None:
    mapped = Price(input=Decimal(9), source="price map")

    assert price_of(PRICE, mapped, unknown_is_free=True) is PRICE
    assert price_of(None, mapped, unknown_is_free=True) is mapped


def test_an_unknown_price_is_no_price_unless_the_file_says_free() -> None:
    assert price_of(None, None, unknown_is_free=False) is None
    free = price_of(None, None, unknown_is_free=True)
    assert free is not None
    assert free.is_free
