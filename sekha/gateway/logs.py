"""Logs as one JSON object a line: one for each request, and whatever else Sekha and its server have to say.

No line holds a secret or a prompt: what is logged of a request are names, numbers and codes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal, Protocol, TypeAlias

import orjson

__all__ = ["AccessLog", "Level", "Lines", "Stream", "configure", "standard_error"]

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_NAMES = ("sekha", "uvicorn", "asyncio")
"""Whose log lines are shown. Other libraries' may quote what was asked."""
_BATCH_SECONDS = 0.05
_MOST_LINES = 50_000
"""That wait for a reader who has stopped reading: a minute's worth of a busy process, and some 20 MB."""


_LAST_SECONDS = 2.0
"""What waits has these to be written in when the log is closed: a reader who has stopped may never go on."""


class Stream(Protocol):
    """Where lines go: a file opened for bytes, without a buffer of its own. None is written where it takes none now."""

    def write(self, data: memoryview, /) -> int | None: ...


def standard_error() -> Stream:
    """This process's, past the buffer of `sys.stderr`: Python cannot end while a thread is stuck in that one."""
    return open(sys.stderr.fileno(), "wb", buffering=0, closefd=False)


class Lines:
    """Writes lines in batches from a thread of its own, so that nobody who logs ever waits for a terminal or a disk."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._news = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sekha-logs", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Take a line, which ends with a line break. Drops and counts it when too many wait."""
        if len(self._waiting) >= _MOST_LINES:
            self._dropped += 1
            return
        # A copy, since it may wait for long: what orjson makes takes four kilobytes however short it is.
        self._waiting.append(b"%b" % line)
        if not self._news.is_set():
            self._news.set()

    def close(self) -> None:
        """Write what waits, as far as it is read within some seconds, and end."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        self._thread.join(_LAST_SECONDS)
        if not self._thread.is_alive():
            self._flush()

    def _run(self) -> None:
        while not self._closed:
            self._news.wait()
            self._news.clear()
            self._flush()
            if not self._closed:
                time.sleep(_BATCH_SECONDS)

    def _flush(self) -> None:
        waiting = self._waiting
        lines = [waiting.popleft() for _ in range(len(waiting))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(_line("warning", "log_lines_dropped", {"lines": dropped}))
        if lines:
            # Whoever read them may be gone, and there is nobody else to tell.
            with contextlib.suppress(OSError, ValueError):
                left = memoryview(b"".join(lines))
                while left:
                    if (written := self._stream.write(left)) is None:
                        # Somebody who shares the terminal has made it one that is not waited for.
                        time.sleep(_BATCH_SECONDS)
                    left = left[written or 0 :]


class AccessLog:
    """One line for each request. Costs a few microseconds; nothing at all above `info`."""

    def __init__(self, lines: Lines, *, shown: bool = True) -> None:
        self._lines = lines
        self.shown = shown
        """Whether anything is logged at all, for whoever has much to gather first."""

    def note(
        self,
        *,
        request_id: str,
        method: str,
        path: str,
        status: int,
        seconds: float,
        run_id: str | None = None,
        key: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        cost: Decimal | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        outcome: str | None = None,
        error: str | None = None,
    ) -> None:
        """Log one request.

        `path` is a route, with nothing in it of the caller's; `outcome` is as in Prefect: answered, fallback, failed,
        refused, cancelled.
        """
        if not self.shown:
            return
        said: dict[str, object] = {
            "ts": _now(),
            "level": "info",
            "event": "request",
            "request_id": request_id,
            "method": method,
            "path": path,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if run_id is not None:
            said["run_id"] = run_id
        if key is not None:
            said["key"] = key
        if provider is not None:
            said["provider"] = provider
            said["model"] = model
        if cost is not None:
            said["cost"] = float(cost)
        if input_tokens is not None:
            said["input_tokens"] = input_tokens
            said["output_tokens"] = output_tokens
        if outcome is not None:
            said["outcome"] = outcome
        if error is not None:
            said["error"] = error
        self._lines.put(orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Write what waits. Everything that is logged afterwards is lost."""
        self._lines.close()


def configure(level: Level, stream: Stream) -> AccessLog:
    """Log everything of Sekha's from now on as JSON to this stream. Called again, it takes the place of before."""
    lines = Lines(stream)
    handler = _Handler(lines)
    number = logging.getLevelNamesMapping()[level.upper()]
    for name in _NAMES:
        logger = logging.getLogger(name)
        for before in logger.handlers[:]:
            logger.removeHandler(before)
            before.close()
        logger.addHandler(handler)
        logger.propagate = False
        # The server's and the loop's own steps are of no interest when all is well.
        logger.setLevel(number if name == "sekha" else max(number, logging.WARNING))
    return AccessLog(lines, shown=number <= logging.INFO)


class _Handler(logging.Handler):
    """What is said through the standard library's logging, as lines of the same shape."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            more: dict[str, object] = {"logger": record.name}
            if record.exc_info:
                more["traceback"] = logging.Formatter().formatException(record.exc_info)
            self._lines.put(_line(record.levelname.lower(), record.getMessage(), more, at=record.created))
        except Exception:  # as every handler does: a line that cannot be written is no reason to fail
            self.handleError(record)

    def close(self) -> None:
        # The interpreter closes every handler when it ends, and so the last lines are written.
        self._lines.close()
        super().close()


def _line(level: str, event: str, more: Mapping[str, object], at: float | None = None) -> bytes:
    said = {"ts": _now() if at is None else _time(at), "level": level, "event": event, **more}
    return orjson.dumps(said, default=str, option=orjson.OPT_APPEND_NEWLINE)


def _now() -> str:
    return _time(time.time())


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
