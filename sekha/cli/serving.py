"""`sekha serve`: the gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from sekha.cli.invocation import Invocation, config_option, json_option
from sekha.cli.opening import configuration, name_of
from sekha.cli.terminal import say
from sekha.errors import ConfigError, Problem

if TYPE_CHECKING:
    from sekha.config import Config
    from sekha.gateway.sources import Source
    from sekha.loading import Loaded

__all__ = ["allowed_host", "serve"]

log = logging.getLogger("sekha.gateway")


@click.command()
@config_option
@json_option
@click.option("--host", help="Where to listen. Left out: `server_host` of the configuration.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Left out: `server_port`; 0 for a free one.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that serve.")
@click.option(
    "--poll",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look whether blocks that the configuration is made of were edited.",
)
@click.pass_obj
def serve(invocation: Invocation, host: str | None, port: int | None, workers: int, poll: float) -> None:
    """Serve OpenAI's API for every provider.

    Programs use it as they use OpenAI: base URL http://HOST:PORT/v1. Where it listens is said in one line
    on stdout; everything else is logged on stderr, a JSON object a line. Ctrl-C or SIGTERM lets what is
    under way end first, a second one cuts it. SIGHUP reads the configuration anew without dropping a request.

    \b
    Examples:
      sekha serve
      sekha -c block:production serve --workers 4
    """
    from sekha.gateway.server import fast_loop

    _open_streams()
    # Many workers are watched, and nobody is served, by this process.
    with asyncio.Runner(loop_factory=fast_loop if workers == 1 else None) as runner:
        runner.run(_serve(invocation, host, port, workers, poll))


def _open_streams() -> None:
    """Have standard input, output and error, be it without anybody at the other end."""
    # Whatever is opened next would go by their numbers, and the event loop aborts when a stream is none.
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free, and so will the workers.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - until the process ends


async def _serve(invocation: Invocation, host: str | None, port: int | None, workers: int, poll: float) -> None:
    from sekha.cli.watching import Watched, lives_in_prefect
    from sekha.gateway.sources import WhenAsked
    from sekha.loading import find

    name = name_of(invocation)
    run = partial(_run, host=host, port=port, workers=workers, as_json=invocation.as_json)
    if name is None or not lives_in_prefect(name):
        # A file that is away for a moment, while it is replaced, is not looked for elsewhere.
        found = find(invocation.config, os.environ)
        read = partial(configuration, invocation if found is None else replace(invocation, config=str(found)))
        return await run(read(), WhenAsked(read))
    async with Watched(name, poll) as watched:
        return await run(await watched.next(), watched)


async def _run(
    loaded: Loaded, source: Source, *, host: str | None, port: int | None, workers: int, as_json: bool
) -> None:
    from sekha.gateway.logs import configure, standard_error
    from sekha.gateway.metrics import Metrics
    from sekha.gateway.server import serve as serve_here
    from sekha.gateway.workers import run_workers

    config = loaded.config
    access = configure(config.log_level, standard_error())
    wanted = host or config.server_host
    if (allowed := allowed_host(config, wanted)) != wanted:
        log.warning(
            "listening on %s and not on %s: without keys everybody there could spend your money. Make a key with "
            "`sekha keys create` and list it under `keys:`, or set `allow_unauthenticated: true`",
            allowed,
            wanted,
        )
    listening = _listen(loaded, allowed, config.server_port if port is None else port)
    ready = partial(_tell, loaded, listening.getsockname(), as_json=as_json)
    if workers > 1:
        return await run_workers(loaded, source, listening, workers, ready=ready)
    return await serve_here(loaded, source, listening, metrics=Metrics(), access=access, ready=ready)


def allowed_host(config: Config, wanted: str) -> str:
    """Where to listen: beyond this machine only with keys, or when the file says that none are needed."""
    from sekha.gateway.reach import may_listen_at

    return wanted if may_listen_at(wanted, config) else "127.0.0.1"


def _listen(loaded: Loaded, host: str, port: int) -> socket.socket:
    from sekha.gateway.server import bind

    try:
        return bind(host, port)
    except OSError as error:
        what = "host" if isinstance(error, socket.gaierror) else "port"
        problem = (
            f"{host}:{port} cannot be listened on: {error.strerror}. Name another with --{what} or `server_{what}:`."
        )
        raise ConfigError(loaded.source, [Problem(f"server_{what}", problem)]) from error


def _tell(loaded: Loaded, address: tuple[str, int], *, as_json: bool) -> None:
    host, port = address[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if as_json:
        # In one line, unlike what other commands print: whoever reads it does not wait for the end.
        said = {"url": url, "host": host, "port": port, "configuration": loaded.source}
        sys.stdout.write(json.dumps(said, ensure_ascii=False) + "\n")
    else:
        say(f"Sekha serves {url}/v1, explained at {url}/docs", "bold green")
    sys.stdout.flush()
    log.info("serving %s with %s", url, loaded.source)
    for warning in loaded.warnings:
        log.warning("%s", warning)
