"""Money that is held is settled, however a call ends: with an answer, a failure or a cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from sekha.errors import LedgerError
from sekha.ledger import Hold
from sekha.routing import Plan

__all__ = ["let_go", "reserved", "settled", "to_the_end"]

T = TypeVar("T")
OutcomeT_contra = TypeVar("OutcomeT_contra", contravariant=True)
log = logging.getLogger("sekha.settling")


async def to_the_end(work: Awaitable[T]) -> T:
    """Await the work, and when cancelled meanwhile, let it end before the cancellation goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Line(Protocol[OutcomeT_contra]):
    """A line of steps that holds money and settles it."""

    @property
    def reserve(self) -> Callable[[Plan], Awaitable[Hold]]: ...
    @property
    def settle(self) -> Callable[[Hold, OutcomeT_contra | None], Awaitable[None]]: ...
    @property
    def at_once(self) -> bool:
        """Whether both are safe to cancel. A shield is a task, and dear on the request path."""
        ...


async def reserved(steps: Line[Any], plan: Plan) -> Hold:
    """Reserve for a plan. A caller who leaves while it is being done leaves no hold behind."""
    if steps.at_once:
        return await steps.reserve(plan)
    task = asyncio.ensure_future(steps.reserve(plan))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await let_go(steps.settle, task.result())
        raise


async def settled(steps: Line[OutcomeT_contra], hold: Hold, outcome: OutcomeT_contra) -> None:
    """Settle what came of a plan, also for a caller who leaves meanwhile."""
    settling = steps.settle(hold, outcome)
    await (settling if steps.at_once else to_the_end(settling))


async def let_go(settle: Callable[[Hold, None], Awaitable[None]], hold: Hold) -> None:
    """Free what is left of a hold after what happened; that stays the error which the caller sees."""
    try:
        await to_the_end(settle(hold, None))
    except LedgerError as error:
        log.warning("A hold could not be freed and will expire at %s: %s", hold.expires_at, error)
