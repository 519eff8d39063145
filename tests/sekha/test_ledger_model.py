"""Any sequence of calls, from two processes' ledgers on one file, against a model that is plain sums."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sekha.errors import BudgetExceeded
from sekha.ledger import Budget, GroupBy, Hold, Ledger, Scope, Spend, period_end, period_start
from sekha.ledgers import open_database, open_ledger
from sekha.ledgers.leased import LeasedLedger
from sekha.ledgers.sql import SqlLedger
from sekha.pricing import Usage

amounts = st.one_of(
    st.sampled_from([Decimal("0.25"), Decimal("0.5"), Decimal("1")]),
    st.integers(0, 2 * 10**12).map(lambda picos: Decimal(picos).scaleb(-12)),
)
fields = {"provider": ["p", "q"], "model": ["m", "n"], "task": ["t"], "key": ["k", "l"], "tag": ["x", "y"]}
matches = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in fields.items()})
scopes = st.builds(
    Scope,
    provider=st.sampled_from(fields["provider"]),
    model=st.sampled_from(fields["model"]),
    task=st.none() | st.sampled_from(fields["task"]),
    key=st.none() | st.sampled_from(fields["key"]),
    tags=st.frozensets(st.sampled_from(fields["tag"])),
)
budgets = st.builds(
    Budget,
    name=st.uuids().map(str),
    limit=amounts.map(lambda amount: amount * 3),
    period=st.sampled_from(["hour", "day", "month", "total"]),
    match=matches,
)


@dataclass
class Held:
    """A hold as the model knows it."""

    hold: Hold
    lines: dict[str, Decimal]
    expires_at: datetime

    def charge(self, spend: Spend) -> None:
        if self.expires_at > spend.at:
            self.expires_at = max(self.expires_at, spend.at + timedelta(seconds=self.hold.ttl_seconds))
        for budget in self.hold.budgets:
            if budget.name in self.lines and budget.covers(spend.scope):
                self.lines[budget.name] = max(self.lines[budget.name] - spend.cost, Decimal(0))


class LedgerMachine(RuleBasedStateMachine):
    known = Bundle("known")
    holds = Bundle("holds")
    spends = Bundle("spends")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.now = datetime(2026, 11, 30, 22, 45, tzinfo=UTC)
        self.ledgers = self.opened(f"sqlite:///{Path(self.folder.name) / 'ledger.db'}")
        self.declared: list[Budget] = []
        self.recorded: dict[str, Spend] = {}
        self.held: dict[str, Held] = {}

    def opened(self, url: str) -> list[Ledger]:
        return [open_ledger(url), open_ledger(url)]

    def at(self, hold: Hold, age_minutes: int) -> datetime:
        """When a call was made that is charged now."""
        return self.now - timedelta(minutes=age_minutes)

    def teardown(self) -> None:
        for ledger in self.ledgers:
            self.runner.run(ledger.aclose())
        self.runner.close()
        self.folder.cleanup()

    def spent(self, budget: Budget) -> Decimal:
        start, end = period_start(budget.period, self.now), period_end(budget.period, self.now)
        return sum(
            (
                spend.cost
                for spend in self.recorded.values()
                if budget.covers(spend.scope)
                and (start is None or spend.at >= start)
                and (end is None or spend.at < end)
            ),
            Decimal(0),
        )

    def held_for(self, budget: Budget) -> Decimal:
        return sum(
            (
                # Budgets that mean the same calls and period are one and the same to the ledger.
                max(
                    held.lines.get(other.name, Decimal(0))
                    for other in held.hold.budgets
                    if (other.match, other.period) == (budget.match, budget.period)
                )
                for held in self.held.values()
                if held.expires_at > self.now
                and any((other.match, other.period) == (budget.match, budget.period) for other in held.hold.budgets)
            ),
            Decimal(0),
        )

    @rule(target=known, budget=budgets)
    def declare(self, budget: Budget) -> Budget:
        self.declared.append(budget)
        return budget

    @rule(minutes=st.sampled_from([1, 10, 90, 60 * 30, 60 * 24 * 20]))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule(
        target=holds,
        process=st.integers(0, 1),
        wanted=st.lists(st.tuples(known, amounts), max_size=3, unique_by=lambda pair: pair[0].name),
        ttl_seconds=st.sampled_from([30, 300, 7200]),
    )
    def reserve(self, process: int, wanted: Sequence[tuple[Budget, Decimal]], ttl_seconds: int) -> object:
        chosen = [budget for budget, _ in wanted]
        needed = {budget.name: amount for budget, amount in wanted}
        left = {budget.name: budget.limit - self.spent(budget) - self.held_for(budget) for budget in chosen}
        first = next((b for b in chosen if needed[b.name] > 0 and needed[b.name] > left[b.name]), None)

        if any(needed.values()):
            self.held = {name: held for name, held in self.held.items() if held.expires_at > self.now}
        reserving = self.ledgers[process].reserve(chosen, needed, at=self.now, ttl_seconds=ttl_seconds)
        if first is not None:
            with pytest.raises(BudgetExceeded) as refused:
                self.runner.run(reserving)
            assert refused.value.budget == first.name
            assert refused.value.remaining == max(left[first.name], Decimal(0))
            return multiple()
        hold = self.runner.run(reserving)
        self.held[hold.id] = Held(hold, dict(hold.amounts), hold.expires_at)
        for budget in chosen:
            if needed[budget.name]:
                assert self.spent(budget) + self.held_for(budget) <= budget.limit
        return hold

    @rule(
        target=spends,
        process=st.integers(0, 1),
        hold=holds,
        scope=scopes,
        cost=amounts,
        age_minutes=st.sampled_from([0, 0, 0, 70, 60 * 26]),
    )
    def charge(self, process: int, hold: Hold, scope: Scope, cost: Decimal, age_minutes: int) -> Spend:
        at = self.at(hold, age_minutes)
        spend = Spend(scope=scope, cost=cost, estimated=cost, usage=Usage(output_tokens=1), at=at)
        self.runner.run(self.ledgers[process].charge(hold, spend))
        self.recorded[spend.id] = spend
        if hold.id in self.held:
            self.held[hold.id].charge(spend)
        return spend

    @rule(process=st.integers(0, 1), hold=holds, spend=spends)
    def charge_again(self, process: int, hold: Hold, spend: Spend) -> None:
        self.runner.run(self.ledgers[process].charge(hold, spend))

    @rule(process=st.integers(0, 1), hold=consumes(holds), scope=scopes, cost=amounts)
    def settle(self, process: int, hold: Hold, scope: Scope, cost: Decimal) -> None:
        spend = Spend(scope=scope, cost=cost, estimated=cost, usage=Usage(output_tokens=1), at=self.now)
        self.runner.run(self.ledgers[process].settle(hold, spend))
        self.recorded[spend.id] = spend
        self.held.pop(hold.id, None)

    @rule(process=st.integers(0, 1), hold=holds)
    def release(self, process: int, hold: Hold) -> None:
        self.runner.run(self.ledgers[process].release(hold))
        self.held.pop(hold.id, None)

    @invariant()
    def every_budget_knows_what_is_spent_and_held(self) -> None:
        for number, budget in enumerate(self.declared):
            figures = self.runner.run(self.ledgers[number % 2].spent(budget, at=self.now))
            assert figures == (self.spent(budget), self.held_for(budget))

    @rule(by=st.sampled_from(["provider", "model", "task", "key", "day"]))
    def reports_add_up(self, by: GroupBy) -> None:
        report = self.runner.run(self.ledgers[0].report(by))
        assert sum(line.cost for line in report) == sum(spend.cost for spend in self.recorded.values())
        assert sum(line.calls for line in report) == len(self.recorded)


class LeasedLedgerMachine(LedgerMachine):
    """One process that spends slices of its budgets is to be told from one that asks each time by its speed alone."""

    def opened(self, url: str) -> list[Ledger]:
        journals = Path(self.folder.name) / "journals"
        return [LeasedLedger(SqlLedger(open_database(url)), journals, clock=lambda: self.now)] * 2

    def at(self, hold: Hold, age_minutes: int) -> datetime:
        # A hold that expired may be gone or not yet, and only what was late would still find it.
        gone = hold.id not in self.held or self.held[hold.id].expires_at <= self.now
        return super().at(hold, 0 if gone else age_minutes)


TestLedger = LedgerMachine.TestCase
TestLeasedLedger = LeasedLedgerMachine.TestCase
TestLeasedLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
