"""Where a gateway's configuration comes from while it serves: read anew when asked, or told by another process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from sekha.errors import SekhaError
from sekha.loading import Loaded
from sekha.pipes import receive

__all__ = ["Handed", "Source", "WhenAsked", "WhenTold", "Word"]


@dataclass(frozen=True, slots=True)
class Handed:
    """A configuration on its way to a worker. Each has a number of its own, larger than those before."""

    generation: int
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class Word:
    """What a worker says of a configuration that it was handed: that it serves with it, or why it does not."""

    generation: int
    refused: SekhaError | None = None


class Source(Protocol):
    """Configurations, one after the other."""

    def look(self) -> None:
        """Read it anew."""

    async def next(self) -> Loaded:
        """Wait for a configuration that is to be taken over.

        Raises the `SekhaError` that keeps one from being read, and `EOFError` when there is nobody left to tell of any.
        """


class WhenAsked:
    """Reads the configuration when it is asked to, and not before."""

    def __init__(self, read: Callable[[], Loaded]) -> None:
        self._read = read
        self._asked = asyncio.Event()

    def look(self) -> None:
        self._asked.set()

    async def next(self) -> Loaded:
        await self._asked.wait()
        self._asked.clear()
        return await asyncio.to_thread(self._read)


class WhenTold:
    """Configurations that the process at the other end of standard input has read."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.generation = 0
        """Of the configuration that came last, as the other process counts them."""

    @classmethod
    async def open(cls) -> WhenTold:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    def look(self) -> None:
        """The other process is told as well, and looks for all."""

    async def next(self) -> Loaded:
        handed = cast("Handed", await receive(self._reader))
        self.generation = handed.generation
        return handed.loaded
