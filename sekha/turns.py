"""What one turn of the event loop has to say to its sockets, said together at its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

__all__ = ["ALONE_WRITES", "MOST_BYTES", "Turn", "turn_of"]

log = logging.getLogger("sekha.turns")

MOST_BYTES = 65_536
"""What waits for one socket at the most: more is written at once, so that whoever writes is held back in time."""

ALONE_WRITES = 32
"""After so many in a row with a single request under way, who is alone is taken to be alone the next time too."""


class Turn:
    """Writes to sockets when all that was ready has been handled, and not one by one in between.

    A write wakes the process that reads the socket, and on most machines that costs more than
    everything else about it. When the writes follow each other closely the reader is awake from the
    first one on.

    Who is alone has nothing to gain from that, and is made to wait: see `flush`.
    """

    __slots__ = ("_alone", "_behind", "_ending", "_loop", "_waiting", "busy")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop is not kept by its turn. Nor is it asked for each time: Python then asks the system for the process.
        self._loop = ref(loop)
        self._waiting: dict[asyncio.Transport, bytes] = {}
        self._behind: list[Callable[[], None]] = []
        self._ending = False
        """Whether the loop has been told to come by at the end of this turn."""
        self._alone = 0
        """Writes in a row with one request under way."""
        self.busy: set[object] = set()
        """Connections with a request under way, as far as whoever serves them says so."""

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write before the loop waits again, after what was given here before."""
        if not self._ending:
            self._end_soon()
        waiting = self._waiting
        before = waiting.get(transport, b"")
        if len(before) + len(data) <= MOST_BYTES:
            waiting[transport] = before + data
        else:
            waiting[transport] = b""
            _write(transport, before)
            _write(transport, data)

    def flush(self, transport: asyncio.Transport) -> None:
        """Write what was given here for it and has nothing to follow it now, where one request at a time is under way.

        Nobody else's writes could go out together with it, and the end of the turn is a while off. In a crowd the
        first of each wave finds itself alone as well: it has to have been so for some time.
        """
        if len(self.busy) != 1:
            self._alone = 0
        elif self._alone < ALONE_WRITES:
            self._alone += 1
        elif data := self._waiting.pop(transport, None):
            _write(transport, data)

    def behind(self, callback: Callable[[], None]) -> None:
        """Call back once what was given here has been written, so that its readers do not wait for that as well."""
        if not self._ending:
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
        self._ending = True
        if (loop := self._loop()) is not None:
            loop.call_soon(self._end)

    def _end(self) -> None:
        self._ending = False
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
