"""Delete the gateway's runs in Prefect once they are old."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from tasks.receipts import shown_progress
from tasks.resources import configuration
from tasks.retention import Deleted, Old, count_old_runs, delete_old_runs, publish_deleted

__all__ = ["retention"]


def run_name() -> str:
    """What goes: `older than 14 days`."""
    days: float | None = flow_run.parameters["older_than_days"]
    return "older than configured" if days is None else f"older than {days:g} days"


@flow(name="retention", flow_run_name=run_name)
async def retention(
    older_than_days: Annotated[float, Field(gt=0)] | None = None,
    engine_runs: bool = False,
    dry_run: bool = False,
    config: str | None = None,
) -> Deleted:
    """Delete flow runs that a gateway recorded and that ended days ago.

    `older_than_days` is `recording.retention_days` if it is left out. With `engine_runs`, the runs that
    deployments of ours started go too; nobody else's ever do. `dry_run` counts them alone.

    It goes through Prefect's API, on a server anywhere, and may be stopped at any time: what is left is
    deleted the next time. Prefect can delete old runs itself, but then all of them alike, whoever's they are:
    PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED=events,flow_runs.
    """
    days = older_than_days
    if days is None:
        days = (await asyncio.to_thread(configuration, config)).config.recording.retention_days
    old = Old(before=datetime.now(UTC) - timedelta(days=days), engine_runs=engine_runs)
    found, deleted = await count_old_runs(old), 0
    async with shown_progress("old runs are deleted") as progress:
        while not dry_run and (some := await delete_old_runs(old)):
            deleted += some
            progress(deleted, found)
    done = Deleted(before=old.before, found=found, deleted=deleted)
    await publish_deleted(done)
    return done
