"""How a command ends: one exit code for each kind of trouble, and one clear block on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

import click

from sekha.cli.values import plain
from sekha.errors import (
    ConfigError,
    IngestIncomplete,
    LedgerError,
    ProviderError,
    RecordError,
    RequestRefused,
    SekhaError,
    StoreError,
)

__all__ = ["EXITS", "INTERRUPTED", "READER_GONE", "exit_code", "installed_version", "report"]

INTERRUPTED = 130
READER_GONE = 141

EXITS: Mapping[int, str] = {
    0: "it worked",
    1: "unexpected: a bug of ours, and the message says how to report it",
    2: "usage: no such command, option or value",
    3: "configuration: edit sekha.yaml",
    4: "refused: change the request",
    5: "provider: wait, or route around it",
    6: "store or ledger: look at it",
    7: "Prefect: no server answers, or it does not do its work",
    8: "ingest incomplete: run it again",
    INTERRUPTED: "interrupted by Ctrl-C",
    READER_GONE: "whoever read the output stopped reading",
}
"""What each exit code says, and who can act on it."""

_BRANCHES: tuple[tuple[type[SekhaError], int], ...] = (
    (ConfigError, 3),
    (RequestRefused, 4),
    (ProviderError, 5),
    (StoreError, 6),
    (LedgerError, 6),
    (RecordError, 7),
    (IngestIncomplete, 8),
)


def exit_code(error: BaseException) -> int:
    """The exit code of an error: by its branch of the tree, 1 for what is in none."""
    if isinstance(error, click.UsageError):
        return 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    return next((code for branch, code in _BRANCHES if isinstance(error, branch)), 1)


def installed_version() -> str:
    try:
        return version("sekha")
    except PackageNotFoundError:
        return "from a checkout that is not installed"


def report(error: BaseException, *, as_json: bool) -> int:
    """Say on stderr what went wrong and what to do about it, and return the exit code."""
    ended = exit_code(error)
    said = _described(error)
    if os.environ.get("SEKHA_DEBUG") and not isinstance(error, click.UsageError | KeyboardInterrupt):
        traceback.print_exception(error, file=sys.stderr)
    if as_json:
        body = {"code": said.code, "message": said.message, "exit_code": ended, **said.details}
        sys.stderr.write(json.dumps({"error": body}, ensure_ascii=False) + "\n")
        return ended
    from sekha.cli.terminal import complain

    complain(said.message, said.next_move)
    return ended


@dataclass(frozen=True, slots=True)
class _Said:
    code: str
    message: str
    details: Mapping[str, Any]
    next_move: str = ""


def _described(error: BaseException) -> _Said:
    match error:
        case IngestIncomplete():
            listed = _missing(error)
            return _Said(error.code, error.told, _details(error), listed)
        case SekhaError():
            return _Said(error.code, error.told, _details(error))
        case click.UsageError():
            where = f"Try: {error.ctx.command_path} --help" if error.ctx else ""
            return _Said("usage", error.format_message(), {}, where)
        case click.ClickException():
            return _Said("usage", error.format_message(), {})
        case KeyboardInterrupt() | click.Abort():
            return _Said("interrupted", str(error) or "Interrupted.", {})
        case _:
            return _Said(
                "unexpected", _unexpected(error), {}, "Set SEKHA_DEBUG=1 and run it again to see where it happened."
            )


def _details(error: SekhaError) -> dict[str, Any]:
    details: dict[str, Any] = {}
    for name, value in vars(error).items():
        # An error must be reported whatever it carries.
        with contextlib.suppress(TypeError):
            details[name] = plain(value)
    return details | {"retryable": error.retryable}


def _missing(error: IngestIncomplete) -> str:
    by_source: dict[str, int] = {}
    for failure in error.report.failures:
        by_source[failure.source] = by_source.get(failure.source, 0) + failure.chunks
    lines = [f"{source}: {count} chunk{'s' if count != 1 else ''}" for source, count in list(by_source.items())[:20]]
    if len(by_source) > 20:
        lines.append(f"and {len(by_source) - 20} more documents")
    return "\n".join(["Not stored:", *(f"  {line}" for line in lines)])


def _unexpected(error: BaseException) -> str:
    # What a foreign exception says may hold a prompt or a key, so only its kind is shown.
    return (
        f"This is a bug in Sekha: {type(error).__name__}. Please report it with what you ran, and with "
        f"sekha {installed_version()}, Python {python_version()}, {sys.platform}."
    )
