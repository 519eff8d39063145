"""Finished requests to record, and databases with Prefect's tables to record them in."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sekha.calling import Attempt
from sekha.recording.recorder import Recorder, Stats
from sekha.recording.run import Run, new_run_id
from sekha.trace import Step
from tests.fixtures.prefect import Server

AT = 1_795_000_000.25
STEPS = (
    Step("estimate_cost", (), 100.0, 100.002),
    Step("select_provider", (0,), 100.002, 100.0045),
    Step("reserve_budget", (1,), 100.0045, 100.01),
    Step("call_provider", (1, 2), 100.01, 100.264123),
    Step("settle_cost", (2, 3), 100.264123, 100.27),
)
QUICK_STEPS = (
    Step("estimate_cost", (), 100.0, 100.0001),
    Step("select_provider", (0,), 100.0001, 100.00015),
    Step("reserve_budget", (1,), 100.0002, 100.0006),
    Step("call_provider", (1, 2), 100.0006, 100.264123),
    Step("settle_cost", (2, 3), 100.264123, 100.2643),
)
"""As a gateway's ledger has them, which asks no database."""


def a_run(**changes: Any) -> Run:
    """A chat that was answered."""
    answered = Attempt(provider_id="openai", model_id="gpt-5-mini", seconds=0.254123)
    return Run(
        **{
            "id": new_run_id(),
            "flow": "chat",
            "name": "chat → openai/gpt-5-mini",
            "started_at": AT,
            "ended_at": AT + 0.270001,
            "outcome": "answered",
            "steps": STEPS,
            "clock_offset": AT - 100.0,
            "parameters": {"model": "gpt-5-mini", "task": "chat_small", "messages": 3},
            "tags": ("provider:openai", "model:gpt-5-mini", "task:chat_small"),
            "provider_id": "openai",
            "model_id": "gpt-5-mini",
            "estimated_cost": Decimal("0.0004"),
            "cost": Decimal("0.00031"),
            "attempts": (answered,),
            **changes,
        }
    )


@pytest.fixture
def make_run() -> Callable[..., Run]:
    return a_run


@dataclass(frozen=True)
class Tables:
    """A database with Prefect's tables and no server, and the settings that lead to it alone."""

    file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"PREFECT_API_URL": "", "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.file}"}

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.file, timeout=10)) as connection:
            return connection.execute(sql).fetchall()

    def execute(self, sql: str) -> None:
        with closing(sqlite3.connect(self.file, timeout=10)) as connection, connection:
            connection.execute(sql)

    def run_ids(self) -> list[str]:
        return [row[0] for row in self.rows("SELECT id FROM flow_run")]


@pytest.fixture
def tables(prefect: Server, tmp_path: Path) -> Tables:
    copy_of_tables(prefect, tmp_path / "prefect.db")
    return Tables(tmp_path / "prefect.db")


def copy_of_tables(prefect: Server, file: Path) -> None:
    with closing(sqlite3.connect(prefect.home / "prefect.db")) as there, closing(sqlite3.connect(file)) as here:
        there.backup(here)
        here.execute("DELETE FROM flow_run_state")
        here.execute("DELETE FROM task_run_state")
        here.execute("DELETE FROM task_run")
        here.execute("DELETE FROM flow_run")
        here.commit()


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait until a recorder's stats are as told, looked at as often as it looks itself."""

    async def wait(recorder: Recorder, done: Callable[[Stats], bool]) -> Stats:
        async with asyncio.timeout(90):
            while True:
                if done(recorder.stats):
                    return recorder.stats
                await asyncio.sleep(0.05)

    return wait
