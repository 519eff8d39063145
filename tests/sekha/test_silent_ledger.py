"""A PostgreSQL server that no longer answers, and refuses nobody either: stopped, or behind a network that swallows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TypeAlias, TypeVar

import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.circuits_shared import SharedCircuits
from sekha.errors import LedgerUnavailable, ProviderTimeout
from sekha.ledger import Budget, Ledger, Scope, Spend
from sekha.ledgers import open_ledger
from sekha.ledgers.database import Transaction
from sekha.ledgers.leased import LeasedLedger
from sekha.ledgers.postgres import PostgresDatabase
from sekha.ledgers.sql import SqlLedger
from sekha.pricing import Usage

T = TypeVar("T")
Silenced: TypeAlias = Callable[[], AbstractContextManager[None]]
NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
TEAM = Budget(name="team", limit=Decimal(1000), period="day")
SCOPE = Scope(provider="p", model="m")
COST = Decimal("0.01")
ANSWER = 1.0
CONNECT = 5.0
"""Seconds that a new connection is waited for."""
WITHIN = CONNECT + ANSWER + 0.5
"""Seconds in which whoever asks is told."""


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    return tmp_path / "journals"


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spend() -> Spend:
    return Spend(scope=SCOPE, cost=COST, estimated=COST, usage=Usage(), at=NOW)


async def one_call(ledger: Ledger) -> None:
    hold = await ledger.reserve([TEAM], {"team": COST}, at=NOW, ttl_seconds=60, scope=SCOPE)
    await ledger.settle(hold, spend())


def leased(place: str | PostgresDatabase, journals: Path) -> LeasedLedger:
    database = place if isinstance(place, PostgresDatabase) else PostgresDatabase(place, answer_seconds=ANSWER)
    return LeasedLedger(SqlLedger(database), journals, clock=lambda: NOW, behind_seconds=2, answer_seconds=ANSWER)


async def on_record(url: str) -> tuple[int, Decimal, Decimal]:
    """Calls and their cost by the report, and the cost by the budget, as any other process reads them."""
    ledger = open_ledger(url)
    try:
        report = await ledger.report("provider")
        spent, _ = await ledger.spent(TEAM, at=NOW)
    finally:
        await ledger.aclose()
    return sum(line.calls for line in report), sum((line.cost for line in report), Decimal(0)), spent


async def all_on_record(url: str, calls: int) -> None:
    wanted = (calls, calls * COST, calls * COST)
    async with asyncio.timeout(20):
        while await on_record(url) != wanted:  # noqa: ASYNC110 - a database has no event
            await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    assert await on_record(url) == wanted


@dataclass
class Load:
    """Many who call, on and on."""

    answered: int = 0
    refused: int = 0
    slowest: float = 0.0


@asynccontextmanager
async def under_load(ledger: Ledger) -> AsyncIterator[Load]:
    load = Load()

    async def on_and_on() -> None:
        while True:
            began = monotonic()
            try:
                await one_call(ledger)
                load.answered += 1
            except LedgerUnavailable:
                load.refused += 1
            load.slowest = max(load.slowest, monotonic() - began)
            await asyncio.sleep(0.02)

    callers = [asyncio.create_task(on_and_on()) for _ in range(8)]
    try:
        yield load
    finally:
        for caller in callers:
            caller.cancel()
        for caller in callers:
            with suppress(asyncio.CancelledError):
                await caller


async def test_whoever_asks_a_silent_server_is_told_within_seconds_and_it_is_used_again_when_it_is_back(
    postgres_url: str, silenced: Silenced
) -> None:
    ledger = SqlLedger(PostgresDatabase(postgres_url, answer_seconds=ANSWER))
    # With as many connections as it makes, each of which is silent then.
    await asyncio.gather(*(one_call(ledger) for _ in range(20)))
    settling = spend()
    hold = await ledger.reserve([TEAM], {"team": COST}, at=NOW, ttl_seconds=60)

    with silenced():
        for ask in (partial(ledger.settle, hold, settling), partial(ledger.report, "day"), partial(one_call, ledger)):
            began = monotonic()
            with pytest.raises(LedgerUnavailable):
                await ask()
            assert monotonic() - began < WITHIN
    await ledger.settle(hold, settling)
    await ledger.aclose()

    assert await on_record(postgres_url) == (21, 21 * COST, 21 * COST)


async def test_a_ledger_that_is_closed_in_the_middle_of_a_long_report_does_not_wait_for_a_silent_server(
    postgres_url: str, silenced: Silenced
) -> None:
    database = PostgresDatabase(postgres_url, answer_seconds=ANSWER)
    ledger = SqlLedger(database)
    await one_call(ledger)

    with ExitStack() as until_silent:

        def report(transaction: Transaction) -> None:
            transaction.take_long(60)
            until_silent.enter_context(silenced())
            transaction.rows("SELECT 1")

        reading = database.read(report)
        await asyncio.sleep(0.3)
        began = monotonic()
        await ledger.aclose()

        assert monotonic() - began < WITHIN
        assert isinstance(reading.exception(), LedgerUnavailable)


async def test_what_takes_long_is_waited_for_where_it_says_so(postgres_url: str) -> None:
    database = PostgresDatabase(postgres_url, answer_seconds=0.5)

    def sleeps(transaction: Transaction, *, long: bool) -> None:
        if long:
            transaction.take_long(20)
        transaction.rows("SELECT pg_sleep(1)")

    await asyncio.wrap_future(database.read(partial(sleeps, long=True)))
    with pytest.raises(LedgerUnavailable, match="timeout"):
        # It ran on the same connection, which is as impatient again as it was.
        await asyncio.wrap_future(database.read(partial(sleeps, long=False)))
    await asyncio.to_thread(database.close)


async def test_circuits_go_on_alone_while_the_server_is_silent_and_agree_again(
    postgres_url: str, silenced: Silenced
) -> None:
    rules = BreakerRules(failure_threshold=2, timeout_seconds=60, success_threshold=1)
    databases = [PostgresDatabase(postgres_url, answer_seconds=ANSWER) for _ in range(2)]
    one, other = (Circuits(rules, shared=SharedCircuits(each)) for each in databases)
    await asyncio.wrap_future(databases[0].read(lambda _: None))  # the ledger is there before its circuits
    for each in (one, other):
        await each.start()

    with silenced():
        await asyncio.sleep(2 * ANSWER)
        for _ in range(2):
            one.note("p/m", ProviderTimeout("it took too long", provider_id="p", model_id="m"))
        alone = one.admit("p/m"), other.admit("p/m")
        began = monotonic()
        with pytest.raises(LedgerUnavailable):
            await asyncio.wrap_future(SharedCircuits(databases[0]).exchange([], 0))
        assert monotonic() - began < WITHIN
    async with asyncio.timeout(20):
        while other.admit("p/m"):  # noqa: ASYNC110 - a database has no event
            await asyncio.sleep(0.05)

    assert alone == (False, True)
    for each in (one, other):
        await each.aclose()
    for database in databases:
        await asyncio.to_thread(database.close)


async def test_calls_go_on_from_slices_for_a_while_then_are_refused_at_once_and_each_is_recorded_once(
    postgres_url: str, journals: Path, silenced: Silenced, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = leased(postgres_url, journals)
    await one_call(ledger)

    async with under_load(ledger) as load:
        await asyncio.sleep(1)
        with silenced():
            before = load.answered
            await asyncio.sleep(1.5)
            meanwhile, load.refused = load.answered, 0
            await asyncio.sleep(4)
            went_on, answered = meanwhile - before, load.answered
            await asyncio.sleep(2)
            refused_alone = load.answered == answered and load.refused > 0
            began = monotonic()
            with pytest.raises(LedgerUnavailable):
                await ledger.report("day")
            asked = monotonic() - began
            slowest = load.slowest
        async with asyncio.timeout(20):
            while load.answered == answered:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
    await all_on_record(postgres_url, 1 + load.answered)
    await ledger.aclose()

    assert went_on > 20
    assert refused_alone
    assert asked < 2 * ANSWER
    assert slowest < 2 * ANSWER
    assert [each.message for each in caplog.records if "journal alone" in each.message] != []
    assert "is back" in caplog.text


class SilentAtCommit(PostgresDatabase):
    """Whose server falls silent once, between the last statement that records something and its COMMIT."""

    def __init__(self, url: str, silence: Callable[[], None]) -> None:
        super().__init__(url, answer_seconds=ANSWER)
        self.armed = False
        self._silence = silence

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        def then_silent(transaction: Transaction) -> T:
            result = work(transaction)
            if durable and self.armed:
                self.armed = False
                self._silence()
            return result

        return super().write(then_silent, durable=durable)


@pytest.mark.parametrize("closed", [False, True])
async def test_a_commit_whose_end_nobody_knows_is_recorded_once(
    postgres_url: str, journals: Path, silenced: Silenced, closed: bool
) -> None:
    with ExitStack() as until_silent:
        database = SilentAtCommit(postgres_url, lambda: until_silent.enter_context(silenced()))
        ledger = leased(database, journals)
        await one_call(ledger)
        await ledger.report("day")
        database.armed = True
        for _ in range(10):
            await one_call(ledger)
        async with asyncio.timeout(10):
            while database.armed:  # noqa: ASYNC110 - a thread tells
                await asyncio.sleep(0.01)
        if closed:
            began = monotonic()
            await ledger.aclose()
            assert monotonic() - began < 2 * WITHIN
            assert listed(journals) != []
        else:
            await asyncio.sleep(1.5 * ANSWER)
            with pytest.raises(LedgerUnavailable):
                await ledger.recorded()
    if closed:
        ledger = leased(postgres_url, journals)
        await ledger.recorded()

    await all_on_record(postgres_url, 11)
    await ledger.aclose()
    assert listed(journals) == []
