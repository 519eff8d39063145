"""From a configuration to what the gateway serves with."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sekha.circuits import Circuits
from sekha.circuits_shared import SharedCircuits
from sekha.errors import ConfigError, LedgerError, LedgerUnavailable, Problem, UnknownModel
from sekha.gateway.metrics import Metrics
from sekha.gateway.news import tell_of_circuit
from sekha.gateway.serving import Serving
from sekha.ledgers import lease_from, open_database
from sekha.ledgers.sql import SqlLedger
from sekha.loading import Loaded
from sekha.rates import Minutes
from sekha.registry import Registry
from sekha.resources import Resources, breaker_rules, ledger_url

if TYPE_CHECKING:
    from sekha.gateway.remembering import Remembering
    from sekha.recording.recorder import Recorder

__all__ = ["open_serving", "state_folder"]

log = logging.getLogger("sekha.gateway")

PUBLISH_AFTER_SECONDS = 1.0
"""The first callers need the core more: until then what is recorded waits in the spool."""

ANSWER_SECONDS = 1.0
"""A ledger that says what is wrong with it does so within these."""


def state_folder(loaded: Loaded) -> Path:
    """Where a gateway keeps what it must not forget: journals, the spool, the outbox."""
    return loaded.path(".sekha/gateway")


async def open_serving(
    loaded: Loaded, metrics: Metrics, *, workers: int = 1, minutes: Minutes | None = None
) -> Serving:
    """Open what the configuration declares. Providers and store connect with their first use, the ledger behind.

    `minutes` have what passed of every limit under the configuration before. Raises the `LedgerError` of a ledger that
    cannot be one; one that is away may come back, and is not waited for.
    """
    state = state_folder(loaded)
    recorder = _recorder(loaded, state / "recording", workers)
    url = ledger_url(loaded)
    database = open_database(url)
    circuits = Circuits(breaker_rules(loaded.config), shared=SharedCircuits(database))
    shared = SqlLedger(database)
    ledger = lease_from(shared, url, state / "journal")
    resources = Resources(loaded, ledger=ledger, circuits=circuits, minutes=minutes)
    circuits.subscribe(partial(tell_of_circuit, recorder, resources.registry, circuits, resources.latencies))
    memory = _memory(loaded, resources.registry, state / "memory")
    answering = asyncio.ensure_future(shared.answer())
    await circuits.start()
    try:
        await _check(answering)
    except LedgerError:
        await resources.aclose()
        raise
    await recorder.start()
    serving = Serving(resources, metrics, recorder=recorder, memory=memory, leased=ledger, minutes=minutes)
    if memory is not None:
        memory.start(serving)
    try:
        ledger.start()
    except LedgerError as error:
        # Whoever asks for what costs money is told, and it is tried again for each.
        log.warning("%s", error)
    return serving


async def _check(answering: asyncio.Future[None]) -> None:
    await asyncio.wait([answering], timeout=ANSWER_SECONDS)
    if not answering.done():
        answering.cancel()
    elif isinstance(error := answering.exception(), LedgerError) and not isinstance(error, LedgerUnavailable):
        raise error


def _recorder(loaded: Loaded, folder: Path, workers: int) -> Recorder:
    from sekha.recording.recorder import Recorder

    try:
        return Recorder(loaded.config.recording, folder, processes=workers, publish_after_seconds=PUBLISH_AFTER_SECONDS)
    except OSError as error:
        problem = (
            f"{folder} cannot be written: {error.strerror}. The gateway keeps there what it must not forget. Name "
            "another folder as `SEKHA_HOME`, or make this one writable."
        )
        raise ConfigError(loaded.source, [Problem("", problem)]) from error


def _memory(loaded: Loaded, registry: Registry, folder: Path) -> Remembering | None:
    section = loaded.config.memory
    if section is None:
        return None
    from sekha.gateway.remembering import Remembering

    try:
        registry.space(section.collection)
        return Remembering(folder, section.collection)
    except UnknownModel as error:
        problem = f"there is no model to embed {section.collection!r} with. {error}"
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}. Memory is written down there before it is kept."
    raise ConfigError(loaded.source, [Problem("memory", problem)])
