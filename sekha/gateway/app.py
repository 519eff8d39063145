"""The gateway as an ASGI application: who asks, what for, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

from sekha.errors import NoSuchPage, SekhaError
from sekha.gateway import chats, embeddings, explaining, pages, searches, shortcut
from sekha.gateway.exchange import AsgiExchange, Exchange, Message, Receive, Send
from sekha.gateway.finished import CLIENT_LEFT, UnderWay
from sekha.gateway.logs import AccessLog
from sekha.gateway.problems import answer_to
from sekha.gateway.serving import Serving

if TYPE_CHECKING:
    from sekha.gateway.http_server import HttpExchange

__all__ = ["ROUTES", "Gateway"]

log = logging.getLogger("sekha.gateway")

Handler: TypeAlias = Callable[[Serving, Exchange], Awaitable[None]]

ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/v1/chat/completions": {"POST": chats.complete},
    "/v1/embeddings": {"POST": embeddings.embed},
    "/v1/models": {"GET": pages.openai_models},
    "/v1/models/{model}": {"GET": pages.model},
    "/api/v1/route": {"POST": explaining.route},
    "/api/v1/models": {"GET": pages.models},
    "/api/v1/tasks": {"GET": pages.tasks},
    "/api/v1/search": {"POST": searches.search},
    "/api/v1/costs": {"GET": pages.costs},
    "/api/v1/health": {"GET": pages.health},
    "/api/v1/health/providers": {"GET": pages.providers_health},
    "/health": {"GET": pages.to_health},
    "/health/live": {"GET": pages.live},
    "/health/ready": {"GET": pages.ready},
    "/metrics": {"GET": pages.metrics},
    "/openapi.json": {"GET": pages.openapi},
    "/docs": {"GET": pages.docs},
}
WATCH_AFTER_SECONDS = 0.05
"""Who leaves earlier is not noticed: a watch is a task, and most answers are quick."""


class Gateway:
    """Serves what `serving` holds at the moment; a reload puts another in its place."""

    def __init__(
        self,
        serving: Serving,
        *,
        routes: Mapping[str, Mapping[str, Handler]] = ROUTES,
        access: AccessLog | None = None,
    ) -> None:
        self.serving = serving
        self._shortcut = shortcut.Shortcut(serving)
        self._access = access if access is not None and access.shown else None
        self._routes = routes
        self._prefixes = tuple((route.partition("{")[0], route) for route in routes if "{" in route)
        self._idle = asyncio.Event()
        self._given_up = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            x = AsgiExchange(scope, receive, send)
            watch = _Watch(x)
            try:
                await self.exchange(x)
            finally:
                watch.end()
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def replace(self, serving: Serving) -> None:
        """Serve with another configuration from now on; the one before ends with its last request."""
        before, self.serving = self.serving, serving
        serving.resources.go_on_from(before.resources)
        self._shortcut = shortcut.Shortcut(serving)
        if before.memory is not None:
            # Else what the new one takes would wait, and the old one's embedder be asked, until its last stream ended.
            await before.memory.stand_back()
        while before.under_way and not self._given_up:
            self._idle.clear()
            await self._idle.wait()
        await before.aclose()

    def give_up(self) -> None:
        """Wait no more for requests of configurations that were replaced: those that have not ended never will."""
        self._given_up = True
        self._idle.set()

    def begin(self, x: HttpExchange, body: bytes) -> bool:
        """Begin to answer an ordinary request without a task, and say whether it is one."""
        serving = self.serving
        if x.method != "POST":
            return False
        if x.path == "/v1/chat/completions":
            begun = self._shortcut.begin(self, x, body)
        elif x.path == "/v1/embeddings":
            begun = self._shortcut.begin_embedding(self, x, body)
        else:
            return False
        if begun:
            serving.under_way += 1
            serving.metrics.under_way += 1
        return begun

    async def exchange(self, x: Exchange) -> None:
        """Answer one request. Whoever cancels it because its caller left, says so in `x.left`."""
        begun = x.begun
        if begun is None:
            serving, started = self.serving, perf_counter()
            serving.under_way += 1
            serving.metrics.under_way += 1
        else:
            serving, started = begun.serving, begun.began
        page = x.path
        methods = self._routes.get(page)
        if methods is None:
            page, methods = self._under_prefix(page)
        refused: str | None = None
        try:
            try:
                handler = methods.get(x.method) or self._otherwise(x, methods)
                await handler(serving, x)
            except SekhaError as error:
                refused = error.code
                under_way = x.under_way
                await x.answer(*answer_to(error, under_way if isinstance(under_way, UnderWay) else None))
        except asyncio.CancelledError:
            if not x.left:
                raise
            x.status, refused = 499, CLIENT_LEFT
        except ConnectionError:
            x.status, refused = 499, CLIENT_LEFT
        except Exception:
            # The traceback may quote what was asked: it goes to whoever runs this at `debug`, and to nobody else.
            log.error("request %s failed in a way that nobody foresaw", x.request_id.decode())  # noqa: TRY400
            log.debug("request %s", x.request_id.decode(), exc_info=True)
            if not x.status:
                await x.answer(
                    *answer_to(SekhaError(f"This is a fault of the gateway's. Report {x.request_id.decode()}."))
                )
        finally:
            self.over(serving, x, page, perf_counter() - started, refused)
            x.begun = None  # each would keep the other

    def over(self, serving: Serving, x: Exchange, page: str, seconds: float, refused: str | None = None) -> None:
        """Count and log a request that has ended."""
        serving.metrics.under_way -= 1
        serving.metrics.request(page, x.status, seconds)
        if self._access is not None:
            # The rest of a path, where it has one, is a word of the caller's: any, be it a key or half a prompt.
            _note(self._access, x, x.path if x.path in self._routes else page, seconds, refused)
        serving.under_way -= 1
        if not serving.under_way and serving is not self.serving:
            self._idle.set()

    def _under_prefix(self, path: str) -> tuple[str, Mapping[str, Handler]]:
        """The route that a path is on. The names of models hold slashes, so `{model}` is all that is left of it."""
        for prefix, route in self._prefixes:
            if path.startswith(prefix) and path != prefix:
                return route, self._routes[route]
        return "other", {}

    def _otherwise(self, x: Exchange, methods: Mapping[str, Handler]) -> Handler:
        """What answers a HEAD, whose body the server leaves out. Raises `NoSuchPage` for anything else."""
        if not methods:
            raise NoSuchPage(x.method, x.path, known=list(self._routes))
        if x.method == "HEAD" and "GET" in methods:
            return methods["GET"]
        raise NoSuchPage(x.method, x.path, allowed=list(methods))


class _Watch:
    """Cancels a request whose caller has left, so that nobody goes on to work, and to pay, for no one."""

    __slots__ = ("_exchange", "_handle", "_task", "_watching")

    def __init__(self, exchange: AsgiExchange) -> None:
        self._exchange = exchange
        self._task: asyncio.Task[Any] | None = None
        self._watching: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._handle = loop.call_later(WATCH_AFTER_SECONDS, self._begin)

    def _begin(self) -> None:
        if self._exchange.was_read:
            self._watching = asyncio.ensure_future(self._wait())
        else:
            self._handle = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._begin)

    async def _wait(self) -> None:
        await self._exchange.caller_left()
        if self._task is not None and not self._exchange.ended:
            self._exchange.left = True
            self._task.cancel()

    def end(self) -> None:
        self._handle.cancel()
        if self._watching is not None:
            self._watching.cancel()


def _note(access: AccessLog, x: Exchange, path: str, seconds: float, refused: str | None) -> None:
    request_id, under_way = x.request_id.decode(), x.under_way
    if under_way is None:
        access.note(request_id=request_id, method=x.method, path=path, status=x.status, seconds=seconds, error=refused)
        return
    usage = under_way.usage
    access.note(
        request_id=request_id,
        method=x.method,
        path=path,
        status=x.status,
        seconds=seconds,
        run_id=under_way.run_id,
        key=under_way.key,
        provider=under_way.provider_id,
        model=under_way.model_id,
        cost=under_way.cost,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
        outcome=under_way.outcome,
        error=under_way.error,
    )


async def _lifespan(receive: Receive, send: Send) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            message: Message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
