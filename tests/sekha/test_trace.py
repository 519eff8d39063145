from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from sekha.documents import Document
from sekha.errors import ProviderRejected
from sekha.ingest import IngestRequest, ingest
from sekha.trace import Tracer
from tests.fixtures.pipeline import Opens


@dataclass(frozen=True)
class Made:
    part: object = field(default_factory=object)


@dataclass(frozen=True)
class Steps:
    make: Callable[[], Awaitable[Made]]
    use: Callable[..., Awaitable[object]]


async def make() -> Made:
    return Made()


async def use(*given: object) -> object:
    return object()


def tracer() -> Tracer:
    seconds = iter(range(1000))
    return Tracer(clock=lambda: float(next(seconds)))


async def test_a_step_comes_after_those_whose_results_it_was_given() -> None:
    traced = tracer()
    steps = traced.wrap(Steps(make, use))

    first, second = await steps.make(), await steps.make()
    used = await steps.use(first, second)
    await steps.use(used)
    await steps.use("nothing of theirs")

    assert [step.after for step in traced.trace.steps] == [(), (), (0, 1), (2,), ()]
    assert [step.name for step in traced.trace.steps] == ["make", "make", "use", "use", "use"]


async def test_a_part_of_a_result_counts_as_the_result() -> None:
    traced = tracer()
    steps = traced.wrap(Steps(make, use))

    made = await steps.make()
    await steps.use(made.part)
    await steps.use([made])

    assert traced.trace.edges == {("make", "use")}


async def test_a_step_that_fails_leaves_how() -> None:
    async def fail() -> Made:
        raise ProviderRejected(provider_id="a")

    traced = tracer()
    steps = traced.wrap(Steps(fail, use))

    with pytest.raises(ProviderRejected):
        await steps.make()

    (step,) = traced.trace.steps
    assert (step.name, step.error, step.started, step.ended) == ("fail", "provider_rejected", 0, 1)


async def test_a_step_that_is_cancelled_leaves_that() -> None:
    async def hang() -> Made:
        await asyncio.Event().wait()
        raise AssertionError

    traced = tracer()
    task = asyncio.ensure_future(traced.wrap(Steps(hang, use)).make())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert traced.trace.steps[0].error == "CancelledError"


def test_only_a_dataclass_of_steps_can_be_traced() -> None:
    with pytest.raises(TypeError, match="a dataclass of callables"):
        tracer().wrap([make])


async def test_an_ingest_is_drawn_as_its_steps_with_those_that_ran_many_times_once(pipeline: Opens) -> None:
    traced = tracer()
    request = IngestRequest(documents=(Document(source="a", text="# 1\n\na\n\n# 2\n\nb"),), batch_size=1)

    async with pipeline() as opened:
        await ingest(request, traced.wrap(opened.runtime.ingest_steps))

    assert traced.trace.mermaid() == "\n".join(
        [
            "flowchart LR",
            "  read_documents[read_documents]",
            "  find_changes[find_changes]",
            "  estimate_cost[estimate_cost]",
            "  select_provider[select_provider]",
            "  reserve_budget[reserve_budget]",
            "  embed_batch[[embed_batch × n]]",
            "  upsert_batch[[upsert_batch × n]]",
            "  settle_cost[settle_cost]",
            "  await_indexed[await_indexed]",
            "  read_documents --> find_changes",
            "  find_changes --> estimate_cost",
            "  estimate_cost --> select_provider",
            "  select_provider --> reserve_budget",
            "  reserve_budget --> embed_batch",
            "  reserve_budget --> settle_cost",
            "  embed_batch --> upsert_batch",
            "  upsert_batch --> await_indexed",
        ]
    )
