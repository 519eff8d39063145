"""A configuration in Prefect: pushed, encrypted, masked, edited in the UI, and used by the next run."""

from __future__ import annotations

import asyncio
import sqlite3
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks import LLMProvider, load_config, push
from flows.chat import chat
from sekha.chat import ChatRequest
from sekha.errors import ConfigError, ConfigMissing, PrefectUnavailable
from sekha.loading import Loaded, load
from sekha.testing import StandIn
from tests.fixtures.prefect import Server

pytestmark = pytest.mark.prefect

KEY = "sk-blocks-0123456789abcdef"
HELLO = ChatRequest(messages=({"role": "user", "content": "Hello"},))

DECLARED = """
providers:
  - id: away
    provider_type: openai
    base_url: {url}
    api_key: {key}
    models:
      - {{model_id: gpt-4o-mini, task: chat_small}}
budgets:
  - {{name: research, limit: 25, period: day, match: {{provider: away}}}}
"""


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with StandIn() as serving:
        yield serving


@pytest.fixture
def name() -> str:
    """A configuration's name that no other test of the session uses."""
    return f"c{uuid4().hex[:8]}"


def declared(folder: Path, url: str, *, key: str = "${AWAY_KEY}") -> Loaded:
    file = folder / "sekha.yaml"
    file.write_text(DECLARED.format(url=url, key=key), encoding="utf-8")
    return load(file, environ={"AWAY_KEY": KEY})


async def edit(prefect: Server, slug: str, name: str, **changes: Any) -> None:
    """Change a block's fields as Prefect's UI does."""
    there = (await prefect.ask("GET", f"/block_types/slug/{slug}/block_documents/name/{name}")).json()
    answer = await prefect.ask(
        "PATCH", f"/block_documents/{there['id']}", {"data": changes, "merge_existing_data": True}
    )
    assert answer.status_code == 204, answer.text


async def test_pushing_creates_then_leaves_alone_then_updates(prefect: Server, tmp_path: Path, name: str) -> None:
    loaded = declared(tmp_path, "http://127.0.0.1:9/v1")
    moved = declared(tmp_path, "http://127.0.0.1:10/v1")

    outcomes = [
        {pushed.name: pushed.outcome for pushed in await asyncio.to_thread(push, each, name)}
        for each in (loaded, loaded, moved)
    ]

    assert set(outcomes[0]) == {f"{name}-away", f"{name}-store", f"{name}-research", name}
    assert set(outcomes[0].values()) == {"created"}
    assert set(outcomes[1].values()) == {"unchanged"}
    assert {part for part, outcome in outcomes[2].items() if outcome == "updated"} == {f"{name}-away"}


async def test_what_was_pushed_loads_as_it_was_declared(prefect: Server, tmp_path: Path, name: str) -> None:
    loaded = declared(tmp_path, "http://127.0.0.1:9/v1")

    await asyncio.to_thread(push, loaded, name)
    back = await asyncio.to_thread(load_config, name)

    assert back.config.providers == loaded.config.providers
    assert back.config.budgets == loaded.config.budgets
    assert back.path(back.config.store.path) == loaded.path(loaded.config.store.path)


async def test_a_key_is_encrypted_at_rest_and_masked_everywhere(prefect: Server, tmp_path: Path, name: str) -> None:
    await asyncio.to_thread(push, declared(tmp_path, "http://127.0.0.1:9/v1"), name)
    slug = LLMProvider.get_block_type_slug()

    path = f"/block_types/slug/{slug}/block_documents/name/{name}-away"
    shown = await prefect.ask("GET", path)
    asked = await prefect.ask("GET", f"{path}?include_secrets=true")
    block = await asyncio.to_thread(LLMProvider.load, f"{name}-away")

    with sqlite3.connect(prefect.home / "prefect.db") as database:
        database.execute("PRAGMA wal_checkpoint(FULL)")
        [own_keys] = database.execute("SELECT count(*) FROM configuration WHERE key = 'ENCRYPTION_KEY'").fetchone()
    database.close()
    at_rest = b"".join(file.read_bytes() for file in prefect.home.rglob("*") if file.is_file())
    assert KEY.encode() not in at_rest
    assert own_keys == 0, "the key that decrypts them lies beside the database, not in it"
    assert (prefect.home / "encryption.key").stat().st_mode & 0o077 == 0
    assert KEY not in shown.text
    assert KEY in asked.text
    assert KEY not in repr(block)
    assert KEY not in str(block)


async def test_a_ledgers_password_is_masked_and_comes_back(prefect: Server, tmp_path: Path, name: str) -> None:
    url = "postgresql://sekha:hunter2@127.0.0.1/ledger"
    (tmp_path / "sekha.yaml").write_text("ledger: {url: '${LEDGER_URL}'}\n", encoding="utf-8")

    await asyncio.to_thread(push, load(tmp_path / "sekha.yaml", environ={"LEDGER_URL": url}), name)
    back = await asyncio.to_thread(load_config, name)

    shown = await prefect.ask("GET", f"/block_types/slug/sekha-config/block_documents/name/{name}")
    assert "hunter2" not in shown.text
    assert back.config.ledger.url == url


async def test_a_provider_and_a_budget_of_one_name_are_two_blocks(prefect: Server, tmp_path: Path, name: str) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(
        "providers: [{id: store, provider_type: builtin}, {id: team, provider_type: builtin}]\n"
        "budgets: [{name: team, limit: 1}]\n",
        encoding="utf-8",
    )

    loaded = load(file, environ={})
    pushed = await asyncio.to_thread(push, loaded, name)
    back = await asyncio.to_thread(load_config, name)

    assert len(pushed) == 5
    assert back.config.providers == loaded.config.providers
    assert back.config.budgets == loaded.config.budgets


@pytest.mark.parametrize(
    ("text", "named", "said"),
    [
        ("", "My Team", "lower case"),
        ("providers: [{id: a.b, provider_type: builtin}, {id: a_b, provider_type: builtin}]", "team", "Rename one"),
        ("budgets: [{name: '€', limit: 1}]", "team", "no letter or digit"),
    ],
)
def test_names_that_blocks_cannot_have_are_refused_before_any_is_stored(
    tmp_path: Path, text: str, named: str, said: str
) -> None:
    (tmp_path / "sekha.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=said):
        push(load(tmp_path / "sekha.yaml", environ={}), named)


async def test_a_flow_uses_the_blocks_it_is_given(prefect: Server, tmp_path: Path, name: str, standin: StandIn) -> None:
    await asyncio.to_thread(push, declared(tmp_path, standin.openai_url), name)

    reply = await chat(HELLO, config=f"block:{name}")

    assert reply.provider_id == "away"
    assert standin.requests[-1].headers["Authorization"] == f"Bearer {KEY}"


async def test_an_edited_block_holds_from_the_next_run_on(
    prefect: Server, tmp_path: Path, name: str, standin: StandIn
) -> None:
    await asyncio.to_thread(push, declared(tmp_path, standin.openai_url), name)
    await chat(HELLO, config=f"block:{name}")

    async with StandIn() as other:
        await edit(prefect, LLMProvider.get_block_type_slug(), f"{name}-away", base_url=other.openai_url)
        await chat(HELLO, config=f"block:{name}")

        assert len(other.requests) == 1
    assert len(standin.requests) == 1


async def test_a_wrong_edit_is_said_as_in_a_file(prefect: Server, tmp_path: Path, name: str, standin: StandIn) -> None:
    await asyncio.to_thread(push, declared(tmp_path, standin.openai_url), name)
    await edit(prefect, LLMProvider.get_block_type_slug(), f"{name}-away", provider_id="not a name")

    with pytest.raises(ConfigError, match=r"providers\[0\]\.id"):
        await chat(HELLO, config=f"block:{name}")


async def test_an_edit_that_the_block_itself_refuses_is_no_missing_block(
    prefect: Server, tmp_path: Path, name: str
) -> None:
    await asyncio.to_thread(push, declared(tmp_path, "http://127.0.0.1:9/v1"), name)
    await edit(prefect, LLMProvider.get_block_type_slug(), f"{name}-away", priority=1000)

    with pytest.raises(ConfigError, match="priority") as raised:
        await asyncio.to_thread(load_config, name)
    assert not isinstance(raised.value, ConfigMissing)
    pushed = await asyncio.to_thread(push, declared(tmp_path, "http://127.0.0.1:9/v1"), name)
    assert {each.name: each.outcome for each in pushed}[f"{name}-away"] == "updated"


async def test_no_traceback_of_a_refused_block_holds_its_key(prefect: Server, tmp_path: Path, name: str) -> None:
    await asyncio.to_thread(push, declared(tmp_path, "http://127.0.0.1:9/v1"), name)
    path = f"/block_types/slug/{LLMProvider.get_block_type_slug()}/block_documents/name/{name}-away"
    there = (await prefect.ask("GET", path)).json()
    data = {"provider_id": "away", "api_key": KEY}
    await prefect.ask("PATCH", f"/block_documents/{there['id']}", {"data": data, "merge_existing_data": False})

    with pytest.raises(ConfigError, match="provider_type") as raised:
        await asyncio.to_thread(load_config, name)

    assert KEY not in "".join(traceback.format_exception(raised.value))


async def test_a_block_that_is_not_there_is_named(prefect: Server) -> None:
    with pytest.raises(ConfigMissing, match=r"nowhere[\s\S]*sekha blocks push"):
        await asyncio.to_thread(load_config, "nowhere")


async def test_a_file_may_name_a_secret_block(prefect: Server, tmp_path: Path, name: str, standin: StandIn) -> None:
    await asyncio.to_thread(Secret(value=KEY).save, name)
    file = tmp_path / "sekha.yaml"
    file.write_text(DECLARED.format(url=standin.openai_url, key=f"${{block:{name}}}"), encoding="utf-8")

    await chat(HELLO, config=str(file))

    assert standin.requests[-1].headers["Authorization"] == f"Bearer {KEY}"


async def test_a_file_that_names_a_missing_secret_says_where(prefect: Server, tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text(DECLARED.format(url="http://127.0.0.1:9/v1", key="${block:nowhere}"), encoding="utf-8")

    with pytest.raises(ConfigError, match=r"providers\[0\]\.api_key.*nowhere"):
        await chat(HELLO, config=str(file))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api"])
async def test_a_server_that_does_not_answer_is_no_missing_block(prefect: Server, url: str) -> None:
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectUnavailable, match="sekha up"):
        await asyncio.to_thread(load_config, "sekha")
