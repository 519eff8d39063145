"""What a flow run cost and how far it is, as Prefect shows it. No prompt and no answer is in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar, assert_never
from uuid import UUID

import httpx
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

from sekha.bill import Bill, open_bill
from sekha.calling import Attempt
from sekha.chat import Reply
from sekha.errors import IngestIncomplete, ProviderError, dollars
from sekha.ingest import IngestReport, Progress
from sekha.search import Found

__all__ = ["shown_progress", "with_receipt"]

T = TypeVar("T", Reply, IngestReport, Found)

PROGRESS_SECONDS = 2.0
FAILURES_SHOWN = 50

log = logging.getLogger("sekha.flows")


async def with_receipt(outcome: Awaitable[T]) -> T:
    """Wait for a flow's outcome, and leave in Prefect what it cost and who was asked, also when it fails."""
    bill = open_bill()
    try:
        done = await outcome
    except IngestIncomplete as error:
        await _publish(_receipt(error.report), _tags(error.report))
        raise
    except ProviderError as error:
        await _publish(_receipt_of_failure(error.attempts, bill), _tags_of_failure(error.attempts))
        raise
    await _publish(_receipt(done), _tags(done))
    return done


@asynccontextmanager
async def shown_progress(what: str = "chunks are stored") -> AsyncIterator[Progress]:
    """Show how far something long is, if it takes more than a moment: `7 of 12 chunks are stored`."""
    latest: list[tuple[int, int]] = []
    shown: list[UUID] = []

    async def show() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            await _show_progress(latest, shown, what)

    showing = asyncio.create_task(show())
    try:
        yield lambda done, total: latest.append((done, total))
    finally:
        showing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await showing
        if shown:
            await _show_progress(latest, shown, what)


async def _show_progress(latest: list[tuple[int, int]], shown: list[UUID], what: str) -> None:
    if not latest:
        return
    done, total = latest[-1]
    latest.clear()
    percent, said = 100 * done / max(total, 1), f"{done:,} of {total:,} {what}."
    with _not_essential():
        if shown:
            await aupdate_progress_artifact(shown[0], percent, said)
        else:
            shown.append(await acreate_progress_artifact(percent, description=said))


async def _publish(markdown: str, tags: Sequence[str]) -> None:
    with _not_essential():
        await acreate_markdown_artifact(markdown, description="What it cost, and who was asked.")
        if tags:
            async with get_client() as client:
                run_id = UUID(str(flow_run.get_id()))
                await client.update_flow_run(run_id, tags=sorted({*flow_run.get_tags(), *tags}))


@contextlib.contextmanager
def _not_essential() -> Iterator[None]:
    """An answer that is paid for is not thrown away because Prefect cannot show what it cost."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("Prefect did not take the receipt: %s", type(error).__name__)


def _receipt(outcome: Reply | IngestReport | Found) -> str:
    usage = outcome.usage
    counted = ", counted here" if usage.counted else ""
    rows = [
        ("Provider", outcome.provider_id or "none was needed"),
        ("Model", outcome.model_id or "none was needed"),
        ("Estimated", dollars(outcome.estimated_cost)),
        ("Cost", dollars(outcome.cost)),
        ("Tokens", f"{usage.input_tokens:,} in, {usage.output_tokens:,} out{counted}"),
    ]
    match outcome:
        case Reply():
            return f"{_table(('', ''), rows)}\n\nChosen: {outcome.reason}.\n\n{_attempts(outcome.attempts)}"
        case Found():
            rows += [("Searched", outcome.space), ("Found", f"{len(outcome.hits):,}")]
            rows += [("Left out", f"{each.space}: {each.why}") for each in outcome.left_out]
            return _table(("", ""), rows)
        case IngestReport():
            rows += [
                ("Kept in", outcome.space),
                ("Documents", f"{outcome.documents:,}"),
                ("Chunks", f"{outcome.chunks:,}"),
                ("Embedded", f"{outcome.embedded:,}"),
                ("Unchanged", f"{outcome.unchanged:,}"),
                ("Removed", f"{outcome.removed:,}"),
                ("To be found", f"{outcome.not_yet_found:,}"),
                ("Missing", f"{outcome.missing:,}"),
                ("Left out", f"{len(outcome.left_out):,}"),
            ]
            return f"{_table(('', ''), rows)}\n\n{_failures(outcome)}".rstrip()
        case _:
            assert_never(outcome)


def _receipt_of_failure(attempts: Sequence[Attempt], bill: Bill) -> str:
    """A call that failed may be billed all the same."""
    cost = _table(("", ""), [("Cost", dollars(bill.cost))])
    return f"{cost}\n\n{_attempts(attempts)}"


def _tags_of_failure(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Who was asked last: a provider's failures are looked for by them."""
    return (f"provider:{attempts[-1].provider_id}", f"model:{attempts[-1].model_id}") if attempts else ()


def _attempts(attempts: Sequence[Attempt]) -> str:
    rows = [
        (str(number), each.provider_id, each.model_id, f"{each.seconds:.2f}", each.error or "answered")
        for number, each in enumerate(attempts, 1)
    ]
    return _table(("Attempt", "Provider", "Model", "Seconds", "Outcome"), rows)


def _failures(report: IngestReport) -> str:
    if not report.failures:
        return ""
    rows = [(each.source, str(each.chunks), each.error) for each in report.failures[:FAILURES_SHOWN]]
    return _table(("Missing", "Chunks", "Why"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _tags(outcome: Reply | IngestReport | Found) -> tuple[str, ...]:
    asked = [("provider", outcome.provider_id), ("model", outcome.model_id)]
    fell_back = isinstance(outcome, Reply) and outcome.attempts[0].provider_id != outcome.provider_id
    return (*(f"{what}:{name}" for what, name in asked if name), *(["fallback"] if fell_back else []))
