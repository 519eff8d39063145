"""What was said on the command line to every command: which configuration, and for whom to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

__all__ = ["BLOCK", "Invocation", "config_option", "flow_option", "json_option"]

F = TypeVar("F", bound=Callable[..., Any])
BLOCK = "block:"


@dataclass
class Invocation:
    """The options that stand before a command or behind it; the later one counts."""

    config: str | None = None
    as_json: bool = False


def config_option(command: F) -> F:
    return click.option(
        "--config",
        "-c",
        metavar="FILE|block:NAME",
        expose_value=False,
        callback=_keep("config"),
        help="The configuration. Left out: $SEKHA_CONFIG, ./sekha.yaml, else the built-in models.",
    )(command)


def json_option(command: F) -> F:
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_keep("as_json"),
        help="Print one JSON document on stdout; errors become JSON on stderr.",
    )(command)


def flow_option(command: F) -> F:
    return click.option(
        "--flow",
        is_flag=True,
        help="Run it as a Prefect flow run, recorded on the server that PREFECT_API_URL names.",
    )(command)


def _keep(field: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def keep(ctx: click.Context, parameter: click.Parameter, value: object) -> None:  # noqa: ARG001 - click's
        if value:
            setattr(ctx.ensure_object(Invocation), field, value)

    return keep
