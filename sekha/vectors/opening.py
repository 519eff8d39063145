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
    if store.kind == "weaviate" and store.url:
        from sekha.vectors.weaviate import WeaviateStore

        key = store.api_key.get_secret_value() if store.api_key else None
        return await WeaviateStore.open(
            store.url,
            grpc_port=store.grpc_port,
            api_key=key,
            replication=store.replication,
            consistency=store.consistency,
            quantizer=store.quantizer,
            query_seconds=store.query_timeout_secs,
            insert_seconds=store.insert_timeout_secs,
        )
    return await asyncio.to_thread(EmbeddedStore.open, loaded.path(store.path))
