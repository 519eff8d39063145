"""What the process that watches several workers keeps of the configurations that it hands on."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sekha.config import Config
from sekha.gateway.server import bind
from sekha.gateway.workers import run_workers
from sekha.loading import Loaded, load
from tests.fixtures.gateway import wait_until

pytestmark = pytest.mark.timeout(90)

WRITTEN = "providers:\n  - {id: ours, provider_type: builtin, models: [{model_id: echo, task: chat_small}]}\n"
NOWHERE = "ledger: {url: 'sqlite:////proc/nope/ledger.db'}\n"
"""Where no worker can open one."""


class Told:
    """Configurations as a test hands them in."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[Loaded] = asyncio.Queue()

    def look(self) -> None:
        pass

    async def next(self) -> Loaded:
        return await self.waiting.get()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A process that has served is about to end, and ignores what it is told; this one goes on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
async def test_configurations_that_were_refused_are_not_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sekha.yaml"

    def loaded(text: str) -> Loaded:
        file.write_text(text)
        return load(file)

    said, told, ready = "", Told(), asyncio.Event()
    handed: list[weakref.ref[Config]] = []

    def refusals() -> int:
        nonlocal said
        said += capfd.readouterr().err
        return said.count("is not taken over")

    def kept() -> int:
        gc.collect()
        return len([each for each in handed if each() is not None])

    running = asyncio.create_task(run_workers(loaded(WRITTEN), told, bind("127.0.0.1", 0), 2, ready=ready.set))
    try:
        await asyncio.wait_for(ready.wait(), 30)
        for number in range(1, 4):
            refused = loaded(WRITTEN + NOWHERE)
            handed.append(weakref.ref(refused.config))
            told.waiting.put_nowait(refused)
            del refused
            await wait_until(lambda wanted=number: refusals() >= 2 * wanted, seconds=30)

        assert kept() == 1
    finally:
        if not running.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 30)


@pytest.mark.usefixtures("own_signals")
async def test_a_worker_in_anothers_place_takes_nothing_over_that_it_may_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sekha.yaml"

    def loaded(text: str) -> Loaded:
        file.write_text(text)
        return load(file)

    said, told, ready = "", Told(), asyncio.Event()

    def serving() -> list[tuple[str, str]]:
        nonlocal said
        said += capfd.readouterr().err
        return re.findall(r"worker (\d) serves as process (\d+)", said)

    keyed = loaded(f"{WRITTEN}keys:\n  - {{name: a, hash: 'sha256:{'0' * 64}'}}\n")
    listening = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    running = asyncio.create_task(run_workers(keyed, told, listening, 2, ready=ready.set))
    try:
        await asyncio.wait_for(ready.wait(), 30)
        await wait_until(lambda: len(serving()) == 2, seconds=30)
        first, second = (int(process) for _, process in sorted(serving()))
        for process in (first, second):
            os.kill(process, signal.SIGSTOP)
        # The second may follow the first alone, which no worker can take over.
        told.waiting.put_nowait(loaded(WRITTEN + NOWHERE + "allow_unauthenticated: true\n"))
        told.waiting.put_nowait(loaded(WRITTEN))
        await wait_until(told.waiting.empty)
        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: len(serving()) == 3, seconds=30)
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=20) as stranger:
            status = (await stranger.get(f"http://127.0.0.1:{port}/v1/models")).status_code
        os.kill(second, signal.SIGCONT)
    finally:
        if not running.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 30)

    assert status == 401
