"""What a publisher writes into: one protocol for Prefect's database and its API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sekha.recording.run import Event, Run

__all__ = ["Sink"]


class Sink(Protocol):
    """Where runs and events go. For one thread.

    Both methods take what they are given whole or not at all, and taking the same thing twice changes
    nothing. They raise `PrefectUnavailable` when it can be tried again later, and `RecordError` when
    something in there will never be taken.
    """

    name: str
    """What operators call it."""
    runs_per_second: float | None
    """What it can bear; None if that is more than anyone records."""

    def publish(self, runs: Sequence[Run]) -> None: ...

    def emit(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...
