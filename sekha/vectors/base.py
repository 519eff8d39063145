"""What every vector store can do, and the values that cross that line.

Two backends keep this contract, and `tests/contracts/test_vector_store.py` holds them to it. It
promises only what both can: there are no snapshots, no filter on a scan, and an upsert replaces
the whole object.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    # Imported by whoever works with vectors: it takes 0.2 s, and a process that serves chats never does.
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "AllOf",
    "AnyOf",
    "Collection",
    "Compare",
    "Filter",
    "Hit",
    "Not",
    "Record",
    "Scalar",
    "TextHit",
    "Vector",
    "VectorStore",
]

Scalar: TypeAlias = str | int | float | bool | None
Vector: TypeAlias = "npt.NDArray[np.float32]"
"""One vector, shape `(dimension,)`; several, shape `(n, dimension)`."""


@dataclass(frozen=True, slots=True)
class Collection:
    """One index: vectors of one length, made by one model, compared by cosine."""

    name: str
    """Physical name, `Documents_768`; matches `[A-Z][_0-9A-Za-z]{0,254}` so that Weaviate takes it too."""
    dimension: int
    fingerprint: str = ""
    """Which embedding space the vectors belong to; see `sekha.registry.Space`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored object. `uuid` is canonical lower-case text, so text order is uuid order."""

    uuid: str
    text: str = field(repr=False)
    vector: Vector | None = field(default=None, repr=False, compare=False)
    """None when read without vectors; never None when written."""
    properties: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `distance` is cosine distance, 0 (same direction) to 2."""

    uuid: str
    distance: float
    text: str = field(repr=False)
    properties: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def similarity(self) -> float:
        return 1.0 - self.distance


@dataclass(frozen=True, slots=True)
class TextHit:
    """One result of a search by words. `score` is BM25 and above zero; how rare a word is depends on the index."""

    uuid: str
    score: float
    text: str = field(repr=False)
    properties: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compare:
    """`Compare("source", "eq", "README.md")`; `in` takes a tuple. An absent property equals None."""

    property: str
    operator: Literal["eq", "ne", "lt", "le", "gt", "ge", "in"]
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    filter: Filter


Filter: TypeAlias = Compare | AllOf | AnyOf | Not


class VectorStore(Protocol):
    """Collections of vectors with text and flat properties, and aliases that name them.

    Wherever a collection's name is read, an alias may stand; it is resolved once per call.
    All methods raise `StoreUnavailable` when the store is busy, full or unreachable, and
    `CollectionMissing` for a name that is neither a collection nor an alias.
    """

    async def ensure_collection(self, collection: Collection) -> None:
        """Create the collection unless it is there.

        Raises `CollectionConflict` when it is there with another dimension or fingerprint.
        """
        ...

    async def describe(self, name: str) -> Collection: ...

    async def list_collections(self) -> list[Collection]:
        """Every collection, by name."""
        ...

    async def drop_collection(self, name: str) -> bool:
        """Drop a collection by its physical name; False when there was none. Its aliases go with it."""
        ...

    async def upsert(self, name: str, records: Sequence[Record]) -> dict[str, str]:
        """Write whole objects by uuid; writing the same again changes nothing.

        Returns the uuids that failed, each with the reason; empty when all are stored. When it
        returns, what is not named there survives `kill -9`. Raises `VectorRefused`, with nothing
        written, when any vector has the wrong length, is zero or is not finite.
        """
        ...

    async def get(self, name: str, uuids: Sequence[str], *, vectors: bool = False) -> dict[str, Record]:
        """The records that exist, by uuid; the others are left out."""
        ...

    async def delete(self, name: str, uuids: Sequence[str]) -> int:
        """Delete by uuid and say how many there were."""
        ...

    async def delete_where(self, name: str, where: Filter, *, dry_run: bool = False) -> int:
        """Delete what the filter matches and say how many; `dry_run` only counts."""
        ...

    async def count(self, name: str, where: Filter | None = None) -> int: ...

    async def search(
        self,
        name: str,
        vector: Vector,
        limit: int,
        *,
        where: Filter | None = None,
        max_distance: float | None = None,
    ) -> list[Hit]:
        """The nearest records, nearest first, ties by uuid. An empty collection has no hits."""
        ...

    async def search_text(self, name: str, query: str, limit: int, *, where: Filter | None = None) -> list[TextHit]:
        """The records that hold any word of the query, best first by BM25 (k1 1.2, b 0.75), ties by uuid.

        Words are runs of letters and digits, whatever their case; nothing in a query is an operator.
        One without a word finds nothing, and of a long one the first 64 different words count.
        """
        ...

    def scan(
        self,
        name: str,
        *,
        after: str | None = None,
        until: str | None = None,
        page: int = 500,
        vectors: bool = False,
    ) -> AsyncIterator[list[Record]]:
        """Pages of records in ascending uuid order, `after < uuid <= until`.

        Neither boundary need exist, so ranges of uuids divide a scan among workers. It is not a
        snapshot: what is written behind the cursor while it runs is missed.
        """
        ...

    async def point_alias(self, alias: str, target: str, *, expect: str | None = None) -> None:
        """Make the alias name the collection, in one atomic move.

        With `expect`, raises `AliasMoved` and moves nothing unless it points there now.
        An alias may not carry a collection's name.
        """
        ...

    async def alias_target(self, alias: str) -> str | None: ...

    async def list_aliases(self) -> dict[str, str]: ...

    async def delete_alias(self, alias: str) -> bool: ...

    async def catch_up(self, name: str, *, seconds: float = 30.0) -> int:
        """Wait until searches find all that was written; how many vectors still wait when the seconds are over.

        What a store acknowledged is safe before that: some index vectors behind the answer.
        """
        ...

    async def health(self) -> float:
        """Seconds the store took to answer; raises `StoreUnavailable`."""
        ...

    async def aclose(self) -> None: ...
