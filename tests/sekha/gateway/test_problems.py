"""Errors as HTTP says them: every one has a status, a shape and a code, and none a secret."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import orjson
import pytest

from sekha import errors
from sekha.calling import Attempt
from sekha.errors import (
    BodyTooLarge,
    BudgetExceeded,
    CostRefused,
    KeyLimited,
    LedgerUnavailable,
    NoCandidate,
    NoSuchPage,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    SekhaError,
    StreamBroken,
    Unauthenticated,
)
from sekha.gateway.problems import answer_to, problem, status_of

STATUS = {
    "SekhaError": 500,
    "ConfigError": 500,
    "ConfigMissing": 500,
    "SpaceMismatch": 500,
    "RequestRefused": 400,
    "InvalidRequest": 400,
    "UnknownModel": 404,
    "NoCandidate": 503,
    "NotCapable": 400,
    "NotPriced": 400,
    "PromptTooLong": 400,
    "LimitsReached": 429,
    "CostRefused": 402,
    "BudgetExceeded": 402,
    "DocumentRefused": 400,
    "Unauthenticated": 401,
    "KeyNotAllowed": 403,
    "OperatorsOnly": 403,
    "KeyLimited": 429,
    "BodyTooLarge": 413,
    "TooManyTokens": 413,
    "BodyTooSlow": 408,
    "NoSuchPage": 404,
    "ProviderError": 502,
    "ProviderUnavailable": 503,
    "ProviderTimeout": 504,
    "StreamBroken": 503,
    "CircuitOpen": 503,
    "NotLoaded": 503,
    "RateLimited": 429,
    "ProviderAuthFailed": 502,
    "ModelNotFound": 502,
    "BadReply": 502,
    "DimensionMismatch": 502,
    "ProviderRejected": 400,
    "ContentRefused": 400,
    "ContextExceeded": 400,
    "FieldUnsupported": 400,
    "StoreError": 500,
    "CollectionMissing": 404,
    "CollectionConflict": 500,
    "VectorRefused": 500,
    "AliasMoved": 500,
    "StoreNotEmpty": 500,
    "StoreInUse": 500,
    "BackupMissing": 500,
    "BackupBroken": 500,
    "StoreUnavailable": 503,
    "LedgerError": 500,
    "LedgerUnavailable": 503,
    "RecordError": 500,
    "PrefectUnavailable": 503,
    "IngestIncomplete": 503,
}


def _tree(root: type[SekhaError] = SekhaError) -> Iterator[type[SekhaError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from _tree(kind)


def _example(kind: type[SekhaError]) -> SekhaError:
    """An error of this kind, filled in by its signature."""
    values: dict[str, Any] = {
        "problems": [],
        "reasons": [("first/chat", "its circuit is open")],
        "known": ["chat"],
        "allowed": [],
        "refused": [("a.bin", "it is binary")],
        "limit": Decimal("0.1"),
        "cost": Decimal("0.2"),
        "remaining": Decimal("0.01"),
        "needed": Decimal("0.2"),
        "retry_after_seconds": 1.5,
        "seconds": 30.0,
        "limit_mb": 64.0,
        "declared": 8,
        "returned": 5,
        "given": True,
    }
    if kind is errors.IngestIncomplete:
        return kind.__new__(kind)
    if kind is errors.PromptTooLong:
        values |= {"needs": 9, "takes": 8}
    if kind is KeyLimited:
        values["limit"] = "60 requests a minute"
    if kind.__init__ is Exception.__init__:
        return kind("It failed.")
    named: dict[str, Any] = {}
    positional: list[Any] = []
    for each in inspect.signature(kind).parameters.values():
        if each.default is each.empty and each.kind is each.KEYWORD_ONLY:
            named[each.name] = values.get(each.name, "x")
        elif each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD:
            positional.append(values.get(each.name, "x"))
    return kind(*positional, **named)


def test_every_error_has_a_status_that_somebody_chose() -> None:
    assert {kind.__name__: status_of(_example(kind)) for kind in _tree()} == STATUS


@pytest.mark.parametrize("kind", list(_tree()), ids=lambda kind: kind.__name__)
def test_every_error_has_openais_shape(kind: type[SekhaError]) -> None:
    status, body, headers = answer_to(_example(kind))
    said = orjson.loads(body)["error"]

    assert {"message", "type", "param", "code"} <= said.keys()
    assert said["code"] == kind.code
    assert said["type"]
    assert (b"content-type", b"application/json") in headers
    assert (b"x-should-retry", b"true" if _example(kind).retryable else b"false") in headers
    assert 400 <= status < 600


def test_codes_are_told_apart() -> None:
    codes = [kind.code for kind in _tree() if "code" in kind.__dict__]

    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("error", "seconds", "milliseconds"),
    [
        (RateLimited(provider_id="first", retry_after_seconds=1.2), b"2", b"1200"),
        (RateLimited(provider_id="first", retry_after_seconds=0), b"0", b"0"),
        (KeyLimited("research", "60 requests a minute", retry_after_seconds=0.25), b"1", b"250"),
        (LedgerUnavailable("money at host", "it has not answered for 8 s"), b"1", b"1000"),
        (ProviderUnavailable(provider_id="first", retry_after_seconds=30), b"30", b"30000"),
    ],
)
def test_when_to_try_again_is_rounded_up(error: SekhaError, seconds: bytes, milliseconds: bytes) -> None:
    headers = dict(answer_to(error)[2])

    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (seconds, milliseconds)


def test_who_said_nothing_about_when_is_not_quoted() -> None:
    headers = dict(answer_to(RateLimited(provider_id="first"))[2])

    assert not headers.keys() & {b"retry-after", b"retry-after-ms"}


def test_what_is_known_besides_is_said_in_fields() -> None:
    refused = problem(CostRefused(limit=Decimal(1), limit_name="max_cost", cheapest="first/chat", cost=Decimal(2)))
    spent = problem(
        BudgetExceeded(
            "all", limit=Decimal(9), remaining=Decimal(1), needed=Decimal(2), period="day", resets="2026-11-24T00:00Z"
        )
    )
    nobody = problem(NoCandidate("a chat", [("first/chat", "its circuit is open")], retryable=True))
    failed = StreamBroken(provider_id="first", model_id="chat")
    failed.attempts = (Attempt(provider_id="first", model_id="chat", seconds=0.123456, error="stream_broken"),)

    assert _said(refused)["cheapest"] == {
        "model": "first/chat",
        "estimated_cost": 2.0,
        "within_limit": False,
    }
    assert (_said(spent)["budget"], _said(spent)["resets"]) == ("all", "2026-11-24T00:00Z")
    assert _said(nobody)["reasons"] == [{"model": "first/chat", "why": "its circuit is open"}]
    assert _said(problem(failed))["attempts"] == [
        {"provider_id": "first", "model_id": "chat", "seconds": 0.1235, "error": "stream_broken"}
    ]


def test_headers_say_what_http_asks_for() -> None:
    assert dict(answer_to(Unauthenticated(given=False))[2])[b"www-authenticate"] == b"Bearer"
    assert dict(answer_to(NoSuchPage("GET", "/v1/embeddings", allowed=["POST"]))[2])[b"allow"] == b"POST"
    assert status_of(NoSuchPage("GET", "/v1/embeddings", allowed=["POST"])) == 405
    assert orjson.loads(answer_to(BodyTooLarge(64))[1])["error"]["type"] == "invalid_request_error"


class _Foreign(ProviderError):
    """One that nobody has heard of here."""

    code = "foreign"


def test_an_error_of_ones_own_is_answered_as_its_nearest_relative() -> None:
    assert status_of(_Foreign(provider_id="mine")) == 502


def _said(problem: dict[str, object]) -> dict[str, Any]:
    said = problem["error"]
    assert isinstance(said, dict)
    return said
