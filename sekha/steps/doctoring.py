"""Looking after a store: what does not fit the configuration, which records are not sound, and mending them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from sekha import findings
from sekha.address import without_secrets
from sekha.doctor import BATCH, DoctorRequest, Examined, Faulty, Finding, Index, Survey
from sekha.embedding import Embedded, EmbedRequest
from sekha.errors import InvalidRequest, did_you_mean
from sekha.registry import Space
from sekha.resources import Resources
from sekha.spaces import alias_of, collections_in, embedder_of, index_for, indexes_of, names_index_of
from sekha.vectors.base import Collection, VectorStore

if TYPE_CHECKING:
    from sekha.vectors.weaviate import WeaviateStore

__all__ = ["Doctoring"]

PAGE: Final = 500


def _untold(_: str) -> None:
    pass


class Doctoring:
    """The steps of a look, but for embedding. `tell` is told how far a long one is."""

    def __init__(self, resources: Resources, tell: Callable[[str], None] = _untold) -> None:
        self._open = resources
        self._tell = tell

    async def survey_store(self, request: DoctorRequest) -> Survey:
        """Look at what the store has, and what of it does not fit the configuration."""
        loaded = self._open.loaded
        section = loaded.config.store
        if section.kind == "embedded" and not (file := loaded.path(section.path)).exists():
            return Survey(store=str(file), indexes=())
        store = await self._open.store()
        there, aliases = await store.list_collections(), await store.list_aliases()
        names = self._names(there, request.collections)
        belongs = {index.name: name for name in names for index in indexes_of(name, there)}
        looked_at = [each for each in there if each.name in belongs or not request.collections]
        indexes = [await self._index(store, each, belongs.get(each.name, "")) for each in looked_at]
        weaviate = _as_weaviate(store)
        foreign = {each.name: each.records for each in await weaviate.classes().offered()} if weaviate else {}
        found = [findings.stray(each) for each in indexes if not each.collection]
        found += [findings.unknown(each, self._models()) for each in indexes if each.collection and each.model is None]
        for name in names:
            found += self._moved(name, [each for each in indexes if each.collection == name], there)
        if weaviate:
            for each in indexes:
                found += [findings.otherwise(each, what) for what in await weaviate.made_otherwise(each.name)]
        named = self._look_at_aliases(names, indexes, there, aliases, foreign, all_of_them=not request.collections)
        return Survey(
            store=without_secrets(section.url or "") if weaviate else str(loaded.path(section.path)),
            indexes=tuple(indexes),
            findings=(*found, *named.findings),
            dangling=named.dangling,
            unnamed=named.unnamed,
        )

    async def examine_index(self, request: DoctorRequest, survey: Survey, name: str) -> Examined:
        """Read every record of an index, its vector too, and say which are not sound."""
        from sekha.vectors.checks import unsound

        index = next(each for each in survey.indexes if each.name == name)
        store, found = await self._open.store(), findings.Found(index, request)
        # A file of its own that ends with it: the hashes of a large index need not fit into memory.
        with closing(sqlite3.connect("")) as seen:
            seen.execute("CREATE TABLE seen (hash TEXT PRIMARY KEY) WITHOUT ROWID")
            async for page in store.scan(name, page=PAGE, vectors=True):
                whys = unsound(index.dimension, [record.vector for record in page])
                for record, why in zip(page, whys, strict=True):
                    found.look_at(record, why, seen)
                self._tell(f"{name}: {found.records:,} of {index.records:,} records looked at")
        waiting = await store.catch_up(name, seconds=0)
        return found.examined(waiting)

    async def gather_faulty(self, request: DoctorRequest, examined: Examined, at: int) -> Faulty:
        """The next records to be embedded anew, as they are now."""
        index = examined.index
        store = await self._open.store()
        wanted = examined.to_embed[at : at + BATCH]
        records = await store.get(index.name, wanted)
        kept = {uuid: records[uuid].text for uuid in wanted if uuid in records and records[uuid].text.strip()}
        (model,) = self._open.registry.named(str(index.model))
        asked = EmbedRequest(
            texts=tuple(model.document_prefix + text for text in kept.values()),
            model=index.model,
            max_cost=request.max_cost,
            bulk=True,
        )
        return Faulty(
            index=index.name,
            fingerprint=index.fingerprint,
            prefix=model.document_prefix,
            uuids=tuple(kept),
            to_embed=asked if kept else None,
        )

    async def write_anew(self, faulty: Faulty, embedded: Embedded) -> int:
        """Keep the new vectors of the records whose texts are still what was embedded."""
        store = await self._open.store()
        records = await store.get(faulty.index, faulty.uuids)
        texts = faulty.to_embed.texts if faulty.to_embed is not None else ()
        new = [
            replace(
                record, vector=vector, properties={**record.properties, "embedding_fingerprint": faulty.fingerprint}
            )
            for uuid, text, vector in zip(faulty.uuids, texts, embedded.vectors, strict=True)
            if (record := records.get(uuid)) is not None and faulty.prefix + record.text == text
        ]
        return len(new) - len(await store.upsert(faulty.index, new))

    async def delete_faulty(self, examined: Examined) -> int:
        """Delete what has no text, and what repeats another's."""
        store = await self._open.store()
        uuids, name = examined.to_delete, examined.index.name
        return sum([await store.delete(name, uuids[at : at + PAGE]) for at in range(0, len(uuids), PAGE)])

    async def name_indexes(self, survey: Survey) -> tuple[str, ...]:
        """Delete the aliases that name nothing, and point those that are missing."""
        store = await self._open.store()
        for alias in survey.dangling:
            await store.delete_alias(alias)
        for alias, target in survey.unnamed.items():
            await store.point_alias(alias, target)
        return (*survey.dangling, *survey.unnamed)

    def _look_at_aliases(
        self,
        names: Sequence[str],
        indexes: Sequence[Index],
        there: Sequence[Collection],
        aliases: Mapping[str, str],
        foreign: Mapping[str, int],
        *,
        all_of_them: bool,
    ) -> _Named:
        wanted, known = {alias_of(name) for name in names}, {each.name for each in there}
        dangling = {
            alias: target
            for alias, target in aliases.items()
            # Those of other programs on the same server are theirs.
            if target not in known and target not in foreign and (alias in wanted or names_index_of(alias, target))
            if alias in wanted or all_of_them
        }
        found = [findings.alias(each, f"names {target!r}, which is not there", 0) for each, target in dangling.items()]
        unnamed: dict[str, str] = {}
        for name in names:
            alias, its = alias_of(name), [each for each in indexes if each.collection == name]
            if alias in foreign:
                found.append(findings.in_the_way(alias, foreign[alias]))
                continue
            target = aliases.get(alias)
            if not its or target in {each.name for each in its}:
                continue
            records = sum(each.records for each in its)
            if target is not None and target in foreign:
                found.append(findings.taken(alias, target, records))
                continue
            unnamed[alias] = self._index_to_name(name, its, there)
            if alias not in dangling:
                what = "is missing" if target is None else f"names {target!r}, which is no index of this collection"
                found.append(findings.alias(alias, f"{what}: other programs do not find what is kept by it", records))
        return _Named(tuple(found), tuple(alias for alias in dangling if alias not in unnamed), unnamed)

    def _names(self, there: Iterable[Collection], asked: Sequence[str]) -> list[str]:
        """The collections that the file names and those that the store has, or those that were asked for."""
        registry, memory = self._open.registry, self._open.loaded.config.memory
        named = [*registry.collections, *([memory.collection] if memory is not None else [])]
        aliases = {alias_of(name): name for name in named}
        for name in collections_in(there, named):
            aliases.setdefault(alias_of(name), name)
        if not asked:
            return list(aliases.values())
        for name in asked:
            if alias_of(name) not in aliases:
                known = ", ".join(aliases.values()) or "none"
                raise InvalidRequest(
                    f"There is no collection {name!r}.{did_you_mean(name, list(aliases.values()))} There are: {known}.",
                    field="collections",
                )
        return list(dict.fromkeys(aliases[alias_of(name)] for name in asked))

    async def _index(self, store: VectorStore, index: Collection, collection: str) -> Index:
        model = embedder_of(index, self._open.registry)
        return Index(
            name=index.name,
            collection=collection,
            dimension=index.dimension,
            fingerprint=index.fingerprint,
            records=await store.count(index.name),
            model=None if model is None else model.name,
        )

    def _models(self) -> list[str]:
        return [model.id for model in self._open.registry.for_task("embedding")]

    def _space(self, collection: str) -> Space | None:
        """Where new documents of a collection go; None when the file has no embedding model."""
        registry = self._open.registry
        able = collection in registry.collections or registry.default_for("embedding")
        return registry.space(collection) if able else None

    def _moved(self, collection: str, its: Sequence[Index], there: Sequence[Collection]) -> list[Finding]:
        """What to say when the file's model has no index, and others have."""
        space = self._space(collection)
        if space is None or not its or index_for(space, there).name in {each.name for each in its}:
            return []
        return [findings.moved(collection, space.model.name, its)]

    def _index_to_name(self, collection: str, its: Sequence[Index], there: Sequence[Collection]) -> str:
        """The file's model's index, else the largest."""
        space = self._space(collection)
        wanted = index_for(space, there).name if space is not None else None
        return max(its, key=lambda each: (each.name == wanted, each.records, each.name)).name


@dataclass(frozen=True, slots=True)
class _Named:
    """What is wrong with aliases, those that name nothing, and what others should name."""

    findings: tuple[Finding, ...]
    dangling: tuple[str, ...]
    unnamed: Mapping[str, str]


def _as_weaviate(store: VectorStore) -> WeaviateStore | None:
    from sekha.vectors.embedded import EmbeddedStore

    if isinstance(store, EmbeddedStore):
        return None
    from sekha.vectors.weaviate import WeaviateStore

    return store if isinstance(store, WeaviateStore) else None
