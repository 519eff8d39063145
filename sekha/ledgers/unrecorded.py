"""What one process spent and the shared ledger has not yet on record, added up for each scope and minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import ClassVar, NamedTuple

import orjson

from sekha.ledger import Spend
from sekha.ledgers.pools import Pool
from sekha.ledgers.slices import Kept
from sekha.ledgers.spends import Batch, Tally, reply_length

__all__ = ["KnownScope", "Sealed", "Unrecorded"]

_BATCH = 1_000
"""Rows that are recorded together."""
_MINUTE = timedelta(minutes=1)


class KnownScope:
    """What is known of a scope for all calls in it."""

    __slots__ = ("name", "pools", "record", "tally")

    def __init__(self, name: str, record: orjson.Fragment, pools: Sequence[Pool]) -> None:
        self.name = name
        self.record = record
        """As the journal has it."""
        self.pools = pools
        self.tally: _Tally | None = None
        """Where the last spend was added to, until that is sealed."""


class _Tally(Tally):
    """What is spent in one scope and minute, and not yet handed on to be recorded."""

    __slots__ = ("begins", "ends", "known")

    def __init__(self, name: str, known: KnownScope, spend: Spend, begins: datetime) -> None:
        super().__init__(name, spend.scope, spend.at, counted=spend.usage.counted)
        self.begins = begins
        self.ends = begins + _MINUTE
        self.known = known

    @property
    def pools(self) -> Sequence[Pool]:
        return self.known.pools


class _Single:
    """A spend that is recorded by itself, under its own id."""

    __slots__ = ("cost", "pools", "spend")

    calls: ClassVar = 1

    def __init__(self, spend: Spend, cost: int, pools: Sequence[Pool]) -> None:
        self.spend = spend
        self.cost = cost
        self.pools = pools

    @property
    def at(self) -> datetime:
        return self.spend.at


class Sealed(NamedTuple):
    """What was spent until some moment. Its parts stay together, so that it is on record as a whole or not at all."""

    batch: Batch
    tallies: Sequence[_Tally]
    singles: Sequence[_Single]

    @property
    def parts(self) -> Iterator[_Tally | _Single]:
        return chain(self.tallies, self.singles)

    def recorded(self, kept: Kept) -> None:
        """Count it as spent, but for what was on record before."""
        for part in self.parts:
            new = kept.tallied if isinstance(part, _Tally) else part.spend.id in kept.new
            for pool in part.pools:
                pool.recorded(part.cost, part.at, new=new)


class Unrecorded:
    """All of it, in the order in which it is recorded: what was sealed, the oldest first, and what comes after."""

    def __init__(self) -> None:
        self.written = 0
        """Spends that the journal has."""
        self.sealed: deque[Sealed] = deque()
        self._tallies: dict[str, _Tally] = {}
        self._singles: list[_Single] = []

    def __bool__(self) -> bool:
        return bool(self.sealed or self._tallies or self._singles)

    def __iter__(self) -> Iterator[_Tally | _Single]:
        return chain(chain.from_iterable(sealed.parts for sealed in self.sealed), self._tallies.values(), self._singles)

    @property
    def oldest(self) -> Sealed | None:
        """What is to be recorded next."""
        return self.sealed[0] if self.sealed else None

    def add(self, known: KnownScope, spend: Spend, cost: int, estimated: int) -> None:
        """Add a spend that the journal has to what its scope spent in the same minute."""
        at, usage, tally = spend.at, spend.usage, known.tally
        if tally is None or not tally.begins <= at < tally.ends or tally.counted is not usage.counted:
            tally = known.tally = self._tally(known, spend)
        tally.calls += 1
        tally.cost += cost
        tally.estimated += estimated
        tally.input_tokens += usage.input_tokens
        if usage.output_tokens:
            tally.output_tokens += usage.output_tokens
            tally.replies.append((at, reply_length(spend)))
        if usage.cached_tokens:
            tally.cached_tokens += usage.cached_tokens
        if usage.images:
            tally.images += usage.images
        self.written += 1

    def add_single(self, known: KnownScope, spend: Spend, cost: int, *, written: bool) -> None:
        """Add a spend that is to be known by its id for ever; the journal may not have been able to take it."""
        self._singles.append(_Single(spend, cost, known.pools))
        self.written += written

    def seal(self) -> None:
        """Close what was spent until now, to be recorded together."""
        if not self._tallies and not self._singles:
            return
        tallies, self._tallies = list(self._tallies.values()), {}
        singles, self._singles = self._singles, []
        for tally in tallies:
            tally.known.tally = None
        batch = Batch(self.written, tallies, [one.spend for one in singles])
        self.sealed.append(Sealed(batch, tallies, singles))

    def _tally(self, known: KnownScope, spend: Spend) -> _Tally:
        begins = spend.at.astimezone(UTC).replace(second=0, microsecond=0)
        name = f"{known.name}{'~' if spend.usage.counted else '-'}{begins:%Y%m%d%H%M}"
        tally = self._tallies.get(name)
        if tally is None:
            if len(self._tallies) >= _BATCH:
                self.seal()
            tally = self._tallies[name] = _Tally(name, known, spend, begins)
        return tally
