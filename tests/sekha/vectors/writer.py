"""A process that writes batches into a store and says which of them are acknowledged.

    python writer.py PATH BATCHES ROWS OFFSET

Row `n` is the same in whichever process writes it. It waits for a line on its standard input first.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from uuid import UUID

import numpy as np

from sekha.vectors.base import Collection, Record
from sekha.vectors.embedded import EmbeddedStore

DIMENSION = 64


def row(number: int) -> Record:
    vector = np.random.default_rng(number).standard_normal(DIMENSION, dtype=np.float32)
    return Record(str(UUID(int=number + 1)), f"text {number}", vector, {"source": f"s{number % 7}", "n": number})


async def write(path: Path, batches: int, rows: int, offset: int) -> None:
    print("ready", flush=True)  # noqa: T201
    sys.stdin.readline()
    async with EmbeddedStore.open(path) as store:
        await store.ensure_collection(Collection("Docs", DIMENSION))
        for batch in range(batches):
            first = offset + batch * rows
            await store.upsert("Docs", [row(number) for number in range(first, first + rows)])
            print(batch, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:5])))
