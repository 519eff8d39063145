"""Values between our own processes: over a pipe, never over a command line, an environment or a file."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

from sekha.errors import SekhaError

if TYPE_CHECKING:
    from sekha.loading import Loaded

__all__ = ["framed", "loaded_from", "own_pipe", "receive"]

_LENGTH_BYTES = 4


def framed(value: object) -> bytes:
    """What `receive` takes for this value at the other end."""
    body = pickle.dumps(value)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def receive(reader: asyncio.StreamReader) -> object:
    """The next value. Raises `EOFError` when whoever sends is gone."""
    # `IncompleteReadError`, which `readexactly` raises at the end, is one.
    size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    return pickle.loads(await reader.readexactly(size))  # noqa: S301 - from a process that we started, or that started us


def own_pipe() -> BinaryIO:
    """This process's standard output, for values alone: what anybody prints goes to standard error from now on."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return pipe


def loaded_from(received: object) -> Loaded:
    """What was received for a configuration; raised, if it is the error that there was in its place."""
    if isinstance(received, SekhaError):
        raise received
    return cast("Loaded", received)
