"""The runtime that the tasks of one flow run act with. Clients and ledgers never travel between tasks."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import cache
from typing import cast

from prefect.blocks.system import Secret

from blocks import load_config
from blocks.answering import prefect_answers
from sekha.loading import Loaded, load
from sekha.resources import Resources
from sekha.runtime import Runtime

__all__ = ["configuration", "opened", "runtime"]

BLOCK = "block:"

_current: ContextVar[Runtime] = ContextVar("sekha_runtime")


def runtime() -> Runtime:
    """The runtime of the flow run that is under way."""
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("tasks run inside a flow: `async with opened(config):` around its steps") from None


@asynccontextmanager
async def opened(config: str | None = None) -> AsyncIterator[Runtime]:
    """Open what `config` declares for the steps of one flow run.

    It is read anew for every run, so that an edited block or file holds from the next run on.
    """
    loaded = await asyncio.to_thread(configuration, config)
    _spare_the_collector()
    async with Runtime(Resources(loaded)) as running:
        token = _current.set(running)
        try:
            yield running
        finally:
            _current.reset(token)


@cache
def _spare_the_collector() -> None:
    """Once in a process: what was imported stays, and need not be searched for garbage.

    Prefect's modules are half a million objects, and each full collection in a large ingest takes 0.1 s for them.
    """
    gc.freeze()


def configuration(config: str | None = None) -> Loaded:
    """Load a file's path, or `block:NAME` as `sekha blocks push` stored it; left out, `SEKHA_CONFIG`. Blocking."""
    named = config or os.environ.get("SEKHA_CONFIG", "")
    if named.startswith(BLOCK):
        return load_config(named.removeprefix(BLOCK))
    return load(config, read_block=_secret)


def _secret(name: str) -> str:
    with prefect_answers():
        return str(cast("Secret[str]", Secret.load(name, _sync=True)).get())  # type: ignore[call-arg]
