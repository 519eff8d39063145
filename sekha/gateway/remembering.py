"""What the gateway remembers: written down before the answer goes out, and kept in its collection behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sekha.calling import Clock
from sekha.chat import ChatRequest, Reply
from sekha.embedding import Embedded, EmbedRequest, RawEmbedded
from sekha.embedding import embed as embed_in_order
from sekha.errors import SekhaError
from sekha.gateway.finished import UnderWay
from sekha.gateway.serving import Serving
from sekha.memo import TEXT_BYTES, Memo, answer_in, decode, encode, question_in
from sekha.memory import Embed, Failed, Kept, Memory
from sekha.outbox import Claim, Outbox
from sekha.resources import WALL

__all__ = ["Pace", "Remembering", "Stats"]

log = logging.getLogger("sekha.memory")

OUTBOX_BYTES = 1 << 30
"""So much of each may wait; what comes then is not remembered."""
APART_BYTES = 64 * 1024
"""What is larger is written by a thread, since the event loop serves others meanwhile."""
MANY_SEGMENTS = 200
HAND_OVER_SECONDS_WHEN_MANY = 30.0
"""While nothing can be kept, fewer and larger segments are easier on everybody."""
LAST_SECONDS = 5.0
ALONE_EVERY = 4
"""Of so many tries in vain, one looks for the exchange that is at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long to wait before what failed is tried again, with full jitter, and when to give up."""

    look_seconds: float = 0.25
    shortest_seconds: float = 1.0
    longest_seconds: float = 300.0
    shortest_parked_seconds: float = 60.0
    longest_parked_seconds: float = 3600.0
    give_up_seconds: float = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the start of this process, but for the bytes, which are of all processes."""

    accepted: int
    kept: int
    left_out: int
    """Vectors of a model whose dimension is another one's in the collection."""
    parked: int
    """Exchanges that no budget has anything left for; they are tried for a day."""
    given_up: int
    lost: int
    """Not even written down: the disk or the outbox was full."""
    waiting_bytes: int
    parked_bytes: int


@dataclass(slots=True)
class _Line:
    """One of the folders, and how its delivery goes."""

    outbox: Outbox
    shortest_seconds: float
    longest_seconds: float
    parks: bool = False
    tries: int = 0
    """In vain, in a row."""
    due: float = 0.0
    blamed: dict[Path, int] = field(default_factory=dict)
    """How often a segment failed where the one before had not."""
    told: str = ""

    def wait(self, clock: Clock) -> None:
        longest = min(self.longest_seconds, self.shortest_seconds * 2.0 ** min(self.tries, 30))
        self.due = clock.now() + clock.random() * longest
        self.tries += 1


class Remembering:
    """Takes answers on the event loop, and keeps them in the collection by and by.

    >>> await remembering.chat(run_id, request, reply)
    >>> await x.answer(200, ...)

    What it has taken survives `kill -9`: whoever has received a whole answer knows that it is written
    down. Several may share a folder, in one process or in many. One of them delivers, and another does
    when it stands back or its process dies; something may then be delivered twice, which changes nothing.
    Each answer is kept in the collection that remembered when it was taken, whoever delivers it.
    """

    def __init__(
        self,
        folder: Path,
        collection: str,
        *,
        pace: Pace | None = None,
        clock: Clock = WALL,
        wall: Callable[[], float] = time.time,
        max_bytes: int = OUTBOX_BYTES,
    ) -> None:
        """Raises `OSError` when the folder cannot be made."""
        self._collection = collection
        self._pace = pace = pace or Pace()
        self._clock = clock
        self._wall = wall

        def line(name: str, shortest_seconds: float, longest_seconds: float, *, parks: bool = False) -> _Line:
            return _Line(Outbox(folder / name, max_bytes=max_bytes), shortest_seconds, longest_seconds, parks=parks)

        # Vectors need no embedder, so they do not wait for one.
        self._vectors = line("embeddings", pace.shortest_seconds, pace.longest_seconds)
        self._chats = line("chats", pace.shortest_seconds, pace.longest_seconds)
        self._parked = line("parked", pace.shortest_parked_seconds, pace.longest_parked_seconds, parks=True)
        self._lines = (self._vectors, self._chats, self._parked)
        self._given_up = Outbox(folder / "given-up", max_bytes=max_bytes)
        self._claim = Claim(folder)
        self._ending = asyncio.Event()
        self._tending: list[asyncio.Task[None]] = []
        self._full = False
        self._counts = {"accepted": 0, "kept": 0, "left_out": 0, "parked": 0, "given_up": 0, "lost": 0}

    @property
    def stats(self) -> Stats:
        return Stats(
            **self._counts,
            waiting_bytes=self._vectors.outbox.used + self._chats.outbox.used,
            parked_bytes=self._parked.outbox.used,
        )

    # --- before the answer goes out ---

    async def chat(self, run_id: str, request: ChatRequest, reply: Reply, events: bytes = b"") -> None:
        """Take an exchange; of a streamed answer `events` is what it said. Never raises but when cancelled."""
        with self._sparing_the_answer():
            texts = [question_in(request.messages)]
            if not events:
                choices = reply.body.get("choices")
                texts.append(reply.text[:TEXT_BYTES] or (answer_in(choices[0]["message"]) if choices else ""))
            await self._take(self._chats.outbox, self._memo(run_id, request, reply, tuple(texts), events))

    async def vectors(self, run_id: str, request: EmbedRequest, embedded: RawEmbedded) -> None:
        """Take texts and their vectors. Never raises but when cancelled."""
        with self._sparing_the_answer():
            memo = self._memo(run_id, request, embedded, request.texts, embedded.raw)
            await self._take(self._vectors.outbox, memo)

    def _memo(
        self,
        run_id: str,
        request: ChatRequest | EmbedRequest,
        by: Reply | RawEmbedded,
        texts: tuple[str, ...],
        said: bytes,
    ) -> Memo:
        return Memo(
            id=run_id,
            kind="chat" if isinstance(request, ChatRequest) else "embedding",
            at=self._wall(),
            provider_id=by.provider_id,
            model_id=by.model_id,
            collection=self._collection,
            key=request.key,
            tags=tuple(sorted(request.tags)),
            texts=texts,
            said=said,
        )

    async def _take(self, outbox: Outbox, memo: Memo) -> None:
        item = encode(memo)
        if len(item.head) + len(item.attachment) > APART_BYTES:
            await asyncio.to_thread(outbox.put_apart, [item])
        else:
            outbox.put(item)
        self._counts["accepted"] += 1
        self._full = False

    @contextlib.contextmanager
    def _sparing_the_answer(self) -> Iterator[None]:
        """Whatever fails in here is lost to the memory, and to nobody else: the answer is paid for."""
        try:
            yield
        except OSError as error:
            self._counts["lost"] += 1
            if not self._full:
                log.warning("Nothing is remembered at the moment, since the outbox takes nothing: %s", error.strerror)
            self._full = True
        except Exception as error:
            self._counts["lost"] += 1
            # Its message and the traceback may quote what was asked.
            log.error("An answer is not remembered: %s, which nobody foresaw", type(error).__name__)  # noqa: TRY400
            log.debug("an answer is not remembered", exc_info=True)

    # --- behind it ---

    def start(self, serving: Serving) -> None:
        """Begin to deliver what was taken, be it by others before.

        Raises `UnknownModel` when there is no model to embed under.
        """
        resources = serving.resources
        memory = Memory(
            resources.registry,
            self._collection,
            store=resources.store,
            indexes=resources.indexes,
            embed=_embedding(serving),
        )
        self._tend_lines(memory)

    async def stand_back(self) -> None:
        """End with what is being delivered, and leave the rest to another, with whatever is still taken."""
        await self._end_tending()
        self._claim.let_go()
        self._tend_lines(None)

    async def aclose(self) -> None:
        """End with what is being delivered; the rest waits for another, or for the next start."""
        await self._end_tending()
        for line in self._lines:
            line.outbox.hand_over()
        self._claim.let_go()

    def _tend_lines(self, memory: Memory | None) -> None:
        self._tending = [asyncio.create_task(self._tend(line, memory)) for line in self._lines]

    async def _end_tending(self) -> None:
        self._ending.set()
        if self._tending:
            # What is being delivered may be paid for already.
            _, late = await asyncio.wait(self._tending, timeout=LAST_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._tending = []
        self._ending.clear()

    async def _tend(self, line: _Line, memory: Memory | None) -> None:
        """Hand over what was put, and deliver it into the memory unless another does."""
        while not self._ending.is_set():
            try:
                segments = await asyncio.to_thread(line.outbox.look)
                many = segments > MANY_SEGMENTS
                line.outbox.hand_over(
                    older_than_seconds=HAND_OVER_SECONDS_WHEN_MANY if many else self._pace.look_seconds
                )
                if memory is not None and self._clock.now() >= line.due and self._claim.held():
                    await self._deliver(line, memory)
            except OSError as error:
                self._tell(line, f"the outbox cannot be read or written ({error.strerror})")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.look_seconds):
                    await self._ending.wait()

    async def _deliver(self, line: _Line, memory: Memory) -> None:
        paths = await asyncio.to_thread(line.outbox.ready)
        line.blamed = {path: count for path in paths if (count := line.blamed.get(path))}
        parked = False
        # What nobody is to blame for goes first.
        for path in sorted(paths, key=lambda path: (line.blamed.get(path, 0), path)):
            memos = await asyncio.to_thread(self._read, line.outbox, path)
            alone = line.blamed.get(path, 0) > 1 or line.tries % ALONE_EVERY == ALONE_EVERY - 1
            try:
                result = await memory.keep(memos, one_by_one=alone)
            except Exception as error:  # whatever it is, it must not end the delivery of everything else
                # The traceback may quote what was asked.
                log.debug("segment %s", path.name, exc_info=True)
                result = Kept(waiting=memos, why=SekhaError(f"{type(error).__name__}, which nobody foresaw"))
            await self._settle(line, path, memos, result)
            parked = parked or bool(result.parked)
            if result.kept:
                line.tries = 0
            if result.waiting:
                if line.tries == 0:
                    line.blamed[path] = line.blamed.get(path, 0) + 1
                self._tell(line, str(result.why))
                return line.wait(self._clock)
            if self._ending.is_set():
                return None
        if parked and line.parks:
            line.wait(self._clock)
        else:
            line.tries, line.told = 0, ""
        return None

    def _read(self, outbox: Outbox, path: Path) -> list[Memo]:
        parcel = outbox.read(path)
        memos: list[Memo] = []
        torn = parcel.torn
        for item in parcel.items:
            try:
                memos.append(decode(item))
            except ValueError:
                torn += 1
        if torn:
            log.warning("Outbox segment %s has lines that were never finished: %d", path.name, torn)
        return memos

    async def _settle(self, line: _Line, path: Path, memos: Sequence[Memo], result: Kept) -> None:
        """Leave in a segment what is to be tried again, and take out of it what is done or belongs elsewhere."""
        staying = list(result.waiting)
        given_up = list(result.failed)
        if line.parks:
            staying += result.parked
        elif result.parked:
            await asyncio.to_thread(self._parked.outbox.put_apart, [encode(memo) for memo in result.parked])
            key = result.parked[0].key
            log.warning("Exchanges parked: %d of key %r. %s", len(result.parked), key, result.why_parked)
            self._counts["parked"] += len(result.parked)
        oldest = self._wall() - self._pace.give_up_seconds
        why = result.why or result.why_parked or SekhaError()
        given_up += [Failed(memo, why.code) for memo in staying if memo.at < oldest]
        staying = [memo for memo in staying if memo.at >= oldest]
        if given_up:
            items = [encode(replace(failed.memo, error=failed.error)) for failed in given_up]
            await asyncio.to_thread(self._given_up.put_apart, items)
            codes = ", ".join(sorted({failed.error for failed in given_up}))
            log.error("Given up, and put into `given-up`: %d (%s)", len(given_up), codes)
            self._counts["given_up"] += len(given_up)
        if not staying:
            await asyncio.to_thread(line.outbox.done, path)
        elif len(staying) < len(memos):
            items = [encode(memo) for memo in staying]
            await asyncio.to_thread(line.outbox.put_apart, items, over=path)
        self._counts["kept"] += result.kept
        self._counts["left_out"] += result.left_out

    def _tell(self, line: _Line, why: str) -> None:
        """Say once what it waits for, and again when that changes."""
        if why != line.told:
            log.warning("What is to be remembered waits: %s", why)
            line.told = why


def _embedding(serving: Serving) -> Embed:
    """Embeds as for a caller: priced, against the same budgets, and on the record."""

    async def embed(request: EmbedRequest) -> Embedded:
        under_way = UnderWay(serving, "embed", request)
        try:
            embedded = await embed_in_order(request, serving.search.embedding)
        except BaseException as error:
            under_way.failed(error)
            raise
        under_way.answered(embedded)
        return embedded

    return embed
