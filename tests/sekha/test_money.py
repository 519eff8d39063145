"""What a request is expected to cost, as the steps work it out."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sekha.calling import Clock
from sekha.chat import ChatRequest
from sekha.errors import LedgerUnavailable
from sekha.ledger import Ledger, Scope, Spend
from sekha.ledgers import open_ledger
from sekha.lineup import REMEMBERED, LineUp
from sekha.loading import load
from sekha.pricing import Estimate, Usage
from sekha.resources import Resources
from sekha.routing import Explanation
from sekha.runtime import Runtime
from sekha.steps.money import UsualReplies
from sekha.tokens import count_messages

NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)


def provider(name: str, *models: str) -> str:
    listed = ", ".join(models)
    return f"  - {{id: {name}, provider_type: openai, base_url: 'http://127.0.0.1:9/v1', models: [{listed}]}}"


PRICE = "price: {input_per_million: 1, output_per_million: 2}"
MODELS = [
    f"{{model_id: gpt-4o, task: chat_small, supports_vision: true, {PRICE}}}",
    f"{{model_id: gpt-4o-mini, task: chat_small, supports_vision: true, {PRICE}}}",
    f"{{model_id: gpt-4, task: chat_small, {PRICE}}}",
    f"{{model_id: claude-sonnet-4-5, task: chat_small, supports_vision: true, {PRICE}}}",
]
CONFIG = f"""
providers:
{provider("here", *MODELS)}
"""
TWO_PROVIDERS = f"""
providers:
{provider("cheap", f"{{model_id: gpt-4o-mini, task: chat_small, {PRICE}}}")}
{provider("dear", "{model_id: gpt-4o, task: chat_small, price: {input_per_million: 4, output_per_million: 4}}")}
budgets:
  - {{name: all, limit: 100}}
  - {{name: cheap, limit: 100, match: {{provider: cheap}}}}
  - {{name: nobody, limit: 100, match: {{task: chat_smart}}}}
"""
HELLO = ChatRequest(messages=({"role": "user", "content": "What does a hold do?"},), model="gpt-4o")
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}


class Wound:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=asyncio.sleep, random=lambda: 0.0)


class Asked:
    """A ledger that counts how often it is asked for usual replies, and can be made to fail."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.questions = 0
        self.down = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def usual_output_tokens(self, provider: str, model: str) -> int | None:
        self.questions += 1
        if self.down:
            raise LedgerUnavailable("ledger.db", "it is locked")
        return await self._ledger.usual_output_tokens(provider, model)


@pytest.fixture
def wound() -> Wound:
    return Wound()


@pytest.fixture
def ledger(tmp_path: Path) -> Asked:
    return Asked(open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}"))


@pytest.fixture
async def running(tmp_path: Path, wound: Wound, ledger: Asked) -> AsyncIterator[Runtime]:
    file = tmp_path / "sekha.yaml"
    file.write_text(CONFIG, "utf-8")
    resources = Resources(load(str(file)), clock=wound.clock(), now=lambda: NOW, ledger=ledger)  # type: ignore[arg-type]
    async with Runtime(resources) as opened:
        yield opened


async def replies_of(ledger: Asked, tokens: int) -> None:
    nothing = await ledger.reserve([], {}, at=NOW, ttl_seconds=60)
    for _ in range(200):
        spend = Spend(
            scope=Scope(provider="here", model="gpt-4o", task="chat_small"),
            cost=Decimal(0),
            estimated=Decimal(0),
            usage=Usage(input_tokens=1, output_tokens=tokens),
            at=NOW,
        )
        await ledger.charge(nothing, spend)
    await ledger.release(nothing)


async def estimate(running: Runtime) -> Estimate:
    return (await running.route(HELLO)).first.estimate


async def eventually(running: Runtime, tokens: int) -> None:
    async with asyncio.timeout(10):
        while (await estimate(running)).output_tokens != tokens:  # noqa: ASYNC110 - it is read behind the requests
            await asyncio.sleep(0)


async def test_the_first_estimate_knows_the_history(running: Runtime, ledger: Asked) -> None:
    await replies_of(ledger, 70)

    made = await estimate(running)

    assert (made.output_tokens, made.basis) == (70, "history")


async def test_a_history_is_read_again_behind_the_requests_and_not_for_each(
    running: Runtime, ledger: Asked, wound: Wound
) -> None:
    assert (await estimate(running)).basis == "assumed"
    await replies_of(ledger, 70)

    for _ in range(3):
        assert (await estimate(running)).basis == "assumed"
    assert ledger.questions == 1
    wound.now += UsualReplies.REFRESH_SECONDS + 1
    assert (await estimate(running)).basis == "assumed"
    await eventually(running, 70)
    assert ledger.questions == 2


async def test_a_ledger_that_is_down_leaves_the_history_as_it_was(
    running: Runtime, ledger: Asked, wound: Wound, caplog: pytest.LogCaptureFixture
) -> None:
    await replies_of(ledger, 70)
    await estimate(running)
    ledger.down = True

    wound.now += UsualReplies.REFRESH_SECONDS + 1
    assert (await estimate(running)).output_tokens == 70
    async with asyncio.timeout(10):
        while "could not be read again" not in caplog.text:  # noqa: ASYNC110 - it is read behind the requests
            await asyncio.sleep(0)

    assert (await estimate(running)).output_tokens == 70


async def test_a_history_makes_nobody_cheaper_than_its_equals(tmp_path: Path, ledger: Asked, wound: Wound) -> None:
    equals = [f"{{model_id: gpt-4o, task: chat_small, {PRICE}}}"]
    file = tmp_path / "sekha.yaml"
    file.write_text(f"providers:\n{provider('here', *equals)}\n{provider('new', *equals)}\n", "utf-8")
    await replies_of(ledger, 7)
    drawn = iter([0.2, 0.7])
    clock = replace(wound.clock(), random=lambda: next(drawn))
    resources = Resources(load(str(file)), clock=clock, now=lambda: NOW, ledger=ledger)  # type: ignore[arg-type]

    async with Runtime(resources) as opened:
        first, second = await opened.route(HELLO), await opened.route(HELLO)

    assert [each.first.model.provider_id for each in (first, second)] == ["here", "new"]
    estimates = {each.model.provider_id: each.estimate.output_tokens for each in first.candidates}
    assert estimates == {"here": 7, "new": 512}


async def test_closing_does_not_wait_for_a_history(running: Runtime, ledger: Asked, wound: Wound) -> None:
    await estimate(running)
    wound.now += UsualReplies.REFRESH_SECONDS + 1
    await estimate(running)

    async with asyncio.timeout(5):
        await running.aclose()


async def explained(running: Runtime, *content: dict[str, Any], text: str = "what is it?") -> Explanation:
    parts = ({"type": "text", "text": text}, *content)
    return await running.explain(ChatRequest(messages=({"role": "user", "content": parts},), task="chat_small"))


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("text", ["what is it?", "a long story, " * 2_000])
async def test_each_model_is_priced_by_its_own_tokenizer_and_image_formula(
    running: Runtime, images: int, text: str
) -> None:
    made = await explained(running, *[PICTURE] * images, text=text)

    message = {"role": "user", "content": [{"type": "text", "text": text}, *[PICTURE] * images]}
    priced = {each.model.id: each.estimate.input_tokens for each in made.verdicts if each.estimate}
    assert priced == {name: count_messages([message], name) for name in priced}
    assert len(priced) == (4 if not images else 3)


async def test_counting_a_long_chat_holds_nobody_up(running: Runtime) -> None:
    await explained(running)
    done = asyncio.Event()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    await explained(running, text="a long story, " * 100_000)
    done.set()
    await beside

    # Had it been counted on the loop, nobody else would have come in between.
    assert turns > 10


WINDOWS = [
    f"{{model_id: windowed, task: chat_small, context_window: 100000, max_output_tokens: 1000, {PRICE}}}",
    f"{{model_id: endless, task: chat_small, max_output_tokens: 1000, {PRICE}}}",
    "{model_id: gratis, task: chat_small, price: free}",
    "{model_id: gpt-4o, task: chat_small}",
]
PDF = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "QUJD" * 250_000}}


async def judged(tmp_path: Path, *parts: dict[str, Any], **fields: Any) -> dict[str, tuple[Estimate | None, str]]:
    """What becomes of each model when these parts are asked about."""
    file = tmp_path / "sekha.yaml"
    file.write_text(f"providers:\n{provider('here', *WINDOWS)}\n", "utf-8")
    content = ({"type": "text", "text": "Sum it up."}, *parts)
    request = ChatRequest(messages=({"role": "user", "content": content},), task="chat_small", **fields)
    async with Runtime(Resources(load(str(file)), now=lambda: NOW)) as running:
        made = await running.explain(request)
    return {each.model.id: (each.estimate, each.why) for each in made.verdicts}


@pytest.mark.parametrize(
    "part", [PDF, {"type": "file", "file": {"file_id": "file-abc"}}, {"type": "document", "source": {"type": "url"}}]
)
async def test_a_file_costs_at_the_worst_what_fits_the_context_window(tmp_path: Path, part: dict[str, Any]) -> None:
    said = await judged(tmp_path, part)

    windowed, _ = said["windowed"]
    assert windowed is not None
    # A million tokens cost $1 that go in, and $2 that come out.
    assert windowed.worst_case == Decimal("0.1") + Decimal("0.002")
    assert windowed.expected < Decimal("0.01")
    assert windowed.reply_limit in (None, 1000)
    unlimited, why = said["endless"]
    assert unlimited is None
    assert (
        why == f"how much `{part['type']}` may cost is unknown: leave that out, or set `context_window:` for the model"
    )
    assert said["gratis"][0] is not None
    assert said["gpt-4o"][0] is not None  # the price map knows its window


async def test_a_cap_refuses_a_file_that_may_pass_it(tmp_path: Path) -> None:
    said = await judged(tmp_path, PDF, max_cost=Decimal("0.05"))

    assert "above `max_cost` of $0.05" in said["windowed"][1]


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "input_audio", "input_audio": {"data": "QUJD" * 50_000, "format": "wav"}}, "input_audio"),
        ({"type": "video_url", "video_url": {"url": "https://example.com/film.mp4"}}, "video_url"),
        ({"type": "file", "file": {"file_data": "data:audio/mpeg;base64,QUJD"}}, "file"),
        ({"type": "file", "file": {"file_id": "a", "format": "video/mp4"}}, "file"),
    ],
)
async def test_sound_and_film_have_prices_that_the_price_map_does_not_say(
    tmp_path: Path, part: dict[str, Any], what: str
) -> None:
    said = await judged(tmp_path, part)

    assert said["gpt-4o"] == (
        None,
        f"its price with `{what}` is unknown: leave that out, or set `price:` for the model",
    )
    # Who has priced a model has priced them too, and what fits its window is still the most.
    windowed, _ = said["windowed"]
    assert windowed is not None
    assert windowed.worst_case == Decimal("0.102")


async def test_what_was_said_aloud_before_is_sound_too(tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(f"providers:\n{provider('here', *WINDOWS)}\n", "utf-8")
    said = {"role": "assistant", "content": "Yes.", "audio": {"id": "audio_abc"}}
    request = ChatRequest(messages=(said, *HELLO.messages), task="chat_small")

    async with Runtime(Resources(load(str(file)), now=lambda: NOW)) as running:
        made = await running.explain(request)

    why = {each.model.id: each.why for each in made.verdicts}
    assert "its price with `audio` is unknown" in why["gpt-4o"]
    assert "how much `audio` may cost is unknown" in why["endless"]


async def test_searches_and_plugins_that_are_billed_apart_are_refused_where_the_map_says_the_price(
    tmp_path: Path,
) -> None:
    for name, options in {
        "plugins": {"plugins": [{"id": "web"}]},
        "tools": {"tools": [{"type": "web_search"}]},
    }.items():
        said = await judged(tmp_path, options=options)

        assert said["gpt-4o"][1].startswith(f"its price with `{name}` is unknown")
        assert said["windowed"][0] is not None


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "web_fetch_20250910", "name": "web_fetch"},
        {"type": "code_execution_20250522", "name": "code_execution"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
        {"type": "advisor_20260301", "name": "advisor"},
        {"type": "openrouter:web_search"},
        {"type": "builtin_function", "function": {"name": "$web_search"}},
        {"type": "nobody_knows", "name": "x"},
        {"type": ["function"], "name": "x"},
        {"googleSearch": {}},
        {"function_declarations": [{"name": "f"}], "googleSearch": {}},
        {"systemTool": {"name": "nova_grounding"}},
        {"type": "function", "googleSearch": {}},
        {"type": "memory_20250818", "googleSearch": {}},
    ],
)
async def test_a_tool_that_the_provider_runs_has_no_price_in_the_map_and_may_fill_the_window(
    tmp_path: Path, tool: dict[str, Any]
) -> None:
    ours = {"type": "function", "function": {"name": "f", "parameters": {}}}

    said = await judged(tmp_path, options={"tools": [ours, tool]})

    assert said["gpt-4o"] == (None, "its price with `tools` is unknown: leave that out, or set `price:` for the model")
    windowed, _ = said["windowed"]
    assert windowed is not None
    assert windowed.worst_case == Decimal("0.102")
    assert windowed.expected < Decimal("0.01")
    assert said["endless"][1].startswith("how much `tools` may cost is unknown")
    assert said["gratis"][0] is not None


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        {"type": "custom", "custom": {"name": "f"}},
        {"type": "custom", "name": "f", "input_schema": {}},
        {"name": "f", "input_schema": {}},
        {"function_declarations": [{"name": "f"}]},
        {"functionDeclarations": [{"name": "f"}]},
        {"toolSpec": {"name": "f", "inputSchema": {"json": {}}}},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"},
    ],
)
async def test_a_tool_that_the_caller_runs_costs_its_tokens(tmp_path: Path, tool: dict[str, Any]) -> None:
    said = await judged(tmp_path, options={"tools": [tool]})

    assert all(estimate is not None for estimate, _ in said.values())
    assert said["windowed"][0] is not None
    assert said["windowed"][0].worst_case < Decimal("0.01")


async def test_a_request_for_a_model_that_is_free_asks_the_ledger_nothing(tmp_path: Path, ledger: Asked) -> None:
    free = CONFIG.replace(PRICE, "price: free")
    file = tmp_path / "sekha.yaml"
    file.write_text(free, "utf-8")

    async with Runtime(Resources(load(str(file)), ledger=ledger)) as running:  # type: ignore[arg-type]
        await running.route(replace(HELLO, model=None))

    assert ledger.questions == 0


async def test_callers_who_prefer_every_model_in_turn_fill_no_memory(tmp_path: Path) -> None:
    models = [f"{{model_id: m{number}, task: chat_small, price: free}}" for number in range(250)]
    file = tmp_path / "sekha.yaml"
    file.write_text(f"providers:\n{provider('here', *models)}\n", "utf-8")

    async with Runtime(Resources(load(str(file)))) as running:
        for number in range(250):
            await running.route(replace(HELLO, model=None, preferred_model=f"m{number}"))
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, LineUp) and len(each.models) == len(models)]

    assert 0 < sum(len(each.entrants) for each in kept) <= REMEMBERED + 250


async def test_each_budget_holds_for_the_dearest_candidate_that_counts_against_it(tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(TWO_PROVIDERS, "utf-8")
    everyones = ChatRequest(messages=HELLO.messages, task="chat_small", max_tokens=100)

    async with Runtime(Resources(load(str(file)), now=lambda: NOW)) as running:
        chosen = await running.route(everyones)
        hold = await running.money.reserve_budget(chosen)

    worst = {each.model.provider_id: each.estimate.worst_case for each in chosen.candidates}
    assert worst["cheap"] < worst["dear"]
    assert hold.amounts == {"all": worst["dear"], "cheap": worst["cheap"]}
