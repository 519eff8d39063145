from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sekha.errors import UnknownModel
from sekha.loading import parse
from sekha.price_map import PriceMap
from sekha.registry import Registry

PRICES = PriceMap(
    {
        "known": {
            "mode": "chat",
            "litellm_provider": "openai",
            "input_cost_per_token": 1e-06,
            "output_cost_per_token": 2e-06,
            "max_input_tokens": 1000,
            "max_output_tokens": 100,
        }
    }
)


def registry(*providers: dict[str, Any], **sections: Any) -> Registry:
    config = parse({"providers": providers, **sections}, source="here", folder=Path(), environ={}).config
    return Registry.from_config(config, PRICES)


def provider(name: str, *models: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": name, "provider_type": "openai", "models": models, **fields}


def model(name: str, task: str = "chat_small", **fields: Any) -> dict[str, Any]:
    return {"model_id": name, "task": task, **fields}


def vectors(name: str, dimension: int = 8) -> dict[str, Any]:
    return model(name, "embedding", dimension=dimension)


def names(models: object) -> list[str]:
    return [each.name for each in models]  # type: ignore[attr-defined]


def test_models_come_in_the_order_of_their_providers_priority() -> None:
    found = registry(provider("slow", model("m"), priority=9), provider("fast", model("m"), model("n"), priority=1))

    assert names(found) == ["fast/m", "fast/n", "slow/m"]


def test_one_model_under_several_tasks_is_one_model() -> None:
    (only,) = registry(provider("a", model("m", "chat_small", context_window=5), model("m", "vision", weight=3)))

    assert only.tasks == ("chat_small", "vision")
    assert (only.context_window, only.weight, only.vision) == (5, 3, True)


def test_a_model_is_meant_by_its_id_at_any_provider_or_by_its_full_name() -> None:
    found = registry(provider("a", model("m")), provider("b", model("m")))

    assert names(found.named("m")) == ["a/m", "b/m"]
    assert names(found.named("b/m")) == ["b/m"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownModel, match="Did you mean 'gpt-5-mini'"):
        registry(provider("a", model("gpt-5-mini"))).named("gpt-5-mni")


def test_what_the_file_leaves_out_comes_from_the_price_map() -> None:
    (found,) = registry(provider("a", model("known")))

    assert (found.context_window, found.max_output_tokens) == (1000, 100)
    assert found.price is not None
    assert (found.price.input, found.price.output, found.price.source) == (Decimal(1), Decimal(2), "price map")


def test_what_the_file_says_holds() -> None:
    (found,) = registry(provider("a", model("known", context_window=5, price={"input_per_million": 7})))

    assert found.context_window == 5
    assert found.price is not None
    assert (found.price.input, found.price.output, found.price.source) == (Decimal(7), Decimal(0), "configured")


def test_a_price_that_nobody_knows_is_unknown_unless_the_file_calls_it_free() -> None:
    refused = registry(provider("a", model("mystery")))
    free = registry(provider("a", model("mystery")), unknown_price="free")

    assert [each.price for each in refused] == [None]
    assert [each.price.is_free for each in free if each.price] == [True]


def test_the_default_goes_first_and_without_one_all_of_the_task_stand() -> None:
    found = registry(provider("a", model("m"), model("n"), vectors("e")), default_models={"chat_fast": "n"})

    assert names(found.default_for("chat_fast")) == ["a/n"]
    assert names(found.default_for("chat_smart")) == ["a/m", "a/n"]
    assert names(found.default_for("chat_vision")) == []
    assert names(found.default_for("embedding")) == ["a/e"]


def test_a_space_is_a_collections_vectors_of_one_model() -> None:
    space = registry(provider("a", vectors("e", 768)), collections={"documents": {"model": "e"}}).space("documents")

    assert (space.collection, space.dimension, space.shared) == ("documents", 768, True)
    assert space.fingerprint == "openai/e:768:unit"


@pytest.mark.parametrize(
    ("kind", "name", "fields", "fingerprint"),
    [
        ("openai", "e3", {}, "openai/e3:8:unit"),
        ("openrouter", "openai/e3", {}, "openai/e3:8:unit"),
        ("litellm", "openrouter/openai/e3", {}, "openai/e3:8:unit"),
        ("ollama", "nomic:latest", {}, "ollama/nomic:8:unit"),
        ("ollama", "nomic", {"revision": "v1.5"}, "ollama/nomic@v1.5:8:unit"),
        ("openai", "gw-embeddings", {"same_as": "openai/e3"}, "openai/e3:8:unit"),
        ("ollama", "nomic", {"query_prefix": "query: "}, "ollama/nomic:8:unit"),
        ("ollama", "nomic", {"document_prefix": "passage: "}, "ollama/nomic:8:unit:707ad539"),
    ],
)
def test_a_fingerprint_says_whose_vectors_can_be_compared(
    kind: str, name: str, fields: dict[str, Any], fingerprint: str
) -> None:
    given = {"id": "a", "provider_type": kind, "models": [{**vectors(name), **fields}]}

    (only,) = registry(given)

    assert only.fingerprint == fingerprint


def test_a_collection_under_a_full_name_belongs_to_that_provider_alone() -> None:
    space = registry(
        provider("a", vectors("e")), provider("b", vectors("e")), collections={"documents": {"model": "b/e"}}
    ).space("documents")

    assert (space.model.name, space.shared) == ("b/e", False)


def test_a_collection_that_the_file_does_not_name_lives_under_the_default_model() -> None:
    found = registry(provider("a", vectors("e"), vectors("f", 4)), default_models={"embedding": "f"})

    assert found.space("notes").model.name == "a/f"


def test_no_embedding_model_is_no_space() -> None:
    with pytest.raises(UnknownModel):
        registry(provider("a", model("m"))).space("notes")


def test_a_providers_key_never_shows() -> None:
    config = parse(
        {"providers": [provider("a", api_key="${KEY}")]}, source="", folder=Path(), environ={"KEY": "sk-canary"}
    ).config

    shown = repr(Registry.from_config(config, PRICES))

    assert "sk-canary" not in shown
    assert "sk-canary" not in json.dumps(config.model_dump(mode="json"))
