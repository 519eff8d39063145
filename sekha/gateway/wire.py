"""OpenAI's JSON to our requests, and our replies to OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import orjson

from sekha.calling import Attempt
from sekha.chat import ChatRequest, Reply
from sekha.embedding import EmbedRequest, RawEmbedded
from sekha.errors import InvalidRequest, UnknownModel
from sekha.gateway.fields import dollars, flag, name_in, object_in, whole
from sekha.gateway.problems import Headers, money
from sekha.keys import EVERYBODY, Pass
from sekha.messages import kind_of
from sekha.pricing import Usage
from sekha.providers.base import openai_usage
from sekha.registry import TASKS, Task
from sekha.tokens import decoded

__all__ = [
    "MOST_DIMENSIONS",
    "MOST_REPLIES",
    "ChatAsked",
    "answer_headers",
    "chat_asked",
    "chat_reply",
    "chat_request",
    "embed_asked",
    "embed_reply",
    "embed_request",
    "sekha_note",
    "shows",
    "tags_of",
    "with_note",
]

_OURS = frozenset(
    {"model", "messages", "task", "require_vision", "max_cost", "preferred_model", "stream", "store", "metadata"}
)
_RARE = _OURS - {"model", "messages", "stream"} | {"n"}
"""What few requests have, and what is looked at only in those."""
_EMBEDDING_OURS = frozenset({"model", "input", "max_cost", "store", "metadata", "task"})
_MOST_INPUTS = 2048
"""OpenAI's own limit on the texts of one request."""
MOST_REPLIES = 128
"""OpenAI's own limit on `n`. Every reply takes memory, here and at a provider that sets no limit."""
MOST_DIMENSIONS = 65_536
"""Of a vector, as in sekha.yaml."""


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """A chat as it came over the wire: the request, and how the caller wants the answer."""

    request: ChatRequest
    stream: bool
    keep: bool
    """False when the caller said `store: false`: nothing of it is to be remembered."""

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer is to end with its usage."""
        options = self.request.options.get("stream_options") or {}
        return options.get("include_usage") is True


def chat_asked(body: bytes, *, by: Pass = EVERYBODY) -> ChatAsked:
    """Read `POST /v1/chat/completions`. Raises `InvalidRequest` with the field that is wrong."""
    given = object_in(body)
    request = chat_request(given, by=by)
    return ChatAsked(request, flag(given, "stream", default=False), flag(given, "store", default=True))


def chat_request(given: Mapping[str, Any], *, by: Pass = EVERYBODY) -> ChatRequest:
    """The request that a chat's JSON object makes."""
    messages = given.get("messages")
    if type(messages) is not list:
        raise InvalidRequest(
            "`messages` is missing: send a list of messages."
            if messages is None
            else f"`messages` must be a list, not {kind_of(messages)}.",
            field="messages",
        )
    options = {name: value for name, value in given.items() if name not in _OURS}
    return ChatRequest(
        messages=tuple(messages),
        model=name_in(given, "model"),
        options=options,
        key=by.key,
        allowed=by.allowed,
        **({} if _RARE.isdisjoint(given) else _rare(given, options)),
    )


def _rare(given: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The fields that few requests have."""
    metadata = given.get("metadata")
    if (store := given.get("store")) is not None:
        # OpenAI's own `store` too, which takes `metadata` with it; without it, `metadata` is an error there.
        options["store"] = store
        if store is True and metadata is not None:
            options["metadata"] = metadata
    whole(options, "n", 1, MOST_REPLIES)
    return {
        "task": _task(given),
        "preferred_model": name_in(given, "preferred_model"),
        "require_vision": flag(given, "require_vision", default=False),
        "max_cost": dollars(given, "max_cost"),
        "tags": tags_of(metadata),
    }


def embed_asked(body: bytes, *, by: Pass = EVERYBODY) -> tuple[EmbedRequest, bool]:
    """Read `POST /v1/embeddings`: the request, and whether it may be remembered."""
    given = object_in(body)
    return embed_request(given, by=by), flag(given, "store", default=True)


def embed_request(given: Mapping[str, Any], *, by: Pass = EVERYBODY) -> EmbedRequest:
    """The request that the JSON object for an embedding makes."""
    model = name_in(given, "model")
    options = {name: value for name, value in given.items() if name not in _EMBEDDING_OURS}
    encoding = options.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise InvalidRequest("`encoding_format` must be `float` or `base64`.", field="encoding_format")
    whole(options, "dimensions", 1, MOST_DIMENSIONS)
    task = name_in(given, "task")
    if task is not None and task not in TASKS:
        raise UnknownModel(task, TASKS, kind="task")
    if task not in (None, "embedding"):
        raise InvalidRequest(f"No model embeds with the task {task!r}: leave it out, or say 'embedding'.", field="task")
    return EmbedRequest(
        texts=_texts(given.get("input"), model),
        model=model,
        max_cost=dollars(given, "max_cost"),
        tags=tags_of(given.get("metadata")),
        key=by.key,
        allowed=by.allowed,
        options=options,
    )


def chat_reply(reply: Reply, run_id: str) -> bytes:
    """The provider's own answer, with ours beside it under `sekha`."""
    note = sekha_note(reply, run_id, reply.total_cost)
    shown = shows(reply.body.get("usage"), reply.usage)
    if reply.raw is not None and (shown or "usage" not in reply.body):
        return with_note(reply.raw, note, b"" if shown else _written(reply.usage))
    body = dict(reply.body)
    if not shown:
        # In place of what was no usage, `null` or of another shape, or half of one.
        body["usage"] = openai_usage(reply.usage)
    try:
        return orjson.dumps(body | {"sekha": note})
    except orjson.JSONEncodeError:
        # Nested more deeply than can be written. It is paid for, and of two of one name readers take the last.
        if reply.raw is None:
            raise
        return with_note(reply.raw, note, _written(reply.usage))


def _written(usage: Usage) -> bytes:
    return b',"usage":' + orjson.dumps(openai_usage(usage))


def shows(reported: object, usage: Usage) -> bool:
    """Whether a provider's own report says in whole numbers what was charged, its total at least, and so may stand."""
    if not isinstance(reported, dict) or usage.counted:
        return False
    went_in, came_out = reported.get("prompt_tokens"), reported.get("completion_tokens")
    if type(went_in) is not int or type(came_out) is not int or not went_in:
        return False
    charged = usage.input_tokens + usage.output_tokens
    return charged == went_in + came_out or charged == reported.get("total_tokens")


def embed_reply(embedded: RawEmbedded, run_id: str) -> tuple[bytes, Headers]:
    """The provider's own vectors, with ours beside them, and the reply's headers."""
    note, more = sekha_note(embedded, run_id, embedded.total_cost), b',"dimension":%d' % embedded.dimension
    raw = _with_counted_usage(embedded) if embedded.usage.counted else embedded.raw
    said = with_note(raw, note, more)
    return said, answer_headers(embedded.provider_id, embedded.model_id, embedded.total_cost)


def _with_counted_usage(embedded: RawEmbedded) -> bytes:
    """The vectors with what was counted, in place of what was no usage: `null`, zeros, or nothing at all."""
    raw, tokens = embedded.raw.rstrip(), embedded.usage.input_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    written = b'"usage":' + orjson.dumps(usage)
    if b'"usage"' not in raw:
        return b"%b,%b}" % (raw[:-1], written)
    # What was written here ends with it, and need not be read for that.
    if raw.endswith(written + b"}"):
        return raw
    try:
        return orjson.dumps(orjson.loads(raw) | {"usage": usage})
    except orjson.JSONDecodeError:
        # Vectors are handed on as they came, and not every number of a provider's is one.
        return raw


def answer_headers(provider_id: str, model_id: str, cost: Decimal) -> Headers:
    return [
        (b"content-type", b"application/json"),
        (b"x-sekha-provider", provider_id.encode()),
        (b"x-sekha-model", model_id.encode()),
        (b"x-sekha-cost", money(cost)),
    ]


def sekha_note(outcome: Any, run_id: str, cost: Decimal) -> dict[str, object]:
    """What the reply carries under `sekha`: who answered, what all of it cost, and its run in Prefect."""
    attempts: Sequence[Attempt] = outcome.attempts
    note: dict[str, object] = {
        "provider_id": outcome.provider_id,
        "model_id": outcome.model_id,
        "estimated_cost": float(outcome.estimated_cost),
        "cost": float(cost),
        "attempts": len(attempts),
        "run_id": run_id,
    }
    if outcome.usage.counted:
        note["usage"] = "counted"
    return note


def with_note(raw: bytes, note: Mapping[str, object], more: bytes = b"") -> bytes:
    """Splice our part into the provider's object, which was parsed before and ends with its brace."""
    end = raw.rstrip()
    return b"".join((end[:-1], more, b',"sekha":', orjson.dumps(note), b"}"))


def tags_of(metadata: object) -> frozenset[str]:
    """The tags that `metadata` gives: `{"team": "search"}` is `team:search`, by which costs are reported."""
    if metadata is None:
        return frozenset()
    if not isinstance(metadata, Mapping) or len(metadata) > 16:
        raise InvalidRequest("`metadata` must be an object with 16 entries at the most.", field="metadata")
    for name, value in metadata.items():
        if not isinstance(value, str) or len(name) > 64 or len(value) > 512:
            raise InvalidRequest(
                f"`metadata.{name[:64]}` must be a text of 512 characters at the most, under a name of 64.",
                field="metadata",
            )
    return frozenset(f"{name}:{value}" for name, value in metadata.items())


def _texts(given: object, model: str | None) -> tuple[str, ...]:
    """One text, texts, the tokens of one text, or tokens of texts: all that OpenAI takes."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not given:
        raise InvalidRequest("`input` must be a text, or a list of texts or tokens.", field="input")
    if len(given) > _MOST_INPUTS and not isinstance(given[0], int):
        raise InvalidRequest(f"`input` has {len(given):,} texts; {_MOST_INPUTS:,} is the most.", field="input")
    if all(isinstance(each, str) for each in given):
        return tuple(cast("list[str]", given))
    if all(type(each) is int for each in given):
        return (decoded(cast("list[int]", given), model or ""),)
    if all(isinstance(each, list) and all(type(token) is int for token in each) for each in given):
        return tuple(decoded(each, model or "") for each in given)
    raise InvalidRequest("`input` must hold texts only, or tokens only.", field="input")


def _task(given: Mapping[str, Any]) -> Task | None:
    task = name_in(given, "task")
    if task == "embedding":
        raise InvalidRequest("No model chats with the task 'embedding': send texts to /v1/embeddings.", field="task")
    if task is None or task in TASKS:
        return task
    raise UnknownModel(task, TASKS, kind="task")
