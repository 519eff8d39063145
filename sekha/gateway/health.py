"""How the gateway and all that it depends on are doing: looked at now and then, for whoever asks.

Nobody is asked once for each request: providers, ledger and store are looked at side by side, at most every
ten seconds, and everybody who wants to know meanwhile is told the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Generic, Literal, TypeAlias, TypeVar

from sekha.breaker import CLOSED, Circuit
from sekha.errors import SekhaError
from sekha.ledgers.leased import LeasedLedger
from sekha.providers.addresses import base_url_of
from sekha.providers.http import BadResponse, HttpClient, Target
from sekha.registry import Model, ProviderSpec
from sekha.resources import Resources

__all__ = ["Health", "Look", "Status", "circuit_values", "overall", "provider_status", "sekha_version", "worst_of"]

T = TypeVar("T")
Status: TypeAlias = Literal["healthy", "degraded", "unhealthy", "unknown"]

FRESH_SECONDS = 10.0
PROBE_SECONDS = 2.0
_ANTHROPIC_VERSION = "2023-06-01"
_WORST_FIRST = ("open", "half_open", "closed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of one thing."""

    status: Status
    """`unknown` where there is nothing that can be asked."""
    seconds: float | None = None
    """It took to answer."""
    detail: str | None = None
    """What is wrong with it."""


class Health:
    """Looks at what one configuration depends on."""

    def __init__(self, resources: Resources) -> None:
        self._open = resources
        self._http = HttpClient()
        now = resources.clock.now
        self._providers = _Fresh(self._look_at_providers, now)
        self._ledger = _Fresh(self._look_at_ledger, now)
        self._store = _Fresh(self._look_at_store, now)
        self._ledger_answered = False
        self._ledger_away_since: float | None = None

    async def providers(self) -> Mapping[str, Look]:
        """Each provider, by its id."""
        return await self._providers.get()

    async def ledger(self) -> Look:
        return await self._ledger.get()

    @property
    def ledger_away_seconds(self) -> float:
        """How long the ledger has not answered: 0 while it does, infinite if it never did."""
        if self._ledger_away_since is None:
            return 0.0
        return self._open.clock.now() - self._ledger_away_since if self._ledger_answered else math.inf

    async def store(self) -> Look:
        return await self._store.get()

    async def aclose(self) -> None:
        for each in (self._providers, self._ledger, self._store):
            await each.aclose()
        await self._http.aclose()

    async def _look_at_providers(self) -> Mapping[str, Look]:
        specs = list(self._open.registry.providers.values())
        return dict(zip((spec.id for spec in specs), await asyncio.gather(*map(self._probe, specs)), strict=True))

    async def _probe(self, spec: ProviderSpec) -> Look:
        """Ask for the list of its models, which costs nothing, and which no model has to be loaded for."""
        if spec.kind == "builtin":
            return Look(status="healthy", seconds=0.0)
        try:
            target = _target(spec)
        except ValueError as error:
            return Look(status="unhealthy", detail=str(error))
        if target is None:
            return Look(status="unknown", detail="it has no address that could be asked")
        began = self._open.clock.now()
        try:
            response = await self._http.post(target, b"", timeout_seconds=PROBE_SECONDS)
        except TimeoutError:
            return Look(status="unhealthy", detail=f"no answer within {PROBE_SECONDS:g} s")
        except OSError as error:
            return Look(status="unhealthy", detail=f"it cannot be reached: {error.strerror or type(error).__name__}")
        except BadResponse as error:
            return Look(status="unhealthy", detail=f"its answer is broken: {error}")
        return _seen(response.status, self._open.clock.now() - began)

    async def _look_at_ledger(self) -> Look:
        ledger = await self._open.ledger()
        # A question about a model that nobody has: one look into an index, however much was spent.
        looked = await self._timed(lambda: ledger.usual_output_tokens("", ""))
        if isinstance(ledger, LeasedLedger) and (away := ledger.away) is not None:
            # It answered out of what it remembers.
            looked = Look(status="unhealthy", detail=away.message)
        if looked.status == "healthy":
            self._ledger_answered, self._ledger_away_since = True, None
        elif self._ledger_away_since is None:
            self._ledger_away_since = self._open.clock.now()
        return looked

    async def _look_at_store(self) -> Look:
        config = self._open.loaded.config
        if not config.collections and config.memory is None and config.store.kind == "embedded":
            # Opening one that nobody uses would make its file, and load what reads it.
            return Look(status="unknown", detail="no collection is configured")

        async def ask() -> float:
            return await (await self._open.store()).health()

        return await self._timed(ask)

    async def _timed(self, ask: Callable[[], Awaitable[object]]) -> Look:
        began = self._open.clock.now()
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await ask()
        except TimeoutError:
            return Look(status="unhealthy", detail=f"no answer within {PROBE_SECONDS:g} s")
        except SekhaError as error:
            return Look(status="unhealthy", detail=error.message)
        return Look(status="healthy", seconds=self._open.clock.now() - began)


class _Fresh(Generic[T]):
    """What was seen, looked at again once it is old: by one, for all who ask at that time."""

    def __init__(self, look: Callable[[], Awaitable[T]], now: Callable[[], float]) -> None:
        self._look = look
        self._now = now
        self._seen: T | None = None
        self._seen_at = 0.0
        self._looking: asyncio.Task[T] | None = None

    async def get(self) -> T:
        if self._seen is not None and self._now() - self._seen_at < FRESH_SECONDS:
            return self._seen
        if self._looking is None:
            self._looking = asyncio.create_task(self._again())
        # Whoever leaves does not take away what the others wait for.
        return await asyncio.shield(self._looking)

    async def _again(self) -> T:
        try:
            self._seen = seen = await self._look()
            self._seen_at = self._now()
        finally:
            self._looking = None
        return seen

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])


# --- what it comes to ----------------------------------------------------------------------


def provider_status(look: Look, circuits: Sequence[Circuit], *, limited: bool = False) -> Status:
    """One provider's state, of what a probe saw and of what calls to its models met: failures, or a 429 that holds."""
    shut = sum(circuit.state != "closed" for circuit in circuits)
    if look.status == "unhealthy" or (circuits and shut == len(circuits)):
        return "unhealthy"
    return "degraded" if shut or limited else look.status


def overall(providers: Sequence[Status], ledger: Status, *others: Status) -> Status:
    """`unhealthy` when no call can be made; `degraded` when one of those things is amiss that can be done without."""
    if ledger == "unhealthy" or (providers and all(each == "unhealthy" for each in providers)):
        return "unhealthy"
    amiss = any(each in ("unhealthy", "degraded") for each in (*providers, ledger, *others))
    return "degraded" if amiss else "healthy"


def worst_of(models: Sequence[Model], circuits: Mapping[str, Circuit]) -> Circuit:
    """The circuit that stands for a provider: of its models' the least closed, and of those the one hurt most."""
    found = [circuits.get(model.name, CLOSED) for model in models]
    return min(found, key=lambda each: (_WORST_FIRST.index(each.state), -each.failures), default=CLOSED)


def circuit_values(circuit: Circuit) -> dict[str, object]:
    failed_at = circuit.last_failure_at
    return {
        "state": circuit.state,
        "failure_count": circuit.failures,
        "success_count": circuit.successes,
        "last_failure": None if failed_at is None else datetime.fromtimestamp(failed_at, UTC).isoformat(),
        "last_error": circuit.error,
    }


@cache
def sekha_version() -> str:
    try:
        return version("sekha")
    except PackageNotFoundError:
        return "unknown"


def _target(spec: ProviderSpec) -> Target | None:
    """Where the provider lists its models; None when it has no address that is known here."""
    base = base_url_of(spec.kind, spec.base_url)
    if base is None:
        return None
    headers = {"accept": "application/json", "user-agent": "sekha"}
    key = spec.api_key.get_secret_value() if spec.api_key else None
    path = "/models"
    match spec.kind:
        case "ollama":
            path = "/api/tags"
        case "anthropic":
            path = "/v1/models?limit=1"
            headers["anthropic-version"] = _ANTHROPIC_VERSION
            if key is not None:
                headers["x-api-key"] = key
        case _:
            pass
    if key is not None and spec.kind != "anthropic":
        headers["authorization"] = f"Bearer {key}"
    return Target.of(base + path, headers, method="GET")


def _seen(status: int, seconds: float) -> Look:
    says = partial(Look, seconds=seconds)
    if status in (401, 403):
        return says(status="unhealthy", detail=f"it refuses our key (HTTP {status})")
    if status == 429:
        return says(status="degraded", detail="it is rate limiting us (HTTP 429)")
    if status >= 500:
        return says(status="unhealthy", detail=f"it fails (HTTP {status})")
    # Any other answer shows that it is up: not every one lists its models.
    return says(status="healthy")
