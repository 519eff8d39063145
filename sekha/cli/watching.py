"""A configuration that lives in Prefect, read by a process of its own, so that no process that serves imports Prefect.

    python -P -m sekha.cli.watching CONFIG SECONDS

It reads the configuration now, every so many seconds, and whenever a line comes in on standard input; what it
reads goes out on standard output. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import sys
from asyncio.subprocess import PIPE, Process
from typing import Self

from sekha.cli.invocation import BLOCK, Invocation
from sekha.cli.opening import configuration
from sekha.errors import PrefectUnavailable, SekhaError
from sekha.loading import Loaded
from sekha.pipes import framed, loaded_from, own_pipe, receive

__all__ = ["Watched", "lives_in_prefect"]

log = logging.getLogger("sekha.gateway")

RESTART_SECONDS = 5.0
LAST_SECONDS = 5.0


def lives_in_prefect(name: str | None) -> bool:
    """Whether a configuration is a block, or a file that names one."""
    if name is None or name.startswith(BLOCK):
        return name is not None
    try:
        with open(name, "rb") as file:  # noqa: PTH123 - shorter, and no more is asked of it
            return b"${block:" in file.read()
    except OSError:
        return False  # which whoever loads it says better


class Watched:
    """The configurations that such a process reads, each once, as the gateway's source."""

    def __init__(self, name: str, poll_seconds: float) -> None:
        self._name = name
        self._poll_seconds = poll_seconds
        self._child: Process | None = None
        self._asked = True
        self._said: Loaded | str | None = None

    def look(self) -> None:
        self._asked = True
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.write(b"\n")

    async def next(self) -> Loaded:
        while True:
            try:
                found = await self._receive()
            except EOFError:
                self._child = None
                if self._said is None:
                    raise PrefectUnavailable(f"The process that reads {self._name!r} ended by itself.") from None
                log.warning("the process that reads %r ended by itself and is started anew", self._name)
                await asyncio.sleep(RESTART_SECONDS)
                continue
            said = str(found) if isinstance(found, SekhaError) else loaded_from(found)
            asked, self._asked = self._asked, False
            # It is told again what it knows with every look, and what has failed for a while is no news either.
            if said != self._said or asked:
                self._said = said
                return loaded_from(found)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._child is None:
            return
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            await asyncio.wait_for(self._child.wait(), LAST_SECONDS)
        except TimeoutError:
            self._child.kill()
            await self._child.wait()

    async def _receive(self) -> object:
        if self._child is None:
            arguments = (self._name, str(self._poll_seconds))
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "sekha.cli.watching", *arguments),
                stdin=PIPE,
                stdout=PIPE,
                # Ctrl-C is for the gateway, which then ends it.
                start_new_session=True,
            )
        assert self._child.stdout is not None  # noqa: S101 - a pipe was asked for
        return await receive(self._child.stdout)


def main(name: str, poll_seconds: float) -> None:
    with own_pipe() as tell, contextlib.suppress(BrokenPipeError):
        while True:
            found: Loaded | SekhaError
            try:
                found = configuration(Invocation(config=name))
            except SekhaError as error:
                found = error
            tell.write(framed(found))
            told, _, _ = select.select([sys.stdin], [], [], poll_seconds)
            if told and not os.read(sys.stdin.fileno(), 1024):
                return


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
