"""`sekha backup`, `sekha backups` and `sekha restore`: a copy that was read back, and the way back from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sekha.cli.invocation import Invocation, config_option, flow_option, json_option
from sekha.cli.opening import configuration, name_of, open_here, run_async
from sekha.cli.server import in_flow
from sekha.cli.terminal import columns, note, show_table, waiting, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from sekha.backup import BackupReport, BackupRequest, Manifest, RestorePlan, RestoreReport, RestoreRequest
    from sekha.loading import Loaded

__all__ = ["backup", "backups", "restore"]

FOLDER = click.Path(file_okay=False, path_type=Path)
LEFT_OUT = "Left out: `folder` under `backup:` in sekha.yaml."


@click.command()
@click.argument("name", required=False)
@click.option("--to", "folder", type=FOLDER, help=f"The folder for it. {LEFT_OUT}")
@click.option(
    "--keep", type=click.IntRange(min=1), help="Backups without a name to keep. Left out: `keep` under `backup:`."
)
@config_option
@json_option
@flow_option
@click.pass_obj
def backup(invocation: Invocation, /, name: str | None, folder: Path | None, keep: int | None, flow: bool) -> None:
    """Copy the store and the ledger, and read the copy back.

    Others may go on writing: what was acknowledged before is in it. An embedded store and a ledger in
    SQLite become files of a folder; Weaviate makes a backup of its own, on its `backend`. A backup is
    named by NAME, and stays until you delete it, or by the time, and goes when --keep newer ones are
    there.

    \b
    Examples:
      sekha backup
      sekha backup before-upgrade --to /mnt/backups
    """
    from sekha.backup import BackupRequest

    loaded = configuration(invocation)
    request = BackupRequest(name=name, folder=_absolute(folder), keep=keep)
    report: BackupReport
    if flow:
        with waiting("backing up"):
            report = in_flow("backup", request, name_of(invocation))
    else:
        report = run_async(_backed_up(loaded, request))
    if invocation.as_json:
        return write_json(report)
    return _show_report(report)


@click.command()
@click.option("--in", "folder", type=FOLDER, help=f"The folder to look into. {LEFT_OUT}")
@config_option
@json_option
@click.pass_obj
def backups(invocation: Invocation, folder: Path | None) -> None:
    """List the backups, the latest first.

    \b
    Examples:
      sekha backups
      sekha backups --in /mnt/backups --json
    """
    from sekha.backup import listed

    loaded = configuration(invocation)
    place = folder or loaded.path(loaded.config.backup.folder)
    found, broken = listed(place)
    if invocation.as_json:
        return write_json({"folder": str(place), "backups": found, "broken": [str(each) for each in broken]})
    if found:
        table = columns(
            "backup", "made at", "of", "records", "collections", "size", "ledger", right=("records", "size")
        )
        for each in found:
            names = [contents.name for contents in each.vectors.collections] if each.vectors else []
            table.add_row(
                each.name,
                each.made_at,
                each.of,
                f"{each.records:,}",
                ", ".join(names) or "none",
                _size(each),
                "in it" if each.ledger else "",
            )
        show_table(table)
    else:
        note(f"No backups in {place}.", "yellow")
    for error in broken:
        note(str(error), "yellow")
    return None


@click.command()
@click.argument("backup", metavar="NAME|PATH")
@click.option("--from", "folder", type=FOLDER, help=f"The folder that NAME is in. {LEFT_OUT}")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["vectors", "ledger"]),
    multiple=True,
    default=("vectors",),
    show_default=True,
    help="What to restore; may be repeated.",
)
@click.option("--into", type=click.Path(path_type=Path), help="A new file for the vectors of an embedded store.")
@click.option("--dry-run", "-n", is_flag=True, help="Check the backup, say what would be replaced, and do nothing.")
@click.option("--yes", "-y", is_flag=True, help="Replace what is there without asking.")
@click.option("--no-safety", is_flag=True, help="Do not back up what is there before it is replaced.")
@config_option
@json_option
@click.pass_obj
def restore(
    invocation: Invocation,
    /,
    *,
    backup: str,
    folder: Path | None,
    parts: tuple[Any, ...],
    into: Path | None,
    dry_run: bool,
    yes: bool,
    no_safety: bool,
) -> None:
    """Put a backup back, and read it back from there.

    The store then holds what the backup holds and nothing else. What is there is backed up first, as
    `before-restore-…`, and replaced only if you say so. End the gateways and workers of an embedded
    store before. The ledger stays as it is, unless you ask for that part: an older one has forgotten
    what was spent since, and budgets would have more left than is true.

    \b
    Examples:
      sekha restore before-upgrade --dry-run
      sekha restore /mnt/backups/20261123-013000 --part vectors --part ledger --yes
    """
    from sekha.backup import RestoreRequest

    loaded = configuration(invocation)
    request = RestoreRequest(
        backup=backup,
        parts=tuple(dict.fromkeys(parts)),
        folder=_absolute(folder),
        into=_absolute(into),
        replace=yes,
        safety=not no_safety,
    )
    done = run_async(_restored(loaded, request, dry_run=dry_run, ask=not invocation.as_json))
    if invocation.as_json:
        return write_json(done)
    return None


# --- backup --------------------------------------------------------------------------------


async def _backed_up(loaded: Loaded, request: BackupRequest) -> BackupReport:
    from sekha.backup import backup as backup_in_order
    from sekha.steps.backing import Backing

    async with open_here(loaded) as sekha:
        with waiting("backing up") as tell:
            return await backup_in_order(request, Backing(sekha.resources, tell).steps)


def _show_report(report: BackupReport) -> None:
    manifest = report.manifest
    facts = _facts()
    facts.add_row("backup", manifest.name)
    facts.add_row("in", report.path)
    _add_contents(facts, manifest)
    if manifest.files:
        facts.add_row("size", _size(manifest))
    if report.deleted:
        facts.add_row("deleted", ", ".join(report.deleted))
    if report.left_on_server:
        facts.add_row("still there", f"Weaviate deletes no backups: {', '.join(report.left_on_server)}")
    show_table(facts)
    note("It was read back.")


def _add_contents(facts: Table, manifest: Manifest) -> None:
    if manifest.vectors is None:
        facts.add_row("vectors", "none: there is no store yet")
    else:
        for at, each in enumerate(manifest.vectors.collections):
            said = "" if each.digest else ", written to meanwhile: of about that time"
            facts.add_row("" if at else "vectors", f"{each.name}: {each.records:,} records{said}")
        if not manifest.vectors.collections:
            facts.add_row("vectors", "no collections")
        if manifest.vectors.backup_id:
            facts.add_row("kept by", f"Weaviate, on {manifest.vectors.backend}: {manifest.vectors.backup_id}")
    facts.add_row("ledger", "in it" if manifest.ledger else "not in it")
    for what in manifest.left_out:
        facts.add_row("left out", what)


# --- restore -------------------------------------------------------------------------------


async def _restored(
    loaded: Loaded, request: RestoreRequest, *, dry_run: bool, ask: bool
) -> RestorePlan | RestoreReport:
    from sekha.steps.restoring import Restoring, held

    async with open_here(loaded) as sekha:
        with waiting("reading the backup") as tell:
            plan = await Restoring(sekha.resources, tell).plan(request)
        if ask:
            _show_plan(plan, held(plan))
        if dry_run:
            if ask:
                note("Nothing was restored.")
            return plan
        if plan.replaces and not request.replace and ask and sys.stdin.isatty():
            click.confirm("Replace it?", abort=True, err=True)
            plan = replace(plan, request=replace(request, replace=True))
        with waiting("restoring") as tell:
            report = await Restoring(sekha.resources, tell).restore(plan)
    if ask:
        _say_done(report)
    return report


def _show_plan(plan: RestorePlan, held: str) -> None:
    facts = _facts()
    facts.add_row("backup", f"{plan.manifest.name}, made at {plan.manifest.made_at}")
    _add_contents(facts, plan.manifest)
    if plan.vectors_into:
        facts.add_row("vectors into", plan.vectors_into)
    if plan.ledger_into:
        facts.add_row("ledger into", plan.ledger_into)
    facts.add_row("replaces", held)
    show_table(facts)


def _say_done(report: RestoreReport) -> None:
    note("Restored, and read back.")
    if report.safety:
        note(f"What was there before: sekha restore {report.safety}")
    if report.aside:
        note(f"The file that could not be read: {report.aside}")
    if report.not_compared:
        note(f"Written to while they were backed up, so not compared: {', '.join(report.not_compared)}", "yellow")


def _facts() -> Table:
    facts = columns("", "")
    facts.show_header = False
    return facts


def _absolute(path: Path | None) -> str | None:
    """The path from where the command was given, and not from where its configuration lies."""
    return None if path is None else str(path.expanduser().resolve())


def _size(manifest: Manifest) -> str:
    megabytes = sum(each.bytes for each in manifest.files) / 1e6
    return f"{megabytes:,.1f} MB" if manifest.files else "on the server"
