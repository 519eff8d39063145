"""How long the command line takes to say something: `sekha --help` and `sekha check`, warm, as whole processes.

    python benchmarks/startup.py

Bound: each in less than 0.5 s, with neither litellm nor prefect imported. `python -c pass` beside them
shows what the interpreter alone takes.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs + 1):
            for name, arguments in COMMANDS.items():
                taken[name].append(seconds(arguments, folder))
    # The first run of each writes the byte code.
    medians = {name: statistics.median(each[1:]) for name, each in taken.items()}

    if options.json:
        print(json.dumps(medians))
    else:
        for name, median in medians.items():
            print(f"{name:16} {median:6.3f} s")
    return int(any(median >= BOUND_SECONDS for median in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
