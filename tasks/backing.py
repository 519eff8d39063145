"""Backups: copying the store and the ledger, reading the copy back, and what goes for it."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from blocks.answering import prefect_answers
from sekha.backup import BackupReport, BackupRequest, CopiedFile, Draft, Manifest, Vectors
from tasks.resources import runtime
from tasks.retries import WAIT_FOR_THE_STORE, retry_if_retryable

__all__ = [
    "begin_backup",
    "complete_backup",
    "copy_ledger",
    "copy_vectors",
    "delete_old_backups",
    "end_backup",
    "publish_backup",
    "read_back",
]


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def begin_backup(request: BackupRequest) -> Draft:
    """Choose where it will stand, and clear away what somebody left who died."""
    return await runtime().backing.begin_backup(request)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def copy_vectors(draft: Draft) -> Vectors | None:
    """Copy the store while others write, or have its server do so."""
    return await runtime().backing.copy_vectors(draft)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def copy_ledger(draft: Draft) -> CopiedFile | None:
    """Copy the ledger's file while others spend."""
    return await runtime().backing.copy_ledger(draft)


@task(cache_policy=NO_CACHE, retry_condition_fn=retry_if_retryable, **WAIT_FOR_THE_STORE)
async def read_back(draft: Draft, vectors: Vectors | None, ledger: CopiedFile | None) -> Manifest:
    """Read the whole copy as the store would, and say what it holds."""
    return await runtime().backing.read_back(draft, vectors, ledger)


@task(cache_policy=NO_CACHE)
async def complete_backup(draft: Draft, manifest: Manifest) -> str:
    """Make it a backup, in one move."""
    return await runtime().backing.complete_backup(draft, manifest)


@task(cache_policy=NO_CACHE)
async def delete_old_backups(draft: Draft, manifest: Manifest) -> tuple[Manifest, ...]:
    """Delete the oldest backups of this store that nobody named."""
    return await runtime().backing.delete_old_backups(draft, manifest)


@task(cache_policy=NO_CACHE)
async def end_backup(draft: Draft) -> None:
    """Take away what is not whole, and let others make backups there."""
    await runtime().backing.end_backup(draft)


@task(cache_policy=NO_CACHE)
async def publish_backup(report: BackupReport) -> None:
    """Leave in Prefect what is in the backup, and what went for it."""
    manifest = report.manifest
    rows = {
        "Backup": manifest.name,
        "Folder": report.path,
        "Records": f"{manifest.records:,}",
        "Bytes": f"{sum(each.bytes for each in manifest.files):,}",
        "Ledger": "in it" if manifest.ledger else "not in it",
        "Left out": "; ".join(manifest.left_out) or "nothing",
        "Deleted": ", ".join(report.deleted) or "none",
    }
    markdown = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
    with prefect_answers():
        await acreate_markdown_artifact(markdown, description="What was backed up, and read back.")
