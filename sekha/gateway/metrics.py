"""What the gateway counts, in Prometheus's text format, for all of its worker processes together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import orjson

__all__ = ["Counter", "Family", "Histogram", "Metrics", "ModelCounts", "Sample"]

log = logging.getLogger("sekha.metrics")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LAG_EVERY_SECONDS = 0.1
_WRITE_EVERY = 10
"""Times that the lag is measured: a second."""

Labels: TypeAlias = tuple[object, ...]
Sample: TypeAlias = tuple[Labels, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric: its name, what it means, and the names of its labels."""

    name: str
    says: str
    labels: tuple[str, ...] = ()
    kind: str = "counter"
    bounds: tuple[float, ...] = _SECONDS

    def head(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.says}"
        yield f"# TYPE {self.name} {self.kind}"

    def lines(self, samples: Iterable[Sample]) -> Iterator[str]:
        yield from self.head()
        for values, value in samples:
            yield f"{self.name}{_labels(self.labels, values)} {_number(value)}"


_MODEL = ("provider", "model")
REQUESTS = Family(name="sekha_requests_total", says="HTTP requests.", labels=("path", "status"))
REQUEST_SECONDS = Family(
    name="sekha_request_seconds", says="Seconds for a whole HTTP request.", labels=("path",), kind="histogram"
)
CALLS = Family(
    name="sekha_provider_calls_total",
    says="Calls to providers, by how they ended: answered, cancelled as the caller left, or the code of the error.",
    labels=(*_MODEL, "outcome"),
)
CALL_SECONDS = Family(
    name="sekha_provider_seconds", says="Seconds that a call to a provider took.", labels=_MODEL, kind="histogram"
)
FIRST_TOKEN = Family(
    name="sekha_first_token_seconds",
    says="Seconds from a request for a stream to its first token.",
    labels=_MODEL,
    kind="histogram",
)
TOKENS = Family(name="sekha_tokens_total", says="Tokens used.", labels=(*_MODEL, "kind"))
DOLLARS = Family(name="sekha_dollars_total", says="US dollars spent.", labels=_MODEL)
PASSED = Family(
    name="sekha_worst_case_passed_total", says="Calls that cost more than was held for them.", labels=_MODEL
)
LAG = Family(
    name="sekha_event_loop_lag_seconds",
    says="How late the event loop came to a timer.",
    kind="histogram",
    bounds=_LAG_SECONDS,
)
UNDER_WAY = Family(name="sekha_requests_under_way", says="HTTP requests that have no whole answer yet.", kind="gauge")
WORKERS = Family(name="sekha_workers", says="Worker processes that are alive.", kind="gauge")
STARTED = Family(
    name="process_start_time_seconds", says="When the first of the worker processes started.", kind="gauge"
)

RECORDED = Family(name="sekha_recorder_recorded_total", says="Requests that were recorded.")
SAMPLED_OUT = Family(name="sekha_recorder_sampled_out_total", says="Requests that did not have to be recorded.")
DROPPED = Family(name="sekha_recorder_dropped_total", says="Requests that should have been recorded, and are lost.")

_COUNTED = (REQUESTS, CALLS, TOKENS, DOLLARS, PASSED, RECORDED, SAMPLED_OUT, DROPPED)
_TIMED = (REQUEST_SECONDS, CALL_SECONDS, FIRST_TOKEN, LAG)


class Recorded(Protocol):
    """What a recorder has counted since it began."""

    @property
    def recorded(self) -> int: ...
    @property
    def sampled_out(self) -> int: ...
    @property
    def dropped(self) -> int: ...


class Recording(Protocol):
    @property
    def stats(self) -> Recorded: ...


class Counter:
    __slots__ = ("value",)

    def __init__(self, value: float = 0.0) -> None:
        self.value = value


class Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def add(self, counts: Sequence[int], total: float) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total


class ModelCounts:
    """The counts of one model's answers, looked up once for all of them."""

    __slots__ = ("answered", "dollars", "input", "output", "seconds")

    def __init__(self, totals: Totals, provider: str, model: str) -> None:
        counters, histograms = totals.counters, totals.histograms
        self.answered = counters[CALLS.name].setdefault((provider, model, "answered"), Counter())
        self.input = counters[TOKENS.name].setdefault((provider, model, "input"), Counter())
        self.output = counters[TOKENS.name].setdefault((provider, model, "output"), Counter())
        self.dollars = counters[DOLLARS.name].setdefault((provider, model), Counter())
        self.seconds = histograms[CALL_SECONDS.name].setdefault((provider, model), Histogram())

    def answer(self, seconds: float, input_tokens: int, output_tokens: int, dollars: float) -> None:
        """What `Metrics.call` and `Metrics.spent` count of an answer."""
        self.answered.value += 1
        self.seconds.observe(seconds)
        self.input.value += input_tokens
        self.output.value += output_tokens
        self.dollars.value += dollars


@dataclass(slots=True)
class Totals:
    """Everything that is added up over processes."""

    counters: dict[str, dict[Labels, Counter]] = field(default_factory=lambda: {each.name: {} for each in _COUNTED})
    histograms: dict[str, dict[Labels, Histogram]] = field(default_factory=lambda: {each.name: {} for each in _TIMED})

    def written(self) -> dict[str, Any]:
        return {
            "counters": {
                name: [[labels, counter.value] for labels, counter in found.items()]
                for name, found in self.counters.items()
            },
            "histograms": {
                name: [[labels, histogram.counts, histogram.total] for labels, histogram in found.items()]
                for name, found in self.histograms.items()
            },
        }

    def add(self, written: Mapping[str, Any]) -> None:
        """Add what another process wrote. Raises for what no process of this version writes."""
        for name, counters in written["counters"].items():
            mine = self.counters[name]
            for labels, value in counters:
                mine.setdefault(tuple(labels), Counter()).value += value
        for family in _TIMED:
            timed = self.histograms[family.name]
            for labels, counts, total in written["histograms"][family.name]:
                timed.setdefault(tuple(labels), Histogram(family.bounds)).add(counts, total)


class Metrics:
    """Counts what one worker process does; adding to a count takes well under a microsecond.

    With a `folder`, which all workers share, each writes there once a second what it has counted, and whoever is
    asked adds the others' up. What a worker counted that died is taken over by the next of its number, so that no
    count ever goes back. The folder is to be one server's alone, and empty when it starts.
    """

    def __init__(self, folder: Path | None = None, worker: int = 0) -> None:
        self.under_way = 0
        """Requests that this process has yet to answer."""
        self._totals = Totals()
        self._requests = self._totals.counters[REQUESTS.name]
        self._seconds = self._totals.histograms[REQUEST_SECONDS.name]
        self._calls = self._totals.counters[CALLS.name]
        self._call_seconds = self._totals.histograms[CALL_SECONDS.name]
        self._first = self._totals.histograms[FIRST_TOKEN.name]
        self._tokens = self._totals.counters[TOKENS.name]
        self._dollars = self._totals.counters[DOLLARS.name]
        self._lag = Histogram(_LAG_SECONDS)
        self.started_at = time.time()
        self._recorders: list[tuple[Recording, dict[str, int]]] = []
        """Each with what was counted of it."""
        self._folder = folder
        self._file: Path | None = None
        self._failing = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticks = 0
        if folder is not None:
            self._take_over(folder, worker)
            self.write()

    # --- what happens ---

    def request(self, path: str, status: int, seconds: float) -> None:
        if (counter := self._requests.get((path, status))) is None:
            counter = self._requests[path, status] = Counter()
        counter.value += 1
        if (histogram := self._seconds.get((path,))) is None:
            histogram = self._seconds[path,] = Histogram()
        histogram.observe(seconds)

    def call(self, provider: str, model: str, outcome: str, seconds: float) -> None:
        if (counter := self._calls.get((provider, model, outcome))) is None:
            counter = self._calls[provider, model, outcome] = Counter()
        counter.value += 1
        if (histogram := self._call_seconds.get((provider, model))) is None:
            histogram = self._call_seconds[provider, model] = Histogram()
        histogram.observe(seconds)

    def counts_of(self, provider: str, model: str) -> ModelCounts:
        return ModelCounts(self._totals, provider, model)

    def first(self, provider: str, model: str, seconds: float) -> None:
        if (histogram := self._first.get((provider, model))) is None:
            histogram = self._first[provider, model] = Histogram()
        histogram.observe(seconds)

    def spent(self, provider: str, model: str, input_tokens: int, output_tokens: int, dollars: Decimal) -> None:
        counters = self._tokens
        if (counter := counters.get((provider, model, "input"))) is None:
            counter = counters[provider, model, "input"] = Counter()
        counter.value += input_tokens
        if (counter := counters.get((provider, model, "output"))) is None:
            counter = counters[provider, model, "output"] = Counter()
        counter.value += output_tokens
        if (counter := self._dollars.get((provider, model))) is None:
            counter = self._dollars[provider, model] = Counter()
        counter.value += float(dollars)

    def passed(self, provider: str, model: str) -> None:
        """Count a call that cost more than was held for it."""
        self._totals.counters[PASSED.name].setdefault((provider, model), Counter()).value += 1

    def follow(self, recorder: Recording) -> None:
        """Count what this recorder counts, beside those before, which go on until their last request ends."""
        if all(each is not recorder for each, _ in self._recorders):
            self._recorders.append((recorder, {}))

    def leave(self, recorder: Recording) -> None:
        """Count what a recorder counted to its end, and ask it no more."""
        self._ask_recorders()
        self._recorders = [each for each in self._recorders if each[0] is not recorder]

    # --- what is told ---

    def start(self) -> None:
        """Measure the event loop's lag, and write for the other workers, from now on."""
        # What was taken over goes on.
        self._lag = self._totals.histograms[LAG.name].setdefault((), self._lag)
        self._measure_at(asyncio.get_running_loop())

    def close(self) -> None:
        """Leave to the others what was counted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.write(alive=False)

    def text(self) -> Iterator[str]:
        """The lines of `GET /metrics`, of all workers together."""
        # Written first, so that nothing is told that would be forgotten if this process were killed now.
        self.write()
        totals, under_way, workers, started_at = self._totals, self.under_way, 1, self.started_at
        others = list(self._others())
        if others:
            totals = Totals()
            totals.add(self._totals.written())
        for other in others:
            totals.add(other)
            started_at = min(started_at, other["started_at"])
            if other["alive"]:
                under_way += other["under_way"]
                workers += 1
        for family in _COUNTED:
            found = totals.counters[family.name]
            yield from family.lines((labels, counter.value) for labels, counter in found.items())
        for family in _TIMED:
            yield from _histograms(family, totals.histograms[family.name])
        for gauge, value in ((UNDER_WAY, under_way), (WORKERS, workers), (STARTED, started_at)):
            yield from gauge.lines([((), value)])

    def write(self, *, alive: bool = True) -> None:
        """Tell the other workers what was counted until now."""
        self._ask_recorders()
        if self._file is None:
            return
        said = self._totals.written() | {
            "alive": alive,
            "under_way": self.under_way,
            "started_at": self.started_at,
        }
        beside = self._file.with_suffix(".tmp")
        try:
            beside.write_bytes(orjson.dumps(said))
            beside.replace(self._file)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("what this worker counts is hidden from the others: %s", error)
            self._failing = True

    def _ask_recorders(self) -> None:
        for recorder, said in self._recorders:
            stats = recorder.stats
            counts = ((RECORDED, stats.recorded), (SAMPLED_OUT, stats.sampled_out), (DROPPED, stats.dropped))
            for family, value in counts:
                counter = self._totals.counters[family.name].setdefault((), Counter())
                counter.value += value - said.get(family.name, 0)
                said[family.name] = value

    def _others(self) -> Iterator[dict[str, Any]]:
        if self._folder is None:
            return
        for file in sorted(self._folder.glob("worker-*.json")):
            if file != self._file and (written := _read(file)) is not None:
                yield written | {"alive": written["alive"] and _is_alive(file)}

    def _take_over(self, folder: Path, worker: int) -> None:
        """Go on with the counts of a worker of this number that has ended."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"worker-{worker}-{os.getpid()}-{time.time_ns()}.json"
        for file in sorted(folder.glob(f"worker-{worker}-*.json")):
            written = _read(file)
            if written is None or (written["alive"] and _is_alive(file)):
                continue
            # Renamed, and not read and deleted: at no moment do the others see it twice, or not at all.
            with contextlib.suppress(OSError):
                file.rename(self._file)
                self._totals.add(written)
                self.started_at = min(self.started_at, written["started_at"])
                return

    def _measure_at(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _LAG_EVERY_SECONDS
        self._timer = loop.call_at(due, self._tick, loop, due)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._lag.observe(max(loop.time() - due, 0.0))
        self._ticks += 1
        if self._ticks % _WRITE_EVERY == 0:
            self.write()
        self._measure_at(loop)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        written = orjson.loads(file.read_bytes())
        # Whoever cannot be added up is left out whole.
        Totals().add(written)
        return {**written, "alive": bool(written["alive"]), "started_at": float(written["started_at"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_alive(file: Path) -> bool:
    """Whether the process still is that a file names."""
    pid = int(file.stem.split("-")[2])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _histograms(family: Family, found: Mapping[Labels, Histogram]) -> Iterator[str]:
    yield from family.head()
    name, labels = family.name, family.labels
    for values, histogram in found.items():
        running = 0
        for bound, count in zip((*family.bounds, "+Inf"), histogram.counts, strict=True):
            running += count
            yield f"{name}_bucket{_labels((*labels, 'le'), (*values, bound))} {running}"
        yield f"{name}_sum{_labels(labels, values)} {_number(histogram.total)}"
        yield f"{name}_count{_labels(labels, values)} {running}"


def _number(value: float) -> str:
    # Whole, and with every digit: rounded counts would stand still, and then jump.
    return str(int(value)) if value == int(value) else repr(value)


def _labels(names: Sequence[str], values: Sequence[object]) -> str:
    def escaped(value: object) -> str:
        return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    if not names:
        return ""
    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in zip(names, values, strict=True)) + "}"
