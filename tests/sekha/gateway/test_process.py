"""`sekha serve` as a process: it begins, takes over, and ends without anybody noticing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from sekha.gateway.exchange import Exchange
from sekha.gateway.metrics import Metrics
from sekha.gateway.server import Server, bind
from sekha.gateway.serving import Serving
from sekha.keys import hash_of, new_key
from sekha.ledger import Budget
from sekha.ledgers import open_ledger
from sekha.loading import load
from sekha.resources import Resources
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, config_for, listening, wait_until
from tests.fixtures.process import ROOT, Gate, Serves, left_behind

pytestmark = pytest.mark.timeout(90)

ALL = Budget(name="all", limit=Decimal(1000), period="total")


@asynccontextmanager
async def streaming(gate: Gate) -> AsyncIterator[AsyncIterator[str]]:
    """A stream of which the first piece is there."""
    asked = {"messages": [{"role": "user", "content": "one two three four five six"}], "stream": True}
    async with gate.http.stream("POST", "/v1/chat/completions", json=asked) as response:
        pieces = response.aiter_text()
        assert "data:" in await anext(pieces)
        yield pieces


@asynccontextmanager
async def new_callers(gate: Gate) -> AsyncIterator[None]:
    """Connections of their own, which either worker may take."""
    before = gate.http
    async with httpx.AsyncClient(base_url=gate.said["url"], trust_env=False, verify=False, timeout=20) as gate.http:
        yield
    gate.http = before


async def money(gate: Gate) -> tuple[Decimal, Decimal]:
    """What was spent and what is held, as another process reads it."""
    ledger = open_ledger(f"sqlite:///{gate.folder}/.sekha/ledger.db")
    try:
        return await ledger.spent(ALL, at=datetime.now(UTC))
    finally:
        await ledger.aclose()


# --- the end -------------------------------------------------------------------------------


async def test_a_stream_ends_whole_after_sigterm_and_nobody_new_is_taken(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        standin.trickle(0.15)

        async with streaming(gate) as pieces:
            gate.tell(signal.SIGTERM)
            await wait_until(lambda: _refused(gate))
            rest = "".join([piece async for piece in pieces])

        assert rest.endswith("data: [DONE]\n\n")
        assert await gate.ended() == 0
        spent, held = await money(gate)
        assert spent > 0
        assert held == 0


async def test_a_service_manager_that_tells_every_process_to_end_cuts_nothing(serving: Serves) -> None:
    """As systemd does, while the process that watches the workers tells them too."""
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        standin.trickle(0.15)
        workers = await _all_workers(gate, 2)

        async with streaming(gate) as pieces:
            for process in (*workers, gate.process.pid):
                os.kill(process, signal.SIGTERM)
                await asyncio.sleep(0.05)  # two of one kind that wait are one
            rest = "".join([piece async for piece in pieces])

        assert rest.endswith("data: [DONE]\n\n")
        assert await gate.ended() == 0


async def _refused(gate: Gate) -> bool:
    return not await gate.connects()


async def test_a_second_signal_cuts_what_is_under_way_and_it_is_paid_for_all_the_same(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        standin.stall()

        async with streaming(gate) as pieces:
            gate.tell(signal.SIGTERM)
            await wait_until(lambda: _refused(gate))
            gate.tell(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in pieces:
                    pass

        assert await gate.ended() == 0
        spent, held = await money(gate)
        assert spent > 0
        assert held == 0
        assert not [line for line in gate.logged if line["level"] == "error"]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_log_that_nobody_reads_does_not_keep_it_from_ending(
    serving: Serves, workers: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    async with StandIn() as standin, serving(config_for(standin), "--workers", workers, log=log) as gate:
        for _ in range(40):
            await asyncio.gather(*(gate.http.get("/health/live") for _ in range(20)))

        gate.tell(signal.SIGTERM)

        assert await gate.ended() == 0
    os.close(reader)


async def test_an_idle_connection_does_not_keep_it_from_ending(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        assert (await gate.chat()).status_code == 200

        gate.tell(signal.SIGINT)

        assert await gate.ended(10) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_however_often_it_is_told_while_it_closes_it_ends_in_order(serving: Serves, workers: str) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", workers) as gate:
        assert (await gate.chat()).status_code == 200
        processes = [gate.process.pid, *(await _all_workers(gate, int(workers)))]

        while gate.process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                for process in processes:
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
            await asyncio.sleep(0.002)

        assert await gate.ended() == 0
        assert not [line for line in gate.logged if line["level"] == "error"]


async def _all_workers(gate: Gate, count: int) -> list[int]:
    if count > 1:
        await wait_until(lambda: len(gate.workers) == count, seconds=20)
    return list(gate.workers.values())


async def test_a_request_that_never_ends_keeps_neither_the_server_nor_the_configuration_it_began_with(
    gateway: Opens, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def never(serving: Serving, x: Exchange) -> None:
        while not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await go_on.wait()

    async with StandIn() as standin, gateway(standin, routes={"/never": {"GET": never}}) as gate:
        before, app = gate.serving, gate.gateway
        server = Server(app, bound := bind("127.0.0.1", 0), cut_seconds=0.2)
        running = asyncio.create_task(server.run())
        _, writer = await asyncio.open_connection(*bound.getsockname())
        writer.write(b"GET /never HTTP/1.1\r\n\r\n")
        await wait_until(lambda: before.under_way)
        replacing = asyncio.create_task(
            app.replace(Serving(Resources(load(tmp_path / "sekha.yaml", environ={})), Metrics()))
        )

        server.stop()
        server.stop()

        await asyncio.wait_for(running, 10)
        assert before.under_way
        assert not replacing.done()
        app.give_up()
        await asyncio.wait_for(replacing, 10)
        go_on.set()
        await wait_until(lambda: not before.under_way)
        writer.close()


@pytest.mark.soak
async def test_whatever_is_stuck_at_the_end_the_process_ends(serving: Serves, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    (stuck / "sitecustomize.py").write_text("import threading\nthreading.Thread(target=threading.Event().wait).start()")
    environment = {"PYTHONPATH": f"{stuck}:{ROOT}"}
    async with StandIn() as standin, serving(config_for(standin), environment=environment) as gate:
        assert (await gate.chat()).status_code == 200

        gate.tell(signal.SIGTERM)

        assert await gate.ended(60) == 1

    assert gate.logged[-1]["level"] == "error"
    assert "the process ends as it stands" in gate.events[-1]
    spent, held = await money(gate)
    assert spent > 0
    assert held == 0


@pytest.mark.soak
@pytest.mark.timeout(240)
async def test_a_silent_server_stops_spending_after_a_while_and_does_not_keep_the_gateway_from_ending(
    serving: Serves, postgres_url: str, silenced: Callable[[], AbstractContextManager[None]]
) -> None:
    async with StandIn() as standin:
        config = config_for(standin, extra=f"ledger: {{url: '{postgres_url}'}}")
        async with serving(config) as gate:
            assert (await gate.chat()).status_code == 200
            with silenced():
                silent_since = time.monotonic()
                statuses: list[tuple[float, int]] = []
                while (since := time.monotonic() - silent_since) < 45:
                    response = await gate.chat()
                    statuses.append((since, response.status_code))
                    assert time.monotonic() - silent_since - since < 8
                    await asyncio.sleep(0.1)
                asked = time.monotonic()
                costs = await gate.http.get("/api/v1/costs")
                assert time.monotonic() - asked < 8
                gate.tell(signal.SIGTERM)
                assert await gate.ended(25) == 0
        calls = len([each for each in standin.requests if each.path.endswith("/chat/completions")])
        async with serving(config) as gate:
            report = (await gate.http.get("/api/v1/costs")).json()

    assert {status for since, status in statuses if since < 25} == {200}
    assert {status for since, status in statuses if since > 40} == {503}
    assert (response.headers["retry-after"], costs.status_code) == ("1", 503)
    assert report["total"]["calls"] == calls


async def test_a_ledger_that_is_away_keeps_no_gateway_from_starting_or_ending(serving: Serves) -> None:
    async with StandIn() as standin:
        config = config_for(standin, extra="ledger: {url: 'postgresql://nobody@127.0.0.1:1/nothing'}")
        async with serving(config) as gate:
            assert (await gate.http.get("/health/live")).status_code == 200
            gate.tell(signal.SIGTERM)
            assert await gate.ended() == 0

    assert not [line for line in gate.logged if line["level"] == "error" or "journal" in line["event"]]


# --- another configuration -----------------------------------------------------------------


async def test_a_reload_under_load_drops_no_request_and_takes_the_new_file_over(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        standin.slow(0.02, times=None)
        config, ended = gate.file.read_text(), asyncio.Event()
        statuses: list[int] = []

        async def ask() -> None:
            while not ended.is_set():
                statuses.append((await gate.chat()).status_code)

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for name in ("chat_a", "chat_b", "chat_c"):
            gate.file.write_text(config.replace("model_id: chat", f"model_id: {name}"))
            gate.tell(signal.SIGHUP)
            await wait_until(lambda name=name: _lists(gate, name), seconds=20)
        before = len(statuses)
        await wait_until(lambda: len(statuses) > before + 20)
        ended.set()
        await asyncio.gather(*asking)

        assert set(statuses) == {200}
        assert (await gate.chat(model="chat_c")).status_code == 200
        assert not [line for line in gate.logged if line["level"] == "error"]


async def _lists(gate: Gate, name: str) -> bool:
    return any(name in model for model in await gate.models())


async def test_a_stream_that_began_before_a_reload_ends_after_it(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        standin.trickle(0.15)

        async with streaming(gate) as pieces:
            gate.file.write_text(gate.file.read_text().replace("model_id: chat", "model_id: another"))
            gate.tell(signal.SIGHUP)
            await wait_until(lambda: _lists(gate, "another"), seconds=20)
            rest = "".join([piece async for piece in pieces])

        assert rest.endswith("data: [DONE]\n\n")
        await wait_until(lambda: _told_of(gate))


async def _told_of(gate: Gate) -> float:
    """How many requests were recorded, or needed not be."""
    lines = (await gate.http.get("/metrics")).text.splitlines()
    counted = [line.split() for line in lines if not line.startswith("#")]
    names = ("sekha_recorder_recorded_total", "sekha_recorder_sampled_out_total")
    return sum(float(value) for name, value in counted if name in names)


async def test_a_broken_file_is_not_taken_over_and_everything_wrong_with_it_is_said(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        gate.file.write_text("providers: []\nbudget: 3\nunknown_price: perhaps\n")
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: [line for line in gate.logged if line["level"] == "error"])

        assert (await gate.chat()).status_code == 200
        [said] = [line["event"] for line in gate.logged if line["level"] == "error"]
        assert "Did you mean 'budgets'?" in said
        assert "must be one of refuse, free" in said


def _spoil(gate: Gate) -> None:
    with gate.file.open("a") as file:
        file.write("# \x1b[31mred\n")


def _give_no_text(gate: Gate) -> None:
    with gate.file.open("a") as file:
        file.write("budgets: [{name: all, limit: 1, match: {provider: first, model: [chat]}}]\n")


def _name_no_ledger(gate: Gate) -> None:
    other = gate.folder / "other"
    other.write_text("This is no database, and long enough to be told from one that is empty. " * 20)
    with gate.file.open("a") as file:
        file.write(f"ledger: {{url: 'sqlite:///{other}'}}\n")


def _name_no_place_for_a_ledger(gate: Gate) -> None:
    with gate.file.open("a") as file:
        file.write("ledger: {url: 'sqlite:////proc/nope/ledger.db'}\n")


def _block_the_spool(gate: Gate) -> None:
    recording = gate.folder / ".sekha/gateway/recording"
    recording.rename(recording.with_name("aside"))
    recording.write_text("in the way")


def _mend(gate: Gate, config: str) -> None:
    recording = gate.folder / ".sekha/gateway/recording"
    if recording.is_file():
        recording.unlink()
        recording.with_name("aside").rename(recording)
    gate.file.write_text(config)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "spoil", [_spoil, _give_no_text, _block_the_spool, _name_no_ledger, _name_no_place_for_a_ledger]
)
async def test_after_whatever_kept_a_file_from_being_taken_over_the_next_one_is(
    serving: Serves, workers: str, spoil: Callable[[Gate], None]
) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", workers) as gate:
        if workers != "1":
            await wait_until(lambda: len(gate.workers) == int(workers), seconds=20)
        config = gate.file.read_text()
        # The file is read once for all, and what it declares is opened by each.
        told = 1 if spoil in (_spoil, _give_no_text) else int(workers)
        spoil(gate)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("is not taken over" in event for event in gate.events) == told, seconds=20)
        _mend(gate, config.replace("model_id: chat", "model_id: another"))
        gate.tell(signal.SIGHUP)

        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == int(workers), seconds=20)
        assert (await gate.chat(model="another")).status_code == 200


async def test_what_holds_from_the_next_start_on_is_said(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        config = gate.file.read_text()
        gate.file.write_text(config + "server_port: 5999\nlog_level: debug\n")
        gate.tell(signal.SIGHUP)

        await wait_until(lambda: [event for event in gate.events if "server_port, log_level: changed" in event])
        gate.file.write_text(config)
        gate.tell(signal.SIGHUP)

        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == 2)
        gate.tell(signal.SIGTERM)
        await gate.ended()
        assert len([event for event in gate.events if "in effect with the next start" in event]) == 1


REMEMBERS = """
collections: {conversations: {model: vectors}, notes: {model: vectors}}
memory: {collection: conversations}
routing: {circuit_breaker: {failure_threshold: 2, timeout_secs: 1}}
"""


def _keys(*names: str) -> tuple[dict[str, dict[str, str]], str]:
    """Headers of keys by their name, and the file's section."""
    made = {name: new_key() for name in names}
    lines = "".join(f"  - {{name: {name}, hash: '{hash_of(key)}'}}\n" for name, key in made.items())
    return {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}, f"keys:\n{lines}"


async def _found(gate: Gate, collection: str, headers: dict[str, str]) -> set[str]:
    """What the last line of each question was that a key finds in a collection."""
    asked = {"query": "whales", "limit": 100, "collection": collection}
    said = (await gate.http.post("/api/v1/search", json=asked, headers=headers)).json()
    return {hit["content"].splitlines()[0].removeprefix("User: ") for hit in said.get("results", ())}


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_what_is_asked_after_a_reload_is_kept_where_the_new_file_says_though_a_stream_goes_on(
    serving: Serves, workers: str
) -> None:
    who, section = _keys("alice", "bob")
    async with (
        StandIn(dimension=8) as standin,
        serving(config_for(standin, extra=REMEMBERS + section), "--workers", workers) as gate,
    ):
        if workers != "1":
            await wait_until(lambda: len(gate.workers) == int(workers), seconds=20)
        gate.http.headers.update(who["bob"])
        standin.trickle(0.6)

        async with streaming(gate) as pieces:
            gate.file.write_text(gate.file.read_text().replace("{collection: conversations}", "{collection: notes}"))
            gate.tell(signal.SIGHUP)
            await wait_until(lambda: sum("was read anew" in each for each in gate.events) == int(workers), seconds=20)
            async with new_callers(gate):
                gate.http.headers.update(who["alice"])
                await gate.chat("Do whales sleep?")
                await wait_until(lambda: _found(gate, "notes", who["alice"]), seconds=5)
            while_it_goes_on = [await _found(gate, each, who["bob"]) for each in ("notes", "conversations")]
            rest = "".join([piece async for piece in pieces])
        await wait_until(lambda: _found(gate, "conversations", who["bob"]))

        assert "data: [DONE]" in rest
        assert while_it_goes_on == [set(), set()]
        assert await _found(gate, "conversations", who["bob"]) == {"one two three four five six"}
        assert await _found(gate, "notes", who["alice"]) == {"Do whales sleep?"}
        assert await _found(gate, "notes", who["bob"]) == set()


async def test_an_embedder_that_a_reload_mends_is_asked_though_a_stream_of_before_goes_on(serving: Serves) -> None:
    async with StandIn(dimension=8) as away, StandIn(dimension=8) as standin:
        away.fail(503, times=None)
        config = config_for(standin, extra=REMEMBERS.replace("model: vectors", "model: far")).replace(
            "providers:\n",
            f"providers:\n  - {{id: embeds, provider_type: openai, base_url: '{away.openai_url}', "
            "models: [{model_id: far, task: embedding, dimension: 8, price: free}]}\n",
        )
        async with serving(config) as gate:
            await gate.chat("Do whales sleep?")
            await wait_until(lambda: any("What is to be remembered waits" in each for each in gate.events))
            standin.trickle(0.8)

            async with streaming(gate) as pieces:
                gate.file.write_text(config.replace(away.openai_url, standin.openai_url))
                gate.tell(signal.SIGHUP)
                await wait_until(lambda: any("was read anew" in each for each in gate.events), seconds=20)
                asked_before = len(away.requests)
                await wait_until(lambda: _found(gate, "conversations", {}), seconds=4)
                rest = "".join([piece async for piece in pieces])

            assert "data: [DONE]" in rest
            assert len(away.requests) == asked_before


# --- several processes ---------------------------------------------------------------------


async def test_two_workers_serve_and_one_that_is_killed_is_replaced(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)
        for number in ("0", "1"):
            killed = gate.workers[number]

            os.kill(killed, signal.SIGKILL)
            async with new_callers(gate):
                assert [(await gate.chat()).status_code for _ in range(5)] == [200] * 5
                await wait_until(lambda number=number, killed=killed: gate.workers[number] != killed, seconds=20)
        async with new_callers(gate):
            counted = (await gate.http.get("/metrics")).text

        gate.tell(signal.SIGTERM)

        assert await gate.ended() == 0
        assert "sekha_workers 2" in counted
        spent, held = await money(gate)
        assert spent > 0
        assert held == 0


async def test_workers_take_another_file_over_together(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)
        gate.file.write_text(gate.file.read_text().replace("model_id: chat", "model_id: another"))

        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == 2, seconds=20)

        for _ in range(6):
            async with new_callers(gate):
                assert (await gate.chat(model="another")).status_code == 200


@pytest.mark.parametrize("changed", [False, True])
async def test_who_asked_to_be_left_alone_is_so_over_a_reload_unless_its_key_is_another(
    serving: Serves, changed: bool
) -> None:
    async with StandIn() as standin:
        config = config_for(standin).replace("priority: 1", "api_key: ${BEFORE}\n    priority: 1")
        async with serving(config, environment={"BEFORE": "sk-before", "AFTER": "sk-after"}) as gate:
            standin.fail(429, retry_after=300)
            before = await gate.chat(model="chat")
            if changed:
                gate.file.write_text(config.replace("BEFORE", "AFTER"))
            gate.tell(signal.SIGHUP)
            await wait_until(lambda: any("was read anew" in event for event in gate.events), seconds=20)
            after = await gate.chat(model="chat")

    assert (before.status_code, after.status_code) == ((429, 200) if changed else (429, 429))
    assert len(standin.requests) == (2 if changed else 1)


async def _replaced(gate: Gate, number: str) -> None:
    """Kill a worker, and wait for the one that comes in its place."""
    killed = gate.workers[number]
    os.kill(killed, signal.SIGKILL)
    await wait_until(lambda: gate.workers[number] != killed, seconds=20)


async def _models_of_all(gate: Gate) -> set[str]:
    found = set()
    for _ in range(6):
        async with new_callers(gate):
            found |= await gate.models()
    return found


async def test_a_file_that_was_taken_over_stays_though_a_worker_in_anothers_place_cannot_begin_with_it(
    serving: Serves,
) -> None:
    async with (
        StandIn(dimension=8) as standin,
        serving(config_for(standin, extra=REMEMBERS), "--workers", "2") as gate,
    ):
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)
        gate.file.write_text(gate.file.read_text().replace("model_id: chat", "model_id: another"))
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == 2, seconds=20)
        killed, memory = gate.workers["0"], gate.folder / ".sekha/gateway/memory"

        memory.rename(memory.with_name("aside"))
        memory.write_text("in the way")
        os.kill(killed, signal.SIGKILL)
        await wait_until(lambda: any("worker 0 does not start" in event for event in gate.events), seconds=20)
        memory.unlink()
        memory.with_name("aside").rename(memory)
        await wait_until(lambda: gate.workers["0"] != killed, seconds=20)
        await _replaced(gate, "1")

        assert {"first/another", "first/chat"} & await _models_of_all(gate) == {"first/another"}


async def test_a_worker_that_refuses_an_earlier_file_late_takes_nothing_back(serving: Serves) -> None:
    async with StandIn(dimension=8) as standin, serving(config_for(standin), "--workers", "2") as gate:
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)
        config = gate.file.read_text()
        (gate.folder / ".sekha/gateway/memory").write_text("in the way")

        os.kill(gate.workers["0"], signal.SIGSTOP)
        gate.file.write_text(config + REMEMBERS)
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("is not taken over" in event for event in gate.events) == 1, seconds=20)
        gate.file.write_text(config.replace("model_id: chat", "model_id: another"))
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == 1, seconds=20)
        os.kill(gate.workers["0"], signal.SIGCONT)
        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == 2, seconds=20)
        for number in ("0", "1"):
            await _replaced(gate, number)

        assert {"first/another", "first/chat"} & await _models_of_all(gate) == {"first/another"}


@pytest.mark.parametrize("workers", ["1", "3"])
async def test_a_keys_limit_is_one_for_all_workers_and_over_a_reload(serving: Serves, workers: str) -> None:
    key = new_key()
    limited = f"keys:\n  - {{name: one, hash: '{hash_of(key)}', requests_per_minute: 4}}"
    async with StandIn() as standin, serving(config_for(standin, extra=limited), "--workers", workers) as gate:
        if workers != "1":
            await wait_until(lambda: len(gate.workers) == int(workers), seconds=20)
        key_header = {"Authorization": f"Bearer {key}"}

        async def ask() -> int:
            async with new_callers(gate):
                gate.http.headers.update(key_header)
                return (await gate.chat(model="chat")).status_code

        before = [await ask() for _ in range(2)]
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: sum("was read anew" in event for event in gate.events) == int(workers), seconds=20)
        after = [await ask() for _ in range(6)]

        assert before == [200] * 2
        assert after == [200] * 2 + [429] * 4
        assert len(standin.requests) == 4


async def test_one_connection_may_use_all_of_a_keys_limit(serving: Serves) -> None:
    key = new_key()
    limited = f"keys:\n  - {{name: one, hash: '{hash_of(key)}', requests_per_minute: 10}}"
    async with StandIn() as standin, serving(config_for(standin, extra=limited), "--workers", "3") as gate:
        gate.http.headers["Authorization"] = f"Bearer {key}"

        assert [(await gate.chat(model="chat")).status_code for _ in range(12)] == [200] * 10 + [429] * 2


async def test_workers_end_when_whoever_started_them_is_killed(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)

        gate.tell(signal.SIGKILL)

        await gate.ended()
        await wait_until(lambda: not left_behind(gate.folder), seconds=20)
        assert not await gate.connects()


async def test_a_worker_that_takes_a_file_over_when_nobody_hears_of_it_any_more_ends(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        await wait_until(lambda: len(gate.workers) == 2, seconds=20)
        late = gate.workers["0"]

        os.kill(late, signal.SIGSTOP)
        gate.file.write_text(gate.file.read_text().replace("model_id: chat", "model_id: another"))
        gate.tell(signal.SIGHUP)
        await wait_until(lambda: any("was read anew" in event for event in gate.events), seconds=20)
        gate.tell(signal.SIGKILL)
        await wait_until(lambda: not any("serve" in line.split() for line in left_behind(gate.folder)), seconds=20)
        os.kill(late, signal.SIGCONT)

        await wait_until(lambda: not left_behind(gate.folder), seconds=20)


def _shared_folder(gate: Gate) -> Path:
    """Where its workers count together, as their command lines have it."""
    return Path(Path(f"/proc/{gate.workers['0']}/cmdline").read_bytes().split(b"\0")[-2].decode())


async def test_what_killed_ones_have_left_in_memory_is_removed_by_the_next_and_nothing_of_the_living(
    serving: Serves,
) -> None:
    async with StandIn() as standin:
        config = config_for(standin)
        async with serving(config, "--workers", "2") as first, serving(config, "--workers", "2") as second:
            gates = (first, second)
            await wait_until(lambda: all(len(gate.workers) == 2 for gate in gates), seconds=20)
            folders = [_shared_folder(gate) for gate in gates]
            with_both = [folder.exists() for folder in folders]
            for gate in gates:
                gate.tell(signal.SIGKILL)
                await gate.ended()
        left = [folder.exists() for folder in folders]

        async with serving(config, "--workers", "2") as third:
            await wait_until(lambda: len(third.workers) == 2, seconds=20)
            then = [folder.exists() for folder in (*folders, _shared_folder(third))]

    assert with_both == [True, True]
    assert left == [True, True]
    assert then == [False, False, True]


async def test_a_stream_of_a_worker_ends_whole_after_sigterm(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), "--workers", "2") as gate:
        standin.trickle(0.15)

        async with streaming(gate) as pieces:
            gate.tell(signal.SIGTERM)
            await wait_until(lambda: _refused(gate))
            rest = "".join([piece async for piece in pieces])

        assert rest.endswith("data: [DONE]\n\n")
        assert await gate.ended() == 0


# --- what it lets nobody do ----------------------------------------------------------------


async def test_headers_that_never_end_are_cut(gateway: Opens) -> None:
    async with gateway() as served, listening(served.gateway, head_seconds=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: here\r\nX-Slow: ")

        async with asyncio.timeout(5):
            left = await reader.read()

        assert left == b""
        writer.close()


async def test_the_process_that_serves_imports_neither_prefect_nor_litellm(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin), python=("-X", "importtime")) as gate:
        assert (await gate.chat()).status_code == 200

        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in gate.lines if "import time:" in line}

        assert "sekha" in imported
        assert not imported & {"prefect", "litellm", "fastapi", "weaviate", "rich"}


async def test_litellm_is_imported_before_anybody_asks_where_a_provider_needs_it(serving: Serves) -> None:
    async with (
        StandIn() as standin,
        serving(config_for(standin, kind="ollama"), python=("-X", "importtime")) as gate,
    ):
        await wait_until(lambda: any(line.endswith(" litellm") for line in gate.lines), seconds=80)

    assert standin.requests == []


async def test_every_request_is_one_line_of_json_without_what_was_asked(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        answered = await gate.chat("a secret of mine", model="chat")
        await gate.http.post("/v1/chat/completions", json={"messages": "wrong"})

        await wait_until(lambda: sum(event == "request" for event in gate.events) == 2)
        good, bad = (line for line in gate.logged if line["event"] == "request")
        assert good["request_id"] == answered.headers["x-request-id"]
        assert (good["status"], good["provider"], good["model"], good["outcome"]) == (200, "first", "chat", "answered")
        assert good["cost"] > 0
        assert (bad["status"], bad["error"]) == (400, "invalid_request")
        assert all(line.startswith("{") for line in gate.lines)
        assert not [line for line in gate.lines if "secret" in line]


async def test_what_is_no_http_is_one_line_of_json_too(serving: Serves) -> None:
    async with StandIn() as standin, serving(config_for(standin)) as gate:
        reader, writer = await asyncio.open_connection(gate.http.base_url.host, gate.http.base_url.port)
        writer.write(b"POST /v1/embeddings HTTP/1.1\r\nx-request-id: mine\r\ncontent-length: -1\r\n\r\n")
        await reader.read()
        writer.close()

        await wait_until(lambda: "request" in gate.events)
        (line,) = (line for line in gate.logged if line["event"] == "request")
        assert (line["request_id"], line["method"], line["path"]) == ("mine", "POST", "/v1/embeddings")
        assert (line["status"], line["error"]) == (400, "invalid_request")
        metrics = (await gate.http.get("/metrics")).text
        assert 'sekha_requests_total{path="other",status="400"} 1' in metrics
        assert "sekha_requests_under_way 1" in metrics
