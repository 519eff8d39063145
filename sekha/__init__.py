"""Sekha: one place through which programs reach every LLM provider and keep what they embed.

>>> import sekha
>>> async with sekha.open("sekha.yaml") as s:
...     reply = await s.chat("What does a hold do?")
...     print(reply.text, reply.cost)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sekha.chat import ChatRequest, Reply
    from sekha.config import Config
    from sekha.documents import Document
    from sekha.embedding import Embedded, EmbedRequest
    from sekha.errors import (
        ConfigError,
        LedgerError,
        ProviderError,
        RecordError,
        RequestRefused,
        SekhaError,
        StoreError,
    )
    from sekha.ingest import IngestReport, IngestRequest
    from sekha.loading import load
    from sekha.registry import Registry
    from sekha.runtime import Runtime
    from sekha.search import Found, SearchRequest

__all__ = [
    "ChatRequest",
    "Config",
    "ConfigError",
    "Document",
    "EmbedRequest",
    "Embedded",
    "Found",
    "IngestReport",
    "IngestRequest",
    "LedgerError",
    "ProviderError",
    "RecordError",
    "Registry",
    "Reply",
    "RequestRefused",
    "Runtime",
    "SearchRequest",
    "SekhaError",
    "StoreError",
    "load",
    "open",
]

_MODULES = {
    "chat": ("ChatRequest", "Reply"),
    "config": ("Config",),
    "documents": ("Document",),
    "embedding": ("EmbedRequest", "Embedded"),
    "errors": (
        "ConfigError",
        "LedgerError",
        "ProviderError",
        "RecordError",
        "RequestRefused",
        "SekhaError",
        "StoreError",
    ),
    "ingest": ("IngestReport", "IngestRequest"),
    "loading": ("load",),
    "registry": ("Registry",),
    "runtime": ("Runtime",),
    "search": ("Found", "SearchRequest"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def open(config: str | os.PathLike[str] | None = None) -> Runtime:  # noqa: A001 - read as `sekha.open`
    """Open what a configuration declares; use it with `async with`.

    Without a name it loads the file that `sekha check` would, and without any file it runs on the
    built-in models. Raises `ConfigError` that lists everything wrong in the file.
    """
    from sekha.loading import load
    from sekha.resources import Resources
    from sekha.runtime import Runtime

    return Runtime(Resources(load(config)))


def __getattr__(name: str) -> Any:
    # Names are imported when they are first used, so that `import sekha` costs nothing.
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
