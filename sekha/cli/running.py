"""`sekha run`: the main job from end to end, each part a Prefect flow run, on a server of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sekha.cli.deploying import PORT, home_of
from sekha.cli.invocation import Invocation, config_option, json_option
from sekha.cli.keeping import heading_of, snippet
from sekha.cli.opening import file_configuration, name_of, run_async
from sekha.cli.server import Recorded, quiet, recorded_run
from sekha.cli.terminal import note, printable, say, waiting, write_json
from sekha.errors import dollars

if TYPE_CHECKING:
    from sekha.chat import Reply
    from sekha.documents import Chunk
    from sekha.ingest import IngestReport
    from sekha.loading import Loaded
    from sekha.search import Found

__all__ = ["run"]

PROMPT = "In one sentence: what does Sekha do?"
QUESTIONS = (
    "What happens when a provider fails?",
    "How is a budget kept from being passed?",
    "What does ingesting unchanged text again cost?",
)
"""Asked of this repository's own documents."""
RECORDED_SECONDS = 15.0
LABEL = 10


@click.command()
@config_option
@json_option
@click.option("--docs", metavar="FOLDER", help="Markdown or text to keep. Left out, in a checkout: its own docs.")
@click.option("--ask", "questions", multiple=True, help="What to search for; may be repeated.")
@click.pass_obj
def run(invocation: Invocation, docs: str | None, questions: tuple[str, ...]) -> None:
    """Do the whole job once, each part a Prefect flow run.

    Answers a chat request, keeps documents and searches them. Starts a Prefect server for as long as
    it takes, and ends it. What it recorded stays in .sekha/prefect beside the configuration:
    `sekha up` shows it.

    \b
    Examples:
      sekha run
      sekha -c sekha.yaml run --docs handbook --ask "Who approves travel?"
    """
    began = time.monotonic()
    loaded = file_configuration(invocation)
    folder = Path(docs).expanduser().resolve() if docs else _own_documents()
    asked, whose = _questions(folder, questions, own=docs is None)
    shown = run_async(_Job(loaded, name_of(invocation), folder, asked, whose, quiet=invocation.as_json).done())
    if invocation.as_json:
        return write_json({**shown, "seconds": round(time.monotonic() - began, 1)})
    return note(f"Done in {time.monotonic() - began:.0f} s. The Prefect server was stopped.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flows:
    """The flows, imported once the environment names the server."""

    chat: Callable[..., Awaitable[Any]]
    ingest: Callable[..., Awaitable[Any]]
    search: Callable[..., Awaitable[Any]]


class _Job:
    def __init__(
        self,
        loaded: Loaded,
        config: str | None,
        folder: Path,
        questions: Sequence[str],
        whose: str,
        *,
        quiet: bool,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._folder = folder
        self._questions = questions
        self._whose = whose
        self._quiet = quiet

    async def done(self) -> dict[str, Any]:
        from sekha.chat import ChatRequest
        from sekha.ingest import IngestRequest
        from sekha.search import SearchRequest
        from sekha.stack import LocalPrefect

        self._say_configuration()
        began = time.monotonic()
        with waiting("starting Prefect", lines=not self._quiet) as tell:
            async with LocalPrefect(home_of(self._loaded), progress=tell) as prefect:
                tell("loading the flows")
                flows = await asyncio.to_thread(_flows, prefect.environment)
                self._line("Prefect", f"{prefect.ui_url} for this run, ready after {time.monotonic() - began:.0f} s")

                tell("answering")
                request = ChatRequest(messages=({"role": "user", "content": PROMPT},))
                reply: Recorded[Reply] = await recorded_run(flows.chat, request, self._config)
                self._say_reply(reply)

                tell("ingesting")
                ingest = IngestRequest(path=str(self._folder))
                report: Recorded[IngestReport] = await recorded_run(flows.ingest, ingest, self._config)
                self._say_report(report)

                tell("searching")
                searches: list[Recorded[Found]] = []
                for question in self._questions:
                    searches.append(
                        await recorded_run(flows.search, SearchRequest(query=question, limit=3), self._config)
                    )
                    self._say_found(question, searches[-1])

                tell("waiting until Prefect has recorded it all")
                await _all_recorded([reply.id, report.id, *(found.id for found in searches)])
                tell("stopping Prefect")
        total = reply.value.total_cost + report.value.cost + sum((found.value.cost for found in searches), Decimal(0))
        self._say_where(total, reply, report, searches)
        return {
            "chat": _values(reply, cost=reply.value.total_cost, text=reply.value.text),
            "ingest": _values(report, cost=report.value.cost, space=report.value.space, chunks=report.value.chunks),
            "searches": [
                _values(found, cost=found.value.cost, question=question, hits=len(found.value.hits))
                for question, found in zip(self._questions, searches, strict=True)
            ],
            "cost": total,
        }

    # --- what is said ----------------------------------------------------------------------

    def _say_configuration(self) -> None:
        self._line("Config", self._loaded.source)
        kinds = {section.provider_type for section in self._loaded.config.providers}
        if kinds == {"builtin"}:
            self._more("An echo that repeats you, and embeddings from hashed words: free, offline, for a first look.")
            self._more("Your own providers: copy sekha.example.yaml to sekha.yaml.")

    def _say_reply(self, reply: Recorded[Reply]) -> None:
        value = reply.value
        self._blank()
        self._line("Chat", PROMPT)
        self._more(f"“{snippet(value.text, 240)}”")
        tokens = f"{value.usage.input_tokens:,} tokens in, {value.usage.output_tokens:,} out"
        self._cost(f"{value.provider_id}/{value.model_id} · {tokens}", value.total_cost, "chat", reply)

    def _say_report(self, report: Recorded[IngestReport]) -> None:
        value = report.value
        self._blank()
        self._line("Ingest", f"{value.documents:,} documents from {self._folder}")
        known = f", {value.unchanged:,} unchanged since the last time" if value.unchanged else ""
        removed = f", {value.removed:,} removed" if value.removed else ""
        self._more(f"{value.chunks:,} chunks in {value.space}: {value.embedded:,} embedded{known}{removed}")
        who = f"{value.provider_id}/{value.model_id} · " if value.model_id else ""
        self._cost(f"{who}{value.usage.input_tokens:,} tokens", value.cost, "ingest", report)

    def _say_found(self, question: str, found: Recorded[Found]) -> None:
        value = found.value
        self._blank()
        self._line("Search", f"{question}{self._whose}")
        for hit in value.hits:
            self._more(f"{hit.score:.2f}  {heading_of(hit)}")
        if not value.hits:
            self._more("nothing found")
        self._cost(f"{value.space} · {value.usage.input_tokens:,} tokens", value.cost, "search", found)

    def _say_where(
        self,
        total: Decimal,
        reply: Recorded[Reply],
        report: Recorded[IngestReport],
        searches: Sequence[Recorded[Found]],
    ) -> None:
        self._blank()
        self._line("Cost", f"{dollars(total)} in all")
        self._blank()
        self._line("Look", f"`{_start_again(self._config)}` starts the server again; then open, with every step drawn:")
        labelled = [("chat", reply.id), ("ingest", report.id), *(("search", found.id) for found in searches[:1])]
        for what, run_id in labelled:
            # Whole, however narrow the terminal: half a link leads nowhere.
            self._line("", f"http://127.0.0.1:{PORT}/runs/flow-run/{run_id}  {what}", "")

    def _cost(self, facts: str, cost: Decimal, flow: str, recorded: Recorded[Any]) -> None:
        self._more(f"{facts} · {dollars(cost)} · flow run {flow}/{recorded.name} ({recorded.id[:8]})", "dim")

    def _line(self, label: str, text: str, style: str = "bold") -> None:
        if not self._quiet:
            say(f"{label:<{LABEL}}{printable(text)}", style)

    def _more(self, text: str, style: str = "") -> None:
        if not self._quiet:
            say(printable(text), style, indent=LABEL)

    def _blank(self) -> None:
        if not self._quiet:
            say()


# --- what is asked -------------------------------------------------------------------------


def _own_documents() -> Path:
    """The checkout that this runs in. Its README and docs are what a first run keeps."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "README.md").exists() or not (root / "pyproject.toml").exists():
        raise click.UsageError("Say which documents to keep: sekha run --docs FOLDER.")
    return root


def _questions(folder: Path, given: Sequence[str], *, own: bool) -> tuple[tuple[str, ...], str]:
    """What to search for, and a word on where the question is from."""
    if given:
        return tuple(given), ""
    if own:
        return QUESTIONS, ""
    from sekha.documents import read_folder, split

    chunks = [chunk for document in read_folder(folder) for chunk in split(document)]
    headed = list(dict.fromkeys(_title(chunk) for chunk in chunks))
    step = max(1, len(headed) // 3)
    return tuple(headed[::step][:3]), "  (from your documents; ask your own with --ask)"


def _start_again(config: str | None) -> str:
    root = Path(__file__).resolve().parents[2]
    if Path.cwd() == root and (root / "Makefile").exists():
        return f"make up CONFIG={config}" if config else "make up"
    return f"sekha -c {config} up" if config else "sekha up"


def _title(chunk: Chunk) -> str:
    return chunk.heading.rsplit(" › ", 1)[-1] or snippet(chunk.text, 60)


# --- how it is run -------------------------------------------------------------------------


def _flows(environment: dict[str, str]) -> _Flows:
    # Prefect reads its settings when it is imported, so they come first.
    os.environ.update(quiet(environment))
    from flows.chat import chat
    from flows.ingest import ingest
    from flows.search import search

    return _Flows(chat=chat, ingest=ingest, search=search)


async def _all_recorded(flow_runs: Sequence[str]) -> None:
    """Wait until the server has what it was told of every step: task runs reach it behind the flow run's end."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    await asyncio.to_thread(EventsWorker.drain_all, RECORDED_SECONDS)
    await APILogHandler.aflush()
    ends_at = time.monotonic() + RECORDED_SECONDS
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(each) for each in flow_runs]))
    seen = -1
    async with get_client() as client:
        while time.monotonic() < ends_at:
            steps = await client.read_task_runs(flow_run_filter=wanted)
            if len(steps) == seen and all(step.state is not None and step.state.is_final() for step in steps):
                return
            seen = len(steps)
            # The server's recorder writes once a second.
            await asyncio.sleep(1.1)


def _values(recorded: Recorded[Any], **facts: Any) -> dict[str, Any]:
    return {"flow_run_id": recorded.id, "flow_run_name": recorded.name, **facts}
