"""Importing: which model made what another store holds, and what of it is kept here."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sekha.documents import content_hash
from sekha.errors import InvalidRequest, VectorRefused, did_you_mean
from sekha.importing import (
    MODEL_PROPERTIES,
    Foreign,
    ImportRequest,
    ImportSteps,
    LeftOut,
    Source,
    Survey,
    Taken,
    together,
    uuid_of,
)
from sekha.registry import Model, Space
from sekha.resources import Resources
from sekha.spaces import alias_of
from sekha.vectors.base import Record, Scalar

if TYPE_CHECKING:
    from sekha.vectors.origins import Offered, Origin

__all__ = ["Importing"]


class Importing:
    def __init__(self, resources: Resources) -> None:
        self._open = resources

    @property
    def steps(self) -> ImportSteps:
        return ImportSteps(survey=self.survey_sources, take=self.take_page, finish=self.finish_source)

    async def survey_sources(self, request: ImportRequest) -> Survey:
        """Look at what there is, and say which model made it and where it goes."""
        async with self._origin(request) as origin:
            offered = self._wanted(request, await origin.offered())
            sources = []
            for each in offered:
                if each.records:
                    first = await self._first_with_a_vector(origin, each.name)
                    sources.append(await self._source(request, each, first))
        return Survey(sources=tuple(sources), empty=tuple(each.name for each in offered if not each.records))

    async def take_page(self, request: ImportRequest, taken: Taken) -> Taken:
        """Read the next page, and keep what of it is sound and not here yet."""
        source = taken.source
        async with self._origin(request) as origin:
            found, following = await origin.page(source.name, taken.after, request.page_size)
        model = self._made_by(source)
        index = await self._open.indexes.for_writing(Space(source.collection, model))
        left_out: dict[str, list[str]] = defaultdict(list)
        records: list[Record] = []
        ids: dict[str, str] = {}
        for each in found:
            if (why := self._unsound(each, source, model)) is not None:
                left_out[why].append(each.id)
                continue
            record = _as_record(each, request.origin, source, index.fingerprint)
            ids[record.uuid] = each.id
            records.append(record)
        store = await self._open.store()
        there = await store.get(index.name, [record.uuid for record in records])
        missing = [record for record in records if not _is_there(record, there.get(record.uuid))]
        refused = await store.upsert(index.name, missing) if missing else {}
        self._open.indexes.written(index)
        for uuid, why in refused.items():
            left_out[why].append(ids[uuid])
        new = (LeftOut(why=why, count=len(those), examples=tuple(those)) for why, those in left_out.items())
        return replace(
            taken,
            read=taken.read + len(found),
            imported=taken.imported + len(missing) - len(refused),
            there=taken.there + len(records) - len(missing),
            without_text=taken.without_text + sum(not record.text for record in missing),
            left_out=together([*taken.left_out, *new]),
            after=following,
        )

    async def finish_source(self, request: ImportRequest, taken: Taken) -> Taken:
        """Wait until it is found, look whether it is whole, and drop it there if that was asked for."""
        source = taken.source
        store = await self._open.store()
        waiting = await store.catch_up(source.index)
        dropped = request.drop and not taken.left_out and await self._is_all_here(request, source)
        if dropped:
            async with self._origin(request) as origin:
                await origin.drop(source.name)
            # Its name may be free for the alias now.
            await self._open.indexes.for_writing(Space(source.collection, self._made_by(source)))
        alias = alias_of(source.collection)
        stays = request.origin == "weaviate" and request.url is None and not dropped
        return replace(
            taken,
            dropped=dropped,
            not_yet_found=waiting,
            in_the_way=alias if stays and source.name == alias else None,
        )

    @asynccontextmanager
    async def _origin(self, request: ImportRequest) -> AsyncIterator[Origin]:
        origin = await self._opened(request)
        try:
            yield origin
        finally:
            await origin.aclose()

    async def _opened(self, request: ImportRequest) -> Origin:
        if request.origin == "chroma":
            from sekha.vectors.chroma import ChromaOrigin

            return await ChromaOrigin.open(self._open.loaded.path(request.path or ""))
        from sekha.vectors.weaviate import WeaviateStore

        if request.url is not None:
            key = os.environ.get(request.api_key_env) if request.api_key_env else None
            if request.api_key_env and not key:
                raise InvalidRequest(
                    f"The environment variable {request.api_key_env!r} is not set.", field="api_key_env"
                )
            theirs = await WeaviateStore.open(request.url, grpc_port=request.grpc_port, api_key=key)
            return theirs.classes(request.text_property, close=theirs.aclose)
        store = await self._open.store()
        if not isinstance(store, WeaviateStore):
            raise InvalidRequest(
                "The configured store is no Weaviate: name the server to import from with `url`.", field="url"
            )
        return store.classes(request.text_property)

    def _wanted(self, request: ImportRequest, offered: Sequence[Offered]) -> list[Offered]:
        if not request.names:
            return list(offered)
        there = {each.name: each for each in offered}
        for name in request.names:
            if name not in there:
                listed = f"It has: {', '.join(there)}." if there else "It has nothing to import."
                raise InvalidRequest(
                    f"There is no {name!r} to import.{did_you_mean(name, list(there))} {listed}", field="names"
                )
        return [there[name] for name in dict.fromkeys(request.names)]

    async def _first_with_a_vector(self, origin: Origin, name: str) -> Foreign | None:
        """A record that shows the dimension, if there is one among the first."""
        found, _ = await origin.page(name, None, 100)
        return next((each for each in found if each.vector is not None), None)

    async def _source(self, request: ImportRequest, offered: Offered, first: Foreign | None) -> Source:
        if first is None or first.vector is None:
            raise InvalidRequest(
                f"The first records of {offered.name!r} have no vectors, so there is nothing to take over: "
                "`sekha ingest` embeds texts. Leave it out by naming the others.",
                field="names",
            )
        dimension = len(first.vector)
        said = request.model or offered.model or _said(first)
        model = self._model(offered.name, dimension, said)
        collection = request.into or _collection(offered.name, dimension)
        index = await self._open.indexes.holding(Space(collection, model))
        if request.origin == "weaviate" and request.url is None and index.name == offered.name:
            raise InvalidRequest(
                f"Class {offered.name!r} has the name that its records' index would have here: take it over under "
                "another with `into`.",
                field="into",
            )
        return Source(
            name=offered.name,
            records=offered.records,
            collection=collection,
            dimension=dimension,
            fingerprint=model.fingerprint,
            model=model.name,
            index=index.name,
            checks_models=request.model is None,
        )

    def _model(self, name: str, dimension: int, said: str | None) -> Model:
        """A model of the file; that a dimension is the same says nothing."""
        models = self._open.registry.for_task("embedding")
        fitting = [model for model in models if model.dimension == dimension]
        for model in fitting:
            if said is not None and said in (model.id, model.name, model.makes, model.fingerprint):
                return model
        able = ", ".join(dict.fromkeys(model.id for model in fitting))
        which = f"The file has {able} of {dimension} numbers." if able else f"The file has none of {dimension} numbers."
        if said is None:
            raise InvalidRequest(
                f"{name!r} holds vectors of {dimension} numbers and does not say which model made them. Name it with "
                f"`model`: vectors of two models cannot be compared, whatever their length. {which}",
                field="model",
            )
        known = [model.id for model in models]
        raise InvalidRequest(
            f"{name!r} holds vectors of {dimension} numbers by {said!r}, and no such model of that dimension is under "
            f"`providers:`.{did_you_mean(said, known)} List it there, or name another with `model`. {which}",
            field="model",
        )

    def _made_by(self, source: Source) -> Model:
        return self._model(source.name, source.dimension, source.model)

    def _unsound(self, found: Foreign, source: Source, model: Model) -> str | None:
        """Why a record is not taken; None when it is."""
        from sekha.vectors.checks import unit

        try:
            unit(source.index, source.dimension, [(found.id, found.vector)])
        except VectorRefused as error:
            return f"its vector: {error.why}"
        said = _said(found) if source.checks_models else None
        if said is not None and said not in (model.id, model.name, model.makes, model.fingerprint):
            return f"it says that {said!r} made its vector"
        return None

    async def _is_all_here(self, request: ImportRequest, source: Source) -> bool:
        """Whether each object there is a record here, looked up once more."""
        store = await self._open.store()
        after: str | None = None
        async with self._origin(request) as origin:
            while True:
                found, after = await origin.page(source.name, after, request.page_size)
                uuids = [uuid_of(source.collection, each.id) for each in found]
                if len(await store.get(source.index, uuids)) != len(set(uuids)):
                    return False
                if after is None:
                    return True


def _collection(name: str, dimension: int) -> str:
    """The collection's name here: `conversations` for `Conversations_768`, `my_docs` for `my-docs`."""
    base = name.removesuffix(f"_{dimension}")
    plain = re.sub(r"[^0-9A-Za-z_]+", "_", base).strip("_")
    plain = plain if plain[:1].isalpha() else f"imported_{plain}"
    return plain[:1].lower() + plain[1:]


def _said(found: Foreign) -> str | None:
    """The model that a record says made its vector."""
    for key in ("embedding_fingerprint", *MODEL_PROPERTIES):
        if isinstance(said := found.properties.get(key), str) and said:
            return said
    return None


def _as_record(found: Foreign, origin: str, source: Source, fingerprint: str) -> Record:
    properties: dict[str, Scalar] = {
        **found.properties,
        "content_hash": content_hash(found.text),
        "embedding_fingerprint": fingerprint,
        "imported_from": f"{origin}:{source.name}",
        "imported_id": found.id,
    }
    return Record(uuid_of(source.collection, found.id), found.text, found.vector, properties)


def _is_there(record: Record, kept: Record | None) -> bool:
    same = ("content_hash", "embedding_fingerprint")
    return kept is not None and all(kept.properties.get(name) == record.properties[name] for name in same)
