"""Documents in, chunks out: reading files with care, and splitting text where its author did."""

from __future__ import annotations

import hashlib
import re
import shlex
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG

from sekha.errors import DocumentRefused

__all__ = ["MAX_DOCUMENT_MB", "Chunk", "Document", "checked", "content_hash", "read_folder", "split"]

MAX_DOCUMENT_MB = 10.0
SUFFIXES = frozenset({".md", ".markdown", ".mdx", ".txt", ".text", ".rst", ".adoc", ".org"})
SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "dist", "build"})
NAMESPACE = uuid.UUID("5e4ba000-0000-5000-8000-000000000001")
"""Root of every chunk's UUID. Changing it would orphan what is stored."""
_NAMESPACE_HASH = hashlib.sha1(NAMESPACE.bytes, usedforsecurity=False)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and where it comes from. `source` names it for good: the same source replaces it."""

    source: str
    text: str = field(repr=False)
    updated_at: str | None = None
    """ISO 8601, UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a document that is embedded and found as one."""

    source: str
    index: int
    text: str = field(repr=False)
    heading: str = ""
    """The headings above it, `Install › Linux`."""
    updated_at: str | None = None

    @property
    def content_hash(self) -> str:
        return content_hash(self.text)

    def uuid_in(self, collection: str) -> str:
        """The same for the same collection, source and position, so that writing again replaces."""
        # A separator that no name holds, so that ("a", "bc") and ("ab", "c") stay apart.
        named = _NAMESPACE_HASH.copy()
        named.update("\0".join((collection, self.source, str(self.index))).encode())
        # What `str(uuid.uuid5(NAMESPACE, name))` gives, by RFC 9562 5.5, at a third of its time.
        digits = named.hexdigest()
        variant = "89ab"[int(digits[16], 16) & 3]
        return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def content_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- reading -------------------------------------------------------------------------------


def read_folder(
    path: Path,
    *,
    home: Path | None = None,
    max_document_mb: float = MAX_DOCUMENT_MB,
    left_out: list[tuple[str, str]] | None = None,
) -> list[Document]:
    """Read a file, or every Markdown and text file below a folder, in the order of their paths.

    Below `home`, a source is named relative to it, so that a file has one name by whichever folder
    it is reached, and equal names in two folders stay apart; elsewhere, relative to the folder.
    Raises `DocumentRefused` with every file that cannot be read; given a list for them, adds each
    there with the reason, and leaves it out.
    """
    try:
        path.stat()
    except OSError as error:
        raise DocumentRefused([(str(path), f"it cannot be read: {error.strerror}")]) from error
    refused: list[tuple[str, str]] = []
    root, files = (path, _files_below(path, refused)) if path.is_dir() else (path.parent, [path])
    above = _below(root.resolve(), home.resolve()) if home else Path()
    documents: list[Document] = []
    for file in files:
        source = (above / file.relative_to(root)).as_posix()
        try:
            documents.append(_read(file, source, max_document_mb))
        except _Refused as reason:
            refused.append((_shown(source), str(reason)))
    if refused and left_out is None:
        raise DocumentRefused(refused)
    if not documents:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DocumentRefused([(str(path), f"no text in it: files that end in {kinds} are read"), *refused])
    if left_out is not None:
        left_out += refused
    return documents


def checked(
    documents: Iterable[Document],
    *,
    max_document_mb: float = MAX_DOCUMENT_MB,
    left_out: list[tuple[str, str]] | None = None,
) -> tuple[Document, ...]:
    """Documents that are handed over, held to the same rules as files. Two of one source are never taken."""
    checked: dict[str, Document] = {}
    refused: list[tuple[str, str]] = []
    twice: list[tuple[str, str]] = []
    for document in documents:
        if document.source in checked:
            twice.append((document.source, "two documents have this source: each needs its own"))
        elif reason := _unnamed(document.source) or _objection(document.text, max_document_mb):
            refused.append((_shown(document.source), reason))
        else:
            checked[document.source] = document
    if twice or (refused and (left_out is None or not checked)):
        raise DocumentRefused([*twice, *refused])
    if left_out is not None:
        left_out += refused
    return tuple(checked.values())


def _unnamed(source: str) -> str | None:
    if not source:
        return "it has no `source`, the name under which it is replaced later"
    return None if _is_unicode(source) else "its name is not UTF-8: rename it"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(source: str) -> str:
    """A name that can be printed, whatever bytes it has on the disk."""
    return source.encode(errors="replace").decode()


def _below(folder: Path, home: Path) -> Path:
    return folder.relative_to(home) if folder.is_relative_to(home) else Path()


class _Refused(Exception):
    pass


def _files_below(folder: Path, refused: list[tuple[str, str]]) -> list[Path]:
    def walk(at: Path, above: frozenset[Path]) -> Iterator[Path]:
        try:
            real = at.resolve()
            entries = sorted(at.iterdir())
        except OSError as error:
            refused.append((_shown(at.relative_to(folder).as_posix()), f"it cannot be read: {error.strerror}"))
            return
        if real in above:
            return  # a link to a folder that this one is in
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                continue
            if entry.is_dir():
                yield from walk(entry, above | {real})
            elif entry.suffix.lower() in SUFFIXES:
                yield entry

    return list(walk(folder, frozenset()))


def _read(file: Path, source: str, max_document_mb: float) -> Document:
    if reason := _unnamed(source):
        raise _Refused(reason)
    try:
        status = file.stat()
        if not S_ISREG(status.st_mode):
            raise _Refused("it is no regular file")  # reading a pipe would wait forever
        if status.st_size > max_document_mb * 1e6:
            raise _Refused(_too_large(status.st_size, max_document_mb))
        data = file.read_bytes()
    except OSError as error:
        raise _Refused(f"it cannot be read: {error.strerror}") from error
    if b"\0" in data[:8192]:
        raise _Refused("it is binary, not text: convert it, or leave it out")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Refused(
            f"it is not UTF-8: byte {data[error.start]:#04x} on line {line}. Convert it: "
            f"`iconv -f WINDOWS-1252 -t UTF-8 -o new.txt {shlex.quote(file.name)}`"
        ) from error
    if reason := _objection(text, max_document_mb):
        raise _Refused(reason)
    updated_at = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
    return Document(source=source, text=text, updated_at=updated_at)


def _objection(text: str, max_document_mb: float) -> str | None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate), which is not UTF-8: decode it again from its bytes"
    if size > max_document_mb * 1e6:
        return _too_large(size, max_document_mb)
    if not text or text.isspace():
        return "it is empty: write something, or leave it out"
    if "\0" in text:
        return "it is binary, not text: convert it, or leave it out"
    return None


def _too_large(size: int, limit_mb: float) -> str:
    return (
        f"it has {size / 1e6:.1f} MB, and {limit_mb:g} MB is the most: split it, "
        f"or allow it with `--max-document-mb {size / 1e6 + 1:.0f}`"
    )


# --- splitting -----------------------------------------------------------------------------

_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
# Chinese and Japanese write no space behind a sentence.
# The ends come first, as one set of characters, for which `re` skips ahead: a third of the time.
_SENTENCE_END = re.compile(r"[.!?。！？\n](?:(?<=[.!?])\s+|(?<=[。！？])\s*|(?<=\n))")


@dataclass(frozen=True, slots=True)
class _Block:
    text: str
    headings: tuple[str, ...]
    starts_section: bool = False


def split(document: Document, *, size: int = 1200, overlap: int = 150) -> list[Chunk]:
    """Split a document into chunks of at most `size` characters.

    It breaks at headings first, then between paragraphs, then sentences, then words, and keeps a
    fenced block whole while it fits. Within a section each chunk begins with up to `overlap`
    characters of the one before, from the start of a sentence or word.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and below size, not {overlap!r} of {size!r}")
    pieces: list[tuple[str, str]] = []
    # So that a tail, the blank line behind it and a whole part always fit together.
    room = max(size - overlap - 2, 1)
    current: list[str] = []
    headings: tuple[str, ...] = ()
    for block in _blocks(document.text):
        # A heading with nothing under it but the next one says nothing by itself, and goes with that.
        bare = block.starts_section and all(_HEADING.match(line) for part in current for line in part.splitlines())
        if current and not bare and (block.starts_section or _length(current) + 2 + len(block.text) > room):
            pieces.append(("\n\n".join(current), " › ".join(headings)))
            current = [] if block.starts_section else _tail(pieces[-1][0], overlap)
        headings = block.headings
        for part in _parts(block.text, room):
            if current and _length(current) + 2 + len(part) > size:
                pieces.append(("\n\n".join(current), " › ".join(headings)))
                current = _tail(pieces[-1][0], overlap)
            current.append(part)
    if current:
        pieces.append(("\n\n".join(current), " › ".join(headings)))
    return [
        Chunk(source=document.source, index=index, text=text, heading=heading, updated_at=document.updated_at)
        for index, (text, heading) in enumerate(pieces)
    ]


def _length(parts: list[str]) -> int:
    return sum(map(len, parts)) + 2 * (len(parts) - 1)


def _blocks(text: str) -> Iterator[_Block]:
    """Paragraphs and fenced blocks in order, each with the headings above it."""
    headings: dict[int, str] = {}
    lines: list[str] = []
    fence: str | None = None
    section = False

    def block() -> Iterator[_Block]:
        nonlocal section
        if body := "\n".join(lines).strip("\n").rstrip():
            yield _Block(body, tuple(headings[level] for level in sorted(headings)), section)
            section = False
        lines.clear()

    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if fence:
            lines.append(line)
            # A longer fence may hold shorter ones, and a fence with a word behind it opens, never closes.
            if len(line.strip()) >= len(fence) and not line.strip().strip(fence[0]):
                fence = None
                yield from block()
        elif not line.strip():
            # A heading stays with the paragraph under it.
            if not (len(lines) == 1 and _HEADING.match(lines[0])):
                yield from block()
        elif found := _FENCE.match(line):
            yield from block()
            fence = found[1]
            lines.append(line)
        elif line[0] == "#" and (found := _HEADING.match(line)):
            yield from block()
            level = len(found[1])
            headings = {above: title for above, title in headings.items() if above < level} | {level: found[2]}
            section = True
            lines.append(line)
        else:
            lines.append(line)
    yield from block()


def _parts(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at most `size`: whole, else by sentences, else by words, else anywhere."""
    # By positions, since cutting off the rest again and again takes time quadratic in its length.
    at = 0
    while at < len(text):
        end = _last_break(text, at, size) if len(text) - at > size else len(text)
        if part := text[at:end].strip("\n").rstrip():
            yield part
        at = end


def _last_break(text: str, at: int, size: int) -> int:
    """Where to cut `text[at:]`: in the second half of the `size` characters that fit, if it can be helped."""
    half, end = at + size // 2, at + size
    # From one before, since a sentence's end may be there and the space behind it here.
    ends = [found.end() for found in _SENTENCE_END.finditer(text, max(half - 1, at), end) if found.end() > half]
    if ends:
        return ends[-1]
    space = text.rfind(" ", half, end)
    return space + 1 if space > at else end


def _tail(text: str, overlap: int) -> list[str]:
    """The end of a chunk that the next one repeats."""
    if overlap == 0 or len(text) <= overlap:
        return []
    tail = text[-overlap:]
    end = _SENTENCE_END.search(tail)
    at = end.end() if end and end.end() < len(tail) else tail.find(" ") + 1
    return [tail[at:].strip()] if tail[at:].strip() else []
