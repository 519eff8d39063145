"""From a store as declared to one that can be used."""

from __future__ import annotations

import asyncio

from sekha.loading import Loaded
from sekha.vectors.base import VectorStore
from sekha.vectors.embedded import EmbeddedStore

__all__ = ["open_store"]


async def open_store(loaded: Loaded) -> VectorStore:
    """Open the store of a configuration. Raises `StoreError` when it cannot be opened."""
    store = loaded.config.store
    return await asyncio.to_thread(EmbeddedStore.open, loaded.path(store.path))
