"""What happened in a request, as values: which steps ran, on whose results, for how long, how they ended."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

__all__ = ["Step", "Trace", "Tracer"]

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


@dataclass
class Tracer:
    """Wraps steps so that each leaves a `Step`. One tracer for one request.

    A step depends on another when it is given its result, or a part of it, just as Prefect sees it.
    """

    clock: Callable[[], float]
    _steps: list[Step] = field(default_factory=list)
    _made_by: dict[int, int] = field(default_factory=dict)
    _kept: list[object] = field(default_factory=list)

    def wrap(self, steps: S) -> S:
        """The same steps, traced. Takes any dataclass of callables, nested ones too."""
        if not is_dataclass(steps) or isinstance(steps, type):
            raise TypeError(f"steps are a dataclass of callables, not {steps!r}")
        wrapped: dict[str, Any] = {}
        for each in fields(steps):
            value = getattr(steps, each.name)
            wrapped[each.name] = self.wrap(value) if is_dataclass(value) else self._traced(value)
        return replace(steps, **wrapped)

    @property
    def trace(self) -> Trace:
        return Trace(tuple(self._steps))

    def _traced(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        name = getattr(call, "__name__", type(call).__name__)

        @functools.wraps(call)
        async def step(*args: Any) -> Any:
            before = {self._made_by[id(part)] for arg in args for part in _parts(arg) if id(part) in self._made_by}
            at = len(self._steps)
            begun = Step(name, tuple(sorted(before)), self.clock(), 0.0)
            self._steps.append(begun)
            try:
                result = await call(*args)
            except BaseException as error:
                code = getattr(error, "code", type(error).__name__)
                self._steps[at] = replace(begun, ended=self.clock(), error=code)
                raise
            self._steps[at] = replace(begun, ended=self.clock())
            if not isinstance(result, None | bool | int | float | str):
                # The result is kept alive, so that no later object can be taken for it by its id.
                self._kept.append(result)
                for part in _parts(result):
                    self._made_by.setdefault(id(part), at)
            return result

        return step


def _parts(value: object) -> Iterable[object]:
    """A value and what it directly holds, where that can be told apart by identity."""
    yield value
    inner: Iterable[object] = ()
    if is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, each.name) for each in fields(value))
    elif isinstance(value, list | tuple):
        inner = value
    for part in inner:
        # One empty tuple and one empty set serve all, so that they tell nothing.
        nothing = isinstance(part, tuple | frozenset) and not part
        if part is not None and not nothing and not isinstance(part, bool | int | float | str):
            yield part


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
