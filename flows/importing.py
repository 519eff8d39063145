"""Take over what another store holds, with every page on the record."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from sekha.importing import ImportReport, ImportRequest, ImportSteps, bring
from tasks.importing import finish_source, publish_import, survey_sources, take_page
from tasks.receipts import shown_progress
from tasks.resources import opened
from tasks.results import RESULT
from tasks.whole import given_whole

__all__ = ["STEPS", "importing"]

STEPS = given_whole(ImportSteps(survey=survey_sources, take=take_page, finish=finish_source))


def run_name() -> str:
    """What is taken over: `chroma old-store`, `weaviate Conversations`."""
    request: ImportRequest = flow_run.parameters["request"]
    what = ", ".join(request.names) or (Path(request.path).name if request.path else "all")
    return f"{request.origin} {what}"


@flow(name="importing", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def importing(request: ImportRequest, config: str | None = None) -> ImportReport:
    """Bring another store's records across, and leave alone what is here already."""
    async with opened(config), shown_progress("records are looked at") as progress:
        report = await bring(request, STEPS, progress=lambda _, done, total: progress(done, total))
        await publish_import(report)
        return report
