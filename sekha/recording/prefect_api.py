"""Prefect's API as a sink, for servers elsewhere and for tables that we do not know. Loaded by the publisher alone.

It takes a few runs a second, and stamps flow runs with its own time: theirs is in their parameters, and
exact in their task runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal

import httpx
from prefect.client.orchestration import get_client

from sekha.errors import PrefectUnavailable, RecordError
from sekha.recording.prefect_rows import (
    StepRun,
    parameters_of,
    receipt,
    said_of,
    state_of,
    steps_of,
    tags_of,
)
from sekha.recording.run import Event, Run

__all__ = ["ApiSink"]

Path = Literal["/flows/", "/flow_runs/", "/artifacts/", "/artifacts/filter", "/events"]

# What the server says of the request itself, and will say again.
REFUSES = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}


class ApiSink:
    """The server of Prefect's own settings, with its login, key and certificates."""

    name = "Prefect's API"
    # A default server on PostgreSQL bears ten, and one on SQLite answers 503 soon after.
    runs_per_second: float | None = 5.0

    def __init__(self) -> None:
        self._open = ExitStack()
        self._flow_ids: dict[str, str] = {}
        try:
            self._client = self._open.enter_context(get_client(sync_client=True))
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            raise PrefectUnavailable(f"Prefect's API cannot be used: {type(error).__name__}.") from error

    def flow_id(self, name: str) -> str:
        if name not in self._flow_ids:
            self._flow_ids[name] = str(self._post("/flows/", {"name": name})["id"])
        return self._flow_ids[name]

    def publish(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._publish(run)

    def emit(self, events: Sequence[Event]) -> None:
        if events:
            self._post("/events", [_event(each) for each in events])

    def close(self) -> None:
        self._open.close()

    def _publish(self, run: Run) -> None:
        kind, state_name = state_of(run)
        times = {"run_id": run.id, "started_at": _moment(run.started_at), "seconds": round(run.seconds, 6)}
        body = {
            "flow_id": self.flow_id(run.flow),
            "name": run.name,
            "parameters": parameters_of(run) | times,
            "tags": tags_of(run),
            "state": {"type": kind, "name": state_name, "message": said_of(run)},
            # The same run sent twice is one run.
            "idempotency_key": run.id,
        }
        status, flow_run = self._send("/flow_runs/", body)
        flow_run_id = str(flow_run["id"])
        if run.steps:
            # A task run refers to its flow run, which has to be there first.
            self._post("/events", [_task_run_event(step, flow_run_id) for step in steps_of(run)])
        # An artifact has no such key: where the run was there before, its artifact may be too.
        if (markdown := receipt(run)) and (status == HTTPStatus.CREATED or not self._has_artifact(flow_run_id)):
            artifact = {"type": "markdown", "data": markdown, "flow_run_id": flow_run_id}
            self._post("/artifacts/", {**artifact, "description": "Who was asked."})

    def _has_artifact(self, flow_run_id: str) -> bool:
        wanted = {"flow_run_id": {"any_": [flow_run_id]}}
        return bool(self._post("/artifacts/filter", {"artifacts": wanted, "limit": 1}))

    def _post(self, path: Path, body: Any) -> Any:
        return self._send(path, body)[1]

    def _send(self, path: Path, body: Any) -> tuple[int, Any]:
        """The status of an answer, and what it says."""
        try:
            response = self._client.request("POST", path, json=body)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in REFUSES:
                raise RecordError(f"Prefect's API does not take what is sent to {path}: {status}.") from error
            raise PrefectUnavailable(f"Prefect's API answers {status} to {path}.") from error
        except httpx.HTTPError as error:
            raise PrefectUnavailable(f"Prefect's API does not answer: {type(error).__name__}.") from error
        return response.status_code, response.json() if response.content else None


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "occurred": _moment(event.occurred_at),
        "event": event.name,
        "resource": {"prefect.resource.id": event.resource},
        "related": [],
        "payload": dict(event.payload),
    }


def _task_run_event(step: StepRun, flow_run_id: str) -> dict[str, Any]:
    """What Prefect's client tells of a task run that ended. The server makes the task run of it."""
    kind, state_name = step.state
    return {
        "id": step.id,
        "occurred": _moment(step.ended_at),
        "event": f"prefect.task-run.{state_name}",
        "resource": {
            "prefect.resource.id": f"prefect.task-run.{step.id}",
            "prefect.resource.name": step.name,
            "prefect.run-count": "1",
            "prefect.state-message": step.message or "",
            "prefect.state-name": state_name,
            "prefect.state-timestamp": _moment(step.ended_at),
            "prefect.state-type": kind,
            "prefect.orchestration": "client",
        },
        "related": [
            {"prefect.resource.id": f"prefect.flow-run.{flow_run_id}", "prefect.resource.role": "flow-run"},
        ],
        "payload": {
            "intended": {"from": None, "to": kind},
            "initial_state": None,
            "validated_state": {
                "type": kind,
                "name": state_name,
                "message": step.message,
                "state_details": {},
                "data": None,
            },
            "task_run": {
                "name": step.name,
                "task_key": step.step,
                "dynamic_key": step.id,
                "run_count": 1,
                "flow_run_run_count": 1,
                "tags": [],
                "task_inputs": step.inputs,
                "expected_start_time": _moment(step.started_at),
                "start_time": _moment(step.started_at),
                "end_time": _moment(step.ended_at),
                "total_run_time": step.ended_at - step.started_at,
            },
        },
    }


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
