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

__all__ = ["alias_in", "alias_of", "collections_in", "embedder_of", "index_for", "indexes_of", "names_index_of"]

LONGEST_SLUG: Final = 60


def alias_of(collection: str) -> str:
    """The name that stands for the index that readers use: `Documents` for `documents`."""
    return f"{collection[:1].upper()}{collection[1:]}"


def indexes_of(collection: str, there: Iterable[Collection]) -> list[Collection]:
    """A collection's indexes among those of a store, by name."""
    alias = re.escape(alias_of(collection))
    return sorted(
        (index for index in there if _names(alias, index.dimension).fullmatch(index.name)),
        key=lambda index: index.name,
    )


def alias_in(index: Collection) -> str | None:
    """The alias that an index's name begins with; None for a name that none of ours has."""
    found = _names(r"([A-Z]\w*?)", index.dimension).fullmatch(index.name)
    return None if found is None else found[1]


def collections_in(there: Iterable[Collection], declared: Iterable[str]) -> list[str]:
    """The collections that a store's indexes are of, as they are declared, else with a small letter first."""
    names = {alias_of(name): name for name in declared}
    aliases = dict.fromkeys(alias for index in there if (alias := alias_in(index)) is not None)
    return [names.get(alias, alias[:1].lower() + alias[1:]) for alias in aliases]


def names_index_of(alias: str, name: str) -> bool:
    """Whether an index of this alias's collection could have this name, whatever its dimension."""
    return _names(re.escape(alias), r"\d+").fullmatch(name) is not None


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


def _names(alias: str, dimension: int | str) -> re.Pattern[str]:
    """How indexes are named, a second model's with its own name behind the dimension."""
    return re.compile(rf"{alias}_{dimension}(_[A-Za-z]\w*)?")


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
