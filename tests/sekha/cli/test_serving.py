"""What `sekha serve` says and refuses before it serves, and how it notices blocks that are edited."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import termios
from pathlib import Path

import httpx
import pytest

from sekha.keys import hash_of, new_key
from sekha.testing import StandIn
from tests.fixtures.gateway import config_for, wait_until
from tests.fixtures.prefect import Server
from tests.fixtures.process import Gate, Serves
from tests.sekha.cli.conftest import Command

BUILTIN = "providers:\n  - {id: ours, provider_type: builtin, models: [{model_id: echo, task: chat_small}]}\n"
REMEMBERS = """
providers:
  - {id: ours, provider_type: builtin, models: [{model_id: hashed-768, task: embedding, dimension: 768}]}
memory: {collection: notes}
"""


def addresses(gate: Gate) -> set[str]:
    """Where the gateway listens, as the kernel says."""
    found = set()
    for line in Path(f"/proc/{gate.process.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        host, port = local.split(":")
        if state == "0A" and int(port, 16) == gate.port:
            found.add(socket.inet_ntoa(bytes.fromhex(host)[::-1]))
    return found


async def test_where_it_listens_is_said_in_one_line(sekha: Command) -> None:
    sekha.write("sekha.yaml", BUILTIN)
    process = await sekha.start("serve", "--port", "0")
    assert process.stdout is not None
    said = (await process.stdout.readline()).decode()
    process.send_signal(signal.SIGTERM)
    more, _ = await process.communicate()

    assert said.startswith("Sekha serves http://127.0.0.1:")
    assert "/v1, explained at http://127.0.0.1:" in said
    assert more == b""
    assert process.returncode == 0


async def test_without_keys_it_listens_here_alone_and_names_both_ways_out(serving: Serves) -> None:
    async with serving(BUILTIN + "server_host: 0.0.0.0\n") as gate:
        await wait_until(lambda: [line for line in gate.logged if line["level"] == "warning"])

        assert addresses(gate) == {"127.0.0.1"}
        assert gate.said["host"] == "127.0.0.1"
        [warning, *_] = [line["event"] for line in gate.logged if line["level"] == "warning"]
        assert "`keys:`" in warning
        assert "`allow_unauthenticated: true`" in warning


@pytest.mark.parametrize(
    "allowed",
    ["allow_unauthenticated: true\n", f"keys:\n  - {{name: a, hash: 'sha256:{'0' * 64}'}}\n"],
    ids=["nobody needs a key", "keys"],
)
async def test_it_listens_beyond_this_machine_when_the_file_says_who_may_come(serving: Serves, allowed: str) -> None:
    async with serving(BUILTIN + "server_host: 0.0.0.0\n" + allowed) as gate:
        assert addresses(gate) == {"0.0.0.0"}
        assert not [line for line in gate.logged if line["level"] == "warning"]


async def refused_reload(gate: Gate, left: str, *, workers: int) -> None:
    """Have all its workers told of another file, until one says that it is not taken over."""
    if workers > 1:
        await wait_until(lambda: len(gate.workers) == workers, seconds=20)
    gate.file.write_text(left)
    gate.tell(signal.SIGHUP)
    await wait_until(lambda: [line for line in gate.logged if line["level"] == "error"], seconds=20)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_reload_that_drops_the_keys_is_refused_while_others_can_reach_it(serving: Serves, workers: str) -> None:
    keys = f"keys:\n  - {{name: a, hash: 'sha256:{'0' * 64}'}}\n"
    async with serving(BUILTIN + "server_host: 0.0.0.0\n" + keys, "--workers", workers) as gate:
        await refused_reload(gate, BUILTIN, workers=int(workers))

        statuses = set()
        for _ in range(6):
            async with httpx.AsyncClient(trust_env=False, verify=False) as stranger:
                statuses.add((await stranger.get(f"http://127.0.0.1:{gate.port}/v1/models")).status_code)
        [said] = [line["event"] for line in gate.logged if line["level"] == "error"]
        gate.file.write_text(BUILTIN + "allow_unauthenticated: true\n")
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("read anew" in event for event in gate.events) == int(workers), seconds=20)
        opened = await gate.models()

    assert statuses == {401}
    assert "listens on 0.0.0.0" in said
    assert "`keys:`" in said
    assert "`allow_unauthenticated: true`" in said
    assert "echo" in opened


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("", "says nothing"),
        ("# providers: []\n", "says nothing"),
        (BUILTIN, "lists no key"),
        (f"{BUILTIN}keys:\n", "lists no key"),
    ],
    ids=["empty", "a comment", "cut off before the keys", "cut off behind their name"],
)
async def test_a_reload_while_the_file_is_being_written_leaves_no_door_open_and_takes_nothing_away(
    serving: Serves, workers: str, left: str, said: str
) -> None:
    key = new_key()
    keys = f"keys:\n  - {{name: a, hash: '{hash_of(key)}'}}\n"
    async with serving(BUILTIN + keys, "--workers", workers) as gate:
        await refused_reload(gate, left, workers=int(workers))

        statuses = set()
        for _ in range(6):
            async with httpx.AsyncClient(base_url=gate.said["url"], trust_env=False, verify=False) as stranger:
                strange = await stranger.get("/metrics")
                known = await stranger.get("/metrics", headers={"Authorization": f"Bearer {key}"})
                statuses.add((strange.status_code, known.status_code))
        [refused] = [line["event"] for line in gate.logged if line["level"] == "error"]
        gate.file.write_text(BUILTIN.replace("echo", "whole") + keys)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("read anew" in event for event in gate.events) == int(workers), seconds=20)
        gate.http.headers["Authorization"] = f"Bearer {key}"
        written = await gate.models()

    assert statuses == {(401, 200)}
    assert "is not taken over" in refused
    assert said in refused
    assert "whole" in written


async def test_a_reload_without_the_keys_is_taken_over_where_the_file_says_that_none_are_needed(
    serving: Serves,
) -> None:
    keys = f"keys:\n  - {{name: a, hash: 'sha256:{'0' * 64}'}}\n"
    async with serving(BUILTIN + keys) as gate:
        gate.file.write_text(BUILTIN)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: [line for line in gate.logged if line["level"] == "error"], seconds=20)
        [refused] = [line["event"] for line in gate.logged if line["level"] == "error"]
        gate.file.write_text(BUILTIN + "allow_unauthenticated: true\n")
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: any("read anew" in event for event in gate.events), seconds=20)
        opened = await gate.http.get("/metrics")
        gate.file.write_text(BUILTIN)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("read anew" in event for event in gate.events) == 2, seconds=20)

    assert "`allow_unauthenticated: true`" in refused
    assert opened.status_code == 200


async def test_a_file_that_was_found_and_is_gone_is_not_replaced_by_another_or_by_none(sekha: Command) -> None:
    sekha.write("sekha.yaml", BUILTIN)
    sekha.write("config.yaml", BUILTIN.replace("echo", "anothers"))
    process = await sekha.start("serve", "--port", "0")
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        await process.stdout.readline()
        (sekha.folder / "sekha.yaml").unlink()
        process.send_signal(signal.SIGHUP)
        said = ""
        async with asyncio.timeout(20):
            while "read anew" not in said and "not taken over" not in said:
                said = (await process.stderr.readline()).decode()
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()

    assert "sekha.yaml: 1 problem" in said
    assert "there is no such file" in said


@pytest.mark.parametrize("remark", ["", "# as one that names ${block:this}\n"], ids=["read here", "read by a child"])
async def test_a_link_that_leads_elsewhere_is_followed_with_the_next_reload(
    serving: Serves, tmp_path: Path, remark: str
) -> None:
    folder = tmp_path / "versions"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(remark + BUILTIN.replace("echo", name))
    link = tmp_path / "link.yaml"
    link.symlink_to(folder / "one")
    async with serving("", named="link.yaml") as gate:
        before = await gate.models()
        (tmp_path / "new").symlink_to(folder / "two")
        (tmp_path / "new").rename(link)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: any("read anew" in event for event in gate.events), seconds=20)
        after = await gate.models()

    assert "one" in before
    assert "two" in after
    assert (folder / ".sekha").is_dir(), "what is kept stays beside the file itself, and not beside the link"
    assert not (tmp_path / ".sekha").exists()


async def test_a_file_that_said_nothing_from_the_start_may_go_on_doing_so(serving: Serves) -> None:
    async with serving("# still to be written\n") as gate:
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: any("read anew" in event for event in gate.events), seconds=20)
        gate.file.write_text(BUILTIN)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: _lists(gate, "echo"), seconds=20)


async def _lists(gate: Gate, model: str) -> bool:
    return model in await gate.models()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_signal_that_comes_before_anything_is_read_is_obeyed_once_it_serves(
    sekha: Command, workers: str
) -> None:
    slow = sekha.folder / "slow.yaml"
    os.mkfifo(slow)
    process = await sekha.start("-c", "slow.yaml", "serve", "--port", "0", "--workers", workers)
    assert process.stdout is not None
    assert process.stderr is not None

    async def give(text: str) -> None:
        """Let it have read the file, once it looks."""
        writing: list[int] = []
        await wait_until(lambda: process.returncode is not None or _open_to_write(slow, writing), seconds=20)
        for file in writing:
            os.write(file, text.encode())
            await wait_until(lambda file=file: not _unread(file), seconds=20)
            os.close(file)
        await wait_until(lambda: process.returncode is not None or not _open_at(process.pid, slow), seconds=20)

    try:
        await give(BUILTIN)  # whether it names a block
        process.send_signal(signal.SIGHUP)
        await give(BUILTIN)
        served = await process.stdout.readline()
        await give(BUILTIN)
        anew = 0
        async with asyncio.timeout(20):
            while anew < int(workers):
                anew += b"was read anew" in await process.stderr.readline()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()

    assert b"Sekha serves" in served


def _open_to_write(pipe: Path, opened: list[int]) -> bool:
    """Open a named pipe, if anybody reads it."""
    with contextlib.suppress(OSError):
        opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return bool(opened)


def _unread(pipe: int) -> int:
    """Bytes that were written to a pipe and not yet read."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _open_at(process: int, file: Path) -> bool:
    return any(os.path.realpath(each) == str(file) for each in Path(f"/proc/{process}/fd").iterdir())


async def test_a_port_that_is_taken_is_named_with_two_ways_out(sekha: Command) -> None:
    sekha.write("sekha.yaml", BUILTIN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        ended = await sekha("serve", "--port", port)
        several = await sekha("serve", "--port", port, "--workers", "2", "--json")

    assert ended.code == several.code == 3
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in ended.err
    assert "--port or `server_port:`" in ended.err
    assert several.error["code"] == "config_invalid"


@pytest.mark.parametrize("host", ["é..x", "no such host"])
async def test_a_host_that_is_none_is_named_with_two_ways_out(sekha: Command, host: str) -> None:
    sekha.write("sekha.yaml", f"{BUILTIN}server_host: '{host}'\nallow_unauthenticated: true\n")

    in_file = await sekha("serve", "--port", "0")
    given = await sekha("serve", "--host", host, "--port", "0", "--json")

    assert in_file.code == given.code == 3
    assert f"server_host: {host}:0 cannot be listened on" in in_file.err
    assert "--host or `server_host:`" in in_file.err
    assert given.error["code"] == "config_invalid"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-"])
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_it_serves_and_ends_without_the_streams_that_nobody_gave_it(
    sekha: Command, closed: str, workers: str
) -> None:
    sekha.write("sekha.yaml", BUILTIN)
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'exec "$@" {closed}', "sh", *sekha.line(["serve", "--port", "0", "--workers", workers])),
        cwd=sekha.folder,
        env=sekha.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    read = process.stderr if closed.endswith(" >&-") or closed == ">&-" else process.stdout
    assert read is not None
    try:
        async with asyncio.timeout(30):
            while b"http://127.0.0.1" not in (line := await read.readline()):
                assert line, process.returncode
            process.terminate()
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()

    assert process.returncode == 0


async def test_what_keeps_every_worker_from_beginning_is_said_once(sekha: Command) -> None:
    sekha.write("sekha.yaml", BUILTIN + "memory: {collection: conversations}\n")

    ended = await sekha("serve", "--port", "0", "--workers", "2", "--json")

    assert ended.code == 3
    assert ended.out == ""
    [error] = [line for line in ended.err.splitlines() if line.startswith('{"error"')]
    assert "memory" in error


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_folder_that_takes_nothing_is_named_and_the_gateway_does_not_begin(
    sekha: Command, workers: str
) -> None:
    sekha.write("sekha.yaml", BUILTIN)
    sekha.write(".sekha", "in the way")

    ended = await sekha("serve", "--port", "0", "--workers", workers, "--json")

    assert ended.code == 3, ended.err
    [error] = [line for line in ended.err.splitlines() if line.startswith('{"error"')]
    assert ".sekha/gateway/recording cannot be written" in error
    assert "SEKHA_HOME" in error


@pytest.mark.parametrize("kept", ["recording", "memory"])
async def test_a_folder_that_is_there_and_in_which_no_file_can_be_made_is_named_as_well(
    sekha: Command, kept: str
) -> None:
    sekha.write("sekha.yaml", REMEMBERS)
    (sekha.folder / ".sekha/gateway").mkdir(parents=True)
    # One that root cannot write to either.
    (sekha.folder / ".sekha/gateway" / kept).symlink_to("/proc/self")

    ended = await sekha("serve", "--port", "0", "--json")

    assert ended.code == 3, ended.err
    [error] = [line for line in ended.err.splitlines() if line.startswith('{"error"')]
    assert f".sekha/gateway/{kept} cannot be written" in error


@pytest.mark.prefect
@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_an_edited_block_is_taken_over_by_processes_that_import_no_prefect(
    prefect: Server, serving: Serves, sekha: Command, workers: str
) -> None:
    there = {"PREFECT_API_URL": prefect.local.api_url, "PREFECT_HOME": str(prefect.home)}
    name = f"edited-{workers}"
    async with StandIn() as standin:
        config = config_for(standin)

        async def push(text: str) -> None:
            sekha.write("pushed.yaml", text)
            pushed = await sekha("-c", "pushed.yaml", "blocks", "push", "--name", name, environment=there)
            assert pushed.code == 0, pushed.err

        await push(config)
        arguments = ("--workers", workers, "--poll", "0.5")
        importing = ("-X", "importtime")
        async with serving(config, *arguments, named=f"block:{name}", environment=there, python=importing) as gate:
            assert (await gate.chat(model="chat")).status_code == 200

            await push(config.replace("model_id: chat", "model_id: edited"))
            await wait_until(lambda: _answers_as(gate, "edited"), seconds=30)

            gate.tell(signal.SIGHUP)
            taken = int(workers)
            await wait_until(lambda: sum("read anew" in event for event in gate.events) >= 2 * taken, seconds=30)
            imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in gate.lines if "time:" in line}

    assert "sekha" in imported
    assert "prefect" not in imported


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_block_that_is_edited_to_list_no_key_is_not_taken_over(
    prefect: Server, serving: Serves, sekha: Command
) -> None:
    there = {"PREFECT_API_URL": prefect.local.api_url, "PREFECT_HOME": str(prefect.home)}

    async def push(text: str) -> None:
        sekha.write("pushed.yaml", text)
        pushed = await sekha("-c", "pushed.yaml", "blocks", "push", "--name", "guarded", environment=there)
        assert pushed.code == 0, pushed.err

    await push(f"{BUILTIN}keys:\n  - {{name: a, hash: 'sha256:{'0' * 64}'}}\n")
    async with serving("", "--poll", "0.5", named="block:guarded", environment=there) as gate:
        await push(BUILTIN)
        await wait_until(lambda: any("lists no key any more" in event for event in gate.events), seconds=30)

        assert (await gate.http.get("/metrics")).status_code == 401


async def _answers_as(gate: Gate, model: str) -> bool:
    return (await gate.chat(model=model)).status_code == 200


@pytest.mark.prefect
@pytest.mark.timeout(240)
async def test_a_block_that_is_not_there_is_said_as_by_any_command(prefect: Server, sekha: Command) -> None:
    there = {"PREFECT_API_URL": prefect.local.api_url, "PREFECT_HOME": str(prefect.home)}

    ended = await sekha("-c", "block:nowhere", "serve", "--port", "0", environment=there)
    unreachable = await sekha(
        "-c", "block:nowhere", "serve", environment=there | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    )

    assert ended.code == 3
    assert "sekha blocks push" in ended.err
    assert unreachable.code == 7
