"""What merging spaces does to the results while documents move from one embedding model to another.

    python benchmarks/retrieval --data FOLDER     FOLDER has `cran.all.1400`, `cran.qry` and `cranqrel`

The 1,398 abstracts of the Cranfield collection are ingested under one builtin model; then the file names another,
and a tenth, a quarter, half, three quarters and nine tenths of them are ingested again, drawn at random four times.
They are either moved (each is in one space) or copied (the old space keeps them all). The 225 questions are asked with
`search`, once by vectors and once with words too, from a worse model to a better one and the other way round.
Each figure is nDCG@10, the mean over questions and draws, and beside ours stands what the same candidates from each
space give when merged by their raw similarities, and by plain reciprocal rank fusion.

Exits with 1 where ours, from the worse model to the better one, falls more than 0.002 under the old space alone.
Without `--data` it looks into `~/.cache/sekha/cranfield`, and exits with 0 and a note when there is nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

# As many processes as there are cores ask one question at a time: threads that wait for a core cost four times as much.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import cranfield
from cranfield import Cranfield
from moving import BETTER, SHARES, WORSE, Row, drawn

DRAWS = 4
UNDER = 0.002
BOUNDED = (("old", "ours"), ("old, words", "ours, words"))
COLUMNS = ("old", "new", "ours", "raw", "RRF", "BM25", "old, words", "new, words", "ours, words")
WHERE = "https://ir.dcs.gla.ac.uk/resources/test_collections/cran/"


def means(rows: Sequence[Row]) -> list[Row]:
    """The rows of several draws as one."""
    return [
        Row(situation, share, {name: fmean(row.figures[name] for row in those) for name in those[0].figures})
        for situation in ("moved", "copied")
        for share in SHARES
        if (those := [row for row in rows if (row.situation, row.share) == (situation, share)])
    ]


def show(rows: Sequence[Row], old: int, new: int) -> bool:
    """Print the table of one direction; whether a bound is missed."""
    print(f"\nfrom hashed-{old} to hashed-{new}")
    columns = [name for name in COLUMNS if name in rows[0].figures]
    print(f"{'':8}{'share':>6}" + "".join(f"{name:>12}" for name in columns))
    missed = False
    for row in rows:
        cells = (f"{row.figures[name]:12.4f}" if name in row.figures else " " * 12 for name in columns)
        below = new == BETTER and any(
            row.figures[old_alone] - row.figures[ours] > UNDER for old_alone, ours in BOUNDED if ours in row.figures
        )
        print(f"{row.situation:8}{row.share:6.2f}{''.join(cells)}{'  MISSED' if below else ''}", flush=True)
        missed |= below
    return missed


def measure(data: Cranfield, draws: int) -> bool:
    missed = False
    # Not forked, since this process has threads already.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        directions = ((WORSE, BETTER), (BETTER, WORSE))
        under_way = [[pool.submit(drawn, data, *way, draw) for draw in range(draws)] for way in directions]
        for way, each in zip(directions, under_way, strict=True):
            missed |= show(means([row for future in each for row in future.result()]), *way)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the collection's files, or with `raw` that has them")
    parser.add_argument("--draws", type=int, default=DRAWS, help="how often the abstracts are drawn")
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = options.data or cache / "sekha" / "cranfield"
    try:
        data = cranfield.read(folder)
    except FileNotFoundError as error:
        advice = (
            f"no {error.filename}. Put {', '.join(cranfield.FILES)} there, or name their folder with --data; {WHERE}"
        )
        if options.data:
            parser.error(advice)
        print(f"not measured: {advice} has them.")
        return 0
    print(f"nDCG@10, {len(data.texts)} abstracts, {len(data.questions)} questions, mean of {options.draws} draws")
    return int(measure(data, options.draws))


if __name__ == "__main__":
    sys.exit(main())
