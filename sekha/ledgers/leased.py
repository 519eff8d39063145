"""A ledger for processes that cannot wait for a transaction with every request.

It leases slices of budgets from the ledger that all processes share, and spends from them in memory.
A slice counts there as held, so all slices and all spending together never pass a limit. It is a
twentieth of what is left, so it shrinks as a budget is spent until each call is leased by itself; what
nobody used for a second goes back, and whatever lies idle goes back within about a second when
another process runs short. A call is refused only after the shared ledger refused it.

What is held and spent is written to a journal before it goes on and into the shared ledger soon
behind. After a `kill -9` any process on this machine finishes the journal: what was spent is
recorded, and calls whose outcome nobody knows are charged at their worst case. Only then is the dead
process's slice free.

What may be missed: a power cut takes what was written in the last second and is not yet on record
in the shared ledger. A machine that stays dead keeps its journals, and others wait `LEASE_SECONDS`
for its slices: until it is back, what it had in flight then and had spent in its last moments is
missing, never more than its slices.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from uuid import uuid4

from sekha.errors import LedgerError, LedgerUnavailable
from sekha.ledger import Budget, GroupBy, Hold, Scope, Spend, Spent, period_end, period_start
from sekha.ledgers.encoding import meaning, picos, to_dollars
from sekha.ledgers.holds import exceeded
from sekha.ledgers.journal import Journal, abandoned, delete, scope_record, spend_record
from sekha.ledgers.pools import FIRST, LAST, Pool
from sekha.ledgers.slices import SHARE, Leased, Slice, Standing, Wanted
from sekha.ledgers.sql import SqlLedger
from sekha.ledgers.totals import Coverage
from sekha.ledgers.unrecorded import KnownScope, Sealed, Unrecorded
from sekha.naps import nap

__all__ = ["ANSWER_SECONDS", "BEHIND_SECONDS", "LEASE_SECONDS", "LeasedLedger"]

log = logging.getLogger("sekha.ledgers")
T = TypeVar("T")

LEASE_SECONDS = 60.0
"""A slice that its process does not renew is free after this long."""
BEHIND_SECONDS = 30.0
"""Nothing more is held while spending has waited this long to be recorded."""
_RENEW_SECONDS = 15.0
_SKEW = timedelta(seconds=5)
"""A slice is left alone so long before it expires, since other machines' clocks may be ahead."""
_BEAT_SECONDS = 0.5
"""What is spent is recorded with each beat, and what others spent is looked up."""
_EARLY_SECONDS = 0.005
"""A loop that counts milliseconds may wake the worker so long before its beat: recording twice costs two commits."""
_IDLE_BEATS = 2
_WATCHED_BEATS = 10
_SYNC_BEATS = 2
_GOOD_SECONDS = 0.25
"""What is known of a pool, and was found to hold, is not looked at again for so long."""
_LEAN_SECONDS = 2.0
"""So long after its slice was recalled a process leases exactly what its calls need."""
_RECALL_SECONDS = 1.5
"""A call waits so long at most for what lies idle elsewhere."""
ANSWER_SECONDS = 5.0
"""A caller waits so long at most for the shared ledger, be it silent or busy."""
_CLOSE_SECONDS = 10.0
"""What the worker has begun may take so long when the ledger is closed."""
_REPORTS = 4
"""So many are made at once. More would leave no connection to record with."""
_ASK_AGAIN_SECONDS = 0.05
_RECOVER_SECONDS = 3.0
_BACK_OFF_SECONDS = 0.5
_USUAL_SECONDS = 30.0
_MANY = 10_000
_RECENT = 5_000
"""Spends known to have been noted before: so many, and as many that came before them."""
_SCOPES = 1_000
"""Remembered at once. Callers make them, with up to ten kilobytes of tags each."""
_NEVER = float("inf")


class _Held(NamedTuple):
    """What `reserve_now` holds, of which nobody has asked for the hold."""

    budgets: tuple[Budget, ...]
    needs: Sequence[int]
    ttl_seconds: float

    def made(self, name: str, expires_at: datetime) -> Hold:
        amounts = {each.name: to_dollars(need) for each, need in zip(self.budgets, self.needs, strict=True) if need}
        return Hold(id=name, budgets=self.budgets, amounts=amounts, expires_at=expires_at, ttl_seconds=self.ttl_seconds)


class _Open:
    """A hold that is neither settled nor released."""

    __slots__ = ("at", "expires_at", "hold", "left", "name", "named", "scope", "single")

    def __init__(  # noqa: PLR0917 - for each request, and names take half as long again
        self,
        name: str,
        hold: Hold | _Held,
        left: dict[Pool, int],
        at: datetime,
        expires_at: datetime,
        scope: KnownScope | None,
    ) -> None:
        self.name = name
        self.hold = hold
        """Or what it would say: few holds are ever looked at."""
        self.left = left
        self.at = at
        self.scope = scope
        self.expires_at = expires_at
        self.named = False
        """A spend under it goes by its name."""
        self.single = False
        """A spend by its name, under it or another, is recorded by itself, and so is each that follows."""

    def record(self) -> list[object]:
        left = [(pool.index, amount) for pool, amount in self.left.items()]
        return ["h", self.name, self.at, left, self.scope and self.scope.record, self.named]

    def seen(self) -> Hold:
        """The hold as whoever made it has it."""
        hold = self.hold
        if isinstance(hold, _Held):
            hold = self.hold = hold.made(self.name, self.expires_at)
        return hold


_Known: TypeAlias = tuple[Budget, Pool, int]
"""A budget, its pool and its limit in picos."""


class _Want:
    """A caller who waits for money."""

    __slots__ = ("at", "bounds", "future", "hold", "needs", "scope", "since")

    def __init__(
        self, hold: Hold, needs: dict[Pool, int], *, bounds: dict[Pool, _Known], at: datetime, scope: Scope | None
    ) -> None:
        self.hold = hold
        self.needs = needs
        self.bounds = bounds
        """What each pool is leased under."""
        self.at = at
        self.scope = scope
        self.future: Future[Hold] = asyncio.get_running_loop().create_future()
        self.since = monotonic()


class _Replaced:
    """Segments of the journal that a newer one takes the place of."""

    __slots__ = ("paths", "safe", "upto")

    def __init__(self, upto: int, paths: list[Path]) -> None:
        self.upto = upto
        """Spends up to here are in them."""
        self.paths = paths
        self.safe = False
        """Whether the newer one survives a power cut, and with it the holds that it repeats."""


class LeasedLedger:
    """A `Ledger` that answers from memory, over one that is shared. For one event loop of one process.

    `reserve`, `charge`, `settle`, `release` and `spent` normally return without suspending. `spent`
    may be a second behind what other processes do, and `usual_output_tokens` thirty seconds;
    `reserve` is exact. What is spent is added up for each scope and minute before it is recorded, so a
    spend that is handed in twice is known by its id in this process alone, among the next five thousand, and
    not for long after: it is for a gateway, which answers a request where it came in. Whatever may be done again
    by another process spends from the shared ledger itself. A hold is settled or released where it was made;
    one that is open at `aclose` stays in the shared ledger until it expires, and anybody may settle it there.
    A process that forks opens its ledger afterwards, since a child would keep the journal's lock.
    """

    def __init__(
        self,
        ledger: SqlLedger,
        journal_folder: Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        behind_seconds: float = BEHIND_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        segment_bytes: int = 4_000_000,
    ) -> None:
        self._ledger = ledger
        self._folder = journal_folder
        self._clock = clock
        self._behind_seconds = behind_seconds
        self._answer_seconds = answer_seconds
        self._segment_bytes = segment_bytes
        self._journal: Journal | None = None
        self._worker: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._wake: asyncio.Event
        self._closing = False
        self._owner = uuid4().hex
        self._holds = 0
        # What is known.
        self._pools: list[Pool] = []
        self._by_meaning: dict[tuple[str, str], Pool] = {}
        self._known: dict[int, _Known] = {}
        self._coverage: Coverage[Pool] = Coverage()
        self._scopes: dict[Scope, KnownScope] = {}
        self._scopes_known = 0
        self._lasting: dict[float, timedelta] = {}
        self._usual: dict[tuple[str, str], tuple[int | None, float]] = {}
        self._usual_asked: set[tuple[str, str]] = set()
        # What is under way.
        self._open: dict[str, _Open] = {}
        self._next_expiry = LAST
        self._unrecorded = Unrecorded()
        self._behind_since = _NEVER
        self._recent: dict[str, None] = {}
        self._less_recent: dict[str, None] = {}
        self._wants: list[_Want] = []
        self._questions: list[tuple[Callable[[], Awaitable[Any]], Future[Any]]] = []
        self._reports = asyncio.Semaphore(_REPORTS)
        # The worker's own.
        self._resting = False
        """Whether it looks again in more than a beat, unless it is woken."""
        self._beat = 0
        self._beat_at = -_BEAT_SECONDS
        """When the last beat began."""
        self._next_renewal = 0.0
        self._next_recovery = 0.0
        self._recovered = False
        self._down: LedgerError | None = None
        self._retry_at = 0.0
        self._recorded = 0
        self._replaced: list[_Replaced] = []
        self._syncing: Future[None] | None = None
        self._synced_size = 0

    def start(self) -> None:
        """Begin to finish what processes that died left behind. Left out, the first call does.

        Neither waits for the shared ledger nor fails with it: that is tried behind, again and again.
        """
        self._start()

    # --- what callers await ------------------------------------------------------------------

    async def reserve(
        self,
        budgets: Sequence[Budget],
        amounts: Mapping[str, Decimal],
        *,
        at: datetime,
        ttl_seconds: float,
        scope: Scope | None = None,
    ) -> Hold:
        behind = monotonic() - self._behind_since
        if behind > self._behind_seconds:
            raise LedgerUnavailable(str(self._folder), f"spending has waited to be recorded for {behind:.0f} s")
        held: dict[str, Decimal] = {}
        needs: dict[Pool, int] = {}
        ready = not self._closing
        for budget in budgets:
            amount = amounts.get(budget.name)
            if amount is None or amount <= 0:
                continue
            held[budget.name] = amount
            _, pool, limit = self._known.get(id(budget)) or self._register(budget)
            need = picos(amount)
            if pool.free < need or pool.limit > limit or not pool.since <= at < pool.until or pool in needs:
                ready = False
            needs[pool] = need
        self._holds += 1
        hold = Hold(
            id=f"{self._owner}-{self._holds:x}",
            budgets=tuple(budgets),
            amounts=held,
            expires_at=at + (self._lasting.get(ttl_seconds) or self._last(ttl_seconds)),
            ttl_seconds=ttl_seconds,
        )
        if not held:
            return hold
        if ready:
            self._take(hold, needs, at, scope)
            return hold
        return await self._wait(self._want(hold, at, scope))

    async def charge(self, hold: Hold, spend: Spend) -> None:
        under = self._open.get(hold.id)
        if under is None and self._is_foreign(hold):
            await self._ledger.charge(hold, spend)
        elif spend.id not in self._recent and spend.id not in self._less_recent:
            written = self._spend("c", hold.id, under, spend, picos(spend.cost), picos(spend.estimated))
            if under is not None:
                under.named |= spend.id == hold.id
                if under.expires_at > spend.at:
                    under.expires_at = max(under.expires_at, spend.at + timedelta(seconds=hold.ttl_seconds))
            if not written:
                await self.recorded()

    async def settle(self, hold: Hold, spend: Spend) -> None:
        under = self._open.get(hold.id)
        if under is None and self._is_foreign(hold):
            await self._ledger.settle(hold, spend)
        elif not self._settle(hold.id, under, spend, picos(spend.cost), picos(spend.estimated)):
            await self.recorded()

    async def release(self, hold: Hold) -> None:
        if hold.id not in self._open and self._is_foreign(hold):
            await self._ledger.release(hold)
        else:
            self._release(hold.id)

    async def spent(self, budget: Budget, *, at: datetime) -> tuple[Decimal, Decimal]:
        known = self._known.get(id(budget))
        if known is None:
            period_start(budget.period, at)  # a time without a zone is refused before anything is kept for it
            known = self._register(budget)
        pool = known[1]
        pool.asked = self._beat
        fresh = pool.refreshed + BEHIND_SECONDS > monotonic() and at.tzinfo is not None
        if fresh and pool.start <= at < pool.end:
            held = pool.elsewhere + (pool.held if at < self._next_expiry else self._held(pool, at))
            return to_dollars(pool.spent + pool.pending), to_dollars(held)
        return await self._ask(partial(self._look, pool, budget, at))

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        known = self._usual.get((provider, model))
        if known is not None:
            tokens, refreshed = known
            age = monotonic() - refreshed
            if age > _USUAL_SECONDS / 2:
                self._usual_asked.add((provider, model))
            if age < _USUAL_SECONDS or self._down:
                return tokens
        return await self._ask(partial(self._look_up_usual, provider, model))

    async def report(self, by: GroupBy, *, since: datetime | None = None) -> list[Spent]:
        # A report may take long. So it is begun only once the database has just answered something short.
        await self._ask(self._ledger.answer)
        async with self._in_time():
            await self._reports.acquire()
        try:
            return await self._ledger.report(by, since=since)
        finally:
            self._reports.release()

    async def aclose(self) -> None:
        """Record everything, give all slices back and remove the journal. What fails is left to be recovered.

        A shared ledger that does not answer is not waited for longer than some seconds.
        """
        if self._closing:
            return
        self._closing = True
        if self._worker is not None and not self._worker.done():
            self._wake.set()
            _, late = await asyncio.wait([self._worker], timeout=_CLOSE_SECONDS)
            if late:
                self._down, self._retry_at = self._silent(_CLOSE_SECONDS), _NEVER
                self._worker.cancel()
                await asyncio.wait([self._worker])
        if self._journal is not None:
            await self._hand_over(self._journal)
        await self._ledger.aclose()

    # --- at once, or not at all --------------------------------------------------------------

    def reserve_now(
        self,
        budgets: tuple[Budget, ...],
        needs: Sequence[int],
        *,
        at: datetime,
        ttl_seconds: float,
        scope: Scope,
    ) -> str | None:
        """Hold so many picos against each of these budgets, and name the hold.

        None, and nothing has happened, where there is not as much left as far as is known here, or where the
        shared ledger, which alone may refuse, would have to be asked.
        """
        now = monotonic()
        if self._closing or now - self._behind_since > self._behind_seconds:
            return None
        left: dict[Pool, int] = {}
        for budget, need in zip(budgets, needs, strict=True):
            if not need:
                continue
            known = self._known.get(id(budget))
            if known is None:
                return None
            _, pool, limit = known
            if (
                (now >= pool.good_until and not self._is_good(pool, limit, at, now))
                or pool.free < need
                or limit - pool.spent - pool.pending - pool.elsewhere - pool.held < need
                or pool in left
            ):
                return None
            left[pool] = need
        self._holds += 1
        name = f"{self._owner}-{self._holds:x}"
        if left:
            expires_at = at + (self._lasting.get(ttl_seconds) or self._last(ttl_seconds))
            known_scope = self._scopes.get(scope) or self._scope(scope)
            try:
                self._hold(_Open(name, _Held(budgets, needs, ttl_seconds), left, at, expires_at, known_scope))
            except LedgerUnavailable:
                return None
        return name

    def _is_good(self, pool: Pool, limit: int, at: datetime, now: float) -> bool:
        """Whether what is known of a pool holds now, and then for a moment in which nobody need look again."""
        pool.asked = self._beat
        if (
            pool.limit > limit
            or not pool.since <= at < pool.until
            or pool.refreshed + BEHIND_SECONDS <= now
            or not pool.start <= at < pool.end
            or at >= self._next_expiry
        ):
            return False
        until = min(pool.until, pool.end, self._next_expiry)
        pool.good_until = now + min((until - at).total_seconds(), _GOOD_SECONDS)
        return True

    def held_now(self, name: str, *, at: datetime, ttl_seconds: float) -> Hold:
        """The hold that `reserve_now` named; one without amounts when nothing is held under it."""
        under = self._open.get(name)
        if under is not None:
            return under.seen()
        return _Held((), (), ttl_seconds).made(name, at + timedelta(seconds=ttl_seconds))

    def settle_now(self, name: str, spend: Spend, *, cost: int, estimated: int) -> bool:
        """Settle what `reserve_now` held, with the spend's dollars in picos too.

        False when the journal could not take it: then `recorded` is to be awaited before anybody is told.
        """
        return self._settle(name, self._open.get(name), spend, cost, estimated)

    def release_now(self, name: str) -> None:
        """Free what `reserve_now` held."""
        self._release(name)

    async def recorded(self) -> None:
        """Return when everything that was spent until now is in the shared ledger."""
        await self._ask(_nothing)

    # --- in memory, and in the journal -------------------------------------------------------

    def _register(self, budget: Budget) -> _Known:
        journal = self._start()
        key = meaning(budget), budget.period
        pool = self._by_meaning.get(key)
        if pool is None:
            pool = Pool(len(self._pools), budget)
            journal.write(pool.record())
            self._pools.append(pool)
            self._by_meaning[key] = pool
            self._coverage.add(budget.match, pool)
            self._scopes.clear()
        if len(self._known) >= _MANY:
            self._known.clear()
        # Budgets are found by identity, which is theirs alone for as long as they are kept here.
        known = self._known[id(budget)] = budget, pool, picos(budget.limit)
        return known

    def _scope(self, scope: Scope) -> KnownScope:
        """Get to know a scope."""
        if len(self._scopes) >= _SCOPES:
            self._scopes.clear()
        # One that is known again goes by another name: other budgets may cover it by now.
        self._scopes_known += 1
        name = f"{self._owner}.{self._scopes_known:x}"
        known = self._scopes[scope] = KnownScope(name, scope_record(scope), self._coverage.of(scope))
        return known

    def _last(self, ttl_seconds: float) -> timedelta:
        if len(self._lasting) >= _SCOPES:
            self._lasting.clear()
        lasts = self._lasting[ttl_seconds] = timedelta(seconds=ttl_seconds)
        return lasts

    def _want(self, hold: Hold, at: datetime, scope: Scope | None) -> _Want:
        needs: dict[Pool, int] = {}
        bounds: dict[Pool, _Known] = {}
        for budget in hold.budgets:
            if budget.name not in hold.amounts:
                continue
            need = picos(hold.amounts[budget.name])
            known = _, pool, limit = self._known.get(id(budget)) or self._register(budget)
            if pool in needs:
                # Two budgets on the same calls hold once, and each must have room for its own amount.
                most = max(need, needs[pool])
                known = budget, pool, min(limit - need, bounds[pool][2] - needs[pool]) + most
                need = most
            needs[pool], bounds[pool] = need, known
        return _Want(hold, needs, bounds=bounds, at=at, scope=scope)

    def _take(self, hold: Hold, needs: dict[Pool, int], at: datetime, scope: Scope | None) -> None:
        known = None if scope is None else self._scopes.get(scope) or self._scope(scope)
        self._hold(_Open(hold.id, hold, needs, at, hold.expires_at, known))

    def _hold(self, under: _Open) -> None:
        (self._journal or self._start()).write(under.record())
        for pool, need in under.left.items():
            pool.free -= need
            pool.held += need
            pool.used = self._beat
        self._open[under.name] = under
        if under.expires_at < self._next_expiry:  # noqa: PLR1730 - for each request, and `min` takes three times as long
            self._next_expiry = under.expires_at

    def _settle(self, hold: str, under: _Open | None, spend: Spend, cost: int, estimated: int) -> bool:
        if spend.id in self._recent or spend.id in self._less_recent:
            self._release(hold)
            return True
        written = self._spend("s", hold, under, spend, cost, estimated)
        if under is not None:
            self._free(under)
        return written

    def _spend(  # noqa: PLR0917 - for each request, and names take half as long again
        self, kind: Literal["c", "s"], hold: str, under: _Open | None, spend: Spend, cost: int, estimated: int
    ) -> bool:
        """Note a spend; False when the journal could not take it, and it must be recorded before the caller goes on."""
        name, at = spend.id, spend.at
        if at.tzinfo is None:
            raise ValueError("a ledger's times need a zone; pass datetime.now(UTC)")
        scope = self._scopes.get(spend.scope) or self._scope(spend.scope)
        journal = self._journal or self._start()
        try:
            journal.write(spend_record(kind, hold, spend, scope.record, cost, estimated))
            written = True
        except LedgerUnavailable:
            written = False
        self._remember(name)
        called = self._open.get(name)
        # By the name of a hold that stays open it may be handed in again when nothing here remembers it.
        if written and (called is None or (kind == "s" and called is under and not called.single)):
            self._unrecorded.add(scope, spend, cost, estimated)
        else:
            self._unrecorded.add_single(scope, spend, cost, written=written)
            if called is not None:
                called.single = True
        left = {} if under is None else under.left
        for pool in scope.pools:
            pool.unrecorded += cost
            if pool.start <= at < pool.end:
                pool.pending += cost
            covered = left.get(pool, 0)
            paid = cost if cost <= covered else covered
            if paid:
                left[pool] = covered - paid
                pool.held -= paid
            if paid < cost:
                pool.overspend(cost - paid)
        return written

    @property
    def behind_seconds(self) -> float:
        """How long it may be out of touch with the shared ledger, and still holds."""
        return self._behind_seconds

    @property
    def away(self) -> LedgerError | None:
        """Why the shared ledger could not be used when that was tried last; None where it could."""
        return self._down

    @property
    def is_too_far_behind(self) -> bool:
        """Whether spending has waited so long to be recorded that nothing new is held."""
        return monotonic() - self._behind_since > self._behind_seconds

    def _remember(self, spend: str) -> None:
        if self._behind_since == _NEVER:
            self._behind_since = monotonic()
            if self._resting:
                self._wake.set()
        self._recent[spend] = None
        if len(self._recent) >= _RECENT:
            self._recent, self._less_recent = {}, self._recent

    def _release(self, hold: str) -> None:
        if (under := self._open.get(hold)) is not None:
            self._free(under)
            # Unwritten, it would be charged at its worst case after a crash: too much, and never too little.
            with suppress(LedgerUnavailable):
                self._start().write(["r", hold])

    def _free(self, under: _Open) -> None:
        del self._open[under.name]
        for pool, left in under.left.items():
            pool.held -= left
            if pool.debt:
                owed = min(pool.debt, left)
                pool.debt -= owed
                left -= owed  # noqa: PLW2901 - what is owed is not free again
            pool.free += left

    def _expire(self, at: datetime) -> None:
        if at < self._next_expiry:
            return
        for hold in [name for name, under in self._open.items() if under.expires_at <= at]:
            self._release(hold)
        self._next_expiry = min((under.expires_at for under in self._open.values()), default=LAST)

    def _held(self, pool: Pool, at: datetime) -> int:
        return sum(under.left.get(pool, 0) for under in self._open.values() if under.expires_at > at)

    def _is_foreign(self, hold: Hold) -> bool:
        """Whether another process made the hold; asked of one that is not open here."""
        return bool(hold.amounts) and not hold.id.startswith(self._owner)

    # --- waiting for the worker --------------------------------------------------------------

    def _start(self) -> Journal:
        if self._journal is None:
            self._loop = asyncio.get_running_loop()
            self._wake = asyncio.Event()
            self._journal = Journal(self._folder, self._owner)
            self._worker = self._loop.create_task(self._work(self._journal))
        return self._journal

    def _check(self) -> None:
        """Raise what keeps the worker from answering."""
        if self._closing:
            raise LedgerUnavailable(str(self._folder), "it is being closed")
        if self._worker is not None and self._worker.done():
            raise LedgerError(f"Ledger with journal {str(self._folder)!r} has stopped") from self._worker.exception()
        if self._down is not None:
            # The worker tries by itself, and that may take seconds each time.
            raise self._down.with_traceback(None)

    async def _wait(self, want: _Want) -> Hold:
        self._check()
        self._wants.append(want)
        self._wake.set()
        try:
            async with self._in_time():
                return await want.future
        except (asyncio.CancelledError, LedgerUnavailable):
            # The money may have been taken just before its caller left.
            self._release(want.hold.id)
            raise

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Have the worker answer once everything that was spent before is on record."""
        self._start()
        self._check()
        answer: Future[T] = self._loop.create_future()
        self._questions.append((question, answer))
        self._wake.set()
        async with self._in_time():
            return await answer

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Let nobody wait for the shared ledger longer than a caller is to."""
        try:
            async with asyncio.timeout(self._answer_seconds):
                yield
        except TimeoutError:
            raise self._silent(self._answer_seconds) from None

    def _silent(self, seconds: float) -> LedgerUnavailable:
        return LedgerUnavailable(str(self._folder), f"the shared ledger has not answered for {seconds:g} s")

    # --- the worker --------------------------------------------------------------------------

    async def _work(self, journal: Journal) -> None:
        """Do everything that takes a transaction, one after another."""
        try:
            while not self._closing:
                await nap(self._wake, self._nap())
                try:
                    await self._round(journal)
                except LedgerError as error:
                    self._back_off(error)
                except OSError as error:
                    self._back_off(LedgerUnavailable(str(self._folder), error.strerror or "it cannot be used"))
        except Exception:
            log.exception("The ledger stopped; what is spent stays in its journal")
            raise
        finally:
            self._refuse_all(LedgerUnavailable(str(self._folder), "it is being closed"))

    def _nap(self) -> float:
        now = monotonic()
        self._resting = False
        if self._down is not None:
            due = self._retry_at
        elif self._wants:
            due = now + _ASK_AGAIN_SECONDS
        elif self._behind_since < _NEVER or any(
            pool.leased or self._beat - pool.asked < _WATCHED_BEATS for pool in self._pools
        ):
            due = self._beat_at + _BEAT_SECONDS
        else:
            due = self._next_recovery
            self._resting = True
        return max(due - now, 0)

    def _back_off(self, error: LedgerError) -> None:
        if self._down is None:
            log.warning("Spending goes on in the journal alone: %s", error)
        self._down = error
        self._retry_at = monotonic() + _BACK_OFF_SECONDS
        self._refuse_all(error)

    def _refuse_all(self, error: LedgerError) -> None:
        waiting: list[Future[Any]] = [want.future for want in self._wants]
        waiting += [answer for _, answer in self._questions]
        self._wants, self._questions = [], []
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    async def _round(self, journal: Journal) -> None:
        now = monotonic()
        if self._down is not None and now < self._retry_at:
            return
        if now >= self._next_recovery:
            await self._recover()
            self._next_recovery = monotonic() + _RECOVER_SECONDS
        beat = now >= self._beat_at + _BEAT_SECONDS - _EARLY_SECONDS
        if beat:
            self._beat += 1
            self._beat_at = now
            self._expire(self._clock())
            self._give_back()
        # Whoever waits now is answered with all on record that was spent before.
        wants, self._wants = [want for want in self._wants if not want.future.done()], []
        questions, self._questions = self._questions, []
        try:
            await self._record(beat=beat)
            await self._lease_more(wants)
            for question, answer in questions:
                await _answer(question, answer)
        except BaseException:
            self._wants, self._questions = wants + self._wants, questions + self._questions
            raise
        if beat:
            await self._refresh()
            await self._keep_house(journal)
        if self._down is not None:
            log.warning("The ledger is back, and spending is recorded again")
            self._down = None

    def _give_back(self) -> None:
        """Return what was idle for a second, and what is more than a slice."""
        now = monotonic()
        for pool in self._pools:
            if pool.free:
                idle = self._beat - pool.used > _IDLE_BEATS or now < pool.exact_until
                keep = 0 if idle else pool.slice
                if pool.free > 2 * keep:
                    pool.free = keep

    async def _record(self, *, beat: bool) -> None:
        """Write down what was spent until now, and the slices as they are."""
        renew = monotonic() >= self._next_renewal
        watched = self._watched() if beat else []
        self._unrecorded.seal()
        behind = len(self._unrecorded.sealed)
        while True:
            sealed = self._unrecorded.oldest
            slices = self._slices(sealed, all_of_them=renew)
            # Whether a slice is recalled is looked at with every beat while something is idle in it.
            if sealed or slices or (beat and any(pool.free for pool in self._pools)):
                await self._keep(sealed, slices, watched if behind <= 1 else [])
            if renew:
                self._next_renewal = monotonic() + _RENEW_SECONDS
            behind -= 1
            if behind <= 0:
                return

    def _slices(self, sealed: Sealed | None, *, all_of_them: bool) -> dict[Pool, Slice]:
        """The slices as they are when this is on record: those that changed, or all of them."""
        recorded: dict[Pool, int] = {}
        for part in sealed.parts if sealed else ():
            for pool in part.pools:
                recorded[pool] = recorded.get(pool, 0) + part.cost
        slices: dict[Pool, Slice] = {}
        for pool in self._pools:
            in_use = pool.held + pool.unrecorded - recorded.get(pool, 0)
            if pool.written != (in_use, pool.free) or (all_of_them and (in_use or pool.free)):
                slices[pool] = Slice(pool.match, pool.period, in_use, pool.free)
        return slices

    async def _keep(self, sealed: Sealed | None, slices: Mapping[Pool, Slice], watched: Sequence[Pool]) -> None:
        at = self._clock()
        expires_at = at + timedelta(seconds=LEASE_SECONDS)
        for pool in slices:
            pool.written = None
        kept = await self._ledger.keep(
            self._owner,
            sealed.batch if sealed else None,
            list(slices.values()),
            expires_at=expires_at,
            watched=[pool.budget for pool in watched],
            at=at,
        )
        if sealed is not None:
            self._unrecorded.sealed.popleft()
            self._recorded = sealed.batch.upto
            self._behind_since = monotonic() if self._unrecorded else _NEVER
            sealed.recorded(kept)
        for pool, had in slices.items():
            lost = (pool.match, pool.period) in kept.lost
            if lost:
                pool.free -= min(had.idle, pool.free)
            pool.written = had.in_use, 0 if lost else had.idle
            pool.until = max(pool.until, expires_at - _SKEW)
        self._know_all(watched, kept.standings, at)
        for key in kept.recalled:
            pool = self._by_meaning[key]
            pool.exact_until = monotonic() + _LEAN_SECONDS
            pool.free = 0
            self._wake.set()

    async def _lease_more(self, wants: list[_Want]) -> None:
        """Lease what callers wait for, and what slices in use are short of."""
        if wants:
            self._expire(max(want.at for want in wants))
        by: dict[Pool, _Known] = {}
        asking: list[_Want] = []
        for want in wants:
            # Two limits on the same calls are looked at one after the other.
            if any(pool in by and by[pool][2] != known[2] for pool, known in want.bounds.items()):
                self._wants.append(want)
                self._wake.set()
            else:
                by |= want.bounds
                asking.append(want)
        now = monotonic()
        for pool in self._pools:
            in_use = pool.slice and self._beat - pool.used < 2 and now > pool.exact_until
            if in_use and pool not in by and pool.free < pool.slice // 2:
                by[pool] = pool.budget, pool, pool.limit
        if by:
            at = max((want.at for want in asking), default=self._clock())
            self._serve(asking, await self._lease(by, asking, at))

    async def _lease(self, by: Mapping[Pool, _Known], asking: Sequence[_Want], at: datetime) -> dict[Pool, Leased]:
        now = monotonic()
        wanted = {
            pool: Wanted(
                budget,
                limit,
                Slice(pool.match, pool.period, pool.held + pool.unrecorded, pool.free),
                tuple(want.needs[pool] for want in asking if pool in want.needs),
                exact=now < pool.exact_until,
            )
            for pool, (budget, _, limit) in by.items()
        }
        expires_at = max(at, self._clock()) + timedelta(seconds=LEASE_SECONDS)
        for pool in wanted:
            pool.written = None
        found = await self._ledger.lease(self._owner, list(wanted.values()), at=at, expires_at=expires_at)
        leased = dict(zip(wanted, found, strict=True))
        for pool, one in leased.items():
            pool.budget, _, pool.limit = by[pool]
            pool.good_until = 0.0
            had = wanted[pool].slice
            idle = 0 if one.lost else had.idle
            # Calls went on meanwhile.
            left = pool.limit - one.used - (pool.held + pool.unrecorded - had.in_use)
            pool.debt, left = max(-left, 0), max(left, 0)
            # What was idle may have been leased under a higher limit.
            pool.free = min(max(pool.free - had.idle + idle, 0) + one.granted, left)
            pool.slice = 0 if wanted[pool].exact else left // SHARE
            pool.since = period_start(pool.period, at) or FIRST
            pool.until = expires_at - _SKEW
            self._know(pool, one.standing, at)
        return leased

    def _serve(self, wants: Iterable[_Want], leased: Mapping[Pool, Leased]) -> None:
        """Give what was leased to those who wait, the first in line first."""
        for want in wants:
            if want.future.done():
                continue
            if all(pool.free >= need for pool, need in want.needs.items()):
                try:
                    self._take(want.hold, want.needs, want.at, want.scope)
                except LedgerUnavailable as error:
                    want.future.set_exception(error)
                else:
                    want.future.set_result(want.hold)
                continue
            self._refuse(want, leased)

    def _refuse(self, want: _Want, leased: Mapping[Pool, Leased]) -> None:
        """Refuse what the shared ledger has too little for, unless others may give it back."""
        for budget in want.hold.budgets:
            amount = want.hold.amounts.get(budget.name)
            if amount is None:
                continue
            _, pool, limit = self._known.get(id(budget)) or self._register(budget)
            left = max(limit - leased[pool].used, 0)
            need = picos(amount)
            if need > left:
                patient = monotonic() - want.since < _RECALL_SECONDS
                if patient and need <= left + leased[pool].recalled:
                    self._wants.append(want)
                else:
                    want.future.set_exception(exceeded(budget, amount, to_dollars(left), want.at))
                return
        # Somebody was faster, and there may be more.
        self._wants.append(want)
        self._wake.set()

    # --- what is known of the shared ledger --------------------------------------------------

    def _know(self, pool: Pool, standing: Standing, at: datetime) -> None:
        start = period_start(pool.period, at) or FIRST
        if pool.start != start:
            pool.start, pool.end = start, period_end(pool.period, at) or LAST
            pool.pending = sum(
                part.cost for part in self._unrecorded if pool in part.pools and start <= part.at < pool.end
            )
        pool.spent, pool.elsewhere = standing
        pool.refreshed = monotonic()
        pool.good_until = 0.0

    def _know_all(self, pools: Sequence[Pool], standings: Sequence[Standing | None], at: datetime) -> None:
        for pool, standing in zip(pools, standings, strict=True):
            if standing is not None:
                self._know(pool, standing, at)

    async def _look(self, pool: Pool, budget: Budget, at: datetime) -> tuple[Decimal, Decimal]:
        [standing] = await self._ledger.standings(self._owner, [budget], at=at)
        self._know(pool, standing, at)
        return to_dollars(pool.spent + pool.pending), to_dollars(pool.elsewhere + self._held(pool, at))

    async def _look_up_usual(self, provider: str, model: str) -> int | None:
        tokens = await self._ledger.usual_output_tokens(provider, model)
        if len(self._usual) >= _MANY:
            self._usual.clear()
        self._usual[provider, model] = tokens, monotonic()
        return tokens

    def _watched(self) -> list[Pool]:
        """What callers ask for and is not yet known as of this beat."""
        return [
            pool for pool in self._pools if self._beat - pool.asked < _WATCHED_BEATS and pool.refreshed < self._beat_at
        ]

    async def _refresh(self) -> None:
        """Keep what callers ask for as fresh as is promised, and let go of what they no longer ask for."""
        for pool in self._pools:
            if self._beat - pool.asked >= _WATCHED_BEATS and pool.refreshed < self._beat_at:
                pool.refreshed = -BEHIND_SECONDS
                pool.good_until = 0.0
        if watched := self._watched():
            at = self._clock()
            standings = await self._ledger.standings(self._owner, [pool.budget for pool in watched], at=at)
            self._know_all(watched, standings, at)
        asked, self._usual_asked = self._usual_asked, set()
        for provider, model in asked:
            await self._look_up_usual(provider, model)

    # --- the journal -------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Finish the journals of processes that died."""
        found = await asyncio.to_thread(lambda: list(abandoned(self._folder)))
        try:
            for journal in found:
                recorded = await self._ledger.finish(journal.name, journal.spends, journal.worst)
                await asyncio.to_thread(journal.remove)
                if recorded:
                    log.warning("Recorded %d calls of a process that died", recorded)
        finally:
            for journal in found:
                journal.close()

    async def _keep_house(self, journal: Journal) -> None:
        if self._syncing is not None:
            if not self._syncing.done():
                return
            if error := self._syncing.exception():
                log.warning("Spending of the last second would not survive a power cut: %s", error)
                self._synced_size = 0
            else:
                # None was replaced meanwhile.
                for each in self._replaced:
                    each.safe = True
            self._syncing = None
        gone: list[Path] = []
        while self._replaced and self._replaced[0].safe and self._replaced[0].upto <= self._recorded:
            gone += self._replaced.pop(0).paths
        if gone:
            await asyncio.to_thread(delete, gone)
        if journal.size > self._segment_bytes:
            records = [*(pool.record() for pool in self._pools), *(under.record() for under in self._open.values())]
            written = self._unrecorded.written
            self._replaced.append(_Replaced(written, journal.rotate(written, records)))
            self._synced_size = 0
        if self._beat % _SYNC_BEATS == 0 and journal.size != self._synced_size:
            self._synced_size = journal.size
            self._syncing = self._loop.run_in_executor(None, journal.sync)

    async def _hand_over(self, journal: Journal) -> None:
        if self._syncing is not None:
            await asyncio.wait([self._syncing])
        if not self._pools and not self._scopes_known:
            # Nothing was held or spent, and so the shared ledger, which may be away, knows nothing of this process.
            journal.remove()
            return
        if self._down is not None and monotonic() < self._retry_at:
            # Just now it failed, and whoever ends this process may have little patience.
            self._leave(journal, self._down)
            return
        holds = [
            (
                replace(under.seen(), expires_at=under.expires_at),
                [Slice(pool.match, pool.period, left, 0) for pool, left in under.left.items()],
            )
            for under in self._open.values()
        ]
        try:
            while True:
                self._unrecorded.seal()
                sealed = self._unrecorded.oldest
                await self._ledger.close_lease(self._owner, sealed.batch if sealed else None, holds)
                if sealed:
                    self._unrecorded.sealed.popleft()
                if not self._unrecorded:
                    break
                holds = []
        except LedgerError as error:
            self._leave(journal, error)
            return
        # At once: a spend that came meanwhile would be written to it, and gone.
        journal.remove()
        with suppress(LedgerError):  # a row too many, which nobody misreads
            await self._ledger.forget(self._owner)

    def _leave(self, journal: Journal, error: LedgerError) -> None:
        """Leave the journal to whoever comes next."""
        calls = sum(part.calls for part in self._unrecorded)
        log.warning("%d calls stay in the journal until they can be recorded: %s", calls, error)
        journal.close()


async def _nothing() -> None:
    """Asks nothing but that all was recorded that was spent before."""


async def _answer(question: Callable[[], Awaitable[Any]], answer: Future[Any]) -> None:
    if answer.done():
        return
    try:
        result = await question()
    except LedgerUnavailable:
        # The next would be asked in vain, and wait as long: all are told, this one with them.
        raise
    except Exception as error:
        if not answer.done():
            answer.set_exception(error)
    else:
        if not answer.done():
            answer.set_result(result)
