"""What a process and those that it started cost, as Linux counts it."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
DIE_WITH_PARENT = 1
LISTENING = "0A"

libc = ctypes.CDLL(None)


def pinned(core: int) -> Callable[[], None]:
    """For `preexec_fn`: stay on one core, and end when we do, also when we are killed."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)

    return prepare


def _stat(pid: int) -> list[str]:
    """The fields behind the name, which may hold anything: [1] is the parent, [11] and [12] the ticks."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def parents() -> dict[int, int]:
    found = {}
    for each in PROC.glob("[0-9]*"):
        with suppress(OSError):
            found[int(each.name)] = int(_stat(int(each.name))[1])
    return found


def tree(root: int) -> set[int]:
    """A process and all below it."""
    known = parents()
    found = {root}
    while more := {pid for pid, parent in known.items() if parent in found} - found:
        found |= more
    return found


def serving(root: int, port: int) -> set[int]:
    """Those of a tree that hold the socket on which a port is served."""
    sockets = set()
    for table in ("net/tcp", "net/tcp6"):
        for line in (PROC / table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    return {pid for pid in tree(root) if sockets & _open_files(pid)}


def _open_files(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for each in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                found.add(str(each.readlink()))
    return found


def with_parents(pids: Iterable[int], root: int) -> set[int]:
    """So many processes and those that they came from, up to the root: a fork has what its parent imported."""
    known = parents()
    found = set()
    for pid in pids:
        while pid not in found and pid in known:
            found.add(pid)
            pid = root if pid == root else known[pid]  # noqa: PLW2901 - upwards
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time so far."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def memory(pids: Iterable[int]) -> dict[str, float]:
    """Megabytes in memory: `pss` shares out what several processes map, `rss` counts it for each."""
    found = {"pss": 0.0, "rss": 0.0}
    for pid in pids:
        with suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
                name, _, size = line.partition(":")
                if name.lower() in found:
                    found[name.lower()] += int(size.split()[0]) / 1024
    return found
