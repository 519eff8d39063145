"""What happened in a request, as values: which steps ran, on whose results, for how long, how they ended."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import attrgetter
from types import NoneType
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

__all__ = ["Notes", "Step", "Trace", "Tracer", "noted", "take_notes", "trace_of"]

S = TypeVar("S")


class Step(NamedTuple):
    """One step that ran. `after` holds the positions of the steps whose results it was given."""

    name: str
    after: tuple[int, ...]
    started: float
    ended: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps of one request, in the order in which they began."""

    steps: tuple[Step, ...]

    @property
    def edges(self) -> frozenset[tuple[str, str]]:
        """Which step's result went into which, by name."""
        return frozenset((self.steps[before].name, step.name) for step in self.steps for before in step.after)

    def mermaid(self) -> str:
        """Draw the steps as a Mermaid flowchart. Steps that ran many times are drawn once."""
        names = list(dict.fromkeys(step.name for step in self.steps))
        many = {name for name in names if sum(step.name == name for step in self.steps) > 1}
        lines = ["flowchart LR"]
        lines += [f"  {name}[[{name} × n]]" if name in many else f"  {name}[{name}]" for name in names]
        order = {name: at for at, name in enumerate(names)}
        lines += [
            f"  {before} --> {after}"
            for before, after in sorted(_shortest(self.edges), key=lambda edge: (order[edge[0]], order[edge[1]]))
        ]
        return "\n".join(lines)


class Tracer:
    """Wraps steps so that each leaves a `Step`. One tracer for one request.

    A step depends on another when it is given its result, a part of that, or a list of such, as in `flows/`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._notes: Notes = []

    def wrap(self, steps: S) -> S:
        """The same steps, traced. Takes any dataclass of callables, nested ones too."""
        return _noted(steps, self._clock, lambda: self._notes)

    @property
    def trace(self) -> Trace:
        return trace_of(self._notes)


Note: TypeAlias = tuple[str, tuple[object, ...], float, float, object, str | None]
"""A step's name, what it was given, when it started and ended, what it gave back, and the code of its error.

It keeps them alive, so that no later object can be taken for one of them by its id. A named one takes four times as
long to make, and most are never read.
"""
Notes: TypeAlias = list[Note]
"""In the order in which the steps ended."""
# What may be one and the same object without having come from anywhere.
_ALIKE = frozenset({str, int, bool, float, NoneType})
_ONE_WHEN_EMPTY = frozenset({tuple, frozenset})
_under_way: ContextVar[Notes | None] = ContextVar("sekha_notes", default=None)


def take_notes() -> Notes:
    """Begin to note the steps of the request that this task serves, and of it alone."""
    notes: Notes = []
    _under_way.set(notes)
    return notes


def noted(steps: S, clock: Callable[[], float]) -> S:
    """The same steps, each noted wherever `take_notes` was called: wrapped once, for all requests."""
    return _noted(steps, clock, _under_way.get)


def trace_of(notes: Notes) -> Trace:
    """Work out which step went before which. Noting costs half a microsecond, this ten: only what is shown needs it."""
    made_by: dict[int, int] = {}
    for number, (_, _, _, _, result, _) in enumerate(notes):
        for part in _parts(result):
            # One empty tuple and one empty set serve all, so that they tell nothing.
            kind = type(part)
            if kind not in _ALIKE and (kind not in _ONE_WHEN_EMPTY or part):
                made_by.setdefault(id(part), number)
    given: dict[int, list[int]] = {}
    begun = sorted(range(len(notes)), key=lambda number: notes[number][2])
    place = {number: at for at, number in enumerate(begun)}
    steps = []
    for number in begun:
        name, args, started, ended, _, error = notes[number]
        makers: set[int] = set()
        for arg in args:
            # Most of what a step is given was given to others too.
            made = given.get(id(arg))
            if made is None:
                made = given[id(arg)] = [made_by[whole] for whole in map(id, _wholes(arg)) if whole in made_by]
            makers.update(made)
        # Some steps hand on what they were given: only who had made it by then counts.
        after = tuple(sorted([place[maker] for maker in makers if notes[maker][3] <= started]))
        steps.append(Step(name, after, started, ended, error))
    return Trace(tuple(steps))


def _noted(steps: S, clock: Callable[[], float], notes: Callable[[], Notes | None]) -> S:
    if not is_dataclass(steps) or isinstance(steps, type):
        raise TypeError(f"steps are a dataclass of callables, not {steps!r}")
    wrapped: dict[str, Any] = {}
    for each in fields(steps):
        value = getattr(steps, each.name)
        if is_dataclass(value):
            wrapped[each.name] = _noted(value, clock, notes)
        elif callable(value):
            wrapped[each.name] = _noting(value, clock, notes)
    return replace(steps, **wrapped)


def _noting(
    call: Callable[..., Awaitable[Any]], clock: Callable[[], float], notes: Callable[[], Notes | None]
) -> Callable[..., Awaitable[Any]]:
    name = getattr(call, "__name__", type(call).__name__)

    @functools.wraps(call)
    async def step(*args: Any) -> Any:
        kept = notes()
        if kept is None:
            return await call(*args)
        started = clock()
        try:
            result = await call(*args)
        except BaseException as error:
            code = getattr(error, "code", type(error).__name__)
            kept.append((name, args, started, clock(), None, code))
            raise
        kept.append((name, args, started, clock(), result, None))
        return result

    return step


def _wholes(arg: object) -> tuple[object, ...]:
    """What a step was given, and each item when that is a list: what lies deeper came by way of another step."""
    return (arg, *arg) if isinstance(arg, list | tuple) else (arg,)


def _parts(value: object) -> tuple[object, ...]:
    """A value and what it directly holds."""
    kind = type(value)
    if kind not in _HELD:
        _HELD[kind] = _held_by(kind)
    held = _HELD[kind]
    return (value, *held(value)) if held is not None else (value,)


_HELD: Final[dict[type[Any], Callable[[Any], Iterable[object]] | None]] = {}
"""There are as many types as steps take and give."""


def _held_by(kind: type[Any]) -> Callable[[Any], Iterable[object]] | None:
    """What finds all that a value of this type directly holds; None where nothing is looked for."""
    if issubclass(kind, list | tuple):
        return iter
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else []
    # Of a single name it would give the value alone.
    return attrgetter(*names, names[0]) if names else None


def _shortest(edges: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that no longer path implies."""
    edges = set(edges)
    after: dict[str, set[str]] = {}
    for start, end in edges:
        after.setdefault(start, set()).add(end)

    def reaches(start: str, end: str, seen: frozenset[str]) -> bool:
        return any(
            step == end or reaches(step, end, seen | {step}) for step in after.get(start, ()) if step not in seen
        )

    return {
        (start, end)
        for start, end in edges
        if not any(step != end and reaches(step, end, frozenset({start})) for step in after[start])
    }
