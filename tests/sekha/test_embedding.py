from __future__ import annotations

import asyncio
from decimal import Decimal

import numpy as np
import pytest

from sekha.embedding import EmbedRequest
from sekha.errors import (
    InvalidRequest,
    LimitsReached,
    NoCandidate,
    ProviderAuthFailed,
    ProviderRejected,
    ProviderUnavailable,
    UnknownModel,
)
from sekha.pricing import Usage
from sekha.providers.builtin import hashed_embeddings
from sekha.steps.parts import TEXTS_PER_CALL
from tests.fixtures.pipeline import TWO_PROVIDERS, Opens

MANY = [f"text {number}" for number in range(2 * TEXTS_PER_CALL["openai"] + 1)]


def limited_to(tokens: int) -> str:
    """The first provider lets so many tokens pass in a minute. All of `MANY` are 3,100."""
    priority = "    priority: 1\n"
    return TWO_PROVIDERS.replace(priority, f"{priority}    limits: {{tokens_per_minute: {tokens}}}\n")


def down(name: str) -> ProviderUnavailable:
    return ProviderUnavailable(provider_id=name)


async def test_vectors_come_in_the_order_of_the_texts_and_are_paid_for(pipeline: Opens) -> None:
    async with pipeline() as opened:
        embedded = await opened.runtime.embed(["one", "two"])

        assert np.array_equal(embedded.vectors, hashed_embeddings(["one", "two"], 8))
        assert (embedded.dimension, embedded.provider_id, embedded.model_id) == (8, "first", "vectors")
        assert await opened.spent() == embedded.cost == Decimal("0.01")
        assert await opened.held() == 0


async def test_many_texts_are_sent_in_several_calls_and_come_back_in_order(pipeline: Opens) -> None:
    async with pipeline() as opened:
        embedded = await opened.runtime.embed(MANY)

        assert [len(texts) for texts in opened.actors["first"].embedded] == [512, 512, 1]
        assert np.array_equal(embedded.vectors, hashed_embeddings(MANY, 8))
        assert await opened.spent() == embedded.cost == 3 * Decimal("0.01")


async def test_each_call_is_estimated_for_its_own_texts(pipeline: Opens) -> None:
    async with pipeline() as opened:
        plan = await opened.runtime.route(EmbedRequest(texts=tuple(MANY), model="first/vectors"))

        embedded = await opened.runtime.embed(MANY, model="first/vectors")

        (line,) = await (await opened.runtime.resources.ledger()).report("provider")
        assert line.estimated == embedded.estimated_cost == plan.first.estimate.expected


async def test_each_call_counts_its_own_texts_against_the_limits_of_its_provider(pipeline: Opens) -> None:
    async with pipeline(limited_to(5000)) as opened:
        first, under_way, over = opened.actors["first"], asyncio.Semaphore(0), asyncio.Event()

        async def wait() -> None:
            under_way.release()
            await over.wait()

        first.acts = [wait, wait, wait]
        many = asyncio.create_task(opened.runtime.embed(MANY))
        for _ in range(3):
            await under_way.acquire()
        plan = await opened.runtime.route(EmbedRequest(texts=("one",)))
        over.set()
        await many

        assert plan.first.model.provider_id == "first"


async def test_a_call_that_failed_needs_room_for_its_own_texts_alone(pipeline: Opens) -> None:
    async with pipeline(limited_to(5000)) as opened:
        opened.actors["first"].acts = [down("first")]
        opened.actors["second"].acts = [down("second")] * 3

        embedded = await opened.runtime.embed(MANY)

        assert embedded.provider_id == "first"
        assert opened.time.seconds - 1000 < 60


async def test_what_was_embedded_before_a_failure_is_paid_for(pipeline: Opens) -> None:
    async with pipeline() as opened:

        async def fail_late() -> None:
            while await opened.spent() == 0:
                pass
            raise ProviderRejected(provider_id="first")

        opened.actors["first"].acts = [lambda: None, fail_late, fail_late]

        with pytest.raises(ProviderRejected):
            await opened.runtime.embed(MANY)

        assert await opened.spent() == Decimal("0.01")
        assert await opened.held() == 0


async def test_a_call_under_way_is_paid_for_when_another_fails_and_none_is_begun(pipeline: Opens) -> None:
    async with pipeline() as opened:
        failed = asyncio.Event()

        def fail() -> None:
            failed.set()
            raise ProviderRejected(provider_id="first")

        opened.actors["first"].acts = [failed.wait, fail]

        with pytest.raises(ProviderRejected):
            await opened.runtime.embed(MANY)

        assert len(opened.actors["first"].embedded) == 2
        assert await opened.spent() == Decimal("0.01")
        assert await opened.held() == 0


async def test_another_provider_of_the_same_model_stands_in(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [down("first")]

        embedded = await opened.runtime.embed("one")

        assert embedded.provider_id == "second"
        assert await opened.spent() == embedded.cost == Decimal("0.03")


async def test_a_hold_is_released_when_every_candidate_fails(pipeline: Opens) -> None:
    async with pipeline(rounds=1) as opened:
        opened.actors["first"].acts = [down("first")]
        opened.actors["second"].acts = [down("second")]

        with pytest.raises(ProviderUnavailable):
            await opened.runtime.embed("one")

        assert await opened.held() == await opened.spent() == 0


async def test_usage_that_nobody_reports_is_counted(pipeline: Opens) -> None:
    async with pipeline() as opened:
        opened.actors["first"].acts = [None]

        embedded = await opened.runtime.embed("one two three")

        assert embedded.usage == Usage(input_tokens=3, counted=True)
        assert await opened.spent() == embedded.cost == Decimal("0.003")


@pytest.mark.parametrize(("texts", "field"), [([], "input"), ([""], "input[0]"), (["a", ""], "input[1]")])
async def test_nothing_cannot_be_embedded(texts: list[str], field: str, pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(InvalidRequest) as caught:
            await opened.runtime.embed(texts)

    assert caught.value.field == field


async def test_a_chat_model_embeds_nothing(pipeline: Opens) -> None:
    async with pipeline() as opened:
        with pytest.raises(NoCandidate):
            await opened.runtime.embed("one", model="chat")
        with pytest.raises(UnknownModel, match="Did you mean 'vectors'"):
            await opened.runtime.embed("one", model="vector")


async def test_a_text_longer_than_the_context_window_is_refused_before_it_is_sent(pipeline: Opens) -> None:
    narrow = TWO_PROVIDERS.replace("dimension: 8,", "dimension: 8, context_window: 5,")

    async with pipeline(narrow) as opened:
        with pytest.raises(NoCandidate, match="do not fit its context window of 5"):
            await opened.runtime.embed(["short", "far too long a text for a window of five"])

        assert opened.actors["first"].embedded == []


def test_no_text_shows_when_a_request_is_printed() -> None:
    assert "secret" not in repr(EmbedRequest(texts=("a secret",)))


async def test_what_is_sent_in_several_calls_needs_room_for_one_of_them(pipeline: Opens) -> None:
    """All are 3,100 tokens, and the largest call has about half of them."""
    async with pipeline(limited_to(1_600)) as opened:
        first, second = opened.actors["first"], opened.actors["second"]
        first.acts, second.acts = [None] * 3, [down("second")] * 9

        embedded = await opened.runtime.embed(MANY, model="first/vectors")

        assert [len(texts) for texts in first.embedded] == [512, 512, 1]
        assert np.array_equal(embedded.vectors, hashed_embeddings(MANY, 8))
        assert 60 < opened.time.seconds - 1000 < 70
        assert await opened.held() == 0


async def test_a_call_for_which_its_provider_has_no_room_goes_to_another_that_has(pipeline: Opens) -> None:
    async with pipeline(limited_to(1_600)) as opened:
        opened.actors["first"].acts = [None]

        await opened.runtime.embed(MANY)

        assert [len(texts) for texts in opened.actors["first"].embedded] == [512, 1]
        assert [len(texts) for texts in opened.actors["second"].embedded] == [512]
        assert opened.time.slept == []


async def test_a_call_that_never_has_room_is_refused_before_any_is_made(pipeline: Opens) -> None:
    async with pipeline(limited_to(1_000)) as opened:
        with pytest.raises(LimitsReached):
            await opened.runtime.embed(MANY, model="first/vectors")

        assert opened.actors["first"].embedded == []


async def test_a_sibling_whose_key_has_lapsed_takes_no_patience_from_who_waits_for_room(pipeline: Opens) -> None:
    async with pipeline(limited_to(1_600)) as opened:
        first, second = opened.actors["first"], opened.actors["second"]
        first.acts, second.acts = [None] * 3, [ProviderAuthFailed(provider_id="second") for _ in range(9)]

        embedded = await opened.runtime.embed(MANY)

        assert sorted(len(texts) for texts in first.embedded) == [1, 512, 512]
        assert np.array_equal(embedded.vectors, hashed_embeddings(MANY, 8))
        assert 60 < opened.time.seconds - 1000 < 70
        assert await opened.held() == 0


async def test_a_call_that_waits_for_room_hears_at_once_that_another_failed(pipeline: Opens) -> None:
    async with pipeline(limited_to(1_600)) as opened:

        async def refuses() -> None:
            for _ in range(10):  # until the next waits for room
                await asyncio.sleep(0)
            raise ProviderRejected(provider_id="first")

        opened.actors["first"].acts = [refuses]
        with pytest.raises(ProviderRejected):
            await opened.runtime.embed(MANY, model="first/vectors")

        assert 0 < opened.time.seconds - 1000 < 30
