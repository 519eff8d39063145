"""`sekha ingest` and `sekha search`: documents in, and found again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from sekha.cli.dollars import DOLLARS
from sekha.cli.invocation import Invocation, config_option, flow_option, json_option
from sekha.cli.opening import configuration, name_of, open_here, run_async
from sekha.cli.server import in_flow
from sekha.cli.terminal import columns, console, note, printable, say, show_table, waiting, write_json
from sekha.errors import dollars

if TYPE_CHECKING:
    from rich.table import Table

    from sekha.ingest import Changes, Chunks, IngestReport, IngestRequest, LeftOut
    from sekha.loading import Loaded
    from sekha.routing import Plan
    from sekha.search import Found, FoundHit, SearchRequest
    from sekha.vectors.base import Filter

__all__ = ["heading_of", "ingest", "search", "snippet"]

LEFT_OUT_SHOWN = 20


@click.command()
@click.argument("path")
@click.option("--collection", "-C", default="documents", show_default=True, help="Where to keep them.")
@click.option(
    "--chunk-size", type=click.IntRange(min=50), default=1200, show_default=True, help="Characters of a chunk."
)
@click.option(
    "--chunk-overlap", type=click.IntRange(min=0), default=150, show_default=True, help="Characters two chunks share."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=512, show_default=True, help="Chunks stored at a time."
)
@click.option(
    "--max-document-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Larger documents are refused.",
)
@click.option("--skip-refused", is_flag=True, help="Leave out documents that cannot be read, instead of refusing all.")
@click.option("--max-cost", type=DOLLARS, help="US dollars that it may cost at the most.")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be embedded and its price, and do nothing.")
@config_option
@json_option
@flow_option
@click.pass_obj
def ingest(invocation: Invocation, /, path: str, dry_run: bool, flow: bool, **fields: Any) -> None:
    """Keep a folder's documents: split, embed what changed, store.

    PATH is a Markdown or text file, or a folder of them. Nothing is stored before all of it was
    read and priced. What is stored already and unchanged costs nothing, so running the same again
    after a failure or Ctrl-C does only what is missing.

    \b
    Examples:
      sekha ingest docs --dry-run
      sekha ingest docs --collection handbook --max-cost 0.50
    """
    from sekha.ingest import IngestRequest

    if fields["chunk_overlap"] >= fields["chunk_size"]:
        raise click.BadParameter("must be less than --chunk-size.", param_hint="--chunk-overlap")
    if dry_run and flow:
        raise click.UsageError("--dry-run calls nobody, so there is no flow run to record: leave out one of the two.")
    loaded = configuration(invocation)
    request = IngestRequest(path=path, **fields)
    report: IngestReport
    if dry_run:
        read, changes, plan = run_async(_planned(loaded, request))
        if invocation.as_json:
            return write_json(_plan_values(read, changes, plan))
        return _show_planned(read, changes, plan)
    if flow:
        with waiting("ingesting"):
            report = in_flow("ingest", request, name_of(invocation))
    else:
        report = _ingested(loaded, request, quiet=invocation.as_json)
    if invocation.as_json:
        return write_json(report)
    return _show_report(report)


@click.command()
@click.argument("query")
@click.option("--collection", "-C", default="documents", show_default=True, help="Where to look.")
@click.option(
    "--limit", "-l", type=click.IntRange(1, 10_000), default=5, show_default=True, help="Results at the most."
)
@click.option("--dimension", type=click.IntRange(min=1), help="Only the spaces of this dimension.  [default: all]")
@click.option("--hybrid", is_flag=True, help="Look for the question's words too.")
@click.option("--explain", is_flag=True, help="Say by which ranks each result came where it is.")
@click.option("--min-similarity", type=click.FloatRange(-1, 1), help="Leave out what is less similar; 1 is the same.")
@click.option("--source", "sources", multiple=True, help="Only from this document; may be repeated.")
@click.option("--max-cost", type=DOLLARS, help="US dollars that it may cost at the most.")
@config_option
@json_option
@flow_option
@click.pass_obj
def search(
    invocation: Invocation,
    /,
    *,
    query: str,
    collection: str,
    limit: int,
    dimension: int | None,
    hybrid: bool,
    explain: bool,
    min_similarity: float | None,
    sources: tuple[str, ...],
    max_cost: Decimal | None,
    flow: bool,
) -> None:
    """Find what is nearest to a question, nearest first.

    A collection that was embedded by several models is asked under each of them, and what they
    find is merged by rank: no two models measure similarity alike.

    \b
    Examples:
      sekha search "How do I undo a migration?"
      sekha search "retry" --collection handbook --source docs/errors.md --json
    """
    from sekha.search import SearchRequest

    loaded = configuration(invocation)
    request = SearchRequest(
        query=query,
        collection=collection,
        dimension=dimension,
        limit=limit,
        hybrid=hybrid,
        where=_from(sources),
        min_similarity=min_similarity,
        max_cost=max_cost,
    )
    with waiting("searching"):
        found: Found = in_flow("search", request, name_of(invocation)) if flow else run_async(_found(loaded, request))
    if invocation.as_json:
        return write_json(_found_values(found))
    return _show_found(found, explain=explain)


# --- ingest --------------------------------------------------------------------------------


def _ingested(loaded: Loaded, request: IngestRequest, *, quiet: bool) -> IngestReport:
    done = [0, 0]
    with _progress(quiet=quiet) as tell:

        def progress(stored: int, total: int) -> None:
            done[:] = stored, total
            tell(stored, total)

        async def work() -> IngestReport:
            async with open_here(loaded) as sekha:
                return await sekha.ingest(request, progress=progress)

        try:
            return run_async(work())
        except KeyboardInterrupt:
            stored, total = done
            raise KeyboardInterrupt(
                f"Interrupted. {stored:,} of {total:,} chunks are stored; run the same again for the rest."
                if total
                else "Interrupted before anything was stored."
            ) from None


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Tell how far it is: a bar on a terminal, a line for each batch elsewhere, nothing to programs."""
    if quiet:
        yield lambda _stored, _total: None
    elif not sys.stderr.isatty():
        yield lambda stored, total: note(f"{stored:,} of {total:,} chunks stored") if stored else None
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*layout, console=console(sys.stderr), transient=True) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda stored, total: bar.update(task, description="embedding", completed=stored, total=total)


async def _planned(loaded: Loaded, request: IngestRequest) -> tuple[Chunks, Changes, Plan | None]:
    """The first half of an ingest: everything before money is held."""
    async with open_here(loaded) as sekha:
        steps = sekha.ingest_steps
        read = await steps.read(request)
        changes = await steps.compare(request, read)
        if not changes.batches:
            return read, changes, None
        return read, changes, await steps.select(changes.to_embed, await steps.estimate(changes.to_embed))


def _plan_values(read: Chunks, changes: Changes, plan: Plan | None) -> dict[str, Any]:
    return {
        "collection": changes.collection,
        "space": changes.space,
        "documents": read.documents,
        "chunks": len(read.chunks),
        "to_embed": len(changes.to_embed.texts),
        "unchanged": changes.unchanged,
        "left_out": read.left_out,
        "to_remove": len(changes.stale),
        "model": plan.first.model.name if plan else None,
        "input_tokens": plan.first.estimate.input_tokens if plan else 0,
        "estimated_cost": plan.first.estimate.expected if plan else Decimal(0),
    }


def _show_planned(read: Chunks, changes: Changes, plan: Plan | None) -> None:
    values = _plan_values(read, changes, plan)
    facts = columns("", "")
    facts.show_header = False
    facts.add_row("would read", f"{values['documents']:,} documents, {values['chunks']:,} chunks")
    embed = f"{values['to_embed']:,} chunks"
    if plan:
        embed += f", {values['input_tokens']:,} tokens, with {values['model']}"
    _add_left_out(facts, read.left_out)
    facts.add_row("would embed", embed)
    facts.add_row("unchanged", f"{values['unchanged']:,} chunks")
    facts.add_row("would remove", f"{values['to_remove']:,} chunks")
    facts.add_row("into", changes.space)
    facts.add_row("price", dollars(values["estimated_cost"]))
    show_table(facts)
    note("Nothing was embedded or stored.")


def _add_left_out(facts: Table, left_out: Sequence[LeftOut]) -> None:
    for at, each in enumerate(left_out[:LEFT_OUT_SHOWN]):
        facts.add_row("" if at else "left out", f"{each.source}: {each.why}")
    if len(left_out) > LEFT_OUT_SHOWN:
        facts.add_row("", f"and {len(left_out) - LEFT_OUT_SHOWN:,} more")


def _show_report(report: IngestReport) -> None:
    facts = columns("", "")
    facts.show_header = False
    facts.add_row("collection", f"{report.collection}, kept as {report.space}")
    facts.add_row("documents", f"{report.documents:,}")
    facts.add_row("chunks", f"{report.chunks:,}: {report.embedded:,} embedded, {report.unchanged:,} unchanged")
    _add_left_out(facts, report.left_out)
    if report.removed:
        facts.add_row("removed", f"{report.removed:,} chunks that their documents no longer have")
    if report.not_yet_found:
        facts.add_row(
            "to be found", f"{report.not_yet_found:,} chunks are kept, and found once the store has indexed them"
        )
    if report.model_id:
        facts.add_row("embedded by", f"{report.provider_id}/{report.model_id}")
        facts.add_row("tokens", f"{report.usage.input_tokens:,}{' (counted by us)' if report.usage.counted else ''}")
    facts.add_row("cost", f"{dollars(report.cost)} (estimated {dollars(report.estimated_cost)})")
    show_table(facts)


# --- search --------------------------------------------------------------------------------


def _from(sources: tuple[str, ...]) -> Filter | None:
    from sekha.vectors.base import Compare

    return Compare("source", "in", sources) if sources else None


async def _found(loaded: Loaded, request: SearchRequest) -> Found:
    async with open_here(loaded) as sekha:
        return await sekha.search(request)


def _found_values(found: Found) -> dict[str, Any]:
    hits = ("by_vector", "by_words")
    answers = [{name: value for name, value in vars(answer).items() if name not in hits} for answer in found.answers]
    return {**vars(found), "answers": answers}


def _show_found(found: Found, *, explain: bool) -> None:
    if not found.hits:
        note(f"Nothing found in {found.space}.", "yellow")
    for at, hit in enumerate(found.hits):
        if at:
            say()
        say(f"{hit.score:.3f}  {heading_of(hit)}", "bold")
        say(snippet(hit.text), indent=7)
        if explain:
            say(_why(hit), "dim", indent=7)
    for answer in found.answers:
        size = f" · {answer.size:,} records" if answer.size else ""
        tokens = f"{answer.usage.input_tokens:,} tokens"
        who = f"{answer.provider_id}/{answer.model_id}"
        note(f"{answer.space}{size} · {who} · {tokens} · {dollars(answer.cost)}")
    for each in found.left_out:
        note(f"{each.space} was left out: {each.why}", "yellow")


def _why(hit: FoundHit) -> str:
    """By which ranks it came where it is: `Documents_768, rank 2 of 1,400 · vector 3 · words 1 · similarity 0.71`."""
    of = f" of {hit.ranks.of:,}" if hit.ranks.of else ""
    parts = [f"{hit.space}, rank {hit.ranks.rank}{of}"]
    parts += [f"vector {hit.ranks.by_vector}"] if hit.ranks.by_vector else []
    parts += [f"words {hit.ranks.by_words}"] if hit.ranks.by_words else []
    parts += [] if hit.similarity is None else [f"similarity {hit.similarity:.3f}"]
    return " · ".join(parts)


def heading_of(hit: FoundHit) -> str:
    """Where a hit stands: `README.md › Install › Linux`."""
    source, heading = str(hit.properties.get("source", "")), str(hit.properties.get("heading") or "")
    return printable(f"{source} › {heading}" if heading else source)


def snippet(text: str, length: int = 160) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(printable(text).split())
    return line if len(line) <= length else f"{line[: length - 1].rsplit(' ', 1)[0]} …"
