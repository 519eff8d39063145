"""Every provider that speaks another protocol than OpenAI's, through LiteLLM; the one file that imports it.

LiteLLM translates, and nothing else: it makes one attempt, keeps no history, reads no `.env`, and
what it makes up (usage it counted itself, a `stop` for a stream that broke off) is taken out again.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import os
import sys
import warnings
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from copy import deepcopy
from functools import cache
from threading import Lock, Thread
from typing import Any
from weakref import WeakSet

import numpy as np

from sekha.errors import BadReply, DimensionMismatch, FieldUnsupported, ProviderError, ProviderRejected, StreamBroken
from sekha.images import format_of
from sekha.pricing import MOST_TOKENS, Usage
from sekha.providers.addresses import base_url_of
from sekha.providers.base import ChatCall, Chunk, Completion, Embeddings, openai_usage
from sekha.providers.events import says_something
from sekha.providers.failures import failure_of, texts_of, wordless
from sekha.registry import Model, ProviderKind, ProviderSpec
from sekha.vision import schemes_of

__all__ = ["LiteLLMProvider", "begin_import", "litellm_module"]

_CHAT_PREFIX: Mapping[ProviderKind, str] = {
    "ollama": "ollama_chat/",
    "anthropic": "anthropic/",
}
# A caller's field is handed on only by name: LiteLLM takes its own orders (`api_base`, `fallbacks`,
# `mock_response`) as fields of the same call.
_FIELDS = frozenset(
    {
        "audio",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    }
)
_OLLAMA_FIELDS = frozenset(
    {
        "keep_alive",
        "min_p",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "num_ctx",
        "num_gpu",
        "num_predict",
        "num_thread",
        "repeat_last_n",
        "repeat_penalty",
        "tfs_z",
        "think",
    }
)
_HINTS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "store", "user"})
"""What nobody needs to heed for the answer to be the one that was asked for."""
_CHANGES_NOTHING: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": ([], ["text"]),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "stop": ([], ""),
    "temperature": (1,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
    "verbosity": ("medium",),
}
"""Values that say what is so without them. A protocol that lacks the field does the same."""
_ADDRESSED = frozenset({"file_data", "file_id", "file_uri", "image_url", "uri", "url"})
"""Fields of a part that may name what LiteLLM would fetch."""
_OURS = frozenset({"model", "messages", "stream", "stream_options", "timeout"})


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
        reported: list[Mapping[str, Any]] = []
        if self._spec.kind == "ollama":
            # LiteLLM counts for itself what Ollama leaves out, so the reply itself must tell.
            arguments["logger_fn"] = reported.append
        try:
            await _imported()
            litellm = await asyncio.to_thread(self._opened_for, call.model, arguments)
            async with asyncio.timeout(call.timeout_seconds):
                reply = await litellm.acompletion(**arguments)
        except FieldUnsupported:
            raise
        except Exception as error:
            raise self._failure(error, call.model, texts) from wordless(error)
        if not getattr(reply, "choices", None):
            raise self._bad(call.model, "it has no choices")
        raw = str(reported[-1].get("original_response", "")) if reported else None
        usage = _usage(getattr(reply, "usage", None))
        if raw is not None and '"eval_count"' not in raw:
            usage = None
        body = _envelope(reply, call.model, "chat.completion") | {"choices": [_choice(c) for c in reply.choices]}
        return Completion(body=body | ({"usage": openai_usage(usage)} if usage else {}), usage=usage)

    async def stream(self, call: ChatCall) -> AsyncIterator[Chunk]:
        texts = texts_of(call.messages)
        arguments = self._chat(call) | {"stream": True, "stream_options": {"include_usage": True}}
        pieces: Any = None
        started = False
        try:
            await _imported()
            litellm = await asyncio.to_thread(self._opened_for, call.model, arguments)
            async with asyncio.timeout(call.timeout_seconds):
                pieces = await litellm.acompletion(**arguments)
            envelope: dict[str, Any] | None = None
            while True:
                try:
                    async with asyncio.timeout(call.timeout_seconds):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    break
                # One stream has one id; for Ollama LiteLLM makes up another for each piece.
                envelope = envelope or _envelope(piece, call.model, "chat.completion.chunk")
                chunk = _chunk(piece, pieces, envelope)
                if chunk is None:
                    continue
                if not _ended(pieces) and _finishes(chunk):
                    break
                yield chunk
                started = started or says_something(chunk.body)
        except FieldUnsupported:
            raise
        except Exception as error:
            raise self._failure(error, call.model, texts, streaming=started) from wordless(error)
        finally:
            if pieces is not None:
                await pieces.aclose()
        if not _ended(pieces):
            raise self._unfinished(call.model, started=started)

    async def embed(self, model: Model, texts: Sequence[str], *, timeout_seconds: float) -> Embeddings:
        prefix = "ollama/" if self._spec.kind == "ollama" else _CHAT_PREFIX.get(self._spec.kind, "")
        arguments = self._connection(timeout_seconds) | {"model": prefix + model.id, "input": list(texts)}
        try:
            await _imported()
            litellm = await asyncio.to_thread(_opened, arguments["model"])
            async with asyncio.timeout(timeout_seconds):
                reply = await litellm.aembedding(**arguments)
        except Exception as error:
            raise self._failure(error, model, texts) from wordless(error)
        return Embeddings(vectors=self._vectors(reply, model, len(texts)), usage=_usage(getattr(reply, "usage", None)))

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
                declared=model.dimension, returned=vectors.shape[1], provider_id=self._spec.id, model_id=model.id
            )
        if not np.isfinite(vectors).all():
            raise self._bad(model, "a vector holds a number that is not finite")
        return vectors

    def _chat(self, call: ChatCall) -> dict[str, Any]:
        kind = self._spec.kind
        options = {name: value for name, value in call.options.items() if name not in _OURS and value is not None}
        named = _FIELDS | _OLLAMA_FIELDS if kind == "ollama" else _FIELDS
        known = {name: value for name, value in options.items() if name in named}
        if others := options.keys() - named - _HINTS:
            raise self._lacking(call.model, others)
        self._refuse_fetching(call)
        # Copied, since LiteLLM rewrites them in place for some providers.
        messages = deepcopy([dict(message) for message in call.messages])
        for image in _images(messages):
            _call_by_its_format(image)
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
                if name == "parallel_tool_calls" or _changes_nothing(name, arguments.get(name)):
                    arguments.pop(name, None)
        lacked = arguments.keys() & _lacked(arguments["model"])
        if needed := [name for name in lacked if not _changes_nothing(name, arguments[name])]:
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
        known = _FIELDS.issuperset(names)
        error = FieldUnsupported(
            lacks if known else "", said="" if known else lacks, provider_id=self._spec.id, model_id=model.id
        )
        error.field = names[0]
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
            for kind, field, address in _addresses(message.get("content")):
                # Anthropic takes other parts by address too, but what a part says to be its bytes LiteLLM reads.
                passed_on = kind == "image_url" or (self._spec.kind == "anthropic" and field != "file_data")
                if not (passed_on and address.startswith(taken)):
                    what = "an image" if kind == "image_url" else "a part of that type"
                    raise self._rejected(call.model, f"it takes {what} as base64 in a `data:` URL, not by this address")

    def _failure(
        self, error: Exception, model: Model, texts: Sequence[str], *, streaming: bool = False
    ) -> ProviderError:
        return failure_of(
            error,
            provider_id=self._spec.id,
            model_id=model.id,
            secret=self._secret,
            texts=texts,
            streaming=streaming,
        )

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


async def _imported() -> None:
    if not litellm_module.cache_info().currsize:
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
    return litellm


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
    openais = litellm.constants.DEFAULT_CHAT_COMPLETION_PARAM_VALUES.keys() | _HINTS
    lacked: frozenset[str] = (_FIELDS & openais) - {*taken}
    # LiteLLM hands it to Ollama as `repeat_penalty`, a factor: 1 is none there, and 0 is nonsense.
    return lacked | {"frequency_penalty"} if provider == "ollama_chat" else lacked


def _changes_nothing(name: str, value: object) -> bool:
    return name in _HINTS or value in _CHANGES_NOTHING.get(name, ())


def _images(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                yield part


def _call_by_its_format(part: dict[str, Any]) -> None:
    """Let the media type of a `data:` URL say what the bytes are: Anthropic refuses an image under another name."""
    reference = part.get("image_url")
    url = reference.get("url") if isinstance(reference, dict) else reference
    if not isinstance(url, str) or url[:5].lower() != "data:":
        return
    encoded = url.partition(",")[2]
    try:
        format_ = format_of(base64.b64decode(encoded[:64]))
    except ValueError:
        return
    if format_ is not None:
        told = f"data:image/{format_};base64,{encoded}"
        part["image_url"] = reference | {"url": told} if isinstance(reference, dict) else told


def _addresses(content: object, kind: str = "") -> Iterator[tuple[str, str, str]]:
    """Every address in the parts of a message: the type of its part, its field, and the address."""
    if isinstance(content, list | tuple):
        for part in content:
            yield from _addresses(part, kind)
    elif isinstance(content, Mapping):
        kind = kind or str(content.get("type"))
        for field, value in content.items():
            if not isinstance(value, str):
                yield from _addresses(value, kind)
            elif field in _ADDRESSED and value[:5].lower() != "data:" and (kind == "image_url" or "://" in value):
                yield kind, field, value


def _envelope(reply: Any, model: Model, kind: str) -> dict[str, Any]:
    envelope = {"id": reply.id, "object": kind, "created": reply.created, "model": model.id}
    fingerprint = getattr(reply, "system_fingerprint", None)
    return envelope | ({"system_fingerprint": fingerprint} if fingerprint else {})


def _choice(choice: Any) -> dict[str, Any]:
    message = choice.message.model_dump(exclude_none=True)
    message.pop("provider_specific_fields", None)
    body = {"index": choice.index, "message": {"content": None} | message, "finish_reason": choice.finish_reason}
    logprobs = getattr(choice, "logprobs", None)
    return body | ({"logprobs": _plain(logprobs)} if logprobs else {})


def _chunk(piece: Any, pieces: Any, envelope: dict[str, Any]) -> Chunk | None:
    if getattr(piece, "usage", None) is not None:
        # LiteLLM closes with a sum that is its own count where no piece of the provider's carried one.
        usage = _usage(piece.usage) if _reported(pieces) else None
        return Chunk(body=envelope | {"choices": [], "usage": openai_usage(usage)}, usage=usage) if usage else None
    choices = []
    for choice in piece.choices:
        delta = choice.delta.model_dump(exclude_none=True)
        delta.pop("provider_specific_fields", None)
        body = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
        logprobs = getattr(choice, "logprobs", None)
        choices.append(body | ({"logprobs": _plain(logprobs)} if logprobs else {}))
    return Chunk(body=envelope | {"choices": choices}) if choices else None


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _reported(pieces: Any) -> bool:
    return any(getattr(piece, "usage", None) is not None for piece in pieces.chunks)


def _ended(pieces: Any) -> bool:
    """Whether the provider itself said how it finished; LiteLLM says `stop` for one that did not."""
    return pieces.received_finish_reason is not None or pieces.intermittent_finish_reason is not None


def _finishes(chunk: Chunk) -> bool:
    return any(choice["finish_reason"] for choice in chunk.body["choices"]) or chunk.usage is not None


def _usage(reported: Any) -> Usage | None:
    """LiteLLM writes zeros where nothing was reported. No real call takes no tokens, or more than any model could."""
    if reported is None or not 0 < (reported.prompt_tokens or 0) + (reported.completion_tokens or 0) <= MOST_TOKENS:
        return None
    details = getattr(reported, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None) or getattr(reported, "cache_read_input_tokens", None)
    written = getattr(reported, "cache_creation_input_tokens", None)
    return Usage(
        input_tokens=reported.prompt_tokens or 0,
        output_tokens=reported.completion_tokens or 0,
        cached_tokens=cached or 0,
        cache_write_tokens=written or 0,
    )
