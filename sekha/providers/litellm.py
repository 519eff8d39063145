"""Every provider that speaks another protocol than OpenAI's, through LiteLLM; the one file that imports it.

LiteLLM translates, and nothing else: it makes one attempt, keeps no history, and reads no `.env`. What it cannot be
trusted to refuse is in `carrying.py`, and what its answers mean in `answers.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from functools import cache, wraps
from threading import Lock, Thread
from typing import Any
from weakref import WeakSet

import numpy as np

from sekha.errors import (
    BadReply,
    DimensionMismatch,
    FieldUnsupported,
    NotLoaded,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    StreamBroken,
)
from sekha.providers.addresses import base_url_of
from sekha.providers.answers import (
    Thoughts,
    choice_of,
    chunk_of,
    ended,
    envelope_of,
    finishes,
    number_calls,
    usage_of,
    went_in_of,
)
from sekha.providers.base import ChatCall, Chunk, Completion, Embeddings, openai_usage
from sekha.providers.carrying import (
    FIELDS,
    HINTS,
    OLLAMA_FIELDS,
    Uncarried,
    addresses,
    call_by_its_format,
    changes_nothing,
    fields_for,
    images,
)
from sekha.providers.events import said_in, says_something
from sekha.providers.failures import failure_of, texts_of, wordless
from sekha.providers.histories import history_for
from sekha.providers.reports import is_half
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.vision import schemes_of

__all__ = ["LiteLLMProvider", "begin_import", "litellm_module"]

_CHAT_PREFIX: Mapping[ProviderKind, str] = {
    "ollama": "ollama_chat/",
    "anthropic": "anthropic/",
}
_UNSEEN = ("aiohttp_openai/", "petals/", "sagemaker", "vertex_ai")
"""Models that LiteLLM reaches over connections of other libraries than HTTPX."""
_OURS = frozenset({"model", "messages", "stream", "stream_options"})


class _Journey:
    """One call on its way through LiteLLM: whether anything has left for the provider, and what took the time."""

    __slots__ = ("left", "loading")

    def __init__(self) -> None:
        self.left = False
        self.loading = False
        """Whether LiteLLM was still being loaded when it began, which its time is too short for."""


_journey: ContextVar[_Journey | None] = ContextVar("journey", default=None)


def _begin_journey() -> _Journey:
    journey = _Journey()
    _journey.set(journey)
    return journey


class LiteLLMProvider:
    """One configured provider. Connections are pooled by LiteLLM for the whole process."""

    def __init__(self, spec: ProviderSpec) -> None:
        self._spec = spec
        self._secret = spec.api_key.get_secret_value() if spec.api_key else None
        self._base_url = base_url_of(spec.kind, spec.base_url)
        _using_litellm.add(self)

    async def complete(self, call: ChatCall) -> Completion:
        texts = texts_of(call.messages)
        arguments = self._chat(call)
        journey = _begin_journey()
        try:
            async with asyncio.timeout(call.timeout_seconds):
                await _imported(journey)
                litellm = await asyncio.to_thread(self._opened_for, call.model, arguments)
                reply = await litellm.acompletion(**arguments)
        except FieldUnsupported:
            raise
        except Exception as error:
            raise self._failure(error, call.model, texts, journey) from wordless(error)
        if not getattr(reply, "choices", None):
            raise self._bad(call.model, "it has no choices")
        usage = usage_of(getattr(reply, "usage", None))
        body = envelope_of(reply, call.model, "chat.completion") | {"choices": [choice_of(c) for c in reply.choices]}
        said = any(text for choice in body["choices"] for text in said_in(choice["message"]))
        if usage is not None and is_half(usage, said=said):
            # LiteLLM writes zero for what is missing.
            return Completion(body=body, usage=None, half=usage)
        return Completion(body=body | ({"usage": openai_usage(usage)} if usage else {}), usage=usage)

    async def stream(self, call: ChatCall) -> AsyncIterator[Chunk]:
        texts = texts_of(call.messages)
        arguments = self._chat(call) | {"stream": True, "stream_options": {"include_usage": True}}
        pieces: Any = None
        started = False
        journey = _begin_journey()
        try:
            async with asyncio.timeout(call.timeout_seconds):
                await _imported(journey)
                litellm = await asyncio.to_thread(self._opened_for, call.model, arguments)
                pieces = await litellm.acompletion(**arguments)
            journey.loading = False
            envelope: dict[str, Any] | None = None
            calls, heard, spoke, thoughts = 0, False, False, Thoughts()
            while True:
                try:
                    async with asyncio.timeout(call.timeout_seconds):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    break
                # One stream has one id; for Ollama LiteLLM makes up another for each piece.
                envelope = envelope or envelope_of(piece, call.model, "chat.completion.chunk")
                journey.left = True
                chunk = chunk_of(piece, pieces, envelope)
                if chunk is None:
                    continue
                thoughts.gather(chunk)
                if self._spec.kind == "anthropic" and not heard:
                    chunk, heard = replace(chunk, went_in=went_in_of(pieces)), True
                if self._spec.kind == "ollama":
                    calls = number_calls(chunk, calls)
                if not ended(pieces) and finishes(chunk):
                    break
                usage = chunk.usage
                spoke = spoke or any(text for choice in chunk.body["choices"] for text in said_in(choice["delta"]))
                if usage is not None and is_half(usage, said=spoke):
                    chunk = Chunk(body=envelope | {"choices": []}, went_in=usage)
                yield chunk
                started = started or says_something(chunk.body)
        except FieldUnsupported:
            raise
        except Exception as error:
            raise self._failure(error, call.model, texts, journey, streaming=started) from wordless(error)
        finally:
            if pieces is not None:
                await pieces.aclose()
        if not ended(pieces):
            raise self._unfinished(call.model, started=started)

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:
        prefix = "ollama/" if self._spec.kind == "ollama" else _CHAT_PREFIX.get(self._spec.kind, "")
        arguments = self._connection(timeout_seconds) | {"model": prefix + model.id, "input": list(texts)}
        journey = _begin_journey()
        try:
            async with asyncio.timeout(timeout_seconds):
                await _imported(journey)
                litellm = await asyncio.to_thread(_opened, arguments["model"])
                reply = await litellm.aembedding(**arguments)
        except Exception as error:
            raise self._failure(error, model, texts, journey) from wordless(error)
        usage = usage_of(getattr(reply, "usage", None), replies=False)
        return Embeddings(vectors=self._vectors(reply, model, len(texts)), usage=usage)

    async def aclose(self) -> None:
        """Close the connections, when no other provider of this process has any use for them."""
        _using_litellm.discard(self)
        if not _using_litellm and litellm_module.cache_info().currsize:
            await _close_connections()

    def _vectors(self, reply: Any, model: Model, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        items = list(getattr(reply, "data", None) or ())
        if len(items) != count:
            raise self._bad(model, f"{len(items)} vectors for {count} texts")
        try:
            in_order = sorted(items, key=lambda item: int(item["index"]))
            vectors = np.array([item["embedding"] for item in in_order], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(model, "its vectors are not lists of numbers of one length") from wordless(error)
        if vectors.ndim != 2:
            raise self._bad(model, "its vectors are not lists of numbers of one length")
        if model.dimension is not None and vectors.shape[1] != model.dimension:
            raise DimensionMismatch(
                wanted=model.dimension, returned=vectors.shape[1], provider_id=self._spec.id, model_id=model.id
            )
        if not np.isfinite(vectors).all():
            raise self._bad(model, "a vector holds a number that is not finite")
        return vectors

    def _chat(self, call: ChatCall) -> dict[str, Any]:
        kind = self._spec.kind
        options = {name: value for name, value in call.options.items() if name not in _OURS and value is not None}
        named = FIELDS | OLLAMA_FIELDS if kind == "ollama" else FIELDS
        known = {name: value for name, value in options.items() if name in named}
        if others := options.keys() - named - HINTS:
            raise self._lacking(call.model, others)
        try:
            if kind == "anthropic" or kind == "ollama":  # noqa: PLR1714 - MyPy sees no protocol in a tuple
                known, messages = fields_for(kind, known), history_for(kind, call.messages)
            else:
                # Copied, since LiteLLM rewrites them in place for some providers.
                messages = deepcopy([dict(message) for message in call.messages])
        except Uncarried as error:
            raise self._placeless(call.model, error) from None
        self._refuse_fetching(call)
        for image in images(messages):
            call_by_its_format(image)
        return self._connection(call.timeout_seconds) | {
            **known,
            "model": _CHAT_PREFIX.get(kind, "") + call.model.id,
            "messages": messages,
            # With tools it would load its proxy for MCP, whose packages are not installed.
            "_skip_mcp_handler": True,
        }

    def _opened_for(self, model: Model, arguments: dict[str, Any]) -> Any:
        """LiteLLM, and `arguments` without what the model's protocol lacks, where that changes nothing.

        Raises `FieldUnsupported` where it would. Nothing was sent then.
        """
        litellm = _opened(arguments["model"])
        if not arguments.get("tools"):
            # Some refuse an empty list, and Anthropic a choice where there is nothing to choose from.
            for name in ("tools", "tool_choice", "parallel_tool_calls"):
                if name == "parallel_tool_calls" or changes_nothing(name, arguments.get(name)):
                    arguments.pop(name, None)
        lacked = arguments.keys() & _lacked(arguments["model"])
        if needed := [name for name in lacked if not changes_nothing(name, arguments[name])]:
            raise self._lacking(model, needed)
        for name in lacked:
            del arguments[name]
        return litellm

    def _lacking(self, model: Model, fields: Collection[str]) -> FieldUnsupported:
        names = sorted(fields)
        # An error is short.
        listed = " and ".join(f"`{name[:40]}`" for name in names[:4]) + (" and others" if len(names) > 4 else "")
        lacks = f"its protocol has no {listed}"
        # A caller names fields freely, and what he writes is not for the records.
        known = FIELDS.issuperset(names)
        error = FieldUnsupported(
            lacks if known else "", said="" if known else lacks, provider_id=self._spec.id, model_id=model.id
        )
        error.field = names[0]
        return error

    def _placeless(self, model: Model, uncarried: Uncarried) -> FieldUnsupported:
        """Refuse what the protocol has no place for, by its path in the request, which has no words of the caller's."""
        error = FieldUnsupported(uncarried.lacks, provider_id=self._spec.id, model_id=model.id)
        error.field = uncarried.field
        return error

    def _connection(self, timeout_seconds: float) -> dict[str, Any]:
        # Without a key of its own, LiteLLM would look in the environment, and send what it finds there.
        missing = None if self._spec.kind in ("ollama", "litellm") else "none"
        return {
            "api_key": self._secret or missing,
            "api_base": self._base_url,
            "timeout": timeout_seconds,
            "num_retries": 0,
            "max_retries": 0,
        }

    def _refuse_fetching(self, call: ChatCall) -> None:
        """LiteLLM fetches an image itself for a provider that will not; we never call an address a caller names."""
        taken = tuple(f"{scheme}://" for scheme in schemes_of(self._spec.kind, call.model.id))
        for message in call.messages:
            for kind, field, address in addresses(message.get("content")):
                # Anthropic takes other parts by address too, but what a part says to be its bytes LiteLLM reads.
                passed_on = kind == "image_url" or (self._spec.kind == "anthropic" and field != "file_data")
                if not (passed_on and address[:8].lower().startswith(taken)):
                    what = "an image" if kind == "image_url" else "a part of that type"
                    raise self._rejected(call.model, f"it takes {what} as base64 in a `data:` URL, not by this address")

    def _failure(
        self, error: Exception, model: Model, texts: Sequence[str], journey: _Journey, *, streaming: bool = False
    ) -> ProviderError:
        failure = failure_of(
            error,
            provider_id=self._spec.id,
            model_id=model.id,
            secret=self._secret,
            texts=texts,
            streaming=streaming,
            # Some are reached over connections that are noted nowhere.
            sent=journey.left or model.id.startswith(_UNSEEN),
        )
        if not journey.loading or not isinstance(failure, ProviderTimeout):
            return failure
        not_loaded = NotLoaded("LiteLLM is still being loaded", provider_id=self._spec.id, model_id=model.id)
        # Where it was loaded in time to ask and not to be answered.
        not_loaded.may_be_billed = journey.left
        return not_loaded

    def _bad(self, model: Model, detail: str) -> BadReply:
        return BadReply(detail, provider_id=self._spec.id, model_id=model.id)

    def _rejected(self, model: Model, detail: str) -> ProviderRejected:
        return ProviderRejected(detail, provider_id=self._spec.id, model_id=model.id)

    def _unfinished(self, model: Model, *, started: bool) -> ProviderError:
        if not started:
            return self._bad(model, "the stream ended before anything was said")
        return StreamBroken("it ended without saying so", provider_id=self._spec.id, model_id=model.id)


CLOSE_SECONDS = 2.0
IMPORT_SWITCH_SECONDS = 0.0005
"""How long the import keeps others from running at a time, where it can be interrupted."""
_using_litellm: WeakSet[LiteLLMProvider] = WeakSet()


async def _close_connections() -> None:
    from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

    # Closing waits for each connection to be gone, and nothing that ends may wait for that for long.
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await close_litellm_async_clients()
            # Streams of some providers go through one client for the whole process, which it forgets. Closing
            # only its transport lets the next call open it again.
            if (shared := vars(litellm_module()).get("module_level_aclient")) is not None:
                await shared.client._transport.aclose()
    # What is closed would be handed out again.
    litellm_module().in_memory_llm_clients_cache.flush_cache()


_starting = Lock()
_import: Future[None] | None = None


def begin_import() -> Future[None]:
    """Import LiteLLM in a thread of its own, once in a process; who needs it waits for what this returns.

    Not in one of the event loop's threads: a few callers who wait would take all of them, and others need those too.
    """
    global _import  # noqa: PLW0603 - what is imported is the process's
    with _starting:
        if _import is None or (_import.done() and _import.exception() is not None):
            _import = Future()
            # From here on nobody who gives up waiting can cancel it for the others.
            _import.set_running_or_notify_cancel()
            Thread(target=_import_into, args=(_import,), name="litellm", daemon=True).start()
        return _import


async def _imported(journey: _Journey) -> None:
    """Wait until it is imported. Whoever gives up waiting leaves it to go on for the others."""
    if not litellm_module.cache_info().currsize:
        journey.loading = True
        await asyncio.wrap_future(begin_import())


def _import_into(done: Future[None]) -> None:
    # Not under a lower priority: what holds the interpreter's lock would be kept from giving it back.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(IMPORT_SWITCH_SECONDS)
    try:
        litellm_module()
        # As what is imported at the start: the collector need not walk through hundreds of thousands of objects.
        gc.freeze()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)
    finally:
        sys.setswitchinterval(interval)


@cache
def litellm_module() -> Any:
    """Import LiteLLM, quiet and offline. Takes seconds: call it from a thread."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")  # any other reads `.env` into the environment
    # Pydantic says of its types, once per process, that it does not enforce `ReadOnly`.
    warnings.filterwarnings("ignore", "Item .* is using the `ReadOnly` qualifier", UserWarning)
    import litellm
    from litellm.litellm_core_utils import core_helpers
    from litellm.litellm_core_utils.prompt_templates import image_handling

    litellm.suppress_debug_info = True
    litellm.telemetry = False
    litellm.turn_off_message_logging = True
    litellm.disable_streaming_logging = True
    litellm.disable_hf_tokenizer_download = True
    litellm.drop_params = False
    # Counting, it fetches an image to learn its size; whatever it counts is left out anyway.
    litellm.disable_token_counter = True
    # What it fetches elsewhere goes through here, where 0 means not at all.
    image_handling.MAX_IMAGE_URL_DOWNLOAD_SIZE_MB = 0
    litellm.num_retries = 0
    # `max_retries=0` is taken for "none given" by the embeddings of OpenAI, which then try three times.
    litellm.DEFAULT_MAX_RETRIES = 0
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        # It logs whole requests with its errors.
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # What it does not know it calls `stop`, as if the answer were whole.
    core_helpers._FINISH_REASON_MAP.setdefault("model_context_window_exceeded", "length")
    _note_what_leaves()
    _need_no_usage()
    return litellm


def _note_what_leaves() -> None:
    """Have every request over HTTPX noted in the journey that it belongs to, once it leaves.

    What LiteLLM raises does not tell a request that it could not translate from an answer that it could not read.
    One is the caller's mistake and cost nothing; the other is the provider's, and may be billed.
    """
    import httpx

    for client in (httpx.AsyncClient, httpx.Client):
        setattr(client, "send", _noting(client.send))  # noqa: B010 - a method, which MyPy holds to be fixed


def _need_no_usage() -> None:
    """Have an answer of Anthropic's protocol read that reports no usage, null, or half of it.

    LiteLLM takes it for broken, or half of it for nothing. It counts none then, and zeros are no report.
    """
    from litellm.llms.anthropic.chat.handler import ModelResponseIterator
    from litellm.llms.anthropic.chat.transformation import AnthropicConfig

    of_answer, of_event = AnthropicConfig.transform_parsed_response, ModelResponseIterator.chunk_parser

    @wraps(of_answer)
    def read(self: Any, completion_response: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(completion_response, dict):
            completion_response = completion_response | {"usage": _sound_usage(completion_response.get("usage"))}
        return of_answer(self, completion_response, *args, **kwargs)

    @wraps(of_event)
    def parse(self: Any, chunk: Any) -> Any:
        return of_event(self, _with_sound_usage(chunk))

    setattr(AnthropicConfig, "transform_parsed_response", read)  # noqa: B010 - as above
    setattr(ModelResponseIterator, "chunk_parser", parse)  # noqa: B010


def _with_sound_usage(event: Any) -> Any:
    """An event of Anthropic's without what is no usage, and the first without the output that it names.

    That is a token or a few, written before anything is said: where the last event names none, LiteLLM would keep it.
    """
    if not isinstance(event, dict):
        return event
    message, usage = event.get("message"), event.get("usage", {})
    if event.get("type") == "message_start" and isinstance(message, dict):
        begun = message.get("usage")
        usable = begun | {"output_tokens": 0} if isinstance(begun, dict) else {}
        return event | {"message": message | {"usage": usable}}
    return event if isinstance(usage, dict) else event | {"usage": {}}


def _sound_usage(reported: object) -> dict[str, Any]:
    """What an answer of Anthropic's reports, with zero for what went in or came out where that is no number."""
    usage = reported if isinstance(reported, dict) else {}
    halves = {name: usage.get(name) for name in ("input_tokens", "output_tokens")}
    return usage | {name: 0 for name, half in halves.items() if type(half) is not int}


def _noting(send: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(send)
    def noted(*args: Any, **kwargs: Any) -> Any:
        if (journey := _journey.get()) is not None:
            journey.left = True
        return send(*args, **kwargs)

    return noted


def _opened(model_name: str) -> Any:
    """LiteLLM, ready for a call to this model."""
    litellm = litellm_module()
    if model_name.startswith(("ollama/", "ollama_chat/")):
        # Of an Ollama model that it does not know LiteLLM asks the server after each call, blocking the
        # event loop meanwhile.
        name = model_name.partition("/")[2]
        litellm.model_cost.setdefault(
            f"ollama/{name}",
            {"litellm_provider": "ollama", "mode": "chat", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
        )
    return litellm


@cache
def _lacked(model_name: str) -> frozenset[str]:
    """Which of OpenAI's fields this model's protocol has no place for; none where LiteLLM cannot say."""
    litellm = litellm_module()
    try:
        name, provider, *_ = litellm.get_llm_provider(model_name)
        taken = litellm.get_supported_openai_params(model=name, custom_llm_provider=provider)
    except Exception:
        # Whatever is wrong with the name, the call itself says it better.
        return frozenset()
    if taken is None:
        return frozenset()
    # What is not OpenAI's, as `top_k`, it hands on without a look.
    openais = litellm.constants.DEFAULT_CHAT_COMPLETION_PARAM_VALUES.keys() | HINTS
    lacked: frozenset[str] = (FIELDS & openais) - {*taken}
    # LiteLLM hands it to Ollama as `repeat_penalty`, a factor: 1 is none there, and 0 is nonsense.
    return lacked | {"frequency_penalty"} if provider == "ollama_chat" else lacked
