"""Which index holds which space: told from what the store has, and what the file declares.

A collection's first space of a dimension lies in `Documents_768`. A second model of that dimension gets an index
of its own, `Documents_768_nomic_embed_text`, since vectors of two models must never meet in one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final

from sekha.registry import Model, Registry, Space
from sekha.vectors.base import Collection

__all__ = ["alias_of", "embedder_of", "index_for", "indexes_of"]

LONGEST_SLUG: Final = 60


def alias_of(collection: str) -> str:
    """The name that stands for the index that readers use: `Documents` for `documents`."""
    return f"{collection[:1].upper()}{collection[1:]}"


def indexes_of(collection: str, there: Iterable[Collection]) -> list[Collection]:
    """A collection's indexes among those of a store, by name."""
    named = re.compile(rf"{re.escape(alias_of(collection))}_(\d+)(_[A-Za-z]\w*)?")
    return sorted(
        (
            index
            for index in there
            if (found := named.fullmatch(index.name)) is not None and int(found[1]) == index.dimension
        ),
        key=lambda index: index.name,
    )


def index_for(space: Space, there: Iterable[Collection]) -> Collection:
    """The index that holds the space, or the one to be made for it."""
    known = {index.name: index for index in there}
    for index in indexes_of(space.collection, known.values()):
        if _makes(space.model, index):
            return index
    first = f"{alias_of(space.collection)}_{space.dimension}"
    own = f"{first}_{_slug(space.model)}"
    if first not in known:
        name = first
    elif own not in known:
        name = own
    else:
        # The same model in another revision, or under another prefix.
        name = f"{own}_{hashlib.sha256(space.fingerprint.encode()).hexdigest()[:8]}"
    return Collection(name, space.dimension, space.fingerprint)


def embedder_of(index: Collection, registry: Registry) -> Model | None:
    """The model that goes first of those that make an index's vectors; None when the file lists none."""
    return next((model for model in registry.for_task("embedding") if _makes(model, index)), None)


def _makes(model: Model, index: Collection) -> bool:
    return index.fingerprint in (model.fingerprint, _before_families(model))


def _before_families(model: Model) -> str | None:
    """The fingerprint that the first version of Sekha gave to the model's vectors."""
    plain = "@" not in model.makes and not model.document_prefix
    return f"{model.id}:{model.dimension}" if plain else None


def _slug(model: Model) -> str:
    name = model.makes.partition("/")[2] or model.id
    slug = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_").lower()[:LONGEST_SLUG].rstrip("_")
    # A name that went on with digits could be taken for another dimension.
    return slug if slug[:1].isalpha() else f"model_{slug}".rstrip("_")
