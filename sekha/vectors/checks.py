"""What every store accepts: names, uuids, flat properties, words, and vectors that have a direction."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final
from uuid import UUID

import numpy as np
import orjson

from sekha.errors import StoreError, VectorRefused
from sekha.vectors.base import Collection, Compare, Record, Vector

__all__ = [
    "NAME",
    "NORM_TOLERANCE",
    "canonical",
    "canonical_all",
    "check_alias",
    "check_collection",
    "check_compared",
    "properties_as_json",
    "unit",
    "unsound",
    "words",
]

NAME: Final = re.compile(r"[A-Z][_0-9A-Za-z]{0,254}")
"""What may name a collection or an alias. Weaviate capitalises every other name, so no store takes one."""

NORM_TOLERANCE: Final = 5e-7
"""How far a vector of unit length in float32 may be from it."""

ANOTHER_LENGTH: Final = 1e-4
"""How far the length of a vector that somebody else wrote may be from 1, before it changes what is found."""

MOST_WORDS: Final = 64
"""Words of one query that are looked up, since each takes its time."""

_CANONICAL: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INT64: Final = range(-(2**63), 2**63)


def check_collection(collection: Collection) -> None:
    if not NAME.fullmatch(collection.name):
        raise StoreError(
            f"{collection.name!r} cannot name a collection. Begin with a capital letter, and go on with "
            "letters, digits and underscores."
        )
    if collection.dimension < 1:
        raise StoreError(f"Collection {collection.name!r} needs a dimension of 1 or more.")


def check_alias(alias: str) -> None:
    if not NAME.fullmatch(alias):
        raise StoreError(
            f"{alias!r} cannot name an alias. Begin with a capital letter, and go on with letters, digits "
            "and underscores."
        )


def check_compared(compare: Compare) -> None:
    """Refuse a filter whose operator does not take its value."""
    if compare.operator not in ("eq", "ne", "lt", "le", "gt", "ge", "in"):
        raise StoreError(f"The filter on {compare.property!r} has no operator {compare.operator!r}.")
    several = isinstance(compare.value, tuple)
    if several != (compare.operator == "in"):
        wanted = "one value" if several else "a tuple of values"
        raise StoreError(f"The filter on {compare.property!r} compares with {compare.operator!r}: give it {wanted}.")
    for value in compare.value if isinstance(compare.value, tuple) else (compare.value,):
        if why := _unfit(value):
            raise StoreError(f"The filter on {compare.property!r} has a value that cannot be compared: {why}.")


def properties_as_json(uuid: str, record: Record) -> str:
    """The properties as one text. Raises `StoreError` for any that is not flat, and for unfit text."""
    if why := _unfit(record.text):
        raise StoreError(f"The text of {uuid!r} cannot be stored: {why}.")
    for name, value in record.properties.items():
        if why := _unfit(value):
            raise StoreError(f"Property {name!r} of {uuid!r} cannot be stored: {why}.")
    try:
        return orjson.dumps(dict(record.properties), option=orjson.OPT_SORT_KEYS).decode()
    except TypeError as error:
        raise StoreError(f"The properties of {uuid!r} cannot be stored: {error}.") from error


def unit(collection: str, dimension: int, vectors: Sequence[tuple[str | None, Vector | None]]) -> Vector:
    """The vectors at unit length, or `VectorRefused` for the first that has no direction."""
    for uuid, vector in vectors:
        if vector is None:
            raise VectorRefused(collection, uuid, "it is missing")
        if np.shape(vector) != (dimension,):
            shape = " × ".join(map(str, np.shape(vector)))
            raise VectorRefused(collection, uuid, f"it has {shape} numbers, not {dimension}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        rows = np.empty((len(vectors), dimension), dtype=np.float32)
        for row, (_, vector) in zip(rows, vectors, strict=True):
            row[:] = vector
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    for index in np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[:1].tolist():
        why = "it is zero" if norms[index] == 0 else "it holds NaN or infinite numbers"
        raise VectorRefused(collection, vectors[index][0], why)
    # Unit vectors keep their bits, so that what was read can be written back and changes nothing.
    longer = np.abs(norms - 1) > NORM_TOLERANCE
    rows[longer] = rows[longer] / norms[longer, np.newaxis]
    return rows


def unsound(dimension: int, vectors: Sequence[Vector | None]) -> list[str | None]:
    """Why each of these vectors, as a store keeps them, cannot be searched; None for those that can."""
    whys: list[str | None] = [None] * len(vectors)
    sized: dict[int, Vector] = {}
    for at, vector in enumerate(vectors):
        if vector is None:
            whys[at] = "it is missing"
        elif vector.shape != (dimension,):
            whys[at] = f"it has {vector.size} numbers, not {dimension}"
        else:
            sized[at] = vector
    if sized:
        rows = np.stack(list(sized.values()))
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        for at, norm in zip(sized, norms.tolist(), strict=True):
            if norm == 0:
                whys[at] = "it is zero"
            elif not math.isfinite(norm):
                whys[at] = "it holds NaN or infinite numbers"
            elif abs(norm - 1) > ANOTHER_LENGTH:
                whys[at] = "it is not of unit length"
    return whys


def words(query: str) -> list[str]:
    """The different words of a query as they stand there, the first `MOST_WORDS` of them."""
    found: dict[str, str] = {}
    for inside, characters in groupby(query, _in_a_word):
        word = "".join(characters)
        if inside and any(character.isalnum() for character in word):
            found.setdefault(word.lower(), word)
            if len(found) == MOST_WORDS:
                break
    return list(found.values())


def canonical(uuid: str) -> str:
    try:
        return uuid if _CANONICAL.fullmatch(uuid) else str(UUID(uuid))
    except (ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{uuid!r} is no uuid. Write it as '9f1c…-…', 32 hexadecimal digits.") from error


def canonical_all(uuids: Iterable[str]) -> list[str]:
    return [canonical(uuid) for uuid in uuids]


def _in_a_word(character: str) -> bool:
    # Marks are how many scripts write their vowels. The one left out only says how an emoji is drawn.
    return character.isalnum() or (unicodedata.category(character) in ("Mn", "Mc") and character != "\ufe0f")


def _unfit(value: object) -> str | None:
    """Why a value can be neither stored nor compared; None when it can."""
    if isinstance(value, str):
        return None if value.isascii() or _encodes(value) else "it is no valid Unicode"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if value in _INT64 else "it does not fit into 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "it is not finite"
    return f"it is a {type(value).__name__}, not a text, number, boolean or None"


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
