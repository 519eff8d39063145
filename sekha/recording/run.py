"""One finished request as values, and as one line of a spool."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from random import getrandbits
from typing import Any, Literal, TypeAlias

import orjson

from sekha.calling import Attempt
from sekha.trace import Step
from sekha.values import value

__all__ = ["CONTENT_BYTES", "Event", "Outcome", "Run", "decode", "encode", "new_run_id"]

Outcome: TypeAlias = Literal["answered", "fallback", "failed", "refused", "cancelled"]

# Prefect's API takes no parameters larger than this.
CONTENT_BYTES = 500_000


@value
class Run:
    """One finished request. It becomes a flow run, and its steps task runs."""

    id: str
    """A UUID: the flow run's id in Prefect, and `run_id` in the reply. `new_run_id` makes those that index best."""
    flow: str
    """`chat`, `embed` or `search`."""
    name: str
    """What tells runs apart in Prefect's list: `chat → openai/gpt-5-mini`. Never a prompt."""
    started_at: float
    """Seconds since the epoch, like `ended_at`."""
    ended_at: float
    outcome: Outcome
    error: str | None = None
    """Our error's code."""
    message: str = ""
    """Our error's message, which holds neither secret nor prompt."""
    steps: tuple[Step, ...] = ()
    clock_offset: float = 0.0
    """What makes seconds since the epoch of the steps' times: `time.time() - time.monotonic()` for monotonic ones."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Small: the model asked for, the task, counts."""
    content: Mapping[str, Any] | None = field(default=None, repr=False)
    """Prompt and reply, only when the configuration says so."""
    tags: tuple[str, ...] = ()
    provider_id: str | None = None
    model_id: str | None = None
    estimated_cost: Decimal | None = None
    cost: Decimal | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the gateway and not in a request: a circuit opened, a budget ran out."""

    id: str
    occurred_at: float
    name: str
    """`sekha.circuit.opened`"""
    resource: str
    """What it happened to: `sekha.circuit.openai/gpt-5-mini`."""
    payload: Mapping[str, Any] = field(default_factory=dict)


def new_run_id() -> str:
    """A UUID that begins with the time (version 7), so that indexes grow at their end only."""
    noise = getrandbits(74)
    number = (time.time_ns() // 1_000_000) << 80 | 7 << 76 | (noise >> 62) << 64 | 2 << 62 | noise & (1 << 62) - 1
    # What `str(UUID(int=number))` gives, at a third of its time.
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def encode(what: Run | Event) -> bytes:
    """One line. Raises `TypeError` for what JSON cannot say."""
    if isinstance(what, Event):
        return b"E%b\n" % orjson.dumps(what, default=_plain)
    # Steps and attempts as plain lists, which orjson writes in a tenth of what dataclasses take it.
    said = {
        "id": what.id,
        "flow": what.flow,
        "name": what.name,
        "started_at": what.started_at,
        "ended_at": what.ended_at,
        "outcome": what.outcome,
        "error": what.error,
        "message": what.message,
        "steps": [(step.name, step.after, step.started, step.ended, step.error) for step in what.steps],
        "clock_offset": what.clock_offset,
        "parameters": what.parameters,
        "content": what.content,
        "tags": what.tags,
        "provider_id": what.provider_id,
        "model_id": what.model_id,
        "estimated_cost": what.estimated_cost,
        "cost": what.cost,
        "attempts": [
            (each.provider_id, each.model_id, each.seconds, each.error, each.detail) for each in what.attempts
        ],
    }
    line = b"R%b\n" % orjson.dumps(said, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    if what.content is not None and len(line) > CONTENT_BYTES:
        return encode(replace(what, content={"left_out": f"{len(line):,} bytes are more than Prefect takes"}))
    return line


def _columns(rows: list[Any]) -> list[Any]:
    """Rows as they are written now; the version before wrote objects, of the same fields in the same order."""
    return [list(row.values()) if isinstance(row, dict) else row for row in rows]


def decode(line: bytes) -> Run | Event:
    """What was encoded. Raises `ValueError` for anything else."""
    # PostgreSQL's texts and JSON hold every character but this one.
    said = orjson.loads(line[1:].replace(b"\\u0000", b"\\ufffd"))
    try:
        if line[:1] == b"E":
            return Event(**said)
        said["steps"] = tuple(
            [
                Step(name, tuple(after), started, ended, error)
                for name, after, started, ended, error in _columns(said["steps"])
            ]
        )
        _check_order(said["steps"])
        said["attempts"] = tuple(
            [
                Attempt(provider_id=provider_id, model_id=model_id, seconds=seconds, error=error, detail=detail)
                for provider_id, model_id, seconds, error, detail in _columns(said["attempts"])
            ]
        )
        said["tags"] = tuple(said["tags"])
        for amount in ("estimated_cost", "cost"):
            if said[amount] is not None:
                said[amount] = Decimal(said[amount])
        return Run(**said)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ValueError(f"this line is no run: {type(error).__name__}") from error


def _check_order(steps: tuple[Step, ...]) -> None:
    if any(not 0 <= before < at for at, step in enumerate(steps) for before in step.after):
        raise ValueError("a step comes after one that is not before it")


def _plain(value: object) -> object:
    match value:
        case Decimal():
            return str(value)
        case Mapping():
            return dict(value)
        case set() | frozenset():
            return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
