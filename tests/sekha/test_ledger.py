"""Budgets, periods, and what a ledger says when its file cannot be used."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.errors import ConfigError, LedgerError, LedgerUnavailable
from sekha.ledger import Budget, GroupBy, Hold, Ledger, Period, Scope, Spend, period_end, period_start, remaining
from sekha.ledgers import open_leased, open_ledger
from sekha.ledgers.sql import SqlLedger
from sekha.ledgers.sqlite import SqliteDatabase
from sekha.pricing import Usage
from tests.fixtures.full import room_for

NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
TEAM = Budget(name="team", limit=Decimal("2.00"), period="day")
SPEND = Spend(scope=Scope(), cost=Decimal("0.10"), estimated=Decimal("0.10"), usage=Usage(), at=NOW)


@asynccontextmanager
async def opened(url: str | Path) -> AsyncIterator[Ledger]:
    ledger = open_ledger(url if isinstance(url, str) else f"sqlite:///{url}")
    try:
        yield ledger
    finally:
        await ledger.aclose()


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("hour", "2026-11-23T14:00", "2026-11-23T15:00"),
        ("day", "2026-11-23T00:00", "2026-11-24T00:00"),
        ("month", "2026-11-01T00:00", "2026-12-01T00:00"),
    ],
)
def test_a_period_begins_and_ends_in_utc(period: Period, start: str, end: str) -> None:
    at = NOW.astimezone(timezone(timedelta(hours=-11)))

    assert period_start(period, at) == datetime.fromisoformat(start).replace(tzinfo=UTC)
    assert period_end(period, at) == datetime.fromisoformat(end).replace(tzinfo=UTC)


def test_the_total_neither_begins_nor_ends() -> None:
    assert period_start("total", NOW) is None
    assert period_end("total", NOW) is None


@given(
    st.sampled_from(["hour", "day", "month"]),
    st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.timezones()),
)
def test_every_moment_is_in_one_period_and_the_next_begins_where_it_ends(period: Period, at: datetime) -> None:
    start, end = period_start(period, at), period_end(period, at)

    assert start is not None
    assert end is not None
    assert start <= at < end
    assert period_start(period, end) == end
    assert period_end(period, end - timedelta(microseconds=1)) == end


@pytest.mark.parametrize(
    ("match", "covered"),
    [
        ({}, True),
        ({"key": "research"}, True),
        ({"key": "research", "tag": "eval"}, True),
        ({"tag": "nightly"}, False),
        ({"task": "chat_small"}, False),
        ({"key": "sales", "provider": "openai"}, False),
    ],
)
def test_a_budget_covers_a_call_when_every_field_it_names_is_equal(match: dict[str, str], covered: bool) -> None:
    scope = Scope(provider="openai", model="openai/m", key="research", tags=frozenset({"eval"}))

    assert Budget(name="b", limit=Decimal(1), match=match).covers(scope) is covered


def test_nothing_remains_of_an_overspent_budget() -> None:
    assert remaining(TEAM, Decimal("1.50"), Decimal("0.25")) == Decimal("0.25")
    assert remaining(TEAM, Decimal("3.00"), Decimal("0")) == 0


async def test_replies_that_no_longer_count_are_forgotten(tmp_path: Path) -> None:
    scope, usage = Scope(provider="p", model="m"), Usage(output_tokens=7)
    async with opened(tmp_path / "ledger.db") as ledger:
        hold = await ledger.reserve([], {}, at=NOW, ttl_seconds=60)

        for n in range(1_000):
            at = NOW + timedelta(microseconds=7 * n)
            await ledger.charge(hold, replace(SPEND, id=f"spend {n}", scope=scope, usage=usage, at=at))

    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        [(replies,)] = connection.execute("SELECT count(*) FROM ledger_replies").fetchall()
    connection.close()
    assert 200 <= replies < 260


async def test_the_folder_of_a_ledger_is_made(tmp_path: Path) -> None:
    async with opened(tmp_path / "new" / "folder" / "ledger.db") as ledger:
        await ledger.settle(await ledger.reserve([], {}, at=NOW, ttl_seconds=60), SPEND)

    assert (tmp_path / "new" / "folder" / "ledger.db").exists()


async def test_a_relative_url_names_a_file_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async with opened("sqlite:///.sekha/ledger.db") as ledger:
        await ledger.spent(TEAM, at=NOW)

    assert (tmp_path / ".sekha" / "ledger.db").exists()


async def test_what_is_recorded_is_there_after_reopening(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger.db") as ledger:
        hold = await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)
        await ledger.charge(hold, SPEND)

    async with opened(tmp_path / "ledger.db") as ledger:
        assert await ledger.spent(TEAM, at=NOW) == (Decimal("0.10"), Decimal("0.90"))


@pytest.mark.parametrize(
    "url", ["mysql://user:hunter2@host/db", "ledger.db", "sqlite:///", "sqlite://ledger.db", "sqlite:///:memory:", ""]
)
def test_a_url_that_names_no_ledger_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///\.sekha/ledger\.db") as refused:
        open_ledger(url)

    assert "hunter2" not in str(refused.value)


def test_a_malformed_postgresql_url_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigError, match="no PostgreSQL URL") as refused:
        open_ledger("postgresql://user:hunter2@host:5432/db?hunter2=%zz")

    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("port", ["abc", "99999", "0", "0000000", "00000099999", "hunter2/x"])
def test_a_port_that_is_none_is_refused_without_being_shown(port: str, tmp_path: Path) -> None:
    for opens in (open_ledger, partial(open_leased, folder=tmp_path)):
        with pytest.raises(ConfigError, match="names a port that is no number") as caught:
            opens(f"postgresql://user:hunter2@host:{port}/db")
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("hosts", ["a.invalid:5432,b.invalid:5433", "a.invalid:0000005432", "[::1]:05432,b.invalid"])
async def test_several_hosts_may_be_named_and_ports_as_postgresql_reads_them(hosts: str, tmp_path: Path) -> None:
    ledger = open_leased(f"postgresql://user@{hosts}/db", tmp_path)
    await ledger.aclose()


async def test_a_postgresql_server_that_is_away_is_unavailable_and_its_password_is_not_shown(tmp_path: Path) -> None:
    async with opened(f"postgresql://user:hunter2@/money?host={tmp_path}") as ledger:
        with pytest.raises(LedgerUnavailable, match="money") as unavailable:
            await ledger.spent(TEAM, at=NOW)

    assert unavailable.value.retryable
    assert "hunter2" not in str(unavailable.value)
    assert "hunter2" not in str(unavailable.value.__cause__)


@pytest.mark.parametrize("connected", [True, False])
async def test_a_postgresql_server_that_takes_no_writes_is_unavailable_until_it_does(
    postgres_url: str, read_only: Callable[[], AbstractContextManager[None]], connected: bool
) -> None:
    async with opened(postgres_url) as ledger:
        hold = await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)
        async with opened(postgres_url) as other:
            asked = ledger if connected else other
            with read_only(), pytest.raises(LedgerUnavailable, match=r"read-only.*target_session_attrs") as unavailable:
                await asked.settle(hold, SPEND)
            await asked.settle(hold, SPEND)

        assert unavailable.value.retryable
        assert await ledger.spent(TEAM, at=NOW) == (Decimal("0.10"), Decimal(0))


async def test_a_ledger_of_a_newer_sekha_names_the_way_out_and_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger.db") as ledger:
        await ledger.spent(TEAM, at=NOW)
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE ledger_version SET version = 99")
    connection.close()

    async with opened(tmp_path / "ledger.db") as ledger:
        with pytest.raises(LedgerError, match=r"schema 99.*Upgrade Sekha") as newer:
            await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)

    assert not newer.value.retryable


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_a_ledger_of_an_older_sekha_is_brought_up_to_date_with_all_that_is_in_it(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    at = int(NOW.timestamp()) * 1_000_000
    spends = ", ".join(
        f"('spend {n}', {at + n}, 'p', 'm', 't', 'k', 1000000000, 1000000000, 5, {n}, 0, 0, 0)" for n in range(300)
    )
    ledger_of_version_2(
        url,
        f"INSERT INTO ledger_spends VALUES {spends}",
        "INSERT INTO ledger_tags VALUES ('spend 7', 'eval')",
        "INSERT INTO ledger_totals VALUES ('{}', 'day 2026-11-23 00:00', 300000000000)",
        f"INSERT INTO ledger_holds VALUES ('held', '{{}}', 'day', 500000000000, {at + 60_000_000}, 0, 0)",
    )
    groups: tuple[GroupBy, ...] = ("key", "tag")
    amounts = {"team": Decimal("0.50")}
    hold = Hold(id="held", budgets=(TEAM,), amounts=amounts, expires_at=NOW + timedelta(seconds=60), ttl_seconds=60)

    async with opened(url) as ledger:
        usual = await ledger.usual_output_tokens("p", "m")
        reports = [await ledger.report(by) for by in groups]
        before = await ledger.spent(TEAM, at=NOW)
        await ledger.charge(hold, replace(SPEND, id="spend 7"))
        await ledger.settle(hold, SPEND)
        after = await ledger.spent(TEAM, at=NOW)

    assert usual == 289
    assert [[(line.group, line.calls, line.cost) for line in report] for report in reports] == [
        [("k", 300, Decimal("0.3"))],
        [("", 299, Decimal("0.299")), ("eval", 1, Decimal("0.001"))],
    ]
    assert (before, after) == ((Decimal("0.30"), Decimal("0.50")), (Decimal("0.40"), Decimal(0)))


def ledger_of_version_2(url: str, *rows: str) -> None:
    """Make a ledger of version 2, in which each call has a row of its own."""
    tables = """
        CREATE TABLE ledger_version (version BIGINT NOT NULL);
        INSERT INTO ledger_version VALUES (2);
        CREATE TABLE ledger_spends (
            id TEXT PRIMARY KEY, at BIGINT NOT NULL, provider TEXT, model TEXT, task TEXT, key TEXT,
            cost BIGINT NOT NULL, estimated BIGINT NOT NULL,
            input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
            images BIGINT NOT NULL, counted BIGINT NOT NULL
        );
        CREATE INDEX ledger_spends_at ON ledger_spends (at);
        CREATE INDEX ledger_spends_replies ON ledger_spends (provider, model, at, output_tokens)
            WHERE output_tokens > 0;
        CREATE TABLE ledger_tags (spend TEXT NOT NULL, tag TEXT NOT NULL);
        CREATE INDEX ledger_tags_spend ON ledger_tags (spend);
        CREATE TABLE ledger_totals (
            match TEXT NOT NULL, span TEXT NOT NULL, spent BIGINT NOT NULL, PRIMARY KEY (match, span)
        );
        CREATE INDEX ledger_totals_span ON ledger_totals (span);
        CREATE TABLE ledger_holds (
            id TEXT NOT NULL, match TEXT NOT NULL, period TEXT NOT NULL, amount BIGINT NOT NULL,
            expires_at BIGINT NOT NULL, idle BIGINT NOT NULL DEFAULT 0, recalled_at BIGINT NOT NULL DEFAULT 0,
            PRIMARY KEY (id, match, period)
        );
        CREATE INDEX ledger_holds_match ON ledger_holds (match, period, expires_at, amount);
        CREATE INDEX ledger_holds_expires_at ON ledger_holds (expires_at)
    """
    statements = (*tables.split(";"), *rows)
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as file:
            for statement in statements:
                file.execute(statement)
    else:
        with psycopg.connect(url) as server:
            for statement in statements:
                server.execute(statement.encode())


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("dear diary, " * 100)

    async with opened(path) as ledger:
        with pytest.raises(LedgerError, match="not a database"):
            await ledger.spent(TEAM, at=NOW)
        with pytest.raises(LedgerError, match="not a database"):
            await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)

    assert path.read_text().startswith("dear diary")


async def test_a_folder_that_cannot_be_made_says_where_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async with opened(tmp_path / "file" / "ledger.db") as ledger:
        with pytest.raises(LedgerError, match="Name a folder"):
            await ledger.spent(TEAM, at=NOW)


async def test_a_ledger_that_another_holds_too_long_is_unavailable_and_then_works_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = SqlLedger(SqliteDatabase(str(path), busy_seconds=0.01))
    hold = await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(LedgerUnavailable, match="locked") as unavailable:
        await ledger.settle(hold, SPEND)
    other.execute("ROLLBACK")
    await ledger.settle(hold, SPEND)

    assert pickle.loads(pickle.dumps(unavailable.value)).retryable
    assert await ledger.spent(TEAM, at=NOW) == (Decimal("0.10"), Decimal(0))
    other.close()
    await ledger.aclose()


async def test_a_ledger_without_room_is_unavailable_and_then_works_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger.db") as ledger:
        hold = await ledger.reserve([TEAM], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)

        with room_for(0), pytest.raises(LedgerUnavailable):
            await ledger.settle(hold, SPEND)
        unsettled = await ledger.spent(TEAM, at=NOW)
        await ledger.settle(hold, SPEND)

        assert unsettled == (Decimal(0), Decimal(1))
        assert await ledger.spent(TEAM, at=NOW) == (Decimal("0.10"), Decimal(0))
