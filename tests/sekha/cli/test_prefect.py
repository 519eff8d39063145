from __future__ import annotations

import asyncio
import signal
import sqlite3

import httpx
import pytest

from tests.fixtures.gateway import wait_until

pytestmark = [pytest.mark.prefect, pytest.mark.timeout(240)]

DOCUMENT = "# Holds\n\nA hold sets money aside before a call.\n\n# Breakers\n\nA breaker leaves a provider alone.\n"
WRITTEN = """
providers:
  - id: builtin
    provider_type: builtin
    models:
      - {model_id: echo, task: chat_small}
      - {model_id: hashed-768, task: embedding, dimension: 768}
collections:
  documents: {model: hashed-768}
"""
CONFIGURED = "providers:\n  - {id: ours, provider_type: builtin, models: [{model_id: echo, task: chat_small}]}\n"


async def test_run_answers_ingests_and_searches_as_flow_runs_and_leaves_nothing_running(sekha):
    sekha.write("docs/a.md", DOCUMENT)

    ended = await sekha("run", "--docs", "docs", "--json", timeout_seconds=180)

    assert ended.code == 0, ended.err
    done = ended.json
    assert done["ingest"]["space"] == "Documents_768"
    assert [search["question"] for search in done["searches"]] == ["Holds", "Breakers"]
    assert all(search["hits"] == 2 for search in done["searches"])
    recorded = sqlite3.connect(sekha.folder / ".sekha" / "prefect" / "prefect.db")
    flow_runs = dict(recorded.execute("SELECT f.name, r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id"))
    steps = set(recorded.execute("SELECT state_type FROM task_run"))
    recorded.close()
    assert flow_runs == {"chat": "COMPLETED", "ingest": "COMPLETED", "search": "COMPLETED"}
    assert steps == {("COMPLETED",)}


async def _is_recorded(api_url: str, run_id: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        return (await http.get(f"{api_url}/flow_runs/{run_id}")).status_code == 200


async def _is_served(gateway: str, model: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        return model in {each["id"] for each in (await http.get(f"{gateway}/v1/models")).json()["data"]}


async def test_up_serves_flow_runs_and_blocks_until_it_is_interrupted(sekha):
    sekha.write("docs/a.md", DOCUMENT)
    sekha.write("elsewhere/sekha.yaml", CONFIGURED)
    sekha.write("one.yaml", WRITTEN)
    file = sekha.folder / "sekha.yaml"
    file.symlink_to("one.yaml")
    serving = await sekha.start("up", "--port", "0", "--gateway-port", "0")
    try:
        assert serving.stdout is not None
        async with asyncio.timeout(180):
            while b"export PREFECT_API_URL=" not in (line := await serving.stdout.readline()):
                assert line or serving.returncode is None
                if line.startswith(b"gateway"):
                    gateway = line.decode().split()[1].removesuffix("/v1,")
        there = {"PREFECT_API_URL": line.decode().strip().partition("=")[2], "PREFECT_HOME": str(sekha.folder / "home")}

        async with httpx.AsyncClient(base_url=gateway, trust_env=False, verify=False, timeout=20) as http:
            through = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
            run_id = through.json()["sekha"]["run_id"]
            await wait_until(lambda: _is_recorded(there["PREFECT_API_URL"], run_id), seconds=60)
        answered = await sekha("-c", "elsewhere/sekha.yaml", "chat", "hi", "--flow", "--json", environment=there)
        ingested = await sekha("ingest", "docs", "--flow", environment=there)
        found = await sekha("search", "money", "--flow", "--json", environment=there)
        pushed = await sekha("blocks", "push", "--json", environment=there)
        again = await sekha("blocks", "push", "--json", environment=there)
        from_block = await sekha("-c", "block:sekha", "check", environment=there)
        missing = await sekha("-c", "block:nope", "check", environment=there)
        deployed = await sekha("deploy", environment=there)
        sekha.write("two.yaml", WRITTEN.replace("echo", "parrot"))
        file.unlink()
        file.symlink_to("two.yaml")
        serving.send_signal(signal.SIGHUP)
        await wait_until(lambda: _is_served(gateway, "parrot"), seconds=60)
    finally:
        serving.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(serving.communicate(), 60)

    assert through.json()["sekha"]["provider_id"] == "builtin"
    assert answered.code == 0, answered.err
    assert answered.json["provider_id"] == "ours"
    assert f"{there['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/" in answered.err
    assert "2 embedded" in ingested.out
    assert len(found.json["hits"]) == 2
    assert {block["outcome"] for block in pushed.json["blocks"]} == {"created"}
    assert {block["outcome"] for block in again.json["blocks"]} == {"unchanged"}
    assert "Documents_768" in from_block.out
    assert missing.code == 3
    assert "sekha blocks push" in missing.err
    assert deployed.code == 0, deployed.err
    assert serving.returncode == 0
    assert b"Stopped." in err
    assert b"Traceback" not in err
