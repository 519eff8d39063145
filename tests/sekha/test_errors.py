from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

import sekha.errors
from sekha.calling import Attempt
from sekha.errors import (
    AliasMoved,
    BackupBroken,
    BackupMissing,
    BodyTooLarge,
    BodyTooSlow,
    BudgetExceeded,
    CollectionConflict,
    CollectionMissing,
    ConfigError,
    ConfigMissing,
    CostRefused,
    DimensionMismatch,
    DocumentRefused,
    IngestIncomplete,
    InvalidRequest,
    KeyLimited,
    KeyNotAllowed,
    LedgerError,
    LedgerUnavailable,
    LimitsReached,
    NoCandidate,
    NoSuchPage,
    NotCapable,
    NotPriced,
    OperatorsOnly,
    PrefectUnavailable,
    Problem,
    PromptTooLong,
    ProviderError,
    RecordError,
    RequestRefused,
    SekhaError,
    SpaceMismatch,
    StoreError,
    StoreInUse,
    StoreNotEmpty,
    StoreUnavailable,
    TooManyTokens,
    Unauthenticated,
    UnknownModel,
    VectorRefused,
    did_you_mean,
    dollars,
)
from sekha.ingest import Failure, IngestReport

ROOT = Path(__file__).resolve().parents[2]
REPORT = IngestReport(
    collection="docs",
    space="Docs_8",
    documents=1,
    chunks=3,
    embedded=1,
    failures=(Failure(source="a", chunks=2, error="x."),),
)


def children(kind: type[SekhaError]) -> list[type[SekhaError]]:
    """Ours alone: anybody may add errors of his own, and other tests do."""
    return [child for child in kind.__subclasses__() if child.__module__ == sekha.errors.__name__]


def tree(root: type[SekhaError] = SekhaError) -> Iterator[type[SekhaError]]:
    yield root
    for child in children(root):
        yield from tree(child)


def example(kind: type[SekhaError]) -> SekhaError:
    """One of each, with every attribute set."""
    made: dict[type[SekhaError], SekhaError] = {
        ConfigError: ConfigError("sekha.yaml", [Problem("a.b", "is wrong.", 3)]),
        ConfigMissing: ConfigMissing("sekha.yaml", [Problem("", "there is no such file.")]),
        SpaceMismatch: SpaceMismatch("Docs_8", stored="a:8", wanted="b:8"),
        InvalidRequest: InvalidRequest("`n` is 0.", field="n"),
        UnknownModel: UnknownModel("gtp", ["gpt"]),
        NoCandidate: NoCandidate("'m'", [("a/m", "why")], retryable=True),
        NotCapable: NotCapable("'m'", [("a/m", "it does not chat")], able=["n"]),
        NotPriced: NotPriced("'m'", [("a/m", "why")], field="messages", what="file"),
        PromptTooLong: PromptTooLong("'m'", [("a/m", "why")], needs=9, model="a/m", takes=8),
        LimitsReached: LimitsReached("'m'", [("a/m", "why")], retryable=True, retry_after_seconds=2.0),
        CostRefused: CostRefused(limit=Decimal(1), limit_name="max_cost", cheapest="a/m", cost=Decimal(2)),
        BudgetExceeded: BudgetExceeded(
            "b", limit=Decimal(1), remaining=Decimal(0), needed=Decimal(2), period="day", resets="00:00 UTC"
        ),
        Unauthenticated: Unauthenticated(given=True),
        KeyNotAllowed: KeyNotAllowed("research", "gpt-5", ["gpt-5-mini"]),
        OperatorsOnly: OperatorsOnly("research", "/metrics"),
        KeyLimited: KeyLimited("research", "60 requests a minute", retry_after_seconds=2.0),
        BodyTooLarge: BodyTooLarge(20.0),
        TooManyTokens: TooManyTokens("research", "1,200 tokens", "1,000 in a minute"),
        BodyTooSlow: BodyTooSlow(30.0),
        NoSuchPage: NoSuchPage("GET", "/v1/chat", known=["/v1/chat/completions"]),
        DocumentRefused: DocumentRefused([("a.md", "it is empty")]),
        DimensionMismatch: DimensionMismatch(wanted=8, returned=4, provider_id="a", model_id="m"),
        CollectionMissing: CollectionMissing("Docs", ["Docs_8"]),
        CollectionConflict: CollectionConflict("Docs_8", field="dimension", exists=8, wanted=4),
        VectorRefused: VectorRefused("Docs_8", "u", "it is zero"),
        AliasMoved: AliasMoved("docs", expected="a", found="b"),
        StoreNotEmpty: StoreNotEmpty("vectors.db", "2 records in Docs_8"),
        StoreInUse: StoreInUse("vectors.db"),
        BackupMissing: BackupMissing("first", ["second"]),
        BackupBroken: BackupBroken("vectors.db", "it is not the file that was written"),
        StoreUnavailable: StoreUnavailable("vectors.db", "it is busy"),
        LedgerUnavailable: LedgerUnavailable("ledger.db", "it is busy"),
        PrefectUnavailable: PrefectUnavailable("no server answers."),
        IngestIncomplete: IngestIncomplete(REPORT),
    }
    if kind in made:
        return made[kind]
    if issubclass(kind, ProviderError):
        error = kind("it broke", provider_id="a", model_id="m", status=500, retry_after_seconds=3)
        error.attempts = (Attempt(provider_id="a", model_id="m", seconds=1.0, error="x"),)
        return error
    return kind("it broke.")


every_error = pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)


@every_error
def test_every_error_survives_pickling_with_all_it_knows(kind: type[SekhaError]) -> None:
    error = example(kind)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert str(copy) == str(error) == copy.message
    assert copy.__dict__ == error.__dict__
    assert (copy.retryable, copy.falls_back) == (error.retryable, error.falls_back)


@every_error
def test_every_error_has_a_code_of_its_own(kind: type[SekhaError]) -> None:
    assert "code" in vars(kind)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code)
    assert [other for other in tree() if other.code == kind.code] == [kind]


@every_error
def test_every_error_says_what_happened_in_sentences(kind: type[SekhaError]) -> None:
    message = str(example(kind)).splitlines()[-1]

    assert message.endswith((".", "?")) or kind is DocumentRefused
    assert "None" not in message


@every_error
def test_every_error_is_public(kind: type[SekhaError]) -> None:
    assert kind.__name__ in sekha.errors.__all__


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (sekha.errors.__doc__ or "").splitlines():
        if found := re.match(r"^(?:    )([│├└─ ]*)([A-Z]\w+)", line):
            drawn.append((len(found[1]) // 4, found[2]))

    def walk(kind: type[SekhaError], depth: int = 0) -> Iterator[tuple[int, str]]:
        yield depth, kind.__name__
        for child in children(kind):
            yield from walk(child, depth + 1)

    def parents(listed: list[tuple[int, str]]) -> set[tuple[str | None, str]]:
        above: dict[int, str] = {}
        found = set()
        for depth, name in listed:
            above[depth] = name
            found.add((above.get(depth - 1) if depth else None, name))
        return found

    assert parents(drawn) == parents(list(walk(SekhaError)))


def test_only_what_may_succeed_later_is_retryable() -> None:
    retryable = {kind.__name__ for kind in tree() if kind.retryable}

    assert retryable == {
        "BadReply",
        "BodyTooSlow",
        "CircuitOpen",
        "IngestIncomplete",
        "KeyLimited",
        "LedgerUnavailable",
        "NotLoaded",
        "PrefectUnavailable",
        "ProviderTimeout",
        "ProviderUnavailable",
        "RateLimited",
        "StoreUnavailable",
    }


def test_only_a_providers_own_failure_falls_back_on_another() -> None:
    stays = {"DimensionMismatch", "ProviderRejected", "ContentRefused", "ContextExceeded", "StreamBroken"}

    assert {kind.__name__ for kind in tree() if kind.falls_back} == {
        kind.__name__ for kind in tree(ProviderError)
    } - stays


def test_only_what_is_the_providers_fault_counts_against_it() -> None:
    health = {kind.__name__: kind.health for kind in tree(ProviderError)}

    assert {name for name, says in health.items() if says == "failing"} == {
        "BadReply",
        "ModelNotFound",
        "ProviderAuthFailed",
        "ProviderError",
        "ProviderTimeout",
        "ProviderUnavailable",
        "StreamBroken",
    }
    assert {name for name, says in health.items() if says == "unknown"} == {
        "CircuitOpen",
        "FieldUnsupported",
        "NotLoaded",
        "RateLimited",
    }


def test_the_branches_say_who_can_mend_it() -> None:
    branches = {ConfigError, RequestRefused, ProviderError, StoreError, LedgerError, RecordError, IngestIncomplete}

    assert set(children(SekhaError)) == branches


@pytest.mark.parametrize(
    ("amount", "written"),
    [
        ("0", "$0"),
        ("12.5", "$12.50"),
        ("0.31", "$0.31"),
        ("0.000042", "$0.000042"),
        ("0.0000421", "$0.000042"),
        ("1234", "$1234.00"),
    ],
)
def test_dollars_are_written_as_people_read_them(amount: str, written: str) -> None:
    assert dollars(Decimal(amount)) == written


def test_the_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert did_you_mean("gpt-5-mni", ["gpt-5-mini", "llama"]) == " Did you mean 'gpt-5-mini'?"
    assert did_you_mean("zzz", ["gpt-5-mini"]) == ""


def test_a_provider_error_tells_the_facts_in_one_sentence() -> None:
    error = example(next(kind for kind in tree() if kind.__name__ == "RateLimited"))

    assert str(error) == "Provider 'a', model 'm', is rate limiting us: HTTP 500; it broke; retry after 3 s."


def test_no_error_takes_a_prompt() -> None:
    for kind in tree():
        names = inspect.signature(kind.__init__).parameters
        assert not {"messages", "prompt", "text", "texts", "key", "api_key"} & names.keys()


@every_error
def test_every_error_is_documented_with_its_code(kind: type[SekhaError]) -> None:
    if kind is not SekhaError:
        assert f"`{kind.code}`" in (ROOT / "docs" / "errors.md").read_text()
