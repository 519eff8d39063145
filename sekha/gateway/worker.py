"""One of several processes behind one port; `sekha.gateway.workers` starts it.

    python -P -m sekha.gateway.worker NUMBER COUNT SOCKET FOLDER

Its configuration comes in on standard input, and when that ends, so does it. On standard output it says
when it serves, and what keeps it from it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import BinaryIO

from sekha.errors import SekhaError
from sekha.gateway.logs import configure, standard_error
from sekha.gateway.metrics import Metrics
from sekha.gateway.server import fast_loop, foreseen, serve
from sekha.gateway.sources import WhenTold, Word
from sekha.minutes import SharedMinutes
from sekha.pipes import framed, own_pipe

log = logging.getLogger("sekha.gateway")


async def _work(number: int, count: int, listening: socket.socket, folder: Path, tell: BinaryIO) -> int:
    source = await WhenTold.open()
    loaded = await source.next()
    access = configure(loaded.config.log_level, standard_error())

    def ready() -> None:
        log.info("worker %d serves as process %d", number, os.getpid())
        say(None)

    def say(refused: SekhaError | None) -> None:
        tell.write(framed(Word(source.generation, refused)))

    try:
        await serve(
            loaded,
            source,
            listening,
            metrics=Metrics(folder, number),
            access=access,
            ready=ready,
            followed=say,
            workers=count,
            minutes=SharedMinutes(folder, number, count),
        )
    except Exception as error:  # whoever started this process cannot tell it from a crash otherwise
        say(foreseen(error))
        return 3
    return 0


def main(number: str, count: str, descriptor: str, folder: str) -> int:
    # Whoever started it reads the configuration for all.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listening = socket.socket(fileno=int(descriptor))
    with asyncio.Runner(loop_factory=fast_loop) as runner, own_pipe() as tell:
        return runner.run(_work(int(number), int(count), listening, Path(folder), tell))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
