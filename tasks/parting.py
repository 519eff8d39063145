"""Tell Prefect the rest before its server is stopped."""

from __future__ import annotations

import asyncio

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

__all__ = ["tell_prefect_the_rest"]


async def tell_prefect_the_rest() -> None:
    """Send the logs and events that wait in this process, and stop what sends them.

    They go out in the background. A process that ends after its server would try for minutes to reach it,
    and the last task runs would never be seen to end.
    """
    for worker in (APILogWorker, EventsWorker):
        await asyncio.to_thread(worker.drain_all, timeout=10)
