"""A whole configuration in Prefect: which blocks it is made of, and everything that needs no block of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, ValidationError

from blocks.answering import prefect_answers
from blocks.budget import Budget
from blocks.provider import LLMProvider
from blocks.store import VectorStore
from sekha.errors import ConfigError, ConfigMissing, Problem
from sekha.loading import Loaded, parse

B = TypeVar("B", bound=Block)

__all__ = ["Pushed", "SekhaConfig", "block_name", "load_config", "push"]


class SekhaConfig(Block):
    """
    A validated Sekha configuration. Its providers, store and budgets are blocks of their own, named
    here, so that each can be edited alone. Flows use it when they are given `block:BLOCK_NAME`.

    Example:
        Load a configuration that `sekha blocks push` stored:
        ```python
        from blocks import SekhaConfig

        config = SekhaConfig.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Sekha Configuration"
    _block_type_slug = "sekha-config"
    _documentation_url = "https://docs.prefect.io/v3/concepts/blocks"  # type: ignore[assignment]
    _description = "A whole sekha.yaml in Prefect: names the provider, store and budget blocks, and holds the rest."

    providers: list[str] = Field(description="Names of the LLM Provider blocks, in the order of the file.")
    store: str = Field(description="Name of the Vector Store block.")
    budgets: list[str] = Field(default_factory=list, description="Names of the LLM Budget blocks.")
    ledger: SecretStr | None = Field(
        default=None, description="Where the ledger is; its address may hold a password. Empty: a file in the folder."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The other sections of sekha.yaml: routing, collections and so on."
    )
    folder: str = Field(description="The folder from which relative paths in the configuration start.")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of one block."""

    slug: str
    name: str
    outcome: Literal["created", "updated", "unchanged"]


def block_name(config: str, part: str) -> str:
    """A name that Prefect takes: lower case, digits and dashes. Each configuration has its own blocks."""
    return f"{config}-{re.sub(r'[^a-z0-9]+', '-', part.lower()).strip('-')}"


def push(loaded: Loaded, name: str = "sekha") -> list[Pushed]:
    """Store a validated configuration as blocks; what is there already and equal is left alone.

    Blocking; call it from a thread where an event loop runs. Raises `PrefectUnavailable`, and
    `ConfigError` for names that blocks cannot have.
    """
    config = loaded.config
    _refuse_names(loaded, name)
    providers = {
        block_name(name, section.id): LLMProvider(
            provider_id=section.id,
            **section.model_dump(exclude={"id", "api_key", "models", "limits"}),
            api_key=section.api_key,
            limits=section.limits,
            models=list(section.models),
        )
        for section in config.providers
    }
    store = VectorStore(
        **config.store.model_dump(exclude={"api_key", "path"}),
        api_key=config.store.api_key,
        path=str(loaded.path(config.store.path)),
    )
    budgets = {
        block_name(name, section.name): Budget(budget_name=section.name, **section.model_dump(exclude={"name"}))
        for section in config.budgets
    }
    whole = SekhaConfig(
        providers=list(providers),
        store=block_name(name, "store"),
        budgets=list(budgets),
        ledger=SecretStr(config.ledger.url) if "ledger" in config.model_fields_set else None,
        settings=config.model_dump(
            mode="json", exclude={"providers", "store", "budgets", "ledger"}, exclude_unset=True, exclude_none=True
        ),
        folder=str(loaded.folder),
    )
    # A budget may well be named as its provider is: names are told apart by their kind of block.
    documents: list[tuple[str, Block]] = [
        *providers.items(),
        (block_name(name, "store"), store),
        *budgets.items(),
        (name, whole),
    ]
    with prefect_answers():
        for kind in (LLMProvider, VectorStore, Budget, SekhaConfig):
            kind.register_type_and_schema(_sync=True)  # type: ignore[call-arg]
        return [_saved(document, document_name) for document_name, document in documents]


def load_config(name: str) -> Loaded:
    """Read a configuration and its blocks as they are now. Blocking.

    Raises `ConfigMissing` when a block it is made of is not there, and `ConfigError` as a file would.
    """
    whole = _load(SekhaConfig, name)
    document = {
        **whole.settings,
        "providers": [_load(LLMProvider, part).to_section() for part in whole.providers],
        "store": _load(VectorStore, whole.store).to_section(),
        "budgets": [_load(Budget, part).to_section() for part in whole.budgets],
        **({"ledger": {"url": whole.ledger.get_secret_value()}} if whole.ledger else {}),
    }
    return parse(document, source=f"Prefect block {name!r}", folder=Path(whole.folder), environ=os.environ)


def _refuse_names(loaded: Loaded, name: str) -> None:
    """Say which names Prefect does not take, and which it could not tell apart."""
    problems = []
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        problems.append(Problem("", f"{name!r} cannot be a block's name: use lower case, digits and dashes."))
    for place, field, parts in (
        ("providers", "id", [section.id for section in loaded.config.providers]),
        ("budgets", "name", [section.name for section in loaded.config.budgets]),
    ):
        first: dict[str, str] = {}
        for at, part in enumerate(parts):
            if (block := block_name(name, part)).endswith("-"):
                problems.append(Problem(f"{place}[{at}].{field}", f"{part!r} leaves no letter or digit for a block."))
            elif (twin := first.setdefault(block, part)) != part:
                message = f"{part!r} and {twin!r} would both be the block {block!r}. Rename one."
                problems.append(Problem(f"{place}[{at}].{field}", message))
    if problems:
        raise ConfigError(loaded.source, problems)


def _saved(block: Block, name: str) -> Pushed:
    slug = str(block.get_block_type_slug())
    try:
        there: Block = cast(Block, type(block).load(name, _sync=True))  # type: ignore[call-arg]
        outcome: Literal["created", "updated"] = "updated"
        if _content(there) == _content(block):
            return Pushed(slug, name, "unchanged")
    except ValueError:
        outcome = "created"
    except RuntimeError as error:
        # It was edited to what the block itself refuses, and is put right by this.
        if not isinstance(error.__cause__, ValidationError):
            raise
        outcome = "updated"
    block.save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    return Pushed(slug, name, outcome)


def _content(block: Block) -> dict[str, Any]:
    return {field: getattr(block, field) for field in type(block).model_fields}


def _load(kind: type[B], name: str) -> B:
    try:
        with prefect_answers():
            # Inside an async flow Prefect would answer with a coroutine, in whatever thread it is asked.
            return cast(B, kind.load(name, _sync=True))  # type: ignore[call-arg]
    except RuntimeError as error:
        if not isinstance(invalid := error.__cause__, ValidationError):
            raise
        wrong = [Problem(".".join(map(str, each["loc"])), each["msg"]) for each in invalid.errors(include_input=False)]
        # Both quote the whole block, and with it the key.
        raise ConfigError(f"Prefect block {name!r}", wrong) from None
    except ValueError as error:
        message = f"there is no {kind.get_block_type_slug()} block of that name. Store one: `sekha blocks push`."
        raise ConfigMissing(f"Prefect block {name!r}", [Problem("", message)]) from error
