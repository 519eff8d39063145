"""Ingest documents, with every step and every batch on the record."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from sekha.ingest import IngestReport, IngestRequest, IngestSteps
from sekha.ingest import ingest as ingest_in_order
from tasks.calls import embed_batch
from tasks.keeping import await_indexed, find_changes, read_documents, remove_stale, upsert_batch
from tasks.money import estimate_cost, reserve_budget, select_provider, settle_cost
from tasks.receipts import shown_progress, with_receipt
from tasks.resources import opened
from tasks.results import RESULT
from tasks.whole import given_whole

__all__ = ["STEPS", "ingest"]

STEPS = given_whole(
    IngestSteps(
        read=read_documents,
        compare=find_changes,
        estimate=estimate_cost,
        select=select_provider,
        reserve=reserve_budget,
        embed=embed_batch,
        upsert=upsert_batch,
        settle=settle_cost,
        catch_up=await_indexed,
        remove=remove_stale,
    )
)


def run_name() -> str:
    """What goes where: `docs → documents`."""
    request: IngestRequest = flow_run.parameters["request"]
    what = Path(request.path).name or request.path if request.path else f"{len(request.documents)} documents"
    return f"{what} → {request.collection}"


@flow(name="ingest", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def ingest(request: IngestRequest, config: str | None = None) -> IngestReport:
    """Make a collection hold the documents, embedding only what changed."""
    async with opened(config), shown_progress() as progress:
        return await with_receipt(ingest_in_order(request, STEPS, progress=progress))
