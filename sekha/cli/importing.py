"""`sekha import`: what another store holds, taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sekha.cli.invocation import Invocation, config_option, flow_option, json_option
from sekha.cli.opening import configuration, name_of, open_here, run_async
from sekha.cli.server import in_flow
from sekha.cli.terminal import columns, note, show_table, waiting, write_json

if TYPE_CHECKING:
    from sekha.importing import ImportReport, ImportRequest, Survey, Taken
    from sekha.loading import Loaded

__all__ = ["import_"]


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both kinds of store are asked in the same words."""
    for option in (
        click.option(
            "--page-size",
            type=click.IntRange(min=1),
            default=500,
            show_default=True,
            help="Records that are read and kept at a time.",
        ),
        click.option("--dry-run", "-n", is_flag=True, help="Say what would be taken over, and do nothing."),
        click.option("--into", help="The collection here.  [default: by the name there]"),
        click.option("--model", help="The embedding model that made the vectors, where they do not say."),
        click.option(
            "--collection", "-C", "names", multiple=True, help="Only this one there; may be repeated.  [default: all]"
        ),
    ):
        command = option(command)
    return command


@click.group("import")
def import_() -> None:
    """Take over what another store holds, with its vectors.

    Nothing is embedded anew. What is here already is left alone: after a failure or Ctrl-C run the
    same again, and it does what is missing. Records without a sound vector are left out and counted.
    """


@import_.command()
@click.argument("path")
@source_options
@config_option
@json_option
@flow_option
@click.pass_obj
def chroma(invocation: Invocation, /, path: str, dry_run: bool, flow: bool, **fields: Any) -> None:
    """Take over a Chroma store on this machine.

    PATH is the folder of Chroma's `PersistentClient`. It is only read, but Chroma brings one of an
    older version to its own as it opens it: copy the folder first if others still use it. Needs
    the extra `chroma`: pip install 'sekha[chroma]'.

    \b
    Examples:
      sekha import chroma ./chroma_db --dry-run
      sekha import chroma ./chroma_db -C conversations_768 --model nomic-embed-text
    """
    _import(invocation, dry_run=dry_run, flow=flow, origin="chroma", path=path, **fields)


@import_.command()
@source_options
@click.option("--text-property", help="What holds the text.  [default: text, content, document, body or chunk]")
@click.option("--drop", is_flag=True, help="Drop each class there once all of it was found here.")
@click.option("--url", help="Of another server.  [default: the one under `store:`]")
@click.option("--grpc-port", type=int, default=50051, show_default=True, help="The other server's.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable with the other server's key.")
@config_option
@json_option
@flow_option
@click.pass_obj
def weaviate(invocation: Invocation, /, dry_run: bool, flow: bool, **fields: Any) -> None:
    """Take over classes of a Weaviate server that Sekha did not make.

    `Conversations` with vectors of 768 numbers becomes `Conversations_768`. The old class stays
    until you drop it, and for as long as it has the name that the collection's alias should have,
    there is no alias.

    \b
    Examples:
      sekha import weaviate --dry-run
      sekha import weaviate -C Conversations --model nomic-embed-text --drop
    """
    _import(invocation, dry_run=dry_run, flow=flow, origin="weaviate", **fields)


def _import(invocation: Invocation, *, dry_run: bool, flow: bool, **fields: Any) -> None:
    from sekha.importing import ImportRequest

    if dry_run and flow:
        raise click.UsageError("--dry-run writes nothing, so there is no flow run to record: leave out one of the two.")
    loaded = configuration(invocation)
    request = ImportRequest(**fields)
    if dry_run:
        survey = run_async(_surveyed(loaded, request))
        return write_json(survey) if invocation.as_json else _show_survey(survey)
    report: ImportReport
    if flow:
        with waiting("importing"):
            report = in_flow("importing", request, name_of(invocation))
    else:
        report = _brought(loaded, request)
    return write_json(report) if invocation.as_json else _show_report(report)


async def _surveyed(loaded: Loaded, request: ImportRequest) -> Survey:
    async with open_here(loaded) as sekha:
        return await sekha.importing.survey_sources(request)


def _brought(loaded: Loaded, request: ImportRequest) -> ImportReport:
    from sekha.importing import bring

    async def work(tell: Callable[[str], None]) -> ImportReport:
        def progress(name: str, done: int, total: int) -> None:
            tell(f"{name}: {done:,} of {total:,} records looked at")

        async with open_here(loaded) as sekha:
            return await bring(request, sekha.importing.steps, progress=progress)

    with waiting("looking at what there is", lines=True) as tell:
        try:
            return run_async(work(tell))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Interrupted. What was imported stays; run the same again for the rest.") from None


def _show_survey(survey: Survey) -> None:
    if survey.sources:
        table = columns("from", "records", "dimension", "model", "to", right=("records", "dimension"))
        for each in survey.sources:
            table.add_row(each.name, f"{each.records:,}", str(each.dimension), each.model, each.index)
        show_table(table)
    _note_empty(survey.empty, nothing=not survey.sources)
    note("Nothing was imported.")


def _show_report(report: ImportReport) -> None:
    if report.taken:
        numbers = ("records", "imported", "there already", "left out")
        table = columns("from", "to", *numbers, right=numbers)
        for each in report.taken:
            left_out = sum(those.count for those in each.left_out)
            counts = (each.read, each.imported, each.there, left_out)
            table.add_row(each.source.name, each.source.index, *(f"{count:,}" for count in counts))
        show_table(table)
    _note_empty(report.empty, nothing=not report.taken)
    for each in report.taken:
        _note_what_is_left(each)


def _note_what_is_left(taken: Taken) -> None:
    name = taken.source.name
    for those in taken.left_out:
        note(f"{name}: left out {those.count:,}, {those.why}: {', '.join(those.examples)}", "yellow")
    if taken.without_text:
        note(f"{name}: {taken.without_text:,} have no text, and no other model can embed them", "yellow")
    if taken.not_yet_found:
        note(f"{name}: {taken.not_yet_found:,} are kept, and found once the store has indexed them")
    if taken.dropped:
        note(f"{name}: dropped there, since all of it was found here")
    if taken.in_the_way is not None:
        note(f"{name}: stands where the alias {taken.in_the_way!r} should. Run this again with --drop.", "yellow")


def _note_empty(names: tuple[str, ...], *, nothing: bool) -> None:
    if names:
        note(f"Empty there: {', '.join(names)}.")
    elif nothing:
        note("There is nothing to import.", "yellow")
