"""`sekha up`, `sekha deploy` and `sekha blocks push`: a Prefect server, and what it has to know of Sekha."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sekha import hangup
from sekha.address import without_secrets
from sekha.cli.invocation import BLOCK, Invocation, config_option, json_option
from sekha.cli.opening import configuration, file_configuration, name_of
from sekha.cli.terminal import columns, note, say, show_table, waiting, write_json

if TYPE_CHECKING:
    from sekha.loading import Loaded

__all__ = ["PORT", "blocks", "deploy", "home_of", "named_for_children", "obey_hangups", "up"]

PORT = 4200
"""Where Prefect's documentation, and so everyone, looks for a server."""

HANGUP_SECONDS = 1.0
"""Whoever is told that its terminal has ended is told within these."""
AHEAD_SECONDS = 3.0
"""A SIGHUP that came within these before its terminal was found gone told of that: a shell passes it on, then ends."""


@click.command()
@config_option
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=PORT, show_default=True, help="Prefect's port; 0 for a free one."
)
@click.option(
    "--gateway-port", type=click.IntRange(0, 65_535), help="The gateway's. Left out: `server_port`; 0 for a free one."
)
@click.pass_obj
def up(invocation: Invocation, port: int, gateway_port: int | None) -> None:
    """Run Prefect, a worker, the deployments and the gateway here.

    The gateway's requests are recorded there. Ctrl-C ends them all. What they record stays in
    .sekha/prefect beside the configuration, and what `sekha run` recorded is there too.

    \b
    Examples:
      sekha up
      sekha -c production.yaml up --port 4300 --gateway-port 5300
    """
    loaded = file_configuration(invocation)
    with named_for_children(invocation):
        asyncio.run(_up(loaded, port, loaded.config.server_port if gateway_port is None else gateway_port))


@click.command()
@click.option("--automations", is_flag=True, help="Register automations too, switched off: opened circuits and such.")
@click.option("--notify", metavar="BLOCK", help="Switch them on: they notify this block, as in slack-webhook/ops.")
@click.pass_obj
def deploy(invocation: Invocation, automations: bool, notify: str | None) -> None:  # noqa: ARG001 - every command is given one
    """Register the flows on your Prefect server.

    It is the one that PREFECT_API_URL names. Running it again updates what is there. A worker of the
    work pool `sekha` then runs them.

    \b
    Examples:
      PREFECT_API_URL=https://prefect.example.com/api sekha deploy
      sekha deploy --notify slack-webhook/ops
    """
    from sekha.cli.server import answering
    from sekha.stack import POOL, deployment_file
    from sekha.stack import deploy as register

    with answering() as api_url:
        with waiting("registering the deployments"):
            settings = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
            asyncio.run(register({**settings, "PREFECT_API_URL": api_url}))
        if automations or notify:
            from blocks.automations import register_automations

            declared = deployment_file("automations.yaml").read_text(encoding="utf-8")
            registered = asyncio.run(register_automations(declared, notify=notify))
            table = columns("automation", "", "")
            for each in registered:
                table.add_row(each.name, each.outcome, "on" if each.enabled else "off: switch it on in Prefect's UI")
            show_table(table)
    at = without_secrets(api_url)
    say(f"The flows chat, ingest, search, backup and retention are deployed to the work pool {POOL!r} at {at}.")
    note(f"Run them with a worker: prefect worker start --pool {POOL}")


@click.group()
def blocks() -> None:
    """Keep the configuration in Prefect, encrypted."""


@blocks.command()
@config_option
@json_option
@click.option("--name", default="sekha", show_default=True, help="Name of the configuration's block.")
@click.pass_obj
def push(invocation: Invocation, name: str) -> None:
    """Store the validated configuration as Prefect blocks.

    Each provider, budget and the store get a block of their own, which can be edited in Prefect's
    UI and holds from the next flow run on. Keys are stored encrypted. Running it again changes only
    what differs.

    \b
    Examples:
      sekha blocks push
      sekha -c production.yaml blocks push --name production
    """
    from sekha.cli.server import answering

    loaded = configuration(invocation)
    with answering():
        from blocks import push as store

        with waiting("storing blocks"):
            pushed = store(loaded, name)
    if invocation.as_json:
        return write_json({"config": f"{BLOCK}{name}", "blocks": pushed})
    table = columns("block", "kind", "")
    for block in pushed:
        table.add_row(block.name, block.slug, block.outcome)
    show_table(table)
    return note(f"Use it anywhere: --config {BLOCK}{name}")


def home_of(loaded: Loaded) -> Path:
    """Where the Prefect server of a configuration keeps what it records."""
    return loaded.path(".sekha/prefect")


@contextmanager
def named_for_children(invocation: Invocation) -> Iterator[None]:
    """Let the worker that is started find the configuration that this command was given."""
    before = os.environ.get("SEKHA_CONFIG")
    if name := name_of(invocation):
        os.environ["SEKHA_CONFIG"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("SEKHA_CONFIG", None)
        else:
            os.environ["SEKHA_CONFIG"] = before


async def _up(loaded: Loaded, port: int, gateway_port: int) -> None:
    from sekha.cli.serving import allowed_host
    from sekha.stack import LocalPrefect
    from sekha.stack import deploy as register

    ended = asyncio.Event()
    with waiting("starting Prefect", lines=True) as tell:
        async with LocalPrefect(home_of(loaded), port=port or None, progress=tell) as prefect:
            tell("registering the deployments")
            await register(prefect.environment)
            await prefect.worker()
            gateway_url = await prefect.gateway(allowed_host(loaded.config, loaded.config.server_host), gateway_port)
            for warning in loaded.warnings:
                note(warning, "yellow")
            # From here on Ctrl-C is how it is meant to end, and no accident.
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, ended.set)
            hanging_up = obey_hangups(end=ended.set, reload=prefect.reload_gateway)
            say("Sekha is up", "bold green")
            table = columns("", "")
            table.show_header = False
            table.add_row("configuration", loaded.source)
            table.add_row("gateway", f"{gateway_url}/v1, explained at {gateway_url}/docs")
            table.add_row("look", prefect.ui_url)
            table.add_row("use it", f"export PREFECT_API_URL={prefect.api_url}")
            table.add_row("then", "sekha chat --flow …, or run the deployments chat, ingest and search in the UI")
            table.add_row("logs", str(prefect.home))
            show_table(table)
            tell("Ctrl-C ends it")
            watching = asyncio.create_task(prefect.watch())
            asked = asyncio.create_task(ended.wait())
            await asyncio.wait([watching, asked], return_when=asyncio.FIRST_COMPLETED)
            tell("stopping")
            asked.cancel()
            hanging_up.cancel()
            if watching.done():
                watching.result()
            watching.cancel()
    note("Stopped.")


def obey_hangups(*, end: Callable[[], None], reload: Callable[[], None]) -> asyncio.Task[None]:
    """End when a SIGHUP comes of a terminal that was closed, and reload at any other.

    The task watches that terminal, and is done once it is gone.
    """
    loop = asyncio.get_running_loop()
    terminal, asked_at = hangup.Terminal(), -math.inf

    def hung_up() -> None:
        nonlocal asked_at
        if terminal.is_gone:
            return end()
        asked_at = loop.time()
        return reload()

    async def watch() -> None:
        while not terminal.is_gone:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(HANGUP_SECONDS)
        if loop.time() - asked_at < AHEAD_SECONDS:
            return end()
        await asyncio.sleep(HANGUP_SECONDS)
        # It has ended and sent nothing. Taken for there, the next request to reload would end it all.
        return terminal.outlive()

    loop.add_signal_handler(signal.SIGHUP, hung_up)
    return asyncio.create_task(watch())
