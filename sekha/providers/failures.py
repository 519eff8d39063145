"""What a failed call to a provider means: from whatever was raised to one `ProviderError`.

LiteLLM's exceptions carry statuses that it made up (500 for a lost connection, 408 for its own
timeout), so the provider's real answer is looked for first, in the chain of causes below them. Only
where there is none does the exception's class decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import orjson

from sekha.errors import (
    BadReply,
    ContentRefused,
    ContextExceeded,
    FieldUnsupported,
    ModelNotFound,
    ProviderAuthFailed,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    StreamBroken,
)

__all__ = [
    "BY_CLASS",
    "Wordless",
    "clean",
    "failure_of",
    "refusal_of",
    "refuses_max_tokens",
    "retry_after_seconds",
    "stands_for",
    "texts_of",
    "wordless",
]

BY_CLASS: Mapping[str, type[ProviderError]] = {
    # LiteLLM's own, every one.
    "APIConnectionError": ProviderUnavailable,
    "APIError": ProviderUnavailable,
    "APIResponseValidationError": BadReply,
    "AuthenticationError": ProviderAuthFailed,
    "BadGatewayError": ProviderUnavailable,
    "BadRequestError": ProviderRejected,
    "BlockedPiiEntityError": ContentRefused,
    "BudgetExceededError": ProviderError,
    "ContentPolicyViolationError": ContentRefused,
    "ContextWindowExceededError": ContextExceeded,
    "GuardrailRaisedException": ContentRefused,
    "ImageFetchError": ProviderRejected,
    "InternalServerError": ProviderUnavailable,
    "InvalidRequestError": ProviderRejected,
    "JSONSchemaValidationError": BadReply,
    "LiteLLMUnknownProvider": ModelNotFound,
    "MidStreamFallbackError": ProviderUnavailable,  # also before anything was said
    "MockException": ProviderError,
    "ModelNotMappedError": ModelNotFound,
    "ModifyResponseException": BadReply,
    "NotFoundError": ModelNotFound,
    "OpenAIError": ProviderError,
    "PaymentRequiredError": ProviderError,
    "PermissionDeniedError": ProviderAuthFailed,
    "RateLimitError": RateLimited,
    "RejectedRequestError": ContentRefused,
    "SensitiveDataRouteException": ContentRefused,
    "ServiceUnavailableError": ProviderUnavailable,
    "Timeout": ProviderTimeout,
    "UnprocessableEntityError": ProviderRejected,
    "UnsupportedParamsError": FieldUnsupported,
    "VectorStoreSearchError": ProviderRejected,
    # From below it: httpx, openai, aiohttp, asyncio, and the parsing of replies.
    "APITimeoutError": ProviderTimeout,
    "TimeoutException": ProviderTimeout,
    "TimeoutError": ProviderTimeout,
    "TransportError": ProviderUnavailable,
    "ClientError": ProviderUnavailable,
    "OSError": ProviderUnavailable,
    "ImportError": ProviderError,
    "JSONDecodeError": BadReply,
    "ValidationError": BadReply,
    "LookupError": BadReply,
    "AttributeError": BadReply,
    "TypeError": BadReply,
}
_BY_STATUS: Mapping[int, type[ProviderError]] = {
    401: ProviderAuthFailed,
    402: ProviderError,
    403: ProviderAuthFailed,
    404: ModelNotFound,
    408: ProviderUnavailable,
    409: ProviderUnavailable,
    410: ModelNotFound,
    425: ProviderUnavailable,
    429: RateLimited,
}
_REQUESTS_FAULT = (400, 413, 414, 415, 422, 431, 451)
_STANDS_FOR: Mapping[str, int] = {
    "bad_request": 400,
    "bad_request_error": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
    "context_length_exceeded": 400,
    "data_inspection_failed": 400,
    "invalid_prompt": 400,
    "invalid_request": 400,
    "invalid_request_error": 400,
    "responsibleaipolicyviolation": 400,
    "string_above_max_length": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "invalid_authentication": 401,
    "billing_error": 402,
    "permission_denied": 403,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found": 404,
    "not_found_error": 404,
    "request_too_large": 413,
    "insufficient_quota": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "api_error": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "server_error": 500,
    "engine_overloaded": 503,
    "overloaded": 503,
    "overloaded_error": 503,
    "service_unavailable": 503,
    "service_unavailable_error": 503,
    "timeout_error": 504,
}
"""Codes and types of errors as OpenAI, Anthropic, Azure, Alibaba and those who speak like them name them."""
_BY_NAME = {name.replace("_", ""): status for name, status in _STANDS_FOR.items()}
"""The same without underscores, since some write `BadRequestError` where others write `bad_request_error`."""
# What only the words tell. Providers use one status for many causes, and LiteLLM knows some of the words.
_OUT_OF_MONEY: Mapping[int, tuple[str, ...]] = {
    400: ("credit balance is too low",),  # Anthropic
    403: ("credit balance is too low", "insufficient credits"),
    429: ("credit balance is too low", "insufficient credits", "exceeded your current quota"),
}
_NO_QUOTA = "insufficient_quota"
_CONTENT = (
    "content_policy",
    "content_filter",
    "content filtering",
    "content management policy",
    "safety system",
    "requires moderation",
    "was flagged",
    "responsible ai policy",
    "data_inspection_failed",
    "datainspectionfailed",
)
_CONTEXT = (
    "context_length",
    "context length",
    "context window",
    "prompt is too long",
    "maximum context",
    "input is too long",
    "too many tokens",
)
_NO_ERROR = object()
_NO_CONTENT = (204, 205)
_TRANSLATES = (
    ("messages", "messages_pt"),
    ("messages", "openai_messages"),
    ("messages", "completion_messages"),
    ("messages", "extract_images"),
    ("messages", "extract_reasoning"),
    ("messages", "content_list"),
    ("messages", "system_message"),
    ("messages", "tool_result"),
    ("messages", "tool_invoke"),
    ("tool_choice", "tool_choice"),
    ("response_format", "response_format"),
    ("response_format", "output_format"),
    ("response_format", "json_schema"),
    ("stop", "stop_seq"),
    ("reasoning_effort", "reasoning"),
    ("tools", "tool"),
    ("tools", "mcp"),
)
"""What the functions of LiteLLM that translate a field have in their names. The first that fits is taken."""
_CONNECTS = (
    "validate_environment",
    "complete_url",
    "azure_url",
    "base_url",
    "api_base",
    "api_key",
    "api_params",
    "token_and_url",
    "access_token",
    "ad_token",
    "credential",
    "auth",
    "aws_region",
    "request_headers",
)
"""What the functions of LiteLLM that find a provider's address and key have in their names."""
_SETTINGS = (
    ("`base_url`", re.compile(r"api[ _]?base|base[ _]url|endpoint", re.IGNORECASE)),
    ("`api_key`", re.compile(r"key|credential|token", re.IGNORECASE)),
)
_VARIABLE = re.compile(r"(?<![\w{])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")
# A line of Ollama's stream without a message is its failure; LiteLLM makes a 400 of it.
_UNEXPECTED = re.compile(r"Got unexpected response from Ollama: (.*)")
_NO_JSON = ("empty or invalid response", "unable to get json response")
_FIELD = re.compile(r"[\w.\[\]-]{1,100}")
_HOST = re.compile(r"[a-z0-9_.-]{1,100}")
_LONGEST_SECONDS = 3600.0
"""Whoever asks for more is tried again after an hour all the same: a slip must not shut a model out for good."""
_DETAIL_CHARACTERS = 200
_ECHO_CHARACTERS = 24


def failure_of(
    error: Exception,
    *,
    provider_id: str,
    model_id: str,
    secret: str | None = None,
    texts: Sequence[str] = (),
    streaming: bool = False,
    sent: bool = True,
) -> ProviderError:
    """Say what an exception means. `streaming` once something of the answer has been handed on.

    With `sent` false the provider heard nothing of it, so it cost nothing. What then failed is mostly the translation
    of the request, which says nothing of the provider, and which another protocol may not need; or else LiteLLM was
    not told where the provider is or by which key, whatever is asked.

    What was said never holds the secret. It may hold any part of the request, and so is in `said` alone.
    """
    chain = list(_chain(error))
    if not sent and _lacks_configuration(chain):
        words = _own_sentence(error)
        return ProviderError(
            _lacking(words), said=clean(words, secret, texts), provider_id=provider_id, model_id=model_id
        )
    if not sent and (untranslated := _untranslated(chain)) is not None:
        return _untranslatable(untranslated, provider_id, model_id)
    response = next((found for link in chain if (found := _answered(link)) is not None), None)
    body = b"" if response is None else _content(response, chain)
    status = None if response is None else int(response.status_code)
    kind = _kind_unanswered(chain) if status is None else _kind_answered(error, status, body, texts)
    if streaming and not issubclass(kind, ProviderTimeout):
        kind = StreamBroken
    detail, words, failed = "", "", False
    if response is not None:
        detail, words = _elsewhere(status or 0, response.headers, secret, texts), _said(body)
    elif (unexpected := _UNEXPECTED.search(str(error))) is not None:
        detail, words = "it is not the JSON of its API", unexpected[1]
        failed = words.startswith("{'error'") and not streaming
    elif (reason := _reason(chain, kind)) is not None:
        detail = reason
    else:
        words = _said_within(chain[-1]) or _own_sentence(error)
    failure = kind(
        detail,
        said=clean(words, secret, texts),
        provider_id=provider_id,
        model_id=model_id,
        status=status,
        retry_after_seconds=None if response is None else retry_after_seconds(response.headers),
    )
    if failed or not sent:
        failure.may_be_billed = False  # it says so in place of the answer, or knows nothing of the request
    return failure


def refusal_of(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    provider_id: str,
    model_id: str,
    secret: str | None = None,
    texts: Sequence[str] = (),
) -> ProviderError:
    """Say what a provider's answer means that is not the one asked for. Names of `headers` are in lower case."""
    failure = _kind_answered(None, status, body, texts)(
        _elsewhere(status, headers, secret, texts),
        said=clean(_said(body), secret, texts),
        provider_id=provider_id,
        model_id=model_id,
        status=status,
        retry_after_seconds=retry_after_seconds(headers),
    )
    if isinstance(failure, ProviderRejected):
        failure.field = _field_in(body, secret)
    if status in _NO_CONTENT:
        failure.may_be_billed = False  # there is nothing that anybody could charge for
    return failure


def stands_for(error: object) -> int | None:
    """The status that an error stands for which a provider tells in an answer of 200; None where it says none.

    Its code tells more than its type, which is one for most of what a request may have wrong.
    """
    if not isinstance(error, Mapping):
        return None
    for named in (error.get("code"), error.get("type")):
        status: object = named
        if isinstance(named, str):
            said = re.fullmatch(r"[45]\d\d", named, re.ASCII)
            status = int(named) if said else _BY_NAME.get(named.lower().replace("_", ""))
        if isinstance(status, int) and 400 <= status < 600:
            return status
    return None


def refuses_max_tokens(body: bytes) -> bool:
    """Whether a provider refused a limit by the name of `max_tokens`, as the newer models of OpenAI's do."""
    words = body.lower()
    return (
        b"max_completion_tokens" in words
        and (b"not supported" in words or b"unsupported" in words)
        and b"max_tokens" in words
    )


def texts_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a chat, which no message of ours may repeat."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        parts = [{"text": content}] if isinstance(content, str) else content or ()
        texts += [str(part["text"]) for part in parts if isinstance(part, Mapping) and part.get("text")]
    return texts


class Wordless(Exception):
    """An exception of somebody else, by its name: what it says may hold the key or the prompt."""


def wordless(error: Exception) -> Wordless:
    """The exception and its causes with their tracebacks and without their words.

    Whoever logs our error logs what it was raised from as well, and Prefect keeps that in its database.
    """
    cause: Wordless | None = None
    for link in reversed(list(_chain(error))):
        named = Wordless(f"{type(link).__module__}.{type(link).__qualname__}").with_traceback(link.__traceback__)
        named.__cause__ = cause
        cause = named
        # An answer keeps the error that ended it, and the frames of its traceback keep the answer.
        link.__traceback__ = None
    return cause or Wordless()


def retry_after_seconds(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """`Retry-After` in seconds, whether it is written as seconds or as a date; None without one, and for nonsense.

    An hour at the most, for callers are told what the provider is then left alone for.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
        seconds = float(value)
    else:
        try:
            at = parsedate_to_datetime(value)
            # Without a zone, or with -0000, it comes back naive; HTTP's dates are all UTC.
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
            seconds = (at - (now or datetime.now(UTC))).total_seconds()
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), _LONGEST_SECONDS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _answered(link: BaseException) -> Any:
    """The provider's HTTP answer, where this exception is one that stands for it.

    LiteLLM's own exceptions hold responses that it made up; httpx's and OpenAI's are real.
    """
    real = type(link).__name__ == "HTTPStatusError" or type(link).__module__.startswith("openai")
    return getattr(link, "response", None) if real else None


def _content(response: Any, chain: Sequence[BaseException]) -> bytes:
    try:
        return bytes(response.content)
    except Exception as error:
        # A streamed answer may be closed unread; LiteLLM then keeps its text beside it.
        if type(error).__name__ != "ResponseNotRead":
            raise
        texts = (getattr(link, "text", None) or getattr(link, "message", None) for link in chain)
        return next((str(text).encode() for text in texts if text), b"")


def _kind_answered(error: Exception | None, status: int, body: bytes, texts: Sequence[str]) -> type[ProviderError]:
    if _is_out_of_money(status, body, texts):
        return ProviderError
    words = body.decode(errors="replace").lower()
    if status in (400, 403, 413, 422):
        for phrases, kind in ((_CONTENT, ContentRefused), (_CONTEXT, ContextExceeded)):
            if any(phrase in words for phrase in phrases):
                return kind
        known = None if error is None else _known(error)
        if known in (ContentRefused, ContextExceeded):
            return known
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return ProviderUnavailable
    if status in _REQUESTS_FAULT:
        return ProviderRejected
    # Anything else says of an address or of the provider's state that it is wrong, now and a moment later: a redirect
    # as well, which nobody worked on.
    return BadReply if 200 <= status < 300 else ProviderError


def _is_out_of_money(status: int, body: bytes, texts: Sequence[str]) -> bool:
    """Whether our account is empty, by the provider's own word: a message may quote what was asked."""
    if status not in _OUT_OF_MONEY:
        return False
    error = _error_of(body)
    if isinstance(error, dict) and _NO_QUOTA in (error.get("code"), error.get("type")):
        return True
    words = _said(body).lower()
    said = [phrase for phrase in _OUT_OF_MONEY[status] if phrase in words]
    return any(all(phrase not in text.lower() for text in texts) for phrase in said)


def _kind_unanswered(chain: Sequence[BaseException]) -> type[ProviderError]:
    said = str(chain[0])
    if _UNEXPECTED.search(said) or any(phrase in said.lower() for phrase in _NO_JSON):
        return BadReply
    top = _known(chain[0]) or ProviderError
    if top in (ProviderError, ProviderUnavailable, StreamBroken):
        # LiteLLM says one of these for anything it did not foresee; what lies below knows better.
        below = {_known(link) for link in chain[1:]}
        for decisive in (ProviderTimeout, ProviderUnavailable, BadReply):
            if decisive in below:
                return decisive
    return top


def _lacks_configuration(chain: Sequence[BaseException]) -> bool:
    """Whether LiteLLM misses what it needs to reach a provider.

    Told by where it was raised, since what it says may quote the request. Some of these functions look into that too,
    and stumble over it, but do not complain of it.
    """
    last = chain[-1]
    if isinstance(last, AttributeError | LookupError | OSError | TypeError):
        return False
    *_, raised_in = "", *_functions(last.__traceback__)
    if any(part in raised_in for part in _CONNECTS):
        return True
    # OpenAI's own client says so itself.
    return any("openai_client" in name for link in chain for name in _functions(link.__traceback__))


def _lacking(words: str) -> str:
    """What is missing, in our words: names alone, so that no address and no key is among them."""
    settings = [name for name, pattern in _SETTINGS if pattern.search(words)]
    variables = list(dict.fromkeys(_VARIABLE.findall(words)))[:4]
    missing = f", for lack of {' or '.join([*settings, *variables])}" if settings or variables else ""
    return f"LiteLLM cannot reach it as it is set up in sekha.yaml{missing}"


def _untranslated(chain: Sequence[BaseException]) -> Collection[str] | None:
    """The functions in which the translation of a request failed; None where it was not that."""
    if isinstance(chain[-1], ImportError | OSError | TimeoutError):
        return None
    if _kind_unanswered(chain) not in (BadReply, ProviderRejected, ProviderUnavailable, ProviderError):
        return None
    functions = {name for link in chain for name in _functions(link.__traceback__)}
    # A model whose name LiteLLM cannot place is a mistake in our configuration.
    return None if "get_llm_provider" in functions else functions


def _functions(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next


def _untranslatable(functions: Collection[str], provider_id: str, model_id: str) -> FieldUnsupported:
    field = next((field for field, part in _TRANSLATES if any(part in name for name in functions)), None)
    of_it = f"the `{field}` of this request" if field else "this request as it stands"
    # What LiteLLM's exception says is about its own code.
    error = FieldUnsupported(f"its protocol cannot carry {of_it}", provider_id=provider_id, model_id=model_id)
    error.field = field
    return error


def _known(link: BaseException) -> type[ProviderError] | None:
    return next((BY_CLASS[base.__name__] for base in type(link).__mro__ if base.__name__ in BY_CLASS), None)


def _elsewhere(status: int, headers: Mapping[str, str], secret: str | None, texts: Sequence[str]) -> str:
    """What a redirect means, in our words; nothing of any other answer. Of its address only the host is shown."""
    if not 300 <= status < 400 or (location := headers.get("location")) is None:
        return ""
    try:
        parts = urlsplit(location)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if parts.scheme in ("http", "https") and _HOST.fullmatch(host):
        address = clean(f"{parts.scheme}://{host}{f':{port}' if port else ''}", secret, texts)
        return f"it redirects to {address}, and `base_url` should name the address that it points to"
    return "it redirects, and `base_url` should name the address that it points to"


def _said(body: bytes) -> str:
    """The provider's sentence from its error body, in any of the shapes there are."""
    error = _error_of(body)
    if error is _NO_ERROR:
        text = re.sub(r"<[^>]*>", " ", body.decode(errors="replace"))
        return " ".join(text.split())
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("type") or ""
    return " ".join(str(error).split())


def _field_in(body: bytes, secret: str | None) -> str | None:
    error = _error_of(body)
    field = error.get("param") if isinstance(error, dict) else None
    return clean(field, secret, ()) if isinstance(field, str) and _FIELD.fullmatch(field) else None


def _error_of(body: bytes) -> object:
    """What an error body holds under `error`, or all of it; `_NO_ERROR` where it is no JSON."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _NO_ERROR
    return parsed.get("error", parsed) if isinstance(parsed, dict) else parsed


def _reason(chain: Sequence[BaseException], kind: type[ProviderError]) -> str | None:
    """Why there was no answer, in our words; None where only the provider's or LiteLLM's own tell."""
    if issubclass(kind, ProviderTimeout):
        return ""
    if issubclass(kind, BadReply):
        return "it is not the JSON of its API"
    if issubclass(kind, ProviderUnavailable):
        within = _said_within(chain[-1]) is not None
        return None if within else f"the connection failed ({type(chain[-1]).__name__})"
    return None


def _own_sentence(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    # Of a field that it refuses it goes on to say how to have it dropped, which nobody here can.
    first_line = re.split(r"[.,;]?\s+(?:To drop|If you want to)\b", first_line)[0]
    return re.sub(r"^(?:litellm\.)?(?:\w+(?:Error|Exception)\s*[:-]\s*)+", "", first_line)


def _said_within(last: BaseException) -> str | None:
    """What a provider said went wrong after its answer had begun, of which LiteLLM keeps no more than the sentence."""
    within = any(base.__name__ == "BaseLLMException" for base in type(last).__mro__)
    said = getattr(last, "message", None) if within else None
    return " ".join(said.split()) if isinstance(said, str) and said.strip() else None


def clean(detail: str, secret: str | None, texts: Sequence[str]) -> str:
    """A provider's sentence without the key and the texts of the request, and not too long."""
    if secret:
        detail = detail.replace(secret, "***")
    # Providers quote a wrong key with its middle starred out.
    detail = re.sub(r"\b(?:sk|key|or|ant)-[\w*.-]{6,}|\S*\*{4,}\S*", "***", detail)
    for text in texts:
        # Never shorter than a word or two, or "a" would blank the sentence.
        start = text.strip()[:_ECHO_CHARACTERS]
        if len(start) >= 8 and (at := detail.find(start)) >= 0:
            detail = detail[:at] + "…"
    return detail if len(detail) <= _DETAIL_CHARACTERS else detail[: _DETAIL_CHARACTERS - 1] + "…"
