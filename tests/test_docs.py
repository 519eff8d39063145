"""The docs that are drawn from the code say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["GENERATED"]


@pytest.mark.parametrize("path", GENERATED)
def test_a_generated_page_is_what_the_code_says_now(path: str) -> None:
    text = GENERATED[path]()

    assert (ROOT / path).read_text(encoding="utf-8") == text, "write it again: make docs"
