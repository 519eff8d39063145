"""What one request was charged, and whom it asked, for whoever notes it: also where it failed and has no answer.

The ledger knows what was spent by whom and no requests, and an answer knows its own cost alone. Between them lie
attempts that failed and may be billed all the same, streams that broke off, and batches before the one that failed.
"""

from __future__ import annotations

from contextvars import ContextVar
from decimal import Decimal

from sekha.calling import Attempt
from sekha.ledger import Spend
from sekha.registry import Model

__all__ = ["Bill", "note_asked", "note_attempt", "note_charged", "open_bill"]


class Bill:
    """The calls and the charges of one request, in the order in which they ended and were made."""

    __slots__ = ("asked", "attempts", "lost", "spends")

    def __init__(self) -> None:
        self.asked: Model | None = None
        """The model that was asked last."""
        self.attempts: list[Attempt] = []
        """All of them; an answer lists those alone that led to it."""
        self.spends: dict[str, Spend] = {}
        """All that is on record, by identity: the ledger takes each once."""
        self.lost: list[Spend] = []
        """Those of them that bought no part of an answer."""

    @property
    def cost(self) -> Decimal:
        return sum((spend.cost for spend in self.spends.values()), Decimal(0))

    @property
    def lost_cost(self) -> Decimal:
        return sum((spend.cost for spend in self.lost), Decimal(0))


_open: ContextVar[Bill | None] = ContextVar("sekha_bill", default=None)


def open_bill() -> Bill:
    """Begin the bill of the request that this task serves, and of it alone."""
    bill = Bill()
    _open.set(bill)
    return bill


def note_asked(model: Model) -> None:
    if (bill := _open.get()) is not None:
        bill.asked = model


def note_attempt(attempt: Attempt) -> None:
    """Note a call that ended, however it did."""
    if (bill := _open.get()) is not None:
        bill.attempts.append(attempt)


def note_charged(spend: Spend, *, lost: bool = False) -> None:
    """Note what the ledger has taken. `lost` where it was charged for an attempt that failed."""
    if (bill := _open.get()) is not None:
        bill.spends[spend.id] = spend
        if lost:
            bill.lost.append(spend)
