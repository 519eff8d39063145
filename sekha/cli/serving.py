"""`sekha serve`: the gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

import click

from sekha.cli.invocation import Invocation, config_option
from sekha.cli.opening import configuration, name_of
from sekha.cli.terminal import note, say
from sekha.errors import ConfigError, Problem

if TYPE_CHECKING:
    from sekha.config import Config
    from sekha.loading import Loaded

__all__ = ["serve"]


@click.command()
@config_option
@click.option("--host", help="Where to listen. Left out: `server_host` of the configuration.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Left out: `server_port`; 0 for a free one.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that serve.")
@click.pass_obj
def serve(invocation: Invocation, host: str | None, port: int | None, workers: int) -> None:
    """Serve OpenAI's API for every provider.

    Programs use it as they use OpenAI: base URL http://HOST:PORT/v1. Ctrl-C or SIGTERM lets streams end
    first; SIGHUP reads the configuration anew without dropping a request.

    \b
    Examples:
      sekha serve
      sekha -c production.yaml serve --workers 4
    """
    from sekha.gateway.workers import WORKER, run_workers

    loaded = configuration(invocation)
    _log_from(loaded.config.log_level)
    if worker := os.environ.pop(WORKER, None):
        number, count, descriptor = map(int, worker.split(","))
        return _serve(invocation, loaded, socket.socket(fileno=descriptor), worker=number, workers=count)
    listening = _listen(loaded, _host(loaded.config, host), loaded.config.server_port if port is None else port)
    _tell(loaded, listening)
    if workers > 1:
        arguments = ["serve"] if (name := name_of(invocation)) is None else ["--config", name, "serve"]
        sys.exit(run_workers(listening, workers, arguments))
    return _serve(invocation, loaded, listening, worker=0, workers=1)


def _serve(invocation: Invocation, loaded: Loaded, listening: socket.socket, *, worker: int, workers: int) -> None:
    from sekha.gateway.app import Gateway
    from sekha.gateway.metrics import Metrics
    from sekha.gateway.opening import open_serving
    from sekha.gateway.server import serve as run
    from sekha.gateway.serving import Serving

    async def serving() -> None:
        metrics = Metrics()
        gateway = Gateway(await open_serving(loaded, metrics, workers=workers))

        async def reload() -> Serving:
            fresh = await asyncio.to_thread(configuration, invocation)
            return await open_serving(fresh, metrics, workers=workers)

        await run(gateway, listening, reload=reload, ready=lambda: _ready(worker))

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serving())


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.Loop


def _ready(worker: int) -> None:
    logging.getLogger("sekha.gateway").info("worker %d serves", worker)


def _host(config: Config, asked: str | None) -> str:
    """Where to listen: beyond this machine only with keys, or when the file says that none are needed."""
    from sekha.gateway.server import is_loopback

    host = asked or config.server_host
    if is_loopback(host) or config.keys or config.allow_unauthenticated:
        return host
    note(
        f"Listening on 127.0.0.1 and not on {host}: without keys everybody there could spend your money. "
        "Make a key with `sekha keys create` and list it under `keys:`, or set `allow_unauthenticated: true`."
    )
    return "127.0.0.1"


def _listen(loaded: Loaded, host: str, port: int) -> socket.socket:
    from sekha.gateway.server import bind

    try:
        return bind(host, port)
    except OSError as error:
        raise ConfigError(
            loaded.source,
            [
                Problem(
                    "server_port",
                    f"{host}:{port} cannot be listened on: {error.strerror}. "
                    "Name another with --port or `server_port:`.",
                )
            ],
        ) from error


def _tell(loaded: Loaded, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"Sekha serves http://{shown}:{port}/v1", "bold green")
    sys.stdout.flush()
    note(f"configuration {loaded.source} · docs http://{shown}:{port}/docs · Ctrl-C ends it")


def _log_from(level: str) -> None:
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
