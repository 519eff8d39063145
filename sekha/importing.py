"""Take over what another store holds: look at it, say where it goes, bring it across page by page.

A record's name here follows from its name there, and what is here already is left alone. So an import that was
killed is run again and does what is missing, and one that is run twice brings nothing twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from sekha.errors import InvalidRequest
from sekha.registry import COLLECTION_NAME
from sekha.vectors.base import Scalar, Vector

__all__ = [
    "MODEL_PROPERTIES",
    "Foreign",
    "ImportReport",
    "ImportRequest",
    "ImportSteps",
    "LeftOut",
    "Source",
    "Survey",
    "Taken",
    "bring",
    "together",
    "uuid_of",
]

NAMESPACE: Final = uuid.UUID("5e4ba000-0000-5000-8000-000000000002")
"""Root of the UUIDs of records that had another kind of name. Changing it would import them once more."""
EXAMPLES: Final = 3
MODEL_PROPERTIES: Final = ("embedding_model", "model", "model_id")
"""Where stores that we know of say which model made a vector."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told the source, how many of its records were looked at, and how many it has."""


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to take over, and from where."""

    origin: Literal["chroma", "weaviate"]
    path: str | None = None
    """Of a Chroma store: its folder."""
    url: str | None = None
    """Of another Weaviate than the configured one."""
    grpc_port: int = 50051
    api_key_env: str | None = None
    """The environment variable that holds its key."""
    names: tuple[str, ...] = ()
    """Its collections; empty for all."""
    model: str | None = None
    """The embedding model that made their vectors, where they do not say so themselves."""
    into: str | None = None
    """The collection here; left out, by the name there."""
    text_property: str | None = None
    """Of a Weaviate class: the property that holds the text."""
    drop: bool = False
    """Drop each Weaviate class once everything in it was found here."""
    page_size: int = 500

    def __post_init__(self) -> None:
        if self.origin == "chroma" and not self.path:
            raise InvalidRequest("`path` is missing: name the folder of the Chroma store.", field="path")
        if self.into is not None and not COLLECTION_NAME.fullmatch(self.into):
            raise InvalidRequest(
                f"`into` is {self.into!r}; it must be a letter, then letters, digits and underscores.", field="into"
            )
        if self.drop and self.origin == "chroma":
            raise InvalidRequest("`drop` is for Weaviate: delete the folder of a Chroma store yourself.", field="drop")
        if self.page_size < 1:
            raise InvalidRequest(f"`page_size` is {self.page_size!r}; it must be 1 or more.", field="page_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A record as another store has it."""

    id: str
    text: str = field(repr=False)
    vector: Vector | None = field(repr=False)
    properties: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A collection of the other store, and where its records go."""

    name: str
    records: int
    collection: str
    dimension: int
    fingerprint: str
    model: str
    """`provider/model` by whose vectors it is read here."""
    index: str
    """Where they are written, `Documents_768`."""
    checks_models: bool = False
    """Whether records that name another model are left out."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    sources: tuple[Source, ...]
    empty: tuple[str, ...] = ()
    """Collections without a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Records that were not taken, all for one reason."""

    why: str
    count: int
    examples: tuple[str, ...]
    """Their ids there, a few of them."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What came of one source so far."""

    source: Source
    read: int = 0
    imported: int = 0
    there: int = 0
    """Records that were here already."""
    without_text: int = 0
    left_out: tuple[LeftOut, ...] = ()
    after: str | None = None
    """Where the next page begins; None before the first and behind the last."""
    dropped: bool = False
    not_yet_found: int = 0
    """Vectors that are kept and not yet indexed."""
    in_the_way: str | None = None
    """A class whose name the collection's alias should have."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    taken: tuple[Taken, ...]
    empty: tuple[str, ...] = ()

    @property
    def imported(self) -> int:
        return sum(each.imported for each in self.taken)


@dataclass(frozen=True, slots=True)
class ImportSteps:
    """The steps of an import: plain callables in-process, Prefect tasks in a flow."""

    survey: Callable[[ImportRequest], Awaitable[Survey]]
    take: Callable[[ImportRequest, Taken], Awaitable[Taken]]
    finish: Callable[[ImportRequest, Taken], Awaitable[Taken]]


async def bring(request: ImportRequest, steps: ImportSteps, *, progress: Progress | None = None) -> ImportReport:
    """Bring every source across, one after the other, each page when the one before it is kept.

    Raises `InvalidRequest` before anything is written when a source's model is not known.
    """
    survey = await steps.survey(request)
    finished: list[Taken] = []
    for source in survey.sources:
        taken = Taken(source=source)
        while True:
            taken = await steps.take(request, taken)
            if progress is not None:
                progress(source.name, taken.read, source.records)
            if taken.after is None:
                break
        finished.append(await steps.finish(request, taken))
    return ImportReport(taken=tuple(finished), empty=survey.empty)


def uuid_of(collection: str, foreign_id: str) -> str:
    """What a record is called here: its UUID there, else one that follows from its name and its collection."""
    try:
        return str(uuid.UUID(foreign_id))
    except ValueError:
        # A separator that no name holds, so that ("a", "bc") and ("ab", "c") stay apart.
        return str(uuid.uuid5(NAMESPACE, f"{collection}\0{foreign_id}"))


def together(left_out: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    by_reason: dict[str, list[LeftOut]] = {}
    for each in left_out:
        by_reason.setdefault(each.why, []).append(each)
    return tuple(
        LeftOut(
            why=why,
            count=sum(each.count for each in those),
            examples=tuple(example for each in those for example in each.examples)[:EXAMPLES],
        )
        for why, those in by_reason.items()
    )
