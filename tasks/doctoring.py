"""Looking after a store: what does not fit, which records are not sound, and mending them."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from blocks.answering import prefect_answers
from sekha.doctor import Diagnosis, DoctorRequest, Examined, Faulty, Survey
from sekha.embedding import Embedded
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = [
    "delete_faulty",
    "examine_index",
    "gather_faulty",
    "name_indexes",
    "publish_diagnosis",
    "survey_store",
    "write_anew",
]


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def survey_store(request: DoctorRequest) -> Survey:
    """Look at what the store has, and what of it does not fit the configuration."""
    return await runtime().doctoring.survey_store(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def examine_index(request: DoctorRequest, survey: Survey, name: str) -> Examined:
    """Read every record of an index, its vector too, and say which are not sound."""
    return await runtime().doctoring.examine_index(request, survey, name)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def gather_faulty(request: DoctorRequest, examined: Examined, at: int) -> Faulty:
    """The next records to be embedded anew, as they are now."""
    return await runtime().doctoring.gather_faulty(request, examined, at)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def write_anew(faulty: Faulty, embedded: Embedded) -> int:
    """Keep the new vectors of the records whose texts are still what was embedded."""
    return await runtime().doctoring.write_anew(faulty, embedded)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def delete_faulty(examined: Examined) -> int:
    """Delete what has no text, and what repeats another's."""
    return await runtime().doctoring.delete_faulty(examined)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def name_indexes(survey: Survey) -> tuple[str, ...]:
    """Delete the aliases that name nothing, and point those that are missing."""
    return await runtime().doctoring.name_indexes(survey)


@task(cache_policy=NO_CACHE)
async def publish_diagnosis(diagnosis: Diagnosis) -> None:
    """Leave in Prefect what was found, and what to do about it."""
    lines = ["| index | records | model |", "| --- | --- | --- |"]
    lines += [f"| {each.name} | {each.records:,} | {each.model or 'none'} |" for each in diagnosis.indexes]
    if diagnosis.findings:
        lines += ["", "| where | how many | what | next |", "| --- | --- | --- | --- |"]
        lines += [f"| {each.where} | {each.count:,} | {each.what} | {each.next} |" for each in diagnosis.findings]
    with prefect_answers():
        await acreate_markdown_artifact("\n".join(lines), description="What the doctor found in the store.")
