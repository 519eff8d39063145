"""From a provider as declared to one that can be called."""

from __future__ import annotations

from sekha.providers.base import Provider
from sekha.registry import ProviderSpec

__all__ = ["open_provider"]


def open_provider(spec: ProviderSpec) -> Provider:
    """Open a provider. It connects, and imports what it needs, with its first call."""
    match spec.kind:
        case "builtin":
            from sekha.providers.builtin import BuiltinProvider

            return BuiltinProvider(spec)
        case "openai" | "openrouter":
            from sekha.providers.relay import RelayProvider

            return RelayProvider(spec)
        case _:
            from sekha.providers.litellm import LiteLLMProvider

            return LiteLLMProvider(spec)
