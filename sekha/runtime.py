"""Answer, embed, ingest and search in a few lines: what `sekha.open` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sekha.chat import ChatRequest, ChatSteps, Reply, answer
from sekha.embedding import Embedded, EmbedRequest, EmbedSteps, embed
from sekha.resources import Resources
from sekha.routing import Explanation, Plan
from sekha.search import Found, SearchRequest, SearchSteps, search
from sekha.steps.chats import ChatCalls
from sekha.steps.embeddings import EmbedCalls
from sekha.steps.money import Money
from sekha.steps.searching import Searching

# What only commands and flows do is imported when they do it: a gateway starts in two thirds of the time.
if TYPE_CHECKING:
    from sekha.doctor import Diagnosis, DoctorRequest, DoctorSteps
    from sekha.documents import Document
    from sekha.ingest import IngestReport, IngestRequest, IngestSteps, Progress
    from sekha.steps.backing import Backing
    from sekha.steps.doctoring import Doctoring
    from sekha.steps.importing import Importing
    from sekha.steps.keeping import Keeping

__all__ = ["Runtime"]


class Runtime:
    """Answers, embeds, ingests and searches under one configuration, in this process.

    >>> async with sekha.open("sekha.yaml") as s:
    ...     reply = await s.chat("What does a hold do?")
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.money = Money(resources)
        self.chat_calls = ChatCalls(resources)
        self.embed_calls = EmbedCalls(resources)
        self.searching = Searching(resources)

    @cached_property
    def keeping(self) -> Keeping:
        from sekha.steps.keeping import Keeping

        return Keeping(self.resources)

    @cached_property
    def backing(self) -> Backing:
        from sekha.steps.backing import Backing

        return Backing(self.resources)

    @cached_property
    def importing(self) -> Importing:
        from sekha.steps.importing import Importing

        return Importing(self.resources)

    @cached_property
    def doctoring(self) -> Doctoring:
        from sekha.steps.doctoring import Doctoring

        return Doctoring(self.resources)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self.money.aclose()
        await self.resources.aclose()

    async def chat(self, request: str | Sequence[Mapping[str, Any]] | ChatRequest, **fields: Any) -> Reply:
        """Answer a prompt, messages in OpenAI's shape, or a whole `ChatRequest`."""
        if isinstance(request, str):
            request = [{"role": "user", "content": request}]
        if not isinstance(request, ChatRequest):
            request = ChatRequest(messages=tuple(request), **fields)
        return await answer(request, self.chat_steps)

    async def embed(self, texts: str | Sequence[str], *, model: str | None = None, **fields: Any) -> Embedded:
        """Embed one text or many; `vectors` has a row for each."""
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        return await embed(EmbedRequest(texts=texts, model=model, **fields), self.embed_steps)

    async def ingest(
        self,
        source: str | Path | Sequence[Document] | IngestRequest,
        collection: str = "documents",
        *,
        progress: Progress | None = None,
        **fields: Any,
    ) -> IngestReport:
        """Make a collection hold a folder's documents, or the ones given."""
        from sekha.ingest import IngestRequest, ingest

        if isinstance(source, str | Path):
            source = IngestRequest(collection=collection, path=str(source), **fields)
        elif not isinstance(source, IngestRequest):
            source = IngestRequest(collection=collection, documents=tuple(source), **fields)
        return await ingest(source, self.ingest_steps, progress=progress)

    async def search(
        self, query: str | SearchRequest, collection: str = "documents", *, limit: int = 10, **fields: Any
    ) -> Found:
        """Find what is nearest to a question, nearest first."""
        if isinstance(query, str):
            query = SearchRequest(query=query, collection=collection, limit=limit, **fields)
        return await search(query, self.search_steps)

    async def diagnose(self, request: DoctorRequest | None = None) -> Diagnosis:
        """Look at every record that is kept, and say what is wrong and what to do about it."""
        from sekha.doctor import DoctorRequest, diagnose

        return await diagnose(request or DoctorRequest(), self.doctor_steps)

    async def route(self, request: ChatRequest | EmbedRequest) -> Plan:
        """Say who would serve a request, at what price and why, calling nobody."""
        return await self.money.select_provider(request, await self.money.estimate_cost(request))

    async def explain(self, request: ChatRequest | EmbedRequest) -> Explanation:
        """Say of every model that a request may mean where it stands, or which rule drops it, calling nobody."""
        return await self.money.explain_choice(request, await self.money.estimate_cost(request))

    # --- the steps, in this process: `flows/` fills the same lines with Prefect tasks -------

    @property
    def chat_steps(self) -> ChatSteps:
        return ChatSteps(
            estimate=self.money.estimate_cost,
            select=self.money.select_provider,
            reserve=self.money.reserve_budget,
            call=self.chat_calls.call_provider,
            settle=self.money.settle_cost,
        )

    @property
    def embed_steps(self) -> EmbedSteps[Embedded]:
        return EmbedSteps(
            estimate=self.money.estimate_cost,
            select=self.money.select_provider,
            reserve=self.money.reserve_budget,
            embed=self.embed_calls.embed_texts,
            settle=self.money.settle_cost,
        )

    @property
    def search_steps(self) -> SearchSteps:
        return SearchSteps(
            find_spaces=self.searching.find_spaces,
            embedding=self.embed_steps,
            look_up=self.searching.search_space,
            merge=self.searching.merge_found,
        )

    @property
    def doctor_steps(self) -> DoctorSteps:
        from sekha.doctor import DoctorSteps

        return DoctorSteps(
            survey=self.doctoring.survey_store,
            examine=self.doctoring.examine_index,
            gather=self.doctoring.gather_faulty,
            embedding=self.embed_steps,
            write=self.doctoring.write_anew,
            delete=self.doctoring.delete_faulty,
            name=self.doctoring.name_indexes,
        )

    @property
    def ingest_steps(self) -> IngestSteps:
        from sekha.ingest import IngestSteps

        return IngestSteps(
            read=self.keeping.read_documents,
            compare=self.keeping.find_changes,
            estimate=self.money.estimate_cost,
            select=self.money.select_provider,
            reserve=self.money.reserve_budget,
            embed=self.embed_calls.embed_batch,
            upsert=self.keeping.upsert_batch,
            settle=self.money.settle_cost,
            catch_up=self.keeping.await_indexed,
            remove=self.keeping.remove_stale,
        )
