"""The gateway as a process: a listening socket under it, signals around it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sekha import hangup, tokens
from sekha.errors import SekhaError
from sekha.gateway.app import Gateway
from sekha.gateway.http_server import WRITE_SECONDS, Connections, HttpExchange
from sekha.gateway.logs import AccessLog
from sekha.gateway.metrics import Metrics
from sekha.gateway.opening import open_serving
from sekha.gateway.reach import check_reload
from sekha.gateway.sources import Source
from sekha.loading import Loaded
from sekha.providers.opening import import_ahead
from sekha.rates import Minutes
from sekha.registry import Registry

__all__ = [
    "AGAIN_SECONDS",
    "DRAIN_SECONDS",
    "HEAD_SECONDS",
    "Server",
    "bind",
    "fast_loop",
    "foreseen",
    "not_taken_over",
    "on_signals",
    "serve",
]

log = logging.getLogger("sekha.gateway")

HEAD_SECONDS = 20.0
"""Within these a caller has sent a request's headers, or is let go."""
KEEP_ALIVE_SECONDS = 75.0
"""Longer than the minute that load balancers keep idle connections, so that they close them and not we."""
DRAIN_SECONDS = 120.0
"""What is under way has these to end in once the process was told to."""
CUT_SECONDS = 5.0
"""What was cut has these to settle in."""
SAME_STOP_SECONDS = 0.5
"""Within these a worker that is told twice to end was told once: by systemd, and by whoever started it."""
CLOSE_SECONDS = 30.0
"""What is open has these to be closed in: more than a ledger takes that has gone silent."""
BACKLOG = 2048
COLLECTED_AFTER = (20_000, 20, 20)
"""What a request makes is freed with its last reference, and leaves the collector next to nothing to look for."""
AGAIN_SECONDS = 1.0
"""After a fault of ours in taking a configuration over, the next one is not waited for sooner."""
STARTING_ONLY = ("server_host", "server_port", "log_level")
"""What a configuration says once, and not again to a process that runs."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except TypeError as error:
        listening.close()
        raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening


def not_taken_over(error: Exception) -> SekhaError:
    """Log why a configuration is not taken over, and return it as an error that may be told."""
    said = foreseen(error)
    log.error("the configuration is not taken over, and the one before goes on: %s", said)
    return said


def foreseen(error: Exception) -> SekhaError:
    """The error itself; of one that nobody foresaw its kind alone, since what it says may hold a secret."""
    if isinstance(error, SekhaError):
        return error
    log.debug("%s", type(error).__name__, exc_info=error)
    return SekhaError(f"{type(error).__name__}, which nobody foresaw: a bug in Sekha. Please report it.")


def fast_loop() -> asyncio.AbstractEventLoop:
    """An event loop that carries several times what Python's own does, where there is one."""
    try:
        import uvloop
    except ImportError:  # not on this platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def serve(
    loaded: Loaded,
    source: Source,
    listening: socket.socket,
    *,
    metrics: Metrics,
    access: AccessLog,
    ready: Callable[[], None],
    followed: Callable[[SekhaError | None], None] | None = None,
    workers: int = 1,
    minutes: Minutes | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, and finish what is under way. SIGHUP has the configuration read anew.

    Also ends when `source` does. `followed` is told of each configuration after the first what kept it from being
    taken over, or None. Raises the `SekhaError` that keeps the first one from being opened. However it ends, the
    process has `CLOSE_SECONDS` to end in as well.
    """
    # A reload gives nobody a fresh minute.
    open_ = partial(open_serving, metrics=metrics, workers=workers, minutes=minutes or Minutes())
    gateway = Gateway(await open_(loaded), access=access)
    server = Server(gateway, listening, same_stop_seconds=SAME_STOP_SECONDS if workers > 1 else 0.0)
    metrics.start()
    host = listening.getsockname()[0]
    following = _Following(loaded, gateway, open_, host)
    task = asyncio.create_task(following.run(source, server.stop, followed))
    # Closing as well: who says a second time that it is to stop must not have it killed in the middle.
    with on_signals(server.stop, source.look):
        try:
            _settle_memory()
            ready()
            asyncio.get_running_loop().run_in_executor(None, _load_ahead, gateway.serving.resources.registry)
            await server.run()
        finally:
            _end_within(CLOSE_SECONDS)
            gateway.give_up()
            await following.end(task)
            await gateway.serving.aclose()
            metrics.close()


def _end_within(seconds: float) -> None:
    """Have this process end by then, whatever is stuck in it: a task, a thread or the event loop."""
    last = threading.Timer(seconds, _end_as_it_stands, [seconds])
    last.daemon = True
    last.start()


def _end_as_it_stands(seconds: float) -> None:
    log.error(
        "closing took longer than %g s, and the process ends as it stands. Start it again on the same folder: it "
        "finishes what the journals, the outbox and the spool hold",
        seconds,
    )
    logging.shutdown()
    os._exit(1)  # any other way waits for what is stuck


@contextlib.contextmanager
def on_signals(stop: Callable[[], None], look: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C stop, and SIGHUP looks for another configuration, one that was held too.

    Behind it they do nothing: the process has closed what it had, and ends by itself in a moment.
    """
    loop = asyncio.get_running_loop()
    told = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: look}
    # Not the loop's own handlers: where one of those is taken away, a signal kills, be it for a moment.
    for number in told:
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(told[signal.Signals(number)]))
    if hangup.came():
        look()
    try:
        yield
    finally:
        for number in told:
            signal.signal(number, signal.SIG_IGN)


class Server:
    """Serves a gateway at a listening socket until it is told to stop."""

    def __init__(
        self,
        gateway: Gateway,
        listening: socket.socket,
        *,
        head_seconds: float = HEAD_SECONDS,
        drain_seconds: float = DRAIN_SECONDS,
        write_seconds: float = WRITE_SECONDS,
        cut_seconds: float = CUT_SECONDS,
        same_stop_seconds: float = 0.0,
    ) -> None:
        self._listening = listening
        self._drain_seconds = drain_seconds
        self._cut_seconds = cut_seconds
        self._same_stop_seconds = same_stop_seconds
        self._stopped_at = -math.inf
        self._connections = Connections(
            gateway,
            head_seconds=head_seconds,
            idle_seconds=KEEP_ALIVE_SECONDS,
            write_seconds=write_seconds,
            refused=partial(_note_refused, gateway),
        )
        self._stopping = asyncio.Event()
        self._patience: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Take nobody new, and finish what is under way. The second time it is meant: that is cut."""
        now = asyncio.get_running_loop().time()
        if self._stopping.is_set():
            if now - self._stopped_at >= self._same_stop_seconds:
                self._cut("told to stop again")
            return
        self._stopped_at = now
        self._stopping.set()
        self._patience = asyncio.get_running_loop().call_later(
            self._drain_seconds, self._cut, f"it took longer than {self._drain_seconds:g} s"
        )

    async def run(self) -> None:
        """Serve, and return once nothing is under way any more. Closes the socket."""
        connections = self._connections
        server = await asyncio.get_running_loop().create_server(
            connections.connect, sock=self._listening, backlog=BACKLOG
        )
        try:
            await self._stopping.wait()
            server.close()
            await connections.end()
            if connections.tasks:
                log.warning(
                    "%d requests did not end within %g s of being cut, and are left as they are",
                    len(connections.tasks),
                    self._cut_seconds,
                )
        finally:
            server.close()
            connections.close()
            if self._patience is not None:
                self._patience.cancel()

    def _cut(self, why: str) -> None:
        if self._connections:
            log.warning("%d connections are cut: %s", len(self._connections), why)
        self._connections.abort(within_seconds=self._cut_seconds)


def _note_refused(gateway: Gateway, x: HttpExchange, code: str) -> None:
    """Count and log a request that was no HTTP, as any other that is on no page."""
    serving = gateway.serving
    serving.under_way += 1
    serving.metrics.under_way += 1
    gateway.over(serving, x, "other", 0.0, code)


def _settle_memory() -> None:
    """Let the collector pass over what was imported and opened, which lives as long as the process."""
    # Some 55,000 objects, and a full collection walks through them all: 34 ms in which nobody is served, which
    # is what the slowest in a hundred then wait. Frozen, they cost it nothing. None before: it finds a hundred.
    gc.freeze()
    gc.set_threshold(*COLLECTED_AFTER)


def _load_ahead(registry: Registry) -> None:
    """Load what takes long and would else be loaded while the first caller waits. Who needs it sooner waits for it."""
    with contextlib.suppress(Exception):  # it is told to whoever cannot do without it
        tokens.load(model.id for model in registry)
        if any(model.dimension is not None for model in registry):
            import numpy  # noqa: F401
        import_ahead(registry.providers.values())


class _Following:
    """Takes over one configuration after the other, and lets each end with its last request."""

    def __init__(self, loaded: Loaded, gateway: Gateway, open_: Callable[[Loaded], Any], host: str) -> None:
        """`host` is the address that it listens on, whatever a configuration says of where it should."""
        self._loaded = loaded
        self._started = loaded.config
        self._host = host
        self._gateway = gateway
        self._open = open_
        self._opening = asyncio.Lock()
        self._replaced: set[asyncio.Task[None]] = set()

    async def run(
        self, source: Source, stop: Callable[[], None], followed: Callable[[SekhaError | None], None] | None
    ) -> None:
        while True:
            said: SekhaError | None = None
            try:
                loaded = await source.next()
                async with self._opening:
                    await self._take_over(loaded)
            except EOFError:
                return stop()
            except Exception as error:  # whatever it is, the next configuration must be taken over
                said = not_taken_over(error)
                if said is not error:
                    await asyncio.sleep(AGAIN_SECONDS)
            if followed is not None:
                try:
                    followed(said)
                except OSError:
                    # Whoever watches is no more, which `source` would say next.
                    return stop()

    async def end(self, task: asyncio.Task[None]) -> None:
        """Follow no more. What is being opened just now is opened first, so that it can be closed."""
        async with self._opening:
            task.cancel()
        await asyncio.wait([task, *self._replaced])

    async def _take_over(self, loaded: Loaded) -> None:
        check_reload(loaded, self._loaded, self._host)
        serving = await self._open(loaded)
        asyncio.get_running_loop().run_in_executor(None, _load_ahead, serving.resources.registry)
        replaced = asyncio.ensure_future(self._gateway.replace(serving))
        self._replaced.add(replaced)
        replaced.add_done_callback(self._replaced.discard)
        log.info("the configuration was read anew: %s", loaded.source)
        before, self._loaded = self._loaded.config, loaded
        late = [
            name
            for name in STARTING_ONLY
            if getattr(loaded.config, name) not in (getattr(before, name), getattr(self._started, name))
        ]
        if late:
            log.warning("%s: changed, and in effect with the next start", ", ".join(late))
        for warning in loaded.warnings:
            log.warning("%s", warning)
