"""A ledger that spends slices of budgets in memory: what it promises beyond `tests/contracts/test_ledger.py`."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import psycopg
import pytest
import uvloop

from sekha.errors import BudgetExceeded, LedgerUnavailable
from sekha.ledger import Budget, Hold, Ledger, Scope, Spend
from sekha.ledgers import open_database, open_leased, open_ledger
from sekha.ledgers.database import Database, Transaction
from sekha.ledgers.leased import LeasedLedger
from sekha.ledgers.sql import SqlLedger
from sekha.ledgers.sqlite import SqliteDatabase
from sekha.pricing import Usage
from tests.fixtures.full import room_for

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SPENDER = ROOT / "tests" / "fixtures" / "spender.py"
NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
TEAM = Budget(name="team", limit=Decimal("2.00"), period="day")
SCOPE = Scope(provider="openai", model="openai/m", task="chat_small", key="research", tags=frozenset({"eval"}))


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    return tmp_path / "journals"


Open = Callable[[], LeasedLedger]


@pytest.fixture
async def opened(url: str, journals: Path, clock: Clock) -> AsyncIterator[Open]:
    """Opens a ledger as one more process would."""
    ledgers: list[LeasedLedger] = []

    def open_it() -> LeasedLedger:
        ledgers.append(leased(url, journals, clock=clock))
        return ledgers[-1]

    yield open_it
    for ledger in ledgers:
        await ledger.aclose()


@pytest.fixture
async def shared(url: str) -> AsyncIterator[Ledger]:
    """What is on record for every process."""
    ledger = open_ledger(url)
    yield ledger
    await ledger.aclose()


def leased(place: str | Database, journals: Path, **options: Any) -> LeasedLedger:
    """A ledger as one more process would open it, under a clock that stands."""
    database = open_database(place) if isinstance(place, str) else place
    return LeasedLedger(SqlLedger(database), journals, **{"clock": lambda: NOW, **options})


async def recover(url: str, journals: Path) -> tuple[Decimal, Decimal]:
    """Let one more process finish what was left behind; what it finds spent and held."""
    survivor = leased(url, journals)
    found = await survivor.spent(TEAM, at=NOW)
    await survivor.aclose()
    return found


def spend(cost: str, *, at: datetime = NOW, scope: Scope = SCOPE, output_tokens: int = 0) -> Spend:
    usage = Usage(output_tokens=output_tokens)
    return Spend(scope=scope, cost=Decimal(cost), estimated=Decimal(cost), usage=usage, at=at)


async def reserve(ledger: Ledger, amount: str, budget: Budget = TEAM, *, at: datetime = NOW) -> Hold:
    return await ledger.reserve([budget], {budget.name: Decimal(amount)}, at=at, ttl_seconds=60, scope=SCOPE)


def at_once(work: Coroutine[object, None, T]) -> T:
    """Run something that never waits; fails if it does."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # what the coroutine returned
    work.close()
    raise AssertionError("it waited")


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    """What a ledger in a file has on record."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return connection.execute(sql).fetchall()


def decimals(*amounts: str) -> tuple[Decimal, ...]:
    return tuple(Decimal(amount) for amount in amounts)


async def until(ledger: Ledger, spent: str, held: str, *, budget: Budget = TEAM, at: datetime = NOW) -> None:
    """Wait for what is done in the background."""
    async with asyncio.timeout(20):
        while await ledger.spent(budget, at=at) != decimals(spent, held):  # noqa: ASYNC110 - the database has no event
            await asyncio.sleep(0.01)


# --- without waiting -----------------------------------------------------------------------


async def test_a_call_is_paid_for_from_a_slice_without_waiting(opened: Open) -> None:
    ledger = opened()
    wide = Budget(name="wide", limit=Decimal(10))
    amounts = {"team": Decimal("0.01"), "wide": Decimal("0.01")}
    await ledger.settle(await ledger.reserve([TEAM, wide], amounts, at=NOW, ttl_seconds=60), spend("0.01"))
    await ledger.spent(TEAM, at=NOW)

    hold = at_once(ledger.reserve([TEAM, wide], amounts, at=NOW, ttl_seconds=60))
    at_once(ledger.charge(hold, spend("0.002")))
    held = at_once(ledger.spent(TEAM, at=NOW))
    at_once(ledger.settle(hold, spend("0.003")))
    at_once(ledger.release(at_once(ledger.reserve([TEAM], amounts, at=NOW, ttl_seconds=60))))
    settled = at_once(ledger.spent(TEAM, at=NOW))

    assert held == decimals("0.012", "0.008")
    assert settled == decimals("0.015", "0")


async def test_what_is_idle_in_the_own_slice_is_left_to_spend(opened: Open, shared: Ledger) -> None:
    ledger = opened()

    await ledger.settle(await reserve(ledger, "0.10"), spend("0.05"))

    await until(shared, "0.05", "0")
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.05", "0")


async def test_what_was_spent_reaches_the_shared_ledger_by_itself(opened: Open, shared: Ledger) -> None:
    ledger = opened()
    hold = await reserve(ledger, "0.50")

    for _ in range(1_200):
        at_once(ledger.charge(hold, spend("0.0001")))

    await until(shared, "0.12", "0.38")


class Counted:
    """A database that counts the commits that wait for the disk."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.durable = 0

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        self.durable += durable
        return self._database.write(work, durable=durable)

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._database.read(work)

    def close(self) -> None:
        self._database.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_beat_commits_what_was_spent_once(
    run: Callable[[Coroutine[object, None, float]], float], url: str, journals: Path
) -> None:
    # A loop that counts milliseconds wakes its timers up to one too early, most of all when it is busy.
    async def commits_a_beat() -> float:
        database = Counted(open_database(url))
        ledger = leased(database, journals)
        hold = await reserve(ledger, "0.50")
        began = monotonic()
        while monotonic() < began + 4.2:
            await ledger.charge(hold, spend("0.000001"))
            await asyncio.sleep(0.0005)
        counted = database.durable * 0.5 / (monotonic() - began)
        await ledger.aclose()
        return counted

    assert 0 < run(commits_a_beat()) < 1.2


async def test_the_usual_reply_is_remembered(opened: Open) -> None:
    ledger = opened()
    hold = await ledger.reserve([], {}, at=NOW, ttl_seconds=60)
    for _ in range(10):
        at_once(ledger.charge(hold, spend("0", output_tokens=7)))

    assert await ledger.usual_output_tokens("openai", "openai/m") == 7
    assert at_once(ledger.usual_output_tokens("openai", "openai/m")) == 7


async def test_of_very_many_replies_at_once_the_last_stand_for_all(opened: Open) -> None:
    ledger = opened()
    hold = await ledger.reserve([], {}, at=NOW, ttl_seconds=60)
    for at in range(300):
        at_once(ledger.charge(hold, spend("0", output_tokens=9_000 if at < 280 else 7)))

    assert await ledger.usual_output_tokens("openai", "openai/m") == 7


async def test_a_report_knows_all_that_was_spent_here(opened: Open) -> None:
    ledger = opened()

    at_once(ledger.settle(await reserve(ledger, "0.50"), spend("0.25")))

    assert [(line.group, line.cost) for line in await ledger.report("key")] == [("research", Decimal("0.25"))]


async def test_calls_of_one_scope_and_minute_are_kept_in_one_row_and_reported_each(
    opened: Open, url: str, shared: Ledger
) -> None:
    ledger = opened()
    hold = await reserve(ledger, "1.00")

    for n in range(100):
        at_once(ledger.charge(hold, spend("0.001", at=NOW + timedelta(seconds=n), output_tokens=2)))
        if n % 40 == 0:
            await ledger.report("day")
    [line] = await ledger.report("tag")

    assert (line.group, line.calls, line.cost, line.output_tokens) == ("eval", 100, Decimal("0.1"), 200)
    assert rows(url, "SELECT calls FROM ledger_spends ORDER BY at") == [(60,), (40,)]
    assert await shared.report("day", since=NOW + timedelta(seconds=60)) != []


@pytest.mark.parametrize("held_again", [False, True])
async def test_what_was_charged_by_a_holds_name_long_ago_is_not_recorded_again_when_it_is_settled(
    opened: Open, held_again: bool
) -> None:
    ledger = opened()
    hold, other = await reserve(ledger, "1.00"), await reserve(ledger, "0.50")
    once = replace(spend("0.30"), id=hold.id)
    at_once(ledger.charge(other if held_again else hold, once))

    for _ in range(10_001):
        at_once(ledger.charge(other, spend("0.00001")))
    at_once(ledger.settle(hold, once))
    [line] = await ledger.report("day")

    assert (line.calls, line.cost) == (10_002, Decimal("0.40001"))


async def test_calls_counted_by_us_are_kept_apart(opened: Open, url: str) -> None:
    ledger = opened()
    hold = await reserve(ledger, "1.00")

    for counted in (True, False, True):
        usage = Usage(input_tokens=5, counted=counted)
        at_once(ledger.charge(hold, Spend(scope=SCOPE, cost=Decimal(0), estimated=Decimal(0), usage=usage, at=NOW)))
    await ledger.report("day")

    assert rows(url, "SELECT counted, calls, input_tokens FROM ledger_spends ORDER BY counted") == [
        (0, 1, 5),
        (1, 2, 10),
    ]


async def test_costs_and_tokens_beyond_all_measure_stop_nobody(opened: Open) -> None:
    ledger = opened()
    hold = await reserve(ledger, "1.00")
    absurd = Usage(input_tokens=2**70, output_tokens=2**62)

    for _ in range(2):
        at_once(
            ledger.charge(hold, Spend(scope=SCOPE, cost=Decimal(10) ** 6, estimated=Decimal(1), usage=absurd, at=NOW))
        )
        await ledger.report("day", since=NOW + timedelta(seconds=1))

    assert (await ledger.spent(TEAM, at=NOW))[0] == 2 * Decimal(10) ** 6


# --- several processes ---------------------------------------------------------------------


async def test_money_that_lies_idle_in_another_process_is_given_back_before_anybody_is_refused(opened: Open) -> None:
    one, other = opened(), opened()
    await one.release(await reserve(one, "1.00"))

    hold = await reserve(other, "2.00")

    assert hold.amounts == {"team": Decimal("2.00")}


async def test_a_busy_process_gives_back_what_its_calls_do_not_need(opened: Open) -> None:
    busy, other = opened(), opened()

    async def on_and_on() -> None:
        while True:
            with suppress(BudgetExceeded):
                await busy.release(await reserve(busy, "0.001"))
            await asyncio.sleep(0.01)

    await busy.release(await reserve(busy, "1.00"))
    going_on = asyncio.create_task(on_and_on())
    await reserve(other, "1.99")

    going_on.cancel()
    await asyncio.wait([going_on])


async def test_money_that_another_process_needs_for_its_calls_is_not_given_back(opened: Open) -> None:
    one, other = opened(), opened()
    await reserve(one, "1.00")

    with pytest.raises(BudgetExceeded) as refused:
        await reserve(other, "1.50")

    assert refused.value.remaining <= Decimal("1.00")
    await reserve(other, "1.00")


async def test_a_process_that_does_nothing_keeps_nothing(opened: Open, shared: Ledger) -> None:
    ledger = opened()
    await ledger.release(await reserve(ledger, "0.01"))

    async with asyncio.timeout(10):
        while True:
            with suppress(BudgetExceeded):
                # A ledger without slices waits for nobody.
                await reserve(shared, "2.00")
                return
            await asyncio.sleep(0.1)


async def test_spending_of_other_processes_is_seen_within_a_second(opened: Open, shared: Ledger) -> None:
    ledger = opened()
    await ledger.spent(TEAM, at=NOW)

    await shared.settle(await reserve(shared, "0.75"), spend("0.75"))

    await until(ledger, "0.75", "0")


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_a_crowd_in_four_processes_spends_a_budget_to_its_end_and_never_beyond(
    request: pytest.FixtureRequest, url: str, journals: Path, database: str
) -> None:
    if database == "postgres":
        url = request.getfixturevalue("postgres_url")
    shared = open_ledger(url)
    await shared.settle(await reserve(shared, "1.00"), spend("1.00"))
    with ExitStack() as processes:
        crowds = [processes.enter_context(spender(url, "crowd", journals)) for _ in range(4)]
        for crowd in crowds:
            assert line_of(crowd) == "ready"
        for crowd in crowds:
            tell(crowd)
        calls = sum(int(line_of(crowd)) for crowd in crowds)

    spent, held = await shared.spent(TEAM, at=NOW)
    await shared.aclose()

    assert held == 0
    assert spent == 1 + calls * Decimal("0.004")
    # Who is refused does not ask again, so what the last calls did not need after all may be left.
    assert Decimal("1.95") <= spent <= 2
    assert listed(journals) == []


# --- dying ---------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_what_a_killed_process_spent_is_recorded_and_its_calls_are_charged_at_their_worst_case(
    request: pytest.FixtureRequest, url: str, journals: Path, clock: Clock, database: str
) -> None:
    if database == "postgres":
        url = request.getfixturevalue("postgres_url")
    with spender(url, "hold", journals) as process:
        assert [line_of(process), line_of(process)] == ["charged", "charged"]
        os.kill(process.pid, signal.SIGKILL)

    survivors = [leased(url, journals, clock=clock) for _ in range(2)]
    for ledger in survivors:
        await until(ledger, "1.00", "0")
    with pytest.raises(BudgetExceeded):
        await reserve(survivors[0], "1.01")
    report = await survivors[0].report("day")

    assert [(line.calls, line.cost) for line in report] == [(3, Decimal("1.00"))]
    for ledger in survivors:
        await ledger.aclose()


async def test_what_a_killed_process_left_is_recorded_by_one_that_nobody_asks_once_the_ledger_is_there(
    tmp_path: Path, journals: Path, shared: Ledger
) -> None:
    path = tmp_path / "ledger.db"
    with spender(f"sqlite:///{path}", "hold", journals) as process:
        assert [line_of(process), line_of(process)] == ["charged", "charged"]
        os.kill(process.pid, signal.SIGKILL)

    survivor = leased(impatient(path), journals)
    with away(path):
        survivor.start()
        async with asyncio.timeout(10):
            while survivor.away is None:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.01)

    await until(shared, "1.00", "0")
    await survivor.aclose()


async def test_one_that_nobody_asked_ends_without_the_shared_ledger_and_leaves_nothing(
    tmp_path: Path, journals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = leased(SqliteDatabase(str(tmp_path)), journals)  # a folder, which is no database
    ledger.start()
    await asyncio.sleep(0)

    await ledger.aclose()

    assert (listed(journals), caplog.messages) == ([], [])


async def test_the_worst_case_is_charged_where_the_call_was_made_and_marked(
    url: str, journals: Path, opened: Open, tmp_path: Path
) -> None:
    dying = opened()
    narrow = Budget(name="narrow", limit=Decimal(5), match={"key": "research"})
    other = Budget(name="other", limit=Decimal(5), match={"provider": "anthropic"})
    amounts = {"team": Decimal("0.50"), "narrow": Decimal("0.50"), "other": Decimal("0.20")}
    hold = await dying.reserve([TEAM, narrow, other], amounts, at=NOW, ttl_seconds=60, scope=SCOPE)
    await dying.charge(hold, spend("0.10"))
    left_behind = copied(journals, tmp_path / "left behind")
    await dying.release(hold)

    ledger = leased(url, left_behind)
    figures = [(await ledger.spent(budget, at=NOW))[0] for budget in (narrow, other)]
    await ledger.aclose()

    assert figures == [Decimal("0.70"), Decimal("0.20")]
    assert rows(url, "SELECT id, provider, model, cost, counted FROM ledger_spends ORDER BY cost")[1:] == [
        (f"{hold.id}/1", "anthropic", None, 200_000_000_000, 1),
        (hold.id, "openai", "openai/m", 400_000_000_000, 1),
    ]


@pytest.mark.parametrize("cut", [2, 20, 250])
async def test_a_line_that_was_never_finished_hides_no_other(
    url: str, journals: Path, tmp_path: Path, cut: int
) -> None:
    dying = leased(url, journals)
    hold = await reserve(dying, "1.00")
    at_once(dying.charge(hold, spend("0.10")))
    at_once(dying.settle(hold, spend("0.20")))
    left_behind = copied(journals, tmp_path / "left behind", without=cut)
    await dying.aclose()

    assert await recover(f"sqlite:///{tmp_path}/new.db", left_behind) == decimals("1.00", "0")


async def test_a_journal_is_finished_once_however_often_it_is_found(url: str, journals: Path, tmp_path: Path) -> None:
    dying = leased(url, journals)
    await reserve(dying, "0.30")
    at_once(dying.settle(await reserve(dying, "0.20"), spend("0.15")))
    copies = [copied(journals, tmp_path / name) for name in ("first", "second")]
    await dying.aclose()

    for folder in copies:
        await recover(f"sqlite:///{tmp_path}/new.db", folder)
        assert listed(folder) == []

    shared = open_ledger(f"sqlite:///{tmp_path}/new.db")
    assert await shared.spent(TEAM, at=NOW) == decimals("0.45", "0")
    await shared.aclose()


async def test_what_is_on_record_is_not_recorded_again_from_the_journal(
    url: str, journals: Path, tmp_path: Path, shared: Ledger
) -> None:
    dying = leased(url, journals)
    hold = await reserve(dying, "1.00")
    at_once(dying.charge(hold, spend("0.10")))
    await dying.report("day")
    at_once(dying.charge(hold, spend("0.20")))
    left_behind = copied(journals, tmp_path / "left behind")
    await dying.release(hold)
    at_once(dying.settle(await reserve(dying, "0.01"), spend("0.01")))
    await until(shared, "0.31", "0")
    later = copied(journals, tmp_path / "later")

    for folder in (later, left_behind):
        await recover(url, folder)
    await dying.aclose()

    # The rest of the hold is charged by the journal that ends while it was open.
    assert await shared.spent(TEAM, at=NOW) == decimals("1.01", "0")
    assert [line.calls for line in await shared.report("day")] == [4]


class HeldBack:
    """A database whose durable work is done and not committed until `may_commit`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.done = threading.Event()
        self.may_commit = threading.Event()
        self.may_commit.set()

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        def held_back(transaction: Transaction) -> T:
            result = work(transaction)
            if durable and not self.may_commit.is_set():
                self.done.set()
                self.may_commit.wait(20)
            return result

        return self._database.write(held_back, durable=durable)

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._database.read(work)

    def close(self) -> None:
        self._database.close()


@pytest.mark.parametrize("before", [0, 1])
async def test_what_a_dead_process_was_just_committing_is_waited_for_and_not_recorded_again(
    postgres_url: str, journals: Path, tmp_path: Path, before: int
) -> None:
    database = HeldBack(open_database(postgres_url))
    dying = leased(database, journals)
    hold = await reserve(dying, "1.00")
    for _ in range(before):
        at_once(dying.charge(hold, spend("0.10")))
        await dying.report("day")
    database.may_commit.clear()
    at_once(dying.charge(hold, spend("0.20")))
    assert await asyncio.to_thread(database.done.wait, 10)

    survivor = leased(postgres_url, copied(journals, tmp_path / "left behind"))
    recovered = asyncio.create_task(survivor.report("day"))
    await until_one_waits_for_another(postgres_url)
    database.may_commit.set()
    [line] = await recovered

    assert (line.calls, line.cost) == (before + 2, Decimal("1.00"))
    await survivor.aclose()
    await dying.aclose()


async def until_one_waits_for_another(url: str) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%ledger_journals%'"
    with psycopg.connect(url, autocommit=True) as connection:
        async with asyncio.timeout(10):
            while connection.execute(waiting).fetchone() == (0,):  # noqa: ASYNC110 - a database has no event
                await asyncio.sleep(0.01)


async def test_a_journal_of_the_sekha_before_is_finished(url: str, journals: Path, shared: Ledger) -> None:
    scope = '["openai","openai/m","chat_small","research","eval"]'
    records = [
        '["v",1,4]',
        '["p",0,"{}","day"]',
        f'["h","abc-1","2026-11-23T14:30:00+00:00",[[0,1000000000000]],{scope},false]',
        f'["c","abc-1","one","2026-11-23T14:30:00+00:00",{scope},100000000000,100000000000,5,7,0,0,0,false]',
        '["f",5]',
        f'["c","abc-1","two","2026-11-23T14:30:00+00:00",{scope},200000000000,100000000000,5,7,0,0,0,false]',
    ]
    leave_behind(journals, *records)

    await recover(url, journals)

    assert await shared.spent(TEAM, at=NOW) == decimals("0.90", "0")
    assert [line.calls for line in await shared.report("tag")] == [2]
    assert listed(journals) == []


def test_a_journal_of_a_newer_sekha_is_left_alone(url: str, journals: Path) -> None:
    leave_behind(journals, '["v",99,0]')

    async def work() -> None:
        ledger = leased(url, journals)
        await reserve(ledger, "0.10")
        await ledger.aclose()

    asyncio.run(work())

    assert listed(journals) == ["abc-000001.journal", "abc.lock"]


@pytest.mark.parametrize(
    ("database", "rounds"),
    [
        ("sqlite", 3),
        ("postgres", 3),
        pytest.param("sqlite", 25, marks=pytest.mark.soak),
        pytest.param("postgres", 25, marks=pytest.mark.soak),
    ],
)
async def test_processes_that_are_killed_again_and_again_record_no_less_than_they_spent_and_no_more_than_the_limit(
    request: pytest.FixtureRequest, url: str, journals: Path, tmp_path: Path, database: str, rounds: int
) -> None:
    if database == "postgres":
        url = request.getfixturevalue("postgres_url")
    bill, luck = tmp_path / "bill", random.Random(7)
    bill.touch()
    for _ in range(rounds):
        with ExitStack() as processes:
            storms = [processes.enter_context(spender(url, "storm", journals, bill)) for _ in range(3)]
            for storm in storms:
                assert line_of(storm) == "ready"
            for storm in storms:
                tell(storm)
            for storm in storms:
                enough = bill.stat().st_size + luck.randrange(200)
                while bill.stat().st_size < enough and storm.poll() is None:  # noqa: ASYNC110 - a file has no event
                    await asyncio.sleep(0.001)
                storm.kill()
    shared = open_ledger(url)
    recorded, _ = await shared.spent(TEAM, at=NOW)
    billed_before = billed(bill)
    with spender(url, "storm", journals, bill) as last:
        tell(last)
        assert [line_of(last), line_of(last)] == ["ready", "done"]
    spent, held = await shared.spent(TEAM, at=NOW)
    await shared.aclose()

    assert held == 0
    # Whoever was killed had spent something, and left something to the last.
    assert billed_before > 0
    assert recorded < TEAM.limit / 2 or rounds > 3
    assert billed(bill) <= spent <= TEAM.limit
    assert TEAM.limit - spent < Decimal("0.02")
    # One that was killed before it began leaves an empty file for a minute.
    assert [name for name in listed(journals) if not name.endswith(".new")] == []


def billed(bill: Path) -> Decimal:
    return sum(map(Decimal, bill.read_text().split()), Decimal(0))


async def test_a_hold_that_is_open_at_the_end_is_anybodys_to_settle(opened: Open, url: str, journals: Path) -> None:
    ending = leased(url, journals)
    hold = await reserve(ending, "0.50")
    await ending.aclose()

    ledger = opened()
    before = await ledger.spent(TEAM, at=NOW)
    await ledger.settle(hold, spend("0.20"))

    assert before == decimals("0", "0.50")
    await until(ledger, "0.20", "0")


# --- the shared ledger is away, or the disk is full ----------------------------------------


async def test_while_the_shared_ledger_is_away_slices_are_spent_and_then_nothing(
    tmp_path: Path, journals: Path
) -> None:
    path = tmp_path / "ledger.db"
    ledger = leased(impatient(path), journals)
    await ledger.settle(await reserve(ledger, "0.01"), spend("0.01"))
    await reserve(ledger, "0.01")

    with away(path):
        at_once(ledger.settle(at_once(reserve(ledger, "0.01")), spend("0.005")))
        with pytest.raises(LedgerUnavailable):
            await reserve(ledger, "1.00")

    await until(ledger, "0.015", "0.01")
    await until_reserved(ledger, "1.00")
    await ledger.aclose()


def impatient(path: Path) -> SqliteDatabase:
    return SqliteDatabase(str(path), busy_seconds=0.01)


@contextmanager
def away(path: Path) -> Iterator[None]:
    """Let nobody else write to a database meanwhile."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


async def until_reserved(ledger: Ledger, amount: str) -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(LedgerUnavailable):
                await reserve(ledger, amount)
                return
            await asyncio.sleep(0.05)


async def test_nothing_is_held_while_spending_waits_too_long_to_be_recorded(tmp_path: Path, journals: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = leased(impatient(path), journals, behind_seconds=0.2)
    hold = await reserve(ledger, "0.01")

    with away(path):
        at_once(ledger.settle(hold, spend("0.01")))
        await asyncio.sleep(0.3)
        with pytest.raises(LedgerUnavailable, match="waited to be recorded"):
            at_once(reserve(ledger, "0.01"))

    await until(ledger, "0.01", "0")
    await until_reserved(ledger, "0.01")
    await ledger.aclose()


async def test_a_caller_is_told_in_time_though_the_database_is_waited_for_longer(
    tmp_path: Path, journals: Path
) -> None:
    path = tmp_path / "ledger.db"
    ledger = leased(SqliteDatabase(str(path), busy_seconds=30), journals, answer_seconds=0.2)
    await until_reserved(ledger, "0.01")

    with away(path):
        for _ in range(2):
            async with asyncio.timeout(10):
                with pytest.raises(LedgerUnavailable, match="has not answered"):
                    await reserve(ledger, "1.00")

    await until_reserved(ledger, "1.00")
    await until(ledger, "0", "1.01")
    await ledger.aclose()


async def test_what_cannot_be_recorded_at_the_end_is_recorded_by_the_next(tmp_path: Path, journals: Path) -> None:
    path = tmp_path / "ledger.db"
    ending = leased(impatient(path), journals)
    hold = await reserve(ending, "0.50")
    with away(path):
        at_once(ending.settle(hold, spend("0.40")))
        await ending.aclose()

    assert await recover(f"sqlite:///{path}", journals) == decimals("0.40", "0")


# --- periods and budgets -------------------------------------------------------------------


async def test_a_slice_counts_into_the_next_period_so_what_is_spent_from_it_there_stays_within_the_limit(
    opened: Open, clock: Clock
) -> None:
    hourly = Budget(name="hourly", limit=Decimal("1.00"), period="hour")
    one, other = opened(), opened()
    clock.now = NOW.replace(minute=59, second=59)
    hold = await reserve(one, "0.60", hourly, at=clock.now)
    clock.now = NOW.replace(hour=15, minute=0)

    with pytest.raises(BudgetExceeded):
        await reserve(other, "0.50", hourly, at=clock.now)
    await one.settle(hold, spend("0.60", at=clock.now))
    await reserve(other, "0.40", hourly, at=clock.now)

    await until(other, "0.60", "0.40", budget=hourly, at=clock.now)


async def test_a_new_period_gives_the_whole_budget_again(opened: Open, clock: Clock) -> None:
    hourly = Budget(name="hourly", limit=Decimal("1.00"), period="hour")
    ledger = opened()
    await ledger.settle(await reserve(ledger, "1.00", hourly), spend("1.00"))
    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "0.01", hourly)

    clock.now = NOW.replace(hour=15, minute=0)
    await reserve(ledger, "1.00", hourly, at=clock.now)

    assert await ledger.spent(hourly, at=clock.now) == decimals("0", "1.00")


async def test_a_limit_that_is_lowered_holds_for_the_very_next_call(opened: Open) -> None:
    ledger = opened()
    await ledger.settle(await reserve(ledger, "0.50"), spend("0.45"))

    with pytest.raises(BudgetExceeded) as refused:
        await reserve(ledger, "0.01", Budget(name="team", limit=Decimal("0.45"), period="day"))
    await reserve(ledger, "1.55")

    assert refused.value.remaining == 0


async def test_what_is_freed_after_a_call_cost_too_much_is_not_spent_again(opened: Open) -> None:
    ledger = opened()
    dear, other = await reserve(ledger, "1.00"), await reserve(ledger, "1.00")

    await ledger.settle(dear, spend("3.00"))
    await ledger.release(other)

    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "0.01")
    assert await ledger.spent(TEAM, at=NOW) == decimals("3.00", "0")


async def test_two_limits_on_the_same_calls_both_hold(opened: Open) -> None:
    low = Budget(name="low", limit=Decimal("1.00"), period="day")
    ledger = opened()

    outcomes = await asyncio.gather(
        *(reserve(ledger, "0.10", low if n % 2 else TEAM) for n in range(40)), return_exceptions=True
    )

    held = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    assert len(held) == 20
    assert all(isinstance(outcome, Hold | BudgetExceeded) for outcome in outcomes)
    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "0.01", low)


async def test_a_slice_that_expired_is_not_spent_any_more(opened: Open, clock: Clock) -> None:
    one, other = opened(), opened()
    await one.release(await reserve(one, "0.10"))
    clock.now = NOW + timedelta(seconds=120)

    await reserve(other, "2.00", at=clock.now)

    with pytest.raises(BudgetExceeded):
        await reserve(one, "0.01", at=clock.now)


async def test_what_was_idle_in_a_slice_that_others_took_is_gone_when_its_process_comes_back(
    opened: Open, clock: Clock
) -> None:
    one, other = opened(), opened()
    await reserve(one, "0.01")
    clock.now = NOW + timedelta(seconds=120)

    await reserve(other, "1.95", at=clock.now)
    await one.report("day")

    with pytest.raises(BudgetExceeded):
        await reserve(one, "0.06", at=clock.now)


# --- the journal ---------------------------------------------------------------------------


async def test_journals_are_deleted_when_all_in_them_is_on_record(
    url: str, journals: Path, shared: Ledger, tmp_path: Path
) -> None:
    ledger = leased(url, journals, segment_bytes=20_000)
    hold = await reserve(ledger, "1.00")

    for _ in range(300):
        at_once(ledger.charge(hold, spend("0.001")))
    async with asyncio.timeout(10):
        while size(journals) > 10_000:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
    at_once(ledger.charge(hold, spend("0.001")))
    left_behind = copied(journals, tmp_path / "left behind")
    survivor = leased(url, left_behind)
    await survivor.spent(TEAM, at=NOW)
    await ledger.aclose()

    await until(survivor, "1.00", "0.699")
    assert await shared.report("provider") != []
    await survivor.aclose()


async def test_a_journal_is_deleted_only_once_the_next_one_survives_a_power_cut(
    url: str, journals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = leased(url, journals, segment_bytes=2_000)
    hold = await reserve(ledger, "1.00")
    monkeypatch.setattr(os, "fdatasync", _broken)

    for _ in range(20):
        at_once(ledger.charge(hold, spend("0.001")))
    await ledger.recorded()
    await asyncio.sleep(2)
    kept = [name for name in listed(journals) if name.endswith(".journal")]
    monkeypatch.undo()
    async with asyncio.timeout(10):
        while kept[0] in listed(journals):
            at_once(ledger.charge(hold, spend("0.001")))
            await asyncio.sleep(0.1)
    await ledger.aclose()

    assert kept[0].endswith("-000001.journal")
    assert len(kept) > 1


def _broken(_file: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_a_process_that_ends_leaves_nothing_of_its_journal_behind(url: str, journals: Path) -> None:
    for _ in range(3):
        ledger = leased(url, journals)
        at_once(ledger.settle(await reserve(ledger, "0.10"), spend("0.10")))
        await ledger.aclose()

    assert rows(url, "SELECT * FROM ledger_journals") == []
    assert listed(journals) == []


async def test_journals_are_kept_apart_by_ledger_and_not_by_password(tmp_path: Path) -> None:
    for path in ("a.db", "b.db", "./a.db"):
        ledger = open_leased(f"sqlite:///{tmp_path}/{path}", tmp_path / "journals")
        await reserve(ledger, "0.01")
        await ledger.aclose()
    for password in ("old", "new"):
        away = open_leased(f"postgresql://user:{password}@/money?host={tmp_path}", tmp_path / "journals")
        with pytest.raises(LedgerUnavailable):
            await reserve(away, "0.01")
        await away.aclose()

    assert len(listed(tmp_path / "journals")) == 3


def leave_behind(journals: Path, *records: str) -> None:
    """Leave a journal behind as a process that was killed."""
    journals.mkdir()
    (journals / "abc.lock").touch()
    lines = [b"%08x %b\n" % (zlib.crc32(record.encode()), record.encode()) for record in records]
    (journals / "abc-000001.journal").write_bytes(b"".join(lines))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size(folder: Path) -> int:
    """Bytes in use; what a journal has room for beyond them is zeros."""
    return sum(len(path.read_bytes().rstrip(b"\0")) for path in folder.iterdir())


def copied(journals: Path, to: Path, *, without: int = 0) -> Path:
    """The journals as they are, as if their owner were dead; without so many of the bytes it wrote last."""
    to.mkdir()
    for path in journals.iterdir():
        everything = path.read_bytes()
        written = everything.rstrip(b"\0")
        kept = written[: len(written) - without] if path.suffix == ".journal" else written
        (to / path.name).write_bytes(kept.ljust(len(everything), b"\0"))
    return to


def spender(url: str, what: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SPENDER, url, what, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


# --- at once, or not at all ----------------------------------------------------------------


PICOS = 10**12


def hold_now(
    ledger: LeasedLedger, *amounts: str, budgets: tuple[Budget, ...] = (TEAM,), at: datetime = NOW
) -> str | None:
    needs = [int(Decimal(amount) * PICOS) for amount in amounts]
    return ledger.reserve_now(budgets, needs, at=at, ttl_seconds=60, scope=SCOPE)


def settle_now(ledger: LeasedLedger, name: str, cost: str, *, at: datetime = NOW) -> bool:
    spent = replace(spend(cost, at=at), id=name)
    return ledger.settle_now(name, spent, cost=int(spent.cost * PICOS), estimated=int(spent.estimated * PICOS))


async def met(ledger: LeasedLedger, *budgets: Budget, at: datetime = NOW) -> None:
    """Lease a slice of each of these budgets, and spend nothing."""
    amounts = {budget.name: Decimal("0.01") for budget in budgets or (TEAM,)}
    await ledger.release(await ledger.reserve(budgets or (TEAM,), amounts, at=at, ttl_seconds=60, scope=SCOPE))


async def test_nothing_is_held_at_once_of_what_was_not_leased_before(opened: Open) -> None:
    ledger = opened()
    before = hold_now(ledger, "0.01")
    await met(ledger)

    # A slice is a twentieth of the budget.
    held = [hold_now(ledger, "0.03") for _ in range(5)]
    nothing = hold_now(ledger, "1.50")

    assert before is None
    assert nothing is None
    assert [name is not None for name in held] == [True] * 3 + [False] * 2
    assert await ledger.spent(TEAM, at=NOW) == decimals("0", "0.09")


async def test_what_is_held_and_settled_at_once_is_on_record_as_if_it_had_been_awaited(
    url: str, tmp_path: Path, clock: Clock
) -> None:
    wide, other = Budget(name="wide", limit=Decimal(10)), Budget(name="other", limit=Decimal(5), match={"key": "else"})
    budgets = (TEAM, wide, other)
    seen: list[object] = []

    for at_once_too in (True, False):
        place = f"{url}.{at_once_too}"
        ledger = leased(place, tmp_path / f"{at_once_too}", clock=clock)
        await met(ledger, *budgets)
        for cost in ("0.02", "0.031", "0", "0.004"):
            if at_once_too:
                name = hold_now(ledger, "0.03", "0.03", "0.001", budgets=budgets)
                assert name is not None
                held = [await ledger.spent(budget, at=NOW) for budget in budgets]
                assert settle_now(ledger, name, cost)
                assert settle_now(ledger, name, "9")  # known by its id
            else:
                amounts = {"team": Decimal("0.03"), "wide": Decimal("0.03"), "other": Decimal("0.001")}
                hold = at_once(ledger.reserve(budgets, amounts, at=NOW, ttl_seconds=60, scope=SCOPE))
                held = [await ledger.spent(budget, at=NOW) for budget in budgets]
                at_once(ledger.settle(hold, replace(spend(cost), id=hold.id)))
                at_once(ledger.settle(hold, replace(spend("9"), id=hold.id)))
            seen.append((held, [await ledger.spent(budget, at=NOW) for budget in budgets]))
        seen.append([await ledger.report(by) for by in ("key", "tag", "model", "day")])
        await ledger.aclose()
        seen.append(rows(place, "SELECT calls, cost, estimated, provider, key FROM ledger_spends"))
        assert rows(place, "SELECT * FROM ledger_holds") == []

    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


async def test_the_hold_that_was_named_is_what_a_reserve_would_have_returned(opened: Open) -> None:
    ledger = opened()
    wide = Budget(name="wide", limit=Decimal(10))
    await met(ledger, TEAM, wide)

    name = hold_now(ledger, "0.03", "0", budgets=(TEAM, wide))
    hold = at_once(ledger.reserve((TEAM, wide), {"team": Decimal("0.03")}, at=NOW, ttl_seconds=60, scope=SCOPE))

    assert name is not None
    assert ledger.held_now(name, at=NOW, ttl_seconds=60) == replace(hold, id=name)
    at_once(ledger.charge(ledger.held_now(name, at=NOW, ttl_seconds=60), spend("0.01")))
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.01", "0.05")
    ledger.release_now(name)
    ledger.release_now(name)
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.01", "0.03")


@pytest.mark.parametrize("amounts", [(), ("0",)])
async def test_what_costs_nothing_is_named_held_and_settled_too(opened: Open, amounts: tuple[str, ...]) -> None:
    ledger = opened()

    name = hold_now(ledger, *amounts, budgets=(TEAM,) * len(amounts))
    assert name is not None
    hold = ledger.held_now(name, at=NOW, ttl_seconds=60)
    at_once(ledger.charge(hold, spend("0.01")))
    assert settle_now(ledger, name, "0.02")
    ledger.release_now(name)

    assert (hold.id, hold.amounts) == (name, {})
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.03", "0")


async def test_of_several_budgets_nothing_is_held_where_one_has_too_little(opened: Open) -> None:
    ledger = opened()
    small = Budget(name="small", limit=Decimal("0.02"), match={"key": "research"})
    await met(ledger, TEAM, small)

    assert hold_now(ledger, "0.03", "0.03", budgets=(TEAM, small)) is None
    assert hold_now(ledger, "0.03", "0.03", budgets=(small, TEAM)) is None
    assert await ledger.spent(TEAM, at=NOW) == decimals("0", "0")
    assert await ledger.spent(small, at=NOW) == decimals("0", "0")


async def test_two_budgets_on_the_same_calls_are_for_the_shared_ledger_to_look_at(opened: Open) -> None:
    ledger = opened()
    same = Budget(name="same", limit=Decimal(1), period="day")
    await met(ledger, TEAM, same)

    assert hold_now(ledger, "0.01", "0.01", budgets=(TEAM, same)) is None
    assert hold_now(ledger, "0.01", "0", budgets=(TEAM, same)) is not None


async def test_a_lower_limit_on_what_was_leased_under_a_higher_one_is_for_the_shared_ledger_to_look_at(
    opened: Open,
) -> None:
    ledger = opened()
    lower = Budget(name="lower", limit=Decimal("0.05"), period="day")
    await met(ledger)
    await ledger.spent(lower, at=NOW)

    assert hold_now(ledger, "0.01", budgets=(lower,)) is None
    assert hold_now(ledger, "0.01") is not None


async def test_nothing_is_held_at_once_in_a_period_that_nothing_was_leased_in(opened: Open, clock: Clock) -> None:
    ledger = opened()
    clock.now = NOW.replace(hour=23, minute=59, second=59)
    await met(ledger, at=clock.now)
    before = hold_now(ledger, "0.01", at=clock.now)
    tomorrow = clock.now + timedelta(seconds=1)

    await asyncio.sleep(0.3)  # what was looked at closely holds for a moment
    after = hold_now(ledger, "0.01", at=tomorrow)

    assert before is not None
    assert after is None


async def test_nothing_is_held_at_once_while_a_hold_has_expired_that_nobody_swept(opened: Open, clock: Clock) -> None:
    ledger = opened()
    await met(ledger)
    assert hold_now(ledger, "0.01") is not None

    late = NOW + timedelta(seconds=60)
    await asyncio.sleep(0.3)  # what was looked at closely holds for a moment

    assert hold_now(ledger, "0.01", at=late) is None
    clock.now = late
    await met(ledger, at=late)
    assert hold_now(ledger, "0.01", at=late) is not None
    assert (await ledger.spent(TEAM, at=late))[1] == Decimal("0.01")


async def test_nothing_is_held_at_once_in_a_ledger_that_was_closed(opened: Open) -> None:
    ledger = opened()
    await met(ledger)
    await ledger.aclose()

    assert hold_now(ledger, "0.01") is None


async def test_what_has_waited_too_long_to_be_recorded_lets_nothing_more_be_held_at_once(
    url: str, journals: Path
) -> None:
    ledger = leased(url, journals, behind_seconds=0.2)
    await met(ledger)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        name = hold_now(ledger, "0.01")
        assert name is not None
        assert settle_now(ledger, name, "0.01")
        await asyncio.sleep(0.4)

        late = hold_now(ledger, "0.01")

        other.execute("ROLLBACK")
    await ledger.recorded()
    await met(ledger)
    after = hold_now(ledger, "0.01")
    await ledger.aclose()
    assert late is None
    assert after is not None


async def test_without_room_in_the_journal_nothing_is_held_and_what_is_settled_is_to_be_recorded(
    opened: Open, shared: Ledger, journals: Path
) -> None:
    ledger = opened()
    await met(ledger)
    name = hold_now(ledger, "0.03")
    assert name is not None
    room = sum(file.stat().st_size for file in await asyncio.to_thread(lambda: list(journals.glob("*.journal"))))
    long, needs = Scope(model="x" * 10_000), [1]
    # Fill what the journal has of the disk.
    with room_for(room):
        while (taken := ledger.reserve_now((TEAM,), needs, at=NOW, ttl_seconds=60, scope=long)) is not None:
            ledger.release_now(taken)
        while (taken := ledger.reserve_now((TEAM,), needs, at=NOW, ttl_seconds=60, scope=Scope())) is not None:
            ledger.release_now(taken)

        nothing = hold_now(ledger, "0.01")
        written = settle_now(ledger, name, "0.02")
        await ledger.recorded()

        assert (nothing, written) == (None, False)
        assert (await shared.spent(TEAM, at=NOW))[0] == Decimal("0.02")
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.02", "0")


async def test_what_was_held_at_once_in_a_process_that_died_is_charged_at_its_worst_case(
    url: str, journals: Path, tmp_path: Path
) -> None:
    ledger = leased(url, journals)
    await met(ledger)
    names = [hold_now(ledger, "0.02") for _ in range(4)]
    assert None not in names
    settle_now(ledger, str(names[0]), "0.005")
    ledger.release_now(str(names[1]))
    at_once(ledger.charge(ledger.held_now(str(names[2]), at=NOW, ttl_seconds=60), spend("0.015")))
    # What is there now is what `kill -9` leaves: the journal, and what is on record.
    left = tmp_path / "left"
    shutil.copytree(journals, left / "journals")
    with (
        closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as source,
        closing(sqlite3.connect(left / "ledger.db")) as copy,
    ):
        source.backup(copy)

    spent, held = await recover(f"sqlite:///{left}/ledger.db", left / "journals")
    await ledger.aclose()

    # Settled, charged in part with the rest at its worst, and open.
    assert spent == Decimal("0.005") + Decimal("0.02") + Decimal("0.02")
    assert held == 0


async def test_whatever_is_held_at_once_and_awaited_side_by_side_never_passes_a_limit(opened: Open) -> None:
    some = random.Random(5)
    ledgers = [opened() for _ in range(3)]
    total = Decimal(0)

    async def spend_some(ledger: LeasedLedger) -> None:
        nonlocal total
        for _ in range(60):
            amount = f"0.0{some.randint(1, 9)}"
            name = hold_now(ledger, amount) if some.random() < 0.7 else None
            if name is None:
                try:
                    name = (await reserve(ledger, amount)).id
                except BudgetExceeded:
                    await asyncio.sleep(0.002)
                    continue
            held[id(ledger), name] = Decimal(amount)
            assert total + sum(held.values()) <= TEAM.limit
            await asyncio.sleep(some.random() / 500)
            cost = Decimal(amount) * some.choice((0, 1, 1)) / some.choice((1, 2))
            del held[id(ledger), name]
            total += cost
            assert settle_now(ledger, name, str(cost))

    held: dict[tuple[int, str], Decimal] = {}
    await asyncio.gather(*(spend_some(ledger) for ledger in ledgers for _ in range(5)))
    for ledger in ledgers:
        await ledger.recorded()

    assert total > TEAM.limit * Decimal("0.9")
    assert await ledgers[0].spent(TEAM, at=NOW) == (total, Decimal(0))
