"""What happened in a request, as values: which steps ran, on whose results, for how long, how they ended."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, NamedTuple, TypeAlias, TypeVar

__all__ = ["Notes", "Step", "Trace", "Tracer", "noted", "take_notes", "trace_of"]

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Step:
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

    A step depends on another when it is given its result, or a part of it, just as Prefect sees it.
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


class Note(NamedTuple):
    """What a step was given and gave back. Kept alive, so that no later object can be taken for it by its id."""

    name: str
    args: tuple[object, ...]
    started: float
    ended: float
    result: object
    error: str | None


# Of the shape of a `Note`, which takes four times as long to make: most requests' notes are never read.
Notes: TypeAlias = list[tuple[str, tuple[object, ...], float, float, object, str | None]]
# What may be one and the same object without having come from anywhere.
_ALIKE = (str, int, float, NoneType)
_ONE_WHEN_EMPTY = (tuple, frozenset)
# Of each type that was met, of which there are as many as steps take and give.
_names: dict[type[Any], tuple[str, ...]] = {}
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
    """Work out which step went before which. Noting costs a microsecond, this thirty: only what is shown needs it."""
    # Most of what a step is given was given to others too, or made by one.
    known: dict[int, list[int]] = {}

    def ids_in(value: object) -> list[int]:
        found = known.get(id(value))
        if found is None:
            found = known[id(value)] = _ids_in(value)
        return found

    made_by: dict[int, int] = {}
    # Noted when they ended; shown as they began.
    begun = sorted(map(Note._make, notes), key=lambda note: note.started)
    for at in sorted(range(len(begun)), key=lambda at: begun[at].ended):
        if not isinstance(begun[at].result, _ALIKE):
            for part in ids_in(begun[at].result):
                made_by.setdefault(part, at)

    def before(note: Note) -> tuple[int, ...]:
        makers = {made_by[part] for arg in note.args for part in ids_in(arg) if part in made_by}
        # Some steps hand on what they were given: only who had made it by then counts.
        return tuple(sorted(at for at in makers if begun[at].ended <= note.started))

    return Trace(tuple(Step(note.name, before(note), note.started, note.ended, note.error) for note in begun))


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


def _ids_in(value: object) -> list[int]:
    """The ids of a value and of what it directly holds, where that can be told apart by identity."""
    ids = [id(value)]
    kind = type(value)
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(each.name for each in fields(kind)) if is_dataclass(kind) else ()
    inner = [getattr(value, name) for name in names] if names else value if isinstance(value, list | tuple) else ()
    for part in inner:
        # One empty tuple and one empty set serve all, so that they tell nothing.
        if not (isinstance(part, _ALIKE) or (isinstance(part, _ONE_WHEN_EMPTY) and not part)):
            ids.append(id(part))
    return ids


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
