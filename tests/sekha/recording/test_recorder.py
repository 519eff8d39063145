"""The recorder and its publisher as processes: what is recorded arrives, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from sekha.config import RecordingSection
from sekha.recording.publisher import read_report
from sekha.recording.recorder import Recorder
from sekha.recording.run import Run
from sekha.recording.spool import SpoolReader
from tests.fixtures.prefect import Server
from tests.sekha.recording.conftest import Tables, copy_of_tables

# These need Prefect's tables, which the session's server has made.
pytestmark = pytest.mark.prefect

Makes: TypeAlias = Callable[..., Run]
Until: TypeAlias = Callable[..., Any]

EVERYTHING = RecordingSection(max_per_second=1e9)
NOBODY = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_API_DATABASE_CONNECTION_URL": ""}
NOWHERE = {"PREFECT_API_URL": "", "PREFECT_API_DATABASE_CONNECTION_URL": ""}


async def test_what_is_recorded_is_published_with_its_own_id(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    runs = [make_run() for _ in range(500)]
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment) as recorder:
        for run in runs:
            recorder.record(run)
        stats = await until(recorder, lambda stats: stats.published == 500)

    assert sorted(tables.run_ids()) == sorted(run.id for run in runs)
    assert (stats.recorded, stats.dropped, stats.refused) == (500, 0, 0)
    assert recorder.stats.queued_bytes == 0


async def test_a_killed_publisher_is_started_anew_and_nothing_is_lost_or_twice_there(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    runs = [make_run() for _ in range(6_000)]
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment) as recorder:
        for run in runs:
            recorder.record(run)
        await until(recorder, lambda stats: stats.published > 0)
        first = read_report(tmp_path / "spool").process_id
        os.kill(first, signal.SIGKILL)
        await until(recorder, lambda stats: stats.queued_bytes == 0)

    assert read_report(tmp_path / "spool").process_id != first
    assert sorted(tables.run_ids()) == sorted(run.id for run in runs)
    assert tables.rows("SELECT count(*) FROM task_run") == [(5 * 6_000,)]


async def test_a_database_that_is_replaced_gets_what_is_recorded_from_then_on(
    tables: Tables, prefect: Server, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    copy_of_tables(prefect, tmp_path / "restored.db")
    before, after = make_run(), make_run()
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment) as recorder:
        recorder.record(before)
        await until(recorder, lambda stats: stats.published == 1)
        for beside in ("-wal", "-shm"):
            tables.file.with_name(f"{tables.file.name}{beside}").unlink(missing_ok=True)
        tables.file.unlink()
        recorder.record(after)
        await until(recorder, lambda stats: stats.waits_for)
        (tmp_path / "restored.db").rename(tables.file)
        stats = await until(recorder, lambda stats: stats.published == 2)

    assert (stats.sampled_out, stats.refused) == (0, 0)
    assert tables.run_ids() == [after.id]


async def test_a_publisher_stands_back_behind_whoever_serves(tables: Any, tmp_path: Path, until: Until) -> None:
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment) as recorder:
        await until(recorder, lambda stats: stats.sink)
        publisher = read_report(tmp_path / "spool").process_id

        assert os.getpriority(os.PRIO_PROCESS, publisher) >= 10
        if sys.platform == "linux":  # no other system has this way of waiting for a core
            assert os.sched_getscheduler(publisher) in (os.SCHED_BATCH, os.SCHED_IDLE)


GATEWAY = """
    import asyncio, sys, time
    from pathlib import Path
    from sekha.config import RecordingSection
    from sekha.recording.recorder import Recorder
    from sekha.recording.run import Run, new_run_id

    async def main():
        recorder = Recorder(RecordingSection(max_per_second=1e9), Path(sys.argv[1]))
        await recorder.start()
        for number in range(1_000):
            now = time.time()
            times = {"started_at": now, "ended_at": now + 1}
            recorder.record(Run(id=new_run_id(), flow="chat", name=str(number), outcome="answered", **times))
        while recorder._pending or not recorder._publisher:
            await asyncio.sleep(0.01)
        print(recorder._publisher.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


async def test_a_killed_gateway_takes_its_publisher_with_it_and_loses_nothing(
    tables: Any, tmp_path: Path, until: Until
) -> None:
    spool = tmp_path / "spool"
    gateway = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", textwrap.dedent(GATEWAY), str(spool)),
        env={**os.environ, **tables.environment},
        stdout=subprocess.PIPE,
    )
    assert gateway.stdout is not None
    publisher = int(await gateway.stdout.readline())

    gateway.kill()
    await gateway.wait()
    await ended(publisher)
    async with Recorder(EVERYTHING, spool, environment=tables.environment) as recorder:
        await until(recorder, lambda stats: stats.sink and stats.queued_bytes == 0)

    assert len(tables.run_ids()) == 1_000


async def ended(process_id: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                os.kill(process_id, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.05)


@pytest.mark.soak
@pytest.mark.timeout(200)
async def test_ten_minutes_without_prefect_at_the_full_rate_lose_nothing(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    """Ten minutes by what they leave in the spool, which takes seconds: 50 runs for each of their seconds."""
    runs = [make_run() for _ in range(10 * 60 * 50)]
    [(revision,)] = tables.rows("SELECT version_num FROM alembic_version")
    tables.execute("UPDATE alembic_version SET version_num = 'upgrading'")
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment) as recorder:
        await until(recorder, lambda stats: stats.waits_for)
        for number, run in enumerate(runs):
            recorder.record(run)
            if number % 500 == 0:
                await until(recorder, lambda _: len(recorder._pending) < 500)
        await until(recorder, lambda stats: not recorder._pending)
        away = recorder.stats

        tables.execute(f"UPDATE alembic_version SET version_num = '{revision}'")
        await until(recorder, lambda stats: stats.published)
        began, before = time.monotonic(), recorder.stats.published
        stats = await until(recorder, lambda stats: stats.published >= len(runs))
        per_second = (len(runs) - before) / (time.monotonic() - began)

    assert (away.recorded, away.dropped, away.published) == (len(runs), 0, 0)
    assert (stats.published, stats.dropped, stats.refused) == (len(runs), 0, 0)
    assert sorted(tables.run_ids()) == sorted(run.id for run in runs)
    assert tables.rows("SELECT count(*) FROM task_run") == [(5 * len(runs),)]
    assert recorder.stats.queued_bytes == 0
    assert per_second > 500


async def test_gateways_on_one_folder_share_a_publisher_and_hand_it_on(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until
) -> None:
    first = Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment)
    second = Recorder(EVERYTHING, tmp_path / "spool", environment=tables.environment)
    await first.start()
    await until(first, lambda stats: stats.sink)
    await second.start()
    async with second:
        second.record(make_run())
        await until(second, lambda stats: stats.published == 1)
        of_first = read_report(tmp_path / "spool").process_id
        await first.aclose()

        second.record(make_run())
        await until(second, lambda stats: stats.published == 2)

    assert read_report(tmp_path / "spool").process_id != of_first
    assert len(tables.run_ids()) == 2


async def test_while_requests_come_what_is_recorded_waits_for_a_moment_without_them_and_not_for_long(
    tmp_path: Path, make_run: Makes
) -> None:
    def handed_over() -> int:
        return len(SpoolReader(tmp_path / "spool").ready())

    async with Recorder(EVERYTHING, tmp_path / "spool", environment=NOWHERE, publish_after_seconds=60) as recorder:

        async def serve(seconds: float) -> list[int]:
            ends, found = time.monotonic() + seconds, []
            while time.monotonic() < ends:
                recorder.record(make_run())
                await asyncio.sleep(0.02)
                found.append(handed_over())
            return found

        at_once = await serve(1.4)
        await asyncio.sleep(1.2)
        quiet = handed_over()
        for_long = await serve(4.0)

    assert max(at_once) == 0
    assert quiet == 1
    assert quiet < for_long[-1] <= quiet + 2


async def test_an_event_waits_for_no_quiet_moment(tmp_path: Path, make_run: Makes) -> None:
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=NOWHERE, publish_after_seconds=60) as recorder:
        await asyncio.sleep(0.1)
        recorder.event("sekha.circuit.opened", "sekha.circuit.openai/gpt-5-mini", {})
        ends = time.monotonic() + 1.2
        while time.monotonic() < ends:
            recorder.record(make_run())
            await asyncio.sleep(0.02)

        assert SpoolReader(tmp_path / "spool").ready()


async def test_what_was_lost_is_told_once_there_is_room(tmp_path: Path, make_run: Makes, until: Until) -> None:
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=NOBODY) as recorder:
        recorder.record(make_run(parameters={"model": object()}))
        await until(recorder, lambda stats: stats.dropped and stats.queued_bytes)
    reader = SpoolReader(tmp_path / "spool")
    (event,) = [event for path in reader.ready() for event in reader.read(path).events]

    assert (event.name, event.payload) == ("sekha.recorder.dropped", {"dropped": 1, "in_all": 1})


async def test_a_full_spool_drops_what_is_ordinary_first_and_counts_it(
    tmp_path: Path, make_run: Makes, until: Until
) -> None:
    recorder = Recorder(EVERYTHING, tmp_path / "spool", environment=NOBODY, max_bytes=100_000)
    async with recorder:
        recorded = 0
        while not recorder.stats.dropped:
            recorder.record(make_run())
            recorded += 1
            if recorded % 20 == 0:
                await until(recorder, lambda _: not recorder._pending)
        before = recorder.stats

        for _ in range(5):
            recorder.record(make_run())
            recorder.record(make_run(outcome="failed", error="rate_limited", message="It is too much."))
        stats = recorder.stats

    assert before.dropped == 1
    assert before.recorded == recorded - 1
    assert stats.dropped == 6
    assert stats.recorded == before.recorded + 5
    assert stats.kept == 5
    assert 75_000 <= recorder.stats.queued_bytes <= 100_000


async def test_what_json_cannot_say_is_dropped_and_counted(tmp_path: Path, make_run: Makes) -> None:
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=NOBODY) as recorder:
        recorder.record(make_run(parameters={"model": object()}))
        recorder.record(make_run(parameters={"model": "\ud800"}))
        recorder.record(make_run())

    assert (recorder.stats.recorded, recorder.stats.dropped) == (3, 2)


async def test_without_a_prefect_server_nothing_is_kept(tmp_path: Path, make_run: Makes, until: Until) -> None:
    async with Recorder(EVERYTHING, tmp_path / "spool", environment=NOWHERE) as recorder:
        await until(recorder, lambda stats: stats.sink == "nowhere")

        assert not recorder.wants(outcome="failed", seconds=1.0)
        assert recorder.stats.sampled_out == 1


@pytest.mark.parametrize("publish_after_seconds", [0.0, 1.0])
async def test_a_server_that_is_named_anew_is_told_all_from_the_start_on(
    tables: Any, tmp_path: Path, make_run: Makes, until: Until, publish_after_seconds: float
) -> None:
    spool = tmp_path / "spool"
    async with Recorder(EVERYTHING, spool, environment=NOWHERE) as before:
        await until(before, lambda stats: stats.sink == "nowhere")
    runs: list[Run] = []
    named = Recorder(EVERYTHING, spool, environment=tables.environment, publish_after_seconds=publish_after_seconds)
    async with named, asyncio.timeout(90):
        while not named.stats.published:
            if named.wants(outcome="answered", seconds=0.3):
                runs.append(make_run())
                named.record(runs[-1])
            await asyncio.sleep(0.05)
        await until(named, lambda stats: stats.published == len(runs))

    assert named.stats.sampled_out == 0
    assert len(tables.run_ids()) == len(runs)


def test_recording_costs_a_request_less_than_twenty_microseconds(tmp_path: Path, make_run: Makes) -> None:
    recorder = Recorder(EVERYTHING, tmp_path / "spool")
    run, taken = make_run(), []

    for _ in range(5_000):
        started = time.perf_counter()
        if recorder.wants(outcome="answered", seconds=0.3):
            recorder.record(run)
        taken.append(time.perf_counter() - started)

    assert sorted(taken)[2_500] < 20e-6
