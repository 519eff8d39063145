"""When Prefect may run a task again."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

__all__ = ["WAIT_FOR_THE_STORE", "retry_if_retryable"]

# Providers are retried inside their step, where a failed candidate is left out while another is
# healthy; doing it here as well would multiply the attempts. A store has no other to fall back on.
WAIT_FOR_THE_STORE: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 1,
}


async def retry_if_retryable(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's
    """Retry what may succeed a little later, and nothing else."""
    error = await state.aresult(raise_on_failure=False)
    return bool(getattr(error, "retryable", False))
