"""What was measured beside what was promised: pure, so that the table and the exit code cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import median
from typing import Literal

Verdict = Literal["holds", "MISSED", "not measured"]
DOUBT = 0.05
"""How often the middle of all turns there could be would lie beside what is said of these."""


@dataclass
class Figures:
    """What one gateway came to: by name of the figure, one value for each round."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    unavailable: str = ""
    """Why nothing was measured, if so."""
    imports: Sequence[str] | None = None
    """Heavy packages in the serving process; None where nobody looked."""

    def note(self, name: str, value: float) -> None:
        self.rounds.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> float | None:
        return median(self.rounds[name]) if name in self.rounds else None


@dataclass(frozen=True, slots=True)
class Judged:
    """One promise: what we came to, what it is held against, and whether it holds."""

    promise: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class TimesPeer:
    """Ours is at least so many times a peer's, round by round: neighbours then slow both."""

    figure: str
    peer: str
    least: float
    reference: float
    """The peer's on an idle machine of two cores, to be shown where there is no peer."""

    @property
    def promise(self) -> str:
        return f"{self.figure} ≥ {self.least:g} × {self.peer}'s"


@dataclass(frozen=True, slots=True)
class NoMoreThanPeer:
    """Ours is at most a peer's, in the middle of all rounds and round by round."""

    figure: str
    peer: str
    reference: float

    @property
    def promise(self) -> str:
        return f"{self.figure} ≤ {self.peer}'s"


@dataclass(frozen=True, slots=True)
class AtMost:
    figure: str
    most: float

    @property
    def promise(self) -> str:
        return f"{self.figure} ≤ {self.most:g}"


CHATS = "chats/s, 16 connections"
EMBEDDINGS = "embeddings/s, 16 connections"
CHUNKS = "chunks/s, 16 streams"
ADDED_P50 = "added p50, ms"
ADDED_P99 = "added p99, ms"
ADDED_FIRST = "added to first token, ms"
IDLE = "idle PSS, MB"
START = "first answer, s"

Bound = TimesPeer | NoMoreThanPeer | AtMost
BOUNDS: Sequence[Bound] = (
    TimesPeer(CHATS, "smg", 1, 5_260),
    TimesPeer(CHATS, "litellm", 50, 84),
    TimesPeer(EMBEDDINGS, "relay", 0.7, 5_643),
    TimesPeer(CHUNKS, "smg", 1, 64_975),
    NoMoreThanPeer(ADDED_P50, "smg", 0.40),
    NoMoreThanPeer(ADDED_P99, "smg", 0.67),
    NoMoreThanPeer(ADDED_FIRST, "smg", 0.26),
    AtMost(IDLE, 90),
    AtMost(START, 1.0),
)
IMPORTS = "neither litellm nor prefect imported while serving"


def judge(ours: Figures, peers: Mapping[str, Figures], bounds: Iterable[Bound] = BOUNDS) -> list[Judged]:
    """Every promise with its verdict. What was not measured on both sides is neither kept nor missed."""
    return [*(_judge(bound, ours, peers) for bound in bounds), _imports(ours)]


def _judge(bound: Bound, ours: Figures, peers: Mapping[str, Figures]) -> Judged:
    here = ours[bound.figure]
    if here is None:
        return Judged(bound.promise, "ours did not run" if ours.unavailable else "", "not measured")
    if isinstance(bound, AtMost):
        return Judged(bound.promise, f"{here:,.2f}", _verdict(here <= bound.most))
    peer = peers.get(bound.peer, Figures())
    there = peer[bound.figure]
    if there is None:
        shown = f"{here:,.2f}; {bound.peer} not measured, {bound.reference:,g} elsewhere"
        return Judged(bound.promise, shown, "not measured")
    pairs = zip(ours.rounds[bound.figure], peer.rounds[bound.figure], strict=True)
    ratios = [mine / its for mine, its in pairs]
    times = median(ratios)
    if isinstance(bound, NoMoreThanPeer):
        least, most = middle(ratios)
        shown = f"{here:.3f} : {there:.3f} = {times:.2f} ({least:.2f} to {most:.2f})"
        return Judged(bound.promise, shown, _verdict(here <= there and times <= 1))
    return Judged(bound.promise, f"{here:,.0f} : {there:,.0f} = {times:.2f}", _verdict(times >= bound.least))


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Between what the median of all such values lies, but for `DOUBT`, however they are distributed.

    Each is as likely above it as below, so that how many are is a binomial: the interval's ends are the values
    that too few lie beyond.
    """
    ordered, beyond, seen = sorted(values), 0, 0.0
    for number in range(len(ordered) // 2):
        seen += comb(len(ordered), number) / 2 ** len(ordered)
        if 2 * seen > DOUBT:
            break
        beyond = number
    return ordered[beyond], ordered[-1 - beyond]


def _imports(ours: Figures) -> Judged:
    if ours.imports is None:
        return Judged(IMPORTS, "ours did not run" if ours.unavailable else "", "not measured")
    return Judged(IMPORTS, " and ".join(ours.imports) or "none", _verdict(not ours.imports))


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "MISSED"
