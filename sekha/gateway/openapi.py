"""What the gateway takes and gives, as OpenAPI 3.1. Written by hand; a test holds it to the routes and to the answers.

A request's schema says what is enforced here. Fields that are only handed on to the provider are named, and
left to the provider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sekha.gateway.health import sekha_version
from sekha.gateway.pages import GROUPS
from sekha.gateway.searches import OPERATORS
from sekha.gateway.wire import MOST_DIMENSIONS, MOST_REPLIES
from sekha.registry import TASKS

__all__ = ["CODES", "document"]

Json: TypeAlias = dict[str, Any]

CODES: Mapping[int, tuple[str, ...]] = {
    400: (
        *("field_unsupported", "invalid_request", "model_not_capable", "context_length_exceeded", "document_refused"),
        *("price_unknown", "provider_rejected", "content_refused", "context_exceeded"),
    ),
    401: ("invalid_api_key",),
    402: ("cost_refused", "budget_exceeded"),
    403: ("key_not_allowed", "operators_only"),
    404: ("model_not_found", "collection_missing", "not_found"),
    408: ("request_timeout",),
    413: ("request_too_large", "too_many_tokens"),
    429: ("rate_limit_exceeded", "rate_limited", "limits_reached"),
    500: (
        *("config_invalid", "space_mismatch", "store_error", "collection_conflict", "vector_refused"),
        *("ledger_error", "error"),
    ),
    502: (
        "provider_error",
        "provider_auth_failed",
        "provider_model_not_found",
        "provider_bad_reply",
        "dimension_mismatch",
    ),
    503: (
        *("no_candidate", "provider_unavailable", "stream_broken", "circuit_open", "provider_not_loaded"),
        *("store_unavailable", "ledger_unavailable"),
    ),
    504: ("provider_timeout",),
}
"""Under which codes a request fails with each status."""
_SAYS: Mapping[int, str] = {
    400: "The request is wrong: `param` names the field.",
    401: "The key is missing, or nobody's.",
    402: "It would cost more than the request, the file or a budget allows.",
    403: "The key may not use this model or task, or is no operator's.",
    404: "There is no such model or collection.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests or tokens. `Retry-After` says when to try again.",
    500: "It failed here, and trying again will not help.",
    502: "The provider failed, and so did those behind it.",
    503: "Nobody can answer just now.",
    504: "The provider did not answer in time.",
}
_OF_CALLS = (400, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 504)
_OF_QUESTIONS = (400, 401, 403, 404, 408, 413, 429, 500, 503)


def document() -> Json:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sekha",
            "version": sekha_version(),
            "summary": "One place through which a team's programs reach every LLM provider.",
            "description": (
                "OpenAI's API for every provider, and what an operator asks of a gateway. Where `keys:` are "
                "configured, send one as `Authorization: Bearer …`. Every error has the shape of OpenAI's, with "
                "a `code` of ours. Every reply has an `x-request-id`, which is the caller's own where one was sent."
            ),
        },
        "tags": [
            {"name": "models", "description": "Chats, embeddings and the models behind them."},
            {"name": "search", "description": "What is stored."},
            {"name": "operation", "description": "Routes, costs, health and metrics."},
        ],
        "security": [{"key": []}, {}],
        "paths": _PATHS,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key that `sekha keys create` made."}
            },
        },
    }


# --- how it is put together ----------------------------------------------------------------


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Json, **limits: int) -> Json:
    return {"type": "array", "items": items, **limits}


def _object(properties: Mapping[str, Json], *, optional: Sequence[str] = (), **more: Any) -> Json:
    """An object of which all but the optional properties are there."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), **({"required": required} if required else {}), **more}


def _says(schema: Json, description: str) -> Json:
    return schema | {"description": description}


def _answer(
    says: str, schema: Json, *, kind: str = "application/json", headers: Mapping[str, Json] | None = None
) -> Json:
    shown = {"x-request-id": _header("The request's id."), **(headers or {})}
    return {"description": says, "headers": shown, "content": {kind: {"schema": schema}}}


def _header(says: str) -> Json:
    return {"description": says, "schema": {"type": "string"}}


def _failures(statuses: Sequence[int]) -> Json:
    return {
        str(status): _answer(f"{_SAYS[status]} `code`: {', '.join(CODES[status])}.", _ref("Error"))
        for status in statuses
    }


def _operation(
    name: str,
    summary: str,
    says: str,
    *,
    tag: str,
    answers: Mapping[int, Json],
    fails: Sequence[int] = (),
    body: str | None = None,
    example: Json | None = None,
    parameters: Sequence[Json] = (),
    public: bool = False,
) -> Json:
    operation: Json = {"operationId": name, "summary": summary, "description": says, "tags": [tag]}
    if public:
        operation["security"] = []
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        content = {"schema": _ref(body)} | ({"example": example} if example else {})
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    operation["responses"] = _failures(fails) | {str(status): answer for status, answer in answers.items()}
    return operation


# --- schemas -------------------------------------------------------------------------------

_TEXT: Json = {"type": "string"}
_NAME: Json = {"type": "string", "maxLength": 256}
_COUNT: Json = {"type": "integer", "minimum": 0}
_RANK: Json = {"type": "integer", "minimum": 1}
_DOLLARS: Json = {"type": "number", "minimum": 0}
_SECONDS: Json = {"type": "number", "minimum": 0}
_FLAG: Json = {"type": "boolean"}
_ANY: Json = {}
_STATUS: Json = {"enum": ["healthy", "degraded", "unhealthy", "unknown"]}
_FILLED: Json = {"type": "string", "pattern": r"\S"}
_AT_LEAST_ONE = _or_null({"type": "integer", "minimum": 1})

_DIMENSION = _or_null({"type": "integer", "minimum": 1, "maximum": MOST_DIMENSIONS})
_MODEL = _says(_or_null(_NAME), "A model, `provider/model`, a task's name, `auto`, or nothing for the default.")
_TASK = _says({"enum": [*TASKS, None]}, "Choose among the models for this task.")
_MAX_COST = _says(
    {
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": 1_000_000_000},
            {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,30})?$"},
            {"type": "null"},
        ]
    },
    "US dollars that it may cost at the most.",
)
_METADATA = _says(
    _or_null(
        {
            "type": "object",
            "maxProperties": 16,
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {"type": "string", "maxLength": 512},
        }
    ),
    'By which costs are reported: `{"team": "search"}` is the tag `team:search`.',
)
_STORE = _says(_or_null(_FLAG), "`false` leaves it out of what is remembered.")
_SCALAR: Json = {"type": ["string", "number", "boolean", "null"]}
_MESSAGE = _object(
    {
        "role": _says(_TEXT, "`system`, `developer`, `user`, `assistant` or `tool`."),
        "content": _says(
            {"anyOf": [_TEXT, _list(_ref("ContentPart")), {"type": "null"}]}, "Text, or parts of text and images."
        ),
    },
    optional=("content",),
)
_HANDED_ON = {
    name: _says(_ANY, "Handed on to the provider as it is.")
    for name in (
        "temperature",
        "top_p",
        "stop",
        "seed",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "logprobs",
        "top_logprobs",
        "frequency_penalty",
        "presence_penalty",
        "user",
    )
}
_SHAPED: dict[str, Json] = {
    "tools": _says(_or_null(_list({"type": "object"})), "What the model may call."),
    "modalities": _says(_or_null(_list(_ANY)), "Handed on to the provider."),
}
_LENGTHS: dict[str, Json] = {
    "n": _says(
        _or_null({"type": "integer", "minimum": 1, "maximum": MOST_REPLIES}), "How many replies; each is paid for."
    ),
    "max_tokens": _says(_AT_LEAST_ONE, "Tokens of the longest reply."),
    "max_completion_tokens": _says(_AT_LEAST_ONE, "The newer name of `max_tokens`."),
}
_CHAT = {
    "model": _MODEL,
    "messages": _list(_ref("Message"), minItems=1),
    "task": _says(
        {"enum": [*(task for task in TASKS if task != "embedding"), None]}, "Choose among the models for this task."
    ),
    "preferred_model": _says(_or_null(_NAME), "Asked first; others of its task stand behind it."),
    "require_vision": _says(_or_null(_FLAG), "Ask only models that see."),
    "max_cost": _MAX_COST,
    "metadata": _METADATA,
    "store": _STORE,
    "stream": _says(_or_null(_FLAG), "Answer with server-sent events, as it comes."),
    "stream_options": _says(_ANY, '`{"include_usage": true}` ends the stream with its usage.'),
    **_LENGTHS,
    **_SHAPED,
    **_HANDED_ON,
}
_INPUT: Json = {
    "anyOf": [
        _FILLED,
        _list(_FILLED, minItems=1, maxItems=2048),
        _says(_list(_COUNT, minItems=1), "The tokens of one text."),
        _says(_list(_list(_COUNT, minItems=1), minItems=1, maxItems=2048), "The tokens of texts."),
    ]
}
_USAGE = _object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}, optional=("completion_tokens",)
)
_CANDIDATE = _object(
    {
        "provider_id": _TEXT,
        "provider_type": _TEXT,
        "model_id": _TEXT,
        "place": _says(_or_null({"type": "integer", "minimum": 1}), "1 is asked first; null when it is not asked."),
        "rule": _says(
            {"enum": ["capability", "price", "context", "cost", "budget", "circuit", "rate", "fallback", None]},
            "The rule that dropped it.",
        ),
        "reason": _says(_TEXT, "Why it stands at its place, or what the rule says of it."),
        "price": _or_null(
            _object(
                {
                    "estimated_cost": _DOLLARS,
                    "worst_case_cost": _DOLLARS,
                    "compared_cost": _says(
                        _DOLLARS, "By which it is ordered: expected, but with a reply as long as anybody's."
                    ),
                    "input_tokens": _COUNT,
                    "output_tokens": _COUNT,
                    "reply_length": _says(_TEXT, "What the expected length of the reply was taken from."),
                }
            )
        ),
        "circuit": {"enum": ["closed", "open", "half_open"]},
        "budgets": _says(
            {"type": "object", "additionalProperties": {"type": "number"}},
            "Dollars left in each budget that a call to it counts against.",
        ),
        "capability": _object(
            {
                "tasks": _list(_TEXT),
                "context_window": _or_null(_COUNT),
                "vision": _FLAG,
                "audio": _says(_or_null(_FLAG), "Null where nobody says."),
                "function_calling": _says(_or_null(_FLAG), "Null where nobody says."),
            }
        ),
        "priority": {"type": "integer"},
        "weight": _COUNT,
        "throttled_seconds": _says(
            _or_null(_SECONDS), "Until its provider's limits let it pass, and a 429 is over; null for never."
        ),
        "latency_seconds": _says(_or_null(_SECONDS), "That its answers take of late."),
    }
)
_LOOKED = {"status": _STATUS, "latency_ms": _or_null(_SECONDS), "detail": _or_null(_TEXT)}

_SCHEMAS: dict[str, Json] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _says(_TEXT, "What happened, and what to do about it."),
                    "type": _TEXT,
                    "param": _says(_or_null(_TEXT), "The field that is wrong."),
                    "code": _says(
                        {"enum": sorted({code for codes in CODES.values() for code in codes})}, "Never changes."
                    ),
                }
            ),
            "sekha": _ref("Charged"),
        },
        optional=("sekha",),
    ),
    "Charged": _says(
        _object(
            {
                "provider_id": _says(_TEXT, "Of whom was asked last."),
                "model_id": _TEXT,
                "cost": _says(_DOLLARS, "What failed and may be billed all the same."),
                "run_id": _says({"type": "string", "format": "uuid"}, "The flow run in Prefect, where it is recorded."),
            }
        ),
        "Beside an error, once a provider was asked.",
    ),
    "Message": _MESSAGE,
    "ContentPart": _object(
        {
            "type": _says(_TEXT, "`text` or `image_url`; others are handed on, but for `input_image`."),
            "text": _TEXT,
            "image_url": _object(
                {
                    "url": _says(_TEXT, "An address that the provider fetches, or `data:` with base64."),
                    "detail": {"enum": ["low", "high", "auto", None]},
                },
                optional=("detail",),
            ),
        },
        optional=("text", "image_url"),
    ),
    "ChatRequest": _object(_CHAT, optional=[name for name in _CHAT if name != "messages"]),
    "ChatCompletion": _object(
        {
            "id": _TEXT,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list({"type": "object"}, minItems=1),
            "usage": _USAGE,
            "sekha": _ref("Note"),
        },
        optional=("usage",),
    ),
    "EmbeddingRequest": _object(
        {
            "input": _INPUT,
            "model": _MODEL,
            "encoding_format": {"enum": ["float", "base64", None]},
            "dimensions": _DIMENSION,
            "task": {"enum": ["embedding", None]},
            "max_cost": _MAX_COST,
            "metadata": _METADATA,
            "store": _STORE,
            "user": _HANDED_ON["user"],
        },
        optional=("model", "task", "encoding_format", "dimensions", "max_cost", "metadata", "store", "user"),
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list({"type": "number"}), _says(_TEXT, "base64 of float32")]},
                    }
                )
            ),
            "model": _TEXT,
            "usage": _USAGE,
            "dimension": {"type": "integer", "minimum": 1},
            "sekha": _ref("Note"),
        },
        optional=("usage",),
    ),
    "Note": _says(
        _object(
            {
                "provider_id": _TEXT,
                "model_id": _TEXT,
                "estimated_cost": _DOLLARS,
                "cost": _says(_DOLLARS, "All that the request was charged, for attempts that failed too."),
                "attempts": _says(_COUNT, "Calls to providers until it was answered."),
                "run_id": _says({"type": "string", "format": "uuid"}, "The flow run in Prefect, where it is recorded."),
                "usage": _says({"const": "counted"}, "When the provider reported none, and it was counted here."),
            },
            optional=("usage",),
        ),
        "Who answered, and for how much.",
    ),
    "Model": _object(
        {
            "model_id": _TEXT,
            "provider_id": _TEXT,
            "task": {"enum": list(TASKS)},
            "context_window": _or_null(_COUNT),
            "dimension": _or_null(_COUNT),
            "supports_vision": _FLAG,
            "supports_audio": _says(_or_null(_FLAG), "Null where nobody says."),
            "supports_function_calling": _says(_or_null(_FLAG), "Null where nobody says."),
        },
        optional=("task",),
    ),
    "OpenAIModel": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _says(_TEXT, "Its provider, or `sekha` of `auto` and of a task."),
            "sekha": _ref("Model"),
        },
        optional=("sekha",),
    ),
    "RouteRequest": _object(
        {
            "task": _TASK,
            "model": _MODEL,
            "preferred_model": _CHAT["preferred_model"],
            "require_vision": _CHAT["require_vision"],
            "max_cost": _MAX_COST,
            "context_size": _says(
                _or_null({"type": "integer", "minimum": 1, "maximum": 100_000_000}),
                "Tokens that go in, where there are no messages to count.",
            ),
            "messages": _or_null(_CHAT["messages"]),
            "input": _says(_or_null(_INPUT), "What is to be embedded, where there are no messages."),
            "metadata": _METADATA,
            **_LENGTHS,
        },
        optional=(
            *("task", "model", "preferred_model", "require_vision", "max_cost", "context_size", "messages", "input"),
            *("metadata", *_LENGTHS),
        ),
    ),
    "Route": _object(
        {
            "provider_id": _TEXT,
            "provider_type": _TEXT,
            "model_id": _TEXT,
            "estimated_cost": _DOLLARS,
            "worst_case_cost": _DOLLARS,
            "reason": _TEXT,
            "candidates": _list(_ref("Candidate"), minItems=1),
        }
    ),
    "NoRoute": {"allOf": [_ref("Error"), _object({"candidates": _list(_ref("Candidate"))}, optional=("candidates",))]},
    "Candidate": _CANDIDATE,
    "SearchRequest": _object(
        {
            "query": _FILLED,
            "collection": _says(
                _or_null({"type": "string", "pattern": "^([A-Za-z][_0-9A-Za-z]{0,200})?$"}),
                "Left out: the one that remembers, where `memory:` is configured, or else `documents`.",
            ),
            "dimension": _says(_DIMENSION, "Of the spaces to search; left out, all that the collection has."),
            "limit": _or_null({"type": "integer", "minimum": 1, "maximum": 10_000}),
            "where": _or_null(_ref("Filter")),
            "min_similarity": _says(
                _or_null({"type": "number", "minimum": -1, "maximum": 1}),
                "Below it nothing is returned. Each model has its own scale of similarity.",
            ),
            "hybrid": _says(_or_null(_FLAG), "Whether the question's words are looked for too, by BM25."),
            "explain": _says(_or_null(_FLAG), "Whether each result says by which ranks it came where it is."),
            "max_cost": _MAX_COST,
            "metadata": _METADATA,
        },
        optional=(
            "collection",
            "dimension",
            "limit",
            "where",
            "min_similarity",
            "hybrid",
            "explain",
            "max_cost",
            "metadata",
        ),
        additionalProperties=False,
    ),
    "Filter": _says(
        {
            "anyOf": [
                _object(
                    {
                        "property": {"type": "string", "minLength": 1},
                        "operator": {"enum": [each for each in OPERATORS if each != "in"]},
                        "value": _SCALAR,
                    },
                    additionalProperties=False,
                ),
                _object(
                    {
                        "property": {"type": "string", "minLength": 1},
                        "operator": {"const": "in"},
                        "value": _list(_SCALAR),
                    },
                    additionalProperties=False,
                ),
                _object({"all": _list(_ref("Filter"))}, additionalProperties=False),
                _object({"any": _list(_ref("Filter"))}, additionalProperties=False),
                _object({"not": _ref("Filter")}, additionalProperties=False),
            ]
        },
        "A comparison, or `all`, `any` and `not` of others: 256 of them, 16 levels deep, at the most.",
    ),
    "Found": _object(
        {
            "collection": _TEXT,
            "results": _list(
                _object(
                    {
                        "uuid": {"type": "string", "format": "uuid"},
                        "content": _TEXT,
                        "score": _says(
                            {"type": "number", "minimum": -1.001, "maximum": 1.001},
                            "By which results are ordered: the similarity, or a reciprocal of ranks"
                            " across spaces and with words.",
                        ),
                        "similarity": _says(
                            _or_null({"type": "number", "minimum": -1.001, "maximum": 1.001}),
                            "Cosine similarity in its own space; null for what only its words found.",
                        ),
                        "space": _says(_TEXT, "The index that it was found in."),
                        "dimension": {"type": "integer", "minimum": 1},
                        "properties": {"type": "object", "additionalProperties": _SCALAR},
                        "ranks": _object(
                            {
                                "rank": _says(_RANK, "Among the results of its own space."),
                                "of": _says(_COUNT, "Records in that space; 0 where nobody had to know."),
                                "by_vector": _or_null(_RANK),
                                "by_words": _or_null(_RANK),
                            }
                        ),
                    },
                    optional=("ranks",),
                )
            ),
            "sekha": {
                "allOf": [
                    _ref("Note"),
                    _object(
                        {
                            "spaces": _list(
                                _object(
                                    {
                                        "space": _TEXT,
                                        "dimension": _RANK,
                                        "size": _says(_COUNT, "Records it may find; 0 where nobody had to know."),
                                        "seconds": {"type": "number", "minimum": 0},
                                        "provider_id": _TEXT,
                                        "model_id": _TEXT,
                                        "cost": _DOLLARS,
                                    }
                                )
                            ),
                            "left_out": _says(
                                _list(_object({"space": _TEXT, "why": _TEXT})),
                                "Spaces that could not be asked, so that what only they have was not found.",
                            ),
                        }
                    ),
                ]
            },
        }
    ),
    "Sums": _object(
        {
            "calls": _COUNT,
            "cost": _DOLLARS,
            "estimated": _DOLLARS,
            "input_tokens": _COUNT,
            "output_tokens": _COUNT,
        }
    ),
    "Costs": _object(
        {
            "by": {"enum": list(GROUPS)},
            "since": _or_null({"type": "string", "format": "date-time"}),
            "costs": _list({"allOf": [_object({"group": _TEXT}), _ref("Sums")]}),
            "total": _ref("Sums"),
        }
    ),
    "Circuit": _object(
        {
            "state": {"enum": ["closed", "open", "half_open"]},
            "failure_count": _COUNT,
            "success_count": _COUNT,
            "last_failure": _or_null({"type": "string", "format": "date-time"}),
            "last_error": _or_null(_TEXT),
        }
    ),
    "Health": _object(
        {
            "status": _STATUS,
            "version": _TEXT,
            "uptime_seconds": _SECONDS,
            "totals": _object({"providers": _COUNT, "healthy": _COUNT, "models": _COUNT, "requests_under_way": _COUNT}),
            "store": _object({**_LOOKED, "kind": _TEXT}),
            "ledger": _object(_LOOKED),
            "recorder": _object(
                {"sink": _TEXT, "waits_for": _TEXT, "queued_bytes": _COUNT, "published": _COUNT, "dropped": _COUNT}
            ),
        },
        optional=("uptime_seconds", "totals", "store", "ledger", "recorder"),
    ),
    "ProvidersHealth": _object(
        {
            "totals": _object({"providers": _COUNT, "healthy": _COUNT}),
            "providers": _list(
                _object(
                    {
                        "provider_id": _TEXT,
                        "provider_type": _TEXT,
                        **_LOOKED,
                        "circuit_breaker": _says(_ref("Circuit"), "Of its models' the least closed."),
                        "circuits": _says(
                            {"type": "object", "additionalProperties": _ref("Circuit")},
                            "Of each model that had a failure.",
                        ),
                        "paused_seconds": _says(
                            {"type": "object", "additionalProperties": _SECONDS},
                            "Of each model that a 429 has us leave alone: for how long still.",
                        ),
                        "models_count": _COUNT,
                    }
                )
            ),
        },
        optional=("providers",),
    ),
}

# --- paths ---------------------------------------------------------------------------------

_WHO_ANSWERED = {
    "x-sekha-provider": _header("Who answered."),
    "x-sekha-model": _header("With which model."),
    "x-sekha-cost": _header("For how many US dollars. Of a stream, that is in its last event."),
}
_SAY_HELLO: Json = {"messages": [{"role": "user", "content": "Hello"}], "max_cost": 0.01}
_CHAT_ANSWER: Json = _answer("The answer.", _ref("ChatCompletion"), headers=_WHO_ANSWERED)
_CHAT_ANSWER["content"]["text/event-stream"] = {
    "schema": _says(
        _ANY,
        "With `stream: true`: OpenAI's chunks, and `[DONE]`. A stream that breaks ends with an error instead.",
    )
}
_COSTS_PARAMETERS: tuple[Json, ...] = (
    {
        "name": "by",
        "in": "query",
        "description": "What each line is for.",
        "schema": {"enum": list(GROUPS), "default": "provider"},
    },
    {
        "name": "since",
        "in": "query",
        "description": "A day or a time, in UTC where it does not say; or how long ago: `24h`, `7d`, `2w`.",
        "schema": {
            "anyOf": [{"type": "string", "format": "date"}, {"type": "string", "pattern": r"^[0-9]{1,4}[hdw]$"}]
        },
    },
)
_MODEL_PARAMETER: Json = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "A model, or `provider/model`, with its slashes.",
    "schema": {"type": "string", "minLength": 1},
}

_PATHS: dict[str, Json] = {
    "/v1/chat/completions": {
        "post": _operation(
            "chat",
            "Answer a chat",
            "OpenAI's chat completions, by whichever model is to answer. When one fails before its first word, the "
            "next is asked. Fields that are not named here are handed on to the provider.",
            tag="models",
            body="ChatRequest",
            example=_SAY_HELLO,
            answers={200: _CHAT_ANSWER},
            fails=_OF_CALLS,
        )
    },
    "/v1/embeddings": {
        "post": _operation(
            "embed",
            "Embed texts",
            "OpenAI's embeddings. The reply also has the vectors' `dimension`.",
            tag="models",
            body="EmbeddingRequest",
            example={"input": "test"},
            answers={
                200: _answer("The vectors, in the order of the texts.", _ref("Embeddings"), headers=_WHO_ANSWERED)
            },
            fails=_OF_CALLS,
        )
    },
    "/v1/models": {
        "get": _operation(
            "list_models",
            "List the models, as OpenAI does",
            "All that the key may ask for: each by its own name, and by its provider's and its own, then `auto` and "
            "tasks.",
            tag="models",
            answers={200: _answer("Them.", _object({"object": {"const": "list"}, "data": _list(_ref("OpenAIModel"))}))},
            fails=(401,),
        )
    },
    "/v1/models/{model}": {
        "get": _operation(
            "retrieve_model",
            "Show one model, as OpenAI does",
            "By its own name, or by its provider's and its own; `auto` and tasks too.",
            tag="models",
            parameters=(_MODEL_PARAMETER,),
            answers={200: _answer("It.", _ref("OpenAIModel"))},
            fails=(401, 403, 404),
        )
    },
    "/api/v1/models": {
        "get": _operation(
            "models",
            "List the models by task",
            "Those that the key may use; one with several tasks is listed once for each.",
            tag="models",
            answers={200: _answer("Them.", _object({"models": _list(_ref("Model"))}))},
            fails=(401,),
        )
    },
    "/api/v1/tasks": {
        "get": _operation(
            "tasks",
            "List the tasks",
            "A task's name may stand wherever a model's does.",
            tag="models",
            answers={200: _answer("Their names.", _object({"tasks": _list({"enum": list(TASKS)})}))},
            fails=(401,),
        )
    },
    "/api/v1/search": {
        "post": _operation(
            "search",
            "Search a collection",
            "The question is embedded once for each of the collection's spaces, and what they find is merged by rank.",
            tag="search",
            body="SearchRequest",
            example={"query": "How do I renew?", "limit": 5},
            answers={200: _answer("What was found.", _ref("Found"))},
            fails=_OF_CALLS,
        )
    },
    "/api/v1/route": {
        "post": _operation(
            "route",
            "Explain who would answer",
            "Every candidate with its price, circuit, budgets and capability, and the rule that kept or dropped it. "
            "Calls nobody. Takes the body of a chat or of an embedding as it is: with `messages` it is a chat's, and "
            "without them, with `input` or the task `embedding`, an embedding's.",
            tag="operation",
            body="RouteRequest",
            example={"task": "chat_small", "context_size": 2000, "max_cost": 0.05},
            answers={
                200: _answer("Who would be asked first, and all candidates.", _ref("Route")),
                503: _answer("Nobody would be asked. `error.code` and the candidates say why.", _ref("NoRoute")),
            },
            fails=_OF_QUESTIONS,
        )
    },
    "/api/v1/costs": {
        "get": _operation(
            "costs",
            "Report what was spent",
            "By group, the dearest first, with what had been estimated. Where the file marks keys as operators', for "
            "those alone.",
            tag="operation",
            parameters=_COSTS_PARAMETERS,
            answers={200: _answer("The report.", _ref("Costs"))},
            fails=(400, 401, 403, 500, 503),
        )
    },
    "/api/v1/health": {
        "get": _operation(
            "health",
            "Say how the gateway is",
            "Looked at every ten seconds at the most. Where keys are configured, whoever sends none is told the "
            "status and the version alone.",
            tag="operation",
            answers={
                200: _answer("It answers, though something may be amiss.", _ref("Health")),
                503: _answer("No call can be made.", _ref("Health")),
            },
            fails=(401,),
        )
    },
    "/api/v1/health/providers": {
        "get": _operation(
            "providers_health",
            "Say how each provider is",
            "By a probe, which asks for its list of models, and by the circuits of its models. Where keys are "
            "configured, whoever sends none is told the totals alone; where some are operators', so are the others.",
            tag="operation",
            answers={200: _answer("Each provider.", _ref("ProvidersHealth"))},
            fails=(401,),
        )
    },
    "/health": {
        "get": _operation(
            "health_short",
            "Where health is",
            "Redirects there.",
            tag="operation",
            public=True,
            answers={307: {"description": "To `/api/v1/health`.", "headers": {"location": _header("The address.")}}},
        )
    },
    "/health/live": {
        "get": _operation(
            "live",
            "Say that the process is up",
            "For whoever restarts what hangs. Nothing is looked at.",
            tag="operation",
            public=True,
            answers={200: _answer("It is.", _object({"status": {"const": "alive"}}))},
        )
    },
    "/health/ready": {
        "get": _operation(
            "ready",
            "Say whether to send requests here",
            "For load balancers: requests can be admitted, since the ledger answers.",
            tag="operation",
            public=True,
            answers={
                200: _answer("Yes.", _object({"status": {"const": "ready"}})),
                503: _answer("Not now.", _object({"status": {"const": "not_ready"}})),
            },
        )
    },
    "/metrics": {
        "get": _operation(
            "metrics",
            "Count for Prometheus",
            "Of all worker processes together. Where the file marks keys as operators', for those alone.",
            tag="operation",
            answers={200: _answer("Prometheus's text format.", _TEXT, kind="text/plain")},
            fails=(401, 403),
        )
    },
    "/openapi.json": {
        "get": _operation(
            "openapi",
            "Describe all this to programs",
            "OpenAPI 3.1.",
            tag="operation",
            public=True,
            answers={200: _answer("The description.", {"type": "object"})},
        )
    },
    "/docs": {
        "get": _operation(
            "docs",
            "Describe all this to people",
            "One page that loads nothing else.",
            tag="operation",
            public=True,
            answers={200: _answer("The page.", _TEXT, kind="text/html")},
        )
    },
}
