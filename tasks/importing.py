"""Imports: looking at another store, taking a page of it, and what came of it."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from blocks.answering import prefect_answers
from sekha.importing import ImportReport, ImportRequest, Survey, Taken
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = ["finish_source", "publish_import", "survey_sources", "take_page"]


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def survey_sources(request: ImportRequest) -> Survey:
    """Look at what there is, and say which model made it and where it goes."""
    return await runtime().importing.survey_sources(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def take_page(request: ImportRequest, taken: Taken) -> Taken:
    """Read the next page, and keep what of it is sound and not here yet."""
    return await runtime().importing.take_page(request, taken)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def finish_source(request: ImportRequest, taken: Taken) -> Taken:
    """Wait until it is found, look whether it is whole, and drop it there if that was asked for."""
    return await runtime().importing.finish_source(request, taken)


@task(cache_policy=NO_CACHE)
async def publish_import(report: ImportReport) -> None:
    """Leave in Prefect what was taken over, and what was not."""
    lines = ["| from | to | records | imported | there already | left out |", "| --- | --- | --- | --- | --- | --- |"]
    for each in report.taken:
        left_out = "; ".join(f"{those.count:,}: {those.why}" for those in each.left_out) or "none"
        numbers = f"{each.read:,} | {each.imported:,} | {each.there:,}"
        lines.append(f"| {each.source.name} | {each.source.index} | {numbers} | {left_out} |")
    with prefect_answers():
        await acreate_markdown_artifact("\n".join(lines), description="What was taken over from another store.")
