"""Public prices and limits of models, read from the map that LiteLLM ships, without importing LiteLLM.

What the map says is believed only where it can be: an entry of zero, one with half of its prices,
or one that also charges by the request, for searches of its own, or more for reasoning, is an unknown price, never a
free model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from sekha.pricing import FREE, Price
from sekha.registry import ProviderKind

__all__ = ["ModelLimits", "PriceMap"]

_SEARCHES = re.compile(r"(^|[/-])(search|deep-research|sonar)(-|$)")
"""In the name of a model that searches unasked, for a fee beside the tokens. The map has that fee for others too, which
search when they are asked to.
"""
_ABOVE = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")
_MAP = "model_prices_and_context_window_backup.json"
_TIERS = ("flex", "priority")
_MILLION = Decimal(1_000_000)
_PRICED_BY_TOKEN = ("chat", "completion", "responses", "embedding")
_LOCAL_PREFIXES = ("ollama/", "ollama_chat/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model takes and can do. None where the map does not say."""

    context_window: int | None = None
    max_output_tokens: int | None = None
    dimension: int | None = None
    vision: bool = False
    audio: bool | None = None
    function_calling: bool | None = None
    reasoning: bool = False
    adaptive_thinking: bool = False
    """Whether it decides itself for how long it thinks."""


class PriceMap:
    """Prices and limits by provider kind and model id.

    >>> PriceMap.bundled().price("openai", "gpt-4o-mini").input
    Decimal('0.15')
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._entries = entries

    @classmethod
    def bundled(cls) -> PriceMap:
        """The map of the installed LiteLLM, parsed once per process."""
        return _bundled()

    def price(self, kind: ProviderKind, model_id: str) -> Price | None:
        """US dollars per million tokens, or None when nobody can tell."""
        if _is_local(kind, model_id):
            return FREE
        if _is_openrouter(kind, model_id) and model_id.endswith(":free"):
            return Price(source="price map")
        entry = self._find(kind, model_id)
        return None if entry is None or _SEARCHES.search(model_id) else _price(entry)

    def limits(self, kind: ProviderKind, model_id: str) -> ModelLimits | None:
        entry = self._find(kind, model_id)
        if entry is None:
            return None
        embeds = entry.get("mode") == "embedding"
        return ModelLimits(
            context_window=_whole(entry.get("max_input_tokens")) or _whole(entry.get("max_tokens")),
            max_output_tokens=None if embeds else _whole(entry.get("max_output_tokens")),
            dimension=_whole(entry.get("output_vector_size")),
            vision=bool(entry.get("supports_vision")),
            audio=_flag(entry.get("supports_audio_input")),
            function_calling=_flag(entry.get("supports_function_calling")),
            reasoning=bool(entry.get("supports_reasoning")),
            adaptive_thinking=bool(entry.get("supports_adaptive_thinking")),
        )

    def _find(self, kind: ProviderKind, model_id: str) -> Mapping[str, Any] | None:
        for key, provider in _keys(kind, model_id):
            entry = self._entries.get(key)
            if entry is not None and provider in (None, entry.get("litellm_provider")):
                return entry
        return None


@cache
def _bundled() -> PriceMap:
    spec = find_spec("litellm")
    if spec is None or not spec.submodule_search_locations:
        return PriceMap({})
    return PriceMap(orjson.loads(Path(spec.submodule_search_locations[0], _MAP).read_bytes()))


def _keys(kind: ProviderKind, model_id: str) -> Iterator[tuple[str, str | None]]:
    """The map's names for a model, the likeliest first, each with the provider its entry must have."""
    match kind:
        case "builtin":
            return
        case "ollama":
            # `llama3.1:8b` is a tag of `llama3.1`, and the map mostly knows the latter.
            yield f"ollama/{model_id}", None
            yield f"ollama/{model_id.partition(':')[0]}", None
        case "openai" | "anthropic":
            yield model_id, kind
            yield f"{kind}/{model_id}", kind
        case "openrouter":
            yield from _openrouter_keys(model_id)
        case "litellm":
            yield model_id, None
            provider, _, name = model_id.partition("/")
            if provider == "openrouter":
                yield from _openrouter_keys(name)
            elif name:
                yield name, provider


def _openrouter_keys(model_id: str) -> Iterator[tuple[str, str | None]]:
    yield f"openrouter/{model_id}", "openrouter"
    # OpenRouter names the vendor first and passes the vendor's price through:
    # https://openrouter.ai/docs/faq. An open model has many hosts with a price each, so it stays unknown.
    vendor, _, name = model_id.partition("/")
    if vendor == "openai":
        yield name, "openai"
    elif vendor == "anthropic":
        yield name.replace(".", "-"), "anthropic"


def _is_local(kind: ProviderKind, model_id: str) -> bool:
    # Ollama's `-cloud` models run on its own machines, under a plan.
    return kind == "builtin" or (
        (kind == "ollama" or (kind == "litellm" and model_id.startswith(_LOCAL_PREFIXES)))
        and not model_id.endswith("-cloud")
    )


def _is_openrouter(kind: ProviderKind, model_id: str) -> bool:
    return kind == "openrouter" or (kind == "litellm" and model_id.startswith("openrouter/"))


def _price(entry: Mapping[str, Any]) -> Price | None:
    if entry.get("mode") not in _PRICED_BY_TOKEN or entry.get("input_cost_per_request"):
        return None
    input_price = _per_million(entry.get("input_cost_per_token"))
    output_price = _per_million(entry.get("output_cost_per_token"))
    if entry["mode"] == "embedding":
        output_price = output_price or Decimal(0)
    elif not output_price or (entry.get("output_cost_per_reasoning_token") or 0) > entry["output_cost_per_token"]:
        return None  # replies do not say beforehand how much of them will be reasoning
    if not input_price or output_price is None:
        return None
    per_image = entry.get("input_cost_per_image")
    price = Price(
        input=input_price,
        output=output_price,
        cached_input=_per_million(entry.get("cache_read_input_token_cost")),
        cache_write=_per_million(entry.get("cache_creation_input_token_cost")),
        per_image=Decimal(repr(per_image)) if per_image else None,
        source="price map",
    )
    price = replace(price, long_input=tuple(_long_input(entry, price)))
    return replace(price, tiers=tuple(_tiers(entry, price)))


def _long_input(entry: Mapping[str, Any], price: Price) -> Iterator[tuple[int, Price]]:
    """The prices of long inputs, from names such as `input_cost_per_token_above_200k_tokens`."""
    lengths = sorted(int(found[1]) for key in entry if (found := _ABOVE.fullmatch(key)))
    for thousands in lengths:
        yield thousands * 1000, _with_tail(entry, price, f"_above_{thousands}k_tokens")


def _tiers(entry: Mapping[str, Any], price: Price) -> Iterator[tuple[str, Price]]:
    """The prices of service tiers, from names such as `input_cost_per_token_flex`; half of one is none."""
    for name in _TIERS:
        tail = f"_{name}"
        if entry.get(f"input_cost_per_token{tail}") and entry.get(f"output_cost_per_token{tail}"):
            # Long input costs as ever where the map has no price for it: then it is not taken in that tier.
            long_input = tuple(
                (above, _with_tail(entry, dear, f"_above_{above // 1000}k_tokens{tail}"))
                for above, dear in price.long_input
            )
            yield name, replace(_with_tail(entry, price, tail), long_input=long_input)


def _with_tail(entry: Mapping[str, Any], price: Price, tail: str) -> Price:
    """The price with whatever has one under a name with this tail."""
    return replace(
        price,
        input=_per_million(entry.get(f"input_cost_per_token{tail}")) or price.input,
        output=_per_million(entry.get(f"output_cost_per_token{tail}")) or price.output,
        cached_input=_per_million(entry.get(f"cache_read_input_token_cost{tail}")) or price.cached_input,
        cache_write=_per_million(entry.get(f"cache_creation_input_token_cost{tail}")) or price.cache_write,
    )


def _per_million(per_token: float | None) -> Decimal | None:
    # `repr` of a float is the shortest text that reads back as it, which is the text of the map.
    if per_token is None:
        return None
    return Decimal(f"{(Decimal(repr(per_token)) * _MILLION).normalize():f}")  # 10, not 1E+1


def _flag(value: object) -> bool | None:
    # Most entries leave out what they could say, so that silence is no answer.
    return value if isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and value > 0 else None
