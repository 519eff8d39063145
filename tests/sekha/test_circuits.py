from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits, Tripped
from sekha.circuits_shared import SharedCircuits
from sekha.errors import (
    ContentRefused,
    LedgerUnavailable,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    StreamBroken,
)
from sekha.ledgers import open_database
from sekha.ledgers.database import Database, Transaction
from sekha.ledgers.sqlite import SqliteDatabase

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
RULES = BreakerRules(failure_threshold=3, timeout_seconds=60, success_threshold=2, lease_seconds=10)
DOWN = ProviderUnavailable(provider_id="p", model_id="m")
NAME = "p/m"


class Wall:
    """A wall clock that others move."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


def opened(wall: Wall, *, shared: SharedCircuits | None = None) -> Circuits:
    circuits = Circuits(RULES, now=wall, shared=shared)
    for _ in range(3):
        circuits.note(NAME, DOWN)
    return circuits


async def half_opened(wall: Wall) -> tuple[Circuits, str]:
    circuits = opened(wall)
    wall.seconds += 60
    probe = await circuits.claim(NAME)
    assert probe is not None
    return circuits, probe


# --- one process ---------------------------------------------------------------------------


def test_a_circuit_nobody_heard_of_is_closed() -> None:
    circuits = Circuits(RULES)

    assert circuits.admit(NAME)
    assert circuits.open_now == frozenset()
    assert circuits.snapshot() == {}
    assert circuits.wait_seconds(NAME) == 0


def test_failures_in_a_row_open_one_circuit_and_no_other() -> None:
    circuits = opened(Wall())

    assert circuits.open_now == {NAME}
    assert not circuits.admit(NAME)
    assert circuits.admit("p/other")
    assert circuits.wait_seconds(NAME) == 60


@pytest.mark.parametrize("error", [ContentRefused(provider_id="p"), None], ids=["the caller's error", "an answer"])
def test_a_sign_of_life_starts_the_count_again(error: ProviderError | None) -> None:
    circuits = Circuits(RULES, now=Wall())
    for outcome in (DOWN, DOWN, error, DOWN, DOWN):
        circuits.note(NAME, outcome)

    assert circuits.admit(NAME)
    assert circuits.snapshot()[NAME].failures == 2


def test_a_rate_limit_neither_opens_nor_clears() -> None:
    circuits = Circuits(RULES, now=Wall())
    for _ in range(9):
        circuits.note(NAME, RateLimited(provider_id="p"))
    untouched = dict(circuits.snapshot())
    for error in (DOWN, RateLimited(provider_id="p"), DOWN, RateLimited(provider_id="p"), DOWN):
        circuits.note(NAME, error)

    assert untouched == {}
    assert circuits.open_now == {NAME}


async def test_a_circuit_whose_time_has_passed_is_offered_to_a_probe_and_closed_by_two() -> None:
    wall = Wall()
    circuits = opened(wall)
    early = await circuits.claim(NAME)
    wall.seconds += 60
    offered = circuits.open_now

    first = await circuits.claim(NAME)
    meanwhile = (circuits.open_now, await circuits.claim(NAME))
    circuits.note(NAME, None, probe=first)
    between = (circuits.open_now, circuits.admit(NAME))
    second = await circuits.claim(NAME)
    circuits.note(NAME, None, probe=second)

    assert early is None
    assert offered == frozenset()
    assert first
    assert meanwhile == ({NAME}, None)
    assert between == (frozenset(), False)
    assert second
    assert circuits.admit(NAME)


async def test_a_probe_that_fails_opens_it_again() -> None:
    circuits, probe = await half_opened(Wall())

    circuits.note(NAME, DOWN, probe=probe)

    assert circuits.open_now == {NAME}
    assert circuits.wait_seconds(NAME) == 60


@pytest.mark.parametrize("ends", ["given back", "rate limited"])
async def test_a_probe_that_tells_nothing_makes_room_for_the_next(ends: str) -> None:
    circuits, probe = await half_opened(Wall())

    if ends == "given back":
        circuits.give_back(NAME, probe)
    else:
        circuits.note(NAME, RateLimited(provider_id="p"), probe=probe)

    assert circuits.snapshot()[NAME].state == "half_open"
    assert await circuits.claim(NAME)


async def test_a_slow_probe_of_this_process_keeps_its_place() -> None:
    wall = Wall()
    circuits, _ = await half_opened(wall)

    wall.seconds += 1000

    assert await circuits.claim(NAME) is None
    assert circuits.open_now == {NAME}


async def test_a_stream_that_breaks_after_its_probe_began_well_opens_the_circuit_again() -> None:
    circuits, probe = await half_opened(Wall())
    circuits.note(NAME, None, probe=probe)

    circuits.note(NAME, StreamBroken(provider_id="p"), probe=probe)

    assert circuits.open_now == {NAME}


async def test_time_outs_of_calls_that_began_before_it_closed_do_not_open_it_again() -> None:
    wall = Wall()
    circuits, probe = await half_opened(wall)
    circuits.note(NAME, None, probe=probe)
    circuits.note(NAME, None, probe=await circuits.claim(NAME))

    wall.seconds += 5
    for _ in range(9):
        circuits.note(NAME, DOWN, seconds=30)

    assert circuits.admit(NAME)


async def test_every_change_of_state_is_told_with_its_reason() -> None:
    wall = Wall()
    circuits = Circuits(RULES, now=wall)
    told: list[Tripped] = []
    circuits.subscribe(told.append)

    for _ in range(3):
        circuits.note(NAME, StreamBroken(provider_id="p"))
    wall.seconds += 60
    circuits.note(NAME, None, probe=await circuits.claim(NAME))
    circuits.note(NAME, None, probe=await circuits.claim(NAME))

    assert [(each.name, each.before, each.after, each.reason, each.at - 1_700_000_000) for each in told] == [
        (NAME, "closed", "open", "stream_broken", 0),
        (NAME, "open", "half_open", "probing", 60),
        (NAME, "half_open", "closed", "recovered", 60),
    ]
    assert all(each.here for each in told)


def test_who_no_longer_listens_is_told_nothing() -> None:
    circuits = Circuits(RULES)
    told: list[Tripped] = []
    stop = circuits.subscribe(told.append)

    stop()
    for _ in range(3):
        circuits.note(NAME, DOWN)

    assert told == []


def test_a_listener_that_fails_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    circuits = Circuits(RULES)
    told: list[Tripped] = []
    circuits.subscribe(lambda change: 1 / 0)  # type: ignore[arg-type, return-value]
    circuits.subscribe(told.append)

    for _ in range(3):
        circuits.note(NAME, DOWN)

    assert len(told) == 1
    assert "a subscriber failed" in caplog.text


# --- several processes in one, over one file -----------------------------------------------


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def sharing(url: str, wall: Wall) -> AsyncIterator[Circuits]:
    database = open_database(url)
    circuits = Circuits(RULES, now=wall, shared=SharedCircuits(database))
    await circuits.start()
    try:
        yield circuits
    finally:
        await circuits.aclose()
        await asyncio.to_thread(database.close)


async def until(true: Callable[[], bool], seconds: float = 10) -> float:
    """Wait for what others bring about; says how long it took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - what is waited for happens in a database, or in another process
            await asyncio.sleep(0.005)
    return time.monotonic() - began


class Breakable:
    """A database that can be away, or do what it is told and keep quiet about it for a while."""

    def __init__(self, path: Path) -> None:
        self.inner: Database = SqliteDatabase(str(path))
        self.away = False
        self.quiet: list[Callable[[], None]] | None = None

    def write(self, work: Callable[[Transaction], T], *, durable: bool) -> Future[T]:
        if self.away:
            return self._gone()
        done = self.inner.write(work, durable=durable)
        if self.quiet is None:
            return done
        told: Future[T] = Future()
        self.quiet.append(lambda: told.set_result(done.result()))
        return told

    def speak(self) -> None:
        quiet, self.quiet = self.quiet or [], None
        for tell in quiet:
            tell()

    def read(self, work: Callable[[Transaction], T]) -> Future[T]:
        return self._gone() if self.away else self.inner.read(work)

    def close(self) -> None:
        self.inner.close()

    def _gone(self) -> Future[T]:
        future: Future[T] = Future()
        future.set_exception(LedgerUnavailable("ledger.db", "it is away"))
        return future


async def test_what_one_opens_is_open_for_all_and_closed_for_all(url: str) -> None:
    wall = Wall()
    async with sharing(url, wall) as one, sharing(url, wall) as other:
        told: list[Tripped] = []
        other.subscribe(told.append)

        for _ in range(3):
            one.note(NAME, DOWN)
        await until(lambda: not other.admit(NAME))
        wall.seconds += 60
        other.note(NAME, None, probe=await other.claim(NAME))
        await until(lambda: one.snapshot()[NAME].successes == 1)
        one.note(NAME, None, probe=await one.claim(NAME))
        await until(lambda: other.admit(NAME))

    assert [(each.after, each.reason, each.here) for each in told] == [
        ("open", "provider_unavailable", False),
        ("half_open", "probing", True),
        ("closed", "recovered", False),
    ]


async def test_one_probe_goes_through_among_all_who_would_be_it(url: str) -> None:
    wall = Wall()
    async with sharing(url, wall) as one, sharing(url, wall) as other:
        for _ in range(3):
            one.note(NAME, DOWN)
        await until(lambda: not other.admit(NAME))
        wall.seconds += 60

        probes = await asyncio.gather(*(each.claim(NAME) for each in (one, other) for _ in range(15)))

    assert len([probe for probe in probes if probe is not None]) == 1


async def test_a_process_that_starts_knows_what_is_open(url: str) -> None:
    wall = Wall()
    async with sharing(url, wall) as one:
        for _ in range(3):
            one.note(NAME, DOWN)

    async with sharing(url, wall) as new:
        assert new.open_now == {NAME}
        assert new.snapshot()[NAME].error == "provider_unavailable"


async def test_a_process_that_stops_gives_its_probe_back(url: str) -> None:
    wall = Wall()
    async with sharing(url, wall) as one:
        for _ in range(3):
            one.note(NAME, DOWN)
        wall.seconds += 60
        assert await one.claim(NAME)

    async with sharing(url, wall) as next_one:
        assert await next_one.claim(NAME)


async def test_the_place_of_a_caller_who_leaves_while_it_claims_is_free_again(tmp_path: Path) -> None:
    wall = Wall()
    async with sharing(f"sqlite:///{tmp_path / 'ledger.db'}", wall) as circuits:
        for _ in range(3):
            circuits.note(NAME, DOWN)
        wall.seconds += 60
        leaving = asyncio.create_task(circuits.claim(NAME))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving

        probes: list[str] = []
        async with asyncio.timeout(10):
            while not probes:
                if probe := await circuits.claim(NAME):
                    probes.append(probe)
                await asyncio.sleep(0)

    assert len(probes) == 1


async def test_a_probe_that_takes_longer_than_its_lease_is_renewed(tmp_path: Path) -> None:
    wall, url = Wall(), f"sqlite:///{tmp_path / 'ledger.db'}"
    async with sharing(url, wall) as one, sharing(url, wall) as other:
        for _ in range(3):
            one.note(NAME, DOWN)
        await until(lambda: not other.admit(NAME))
        wall.seconds += 60
        assert await one.claim(NAME)

        for _ in range(3):
            wall.seconds += 6
            await until(lambda: (other.snapshot()[NAME].probe_until or 0) - wall.seconds > 5)

        assert await other.claim(NAME) is None


async def test_what_the_table_said_before_a_change_here_does_not_undo_it(tmp_path: Path) -> None:
    wall, database = Wall(), Breakable(tmp_path / "ledger.db")
    circuits = opened(wall, shared=SharedCircuits(database))
    await circuits.start()
    told: list[Tripped] = []
    circuits.subscribe(told.append)
    wall.seconds += 60
    circuits.note(NAME, None, probe=await circuits.claim(NAME))
    last = await circuits.claim(NAME)
    wall.seconds += 6  # late enough for the probe to be renewed

    database.quiet = []
    await until(lambda: bool(database.quiet))
    circuits.note(NAME, None, probe=last)
    database.speak()
    await circuits.aclose()
    await asyncio.to_thread(database.close)

    assert [each.after for each in told] == ["half_open", "closed"]


# --- without the database ------------------------------------------------------------------


async def test_without_the_database_circuits_go_on_alone_and_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sekha.circuits")
    wall, database = Wall(), Breakable(tmp_path / "ledger.db")
    database.away = True
    circuits = Circuits(RULES, now=wall, shared=SharedCircuits(database))
    await circuits.start()
    async with sharing(f"sqlite:///{tmp_path / 'ledger.db'}", wall) as other:
        for _ in range(3):
            circuits.note(NAME, DOWN)
        wall.seconds += 60
        probe = await circuits.claim(NAME)
        circuits.note(NAME, DOWN, probe=probe)
        await asyncio.sleep(1)
        alone = (circuits.open_now, other.open_now)

        database.away = False
        await until(lambda: not other.admit(NAME))
        await circuits.aclose()
        database.close()

    assert probe is not None
    assert alone == ({NAME}, frozenset())
    assert caplog.text.count("not shared between processes for now") == 1
    assert caplog.text.count("shared between processes again") == 1


async def test_a_database_that_hangs_holds_up_no_call_for_long_and_gives_no_second_probe(tmp_path: Path) -> None:
    wall, path = Wall(), tmp_path / "ledger.db"
    async with sharing(f"sqlite:///{path}", wall) as one, sharing(f"sqlite:///{path}", wall) as other:
        for _ in range(3):
            one.note(NAME, DOWN)
        await until(lambda: not other.admit(NAME))
        wall.seconds += 60
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")

        began = time.monotonic()
        probes = await asyncio.gather(one.claim(NAME), other.claim(NAME))
        took = time.monotonic() - began
        blocker.execute("ROLLBACK")
        blocker.close()

        assert probes == [None, None]
        assert took < 2
        async with asyncio.timeout(10):
            while not (await one.claim(NAME) or await other.claim(NAME)):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)


# --- several processes ---------------------------------------------------------------------


class Process:
    """A prober, and what it said since it was last asked."""

    def __init__(self, url: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fixtures" / "prober.py"), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={"PYTHONPATH": str(ROOT)},
        )
        self.said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.said.put(line.strip())

    def tell(self, line: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(f"{line}\n")

    def hear(self, start: str) -> str:
        while not (line := self.said.get(timeout=30)).startswith(start):
            pass
        return line


@pytest.fixture
def processes(url: str) -> Iterator[list[Process]]:
    with started(url) as both:
        yield both


@contextmanager
def started(url: str) -> Iterator[list[Process]]:
    both = [Process(url) for _ in range(2)]
    try:
        for process in both:
            process.hear("ready")
        yield both
    finally:
        for process in both:
            process.child.kill()
            process.child.communicate()


def open_everywhere(processes: list[Process]) -> float:
    """Open the circuit in one process; says how long until the other knew."""
    first, second = processes
    first.tell("fail")
    first.hear("failed")
    began = time.monotonic()
    second.hear("changed: closed open provider_unavailable elsewhere")
    return time.monotonic() - began


def test_two_processes_agree_within_a_second(processes: list[Process]) -> None:
    assert open_everywhere(processes) < 1


def test_thirty_calls_in_two_processes_let_exactly_one_probe_through(processes: list[Process]) -> None:
    open_everywhere(processes)
    for process in processes:
        process.tell("later 61")
        process.hear("later")

    for process in processes:
        process.tell("call 15")
    let_through = [process.hear("let through") for process in processes]

    assert sorted(let_through) == ["let through: 0", "let through: 1"]


def test_a_process_that_is_killed_while_it_probes_frees_the_probe_after_its_lease(processes: list[Process]) -> None:
    first, second = processes
    open_everywhere(processes)
    for process in processes:
        process.tell("later 61")
        process.hear("later")
    first.tell("claim")
    claimed = first.hear("claimed")
    second.hear("changed: open half_open probing elsewhere")

    first.child.kill()
    second.tell("claim")
    at_once = second.hear("refused")
    second.tell("later 10")
    second.tell("claim")

    assert (claimed, at_once) == ("claimed", "refused")
    assert second.hear("claimed") == "claimed"
