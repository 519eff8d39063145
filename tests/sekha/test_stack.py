"""A server of our own: it says what is wrong, is found again, and ends with whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sekha.errors import PrefectUnavailable
from sekha.stack import LocalPrefect, require_server
from tests.fixtures.prefect import Server

STARTS_AND_WAITS = """
import asyncio, sys
from pathlib import Path
from sekha.stack import LocalPrefect

async def main():
    async with LocalPrefect(Path(sys.argv[1])) as prefect:
        print(prefect.api_url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(PrefectUnavailable, match=rf"Port {port} .* is in use"):
            async with LocalPrefect(tmp_path / "home", port=port):
                pass

    assert (tmp_path / "home").stat().st_mode & 0o077 == 0, "it will hold prompts, for its owner alone"


async def test_a_password_in_the_servers_address_is_not_repeated() -> None:
    with pytest.raises(PrefectUnavailable, match=r"http://me:\*\*\*@127\.0\.0\.1:9/api") as raised:
        await require_server("http://me:hunter2@127.0.0.1:9/api")

    assert "hunter2" not in str(raised.value)


async def test_a_database_that_cannot_be_prepared_shows_what_prefect_said(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_bytes(b"no database, but long enough to be looked at " * 100)

    with pytest.raises(PrefectUnavailable, match=r"database ended before it was ready. It said:[\s\S]*not a database"):
        async with LocalPrefect(tmp_path):
            pass


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_killed_owner_leaves_nothing_running_and_the_next_start_works(tmp_path: Path) -> None:
    told: list[str] = []
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    api_url = (await owner.stdout.readline()).decode().strip()
    await require_server(api_url)
    with pytest.raises(PrefectUnavailable, match=f"started by process {owner.pid}"):
        async with LocalPrefect(tmp_path):
            pass

    os.kill(owner.pid, signal.SIGKILL)
    await owner.wait()
    async with LocalPrefect(tmp_path, progress=told.append) as again:
        await require_server(again.api_url)

    assert again.api_url != api_url
    assert "preparing Prefect's database" not in told, "the second start finds it prepared"
    for url in (api_url, again.api_url):
        with pytest.raises(PrefectUnavailable):
            await require_server(url)


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_database_that_was_deleted_is_prepared_anew(tmp_path: Path) -> None:
    async with LocalPrefect(tmp_path):
        pass
    for file in list(tmp_path.glob("prefect.db*")):  # noqa: ASYNC240 - a handful
        file.unlink()

    async with LocalPrefect(tmp_path) as again:
        found = await Server(again).ask("POST", "/work_pools/filter", {})

    assert found.status_code == 200


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_server_that_dies_by_itself_is_told_of(tmp_path: Path) -> None:
    async with LocalPrefect(tmp_path) as prefect:
        find = ["pgrep", "-f", f"server start --host 127.0.0.1 --port {prefect.port}"]
        serving = await asyncio.to_thread(subprocess.run, find, capture_output=True, check=True)
        for pid in serving.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)

        with pytest.raises(PrefectUnavailable, match="server ended by itself"):
            await asyncio.wait_for(prefect.watch(), 60)


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_cancelled_start_leaves_nothing_running(tmp_path: Path) -> None:
    starting = asyncio.Event()
    prefect = LocalPrefect(tmp_path, progress=lambda told: starting.set() if "server" in told else None)

    start = asyncio.create_task(prefect.__aenter__())
    await starting.wait()
    start.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await start

    with pytest.raises(PrefectUnavailable):
        await require_server(prefect.api_url)
    async with LocalPrefect(tmp_path) as again:
        await require_server(again.api_url)
