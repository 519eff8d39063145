"""What share of an ingest flow's time goes into embedding and storing.

    python benchmarks/ingest_flow.py

Ten thousand chunks run through the builtin provider and the embedded store as a Prefect flow, against a
server that this starts, and once more without Prefect. Time in `embed_batch` and `upsert_batch`, and in
closing the store, which folds its log into its file, is counted once where they overlap; work on the event
loop beside them is counted there too, so that only the last line tells what Prefect adds. Exits with 1 when
embedding and storing take less than 80 % of the flow's wall time, in the middle one of three runs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from sekha.stack import LocalPrefect

LEAST_SHARE = 0.8
RUNS = 3
WORDS = [
    f"{a}{b}{c}"
    for a in ("pro", "con", "re", "de", "in")
    for b in ("vid", "struct", "solv", "form")
    for c in ("e", "er", "ing", "al")
]


class Busy:
    """When at least one of the watched steps was at work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.by_step: dict[str, float] = {}
        self._at_work = 0
        self._since = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        if self._at_work == 0:
            self._since = begun
        self._at_work += 1
        try:
            yield
        finally:
            ended = time.perf_counter()
            self._at_work -= 1
            self.by_step[name] = self.by_step.get(name, 0.0) + ended - begun
            if self._at_work == 0:
                self.seconds += ended - self._since

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.by_step.items())


def documents(chunks: int) -> Iterator[tuple[str, str]]:
    chance = random.Random(7)
    for number in range(chunks // 10):
        paragraphs = (" ".join(chance.choices(WORDS, k=100)) for _ in range(10))
        yield f"document-{number}.md", "\n\n".join(paragraphs)


async def measure(chunks: int, home: Path) -> bool:
    """Print the figures, and return whether the bound holds."""
    async with LocalPrefect(home / "prefect", progress=print) as prefect:
        os.environ.update(prefect.environment)
        os.environ["SEKHA_HOME"] = str(home)
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"

        from flows.ingest import ingest
        from sekha.documents import Document
        from sekha.ingest import IngestRequest
        from sekha.loading import BUILTIN, parse
        from sekha.resources import Resources
        from sekha.runtime import Runtime
        from sekha.steps.embeddings import EmbedCalls
        from sekha.steps.keeping import Keeping
        from sekha.steps.money import Money
        from sekha.vectors.embedded import EmbeddedStore
        from tasks.parting import tell_prefect_the_rest

        busy = Busy()
        before = Busy()
        watch = [
            (EmbedCalls, "embed_batch", busy),
            (Keeping, "upsert_batch", busy),
            (EmbeddedStore, "aclose", busy),
            (Keeping, "read_documents", before),
            (Keeping, "find_changes", before),
            (Money, "estimate_cost", before),
            (Money, "reserve_budget", before),
        ]
        for owner, name, spent in watch:
            plain = getattr(owner, name)

            async def watched(*args: object, _plain: object = plain, _name: str = name, _spent: Busy = spent) -> object:
                with _spent.step(_name):
                    return await _plain(*args)  # type: ignore[operator]

            setattr(owner, name, watched)

        folder = home / "documents"
        folder.mkdir()
        for source, text in documents(chunks):
            (folder / source).write_text(text)

        await ingest(IngestRequest(documents=(Document(source="warm-up.md", text="One document first."),)))
        shares = []
        for run in range(RUNS):
            for spent in (busy, before):
                spent.seconds, spent.by_step = 0.0, {}
            started = time.perf_counter()
            report = await ingest(IngestRequest(path=str(folder), collection=f"documents_{run}"))
            wall = time.perf_counter() - started
            print(f"{report.embedded} chunks in {wall:.2f} s: {report.embedded / wall:.0f}/s")
            print("\n".join(_shares(busy, before, wall)))
            shares.append(busy.seconds / wall)

        async with Runtime(Resources(parse(BUILTIN, source="built-in", folder=home / "plain", environ={}))) as plainly:
            started = time.perf_counter()
            await plainly.ingest(folder)
            plain_wall = time.perf_counter() - started
        await tell_prefect_the_rest()

    share = median(shares)
    missed = "" if share >= LEAST_SHARE else "  MISSED"
    print(f"the same without Prefect {plain_wall:.2f} s, so that it adds {wall / plain_wall - 1:.0%}")
    print(f"embedding and storing, the middle of {RUNS} runs: {share:.0%} >= {LEAST_SHARE:.0%}{missed}")
    return not missed


def _shares(busy: Busy, before: Busy, wall: float) -> list[str]:
    rest = wall - busy.seconds - before.seconds
    return [
        f"embedding and storing {busy.seconds:.2f} s, {busy.seconds / wall:.0%} ({busy})",
        f"reading, comparing, pricing {before.seconds:.2f} s, {before.seconds / wall:.0%} ({before})",
        f"orchestration between the steps {rest:.2f} s, {rest / wall:.0%}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000, help="how many chunks are ingested")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return int(not asyncio.run(measure(options.chunks, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
