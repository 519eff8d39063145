"""What the gateway counts, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

__all__ = ["Counter", "Histogram", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counter:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0.0


class Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds


class Metrics:
    """Counters of one process. Adding to one costs well under a microsecond."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], Counter] = {}
        self.seconds: dict[str, Histogram] = {}
        self.calls: dict[tuple[str, str, str], Counter] = {}
        self.call_seconds: dict[tuple[str, str], Histogram] = {}
        self.first_token: dict[tuple[str, str], Histogram] = {}
        self.tokens: dict[tuple[str, str, str], Counter] = {}
        self.dollars: dict[tuple[str, str], Counter] = {}

    def request(self, path: str, status: int, seconds: float) -> None:
        if (counter := self.requests.get((path, status))) is None:
            counter = self.requests[path, status] = Counter()
        counter.value += 1
        if (histogram := self.seconds.get(path)) is None:
            histogram = self.seconds[path] = Histogram()
        histogram.observe(seconds)

    def call(self, provider: str, model: str, outcome: str, seconds: float) -> None:
        if (counter := self.calls.get((provider, model, outcome))) is None:
            counter = self.calls[provider, model, outcome] = Counter()
        counter.value += 1
        if (histogram := self.call_seconds.get((provider, model))) is None:
            histogram = self.call_seconds[provider, model] = Histogram()
        histogram.observe(seconds)

    def first(self, provider: str, model: str, seconds: float) -> None:
        if (histogram := self.first_token.get((provider, model))) is None:
            histogram = self.first_token[provider, model] = Histogram()
        histogram.observe(seconds)

    def spent(self, provider: str, model: str, input_tokens: int, output_tokens: int, dollars: Decimal) -> None:
        for kind, count in (("input", input_tokens), ("output", output_tokens)):
            if (counter := self.tokens.get((provider, model, kind))) is None:
                counter = self.tokens[provider, model, kind] = Counter()
            counter.value += count
        if (counter := self.dollars.get((provider, model))) is None:
            counter = self.dollars[provider, model] = Counter()
        counter.value += float(dollars)

    def text(self) -> Iterator[str]:
        """The lines of `GET /metrics`."""
        yield from _counters("sekha_requests_total", "HTTP requests.", ("path", "status"), self.requests)
        yield from _histograms("sekha_request_seconds", "Seconds per HTTP request.", ("path",), self.seconds)
        names = ("provider", "model")
        yield from _counters("sekha_provider_calls_total", "Calls to providers.", (*names, "outcome"), self.calls)
        yield from _histograms("sekha_provider_seconds", "Seconds per call.", names, self.call_seconds)
        yield from _histograms("sekha_first_token_seconds", "Seconds to the first token.", names, self.first_token)
        yield from _counters("sekha_tokens_total", "Tokens used.", (*names, "kind"), self.tokens)
        yield from _counters("sekha_dollars_total", "US dollars spent.", names, self.dollars)


def _counters(name: str, says: str, labels: tuple[str, ...], counters: Mapping[Any, Counter]) -> Iterator[str]:
    yield f"# HELP {name} {says}"
    yield f"# TYPE {name} counter"
    for values, counter in counters.items():
        yield f"{name}{_labels(labels, values)} {counter.value:g}"


def _histograms(name: str, says: str, labels: tuple[str, ...], found: Mapping[Any, Histogram]) -> Iterator[str]:
    yield f"# HELP {name} {says}"
    yield f"# TYPE {name} histogram"
    for key, histogram in found.items():
        values = key if isinstance(key, tuple) else (key,)
        running = 0
        for bound, count in zip((*_SECONDS, "+Inf"), histogram.counts, strict=True):
            running += count
            yield f"{name}_bucket{_labels((*labels, 'le'), (*values, bound))} {running}"
        yield f"{name}_sum{_labels(labels, values)} {histogram.total:.6f}"
        yield f"{name}_count{_labels(labels, values)} {running}"


def _labels(names: tuple[str, ...], values: tuple[object, ...]) -> str:
    def escaped(value: object) -> str:
        return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in zip(names, values, strict=True)) + "}"
