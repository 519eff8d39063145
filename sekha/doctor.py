"""The doctor: what is wrong with what is kept, how much of it, and what to do about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Final, Literal, TypeAlias, get_args

from sekha.embedding import Embedded, EmbedRequest, EmbedSteps, embed
from sekha.errors import InvalidRequest
from sekha.registry import COLLECTION_NAME

__all__ = [
    "BATCH",
    "EXAMPLES",
    "REPAIRABLE",
    "Diagnosis",
    "DoctorRequest",
    "DoctorSteps",
    "Examined",
    "Faulty",
    "Finding",
    "Index",
    "Kind",
    "Repair",
    "Survey",
    "diagnose",
]

Repair: TypeAlias = Literal["vectors", "models", "texts", "duplicates", "aliases"]
Kind: TypeAlias = Literal[Repair, "drift", "indexing"]
REPAIRABLE: Final[tuple[Repair, ...]] = get_args(Repair)
EXAMPLES: Final = 3
BATCH: Final = 256
"""Records that are embedded anew at a time."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told the index, how many of its records that had to be were embedded anew, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """What is looked at, and which of the faults are to be repaired."""

    collections: tuple[str, ...] = ()
    """Left out: all."""
    repair: tuple[Repair, ...] = ()
    """`vectors` and `models` are embedded anew from their texts; `texts` deletes records without one and
    `duplicates` those that repeat another's; `aliases` points those that are missing or wrong and deletes those that
    name nothing."""
    max_cost: Decimal | None = None
    """US dollars that embedding anew may cost at the most."""

    def __post_init__(self) -> None:
        for name in self.collections:
            if not COLLECTION_NAME.fullmatch(name):
                raise InvalidRequest(f"{name!r} cannot name a collection.", field="collections")
        for kind in self.repair:
            if kind not in REPAIRABLE:
                raise InvalidRequest(
                    f"`repair` is {kind!r}; it must be one of {', '.join(REPAIRABLE)}.", field="repair"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or that one should know of."""

    kind: Kind
    where: str
    """The index or alias that it is about."""
    what: str
    """Of `where`; of some of its records when there are examples."""
    count: int
    """The records that it is about."""
    next: str
    """The command that helps, or what to write into the file."""
    examples: tuple[str, ...] = ()
    """The uuids of a few of the records."""
    notice: bool = False
    """Whether nothing is wrong, and one should only know of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An index that is looked at."""

    name: str
    collection: str
    """The collection that it belongs to; empty when its name is none that Sekha gives."""
    dimension: int
    fingerprint: str
    records: int
    model: str | None
    """`provider/model` that makes its vectors; None when the file has none."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the store has, and how that fits the configuration."""

    store: str
    """Its path or URL."""
    indexes: tuple[Index, ...]
    findings: tuple[Finding, ...] = ()
    dangling: tuple[str, ...] = ()
    """Aliases that name nothing."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """Aliases that are missing or name another collection's index, and the index that each should name."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What was found in one index."""

    index: Index
    records: int
    """As many as were read."""
    findings: tuple[Finding, ...] = ()
    to_embed: tuple[str, ...] = field(default=(), repr=False)
    """The uuids of those to be embedded anew. Only what is to be repaired is kept."""
    to_delete: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """Records that are to be embedded anew, with the texts they have now."""

    index: str
    fingerprint: str
    prefix: str
    """What stands before a text that the index's model embeds."""
    uuids: tuple[str, ...] = field(repr=False)
    to_embed: EmbedRequest | None
    """None when they are all gone."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found, and what was repaired before."""

    store: str
    indexes: tuple[Index, ...]
    findings: tuple[Finding, ...]
    """What is left, when something was repaired."""
    embedded: int = 0
    deleted: int = 0
    aliases: tuple[str, ...] = ()
    """Those that were pointed or deleted."""
    cost: Decimal = Decimal(0)

    @property
    def records(self) -> int:
        return sum(each.records for each in self.indexes)

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if not each.notice)


@dataclass(frozen=True, slots=True)
class DoctorSteps:
    """The steps of a look: plain callables in-process, Prefect tasks in a flow."""

    survey: Callable[[DoctorRequest], Awaitable[Survey]]
    examine: Callable[[DoctorRequest, Survey, str], Awaitable[Examined]]
    gather: Callable[[DoctorRequest, Examined, int], Awaitable[Faulty]]
    embedding: EmbedSteps[Embedded]
    write: Callable[[Faulty, Embedded], Awaitable[int]]
    delete: Callable[[Examined], Awaitable[int]]
    name: Callable[[Survey], Awaitable[tuple[str, ...]]]


async def diagnose(request: DoctorRequest, steps: DoctorSteps, *, progress: Progress | None = None) -> Diagnosis:
    """Look at every record of every index, repair what is asked for, and then look once more.

    Each batch is embedded when its cost is held. Whoever dies on the way repairs the rest when they do the
    same again.
    """
    survey = await steps.survey(request)
    examined = [await steps.examine(request, survey, index.name) for index in survey.indexes]
    embedded, deleted, cost = 0, 0, Decimal(0)
    for each in examined:
        for at in range(0, len(each.to_embed), BATCH):
            left = None if request.max_cost is None else request.max_cost - cost
            faulty = await steps.gather(replace(request, max_cost=left), each, at)
            if faulty.to_embed is not None:
                anew = await embed(faulty.to_embed, steps.embedding)
                cost += anew.cost
                embedded += await steps.write(faulty, anew)
            if progress is not None:
                progress(each.index.name, min(at + BATCH, len(each.to_embed)), len(each.to_embed))
        if each.to_delete:
            deleted += await steps.delete(each)
    named: tuple[str, ...] = ()
    if "aliases" in request.repair and (survey.dangling or survey.unnamed):
        named = await steps.name(survey)
    if embedded or deleted or named:
        again = replace(request, repair=())
        survey = await steps.survey(again)
        examined = [await steps.examine(again, survey, index.name) for index in survey.indexes]
    return Diagnosis(
        store=survey.store,
        indexes=survey.indexes,
        findings=(*survey.findings, *(finding for each in examined for finding in each.findings)),
        embedded=embedded,
        deleted=deleted,
        aliases=named,
        cost=cost,
    )
