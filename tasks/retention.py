"""Flow runs that are old enough to go, and their receipts, through Prefect's API alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from blocks.answering import prefect_answers
from sekha.recording.prefect_rows import RECORDED

__all__ = ["Deleted", "Old", "count_old_runs", "delete_old_runs", "publish_deleted"]

BATCH = 50
"""Prefect's API deletes no more at once."""
BATCHES = 40
"""What one task run deletes at the most, so that Prefect shows how far it is."""
ENGINE_TAG = "sekha"
"""What every run has that one of our deployments started."""


@dataclass(frozen=True, slots=True)
class Old:
    """Which flow runs go."""

    before: datetime
    """They ended before this."""
    engine_runs: bool = False
    """Also those that our deployments started, and not the gateway's requests alone."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """How many flow runs were old, and how many of them are deleted."""

    before: datetime
    found: int
    deleted: int


@task(cache_policy=NO_CACHE)
async def count_old_runs(old: Old) -> int:
    """Count what would be deleted."""
    with prefect_answers():
        async with get_client() as client:
            return int(await _ask(client, "/flow_runs/count", _filter(old)))


@task(cache_policy=NO_CACHE)
async def delete_old_runs(old: Old) -> int:
    """Delete some thousand of them, the oldest first; how many went. None are left when that is nothing."""
    deleted = 0
    with prefect_answers():
        async with get_client() as client:
            for _ in range(BATCHES):
                gone = await _delete_batch(client, old)
                if gone == 0:
                    break
                deleted += gone
    return deleted


@task(cache_policy=NO_CACHE)
async def publish_deleted(deleted: Deleted) -> None:
    """Leave in Prefect what was done."""
    rows = {
        "Ended before": f"{deleted.before:%Y-%m-%d %H:%M:%S} UTC",
        "Found": f"{deleted.found:,}",
        "Deleted": f"{deleted.deleted:,}",
    }
    markdown = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
    with prefect_answers():
        await acreate_markdown_artifact(markdown, description="What was deleted.")


async def _delete_batch(client: PrefectClient, old: Old) -> int:
    runs = await _ask(client, "/flow_runs/filter", {**_filter(old), "limit": BATCH, "sort": "START_TIME_ASC"})
    ids = [run["id"] for run in runs]
    if not ids:
        return 0
    # Prefect deletes task runs and logs with a run, and leaves its artifacts. They go first: whoever is
    # stopped in between finds the run again.
    of_these = {"artifacts": {"flow_run_id": {"any_": ids}}, "limit": 200}
    while artifacts := await _ask(client, "/artifacts/filter", of_these):
        for artifact in artifacts:
            with suppress(ObjectNotFound):
                await client.delete_artifact(artifact["id"])
    answer = await _ask(client, "/flow_runs/bulk_delete", {"flow_runs": {"id": {"any_": ids}}, "limit": BATCH})
    return len(answer["deleted"])


def _filter(old: Old) -> dict[str, Any]:
    """By flow and by tag: the name of a flow alone may be somebody else's too."""
    ended: dict[str, Any] = {"end_time": {"before_": old.before.isoformat()}}
    if old.engine_runs:
        flows = ["backup", "chat", "doctor", "embed", "importing", "ingest", "retention", "search"]
        return {"flows": {"name": {"any_": flows}}, "flow_runs": {**ended, "tags": {"any_": [RECORDED, ENGINE_TAG]}}}
    recorded = {**ended, "tags": {"all_": [RECORDED]}, "deployment_id": {"is_null_": True}}
    return {"flows": {"name": {"any_": ["chat", "embed", "search"]}}, "flow_runs": recorded}


async def _ask(client: PrefectClient, path: str, body: dict[str, Any]) -> Any:
    # Its own methods know of no bulk deletion, and read whole models of what we need one field of.
    response = await client.request("POST", cast(Any, path), json=body)
    return response.json()
