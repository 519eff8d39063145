"""Give Prefect large values without letting it search them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from prefect.tasks import Task
from prefect.utilities.annotations import opaque

__all__ = ["whole"]

P = ParamSpec("P")
R = TypeVar("R")


def whole(task: Task[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The task, given its arguments whole.

    Prefect looks through every argument for the results of other tasks, object by object and twice:
    seconds for the chunks of a large ingest. The arguments themselves still draw the DAG's edges.
    """

    @wraps(task.fn)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: tuple[Any, ...] = tuple(opaque(arg) for arg in args)
        return await cast("Callable[..., Coroutine[Any, Any, R]]", task)(*given, **kwargs)

    return call
