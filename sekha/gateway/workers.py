"""Several processes behind one port: started, watched, told to reload, and ended together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

__all__ = ["WORKER", "run_workers"]

log = logging.getLogger("sekha.gateway")

WORKER = "SEKHA_GATEWAY_WORKER"
"""Set in a worker's environment: `its number, how many there are, the socket's descriptor`."""
_TOO_SOON_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 30.0


def run_workers(listening: socket.socket, count: int, arguments: Sequence[str]) -> int:
    """Run `sekha ARGUMENTS` as so many workers until told to stop; one that dies is replaced.

    SIGHUP is handed on to each. Returns 0, or 1 when a worker did not end by itself.
    """
    group = _Group(listening, count, arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, group.told)
    return group.run()


class _Group:
    def __init__(self, listening: socket.socket, count: int, arguments: Sequence[str]) -> None:
        self._listening = listening
        self._arguments = arguments
        self._workers: dict[int, subprocess.Popen[bytes] | None] = dict.fromkeys(range(count))
        self._started = dict.fromkeys(range(count), 0.0)
        self._due = dict.fromkeys(range(count), 0.0)
        self._waits = dict.fromkeys(range(count), 0.5)
        self._ending = False

    def told(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's
        if number != signal.SIGHUP:
            self._ending = True
        for worker in self._workers.values():
            if worker is not None and worker.poll() is None:
                worker.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    def run(self) -> int:
        while not self._ending:
            for at, worker in self._workers.items():
                if worker is None or worker.poll() is not None:
                    self._replace(at, worker)
            time.sleep(0.1)
        ended = [worker.wait() for worker in self._workers.values() if worker is not None]
        return int(any(ended))

    def _replace(self, at: int, worker: subprocess.Popen[bytes] | None) -> None:
        now = time.monotonic()
        if worker is not None and self._workers[at] is not None:
            if now - self._started[at] < _TOO_SOON_SECONDS:
                self._due[at] = now + self._waits[at]
                self._waits[at] = min(2 * self._waits[at], _LONGEST_WAIT_SECONDS)
            else:
                self._waits[at] = 0.5
            log.error("worker %d ended with %s and is replaced", at, worker.returncode)
            self._workers[at] = None
        if now >= self._due[at] and not self._ending:
            self._workers[at] = self._start(at)
            self._started[at] = now

    def _start(self, at: int) -> subprocess.Popen[bytes]:
        descriptor = self._listening.fileno()
        environment: Mapping[str, str] = {**os.environ, WORKER: f"{at},{len(self._workers)},{descriptor}"}
        return subprocess.Popen(  # noqa: S603 - the command line is ours
            [sys.executable, "-P", "-m", "sekha", *self._arguments], env=environment, pass_fds=[descriptor]
        )
