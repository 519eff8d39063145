"""What a request pays for its money: reserve and settle, alone and many at once.

    python benchmarks/ledger.py                              a SQLite file in a temporary folder
    python benchmarks/ledger.py --url postgresql://…         an empty database that may be written to
    python benchmarks/ledger.py --spends 200000              after this many calls, in one month

Then the same pair from slices that are leased and a journal, as a gateway does it, a hundred together in
one event loop: the CPU of one thread that a request pays, and what the process pays in all, with every
transaction behind it.

The bare figure is the same disk's price for two SQLite commits of one row each, the second made durable.
Nothing is bounded: a call to a provider takes hundreds of times as long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from time import perf_counter, process_time, thread_time

from sekha.ledger import Budget, Ledger, Scope, Spend
from sekha.ledgers import open_leased, open_ledger
from sekha.pricing import Usage

NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
SCOPE = Scope(provider="openai", model="openai/m", task="chat_small", key="research", tags=frozenset({"eval"}))
BUDGETS = [
    Budget(name="all", limit=Decimal(100_000)),
    Budget(name="research", limit=Decimal(100_000), period="day", match={"key": "research"}),
]
BATCH = 100
AMOUNTS = {budget.name: Decimal("0.01") for budget in BUDGETS}


def spend(at: datetime = NOW) -> Spend:
    usage = Usage(input_tokens=100, output_tokens=50)
    return Spend(scope=SCOPE, cost=Decimal("0.001"), estimated=Decimal("0.01"), usage=usage, at=at)


async def pair(ledger: Ledger) -> float:
    started = perf_counter()
    hold = await ledger.reserve(BUDGETS, AMOUNTS, at=NOW, ttl_seconds=60)
    await ledger.settle(hold, spend())
    return perf_counter() - started


async def measure(url: str, *, pairs: int, at_once: int, spends: int) -> dict[str, float]:
    ledger = open_ledger(url)
    nothing = await ledger.reserve([], {}, at=NOW, ttl_seconds=60)
    for start in range(0, spends, 1_000):
        batch = range(start, min(start + 1_000, spends))
        await asyncio.gather(*(ledger.charge(nothing, spend(NOW - timedelta(seconds=n))) for n in batch))

    first = await pair(ledger)
    alone = [await pair(ledger) for _ in range(pairs)]

    async def several() -> None:
        for _ in range(pairs // at_once):
            await pair(ledger)

    started = perf_counter()
    await asyncio.gather(*(several() for _ in range(at_once)))
    together = perf_counter() - started
    started = perf_counter()
    await ledger.report("model")
    reported = perf_counter() - started
    await ledger.aclose()
    return {
        "first pair, ms": first * 1e3,
        "pair alone p50, ms": statistics.median(alone) * 1e3,
        "pair alone p99, ms": statistics.quantiles(alone, n=100)[98] * 1e3,
        f"pairs/s, {at_once} at once": pairs // at_once * at_once / together,
        "report, ms": reported * 1e3,
    }


async def measure_leased(url: str, folder: Path, *, pairs: int, per_second: int) -> dict[str, float]:
    ledger = open_leased(url, folder)
    for _ in range(BATCH):
        await pair(ledger)
    await asyncio.sleep(1)
    taken: list[float] = []
    spends = [spend() for _ in range(pairs)]
    started, cpu = perf_counter(), process_time()
    for start in range(0, pairs, BATCH):
        begun = thread_time()
        for one in spends[start : start + BATCH]:
            hold = await ledger.reserve(BUDGETS, AMOUNTS, at=NOW, ttl_seconds=60, scope=SCOPE)
            await ledger.settle(hold, one)
        taken.append((thread_time() - begun) / BATCH)
        # Providers are waited for meanwhile, and the worker has its turn.
        await asyncio.sleep(max((start + BATCH) / per_second - (perf_counter() - started), 0))
    cpu = process_time() - cpu
    begun = perf_counter()
    for _ in range(pairs):
        await ledger.spent(BUDGETS[0], at=NOW)
    asked = perf_counter() - begun
    await ledger.aclose()
    return {
        "leased pair p50, us": statistics.median(taken) * 1e6,
        "leased pair p99, us": statistics.quantiles(taken, n=100)[98] * 1e6,
        f"leased, CPU in all at {per_second}/s, us": cpu / pairs * 1e6,
        "leased, what is spent, us": asked / pairs * 1e6,
    }


def bare(path: Path, pairs: int) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t (a)")
    taken = []
    for number in range(pairs):
        started = perf_counter()
        for mode in ("NORMAL", "FULL"):
            connection.execute(f"PRAGMA synchronous={mode}")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t VALUES (?)", (number,))
            connection.execute("COMMIT")
        taken.append(perf_counter() - started)
    connection.close()
    return statistics.median(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the ledger's database; left out, a SQLite file")
    parser.add_argument(
        "--pairs", type=int, default=2_000, help="reservations settled one after another, and as many at once"
    )
    parser.add_argument("--at-once", type=int, default=64, help="how many reserve and settle at the same time")
    parser.add_argument(
        "--per-second", type=int, default=5_000, help="how many reserve and settle from slices a second"
    )
    parser.add_argument("--spends", type=int, default=0, help="calls already on record")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{folder}/ledger.db"
        figures = {"two bare commits p50, ms": bare(Path(folder) / "bare.db", options.pairs)}
        figures |= asyncio.run(measure(url, pairs=options.pairs, at_once=options.at_once, spends=options.spends))
        journals = Path(folder) / "journals"
        figures |= asyncio.run(measure_leased(url, journals, pairs=10 * options.pairs, per_second=options.per_second))
    figures["pair alone / two bare commits"] = figures["pair alone p50, ms"] / figures["two bare commits p50, ms"]
    if options.json:
        json.dump(figures, sys.stdout)
    else:
        for name, figure in figures.items():
            print(f"{name:34} {figure:10.3f}")


if __name__ == "__main__":
    main()
