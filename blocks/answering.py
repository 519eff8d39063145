"""Tell apart what Prefect does not have from a Prefect that does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.settings import get_current_settings

from sekha.address import without_secrets
from sekha.errors import PrefectUnavailable

__all__ = ["prefect_answers"]


@contextmanager
def prefect_answers() -> Iterator[None]:
    """Raise `PrefectUnavailable` when the block in it finds no server, or one that fails."""
    settings = get_current_settings()
    if not settings.api.url and not settings.server.ephemeral.enabled:
        raise PrefectUnavailable("No Prefect server is named: start one with `sekha up`, or set PREFECT_API_URL.")
    at = without_secrets(str(settings.api.url))
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise PrefectUnavailable(f"The Prefect server at {at} refuses with HTTP {status}.") from error
    except (httpx.HTTPError, OSError) as error:
        raise PrefectUnavailable(
            f"No Prefect server answers at {at}: start one with `sekha up`, or correct PREFECT_API_URL."
        ) from error
