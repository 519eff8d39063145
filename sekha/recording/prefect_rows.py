"""How a request looks in Prefect: the rows of its tables, and the words in them. It imports nothing of Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias

import orjson

from sekha.calling import Attempt
from sekha.errors import dollars
from sekha.recording.joining import BETWEEN
from sekha.recording.run import Run
from sekha.values import value

__all__ = [
    "RECORDED",
    "TABLES",
    "Row",
    "StepRun",
    "moment",
    "parameters_of",
    "receipt",
    "rows_of",
    "said_of",
    "state_of",
    "steps_of",
    "tags_of",
]

Row: TypeAlias = tuple[Any, ...]

TABLES: dict[str, tuple[str, ...]] = {
    "flow_run": (
        "id",
        "created",
        "updated",
        "name",
        "flow_id",
        "state_id",
        "state_type",
        "state_name",
        "run_count",
        "expected_start_time",
        "start_time",
        "end_time",
        "total_run_time",
        "parameters",
        "tags",
    ),
    "flow_run_state": ("id", "created", "updated", "flow_run_id", "type", "name", "timestamp", "message"),
    "task_run": (
        "id",
        "created",
        "updated",
        "name",
        "flow_run_id",
        "task_key",
        "dynamic_key",
        "state_id",
        "state_type",
        "state_name",
        "run_count",
        "flow_run_run_count",
        "expected_start_time",
        "start_time",
        "end_time",
        "total_run_time",
        "task_inputs",
    ),
    "task_run_state": ("id", "created", "updated", "task_run_id", "type", "name", "timestamp", "message"),
    "artifact": ("id", "created", "updated", "type", "data", "flow_run_id", "description"),
}
"""The columns that are written, by table, in an order in which each row finds what it refers to."""

RECORDED = "sekha:gateway"
"""The tag of every run that a gateway recorded, by which retention finds them."""

_DAY = len("2026-11-18")
_SECOND = len("2026-11-18 11:06:40")

State: TypeAlias = tuple[str, str]
"""Prefect's type of a state, and its name."""

COMPLETED: State = ("COMPLETED", "Completed")
FAILED: State = ("FAILED", "Failed")
CANCELLED: State = ("CANCELLED", "Cancelled")
_STATES: dict[str, State] = {
    "answered": COMPLETED,
    "fallback": COMPLETED,
    "failed": FAILED,
    "refused": ("FAILED", "Refused"),
    "cancelled": CANCELLED,
}


@value
class StepRun:
    """One step, or several joined, as a task run."""

    id: str
    name: str
    step: str
    started_at: float
    ended_at: float
    state: State
    message: str | None
    inputs: dict[str, list[dict[str, str]]]
    """Which task runs' results it was given: Prefect draws its arrows from these."""


def steps_of(run: Run) -> list[StepRun]:
    # An id for each step, the same each time, that comes after that of the step before: indexes grow at their end.
    ids = [f"{run.id[:-4]}{number:04x}" for number in range(len(run.steps))]
    times: dict[str, int] = {}
    names: list[str] = []

    def told_apart(name: str) -> str:
        times[name] = again = times.get(name, 0) + 1
        return name if again == 1 else f"{name}-{again}"

    found = []
    for at, step in enumerate(run.steps):
        names.append(BETWEEN.join(map(told_apart, step.name.split(BETWEEN))))
        ended = step.ended >= step.started
        message = None
        if step.error is None and ended:
            state = COMPLETED
        elif step.error is None:
            state, message = CANCELLED, "It had not ended when the request had."
        elif step.error == "CancelledError":
            state = CANCELLED
        else:
            state, message = FAILED, step.error
        started_at = step.started + run.clock_offset
        found.append(
            StepRun(
                id=ids[at],
                name=names[at],
                step=step.name,
                started_at=started_at,
                ended_at=step.ended + run.clock_offset if ended else max(run.ended_at, started_at),
                state=state,
                message=message,
                # Of steps that were joined, the last one's name: all of them are written with each that was given it.
                inputs={names[before].rpartition(BETWEEN)[2]: [{"id": ids[before]}] for before in step.after},
            )
        )
    return found


@lru_cache(maxsize=512)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def moment(at: float) -> str:
    """Seconds since the epoch as both databases take them: `2026-11-18 11:06:40.250000`, in UTC."""
    second, micros = divmod(round(at * 1e6), 1_000_000)
    return f"{_second(second)}.{micros:06}"


def rows_of(run: Run, flow_id: str, *, span: Callable[[float], str]) -> Iterator[tuple[str, Row]]:
    """Each row with its table. `span` writes durations as the database keeps them.

    The times of runs and states are exact. When a row was made is told to the second, as it is shown, and of
    states, of which nobody is told it, to the day: it is indexed, and what is alike takes less.
    """
    began, ended = moment(run.started_at), moment(run.ended_at)
    created, updated = began[:_SECOND], ended[:_SECOND]
    kind, state_name = state_of(run)
    yield (
        "flow_run",
        (
            *(run.id, created, updated, run.name, flow_id, run.id, kind, state_name, 1, began, began, ended),
            *(span(run.seconds), _json(parameters_of(run)), _json(tags_of(run))),
        ),
    )
    # Ids tell rows of one table apart: a state can have that of its run.
    yield "flow_run_state", (run.id, ended[:_DAY], ended[:_DAY], run.id, kind, state_name, ended, said_of(run))
    states: dict[tuple[State, str | None], str] = {}
    steps = steps_of(run)
    # Steps that ended alike share a state, the last one's: it holds only what their own rows say more
    # precisely, and as many would be a fourth of what a request takes in Prefect's database.
    for step in reversed(steps):
        alike = (step.state, step.message)
        if alike not in states:
            states[alike] = step.id
            end = moment(step.ended_at)
            yield "task_run_state", (step.id, end[:_DAY], end[:_DAY], step.id, *step.state, end, step.message)
    for number, step in enumerate(steps):
        start, end = moment(step.started_at), moment(step.ended_at)
        yield (
            "task_run",
            (
                # Nothing shows a task's key, and its name says the same.
                *(step.id, start[:_SECOND], end[:_SECOND], step.name, run.id, "", str(number)),
                *(states[step.state, step.message], *step.state, 1, 1, start, start, end),
                *(span(step.ended_at - step.started_at), _json(step.inputs)),
            ),
        )
    if markdown := receipt(run):
        yield "artifact", (run.id, updated, updated, "markdown", _json(markdown), run.id, "Who was asked.")


def state_of(run: Run) -> State:
    return _STATES[run.outcome]


def tags_of(run: Run) -> list[str]:
    return sorted({RECORDED, *run.tags, *([] if run.outcome == "answered" else [run.outcome])})


def parameters_of(run: Run) -> dict[str, Any]:
    return {**run.parameters, **(run.content or {})}


def said_of(run: Run) -> str:
    """How it ended and what it cost, in a sentence or two."""
    answered_by = f"{run.provider_id}/{run.model_id}"
    money = [f"Cost {dollars(run.cost)}"] if run.cost is not None else []
    if run.estimated_cost is not None:
        money.append(f"estimated {dollars(run.estimated_cost)}")
    match run.outcome:
        case "answered":
            how = f"{answered_by} answered."
        case "fallback":
            how = f"{answered_by} answered after {_failures(run.attempts)}."
        case "cancelled":
            how = "The client left."
        case _:
            how = f"{run.error}: {run.message}"
    return f"{how} {', '.join(money)}." if money else how


def receipt(run: Run) -> str | None:
    """The attempts as a table, where there is more to tell than the state says."""
    if len(run.attempts) < 2 and not (run.attempts and run.attempts[0].error):
        return None
    rows = [("Provider", run.provider_id or "none"), ("Model", run.model_id or "none")]
    if run.estimated_cost is not None:
        rows.append(("Estimated", dollars(run.estimated_cost)))
    if run.cost is not None:
        rows.append(("Cost", dollars(run.cost)))
    tried = [
        (str(number), each.provider_id, each.model_id, f"{each.seconds:.2f}", each.error or "answered")
        for number, each in enumerate(run.attempts, 1)
    ]
    head = ("Attempt", "Provider", "Model", "Seconds", "Outcome")
    return f"{_table(('', ''), rows)}\n\n{_table(head, tried)}"


def _failures(attempts: Sequence[Attempt]) -> str:
    failed = [f"{each.provider_id}/{each.model_id} ({each.error})" for each in attempts if each.error]
    return ", ".join(failed) or "others"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()
