"""The docs say what the code says: those that are drawn from it, the map, and what each benchmark measures."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["GENERATED"]


@pytest.mark.parametrize("path", GENERATED)
def test_a_generated_page_is_what_the_code_says_now(path: str) -> None:
    text = GENERATED[path]()

    assert (ROOT / path).read_text(encoding="utf-8") == text, "write it again: make docs"


def test_the_map_shows_every_module_and_nothing_else() -> None:
    (drawing, *_) = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.DOTALL)
    named = set(re.findall(r"[a-z_/]+(?:\.py|/)", drawing))
    packages = {f"{path.parent.name}/" for path in (ROOT / "sekha").glob("*/__init__.py")}
    layers = {"flows/", "tasks/", "blocks/", "sekha/"}
    inside = {name for name in named if (ROOT / "sekha" / name).exists()}

    assert named - inside <= layers
    assert {path.name for path in (ROOT / "sekha").glob("*.py")} - {"__init__.py"} <= inside
    assert packages <= inside


@pytest.mark.parametrize("benchmark", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_a_benchmark_says_what_it_measures(benchmark: Path) -> None:
    told = subprocess.run(
        [sys.executable, str(benchmark), "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout

    assert str(ast.get_docstring(ast.parse(benchmark.read_text("utf-8")))) in told
    assert f"## `{benchmark.name}`" in (ROOT / "benchmarks" / "README.md").read_text("utf-8")
