"""Rest between two rounds of work in the background, at little cost to the requests that are served meanwhile."""

from __future__ import annotations

import asyncio

__all__ = ["nap"]


async def nap(wake: asyncio.Event, seconds: float) -> None:
    """Wait until `wake` is set, for so many seconds at most, and clear it.

    With `asyncio.timeout` the end of the wait is a cancellation, which takes another turn of the event loop.
    """
    timer = asyncio.get_running_loop().call_later(seconds, wake.set)
    try:
        await wake.wait()
    finally:
        timer.cancel()
    wake.clear()
