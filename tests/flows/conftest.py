"""Configurations for the flows: one file each, so that what runs in-process and in Prefect reads the same."""

from __future__ import annotations

import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from sekha.testing import StandIn

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

Writes: TypeAlias = Callable[..., str]


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
