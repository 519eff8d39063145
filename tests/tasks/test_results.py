"""A flow's result is JSON that any program reads, and that Python reads back as what it was."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from sekha.calling import Attempt
from sekha.errors import BudgetExceeded, ConfigError, IngestIncomplete, NoCandidate, Problem, RateLimited, SekhaError
from sekha.ingest import Failure, IngestReport
from tasks.results import RESULT

REPORT = IngestReport(
    collection="documents",
    space="Documents_768",
    documents=2,
    chunks=3,
    embedded=1,
    cost=Decimal("0.10"),
    failures=(Failure(source="a.md", chunks=1, error="no."), Failure(source="b.md", chunks=1, error="no.")),
)


def limited() -> RateLimited:
    error = RateLimited(provider_id="away", model_id="m", status=429, retry_after_seconds=2.0)
    error.attempts = (Attempt(provider_id="away", model_id="m", seconds=0.5, error="rate_limited"),)
    return error


ERRORS = [
    limited(),
    IngestIncomplete(REPORT),
    NoCandidate("'chat'", [("away/m", "its circuit is open")], retryable=True),
    ConfigError("sekha.yaml", [Problem("providers[0].id", "is missing", 3)]),
    BudgetExceeded(
        "all", limit=Decimal(1), remaining=Decimal("0.30"), needed=Decimal(2), period="day", resets="00:00 UTC"
    ),
]


def test_a_report_is_read_back_equal_and_is_plain_json() -> None:
    kept = RESULT.dumps(REPORT)

    assert RESULT.loads(kept) == REPORT
    assert json.loads(kept)["value"]["cost"] == "0.10"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_read_back_with_all_that_it_carries(error: SekhaError) -> None:
    kept = RESULT.dumps(error)
    back = RESULT.loads(kept)

    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert back.retryable == error.retryable
    assert json.loads(kept)["code"] == error.code


def test_a_foreign_value_is_kept_as_prefect_keeps_it() -> None:
    assert RESULT.loads(RESULT.dumps({"amounts": [Decimal("1.20")]})) == {"amounts": [Decimal("1.20")]}
    assert repr(RESULT.loads(RESULT.dumps(ValueError("no")))) == "ValueError('no')"
