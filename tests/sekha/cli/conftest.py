"""The real command, as a user runs it: its own process, an empty folder, none of our environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
CANARY = "sk-canary-2f7d1c"
"""Stands in the environment as every key; no output may ever hold it."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


@dataclass
class Command:
    """`await sekha("check", "--json")` in `folder`."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    async def __call__(
        self,
        *arguments: str,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        interrupt_when: Callable[[], bool] | None = None,
        timeout_seconds: float = 60,
    ) -> Ended:
        process = await self.start(*arguments, environment=environment)
        if interrupt_when is not None:
            async with asyncio.timeout(timeout_seconds):
                while not interrupt_when():  # noqa: ASYNC110 - a stand-in has no event for what came in
                    await asyncio.sleep(0.02)
            process.send_signal(signal.SIGINT)
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin), timeout_seconds)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        ended = Ended(process.returncode or 0, out.decode(), err.decode())
        assert "Traceback" not in ended.err
        assert CANARY not in ended.out + ended.err
        return ended

    async def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.line(arguments),
            cwd=self.folder,
            env=self.environment | dict(environment or {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    def line(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "sekha", *arguments]

    def write(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        return file


@pytest.fixture
def sekha(tmp_path: Path) -> Command:
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "OPENAI_API_KEY": CANARY,
        "ANTHROPIC_API_KEY": CANARY,
        "RESEARCH_KEY_HASH": CANARY,
    }
    return Command(tmp_path, environment)
