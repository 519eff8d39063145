"""Everything that can go wrong, as one tree branched by who can fix it.

    SekhaError
    ├── ConfigError                 edit sekha.yaml (or the block that holds it)
    │   ├── ConfigMissing           no file where one was named
    │   └── SpaceMismatch           a collection is embedded by models that are no longer listed
    ├── RequestRefused              change the request
    │   ├── InvalidRequest          a field is missing, malformed or contradictory
    │   ├── UnknownModel            no model, provider or task of that name
    │   ├── NoCandidate             models of that name exist, none may serve this request
    │   │   ├── NotCapable          none of them can do what is asked
    │   │   ├── NotPriced           something in it costs nobody knows what at the models that may serve it
    │   │   ├── PromptTooLong       longer than the context window of every model that may serve it
    │   │   └── LimitsReached       every provider that could serve it is at its `limits:`
    │   ├── CostRefused             it would cost more than the caller or the file allows
    │   ├── BudgetExceeded          a budget has too little left
    │   ├── DocumentRefused         a document is empty, binary, too large or not UTF-8
    │   ├── Unauthenticated         no key, or one that nobody was given
    │   ├── KeyNotAllowed           the key is good, and not for this model or task
    │   ├── OperatorsOnly           the key is good, and no operator's
    │   ├── KeyLimited              the key has used up its requests or tokens for now
    │   ├── TooManyTokens           more at once than the key's tokens of a whole minute
    │   ├── BodyTooLarge            the request's body is larger than the gateway reads
    │   ├── BodyTooSlow             the request's body did not arrive in time
    │   └── NoSuchPage              no such path, or not by that method
    ├── ProviderError               wait, or route around the provider
    │   ├── ProviderUnavailable     5xx, connection lost or refused
    │   │   ├── ProviderTimeout     no answer, or no next chunk, in time
    │   │   ├── StreamBroken        a stream ended before its end was said
    │   │   ├── CircuitOpen         it kept failing, so nobody was asked
    │   │   └── NotLoaded           what translates to its protocol is still being loaded
    │   ├── RateLimited             429, with `retry_after_seconds` when the provider said
    │   ├── ProviderAuthFailed      the provider refuses our key
    │   ├── ModelNotFound           the provider does not have the model
    │   ├── BadReply                the answer is not what the protocol promises
    │   ├── DimensionMismatch       vectors of another length than declared or asked for
    │   └── ProviderRejected        the provider calls the request wrong: the caller's to fix
    │       ├── ContentRefused      its content policy said no
    │       ├── ContextExceeded     longer than the model's context window
    │       └── FieldUnsupported    its protocol has no such field, so it was not asked
    ├── StoreError                  look at the store
    │   ├── CollectionMissing       no collection or alias of that name
    │   ├── CollectionConflict      it exists with another dimension or metric
    │   ├── VectorRefused           wrong length, NaN, infinite or zero
    │   ├── AliasMoved              an alias no longer points where the caller expected
    │   ├── StoreNotEmpty           a restore would replace what is there
    │   ├── StoreInUse              a restore needs the file for itself
    │   ├── BackupMissing           no backup of that name
    │   ├── BackupBroken            what is read back is not what was written
    │   └── StoreUnavailable        busy, unreachable or full
    ├── LedgerError                 look at the ledger
    │   └── LedgerUnavailable       busy or unreachable
    ├── RecordError                 look at Prefect
    │   └── PrefectUnavailable      no server answers where one was expected
    └── IngestIncomplete            run it again: what was stored is stored

Two attributes decide what happens next, and nobody parses messages:

`retryable`   the same call may succeed a little later
`falls_back`  another provider may succeed where this one failed

A `ProviderError` has a third, `health`: what it says of the provider to its circuit. `failing` counts against
it; `alive` is as good as an answer, since the request was at fault; `unknown` says nothing either way, as a 429
does: a provider that limits us is routed around for as long as it asks, and is not shut out for everybody.

Every error survives pickling, since Prefect moves them between processes.

No message holds a secret. That of a `ProviderError` holds no prompt either, since it is logged and recorded: what the
provider itself said, which may quote any part of the request, is in `said`, and only `told`, which goes to whoever
asked, repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from sekha.calling import Attempt
    from sekha.ingest import IngestReport
    from sekha.pricing import Usage

__all__ = [
    "MOST_REASONS",
    "AliasMoved",
    "BackupBroken",
    "BackupMissing",
    "BadReply",
    "BodyTooLarge",
    "BodyTooSlow",
    "BudgetExceeded",
    "CircuitOpen",
    "CollectionConflict",
    "CollectionMissing",
    "ConfigError",
    "ConfigMissing",
    "ContentRefused",
    "ContextExceeded",
    "CostRefused",
    "DimensionMismatch",
    "DocumentRefused",
    "FieldUnsupported",
    "IngestIncomplete",
    "InvalidRequest",
    "KeyLimited",
    "KeyNotAllowed",
    "LedgerError",
    "LedgerUnavailable",
    "LimitsReached",
    "ModelNotFound",
    "NoCandidate",
    "NoSuchPage",
    "NotCapable",
    "NotLoaded",
    "NotPriced",
    "OperatorsOnly",
    "PrefectUnavailable",
    "Problem",
    "PromptTooLong",
    "ProviderAuthFailed",
    "ProviderError",
    "ProviderRejected",
    "ProviderTimeout",
    "ProviderUnavailable",
    "RateLimited",
    "RecordError",
    "RequestRefused",
    "SekhaError",
    "SpaceMismatch",
    "StoreError",
    "StoreInUse",
    "StoreNotEmpty",
    "StoreUnavailable",
    "StreamBroken",
    "TooManyTokens",
    "Unauthenticated",
    "UnknownModel",
    "VectorRefused",
    "did_you_mean",
    "dollars",
]


def _restore(cls: type[SekhaError], args: tuple[object, ...], state: dict[str, Any]) -> SekhaError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class SekhaError(Exception):
    """The root. `code` names the kind of error to programs and never changes."""

    code: ClassVar[str] = "error"
    retryable: bool = False
    falls_back: bool = False
    quotes_request: ClassVar[bool] = False
    """Whether the message repeats what was asked, so that it is for whoever asked and for no record."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__.copy())

    @property
    def message(self) -> str:
        return str(self)

    @property
    def told(self) -> str:
        """The message for whoever asked: with what is left out for everybody else."""
        return str(self)


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """Say the nearest known name: " Did you mean 'gpt-5-mini'?", or nothing."""
    near = get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def dollars(amount: Decimal) -> str:
    """Write an amount as people read it: `$0.31`, `$0.000042`, `$12.50`."""
    if amount == 0:
        return "$0"
    places = max(2, 1 - amount.adjusted())
    return f"${amount:.{min(places, 12)}f}"


# --- edit the configuration ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a configuration: where, what, and the fix."""

    path: str
    """The key path, `providers[0].models[2].dimension`; empty for the whole file."""
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class ConfigError(SekhaError):
    """The configuration is wrong; `problems` holds every one that was found."""

    code = "config_invalid"

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class ConfigMissing(ConfigError):
    code = "config_missing"


class SpaceMismatch(ConfigError):
    """A collection holds the vectors of models that the file no longer lists, so no question can be put to it."""

    code = "space_mismatch"

    def __init__(self, collection: str, *, stored: str, wanted: str) -> None:
        super().__init__(
            f"Collection {collection!r}",
            [
                Problem(
                    "",
                    f"it holds vectors of {stored!r}, which no model under `providers:` makes; the configuration "
                    f"says {wanted!r} now, and two models' vectors cannot be compared. List the model again (with "
                    "`same_as:` if it has another name by now), or ingest the documents once more.",
                )
            ],
        )
        self.collection = collection
        self.stored = stored
        self.wanted = wanted


# --- change the request --------------------------------------------------------------------


class RequestRefused(SekhaError):
    """The caller asked for something we will not do; asking again changes nothing."""

    code = "request_refused"


class InvalidRequest(RequestRefused):
    code = "invalid_request"
    quotes_request = True

    def __init__(self, message: str, *, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


class UnknownModel(RequestRefused):
    code = "model_not_found"
    quotes_request = True

    def __init__(
        self, name: str, known: Sequence[str], *, kind: Literal["model", "task", "collection"] = "model"
    ) -> None:
        self.name = name
        where = {
            "model": "Models are listed under `providers:` in sekha.yaml, and by `sekha models`.",
            "task": f"Tasks are {', '.join(known)}.",
            "collection": "Collections are listed under `collections:` in sekha.yaml.",
        }[kind]
        super().__init__(f"No {kind} {name!r}.{did_you_mean(name, known)} {where}")


MOST_REASONS = 20
"""Models of which a refusal says why: a thousand of them would be longer than most requests."""


class NoCandidate(RequestRefused):
    """Every model that could have served was dropped; `reasons` says by which rule, `more` of how many it does not."""

    code = "no_candidate"
    _next: ClassVar[str] = "`sekha route` explains every choice."

    def __init__(
        self,
        wanted: str,
        reasons: Sequence[tuple[str, str]],
        *,
        more: int = 0,
        retryable: bool = False,
        retry_after_seconds: float | None = None,
        next_move: str = "",
    ) -> None:
        """`more` counts the models that are dropped too and have no reason in here."""
        self.wanted = wanted
        self.more = more + max(len(reasons) - MOST_REASONS, 0)
        self.reasons = tuple(reasons[:MOST_REASONS])
        self.retryable = retryable
        self.retry_after_seconds = retry_after_seconds
        if self.reasons:
            listed = "; ".join(f"{model}: {why}" for model, why in self.reasons[:5])
            left = len(self.reasons[5:]) + self.more
            others = f"; and {left} more" if left else ""
            message = f"No model can serve {wanted}. {listed}{others}. {next_move or self._next}"
        else:
            message = f"No model can serve {wanted}. Give one that task under `providers:` in sekha.yaml."
        super().__init__(message)


class NotCapable(NoCandidate):
    """None of the models that were asked for does what is asked; `able` are some that do."""

    code = "model_not_capable"

    def __init__(
        self,
        wanted: str,
        reasons: Sequence[tuple[str, str]],
        *,
        more: int = 0,
        field: str = "model",
        able: Sequence[str] = (),
    ) -> None:
        self.field = field
        self.able = tuple(able)
        others = f"Ask for one that can: {', '.join(able)}." if able else "None here can, which `sekha models` shows."
        super().__init__(wanted, reasons, more=more, next_move=others)


class NotPriced(NoCandidate):
    """At models that could serve it, nobody knows what `what`, in `field`, may cost: without it they could."""

    code = "price_unknown"

    def __init__(
        self, wanted: str, reasons: Sequence[tuple[str, str]], *, more: int = 0, field: str, what: str
    ) -> None:
        self.field = field
        self.what = what
        next_move = f"Leave `{what}` out, or ask for a model whose price with it is known."
        super().__init__(wanted, reasons, more=more, next_move=next_move)


class PromptTooLong(NoCandidate):
    """No model that may serve the request has room for it. The code is OpenAI's, by which programs cut a history."""

    code = "context_length_exceeded"

    def __init__(
        self,
        wanted: str,
        reasons: Sequence[tuple[str, str]],
        *,
        more: int = 0,
        field: str = "messages",
        needs: int,
        model: str,
        takes: int,
    ) -> None:
        self.field = field
        self.needs = needs
        self.model = model
        self.takes = takes
        reply = ", lower `max_tokens`," if field == "messages" else ""
        next_move = (
            f"The longest maximum context length is {takes:,} tokens, of {model!r}, and this has {needs:,}. "
            f"Shorten `{field}`{reply} or ask for a model with a larger `context_window`."
        )
        super().__init__(wanted, reasons, more=more, next_move=next_move)


class LimitsReached(NoCandidate):
    """The `limits:` of every provider that could serve it let nothing pass just now, or never as much at once."""

    code = "limits_reached"


class CostRefused(RequestRefused):
    code = "cost_refused"

    def __init__(
        self,
        *,
        limit: Decimal,
        limit_name: str,
        cheapest: str,
        cost: Decimal,
        replies: bool = True,
        refused: str | None = None,
        refused_cost: Decimal | None = None,
    ) -> None:
        """`cheapest` is so of all that could serve it, `refused` of those that were asked for; left out, the same."""
        self.limit = limit
        self.limit_name = limit_name
        self.cheapest = cheapest
        self.cost = cost
        self.replies = replies
        self.refused = cheapest if refused is None else refused
        self.refused_cost = cost if refused_cost is None else refused_cost
        less = f"Shorten the input,{' lower `max_tokens`,' if replies else ''} or raise `{limit_name}`."
        above = f"is estimated at {dollars(self.refused_cost)}, above `{limit_name}` of {dollars(limit)}."
        if self.refused == cheapest:
            message = f"The cheapest model, {cheapest!r}, {above} {less}"
        elif self.fits:
            message = (
                f"{self.refused!r} {above} {cheapest!r} would do for {dollars(cost)}: ask for that one. "
                f"Or: {less[0].lower()}{less[1:]}"
            )
        else:
            message = (
                f"{self.refused!r} {above} The cheapest model that could serve this, {cheapest!r}, is estimated at "
                f"{dollars(cost)}, which is above it too. {less}"
            )
        super().__init__(message)

    @property
    def fits(self) -> bool:
        """Whether the cheapest may serve it."""
        return self.cost <= self.limit


class BudgetExceeded(RequestRefused):
    code = "budget_exceeded"

    def __init__(
        self, budget: str, *, limit: Decimal, remaining: Decimal, needed: Decimal, period: str, resets: str | None
    ) -> None:
        self.budget = budget
        self.limit = limit
        self.remaining = remaining
        self.needed = needed
        self.period = period
        self.resets = resets
        wait = f", or wait until {resets}" if resets else ""
        left = f"{dollars(remaining)} of {dollars(limit)} left"
        super().__init__(
            f"Budget {budget!r} has {left} ({period}) and this may cost {dollars(needed)}. "
            f"Ask for less, raise `limit` of {budget!r} under `budgets:` in sekha.yaml{wait}."
        )


class DocumentRefused(RequestRefused):
    """Documents that cannot be read; all of them are listed, and nothing was stored."""

    code = "document_refused"

    def __init__(self, refused: Sequence[tuple[str, str]]) -> None:
        self.refused = tuple(refused)
        count = len(self.refused)
        head = f"{count} document{'s' if count != 1 else ''} cannot be ingested, and nothing was stored:"
        lines = [f"  {source}: {why}" for source, why in self.refused[:20]]
        if count > 20:
            lines.append(f"  and {count - 20} more")
        super().__init__("\n".join([head, *lines]))


class Unauthenticated(RequestRefused):
    code = "invalid_api_key"

    def __init__(self, *, given: bool) -> None:
        said = "The key is not one of this gateway's" if given else "This gateway needs a key"
        super().__init__(
            f"{said}. Send `Authorization: Bearer …` with one that `sekha keys create` made, listed under `keys:`."
        )


class KeyNotAllowed(RequestRefused):
    code = "key_not_allowed"

    def __init__(self, key_name: str, what: str, allowed: Sequence[str]) -> None:
        self.key_name = key_name
        self.what = what
        self.allowed = tuple(allowed)
        super().__init__(
            f"Key {key_name!r} may not use {what!r}, but {', '.join(allowed)}: that is set under `keys:` in sekha.yaml."
        )


class OperatorsOnly(RequestRefused):
    code = "operators_only"

    def __init__(self, key_name: str, page: str) -> None:
        self.key_name = key_name
        self.page = page
        super().__init__(
            f"Key {key_name!r} may not see {page}, which is for operators. Use a key that has `operator: true` under "
            "`keys:` in sekha.yaml, or give it to this one."
        )


class KeyLimited(RequestRefused):
    code = "rate_limit_exceeded"
    retryable = True

    def __init__(self, key_name: str, limit: str, *, retry_after_seconds: float) -> None:
        self.key_name = key_name
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds
        super().__init__(
            f"Key {key_name!r} has used up {limit}. Try again in {retry_after_seconds:.1f} s, "
            "or raise it under `keys:` in sekha.yaml."
        )


class TooManyTokens(RequestRefused):
    code = "too_many_tokens"

    def __init__(self, key_name: str, tokens: str, limit: str) -> None:
        self.key_name = key_name
        self.tokens = tokens
        self.limit = limit
        super().__init__(
            f"The request may take {tokens}, and key {key_name!r} never has more than {limit}. Send less at once, "
            "ask for a shorter reply with `max_tokens`, or raise `tokens_per_minute` under `keys:` in sekha.yaml."
        )


class BodyTooLarge(RequestRefused):
    code = "request_too_large"

    def __init__(self, limit_mb: float) -> None:
        super().__init__(f"The request has more than {limit_mb:g} MB, and no more is read. Send less at once.")


class BodyTooSlow(RequestRefused):
    code = "request_timeout"
    retryable = True

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request's body did not arrive within {seconds:g} s. Send it faster, or send less.")


class NoSuchPage(RequestRefused):
    code = "not_found"

    def __init__(self, method: str, path: str, *, known: Sequence[str] = (), allowed: Sequence[str] = ()) -> None:
        self.allowed = tuple(allowed)
        if allowed:
            super().__init__(f"{method} {path!r} is not served; it takes {' and '.join(allowed)}. See /docs.")
        else:
            super().__init__(f"Nothing is at {path!r}.{did_you_mean(path, known)} All that there is: /docs.")


# --- wait, or route around the provider ----------------------------------------------------


class ProviderError(SekhaError):
    """A provider failed; `provider_id` and `model_id` say which."""

    code = "provider_error"
    falls_back = True
    health: ClassVar[Literal["failing", "alive", "unknown"]] = "failing"
    may_be_billed: bool = False
    """Whether the provider may charge for the attempt all the same, so that it counts at its worst case."""
    usage: Usage | None = None
    """What the provider says that the attempt used, which then counts in place of the worst case."""
    _says: ClassVar[str] = "failed"
    _next: ClassVar[str] = ""

    def __init__(
        self,
        detail: str = "",
        *,
        said: str = "",
        provider_id: str,
        model_id: str | None = None,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.detail = detail
        """What is known beyond the kind, in our own words."""
        self.said = said
        """The provider's own sentence. It may quote the request: for whoever asked, for no log and for no record."""
        self.provider_id = provider_id
        self.model_id = model_id
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        self.attempts: tuple[Attempt, ...] = ()
        """Every attempt of the request that this error ended."""
        super().__init__(self._sentence(detail))

    @property
    def told(self) -> str:
        return self._sentence(self.detail, self.said)

    def _sentence(self, *details: str) -> str:
        who = f"Provider {self.provider_id!r}" + (f", model {self.model_id!r}," if self.model_id else "")
        facts = [f"HTTP {self.status}"] if self.status else []
        facts += [detail for detail in details if detail]
        if self.retry_after_seconds is not None:
            facts.append(f"retry after {self.retry_after_seconds:g} s")
        said = f": {'; '.join(facts)}" if facts else ""
        end = "" if said.endswith((".", "!", "?")) else "."
        return f"{who} {self._says}{said}{end}{' ' if self._next else ''}{self._next}"


class ProviderUnavailable(ProviderError):
    code = "provider_unavailable"
    retryable = True
    _says = "is unavailable"


class ProviderTimeout(ProviderUnavailable):
    code = "provider_timeout"
    may_be_billed = True
    _says = "did not answer in time"
    _next = "Raise its `timeout_secs` if it is merely slow."


class StreamBroken(ProviderUnavailable):
    """The stream ended early. What had arrived is incomplete, and another try repeats it."""

    code = "stream_broken"
    may_be_billed = True
    retryable = False
    falls_back = False
    _says = "broke off its stream"


class CircuitOpen(ProviderUnavailable):
    """Every candidate kept failing and is left alone for now; `retry_after_seconds` until one is tried again."""

    code = "circuit_open"
    health = "unknown"
    _says = "is left alone because it kept failing"
    _next = "Wait, or add another provider of the model."


class NotLoaded(ProviderUnavailable):
    """LiteLLM, through which it is reached, is still being loaded. That goes on, and says nothing of the provider."""

    code = "provider_not_loaded"
    health = "unknown"
    _says = "was not answered for"
    _next = "It is loaded once, after the start: ask again in a moment."


class RateLimited(ProviderError):
    code = "rate_limited"
    retryable = True
    health = "unknown"
    _says = "is rate limiting us"


class ProviderAuthFailed(ProviderError):
    code = "provider_auth_failed"
    _says = "refuses our key"
    _next = "Check its `api_key` in sekha.yaml and the variable that it names."


class ModelNotFound(ProviderError):
    code = "provider_model_not_found"
    _says = "does not have that model"
    _next = "Check `model_id`, or pull the model."


class BadReply(ProviderError):
    code = "provider_bad_reply"
    may_be_billed = True
    retryable = True
    _says = "gave an answer that breaks its protocol"


class DimensionMismatch(ProviderError):
    code = "dimension_mismatch"
    falls_back = False
    health = "alive"
    _says = "returned vectors of another length"

    def __init__(self, *, wanted: int, returned: int, provider_id: str, model_id: str, declared: bool = True) -> None:
        """`declared` is whether the file has them so, and not the caller alone in `dimensions`."""
        if declared:
            why = f"sekha.yaml declares `dimension: {wanted}`. Write `dimension: {returned}` for this model"
        else:
            why = f"the request asked for `dimensions: {wanted}`. Leave that out"
        super().__init__(
            f"{returned} numbers, and {why}, or name the model that has {wanted}",
            provider_id=provider_id,
            model_id=model_id,
        )
        self.wanted = wanted
        self.returned = returned


class ProviderRejected(ProviderError):
    """The provider calls the request itself wrong, so no other provider is asked."""

    code = "provider_rejected"
    falls_back = False
    health: ClassVar[Literal["failing", "alive", "unknown"]] = "alive"
    field: str | None = None
    """The field that is wrong, where the provider says which."""
    _says = "rejects the request"


class ContentRefused(ProviderRejected):
    code = "content_refused"
    _says = "refuses the content"


class ContextExceeded(ProviderRejected):
    code = "context_exceeded"
    _says = "cannot take a request this long"
    _next = "Shorten it, or route to a model with a larger `context_window`."


class FieldUnsupported(ProviderRejected):
    """The provider's protocol has no place for a field of the request. Nothing was sent, so another may be asked."""

    code = "field_unsupported"
    falls_back = True
    health = "unknown"
    # `field` is the first of those that have no place.
    _says = "was not asked"
    _next = "Leave that out, or name a model of a provider that takes it."


# --- look at the store or the ledger -------------------------------------------------------


class StoreError(SekhaError):
    code = "store_error"


class CollectionMissing(StoreError):
    code = "collection_missing"
    quotes_request = True

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        listed = f"Collections here: {', '.join(known)}." if known else "The store is empty: ingest something first."
        super().__init__(f"No collection or alias {name!r}.{did_you_mean(name, known)} {listed}")


class CollectionConflict(StoreError):
    """A collection exists with other properties than the ones asked for."""

    code = "collection_conflict"

    def __init__(self, name: str, *, field: str, exists: object, wanted: object) -> None:
        self.name = name
        self.field = field
        self.exists = exists
        self.wanted = wanted
        super().__init__(
            f"Collection {name!r} exists with {field} {exists!r}, and {wanted!r} was asked for. "
            "Choose another name, or drop the collection first."
        )


class VectorRefused(StoreError):
    code = "vector_refused"

    def __init__(self, collection: str, uuid: str | None, why: str) -> None:
        self.collection = collection
        self.uuid = uuid
        self.why = why
        which = f"The vector of {uuid!r}" if uuid else "The query vector"
        super().__init__(f"{which} does not fit collection {collection!r}: {why}.")


class AliasMoved(StoreError):
    code = "alias_moved"

    def __init__(self, alias: str, *, expected: str | None, found: str | None) -> None:
        self.alias = alias
        self.expected = expected
        self.found = found
        super().__init__(
            f"Alias {alias!r} points to {found!r}, not to {expected!r} as expected: somebody moved it. "
            "Look at it before you move it again."
        )


class StoreNotEmpty(StoreError):
    code = "store_not_empty"

    def __init__(self, store: str, holds: str) -> None:
        self.store = store
        self.holds = holds
        super().__init__(
            f"{store!r} holds {holds}, and a restore would replace it. Say so with --yes"
            + (" or another `store:`." if "://" in store else ", or restore `--into` a new file.")
        )


class StoreInUse(StoreError):
    code = "store_in_use"

    def __init__(self, file: str) -> None:
        self.file = file
        super().__init__(
            f"{file!r} is open in another process, which would go on with what it knows. End the gateways and "
            "workers that use it, then restore again."
        )


class BackupMissing(StoreError):
    code = "backup_missing"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        listed = f" There are {', '.join(known[:10])}." if known else ""
        super().__init__(f"No backup {name!r}.{did_you_mean(name, known)}{listed} `sekha backups` lists them.")


class BackupBroken(StoreError):
    code = "backup_broken"

    def __init__(self, what: str, why: str) -> None:
        self.what = what
        self.why = why
        super().__init__(f"{what!r} cannot be relied on: {why}. Use another backup, and look at the disk.")


class StoreUnavailable(StoreError):
    code = "store_unavailable"
    retryable = True

    def __init__(self, store: str, detail: str) -> None:
        self.store = store
        self.detail = detail
        super().__init__(f"Store {store!r} is unavailable: {detail}.")


class LedgerError(SekhaError):
    code = "ledger_error"


class LedgerUnavailable(LedgerError):
    code = "ledger_unavailable"
    retryable = True
    retry_after_seconds = 1.0

    def __init__(self, ledger: str, detail: str) -> None:
        self.ledger = ledger
        self.detail = detail
        super().__init__(f"Ledger {ledger!r} is unavailable: {detail}. No money is spent without it.")


class RecordError(SekhaError):
    code = "record_error"


class PrefectUnavailable(RecordError):
    code = "prefect_unavailable"
    retryable = True

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(detail)


# --- run it again --------------------------------------------------------------------------


class IngestIncomplete(SekhaError):
    """Part of an ingest failed; `report` says what is stored and what is left."""

    code = "ingest_incomplete"
    retryable = True
    said: str = ""
    """The provider's own sentence of the first failure, as in `ProviderError`."""

    def __init__(self, report: IngestReport, *, retryable: bool = True, said: str = "") -> None:
        self.report = report
        self.retryable = retryable
        self.said = said
        first = report.failures[0]
        sources = list(dict.fromkeys(failure.source for failure in report.failures))
        more = f" and {len(sources) - 10} more" if len(sources) > 10 else ""
        super().__init__(
            f"Chunks stored: {report.embedded:,}; missing: {report.missing:,}, of {', '.join(sources[:10])}{more}. "
            f"First failure, {first.source!r}: {first.error} {'Run' if retryable else 'Mend that, then run'} the same "
            "ingest again: it does only what is missing."
        )

    @property
    def told(self) -> str:
        return f"{self} The provider said: {self.said}" if self.said else str(self)
