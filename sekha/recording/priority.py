"""How much of the processor the publisher asks for: what nobody else wants, and a tenth once it falls behind."""

from __future__ import annotations

import contextlib
import os
import resource

__all__ = ["begin", "give_way"]

_NICE = 10


def begin() -> None:
    os.nice(_NICE)
    give_way(behind=False)


def give_way(*, behind: bool) -> None:
    """Run only while the processor is idle, so that waking up interrupts no request; not so when `behind`.

    Who could not come back from there stays where it gets a tenth, or a busy machine would never publish anything.
    """
    if hasattr(os, "SCHED_IDLE"):
        wanted = os.SCHED_BATCH if behind or not _may_come_back() else os.SCHED_IDLE
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) != wanted:
                os.sched_setscheduler(0, wanted, os.sched_param(0))


def _may_come_back() -> bool:
    # sched(7): from SCHED_IDLE one may go where `RLIMIT_NICE` allows the nice value that one has.
    return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20 - _NICE
