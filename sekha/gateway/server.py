"""The gateway as a process: uvicorn under it, signals around it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sekha.gateway.app import Gateway
from sekha.gateway.serving import Serving

__all__ = ["HEAD_SECONDS", "bind", "is_loopback", "serve"]

log = logging.getLogger("sekha.gateway")

HEAD_SECONDS = 20.0
"""Within these a caller has sent a request's headers, or is let go."""
KEEP_ALIVE_SECONDS = 75.0
"""Longer than the minute that load balancers keep idle connections, so that they close them and not we."""
DRAIN_SECONDS = 120
"""What streams have to end in once the process was told to."""
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    listening.set_inheritable(True)
    return listening


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


async def serve(
    gateway: Gateway,
    listening: socket.socket,
    *,
    reload: Callable[[], Awaitable[Serving]],
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is under way. SIGHUP reads the configuration anew."""
    server = _Server(
        ready,
        uvicorn.Config(
            gateway,
            http=_Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
            timeout_graceful_shutdown=DRAIN_SECONDS,
        ),
    )
    loop = asyncio.get_running_loop()
    reloading: set[asyncio.Task[None]] = set()

    def stop() -> None:
        # The second time it is meant: what is under way is cut.
        server.force_exit = server.should_exit
        server.should_exit = True

    def read_anew() -> None:
        task = asyncio.ensure_future(_reload(gateway, reload))
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, read_anew)
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in reloading:
            task.cancel()
        await gateway.serving.aclose()


async def _reload(gateway: Gateway, reload: Callable[[], Awaitable[Serving]]) -> None:
    from sekha.errors import SekhaError

    try:
        serving = await reload()
    except SekhaError as error:
        log.error("the configuration is not taken over, and the one before goes on: %s", error)  # noqa: TRY400
        return
    await gateway.replace(serving)
    log.info("the configuration was read anew")


class _Server(uvicorn.Server):
    def __init__(self, ready: Callable[[], None], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to us."""
        yield


class _Protocol(HttpToolsProtocol):
    """Lets nobody hold a connection by sending a request's headers for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._patience is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._patience = self.loop.call_later(HEAD_SECONDS, self._let_go)

    def _let_go(self) -> None:
        self._patience = None
        if not self.transport.is_closing():
            self.transport.close()
