"""A SIGHUP that comes before anybody can obey it waits, and one that a terminal's end sends is told from a request."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

__all__ = ["Terminal", "came", "hold", "let_go"]

_GONE = (errno.ENXIO, errno.ENODEV, errno.EIO)
"""What opening it says of a terminal that there is not, or that just ends. Anything else says nothing of it."""

_before: signal.Handlers | None = None
_came = False


def hold() -> None:
    """From here on a SIGHUP waits for `came`. To be called first of all, in a process's main thread."""
    global _before  # noqa: PLW0603 - there is one signal, and one process
    with contextlib.suppress(ValueError):  # another thread's: whoever has the main one sees to its signals
        before = signal.signal(signal.SIGHUP, _note)
        _before = before if isinstance(before, signal.Handlers) else None


def came() -> bool:
    """Whether one came since then, or since this was asked last."""
    global _came
    found, _came = _came, False
    return found


def let_go() -> None:
    """This process reads nothing anew: a SIGHUP means again what it did before, and so does one that has come."""
    if _before is not None and signal.getsignal(signal.SIGHUP) is _note:
        signal.signal(signal.SIGHUP, _before)
        if came():
            signal.raise_signal(signal.SIGHUP)


class Terminal:
    """The terminal whose end is to end this process, if there is one: the one that controls it, whatever it reads.

    There is none under systemd, in a container or in CI, and `nohup` says that its end is not to matter.
    """

    def __init__(self) -> None:
        self._ours = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _is_controlled()

    @property
    def is_gone(self) -> bool:
        return self._ours and not _is_controlled()

    def outlive(self) -> None:
        """It ended and sent nothing, as a shell does that leaves its jobs behind: what comes now is from others."""
        self._ours = False


def _is_controlled() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno not in _GONE
    return True


def _note(*_: object) -> None:
    global _came  # noqa: PLW0603
    _came = True
