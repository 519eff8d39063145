"""From a provider as declared to one that can be called."""

from __future__ import annotations

from collections.abc import Iterable

from sekha.providers.base import Provider
from sekha.registry import ProviderSpec

__all__ = ["import_ahead", "open_provider"]


def import_ahead(specs: Iterable[ProviderSpec]) -> None:
    """Begin to import in the background what the first call to one of these providers would else wait for."""
    if any(spec.kind not in ("builtin", "openai", "openrouter") for spec in specs):
        from sekha.providers.litellm import begin_import

        begin_import()


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
