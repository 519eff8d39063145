"""Give Prefect whole values, so that it need not search them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from prefect.utilities.annotations import opaque

from sekha.runtime import Runtime
from tasks.resources import runtime

__all__ = ["given_whole"]

S = TypeVar("S")


_kept: WeakKeyDictionary[Runtime, list[object]] = WeakKeyDictionary()


def given_whole(steps: S) -> S:
    """The same steps, each handed its arguments, and each item of a list among them, as one value.

    Prefect looks for the results of other tasks through all that an argument holds, and that twice:
    seconds for the chunks of a large ingest. What it finds so deep is false besides, because it goes by
    identity, and one empty tuple serves the whole process. Takes any dataclass of tasks, nested ones too.
    """
    if not is_dataclass(steps) or isinstance(steps, type):
        raise TypeError(f"steps are a dataclass of tasks, not {steps!r}")
    whole: dict[str, Any] = {}
    for each in fields(steps):
        value = getattr(steps, each.name)
        if is_dataclass(value):
            whole[each.name] = given_whole(value)
        elif callable(value):
            whole[each.name] = _given_whole(value)
    return replace(steps, **whole)


def _given_whole(task: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(task)
    async def call(*args: Any) -> Any:
        result = await task(*(_as_one(arg) for arg in args))
        # Prefect knows a result by its address. It notices when one that can be referred to weakly is
        # gone; the others, and they are small, are kept for the run, so that nothing new takes their place.
        _kept.setdefault(runtime(), []).extend(_known_by_address(result))
        return result

    return call


def _known_by_address(result: object) -> Iterator[object]:
    parts = [getattr(result, each.name) for each in fields(result)] if is_dataclass(result) else []
    return (part for part in (result, *parts) if not type(part).__weakrefoffset__)


def _as_one(value: Any) -> Any:
    return [opaque(each) for each in value] if isinstance(value, list | tuple) else opaque(value)
