"""Configurations for the flows, one file each, and a browser that looks at what Prefect shows of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from sekha.testing import StandIn
from tests.fixtures.missing import missing

BUILTIN = """
providers:
  - id: builtin
    provider_type: builtin
    models:
      - {model_id: echo, task: chat_small, context_window: 100000}
      - {model_id: hashed-768, task: embedding, dimension: 768}
collections:
  documents: {model: hashed-768}
"""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Without these the browser itself looks for the network, which tests may not reach.
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

Writes: TypeAlias = Callable[..., str]
Reads: TypeAlias = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Writes:
    """Write a configuration, and what it keeps, into a folder of its own; returns its path."""

    def write(text: str = BUILTIN, *, name: str = "here") -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sekha.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
        return str(folder / "sekha.yaml")

    return write


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with StandIn() as serving:
        yield serving


@pytest.fixture
def read_page(tmp_path: Path) -> Reads:
    """Open a page in a browser and return the text that it shows, once that holds what is awaited."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        missing(f"no browser: install one of {', '.join(BROWSERS)}")

    def read(url: str, *awaited: str) -> str:
        text = ""
        for attempt in range(5):
            page = subprocess.run(
                [
                    browser,
                    *QUIET,
                    f"--user-data-dir={tmp_path / f'browser-{attempt}'}",
                    "--window-size=1400,2000",
                    "--virtual-time-budget=20000",
                    "--dump-dom",
                    url,
                ],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout
            text = re.sub(r"<(script|style|svg).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
            if all(each in text for each in awaited):
                break
        return re.sub(r"\s+", " ", text)

    return read
