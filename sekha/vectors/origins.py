"""What an import reads from: another store's collections, page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import orjson

from sekha.importing import Foreign
from sekha.vectors.base import Scalar, Vector

__all__ = ["Offered", "Origin", "flat", "vector_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A collection that another store has."""

    name: str
    records: int
    model: str | None = None
    """The embedding model that it says it was made with."""


class Origin(Protocol):
    """Another store. All methods raise `StoreError` when it cannot be read."""

    async def offered(self) -> Sequence[Offered]:
        """Its collections, by name."""
        ...

    async def page(self, name: str, after: str | None, size: int) -> tuple[list[Foreign], str | None]:
        """The records behind `after`, and where the next page begins; None behind the last."""
        ...

    async def drop(self, name: str) -> None:
        """Drop one of its collections."""
        ...

    async def aclose(self) -> None: ...


def flat(properties: Mapping[str, Any]) -> dict[str, Scalar]:
    """Properties as we keep them; what is not one value becomes its JSON, and a time its ISO 8601 form."""
    return {name: _flat(value) for name, value in properties.items()}


def vector_of(found: Any) -> Vector | None:
    if found is None or np.size(found) == 0:
        return None
    return np.asarray(found, dtype=np.float32)


def _flat(value: Any) -> Scalar:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    return orjson.dumps(value, default=str).decode()
