"""Back up the store and the ledger, with every step on the record."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from sekha.backup import BackupReport, BackupRequest, BackupSteps
from sekha.backup import backup as backup_in_order
from tasks.backing import (
    begin_backup,
    complete_backup,
    copy_ledger,
    copy_vectors,
    delete_old_backups,
    end_backup,
    publish_backup,
    read_back,
)
from tasks.resources import opened
from tasks.results import RESULT
from tasks.whole import given_whole

__all__ = ["STEPS", "backup"]

STEPS = given_whole(
    BackupSteps(
        begin=begin_backup,
        copy_vectors=copy_vectors,
        copy_ledger=copy_ledger,
        read_back=read_back,
        complete=complete_backup,
        delete_old=delete_old_backups,
        end=end_backup,
    )
)
NIGHTLY = BackupRequest()


def run_name() -> str:
    """Its name, or that it has none: `before-upgrade`, `by the time`."""
    request: BackupRequest = flow_run.parameters["request"]
    return request.name or "by the time"


@flow(name="backup", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def backup(request: BackupRequest = NIGHTLY, config: str | None = None) -> BackupReport:
    """Back up the store and the ledger, read the copy back, and delete backups that are old."""
    async with opened(config):
        report = await backup_in_order(request, STEPS)
        await publish_backup(report)
        return report
