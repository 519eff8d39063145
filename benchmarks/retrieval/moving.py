"""Sekha as its users have it, over a collection that goes from one embedding model to another."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import cranfield
import numpy as np
import numpy.typing as npt
from cranfield import Cranfield, ndcg

import sekha
from sekha.documents import Document
from sekha.ingest import IngestRequest
from sekha.merging import fuse
from sekha.runtime import Runtime
from sekha.search import SearchRequest
from sekha.steps.searching import CANDIDATES

__all__ = ["BETTER", "SHARES", "WORSE", "Row", "drawn"]

WORSE, BETTER = 768, 1536
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
IN_FULL = (0.1, 0.5, 0.9)
"""Of which everything is measured; of the others, vectors from the worse model to the better one alone."""

Similarities: TypeAlias = npt.NDArray[np.float32]
"""Shape `(questions, documents)`."""
Merge: TypeAlias = Callable[[Sequence[Sequence[tuple[str, float]]]], Iterable[str]]
"""One ranking out of the candidates of each space, with their similarities, best first."""


@dataclass(frozen=True, slots=True)
class Row:
    """One situation: nDCG@10 of one draw, by column."""

    situation: str
    share: float
    figures: Mapping[str, float]


def drawn(data: Cranfield, old: int, new: int, draw: int) -> list[Row]:
    """Measure one draw of the abstracts, with a file and a store of its own."""
    return asyncio.run(moved(data, old, new, draw))


def raw(spaces: Sequence[Sequence[tuple[str, float]]]) -> Iterable[str]:
    best: dict[str, float] = {}
    for number, similarity in (each for space in spaces for each in space):
        best[number] = max(similarity, best.get(number, -1.0))
    return sorted(best, key=lambda number: -best[number])


def rrf(spaces: Sequence[Sequence[tuple[str, float]]]) -> Iterable[str]:
    return fuse(*([number for number, _ in space] for space in spaces))


@asynccontextmanager
async def opened(folder: Path, dimension: int) -> AsyncIterator[Runtime]:
    """Sekha over the folder's store, with a file that names this model for both collections."""
    file = folder / f"{dimension}.yaml"
    file.write_text(
        f"""
        providers:
          - id: builtin
            provider_type: builtin
            models:
              - {{model_id: hashed-{WORSE}, task: embedding, dimension: {WORSE}}}
              - {{model_id: hashed-{BETTER}, task: embedding, dimension: {BETTER}}}
        collections:
          moved: {{model: hashed-{dimension}}}
          copied: {{model: hashed-{dimension}}}
        store: {{kind: embedded, path: vectors.db}}
        ledger: {{url: "sqlite:///ledger.db"}}
        """,
        "utf-8",
    )
    async with sekha.open(file) as runtime:
        yield runtime


async def keep(runtime: Runtime, data: Cranfield, collection: str, numbers: Iterable[str]) -> None:
    """Ingest these abstracts, each as one chunk."""
    documents = tuple(Document(source=number, text=data.texts[number]) for number in numbers)
    await runtime.ingest(IngestRequest(collection=collection, documents=documents, chunk_size=20_000))


async def forget(runtime: Runtime, index: str, numbers: Iterable[str]) -> None:
    """Delete these abstracts from one space, as whoever moves them would."""
    store, gone = await runtime.resources.store(), set(numbers)
    pages = [page async for page in store.scan(index)]
    await store.delete(index, [each.uuid for page in pages for each in page if each.properties["source"] in gone])
    runtime.resources.indexes.written(await store.describe(index))


async def asked(runtime: Runtime, data: Cranfield, collection: str, **fields: Any) -> float:
    """The mean of all questions, as `search` answers them."""
    scores = []
    for question, relevant in zip(data.questions, data.relevant, strict=True):
        found = await runtime.search(SearchRequest(query=question, collection=collection, **fields))
        scores.append(ndcg([str(hit.properties["source"]) for hit in found.hits], relevant))
    return fmean(scores)


async def by_words(runtime: Runtime, data: Cranfield, index: str) -> float:
    store = await runtime.resources.store()
    found = [await store.search_text(index, question, cranfield.TOP) for question in data.questions]
    return fmean(
        ndcg([str(hit.properties["source"]) for hit in hits], relevant)
        for hits, relevant in zip(found, data.relevant, strict=True)
    )


async def similarities(runtime: Runtime, data: Cranfield, dimension: int) -> Similarities:
    """Of every question and every abstract, in the order of its numbers."""
    model = f"hashed-{dimension}"
    questions = await runtime.embed(data.questions, model=model)
    return questions.vectors @ (await runtime.embed(tuple(data.texts.values()), model=model)).vectors.T


def merged(data: Cranfield, spaces: Sequence[tuple[Similarities, set[str]]], merge: Merge) -> float:
    """The mean of all questions over the candidates of each space, merged by another rule."""
    numbers = np.array(list(data.texts))
    kept = [(near, np.flatnonzero(np.isin(numbers, list(has)))) for near, has in spaces]
    scores = []
    for at, relevant in enumerate(data.relevant):
        candidates = []
        for near, columns in kept:
            best = columns[np.argsort(-near[at, columns], kind="stable")[:CANDIDATES]]
            candidates.append([(str(numbers[column]), float(near[at, column])) for column in best])
        scores.append(ndcg(list(merge(candidates)), relevant))
    return fmean(scores)


async def moved(data: Cranfield, old: int, new: int, draw: int) -> list[Row]:
    """Move and copy more and more of the abstracts from one space to the other, and measure on the way."""
    order, better = list(data.texts), new == BETTER
    random.Random(draw).shuffle(order)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder), old) as runtime:
            for collection in ("moved", "copied"):
                await keep(runtime, data, collection, order)
        async with opened(Path(folder), new) as runtime:
            near = {dimension: await similarities(runtime, data, dimension) for dimension in (old, new)}
            alone = {"old": await asked(runtime, data, "copied", dimension=old)}
            if better:
                alone["old, words"] = await asked(runtime, data, "copied", dimension=old, hybrid=True)
                alone["BM25"] = await by_words(runtime, data, f"Copied_{old}")
            done = 0
            for share in SHARES if better else IN_FULL:
                upto = round(share * len(order))
                for collection in ("moved", "copied"):
                    await keep(runtime, data, collection, order[done:upto])
                await forget(runtime, f"Moved_{old}", order[done:upto])
                done = upto
                for collection, left in (("moved", order[upto:]), ("copied", order)):
                    spaces = [(near[new], set(order[:upto])), (near[old], set(left))]
                    figures = {
                        "ours": await asked(runtime, data, collection),
                        "raw": merged(data, spaces, raw),
                        "RRF": merged(data, spaces, rrf),
                    }
                    if better and share in IN_FULL:
                        figures["ours, words"] = await asked(runtime, data, collection, hybrid=True)
                    rows.append(Row(collection, share, figures))
            await keep(runtime, data, "copied", order[done:])
            alone["new"] = await asked(runtime, data, "copied", dimension=new)
            if better:
                alone["new, words"] = await asked(runtime, data, "copied", dimension=new, hybrid=True)
    return [Row(row.situation, row.share, {**row.figures, **alone}) for row in rows]
