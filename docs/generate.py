"""Write the docs that are drawn from the code. `python docs/generate.py` rewrites them, `--check` compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from sekha.cli.app import STORY, sekha
from sekha.cli.exits import EXITS
from sekha.config import json_schema

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


GENERATED: Mapping[str, Callable[[], str]] = {
    "docs/cli.md": cli,
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
