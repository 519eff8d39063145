"""What the doctor finds: which records are not sound, and what of a store does not fit the configuration."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field

from sekha.doctor import EXAMPLES, DoctorRequest, Examined, Finding, Index, Kind
from sekha.documents import content_hash
from sekha.errors import did_you_mean
from sekha.vectors.base import Record

__all__ = ["Found", "alias", "in_the_way", "moved", "otherwise", "stray", "taken", "unknown"]


# --- records -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, uuid: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(uuid)


class Found:
    """What is wrong with the records of an index, as they pass."""

    def __init__(self, index: Index, request: DoctorRequest) -> None:
        self._index = index
        self._repair = frozenset(request.repair)
        self._tallies: dict[tuple[Kind, str], _Tally] = {}
        self._to_embed: list[str] = []
        self._to_delete: list[str] = []
        self.records = 0

    def look_at(self, record: Record, why: str | None, seen: sqlite3.Connection) -> None:
        self.records += 1
        index, has_text = self._index, bool(record.text.strip())
        said = record.properties.get("embedding_fingerprint")
        faults: list[tuple[Kind, str]] = []
        if why is not None:
            faults.append(("vectors", f"without a sound vector: {why}"))
        if said is not None and said != index.fingerprint:
            faults.append(("models", f"of another model: {said!r}"))
        if not has_text:
            faults.append(("texts", "without a text, so that no other model can ever embed them"))
        # One that is to be mended takes no sound one's place.
        elif (
            not faults
            and not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (content_hash(record.text),)).rowcount
        ):
            faults.append(("duplicates", "with the same text as another, whose place among the hits they take"))
        for fault in faults:
            self._tallies.setdefault(fault, _Tally()).add(record.uuid)
        kinds = self._repair.intersection(kind for kind, _ in faults)
        if kinds & {"texts", "duplicates"}:
            self._to_delete.append(record.uuid)
        elif kinds and has_text and index.model is not None:
            self._to_embed.append(record.uuid)

    def examined(self, waiting: int) -> Examined:
        findings = [self._finding(kind, what, tally) for (kind, what), tally in sorted(self._tallies.items())]
        if waiting:
            findings.append(
                Finding(
                    kind="indexing",
                    where=self._index.name,
                    what="has records that are found once the store has indexed them",
                    count=waiting,
                    next="wait",
                    notice=True,
                )
            )
        return Examined(
            index=self._index,
            records=self.records,
            findings=tuple(findings),
            to_embed=tuple(self._to_embed),
            to_delete=tuple(self._to_delete),
        )

    def _finding(self, kind: Kind, what: str, tally: _Tally) -> Finding:
        index = self._index
        which = f" --collection {index.collection}" if index.collection else ""
        unmade = kind in ("vectors", "models") and index.model is None
        return Finding(
            kind=kind,
            where=index.name,
            what=what,
            count=tally.count,
            next="list the model under `providers:` first" if unmade else f"sekha doctor --repair {kind}{which}",
            examples=tuple(tally.examples),
            notice=kind == "duplicates",
        )


def _is_first(record: Record, seen: sqlite3.Connection) -> bool:
    return bool(seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (content_hash(record.text),)).rowcount)


# --- what does not fit ---------------------------------------------------------------------


def stray(index: Index) -> Finding:
    return Finding(
        kind="drift",
        where=index.name,
        what=f"has a name that no collection's index of {index.dimension} numbers has, so nothing reads it",
        count=index.records,
        next="sekha backup   and drop it, if nobody else uses it",
    )


def unknown(index: Index, models: Sequence[str]) -> Finding:
    name = index.fingerprint.partition(":")[0].rpartition("/")[2]
    return Finding(
        kind="drift",
        where=index.name,
        what=f"was made by {index.fingerprint!r}, which the file does not have, so it cannot be searched."
        + did_you_mean(name, models),
        count=index.records,
        next="list that model under `providers:`, or the one that is the same with `same_as`; then: sekha check",
    )


def otherwise(index: Index, what: str) -> Finding:
    return Finding(
        kind="drift",
        where=index.name,
        what=what,
        count=index.records,
        next="sekha ingest … --collection NAME   into a new one, which is made as the file says",
        notice=True,
    )


def alias(name: str, what: str, records: int) -> Finding:
    """An alias that `--repair aliases` sets right, and the records that are not found by it."""
    return Finding(kind="aliases", where=name, what=what, count=records, next="sekha doctor --repair aliases")


def taken(name: str, target: str, records: int) -> Finding:
    """A collection's alias that another program uses."""
    return Finding(
        kind="aliases",
        where=name,
        what=f"names {target!r}, a class that Sekha did not make",
        count=records,
        next="delete that alias in Weaviate if nobody needs it; then: sekha doctor --repair aliases",
    )


def in_the_way(name: str, records: int) -> Finding:
    return Finding(
        kind="aliases",
        where=name,
        what="is a class that Sekha did not make, and stands where the collection's alias should",
        count=records,
        next=f"sekha import weaviate --collection {name} --dry-run   and then with --drop",
    )


def moved(collection: str, model: str, its: Sequence[Index]) -> Finding:
    """The file's model has no index of this collection, and others have."""
    kept = max(its, key=lambda each: each.records).model or "…"
    return Finding(
        kind="drift",
        where=", ".join(each.name for each in its),
        what=f"the file has {collection!r} embedded with {model!r}, and none of it is: what is new goes into another "
        "index than the rest",
        count=sum(each.records for each in its),
        next=f"`collections: {{{collection}: {{model: {kept}}}}}` in sekha.yaml to go on with the old one, or "
        f"from the same folders again: sekha ingest … --collection {collection}",
        notice=True,
    )
