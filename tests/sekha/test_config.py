from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sekha.config import Config, json_schema
from sekha.errors import ConfigError
from sekha.loading import load, parse
from sekha.registry import TASKS

SCHEMA = jsonschema.Draft202012Validator(json_schema())
MODEL = {"model_id": "m", "task": "embedding", "dimension": 8}
PROVIDER = {"id": "a", "provider_type": "openai", "models": [MODEL]}

GOOD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "2.0": {
        "config_version": "2.0",
        "llm_providers": [{"id": "o", "type": "ollama", "base_url": "http://localhost:1", "models": [MODEL]}],
        "default_models": {"embedding": "m", "chat_vision": None},
        "routing": {"max_cost_per_request": 0.1, "circuit_breaker": {"failure_threshold": 3}},
    },
    "a version as YAML reads it": {"version": 2.0},
    "prices": {"providers": [{**PROVIDER, "models": [{**MODEL, "price": "free"}]}]},
    "a price": {"providers": [{**PROVIDER, "models": [{**MODEL, "price": {"input_per_million": 0.02}}]}]},
    "references": {"server_port": "${PORT}", "providers": [{**PROVIDER, "priority": "${PRIORITY:-3}"}]},
    "empty sections": {"providers": None, "budgets": None, "routing": None},
    "keys of the original": {"celery_broker_url": "redis://x", "redis_url": "redis://x"},
    "budgets": {"budgets": [{"name": "a", "limit": 1.5, "period": "day", "match": {"tag": "x"}}]},
    "log level": {"log_level": "info"},
}


def load_plain(document: dict[str, Any]) -> Config:
    environ = {"PORT": "1"}
    return parse(document, source="here", folder=Path(), environ=environ).config


@pytest.mark.parametrize("name", GOOD)
def test_editors_accept_what_loads(name: str) -> None:
    load_plain(GOOD[name])

    SCHEMA.validate(GOOD[name])


@pytest.mark.parametrize(
    "document",
    [
        {"provders": []},
        {"providers": [{"id": "a"}]},
        {"providers": [{"id": "a", "provider_type": "opneai"}]},
        {"providers": [{**PROVIDER, "apikey": "${X}"}]},
        {"providers": [{**PROVIDER, "models": [{"model_id": "m", "task": "chat"}]}]},
        {"providers": [{**PROVIDER, "models": [{**MODEL, "price": "cheap"}]}]},
        {"routing": {"cost_awre": True}},
        {"store": {"kind": "chroma"}},
        {"server_port": 70000},
        {"budgets": [{"name": "a"}]},
        {"budgets": [{"name": "a", "limit": 1, "match": {"modle": "m"}}]},
        {"collections": {"docs": {}}},
    ],
)
def test_editors_mark_what_does_not_load(document: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_plain(document)

    assert not SCHEMA.is_valid(document)


names = st.text("abcdefghij", min_size=1, max_size=8)
money = st.floats(0, 1000).map(lambda amount: round(amount, 6))
prices = st.one_of(
    st.just("free"), st.fixed_dictionaries({"input_per_million": money}, optional={"output_per_million": money})
)
models = st.fixed_dictionaries(
    {"model_id": names, "task": st.sampled_from(TASKS), "dimension": st.integers(1, 65_536)},
    optional={"price": prices, "supports_vision": st.booleans(), "context_window": st.integers(1, 10**6)},
)
providers = st.fixed_dictionaries(
    {"id": names, "provider_type": st.sampled_from(["ollama", "openai", "anthropic", "openrouter", "litellm"])},
    optional={
        "priority": st.integers(1, 100),
        "timeout_secs": st.floats(0.1, 1000),
        "models": st.lists(models, max_size=3, unique_by=lambda model: (model["model_id"], model["task"])),
    },
)
budgets = st.fixed_dictionaries(
    {"name": names, "limit": money}, optional={"period": st.sampled_from(["hour", "day", "month", "total"])}
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "providers": st.lists(providers, max_size=3, unique_by=lambda provider: provider["id"]),
        "budgets": st.lists(budgets, max_size=3, unique_by=lambda budget: budget["name"]),
        "routing": st.fixed_dictionaries({}, optional={"auto_fallback": st.booleans(), "cost_aware": st.booleans()}),
        "unknown_price": st.sampled_from(["refuse", "free"]),
        "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
        "server_port": st.integers(1, 65_535),
    },
)


@given(documents)
def test_any_valid_document_loads_from_yaml_and_satisfies_editors(document: dict[str, Any]) -> None:
    config = load_plain(yaml.safe_load(yaml.safe_dump(document)))

    SCHEMA.validate(document)
    assert [section.id for section in config.providers] == [each["id"] for each in document.get("providers", [])]


@given(documents, st.text("abcdefghij_", min_size=1, max_size=12))
def test_an_unknown_key_is_refused_everywhere(document: dict[str, Any], key: str) -> None:
    places: list[dict[str, Any]] = [document, *document.get("providers", ()), *document.get("budgets", ())]
    if "routing" in document:
        places.append(document["routing"])
    for place in places:
        if (unknown := f"zz_{key}") not in place:
            place[unknown] = 1

            with pytest.raises(ConfigError, match="unknown key"):
                load_plain(document)
            assert not SCHEMA.is_valid(document)

            del place[unknown]


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


def test_every_field_says_what_it_means() -> None:
    silent = [
        f"{section.__name__}.{name}"
        for section in sections(Config)
        for name, field in section.model_fields.items()
        if not (field.description or "").endswith(".")
    ]

    assert not silent


def test_a_configuration_cannot_be_changed_once_loaded(tmp_path: Path) -> None:
    file = tmp_path / "sekha.yaml"
    file.write_text("server_port: 1\n")

    with pytest.raises(ValueError, match="frozen"):
        load(file, environ={}).config.server_port = 2


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
EXAMPLES = [
    example
    for example in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    if example and example.keys() <= Config.model_fields.keys()
]


@pytest.mark.parametrize("example", EXAMPLES, ids=", ".join)
def test_every_example_in_the_documentation_loads(example: dict[str, Any]) -> None:
    providers = next(other["providers"] for other in EXAMPLES if len(other.get("providers", ())) > 1)

    parse({"providers": providers, **example}, source="docs", folder=Path(), environ={"OPENAI_API_KEY": "x"})

    SCHEMA.validate(example)
