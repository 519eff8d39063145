"""Runs and events on their way to the publisher, in segments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sekha.recording.run import Event, Run, decode
from sekha.segments import ready_in

__all__ = ["Segment", "SpoolReader"]


@dataclass(frozen=True, slots=True)
class Segment:
    """What one segment holds. `torn` counts lines that were cut off when their writer died or its disk was full."""

    path: Path
    runs: tuple[Run, ...]
    events: tuple[Event, ...]
    torn: int


class SpoolReader:
    """Reads what writers have handed over, and what killed writers have left. One at a time in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def ready(self) -> list[Path]:
        """The segments that can be read, the oldest first."""
        return ready_in(self._folder)

    def read(self, path: Path) -> Segment:
        runs: list[Run] = []
        events: list[Event] = []
        torn = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                what = decode(line)
            except ValueError:
                torn += 1
                continue
            if isinstance(what, Run):
                runs.append(what)
            else:
                events.append(what)
        return Segment(path, tuple(runs), tuple(events), torn)

    def done(self, segment: Segment) -> None:
        """Delete a segment that has been published."""
        segment.path.unlink(missing_ok=True)
