"""Money that is held is settled, however a call ends: with an answer, a failure or a cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sekha.errors import LedgerError
from sekha.ledger import Hold
from sekha.routing import Plan

__all__ = ["let_go", "reserved", "to_the_end"]

T = TypeVar("T")
log = logging.getLogger("sekha.settling")


async def to_the_end(work: Awaitable[T]) -> T:
    """Await the work, and when cancelled meanwhile, let it end before the cancellation goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def reserved(
    reserve: Callable[[Plan], Awaitable[Hold]], settle: Callable[[Hold, None], Awaitable[None]], plan: Plan
) -> Hold:
    """Reserve for a plan. A caller who leaves while it is being done leaves no hold behind."""
    task = asyncio.ensure_future(reserve(plan))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await let_go(settle, task.result())
        raise


async def let_go(settle: Callable[[Hold, None], Awaitable[None]], hold: Hold) -> None:
    """Free what is left of a hold after what happened; that stays the error which the caller sees."""
    try:
        await to_the_end(settle(hold, None))
    except LedgerError as error:
        log.warning("A hold could not be freed and will expire at %s: %s", hold.expires_at, error)
