"""`sekha doctor`: what is wrong with what is kept, and what to do about it."""

from __future__ import annotations

import sys
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from sekha.cli.dollars import DOLLARS
from sekha.cli.invocation import Invocation, config_option, flow_option, json_option
from sekha.cli.opening import configuration, name_of, open_here, run_async
from sekha.cli.server import in_flow
from sekha.cli.terminal import columns, note, say, show_table, waiting, write_json
from sekha.errors import dollars

if TYPE_CHECKING:
    from sekha.doctor import Diagnosis, DoctorRequest, Finding
    from sekha.loading import Loaded

__all__ = ["doctor"]

PROBLEMS_FOUND = 6


@click.command()
@click.option(
    "--collection", "-C", "collections", multiple=True, help="Only this one; may be repeated.  [default: all]"
)
@click.option(
    "--repair",
    type=click.Choice(["vectors", "models", "texts", "duplicates", "aliases"]),
    multiple=True,
    help="What to repair; may be repeated.",
)
@click.option("--max-cost", type=DOLLARS, help="US dollars that embedding anew may cost at the most.")
@click.option("--yes", "-y", is_flag=True, help="Delete without asking.")
@config_option
@json_option
@flow_option
@click.pass_context
def doctor(
    context: click.Context,
    /,
    *,
    collections: tuple[str, ...],
    repair: tuple[Any, ...],
    max_cost: Decimal | None,
    yes: bool,
    flow: bool,
) -> None:
    """Look at every record that is kept, and say what is wrong.

    Each finding has how many records it is about, a few of their ids and the next command. Others may
    go on reading and writing. Nothing is changed without --repair: `vectors` and `models` embed the
    records anew from their texts, under the budgets; `texts` deletes those without a text, and
    `duplicates` those that repeat another's; `aliases` points those that are missing or wrong and
    deletes those that name nothing. Exits with 6 when something is wrong.

    \b
    Examples:
      sekha doctor
      sekha doctor --collection documents --repair vectors
    """
    from sekha.doctor import DoctorRequest

    invocation: Invocation = context.obj
    loaded = configuration(invocation)
    request = DoctorRequest(collections=collections, repair=tuple(dict.fromkeys(repair)), max_cost=max_cost)
    if not yes and {"texts", "duplicates"}.intersection(request.repair):
        _ask(loaded, request)
    if flow:
        with waiting("looking at what is kept"):
            found: Diagnosis = in_flow("doctor", request, name_of(invocation))
    else:
        found = _looked(loaded, request)
    if invocation.as_json:
        write_json(found)
    else:
        _show(found)
    if found.problems:
        context.exit(PROBLEMS_FOUND)


def _ask(loaded: Loaded, request: DoctorRequest) -> None:
    """Say what would be deleted, and go on only when somebody says so."""
    if not sys.stdin.isatty():
        raise click.UsageError("--repair texts and --repair duplicates delete: say --yes, or answer on a terminal.")
    found = _looked(loaded, replace(request, repair=()))
    doomed = [each for each in found.findings if each.kind in ("texts", "duplicates") and each.kind in request.repair]
    for each in doomed:
        note(_said(each))
    if doomed:
        click.confirm(f"Delete {sum(each.count for each in doomed):,} records?", abort=True, err=True)


def _looked(loaded: Loaded, request: DoctorRequest) -> Diagnosis:
    from sekha.doctor import diagnose
    from sekha.steps.doctoring import Doctoring

    async def work() -> Diagnosis:
        async with open_here(loaded) as sekha:
            telling = replace(sekha.doctor_steps, examine=Doctoring(sekha.resources, tell).examine_index)
            return await diagnose(request, telling, progress=embedded_anew)

    def embedded_anew(name: str, done: int, total: int) -> None:
        tell(f"{name}: {done:,} of {total:,} records embedded anew")

    with waiting("looking at what is kept") as tell:
        try:
            return run_async(work())
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Interrupted. What was repaired stays; run the same again for the rest.") from None


def _show(found: Diagnosis) -> None:
    if not found.indexes:
        note(f"Nothing is kept in {found.store}.")
    else:
        table = columns("index", "records", "dimension", "model", right=("records", "dimension"))
        for index in found.indexes:
            table.add_row(index.name, f"{index.records:,}", str(index.dimension), index.model or "none in the file")
        show_table(table)
    for each in found.findings:
        say()
        say(_said(each), "" if each.notice else "yellow")
        if each.examples:
            more = ", …" if each.count > len(each.examples) else ""
            say(f"ids: {', '.join(each.examples)}{more}", indent=2)
        say(f"next: {each.next}", indent=2)
    say()
    _show_repaired(found)
    wrong = len(found.problems)
    if not found.findings:
        note("Nothing is wrong.")
    elif not wrong:
        note("Nothing is wrong; the rest is to know.")


def _said(found: Finding) -> str:
    records = f"{found.count:,} record{'' if found.count == 1 else 's'}"
    if found.examples:
        return f"{found.where}: {records} {found.what}"
    return f"{found.where}: {found.what}" + (f" ({records})" if found.count else "")


def _show_repaired(found: Diagnosis) -> None:
    if found.embedded:
        note(f"Embedded anew: {found.embedded:,} records, for {dollars(found.cost)}.")
    if found.deleted:
        note(f"Deleted: {found.deleted:,} records.")
    if found.aliases:
        note(f"Set right: {', '.join(found.aliases)}.")
