"""An error as HTTP says it: status, OpenAI's shape with our code, and when to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Protocol

import orjson

from sekha.errors import (
    BodyTooLarge,
    BodyTooSlow,
    BudgetExceeded,
    CollectionMissing,
    CostRefused,
    KeyLimited,
    KeyNotAllowed,
    LimitsReached,
    NoCandidate,
    NoSuchPage,
    NotCapable,
    NotPriced,
    OperatorsOnly,
    PromptTooLong,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    RequestRefused,
    SekhaError,
    TooManyTokens,
    Unauthenticated,
    UnknownModel,
)

__all__ = ["Headers", "answer_to", "money", "problem", "status_of"]

Headers = list[tuple[bytes, bytes]]


class Charged(Protocol):
    """A request that got no answer, as far as its caller is told what it cost."""

    @property
    def cost(self) -> Decimal | None: ...
    def charged(self) -> dict[str, object]: ...


# The nearest class in an error's ancestry decides, so that the mapping is total over the tree.
_STATUS: Mapping[type[SekhaError], int] = {
    SekhaError: 500,
    RequestRefused: 400,
    Unauthenticated: 401,
    KeyNotAllowed: 403,
    OperatorsOnly: 403,
    KeyLimited: 429,
    UnknownModel: 404,
    CollectionMissing: 404,
    NoSuchPage: 404,
    BodyTooLarge: 413,
    TooManyTokens: 413,
    BodyTooSlow: 408,
    CostRefused: 402,
    BudgetExceeded: 402,
    NoCandidate: 503,
    NotCapable: 400,
    NotPriced: 400,
    PromptTooLong: 400,
    LimitsReached: 429,
    ProviderError: 502,
    ProviderUnavailable: 503,
    ProviderTimeout: 504,
    RateLimited: 429,
    ProviderRejected: 400,
}
_KINDS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


def money(amount: Decimal) -> bytes:
    """Dollars for a header: plain digits, no exponent."""
    return f"{amount.normalize():f}".encode()


def status_of(error: SekhaError) -> int:
    """The HTTP status that tells a caller whose move it is."""
    if isinstance(error, NoSuchPage) and error.allowed:
        return 405
    for kind in type(error).__mro__:
        if (status := _STATUS.get(kind)) is not None:
            # What comes back by itself is no fault of the request's.
            return 503 if status == 500 and error.retryable else status
    return 500


def problem(error: SekhaError) -> dict[str, object]:
    """The error in OpenAI's shape, `{"error": {message, type, param, code}}`, with what else is known."""
    said: dict[str, object] = {
        "message": error.told,
        "type": _KINDS.get(status_of(error), "server_error"),
        "param": getattr(error, "field", None),
        "code": error.code,
    }
    match error:
        case CostRefused():
            said["cheapest"] = {
                "model": error.cheapest,
                "estimated_cost": float(error.cost),
                "within_limit": error.fits,
            }
            said["limit"] = float(error.limit)
        case BudgetExceeded():
            said["budget"] = error.budget
            said["remaining"] = float(error.remaining)
            said["resets"] = error.resets
        case NoCandidate():
            said["reasons"] = [{"model": model, "why": why} for model, why in error.reasons]
            said["more_reasons"] = error.more
        case ProviderError():
            said["provider_id"] = error.provider_id
            said["model_id"] = error.model_id
            said["attempts"] = [
                {
                    "provider_id": attempt.provider_id,
                    "model_id": attempt.model_id,
                    "seconds": round(attempt.seconds, 4),
                    "error": attempt.error,
                }
                for attempt in error.attempts
            ]
        case _:
            pass
    return {"error": said}


def answer_to(error: SekhaError, charged: Charged | None = None) -> tuple[int, bytes, Headers]:
    """Status, body and headers of the reply that an error becomes, and what was charged all the same."""
    headers: Headers = [
        (b"content-type", b"application/json"),
        # OpenAI's SDKs try again by themselves on many statuses; this tells them what is worth it.
        (b"x-should-retry", b"true" if error.retryable else b"false"),
    ]
    seconds = getattr(error, "retry_after_seconds", None)
    if seconds is not None:
        headers.append((b"retry-after", str(max(math.ceil(seconds), 0)).encode()))
        headers.append((b"retry-after-ms", str(max(math.ceil(seconds * 1000), 0)).encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, NoSuchPage) and error.allowed:
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    said = problem(error)
    if charged is not None and charged.cost is not None:
        said["sekha"] = charged.charged()
        headers.append((b"x-sekha-cost", money(charged.cost)))
    return status_of(error), orjson.dumps(said), headers
