"""Documents in: split, compare with what is stored, price, embed what changed, keep it. Resumable by nature."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from sekha.documents import Chunk, Document
from sekha.embedding import EmbedRequest
from sekha.errors import IngestIncomplete, InvalidRequest, ProviderError, ProviderRejected, SekhaError, VectorRefused
from sekha.ledger import Hold
from sekha.pricing import Usage
from sekha.registry import COLLECTION_NAME
from sekha.routing import Estimates, Plan
from sekha.settling import let_go, reserved
from sekha.vectors.base import Vector

__all__ = [
    "Batch",
    "BatchEmbedded",
    "Changes",
    "Chunks",
    "Failure",
    "Indexed",
    "IngestReport",
    "IngestRequest",
    "IngestSteps",
    "LeftOut",
    "Progress",
    "Stale",
    "Stored",
    "ingest",
]


NOTHING_USED = Usage()


@dataclass(frozen=True, kw_only=True)
class IngestRequest:
    """Documents for a collection: a folder or file to read, or the documents themselves."""

    collection: str = "documents"
    path: str | None = None
    documents: tuple[Document, ...] = ()
    chunk_size: int = 1200
    """Characters of a chunk at the most."""
    chunk_overlap: int = 150
    batch_size: int = 512
    """Chunks embedded and stored at a time: what one crash can cost, and one task run shows."""
    max_document_mb: float = 10.0
    skip_refused: bool = False
    """Leave out documents that cannot be read, instead of refusing all."""
    max_cost: Decimal | None = None
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not COLLECTION_NAME.fullmatch(self.collection):
            raise InvalidRequest(
                f"`collection` is {self.collection!r}; it must be a letter, then letters, digits and underscores.",
                field="collection",
            )
        if not self.path and not self.documents:
            raise InvalidRequest("There is nothing to ingest: give a `path`, or `documents`.", field="documents")
        for name, least in (("chunk_size", 20), ("batch_size", 1)):
            if (value := getattr(self, name)) < least:
                raise InvalidRequest(f"`{name}` is {value!r}; it must be {least} or more.", field=name)
        if not 0 <= self.chunk_overlap <= self.chunk_size // 2:
            raise InvalidRequest(
                f"`chunk_overlap` is {self.chunk_overlap!r}; it must be 0 to half of `chunk_size`, "
                f"{self.chunk_size // 2}.",
                field="chunk_overlap",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A document that could not be read and that the request said to skip."""

    source: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Every document of the request, split."""

    collection: str
    documents: int
    chunks: tuple[Chunk, ...] = field(repr=False)
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Chunks that are embedded and stored together."""

    number: int
    chunks: tuple[Chunk, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """The stored chunks of a source from position `first` on, from when its document was longer."""

    source: str
    first: int


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What has to be done so that the collection holds the documents, and nothing else of their sources."""

    collection: str
    space: str
    """The store's name of the index, `Documents_768`."""
    to_embed: EmbedRequest
    batches: tuple[Batch, ...] = field(repr=False)
    stale: tuple[Stale, ...] = ()
    """What is stored of these sources and no longer in their documents."""
    unchanged: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchEmbedded:
    batch: Batch = field(repr=False)
    vectors: Vector = field(repr=False)
    usage: Usage
    cost: Decimal
    provider_id: str
    model_id: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What came of one batch: some chunks stored, perhaps some refused by the store."""

    number: int
    stored: int
    refused: tuple[Failure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Chunks of one source that are not stored, and why."""

    source: str
    chunks: int
    error: str


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """How far the store's index is."""

    waiting: int
    """Vectors that are kept and not yet found."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest did, in chunks, and what it cost."""

    collection: str
    space: str
    documents: int
    chunks: int
    embedded: int = 0
    unchanged: int = 0
    removed: int = 0
    not_yet_found: int = 0
    """Vectors that are kept, and found once the store has indexed them."""
    provider_id: str | None = None
    """None when nothing had to be embedded."""
    model_id: str | None = None
    usage: Usage = NOTHING_USED
    estimated_cost: Decimal = Decimal(0)
    cost: Decimal = Decimal(0)
    failures: tuple[Failure, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def missing(self) -> int:
        return sum(failure.chunks for failure in self.failures)


@dataclass(frozen=True, slots=True)
class IngestSteps:
    """The steps of an ingest: plain callables in-process, Prefect tasks in a flow."""

    read: Callable[[IngestRequest], Awaitable[Chunks]]
    compare: Callable[[IngestRequest, Chunks], Awaitable[Changes]]
    estimate: Callable[[EmbedRequest], Awaitable[Estimates]]
    select: Callable[[EmbedRequest, Estimates], Awaitable[Plan]]
    reserve: Callable[[Plan], Awaitable[Hold]]
    embed: Callable[[Batch, Plan, Hold], Awaitable[BatchEmbedded]]
    upsert: Callable[[Changes, BatchEmbedded], Awaitable[Stored]]
    settle: Callable[[Hold, None], Awaitable[None]]
    catch_up: Callable[[Changes, Sequence[Stored]], Awaitable[Indexed]]
    remove: Callable[[Changes, Indexed | None], Awaitable[int]]
    at_once: bool = False


Progress = Callable[[int, int], None]
"""Told the chunks done and the chunks to do, after every batch."""


async def ingest(
    request: IngestRequest, steps: IngestSteps, *, concurrency: int = 2, progress: Progress | None = None
) -> IngestReport:
    """Make the collection hold the documents, embedding only what changed.

    Nothing is written before every document was read and the whole was priced and reserved. Each
    batch is stored as soon as it is embedded, so a run that dies loses at most the batches under
    way, and the next one does only what is missing. Raises `IngestIncomplete`, with the report,
    when a batch failed.
    """
    chunks = await steps.read(request)
    changes = await steps.compare(request, chunks)
    report = IngestReport(
        collection=changes.collection,
        space=changes.space,
        documents=chunks.documents,
        chunks=len(chunks.chunks),
        unchanged=changes.unchanged,
        left_out=chunks.left_out,
    )
    if not changes.batches:
        removed = await steps.remove(changes, None) if changes.stale else 0
        return replace(report, removed=removed)

    estimates = await steps.estimate(changes.to_embed)
    plan = await steps.select(changes.to_embed, estimates)
    hold = await reserved(steps, plan)
    run = _Run(changes, plan, hold, steps, progress)
    try:
        await run.all_batches(concurrency)
    finally:
        # Every batch was charged when it came back; what the hold still has goes back.
        await let_go(steps.settle, hold)
    removed, indexed = 0, Indexed(waiting=0)
    if run.stored and not run.failures:
        indexed = await steps.catch_up(changes, tuple(run.stored))
        # What searches find now is there before what they found goes.
        removed = await steps.remove(changes, indexed) if changes.stale else 0
    first = run.embedded[0] if run.embedded else None
    report = replace(
        report,
        embedded=sum(stored.stored for stored in run.stored),
        removed=removed,
        not_yet_found=indexed.waiting,
        provider_id=first.provider_id if first else None,
        model_id=first.model_id if first else None,
        usage=sum((spent.usage for spent in run.embedded), NOTHING_USED),
        estimated_cost=plan.first.estimate.expected,
        cost=sum((spent.cost for spent in run.embedded), Decimal(0)),
        failures=tuple(run.failures),
    )
    if report.failures:
        cause = run.cause
        said = cause.said if isinstance(cause, ProviderError) else ""
        raise IngestIncomplete(report, retryable=cause is not None and cause.retryable, said=said) from cause
    return report


class _Run:
    """The batches of one ingest under way."""

    def __init__(self, changes: Changes, plan: Plan, hold: Hold, steps: IngestSteps, progress: Progress | None) -> None:
        self.changes = changes
        self.plan = plan
        self.hold = hold
        self.steps = steps
        self._progress = progress
        self.embedded: list[_Spent] = []
        self.stored: list[Stored] = []
        self.failures: list[Failure] = []
        self.cause: SekhaError | None = None
        self._stopped = False
        self._done = 0
        self._total = sum(len(batch.chunks) for batch in changes.batches)

    async def all_batches(self, concurrency: int) -> None:
        self._tell()
        waiting = iter(self.changes.batches)

        async def work() -> None:
            for batch in waiting:
                await self._one(batch)

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, len(self.changes.batches))):
                workers.create_task(work())

    async def _one(self, batch: Batch) -> None:
        if self._stopped:
            self._fail(batch, "not tried, since the one before it failed for a reason that would fail it too.")
            return
        try:
            embedded = await self.steps.embed(batch, self.plan, self.hold)
            self.embedded.append(_Spent(embedded.usage, embedded.cost, embedded.provider_id, embedded.model_id))
            stored = await self.steps.upsert(self.changes, embedded)
        except SekhaError as error:
            # What is wrong with these texts leaves the others to be tried. What is wrong with the
            # provider, the store or the configuration would fail each of them, and some at a price.
            if not isinstance(error, ProviderRejected | VectorRefused):
                self._stopped = True
            if self.cause is None:
                self.cause = error
            self._fail(batch, str(error))
        else:
            self.stored.append(stored)
            self.failures += stored.refused
            self._done += len(batch.chunks)
            self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(self._done, self._total)

    def _fail(self, batch: Batch, why: str) -> None:
        sources: dict[str, int] = {}
        for chunk in batch.chunks:
            sources[chunk.source] = sources.get(chunk.source, 0) + 1
        self.failures += [Failure(source=source, chunks=count, error=why) for source, count in sources.items()]


@dataclass(frozen=True, slots=True)
class _Spent:
    """What is kept of an embedded batch once its vectors are stored."""

    usage: Usage
    cost: Decimal
    provider_id: str
    model_id: str
