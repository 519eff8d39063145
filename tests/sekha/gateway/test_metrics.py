"""What Prometheus reads: right by its own parser, added up over workers, and never going back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sekha.breaker import BreakerRules
from sekha.circuits import Circuits
from sekha.errors import ProviderUnavailable
from sekha.gateway.metrics import Metrics
from sekha.testing import StandIn
from tests.fixtures.gateway import Opens, wait_until


@dataclass(frozen=True)
class Scrape:
    """Samples by name and labels, as Prometheus's own client reads them."""

    text: str

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"{name} {labels} is not there"
        return sum(found)


def scrape(metrics: Metrics) -> Scrape:
    return Scrape("\n".join([*metrics.text(), ""]))


def answered(metrics: Metrics, times: int = 1) -> None:
    for _ in range(times):
        metrics.request("/v1/chat/completions", 200, 0.02)
        metrics.call("openai", "gpt", "answered", 0.015)
        metrics.first("openai", "gpt", 0.01)
        metrics.spent("openai", "gpt", 10, 20, Decimal("0.001"))


# --- one worker ----------------------------------------------------------------------------


async def test_what_was_asked_answered_and_paid_is_counted(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1))
    async with StandIn() as first, StandIn() as second, gateway(first, second, circuits=circuits) as served:
        first.fail(500)
        await served.chat(model="chat")
        await served.stream(model="chat")
        await served.chat(model="nobody's")

        said = Scrape((await served.http.get("/metrics")).text)

        chats = "/v1/chat/completions"
        assert said.value("sekha_requests_total", path=chats, status="200") == 2
        assert said.value("sekha_requests_total", path=chats, status="404") == 1
        assert said.value("sekha_request_seconds_count", path=chats) == 3
        assert said.value("sekha_request_seconds_bucket", path=chats, le="+Inf") == 3
        assert said.value("sekha_provider_calls_total", provider="first", outcome="provider_unavailable") == 1
        assert said.value("sekha_provider_calls_total", provider="second", outcome="answered") == 2
        assert said.value("sekha_first_token_seconds_count") == 1
        assert said.value("sekha_tokens_total", kind="output") > 0
        assert said.value("sekha_dollars_total") == pytest.approx(float(await served.spent()))
        assert said.value("sekha_requests_under_way") == 1  # this one
        assert said.value("sekha_workers") == 1


@pytest.mark.parametrize("as_served", [False, True], ids=["line", "short way"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_calls_for_a_caller_who_left_are_counted_the_one_that_was_cut_too(
    gateway: Opens, as_served: bool, stream: bool
) -> None:
    async with StandIn() as first, StandIn() as second, gateway(first, second, as_served=as_served) as served:
        await served.chat(model="chat")
        first.fail(500)
        if stream:
            second.stall(after=3)
        else:
            second.hang()
        asking = asyncio.create_task(served.chat(model="chat", stream=stream))
        await second.arrived.wait()
        asking.cancel()
        await wait_until(lambda: not served.serving.under_way)

        said = Scrape((await served.http.get("/metrics")).text)

    assert said.value("sekha_provider_calls_total", provider="first", outcome="provider_unavailable") == 1
    assert said.value("sekha_provider_calls_total", provider="second", outcome="cancelled") == 1
    assert said.value("sekha_provider_seconds_count", provider="first") == 2
    assert said.value("sekha_provider_seconds_count", provider="second") == 1


async def test_the_state_of_circuits_and_budgets_is_told(gateway: Opens) -> None:
    circuits = Circuits(BreakerRules(failure_threshold=1))
    async with StandIn() as standin, gateway(standin, circuits=circuits) as served:
        await served.chat()
        circuits.note("first/eyes", ProviderUnavailable(provider_id="first", model_id="eyes"))

        said = Scrape((await served.http.get("/metrics")).text)

        assert said.value("sekha_circuit_state", provider="first", model="eyes", state="open") == 1
        assert said.value("sekha_circuit_state", provider="first", model="eyes", state="closed") == 0
        assert said.value("sekha_circuit_state", provider="first", model="chat", state="closed") == 1
        assert said.value("sekha_circuit_failures", model="eyes") == 1
        assert said.value("sekha_budget_limit_dollars", budget="all", period="month") == 1000
        assert said.value("sekha_budget_left_dollars", budget="all") == pytest.approx(
            1000 - float(await served.spent())
        )
        assert said.value("sekha_ledger_up") == 1


async def test_without_its_ledger_a_gateway_still_counts(gateway: Opens, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    async with StandIn() as standin, gateway(standin, extra="ledger: {url: 'sqlite:///taken'}\n") as served:
        said = Scrape((await served.http.get("/metrics")).text)

        assert said.value("sekha_ledger_up") == 0
        assert said.value("sekha_budget_limit_dollars") == 1000
        assert "sekha_budget_left_dollars" not in said.text


async def test_paths_that_are_not_there_are_counted_as_one(gateway: Opens) -> None:
    async with StandIn() as standin, gateway(standin) as served:
        for path in ("/admin", "/.env", "/v1/models/one", "/v1/models/two"):
            await served.http.get(path)

        said = Scrape((await served.http.get("/metrics")).text)

        assert said.value("sekha_requests_total", path="other", status="404") == 2
        assert said.value("sekha_requests_total", path="/v1/models/{model}", status="404") == 2


def test_a_label_is_read_back_as_it_was_written() -> None:
    metrics = Metrics()
    name = 'a "model"\nwith \\ in it'

    metrics.call("openai", name, "answered", 0.1)

    assert scrape(metrics).value("sekha_provider_calls_total", model=name) == 1


async def test_how_late_the_event_loop_is_shows_once_it_is_measured() -> None:
    metrics = Metrics()
    assert "sekha_event_loop_lag_seconds_count" not in scrape(metrics).text

    metrics.start()
    await wait_until(lambda: scrape(metrics).value("sekha_event_loop_lag_seconds_count") > 0)
    metrics.close()

    assert scrape(metrics).value("sekha_event_loop_lag_seconds_bucket", le="+Inf") >= 1


@dataclass(frozen=True)
class Counts:
    recorded: int = 0
    sampled_out: int = 0
    dropped: int = 0


class FakeRecorder:
    def __init__(self) -> None:
        self.stats = Counts()


def test_what_was_recorded_goes_on_with_another_recorder() -> None:
    metrics, first, second = Metrics(), FakeRecorder(), FakeRecorder()
    metrics.follow(first)
    first.stats = Counts(recorded=5, sampled_out=2)
    metrics.follow(second)
    metrics.follow(second)
    second.stats = replace(second.stats, recorded=3, dropped=1)
    before = scrape(metrics).value("sekha_recorder_recorded_total")
    first.stats = replace(first.stats, recorded=6)
    metrics.leave(first)
    first.stats = replace(first.stats, recorded=100)

    said = scrape(metrics)

    assert before == 8
    assert said.value("sekha_recorder_recorded_total") == 9
    assert said.value("sekha_recorder_sampled_out_total") == 2
    assert said.value("sekha_recorder_dropped_total") == 1
    assert scrape(metrics).text == said.text


# --- several workers -----------------------------------------------------------------------


def test_whichever_worker_is_asked_answers_for_all(tmp_path: Path) -> None:
    workers = [Metrics(tmp_path, number) for number in range(3)]
    for number, worker in enumerate(workers, start=1):
        answered(worker, number)
        worker.under_way = number
        worker.write()

    for worker in workers:
        said = scrape(worker)

        assert said.value("sekha_requests_total") == 6
        assert said.value("sekha_request_seconds_count") == 6
        assert said.value("sekha_request_seconds_sum") == pytest.approx(0.12)
        assert said.value("sekha_request_seconds_bucket", le="0.025") == 6
        assert said.value("sekha_request_seconds_bucket", le="0.01") == 0
        assert said.value("sekha_tokens_total", kind="input") == 60
        assert said.value("sekha_dollars_total") == pytest.approx(0.006)
        assert said.value("sekha_requests_under_way") == 6
        assert said.value("sekha_workers") == 3


_WORKER = """
import sys, time
from decimal import Decimal
from pathlib import Path
from sekha.gateway.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), 1)
for _ in range(7):
    metrics.request("/v1/chat/completions", 200, 0.02)
metrics.under_way = 3
metrics.write()
print("written", flush=True)
time.sleep(60)
"""


def test_what_a_killed_worker_counted_is_kept_and_taken_over(tmp_path: Path) -> None:
    alive = Metrics(tmp_path, 0)
    answered(alive)
    worker = subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "written\n"
    before = scrape(alive)

    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    between = scrape(alive)
    next_of_its_number = Metrics(tmp_path, 1)
    answered(next_of_its_number)
    next_of_its_number.write()
    after = scrape(alive)

    assert [said.value("sekha_requests_total") for said in (before, between, after)] == [8, 8, 9]
    assert [said.value("sekha_requests_under_way") for said in (before, between, after)] == [3, 0, 0]
    assert [said.value("sekha_workers") for said in (before, between, after)] == [2, 1, 2]
    assert scrape(next_of_its_number).value("sekha_requests_total") == 9
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_ends_leaves_its_counts_to_the_next(tmp_path: Path) -> None:
    for _ in range(5):
        worker = Metrics(tmp_path, 0)
        answered(worker)
        worker.close()

    assert scrape(Metrics(tmp_path, 0)).value("sekha_requests_total") == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_two_workers_of_one_number_do_not_take_each_others_counts(tmp_path: Path) -> None:
    leaving, coming = Metrics(tmp_path, 0), Metrics(tmp_path, 0)
    answered(leaving)
    answered(coming)
    leaving.close()

    assert scrape(coming).value("sekha_requests_total") == 2


def test_what_is_no_workers_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / f"worker-3-{os.getpid()}-1.json").write_text("{")
    (tmp_path / f"worker-4-{os.getpid()}-1.json").write_text('{"counters": {"another": []}}')
    worker = Metrics(tmp_path, 0)
    answered(worker)

    assert scrape(worker).value("sekha_requests_total") == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Metrics(tmp_path / "gone", 0)
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    (tmp_path / "gone").rmdir()

    answered(worker)
    worker.write()
    said = scrape(worker)

    assert said.value("sekha_requests_total") == 1
    assert len(caplog.records) == 1
