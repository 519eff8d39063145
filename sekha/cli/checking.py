"""`sekha check` and `sekha models`: what is declared, resolved, without calling anyone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from sekha.address import without_secrets
from sekha.cli.invocation import Invocation, config_option, json_option
from sekha.cli.opening import configuration
from sekha.cli.terminal import columns, note, say, show_table, write_json
from sekha.errors import dollars
from sekha.registry import TASKS

if TYPE_CHECKING:
    from rich.table import Table

    from sekha.config import Config
    from sekha.loading import Loaded
    from sekha.registry import Model, Registry

__all__ = ["check", "models", "price_text"]

PLANNED = ("migrations",)
"""Sections that nothing acts on so far."""


@click.command()
@config_option
@json_option
@click.option("--schema", is_flag=True, help="Print the JSON Schema of sekha.yaml instead, for editors.")
@click.pass_obj
def check(invocation: Invocation, schema: bool) -> None:
    """Validate the configuration and print what it comes to.

    Everything wrong in the file is said at once, each with its line and the fix. Nobody is called,
    nothing is opened, and keys are never shown.

    \b
    Examples:
      sekha check
      sekha -c production.yaml check --json
    """
    if schema:
        from sekha.config import json_schema

        return write_json(json_schema())
    loaded = configuration(invocation)
    registry = _registry(loaded)
    if invocation.as_json:
        return write_json(_picture(loaded, registry))
    _print_picture(loaded, registry)
    return None


@click.command()
@config_option
@json_option
@click.option("--task", type=click.Choice(TASKS), help="Only the models for this task.")
@click.pass_obj
def models(invocation: Invocation, task: str | None) -> None:
    """List the models, whom they belong to and what they cost.

    \b
    Examples:
      sekha models
      sekha models --task embedding --json
    """
    loaded = configuration(invocation)
    listed = [model for model in _registry(loaded) if task is None or task in model.tasks]
    if invocation.as_json:
        return write_json({"models": [_model(model) for model in listed]})
    if not listed:
        return note(f"No model for {task!r}." if task else "No models. List them under `providers:` in sekha.yaml.")
    return show_table(_model_table(listed, loaded.config))


def price_text(model: Model, unknown_price: str) -> str:
    """A model's price for a million tokens, and who says so."""
    price = model.price
    if price is None:
        return f"unknown: {'refused' if unknown_price == 'refuse' else 'taken as free'}"
    if price.is_free:
        return f"free ({price.source})"
    parts = [f"{dollars(price.input)} in"]
    if price.cached_input is not None:
        parts.append(f"{dollars(price.cached_input)} cached")
    if price.output:
        parts.append(f"{dollars(price.output)} out")
    if price.per_image:
        parts.append(f"{dollars(price.per_image)} an image")
    return f"{', '.join(parts)} ({price.source})"


def _registry(loaded: Loaded) -> Registry:
    from sekha.price_map import PriceMap
    from sekha.registry import Registry

    return Registry.from_config(loaded.config, PriceMap.bundled())


# --- for people ----------------------------------------------------------------------------


def _print_picture(loaded: Loaded, registry: Registry) -> None:
    config = loaded.config
    say(f"Valid: {loaded.source}", "bold green")
    _section("Providers", _provider_table(loaded, registry))
    _section("Models, with prices for a million tokens", _model_table(list(registry), config))
    _section("Collections", _collection_table(registry))
    _section("Budgets", _budget_table(config))
    facts = columns("", "", wrap=("",))
    for name, value in _facts(loaded, registry):
        facts.add_row(name, value)
    facts.show_header = False
    _section("Otherwise", facts)
    warnings = (*loaded.warnings, *_without_effect(config))
    if warnings:
        say()
    for warning in warnings:
        say(f"Note: {warning}", "yellow")


def _section(title: str, table: Table) -> None:
    if table.row_count:
        say()
        say(title, "bold")
        show_table(table)


def _provider_table(loaded: Loaded, registry: Registry) -> Table:
    table = columns("id", "kind", "address", "priority", "key", right=("priority",), wrap=("address",))
    written = _written_keys(loaded)
    for spec in sorted(registry.providers.values(), key=lambda provider: provider.priority):
        key = _key(written.get(spec.id), is_set=spec.api_key is not None)
        table.add_row(spec.id, spec.kind, _address(spec.base_url, spec.kind), str(spec.priority), key)
    return table


def _address(url: str | None, kind: str) -> str:
    if url:
        return without_secrets(url)
    return "in this process" if kind == "builtin" else "the provider's own"


def _key(written: str | None, *, is_set: bool) -> str:
    if not is_set:
        return "none"
    return f"set ({written})" if written else "set"


def _model_table(listed: list[Model], config: Config) -> Table:
    table = columns("model", "tasks", "dimension", "context", "price", right=("dimension", "context"), wrap=("price",))
    for model in listed:
        table.add_row(
            model.name,
            ", ".join(model.tasks) + (" (sees)" if model.vision and "vision" not in model.tasks else ""),
            f"{model.dimension or ''}",
            f"{model.context_window:,}" if model.context_window else "",
            price_text(model, config.unknown_price),
        )
    return table


def _collection_table(registry: Registry) -> Table:
    from sekha.spaces import index_for

    table = columns("collection", "kept as", "embedded by")
    for name in registry.collections:
        space = registry.space(name)
        table.add_row(name, index_for(space, ()).name, space.asked_as)
    return table


def _budget_table(config: Config) -> Table:
    table = columns("budget", "limit", "counts", right=("limit",))
    for budget in config.budgets:
        counts = ", ".join(f"{what} {wanted}" for what, wanted in budget.match.items()) or "every call"
        period = "in total" if budget.period == "total" else f"a {budget.period}"
        table.add_row(budget.name, f"{dollars(budget.limit)} {period}", counts)
    return table


def _facts(loaded: Loaded, registry: Registry) -> list[tuple[str, str]]:
    config = loaded.config
    routing = config.routing
    defaults = [f"{role} {name}" for role, name in registry.default_models.items()]
    most = routing.max_cost_per_request
    order = "the cheaper first among equals" if routing.cost_aware else "the file's order among equals"
    return [
        ("defaults", ", ".join(defaults) or "none: by priority"),
        ("when one fails", "the next is asked" if routing.auto_fallback else "nobody else is asked"),
        ("order", f"by priority, then {order}"),
        ("one request", f"at most {dollars(most)}" if most is not None else "may cost any amount (no limit)"),
        ("unknown price", "refused" if config.unknown_price == "refuse" else "taken as free"),
        ("store", _store(loaded)),
        ("ledger", _ledger(loaded)),
    ]


def _store(loaded: Loaded) -> str:
    store = loaded.config.store
    return (
        str(loaded.path(store.path)) if store.kind == "embedded" else f"weaviate at {without_secrets(store.url or '')}"
    )


def _ledger(loaded: Loaded) -> str:
    url = loaded.config.ledger.url
    if url.startswith("sqlite:///"):
        return str(loaded.path(url.removeprefix("sqlite:///")))
    return without_secrets(url)


def _without_effect(config: Config) -> list[str]:
    """What the file declares and nothing acts on yet: said here, since silence would promise it."""
    return [
        f"`{name}`: checked, and without effect in this version." for name in PLANNED if name in config.model_fields_set
    ]


# --- for programs --------------------------------------------------------------------------


def _picture(loaded: Loaded, registry: Registry) -> dict[str, Any]:
    config = loaded.config
    written = _written_keys(loaded)
    from sekha.spaces import index_for

    return {
        "source": loaded.source,
        "providers": [
            {
                "id": spec.id,
                "kind": spec.kind,
                "base_url": without_secrets(spec.base_url) if spec.base_url else None,
                "priority": spec.priority,
                "timeout_seconds": spec.timeout_seconds,
                "key_set": spec.api_key is not None,
                "key_from": written.get(spec.id),
            }
            for spec in registry.providers.values()
        ],
        "models": [_model(model) for model in registry],
        "default_models": dict(registry.default_models),
        "routing": config.routing.model_dump(),
        "unknown_price": config.unknown_price,
        "collections": [
            {"name": name, "space": index_for(space, ()).name, "model": space.model.name, "dimension": space.dimension}
            for name in registry.collections
            for space in (registry.space(name),)
        ],
        "store": {"kind": config.store.kind, "where": _store(loaded)},
        "ledger": _ledger(loaded),
        "budgets": [budget.model_dump() for budget in config.budgets],
        "warnings": [*loaded.warnings, *_without_effect(config)],
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "model_id": model.id,
        "provider_id": model.provider_id,
        "tasks": model.tasks,
        "context_window": model.context_window,
        "max_output_tokens": model.max_output_tokens,
        "dimension": model.dimension,
        "vision": model.vision,
        "audio": model.audio,
        "function_calling": model.function_calling,
        "price": model.price,
    }


# --- what must not be shown ----------------------------------------------------------------

_NAMED = re.compile(r"\$\{(block:[^}]+|[A-Za-z_][A-Za-z0-9_]*)")


def _written_keys(loaded: Loaded) -> Mapping[str, str]:
    """Provider → the reference its key was written as: the name alone, never a default behind it."""
    from pathlib import Path

    from sekha import yaml_file

    try:
        data = yaml_file.read(Path(loaded.source).read_text("utf-8")).data
    except (OSError, UnicodeDecodeError):
        return {}  # not from a file
    sections = data.get("providers") or data.get("llm_providers") if isinstance(data, dict) else None
    return {
        str(section["id"]): f"${{{found[1]}}}"
        for section in sections or ()
        if "id" in section and (found := _NAMED.match(str(section.get("api_key"))))
    }
