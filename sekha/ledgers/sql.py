"""A ledger of transactions, written once in the SQL that SQLite and PostgreSQL share.

Locks are taken in one order everywhere, so that transactions wait for each other but never in a
circle: how far a journal is on record, spends, totals by name, holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TypeVar
from uuid import uuid4

from sekha.errors import BudgetExceeded
from sekha.ledger import Budget, GroupBy, Hold, Scope, Spend, Spent
from sekha.ledgers.database import Database, Transaction
from sekha.ledgers.encoding import to_dollars
from sekha.ledgers.holds import charge, release, reserve, settle, spent_and_held
from sekha.ledgers.slices import (
    Kept,
    Leased,
    Slice,
    Standing,
    Wanted,
    close_lease,
    finish,
    keep,
    lease,
    standings,
)
from sekha.ledgers.spends import Batch, forget, report, usual_output_tokens
from sekha.ledgers.totals import locked_totals

__all__ = ["SqlLedger"]

T = TypeVar("T")


class SqlLedger:
    """A `Ledger` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def reserve(
        self,
        budgets: Sequence[Budget],
        amounts: Mapping[str, Decimal],
        *,
        at: datetime,
        ttl_seconds: float,
        scope: Scope | None = None,  # noqa: ARG002 - for ledgers that outlive their process
    ) -> Hold:
        held = {budget.name: amounts[budget.name] for budget in budgets if amounts.get(budget.name, 0) > 0}
        hold = Hold(
            id=str(uuid4()),
            budgets=tuple(budgets),
            amounts=held,
            expires_at=at + timedelta(seconds=ttl_seconds),
            ttl_seconds=ttl_seconds,
        )
        if not held:
            return hold
        reserving = self._database.write(partial(reserve, hold=hold, at=at), durable=False)
        try:
            refused = await _outcome(reserving)
        except asyncio.CancelledError:
            reserving.add_done_callback(partial(self._abandon, hold=hold))
            raise
        if refused is not None:
            raise refused
        return hold

    async def charge(self, hold: Hold, spend: Spend) -> None:
        await _outcome(self._database.write(partial(charge, hold=hold, spend=spend), durable=True))

    async def settle(self, hold: Hold, spend: Spend) -> None:
        await _outcome(self._database.write(partial(settle, hold=hold, spend=spend), durable=True))

    async def release(self, hold: Hold) -> None:
        if hold.amounts:
            await _outcome(self._database.write(partial(release, hold=hold), durable=False))

    async def spent(self, budget: Budget, *, at: datetime) -> tuple[Decimal, Decimal]:
        spent, held = await _outcome(self._database.read(partial(spent_and_held, budget=budget, at=at)))
        return to_dollars(spent), to_dollars(held)

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        return await _outcome(self._database.read(partial(usual_output_tokens, provider=provider, model=model)))

    async def report(self, by: GroupBy, *, since: datetime | None = None) -> list[Spent]:
        return await _outcome(self._database.read(partial(report, by=by, since=since)))

    async def answer(self) -> None:
        """Return once the database has answered."""
        await _outcome(self._database.read(_nothing))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._database.close)

    async def lease(self, owner: str, wanted: Sequence[Wanted], *, at: datetime, expires_at: datetime) -> list[Leased]:
        """Enlarge slices by what is needed and left, each as far as it goes, and recall what others leave idle."""
        work = partial(lease, owner=owner, wanted=wanted, at=at, expires_at=expires_at)
        return await _outcome(self._database.write(work, durable=False))

    async def keep(
        self,
        owner: str,
        batch: Batch | None,
        slices: Sequence[Slice],
        *,
        expires_at: datetime,
        watched: Sequence[Budget],
        at: datetime,
    ) -> Kept:
        """Record what was spent and write down the slices that it was taken from, all in one transaction.

        Says also how the `watched` budgets stand then, in the period that holds `at`.
        """
        work = partial(keep, owner=owner, batch=batch, slices=slices, expires_at=expires_at, watched=watched, at=at)
        return await _outcome(self._database.write(work, durable=batch is not None))

    async def close_lease(self, owner: str, batch: Batch | None, holds: Sequence[tuple[Hold, Sequence[Slice]]]) -> None:
        """Record what was spent from a process's slices, make holds of calls under way, and free the rest."""
        work = partial(close_lease, owner=owner, batch=batch, holds=holds)
        await _outcome(self._database.write(work, durable=True))

    async def finish(self, owner: str, spends: Sequence[tuple[int, Spend]], worst: Sequence[Spend]) -> int:
        """Record what a dead process spent, by its journal's numbers, and what its calls cost at worst; how many."""
        work = partial(finish, owner=owner, spends=spends, worst=worst)
        return await _outcome(self._database.write(work, durable=True))

    async def forget(self, owner: str) -> None:
        """Forget how much of a process's journal is on record, once there is no journal any more."""
        await _outcome(self._database.write(partial(forget, owner=owner), durable=False))

    async def standings(self, owner: str, budgets: Sequence[Budget], *, at: datetime) -> list[Standing]:
        """What each budget has spent and others hold for calls, in the period that holds `at`."""
        found = await _outcome(self._database.read(partial(standings, owner=owner, budgets=budgets, at=at)))
        if None in found:
            # Kept from now on, since whoever asks once will ask again.
            await _outcome(self._database.write(partial(locked_totals, budgets=budgets, at=at), durable=False))
            found = await _outcome(self._database.read(partial(standings, owner=owner, budgets=budgets, at=at)))
        return [standing for standing in found if standing is not None]

    def _abandon(self, reserving: Future[BudgetExceeded | None], hold: Hold) -> None:
        """Free a hold that was made for a caller who had left."""
        if reserving.exception() is None and reserving.result() is None:
            with suppress(RuntimeError):  # the ledger is being closed, and the hold expires by itself
                self._database.write(partial(release, hold=hold), durable=False)


def _nothing(_transaction: Transaction) -> None:
    """Ask nothing of a database but to answer."""


async def _outcome(work: Future[T]) -> T:
    # Shielded: a caller who leaves may not take a spend with it that is waiting to be recorded.
    return await asyncio.shield(asyncio.wrap_future(work))
