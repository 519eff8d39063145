"""The embedded store among several processes, and among those that are killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sekha.vectors.embedded import EmbeddedStore
from tests.sekha.vectors.writer import DIMENSION, row

ROOT = Path(__file__).parents[3]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a writer, which waits for `go`; all of them are gone after the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(path: Path, *, batches: int, rows: int, offset: int = 0) -> subprocess.Popen[str]:
        writer = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("writer.py")), str(path), *map(str, (batches, rows, offset))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        running.append(writer)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        return writer

    yield begin
    for writer in running:
        writer.kill()
        writer.communicate()


def go(writer: subprocess.Popen[str]) -> None:
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()


async def numbers(store: EmbeddedStore) -> list[int]:
    return [int(found.properties["n"] or 0) async for page in store.scan("Docs", page=5000) for found in page]


async def killed_in_the_middle(start: Start, path: Path, *, batches: int, rows: int, offset: int) -> int:
    """Kill a writer after some acknowledgement, and say how many batches it had acknowledged."""
    writer = start(path, batches=10_000, rows=rows, offset=offset)
    go(writer)
    assert writer.stdout is not None
    for _ in range(batches):
        writer.stdout.readline()
    writer.kill()
    late, _ = writer.communicate()
    return batches + late.count("\n")


async def check_whole(path: Path, acknowledged: dict[int, int], rows: int) -> None:
    async with EmbeddedStore.open(path) as store:
        found = await numbers(store)
        assert len(found) == len(set(found)) == await store.count("Docs")
        for offset, batches in acknowledged.items():
            written = [number for number in found if offset <= number < offset + 10_000_000]
            assert len(written) % rows == 0
            assert len(written) >= batches * rows
            assert sorted(written) == list(range(offset, offset + len(written)))
        probe = row(found[-1])
        assert probe.vector is not None
        (hit,) = await store.search("Docs", probe.vector, 1)
        assert hit.uuid == probe.uuid
        assert await store.upsert("Docs", [probe]) == {}


async def test_kill_9_loses_no_acknowledged_batch_and_halves_none(start: Start, tmp_path: Path) -> None:
    acknowledged = {}
    for storm, batches in enumerate((1, 7, 20)):
        offset = storm * 10_000_000
        acknowledged[offset] = await killed_in_the_middle(
            start, tmp_path / "store.db", batches=batches, rows=100, offset=offset
        )
        await check_whole(tmp_path / "store.db", acknowledged, rows=100)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_storm_of_kills_loses_nothing(start: Start, tmp_path: Path) -> None:
    chance, acknowledged = random.Random(0), {}
    for storm in range(40):
        offset = storm * 10_000_000
        acknowledged[offset] = await killed_in_the_middle(
            start, tmp_path / "store.db", batches=chance.randrange(1, 120), rows=50, offset=offset
        )
        await check_whole(tmp_path / "store.db", acknowledged, rows=50)


async def test_processes_that_write_the_same_rows_leave_exactly_their_union(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    writers = [start(path, batches=20, rows=50, offset=offset) for offset in (0, 0, 500)]

    for writer in writers:  # all open the file that none has created yet
        go(writer)
    for writer in writers:
        writer.communicate()

    assert [writer.returncode for writer in writers] == [0, 0, 0]
    async with EmbeddedStore.open(path) as store:
        assert await numbers(store) == list(range(1500))
        hits = await store.search("Docs", np.ones(DIMENSION, dtype=np.float32), 2000)
        assert len(hits) == len({hit.uuid for hit in hits}) == 1500


async def test_what_another_process_acknowledged_is_found_at_once(start: Start, tmp_path: Path) -> None:
    async with EmbeddedStore.open(tmp_path / "store.db") as reader:
        writer = start(tmp_path / "store.db", batches=30, rows=10)
        go(writer)
        assert writer.stdout is not None

        for line in writer.stdout:
            probe = row(int(line) * 10 + 9)
            assert probe.vector is not None
            (hit,) = await reader.search("Docs", probe.vector, 1)
            assert hit.uuid == probe.uuid

    assert writer.wait() == 0
