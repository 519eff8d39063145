"""`POST /v1/chat/completions`: whole answers, and streams that never end as if they were whole."""

from __future__ import annotations

import time
from collections.abc import Mapping

import orjson

from sekha.chat import Opened, Reply, answer, stream
from sekha.errors import SekhaError
from sekha.gateway.exchange import Exchange
from sekha.gateway.finished import UnderWay
from sekha.gateway.problems import Headers, money, problem
from sekha.gateway.serving import BODY_MB, BODY_SECONDS, Serving
from sekha.gateway.weighing import weighed_chat
from sekha.gateway.wire import ChatAsked, answer_headers, chat_asked, chat_reply, sekha_note, shows
from sekha.pricing import Usage
from sekha.providers.base import openai_usage
from sekha.providers.events import bodies
from sekha.registry import Model

__all__ = [
    "ESTIMATED_COST",
    "Pipe",
    "complete",
    "end_of",
    "end_with_usage",
    "headers_of",
    "stream_headers",
    "without_usage_at_its_end",
]

ESTIMATED_COST = b"x-sekha-estimated-cost"
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


async def complete(serving: Serving, x: Exchange) -> None:
    """Answer a chat, whole or as it comes."""
    if x.begun is not None:
        return await x.begun.in_line()
    serving.keys.owner(x.authorization)  # before a body is read for nobody
    body = await x.body(limit_mb=BODY_MB, timeout_seconds=BODY_SECONDS)
    # A request as such, before it is read: whoever has none left costs nothing more.
    by = serving.keys.admit(x.authorization, tokens=0)
    asked = chat_asked(body, by=by)
    by.check(serving.resources.registry, asked.request.model, asked.request.task)
    by = await weighed_chat(serving, by, body, asked.request)
    under_way = x.under_way = UnderWay(serving, "chat", asked.request, by)
    pipe = Pipe(x, serving, asked, under_way) if asked.stream else None
    try:
        if pipe is not None:
            reply = await stream(asked.request, serving.stream, pipe)
            await pipe.end(reply)
        else:
            reply = await answer(asked.request, serving.chat)
            if asked.keep and serving.memory is not None:
                await serving.memory.chat(under_way.run_id, asked.request, reply)
            await x.answer(200, chat_reply(reply, under_way.run_id), headers_of(reply))
    except BaseException as error:
        under_way.failed(error)
        if pipe is not None and x.status and isinstance(error, SekhaError):
            return await pipe.broken(error)
        raise
    under_way.answered(reply)
    return None


def headers_of(reply: Reply) -> Headers:
    return answer_headers(reply.provider_id, reply.model_id, reply.total_cost)


def stream_headers(model: Model) -> Headers:
    """Of a streamed answer's head, all but what it is estimated to cost."""
    return [
        _EVENTS,
        (b"cache-control", b"no-cache"),
        # Nginx and its kin hold a stream back otherwise.
        (b"x-accel-buffering", b"no"),
        (b"x-sekha-provider", model.provider_id.encode()),
        (b"x-sekha-model", model.id.encode()),
    ]


class Pipe:
    """Hands a streamed answer on, as it was written, and ends it truthfully."""

    def __init__(
        self, x: Exchange, serving: Serving, asked: ChatAsked, under_way: UnderWay, *, held: bytes = b""
    ) -> None:
        """`held` is what came last and was held back, of a stream that others began to hand on."""
        self._x = x
        self._serving = serving
        self._asked = asked
        self._under_way = under_way
        self._memory = serving.memory if asked.keep else None
        self._pieces: list[bytes] = []
        self._held = held

    async def begin(self, opened: Opened) -> None:
        self._under_way.said = opened.events.said
        if self._x.status:
            return  # it has begun before it had a task
        model = opened.candidate.model
        self._serving.metrics.first(model.provider_id, model.id, self._under_way.seconds)
        # What it did cost is known at its end, and written there.
        await self._x.begin([*stream_headers(model), (ESTIMATED_COST, money(opened.candidate.estimate.expected))])

    async def write(self, piece: bytes) -> None:
        if self._asked.wants_usage:
            piece, self._held = without_usage_at_its_end(self._held + piece)
        if piece:
            if self._memory is not None:
                self._pieces.append(piece)
            await self._x.go_on(piece)

    async def end(self, reply: Reply) -> None:
        run_id = self._under_way.run_id
        note = sekha_note(reply, run_id, reply.total_cost)
        said = end_of(note)
        if self._asked.wants_usage:
            said = end_with_usage(self._held, note, reply.model_id, run_id, usage=reply.usage)
        if self._memory is not None:
            # The last may say something too: some providers write all of an answer into the event with its usage.
            events = b"".join([*self._pieces, self._held])
            await self._memory.chat(self._under_way.run_id, self._asked.request, reply, events)
        await self._x.end(said)

    async def broken(self, error: SekhaError) -> None:
        """Say what happened as an event, and end without `[DONE]`: what had arrived is not the whole."""
        said = problem(error) | {"sekha": self._under_way.charged()}
        await self._x.end(self._held + b"data: " + orjson.dumps(said) + b"\n\n")


def without_usage_at_its_end(block: bytes) -> tuple[bytes, bytes]:
    """The events of a block, and the last of them apart if it carries usage: ours goes into the same chunk.

    OpenAI's own clients take the usage of whichever chunk comes last, also when it has none.
    """
    before = block.rfind(b"\n\n", 0, -2)
    start = before + 2 if before >= 0 else 0
    last = block[start:]
    if b'"usage"' in last and b'"usage":{' in last.replace(b" ", b""):
        return block[:start], last
    return block, b""


def end_of(note: Mapping[str, object]) -> bytes:
    """A stream's last events, with what it cost beside them."""
    return b": sekha " + orjson.dumps(note) + b"\n\ndata: [DONE]\n\n"


def end_with_usage(held: bytes, note: Mapping[str, object], model_id: str, run_id: str, *, usage: Usage) -> bytes:
    """The same with the usage, in the event that was `held` back for it: what that says stands if it was charged.

    Who asked for usage expects it in a chunk, the last; others might stumble over one without choices.
    """
    last = next(bodies(held), None)
    before = b"" if last else held
    last = last or _usage_chunk(model_id, run_id)
    if not shows(last.get("usage"), usage):
        last["usage"] = openai_usage(usage)
    return before + b"data: " + orjson.dumps(last | {"sekha": note}) + b"\n\ndata: [DONE]\n\n"


def _usage_chunk(model_id: str, run_id: str) -> dict[str, object]:
    """A stream's last chunk, where the provider sent none."""
    return {
        "id": f"chatcmpl-{run_id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model_id,
        "choices": [],
    }
