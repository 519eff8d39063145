"""A stand-in for OpenAI, Anthropic, Ollama and OpenRouter: real HTTP on loopback, no key, no cost.

Test a pipeline against it, with the failures that providers have:

    async with StandIn() as standin:
        standin.fail(429, retry_after=1, times=2)
        ...  # base_url: standin.openai_url
        assert len(standin.requests) == 3

It answers every chat with "You said: …", calls the first tool it is offered, and embeds by hashed
n-grams, so the same question has the same answer. For programs in other processes:

    python -m sekha.testing --port 8900
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import click
import orjson
from aiohttp import web

from sekha.providers.builtin import hashed_embeddings

__all__ = ["Fault", "Received", "StandIn"]

Protocol: TypeAlias = Literal["openai", "anthropic", "ollama", "openrouter"]
FaultKind: TypeAlias = Literal[
    "status",
    "content",
    "context",
    "hang",
    "slow",
    "trickle",
    "drop",
    "garbage",
    "cut",
    "stall",
    "end",
    "mumble",
    "error",
    "dimension",
    "usage",
]

_DIMENSIONS = {
    "nomic-embed-text": 768,
    "text-embedding-ada-002": 1536,
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
}


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came in. Keys are in its headers: print it in tests only."""

    method: str
    path: str
    headers: Mapping[str, str]
    json: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to fail."""

    kind: FaultKind
    status: int = 500
    retry_after: str | None = None
    message: str | None = None
    seconds: float = 0.0
    after: int = 0
    dimension: int = 0


@dataclass(slots=True)
class _Planned:
    fault: Fault
    left: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What is said, before it takes a protocol's shape."""

    model: str
    text: str
    tool: tuple[str, dict[str, Any]] | None
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    with_usage: bool
    replies: int
    logprobs: bool

    @property
    def output_tokens(self) -> int:
        return len(self.text.split()) or 1

    @property
    def pieces(self) -> list[str]:
        words = self.text.split(" ")
        return [word if at == 0 else f" {word}" for at, word in enumerate(words)]


_Handler: TypeAlias = Callable[[web.Request, Protocol, dict[str, Any], Fault | None], Awaitable[web.StreamResponse]]


class StandIn:
    """Serves all four protocols on one port. Faults are spent in the order in which they were planned."""

    def __init__(self, *, port: int = 0, dimension: int = 768) -> None:
        self.requests: list[Received] = []
        """What came in, the oldest first; look-ups of models too."""
        self.models: list[str] | None = None
        """The models that exist; None means every one does."""
        self.cached_tokens = 0
        """How many input tokens each answer says it found in a cache."""
        self.cache_write_tokens = 0
        """Of the Anthropic protocol alone: tokens that it says it wrote to its cache."""
        self.arrived = asyncio.Event()
        """Set once a request has come in; clear it to wait for another."""
        self.abandoned = asyncio.Event()
        """Set when a client closed its connection before its answer was whole."""
        self._port = port
        self._dimension = dimension
        self._faults: deque[_Planned] = deque()
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> StandIn:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._serving("openai", self._chat))
        app.router.add_post("/v1/embeddings", self._serving("openai", self._embeddings))
        app.router.add_get("/v1/models", self._serving("openai", self._list_models))
        app.router.add_post("/v1/messages", self._serving("anthropic", self._chat))
        app.router.add_post("/api/chat", self._serving("ollama", self._chat))
        app.router.add_post("/api/embed", self._serving("ollama", self._embeddings))
        app.router.add_post("/api/embeddings", self._serving("ollama", self._embeddings))
        app.router.add_get("/api/tags", self._serving("ollama", self._list_models))
        app.router.add_post("/api/show", self._serving("ollama", self._show))
        app.router.add_post("/api/v1/chat/completions", self._serving("openrouter", self._chat))
        app.router.add_post("/api/v1/embeddings", self._serving("openrouter", self._embeddings))
        app.router.add_get("/api/v1/models", self._serving("openrouter", self._list_models))
        self._closing.clear()
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def anthropic_url(self) -> str:
        return self.url

    @property
    def ollama_url(self) -> str:
        return self.url

    @property
    def openrouter_url(self) -> str:
        return f"{self.url}/api/v1"

    # What goes wrong next. `times=None` goes on until `heal()`.

    def fail(
        self,
        status: int = 500,
        *,
        retry_after: float | str | None = None,
        message: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Answer with an error of this status, in the protocol's own shape."""
        after = None if retry_after is None else str(retry_after)
        self._plan(Fault(kind="status", status=status, retry_after=after, message=message), times)

    def refuse_content(self, *, times: int | None = 1) -> None:
        """Refuse by content policy. Ollama has none, and answers 400 with a sentence."""
        self._plan(Fault(kind="content", status=400), times)

    def exceed_context(self, *, times: int | None = 1) -> None:
        self._plan(Fault(kind="context", status=400), times)

    def hang(self, *, times: int | None = 1) -> None:
        """Take the request and never answer."""
        self._plan(Fault(kind="hang"), times)

    def slow(self, seconds: float, *, times: int | None = 1) -> None:
        self._plan(Fault(kind="slow", seconds=seconds), times)

    def trickle(self, seconds: float, *, times: int | None = 1) -> None:
        """Stream whole, but wait before every event."""
        self._plan(Fault(kind="trickle", seconds=seconds), times)

    def drop(self, *, times: int | None = 1) -> None:
        """Close the connection instead of answering."""
        self._plan(Fault(kind="drop"), times)

    def garbage(self, *, times: int | None = 1) -> None:
        """Answer 200 with a web page, as a captive portal does."""
        self._plan(Fault(kind="garbage"), times)

    def cut(self, *, after: int = 2, times: int | None = 1) -> None:
        """Cut the connection after some events of a stream, or in the middle of a body."""
        self._plan(Fault(kind="cut", after=after), times)

    def stall(self, *, after: int = 2, times: int | None = 1) -> None:
        """Fall silent after some events of a stream."""
        self._plan(Fault(kind="stall", after=after), times)

    def end_early(self, *, after: int = 2, times: int | None = 1) -> None:
        """End a stream politely after some events, without the protocol's word for the end."""
        self._plan(Fault(kind="end", after=after), times)

    def mumble(self, *, after: int = 2, times: int | None = 1) -> None:
        """Write what is no event of any protocol after some events of a stream, and close the connection."""
        self._plan(Fault(kind="mumble", after=after), times)

    def fail_within(self, message: str | None = None, *, after: int = 2, times: int | None = 1) -> None:
        """Say that it failed after some events of a stream, in the protocol's own shape, and end it."""
        self._plan(Fault(kind="error", after=after, message=message), times)

    def wrong_dimension(self, dimension: int, *, times: int | None = 1) -> None:
        self._plan(Fault(kind="dimension", dimension=dimension), times)

    def omit_usage(self, *, times: int | None = 1) -> None:
        self._plan(Fault(kind="usage"), times)

    def heal(self) -> None:
        """Forget every planned fault."""
        self._faults.clear()

    def _plan(self, fault: Fault, times: int | None) -> None:
        self._faults.append(_Planned(fault, times))

    def _next_fault(self) -> Fault | None:
        if not self._faults:
            return None
        planned = self._faults[0]
        if planned.left is not None:
            planned.left -= 1
            if planned.left <= 0:
                self._faults.popleft()
        return planned.fault

    def _serving(self, protocol: Protocol, handler: _Handler) -> Callable[[web.Request], Any]:
        async def serve(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            sent = orjson.loads(body) if body else None
            self.requests.append(Received(request.method, request.path, dict(request.headers), sent))
            self.arrived.set()
            fault = self._next_fault() if request.method == "POST" and request.path != "/api/show" else None
            try:
                return await self._respond(request, protocol, sent or {}, fault, handler)
            except (asyncio.CancelledError, ConnectionResetError):
                self.abandoned.set()
                raise
            except (LookupError, TypeError, ValueError, AttributeError):
                # Nothing is begun before everything is read, so a request of another shape can be refused.
                return _refusal(protocol, Fault(kind="status", status=400), sent if isinstance(sent, dict) else {})

        return serve

    async def _respond(
        self, request: web.Request, protocol: Protocol, sent: dict[str, Any], fault: Fault | None, handler: _Handler
    ) -> web.StreamResponse:
        match fault:
            case Fault(kind="hang"):
                await self._closing.wait()
                return web.Response(status=503)
            case Fault(kind="slow"):
                await asyncio.sleep(fault.seconds)
            case Fault(kind="drop"):
                return _abort(request)
            case Fault(kind="garbage"):
                return web.Response(text="<html><body>Please log in</body></html>", content_type="text/html")
            case Fault(kind="status" | "content" | "context"):
                return _refusal(protocol, fault, sent)
            case _:
                pass
        name = sent.get("model")
        if self.models is not None and name is not None and name not in self.models:
            return _refusal(protocol, Fault(kind="status", status=404), sent)
        return await handler(request, protocol, sent, fault)

    async def _chat(
        self, request: web.Request, protocol: Protocol, sent: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        cached = (self.cached_tokens, self.cache_write_tokens)
        answer = _answer(sent, cached, with_usage=fault is None or fault.kind != "usage")
        # Ollama alone streams unless it is told not to.
        if sent.get("stream", protocol == "ollama"):
            frames = list(_frames(protocol, answer, sent))
            return await self._stream(request, protocol, frames, fault)
        return await self._send(request, protocol, _body(protocol, answer), fault)

    async def _embeddings(
        self, request: web.Request, protocol: Protocol, sent: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        model = str(sent.get("model", ""))
        given = sent.get("input", sent.get("prompt", ""))
        texts = [given] if isinstance(given, str) else [str(text) for text in given]
        dimension = sent.get("dimensions") or _DIMENSIONS.get(model.rpartition("/")[2]) or self._dimension
        if fault is not None and fault.kind == "dimension":
            dimension = fault.dimension
        vectors = await asyncio.to_thread(hashed_embeddings, texts, int(dimension))
        tokens = sum(len(text.split()) for text in texts)
        with_usage = fault is None or fault.kind != "usage"
        if request.path == "/api/embeddings":
            return await self._send(request, protocol, {"embedding": vectors[0].tolist()}, fault)
        if protocol == "ollama":
            body: dict[str, Any] = {"model": model, "embeddings": vectors.tolist(), "total_duration": 1}
            return await self._send(
                request, protocol, body | ({"prompt_eval_count": tokens} if with_usage else {}), fault
            )
        packed = sent.get("encoding_format") == "base64"
        body = {
            "object": "list",
            "model": model,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64.b64encode(vector.tobytes()).decode() if packed else vector.tolist(),
                }
                for index, vector in enumerate(vectors)
            ],
        }
        usage = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}} if with_usage else {}
        return await self._send(request, protocol, body | usage, fault)

    async def _list_models(
        self, request: web.Request, protocol: Protocol, _sent: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        names = ["chat", *_DIMENSIONS] if self.models is None else self.models
        if protocol == "ollama":
            body: dict[str, Any] = {"models": [{"name": name, "model": name} for name in names]}
        else:
            body = {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
        return await self._send(request, protocol, body, fault)

    async def _show(
        self, request: web.Request, protocol: Protocol, _sent: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        body = {"capabilities": ["completion", "tools", "vision"], "model_info": {}, "template": ""}
        return await self._send(request, protocol, body, fault)

    async def _send(
        self, request: web.Request, protocol: Protocol, body: Mapping[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        whole = orjson.dumps(body)
        if fault is None or fault.kind != "cut":
            return web.Response(body=whole, content_type="application/json", headers=_HEADERS[protocol])
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(whole))})
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        return _abort(request, response)

    async def _stream(
        self, request: web.Request, protocol: Protocol, frames: list[bytes], fault: Fault | None
    ) -> web.StreamResponse:
        kind = "application/x-ndjson" if protocol == "ollama" else "text/event-stream"
        response = web.StreamResponse(headers={"Content-Type": kind, **_HEADERS[protocol]})
        await response.prepare(request)
        breaks = fault is not None and fault.kind in ("cut", "stall", "end", "mumble", "error")
        for frame in frames[: fault.after] if fault is not None and breaks else frames:
            if fault is not None and fault.kind == "trickle":
                await asyncio.sleep(fault.seconds)
            await response.write(frame)
        match fault:
            case Fault(kind="cut"):
                return _abort(request, response)
            case Fault(kind="stall"):
                await self._closing.wait()
            case Fault(kind="mumble"):
                await response.write(b"\x00\xff<html>\n\n")
                return _abort(request, response)
            case Fault(kind="error"):
                await response.write(_failure_event(protocol, fault))
                await response.write_eof()
            case _:
                await response.write_eof()
        return response


# --- what each protocol says ---------------------------------------------------------------

_HEADERS: Mapping[Protocol, Mapping[str, str]] = {
    "openai": {"x-request-id": "req_standin", "openai-processing-ms": "1", "x-ratelimit-remaining-requests": "999"},
    "anthropic": {"request-id": "req_standin", "anthropic-ratelimit-requests-remaining": "999"},
    "ollama": {},
    "openrouter": {"x-generation-id": "gen-standin"},
}


def _answer(sent: Mapping[str, Any], cached: tuple[int, int], *, with_usage: bool) -> _Answer:
    texts = [_text(message.get("content")) for message in sent["messages"]]
    last = next(
        (
            text
            for message, text in zip(reversed(sent["messages"]), reversed(texts), strict=True)
            if message["role"] in ("user", "tool")
        ),
        "",
    )
    answered = sent["messages"][-1]["role"] == "tool" or "tool_result" in str(sent["messages"][-1].get("content"))
    tool = None
    if sent.get("tools") and not answered and sent.get("tool_choice") != "none":
        offered = sent["tools"][0]
        function = offered.get("function", offered)
        schema = function.get("parameters") or function.get("input_schema") or {}
        tool = str(function["name"]), dict.fromkeys(list(schema.get("properties", {}))[:1], last)
    system = len(str(sent.get("system", "")).split())
    return _Answer(
        model=str(sent.get("model", "chat")),
        text="" if tool else f"You said: {last}",
        tool=tool,
        input_tokens=system + sum(len(text.split()) for text in texts),
        cached_tokens=cached[0],
        cache_write_tokens=cached[1],
        with_usage=with_usage,
        replies=int(sent.get("n") or 1),
        logprobs=bool(sent.get("logprobs")),
    )


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return " ".join(_text(part.get("text", part.get("content", ""))) for part in content)
    return ""


def _body(protocol: Protocol, answer: _Answer) -> dict[str, Any]:
    match protocol:
        case "anthropic":
            return _anthropic_message(answer)
        case "ollama":
            return _ollama_line(answer, _ollama_message(answer), done=True)
        case "openai" | "openrouter":
            message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
            if answer.tool:
                message["tool_calls"] = [_openai_tool(answer.tool)]
            choice = {"message": message, "logprobs": _openai_logprobs(answer), "finish_reason": _finish(answer)}
            choices = [{"index": index} | choice for index in range(answer.replies)]
            usage = {"usage": _openai_usage(protocol, answer)} if answer.with_usage else {}
            return _openai_envelope(answer, "chat.completion") | {"choices": choices} | usage


def _frames(protocol: Protocol, answer: _Answer, sent: Mapping[str, Any]) -> Iterator[bytes]:
    match protocol:
        case "anthropic":
            yield from (
                b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))
                for event in _anthropic_events(answer)
            )
        case "ollama":
            yield from (orjson.dumps(line) + b"\n" for line in _ollama_lines(answer))
        case "openai" | "openrouter":
            if protocol == "openrouter":
                yield b": OPENROUTER PROCESSING\n\n"
            asked = protocol == "openrouter" or (sent.get("stream_options") or {}).get("include_usage", False)
            for chunk in _openai_chunks(protocol, answer, with_usage=asked and answer.with_usage):
                yield b"data: %s\n\n" % orjson.dumps(chunk)
            yield b"data: [DONE]\n\n"


def _finish(answer: _Answer) -> str:
    return "tool_calls" if answer.tool else "stop"


def _openai_envelope(answer: _Answer, kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-standin", "object": kind, "created": 1_700_000_000, "model": answer.model}


def _openai_tool(tool: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    name, arguments = tool
    return {
        "id": "call_standin",
        "type": "function",
        "function": {"name": name, "arguments": orjson.dumps(arguments).decode()},
    }


def _openai_logprobs(answer: _Answer) -> dict[str, Any] | None:
    if not answer.logprobs:
        return None
    said: list[dict[str, Any]] = [
        {"token": piece, "logprob": -0.25, "bytes": None, "top_logprobs": []} for piece in answer.pieces
    ]
    return {"content": said, "refusal": None}


def _openai_usage(protocol: Protocol, answer: _Answer) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens * answer.replies,
        "total_tokens": answer.input_tokens + answer.output_tokens * answer.replies,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
    return usage | {"cost": 0.00014} if protocol == "openrouter" else usage


def _openai_chunks(protocol: Protocol, answer: _Answer, *, with_usage: bool) -> Iterator[dict[str, Any]]:
    envelope = _openai_envelope(answer, "chat.completion.chunk")

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return envelope | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    yield chunk({"role": "assistant", "content": ""})
    if answer.tool:
        yield chunk({"tool_calls": [{"index": 0} | _openai_tool(answer.tool)]})
    else:
        for piece in answer.pieces:
            yield chunk({"content": piece})
    yield chunk({}, _finish(answer))
    if with_usage:
        yield envelope | {"choices": [], "usage": _openai_usage(protocol, answer)}


def _anthropic_content(answer: _Answer) -> dict[str, Any]:
    if answer.tool:
        return {"type": "tool_use", "id": "toolu_standin", "name": answer.tool[0], "input": answer.tool[1]}
    return {"type": "text", "text": answer.text}


def _anthropic_message(answer: _Answer) -> dict[str, Any]:
    # Anthropic counts what it read from its cache, and wrote to it, apart from the other input.
    usage = {
        "input_tokens": answer.input_tokens - answer.cached_tokens - answer.cache_write_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "cache_creation_input_tokens": answer.cache_write_tokens,
        "output_tokens": answer.output_tokens,
    }
    return {
        "id": "msg_standin",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [_anthropic_content(answer)],
        "stop_reason": "tool_use" if answer.tool else "end_turn",
        "stop_sequence": None,
    } | ({"usage": usage} if answer.with_usage else {})


def _anthropic_events(answer: _Answer) -> Iterator[dict[str, Any]]:
    message = _anthropic_message(answer)
    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    started = message | {"content": [], "stop_reason": None}
    if answer.with_usage:
        started["usage"] = message["usage"] | {"output_tokens": 1}
    yield {"type": "message_start", "message": started}
    block = _anthropic_content(answer)
    if answer.tool:
        yield {"type": "content_block_start", "index": 0, "content_block": block | {"input": {}}}
        arguments = orjson.dumps(answer.tool[1]).decode()
        deltas = [{"type": "input_json_delta", "partial_json": arguments}]
    else:
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        deltas = [{"type": "text_delta", "text": piece} for piece in answer.pieces]
    for delta in deltas:
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    usage = {"usage": {"output_tokens": answer.output_tokens}} if answer.with_usage else {}
    yield {"type": "message_delta", "delta": end} | usage
    yield {"type": "message_stop"}


def _ollama_message(answer: _Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool:
        message["tool_calls"] = [{"function": {"name": answer.tool[0], "arguments": answer.tool[1]}}]
    return message


def _ollama_line(answer: _Answer, message: Mapping[str, Any], *, done: bool) -> dict[str, Any]:
    line = {"model": answer.model, "created_at": "2025-01-01T00:00:00Z", "message": message, "done": done}
    if done:
        line |= {"done_reason": "stop", "total_duration": 1}
    if done and answer.with_usage:
        line |= {"prompt_eval_count": answer.input_tokens, "eval_count": answer.output_tokens}
    return line


def _ollama_lines(answer: _Answer) -> Iterator[dict[str, Any]]:
    if answer.tool:
        yield _ollama_line(answer, _ollama_message(answer), done=False)
    else:
        for piece in answer.pieces:
            yield _ollama_line(answer, {"role": "assistant", "content": piece}, done=False)
    yield _ollama_line(answer, {"role": "assistant", "content": ""}, done=True)


# --- how each protocol refuses -------------------------------------------------------------

_OPENAI_TYPES = {401: "invalid_request_error", 404: "invalid_request_error", 429: "requests"}
_OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_SENTENCES = {
    400: "The request is malformed.",
    401: "Incorrect API key provided.",
    402: "Insufficient credits.",
    403: "Not allowed.",
    404: "The model {model!r} does not exist.",
    429: "Rate limit reached.",
    500: "The server had an error.",
    503: "The server is overloaded.",
    529: "Overloaded",
}


def _refusal(protocol: Protocol, fault: Fault, sent: Mapping[str, Any]) -> web.Response:
    status = fault.status
    model = str(sent.get("model", ""))
    message = fault.message or _SENTENCES.get(status, "It failed.").format(model=model)
    code: str | None = _OPENAI_CODES.get(status)
    metadata: dict[str, Any] = {}
    if fault.kind == "content":
        code = "content_policy_violation"
        message = {
            "openai": "Your request was rejected as a result of our safety system.",
            "anthropic": "Output blocked by content filtering policy",
            "ollama": "the content was refused",
            "openrouter": "Your chosen model requires moderation and your input was flagged",
        }[protocol]
        if protocol == "openrouter":
            status = 403
            flagged = _text(sent.get("messages", [{}])[-1].get("content"))[:100]
            metadata = {"reasons": ["violence"], "flagged_input": flagged, "provider_name": "OpenAI"}
    elif fault.kind == "context":
        code = "context_length_exceeded"
        message = {
            "openai": "This model's maximum context length is 8192 tokens. However, your messages resulted in "
            "9000 tokens. Please reduce the length of the messages.",
            "anthropic": "prompt is too long: 210000 tokens > 200000 maximum",
            "ollama": "the input length exceeds the context length",
            "openrouter": "This endpoint's maximum context length is 8192 tokens. However, you requested about "
            "9000 tokens. Please reduce the length of either one.",
        }[protocol]
    body: dict[str, Any]
    match protocol:
        case "openai":
            kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
            body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        case "anthropic":
            kind = _ANTHROPIC_TYPES.get(status, "api_error")
            body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_standin"}
        case "ollama":
            body = {"error": f"model {model!r} not found" if status == 404 else message}
        case "openrouter":
            body = {"error": {"code": status, "message": message} | ({"metadata": metadata} if metadata else {})}
    retry = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
    return web.Response(
        status=status, body=orjson.dumps(body), content_type="application/json", headers={**_HEADERS[protocol], **retry}
    )


def _failure_event(protocol: Protocol, fault: Fault) -> bytes:
    message = fault.message or _SENTENCES[529]
    match protocol:
        case "anthropic":
            event = {"type": "error", "error": {"type": "overloaded_error", "message": message}}
            return b"event: error\ndata: %s\n\n" % orjson.dumps(event)
        case "ollama":
            return orjson.dumps({"error": message}) + b"\n"
        case "openai" | "openrouter":
            error = {"message": message, "type": "server_error", "param": None, "code": None}
            return b"data: %s\n\n" % orjson.dumps({"error": error})


def _abort(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response(status=500)


@click.command(help="Serve the stand-in on loopback until interrupted.")
@click.option("--port", type=int, default=8900, show_default=True, help="0 takes any free one.")
@click.option("--dimension", type=int, default=768, show_default=True, help="Of embeddings, where the model says none.")
def main(port: int, dimension: int) -> None:
    async def serve() -> None:
        async with StandIn(port=port, dimension=dimension) as standin:
            for name in ("openai", "anthropic", "ollama", "openrouter"):
                click.echo(f"{name:<10}  {getattr(standin, f'{name}_url')}")
            sys.stdout.flush()
            await asyncio.Event().wait()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        click.echo("Bye.")


if __name__ == "__main__":
    main()
