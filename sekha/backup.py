"""Backups: what one holds and says of itself, the order in which it is made, and which old ones go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from sekha.errors import BackupBroken, BackupMissing, InvalidRequest

if TYPE_CHECKING:
    from sekha.vectors.base import Collection, Record, VectorStore

__all__ = [
    "LEDGER_FILE",
    "MANIFEST",
    "VECTORS_FILE",
    "BackupReport",
    "BackupRequest",
    "BackupSteps",
    "Contents",
    "CopiedFile",
    "Draft",
    "Manifest",
    "Part",
    "RestorePlan",
    "RestoreReport",
    "RestoreRequest",
    "Vectors",
    "backup",
    "differences",
    "listed",
    "read_contents",
    "read_manifest",
    "to_delete",
    "written",
]

Part = Literal["vectors", "ledger"]

FORMAT = 1
MANIFEST = "manifest.json"
VECTORS_FILE = "vectors.db"
LEDGER_FILE = "ledger.db"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
"""What folders, buckets and Weaviate all take."""


@dataclass(frozen=True, kw_only=True)
class BackupRequest:
    """Where a backup goes, and how many are kept; what is left out, `backup:` in sekha.yaml says."""

    name: str | None = None
    """Left out: the time. A backup that was given a name stays until somebody deletes it."""
    folder: str | None = None
    keep: int | None = None
    """Backups named by their time that are left afterwards, this one among them."""

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"`name` is {self.name!r}; it must be lower-case letters, digits, `-` and `_`, 100 at the most.",
                field="name",
            )
        if self.keep is not None and self.keep < 1:
            raise InvalidRequest(f"`keep` is {self.keep!r}; it must be 1 or more.", field="keep")


@dataclass(frozen=True, kw_only=True)
class RestoreRequest:
    """Which backup is put back, and what of it."""

    backup: str
    """Its name, or the path of its folder."""
    parts: tuple[Part, ...] = ("vectors",)
    folder: str | None = None
    into: str | None = None
    """A new file for an embedded store's vectors, in place of the one that `store:` names."""
    replace: bool = False
    """Whether what is there may be replaced."""
    safety: bool = True
    """Whether what is there is backed up before it is replaced."""

    def __post_init__(self) -> None:
        if self.into and self.parts != ("vectors",):
            raise InvalidRequest("`into` names a file for the vectors, so only they can be restored.", field="into")


# --- what a backup holds -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What one collection holds."""

    name: str
    dimension: int
    fingerprint: str
    records: int
    digest: str | None = None
    """Of all its records in the order of their uuids. None when it was written to while a server copied it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedFile:
    """A file of the backup's folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """A copy of the store: a file in the backup's folder, or a backup that a Weaviate server keeps."""

    kind: Literal["embedded", "weaviate"]
    collections: tuple[Contents, ...]
    aliases: Mapping[str, str]
    file: CopiedFile | None = None
    backend: str = ""
    """Where the server keeps it: `filesystem`, `s3`."""
    backup_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a backup says of itself. It is written last, so a folder that has one is whole."""

    name: str
    made_at: str
    """`2026-11-23T03:30:00Z`"""
    of: str
    """Whose backup it is: the path or URL of its store."""
    sekha: str
    """The version that made it."""
    rotates: bool
    """Whether it goes when it is old, since nobody gave it a name."""
    vectors: Vectors | None = None
    ledger: CopiedFile | None = None
    left_out: tuple[str, ...] = ()
    """What is not in it, and who else backs that up."""
    format: int = FORMAT

    @property
    def files(self) -> tuple[CopiedFile, ...]:
        found = (self.vectors.file if self.vectors else None, self.ledger)
        return tuple(each for each in found if each is not None)

    @property
    def records(self) -> int:
        return sum(each.records for each in self.vectors.collections) if self.vectors else 0


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A backup that is being made, in a folder beside the place where it will stand."""

    name: str
    folder: str
    made_at: str
    of: str
    rotates: bool
    keep: int

    @property
    def path(self) -> Path:
        return Path(self.folder) / f".{self.name}.partial"

    @property
    def place(self) -> Path:
        return Path(self.folder) / self.name


@dataclass(frozen=True, kw_only=True)
class BackupReport:
    """A backup that was read back, and what became of older ones."""

    manifest: Manifest
    path: str
    deleted: tuple[str, ...] = ()
    left_on_server: tuple[str, ...] = ()
    """Of those that were deleted, what a Weaviate server still keeps: it deletes no backups."""


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """What a restore would do, before it does anything."""

    request: RestoreRequest = field(repr=False)
    manifest: Manifest
    path: str
    """The backup's folder."""
    vectors_into: str | None
    """The file or server that the vectors go into; None when they stay as they are."""
    ledger_into: str | None
    holds: Mapping[str, int]
    """The records there now, by collection. They are replaced."""
    unreadable: str | None = None
    """Why nobody can say what is there. That file is moved aside."""
    replaces_ledger: bool = False

    @property
    def replaces(self) -> bool:
        return bool(self.holds or self.unreadable) or self.replaces_ledger


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """What was put back, and read back from where it is now."""

    plan: RestorePlan
    safety: str | None = None
    """The backup of what was there before."""
    aside: str | None = None
    """Where the file is that nobody could read."""
    not_compared: tuple[str, ...] = ()
    """Collections that were written to while a server copied them: nobody knows what exactly they should hold."""


# --- the line ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BackupSteps:
    """The steps of a backup: plain callables in-process, Prefect tasks in a flow."""

    begin: Callable[[BackupRequest], Awaitable[Draft]]
    copy_vectors: Callable[[Draft], Awaitable[Vectors | None]]
    copy_ledger: Callable[[Draft], Awaitable[CopiedFile | None]]
    read_back: Callable[[Draft, Vectors | None, CopiedFile | None], Awaitable[Manifest]]
    complete: Callable[[Draft, Manifest], Awaitable[str]]
    delete_old: Callable[[Draft, Manifest], Awaitable[tuple[Manifest, ...]]]
    end: Callable[[Draft], Awaitable[None]]


async def backup(request: BackupRequest, steps: BackupSteps) -> BackupReport:
    """Back up the store and the ledger, and delete old backups once the new one has been read back.

    What was acknowledged before this is called is in it. Whoever dies on the way leaves nothing that
    looks like a backup.
    """
    draft = await steps.begin(request)
    try:
        vectors = await steps.copy_vectors(draft)
        ledger = await steps.copy_ledger(draft)
        manifest = await steps.read_back(draft, vectors, ledger)
        path = await steps.complete(draft, manifest)
        deleted = await steps.delete_old(draft, manifest)
    finally:
        await steps.end(draft)
    return BackupReport(
        manifest=manifest,
        path=path,
        deleted=tuple(each.name for each in deleted),
        left_on_server=tuple(each.vectors.backup_id for each in deleted if each.vectors and each.vectors.backup_id),
    )


def to_delete(backups: Iterable[Manifest], new: Manifest, keep: int) -> list[Manifest]:
    """The old backups of the same store that nobody named, but for the `keep - 1` latest."""
    old = [each for each in backups if each.rotates and each.of == new.of and each.name != new.name]
    others = keep - 1 if new.rotates else keep
    return sorted(old, key=lambda each: (each.made_at, each.name), reverse=True)[others:]


# --- reading back --------------------------------------------------------------------------


async def read_contents(
    store: VectorStore, collection: Collection, told: Callable[[int], None] | None = None
) -> Contents:
    """Read every record of a collection, its vector too. `told` is how many were read."""
    digest, records = hashlib.sha256(), 0
    async for page in store.scan(collection.name, page=500, vectors=True):
        for record in page:
            _add(digest, record)
        records += len(page)
        if told is not None:
            told(records)
    return Contents(
        name=collection.name,
        dimension=collection.dimension,
        fingerprint=collection.fingerprint,
        records=records,
        digest=digest.hexdigest(),
    )


def differences(wanted: Vectors, collections: Sequence[Contents], aliases: Mapping[str, str]) -> list[str]:
    """What is not as the manifest says; a collection without a digest need only be there."""
    found = {each.name: each for each in collections}
    lines: list[str] = []
    for each in wanted.collections:
        there = found.pop(each.name, None)
        if there is None:
            lines.append(f"collection {each.name!r} is missing")
        elif (there.dimension, there.fingerprint) != (each.dimension, each.fingerprint):
            lines.append(f"collection {each.name!r} is of another space")
        elif each.digest is not None and there.records != each.records:
            lines.append(f"collection {each.name!r} has {there.records:,} records in place of {each.records:,}")
        elif each.digest not in (None, there.digest):
            lines.append(f"collection {each.name!r} has other records")
    lines += [f"collection {name!r} is there as well" for name in found]
    if dict(aliases) != dict(wanted.aliases):
        lines.append("the aliases differ")
    return lines


def _add(digest: hashlib._Hash, record: Record) -> None:
    properties = json.dumps(dict(record.properties), sort_keys=True, ensure_ascii=False)
    for part in (record.uuid, record.text, properties):
        # With its length before it, so that no two records are written alike. Any text a store keeps has this form.
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    # Whether a vector is sound is for `sekha doctor` to say: one that is not, must not keep the others from being safe.
    digest.update(b"" if record.vector is None else record.vector.astype("<f4").tobytes())


# --- folders -------------------------------------------------------------------------------


def written(manifest: Manifest) -> bytes:
    """The manifest as it is kept: JSON, with a digest of itself."""
    content = _adapter().dump_python(manifest, mode="json")
    return json.dumps({**content, "sha256": _sha256(content)}, indent=2, ensure_ascii=False).encode()


def read_manifest(folder: Path) -> Manifest:
    """Read what a backup says of itself. Raises `BackupMissing` where there is none, else `BackupBroken`."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        stated = content.pop("sha256")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BackupMissing(str(folder), []) from error
    except OSError as error:
        raise BackupBroken(str(folder), f"its manifest cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackupBroken(str(folder), "its manifest is damaged") from error
    if content.get("format", 0) > FORMAT:
        raise BackupBroken(str(folder), f"a newer Sekha, {content.get('sekha')}, made it: upgrade, then restore")
    if _sha256(content) != stated:
        raise BackupBroken(str(folder), "its manifest is damaged")
    return _adapter().validate_python(content)


def listed(folder: Path) -> tuple[list[Manifest], list[BackupBroken]]:
    """The backups in a folder, the latest first, and what is wrong with those that cannot be read."""
    found: list[Manifest] = []
    broken: list[BackupBroken] = []
    for each in sorted(folder.iterdir()) if folder.is_dir() else []:
        if each.name.startswith(".") or not (each / MANIFEST).is_file():
            continue
        try:
            manifest = read_manifest(each)
        except BackupBroken as error:
            broken.append(error)
        else:
            # Whoever gave it another name wants to keep it.
            moved = manifest.name != each.name
            found.append(replace(manifest, name=each.name, rotates=False) if moved else manifest)
    return sorted(found, key=lambda each: (each.made_at, each.name), reverse=True), broken


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
