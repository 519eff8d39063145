"""Which steps of a request Prefect is told as one task run. A decision alone.

A task run takes 0.9 KB in Prefect's SQLite, whatever it says, and three of a chat's five steps take a tenth of a
millisecond between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sekha.trace import Step

__all__ = ["BETWEEN", "JOINABLE", "QUICK_SECONDS", "joined"]

QUICK_SECONDS = 0.001
JOINABLE = frozenset({"estimate_cost", "select_provider", "reserve_budget", "settle_cost"})
"""The steps that ask nobody but the ledger. Any other reaches a provider or a store, and is looked at by itself."""
BETWEEN = ", "
"""Between the names of steps that were joined."""


def joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same steps, with those as one that ran directly one after another, each quickly and on their results alone.

    One of them begins with its first step and ends with its last, is named after all of them in their order, and
    comes after what the first came after; what came after any of them comes after it.
    """
    chains: list[list[Step]] = []
    begins: list[int] = []
    place: list[int] = []
    for at, step in enumerate(steps):
        if chains and _goes_on(chains[-1], begins[-1], step):
            chains[-1].append(step)
        else:
            chains.append([step])
            begins.append(at)
        place.append(len(chains) - 1)
    return tuple([_one(chain, place) for chain in chains])


def _goes_on(chain: Sequence[Step], begins: int, step: Step) -> bool:
    """Whether the step belongs to the chain before it, whose first step is number `begins`."""
    last = chain[-1]
    return (
        _is_quick(last)
        and _is_quick(step)
        # What lies between would look like work.
        and 0 <= step.started - last.ended < QUICK_SECONDS
        # A result from elsewhere would be drawn as if the whole chain had waited for it.
        and bool(step.after)
        and min(step.after) >= begins
    )


def _is_quick(step: Step) -> bool:
    # One that had not ended when its request had, ends before it began.
    return step.name in JOINABLE and step.error is None and 0 <= step.ended - step.started < QUICK_SECONDS


def _one(chain: Sequence[Step], place: Sequence[int]) -> Step:
    first = chain[0]
    return Step(
        BETWEEN.join([step.name for step in chain]),
        tuple(sorted({place[before] for before in first.after})),
        first.started,
        chain[-1].ended,
        first.error,
    )
