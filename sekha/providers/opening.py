"""From a provider as declared to one that can be called."""

from __future__ import annotations

from sekha.providers.base import Provider
from sekha.providers.builtin import BuiltinProvider
from sekha.providers.litellm import LiteLLMProvider
from sekha.registry import ProviderSpec

__all__ = ["open_provider"]


def open_provider(spec: ProviderSpec) -> Provider:
    """Open a provider. It connects, and imports what it needs, with its first call."""
    if spec.kind == "builtin":
        return BuiltinProvider(spec)
    return LiteLLMProvider(spec)
