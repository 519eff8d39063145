"""The indexes of a store as they are now: where a collection is read, and where it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from sekha.errors import CollectionConflict, CollectionMissing, StoreError, StoreUnavailable
from sekha.registry import Space
from sekha.spaces import alias_of, collections_in, index_for, indexes_of
from sekha.vectors.base import Collection, VectorStore

__all__ = ["Indexes", "Readable"]

FRESH_SECONDS: Final = 2.0
"""How long a search may assume that no index was made, dropped or pointed to, and that each is as large as it was."""


@dataclass(frozen=True, slots=True)
class Readable:
    """A collection's indexes by name, which of them its alias names, and how many records each holds."""

    indexes: tuple[Collection, ...]
    named: str | None
    sizes: Mapping[str, int]
    """Empty when there is one index alone."""


@dataclass(frozen=True, slots=True)
class _Seen:
    at: float
    collections: tuple[Collection, ...]
    aliases: Mapping[str, str]
    sizes: dict[str, int]


class Indexes:
    """What lies where in the store, looked up at most once in two seconds by those who read."""

    def __init__(
        self, store: Callable[[], Awaitable[VectorStore]], *, now: Callable[[], float], declared: Iterable[str] = ()
    ) -> None:
        """`declared` are the collections that the file names, as it writes them."""
        self._store = store
        self._now = now
        self._declared = tuple(declared)
        self._seen: _Seen | None = None
        self._looking = asyncio.Lock()

    async def of(self, collection: str) -> Readable:
        """What a search may ask. Raises `CollectionMissing` when nothing is kept of the collection."""
        seen = await self._look(FRESH_SECONDS)
        indexes = indexes_of(collection, seen.collections)
        if not indexes:
            seen = await self._look(0)
            indexes = indexes_of(collection, seen.collections)
        if not indexes:
            raise CollectionMissing(collection, collections_in(seen.collections, self._declared))
        unknown = [index.name for index in indexes if index.name not in seen.sizes]
        if unknown and len(indexes) > 1:
            store = await self._store()
            seen.sizes.update(zip(unknown, await asyncio.gather(*map(store.count, unknown)), strict=True))
        return Readable(tuple(indexes), seen.aliases.get(alias_of(collection)), seen.sizes)

    async def holding(self, space: Space) -> Collection:
        """The index that holds the space, or that is going to; nothing is made."""
        return index_for(space, (await self._look(0)).collections)

    async def for_writing(self, space: Space) -> Collection:
        """The index that holds the space, made if it is missing; the collection's alias names the first of them."""
        store = await self._store()
        seen = await self._look(FRESH_SECONDS)
        index = index_for(space, seen.collections)
        try:
            await store.ensure_collection(index)
        except CollectionConflict:
            # Another process has just made one of that name for another model.
            seen = await self._look(0)
            index = index_for(space, seen.collections)
            await store.ensure_collection(index)
        if index not in seen.collections or alias_of(space.collection) not in seen.aliases:
            await self._name(space.collection, index)
            self._seen = None
        return index

    def written(self, index: Collection) -> None:
        """Take note that an index has grown, or shrunk."""
        if self._seen is not None:
            self._seen.sizes.pop(index.name, None)

    async def _name(self, collection: str, index: Collection) -> None:
        """Point the collection's alias at its first index."""
        alias, store = alias_of(collection), await self._store()
        try:
            if await store.alias_target(alias) is None:
                await store.point_alias(alias, index.name)
        except StoreUnavailable:
            raise
        except StoreError:
            # A class of that name stands in its place, made before indexes had a dimension; `sekha doctor` tells of it.
            pass

    async def _look(self, fresh_seconds: float) -> _Seen:
        seen = self._seen
        if seen is not None and self._now() - seen.at < fresh_seconds:
            return seen
        async with self._looking:
            # Whoever waited for the lock has what the one before them saw.
            if (latest := self._seen) is not None and latest is not seen:
                return latest
            store = await self._store()
            at = self._now()
            collections, aliases = await asyncio.gather(store.list_collections(), store.list_aliases())
            self._seen = _Seen(at, tuple(collections), aliases, {})
            return self._seen
