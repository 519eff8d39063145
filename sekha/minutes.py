"""What passed of each limit in the last minute, in memory that the worker processes of one server share."""

from __future__ import annotations

import fcntl
import os
from hashlib import sha256
from mmap import mmap
from pathlib import Path

from sekha.errors import SekhaError
from sekha.rates import ROW, Minute, Minutes

__all__ = ["SharedMinutes"]

_ROW_BYTES = 1024
"""Of each worker and limit: its numbers, and a rest, so that no two workers write to the same line of a cache."""
_LIMITS_IN_A_FILE = 64
_NAME_BYTES = 33


class SharedMinutes(Minutes):
    """The minutes of one worker among several, which see at once what each of them lets pass.

    A worker that comes in another's place goes on with its counts. The folder is to be one server's alone, and
    empty when it starts. What is asked for by name is opened, and may wait for a disk; no count ever does.
    """

    shared = True

    def __init__(self, folder: Path, worker: int, workers: int) -> None:
        super().__init__()
        self._folder = folder
        self._worker = worker
        self._workers = workers
        self._numbers: dict[bytes, int] = {}
        """Of the limits that anybody has asked for, in the order in which they did."""
        self._files: dict[int, memoryview] = {}

    def _make(self, name: str) -> Minute:
        try:
            return self._mapped(name)
        except OSError as error:
            raise SekhaError(
                f"{self._folder} takes no more ({error.strerror}), and what passes of each limit is counted there. "
                "Make room, or serve with one worker."
            ) from error

    def _mapped(self, name: str) -> Minute:
        at, of_file = divmod(
            self._number(sha256(name.encode()).hexdigest()[: _NAME_BYTES - 1].encode()), _LIMITS_IN_A_FILE
        )
        memory = self._files.get(at)
        if memory is None:
            memory = self._files[at] = self._open(self._folder / f"limits-{at}")
        each = _ROW_BYTES // memory.itemsize
        first = of_file * self._workers * each
        rows = [memory[start : start + ROW] for start in range(first, first + self._workers * each, each)]
        own = rows.pop(self._worker)
        return Minute(own, rows)

    def _number(self, name: bytes) -> int:
        if name not in self._numbers:
            with (self._folder / "limits").open("a+b") as file:
                # Each worker may be the first to ask. Who dies lets go.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(len(self._numbers) * _NAME_BYTES)
                for line in file:
                    self._numbers[line.strip()] = len(self._numbers)
                if name not in self._numbers:
                    file.write(name + b"\n")
                    self._numbers[name] = len(self._numbers)
        return self._numbers[name]

    def _open(self, path: Path) -> memoryview:
        size = _LIMITS_IN_A_FILE * self._workers * _ROW_BYTES
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                # Who writes where there is no room would be killed.
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
            return memoryview(mmap(descriptor, size)).cast("q")
        finally:
            os.close(descriptor)
