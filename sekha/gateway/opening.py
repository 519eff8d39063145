"""From a configuration to what the gateway serves with."""

from __future__ import annotations

from pathlib import Path

from sekha.gateway.metrics import Metrics
from sekha.gateway.serving import Serving
from sekha.loading import Loaded
from sekha.resources import Resources

__all__ = ["open_serving", "state_folder"]


def state_folder(loaded: Loaded) -> Path:
    """Where a gateway keeps what it must not forget: journals, the spool, the outbox."""
    return loaded.path(".sekha/gateway")


async def open_serving(loaded: Loaded, metrics: Metrics, *, workers: int = 1) -> Serving:
    """Open what the configuration declares. Providers, store and ledger connect with their first use."""
    from sekha.recording.recorder import Recorder

    resources = Resources(loaded)
    recorder = Recorder(loaded.config.recording, state_folder(loaded) / "recording", processes=workers)
    await recorder.start()
    return Serving(resources, metrics, recorder=recorder)
