"""Write the docs that are drawn from the code. `python docs/generate.py` rewrites them, `--check` compares."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from sekha import errors as errors_module
from sekha.backup import BackupRequest, backup
from sekha.chat import ChatRequest, answer
from sekha.cli.app import STORY, sekha
from sekha.cli.exits import EXITS
from sekha.config import Config, json_schema
from sekha.doctor import DoctorRequest, diagnose
from sekha.documents import Document
from sekha.errors import SekhaError
from sekha.ingest import IngestRequest, ingest
from sekha.loading import BUILTIN, parse
from sekha.resources import Resources
from sekha.runtime import Runtime
from sekha.search import SearchRequest, search
from sekha.trace import Tracer

ROOT = Path(__file__).resolve().parent.parent


def cli() -> str:
    """Every command as its own help says it."""
    parts = [
        "# The command line",
        "What each command says of itself with `--help`. Results go to stdout; progress, costs and errors go to "
        "stderr. Colour and progress bars appear on a terminal only, and `NO_COLOR=1` turns colour off.",
        _help(sekha, "sekha"),
    ]
    for heading, commands in STORY.items():
        parts.append(f"## {heading}")
        for command in commands:
            parts += _sections(command, f"sekha {command.name}")
    exits = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXITS.items())
    parts += [
        "## Exit codes",
        f"| code | meaning |\n|---:|---|\n{exits}",
        "An error is one block on stderr. `SEKHA_DEBUG=1` adds the traceback, for a report.",
        "## JSON",
        "With `--json` a command prints one JSON document on stdout, or nothing there when it fails. The error is "
        "then one line of JSON on stderr: `code` never changes its meaning, and what else is there depends on it.",
        '```json\n{"error": {"code": "model_not_found", "message": "No model \'gpt-5-mni\'. Did you mean '
        '\'gpt-5-mini\'? …", "exit_code": 4, "retryable": false}}\n```',
        "Amounts are US dollars as numbers. Prices are US dollars for a million tokens.",
    ]
    return "\n\n".join(parts) + "\n"


def schema() -> str:
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def flows() -> str:
    """Every flow as it ran, on the built-in models."""
    with tempfile.TemporaryDirectory() as folder:
        chart = asyncio.run(_charts(Path(folder)))
    parts = [
        "# The flows",
        "Each flow is one line of steps, written once in `sekha/`. `import sekha` runs them in this process; "
        "`flows/` runs the same line with each step as a Prefect task, so that Prefect shows what is drawn here. "
        "An arrow means that a step was given the result of another; those that a longer path implies are left out.",
    ]
    for name, told in FLOWS.items():
        parts += [f"## {name}", told, f"```mermaid\n{chart[name]}\n```"]
    parts += [
        "## importing",
        "`flows.importing:importing` takes over what a Chroma or Weaviate store holds: it looks at all of it, then "
        "takes it page by page. What is here already is left alone, so a run that was killed is run again.",
        "## retention",
        "`flows.retention:retention` deletes the runs that gateways recorded once they are older than "
        "`recording.retention_days`, with their task runs and artifacts, in batches through Prefect's API. Its "
        "deployment runs once a day. Runs of these flows themselves stay, unless it is given `engine_runs`.",
        "## In Prefect",
        "A flow run is named by what tells it apart: the model that was asked for, `docs → documents`, `in documents`. "
        "Its artifacts hold what it cost, who was asked and how each attempt ended, and how far a long ingest is. "
        "Its tags name the provider and the model that served it or were asked last, and `fallback` when another had "
        "failed first. "
        "No prompt and no answer is in any of these, nor in the log and the state of a run that failed, where a "
        "provider's own words are left out; a run that is started through Prefect's API or with `--flow` "
        "has its request among its parameters, as every Prefect run has.",
        "The result is JSON in Prefect's result storage. A run that fails holds the error with its `code` and all that "
        "it carries but what a provider said.",
    ]
    return "\n\n".join(parts) + "\n"


FLOWS: Mapping[str, str] = {
    "chat": "`flows.chat:chat` answers one request. The worst case is held against the budgets before a provider is "
    "asked. Retries and fallback to the next candidate happen inside `call_provider`; whatever it ends in is settled.",
    "ingest": "`flows.ingest:ingest` makes a collection hold the documents of a folder. Nothing is stored before "
    "everything was read, compared with what is there, and priced. Each batch is one `embed_batch` and one "
    "`upsert_batch`, two at a time. Here a document has become shorter, so that its last chunks are removed.",
    "backup": "`flows.backup:backup` copies the store and the ledger while others write, reads the copy back and only "
    "then makes it a backup, in one move. Old ones go last. Its deployment has a schedule that is switched off: see "
    "[operations.md](operations.md#backups).",
    "doctor": "`flows.doctor:doctor` looks at every record of every index, says what is wrong, and repairs what it is "
    "asked to: here a record lost its vector, which is made anew under the budgets before all is looked at once more. "
    "Its deployment has a schedule that is switched off: see "
    "[operations.md](operations.md#looking-after-what-is-kept).",
    "search": "`flows.search:search` asks every space of a collection, each under its own model, and merges what they "
    "found by rank.",
}


async def _charts(folder: Path) -> dict[str, str]:
    traced = {name: Tracer(clock=time.perf_counter) for name in FLOWS}
    async with Runtime(Resources(parse(BUILTIN, source="the built-in models", folder=folder, environ={}))) as running:
        before = Document(source="guide.md", text="A paragraph of the guide.\n\n" * 500)
        now = Document(source="guide.md", text="A paragraph of the new guide.\n\n" * 300)
        await running.ingest([before])
        await answer(
            ChatRequest(messages=({"role": "user", "content": "Hello"},)), traced["chat"].wrap(running.chat_steps)
        )
        await ingest(IngestRequest(documents=(now,), batch_size=2), traced["ingest"].wrap(running.ingest_steps))
        await search(SearchRequest(query="Which guide?"), traced["search"].wrap(running.search_steps))
        _lose_a_vector(folder)
        await diagnose(DoctorRequest(repair=("vectors",)), traced["doctor"].wrap(running.doctor_steps))
        await backup(BackupRequest(), traced["backup"].wrap(running.backing.steps))
    return {name: tracer.trace.mermaid() for name, tracer in traced.items()}


def _lose_a_vector(folder: Path) -> None:
    with closing(sqlite3.connect(folder / ".sekha" / "vectors.db")) as db:
        db.execute("DELETE FROM vectors_1 WHERE id = (SELECT max(id) FROM vectors_1)")
        db.commit()


def configuration() -> str:
    """The page as it is written, each of its tables drawn anew."""
    sections = {section.__name__: section for section in _sections_of(Config)}
    return _filled("docs/configuration.md", "fields of", {name: _fields(each) for name, each in sections.items()})


def errors() -> str:
    """The page as it is written, each of its tables drawn anew."""
    branches = {branch.__name__: branch for branch in SekhaError.__subclasses__()}
    return _filled("docs/errors.md", "errors under", {name: _errors(branch) for name, branch in branches.items()})


GENERATED: Mapping[str, Callable[[], str]] = {
    "docs/configuration.md": configuration,
    "docs/errors.md": errors,
    "docs/cli.md": cli,
    "docs/flows.md": flows,
    "docs/sekha.schema.json": schema,
}
"""File, relative to the root → what writes it."""


def _sections(command: click.Command, path: str) -> list[str]:
    parts = [f"### `{path}`", _help(command, path)]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            parts += _sections(inner, f"{path} {name}")
    return parts


def _help(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path, terminal_width=90, max_content_width=90)
    context.help_option_names = ["-h", "--help"]
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join(["```text", *lines, "```"])


def _filled(path: str, what: str, tables: Mapping[str, str]) -> str:
    """Put each table between its two marks; every table has its place, and every place its table."""
    text = (ROOT / path).read_text("utf-8")
    placed = re.findall(rf"<!-- {what} (\w+) -->", text)
    if sorted(placed) != sorted(tables):
        raise SystemExit(f"{path} must have `<!-- {what} NAME -->` once for each of {', '.join(sorted(tables))}")

    def drawn(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n<!-- end -->"

    return re.sub(rf"(<!-- {what} (\w+) -->)\n.*?<!-- end -->", drawn, text, flags=re.DOTALL)


def _sections_of(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for part in _parts(field.annotation):
            yield from _sections_of(part)


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a type."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _fields(section: type[BaseModel]) -> str:
    rows = ["| key | value | left out | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description} |")
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    inner = [each for each in get_args(annotation) if each not in (type(None), ...)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(annotation) is tuple:
        return f"list of {_type(inner[0])}"
    if get_origin(annotation) is dict:
        return f"mapping of names to {_type(inner[1])}"
    if inner:
        return _type(inner[0])
    if next(_parts(annotation), None):
        return "mapping"
    return _TYPES[annotation]


_TYPES: Mapping[Any, str] = {
    str: "text",
    SecretStr: "reference",
    int: "whole number",
    float: "number",
    Decimal: "number",
    bool: "`true`, `false`",
}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    match field.get_default(call_default_factory=True):
        case None:
            return ""
        case BaseModel():
            return "its defaults"
        case () | {}:
            return "none"
        case tuple(values):
            return ", ".join(f"`{value}`" for value in values)
        case bool(value):
            return f"`{str(value).lower()}`"
        case value:
            return f"`{value}`"


def _errors(branch: type[SekhaError]) -> str:
    when = dict(re.findall(r"[├└]── (\w+) +(.+)", errors_module.__doc__ or ""))
    rows = ["| error | `code` | when | retryable | falls back |", "|---|---|---|---|---|"]

    def walk(kind: type[SekhaError], depth: int) -> None:
        name = "&nbsp;" * 4 * depth + f"`{kind.__name__}`"
        what = "what has no name of its own below" if kind is branch and kind.__subclasses__() else when[kind.__name__]
        retryable, falls_back = ("yes" if holds else "" for holds in (kind.retryable, kind.falls_back))
        rows.append(f"| {name} | `{kind.code}` | {what} | {retryable} | {falls_back} |")
        for child in kind.__subclasses__():
            if child.__module__ == SekhaError.__module__:
                walk(child, depth + 1)

    walk(branch, 0)
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    stale: list[str] = []
    for path, write in GENERATED.items():
        file = ROOT / path
        text = write()
        if file.exists() and file.read_text("utf-8") == text:
            continue
        stale.append(path)
        if "--check" not in arguments:
            file.write_text(text, "utf-8")
    if "--check" in arguments and stale:
        print(f"Not what the code says now: {', '.join(stale)}. Write them again: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
