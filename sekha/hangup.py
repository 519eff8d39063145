"""A SIGHUP that comes before anybody can obey it waits, where it would end the process otherwise."""

from __future__ import annotations

import contextlib
import signal

__all__ = ["came", "hold", "let_go"]

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


def _note(*_: object) -> None:
    global _came  # noqa: PLW0603
    _came = True
