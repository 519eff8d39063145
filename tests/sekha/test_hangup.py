"""Whose SIGHUP it is: a terminal's that has ended, or somebody's who wants the configuration read anew."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAITS = """
import os, signal
from sekha import hangup

terminal = hangup.Terminal()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
print("waits", flush=True)
signal.sigwait([signal.SIGHUP])
{then}
print(terminal.is_gone)
"""
OBEYS = """
import asyncio, os, signal, sys
from sekha.cli.deploying import obey_hangups

if os.fork():
    os.wait()  # the shell, which the system tells of the end of its terminal, and nobody else
    sys.exit()
os.setpgid(0, 0)

async def main():
    said = []
    gone = obey_hangups(end=lambda: said.append("ends"), reload=lambda: said.append("reloads"))

    async def told():
        before = len(said)
        os.kill(os.getpid(), signal.SIGHUP)
        while len(said) == before:
            await asyncio.sleep(0.01)

    if {told_before}:
        await told()
    print("waits", flush=True)
    await gone
    await told()
    print(*said)

asyncio.run(main())
"""


@contextmanager
def in_terminal(program: str, *, controlled: bool = True) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that reads and writes no terminal, in a session that may have one. With that one's other end."""
    master, slave = os.openpty()

    def take() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
        preexec_fn=take if controlled else None,  # noqa: PLW1509 - one call to the system
    )
    os.close(slave)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "waits\n"
        yield process, master
    finally:
        process.kill()
        process.communicate()


def waits(*, ignored: bool = False, then: str = "") -> str:
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if ignored else ""
    return before + WAITS.format(then=then)


@pytest.mark.parametrize(
    ("program", "controlled", "gone"),
    [
        pytest.param(waits(), True, True, id="closed"),
        pytest.param(waits(), False, False, id="none"),
        pytest.param(waits(ignored=True), True, False, id="nohup"),
        pytest.param(waits(then="terminal.outlive()"), True, False, id="outlived"),
    ],
)
def test_a_terminal_is_gone_once_it_was_closed_whatever_its_program_reads(
    program: str, controlled: bool, gone: bool
) -> None:
    with in_terminal(program, controlled=controlled) as (process, master):
        os.close(master)
        if not controlled:
            process.send_signal(signal.SIGHUP)

        assert process.communicate(timeout=20)[0] == f"{gone}\n"


def test_a_signal_that_comes_while_the_terminal_is_there_is_not_of_its_end() -> None:
    with in_terminal(waits()) as (process, master):
        process.send_signal(signal.SIGHUP)

        assert process.communicate(timeout=20)[0] == "False\n"

    os.close(master)


def test_a_terminal_that_cannot_be_looked_at_is_not_gone() -> None:
    no_more_files = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))"
    with in_terminal(waits(then=no_more_files)) as (process, master):
        process.send_signal(signal.SIGHUP)

        assert process.communicate(timeout=20)[0] == "False\n"

    os.close(master)


@pytest.mark.parametrize(
    ("told_before", "said"),
    [
        pytest.param(True, "reloads ends ends", id="a shell that ends"),
        pytest.param(False, "reloads", id="a shell that leaves its jobs behind"),
    ],
)
def test_a_terminal_may_go_just_behind_the_signal_of_its_end(told_before: bool, said: str) -> None:
    with in_terminal(OBEYS.format(told_before=told_before)) as (process, master):
        os.close(master)

        assert process.communicate(timeout=20)[0] == f"{said}\n"
