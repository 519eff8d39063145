import json
import subprocess
import sys
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sekha.price_map import PriceMap
from sekha.registry import ProviderKind


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, Any]]:
    """The map with its numbers as they are written."""
    spec = find_spec("litellm")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "model_prices_and_context_window_backup.json"
    return json.loads(file.read_text(), parse_float=Decimal, parse_int=Decimal)


def test_prices_are_per_million_tokens_and_exact() -> None:
    price = PriceMap.bundled().price("openai", "gpt-4o-mini")

    assert price is not None
    assert (price.input, price.output, price.cached_input) == (Decimal("0.15"), Decimal("0.60"), Decimal("0.075"))
    assert price.source == "price map"


def test_every_price_of_the_map_is_the_number_it_writes(texts: dict[str, dict[str, Any]]) -> None:
    priced = 0

    for name, entry in texts.items():
        price = PriceMap.bundled().price("litellm", name)
        if price is None or price.source == "local" or price.is_free:
            continue
        assert price.input == entry["input_cost_per_token"] * 1_000_000, name
        assert price.output == entry.get("output_cost_per_token", Decimal(0)) * 1_000_000, name
        priced += 1

    assert priced > 1500


@pytest.mark.parametrize(
    ("kind", "model_id", "expected"),
    [
        ("openai", "text-embedding-3-small", "0.02"),
        ("anthropic", "claude-sonnet-4-5", "3"),
        ("openrouter", "anthropic/claude-sonnet-4.5", "3"),
        ("openrouter", "openai/gpt-4o", "2.5"),
        ("litellm", "openai/gpt-4o", "2.5"),
        ("litellm", "gemini/gemini-2.5-flash", "0.3"),
    ],
)
def test_a_model_is_found_under_its_providers_name(kind: ProviderKind, model_id: str, expected: str) -> None:
    price = PriceMap.bundled().price(kind, model_id)

    assert price is not None
    assert str(price.input) == expected


@pytest.mark.parametrize(
    ("kind", "model_id"),
    [
        ("openai", "nobody-knows-this"),
        ("openai", "claude-sonnet-4-5"),
        ("anthropic", "gpt-4o"),
        ("litellm", "gemini/gemma-3-27b-it"),  # both prices are written as 0
        ("litellm", "perplexity/sonar-small-online"),  # charges by the request as well
        ("litellm", "dashscope/qwen-turbo"),  # charges more for reasoning
        ("openai", "omni-moderation-latest"),
        ("openai", "gpt-4o-search-preview"),  # search on every request, for a fee
        ("openai", "gpt-4o-mini-search-preview-2025-03-11"),
        ("openai", "gpt-5-search-api"),
        ("openai", "o3-deep-research"),
        ("openrouter", "openai/gpt-4o-search-preview"),
        ("litellm", "openai/gpt-5-search-api"),
        ("litellm", "perplexity/sonar-pro"),
        ("openrouter", "meta-llama/llama-3.1-8b-instruct"),
        ("ollama", "gpt-oss:20b-cloud"),
        ("litellm", "ollama/gpt-oss:20b-cloud"),
    ],
)
def test_what_the_map_cannot_tell_is_unknown_and_not_free(kind: ProviderKind, model_id: str) -> None:
    assert PriceMap.bundled().price(kind, model_id) is None


@pytest.mark.parametrize(
    ("kind", "model_id"),
    [
        ("openai", "gpt-4o"),  # searches when it is asked to
        ("anthropic", "claude-sonnet-4-5"),
        ("litellm", "nebius/NousResearch/Hermes-4-70B"),
    ],
)
def test_a_model_that_searches_when_it_is_asked_to_has_the_price_of_its_tokens(
    kind: ProviderKind, model_id: str
) -> None:
    assert PriceMap.bundled().price(kind, model_id) is not None


@pytest.mark.parametrize(
    ("kind", "model_id", "source"),
    [
        ("ollama", "whatever-was-pulled", "local"),
        ("builtin", "echo", "local"),
        ("litellm", "ollama_chat/llama3", "local"),
        ("openrouter", "meta-llama/llama-3.1-8b-instruct:free", "price map"),
    ],
)
def test_what_costs_nothing_is_free(kind: ProviderKind, model_id: str, source: str) -> None:
    price = PriceMap.bundled().price(kind, model_id)

    assert price is not None
    assert price.is_free
    assert price.source == source


def test_limits_say_what_a_model_takes_and_can_do() -> None:
    chat = PriceMap.bundled().limits("openai", "gpt-4o-mini")
    embedding = PriceMap.bundled().limits("openai", "text-embedding-3-large")

    assert chat is not None
    assert (chat.context_window, chat.max_output_tokens) == (128_000, 16_384)
    assert (chat.vision, chat.function_calling, chat.dimension) == (True, True, None)
    assert embedding is not None
    assert (embedding.dimension, embedding.vision, embedding.max_output_tokens) == (3072, False, None)
    assert PriceMap.bundled().limits("openai", "nobody-knows-this") is None


def test_a_tag_of_an_ollama_model_has_its_models_limits() -> None:
    limits = PriceMap.bundled().limits("ollama", "llama3.1:8b")

    assert limits is not None
    assert limits.function_calling


def test_litellm_is_not_imported() -> None:
    program = (
        "import sys; from sekha.price_map import PriceMap; "
        "assert PriceMap.bundled().price('openai', 'gpt-4o'); assert 'litellm' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_service_tier_has_the_price_that_the_map_has_for_it() -> None:
    entry = {
        "mode": "chat",
        "litellm_provider": "openai",
        "input_cost_per_token": 2e-6,
        "output_cost_per_token": 8e-6,
        "cache_read_input_token_cost": 1e-6,
        "input_cost_per_token_above_272k_tokens": 4e-6,
        "input_cost_per_token_flex": 1e-6,
        "output_cost_per_token_flex": 4e-6,
        "cache_read_input_token_cost_flex": 5e-7,
        "input_cost_per_token_above_272k_tokens_flex": 2e-6,
        "input_cost_per_token_priority": 3e-6,
        "output_cost_per_token_priority": 12e-6,
    }
    price = PriceMap({"m": entry}).price("openai", "m")
    assert price is not None
    flex, priority = price.of_tier("flex"), price.of_tier("priority")

    assert (flex.input, flex.output, flex.cached_input, flex.at(300_000).input) == (1, 4, Decimal("0.5"), 2)
    # Long input is not taken in that tier, and costs what it costs without.
    assert (priority.input, priority.output, priority.at(300_000).input) == (3, 12, 4)
    assert price.of_tier("default") == price.of_tier(None) == price


def test_half_of_a_tiers_price_is_none() -> None:
    entry = {
        "mode": "chat",
        "litellm_provider": "openai",
        "input_cost_per_token": 2e-6,
        "output_cost_per_token": 8e-6,
        "input_cost_per_token_priority": 3e-6,
    }
    price = PriceMap({"m": entry}).price("openai", "m")

    assert price is not None
    assert price.tiers == ()
