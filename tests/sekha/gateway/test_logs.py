"""Logs: one JSON line for each request, written behind it, with neither prompt nor secret."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from sekha.gateway.logs import AccessLog, Level, configure

NAMES = ("sekha", "uvicorn", "asyncio")


class Terminal(io.BytesIO):
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A stream to configure logs with. The loggers are afterwards as they were."""
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in map(logging.getLogger, NAMES)]
    yield Terminal()
    for logger, handlers, level, propagate in before:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def noted(log: AccessLog, **more: Any) -> None:
    log.note(request_id="r1", method="POST", path="/v1/chat/completions", status=200, seconds=0.1234567, **more)


def test_a_request_is_one_line_with_all_that_is_known_of_it(terminal: Terminal) -> None:
    log = configure("info", terminal)

    noted(
        log,
        run_id="01a2",
        key="research",
        provider="openai",
        model="gpt-5-mini",
        cost=Decimal("0.00042"),
        input_tokens=12,
        output_tokens=34,
        outcome="answered",
    )
    log.close()

    (line,) = terminal.lines()
    assert datetime.fromisoformat(line.pop("ts")).tzinfo is not None
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "r1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 0.123457,
        "run_id": "01a2",
        "key": "research",
        "provider": "openai",
        "model": "gpt-5-mini",
        "cost": 0.00042,
        "input_tokens": 12,
        "output_tokens": 34,
        "outcome": "answered",
    }


def test_what_is_not_known_of_a_request_is_left_out(terminal: Terminal) -> None:
    log = configure("info", terminal)

    noted(log, outcome="refused", error="cost_refused")
    log.close()

    (line,) = terminal.lines()
    assert line.keys().isdisjoint({"provider", "model", "cost", "input_tokens", "key", "run_id"})
    assert line["error"] == "cost_refused"


def test_whatever_is_logged_in_the_usual_way_has_the_same_shape(terminal: Terminal) -> None:
    log = configure("info", terminal)

    logging.getLogger("sekha.circuits").warning("circuit of %s: %s", "openai/gpt", "open")
    try:
        int("at fault")
    except ValueError:
        logging.getLogger("sekha.gateway").exception("that was\nnot foreseen")
    log.close()

    first, second = terminal.lines()
    assert (first["level"], first["event"]) == ("warning", "circuit of openai/gpt: open")
    assert first["logger"] == "sekha.circuits"
    assert (second["level"], second["event"]) == ("error", "that was\nnot foreseen")
    assert "ValueError: invalid literal" in second["traceback"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_shown(terminal: Terminal, level: Level, shown: int) -> None:
    log = configure(level, terminal)

    noted(log)
    for method in ("debug", "warning", "error"):
        getattr(logging.getLogger("sekha.x"), method)("something")
    log.close()

    assert len(terminal.lines()) == shown


def test_other_libraries_lines_are_not_shown_since_they_may_quote_what_was_asked(terminal: Terminal) -> None:
    log = configure("debug", terminal)

    logging.getLogger("litellm").warning("the prompt was …")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    log.close()

    assert [line["event"] for line in terminal.lines()] == ["Invalid HTTP request received."]


def test_lines_of_many_threads_come_whole_and_all(terminal: Terminal) -> None:
    log = configure("info", terminal)

    def work() -> None:
        for _ in range(500):
            noted(log)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()

    assert len(terminal.lines()) == 2000


class Stuck(Terminal):
    """A reader that has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = threading.Event()
        self.asked = threading.Event()

    def write(self, data: Any, /) -> int:
        self.asked.set()
        self.reads.wait()
        return super().write(data)


def test_a_reader_that_has_stopped_holds_nobody_up_and_is_told_what_it_missed(terminal: Terminal) -> None:
    stuck = Stuck()
    log = configure("info", stuck)
    noted(log)
    stuck.asked.wait()

    for _ in range(50_003):
        noted(log)
    stuck.reads.set()
    log.close()

    lines = stuck.lines()
    assert sum(line["event"] == "request" for line in lines) == 50_001
    assert [line["lines"] for line in lines if line["event"] == "log_lines_dropped"] == [3]


def test_a_reader_that_never_goes_on_does_not_keep_the_log_from_being_closed(terminal: Terminal) -> None:
    stuck = Stuck()
    log = configure("info", stuck)
    noted(log)
    stuck.asked.wait()

    closing = threading.Thread(target=log.close)
    closing.start()
    closing.join(20)
    ended = not closing.is_alive()
    stuck.reads.set()
    closing.join()

    assert ended


def test_a_stream_that_takes_a_little_at_a_time_gets_all_of_it(terminal: Terminal) -> None:
    class Narrow(Terminal):
        full = False

        def write(self, data: Any, /) -> int | None:  # type: ignore[override]
            self.full = not self.full
            return None if self.full else super().write(data[:50])

    narrow = Narrow()
    log = configure("info", narrow)
    noted(log)
    log.close()

    assert [line["event"] for line in narrow.lines()] == ["request"]


def test_a_reader_that_is_gone_is_no_failure(terminal: Terminal) -> None:
    log = configure("info", terminal)
    terminal.close()

    noted(log)
    log.close()


def test_logs_configured_again_go_where_they_are_told_last(terminal: Terminal) -> None:
    configure("info", terminal)
    other = Terminal()

    log = configure("info", other)
    logging.getLogger("sekha").info("here")
    log.close()

    assert terminal.lines() == []
    assert [line["event"] for line in other.lines()] == ["here"]
