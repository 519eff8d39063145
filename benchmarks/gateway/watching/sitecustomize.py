"""Run first by any Python that has this folder on PYTHONPATH: notes which process imports a heavy package.

A line is a process id, and the module if it is one: each process reports once that it is watched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


class Watch:
    """Finds nothing, and sees all that is looked for."""

    # Looking for a package without importing it never comes to its modules.
    heavy = ("litellm.", "prefect.")

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def find_spec(self, name: str, *_: object) -> None:
        if name.startswith(self.heavy):
            self.note(name)

    def note(self, name: str = "") -> None:
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {name}\n")


if "IMPORTS_NOTED_IN" in os.environ:
    watch = Watch(Path(os.environ["IMPORTS_NOTED_IN"]))
    watch.note()
    sys.meta_path.insert(0, watch)
