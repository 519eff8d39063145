"""Rests in the background."""

from __future__ import annotations

import asyncio
from time import monotonic

from sekha.naps import nap


async def test_a_nap_ends_by_itself() -> None:
    wake = asyncio.Event()
    began = monotonic()

    await nap(wake, 0.05)

    assert monotonic() - began >= 0.04
    assert not wake.is_set()


async def test_a_nap_ends_when_it_is_woken_and_the_next_one_does_not() -> None:
    wake = asyncio.Event()
    began = monotonic()

    asyncio.get_running_loop().call_soon(wake.set)
    await nap(wake, 60)
    await nap(wake, 0.05)

    assert 0.04 <= monotonic() - began < 30


async def test_whoever_was_woken_before_does_not_rest() -> None:
    wake = asyncio.Event()
    wake.set()

    async with asyncio.timeout(30):
        await nap(wake, 60)

    assert not wake.is_set()


async def test_a_nap_that_is_cancelled_wakes_nobody_later() -> None:
    wake = asyncio.Event()
    resting = asyncio.create_task(nap(wake, 0.05))
    await asyncio.sleep(0)

    resting.cancel()
    await asyncio.wait({resting})
    await asyncio.sleep(0.1)

    assert not wake.is_set()
