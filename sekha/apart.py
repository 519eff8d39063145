"""What in a request has a price apart from its tokens', and what would have another model answer it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sekha.errors import InvalidRequest

__all__ = ["check_no_other_model", "chooses_a_host", "is_of_provider"]

_OTHER_MODELS = ("models", "route", "preset", "fallbacks")
"""Fields by which OpenRouter, and other gateways, are told to answer with another model than the one asked for."""

_OF_NO_HOST = frozenset(
    {"allow_fallbacks", "data_collection", "enforce_distillable_text", "max_price", "require_parameters", "zdr"}
)
"""What OpenRouter's `provider` may say without choosing a host: what any of them has to keep."""

_BY_PRICE = ("price", {"by": "price"})
"""What its `sort` may say, in both of its shapes."""

_FUNCTIONS = ({"function_declarations"}, {"functionDeclarations"}, {"toolSpec"})
"""All that Gemini's and Bedrock's tools have that the caller runs."""

_UNPRICED_TOOLS = ("bash_", "computer_", "memory_", "text_editor_", "tool_search_tool_")
"""Anthropic's tools that the caller runs, and the one that finds what is in the request anyway. Dates follow."""


def check_no_other_model(options: Mapping[str, Any]) -> None:
    """Refuse what would let a provider answer with a model whose price and permission nobody looked up."""
    for name in _OTHER_MODELS:
        # By itself `route` says what is so anyway: that where `models` names others those are asked next.
        if (value := options.get(name)) and (name, value) != ("route", "fallback"):
            raise InvalidRequest(
                f"`{name}` lets the provider answer with another model, which is neither priced nor checked "
                f"against the key. Leave `{name}` out, and list that model in sekha.yaml: Sekha falls back by itself.",
                field=name,
            )


def chooses_a_host(provider: object) -> bool:
    """Whether OpenRouter's `provider` picks one of a model's hosts by anything but its price: each has its own."""
    if not isinstance(provider, (dict, Mapping)):
        return bool(provider)
    return any(
        value and name not in _OF_NO_HOST and not (name == "sort" and value in _BY_PRICE)
        for name, value in provider.items()
    )


def is_of_provider(tool: Mapping[str, Any]) -> bool:
    """Whether the provider runs a tool itself, as a search or a sandbox, which has a price of its own.

    One that nobody knows is taken for such. What the caller runs has a name, and Gemini's own have none.
    """
    if tool.keys() in _FUNCTIONS:
        return False
    if not ("function" in tool or "name" in tool or "custom" in tool):
        return True
    kind = tool.get("type")
    return kind not in (None, "function", "custom") and not (isinstance(kind, str) and kind.startswith(_UNPRICED_TOOLS))
