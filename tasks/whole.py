"""Give Prefect whole values, so that it need not search them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from prefect.utilities.annotations import opaque

__all__ = ["given_whole"]

S = TypeVar("S")


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
        whole[each.name] = given_whole(value) if is_dataclass(value) else _given_whole(value)
    return replace(steps, **whole)


def _given_whole(task: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(task)
    async def call(*args: Any) -> Any:
        return await task(*(_as_one(arg) for arg in args))

    return call


def _as_one(value: Any) -> Any:
    return [opaque(each) for each in value] if isinstance(value, list | tuple) else opaque(value)
