"""What one turn of the event loop has to say to its sockets, said together at its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

__all__ = ["MOST_BYTES", "Turn", "turn_of"]

log = logging.getLogger("sekha.turns")

MOST_BYTES = 65_536
"""What waits for one socket at the most: more is written at once, so that whoever writes is held back in time."""


class Turn:
    """Writes to sockets when all that was ready has been handled, and not one by one in between.

    A write wakes the process that reads the socket, and on most machines that costs more than
    everything else about it. When the writes follow each other closely the reader is awake from the
    first one on.
    """

    __slots__ = ("_behind", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop is not kept by its turn. Nor is it asked for each time: Python then asks the system for the process.
        self._loop = ref(loop)
        self._waiting: dict[asyncio.Transport, bytes] = {}
        self._behind: list[Callable[[], None]] = []

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write before the loop waits again, after what was given here before."""
        waiting = self._waiting
        if not waiting:
            self._end_soon()
        before = waiting.get(transport, b"")
        if len(before) + len(data) <= MOST_BYTES:
            waiting[transport] = before + data
        else:
            waiting[transport] = b""
            _write(transport, before)
            _write(transport, data)

    def behind(self, callback: Callable[[], None]) -> None:
        """Call back once what was given here has been written, so that its readers do not wait for that as well."""
        if not self._waiting and not self._behind:
            self._end_soon()
        self._behind.append(callback)

    def close(self, transport: asyncio.Transport) -> None:
        """Close it once it has sent what was written."""
        _write(transport, self._waiting.pop(transport, b""))
        transport.close()

    def end(self, transport: asyncio.Transport) -> None:
        """Send what was written, and that nothing more follows. What comes is still taken."""
        _write(transport, self._waiting.pop(transport, b""))
        if not transport.is_closing():
            transport.write_eof()

    def _end_soon(self) -> None:
        if (loop := self._loop()) is not None:
            loop.call_soon(self._end)

    def _end(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for transport, data in waiting.items():
            _write(transport, data)
        if self._behind:
            behind, self._behind = self._behind, []
            for callback in behind:
                try:
                    callback()
                except Exception:
                    # The traceback may quote what was asked: it goes to whoever runs this at `debug`.
                    log.error("what was left to be done behind an answer failed")  # noqa: TRY400
                    log.debug("what was left to be done behind an answer", exc_info=True)


def _write(transport: asyncio.Transport, data: bytes) -> None:
    if data and not transport.is_closing():
        # Whoever comes by here has no part in this connection; its owner is told by `connection_lost`.
        try:
            transport.write(data)
        except Exception:
            log.exception("a connection cannot be written to, and is cut")
            transport.abort()


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """The one that everybody shares who writes under this loop."""
    if (turn := _turns.get(loop)) is None:
        turn = _turns[loop] = Turn(loop)
    return turn
