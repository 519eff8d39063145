"""What every ledger promises, held against each database that keeps one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from sekha.errors import BudgetExceeded
from sekha.ledger import Budget, Hold, Ledger, Period, Scope, Spend
from sekha.ledgers import open_database, open_ledger
from sekha.ledgers.leased import LeasedLedger
from sekha.ledgers.spends import REPLIES_AT_ONCE
from sekha.ledgers.sql import SqlLedger
from sekha.pricing import Usage

ROOT = Path(__file__).parents[2]
SPENDER = ROOT / "tests" / "fixtures" / "spender.py"
NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
TEAM = Budget(name="team", limit=Decimal("2.00"), period="day")


@dataclass(frozen=True)
class Place:
    """Where a ledger is, and how a process opens it."""

    url: str
    journals: Path | None
    """None for a ledger whose every call is a transaction."""

    def open(self) -> Ledger:
        if self.journals is None:
            return open_ledger(self.url)
        return LeasedLedger(SqlLedger(open_database(self.url)), self.journals, clock=lambda: NOW)


@pytest.fixture(params=["sqlite", "postgres", "leased sqlite", "leased postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    kind, _, database = str(request.param).rpartition(" ")
    url = f"sqlite:///{tmp_path}/ledger.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    return Place(url, tmp_path / "journals" if kind == "leased" else None)


@pytest.fixture
async def ledger(place: Place) -> AsyncIterator[Ledger]:
    ledger = place.open()
    yield ledger
    await ledger.aclose()


def spend(
    cost: str,
    *,
    at: datetime = NOW,
    estimated: str | None = None,
    output_tokens: int = 0,
    input_tokens: int = 0,
    provider: str = "openai",
    model: str = "openai/gpt-5-mini",
    task: str | None = "chat_small",
    key: str | None = None,
    tags: frozenset[str] = frozenset(),
    replies: int = 1,
) -> Spend:
    return Spend(
        scope=Scope(provider=provider, model=model, task=task, key=key, tags=tags),
        cost=Decimal(cost),
        estimated=Decimal(estimated or cost),
        usage=Usage(input_tokens=input_tokens, output_tokens=output_tokens),
        at=at,
        replies=replies,
    )


async def reserve(ledger: Ledger, amount: str, budget: Budget = TEAM, *, at: datetime = NOW) -> Hold:
    return await ledger.reserve([budget], {budget.name: Decimal(amount)}, at=at, ttl_seconds=60)


async def nothing_held(ledger: Ledger) -> Hold:
    return await ledger.reserve([], {}, at=NOW, ttl_seconds=60)


def decimals(*amounts: str) -> tuple[Decimal, ...]:
    return tuple(Decimal(amount) for amount in amounts)


async def until_spent(ledger: Ledger, spent: str, held: str) -> None:
    """Wait for work that nobody awaits, and for what other processes have yet to say."""
    async with asyncio.timeout(10):
        while await ledger.spent(TEAM, at=NOW) != decimals(spent, held):  # noqa: ASYNC110 - other processes have no event
            await asyncio.sleep(0.01)


# --- holding -------------------------------------------------------------------------------


async def test_held_money_counts_against_the_budget(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.50")

    assert hold.amounts == {"team": Decimal("1.50")}
    assert hold.expires_at == NOW + timedelta(seconds=60)
    assert await ledger.spent(TEAM, at=NOW) == decimals("0", "1.50")


async def test_a_reservation_above_what_is_left_is_refused_with_all_its_figures(ledger: Ledger) -> None:
    await ledger.settle(await reserve(ledger, "0.50"), spend("0.50"))
    await reserve(ledger, "1.20")

    with pytest.raises(BudgetExceeded) as refused:
        await reserve(ledger, "0.31")

    error = refused.value
    assert (error.budget, error.limit, error.remaining, error.needed) == ("team", *decimals("2.00", "0.30", "0.31"))
    assert (error.period, error.resets) == ("day", "2026-11-24 00:00 UTC")
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.50", "1.20")


async def test_all_that_is_left_can_be_reserved(ledger: Ledger) -> None:
    await reserve(ledger, "2.00")

    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "0.000000000001")


async def test_a_total_budget_never_resets(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded) as refused:
        await reserve(ledger, "3", Budget(name="all", limit=Decimal(2), period="total"))

    assert refused.value.resets is None


async def test_several_budgets_hold_together_or_not_at_all(ledger: Ledger) -> None:
    wide = Budget(name="wide", limit=Decimal(10))
    narrow = Budget(name="narrow", limit=Decimal(1), match={"key": "research"})

    with pytest.raises(BudgetExceeded) as refused:
        await ledger.reserve([wide, narrow], {"wide": Decimal(2), "narrow": Decimal(2)}, at=NOW, ttl_seconds=60)

    assert refused.value.budget == "narrow"
    assert await ledger.spent(wide, at=NOW) == decimals("0", "0")


async def test_a_budget_without_an_amount_is_carried_along_and_holds_nothing(ledger: Ledger) -> None:
    other = Budget(name="other", limit=Decimal(0), match={"provider": "anthropic"})

    hold = await ledger.reserve([TEAM, other], {"team": Decimal(1)}, at=NOW, ttl_seconds=60)

    assert hold.budgets == (TEAM, other)
    assert await ledger.spent(other, at=NOW) == decimals("0", "0")


async def test_no_budgets_at_all_can_be_reserved_settled_and_reported(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)

    await ledger.settle(hold, spend("0.10"))
    await ledger.release(hold)

    assert [line.cost for line in await ledger.report("provider")] == [Decimal("0.10")]


async def test_two_budgets_over_the_same_calls_each_hold_by_their_own_period(ledger: Ledger) -> None:
    hour, day = (Budget(name=period, limit=Decimal(5), period=period) for period in ("hour", "day"))

    await ledger.reserve([hour, day], {"hour": Decimal(1), "day": Decimal(2)}, at=NOW, ttl_seconds=60)

    assert await ledger.spent(hour, at=NOW) == decimals("0", "1")
    assert await ledger.spent(day, at=NOW) == decimals("0", "2")


# --- freeing -------------------------------------------------------------------------------


async def test_settling_replaces_the_hold_by_the_cost(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.50")

    await ledger.settle(hold, spend("0.40"))

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.40", "0")


async def test_charges_reduce_the_hold_and_it_goes_on(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.50")

    await ledger.charge(hold, spend("0.40"))
    await ledger.charge(hold, spend("0.30"))

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.70", "0.80")


async def test_spending_above_the_hold_is_recorded_and_holds_nothing_negative(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.00")

    await ledger.charge(hold, spend("3.00"))
    await ledger.charge(hold, spend("0.50"))

    assert await ledger.spent(TEAM, at=NOW) == decimals("3.50", "0")


async def test_a_charge_leaves_alone_what_is_held_for_budgets_that_do_not_cover_it(ledger: Ledger) -> None:
    openai = Budget(name="openai", limit=Decimal(5), match={"provider": "openai"})
    anthropic = Budget(name="anthropic", limit=Decimal(5), match={"provider": "anthropic"})
    hold = await ledger.reserve(
        [openai, anthropic], {"openai": Decimal(1), "anthropic": Decimal(2)}, at=NOW, ttl_seconds=60
    )

    await ledger.charge(hold, spend("0.25", provider="openai"))

    assert await ledger.spent(openai, at=NOW) == decimals("0.25", "0.75")
    assert await ledger.spent(anthropic, at=NOW) == decimals("0", "2")


async def test_releasing_frees_the_rest_and_twice_changes_nothing(ledger: Ledger) -> None:
    hold, other = await reserve(ledger, "1.00"), await reserve(ledger, "0.30")
    await ledger.charge(hold, spend("0.20"))

    await ledger.release(hold)
    await ledger.release(hold)

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.20", "0.30")
    assert other.amounts == {"team": Decimal("0.30")}


async def test_an_expired_hold_frees_its_money_and_its_spending_is_still_recorded(ledger: Ledger) -> None:
    hold = await reserve(ledger, "2.00")
    later = NOW + timedelta(seconds=60)

    second = await reserve(ledger, "2.00", at=later)
    await ledger.settle(hold, spend("0.75", at=later))

    assert await ledger.spent(TEAM, at=later) == decimals("0.75", "2.00")
    assert second.id != hold.id


async def test_a_charge_renews_its_hold_so_that_long_work_keeps_its_money(ledger: Ledger) -> None:
    hold = await reserve(ledger, "2.00")
    before_it_expires, after = NOW + timedelta(seconds=59), NOW + timedelta(seconds=90)

    await ledger.charge(hold, spend("0.50", at=before_it_expires))

    assert await ledger.spent(TEAM, at=after) == decimals("0.50", "1.50")
    assert await ledger.spent(TEAM, at=before_it_expires + timedelta(seconds=60)) == decimals("0.50", "0")


async def test_a_hold_counts_into_the_next_period_until_it_expires(ledger: Ledger) -> None:
    midnight = datetime(2026, 11, 24, tzinfo=UTC)
    await reserve(ledger, "1.50", at=midnight - timedelta(seconds=30))

    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "1.00", at=midnight)

    assert await ledger.spent(TEAM, at=midnight + timedelta(seconds=30)) == decimals("0", "0")


# --- recording once ------------------------------------------------------------------------


async def test_the_same_spend_is_recorded_once_however_often_it_is_charged_and_settled(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.00")
    once = spend("0.30", tags=frozenset({"eval"}))

    await ledger.charge(hold, once)
    await ledger.charge(hold, once)
    charged = await ledger.spent(TEAM, at=NOW)
    await ledger.settle(hold, once)
    await ledger.settle(hold, once)

    assert charged == decimals("0.30", "0.70")
    assert await ledger.spent(TEAM, at=NOW) == decimals("0.30", "0")
    assert [(line.group, line.calls) for line in await ledger.report("tag")] == [("eval", 1)]


# A leased ledger knows only what was handed in to itself.
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
async def test_a_step_that_is_done_again_by_another_process_is_recorded_once(place: Place, ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.00")
    once = spend("0.30")
    await ledger.settle(hold, once)

    other = place.open()
    await other.settle(hold, once)
    figures = await other.spent(TEAM, at=NOW)
    await other.aclose()

    assert figures == decimals("0.30", "0")


def test_each_spend_has_an_id_of_its_own() -> None:
    assert UUID(spend("1").id) != UUID(spend("1").id)


# --- what a budget has spent ---------------------------------------------------------------


async def test_the_smallest_fractions_are_kept_exactly(ledger: Ledger) -> None:
    hold = await reserve(ledger, "0.5")

    for _ in range(3):
        await ledger.charge(hold, spend("0.000000025"))
    await ledger.charge(hold, spend("0.00000001875"))

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.00000009375", "0.49999990625")


async def test_what_is_finer_than_the_ledgers_unit_is_rounded_up(ledger: Ledger) -> None:
    await ledger.settle(await nothing_held(ledger), spend("0.0000000000001"))

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.000000000001", "0")


async def test_a_budget_declared_in_the_middle_of_a_period_knows_what_was_spent_before(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    await ledger.charge(hold, spend("1.25", at=NOW - timedelta(hours=3)))
    await ledger.charge(hold, spend("9.00", at=NOW - timedelta(days=1)))

    with pytest.raises(BudgetExceeded) as refused:
        await reserve(ledger, "1.00")

    assert refused.value.remaining == Decimal("0.75")
    assert await ledger.spent(TEAM, at=NOW) == decimals("1.25", "0")


async def test_a_budget_that_is_renamed_or_edited_keeps_its_spending(ledger: Ledger) -> None:
    scope_key = {"key": "research"}
    before = Budget(name="research", limit=Decimal(5), period="day", match=scope_key)
    await ledger.settle(await reserve(ledger, "1.00", before), spend("1.00", key="research"))
    await ledger.settle(await nothing_held(ledger), spend("0.50", at=NOW - timedelta(days=2), key="research"))
    await ledger.settle(await nothing_held(ledger), spend("0.25", key="sales"))

    renamed = Budget(name="science", limit=Decimal(1), period="day", match=scope_key)
    monthly = Budget(name="research", limit=Decimal(5), period="month", match=scope_key)
    widened = Budget(name="research", limit=Decimal(5), period="day")

    assert await ledger.spent(renamed, at=NOW) == decimals("1.00", "0")
    assert await ledger.spent(monthly, at=NOW) == decimals("1.50", "0")
    assert await ledger.spent(widened, at=NOW) == decimals("1.25", "0")
    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "0.01", renamed)


@pytest.mark.parametrize(
    "match",
    [
        {},
        {"provider": "openai"},
        {"model": "openai/gpt-5-mini"},
        {"task": "chat_small"},
        {"key": "research"},
        {"tag": "eval"},
        {"key": "research", "tag": "nightly", "provider": "openai"},
    ],
    ids=str,
)
async def test_a_total_kept_and_a_total_summed_agree_with_what_a_match_covers(
    ledger: Ledger, match: dict[str, str]
) -> None:
    budget = Budget(name="b", limit=Decimal(100), match=match)
    hold = await nothing_held(ledger)
    covered = spend("0.10", key="research", tags=frozenset({"eval", "nightly"}))
    other = spend("0.01", provider="ollama", model="ollama/x", task=None, key=None)
    await ledger.charge(hold, covered)
    await ledger.charge(hold, other)

    summed, _ = await ledger.spent(budget, at=NOW)
    await reserve(ledger, "1", budget)
    await ledger.charge(hold, spend("0.10", key="research", tags=covered.scope.tags))
    kept, _ = await ledger.spent(budget, at=NOW)

    assert budget.covers(covered.scope)
    assert summed == Decimal("0.10") + (Decimal("0.01") if not match else 0)
    assert kept == summed + Decimal("0.10")


@pytest.mark.parametrize(
    ("period", "earlier", "later"),
    [
        ("hour", "2026-11-23T13:59:59.999999", "2026-11-23T15:00:00"),
        ("day", "2026-11-22T23:59:59.999999", "2026-11-24T00:00:00"),
        ("month", "2026-10-31T23:59:59.999999", "2026-12-01T00:00:00"),
    ],
)
async def test_spending_counts_in_its_own_period_alone(
    ledger: Ledger, period: Period, earlier: str, later: str
) -> None:
    budget = Budget(name="b", limit=Decimal(100), period=period)
    hold = await reserve(ledger, "50", budget)
    before, after = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (earlier, later))

    await ledger.charge(hold, spend("1", at=before))
    await ledger.charge(hold, spend("2"))
    await ledger.charge(hold, spend("4", at=after))

    assert (await ledger.spent(budget, at=before))[0] == 1
    assert (await ledger.spent(budget, at=NOW))[0] == 2
    assert (await ledger.spent(budget, at=after))[0] == 4


async def test_tags_of_any_text_are_recorded(ledger: Ledger) -> None:
    strange = frozenset({"a\x00b", "\ud800", "é" * 20_000, "", 'it\'s 100% "fine" ?'})

    await ledger.settle(await nothing_held(ledger), spend("0.10", tags=strange))

    assert len(await ledger.report("tag")) == 5


# --- history and reports -------------------------------------------------------------------


async def test_the_usual_reply_is_unknown_before_ten_replies(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    for _ in range(9):
        await ledger.charge(hold, spend("0.01", output_tokens=100))
    await ledger.charge(hold, spend("0.01", output_tokens=0))

    assert await ledger.usual_output_tokens("openai", "openai/gpt-5-mini") is None


async def test_the_usual_reply_is_the_95th_percentile_of_the_last_200(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    replies = [spend("0", at=NOW + timedelta(seconds=n), output_tokens=n) for n in range(1, 221)]
    replies.append(spend("0", model="openai/other", output_tokens=9_999))

    # A few at a time: of very many at once not all need to be remembered.
    for at in reversed(range(0, len(replies), REPLIES_AT_ONCE)):
        some = replies[at : at + REPLIES_AT_ONCE]
        await asyncio.gather(*(ledger.charge(hold, reply) for reply in reversed(some)))
        await ledger.report("model")

    assert await ledger.usual_output_tokens("openai", "openai/gpt-5-mini") == 210


async def test_several_replies_to_one_request_are_each_as_long_as_a_part_of_it(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    for _ in range(10):
        await ledger.charge(hold, spend("0", output_tokens=7_999, replies=8))

    assert await ledger.usual_output_tokens("openai", "openai/gpt-5-mini") == 1_000


async def test_reports_group_calls_and_money_the_dearest_first(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    await ledger.charge(
        hold, spend("0.10", estimated="0.20", input_tokens=5, output_tokens=7, tags=frozenset({"a", "b"}))
    )
    await ledger.charge(hold, spend("0.05", key="research", task=None, tags=frozenset({"a"})))
    await ledger.charge(hold, spend("1.00", provider="anthropic", model="anthropic/x", at=NOW - timedelta(days=1)))

    async def lines(by: str) -> list[tuple[str, int, Decimal]]:
        return [(line.group, line.calls, line.cost) for line in await ledger.report(by)]  # type: ignore[arg-type]  # a parameter of the test

    assert await lines("provider") == [("anthropic", 1, Decimal("1.00")), ("openai", 2, Decimal("0.15"))]
    assert await lines("model") == [("anthropic/x", 1, Decimal("1.00")), ("openai/gpt-5-mini", 2, Decimal("0.15"))]
    assert await lines("task") == [("chat_small", 2, Decimal("1.10")), ("", 1, Decimal("0.05"))]
    assert await lines("key") == [("", 2, Decimal("1.10")), ("research", 1, Decimal("0.05"))]
    assert await lines("tag") == [("", 1, Decimal("1.00")), ("a", 2, Decimal("0.15")), ("b", 1, Decimal("0.10"))]
    assert await lines("day") == [("2026-11-22", 1, Decimal("1.00")), ("2026-11-23", 2, Decimal("0.15"))]
    [first] = [line for line in await ledger.report("tag") if line.group == "b"]
    assert (first.estimated, first.input_tokens, first.output_tokens) == (Decimal("0.20"), 5, 7)


async def test_a_report_begins_at_the_time_asked_for(ledger: Ledger) -> None:
    hold = await nothing_held(ledger)
    await ledger.charge(hold, spend("0.10", at=NOW - timedelta(microseconds=1)))
    await ledger.charge(hold, spend("0.20", at=NOW))

    report = await ledger.report("day", since=NOW)

    assert [line.cost for line in report] == [Decimal("0.20")]
    assert await ledger.report("day", since=NOW + timedelta(seconds=1)) == []


async def test_a_time_without_a_zone_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="need a zone"):
        await ledger.spent(TEAM, at=datetime(2026, 11, 23))


# --- many at once --------------------------------------------------------------------------


async def test_two_hundred_reservations_at_once_never_pass_the_limit(ledger: Ledger) -> None:
    await ledger.settle(await nothing_held(ledger), spend("1.05"))

    outcomes = await asyncio.gather(*(reserve(ledger, "0.10") for _ in range(200)), return_exceptions=True)

    held = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, BudgetExceeded)]
    assert (len(held), len(refused)) == (9, 191)
    assert await ledger.spent(TEAM, at=NOW) == decimals("1.05", "0.90")


async def test_many_who_hold_against_several_budgets_in_any_order_do_not_block_each_other(ledger: Ledger) -> None:
    budgets = [Budget(name=f"b{n}", limit=Decimal(1000), match={"key": "k"} if n % 2 else {}) for n in range(2)]
    budgets += [Budget(name=f"t{n}", limit=Decimal(1000), period="hour", match={"tag": f"t{n}"}) for n in range(3)]
    amounts = {budget.name: Decimal(1) for budget in budgets}

    async def one(n: int) -> None:
        order = budgets[n % 5 :] + budgets[: n % 5]
        hold = await ledger.reserve(order if n % 2 else order[::-1], amounts, at=NOW, ttl_seconds=60 if n % 3 else 0)
        await ledger.charge(hold, spend("0.10", key="k", tags=frozenset({"t0", "t1", "t2"})))
        await (ledger.release(hold) if n % 2 else ledger.settle(hold, spend("0.10", key="k")))

    await asyncio.gather(*(one(n) for n in range(100)))

    assert [await ledger.spent(budget, at=NOW) for budget in budgets] == [
        *[decimals("15", "0")] * 2,
        *[decimals("10", "0")] * 3,
    ]


async def test_budgets_declared_while_others_spend_miss_nothing(ledger: Ledger) -> None:
    tags = frozenset(f"t{n}" for n in range(10))
    periods: tuple[Period, ...] = ("hour", "day", "month", "total")
    budgets = [
        Budget(name=f"{tag} {period}", limit=Decimal(100), period=period, match={"tag": tag})
        for tag in sorted(tags)
        for period in periods
    ]
    hold = await nothing_held(ledger)

    async def declare(budget: Budget) -> None:
        await ledger.charge(hold, spend("0.01", tags=tags))
        await ledger.release(await reserve(ledger, "1", budget))
        await ledger.charge(hold, spend("0.01", tags=tags))

    await asyncio.gather(*(declare(budget) for budget in budgets))

    assert {await ledger.spent(budget, at=NOW) for budget in budgets} == {decimals("0.80", "0")}


async def test_a_caller_who_leaves_while_reserving_leaves_no_money_held(ledger: Ledger) -> None:
    reserving = [asyncio.create_task(reserve(ledger, "0.10")) for _ in range(10)]
    await asyncio.sleep(0)

    for task in reserving:
        task.cancel()
    outcomes = await asyncio.gather(*reserving, return_exceptions=True)
    await reserve(ledger, "0.01")

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await until_spent(ledger, "0", "0.01")


async def test_a_caller_who_leaves_while_settling_is_charged_all_the_same(ledger: Ledger) -> None:
    hold = await reserve(ledger, "1.00")
    settling = asyncio.create_task(ledger.settle(hold, spend("0.40")))
    await asyncio.sleep(0)

    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)

    assert settling.done()
    await until_spent(ledger, "0.40", "0")


async def test_a_new_ledger_can_be_opened_by_many_at_the_same_moment(place: Place) -> None:
    ledgers = [place.open() for _ in range(8)]

    await asyncio.gather(
        *(reserve(ledger, "0.10") for ledger in ledgers), *(ledger.spent(TEAM, at=NOW) for ledger in ledgers)
    )

    await until_spent(ledgers[0], "0", "0.80")
    await asyncio.gather(*(ledger.aclose() for ledger in ledgers))


async def test_four_processes_together_never_pass_the_limit(place: Place, ledger: Ledger) -> None:
    with ExitStack() as processes:
        racers = [processes.enter_context(spender(place, "race")) for _ in range(4)]
        for racer in racers:
            assert line_of(racer) == "ready"
        for racer in racers:
            tell(racer)
        granted = [int(line_of(racer)) for racer in racers]

    assert sum(granted) == 20
    await until_spent(ledger, "2.00", "0")


# A leased ledger charges what a killed process held: `tests/sekha/test_leased_ledger.py`.
@pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
async def test_what_a_killed_process_held_is_freed_and_what_it_spent_is_not(place: Place, ledger: Ledger) -> None:
    with spender(place, "hold") as process:
        assert [line_of(process), line_of(process)] == ["charged", "charged"]
        os.kill(process.pid, signal.SIGKILL)

    assert await ledger.spent(TEAM, at=NOW) == decimals("0.50", "0.50")
    with pytest.raises(BudgetExceeded):
        await reserve(ledger, "1.50")
    later = NOW + timedelta(seconds=60)
    await reserve(ledger, "1.50", at=later)
    assert await ledger.spent(TEAM, at=later) == decimals("0.50", "1.50")


def spender(place: Place, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SPENDER, place.url, what, *([place.journals] if place.journals else [])],
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
