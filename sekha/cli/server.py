"""The Prefect server that commands talk to: found, asked whether it is there, and its failures named."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sekha.errors import PrefectUnavailable

__all__ = ["answering", "quiet"]


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
        status = error.response.status_code
        raise PrefectUnavailable(f"The Prefect server at {api_url} refused the call: HTTP {status}.") from error
    except httpx.TransportError as error:
        raise PrefectUnavailable(f"The Prefect server at {api_url} stopped answering.") from error
