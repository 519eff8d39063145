"""Ingest documents, with every step and every batch on the record."""

from __future__ import annotations

from prefect import flow

from sekha.ingest import IngestReport, IngestRequest, IngestSteps
from sekha.ingest import ingest as ingest_in_order
from tasks.calls import embed_batch
from tasks.keeping import find_changes, read_documents, remove_stale, upsert_batch
from tasks.money import estimate_cost, reserve_budget, select_provider, settle_cost
from tasks.resources import opened

__all__ = ["STEPS", "ingest"]

STEPS = IngestSteps(
    read=read_documents,
    compare=find_changes,
    estimate=estimate_cost,
    select=select_provider,
    reserve=reserve_budget,
    embed=embed_batch,
    upsert=upsert_batch,
    settle=settle_cost,
    remove=remove_stale,
)


@flow(name="ingest", persist_result=True, result_serializer="json")
async def ingest(request: IngestRequest, config: str | None = None) -> IngestReport:
    """Make a collection hold the documents, embedding only what changed."""
    async with opened(config):
        return await ingest_in_order(request, STEPS)
