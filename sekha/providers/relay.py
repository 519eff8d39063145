"""Providers that speak OpenAI's protocol: what they say is handed on byte for byte.

A request is written once, an answer is read once for its usage, and a stream is searched for the few
events that mean something to us (usage, an error, the end) and otherwise not looked into. One attempt is
made for each call, over a client of our own; LiteLLM has no part in it.

A cost that a provider names in its usage, as OpenRouter does, stays in the body and is not believed.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from string import ascii_letters
from typing import Any, NamedTuple

import orjson

from sekha.errors import (
    BadReply,
    DimensionMismatch,
    ProviderAuthFailed,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnavailable,
    StreamBroken,
)
from sekha.pricing import Usage
from sekha.providers.addresses import base_url_of, stores_chats
from sekha.providers.base import ChatCall, Chunk, Completion, Embeddings, RawEmbeddings
from sekha.providers.events import (
    COUNTED,
    DONE,
    ERROR,
    EventSplitter,
    as_events,
    bodies,
    body_in,
    endings,
    error_in,
    is_plain,
    is_sound,
    json_object,
    payloads,
    said_in,
    says_something,
    sound_in,
    texts_in,
)
from sekha.providers.failures import clean, refusal_of, refuses_max_tokens, stands_for, texts_of, wordless
from sekha.providers.http import (
    AnswerCut,
    AnswerLost,
    BadResponse,
    HttpClient,
    HttpLimits,
    NoAnswer,
    NotSent,
    Response,
    Target,
)
from sekha.providers.reports import half_in, joined, usage_in
from sekha.registry import Model, ProviderSpec
from sekha.vectors.base import Vector

__all__ = ["Begun", "RelayProvider", "RelayStream"]

_CHAT = "/chat/completions"
_EMBED = "/embeddings"
_OURS = frozenset({"model", "messages", "stream", "stream_options"})
# Of a stream whose provider may yet report no usage, kept as it came to be counted.
_KEPT_BYTES = 4 * 1024 * 1024
# From the provider's last word to the end of its answer, when its connection is free again.
_TAIL_SECONDS = 1.0
_EVENT_STARTS = b":" + ascii_letters.encode()  # a comment, `data:`, or another field
_DATA = b"data: "
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NAMED = b"event:"
_EMBEDDING = b'"embedding":'
_COMMA = ord(",")
_NOT_JSON = "it is not the JSON of its API"
_NOT_VECTORS = "its vectors are not lists of numbers of one length"
_UNWRITABLE = "a field of it cannot be written as JSON"
_TOO_DEEP = "it came whole in place of a stream, and is nested too deeply to be written as one"
_NOTHING_SAID = "the stream ended before anything was said"
_NO_EVENT = "it wrote what is no event"
# Of a stream that has not said anything yet. Whoever sends more than this first is waited for in the line.
_UNSAID_BYTES = 64 * 1024


class Begun(NamedTuple):
    """A call that was sent, and whose answer is still to come."""

    response: Response
    target: Target
    body: bytes


class RelayProvider:
    """One configured provider, with connections of its own."""

    def __init__(self, spec: ProviderSpec, *, limits: HttpLimits | None = None) -> None:
        self._spec = spec
        self._secret = spec.api_key.get_secret_value() if spec.api_key else None
        self._base_url = base_url_of(spec.kind, spec.base_url) or ""
        self._stores = stores_chats(spec.kind, self._base_url)
        self._http = HttpClient(limits=limits)
        self._targets: dict[str, Target] = {}
        self._learned: set[str] = set()
        """The models that refused `max_tokens`: OpenAI's newer ones under another name, a deployment's or an alias."""

    async def complete(self, call: ChatCall, begun: Begun | None = None) -> Completion:
        """`begun` is this very call, where `begin` has sent it."""
        failed = self._failing(call.model, partial(texts_of, call.messages))
        response, sent = await self._ask(call, begun, failed)
        if self._learns(call.model.id, response, sent):
            response, _ = await self._ask(call, None, failed)
            self._unlearns(call.model.id, response)
        if response.status != 200:
            raise failed.refused(response, response.content)
        return _completion(response, response.content, failed)

    async def _ask(self, call: ChatCall, begun: Begun | None, failed: _Failing) -> tuple[Response, bytes]:
        """The whole answer, whatever its status, and what was sent."""
        if begun is None:
            target = self._targets.get(_CHAT) or self._target(_CHAT, failed)
            sent = self._chat_body(call, failed)
            answer = self._http.post(target, sent, timeout_seconds=call.timeout_seconds)
        else:
            sent, answer = begun.body, self._http.take_over(*begun)
        try:
            return await answer, sent
        except (OSError, BadResponse) as error:
            raise failed.unanswered(error) from wordless(error)

    def _learns(self, model_id: str, response: Response, sent: bytes) -> bool:
        """Whether a model refuses `max_tokens`, which was not known: then it is worth asking once more."""
        if response.status != 400 or b'"max_tokens":' not in sent or not refuses_max_tokens(response.content):
            return False
        self._learned.add(model_id)
        return True

    def _unlearns(self, model_id: str, response: Response) -> None:
        """Forget it where the other name does no better."""
        if response.status == 400:
            self._learned.discard(model_id)

    @property
    def is_ready(self) -> bool:
        """Whether a connection is likely to lie idle, so that a call can begin at once."""
        for target in self._targets.values():  # all of one origin
            return self._http.is_idle(target)
        return False

    def begin(
        self,
        model: Model,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        timeout_seconds: float,
        told: Callable[[], None],
        stream: bool = False,
    ) -> Begun | None:
        """Send what `complete` or `open_stream` would, and call `told` whenever there is more of the answer.

        None, and nothing has happened, where that cannot be done at once.
        """
        target = self._targets.get(_CHAT)
        if target is None:
            return None
        try:
            body = self._chat_bytes(model.id, messages, options, stream=stream)
        except orjson.JSONEncodeError:
            return None
        response = self._http.send_now(target, body, timeout_seconds=timeout_seconds, whole=not stream, told=told)
        return None if response is None else Begun(response, target, body)

    def stream_of(self, begun: Begun, model: Model, *, timeout_seconds: float, hands_on_usage: bool) -> RelayStream:
        """The answer of a call that `begin` sent, before it has begun."""
        failed = self._failing(model, _no_texts)
        return RelayStream(begun.response, failed, timeout_seconds=timeout_seconds, hands_on_usage=hands_on_usage)

    def usage_of(self, begun: Begun, tiers: Collection[str] = ()) -> Usage | None:
        """What a call used that has ended; None for all that is not a whole answer with its usage.

        Half of one is none, though its total says the rest: the caller is to be shown what the answer does not say.
        Neither is one of these service tiers an answer as any other.
        """
        response = begun.response
        if response.error is not None or response.status != 200:
            return None
        body = json_object(response.content)
        if body is None or body.get("error") or not _is_whole(body.get("choices")):
            return None
        if tiers and body.get("service_tier") in tiers:
            return None
        usage = usage_in(body.get("usage"), by_total=False)
        return None if usage is not None and not usage.output_tokens and _says_any(body["choices"]) else usage

    async def stream(self, call: ChatCall) -> AsyncIterator[Chunk]:
        events = await self._open(call, hands_on_usage=True)
        try:
            async for block in events:
                for body in bodies(block):
                    yield Chunk(body=body, usage=usage_in(body.get("usage"), tier=body.get("service_tier")))
        finally:
            await events.aclose()

    async def open_stream(self, call: ChatCall, begun: Begun | None = None) -> RelayStream:
        """Ask, and wait until something is said: until then, a failure leaves room for another provider."""
        options = call.options.get("stream_options")
        asked = isinstance(options, Mapping) and bool(options.get("include_usage"))
        return await self._open(call, begun, hands_on_usage=asked)

    async def embed(
        self, model: Model, texts: Sequence[str], *, timeout_seconds: float, dimensions: int | None = None
    ) -> Embeddings:
        import numpy as np

        failed = self._failing(model, lambda: texts)
        # A quarter of the bytes of numbers written out, and far less work to read.
        asked: dict[str, Any] = {"model": model.id, "input": list(texts), "encoding_format": "base64"}
        sent = self._json(asked if dimensions is None else asked | {"dimensions": dimensions}, failed)
        response = await self._answer(_EMBED, sent, timeout_seconds, failed)
        body = _parsed(response, response.content, failed, replies=False)
        usage = usage_in(body.get("usage"), replies=False)
        with _used(usage):
            items = _items(body, len(texts), failed)
            try:
                in_order = sorted(items, key=lambda item: int(item["index"]))
                vectors = np.stack([_vector(item["embedding"]) for item in in_order])
            except (LookupError, TypeError, ValueError) as error:
                raise failed.bad(_NOT_VECTORS) from wordless(error)
            if vectors.ndim != 2 or not vectors.size:
                raise failed.bad(_NOT_VECTORS)
            failed.unless_as_long(vectors.shape[1], dimensions or model.dimension)
            if not np.isfinite(vectors).all():
                raise failed.bad("a vector holds a number that is not finite")
        return Embeddings(vectors=vectors, usage=usage)

    async def embed_raw(self, model: Model, body: Mapping[str, Any], *, timeout_seconds: float) -> RawEmbeddings:
        """Embed what a caller of OpenAI's API asked for, and hand on the answer as it came.

        The vectors are counted and measured, against `dimensions` where it asks for some; their numbers
        are not read.
        """
        inputs, failed = self._inputs(model, body)
        sent = self._json({**body, "model": model.id}, failed)
        response = await self._answer(_EMBED, sent, timeout_seconds, failed)
        return _embeddings(response, len(inputs), model, body.get("dimensions"), failed)

    async def embed_begun(self, model: Model, body: Mapping[str, Any], begun: Begun) -> RawEmbeddings:
        """`embed_raw`, where `begin_embedding` has sent this very call."""
        inputs, failed = self._inputs(model, body)
        response = await _answered(self._http.take_over(*begun), failed)
        return _embeddings(response, len(inputs), model, body.get("dimensions"), failed)

    def begin_embedding(
        self, model: Model, body: Mapping[str, Any], *, timeout_seconds: float, told: Callable[[], None]
    ) -> Begun | None:
        """Send what `embed_raw` would, and call `told` when the answer is there. None as with `begin`."""
        target = self._targets.get(_EMBED)
        if target is None:
            return None
        try:
            sent = orjson.dumps({**body, "model": model.id}, default=_plain)
        except orjson.JSONEncodeError:
            return None
        response = self._http.send_now(target, sent, timeout_seconds=timeout_seconds, whole=True, told=told)
        return None if response is None else Begun(response, target, sent)

    def embedded_by(self, begun: Begun, model: Model, count: int, dimensions: object) -> RawEmbeddings | None:
        """What came of so many texts; None for all that is not their vectors."""
        response = begun.response
        if response.error is not None or response.status != 200:
            return None
        try:
            return _embeddings(response, count, model, dimensions, self._failing(model, _no_texts))
        except ProviderError:
            return None

    def _inputs(self, model: Model, body: Mapping[str, Any]) -> tuple[Sequence[Any], _Failing]:
        given = body.get("input")
        # Tokens are one text when they are a list of numbers, and many when they are a list of such lists.
        listed = isinstance(given, list | tuple) and not (given and isinstance(given[0], int))
        inputs: Sequence[Any] = given if listed and given is not None else [given]
        return inputs, self._failing(model, lambda: [text for text in inputs if isinstance(text, str)])

    async def aclose(self) -> None:
        await self._http.aclose()

    def _failing(self, model: Model, texts: Callable[[], Sequence[str]]) -> _Failing:
        return _Failing(self._spec.id, model.id, self._secret, texts)

    def _chat_body(self, call: ChatCall, failed: _Failing, *, stream: bool = False) -> bytes:
        try:
            return self._chat_bytes(call.model.id, call.messages, call.options, stream=stream)
        except orjson.JSONEncodeError as error:
            raise failed.rejected(_UNWRITABLE) from wordless(error)

    def _chat_bytes(
        self, model_id: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, stream: bool
    ) -> bytes:
        body: dict[str, Any] = {"model": model_id, "messages": messages}
        for name, value in options.items():
            if value is not None and name not in _OURS:
                body[name] = value
        if body.get("store") is False and not self._stores:
            # It says what is so, and some who speak the protocol refuse a field that they do not know.
            del body["store"]
        if "max_tokens" in body and (
            model_id in self._learned or (self._spec.kind == "openai" and _refuses_max_tokens(model_id))
        ):
            limit = body.pop("max_tokens")
            body.setdefault("max_completion_tokens", limit)
        if stream:
            asked = options.get("stream_options")
            body["stream"] = True
            body["stream_options"] = {**(asked if isinstance(asked, Mapping) else {}), "include_usage": True}
        return orjson.dumps(body, default=_plain)

    def _json(self, body: Mapping[str, Any], failed: _Failing) -> bytes:
        try:
            return orjson.dumps(body, default=_plain)
        except orjson.JSONEncodeError as error:
            raise failed.rejected(_UNWRITABLE) from wordless(error)

    async def _answer(self, path: str, body: bytes, timeout_seconds: float, failed: _Failing) -> Response:
        target = self._targets.get(path) or self._target(path, failed)
        return await _answered(self._http.post(target, body, timeout_seconds=timeout_seconds), failed)

    async def _open(self, call: ChatCall, begun: Begun | None = None, *, hands_on_usage: bool) -> RelayStream:
        failed = self._failing(call.model, partial(texts_of, call.messages))
        response, sent = await self._start(call, begun, failed)
        if response.status == 400:
            await _what_came(response)
            if self._learns(call.model.id, response, sent):
                response, _ = await self._start(call, None, failed)
                self._unlearns(call.model.id, response)
        stream = RelayStream(
            response,
            failed,
            timeout_seconds=call.timeout_seconds,
            hands_on_usage=hands_on_usage,
            choices=_choices_asked(call.options),
        )
        try:
            await stream.begin()
        except BaseException:
            response.close()
            raise
        return stream

    async def _start(self, call: ChatCall, begun: Begun | None, failed: _Failing) -> tuple[Response, bytes]:
        """The head of a streamed answer, whatever its status, and what was sent."""
        if begun is None:
            target = self._targets.get(_CHAT) or self._target(_CHAT, failed)
            sent = self._chat_body(call, failed, stream=True)
            opening = self._http.open(target, sent, timeout_seconds=call.timeout_seconds)
        else:
            sent, opening = begun.body, self._http.take_over(*begun)
        try:
            return await opening, sent
        except (OSError, BadResponse) as error:
            raise failed.unanswered(error) from wordless(error)

    def _target(self, path: str, failed: _Failing) -> Target:
        headers = {"content-type": "application/json", "accept": "*/*", "user-agent": "sekha"}
        if self._secret:
            headers["authorization"] = f"Bearer {self._secret}"
        try:
            target = Target.of(self._base_url + path, headers)
        except ValueError as error:
            raise failed.unreachable(str(error)) from wordless(error)
        self._targets[path] = target
        return target


class RelayStream:
    """A streamed answer in blocks of whole events, `[DONE]` left out: a `RawStream`."""

    # Defaults of the class, since one is made for each request, and most of them stay as they are.
    _reported: Usage | None = None
    _half: Usage | None = None
    """What reports named that were no whole ones."""
    _first = b""
    _looked_at = 0
    _refusal: bytes | None = None
    """The event that says why it broke off."""
    _done = False
    _failure: ProviderError | None = None
    _kept_bytes = 0
    _covered = 0
    """So many of what is kept came before what was reported, or with it."""
    _outdated = False
    """Whether something was said after what was reported, in what is not kept any more."""

    def __init__(
        self,
        response: Response,
        failed: _Failing,
        *,
        timeout_seconds: float,
        hands_on_usage: bool,
        choices: int = 1,
    ) -> None:
        self._response = response
        self._failed = failed
        self._timeout_seconds = timeout_seconds
        self._hands_on_usage = hands_on_usage
        self._choices = choices
        self._events = EventSplitter()
        self._kept: list[bytes] = []
        self._texts: list[str] = []
        self._endings: dict[str, bool] = {}
        """Of the choices in what is not kept any more."""

    async def begin(self) -> None:
        """Wait until something is said. Raises what is wrong before, as for an answer that is not streamed.

        What says nothing, as the chunk that names who speaks or an event that is no chunk, is held back until then.
        """
        response, failed = self._response, self._failed
        if response.status != 200:
            raise failed.refused(response, await _what_came(response))
        try:
            self._first = self._sought(await self._first_events())
            self._first = await self._until_said()
        except (OSError, BadResponse) as error:
            failure = failed.unanswered(error)
            failure.may_be_billed = True
            raise failure from wordless(error)

    def begin_now(self) -> bool | None:
        """`begin`, where what has come begins as nearly all answers do; False where that is to be awaited or raised.

        None where nothing is said yet: then it is to be asked again when more has come.
        """
        response = self._response
        seen = response.content
        if response.status != 200 or response.error is not None or b"\r" in seen:
            return False
        start = self._looked_at
        while (end := seen.find(b"\n\n", start)) >= 0:
            body = body_in(seen[start + len(_DATA) : end]) if seen.startswith(_DATA, start) else None
            if body is None or "error" in body or not _is_chunk(body):
                return False
            if says_something(body) and (self._hands_on_usage or body.get("choices")):
                response.take()
                self._first = self._sought(self._events.feed(seen))
                return True
            self._looked_at = start = end + 2
        return False if response.complete or len(seen) > _UNSAID_BYTES else None

    @property
    def usage(self) -> Usage | None:
        """What was reported, once it is of the whole: all was said by then, and nothing more is to come."""
        if self._reported is None or self._outdated or any(texts_in(self._kept[self._covered :])):
            return None
        if not self._reported.output_tokens and self.said():
            return None  # half of a report
        # Whoever says that it failed wrote its last word too, and what it reported before is all that it knows.
        return self._reported if self._done or self._refusal is not None or self._has_all() else None

    @property
    def went_in(self) -> Usage | None:
        return joined(self._reported, self._half)

    def said(self) -> str:
        """The text that arrived, of every choice, with the calls of tools."""
        return "".join([*self._texts, *texts_in(self._kept)])

    def __aiter__(self) -> RelayStream:
        return self

    async def __anext__(self) -> bytes:
        response = self._response
        while (block := self.take()) is None:
            if self._done:
                raise StopAsyncIteration
            if response.parts or response.complete:
                continue
            try:
                response.expires_at = response.loop.time() + self._timeout_seconds
                await response.more()
            except (OSError, BadResponse) as error:
                raise self._failed.broken_by(error) from wordless(error)
            except BaseException:
                response.close()
                raise
        return block

    def take(self) -> bytes | None:
        """The next block of what has come; None where there is none yet, or none any more since it `has_ended`.

        Raises what broke it.
        """
        block, self._first = self._first, b""
        if block:
            return block
        if self._failure is not None:
            raise self._failure
        response = self._response
        if self._done or (data := response.take()) is None:
            return None
        try:
            block = self._events.feed(data) if data else self._events.rest()
        except BadResponse as error:
            raise self._failed.broken_by(error) from wordless(error)
        if block:
            block = self._sought(block)
        if not data:
            self._end()
        if not block and self._failure is not None:
            raise self._failure
        return block or None

    @property
    def has_ended(self) -> bool:
        """Whether its provider said that it ended, and all of it was taken."""
        return self._done and not self._first

    @property
    def is_broken(self) -> bool:
        """Whether the next of it is what broke it."""
        return self._failure is not None or self._response.error is not None

    def listen(self) -> None:
        """Allow the provider its time anew for what comes next."""
        self._response.expires_at = self._response.loop.time() + self._timeout_seconds

    async def aclose(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        """`aclose`, which waits for nothing."""
        if self._done:
            self._response.leave(_TAIL_SECONDS)
        else:
            self._response.close()

    async def _first_events(self) -> bytes:
        """The events until the first that is no comment. Raises what is wrong with a body that has none."""
        response, failed = self._response, self._failed
        seen = head = start = b""
        while True:
            data = await response.block()
            if not start:
                # The first byte alone tells events from a body of another sort: one event may come in many pieces.
                head += data
                start = _first_byte(head)
                if start not in _EVENT_STARTS:
                    # Some do not heed `stream`, and what they said is paid for; asked again, they would do the same.
                    return self._whole((head + await response.body()).removeprefix(_BYTE_ORDER_MARK))
                if start:
                    # A mark would hide the first event, from us and from many a client.
                    data = head.removeprefix(_BYTE_ORDER_MARK)
                elif data:
                    continue
            seen += self._events.feed(data) if data else self._events.rest()
            if next(payloads(seen), None) is not None:
                return seen
            if not data:
                raise failed.bad(_NOTHING_SAID)

    def _whole(self, raw: bytes) -> bytes:
        """The events of what came whole in place of a stream."""
        answer = _completion(self._response, raw, self._failed)
        with _used(answer.usage):
            try:
                return as_events(answer.body)
            except orjson.JSONEncodeError as error:
                raise self._failed.bad(_TOO_DEEP) from wordless(error)

    async def _until_said(self) -> bytes:
        """Everything until something is said, or the stream ends as it may."""
        held: list[bytes] = []
        try:
            while True:
                if (block := self.take()) is not None:
                    held.append(block)
                    if any(map(says_something, bodies(block))):
                        break
                elif self._done:
                    if self._reported is None:
                        raise self._failed.bad(_NOTHING_SAID)
                    break
                else:
                    await self._response.wait()
        except StreamBroken as error:
            if self._refusal is not None:
                refused = _said_to_have_failed(self._response, self._refusal, self._failed)
                if self._reported is not None:  # by that event itself where it says so
                    refused.usage, refused.may_be_billed = self._reported, True
                raise refused from None
            failure = self._failed.bad(error.detail)
            failure.usage = self._reported
            raise failure from None
        return b"".join(held)

    def _sought(self, block: bytes) -> bytes:
        """What of a block is handed on. It is taken apart only where it holds a word that means something here."""
        if is_plain(block):
            self._keep(block)
            return block
        sound = is_sound(block)
        if not sound:
            block, sound = sound_in(block)
        block = self._taken_apart(block)
        if not sound and not self._done and self._failure is None:
            self._failure = self._failed.broken(_NO_EVENT)
        return block

    def _taken_apart(self, block: bytes) -> bytes:
        if found := [at for word in (DONE, ERROR, COUNTED, _NAMED) if (at := block.find(word)) >= 0]:
            untouched = block.rfind(b"\n\n", 0, min(found)) + 2
            return self._sifted(block, untouched if untouched > 1 else 0)
        self._keep(block)
        return block

    def _keep(self, block: bytes) -> None:
        self._kept.append(block)
        self._kept_bytes += len(block)
        if self._kept_bytes > _KEPT_BYTES:
            # Its text alone is a small part of it.
            self._endings = endings(self._kept, self._endings)
            since = texts_in(self._kept[self._covered :])
            self._texts += texts_in(self._kept[: self._covered]) + since
            self._outdated = self._outdated or any(since)
            self._kept.clear()
            self._kept_bytes = self._covered = 0

    def _sifted(self, block: bytes, untouched: int) -> bytes:
        handed_on = [block[:untouched]]
        covered = 0
        for event in block[untouched:].split(b"\n\n"):
            payload = next(payloads(event), b"")
            if payload == DONE:
                self._done = True
                break
            body = body_in(payload)
            reported = None if body is None else body.get("usage")
            usage = None if body is None else usage_in(reported, tier=body.get("service_tier"))
            if (error := error_in(event, body)) is not None:
                self._failure, self._refusal = self._failed.broken_off(error), payload
                if usage is not None:
                    self._reported, covered = usage, len(handed_on)
                break
            counts_alone = isinstance(reported, dict) and not (body and body.get("choices"))
            if event and (self._hands_on_usage or not counts_alone):
                handed_on.append(event + b"\n\n")
            if usage is not None:
                self._reported, covered = usage, len(handed_on)
            elif isinstance(reported, dict):
                self._half = joined(self._half, half_in(reported, tier=body and body.get("service_tier")))
        if covered:
            self._keep(b"".join(handed_on[:covered]))
            self._covered, self._outdated = len(self._kept), False
        self._keep(b"".join(handed_on[covered:]))
        return b"".join(handed_on)

    def _end(self) -> None:
        """The answer ended. Some providers say why every choice ends, and never `[DONE]`."""
        if not self._done and self._failure is None:
            if self._has_all():
                self._done = True
            else:
                self._failure = self._failed.broken("it ended without saying so")

    def _has_all(self) -> bool:
        """Whether every choice that was asked for said why it ended."""
        ended = endings(self._kept, self._endings)
        return len(ended) >= self._choices and all(ended.values())


class _Failing(NamedTuple):
    """What can go wrong with one attempt, each way as one error."""

    provider_id: str
    model_id: str
    secret: str | None
    texts: Callable[[], Sequence[str]]
    """What was asked, which no message may repeat."""

    def bad(self, detail: str) -> BadReply:
        return BadReply(detail, provider_id=self.provider_id, model_id=self.model_id)

    def rejected(self, detail: str) -> ProviderRejected:
        return ProviderRejected(detail, provider_id=self.provider_id, model_id=self.model_id)

    def broken(self, detail: str) -> StreamBroken:
        return StreamBroken(detail, provider_id=self.provider_id, model_id=self.model_id)

    def refused(self, response: Response, body: bytes, status: int | None = None) -> ProviderError:
        return refusal_of(
            status or response.status,
            response.headers,
            body,
            provider_id=self.provider_id,
            model_id=self.model_id,
            secret=self.secret,
            texts=self.texts(),
        )

    def unanswered(self, error: OSError | BadResponse) -> ProviderError:
        failure: ProviderError
        if isinstance(error, BadResponse):
            failure = self.bad(str(error))
            failure.may_be_billed = not isinstance(error, NoAnswer)
        elif isinstance(error, TimeoutError):
            failure = ProviderTimeout(provider_id=self.provider_id, model_id=self.model_id)
            failure.may_be_billed = not isinstance(error, NotSent)
        else:
            why = f"the connection failed ({type(error).__name__})"
            failure = ProviderUnavailable(why, provider_id=self.provider_id, model_id=self.model_id)
            failure.may_be_billed = isinstance(error, AnswerCut | AnswerLost)
        return failure

    def broken_by(self, error: OSError | BadResponse) -> ProviderError:
        failure = self.unanswered(error)
        return failure if isinstance(failure, ProviderTimeout) else self.broken(failure.detail)

    def broken_off(self, error: object) -> StreamBroken:
        """A stream whose provider says in the middle of it what went wrong."""
        words = error.get("message") if isinstance(error, Mapping) else error
        said = clean(" ".join(str(words or "").split()), self.secret, self.texts())
        return StreamBroken(said=said, provider_id=self.provider_id, model_id=self.model_id)

    def unreachable(self, why: str) -> ProviderError:
        """The file names an address or a key that no request can carry."""
        kind = ProviderAuthFailed if "authorization" in why else ProviderUnavailable
        return kind(why, provider_id=self.provider_id, model_id=self.model_id)

    def unless_as_long(self, returned: int, declared: int | None, asked: object = None) -> None:
        wanted = asked or declared
        if isinstance(wanted, int) and returned != wanted:
            raise DimensionMismatch(
                wanted=wanted,
                returned=returned,
                declared=wanted == declared,
                provider_id=self.provider_id,
                model_id=self.model_id,
            )


async def _answered(answer: Awaitable[Response], failed: _Failing) -> Response:
    try:
        response = await answer
    except (OSError, BadResponse) as error:
        raise failed.unanswered(error) from wordless(error)
    if response.status != 200:
        raise failed.refused(response, response.content)
    return response


def _completion(response: Response, raw: bytes, failed: _Failing) -> Completion:
    body = _parsed(response, raw, failed)
    choices = body.get("choices")
    if type(choices) is not list or not _is_whole(choices):
        with _used(usage_in(body.get("usage"), tier=body.get("service_tier"))):
            raise failed.bad("a choice has no message" if choices and type(choices) is list else "it has no choices")
    reported, tier = body.get("usage"), body.get("service_tier")
    usage = usage_in(reported, tier=tier)
    if usage is None:
        return Completion(body=body, usage=None, half=half_in(reported, tier=tier), raw=raw)
    if not usage.output_tokens and _says_any(choices):
        return Completion(body=body, usage=None, half=usage, raw=raw)
    return Completion(body=body, usage=usage, raw=raw)


def _says_any(choices: Sequence[Mapping[str, Any]]) -> bool:
    return any(text for choice in choices for text in said_in(choice["message"]))


@contextmanager
def _used(usage: Usage | None) -> Iterator[None]:
    """Within it, an answer that is not the one asked for failed with what its provider says that it used."""
    try:
        yield
    except ProviderError as error:
        error.usage = usage
        raise


def _is_whole(choices: object) -> bool:
    """Whether each choice of an answer, and there is one, has its message."""
    if type(choices) is not list or not choices:
        return False
    for choice in choices:  # noqa: SIM110 - for each request, and a generator takes three times as long
        if type(choice) is not dict or type(choice.get("message")) is not dict:
            return False
    return True


def _embeddings(response: Response, count: int, model: Model, asked: object, failed: _Failing) -> RawEmbeddings:
    raw = response.content
    without, written_out = _without_vectors(raw)
    answer = _parsed(response, without, failed, replies=False)
    usage = usage_in(answer.get("usage"), replies=False)
    with _used(usage):
        items = _items(answer, count, failed)
        try:
            packed = [_packed_length(item["embedding"]) for item in items if item["embedding"] != []]
        except (LookupError, TypeError, ValueError) as error:
            raise failed.bad(_NOT_VECTORS) from wordless(error)
        lengths = packed + written_out
        if len(lengths) != len(items) or len(set(lengths)) != 1 or not lengths[0]:
            raise failed.bad(_NOT_VECTORS)
        failed.unless_as_long(lengths[0], model.dimension, asked)
    return RawEmbeddings(raw=raw, usage=usage, count=len(items), dimension=lengths[0])


def _no_texts() -> Sequence[str]:
    return ()


def _parsed(response: Response, raw: bytes, failed: _Failing, *, replies: bool = True) -> dict[str, Any]:
    """An answer's JSON, which may yet be an error: its code or its type says then which status it stands for."""
    body = json_object(raw)
    if body is None:
        raise failed.bad(_NOT_JSON)
    if body.get("error"):
        raise _said_to_have_failed(response, raw, failed, replies=replies)
    return body


def _choices_asked(options: Mapping[str, Any]) -> int:
    asked = options.get("n")
    return asked if type(asked) is int and asked > 1 else 1


def _first_byte(head: bytes) -> bytes:
    """The first byte of a body that is neither blank nor of a byte order mark; nothing where that is not there yet."""
    return b"" if _BYTE_ORDER_MARK.startswith(head) else head.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]


def _is_chunk(body: Mapping[str, Any]) -> bool:
    return "choices" in body or "usage" in body


def _said_to_have_failed(response: Response, raw: bytes, failed: _Failing, *, replies: bool = True) -> ProviderError:
    body = body_in(raw) or {}
    failure = failed.refused(response, raw, stands_for(body.get("error") or body))
    reported, tier = body.get("usage"), body.get("service_tier")
    # What failed need not have said anything.
    failure.usage = usage_in(reported, replies=replies, tier=tier) or usage_in(reported, replies=False, tier=tier)
    # Else it says that it failed, and nothing of what it did.
    failure.may_be_billed = half_in(reported) is not None or bool(body.get("choices"))
    return failure


async def _what_came(response: Response) -> bytes:
    """The body of a refusal, or nothing where it does not come: the status alone says enough."""
    try:
        return await response.body()
    except (OSError, BadResponse):
        return b""


def _items(body: Mapping[str, Any], count: int, failed: _Failing) -> list[Any]:
    items = body.get("data")
    found = len(items) if isinstance(items, list) else 0
    if not isinstance(items, list) or found != count:
        raise failed.bad(f"{found} vectors for {count} texts")
    return items


def _vector(embedding: object) -> Vector:
    import numpy as np

    if isinstance(embedding, str):
        return np.frombuffer(binascii.a2b_base64(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def _without_vectors(raw: bytes) -> tuple[bytes, list[int]]:
    """The body with every vector that is written out emptied, and how many numbers each had, 0 for what is none.

    Reading them all would cost more than everything else that is done for a request.
    """
    import numpy as np

    parts: list[bytes] = []
    lengths: list[int] = []
    start = at = 0
    while (at := raw.find(_EMBEDDING, at)) >= 0:
        at += len(_EMBEDDING)
        if not raw[at : at + 8].lstrip().startswith(b"["):
            continue
        opens = raw.index(b"[", at) + 1
        closes = raw.find(b"]", opens)
        if closes < 0:
            break
        numbers = np.frombuffer(raw, np.uint8, closes - opens, opens)
        # A `null`, a `NaN` or an `Infinity` makes it no list of numbers, and no number has an n.
        worded = raw.find(b"n", opens, closes) >= 0 or raw.find(b"N", opens, closes) >= 0
        empty = worded or not raw[opens:closes].strip()
        lengths.append(0 if empty else int(np.count_nonzero(numbers == _COMMA)) + 1)
        parts.append(raw[start:opens])
        start = at = closes
    return b"".join([*parts, raw[start:]]), lengths


def _packed_length(embedding: object) -> int:
    if not isinstance(embedding, str):
        raise TypeError("neither base64 nor a list of numbers")
    length, left = divmod(len(embedding) * 3 // 4 - embedding.count("=", -2), 4)
    if left:
        raise ValueError("no whole number of 32-bit floats")
    return length


def _plain(value: object) -> object:
    """Values that callers in the same process hand in; what came over HTTP is plain already."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(type(value).__name__)


@cache
def _refuses_max_tokens(model_id: str) -> bool:
    """OpenAI's o series, and GPT-5 and later, take `max_completion_tokens` in its place."""
    return bool(re.match(r"(ft:)?(o\d|gpt-([5-9]|\d\d))", model_id.rpartition("/")[2]))
