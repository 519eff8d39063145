"""How long the command line takes to say something: `sekha --help` and `sekha check`, warm, as whole processes.

    python benchmarks/startup.py

`python -c pass` beside them shows what the interpreter alone takes. Exits with 1 when one of ours takes
half a second, or imports litellm or prefect.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOUND_SECONDS = 0.5
HEAVY = ("litellm", "prefect")
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "sekha --help": ["-m", "sekha", "--help"],
    "sekha check": ["-m", "sekha", "check"],
}


def seconds(arguments: list[str], folder: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def imported(arguments: list[str], folder: str) -> list[str]:
    """Which of the heavy packages a command imports."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    modules = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    return [name for name in HEAVY if name in modules]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="runs of each command, of which the median counts")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()

    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs + 1):
            for name, arguments in COMMANDS.items():
                taken[name].append(seconds(arguments, folder))
        heavy = {name: found for name, arguments in COMMANDS.items() if (found := imported(arguments, folder))}
    # The first run of each writes the byte code.
    medians = {name: statistics.median(each[1:]) for name, each in taken.items()}

    if options.json:
        print(json.dumps(medians))
    else:
        for name, median in medians.items():
            print(f"{name:16} {median:6.3f} s  < {BOUND_SECONDS}{'  MISSED' if median >= BOUND_SECONDS else ''}")
        for name, found in heavy.items():
            print(f"{name:16} imports {' and '.join(found)}  MISSED")
    return int(bool(heavy) or any(median >= BOUND_SECONDS for median in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
