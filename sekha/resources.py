"""What one process holds open: the registry, providers, store and ledger of one configuration."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sekha.breaker import BreakerRules
from sekha.calling import Clock, Retries
from sekha.circuits import Circuits
from sekha.config import Config
from sekha.errors import dollars
from sekha.indexes import Indexes
from sekha.latency import Latencies
from sekha.ledger import Budget, Ledger
from sekha.loading import Loaded
from sekha.pauses import Pauses
from sekha.price_map import PriceMap
from sekha.providers.base import Provider
from sekha.rates import Minutes, ProviderRates
from sekha.registry import ProviderSpec, Registry
from sekha.routing import Conditions, Estimates, Plan, Rules
from sekha.vectors.base import VectorStore

__all__ = ["WALL", "Resources", "breaker_rules", "ledger_url", "utc_now"]

WALL = Clock(now=time.monotonic, sleep=asyncio.sleep, random=random.random)
PATIENT = Retries()
WARN_SECONDS = 60.0
"""Between two warnings of the same about one model."""
_NONE_OPEN: frozenset[str] = frozenset()
_NONE_THROTTLED: Mapping[str, float] = {}
log = logging.getLogger("sekha.money")


def utc_now() -> datetime:
    return datetime.now(UTC)


class Resources:
    """Opens each thing with its first use: a chat needs no vector store, a search no chat provider."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        clock: Clock = WALL,
        retries: Retries = PATIENT,
        now: Callable[[], datetime] = utc_now,
        open_provider: Callable[[ProviderSpec], Provider] | None = None,
        ledger: Ledger | None = None,
        circuits: Circuits | None = None,
        minutes: Minutes | None = None,
    ) -> None:
        """`open_provider` opens providers of your own making; left out, those that the file can name.

        `ledger` is used in place of the file's, and closed with the rest. Without `circuits` every call
        is tried: one that a person waits for alone has no others to spare. `minutes` have what
        passed of the providers' limits before.
        """
        self.loaded = loaded
        self.registry = Registry.from_config(loaded.config, PriceMap.bundled())
        self.budgets = _budgets(loaded.config, self.registry)
        self.rules = _rules(loaded.config)
        self.clock = clock
        self.retries = retries
        self.now = now
        self._open_provider = open_provider
        self._providers: dict[str, Provider] = {}
        self._store: VectorStore | None = None
        self._ledger: Ledger | None = ledger
        self.circuits = circuits
        self.rates = ProviderRates(self.registry, clock=clock.now, minutes=minutes)
        self._limited = bool(self.rates)
        self.pauses = Pauses(clock=clock.now)
        self.latencies = Latencies(clock=clock.now)
        self.when_passed: Callable[[str, str], None] | None = None
        """Told the provider and the model whenever a call cost more than its worst case."""
        self._warned_at: dict[str, float] = {}
        self._opening = asyncio.Lock()
        memory = loaded.config.memory
        declared = (*self.registry.collections, *([memory.collection] if memory is not None else []))
        self.indexes = Indexes(self.store, now=clock.now, declared=declared)

    async def store(self) -> VectorStore:
        async with self._opening:
            if self._store is None:
                from sekha.vectors.opening import open_store

                self._store = await open_store(self.loaded)
            return self._store

    async def ledger(self) -> Ledger:
        if self._ledger is None:
            from sekha.ledgers import open_ledger

            self._ledger = open_ledger(ledger_url(self.loaded))
        return self._ledger

    def provider(self, provider_id: str) -> Provider:
        if provider_id not in self._providers:
            if self._open_provider is None:
                from sekha.providers.opening import open_provider

                self._open_provider = open_provider
            self._providers[provider_id] = self._open_provider(self.registry.providers[provider_id])
        return self._providers[provider_id]

    def conditions(self, estimates: Estimates) -> Conditions:
        """What is shut or slow just now for a request of this size."""
        return Conditions(
            _NONE_OPEN if self.circuits is None else self.circuits.open_now,
            self.rates.throttled(estimates.tokens_at_once) if self._limited else _NONE_THROTTLED,
            self.latencies.seconds(),
            self.clock.random(),
            self.pauses.now(),
            _NONE_OPEN if self.circuits is None else self.circuits.half_open,
        )

    def go_on_from(self, before: Resources) -> None:
        """Leave alone whoever asked for it under the configuration before, where it is reached as it was then."""
        for model in self.registry:
            spec, known = self.registry.provider_of(model), before.registry.providers.get(model.provider_id)
            # Whoever changed the address or the key wants it tried.
            if known is None or (known.kind, known.base_url, known.api_key) != (spec.kind, spec.base_url, spec.api_key):
                continue
            if seconds := before.pauses.wait(model.name):
                self.pauses.note(model.name, seconds)

    def worst_case_passed(self, provider_id: str, model_id: str, cost: Decimal, worst_case: Decimal) -> None:
        """Tell that a call cost more than was held for it, so that no cap or budget is passed unseen.

        Each is counted, and each model's first in a minute is logged: as a rule, all of its calls are alike.
        """
        now, name = self.clock.now(), f"{provider_id}/{model_id}"
        if self.when_passed is not None:
            self.when_passed(provider_id, model_id)
        if now - self._warned_at.get(name, -math.inf) < WARN_SECONDS:
            return
        self._warned_at[name] = now
        log.warning(
            "%s/%s billed %s, and %s was its worst case. It counts or prices otherwise than is known here: "
            "compare its bill with `price:`, `context_window:` and `max_output_tokens:` in sekha.yaml.",
            provider_id,
            model_id,
            dollars(cost),
            dollars(worst_case),
        )

    def patience_seconds(self, chosen: Plan) -> float:
        """How long one request may take, all attempts together."""
        # Twice the slowest, so that one provider that hangs leaves time to ask the next.
        providers, longest = self.registry.providers, 0.0
        for each in chosen.candidates:
            longest = max(longest, providers[each.model.provider_id].timeout_seconds)
        return 2 * longest

    async def aclose(self) -> None:
        providers, self._providers = self._providers, {}
        store, self._store = self._store, None
        ledger, self._ledger = self._ledger, None
        # Each is closed even when another fails to; the ledger last, since what closes may still charge,
        # and the circuits before it, since they are kept in its database.
        async with AsyncExitStack() as closing:
            for each in (ledger, self.circuits, store, *providers.values()):
                if each is not None:
                    closing.push_async_callback(each.aclose)


def _budgets(config: Config, registry: Registry) -> tuple[Budget, ...]:
    return tuple(
        Budget(
            name=section.name, limit=section.limit, period=section.period, match=_charged_to(section.match, registry)
        )
        for section in config.budgets
    )


def _charged_to(match: Mapping[Any, str], registry: Registry) -> dict[str, str]:
    """The match in the ledger's words, which has a provider and its model apart."""
    found = {str(what): wanted for what, wanted in match.items()}
    asked, named = found.get("provider"), found.get("model")
    models = [model for model in registry.models if asked in (None, model.provider_id)]
    # One that is an id as well is refused when the file is read.
    if named is not None and all(model.id != named for model in models):
        for model in models:
            if model.name == named:
                return {**found, "provider": model.provider_id, "model": model.id}
    return found


def _rules(config: Config) -> Rules:
    routing = config.routing
    return Rules(
        auto_fallback=routing.auto_fallback,
        cost_aware=routing.cost_aware,
        max_cost_per_request=routing.max_cost_per_request,
    )


def breaker_rules(config: Config) -> BreakerRules:
    section = config.routing.circuit_breaker
    return BreakerRules(
        failure_threshold=section.failure_threshold,
        timeout_seconds=section.timeout_secs,
        success_threshold=section.success_threshold,
    )


def ledger_url(loaded: Loaded) -> str:
    """The ledger's address, a file's path made absolute."""
    url = loaded.config.ledger.url
    if not url.startswith("sqlite:///"):
        return url
    return f"sqlite:///{loaded.path(url.removeprefix('sqlite:///'))}"
