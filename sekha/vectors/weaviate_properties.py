"""How a record's properties lie in Weaviate: as written in one JSON text, and beside it what filters read.

Weaviate gives each property one type for good, keeps no None, trims text and takes an empty one for
absent, writes names in its own case and numbers as doubles. So `properties` holds them as they were
written, and each is indexed once more under a name that also says whether it is text or a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Final, Literal, TypeAlias, assert_never

from sekha.vectors.base import AllOf, AnyOf, Compare, Filter, Not, Scalar
from sekha.vectors.checks import check_compared

__all__ = ["KINDS", "OURS", "Kind", "indexed", "indexed_value", "kind_of", "name_of", "needed"]

Kind: TypeAlias = Literal["text", "number"]

KINDS: Final[tuple[Kind, ...]] = ("text", "number")

OURS: Final[Mapping[str, Kind]] = {
    "source": "text",
    "chunk": "number",
    "heading": "text",
    "content_hash": "text",
    "embedding_fingerprint": "text",
    "source_updated_at": "text",
    "migration_id": "text",
}
"""What Sekha itself writes: declared with the collection, and under its own name."""

# Weaviate trims blanks, and Python counts this separator as one too, so no two texts are marked alike.
_MARK: Final = "\x1f"


def kind_of(value: str | float) -> Kind:
    return "text" if isinstance(value, str) else "number"


def name_of(name: str, kind: Kind) -> str:
    """Under which name Weaviate indexes values of that kind."""
    if OURS.get(name) == kind:
        return name
    # Two names that differ only in case are one to Weaviate.
    if re.fullmatch(r"[_0-9a-z]{1,200}", name):
        return f"{kind}_{name}"
    return f"{kind}x_{sha256(name.encode()).hexdigest()[:32]}"


def indexed_value(value: str | float) -> str | float:
    if not isinstance(value, str):
        return float(value)
    return value if value and value == value.strip() else f"{_MARK}{value}{_MARK}"


def indexed(properties: Mapping[str, Scalar]) -> dict[str, str | float]:
    """What filters read of a record."""
    return {
        name_of(name, kind_of(value)): indexed_value(value) for name, value in properties.items() if value is not None
    }


def needed(where: Filter) -> frozenset[str]:
    """The indexed names that a filter has to know of. Raises `StoreError` for a malformed one."""
    match where:
        case AllOf(filters) | AnyOf(filters):
            return frozenset[str]().union(*map(needed, filters))
        case Not(inner):
            return needed(inner)
        case Compare(name):
            check_compared(where)
            values = where.value if isinstance(where.value, tuple) else (where.value,)
            kinds = set(KINDS) if None in values else {kind_of(value) for value in values if value is not None}
            return frozenset(name_of(name, kind) for kind in kinds)
        case _:
            assert_never(where)
