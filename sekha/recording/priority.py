"""How much of the processor the publisher asks for: what nobody else wants, and a tenth once it falls behind."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

__all__ = ["begin", "give_way"]


def begin() -> None:
    os.nice(10)
    give_way(behind=False)


def give_way(*, behind: bool) -> None:
    """Run only while the processor is idle, so that waking up interrupts no request; not so when `behind`.

    Who could not come back from there stays where it gets a tenth, or a busy machine would never publish anything.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            _run_as(os.SCHED_BATCH if behind or not _may_come_back() else os.SCHED_IDLE)


@cache
def _may_come_back() -> bool:
    """Tried by a thread, which alone would be stuck there: root in a container may not, as a rule."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_comes_back).result()


def _comes_back() -> bool:
    try:
        for policy in (os.SCHED_IDLE, os.SCHED_BATCH):
            _run_as(policy)
    except OSError:
        return False
    return True


def _run_as(policy: int) -> None:
    """How the processor is shared between this thread and others."""
    if os.sched_getscheduler(0) != policy:
        os.sched_setscheduler(0, policy, os.sched_param(0))
