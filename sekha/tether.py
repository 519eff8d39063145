"""Run a command that ends when its parent does, however that happens, `kill -9` included.

`python -I tether.py COMMAND…` watches its standard input, a pipe whose other end only the parent holds.
When that end closes, the command and all that it started are asked to stop, and killed if they do not.
SIGHUP is passed on to the command alone.
It is run as a file and imports nothing of ours, so that it costs a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

PATIENCE_SECONDS = 8.0


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)  # noqa: S603 - the parent's own
    signal.signal(signal.SIGHUP, lambda *_: child.send_signal(signal.SIGHUP))
    try:
        while child.poll() is None:
            closed, _, _ = select.select([sys.stdin], [], [], 0.1)
            if closed:
                _signal(child, signal.SIGTERM)
                child.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal(child, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
