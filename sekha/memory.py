"""Keeping what passes the gateway: exchanges and vectors become records of a collection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Protocol, Self, TypeAlias, TypeVar
from uuid import UUID, uuid5

from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import (
    BadReply,
    BudgetExceeded,
    ContextExceeded,
    CostRefused,
    InvalidRequest,
    NoCandidate,
    ProviderRejected,
    SekhaError,
    StoreError,
    VectorRefused,
)
from sekha.indexes import Indexes
from sekha.memo import TEXT_BYTES, Memo, cut, exchange, streamed_in, vectors_in
from sekha.registry import Registry, Space
from sekha.vectors.base import Collection, Record, Vector, VectorStore

__all__ = ["Embed", "Failed", "Kept", "Memory"]

log = logging.getLogger("sekha.memory")

_NAMESPACE = UUID("5e4ba000-0000-5000-8000-000000000002")
"""Root of the UUIDs of what is remembered. Changing it would have what is delivered again stored twice."""
TEXTS_AT_ONCE = 64
RECORDS_AT_ONCE = 256
SHORTEST_TEXT = 200
"""What a model does not take at this length, it takes no shorter."""

Embed: TypeAlias = Callable[[EmbedRequest], Awaitable[Embedded]]


@dataclass(frozen=True, slots=True)
class Failed:
    """A memo that is not kept, and why."""

    memo: Memo
    error: str


@dataclass(slots=True)
class Kept:
    """What became of memos that were to be kept."""

    kept: int = 0
    left_out: int = 0
    """Vectors that belong to no space of the collection."""
    waiting: list[Memo] = field(default_factory=list)
    """Later they may be kept: the store or the embedder is down. `why` says so."""
    parked: list[Memo] = field(default_factory=list)
    """No budget has anything left for them."""
    failed: list[Failed] = field(default_factory=list)
    """They never will be."""
    why: SekhaError | None = None
    why_parked: SekhaError | None = None


@dataclass(frozen=True, slots=True)
class _Page:
    """A text of a memo, as it is to be stored."""

    memo: Memo
    uuid: str
    text: str = field(repr=False)
    was_cut: bool

    def shorter(self) -> Self | None:
        """Half of it; None when it is short already."""
        if len(self.text) <= SHORTEST_TEXT:
            return None
        text, _ = cut(self.text, len(self.text.encode()) // 2)
        return replace(self, text=text, was_cut=True)

    def record(self, index: Collection, vector: Vector) -> Record:
        memo = self.memo
        return Record(
            uuid=self.uuid,
            text=self.text,
            vector=vector,
            properties={
                "kind": memo.kind,
                "model": memo.model_id,
                "provider": memo.provider_id,
                "key": memo.key,
                "created": datetime.fromtimestamp(memo.at, UTC).isoformat(),
                "run_id": memo.id,
                "tags": ", ".join(memo.tags),
                "cut": self.was_cut,
                "embedding_fingerprint": index.fingerprint,
            },
        )


@dataclass(frozen=True, slots=True)
class _Vectors:
    """The vectors of one reply, on their way into a space."""

    memo: Memo
    records: tuple[Record, ...]

    def shorter(self) -> None:
        return None


class _Part(Protocol):
    @property
    def memo(self) -> Memo: ...
    def shorter(self) -> Self | None: ...


P = TypeVar("P", bound=_Part)


class Memory:
    """Keeps memos where they are to be. Keeping one twice changes nothing, and pays for no vector twice."""

    def __init__(
        self,
        registry: Registry,
        collection: str,
        *,
        store: Callable[[], Awaitable[VectorStore]],
        indexes: Indexes,
        embed: Embed,
    ) -> None:
        """`collection` is for memos that name none. Raises `UnknownModel` when no model embeds for it."""
        self._registry = registry
        self._collection = registry.space(collection).collection
        self._store = store
        self._indexes = indexes
        self._embed = embed
        self._left_out: set[str] = set()

    async def keep(self, memos: Sequence[Memo], *, one_by_one: bool = False) -> Kept:
        """Keep what can be kept, and say what became of the rest.

        `one_by_one` finds out the exchange that its embedder fails at whenever it is asked.
        """
        result = Kept()
        collections: dict[str, list[Memo]] = {}
        for memo in memos:
            collections.setdefault(memo.collection or self._collection, []).append(memo)
        for collection, some in collections.items():
            await self._keep_vectors(collection, [memo for memo in some if memo.kind == "embedding"], result)
            chats = [memo for memo in some if memo.kind == "chat"]
            # One that the file names no more is embedded for by default.
            await self._keep_chats(self._registry.space(collection), chats, result, one_by_one=one_by_one)
        return result

    # --- exchanges, which are embedded here ---

    async def _keep_chats(self, space: Space, memos: Sequence[Memo], result: Kept, *, one_by_one: bool) -> None:
        pages = [page for memo in memos if (page := await self._page(space, memo, result)) is not None]
        if not pages:
            return
        try:
            # The store comes first: when it is down, nobody pays for vectors that it cannot take.
            store = await self._store()
            index = await self._indexes.for_writing(space)
            there = await store.get(index.name, [page.uuid for page in pages])
        except SekhaError as error:
            result.waiting += [page.memo for page in pages]
            result.why = error
            return
        result.kept += len(there)
        missing = [page for page in pages if page.uuid not in there]
        failures, patience = 0, 3 if one_by_one else 1

        async def embed_and_store(some: Sequence[_Page], result: Kept) -> None:
            await self._embed_and_store(space, index, some, result)

        for batch in _by_payer(missing, 1 if one_by_one else TEXTS_AT_ONCE):
            waited = len(result.waiting)
            if failures < patience:
                await self._keep_batch(batch, embed_and_store, result)
                failures += len(result.waiting) > waited
            else:
                result.waiting += [page.memo for page in batch]

    async def _embed_and_store(self, space: Space, index: Collection, pages: Sequence[_Page], result: Kept) -> None:
        first, prefix = pages[0].memo, space.model.document_prefix
        embedded = await self._embed(
            EmbedRequest(
                texts=tuple(prefix + page.text for page in pages),
                model=space.asked_as,
                bulk=True,
                tags=frozenset(first.tags),
                key=first.key,
            )
        )
        found = zip(pages, embedded.vectors, strict=True)
        parts = [_Vectors(page.memo, (page.record(index, vector),)) for page, vector in found]
        await self._upsert(index, parts, result)

    async def _page(self, space: Space, memo: Memo, result: Kept) -> _Page | None:
        try:
            question = memo.texts[0]
            answer = await streamed_in(memo.said) if memo.said else memo.texts[1]
        except (AttributeError, IndexError, KeyError, TypeError):
            result.failed.append(Failed(memo, BadReply.code))
            return None
        # A token is four bytes or so; a text that has more of them is cut once it is refused.
        window = space.model.context_window
        text, was_cut = exchange(question, answer, TEXT_BYTES if window is None else min(TEXT_BYTES, 4 * window))
        return _Page(memo, _uuid(space, memo.id), text, was_cut)

    # --- vectors, which their caller has paid for ---

    async def _keep_vectors(self, collection: str, memos: Sequence[Memo], result: Kept) -> None:
        found: dict[str, tuple[Space, list[tuple[Memo, Vector]]]] = {}
        for memo in memos:
            try:
                vectors = await asyncio.to_thread(vectors_in, memo)
            except ValueError:
                result.failed.append(Failed(memo, BadReply.code))
                continue
            space = self._space_of(memo, collection, vectors.shape[1])
            if space is None:
                result.left_out += 1
                continue
            found.setdefault(space.fingerprint, (space, []))[1].append((memo, vectors))
        for space, parts in found.values():
            await self._keep_in(space, parts, result)

    async def _keep_in(self, space: Space, found: Sequence[tuple[Memo, Vector]], result: Kept) -> None:
        try:
            index = await self._indexes.for_writing(space)
        except SekhaError as error:
            result.waiting += [memo for memo, _ in found]
            result.why = error
            return

        async def upsert(some: Sequence[_Vectors], result: Kept) -> None:
            await self._upsert(index, some, result)

        for batch in _batches([_records(memo, space, index, vectors) for memo, vectors in found]):
            await self._keep_batch(batch, upsert, result)

    def _space_of(self, memo: Memo, collection: str, dimension: int) -> Space | None:
        """Where in a collection vectors of this model and length lie; None when that is nowhere."""
        name = f"{memo.provider_id}/{memo.model_id}"
        model = next((model for model in self._registry if model.name == name), None)
        if model is None or model.dimension != dimension:
            self._leave_out(name, f"vectors of {dimension} numbers are not what the file declares of it.")
        elif model.document_prefix:
            self._leave_out(name, "the file wants a `document_prefix` before its texts, and callers embed without it.")
        else:
            return Space(collection, model)
        return None

    def _leave_out(self, model: str, why: str) -> None:
        if model not in self._left_out:
            self._left_out.add(model)
            log.warning("Vectors of %s are not remembered: %s", model, why)

    # --- both ---

    async def _keep_batch(
        self,
        parts: Sequence[P],
        keep: Callable[[Sequence[P], Kept], Awaitable[None]],
        result: Kept,
    ) -> None:
        try:
            await keep(parts, result)
        except (BudgetExceeded, CostRefused) as error:
            result.parked += [part.memo for part in parts]
            result.why_parked = error
        except SekhaError as error:
            if not _is_about_one(error):
                result.waiting += [part.memo for part in parts]
                result.why = error
            elif len(parts) > 1:
                half = len(parts) // 2
                await self._keep_batch(parts[:half], keep, result)
                await self._keep_batch(parts[half:], keep, result)
            else:
                await self._keep_less(parts[0], error, keep, result)

    async def _keep_less(
        self, part: P, error: SekhaError, keep: Callable[[Sequence[P], Kept], Awaitable[None]], result: Kept
    ) -> None:
        """Keep a part of a text that is too long, or give up."""
        too_long = isinstance(error, ContextExceeded | NoCandidate)
        if too_long and (shorter := part.shorter()) is not None:
            await self._keep_batch([shorter], keep, result)
        elif isinstance(error, NoCandidate):
            # Then it is not the length: the configuration leaves nobody to embed, and that can be mended.
            result.waiting.append(part.memo)
            result.why = error
        else:
            result.failed.append(Failed(part.memo, error.code))

    async def _upsert(self, index: Collection, parts: Sequence[_Vectors], result: Kept) -> None:
        store = await self._store()
        records = [record for part in parts for record in part.records]
        refused: dict[str, str] = {}
        for at in range(0, len(records), RECORDS_AT_ONCE):
            refused |= await store.upsert(index.name, records[at : at + RECORDS_AT_ONCE])
        self._indexes.written(index)
        for part in parts:
            why = next((refused[record.uuid] for record in part.records if record.uuid in refused), None)
            if why is None:
                result.kept += 1
            else:
                result.waiting.append(part.memo)
                result.why = StoreError(f"Collection {index.name!r} does not take it: {why}")


def _records(memo: Memo, space: Space, index: Collection, vectors: Vector) -> _Vectors:
    texts = [cut(text, TEXT_BYTES) for text in memo.texts]
    pages = [_Page(memo, _uuid(space, f"{memo.id}/{at}"), *each) for at, each in enumerate(texts)]
    return _Vectors(memo, tuple(page.record(index, vector) for page, vector in zip(pages, vectors, strict=True)))


def _uuid(space: Space, name: str) -> str:
    """The same for the same run, so that what is delivered again replaces."""
    return str(uuid5(_NAMESPACE, "\0".join((space.collection, "memory", name))))


def _by_payer(pages: Sequence[_Page], size: int) -> Iterator[list[_Page]]:
    """Batches of so many at the most that count against the same budgets."""

    def payer(page: _Page) -> tuple[str, tuple[str, ...]]:
        return page.memo.key or "", page.memo.tags

    for _, group in groupby(sorted(pages, key=payer), key=payer):
        of_one = list(group)
        yield from (of_one[at : at + size] for at in range(0, len(of_one), size))


def _is_about_one(error: SekhaError) -> bool:
    """Whether one text or vector among several may be at fault, which the error does not name."""
    if isinstance(error, NoCandidate):
        return not error.retryable
    return isinstance(error, ProviderRejected | VectorRefused | InvalidRequest)


def _batches(parts: Sequence[_Vectors]) -> Iterator[list[_Vectors]]:
    batch: list[_Vectors] = []
    for part in parts:
        batch.append(part)
        if sum(len(each.records) for each in batch) >= RECORDS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
