import inspect
import math
import traceback
from datetime import UTC, datetime

import httpx
import openai
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sekha.errors import (
    ContextExceeded,
    FieldUnsupported,
    ProviderError,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnavailable,
    RateLimited,
    StreamBroken,
)
from sekha.gateway.problems import answer_to
from sekha.providers.failures import BY_CLASS, failure_of, refusal_of, retry_after_seconds, wordless
from sekha.providers.litellm import litellm_module

REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")


def answered(status: int, body: object, **headers: str) -> httpx.HTTPStatusError:
    response = httpx.Response(status, json=body, headers=headers, request=REQUEST)
    return httpx.HTTPStatusError("no", request=REQUEST, response=response)


def meaning(error: Exception, **more: object) -> ProviderError:
    return failure_of(error, provider_id="one", model_id="m", **more)  # type: ignore[arg-type]


def test_every_exception_of_litellm_is_mapped() -> None:
    exceptions = litellm_module().exceptions

    theirs = [
        name
        for name, found in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(found, Exception) and found.__module__ == "litellm.exceptions"
    ]

    assert len(theirs) > 20
    assert [name for name in theirs if name not in BY_CLASS] == []


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        httpx.ReadTimeout("slow", request=REQUEST),
        httpx.ConnectTimeout("slow", request=REQUEST),
        openai.APITimeoutError(REQUEST),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_librarys_timeout_is_one(error: Exception) -> None:
    assert type(meaning(error)) is ProviderTimeout


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused", request=REQUEST),
        openai.APIConnectionError(request=REQUEST),
        ConnectionResetError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_connection_is_an_outage(error: Exception) -> None:
    assert type(meaning(error)) is ProviderUnavailable


def test_once_a_piece_is_out_a_failure_breaks_the_stream() -> None:
    assert type(meaning(httpx.ReadError("cut", request=REQUEST), streaming=True)) is StreamBroken
    assert type(meaning(httpx.ReadTimeout("slow", request=REQUEST), streaming=True)) is ProviderTimeout


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
        {"error": {"message": "Your credit balance is too low to access the API."}},
    ],
)
@pytest.mark.parametrize("status", [400, 429])
def test_an_empty_account_is_neither_retried_nor_the_callers_fault(status: int, body: object) -> None:
    error = meaning(answered(status, body))

    assert type(error) is ProviderError
    assert not error.retryable
    assert error.falls_back


@pytest.mark.parametrize(
    ("statuses", "retryable", "falls_back"),
    [
        ((408, 409, 425, 500, 503), True, True),
        ((405, 407, 410, 421, 423, 424), False, True),
        ((400, 413, 414, 415, 422, 431), False, False),
    ],
)
def test_a_status_says_who_is_at_fault_and_whether_it_is_worth_another_try(
    statuses: tuple[int, ...], retryable: bool, falls_back: bool
) -> None:
    for status in statuses:
        error = meaning(answered(status, {"error": {"message": "No."}}))

        assert (error.retryable, error.falls_back) == (retryable, falls_back), status
        assert error.health == ("failing" if falls_back else "alive"), status
        assert not error.may_be_billed, status


@pytest.mark.parametrize(
    ("status", "said", "prompt"),
    [
        (400, "You said: insufficient credits. Invalid value for temperature", "Hello"),
        (400, "Invalid value: 'my credit balance is too low'", "Why do they say my CREDIT BALANCE is too low?"),
        (422, "Invalid value: 'Your credit balance is too low'", "Hello"),
    ],
)
def test_a_refusal_that_quotes_the_request_says_nothing_of_our_account(status: int, said: str, prompt: str) -> None:
    body = {"error": {"message": said, "type": "invalid_request_error", "input": "insufficient_quota"}}

    error = meaning(answered(status, body), texts=[prompt])

    assert type(error) is ProviderRejected


def test_the_providers_status_counts_and_not_the_one_litellm_made_up() -> None:
    wrapper = litellm_module().exceptions.InternalServerError("no", llm_provider="openai", model="m")
    wrapper.__context__ = answered(429, {"error": {"message": "Slow down."}}, **{"Retry-After": "2.5"})

    error = meaning(wrapper)

    assert type(error) is RateLimited
    assert (error.status, error.retry_after_seconds, error.said) == (429, 2.5, "Slow down.")


def test_without_an_answer_litellms_own_class_decides() -> None:
    unsupported = litellm_module().exceptions.UnsupportedParamsError(
        "O-series models don't support temperature=0.2. To drop it, set `litellm.drop_params=True`.",
        llm_provider="openai",
        model="m",
    )

    error = meaning(unsupported)

    assert type(error) is FieldUnsupported
    assert error.status is None
    assert error.said == "O-series models don't support temperature=0.2"


def test_a_key_never_shows() -> None:
    said = "Incorrect API key provided: sk-abcd***wxyz. You sent my-own-secret-key and sk-proj-0123456789."

    error = meaning(answered(401, {"error": {"message": said}}), secret="my-own-secret-key")

    for piece in ("my-own-secret-key", "abcd", "wxyz", "0123456789"):
        assert piece not in error.told
    assert "Incorrect API key provided" in error.said


@pytest.mark.parametrize(
    ("param", "field"), [("my-own-secret-key", "***"), ("messages[0].content", "messages[0].content")]
)
def test_the_field_that_a_provider_names_is_never_its_key(param: str, field: str) -> None:
    body = orjson.dumps({"error": {"message": "no", "param": param}})

    error = refusal_of(400, {}, body, provider_id="a", model_id="m", secret="my-own-secret-key")

    assert error.field == field
    assert b"my-own-secret-key" not in answer_to(error)[1]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_whatever_a_provider_quotes_of_a_prompt_is_for_whoever_asked_alone(status: int) -> None:
    prompt = "Our unannounced product is a flying bicycle that costs a fortune"
    said = f"Invalid value in messages: {prompt[25:45]!r}"

    error = meaning(answered(status, {"error": {"message": said}}), texts=[prompt])

    assert "flying bicycle" in error.told
    assert "flying bicycle" not in str(error) + error.detail + "".join(traceback.format_exception(error))
    assert f"HTTP {status}" in str(error)


@pytest.mark.parametrize(
    "body", [[], "text", None, {"detail": "No."}, {"error": None}, {"error": {"type": "overloaded"}}]
)
def test_any_body_makes_an_error(body: object) -> None:
    assert type(meaning(answered(503, body))) is ProviderUnavailable


def test_a_long_page_is_cut_and_loses_its_markup() -> None:
    page = httpx.Response(502, text=f"<html><b>Bad gateway</b>{'x' * 5000}</html>", request=REQUEST)

    error = meaning(httpx.HTTPStatusError("no", request=REQUEST, response=page))

    assert error.said.startswith("Bad gateway")
    assert len(error.said) <= 200


def test_a_request_too_long_is_told_from_its_words() -> None:
    body = {"type": "error", "error": {"message": "prompt is too long: 210000 tokens > 200000 maximum"}}

    assert type(meaning(answered(400, body))) is ContextExceeded


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2015 07:28:30", 30.0),
        ("soon", None),
        ("nan", None),
        ("Wed, 21 Oct 99999999999999999999 07:28:00 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999", None),
        ("9" * 400, 3600.0),
        ("9" * 5000, 3600.0),
        ("3600.5", 3600.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    now = datetime(2015, 10, 21, 7, 28, tzinfo=UTC)

    assert retry_after_seconds({} if value is None else {"retry-after": value}, now=now) == seconds


WRITTEN = st.one_of(
    st.text(),
    st.from_regex(r"\A(Wed, )?\d{1,30} (Oct|Foo) \d{1,30} \d{1,9}:\d{1,9}:\d{1,9} (GMT|[+-]\d{1,12})\Z"),
    st.from_regex(r"\A-?\d{1,40}(\.\d{1,9})?\Z"),
)


@given(value=WRITTEN)
@example(value="-" + "9" * 400)
@example(value="Mon, 01 Jan 0001 00:00:00 +2359")
def test_whatever_retry_after_says_is_a_time_that_can_be_told_or_none(value: str) -> None:
    seconds = retry_after_seconds({"retry-after": value})

    assert seconds is None or 0 <= seconds <= 3600
    error = RateLimited(provider_id="one", retry_after_seconds=seconds)
    headers = dict(answer_to(error)[2])
    assert headers.get(b"retry-after", b"0").isdigit()
    assert headers.get(b"retry-after-ms", b"0").isdigit()
    assert seconds is None or int(headers[b"retry-after"]) == math.ceil(seconds)


def test_what_an_error_was_raised_from_is_named_with_its_place_and_without_its_words() -> None:
    words = "the merger with Initech"

    def below() -> None:
        raise ValueError(words)

    def above() -> None:
        try:
            below()
        except ValueError as error:
            raise openai.OpenAIError(words) from error

    with pytest.raises(openai.OpenAIError) as raised:
        above()
    logged = "".join(traceback.format_exception(wordless(raised.value)))

    assert "openai.OpenAIError" in logged
    assert "builtins.ValueError" in logged
    assert "in below" in logged, "the place of each"
    assert "in above" in logged
    assert words not in logged
