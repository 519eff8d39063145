"""Who may reach the gateway under a configuration, and which one may take another's place while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sekha.address import is_loopback
from sekha.errors import ConfigError, Problem
from sekha.loading import Loaded

if TYPE_CHECKING:
    from sekha.config import Config

__all__ = ["check_reload", "may_listen_at"]

_MAKE_ONE = "Make a key with `sekha keys create` and list it under `keys:`"


def may_listen_at(host: str, config: Config) -> bool:
    """Whether others may reach it there: only with keys, or when the file says that none are needed."""
    return bool(config.keys) or config.allow_unauthenticated or is_loopback(host)


def check_reload(loaded: Loaded, before: Loaded, host: str) -> None:
    """Raise `ConfigError` for a configuration that may not take the place of the one before, at this address.

    A file may be read while it is being written: what it lacks then must open no door.
    """
    if loaded.says_nothing and not before.says_nothing:
        said = (
            "says nothing, as a file does that is still being written. Reload once it is whole, or start the gateway "
            "anew."
        )
        raise ConfigError(loaded.source, [Problem("", said)])
    if not may_listen_at(host, loaded.config):
        said = (
            f"lists no key, while the gateway listens on {host}: everybody there could spend your money. {_MAKE_ONE}, "
            "set `allow_unauthenticated: true`, or start it anew, on loopback."
        )
        raise ConfigError(loaded.source, [Problem("keys", said)])
    # Loopback too: a proxy in front of it may be everybody's door.
    if before.config.keys and not (loaded.config.keys or loaded.config.allow_unauthenticated):
        said = (
            f"lists no key any more, and the configuration before has {len(before.config.keys)}: whoever reaches "
            f"{host} could spend your money. {_MAKE_ONE}, set `allow_unauthenticated: true`, or start the gateway anew."
        )
        raise ConfigError(loaded.source, [Problem("keys", said)])
