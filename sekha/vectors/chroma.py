"""A Chroma store on disk, to be taken over: the one file that imports chromadb, which is an extra."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sekha.errors import InvalidRequest, StoreError
from sekha.importing import MODEL_PROPERTIES, Foreign
from sekha.vectors.origins import Offered, flat, vector_of

__all__ = ["ChromaOrigin"]

FILE = "chroma.sqlite3"
_T = TypeVar("_T")


class ChromaOrigin:
    """Reads the store of Chroma's `PersistentClient`, in the order in which records were added.

    Chroma brings a store of an older version to its own as it opens it.
    """

    def __init__(self, client: Any, path: Path) -> None:
        self._client = client
        self._path = path

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Raises `InvalidRequest` where there is no Chroma store, or no chromadb to read it with."""
        if not (path / FILE).is_file():
            raise InvalidRequest(
                f"No Chroma store in {str(path)!r}: it has no {FILE}. Name the folder that was given to Chroma's "
                "`PersistentClient`, or to its server as `--path`.",
                field="path",
            )

        def connect() -> Any:
            import chromadb
            from chromadb.config import Settings

            return chromadb.PersistentClient(path=str(path), settings=Settings(anonymized_telemetry=False))

        try:
            client = await asyncio.to_thread(connect)
        except ImportError as error:
            raise InvalidRequest(
                "Reading a Chroma store needs chromadb, which is not installed: pip install 'sekha[chroma]'.",
                field="origin",
            ) from error
        except Exception as error:
            raise _unreadable(path, error) from error
        return cls(client, path)

    async def offered(self) -> Sequence[Offered]:
        def work() -> list[Offered]:
            found = []
            for each in self._client.list_collections():
                said = each.metadata or {}
                model = next((str(said[key]) for key in MODEL_PROPERTIES if said.get(key)), None)
                found.append(Offered(name=each.name, records=each.count(), model=model))
            return sorted(found, key=lambda offered: offered.name)

        return await self._read(work)

    async def page(self, name: str, after: str | None, size: int) -> tuple[list[Foreign], str | None]:
        offset = int(after or 0)

        def work() -> list[Foreign]:
            # Nothing is embedded, and the function that the collection was made with may want a key.
            collection = self._client.get_collection(name, embedding_function=None)
            got = collection.get(limit=size, offset=offset, include=["embeddings", "documents", "metadatas"])
            ids = got["ids"]
            nothing = [None] * len(ids)
            vectors = got["embeddings"] if got["embeddings"] is not None else nothing
            texts, metadata = got["documents"] or nothing, got["metadatas"] or nothing
            return [
                Foreign(id=each, text=text or "", vector=vector_of(vector), properties=flat(said or {}))
                for each, text, vector, said in zip(ids, texts, vectors, metadata, strict=True)
            ]

        found = await self._read(work)
        return found, str(offset + len(found)) if len(found) == size else None

    async def drop(self, name: str) -> None:
        raise StoreError(f"{name!r} is left in the Chroma store: delete its folder yourself.")

    async def aclose(self) -> None:
        self._client = None

    async def _read(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(work)
        except Exception as error:  # chromadb raises its own, SQLite's and Rust's
            raise _unreadable(self._path, error) from error


def _unreadable(path: Path, error: Exception) -> StoreError:
    # Its message may quote what is stored.
    return StoreError(
        f"The Chroma store in {str(path)!r} could not be read: {type(error).__name__}. Was it made by another version "
        "of Chroma? Copy the folder, and open the copy with that one."
    )
