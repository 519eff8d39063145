"""The Prefect server that commands talk to: found, asked whether it is there, and its failures named."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from sekha.address import without_secrets
from sekha.cli.terminal import note
from sekha.errors import PrefectUnavailable

__all__ = ["Recorded", "answering", "in_flow", "quiet", "recorded_run"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recorded(Generic[T]):
    """What a flow run gave, and under which name Prefect shows it."""

    value: T
    id: str
    name: str


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that keep Prefect's log off the terminal; the server still gets every line of it."""
    return {
        # What fails, we say ourselves, without a traceback.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "sekha",
        # Without a server, Prefect would start one of its own for the command and leave nothing behind.
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        **environment,
    }


@contextmanager
def answering() -> Iterator[str]:
    """Make sure that a server answers before anything is asked of it, and yield its API's address.

    Raises `PrefectUnavailable` when none is named, none answers, or it stops answering on the way.
    """
    for name, value in quiet({}).items():
        os.environ.setdefault(name, value)
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings

    from sekha.stack import require_server

    # Prefect's own settings and not the environment alone: a profile may name the server as well.
    api_url = get_current_settings().api.url
    asyncio.run(require_server(api_url))
    try:
        yield str(api_url)
    except PrefectHTTPStatusError as error:
        status, at = error.response.status_code, without_secrets(str(api_url))
        raise PrefectUnavailable(f"The Prefect server at {at} refused the call: HTTP {status}.") from error
    except httpx.TransportError as error:
        at = without_secrets(str(api_url))
        raise PrefectUnavailable(f"The Prefect server at {at} stopped answering.") from error


async def recorded_run(flow: Callable[..., Awaitable[Any]], request: object, config: str | None) -> Recorded[T]:
    """Run a flow to its end in this process, on the record. Raises what it raised."""
    from prefect.client.orchestration import get_client

    state = await flow(request, config, return_state=True)
    value = cast(T, await state.aresult())
    async with get_client() as client:
        flow_run = await client.read_flow_run(state.state_details.flow_run_id)
    return Recorded(value=value, id=str(flow_run.id), name=flow_run.name)


def in_flow(name: str, request: object, config: str | None) -> Any:
    """Run the flow of that name on the server that the environment names, and say where to look."""
    with answering() as api_url:
        flow = getattr(import_module(f"flows.{name}"), name)
        recorded: Recorded[Any] = asyncio.run(recorded_run(flow, request, config))
    note(f"flow run {recorded.name!r}: {without_secrets(api_url).removesuffix('/api')}/runs/flow-run/{recorded.id}")
    return recorded.value
