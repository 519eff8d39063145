"""What people see: a flow run in Prefect's own UI, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from flows.chat import chat
from sekha.chat import ChatRequest
from sekha.testing import StandIn
from tests.fixtures.missing import missing
from tests.fixtures.prefect import Server

# A browser may have to be asked more than once.
pytestmark = [pytest.mark.prefect, pytest.mark.timeout(330)]

Writes: TypeAlias = Callable[..., str]
Reads: TypeAlias = Callable[..., str]

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
FALLS_BACK = """
providers:
  - id: away
    provider_type: openai
    base_url: {url}
    api_key: ${{AWAY_KEY}}
    priority: 1
    models: [{{model_id: gpt-4o-mini, task: chat_small}}]
  - id: builtin
    provider_type: builtin
    models: [{{model_id: echo, task: chat_small}}]
"""
STEPS = ("estimate_cost", "select_provider", "reserve_budget", "call_provider", "settle_cost")


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


async def test_a_chat_that_fell_back_is_shown_with_its_steps_and_tags_and_without_its_prompt(
    prefect: Server, config: Writes, standin: StandIn, read_page: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWAY_KEY", "sk-ui-0123456789abcdef")
    standin.fail(status=401, times=9)
    request = ChatRequest(messages=({"role": "user", "content": "the plan for Zanzibar"},))

    await chat(request, config(FALLS_BACK.format(url=standin.openai_url)))
    run = (await prefect.runs("chat"))[0]
    await prefect.steps(run["id"], ended=len(STEPS))
    page = read_page(f"{prefect.local.ui_url}/runs/flow-run/{run['id']}", *STEPS)

    assert "Completed" in page
    assert f"{len(STEPS)} Task runs" in page
    assert [step for step in STEPS if step not in page] == []
    assert "provider:builtin" in page
    assert "Zanzibar" not in page
    assert "sk-ui" not in page
