"""Vectors in a Weaviate server: the one file that imports its client.

Each collection is a class with one self-provided vector per object, compared by cosine through HNSW.
The class's description says the dimension and the fingerprint, which Weaviate has no place for.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar, assert_never
from urllib.parse import urlsplit

import httpx
import numpy as np
import orjson
from authlib.deprecate import AuthlibDeprecationWarning  # type: ignore[import-untyped]  # it has no stubs

from sekha.errors import AliasMoved, CollectionConflict, CollectionMissing, StoreError, StoreUnavailable
from sekha.vectors.base import AllOf, AnyOf, Collection, Compare, Filter, Hit, Not, Record, Scalar, TextHit, Vector
from sekha.vectors.checks import (
    NAME,
    canonical,
    canonical_all,
    check_alias,
    check_collection,
    check_compared,
    properties_as_json,
    unit,
    words,
)
from sekha.vectors.weaviate_backup import WeaviateBackups
from sekha.vectors.weaviate_classes import WeaviateClasses
from sekha.vectors.weaviate_properties import KINDS, OURS, Kind, indexed, indexed_value, kind_of, name_of, needed

with warnings.catch_warnings():
    # The client imports a part of Authlib that only logins by OpenID use, and that is about to move.
    warnings.simplefilter("ignore", AuthlibDeprecationWarning)
    import weaviate
    from weaviate.backup.backup import BackupStorage
    from weaviate.classes.config import (
        Configure,
        ConsistencyLevel,
        DataType,
        Property,
        StopwordsPreset,
        Tokenization,
        VectorDistances,
    )
    from weaviate.classes.data import DataObject
    from weaviate.classes.init import AdditionalConfig, Auth, GrpcConfig, Timeout
    from weaviate.classes.query import BM25Operator, MetadataQuery
    from weaviate.classes.query import Filter as Where
    from weaviate.exceptions import (
        InsufficientPermissionsError,
        UnexpectedStatusCodeError,
        WeaviateBaseError,
        WeaviateClosedClientError,
        WeaviateConnectionError,
        WeaviateInsertManyAllFailedError,
        WeaviateRetryError,
        WeaviateStartUpError,
        WeaviateTimeoutError,
    )

__all__ = ["WeaviateStore"]

# The client logs each object that a server refuses, its text included. We return the reasons.
logging.getLogger("weaviate-client").setLevel(logging.CRITICAL)

OLDEST_SERVER: Final = (1, 36)
MOST_HITS: Final = 10_000
"""What a server returns at the most, unless its QUERY_MAXIMUM_RESULTS says otherwise."""
MESSAGE_RECORDS: Final = 1000
MESSAGE_BYTES: Final = 32 * 2**20
UUIDS_AT_ONCE: Final = 1000
LOOK_SECONDS: Final = 0.1
"""Between two looks at what waits to be indexed."""
RESCORED: Final = 20
"""Of the hits among quantized vectors, how many at the least are ranked anew by the whole ones."""

Consistency: TypeAlias = Literal["one", "quorum", "all"]
Quantizer: TypeAlias = Literal["none", "rq-8"]

_T = TypeVar("_T")
_H = TypeVar("_H", Hit, TextHit)
_Condition: TypeAlias = Any
"""A filter of the client's; True matches everything, False nothing."""


@dataclass(frozen=True, slots=True)
class _Index:
    """A class as the server described it."""

    collection: Collection
    declared: frozenset[str]
    """Its properties."""


class WeaviateStore:
    """A `VectorStore` in a Weaviate server.

    `async with await WeaviateStore.open("http://localhost:8080", grpc_port=50051) as store: …`

    Vectors are kept at unit length. A filter compares texts by value and numbers as doubles; the order
    of texts that are empty, or begin or end with blanks, is not defined.
    """

    def __init__(
        self,
        client: Any,
        url: str,
        *,
        replication: int,
        consistency: Consistency,
        quantizer: Quantizer,
        message_bytes: int,
        query_seconds: float,
        insert_seconds: float,
    ) -> None:
        self._client = client
        self._url = url
        self._replication = replication
        self._consistency = ConsistencyLevel[consistency.upper()]
        self._quantizer = quantizer
        self._message_bytes = message_bytes
        self._query_seconds = query_seconds
        self._insert_seconds = insert_seconds
        self._seen: dict[str, _Index] = {}
        """What a search may assume of a name before it asks the server, which may know better."""
        self._handles: dict[str, Any] = {}

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        grpc_port: int = 50051,
        api_key: str | None = None,
        replication: int = 1,
        consistency: Consistency = "quorum",
        quantizer: Quantizer = "none",
        open_seconds: float = 30.0,
        query_seconds: float = 15.0,
        insert_seconds: float = 60.0,
    ) -> Self:
        """Connect to a server, and make sure that it can be used.

        The client tries again while the server cannot be reached; `query_seconds` and `insert_seconds`
        bound each request with all its tries. Raises `StoreUnavailable` when the server does not
        answer, `StoreError` when it is too old or refuses the key.
        """
        parts = urlsplit(url)
        host, secure = parts.hostname or "localhost", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        shown = f"{parts.scheme}://{host}:{port}"
        client = weaviate.use_async_with_custom(
            http_host=host,
            http_port=port,
            http_secure=secure,
            grpc_host=host,
            grpc_port=grpc_port,
            grpc_secure=secure,
            auth_credentials=Auth.api_key(api_key) if api_key else None,
            additional_config=AdditionalConfig(
                timeout=Timeout(init=open_seconds, query=query_seconds, insert=insert_seconds),
                # A channel that lost its server waits up to two minutes by default before it looks again.
                grpc_config=GrpcConfig(
                    channel_options=[
                        ("grpc.initial_reconnect_backoff_ms", 100),
                        ("grpc.max_reconnect_backoff_ms", 1000),
                    ]
                ),
            ),
            # Its own checks ask the package index for a newer client, so ours follow.
            skip_init_checks=True,
        )
        try:
            await _answered(client.connect(), shown, open_seconds)
            meta = await _answered(client.get_meta(), shown, open_seconds)
            _check_version(shown, meta["version"])
            await _check_grpc(shown, host, grpc_port, open_seconds)
        except BaseException:
            await client.close()
            raise
        return cls(
            client,
            shown,
            replication=replication,
            consistency=consistency,
            quantizer=quantizer,
            message_bytes=min(MESSAGE_BYTES, int(meta.get("grpcMaxMessageSize", MESSAGE_BYTES)) // 2),
            query_seconds=query_seconds,
            insert_seconds=insert_seconds,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # --- collections -----------------------------------------------------------------------

    async def ensure_collection(self, collection: Collection) -> None:
        check_collection(collection)
        name = collection.name
        try:
            found = await self._look_up(name)
        except CollectionMissing:
            await self._create(collection)
            return
        if found.collection.name != name:
            raise StoreError(f"{name!r} is an alias. Give the collection another name, or delete the alias.")
        for field in ("dimension", "fingerprint"):
            exists, wanted = getattr(found.collection, field), getattr(collection, field)
            if exists != wanted:
                raise CollectionConflict(name, field=field, exists=exists, wanted=wanted)

    async def describe(self, name: str) -> Collection:
        return (await self._look_up(name)).collection

    async def list_collections(self) -> list[Collection]:
        configs = await self._query(self._client.collections.list_all())
        described = (_described(name, config.description) for name, config in sorted(configs.items()))
        return [collection for collection in described if collection is not None]

    async def drop_collection(self, name: str) -> bool:
        try:
            if (await self.describe(name)).name != name:
                return False
        except CollectionMissing:
            return False
        # Aliases first: the server keeps those of a class that is gone, and they would point nowhere.
        for alias, target in (await self.list_aliases()).items():
            if target == name:
                await self.delete_alias(alias)
        await self._query(self._client.collections.delete(name))
        self._seen.pop(name, None)
        return True

    # --- records ---------------------------------------------------------------------------

    async def upsert(self, name: str, records: Sequence[Record]) -> dict[str, str]:
        """Write the records, those with the same uuid as if only the last were there.

        An object that the server refuses does not hold up the others. Raises `StoreError` for what is
        no uuid, and for properties that are not flat.
        """
        index = await self._look_up(name)
        collection = index.collection
        vectors = unit(collection.name, collection.dimension, [(record.uuid, record.vector) for record in records])
        objects: dict[str, _Object] = {}
        for record, vector in zip(records, vectors, strict=True):
            uuid = canonical(record.uuid)
            kept = properties_as_json(uuid, record)
            objects[uuid] = _Object(uuid, record.text, kept, indexed(record.properties), vector)
        await self._declare(index, {name for each in objects.values() for name in each.indexed})
        refused: dict[str, str] = {}
        for batch in self._messages(objects.values(), refused):
            refused |= await self._insert(collection.name, batch)
        return refused

    async def get(self, name: str, uuids: Sequence[str], *, vectors: bool = False) -> dict[str, Record]:
        wanted = list(dict.fromkeys(canonical_all(uuids)))
        handle = self._handle((await self.describe(name)).name)
        found: dict[str, Record] = {}
        for start in range(0, len(wanted), UUIDS_AT_ONCE):
            some = wanted[start : start + UUIDS_AT_ONCE]
            answer = await self._query(
                handle.query.fetch_objects_by_ids(
                    some, limit=len(some), include_vector=vectors, return_properties=["text", "properties"]
                )
            )
            found |= {record.uuid: record for record in map(_record, answer.objects)}
        return found

    async def delete(self, name: str, uuids: Sequence[str]) -> int:
        wanted = list(dict.fromkeys(canonical_all(uuids)))
        collection = await self.describe(name)
        deleted = 0
        for start in range(0, len(wanted), UUIDS_AT_ONCE):
            some = wanted[start : start + UUIDS_AT_ONCE]
            deleted += await self._delete(collection.name, Where.by_id().contains_any(some))
        return deleted

    async def delete_where(self, name: str, where: Filter, *, dry_run: bool = False) -> int:
        if dry_run:
            return await self.count(name, where)
        index = await self._look_up(name)
        condition = _condition(where, index.declared)
        if condition is False:
            return 0
        if condition is True:  # and the server wants a filter all the same
            source = Where.by_property("source")
            condition = Where.any_of([source.is_none(True), source.is_none(False)])
        return await self._delete(index.collection.name, condition)

    async def count(self, name: str, where: Filter | None = None) -> int:
        index = await self._look_up(name)
        condition = True if where is None else _condition(where, index.declared)
        if condition is False:
            return 0
        filters = None if condition is True else condition
        aggregate = self._handle(index.collection.name).aggregate
        answer = await self._query(aggregate.over_all(filters=filters, total_count=True))
        return int(answer.total_count)

    async def search(
        self,
        name: str,
        vector: Vector,
        limit: int,
        *,
        where: Filter | None = None,
        max_distance: float | None = None,
    ) -> list[Hit]:
        """The nearest records, nearest first, ties by uuid. Finds what HNSW finds, nearly always the nearest."""
        hits = await self._searched(name, where, lambda index: self._nearest(name, index, vector, limit, where))
        return hits if max_distance is None else [hit for hit in hits if hit.distance <= max_distance]

    async def search_text(self, name: str, query: str, limit: int, *, where: Filter | None = None) -> list[TextHit]:
        """The records that hold any word of the query, best first by BM25, ties by uuid."""
        wanted = words(query)
        return await self._searched(name, where, lambda index: self._worded(name, index, wanted, limit, where))

    async def scan(
        self,
        name: str,
        *,
        after: str | None = None,
        until: str | None = None,
        page: int = 500,
        vectors: bool = False,
    ) -> AsyncIterator[list[Record]]:
        if page < 1:
            raise ValueError(f"a page of {page} records never ends a scan")
        # An alias may move while the scan runs; it goes on in the collection where it began.
        handle = self._handle((await self.describe(name)).name)
        cursor = None if after is None else canonical(after)
        last = "g" if until is None else canonical(until)  # behind every hexadecimal digit
        while True:
            answer = await self._query(
                handle.query.fetch_objects(
                    limit=page, after=cursor, include_vector=vectors, return_properties=["text", "properties"]
                )
            )
            records = [record for record in map(_record, answer.objects) if record.uuid <= last]
            if records:
                yield records
            if len(records) < page:
                return
            cursor = records[-1].uuid

    # --- aliases ---------------------------------------------------------------------------

    async def point_alias(self, alias: str, target: str, *, expect: str | None = None) -> None:
        """Make the alias name the collection, in one atomic move.

        The server has no compare-and-set: `expect` is looked at first, and two movers at the same
        moment may both find what they expect.
        """
        check_alias(alias)
        found = await self.alias_target(alias)
        if found is None and await self._query(self._client.collections.exists(alias)):
            raise StoreError(f"{alias!r} is a collection, so it cannot be an alias too. Choose another alias.")
        if expect is not None and found != expect:
            raise AliasMoved(alias, expected=expect, found=found)
        name = (await self.describe(target)).name
        moved = await self._query(self._client.alias.update(alias_name=alias, new_target_collection=name))
        if not moved:
            await self._query(self._client.alias.create(alias_name=alias, target_collection=name))

    async def alias_target(self, alias: str) -> str | None:
        if not NAME.fullmatch(alias):
            return None
        found = await self._query(self._client.alias.get(alias_name=alias))
        return None if found is None else str(found.collection)

    async def list_aliases(self) -> dict[str, str]:
        found = await self._query(self._client.alias.list_all())
        return {alias: str(found[alias].collection) for alias in sorted(found)}

    async def delete_alias(self, alias: str) -> bool:
        if not NAME.fullmatch(alias):
            return False
        return bool(await self._query(self._client.alias.delete(alias_name=alias)))

    async def catch_up(self, name: str, *, seconds: float = 30.0) -> int:
        """Wait for a server that indexes behind the answer (`ASYNC_INDEXING`), on each node that has a copy.

        Without the right to read nodes, a key is told of nothing that waits.
        """
        collection = await self.describe(name)
        ends = time.monotonic() + seconds
        while True:
            waiting = await self._waiting(collection.name)
            if not waiting or time.monotonic() >= ends:
                return waiting
            await asyncio.sleep(LOOK_SECONDS)

    async def health(self) -> float:
        began = time.perf_counter()
        await self._query(self._client.get_meta())
        if not await self._query(self._client.is_ready()):
            raise StoreUnavailable(self._url, "it says that it is not ready")
        return time.perf_counter() - began

    async def made_otherwise(self, name: str) -> list[str]:
        """How a class differs from what one that was made today would be."""
        config = await self._query(self._client.collections.use(name).config.get())
        said: list[str] = []
        copies = int(config.replication_config.factor)
        if copies != self._replication:
            said.append(f"keeps each object {copies} times, and the file says `replication: {self._replication}`")
        vectors = (config.vector_config or {}).get("default")
        index = vectors.vector_index_config if vectors is not None else config.vector_index_config
        quantizer = _quantizer_of(index)
        if quantizer != self._quantizer:
            said.append(f"keeps vectors in memory as {quantizer!r}, and the file says `quantizer: {self._quantizer}`")
        return said

    def backups(self, backend: str) -> WeaviateBackups:
        """The backups that the server makes itself, on its backend `filesystem`, `s3`, `gcs` or `azure`."""
        return WeaviateBackups(self._client.backup, BackupStorage(backend), self._url, self._query)

    def classes(
        self, text_property: str | None = None, *, close: Callable[[], Awaitable[None]] | None = None
    ) -> WeaviateClasses:
        """The classes that we did not make, to be imported; their text is in this property."""

        async def stay() -> None:
            """Whoever opened the store closes it."""

        return WeaviateClasses(
            self._client,
            self._query,
            lambda name, description: _described(name, description) is not None,
            text_property,
            close or stay,
        )

    async def aclose(self) -> None:
        await self._client.close()

    # --- details ---------------------------------------------------------------------------

    async def _query(self, answer: Awaitable[_T]) -> _T:
        return await _answered(answer, self._url, self._query_seconds)

    async def _waiting(self, name: str) -> int:
        """The vectors in the longest of the nodes' queues."""
        try:
            nodes = await self._query(self._client.cluster.nodes(collection=name, output="verbose"))
        except StoreUnavailable:
            raise
        except StoreError as error:
            if isinstance(error.__cause__, InsufficientPermissionsError):
                return 0
            raise
        # A node that is away has no shards to speak of.
        return max((sum(shard.vector_queue_length for shard in node.shards or ()) for node in nodes), default=0)

    def _handle(self, name: str) -> Any:
        """What the client reaches a class through; takes no request."""
        if name not in self._handles:
            collection = self._client.collections.use(name)
            self._handles[name] = collection.with_consistency_level(self._consistency)
        return self._handles[name]

    async def _look_up(self, name: str) -> _Index:
        """Ask the server which collection a name stands for now."""
        self._seen.pop(name, None)
        # The client would capitalise another name, and the server look into its path.
        config = await self._config(name) if NAME.fullmatch(name) else None
        if config is None:
            known, aliases = (
                [collection.name for collection in await self.list_collections()],
                await self.list_aliases(),
            )
            if name not in known and aliases.get(name) not in known:
                raise CollectionMissing(name, [*known, *aliases])
            # Somebody has just made it, or the server has just started and opens one after the other.
            config = await self._config(name)
            if config is None:
                raise StoreUnavailable(self._url, f"it lists {name!r} and does not find it yet")
        collection = _described(config.name, config.description)
        if collection is None:
            raise StoreError(f"{config.name!r} is a class that Sekha did not make, so it is left alone.")
        index = _Index(collection, frozenset(each.name for each in config.properties))
        self._seen[name] = index
        return index

    async def _config(self, name: str) -> Any:
        try:
            return await self._query(self._client.collections.use(name).config.get(simple=True))
        except StoreError as error:
            if getattr(error.__cause__, "status_code", None) == 404:
                return None
            raise

    async def _create(self, collection: Collection) -> None:
        """Create the class with everything said explicitly, since servers differ in their defaults."""
        creating = self._client.collections.create(
            collection.name,
            description=orjson.dumps(
                {"sekha": {"dimension": collection.dimension, "fingerprint": collection.fingerprint}}
            ).decode(),
            vector_config=Configure.Vectors.self_provided(
                vector_index_config=Configure.VectorIndex.hnsw(distance_metric=VectorDistances.COSINE),
                quantizer=_quantizer(self._quantizer),
            ),
            properties=[
                Property(name="text", data_type=DataType.TEXT, tokenization=Tokenization.WORD, index_filterable=False),
                Property(name="properties", data_type=DataType.TEXT, index_filterable=False, index_searchable=False),
                *(_filterable(name, kind) for name, kind in OURS.items()),
            ],
            inverted_index_config=Configure.inverted_index(
                bm25_k1=1.2, bm25_b=0.75, stopwords_preset=StopwordsPreset.NONE, index_null_state=True
            ),
            # A copy that was away is brought up to date behind the scenes, not only where a read notices.
            replication_config=Configure.replication(factor=self._replication, async_enabled=self._replication > 1),
            multi_tenancy_config=Configure.multi_tenancy(enabled=False),
        )
        try:
            await self._query(creating)
        except StoreUnavailable:
            raise
        except StoreError:
            # Another process may have been first; the second look raises when it made something else.
            if await self._config(collection.name) is None:
                raise
            await self.ensure_collection(collection)

    async def _declare(self, index: _Index, names: set[str]) -> None:
        """Add the properties that records of this collection have for the first time."""
        missing = sorted(names - index.declared)
        for name in missing:
            kind: Kind = "text" if name.startswith("text") else "number"
            config = self._client.collections.use(index.collection.name).config
            try:
                await self._query(config.add_property(_filterable(name, kind)))
            except StoreUnavailable:
                raise
            except StoreError:
                if name not in (await self._look_up(index.collection.name)).declared:
                    raise

    def _messages(self, objects: Iterable[_Object], refused: dict[str, str]) -> Iterator[list[_Object]]:
        """The objects in batches that fit into a message; what fits into none is noted as refused."""
        batch: list[_Object] = []
        size = 0
        for each in objects:
            if each.size > self._message_bytes:
                refused[each.uuid] = f"it takes {each.size} bytes, and a message {self._message_bytes} at the most"
                continue
            if batch and (len(batch) == MESSAGE_RECORDS or size + each.size > self._message_bytes):
                yield batch
                batch, size = [], 0
            batch.append(each)
            size += each.size
        if batch:
            yield batch

    async def _insert(self, name: str, batch: Sequence[_Object]) -> dict[str, str]:
        inserting = self._handle(name).data.insert_many([each.to_insert() for each in batch])
        try:
            answer = await _answered(inserting, self._url, self._insert_seconds)
        except StoreError as error:
            if not isinstance(error.__cause__, WeaviateInsertManyAllFailedError) or error.retryable:
                raise
            return {each.uuid: _detail(error.__cause__) for each in batch}
        return {batch[at].uuid: _short(error.message) for at, error in answer.errors.items()}

    async def _delete(self, name: str, condition: _Condition) -> int:
        """Delete in rounds, since the server ends each at its QUERY_MAXIMUM_RESULTS."""
        deleted = 0
        while True:
            deleting = self._handle(name).data.delete_many(where=condition)
            answer = await _answered(deleting, self._url, self._insert_seconds)
            deleted += answer.successful
            if answer.failed:
                raise StoreUnavailable(self._url, f"{answer.failed} of {answer.matches} objects could not be deleted")
            if not answer.matches:
                return int(deleted)

    async def _searched(
        self, name: str, where: Filter | None, search: Callable[[_Index], Awaitable[list[_H]]]
    ) -> list[_H]:
        """Search by what is remembered of a name; when that fails, by what the server says of it."""
        names = frozenset[str]() if where is None else needed(where)
        index = self._seen.get(name)
        if index is not None and names <= index.declared:
            try:
                return await search(index)
            except StoreUnavailable:
                # It may come back with other collections.
                self._seen.pop(name, None)
                raise
            except StoreError:
                pass  # An alias may point elsewhere by now, or a collection be made anew.
        return await search(await self._look_up(name))

    async def _nearest(self, name: str, index: _Index, vector: Vector, limit: int, where: Filter | None) -> list[Hit]:
        collection = index.collection
        query = unit(collection.name, collection.dimension, [(None, vector)])[0]
        condition = True if where is None else _condition(where, index.declared)
        if limit < 1 or condition is False:
            return []
        # By its own name and not by the collection's, so that the server resolves an alias.
        search = self._handle(name).query.near_vector

        async def ask(asked: int) -> Any:
            return await search(
                query,
                limit=asked,
                filters=None if condition is True else condition,
                return_properties=["text", "properties"],
                return_metadata=MetadataQuery(distance=True),
            )

        return await self._first(ask, limit, _hit, lambda hit: hit.distance)

    async def _worded(
        self, name: str, index: _Index, wanted: Sequence[str], limit: int, where: Filter | None
    ) -> list[TextHit]:
        condition = True if where is None else _condition(where, index.declared)
        if not wanted or limit < 1 or condition is False:
            return []
        search = self._handle(name).query.bm25

        async def ask(asked: int) -> Any:
            return await search(
                " ".join(wanted),
                query_properties=["text"],
                operator=BM25Operator.or_(minimum_match=1),
                limit=asked,
                filters=None if condition is True else condition,
                return_properties=["text", "properties"],
                return_metadata=MetadataQuery(score=True),
            )

        return await self._first(ask, limit, _text_hit, lambda hit: -hit.score)

    async def _first(
        self,
        ask: Callable[[int], Awaitable[Any]],
        limit: int,
        as_hit: Callable[[Any], _H],
        rank: Callable[[_H], float],
    ) -> list[_H]:
        """The hits of the lowest ranks, ties by uuid."""
        if limit > MOST_HITS:
            raise StoreError(f"Weaviate returns at most {MOST_HITS} hits, and {limit} were asked for.")
        asked = min(limit + 1, MOST_HITS)
        while True:
            answer = await self._query(ask(asked))
            hits = sorted(map(as_hit, answer.objects), key=lambda hit: (rank(hit), hit.uuid))
            # The server breaks ties as it likes, so all of a tie has to be here before it is cut.
            cut = len(hits) == asked < MOST_HITS and rank(hits[-1]) == rank(hits[limit - 1])
            if not cut:
                return hits[:limit]
            asked = min(2 * asked, MOST_HITS)


@dataclass(frozen=True, slots=True)
class _Object:
    """A checked record, as it goes into a message."""

    uuid: str
    text: str
    properties: str
    indexed: dict[str, str | float]
    vector: Vector

    @property
    def size(self) -> int:
        """Bytes in a message, at the most: a character takes up to four, and properties go twice."""
        return 4 * (len(self.text) + 2 * len(self.properties)) + self.vector.nbytes + 1000

    def to_insert(self) -> Any:
        return DataObject(
            properties={"text": self.text, "properties": self.properties, **self.indexed},
            uuid=self.uuid,
            vector=self.vector,
        )


def _described(name: str, description: str | None) -> Collection | None:
    """The collection that a class is; None for one that is not ours."""
    try:
        said = orjson.loads(description or "")["sekha"]
        return Collection(name, int(said["dimension"]), str(said["fingerprint"]))
    except (ValueError, KeyError, TypeError):
        return None


def _quantizer(quantizer: Quantizer) -> Any:
    match quantizer:
        case "none":
            return Configure.VectorIndex.Quantizer.none()
        case "rq-8":
            return Configure.VectorIndex.Quantizer.rq(bits=8, rescore_limit=RESCORED)
        case _:
            assert_never(quantizer)


def _quantizer_of(index: Any) -> str:
    """What the file calls the quantizer of a class's index."""
    quantizer = getattr(index, "quantizer", None)
    if quantizer is None:
        return "none"
    return f"rq-{quantizer.bits}" if hasattr(quantizer, "bits") else type(quantizer).__name__.strip("_")


def _filterable(name: str, kind: Kind) -> Any:
    if kind == "number":
        return Property(name=name, data_type=DataType.NUMBER, index_filterable=True)
    return Property(
        name=name,
        data_type=DataType.TEXT,
        tokenization=Tokenization.FIELD,  # the whole value as one token, so that equal is equal
        index_filterable=True,
        index_searchable=False,
    )


def _record(found: Any) -> Record:
    kept = found.properties
    vector = np.array(found.vector["default"], dtype=np.float32) if found.vector else None
    return Record(str(found.uuid), kept["text"], vector, orjson.loads(kept["properties"]))


def _hit(found: Any) -> Hit:
    kept = found.properties
    distance = min(max(found.metadata.distance, 0.0), 2.0)
    return Hit(str(found.uuid), distance, kept["text"], orjson.loads(kept["properties"]))


def _text_hit(found: Any) -> TextHit:
    kept = found.properties
    return TextHit(str(found.uuid), found.metadata.score, kept["text"], orjson.loads(kept["properties"]))


# --- filters -------------------------------------------------------------------------------

_ORDER: Final = {"lt": "less_than", "le": "less_or_equal", "gt": "greater_than", "ge": "greater_or_equal"}


def _condition(where: Filter, declared: frozenset[str]) -> _Condition:
    """The filter in the client's terms. A property that is not declared, no record has."""
    match where:
        case AllOf(filters):
            parts = [_condition(inner, declared) for inner in filters]
            if any(part is False for part in parts):
                return False
            parts = [part for part in parts if part is not True]
            return Where.all_of(parts) if parts else True
        case AnyOf(filters):
            return _any([_condition(inner, declared) for inner in filters])
        case Not(inner):
            return _not(_condition(inner, declared))
        case Compare():
            return _compared(where, declared)
        case _:
            assert_never(where)


def _any(parts: Sequence[_Condition]) -> _Condition:
    if any(part is True for part in parts):
        return True
    parts = [part for part in parts if part is not False]
    return Where.any_of(parts) if parts else False


def _not(condition: _Condition) -> _Condition:
    return not condition if isinstance(condition, bool) else ~condition


def _compared(compare: Compare, declared: frozenset[str]) -> _Condition:
    check_compared(compare)
    value = compare.value
    if isinstance(value, tuple):
        return _among(compare.property, value, declared)
    if compare.operator == "eq":
        return _among(compare.property, (value,), declared)
    if compare.operator == "ne":
        return _not(_among(compare.property, (value,), declared))
    if value is None or (name := name_of(compare.property, kind_of(value))) not in declared:
        return False
    return getattr(Where.by_property(name), _ORDER[compare.operator])(indexed_value(value))


def _among(name: str, values: Sequence[Scalar], declared: frozenset[str]) -> _Condition:
    names = {kind: name_of(name, kind) for kind in KINDS if name_of(name, kind) in declared}
    parts: list[_Condition] = []
    for kind, known in names.items():
        wanted = [indexed_value(value) for value in values if value is not None and kind_of(value) == kind]
        if wanted:
            parts.append(Where.by_property(known).contains_any(wanted))
    if None in values:
        # "Is not none" turned round: of objects older than the property, the server notes neither.
        parts.append(_not(_any([Where.by_property(known).is_none(False) for known in names.values()])))
    return _any(parts)


# --- failures ------------------------------------------------------------------------------

_GONE: Final = (
    WeaviateClosedClientError,
    WeaviateConnectionError,
    WeaviateRetryError,
    WeaviateTimeoutError,
)
_PASSING: Final = frozenset({"ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})
_TROUBLE: Final = re.compile(
    "read-only|enough replicas|consistency level|connection refused|deadline exceeded|memory pressure|not enough memory"
    # It has just started, knows of the class and has not opened it yet.
    "|non-existing index"
)
"""What servers say, under no code of its own, when it is they who are in trouble and not the request."""


async def _answered(answer: Awaitable[_T], url: str, seconds: float) -> _T:
    """Await the client, and say in our terms what went wrong."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError as error:
        raise StoreUnavailable(url, f"no answer within {seconds:g} s") from error
    except httpx.HTTPError as error:
        raise StoreUnavailable(url, f"the connection failed with {type(error).__name__}") from error
    except WeaviateBaseError as error:
        raise _translated(error, url) from error


def _translated(error: Any, url: str) -> StoreError:
    call = _grpc_call(error)
    code = call.code().name if call else ""
    status = error.status_code if isinstance(error, UnexpectedStatusCodeError) else 0
    detail = _detail(error)
    if status == 401 or code == "UNAUTHENTICATED":
        return StoreError(f"Weaviate at {url} refuses our key. Check `api_key` under `store:` in sekha.yaml.")
    if isinstance(error, InsufficientPermissionsError):
        return StoreError(f"Weaviate at {url} does not let our key do this: {detail}.")
    gone = isinstance(error, _GONE) or _failed_to_connect(error)
    passing = gone or code in _PASSING or status == 429 or status >= 500
    if passing or _TROUBLE.search(detail):
        return StoreUnavailable(url, detail)
    return StoreError(f"Weaviate at {url} refuses: {detail}.")


def _detail(error: Any) -> str:
    """What happened, without the client's boilerplate."""
    if isinstance(error, WeaviateConnectionError) or _failed_to_connect(error):
        return "it cannot be reached"
    if isinstance(error, WeaviateTimeoutError):
        return "it did not answer in time"
    call = _grpc_call(error)
    said = call.details() if call else error.message
    return _short(str(said).removeprefix("Every object failed during insertion. Here is the set of all errors: "))


def _failed_to_connect(error: Any) -> bool:
    # Without a cause, it is the client that refuses a server as too old.
    return isinstance(error, WeaviateStartUpError) and error.__cause__ is not None


def _grpc_call(error: Any) -> Any:
    """The gRPC call that failed; None when it was none. The client does not always name it as the cause."""
    cause = error.__cause__ or error.__context__
    return cause if hasattr(cause, "details") else None


def _short(said: str) -> str:
    line = " ".join(said.split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:299]}…"


def _check_version(url: str, version: str) -> None:
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise StoreError(f"Weaviate at {url} is version {version}, and {oldest} or later is needed. Upgrade it.")


async def _check_grpc(url: str, host: str, port: int, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        raise StoreUnavailable(
            url, f"it answers, and its gRPC port {port} does not. Check `grpc_port` under `store:`"
        ) from error
    writer.close()
    await writer.wait_closed()
