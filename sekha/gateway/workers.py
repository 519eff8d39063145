"""Several processes behind one port: started, watched, told of another configuration, and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from sekha.errors import SekhaError
from sekha.gateway.reach import check_reload
from sekha.gateway.server import AGAIN_SECONDS, not_taken_over, on_signals
from sekha.gateway.sources import Handed, Source, Word
from sekha.loading import Loaded
from sekha.pipes import framed, receive

__all__ = ["run_workers"]

log = logging.getLogger("sekha.gateway")

TOO_SOON_SECONDS = 2.0
SHORTEST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
_PREFIX = "sekha-workers-"
_IN_MEMORY = "/dev/shm"  # noqa: S108 - a folder of its own is made in it


async def run_workers(
    loaded: Loaded, source: Source, listening: socket.socket, count: int, *, ready: Callable[[], None]
) -> None:
    """Run so many workers until SIGTERM or Ctrl-C; one that dies is replaced. Closes the socket.

    They are given the configuration, and each that `source` has after it. Raises the `SekhaError` that keeps
    them from beginning.
    """
    with _shared_folder() as folder:
        workers = _Workers(loaded, listening, count, folder, ready)
        with on_signals(workers.stop, source.look):
            await workers.run(source)


@contextlib.contextmanager
def _shared_folder() -> Iterator[str]:
    """Where workers have what they count together: in memory alone where that can be, since no disk has to keep it."""
    parent = Path(_IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else tempfile.gettempdir())
    _remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as folder:
        # Locked before it has its name: what is not locked is taken for a dead one's.
        unseen = Path(folder, "lock.new")
        with unseen.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unseen.rename(unseen.with_suffix(""))
            yield folder


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of those that were killed, as far as they are this user's."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            with (folder / "lock").open("rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


class _Workers:
    def __init__(
        self, loaded: Loaded, listening: socket.socket, count: int, folder: str, ready: Callable[[], None]
    ) -> None:
        self._handed = {0: loaded}
        """The configurations that workers may serve with, by their generation."""
        self._taken_over: int | None = None
        """The last one that any worker serves with."""
        self._refused: set[int] = set()
        """Those that were handed on and that some worker does not serve with."""
        self._last = 0
        """The generation that was handed on last: none is given twice, whatever was dropped."""
        self._listening = listening
        self._host: str = listening.getsockname()[0]
        self._count = count
        self._folder = folder
        self._ready = ready
        self._running: dict[int, Process] = {}
        self._failure: SekhaError | None = None
        self._ending = asyncio.Event()

    def stop(self) -> None:
        """End them all. The second time they cut what is under way, since each is told twice as well."""
        self._ending.set()
        # While anybody has it open, callers are taken whom nobody would answer.
        self._listening.close()
        for worker in self._running.values():
            _tell(worker, signal.SIGTERM)

    async def run(self, source: Source) -> None:
        following = asyncio.create_task(self._follow(source))
        try:
            await asyncio.gather(*(self._keep(number) for number in range(self._count)))
        finally:
            following.cancel()
            await asyncio.wait([following])
        if self._failure is not None:
            raise self._failure

    async def _follow(self, source: Source) -> None:
        while True:
            try:
                loaded = await source.next()
                # Here too, so that no worker begins with it that comes in another's place. The last one may still be
                # refused, and then this one follows the one before.
                for each in self._may_begin_with():
                    check_reload(loaded, self._handed[each], self._host)
            except Exception as error:  # whatever it is, the next configuration must be handed on
                if not_taken_over(error) is not error:
                    await asyncio.sleep(AGAIN_SECONDS)
                continue
            self._drop_refused()
            self._last += 1
            self._handed[self._last] = loaded
            for worker in self._running.values():
                _hand(worker, Handed(self._last, loaded))

    def _drop_refused(self) -> None:
        """Keep no configuration that nobody begins with: a newer one takes the place of what was refused."""
        self._handed = {each: self._handed[each] for each in self._may_begin_with()}
        self._refused &= self._handed.keys()

    async def _keep(self, number: int) -> None:
        """Have a worker of this number until the end."""
        wait = 0.0
        while not self._ending.is_set():
            started = time.monotonic()
            worker = self._running[number] = await self._start(number)
            if self._ending.is_set():
                _tell(worker, signal.SIGTERM)
            served = await self._listen(number, worker)
            code = await worker.wait()
            del self._running[number]
            if self._ending.is_set():
                return
            too_soon = not served or time.monotonic() - started < TOO_SOON_SECONDS
            wait = min(max(2 * wait, SHORTEST_WAIT_SECONDS), LONGEST_WAIT_SECONDS) if too_soon else 0.0
            log.error("worker %d ended with %d and is replaced", number, code)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), wait)

    async def _start(self, number: int) -> Process:
        descriptor = self._listening.fileno()
        arguments = (str(number), str(self._count), str(descriptor), self._folder)
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "sekha.gateway.worker", *arguments),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=[descriptor],
            # Ctrl-C is for this process, which then lets them finish.
            start_new_session=True,
        )
        _hand(worker, self._to_begin_with())
        return worker

    def _to_begin_with(self) -> Handed:
        """The latest configuration that a worker serves with, or that none has refused yet."""
        generation = max(self._may_begin_with(), default=0)
        return Handed(generation, self._handed[generation])

    def _may_begin_with(self) -> list[int]:
        """What a worker serves with, and what came since and none has refused yet."""
        return [each for each in self._handed if each == self._taken_over or each not in self._refused]

    async def _listen(self, number: int, worker: Process) -> bool:
        """Hear what a worker says, until it ends. Returns whether it ever served."""
        assert worker.stdout is not None  # noqa: S101 - a pipe was asked for
        served = False
        with contextlib.suppress(EOFError):
            while True:
                said = cast("Word", await receive(worker.stdout))
                if said.refused is None:
                    served = True
                elif self._taken_over is not None and not served:
                    log.error("worker %d does not start: %s", number, said.refused)
                self._note(said)
        return served

    def _note(self, said: Word) -> None:
        before = self._taken_over
        if said.refused is not None:
            # Whatever comes in a worker's place goes on with the one before, unless another could take it over.
            self._refused.add(said.generation)
            if before is None:
                self._failure = said.refused
                self.stop()
        # One that was refused, and dropped before this worker came to it, is followed by another.
        elif said.generation in self._handed and (before is None or said.generation > before):
            self._taken_over = said.generation
            self._handed = {each: loaded for each, loaded in self._handed.items() if each >= said.generation}
            self._refused = {each for each in self._refused if each > said.generation}
            if before is None:
                self._ready()


def _tell(worker: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.send_signal(number)


def _hand(worker: Process, handed: Handed) -> None:
    if worker.stdin is not None and not worker.stdin.is_closing():
        worker.stdin.write(framed(handed))
