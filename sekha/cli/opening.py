"""From what the command line says to an open Sekha, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from sekha.cli.invocation import BLOCK, Invocation

if TYPE_CHECKING:
    from sekha.loading import Loaded
    from sekha.runtime import Runtime

__all__ = ["configuration", "file_configuration", "name_of", "open_here", "open_looking", "run_async"]

T = TypeVar("T")


def configuration(invocation: Invocation) -> Loaded:
    """Load the configuration that the command line, the environment or the folder names."""
    from sekha.loading import load

    named = invocation.config or os.environ.get("SEKHA_CONFIG", "")
    if named.startswith(BLOCK):
        from sekha.cli.server import answering

        with answering():
            from blocks import load_config

            return load_config(named.removeprefix(BLOCK))
    return load(invocation.config, read_block=_secret)


def file_configuration(invocation: Invocation) -> Loaded:
    """The same for a command that starts a server of its own, where no block is stored yet."""
    named = invocation.config or os.environ.get("SEKHA_CONFIG", "")
    if named.startswith(BLOCK):
        raise click.UsageError(f"{named!r} is on a Prefect server, and this starts one of its own: name a file.")
    return configuration(invocation)


def name_of(invocation: Invocation) -> str | None:
    """How a flow run, which may start in another folder, finds the same configuration: by a link, if by one here."""
    from sekha.loading import find

    named = invocation.config or os.environ.get("SEKHA_CONFIG", "")
    if named.startswith(BLOCK):
        return named
    file = find(invocation.config, os.environ)
    return None if file is None else str(file.absolute())


def open_here(loaded: Loaded) -> Runtime:
    from sekha.resources import Resources
    from sekha.runtime import Runtime

    return Runtime(Resources(loaded))


async def open_looking(loaded: Loaded) -> Runtime:
    """The same with the circuits that the gateways on this ledger share, so that what is said of them holds there."""
    from sekha.circuits import Circuits
    from sekha.circuits_shared import SharedCircuits
    from sekha.errors import LedgerError
    from sekha.ledgers import open_database
    from sekha.resources import Resources, breaker_rules, ledger_url
    from sekha.runtime import Runtime

    url = ledger_url(loaded)
    circuits = Circuits(breaker_rules(loaded.config))
    if _may_be_there(url):
        database = open_database(url)
        # Without a table there never was a circuit. A ledger that cannot be reached is told of by the budgets.
        with contextlib.suppress(LedgerError):
            circuits.look_like(await asyncio.wrap_future(SharedCircuits(database).known()))
        await asyncio.to_thread(database.close)
    return Runtime(Resources(loaded, circuits=circuits))


def _may_be_there(ledger_url: str) -> bool:
    """Whether there is a ledger to look into: looking makes no file where there is none."""
    return not ledger_url.startswith("sqlite:///") or Path(ledger_url.removeprefix("sqlite:///")).exists()


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end; Ctrl-C cancels it, so that holds are released and files closed."""
    # What the log says of failed attempts, the command says itself once it knows how they ended.
    logging.getLogger("sekha").addHandler(logging.NullHandler())
    return asyncio.run(work)


def _secret(name: str) -> str:
    from sekha.cli.server import answering

    with answering():
        from prefect.blocks.system import Secret

        return str(cast("Secret[str]", Secret.load(name)).get())
